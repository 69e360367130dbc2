//! Removes everything that this data plane ever put into the kernel: `down`, `cleanup`, reset.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use super::{DataplaneError, bpffs, hooks, sys, uplinks};
use crate::paths::Paths;

/// Detaches all programs and removes all pins, also those of other versions of the agent.
/// Idempotent; no agent may be running.
///
/// # Errors
/// Goes on after a failure and reports all of them in one error.
pub fn remove_all(paths: &Paths) -> Result<(), DataplaneError> {
    let mut failures = Vec::new();
    let links = hooks::directory(paths);
    for entry in fs::read_dir(&links).into_iter().flatten().flatten() {
        let pin = entry.path();
        let detached = sys::open_pinned(&pin)
            .and_then(|link| match sys::link_detach(link.as_fd()) {
                // Its cgroup is gone, and the attachment with it.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(()),
                other => other,
            })
            .and_then(|()| fs::remove_file(&pin));
        if let Err(error) = detached {
            failures.push(format!("detach {}: {error}", pin.display()));
        }
    }
    if let Err(error) = uplinks::remove_filters(paths) {
        failures.push(format!("remove filters of uplinks: {error}"));
    }
    // Never below something that is no bpffs: there it would be somebody's directory.
    if bpffs::is_bpffs(&paths.bpf) {
        match fs::remove_dir_all(&paths.bpf) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                failures.push(format!("remove {}: {error}", paths.bpf.display()));
            }
            _ => {}
        }
    }
    if let Err(error) = bpffs::remove(paths) {
        failures.push(error.to_string());
    }
    if failures.is_empty() {
        return Ok(());
    }
    Err(DataplaneError::Kernel {
        what: format!("remove {}", paths.bpf.display()),
        reason: failures.join("; "),
    })
}
