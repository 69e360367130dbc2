use std::collections::BTreeSet;
use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::services::index::{UDP, addr_of};

const TICK: Duration = Duration::from_millis(250);

fn backend(last: u8) -> Backend {
    Backend {
        addr: addr_of(IpAddr::from([10, 244, 0, last])),
        port_be: 8080u16.to_be(),
        proto: TCP,
        node_id: 1,
        pod_id: last.into(),
        on_trial: false,
    }
}

fn target(last: u8) -> Target {
    Target::of(&backend(last)).unwrap()
}

/// Backends, what they do, and clients that connect to those that are not left out.
struct World {
    ejections: Ejections,
    now: Duration,
    chosen: BTreeMap<Target, u64>,
    /// SYNs that will be sent again.
    resent: Vec<(Duration, u8)>,
    /// The same of clients whose SYNs nobody would answer.
    forged: Vec<(Duration, u8)>,
    changes: Vec<(Duration, Change)>,
}

impl World {
    fn new() -> Self {
        Self {
            ejections: Ejections::default(),
            now: Duration::ZERO,
            chosen: BTreeMap::new(),
            resent: Vec::new(),
            forged: Vec::new(),
            changes: Vec::new(),
        }
    }

    /// Lets a quarter of a second pass, in which each serving backend gets `connects` of them.
    fn tick(&mut self, count: u8, connects: u64, dead: &BTreeSet<u8>) {
        let backends: Vec<Backend> = (0..count).map(backend).collect();
        let standings = self.ejections.standings(&backends);
        let mut seen: BTreeMap<Target, Failures> = BTreeMap::new();
        self.now += TICK;
        for (queue, may_answer) in [(&mut self.resent, true), (&mut self.forged, false)] {
            queue.retain(|(at, last)| {
                let is_due = *at <= self.now;
                if is_due {
                    let seen = seen.entry(target(*last)).or_default();
                    seen.resent += 1;
                    seen.answered += u64::from(may_answer && !dead.contains(last));
                }
                !is_due
            });
        }
        for (last, standing) in (0..count).zip(standings) {
            let own = match standing {
                Standing::Serving => connects,
                Standing::OnTrial => connects.min(1),
                Standing::Out => 0,
            };
            *self.chosen.entry(target(last)).or_default() += own;
            if dead.contains(&last) {
                let again = (self.now + Duration::from_secs(1), last);
                self.resent.extend((0..own).map(|_| again));
            } else if self.ejections.watches(&target(last)) {
                // Answers are counted where there is an entry.
                seen.entry(target(last)).or_default().answered += own;
            }
        }
        let chosen = &self.chosen;
        let changes = (self.ejections).look(&seen, |target| chosen.get(target).copied(), self.now);
        self.changes
            .extend(changes.into_iter().map(|change| (self.now, change)));
    }

    fn run(&mut self, seconds: u64, count: u8, connects: u64, dead: &[u8]) {
        let dead = dead.iter().copied().collect();
        for _ in 0..seconds * 4 {
            self.tick(count, connects, &dead);
        }
    }

    fn standings(&self, count: u8) -> Vec<Standing> {
        let backends: Vec<Backend> = (0..count).map(backend).collect();
        self.ejections.standings(&backends)
    }
}

#[test]
fn a_backend_that_does_not_answer_is_out_within_three_seconds_and_comes_back() {
    for connects in [1, 20] {
        let mut world = World::new();
        world.run(10, 4, connects, &[]);
        assert!(world.changes.is_empty());
        let died = world.now;
        world.run(3, 4, connects, &[2]);
        let (at, first) = world.changes[0];
        assert!(at - died <= Duration::from_secs(3), "{:?}", at - died);
        assert_eq!(
            (first.target, first.standing, first.times),
            (target(2), Standing::Out, 1)
        );
        world.run(60, 4, connects, &[2]);
        let outs = world
            .changes
            .iter()
            .filter(|(_, change)| change.standing == Standing::Out);
        let outs: Vec<Duration> = outs.map(|(at, _)| *at).collect();
        let waits: Vec<Duration> = outs.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(
            waits
                .windows(2)
                .all(|pair| pair[1] > pair[0] || pair[1] > WAIT_MAX),
            "{waits:?}"
        );
        assert!(waits.len() >= 3);
        assert_eq!(world.ejections.totals()[1], 0);
        world.run(40, 4, connects, &[]);
        assert_eq!(world.standings(4), [Standing::Serving; 4]);
        assert_eq!(world.ejections.totals()[1], 1);
    }
}

#[test]
fn a_trial_costs_clients_one_connect() {
    let mut world = World::new();
    world.run(60, 4, 50, &[1]);
    let before = world.chosen[&target(1)];
    world.run(60, 4, 50, &[1]);
    let trials = world.chosen[&target(1)] - before;
    // Ticks of a trial until its SYN is known to be unanswered: one connect each in this model, where
    // the programs let exactly one through.
    assert!(trials <= 3 * 6, "{trials} connects in a minute");
}

#[test]
fn lost_packets_leave_nobody_out() {
    let mut world = World::new();
    for tick in 0..400_u32 {
        world.tick(3, 100, &BTreeSet::new());
        // A few in a hundred, now and then of each.
        let again = (world.now + TICK, (tick % 3) as u8);
        world.resent.extend([again; 3]);
    }
    assert!(world.changes.is_empty(), "{:?}", world.changes);
}

#[test]
fn who_answers_others_is_not_left_out_whatever_a_client_does() {
    let mut world = World::new();
    for tick in 0..400_u64 {
        // Its SYNs have a hop limit of 1, or an option that the server takes for an attack.
        let again = (world.now + TICK, 1);
        world.forged.extend([again; 5]);
        world.tick(3, tick % 2, &BTreeSet::new());
    }
    assert!(world.changes.is_empty(), "{:?}", world.changes);
    // And if nobody else had asked, the first who does is answered.
    for _ in 0..8 {
        let again = (world.now + TICK, 1);
        world.forged.extend([again; 5]);
        world.tick(3, 0, &BTreeSet::new());
    }
    assert_ne!(world.standings(3)[1], Standing::Serving);
    world.forged.clear();
    world.run(4, 3, 1, &[]);
    assert_eq!(world.standings(3), [Standing::Serving; 3]);
}

#[test]
fn an_answer_ends_the_wait() {
    let mut world = World::new();
    world.run(30, 4, 5, &[2]);
    assert_ne!(world.standings(4)[2], Standing::Serving);
    // Somebody who knows its address has asked it, or an old client has asked again.
    let seen = BTreeMap::from([(
        target(2),
        Failures {
            answered: 1,
            ..Failures::default()
        },
    )]);
    let changes = world.ejections.look(&seen, |_| Some(0), world.now);
    assert_eq!(changes.len(), 1);
    assert_eq!(world.standings(4), [Standing::Serving; 4]);
}

#[test]
fn a_trial_of_a_client_that_nobody_sees_ends_too() {
    let mut world = World::new();
    world.run(2, 4, 5, &[2]);
    let mut at = world.now;
    let mut chosen = 0;
    let mut standings = Vec::new();
    for _ in 0..40 {
        at += TICK;
        let changes = (world.ejections).look(&BTreeMap::new(), |_| Some(chosen), at);
        standings.extend(changes.iter().map(|change| change.standing));
        // One from outside comes when there is a trial.
        chosen += u64::from(standings.last() == Some(&Standing::OnTrial) && chosen == 0);
    }
    assert_eq!(
        standings[..2],
        [Standing::OnTrial, Standing::Out],
        "{standings:?}"
    );
}

#[test]
fn when_all_fail_none_is_left_out_and_never_more_than_half() {
    let mut world = World::new();
    world.run(5, 4, 10, &[0, 1, 2]);
    let out = |world: &World| {
        let standings = world.standings(4);
        standings
            .iter()
            .filter(|standing| **standing == Standing::Out)
            .count()
    };
    assert!(out(&world) <= 2);
    assert!(world.ejections.totals()[0] >= 3);
    world.run(5, 4, 10, &[0, 1, 2, 3]);
    let mut all_serve = 0;
    for _ in 0..40 {
        world.tick(4, 10, &BTreeSet::from([0, 1, 2, 3]));
        assert!(out(&world) <= 2);
        all_serve += usize::from(world.standings(4) == [Standing::Serving; 4]);
    }
    assert!(all_serve > 20, "{all_serve}");
    let mut alone = World::new();
    alone.run(10, 1, 10, &[0]);
    assert_eq!(alone.standings(1), [Standing::Serving]);
}

#[test]
fn a_refusal_counts_as_no_answer() {
    let mut ejections = Ejections::default();
    let refused = |count| {
        BTreeMap::from([(
            target(1),
            Failures {
                refused: count,
                ..Failures::default()
            },
        )])
    };
    let mut now = Duration::ZERO;
    let mut chosen = 0;
    let mut standings = Vec::new();
    for _ in 0..4 {
        (now, chosen) = (now + TICK, chosen + 5);
        let changes = ejections.look(&refused(5), |_| Some(chosen), now);
        standings.extend(changes.iter().map(|change| change.standing));
    }
    assert_eq!(standings, [Standing::Out]);
}

#[test]
fn a_backend_that_no_service_has_is_forgotten() {
    let mut world = World::new();
    world.run(4, 4, 10, &[1]);
    assert!(!world.ejections.is_idle());
    world.chosen.clear();
    let chosen = BTreeMap::<Target, u64>::new();
    let look = world.ejections.look(
        &BTreeMap::new(),
        |target| chosen.get(target).copied(),
        world.now,
    );
    assert!(look.is_empty() && world.ejections.is_idle());
    // Nor is one begun to be watched: failures of what is no backend.
    let strange = BTreeMap::from([(
        target(9),
        Failures {
            resent: 9,
            ..Failures::default()
        },
    )]);
    world.ejections.look(&strange, |_| None, world.now);
    assert!(world.ejections.watched.is_empty());
}

#[test]
fn datagrams_are_not_judged() {
    let datagrams = Backend {
        proto: UDP,
        ..backend(1)
    };
    assert_eq!(Target::of(&datagrams), None);
    let mut world = World::new();
    world.run(4, 4, 10, &[1]);
    let standings = world.ejections.standings(&[datagrams, datagrams]);
    assert_eq!(standings, [Standing::Serving; 2]);
}

proptest! {
    #[test]
    fn at_most_half_are_out_and_who_stops_failing_comes_back(
        count in 1_u8..8,
        connects in 1_u64..6,
        phases in proptest::collection::vec((1_u64..8, any::<u8>()), 1..6),
    ) {
        let mut world = World::new();
        for (seconds, dead) in phases {
            let dead: BTreeSet<u8> = (0..count).filter(|last| dead & (1 << last) != 0).collect();
            for _ in 0..seconds * 4 {
                world.tick(count, connects, &dead);
                let standings = world.standings(count);
                let is = |wanted| standings.iter().filter(|own| **own == wanted).count();
                prop_assert!(is(Standing::Out) <= usize::from(count) / 2);
                prop_assert!(is(Standing::Serving) > 0);
            }
        }
        world.run(120, count, connects, &[]);
        prop_assert_eq!(world.standings(count), vec![Standing::Serving; usize::from(count)]);
    }
}
