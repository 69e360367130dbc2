//! One seed from its begin to its end: processes, their faults, and the rest that must follow.
//!
//! ```text
//!  plan (the seed's) ─► wishes and faults ─► all faults mended ─► everything at rest (I5) ─► one more drain
//! ```
//! A process is a runtime of its own: dropping it is `kill -9`. One process runs at a time, until all its
//! tasks wait or it is killed; which of several goes first is the seed's choice.

use std::path::{Path, PathBuf};

use gantry_control::server::Tokens;
use tokio::runtime::{Builder, Runtime};

use super::control::{self, Door, Wish};
use super::plan::{Death, Fault, Plan, Step};
use super::state::{self, Event, MS, Machine, S, State, trace, violated, with};
use super::{history, host, node, wire};

/// How long everything may take to come to rest without faults: a node that was given up (40 s) and its
/// pods' back-offs included.
const REST_MAX: u64 = 240 * S;

#[derive(Default)]
struct Process {
    runtime: Option<Runtime>,
    due: Option<u64>,
    is_runnable: bool,
    death: Option<Death>,
    wall_offset_s: i64,
    is_disk_full: bool,
}

pub struct World {
    plan: Plan,
    dir: PathBuf,
    tokens: Tokens,
    door: Door,
    control: Process,
    nodes: Vec<Process>,
    /// What the Deployment was last asked to be.
    replicas: u64,
    /// Wishes that no control plane has granted yet die with it: they are asked again.
    asked: Vec<Wish>,
}

fn runtime() -> Runtime {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .event_interval(7)
        .build();
    runtime.expect("a runtime")
}

impl Process {
    fn start(&mut self, runtime: Runtime) {
        self.runtime = Some(runtime);
        self.is_runnable = true;
    }

    fn kill(&mut self) {
        host::set_killed(true);
        self.runtime = None;
        host::set_killed(false);
        (self.due, self.is_runnable, self.death) = (None, false, None);
    }

    /// Runs until all wait. False: it has died.
    fn turn(&mut self) -> bool {
        self.is_runnable = false;
        let Some(runtime) = &self.runtime else {
            return true;
        };
        host::set_wall_offset(self.wall_offset_s);
        host::set_disk_full(self.is_disk_full);
        let (turns, operations) = match self.death {
            Some(Death::Turns(count)) => (Some(count), None),
            Some(Death::Operations(count)) => (None, Some(count)),
            _ => (None, None),
        };
        host::kill_after_operations(operations);
        self.due = host::run(runtime, turns);
        if let Some(Death::Operations(left)) = &mut self.death {
            *left = host::operations_left();
        }
        host::kill_after_operations(None);
        let died = turns.is_some() || host::is_killed();
        host::set_killed(false);
        host::set_disk_full(false);
        host::set_wall_offset(0);
        !died
    }
}

impl World {
    pub fn new(plan: Plan, dir: &Path, tokens: Tokens) -> World {
        let nodes = plan.nodes;
        let machine = |number: usize| Machine {
            name: format!("n{number}"),
            dir: dir.join(format!("n{number}")),
            boot: 1,
            stopped_at: 0,
            containers: Default::default(),
            plane: Default::default(),
            programmed: None,
            is_back: false,
            seen: None,
            ended: Default::default(),
            addresses: 0,
        };
        with(|state| state.machines = (0..nodes).map(machine).collect());
        World {
            dir: dir.join("control"),
            plan,
            tokens,
            door: Door::default(),
            control: Process::default(),
            nodes: (0..nodes).map(|_| Process::default()).collect(),
            replicas: 0,
            asked: Vec::new(),
        }
    }

    /// All of it.
    pub fn run(&mut self) {
        std::fs::create_dir_all(&self.dir).expect("the directory of the control plane");
        self.start_control();
        with(|state| {
            for (number, (at, _)) in self.plan.steps.iter().enumerate() {
                state.at(*at, Event::Step(number));
            }
            for (node, at) in self.plan.joins.iter().enumerate() {
                state.at(*at, Event::AgentStarts(node));
            }
        });
        let end = self.plan.steps.iter().map(|(at, _)| *at).max().unwrap_or(0);
        self.until(end + S);
        self.mend();
        if self.rest() && self.plan.drains_at_end {
            self.one_more_drain();
        }
        with(State::check_digests);
        for node in 0..self.nodes.len() {
            self.nodes[node].kill();
        }
        self.control.kill();
    }

    /// Lets time pass up to `end`.
    fn until(&mut self, end: u64) {
        loop {
            self.run_all();
            if with(|state| !state.violations.is_empty()) {
                return;
            }
            let timers = self.processes().filter_map(|process| process.due);
            let timer = timers.min().unwrap_or(u64::MAX);
            let event = with(|state| state.next_event_at()).unwrap_or(u64::MAX);
            let next = timer.min(event).max(host::now_ns());
            if next > end {
                host::advance(end);
                return;
            }
            host::advance(next);
            while let Some(event) = with(|state| state.take_due()) {
                self.take(event);
            }
            let now = host::now_ns();
            let all = self.nodes.iter_mut().chain([&mut self.control]);
            for process in all.filter(|process| process.due.is_some_and(|due| due <= now)) {
                process.is_runnable = true;
            }
        }
    }

    fn processes(&self) -> impl Iterator<Item = &Process> {
        self.nodes.iter().chain([&self.control])
    }

    fn run_all(&mut self) {
        loop {
            let runnable: Vec<usize> = self
                .processes()
                .enumerate()
                .filter(|(_, process)| process.is_runnable)
                .map(|(number, _)| number)
                .collect();
            let Some(last) = runnable.len().checked_sub(1) else {
                return;
            };
            let number = runnable[with(|state| state.choices.between(0, last as u64)) as usize];
            self.check_acks();
            match self.nodes.get_mut(number) {
                Some(process) => {
                    if !process.turn() {
                        trace(format!("n{number}: agent killed"));
                        self.agent_died(number);
                    }
                }
                None => {
                    if !self.control.turn() {
                        trace("control: killed");
                        self.control_died();
                    }
                }
            }
        }
    }

    fn check_acks(&self) {
        let Some((_, feed)) = self.door.get() else {
            return;
        };
        for node in 0..self.nodes.len() {
            let name = format!("n{node}");
            if feed.is_connected(&name) {
                with(|state| state.check_acked(node, feed.acked(&name)));
            }
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Readable { connection, side } => {
                let node = with(|state| state.wake(connection, side));
                let process = match side {
                    wire::AGENT => &mut self.nodes[node],
                    _ => &mut self.control,
                };
                process.is_runnable = process.runtime.is_some();
            }
            Event::Step(number) => match self.plan.steps[number].1.clone() {
                Step::Wish(wish) => self.wish(wish),
                Step::Fault(fault) => self.fault(fault),
            },
            Event::AgentStarts(node) => self.start_agent(node),
            Event::LosesPower(node, pause) => self.fault(Fault::Reboot(node, pause)),
            Event::Boots(node) => self.start_agent(node),
            Event::ControlStarts => self.start_control(),
            Event::Heals(node) => {
                trace(format!("n{node}: the net is whole"));
                with(|state| state.heal(node));
            }
            Event::DiskHasRoom => {
                trace("control: the disk has room");
                self.control.is_disk_full = false;
            }
        }
    }

    fn start_control(&mut self) {
        if self.control.runtime.is_some() {
            return;
        }
        trace("control: starts");
        self.door = Door::default();
        let runtime = runtime();
        let (dir, tokens) = (self.dir.clone(), self.tokens.clone());
        let has_second = self.plan.second_scheduler;
        runtime.spawn(control::run(dir, tokens, self.door.clone(), has_second));
        for wish in self.asked.clone() {
            runtime.spawn(control::ask(self.door.clone(), wish));
        }
        self.control.start(runtime);
    }

    fn control_died(&mut self) {
        self.door = Door::default();
        with(|state| state.stop_listening());
        self.control.kill();
        let pause = with(|state| state.choices.between(100 * MS, 8_000 * MS));
        with(|state| state.after(pause, Event::ControlStarts));
    }

    fn start_agent(&mut self, node: usize) {
        if self.nodes[node].runtime.is_some() {
            return;
        }
        let runtime = runtime();
        let is_started = {
            let _inside = runtime.enter();
            node::start(node)
        };
        match is_started {
            true => self.nodes[node].start(runtime),
            false => with(|state| state.after(S, Event::AgentStarts(node))),
        }
    }

    fn agent_died(&mut self, node: usize) {
        self.nodes[node].kill();
        let pause = with(|state| state.choices.between(10 * MS, 6_000 * MS));
        with(|state| state.after(pause, Event::AgentStarts(node)));
    }

    /// A later wish about the same thing takes the place of an earlier one.
    fn wish(&mut self, wish: Wish) {
        trace(format!("user: {wish:?}"));
        if let Wish::Web { replicas, .. } = wish {
            self.replicas = replicas;
            self.asked.retain(|old| !matches!(old, Wish::Web { .. }));
        }
        if let Wish::Forget(number) = wish {
            let about = |old: &Wish| matches!(old, Wish::Task { number: n, .. } if *n == number);
            self.asked.retain(|old| !about(old));
        }
        if !matches!(wish, Wish::Kill(_)) {
            self.asked.push(wish.clone());
        }
        if let Some(runtime) = &self.control.runtime {
            runtime.spawn(control::ask(self.door.clone(), wish));
            self.control.is_runnable = true;
        }
    }

    fn fault(&mut self, fault: Fault) {
        trace(format!("fault: {fault:?}"));
        match fault {
            Fault::AgentDies(node, death) => match death {
                Death::Now if self.nodes[node].runtime.is_some() => self.agent_died(node),
                _ => self.nodes[node].death = Some(death),
            },
            Fault::AgentDiesAtEnd => with(|state| state.dies_at_end = true),
            Fault::RebootAtFloor(node, pause) => {
                with(|state| state.reboots_at_floor.insert(node, pause));
            }
            Fault::Reboot(node, pause) => {
                with(|state| {
                    let is_silent = state.choices.percent(50);
                    state.forget_ends(node, is_silent);
                });
                self.nodes[node].kill();
                node::stop_machine(node);
                with(|state| state.after(pause, Event::Boots(node)));
            }
            Fault::Break(node) => with(|state| state.break_connections(node)),
            Fault::Cut(node, sides, pause) => with(|state| {
                sides.iter().for_each(|side| state.cut(node, *side));
                state.after(pause, Event::Heals(node));
            }),
            Fault::ControlDies(death) => match death {
                Death::Now if self.control.runtime.is_some() => self.control_died(),
                _ => self.control.death = Some(death),
            },
            Fault::ControlLosesPower => {
                self.control_died();
                let dir = self.dir.clone();
                with(|state| {
                    host::cut_power(&dir, |sectors| match state.choices.between(0, 2) {
                        0 => 0,
                        1 => sectors,
                        _ => state.choices.between(0, sectors as u64) as usize,
                    });
                });
            }
            Fault::DiskFull(pause) => {
                self.control.is_disk_full = true;
                with(|state| state.after(pause, Event::DiskHasRoom));
            }
            Fault::ControlClock(seconds) => self.control.wall_offset_s = seconds,
            Fault::NodeClock(node, seconds) => self.nodes[node].wall_offset_s = seconds,
            Fault::Backup => {
                if let Some((registry, _)) = self.door.get() {
                    let saved = control::save(registry.store(), &self.dir.join("backup"));
                    saved.expect("a backup");
                }
            }
            Fault::BackupOfUnbound => {
                let file = self.dir.join("backup");
                with(|state| state.backup_of_unbound = Some(file));
            }
            Fault::FlipBit(node) => with(|state| state.flip_bit(node)),
            Fault::Restore => {
                let file = self.dir.join("backup");
                if file.exists() {
                    self.control_died();
                    control::restore(&file, &self.dir);
                }
            }
        }
    }

    /// No faults from here on.
    fn mend(&mut self) {
        trace("no more faults");
        self.control.is_disk_full = false;
        self.control.death = None;
        with(|state| {
            state.dies_at_end = false;
            state.reboots_at_floor.clear();
        });
        for node in 0..self.nodes.len() {
            self.nodes[node].death = None;
            with(|state| state.heal(node));
        }
    }

    /// I5.
    fn rest(&mut self) -> bool {
        let end = host::now_ns() + REST_MAX;
        loop {
            self.until(host::now_ns() + S / 2);
            if with(|state| !state.violations.is_empty()) {
                return false;
            }
            match self.unrest() {
                None => {
                    trace("at rest");
                    return true;
                }
                Some(why) if host::now_ns() > end => {
                    violated(format!("I5: without faults for {} s: {why}", REST_MAX / S));
                    return false;
                }
                Some(_) => {}
            }
        }
    }

    /// What is not yet as it was asked for.
    fn unrest(&self) -> Option<String> {
        let Some((registry, feed)) = self.door.get() else {
            return Some("the control plane is down".into());
        };
        let head = registry.store().revision();
        with(|state| {
            for machine in &state.machines {
                if !feed.is_connected(&machine.name) {
                    return Some(format!("{} has no stream", machine.name));
                }
            }
            let pods = state.history.now("pods");
            let mut ready = 0;
            for pod in &pods {
                let name = &pod["metadata"]["name"];
                if !pod["metadata"]["deletionTimestamp"].is_null() {
                    return Some(format!("{name} is still being deleted"));
                }
                let is_ready = history::condition(pod, "Ready") == Some("True");
                if pod["metadata"]["labels"]["app"] == "web" && is_ready {
                    ready += 1;
                }
                if pod["metadata"]["labels"]["app"].is_null() && !history::has_ended(pod) {
                    return Some(format!("{name} has not ended"));
                }
            }
            if ready != self.replicas {
                return Some(format!("{ready} of {} are ready", self.replicas));
            }
            let serving = state.history.serving();
            for machine in &state.machines {
                let name = &machine.name;
                let mut plane = machine.plane.clone();
                plane.retain(|_, backends| !backends.is_empty());
                if plane != serving {
                    return Some(format!("{name} programs {plane:?}, not {serving:?}"));
                }
                let running = |pod: &serde_json::Value| {
                    pod["spec"]["nodeName"] == **name && !history::has_ended(pod)
                };
                let wanted = pods.iter().filter(|pod| running(pod)).count();
                let runs = machine.containers.values().filter(|c| c.exited.is_none());
                let runs = runs.count();
                if runs != wanted {
                    return Some(format!("{name} runs {runs} pods, {wanted} are bound to it"));
                }
                if feed.acked(name) > machine.programmed.as_ref().map_or(0, |(_, rev)| *rev) {
                    return Some(format!("I4: {name} has acked what it has not programmed"));
                }
            }
            let seen = state.history.head();
            (seen < head).then(|| format!("the oracle is at {seen}, the store at {head}"))
        })
    }

    /// Without faults a drain is the answer of the floor, not the end of patience.
    fn one_more_drain(&mut self) {
        if self.replicas == 0 {
            return;
        }
        let before = with(|state| std::mem::take(&mut state.drained));
        trace(format!("drained so far: {before:?}"));
        self.wish(Wish::Kill(0));
        self.until(host::now_ns() + 3 * S);
        if !self.rest() {
            return;
        }
        let drained = with(|state| state.drained.clone());
        // A machine that is busy for longer than the cap is no fault of the floor.
        if !drained.contains_key("acked") && !drained.contains_key("capped") {
            violated(format!(
                "I5: a pod was deleted, and the drains were {drained:?}"
            ));
        }
        if with(|state| state.history.checked) == 0 {
            violated("no view was ever checked");
        }
    }
}

impl State {
    /// What arrives is what was sent, unless the net has damaged it.
    fn check_digests(&mut self) {
        let (mismatches, flipped) = (self.digest_mismatches, self.net.flipped);
        if mismatches > flipped {
            let text =
                format!("{mismatches} commits had not their digest, {flipped} bits were flipped");
            self.violated(text);
        }
    }

    /// I4, of a machine whose stream is of this boot.
    fn check_acked(&mut self, node: usize, acked: u64) {
        let machine = &self.machines[node];
        let programmed = machine.programmed.as_ref().map_or(0, |(_, rev)| *rev);
        if machine.is_back && acked > programmed {
            let name = &machine.name;
            let text =
                format!("I4: {name} counts as having programmed {acked}, it has {programmed}");
            self.violated(text);
        }
    }
}

/// Runs one plan in `dir`; what was violated, and the fingerprint of the run.
pub fn run(
    seed: u64,
    plan: Plan,
    dir: &Path,
    tokens: Tokens,
    is_shown: bool,
) -> (Vec<String>, String) {
    state::begin(seed, is_shown);
    trace(format!("plan: {plan:?}"));
    let mut world = World::new(plan, dir, tokens);
    world.run();
    with(|state| (std::mem::take(&mut state.violations), state.fingerprint()))
}
