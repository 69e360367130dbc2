//! The resolver's sockets, kept by a process that outlives the agent (`agent/shim/src/hold.rs`).
//!
//! ```text
//! start   connect, or start gantry-shim hold ─► list, take: what an earlier agent listened on
//! run     keep each new socket ─► holder dies ─► start another, keep everything again
//! killed  the holder has them, and stands in ─► the next agent's start
//! ```
//! A closed port refuses at once, and a client then has no name at all. The agent has the same sockets
//! open itself, so that the holder's death is no gap either: only both dying within the same
//! milliseconds is.
//!
//! Decided against: the whole resolver as a process of its own. It would hold every Service a second
//! time in memory, all the time, for what is needed while the agent is absent. A file that is read
//! then costs nothing before.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gantry_shim::wire::{MESSAGE_BYTES_MAX, SOCKET_FILE};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use crate::paths::Paths;
use crate::runtime::shim::{receive, register, wait_for_shim_end};

/// The holder answers at once: it does nothing else.
const ANSWER_TIMEOUT_S: i64 = 2;
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Another holder is in charge: connect to that one.
const EXIT_TAKEN: i32 = 3;

/// A socket in the care of both.
pub(super) type Shared = Arc<dyn AsFd + Send + Sync>;

/// Where the holder lives.
#[derive(Clone, Debug)]
pub struct HoldConfig {
    /// `/run/gantry/resolver`: its socket and lock, and the queries in work.
    pub directory: PathBuf,
    /// The program `gantry-shim`.
    pub shim: PathBuf,
}

impl HoldConfig {
    /// The node's.
    pub fn standard(paths: &Paths) -> Self {
        Self {
            directory: paths.run.join("resolver"),
            shim: paths.bin.join("gantry-shim"),
        }
    }
}

/// What is kept, by name, and the connection to who keeps it.
pub(super) struct Holder {
    config: HoldConfig,
    link: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    kept: Mutex<BTreeMap<String, Shared>>,
}

impl Holder {
    /// Connects, starting a holder if there is none; with what an earlier agent left in its care.
    /// Where that fails it is tried again while the agent runs: names are answered all the same.
    pub(super) async fn open(config: HoldConfig) -> (Arc<Self>, BTreeMap<String, OwnedFd>) {
        let (link, found) = match Self::reach(config.clone()).await {
            Ok((link, found)) => (Some(link), found),
            Err(error) => {
                tracing::warn!(%error, "queries would not survive this agent: no holder of their sockets");
                (None, BTreeMap::new())
            }
        };
        let holder = Self {
            config,
            link: Mutex::new(link),
            kept: Mutex::default(),
        };
        (Arc::new(holder), found)
    }

    async fn reach(
        config: HoldConfig,
    ) -> io::Result<(Arc<AsyncFd<OwnedFd>>, BTreeMap<String, OwnedFd>)> {
        let reached = tokio::task::spawn_blocking(move || {
            let link = dial_or_start(&config)?;
            let found = take_all(&link)?;
            fcntl(&link, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            io::Result::Ok((link, found))
        });
        let (link, found) = reached.await.map_err(io::Error::other)??;
        Ok((Arc::new(register(link)?), found))
    }

    /// Has `socket` outlive this process under that name.
    pub(super) async fn keep(&self, name: String, socket: Shared) {
        lock(&self.kept).insert(name.clone(), socket.clone());
        self.tell("keep", &name, Some(&socket)).await;
    }

    /// Lets go of it.
    pub(super) async fn forget(&self, name: &str) {
        lock(&self.kept).remove(name);
        self.tell("drop", name, None).await;
    }

    /// A holder that cannot be told has died: the next one is told everything.
    async fn tell(&self, verb: &str, name: &str, socket: Option<&Shared>) {
        let link = lock(&self.link).clone();
        if let Some(link) = link
            && let Err(error) = send(&link, &format!("{verb}\0{name}"), socket).await
        {
            tracing::debug!(%error, verb, name, "the holder of the resolver's sockets");
        }
    }

    /// Replaces a holder that dies, until `shutdown`.
    pub(super) async fn follow(self: Arc<Self>, shutdown: CancellationToken) {
        // Cancel-safe: what is half told is told again, by this agent or by the next.
        shutdown.run_until_cancelled(self.replace()).await;
    }

    async fn replace(&self) {
        let mut retry = RETRY_MIN;
        loop {
            let link = lock(&self.link).clone();
            if let Some(link) = link {
                gone(&link).await;
                *lock(&self.link) = None;
                tracing::info!("the holder of the resolver's sockets has gone: starting another");
            }
            match Self::reach(self.config.clone()).await {
                Ok((link, _)) => {
                    retry = RETRY_MIN;
                    *lock(&self.link) = Some(link);
                    // A copy: nothing may be locked while telling.
                    let kept = lock(&self.kept).clone();
                    // The two that listen first: their names are the last.
                    for (name, socket) in kept.iter().rev() {
                        self.tell("keep", name, Some(socket)).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "queries would not survive this agent: no holder of their sockets");
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(RETRY_MAX);
                }
            }
        }
    }
}

/// Ends the holder, whose sockets close: for `cleanup`. Ok when there is none.
pub async fn end(config: &HoldConfig) -> io::Result<()> {
    let directory = config.directory.clone();
    let ended = tokio::task::spawn_blocking(move || {
        let Ok(link) = dial(&directory) else {
            return Ok(());
        };
        ask(&link, "end").map(|_| ())
    });
    ended.await.map_err(io::Error::other)??;
    wait_for_shim_end(&config.directory).await;
    match std::fs::remove_dir_all(&config.directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn dial_or_start(config: &HoldConfig) -> io::Result<OwnedFd> {
    std::fs::create_dir_all(&config.directory)?;
    if let Ok(link) = dial(&config.directory) {
        return Ok(link);
    }
    let mut command = Command::new(&config.shim);
    command.arg("hold").arg(&config.directory).env_clear();
    command.stdin(Stdio::null()).stdout(Stdio::null());
    // Its first process ends when the socket is ready.
    let output = command.stderr(Stdio::piped()).output().map_err(|error| {
        io::Error::other(format!("cannot run {}: {error}", config.shim.display()))
    })?;
    if !output.status.success() && output.status.code() != Some(EXIT_TAKEN) {
        let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(io::Error::other(format!("{}: {words}", output.status)));
    }
    dial(&config.directory)
}

fn dial(directory: &Path) -> io::Result<OwnedFd> {
    // By way of a descriptor: a socket's path is limited to 107 bytes.
    let directory = std::fs::File::open(directory)?;
    let path = format!("/proc/self/fd/{}/{SOCKET_FILE}", directory.as_raw_fd());
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path.as_str())?)?;
    let timeout = TimeVal::new(ANSWER_TIMEOUT_S, 0);
    setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
    setsockopt(&socket, sockopt::SendTimeout, &timeout)?;
    Ok(socket)
}

/// Everything in the holder's care.
fn take_all(link: &OwnedFd) -> io::Result<BTreeMap<String, OwnedFd>> {
    let (names, _) = ask(link, "list")?;
    let mut found = BTreeMap::new();
    for name in names.split('\0').skip(1) {
        let (_, fds) = ask(link, &format!("take\0{name}"))?;
        found.extend(fds.into_iter().next().map(|fd| (name.to_owned(), fd)));
    }
    Ok(found)
}

/// One request and its answer; `link` blocks.
fn ask(link: &OwnedFd, request: &str) -> io::Result<(String, Vec<OwnedFd>)> {
    send_now(link, request, None)?;
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    let (length, fds) = receive(link.as_raw_fd(), &mut buffer)?;
    if length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((String::from_utf8_lossy(&buffer[..length]).into_owned(), fds))
}

fn send_now(link: &OwnedFd, message: &str, socket: Option<&Shared>) -> io::Result<()> {
    let fds: Vec<_> = socket.map(|s| s.as_fd().as_raw_fd()).into_iter().collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let parts = [IoSlice::new(message.as_bytes())];
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(link.as_raw_fd(), &parts, control, flags, None)?;
    Ok(())
}

async fn send(link: &AsyncFd<OwnedFd>, message: &str, socket: Option<&Shared>) -> io::Result<()> {
    loop {
        let mut ready = link.writable().await?;
        if let Ok(sent) = ready.try_io(|link| send_now(link.get_ref(), message, socket)) {
            return sent;
        }
    }
}

/// Until the other end has closed. It says nothing unasked.
async fn gone(link: &AsyncFd<OwnedFd>) {
    let mut buffer = [0; 64];
    loop {
        let Ok(mut ready) = link.readable().await else {
            return;
        };
        let received = ready.try_io(|link| receive(link.as_raw_fd(), &mut buffer));
        if let Ok(Ok((0, _)) | Err(_)) = received {
            return;
        }
    }
}

/// A panic elsewhere leaves these whole: every change is one call.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
