//! Removes a directory tree that a container may have shaped.
//!
//! Containers can nest directories deeper than any stack and name them as they like. So nothing is
//! recursive here: a directory that is not empty is moved up to the top by its parent's descriptor
//! and emptied from there. One descriptor for the top, one for the directory at hand.
//!
//! Invariants: no symlink is followed; no mount is entered (`RESOLVE_NO_XDEV`, bind mounts
//! included); everything touched is below the given directory.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat, openat2, renameat, unlinkat,
};
use rustix::io::Errno;

/// Prefix of directories moved up to the top.
const MOVED: &str = ".gantry-removing-";

/// Deletes `directory` with all it holds. Absent is fine.
///
/// # Errors
/// A mount point below it (`EBUSY`, `EXDEV`), an immutable file, a read-only file system. What
/// could be deleted is gone; call again.
pub(crate) fn remove(directory: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = match openat(CWD, directory, flags, Mode::empty()) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    let mut moved = Vec::new();
    let mut count = 0u64;
    empty(&top, &top, true, &mut moved, &mut count)?;
    while let Some(name) = moved.pop() {
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let at = openat2(&top, name.as_str(), flags, Mode::empty(), how)?;
        empty(&at, &top, false, &mut moved, &mut count)?;
        unlinkat(&top, name.as_str(), AtFlags::REMOVEDIR)?;
    }
    match std::fs::remove_dir(directory) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Unlinks what `at` holds; directories that are not empty go to `top` and into `moved`.
fn empty(
    at: &OwnedFd,
    top: &OwnedFd,
    at_top: bool,
    moved: &mut Vec<String>,
    count: &mut u64,
) -> io::Result<()> {
    let mut arrived = HashSet::new();
    for entry in Dir::read_from(at)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        if at_top && name.to_str().is_some_and(|n| arrived.contains(n)) {
            continue; // moved here a moment ago
        }
        let is_directory = match entry.file_type() {
            FileType::Directory => true,
            // File systems that do not tell in the listing.
            FileType::Unknown => {
                let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode) == FileType::Directory
            }
            _ => false,
        };
        if !is_directory {
            unlinkat(at, name, AtFlags::empty())?;
            continue;
        }
        match unlinkat(at, name, AtFlags::REMOVEDIR) {
            Ok(()) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                let target = free_name(top, count)?;
                renameat(at, name, top, target.as_str())?;
                if at_top {
                    arrived.insert(target.clone());
                }
                moved.push(target);
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// A name at the top that nobody has: a container may have thought of ours.
fn free_name(top: &OwnedFd, count: &mut u64) -> io::Result<String> {
    loop {
        *count += 1;
        let name = format!("{MOVED}{count}");
        match rustix::fs::statat(top, name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(name),
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
