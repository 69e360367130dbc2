//! A process that SIGKILL does not end, as one that waits for a dead disk: here a freezer of cgroup v1 holds it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::life_cycle::host_pid;
use super::{Skipped, sleeper};
use crate::cluster::Cluster;

const FREEZER: &str = "/sys/fs/cgroup/freezer";
/// SIGKILL after a second of grace, ten seconds until it has not helped, and a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A cgroup of our own, beside the pod's; what is in it stands still until this is dropped.
struct Freezer(PathBuf);

impl Freezer {
    fn around(pid: u32) -> Result<Self> {
        let freezer = Self(Path::new(FREEZER).join("gantry-tests-unkillable"));
        fs::create_dir(&freezer.0)?;
        fs::write(freezer.0.join("cgroup.procs"), pid.to_string())?;
        let state = freezer.0.join("freezer.state");
        fs::write(&state, "FROZEN")?;
        let began = Instant::now();
        while fs::read_to_string(&state)?.trim() != "FROZEN" {
            ensure!(began.elapsed() < LIMIT, "process {pid} does not freeze");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(freezer)
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("freezer.state"), "THAWED");
        let began = Instant::now();
        while fs::remove_dir(&self.0).is_err() && began.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The pod stays and says which process holds it up and where; others come, go on and go; it is not
/// forgotten by an agent that begins anew, and goes when its process does.
pub(super) fn unkillable(cluster: &mut Cluster) -> Result<()> {
    if !Path::new(FREEZER).join("cgroup.procs").exists() {
        let why = "no freezer of cgroup v1 here; that of v2 lets SIGKILL through";
        return Err(Skipped(why.into()).into());
    }
    cluster.apply_ok(&sleeper("stuck", ""))?;
    cluster.apply_ok(&sleeper("neighbour", ""))?;
    cluster.wait_ready("default", "stuck")?;
    cluster.wait_ready("default", "neighbour")?;
    let neighbour = host_pid(cluster, "neighbour", "main", 0)?;
    let pid = host_pid(cluster, "stuck", "main", 0)?;
    let freezer = Freezer::around(pid)?;
    cluster.ok(&["delete", "pod", "stuck", "--wait=false"])?;
    let told = format!("SIGKILL does not end process {pid} (sleep), state D");
    cluster.wait("the event that says what does not end", LIMIT, |c| {
        let words = c.ok(&["describe", "pod", "stuck"])?;
        Ok(words.contains("FailedKillPod") && words.contains(&told))
    })?;
    cluster.apply_ok(&sleeper("later", ""))?;
    cluster.wait_ready("default", "later")?;
    cluster.ok(&["delete", "pod", "later", "--timeout=60s"])?;
    cluster.kill_agent()?;
    cluster.start_agent()?;
    cluster.apply_ok(&sleeper("after", ""))?;
    cluster.wait_ready("default", "after")?;
    let stuck = cluster.get(&["pod", "stuck"])?;
    let metadata = &stuck["metadata"];
    ensure!(metadata["deletionTimestamp"].is_string(), "{metadata}");
    let alive = Path::new("/proc").join(pid.to_string());
    ensure!(alive.exists(), "process {pid} has gone: nothing is shown");
    drop(freezer);
    cluster.wait("the pod to go with its process", LIMIT, |c| {
        Ok(c.gantry(&["get", "pod", "stuck"])?.code != 0)
    })?;
    ensure!(!alive.exists(), "the pod has gone, process {pid} has not");
    let same = host_pid(cluster, "neighbour", "main", 0).context("the neighbour")?;
    ensure!(same == neighbour, "the neighbour was started again");
    Ok(())
}
