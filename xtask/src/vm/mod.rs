//! `cargo xtask vm-test`: boots a machine of our own in QEMU and runs the scenarios inside.
//!
//! ```text
//! kernel.rs    Debian's kernel package, unpacked; modules in load order
//! initramfs.rs our binaries, their libraries, images ──► cpio.rs ──► initrd
//! mod.rs       qemu (KVM after a timed probe, else TCG) ──► console lines ──► verdicts
//! ```
//! No root, no tap, no change to the host. The guest's init is `gantry-vm-init` of `tests/`: it
//! mounts a pure cgroup v2, runs the scenarios and prints one line for each:
//! `vm: ok NAME SECONDS`, `vm: FAILED NAME: WORDS`, `vm: skipped NAME: REASON`, then `vm: end`.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{build, image, report, run, setup};

mod cpio;
mod initramfs;
mod kernel;

/// The whole guest with every scenario, boot to power-off: up to a minute a scenario under TCG, with
/// room for a loaded machine.
const LIMIT: Duration = Duration::from_secs(3_600);
/// A guest under KVM that prints nothing for so long does not truly work.
const KVM_PROBE: Duration = Duration::from_secs(10);

/// What `vm-test` takes.
#[derive(clap::Args)]
pub struct Arguments {
    /// A kernel image instead of Debian's (its modules are expected to be built in)
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Which of Debian's kernels: the start of its version
    #[arg(long, value_name = "VERSION", default_value = "6.1")]
    pub kernel_version: String,
    /// Only this scenario, or `every-kernel`: those that depend on the kernel
    #[arg(long, value_name = "NAME")]
    pub scenario: Option<String>,
    /// Show the guest's whole console
    #[arg(long)]
    pub console: bool,
}

impl Arguments {
    /// What `cargo xtask test` runs: the others have just run on this machine.
    pub fn every_kernel() -> Self {
        Self {
            kernel: None,
            kernel_version: "6.1".into(),
            scenario: Some("every-kernel".into()),
            console: false,
        }
    }
}

/// What the guest reported.
#[derive(Default)]
pub struct Outcome {
    /// Scenarios that passed.
    pub passed: usize,
    /// Scenarios that failed, or the guest itself.
    pub failed: usize,
    /// Reasons.
    pub skipped: Vec<String>,
    ended: bool,
}

/// Runs and fails when anything failed.
pub fn task(arguments: &Arguments) -> Result<()> {
    setup::ensure(setup::For::Vm)?;
    let outcome = run(arguments)?;
    println!(
        "{} passed, {} failed, {} skipped",
        outcome.passed,
        outcome.failed,
        outcome.skipped.len()
    );
    if outcome.failed > 0 {
        bail!("the console is in {}", console().display());
    }
    Ok(())
}

fn directory() -> PathBuf {
    run::target().join("vm")
}

fn console() -> PathBuf {
    directory().join("console.log")
}

/// Builds what is needed, boots, and collects the verdicts.
pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let bin = build::binaries(build::Profile::Dev, "test")?;
    let step = report::step("virtual machine: kernel and initramfs");
    std::fs::create_dir_all(directory())?;
    let (image, modules) = match &arguments.kernel {
        Some(image) => (image.clone(), Vec::new()),
        None => kernel::debian(&directory(), &arguments.kernel_version)?,
    };
    let init = run::target().join("debug/gantry-vm-init");
    let images = [
        image::archive(&image::NGINX)?,
        image::archive(&image::BUSYBOX)?,
    ];
    let initrd = directory().join("initrd");
    initramfs::write(&initrd, &init, &bin, &images, &modules)?;
    drop(step);
    let accelerator = if kvm_works(&image)? { "kvm" } else { "tcg" };
    let _step = report::step(&format!("virtual machine: booting ({accelerator})"));
    boot(arguments, accelerator, &image, &initrd)
}

fn boot(arguments: &Arguments, accel: &str, image: &Path, initrd: &Path) -> Result<Outcome> {
    let scenario = arguments.scenario.as_deref().unwrap_or("all");
    let mut qemu = qemu(accel, image, &format!("gantry.scenario={scenario}"));
    qemu.arg("-initrd").arg(initrd).args(["-m", "3072"]);
    let mut guest = Guest::start(qemu)?;
    let mut outcome = Outcome::default();
    let began = Instant::now();
    let mut log = String::new();
    while let Some(line) = guest.line(LIMIT.saturating_sub(began.elapsed())) {
        log.push_str(&line);
        log.push('\n');
        if arguments.console {
            println!("  | {line}");
        }
        verdict(&line, &mut outcome);
    }
    guest.end();
    std::fs::write(console(), &log)?;
    if !outcome.ended {
        outcome.failed += 1;
        let last: Vec<&str> = log.lines().rev().take(20).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        println!(
            "FAILED vm: no end after {} s; its last words:\n{}",
            began.elapsed().as_secs(),
            last.join("\n")
        );
    }
    Ok(outcome)
}

/// Reads one line of the guest's console.
fn verdict(line: &str, outcome: &mut Outcome) {
    let Some((_, words)) = line.split_once("vm: ") else {
        return;
    };
    if let Some(name) = words.strip_prefix("ok ") {
        report::note(format!("ok {name}"));
        outcome.passed += 1;
    } else if let Some(words) = words.strip_prefix("FAILED ") {
        println!("FAILED vm {words}");
        outcome.failed += 1;
    } else if let Some(reason) = words.strip_prefix("skipped ") {
        outcome.skipped.push(format!("vm {reason}"));
    } else if words.trim() == "end" {
        outcome.ended = true;
    }
}

fn qemu(accelerator: &str, kernel: &Path, more: &str) -> Command {
    let (program, console) = match std::env::consts::ARCH {
        "aarch64" => ("qemu-system-aarch64", "ttyAMA0"),
        _ => ("qemu-system-x86_64", "ttyS0"),
    };
    let mut qemu = Command::new(program);
    let cpu = if accelerator == "kvm" { "host" } else { "max" };
    qemu.args([
        "-accel",
        accelerator,
        "-cpu",
        cpu,
        "-smp",
        "2",
        "-nodefaults",
        "-display",
        "none",
    ]);
    qemu.args(["-serial", "stdio", "-no-reboot", "-kernel"])
        .arg(kernel);
    qemu.arg("-append").arg(format!(
        "console={console} panic=-1 quiet rootfstype=tmpfs systemd.unified_cgroup_hierarchy=1 {more}"
    ));
    if std::env::consts::ARCH == "aarch64" {
        qemu.args(["-machine", "virt"]);
    }
    qemu
}

/// Does a guest really boot under KVM? On some machines /dev/kvm exists and hangs them.
fn kvm_works(image: &Path) -> Result<bool> {
    if std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return Ok(false);
    }
    // Without an initrd the kernel boots, finds no root and panics: any word of it will do.
    let mut qemu = qemu("kvm", image, "earlyprintk=serial ignore_loglevel");
    // What QEMU says about a KVM that does not work is the answer, not an error.
    qemu.args(["-m", "256"]).stderr(Stdio::null());
    let mut guest = Guest::start(qemu)?;
    let began = Instant::now();
    let mut works = false;
    while let Some(line) = guest.line(KVM_PROBE.saturating_sub(began.elapsed())) {
        if line.contains("Run /") || line.contains("Kernel panic") || line.contains("VFS:") {
            works = true;
            break;
        }
    }
    guest.end();
    if !works {
        report::note("/dev/kvm is there, but no guest boots with it: emulating (TCG)");
    }
    Ok(works)
}

/// A running QEMU; killed when dropped.
struct Guest {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Guest {
    fn start(mut qemu: Command) -> Result<Self> {
        qemu.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = qemu.spawn().with_context(|| run::words(&qemu))?;
        let stdout = child.stdout.take().context("qemu has no output")?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stdout);
            let mut bytes = Vec::new();
            while reader.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
                let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
                bytes.clear();
            }
        });
        Ok(Self { child, lines })
    }

    /// The next console line; none at the end, or when `limit` has passed.
    fn line(&mut self, limit: Duration) -> Option<String> {
        self.lines.recv_timeout(limit).ok()
    }

    fn end(&mut self) {
        // It has ended by itself, or it must.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_read_from_a_noisy_console() {
        let mut outcome = Outcome::default();
        for line in [
            "[    1.2] something",
            "vm: ok main-job 12.1 s",
            "[    9.9] vm: FAILED devices: opened /dev/ttyS0",
            "vm: skipped ipv6: no module",
        ] {
            verdict(line, &mut outcome);
        }
        assert_eq!(
            (outcome.passed, outcome.failed, outcome.ended),
            (1, 1, false)
        );
        assert_eq!(outcome.skipped, ["vm ipv6: no module"]);
        verdict("vm: end", &mut outcome);
        assert!(outcome.ended);
    }
}
