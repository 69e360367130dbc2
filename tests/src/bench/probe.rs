//! Small single-threaded child processes that do what is timed: nothing of ours runs beside it.
//!
//! ```text
//! parent ── "spawn PATH" | "clone PATH" ──► floor    answers nanoseconds
//!        ── "connect ADDRESS COUNT" ──────► connect  answers COUNT nanoseconds, or an error
//!        ── (stdin stays open) ───────────► accept   says ready, accepts and closes until stdin ends
//! ```
//! `connect` and `accept` enter a pod's network namespace and stay on one processor, so that a
//! connection costs what its instructions cost and no wake-up of another processor.

use std::ffi::CString;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, CpuSet, sched_getaffinity, sched_setaffinity, setns};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, sockopt};
use nix::sys::time::TimeVal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// Connections that may wait for `accept`; the client waits for each, so one would do.
const BACKLOG: i32 = 128;
const CONNECT_TIMEOUT: TimeVal = TimeVal::new(1, 0);

/// What the child's first argument after `probe` asks for.
pub fn main(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let Some(done) = super::services::peer::main(&words) {
        return done;
    }
    match words.as_slice() {
        ["floor"] => answer(floor),
        ["connect", namespace] => {
            enter(Path::new(namespace))?;
            answer(connect)
        }
        ["accept", namespace, port] => {
            enter(Path::new(namespace))?;
            accept(port.parse().context("port")?)
        }
        _ => bail!("no such probe: {words:?}"),
    }
}

/// A running probe; dropping it ends it.
pub struct Probe {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Probe {
    /// Starts one.
    pub fn start(arguments: &[&str]) -> Result<Self> {
        let own = std::env::current_exe().context("where is this binary?")?;
        let mut command = Command::new(own);
        command.arg("probe").args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start a probe")?;
        let stdout = child.stdout.take().context("a probe has no output")?;
        Ok(Self {
            stdin: child.stdin.take(),
            child,
            stdout: BufReader::new(stdout),
        })
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its next line.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let length = self.stdout.read_line(&mut line)?;
        ensure!(length > 0, "a probe ended: see its error above");
        Ok(line.trim_end().to_owned())
    }

    /// Asks and returns the answer's numbers, in nanoseconds.
    pub fn ask(&mut self, question: &str) -> Result<Vec<f64>> {
        self.send(question)?;
        self.numbers().with_context(|| question.to_owned())
    }

    /// Asks; the answer is to be fetched.
    pub fn send(&mut self, question: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("the probe was ended")?;
        // At once: a probe that polls its input reads what is there.
        Ok(stdin.write_all(format!("{question}\n").as_bytes())?)
    }

    /// The numbers of the next answer.
    pub fn numbers(&mut self) -> Result<Vec<f64>> {
        let line = self.line()?;
        if let Some(error) = line.strip_prefix("error: ") {
            bail!("{error}");
        }
        let numbers = line.split(' ').map(str::parse::<f64>);
        Ok(numbers.collect::<Result<_, _>>()?)
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stdin = None; // its end is the child's
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Answers each line of standard input with one line.
pub(super) fn answer(mut work: impl FnMut(&[&str]) -> Result<Vec<u128>>) -> Result<()> {
    let mut stdout = std::io::stdout();
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let reply = match work(&words) {
            Ok(numbers) => {
                let numbers: Vec<String> = numbers.iter().map(u128::to_string).collect();
                numbers.join(" ")
            }
            Err(error) => format!("error: {error:#}"),
        };
        writeln!(stdout, "{reply}")?;
    }
    Ok(())
}

/// The namespace, and the last processor that we may use.
fn enter(namespace: &Path) -> Result<()> {
    let file =
        std::fs::File::open(namespace).with_context(|| format!("open {}", namespace.display()))?;
    setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("enter {}", namespace.display()))?;
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let last = (0..CpuSet::count())
        .rev()
        .find(|cpu| allowed.is_set(*cpu) == Ok(true));
    let mut one = CpuSet::new();
    one.set(last.context("no processor may be used")?)?;
    sched_setaffinity(Pid::from_raw(0), &one).context("stay on one processor")
}

fn floor(words: &[&str]) -> Result<Vec<u128>> {
    let began = Instant::now();
    match words {
        ["spawn", path] => {
            // std spawns by posix_spawn when nothing else is asked for.
            let status = Command::new(path).stdin(Stdio::null()).status()?;
            ensure!(status.success(), "{path}: {status}");
        }
        ["clone", path] => clone_and_exec(path)?,
        _ => bail!("no such floor: {words:?}"),
    }
    Ok(vec![began.elapsed().as_nanos()])
}

/// A process in six namespaces of its own that runs `path`, waited for.
fn clone_and_exec(path: &str) -> Result<()> {
    let program = CString::new(path)?;
    let arguments = [program.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null::<libc::c_char>()];
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    let flags = libc::c_long::from(namespaces | libc::SIGCHLD);
    // SAFETY: without a stack the child goes on as after fork, on a copy of this single-threaded
    // process; it only calls execve with null-terminated arrays made above, or _exit.
    let pid = unsafe {
        let pid = libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0);
        if pid == 0 {
            libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
            libc::_exit(127);
        }
        pid
    };
    if pid < 0 {
        return Err(Errno::last()).context("clone");
    }
    let status = waitpid(Pid::from_raw(i32::try_from(pid)?), None)?;
    let ok = matches!(status, WaitStatus::Exited(_, 0));
    ensure!(ok, "{path} in namespaces of its own: {status:?}");
    Ok(())
}

fn connect(words: &[&str]) -> Result<Vec<u128>> {
    let ["connect", address, count] = words else {
        bail!("no such question: {words:?}");
    };
    let address: SocketAddrV4 = address.parse().context("address")?;
    let address = SockaddrIn::from(address);
    (0..count.parse::<usize>().context("count")?)
        .map(|_| connect_once(&address))
        .collect()
}

fn connect_once(address: &SockaddrIn) -> Result<u128> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket::socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    // Bounds connect too: an address that nobody answers for must not take two minutes.
    socket::setsockopt(&fd, sockopt::SendTimeout, &CONNECT_TIMEOUT)?;
    let began = Instant::now();
    socket::connect(fd.as_raw_fd(), address).context("connect")?;
    let took = began.elapsed().as_nanos();
    // The server closes first, after it has accepted: nothing of this connection is left to do
    // while the next one is timed. Then a reset, so that no port stays in TIME-WAIT.
    let reset = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    socket::setsockopt(&fd, sockopt::Linger, &reset)?;
    std::fs::File::from(fd).read_to_end(&mut Vec::new())?;
    Ok(took)
}

fn accept(port: u16) -> Result<()> {
    let listener = std::net::TcpListener::bind(("0.0.0.0", port)).context("bind")?;
    socket::listen(&listener, socket::Backlog::new(BACKLOG)?)?;
    println!("ready");
    let stdin = std::io::stdin();
    loop {
        let mut ready = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        // Nobody writes: readable means that the parent has gone.
        if ready[1].any() == Some(true) {
            return Ok(());
        }
        if ready[0].any() == Some(true) {
            drop(listener.accept()?);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spawned_program_takes_time_and_a_failing_one_is_an_error() {
        let took = floor(&["spawn", "/bin/true"]).unwrap();
        assert!(took[0] > 10_000, "{took:?} ns");
        assert!(floor(&["spawn", "/bin/false"]).is_err());
        assert!(floor(&["spawn", "/nonexistent"]).is_err());
        assert!(floor(&["walk", "/bin/true"]).is_err());
    }

    #[test]
    fn a_refused_connection_is_an_error_and_no_figure() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        assert!(connect(&["connect", &address, "1"]).is_err());
    }
}
