//! `gantry-shim`: one per pod, the parent of its containers.
//!
//! ```text
//! usage: gantry-shim <sandbox directory> <path of gantry-rt> [<open files of the containers>]
//!        gantry-shim hold <directory>
//!        gantry-shim init
//!
//! agent ── spawn ──► gantry-shim ── fork ──► shim (own session, cgroup /gantry-shims, parent: init)
//!   └── shim.sock (wire.rs) ─────────────────►  │ spawns gantry-rt create|exec, which leaves init as a child of the shim
//!                                               │ reads the FIFOs, writes the CRI log
//!                                               └ reaps, writes <container>/<attempt>/exit, then tells
//! ```
//! It knows no Kubernetes and no libcontainer; it exists so that the agent can die, be upgraded
//! or be absent while containers run, log and end. One thread, one poll loop, std and libc only.
//! Measured: 126 KiB PSS each when thirty wait (static, at a fixed address, profile `shim`; 155 KiB as
//! static-pie, whose relocations dirty pages).
//!
//! The first process exits 0 when the socket is ready, 3 when another shim holds the sandbox
//! (connect to that one), 1 with a line on stderr otherwise.
//!
//! When a shim dies, its containers go on: their FIFOs keep 64 KiB, then they block. The agent holds
//! the FIFOs too, so that what a container says last is there for the next shim. That one takes over
//! from the `started` records and the spools (`spool.rs`); statuses then come from the kernel
//! (`PIDFD_GET_INFO`, Linux 6.15) or are lost, which the exit record says.
//!
//! `gantry-shim hold` is one per node: it keeps the resolver's sockets (`hold.rs`).
//!
//! `gantry-shim init` is something else: process 1 of a pod whose containers share one pid
//! namespace. It reaps whoever is orphaned there, and does nothing else until it is killed.

mod attach;
mod hold;
mod log;
mod pod;
mod run;
mod spool;
mod stand_in;
mod sys;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use gantry_shim::{cgroup, wire};

use crate::hold::Hold;
use crate::pod::Pod;

/// Outside every pod's cgroup and outside the agent's.
const SHIM_CGROUP: &str = "/gantry-shims";
/// Locked for the life of the shim.
const LOCK_FILE: &str = "shim.lock";
/// Another shim serves this sandbox.
const EXIT_TAKEN: u8 = 3;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if std::env::args_os().skip(1).eq(["init"]) {
        return reap_forever();
    }
    let (Some(sandbox), Some(rt)) = (arguments.next(), arguments.next()) else {
        eprintln!(
            "usage: gantry-shim <sandbox directory> <path of gantry-rt> [<open files>] | hold <directory> | init"
        );
        return ExitCode::from(64);
    };
    if sandbox == "hold" {
        return end_with(Path::new(&rt), launch(Path::new(&rt), Duty::Hold));
    }
    let (sandbox, rt) = (PathBuf::from(sandbox), PathBuf::from(rt));
    let open_files = arguments
        .next()
        .and_then(|text| text.to_str()?.parse().ok());
    // Without it the containers have what the agent has.
    let limited = open_files.map_or(Ok(()), sys::limit_open_files);
    end_with(
        &sandbox,
        limited.and_then(|()| launch(&sandbox, Duty::Pod(rt))),
    )
}

/// What a detached process is for.
enum Duty {
    /// One pod's containers; where gantry-rt is.
    Pod(PathBuf),
    /// The resolver's sockets.
    Hold,
}

fn end_with(directory: &Path, launched: std::io::Result<ExitCode>) -> ExitCode {
    launched.unwrap_or_else(|error| {
        eprintln!("gantry-shim: {}: {error}", directory.display());
        ExitCode::FAILURE
    })
}

/// As process 1 it has no default actions: SIGTERM changes nothing, SIGKILL comes from outside.
fn reap_forever() -> ExitCode {
    let signals = match sys::take_signals() {
        Ok(signals) => signals,
        Err(error) => {
            eprintln!("gantry-shim init: {error}");
            return ExitCode::FAILURE;
        }
    };
    loop {
        let mut ready = [libc::pollfd {
            fd: signals.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        sys::poll(&mut ready, -1);
        // signalfd merges signals: read it empty, then look at every child.
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        while sys::read(signals.as_fd(), &mut info).is_ok() {}
        while sys::reap().is_some() {}
    }
}

fn launch(directory: &Path, duty: Duty) -> std::io::Result<ExitCode> {
    // Relative paths from here on: a socket's path is limited to 107 bytes.
    std::env::set_current_dir(directory)?;
    let (word, theirs) = sys::pipe()?;
    let unified = cgroup::unified(SHIM_CGROUP);
    let (is_child, inside) = sys::fork_detached(unified.as_ref().map(File::as_fd))?;
    drop(unified);
    if !is_child {
        drop(theirs);
        return Ok(wait_for_child(word));
    }
    drop(word);
    let mut parent = File::from(theirs);
    match set_up(duty) {
        Ok(Some(served)) => {
            let _ = parent.write_all(b"ok");
            drop(parent);
            match served {
                Served::Pod(mut pod) => pod.serve(|| cgroup::enter(SHIM_CGROUP, !inside)),
                Served::Hold(mut hold) => {
                    cgroup::enter(SHIM_CGROUP, !inside);
                    hold.serve();
                }
            }
            let _ = fs::remove_file(wire::SOCKET_FILE);
            Ok(ExitCode::SUCCESS)
        }
        Ok(None) => {
            let _ = parent.write_all(b"taken");
            Ok(ExitCode::from(EXIT_TAKEN))
        }
        Err(error) => {
            let _ = write!(parent, "{error}");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Until the child has said how it went, or has died without a word.
fn wait_for_child(word: OwnedFd) -> ExitCode {
    let mut ready = [libc::pollfd {
        fd: word.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }];
    sys::poll(&mut ready, -1);
    // One short message in a pipe arrives whole.
    let mut part = [0; 1024];
    let n = sys::read(word.as_fd(), &mut part).unwrap_or(0);
    match &part[..n] {
        b"ok" => ExitCode::SUCCESS,
        b"taken" => ExitCode::from(EXIT_TAKEN),
        other => {
            eprintln!(
                "gantry-shim: set-up failed: {}",
                String::from_utf8_lossy(other)
            );
            ExitCode::FAILURE
        }
    }
}

/// A [`Duty`] that is ready.
enum Served {
    Pod(Box<Pod>),
    Hold(Hold),
}

/// None when another shim holds the sandbox.
fn set_up(duty: Duty) -> std::io::Result<Option<Served>> {
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(LOCK_FILE)?;
    if !sys::try_lock(lock.as_fd())? {
        return Ok(None);
    }
    // Held until the process ends; close-on-exec keeps it from every child. As descriptor 3 it
    // also keeps that number from everything else: a child's report pipe is moved there.
    sys::keep_as_report_slot(lock.into())?;
    let signals = sys::take_signals()?;
    // Ready before it has its name: whoever finds the socket can talk.
    let temporary = Path::new("shim.sock.tmp");
    let _ = fs::remove_file(temporary);
    let listener = sys::listen(temporary, libc::SOCK_SEQPACKET)?;
    let served = match duty {
        Duty::Pod(rt) => Served::Pod(Box::new(Pod::new(rt, signals, listener))),
        Duty::Hold => {
            // They stay blocked; it has no children.
            drop(signals);
            Served::Hold(Hold::new(listener))
        }
    };
    fs::rename(temporary, wire::SOCKET_FILE)?;
    // The agent's terminal or journal is none of ours.
    let null = File::options().read(true).write(true).open("/dev/null")?;
    sys::replace_stdio(null.as_fd());
    Ok(Some(served))
}
