//! One stream: Hello, Welcome, then batches down and everything else up.
//!
//! ```text
//! Hello ─► Welcome(CURSOR | FULL) ─► Batch* Commit ─► check, write, apply, publish ─► Ack(applied)
//! ```
//! Up there is no queue: at each turn the loop asks what is due (ack, beat, status, event) and the
//! newest of it is sent, as long as the connection takes it.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use gantry_api::k8s_openapi::api::core::v1::Node;
use gantry_api::proto;
use gantry_api::proto::feed_client::FeedClient;
use gantry_api::proto::{down, up};
use gantry_api::rules::{self, Rule};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, interval_at, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::content::Mismatch;
use super::driver::{Driver, Ended};
use super::log::Record;
use super::reports::{Seen, lost};
use super::{Link, lock, settings_of, tunnel};
use crate::ids::PodUid;
use crate::view::View;
use crate::{blocking, credentials};

/// Messages between the loop and the connection: more wait in their source, where the newest wins.
const UP_QUEUE: usize = 16;
/// Most bytes of items before a Commit.
const STAGED_BYTES_MAX: usize = 512 << 20;
/// The largest message taken: a Secret is at most 1.5 MiB.
const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Per stream; a stalled log reader holds at most this much.
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// All tunnels' windows and 8 MiB for the feed, so that tunnels can never starve it.
const CONNECTION_WINDOW_BYTES: u32 = tunnel::TUNNELS_MAX as u32 * STREAM_WINDOW_BYTES + (8 << 20);
/// A few thousand of them fit into the control plane's limit.
const ENDED_PER_MESSAGE: usize = 1_000;
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// The control plane may hold Welcome until this node has a pod prefix.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);
/// A dead connection is noticed within two of these.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// The disk lags memory by at most this (pods: not at all), and not beyond the end of the stream.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);

/// The parts of one open stream.
struct Stream {
    up: mpsc::Sender<proto::Up>,
    channel: Channel,
    welcome: proto::Welcome,
    same_lineage: bool,
    /// The next commit replaces everything.
    full: bool,
    staged: Vec<Bytes>,
    staged_bytes: usize,
    /// The last commit of this stream; 0: none yet.
    applied: u64,
    applied_due: bool,
    beat_due: bool,
    beats: u64,
    conditions: Vec<u8>,
    resources: Vec<u8>,
    tunnels: JoinSet<()>,
}

fn broken(what: &'static str) -> impl Fn(tonic::Status) -> Ended {
    move |status| match status.code() {
        tonic::Code::Unauthenticated => Ended::Unwelcome(status.message().to_owned()),
        code => Ended::Broken(format!("{what}: {code}: {}", status.message())),
    }
}

impl Driver {
    /// Opens a stream and serves it until it ends.
    pub(super) async fn stream(&mut self) -> Ended {
        let (mut stream, mut inbound) = match self.open().await {
            Ok(open) => open,
            Err(ended) => return ended,
        };
        *lock(&self.shared.channel) = Some(stream.channel.clone());
        let ended = match self.serve(&mut stream, &mut inbound).await {
            Ok(never) => match never {},
            Err(ended) => ended,
        };
        *lock(&self.shared.channel) = None;
        ended
    }

    async fn dial(&self) -> Result<Channel, Ended> {
        let servers: Vec<&str> = self.config.server.split(',').collect();
        let server = servers[self.server % servers.len()].trim().to_owned();
        let error = |e: &dyn std::fmt::Display| Ended::Broken(format!("{server}: {e}"));
        let mut endpoint = Endpoint::from_shared(server.clone())
            .map_err(|e| error(&e))?
            .connect_timeout(DIAL_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        if server.starts_with("https://") {
            // Before the files are read: what comes meanwhile is another renewal.
            *lock(&self.shared.move_by) = None;
            let pem = credentials::read(&self.config.credentials)
                .map_err(|e| Ended::Broken(e.to_string()))?;
            let tls = ClientTlsConfig::new()
                .ca_certificate(Certificate::from_pem(pem.ca))
                .identity(Identity::from_pem(pem.certificate, pem.key));
            endpoint = endpoint.tls_config(tls).map_err(|e| error(&e))?;
        } else if !server.starts_with("http://127.0.0.1:") {
            return Err(error(&"want an https:// address: the feed carries Secrets"));
        }
        let dial = async {
            match self.config.dialer.clone() {
                None => endpoint.connect().await,
                Some(dialer) => endpoint.connect_with_connector(dialer).await,
            }
        };
        let connected = timeout(DIAL_TIMEOUT, dial).await;
        let connected = connected.map_err(|_| error(&"does not answer"))?;
        connected.map_err(|e| {
            let held = credentials::joined(&self.config.credentials);
            if held.is_ok_and(|held| held.is_some_and(|held| held.has_ended())) {
                return Ended::Unwelcome(format!(
                    "{server}: this node's certificate has ended: run gantry join here again, with a new token"
                ));
            }
            match std::error::Error::source(&e) {
                Some(source) => error(&format!("{e}: {source}")),
                None => error(&e),
            }
        })
    }

    fn hello(&self, node: &Node) -> proto::Hello {
        let boot_id = node
            .status
            .as_ref()
            .and_then(|status| status.node_info.as_ref());
        let boot_id = boot_id.map(|info| info.boot_id.clone()).unwrap_or_default();
        let held = !self.resync && self.content.rev() > 0;
        proto::Hello {
            node: self.config.node.clone(),
            boot_id,
            incarnation: self.incarnation,
            lineage: self.lineage.clone().filter(|_| held),
            common_rev: if held { self.content.rev() } else { 0 },
            common_digest: if held {
                self.content.common_digest()
            } else {
                0
            },
            private: if held {
                self.content.private_keys()
            } else {
                Vec::new()
            },
            info: Some(proto::NodeInfo {
                node_json: serde_json::to_vec(node).unwrap_or_default().into(),
            }),
            held_pods: self.content.held_pods(),
            held_lineage: self.lineage.clone(),
            ended_count: lock(&self.shared.reports).ended_count() as u64,
        }
    }

    /// Tells of the pods that have ended here, which a restored control plane asks for.
    async fn tell_ended(&self, up: &mpsc::Sender<proto::Up>) -> Result<(), Ended> {
        let (mut pods, buried) = lock(&self.shared.reports).ended();
        let files = self.finals.clone();
        let named = blocking::run(move || files.names(&buried)).await;
        let named = named.map_err(|error| Ended::Broken(format!("tombstones: {error}")))?;
        pods.extend(
            named
                .into_iter()
                .map(|(uid, namespace, name)| proto::HeldPod {
                    uid: uid.as_str().into(),
                    namespace,
                    name,
                }),
        );
        let mut parts = pods.chunks(ENDED_PER_MESSAGE).peekable();
        loop {
            let pods = parts.next().unwrap_or_default().to_vec();
            let is_last = parts.peek().is_none();
            let message = up::Message::Ended(proto::EndedPods { pods, is_last });
            let message = proto::Up {
                message: Some(message),
            };
            let sent = up.send(message).await;
            sent.map_err(|_| Ended::Broken("the stream closed".into()))?;
            if is_last {
                return Ok(());
            }
        }
    }

    async fn open(&mut self) -> Result<(Stream, Streaming<proto::Down>), Ended> {
        let channel = self.dial().await?;
        let (up, queue) = mpsc::channel(UP_QUEUE);
        let node = (self.node_info)();
        let conditions = conditions_json(&node);
        let resources = resources_json(&node);
        let hello = proto::Up {
            message: Some(up::Message::Hello(self.hello(&node))),
        };
        up.send(hello)
            .await
            .map_err(|_| Ended::Broken("the stream closed".into()))?;
        let mut client =
            FeedClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let welcome = async {
            let session = client.session(ReceiverStream::new(queue)).await;
            let mut inbound = session.map_err(broken("session"))?.into_inner();
            loop {
                let first = inbound.message().await.map_err(broken("welcome"))?;
                return match first.and_then(|down| down.message) {
                    Some(down::Message::Welcome(welcome)) => Ok((welcome, inbound)),
                    Some(down::Message::GoAway(go_away)) => Err(went_away(go_away)),
                    Some(down::Message::AskEnded(_)) => {
                        self.tell_ended(&up).await?;
                        continue;
                    }
                    _ => Err(Ended::Broken("the control plane sent no welcome".into())),
                };
            }
        };
        let welcome = timeout(WELCOME_TIMEOUT, welcome).await;
        let (welcome, inbound) =
            welcome.map_err(|_| Ended::Broken("no welcome in 30 s".into()))??;
        let same_lineage = self.check_lineage(&welcome)?;
        let full = welcome.mode() == proto::welcome::Mode::Full;
        self.content.set_settings(settings_of(&welcome));
        self.link.send_replace(Link::Syncing);
        tracing::info!(
            node = self.config.node,
            session = welcome.session,
            full,
            held = self.content.rev(),
            "stream to the control plane is open"
        );
        let stream = Stream {
            up,
            channel,
            welcome,
            same_lineage,
            full,
            staged: Vec::new(),
            staged_bytes: 0,
            applied: 0,
            applied_due: false,
            beat_due: true,
            beats: 0,
            conditions,
            resources,
            tunnels: JoinSet::new(),
        };
        Ok((stream, inbound))
    }

    /// Whether the control plane's history is the one of our state; an older one is refused.
    fn check_lineage(&mut self, welcome: &proto::Welcome) -> Result<bool, Ended> {
        let Some(theirs) = &welcome.lineage else {
            return Err(Ended::Broken("the welcome names no lineage".into()));
        };
        let Some(ours) = &self.lineage else {
            return Ok(false);
        };
        if ours.id == theirs.id {
            return Ok(!self.resync);
        }
        if theirs.counter <= ours.counter {
            return Err(Ended::Refused(format!(
                "the control plane's history {} ({}) is not newer than this node's {} ({})",
                theirs.counter, theirs.id, ours.counter, ours.id
            )));
        }
        Ok(false)
    }

    async fn serve(
        &mut self,
        stream: &mut Stream,
        inbound: &mut Streaming<proto::Down>,
    ) -> Result<std::convert::Infallible, Ended> {
        // The first beat is due at once, without the timer.
        let mut beat = interval_at(Instant::now() + self.config.beat, self.config.beat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sync = interval(SYNC_INTERVAL);
        sync.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let shared = self.shared.clone();
        loop {
            let full = self.send_due(stream)?;
            let move_by = *lock(&self.shared.move_by);
            if move_by.is_some_and(|by| stream.tunnels.is_empty() || Instant::now() >= by) {
                return Err(Ended::Renewed);
            }
            let up = stream.up.clone();
            let event_at = lock(&shared.outbox).events.front().map(|(at, _)| *at);
            let lingers_until = self.lingers_until.filter(|_| stream.applied > 0);
            // Every arm is cancel safe: `message` and `tick` keep their place, `notified` keeps one
            // permit, a reserved slot is given back.
            tokio::select! {
                down = inbound.message() => {
                    let down = down.map_err(broken("stream"))?;
                    let down = down.ok_or_else(|| Ended::Broken("stream ended".into()))?;
                    self.take(stream, down).await?;
                }
                () = shared.wake.notified() => {}
                _ = beat.tick() => stream.beat_due = true,
                _ = sync.tick() => self.sync_log().await,
                () = until(event_at), if !full => {}
                () = until(lingers_until) => self.end_lingering(stream),
                _ = up.reserve(), if full => {}
                Some(_) = stream.tunnels.join_next() => {}
            }
        }
    }

    /// Sends what is due until nothing is or the connection takes no more; then true.
    fn send_due(&self, stream: &mut Stream) -> Result<bool, Ended> {
        loop {
            let up = stream.up.clone();
            let permit = match up.try_reserve() {
                Ok(permit) => permit,
                Err(TrySendError::Full(())) => return Ok(true),
                Err(TrySendError::Closed(())) => {
                    return Err(Ended::Broken("the stream closed".into()));
                }
            };
            match self.next_up(stream) {
                Some(message) => permit.send(proto::Up {
                    message: Some(message),
                }),
                None => return Ok(false),
            }
        }
    }

    /// The most urgent message that is due.
    fn next_up(&self, stream: &mut Stream) -> Option<up::Message> {
        {
            let mut outbox = lock(&self.shared.outbox);
            if stream.applied_due || (stream.applied > 0 && outbox.ack_due) {
                stream.applied_due = false;
                outbox.ack_due = false;
                let (rev, stuck) = (outbox.programmed, outbox.stuck.clone());
                return Some(up::Message::Ack(proto::Ack {
                    rev,
                    stuck,
                    applied: stream.applied,
                }));
            }
        }
        let at_once = std::mem::take(&mut lock(&self.shared.outbox).beat_due);
        if std::mem::take(&mut stream.beat_due) || at_once {
            return Some(up::Message::Beat(self.beat(stream)));
        }
        // What is said after a commit on this stream is said by who knows what it asks about.
        if stream.applied > 0
            && let Some(rev) = lock(&self.shared.floors).take_next()
        {
            return Some(up::Message::FloorWait(proto::FloorWait { rev }));
        }
        if let Some(report) = lock(&self.shared.reports).take_next() {
            return Some(up::Message::Status(report));
        }
        if let Some(pods_json) = lock(&self.shared.outbox).mirrors.take() {
            return Some(up::Message::MirrorPods(proto::MirrorPods { pods_json }));
        }
        let is_due = |(at, _): &mut (Instant, Bytes)| *at <= Instant::now();
        let (_, event_json) = lock(&self.shared.outbox).events.pop_front_if(is_due)?;
        Some(up::Message::Event(proto::EventReport { event_json }))
    }

    fn beat(&self, stream: &mut Stream) -> proto::Beat {
        stream.beats += 1;
        let node = (self.node_info)();
        let resources = resources_json(&node);
        let more = resources != stream.resources;
        if more {
            stream.resources.clone_from(&resources);
        }
        let conditions = conditions_json(&node);
        let changed = conditions != stream.conditions;
        if changed {
            stream.conditions.clone_from(&conditions);
        }
        proto::Beat {
            counter: stream.beats,
            common_rev: lock(&self.shared.outbox).programmed,
            conditions_json: if changed {
                conditions.into()
            } else {
                Bytes::new()
            },
            resources_json: if more { resources.into() } else { Bytes::new() },
        }
    }

    async fn take(&mut self, stream: &mut Stream, down: proto::Down) -> Result<(), Ended> {
        match down.message {
            Some(down::Message::Batch(batch)) => {
                for item in batch.items {
                    stream.staged_bytes += item.len();
                    if stream.staged_bytes > STAGED_BYTES_MAX {
                        return Err(Ended::Broken("a batch of more than 512 MiB".into()));
                    }
                    stream.staged.push(item);
                }
                Ok(())
            }
            Some(down::Message::Commit(commit)) => self.commit(stream, commit).await,
            Some(down::Message::StatusAck(ack)) => {
                lock(&self.shared.reports).acked(&ack);
                self.shared.persist.notify_one(); // a final record may be needed no more
                Ok(())
            }
            Some(down::Message::OpenTunnel(open)) => {
                let (channel, target) = (stream.channel.clone(), self.target.clone());
                let busy = stream.tunnels.len() >= tunnel::TUNNELS_MAX;
                stream
                    .tunnels
                    .spawn(tunnel::serve(channel, target, open, busy));
                Ok(())
            }
            Some(down::Message::GoAway(go_away)) => Err(went_away(go_away)),
            Some(down::Message::Floor(floor)) => {
                lock(&self.shared.floors).answered(floor);
                self.shared.wake.notify_one(); // the next wait may go
                Ok(())
            }
            // A second welcome and what a newer control plane may send are no reason to end the
            // stream.
            Some(down::Message::Welcome(_) | down::Message::AskEnded(_)) | None => Ok(()),
        }
    }

    /// Checks what was staged, writes it down, applies and publishes it.
    async fn commit(&mut self, stream: &mut Stream, commit: proto::Commit) -> Result<(), Ended> {
        if commit.rev < stream.welcome.min_rev {
            let (got, held) = (commit.rev, stream.welcome.min_rev);
            return Err(Ended::Mismatch(Mismatch::StepBack { got, held }));
        }
        let items = std::mem::take(&mut stream.staged);
        stream.staged_bytes = 0;
        let prepared = self
            .content
            .prepare(stream.full, stream.same_lineage, &items, &commit)
            .map_err(Ended::Mismatch)?;
        let changed = prepared.pods();
        // Only a new pod has to be on the disk before anyone acts on it; the echo of a status not.
        let held = self.view.borrow().pods.clone();
        let sync = changed.iter().any(|uid| !held.contains_key(uid));
        let record = Record {
            lineage: stream.welcome.lineage.clone(),
            full: stream.full,
            items,
            commit: Some(commit),
            welcome: Some(stream.welcome.clone()),
            withheld: Vec::new(),
        };
        // Memory goes on without the disk, and the next stream asks for everything, which makes
        // the file whole again.
        self.resync = !self.write(record, sync).await;

        // Of another history, not merely asked for as a whole.
        let before = is_other(self.lineage.as_ref(), stream.welcome.lineage.as_ref())
            .then(|| self.content.view());
        let secrets_changed = prepared.changes_secrets();
        for key in self.content.apply(prepared) {
            tracing::error!(key, "an item of the feed is not understood and left out");
        }
        if secrets_changed {
            lock(&self.log).retain_secrets(&self.content.secret_hashes());
        }
        if !stream.same_lineage && self.lineage.is_some() {
            lock(&self.shared.reports).new_lineage();
            lock(&self.shared.outbox).programmed = 0; // a number of the old history
        }
        if let Some(before) = before {
            self.let_linger(&before, &stream.welcome.unknown_pods);
        }
        self.lineage.clone_from(&stream.welcome.lineage);
        (stream.full, stream.same_lineage) = (false, true);
        self.revive(&changed).await;
        self.publish(stream, &changed);
        Ok(())
    }

    /// Pods that have ended here and are in the view again have their last word before anyone sees them.
    async fn revive(&self, changed: &BTreeSet<PodUid>) {
        let view = self.content.view();
        let back = changed.iter().filter(|uid| view.pods.contains_key(uid));
        let buried = lock(&self.shared.reports).buried(back);
        if buried.is_empty() {
            return;
        }
        tracing::warn!(
            node = self.config.node,
            count = buried.len(),
            "pods that have ended here are bound here again: they are told as ended, not started"
        );
        let (files, all) = (self.finals.clone(), buried.clone());
        let read = move || all.iter().map(|one| files.exhume(one)).collect::<Vec<_>>();
        let mut read = blocking::run(read).await.unwrap_or_default().into_iter();
        for (uid, _) in buried {
            let last = read.next().flatten();
            let last = last.unwrap_or_else(|| lost(&view, &uid));
            lock(&self.shared.reports).revive(&uid, last);
        }
    }

    /// The history is another one. What runs and is not known in it may be newer than its beginning: time
    /// for whoever restored it to see that.
    fn let_linger(&mut self, before: &View, unknown: &[String]) {
        let count = self.content.let_linger(before, unknown);
        let linger = self.config.linger;
        self.lingers_until = (count > 0).then(|| Instant::now() + linger);
        if count > 0 {
            tracing::warn!(
                node = self.config.node,
                count,
                ?linger,
                "pods run that the restored control plane does not know: they end after this time"
            );
        }
    }

    fn end_lingering(&mut self, stream: &mut Stream) {
        self.lingers_until = None;
        if self.content.end_lingering() {
            tracing::warn!(
                node = self.config.node,
                "ending the pods that the restored control plane does not know"
            );
            self.publish(stream, &BTreeSet::new());
        }
    }

    /// False: the record is not on disk.
    async fn write(&self, record: Record, sync: bool) -> bool {
        if rules::is_off(Rule::LogFirst) {
            return true;
        }
        let log = self.log.clone();
        let written = blocking::run(move || lock(&log).append(record, sync)).await;
        match written {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => {
                tracing::error!(%error, "the feed's state is not on disk: free space or repair it");
            }
            Err(error) => tracing::error!(%error, "the feed's state is not on disk"),
        }
        false
    }

    fn publish(&self, stream: &mut Stream, changed: &BTreeSet<PodUid>) {
        let view = self.content.view();
        lock(&self.shared.reports).committed(|uid| {
            let Some(pod) = view.pods.get(uid) else {
                return Seen::default();
            };
            let phase = pod
                .status
                .as_ref()
                .and_then(|status| status.phase.as_deref());
            Seen {
                in_view: true,
                changed: changed.contains(uid),
                ended: matches!(phase, Some("Succeeded" | "Failed")),
                deleting: pod.metadata.deletion_timestamp.is_some(),
            }
        });
        lock(&self.shared.outbox).counters.commits += 1;
        stream.applied = view.rev;
        stream.applied_due = true;
        if rules::is_off(Rule::AckAfterFlip) {
            lock(&self.shared.outbox).programmed = view.rev;
        }
        self.view.send_replace(view);
        let link = Link::Live {
            session: stream.welcome.session,
        };
        self.link.send_if_modified(|old| {
            let changed = *old != link;
            *old = link;
            changed
        });
        self.shared.persist.notify_one(); // final records of pods that left the view may go
    }
}

fn is_other(ours: Option<&proto::Lineage>, theirs: Option<&proto::Lineage>) -> bool {
    matches!((ours, theirs), (Some(ours), Some(theirs)) if ours.id != theirs.id)
}

/// Returns at this time; never without one. Cancel safe.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn conditions_json(node: &Node) -> Vec<u8> {
    let conditions = node
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref());
    conditions
        .and_then(|all| serde_json::to_vec(all).ok())
        .unwrap_or_default()
}

/// Capacity and allocatable: device plugins come and go.
fn resources_json(node: &Node) -> Vec<u8> {
    let Some(status) = &node.status else {
        return Vec::new();
    };
    let both = serde_json::json!({
        "capacity": status.capacity,
        "allocatable": status.allocatable,
    });
    both.to_string().into_bytes()
}

fn went_away(go_away: proto::GoAway) -> Ended {
    let retry_after = Duration::from_millis(u64::from(go_away.retry_after_ms).min(60_000));
    Ended::GoAway {
        reason: go_away.reason,
        retry_after,
    }
}
