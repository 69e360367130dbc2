//! From a frontend to one of its backends, at connect() and at unconnected sends. `translate` does
//! the same for packets, with the lookups and the choice of this file.
//!
//! The choice is random; a Service may ask for the backend with fewer connections of this node, of two
//! random ones: that finds a slow one without knowing why, and herds nobody to the idlest.
//!
//! A frontend without backends is refused at once: ECONNREFUSED where `bpf_set_retval` exists for
//! these hooks (Linux 6.1), else EPERM. A Service with affinity remembers its choice
//! per network namespace (a pod has one address per family, so that is its "client IP" before the
//! packet exists), an unconnected UDP socket per socket, as conntrack would.

use core::ptr::{addr_of, addr_of_mut, read_volatile};

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::{
    bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_coarse_ns,
    bpf_set_retval,
};
use aya_ebpf::programs::SockAddrContext;
use ebpf_maps::counter;
use ebpf_maps::services::{
    AFFINITY_NETNS, AFFINITY_SOCKET, Addr, AffinityKey, AffinityValue, BACKEND_IN_USE,
    BACKEND_ON_TRIAL, BackendValue, FRONTEND_LEAST_CONNECTIONS, FrontendKey, FrontendValue,
    SCOPE_ADDRESS, SCOPE_NODE_PORT, SLOTS_PER_ELEMENT, UDP_STICKY_S, is_v4_mapped, v4_mapped,
};

use crate::maps::{AFFINITY, BACKENDS, FRONTENDS, NODE_ADDRESSES, SLOTS, TRAFFIC, add, count};
use crate::socket::Peer;
use crate::{PASS, REFUSE, event, reverse};

/// Which system call asks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Connect,
    /// An unconnected datagram: asks again for each one.
    Send,
}

const ECONNREFUSED: i32 = 111;
const NS_PER_S: u64 = 1_000_000_000;
/// Times a frontend is read again when its element was reused under the reader.
pub const READ_ATTEMPTS: u32 = 3;

/// 1 where `bpf_set_retval` may be called from these hooks. The agent clears it when the kernel
/// refuses the programs with it; as read-only data it lets the verifier drop the call.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: u32 = 1;

/// What a frontend's value says, read consistently.
pub struct Frontend {
    /// The first slot.
    pub base: u32,
    /// How many backends.
    pub count: u32,
    pub service_id: u32,
    /// See `FrontendValue::affinity_s`.
    pub affinity_s: u32,
    /// See `FrontendValue::flags`.
    pub flags: u32,
}

impl Frontend {
    /// Its connections are counted.
    #[inline(always)]
    fn is_counted(&self) -> bool {
        self.flags & FRONTEND_LEAST_CONNECTIONS != 0
    }
}

/// Translates the peer if it is a frontend; `set` writes it back in the hook's family.
#[inline(always)]
pub fn forward(
    ctx: &SockAddrContext,
    peer: Peer,
    call: Call,
    set: fn(&SockAddrContext, &Addr, u16),
) -> i32 {
    let Some((key, mut value)) = frontend_of(&peer) else {
        return PASS;
    };
    let mut attempt = 0;
    while attempt < READ_ATTEMPTS {
        attempt += 1;
        if let Some(frontend) = read_frontend(&key, value) {
            if frontend.count == 0 {
                count(counter::NO_BACKEND);
                event::called(ctx, &peer, core::ptr::null(), call);
                return refuse();
            }
            if let Some((id, backend)) = choose(ctx, &frontend, call) {
                count(counter::TRANSLATED);
                count_chosen(id);
                event::called(ctx, &peer, backend, call);
                let counted = if frontend.is_counted() { id } else { 0 };
                reverse::remember(ctx, &peer, backend, counted, call);
                set(ctx, &backend.addr, backend.port_be);
                log(ctx, frontend.service_id, backend);
                return PASS;
            }
        }
        // Changed under the reader.
        match FRONTENDS.get_ptr(&key) {
            Some(newer) => value = newer,
            None => return PASS, // removed this moment
        }
    }
    count(counter::BROKEN_SLOT);
    refuse()
}

/// The frontend that answers for this peer, if any does: its key and its element.
#[inline(always)]
pub fn frontend_of(peer: &Peer) -> Option<(FrontendKey, *const FrontendValue)> {
    let key = FrontendKey {
        addr: peer.addr,
        port_be: peer.port_be,
        proto: peer.proto,
        scope: SCOPE_ADDRESS,
    };
    if let Some(value) = FRONTENDS.get_ptr(&key) {
        return Some((key, value));
    }
    NODE_ADDRESSES.get_ptr(&peer.addr)?;
    let any = if is_v4_mapped(&peer.addr) {
        v4_mapped(0)
    } else {
        [0; 4]
    };
    let key = FrontendKey {
        addr: any,
        scope: SCOPE_NODE_PORT,
        ..key
    };
    let value = FRONTENDS.get_ptr(&key)?;
    Some((key, value))
}

/// Reads a frontend's element; none when it was reused meanwhile: see [`FrontendValue`].
#[inline(always)]
pub fn read_frontend(key: &FrontendKey, value: *const FrontendValue) -> Option<Frontend> {
    // SAFETY: the lookup checked the pointer; the element stays mapped while the program runs.
    // base and count are 8-byte aligned neighbours (asserted in ebpf_maps).
    let (range, service_id, affinity_s, flags, check) = unsafe {
        let range = read_volatile(addr_of!((*value).base).cast::<[u32; 2]>().cast::<u64>());
        let service_id = read_volatile(addr_of!((*value).service_id));
        let affinity_s = read_volatile(addr_of!((*value).affinity_s));
        let flags = read_volatile(addr_of!((*value).flags));
        (
            range,
            service_id,
            affinity_s,
            flags,
            read_volatile(addr_of!((*value).check)),
        )
    };
    if check != key.check() {
        return None;
    }
    let [base, count] = words(range);
    Some(Frontend {
        base,
        count,
        service_id,
        affinity_s,
        flags,
    })
}

/// Two neighbouring words of memory that were loaded as one.
#[inline(always)]
fn words(pair: u64) -> [u32; 2] {
    if cfg!(target_endian = "little") {
        [pair as u32, (pair >> 32) as u32]
    } else {
        [(pair >> 32) as u32, pair as u32]
    }
}

/// A backend for this call; none if a slot is broken or belongs to another Service by now.
#[inline(always)]
fn choose(
    ctx: &SockAddrContext,
    frontend: &Frontend,
    call: Call,
) -> Option<(u32, &'static BackendValue)> {
    let (kind, timeout_s) = if frontend.affinity_s != 0 {
        (AFFINITY_NETNS, frontend.affinity_s)
    } else if call == Call::Send && frontend.count > 1 {
        (AFFINITY_SOCKET, UDP_STICKY_S)
    } else {
        return choose_any(frontend);
    };
    // SAFETY: both helpers take this hook's context.
    let client = unsafe {
        if kind == AFFINITY_NETNS {
            bpf_get_netns_cookie(ctx.as_ptr())
        } else {
            bpf_get_socket_cookie(ctx.as_ptr())
        }
    };
    choose_for(frontend, kind, client, timeout_s)
}

/// The backend that this client had within so many seconds, else any; and its id.
#[inline(always)]
pub fn choose_for(
    frontend: &Frontend,
    kind: u32,
    client: u64,
    timeout_s: u32,
) -> Option<(u32, &'static BackendValue)> {
    let client = Client::of(frontend, kind, client);
    if let Some(known) = client.backend(timeout_s) {
        return Some(known);
    }
    let chosen = choose_any(frontend)?;
    client.keep(chosen.0);
    Some(chosen)
}

/// Who asks, for backends that stay with their clients.
pub struct Client {
    key: AffinityKey,
    now_ns: u64,
}

impl Client {
    #[inline(always)]
    pub fn of(frontend: &Frontend, kind: u32, client: u64) -> Self {
        Self {
            key: AffinityKey {
                client,
                service_id: frontend.service_id,
                kind,
            },
            // SAFETY: takes nothing, returns a number.
            now_ns: unsafe { bpf_ktime_get_coarse_ns() },
        }
    }

    /// The backend that it had within so many seconds.
    #[inline(always)]
    pub fn backend(&self, timeout_s: u32) -> Option<(u32, &'static BackendValue)> {
        let last = AFFINITY.get_ptr_mut(&self.key)?;
        // SAFETY: the lookup checked the pointer. The element may be reused for another client at
        // any time; what is read is checked below, and a lost refresh only shortens a timeout.
        let (used_ns, id) = unsafe { ((*last).used_ns, (*last).backend_id) };
        if self.now_ns.wrapping_sub(used_ns) >= u64::from(timeout_s) * NS_PER_S {
            return None;
        }
        let backend = usable(id, self.key.service_id)?;
        // SAFETY: as above.
        unsafe { (*last).used_ns = self.now_ns };
        count(counter::AFFINITY_HITS);
        Some((id, backend))
    }

    #[inline(always)]
    pub fn keep(&self, backend_id: u32) {
        let value = AffinityValue {
            used_ns: self.now_ns,
            backend_id,
            _pad: 0,
        };
        // A full map only costs the affinity, and being LRU it is never full.
        let _ = AFFINITY.insert(&self.key, &value, 0);
    }
}

/// Whether another connection may go to this backend, and not only the one of its trial.
#[inline(always)]
pub fn takes_more(id: u32, backend: &BackendValue) -> bool {
    if backend.state != BACKEND_ON_TRIAL {
        return true;
    }
    match TRAFFIC.get_ptr(id) {
        // SAFETY: the lookup checked the pointer; other programs add to it at the same time. Two that
        // read it at once are two trials.
        Some(traffic) => unsafe { read_volatile(addr_of!((*traffic).chosen)) == 0 },
        None => false,
    }
}

/// The backend in a slot, or in the next one if that is on trial and has its connection.
#[inline(always)]
fn backend_from(frontend: &Frontend, index: u32) -> Option<(u32, &'static BackendValue)> {
    let one = backend_at(frontend.base.wrapping_add(index), frontend.service_id)?;
    if takes_more(one.0, one.1) {
        return Some(one);
    }
    let next = index.wrapping_add(1).checked_rem(frontend.count)?;
    backend_at(frontend.base.wrapping_add(next), frontend.service_id)
}

/// A random backend of the frontend, or the one with fewer connections of two.
#[inline(always)]
pub fn choose_any(frontend: &Frontend) -> Option<(u32, &'static BackendValue)> {
    let Frontend {
        base,
        count,
        service_id,
        flags,
        ..
    } = *frontend;
    let id = any_backend(base, count, service_id, flags);
    if id == 0 {
        return None;
    }
    let backend = BACKENDS.get(id)?;
    (backend.service_id == service_id).then_some((id, backend))
}

/// The id of that, or 0.
// Verified by itself, see `main`: three times it is tried.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn any_backend(base: u32, count: u32, service_id: u32, flags: u32) -> u32 {
    let frontend = Frontend {
        base,
        count,
        service_id,
        affinity_s: 0,
        flags,
    };
    match any_of(&frontend) {
        Some((id, _)) => id,
        None => 0,
    }
}

#[inline(always)]
fn any_of(frontend: &Frontend) -> Option<(u32, &'static BackendValue)> {
    // SAFETY: takes nothing, returns a number.
    let random = unsafe { bpf_get_prandom_u32() };
    // checked_rem: the verifier must see that no division by zero can panic.
    let first = random.checked_rem(frontend.count)?;
    let one = backend_from(frontend, first)?;
    if !frontend.is_counted() || frontend.count < 2 {
        return Some(one);
    }
    // SAFETY: as above.
    let step = unsafe { bpf_get_prandom_u32() }.checked_rem(frontend.count.wrapping_sub(1))?;
    let second = first
        .wrapping_add(step)
        .wrapping_add(1)
        .checked_rem(frontend.count)?;
    let other = backend_from(frontend, second)?;
    Some(if connections(other.0) < connections(one.0) {
        other
    } else {
        one
    })
}

/// The backend in a slot, and its id; none if it belongs to another Service by now.
#[inline(always)]
pub fn backend_at(slot: u32, service_id: u32) -> Option<(u32, &'static BackendValue)> {
    let pair = SLOTS.get(slot / SLOTS_PER_ELEMENT)?;
    let [even, odd] = *pair;
    let id = if slot % SLOTS_PER_ELEMENT == 0 {
        even
    } else {
        odd
    };
    let backend = BACKENDS.get(id)?;
    (backend.service_id == service_id).then_some((id, backend))
}

/// One more has gone to this backend.
#[inline(always)]
pub fn count_chosen(id: u32) {
    if let Some(traffic) = TRAFFIC.get_ptr_mut(id) {
        // SAFETY: the lookup checked the element; its fields are words.
        unsafe { add(addr_of_mut!((*traffic).chosen), 1) }
    }
}

/// Sockets of this node that are connected to a backend. Below zero (a repair met a close) is none.
#[inline(always)]
fn connections(id: u32) -> i64 {
    match TRAFFIC.get_ptr(id) {
        // SAFETY: the lookup checked the pointer; other programs add to it at the same time.
        Some(traffic) => unsafe { read_volatile(addr_of!((*traffic).connections)) as i64 }.max(0),
        None => 0,
    }
}

/// The backend of an affinity if the Service still sends to it.
#[inline(always)]
pub fn usable(id: u32, service_id: u32) -> Option<&'static BackendValue> {
    let backend = BACKENDS.get(id)?;
    (backend.service_id == service_id && backend.state == BACKEND_IN_USE).then_some(backend)
}

#[inline(always)]
fn refuse() -> i32 {
    // SAFETY: a read of this object's read-only data; volatile, because the agent may have
    // replaced the compiler's value before loading.
    if unsafe { read_volatile(addr_of!(HAS_SET_RETVAL)) } != 0 {
        // SAFETY: any negative errno is a valid argument.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    REFUSE
}

#[cfg(feature = "log")]
#[inline(always)]
fn log(ctx: &SockAddrContext, service_id: u32, backend: &BackendValue) {
    let (addr, port) = (u32::from_be(backend.addr[3]), u16::from_be(backend.port_be));
    aya_log_ebpf::debug!(ctx, "service {} to {:i}:{}", service_id, addr, port);
}

#[cfg(not(feature = "log"))]
#[inline(always)]
fn log(_ctx: &SockAddrContext, _service_id: u32, _backend: &BackendValue) {}

const _: () = assert!(core::mem::offset_of!(FrontendValue, base) % 8 == 0);
