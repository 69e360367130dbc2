//! Flows: finding, following and beginning them. Rewriting packets is `nat`'s part.
//!
//! ```text
//!  find(work, zone)      ─► work.flow, followed: time, answer seen, closing; or unknown, or too old
//!  begin(work, zone, …)  ─► the answers' entry, then its own: work.packet becomes work.becomes
//!  peek(work, …)         ─► work.flow of a packet that somebody quotes
//!  is_taken(work, zone)  ─► whether answers to the packet as it is would be those of another flow
//! ```
//! A caller owns a zone and never sees other zones' flows. TCP is followed only as far as needed to
//! know when to forget: opening, answered, closing. A SYN on a closing flow begins a new one.
//!
//! The clock ticks once in about a second, and entries are written only when a tick, an answer or
//! an end is news: a packet of a known flow costs one lookup.

use core::mem::size_of;
use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use ebpf_maps::flow::{
    CLOSING, Ends, FlowKey, FlowValue, IS_REPLY, OTHER_ESTABLISHED_TICKS, OTHER_OPENING_TICKS,
    REPLIED, TCP_CLOSING_TICKS, TCP_ESTABLISHED_TICKS, TCP_OPENING_TICKS, TICK_SHIFT,
};

use crate::maps::{FLOWS, ZONES};
use crate::packet::{self, Packet, TCP};
use crate::work::Work;

/// Whether a flow was ever begun in this zone.
#[inline(always)]
pub fn is_used(zone: u8) -> bool {
    match ZONES.get(u32::from(zone)) {
        Some(used) => *used != 0,
        None => false,
    }
}

/// Looks for the flow of the packet and follows it: `work.flow` is a copy of its entry.
#[inline(never)]
pub fn find(work: &mut Work, zone: u8) -> bool {
    work.key = key_of(&work.packet, zone);
    let Some(known) = FLOWS.get_ptr_mut(&work.key) else {
        return false;
    };
    // SAFETY: the lookup checked the pointer and has just made the element the most recently used,
    // so it is not the one that is reused for another flow now.
    unsafe { copy(known, &mut work.flow) };
    let (proto, kind, now) = (work.packet.proto, work.packet.kind, ticks());
    let before = work.flow.flags;
    if now.wrapping_sub(work.flow.used) > lifetime(proto, before) {
        return false;
    }
    let mut flags = before;
    if proto == TCP {
        if kind & (packet::SYN | packet::ACK) == packet::SYN && before & CLOSING != 0 {
            return false;
        }
        if kind & (packet::FIN | packet::RST) != 0 {
            flags |= CLOSING;
        }
    }
    if flags & IS_REPLY != 0 {
        flags |= REPLIED;
    }
    if flags != before || now != work.flow.used {
        let seen = flags & (REPLIED | CLOSING);
        // SAFETY: as above. Two CPUs may write at once: what is lost is seen in the next packet.
        unsafe { note(known, now, seen) };
        work.twin = FlowKey {
            ends: work.flow.ends.reversed(),
            ..work.key
        };
        if let Some(twin) = FLOWS.get_ptr_mut(&work.twin) {
            // SAFETY: as above.
            unsafe { note(twin, now, seen) };
        }
    }
    true
}

/// Looks for the flow with these ends, `work.quoted`, without following it.
#[inline(never)]
pub fn peek(work: &mut Work, proto: u8, zone: u8) -> bool {
    work.key = FlowKey {
        ends: work.quoted,
        proto,
        zone,
        _pad: 0,
    };
    let Some(known) = FLOWS.get_ptr(&work.key) else {
        return false;
    };
    // SAFETY: as in `find`.
    unsafe { copy(known, &mut work.flow) };
    ticks().wrapping_sub(work.flow.used) <= lifetime(proto, work.flow.flags)
}

/// Makes the flow of the packet, which becomes `work.becomes` (its own ends to only follow it),
/// known. False when its answers would be taken for those of another flow, or the map takes no
/// entry.
///
/// * `backend_id`, `service_id` – why it becomes that, or 0.
#[inline(never)]
pub fn begin(work: &mut Work, zone: u8, backend_id: u32, service_id: u32) -> bool {
    let proto = work.packet.proto;
    work.key = key_of(&work.packet, zone);
    work.twin = FlowKey {
        ends: work.becomes.reversed(),
        ..work.key
    };
    let now = ticks();
    if let Some(other) = FLOWS.get_ptr(&work.twin) {
        // SAFETY: as in `find`.
        let other = unsafe { &*other };
        if now.wrapping_sub(other.used) <= lifetime(proto, other.flags)
            && other.flags & CLOSING == 0
            && !is_reverse(&other.ends, &work.key.ends)
        {
            return false;
        }
    }
    // Word by word, from map to map: made here first they would take a third of all stack.
    set_ends(&mut work.flow.ends, &work.becomes, false);
    set_ends(&mut work.answer.ends, &work.key.ends, true);
    for (value, flags) in [(&mut work.flow, 0), (&mut work.answer, IS_REPLY)] {
        value.used = now;
        value.backend_id = backend_id;
        value.service_id = service_id;
        value.flags = flags;
        value._pad = [0; 3];
    }
    if FLOWS.insert(&work.twin, &work.answer, 0).is_err()
        || FLOWS.insert(&work.key, &work.flow, 0).is_err()
    {
        return false;
    }
    mark_used(zone);
    true
}

/// From now on [`is_used`].
#[inline(always)]
pub fn mark_used(zone: u8) {
    if let Some(used) = ZONES.get_ptr_mut(u32::from(zone)) {
        // SAFETY: the pointer is an element of the array; everybody writes the same.
        unsafe { *used = 1 }
    }
}

/// Whether answers to the packet, if it goes on as it is, would be taken for those of another flow:
/// also of one that closes, because its last packets are still on their way.
#[inline(always)]
pub fn is_taken(work: &mut Work, zone: u8) -> bool {
    set_becomes(work);
    set_ends(&mut work.twin.ends, &work.becomes, true);
    work.twin.proto = work.packet.proto;
    work.twin.zone = zone;
    work.twin._pad = 0;
    let Some(other) = FLOWS.get_ptr(&work.twin) else {
        return false;
    };
    // SAFETY: as in `find`.
    let other = unsafe { &*other };
    other.flags & IS_REPLY != 0
        && ticks().wrapping_sub(other.used) <= lifetime(work.packet.proto, other.flags)
}

/// Whether the answers of what the packet is to become, `work.becomes`, were those of this very flow
/// before, however old that is.
#[inline(never)]
pub fn was_own(work: &mut Work, zone: u8) -> bool {
    work.key = key_of(&work.packet, zone);
    work.twin = FlowKey {
        ends: work.becomes.reversed(),
        ..work.key
    };
    match FLOWS.get_ptr(&work.twin) {
        // SAFETY: as in `find`.
        Some(other) => is_reverse(unsafe { &(*other).ends }, &work.key.ends),
        None => false,
    }
}

/// What is known of the packet's flow holds no longer: it begins anew, and goes on as it is.
#[inline(always)]
pub fn forget(work: &mut Work, zone: u8) {
    set_becomes(work);
    set_ends(&mut work.key.ends, &work.becomes, false);
    work.key.proto = work.packet.proto;
    work.key.zone = zone;
    work.key._pad = 0;
    let _ = FLOWS.remove(&work.key);
}

/// The packet becomes what it is.
#[inline(always)]
pub fn set_becomes(work: &mut Work) {
    let (packet, becomes) = (&work.packet, &mut work.becomes);
    let mut word = 0;
    while word < packet.source.len() {
        // SAFETY: references to words; volatile, so that the compiler makes no call of it.
        unsafe {
            write_volatile(
                &mut becomes.source[word],
                read_volatile(&packet.source[word]),
            );
            let to = read_volatile(&packet.destination[word]);
            write_volatile(&mut becomes.destination[word], to);
        }
        word += 1;
    }
    becomes.source_port_be = packet.source_port_be;
    becomes.destination_port_be = packet.destination_port_be;
}

#[inline(always)]
fn key_of(packet: &Packet, zone: u8) -> FlowKey {
    FlowKey {
        ends: packet.ends(),
        proto: packet.proto,
        zone,
        _pad: 0,
    }
}

/// Copies ends, or the same seen from the other side, word by word.
#[inline(always)]
pub fn set_ends(to: &mut Ends, from: &Ends, reversed: bool) {
    let (source, destination) = match reversed {
        false => (&from.source, &from.destination),
        true => (&from.destination, &from.source),
    };
    let mut word = 0;
    while word < source.len() {
        // SAFETY: references to words; volatile, so that the compiler makes no call of it.
        unsafe {
            write_volatile(&mut to.source[word], read_volatile(&source[word]));
            write_volatile(&mut to.destination[word], read_volatile(&destination[word]));
        }
        word += 1;
    }
    let (source, destination) = (from.source_port_be, from.destination_port_be);
    (to.source_port_be, to.destination_port_be) = match reversed {
        false => (source, destination),
        true => (destination, source),
    };
}

/// Copies an entry word by word: what the compiler makes of an assignment between two maps is a call
/// of a loop over bytes.
///
/// # Safety
/// `from` must be an element of FLOWS.
#[inline(always)]
unsafe fn copy(from: *const FlowValue, to: &mut FlowValue) {
    let (from, to) = (from.cast::<u32>(), core::ptr::from_mut(to).cast::<u32>());
    let mut word = 0;
    while word < size_of::<FlowValue>() / size_of::<u32>() {
        // SAFETY: within both, which are made of words; the caller's promise.
        unsafe { write_volatile(to.add(word), read_volatile(from.add(word))) };
        word += 1;
    }
}

/// Notes a packet in an entry.
///
/// # Safety
/// `value` must be an element of FLOWS.
#[inline(always)]
unsafe fn note(value: *mut FlowValue, now: u32, seen: u8) {
    // SAFETY: the caller's promise.
    unsafe {
        (*value).used = now;
        (*value).flags |= seen;
    }
}

/// Equality without a call to memcmp.
#[inline(always)]
fn is_reverse(a: &Ends, b: &Ends) -> bool {
    let mut word = 0;
    while word < 4 {
        if a.source[word] != b.destination[word] || a.destination[word] != b.source[word] {
            return false;
        }
        word += 1;
    }
    a.source_port_be == b.destination_port_be && a.destination_port_be == b.source_port_be
}

#[inline(always)]
fn lifetime(proto: u8, flags: u8) -> u32 {
    match (proto == TCP, flags & CLOSING != 0, flags & REPLIED != 0) {
        (true, true, _) => TCP_CLOSING_TICKS,
        (true, false, true) => TCP_ESTABLISHED_TICKS,
        (true, false, false) => TCP_OPENING_TICKS,
        (false, _, true) => OTHER_ESTABLISHED_TICKS,
        (false, _, false) => OTHER_OPENING_TICKS,
    }
}

/// The time, in ticks.
#[inline(always)]
pub fn ticks() -> u32 {
    // SAFETY: takes nothing, returns a number.
    (unsafe { bpf_ktime_get_coarse_ns() } >> TICK_SHIFT) as u32
}
