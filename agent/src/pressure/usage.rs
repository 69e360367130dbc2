//! What a pod takes of the disk: its writable layers, volumes and logs. Bounded.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Directory entries that one pod's count looks at; more are not counted.
const ENTRIES_MAX: usize = 100_000;

/// Bytes on disk below the paths, without crossing into other file systems (mounted volumes of
/// others, tmpfs).
pub fn disk_bytes(paths: &[&Path]) -> u64 {
    let (mut bytes, mut seen) = (0u64, 0usize);
    for path in paths {
        let Ok(top) = std::fs::symlink_metadata(path) else {
            continue;
        };
        let mut queue = vec![path.to_path_buf()];
        while let Some(directory) = queue.pop() {
            // What vanishes while we look is no usage.
            for entry in std::fs::read_dir(&directory)
                .into_iter()
                .flatten()
                .flatten()
            {
                let Ok(metadata) = entry.metadata() else {
                    continue;
                };
                seen += 1;
                if seen > ENTRIES_MAX || metadata.dev() != top.dev() {
                    continue;
                }
                // A file with several names is counted by its part.
                let links = metadata.nlink().max(1);
                if metadata.is_dir() {
                    queue.push(entry.path());
                    bytes = bytes.saturating_add(metadata.blocks() * 512);
                } else {
                    bytes = bytes.saturating_add(metadata.blocks() * 512 / links);
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
