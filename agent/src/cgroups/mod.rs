//! Cgroups of pods: limits (pure, [`limits`]), and the directories that carry them.
//!
//! ```text
//! <root>/gantry ─┬─ guaranteed ─┬─ pod<uid> ─┬─ <container>   (made by gantry-rt's libcontainer)
//!                ├─ burstable  ─┘            └─ ...
//!                └─ besteffort
//! ```
//! The same tree stands in every v1 hierarchy with controllers, or once on v2. The agent makes the
//! first three levels and limits pods; the runtime makes the leaves.
//!
//! Invariants:
//! * nothing outside `/gantry` is created, limited, killed or removed. The one exception: on v2,
//!   controllers are enabled in the root's `cgroup.subtree_control`, never disabled;
//! * paths handed out start with `/gantry/` and are relative to each hierarchy's root;
//! * every method is idempotent; removal waits for zombies, up to 10 s, then says who is left.
//!
//! v2's rule that a cgroup with children has no processes of its own spares the real root, so the
//! agent may run there (a small VM) as well as in a service's cgroup.

pub mod detect;
pub mod limits;
mod stats;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use detect::Layout;
pub use limits::{PodLimits, QosClass};
pub use stats::Stats;

use crate::ids::PodUid;

/// Our subtree in every hierarchy.
pub const ROOT: &str = "/gantry";
/// How long a removal waits for processes to die and be reaped.
const REMOVE_PATIENCE: Duration = Duration::from_secs(10);
/// Enabled on v2 where the kernel has them.
const WANTED: [&str; 6] = ["cpu", "memory", "pids", "cpuset", "io", "hugetlb"];
/// Limits cannot be held without these.
const REQUIRED: [&str; 3] = ["cpu", "memory", "pids"];

/// Why a cgroup could not be made, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Nothing mounted.
    #[error("no cgroup file system is mounted; run: mount -t cgroup2 none /sys/fs/cgroup")]
    NotMounted,
    /// The kernel does not offer a controller that limits need.
    #[error("cgroup controller {name:?} is missing ({place}): {hint}")]
    MissingController {
        /// `cpu`, `memory` or `pids`.
        name: String,
        /// The file or table that does not name it.
        place: String,
        /// What to do.
        hint: String,
    },
    /// Not below our own root.
    #[error("cgroup path {0:?}: want a path below /gantry without '..'")]
    ForeignPath(String),
    /// SIGKILL did not help within the time: processes in uninterruptible sleep.
    #[error("cgroup {path}: processes {pids:?} do not die (uninterruptible I/O?)")]
    Unkillable {
        /// The cgroup.
        path: String,
        /// Who is left.
        pids: Vec<i32>,
    },
    /// A call failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, to which path.
        context: String,
        /// The error of the call.
        source: std::io::Error,
    },
}

/// The machine's cgroups. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Cgroups {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    layout: Layout,
    /// `/gantry`; tests use a sibling.
    base: String,
    degraded: Vec<String>,
    /// Pods made since the start and the CPU they request: a QoS level weighs their sum.
    requests: Mutex<BTreeMap<PodUid, (QosClass, u64)>>,
}

impl Cgroups {
    /// Looks at the mount table and at what each hierarchy offers.
    ///
    /// # Errors
    /// No cgroups at all, or no `cpu`, `memory` or `pids` controller: limits could not be held.
    pub fn detect() -> Result<Self, CgroupError> {
        Self::detect_at(ROOT)
    }

    fn detect_at(base: &str) -> Result<Self, CgroupError> {
        let table = tree::read(Path::new("/proc/self/mountinfo"))?.unwrap_or_default();
        let layout = detect::parse(&table).ok_or(CgroupError::NotMounted)?;
        let degraded = match &layout {
            Layout::V2 { root } => inspect_v2(root)?,
            Layout::V1 { .. } => inspect_v1(&layout)?,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                layout,
                base: base.to_owned(),
                degraded,
                requests: Mutex::default(),
            }),
        })
    }

    /// The hierarchies found.
    pub fn layout(&self) -> &Layout {
        &self.shared.layout
    }

    /// One pure v2 hierarchy.
    pub fn is_v2(&self) -> bool {
        matches!(self.shared.layout, Layout::V2 { .. })
    }

    /// What does not work on this machine, one sentence each; empty when all does.
    pub fn degraded(&self) -> &[String] {
        &self.shared.degraded
    }

    /// The pod's cgroup, `/gantry/<qos>/pod<uid>`, whether or not it exists.
    pub fn pod_path(&self, uid: &PodUid, qos: QosClass) -> String {
        format!("{}/{}/pod{uid}", self.shared.base, qos.dir())
    }

    /// Makes `/gantry` and its QoS levels, and on v2 enables controllers down to them.
    pub async fn ensure_root(&self) -> Result<(), CgroupError> {
        self.blocking(|this| this.ensure_root_blocking()).await
    }

    /// Makes the pod's cgroup and writes its limits. Returns [`Cgroups::pod_path`].
    pub async fn ensure_pod(
        &self,
        uid: &PodUid,
        qos: QosClass,
        limits: &PodLimits,
    ) -> Result<String, CgroupError> {
        let (uid, limits) = (uid.clone(), limits.clone());
        self.blocking(move |this| this.ensure_pod_blocking(&uid, qos, &limits))
            .await
    }

    /// Kills what is left in the pod's cgroups, of whatever class, and removes them.
    pub async fn remove_pod(&self, uid: &PodUid) -> Result<(), CgroupError> {
        let uid = uid.clone();
        self.blocking(move |this| {
            for qos in QosClass::ALL {
                this.remove_blocking(&this.pod_path(&uid, qos))?;
            }
            this.requests().remove(&uid);
            this.weigh_levels()
        })
        .await
    }

    /// Kills and removes one cgroup with all below it, in every hierarchy.
    pub async fn remove(&self, path: &str) -> Result<(), CgroupError> {
        let path = path.to_owned();
        self.blocking(move |this| this.remove_blocking(&path)).await
    }

    /// Kills and removes everything of ours: the end of `down`.
    pub async fn remove_all(&self) -> Result<(), CgroupError> {
        self.blocking(|this| {
            this.requests().clear();
            this.remove_blocking(&this.shared.base)
        })
        .await
    }

    /// SIGKILL to everything in the cgroup and below; returns when it is empty.
    pub async fn kill(&self, path: &str) -> Result<(), CgroupError> {
        let path = path.to_owned();
        self.blocking(move |this| tree::kill_all(&this.dirs(&path)?, REMOVE_PATIENCE))
            .await
    }

    /// Pids in the cgroup and below, of any hierarchy. Empty when it does not exist.
    pub fn members(&self, path: &str) -> Result<BTreeSet<i32>, CgroupError> {
        Ok(self
            .dirs(path)?
            .iter()
            .flat_map(|d| tree::members(d))
            .collect())
    }

    /// UIDs of pods that have a cgroup here, with their class: what a crash left behind.
    pub fn pods(&self) -> Vec<(PodUid, QosClass)> {
        let mut found = BTreeSet::new();
        for root in self.shared.layout.roots() {
            for qos in QosClass::ALL {
                let level = join(root, &format!("{}/{}", self.shared.base, qos.dir()));
                let entries = std::fs::read_dir(level).into_iter().flatten().flatten();
                found.extend(entries.filter_map(|e| {
                    let name = e.file_name();
                    let uid = PodUid::new(name.to_str()?.strip_prefix("pod")?).ok()?;
                    Some((uid, qos))
                }));
            }
        }
        found.into_iter().collect()
    }

    fn ensure_root_blocking(&self) -> Result<(), CgroupError> {
        let base = &self.shared.base;
        let mut levels = vec![base.clone()];
        levels.extend(QosClass::ALL.map(|q| format!("{base}/{}", q.dir())));
        if let Layout::V2 { root } = &self.shared.layout {
            enable_controllers(root)?;
        }
        for level in &levels {
            self.ensure_dir(level)?;
        }
        let cpus = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        self.write_shares(base, limits::cpu_shares(cpus * 1000))?;
        self.weigh_levels()
    }

    fn ensure_pod_blocking(
        &self,
        uid: &PodUid,
        qos: QosClass,
        limits: &PodLimits,
    ) -> Result<String, CgroupError> {
        let path = self.pod_path(uid, qos);
        let dirs = self.dirs(&path)?;
        if dirs.iter().any(|d| !d.parent().is_some_and(Path::is_dir)) {
            self.ensure_root_blocking()?;
        }
        self.ensure_dir(&path)?;
        let settings = match self.shared.layout {
            Layout::V2 { .. } => limits::settings_v2(limits),
            Layout::V1 { .. } => limits::settings_v1(limits),
        };
        for setting in settings {
            let Some(root) = self.shared.layout.root_of(setting.controller) else {
                continue; // refused by detect()
            };
            let file = join(root, &path).join(setting.file);
            if !file.exists() && is_no_limit(&setting) {
                continue; // e.g. a kernel without CFS bandwidth: there is nothing to lift
            }
            tree::write(&file, &setting.value)?;
        }
        let request = (qos, limits.cpu_request_millicores);
        if self.requests().insert(uid.clone(), request) != Some(request) {
            self.weigh_levels()?;
        }
        Ok(path)
    }

    /// One level of the tree in every hierarchy; its parent exists.
    fn ensure_dir(&self, path: &str) -> Result<(), CgroupError> {
        match &self.shared.layout {
            Layout::V2 { root } => {
                let dir = join(root, path);
                tree::mkdir(&dir)?;
                enable_controllers(&dir)
            }
            Layout::V1 { hierarchies, .. } => {
                for hierarchy in hierarchies {
                    let dir = join(&hierarchy.root, path);
                    tree::mkdir(&dir)?;
                    if hierarchy.controllers.contains("cpuset") {
                        inherit_cpuset(&dir)?;
                    }
                }
                Ok(())
            }
        }
    }

    /// A level weighs what its pods request, BestEffort the minimum, as the kubelet's do.
    fn weigh_levels(&self) -> Result<(), CgroupError> {
        let sum = |of: QosClass| -> u64 {
            let requests = self.requests();
            requests
                .values()
                .filter(|(q, _)| *q == of)
                .map(|(_, millis)| millis)
                .sum()
        };
        for qos in [QosClass::Guaranteed, QosClass::Burstable] {
            let level = format!("{}/{}", self.shared.base, qos.dir());
            self.write_shares(&level, limits::cpu_shares(sum(qos)))?;
        }
        let level = format!("{}/{}", self.shared.base, QosClass::BestEffort.dir());
        self.write_shares(&level, limits::cpu_shares(0))
    }

    fn write_shares(&self, path: &str, shares: u64) -> Result<(), CgroupError> {
        let Some(root) = self.shared.layout.root_of("cpu") else {
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

    fn remove_blocking(&self, path: &str) -> Result<(), CgroupError> {
        let dirs = self.dirs(path)?;
        tree::kill_all(&dirs, REMOVE_PATIENCE)?;
        for dir in &dirs {
            tree::remove(dir, REMOVE_PATIENCE)?;
        }
        Ok(())
    }

    /// The directories of one cgroup, one per hierarchy; refuses what is not ours.
    fn dirs(&self, path: &str) -> Result<Vec<PathBuf>, CgroupError> {
        let base = &self.shared.base;
        let below = path == base || path.strip_prefix(base).is_some_and(|r| r.starts_with('/'));
        if !below || path.split('/').any(|part| part == "..") {
            return Err(CgroupError::ForeignPath(path.to_owned()));
        }
        Ok(self
            .shared
            .layout
            .roots()
            .into_iter()
            .map(|r| join(r, path))
            .collect())
    }

    fn requests(&self) -> std::sync::MutexGuard<'_, BTreeMap<PodUid, (QosClass, u64)>> {
        self.shared
            .requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A cgroup call may take 10 ms (the kernel waits for a grace period) or wait for zombies.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, CgroupError> + Send + 'static,
    ) -> Result<T, CgroupError> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || work(&this))
            .await
            .unwrap_or_else(|e| {
                Err(CgroupError::Io {
                    context: "cgroup task".to_owned(),
                    source: std::io::Error::other(e),
                })
            })
    }
}

fn join(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn is_no_limit(setting: &limits::Setting) -> bool {
    matches!(setting.value.as_str(), "-1" | "max")
        || setting.value.starts_with("max ")
        || setting.file == "cpu.cfs_period_us"
}

/// Adds what is wanted and offered to the children's controllers; what is on stays on.
fn enable_controllers(dir: &Path) -> Result<(), CgroupError> {
    let words = |file: &str| -> Result<BTreeSet<String>, CgroupError> {
        let text = tree::read(&dir.join(file))?.unwrap_or_default();
        Ok(text.split_whitespace().map(str::to_owned).collect())
    };
    let (offered, enabled) = (
        words("cgroup.controllers")?,
        words("cgroup.subtree_control")?,
    );
    for name in WANTED {
        if !offered.contains(name) || enabled.contains(name) {
            continue;
        }
        let result = tree::write(&dir.join("cgroup.subtree_control"), &format!("+{name}"));
        // Optional ones may be refused (cpuset with odd partitions); limits do not need them.
        if REQUIRED.contains(&name) {
            result?;
        }
    }
    Ok(())
}

/// A new v1 cpuset is empty and takes no process: it gets what its parent has.
fn inherit_cpuset(dir: &Path) -> Result<(), CgroupError> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = tree::read(&dir.join(file))?.unwrap_or_default();
        let parent = dir.parent().map(|p| p.join(file));
        if let (true, Some(parent)) = (own.trim().is_empty(), parent) {
            let value = tree::read(&parent)?.unwrap_or_default();
            tree::write(&dir.join(file), value.trim())?;
        }
    }
    Ok(())
}

fn inspect_v2(root: &Path) -> Result<Vec<String>, CgroupError> {
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
    for (name, loss) in [("cpuset", "no CPU pinning"), ("io", "no I/O limits")] {
        if !offered.contains(name) {
            degraded.push(format!("cgroup controller {name:?} is not there: {loss}"));
        }
    }
    Ok(degraded)
}

fn inspect_v1(layout: &Layout) -> Result<Vec<String>, CgroupError> {
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
        "cgroup v1: no memory.high and no memory.min, so no soft memory protection".to_owned(),
        "cgroup v1: no pressure information (PSI) per pod".to_owned(),
        "cgroup v1: no cgroup.kill, so processes are killed one by one".to_owned(),
    ];
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
mod tests;
