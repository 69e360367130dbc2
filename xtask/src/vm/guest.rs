//! One virtual machine: QEMU's command line, and its console as lines.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::{report, run};

/// A guest under KVM that prints nothing for so long does not truly work.
const KVM_PROBE: Duration = Duration::from_secs(10);

/// QEMU with that accelerator (`kvm` or `tcg`), that kernel and `more` on the kernel's command line.
pub fn qemu(accelerator: &str, kernel: &Path, more: &str) -> Command {
    let (program, console) = match std::env::consts::ARCH {
        "aarch64" => ("qemu-system-aarch64", "ttyAMA0"),
        _ => ("qemu-system-x86_64", "ttyS0"),
    };
    // If this process is killed, so is QEMU.
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "--", program]);
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
    // An emulated timer is late on a loaded host: the kernel must not take that for a broken one, and panic.
    qemu.arg("-append").arg(format!(
        "console={console} panic=-1 no_timer_check quiet rootfstype=tmpfs systemd.unified_cgroup_hierarchy=1 {more}"
    ));
    if std::env::consts::ARCH == "aarch64" {
        qemu.args(["-machine", "virt"]);
    }
    qemu
}

/// Does a guest really boot under KVM? On some machines /dev/kvm exists and hangs them.
pub fn kvm_works(image: &Path) -> Result<bool> {
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
pub struct Guest {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Guest {
    /// Starts it; its console is read from then on.
    pub fn start(qemu: Command) -> Result<Self> {
        let (sender, lines) = mpsc::channel();
        let child = spawn(qemu, move |line| sender.send(line).is_ok())?;
        Ok(Self { child, lines })
    }

    /// The next console line; none at the end, or when `limit` has passed.
    pub fn line(&mut self, limit: Duration) -> Option<String> {
        self.lines.recv_timeout(limit).ok()
    }

    /// Ends it, if it has not ended by itself.
    pub fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end();
    }
}

/// Starts QEMU and tells every line of its console, until `tell` says that nobody listens any more.
pub fn spawn(
    mut qemu: Command,
    mut tell: impl FnMut(String) -> bool + Send + 'static,
) -> Result<Child> {
    qemu.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = qemu.spawn().with_context(|| run::words(&qemu))?;
    let stdout = child.stdout.take().context("qemu has no output")?;
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stdout);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
            let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            if !tell(line) {
                return;
            }
            bytes.clear();
        }
    });
    Ok(child)
}
