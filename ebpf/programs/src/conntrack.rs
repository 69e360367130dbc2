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

use aya_ebpf::helpers::{bpf_jiffies64, bpf_ktime_get_coarse_ns};
use ebpf_maps::flow::{
    CLOSING, Ends, FlowKey, FlowValue, IS_REPLY, OTHER_ESTABLISHED_TICKS, OTHER_OPENING_TICKS,
    REPLIED, TCP_CLOSING_TICKS, TCP_ESTABLISHED_TICKS, TCP_OPENING_TICKS, TICK_SHIFT,
};

use crate::maps::{FLOWS, ZONES, work_of};
use crate::packet::{self, Packet, TCP};
use crate::work::Work;

/// How long the time that was read last is good enough: 16 to 160 ms, by the kernel's configuration.
const CLOCK_JIFFIES: u64 = 16;

/// Whether a flow was ever begun in this zone.
#[inline(always)]
pub fn is_used(zone: u8) -> bool {
    match ZONES.get(u32::from(zone)) {
        Some(used) => *used != 0,
        None => false,
    }
}

/// Looks for the flow of the packet and follows it: `work.flow` is a copy of its entry.
// Inlined: a call costs what a quarter of the lookup does.
#[inline(always)]
pub fn find(work: &mut Work, zone: u8) -> bool {
    set_key(work, zone);
    let Some(known) = FLOWS.get_ptr(&work.key) else {
        return false;
    };
    // SAFETY: the lookup checked the pointer and has just made the element the most recently used,
    // so it is not the one that is reused for another flow now.
    unsafe { copy(known, &mut work.flow) };
    let now = ticks(work);
    let (proto, kind) = (work.packet.proto, work.packet.kind);
    let before = work.flow.flags;
    let age = age(now, work.flow.used);
    if age > lifetime(proto, before) {
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
    if flags != before || age != 0 {
        note_both(work, now, u32::from(flags & (REPLIED | CLOSING)));
    }
    true
}

/// Notes a packet in the entries of its flow, `work.flow`, whose key is `work.key`: it is news.
#[inline(never)]
fn note_both(work: &mut Work, now: u32, seen: u32) -> u32 {
    set_ends(&mut work.twin.ends, &work.flow.ends, true);
    work.twin.proto = work.key.proto;
    work.twin.zone = work.key.zone;
    work.twin._pad = 0;
    if let Some(known) = FLOWS.get_ptr_mut(&work.key) {
        // SAFETY: as in `find`. Two CPUs may write at once: what is lost is seen in the next packet.
        unsafe { note(known, now, seen as u8) };
    }
    if let Some(twin) = FLOWS.get_ptr_mut(&work.twin) {
        // SAFETY: as above.
        unsafe { note(twin, now, seen as u8) };
    }
    0
}

/// Looks for the flow with these ends, `work.quoted`, without following it.
#[inline(always)]
pub fn peek(work: &mut Work, proto: u8, zone: u8) -> bool {
    peek_flow(work, proto, zone) != 0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn peek_flow(work: *mut Work, proto: u8, zone: u8) -> u32 {
    match work_of(work) {
        Some(work) => u32::from(peek_here(work, proto, zone)),
        None => 0,
    }
}

#[inline(always)]
fn peek_here(work: &mut Work, proto: u8, zone: u8) -> bool {
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
    age(ticks(work), work.flow.used) <= lifetime(proto, work.flow.flags)
}

/// Makes the flow of the packet, which becomes `work.becomes` (its own ends to only follow it),
/// known. False when its answers would be taken for those of another flow, or the map takes no
/// entry.
///
/// * `backend_id`, `service_id` – why it becomes that, or 0.
#[inline(always)]
pub fn begin(work: &mut Work, zone: u8, backend_id: u32, service_id: u32) -> bool {
    begin_flow(work, zone, backend_id, service_id) != 0
}

// Verified by itself, see `main`: it is tried for one port after the other.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn begin_flow(work: *mut Work, zone: u8, backend_id: u32, service_id: u32) -> u32 {
    match work_of(work) {
        Some(work) => u32::from(begin_here(work, zone, backend_id, service_id)),
        None => 0,
    }
}

#[inline(always)]
fn begin_here(work: &mut Work, zone: u8, backend_id: u32, service_id: u32) -> bool {
    let proto = work.packet.proto;
    work.key = key_of(&work.packet, zone);
    work.twin = FlowKey {
        ends: work.becomes.reversed(),
        ..work.key
    };
    let now = ticks(work);
    if let Some(other) = FLOWS.get_ptr(&work.twin) {
        // SAFETY: as in `find`.
        let other = unsafe { &*other };
        if age(now, other.used) <= lifetime(proto, other.flags)
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
    let now = ticks(work);
    let Some(other) = FLOWS.get_ptr(&work.twin) else {
        return false;
    };
    // SAFETY: as in `find`.
    let other = unsafe { &*other };
    other.flags & IS_REPLY != 0 && age(now, other.used) <= lifetime(work.packet.proto, other.flags)
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

/// The packet's key, word by word, for the reason that [`copy`] has.
#[inline(always)]
fn set_key(work: &mut Work, zone: u8) {
    let (packet, key) = (&work.packet, &mut work.key);
    let mut word = 0;
    while word < packet.source.len() {
        // SAFETY: references to words; volatile, so that the compiler makes no call of it.
        unsafe {
            write_volatile(
                &mut key.ends.source[word],
                read_volatile(&packet.source[word]),
            );
            let to = read_volatile(&packet.destination[word]);
            write_volatile(&mut key.ends.destination[word], to);
        }
        word += 1;
    }
    key.ends.source_port_be = packet.source_port_be;
    key.ends.destination_port_be = packet.destination_port_be;
    key.proto = packet.proto;
    key.zone = zone;
    key._pad = 0;
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

/// How many ticks ago that was; none, where the clock of another CPU is ahead of this one's.
#[inline(always)]
fn age(now: u32, used: u32) -> u32 {
    let age = now.wrapping_sub(used);
    if age > u32::MAX / 2 { 0 } else { age }
}

/// The time, in ticks.
///
/// The clock is read where the kernel's own count of jiffies, which costs no call, says that it is time to.
#[inline(always)]
pub fn ticks(work: &mut Work) -> u32 {
    // SAFETY: takes nothing, returns a number.
    let jiffies = unsafe { bpf_jiffies64() };
    if jiffies.wrapping_sub(work.clock_jiffies) >= CLOCK_JIFFIES {
        work.clock_jiffies = jiffies;
        // SAFETY: as above.
        work.clock_ticks = (unsafe { bpf_ktime_get_coarse_ns() } >> TICK_SHIFT) as u32;
    }
    work.clock_ticks
}
