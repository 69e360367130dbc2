//! A `gantry-control` on loopback, in a directory of its own, and what it takes of the machine.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::super::api::{Access, Api};
use super::super::memory::pss_kib;

const START_TIMEOUT: Duration = Duration::from_secs(120);
/// The kernel's unit of processor time in `/proc/PID/stat`, whatever its own tick is.
const TICKS_PER_S: f64 = 100.0;

/// The program and its data directory. Dropping it kills the program.
pub(super) struct Plane {
    child: Child,
    data: PathBuf,
}

impl Plane {
    /// Starts the program on a free port and waits until its API answers.
    pub(super) async fn start(bin: &Path, data: &Path) -> Result<Self> {
        let kubeconfig = data.join("admin.kubeconfig");
        // Of an earlier start, on another port.
        let _ = std::fs::remove_file(&kubeconfig);
        let log = std::fs::File::create(data.join("control.log"))?;
        let program = bin.join("gantry-control");
        let mut command = Command::new(&program);
        command.args(["--listen", "127.0.0.1:0", "--log", "warn"]);
        // A prefix of 254 addresses for each of 16,384 nodes. Nobody beats for nodes that were only
        // written down, and they are to take pods all the same.
        command.args(["--cluster-cidr", "100.64.0.0/10"]);
        command.args(["--node-grace-period-s", "3600"]);
        command.arg("--data-dir").arg(data);
        command.arg("--kubeconfig").arg(&kubeconfig);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(log);
        let child = command
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        let mut plane = Self {
            child,
            data: data.to_owned(),
        };
        let began = Instant::now();
        loop {
            if let Some(status) = plane.child.try_wait()? {
                let said = std::fs::read_to_string(data.join("control.log")).unwrap_or_default();
                bail!("gantry-control has ended, {status}: {}", said.trim_end());
            }
            if kubeconfig.exists() && plane.api().await.is_ok() {
                return Ok(plane);
            }
            if began.elapsed() > START_TIMEOUT {
                bail!("gantry-control does not serve after {START_TIMEOUT:?}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(super) fn access(&self) -> Result<Access> {
        Access::read(&self.data.join("admin.kubeconfig"))
    }

    /// A connection of its own.
    pub(super) async fn api(&self) -> Result<Api> {
        Api::connect_as(&self.access()?).await
    }

    /// Processor time so far.
    pub(super) fn cpu(&self) -> Result<Duration> {
        cpu(self.child.id())
    }

    pub(super) fn pss_kib(&self) -> Result<f64> {
        let path = format!("/proc/{}/smaps_rollup", self.child.id());
        let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        pss_kib(&text).with_context(|| format!("{path} has no Pss line"))
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as a power cut does: every figure is of what was durable.
    pub(super) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// User and system time of a process and its threads.
pub(super) fn cpu(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let ticks = ticks(&text).with_context(|| format!("{path} is not understood"))?;
    Ok(Duration::from_secs_f64(ticks / TICKS_PER_S))
}

/// Fields 14 and 15; the second, the name, may hold anything.
fn ticks(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<f64>().ok();
    Some(next()? + next()?)
}

/// Bytes that a process has given to the disk.
pub(super) fn written_bytes(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/io");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let line = text.lines().find_map(|l| l.strip_prefix("write_bytes: "));
    let count = line.and_then(|count| count.trim().parse().ok());
    count.with_context(|| format!("{path} has no write_bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_behind_any_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 11 22 33 44 250 50 0 0 20 0 3 0 99 1 2";
        assert_eq!(ticks(stat), Some(300.0));
        assert_eq!(ticks("7 (a) S 1"), None);
    }
}
