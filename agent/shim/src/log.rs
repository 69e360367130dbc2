//! Container output to CRI log lines: `2026-11-20T11:22:33.123456789Z stdout F text`.
//!
//! A line longer than [`LINE_BYTES_MAX`] is cut into `P` entries and a last `F`; an unterminated
//! last line is one `P`, so a reader that joins parts gets the container's bytes exactly. All
//! lines of one read carry the time of that read. Each batch of lines is one `write` to a file
//! opened `O_APPEND`, so stdout and stderr never mix within a line.
//!
//! Source: Kubernetes' CRI log format, as kubelet's `logs.go` and containerd's `logger.go`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Longest text of one log entry, as containerd's default.
pub(crate) const LINE_BYTES_MAX: usize = 16 * 1024;
/// A partial line's buffer is given back above this once it was written.
const KEEP_BYTES: usize = 4096;

/// The log file of one container run.
pub(crate) struct LogFile {
    path: PathBuf,
    file: Option<File>,
    /// The file's length: nobody else writes to it.
    end: u64,
    /// Reused for every batch.
    batch: Vec<u8>,
    /// Bytes the file system did not take: told in the exit record.
    pub(crate) lost_bytes: u64,
}

/// What one of the two streams has begun but not ended.
#[derive(Default)]
pub(crate) struct PartialLine(Vec<u8>);

impl LogFile {
    /// Opens for appending; a container whose log cannot be opened still runs.
    pub(crate) fn open(path: &Path) -> Self {
        let mut log = Self {
            path: path.to_path_buf(),
            file: None,
            end: 0,
            batch: Vec::new(),
            lost_bytes: 0,
        };
        // An error comes back as lost bytes; the next reopen may succeed.
        let _ = log.reopen();
        log
    }

    /// Goes on in a new file of the same name: after a rotation has renamed the old one.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.path);
        let file = file?;
        self.end = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }

    /// The file's length in bytes.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Takes back what is behind `end`.
    pub(crate) fn cut(&mut self, end: u64) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.set_len(end)?;
            self.end = end;
        }
        Ok(())
    }

    /// Takes what was read at `now_ns` from `stream` ("stdout" or "stderr").
    pub(crate) fn append(
        &mut self,
        stream: &str,
        partial: &mut PartialLine,
        data: &[u8],
        now_ns: u64,
    ) {
        let mut head = [0; HEAD_BYTES];
        let head = entry_head(&mut head, stream, now_ns);
        let mut rest = data;
        while !rest.is_empty() {
            let room = LINE_BYTES_MAX - partial.0.len();
            let window = &rest[..rest.len().min(room)];
            if let Some(end) = window.iter().position(|&b| b == b'\n') {
                self.entry(head, b'F', &partial.0, &rest[..end]);
                partial.clear();
                rest = &rest[end + 1..];
            } else if window.len() == room {
                self.entry(head, b'P', &partial.0, window);
                partial.clear();
                rest = &rest[room..];
            } else {
                partial.0.extend_from_slice(window);
                rest = &[];
            }
        }
        self.flush();
    }

    /// Writes what the stream left without a newline.
    pub(crate) fn finish(&mut self, stream: &str, partial: &mut PartialLine, now_ns: u64) {
        if !partial.0.is_empty() {
            let mut head = [0; HEAD_BYTES];
            let head = entry_head(&mut head, stream, now_ns);
            self.entry(head, b'P', &partial.0, &[]);
            partial.clear();
            self.flush();
        }
    }

    fn entry(&mut self, head: &[u8], tag: u8, first: &[u8], second: &[u8]) {
        let parts: [&[u8]; 5] = [head, &[tag, b' '], first, second, b"\n"];
        for part in parts {
            self.batch.extend_from_slice(part);
        }
        if self.batch.len() >= LINE_BYTES_MAX {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let length = self.batch.len() as u64;
        match self.file.as_mut().map(|file| file.write_all(&self.batch)) {
            Some(Ok(())) => self.end += length,
            _ => {
                self.lost_bytes += length;
                // A part may have been taken.
                let known = self.file.as_ref().and_then(|file| file.metadata().ok());
                self.end = known.map_or(self.end, |file| file.len());
            }
        }
        self.batch.clear();
    }
}

impl PartialLine {
    /// Bytes that were taken and are not logged.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    fn clear(&mut self) {
        self.0.clear();
        if self.0.capacity() > KEEP_BYTES {
            self.0 = Vec::new();
        }
    }
}

/// `2026-11-20T11:22:33.123456789Z stdout `
const HEAD_BYTES: usize = 48;

fn entry_head<'a>(buffer: &'a mut [u8; HEAD_BYTES], stream: &str, now_ns: u64) -> &'a [u8] {
    let (year, month, day) = date((now_ns / 86_400_000_000_000) as i64);
    let second = now_ns / 1_000_000_000 % 86_400;
    let mut to = &mut buffer[..];
    // Cannot fail: the longest head (a 6-digit year) is 40 bytes.
    let _ = write!(
        to,
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z {stream} ",
        second / 3600,
        second / 60 % 60,
        second % 60,
        now_ns % 1_000_000_000,
    );
    let unused = to.len();
    &buffer[..HEAD_BYTES - unused]
}

/// The civil date of a day since 1970-01-01.
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn date(days_since_1970: i64) -> (i64, i64, i64) {
    let z = days_since_1970 + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-20T11:22:33.000000007Z
    const NOW_NS: u64 = 1_795_173_753_000_000_007;

    fn written(writes: &[&[u8]]) -> String {
        let path = std::env::temp_dir().join(format!(
            "gantry-log-{}-{:p}",
            std::process::id(),
            writes.as_ptr()
        ));
        let mut log = LogFile::open(&path);
        let mut partial = PartialLine::default();
        for data in writes {
            log.append("stdout", &mut partial, data, NOW_NS);
        }
        log.finish("stdout", &mut partial, NOW_NS);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(log.lost_bytes, 0);
        text
    }

    #[test]
    fn a_line_carries_time_stream_and_tag() {
        let head = "2026-11-20T11:22:33.000000007Z stdout";
        assert_eq!(written(&[b"a\nb\n"]), format!("{head} F a\n{head} F b\n"));
        assert_eq!(written(&[b"a", b"b\n"]), format!("{head} F ab\n"));
        assert_eq!(written(&[b"\n"]), format!("{head} F \n"));
        assert_eq!(written(&[b"no end"]), format!("{head} P no end\n"));
    }

    #[test]
    fn a_long_line_is_cut_and_joins_to_the_same_bytes() {
        for length in [
            LINE_BYTES_MAX - 1,
            LINE_BYTES_MAX,
            LINE_BYTES_MAX + 1,
            50_000,
        ] {
            let mut line = vec![b'x'; length];
            line.push(b'\n');
            let chunks: Vec<&[u8]> = line.chunks(8192).collect();
            let mut joined = String::new();
            for entry in written(&chunks).lines() {
                let text = entry.splitn(4, ' ').nth(3).unwrap();
                assert!(text.len() <= LINE_BYTES_MAX);
                joined.push_str(text);
                if entry.split(' ').nth(2) == Some("F") {
                    joined.push('\n');
                }
            }
            assert_eq!(joined.as_bytes(), line);
        }
    }

    #[test]
    fn dates_are_civil() {
        assert_eq!(date(0), (1970, 1, 1));
        assert_eq!(date(11_016), (2000, 2, 29));
        assert_eq!(date(20_777), (2026, 11, 20));
        assert_eq!(date(47_540), (2100, 2, 28));
        assert_eq!(date(47_541), (2100, 3, 1));
    }
}
