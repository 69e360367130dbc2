//! The measuring itself: what is compared takes turns, in short bursts, within each round.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::runtime::Runtime;

use super::super::report::percentile;
use super::bed;
use super::figures::{Balance, Case, Figures, Measure};
use super::gantry::Gantry;
use super::model::{Model, Size};
use super::progress::Progress;
use super::stage::{Cpus, Lane, Layout, Stage, range};

/// How much of everything.
#[derive(Clone, Copy, Debug)]
pub(super) struct Amount {
    pub rounds: usize,
    /// Bursts of each lane in a round.
    bursts: usize,
    /// Connections of a burst.
    connections: usize,
    /// Requests of a burst.
    requests: usize,
    stream: Duration,
    /// Changes of the endpoints, as many as fit into the time, but a few at least.
    changes: usize,
    change_time: Duration,
    changes_min: usize,
    /// Times that everything is loaded, as above.
    loads: usize,
    load_time: Duration,
}

impl Amount {
    pub(super) fn full(rounds: usize) -> Self {
        Self {
            rounds,
            bursts: 24,
            connections: 50,
            requests: 150,
            stream: Duration::from_millis(250),
            changes: 200,
            change_time: Duration::from_secs(8),
            changes_min: 5,
            loads: 5,
            load_time: Duration::from_secs(6),
        }
    }

    /// To see that everything works.
    pub(super) fn quick(rounds: usize) -> Self {
        Self {
            rounds,
            bursts: 3,
            connections: 20,
            requests: 40,
            stream: Duration::from_millis(30),
            changes: 6,
            change_time: Duration::from_secs(1),
            changes_min: 2,
            loads: 2,
            load_time: Duration::from_secs(1),
        }
    }
}

/// What measuring needs, at whatever size.
pub(super) struct Bench<'a> {
    pub runtime: &'a Runtime,
    pub cpus: Cpus,
    pub amount: Amount,
    pub figures: Figures,
    pub progress: Progress,
}

/// Steps of the progress bar that one size takes.
pub(super) fn step_count(layouts: usize, rounds: usize) -> usize {
    1 + layouts + 1 + rounds + layouts + 1
}

impl Bench<'_> {
    /// Everything about one size.
    pub(super) fn size(&mut self, size: Size, layouts: &[Layout]) -> Result<()> {
        self.figures.sizes.push(size);
        let label = size.label();
        self.progress.step(&format!("{label}: namespaces"));
        let mut stage = Stage::new(Model::new(size), layouts, self.cpus)?;
        for act in 0..stage.acts.len() {
            let name = stage.acts[act].layout.name();
            self.progress.step(&format!("{label}: loading {name}"));
            self.load(&mut stage, act, size)
                .with_context(|| format!("load {name}"))?;
        }
        self.progress.step(&format!("{label}: who is reached?"));
        self.balance(&mut stage, size)?;
        for lane in 0..stage.lanes.len() {
            let (client, address) = (stage.lanes[lane].client, stage.lanes[lane].address.clone());
            stage.clients[client].ask(&format!("open {address}"))?;
        }
        for round in 0..self.amount.rounds {
            let of = self.amount.rounds;
            self.progress
                .step(&format!("{label}: round {} of {of}", round + 1));
            self.round(&mut stage, size, round)?;
        }
        for act in 0..stage.acts.len() {
            let name = stage.acts[act].layout.name();
            self.progress.step(&format!("{label}: changes of {name}"));
            self.changes(&mut stage, act, size)
                .with_context(|| format!("change {name}"))?;
        }
        self.progress.step(&format!("{label}: programs"));
        self.programs(&mut stage, size)?;
        drop(stage);
        bed::clear_programs()
    }

    fn load(&mut self, stage: &mut Stage, act: usize, size: Size) -> Result<()> {
        let Stage { acts, model, .. } = stage;
        let act = &mut acts[act];
        if act.layout == Layout::Direct {
            return Ok(());
        }
        let began = Instant::now();
        for load in 0..self.amount.loads {
            if load > 0 && began.elapsed() > self.amount.load_time {
                break;
            }
            if load > 0 {
                act.unload()?;
            }
            // Once: what a load has left is still being freed when the next one begins.
            let before = if load == 0 { settled_memory()? } else { 0.0 };
            let took = act.load(self.runtime, model)?;
            let case = act.layout.case();
            if load == 0 {
                let grown = kernel_memory()? - before;
                self.figures.add(Measure::Memory, case, size, grown);
            }
            self.figures.add(Measure::Load, case, size, ms(took));
        }
        Ok(())
    }

    /// Every endpoint must be reached, and none preferred: else what is measured is not what it says.
    fn balance(&mut self, stage: &mut Stage, size: Size) -> Result<()> {
        let connections = (20 * size.endpoints).max(300);
        let (low, high) = range(&stage.model.measured().endpoints).context("no endpoints")?;
        for lane in &stage.lanes {
            let Lane { case, address, .. } = lane;
            let question = format!("reach {address} {connections}");
            let pairs = stage.clients[lane.client]
                .ask(&question)
                .with_context(|| case.label().to_owned())?;
            if matches!(
                case,
                Case::Pair | Case::Direct | Case::DirectAgain | Case::Routed | Case::GantryPod
            ) {
                continue; // asked by address
            }
            let answers = pairs.chunks(2);
            for answer in answers.clone() {
                let known = answer[0] >= f64::from(low) && answer[0] < f64::from(high);
                ensure!(
                    known,
                    "{}: no endpoint of the Service has answered",
                    case.label()
                );
            }
            let counts: Vec<f64> = answers.map(|answer| answer[1]).collect();
            let balance = Balance::of(size, *case, &counts);
            if !balance.is_even() {
                bail!(
                    "{} does not spread connections evenly: {} of {} endpoints reached, chi square {:.1} where \
                     {:.1} is much already",
                    case.label(),
                    balance.reached,
                    balance.endpoints,
                    balance.chi_square,
                    balance.chi_square_max
                );
            }
            self.figures.balance.push(balance);
        }
        Ok(())
    }

    fn round(&mut self, stage: &mut Stage, size: Size, round: usize) -> Result<()> {
        let Amount {
            bursts,
            connections,
            requests,
            stream,
            ..
        } = self.amount;
        let mut crr = vec![Crr::default(); stage.lanes.len()];
        for _ in 0..bursts {
            for lane in order(stage.lanes.len(), round) {
                crr[lane].burst(stage, lane, connections)?;
            }
        }
        let mut rr = vec![Vec::new(); stage.lanes.len()];
        for _ in 0..bursts {
            for lane in order(stage.lanes.len(), round) {
                let Lane {
                    client, address, ..
                } = &stage.lanes[lane];
                let times = stage.clients[*client].ask(&format!("rr {address} {requests}"))?;
                rr[lane].extend(times);
            }
        }
        for lane in order(stage.lanes.len(), round) {
            let gigabits = self.stream(stage, lane, stream)?;
            let case = stage.lanes[lane].case;
            self.figures.add(Measure::Stream, case, size, gigabits);
        }
        for (lane, (crr, rr)) in stage.lanes.iter().zip(crr.iter().zip(&rr)) {
            let mut add = |measure, value| self.figures.add(measure, lane.case, size, value);
            let count = crr.connects.len() as f64;
            let quantile = |samples: &[f64], q| percentile(samples, q).unwrap_or(f64::NAN) / 1e3;
            add(Measure::ConnectP50, quantile(&crr.connects, 0.5));
            add(Measure::ConnectP99, quantile(&crr.connects, 0.99));
            add(Measure::Crr, count / (crr.total_ns / 1e9));
            add(Measure::Cpu, crr.cpu_ns / count / 1e3);
            let total: f64 = rr.iter().sum();
            add(Measure::Rr, rr.len() as f64 / (total / 1e9));
            add(Measure::RrP50, quantile(rr, 0.5));
        }
        Ok(())
    }

    fn stream(&self, stage: &mut Stage, lane: usize, time: Duration) -> Result<f64> {
        let lane = &stage.lanes[lane];
        for server in &mut stage.servers[lane.servers] {
            server.ask(&format!("cpu {}", self.cpus.other))?;
        }
        let question = format!("stream {} {}", lane.address, time.as_millis());
        let answer = stage.clients[lane.client].ask(&question)?;
        for server in &mut stage.servers[lane.servers] {
            server.ask(&format!("cpu {}", self.cpus.measured))?;
        }
        let [bytes, ns] = answer[..] else {
            bail!("{question}: {} numbers", answer.len());
        };
        Ok(bytes * 8.0 / ns)
    }

    /// There and back, as often as there is time for.
    fn changes(&mut self, stage: &mut Stage, act: usize, size: Size) -> Result<()> {
        let Some(lane) = stage.acts[act].lane else {
            return Ok(());
        };
        let Lane {
            client, address, ..
        } = &stage.lanes[lane];
        let (old, new) = (stage.model.measured().clone(), stage.model.moved());
        let (mut samples, mut failed) = (Vec::new(), 0.0);
        let began = Instant::now();
        for number in 0..self.amount.changes {
            if number >= self.amount.changes_min && began.elapsed() > self.amount.change_time {
                break;
            }
            let to = if number % 2 == 0 { &new } else { &old };
            let (low, high) = range(&to.endpoints).context("no endpoints")?;
            let client = &mut stage.clients[*client];
            let change = stage.acts[act].change(self.runtime, &stage.model, to)?;
            client.send(&format!("until {address} {low} {high}"))?;
            // It connects without pause by then.
            std::thread::sleep(Duration::from_millis(3));
            let handed_over = super::peer::now_ns()?;
            change()?;
            let answer = client.answer()?;
            let [seen, lost] = answer[..] else {
                bail!("{} numbers", answer.len());
            };
            samples.push((seen - handed_over as f64) / 1e6);
            failed += lost;
        }
        let case = stage.acts[act].layout.case();
        for (measure, q) in [(Measure::ChangeP50, 0.5), (Measure::ChangeP99, 0.99)] {
            let value = percentile(&samples, q).unwrap_or(f64::NAN);
            self.figures.add(measure, case, size, value);
        }
        if failed > 0.0 {
            self.figures.singles.push((
                format!(
                    "connections lost by {} changes, {}, {}",
                    samples.len(),
                    case.label(),
                    size.label()
                ),
                "",
                failed,
                "Connections that failed while the client waited for a new endpoint.",
            ));
        }
        Ok(())
    }

    /// Gantry's programs by themselves.
    fn programs(&mut self, stage: &mut Stage, size: Size) -> Result<()> {
        let socket = stage
            .lanes
            .iter()
            .find(|lane| lane.case == Case::GantrySocket);
        let Some(Lane {
            client, address, ..
        }) = socket
        else {
            return Ok(());
        };
        let Some(act) = stage.acts.iter_mut().find(|act| act.gantry.is_some()) else {
            return Ok(());
        };
        let Some(gantry) = &mut act.gantry else {
            return Ok(());
        };
        let client = &mut stage.clients[*client];
        let question = format!("crr {address} {}", 10 * self.amount.connections);
        let connect = gantry.time_connect(|| client.ask(&question).map(drop))?;
        let packet = gantry.time_from_pod(self.runtime, &act.bed)?;
        let label = size.label();
        self.figures.singles.extend([
            (
                format!("connect4, {label} services"),
                "ns",
                connect,
                "The program of connect(), by the kernel's run-time statistics (BPF_ENABLE_STATS), which take a \
                 part of it. TEST_RUN does not know programs of this type.",
            ),
            (
                format!("from_pod, {label} services"),
                "ns",
                packet,
                "A packet of a known flow to a Service, by BPF_PROG_TEST_RUN: the least of 7 means of 200,000 runs.",
            ),
        ]);
        let what = format!("packet program, TEST_RUN, ns, {label}");
        self.figures
            .target(what, super::super::report::Bound::Max, 100.0, Some(packet));
        let drops = gantry.drops()?;
        if !drops.is_empty() {
            let what = format!("{label}: {drops}");
            self.figures.facts.push(("dropped by Gantry", what));
        }
        Ok(())
    }

    /// How long it takes Gantry to load this many Services.
    pub(super) fn load_many(&mut self, services: usize, limit_ms: f64) -> Result<()> {
        let model = Model::new(Size::of(services));
        let mut samples = Vec::new();
        for _ in 0..self.amount.loads {
            let took = Gantry::start()?.load(self.runtime, &model)?;
            samples.push(ms(took));
        }
        let median = super::super::report::median(&samples);
        let what = format!("{services} Services loaded");
        self.figures.singles.push((
            what.clone(),
            "ms",
            median.unwrap_or(f64::NAN),
            "Plan and apply into empty maps, three endpoints each; the median of several times.",
        ));
        let what = format!("{what}, ms");
        self.figures
            .target(what, super::super::report::Bound::Max, limit_ms, median);
        Ok(())
    }
}

/// Each lane once; another one begins in each round, and the last is always the last.
fn order(lanes: usize, round: usize) -> impl Iterator<Item = usize> {
    let turning = lanes.saturating_sub(1);
    (0..turning)
        .map(move |index| (index + round) % turning.max(1))
        .chain((lanes > 0).then_some(turning))
}

#[derive(Clone, Default)]
struct Crr {
    connects: Vec<f64>,
    total_ns: f64,
    cpu_ns: f64,
}

impl Crr {
    fn burst(&mut self, stage: &mut Stage, lane: usize, count: usize) -> Result<()> {
        let lane = &stage.lanes[lane];
        let before = cpu_ns(stage, lane)?;
        let question = format!("crr {} {count}", lane.address);
        let answer = stage.clients[lane.client].ask(&question);
        let answer = answer.with_context(|| lane.case.label().to_owned())?;
        let (total, connects) = answer.split_first().context("no numbers")?;
        self.cpu_ns += cpu_ns(stage, lane)? - before;
        self.total_ns += total;
        self.connects.extend(connects);
        Ok(())
    }
}

fn cpu_ns(stage: &Stage, lane: &Lane) -> Result<f64> {
    let servers = stage.servers[lane.servers].iter();
    let all = servers.chain([&stage.clients[lane.client]]);
    all.map(|peer| peer.cpu_ns()).sum()
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// MiB of the whole machine, once what has been removed is gone: the kernel frees namespaces and maps
/// in its own time.
fn settled_memory() -> Result<f64> {
    let mut last = kernel_memory()?;
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(100));
        let now = kernel_memory()?;
        if (now - last).abs() < 0.1 {
            return Ok(now);
        }
        last = now;
    }
    Ok(last)
}

/// MiB of the whole machine.
fn kernel_memory() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    kernel_memory_of(&text).context("/proc/meminfo has no Slab, VmallocUsed or Percpu")
}

fn kernel_memory_of(text: &str) -> Option<f64> {
    let row = |name: &str| -> Option<f64> {
        let row = text.lines().find_map(|line| line.strip_prefix(name))?;
        row.split_whitespace().next()?.parse().ok()
    };
    let rows = ["Slab:", "VmallocUsed:", "Percpu:"].map(row);
    rows.into_iter()
        .sum::<Option<f64>>()
        .map(|kib| kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lane_has_its_turn_and_the_second_floor_is_the_last() {
        assert_eq!(order(4, 0).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(order(4, 5).collect::<Vec<_>>(), [2, 0, 1, 3]);
        assert_eq!(order(1, 3).collect::<Vec<_>>(), [0]);
        assert_eq!(order(0, 3).count(), 0);
    }

    #[test]
    fn kernel_memory_is_the_sum_of_three_rows() {
        let text =
            "MemTotal: 9 kB\nSlab:             1024 kB\nVmallocUsed:  2048 kB\nPercpu: 512 kB\n";
        assert_eq!(kernel_memory_of(text), Some(3.5));
        assert_eq!(kernel_memory_of("Slab: 1 kB\n"), None);
    }
}
