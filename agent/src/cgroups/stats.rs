//! What a cgroup uses, how long it waits, and which of its limits were hit.

use std::path::{Path, PathBuf};

use super::{CgroupError, Cgroups, Layout, QosClass, join, tree};
use crate::ids::PodUid;

/// Time that tasks waited for one resource (PSI), children included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stall {
    /// Some task waited, share of the last 10 s in hundredths of a percent.
    pub some_avg10: u64,
    /// All tasks waited, as above.
    pub full_avg10: u64,
    /// Some task waited, microseconds since the cgroup was made.
    pub some_total_us: u64,
    /// All tasks waited, microseconds.
    pub full_total_us: u64,
}

/// PSI of the three resources that the kernel watches.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pressure {
    /// Runnable, and no CPU.
    pub cpu: Stall,
    /// Reclaim, swap-in, refaults.
    pub memory: Stall,
    /// Disks.
    pub io: Stall,
}

/// A reading of one cgroup, children included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// CPU time since the cgroup was made, nanoseconds.
    pub cpu_usage_ns: u64,
    /// Bandwidth periods that have passed under a quota.
    pub cpu_periods: u64,
    /// Those of them in which the quota ran out.
    pub cpu_throttled_periods: u64,
    /// Time it was held back then, nanoseconds.
    pub cpu_throttled_ns: u64,
    /// Memory charged, page cache included, bytes.
    pub memory_usage_bytes: u64,
    /// Memory that cannot be dropped at once: usage less inactive file pages (the kubelet's
    /// "working set"), bytes.
    pub memory_working_set_bytes: u64,
    /// Anonymous memory, bytes.
    pub memory_rss_bytes: u64,
    /// Page cache, bytes.
    pub memory_cache_bytes: u64,
    /// Faults that had to read from a disk.
    pub memory_major_faults: u64,
    /// Processes and threads.
    pub task_count: u64,
    /// Where the kernel keeps it: cgroup v2 with PSI.
    pub pressure: Option<Pressure>,
}

/// Counters of refusals; compare with an earlier reading.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LimitHits {
    /// Processes that the OOM killer took.
    pub oom_kills: u64,
    /// fork() and clone() refused by the pid limit.
    pub pids: u64,
}

/// The number after `key` in a file of `key value` lines.
pub(crate) fn field(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
}

fn number(path: &Path) -> Result<u64, CgroupError> {
    Ok(tree::read(path)?
        .and_then(|t| t.trim().parse().ok())
        .unwrap_or(0))
}

/// `some avg10=1.23 avg60=0.00 avg300=0.00 total=4567`, and the same with `full`.
pub fn parse_stall(text: &str) -> Stall {
    let line = |kind: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(kind));
        let rest = rest.unwrap_or_default();
        let value = |key: &str| {
            rest.split_whitespace()
                .find_map(|word| word.strip_prefix(key))
        };
        let avg10 = value("avg10=").and_then(|v| {
            let (whole, part) = v.split_once('.')?;
            Some(whole.parse::<u64>().ok()? * 100 + part.parse::<u64>().ok()?)
        });
        let total = value("total=").and_then(|v| v.parse().ok());
        (avg10.unwrap_or(0), total.unwrap_or(0))
    };
    let ((some_avg10, some_total_us), (full_avg10, full_total_us)) = (line("some "), line("full "));
    Stall {
        some_avg10,
        full_avg10,
        some_total_us,
        full_total_us,
    }
}

/// PSI files of a cgroup (`cpu.pressure`) or of the machine (`/proc/pressure/cpu`); none without PSI.
pub fn read_pressure(file: impl Fn(&str) -> PathBuf) -> Option<Pressure> {
    let read = |name: &str| std::fs::read_to_string(file(name)).ok();
    Some(Pressure {
        cpu: parse_stall(&read("cpu")?),
        memory: parse_stall(&read("memory")?),
        io: parse_stall(&read("io")?),
    })
}

impl Cgroups {
    /// How often the kernel's OOM killer took a process of this cgroup or one below. 0 when the
    /// cgroup does not exist. A counter: compare with an earlier reading, before the removal.
    pub fn oom_kills(&self, path: &str) -> Result<u64, CgroupError> {
        self.dirs(path)?;
        let Some(root) = self.shared.layout.root_of("memory") else {
            return Ok(0);
        };
        let dir = join(root, path);
        if let Layout::V2 { .. } = self.shared.layout {
            let text = tree::read(&dir.join("memory.events"))?.unwrap_or_default();
            return Ok(field(&text, "oom_kill").unwrap_or(0));
        }
        let mut sum = 0u64; // v1 counts per cgroup, not per subtree
        for dir in tree::walk(&dir) {
            let text = tree::read(&dir.join("memory.oom_control"))?.unwrap_or_default();
            sum = sum.saturating_add(field(&text, "oom_kill").unwrap_or(0));
        }
        Ok(sum)
    }

    /// Refusals in a cgroup and below; zeros when it does not exist.
    pub fn limit_hits(&self, path: &str) -> Result<LimitHits, CgroupError> {
        let mut pids = 0u64;
        if let Some(root) = self.shared.layout.root_of("pids") {
            // Kernels differ in whether the forking or the limiting cgroup counts: one of them does.
            for dir in tree::walk(&join(root, path)) {
                let text = tree::read(&dir.join("pids.events"))?.unwrap_or_default();
                pids = pids.saturating_add(field(&text, "max").unwrap_or(0));
            }
        }
        Ok(LimitHits {
            oom_kills: self.oom_kills(path)?,
            pids,
        })
    }

    /// Usage of all pods together.
    pub fn pods_stats(&self) -> Result<Option<Stats>, CgroupError> {
        self.stats(&self.shared.base)
    }

    /// Whether a pod has a cgroup of any class.
    pub fn has_pod(&self, uid: &PodUid) -> bool {
        QosClass::ALL.into_iter().any(|class| {
            let path = self.pod_path(uid, class);
            self.shared
                .layout
                .roots()
                .into_iter()
                .any(|root| join(root, &path).is_dir())
        })
    }

    /// Usage of a cgroup; none when it does not exist.
    pub fn stats(&self, path: &str) -> Result<Option<Stats>, CgroupError> {
        let all = self.dirs(path)?;
        let dir = |controller| {
            self.shared
                .layout
                .root_of(controller)
                .map(|r| join(r, path))
        };
        if !all.iter().any(|dir| dir.is_dir()) {
            return Ok(None);
        }
        // What no controller counts is 0.
        let mut stats = match &self.shared.layout {
            Layout::V2 { root } => stats_v2(&join(root, path))?,
            Layout::V1 { .. } => stats_v1(dir("memory"), dir("cpu"), dir("cpuacct"))?,
        };
        if let Some(pids) = dir("pids") {
            stats.task_count = number(&pids.join("pids.current"))?;
        }
        Ok(Some(stats))
    }
}

fn stats_v2(dir: &Path) -> Result<Stats, CgroupError> {
    let memory = tree::read(&dir.join("memory.stat"))?.unwrap_or_default();
    let cpu = tree::read(&dir.join("cpu.stat"))?.unwrap_or_default();
    let of = |text: &str, key| field(text, key).unwrap_or(0);
    let usage = number(&dir.join("memory.current"))?;
    Ok(Stats {
        cpu_usage_ns: of(&cpu, "usage_usec").saturating_mul(1000),
        cpu_periods: of(&cpu, "nr_periods"),
        cpu_throttled_periods: of(&cpu, "nr_throttled"),
        cpu_throttled_ns: of(&cpu, "throttled_usec").saturating_mul(1000),
        memory_usage_bytes: usage,
        memory_working_set_bytes: usage.saturating_sub(of(&memory, "inactive_file")),
        memory_rss_bytes: of(&memory, "anon"),
        memory_cache_bytes: of(&memory, "file"),
        memory_major_faults: of(&memory, "pgmajfault"),
        task_count: 0,
        pressure: read_pressure(|name| dir.join(format!("{name}.pressure"))),
    })
}

fn stats_v1(
    memory: Option<PathBuf>,
    cpu: Option<PathBuf>,
    account: Option<PathBuf>,
) -> Result<Stats, CgroupError> {
    let text = |dir: Option<&PathBuf>, file: &str| match dir {
        Some(dir) => Ok(tree::read(&dir.join(file))?.unwrap_or_default()),
        None => Ok(String::new()),
    };
    let usage = match &memory {
        Some(memory) => number(&memory.join("memory.usage_in_bytes"))?,
        None => 0,
    };
    let memory = text(memory.as_ref(), "memory.stat")?;
    let cpu = text(cpu.as_ref(), "cpu.stat")?;
    let of = |text: &str, key| field(text, key).unwrap_or(0);
    Ok(Stats {
        cpu_usage_ns: match account {
            Some(account) => number(&account.join("cpuacct.usage"))?,
            None => 0,
        },
        cpu_periods: of(&cpu, "nr_periods"),
        cpu_throttled_periods: of(&cpu, "nr_throttled"),
        cpu_throttled_ns: of(&cpu, "throttled_time"),
        memory_usage_bytes: usage,
        memory_working_set_bytes: usage.saturating_sub(of(&memory, "total_inactive_file")),
        memory_rss_bytes: of(&memory, "total_rss"),
        memory_cache_bytes: of(&memory, "total_cache"),
        memory_major_faults: of(&memory, "total_pgmajfault"),
        task_count: 0,
        pressure: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "oom 3\noom_kill 2\noom_group_kill x\n";
        assert_eq!(field(text, "oom_kill"), Some(2));
        assert_eq!(field(text, "oom_group_kill"), None);
        assert_eq!(field(text, "kill"), None);
    }

    #[test]
    fn stalls_are_read_in_hundredths() {
        let text = "some avg10=1.05 avg60=0.00 avg300=0.00 total=77\n\
                    full avg10=0.50 avg60=0.00 avg300=0.00 total=5\n";
        let want = Stall {
            some_avg10: 105,
            full_avg10: 50,
            some_total_us: 77,
            full_total_us: 5,
        };
        assert_eq!(parse_stall(text), want);
        assert_eq!(parse_stall(""), Stall::default());
    }
}
