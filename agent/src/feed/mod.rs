//! The one stream to the control plane: the view comes down, statuses and acks go up.
//!
//! ```text
//!  Boot ─► Load (disk) ─► Dial ─► Hello ─► Sync (staging) ─► Live ──┐
//!            │ view published    ▲                                  │ broken, GoAway, mismatch
//!            ▼ at once           └──── jittered back-off ◄──────────┘
//!        Link::Offline                Link::Syncing      Link::Live
//! ```
//! Entry point: [`run`]. It publishes `watch::Receiver<Arc<View>>`, one whole [`View`] per commit,
//! takes statuses, events and acks through [`Reporter`], and serves logs and exec through
//! [`TunnelTarget`]. With the control plane gone the view from the disk stays in force.
//!
//! Invariants (numbers: rules of the feed, `control/src/feed/mod.rs`):
//! * what readers see is V(R) of one R (1): a batch is staged, checked against the Commit's digests,
//!   written to disk, then applied; a mismatch discards it and asks for everything;
//! * an ack says what was programmed, after it was (4, 5); it never falls;
//! * statuses have effect exactly once ([`reports`]); final ones survive a power cut ([`finals`]);
//! * what has ended here never starts here again, whatever a restored store says ([`tombstones`]);
//! * no wall clock decides anything; no port is opened: tunnels are streams of our own connection.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use gantry_api::k8s_openapi::api::core::v1::{Event, Node, PodStatus};
use gantry_api::proto;
use gantry_api::rules::{self, Rule};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::dataplane::StuckService;
use crate::ids::PodUid;
use crate::paths::Paths;
use crate::runtime::ExecSession;
use crate::view::{Settings, View};

mod content;
mod dial;
mod driver;
mod finals;
mod floors;
mod log;
pub mod node_info;
mod renewal;
mod reports;
mod secrets;
mod session;
mod tokens;
mod tombstones;
mod tunnel;

pub use dial::{Dialer, Dialling, Wire};
use finals::Finals;
use floors::FloorWaits;
use reports::{Reports, Status};
pub use tokens::ControlPlaneTokens;

/// Events that wait for the stream; more push out the oldest, and their number is logged.
const EVENTS_MAX: usize = 1_000;
/// How long an event waits: what it tells of has just happened, and the status that tells it too is
/// not to share the processors with it.
const EVENT_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);
/// Services named in one ack.
const STUCK_MAX: usize = 64;

/// Where the control plane is and who this node is.
#[derive(Clone, Debug)]
pub struct Config {
    /// `https://control.example:6443`, or several of them with commas between: one after the other is dialled
    /// until one answers
    pub server: String,
    /// Directory of [`crate::credentials`]; read again at every dial.
    pub credentials: PathBuf,
    /// This node's name: the certificate's CN is `system:node:<name>`.
    pub node: String,
    /// `/var/lib/gantry`: the feed keeps its files in `feed/` below it.
    pub lib: PathBuf,
    /// `/run/gantry`, on tmpfs: Secrets are kept in `secrets/` below it.
    pub run: PathBuf,
    /// Time between beats; the control plane gives a node up after 40 s without one.
    pub beat: Duration,
    /// The longest wait between two dials.
    pub backoff_max: Duration,
    /// How long pods run on that a restored control plane does not know.
    pub linger: Duration,
    /// Another way to the control plane than TCP: the simulation's.
    pub dialer: Option<Dialer>,
}

impl Config {
    /// The standard intervals: a beat every 5 s, at most 10 s between dials, 5 minutes for pods that a
    /// restored control plane does not know.
    pub fn new(server: String, credentials: PathBuf, node: String, paths: &Paths) -> Self {
        let (lib, run) = (paths.lib.clone(), paths.run.clone());
        let (beat, backoff_max) = (Duration::from_secs(5), Duration::from_secs(10));
        Self {
            server,
            credentials,
            node,
            lib,
            run,
            beat,
            backoff_max,
            linger: Duration::from_secs(300),
            dialer: None,
        }
    }
}

/// Tells the machine's side of the Node object: at every Hello, and its conditions at every beat.
pub type NodeInfoSource = Arc<dyn Fn() -> Node + Send + Sync>;

/// How the stream stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Link {
    /// No stream; the view is the last one known, perhaps from disk.
    Offline,
    /// A stream, and no commit on it yet.
    Syncing,
    /// The view is the control plane's.
    Live {
        /// The session's number.
        session: u64,
    },
    /// The control plane has an older history than this node, or does not know the node (any more): the
    /// reason. The node goes on with its view and tries again slowly.
    Refused(String),
}

/// Why a tunnel's target cannot be reached, for the person who asked.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TunnelError(pub String);

/// What tunnels end in: the pods of this node.
#[async_trait]
pub trait TunnelTarget: Send + Sync + 'static {
    /// A container's log; with `follow` the stream ends with the container. Dropping it ends it.
    async fn logs(
        &self,
        request: proto::LogsRequest,
        pod: PodUid,
    ) -> Result<BoxStream<'static, Result<Bytes, TunnelError>>, TunnelError>;

    /// What this node and its pods use.
    async fn usage(&self) -> Result<proto::NodeUsage, TunnelError> {
        Err(TunnelError("this agent does not measure usage".into()))
    }

    /// Deletes the directory of a volume that class `local` made here; absent is fine.
    async fn remove_volume(&self, name: &str) -> Result<(), TunnelError> {
        Err(TunnelError(format!("this agent has no volume {name:?}")))
    }

    /// Lists or changes this node's images. An import reads its archive from `archive`; how far it
    /// is, and the last answer, go to `answers`. Dropping it ends a pull.
    async fn images(
        &self,
        _request: proto::ImagesRequest,
        _archive: mpsc::Receiver<Bytes>,
        _answers: mpsc::Sender<proto::images_answer::Answer>,
    ) -> Result<(), TunnelError> {
        Err(TunnelError("this agent has no images".into()))
    }

    /// Services as this node has them programmed.
    async fn services(
        &self,
        _request: &proto::ServicesRequest,
    ) -> Result<Vec<proto::ProgrammedService>, TunnelError> {
        Err(TunnelError("this agent programs no Services".into()))
    }

    /// Flows of this node; dropping the stream ends the watch.
    fn flows(
        &self,
        _request: &proto::FlowsRequest,
    ) -> Result<BoxStream<'static, proto::NodeFlows>, TunnelError> {
        Err(TunnelError("this agent tells of no flows".into()))
    }

    /// The part of the client's node in whether a pod would connect.
    async fn explain_client(
        &self,
        _request: proto::ExplainClient,
        _pod: PodUid,
    ) -> Result<proto::ExplainHalf, TunnelError> {
        Err(TunnelError("this agent explains nothing".into()))
    }

    /// The part of the server's node.
    async fn explain_server(
        &self,
        _request: proto::ExplainServer,
    ) -> Result<proto::ExplainHalf, TunnelError> {
        Err(TunnelError("this agent explains nothing".into()))
    }

    /// What this node has dropped, by reason.
    fn drops(&self) -> Result<Vec<proto::DroppedPackets>, TunnelError> {
        Err(TunnelError("this agent counts no packets".into()))
    }

    /// A connection to a port of the pod, on its own loopback.
    async fn forward(&self, port: u16, pod: PodUid) -> Result<tokio::net::TcpStream, TunnelError>;

    /// A command in a running container, which dropping the session kills; or, with `attach`, the
    /// container's own streams.
    async fn exec(&self, start: proto::ExecStart, pod: PodUid) -> Result<ExecSession, TunnelError>;
}

/// Why the feed cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file below `<lib>/feed`.
    #[error("{0}")]
    Disk(String),
}

/// Counts of what went wrong and was healed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Commits refused because the content did not have the commit's digest.
    pub digest_mismatches: u64,
    /// Streams that ended.
    pub streams_broken: u64,
    /// Events dropped because the ring was full.
    pub events_dropped: u64,
    /// Commits applied.
    pub commits: u64,
}

/// What [`run`] gives.
pub struct Handle {
    /// The newest view; the first one is what the disk held.
    pub view: watch::Receiver<Arc<View>>,
    /// How the stream stands.
    pub link: watch::Receiver<Link>,
    /// The way up.
    pub reporter: Reporter,
    /// Tokens of service accounts.
    pub tokens: ControlPlaneTokens,
    /// Ends after the shutdown signal, when the files are on the disk.
    pub task: tokio::task::JoinHandle<()>,
}

/// What the parts of the feed share.
struct Shared {
    reports: Mutex<Reports>,
    outbox: Mutex<Outbox>,
    floors: Mutex<FloorWaits>,
    /// Something to send.
    wake: Notify,
    /// A final status to be written to disk.
    persist: Notify,
    /// A final status was written to disk.
    persisted: watch::Sender<u64>,
    /// The connection of the open stream.
    channel: Mutex<Option<Channel>>,
    /// The certificate was renewed: the stream is to be on it by then.
    move_by: Mutex<Option<tokio::time::Instant>>,
}

impl Shared {
    fn new(reports: Reports) -> Self {
        Self {
            reports: Mutex::new(reports),
            outbox: Mutex::default(),
            floors: Mutex::default(),
            wake: Notify::new(),
            persist: Notify::new(),
            persisted: watch::Sender::new(0),
            channel: Mutex::default(),
            move_by: Mutex::default(),
        }
    }
}

#[derive(Default)]
struct Outbox {
    /// Static pods, to be shown by the control plane; none: nothing new to say.
    mirrors: Option<Vec<Bytes>>,
    /// The mirror pod of each static pod, and what was last said of it.
    aliases: BTreeMap<PodUid, Alias>,
    /// Each with the time from which it may be sent.
    events: VecDeque<(tokio::time::Instant, Bytes)>,
    programmed: u64,
    stuck: Vec<proto::Stuck>,
    ack_due: bool,
    /// The node's conditions are to go up now.
    beat_due: bool,
    counters: Counters,
}

/// A static pod's status goes up under the name of its mirror pod, which may be another one
/// tomorrow: each gets the newest status anew.
#[derive(Default)]
struct Alias {
    mirror: Option<PodUid>,
    status: Option<Status>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The way up, for pod workers and the data plane. Cheap to clone; never blocks on the network.
#[derive(Clone)]
pub struct Reporter {
    shared: Arc<Shared>,
}

impl Reporter {
    /// Without a stream, for tests of those who report.
    #[cfg(test)]
    pub(crate) fn alone() -> Self {
        let shared = Arc::new(Shared::new(Reports::new(1, [])));
        Self { shared }
    }

    /// Gives a pod's newest status; repeated until the control plane holds it.
    ///
    /// * `final_` – every container has ended for good: no later status can take that back.
    /// * `released` – nothing of the pod is left on this node: the object of a deleted pod may go.
    pub fn status(
        &self,
        uid: &PodUid,
        namespace: &str,
        name: &str,
        status: &PodStatus,
        final_: bool,
        released: bool,
    ) {
        let json = match serde_json::to_vec(status) {
            // Boxed, so that it keeps no room to grow.
            Ok(json) => Bytes::from(json.into_boxed_slice()),
            Err(error) => return tracing::error!(pod = %uid, %error, "status cannot be encoded"),
        };
        let status = Status {
            namespace: namespace.into(),
            name: name.into(),
            json,
            is_final: final_,
            released,
            is_mirror: false,
        };
        let Some((uid, status)) = self.translate(uid, status) else {
            return;
        };
        if lock(&self.shared.reports).status(&uid, status) {
            if final_ {
                self.shared.persist.notify_one()
            } else {
                self.shared.wake.notify_one()
            }
        }
    }

    /// Of a static pod: its mirror's UID, and never a last word, since the next mirror wants one too.
    fn translate(&self, uid: &PodUid, mut status: Status) -> Option<(PodUid, Status)> {
        let mut outbox = lock(&self.shared.outbox);
        let Some(alias) = outbox.aliases.get_mut(uid) else {
            return Some((uid.clone(), status));
        };
        status.is_final = false;
        status.released = false;
        alias.status = Some(status.clone());
        Some((alias.mirror.clone()?, status))
    }

    /// Names the static pods and, where the control plane has one, their mirror pods. A new mirror
    /// gets the status that was last given.
    pub fn static_pods(&self, mirrors: Vec<(PodUid, Option<PodUid>)>) {
        let mut due = Vec::new();
        {
            let mut outbox = lock(&self.shared.outbox);
            let mut before = std::mem::take(&mut outbox.aliases);
            for (uid, mirror) in mirrors {
                let mut alias = before.remove(&uid).unwrap_or_default();
                if alias.mirror != mirror {
                    alias.mirror.clone_from(&mirror);
                    due.extend(mirror.zip(alias.status.clone()));
                }
                outbox.aliases.insert(uid, alias);
            }
        }
        for (mirror, status) in due {
            if lock(&self.shared.reports).status(&mirror, status) {
                self.shared.wake.notify_one();
            }
        }
    }

    /// Asks the control plane to show exactly these static pods; repeated by the caller until the
    /// view has them.
    pub fn mirror(&self, pods: Vec<Bytes>) {
        lock(&self.shared.outbox).mirrors = Some(pods);
        self.shared.wake.notify_one();
    }

    /// Lets the object of a mirror pod go, which somebody has deleted: the pod itself runs on.
    pub fn release_mirror(&self, uid: &PodUid, namespace: &str, name: &str, status: PodStatus) {
        let Ok(json) = serde_json::to_vec(&status) else {
            return;
        };
        let status = Status {
            namespace: namespace.into(),
            name: name.into(),
            json: json.into(),
            is_final: true,
            released: true,
            is_mirror: true,
        };
        if lock(&self.shared.reports).status(uid, status) {
            self.shared.persist.notify_one();
        }
    }

    /// Returns when the newest status of `uid` is final and on disk. A worker waits for this
    /// before it removes the last trace of a pod, so that a power cut cannot start it again.
    pub async fn final_persisted(&self, uid: &PodUid) {
        let mut persisted = self.shared.persisted.subscribe();
        loop {
            persisted.borrow_and_update();
            if lock(&self.shared.reports).is_persisted_final(uid)
                || rules::is_off(Rule::FinalOnDisk)
            {
                return;
            }
            if persisted.changed().await.is_err() {
                return; // the feed has ended
            }
        }
    }

    /// The final status that was given for this pod, also by an earlier start of the agent: a pod
    /// that has one must never be started here again.
    pub fn final_status(&self, uid: &PodUid) -> Option<PodStatus> {
        let reports = lock(&self.shared.reports);
        serde_json::from_slice(&reports.final_status(uid)?.json).ok()
    }

    /// Sends an event a little later, best effort. The worker coalesces repetitions.
    pub fn event(&self, event: Event) {
        let json = match serde_json::to_vec(&event) {
            Ok(json) => Bytes::from(json),
            Err(error) => return tracing::error!(%error, "event cannot be encoded"),
        };
        let mut outbox = lock(&self.shared.outbox);
        if outbox.events.len() == EVENTS_MAX {
            outbox.events.pop_front();
            outbox.counters.events_dropped += 1;
        }
        let at = tokio::time::Instant::now() + EVENT_PAUSE;
        outbox.events.push_back((at, json));
        drop(outbox);
        self.shared.wake.notify_one();
    }

    /// Everything common up to `rev` is programmed, but for additions of the `stuck` Services. With
    /// more than 64 of those the ack does not move: they could not all be named.
    pub fn programmed(&self, rev: u64, stuck: Vec<StuckService>) {
        if stuck.len() > STUCK_MAX {
            tracing::warn!(
                rev,
                count = stuck.len(),
                "too many Services cannot be programmed"
            );
            return;
        }
        let mut outbox = lock(&self.shared.outbox);
        if rev >= outbox.programmed {
            outbox.programmed = rev;
            outbox.stuck = stuck
                .into_iter()
                .map(|stuck| proto::Stuck {
                    service: stuck.service,
                    reason: stuck.reason,
                })
                .collect();
            outbox.ack_due = true;
            drop(outbox);
            self.shared.wake.notify_one();
        }
    }

    /// Asks whether every node has programmed everything common up to `rev`. The answers: who is
    /// missing, then that nobody is. Dropping the receiver ends the wait.
    pub fn floor(&self, rev: u64) -> watch::Receiver<Option<proto::Floor>> {
        let answers = lock(&self.shared.floors).ask(rev);
        self.shared.wake.notify_one();
        answers
    }

    /// There is no stream, and a try to open one has failed: nobody can be asked anything.
    pub fn is_cut_off(&self) -> bool {
        let is_open = lock(&self.shared.channel).is_some();
        !is_open && lock(&self.shared.outbox).counters.streams_broken > 0
    }

    /// The node's conditions have changed: they go up now, not with the next beat.
    pub fn beat(&self) {
        lock(&self.shared.outbox).beat_due = true;
        self.shared.wake.notify_one();
    }

    /// Returns when the control plane holds every status that was given, or `patience` is over.
    pub async fn flushed(&self, patience: Duration) {
        let flushed = async {
            while !lock(&self.shared.reports).is_settled() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let _ = tokio::time::timeout(patience, flushed).await;
    }

    /// What went wrong and was healed, since the start.
    pub fn counters(&self) -> Counters {
        lock(&self.shared.outbox).counters
    }
}

/// Loads the last state from disk, publishes it, and keeps one stream to the control plane until
/// `shutdown`.
///
/// * `target` – what logs and exec end in.
/// * returns at once; nothing needs the control plane to be there.
///
/// # Errors
/// The files below `<lib>/feed` cannot be read or written: without them statuses could be lost.
pub fn run(
    config: Config,
    node_info: NodeInfoSource,
    target: Arc<dyn TunnelTarget>,
    shutdown: CancellationToken,
) -> Result<Handle, StartError> {
    let disk = |error: log::DiskError| StartError::Disk(error.to_string());
    let dir = config.lib.join("feed");
    let incarnation = finals::next_incarnation(&dir).map_err(disk)?;
    let (files, found) = Finals::open(&dir).map_err(disk)?;
    let secrets = secrets::SecretFiles::open(&config.run.join("secrets"));
    let (log, loaded) = log::Log::open(&dir, secrets).map_err(disk)?;
    tracing::info!(
        rev = loaded.content.rev(),
        incarnation,
        "feed state loaded from disk"
    );

    let mut reports = Reports::new(incarnation, found.records).remembering(found.tombstones);
    let first = loaded.content.view();
    // The disk may have a pod that has ended since: a power cut takes up to a second from it.
    for tombstone in reports.buried(first.pods.keys()) {
        let last = files.exhume(&tombstone);
        let last = last.unwrap_or_else(|| reports::lost(&first, &tombstone.0));
        reports.revive(&tombstone.0, last);
    }

    let shared = Arc::new(Shared::new(reports));
    let renewal = renewal::run(config.clone(), shared.clone(), shutdown.clone());
    let renewal = tokio::spawn(renewal);
    let (view_tx, view) = watch::channel(first);
    let (link_tx, link) = watch::channel(Link::Offline);
    let driver = driver::Driver {
        config,
        node_info,
        target,
        shared: shared.clone(),
        view: view_tx,
        link: link_tx,
        log: Arc::new(Mutex::new(log)),
        finals: files.clone(),
        content: loaded.content,
        lineage: loaded.lineage,
        incarnation,
        lingers_until: None,
        // What the disk held has to be offered to readers as a whole once more.
        resync: false,
        server: 0,
    };
    let keeper = tokio::spawn(driver::keep_finals(files, shared.clone(), shutdown.clone()));
    let task = tokio::spawn(async move {
        driver.run(shutdown).await;
        renewal.abort();
        if let Err(error) = keeper.await {
            tracing::error!(%error, "the keeper of final records failed");
        }
    });
    Ok(Handle {
        view,
        link,
        reporter: Reporter {
            shared: shared.clone(),
        },
        tokens: ControlPlaneTokens { shared },
        task,
    })
}

/// For fuzz targets: reads `state` as the state file of an earlier start, then takes `items` as a commit
/// would. Whatever the bytes are, they are refused or left out. Returns how many objects the view has.
pub fn read_untrusted(state: Bytes, items: &[Bytes]) -> usize {
    let none = secrets::SecretFiles::open(std::path::Path::new("/dev/null"));
    let (mut loaded, _) = log::replay(state, &none);
    let content = &mut loaded.content;
    content.forget_missing();
    let commit = content.commit_of(items);
    if let Ok(prepared) = content.prepare(true, false, items, &commit) {
        prepared.pods();
        content.apply(prepared);
    }
    let view = content.view();
    view.pods.len() + view.services.len() + view.backends.len() + view.nodes.len()
}

/// The cluster's settings as Welcome has them; what does not parse counts as not given.
fn settings_of(welcome: &proto::Welcome) -> Settings {
    let [pod, cluster, service] = [
        &welcome.pod_cidr,
        &welcome.cluster_cidr,
        &welcome.service_cidr,
    ]
    .map(|text| {
        let mut parts = text.split(',').map(|part| part.trim().parse().ok());
        [parts.next().flatten(), parts.next().flatten()]
    });
    Settings {
        pod_cidr: pod[0],
        pod_cidr_second: pod[1],
        cluster_cidr: cluster[0],
        cluster_cidr_second: cluster[1],
        service_cidr: service[0],
        service_cidr_second: service[1],
        cluster_domain: welcome.cluster_domain.clone(),
        dns_service_ip: welcome.dns_service_ip.parse().ok(),
    }
}
