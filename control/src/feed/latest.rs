//! The common part of the feed: the newest value of each key, ordered by when it last changed.
//!
//! There is no queue per stream. A stream holds a revision, and what it needs next is every key
//! whose last change is newer: one entry per key however often it changed, deletions included as
//! tombstones. A slow reader therefore gets a bigger next batch and costs no memory.
//!
//! Invariants: a key is in `by_rev` exactly once, at its last change; `digest` is the XOR over the
//! live values; every deletion after [`Latest::complete_since`] still has its tombstone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use gantry_api::digest::{Digest, item_hash};
use gantry_api::proto;
use prost::Message as _;

/// Deletions that are remembered. An agent that was away for more starts from a full copy.
pub(super) const TOMBSTONES_MAX: usize = 65_536;

/// An item as every stream sends it: encoded once, shared.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Encoded {
    /// An encoded `proto::Item`.
    pub(super) bytes: Bytes,
    /// Its part of the digest.
    pub(super) hash: u64,
}

impl Encoded {
    /// Encodes an item; `rev` is 0 in the common part.
    pub(super) fn new(key: &str, rev: u64, value: proto::item::Value) -> Self {
        let item = proto::Item {
            key: key.into(),
            rev,
            value: Some(value),
        };
        let bytes = Bytes::from(item.encode_to_vec());
        let hash = item_hash(&bytes);
        Self { bytes, hash }
    }

    /// What takes a key away.
    pub(super) fn deletion(key: &str) -> Bytes {
        let value = Some(proto::item::Value::Deleted(true));
        Bytes::from(
            proto::Item {
                key: key.into(),
                rev: 0,
                value,
            }
            .encode_to_vec(),
        )
    }
}

struct Slot {
    rev: u64,
    /// What every stream sends: the value, or that it was deleted at `rev`.
    item: Encoded,
    is_live: bool,
}

impl Slot {
    fn value(&self) -> Option<&Encoded> {
        self.is_live.then_some(&self.item)
    }
}

/// See the module.
pub(super) struct Latest {
    slots: BTreeMap<Arc<str>, Slot>,
    by_rev: BTreeSet<(u64, Arc<str>)>,
    tombstones: BTreeSet<(u64, Arc<str>)>,
    tombstones_max: usize,
    digest: Digest,
    complete_since: u64,
    changed_at: u64,
}

impl Latest {
    /// Empty, knowing of no deletion before or at `start_rev`.
    pub(super) fn new(start_rev: u64, tombstones_max: usize) -> Self {
        Self {
            slots: BTreeMap::new(),
            by_rev: BTreeSet::new(),
            tombstones: BTreeSet::new(),
            tombstones_max,
            digest: Digest::default(),
            complete_since: start_rev,
            // A deletion that is not known of may have been the last change.
            changed_at: start_rev,
        }
    }

    /// The digest of all live values.
    pub(super) fn digest(&self) -> u64 {
        self.digest.value()
    }

    /// The last revision that changed anything here, or may have before this began.
    pub(super) fn changed_at(&self) -> u64 {
        self.changed_at
    }

    /// A stream at this revision or above can go on from there; an older one needs everything.
    pub(super) fn complete_since(&self) -> u64 {
        self.complete_since
    }

    /// The live value of a key.
    pub(super) fn get(&self, key: &str) -> Option<&Encoded> {
        self.slots.get(key)?.value()
    }

    /// Sets or deletes a key at `rev`. Returns false when that changes nothing.
    pub(super) fn set(&mut self, key: &str, value: Option<Encoded>, rev: u64) -> bool {
        let old = self.slots.get_key_value(key);
        if old.and_then(|(_, slot)| slot.value()) == value.as_ref() {
            return false;
        }
        let key: Arc<str> = old.map_or_else(|| key.into(), |(key, _)| key.clone());
        if let Some(old) = self.slots.remove(&key) {
            let place = (old.rev, key.clone());
            self.by_rev.remove(&place);
            self.tombstones.remove(&place);
            if let Some(old) = old.value() {
                self.digest.toggle(old.hash);
            }
        }
        match &value {
            Some(value) => self.digest.toggle(value.hash),
            None => {
                self.tombstones.insert((rev, key.clone()));
            }
        }
        self.by_rev.insert((rev, key.clone()));
        let is_live = value.is_some();
        let item = value.unwrap_or_else(|| Encoded {
            bytes: Encoded::deletion(&key),
            hash: 0,
        });
        self.slots.insert(key, Slot { rev, item, is_live });
        self.changed_at = self.changed_at.max(rev);
        self.forget_old_tombstones();
        true
    }

    fn forget_old_tombstones(&mut self) {
        while self.tombstones.len() > self.tombstones_max {
            let Some((rev, key)) = self.tombstones.pop_first() else {
                break;
            };
            self.slots.remove(&key);
            self.complete_since = self.complete_since.max(rev);
            self.by_rev.remove(&(rev, key));
        }
    }

    /// Every key that changed after `rev`, oldest change first, each with its newest value.
    pub(super) fn since(&self, rev: u64) -> impl Iterator<Item = Bytes> {
        let from = (rev.saturating_add(1), Arc::<str>::from(""));
        let slots = self.by_rev.range(from..);
        slots.filter_map(|(_, key)| Some(self.slots.get(key)?.item.bytes.clone()))
    }

    /// Every live value.
    pub(super) fn all(&self) -> impl Iterator<Item = Bytes> {
        self.slots
            .values()
            .filter_map(Slot::value)
            .map(|value| value.bytes.clone())
    }
}
