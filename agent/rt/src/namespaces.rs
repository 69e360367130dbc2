//! `gantry-rt namespaces HOSTNAME`: makes a pod's user namespace and those that it owns, and holds
//! them until the agent has pinned them.
//!
//! ```text
//! agent                                        here (one thread, as user namespaces demand)
//! spawn ─────────────────────────────────────► unshare(user)
//!   uid_map, gid_map of this pid ◄──────── "1" ┘
//!   "go" ────────────────────────────────────► become its root ─► unshare(net, ipc, uts), host name
//!   pin /proc/<pid>/ns/* ◄──────────────── "2" ┘
//!   close ───────────────────────────────────► end
//! ```
//! The agent cannot do this in a thread: the kernel gives a new user namespace to processes of one
//! thread only. If the agent dies at any point, the end of stdin ends this process and with it all
//! that was not pinned.

use std::io::{Read, Write};

use anyhow::{Context, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgid, setgroups, sethostname, setuid};

/// Runs the protocol on stdin and stdout.
pub(crate) fn hold(hostname: &str) -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER).context("unshare the user namespace")?;
    tell(b"1")?;
    let mut go = [0];
    let told = std::io::stdin()
        .read(&mut go)
        .context("wait for the maps")?;
    ensure!(told == 1, "nobody wrote the id maps");
    // What the namespaces hold from now on, as the root of the message queues, is the pod's root's.
    setgroups(&[]).context("setgroups")?;
    setgid(Gid::from_raw(0)).context("setgid")?;
    setuid(Uid::from_raw(0)).context("setuid")?;
    let owned = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    unshare(owned).context("unshare net, ipc, uts")?;
    sethostname(hostname).with_context(|| format!("set hostname {hostname}"))?;
    tell(b"2")?;
    std::io::stdin()
        .read(&mut go)
        .context("wait for the pins")?;
    Ok(())
}

fn tell(step: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    out.write_all(step)
        .and_then(|()| out.flush())
        .context("tell the agent")
}
