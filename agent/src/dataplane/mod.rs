//! The eBPF side: loads, attaches and pins the programs, writes the maps, reads the counters.
//!
//! ```text
//!  View ─► bpf (what changed?) ─► services::{index, plan} ─► tables (maps, mapped arenas)
//!           │ start: bpffs ─► load (object, pinned maps) ─► hooks (pinned links on cgroups)
//!           └ cleanup: remove_all
//! ```
//! Invariants: only this module knows aya, and only `sys` makes raw system calls; maps and links
//! are pinned, so Services go on while the agent is dead; a restart replaces programs behind the
//! same links and writes only what has changed.

mod bpffs;
mod hooks;
mod load;
mod sys;
mod tables;

pub mod bpf;
pub mod cleanup;

#[cfg(test)]
mod tests;

use async_trait::async_trait;

pub use self::bpf::{BpfDataplane, Options};
pub use self::cleanup::remove_all;
use crate::view::View;

/// A Service that could not be programmed; the others are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StuckService {
    /// `namespace/name`
    pub service: String,
    /// Why: which map is full, which field is out of range.
    pub reason: String,
}

/// Why the data plane could not follow at all.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The kernel refused a program, a map or an attachment.
    #[error("{what}: {reason}")]
    Kernel {
        /// Which program, map or hook.
        what: String,
        /// The kernel's answer and what to do about it.
        reason: String,
    },
}

impl DataplaneError {
    /// An error of the kernel about `what`, with advice where the code alone does not say it.
    fn kernel(what: impl Into<String>, error: &std::io::Error) -> Self {
        let advice = match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => {
                "; run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN"
            }
            Some(libc::ENOSYS) => "; this kernel has no BPF (CONFIG_BPF_SYSCALL)",
            Some(libc::ENOMEM) => "; the agent's cgroup or the machine is out of memory",
            _ => "",
        };
        Self::Kernel {
            what: what.into(),
            reason: format!("{error}{advice}"),
        }
    }
}

/// The service data plane of a node. One implementation, one fake in tests.
#[async_trait]
pub trait Dataplane: Send + Sync + 'static {
    /// Makes the kernel's state that of `view`. Idempotent; returns when every change is visible to
    /// new connections. Removals never fail; additions that do not fit are returned as stuck.
    async fn apply(&self, view: &View) -> Result<Vec<StuckService>, DataplaneError>;

    /// A privileged container's cgroup: its processes may open every device. Needed where the
    /// device guard is attached (pure cgroup v2). Idempotent.
    fn exempt_devices(&self, cgroup: &std::path::Path) -> Result<(), DataplaneError>;

    /// Takes that back; to be called while the cgroup is still there. Idempotent.
    fn end_device_exemption(&self, cgroup: &std::path::Path) -> Result<(), DataplaneError>;
}
