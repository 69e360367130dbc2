//! What a pod takes of the disk: its writable layers, volumes and logs. Bounded.
//!
//! Where a volume of a server or of a driver is mounted, its root is looked at as the kernel remembers
//! it: nobody is asked who may be dead.

use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Statx, StatxFlags, statx};

/// Directory entries that one pod's count looks at; more are not counted.
const ENTRIES_MAX: usize = 100_000;

fn look(path: &Path) -> Option<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    statx(CWD, path, flags, StatxFlags::BASIC_STATS).ok()
}

/// Bytes on disk below the paths, without crossing into other file systems (mounted volumes of
/// others, tmpfs).
pub fn disk_bytes(paths: &[&Path]) -> u64 {
    let (mut bytes, mut seen) = (0u64, 0usize);
    for path in paths {
        let Some(top) = look(path) else {
            continue;
        };
        let device = |stat: &Statx| (stat.stx_dev_major, stat.stx_dev_minor);
        let mut queue = vec![path.to_path_buf()];
        while let Some(directory) = queue.pop() {
            // What vanishes while we look is no usage.
            for entry in std::fs::read_dir(&directory)
                .into_iter()
                .flatten()
                .flatten()
            {
                let Some(stat) = look(&entry.path()) else {
                    continue;
                };
                seen += 1;
                if seen > ENTRIES_MAX || device(&stat) != device(&top) {
                    continue;
                }
                // A file with several names is counted by its part.
                let links = u64::from(stat.stx_nlink).max(1);
                let kind = FileType::from_raw_mode(stat.stx_mode.into());
                if kind == FileType::Directory {
                    queue.push(entry.path());
                    bytes = bytes.saturating_add(stat.stx_blocks * 512);
                } else {
                    bytes = bytes.saturating_add(stat.stx_blocks * 512 / links);
                }
            }
            if seen > ENTRIES_MAX {
                return bytes;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_below_are_summed() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("a")).unwrap();
        std::fs::write(directory.path().join("a/file"), vec![1u8; 1 << 20]).unwrap();
        let bytes = disk_bytes(&[directory.path(), Path::new("/no/such/path")]);
        assert!((1 << 20..2 << 20).contains(&bytes), "{bytes}");
    }
}
