//! Pods: a worker per UID around a pure state machine.
pub mod backoff;
pub mod state;
