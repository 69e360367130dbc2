//! Where the slots of a set go: a range that holds exactly the wanted backends, or the best that a
//! full arena allows. See the parent's header for the invariants.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use ebpf_maps::services::{
    BACKEND_IN_USE, BACKEND_ON_TRIAL, BackendValue, FRONTEND_TABLE, FrontendKey,
};

use super::{BackendId, Known, Moment, Plan, Range, Step, Table};
use crate::services::arena::ArenaFull;
use crate::services::index::{Backend, BackendSet};
use crate::services::maglev;
use crate::view::ServiceName;

/// Some frontends of a set that are to share a range.
#[derive(Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) set: &'a BackendSet,
    /// All frontends of the set that belong to the Service.
    pub(super) all: &'a [FrontendKey],
    /// Those that this is about.
    pub(super) keys: &'a [FrontendKey],
    pub(super) service_id: u32,
    /// The range is to be a Maglev table, not a list.
    pub(super) as_table: bool,
}

/// A range, and what the values that refer to it must say of it.
#[derive(Clone, Copy, Default)]
pub(super) struct Placed {
    pub(super) base: u32,
    pub(super) count: u32,
    pub(super) flags: u32,
}

struct Full {
    reason: String,
    retry_at: Option<Duration>,
}

impl Full {
    fn of(map: &str, limit: u32, full: ArenaFull) -> Self {
        Self {
            reason: format!("{map} is full ({limit} entries)"),
            retry_at: full.retry_at,
        }
    }
}

impl Table {
    /// Where the backends are for some of a set's frontends: in a fitting range, else, where there
    /// is no room, in the best there is. None: nothing is programmed, and nothing can be.
    pub(super) fn place_or_shrink(
        &mut self,
        name: &ServiceName,
        request: &Request<'_>,
        moment: &Moment,
        plan: &mut Plan,
    ) -> Option<Placed> {
        let full = match self.place(request, moment, plan) {
            Ok(placed) => return Some(placed),
            Err(full) => full,
        };
        plan.stuck.insert(name.clone(), full.reason);
        plan.retry_at = earlier(plan.retry_at, full.retry_at);
        if request.as_table {
            let list = Request {
                as_table: false,
                ..*request
            };
            if let Ok(placed) = self.place(&list, moment, plan) {
                return Some(placed);
            }
        }
        self.shrink_in_place(request, plan)
    }

    /// A range that holds exactly the wanted backends: the present one, or a new one with the
    /// steps that fill it. No slots when no backend is wanted.
    fn place(
        &mut self,
        request: &Request<'_>,
        moment: &Moment,
        plan: &mut Plan,
    ) -> Result<Placed, Full> {
        let backends = &request.set.backends;
        let (as_table, service_id) = (request.as_table, request.service_id);
        let slots: Vec<usize> = if as_table {
            maglev::table(backends)
        } else {
            (0..backends.len()).collect()
        };
        let Ok(count) = u32::try_from(slots.len()) else {
            return Err(Full {
                reason: "too many backends".into(),
                retry_at: None,
            });
        };
        if count == 0 {
            return Ok(Placed::default());
        }
        let placed = |base| Placed {
            base,
            count,
            flags: if as_table { FRONTEND_TABLE } else { 0 },
        };
        let present = self.present_ranges(request.all, service_id);
        for base in &present {
            if let Some(range) = self.ranges.get(base)
                && range.is_table == as_table
                && range.ids.len() == slots.len()
                && range
                    .ids
                    .iter()
                    .zip(&slots)
                    .all(|(id, index)| self.is(*id, &backends[*index]))
            {
                return Ok(placed(*base));
            }
        }
        let known: HashMap<Backend, BackendId> = present
            .iter()
            .filter_map(|base| self.ranges.get(base))
            .flat_map(|range| &range.ids)
            .filter_map(|id| Some((self.backends.get(id)?.backend, *id)))
            .collect();
        let base = self
            .slots
            .allocate(count, moment.now)
            .map_err(|full| Full::of("SLOTS", self.limits.slot_count, full))?;
        let mut own = Vec::with_capacity(backends.len());
        let mut fresh = Vec::with_capacity(backends.len() - known.len().min(backends.len()));
        // In a row as long as there is one: one search for all.
        let missing = backends.iter().filter(|it| !known.contains_key(it)).count();
        let row = u32::try_from(missing).ok().filter(|missing| *missing > 1);
        let row = row.and_then(|len| Some((self.ids.allocate(len, moment.now).ok()?, len)));
        let mut row = row.map_or(0..0, |(first, len)| first..first + len);
        for backend in backends {
            if let Some(id) = known.get(backend) {
                own.push(*id);
                continue;
            }
            let in_row = row.next();
            match in_row.map_or_else(|| self.ids.allocate(1, moment.now), Ok) {
                Ok(id) => {
                    own.push(BackendId(id));
                    fresh.push((BackendId(id), *backend));
                }
                Err(full) => {
                    self.slots.free_unpublished(base, count);
                    for (id, _) in fresh {
                        self.ids.free_unpublished(id.0, 1);
                    }
                    return Err(Full::of("BACKENDS", self.limits.backend_count, full));
                }
            }
        }
        for (id, backend) in fresh {
            self.backends.insert(
                id,
                Known {
                    backend,
                    slot_count: 0,
                },
            );
            let value = value_of(&backend, service_id, moment.generation);
            plan.steps.push(Step::WriteBackend { id, value });
        }
        let ids: Vec<BackendId> = slots.into_iter().map(|index| own[index]).collect();
        for id in &ids {
            if let Some(known) = self.backends.get_mut(id) {
                known.slot_count += 1;
            }
        }
        plan.steps.push(Step::WriteSlots {
            base,
            ids: ids.clone(),
        });
        self.ranges.insert(
            base,
            Range {
                ids,
                is_table: as_table,
                service_id,
                frontend_count: 0,
            },
        );
        Ok(placed(base))
    }

    /// Where no new range fits: the present range, with the ids of backends that left overwritten
    /// by those that stay. None if nothing is programmed yet; no slots if none stays.
    fn shrink_in_place(&mut self, request: &Request<'_>, plan: &mut Plan) -> Option<Placed> {
        let present = self.present_ranges(request.keys, request.service_id);
        let base = *present.first()?;
        let range = self.ranges.get(&base)?;
        let wanted: HashSet<&Backend> = request.set.backends.iter().collect();
        let stays = |id: &BackendId| {
            self.backends
                .get(id)
                .is_some_and(|known| wanted.contains(&known.backend))
        };
        let kept: Vec<BackendId> = range.ids.iter().copied().filter(|id| stays(id)).collect();
        if kept.is_empty() {
            return Some(Placed::default());
        }
        let placed = Placed {
            base,
            count: range.ids.len() as u32,
            flags: if range.is_table { FRONTEND_TABLE } else { 0 },
        };
        if kept.len() == range.ids.len() {
            return Some(placed);
        }
        let mut substitutes = kept.iter().copied().cycle();
        let old = range.ids.clone();
        let ids: Vec<BackendId> = old
            .iter()
            .map(|id| {
                if stays(id) {
                    Some(*id)
                } else {
                    substitutes.next()
                }
            })
            .collect::<Option<_>>()?;
        plan.steps.push(Step::WriteSlots {
            base,
            ids: ids.clone(),
        });
        for (left, taken) in old.iter().zip(&ids).filter(|(left, taken)| left != taken) {
            if let Some(known) = self.backends.get_mut(taken) {
                known.slot_count += 1;
            }
            self.leave_slot(*left, plan);
        }
        self.ranges.get_mut(&base)?.ids = ids;
        Some(placed)
    }

    /// The ranges of this set that its frontends refer to now.
    fn present_ranges(&self, frontends: &[FrontendKey], service_id: u32) -> BTreeSet<u32> {
        frontends
            .iter()
            .filter_map(|key| self.frontends.get(key))
            .filter(|value| value.count > 0 && value.service_id == service_id)
            .map(|value| value.base)
            .collect()
    }

    fn is(&self, id: BackendId, wanted: &Backend) -> bool {
        self.backends
            .get(&id)
            .is_some_and(|known| known.backend == *wanted)
    }
}

fn earlier(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn value_of(backend: &Backend, service_id: u32, generation: u64) -> BackendValue {
    BackendValue {
        addr: backend.addr,
        port_be: backend.port_be,
        proto: backend.proto,
        state: if backend.on_trial {
            BACKEND_ON_TRIAL
        } else {
            BACKEND_IN_USE
        },
        node_id: backend.node_id,
        pod_id: backend.pod_id,
        generation,
        service_id,
        hash: maglev::identity(backend),
    }
}
