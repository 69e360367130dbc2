//! Resources of a small node: what pods get, what happens at the limits, and who is told.
//!
//! The node is made small by reserving all but [`ROOM_MIB`] of the machine's memory, so that its
//! pressure is this test's and nobody else's.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{cgroup_file, sleeper};
use crate::cluster::{Cluster, NODE};

/// Memory that all pods may use together.
const ROOM_MIB: u64 = 360;
/// Less than this left of it is pressure.
const THRESHOLD_MIB: u64 = 60;
/// For what takes a few seconds on a quiet machine, and a minute on an emulated one that is not.
const PATIENCE: Duration = Duration::from_secs(180);

pub(super) fn resources(cluster: &mut Cluster) -> Result<()> {
    make_the_node_small(cluster)?;
    cluster.apply_ok(&web("200m", "64Mi"))?;
    cluster.wait_ready("default", "web")?;
    resize(cluster)?;
    out_of_memory(cluster)?;
    fork_bomb(cluster)?;
    shown(cluster)?;
    eviction(cluster)?;
    // Through all of it the neighbour ran on.
    let web = cluster.get(&["pod", "web"])?;
    let main = &web["status"]["containerStatuses"][0];
    ensure!(main["ready"] == true && main["restartCount"] == 0, "{main}");
    Ok(())
}

/// A pod within its request.
fn web(cpu_limit: &str, memory_limit: &str) -> String {
    sleeper(
        "web",
        &format!(
            "      resources:
        requests: {{cpu: 100m, memory: 32Mi}}
        limits: {{cpu: {cpu_limit}, memory: {memory_limit}}}
"
        ),
    )
}

fn make_the_node_small(cluster: &mut Cluster) -> Result<()> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let kib = |field: &str| -> Result<u64> {
        let line = meminfo.lines().find_map(|l| l.strip_prefix(field));
        let kib = line.and_then(|rest| rest.split_whitespace().next());
        Ok(kib.with_context(|| format!("no {field}"))?.parse()?)
    };
    // Huge pages are no memory that pods can ask for as such, so they are out of it already.
    let free_kib = kib("MemTotal:")? - kib("Hugetlb:")?;
    let reserved = format!("memory={}Ki", free_kib - ROOM_MIB * 1024);
    let threshold = format!("memory.available<{THRESHOLD_MIB}Mi");
    cluster.kill_agent()?;
    cluster.start_agent_with(&[
        "--system-reserved",
        &reserved,
        "--agent-reserved",
        "cpu=10m",
        "--eviction-hard",
        &threshold,
        "--eviction-pressure-transition-period",
        "2s",
        "--pod-max-pids",
        "40",
    ])?;
    let allocatable = format!("{}Ki", (ROOM_MIB - THRESHOLD_MIB) * 1024);
    cluster.wait("allocatable to leave out what is reserved", PATIENCE, |c| {
        let node = c.get(&["node", NODE])?;
        Ok(node["status"]["allocatable"]["memory"] == allocatable.as_str())
    })?;
    let node = cluster.get(&["node", NODE])?;
    for type_ in ["LimitsDegraded", "PodsMaySwap"] {
        condition(&node, type_).with_context(|| format!("no condition {type_}"))?;
    }
    let all = ["memory.max", "memory/gantry/memory.limit_in_bytes"];
    let file = [
        "/sys/fs/cgroup/gantry/memory.max",
        "/sys/fs/cgroup/memory/gantry/memory.limit_in_bytes",
    ]
    .into_iter()
    .find_map(|path| std::fs::read_to_string(path).ok());
    let limit = file.with_context(|| format!("none of {all:?}"))?;
    let want = (ROOM_MIB * 1024 * 1024).to_string();
    ensure!(
        limit.trim() == want,
        "limit of all pods: {limit}, want {want}"
    );
    Ok(())
}

fn condition<'a>(object: &'a Value, type_: &str) -> Option<&'a Value> {
    let all = object["status"]["conditions"].as_array()?;
    all.iter().find(|c| c["type"] == type_)
}

/// CPU and memory follow the spec without a restart; what can never fit is said.
fn resize(cluster: &Cluster) -> Result<()> {
    cluster.apply_ok(&web("400m", "96Mi"))?;
    cluster.wait("the kernel to hold the new limits", PATIENCE, |c| {
        let cpu = cgroup_file(c, "web", "main", "cpu.max", ("cpu", "cpu.cfs_quota_us"))?;
        let memory = ("memory", "memory.limit_in_bytes");
        let memory = cgroup_file(c, "web", "main", "memory.max", memory)?;
        let whole = ("memory", "memory.limit_in_bytes");
        let whole = cgroup_file(c, "web", "", "memory.max", whole)?;
        let wanted = (96 << 20).to_string();
        Ok(cpu.starts_with("40000") && memory == wanted && whole == wanted)
    })?;
    cluster.wait("the status to show the new limits", PATIENCE, |c| {
        let web = c.get(&["pod", "web"])?;
        let main = &web["status"]["containerStatuses"][0];
        Ok(main["resources"]["limits"]["cpu"] == "400m"
            && condition(&web, "PodResizeInProgress").is_none())
    })?;
    let too_much = web("400m", "96Mi")
        .replace("cpu: 100m", "cpu: 390m")
        .replace("400m", "4000");
    let too_much = too_much.replace("cpu: 390m", "cpu: 3900");
    cluster.apply_ok(&too_much)?;
    cluster.wait("the resize to be infeasible", PATIENCE, |c| {
        let web = c.get(&["pod", "web"])?;
        let pending = condition(&web, "PodResizePending");
        Ok(pending.is_some_and(|p| p["reason"] == "Infeasible"))
    })?;
    // Taken back: the condition goes.
    cluster.apply_ok(&web("400m", "96Mi"))?;
    cluster.wait("the condition to go", PATIENCE, |c| {
        Ok(condition(&c.get(&["pod", "web"])?, "PodResizePending").is_none())
    })
}

/// The messages of a pod's events with that reason.
pub(super) fn events(cluster: &Cluster, pod: &str, reason: &str) -> Result<Vec<String>> {
    let all = cluster.get(&["events"])?;
    let items = all["items"].as_array().cloned().unwrap_or_default();
    let of_pod = items
        .iter()
        .filter(|e| e["involvedObject"]["name"] == pod && e["reason"] == reason);
    Ok(of_pod
        .map(|e| e["message"].as_str().unwrap_or_default().to_owned())
        .collect())
}

/// A pod that runs a script once.
pub(super) fn script(name: &str, script: &str, more: &str) -> String {
    sleeper(name, more)
        .replace(
            "command: [\"sleep\", \"3600\"]",
            &format!("command: [\"sh\", \"-c\", \"{script}\"]"),
        )
        .replace("spec:\n", "spec:\n  restartPolicy: Never\n")
}

fn out_of_memory(cluster: &Cluster) -> Result<()> {
    let limits = "      resources:\n        limits: {memory: 24Mi}\n";
    cluster.apply_ok(&script("greedy", "exec tail /dev/zero", limits))?;
    cluster.wait_phase("default", "greedy", "Failed")?;
    // Container and pod have the same limit here, and the pod's shim counts too: either is hit first.
    let readable = std::fs::File::open("/dev/kmsg").is_ok();
    cluster.wait("an event that explains the OOM kill", PATIENCE, |c| {
        let all = events(c, "greedy", "OOMKilled")?;
        let explained =
            |text: &String| text.contains("has reached its memory limit") && text.contains("tail");
        Ok(all.iter().any(explained) || (!readable && !all.is_empty()))
    })
}

fn fork_bomb(cluster: &Cluster) -> Result<()> {
    let bomb = "(while :; do sleep 1000 & done); exec sleep 3600";
    cluster.apply_ok(&script("bomb", bomb, ""))?;
    cluster.wait("an event that names the pid limit", PATIENCE, |c| {
        let all = events(c, "bomb", "PidsLimitReached")?;
        Ok(all
            .iter()
            .any(|text| text.contains("limit of 40 processes")))
    })?;
    cluster.ok(&["delete", "pod", "bomb", "--now"])?;
    Ok(())
}

/// The usage of pods and nodes, for people and for Prometheus.
fn shown(cluster: &Cluster) -> Result<()> {
    let pods = cluster.ok(&["top", "pods", "--containers", "-o", "wide"])?;
    let line = pods.lines().find(|l| l.starts_with("web "));
    ensure!(line.is_some_and(|l| l.contains("Mi")), "top pods: {pods}");
    ensure!(pods.contains("THROTTLED"), "top pods: {pods}");
    let nodes = cluster.ok(&["top", "nodes"])?;
    ensure!(
        nodes.contains(NODE) && nodes.contains('%'),
        "top nodes: {nodes}"
    );
    let text = scrape()?;
    for part in [
        "container_cpu_usage_seconds_total{",
        "pod=\"web\"",
        "kubelet_running_pods ",
    ] {
        ensure!(text.contains(part), "no {part} in the metrics: {text}");
    }
    Ok(())
}

pub(super) fn scrape() -> Result<String> {
    let mut socket = UnixStream::connect("/run/gantry/metrics.sock")?;
    socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n")?;
    let mut text = String::new();
    socket.read_to_string(&mut text)?;
    Ok(text)
}

/// The pod that takes most above its request goes, and is told why; the node says so and recovers.
fn eviction(cluster: &Cluster) -> Result<()> {
    let hog = "dd if=/dev/zero of=/data/x bs=1M count=315; exec sleep 3600";
    let mounts = "      volumeMounts: [{name: data, mountPath: /data}]
  volumes:
    - name: data
      emptyDir: {medium: Memory}
";
    cluster.apply_ok(&script("hog", hog, mounts))?;
    cluster.wait("the node to be under memory pressure", PATIENCE, |c| {
        let node = c.get(&["node", NODE])?;
        let evicted = c.get(&["pod", "hog"])?["status"]["reason"] == "Evicted";
        let pressed = condition(&node, "MemoryPressure").is_some_and(|p| p["status"] == "True");
        Ok(pressed || evicted)
    })?;
    cluster.wait_phase("default", "hog", "Failed")?;
    let hog = cluster.get(&["pod", "hog"])?;
    let words = hog["status"]["message"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    ensure!(
        hog["status"]["reason"] == "Evicted"
            && words.contains("low on resource: memory")
            && words.contains("allocatableMemory.available")
            && words.contains("next would be default/web"),
        "{}",
        hog["status"]
    );
    ensure!(!events(cluster, "hog", "Evicted")?.is_empty(), "no event");
    ensure!(scrape()?.contains("kubelet_evictions 1\n"), "not counted");
    cluster.wait("the pressure to be over", PATIENCE, |c| {
        let node = c.get(&["node", NODE])?;
        Ok(condition(&node, "MemoryPressure").is_some_and(|p| p["status"] == "False"))
    })
}
