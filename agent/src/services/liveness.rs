//! Which other nodes answer on the link: who has to take over a load balancer address, within seconds.
//!
//! ```text
//!                    an answer                     no answer for SILENCE, ASKED_MIN questions
//!  Unknown ─────────────────────────► Answers ──────────────────────────────────────► Silent
//!     └────────────── no answer ─────────▲──────────────────────────────────────────────┘ ▲
//!                                        └── answers, and announces what it should again ─┘
//! ```
//! Asked is the node's own address, by ARP or neighbour discovery: its kernel answers, with or without an
//! agent, and no firewall refuses. So neither the agent's restart nor a lost control plane moves an
//! address, only a machine that has gone from the link. A machine that is back has no agent yet; it is
//! [`Standing::Answers`] again when it is also itself that answers for an address that it would announce.
//!
//! Asked are few: the nodes that come before this one for some address, [`super::announce::DEPTH`] of them
//! for each.
//!
//! Invariants, checked by the tests: a node that answers each question is never silent; one that answers
//! none is, within [`SILENCE`] and two questions; who was not running itself accuses nobody; whatever
//! happens, at most [`WATCHED_COUNT_MAX`] are asked.
//!
//! Pure: no clock, no I/O; `dataplane::neighbours` acts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ebpf_maps::endpoint::Mac;

/// Nodes that are asked at most.
pub const WATCHED_COUNT_MAX: usize = 64;
/// Between two questions to a node that answers.
pub const INTERVAL: Duration = Duration::from_millis(500);
/// When the last question was not answered yet.
const DOUBT: Duration = Duration::from_millis(150);
/// A node that is silent.
const SILENT_INTERVAL: Duration = Duration::from_millis(1000);
/// Without an answer for so long, and so often asked, a node has gone.
pub const SILENCE: Duration = Duration::from_millis(1500);
const ASKED_MIN: u32 = 6;
/// Questions to the hardware address that answered last; more are for whoever has the address now.
const UNICAST: u32 = 2;
/// A turn that comes so late says that this process, or the machine, was not running: what was answered
/// meanwhile may be lost.
const STALL: Duration = Duration::from_millis(1000);
/// An answer of a silent node still counts when it also answers for what it announces.
const TOGETHER: Duration = Duration::from_secs(3);
/// A node that the control plane has given up for so long is out though it answers: its pods are elsewhere.
pub const GIVEN_UP: Duration = Duration::from_secs(300);

/// What is known of the other nodes beside what the control plane says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// They answer: there whatever the control plane says.
    pub answers: BTreeSet<String>,
    /// They do not: gone whatever the control plane says.
    pub silent: BTreeSet<String>,
}

/// A node to watch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Watched {
    /// Its own address on a link of ours.
    pub address: IpAddr,
    /// An address that it announces when it is there; none: nothing.
    pub claim: Option<IpAddr>,
    /// The control plane has not heard of it for the grace period.
    pub is_dead: bool,
}

/// Who has this address?
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    /// Of which node.
    pub node: String,
    /// The address.
    pub address: IpAddr,
    /// The hardware address to ask; none: everybody on the link.
    pub mac: Option<Mac>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Standing {
    Unknown,
    Answers,
    Silent,
}

struct Peer {
    at: Watched,
    standing: Standing,
    /// Its last answer, or when the first question was due.
    heard: Duration,
    /// Questions since.
    asked: u32,
    ask_at: Duration,
    mac: Option<Mac>,
    dead_since: Option<Duration>,
}

/// The state of all that are watched.
#[derive(Default)]
pub struct Liveness {
    peers: BTreeMap<String, Peer>,
    turn: Option<Duration>,
}

impl Liveness {
    /// Watches exactly these.
    pub fn watch(&mut self, wanted: BTreeMap<String, Watched>, now: Duration) {
        let wanted: BTreeMap<String, Watched> =
            wanted.into_iter().take(WATCHED_COUNT_MAX).collect();
        self.peers.retain(|name, _| wanted.contains_key(name));
        for (name, at) in wanted {
            let is_dead = at.is_dead;
            let peer = self.peers.entry(name).or_insert_with(|| Peer {
                at: at.clone(),
                standing: Standing::Unknown,
                heard: now,
                asked: 0,
                ask_at: now,
                mac: None,
                dead_since: None,
            });
            if peer.at.address != at.address {
                // What was answered, or not, was another address.
                (peer.heard, peer.asked, peer.ask_at, peer.mac) = (now, 0, now, None);
            }
            peer.at = at;
            peer.dead_since = is_dead.then(|| peer.dead_since.unwrap_or(now));
        }
    }

    /// Judges, and says what to ask now.
    pub fn turn(&mut self, now: Duration) -> Vec<Question> {
        let due = self.next();
        let late = due.map_or(Duration::ZERO, |due| now.saturating_sub(due));
        if self.turn.is_some() && late >= STALL {
            for peer in self.peers.values_mut() {
                (peer.heard, peer.asked, peer.ask_at) = (now, 0, now);
            }
        }
        self.turn = Some(now);
        let mut questions = Vec::new();
        for (name, peer) in &mut self.peers {
            let silence = now.saturating_sub(peer.heard);
            if silence >= SILENCE && peer.asked >= ASKED_MIN {
                peer.standing = Standing::Silent;
            }
            if peer.ask_at > now {
                continue;
            }
            let mac = peer.mac.filter(|_| peer.asked < UNICAST);
            questions.push(Question {
                node: name.clone(),
                address: peer.at.address,
                mac,
            });
            let claim = peer.at.claim.filter(|_| peer.standing == Standing::Silent);
            questions.extend(claim.map(|address| Question {
                node: name.clone(),
                address,
                mac: None,
            }));
            peer.asked = peer.asked.saturating_add(1);
            peer.ask_at = now
                + match peer.standing {
                    Standing::Silent => SILENT_INTERVAL,
                    // The answer to this one may be under way.
                    _ if peer.asked > 1 => DOUBT,
                    _ => INTERVAL,
                };
        }
        questions
    }

    /// When the next turn is due; none: nobody is watched.
    pub fn next(&self) -> Option<Duration> {
        self.peers.values().map(|peer| peer.ask_at).min()
    }

    /// Somebody with this hardware address has this address.
    pub fn answered(&mut self, address: IpAddr, mac: Mac, now: Duration) {
        for peer in self.peers.values_mut() {
            let answers_again = if peer.at.address == address {
                (peer.heard, peer.asked, peer.mac) = (now, 0, Some(mac));
                peer.standing != Standing::Silent || peer.at.claim.is_none()
            } else {
                // Whoever has taken it over has another hardware address.
                let is_it = peer.at.claim == Some(address) && peer.mac == Some(mac);
                let is_there = now.saturating_sub(peer.heard) < TOGETHER && peer.asked < ASKED_MIN;
                is_it && is_there && peer.standing == Standing::Silent
            };
            if answers_again {
                peer.standing = Standing::Answers;
            }
        }
    }

    /// Whether it is known of each that is watched.
    pub fn is_settled(&self) -> bool {
        let mut peers = self.peers.values();
        peers.all(|peer| peer.standing != Standing::Unknown)
    }

    /// What is known.
    pub fn seen(&self, now: Duration) -> Seen {
        let mut seen = Seen::default();
        for (name, peer) in &self.peers {
            let is_given_up = peer
                .dead_since
                .is_some_and(|since| now.saturating_sub(since) >= GIVEN_UP);
            match peer.standing {
                Standing::Unknown => false,
                Standing::Answers if !is_given_up => seen.answers.insert(name.clone()),
                Standing::Answers => false,
                Standing::Silent => seen.silent.insert(name.clone()),
            };
        }
        seen
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));
    const CLAIM: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 200));
    const MAC: Mac = [2, 0, 0, 0, 0, 2];
    const OTHER_MAC: Mac = [2, 0, 0, 0, 0, 3];

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn watched(claim: Option<IpAddr>) -> BTreeMap<String, Watched> {
        let at = Watched {
            address: OWN,
            claim,
            is_dead: false,
        };
        [("b".to_owned(), at)].into()
    }

    /// Turns as they are due until `end`; each question is answered that `answers` says.
    fn run(
        liveness: &mut Liveness,
        now: &mut Duration,
        end: Duration,
        mut answers: impl FnMut(&Question) -> Option<Mac>,
    ) {
        while *now < end {
            for question in liveness.turn(*now) {
                if let Some(mac) = answers(&question) {
                    liveness.answered(question.address, mac, *now + ms(1));
                }
            }
            *now = liveness.next().unwrap().max(*now + ms(1));
        }
    }

    fn silent(liveness: &Liveness, now: Duration) -> bool {
        liveness.seen(now).silent.contains("b")
    }

    #[test]
    fn a_node_that_has_gone_is_silent_within_two_seconds() {
        let (mut liveness, mut now) = (Liveness::default(), ms(0));
        liveness.watch(watched(Some(CLAIM)), now);
        assert!(!liveness.is_settled(), "nothing is known yet");
        run(&mut liveness, &mut now, ms(10_000), |_| Some(MAC));
        assert!(liveness.seen(now).answers.contains("b"));
        let gone = now;
        let mut asked = 0;
        let mut turn = now;
        while !silent(&liveness, now) {
            turn = now;
            let end = now + ms(1);
            run(&mut liveness, &mut now, end, |_| {
                asked += 1;
                None
            });
        }
        assert!(turn - gone <= ms(2_000), "{:?}", turn - gone);
        assert!(asked >= ASKED_MIN);
    }

    #[test]
    fn one_that_is_back_counts_when_it_announces_again() {
        let (mut liveness, mut now) = (Liveness::default(), ms(0));
        liveness.watch(watched(Some(CLAIM)), now);
        run(&mut liveness, &mut now, ms(5_000), |_| None);
        assert!(silent(&liveness, now));
        // Its kernel is there; this node's successor still has the address.
        run(&mut liveness, &mut now, ms(15_000), |it| {
            Some(if it.address == OWN { MAC } else { OTHER_MAC })
        });
        assert!(silent(&liveness, now));
        run(&mut liveness, &mut now, ms(17_000), |_| Some(MAC));
        assert!(liveness.seen(now).answers.contains("b"));
        // What announces nothing is back as soon as it answers.
        let (mut liveness, mut now) = (Liveness::default(), ms(0));
        liveness.watch(watched(None), now);
        run(&mut liveness, &mut now, ms(5_000), |_| None);
        run(&mut liveness, &mut now, ms(7_000), |_| Some(MAC));
        assert!(!silent(&liveness, now));
    }

    #[test]
    fn who_was_not_running_accuses_nobody() {
        let (mut liveness, mut now) = (Liveness::default(), ms(0));
        liveness.watch(watched(None), now);
        run(&mut liveness, &mut now, ms(1_000), |_| Some(MAC));
        // Stopped a moment after it has asked six times, and for a minute.
        run(&mut liveness, &mut now, ms(2_000), |_| None);
        now += ms(60_000);
        liveness.turn(now);
        assert!(!silent(&liveness, now));
    }

    #[test]
    fn a_partition_from_the_control_plane_moves_nothing_until_the_node_is_given_up() {
        let (mut liveness, mut now) = (Liveness::default(), ms(0));
        let mut wanted = watched(None);
        wanted.get_mut("b").unwrap().is_dead = true;
        liveness.watch(wanted.clone(), now);
        run(&mut liveness, &mut now, GIVEN_UP - ms(1_000), |_| Some(MAC));
        assert!(liveness.seen(now).answers.contains("b"));
        run(&mut liveness, &mut now, GIVEN_UP + ms(1_000), |_| Some(MAC));
        assert_eq!(liveness.seen(now), Seen::default());
        liveness.watch(watched(None), now);
        assert!(liveness.seen(now).answers.contains("b"));
    }

    proptest! {
        /// Some answers are lost, but never so many that a live machine could be one that has gone.
        #[test]
        fn a_node_that_answers_is_never_silent_and_one_that_does_not_always_is(
            lost in proptest::collection::vec(0_u32..ASKED_MIN - 1, 1..40),
            stall in proptest::option::of(100_u64..5_000),
        ) {
            let (mut liveness, mut now) = (Liveness::default(), ms(0));
            liveness.watch(watched(Some(CLAIM)), now);
            let mut runs = lost.iter().cycle();
            let mut left = 0;
            for step in 1..40_u64 {
                run(&mut liveness, &mut now, ms(step * 700), |_| {
                    if left == 0 {
                        left = *runs.next().unwrap();
                        return Some(MAC);
                    }
                    left -= 1;
                    None
                });
                prop_assert!(!silent(&liveness, now));
            }
            now += ms(stall.unwrap_or(0));
            let gone = now;
            run(&mut liveness, &mut now, gone + ms(3_600), |_| None);
            prop_assert!(silent(&liveness, now));
        }

        /// Any inputs at any times: bounded, and each node is in one set at most.
        #[test]
        fn what_is_asked_is_bounded(
            steps in proptest::collection::vec((0_u8..4, 0_u8..100, 0_u64..3_000), 0..60),
        ) {
            let (mut liveness, mut now) = (Liveness::default(), ms(0));
            for (what, number, passed) in steps {
                now += ms(passed);
                let address = |number: u8| IpAddr::from([192, 0, 2, number]);
                match what {
                    0 => {
                        let wanted = (0..number).map(|number| {
                            let claim = (number % 2 == 0).then(|| address(number + 100));
                            let at = Watched { address: address(number), claim, is_dead: number % 3 == 0 };
                            (format!("n{number}"), at)
                        });
                        liveness.watch(wanted.collect(), now);
                    }
                    1 => liveness.answered(address(number), [2, 0, 0, 0, 0, number], now),
                    _ => {
                        let questions = liveness.turn(now);
                        prop_assert!(questions.len() <= 2 * WATCHED_COUNT_MAX);
                        prop_assert!(liveness.next().is_none_or(|next| next > now));
                    }
                }
                let seen = liveness.seen(now);
                prop_assert!(seen.answers.is_disjoint(&seen.silent));
            }
        }
    }
}
