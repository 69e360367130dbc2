//! Before a container is asked to stop: does anybody still send new connections to its pod?
//!
//! ```text
//!      begin_stop           every node has acked, or the cap       settled
//! No ─────────────► Waiting ──────────────────────────────► Waiting ──────► Over (pod ends)
//!  └─ force, hard eviction: never                                     └───► No   (container restarts)
//! ```
//! The wait has a cap, [`DRAIN_CAP`], on the worker's clock, which an agent restart does not extend
//! (`PodState::drained_for`). Its end starts the grace period, so the process has all of that (but for
//! a node that goes down, which has one time for everything). Then come preStop hook and SIGTERM,
//! after [`SETTLE`] for connections and requests that were on their way when the last node switched.
//!
//! Who does not wait: a pod that is no backend of any Service; a force deletion (grace 0); a pod that
//! uses more than the node can give; a node that cannot ask anybody. A member of a headless Service
//! is held for the whole cap, because answers of the resolver live for a second.

use super::*;

/// The longest a pod's end is held back.
pub const DRAIN_CAP: Duration = Duration::from_secs(1);
/// From the last node's ack to SIGTERM: what that node sent just before arrives and is answered.
const SETTLE: Duration = Duration::from_millis(50);

/// How far the pod's drain has come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Drain {
    /// Nobody has asked.
    No,
    /// Containers wait to be stopped.
    Waiting {
        /// When it was asked.
        since: Duration,
        /// When the wait is over.
        until: Duration,
        /// Every node has answered, and only time is waited for.
        acked: bool,
        /// Who has not answered, in words.
        missing: Option<String>,
    },
    /// Not again in this pod's life.
    Over,
}

/// What is known of the nodes that may send to the pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Drained {
    /// No Service sends to the pod.
    NoBackend,
    /// The control plane is away: what other nodes do cannot be known.
    CutOff,
    /// Not yet: so many of so many nodes, some of their names.
    Missing {
        /// Nodes that may still send.
        count: u32,
        /// All nodes.
        nodes: u32,
        /// Some of those that may still send.
        names: Vec<String>,
    },
    /// No node sends to it any more.
    Acked {
        /// All nodes.
        nodes: u32,
        /// Clients may hold its address from a headless Service's name.
        is_named: bool,
    },
}

impl PodState {
    /// Whether a stop of a container has to wait; asks, where nobody has.
    pub(super) fn must_drain(
        &mut self,
        grace_s: u64,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> bool {
        if grace_s == 0 || self.grace_s == 0 || self.is_hurried() {
            return false;
        }
        match self.drain {
            Drain::Over => return false,
            Drain::Waiting { .. } => return true,
            Drain::No => {}
        }
        let left = DRAIN_CAP.saturating_sub(std::mem::take(&mut self.drained_for));
        if left.is_zero() {
            self.drain = Drain::Over;
            return false;
        }
        self.drain = Drain::Waiting {
            since: now,
            until: now + left,
            acked: false,
            missing: None,
        };
        self.drain_number += 1;
        actions.push(Action::Drain(self.drain_number));
        true
    }

    /// The node needs at once what the pod uses.
    fn is_hurried(&self) -> bool {
        self.failed
            .as_ref()
            .is_some_and(|failed| failed.reason == EVICTED)
    }

    pub(super) fn drained(
        &mut self,
        number: u32,
        drained: Drained,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        let Drain::Waiting {
            since,
            until,
            acked,
            missing,
        } = &mut self.drain
        else {
            return;
        };
        if number != self.drain_number || *acked {
            return;
        }
        match drained {
            Drained::NoBackend => {
                *until = now;
                *acked = true;
            }
            Drained::CutOff => {
                let words = "drained: not known, the control plane is away".to_owned();
                actions.push(Action::Event("Drained", words, false));
                *until = now;
                *acked = true;
            }
            Drained::Missing {
                count,
                nodes,
                names,
            } => {
                let more = match (count as usize).saturating_sub(names.len()) {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                let ok = nodes.saturating_sub(count);
                let names = names.join(", ");
                *missing = Some(format!(
                    "acked {ok}/{nodes} nodes, waiting for {names}{more}"
                ));
            }
            Drained::Acked { nodes, is_named } => {
                let took = now.saturating_sub(*since).as_millis();
                let held = match is_named {
                    true => ", held for a second: its name has been answered with its address",
                    false => "",
                };
                let words = format!("drained: acked {nodes}/{nodes} nodes in {took} ms{held}");
                actions.push(Action::Event("Drained", words, false));
                if !is_named {
                    *until = (*until).min(now + SETTLE);
                }
                *acked = true;
            }
        }
    }

    /// Lets the containers go on that wait for a drain which is over.
    pub(super) fn advance_drain(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let Drain::Waiting {
            since,
            until,
            acked,
            missing,
        } = &self.drain
        else {
            return;
        };
        // A node that goes down has one time for everything.
        let spent_s = match &self.failed {
            Some(_) => now.saturating_sub(*since).as_secs_f64().ceil() as u64,
            None => 0,
        };
        let is_waited_for = |c: &Container| {
            matches!(c.run, Run::Running { .. }) && matches!(c.stop, Stop::Drain(_))
        };
        let waits = self.containers.iter().any(is_waited_for);
        if waits && now < *until && self.grace_s > 0 && !self.is_hurried() {
            return;
        }
        if waits && !acked && now >= *until {
            let why = match missing {
                Some(words) => words.as_str(),
                None => "nobody has answered",
            };
            let words = format!(
                "drained: not by all within {} s: {why}",
                DRAIN_CAP.as_secs()
            );
            actions.push(Action::Event("Drained", words, true));
        }
        self.drain = match self.deleted || self.failed.is_some() {
            true => Drain::Over,
            false => Drain::No,
        };
        for index in 0..self.containers.len() {
            if let Stop::Drain(grace_s) = self.containers[index].stop {
                let grace_s = match self.phase {
                    Phase::Syncing => grace_s,
                    _ => grace_s.min(self.grace_s),
                };
                let grace_s = grace_s.saturating_sub(spent_s).max(grace_s.min(1));
                self.ask_to_stop(index, grace_s, now, actions);
            }
        }
    }

    /// When the drain's wait is over.
    pub(super) fn drain_over_at(&self) -> Option<Duration> {
        match self.drain {
            Drain::Waiting { until, .. } => Some(until),
            Drain::No | Drain::Over => None,
        }
    }
}
