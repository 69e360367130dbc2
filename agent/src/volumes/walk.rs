//! Visits every file of a volume that containers write to meanwhile.
//!
//! Invariants: no symbolic link is followed and no mount entered, whatever is swapped during the
//! walk; what disappears is skipped; at most [`DEPTH_MAX`] descriptors are open.

use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, openat, openat2};
use rustix::io::Errno;

/// Directories nested deeper than this are not entered: [`Walk::TooDeep`].
pub(super) const DEPTH_MAX: usize = 256;

/// How a walk ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Walk {
    /// Everything was visited.
    Done,
    /// The visitor has broken it off.
    Broken,
    /// A directory lies too deep.
    TooDeep,
}

/// A directory of the way down, and where its listing stands.
struct Level {
    directory: OwnedFd,
    entries: Dir,
}

impl Level {
    fn new(directory: OwnedFd) -> io::Result<Self> {
        let entries = Dir::read_from(&directory)?;
        Ok(Self { directory, entries })
    }
}

/// Calls `visit` with each file below `path`: its directory, its name there, and what it is.
pub(super) fn walk(
    path: &Path,
    mut visit: impl FnMut(&OwnedFd, &OsStr, &Stat) -> io::Result<ControlFlow<()>>,
) -> io::Result<Walk> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut way = vec![Level::new(openat(CWD, path, flags, Mode::empty())?)?];
    while let Some(level) = way.last_mut() {
        let Some(entry) = level.entries.next() else {
            way.pop();
            continue;
        };
        let name = OsString::from_vec(entry?.file_name().to_bytes().to_vec());
        if name == "." || name == ".." {
            continue;
        }
        let stat = match rustix::fs::statat(&level.directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            other => other?,
        };
        if visit(&level.directory, &name, &stat)?.is_break() {
            return Ok(Walk::Broken);
        }
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            continue;
        }
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        match openat2(&level.directory, &name, flags, Mode::empty(), how) {
            Ok(_) if way.len() >= DEPTH_MAX => return Ok(Walk::TooDeep),
            Ok(directory) => way.push(Level::new(directory)?),
            // Deleted, swapped or mounted upon meanwhile.
            Err(Errno::NOENT | Errno::XDEV | Errno::LOOP | Errno::NOTDIR | Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Walk::Done)
}
