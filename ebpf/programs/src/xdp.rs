//! What comes from outside for a Service and goes on to a backend elsewhere, before the kernel has made a
//! packet of it. The tables and the decisions are those of `outside`; the packet is rewritten where it lies.
//!
//! ```text
//!  received  neither plain TCP nor UDP              ─► the kernel's, and so `outside`'s
//!            of a known flow, or to a frontend      ─► becomes what `outside` would make of it
//!            for this node or a pod of it           ─► `outside`'s, as it came
//!            kept out by source ranges, or by the traffic policy of its Service ─► dropped
//!            leaves by an uplink that has this program ─► rewritten, and sent there
//!            by anything else, too long for it, to a neighbour who is not known ─► `outside`'s, as it came
//! ```
//! Invariants: a packet is either sent on or dropped here, or not touched; so `outside` never sees one that
//! is half translated, and does whatever this program leaves. What `outside` would have told a watcher is
//! left to it.
//!
//! Limits: a packet whose sum is not complete yet (made on this machine: of a veth, of a virtual machine)
//! is left to the kernel, which alone knows that. It looks like one with the sum of its pseudo header. A
//! neighbour's hardware address is used as it is known; the kernel asks again when something else is sent
//! there. Of a route or a neighbour that changes it hears some milliseconds late: see `way`.

use core::mem::size_of;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_TX};
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::programs::XdpContext;
use ebpf_maps::counter;
use ebpf_maps::drop;
use ebpf_maps::endpoint::Mac;
use ebpf_maps::flow::{DIRECT_RETURN, Ends, IS_REPLY, ZONE_OUTSIDE};
use ebpf_maps::services::Addr;
use ebpf_maps::uplink::XDP_OFF;

use crate::addr::same;
use crate::checksum::{difference, folded, mended};
use crate::maps::{UPLINKS, count, work};
use crate::outside::{
    Hook, NO_BACKEND, NO_BACKEND_HERE, NO_FRONTEND, NOT_ADMITTED, is_to, same_mac,
};
use crate::packet::{
    ACK, Frame, IP_OFFSET, Packet, SYN, TCP, UDP, V4_LENGTH, V6_LENGTH, parse, read,
};
use crate::work::Work;
use crate::{conntrack, event, failing, outside, way};

/// Where the layer above IP begins: of packets without options.
const V4_L4: usize = IP_OFFSET + V4_LENGTH;
const V6_L4: usize = IP_OFFSET + V6_LENGTH;
/// From there to the checksum.
const TCP_SUM: usize = 16;
const UDP_SUM: usize = 6;

/// The hardware addresses of a frame.
#[repr(C)]
#[derive(Clone, Copy)]
struct Ethernet {
    to: Mac,
    from: Mac,
}

/// What comes in by an uplink.
#[inline(always)]
pub fn received(ctx: &XdpContext) -> u32 {
    let Some(work) = work() else {
        return XDP_PASS;
    };
    if parse(ctx, &mut work.packet) != Frame::Ip {
        return XDP_PASS;
    }
    match decide(ctx.ctx, work) {
        SENDS => send(ctx, work).unwrap_or(XDP_PASS),
        verdict => verdict,
    }
}

/// An answer of [`decide`] that is no verdict: the packet is to become what `work.flow` says, and to leave.
const SENDS: u32 = u32::MAX;

/// What becomes of a packet. One number comes back, so that the verifier goes on once, however that was found.
#[inline(never)]
fn decide(ctx: *mut xdp_md, work: &mut Work) -> u32 {
    let packet = &work.packet;
    if packet.flags != 0 || !matches!(packet.proto, TCP | UDP) {
        return XDP_PASS;
    }
    let is_known = conntrack::is_used(ZONE_OUTSIDE) && conntrack::find(work, ZONE_OUTSIDE);
    // These are what a watcher is told of.
    let is_told = !is_known || begins(&work.packet);
    if is_told && event::is_watched() {
        return XDP_PASS;
    }
    if is_known && work.flow.backend_id == 0 {
        return XDP_PASS; // of a pod, by the node's address
    }
    if !is_known || !outside::stands(&work.flow, &work.packet) {
        let id = outside::choose(work);
        let hook = hook(ctx);
        if id == NO_FRONTEND || id == NO_BACKEND || !is_to(&XdpContext::new(ctx), hook.ifindex) {
            return XDP_PASS;
        }
        if id == NO_BACKEND_HERE {
            return dropped(drop::NO_BACKEND_HERE);
        }
        if id == NOT_ADMITTED {
            return dropped(drop::SOURCE_RANGE);
        }
        if let Err(reason) = outside::begin(hook, work, id) {
            return dropped(reason);
        }
    }
    if work.flow.flags & (DIRECT_RETURN | IS_REPLY) == 0
        && same(&work.flow.ends.source, &work.packet.source)
    {
        return XDP_PASS; // for a backend of this node
    }
    SENDS
}

#[inline(always)]
fn hook(ctx: *mut xdp_md) -> Hook {
    Hook {
        ctx: ctx.cast(),
        // SAFETY: the kernel passes a valid context.
        ifindex: unsafe { (*ctx).ingress_ifindex },
    }
}

#[inline(always)]
fn begins(packet: &Packet) -> bool {
    packet.proto == UDP || packet.kind & (SYN | ACK) == SYN
}

#[inline(always)]
fn dropped(reason: u32) -> u32 {
    crate::drop::count(reason);
    XDP_DROP
}

/// Sends the packet, as what its flow becomes; none: it cannot be done here, and nothing was.
#[inline(always)]
fn send(ctx: &XdpContext, work: &mut Work) -> Option<u32> {
    let hook = hook(ctx.ctx);
    let is_direct = work.flow.flags & DIRECT_RETURN != 0;
    let packet = &work.packet;
    let becomes = &work.flow.ends;
    let length = match packet.is_v6 {
        false => u16::from_be(read(ctx, IP_OFFSET + 2)?),
        true => u16::from_be(read::<u16>(ctx, IP_OFFSET + 4)?).checked_add(V6_LENGTH as u16)?,
    };
    let way = way::of(hook, packet.is_v6, &becomes.source, &becomes.destination)?;
    if length > way.length_max {
        return None;
    }
    let is_back = way.ifindex == hook.ifindex;
    if is_back {
        // The hardware address that it leaves from is the one that it has to have come to.
        if !same_mac(&read(ctx, 0)?, &way.from) {
            return None;
        }
    } else if !is_to(ctx, hook.ifindex) || !takes_frames(way.ifindex) {
        return None;
    }
    if is_direct && same(&way.hop, &becomes.destination) {
        return None;
    }
    let done = match (packet.is_v6, is_direct) {
        (false, true) => age_v4(ctx),
        (true, true) => age_v6(ctx),
        (false, false) => rewrite_v4(ctx, packet, becomes, length),
        (true, false) => rewrite_v6(ctx, packet, becomes, length),
    };
    done?;
    let ethernet = place::<Ethernet>(ctx, 0)?;
    // SAFETY: within the packet, as just checked.
    unsafe {
        (*ethernet).to = way.to;
        (*ethernet).from = way.from;
    }
    failing::heard(packet);
    count(counter::XDP_SENT);
    Some(match is_back {
        true => XDP_TX,
        // SAFETY: any index is a valid argument.
        false => unsafe { bpf_redirect(way.ifindex, 0) as u32 },
    })
}

/// Whether one interface may send what has come by the other: a driver without a program may take no frames.
#[inline(always)]
fn takes_frames(to: u32) -> bool {
    match UPLINKS.get_ptr(&to) {
        // SAFETY: the pointer is an element of the map, checked by the lookup.
        Some(to) => unsafe { (*to).xdp != XDP_OFF },
        None => false,
    }
}

/// Bytes of the packet, to be written where they lie.
#[inline(always)]
fn place<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    Some(start as *mut T)
}

/// The first bytes of an IPv4 packet, in units of the checksum.
type HeaderV4 = [u16; V4_LENGTH / 2];
const HOPS: usize = 4;
const SUM: usize = 5;

#[inline(always)]
fn age_v4(ctx: &XdpContext) -> Option<()> {
    let header = place::<HeaderV4>(ctx, IP_OFFSET)?;
    // SAFETY: within the packet, as just checked.
    let header = unsafe { &mut *header };
    let (from, to) = aged(header[HOPS])?;
    header[HOPS] = to;
    header[SUM] = mended(header[SUM], u64::from(!from) + u64::from(to));
    Some(())
}

/// Hops and protocol as they are and one hop further; none: it was the last one.
#[inline(always)]
fn aged(word: u16) -> Option<(u16, u16)> {
    let [hops, proto] = word.to_ne_bytes();
    (hops > 1).then(|| (word, u16::from_ne_bytes([hops - 1, proto])))
}

#[inline(always)]
fn age_v6(ctx: &XdpContext) -> Option<()> {
    let hops = place::<u8>(ctx, IP_OFFSET + 7)?;
    // SAFETY: within the packet, as just checked.
    unsafe {
        if *hops <= 1 {
            return None;
        }
        *hops -= 1;
    }
    Some(())
}

#[inline(always)]
fn rewrite_v4(ctx: &XdpContext, packet: &Packet, becomes: &Ends, length: u16) -> Option<()> {
    let before = [packet.source[3], packet.destination[3]];
    let after = [becomes.source[3], becomes.destination[3]];
    let header = place::<HeaderV4>(ctx, IP_OFFSET)?;
    let addresses = place::<[u32; 2]>(ctx, IP_OFFSET + 12)?;
    // SAFETY: within the packet, as just checked.
    let (from, to) = aged(unsafe { (*header)[HOPS] })?;
    let change = difference(before[0], after[0]) + difference(before[1], after[1]);
    let pseudo = u64::from(before[0]) + u64::from(before[1]);
    let l4_length = length.checked_sub(V4_LENGTH as u16)?;
    rewrite_l4::<V4_L4>(ctx, packet, becomes, pseudo, l4_length, change)?;
    // SAFETY: as above.
    unsafe {
        (*header)[HOPS] = to;
        let change = change + u64::from(!from) + u64::from(to);
        (*header)[SUM] = mended((*header)[SUM], change);
        *addresses = after;
    }
    Some(())
}

#[inline(always)]
fn rewrite_v6(ctx: &XdpContext, packet: &Packet, becomes: &Ends, length: u16) -> Option<()> {
    let addresses = place::<[Addr; 2]>(ctx, IP_OFFSET + 8)?;
    let (mut change, mut pseudo) = (0, 0);
    let mut word = 0;
    while word < 4 {
        change += difference(packet.source[word], becomes.source[word]);
        change += difference(packet.destination[word], becomes.destination[word]);
        pseudo += u64::from(packet.source[word]) + u64::from(packet.destination[word]);
        word += 1;
    }
    let hops = place::<u8>(ctx, IP_OFFSET + 7)?;
    // SAFETY: within the packet, as just checked.
    if unsafe { *hops } <= 1 {
        return None;
    }
    let l4_length = length - V6_LENGTH as u16;
    rewrite_l4::<V6_L4>(ctx, packet, becomes, pseudo, l4_length, change)?;
    // SAFETY: as above.
    unsafe {
        *hops -= 1;
        (*addresses)[0] = becomes.source;
        (*addresses)[1] = becomes.destination;
    }
    Some(())
}

/// The ports and the sum of TCP or UDP at this offset. The first thing that is written: none, and it is
/// not.
///
/// * `pseudo` – the sum over the addresses before, `change` what it changes by.
#[inline(always)]
fn rewrite_l4<const AT: usize>(
    ctx: &XdpContext,
    packet: &Packet,
    becomes: &Ends,
    pseudo: u64,
    length: u16,
    change: u64,
) -> Option<()> {
    let ports = place::<[u16; 2]>(ctx, AT)?;
    let sum = match packet.proto {
        TCP => place::<u16>(ctx, AT + TCP_SUM)?,
        _ => place::<u16>(ctx, AT + UDP_SUM)?,
    };
    // SAFETY: within the packet, as just checked.
    let before = unsafe { *sum };
    let is_udp = packet.proto == UDP;
    // UDP over IPv4 may have none.
    let has_sum = !is_udp || before != 0;
    if has_sum {
        let partial = pseudo + u64::from(u16::from(packet.proto).to_be());
        if before == folded(partial) || before == folded(partial + u64::from(length.to_be())) {
            return None;
        }
        let mut change = change;
        change += u64::from(!packet.source_port_be) + u64::from(becomes.source_port_be);
        change += u64::from(!packet.destination_port_be) + u64::from(becomes.destination_port_be);
        let mut after = mended(before, change);
        if is_udp && after == 0 {
            after = 0xffff;
        }
        // SAFETY: as above.
        unsafe { *sum = after }
    }
    // SAFETY: as above.
    unsafe { *ports = [becomes.source_port_be, becomes.destination_port_be] }
    Some(())
}
