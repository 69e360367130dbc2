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

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::bpf_csum_diff;
use aya_ebpf::programs::TcContext;
use ebpf_maps::drop;
use ebpf_maps::flow::Ends;
use ebpf_maps::services::{Addr, v4_mapped};

use crate::conntrack;
use crate::drop::{packed, unpacked};
use crate::packet::{
    ICMP, ICMP_V6, IP_OFFSET, IS_FRAGMENT, NO_L4, Packet, TCP, UDP, V4_LENGTH, V6_LENGTH,
};
use crate::work::Work;

/// From the frame's start.
const V4_CHECKSUM: usize = IP_OFFSET + 10;
/// Source and destination are neighbours.
const V4_ADDRESSES: usize = IP_OFFSET + 12;
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
    unpacked(rewrite_packed(ctx, work))
}

#[inline(never)]
fn rewrite_packed(ctx: &TcContext, work: &mut Work) -> u32 {
    packed(rewrite_here(ctx, work))
}

#[inline(always)]
fn rewrite_here(ctx: &TcContext, work: &mut Work) -> Result<(), u32> {
    let (proto, at) = (work.packet.proto, work.packet.l4_offset as usize);
    let change = difference(&work.packet.source, &work.becomes.source)?;
    if work.packet.flags & NO_L4 == 0 {
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
        if matches!(proto, TCP | UDP) {
            let (from, to) = (ports(&work.packet.ends()), ports(&work.becomes));
            if from != to {
                mend(ctx, sum, u64::from(from), u64::from(to), flags | 4)?;
                store(ctx, at, &to)?;
            }
            work.packet.source_port_be = work.becomes.source_port_be;
            work.packet.destination_port_be = work.becomes.destination_port_be;
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
    if work.packet.is_v6 {
        store(
            ctx,
            V6_ADDRESSES,
            &[work.becomes.source, work.becomes.destination],
        )?;
    } else {
        (ctx.l3_csum_replace(V4_CHECKSUM, 0, change, 0)).map_err(|_| drop::MALFORMED)?;
        let ends = [work.becomes.source[3], work.becomes.destination[3]];
        store(ctx, V4_ADDRESSES, &ends)?;
    }
    work.packet.source = work.becomes.source;
    work.packet.destination = work.becomes.destination;
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
    unpacked(rewrite_error_packed(ctx, work, zone))
}

#[inline(never)]
fn rewrite_error_packed(ctx: &TcContext, work: &mut Work, zone: u8) -> u32 {
    packed(rewrite_error_here(ctx, work, zone))
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
    let change = difference(&work.quoted.source, &work.flow.ends.source)?;
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

/// What the sum over source and destination, which lie side by side in `Ends` and in `Packet`,
/// changes by. The head of a v4-mapped address is always the same and adds nothing.
#[inline(always)]
fn difference(from: &Addr, to: &Addr) -> Result<u64, u32> {
    const BOTH: u32 = 2 * size_of::<Addr>() as u32;
    let (from, to) = (from.as_ptr().cast_mut(), to.as_ptr().cast_mut());
    // SAFETY: each is the first of two addresses of a map's element.
    let change = unsafe { bpf_csum_diff(from, BOTH, to, BOTH, 0) };
    if change < 0 {
        return Err(drop::MALFORMED);
    }
    Ok(change as u64)
}

/// Both ports as one word, in the order of memory.
#[inline(always)]
fn ports(ends: &Ends) -> u32 {
    let ([a, b], [c, d]) = (
        ends.source_port_be.to_ne_bytes(),
        ends.destination_port_be.to_ne_bytes(),
    );
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

#[inline(always)]
fn same(a: &Addr, b: &Addr) -> bool {
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}

const _: () = {
    // `difference` reads over both.
    assert!(offset_of!(Ends, destination) == size_of::<Addr>());
    assert!(offset_of!(Packet, destination) == size_of::<Addr>());
};
