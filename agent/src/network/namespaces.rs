//! A pod's namespaces, pinned by bind mounts: no pause process.
//!
//! ```text
//! thread: unshare(net, ipc, uts), or enter a ready set of the pool
//!         ─► sethostname ─► mount /proc/thread-self/ns/X on <dir>/X ─► ends
//! ```
//! With a user namespace (`hostUsers: false`) a process of `gantry-rt` takes the thread's place: it
//! makes the user namespace first, which then owns the others.
//!
//! The thread is the only member of the namespaces until a container joins, so its end changes
//! nothing. The mounts keep them. They are whole when all wanted files are namespaces; anything
//! less is what a crash left and is made anew, for no container can have joined it.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use gantry_cni::netns::is_pinned;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::sethostname;

use super::NetworkError;
use super::pool::Ready;
use crate::user_namespaces::Range;

/// The kernel's limit (`__NEW_UTS_LEN`), in bytes.
const HOSTNAME_SIZE_MAX: usize = 64;

/// All that can be pinned.
const ALL: [&str; 4] = ["user", "net", "ipc", "uts"];

/// Which namespaces a pod has of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Kinds {
    /// net, ipc, uts.
    Own,
    /// ipc only: net and uts are the node's.
    HostNetwork,
    /// A user namespace with these host ids, which owns net, ipc and uts.
    Mapped {
        /// The pod's ids.
        range: Range,
        /// `gantry-rt`, which makes them.
        rt: PathBuf,
    },
}

impl Kinds {
    pub(super) fn names(&self) -> &'static [&'static str] {
        match self {
            Self::Mapped { .. } => &ALL,
            Self::Own => &["net", "ipc", "uts"],
            Self::HostNetwork => &["ipc"],
        }
    }

    pub(super) fn flags(&self) -> CloneFlags {
        match self {
            Self::HostNetwork => CloneFlags::CLONE_NEWIPC,
            _ => CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS,
        }
    }
}

fn io_error(context: String) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Io { context, source }
}

/// Pins the namespaces in `dir` unless they are. Returns whether they are new. `ready` gives a set
/// made in advance, if there is one.
pub(super) async fn ensure(
    dir: PathBuf,
    kinds: Kinds,
    hostname: String,
    ready: impl FnOnce() -> Option<Ready>,
) -> Result<bool, NetworkError> {
    if kinds.names().iter().all(|name| is_pinned(&dir.join(name))) {
        return Ok(false);
    }
    if kinds != Kinds::HostNetwork && !(1..=HOSTNAME_SIZE_MAX).contains(&hostname.len()) {
        return Err(NetworkError::Io {
            context: format!("hostname {hostname:?}: want 1 to {HOSTNAME_SIZE_MAX} bytes"),
            source: ErrorKind::InvalidInput.into(),
        });
    }
    let ready = if kinds == Kinds::Own { ready() } else { None };
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // Never on a worker of the runtime, nor on its blocking pool: those threads are used again.
    std::thread::Builder::new()
        .name("namespaces".into())
        .stack_size(128 * 1024)
        .spawn(move || {
            let result = remove(&dir).and_then(|()| pin(&dir, &kinds, &hostname, ready));
            // Nobody listens when the caller was cancelled; the next call finds the pins.
            drop(sender.send(result));
        })
        .map_err(io_error("start a thread for namespaces".into()))?;
    match receiver.await {
        Ok(result) => result.map(|()| true),
        Err(_) => Err(NetworkError::Io {
            context: "thread for namespaces".into(),
            source: io::Error::other("ended without an answer"),
        }),
    }
}

fn pin(
    dir: &Path,
    kinds: &Kinds,
    hostname: &str,
    ready: Option<Ready>,
) -> Result<(), NetworkError> {
    fs::create_dir_all(dir).map_err(io_error(format!("create {}", dir.display())))?;
    if let Kinds::Mapped { range, rt } = kinds {
        return pin_mapped(dir, *range, rt, hostname);
    }
    match &ready {
        Some(ready) => ready
            .enter()
            .map_err(io_error("enter ready namespaces".into()))?,
        None => unshare(kinds.flags()).map_err(|errno| {
            io_error(format!("unshare {}", kinds.names().join(", ")))(errno.into())
        })?,
    }
    if *kinds == Kinds::Own {
        sethostname(hostname)
            .map_err(|errno| io_error(format!("set hostname {hostname}"))(errno.into()))?;
    }
    pin_those_of("thread-self", dir, kinds.names())
}

/// Binds `/proc/<of>/ns/<name>` on `<dir>/<name>`.
fn pin_those_of(of: &str, dir: &Path, names: &[&str]) -> Result<(), NetworkError> {
    for name in names {
        let target = dir.join(name);
        (OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&target))
        .map_err(io_error(format!("create {}", target.display())))?;
        let source = format!("/proc/{of}/ns/{name}");
        let none: Option<&str> = None;
        mount(Some(source.as_str()), &target, none, MsFlags::MS_BIND, none).map_err(|errno| {
            io_error(format!("mount {source} on {}", target.display()))(errno.into())
        })?;
    }
    Ok(())
}

/// The agent's half of the protocol of `gantry-rt namespaces`.
fn pin_mapped(dir: &Path, range: Range, rt: &Path, hostname: &str) -> Result<(), NetworkError> {
    let mut holder = Command::new(rt)
        .args(["namespaces", hostname])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(io_error(format!("cannot run {}", rt.display())))?;
    let pid = holder.id().to_string();
    let (mut to, from) = (holder.stdin.take(), holder.stdout.take());
    let done = (|| {
        let mut from = from.ok_or_else(|| io::Error::other("no way back"))?;
        let mut step = [0];
        from.read_exact(&mut step)?;
        for map in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{pid}/{map}"), range.map())?;
        }
        if let Some(to) = &mut to {
            to.write_all(b"g")?;
        }
        from.read_exact(&mut step)
    })();
    let pinned = match &done {
        Ok(()) => pin_those_of(&pid, dir, &ALL),
        Err(_) => Ok(()),
    };
    // The end of its stdin ends it; its words explain what the pipes cannot.
    drop(to);
    let output = holder
        .wait_with_output()
        .map_err(io_error("wait for gantry-rt namespaces".into()))?;
    match done {
        Ok(()) => pinned,
        Err(error) => {
            let words = String::from_utf8_lossy(&output.stderr);
            let context = format!(
                "make a user namespace: {}{}",
                words.trim(),
                limit_hint("/proc/sys/user/max_user_namespaces")
            );
            Err(io_error(context)(error))
        }
    }
}

/// What a hardened machine has most often done to user namespaces.
fn limit_hint(path: &str) -> &'static str {
    match fs::read_to_string(path) {
        Ok(text) if text.trim() == "0" => {
            " (sysctl user.max_user_namespaces is 0: this machine allows none)"
        }
        _ => "",
    }
}

/// Drops the pins and the directory. The namespaces end with their last process, link and pin.
/// Ok when nothing is there.
pub(super) fn remove(dir: &Path) -> Result<(), NetworkError> {
    for name in ALL {
        let path = dir.join(name);
        // More than one mount on the file would mean two makers; all of them go.
        loop {
            match umount2(&path, MntFlags::MNT_DETACH) {
                Ok(()) => continue,
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(errno) => {
                    return Err(io_error(format!("unmount {}", path.display()))(
                        errno.into(),
                    ));
                }
            }
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(io_error(format!("remove {}", path.display()))(error));
            }
            _ => {}
        }
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(io_error(format!("remove {}", dir.display()))(error))
        }
        _ => Ok(()),
    }
}
