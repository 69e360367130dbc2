//! The address in a `bpf_sock_addr`, in the one form that the maps use.
//!
//! The context must be read and written in words of 4 bytes at known offsets; volatile accesses
//! keep the compiler from merging them into something that the verifier refuses.

use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::programs::SockAddrContext;
use ebpf_maps::services::{Addr, v4_mapped};

/// The other end of a socket.
#[derive(Clone, Copy)]
pub struct Peer {
    pub addr: Addr,
    /// Network order.
    pub port_be: u16,
    /// IANA protocol number.
    pub proto: u8,
}

#[inline(always)]
pub fn peer_v4(ctx: &SockAddrContext) -> Peer {
    let sock = ctx.sock_addr;
    // SAFETY: the kernel passes a valid context; the field exists at hooks of IPv4.
    let addr_be = unsafe { read_volatile(addr_of!((*sock).user_ip4)) };
    peer(ctx, v4_mapped(addr_be))
}

#[inline(always)]
pub fn peer_v6(ctx: &SockAddrContext) -> Peer {
    let sock = ctx.sock_addr;
    // SAFETY: the kernel passes a valid context; the field exists at hooks of IPv6.
    let addr = unsafe {
        [
            read_volatile(addr_of!((*sock).user_ip6[0])),
            read_volatile(addr_of!((*sock).user_ip6[1])),
            read_volatile(addr_of!((*sock).user_ip6[2])),
            read_volatile(addr_of!((*sock).user_ip6[3])),
        ]
    };
    peer(ctx, addr)
}

#[inline(always)]
fn peer(ctx: &SockAddrContext, addr: Addr) -> Peer {
    let sock = ctx.sock_addr;
    // SAFETY: the kernel passes a valid context. The port is the low half of a word in memory
    // order; MPTCP (262) reads as TCP (6) in 8 bits, which is how it wants to be treated.
    let (port, proto) = unsafe {
        (
            read_volatile(addr_of!((*sock).user_port)),
            read_volatile(addr_of!((*sock).protocol)),
        )
    };
    Peer {
        addr,
        port_be: port as u16,
        proto: proto as u8,
    }
}

#[inline(always)]
pub fn set_peer_v4(ctx: &SockAddrContext, addr: &Addr, port_be: u16) {
    let sock = ctx.sock_addr;
    // SAFETY: the kernel passes a valid context; both fields may be written at these hooks.
    unsafe {
        write_volatile(addr_of_mut!((*sock).user_ip4), addr[3]);
        write_volatile(addr_of_mut!((*sock).user_port), u32::from(port_be));
    }
}

#[inline(always)]
pub fn set_peer_v6(ctx: &SockAddrContext, addr: &Addr, port_be: u16) {
    let sock = ctx.sock_addr;
    // SAFETY: the kernel passes a valid context; both fields may be written at these hooks.
    unsafe {
        write_volatile(addr_of_mut!((*sock).user_ip6[0]), addr[0]);
        write_volatile(addr_of_mut!((*sock).user_ip6[1]), addr[1]);
        write_volatile(addr_of_mut!((*sock).user_ip6[2]), addr[2]);
        write_volatile(addr_of_mut!((*sock).user_ip6[3]), addr[3]);
        write_volatile(addr_of_mut!((*sock).user_port), u32::from(port_be));
    }
}
