//! `ctr run` of the same root file system, without a network: containerd's own command line on a containerd of
//! our own, which does as its CRI plugin does (a shim of its own for each container, runc in it).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::runc::Runc;
use crate::cluster::run;

/// Until it listens; it takes a quarter of a second.
const READY_MAX: Duration = Duration::from_secs(10);
/// Where its shims listen, whatever its configuration says.
const SHIMS: &str = "/run/containerd";

/// A daemon with a store of its own; ended, and its files removed, when dropped.
pub(super) struct Containerd {
    directory: tempfile::TempDir,
    rootfs: PathBuf,
    daemon: Child,
    next: u32,
    /// This machine has no other containerd, whose they could be.
    owns_shims: bool,
}

impl Containerd {
    /// None, with the reason told, where containerd is missing or does not run.
    pub(super) fn prepare(runc: &Runc) -> Option<Self> {
        let tried = Self::start(runc).and_then(|mut containerd| {
            containerd.run()?;
            Ok(containerd)
        });
        tried
            .inspect_err(|error| eprintln!("skipped: containerd: {error:#}"))
            .ok()
    }

    fn start(runc: &Runc) -> Result<Self> {
        let owns_shims = !Path::new(SHIMS).exists();
        let directory = tempfile::Builder::new()
            .prefix("gantry-bench-")
            .tempdir_in("/run")?;
        let at = directory.path().display();
        let config = format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{at}/socket\"\n"
        );
        let file = directory.path().join("config.toml");
        std::fs::write(&file, config)?;
        let mut daemon = Command::new("containerd");
        daemon.arg("--config").arg(file);
        daemon.stdin(Stdio::null()).stdout(Stdio::null());
        let daemon = daemon.stderr(Stdio::null()).spawn().context("containerd")?;
        let containerd = Self {
            rootfs: runc.rootfs(),
            directory,
            daemon,
            next: 0,
            owns_shims,
        };
        let began = Instant::now();
        while run(containerd.command().arg("version"))?.code != 0 {
            if began.elapsed() > READY_MAX {
                bail!("it does not answer after {} s", READY_MAX.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(containerd)
    }

    /// Create, start, wait, remove.
    pub(super) fn run(&mut self) -> Result<Duration> {
        self.next += 1;
        let id = format!("gantry-bench-ctr-{}-{}", std::process::id(), self.next);
        let mut command = self.command();
        // A cgroup of this name goes with the container; the one that is the default would stay.
        command.args(["run", "--rm", "--null-io", "--cgroup", &format!("/{id}")]);
        command.arg("--rootfs").arg(&self.rootfs);
        command.args([&id, "/bin/true"]);
        let began = Instant::now();
        let output = run(&mut command)?;
        if output.code != 0 {
            bail!("exited with {}: {}", output.code, output.stderr.trim());
        }
        Ok(began.elapsed())
    }

    fn command(&self) -> Command {
        let mut command = Command::new("ctr");
        let socket = self.directory.path().join("socket");
        command.arg("--address").arg(socket);
        command
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let ended =
            i32::try_from(self.daemon.id()).map(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM));
        if ended.is_ok() {
            let _ = self.daemon.wait();
        }
        if self.owns_shims {
            let _ = std::fs::remove_dir_all(SHIMS);
        }
    }
}
