//! Files that the kernel wakes us for: its log, its pressure triggers.

use std::fs::File;
use std::io;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Waits for a file's readiness in the async runtime.
pub fn watch(file: File, interest: Interest) -> io::Result<AsyncFd<File>> {
    // SAFETY: a File owns its descriptor, always names the same one, and closes it only when it is
    // dropped, which AsyncFd does after it has deregistered; nobody here replaces the file.
    unsafe { AsyncFd::register_with_interest(file, interest) }.map_err(io::Error::from)
}
