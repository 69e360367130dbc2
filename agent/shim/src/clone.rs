//! What clone3 takes, for the shim's own fork and for gantry-rt's: a child that begins in its cgroup.

/// linux/sched.h `struct clone_args`, up to `cgroup` (Linux 5.7).
#[repr(C)]
#[derive(Default)]
pub struct CloneArgs {
    /// `CLONE_*`.
    pub flags: u64,
    /// Where a pidfd goes.
    pub pidfd: u64,
    /// Where the child's id goes in its memory.
    pub child_tid: u64,
    /// Where the child's id goes in the parent's memory.
    pub parent_tid: u64,
    /// What the parent is sent at the child's end; 0 with `CLONE_PARENT`.
    pub exit_signal: u64,
    /// Lowest address of a stack; 0: a copy of the caller's.
    pub stack: u64,
    /// Its length, bytes.
    pub stack_size: u64,
    /// Thread-local storage.
    pub tls: u64,
    /// Process ids to be given.
    pub set_tid: u64,
    /// How many.
    pub set_tid_size: u64,
    /// Descriptor of the cgroup's directory, with [`CLONE_INTO_CGROUP`].
    pub cgroup: u64,
}

/// linux/sched.h; libc has it for other C libraries only.
pub const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

const _: () = assert!(size_of::<CloneArgs>() == 88, "CLONE_ARGS_SIZE_VER2");
