//! Commands beside init, and init's own streams: pipes, terminal, exit.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use gantry_shim::wire::{Exec, Request};
use nix::fcntl::OFlag;
use oci_spec::runtime::Spec;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixListener;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

use super::link::{Answer, Link, receive, register};
use crate::runtime::{ExecSession, ExecSpec, RuntimeError};

/// Terminal sizes that may wait.
const RESIZE_COUNT_MAX: usize = 8;
/// Between the exec's start and the terminal's arrival there is one local connect.
const CONSOLE_TIMEOUT: Duration = Duration::from_secs(35);

/// Distinguishes the files of concurrent execs of this agent.
static NEXT_FILE: AtomicU64 = AtomicU64::new(0);

fn io_error(context: &str, path: &Path) -> impl FnOnce(io::Error) -> RuntimeError {
    let context = format!("{context} {}", path.display());
    move |source| RuntimeError::Io { context, source }
}

/// Starts `exec` in the run whose directory is `directory`.
pub(super) async fn start(
    link: Arc<Link>,
    exec: &ExecSpec,
    key: String,
    directory: &Path,
    seccomp_path: &Path,
) -> Result<ExecSession, RuntimeError> {
    let number = NEXT_FILE.fetch_add(1, Ordering::Relaxed);
    let stem = format!("exec-{}-{number}", std::process::id());
    let process_path = directory.join(format!("{stem}.json"));
    write_process(exec, directory, &process_path)?;
    let mut request = Exec {
        run: key,
        process_path: process_path.to_string_lossy().into_owned(),
        seccomp_path: seccomp_path.to_string_lossy().into_owned(),
        console_path: String::new(),
    };
    let result = if exec.tty {
        let socket = directory.join(format!("{stem}.sock"));
        request.console_path = socket.to_string_lossy().into_owned();
        let result = with_terminal(link, request, exec.stdin, directory, &stem).await;
        let _ = std::fs::remove_file(socket);
        result
    } else {
        with_pipes(link, request, exec.stdin).await
    };
    // gantry-rt removes it once it has read it; here for the cases in which it never ran.
    let _ = std::fs::remove_file(process_path);
    result
}

/// Init's own process document with another command: same user, groups, capabilities,
/// environment, directory and limits.
fn write_process(exec: &ExecSpec, directory: &Path, to: &Path) -> Result<(), RuntimeError> {
    let config = directory.join("config.json");
    let spec = Spec::load(&config).map_err(|error| {
        RuntimeError::Shim(format!("cannot read {}: {error}", config.display()))
    })?;
    let mut process = spec
        .process()
        .clone()
        .ok_or_else(|| RuntimeError::Shim(format!("{} has no process", config.display())))?;
    process.set_args(Some(exec.command.clone()));
    process.set_terminal(Some(exec.tty));
    if exec.tty
        && let Some(env) = process.env_mut()
        && !env.iter().any(|e| e.starts_with("TERM="))
    {
        env.push("TERM=xterm".into());
    }
    let text = serde_json::to_vec(&process)
        .map_err(|error| RuntimeError::Shim(format!("cannot encode a process: {error}")))?;
    std::fs::write(to, text).map_err(io_error("cannot write", to))
}

async fn with_pipes(
    link: Arc<Link>,
    request: Exec,
    stdin: bool,
) -> Result<ExecSession, RuntimeError> {
    let pipes = || -> io::Result<_> {
        let new = || nix::unistd::pipe2(OFlag::O_CLOEXEC);
        let (out_read, out_write) = new()?;
        let (err_read, err_write) = new()?;
        let stdout = pipe::Receiver::from_owned_fd(out_read)?;
        let stderr = pipe::Receiver::from_owned_fd(err_read)?;
        let (their_stdin, our_stdin) = if stdin {
            let (read, write) = new()?;
            (read, Some(pipe::Sender::from_owned_fd(write)?))
        } else {
            (OwnedFd::from(File::open("/dev/null")?), None)
        };
        Ok((
            [their_stdin, out_write, err_write],
            our_stdin,
            stdout,
            stderr,
        ))
    };
    let (theirs, our_stdin, stdout, stderr) =
        pipes().map_err(io_error("cannot make pipes for", Path::new(&request.run)))?;
    let id = link.new_id();
    let ended = link.expect_exec_exit(id);
    let fds: Vec<_> = theirs.iter().map(AsRawFd::as_raw_fd).collect();
    let answer = link.ask_as(id, &Request::Exec(request), &fds).await?;
    // With our copies open the command's output would never end.
    drop(theirs);
    answer.map_err(|report| super::report_error(&report))?;
    let (resize, _nobody) = mpsc::channel(1);
    Ok(ExecSession {
        stdin: our_stdin.map(|s| Box::new(s) as Box<dyn AsyncWrite + Send + Unpin>),
        stdout: Box::new(stdout),
        stderr: Some(Box::new(stderr)),
        exit: watch_exit(link, id, ended),
        resize,
    })
}

async fn with_terminal(
    link: Arc<Link>,
    request: Exec,
    stdin: bool,
    directory: &Path,
    stem: &str,
) -> Result<ExecSession, RuntimeError> {
    // By way of a descriptor: a socket's path is limited to 107 bytes.
    let parent = File::open(directory).map_err(io_error("cannot open", directory))?;
    let path = format!("/proc/self/fd/{}/{stem}.sock", parent.as_raw_fd());
    let listener = UnixListener::bind(&path)
        .map_err(io_error("cannot listen for a terminal in", directory))?;
    let id = link.new_id();
    let ended = link.expect_exec_exit(id);
    let request = Request::Exec(request);
    let master = async {
        let (stream, _) = listener.accept().await?;
        loop {
            stream.readable().await?;
            let mut buffer = [0; 256];
            let received = stream.try_io(tokio::io::Interest::READABLE, || {
                receive(stream.as_raw_fd(), &mut buffer)
            });
            match received {
                Ok((_, mut fds)) => {
                    return fds
                        .pop()
                        .ok_or_else(|| io::Error::other("no terminal was sent"));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    };
    let master = async {
        tokio::time::timeout(CONSOLE_TIMEOUT, master)
            .await
            .map_err(io::Error::other)?
    };
    tokio::pin!(master);
    let asking = Arc::clone(&link);
    let asked = asking.ask_as(id, &request, &[]);
    tokio::pin!(asked);
    // gantry-rt waits until its connection was accepted, then reports: both go on here. If it
    // fails before it connects, the answer comes first and the terminal never.
    let mut early = None;
    let answer = loop {
        tokio::select! {
            // Cancel safe: both futures are pinned outside and polled on.
            answer = &mut asked => break answer?,
            fd = &mut master, if early.is_none() => early = Some(fd),
        }
    };
    answer.map_err(|report| super::report_error(&report))?;
    let master = match early {
        Some(fd) => fd,
        None => master.await,
    }
    .and_then(Terminal::new)
    .map_err(io_error("no terminal for an exec in", directory))?;
    let (resize, sizes) = mpsc::channel(RESIZE_COUNT_MAX);
    let copy = || {
        master
            .try_clone()
            .map_err(io_error("cannot share a terminal in", directory))
    };
    let (writer, sizer) = (copy()?, copy()?);
    tokio::spawn(apply_sizes(sizer, sizes));
    Ok(ExecSession {
        stdin: stdin.then(|| Box::new(writer) as Box<dyn AsyncWrite + Send + Unpin>),
        stdout: Box::new(master),
        stderr: None,
        exit: watch_exit(link, id, ended),
        resize,
    })
}

async fn apply_sizes(terminal: Terminal, mut sizes: mpsc::Receiver<(u16, u16)>) {
    while let Some((columns, rows)) = sizes.recv().await {
        let size = rustix::termios::Winsize {
            ws_col: columns,
            ws_row: rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // A terminal that has gone has no size.
        let _ = rustix::termios::tcsetwinsize(terminal.0.get_ref(), size);
    }
}

/// Connects to init itself: what it writes from now on, and its stdin if `stdin`. Dropping the
/// session leaves the container alone.
pub(super) async fn attach(
    link: Arc<Link>,
    key: String,
    stdin: bool,
    directory: &Path,
) -> Result<ExecSession, RuntimeError> {
    let io = io_error("cannot attach to", directory);
    let pipes = || -> io::Result<_> {
        let (out_read, out_write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let (err_read, err_write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let stdout = pipe::Receiver::from_owned_fd(out_read)?;
        let stderr = pipe::Receiver::from_owned_fd(err_read)?;
        Ok(([out_write, err_write], stdout, stderr))
    };
    let (theirs, stdout, stderr) = pipes().map_err(io)?;
    let id = link.new_id();
    let ended = link.expect_exec_exit(id);
    let fds: Vec<_> = theirs.iter().map(AsRawFd::as_raw_fd).collect();
    let request = Request::Attach { run: key.clone() };
    let answer = link.ask_as(id, &request, &fds).await?;
    drop(theirs);
    let input = match answer.map_err(RuntimeError::Shim)? {
        Answer::Attached(input) => input,
        other => {
            let words = format!("an attach was answered by {other:?}");
            return Err(RuntimeError::Shim(words));
        }
    };
    let (resize, sizes) = mpsc::channel(RESIZE_COUNT_MAX);
    let input = input
        .map(Terminal::new)
        .transpose()
        .map_err(io_error("cannot use the stdin of", directory))?;
    let exit = watch_exit(link.clone(), id, ended);
    let Some(input) = input else {
        return match stdin {
            true => Err(RuntimeError::Container(
                "the container takes no stdin: it needs `stdin: true`, and no stdinOnce client \
                 may have left it"
                    .into(),
            )),
            false => Ok(ExecSession {
                stdin: None,
                stdout: Box::new(stdout),
                stderr: Some(Box::new(stderr)),
                exit,
                resize,
            }),
        };
    };
    // Only terminals have a size; a copy of a FIFO would keep its reader from the end.
    if rustix::termios::isatty(input.0.get_ref()) {
        let sizer = input
            .try_clone()
            .map_err(io_error("cannot share the stdin of", directory))?;
        tokio::spawn(apply_sizes(sizer, sizes));
    }
    let input = Input {
        to: input,
        link,
        run: key,
    };
    Ok(ExecSession {
        stdin: stdin.then(|| Box::new(input) as Box<dyn AsyncWrite + Send + Unpin>),
        stdout: Box::new(stdout),
        stderr: Some(Box::new(stderr)),
        exit,
        resize,
    })
}

/// A client's way to init's stdin; when it is dropped the shim hears that this client has ended.
struct Input {
    to: Terminal,
    link: Arc<Link>,
    run: String,
}

impl Drop for Input {
    fn drop(&mut self) {
        let link = self.link.clone();
        let request = Request::CloseStdin {
            run: self.run.clone(),
        };
        // Dropped on the way out of the runtime: then the shim notices the connection's end.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { link.ask(&request, &[]).await.map(|_| ()) });
        }
    }
}

impl AsyncWrite for Input {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.to).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.to).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.to).poll_shutdown(context)
    }
}

/// Hands the exit on; a session that was dropped before kills its command.
fn watch_exit(
    link: Arc<Link>,
    id: u64,
    ended: oneshot::Receiver<i32>,
) -> oneshot::Receiver<Result<i32, RuntimeError>> {
    let (mut sender, receiver) = oneshot::channel();
    tokio::spawn(async move {
        tokio::select! {
            // Cancel safe: a oneshot receiver keeps its value.
            status = ended => {
                let result = status
                    .map(|status| {
                        let status = std::process::ExitStatus::from_raw(status);
                        status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
                    })
                    .map_err(|_| RuntimeError::Shim("the stream to the container broke, or was not read".into()));
                let _ = sender.send(result);
            }
            () = sender.closed() => {
                let _ = link.ask(&Request::KillExec { exec: id }, &[]).await;
            }
        }
    });
    receiver
}

/// A pseudo-terminal's master, or a FIFO's write side, for tokio.
struct Terminal(AsyncFd<OwnedFd>);

impl Terminal {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)? | rustix::fs::OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(&fd, flags)?;
        register(fd).map(Self)
    }

    fn try_clone(&self) -> io::Result<Self> {
        register(self.0.get_ref().try_clone()?).map(Self)
    }
}

impl AsyncRead for Terminal {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let into = buffer.initialize_unfilled();
            match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), into)?)) {
                Ok(Ok(n)) => {
                    buffer.advance(n);
                    return Poll::Ready(Ok(()));
                }
                // The last process on the other side has closed it: the end.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Terminal {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), data)?)) {
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
