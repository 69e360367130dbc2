//! A container's last words: its termination message, or the end of its log.
//!
//! Bounded: 4 KiB of the file, 2 KiB or 80 lines of the log, and 12 KiB for all containers of a pod
//! together (`status.rs`). The file is the agent's own, outside the container's root, and is opened
//! without following a link. Source: the kubelet's `getTerminationMessage`, `MaxContainerTermination*`.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::ids::ContainerRun;
use crate::runtime::Exit;
use crate::runtime::logs::Lines;

/// Of the file.
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Of the log.
const LOG_BYTES_MAX: usize = 2048;
/// Of the log.
const LOG_LINES_MAX: usize = 80;
/// Read of the log's file: its lines carry a time and a stream each.
const LOG_READ_BYTES: u64 = 16 * 1024;

/// The host's side of a run's `terminationMessagePath`, below the pod's `etc` directory.
pub fn file(etc: &Path, run: &ContainerRun) -> PathBuf {
    etc.join("termination")
        .join(format!("{}-{}", run.name, run.attempt))
}

/// The last words of a run that ended like this; empty when it left none.
pub fn read(file: &Path, log: &Path, log_on_error: bool, exit: &Exit) -> String {
    let bytes = tail(file, MESSAGE_BYTES_MAX as u64).unwrap_or_default();
    if !bytes.is_empty() || !log_on_error || exit.code == 0 {
        return String::from_utf8_lossy(&bytes).into_owned();
    }
    let Ok(raw) = tail(log, LOG_READ_BYTES) else {
        return String::new();
    };
    last_lines(&raw)
}

fn last_lines(raw: &[u8]) -> String {
    // A first line that is cut off is nobody's.
    let whole = match raw.len() as u64 == LOG_READ_BYTES {
        true => raw.iter().position(|b| *b == b'\n').map_or(0, |at| at + 1),
        false => 0,
    };
    let mut lines = Lines::new(None, false);
    let mut text = Vec::new();
    for line in raw[whole..]
        .split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
    {
        lines.push(line, &mut text);
    }
    lines.finish(&mut text);
    let newlines = text.iter().enumerate().rev().filter(|(_, b)| **b == b'\n');
    let begin = newlines
        .map(|(at, _)| at + 1)
        .nth(LOG_LINES_MAX)
        .unwrap_or(0);
    let begin = begin.max(text.len().saturating_sub(LOG_BYTES_MAX));
    String::from_utf8_lossy(&text[begin..]).into_owned()
}

/// The last bytes of a regular file.
fn tail(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut file = open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes_max)))?;
    let mut bytes = Vec::new();
    file.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn exit(code: i32) -> Exit {
        Exit {
            code,
            signal: 0,
            oom_killed: false,
            started_at: SystemTime::UNIX_EPOCH,
            finished_at: SystemTime::UNIX_EPOCH,
            unknown: false,
        }
    }

    #[test]
    fn the_file_is_bounded_and_no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (file, log) = (dir.path().join("m"), dir.path().join("log"));
        std::fs::write(&file, [vec![b'a'; 5000], b"end".to_vec()].concat()).unwrap();
        let text = read(&file, &log, false, &exit(0));
        assert_eq!(text.len(), MESSAGE_BYTES_MAX);
        assert!(text.ends_with("aend"));
        let secret = dir.path().join("secret");
        std::fs::write(&secret, "secret").unwrap();
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&secret, &file).unwrap();
        assert_eq!(read(&file, &log, true, &exit(1)), "");
    }

    #[test]
    fn the_log_speaks_only_after_an_error_and_only_without_a_message() {
        let dir = tempfile::tempdir().unwrap();
        let (file, log) = (dir.path().join("m"), dir.path().join("log"));
        let mut text = String::new();
        for n in 0..200 {
            text += &format!("2026-01-01T00:00:00.000000000Z stdout F line {n}\n");
        }
        std::fs::write(&log, text).unwrap();
        std::fs::write(&file, "").unwrap();
        assert_eq!(read(&file, &log, true, &exit(0)), "");
        assert_eq!(read(&file, &log, false, &exit(1)), "");
        let words = read(&file, &log, true, &exit(1));
        assert!(
            words.starts_with("line 120\n") && words.ends_with("line 199\n"),
            "{words}"
        );
        std::fs::write(&file, "said").unwrap();
        assert_eq!(read(&file, &log, true, &exit(1)), "said");
    }
}
