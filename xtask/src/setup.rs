//! Installs what is missing on a fresh Debian or Ubuntu machine, one line per thing; elsewhere, or
//! without root, prints the exact commands and fails. A second run installs nothing.
//!
//! The eBPF toolchain is detected, not configured. The programs need a Rust compiler *with the
//! standard library's sources* and `bpf-linker`, whose LLVM is not older than the compiler's:
//! 1. rustup's nightly of [`ebpf::NIGHTLIES`] with `rust-src`, where rustup can download;
//! 2. Debian's `rustc-web cargo-web rust-web-src`, where it cannot.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{ebpf, run};

/// Pinned: the object's bytes follow from it.
const BPF_LINKER: &str = "0.13";
/// LLVM releases that bpf-linker 0.13 takes and that are not older than the compilers' LLVM 22.
const LLVM: [u32; 2] = [22, 23];
/// Licences and bans of the dependency tree.
const CARGO_DENY: &str = "0.20";

/// What the machine is set up for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum For {
    /// The main job.
    Up,
    /// A virtual machine for the scenarios.
    Vm,
    /// The main job, and what the tests use.
    Test,
    /// The main job, and what it is measured with.
    Bench,
    /// The control plane, and what it is measured with.
    Control,
}

/// One thing that may be missing.
struct Need {
    what: &'static str,
    why: &'static str,
    found: bool,
    packages: &'static [&'static str],
}

fn file(path: &str) -> bool {
    Path::new(path).exists()
}

fn needs(purpose: For) -> Vec<Need> {
    let need = |what, why, found, packages| Need {
        what,
        why,
        found,
        packages,
    };
    let mut needs = vec![need(
        "cc",
        "links Rust programs",
        run::which("cc").is_some(),
        &["gcc", "libc6-dev"][..],
    )];
    if purpose != For::Control {
        let mmdebstrap = run::which("mmdebstrap").is_some();
        needs.push(need(
            "mmdebstrap",
            "makes images",
            mmdebstrap,
            &["mmdebstrap"],
        ));
    }
    if purpose == For::Test || purpose == For::Vm {
        let qemu = run::which("qemu-system-x86_64").is_some();
        let busybox = file("/bin/busybox");
        needs.extend([
            need(
                "qemu",
                "cargo xtask vm-test",
                qemu,
                &["qemu-system-x86"][..],
            ),
            need("busybox", "test containers", busybox, &["busybox-static"]),
            need(
                "mkfs.ext4",
                "disks of virtual machines",
                run::which("mkfs.ext4").is_some(),
                &["e2fsprogs"],
            ),
        ]);
    }
    if purpose != For::Up {
        let strace = run::which("strace").is_some();
        let why = "counts system calls, makes them fail, kills at them";
        needs.push(need("strace", why, strace, &["strace"]));
    }
    if purpose == For::Test || purpose == For::Bench {
        let ip = run::which("ip").is_some();
        let iptables = run::which("iptables-nft-restore").is_some();
        let nft = run::which("nft").is_some();
        let why =
            "kube-proxy's rules, in namespaces of their own, beside which Services are measured";
        needs.extend([
            need("ip", "test networks", ip, &["iproute2"][..]),
            need("iptables", why, iptables, &["iptables"]),
            need("nft", why, nft, &["nftables"]),
            need(
                "runc",
                "what a pod's start is compared with",
                run::which("runc").is_some(),
                &["runc"],
            ),
        ]);
    }
    if purpose == For::Test {
        let registry = run::which("docker-registry").is_some();
        let plugins = file("/usr/lib/cni/bridge") || file("/opt/cni/bin/bridge");
        needs.extend([
            need(
                "docker-registry",
                "image pull tests",
                registry,
                &["docker-registry"][..],
            ),
            need(
                "etcd",
                "the store's tests start three of it",
                run::which("etcd").is_some(),
                &["etcd-server"],
            ),
            need(
                "CNI plugins",
                "third-party CNI tests",
                plugins,
                &["containernetworking-plugins"],
            ),
        ]);
    }
    if purpose == For::Bench {
        needs.extend([need(
            "crun",
            "compared as well, where it takes this machine's cgroups",
            run::which("crun").is_some(),
            &["crun"][..],
        )]);
    }
    needs
}

/// Makes sure of everything, or says what to do.
pub fn ensure(purpose: For) -> Result<()> {
    let missing: Vec<Need> = needs(purpose).into_iter().filter(|n| !n.found).collect();
    let packages: Vec<&str> = missing.iter().flat_map(|n| n.packages).copied().collect();
    for need in &missing {
        println!(
            "setup: {} is missing ({}): {}",
            need.what,
            need.why,
            need.packages.join(" ")
        );
    }
    let mut commands = Vec::new();
    if !packages.is_empty() && !install(&packages)? {
        commands.push(format!(
            "apt-get install --no-install-recommends {}",
            packages.join(" ")
        ));
    }
    ensure_bpf_compiler(&mut commands)?;
    ensure_bpf_linker(&mut commands)?;
    if purpose == For::Test {
        ensure_cargo_deny()?;
    }
    if commands.is_empty() {
        return Ok(());
    }
    bail!(
        "this machine lacks what the lines above name, and {}. Run:\n  {}",
        if run::is_root() {
            "its packages do not have it"
        } else {
            "only root may install it"
        },
        commands.join("\n  ")
    )
}

/// Installs what the control plane's store is compared with, where that can be done; without it the
/// comparison is skipped, and says so.
pub fn offer_etcd() {
    if run::which("etcd").is_some() {
        return;
    }
    println!("setup: etcd is missing (the store is measured beside it): etcd-server");
    match install(&["etcd-server"]) {
        Ok(true) => {}
        Ok(false) => println!("setup: only root may install it: apt-get install etcd-server"),
        Err(error) => println!("setup: {error:#}"),
    }
}

/// Without root: says what is missing and which commands would install it, and installs nothing.
pub fn explain(purpose: For) {
    let missing: Vec<Need> = needs(purpose).into_iter().filter(|n| !n.found).collect();
    for need in &missing {
        println!(
            "setup: {} is missing ({}). As root:\n  apt-get install --no-install-recommends {}",
            need.what,
            need.why,
            need.packages.join(" ")
        );
    }
    if let Err(error) = ebpf::detect() {
        println!("setup: {error}");
    }
}

/// Patient: another apt may hold the lock, and a mirror may fail once.
fn apt_get(verb: &str) -> std::process::Command {
    run::program(
        "apt-get",
        [
            "-q",
            "-o",
            "DPkg::Lock::Timeout=300",
            "-o",
            "Acquire::Retries=5",
            verb,
        ],
    )
}

/// Installs Debian packages; false where that cannot be done.
fn install(packages: &[&str]) -> Result<bool> {
    if !run::is_root() || run::which("apt-get").is_none() {
        return Ok(false);
    }
    update_lists()?;
    println!("setup: apt-get install {}", packages.join(" "));
    let mut apt = apt_get("install");
    apt.args(["-y", "--no-install-recommends"]).args(packages);
    run::captured(apt.env("DEBIAN_FRONTEND", "noninteractive"))?;
    stop_services(packages);
    Ok(true)
}

/// Packages that bring a service, which Debian starts at once and at every boot.
const SERVICES: [(&str, &str); 2] = [
    ("docker-registry", "docker-registry.service"),
    ("etcd-server", "etcd.service"),
];

/// Tests start their own: a service that only came with its program would take its port for nothing.
fn stop_services(installed: &[&str]) {
    if !Path::new("/run/systemd/system").exists() {
        return;
    }
    for (package, service) in SERVICES {
        if !installed.contains(&package) {
            continue;
        }
        let stopped = run::captured(&mut run::program(
            "systemctl",
            ["disable", "--now", service],
        ));
        match stopped {
            Ok(_) => println!("setup: {service}, which came with {package}, is not started"),
            Err(error) => println!("setup: {service} came with {package} and runs: {error:#}"),
        }
    }
}

/// `apt-get update`, once a run and only when the lists are older than a day.
fn update_lists() -> Result<()> {
    use std::sync::OnceLock;
    static DONE: OnceLock<()> = OnceLock::new();
    if DONE.set(()).is_err() {
        return Ok(());
    }
    let stamp = std::fs::metadata("/var/lib/apt/periodic/update-success-stamp")
        .or_else(|_| std::fs::metadata("/var/cache/apt/pkgcache.bin"));
    let fresh = stamp.and_then(|m| m.modified()).is_ok_and(|at| {
        at.elapsed()
            .is_ok_and(|age| age < Duration::from_secs(86_400))
    });
    if fresh
        && run::captured(&mut run::program("apt-cache", ["policy", "mmdebstrap"]))?.contains(':')
    {
        return Ok(());
    }
    println!("setup: apt-get update");
    run::captured(&mut apt_get("update"))?;
    Ok(())
}

/// Does apt know this package?
fn available(package: &str) -> bool {
    run::captured(&mut run::program("apt-cache", ["policy", package])).is_ok_and(|said| {
        said.lines()
            .any(|l| l.contains("Candidate:") && !l.contains("(none)"))
    })
}

fn ensure_bpf_compiler(commands: &mut Vec<String>) -> Result<()> {
    if ebpf::has_compiler() {
        return Ok(());
    }
    println!("setup: no Rust compiler for eBPF (a nightly with rust-src, or Debian's rustc-web)");
    let rustup = [
        "toolchain",
        "install",
        ebpf::NIGHTLIES[0],
        "--profile",
        "minimal",
        "-c",
        "rust-src",
    ];
    if run::which("rustup").is_some() {
        println!("setup: rustup {}", rustup.join(" "));
        // Where rustup cannot download it fails or hangs: bounded, then the other way.
        let mut bounded = run::program("timeout", ["300", "rustup"]);
        if run::captured(bounded.args(rustup)).is_ok() && ebpf::has_compiler() {
            return Ok(());
        }
        println!("setup: rustup could not download it");
    }
    let packages = ["rustc-web", "cargo-web", "rust-web-src"];
    if run::is_root() && run::which("apt-get").is_some() {
        update_lists()?;
        if available(packages[0]) && install(&packages)? && ebpf::has_compiler() {
            return Ok(());
        }
    }
    commands.push(format!("rustup {}", rustup.join(" ")));
    Ok(())
}

fn ensure_bpf_linker(commands: &mut Vec<String>) -> Result<()> {
    if run::which("bpf-linker").is_some() {
        return Ok(());
    }
    println!("setup: no bpf-linker");
    let prefix = |version: u32| format!("/usr/lib/llvm-{version}");
    let complete = |version: u32| file(&format!("{}/include/llvm-c/Core.h", prefix(version)));
    let mut version = LLVM.into_iter().find(|v| complete(*v));
    if version.is_none() && run::is_root() && run::which("apt-get").is_some() {
        update_lists()?;
        let found = LLVM
            .into_iter()
            .find(|v| available(&format!("llvm-{v}-dev")));
        if let Some(found) = found {
            let package = format!("llvm-{found}-dev");
            install(&[package.as_str(), "libzstd-dev", "zlib1g-dev", "g++"])?;
            version = Some(found);
        }
    }
    let Some(version) = version else {
        commands.push("cargo install cargo-binstall && cargo binstall bpf-linker".into());
        return Ok(());
    };
    println!("setup: cargo install bpf-linker {BPF_LINKER} (LLVM {version}; about a minute)");
    let feature = format!("llvm-{version}");
    let mut cargo = run::cargo();
    cargo.args(["install", "bpf-linker", "--locked", "--version"]);
    cargo
        .arg(format!("^{BPF_LINKER}"))
        .args(["--no-default-features", "--features", &feature]);
    run::captured(cargo.env("LLVM_PREFIX", prefix(version))).context("bpf-linker")?;
    Ok(())
}

fn ensure_cargo_deny() -> Result<()> {
    if run::which("cargo-deny").is_some() {
        return Ok(());
    }
    println!("setup: cargo install cargo-deny {CARGO_DENY} (a minute or two)");
    let mut cargo = run::cargo();
    // Not optimised: it runs for seconds, and is built for minutes.
    cargo
        .args(["install", "cargo-deny", "--debug", "--locked", "--version"])
        .arg(format!("^{CARGO_DENY}"))
        .env("CARGO_PROFILE_DEV_DEBUG", "0");
    run::captured(&mut cargo).context("cargo-deny")?;
    Ok(())
}
