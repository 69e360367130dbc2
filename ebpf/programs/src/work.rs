//! What a packet program knows of the packet in its hands.
//!
//! It lies in a map and not on the stack, for two reasons: all calls together have 512 bytes of
//! stack; and the verifier follows what is on the stack value by value, which made it walk every
//! combination of headers through everything that comes after them, for seconds.

use ebpf_maps::flow::{Ends, FlowKey, FlowValue};

use crate::event::Notes;
use crate::packet::Packet;

/// See the module; each field is written by the function that says so.
#[repr(C)]
pub struct Work {
    /// The packet: `packet::parse`, kept true by `nat`.
    pub packet: Packet,
    /// The flags of the pod that sent it, as `EndpointValue` has them, and its id: `spoof::check`.
    pub pod_flags: u32,
    pub pod_id: u64,
    /// What it is to become: the input of `nat::rewrite` and `conntrack::begin`.
    pub becomes: Ends,
    /// The flags of its frontend, and its backend's Service: `outside::choose`.
    pub frontend_flags: u32,
    /// Its flow: `conntrack::find` and `peek`.
    pub flow: FlowValue,
    /// The packet that an ICMP error quotes: `nat`.
    pub quoted: Ends,
    /// `conntrack`'s own.
    pub key: FlowKey,
    pub twin: FlowKey,
    pub answer: FlowValue,
    /// The clock as `conntrack` has read it last, and when that was.
    pub clock_jiffies: u64,
    pub clock_ticks: u32,
    /// `event`'s own.
    pub notes: Notes,
}
