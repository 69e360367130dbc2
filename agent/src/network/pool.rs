//! Sandboxes made in advance, so that a pod's start waits neither for new namespaces nor for wires.
//!
//! ```text
//! fill (when nobody waits): unshare on a thread ─► descriptors ─► wires ─► ready ─┐
//! take (a pod's start): a set that fits, or none: then the pod makes its own   ◄──┘
//! ```
//! A set is held by descriptors of this process and by nothing else: when the agent ends, however
//! it ends, the kernel takes namespaces and link away. A lease stays, and the next agent's `retain`
//! gives it back.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gantry_cni::netns::Netns;
use ipnet::IpNet;
use nix::sched::{CloneFlags, setns, unshare};

use super::NetworkError;
use super::namespaces::Kinds;
use super::pod_networks::from_cni;
use super::wires::{Wirer, Wires, new_container};

/// Since the last pod's start: those that start now come first, for making links takes the kernel's
/// lock of all interfaces and a pod's whole start is not much longer.
const QUIET: Duration = Duration::from_millis(150);
/// Between two sets.
const PAUSE: Duration = Duration::from_millis(20);

/// net, ipc and uts that no process is in.
pub(super) struct Ready {
    files: Vec<(&'static str, File)>,
    /// The attachment of net; none: the pod's ADD is still to be done.
    pub wires: Option<Wires>,
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
            wires: None,
        })
    }

    /// The calling thread becomes a member, as if it had just made them.
    pub(super) fn enter(&self) -> io::Result<()> {
        // An empty set of kinds: whatever the descriptor is.
        let enter = |(_, file): &(&str, File)| setns(file, CloneFlags::empty());
        Ok(self.files.iter().try_for_each(enter)?)
    }

    fn netns(&self) -> Result<Netns, NetworkError> {
        let net = self.files.iter().find(|(name, _)| *name == "net");
        let number = net.map_or(-1, |(_, file)| file.as_raw_fd());
        let path = PathBuf::from(format!("/proc/self/fd/{number}"));
        Netns::open(&path).map_err(from_cni)
    }

    fn prefixes(&self) -> Option<&Vec<IpNet>> {
        self.wires.as_ref().map(|wires| &wires.prefixes)
    }
}

/// The sets that are ready.
pub(super) struct Pool {
    /// Sets kept ready.
    count: usize,
    ready: Mutex<VecDeque<Ready>>,
    /// When a pod last asked.
    asked: Mutex<Option<Instant>>,
    /// Containers of attachments that are in no record yet.
    held: Mutex<HashSet<String>>,
    filling: AtomicBool,
}

impl Pool {
    /// Keeps `count` sets ready, a few pods at once. Each holds about 0.2 MiB of the kernel's memory.
    pub(super) fn new(count: usize) -> Self {
        Self {
            count,
            ready: Mutex::default(),
            asked: Mutex::default(),
            held: Mutex::default(),
            filling: AtomicBool::new(false),
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        lock(&self.ready).len()
    }

    /// The oldest set whose attachment is of these prefixes (none: that has no attachment). None
    /// when pods start faster than sets are made.
    pub(super) fn take(&self, prefixes: Option<&Vec<IpNet>>) -> Option<Ready> {
        *lock(&self.asked) = Some(Instant::now());
        let mut ready = lock(&self.ready);
        let fits = ready.iter().position(|set| set.prefixes() == prefixes)?;
        ready.remove(fits)
    }

    /// The set whose attachment has one of these addresses.
    pub(super) fn take_of(&self, addresses: &[IpAddr]) -> Option<Ready> {
        *lock(&self.asked) = Some(Instant::now());
        let mut ready = lock(&self.ready);
        let has = |set: &Ready| {
            let wires = set.wires.as_ref();
            wires.is_some_and(|wires| {
                let mut own = wires.attached.addresses.iter();
                own.any(|own| addresses.contains(&own.address.addr()))
            })
        };
        let has = ready.iter().position(has)?;
        ready.remove(has)
    }

    /// Whether an attachment is here, in the making, or taken and not yet in its pod's record.
    pub(super) fn is_held(&self, container: &str) -> bool {
        lock(&self.held).contains(container)
    }

    /// The attachment is in its pod's record now.
    pub(super) fn recorded(&self, container: &str) {
        lock(&self.held).remove(container);
    }

    /// Makes what lacks, in the background, and removes what pods would not be given any more.
    pub(super) fn fill(self: &Arc<Self>, wirer: &Arc<Wirer>) {
        let prefixes = wirer.prefixes();
        let (len, stale) = {
            let ready = lock(&self.ready);
            let stale = ready.iter().any(|set| set.prefixes() != prefixes.as_ref());
            (ready.len(), stale)
        };
        let enough = len >= self.count && !stale;
        if enough || self.filling.swap(true, Ordering::AcqRel) {
            return;
        }
        let (pool, wirer) = (Arc::clone(self), Arc::clone(wirer));
        tokio::spawn(async move {
            if let Err(error) = pool.fill_now(&wirer).await {
                // Pods make their own then, and say so if they cannot either.
                tracing::debug!(%error, "sandboxes in advance");
            }
            pool.filling.store(false, Ordering::Release);
        });
    }

    async fn fill_now(&self, wirer: &Wirer) -> Result<(), NetworkError> {
        self.discard(wirer, |set| set.prefixes() != wirer.prefixes().as_ref())
            .await;
        while lock(&self.ready).len() < self.count {
            tokio::time::sleep(PAUSE).await;
            while let Some(rest) = self.until_quiet() {
                tokio::time::sleep(rest).await;
            }
            let mut set = make().await?;
            if let Some(prefixes) = wirer.prefixes() {
                let container = new_container();
                let netns = set.netns()?;
                lock(&self.held).insert(container.clone());
                match wirer.wire(&netns, container.clone(), prefixes).await {
                    Ok(wires) => set.wires = Some(wires),
                    Err(error) => {
                        self.recorded(&container);
                        return Err(error);
                    }
                }
            }
            lock(&self.ready).push_back(set);
        }
        Ok(())
    }

    fn until_quiet(&self) -> Option<Duration> {
        let asked = (*lock(&self.asked))?;
        let rest = QUIET.checked_sub(asked.elapsed())?;
        (!rest.is_zero()).then_some(rest)
    }

    /// Gives sets back that no pod is to have. Returns how many.
    pub(super) async fn discard(&self, wirer: &Wirer, which: impl Fn(&Ready) -> bool) -> usize {
        let gone = {
            let mut ready = lock(&self.ready);
            let all = std::mem::take(&mut *ready).into_iter();
            let (gone, kept): (VecDeque<_>, VecDeque<_>) = all.partition(|set| which(set));
            *ready = kept;
            gone
        };
        let count = gone.len();
        for wires in gone.into_iter().filter_map(|set| set.wires) {
            let container = wires.container.clone();
            wirer.unwire(wires).await;
            self.recorded(&container);
        }
        count
    }
}

/// On a thread of its own, thrown away: it changes its namespaces.
async fn make() -> Result<Ready, NetworkError> {
    let failed = |source| NetworkError::Io {
        context: "make namespaces in advance".into(),
        source,
    };
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("namespaces-pool".into())
        .stack_size(128 * 1024)
        .spawn(move || drop(sender.send(Ready::make())))
        .map_err(failed)?;
    match receiver.await {
        Ok(made) => made.map_err(failed),
        Err(_) => Err(failed(io::Error::other("ended without an answer"))),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
