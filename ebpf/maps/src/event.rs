//! What happens to flows, told to those who watch.
//!
//! ```text
//!  agent (dataplane::flows) ──► WATCH[0] = until when                  0: nobody watches
//!  the programs ──► SEEN, BUDGETS ──► EVENTS ──► agent
//! ```
//! A flow is told once at each point that it passes: TCP by its SYN, the rest by its first packet, and not
//! by the answers; what is refused or dropped is told each time. No more than a budget per second and CPU
//! is told, drops by a budget of their own; what is over it is counted.
//!
//! None of these maps is pinned: an agent that starts has a ring that nobody watches.

use core::mem::{offset_of, size_of};

use crate::plain_old_data;
use crate::services::Addr;

/// Bytes of `EVENTS`: some thousands of events, for an agent that sleeps for a moment.
pub const EVENTS_BYTES: u32 = 512 * 1024;
/// Entries of `SEEN`; the least recently used go first.
pub const SEEN_COUNT_MAX: u32 = 8_192;
/// A flow that was quiet for so long is told again.
pub const SEEN_S: u64 = 60;

/// Events of one kind that a CPU tells between two ticks of [`BUDGET_TICK_SHIFT`].
pub const BUDGET: u64 = 512;
/// Nanoseconds of a tick, as a power of two: 1.07 s.
pub const BUDGET_TICK_SHIFT: u32 = 30;
/// Index in `BUDGETS`: flows that pass.
pub const BUDGET_PASSED: u32 = 0;
/// Index in `BUDGETS`: what is refused or dropped.
pub const BUDGET_DROPPED: u32 = 1;
/// Entries of `BUDGETS`.
pub const BUDGET_COUNT: u32 = 2;

/// `FlowEvent::point`: connect() to a Service.
pub const POINT_CONNECT: u8 = 0;
/// `FlowEvent::point`: a datagram of an unconnected socket to a Service.
pub const POINT_SEND: u8 = 1;
/// `FlowEvent::point`: a pod has sent it.
pub const POINT_FROM_POD: u8 = 2;
/// `FlowEvent::point`: it came to a pod by the node's network.
pub const POINT_TO_POD: u8 = 3;
/// `FlowEvent::point`: it came in by an uplink. Told only if it is about a Service, or dropped.
pub const POINT_FROM_OUTSIDE: u8 = 4;
/// `FlowEvent::point`: it goes out by an uplink. As above.
pub const POINT_TO_OUTSIDE: u8 = 5;

/// `FlowEvent::reason` of what was not dropped; else an index of `drop::DROP_NAMES`.
pub const NOT_DROPPED: u8 = u8::MAX;

/// `FlowEvent::flags`: `frontend` is what it was addressed to before it was translated.
pub const IS_TRANSLATED: u8 = 1;
/// `FlowEvent::flags`: what a policy refused is what the receiver may get, not what the sender may send.
pub const AT_INGRESS: u8 = 2;
/// `FlowEvent::flags`: it was no IP packet, and there are no ends.
pub const NO_IP: u8 = 4;

/// What happened to a flow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FlowEvent {
    /// When: nanoseconds of the monotonic clock.
    pub time_ns: u64,
    /// At sockets: the cookie of the network namespace, because the socket has no address yet.
    pub netns_cookie: u64,
    /// Unspecified at sockets.
    pub source: Addr,
    /// Where it goes: after translation.
    pub destination: Addr,
    /// See [`IS_TRANSLATED`].
    pub frontend: Addr,
    /// Network order, as the other ports.
    pub source_port_be: u16,
    /// Of `destination`.
    pub destination_port_be: u16,
    /// Of `frontend`.
    pub frontend_port_be: u16,
    /// IANA protocol number.
    pub proto: u8,
    /// One of `POINT_*`.
    pub point: u8,
    /// [`NOT_DROPPED`], or why it was.
    pub reason: u8,
    /// [`IS_TRANSLATED`], [`AT_INGRESS`], [`NO_IP`].
    pub flags: u8,
    /// Always 0.
    pub _pad: u16,
    /// The interface at which it was seen; 0 at sockets.
    pub ifindex: u32,
}

/// Value of `BUDGETS`: what this CPU has told of a kind.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Budget {
    /// The tick that `told` is about.
    pub tick: u64,
    /// Events told in it.
    pub told: u64,
    /// Events not told, ever.
    pub missed: u64,
}

const _: () = {
    assert!(size_of::<FlowEvent>() == 80);
    assert!(offset_of!(FlowEvent, source) == 16);
    assert!(offset_of!(FlowEvent, destination) == 32);
    assert!(offset_of!(FlowEvent, frontend) == 48);
    assert!(offset_of!(FlowEvent, source_port_be) == 64);
    assert!(offset_of!(FlowEvent, proto) == 70);
    assert!(offset_of!(FlowEvent, flags) == 73);
    assert!(offset_of!(FlowEvent, ifindex) == 76);
    assert!(size_of::<Budget>() == 24);
};

plain_old_data!(FlowEvent, Budget);
