//! What each node must know, as one stream per agent, and the tunnels beside it.
//!
//! ```text
//!  store ──watch──► follow ──► Index ──step──► session (one per node) ──► Batch* Commit ──► agent
//!                                                 │ ▲ Ack, Beat, Status, Event
//!                       registry ◄── node, lease, status, removal of ended pods
//!  Pods.Logs, Pods.Exec ──► tunnels ── OpenTunnel ──► agent ── Feed.Tunnel ──► spliced to the client
//! ```
//! The rules, each forced by a counterexample of the model (R = store revision, V(R) = what a node
//! must know at R):
//! 1. An agent's state is V(R) of one R. A batch runs from the cursor to *now*, is staged, and takes
//!    effect at its Commit, whose digests must match.
//! 2. Latest state per key: no queue per stream, only a cursor ([`latest`]). At most two commits are
//!    open, so a slow agent gets a bigger next batch.
//! 3. A backend's state is joined here from slice, pod and node ([`join`]), never read from slices.
//! 4. The agent writes before it applies and acks after it has programmed.
//! 5. An ack is one number and stays true until the node reboots ([`floor`]).
//! 6. Every stream starts at a commit at or above the revision of its own registration.
//! 7. Sessions are numbered by a store write; a newer one of a node ends the older, and starts only
//!    when the older one's writes have settled. An agent start older than the last one seen is
//!    refused (annotation [`register::INCARNATION_ANNOTATION`], so also after a restart here), and
//!    within one start a status needs a higher number than the last.
//! 8. A final status is never overwritten by one that is not.
//! 9. A floor is the answer to a wait, never remembered: of a drain, or of a Service's first backend
//!    ([`programmed`]).
//!
//! 10. A node with the pods of an earlier lineage is asked before anybody decides about them ([`adopt`]).
//!
//! Resume: same lineage and a revision within the tombstones (or an equal digest) goes on by cursor;
//! else everything is sent. Digests by bucket, which would narrow that, may come later. The private
//! part goes by inventory: a Secret enters a node's view by a binding. So do policies and their peers
//! ([`policies`]) when a stream starts, by hashes of their content; then by difference, for they are many.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use gantry_api::proto;
use gantry_api::proto::feed_server::FeedServer;
use gantry_api::proto::images_server::ImagesServer;
use gantry_api::proto::pods_server::PodsServer;
use gantry_api::proto::stats_server::StatsServer;
use gantry_api::rules::{self, Rule};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::ranges::Ranges;
use crate::server::{Registry, Tokens};

mod adopt;
mod explain;
mod floor;
mod follow;
mod images;
mod join;
mod latest;
mod mirrors;
mod pods;
mod policies;
mod programmed;
mod register;
mod service;
mod session;
mod stats;
mod status;
mod token;
mod tunnels;
mod view;
mod volumes;

pub use pods::PodStreams;
pub use register::INCARNATION_ANNOTATION;
pub use stats::NodeStats;

use floor::Floors;
use tunnels::Tunnels;
use view::Index;

/// The largest message taken from an agent: a Hello names each peer of the node's policies, some 100
/// bytes for each of 65,536 that a node can program. A status with many containers is far below.
const UP_MESSAGE_BYTES_MAX: usize = 16 << 20;

/// The cluster's settings, told to every agent in Welcome, and the key for pods' tokens.
#[derive(Clone)]
pub struct Settings {
    /// `cluster.local`
    pub cluster_domain: String,
    /// The resolver address in pods' resolv.conf.
    pub dns_service_ip: Ipv4Addr,
    /// Where cluster IPs come from.
    pub service_cidr: Ranges,
    /// All nodes' pod prefixes lie within this.
    pub cluster_cidr: Ranges,
    /// Signs the tokens of pods' service accounts.
    pub tokens: Tokens,
}

/// The feed; clones share it.
///
/// Its locks are taken in this order and never across an `await`: index, nodes, a link's state.
#[derive(Clone)]
pub struct Feed {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    settings: Settings,
    index: RwLock<Index>,
    /// The index's revision, whatever changed.
    head: watch::Sender<u64>,
    /// The revision of the last change of the common part: wakes every session.
    common: watch::Sender<u64>,
    nodes: Mutex<BTreeMap<String, Arc<NodeLink>>>,
    /// Goes up when any node's acked revision does: wakes those that wait for a floor.
    acked: watch::Sender<u64>,
    tunnels: Tunnels,
    closed: CancellationToken,
    /// Its start; what is written in groups counts from here.
    epoch: tokio::time::Instant,
}

/// What is known of a node's agent beyond one stream.
struct NodeLink {
    /// Its private part changed.
    private: Notify,
    state: Mutex<LinkState>,
    /// Held by the session in charge; the next one waits for it.
    session: Arc<tokio::sync::Mutex<()>>,
    /// Streams for logs and exec that may still be opened.
    tunnel_slots: Arc<tokio::sync::Semaphore>,
}

#[derive(Default)]
struct LinkState {
    /// Ends the session in charge in favour of a newer one.
    kick: CancellationToken,
    /// The way to the session in charge, while it is past its welcome.
    tunnels: Option<mpsc::Sender<proto::OpenTunnel>>,
    boot_id: String,
    /// Everything common up to here is programmed: true until a reboot.
    acked: u64,
    /// The highest (incarnation, seq) taken of each pod.
    statuses: BTreeMap<String, (u64, u64)>,
}

impl NodeLink {
    fn new() -> Self {
        Self {
            private: Notify::new(),
            state: Mutex::default(),
            session: Arc::default(),
            tunnel_slots: Arc::new(tokio::sync::Semaphore::new(tunnels::TUNNELS_PER_NODE_MAX)),
        }
    }

    fn state(&self) -> MutexGuard<'_, LinkState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Feed {
    /// Reads the store and is ready to serve; [`Feed::run`] keeps it up to date.
    pub fn new(registry: Registry, settings: Settings) -> Self {
        let mut index = follow::load(registry.store());
        index.add_resolver(settings.dns_service_ip.into());
        let (rev, common_rev) = (index.rev(), index.common_rev());
        let inner = Inner {
            registry,
            settings,
            index: RwLock::new(index),
            head: watch::Sender::new(rev),
            common: watch::Sender::new(common_rev),
            nodes: Mutex::default(),
            acked: watch::Sender::new(0),
            tunnels: Tunnels::default(),
            closed: CancellationToken::new(),
            epoch: tokio::time::Instant::now(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Follows the store until `token`, then tells every agent to go away and come back.
    pub async fn run(&self, token: CancellationToken) {
        tokio::select! {
            () = follow::follow(&self.inner) => tracing::info!("the store closed, the feed ends"),
            () = programmed::write(&self.inner) => {}
            () = token.cancelled() => {}
        }
        self.inner.closed.cancel();
    }

    /// The agents' service. Requests must carry an [`crate::server::identity::Identity`].
    pub fn feed_server(&self) -> FeedServer<Feed> {
        FeedServer::new(self.clone()).max_decoding_message_size(UP_MESSAGE_BYTES_MAX)
    }

    /// Logs and exec, for users.
    pub fn pods_server(&self) -> PodsServer<PodStreams> {
        PodsServer::new(PodStreams::new(self.clone()))
    }

    /// What nodes and pods use, for users.
    pub fn stats_server(&self) -> StatsServer<NodeStats> {
        StatsServer::new(NodeStats::new(self.clone()))
    }

    /// The images of nodes, for users.
    pub fn images_server(&self) -> ImagesServer<images::NodeImages> {
        ImagesServer::new(images::NodeImages::new(self.clone()))
    }

    /// Up to which revision the agent of a node has said that everything common is programmed.
    pub fn acked(&self, node: &str) -> u64 {
        let link = self.inner.known_link(node);
        link.map_or(0, |link| link.state().acked)
    }

    /// Whether the agent of a node has a stream now.
    pub fn is_connected(&self, node: &str) -> bool {
        self.inner
            .known_link(node)
            .is_some_and(|link| link.state().tunnels.is_some())
    }
}

/// For fuzz targets: takes these keys and values as changes of the store, one revision each, and steps every
/// node that is named. Whatever the values are, they are left out or shown. Returns how many items were sent.
pub fn index_untrusted(changes: &[(String, Option<bytes::Bytes>)]) -> usize {
    let mut index = Index::new(0);
    let mut cursor = view::Cursor::default();
    let mut count = 0;
    for (rev, (key, value)) in (1..).zip(changes) {
        index.apply(key, value.as_ref(), rev);
        index.advance(rev);
        count += index
            .step("n1", &mut cursor)
            .map_or(0, |step| step.items.len());
    }
    count
}

impl Inner {
    fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn index_mut(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn nodes(&self) -> MutexGuard<'_, BTreeMap<String, Arc<NodeLink>>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link(&self, node: &str) -> Arc<NodeLink> {
        let mut nodes = self.nodes();
        nodes
            .entry(node.into())
            .or_insert_with(|| Arc::new(NodeLink::new()))
            .clone()
    }

    /// The link of a node that has spoken to this process.
    fn known_link(&self, node: &str) -> Option<Arc<NodeLink>> {
        self.nodes().get(node).cloned()
    }

    /// Takes a node's claim that everything common up to `rev` is programmed.
    fn note_acked(&self, link: &NodeLink, rev: u64) {
        // A number from the future is of another history.
        if rev > self.index().rev() {
            return;
        }
        let mut state = link.state();
        if rev > state.acked {
            state.acked = rev;
            drop(state);
            self.acked.send_modify(|count| *count += 1);
        }
    }

    /// The minimum acked revision over all registered nodes that are not dead.
    fn floors(&self) -> Floors {
        let index = self.index();
        let nodes = self.nodes();
        let acked = |name: &str| nodes.get(name).map_or(0, |link| link.state().acked);
        let is_counted = |name: &str| match rules::is_off(Rule::FloorOfAbsent) {
            false => true,
            true => nodes
                .get(name)
                .is_some_and(|link| link.state().tunnels.is_some()),
        };
        let participants = index
            .nodes()
            .filter(|(name, dead)| !dead && is_counted(name));
        Floors::new(
            participants
                .map(|(name, _)| (name.to_owned(), acked(name)))
                .collect(),
            index.rev(),
            index.common_rev(),
        )
    }
}
