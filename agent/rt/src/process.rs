//! One clone: the container's init becomes a child of the shim, in its namespaces from its first
//! instruction, and on cgroup v2 in its cgroup as well.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use gantry_shim::clone::{CLONE_INTO_CGROUP, CloneArgs};

/// Namespaces that a clone makes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct New {
    pub(crate) mount: bool,
    pub(crate) pid: bool,
}

/// Runs `body` in a new sibling of this process and returns its pid; the sibling ends with the
/// body's value as its exit code.
#[expect(
    clippy::disallowed_methods,
    reason = "a copy of this process must not return into main, nor run its destructors twice"
)]
pub(crate) fn clone_sibling(
    new: New,
    cgroup: Option<BorrowedFd<'_>>,
    body: impl FnOnce() -> i32,
) -> io::Result<i32> {
    let mut flags = libc::CLONE_PARENT as u64;
    if new.mount {
        flags |= libc::CLONE_NEWNS as u64;
    }
    if new.pid {
        flags |= libc::CLONE_NEWPID as u64;
    }
    let mut arguments = CloneArgs::default();
    if let Some(fd) = cgroup {
        flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = fd.as_raw_fd() as u64;
    }
    arguments.flags = flags;
    // SAFETY: the kernel reads `arguments` for the length given. No stack and no VM are shared, so
    // the child goes on in a copy of this memory; this process has one thread, so no lock that
    // another thread holds is copied with it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_ref(&arguments),
            size_of::<CloneArgs>(),
        )
    };
    match result {
        0 => std::process::exit(body()),
        pid if pid > 0 => Ok(pid as i32),
        _ => Err(io::Error::last_os_error()),
    }
}
