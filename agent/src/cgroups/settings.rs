//! Limits as the kernel's files, one [`Setting`] each, for both cgroup versions. Pure.
//!
//! Order matters and is kept by the writer: burst goes to 0 before the quota changes (the kernel
//! refuses a quota below the burst), the period comes before the quota it is judged against, and
//! the memory limit before that of memory and swap together.
//!
//! What v1 cannot say is left out here and named by [`super::Cgroups::lacks`].

use std::collections::BTreeMap;

use super::limits::{CPU_PERIOD_US, Limits, cpu_weight};

/// One write: which controller's hierarchy (v1) or directory (v2), which file, what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Setting {
    /// `cpu`, `memory`, `pids` or `hugetlb`.
    pub controller: &'static str,
    /// The file's name.
    pub file: String,
    /// What is written.
    pub value: String,
    /// The file may be missing: an older kernel, or nothing is to be limited.
    pub optional: bool,
}

fn setting(controller: &'static str, file: &str, value: impl ToString) -> Setting {
    Setting {
        controller,
        file: file.to_owned(),
        value: value.to_string(),
        optional: false,
    }
}

impl Setting {
    fn optional_if(mut self, optional: bool) -> Self {
        self.optional = optional;
        self
    }
}

/// The kernel's name of a page size: `2MB`, `1GB`, `64KB`.
pub fn page_size_name(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 => format!("{}GB", b >> 30),
        b if b >= 1 << 20 => format!("{}MB", b >> 20),
        b => format!("{}KB", b >> 10),
    }
}

/// One setting per page size of the machine and per size asked for.
fn hugepages(limits: &Limits, sizes: &[u64], suffix: &str) -> Vec<Setting> {
    let mut wanted: BTreeMap<u64, u64> = sizes.iter().map(|size| (*size, 0)).collect();
    wanted.extend(limits.hugepages.iter().map(|(size, bytes)| (*size, *bytes)));
    wanted
        .into_iter()
        .map(|(size, bytes)| {
            let file = format!("hugetlb.{}.{suffix}", page_size_name(size));
            setting("hugetlb", &file, bytes).optional_if(bytes == 0)
        })
        .collect()
}

/// The files of the unified hierarchy.
///
/// * `page_sizes` – sizes of huge pages that the machine has, bytes.
pub fn settings_v2(limits: &Limits, page_sizes: &[u64]) -> Vec<Setting> {
    let max = |v: Option<u64>| v.map_or_else(|| "max".to_owned(), |v| v.to_string());
    let quota = format!("{} {CPU_PERIOD_US}", max(limits.cpu_quota_us));
    let no_quota = limits.cpu_quota_us.is_none();
    let mut all = vec![
        setting("cpu", "cpu.weight", cpu_weight(limits.cpu_shares)),
        setting("cpu", "cpu.max.burst", 0).optional_if(true),
        setting("cpu", "cpu.max", quota).optional_if(no_quota),
        setting("cpu", "cpu.max.burst", limits.cpu_burst_us).optional_if(true),
        setting("memory", "memory.min", limits.memory_min_bytes).optional_if(true),
        setting("memory", "memory.low", limits.memory_low_bytes).optional_if(true),
        setting("memory", "memory.high", max(limits.memory_high_bytes)),
        setting("memory", "memory.max", max(limits.memory_limit_bytes)),
        // No pod swaps: its limit would mean something else. Without swap there is no such file.
        setting("memory", "memory.swap.max", 0).optional_if(true),
        setting("memory", "memory.oom.group", u8::from(limits.oom_group)).optional_if(true),
        setting("pids", "pids.max", max(limits.pids_max)).optional_if(limits.pids_max.is_none()),
    ];
    all.extend(hugepages(limits, page_sizes, "max"));
    all
}

/// The files of the v1 hierarchies; `page_sizes` as above.
pub fn settings_v1(limits: &Limits, page_sizes: &[u64]) -> Vec<Setting> {
    let or = |v: Option<u64>, none: &str| v.map_or_else(|| none.to_owned(), |v| v.to_string());
    let no_quota = limits.cpu_quota_us.is_none();
    let memory = or(limits.memory_limit_bytes, "-1");
    let mut all = vec![
        setting("cpu", "cpu.shares", limits.cpu_shares),
        setting("cpu", "cpu.cfs_burst_us", 0).optional_if(true),
        setting("cpu", "cpu.cfs_period_us", CPU_PERIOD_US).optional_if(no_quota),
        setting("cpu", "cpu.cfs_quota_us", or(limits.cpu_quota_us, "-1")).optional_if(no_quota),
        setting("cpu", "cpu.cfs_burst_us", limits.cpu_burst_us).optional_if(true),
        // Swapped out only when nothing else is left; the two limits below are the ceiling.
        setting("memory", "memory.swappiness", 0).optional_if(true),
        setting("memory", "memory.limit_in_bytes", &memory),
        // Memory and swap together: none of it may be swap. Absent without swap accounting.
        setting("memory", "memory.memsw.limit_in_bytes", &memory).optional_if(true),
        setting("pids", "pids.max", or(limits.pids_max, "max"))
            .optional_if(limits.pids_max.is_none()),
    ];
    all.extend(hugepages(limits, page_sizes, "limit_in_bytes"));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(settings: Vec<Setting>) -> Vec<String> {
        settings
            .into_iter()
            .map(|s| format!("{}={}", s.file, s.value))
            .collect()
    }

    fn limits() -> Limits {
        Limits {
            cpu_shares: 512,
            cpu_quota_us: Some(50_000),
            cpu_burst_us: 25_000,
            memory_limit_bytes: Some(1 << 20),
            memory_low_bytes: 4096,
            oom_group: true,
            hugepages: [(2 << 20, 4 << 20)].into(),
            cpu_request_millicores: 500,
            ..Limits::default()
        }
    }

    #[test]
    fn settings_of_v2_are_one_file_each_in_an_order_the_kernel_takes() {
        assert_eq!(
            show(settings_v2(&limits(), &[2 << 20, 1 << 30])),
            [
                "cpu.weight=59",
                "cpu.max.burst=0",
                "cpu.max=50000 100000",
                "cpu.max.burst=25000",
                "memory.min=0",
                "memory.low=4096",
                "memory.high=max",
                "memory.max=1048576",
                "memory.swap.max=0",
                "memory.oom.group=1",
                "pids.max=max",
                "hugetlb.2MB.max=4194304",
                "hugetlb.1GB.max=0",
            ]
        );
    }

    #[test]
    fn settings_of_v1_are_one_file_each_in_an_order_the_kernel_takes() {
        assert_eq!(
            show(settings_v1(&limits(), &[])),
            [
                "cpu.shares=512",
                "cpu.cfs_burst_us=0",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=50000",
                "cpu.cfs_burst_us=25000",
                "memory.swappiness=0",
                "memory.limit_in_bytes=1048576",
                "memory.memsw.limit_in_bytes=1048576",
                "pids.max=max",
                "hugetlb.2MB.limit_in_bytes=4194304",
            ]
        );
    }

    #[test]
    fn only_what_limits_nothing_may_be_missing() {
        for setting in settings_v2(&limits(), &[1 << 30]) {
            let needed = ["cpu.weight", "cpu.max", "memory.high", "memory.max"];
            let needed = needed.contains(&setting.file.as_str()) || setting.file.contains("2MB");
            assert_eq!(setting.optional, !needed, "{}", setting.file);
        }
    }

    #[test]
    fn page_sizes_have_the_kernels_names() {
        assert_eq!(
            [64 << 10, 2 << 20, 1 << 30].map(page_size_name),
            ["64KB", "2MB", "1GB"]
        );
    }
}
