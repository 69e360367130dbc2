//! The end of a packet: never without a counted reason.

use aya_ebpf::bindings::TC_ACT_SHOT;

use crate::event;
use crate::maps::DROPS;

/// Counts a drop for this reason (`ebpf_maps::drop`) and returns the verdict.
#[inline(always)]
pub fn drop(reason: u32) -> i32 {
    count(reason);
    TC_ACT_SHOT
}

/// Counts a drop.
// Called and not inlined: there are many places that drop.
#[inline(never)]
pub fn count(reason: u32) -> u32 {
    if let Some(value) = DROPS.get_ptr_mut(reason) {
        // SAFETY: the pointer is this CPU's own element, checked by the lookup; a packet of another
        // hook that interrupts may cost one count, never more.
        unsafe { *value += 1 }
    }
    event::note_drop(reason);
    reason
}

/// What stands for "not dropped" where a reason would stand.
const KEPT: u32 = u32::MAX;

/// A result in one register. Functions that are called, and not inlined, return it so: of a larger
/// value the unused half would be undefined, which the verifier refuses to see.
#[inline(always)]
pub fn packed(result: Result<(), u32>) -> u32 {
    match result {
        Ok(()) => KEPT,
        Err(reason) => reason,
    }
}

/// The other way.
#[inline(always)]
pub fn unpacked(code: u32) -> Result<(), u32> {
    match code {
        KEPT => Ok(()),
        reason => Err(reason),
    }
}
