//! What happens in a seed: wishes of users and faults, at times, drawn before anything runs.

use super::control::Wish;
use super::state::{Choices, MS, S};
use super::wire::{AGENT, CONTROL};

/// When a process dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Death {
    /// At once, between two turns.
    Now,
    /// In its next turn, after so many of its tasks' steps.
    Turns(u32),
    /// At the n-th operation on its disk from now: before it is done.
    Operations(u32),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    AgentDies(usize, Death),
    /// That of the next node on which the last trace of a pod goes, at its next disk operation after that.
    AgentDiesAtEnd,
    /// The machine loses its power and comes back after this time.
    Reboot(usize, u64),
    /// The same, at the next moment at which another machine ends a pod by floor.
    RebootAtFloor(usize, u64),
    Break(usize),
    /// Nothing comes from these sides for this time.
    Cut(usize, Vec<usize>, u64),
    ControlDies(Death),
    ControlLosesPower,
    DiskFull(u64),
    ControlClock(i64),
    NodeClock(usize, i64),
    Backup,
    /// At the next moment at which a pod waits for its node.
    BackupOfUnbound,
    Restore,
    /// A bit of the key of a backend is another one when it arrives at this node.
    FlipBit(usize),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    Wish(Wish),
    Fault(Fault),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    pub nodes: usize,
    /// When each node's agent starts first.
    pub joins: Vec<u64>,
    pub steps: Vec<(u64, Step)>,
    /// At rest, one more pod is deleted, and its drain has to be the floor's answer.
    pub drains_at_end: bool,
    /// A second scheduler, whose cache is late, binds what is bound.
    pub second_scheduler: bool,
}

fn death(choices: &mut Choices) -> Death {
    match choices.between(0, 2) {
        0 => Death::Now,
        1 => Death::Turns(choices.between(0, 40) as u32),
        _ => Death::Operations(choices.between(1, 30) as u32),
    }
}

/// Most are short; in a long plan some are longer than what it takes to be given up (40 s).
fn pause(choices: &mut Choices, is_long: bool) -> u64 {
    match choices.between(0, 9) {
        _ if !is_long => choices.between(100 * MS, 4 * S),
        0 => choices.between(42 * S, 60 * S),
        1..=3 => choices.between(5 * S, 20 * S),
        _ => choices.between(100 * MS, 4 * S),
    }
}

impl Plan {
    /// One in five is long: half a minute, longer pauses, a drain at the end.
    pub fn draw(seed: u64) -> Plan {
        let mut choices = Choices::new(seed ^ 0xfeed);
        let choices = &mut choices;
        let is_long = seed.is_multiple_of(5);
        // How many seconds the plan has: all times below are drawn in them.
        let (begin, end) = if is_long {
            (4 * S, 30 * S)
        } else {
            (2 * S, 6 * S)
        };
        let nodes = choices.between(2, 3) as usize;
        let mut joins = vec![0; nodes];
        if choices.percent(30) {
            joins[nodes - 1] = choices.between(begin, end - S);
        }
        let mut steps = Vec::new();
        let mut version = 0;
        let mut replicas = choices.between(1, 3);
        steps.push((S, Step::Wish(Wish::Web { replicas, version })));
        let mut tasks = 0;
        for _ in 0..choices.between(1, if is_long { 4 } else { 2 }) {
            let at = choices.between(begin, end);
            let wish = match choices.between(0, 9) {
                0..=2 => {
                    version += 1;
                    Wish::Web { replicas, version }
                }
                3..=5 => Wish::Kill(choices.between(0, 9)),
                6 => Wish::Secret(choices.between(0, 1_000_000)),
                7 => {
                    replicas = choices.between(0, 4);
                    Wish::Web { replicas, version }
                }
                _ => {
                    tasks += 1;
                    let runs_for_s = choices.between(0, 8);
                    if choices.percent(50) {
                        let later = at + choices.between(100 * MS, end / 2);
                        steps.push((later, Step::Wish(Wish::Forget(tasks))));
                    }
                    Wish::Task {
                        number: tasks,
                        runs_for_s,
                    }
                }
            };
            steps.push((at, Step::Wish(wish)));
        }
        let restores = choices.percent(15);
        if restores {
            let at = choices.between(begin, end);
            let backup = match choices.percent(50) {
                true => Fault::Backup,
                false => Fault::BackupOfUnbound,
            };
            steps.push((at, Step::Fault(backup)));
            let later = at + choices.between(S, end / 2);
            steps.push((later, Step::Fault(Fault::Restore)));
        }
        for _ in 0..choices.between(1, if is_long { 4 } else { 2 }) {
            let at = choices.between(begin, end);
            let node = choices.between(0, nodes as u64 - 1) as usize;
            let fault = match choices.between(0, 15) {
                0 | 1 => Fault::AgentDies(node, death(choices)),
                2 | 3 => Fault::Reboot(node, choices.between(2 * S, 12 * S)),
                4 => Fault::Break(node),
                5 | 6 => {
                    let sides = match choices.between(0, 3) {
                        0 => vec![AGENT],
                        1 => vec![CONTROL],
                        _ => vec![AGENT, CONTROL],
                    };
                    Fault::Cut(node, sides, pause(choices, is_long))
                }
                7 | 8 => Fault::ControlDies(death(choices)),
                9 => Fault::ControlLosesPower,
                10 => Fault::DiskFull(choices.between(500 * MS, 6 * S)),
                11 => Fault::ControlClock(choices.between(0, 172_800) as i64 - 86_400),
                12 => Fault::FlipBit(node),
                13 => {
                    // Of a pod that ends by itself, for one that is deleted does not start again.
                    tasks += 1;
                    let (number, runs_for_s) = (tasks, choices.between(0, 2));
                    let task = Wish::Task { number, runs_for_s };
                    steps.push((at, Step::Wish(task)));
                    Fault::AgentDiesAtEnd
                }
                14 => Fault::RebootAtFloor(node, choices.between(2 * S, 12 * S)),
                _ => Fault::NodeClock(node, choices.between(0, 172_800) as i64 - 86_400),
            };
            steps.push((at, Step::Fault(fault)));
        }
        steps.sort_by_key(|(at, _)| *at);
        Plan {
            nodes,
            joins,
            steps,
            drains_at_end: is_long,
            second_scheduler: choices.percent(10),
        }
    }
}
