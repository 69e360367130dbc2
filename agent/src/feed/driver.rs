//! Keeps one stream alive: dials, backs off, starts again; owns what the streams leave behind.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use gantry_api::proto;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::content::{Content, Mismatch};
use super::finals::Finals;
use super::log::Log;
use super::{Config, Link, NodeInfoSource, Shared, TunnelTarget, lock};
use crate::blocking;
use crate::view::View;

/// The first wait between two dials; grows to [`Config::backoff_max`]. Each is taken with full
/// jitter, so that a restarted control plane is not met by every node at once.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
/// By which the age of tombstones is counted.
const HOUR: Duration = Duration::from_hours(1);
/// The wait after a control plane with an older history than ours.
const REFUSED_BACKOFF: Duration = Duration::from_secs(30);

/// Why a stream ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// Could not be opened, or broke.
    Broken(String),
    /// The control plane asked for it.
    GoAway {
        reason: String,
        retry_after: Duration,
    },
    /// A commit did not add up: the next stream asks for everything.
    Mismatch(Mismatch),
    /// The control plane has an older history.
    Refused(String),
    /// The control plane does not know this node (any more).
    Unwelcome(String),
    /// The next one is to be on the renewed certificate.
    Renewed,
}

/// See the module. `session.rs` holds the part for one stream.
pub(super) struct Driver {
    pub(super) config: Config,
    pub(super) node_info: NodeInfoSource,
    pub(super) target: Arc<dyn TunnelTarget>,
    pub(super) shared: Arc<Shared>,
    pub(super) view: watch::Sender<Arc<View>>,
    pub(super) link: watch::Sender<Link>,
    pub(super) log: Arc<Mutex<Log>>,
    pub(super) finals: Finals,
    pub(super) content: Content,
    pub(super) lineage: Option<proto::Lineage>,
    pub(super) incarnation: u64,
    /// When the pods that a restored control plane does not know have to end.
    pub(super) lingers_until: Option<tokio::time::Instant>,
    /// The next stream asks for everything.
    pub(super) resync: bool,
    /// Which of the servers is dialled next.
    pub(super) server: usize,
}

impl Driver {
    /// One stream after the other until `shutdown`.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        let mut backoff = BACKOFF_MIN;
        loop {
            // Cancelled in the middle of a commit: the disk has it or not, the next start reads it.
            let ended = tokio::select! {
                ended = self.stream() => ended,
                () = shutdown.cancelled() => break,
            };
            // What the stream told last is all that this node knows until the next one, also after a reboot.
            self.sync_log().await;
            let was_live = matches!(&*self.link.borrow(), Link::Live { .. });
            if was_live {
                backoff = BACKOFF_MIN;
            }
            let wait = self.after(ended, backoff);
            backoff = (backoff * 2).min(self.config.backoff_max);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = shutdown.cancelled() => break,
            }
        }
        self.link.send_replace(Link::Offline);
        self.sync_log().await;
    }

    /// Notes the end of a stream; returns how long to wait before the next dial.
    fn after(&mut self, ended: Ended, backoff: Duration) -> Duration {
        lock(&self.shared.reports).broken();
        lock(&self.shared.floors).broken();
        lock(&self.shared.outbox).counters.streams_broken += 1;
        let node = &self.config.node;
        let jittered = backoff.mul_f64(rand::random::<f64>());
        let mut link = Link::Offline;
        if !matches!(ended, Ended::Renewed) {
            // Whatever was wrong: another control plane may do better, and one that is alone is next again.
            self.server = self.server.wrapping_add(1);
        }
        let wait = match ended {
            Ended::Broken(reason) => {
                tracing::info!(
                    node,
                    reason,
                    "no stream to the control plane, dialling again"
                );
                jittered
            }
            Ended::GoAway {
                reason,
                retry_after,
            } => {
                tracing::info!(
                    node,
                    reason,
                    ?retry_after,
                    "the control plane ended the stream"
                );
                retry_after + jittered
            }
            Ended::Unwelcome(reason) => {
                tracing::error!(
                    node,
                    reason,
                    "the control plane takes no stream of this node"
                );
                link = Link::Refused(reason);
                jittered
            }
            Ended::Renewed => {
                tracing::info!(node, "the stream moves to the renewed certificate");
                Duration::ZERO
            }
            Ended::Mismatch(mismatch) => {
                tracing::error!(node, %mismatch, "discarding a batch, asking for everything");
                lock(&self.shared.outbox).counters.digest_mismatches += 1;
                self.resync = true;
                jittered
            }
            Ended::Refused(reason) => {
                tracing::error!(node, reason, "refusing the control plane; pods run on");
                link = Link::Refused(reason);
                REFUSED_BACKOFF.min(self.config.backoff_max * 3)
            }
        };
        self.link.send_if_modified(|old| {
            let changed = *old != link;
            *old = link;
            changed
        });
        wait
    }

    /// Brings the log to the disk, on a thread that may block.
    pub(super) async fn sync_log(&self) {
        let log = self.log.clone();
        match blocking::run(move || lock(&log).sync()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the feed's state is not on the disk"),
            Err(error) => tracing::error!(%error, "the feed's state is not on the disk"),
        }
    }
}

/// Writes final statuses to disk as they come, buries those that nobody asks for any more and forgets
/// them a day later, with or without a stream, until `shutdown`.
pub(super) async fn keep_finals(files: Finals, shared: Arc<Shared>, shutdown: CancellationToken) {
    let mut hour_ends = tokio::time::Instant::now() + HOUR;
    loop {
        let retry = keep_finals_once(&files, &shared).await.is_err();
        tokio::select! {
            // One permit is kept while nobody waits: no wake-up is lost.
            () = shared.persist.notified() => {}
            () = tokio::time::sleep(Duration::from_secs(1)), if retry => {}
            () = tokio::time::sleep_until(hour_ends) => {
                hour_ends += HOUR;
                begin_hour(&files, &shared).await;
            }
            () = shutdown.cancelled() => break,
        }
    }
    // A worker may have ended its pod on the way out.
    let _ = keep_finals_once(&files, &shared).await;
}

async fn begin_hour(files: &Finals, shared: &Arc<Shared>) {
    let hour = lock(&shared.reports).next_hour();
    let files = files.clone();
    let begun = blocking::run(move || files.begin_hour(hour)).await;
    if let Ok(Err(error)) = begun {
        tracing::warn!(%error, "old tombstones stay behind for another hour");
    }
}

/// Err: something could not be written and is to be tried again.
async fn keep_finals_once(files: &Finals, shared: &Arc<Shared>) -> Result<(), ()> {
    let (write, finished) = {
        let mut reports = lock(&shared.reports);
        (reports.unpersisted(), reports.take_finished())
    };
    if write.is_empty() && finished.is_empty() {
        return Ok(());
    }
    let files = files.clone();
    let done = blocking::run(move || {
        let mut written = Vec::new();
        let mut failed = false;
        for (uid, status) in write {
            match files.write(&uid, &status) {
                Ok(()) => written.push((uid, status)),
                Err(error) => {
                    tracing::error!(pod = %uid, %error, "a final status is not on disk, trying again");
                    failed = true;
                }
            }
        }
        let buried = finished.buried.iter().map(|one| (&one.0, files.bury(one)));
        let removed = finished.removed.iter().map(|uid| (uid, files.remove(uid)));
        let forgotten = finished.forgotten.iter();
        let forgotten = forgotten.map(|one| (&one.0, files.forget(one)));
        for (uid, done) in buried.chain(removed).chain(forgotten) {
            if let Err(error) = done {
                tracing::warn!(pod = %uid, %error, "a final record stays behind");
            }
        }
        (written, failed)
    });
    let (written, failed) = done.await.map_err(|_| ())?;
    {
        let mut reports = lock(&shared.reports);
        for (uid, status) in &written {
            reports.persisted(uid, status);
        }
    }
    shared.persisted.send_modify(|count| *count += 1);
    shared.wake.notify_one();
    if failed { Err(()) } else { Ok(()) }
}
