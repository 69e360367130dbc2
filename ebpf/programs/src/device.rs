//! The device guard: what cgroup v1's device controller did, for the pods of cgroup v2.
//!
//! Attached once to `/gantry`, so it holds for every container below it without a program per
//! container. Making a node passes; opening anything beyond the standard list needs an exemption
//! of the process' cgroup or one above it, which only privileged pods get, or a rule for the very
//! device, which a container gets from its device plugin.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::bindings::{BPF_DEVCG_ACC_MKNOD, BPF_DEVCG_DEV_CHAR};
use aya_ebpf::helpers::bpf_get_current_ancestor_cgroup_id;
use aya_ebpf::programs::DeviceContext;
use ebpf_maps::counter;
use ebpf_maps::device::{DEVICE_CGROUP_DEPTH_MAX, DeviceRuleKey, is_standard};

use crate::maps::{DEVICE_EXEMPT, DEVICE_RULES, count};

/// Whether this access may go on.
#[inline(always)]
pub fn is_allowed(ctx: &DeviceContext) -> bool {
    let device = ctx.device;
    // SAFETY: the kernel passes a valid context. access_type is (access << 16) | type.
    let (access_type, major, minor) = unsafe {
        (
            read_volatile(addr_of!((*device).access_type)),
            read_volatile(addr_of!((*device).major)),
            read_volatile(addr_of!((*device).minor)),
        )
    };
    let access = access_type >> 16;
    let character = access_type & 0xffff == BPF_DEVCG_DEV_CHAR as u32;
    if access & !(BPF_DEVCG_ACC_MKNOD as u32) == 0
        || is_standard(character, major, minor)
        || is_exempt(access, access_type & 0xffff, major, minor)
    {
        return true;
    }
    count(counter::DEVICE_DENIED);
    false
}

/// Whether the process is in a cgroup, or below one, that is exempt or was given this device.
#[inline(always)]
fn is_exempt(access: u32, kind: u32, major: u32, minor: u32) -> bool {
    let wanted = access & !(BPF_DEVCG_ACC_MKNOD as u32);
    let mut level = 1;
    while level <= DEVICE_CGROUP_DEPTH_MAX {
        // SAFETY: any level is a valid argument; 0 comes back where there is no such ancestor.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) };
        if id == 0 {
            return false;
        }
        if DEVICE_EXEMPT.get_ptr(&id).is_some() {
            return true;
        }
        let key = DeviceRuleKey {
            cgroup_id: id,
            kind,
            major,
            minor,
            _pad: 0,
        };
        if let Some(given) = DEVICE_RULES.get_ptr(&key) {
            // SAFETY: the pointer is an element of the map, checked by the lookup.
            if wanted & !unsafe { *given } == 0 {
                return true;
            }
        }
        level += 1;
    }
    false
}
