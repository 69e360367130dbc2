//! Pods on this node: from a pod's address, or its interface, to the pod.
//!
//! ```text
//!  agent (dataplane::pods) ──► ENDPOINTS[address] = {pod, host end of its veth, hardware addresses}
//!                         └──► INTERFACES[ifindex] = {pod, hardware addresses}
//!        (dataplane::near) ──► NEAR[place of the address] = {address, its row of ENDPOINTS, whole}
//! ```
//! NEAR says again what ENDPOINTS says, as an array, where a program looks without a call. A place has room
//! for one address; where it is not said to be whole, ENDPOINTS is asked as well. So a map of zeros is right.
//!
//! Written by the agent only: both rows before the programs are attached to the interface, and gone
//! before the address may be given to another pod. An interface without a row belongs to no pod,
//! and nothing passes it.

use core::mem::{offset_of, size_of};

use crate::plain_old_data;
use crate::services::Addr;

/// Entries of `ENDPOINTS`: a pod has one per address.
pub const ENDPOINT_COUNT_MAX: u32 = 8_192;
/// Entries of `INTERFACES`.
pub const INTERFACE_COUNT_MAX: u32 = 4_096;

/// Entries of `NEAR`. 128 KiB, which the agent maps.
pub const NEAR_COUNT: u32 = 2_048;

/// `EndpointValue::flags`: packets may be put into the pod at once, and sent on as they leave it.
/// Not where something else on the host end must see them (a third party's shaper).
pub const DIRECT: u32 = 1;

/// `EndpointValue::flags`, `InterfaceValue::flags`: the pod has rows in `BANDWIDTH`.
pub const LIMITED: u32 = 2;

/// A hardware address.
pub type Mac = [u8; 6];

/// Value of `ENDPOINTS`, whose key is an address (`services::Addr`) of a pod on this node.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct EndpointValue {
    /// FNV-1a of the pod's UID, as in `BackendValue::pod_id`.
    pub pod_id: u64,
    /// The host end of the pod's veth.
    pub ifindex: u32,
    /// [`DIRECT`], [`LIMITED`].
    pub flags: u32,
    /// Of the interface in the pod.
    pub pod_mac: Mac,
    /// What the pod's packets to everybody else are addressed to: of the bridge, or of the host end.
    pub gateway_mac: Mac,
    /// Always 0.
    pub _pad: [u8; 4],
}

/// Value of `NEAR`, whose key is [`near_place`] of the address.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct NearValue {
    /// The address that is here.
    pub addr: Addr,
    /// Its row of `ENDPOINTS`; its interface is 0 where no address is here.
    pub value: EndpointValue,
    /// 1: no other row of `ENDPOINTS` has its place here.
    pub is_whole: u32,
    /// Always 0.
    pub _pad: [u32; 3],
}

/// The place of an address in `NEAR`. Addresses that differ in their last byte alone have places of their own.
#[inline(always)]
pub const fn near_place(addr: &Addr) -> u32 {
    let sum = addr[0]
        .wrapping_mul(0x9e37_79b1)
        .wrapping_add(addr[1].wrapping_mul(0x85eb_ca77))
        .wrapping_add(addr[2].wrapping_mul(0xc2b2_ae3d))
        .wrapping_add(addr[3].wrapping_mul(0x27d4_eb2f));
    sum >> (u32::BITS - NEAR_COUNT.trailing_zeros())
}

/// Value of `INTERFACES`, whose key is the index of the host end of a pod's veth.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct InterfaceValue {
    /// FNV-1a of the pod's UID, as in `BackendValue::pod_id`.
    pub pod_id: u64,
    /// Of the interface in the pod.
    pub pod_mac: Mac,
    /// As in [`EndpointValue`].
    pub gateway_mac: Mac,
    /// [`LIMITED`].
    pub flags: u32,
}

const _: () = {
    assert!(size_of::<EndpointValue>() == 32);
    assert!(offset_of!(EndpointValue, ifindex) == 8);
    assert!(offset_of!(EndpointValue, pod_mac) == 16);
    assert!(offset_of!(EndpointValue, gateway_mac) == 22);
    assert!(offset_of!(EndpointValue, _pad) == 28);

    assert!(NEAR_COUNT.is_power_of_two());
    assert!(size_of::<NearValue>() == 64);
    assert!(offset_of!(NearValue, value) == 16);
    assert!(offset_of!(NearValue, is_whole) == 48);
    assert!(offset_of!(NearValue, _pad) == 52);

    assert!(size_of::<InterfaceValue>() == 24);
    assert!(offset_of!(InterfaceValue, pod_mac) == 8);
    assert!(offset_of!(InterfaceValue, gateway_mac) == 14);
    assert!(offset_of!(InterfaceValue, flags) == 20);
};

plain_old_data!(EndpointValue, NearValue, InterfaceValue);
