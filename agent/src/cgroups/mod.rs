//! Cgroups of pods: limits (pure, [`limits`]), and the directories that carry them.
//!
//! ```text
//! <root>/gantry ─┬─ guaranteed ─┬─ pod<uid> ─┬─ <container>   (joined by gantry-rt's libcontainer)
//!                ├─ burstable  ─┘            └─ ...
//!                └─ besteffort
//! ```
//! The same tree stands in every v1 hierarchy with controllers, or once on v2. The agent makes all
//! four levels and writes their limits ([`settings`]); the runtime joins the leaves.
//!
//! Invariants:
//! * nothing outside `/gantry` is created, limited, killed or removed. The one exception: on v2,
//!   controllers are enabled in the root's `cgroup.subtree_control`, never disabled;
//! * paths handed out start with `/gantry/` and are relative to each hierarchy's root;
//! * every method is idempotent; removal waits for zombies, up to 10 s, then says who is left.
//!
//! v2's rule that a cgroup with children has no processes of its own spares the real root, so the
//! agent may run there (a small VM) as well as in a service's cgroup.

mod ahead;
mod apply;
pub mod cpu_pinning;
pub mod detect;
pub mod held;
mod inspect;
pub mod limits;
mod pins;
pub mod requests;
pub mod settings;
pub mod stats;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use detect::Layout;
pub use inspect::Lack;
pub use limits::{Limits, Policy, QosClass};
pub use stats::Stats;

use crate::ids::PodUid;

/// Our subtree in every hierarchy.
pub const ROOT: &str = "/gantry";
/// How long a removal waits for processes to die and be reaped.
const REMOVE_PATIENCE: Duration = Duration::from_secs(10);
/// Enabled on v2 where the kernel has them.
const WANTED: [&str; 6] = ["cpu", "memory", "pids", "cpuset", "io", "hugetlb"];
/// Where the kernel offers these, pods must get them: their limits are held by them.
const REQUIRED: [&str; 3] = ["cpu", "memory", "pids"];

/// Why a cgroup could not be made, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Nothing mounted.
    #[error("no cgroup file system is mounted; run: mount -t cgroup2 none /sys/fs/cgroup")]
    NotMounted,
    /// A controller is missing that no pod may be without.
    #[error("cgroup controller {name:?} is missing: {loss}; to mend it: {remedy}")]
    MissingController {
        /// `devices`.
        name: String,
        /// What that means.
        loss: String,
        /// What to do.
        remedy: String,
    },
    /// A limit that must hold, and no controller for it.
    #[error("{path}: {what} cannot be held on this node: {lack}")]
    NotHeld {
        /// The cgroup.
        path: String,
        /// `a memory limit`.
        what: &'static str,
        /// What is missing, and what to do.
        lack: String,
    },
    /// The kernel does not pass a controller on to pods.
    #[error(
        "cgroup controller {name:?} cannot be enabled for what is below {dir}: {source}; if \
         processes are in that cgroup itself, run the agent in a systemd unit with Delegate=yes and \
         DelegateSubgroup=agent, or move them to a cgroup below"
    )]
    NotEnabled {
        /// `cpu`, `memory` or `pids`.
        name: &'static str,
        /// The cgroup.
        dir: String,
        /// The kernel's error.
        source: Box<CgroupError>,
    },
    /// Not below our own root.
    #[error("cgroup path {0:?}: want a path below /gantry without '..'")]
    ForeignPath(String),
    /// A Guaranteed container wants whole CPUs and there are not enough.
    #[error(
        "{count} exclusive CPUs are not free: CPUs {shared} are shared, of which some stay so; \
         remove another Guaranteed pod, or ask for a fraction of a CPU"
    )]
    NoExclusiveCpus {
        /// What it asks for.
        count: usize,
        /// The shared CPUs.
        shared: String,
    },
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
    lacks: Vec<Lack>,
    policy: Policy,
    /// Bytes of huge pages by page size; empty where they cannot be limited.
    hugepages: BTreeMap<u64, u64>,
    /// Pods made since the start and what they request: a QoS level gets their sum.
    requests: Mutex<BTreeMap<PodUid, Requested>>,
    pins: Mutex<pins::Pins>,
    /// Containers' cgroups made in advance, with what they were given.
    ready: Mutex<BTreeMap<String, Limits>>,
}

/// What one pod adds to its QoS level.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Requested {
    class: QosClass,
    cpu_millicores: u64,
    memory_min_bytes: u64,
    memory_low_bytes: u64,
}

impl Cgroups {
    /// Looks at the mount table and at what each hierarchy offers.
    ///
    /// # Errors
    /// No cgroups at all, or containers would open any device.
    pub fn detect(policy: Policy) -> Result<Self, CgroupError> {
        Self::detect_at(ROOT, policy)
    }

    fn detect_at(base: &str, policy: Policy) -> Result<Self, CgroupError> {
        let table = tree::read(Path::new("/proc/self/mountinfo"))?.unwrap_or_default();
        let layout = detect::parse(&table).ok_or(CgroupError::NotMounted)?;
        let lacks = inspect::inspect(&layout)?;
        let hugepages = match lacks.iter().any(|l| l.controller == Some("hugetlb")) {
            false => inspect::hugepages(Path::new("/sys/kernel/mm/hugepages")),
            true => BTreeMap::new(),
        };
        Ok(Self {
            shared: Arc::new(Shared {
                layout,
                base: base.to_owned(),
                lacks,
                policy,
                hugepages,
                requests: Mutex::default(),
                pins: Mutex::default(),
                ready: Mutex::default(),
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

    /// What does not work on this machine; empty when all does.
    pub fn lacks(&self) -> &[Lack] {
        &self.shared.lacks
    }

    /// Whether this machine limits with a controller, by its name on v2.
    pub fn has(&self, controller: &str) -> bool {
        let missing = |lack: &Lack| lack.controller == Some(controller);
        !self.shared.lacks.iter().any(missing)
    }

    /// What the operator has set for all pods.
    pub fn policy(&self) -> &Policy {
        &self.shared.policy
    }

    /// Bytes of huge pages that pods may ask for, by page size.
    pub fn hugepages(&self) -> &BTreeMap<u64, u64> {
        &self.shared.hugepages
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
        limits: &Limits,
    ) -> Result<String, CgroupError> {
        let (uid, limits) = (uid.clone(), limits.clone());
        self.blocking(move |this| this.ensure_pod_blocking(&uid, qos, &limits))
            .await
    }

    /// Makes a container's cgroup below its pod's and writes its limits, before its first process
    /// or while it runs.
    pub async fn ensure_container(
        &self,
        pod_path: &str,
        name: &str,
        limits: &Limits,
    ) -> Result<String, CgroupError> {
        let (path, limits) = (format!("{pod_path}/{name}"), limits.clone());
        if self.take_ready(&path, &limits)? {
            return Ok(path);
        }
        self.blocking(move |this| {
            this.ensure_container_blocking(&path, &limits)?;
            Ok(path)
        })
        .await
    }

    /// Kills what is left in the pod's cgroups, of whatever class, and removes them.
    pub async fn remove_pod(&self, uid: &PodUid) -> Result<(), CgroupError> {
        let uid = uid.clone();
        self.blocking(move |this| {
            for qos in QosClass::ALL {
                let path = this.pod_path(&uid, qos);
                this.forget_ready(&path);
                this.remove_blocking(&path)?;
            }
            this.requests().remove(&uid);
            this.unpin_blocking(&uid)?;
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
        self.limit_all_pods()?;
        self.weigh_levels()?;
        self.restore_pins()
    }

    fn ensure_pod_blocking(
        &self,
        uid: &PodUid,
        qos: QosClass,
        limits: &Limits,
    ) -> Result<String, CgroupError> {
        let path = self.pod_path(uid, qos);
        let dirs = self.dirs(&path)?;
        if dirs.iter().any(|d| !d.parent().is_some_and(Path::is_dir)) {
            self.ensure_root_blocking()?;
        }
        self.ensure_dir(&path)?;
        self.write_limits(&path, limits)?;
        let requested = Requested {
            class: qos,
            cpu_millicores: limits.cpu_request_millicores,
            memory_min_bytes: limits.memory_min_bytes,
            memory_low_bytes: limits.memory_low_bytes,
        };
        if self.requests().insert(uid.clone(), requested) != Some(requested) {
            self.weigh_levels()?;
        }
        Ok(path)
    }

    fn ensure_container_blocking(&self, path: &str, limits: &Limits) -> Result<(), CgroupError> {
        self.ensure_leaf(path)?;
        self.write_limits(path, limits)?;
        self.pin_blocking(path, limits.exclusive_cpus)
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

    /// A container's cgroup. On v2 it enables nothing for children: it has processes of its own.
    fn ensure_leaf(&self, path: &str) -> Result<(), CgroupError> {
        self.dirs(path)?;
        match &self.shared.layout {
            Layout::V2 { root } => tree::mkdir(&join(root, path)),
            Layout::V1 { .. } => self.ensure_dir(path),
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

    fn requests(&self) -> std::sync::MutexGuard<'_, BTreeMap<PodUid, Requested>> {
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
        if let (true, Err(source)) = (REQUIRED.contains(&name), result) {
            return Err(CgroupError::NotEnabled {
                name,
                dir: dir.display().to_string(),
                source: Box::new(source),
            });
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

#[cfg(test)]
mod tests;
