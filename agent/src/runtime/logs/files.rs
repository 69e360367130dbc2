//! The files of one run's log: `0.log`, and what rotation has put aside, as the kubelet names it.
//!
//! ```text
//! 0.log ─ 10 MiB ─► 0.log.20261128-204500   the oldest goes when there are too many
//! ```
//! Names sort by age, whatever the clock does: each is later than the one before. Rotated files are
//! left as they are (no gzip), so that a follower finds its place in them by inode.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

const STAMP: &str = "%Y%m%d-%H%M%S";

/// When a log is rotated and how much is kept; the kubelet's defaults.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// A log above this is put aside.
    pub bytes_max: u64,
    /// Files of one run that are kept, the current one included; at least 2.
    pub file_count_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes_max: 10 << 20,
            file_count_max: 5,
        }
    }
}

fn stamp_of(path: &Path, rotated: &Path) -> Option<DateTime> {
    let name = rotated.file_name()?.to_str()?;
    let stamp = name
        .strip_prefix(path.file_name()?.to_str()?)?
        .strip_prefix('.')?;
    DateTime::strptime(STAMP, stamp).ok()
}

/// What rotation has left of the log at `path`, oldest first.
pub fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found: Vec<(DateTime, PathBuf)> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter_map(|other| Some((stamp_of(path, &other)?, other)))
        .collect();
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// The name that the log at `path` gets when it is put aside now; later than all of `rotated`.
pub fn next_name(path: &Path, rotated: &[PathBuf], now: Timestamp) -> PathBuf {
    let now = now.to_zoned(TimeZone::UTC).datetime();
    let last = rotated.last().and_then(|last| stamp_of(path, last));
    let after = last.and_then(|last| last.checked_add(jiff::Span::new().seconds(1)).ok());
    let stamp = after.map_or(now, |after| after.max(now));
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", stamp.strftime(STAMP)));
    name.into()
}

/// Of `rotated`, those that are too many beside the current file.
pub fn surplus(rotated: &[PathBuf], limits: Limits) -> &[PathBuf] {
    let keep = limits.file_count_max.max(2) - 1;
    &rotated[..rotated.len().saturating_sub(keep)]
}

/// Removes the log of a run, rotated files and all.
pub fn remove_all(path: &Path) -> io::Result<()> {
    for file in rotated(path)?.iter().map(PathBuf::as_path).chain([path]) {
        match fs::remove_file(file) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_rotated_files_of_this_run_are_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        let names = [
            "0.log.20261128-204501",
            "0.log.20261128-204500",
            "0.log",
            "10.log.20261128-204500",
            "0.log.tmp",
            "0.log.20261128-204500.gz",
        ];
        for name in names {
            fs::write(dir.path().join(name), name).unwrap();
        }
        let found = rotated(&log).unwrap();
        let found: Vec<_> = found.iter().map(|p| p.file_name().unwrap()).collect();
        assert_eq!(found, ["0.log.20261128-204500", "0.log.20261128-204501"]);
        remove_all(&log).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
        assert!(rotated(&dir.path().join("none/0.log")).unwrap().is_empty());
    }

    proptest! {
        /// Also when the clock stands still or goes back.
        #[test]
        fn every_new_name_is_the_last(clock in proptest::collection::vec(0_i64..1_000, 1..20)) {
            let log = Path::new("/l/0.log");
            let mut rotated: Vec<PathBuf> = Vec::new();
            for second in clock {
                let now = Timestamp::from_second(1_795_000_000 + second).unwrap();
                let name = next_name(log, &rotated, now);
                prop_assert!(rotated.last().is_none_or(|last| stamp_of(log, last) < stamp_of(log, &name)));
                rotated.push(name);
            }
            let limits = Limits { bytes_max: 1, file_count_max: 3 };
            prop_assert_eq!(rotated.len() - surplus(&rotated, limits).len(), rotated.len().min(2));
        }
    }
}
