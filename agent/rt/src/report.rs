//! The one line this process says, on descriptor 3, and the log lines that explain an error.
//!
//! libcontainer's errors lose their context ("EPERM: Operation not permitted"); the context is
//! only in its log events. They are captured, from this process and from the two that
//! libcontainer clones off it, in one memory file that all three share.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use anyhow::Context;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Where the shim listens.
const REPORT_FD: i32 = 3;
/// Log events passed on: the first says what failed, the rest how it was passed up.
const CONTEXT_LINES_MAX: usize = 6;
/// Bytes of log events looked at.
const CONTEXT_BYTES_MAX: u64 = 4096;
/// What validation errors start with, wherever libcontainer wraps them.
pub(crate) const EXEC_ERROR: &str = "exec: \"";

/// The way to the shim.
pub(crate) struct Report {
    to: File,
    events: Arc<File>,
}

impl Report {
    /// Takes descriptor 3 and starts capturing log events.
    pub(crate) fn open() -> anyhow::Result<Self> {
        // SAFETY: the shim passes descriptor 3 to nobody but this process, and nothing else here
        // has taken it: main calls this first. A closed descriptor fails in the next line.
        let to = unsafe { OwnedFd::from_raw_fd(REPORT_FD) };
        if let Err(error) = fcntl(&to, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
            // Not open: it must not be closed by drop either.
            let _ = to.into_raw_fd();
            return Err(error).context("descriptor 3 is not open");
        }
        let events = memfd_create(c"gantry-rt-events", MFdFlags::MFD_CLOEXEC)?;
        // Three processes write: each event goes to the end.
        fcntl(&events, FcntlArg::F_SETFL(OFlag::O_APPEND))?;
        let events = Arc::new(File::from(events));
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::ERROR)
            .with_writer(Arc::clone(&events))
            .with_ansi(false)
            .with_target(false)
            .with_level(false)
            .without_time()
            .finish();
        tracing::subscriber::set_global_default(subscriber)?;
        Ok(Self {
            to: File::from(to),
            events,
        })
    }

    /// The process runs.
    pub(crate) fn started(&mut self, pid: i32, started_ns: u128) {
        // A shim that has gone cannot be told; its successor finds the container by its cgroup.
        let line = format!("ok {pid} {started_ns}\n");
        let _ = self.to.write_all(line.as_bytes());
    }

    /// It does not run, and why.
    pub(crate) fn failed(&mut self, error: &anyhow::Error) {
        let text = readable(&format!("{error:#}"));
        let context = self.context().unwrap_or_default();
        let line = serde_json::json!({ "error": text, "context": context });
        let _ = self.to.write_all(format!("err {line}\n").as_bytes());
    }

    fn context(&self) -> io::Result<Vec<String>> {
        let mut events = self.events.as_ref();
        events.seek(SeekFrom::Start(0))?;
        let mut text = String::new();
        events.take(CONTEXT_BYTES_MAX).read_to_string(&mut text)?;
        Ok(text
            .lines()
            .take(CONTEXT_LINES_MAX)
            .map(|l| l.trim().to_owned())
            .collect())
    }
}

/// An error about the container's own command, without the layers it came through.
fn readable(chain: &str) -> String {
    let Some(start) = chain.find(EXEC_ERROR) else {
        return chain.to_owned();
    };
    // The layers repeat their source: take it once.
    let rest = &chain[start..];
    let again = rest[1..]
        .find(EXEC_ERROR)
        .map_or(rest.len(), |next| next + 1);
    let once = &rest[..again];
    let end = once.find(": exec process failed").unwrap_or(once.len());
    once[..end].trim_end_matches([':', ' ']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::readable;

    #[test]
    fn the_commands_own_error_is_told_once_and_bare() {
        let wanted = r#"exec: "/bin/x": stat /bin/x: no such file or directory"#;
        let chain = format!("exec process failed with error {wanted}: {wanted}");
        assert_eq!(readable(&chain), wanted);
        assert_eq!(readable(wanted), wanted);
        assert_eq!(readable("cannot read /x: ENOENT"), "cannot read /x: ENOENT");
    }
}
