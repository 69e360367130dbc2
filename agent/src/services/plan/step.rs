//! What a plan is made of.

use std::collections::BTreeMap;
use std::time::Duration;

use ebpf_maps::services::{
    BACKEND_COUNT, BackendValue, FRONTEND_COUNT_MAX, FrontendKey, FrontendValue, SLOT_COUNT,
    SOURCE_RANGE_COUNT_MAX,
};

use crate::services::index::SourceRange;
use crate::view::ServiceName;

/// An index into BACKENDS; 0 is none.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BackendId(pub u32);

/// One write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// BACKENDS[id] = value, and TRAFFIC[id] = 0: what an earlier backend of this id had is not its.
    WriteBackend {
        /// Referred to by no slot yet.
        id: BackendId,
        /// State: in use, or on trial.
        value: BackendValue,
    },
    /// SLOTS[base ..] = ids.
    WriteSlots {
        /// The first slot.
        base: u32,
        /// At least one.
        ids: Vec<BackendId>,
    },
    /// FRONTENDS[key] = value, replacing what is there.
    SetFrontend {
        /// Address, port, protocol, scope.
        key: FrontendKey,
        /// Where its backends are.
        value: FrontendValue,
    },
    /// Removes FRONTENDS[key].
    RemoveFrontend {
        /// Address, port, protocol, scope.
        key: FrontendKey,
    },
    /// BACKENDS[id].state = retired.
    RetireBackend {
        /// In no slot that a frontend refers to.
        id: BackendId,
    },
    /// Adds an element of SOURCE_RANGES.
    AddSourceRange {
        /// Whose frontends.
        service_id: u32,
        /// Who may use them.
        range: SourceRange,
    },
    /// Removes an element of SOURCE_RANGES.
    RemoveSourceRange {
        /// Whose frontends.
        service_id: u32,
        /// Who could use them.
        range: SourceRange,
    },
}

/// The difference between programmed and wanted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// To be performed in this order.
    pub steps: Vec<Step>,
    /// Services of which a part could not be added, and why.
    pub stuck: BTreeMap<ServiceName, String>,
    /// When planning the stuck ones again may succeed, because a quarantine ends.
    pub retry_at: Option<Duration>,
}

/// How much fits.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Entries of FRONTENDS.
    pub frontend_count: u32,
    /// Slots in the arena.
    pub slot_count: u32,
    /// Backends, id 0 included.
    pub backend_count: u32,
    /// Entries of SOURCE_RANGES.
    pub source_range_count: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frontend_count: FRONTEND_COUNT_MAX,
            slot_count: SLOT_COUNT,
            backend_count: BACKEND_COUNT,
            source_range_count: SOURCE_RANGE_COUNT_MAX,
        }
    }
}
