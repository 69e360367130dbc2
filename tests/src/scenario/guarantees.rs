//! What requests come to in the kernel's files, and what else of limits there is: weights, protected memory,
//! saved-up quota, CPUs of one's own, huge pages, who is killed first.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{cgroup_file, sleeper};
use crate::cluster::Cluster;

/// For what takes a second on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(90);
const MIB: u64 = 1 << 20;
/// Huge pages of 2 MiB that the machine has.
const PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// The unified hierarchy alone, as against several beside it.
fn is_unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

fn with_resources(name: &str, resources: &str) -> String {
    sleeper(name, &format!("      resources: {resources}\n"))
}

pub(super) fn guarantees(cluster: &mut Cluster) -> Result<()> {
    cluster.kill_agent()?;
    cluster.start_agent_with(&[
        "--cpu-manager-policy",
        "static",
        "--memory-throttling-percent",
        "50",
        "--system-reserved",
        "cpu=100m",
        "--agent-reserved",
        "cpu=50m",
    ])?;
    let burstable = "{requests: {cpu: 100m, memory: 32Mi}, limits: {cpu: 200m, memory: 64Mi}}";
    let saves_up = "  name: saves-up\n  annotations: {gantry.dev/cpu-burst-percent: \"50\"}\n";
    let saves_up = with_resources("saves-up", burstable).replace("  name: saves-up\n", saves_up);
    cluster.apply_ok(&saves_up)?;
    cluster.apply_ok(&sleeper("any", ""))?;
    for pod in ["saves-up", "any"] {
        cluster.wait_ready("default", pod)?;
    }
    let all = allowed(cluster, "any")?;
    cluster.apply_ok(&with_resources("whole", "{limits: {cpu: 1, memory: 48Mi}}"))?;
    cluster.wait_ready("default", "whole")?;
    weights(cluster)?;
    memory(cluster)?;
    killed_first(cluster)?;
    own_cpus(cluster, &all)?;
    huge_pages(cluster)
}

/// A value of a container's cgroup, by both versions' names of the file.
fn is(
    cluster: &Cluster,
    pod: &str,
    files: (&str, (&str, &str)),
    wanted: (&str, &str),
) -> Result<()> {
    let found = cgroup_file(cluster, pod, "main", files.0, files.1)?;
    let wanted = if is_unified() { wanted.0 } else { wanted.1 };
    ensure!(
        found == wanted,
        "{pod}: {files:?} is {found}, want {wanted}"
    );
    Ok(())
}

/// Of a processor that all want, each gets by its request; what a container saved up it may use at once.
fn weights(cluster: &Cluster) -> Result<()> {
    let weight = ("cpu.weight", ("cpu", "cpu.shares"));
    is(cluster, "whole", weight, ("100", "1024"))?;
    is(cluster, "saves-up", weight, ("17", "102"))?;
    is(cluster, "any", weight, ("1", "2"))?;
    let burst = ("cpu.max.burst", ("cpu", "cpu.cfs_burst_us"));
    is(cluster, "saves-up", burst, ("10000", "10000"))?;
    is(cluster, "whole", burst, ("0", "0"))
}

/// Requests of memory are protected, a container is slowed down before its limit, is killed as a whole, and
/// never swaps. Cgroup v1 knows the last of it alone.
fn memory(cluster: &Cluster) -> Result<()> {
    if !is_unified() {
        eprintln!(
            "skipped: guarantees: cgroup v1 has no memory.min, memory.low, memory.high, memory.oom.group"
        );
        let swappiness = ("", ("memory", "memory.swappiness"));
        return is(cluster, "whole", swappiness, ("", "0"));
    }
    let bytes = |mib: u64| (mib * MIB).to_string();
    let high = bytes(32 + 16);
    for (pod, file, wanted) in [
        ("whole", "memory.min", bytes(48)),
        ("whole", "memory.low", bytes(0)),
        ("whole", "memory.high", "max".into()),
        ("saves-up", "memory.min", bytes(0)),
        ("saves-up", "memory.low", bytes(32)),
        ("saves-up", "memory.high", high),
        ("saves-up", "memory.oom.group", "1".into()),
        ("any", "memory.low", bytes(0)),
    ] {
        is(cluster, pod, (file, ("", "")), (&wanted, ""))?;
    }
    // A class protects what its pods do: without it theirs would count for nothing.
    let class = std::fs::read_to_string("/sys/fs/cgroup/gantry/burstable/memory.low")?;
    ensure!(class.trim() == bytes(32), "of the class: {class}");
    // A kernel without swap accounting has no such file.
    if let Ok(swap) = cgroup_file(cluster, "any", "main", "memory.swap.max", ("", "")) {
        ensure!(swap == "0", "swap: {swap}");
    }
    Ok(())
}

/// When the machine itself has no memory left: those who asked for nothing go first.
fn killed_first(cluster: &Cluster) -> Result<()> {
    let score = |pod: &str| -> Result<i32> {
        let text = cluster.ok(&["exec", pod, "--", "cat", "/proc/1/oom_score_adj"])?;
        text.trim().parse().with_context(|| format!("{text:?}"))
    };
    ensure!(score("any")? == 1000, "of a pod without requests");
    let burstable = score("saves-up")?;
    ensure!(
        (900..1000).contains(&burstable),
        "of a burstable pod: {burstable}"
    );
    let whole = score("whole")?;
    match may_lower()? {
        true => ensure!(whole == -997, "of a guaranteed pod: {whole}"),
        false => eprintln!(
            "skipped: guarantees: this user may not lower oom_score_adj (CAP_SYS_RESOURCE); it is {whole}"
        ),
    }
    Ok(())
}

/// Whether the kernel lets this user lower a score: CAP_SYS_RESOURCE, bit 24.
fn may_lower() -> Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let bits = u64::from_str_radix(line.context("no CapEff")?.trim(), 16)?;
    Ok(bits & (1 << 24) != 0)
}

/// The CPUs that a pod's processes run on: the kernel's word to themselves.
fn allowed(cluster: &Cluster, pod: &str) -> Result<BTreeSet<u32>> {
    let status = cluster.ok(&["exec", pod, "--", "cat", "/proc/1/status"])?;
    let list = status
        .lines()
        .find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
    let list = list.context("no Cpus_allowed_list")?.trim().to_owned();
    let mut all = BTreeSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        all.extend(first.parse::<u32>()?..=last.parse()?);
    }
    Ok(all)
}

/// A Guaranteed container with a whole CPU has it for itself, for as long as it runs.
fn own_cpus(cluster: &Cluster, all: &BTreeSet<u32>) -> Result<()> {
    if all.len() < 2 {
        eprintln!("skipped: guarantees: a machine with one CPU has none to give away");
        return Ok(());
    }
    let own = allowed(cluster, "whole")?;
    ensure!(own.len() == 1 && own.is_subset(all), "{own:?} of {all:?}");
    let others: BTreeSet<u32> = all.difference(&own).copied().collect();
    for pod in ["any", "saves-up"] {
        let found = allowed(cluster, pod)?;
        ensure!(found == others, "{pod} runs on {found:?}, want {others:?}");
    }
    cluster.ok(&["delete", "pod", "whole", "--timeout=60s"])?;
    cluster.wait("the others to have all CPUs again", PATIENCE, |c| {
        Ok(allowed(c, "any")? == *all)
    })
}

/// Huge pages: a limit that the kernel counts, and a volume of them.
fn huge_pages(cluster: &Cluster) -> Result<()> {
    let count = std::fs::read_to_string(PAGES).unwrap_or_default();
    if !count.trim().parse::<u64>().is_ok_and(|count| count >= 2) {
        eprintln!("skipped: guarantees: this machine has no huge pages of 2 MiB (vm.nr_hugepages)");
        return Ok(());
    }
    let pod = sleeper(
        "pages",
        "      resources: {limits: {cpu: 100m, memory: 32Mi, hugepages-2Mi: 4Mi}}
      volumeMounts: [{name: pages, mountPath: /pages}]
  volumes: [{name: pages, emptyDir: {medium: HugePages}}]
",
    );
    cluster.apply_ok(&pod)?;
    cluster.wait_ready("default", "pages")?;
    let limit = ("hugetlb.2MB.max", ("hugetlb", "hugetlb.2MB.limit_in_bytes"));
    let wanted = (4 * MIB).to_string();
    is(cluster, "pages", limit, (&wanted, &wanted))?;
    let table = cluster.ok(&["exec", "pages", "--", "cat", "/proc/self/mountinfo"])?;
    let mount = table.lines().find(|line| line.contains(" /pages "));
    ensure!(
        mount.is_some_and(|line| line.contains(" - hugetlbfs ") && line.contains("pagesize=2M")),
        "{mount:?}"
    );
    cluster.ok(&["delete", "pod", "pages", "--timeout=60s"])?;
    Ok(())
}
