//! `fsGroup` on a volume that has content: every file gets the group, and what the group needs.
//!
//! Files become readable and writable for the group, directories also enterable and set-group-id,
//! so that new files belong to it too. With `OnRootMismatch` nothing is walked when the volume's
//! root is as it should be already; it is changed last, so a walk that was cut short is done again.
//! Source: kubelet `pkg/volume/volume_linux.go`. Not for hostPath: its owner is the host.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, chownat, openat2};
use rustix::io::Errno;

use super::walk::{DEPTH_MAX, Walk, walk};

/// What the group may do with files.
const READ_WRITE: u32 = 0o660;
/// What it may do with directories beyond that, and set-group-id.
const DIRECTORY: u32 = 0o2110;
/// Permission bits of `st_mode`.
const BITS: u32 = 0o7777;

/// Gives the volume to the group.
///
/// * `on_root_mismatch` – `fsGroupChangePolicy: OnRootMismatch`.
pub(super) fn give_to_group(path: &Path, group: u32, on_root_mismatch: bool) -> io::Result<()> {
    let root = rustix::fs::stat(path)?;
    if on_root_mismatch && fits(root.st_gid, root.st_mode, group) {
        return Ok(());
    }
    let walked = walk(path, |directory, name, stat| {
        change(directory, name, stat, group)?;
        Ok(ControlFlow::Continue(()))
    })?;
    if walked == Walk::TooDeep {
        let words = format!("directories nested deeper than {DEPTH_MAX}");
        return Err(io::Error::other(words));
    }
    chownat(
        CWD,
        path,
        None,
        Some(Gid::from_raw(group)),
        AtFlags::empty(),
    )?;
    fs::set_permissions(path, fs::Permissions::from_mode(wanted(root.st_mode)))
}

/// Whether a volume's root says that the volume was given to the group.
fn fits(root_group: u32, root_mode: u32, group: u32) -> bool {
    let needed = READ_WRITE | DIRECTORY;
    root_group == group && root_mode & needed == needed
}

/// The permission bits that a file of mode `st_mode` gets.
fn wanted(st_mode: u32) -> u32 {
    let directory = FileType::from_raw_mode(st_mode) == FileType::Directory;
    let more = if directory { DIRECTORY } else { 0 };
    (st_mode & BITS) | READ_WRITE | more
}

/// By descriptor: between the listing and the change a container may swap the name for a link.
fn change(directory: &OwnedFd, name: &OsStr, stat: &Stat, group: u32) -> io::Result<()> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let gid = Some(Gid::from_raw(group));
    if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
        return match chownat(directory, name, None, gid, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(()),
            other => Ok(other?),
        };
    }
    let file = match openat2(directory, name, flags, Mode::empty(), resolve) {
        Err(Errno::NOENT | Errno::LOOP | Errno::XDEV | Errno::AGAIN) => return Ok(()),
        other => other?,
    };
    // What it is now, not what it was when it was listed.
    let mode = rustix::fs::fstat(&file)?.st_mode;
    chownat(&file, "", None, gid, AtFlags::EMPTY_PATH)?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::set_permissions(path, fs::Permissions::from_mode(wanted(mode)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    proptest! {
        #[test]
        fn rights_are_only_added_and_then_fit(mode in 0u32..0o10000, directory in any::<bool>()) {
            let kind = if directory { 0o040000 } else { 0o100000 };
            let got = wanted(kind | mode);
            prop_assert_eq!(got & mode, mode);
            prop_assert_eq!(got & 0o007, mode & 0o007, "others get nothing");
            prop_assert_eq!(wanted(kind | got), got);
            if directory { prop_assert!(fits(7, kind | got, 7) && !fits(8, kind | got, 7)); }
        }
    }

    #[test]
    fn everything_below_gets_the_group_and_nothing_outside() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: changing owners needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (volume, outside) = (dir.path().join("vol"), dir.path().join("outside"));
        fs::create_dir_all(volume.join("a/b")).unwrap();
        fs::write(volume.join("a/b/file"), "x").unwrap();
        fs::set_permissions(volume.join("a/b/file"), fs::Permissions::from_mode(0o4700)).unwrap();
        fs::write(&outside, "x").unwrap();
        fs::set_permissions(&outside, fs::Permissions::from_mode(0o600)).unwrap();
        symlink(&outside, volume.join("link")).unwrap();
        give_to_group(&volume, 4711, false).unwrap();
        let of = |path: &Path| {
            let meta = fs::symlink_metadata(path).unwrap();
            (meta.gid(), meta.mode() & 0o7777)
        };
        assert_eq!(of(&volume), (4711, 0o2775));
        assert_eq!(of(&volume.join("a/b")), (4711, 0o2775));
        assert_eq!(of(&volume.join("a/b/file")), (4711, 0o4760));
        assert_eq!(of(&volume.join("link")).0, 4711);
        assert_eq!(of(&outside), (0, 0o600));
        // The root is right, so nothing is looked at; with Always it is.
        fs::set_permissions(volume.join("a/b/file"), fs::Permissions::from_mode(0o600)).unwrap();
        give_to_group(&volume, 4711, true).unwrap();
        assert_eq!(of(&volume.join("a/b/file")), (4711, 0o600));
        give_to_group(&volume, 4711, false).unwrap();
        assert_eq!(of(&volume.join("a/b/file")), (4711, 0o660));
        give_to_group(&volume, 4712, true).unwrap();
        assert_eq!(of(&volume.join("a/b/file")).0, 4712);
    }
}
