//! Between the store's terms and etcd's: keys, revisions, transactions, events. Pure.
//!
//! A key is below [`PREFIX`]. Revisions are etcd's own, plus an offset that a restore sets, so that they grow
//! over everything that was given before in another etcd, or in a file.

use std::collections::HashMap;
use std::sync::Arc;

use super::proto::compare::{CompareResult, CompareTarget, TargetUnion};
use super::proto::event::EventType;
use super::proto::request_op::Request;
use super::proto::response_op::Response;
use super::proto::{
    Compare, DeleteRangeRequest, Event, KeyValue, PutRequest, RangeRequest, RequestOp, TxnRequest,
    TxnResponse,
};
use bytes::Bytes;

use super::super::{Change, Entry, Precondition, Revision, StoreError, Txn};
use super::leader::{self, Term};

/// What etcd's keys have before ours.
pub(super) const PREFIX: &str = "/gantry/store";
/// Written by every transaction of the store: its revision is that of the last one.
pub(super) const HEAD: &str = "/gantry/head";

pub(super) fn range_of(key: &str) -> RangeRequest {
    RangeRequest {
        key: key.to_owned().into(),
        ..RangeRequest::default()
    }
}

pub(super) fn put(request: PutRequest) -> RequestOp {
    RequestOp {
        request: Some(Request::RequestPut(request)),
    }
}

pub(super) fn delete(request: DeleteRangeRequest) -> RequestOp {
    RequestOp {
        request: Some(Request::RequestDeleteRange(request)),
    }
}

fn range(request: RangeRequest) -> RequestOp {
    RequestOp {
        request: Some(Request::RequestRange(request)),
    }
}

/// The first and the end of everything of ours.
pub(super) fn everything() -> (Bytes, Bytes) {
    (format!("{PREFIX}/").into(), format!("{PREFIX}0").into())
}

/// The first and the end of what is watched: the store, its head, who leads, and what the store is.
pub(super) fn all() -> (Bytes, Bytes) {
    ("/gantry/".into(), "/gantry0".into())
}

/// The operation that makes a transaction one of the store.
pub(super) fn mark() -> RequestOp {
    put(PutRequest {
        key: HEAD.into(),
        value: Bytes::new(),
        lease: 0,
    })
}

pub(super) fn outer(key: &str) -> Bytes {
    format!("{PREFIX}{key}").into()
}

/// `None`: not one of ours.
pub(super) fn inner(key: &[u8]) -> Option<&str> {
    std::str::from_utf8(key).ok()?.strip_prefix(PREFIX)
}

/// How revisions are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offset(pub(super) u64);

impl Offset {
    pub(super) fn shown(self, raw: i64) -> Revision {
        u64::try_from(raw).unwrap_or(0) + self.0
    }

    /// A revision that etcd never gave is 0 there: no key was written then.
    pub(super) fn raw(self, shown: Revision) -> i64 {
        let raw = shown.saturating_sub(self.0);
        i64::try_from(raw).unwrap_or(0)
    }
}

/// How values are kept: Secrets sealed, the rest as they are.
pub(super) trait Sealer {
    fn seal(&self, key: &str, value: &Bytes) -> Result<Bytes, String>;
    fn open(&self, key: &str, value: Bytes) -> Result<Bytes, String>;
}

/// That a key of etcd's was made by this revision; 0: that it is not there.
pub(super) fn is_made_at(key: impl Into<Bytes>, revision: i64) -> Compare {
    Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Create.into(),
        key: key.into(),
        target_union: Some(TargetUnion::CreateRevision(revision)),
    }
}

/// That a key of etcd's was last changed by this revision; 0: that it is not there.
pub(super) fn is_changed_at(key: impl Into<Bytes>, revision: i64) -> Compare {
    Compare {
        target: CompareTarget::Mod.into(),
        target_union: Some(TargetUnion::ModRevision(revision)),
        ..is_made_at(key, revision)
    }
}

fn condition(precondition: &Precondition, offset: Offset) -> Compare {
    match precondition {
        Precondition::At { key, revision } => {
            let at = match offset.raw(*revision) {
                // Of another history, or none: no key has it.
                0 => -1,
                raw => raw,
            };
            is_changed_at(outer(key), at)
        }
        Precondition::Absent { key } => is_made_at(outer(key), 0),
        Precondition::Exists { key } => Compare {
            result: CompareResult::Greater.into(),
            ..is_made_at(outer(key), 0)
        },
    }
}

/// The transaction as etcd takes it. When it does not hold, the answer has our term's key and those of the
/// preconditions, in this order.
pub(super) fn request(
    txn: &Txn,
    term: Term,
    offset: Offset,
    sealer: &dyn Sealer,
) -> Result<TxnRequest, String> {
    let mut request = TxnRequest {
        compare: vec![term.holds()],
        success: vec![mark()],
        failure: vec![range(leader::look())],
    };
    for precondition in &txn.preconditions {
        request.compare.push(condition(precondition, offset));
        request.failure.push(range(RangeRequest {
            key: outer(precondition.key()),
            keys_only: true,
            ..RangeRequest::default()
        }));
    }
    for (key, value) in &txn.puts {
        request.success.push(put(PutRequest {
            key: outer(key),
            value: sealer.seal(key, value)?,
            lease: 0,
        }));
    }
    for key in &txn.deletes {
        request.success.push(delete(DeleteRangeRequest {
            key: outer(key),
            range_end: Bytes::new(),
        }));
    }
    Ok(request)
}

fn found(answer: &TxnResponse, index: usize) -> Option<&KeyValue> {
    match answer.responses.get(index)?.response.as_ref()? {
        Response::ResponseRange(range) => range.kvs.first(),
        _ => None,
    }
}

/// Why a transaction was not taken.
pub(super) fn refusal(txn: &Txn, answer: &TxnResponse, term: Term, offset: Offset) -> StoreError {
    if !term.is(found(answer, 0).map(|kv| kv.create_revision)) {
        return StoreError::Closed;
    }
    for (index, precondition) in txn.preconditions.iter().enumerate() {
        let found = found(answer, index + 1).map(|kv| offset.shown(kv.mod_revision));
        let (holds, expected) = match precondition {
            Precondition::At { revision, .. } => (found == Some(*revision), Some(*revision)),
            Precondition::Absent { .. } => (found.is_none(), None),
            Precondition::Exists { .. } => (found.is_some(), None),
        };
        if !holds {
            return StoreError::Conflict {
                key: Arc::clone(precondition.key()),
                expected,
                found,
            };
        }
    }
    StoreError::Unavailable {
        reason: "etcd refused a transaction whose conditions hold".to_owned(),
    }
}

/// One of ours as the index has it; `None`: not one of ours.
pub(super) fn entry(
    kv: KeyValue,
    offset: Offset,
    sealer: &dyn Sealer,
) -> Result<Option<Entry>, String> {
    let Some(key) = inner(&kv.key) else {
        return Ok(None);
    };
    Ok(Some(Entry {
        value: sealer.open(key, kv.value)?,
        create_revision: offset.shown(kv.create_revision),
        mod_revision: offset.shown(kv.mod_revision),
        key: key.into(),
    }))
}

/// What events do to what is known, in the order of revisions and, within one, of keys.
pub(super) fn changes(
    mut events: Vec<Event>,
    known: impl Fn(&str) -> Option<Arc<Entry>>,
    offset: Offset,
    sealer: &dyn Sealer,
) -> Result<Vec<Arc<Change>>, String> {
    let place = |event: &Event| {
        let kv = event.kv.as_ref();
        kv.map(|kv| (kv.mod_revision, kv.key.clone()))
    };
    events.sort_by_key(place);
    let mut overlay: HashMap<Arc<str>, Option<Arc<Entry>>> = HashMap::new();
    let mut changes = Vec::with_capacity(events.len());
    for event in events {
        let is_delete = event.r#type() == EventType::Delete;
        let Some(kv) = event.kv else {
            continue;
        };
        let Some(key) = inner(&kv.key) else {
            continue;
        };
        let previous = match overlay.get(key) {
            Some(staged) => staged.clone(),
            None => known(key),
        };
        let key: Arc<str> = previous
            .as_ref()
            .map_or_else(|| key.into(), |previous| Arc::clone(&previous.key));
        let change = if is_delete {
            let Some(previous) = previous else {
                continue;
            };
            overlay.insert(Arc::clone(&key), None);
            Change::Delete {
                key,
                previous,
                revision: offset.shown(kv.mod_revision),
            }
        } else {
            let value = sealer.open(&key, kv.value)?;
            let entry = Arc::new(Entry {
                key: Arc::clone(&key),
                value,
                create_revision: offset.shown(kv.create_revision),
                mod_revision: offset.shown(kv.mod_revision),
            });
            overlay.insert(key, Some(Arc::clone(&entry)));
            Change::Put { entry, previous }
        };
        changes.push(Arc::new(change));
    }
    Ok(changes)
}
