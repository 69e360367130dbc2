//! Directories whose children have nothing to do with each other, told to the file system.
//!
//! ext4 puts a directory beside its parent, in the same group of inodes, and for one to six minutes gives no
//! deleted inode away again: a new one is looked for past each of those. Where pods come and go, or where
//! anything else deletes thousands of files nearby, that costs milliseconds for every file of a
//! new pod. Below a directory with the hint, `T` of chattr(1), each child begins in a group of its own:
//! the one with the fewest directories.
//!
//! Source: `recently_deleted` and `find_group_orlov` in Linux' fs/ext4/ialloc.c.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

/// Makes the directories where they are missing, and gives them the hint where the file system takes it.
///
/// # Errors
/// One of them could not be made.
pub fn ensure_apart(directories: &[&Path]) -> io::Result<()> {
    for path in directories {
        std::fs::create_dir_all(path)?;
        if let Err(error) = hint(path) {
            tracing::debug!("{}: no hint for its inodes: {error}", path.display());
        }
    }
    Ok(())
}

fn hint(path: &Path) -> io::Result<()> {
    let directory = File::open(path)?;
    let flags = ioctl_getflags(&directory)?;
    if flags.contains(IFlags::TOPDIR) {
        return Ok(());
    }
    Ok(ioctl_setflags(&directory, flags | IFlags::TOPDIR)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use nix::sys::statfs::{EXT4_SUPER_MAGIC, statfs};

    use super::*;

    #[test]
    fn children_begin_in_groups_of_their_own() {
        // On the disk of the build: the directory for temporary files may be in memory.
        let parent = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (apart, beside) = (parent.path().join("apart"), parent.path().join("beside"));
        ensure_apart(&[&apart]).unwrap();
        ensure_apart(&[&apart]).unwrap();
        if statfs(parent.path()).unwrap().filesystem_type() != EXT4_SUPER_MAGIC {
            eprintln!("skipped: children_begin_in_groups_of_their_own, the build is not on ext4");
            return;
        }
        let flags = |path: &Path| ioctl_getflags(File::open(path).unwrap()).unwrap();
        assert!(flags(&apart).contains(IFlags::TOPDIR));
        // Inodes are numbered through the groups, some thousand in each.
        let numbers_below = |directory: &Path| {
            let made = (0..8).map(|number| {
                let child = directory.join(number.to_string());
                std::fs::create_dir_all(&child).unwrap();
                child.metadata().unwrap().ino()
            });
            let mut numbers: Vec<u64> = made.collect();
            numbers.sort_unstable();
            numbers
        };
        let numbers = numbers_below(&apart);
        let near = numbers.windows(2).filter(|pair| pair[1] - pair[0] < 64);
        let near_without = numbers_below(&beside);
        let near_without = near_without
            .windows(2)
            .filter(|pair| pair[1] - pair[0] < 64);
        assert!(near.count() < near_without.count(), "{numbers:?}");
    }

    #[test]
    fn a_file_system_without_the_hint_does_without() {
        ensure_apart(&[Path::new("/proc/self")]).unwrap();
        let parent = tempfile::NamedTempFile::new().unwrap();
        assert!(ensure_apart(&[&parent.path().join("below")]).is_err());
    }
}
