//! Where packets leave, and to whom: what the node's routes and neighbours say, remembered for a moment.
//!
//! ```text
//!  asked within two jiffies (2 to 20 ms, by the kernel's configuration) ─► as it was then
//!  else ─► bpf_fib_lookup ─► remembered, also that there is no way
//! ```
//! The kernel's lookup costs more than everything else that is done to a packet, and packets that are many
//! are many to the same few. A place is of this CPU, and is overwritten by whoever is of the same place.

use core::ffi::c_void;
use core::mem::size_of;

use aya_ebpf::bindings::bpf_fib_lookup as FibLookup;
use aya_ebpf::helpers::bpf_jiffies64;
use ebpf_maps::endpoint::Mac;
use ebpf_maps::services::Addr;

use crate::addr::{same, set};
use crate::direct;
use crate::maps::{UPLINKS, WAYS};
use crate::outside::{FIB_SUCCESS, Hook, same_mac};

/// Entries of `WAYS`, on each CPU.
pub const WAY_COUNT: u32 = 128;
/// How long an answer holds.
const JIFFIES: u64 = 2;
const NO_MAC: Mac = [0; 6];
/// Asked about a packet of no length, the kernel does not say how long one may be.
const SOME_LENGTH: u16 = 1;

/// An answer, and to what.
#[repr(C)]
pub struct Way {
    source: Addr,
    destination: Addr,
    /// When; 0: never.
    jiffies: u64,
    /// The interface that the packet has come by.
    came_by: u32,
    /// The interface that it leaves by; 0: there is no way, or the next hop is not known yet.
    pub ifindex: u32,
    /// The hardware address of the next hop.
    pub to: Mac,
    /// That of the interface.
    pub from: Mac,
    /// The longest IP packet that may leave so.
    pub length_max: u16,
    /// 1: the interface is an uplink.
    pub is_uplink: u16,
    /// The next hop: the destination itself, or who stands between.
    pub hop: Addr,
}

/// The way of packets from one address to another; none: there is none, or the next hop is not known yet.
#[inline(always)]
pub fn of(hook: Hook, is_v6: bool, source: &Addr, destination: &Addr) -> Option<&'static Way> {
    let place = WAYS.get_ptr_mut(place_of(hook.ifindex, source, destination))?;
    // SAFETY: this CPU's own element, checked by the lookup; programs of one CPU do not run in the middle of
    // each other at this hook.
    let way = unsafe { &mut *place };
    // SAFETY: takes nothing, returns a number.
    let jiffies = unsafe { bpf_jiffies64() };
    let is_fresh = way.jiffies != 0
        && jiffies.wrapping_sub(way.jiffies) < JIFFIES
        && way.came_by == hook.ifindex
        && same(&way.destination, destination)
        && same(&way.source, source);
    if !is_fresh {
        way.came_by = hook.ifindex;
        set(&mut way.source, source);
        set(&mut way.destination, destination);
        way.jiffies = jiffies;
        way.ifindex = 0;
        ask(hook.ctx, is_v6, way);
    }
    (way.ifindex != 0).then_some(way)
}

#[inline(always)]
fn place_of(ifindex: u32, source: &Addr, destination: &Addr) -> u32 {
    let sum = destination[3]
        .wrapping_mul(0x9e37_79b1)
        .wrapping_add(source[3].wrapping_mul(0x85eb_ca77))
        .wrapping_add(ifindex.wrapping_mul(0xc2b2_ae3d));
    sum >> (u32::BITS - WAY_COUNT.trailing_zeros())
}

/// Asks the kernel about the ends that stand in the way, which has no interface yet. What it answers, but for
/// an answer that is of no use.
#[inline(never)]
fn ask(ctx: *mut c_void, is_v6: bool, way: &mut Way) -> i64 {
    // SAFETY: made of integers, for which zero is a value.
    let mut found: FibLookup = unsafe { core::mem::zeroed() };
    let hook = Hook {
        ctx,
        ifindex: way.came_by,
    };
    let answer = hook.look_up(
        is_v6,
        &way.source,
        &way.destination,
        SOME_LENGTH,
        &mut found,
    );
    if answer != FIB_SUCCESS {
        return answer;
    }
    if same_mac(&found.dmac, &NO_MAC) {
        return -1; // asked for, and has not answered yet
    }
    way.to = found.dmac;
    way.from = found.smac;
    // SAFETY: the helper has written it in the place of the length that it was asked about.
    way.length_max = unsafe { found.__bindgen_anon_1.mtu_result };
    way.hop = direct::next_hop(&found, is_v6, &way.destination);
    way.is_uplink = u16::from(UPLINKS.get_ptr(&found.ifindex).is_some());
    way.ifindex = found.ifindex;
    answer
}

const _: () = {
    assert!(size_of::<Way>() == 80);
    assert!(WAY_COUNT.is_power_of_two());
};
