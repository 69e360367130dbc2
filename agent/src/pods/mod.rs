//! Pods: a worker per UID around a pure state machine.

pub mod backoff;
pub mod probes;
pub mod state;
pub mod timeline;
