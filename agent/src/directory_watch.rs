//! When to look at the directory again: at once when it changes, and now and then in any case.
//!
//! A directory that is not there yet, a link's target that changes, and a kernel without inotify to
//! spare are why it is looked at by time too.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::readiness;

/// Between two looks at a directory that is watched.
const WATCHED: Duration = Duration::from_secs(20);
/// Between two looks otherwise, and while something is on its way.
const UNWATCHED: Duration = Duration::from_secs(1);
/// An editor's several steps are one change.
const SETTLE: Duration = Duration::from_millis(50);

/// A watch on a directory, where there is one.
pub(crate) struct Watch(Option<AsyncFd<File>>);

impl Watch {
    pub(crate) fn new() -> Self {
        Self(None)
    }

    /// Watches the directory unless that is done already; one that was removed is tried again.
    pub(crate) fn ensure(&mut self, directory: &Path) {
        if self.0.is_some() && directory.exists() {
            return;
        }
        let begin = || -> std::io::Result<AsyncFd<File>> {
            let descriptor = init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
            let changes = WatchFlags::CLOSE_WRITE
                | WatchFlags::MOVED_FROM
                | WatchFlags::MOVED_TO
                | WatchFlags::CREATE
                | WatchFlags::DELETE
                | WatchFlags::DELETE_SELF
                | WatchFlags::MOVE_SELF
                | WatchFlags::ATTRIB
                | WatchFlags::ONLYDIR;
            add_watch(&descriptor, directory, changes)?;
            readiness::watch(File::from(descriptor), Interest::READABLE)
        };
        self.0 = begin().ok();
    }

    /// Returns when it is time for a look. Cancel-safe: what was not read wakes the next call.
    pub(crate) async fn changed(&self, is_busy: bool) {
        let Some(watched) = &self.0 else {
            return tokio::time::sleep(UNWATCHED).await;
        };
        let limit = if is_busy { UNWATCHED } else { WATCHED };
        tokio::select! {
            // Cancel-safe: a timer, and readiness that stays until it is taken.
            () = tokio::time::sleep(limit) => {}
            ready = watched.readable() => {
                let Ok(mut guard) = ready else { return tokio::time::sleep(UNWATCHED).await };
                tokio::time::sleep(SETTLE).await;
                // What has changed is found by looking.
                let mut events = [0; 4096];
                while matches!(guard.get_inner().read(&mut events), Ok(1..)) {}
                guard.clear_ready();
            }
        }
    }
}
