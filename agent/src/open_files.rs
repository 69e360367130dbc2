//! How many files the agent may have open: a connection per pod and more, so as many as it may ask
//! for. Containers are not to see a difference: their shims get the limit that the agent was given.

use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What the agent was started with; `None` inside is no limit.
static GIVEN: OnceLock<Option<u64>> = OnceLock::new();

/// Raises the limit to the hard one. Call once, before the first shim is started.
pub fn raise() {
    let found = getrlimit(Resource::Nofile);
    let _ = GIVEN.set(found.current);
    let wanted = Rlimit {
        current: found.maximum,
        maximum: found.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, wanted) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// What a shim is to set for itself, where that differs from what it inherits.
pub fn given() -> Option<u64> {
    GIVEN.get().copied().flatten()
}
