//! What writers were told and watchers saw, and whether it fits together.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::store::{Change, Revision, Store, StoreError, Txn};

/// What a writer was told.
#[derive(Default)]
pub(crate) struct Told {
    /// Revision, key and value of each acknowledged write.
    pub(crate) acknowledged: Vec<(Revision, String, String)>,
    /// Of each write, when it was acknowledged.
    pub(crate) times: Vec<Instant>,
    /// Values whose fate was not told.
    pub(crate) unknown: Vec<String>,
}

impl Told {
    /// From `began` to the first write that was acknowledged half a second later: what was under way then does
    /// not count.
    pub(crate) fn pause_after(&self, began: Instant) -> Option<Duration> {
        let late = began + Duration::from_millis(500);
        let first = self.times.iter().filter(|at| **at > late).min();
        first.map(|at| *at - began)
    }
}

/// Writes values that are never written twice, two keys at once, until `stop`.
pub(crate) async fn write(
    store: Store,
    writer: String,
    told: Arc<Mutex<Told>>,
    stop: CancellationToken,
) {
    for n in 0.. {
        if stop.is_cancelled() {
            return;
        }
        let keys = [
            format!("/w/{writer}/{}", n % 7),
            format!("/w/{writer}/twin-{}", n % 7),
        ];
        let value = format!("{writer}-{n}");
        let txn = keys
            .iter()
            .fold(Txn::new(), |txn, key| txn.put(key.as_str(), value.clone()));
        let result = store.commit(txn).await;
        let pause = {
            let mut told = told.lock().unwrap();
            match result {
                Ok(revision) => {
                    for key in keys {
                        told.acknowledged.push((revision, key, value.clone()));
                    }
                    told.times.push(Instant::now());
                    Duration::ZERO
                }
                Err(StoreError::Unavailable { .. }) => {
                    told.unknown.push(value);
                    Duration::from_millis(50)
                }
                // It does not lead any more.
                Err(StoreError::Closed) => return told.unknown.push(value),
                Err(error) => panic!("{error}"),
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Everything that a watch sees until it ends or `stop`.
pub(crate) async fn watch(
    store: Store,
    after: Revision,
    stop: CancellationToken,
) -> Vec<Arc<Change>> {
    let mut watch = store.watch("/w/", after).unwrap();
    let mut history = Vec::new();
    while let Some(Some(change)) = stop.run_until_cancelled(watch.next()).await {
        history.push(change);
    }
    assert!(watch.ended().is_none(), "the watch fell behind");
    history
}

/// The same, at one store after the other: each goes on where the last one was.
pub(crate) async fn watch_in_turns(
    stores: Vec<Store>,
    mut after: Revision,
    stop: CancellationToken,
) -> Vec<Arc<Change>> {
    let mut history: Vec<Arc<Change>> = Vec::new();
    for store in stores.iter().cycle() {
        if stop.is_cancelled() {
            break;
        }
        if store.fresh().await.is_err() {
            continue;
        }
        let mut watch = store.watch("/w/", after).unwrap();
        let turn = tokio::time::sleep(Duration::from_millis(150));
        tokio::pin!(turn);
        loop {
            tokio::select! {
                change = watch.next() => match change {
                    Some(change) => history.push(change),
                    None => break,
                },
                () = &mut turn => break,
            }
        }
        // To the end of a revision: it is seen as a whole.
        while let Ok(Some(change)) = watch.try_next() {
            history.push(change);
        }
        assert!(watch.ended().is_none(), "the watch fell behind");
        after = watch.revision();
    }
    history
}

/// Ordered, unique and atomic; the last of each key is what the store has; every acknowledged write is there at
/// its revision, and nothing that nobody wrote.
pub(crate) fn check(history: &[Arc<Change>], told: &Told, store: &Store) {
    let mut last: BTreeMap<String, Revision> = BTreeMap::new();
    let mut before = (0, String::new());
    let mut seen = BTreeMap::new();
    let mut per_revision: BTreeMap<Revision, Vec<String>> = BTreeMap::new();
    for change in history {
        let place = (change.revision(), change.key().to_string());
        assert!(
            place > before,
            "out of order or twice: {before:?}, {place:?}"
        );
        let previous = change.previous().map(|previous| previous.mod_revision);
        assert_eq!(
            previous,
            last.get(&place.1).copied(),
            "{place:?} follows another one"
        );
        if let Change::Put { entry, .. } = &**change {
            let value = String::from_utf8(entry.value.to_vec()).unwrap();
            per_revision.entry(place.0).or_default().push(value.clone());
            seen.insert(place.clone(), value);
        }
        last.insert(place.1.clone(), place.0);
        before = place;
    }
    for (revision, values) in &per_revision {
        let are_twins = values.len() == 2 && values[0] == values[1];
        assert!(
            are_twins,
            "revision {revision} is a part of one: {values:?}"
        );
    }
    for (revision, key, value) in &told.acknowledged {
        let found = seen.get(&(*revision, key.clone()));
        assert_eq!(found, Some(value), "{key} at {revision} is lost");
    }
    let acknowledged = told.acknowledged.iter().map(|(_, _, value)| value);
    let written: std::collections::BTreeSet<&String> = acknowledged.chain(&told.unknown).collect();
    for (place, value) in &seen {
        assert!(written.contains(value), "{place:?}: nobody wrote {value}");
    }
    for entry in store.list("/w/").1 {
        let seen = last.get(&*entry.key);
        assert_eq!(seen, Some(&entry.mod_revision), "{}", entry.key);
    }
}

/// Two histories of the same store are the same.
pub(crate) fn check_same(one: &[Arc<Change>], other: &[Arc<Change>]) {
    let shape = |history: &[Arc<Change>]| -> Vec<(Revision, String)> {
        let places = history.iter().map(|c| (c.revision(), c.key().to_string()));
        places.collect()
    };
    assert_eq!(shape(one), shape(other));
}
