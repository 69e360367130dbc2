//! What `gantry-shim` and the agent share: messages, records on disk, cgroup membership.
//!
//! std and libc only, because the shim is linked once per pod: every private page counts.
//!
//! ```text
//! agent ── wire ──► gantry-shim ──spawn──► gantry-rt ──► container init (child of the shim)
//!   └──── reads ──── record (started, exit) ◄── writes ──┘
//! ```

pub mod cgroup;
pub mod clone;
pub mod names;
pub mod record;
pub mod wire;
