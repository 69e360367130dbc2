//! Rewriting a packet's addresses and ports, with every checksum that covers them.
//!
//! A packet of a veth has usually no checksum above IP yet: the device would fill it in, and what
//! stands there is the sum of the pseudo header (CHECKSUM_PARTIAL). Only `bpf_l4_csum_replace`
//! knows which case it is: told that a change is one of the pseudo header it mends both, told that
//! it is not (ports) it leaves the partial one alone.
//!
//! Nothing is written where it lies: a program that could write so would have the kernel copy the
//! headers of every TCP packet first, also of those that it does not rewrite.
//!
//! Limits: an IPv6 packet that comes from a network card with CHECKSUM_COMPLETE would need
//! `BPF_F_IPV6` (Linux 6.16) in the helper's flags; packets of veths never have it.

use core::mem::{offset_of, size_of};
use core::ptr::read_volatile;

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::bpf_csum_diff;
use aya_ebpf::programs::TcContext;
use ebpf_maps::drop;
use ebpf_maps::flow::Ends;
use ebpf_maps::services::{Addr, v4_mapped};

use crate::addr::{same, set};
use crate::checksum::mended;
use crate::conntrack;
use crate::drop::{packed, unpacked};
use crate::packet::{
    HAS_OPTIONS, ICMP, ICMP_V6, IP_OFFSET, IS_FRAGMENT, NO_L4, Packet, TCP, UDP, V4_LENGTH,
    V6_LENGTH, read,
};
use crate::work::Work;

/// From the frame's start.
const V4_CHECKSUM: usize = IP_OFFSET + 10;
/// Source and destination are neighbours, and so are the ports behind them where there are no options.
const V6_ADDRESSES: usize = IP_OFFSET + 8;
/// From an ICMP header to the packet that an error quotes.
const QUOTED: usize = 8;
/// ICMP errors: unreachable, time exceeded, parameter problem.
const ERRORS_V4: [u8; 3] = [3, 11, 12];
/// ICMPv6 errors are 1 to 4: unreachable, too big, time exceeded, parameter problem.
const ERROR_V6_MAX: u8 = 4;

/// Makes the packet what `work.becomes` says; `work.packet` follows.
///
/// # Errors
/// A reason to drop it: it is half rewritten then.
#[inline(always)]
pub fn rewrite(ctx: &TcContext, work: &mut Work) -> Result<(), u32> {
    unpacked(rewrite_packet(ctx.skb.skb, work))
}

// Verified by itself, see `main`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rewrite_packet(ctx: *mut __sk_buff, work: *mut Work) -> u32 {
    // SAFETY: null, or the caller's unique reference.
    match unsafe { work.as_mut() } {
        Some(work) => packed(rewrite_here(&TcContext::new(ctx), work)),
        None => drop::MALFORMED,
    }
}

/// As [`rewrite`], where it is worth its instructions.
///
/// # Errors
/// As above.
#[inline(always)]
pub fn rewrite_here(ctx: &TcContext, work: &mut Work) -> Result<(), u32> {
    let (proto, at) = (work.packet.proto, work.packet.l4_offset as usize);
    let change = difference(&work.packet.source, &work.packet.destination, &work.becomes);
    let has_l4 = work.packet.flags & NO_L4 == 0;
    let has_ports = has_l4 && matches!(proto, TCP | UDP);
    if has_l4 {
        let (sum, flags) = match proto {
            TCP => (at + 16, 0),
            UDP => (at + 6, u64::from(BPF_F_MARK_MANGLED_0)),
            ICMP_V6 => (at + 2, 0),
            _ => (0, 0),
        };
        if sum != 0 {
            let pseudo = flags | u64::from(BPF_F_PSEUDO_HDR);
            mend(ctx, sum, 0, change, pseudo)?;
        }
        if has_ports {
            let (from, to) = (
                both(work.packet.source_port_be, work.packet.destination_port_be),
                ports(&work.becomes),
            );
            if from != to {
                mend(ctx, sum, u64::from(from), u64::from(to), flags | 4)?;
            }
        }
        if matches!(proto, ICMP | ICMP_V6) {
            // An echo's identifier; all else has none, and becomes none.
            let (from, to) = (work.packet.source_port_be, work.becomes.source_port_be);
            if from != to {
                mend(ctx, at + 2, u64::from(from), u64::from(to), 2)?;
                store(ctx, at + 4, &to)?;
                work.packet.source_port_be = to;
                work.packet.destination_port_be = to;
            }
        }
    }
    // Addresses, and the ports where they are neighbours, in one call: calls are what costs.
    let is_plain = has_ports && work.packet.flags & HAS_OPTIONS == 0;
    match (work.packet.is_v6, is_plain) {
        (true, true) => store(ctx, V6_ADDRESSES, &work.becomes)?,
        (true, false) => {
            let becomes = core::ptr::from_ref(&work.becomes).cast::<[Addr; 2]>();
            // SAFETY: source and destination are the head of what is behind the reference, as asserted.
            store(ctx, V6_ADDRESSES, unsafe { &*becomes })?;
        }
        (false, true) => {
            let [sum, a, b, c, d] = head_v4(ctx, work, change)?;
            let (from, to) = (
                work.becomes.source_port_be,
                work.becomes.destination_port_be,
            );
            store(ctx, V4_CHECKSUM, &[sum, a, b, c, d, from, to])?;
        }
        (false, false) => store(ctx, V4_CHECKSUM, &head_v4(ctx, work, change)?)?,
    }
    if has_ports {
        if !is_plain {
            store(ctx, at, &ports(&work.becomes))?;
        }
        work.packet.source_port_be = work.becomes.source_port_be;
        work.packet.destination_port_be = work.becomes.destination_port_be;
    }
    set(&mut work.packet.source, &work.becomes.source);
    set(&mut work.packet.destination, &work.becomes.destination);
    Ok(())
}

/// Whether this is an ICMP error, which quotes a packet that was on its way.
#[inline(always)]
pub fn is_error(packet: &Packet) -> bool {
    if packet.flags & (NO_L4 | IS_FRAGMENT) != 0 {
        return false;
    }
    match packet.is_v6 {
        false => packet.proto == ICMP && ERRORS_V4.contains(&packet.kind),
        true => packet.proto == ICMP_V6 && packet.kind >= 1 && packet.kind <= ERROR_V6_MAX,
    }
}

/// An ICMP error about a flow of this zone: the quoted packet becomes again what its sender sent,
/// and so do the ends of the error itself. Untouched when it is about no flow.
///
/// The quoted packet's own checksum above IP is left: no receiver looks at it, and mostly it is cut
/// off.
///
/// # Errors
/// A reason to drop it: it is half rewritten then.
#[inline(always)]
pub fn rewrite_error(ctx: &TcContext, work: &mut Work, zone: u8) -> Result<(), u32> {
    unpacked(rewrite_packet_of_error(ctx.skb.skb, work, zone))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rewrite_packet_of_error(ctx: *mut __sk_buff, work: *mut Work, zone: u8) -> u32 {
    // SAFETY: as above.
    match unsafe { work.as_mut() } {
        Some(work) => packed(rewrite_error_here(&TcContext::new(ctx), work, zone)),
        None => drop::MALFORMED,
    }
}

#[inline(always)]
fn rewrite_error_here(ctx: &TcContext, work: &mut Work, zone: u8) -> Result<(), u32> {
    let ip = work.packet.l4_offset as usize + QUOTED;
    let Some(proto) = quote(ctx, work, ip) else {
        return Ok(());
    };
    // The flow is that of its answers, because it is its sender who is told.
    if !conntrack::peek(work, proto, zone) {
        return Ok(());
    }
    let sum = work.packet.l4_offset as usize + 2;
    // Both are reversed, and the sum does not care.
    let change = difference_quoted(&work.quoted, &work.flow.ends)?;
    let (source, destination) = (work.flow.ends.destination, work.flow.ends.source);
    let length = if work.packet.is_v6 {
        // No sum of the quoted header hides the change.
        mend(ctx, sum, 0, change, 0)?;
        store(ctx, ip + 8, &source)?;
        store(ctx, ip + 24, &destination)?;
        V6_LENGTH
    } else {
        (ctx.l3_csum_replace(ip + 10, 0, change, 0)).map_err(|_| drop::MALFORMED)?;
        store(ctx, ip + 12, &[source[3], destination[3]])?;
        V4_LENGTH
    };
    if matches!(proto, TCP | UDP) {
        let (from, to) = (
            ports(&work.quoted.reversed()),
            ports(&work.flow.ends.reversed()),
        );
        if from != to {
            mend(ctx, sum, u64::from(from), u64::from(to), 4)?;
            store(ctx, ip + length, &to)?;
        }
    }
    if matches!(proto, ICMP | ICMP_V6) {
        let (from, to) = (work.quoted.source_port_be, work.flow.ends.source_port_be);
        if from != to {
            mend(ctx, sum, u64::from(from), u64::from(to), 2)?;
            store(ctx, ip + length + 4, &to)?;
        }
    }
    // To the sender of the quoted packet; from its receiver, unless a router on the way speaks.
    work.becomes = work.packet.ends();
    if same(&work.packet.destination, &work.quoted.destination) {
        work.becomes.destination = source;
    }
    if same(&work.packet.source, &work.quoted.source) {
        work.becomes.source = destination;
    }
    rewrite(ctx, work)
}

/// Reads the quoted packet into `work.quoted`, its ends exchanged; its protocol.
#[inline(always)]
fn quote(ctx: &TcContext, work: &mut Work, at: usize) -> Option<u8> {
    let quoted = &mut work.quoted;
    let (proto, length) = if work.packet.is_v6 {
        quoted.destination = ctx.load::<Addr>(at + 8).ok()?;
        quoted.source = ctx.load::<Addr>(at + 24).ok()?;
        (ctx.load::<u8>(at + 6).ok()?, V6_LENGTH)
    } else {
        // Options: rare, and nothing that a flow begins with.
        if ctx.load::<u8>(at).ok()? != 0x45 {
            return None;
        }
        quoted.destination = v4_mapped(ctx.load(at + 12).ok()?);
        quoted.source = v4_mapped(ctx.load(at + 16).ok()?);
        (ctx.load::<u8>(at + 9).ok()?, V4_LENGTH)
    };
    let [from, to] = match proto {
        TCP | UDP => ctx.load::<[u16; 2]>(at + length).ok()?,
        ICMP | ICMP_V6 => [ctx.load::<u16>(at + length + 4).ok()?; 2],
        _ => [0; 2],
    };
    quoted.destination_port_be = from;
    quoted.source_port_be = to;
    Some(proto)
}

/// What the sum over source and destination changes by, as 32 bits of a ones' complement sum.
///
/// By hand, and not by a helper, which costs more than all of it.
#[inline(always)]
fn difference(source: &Addr, destination: &Addr, becomes: &Ends) -> u64 {
    let mut change = 0;
    let mut word = 0;
    while word < source.len() {
        // The head of a v4-mapped address is always the same: it adds what counts as nothing. Volatile, so
        // that the compiler does not read all of them first, for which it needs the stack.
        // SAFETY: references to words.
        unsafe {
            change += u64::from(!read_volatile(&source[word]));
            change += u64::from(read_volatile(&becomes.source[word]));
            change += u64::from(!read_volatile(&destination[word]));
            change += u64::from(read_volatile(&becomes.destination[word]));
        }
        word += 1;
    }
    let change = (change & 0xffff_ffff) + (change >> 32);
    (change & 0xffff_ffff) + (change >> 32)
}

/// The same where it is rare: a helper needs less stack.
#[inline(always)]
fn difference_quoted(from: &Ends, to: &Ends) -> Result<u64, u32> {
    const BOTH: u32 = 2 * size_of::<Addr>() as u32;
    let (from, to) = (from.source.as_ptr(), to.source.as_ptr());
    // SAFETY: each is the first of two addresses of a map's element.
    let change = unsafe { bpf_csum_diff(from.cast_mut(), BOTH, to.cast_mut(), BOTH, 0) };
    if change < 0 {
        return Err(drop::MALFORMED);
    }
    Ok(change as u64)
}

/// What an IPv4 header has from its checksum on: that, and the addresses, as they are to be.
#[inline(always)]
fn head_v4(ctx: &TcContext, work: &Work, change: u64) -> Result<[u16; 5], u32> {
    let Some(sum) = read::<u16>(ctx, V4_CHECKSUM) else {
        return Err(drop::MALFORMED);
    };
    let [a, b] = halves(work.becomes.source[3]);
    let [c, d] = halves(work.becomes.destination[3]);
    Ok([mended(sum, change), a, b, c, d])
}

/// A word as the two that it is in memory.
#[inline(always)]
fn halves(word: u32) -> [u16; 2] {
    let [a, b, c, d] = word.to_ne_bytes();
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
}

/// Both ports as one word, in the order of memory.
#[inline(always)]
fn ports(ends: &Ends) -> u32 {
    both(ends.source_port_be, ends.destination_port_be)
}

#[inline(always)]
fn both(first: u16, second: u16) -> u32 {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

#[inline(always)]
fn mend(ctx: &TcContext, sum: usize, from: u64, to: u64, flags: u64) -> Result<(), u32> {
    ctx.l4_csum_replace(sum, from, to, flags)
        .map_err(|_| drop::MALFORMED)
}

#[inline(always)]
fn store<T>(ctx: &TcContext, offset: usize, value: &T) -> Result<(), u32> {
    ctx.store(offset, value, 0).map_err(|_| drop::MALFORMED)
}

const _: () = {
    // What is stored at once lies side by side in a packet too.
    assert!(offset_of!(Ends, source) == 0);
    assert!(offset_of!(Ends, destination) == size_of::<Addr>());
    assert!(offset_of!(Ends, source_port_be) == 2 * size_of::<Addr>());
    assert!(offset_of!(Ends, destination_port_be) == offset_of!(Ends, source_port_be) + 2);
    assert!(V6_ADDRESSES + 2 * size_of::<Addr>() == IP_OFFSET + V6_LENGTH);
    assert!(V4_CHECKSUM + size_of::<[u16; 5]>() == IP_OFFSET + V4_LENGTH);
};
