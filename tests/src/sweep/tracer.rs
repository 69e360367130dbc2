//! strace, put before gantry-shim and gantry-rt or attached to the agent.
//!
//! The agent finds both programs beside itself; there stands a script that puts strace before the
//! real one, once, when a point is set. `-D` keeps the program's own pid and parent. strace shares
//! the program's descriptors: its standard error goes nowhere, because the agent reads the shim's
//! until nobody holds it any more, and strace would hold it for the pod's whole life.
//! The shim forks: it is followed, until execve. gantry-rt is not: what it clones is the container's
//! own process, whose death is the container's end and no accident of ours.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cluster::Installation;

/// The programs that may stand behind strace.
pub(super) const WRAPPED: [&str; 2] = ["gantry-rt", SHIM];
const SHIM: &str = "gantry-shim";
/// How long strace may take to let go of the agent.
const DETACH_TIMEOUT: Duration = Duration::from_secs(10);

/// A directory like the installation's, where strace can be put before two of the programs.
pub(super) struct Wrapped {
    directory: PathBuf,
}

impl Wrapped {
    /// Makes it; the installation returned is to be used instead of the one given.
    pub(super) fn set_up(installation: &Installation) -> Result<(Self, Installation)> {
        let directory = installation.bin.with_file_name("sweep");
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(directory.join("real"))?;
        for name in ["gantry-control", "gantry-agent", "gantry-bridge", "gantry"] {
            fs::hard_link(installation.bin.join(name), directory.join(name))?;
        }
        for name in WRAPPED {
            let (real, point) = (
                directory.join("real").join(name),
                directory.join(format!("{name}.point")),
            );
            fs::hard_link(installation.bin.join(name), &real)?;
            let (real, point) = (real.display(), point.display());
            // The point is taken once; the next try is the real program alone.
            let script = format!(
                "#!/bin/sh\nif mv {point} {point}.$$ 2>/dev/null; then\n  \
                 read -r options < {point}.$$; rm -f {point}.$$\n  \
                 exec strace -D -qq {own} $options {real} \"$@\"{quiet}\nfi\n\
                 exec {real} \"$@\"\n",
                own = if name == SHIM { "-f -b execve" } else { "" },
                quiet = if name == SHIM { " 2>/dev/null" } else { "" },
            );
            let path = directory.join(name);
            fs::write(&path, script)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        let installation = Installation {
            bin: directory.clone(),
            images: installation.images.clone(),
        };
        Ok((Self { directory }, installation))
    }

    /// The next start of `name` stands behind strace with these options.
    pub(super) fn set(&self, name: &str, options: &str) -> Result<()> {
        let (point, beside) = (format!("{name}.point"), format!("{name}.next"));
        fs::write(self.directory.join(&beside), format!("{options}\n"))?;
        fs::rename(self.directory.join(beside), self.directory.join(point))?;
        Ok(())
    }

    /// Takes back what nobody has met.
    pub(super) fn clear(&self, name: &str) {
        let _ = fs::remove_file(self.directory.join(format!("{name}.point")));
    }

    pub(super) fn trace_file(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.trace"))
    }
}

impl Drop for Wrapped {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// strace attached to a running process. Dropping it detaches.
pub(super) struct Attached(Child);

impl Attached {
    pub(super) fn to(pid: u32, options: &[&str]) -> Result<Self> {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-b", "execve"]).args(options);
        strace.args(["-p", &pid.to_string()]).stdin(Stdio::null());
        let mut child = strace.stderr(Stdio::piped()).spawn().context("strace")?;
        let said = child.stderr.take().context("strace has no stderr")?;
        let mut said = BufReader::new(said);
        let mut line = String::new();
        while said.read_line(&mut line)? > 0 {
            if line.contains("attached") {
                // Nobody reads what it says later; it must not block on that.
                std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
                return Ok(Self(child));
            }
        }
        let _ = child.wait();
        bail!("strace did not attach: {line}")
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.0.id()) {
            let pid = nix::unistd::Pid::from_raw(pid);
            // SIGINT detaches; a kill would take the tracees' stops with it.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::SIGINT);
        }
        // One whose tracee dies with two of its threads in stops may wait for them for ever.
        let end = Instant::now() + DETACH_TIMEOUT;
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
