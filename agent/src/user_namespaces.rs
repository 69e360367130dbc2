//! User namespaces of pods (`hostUsers: false`): who gets which ids of the host.
//!
//! ```text
//! pod uid ─► allocate ─► /run/gantry/userns/<slot> -> <pod uid>    a link: made whole or not at all
//!                          │ slot 3 = host ids 0x7003_0000 to 0x7003_ffff
//!                          ├─► network: the namespace, and net, ipc, uts that it owns
//!                          └─► [`idmap`]: image layers and volumes show its ids
//! release: after the pod's last process and pin are gone
//! ```
//! Invariants: a slot has one pod and a pod one slot; the kernel decides who was first (`symlink`
//! fails on an existing name), so a second process, or a crash between any two calls, cannot double
//! one. Slots live on tmpfs: after a reboot nothing uses them, and files on disk carry the pod's
//! own ids, not the slot's.
//!
//! The ids are those that systemd's table of uids leaves unused, far above every `/etc/subuid`.

pub mod idmap;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::ids::PodUid;

/// Ids of one pod: all that 16 bits can name, `nobody` (65534) included.
pub const RANGE_LENGTH: u32 = 0x1_0000;
/// The first host id of slot 0. Source: systemd `docs/UIDS-GIDS.md`, "unused" from here on.
const FIRST_ID: u32 = 0x7000_0000;
/// Pods with a user namespace on one node. Ends well below the ids that end at 0x7fff_ffff.
const SLOT_COUNT: u32 = 4000;

/// The host ids of a pod: its id 0 is `first`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// The host id of the pod's root.
    pub first: u32,
}

impl Range {
    fn of_slot(slot: u32) -> Self {
        Self {
            first: FIRST_ID + slot * RANGE_LENGTH,
        }
    }

    /// The host id of an id of the pod; ids beyond its range have none and stay what they are.
    pub fn host_id(self, id: u32) -> u32 {
        if id < RANGE_LENGTH {
            self.first + id
        } else {
            id
        }
    }

    /// The line that `/proc/<pid>/uid_map` and `gid_map` take.
    pub fn map(self) -> String {
        format!("0 {} {RANGE_LENGTH}\n", self.first)
    }
}

/// A pod's user namespace, made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UserNamespace {
    /// Where it is pinned.
    pub path: PathBuf,
    /// Its host ids.
    pub range: Range,
}

/// No range could be given.
#[derive(Debug, thiserror::Error)]
pub enum RangeError {
    /// Every slot has a pod.
    #[error("hostUsers: false: all {SLOT_COUNT} id ranges of this node are in use by other pods")]
    Exhausted,
    /// The records cannot be read or written.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, to which path.
        context: String,
        /// The error of the call.
        source: io::Error,
    },
}

fn failed(verb: &str, path: &Path) -> impl FnOnce(io::Error) -> RangeError {
    let context = format!("{verb} {}", path.display());
    move |source| RangeError::Io { context, source }
}

/// The lowest slot that nobody has.
fn choose(taken: &BTreeSet<u32>) -> Option<u32> {
    (0..SLOT_COUNT).find(|slot| !taken.contains(slot))
}

/// The ranges of this node's pods. All calls block for microseconds.
#[derive(Clone, Debug)]
pub struct Ranges {
    dir: PathBuf,
}

impl Ranges {
    /// * `run` – `/run/gantry`.
    pub fn new(run: &Path) -> Self {
        Self {
            dir: run.join("userns"),
        }
    }

    /// The pod's range, made on first use. Calls for one pod come one after the other (from its
    /// worker); calls for different pods, and other processes, may come at any time.
    pub fn allocate(&self, pod: &PodUid) -> Result<Range, RangeError> {
        fs::create_dir_all(&self.dir).map_err(failed("create", &self.dir))?;
        loop {
            let slots = self.slots()?;
            if let Some((slot, _)) = slots.iter().find(|(_, owner)| *owner == pod) {
                return Ok(Range::of_slot(*slot));
            }
            let slot = choose(&slots.keys().copied().collect()).ok_or(RangeError::Exhausted)?;
            let link = self.dir.join(slot.to_string());
            match std::os::unix::fs::symlink(pod.as_str(), &link) {
                Ok(()) => return Ok(Range::of_slot(slot)),
                // Somebody was faster: look again.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed("create", &link)(error)),
            }
        }
    }

    /// Gives the pod's range back. Idempotent. Only when nothing of the pod is left.
    pub fn release(&self, pod: &PodUid) -> Result<(), RangeError> {
        self.remove(|owner| owner == pod)
    }

    /// The pods that have one.
    pub fn pods(&self) -> Result<Vec<PodUid>, RangeError> {
        Ok(self.slots()?.into_values().collect())
    }

    /// Gives back the ranges of all pods that are not in `live`.
    pub fn retain(&self, live: &HashSet<PodUid>) -> Result<(), RangeError> {
        self.remove(|owner| !live.contains(owner))
    }

    fn remove(&self, gone: impl Fn(&PodUid) -> bool) -> Result<(), RangeError> {
        for (slot, owner) in self.slots()? {
            if gone(&owner) {
                let link = self.dir.join(slot.to_string());
                match fs::remove_file(&link) {
                    Err(error) if error.kind() != ErrorKind::NotFound => {
                        return Err(failed("remove", &link)(error));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn slots(&self) -> Result<BTreeMap<u32, PodUid>, RangeError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(error) => return Err(failed("list", &self.dir)(error)),
        };
        let mut slots = BTreeMap::new();
        for entry in entries {
            let entry = entry.map_err(failed("list", &self.dir))?;
            let slot = entry.file_name().to_str().and_then(|n| n.parse().ok());
            let owner = fs::read_link(entry.path())
                .ok()
                .and_then(|target| PodUid::new(target.to_str()?).ok());
            // Anything else there is nobody's range.
            if let (Some(slot), Some(owner)) = (slot, owner) {
                slots.insert(slot, owner);
            }
        }
        Ok(slots)
    }
}

#[cfg(test)]
mod tests;
