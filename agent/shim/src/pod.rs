//! The shim's state and its one loop.
//!
//! ```text
//!              start                 report: ok <pid> <time>              init reaped, log drained, exit on disk
//! (unknown) ──────────► Creating ───────────────────────────► Running ──────────────────────────► Ended ── forget ──►
//!                          │ report: err, no report, 30 s
//!                          └────────────► cgroup killed, Failed to every waiter, forgotten
//! ```
//! Invariants: an exit record is on disk before anyone is told; a run is never started twice; a
//! pid that is signalled was not reaped yet; nothing here waits for the agent.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use gantry_shim::cgroup;
use gantry_shim::record::{self, Exit, Started};
use gantry_shim::wire::{self, Exec, MESSAGE_BYTES_MAX, Phase, Reply, Request, Start};

use crate::attach::{Attachment, STALL_MS_MAX};
use crate::run::{Buffer, CONSOLE_FILE, ORPHAN_STATUS_WAIT_MS, Orphan, Run};
use crate::sys;

/// gantry-rt must have reported by then: libcontainer's own waits have no timeout.
const HELPER_TIMEOUT_MS: u64 = 30_000;
/// Agents connected at once: one, two during an upgrade.
const CONNECTION_COUNT_MAX: usize = 8;
/// Runs known at once; ended ones count until they are forgotten.
const RUN_COUNT_MAX: usize = 512;
/// Helpers and commands at once, each.
const EXEC_COUNT_MAX: usize = 256;
/// Children reaped before gantry-rt told whose they were.
const REAPED_COUNT_MAX: usize = 512;
/// How often a shim that no agent is connected to looks whether its sandbox is still there.
const ABANDONED_CHECK_MS: u64 = 5_000;
/// A report is one line of JSON.
const REPORT_BYTES_MAX: usize = 12 * 1024;

struct Connection {
    id: u32,
    socket: OwnedFd,
}

enum Purpose {
    /// Create the run of this id.
    Create(u32),
    /// Start a command for a connection's request.
    Exec { connection: u32, id: u64 },
}

/// A gantry-rt at work.
struct Helper {
    pid: i32,
    report: OwnedFd,
    text: Vec<u8>,
    deadline_ms: u64,
    purpose: Purpose,
}

/// A command beside some init.
struct ExecProcess {
    connection: u32,
    id: u64,
    pid: i32,
}

/// Which descriptor a poll entry stands for.
#[derive(Clone, Copy)]
enum Source {
    Signal,
    Listener,
    Connection(u32),
    Report(i32),
    Stream(u32, usize),
    Console(u32),
    Orphan(u32),
    /// Some reader of the run can take more.
    Reader(u32),
}

/// One pod's shim.
pub(crate) struct Pod {
    rt: PathBuf,
    signals: OwnedFd,
    listener: OwnedFd,
    connections: Vec<Connection>,
    runs: Vec<Run>,
    helpers: Vec<Helper>,
    execs: Vec<ExecProcess>,
    /// Ended children whose owner is not known yet: (pid, wait status, time). Only kept while a
    /// helper is at work, because only then may a report about one of them still come.
    reaped: VecDeque<(i32, i32, u64)>,
    next_id: u32,
    buffer: Buffer,
    message: Box<[u8]>,
    shut_down: bool,
}

impl Pod {
    /// Takes over what an earlier shim left in the working directory.
    pub(crate) fn new(rt: PathBuf, signals: OwnedFd, listener: OwnedFd) -> Self {
        let mut pod = Self {
            rt,
            signals,
            listener,
            connections: Vec::new(),
            runs: Vec::new(),
            helpers: Vec::new(),
            execs: Vec::new(),
            reaped: VecDeque::new(),
            next_id: 0,
            buffer: Buffer::new(),
            message: vec![0; MESSAGE_BYTES_MAX].into_boxed_slice(),
            shut_down: false,
        };
        pod.adopt();
        pod
    }

    /// Serves until told to shut down. `settle` runs once, after the first greeting and before any
    /// request: a move between cgroups waits for a grace period of the kernel (6 ms measured), and
    /// the agent has other work in that time.
    pub(crate) fn serve(&mut self, settle: impl FnOnce()) {
        let mut settle = Some(settle);
        let mut sources = Vec::new();
        let mut fds = Vec::new();
        while !self.shut_down {
            self.list_sources(&mut sources, &mut fds);
            sys::poll(&mut fds, self.timeout_ms());
            // Reports before children: then a reaped pid usually has its owner already.
            for (source, fd) in sources.iter().zip(&fds) {
                if fd.revents != 0
                    && let Source::Report(pid) = source
                {
                    self.read_report(*pid);
                }
            }
            for (source, fd) in sources.iter().zip(&fds) {
                if fd.revents != 0 {
                    self.handle(*source);
                }
            }
            // A connection's first request is read in the next turn at the earliest.
            if !self.connections.is_empty()
                && let Some(settle) = settle.take()
            {
                settle();
            }
            self.check_deadlines();
        }
    }

    fn list_sources(&self, sources: &mut Vec<Source>, fds: &mut Vec<libc::pollfd>) {
        sources.clear();
        fds.clear();
        let mut watch = |source, fd: &OwnedFd, events| {
            sources.push(source);
            fds.push(libc::pollfd {
                fd: fd.as_raw_fd(),
                events,
                revents: 0,
            });
        };
        for run in &self.runs {
            for pipe in run.attachments.iter().flat_map(Attachment::waiting) {
                watch(Source::Reader(run.id), pipe, libc::POLLOUT);
            }
        }
        let mut add = |source, fd: &OwnedFd| watch(source, fd, libc::POLLIN);
        add(Source::Signal, &self.signals);
        if self.connections.len() < CONNECTION_COUNT_MAX {
            add(Source::Listener, &self.listener);
        }
        for connection in &self.connections {
            add(Source::Connection(connection.id), &connection.socket);
        }
        for helper in &self.helpers {
            add(Source::Report(helper.pid), &helper.report);
        }
        for run in &self.runs {
            for (index, stream) in run.streams.iter().enumerate() {
                if !run.is_held(stream.name) {
                    add(Source::Stream(run.id, index), &stream.fd);
                }
            }
            if let Some(console) = &run.console {
                add(Source::Console(run.id), console);
            }
            if let Some(Orphan {
                pidfd,
                ended_ms: None,
            }) = &run.orphan
            {
                add(Source::Orphan(run.id), pidfd);
            }
        }
    }

    fn timeout_ms(&self) -> i32 {
        let now = sys::monotonic_ms();
        let helper = self
            .helpers
            .iter()
            .map(|h| h.deadline_ms.saturating_sub(now))
            .min();
        let ended = |run: &Run| run.orphan.as_ref().is_some_and(|o| o.ended_ms.is_some());
        // Whoever reaps an orphan does so in an instant, or never.
        let orphan = self.runs.iter().any(ended).then_some(20);
        let readers = self.runs.iter().flat_map(|run| &run.attachments);
        let stalled = readers
            .filter_map(Attachment::deadline_ms)
            .map(|ms| ms.saturating_sub(now));
        let alone = self.connections.is_empty().then_some(ABANDONED_CHECK_MS);
        helper
            .into_iter()
            .chain(orphan)
            .chain(stalled)
            .chain(alone)
            .min()
            .map_or(-1, |ms| ms.min(60_000) as i32 + 1)
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Signal => self.reap(),
            Source::Listener => self.accept(),
            Source::Connection(id) => self.receive(id),
            Source::Report(_) => {}
            Source::Stream(id, index) => {
                if let Some(run) = self.runs.iter_mut().find(|r| r.id == id) {
                    run.pump_turn(index, &mut self.buffer);
                }
            }
            Source::Reader(id) => self.retry_readers(Some(id)),
            Source::Console(id) => {
                if let Some(run) = self.runs.iter_mut().find(|r| r.id == id) {
                    run.take_console();
                }
            }
            Source::Orphan(id) => {
                if let Some(run) = self.runs.iter_mut().find(|r| r.id == id)
                    && let Some(orphan) = &mut run.orphan
                {
                    orphan.ended_ms = Some(sys::monotonic_ms());
                }
            }
        }
    }

    // ---- agents -------------------------------------------------------------------------------

    fn accept(&mut self) {
        let Ok(socket) = sys::accept(self.listener.as_fd()) else {
            return;
        };
        let id = self.new_id();
        self.connections.push(Connection { id, socket });
        for run in &self.runs {
            let reply = Reply::Run {
                run: run.name.clone(),
                phase: run.phase,
                pid: if run.phase == Phase::Running {
                    run.started.pid
                } else {
                    0
                },
                started_ns: run.started.started_ns,
            };
            send(&self.connections, id, &reply);
        }
        let ready = Reply::Ready {
            version: wire::VERSION,
        };
        send(&self.connections, id, &ready);
    }

    fn receive(&mut self, connection: u32) {
        let Some(peer) = self.connections.iter().find(|c| c.id == connection) else {
            return;
        };
        match sys::receive(peer.socket.as_fd(), &mut self.message) {
            Ok((length, fds)) if length > 0 => match Request::decode(&self.message[..length]) {
                Ok((id, request)) => self.answer(connection, id, request, fds),
                // Without an id there is nobody to answer; an agent that talks nonsense is cut
                // off and finds the truth on its next connect.
                Err(_) => self.disconnect(connection),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => self.disconnect(connection),
        }
    }

    /// The commands of an agent that has gone have lost their streams: they end with it.
    fn disconnect(&mut self, connection: u32) {
        self.connections.retain(|c| c.id != connection);
        for command in self.execs.iter().filter(|c| c.connection == connection) {
            let _ = sys::kill(command.pid, libc::SIGKILL);
        }
        for run in &mut self.runs {
            run.attachments.retain(|a| a.connection != connection);
        }
    }

    fn answer(&mut self, connection: u32, id: u64, request: Request, fds: Vec<OwnedFd>) {
        let result = match request {
            Request::Start(start) => match self.start(connection, id, &start) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Request::Exec(exec) => match self.exec(connection, id, &exec, fds) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Request::Attach { run } => match self.attach(connection, id, &run, fds) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Request::CloseStdin { run } => match self.runs.iter_mut().find(|r| r.name == run) {
                Some(run) => run.close_stdin(),
                None => Ok(()),
            },
            Request::Signal { run, signal } => self.signal(&run, signal),
            Request::KillExec { exec } => {
                for run in &mut self.runs {
                    run.attachments
                        .retain(|a| (a.connection, a.id) != (connection, exec));
                }
                let command = self
                    .execs
                    .iter()
                    .find(|c| c.connection == connection && c.id == exec);
                command.map_or(Ok(()), |c| sys::kill(c.pid, libc::SIGKILL))
            }
            Request::ReopenLog { run } => match self.runs.iter_mut().find(|r| r.name == run) {
                Some(run) => run.reopen_log(),
                None => Err(io::Error::other(format!("no container run {run}"))),
            },
            Request::Forget { run } => self.forget(&run),
            Request::ShutDown => self.end_if_idle(),
        };
        let reply = match result {
            Ok(()) => Reply::Done { id },
            Err(error) => Reply::Failed {
                id,
                report: error.to_string(),
            },
        };
        send(&self.connections, connection, &reply);
    }

    fn attach(
        &mut self,
        connection: u32,
        id: u64,
        name: &str,
        fds: Vec<OwnedFd>,
    ) -> io::Result<()> {
        let [stdout, stderr]: [OwnedFd; 2] = fds
            .try_into()
            .map_err(|_| io::Error::other("an attachment needs 2 descriptors"))?;
        let running = |r: &&mut Run| r.name == name && r.phase == Phase::Running;
        let Some(run) = self.runs.iter_mut().find(running) else {
            return Err(io::Error::other(format!(
                "container run {name} is not running"
            )));
        };
        let stdin = run.attach(Attachment::new(connection, id, stdout, stderr))?;
        let reply = Reply::Attached { id }.encode();
        if let Some(peer) = self.connections.iter().find(|c| c.id == connection)
            && sys::send(peer.socket.as_fd(), &reply, stdin).is_err()
        {
            sys::hang_up(peer.socket.as_fd());
        }
        Ok(())
    }

    /// Gives readers what they did not take; tells those who are done with an ended container, and
    /// those who were too slow.
    fn retry_readers(&mut self, only: Option<u32>) {
        let now_ms = sys::monotonic_ms();
        for run in &mut self.runs {
            if run.attachments.is_empty() || only.is_some_and(|id| id != run.id) {
                continue;
            }
            for (connection, id) in run.retain_attachments(|a| a.retry(now_ms)) {
                let report = format!(
                    "the output was not read for {} s: the container goes on without this reader",
                    STALL_MS_MAX / 1000
                );
                send(&self.connections, connection, &Reply::Failed { id, report });
            }
            if run.phase == Phase::Ended {
                let wait_status = run.wait_status;
                for (connection, id) in run.retain_attachments(|a| a.waiting().next().is_some()) {
                    let reply = Reply::ExecExited { id, wait_status };
                    send(&self.connections, connection, &reply);
                }
            }
        }
    }

    fn signal(&self, name: &str, signal: i32) -> io::Result<()> {
        let Some(run) = self.runs.iter().find(|r| r.name == name) else {
            return Err(io::Error::other(format!("no container run {name}")));
        };
        match (run.phase, &run.orphan) {
            // An orphan's pid may have been reaped by its new parent: the pidfd may not lie.
            (Phase::Running, Some(orphan)) => sys::pidfd_signal(orphan.pidfd.as_fd(), signal),
            (Phase::Running, None) => sys::kill(run.started.pid, signal),
            (Phase::Creating, _) => Err(io::Error::other(format!(
                "container run {name} is still being created"
            ))),
            (Phase::Ended, _) => Ok(()),
        }
    }

    fn forget(&mut self, name: &str) -> io::Result<()> {
        if let Some(index) = self.runs.iter().position(|r| r.name == name) {
            if self.runs[index].phase != Phase::Ended {
                return Err(io::Error::other(format!(
                    "container run {name} has not ended"
                )));
            }
            self.runs.swap_remove(index);
        }
        Ok(())
    }

    fn end_if_idle(&mut self) -> io::Result<()> {
        if let Some(run) = self.runs.iter().find(|r| r.phase != Phase::Ended) {
            return Err(io::Error::other(format!(
                "container run {} has not ended",
                run.name
            )));
        }
        self.shut_down = true;
        Ok(())
    }

    // ---- containers and commands --------------------------------------------------------------

    fn start(&mut self, connection: u32, id: u64, start: &Start) -> io::Result<()> {
        if let Some(run) = self.runs.iter_mut().find(|r| r.name == start.run) {
            match run.phase {
                Phase::Creating => run.waiters.push((connection, id)),
                Phase::Running | Phase::Ended => {
                    let reply = Reply::Started {
                        id,
                        pid: run.started.pid,
                        started_ns: run.started.started_ns,
                    };
                    send(&self.connections, connection, &reply);
                }
            }
            return Ok(());
        }
        if self.runs.len() >= RUN_COUNT_MAX {
            return Err(io::Error::other(format!(
                "the shim holds {RUN_COUNT_MAX} runs already"
            )));
        }
        let run_id = self.new_id();
        let mut run = Run::prepare(run_id, start)?;
        let root = std::env::current_dir()?.join(&start.run);
        let mut command = Command::new(&self.rt);
        command
            .arg("create")
            .arg("--root")
            .arg(&root)
            .arg("--bundle")
            .arg(&root);
        if !start.seccomp_path.is_empty() {
            command.arg("--seccomp").arg(&start.seccomp_path);
        }
        if start.tty {
            command.arg("--console").arg(root.join(CONSOLE_FILE));
        }
        let [stdin, stdout, stderr] = run.child_files()?;
        command.stdin(stdin).stdout(stdout).stderr(stderr);
        self.spawn_helper(command, Purpose::Create(run_id))?;
        run.waiters.push((connection, id));
        self.runs.push(run);
        Ok(())
    }

    fn exec(&mut self, connection: u32, id: u64, exec: &Exec, fds: Vec<OwnedFd>) -> io::Result<()> {
        let running = |r: &&Run| r.name == exec.run && r.phase == Phase::Running;
        if self.runs.iter().find(running).is_none() {
            return Err(io::Error::other(format!(
                "container run {} is not running",
                exec.run
            )));
        }
        if self.helpers.len() + self.execs.len() >= EXEC_COUNT_MAX {
            return Err(io::Error::other(format!(
                "{EXEC_COUNT_MAX} commands run already"
            )));
        }
        let root = std::env::current_dir()?.join(&exec.run);
        let mut command = Command::new(&self.rt);
        command
            .arg("exec")
            .arg("--root")
            .arg(&root)
            .arg("--bundle")
            .arg(&root);
        command.arg("--process").arg(&exec.process_path);
        if !exec.seccomp_path.is_empty() {
            command.arg("--seccomp").arg(&exec.seccomp_path);
        }
        if exec.console_path.is_empty() {
            let [stdin, stdout, stderr]: [OwnedFd; 3] = fds
                .try_into()
                .map_err(|_| io::Error::other("an exec without a terminal needs 3 descriptors"))?;
            command.stdin(stdin).stdout(stdout).stderr(stderr);
        } else {
            command.arg("--console").arg(&exec.console_path);
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
        }
        self.spawn_helper(command, Purpose::Exec { connection, id })
    }

    fn spawn_helper(&mut self, mut command: Command, purpose: Purpose) -> io::Result<()> {
        let (report, theirs) = sys::pipe()?;
        let (own, report_fd) = (std::process::id() as i32, theirs.as_raw_fd());
        // SAFETY: the closure makes async-signal-safe calls only.
        unsafe { command.pre_exec(move || sys::prepare_child(own, report_fd)) };
        // Dropping the handle does not wait: the SIGCHLD loop reaps every child.
        let child = command.spawn().map_err(|error| {
            io::Error::other(format!("cannot run {}: {error}", self.rt.display()))
        })?;
        self.helpers.push(Helper {
            pid: child.id() as i32,
            report,
            text: Vec::new(),
            deadline_ms: sys::monotonic_ms() + HELPER_TIMEOUT_MS,
            purpose,
        });
        Ok(())
    }

    /// Takes what gantry-rt has written; a whole line settles the matter.
    fn read_report(&mut self, pid: i32) {
        let Some(index) = self.helpers.iter().position(|h| h.pid == pid) else {
            return;
        };
        let helper = &mut self.helpers[index];
        let mut part = [0; 1024];
        while let Ok(n) = sys::read(helper.report.as_fd(), &mut part) {
            if n == 0 {
                break;
            }
            helper.text.extend_from_slice(&part[..n]);
            helper.text.truncate(REPORT_BYTES_MAX);
        }
        if helper.text.ends_with(b"\n") || helper.text.len() == REPORT_BYTES_MAX {
            let helper = self.helpers.remove(index);
            let text = String::from_utf8_lossy(&helper.text).into_owned();
            self.settle(helper.purpose, text.trim_end());
        }
    }

    /// `ok <pid> <started_ns>`, or `err <JSON>`.
    fn settle(&mut self, purpose: Purpose, report: &str) {
        let mut words = report.split(' ');
        let ok = (words.next() == Some("ok"))
            .then(|| Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?)))
            .flatten();
        let reason = report.strip_prefix("err ").unwrap_or(report);
        match (purpose, ok) {
            (Purpose::Create(id), Some((pid, started_ns))) => self.created(id, pid, started_ns),
            (Purpose::Create(id), None) => self.create_failed(id, reason),
            (Purpose::Exec { connection, id }, Some((pid, _))) => {
                self.exec_started(connection, id, pid);
            }
            (Purpose::Exec { connection, id }, None) => {
                let reply = Reply::Failed {
                    id,
                    report: reason.to_owned(),
                };
                send(&self.connections, connection, &reply);
            }
        }
        self.forget_reaped();
    }

    fn created(&mut self, id: u32, pid: i32, started_ns: u64) {
        let Some(run) = self.runs.iter_mut().find(|r| r.id == id) else {
            return;
        };
        run.phase = Phase::Running;
        run.started.pid = pid;
        run.started.started_ns = started_ns;
        // 0 for one that has ended already: its exit record follows at once.
        run.started.start_ticks = record::start_ticks(pid).unwrap_or(0);
        let written = run.started.write(run.directory());
        for (connection, id) in std::mem::take(&mut run.waiters) {
            let reply = match &written {
                Ok(()) => Reply::Started {
                    id,
                    pid,
                    started_ns,
                },
                Err(error) => Reply::Failed {
                    id,
                    report: format!("cannot write {}/started: {error}", run.name),
                },
            };
            send(&self.connections, connection, &reply);
        }
        if let Some((_, status, time_ns)) = take_reaped(&mut self.reaped, pid) {
            self.end(id, Exit::from_wait_status(status), time_ns);
        }
    }

    fn create_failed(&mut self, id: u32, reason: &str) {
        let Some(index) = self.runs.iter().position(|r| r.id == id) else {
            return;
        };
        let run = self.runs.swap_remove(index);
        // What libcontainer left behind; the agent removes the cgroup once it is empty.
        cgroup::kill_members(&run.started.cgroup);
        for (connection, id) in run.waiters {
            let report = reason.to_owned();
            send(&self.connections, connection, &Reply::Failed { id, report });
        }
    }

    fn exec_started(&mut self, connection: u32, id: u64, pid: i32) {
        send(
            &self.connections,
            connection,
            &Reply::ExecStarted { id, pid },
        );
        if let Some((_, wait_status, _)) = take_reaped(&mut self.reaped, pid) {
            send(
                &self.connections,
                connection,
                &Reply::ExecExited { id, wait_status },
            );
            return;
        }
        if !self.connections.iter().any(|c| c.id == connection) {
            let _ = sys::kill(pid, libc::SIGKILL);
        }
        self.execs.push(ExecProcess {
            connection,
            id,
            pid,
        });
    }

    // ---- ends ---------------------------------------------------------------------------------

    fn reap(&mut self) {
        // signalfd merges signals: read it empty, then look at every child.
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        while sys::read(self.signals.as_fd(), &mut info).is_ok() {}
        while let Some((pid, status)) = sys::reap() {
            self.reaped(pid, status, sys::now_ns());
        }
        self.forget_reaped();
    }

    fn reaped(&mut self, pid: i32, status: i32, time_ns: u64) {
        let init =
            |r: &&Run| r.phase == Phase::Running && r.started.pid == pid && r.orphan.is_none();
        if let Some(id) = self.runs.iter().find(init).map(|r| r.id) {
            self.end(id, Exit::from_wait_status(status), time_ns);
        } else if let Some(index) = self.execs.iter().position(|c| c.pid == pid) {
            let command = self.execs.swap_remove(index);
            let reply = Reply::ExecExited {
                id: command.id,
                wait_status: status,
            };
            send(&self.connections, command.connection, &reply);
        } else if self.helpers.iter().any(|h| h.pid == pid) {
            self.read_report(pid);
            // Still there: it ended without a whole line.
            if let Some(index) = self.helpers.iter().position(|h| h.pid == pid) {
                let helper = self.helpers.remove(index);
                let text = String::from_utf8_lossy(&helper.text);
                let how = Exit::from_wait_status(status).code;
                let reason = format!("err gantry-rt ended ({how}) without a report {text:?}");
                self.settle(helper.purpose, &reason);
            }
        } else {
            if self.reaped.len() == REAPED_COUNT_MAX {
                self.reaped.pop_front();
            }
            self.reaped.push_back((pid, status, time_ns));
        }
    }

    /// With no report to come, nobody will ask for these any more.
    fn forget_reaped(&mut self) {
        if self.helpers.is_empty() {
            self.reaped.clear();
        }
    }

    fn end(&mut self, id: u32, exit: Exit, time_ns: u64) {
        let Some(run) = self.runs.iter_mut().find(|r| r.id == id) else {
            return;
        };
        run.end(exit, time_ns, &mut self.buffer);
        let reply = Reply::Exited {
            run: run.name.clone(),
        };
        for connection in &self.connections {
            send(&self.connections, connection.id, &reply);
        }
        self.retry_readers(Some(id));
    }

    fn check_deadlines(&mut self) {
        let now_ms = sys::monotonic_ms();
        while let Some(index) = self.helpers.iter().position(|h| h.deadline_ms <= now_ms) {
            let helper = self.helpers.remove(index);
            let _ = sys::kill(helper.pid, libc::SIGKILL);
            if let Purpose::Exec { .. } = helper.purpose {
                self.kill_strays();
            }
            let seconds = HELPER_TIMEOUT_MS / 1000;
            let reason = format!("err gantry-rt did not finish within {seconds} s and was killed");
            self.settle(helper.purpose, &reason);
        }
        self.retry_readers(None);
        self.check_orphans(now_ms);
        self.check_sandbox();
    }

    /// A sandbox that is removed while its shim is being started leaves nobody who could end it.
    fn check_sandbox(&mut self) {
        let alone = self.connections.is_empty() && self.helpers.is_empty();
        if alone && self.runs.iter().all(|r| r.phase == Phase::Ended) {
            self.shut_down |= std::fs::metadata(".").is_ok_and(|m| m.nlink() == 0);
        }
    }

    /// A libcontainer process that hangs between clone and exec is a child of this process with
    /// libcontainer's own name; a create's are in its cgroup, which is killed as a whole.
    fn kill_strays(&self) {
        let own = std::process::id();
        let path = format!("/proc/{own}/task/{own}/children");
        let children = std::fs::read_to_string(path).unwrap_or_default();
        for pid in children
            .split_ascii_whitespace()
            .filter_map(|p| p.parse::<i32>().ok())
        {
            let known = self.runs.iter().any(|r| r.started.pid == pid)
                || self.execs.iter().any(|c| c.pid == pid)
                || self.helpers.iter().any(|h| h.pid == pid);
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if !known && name.starts_with("youki:[") {
                let _ = sys::kill(pid, libc::SIGKILL);
            }
        }
    }

    fn check_orphans(&mut self, now_ms: u64) {
        let mut ended = Vec::new();
        for run in &self.runs {
            if let Some(orphan) = &run.orphan
                && let Some(since_ms) = orphan.ended_ms
            {
                let status = sys::pidfd_exit_status(orphan.pidfd.as_fd());
                if status.is_some() || now_ms >= since_ms + ORPHAN_STATUS_WAIT_MS {
                    ended.push((run.id, status));
                }
            }
        }
        for (id, status) in ended {
            let exit = status.map_or_else(Exit::lost, Exit::from_wait_status);
            self.end(id, exit, sys::now_ns());
        }
    }

    // ---- taking over --------------------------------------------------------------------------

    fn adopt(&mut self) {
        for (name, started) in records(Path::new(".")) {
            let id = self.new_id();
            let ended = Exit::read(Path::new(&name)).ok().flatten().is_some();
            if ended {
                self.runs.push(Run::ended(id, name, started));
                continue;
            }
            let run = Run::adopt(id, name, started);
            let alive = run.orphan.is_some();
            self.runs.push(run);
            if !alive {
                self.end(id, Exit::lost(), sys::now_ns());
            }
        }
    }

    fn new_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id
    }
}

/// Every `<container>/<attempt>` with a `started` record.
fn records(sandbox: &Path) -> Vec<(String, Started)> {
    let mut found = Vec::new();
    let names = |path: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries
            .filter_map(|e| e.file_name().into_string().ok())
            .collect()
    };
    for container in names(sandbox) {
        for attempt in names(&sandbox.join(&container)) {
            let name = format!("{container}/{attempt}");
            if wire::is_run(&name)
                && let Ok(Some(started)) = Started::read(&sandbox.join(&name))
            {
                found.push((name, started));
            }
        }
    }
    found
}

fn take_reaped(reaped: &mut VecDeque<(i32, i32, u64)>, pid: i32) -> Option<(i32, i32, u64)> {
    // The newest of that number: an older one may be a former process of the same pid.
    let index = reaped.iter().rposition(|(p, ..)| *p == pid)?;
    reaped.remove(index)
}

/// An agent that does not read loses messages, not time: it reads the records when it comes back.
/// Its connection is found broken by the next receive.
fn send(connections: &[Connection], id: u32, reply: &Reply) {
    if let Some(connection) = connections.iter().find(|c| c.id == id)
        && sys::send(connection.socket.as_fd(), &reply.encode(), None).is_err()
    {
        sys::hang_up(connection.socket.as_fd());
    }
}
