//! One container run inside the shim: its descriptors, its log, its records.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use gantry_shim::cgroup;
use gantry_shim::record::{self, Exit, Started};
use gantry_shim::wire::{MESSAGE_BYTES_MAX, Phase, STDERR_FILE, STDOUT_FILE, Start};

use crate::attach::{ATTACHMENT_COUNT_MAX, Attachment};
use crate::log::{LogFile, PartialLine};
use crate::spool::Spool;
use crate::sys;

/// Bytes taken from a stream per read.
const READ_BYTES: usize = 8 * 1024;
/// Reads per stream before the others get their turn.
const READS_PER_TURN: u32 = 16;
/// How long a process that ended under another parent may stay unreaped before its status
/// counts as lost.
pub(crate) const ORPHAN_STATUS_WAIT_MS: u64 = 2_000;

/// FIFO that is the container's stdin, when it has one.
pub(crate) const STDIN_FILE: &str = "stdin";
/// Where gantry-rt sends the terminal's master.
pub(crate) const CONSOLE_FILE: &str = "console.sock";

/// One end of the container's output.
pub(crate) struct Stream {
    /// `stdout` or `stderr`.
    pub(crate) name: &'static str,
    /// A FIFO or a terminal's master, non-blocking.
    pub(crate) fd: OwnedFd,
    partial: PartialLine,
    /// What a killed shim must not lose; a terminal is gone with its shim anyway.
    spool: Option<Spool>,
}

impl Stream {
    fn take(&mut self, log_end: u64, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.spool {
            Some(spool) => spool.take(self.fd.as_fd(), log_end, buffer),
            None => sys::read(self.fd.as_fd(), buffer),
        }
    }

    fn log(&mut self, log: &mut LogFile, data: &[u8]) {
        log.append(self.name, &mut self.partial, data, sys::now_ns());
        if let Some(spool) = &mut self.spool {
            spool.settle(self.partial.len());
        }
    }

    /// What an earlier shim had taken and not logged.
    fn recover(&mut self, log: &mut LogFile) {
        let Some(spool) = &mut self.spool else { return };
        // Unreadable: as if nothing had been taken.
        let data = spool.recover(log.end(), |end| log.cut(end));
        self.log(log, &data.unwrap_or_default());
    }

    /// A begun line will not be ended.
    fn finish(&mut self, log: &mut LogFile, now_ns: u64) {
        if self.partial.len() == 0 {
            return;
        }
        if let Some(spool) = &mut self.spool {
            spool.begin(log.end());
        }
        log.finish(self.name, &mut self.partial, now_ns);
        if let Some(spool) = &mut self.spool {
            spool.settle(0);
        }
    }
}

/// What a turn of reading found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pumped {
    /// The turn ended before the stream was empty.
    More,
    /// Nothing is there now.
    Empty,
    /// A terminal whose last user has closed it (`EIO`). A FIFO never ends: both sides are held.
    Gone,
}

/// A container that an earlier shim of this pod started: no child of this process.
pub(crate) struct Orphan {
    /// Readable when it has ended.
    pub(crate) pidfd: OwnedFd,
    /// When it was seen to have ended.
    pub(crate) ended_ms: Option<u64>,
}

/// A container run from the request to start it until it is forgotten.
pub(crate) struct Run {
    /// Names it within this process; never reused.
    pub(crate) id: u32,
    /// `<container>/<attempt>`: also its directory, relative to the sandbox.
    pub(crate) name: String,
    /// Where it is.
    pub(crate) phase: Phase,
    /// What is written to `started` once init was let go.
    pub(crate) started: Started,
    /// Requests to answer when gantry-rt is done: connection and request id.
    pub(crate) waiters: Vec<(u32, u64)>,
    /// Open while the container may write.
    pub(crate) streams: Vec<Stream>,
    /// Listening until the terminal's master arrives.
    pub(crate) console: Option<OwnedFd>,
    /// Set when an earlier shim started it.
    pub(crate) orphan: Option<Orphan>,
    /// Who reads along; after the end those that have not taken everything yet.
    pub(crate) attachments: Vec<Attachment>,
    /// As waitpid has it, once it has ended.
    pub(crate) wait_status: i32,
    log: Option<LogFile>,
    /// Keeps the container's reads blocking instead of ending.
    stdin: Option<File>,
}

impl Run {
    /// Makes the FIFOs and opens the log. The run's directory and its bundle exist already.
    pub(crate) fn prepare(id: u32, start: &Start) -> io::Result<Self> {
        let mut run = Self::new(
            id,
            start.run.clone(),
            Started {
                cgroup: start.cgroup.clone(),
                log_path: start.log_path.clone(),
                tty: start.tty,
                stdin: start.stdin,
                stdin_once: start.stdin_once,
                ..Started::default()
            },
        );
        run.open()?;
        if start.tty {
            let path = run.directory().join(CONSOLE_FILE);
            let _ = fs::remove_file(&path);
            run.console = Some(sys::listen(&path, libc::SOCK_STREAM)?);
        }
        Ok(run)
    }

    /// Takes over what a dead shim left: running, or ended while nobody looked.
    pub(crate) fn adopt(id: u32, name: String, started: Started) -> Self {
        let mut run = Self::new(id, name, started);
        run.phase = Phase::Running;
        // Without its log the container still runs, and blocks when its pipe is full.
        let _ = run.open();
        if let Some(log) = &mut run.log {
            for stream in &mut run.streams {
                stream.recover(log);
            }
        }
        let same = || record::start_ticks(run.started.pid) == Some(run.started.start_ticks);
        // Compared after the open: from here on the descriptor pins the process.
        run.orphan = sys::pidfd(run.started.pid)
            .ok()
            .filter(|_| same())
            .map(|pidfd| Orphan {
                pidfd,
                ended_ms: None,
            });
        run
    }

    /// A run whose exit record is on disk already.
    pub(crate) fn ended(id: u32, name: String, started: Started) -> Self {
        let mut run = Self::new(id, name, started);
        run.phase = Phase::Ended;
        run
    }

    fn new(id: u32, name: String, started: Started) -> Self {
        Self {
            id,
            name,
            phase: Phase::Creating,
            started,
            waiters: Vec::new(),
            streams: Vec::new(),
            console: None,
            orphan: None,
            attachments: Vec::new(),
            wait_status: 0,
            log: None,
            stdin: None,
        }
    }

    /// Relative to the sandbox's directory, which is the working directory.
    pub(crate) fn directory(&self) -> &Path {
        Path::new(&self.name)
    }

    /// Opens the log and this process's ends of the FIFOs.
    ///
    /// Read *and* write: with a writer of our own there is never an end of file, and with the
    /// container's own read side there is never a SIGPIPE, so either process may die and come
    /// back while the other goes on.
    fn open(&mut self) -> io::Result<()> {
        self.log = Some(LogFile::open(Path::new(&self.started.log_path)));
        if self.started.stdin && !self.started.tty {
            let path = self.directory().join(STDIN_FILE);
            sys::ensure_fifo(&path)?;
            self.stdin = Some(open_fifo(&path)?);
        }
        if !self.started.tty {
            for name in [STDOUT_FILE, STDERR_FILE] {
                let path = self.directory().join(name);
                sys::ensure_fifo(&path)?;
                let fd = open_fifo(&path)?.into();
                let spool = Spool::new(path.with_extension("spool"));
                self.add_stream(name, fd, Some(spool));
            }
        }
        Ok(())
    }

    fn add_stream(&mut self, name: &'static str, fd: OwnedFd, spool: Option<Spool>) {
        self.streams.push(Stream {
            name,
            fd,
            partial: PartialLine::default(),
            spool,
        });
    }

    /// The container's side of its three streams, blocking.
    pub(crate) fn child_files(&self) -> io::Result<[File; 3]> {
        let null = || OpenOptions::new().read(true).write(true).open("/dev/null");
        if self.started.tty {
            return Ok([null()?, null()?, null()?]);
        }
        let both = |name| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(self.path(name))
        };
        let stdin = if self.started.stdin {
            // Not blocked by the open: this process holds the other side.
            OpenOptions::new().read(true).open(self.path(STDIN_FILE))?
        } else {
            null()?
        };
        Ok([stdin, both(STDOUT_FILE)?, both(STDERR_FILE)?])
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    /// Accepts the terminal's master from gantry-rt.
    pub(crate) fn take_console(&mut self) {
        let Some(listener) = &self.console else {
            return;
        };
        let Ok(connection) = sys::accept(listener.as_fd()) else {
            return;
        };
        // libcontainer connects and sends at once, but not in one step.
        let mut ready = [libc::pollfd {
            fd: std::os::fd::AsRawFd::as_raw_fd(&connection),
            events: libc::POLLIN,
            revents: 0,
        }];
        sys::poll(&mut ready, 1_000);
        let mut buffer = [0; MESSAGE_BYTES_MAX];
        if let Ok((_, mut fds)) = sys::receive(connection.as_fd(), &mut buffer)
            && let Some(master) = fds.pop()
        {
            sys::set_nonblocking(master.as_fd());
            self.add_stream(STDOUT_FILE, master, None);
            self.console = None;
            let _ = fs::remove_file(self.path(CONSOLE_FILE));
        }
    }

    /// Lets a reader see what the container writes from now on. Returns where stdin is written.
    pub(crate) fn attach(&mut self, attachment: Attachment) -> io::Result<Option<BorrowedFd<'_>>> {
        if self.attachments.len() >= ATTACHMENT_COUNT_MAX {
            return Err(io::Error::other(format!(
                "{ATTACHMENT_COUNT_MAX} clients are attached to {} already",
                self.name
            )));
        }
        self.attachments.push(attachment);
        let master = self.streams.first().map(|stream| stream.fd.as_fd());
        Ok(match self.started.tty {
            true => master.filter(|_| self.started.stdin),
            false => self.stdin.as_ref().map(AsFd::as_fd),
        })
    }

    /// The end of the container's stdin, if it was to have one client only. A terminal has no end.
    pub(crate) fn close_stdin(&mut self) -> io::Result<()> {
        if !self.started.stdin_once || self.stdin.take().is_none() {
            return Ok(());
        }
        // A later shim must not open it again.
        self.started.stdin = false;
        self.started.write(self.directory())
    }

    /// A reader has to take something before this stream is read again.
    pub(crate) fn is_held(&self, stream: &str) -> bool {
        self.attachments.iter().any(|a| a.full(stream))
    }

    /// Drops the attachments for which `keep` is false; returns them as (connection, id).
    pub(crate) fn retain_attachments(
        &mut self,
        mut keep: impl FnMut(&mut Attachment) -> bool,
    ) -> Vec<(u32, u64)> {
        let mut dropped = Vec::new();
        self.attachments.retain_mut(|attachment| {
            let kept = keep(attachment);
            if !kept {
                dropped.push((attachment.connection, attachment.id));
            }
            kept
        });
        dropped
    }

    /// Moves what is there from a stream to the log and the readers; a bounded amount per turn.
    pub(crate) fn pump(&mut self, index: usize, buffer: &mut Buffer) -> Pumped {
        let now_ms = sys::monotonic_ms();
        let (Some(stream), Some(log)) = (self.streams.get_mut(index), self.log.as_mut()) else {
            return Pumped::Empty;
        };
        for _ in 0..READS_PER_TURN {
            match stream.take(log.end(), &mut buffer.0) {
                Ok(n) if n > 0 => {
                    stream.log(log, &buffer.0[..n]);
                    let (name, data) = (stream.name, &buffer.0[..n]);
                    self.attachments.retain_mut(|a| a.offer(name, data, now_ms));
                    // An ended container is read to its end, whoever is slow.
                    if self.phase == Phase::Running && self.attachments.iter().any(|a| a.full(name))
                    {
                        return Pumped::Empty;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Pumped::Empty,
                _ => return Pumped::Gone,
            }
        }
        Pumped::More
    }

    /// [`Self::pump`] from the poll loop: a stream without a future is closed, or it would be
    /// readable, and empty, for ever.
    pub(crate) fn pump_turn(&mut self, index: usize, buffer: &mut Buffer) {
        if self.pump(index, buffer) == Pumped::Gone
            && let Some(log) = self.log.as_mut()
        {
            self.streams.remove(index).finish(log, sys::now_ns());
        }
    }

    /// Goes on in a new log file.
    pub(crate) fn reopen_log(&mut self) -> io::Result<()> {
        self.log.as_mut().map_or(Ok(()), LogFile::reopen)
    }

    /// Init is gone: completes the log, writes the exit record, closes everything. After this
    /// returned, anyone may be told.
    pub(crate) fn end(&mut self, mut exit: Exit, finished_ns: u64, buffer: &mut Buffer) {
        // From here on no reader holds a stream up: `pump` asks for the phase.
        self.phase = Phase::Ended;
        for index in 0..self.streams.len() {
            while self.pump(index, buffer) == Pumped::More {}
        }
        if let Some(mut log) = self.log.take() {
            for stream in &mut self.streams {
                stream.finish(&mut log, finished_ns);
            }
            exit.log_lost_bytes = log.lost_bytes;
        }
        exit.oom_kill_count = cgroup::oom_kill_count(&self.started.cgroup);
        exit.started_ns = self.started.started_ns;
        exit.finished_ns = finished_ns;
        // A full tmpfs leaves no record; the agent then finds `started` without a live process
        // and without `exit`, which it reports as unknown. Nothing better is possible here.
        let _ = exit.write(self.directory());
        self.wait_status = exit.code << 8;
        self.orphan = None;
        self.streams = Vec::new();
        self.stdin = None;
        self.console = None;
    }
}

/// One read buffer for all streams of the process.
pub(crate) struct Buffer(Box<[u8]>);

impl Buffer {
    /// On the heap, and zeroed by the kernel: a page that no output reaches is never there.
    pub(crate) fn new() -> Self {
        Self(vec![0; READ_BYTES].into_boxed_slice())
    }
}

fn open_fifo(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}
