//! Socket repair: sockets of this node that still point at a backend which has gone are ended at
//! once, so that their owners ask the Service again instead of waiting for an answer or a time-out.
//!
//! ```text
//!  apply: what has gone (services::gone) ──► thread: PEERS, whose backend has gone? ──► none: done
//!                                                       │ cookies
//!                       every namespace of a pod, and the node's: which sockets are these? ──► end them
//! ```
//! Only sockets that went through a Service are in PEERS, and the kernel compares the cookie: no other
//! socket can be meant. A second look a second later finds what was connecting in between, and what
//! could not be ended. The work is bounded by the sockets of the node, and there is none where
//! nothing is stale, which is the common case: a backend that ends in order has said so itself.
//!
//! The same thread repairs the counts of connections (`services::counts`), while there are any.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aya::maps::{HashMap, MapData};
use ebpf_maps::services::{PEER_COUNT_MAX, PeerValue};
use gantry_cni::netns::Netns;
use gantry_cni::sock_diag::{SockDiag, Transport};

use super::DataplaneError;
use super::sys::MappedArray;
use super::tables::traffic_words;
use crate::paths::Paths;
use crate::services::counts::{Counts, corrections};
use crate::services::gone::{Target, present};
use crate::services::index::{TCP, UDP, ip_of};
use crate::services::plan::BackendId;
use crate::view::View;

/// Changes that wait for the thread; more are found at the next look at everything.
const QUEUE: usize = 64;
/// When it is looked a second time.
const AGAIN: Duration = Duration::from_secs(1);

/// How often counts are compared with what is connected.
const RECOUNT: Duration = Duration::from_secs(30);

/// Backend, and by which protocols it was reached.
type Stale = BTreeMap<(IpAddr, u16), BTreeSet<Transport>>;

/// The way to the thread, which ends with it.
pub(super) struct Repair {
    sender: SyncSender<Work>,
    ended: Arc<AtomicU64>,
    missed: AtomicBool,
    counted: Arc<Mutex<BTreeSet<u32>>>,
}

struct Work {
    /// What has gone; none: look at everything, as after a restart.
    targets: Option<BTreeSet<Target>>,
    view: View,
    /// What is programmed beside the view's backends, where everything is looked at: the node's own
    /// resolver, host ports. Put in order by the thread, if there is anything to compare it with.
    programmed: Vec<(IpAddr, u16)>,
}

impl Repair {
    pub(super) fn start(
        paths: &Paths,
        peers: HashMap<MapData, u64, PeerValue>,
        traffic: MappedArray<u64>,
    ) -> Result<Self, DataplaneError> {
        let (sender, receiver) = sync_channel(QUEUE);
        let ended = Arc::<AtomicU64>::default();
        let counted = Arc::<Mutex<BTreeSet<u32>>>::default();
        let worker = Worker {
            pods: paths.run.join("pods"),
            peers,
            traffic,
            ended: ended.clone(),
            counted: counted.clone(),
        };
        let thread = std::thread::Builder::new().name("socket-repair".into());
        let started = thread
            .stack_size(256 * 1024)
            .spawn(move || worker.run(&receiver));
        started.map_err(|error| DataplaneError::kernel("start a thread", &error))?;
        Ok(Self {
            sender,
            ended,
            missed: AtomicBool::new(false),
            counted,
        })
    }

    /// Ends what points at `targets`, unless `view` has them; does not wait for it.
    pub(super) fn end(&self, targets: BTreeSet<Target>, view: &View) {
        if !targets.is_empty() {
            self.give(Some(targets), view, Vec::new());
        }
    }

    /// Looks at every socket that went through a Service: for what went while no agent ran.
    ///
    /// * `programmed` – where backends are now, those of no Service among them.
    pub(super) fn look(&self, view: &View, programmed: Vec<(IpAddr, u16)>) {
        self.give(None, view, programmed);
    }

    /// A change could not be given to the thread: only a [`Repair::look`] finds what it was about.
    pub(super) fn has_missed(&self) -> bool {
        self.missed.swap(false, Ordering::Relaxed)
    }

    /// The backends whose connections are counted; replaces those told before.
    pub(super) fn count(&self, ids: BTreeSet<u32>, view: &View) {
        let begins = {
            let mut counted = lock(&self.counted);
            let begins = counted.is_empty() && !ids.is_empty();
            *counted = ids;
            begins
        };
        if begins {
            self.give(Some(BTreeSet::new()), view, Vec::new()); // the thread has to look at its clock
        }
    }

    /// Sockets ended since the start.
    pub(super) fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }

    fn give(&self, targets: Option<BTreeSet<Target>>, view: &View, programmed: Vec<(IpAddr, u16)>) {
        let work = Work {
            targets,
            view: view.clone(),
            programmed,
        };
        if let Err(TrySendError::Full(_)) = self.sender.try_send(work) {
            self.missed.store(true, Ordering::Relaxed);
        }
    }
}

struct Worker {
    pods: PathBuf,
    peers: HashMap<MapData, u64, PeerValue>,
    ended: Arc<AtomicU64>,
    traffic: MappedArray<u64>,
    counted: Arc<Mutex<BTreeSet<u32>>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker {
    fn run(mut self, receiver: &Receiver<Work>) {
        let (mut again, mut differences) = (Stale::new(), Counts::new());
        let mut recounted = Instant::now();
        loop {
            let recount_in = RECOUNT.saturating_sub(recounted.elapsed());
            // Not in the match: the guard would be held as long as that waits.
            let counts_nothing = lock(&self.counted).is_empty();
            let first = match (again.is_empty(), counts_nothing) {
                (false, _) => receiver.recv_timeout(AGAIN),
                (true, false) => receiver.recv_timeout(recount_in),
                (true, true) => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            let mut stale = std::mem::take(&mut again);
            match first {
                Ok(work) => {
                    let more = std::iter::from_fn(|| receiver.try_recv().ok());
                    let all: Vec<Work> = std::iter::once(work).chain(more).collect();
                    let fresh = self.stale(&all);
                    again.clone_from(&fresh);
                    stale.extend(fresh);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if recounted.elapsed() >= RECOUNT {
                recounted = Instant::now();
                differences = self.recount(&differences);
            }
            if let Err(error) = self.repair(&stale) {
                tracing::warn!(%error, "sockets to backends that have gone may hang");
            }
        }
    }

    /// What of all that is not there in the newest view.
    fn stale(&self, all: &[Work]) -> Stale {
        let Some(newest) = all.last() else {
            return Stale::new();
        };
        let mut stale = Stale::new();
        let looks = all.iter().any(|work| work.targets.is_none());
        let connected: Vec<(IpAddr, u16)> = match looks {
            true => self.connected().map(|(_, place)| place).collect(),
            false => Vec::new(),
        };
        let has_targets = all
            .iter()
            .any(|work| work.targets.as_ref().is_some_and(|own| !own.is_empty()));
        if connected.is_empty() && !has_targets {
            return stale; // as at a node's first start: of 30,000 Services nothing is put in order
        }
        let mut there = present(&newest.view);
        there.extend(all.iter().flat_map(|work| &work.programmed));
        let targets = all
            .iter()
            .filter_map(|work| work.targets.as_ref())
            .flatten();
        for target in targets {
            let place = (target.address, target.port);
            let transport = match target.proto {
                TCP => Transport::Tcp,
                UDP => Transport::Udp,
                _ => continue,
            };
            if !there.contains(&place) {
                stale.entry(place).or_default().insert(transport);
            }
        }
        // Whether a pod has ended or only left its Service is not known any more: see `gone`.
        for place in connected {
            if !there.contains(&place) {
                stale.entry(place).or_default().insert(Transport::Udp);
            }
        }
        stale
    }

    /// Repairs counts that have drifted; returns differences to look at again.
    fn recount(&mut self, before: &Counts) -> Counts {
        let ids = lock(&self.counted).clone();
        let connections = |id: u32| traffic_words(BackendId(id))[0];
        let read = |id: u32| Some((id, self.traffic.read(connections(id)).ok()?? as i64));
        let counted: Counts = ids.into_iter().filter_map(read).collect();
        if counted.is_empty() {
            return Counts::new();
        }
        let mut held = Counts::new();
        let entries = self.peers.iter().take(2 * PEER_COUNT_MAX as usize);
        for (_, peer) in entries.filter_map(Result::ok) {
            *held.entry(peer.backend_id).or_default() += 1;
        }
        let (right, differences) = corrections(&counted, &held, before);
        for (id, count) in right {
            if let Err(error) = self.traffic.write(connections(id), count as u64) {
                tracing::warn!(id, %error, "a count of connections is wrong");
            }
        }
        differences
    }

    /// Sockets that went through a Service, by cookie, and where to.
    fn connected(&self) -> impl Iterator<Item = (u64, (IpAddr, u16))> {
        // The programs change the map meanwhile; the kernel then begins anew, so there is a bound.
        let entries = self.peers.iter().take(2 * PEER_COUNT_MAX as usize);
        entries.filter_map(Result::ok).map(|(cookie, peer)| {
            let place = (ip_of(&peer.backend), u16::from_be(peer.backend_port_be));
            (cookie, place)
        })
    }

    fn repair(&self, stale: &Stale) -> Result<(), gantry_cni::CniError> {
        if stale.is_empty() {
            return Ok(());
        }
        let stale_sockets = self
            .connected()
            .filter(|(_, place)| stale.contains_key(place));
        let mut cookies: BTreeSet<u64> = stale_sockets.map(|(cookie, _)| cookie).collect();
        let transports: BTreeSet<Transport> = stale.values().flatten().copied().collect();
        let mut failure = None;
        for netns in self.namespaces() {
            if cookies.is_empty() {
                break;
            }
            for transport in &transports {
                match self.repair_in(&netns, *transport, stale, &mut cookies) {
                    Ok(()) => {}
                    Err(error) => failure = Some(error),
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    fn repair_in(
        &self,
        netns: &Netns,
        transport: Transport,
        stale: &Stale,
        cookies: &mut BTreeSet<u64>,
    ) -> Result<(), gantry_cni::CniError> {
        let mut diag = SockDiag::open_in(netns)?;
        for socket in diag.sockets(transport)? {
            let place = stale.get(&(socket.peer, socket.peer_port));
            let is_meant = place.is_some_and(|transports| transports.contains(&transport));
            if !is_meant || !cookies.contains(&socket.cookie) {
                continue;
            }
            if diag.destroy(&socket)? {
                self.ended.fetch_add(1, Ordering::Relaxed);
                let (peer, port) = (socket.peer, socket.peer_port);
                tracing::info!(%peer, port, ?transport, "ended a socket: its backend has gone");
            }
            cookies.remove(&socket.cookie);
        }
        Ok(())
    }

    /// The node's own namespace, which this thread never leaves for good, and those of its pods.
    fn namespaces(&self) -> impl Iterator<Item = Netns> {
        let pods = std::fs::read_dir(&self.pods)
            .into_iter()
            .flatten()
            .flatten();
        let paths = pods.map(|pod| pod.path().join("ns/net"));
        let own = Netns::current().ok();
        own.into_iter()
            .chain(paths.filter_map(|path| Netns::open(&path).ok()))
    }
}
