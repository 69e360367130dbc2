//! From a backend back to the frontend that the client named: peer names and datagram sources.
//!
//! Without it an unconnected UDP client would drop the answer (it comes from an address that it
//! never wrote to) and getpeername() would show a pod instead of the Service.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::programs::{SockAddrContext, SockContext};
use ebpf_maps::counter;
use ebpf_maps::services::{Addr, BackendValue, ReverseKey, ReverseValue, v4_mapped};

use crate::PASS;
use crate::maps::{REVERSE_NAT, count};
use crate::socket::Peer;

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// Notes that this socket reached `backend` by the name of `peer`.
#[inline(always)]
pub fn remember(ctx: &SockAddrContext, peer: &Peer, backend: &BackendValue) {
    // SAFETY: the helper takes this hook's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let key = reverse_key(cookie, backend.addr, backend.port_be);
    let value = ReverseValue {
        addr: peer.addr,
        port_be: peer.port_be,
        _pad: 0,
        service_id: backend.service_id,
    };
    // The next datagram of an unconnected socket: a lookup is cheaper than an update.
    // SAFETY: the value may be reused while it is compared; then it differs and is written anew.
    if unsafe { REVERSE_NAT.get(&key) }.is_some_and(|known| same(known, &value)) {
        return;
    }
    if REVERSE_NAT.insert(&key, &value, 0).is_err() {
        count(counter::REVERSE_LOST);
    }
}

/// Turns the peer back into the frontend that this socket used, if it used one.
#[inline(always)]
pub fn restore(ctx: &SockAddrContext, peer: Peer, set: fn(&SockAddrContext, &Addr, u16)) -> i32 {
    // SAFETY: the helper takes this hook's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let key = reverse_key(cookie, peer.addr, peer.port_be);
    // SAFETY: the element is this socket's; only eviction could reuse it in these nanoseconds,
    // and the lookup has just made it the most recently used.
    if let Some(value) = unsafe { REVERSE_NAT.get(&key) } {
        set(ctx, &value.addr, value.port_be);
        count(counter::REVERSED);
    }
    PASS
}

/// Drops what is known of a closing socket. An unconnected one leaves its entries to the LRU:
/// cookies are never reused, so they can mislead nobody.
#[inline(always)]
pub fn forget(ctx: &SockContext) {
    let sock = ctx.sock;
    // All fields are read before any branch: the compiler would merge equal reads of two branches
    // into one at a computed offset, which the verifier refuses.
    // SAFETY: the kernel passes a valid context; these fields may be read at release.
    let (family, port_be, v4, v6) = unsafe {
        (
            read_volatile(addr_of!((*sock).family)),
            read_volatile(addr_of!((*sock).dst_port)),
            read_volatile(addr_of!((*sock).dst_ip4)),
            [
                read_volatile(addr_of!((*sock).dst_ip6[0])),
                read_volatile(addr_of!((*sock).dst_ip6[1])),
                read_volatile(addr_of!((*sock).dst_ip6[2])),
                read_volatile(addr_of!((*sock).dst_ip6[3])),
            ],
        )
    };
    if port_be == 0 {
        return;
    }
    let addr = match family {
        AF_INET => v4_mapped(v4),
        AF_INET6 => v6,
        _ => return,
    };
    // SAFETY: the helper takes this hook's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // Not found is the common case: most sockets never met a Service.
    let _ = REVERSE_NAT.remove(&reverse_key(cookie, addr, port_be));
}

#[inline(always)]
fn reverse_key(cookie: u64, addr: Addr, port_be: u16) -> ReverseKey {
    ReverseKey {
        cookie,
        addr,
        port_be,
        _pad: [0; 3],
    }
}

/// Equality without a call to memcmp.
#[inline(always)]
fn same(a: &ReverseValue, b: &ReverseValue) -> bool {
    a.addr[0] == b.addr[0]
        && a.addr[1] == b.addr[1]
        && a.addr[2] == b.addr[2]
        && a.addr[3] == b.addr[3]
        && a.port_be == b.port_be
        && a.service_id == b.service_id
}
