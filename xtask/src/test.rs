//! `cargo xtask test`: every check and every test, from a fresh clone on a fresh machine.
//!
//! Order: cheap before dear; clippy and the simulation, which wait for nothing, run beside the tests, which
//! wait half of their time, on what they leave of the processors. A test that cannot run here prints
//! `skipped: <reason>`; those lines are shown and counted. What failed is said again at the end, and what an
//! emulated machine passed only when asked again. The last line is `N passed, N failed, N skipped`.

use std::io::{BufRead, BufReader};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::{build, census, down, ebpf, image, report, run, setup, tidy, vm};

/// What `test` takes.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only tests whose name contains this
    pub filter: Option<String>,
    /// Without the checks (fmt, tidy, clippy, deny)
    #[arg(long)]
    pub no_checks: bool,
    /// Kill the agent, the shim and gantry-rt at `all` their system calls (an hour), at those of `rt`,
    /// `shim`, `agent-creates` or `agent-deletes`, at some that a number draws, or at those named as
    /// `shim:openat:3,...` [default: 1]
    #[arg(long, value_name = "all|PROGRAM|SEED|POINTS")]
    pub sweep: Option<String>,
    /// Without the virtual machine
    #[arg(long)]
    pub no_vm: bool,
}

/// What has been counted so far.
#[derive(Default)]
struct Count {
    passed: usize,
    failed: usize,
    skipped: Vec<String>,
    in_successes: bool,
}

/// Runs everything; fails when anything failed.
pub fn run(arguments: &Arguments) -> Result<()> {
    let step = report::step("setting up this machine");
    setup::ensure(setup::For::Test)?;
    drop(step);
    let mut count = Count::default();
    if !arguments.no_checks {
        checks(&mut count);
    }
    let step = report::step("building");
    let bin = build::binaries(build::Profile::Dev, "test")?;
    drop(step);
    let _ = (
        image::archive(&image::NGINX)?,
        image::archive(&image::BUSYBOX)?,
    );
    unit_and_integration(arguments, &bin, &mut count)?;
    if !arguments.no_vm && arguments.filter.is_none() {
        report::note(
            "scenarios that depend on the kernel, then several machines (cargo xtask vm-test)",
        );
        let outcome = vm::of_test()?;
        count.passed += outcome.passed;
        count.failed += outcome.failed.len();
        outcome.report();
        count.skipped.extend(outcome.skipped);
    }
    let census = census::take();
    if !census::is_zero(&census) {
        down::print(&census);
        report::failed("census: the tests left something behind");
        count.failed += 1;
    }
    for reason in &count.skipped {
        println!("skipped: {reason}");
    }
    print!("{}{}", report::steps(), report::failures());
    println!(
        "{} passed, {} failed, {} skipped",
        count.passed,
        count.failed,
        count.skipped.len()
    );
    if count.failed > 0 {
        bail!(
            "{} failed: what, stands above; the first FAILED of each has all its words",
            count.failed
        );
    }
    Ok(())
}

/// Each check counts as one test; the last one, [`clippy`], comes with the tests.
fn checks(count: &mut Count) {
    let mut check = |name: &str, done: Result<()>| match done {
        Ok(()) => count.passed += 1,
        Err(error) => {
            report::failed(format!("{name}: {error:#}"));
            count.failed += 1;
        }
    };
    let cargo = |arguments: &[&str]| {
        let _step = report::step(&format!("cargo {}", arguments.join(" ")));
        run::shown(run::cargo().args(arguments))
    };
    check("fmt", cargo(&["fmt", "--all", "--", "--check"]));
    // The programs are a package of their own: another target, another toolchain.
    let programs = ["--manifest-path", "ebpf/programs/Cargo.toml"];
    let words = [&["fmt"], &programs[..], &["--", "--check"]].concat();
    check("fmt of the programs", cargo(&words));
    check("tidy", tidy::run());
    check(
        "deny",
        cargo(&[
            "deny",
            "--workspace",
            "check",
            "licenses",
            "bans",
            "sources",
        ]),
    );
    let ebpf = ebpf::build(&run::root(), ebpf::Variant::Release).map(drop);
    check("ebpf", ebpf.map_err(anyhow::Error::from));
}

/// What runs beside the tests, which wait for half of their time: at the scheduler's lowest class, so that no
/// test waits for a processor because of it.
struct Beside {
    /// None: not asked for.
    clippy: Option<Result<Output>>,
    /// None: it has run with the tests, as their filter says.
    simulation: Option<Result<Output>>,
}

impl Beside {
    fn run(arguments: &Arguments) -> Self {
        let clippy = "clippy --quiet --workspace --all-targets -- -D warnings";
        Self {
            clippy: (!arguments.no_checks).then(|| idle(clippy)),
            simulation: is_simulated_beside(arguments).then(|| idle(SIMULATION)),
        }
    }
}

/// The program of tests that has nothing to do with time: its clock is its own.
const SIMULATION: &str = "test --quiet --workspace --test simulation";
/// Tells it so, where it is among the others.
const SIMULATED_BESIDE: &str = "GANTRY_SIM_BESIDE";

fn is_simulated_beside(arguments: &Arguments) -> bool {
    arguments.filter.is_none()
}

/// Runs cargo at that class, to its end.
fn idle(words: &str) -> Result<Output> {
    let mut idle = run::program("chrt", ["--idle", "0"]);
    idle.arg(run::cargo().get_program()).args(words.split(' '));
    let output = idle.stdin(Stdio::null()).output();
    output.context("chrt (package util-linux)")
}

fn unit_and_integration(
    arguments: &Arguments,
    bin: &std::path::Path,
    count: &mut Count,
) -> Result<()> {
    let step = report::step("cargo test --workspace");
    let mut cargo = run::cargo();
    // One binary after another must not hide the later ones' failures.
    cargo.args(["test", "--workspace", "--no-fail-fast"]);
    cargo.args(arguments.filter.as_ref());
    cargo
        .args(["--", "--show-output"])
        .env("GANTRY_BIN", bin)
        .env("GANTRY_IMAGES", run::target().join("images"))
        .env("RUST_BACKTRACE", "1")
        .envs(
            arguments
                .sweep
                .iter()
                .map(|choice| ("GANTRY_SWEEP", choice)),
        );
    if is_simulated_beside(arguments) {
        cargo.env(SIMULATED_BESIDE, "1");
    }
    cargo.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = cargo.spawn().context("cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no output")?;
    let stderr = child.stderr.take().context("cargo test has no errors")?;
    let programs =
        std::thread::spawn(move || programs(BufReader::new(stderr), |l| eprintln!("{l}")));
    std::thread::scope(|scope| {
        let mut beside = None;
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            // The first test runs: everything is built, and cargo has let go of the build directory.
            if line.starts_with("running ") && beside.is_none() {
                beside = Some(scope.spawn(|| Beside::run(arguments)));
            }
            take_line(&line, count);
        }
        let status = child.wait()?;
        if !status.success() && count.failed == 0 {
            report::failed(format!("cargo test: {status}"));
            count.failed += 1;
        }
        drop(step);
        let programs = programs
            .join()
            .map_err(|_| anyhow!("the reader of cargo's errors panicked"))?;
        for (name, took) in programs {
            report::ended(&format!("  of that {name}"), took);
        }
        let _step = report::step("clippy and the simulation (beside the tests until now)");
        let beside = match beside {
            Some(beside) => beside.join().map_err(|_| anyhow!("its thread panicked"))?,
            // Nothing could be built.
            None => Beside::run(arguments),
        };
        take_beside(beside, count);
        Ok(())
    })
}

fn take_beside(beside: Beside, count: &mut Count) {
    if let Some(clippy) = beside.clippy {
        let before = count.failed;
        take_end("clippy", clippy, before, count);
        count.passed += usize::from(count.failed == before);
    }
    if let Some(simulation) = beside.simulation {
        let before = count.failed;
        let printed = simulation.as_ref().map(|output| output.stdout.clone());
        let printed = printed.unwrap_or_default();
        for line in String::from_utf8_lossy(&printed).lines() {
            take_line(line, count);
        }
        take_end("simulation", simulation, before, count);
    }
}

/// A program that has failed without a failure that was counted since `before` is one.
fn take_end(name: &str, ended: Result<Output>, before: usize, count: &mut Count) {
    let words = match ended {
        Ok(output) if output.status.success() || count.failed > before => return,
        Ok(output) => format!(
            "{}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => format!("{error:#}"),
    };
    report::failed(format!("{name}: {words}"));
    count.failed += 1;
}

/// Passes on what cargo says of its work, and returns the programs of tests that it runs and how long
/// each took: until the next one is named.
fn programs(said: impl BufRead, mut pass_on: impl FnMut(&str)) -> Vec<(String, Duration)> {
    let mut programs = Vec::new();
    let mut running: Option<(String, Instant)> = None;
    for line in said.split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        pass_on(&line);
        if let Some(next) = program(&line) {
            let ended = running.replace((next, Instant::now()));
            programs.extend(ended.map(|(name, began)| (name, began.elapsed())));
        }
    }
    programs.extend(running.map(|(name, began)| (name, began.elapsed())));
    programs
}

/// The program of `Running unittests src/lib.rs (target/debug/deps/NAME-HASH)` or `Doc-tests NAME`.
fn program(line: &str) -> Option<String> {
    if let Some(name) = line.strip_prefix("   Doc-tests ") {
        return Some(format!("{name}, its documentation"));
    }
    let (source, path) = line.strip_prefix("     Running ")?.split_once(" (")?;
    let name = path.trim_end_matches(')').rsplit('/').next()?;
    let (name, _) = name.rsplit_once('-')?;
    let source = source.trim_start_matches("unittests ");
    Some(format!("{name}, {source}"))
}

/// Counts and echoes what a person wants to see of libtest's output.
fn take_line(line: &str, count: &mut Count) {
    // What tests that passed have printed is searched for skips only.
    match line {
        "successes:" => count.in_successes = true,
        "failures:" => count.in_successes = false,
        _ if line.starts_with("test result: ") => count.in_successes = false,
        _ => {}
    }
    if let Some((_, reason)) = line.split_once("skipped: ")
        && !line.starts_with("test ")
    {
        count.skipped.push(reason.to_owned());
        return;
    }
    if let Some((name, reason)) = line.split_once(" ... ignored") {
        let name = name.trim_start_matches("test ");
        count.skipped.push(format!("{name}{reason}"));
        return;
    }
    if let Some(name) = line.strip_suffix(" ... FAILED") {
        report::remember_failed(name.trim_start_matches("test "));
    }
    if let Some(result) = line.strip_prefix("test result: ") {
        let number = |word: &str| {
            let part = result.split(['.', ';']).find(|p| p.trim().ends_with(word));
            part.and_then(|p| p.trim().split(' ').next()?.parse::<usize>().ok())
                .unwrap_or(0)
        };
        count.passed += number("passed");
        count.failed += number("failed");
        return;
    }
    let dull = count.in_successes
        || line.is_empty()
        || line.ends_with("... ok")
        || line.starts_with("running ");
    if !dull {
        println!("{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_and_skips_are_counted() {
        let mut count = Count::default();
        for line in [
            "running 3 tests",
            "test a ... ok",
            "skipped: no /dev/kvm",
            "test b ... ignored, a measurement",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 4 filtered out; finished in 1.25s",
        ] {
            take_line(line, &mut count);
        }
        assert_eq!((count.passed, count.failed), (2, 1));
        assert_eq!(count.skipped, ["no /dev/kvm", "b, a measurement"]);
    }

    #[test]
    fn a_program_that_dies_after_a_good_result_has_failed() {
        use std::os::unix::process::ExitStatusExt as _;
        let ended = |wait_status: i32, printed: &str| Beside {
            clippy: None,
            simulation: Some(Ok(Output {
                status: std::process::ExitStatus::from_raw(wait_status),
                stdout: printed.into(),
                stderr: Vec::new(),
            })),
        };
        let counted = |beside| {
            let mut count = Count::default();
            take_beside(beside, &mut count);
            (count.passed, count.failed)
        };
        let good = "test result: ok. 7 passed; 0 failed; finished in 1s";
        assert_eq!(counted(ended(0, good)), (7, 0));
        assert_eq!(counted(ended(101 << 8, good)), (7, 1));
        let bad = "test result: FAILED. 6 passed; 1 failed; finished in 1s";
        assert_eq!(counted(ended(101 << 8, bad)), (6, 1));
        assert_eq!(counted(ended(9, "")), (0, 1));
    }

    #[test]
    fn programs_are_named_in_the_order_in_which_they_run() {
        let said = "    Finished `test` profile [unoptimized] target(s) in 0.3s
     Running unittests src/lib.rs (target/debug/deps/gantry_agent-0123456789abcdef)
thread 'a' panicked: \u{fffd}
     Running tests/integration.rs (target/debug/deps/integration-00ff)
   Doc-tests gantry_api\n";
        let mut passed_on = 0;
        let programs = programs(said.as_bytes(), |_| passed_on += 1);
        let names: Vec<String> = programs.into_iter().map(|(name, _)| name).collect();
        assert_eq!(passed_on, 5);
        assert_eq!(
            names,
            [
                "gantry_agent, src/lib.rs",
                "integration, tests/integration.rs",
                "gantry_api, its documentation",
            ]
        );
    }
}
