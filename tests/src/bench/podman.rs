//! `podman run` of the same root file system, without a network: what people start containers with.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::runc::Runc;
use crate::cluster::run;

/// A store of its own, removed when dropped.
pub(super) struct Podman {
    directory: tempfile::TempDir,
    rootfs: PathBuf,
}

impl Podman {
    /// None, with the reason told, where podman is missing or does not run.
    pub(super) fn prepare(runc: &Runc) -> Option<Self> {
        let directory = tempfile::Builder::new()
            .prefix("gantry-bench-")
            .tempdir_in("/run")
            .ok()?;
        let podman = Self {
            directory,
            rootfs: runc.rootfs(),
        };
        match podman.run() {
            Ok(_) => Some(podman),
            Err(error) => {
                eprintln!("skipped: podman: {error:#}");
                None
            }
        }
    }

    /// Create, start, wait, remove.
    pub(super) fn run(&self) -> Result<Duration> {
        let began = Instant::now();
        self.ok(&["run", "--rm"], &["/bin/true"])?;
        Ok(began.elapsed())
    }

    /// Starts what stays, until [`Podman::remove_all`]; its id.
    pub(super) fn start(&self) -> Result<String> {
        let id = self.ok(&["run", "--detach"], &["/bin/sleep", "86400"])?;
        Ok(id.trim().to_owned())
    }

    pub(super) fn remove_all(&self) -> Result<()> {
        let mut command = self.command();
        command.args(["rm", "--all", "--force", "--time=0"]);
        let output = run(&mut command)?;
        if output.code != 0 {
            bail!("podman rm: {}", output.stderr.trim());
        }
        Ok(())
    }

    fn ok(&self, verb: &[&str], words: &[&str]) -> Result<String> {
        let mut command = self.command();
        command.args(verb).args(["--network=none", "--rootfs"]);
        command.arg(&self.rootfs).args(words);
        let output = run(&mut command)?;
        if output.code != 0 {
            bail!("exited with {}: {}", output.code, output.stderr.trim());
        }
        Ok(output.stdout)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("podman");
        for (flag, name) in [
            ("--root", "root"),
            ("--runroot", "run"),
            ("--tmpdir", "tmp"),
        ] {
            command.arg(flag).arg(self.directory.path().join(name));
        }
        command.args([
            "--runtime=runc",
            "--cgroup-manager=cgroupfs",
            "--storage-driver=vfs",
            "--events-backend=none",
        ]);
        command
    }
}
