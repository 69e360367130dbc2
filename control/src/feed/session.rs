//! One stream of one agent, from Hello to its end.
//!
//! ```text
//!  Hello ─► wait for the older session ─► register ─► pod prefix ─► Welcome ─► Sync ─► Live
//!                                                                   GoAway ◄── newer session, silence,
//!                                                                              shutdown, node deleted
//! ```
//! One task owns the stream. It sends a batch when the index has moved and fewer than two commits
//! are open, at most one per [`PACE`]; everything that came meanwhile is in the next one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gantry_api::k8s_openapi::api::core::v1::Event;
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::proto;
use gantry_api::proto::{down, up};
use gantry_api::rules::{self, Rule};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::adopt::{Told, ask_ended};
use super::floor::Waits;
use super::view::{Cursor, Step};
use super::{Inner, NodeLink};
use crate::server::identity::CertificateFacts;

/// Commits sent and not yet applied by the agent.
const OPEN_COMMITS_MAX: usize = 2;
/// The least time between two commits of one stream.
const PACE: Duration = Duration::from_millis(2);
/// Batches are cut at about this size; one larger item has a batch of its own.
const BATCH_BYTES: usize = 256 << 10;
/// An agent beats every 5 s; three missed ones end the stream.
const SILENCE_MAX: Duration = Duration::from_secs(16);
/// Beats that come within this are written together: one commit of the store for all of them instead of
/// one for each, which is most of what a beat costs. Nobody waits for it.
const BEAT_WINDOW: Duration = Duration::from_millis(50);
/// A message that the connection does not take for this long ends the stream.
const SEND_TIMEOUT: Duration = Duration::from_secs(20);
/// How long Welcome waits for the node's pod prefix and for the index to reach the registration.
const WELCOME_HOLD_MAX: Duration = Duration::from_secs(10);
/// How long a newer session waits for the older one's writes.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(10);
/// Writes of one session in progress: the agent's window of statuses and some more.
const WRITES_MAX: usize = 320;
/// Events in progress; more are dropped, they are best effort.
const EVENT_WRITES_MAX: usize = 32;

pub(super) type Down = mpsc::Sender<Result<proto::Down, tonic::Status>>;

/// Why a session ends; told to the agent.
struct Leave {
    reason: String,
    retry_after: Duration,
}

fn leave(reason: impl Into<String>) -> Leave {
    Leave {
        reason: reason.into(),
        retry_after: Duration::ZERO,
    }
}

/// What a finished write leaves to do.
enum Written {
    Ack(proto::StatusAck),
    /// A status could not be written now: the agent has to send it again.
    Failed(String),
    Event,
    Nothing,
}

struct Session {
    inner: Arc<Inner>,
    link: Arc<NodeLink>,
    node: String,
    down: Down,
    cursor: Cursor,
    open: VecDeque<u64>,
    writes: JoinSet<Written>,
    event_writes: usize,
    /// Pods whose status is being written: one at a time each, so that they land in order.
    writing: BTreeSet<String>,
    floor_waits: Waits,
    /// Welcome carried no pod prefix: the agent has to come back for it.
    /// The pod prefixes that the agent was told.
    pod_cidr: String,
    /// The node's conditions as the agent gave them last.
    conditions: Value,
}

/// Serves one stream to its end.
pub(super) async fn run(
    inner: Arc<Inner>,
    hello: proto::Hello,
    facts: Option<CertificateFacts>,
    mut inbound: Streaming<proto::Up>,
    down: Down,
) {
    let node = hello.node.clone();
    let link = inner.link(&node);
    let kick = CancellationToken::new();
    std::mem::replace(&mut link.state().kick, kick.clone()).cancel();
    let stop = async {
        tokio::select! {
            () = kick.cancelled() => leave("a newer session of this node has started"),
            () = inner.closed.cancelled() => leave("the control plane is shutting down"),
            () = down.closed() => leave("the agent has left"),
            () = ended(facts.as_ref()) => {
                leave("the certificate of this connection has ended: dial with the renewed one")
            }
        }
    };
    tokio::pin!(stop);
    let joined = facts.as_ref().and_then(|facts| facts.joined_key.clone());

    let open = async {
        let held = timeout(TAKE_OVER_TIMEOUT, link.session.clone().lock_owned()).await;
        let held = held.map_err(|_| leave("the writes of the session before have not settled"))?;
        let ours = inner.registry.store().lineage();
        let ended = ask_ended(&hello, ours, &mut inbound, &down).await;
        let ended = ended.map_err(leave)?;
        let told = Told { hello, ended };
        let session = Session::open(&inner, &link, told, joined.as_deref(), down.clone()).await?;
        Ok::<_, Leave>((held, session))
    };
    let opened = tokio::select! {
        opened = open => opened,
        ended = &mut stop => Err(ended),
    };
    let ended = match opened {
        Err(ended) => ended,
        Ok((held, mut session)) => {
            let (opens, tunnels) = mpsc::channel(super::tunnels::TUNNELS_PER_NODE_MAX);
            link.state().tunnels = Some(opens);
            let ended = tokio::select! {
                ended = session.serve(&mut inbound, tunnels) => ended,
                ended = &mut stop => ended,
            };
            link.state().tunnels = None;
            // The next session of this node waits for these: no write of an old stream comes late.
            while session.writes.join_next().await.is_some() {}
            drop(held);
            ended
        }
    };
    tracing::info!(node, reason = ended.reason, "session ended");
    let go_away = proto::GoAway {
        reason: ended.reason,
        retry_after_ms: u32::try_from(ended.retry_after.as_millis()).unwrap_or(u32::MAX),
    };
    let message = proto::Down {
        message: Some(down::Message::GoAway(go_away)),
    };
    let _ = down.try_send(Ok(message)); // best effort: the end of the stream says the same
}

/// Ends when the certificate does. A handshake looks at the dates only once.
async fn ended(facts: Option<&CertificateFacts>) {
    let Some(facts) = facts else {
        return std::future::pending().await;
    };
    loop {
        let left_s = facts.not_after_s - Timestamp::now().as_second();
        let Ok(left_s @ 1..) = u64::try_from(left_s) else {
            return;
        };
        // Looked at again now and then: the clock may be set.
        tokio::time::sleep(Duration::from_secs(left_s.min(60))).await;
    }
}

impl Session {
    /// Registers the node, waits until it has a pod prefix, and welcomes it.
    async fn open(
        inner: &Arc<Inner>,
        link: &Arc<NodeLink>,
        told: Told,
        joined: Option<&str>,
        down: Down,
    ) -> Result<Self, Leave> {
        let node = told.hello.node.clone();
        let info = told
            .hello
            .info
            .as_ref()
            .map(|info| info.node_json.as_ref())
            .unwrap_or_default();
        let conditions = serde_json::from_slice::<Value>(info)
            .map(|mut node| node["status"]["conditions"].take())
            .unwrap_or_default();
        let (session, unknown_pods) =
            inner
                .register(&told, joined)
                .await
                .map_err(|status| Leave {
                    reason: format!("registration of node {node}: {status}"),
                    retry_after: Duration::from_secs(1),
                })?;
        let hello = told.hello;
        {
            let mut state = link.state();
            let voids = !rules::is_off(Rule::RebootVoidsAck);
            if voids && state.boot_id != hello.boot_id {
                state.boot_id.clone_from(&hello.boot_id);
                state.acked = 0; // the kernel's maps went with the reboot
            }
        }
        let pod_cidr = inner.await_pod_cidr(&node, session).await?;
        let lineage = inner.registry.store().lineage();
        let lineage = proto::Lineage {
            counter: lineage.counter,
            id: lineage.id.clone(),
        };
        let same_lineage = hello
            .lineage
            .as_ref()
            .is_some_and(|held| held.id == lineage.id || rules::is_off(Rule::Lineage));
        let resume = same_lineage
            .then(|| {
                inner
                    .index()
                    .resume_at(hello.common_rev, hello.common_digest)
            })
            .flatten();
        let inventory: BTreeMap<String, u64> = hello
            .private
            .into_iter()
            .map(|private| (private.key, private.rev))
            .collect();
        let (mode, cursor) = match resume {
            Some(rev) => (
                proto::welcome::Mode::Cursor,
                Cursor::resume(Some(rev), inventory),
            ),
            None => (proto::welcome::Mode::Full, Cursor::default()),
        };
        let settings = &inner.settings;
        let told = pod_cidr.clone();
        let mut welcome = proto::Welcome {
            session,
            lineage: Some(lineage),
            min_rev: session,
            pod_cidr,
            cluster_domain: settings.cluster_domain.clone(),
            dns_service_ip: settings.dns_service_ip.to_string(),
            service_cidr: settings.service_cidr.to_string(),
            cluster_cidr: settings.cluster_cidr.to_string(),
            unknown_pods,
            ..Default::default()
        };
        welcome.set_mode(mode);
        let resumed = resume.unwrap_or(0);
        tracing::info!(
            node,
            session,
            ?mode,
            resumed,
            held = hello.common_rev,
            "session started"
        );
        let this = Self {
            inner: inner.clone(),
            link: link.clone(),
            node,
            down,
            cursor,
            open: VecDeque::new(),
            writes: JoinSet::new(),
            event_writes: 0,
            writing: BTreeSet::new(),
            floor_waits: Waits::default(),
            pod_cidr: told,
            conditions,
        };
        this.send(down::Message::Welcome(welcome)).await?;
        Ok(this)
    }

    /// Returns why the session has ended.
    async fn serve(
        &mut self,
        inbound: &mut Streaming<proto::Up>,
        mut tunnels: mpsc::Receiver<proto::OpenTunnel>,
    ) -> Leave {
        match self.serve_until_error(inbound, &mut tunnels).await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    async fn serve_until_error(
        &mut self,
        inbound: &mut Streaming<proto::Up>,
        tunnels: &mut mpsc::Receiver<proto::OpenTunnel>,
    ) -> Result<std::convert::Infallible, Leave> {
        let mut common = self.inner.common.subscribe();
        let mut acked = self.inner.acked.subscribe();
        let link = self.link.clone();
        let mut last_heard = Instant::now();
        let mut next_commit = Instant::now();
        let mut dirty = true;
        loop {
            let may_send = dirty && self.open.len() < OPEN_COMMITS_MAX;
            let floors_due = self.floor_waits.due_at();
            // Every arm is cancel safe: a message, a permit or a finished write is either taken or
            // still there. What an arm's body awaits is never cut off by another arm.
            tokio::select! {
                message = inbound.message(), if self.writes.len() < WRITES_MAX => {
                    let message = message.map_err(|status| leave(format!("stream: {status}")))?;
                    let message = message.ok_or_else(|| leave("the agent has left"))?;
                    last_heard = Instant::now();
                    self.take(message)?;
                    self.answer_floors().await?;
                }
                () = sleep_until(last_heard + SILENCE_MAX) => {
                    return Err(leave("nothing heard for 16 s"));
                }
                changed = common.changed() => {
                    changed.map_err(|_| leave("the feed has ended"))?;
                    dirty = true;
                }
                () = link.private.notified() => dirty = true,
                () = sleep_until(next_commit), if may_send => {
                    dirty = false;
                    if self.inner.pod_cidr(&self.node).is_some_and(|now| now != self.pod_cidr) {
                        return Err(leave("the node has got another pod prefix"));
                    }
                    if self.send_step().await? {
                        next_commit = Instant::now() + PACE;
                    }
                }
                Some(written) = self.writes.join_next() => self.written(written).await?,
                Some(open) = tunnels.recv() => self.send(down::Message::OpenTunnel(open)).await?,
                () = sleep_until(floors_due.unwrap_or(last_heard)), if floors_due.is_some() => {
                    self.answer_floors().await?;
                }
                changed = acked.changed(), if !self.floor_waits.is_empty() => {
                    changed.map_err(|_| leave("the feed has ended"))?;
                    self.answer_floors().await?;
                }
            }
        }
    }

    async fn send(&self, message: down::Message) -> Result<(), Leave> {
        let message = Ok(proto::Down {
            message: Some(message),
        });
        match timeout(SEND_TIMEOUT, self.down.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(leave("the agent has left")),
            Err(_) => Err(leave("the agent has taken nothing for 20 s")),
        }
    }

    /// Sends what is new, if anything is.
    async fn send_step(&mut self) -> Result<bool, Leave> {
        let step = self.inner.index().step(&self.node, &mut self.cursor);
        let Some(Step { items, commit }) = step else {
            return Ok(false);
        };
        let rev = commit.rev;
        for items in batches(items) {
            self.send(down::Message::Batch(proto::Batch { items }))
                .await?;
        }
        self.send(down::Message::Commit(commit)).await?;
        self.open.push_back(rev);
        Ok(true)
    }

    fn take(&mut self, message: proto::Up) -> Result<(), Leave> {
        match message.message {
            Some(up::Message::Ack(ack)) => {
                while self.open.front().is_some_and(|rev| *rev <= ack.applied) {
                    self.open.pop_front();
                }
                for stuck in ack.stuck.iter().take(64) {
                    let (service, reason) = (&stuck.service, &stuck.reason);
                    tracing::warn!(node = self.node, service, reason, "not programmed");
                }
                self.inner.note_acked(&self.link, ack.rev);
                Ok(())
            }
            Some(up::Message::Beat(beat)) => self.take_beat(beat),
            Some(up::Message::Status(report)) => self.take_status(report),
            Some(up::Message::Event(report)) => {
                self.take_event(&report);
                Ok(())
            }
            Some(up::Message::FloorWait(wait)) => {
                match self.floor_waits.add(wait.rev, Instant::now()) {
                    true => Ok(()),
                    false => Err(leave("more than 256 waits for a floor")),
                }
            }
            Some(up::Message::MirrorPods(report)) => {
                let (inner, node) = (self.inner.clone(), self.node.clone());
                self.writes.spawn(async move {
                    inner.mirror(&node, &report.pods_json).await;
                    Written::Nothing
                });
                Ok(())
            }
            Some(up::Message::Hello(_)) => Err(leave("a second Hello on one stream")),
            Some(up::Message::Ended(_)) => Err(leave("nobody has asked for ended pods")),
            None => Ok(()), // a newer agent's message
        }
    }

    fn take_beat(&mut self, beat: proto::Beat) -> Result<(), Leave> {
        self.inner.note_acked(&self.link, beat.common_rev);
        let ready = match self.inner.index().node(&self.node) {
            Some(facts) => facts.ready,
            None => return Err(leave("the Node object was deleted: register again")),
        };
        let changed = serde_json::from_slice(&beat.conditions_json).ok();
        let is_changed = changed.is_some();
        self.conditions = changed.unwrap_or_else(|| std::mem::take(&mut self.conditions));
        let says_ready = self
            .conditions
            .as_array()
            .into_iter()
            .flatten()
            .any(|condition| condition["type"] == "Ready" && condition["status"] == "True");
        // Given up while it was silent, and it is back.
        let conditions = (is_changed || (says_ready && !ready)).then(|| self.conditions.clone());
        let resources = serde_json::from_slice::<Value>(&beat.resources_json).ok();
        let (inner, node) = (self.inner.clone(), self.node.clone());
        self.writes.spawn(async move {
            tokio::time::sleep(until_group(inner.epoch.elapsed())).await;
            if let Err(status) = inner.renew_lease(&node, None).await {
                tracing::warn!(node, %status, "the node's lease was not renewed");
            }
            if conditions.is_some() || resources.is_some() {
                let resources = resources.unwrap_or_default();
                let status = json!({
                    "conditions": conditions,
                    "capacity": resources["capacity"],
                    "allocatable": resources["allocatable"],
                });
                if let Err(status) = inner.write_node_status(&node, &status).await {
                    tracing::warn!(node, %status, "the node's conditions were not written");
                }
            }
            Written::Nothing
        });
        Ok(())
    }

    fn take_status(&mut self, report: proto::StatusReport) -> Result<(), Leave> {
        if !self.writing.insert(report.uid.clone()) {
            return Err(leave(format!("two statuses of pod {} at once", report.uid)));
        }
        let (inner, link, node) = (self.inner.clone(), self.link.clone(), self.node.clone());
        self.writes.spawn(async move {
            match inner.take_status(&node, &link, report).await {
                Ok(ack) => Written::Ack(ack),
                Err(status) => Written::Failed(status.to_string()),
            }
        });
        Ok(())
    }

    fn take_event(&mut self, report: &proto::EventReport) {
        let event = serde_json::from_slice::<Event>(&report.event_json);
        let Ok(event) = event else {
            tracing::warn!(node = self.node, "an event of the agent cannot be read");
            return;
        };
        if self.event_writes >= EVENT_WRITES_MAX {
            tracing::warn!(node = self.node, "events come too fast, one is dropped");
            return;
        }
        self.event_writes += 1;
        let inner = self.inner.clone();
        self.writes.spawn(async move {
            inner.registry.event(event).await;
            Written::Event
        });
    }

    async fn written(
        &mut self,
        written: Result<Written, tokio::task::JoinError>,
    ) -> Result<(), Leave> {
        match written {
            Ok(Written::Ack(ack)) => {
                self.writing.remove(&ack.uid);
                self.send(down::Message::StatusAck(ack)).await
            }
            Ok(Written::Failed(reason)) => Err(Leave {
                reason: format!("a status was not written: {reason}"),
                retry_after: Duration::from_secs(1),
            }),
            Ok(Written::Event) => {
                self.event_writes -= 1;
                Ok(())
            }
            Ok(Written::Nothing) => Ok(()),
            Err(error) => Err(leave(format!("a write failed: {error}"))),
        }
    }

    async fn answer_floors(&mut self) -> Result<(), Leave> {
        if self.floor_waits.is_empty() {
            return Ok(());
        }
        let answers = self
            .floor_waits
            .answers(&self.inner.floors(), Instant::now());
        for floor in answers {
            self.send(down::Message::Floor(floor)).await?;
        }
        Ok(())
    }
}

impl Inner {
    fn pod_cidr(&self, node: &str) -> Option<String> {
        let index = self.index();
        index
            .node(node)
            .map(|facts| facts.pod_cidr.clone())
            .filter(|cidr| !cidr.is_empty())
    }

    /// The node's pod prefix, "" when it is not allocated in time; the index is then at or above
    /// the registration in any case.
    async fn await_pod_cidr(&self, node: &str, registration: u64) -> Result<String, Leave> {
        let mut head = self.head.subscribe();
        let allocated = timeout(WELCOME_HOLD_MAX, async {
            loop {
                let rev = *head.borrow_and_update();
                if let (true, Some(cidr)) = (rev >= registration, self.pod_cidr(node)) {
                    return Some(cidr);
                }
                head.changed().await.ok()?;
            }
        });
        if let Ok(Some(cidr)) = allocated.await {
            return Ok(cidr);
        }
        if *head.borrow() < registration {
            return Err(leave("the feed is behind the store"));
        }
        tracing::warn!(
            node,
            "no pod prefix after 10 s, starting without: is the node controller up?"
        );
        Ok(String::new())
    }
}

/// How long a beat waits for the others of its group, this long after the feed's start.
fn until_group(elapsed: Duration) -> Duration {
    let window = BEAT_WINDOW.as_micros();
    let over = elapsed.as_micros() % window;
    Duration::from_micros(u64::try_from(window - over).unwrap_or(0))
}

/// Cuts items into batches of about [`BATCH_BYTES`].
fn batches(items: Vec<Bytes>) -> Vec<Vec<Bytes>> {
    let mut batches = Vec::new();
    let (mut batch, mut size) = (Vec::new(), 0);
    for item in items {
        if size + item.len() > BATCH_BYTES && !batch.is_empty() {
            batches.push(std::mem::take(&mut batch));
            size = 0;
        }
        size += item.len();
        batch.push(item);
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beats_of_one_window_are_written_at_one_time() {
        let ms = Duration::from_millis;
        for (elapsed, at) in [(0, 50), (1, 50), (49, 50), (50, 100), (1_234, 1_250)] {
            assert_eq!(ms(elapsed) + until_group(ms(elapsed)), ms(at));
        }
        let odd = Duration::from_nanos(7_000_001);
        assert!(until_group(odd) <= BEAT_WINDOW && odd + until_group(odd) >= BEAT_WINDOW);
    }
}
