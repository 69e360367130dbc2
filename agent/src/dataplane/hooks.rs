//! Programs on cgroups, by links that are pinned and so outlive the agent.
//!
//! ```text
//!  no pin, or its cgroup is gone ─► link_create ─► pin
//!  pinned                        ─► link_update: every call runs the old or the new program
//! ```

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{DataplaneError, sys};
use crate::paths::Paths;

/// A program and where the kernel calls it. Numbers: `enum bpf_attach_type`.
pub(super) struct Hook {
    /// The function in `ebpf/programs/src/main.rs`; also the name of the pin.
    pub program: &'static str,
    pub attach_type: u32,
}

/// The way back comes first: no socket is translated before its answers can be.
pub(super) const SERVICE_HOOKS: [Hook; 9] = [
    Hook {
        program: "recvmsg4",
        attach_type: 19,
    },
    Hook {
        program: "recvmsg6",
        attach_type: 20,
    },
    Hook {
        program: "getpeername4",
        attach_type: 29,
    },
    Hook {
        program: "getpeername6",
        attach_type: 30,
    },
    Hook {
        program: "sock_release",
        attach_type: 34,
    },
    Hook {
        program: "connect4",
        attach_type: 10,
    },
    Hook {
        program: "connect6",
        attach_type: 11,
    },
    Hook {
        program: "sendmsg4",
        attach_type: 14,
    },
    Hook {
        program: "sendmsg6",
        attach_type: 15,
    },
];

pub(super) const DEVICE_HOOK: Hook = Hook {
    program: "device_guard",
    attach_type: 6,
};

/// Where links are pinned. Not below the layout's version: an upgrade takes them over.
pub(super) fn directory(paths: &Paths) -> PathBuf {
    paths.bpf.join("links")
}

/// The id by which the kernel and the programs know a cgroup v2 directory.
pub fn cgroup_id(cgroup: &Path) -> io::Result<u64> {
    fs::metadata(cgroup).map(|metadata| metadata.ino())
}

/// Attaches `program` to `cgroup`, or replaces the program of the pinned link. Idempotent.
pub(super) fn attach(
    paths: &Paths,
    hook: &Hook,
    program: BorrowedFd<'_>,
    cgroup: &Path,
) -> Result<(), DataplaneError> {
    let pin = directory(paths).join(hook.program);
    let failed = |what: &str, error: io::Error| {
        let on = cgroup.display();
        DataplaneError::kernel(format!("{what} program {} on {on}", hook.program), &error)
    };
    let id = cgroup_id(cgroup).map_err(|error| failed("find the cgroup of", error))?;
    match sys::open_pinned(&pin) {
        Ok(link) => {
            let info = sys::link_info(link.as_fd()).map_err(|error| failed("look at", error))?;
            if info.cgroup_id == id {
                return sys::link_update(link.as_fd(), program)
                    .map_err(|error| failed("replace", error));
            }
            // Another cgroup, or 0: it was removed and made again since.
            fs::remove_file(&pin).map_err(|error| failed("unpin old", error))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("open pinned", error)),
    }
    let cgroup_fd = File::open(cgroup).map_err(|error| failed("open the cgroup of", error))?;
    let link = sys::link_create(program, cgroup_fd.as_fd(), hook.attach_type)
        .map_err(|error| failed("attach", error))?;
    // If this fails the link goes with its descriptor: nothing is left behind.
    sys::pin(link.as_fd(), &pin).map_err(|error| failed("pin", error))
}
