//! What was taken from a container's output and is not in its log yet: on tmpfs, where the next shim
//! finds it.
//!
//! ```text
//!            mark                splice                    log written            settle
//! (settled) ──────► log's end ──────────► bytes behind it ─────────────► the same ───────► (settled)
//!                   is in the             are in the                     is true           but for the
//!                   header                spool                          of the log        begun line
//! ```
//! splice(2) takes bytes out of the FIFO and puts them into the file in one step, which a read into
//! memory followed by a write does not: a shim that was killed in between had lost them.
//!
//! Invariants: every byte is in the FIFO, in the spool behind `done`, or in the log; what the log has
//! behind a header's `log_end` is a try that was cut off, and is made again. A line that was begun
//! stays in the spool until it is ended. One stream at a time is marked: the shim has one thread.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::sys;

/// `log_end` and `done`, little-endian.
const HEADER_BYTES: u64 = 16;
/// `log_end` of a spool that is settled.
const SETTLED: u64 = u64::MAX;
/// What is logged already is dropped from the file's beginning when it is more than this.
const DONE_BYTES_MAX: u64 = 64 * 1024;
/// A spool is at most this long: what is done, a begun line and one read.
const FILE_BYTES_MAX: u64 = 128 * 1024;

/// The spool of one stream. Nothing is made before there is output.
pub(crate) struct Spool {
    path: PathBuf,
    file: Option<File>,
    /// Where the bytes begin that are not in the log.
    done: u64,
    end: u64,
    /// The tmpfs is full: bytes go through memory until the begun line is ended.
    bypassed: bool,
}

impl Spool {
    /// The spool at `path`, whose directory exists.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: None,
            done: HEADER_BYTES,
            end: HEADER_BYTES,
            bypassed: false,
        }
    }

    /// Takes what is in `fifo`, as much as fits into `buffer`, which gets a copy. `log_end` is the
    /// log's length now. [`Self::settle`] follows when the log has it.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there.
    pub(crate) fn take(
        &mut self,
        fifo: BorrowedFd<'_>,
        log_end: u64,
        buffer: &mut [u8],
    ) -> io::Result<usize> {
        if !self.bypassed {
            match self.splice(fifo, log_end, buffer) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => self.bypass(),
                taken => return taken,
            }
        }
        sys::read(fifo, buffer)
    }

    fn splice(
        &mut self,
        fifo: BorrowedFd<'_>,
        log_end: u64,
        buffer: &mut [u8],
    ) -> io::Result<usize> {
        self.mark(log_end)?;
        let file = self.file.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let taken = sys::splice(fifo, file.as_fd(), self.end, buffer.len());
        let Ok(taken) = taken else {
            self.settle((self.end - self.done) as usize);
            return taken;
        };
        file.read_exact_at(&mut buffer[..taken], self.end)?;
        self.end += taken as u64;
        Ok(taken)
    }

    /// A begun line is about to be logged as it is, `log_end` being the log's length now.
    pub(crate) fn begin(&mut self, log_end: u64) {
        if !self.bypassed && self.mark(log_end).is_err() {
            self.bypass();
        }
    }

    /// The log has everything but the last `begun` bytes, a line without its end.
    pub(crate) fn settle(&mut self, begun: usize) {
        if self.bypassed {
            self.bypassed = begun > 0;
            return;
        }
        self.done = self.end.saturating_sub(begun as u64);
        let settled = match &self.file {
            None => Ok(()),
            Some(file) if begun == 0 => {
                (self.done, self.end) = (HEADER_BYTES, HEADER_BYTES);
                file.set_len(0)
            }
            Some(_) if self.done > DONE_BYTES_MAX => self.compact(),
            Some(_) => self.mark(SETTLED),
        };
        if settled.is_err() {
            self.bypass();
        }
    }

    /// What an earlier shim had taken and not logged. The log is cut to where that shim's last try
    /// began; `log_end` is its length before, `cut` does it.
    ///
    /// The caller logs what it gets, then calls [`Self::settle`].
    pub(crate) fn recover(
        &mut self,
        log_end: u64,
        cut: impl FnOnce(u64) -> io::Result<()>,
    ) -> io::Result<Vec<u8>> {
        let file = match open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let length = file.metadata()?.len();
        let mut header = [0; HEADER_BYTES as usize];
        // Shorter: settled, or a mark that was cut off before anything was taken.
        if length <= HEADER_BYTES || length > FILE_BYTES_MAX {
            self.file = Some(file);
            return Ok(Vec::new());
        }
        file.read_exact_at(&mut header, 0)?;
        let (marked_end, done) = decode(header);
        let done = done.clamp(HEADER_BYTES, length);
        let mut begin = log_end;
        if marked_end < log_end {
            cut(marked_end)?;
            begin = marked_end;
        }
        let mut bytes = vec![0; (length - done) as usize];
        file.read_exact_at(&mut bytes, done)?;
        (self.file, self.done, self.end) = (Some(file), done, length);
        // Killed again, the next shim must begin where this one does.
        self.mark(begin)?;
        Ok(bytes)
    }

    fn mark(&mut self, log_end: u64) -> io::Result<()> {
        if self.file.is_none() {
            self.file = Some(create(&self.path)?);
        }
        let file = self.file.as_ref().ok_or(io::ErrorKind::NotFound)?;
        // One page, copied at once: a reader sees the old header or the new.
        file.write_all_at(&encode(log_end, self.done), 0)
    }

    /// The begun line into a file of its own, in this one's place.
    fn compact(&mut self) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let mut begun = vec![0; (self.end - self.done) as usize];
        file.read_exact_at(&mut begun, self.done)?;
        let new_path = self.path.with_extension("new");
        let new = create(&new_path)?;
        new.set_len(0)?;
        new.write_all_at(&encode(SETTLED, HEADER_BYTES), 0)?;
        new.write_all_at(&begun, HEADER_BYTES)?;
        fs::rename(&new_path, &self.path)?;
        self.file = Some(new);
        (self.done, self.end) = (HEADER_BYTES, HEADER_BYTES + begun.len() as u64);
        Ok(())
    }

    /// Logs without a net rather than not at all.
    fn bypass(&mut self) {
        self.bypassed = true;
        self.file = None;
        (self.done, self.end) = (HEADER_BYTES, HEADER_BYTES);
        let _ = fs::remove_file(&self.path);
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
}

fn encode(log_end: u64, done: u64) -> [u8; HEADER_BYTES as usize] {
    let mut header = [0; HEADER_BYTES as usize];
    header[..8].copy_from_slice(&log_end.to_le_bytes());
    header[8..].copy_from_slice(&done.to_le_bytes());
    header
}

fn decode(header: [u8; HEADER_BYTES as usize]) -> (u64, u64) {
    let (mut log_end, mut done) = ([0; 8], [0; 8]);
    log_end.copy_from_slice(&header[..8]);
    done.copy_from_slice(&header[8..]);
    (u64::from_le_bytes(log_end), u64::from_le_bytes(done))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::log::{LogFile, PartialLine};

    /// A container's stream, its log and its spool; the shim may be killed and come back.
    struct Stage {
        directory: PathBuf,
        fifo: OwnedFd,
        spool: Spool,
        log: LogFile,
        partial: PartialLine,
    }

    impl Stage {
        fn new(name: &str) -> Self {
            let name = format!("gantry-spool-{}-{name}", std::process::id());
            let directory = std::env::temp_dir().join(name);
            let _ = fs::remove_dir_all(&directory);
            fs::create_dir(&directory).unwrap();
            let path = directory.join("stdout");
            sys::ensure_fifo(&path).unwrap();
            let fifo = open(&path).unwrap();
            sys::set_nonblocking(fifo.as_fd());
            Self {
                spool: Spool::new(directory.join("stdout.spool")),
                log: LogFile::open(&directory.join("log")),
                partial: PartialLine::default(),
                fifo: fifo.into(),
                directory,
            }
        }

        fn says(&self, text: &str) {
            sys::write(self.fifo.as_fd(), text.as_bytes()).unwrap();
        }

        fn take(&mut self) -> Vec<u8> {
            let mut buffer = [0; 8192];
            let end = self.log.end();
            let n = self.spool.take(self.fifo.as_fd(), end, &mut buffer);
            buffer[..n.unwrap()].to_vec()
        }

        fn write(&mut self, data: &[u8]) {
            self.log.append("stdout", &mut self.partial, data, 0);
        }

        fn turn(&mut self) {
            let data = self.take();
            self.write(&data);
            self.spool.settle(self.partial.len());
        }

        /// SIGKILL, and what the next shim does first.
        fn killed(&mut self) {
            self.spool = Spool::new(self.directory.join("stdout.spool"));
            self.log = LogFile::open(&self.directory.join("log"));
            self.partial = PartialLine::default();
            let log = &mut self.log;
            let data = self.spool.recover(log.end(), |end| log.cut(end)).unwrap();
            self.write(&data);
            self.spool.settle(self.partial.len());
        }

        fn lines(&self) -> Vec<String> {
            let text = fs::read_to_string(self.directory.join("log")).unwrap();
            let text_of = |line: &str| line.splitn(4, ' ').nth(3).unwrap().to_owned();
            text.lines().map(text_of).collect()
        }
    }

    impl Drop for Stage {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }

    #[test]
    fn a_shim_that_is_killed_anywhere_logs_everything_once() {
        for point in ["before", "taken", "logged", "cut off", "settled"] {
            let mut stage = Stage::new(&point.replace(' ', "-"));
            stage.says("one\ntw");
            stage.turn();
            stage.says("o\nthree\nfo");
            match point {
                "before" => {}
                "taken" => drop(stage.take()),
                "logged" => {
                    let data = stage.take();
                    stage.write(&data);
                }
                "cut off" => {
                    let data = stage.take();
                    stage.write(&data);
                    let end = stage.log.end();
                    stage.log.cut(end - 5).unwrap();
                }
                _ => stage.turn(),
            }
            stage.killed();
            // And once more, before anything new.
            stage.killed();
            if point == "before" {
                stage.turn();
            }
            stage.says("ur\n");
            stage.turn();
            // As the poll loop does, which reads until nothing is there.
            let (end, mut buffer) = (stage.log.end(), [0; 64]);
            let empty = stage.spool.take(stage.fifo.as_fd(), end, &mut buffer);
            assert_eq!(empty.unwrap_err().kind(), io::ErrorKind::WouldBlock);
            assert_eq!(stage.lines(), ["one", "two", "three", "four"], "{point}");
            let length = fs::metadata(stage.directory.join("stdout.spool"))
                .unwrap()
                .len();
            assert_eq!(length, 0, "a settled spool takes no memory");
        }
    }

    #[test]
    fn what_the_other_stream_logs_meanwhile_is_not_cut() {
        let mut stage = Stage::new("other");
        stage.says("begun");
        stage.turn();
        let mut other = PartialLine::default();
        stage.log.append("stderr", &mut other, b"other\n", 0);
        stage.killed();
        stage.says(" and ended\n");
        stage.turn();
        assert_eq!(stage.lines(), ["other", "begun and ended"]);
    }

    #[test]
    fn output_without_a_pause_is_bounded_and_survives_compaction() {
        let mut stage = Stage::new("long");
        // 7,001 bytes: every read ends within a line.
        let line = format!("{}\n", "x".repeat(7_000));
        for n in 0..100 {
            stage.says(&line);
            stage.says(&line[..100]);
            stage.turn();
            stage.says(&line[100..]);
            stage.turn();
            let length = fs::metadata(stage.directory.join("stdout.spool"))
                .unwrap()
                .len();
            assert!(length <= FILE_BYTES_MAX, "{length}");
            if n % 30 == 0 {
                stage.says("y");
                stage.turn();
                stage.killed();
                stage.says("\n");
                stage.turn();
            }
        }
        let lines = stage.lines();
        assert_eq!(lines.iter().filter(|l| l.len() == 7_000).count(), 200);
        assert_eq!(lines.iter().filter(|l| *l == "y").count(), 4);
    }

    #[test]
    fn without_room_output_is_logged_as_before() {
        let mut stage = Stage::new("full");
        stage.spool = Spool::new(stage.directory.join("no/such/directory/spool"));
        stage.says("one\ntw");
        stage.turn();
        stage.says("o\n");
        stage.turn();
        assert_eq!(stage.lines(), ["one", "two"]);
    }
}
