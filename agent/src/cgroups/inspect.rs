//! What this machine's cgroups lack: what is missing, what that costs, what to do about it.
//!
//! ```text
//! cgroup.controllers, mount table ─┐
//! /proc/cgroups ───────────────────┴─► Facts ─► judge (pure) ─► [`Lack`]s, or a refusal
//! ```
//! The agent does without any controller for limits: a pod that asks for what cannot be held is
//! told so ([`super::held`]). It refuses to start only where pods would be let into the machine: v1
//! without `devices`, whose rules keep a container from the host's disks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{CgroupError, Layout, tree};

/// One thing that does not work on this machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lack {
    /// The cgroup controller that is missing, when it is one.
    pub controller: Option<&'static str>,
    /// What is missing and what that costs.
    pub what: String,
    /// What to do; empty when there is nothing.
    pub remedy: String,
}

impl std::fmt::Display for Lack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.remedy.is_empty() {
            true => f.write_str(&self.what),
            false => write!(f, "{} (to mend it: {})", self.what, self.remedy),
        }
    }
}

/// A controller as the two versions and the kernel's configuration name it, and what is lost
/// without it.
struct Controller {
    name: &'static str,
    v1: &'static str,
    config: &'static str,
    loss: &'static str,
}

const fn controller(
    name: &'static str,
    v1: &'static str,
    config: &'static str,
    loss: &'static str,
) -> Controller {
    Controller {
        name,
        v1,
        config,
        loss,
    }
}

const CONTROLLERS: [Controller; 6] = [
    controller(
        "memory",
        "memory",
        "CONFIG_MEMCG",
        "pods with a memory limit are not started, and what pods use is not known",
    ),
    controller(
        "cpu",
        "cpu",
        "CONFIG_CGROUP_SCHED and CONFIG_CFS_BANDWIDTH",
        "CPU requests and limits are not held",
    ),
    controller(
        "pids",
        "pids",
        "CONFIG_CGROUP_PIDS",
        "a fork bomb in a pod takes the process ids of the whole machine",
    ),
    controller("cpuset", "cpuset", "CONFIG_CPUSETS", "no CPU pinning"),
    controller("io", "blkio", "CONFIG_BLK_CGROUP", "no I/O limits"),
    controller(
        "hugetlb",
        "hugetlb",
        "CONFIG_CGROUP_HUGETLB",
        "huge pages cannot be limited, so this node offers none",
    ),
];

/// Without it on v1, containers would open any device.
const DEVICES: Controller = controller(
    "devices",
    "devices",
    "CONFIG_CGROUP_DEVICE",
    "containers could open every device of the machine",
);

/// What the machine says of its cgroups.
#[derive(Clone, Debug, Default)]
struct Facts {
    /// Pure v2.
    is_v2: bool,
    /// The hierarchy on v2; for words.
    root: PathBuf,
    /// What can be used: v2's `cgroup.controllers`, or what is mounted on v1.
    offered: BTreeSet<String>,
    /// v2 only: the root shown is a cgroup below the machine's.
    is_below: bool,
    /// v1 only: what a v2 hierarchy beside holds; none when there is no such hierarchy.
    unified: Option<BTreeSet<String>>,
    /// `/proc/cgroups`: of each controller's v1 name the hierarchy's number (0: v2 or none), and
    /// whether it is enabled.
    table: BTreeMap<String, (u32, bool)>,
    /// The kernel measures pressure.
    has_pressure: bool,
}

impl Facts {
    fn read(layout: &Layout) -> Result<Self, CgroupError> {
        let words = |root: &Path| -> Result<BTreeSet<String>, CgroupError> {
            let text = tree::read(&root.join("cgroup.controllers"))?.unwrap_or_default();
            Ok(text.split_whitespace().map(str::to_owned).collect())
        };
        let table = tree::read(Path::new("/proc/cgroups"))?.unwrap_or_default();
        let mut facts = Self {
            table: parse_table(&table),
            has_pressure: Path::new("/proc/pressure/memory").exists(),
            ..Self::default()
        };
        match layout {
            Layout::V2 { root } => {
                facts.is_v2 = true;
                facts.offered = words(root)?;
                facts.is_below = root.join("cgroup.type").exists();
                facts.root.clone_from(root);
            }
            Layout::V1 {
                hierarchies,
                unified,
            } => {
                let mounted = hierarchies.iter().flat_map(|h| h.controllers.clone());
                facts.offered = mounted.collect();
                facts.unified = unified.as_deref().map(words).transpose()?;
            }
        }
        Ok(facts)
    }

    fn lacks(&self, controller: &Controller) -> bool {
        let name = match self.is_v2 {
            true => controller.name,
            false => controller.v1,
        };
        !self.offered.contains(name)
    }

    /// How a missing controller comes back.
    fn remedy(&self, controller: &Controller) -> String {
        let Controller {
            name, v1, config, ..
        } = controller;
        let unified = |set: &BTreeSet<String>| set.contains(*name);
        match self.table.get(*v1) {
            Some((_, false)) => format!(
                "boot with cgroup_enable={v1} on the kernel's command line, and without \
                 cgroup_disable={v1}"
            ),
            Some((1.., true)) if self.is_v2 => format!(
                "a cgroup v1 hierarchy has {v1}: unmount that, or boot with \
                 systemd.unified_cgroup_hierarchy=1"
            ),
            _ if self.is_v2 && self.is_below => format!(
                "the cgroup above {} does not pass it on: write +{name} to that one's \
                 cgroup.subtree_control, or set Delegate=yes in the unit that the agent runs in",
                self.root.display()
            ),
            Some(_) if !self.is_v2 && self.unified.as_ref().is_some_and(unified) => format!(
                "{name} is on the v2 side of this hybrid machine: boot with \
                 systemd.unified_cgroup_hierarchy=1"
            ),
            Some(_) if !self.is_v2 => format!(
                "mkdir -p /sys/fs/cgroup/{v1} && mount -t cgroup -o {v1} {v1} /sys/fs/cgroup/{v1}"
            ),
            _ => format!("use a kernel with {config}"),
        }
    }
}

/// Lines of name, hierarchy, number of cgroups, enabled; the first is a comment.
fn parse_table(text: &str) -> BTreeMap<String, (u32, bool)> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let rows = lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        let (name, hierarchy) = (words.next()?, words.next()?.parse().ok()?);
        Some((name.to_owned(), (hierarchy, words.nth(1)? == "1")))
    });
    rows.collect()
}

fn lack(what: impl Into<String>, remedy: impl Into<String>) -> Lack {
    Lack {
        controller: None,
        what: what.into(),
        remedy: remedy.into(),
    }
}

/// Looks at the machine.
///
/// # Errors
/// Containers would open any device.
pub(super) fn inspect(layout: &Layout) -> Result<Vec<Lack>, CgroupError> {
    judge(&Facts::read(layout)?)
}

fn judge(facts: &Facts) -> Result<Vec<Lack>, CgroupError> {
    if !facts.is_v2 && facts.lacks(&DEVICES) {
        return Err(CgroupError::MissingController {
            name: DEVICES.name.to_owned(),
            loss: DEVICES.loss.to_owned(),
            remedy: facts.remedy(&DEVICES),
        });
    }
    let missing = CONTROLLERS.iter().filter(|controller| {
        // blkio limits are not set on v1 either way.
        facts.lacks(controller) && (facts.is_v2 || controller.name != "io")
    });
    let mut lacks: Vec<Lack> = missing
        .map(|controller| Lack {
            controller: Some(controller.name),
            what: format!(
                "no cgroup controller {:?}: {}",
                controller.name, controller.loss
            ),
            remedy: facts.remedy(controller),
        })
        .collect();
    match facts.is_v2 {
        true => lacks.extend(lacks_of_v2(facts)),
        false => lacks.extend(lacks_of_v1(facts)),
    }
    Ok(lacks)
}

fn lacks_of_v2(facts: &Facts) -> Vec<Lack> {
    let mut lacks = Vec::new();
    if facts.is_below {
        let what = format!(
            "{} is not the machine's root cgroup: controllers can only be enabled while no process \
             is in it",
            facts.root.display()
        );
        lacks.push(lack(what, ""));
    }
    if !facts.has_pressure {
        lacks.push(lack(
            "no pressure information (PSI): eviction knows only how much is free",
            "boot with psi=1",
        ));
    }
    lacks
}

fn lacks_of_v1(facts: &Facts) -> Vec<Lack> {
    let unified = "boot with systemd.unified_cgroup_hierarchy=1";
    let mut lacks = vec![
        lack(
            "cgroup v1: no memory.min, memory.low and memory.high: requests protect no memory",
            unified,
        ),
        lack(
            "cgroup v1: no memory.oom.group: an OOM kill takes one process, not its whole container",
            unified,
        ),
        lack("cgroup v1: no pressure information (PSI) per pod", unified),
        lack(
            "cgroup v1: no cgroup.kill, so processes are killed one by one",
            unified,
        ),
    ];
    if facts.unified.is_none() {
        lacks.push(lack(
            "no cgroup2 mounted: socket load balancing has nowhere to attach",
            "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
        ));
    }
    if !facts.offered.contains("freezer") {
        lacks.push(lack("cgroup v1 without freezer: pods cannot be paused", ""));
    }
    lacks
}

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

#[cfg(test)]
mod tests;
