//! One reading of everything: cumulative counters and present amounts, as the kernel tells them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use gantry_api::k8s_openapi::api::core::v1::{Container, Pod};

use crate::cgroups::Cgroups;
use crate::cgroups::limits::qos_class;
use crate::cgroups::stats::{Pressure, Stats, read_pressure};
use crate::ids::PodUid;
use crate::paths::Paths;
use crate::pressure::usage::disk_bytes;

/// Counters of a pod's interfaces, loopback left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Network {
    /// Bytes, packets, errors, dropped.
    pub receive: [u64; 4],
    /// As above.
    pub transmit: [u64; 4],
}

/// The machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NodeSample {
    /// CPU time of all processes, nanoseconds.
    pub cpu_usage_ns: u64,
    /// Memory less what can be had at once, bytes.
    pub memory_working_set_bytes: u64,
    /// Size of the memory.
    pub memory_capacity_bytes: u64,
    /// Processes and threads.
    pub task_count: u64,
    /// PSI of the machine.
    pub pressure: Option<Pressure>,
    /// All interfaces of the host but loopback and those of pods.
    pub network: Network,
}

/// One container that runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ContainerSample {
    /// Its name.
    pub name: String,
    /// Its image as the spec has it.
    pub image: String,
    /// Its cgroup.
    pub cgroup: String,
    /// Its usage.
    pub stats: Stats,
}

/// One pod that runs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodSample {
    /// Which pod.
    pub uid: PodUid,
    /// metadata.namespace
    pub namespace: String,
    /// metadata.name
    pub name: String,
    /// Its cgroup.
    pub cgroup: String,
    /// Its usage, all containers and the shim.
    pub stats: Stats,
    /// None with hostNetwork.
    pub network: Option<Network>,
    /// Bytes on the node's disk.
    pub disk_bytes: u64,
    /// OOM kills since the pod was made.
    pub oom_kills: u64,
    /// Those that run.
    pub containers: Vec<ContainerSample>,
}

/// Everything at one moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sample {
    /// When.
    pub at: Instant,
    /// The machine.
    pub node: NodeSample,
    /// The pods.
    pub pods: Vec<PodSample>,
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            at: Instant::now(),
            node: NodeSample::default(),
            pods: Vec::new(),
        }
    }
}

/// Reads the machine and all pods. What has just gone is left out.
///
/// * `disk` – gives a pod's bytes on disk, counted by the function it is handed or remembered.
pub fn read(
    pods: &BTreeMap<PodUid, Arc<Pod>>,
    cgroups: &Cgroups,
    paths: &Paths,
    disk: impl Fn(&PodUid, &dyn Fn() -> u64) -> u64,
) -> Sample {
    let at = Instant::now();
    let one = |(uid, pod): (&PodUid, &Arc<Pod>)| {
        let mut sample = pod_sample(uid, pod, cgroups)?;
        let log = paths.pod_log(&sample.namespace, &sample.name, uid);
        let count = || disk_bytes(&[&paths.pod_lib(uid), &log]);
        sample.disk_bytes = disk(uid, &count);
        Some(sample)
    };
    Sample {
        at,
        node: node_sample(),
        pods: pods.iter().filter_map(one).collect(),
    }
}

fn pod_sample(uid: &PodUid, pod: &Pod, cgroups: &Cgroups) -> Option<PodSample> {
    let path = cgroups.pod_path(uid, qos_class(pod));
    let stats = cgroups.stats(&path).ok().flatten()?;
    let spec = pod.spec.as_ref()?;
    let container = |config: &Container| {
        let cgroup = format!("{path}/{}", config.name);
        let stats = cgroups.stats(&cgroup).ok().flatten()?;
        // A cgroup without processes: it has ended, or is being made.
        (stats.task_count > 0).then(|| ContainerSample {
            name: config.name.clone(),
            image: config.image.clone().unwrap_or_default(),
            cgroup,
            stats,
        })
    };
    let all = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers);
    let containers: Vec<ContainerSample> = all.filter_map(container).collect();
    let own_network = spec.host_network != Some(true);
    let inside = containers.iter().find_map(|c| {
        let pid = cgroups.members(&c.cgroup).ok()?.into_iter().next()?;
        std::fs::read_to_string(format!("/proc/{pid}/net/dev")).ok()
    });
    Some(PodSample {
        uid: uid.clone(),
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        name: pod.metadata.name.clone().unwrap_or_default(),
        network: inside
            .filter(|_| own_network)
            .map(|text| network(&text, |_| true)),
        oom_kills: cgroups.oom_kills(&path).unwrap_or(0),
        cgroup: path,
        stats,
        disk_bytes: 0,
        containers,
    })
}

fn text(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn node_sample() -> NodeSample {
    let meminfo = text("/proc/meminfo");
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0).saturating_mul(1024)
    };
    let total = field("MemTotal:");
    let tasks = text("/proc/loadavg")
        .split_whitespace()
        .nth(3)
        .and_then(|field| field.split('/').nth(1)?.parse().ok());
    NodeSample {
        cpu_usage_ns: cpu_ns(&text("/proc/stat")),
        memory_working_set_bytes: total.saturating_sub(field("MemAvailable:")),
        memory_capacity_bytes: total,
        task_count: tasks.unwrap_or(0),
        pressure: read_pressure(|name| PathBuf::from("/proc/pressure").join(name)),
        // The host's side of pods' links would count their traffic twice.
        network: network(&text("/proc/net/dev"), |name| {
            std::path::Path::new(&format!("/sys/class/net/{name}/device")).exists()
        }),
    }
}

/// All but idle and waiting for disks: the first line of `/proc/stat`, in ticks of 10 ms.
fn cpu_ns(stat: &str) -> u64 {
    const TICK_NS: u64 = 10_000_000;
    let line = stat.lines().next().unwrap_or_default();
    let ticks = line.split_whitespace().skip(1).take(8).enumerate();
    let busy = ticks.filter(|(i, _)| !matches!(i, 3 | 4));
    busy.filter_map(|(_, word)| word.parse::<u64>().ok())
        .fold(0u64, u64::saturating_add)
        .saturating_mul(TICK_NS)
}

/// Sums `/proc/<pid>/net/dev` over the interfaces that count.
fn network(text: &str, counts: impl Fn(&str) -> bool) -> Network {
    let mut sum = Network::default();
    for line in text.lines() {
        let Some((name, rest)) = line.split_once(':') else {
            continue;
        };
        let name = name.trim();
        if name == "lo" || !counts(name) {
            continue;
        }
        let numbers: Vec<u64> = rest
            .split_whitespace()
            .map(|word| word.parse().unwrap_or(0))
            .collect();
        for i in 0..4 {
            let add = |at: usize| numbers.get(at).copied().unwrap_or(0);
            sum.receive[i] = sum.receive[i].saturating_add(add(i));
            sum.transmit[i] = sum.transmit[i].saturating_add(add(i + 8));
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_summed_without_loopback() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
             face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop\n\
             lo:  99 9 0 0 0 0 0 0 99 9 0 0 0 0 0 0\n\
             eth0: 100 10 1 2 0 0 0 0 200 20 3 4 0 0 0 0\n\
             eth1: 1 1 0 0 0 0 0 0 2 2 0 0 0 0 0 0\n";
        let want = Network {
            receive: [101, 11, 1, 2],
            transmit: [202, 22, 3, 4],
        };
        assert_eq!(network(text, |_| true), want);
        assert_eq!(network(text, |_| false), Network::default());
    }

    #[test]
    fn idle_time_is_no_usage() {
        assert_eq!(
            cpu_ns("cpu  1 2 3 1000 500 4 5 6 0 0\ncpu0 1\n"),
            210_000_000
        );
        assert_eq!(cpu_ns(""), 0);
    }

    #[test]
    fn this_machine_can_be_read() {
        let node = node_sample();
        assert!(node.cpu_usage_ns > 0 && node.memory_capacity_bytes > 0);
    }
}
