//! The eBPF side: loads, attaches and pins the programs, writes the maps, reads the counters.

use async_trait::async_trait;

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

/// The service data plane of a node. One implementation, one fake in tests.
#[async_trait]
pub trait Dataplane: Send + Sync + 'static {
    /// Makes the kernel's state that of `view`. Idempotent; returns when every change is visible to
    /// new connections. Removals never fail; additions that do not fit are returned as stuck.
    async fn apply(&self, view: &View) -> Result<Vec<StuckService>, DataplaneError>;
}
