//! A pod speaks for itself only: its own addresses, its own hardware address, its own neighbours'
//! entries.
//!
//! ```text
//!  source is an address of this very pod, from its hardware address ─► passes     (no call)
//!  else: link-local or no source ─► neighbour and multicast discovery for itself  ─► passes
//!        no source               ─► a DHCP client's broadcast                     ─► passes
//!        ARP                     ─► for its own address                           ─► passes
//!        all else                ─► dropped, by reason
//! ```
//! A pod is no router: its router advertisements, redirects and multicast queries are dropped,
//! because other pods on the bridge would believe them.
//!
//! An element of ENDPOINTS may be reused while it is read (see `FrontendValue`): for the
//! nanoseconds in which a pod's rows are replaced, one of its packets may be judged by another's.

use aya_ebpf::programs::TcContext;
use ebpf_maps::drop;
use ebpf_maps::endpoint::{InterfaceValue, Mac};
use ebpf_maps::services::{Addr, v4_mapped};

use crate::addr::same;
use crate::drop::{packed, unpacked};
use crate::maps::{ENDPOINTS, INTERFACES, endpoint};
use crate::packet::{self, Frame, ICMP_V6, IP_OFFSET, NO_L4, Packet, UDP};
use crate::work::Work;

/// ICMPv6 types: RFC 4861, 2710, 3810.
const LISTENER_REPORT: u8 = 131;
const LISTENER_DONE: u8 = 132;
const LISTENER_QUERY: u8 = 130;
const LISTENER_REPORT_V2: u8 = 143;
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// From the ICMPv6 header to the target address of neighbour discovery.
const TARGET_OFFSET: usize = 8;

const DHCP_CLIENT: u16 = 68_u16.to_be();
const DHCP_SERVER: u16 = 67_u16.to_be();
const BROADCAST: u32 = u32::MAX;

/// Ethernet, IPv4, 6 and 4 bytes of address: the head of every ARP message that counts.
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_REQUEST: u16 = 1_u16.to_be();

/// The body of an ARP message for IPv4 over Ethernet.
#[repr(C)]
#[derive(Clone, Copy)]
struct Arp {
    head: [u8; 6],
    operation: u16,
    sender_mac: Mac,
    sender: [u8; 4],
    target_mac: Mac,
    target: [u8; 4],
}

/// Whose frame this is: `work.pod_id` and `work.pod_flags`; or why it must not have been sent.
#[inline(always)]
pub fn check(ctx: &TcContext, frame: Frame, work: &mut Work) -> Result<(), u32> {
    if frame == Frame::Ip
        && work.packet.proto != ICMP_V6
        && let Some(own) = endpoint(&work.packet.source)
        && own.ifindex == ifindex(ctx)
        && let Some(mac) = packet::source_mac(ctx)
        && packet::same_mac(&mac, &own.pod_mac)
    {
        work.pod_id = own.pod_id;
        work.pod_flags = own.flags;
        return Ok(());
    }
    unpacked(check_any(ctx, frame, work))
}

/// What is not the usual packet of a pod.
#[inline(never)]
fn check_any(ctx: &TcContext, frame: Frame, work: &mut Work) -> u32 {
    packed(check_here(ctx, frame, work))
}

#[inline(always)]
fn check_here(ctx: &TcContext, frame: Frame, work: &mut Work) -> Result<(), u32> {
    let ifindex = ifindex(ctx);
    let Some(mac) = packet::source_mac(ctx) else {
        return Err(drop::MALFORMED);
    };
    let packet = &work.packet;
    if frame == Frame::Ip
        && let Some(own) = ENDPOINTS.get_ptr(&packet.source)
    {
        // SAFETY: the pointer is an element of the map, checked by the lookup.
        let (at, pod_id, own_mac) = unsafe { ((*own).ifindex, (*own).pod_id, (*own).pod_mac) };
        if at == ifindex && equal(&mac, &own_mac) {
            // SAFETY: as above.
            work.pod_flags = unsafe { (*own).flags };
            work.pod_id = pod_id;
            if packet.proto == ICMP_V6 && packet.is_v6 {
                discovery(ctx, packet, ifindex, &mac, false)?;
            }
            return Ok(());
        }
    }
    let Some(interface) = INTERFACES.get_ptr(&ifindex) else {
        return Err(drop::NO_POD);
    };
    // SAFETY: the pointer is an element of the map, checked by the lookup.
    let InterfaceValue {
        pod_id, pod_mac, ..
    } = unsafe { *interface };
    // Before it has an address it says little.
    work.pod_flags = 0;
    work.pod_id = pod_id;
    if !equal(&mac, &pod_mac) {
        return Err(drop::SOURCE_MAC);
    }
    match frame {
        Frame::Ip if packet.is_v6 => without_address_v6(ctx, packet, ifindex, &pod_mac),
        Frame::Ip if asks_for_lease(packet) => Ok(()),
        Frame::Ip => Err(drop::SOURCE_ADDRESS),
        Frame::Arp => arp(ctx, ifindex, &pod_mac),
        Frame::Other => Err(drop::LINK_PROTOCOL),
        Frame::Malformed => Err(drop::MALFORMED),
    }
}

/// From the link-local or the unspecified address only discovery comes.
#[inline(always)]
fn without_address_v6(
    ctx: &TcContext,
    packet: &Packet,
    ifindex: u32,
    mac: &Mac,
) -> Result<(), u32> {
    let nobody = same(&packet.source, &[0; 4]);
    if !(nobody || same(&packet.source, &link_local(mac))) || packet.proto != ICMP_V6 {
        return Err(drop::SOURCE_ADDRESS);
    }
    match packet.kind {
        LISTENER_REPORT
        | LISTENER_DONE
        | LISTENER_REPORT_V2
        | ROUTER_SOLICITATION
        | NEIGHBOUR_SOLICITATION
        | NEIGHBOUR_ADVERTISEMENT
            if packet.flags & NO_L4 == 0 =>
        {
            discovery(ctx, packet, ifindex, mac, nobody)
        }
        ROUTER_ADVERTISEMENT | REDIRECT | LISTENER_QUERY => Err(drop::NEIGHBOUR),
        _ => Err(drop::SOURCE_ADDRESS),
    }
}

/// What a pod says of neighbours must be about itself; duplicate address detection is a
/// solicitation from nobody for the address that it wants.
#[inline(always)]
fn discovery(
    ctx: &TcContext,
    packet: &Packet,
    ifindex: u32,
    mac: &Mac,
    from_nobody: bool,
) -> Result<(), u32> {
    match packet.kind {
        ROUTER_ADVERTISEMENT | REDIRECT | LISTENER_QUERY => return Err(drop::NEIGHBOUR),
        NEIGHBOUR_ADVERTISEMENT => {}
        NEIGHBOUR_SOLICITATION if from_nobody => {}
        _ => return Ok(()),
    }
    let Ok(target) = ctx.load::<Addr>(packet.l4_offset as usize + TARGET_OFFSET) else {
        return Err(drop::MALFORMED);
    };
    if is_own(&target, ifindex) || same(&target, &link_local(mac)) {
        return Ok(());
    }
    Err(drop::NEIGHBOUR)
}

/// The sender is the pod, or nobody yet: the probe before an address is used (RFC 5227).
#[inline(always)]
fn arp(ctx: &TcContext, ifindex: u32, mac: &Mac) -> Result<(), u32> {
    let Ok(arp) = ctx.load::<Arp>(IP_OFFSET) else {
        return Err(drop::MALFORMED);
    };
    let mut index = 0;
    while index < ARP_HEAD.len() {
        if arp.head[index] != ARP_HEAD[index] {
            return Err(drop::NEIGHBOUR);
        }
        index += 1;
    }
    let sender = u32::from_ne_bytes(arp.sender);
    let speaks_for = if sender == 0 && arp.operation == ARP_REQUEST {
        u32::from_ne_bytes(arp.target)
    } else {
        sender
    };
    if equal(&arp.sender_mac, mac) && is_own(&v4_mapped(speaks_for), ifindex) {
        return Ok(());
    }
    Err(drop::NEIGHBOUR)
}

/// A DHCP client without a lease, as some CNI plugins' address management needs.
#[inline(always)]
fn asks_for_lease(packet: &Packet) -> bool {
    same(&packet.source, &v4_mapped(0))
        && same(&packet.destination, &v4_mapped(BROADCAST))
        && packet.proto == UDP
        && packet.source_port_be == DHCP_CLIENT
        && packet.destination_port_be == DHCP_SERVER
}

#[inline(always)]
fn is_own(addr: &Addr, ifindex: u32) -> bool {
    match ENDPOINTS.get_ptr(addr) {
        // SAFETY: the pointer is an element of the map, checked by the lookup.
        Some(own) => unsafe { (*own).ifindex == ifindex },
        None => false,
    }
}

/// The link-local address that the kernel gives an interface with this hardware address.
#[inline(always)]
fn link_local(mac: &Mac) -> Addr {
    [
        u32::from_ne_bytes([0xfe, 0x80, 0, 0]),
        0,
        u32::from_ne_bytes([mac[0] ^ 2, mac[1], mac[2], 0xff]),
        u32::from_ne_bytes([0xfe, mac[3], mac[4], mac[5]]),
    ]
}

#[inline(always)]
fn ifindex(ctx: &TcContext) -> u32 {
    // SAFETY: the kernel passes a valid context.
    unsafe { (*ctx.skb.skb).ifindex }
}

/// Equality without a call to memcmp.
#[inline(always)]
fn equal(a: &Mac, b: &Mac) -> bool {
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4] && a[5] == b[5]
}

const _: () = assert!(core::mem::size_of::<Arp>() == 28);
