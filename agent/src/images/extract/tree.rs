//! A directory tree seen only through descriptors: every path is resolved inside its root.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid,
    XattrFlags, chownat, fchmod, fchown, fsetxattr, futimens, linkat, mkdirat, mknodat, openat,
    openat2, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::{Attributes, ExtractError, classify, refused};

/// What has the name already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Existing {
    Absent,
    Directory,
    /// Regular file, FIFO: anything that is simply unlinked.
    File,
    Symlink,
    Whiteout,
}

/// The layer's directory, and the parent used last: entries of one directory come together.
pub(super) struct Tree {
    root: OwnedFd,
    last: Option<(PathBuf, OwnedFd)>,
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
/// The kernel asks to retry when a rename raced with a `..` it had to check; nobody renames here.
const RETRIES: usize = 8;

fn failed(entry: &str, context: &'static str) -> impl FnOnce(Errno) -> ExtractError {
    let entry = entry.to_owned();
    move |source| ExtractError::Io {
        entry,
        context,
        source: source.into(),
    }
}

impl Tree {
    pub(super) fn open(root: &Path) -> Result<Self, ExtractError> {
        let root = rustix::fs::open(root, DIRECTORY, Mode::empty())
            .map_err(failed(&root.display().to_string(), "open"))?;
        Ok(Self { root, last: None })
    }

    fn resolve(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        for _ in 0..RETRIES {
            match openat2(&self.root, path, DIRECTORY, Mode::empty(), how) {
                Err(Errno::AGAIN) => {}
                result => return result,
            }
        }
        Err(Errno::AGAIN)
    }

    /// The directory `path`; missing parts are made (0755, root), as an archive may leave them out.
    fn parent(&mut self, path: &Path, entry: &str) -> Result<BorrowedFd<'_>, ExtractError> {
        if self.last.as_ref().is_none_or(|(last, _)| last != path) {
            let fd = match self.resolve(path) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => self.make_parents(path, entry)?,
                Err(e) => return Err(no_directory(path, entry, e)),
            };
            self.last = Some((path.to_owned(), fd));
        }
        match &self.last {
            Some((_, fd)) => Ok(fd.as_fd()),
            None => Ok(self.root.as_fd()),
        }
    }

    fn make_parents(&self, path: &Path, entry: &str) -> Result<OwnedFd, ExtractError> {
        let mut prefix = PathBuf::new();
        let mut fd = self
            .resolve(&prefix)
            .map_err(|e| no_directory(&prefix, entry, e))?;
        for part in path.components() {
            prefix.push(part);
            fd = match self.resolve(&prefix) {
                Ok(fd) => fd,
                Err(Errno::NOENT) => {
                    mkdirat(&fd, part.as_os_str(), Mode::from_raw_mode(0o755))
                        .map_err(|e| no_directory(&prefix, entry, e))?;
                    self.resolve(&prefix)
                        .map_err(|e| no_directory(&prefix, entry, e))?
                }
                Err(e) => return Err(no_directory(&prefix, entry, e)),
            };
        }
        Ok(fd)
    }

    /// An existing or newly made directory, to set attributes on.
    pub(super) fn open_directory(
        &mut self,
        path: &Path,
        entry: &str,
    ) -> Result<OwnedFd, ExtractError> {
        let fd = self.parent(path, entry)?;
        fd.try_clone_to_owned().map_err(|source| ExtractError::Io {
            entry: entry.to_owned(),
            context: "dup",
            source,
        })
    }

    /// The directory `name` itself, not what a symlink of that name points to.
    pub(super) fn open_child(
        &mut self,
        parent: &Path,
        name: &OsStr,
        entry: &str,
    ) -> Result<OwnedFd, ExtractError> {
        let parent = self.parent(parent, entry)?;
        openat(parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())
            .map_err(failed(entry, "open directory"))
    }

    pub(super) fn existing(
        &mut self,
        parent: &Path,
        name: &OsStr,
        entry: &str,
    ) -> Result<Existing, ExtractError> {
        let parent = self.parent(parent, entry)?;
        match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(classify(
                FileType::from_raw_mode(stat.st_mode),
                stat.st_rdev,
            )),
            Err(Errno::NOENT) => Ok(Existing::Absent),
            Err(e) => Err(failed(entry, "stat")(e)),
        }
    }

    pub(super) fn create_file(
        &mut self,
        parent: &Path,
        name: &OsStr,
        entry: &str,
    ) -> Result<File, ExtractError> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let parent = self.parent(parent, entry)?;
        openat(parent, name, flags, Mode::from_raw_mode(0o600))
            .map(File::from)
            .map_err(failed(entry, "create file"))
    }

    pub(super) fn create_directory(
        &mut self,
        parent: &Path,
        name: &OsStr,
        entry: &str,
    ) -> Result<(), ExtractError> {
        let parent = self.parent(parent, entry)?;
        mkdirat(parent, name, Mode::from_raw_mode(0o755)).map_err(failed(entry, "create directory"))
    }

    pub(super) fn create_whiteout(
        &mut self,
        parent: &Path,
        name: &OsStr,
        entry: &str,
    ) -> Result<(), ExtractError> {
        let parent = self.parent(parent, entry)?;
        mknodat(parent, name, FileType::CharacterDevice, Mode::empty(), 0)
            .map_err(failed(entry, "create whiteout"))
    }

    pub(super) fn fifo(
        &mut self,
        parent: &Path,
        name: &OsStr,
        attributes: &Attributes,
        entry: &str,
    ) -> Result<(), ExtractError> {
        let parent = self.parent(parent, entry)?;
        mknodat(parent, name, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .map_err(failed(entry, "create fifo"))?;
        own_name(parent, name, attributes, entry)?;
        // Just made by us and nobody else writes here: it is the FIFO, not a link.
        rustix::fs::chmodat(parent, name, attributes.mode, AtFlags::empty())
            .map_err(failed(entry, "chmod"))
    }

    pub(super) fn symlink(
        &mut self,
        parent: &Path,
        name: &OsStr,
        target: &OsStr,
        attributes: &Attributes,
        entry: &str,
    ) -> Result<(), ExtractError> {
        let parent = self.parent(parent, entry)?;
        symlinkat(target, parent, name).map_err(failed(entry, "create symlink"))?;
        own_name(parent, name, attributes, entry)
    }

    pub(super) fn hard_link(
        &mut self,
        target_parent: &Path,
        target: &OsStr,
        parent: &Path,
        name: &OsStr,
        entry: &str,
    ) -> Result<(), ExtractError> {
        let from = self.open_directory(target_parent, entry)?;
        let to = self.parent(parent, entry)?;
        // No AT_SYMLINK_FOLLOW: a link to a symlink is a link to the symlink.
        linkat(&from, target, to, name, AtFlags::empty()).map_err(failed(entry, "create hard link"))
    }

    pub(super) fn unlink(
        &mut self,
        parent: &Path,
        name: &OsStr,
        entry: &str,
    ) -> Result<(), ExtractError> {
        let fd = self.parent(parent, entry)?;
        unlinkat(fd, name, AtFlags::empty()).map_err(failed(entry, "replace"))?;
        // It may have been a symlink on the way to the parent that was resolved last.
        self.last = None;
        Ok(())
    }

    pub(super) fn remove_directory(
        &mut self,
        parent: &Path,
        name: &OsStr,
        entry: &str,
    ) -> Result<(), ExtractError> {
        let fd = self.parent(parent, entry)?;
        // The standard library's removal holds descriptors and follows no symlink below its start;
        // the start is reached through our descriptor.
        let path = Path::new("/proc/self/fd")
            .join(fd.as_raw_fd().to_string())
            .join(name);
        std::fs::remove_dir_all(path).map_err(|source| ExtractError::Io {
            entry: entry.to_owned(),
            context: "replace directory",
            source,
        })?;
        self.last = None;
        Ok(())
    }

    pub(super) fn set_root_attributes(
        &self,
        attributes: &Attributes,
        entry: &str,
    ) -> Result<(), ExtractError> {
        set_file_attributes(&self.root, attributes, entry)
    }

    /// Directories that were replaced meanwhile are left alone.
    pub(super) fn set_directory_time(&self, path: &Path, modified_s: u64) {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        if let Ok(fd) = openat2(&self.root, path, DIRECTORY, Mode::empty(), how) {
            let _ = futimens(&fd, &times(modified_s));
        }
    }
}

fn no_directory(path: &Path, entry: &str, error: Errno) -> ExtractError {
    match error {
        Errno::NOTDIR | Errno::LOOP | Errno::EXIST | Errno::XDEV => refused(
            entry,
            format!("{path:?} on its way is no directory of this layer"),
        ),
        other => failed(entry, "open parent directory")(other),
    }
}

fn times(modified_s: u64) -> Timestamps {
    let at = Timespec {
        tv_sec: i64::try_from(modified_s).unwrap_or(i64::MAX),
        tv_nsec: 0,
    };
    let keep = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_OMIT as _,
    };
    Timestamps {
        last_access: keep,
        last_modification: at,
    }
}

fn own_name(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    attributes: &Attributes,
    entry: &str,
) -> Result<(), ExtractError> {
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    chownat(
        parent,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .map_err(failed(entry, "chown"))?;
    // A time out of the file system's range is clamped or refused: not worth losing the layer.
    let _ = utimensat(
        parent,
        name,
        &times(attributes.modified_s),
        AtFlags::SYMLINK_NOFOLLOW,
    );
    Ok(())
}

/// Owner first (it clears setuid and capabilities), then mode, attributes, time.
pub(super) fn set_file_attributes(
    fd: impl AsFd,
    attributes: &Attributes,
    entry: &str,
) -> Result<(), ExtractError> {
    let fd = fd.as_fd();
    let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
    fchown(fd, Some(uid), Some(gid)).map_err(failed(entry, "chown"))?;
    fchmod(fd, attributes.mode).map_err(failed(entry, "chmod"))?;
    for (name, value) in &attributes.xattrs {
        match fsetxattr(fd, name.as_bytes(), value, XattrFlags::empty()) {
            Ok(()) => {}
            // A user attribute on a file system without them is a loss nobody runs into; a file
            // capability that is missing makes a program fail for no visible reason.
            Err(Errno::OPNOTSUPP) if name.as_bytes().starts_with(b"user.") => {}
            Err(e) => return Err(failed(entry, "set extended attribute")(e)),
        }
    }
    let _ = futimens(fd, &times(attributes.modified_s));
    Ok(())
}

/// Hides what lower layers have in this directory.
pub(super) fn set_opaque(directory: impl AsFd, entry: &str) -> Result<(), ExtractError> {
    fsetxattr(
        directory,
        "trusted.overlay.opaque",
        b"y",
        XattrFlags::empty(),
    )
    .map_err(|e| ExtractError::Io {
        entry: entry.to_owned(),
        context: "mark directory opaque (trusted.overlay.opaque)",
        source: io::Error::from(e),
    })
}
