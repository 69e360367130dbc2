//! The end of a packet: never without a counted reason.

use aya_ebpf::bindings::TC_ACT_SHOT;

use crate::maps::DROPS;

/// Counts a drop for this reason (`ebpf_maps::drop`) and returns the verdict.
#[inline(always)]
pub fn drop(reason: u32) -> i32 {
    if let Some(value) = DROPS.get_ptr_mut(reason) {
        // SAFETY: the pointer is this CPU's own element, checked by the lookup; a packet of another
        // hook that interrupts may cost one count, never more.
        unsafe { *value += 1 }
    }
    TC_ACT_SHOT
}
