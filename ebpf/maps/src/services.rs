//! Services: from a frontend that a client names to the backend that it gets, and back.
//!
//! ```text
//!  FRONTENDS[addr, port, proto, scope] = {base, count, service_id, …}      one update switches it
//!       SLOTS[base .. base + count]    = backend ids                       written before, by mmap
//!       BACKENDS[id]                   = {addr, port, …}                   written first, by mmap
//!       SOURCE_RANGES[service_id, prefix]                          who may come from outside
//! ```
//! A range of slots and a backend id are immutable while anything refers to them; only
//! [`BackendValue::state`] goes from in use, or on trial, to retired. Both are reused 1 s after the last
//! frontend left them, when no program can still hold what it has read.

use core::mem::{offset_of, size_of};

use crate::plain_old_data;

/// Entries of `FRONTENDS`.
pub const FRONTEND_COUNT_MAX: u32 = 65_536;
/// Slots of the arena: the sum of all frontends' backends, and those in quarantine. 4 MiB.
pub const SLOT_COUNT: u32 = 1 << 20;
/// Slots in one element of `SLOTS`: an array's elements are padded to 8 bytes.
pub const SLOTS_PER_ELEMENT: u32 = 2;
/// Entries of `BACKENDS`; id 0 is none. 6 MiB.
pub const BACKEND_COUNT: u32 = 1 << 17;
/// Entries of `PEERS`: sockets connected through a Service at a time; more go to `REVERSE_NAT`.
pub const PEER_COUNT_MAX: u32 = 32_768;
/// Entries of `REVERSE_NAT`; the least recently used go first.
pub const REVERSE_COUNT_MAX: u32 = 65_536;
/// Entries of `AFFINITY`; the least recently used go first.
pub const AFFINITY_COUNT_MAX: u32 = 65_536;
/// Entries of `NODE_ADDRESSES`.
pub const NODE_ADDRESS_COUNT_MAX: u32 = 16_384;
/// Entries of `SOURCE_RANGES`.
pub const SOURCE_RANGE_COUNT_MAX: u32 = 65_536;
/// Bits of a [`SourceRangeKey`] before the address.
pub const SOURCE_RANGE_BITS: u32 = 32;

/// `FrontendKey::scope`: an address of its own, for clients on this node: cluster IP, external IP,
/// load balancer IP.
pub const SCOPE_ADDRESS: u8 = 0;
/// `FrontendKey::scope`: a node port, for clients on this node; the address is the unspecified one
/// of its family and stands for every address in `NODE_ADDRESSES`.
pub const SCOPE_NODE_PORT: u8 = 1;
/// `FrontendKey::scope`: as [`SCOPE_ADDRESS`], for clients outside of the nodes: external IP, load
/// balancer IP.
pub const SCOPE_OUTSIDE_ADDRESS: u8 = 2;
/// `FrontendKey::scope`: as [`SCOPE_NODE_PORT`], for clients outside of the nodes.
pub const SCOPE_OUTSIDE_NODE_PORT: u8 = 3;

/// `FrontendValue::flags`: the slots are a Maglev table; else one slot per backend.
pub const FRONTEND_TABLE: u32 = 1;
/// `FrontendValue::flags`: without slots it drops, since other nodes have backends; else it refuses.
pub const FRONTEND_DROP: u32 = 2;
/// `FrontendValue::flags`: only clients in `SOURCE_RANGES` may use it.
pub const FRONTEND_RESTRICTED: u32 = 4;

/// Slots without a table among which the heaviest one is looked for; see [`weight`].
pub const RENDEZVOUS_COUNT_MAX: u32 = 8;

/// `BackendValue::state`: never written.
pub const BACKEND_UNUSED: u8 = 0;
/// `BackendValue::state`: some slot holds its id.
pub const BACKEND_IN_USE: u8 = 1;
/// `BackendValue::state`: it has left every slot; no affinity may bring it back.
pub const BACKEND_RETIRED: u8 = 2;
/// `BackendValue::state`: as [`BACKEND_IN_USE`], but it has not answered lately and gets one connection
/// only: while `TrafficValue::chosen` is 0, which it is when the backend is written.
pub const BACKEND_ON_TRIAL: u8 = 3;

/// Entries of `FAILURES`; what finds no room is not noted.
pub const FAILURE_COUNT_MAX: u32 = 4_096;

/// `FrontendValue::flags`: of two backends the one with fewer connections of this node is chosen.
pub const FRONTEND_LEAST_CONNECTIONS: u32 = 0x100;

/// `FrontendValue::flags`: what comes from outside for a backend of another node goes on to that node as it
/// is, which answers the client itself.
pub const FRONTEND_DIRECT_RETURN: u32 = 0x200;

/// `AffinityKey::kind`: the client is a network namespace, so a pod (or the node itself).
pub const AFFINITY_NETNS: u32 = 0;
/// `AffinityKey::kind`: the client is one unconnected UDP socket.
pub const AFFINITY_SOCKET: u32 = 1;
/// `AffinityKey::kind`: the client is a pod, by its id, whose packets no socket hook has seen.
pub const AFFINITY_POD: u32 = 2;
/// `AffinityKey::kind`: the client is an address: an IPv4 one as it is, of an IPv6 one a hash.
pub const AFFINITY_ADDRESS: u32 = 3;

/// How long an unconnected UDP socket keeps its backend without a datagram; the kernel's own
/// `nf_conntrack_udp_timeout_stream`, which kube-proxy's clients are used to.
pub const UDP_STICKY_S: u32 = 120;

/// An address in 16 bytes, network order; IPv4 as `::ffff:a.b.c.d`.
pub type Addr = [u32; 4];

/// The third word of a v4-mapped address.
pub const V4_MAPPED: u32 = 0xffff_u32.to_be();

/// The v4-mapped form of an IPv4 address in network order.
#[inline(always)]
pub const fn v4_mapped(addr_be: u32) -> Addr {
    [0, 0, V4_MAPPED, addr_be]
}

/// Whether this is a v4-mapped address.
#[inline(always)]
pub const fn is_v4_mapped(addr: &Addr) -> bool {
    addr[0] == 0 && addr[1] == 0 && addr[2] == V4_MAPPED
}

/// Spreads every bit of a word over all of them (the finalizer of MurmurHash3).
#[inline(always)]
pub const fn mix(word: u32) -> u32 {
    let word = (word ^ (word >> 16)).wrapping_mul(0x85eb_ca6b);
    let word = (word ^ (word >> 13)).wrapping_mul(0xc2b2_ae35);
    word ^ (word >> 16)
}

/// A hash of a connection; the same on every node. Addresses and ports in network order.
#[inline(always)]
pub const fn flow_hash(
    client: &Addr,
    client_port_be: u16,
    server: &Addr,
    server_port_be: u16,
    proto: u8,
) -> u32 {
    let ports = ((client_port_be as u32) << 16) | server_port_be as u32;
    let mut hash = mix(ports ^ (proto as u32).wrapping_mul(0x9e37_79b1));
    let mut i = 0;
    while i < 4 {
        hash =
            mix(hash.rotate_left(5) ^ client[i]).wrapping_add(server[i].wrapping_mul(0x27d4_eb2f));
        i += 1;
    }
    mix(hash)
}

/// How much a connection likes a backend: of a list the heaviest serves it, so a backend that comes
/// or goes moves no connection between others (rendezvous hashing).
#[inline(always)]
pub const fn weight(flow_hash: u32, backend_hash: u32) -> u32 {
    mix(flow_hash ^ backend_hash.rotate_left(16))
}

/// Key of `FRONTENDS`: what a client connects to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct FrontendKey {
    /// The address; unspecified for node ports.
    pub addr: Addr,
    /// The port, network order.
    pub port_be: u16,
    /// IANA protocol number: 6 TCP, 17 UDP.
    pub proto: u8,
    /// One of the `SCOPE_` constants.
    pub scope: u8,
}

impl FrontendKey {
    /// Whether it is for clients outside of the nodes.
    #[inline(always)]
    pub const fn is_outside(&self) -> bool {
        matches!(self.scope, SCOPE_OUTSIDE_ADDRESS | SCOPE_OUTSIDE_NODE_PORT)
    }

    /// A word that tells this key from its neighbours: two keys that differ in one field never
    /// have the same, others rarely (about 1 in 4 billion).
    #[inline(always)]
    pub const fn check(&self) -> u32 {
        // Odd factors are invertible modulo 2^32, so no single word's change can vanish.
        let port = ((self.port_be as u32) << 16) | ((self.proto as u32) << 8) | self.scope as u32;
        self.addr[0]
            .wrapping_mul(0x9e37_79b1)
            .wrapping_add(self.addr[1].wrapping_mul(0x85eb_ca77))
            .wrapping_add(self.addr[2].wrapping_mul(0xc2b2_ae3d))
            .wrapping_add(self.addr[3].wrapping_mul(0x27d4_eb2f))
            .wrapping_add(port.wrapping_mul(0x1656_67b1))
    }
}

/// Value of `FRONTENDS`: where its backends are.
///
/// The kernel hands a hash map's freed element to the next insertion at once, while a program may
/// still be reading it (bpf_mem_alloc, since Linux 6.1: commit fba1a1c6c912). So a reader takes
/// `base` and `count` in one 8-byte load and after it `check`, which lies before them: a foreign
/// value shows itself by the key it was made for.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FrontendValue {
    /// The store revision that made this value.
    pub generation: u64,
    /// [`FrontendKey::check`] of the key it belongs to.
    pub check: u32,
    /// The set of backends that this frontend shares with others of its Service: same port,
    /// family and traffic policy. Stable as long as the Service is, also over agent restarts.
    pub service_id: u32,
    /// The first slot.
    pub base: u32,
    /// How many slots; 0: nothing serves it, connects are refused at once.
    pub count: u32,
    /// Session affinity by client for so many seconds; 0: none.
    pub affinity_s: u32,
    /// The `FRONTEND_` constants.
    pub flags: u32,
}

/// Value of `BACKENDS`: where a connection goes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct BackendValue {
    /// The address, of the frontend's family.
    pub addr: Addr,
    /// The port, network order.
    pub port_be: u16,
    /// IANA protocol number: 6 TCP, 17 UDP.
    pub proto: u8,
    /// One of the `BACKEND_` constants.
    pub state: u8,
    /// FNV-1a of the node's name; a label for reports, nothing is decided by it.
    pub node_id: u32,
    /// FNV-1a of the pod's UID; 0: not a pod. A label for reports.
    pub pod_id: u64,
    /// The store revision that made this value.
    pub generation: u64,
    /// The `FrontendValue::service_id` whose slots hold this id.
    pub service_id: u32,
    /// A hash of address, port and protocol: the same on every node. For [`weight`].
    pub hash: u32,
}

/// Key of `SOURCE_RANGES` after the length of its prefix: [`SOURCE_RANGE_BITS`] and those of the
/// address. The value says nothing.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct SourceRangeKey {
    /// The `FrontendValue::service_id`.
    pub service_id: u32,
    /// The client's address, of the service's family.
    pub addr: Addr,
}

/// Value of `TRAFFIC`, whose key is a backend's id: what this node's programs did with it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct TrafficValue {
    /// Sockets connected to it now, where its Service counts them.
    pub connections: u64,
    /// Connects, unconnected sends, and flows of packets, that were translated to it.
    pub chosen: u64,
}

/// Key of `FAILURES`: who did not answer a connect.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct FailureKey {
    /// The address.
    pub addr: Addr,
    /// The port, network order.
    pub port_be: u16,
    /// Always 0.
    pub _pad: u16,
}

/// Value of `FAILURES`: how often, since the entry was made.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FailureValue {
    /// SYNs that were sent again.
    pub resent: u32,
    /// Connects that were not waited for any longer.
    pub given_up: u32,
    /// Resets in place of an answer.
    pub refused: u32,
    /// SYNs that were answered.
    pub answered: u32,
}

/// Value of `PEERS`, whose key is the cookie of a connected socket: it has one peer.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PeerValue {
    /// The backend's address: tells this connection from a later one of the same socket.
    pub backend: Addr,
    /// What the client believes to talk to.
    pub frontend: ReverseValue,
    /// The backend's port, network order.
    pub backend_port_be: u16,
    /// SYNs of this connection that left for the backend, past every policy of this node.
    pub syn_count: u16,
    /// The backend whose element of `TRAFFIC` counts this socket; 0: none does.
    pub backend_id: u32,
}

/// Key of `REVERSE_NAT`: a socket without a connection, and one of the backends it talks to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ReverseKey {
    /// The socket's cookie: never reused while the machine is up.
    pub cookie: u64,
    /// The backend's address.
    pub addr: Addr,
    /// The backend's port, network order.
    pub port_be: u16,
    /// Always 0.
    pub _pad: [u16; 3],
}

/// Value of `REVERSE_NAT`, part of that of `PEERS`: what the client believes to talk to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ReverseValue {
    /// The frontend's address (the node's address for a node port).
    pub addr: Addr,
    /// The frontend's port, network order.
    pub port_be: u16,
    /// Always 0.
    pub _pad: u16,
    /// The `FrontendValue::service_id` it went through.
    pub service_id: u32,
}

/// Key of `AFFINITY`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct AffinityKey {
    /// A network namespace's or socket's cookie, a pod's id or an address, as `kind` says.
    pub client: u64,
    /// The `FrontendValue::service_id`.
    pub service_id: u32,
    /// One of the `AFFINITY_` constants.
    pub kind: u32,
}

/// Value of `AFFINITY`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct AffinityValue {
    /// When it was last used: nanoseconds of the monotonic clock, coarse.
    pub used_ns: u64,
    /// Id of the backend.
    pub backend_id: u32,
    /// Always 0.
    pub _pad: u32,
}

const _: () = {
    assert!(size_of::<FrontendKey>() == 20);
    assert!(offset_of!(FrontendKey, port_be) == 16);
    assert!(offset_of!(FrontendKey, proto) == 18);
    assert!(offset_of!(FrontendKey, scope) == 19);

    assert!(size_of::<FrontendValue>() == 32);
    assert!(offset_of!(FrontendValue, check) == 8);
    assert!(offset_of!(FrontendValue, service_id) == 12);
    // One aligned 8-byte load reads base and count, and `check` lies before them.
    assert!(offset_of!(FrontendValue, base) == 16);
    assert!(offset_of!(FrontendValue, count) == 20);
    assert!(offset_of!(FrontendValue, affinity_s) == 24);
    assert!(offset_of!(FrontendValue, flags) == 28);

    assert!(size_of::<BackendValue>() == 48);
    assert!(offset_of!(BackendValue, port_be) == 16);
    assert!(offset_of!(BackendValue, state) == 19);
    assert!(offset_of!(BackendValue, node_id) == 20);
    assert!(offset_of!(BackendValue, pod_id) == 24);
    assert!(offset_of!(BackendValue, generation) == 32);
    assert!(offset_of!(BackendValue, service_id) == 40);
    assert!(offset_of!(BackendValue, hash) == 44);
    // An element of a memory-mapped array starts at a multiple of 8 bytes.
    assert!(size_of::<BackendValue>().is_multiple_of(8));

    assert!(size_of::<TrafficValue>() == 16);
    assert!(offset_of!(TrafficValue, chosen) == 8);
    assert!(size_of::<FailureKey>() == 20);
    assert!(offset_of!(FailureKey, port_be) == 16);
    assert!(size_of::<FailureValue>() == 16);
    assert!(offset_of!(FailureValue, answered) == 12);
    assert!(size_of::<SourceRangeKey>() == 20);
    assert!(offset_of!(SourceRangeKey, addr) == 4);

    assert!(size_of::<ReverseKey>() == 32);
    assert!(offset_of!(ReverseKey, addr) == 8);
    assert!(offset_of!(ReverseKey, port_be) == 24);
    assert!(offset_of!(ReverseKey, _pad) == 26);

    assert!(size_of::<ReverseValue>() == 24);
    assert!(offset_of!(ReverseValue, port_be) == 16);
    assert!(offset_of!(ReverseValue, service_id) == 20);

    assert!(size_of::<PeerValue>() == 48);
    assert!(offset_of!(PeerValue, frontend) == 16);
    assert!(offset_of!(PeerValue, backend_port_be) == 40);
    assert!(offset_of!(PeerValue, syn_count) == 42);
    assert!(offset_of!(PeerValue, backend_id) == 44);

    assert!(size_of::<AffinityKey>() == 16);
    assert!(offset_of!(AffinityKey, service_id) == 8);
    assert!(offset_of!(AffinityKey, kind) == 12);

    assert!(size_of::<AffinityValue>() == 16);
    assert!(offset_of!(AffinityValue, backend_id) == 8);
    assert!(offset_of!(AffinityValue, _pad) == 12);
};

plain_old_data!(
    FrontendKey,
    FrontendValue,
    BackendValue,
    TrafficValue,
    SourceRangeKey,
    ReverseKey,
    ReverseValue,
    PeerValue,
    AffinityKey,
    AffinityValue,
    FailureKey,
    FailureValue,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v4_mapped_is_the_rfc_4291_form() {
        let addr = v4_mapped(u32::from_ne_bytes([10, 96, 0, 1]));
        let mut bytes = [0; 16];
        for (chunk, word) in bytes.chunks_mut(4).zip(addr) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        assert_eq!(
            bytes,
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 96, 0, 1]
        );
        assert!(is_v4_mapped(&addr));
        assert!(!is_v4_mapped(&[0; 4]));
    }
}
