//! Holds a pod to its bandwidth, see `ebpf_maps::bandwidth`.
//!
//! ```text
//!  paid until …  now                 saved up: goes on
//!                now … now + burst   overdrawn: goes on with a mark, if its sender heeds it (ECN); else dropped
//!                      beyond that   dropped
//! ```
//! Nothing waits: packets between pods of a node go by no queue that could hold them. A sender that
//! slows down when packets are lost keeps to the rate, and one that does not is cut to it.

use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_skb_ecn_set_ce};
use aya_ebpf::programs::TcContext;
use ebpf_maps::bandwidth::{BandwidthKey, BandwidthValue};

use crate::maps::{BANDWIDTH, add};

const PS_PER_NS: u64 = 1_000;

/// Whether the packet may go on. For pods that have a limit.
#[inline(never)]
pub fn allows(ctx: &TcContext, pod_id: u64, direction: u32) -> bool {
    let key = BandwidthKey {
        pod_id,
        direction,
        _pad: 0,
    };
    let Some(row) = BANDWIDTH.get_ptr_mut(&key) else {
        return true;
    };
    let row: *mut BandwidthValue = row;
    // SAFETY: takes nothing, returns a number.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the lookup checked the pointer. A row that is reused under the reader costs another pod a
    // packet's time.
    let (byte_ps, burst, paid) = unsafe {
        (
            read_volatile(addr_of!((*row).byte_ps)),
            read_volatile(addr_of!((*row).burst_ns)),
            read_volatile(addr_of!((*row).paid_ns)),
        )
    };
    let cost = u64::from(ctx.len()).wrapping_mul(byte_ps) / PS_PER_NS;
    let earliest = now.saturating_sub(burst);
    if paid < earliest {
        // Two CPUs that do so at once have one packet free.
        // SAFETY: as above.
        unsafe { write_volatile(addr_of_mut!((*row).paid_ns), earliest.wrapping_add(cost)) };
        return true;
    }
    if paid > now {
        let is_far = paid > now.wrapping_add(burst);
        // SAFETY: the helper takes this hook's context.
        if is_far || unsafe { bpf_skb_ecn_set_ce(ctx.skb.skb.cast()) } != 1 {
            return false;
        }
    }
    // SAFETY: 8 bytes of an element, aligned, checked by the lookup.
    unsafe { add(addr_of_mut!((*row).paid_ns), cost as i64) };
    true
}
