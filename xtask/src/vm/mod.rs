//! `cargo xtask vm-test`: boots machines of our own in QEMU and runs the scenarios inside.
//!
//! ```text
//! kernel.rs    Debian's kernel package, unpacked; modules in load order
//! initramfs.rs our binaries, their libraries, images ──► cpio.rs ──► initrd
//! guest.rs     qemu (KVM after a timed probe, else TCG) ──► console lines ──► verdicts
//! nodes.rs     several of them on switch.rs (router.rs, pcap.rs); asks.rs: faults that they ask for
//! outcome.rs   which verdicts decide, and what is asked again
//! alone.rs     one run at a time, which another command can end
//! ```
//! No root, no tap, no change to the host. The guest's init is `gantry-vm-init` of `tests/`: it
//! mounts a pure cgroup v2, runs the scenarios and prints one line for each:
//! `vm: ok NAME SECONDS`, `vm: FAILED NAME: WORDS`, `vm: skipped NAME: REASON`, then `vm: end`.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::up::{self, Cluster};
use crate::{build, image, report, run, setup};

mod alone;
mod asks;
mod cpio;
mod guest;
mod initramfs;
mod kernel;
mod nodes;
mod outcome;
mod pcap;
mod router;
mod switch;

pub use outcome::Outcome;

use outcome::Boot;

/// All scenarios, boot to power-off: up to a minute a scenario under TCG, with room for a loaded machine.
const LIMIT: Duration = Duration::from_secs(2_400);
/// Lines of the console of a machine that has not come to its end.
const LAST_WORDS: usize = 60;
/// The agent's own tests of its programs, in the guest.
const PROGRAMS: &str = "ebpf-programs";
/// The units of both daemons, in a machine whose first process is systemd.
const UNITS: &str = "systemd-units";
/// The scenarios of one machine that depend on the kernel.
const EVERY_KERNEL: &str = "every-kernel";
/// The scenarios of several machines that `cargo xtask test` runs.
const SHORT: &str = "short";
const ALL: &str = "all";
/// What `cargo xtask bench nodes` measures.
const BENCH: &str = "bench";
/// Only a cluster.
const NONE: &str = "none";
/// Machines among which the scenarios of one machine are shared out: each waits half of its time.
const SHARDS: usize = 2;

/// What `vm-test` takes.
#[derive(Clone, clap::Args)]
pub struct Arguments {
    /// Machines: a control plane and workers on one switch; 1: the scenarios of one machine
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=9))]
    pub nodes: u8,
    /// So many of the last workers are on another link, behind a router
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub routed: u8,
    /// Only these scenarios (NAME,...), or a set of them: `all`, `short` (of several machines, in `cargo xtask test`),
    /// `every-kernel` (of one machine: those that depend on the kernel)
    #[arg(long, value_name = "NAME")]
    pub scenario: Option<String>,
    /// Of `ebpf-programs` only these areas (AREA,...): the names of its tests after `dataplane::tests::` begin so
    #[arg(long, value_name = "AREA", requires = "scenario")]
    pub tests: Option<String>,
    /// Print the names of all scenarios, and run none
    #[arg(long)]
    pub list: bool,
    /// Leave the cluster up at the end, and print how to reach its API from this host; runs only scenarios that are
    /// named
    #[arg(long)]
    pub keep: bool,
    /// End the run that is on (with --keep: the cluster)
    #[arg(long, conflicts_with_all = ["keep", "list"])]
    pub stop: bool,
    /// Which of Debian's kernels: the start of its version
    #[arg(long, value_name = "VERSION", default_value = "6.1")]
    pub kernel_version: String,
    /// One after the other on these of Debian's kernels: `ebpf-programs`, `every-kernel`, then several machines
    #[arg(long, value_name = "VERSIONS", value_delimiter = ',')]
    pub kernel_matrix: Vec<String>,
    /// A kernel image instead of Debian's (its modules are expected to be built in)
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Show the guests' whole consoles
    #[arg(long)]
    pub console: bool,
    /// What fails in an emulated machine is asked again
    #[arg(skip)]
    pub repeats: bool,
}

impl Arguments {
    /// What `cargo xtask test` runs: the others have just run on this machine.
    pub fn of_test() -> Self {
        Self {
            nodes: 3,
            routed: 0,
            scenario: None,
            tests: None,
            list: false,
            keep: false,
            stop: false,
            kernel_version: "6.1".into(),
            kernel_matrix: Vec::new(),
            kernel: None,
            console: false,
            repeats: true,
        }
    }
}

/// Runs and fails when anything failed.
pub fn task(arguments: &Arguments) -> Result<()> {
    if arguments.stop {
        return alone::stop();
    }
    if arguments.keep && arguments.kernel_matrix.len() > 1 {
        bail!("--keep leaves one cluster up: name one kernel, --kernel-version VERSION");
    }
    setup::ensure(setup::For::Vm)?;
    let mut built = Built::new()?;
    let known = built.scenarios()?;
    if arguments.list {
        for (kind, name) in &known {
            println!("{name}  ({kind})");
        }
        return Ok(());
    }
    let _alone = alone::take()?;
    let of_matrix = arguments.scenario.is_none() && !arguments.kernel_matrix.is_empty();
    let named = arguments.scenario.as_deref().unwrap_or_default();
    if of_matrix || named == PROGRAMS {
        built.tests = Some(build::agent_tests()?);
    }
    if arguments.tests.is_some() && named != PROGRAMS {
        bail!("--tests are those of {PROGRAMS}: --scenario {PROGRAMS}");
    }
    if named == UNITS {
        built.systemd = Some(image::files_of(&["systemd"])?);
    }
    let runs_alone = [PROGRAMS, UNITS].into_iter().find(|alone| {
        let mut others = named.split(',').filter(|name| name != alone);
        named.split(',').any(|name| name == *alone) && others.next().is_some()
    });
    if let Some(name) = runs_alone {
        bail!("{name} runs alone: --scenario {name}");
    }
    let mut outcome = Outcome::default();
    if arguments.kernel_matrix.is_empty() {
        let booted = built.boots(arguments)?;
        let all = if arguments.keep { NONE } else { ALL };
        let wanted = arguments.scenario.as_deref().unwrap_or(all);
        outcome.add(booted.run(arguments, wanted, &known)?);
    }
    for version in &arguments.kernel_matrix {
        report::note(format!("Linux {version}"));
        let of_version = Arguments {
            kernel_version: version.clone(),
            ..arguments.clone()
        };
        let booted = built.boots(&of_version)?;
        let sets: &[&str] = match &arguments.scenario {
            Some(one) => &[one],
            None => &[PROGRAMS, EVERY_KERNEL, ALL],
        };
        for wanted in sets {
            outcome.add(booted.run(&of_version, wanted, &known)?);
        }
    }
    outcome.report();
    print!("{}{}", report::steps(), report::failures());
    println!(
        "{} passed, {} failed, {} skipped",
        outcome.passed,
        outcome.failed.len(),
        outcome.skipped.len()
    );
    if !outcome.failed.is_empty() {
        bail!("the consoles are in {}", directory().display());
    }
    Ok(())
}

/// What `cargo xtask test` runs: one machine, then several.
pub fn of_test() -> Result<Outcome> {
    let arguments = Arguments::of_test();
    let _alone = alone::take()?;
    let built = Built::new()?;
    let booted = built.boots(&arguments)?;
    let mut outcome = booted.one(&arguments, EVERY_KERNEL)?;
    outcome.add(booted.several(&arguments, SHORT, None)?);
    Ok(outcome)
}

/// A cluster of three machines, for people without root: `job` runs, and the cluster stays until Ctrl-C.
pub fn up(job: impl Fn(&Cluster) -> Result<()>) -> Result<()> {
    let step = report::step("setting up this machine");
    setup::ensure(setup::For::Vm)?;
    drop(step);
    let _alone = alone::take()?;
    let step = report::step("building");
    let built = Built::new()?;
    drop(step);
    let arguments = Arguments {
        keep: true,
        repeats: false,
        ..Arguments::of_test()
    };
    let cluster = Cluster {
        bin: built.bin.clone(),
        kubeconfig: kubeconfig(),
    };
    let then = || {
        job(&cluster)?;
        up::try_next("target/vm/env");
        Ok(())
    };
    let booted = built.boots(&arguments)?;
    let outcome = booted.several(&arguments, NONE, Some(&then))?;
    if !outcome.failed.is_empty() {
        bail!("the consoles are in {}", directory().display());
    }
    Ok(())
}

/// Measures on three machines, and returns the document.
pub fn bench() -> Result<serde_json::Value> {
    let _alone = alone::take()?;
    let arguments = Arguments {
        repeats: false,
        ..Arguments::of_test()
    };
    let booted = Built::new()?.boots(&arguments)?;
    let outcome = booted.several(&arguments, BENCH, None)?;
    match outcome.figures {
        Some(figures) if outcome.failed.is_empty() => Ok(serde_json::from_str(&figures)?),
        _ => bail!("no figures; the consoles are in {}", directory().display()),
    }
}

/// The administrator's credentials of a cluster that is kept.
fn kubeconfig() -> PathBuf {
    directory().join("admin.kubeconfig")
}

fn directory() -> PathBuf {
    run::target().join("vm")
}

/// The binaries and images.
struct Built {
    bin: PathBuf,
    init: PathBuf,
    images: [PathBuf; 2],
    /// The agent's own tests, for [`PROGRAMS`].
    tests: Option<PathBuf>,
    /// Files of packages, for [`UNITS`].
    systemd: Option<PathBuf>,
}

/// A kernel and an initramfs.
struct Booted {
    /// Which kernel that is, for people.
    name: String,
    kernel: PathBuf,
    initrd: PathBuf,
    accelerator: &'static str,
}

impl Built {
    fn new() -> Result<Self> {
        Ok(Self {
            bin: build::binaries(build::Profile::Dev, "test")?,
            init: run::target().join("debug/gantry-vm-init"),
            images: [
                image::archive(&image::NGINX)?,
                image::archive(&image::BUSYBOX)?,
            ],
            tests: None,
            systemd: None,
        })
    }

    /// `one` or `several`, and the name, as the guest's init has them.
    fn scenarios(&self) -> Result<Vec<(String, String)>> {
        let mut list = std::process::Command::new(&self.init);
        let said = run::captured(list.arg("list"))?;
        let pair = |line: &str| {
            let (kind, name) = line.split_once(' ')?;
            Some((kind.to_owned(), name.to_owned()))
        };
        Ok(said.lines().filter_map(pair).collect())
    }

    fn boots(&self, arguments: &Arguments) -> Result<Booted> {
        let _step = report::step("virtual machine: kernel and initramfs");
        std::fs::create_dir_all(directory())?;
        let (kernel, modules) = match &arguments.kernel {
            Some(image) => (image.clone(), Vec::new()),
            None => kernel::debian(&directory(), &arguments.kernel_version)?,
        };
        let initrd = directory().join("initrd");
        let contents = initramfs::Contents {
            init: &self.init,
            bin: &self.bin,
            images: &self.images,
            modules: &modules,
            tests: self.tests.as_deref(),
            systemd: self.systemd.as_deref(),
        };
        initramfs::write(&initrd, &contents)?;
        let accelerator = if guest::kvm_works(&kernel)? {
            "kvm"
        } else {
            "tcg"
        };
        let name = match &arguments.kernel {
            Some(image) => image.display().to_string(),
            None => format!("Linux {}", arguments.kernel_version),
        };
        Ok(Booted {
            name,
            kernel,
            initrd,
            accelerator,
        })
    }
}

impl Booted {
    /// By name: on one machine or on several, as the scenario needs.
    fn run(
        &self,
        arguments: &Arguments,
        wanted: &str,
        known: &[(String, String)],
    ) -> Result<Outcome> {
        let kind_of = |wanted: &str| {
            let found = known.iter().find(|(_, name)| name == wanted);
            found.map(|(kind, _)| kind.as_str())
        };
        let mut kinds = wanted.split(',').map(kind_of);
        // Of several names the first decides, if all are of its kind.
        let kind = kinds.next().flatten();
        let kind = kind.filter(|kind| kinds.all(|other| other == Some(kind)));
        match (kind, wanted) {
            (Some("one"), _) | (_, EVERY_KERNEL) => self.one(arguments, wanted),
            (_, ALL) if arguments.nodes == 1 => self.one(arguments, wanted),
            (Some(_), _) | (_, ALL | SHORT | NONE) if arguments.nodes > 1 => {
                self.several(arguments, wanted, None)
            }
            (Some(_), _) | (_, SHORT | NONE) => bail!("{wanted} needs several machines: --nodes 3"),
            (None, _) => bail!(
                "{wanted}: no such scenario, or one of one machine and one of several (see --list)"
            ),
        }
    }

    fn several(
        &self,
        arguments: &Arguments,
        scenarios: &str,
        then: Option<nodes::Then>,
    ) -> Result<Outcome> {
        let count = usize::from(arguments.nodes);
        let accelerator = self.accelerator;
        let name = &self.name;
        let _step = report::step(&format!(
            "{scenarios}, {count} virtual machines ({name}, {accelerator})"
        ));
        let mut outcome = Outcome::default();
        for number in 1.. {
            let told = outcome.told();
            let plan = nodes::Plan {
                accelerator,
                kernel: &self.kernel,
                initrd: &self.initrd,
                count,
                routed: usize::from(arguments.routed),
                scenarios,
                told: &told,
                boot: number,
                keep: arguments.keep,
                then,
                console: arguments.console,
            };
            let still_s = nodes::run(&plan, &mut outcome)?;
            if !self.boots_again(number, still_s, arguments, &mut outcome) {
                break;
            }
        }
        Ok(outcome)
    }

    /// Whether machines are booted again after their boot of that number; says why.
    fn boots_again(
        &self,
        number: usize,
        still_s: Option<u64>,
        arguments: &Arguments,
        outcome: &mut Outcome,
    ) -> bool {
        let is_emulated = self.accelerator == "tcg";
        let boot = Boot {
            number,
            is_still: is_emulated && still_s.is_some(),
            repeats: is_emulated && arguments.repeats,
        };
        let another = outcome.another(boot);
        if another {
            let why = match still_s {
                Some(seconds) => format!("a machine stands still for {seconds} s"),
                None => "something failed for the first time".to_owned(),
            };
            report::note(format!("emulated: {why}: booting again for what is left"));
        }
        another
    }

    fn one(&self, arguments: &Arguments, scenario: &str) -> Result<Outcome> {
        if arguments.keep {
            bail!("--keep is for several machines: --nodes 2 or more, and one of their scenarios");
        }
        let parallel = std::thread::available_parallelism().map_or(1, usize::from);
        let names = scenario.split(',').count();
        let shards = match scenario {
            ALL | EVERY_KERNEL => parallel.min(SHARDS),
            _ => parallel.min(SHARDS).min(names),
        };
        let accelerator = self.accelerator;
        let each = match shards {
            1 => "",
            _ => ", every scenario in one of them",
        };
        let name = &self.name;
        let words = format!("{scenario}, {shards} virtual machines ({name}, {accelerator}){each}");
        let _step = report::step(&words);
        let outcomes: Vec<Result<Outcome>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..shards)
                .map(|shard| {
                    let mut words =
                        format!("gantry.scenario={scenario} gantry.shard={shard}/{shards}");
                    if let Some(tests) = &arguments.tests {
                        words += &format!(" gantry.tests={tests}");
                    }
                    scope.spawn(move || self.shard(arguments, &words, shard))
                })
                .collect();
            let ended = threads.into_iter().map(|thread| thread.join());
            ended
                .map(|ended| ended.unwrap_or_else(|_| bail!("a console's thread panicked")))
                .collect()
        });
        let mut outcome = Outcome::default();
        for one in outcomes {
            outcome.add(one?);
        }
        Ok(outcome)
    }
}

impl Booted {
    /// One machine of several, from its boot to its end.
    fn shard(&self, arguments: &Arguments, words: &str, shard: usize) -> Result<Outcome> {
        let path = directory().join(format!("console-{shard}.log"));
        let mut file = File::create(&path).with_context(|| path.display().to_string())?;
        let mut outcome = Outcome::default();
        let console = arguments.console.then_some(shard);
        for number in 1.. {
            let told = outcome.told();
            let words = match told.is_empty() {
                true => words.to_owned(),
                false => format!("{words} gantry.told={told}"),
            };
            let mut qemu = guest::qemu(self.accelerator, &self.kernel, &words);
            qemu.arg("-initrd").arg(&self.initrd).args(["-m", "3072"]);
            let mut guest = guest::Guest::start(qemu)?;
            let still_s = follow(&mut guest, &mut file, console, &mut outcome)?;
            guest.end();
            if !self.boots_again(number, still_s, arguments, &mut outcome) {
                break;
            }
        }
        Ok(outcome)
    }
}

/// Follows a machine to its end. How long its processors have stood still, if it has none for that.
fn follow(
    guest: &mut guest::Guest,
    file: &mut File,
    console: Option<usize>,
    outcome: &mut Outcome,
) -> Result<Option<u64>> {
    let began = Instant::now();
    let mut last = VecDeque::new();
    let mut still_s = None;
    while let Some(line) = guest.line(LIMIT.saturating_sub(began.elapsed())) {
        writeln!(file, "{line}").context("write the console's lines")?;
        if let Some(shard) = console {
            println!("  {shard} | {line}");
        }
        outcome.verdict(&line);
        still_s = guest::stands_still(&line);
        last.push_back(line);
        if last.len() > LAST_WORDS {
            last.pop_front();
        }
        if still_s.is_some() {
            break;
        }
    }
    if !outcome.ended {
        println!(
            "    no end after {} s; the machine's last words:\n{}",
            began.elapsed().as_secs(),
            Vec::from(last).join("\n")
        );
    }
    Ok(still_s)
}
