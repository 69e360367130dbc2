//! Unpacks what a container's tar sent. The container is not trusted: nothing is written outside
//! the destination, no link is made or followed, and nothing but read, write and execute bits of a
//! mode is taken over.
//!
//! Confinement is the kernel's: every open is `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`
//! below the destination, which is the one path that the user named.

use crate::failure::Failure;
use rustix::fs::{self, AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use tar::{Archive, Entry, EntryType};

/// Entries of one copy that are told to be skipped.
const SKIPPED_COUNT_MAX: usize = 100;

/// Where entries go.
struct Destination {
    directory: OwnedFd,
    /// Set when the source is one file: its name in `directory`.
    file: Option<PathBuf>,
    /// For messages.
    path: PathBuf,
}

/// Unpacks the entries below `prefix` to `to`; returns what was skipped, and why.
pub(super) fn extract(
    from: impl Read,
    prefix: &Path,
    to: &Path,
    keep_modes: bool,
) -> Result<Vec<String>, Failure> {
    let mut archive = Archive::new(from);
    let broken = |e: io::Error| Failure::Local(format!("the tar stream is broken: {e}"));
    let mut destination = None;
    let mut skipped = Vec::new();
    // A directory may be read-only: its mode is set when everything is in it.
    let mut modes: Vec<(PathBuf, Mode)> = Vec::new();
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let path = entry.path().map_err(broken)?.into_owned();
        let below = below(&path, prefix).ok_or_else(|| {
            Failure::Local(format!(
                "the container sent {path:?}, which was not asked for"
            ))
        })?;
        if destination.is_none() {
            let single =
                below.as_os_str().is_empty() && entry.header().entry_type() != EntryType::Directory;
            destination = Some(Destination::open(to, prefix, single)?);
        }
        let Some(destination) = &destination else {
            continue;
        };
        let mode = Mode::from_raw_mode(entry.header().mode().unwrap_or(0o644) & 0o777);
        let done = match entry.header().entry_type() {
            EntryType::Directory => {
                let made = destination.directory(&below);
                if keep_modes && !below.as_os_str().is_empty() {
                    modes.push((below.clone(), mode));
                }
                made
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                destination.file(&below, &mut entry, keep_modes.then_some(mode))
            }
            other => {
                let kind = match other {
                    EntryType::Symlink | EntryType::Link => "link",
                    _ => "special file",
                };
                if skipped.len() < SKIPPED_COUNT_MAX {
                    skipped.push(format!("skipping {kind}: {path:?}"));
                }
                continue;
            }
        };
        done.map_err(|e| {
            Failure::Local(format!(
                "cannot write {}: {e}",
                destination.path.join(&below).display()
            ))
        })?;
    }
    if let Some(destination) = &destination {
        for (path, mode) in modes.iter().rev() {
            // Best effort: the files are there.
            if let Ok(directory) = open(
                destination.directory.as_fd(),
                path,
                OFlags::DIRECTORY,
                Mode::empty(),
            ) {
                let _ = fs::fchmod(&directory, *mode);
            }
        }
    }
    Ok(skipped)
}

/// The part of an entry's path below `prefix`, if it has nothing but names.
fn below(path: &Path, prefix: &Path) -> Option<PathBuf> {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::CurDir => {}
            _ => return None,
        }
    }
    clean.strip_prefix(prefix).ok().map(Path::to_owned)
}

fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    loop {
        match fs::openat2(root, path, flags | OFlags::CLOEXEC, mode, resolve) {
            // A rename elsewhere raced with the walk.
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

impl Destination {
    /// `single`: the source is one file, which becomes `to`, or goes into it if it is a directory.
    fn open(to: &Path, prefix: &Path, single: bool) -> Result<Self, Failure> {
        let (path, file) = match (single, to.is_dir()) {
            (false, _) => (to.to_owned(), None),
            (true, true) => (to.to_owned(), prefix.file_name().map(PathBuf::from)),
            (true, false) => {
                let parent = to.parent().filter(|p| !p.as_os_str().is_empty());
                (
                    parent.unwrap_or(Path::new(".")).to_owned(),
                    to.file_name().map(PathBuf::from),
                )
            }
        };
        let words =
            |e: io::Error| Failure::Local(format!("cannot write to {}: {e}", path.display()));
        std::fs::create_dir_all(&path).map_err(words)?;
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = fs::open(&path, flags, Mode::empty()).map_err(|e| words(e.into()))?;
        Ok(Self {
            directory,
            file,
            path,
        })
    }

    fn parent(&self, path: &Path) -> io::Result<OwnedFd> {
        let parent = path.parent().unwrap_or(Path::new(""));
        self.directory(parent)?;
        Ok(open(
            self.directory.as_fd(),
            parent,
            OFlags::DIRECTORY,
            Mode::empty(),
        )?)
    }

    /// Makes `path` and what is above it.
    fn directory(&self, path: &Path) -> io::Result<()> {
        let mut at = PathBuf::new();
        for part in path.components() {
            let parent = open(
                self.directory.as_fd(),
                &at,
                OFlags::DIRECTORY,
                Mode::empty(),
            )?;
            match fs::mkdirat(
                &parent,
                Path::new(part.as_os_str()),
                Mode::from_raw_mode(0o755),
            ) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            at.push(part);
        }
        // Is it one, and no link to one?
        open(
            self.directory.as_fd(),
            path,
            OFlags::DIRECTORY,
            Mode::empty(),
        )?;
        Ok(())
    }

    fn file<R: Read>(
        &self,
        below: &Path,
        entry: &mut Entry<'_, R>,
        mode: Option<Mode>,
    ) -> io::Result<()> {
        let path = self.file.as_deref().unwrap_or(below);
        let name = path.file_name().ok_or(io::ErrorKind::IsADirectory)?;
        let parent = self.parent(path)?;
        // A new file, so that a hard link or a FIFO of that name is not written through.
        match fs::unlinkat(&parent, Path::new(name), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let file = open(
            parent.as_fd(),
            Path::new(name),
            flags,
            Mode::from_raw_mode(0o644),
        )?;
        let mut file = File::from(file);
        io::copy(entry, &mut file)?;
        if let Some(mode) = mode {
            fs::fchmod(&file, mode)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn header(kind: EntryType, size: u64, mode: u32) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(mode);
        header
    }

    /// A tar of (path, content or none for a directory, mode), written without tar's own checks.
    fn archive(entries: &[(&str, Option<&str>, u32)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content, mode) in entries {
            let text = content.unwrap_or_default();
            let kind = if content.is_some() {
                EntryType::Regular
            } else {
                EntryType::Directory
            };
            let mut header = header(kind, text.len() as u64, *mode);
            header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            builder.append(&header, text.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_tree_arrives_with_its_modes_and_a_single_file_under_its_new_name() {
        let dir = tempfile::tempdir().unwrap();
        let tree = archive(&[
            ("srv/a/", None, 0o755),
            ("srv/a/locked/", None, 0o555),
            ("srv/a/locked/f", Some("one"), 0o4640),
            ("srv/a/x", Some("two"), 0o755),
        ]);
        let to = dir.path().join("copy");
        assert!(
            extract(&tree[..], Path::new("srv/a"), &to, true)
                .unwrap()
                .is_empty()
        );
        assert_eq!(std::fs::read_to_string(to.join("locked/f")).unwrap(), "one");
        assert_eq!(mode(&to.join("locked/f")), 0o640);
        assert_eq!(mode(&to.join("locked")), 0o555);
        assert_eq!(mode(&to.join("x")), 0o755);
        let file = archive(&[("etc/motd", Some("hi"), 0o600)]);
        extract(
            &file[..],
            Path::new("etc/motd"),
            &dir.path().join("m"),
            false,
        )
        .unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("m")).unwrap(), "hi");
        assert_eq!(mode(&dir.path().join("m")), 0o644);
        extract(&file[..], Path::new("etc/motd"), dir.path(), true).unwrap();
        assert_eq!(
            std::fs::read_to_string(dir.path().join("motd")).unwrap(),
            "hi"
        );
    }

    #[test]
    fn nothing_leaves_the_destination() {
        let dir = tempfile::tempdir().unwrap();
        let (to, outside) = (dir.path().join("to"), dir.path().join("outside"));
        std::fs::create_dir_all(&to).unwrap();
        std::fs::create_dir_all(&outside).unwrap();
        symlink(&outside, to.join("link")).unwrap();
        symlink(outside.join("f"), to.join("file-link")).unwrap();
        for path in ["a/../../outside/f", "/outside/f", "other/f", "a/link/f"] {
            let tar = archive(&[("a/", None, 0o755), (path, Some("x"), 0o644)]);
            assert!(
                extract(&tar[..], Path::new("a"), &to, true).is_err(),
                "{path}"
            );
        }
        // A link of that name is replaced, not followed.
        let tar = archive(&[("a/", None, 0o755), ("a/file-link", Some("x"), 0o644)]);
        extract(&tar[..], Path::new("a"), &to, true).unwrap();
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn links_and_devices_are_skipped_and_said() {
        let dir = tempfile::tempdir().unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        let mut link = header(EntryType::Symlink, 0, 0o777);
        builder
            .append_link(&mut link, "a/link", "/etc/passwd")
            .unwrap();
        let mut device = header(EntryType::Char, 0, 0o666);
        device.set_device_major(1).unwrap();
        device.set_device_minor(3).unwrap();
        builder
            .append_data(&mut device, "a/null", io::empty())
            .unwrap();
        let tar = builder.into_inner().unwrap();
        let skipped = extract(&tar[..], Path::new("a"), dir.path(), true).unwrap();
        assert_eq!(
            skipped,
            [
                "skipping link: \"a/link\"",
                "skipping special file: \"a/null\""
            ]
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
