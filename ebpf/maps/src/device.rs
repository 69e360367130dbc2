//! The device guard: which devices a container may open where cgroup v2 has no device controller.
//!
//! The list is Docker's and runc's default. Making a node (`mknod`) is always allowed, since a node
//! alone gives no access; opening it is what the guard decides.

/// Cgroups that `DEVICE_EXEMPT` can name: more privileged pods than any node runs.
pub const DEVICE_EXEMPT_COUNT_MAX: u32 = 4096;

/// Devices of all containers together that `DEVICE_RULES` can name.
pub const DEVICE_RULE_COUNT_MAX: u32 = 16_384;

/// `BPF_DEVCG_DEV_BLOCK`
pub const BLOCK: u32 = 1;
/// `BPF_DEVCG_DEV_CHAR`
pub const CHARACTER: u32 = 2;
/// `BPF_DEVCG_ACC_READ`
pub const READ: u32 = 2;
/// `BPF_DEVCG_ACC_WRITE`
pub const WRITE: u32 = 4;

/// Key of `DEVICE_RULES`: a device that the processes of a cgroup may open. The value is how:
/// [`READ`], [`WRITE`] or both.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct DeviceRuleKey {
    /// The container's cgroup.
    pub cgroup_id: u64,
    /// [`BLOCK`] or [`CHARACTER`].
    pub kind: u32,
    /// The device's major number.
    pub major: u32,
    /// And its minor number.
    pub minor: u32,
    /// Always 0.
    pub _pad: u32,
}
const _: () = assert!(core::mem::size_of::<DeviceRuleKey>() == 24);
crate::plain_old_data!(DeviceRuleKey);

/// Ancestors of a process' cgroup that are looked up in `DEVICE_EXEMPT`, from the root down.
/// `/gantry/<qos>/pod<uid>/<container>` is 4 deep; a mount inside another cgroup adds some.
pub const DEVICE_CGROUP_DEPTH_MAX: u32 = 8;

/// The standard character devices as (major, minor).
const STANDARD: [(u32, u32); 8] = [
    (1, 3), // null
    (1, 5), // zero
    (1, 7), // full
    (1, 8), // random
    (1, 9), // urandom
    (5, 0), // tty
    (5, 1), // console
    (5, 2), // ptmx
];

/// Major number of the Unix 98 pseudo terminals, `/dev/pts/*`.
const PTS_MAJOR: u32 = 136;

/// Whether every container may read and write this device.
///
/// * `character` – the device is a character device; no block device is standard.
#[inline(always)]
pub const fn is_standard(character: bool, major: u32, minor: u32) -> bool {
    if !character {
        return false;
    }
    if major == PTS_MAJOR {
        return true;
    }
    let mut i = 0;
    while i < STANDARD.len() {
        if STANDARD[i].0 == major && STANDARD[i].1 == minor {
            return true;
        }
        i += 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::is_standard;

    #[test]
    fn standard_devices_are_the_default_list() {
        for (major, minor) in [
            (1, 3),
            (1, 5),
            (1, 7),
            (1, 8),
            (1, 9),
            (5, 0),
            (5, 1),
            (5, 2),
        ] {
            assert!(is_standard(true, major, minor), "{major}:{minor}");
            assert!(!is_standard(false, major, minor), "block {major}:{minor}");
        }
        assert!(is_standard(true, 136, 0) && is_standard(true, 136, 1_000));
        for (major, minor) in [
            (1, 1),
            (1, 2),
            (1, 4),
            (1, 11),
            (5, 3),
            (10, 200),
            (8, 0),
            (0, 0),
        ] {
            assert!(!is_standard(true, major, minor), "{major}:{minor}");
        }
    }
}
