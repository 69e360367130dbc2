//! A node whose disk fills up, and one that runs out of process ids: who goes, why, and that it is over then.
//!
//! Both are made small: a tmpfs lies over the agent's directory, and the threshold of process ids is just
//! below what the machine has now.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;

use super::resources::{events, script};
use super::sleeper;
use crate::cluster::{Cluster, NODE, run};

const LIB: &str = "/var/lib/gantry";
const MIB: u64 = 1 << 20;
/// Bytes of the disk beside what is on it already.
const ROOM: u64 = 400 * MIB;
/// Less than this left is pressure.
const THRESHOLD: u64 = 200 * MIB;
/// What the machine's other processes may come and go by.
const PIDS_ROOM: u64 = 500;
const LIMIT: Duration = Duration::from_secs(120);

/// A small file system over the agent's directory, with what that had; gone with this.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount() -> Result<Self> {
        let lib = PathBuf::from(LIB);
        let aside = tempfile::tempdir()?;
        copy(&lib, aside.path())?;
        let used = run(Command::new("busybox").args(["du", "-sk", LIB]))?.stdout;
        let used_kib = used.split_whitespace().next().context("du says nothing")?;
        let options = format!("size={}", used_kib.parse::<u64>()? * 2048 + ROOM);
        let none = MsFlags::empty();
        mount(Some("tmpfs"), &lib, Some("tmpfs"), none, Some(&*options))?;
        let disk = Self(lib);
        copy(aside.path(), &disk.0)?;
        Ok(disk)
    }

    fn available(&self) -> Result<u64> {
        let stat = nix::sys::statvfs::statvfs(&self.0)?;
        Ok(stat.blocks_available() * stat.fragment_size())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut everything = from.as_os_str().to_owned();
    everything.push("/.");
    let done = run(Command::new("busybox")
        .args(["cp", "-a"])
        .arg(everything)
        .arg(to))?;
    ensure!(done.code == 0, "{done:?}");
    Ok(())
}

/// The node is short of a resource, the pod that takes most of it goes and says why, its neighbour stays.
pub(super) fn node_pressure(cluster: &mut Cluster) -> Result<()> {
    cluster.kill_agent()?;
    let disk = SmallDisk::mount()?;
    let done = on(cluster, &disk);
    cluster.kill_agent()?;
    drop(disk);
    cluster.start_agent()?;
    done
}

fn on(cluster: &mut Cluster, disk: &SmallDisk) -> Result<()> {
    let full_bytes = disk.available()? - THRESHOLD;
    let loadavg = std::fs::read_to_string("/proc/loadavg")?;
    let tasks = loadavg.split_whitespace().nth(3);
    let tasks = tasks.and_then(|part| part.split('/').nth(1));
    let tasks: u64 = tasks.context("/proc/loadavg")?.parse()?;
    let pid_max: u64 = std::fs::read_to_string("/proc/sys/kernel/pid_max")?
        .trim()
        .parse()?;
    let thresholds = format!(
        "nodefs.available<{THRESHOLD},pid.available<{}",
        pid_max - tasks - PIDS_ROOM
    );
    cluster.start_agent_with(&[
        "--eviction-hard",
        &thresholds,
        "--eviction-pressure-transition-period",
        "2s",
    ])?;
    cluster.apply_ok(&sleeper("neighbour", ""))?;
    cluster.wait_ready("default", "neighbour")?;

    let mounts = "      volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
";
    let fill = format!(
        "dd if=/dev/zero of=/data/x bs=1M count={}; exec sleep 3600",
        full_bytes / MIB + 50
    );
    cluster.apply_ok(&script("filler", &fill, mounts))?;
    is_evicted(
        cluster,
        "filler",
        "DiskPressure",
        "ephemeral-storage",
        "nodefs.available",
    )?;
    cluster.wait("its volume to go", LIMIT, |_| {
        Ok(disk.available()? > THRESHOLD)
    })?;

    let fork = format!(
        "i=0; while [ $i -lt {} ]; do sleep 3600 & i=$((i+1)); done; wait",
        PIDS_ROOM * 2
    );
    cluster.apply_ok(&script("forker", &fork, ""))?;
    is_evicted(cluster, "forker", "PIDPressure", "pids", "pid.available")?;

    let neighbour = cluster.get(&["pod", "neighbour"])?;
    let main = &neighbour["status"]["containerStatuses"][0];
    ensure!(main["ready"] == true && main["restartCount"] == 0, "{main}");
    cluster.ok(&["delete", "pods", "--all", "--timeout=60s"])?;
    Ok(())
}

fn is_evicted(
    cluster: &Cluster,
    pod: &str,
    condition: &str,
    resource: &str,
    signal: &str,
) -> Result<()> {
    cluster.wait_phase("default", pod, "Failed")?;
    let status = cluster.get(&["pod", pod])?["status"].clone();
    let words = status["message"].as_str().unwrap_or_default();
    let low = format!("low on resource: {resource}");
    ensure!(
        status["reason"] == "Evicted" && words.contains(&low) && words.contains(signal),
        "{status}"
    );
    cluster.wait("the event of the eviction", LIMIT, |c| {
        Ok(!events(c, pod, "Evicted")?.is_empty())
    })?;
    cluster.wait("the pressure to be over", LIMIT, |c| {
        let node = c.get(&["node", NODE])?;
        let conditions = node["status"]["conditions"].as_array().cloned();
        let is_over = |one: &Value| one["type"] == condition && one["status"] == "False";
        Ok(conditions.unwrap_or_default().iter().any(is_over))
    })
}
