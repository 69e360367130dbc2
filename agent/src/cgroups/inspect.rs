//! What this machine's cgroups lack: an error when limits could not be held at all, else one
//! sentence for each thing that is missing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{CgroupError, Layout, REQUIRED, tree};

/// Controllers that pods can do without, and what they lose.
const OPTIONAL: [(&str, &str); 3] = [
    ("cpuset", "no CPU pinning"),
    ("io", "no I/O limits"),
    (
        "hugetlb",
        "huge pages cannot be limited, so this node offers none",
    ),
];

/// Bytes of huge pages of this machine by page size, from `/sys/kernel/mm/hugepages`.
pub fn hugepages(directory: &Path) -> BTreeMap<u64, u64> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let one = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        let kib = name
            .to_str()?
            .strip_prefix("hugepages-")?
            .strip_suffix("kB")?;
        let size = kib.parse::<u64>().ok()?.checked_mul(1024)?;
        let count = std::fs::read_to_string(entry.path().join("nr_hugepages")).ok()?;
        Some((size, size.saturating_mul(count.trim().parse().ok()?)))
    };
    entries.filter_map(one).collect()
}

pub(super) fn inspect_v2(root: &Path) -> Result<Vec<String>, CgroupError> {
    let file = root.join("cgroup.controllers");
    let offered = tree::read(&file)?.unwrap_or_default();
    let offered: BTreeSet<&str> = offered.split_whitespace().collect();
    for name in REQUIRED {
        if !offered.contains(name) {
            return Err(CgroupError::MissingController {
                name: name.to_owned(),
                place: file.display().to_string(),
                hint: missing_hint(name),
            });
        }
    }
    let mut degraded = Vec::new();
    if root.join("cgroup.type").exists() {
        degraded.push(format!(
            "{} is not the machine's root cgroup: controllers can only be enabled while no process \
             is in it",
            root.display()
        ));
    }
    if !Path::new("/proc/pressure/memory").exists() {
        degraded.push("no pressure information (PSI): boot with psi=1".to_owned());
    }
    for (name, loss) in OPTIONAL {
        if !offered.contains(name) {
            degraded.push(format!("cgroup controller {name:?} is not there: {loss}"));
        }
    }
    Ok(degraded)
}

pub(super) fn inspect_v1(layout: &Layout) -> Result<Vec<String>, CgroupError> {
    for name in REQUIRED {
        if layout.root_of(name).is_none() {
            return Err(CgroupError::MissingController {
                name: name.to_owned(),
                place: "/proc/self/mountinfo".to_owned(),
                hint: missing_hint(name),
            });
        }
    }
    let mut degraded = vec![
        "cgroup v1: no memory.min, memory.low and memory.high: requests protect no memory"
            .to_owned(),
        "cgroup v1: no memory.oom.group: an OOM kill takes one process, not its whole container"
            .to_owned(),
        "cgroup v1: no pressure information (PSI) per pod".to_owned(),
        "cgroup v1: no cgroup.kill, so processes are killed one by one".to_owned(),
    ];
    for (name, loss) in OPTIONAL {
        // blkio limits are not set on v1 either way.
        if name != "io" && layout.root_of(name).is_none() {
            degraded.push(format!("cgroup controller {name:?} is not mounted: {loss}"));
        }
    }
    if layout.unified().is_none() {
        degraded.push(
            "no cgroup2 mounted: socket load balancing has nowhere to attach; run: \
             mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
                .to_owned(),
        );
    }
    if layout.root_of("freezer").is_none() {
        degraded.push("cgroup v1 without freezer: pods cannot be paused".to_owned());
    }
    Ok(degraded)
}

fn missing_hint(name: &str) -> String {
    match name {
        "memory" => "boot with cgroup_enable=memory swapaccount=1".to_owned(),
        _ => format!(
            "boot with a kernel that has it, or mount it: mount -t cgroup -o {name} none \
             /sys/fs/cgroup/{name}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_are_counted_by_size() {
        let directory = tempfile::tempdir().unwrap();
        for (name, count) in [("hugepages-2048kB", "3\n"), ("hugepages-1048576kB", "0\n")] {
            let one = directory.path().join(name);
            std::fs::create_dir(&one).unwrap();
            std::fs::write(one.join("nr_hugepages"), count).unwrap();
        }
        std::fs::create_dir(directory.path().join("other")).unwrap();
        let want = BTreeMap::from([(2 << 20, 6 << 20), (1 << 30, 0)]);
        assert_eq!(hugepages(directory.path()), want);
        assert!(hugepages(Path::new("/no/such/directory")).is_empty());
    }
}
