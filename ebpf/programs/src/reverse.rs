//! From a backend back to the frontend that the client named: peer names and datagram sources.
//!
//! Without it an unconnected UDP client would drop the answer (it comes from an address that it
//! never wrote to) and getpeername() would show a pod instead of the Service.
//!
//! ```text
//!  connect()         ──► PEERS[cookie]            one element a socket, gone with it
//!                   └──► when that is full, and
//!  unconnected sends ──► REVERSE_NAT[cookie, backend]   the least recently used go first
//! ```

use core::ptr::addr_of_mut;

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::programs::{SockAddrContext, SockContext};
use ebpf_maps::counter;
use ebpf_maps::services::{Addr, BackendValue, PeerValue, ReverseKey, ReverseValue};

use crate::PASS;
use crate::failing::{self, Failure};
use crate::maps::{BACKENDS, PEERS, REVERSE_NAT, TRAFFIC, add, count};
use crate::service::Call;
use crate::socket::Peer;

/// The state of a TCP socket that has not been answered yet.
const SYN_SENT: u32 = 2;

/// Notes that this socket reached `backend` by the name of `peer`.
///
/// * `counted` – the backend's id if its connections are counted, else 0.
#[inline(always)]
pub fn remember(
    ctx: &SockAddrContext,
    peer: &Peer,
    backend: &BackendValue,
    counted: u32,
    call: Call,
) {
    // SAFETY: the helper takes this hook's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let frontend = ReverseValue {
        addr: peer.addr,
        port_be: peer.port_be,
        _pad: 0,
        service_id: backend.service_id,
    };
    if call == Call::Connect {
        let value = PeerValue {
            backend: backend.addr,
            frontend,
            backend_port_be: backend.port_be,
            syn_count: 0,
            backend_id: counted,
        };
        if counted != 0 {
            uncount(cookie); // a datagram socket may connect again
        }
        // Full: more connections than elements, or sockets that ended without sock_release (MPTCP's
        // subflows do).
        if PEERS.insert(&cookie, &value, 0).is_ok() {
            count_connection(counted, 1);
            return;
        }
    }
    let key = reverse_key(cookie, backend.addr, backend.port_be);
    // The next datagram of an unconnected socket: a lookup is cheaper than an update.
    // SAFETY: the value may be reused while it is compared; then it differs and is written anew.
    if unsafe { REVERSE_NAT.get(&key) }.is_some_and(|known| same(known, &frontend)) {
        return;
    }
    if REVERSE_NAT.insert(&key, &frontend, 0).is_err() {
        count(counter::REVERSE_LOST);
    }
}

/// Turns the peer back into the frontend that this socket used, if it used one.
#[inline(always)]
pub fn restore(ctx: &SockAddrContext, peer: Peer, set: fn(&SockAddrContext, &Addr, u16)) -> i32 {
    // SAFETY: the helper takes this hook's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the element is this socket's own, and only its end frees it.
    if let Some(value) = unsafe { PEERS.get(&cookie) }
        && value.backend_port_be == peer.port_be
        && equal(&value.backend, &peer.addr)
    {
        set(ctx, &value.frontend.addr, value.frontend.port_be);
        count(counter::REVERSED);
        return PASS;
    }
    let key = reverse_key(cookie, peer.addr, peer.port_be);
    // SAFETY: the element is this socket's; only eviction could reuse it in these nanoseconds,
    // and the lookup has just made it the most recently used.
    if let Some(value) = unsafe { REVERSE_NAT.get(&key) } {
        set(ctx, &value.addr, value.port_be);
        count(counter::REVERSED);
    }
    PASS
}

/// Drops what is known of a closing socket. What lies in `REVERSE_NAT` is left to its age: cookies
/// are never reused, so it can mislead nobody.
#[inline(always)]
pub fn forget(ctx: &SockContext) {
    // Whatever the socket's state: a refused connect() has cleared its port by now.
    // SAFETY: the helper takes this hook's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the kernel passes a valid context.
    if unsafe { (*ctx.sock).state } == SYN_SENT {
        give_up(cookie);
    }
    // Not found is the common case: most sockets never met a Service.
    uncount(cookie);
    let _ = PEERS.remove(&cookie);
}

/// Its owner does not wait for an answer any longer: mostly before the SYN would be sent again.
#[inline(always)]
fn give_up(cookie: u64) {
    // SAFETY: the element is this socket's own, and only its end frees it.
    if let Some(value) = unsafe { PEERS.get(&cookie) }
        && value.syn_count != 0
    {
        failing::note(&value.backend, value.backend_port_be, Failure::GivenUp);
    }
}

/// Takes a socket out of the count that it is in.
#[inline(always)]
fn uncount(cookie: u64) {
    // SAFETY: the element is this socket's own, and only its end frees it.
    let Some(value) = (unsafe { PEERS.get(&cookie) }) else {
        return;
    };
    // Its id may be another backend's by now, which was never connected to.
    let Some(backend) = BACKENDS.get(value.backend_id) else {
        return;
    };
    if backend.port_be == value.backend_port_be && equal(&backend.addr, &value.backend) {
        count_connection(value.backend_id, -1);
    }
}

/// Changes the count of a backend; id 0 is none.
#[inline(always)]
fn count_connection(backend_id: u32, change: i64) {
    if backend_id == 0 {
        return;
    }
    if let Some(traffic) = TRAFFIC.get_ptr_mut(backend_id) {
        // SAFETY: the lookup checked the element; its fields are words.
        unsafe { add(addr_of_mut!((*traffic).connections), change) }
    }
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
    equal(&a.addr, &b.addr) && a.port_be == b.port_be && a.service_id == b.service_id
}

#[inline(always)]
fn equal(a: &Addr, b: &Addr) -> bool {
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}
