//! `cargo xtask test`: every check and every test, from a fresh clone on a fresh machine.
//!
//! Order: cheap before dear; clippy, which waits for nothing, runs beside the tests, which wait half of
//! their time, on what they leave of the processors. A test that cannot run here prints
//! `skipped: <reason>`; those lines are shown and counted. The last line is `N passed, N failed,
//! N skipped`.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

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
        count.failed += outcome.failed;
        count.skipped.extend(outcome.skipped);
    }
    let census = census::take();
    if !census::is_zero(&census) {
        down::print(&census);
        println!("FAILED census: the tests left something behind");
        count.failed += 1;
    }
    for reason in &count.skipped {
        println!("skipped: {reason}");
    }
    println!(
        "{} passed, {} failed, {} skipped",
        count.passed,
        count.failed,
        count.skipped.len()
    );
    if count.failed > 0 {
        bail!("{} failed (see FAILED above)", count.failed);
    }
    Ok(())
}

/// Each check counts as one test; the last one, [`clippy`], comes with the tests.
fn checks(count: &mut Count) {
    let mut check = |name: &str, done: Result<()>| match done {
        Ok(()) => count.passed += 1,
        Err(error) => {
            println!("FAILED {name}: {error:#}");
            count.failed += 1;
        }
    };
    let cargo = |arguments: &[&str]| {
        let _step = report::step(&format!("cargo {}", arguments.join(" ")));
        run::shown(run::cargo().args(arguments))
    };
    check("fmt", cargo(&["fmt", "--all", "--", "--check"]));
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

/// Clippy, at the scheduler's lowest class: no test waits for a processor because of it.
fn clippy() -> Result<()> {
    let cargo = run::cargo();
    let mut idle = run::program("chrt", ["--idle", "0"]);
    idle.arg(cargo.get_program());
    idle.args(["clippy", "--quiet", "--workspace", "--all-targets"]);
    let output = idle
        .args(["--", "-D", "warnings"])
        .stdin(Stdio::null())
        .output()
        .context("chrt (package util-linux)")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
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
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no output")?;
    let mut beside = None;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        // The first test runs: everything is built, and cargo has let go of the build directory.
        if line.starts_with("running ") && beside.is_none() && !arguments.no_checks {
            beside = Some(std::thread::spawn(clippy));
        }
        take_line(&line, count);
    }
    let status = child.wait()?;
    if !status.success() && count.failed == 0 {
        println!("FAILED cargo test: {status}");
        count.failed += 1;
    }
    drop(step);
    if arguments.no_checks {
        return Ok(());
    }
    let _step = report::step("cargo clippy (beside the tests until now)");
    let linted = match beside {
        Some(beside) => beside.join().map_err(|_| anyhow!("its thread panicked"))?,
        // Nothing could be built.
        None => clippy(),
    };
    match linted {
        Ok(()) => count.passed += 1,
        Err(error) => {
            println!("FAILED clippy: {error:#}");
            count.failed += 1;
        }
    }
    Ok(())
}

/// Counts and echoes what a person wants to see of libtest's output.
fn take_line(line: &str, count: &mut Count) {
    // What tests that passed have printed is searched for skips only.
    match line {
        "successes:" => count.in_successes = true,
        "failures:" => count.in_successes = false,
        _ if line.starts_with("test result: ") || line.starts_with("     Running") => {
            count.in_successes = false;
        }
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
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 4 filtered out",
        ] {
            take_line(line, &mut count);
        }
        assert_eq!((count.passed, count.failed), (2, 1));
        assert_eq!(count.skipped, ["no /dev/kvm", "b, a measurement"]);
    }
}
