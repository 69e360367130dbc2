//! Keeps the index at etcd's head.
//!
//! ```text
//!  list at a revision that etcd still keeps ─► watch from there ─► whole revisions ─► index
//!                     ▲                           │   ▲ the connection breaks: from the last revision
//!                     └─ compacted meanwhile ◄────┘   └─ on another server
//! ```
//! The list is taken some thousand revisions back, and what came since is watched: so a control plane that has
//! just started can serve watches that began at another one.
//!
//! Invariants: the index's revision is always that of a transaction of the store, the same one on every control
//! plane; a part of a revision is never seen, for etcd sends none; nothing is applied twice.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;

use super::super::index::Index;
use super::super::{Entry, Revision};
use super::client::{self, Client, Failure};
use super::leader::{self, Leader, Term};
use super::meta::{self, META, Meta, Values};
use super::proto::event::EventType;
use super::proto::watch_request::RequestUnion;
use super::proto::{
    CompactionRequest, Event, RangeRequest, RangeResponse, WatchCreateRequest, WatchRequest,
    WatchResponse,
};
use super::wire::{self, HEAD, Offset, all, everything, inner, range_of};
use super::{COMPACT_EVERY, START_PATIENCE, WATCH_PAUSE};

/// Entries of one page of the list.
const PAGE_COUNT: i64 = 1_000;
/// How far back the list is taken, as far as etcd keeps it.
const BACK: [i64; 4] = [8_192, 1_024, 128, 0];

type Entries = BTreeMap<Arc<str>, Arc<Entry>>;

/// All of the store at one revision of etcd.
pub(super) struct Listed {
    /// etcd's revision.
    pub(super) raw: i64,
    /// That of the store's last transaction then.
    pub(super) revision: Revision,
    pub(super) entries: Entries,
    pub(super) leader: Leader,
}

async fn range(client: &Client, request: RangeRequest) -> Result<RangeResponse, Failure> {
    client
        .ask(START_PATIENCE, |open| {
            let request = request.clone();
            async move { open.kv().range(request).await }
        })
        .await
}

/// The store as far back as etcd keeps it, but not before `since`; see the module.
pub(super) async fn list_back(
    client: &Client,
    offset: Offset,
    values: &Values,
    since: i64,
) -> Result<Listed, String> {
    let now = range(client, range_of(HEAD)).await;
    let now = now.map_err(|failure| failure.to_string())?;
    let now = now.header.map_or(0, |header| header.revision);
    for back in BACK {
        let at = (now - back).max(since);
        match list(client, offset, values, at).await {
            Err(Failure::Refused(words)) if words.contains("compacted") => {}
            listed => return listed.map_err(|failure| failure.to_string()),
        }
    }
    Err("etcd is compacted faster than it can be read".to_owned())
}

/// All of it at revision `at`, page by page; 0: now.
pub(super) async fn list(
    client: &Client,
    offset: Offset,
    values: &Values,
    at: i64,
) -> Result<Listed, Failure> {
    let at_revision = |key: &str, revision| RangeRequest {
        revision,
        ..range_of(key)
    };
    let head = range(client, at_revision(HEAD, at)).await?;
    let raw = match at {
        0 => head.header.as_ref().map_or(0, |header| header.revision),
        at => at,
    };
    let revision = head.kvs.first().map_or(0, |kv| kv.mod_revision);
    let holder = range(client, at_revision(leader::KEY, raw)).await?;
    let leader = holder.kvs.first().map(|kv| Leader::of(kv, false));
    let (mut key, range_end) = everything();
    let mut entries = Entries::new();
    loop {
        let request = RangeRequest {
            key: key.clone(),
            range_end: range_end.clone(),
            limit: PAGE_COUNT,
            revision: raw,
            ..RangeRequest::default()
        };
        let page = range(client, request).await?;
        if let Some(last) = page.kvs.last() {
            let mut next = last.key.to_vec();
            next.push(0);
            key = next.into();
        }
        for kv in page.kvs {
            let entry = wire::entry(kv, offset, values).map_err(Failure::Refused)?;
            if let Some(entry) = entry {
                entries.insert(Arc::clone(&entry.key), Arc::new(entry));
            }
        }
        if !page.more {
            return Ok(Listed {
                raw,
                revision: offset.shown(revision),
                entries,
                leader: leader.unwrap_or_default(),
            });
        }
    }
}

/// Why a watch goes on on another stream.
enum Broken {
    /// From where it was.
    Again(String),
    /// What came meanwhile is not kept: everything anew.
    Relist,
    /// It is not the store that was opened any more.
    Other(String),
}

/// See the module.
pub(super) struct Follower {
    pub(super) client: Client,
    pub(super) index: Arc<Index>,
    pub(super) wakeups: watch::Sender<Revision>,
    pub(super) leader: watch::Sender<Leader>,
    pub(super) meta: Meta,
    pub(super) keys: PathBuf,
    pub(super) values: Arc<ArcSwap<Values>>,
    /// etcd's revision up to which the index has everything.
    pub(super) raw: i64,
    /// What the next compaction forgets.
    pub(super) to_compact: i64,
    /// Ours, when we lead.
    pub(super) term: Arc<OnceLock<Term>>,
    pub(super) lost: CancellationToken,
}

impl Follower {
    fn offset(&self) -> Offset {
        Offset(self.meta.offset)
    }

    pub(super) async fn run(mut self) {
        let mut compact_at = Instant::now() + COMPACT_EVERY;
        loop {
            match self.follow(&mut compact_at).await {
                Broken::Again(reason) => {
                    tracing::info!(reason, "the watch on etcd goes on elsewhere");
                    tokio::time::sleep(WATCH_PAUSE).await;
                }
                Broken::Relist => self.relist().await,
                Broken::Other(reason) => {
                    tracing::error!(reason, "this control plane ends: start it again");
                    return self.lost.cancel();
                }
            }
        }
    }

    async fn relist(&mut self) {
        tracing::warn!("etcd has compacted what was not read yet: reading all anew");
        let values = self.values.load_full();
        match list(&self.client, self.offset(), &values, 0).await {
            Ok(listed) => {
                self.index.replace(listed.entries, listed.revision);
                self.raw = listed.raw;
                self.leader.send_replace(listed.leader);
                self.wakeups.send_replace(listed.revision);
            }
            Err(failure) => {
                tracing::warn!(%failure, "etcd cannot be read");
                tokio::time::sleep(WATCH_PAUSE).await;
            }
        }
    }

    async fn follow(&mut self, compact_at: &mut Instant) -> Broken {
        let open = match self.client.open().await {
            Ok(open) => open,
            Err(failure) => return Broken::Again(failure.to_string()),
        };
        let (key, range_end) = all();
        let create = WatchCreateRequest {
            key,
            range_end,
            start_revision: self.raw + 1,
            progress_notify: false,
        };
        // The stream up stays open as long as the sender lives.
        let (requests, stream) = tokio::sync::mpsc::channel(1);
        let first = WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(create)),
        };
        let _ = requests.send(first).await;
        let mut request = tonic::Request::new(tokio_stream::wrappers::ReceiverStream::new(stream));
        // A server that is cut off from the others ends the stream instead of saying nothing for ever.
        let metadata = request.metadata_mut();
        metadata.insert("hasleader", MetadataValue::from_static("true"));
        let opening = tokio::time::timeout(client::CALL_TIMEOUT, async {
            open.watch().watch(request).await
        });
        let mut answers = match opening.await {
            Ok(Ok(answers)) => answers.into_inner(),
            Ok(Err(status)) => {
                self.client.leave(&open);
                return Broken::Again(format!("{}: {}", open.url(), status.message()));
            }
            Err(_) => {
                self.client.leave(&open);
                return Broken::Again(format!("{}: no watch in time", open.url()));
            }
        };
        loop {
            let answer = tokio::select! {
                // All arms are cancel safe: a message is taken or still there.
                answer = answers.message() => answer,
                () = open.left() => return Broken::Again(format!("{} does not answer", open.url())),
                () = tokio::time::sleep_until(*compact_at) => {
                    *compact_at = Instant::now() + COMPACT_EVERY;
                    self.compact().await;
                    continue;
                }
            };
            let broken = match answer {
                Ok(Some(answer)) => match self.take(answer) {
                    Ok(()) => continue,
                    Err(broken) => broken,
                },
                Ok(None) => Broken::Again(format!("{}: the watch has ended", open.url())),
                Err(status) => Broken::Again(format!("{}: {}", open.url(), status.message())),
            };
            self.client.leave(&open);
            return broken;
        }
    }

    fn take(&mut self, answer: WatchResponse) -> Result<(), Broken> {
        if answer.compact_revision > 0 {
            return Err(Broken::Relist);
        }
        if answer.canceled {
            return Err(Broken::Again(answer.cancel_reason));
        }
        let (mut events, mut last, mut store) = (Vec::new(), self.raw, 0);
        for event in answer.events {
            let Some(kv) = &event.kv else {
                continue;
            };
            // What was seen already cannot come again: the watch began after it. To be certain:
            if kv.mod_revision <= self.raw {
                continue;
            }
            last = last.max(kv.mod_revision);
            if *kv.key == *META.as_bytes() {
                self.take_meta(&event)?;
            } else if *kv.key == *leader::KEY.as_bytes() {
                let is_gone = event.r#type() == EventType::Delete;
                self.leader.send_replace(Leader::of(kv, is_gone));
            } else if *kv.key == *HEAD.as_bytes() {
                store = store.max(kv.mod_revision);
            } else if inner(&kv.key).is_some() {
                store = store.max(kv.mod_revision);
                events.push(event);
            }
        }
        let values = self.values.load_full();
        let known = |key: &str| self.index.get(key);
        let changes =
            wire::changes(events, known, self.offset(), &*values).map_err(Broken::Again)?;
        self.raw = last;
        if store > 0 {
            let revision = self.offset().shown(store);
            let _ = self.index.apply(&changes, revision);
            self.wakeups.send_replace(revision);
        }
        Ok(())
    }

    /// A key of data may have been added; anything else makes it another store.
    fn take_meta(&mut self, event: &Event) -> Result<(), Broken> {
        let gone = || Broken::Other("the store was removed from etcd".to_owned());
        let kv = event.kv.as_ref().ok_or_else(gone)?;
        if event.r#type() == EventType::Delete {
            return Err(gone());
        }
        let meta = meta::parse(&kv.value).map_err(Broken::Other)?;
        let rest = |meta: &Meta| Meta {
            data_keys: BTreeMap::new(),
            cluster: None,
            ..meta.clone()
        };
        if rest(&meta) != rest(&self.meta) {
            return Err(Broken::Other("a backup was restored into it".to_owned()));
        }
        if meta.data_keys != self.meta.data_keys {
            let values = Values::reopened(&meta, &self.keys);
            let values = values.map_err(|error| Broken::Other(error.to_string()))?;
            self.values.store(Arc::new(values));
        }
        self.meta = meta;
        Ok(())
    }

    /// The leader has etcd forget what was written before the last time.
    async fn compact(&mut self) {
        let revision = std::mem::replace(&mut self.to_compact, self.raw);
        if self.term.get().is_none() {
            return;
        }
        let request = CompactionRequest {
            revision,
            physical: false,
        };
        let done = self
            .client
            .call(|open| async move { open.kv().compact(request).await });
        match done.await {
            // Somebody else has, or nothing was written.
            Ok(_) | Err(Failure::Refused(_)) => {}
            Err(failure) => tracing::warn!(%failure, "etcd was not compacted"),
        }
    }
}
