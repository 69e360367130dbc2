//! Keeps the index at the store's head: a snapshot, then the watch, one whole revision at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::Inner;
use super::view::Index;
use crate::store::{Change, Store, Watch};

const PREFIX: &str = "/registry/";

/// An index of the store as it is now.
pub(super) fn load(store: &Store) -> Index {
    let (rev, entries) = store.list(PREFIX);
    let mut index = Index::new(rev);
    for entry in entries {
        index.apply(&entry.key, Some(&entry.value), entry.mod_revision);
    }
    index.advance(rev);
    index
}

/// Applies every change of the store, until it closes.
pub(super) async fn follow(inner: &Arc<Inner>) {
    loop {
        let rev = inner.index().rev();
        match inner.registry.store().watch(PREFIX, rev) {
            Ok(mut watch) => {
                follow_watch(inner, &mut watch).await;
                if watch.ended().is_none() {
                    return; // closed
                }
            }
            Err(compacted) => {
                tracing::warn!(%compacted, "the feed fell behind the store's history, reading it anew");
                reload(inner);
            }
        }
    }
}

async fn follow_watch(inner: &Arc<Inner>, watch: &mut Watch) {
    while let Some(first) = watch.next().await {
        let mut changes = vec![first];
        // A transaction is visible as a whole: when nothing more is there now, the revision that
        // the watch names is complete.
        while let Ok(Some(change)) = watch.try_next() {
            changes.push(change);
        }
        apply(inner, &changes, watch.revision());
    }
}

fn apply(inner: &Arc<Inner>, changes: &[Arc<Change>], rev: u64) {
    let touched = {
        let mut index = inner.index_mut();
        for change in changes {
            let value = match &**change {
                Change::Put { entry, .. } => Some(&entry.value),
                Change::Delete { .. } => None,
            };
            index.apply(change.key(), value, change.revision());
        }
        index.advance(rev)
    };
    wake(inner, &touched);
}

/// Brings the index to a fresh snapshot by the difference, so that sessions can go on.
fn reload(inner: &Arc<Inner>) {
    let (rev, entries) = inner.registry.store().list(PREFIX);
    let touched = {
        let mut index = inner.index_mut();
        let entries: BTreeMap<&str, (&Bytes, u64)> = entries
            .iter()
            .map(|e| (&*e.key, (&e.value, e.mod_revision)))
            .collect();
        index.replace(&entries, rev);
        index.advance(rev)
    };
    wake(inner, &touched);
}

fn wake(inner: &Arc<Inner>, touched: &BTreeSet<String>) {
    let (rev, common_rev) = {
        let index = inner.index();
        (index.rev(), index.common_rev())
    };
    for node in touched {
        if let Some(link) = inner.known_link(node) {
            link.private.notify_one();
        }
    }
    inner
        .common
        .send_if_modified(|old| std::mem::replace(old, common_rev) != common_rev);
    inner.head.send_replace(rev);
}
