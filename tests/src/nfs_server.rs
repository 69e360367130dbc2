//! The kernel's own NFS server, version 4, without the programs that usually drive it: one export, its root.
//!
//! Which client may have what is asked of user space through files of the kernel's cache; here it is all
//! told in advance.
//!
//! Source: Linux `fs/nfsd/export.c` (`svc_export_parse`, `expkey_parse`), `net/sunrpc/svcauth_unix.c`
//! (`ip_map_parse`), `fs/nfsd/nfsctl.c`; exports(5) for the flags.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const CONTROL: &str = "/proc/fs/nfsd";
const CACHES: &str = "/proc/net/rpc";
/// All clients that we let in are one.
const DOMAIN: &str = "gantry-test";
/// As far as the kernel counts.
const EXPIRY: u32 = i32::MAX as u32;
/// rw, async, insecure, no_subtree_check, fsid=0, no_root_squash; `NFSEXP_*` of linux/nfsd/export.h.
const FLAGS: u32 = 0x0002 | 0x0010 | 0x0400 | 0x2000;

/// It serves until it is stopped or dropped.
pub struct NfsServer {
    _private: (),
}

/// Whether this kernel is both ends.
///
/// # Errors
/// In words: what it lacks.
pub fn is_possible() -> Result<(), String> {
    let kinds = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = |kind: &str| {
        kinds
            .lines()
            .any(|line| line.ends_with(&format!("\t{kind}")))
    };
    match (has("nfsd"), has("nfs4")) {
        (false, _) => Err("this kernel has no NFS server (module nfsd)".into()),
        (_, false) => Err("this kernel has no NFS client (module nfsv4)".into()),
        _ => Ok(()),
    }
}

impl NfsServer {
    /// Serves `directory` to this machine by its loopback address, at the standard port.
    pub fn start(directory: &Path) -> Result<Self> {
        let none: Option<&str> = None;
        let flags = MsFlags::empty();
        mount(Some("nfsd"), CONTROL, Some("nfsd"), flags, none).context("mount nfsd")?;
        let server = Self { _private: () };
        let directory = directory.display();
        tell(
            CACHES,
            "auth.unix.ip/channel",
            &format!("nfsd 127.0.0.1 {EXPIRY} {DOMAIN}"),
        )?;
        let export = format!("{DOMAIN} {directory} {EXPIRY} {FLAGS} 65534 65534 0");
        tell(CACHES, "nfsd.export/channel", &export)?;
        // Kind 1: the file system has a number, in four bytes.
        let root = format!("{DOMAIN} 1 \\x00000000 {EXPIRY} {directory}");
        tell(CACHES, "nfsd.fh/channel", &root)?;
        // Version 3 would ask for a port mapper.
        tell(CONTROL, "versions", "-2 -3 +4")?;
        // For so long nobody opens a file, since others may claim theirs back. Ten seconds are the least.
        tell(CONTROL, "nfsv4gracetime", "10")?;
        tell(CONTROL, "portlist", "tcp 2049")?;
        tell(CONTROL, "threads", "2")?;
        Ok(server)
    }

    /// Whoever asks now waits: nobody listens.
    pub fn stop(&self) -> Result<()> {
        tell(CONTROL, "threads", "0")
    }
}

impl Drop for NfsServer {
    fn drop(&mut self) {
        let _ = self.stop();
        for cache in ["auth.unix.ip", "nfsd.export", "nfsd.fh"] {
            let _ = tell(CACHES, &format!("{cache}/flush"), &EXPIRY.to_string());
        }
        let _ = umount2(CONTROL, MntFlags::empty());
    }
}

/// One line in one write, as the kernel wants it.
fn tell(below: &str, file: &str, line: &str) -> Result<()> {
    let path = Path::new(below).join(file);
    fs::write(&path, format!("{line}\n")).with_context(|| format!("{line:?} to {}", path.display()))
}
