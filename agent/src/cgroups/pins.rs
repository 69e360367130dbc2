//! Exclusive CPUs in the kernel's cpusets; [`super::cpu_pinning`] decides.
//!
//! ```text
//! /gantry             all CPUs
//!   guaranteed        all CPUs;  a container: its own, or the shared ones
//!   burstable         the shared ones, inherited below
//!   besteffort        the shared ones, inherited below: also the record of what is shared
//! ```
//! A restarted agent reads back who holds what: a Guaranteed container whose CPUs are not among
//! the shared ones. The shared set shrinks before a container gets CPUs of its own, and grows
//! after one has given them up. Without the policy, every set is put back to all CPUs once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::cpu_pinning::{self, Assignment, ContainerKey, CpuSet};
use super::{CgroupError, Cgroups, Layout, QosClass, join, tree};
use crate::ids::PodUid;

const FILE: &str = "cpuset.cpus";

/// What this agent knows of exclusive CPUs; read from the kernel at the first use.
#[derive(Debug, Default)]
pub(super) struct Pins {
    wanted: BTreeMap<ContainerKey, usize>,
    held: BTreeMap<ContainerKey, CpuSet>,
    loaded: bool,
}

impl Cgroups {
    /// Gives a container its exclusive CPUs, or (`count` 0) the shared ones. The container's cgroup
    /// exists. Does nothing where the machine has no cpusets.
    pub(super) fn pin_blocking(&self, path: &str, count: usize) -> Result<(), CgroupError> {
        let level = format!("{}/{}/", self.shared.base, QosClass::Guaranteed.dir());
        let has_cpusets = self.has("cpuset");
        let Some(key) = key_of(path).filter(|_| path.starts_with(&level) && has_cpusets) else {
            return Ok(());
        };
        if !self.shared.policy.exclusive_cpus {
            return Ok(());
        }
        let mut pins = self.pins();
        self.load(&mut pins)?;
        let known = pins.wanted.get(&key).copied().unwrap_or(0);
        if known == count && (count == 0 || pins.held.contains_key(&key)) {
            return self.write_pin(path, &pins.held, &key);
        }
        match count {
            0 => pins.wanted.remove(&key),
            count => pins.wanted.insert(key.clone(), count),
        };
        let assignment = self.assignment(&pins)?;
        if assignment.refused.contains(&key) {
            pins.wanted.remove(&key);
            return Err(CgroupError::NoExclusiveCpus {
                count,
                shared: cpu_pinning::show(&assignment.shared),
            });
        }
        pins.held = assignment.exclusive.clone();
        self.write_assignment(&assignment)
    }

    /// A pod has gone: its CPUs are everybody's again.
    pub(super) fn unpin_blocking(&self, uid: &PodUid) -> Result<(), CgroupError> {
        let mut pins = self.pins();
        if !pins.wanted.keys().any(|(pod, _)| pod == uid) {
            return Ok(());
        }
        pins.wanted.retain(|(pod, _), _| pod != uid);
        let assignment = self.assignment(&pins)?;
        pins.held = assignment.exclusive.clone();
        self.write_assignment(&assignment)
    }

    /// At the agent's start: what an earlier one has pinned stays, or ends with the policy.
    pub(super) fn restore_pins(&self) -> Result<(), CgroupError> {
        if !self.has("cpuset") {
            return Ok(());
        }
        let mut pins = self.pins();
        self.load(&mut pins)?;
        if !self.shared.policy.exclusive_cpus {
            pins.wanted.clear();
            pins.held.clear();
            let online = self.online()?;
            if self.shared_record() == Some(online.clone()) || self.shared_record().is_none() {
                return Ok(()); // nobody has ever pinned anything
            }
        }
        let assignment = self.assignment(&pins)?;
        self.write_assignment(&assignment)
    }

    /// Reads who holds what. A pod that has gone meanwhile gives its CPUs back at its removal.
    fn load(&self, pins: &mut Pins) -> Result<(), CgroupError> {
        if std::mem::replace(&mut pins.loaded, true) {
            return Ok(());
        }
        let shared = self.shared_record().unwrap_or(self.online()?);
        for dir in self.containers(QosClass::Guaranteed) {
            let Some(key) = dir.to_str().and_then(key_of) else {
                continue;
            };
            let set = read_set(&dir).unwrap_or_default();
            if !set.is_empty() && set.is_disjoint(&shared) {
                pins.wanted.insert(key.clone(), set.len());
                pins.held.insert(key, set);
            }
        }
        Ok(())
    }

    fn assignment(&self, pins: &Pins) -> Result<Assignment, CgroupError> {
        let online = self.online()?;
        let order = by_core(&online);
        let reserved = self.shared.policy.reserved_cpu_count;
        Ok(cpu_pinning::assign(
            &order,
            reserved,
            &pins.wanted,
            &pins.held,
        ))
    }

    /// CPUs that `/gantry` may use.
    fn online(&self) -> Result<CpuSet, CgroupError> {
        let Some(root) = self.shared.layout.root_of("cpuset") else {
            return Ok(CpuSet::new());
        };
        let file = match self.shared.layout {
            Layout::V2 { .. } => "cpuset.cpus.effective",
            Layout::V1 { .. } => FILE,
        };
        let text = tree::read(&join(root, &self.shared.base).join(file))?.unwrap_or_default();
        Ok(cpu_pinning::parse(&text).unwrap_or_default())
    }

    /// The shared CPUs as the lowest level has them; none where nothing was ever written.
    fn shared_record(&self) -> Option<CpuSet> {
        read_set(&self.level(QosClass::BestEffort)?).filter(|set| !set.is_empty())
    }

    fn level(&self, class: QosClass) -> Option<PathBuf> {
        let root = self.shared.layout.root_of("cpuset")?;
        Some(join(root, &format!("{}/{}", self.shared.base, class.dir())))
    }

    /// Cgroups of containers of a class, in the cpuset hierarchy.
    fn containers(&self, class: QosClass) -> Vec<PathBuf> {
        let children = |dir: &Path| -> Vec<PathBuf> {
            let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
            let dirs = entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
            dirs.map(|e| e.path()).collect()
        };
        let pods = self.level(class).map(|level| children(&level));
        pods.into_iter()
            .flatten()
            .flat_map(|pod| children(&pod))
            .collect()
    }

    /// Only one container: nothing has changed for the others.
    fn write_pin(
        &self,
        path: &str,
        held: &BTreeMap<ContainerKey, CpuSet>,
        key: &ContainerKey,
    ) -> Result<(), CgroupError> {
        let Some(root) = self.shared.layout.root_of("cpuset") else {
            return Ok(());
        };
        let set = match held.get(key) {
            Some(set) => set.clone(),
            None => match self.shared_record() {
                Some(shared) => shared,
                None => return Ok(()), // nothing is pinned: everybody has all
            },
        };
        let file = join(root, path).join(FILE);
        tree::write(&file, &cpu_pinning::show(&set))
    }

    fn write_assignment(&self, assignment: &Assignment) -> Result<(), CgroupError> {
        let shared = cpu_pinning::show(&assignment.shared);
        for class in [QosClass::Burstable, QosClass::BestEffort] {
            let Some(level) = self.level(class).filter(|l| l.is_dir()) else {
                continue;
            };
            if self.is_v2() {
                tree::write(&level.join(FILE), &shared)?;
            } else {
                // v1 wants children within their parent at every moment: shrink from below, grow
                // from above. One of the two passes does nothing.
                let dirs = tree::walk(&level);
                for dir in dirs.iter().rev() {
                    let _ = tree::write(&dir.join(FILE), &shared);
                }
                for dir in &dirs {
                    if dir.is_dir() {
                        tree::write(&dir.join(FILE), &shared)?;
                    }
                }
            }
        }
        for dir in self.containers(QosClass::Guaranteed) {
            let own = dir.to_str().and_then(key_of);
            let set = own.and_then(|key| assignment.exclusive.get(&key));
            let text = set.map_or_else(|| shared.clone(), cpu_pinning::show);
            match tree::write(&dir.join(FILE), &text) {
                Err(error) if dir.is_dir() => return Err(error),
                _ => {} // it has gone while we wrote
            }
        }
        Ok(())
    }

    fn pins(&self) -> std::sync::MutexGuard<'_, Pins> {
        let lock = self.shared.pins.lock();
        lock.unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// `.../pod<uid>/<container>`.
fn key_of(path: &str) -> Option<ContainerKey> {
    let mut parts = path.rsplit('/');
    let container = parts.next()?.to_owned();
    let uid = PodUid::new(parts.next()?.strip_prefix("pod")?).ok()?;
    Some((uid, container))
}

fn read_set(dir: &Path) -> Option<CpuSet> {
    let text = tree::read(&dir.join(FILE)).ok()??;
    cpu_pinning::parse(&text)
}

/// Siblings of one core beside each other, so that a container gets whole cores where it can.
fn by_core(online: &CpuSet) -> Vec<u32> {
    let number = |cpu: u32, file: &str| -> u32 {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/{file}");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    let mut order: Vec<u32> = online.iter().copied().collect();
    order.sort_by_key(|cpu| {
        (
            number(*cpu, "physical_package_id"),
            number(*cpu, "core_id"),
            *cpu,
        )
    });
    order
}
