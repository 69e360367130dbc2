//! Limits written into the kernel's files, for pods, containers and the levels above them.

use std::io::ErrorKind;
use std::path::PathBuf;

use super::limits::{self, Limits, QosClass};
use super::settings::{self, Setting};
use super::{CgroupError, Cgroups, Layout, join, tree};

impl Cgroups {
    /// Writes all limits of one cgroup that exists.
    pub(super) fn write_limits(&self, path: &str, limits: &Limits) -> Result<(), CgroupError> {
        if let Some((what, lack)) = limits.unheld(&self.shared.lacks) {
            return Err(CgroupError::NotHeld {
                path: path.to_owned(),
                what,
                lack: lack.to_string(),
            });
        }
        let sizes: Vec<u64> = self.shared.hugepages.keys().copied().collect();
        let all = match self.shared.layout {
            Layout::V2 { .. } => settings::settings_v2(limits, &sizes),
            Layout::V1 { .. } => settings::settings_v1(limits, &sizes),
        };
        for (index, setting) in all.iter().enumerate() {
            let Some(file) = self.file_of(path, setting) else {
                continue;
            };
            let written = tree::write(&file, &setting.value);
            match (written, all.get(index + 1)) {
                // v1 refuses a memory limit above that of memory and swap together: raise that
                // one first, then this.
                (Err(error), Some(next))
                    if next.file == "memory.memsw.limit_in_bytes" && is_invalid(&error) =>
                {
                    if let Some(both) = self.file_of(path, next) {
                        tree::write(&both, &next.value)?;
                    }
                    tree::write(&file, &setting.value)?;
                }
                (written, _) => written?,
            }
        }
        Ok(())
    }

    /// Where a setting goes; none when it need not be written on this machine.
    fn file_of(&self, path: &str, setting: &Setting) -> Option<PathBuf> {
        if !self.has(setting.controller) {
            return None;
        }
        let root = self.shared.layout.root_of(setting.controller)?;
        let file = join(root, path).join(&setting.file);
        (!setting.optional || file.exists()).then_some(file)
    }

    /// `/gantry` as a whole: what the node keeps back is out of the pods' reach.
    pub(super) fn limit_all_pods(&self) -> Result<(), CgroupError> {
        let policy = &self.shared.policy;
        let cpus = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        let millicores = match policy.cpu_allocatable_millicores {
            0 => cpus * 1000,
            millicores => millicores,
        };
        let base = &self.shared.base;
        let used = self.stats(base)?.unwrap_or_default();
        let wanted = Some(policy.memory_allocatable_bytes);
        let wanted = wanted.filter(|bytes| *bytes > 0 && self.has("memory"));
        // A limit below what runs already would have the kernel kill at once: eviction is kinder.
        let memory_limit_bytes = wanted.filter(|bytes| used.memory_working_set_bytes < *bytes);
        if wanted != memory_limit_bytes {
            tracing::warn!(
                used_bytes = used.memory_working_set_bytes,
                limit_bytes = wanted,
                "pods use more than the node's allocatable memory: the limit of all pods is not \
                 set until the agent's next start"
            );
        }
        let limits = Limits {
            cpu_shares: limits::cpu_shares(millicores),
            memory_limit_bytes,
            pids_max: policy.pids_allocatable,
            ..Limits::default()
        };
        self.write_limits(base, &limits)
    }

    /// A level weighs what its pods request, BestEffort the minimum, as the kubelet's do; on v2 it
    /// passes their memory protection on, which has no effect below a level without.
    pub(super) fn weigh_levels(&self) -> Result<(), CgroupError> {
        let (mut min_bytes, mut low_bytes) = (0u64, 0u64);
        for class in QosClass::ALL {
            let (mut cpu, mut min, mut low) = (0u64, 0u64, 0u64);
            for one in self.requests().values().filter(|r| r.class == class) {
                cpu = cpu.saturating_add(one.cpu_millicores);
                min = min.saturating_add(one.memory_min_bytes);
                low = low.saturating_add(one.memory_low_bytes);
            }
            let level = format!("{}/{}", self.shared.base, class.dir());
            self.write_shares(&level, limits::cpu_shares(cpu))?;
            self.write_protection(&level, min, low)?;
            min_bytes = min_bytes.saturating_add(min);
            low_bytes = low_bytes.saturating_add(low);
        }
        self.write_protection(&self.shared.base, min_bytes, low_bytes)
    }

    fn write_protection(&self, path: &str, min: u64, low: u64) -> Result<(), CgroupError> {
        let Layout::V2 { root } = &self.shared.layout else {
            return Ok(());
        };
        let dir = join(root, path);
        if !self.has("memory") || !dir.is_dir() {
            return Ok(()); // removed by `down` while the last pod went
        }
        tree::write(&dir.join("memory.min"), &min.to_string())?;
        tree::write(&dir.join("memory.low"), &low.to_string())
    }

    pub(super) fn write_shares(&self, path: &str, shares: u64) -> Result<(), CgroupError> {
        let root = self.shared.layout.root_of("cpu");
        let Some(root) = root.filter(|_| self.has("cpu")) else {
            return Ok(());
        };
        let dir = join(root, path);
        if !dir.is_dir() {
            return Ok(()); // removed by `down` while the last pod went
        }
        match self.shared.layout {
            Layout::V2 { .. } => tree::write(
                &dir.join("cpu.weight"),
                &limits::cpu_weight(shares).to_string(),
            ),
            Layout::V1 { .. } => tree::write(&dir.join("cpu.shares"), &shares.to_string()),
        }
    }
}

fn is_invalid(error: &CgroupError) -> bool {
    matches!(error, CgroupError::Io { source, .. } if source.kind() == ErrorKind::InvalidInput)
}
