//! Pods that wait for a node.
//!
//! ```text
//!          add, or a change that can help and no back-off left
//!   ┌──────────────────────────────────────────┐
//!   ▼            decided: bind                 │
//! active ───────────────────────► in flight ───┼── refused ──► backing off ── time ──► active
//!   │ fits nowhere                             │                   ▲
//!   └──────────────────────────────────► unschedulable ────────────┘ a change that can help
//! ```
//! Active pods leave by priority, then by age in the queue. The back-off is 1 s after the first
//! attempt and doubles to 10 s; a pod that fits nowhere also comes back after 5 minutes, whatever
//! happens. Deciding takes no time of its own, so no change can be missed between a decision and
//! the filing of its outcome.
//!
//! Source: Kubernetes `pkg/scheduler/backend/queue` (activeQ, backoffQ, unschedulablePods).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::filter::Blocked;
use super::request::PodRequest;

/// Back-off after the first attempt.
const BACKOFF_MIN: Duration = Duration::from_secs(1);
/// Longest back-off.
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A pod that fits nowhere is tried again after this.
const UNSCHEDULABLE_MAX: Duration = Duration::from_secs(300);

/// What happened that could help a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wake {
    /// A node is new or has become better.
    Node,
    /// A pod left its node.
    Room,
    /// A pod got a node.
    Placed,
}

/// Where a pod is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Active {
        order: (Reverse<i32>, u64),
    },
    BackingOff {
        until: Instant,
    },
    Unschedulable {
        until: Instant,
        blocked: Blocked,
    },
    /// Decided; the binding is under way.
    InFlight,
}

#[derive(Debug)]
struct Waiting {
    request: Arc<PodRequest>,
    place: Place,
    attempt_count: u32,
    last_attempt: Option<Instant>,
}

fn backoff(attempt_count: u32) -> Duration {
    let factor = 1_u32
        .checked_shl(attempt_count.saturating_sub(1))
        .unwrap_or(u32::MAX);
    BACKOFF_MIN
        .checked_mul(factor)
        .map_or(BACKOFF_MAX, |delay| delay.min(BACKOFF_MAX))
}

/// All waiting pods, by uid. Every method is told the time.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pods: HashMap<Arc<str>, Waiting>,
    active: BTreeMap<(Reverse<i32>, u64), Arc<str>>,
    /// Pods that come back by time: backing off and unschedulable.
    timed: BTreeSet<(Instant, Arc<str>)>,
    serial: u64,
}

impl Pending {
    /// A pod waits, or its object changed.
    pub(super) fn put(&mut self, request: PodRequest, now: Instant) {
        match self.pods.get_mut(&request.uid) {
            // Its own status and the like: nothing that changes where it fits.
            Some(waiting) if *waiting.request == request => {}
            Some(waiting) => {
                let uid = Arc::clone(&request.uid);
                waiting.request = Arc::new(request);
                if matches!(waiting.place, Place::Unschedulable { .. }) {
                    self.wake_one(&uid, now);
                }
            }
            None => {
                let uid = Arc::clone(&request.uid);
                let order = self.next_order(request.priority);
                let waiting = Waiting {
                    request: Arc::new(request),
                    place: Place::Active { order },
                    attempt_count: 0,
                    last_attempt: None,
                };
                self.active.insert(order, Arc::clone(&uid));
                self.pods.insert(uid, waiting);
            }
        }
    }

    fn next_order(&mut self, priority: i32) -> (Reverse<i32>, u64) {
        self.serial += 1;
        (Reverse(priority), self.serial)
    }

    /// The pod is bound, gone, or nothing of ours.
    pub(super) fn remove(&mut self, uid: &str) {
        if let Some(waiting) = self.pods.remove(uid) {
            self.unlink(&waiting.request.uid, waiting.place);
        }
    }

    fn unlink(&mut self, uid: &Arc<str>, place: Place) {
        match place {
            Place::Active { order } => {
                self.active.remove(&order);
            }
            Place::BackingOff { until } | Place::Unschedulable { until, .. } => {
                self.timed.remove(&(until, Arc::clone(uid)));
            }
            Place::InFlight => {}
        }
    }

    fn move_to(&mut self, uid: &Arc<str>, place: Place) {
        let Some(waiting) = self.pods.get_mut(uid) else {
            return;
        };
        let old = std::mem::replace(&mut waiting.place, place);
        self.unlink(uid, old);
        match place {
            Place::Active { order } => {
                self.active.insert(order, Arc::clone(uid));
            }
            Place::BackingOff { until } | Place::Unschedulable { until, .. } => {
                self.timed.insert((until, Arc::clone(uid)));
            }
            Place::InFlight => {}
        }
    }

    fn activate(&mut self, uid: &Arc<str>) {
        let Some(priority) = self.pods.get(uid).map(|waiting| waiting.request.priority) else {
            return;
        };
        let order = self.next_order(priority);
        self.move_to(uid, Place::Active { order });
    }

    /// The next pod to decide about; it is in flight until one of the outcomes below.
    pub(super) fn take(&mut self, now: Instant) -> Option<Arc<PodRequest>> {
        while let Some((until, uid)) = self.timed.first().cloned() {
            if until > now {
                break;
            }
            self.activate(&uid);
        }
        let (_, uid) = self.active.first_key_value()?;
        let uid = Arc::clone(uid);
        self.move_to(&uid, Place::InFlight);
        let waiting = self.pods.get_mut(&uid)?;
        waiting.attempt_count = waiting.attempt_count.saturating_add(1);
        waiting.last_attempt = Some(now);
        Some(Arc::clone(&waiting.request))
    }

    /// The pod fits nowhere.
    pub(super) fn file_unschedulable(&mut self, uid: &Arc<str>, blocked: Blocked, now: Instant) {
        let until = now + UNSCHEDULABLE_MAX;
        self.move_to(uid, Place::Unschedulable { until, blocked });
    }

    /// The binding was refused: again after the back-off.
    pub(super) fn file_refused(&mut self, uid: &Arc<str>, now: Instant) {
        let Some(waiting) = self.pods.get(uid) else {
            return;
        };
        let until = now + backoff(waiting.attempt_count);
        self.move_to(uid, Place::BackingOff { until });
    }

    /// Something happened: every pod that it could help comes back, after what is left of its
    /// back-off.
    pub(super) fn wake(&mut self, wake: Wake, now: Instant) {
        if self.timed.is_empty() {
            return;
        }
        let helped = |waiting: &&Waiting| match waiting.place {
            Place::Unschedulable { blocked, .. } => match wake {
                Wake::Node => true,
                Wake::Room => blocked.by_room || blocked.by_peers,
                Wake::Placed => blocked.by_peers,
            },
            _ => false,
        };
        let uids: Vec<Arc<str>> = self
            .pods
            .values()
            .filter(helped)
            .map(|waiting| Arc::clone(&waiting.request.uid))
            .collect();
        for uid in uids {
            self.wake_one(&uid, now);
        }
    }

    fn wake_one(&mut self, uid: &Arc<str>, now: Instant) {
        let Some(waiting) = self.pods.get(uid) else {
            return;
        };
        let until = waiting
            .last_attempt
            .map(|last| last + backoff(waiting.attempt_count));
        match until.filter(|until| *until > now) {
            Some(until) => self.move_to(uid, Place::BackingOff { until }),
            None => self.activate(uid),
        }
    }

    /// When the next pod comes back by time alone.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.timed.first().map(|(until, _)| *until)
    }

    /// The uids of all waiting pods.
    pub(super) fn waiting(&self) -> Vec<Arc<str>> {
        self.pods.keys().cloned().collect()
    }
}
