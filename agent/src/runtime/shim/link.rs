//! One connection to one shim: requests with answers, and what it says unasked.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use gantry_shim::wire::{MESSAGE_BYTES_MAX, Phase, Reply, Request, SOCKET_FILE};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    connect, recvmsg, sendmsg, socket,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use crate::runtime::RuntimeError;

/// A shim answers at once, except that gantry-rt has 30 s: then the shim says so itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(40);

/// A shim's positive answer.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    /// Where the container's stdin is written, if it has one.
    Attached(Option<OwnedFd>),
    /// Init was let go then, in nanoseconds since 1970.
    Started(u64),
    ExecStarted,
}

/// What a shim says without being asked, plus the end of its greeting.
#[derive(Debug)]
pub(super) enum News {
    /// All runs it knows were told.
    Ready,
    /// The run's exit record is on disk.
    Exited(String),
}

type Waiter = oneshot::Sender<Result<Answer, String>>;

/// A connected shim. Requests may be made at the same time by many tasks.
pub(super) struct Link {
    socket: AsyncFd<OwnedFd>,
    next_id: AtomicU64,
    waiting: Mutex<HashMap<u64, Waiter>>,
    execs: Mutex<HashMap<u64, oneshot::Sender<i32>>>,
    /// As of the greeting: only what was being created then matters.
    runs: Mutex<HashMap<String, Phase>>,
}

impl Link {
    /// Connects to the shim of a sandbox, if one listens.
    pub(super) fn connect(sandbox: &Path) -> io::Result<Self> {
        // By way of a descriptor: a socket's path is limited to 107 bytes.
        let directory = std::fs::File::open(sandbox)?;
        let path = format!("/proc/self/fd/{}/{SOCKET_FILE}", directory.as_raw_fd());
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path.as_str())?)?;
        Ok(Self {
            socket: register(socket)?,
            next_id: AtomicU64::new(1),
            waiting: Mutex::default(),
            execs: Mutex::default(),
            runs: Mutex::default(),
        })
    }

    /// The next piece of news; answers are handed to whoever waits for them on the way.
    ///
    /// Cancel safe: a message is taken from the socket and dispatched without a suspension.
    pub(super) async fn news(&self) -> io::Result<News> {
        loop {
            let mut ready = self.socket.readable().await?;
            let (reply, fds) = match ready.try_io(|fd| receive_reply(fd.as_raw_fd())) {
                Ok(result) => result?,
                Err(_would_block) => continue,
            };
            if let Some(news) = self.dispatch(reply, fds) {
                return Ok(news);
            }
        }
    }

    fn dispatch(&self, reply: Reply, mut fds: Vec<OwnedFd>) -> Option<News> {
        let (id, answer) = match reply {
            Reply::Run { run, phase, .. } => {
                lock(&self.runs).insert(run, phase);
                return None;
            }
            Reply::Ready { .. } => return Some(News::Ready),
            Reply::Exited { run } => return Some(News::Exited(run)),
            Reply::ExecExited { id, wait_status } => {
                if let Some(exec) = lock(&self.execs).remove(&id) {
                    let _ = exec.send(wait_status);
                }
                return None;
            }
            Reply::Started { id, started_ns, .. } => (id, Ok(Answer::Started(started_ns))),
            Reply::ExecStarted { id, .. } => (id, Ok(Answer::ExecStarted)),
            Reply::Attached { id } => (id, Ok(Answer::Attached(fds.pop()))),
            Reply::Done { id } => (id, Ok(Answer::Done)),
            Reply::Failed { id, report } => (id, Err(report)),
        };
        if answer.is_err() {
            lock(&self.execs).remove(&id);
        }
        if let Some(waiter) = lock(&self.waiting).remove(&id) {
            // A caller that went away does not want it any more.
            let _ = waiter.send(answer);
        }
        None
    }

    /// Ends every wait: the shim has gone.
    pub(super) fn fail_all(&self) {
        lock(&self.waiting).clear();
        lock(&self.execs).clear();
    }

    /// The runs named in the greeting.
    pub(super) fn greeted_runs(&self) -> Vec<(String, Phase)> {
        lock(&self.runs)
            .iter()
            .map(|(run, phase)| (run.clone(), *phase))
            .collect()
    }

    /// Whether the shim was creating this run when we connected.
    pub(super) fn was_creating(&self, run: &str) -> bool {
        lock(&self.runs).get(run) == Some(&Phase::Creating)
    }

    /// Asks and waits for the answer. The inner error is the shim's or gantry-rt's report.
    pub(super) async fn ask(
        &self,
        request: &Request,
        fds: &[RawFd],
    ) -> Result<Result<Answer, String>, RuntimeError> {
        let id = self.new_id();
        self.ask_as(id, request, fds).await
    }

    /// A number for a request: an exec is named by it afterwards.
    pub(super) fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Resolves when the exec of this request id was reaped, or the container that was attached to
    /// has ended; an error means that neither will be told. Call before asking.
    pub(super) fn expect_exec_exit(&self, id: u64) -> oneshot::Receiver<i32> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.execs).insert(id, sender);
        receiver
    }

    pub(super) async fn ask_as(
        &self,
        id: u64,
        request: &Request,
        fds: &[RawFd],
    ) -> Result<Result<Answer, String>, RuntimeError> {
        let message = request.encode(id);
        if message.len() > MESSAGE_BYTES_MAX {
            return Err(RuntimeError::Shim(format!(
                "a request of {} bytes is longer than the shim takes ({MESSAGE_BYTES_MAX})",
                message.len()
            )));
        }
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting).insert(id, sender);
        let lost = || RuntimeError::Shim("the shim has gone; it is being replaced".into());
        if self.send(&message, fds).await.is_err() {
            lock(&self.waiting).remove(&id);
            return Err(lost());
        }
        match tokio::time::timeout(ANSWER_TIMEOUT, receiver).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_closed)) => Err(lost()),
            Err(_elapsed) => {
                lock(&self.waiting).remove(&id);
                let seconds = ANSWER_TIMEOUT.as_secs();
                Err(RuntimeError::Shim(format!(
                    "the shim did not answer within {seconds} s"
                )))
            }
        }
    }

    async fn send(&self, message: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        loop {
            let mut ready = self.socket.writable().await?;
            let sent = ready.try_io(|fd| {
                let parts = [IoSlice::new(message)];
                let flags = MsgFlags::MSG_NOSIGNAL;
                sendmsg::<()>(fd.as_raw_fd(), &parts, control, flags, None).map_err(io::Error::from)
            });
            match sent {
                Ok(result) => return result.map(|_| ()),
                Err(_would_block) => {}
            }
        }
    }
}

/// A descriptor of our own in tokio's care.
pub(crate) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd always names the same open file until it is dropped, which is after the
    // AsyncFd around it has deregistered.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// The buffer is on the stack: every pod's link waits for news all its life, and would keep it.
fn receive_reply(socket: RawFd) -> io::Result<(Reply, Vec<OwnedFd>)> {
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    let (length, fds) = receive(socket, &mut buffer)?;
    if length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let reply = Reply::decode(&buffer[..length]).map_err(io::Error::other)?;
    Ok((reply, fds))
}

/// One datagram and the descriptors that came with it.
pub(crate) fn receive(socket: RawFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; 3]);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just installed these descriptors for this message.
            fds.extend(
                received
                    .into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    Ok((message.bytes, fds))
}

/// A panic elsewhere leaves these maps whole: every change is one call.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
