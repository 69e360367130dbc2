//! From what is programmed to what is wanted: the writes, in an order in which no connection ever
//! meets a half-programmed Service.
//!
//! ```text
//!  1 remove frontends that nobody wants          (first: it makes room)
//!  per set of backends:
//!  2   write new backends under fresh ids        nothing refers to them yet
//!  3   write their ids into a fresh range        nothing refers to it yet; so with source ranges
//!  4   one update per frontend: {base, count}    the switch; old connections go on
//!  5   retire backends that left every range     an affinity must not bring them back
//!      (also those that an agent which died here had left)
//!      remove source ranges that nobody asks for
//!  later (1 s) ranges and ids are free again     see `arena`
//! ```
//! Invariants, checked step by step by the property test:
//! * each frontend resolves at every moment entirely to its old or entirely to its new backends;
//! * what a program read of a frontend stays true for 1 s after the frontend was switched;
//! * each client may use a frontend from outside if the old or the new source ranges of its set say so;
//! * a frontend belongs to one Service: the first that claims it, until that one lets go;
//! * planning the same state again, also after adopting it from the maps, is no step at all.
//!
//! Frontends for the outside share the range of the others of their set, until there are so many
//! backends that they need a table of their own (see [`super::maglev`]). Where no table fits, they
//! share the range all the same: a client then may get another backend at another node.
//!
//! One exception, where the arena is full (or all that is free is in quarantine, as in the first
//! second after a restart): removals must not fail, so the slots of backends that left are
//! overwritten with ids of those that stay. A reader then gets one of those, which are old and new
//! alike; only the shares are uneven until there is room.
//!
//! [`Table`] is this agent's picture of the maps. The caller performs the steps in order; if one
//! fails the picture is void and must be made again with [`Table::adopt`].

mod adopt;
mod batch;
mod claims;
mod look;
mod number;
mod place;
mod source_ranges;
mod step;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::BuildHasherDefault;
use std::sync::Arc;
use std::time::Duration;

use ebpf_maps::services::{
    BACKEND_ON_TRIAL, BackendValue, FRONTEND_DIRECT_RETURN, FRONTEND_DROP,
    FRONTEND_LEAST_CONNECTIONS, FRONTEND_RESTRICTED, FrontendKey, FrontendValue, SCOPE_NODE_PORT,
    SCOPE_OUTSIDE_NODE_PORT,
};

pub use self::adopt::Found;
pub use self::batch::{Write, in_batches};
pub use self::step::{BackendId, Limits, Plan, Step};
use super::arena::Arena;
use super::index::{Backend, BackendSet, SetName, ip_of};
use super::maglev;
use crate::view::ServiceName;
use number::{ByNumber, NumberHasher};
use place::Request;
use source_ranges::SourceRanges;

/// A range of slots that frontends refer to.
#[derive(Debug)]
struct Range {
    ids: Vec<BackendId>,
    is_table: bool,
    service_id: u32,
    frontend_count: u32,
}

#[derive(Debug)]
struct Known {
    backend: Backend,
    /// Slots in referenced ranges that hold this id.
    slot_count: u32,
}

/// What is a Service's.
#[derive(Debug, Default)]
struct Own {
    /// The frontends that it has claimed, each once.
    keys: Vec<FrontendKey>,
    /// The ids of its sets.
    ids: Vec<(SetName, u32)>,
}

/// What is programmed, and what of the arenas is free.
#[derive(Debug)]
pub struct Table {
    limits: Limits,
    frontends: HashMap<FrontendKey, FrontendValue>,
    /// By first slot.
    ranges: ByNumber<u32, Range>,
    backends: ByNumber<BackendId, Known>,
    slots: Arena,
    ids: Arena,
    /// Unreferenced since the last plan, not yet in quarantine: the clock starts when the steps
    /// have been performed.
    left_ranges: Vec<(u32, u32)>,
    left_ids: Vec<BackendId>,
    /// Found in use, and in no range: retired by the next plan.
    unretired: BTreeSet<BackendId>,
    claims: HashMap<FrontendKey, Arc<ServiceName>>,
    services: HashMap<Arc<ServiceName>, Own>,
    /// Programmed, but claimed by nobody: removed by the next plan.
    unclaimed: BTreeSet<FrontendKey>,
    service_ids_in_use: HashSet<u32, BuildHasherDefault<NumberHasher>>,
    next_service_id: u32,
    /// By service id; no empty ones.
    source_ranges: BTreeMap<u32, SourceRanges>,
}

impl Table {
    /// Plans the change of some Services; all others stay as they are, except that the first plan
    /// after [`Table::adopt`] removes every frontend that `wanted` does not contain.
    ///
    /// * `wanted` – the changed Services, whole; no set: the Service is gone.
    /// * `generation` – the store revision, for the values.
    /// * `now` – since any fixed moment, never decreasing.
    pub fn plan(
        &mut self,
        wanted: &BTreeMap<ServiceName, Vec<BackendSet>>,
        generation: u64,
        now: Duration,
    ) -> Plan {
        let mut plan = Plan::default();
        self.reserve(wanted);
        for (name, sets) in wanted {
            self.let_go(name, sets);
        }
        for (name, sets) in wanted {
            self.claim(name, sets, &mut plan);
        }
        for key in std::mem::take(&mut self.unclaimed) {
            if let Some(value) = self.frontends.remove(&key) {
                plan.steps.push(Step::RemoveFrontend { key });
                self.unrefer(&value, &mut plan);
            }
        }
        for (name, sets) in wanted {
            for set in sets {
                let frontends = set.frontends.iter();
                let own = frontends.filter(|key| self.owner(key) == Some(name));
                let own: Vec<FrontendKey> = own.copied().collect();
                if !own.is_empty() {
                    self.plan_set(name, set, &own, &Moment { generation, now }, &mut plan);
                }
            }
        }
        for id in std::mem::take(&mut self.unretired) {
            self.left_ids.push(id);
            plan.steps.push(Step::RetireBackend { id });
        }
        self.remove_source_ranges(wanted, &mut plan);
        plan
    }

    /// The steps of the last plan have been performed: the quarantine of what they left begins.
    pub fn performed(&mut self, now: Duration) {
        for (base, len) in std::mem::take(&mut self.left_ranges) {
            self.slots.free(base, len, now);
        }
        for id in std::mem::take(&mut self.left_ids) {
            self.ids.free(id.0, 1, now);
        }
    }

    fn plan_set(
        &mut self,
        name: &ServiceName,
        set: &BackendSet,
        frontends: &[FrontendKey],
        moment: &Moment,
        plan: &mut Plan,
    ) {
        let service_id = self.service_id(name, set, frontends);
        let are_known = self.add_source_ranges(name, set, service_id, plan);
        let (outside, inside): (Vec<FrontendKey>, Vec<FrontendKey>) =
            frontends.iter().partition(|key| key.is_outside());
        let mut groups = vec![(frontends, false)];
        if maglev::needs_table(set.backends.len()) && !outside.is_empty() {
            groups = vec![(&inside, false), (&outside, true)];
        }
        for (keys, as_table) in groups {
            let request = Request {
                set,
                all: frontends,
                keys,
                service_id,
                as_table,
            };
            let Some(placed) = self.place_or_shrink(name, &request, moment, plan) else {
                continue;
            };
            for key in keys {
                let mut own = placed;
                own.flags |= match set.least_connections {
                    true => FRONTEND_LEAST_CONNECTIONS,
                    false => 0,
                };
                if set.direct_return && key.is_outside() {
                    own.flags |= FRONTEND_DIRECT_RETURN;
                }
                let is_restricted = set.restricted.contains(key);
                own.flags |= if is_restricted {
                    FRONTEND_RESTRICTED
                } else {
                    0
                };
                if is_restricted && !are_known {
                    // Rather nobody than everybody.
                    (own.base, own.count, own.flags) = (0, 0, FRONTEND_RESTRICTED | FRONTEND_DROP);
                }
                if own.count == 0 && set.elsewhere && key.is_outside() {
                    own.flags |= FRONTEND_DROP;
                }
                let value = FrontendValue {
                    generation: moment.generation,
                    check: key.check(),
                    service_id,
                    base: own.base,
                    count: own.count,
                    affinity_s: set.affinity_s,
                    flags: own.flags,
                };
                self.switch(name, key, value, plan);
            }
            self.drop_if_unused(placed.base, plan);
        }
    }

    /// One frontend goes over to its new value.
    fn switch(
        &mut self,
        name: &ServiceName,
        key: &FrontendKey,
        value: FrontendValue,
        plan: &mut Plan,
    ) {
        let old = self.frontends.get(key).copied();
        let is_same = |old: FrontendValue| {
            FrontendValue {
                generation: value.generation,
                ..old
            } == value
        };
        if old.is_some_and(is_same) {
            return;
        }
        if old.is_none() && self.frontends.len() >= self.limits.frontend_count as usize {
            let limit = self.limits.frontend_count;
            let reason = format!("FRONTENDS is full ({limit} entries)");
            plan.stuck.insert(name.clone(), reason);
            return;
        }
        if let Some(range) = self.ranges.get_mut(&value.base).filter(|_| value.count > 0) {
            range.frontend_count += 1;
        }
        self.frontends.insert(*key, value);
        plan.steps.push(Step::SetFrontend { key: *key, value });
        if let Some(old) = old {
            self.unrefer(&old, plan);
        }
    }

    /// One frontend has left this value's range.
    fn unrefer(&mut self, value: &FrontendValue, plan: &mut Plan) {
        if value.count == 0 {
            return;
        }
        if let Some(range) = self.ranges.get_mut(&value.base) {
            range.frontend_count = range.frontend_count.saturating_sub(1);
        }
        self.drop_if_unused(value.base, plan);
    }

    fn drop_if_unused(&mut self, base: u32, plan: &mut Plan) {
        if self
            .ranges
            .get(&base)
            .is_none_or(|range| range.frontend_count > 0)
        {
            return;
        }
        if let Some(range) = self.ranges.remove(&base) {
            self.left_ranges.push((base, range.ids.len() as u32));
            for id in range.ids {
                self.leave_slot(id, plan);
            }
        }
    }

    /// A slot does not hold this id any more; with the last one the backend is retired.
    fn leave_slot(&mut self, id: BackendId, plan: &mut Plan) {
        let Some(known) = self.backends.get_mut(&id) else {
            return;
        };
        known.slot_count = known.slot_count.saturating_sub(1);
        if known.slot_count == 0 {
            self.backends.remove(&id);
            self.left_ids.push(id);
            plan.steps.push(Step::RetireBackend { id });
        }
    }
}

struct Moment {
    generation: u64,
    now: Duration,
}

fn backend_of(value: &BackendValue) -> Backend {
    Backend {
        addr: value.addr,
        port_be: value.port_be,
        proto: value.proto,
        node_id: value.node_id,
        pod_id: value.pod_id,
        on_trial: value.state == BACKEND_ON_TRIAL,
    }
}

fn describe(key: &FrontendKey) -> String {
    let (address, port) = (ip_of(&key.addr), u16::from_be(key.port_be));
    let outside = if key.is_outside() {
        " from outside"
    } else {
        ""
    };
    match key.scope {
        SCOPE_NODE_PORT | SCOPE_OUTSIDE_NODE_PORT => format!("node port {port}{outside}"),
        _ => format!("{}{outside}", std::net::SocketAddr::new(address, port)),
    }
}

#[cfg(test)]
mod tests;
