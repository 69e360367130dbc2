//! Reading a container's CRI log back as the bytes it wrote.
//!
//! ```text
//! 0.log ─► entries (time, stream, P|F, text) ─► since, tail ─► lines, parts joined per stream ─► bytes
//!   └ rotated (files.rs): what is kept of the older files first; a follower reads a file to its end,
//!     then goes to the next younger one, however many rotations there were meanwhile
//! ```
//! A follower ends when the run's `exit` record was there *before* a read that found nothing: the
//! shim writes the record after the last log byte, so nothing can be missing then.
//!
//! The parser is pure ([`Lines`]); [`Reader`] does one bounded read per step; [`stream`] runs the
//! steps off the async threads. Source of the format: Kubernetes `pkg/kubelet/kuberuntime/logs`.

pub mod files;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use gantry_shim::record::EXIT_FILE;
use jiff::Timestamp;

/// Bytes read per step.
const READ_BYTES: usize = 64 * 1024;
/// A line's parts are held until its end, up to this; then they are passed on as they are.
const LINE_BYTES_MAX: usize = 1 << 20;
/// How often a follower looks for more.
const FOLLOW_PAUSE: Duration = Duration::from_millis(100);

/// What of a log is wanted; the default is all that is there now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LogOptions {
    /// Only the last so many lines of what is there now.
    pub tail_lines: Option<u64>,
    /// Only entries of this time or later.
    pub since: Option<Timestamp>,
    /// Put the time before each line.
    pub timestamps: bool,
    /// Go on until the run has ended.
    pub follow: bool,
    /// Stop after so many bytes.
    pub limit_bytes: Option<u64>,
}

/// One line of a CRI log file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry<'a> {
    /// As written, RFC 3339 with nanoseconds.
    pub time: &'a str,
    /// `stdout` or `stderr`.
    pub stream: &'a str,
    /// The text goes on in the stream's next entry.
    pub partial: bool,
    /// Without the newline.
    pub text: &'a [u8],
}

/// Parses `<time> <stream> <P|F>[:more tags] <text>`; none when it is something else.
pub fn parse(line: &[u8]) -> Option<Entry<'_>> {
    let mut fields = line.splitn(4, |&b| b == b' ');
    let time = std::str::from_utf8(fields.next()?).ok()?;
    let stream = std::str::from_utf8(fields.next()?).ok()?;
    let tag = fields.next()?;
    let text = fields.next().unwrap_or_default();
    let known = matches!(stream, "stdout" | "stderr") && matches!(tag.first(), Some(b'P' | b'F'));
    known.then_some(Entry {
        time,
        stream,
        partial: tag.first() == Some(&b'P'),
        text,
    })
}

/// Joins entries to the lines that the container wrote. Pure.
#[derive(Default)]
pub struct Lines {
    since: Option<Timestamp>,
    timestamps: bool,
    /// Begun lines of stdout and stderr.
    open: [Vec<u8>; 2],
}

impl Lines {
    /// With the given filter and decoration.
    pub fn new(since: Option<Timestamp>, timestamps: bool) -> Self {
        Self {
            since,
            timestamps,
            open: Default::default(),
        }
    }

    /// Takes one line of the file and appends what is complete to `out`.
    pub fn push(&mut self, line: &[u8], out: &mut Vec<u8>) {
        let Some(entry) = parse(line) else {
            // Not ours to judge: somebody else wrote into the file.
            out.extend_from_slice(line);
            out.push(b'\n');
            return;
        };
        let early = self.since.is_some_and(|since| {
            entry
                .time
                .parse::<Timestamp>()
                .is_ok_and(|time| time < since)
        });
        if early {
            return;
        }
        let open = &mut self.open[usize::from(entry.stream == "stderr")];
        if open.is_empty() && self.timestamps {
            open.extend_from_slice(entry.time.as_bytes());
            open.push(b' ');
        }
        open.extend_from_slice(entry.text);
        if !entry.partial {
            open.push(b'\n');
        }
        if !entry.partial || open.len() > LINE_BYTES_MAX {
            out.append(open);
        }
    }

    /// What was begun and never ended.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        for open in &mut self.open {
            out.append(open);
        }
    }
}

/// What a step of a [`Reader`] found.
#[derive(Debug)]
enum Step {
    Data(Bytes),
    /// Nothing now; ask again later.
    Idle,
    End,
}

/// One reader of one run's log.
struct Reader {
    path: PathBuf,
    run_directory: PathBuf,
    options: LogOptions,
    file: File,
    lines: Lines,
    /// An entry of which the end is not written yet.
    rest: Vec<u8>,
    /// Bytes that may still be passed on.
    budget: u64,
    done: bool,
}

impl Reader {
    fn open(path: PathBuf, run_directory: PathBuf, options: LogOptions) -> io::Result<Self> {
        let file = start(&path, options.tail_lines).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot open log {}: {error}", path.display()),
            )
        })?;
        Ok(Self {
            lines: Lines::new(options.since, options.timestamps),
            budget: options.limit_bytes.unwrap_or(u64::MAX),
            path,
            run_directory,
            options,
            file,
            rest: Vec::new(),
            done: false,
        })
    }

    fn step(&mut self) -> io::Result<Step> {
        if self.done || self.budget == 0 {
            return Ok(Step::End);
        }
        // Before the read: what the record promises is complete is in the file by now.
        let ended = !self.options.follow || self.has_ended();
        let mut out = Vec::new();
        let read = self.read_some(&mut out)?;
        if read == 0 && !self.next_file()? && ended {
            self.lines.finish(&mut out);
            self.done = true;
        }
        if out.len() as u64 > self.budget {
            // Fits: it is less than a length.
            out.truncate(self.budget as usize);
        }
        self.budget -= out.len() as u64;
        Ok(match (out.is_empty(), self.done, read) {
            (false, ..) => Step::Data(out.into()),
            (true, true, _) => Step::End,
            (true, false, 0) => Step::Idle,
            // Entries that were filtered, or half an entry: go on at once.
            (true, false, _) => Step::Data(Bytes::new()),
        })
    }

    fn has_ended(&self) -> bool {
        self.run_directory.join(EXIT_FILE).exists() || !self.run_directory.exists()
    }

    fn read_some(&mut self, out: &mut Vec<u8>) -> io::Result<usize> {
        let mut buffer = vec![0; READ_BYTES];
        let read = self.file.read(&mut buffer)?;
        let mut data = &buffer[..read];
        while let Some(end) = data.iter().position(|&b| b == b'\n') {
            if self.rest.is_empty() {
                self.lines.push(&data[..end], out);
            } else {
                self.rest.extend_from_slice(&data[..end]);
                self.lines.push(&self.rest, out);
                self.rest.clear();
            }
            data = &data[end + 1..];
        }
        self.rest.extend_from_slice(data);
        if self.rest.len() > LINE_BYTES_MAX {
            out.append(&mut self.rest);
        }
        Ok(read)
    }

    /// Goes on in the next younger file, after a rotation has put this one aside. The shim creates
    /// the younger one when it stops writing to the older, so the older is complete now: true means
    /// "read on", in either of them.
    fn next_file(&mut self) -> io::Result<bool> {
        let own = self.file.metadata()?;
        let is_own = |path: &PathBuf| match std::fs::metadata(path) {
            Ok(other) => Ok((other.dev(), other.ino()) == (own.dev(), own.ino())),
            // Between the rename and the reopen, or too old by now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        };
        if is_own(&self.path)? {
            return Ok(false);
        }
        let mut all = files::rotated(&self.path)?;
        all.push(self.path.clone());
        let mut next = None;
        for (index, path) in all.iter().enumerate() {
            if is_own(path)? {
                next = all.get(index + 1);
            }
        }
        if next.is_none() && own.nlink() == 0 {
            // So many rotations that this file is gone: the oldest there is comes nearest.
            next = all.first();
        }
        let Some(next) = next else {
            return Ok(false); // renamed between the two looks: the next step finds it
        };
        let file = match File::open(next) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            file => file?,
        };
        // Written between our last read and the shim's switch.
        if self.file.stream_position()? == self.file.metadata()?.len() {
            self.file = file;
        }
        Ok(true)
    }
}

/// Opens the log where reading begins: at the oldest file that is kept, or as many lines before
/// the end as are wanted, in whichever file that is.
fn start(path: &Path, tail_lines: Option<u64>) -> io::Result<File> {
    let mut older = files::rotated(path)?;
    let mut wanted = tail_lines.unwrap_or(u64::MAX);
    let mut file = match File::open(path) {
        // Between the rename and the reopen.
        Err(error) if error.kind() == io::ErrorKind::NotFound => match older.pop() {
            Some(newest) => File::open(newest)?,
            None => return Err(error),
        },
        file => file?,
    };
    loop {
        let found = match tail_lines {
            Some(_) => {
                let tail = tail_start(&mut file, wanted)?;
                file.seek(SeekFrom::Start(tail.start))?;
                tail.line_count
            }
            None => 0,
        };
        wanted = wanted.saturating_sub(found);
        let Some(next) = older.pop().filter(|_| wanted > 0) else {
            return Ok(file);
        };
        match File::open(next) {
            Ok(older) => file = older,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(file),
            Err(error) => return Err(error),
        }
    }
}

/// Where a file's last lines begin, and how many they are.
#[derive(PartialEq, Eq, Debug)]
struct Tail {
    start: u64,
    line_count: u64,
}

/// Where the last `count` complete lines begin. Reads backwards, so a long log costs no more than
/// a short one.
fn tail_start(file: &mut File, count: u64) -> io::Result<Tail> {
    let length = file.metadata()?.len();
    if count == 0 {
        return Ok(Tail {
            start: length,
            line_count: 0,
        });
    }
    let mut seen = 0;
    // The line that ends at `end`, to be judged once its beginning is found; newest first.
    let mut tail: Vec<u8> = Vec::new();
    let mut at = length;
    let mut buffer = vec![0; READ_BYTES];
    while at > 0 {
        let size = usize::try_from(at).unwrap_or(usize::MAX).min(READ_BYTES);
        at -= size as u64;
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut buffer[..size])?;
        let mut end = size;
        while let Some(newline) = buffer[..end].iter().rposition(|&b| b == b'\n') {
            let line_start = at + newline as u64 + 1;
            let mut line = buffer[newline + 1..end].to_vec();
            line.append(&mut tail);
            // A part belongs to the line that ends after it.
            if line_start < length && !parse(&line).is_some_and(|e| e.partial) {
                seen += 1;
                if seen > count {
                    return Ok(Tail {
                        start: line_start + line.len() as u64 + 1,
                        line_count: count,
                    });
                }
            }
            end = newline;
        }
        tail.splice(0..0, buffer[..end].iter().copied());
        tail.truncate(LINE_BYTES_MAX);
    }
    let first_counts = !tail.is_empty() && !parse(&tail).is_some_and(|e| e.partial);
    if first_counts && seen == count {
        return Ok(Tail {
            start: (tail.len() as u64 + 1).min(length),
            line_count: count,
        });
    }
    Ok(Tail {
        start: 0,
        line_count: seen + u64::from(first_counts),
    })
}

/// The log of a run as its bytes.
///
/// * `path` – the CRI log; that of the run before for `previous`.
/// * `run_directory` – [`crate::paths::Paths::container_run`]; one that is gone counts as ended.
///
/// # Errors
/// The first item is an error when the log cannot be opened; the stream ends after any error.
pub fn stream(
    path: &Path,
    run_directory: &Path,
    options: LogOptions,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    enum State {
        Closed(PathBuf, PathBuf, LogOptions),
        Open(Box<Reader>),
        End,
    }
    let begin = State::Closed(path.to_path_buf(), run_directory.to_path_buf(), options);
    stream::unfold(begin, |mut state| async {
        loop {
            // Files of a node's own disk; still, a read may wait for it.
            let work = move || -> io::Result<(Step, State)> {
                let mut reader = match state {
                    State::Closed(path, run, options) => {
                        Box::new(Reader::open(path, run, options)?)
                    }
                    State::Open(reader) => reader,
                    State::End => return Ok((Step::End, State::End)),
                };
                Ok((reader.step()?, State::Open(reader)))
            };
            let result = tokio::task::spawn_blocking(work).await;
            match result.map_err(io::Error::other).and_then(|r| r) {
                Ok((Step::Data(data), next)) if data.is_empty() => state = next,
                Ok((Step::Data(data), next)) => return Some((Ok(data), next)),
                Ok((Step::Idle, next)) => {
                    tokio::time::sleep(FOLLOW_PAUSE).await;
                    state = next;
                }
                Ok((Step::End, _)) => return None,
                Err(error) => return Some((Err(error), State::End)),
            }
        }
    })
}

#[cfg(test)]
mod tests;
