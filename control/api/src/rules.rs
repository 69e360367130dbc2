//! Rules of the feed and the store that the simulation switches off one at a time, to see that it
//! finds each one missing.
//!
//! In a release build every rule is on and costs nothing. In a debug build a process begins with all of
//! them; only [`switch_off`] changes that.

use std::sync::atomic::{AtomicU64, Ordering};

/// What can be switched off. The numbers are those of the feed's rules, where one has a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Rule {
    /// 2: a batch runs from the cursor to now and leaves nothing out.
    BatchIsWhole,
    /// 3: a backend's state is joined from pod and node, never read from slices.
    JoinInFeed,
    /// 1: a commit whose content does not have its digest is refused.
    Digest,
    /// 4: a commit is written before it is applied.
    LogFirst,
    /// 4: an ack follows the programming.
    AckAfterFlip,
    /// After a reboot Services come from the disk only when this node holds no drain any more.
    GraceAfterReboot,
    /// 5: an ack is void after a reboot.
    RebootVoidsAck,
    /// 9: a floor waits for nodes without a stream too.
    FloorOfAbsent,
    /// 9: a floor is the answer to a wait.
    FloorIsAnswer,
    /// 7: statuses of an older start of the agent, or with a lower number, are not taken.
    StatusOrder,
    /// 7: each start of the agent has its own number.
    Incarnation,
    /// 8: a final status is not overwritten.
    FinalStays,
    /// 8: a final status is on disk before the last trace of the pod goes.
    FinalOnDisk,
    /// 8: what has ended on a node never starts there again, also after a restore.
    Tombstones,
    /// 8: a status that found the pod unbound is kept.
    NotBoundIsKept,
    /// 10: after a restore nobody is placed before it is known what runs.
    Hold,
    /// 10: what runs unbound is adopted.
    Adopt,
    /// A cursor counts in its own history only.
    Lineage,
    /// A write is answered after it is durable.
    DurableFirst,
    /// A pod is bound once.
    BoundOnce,
}

/// All of them.
pub const ALL: [Rule; 20] = [
    Rule::BatchIsWhole,
    Rule::JoinInFeed,
    Rule::Digest,
    Rule::LogFirst,
    Rule::AckAfterFlip,
    Rule::GraceAfterReboot,
    Rule::RebootVoidsAck,
    Rule::FloorOfAbsent,
    Rule::FloorIsAnswer,
    Rule::StatusOrder,
    Rule::Incarnation,
    Rule::FinalStays,
    Rule::FinalOnDisk,
    Rule::Tombstones,
    Rule::NotBoundIsKept,
    Rule::Hold,
    Rule::Adopt,
    Rule::Lineage,
    Rule::DurableFirst,
    Rule::BoundOnce,
];

static OFF: AtomicU64 = AtomicU64::new(0);

/// Breaks a rule in this process, for good. Has no effect in a release build.
pub fn switch_off(rule: Rule) {
    OFF.fetch_or(1 << rule as u8, Ordering::Relaxed);
}

/// Whether the simulation has switched this rule off.
#[inline]
pub fn is_off(rule: Rule) -> bool {
    cfg!(debug_assertions) && OFF.load(Ordering::Relaxed) & (1 << rule as u8) != 0
}
