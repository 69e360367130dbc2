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

/// A kernel that says of a processor that it has been at one place for so long does not come back. On a
/// starved host they say it of twenty or thirty seconds.
const STILL_S: u64 = 120;

/// How long a processor of the guest has stood still by this line of its console, if that is for ever.
///
/// QEMU's emulation did this to its guests now and then, most often on a busy host: both processors spin in
/// their kernel, one in wait of the other, while the clock goes on. They share a thread since then ([`qemu`]).
pub fn stands_still(line: &str) -> Option<u64> {
    let (_, words) = line.split_once("BUG: soft lockup - CPU#")?;
    let (_, words) = words.split_once("stuck for ")?;
    let seconds = words.split_once('s')?.0.parse().ok()?;
    (seconds >= STILL_S).then_some(seconds)
}

/// QEMU with that accelerator (`kvm` or `tcg`), that kernel and `more` on the kernel's command line.
pub fn qemu(accelerator: &str, kernel: &Path, more: &str) -> Command {
    let (program, console) = match std::env::consts::ARCH {
        "aarch64" => ("qemu-system-aarch64", "ttyAMA0"),
        _ => ("qemu-system-x86_64", "ttyS0"),
    };
    // If this process is killed, so is QEMU.
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "--", program]);
    // The emulated processors of a guest take turns in one thread. In threads of their own both were seen to
    // stand still, for 44 minutes once; what one loses when the other changes it at the same moment is supposed
    // to be the cause. It costs nothing where there are as many guests as the host has processors: four
    // scenarios in two guests take 115 s both ways on two processors.
    let (accelerator, cpu) = match accelerator {
        "kvm" => ("kvm", "host"),
        _ => ("tcg,thread=single", "max"),
    };
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
    // Huge pages are for the scenario `guarantees`.
    qemu.arg("-append").arg(format!(
        "console={console} panic=-1 no_timer_check loglevel=5 rootfstype=tmpfs systemd.unified_cgroup_hierarchy=1 hugepages=4 {more}"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_stands_still_when_its_kernel_says_so_for_minutes() {
        let line = |s: u64| {
            format!("[ 99.1] watchdog: BUG: soft lockup - CPU#1 stuck for {s}s! [init:98]")
        };
        assert_eq!(stands_still(&line(26)), None);
        assert_eq!(stands_still(&line(134)), Some(134));
        for other in [
            "",
            "soft lockup",
            "BUG: soft lockup - CPU#1 stuck for xs!",
            "vm: ok see 9 s",
        ] {
            assert_eq!(stands_still(other), None, "{other}");
        }
    }
}
