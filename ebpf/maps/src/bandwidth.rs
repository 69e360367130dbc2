//! How much a pod may send and be sent: the `kubernetes.io/ingress-bandwidth` and `egress-bandwidth`
//! annotations.
//!
//! A bucket in the form of a time: when it will be full again had nothing more been taken from it (the
//! generic cell rate algorithm). What is taken moves that time by what it costs; a bucket that has been
//! full for long has saved up `burst_ns` and no more. The agent writes a row with the pod's interface
//! and takes it out with it; the programs move its time.

use core::mem::{offset_of, size_of};

use crate::plain_old_data;

/// Entries of `BANDWIDTH`: a pod has up to two.
pub const BANDWIDTH_COUNT_MAX: u32 = 8_192;

/// `BandwidthKey::direction`: what the pod is sent.
pub const INTO_POD: u32 = 0;
/// `BandwidthKey::direction`: what it sends.
pub const OUT_OF_POD: u32 = 1;

/// Key of `BANDWIDTH`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct BandwidthKey {
    /// FNV-1a of the pod's UID, as in `EndpointValue::pod_id`.
    pub pod_id: u64,
    /// [`INTO_POD`] or [`OUT_OF_POD`].
    pub direction: u32,
    /// Always 0.
    pub _pad: u32,
}

/// Value of `BANDWIDTH`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct BandwidthValue {
    /// What a byte costs: picoseconds.
    pub byte_ps: u64,
    /// What may be saved up: nanoseconds.
    pub burst_ns: u64,
    /// Until when what was sent has been paid: nanoseconds of the monotonic clock.
    pub paid_ns: u64,
}

const _: () = {
    assert!(size_of::<BandwidthKey>() == 16);
    assert!(offset_of!(BandwidthKey, direction) == 8);
    assert!(size_of::<BandwidthValue>() == 24);
    assert!(offset_of!(BandwidthValue, paid_ns) == 16);
};

plain_old_data!(BandwidthKey, BandwidthValue);
