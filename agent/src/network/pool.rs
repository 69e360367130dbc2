//! Namespaces made in advance, so that a pod's start does not wait for a new network namespace.
//!
//! ```text
//! fill (a thread, when nobody waits): unshare ─► descriptors ─► ready ─┐
//! take (a pod's start): a set, or none: then the pod makes its own  ◄──┘─► pinned in its directory
//! ```
//! A set is held by descriptors of this process and by nothing else: when the agent ends, however
//! it ends, the kernel takes them away, and there is nothing to clean up or to count.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};

use super::namespaces::Kinds;

/// Sets kept ready: a few pods at once. Each holds about 0.2 MiB of the kernel's memory.
const READY_COUNT: usize = 4;
/// Before each new one: pods that start now come first.
const PAUSE: Duration = Duration::from_millis(100);

/// net, ipc and uts that no process is in.
pub(super) struct Ready {
    files: Vec<(&'static str, File)>,
}

impl Ready {
    /// Made by the calling thread, which is a member of the newest one until it ends.
    fn make() -> io::Result<Self> {
        unshare(Kinds::Own.flags())?;
        let open =
            |name: &&'static str| Ok((*name, File::open(format!("/proc/thread-self/ns/{name}"))?));
        let files = Kinds::Own.names().iter().map(open);
        Ok(Self {
            files: files.collect::<io::Result<_>>()?,
        })
    }

    /// The calling thread becomes a member, as if it had just made them.
    pub(super) fn enter(&self) -> io::Result<()> {
        // An empty set of kinds: whatever the descriptor is.
        let enter = |(_, file): &(&str, File)| setns(file, CloneFlags::empty());
        Ok(self.files.iter().try_for_each(enter)?)
    }
}

/// The sets that are ready.
#[derive(Default)]
pub(super) struct Pool {
    ready: Mutex<VecDeque<Ready>>,
    filling: AtomicBool,
}

impl Pool {
    /// None when pods start faster than namespaces are made.
    pub(super) fn take(&self) -> Option<Ready> {
        self.lock().pop_front()
    }

    /// Makes what lacks, in the background.
    pub(super) fn fill(self: &Arc<Self>) {
        if self.lock().len() >= READY_COUNT || self.filling.swap(true, Ordering::AcqRel) {
            return;
        }
        let pool = Arc::clone(self);
        // A thread of its own, thrown away: it changes its namespaces.
        let thread = std::thread::Builder::new()
            .name("namespaces-pool".into())
            .stack_size(128 * 1024)
            .spawn(move || {
                if let Err(error) = pool.fill_now() {
                    // Pods make their own then, and say so if they cannot either.
                    tracing::debug!(%error, "namespaces in advance");
                }
                pool.filling.store(false, Ordering::Release);
            });
        if thread.is_err() {
            self.filling.store(false, Ordering::Release);
        }
    }

    fn fill_now(&self) -> io::Result<()> {
        while self.lock().len() < READY_COUNT {
            std::thread::sleep(PAUSE);
            let ready = Ready::make()?;
            self.lock().push_back(ready);
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Ready>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::namespaces;
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::time::Instant;

    #[tokio::test]
    async fn a_pod_gets_a_ready_set_with_its_own_name_and_the_pool_fills_again() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let pool = Arc::new(Pool::default());
        let full = |pool: &Arc<Pool>| {
            pool.fill();
            let end = Instant::now() + Duration::from_secs(60);
            while pool.lock().len() < READY_COUNT && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
            assert_eq!(pool.lock().len(), READY_COUNT);
        };
        assert!(pool.take().is_none());
        full(&pool);
        let base = tempfile::tempdir().unwrap();
        let inode = |file: &File| file.metadata().unwrap().ino();
        let wanted = inode(&pool.lock()[0].files[0].1);
        let mut seen = Vec::new();
        for name in ["one", "two"] {
            let dir = base.path().join(name);
            let take = || pool.take();
            let made = namespaces::ensure(dir.clone(), Kinds::Own, name.into(), take).await;
            assert!(made.unwrap());
            seen.push(fs::metadata(dir.join("net")).unwrap().ino());
            // Pinned already: nothing is taken.
            let again = namespaces::ensure(dir.clone(), Kinds::Own, name.into(), || panic!());
            assert!(!again.await.unwrap());
            let uts = File::open(dir.join("uts")).unwrap();
            let told = std::thread::spawn(move || {
                nix::sched::setns(&uts, nix::sched::CloneFlags::CLONE_NEWUTS).unwrap();
                nix::unistd::gethostname().unwrap()
            });
            assert_eq!(told.join().unwrap(), name);
        }
        assert!(seen[0] == wanted && seen[0] != seen[1]);
        assert_eq!(pool.lock().len(), READY_COUNT - 2);
        full(&pool);
        for name in ["one", "two"] {
            namespaces::remove(&base.path().join(name)).unwrap();
        }
    }
}
