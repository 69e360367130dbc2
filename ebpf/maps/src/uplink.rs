//! The node's interfaces towards the outside.
//!
//! ```text
//!  agent (dataplane::uplinks) ──► UPLINKS[ifindex]   = the node's addresses there, its hardware address
//!                            ├──► ANNOUNCED[address] = 1: this node answers who has it
//!                            ├──► MASQUERADE[prefix] = POD, NEVER: what leaves from the node's own address
//!                            └──► SWITCHES[what]     = 1: whether it is done at all
//! ```
//! Written by the agent only: the row before the programs are attached to the interface.

use core::mem::{offset_of, size_of};

use crate::endpoint::Mac;
use crate::plain_old_data;
use crate::services::Addr;

/// Entries of `UPLINKS`.
pub const UPLINK_COUNT_MAX: u32 = 256;
/// Entries of `ANNOUNCED`.
pub const ANNOUNCED_COUNT_MAX: u32 = 16_384;

/// `NODE_ADDRESSES`: the address of another node.
pub const NODE_OTHER: u32 = 1;
/// `NODE_ADDRESSES`: an address of this node.
pub const NODE_OWN: u32 = 2;
/// `NODE_ADDRESSES`: the address of another node whose answers to a pod would come by another way (the
/// tunnel), and be refused there as forged: it is sent the node's own address.
pub const NODE_BEHIND: u32 = 3;

/// `UplinkValue::xdp`: no program sees its frames before the kernel has made packets of them.
pub const XDP_OFF: u8 = 0;
/// `UplinkValue::xdp`: one does, in the driver.
pub const XDP_NATIVE: u8 = 1;

/// Entries of `MASQUERADE`, whose key is a prefix of addresses and its value [`POD`], [`NEVER`] or both.
pub const MASQUERADE_COUNT_MAX: u32 = 16_384;
/// `MASQUERADE`: addresses of this node's pods.
pub const POD: u32 = 1;
/// `MASQUERADE`: who is there is sent the pods' own addresses.
pub const NEVER: u32 = 2;

/// Entries of `SWITCHES`.
pub const SWITCH_COUNT: u32 = 8;
/// `SWITCHES`: pods' packets to the outside leave from the node's own address.
pub const SWITCH_MASQUERADE: u32 = 0;
/// `SWITCHES`: packets between pods and other machines go past the node's IP stack.
pub const SWITCH_FAST_PATH: u32 = 1;

/// The first port that connections leave from with the node's own address: those from outside whose
/// backend is on another node, those of pods to the outside. Above the kernel's own ephemeral ports (32768 to 60999) and the node ports, so no socket of the
/// node has it without having asked for it.
pub const SOURCE_PORT_MIN: u32 = 61_000;
/// How many follow it: a node has so many connections from outside to one backend elsewhere.
pub const SOURCE_PORT_COUNT: u32 = 65_536 - SOURCE_PORT_MIN;

/// Value of `UPLINKS`, whose key is the interface's index.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct UplinkValue {
    /// The node's IPv4 address there, v4-mapped; `[0; 4]`: none.
    pub v4: Addr,
    /// The node's IPv6 address there; `[0; 4]`: none.
    pub v6: Addr,
    /// Its hardware address.
    pub mac: Mac,
    /// One of the `XDP_` constants: whether what has come in other drivers may be sent by it.
    pub xdp: u8,
    /// Always 0.
    pub _pad: u8,
}

impl UplinkValue {
    /// What the hosts of its link know of it.
    pub const fn on_the_link(&self) -> Self {
        Self {
            xdp: XDP_OFF,
            ..*self
        }
    }
}

const _: () = {
    assert!(size_of::<UplinkValue>() == 40);
    assert!(offset_of!(UplinkValue, v6) == 16);
    assert!(offset_of!(UplinkValue, mac) == 32);
    assert!(offset_of!(UplinkValue, xdp) == 38);
    assert!(offset_of!(UplinkValue, _pad) == 39);
};

plain_old_data!(UplinkValue);
