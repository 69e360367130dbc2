//! Backends that do not answer are left out on this node until they do, whatever their readiness says.
//!
//! ```text
//!            2 connects unanswered, and none answered        wait over
//!  Serving ───────────────────────────────────────────► Out ───────────► Trial: one connect
//!     ▲                                                  ▲ │                │ │
//!     │                                                  └─┼─ unanswered: ──┘ │   a longer wait
//!     └──────────── answered ──────────────────────────────┴──────────────────┘
//! ```
//! A connect is unanswered when its SYN had to be sent again, was answered by a reset, or was given up;
//! see the program `failing` for what is seen at all. One answer to anybody of this node clears a backend:
//! a client can make connects that nobody would answer, but not take the answers from others. A backend on
//! trial gets one connect of a client (see `BACKEND_ON_TRIAL`); the agent sends none of its own, because
//! a NetworkPolicy may allow clients and not the node. Waits are 1 s, doubling to 30 s.
//!
//! Pure: no clock, no maps. Invariants, checked by the property test:
//! * at most half of a set's backends are left out, the longest out first;
//! * when all of them are out, none is left out: they cannot be the fault;
//! * without failures nothing is ever left out, and every backend comes back that answers.

use std::collections::BTreeMap;
use std::time::Duration;

use ebpf_maps::services::Addr;

use super::index::{Backend, TCP};

/// Backends that are watched at once: those that failed lately.
pub const WATCHED_COUNT_MAX: usize = 4096;
/// Fewer unanswered connects are lost packets.
const FAILED_MIN: u64 = 2;
/// So long an answer is waited for after the first failure: of many connects some fail at any moment.
const COUNT_MIN: Duration = Duration::from_millis(500);
/// Failures that lie further apart are not of one cause.
const COUNT_MAX: Duration = Duration::from_secs(5);
/// On trial the answer may be under way when the failure is seen, but no longer than this.
const ANSWERED_WITHIN: Duration = Duration::from_millis(200);
/// A connect of a trial whose failure is not seen (its client is outside) has failed then.
const TRIAL_MAX: Duration = Duration::from_secs(3);
const WAIT_MIN: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Failing again so soon after it has come back is the same illness: the waits go on growing.
const RELAPSE: Duration = Duration::from_secs(60);

/// A backend by where it listens; TCP.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Target {
    /// 16 bytes, network order.
    pub addr: Addr,
    /// Network order.
    pub port_be: u16,
}

impl Target {
    /// None for what is no TCP.
    pub fn of(backend: &Backend) -> Option<Self> {
        (backend.proto == TCP).then_some(Self {
            addr: backend.addr,
            port_be: backend.port_be,
        })
    }
}

/// Whether a backend gets connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Like all others.
    Serving,
    /// None.
    Out,
    /// One, to see.
    OnTrial,
}

/// What happened to a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// Which.
    pub target: Target,
    /// What it was.
    pub was: Standing,
    /// What it is from now on.
    pub standing: Standing,
    /// How often it was left out since it last served well.
    pub times: u32,
}

/// Connects since the last look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Failures {
    /// SYNs that were sent again.
    pub resent: u64,
    /// Connects that were not waited for any longer.
    pub given_up: u64,
    /// Resets in place of an answer.
    pub refused: u64,
    /// Answers; counted from the first failure on, for as long as the backend is watched.
    pub answered: u64,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Failures are counted.
    Counting {
        since: Duration,
        failed: u64,
    },
    /// It serves again, but may relapse.
    Recovered {
        since: Duration,
    },
    Out {
        until: Duration,
    },
    Trial {
        /// The least that `chosen` has been since.
        chosen_before: u64,
        /// When the connect was seen.
        tried: Option<Duration>,
        /// When its failure was.
        failed: Option<Duration>,
    },
}

#[derive(Clone, Copy, Debug)]
struct Watched {
    state: State,
    /// When it was left out first.
    out_since: Duration,
    times: u32,
}

/// The backends that failed lately.
#[derive(Debug, Default)]
pub struct Ejections {
    watched: BTreeMap<Target, Watched>,
    ejected: u64,
    returned: u64,
}

impl Ejections {
    /// A look at what has failed since the last one, and at the time.
    ///
    /// * `chosen` – how many connects went to a backend in all; may begin again from 0 when it is left out
    ///   and put on trial; none: no Service has it any more.
    /// * `now` – since any fixed moment, never decreasing.
    /// * returns what changed, in the order of addresses.
    pub fn look(
        &mut self,
        failures: &BTreeMap<Target, Failures>,
        chosen: impl Fn(&Target) -> Option<u64>,
        now: Duration,
    ) -> Vec<Change> {
        for target in failures.keys() {
            if !self.watched.contains_key(target)
                && self.watched.len() < WATCHED_COUNT_MAX
                && chosen(target).is_some()
            {
                let state = State::Counting {
                    since: now,
                    failed: 0,
                };
                let new = Watched {
                    state,
                    out_since: now,
                    times: 0,
                };
                self.watched.insert(*target, new);
            }
        }
        let mut changes = Vec::new();
        let (mut ejected, mut returned) = (0, 0);
        self.watched.retain(|target, watched| {
            let Some(chosen) = chosen(target) else {
                return false; // whoever has this address next begins anew
            };
            let failed = failures.get(target).copied().unwrap_or_default();
            let was = watched.standing();
            let standing = watched.next(failed, chosen, now);
            if let Some(standing) = standing {
                ejected += u64::from(standing == Standing::Out);
                returned += u64::from(standing == Standing::Serving);
                let (target, times) = (*target, watched.times);
                changes.push(Change {
                    target,
                    was,
                    standing,
                    times,
                });
            }
            !watched.is_over(now)
        });
        self.ejected += ejected;
        self.returned += returned;
        changes
    }

    /// What is decided about a backend alone, and since when it is out.
    fn standing(&self, backend: &Backend) -> (Standing, Duration) {
        let watched = Target::of(backend).and_then(|target| self.watched.get(&target));
        let Some(watched) = watched else {
            return (Standing::Serving, Duration::ZERO);
        };
        (watched.standing(), watched.out_since)
    }

    /// How often a backend was left out, and how often one came back.
    pub fn totals(&self) -> [u64; 2] {
        [self.ejected, self.returned]
    }

    /// Whether nobody is watched.
    pub fn is_empty(&self) -> bool {
        self.watched.is_empty()
    }

    /// Whether this one is.
    pub fn watches(&self, target: &Target) -> bool {
        self.watched.contains_key(target)
    }

    /// How long this one is left out yet.
    pub fn wait(&self, target: &Target, now: Duration) -> Option<Duration> {
        match self.watched.get(target)?.state {
            State::Out { until } => Some(until.saturating_sub(now)),
            _ => None,
        }
    }

    /// Whether nobody is out or on trial.
    pub fn is_idle(&self) -> bool {
        let mut standings = self.watched.values().map(Watched::standing);
        standings.all(|standing| standing == Standing::Serving)
    }

    /// What the backends of one set are, in the same order.
    pub fn standings(&self, backends: &[Backend]) -> Vec<Standing> {
        let alone: Vec<_> = backends
            .iter()
            .map(|backend| self.standing(backend))
            .collect();
        let mut standings: Vec<Standing> = alone.iter().map(|(standing, _)| *standing).collect();
        if standings
            .iter()
            .all(|standing| *standing != Standing::Serving)
        {
            return vec![Standing::Serving; backends.len()];
        }
        let mut out: Vec<usize> = (0..standings.len())
            .filter(|index| standings[*index] == Standing::Out)
            .collect();
        out.sort_by_key(|index| (alone[*index].1, *index));
        for index in out.into_iter().skip(backends.len() / 2) {
            standings[index] = Standing::Serving;
        }
        standings
    }
}

impl Watched {
    fn standing(&self) -> Standing {
        match self.state {
            State::Counting { .. } | State::Recovered { .. } => Standing::Serving,
            State::Out { .. } => Standing::Out,
            State::Trial { .. } => Standing::OnTrial,
        }
    }

    /// The next state; what it is from now on, if that changed.
    fn next(&mut self, seen: Failures, chosen: u64, now: Duration) -> Option<Standing> {
        let failed_now = seen.resent + seen.given_up + seen.refused;
        if seen.answered > 0 {
            let was = self.standing();
            self.state = State::Recovered { since: now };
            return (was != Standing::Serving).then_some(Standing::Serving);
        }
        match self.state {
            State::Counting { since, failed } => {
                let failed = failed + failed_now;
                self.state = State::Counting { since, failed };
                let is_failing = failed >= FAILED_MIN && now >= since + COUNT_MIN;
                is_failing.then(|| self.leave_out(now))
            }
            State::Recovered { .. } => {
                if failed_now > 0 {
                    // `times` stays: leaving it out again goes on where it was.
                    self.state = State::Counting {
                        since: now,
                        failed: failed_now,
                    };
                }
                None
            }
            State::Out { until } => (now >= until).then(|| {
                self.state = State::Trial {
                    chosen_before: chosen,
                    tried: None,
                    failed: None,
                };
                Standing::OnTrial
            }),
            State::Trial {
                chosen_before,
                tried,
                failed,
            } => {
                let tried = tried.or((chosen > chosen_before).then_some(now));
                let failed = failed.or((failed_now > 0).then_some(now));
                let is_late = |since: Option<Duration>, limit| {
                    since.is_some_and(|since| now.saturating_sub(since) >= limit)
                };
                if is_late(failed, ANSWERED_WITHIN) || is_late(tried, TRIAL_MAX) {
                    return Some(self.leave_out(now));
                }
                self.state = State::Trial {
                    chosen_before: chosen_before.min(chosen),
                    tried,
                    failed,
                };
                None
            }
        }
    }

    fn leave_out(&mut self, now: Duration) -> Standing {
        let wait = WAIT_MIN
            .saturating_mul(1 << self.times.min(5))
            .min(WAIT_MAX);
        if self.times == 0 {
            self.out_since = now;
        }
        self.times = self.times.saturating_add(1);
        self.state = State::Out { until: now + wait };
        Standing::Out
    }

    /// Nothing more is to be remembered of it.
    fn is_over(&self, now: Duration) -> bool {
        match self.state {
            State::Counting { since, .. } => {
                now >= since + COUNT_MAX && self.times == 0 || now >= since + RELAPSE
            }
            State::Recovered { since } => self.times == 0 || now >= since + RELAPSE,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests;
