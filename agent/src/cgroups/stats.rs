//! What a cgroup uses and whether the OOM killer hit it.

use std::path::Path;

use super::{CgroupError, Cgroups, Layout, join, tree};

/// A reading of one cgroup, children included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// CPU time since the cgroup was made, nanoseconds.
    pub cpu_usage_ns: u64,
    /// Memory charged, page cache included, bytes.
    pub memory_usage_bytes: u64,
    /// Memory that cannot be dropped at once: usage less inactive file pages (the kubelet's
    /// "working set"), bytes.
    pub memory_working_set_bytes: u64,
    /// Processes and threads.
    pub task_count: u64,
}

/// The number after `key` in a file of `key value` lines.
fn field(text: &str, key: &str) -> Option<u64> {
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

    /// Usage of a cgroup; none when it does not exist.
    pub fn stats(&self, path: &str) -> Result<Option<Stats>, CgroupError> {
        self.dirs(path)?;
        let dir = |controller| {
            self.shared
                .layout
                .root_of(controller)
                .map(|r| join(r, path))
        };
        let (Some(memory), Some(pids)) = (dir("memory"), dir("pids")) else {
            return Ok(None);
        };
        if !memory.is_dir() {
            return Ok(None);
        }
        let stat = tree::read(&memory.join("memory.stat"))?.unwrap_or_default();
        let (usage, inactive, cpu_usage_ns) = match &self.shared.layout {
            Layout::V2 { .. } => {
                let cpu = tree::read(&memory.join("cpu.stat"))?.unwrap_or_default();
                (
                    number(&memory.join("memory.current"))?,
                    field(&stat, "inactive_file"),
                    field(&cpu, "usage_usec").unwrap_or(0).saturating_mul(1000),
                )
            }
            Layout::V1 { .. } => (
                number(&memory.join("memory.usage_in_bytes"))?,
                field(&stat, "total_inactive_file"),
                match dir("cpuacct") {
                    Some(cpu) => number(&cpu.join("cpuacct.usage"))?,
                    None => 0,
                },
            ),
        };
        Ok(Some(Stats {
            cpu_usage_ns,
            memory_usage_bytes: usage,
            memory_working_set_bytes: usage.saturating_sub(inactive.unwrap_or(0)),
            task_count: number(&pids.join("pids.current"))?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::field;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "oom 3\noom_kill 2\noom_group_kill x\n";
        assert_eq!(field(text, "oom_kill"), Some(2));
        assert_eq!(field(text, "oom_group_kill"), None);
        assert_eq!(field(text, "kill"), None);
    }
}
