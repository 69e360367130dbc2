//! `/run/gantry` on tmpfs.
//!
//! A pod's start writes its records, bundle and namespaces' pins there, several times with fsync.
//! None of it may outlive a boot, so none of it should wait for a disk. `/run` is a tmpfs on most
//! machines; where it is not (a container, a small image), the directory gets one of its own.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};

/// `ramfs`, which an initramfs' root is; nix has no name for it. Source: linux/magic.h.
const RAMFS_MAGIC: i64 = 0x8584_58f6;
/// Records and FIFOs: kilobytes per pod. The bound protects the machine from a mistake of ours.
const OPTIONS: &str = "mode=755,size=256m";

/// Makes the directory and mounts a tmpfs on it unless it is in memory already. A directory with
/// content stays as it is: its pods run.
pub fn ensure(run: &Path) -> io::Result<()> {
    std::fs::create_dir_all(run)?;
    if is_in_memory(run)? || std::fs::read_dir(run)?.next().is_some() {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    Ok(mount(
        Some("gantry"),
        run,
        Some("tmpfs"),
        flags,
        Some(OPTIONS),
    )?)
}

/// Unmounts what [`ensure`] mounted. Ok when nothing is mounted there.
pub fn remove(run: &Path) -> io::Result<()> {
    match umount2(run, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn is_in_memory(path: &Path) -> io::Result<bool> {
    let kind = statfs(path)?.filesystem_type();
    Ok(kind == TMPFS_MAGIC || kind == FsType(RAMFS_MAGIC))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_is_in_memory_once_and_gone_after() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return;
        }
        let parent = tempfile::tempdir().unwrap();
        // Then nothing has to be mounted, and nothing is unmounted.
        let was_in_memory = is_in_memory(parent.path()).unwrap();
        let run = parent.path().join("run");
        ensure(&run).unwrap();
        assert!(is_in_memory(&run).unwrap());
        std::fs::write(run.join("record"), "kept").unwrap();
        ensure(&run).unwrap();
        assert_eq!(std::fs::read(run.join("record")).unwrap(), b"kept");
        remove(&run).unwrap();
        assert_eq!(run.join("record").exists(), was_in_memory);
        remove(&run).unwrap();
    }

    #[test]
    fn a_directory_with_content_is_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        std::fs::write(parent.path().join("record"), "kept").unwrap();
        ensure(parent.path()).unwrap();
        assert!(parent.path().join("record").exists());
    }
}
