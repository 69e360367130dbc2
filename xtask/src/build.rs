//! Builds the binaries and gathers them in one directory, as an installation would have them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{ebpf, run};

/// What is installed side by side; the agent finds its shim and runtime helper beside itself.
pub const BINARIES: [&str; 5] = [
    "gantry-control",
    "gantry-agent",
    RUNTIME_HELPER,
    "gantry-bridge",
    "gantry",
];

/// One per pod.
const SHIM: &str = "gantry-shim";
/// One for each container that is made and each exec.
const RUNTIME_HELPER: &str = "gantry-rt";

/// Which profile the dynamic binaries are built in; the small static ones have their own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// For use.
    Release,
    /// For measurements: what is used, and what measures it.
    Bench,
    /// For tests: the same artefacts that `cargo test` links.
    Dev,
}

/// Builds everything and returns the directory that holds it: `target/<name>/bin`.
pub fn binaries(profile: Profile, name: &str) -> Result<PathBuf> {
    let variant = match profile {
        Profile::Release | Profile::Bench => ebpf::Variant::Release,
        Profile::Dev => ebpf::Variant::Logging,
    };
    ebpf::build(&run::root(), variant)?;
    let mut cargo = run::cargo();
    cargo.args(["build", "--workspace"]);
    let built = match profile {
        Profile::Release | Profile::Bench => {
            // Not this program, nor the tests' own: optimised, they cost a newcomer minutes.
            let measures = (profile == Profile::Bench).then_some("gantry-bench");
            let wanted = BINARIES.into_iter().filter(|b| *b != RUNTIME_HELPER);
            let wanted = wanted.chain(measures);
            cargo.arg("--release");
            cargo.args(wanted.flat_map(|binary| ["--bin", binary]));
            run::target().join("release")
        }
        Profile::Dev => {
            cargo.arg("--bins");
            run::target().join("debug")
        }
    };
    run::shown(&mut cargo)?;
    let bin = run::target().join(name).join("bin");
    std::fs::create_dir_all(&bin).with_context(|| format!("create {}", bin.display()))?;
    // A runtime helper built for tests has its debug assertions and its own, quicker, build.
    let small: &[&str] = match profile {
        Profile::Dev => &[SHIM],
        Profile::Release | Profile::Bench => &[SHIM, RUNTIME_HELPER],
    };
    let small_built = static_binaries(small)?;
    for binary in BINARIES.into_iter().filter(|b| !small.contains(b)) {
        install(&built.join(binary), &bin.join(binary))?;
    }
    for binary in small {
        install(&small_built.join(binary), &bin.join(binary))?;
    }
    Ok(bin)
}

/// Builds what measures Services, which has the agent's data plane in it, and returns its directory.
pub fn measurer() -> Result<PathBuf> {
    ebpf::build(&run::root(), ebpf::Variant::Release)?;
    let mut cargo = run::cargo();
    cargo.args(["build", "--release", "--package", "gantry-tests"]);
    run::shown(cargo.args(["--bin", "gantry-bench"]))?;
    Ok(run::target().join("release"))
}

/// Builds the control plane and what measures it, which has the agent's feed in it, and returns their
/// directory.
pub fn control_plane() -> Result<PathBuf> {
    let bin = measurer()?;
    let mut cargo = run::cargo();
    cargo.args(["build", "--release", "--package", "gantry-control"]);
    run::shown(&mut cargo)?;
    Ok(bin)
}

/// Builds the agent's own tests and returns the program.
pub fn agent_tests() -> Result<PathBuf> {
    ebpf::build(&run::root(), ebpf::Variant::Logging)?;
    let mut cargo = run::cargo();
    // The features that `cargo test --workspace` has, so that nothing is built twice.
    cargo.args([
        "test",
        "--workspace",
        "--no-run",
        "--message-format=json-render-diagnostics",
    ]);
    let output = cargo.stderr(std::process::Stdio::inherit()).output()?;
    anyhow::ensure!(
        output.status.success(),
        "cargo test --no-run: {}",
        output.status
    );
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let of_agent = |message: serde_json::Value| {
        let target = &message["target"];
        let is_lib = target["kind"].as_array()?.iter().any(|kind| kind == "lib");
        let is_it =
            target["name"] == "gantry_agent" && is_lib && message["profile"]["test"] == true;
        is_it.then(|| message["executable"].as_str().map(PathBuf::from))?
    };
    messages
        .filter_map(of_agent)
        .next()
        .context("cargo names no tests of gantry-agent")
}

/// Builds what starts with every pod, small and static, and returns the directory that holds it.
///
/// The shim's pages are shared between all pods. The runtime helper is executed for every container
/// and exec: without a loader its start takes 0.9 ms instead of 1.4 (median of 200, `--version`). At a
/// fixed address nothing is relocated at the start, which would make pages of each process its own.
fn static_binaries(packages: &[&str]) -> Result<PathBuf> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut cargo = run::cargo();
    cargo.args(["build", "--profile", "shim"]);
    cargo.args(packages.iter().flat_map(|package| ["--package", package]));
    cargo.args(["--target", &target]).env(
        "RUSTFLAGS",
        "-Ctarget-feature=+crt-static -Crelocation-model=static",
    );
    run::shown(&mut cargo)?;
    Ok(run::target().join(target).join("shim"))
}

/// Replaces a file by name: a running binary keeps its old inode.
fn install(from: &Path, to: &Path) -> Result<()> {
    let same = |a: &Path, b: &Path| -> std::io::Result<bool> {
        let (a, b) = (std::fs::metadata(a)?, std::fs::metadata(b)?);
        Ok(a.len() == b.len() && a.modified()? <= b.modified()?)
    };
    if same(from, to).unwrap_or(false) {
        return Ok(());
    }
    let new = to.with_extension("new");
    let copy = || -> std::io::Result<()> {
        std::fs::copy(from, &new)?;
        std::fs::rename(&new, to)
    };
    copy().with_context(|| format!("copy {} to {}", from.display(), to.display()))
}
