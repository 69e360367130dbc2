mod crash;
mod fault;
mod properties;
mod sealing;

use std::path::Path;
use std::sync::Arc;

use super::*;

fn open(dir: &Path) -> Store {
    Store::open(&dir.join("store.redb")).unwrap()
}

fn key(n: usize) -> String {
    format!("/registry/configmaps/a/{n}")
}

fn shown(change: &Change) -> (Revision, String, Option<Bytes>) {
    let value = match change {
        Change::Put { entry, .. } => Some(entry.value.clone()),
        Change::Delete { .. } => None,
    };
    (change.revision(), change.key().to_string(), value)
}

#[tokio::test]
async fn what_was_written_is_read_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let lineage = store.lineage().clone();
    assert_eq!(store.revision(), 0);
    assert_eq!(store.commit(Txn::new().put("/a/1", "one")).await, Ok(1));
    assert_eq!(
        store
            .commit(Txn::new().put("/a/1", "uno").put("/a/2", "two"))
            .await,
        Ok(2)
    );
    assert_eq!(store.commit(Txn::new().delete("/a/2")).await, Ok(3));
    store.close().await;
    assert_eq!(
        store.commit(Txn::new().put("/a/3", "x")).await,
        Err(StoreError::Closed)
    );

    let store = open(dir.path());
    assert_eq!(store.lineage(), &lineage);
    assert_eq!(store.revision(), 3);
    let (revision, entries) = store.list("/a/");
    assert_eq!((revision, entries.len()), (3, 1));
    let expected = Entry {
        key: "/a/1".into(),
        value: "uno".into(),
        create_revision: 1,
        mod_revision: 2,
    };
    assert_eq!(*entries[0], expected);
    let mut watch = store.watch("/a/", 1).unwrap();
    let mut seen = Vec::new();
    while let Ok(Some(change)) = watch.try_next() {
        assert!(change.previous().is_some() || **change.key() == *"/a/2");
        seen.push(shown(&change));
    }
    let expected = [
        (2, "/a/1".to_owned(), Some("uno".into())),
        (2, "/a/2".to_owned(), Some("two".into())),
        (3, "/a/2".to_owned(), None),
    ];
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn preconditions_are_checked_at_the_moment_of_the_write() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let create = || Txn::new().require_absent("/a").put("/a", "1");
    assert_eq!(store.commit(create()).await, Ok(1));
    assert_eq!(
        store.commit(create()).await,
        Err(StoreError::Conflict {
            key: "/a".into(),
            expected: None,
            found: Some(1),
        })
    );
    // Of many that saw the same revision, one wins.
    let writes = (0..32).map(|n| {
        let txn = Txn::new().require_at("/a", 1).put("/a", format!("{n}"));
        let store = store.clone();
        tokio::spawn(async move { store.commit(txn).await })
    });
    let mut won = 0;
    for write in writes.collect::<Vec<_>>() {
        won += usize::from(write.await.unwrap().is_ok());
    }
    assert_eq!((won, store.revision()), (1, 2));
    assert!(
        store
            .commit(Txn::new().require_exists("/b").put("/c", ""))
            .await
            .is_err()
    );
    assert!(store.get("/c").is_none());
    // Nothing to do: no revision.
    assert_eq!(store.commit(Txn::new().delete("/b")).await, Ok(2));
}

#[tokio::test]
async fn limits_name_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let large = vec![b'x'; VALUE_BYTES_MAX + 1];
    let error = store.commit(Txn::new().put("/a", large)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "size in bytes of \"/a\" is 1572865, the limit is 1572864"
    );
    let twice = Txn::new().put("/a", "1").delete("/a");
    assert_eq!(
        store.commit(twice).await,
        Err(StoreError::DuplicateKey { key: "/a".into() })
    );
    let long = "k".repeat(KEY_BYTES_MAX + 1);
    assert!(
        store
            .commit(Txn::new().put(long.as_str(), ""))
            .await
            .is_err()
    );
    assert_eq!(store.revision(), 0);
}

#[tokio::test]
async fn a_second_instance_is_told_who_holds_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let error = Store::open(&dir.path().join("store.redb")).err().unwrap();
    assert!(matches!(error, OpenError::Locked { .. }), "{error}");
    store.close().await;
    open(dir.path());
}

#[test]
fn a_file_that_is_no_store_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    std::fs::write(&path, "something else entirely").unwrap();
    assert!(Store::open(&path).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"something else entirely");
}

/// Writes `count` single-key transactions over 100 keys.
async fn churn(store: &Store, count: usize) {
    let writes = (0..count).map(|n| {
        let txn = Txn::new().put(key(n % 100), format!("{n}"));
        let store = store.clone();
        tokio::spawn(async move { store.commit(txn).await })
    });
    for write in writes.collect::<Vec<_>>() {
        write.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn history_is_bounded_on_disk_and_in_memory_and_says_what_it_lost() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut slow = store.watch("/registry/", 0).unwrap();
    let last = (HISTORY_CHANGE_COUNT_MAX + 500) as Revision;
    churn(&store, HISTORY_CHANGE_COUNT_MAX + 500).await;
    assert_eq!(store.revision(), last);
    let gone = slow.next().await;
    assert!(gone.is_none());
    let ended = slow.ended().unwrap().clone();
    assert_eq!((ended.requested, ended.current), (0, last));
    assert_eq!(ended.oldest, last - HISTORY_CHANGE_COUNT_MAX as Revision);
    assert!(store.watch("/registry/", ended.oldest - 1).is_err());
    assert!(
        store.watch("/registry/", last + 1).is_err(),
        "the future is another history"
    );
    let mut all = store.watch("/registry/", ended.oldest).unwrap();
    for revision in ended.oldest + 1..=last {
        assert_eq!(all.try_next().unwrap().unwrap().revision(), revision);
    }
    let live = store.list("/registry/");
    // One more write, so that the last rows to forget are forgotten.
    store.commit(Txn::new().put("/other", "")).await.unwrap();
    store.close().await;
    let rows = log::row_count(&dir.path().join("store.redb"));
    assert!(rows <= HISTORY_CHANGE_COUNT_MAX + 300, "{rows} rows");
    let store = open(dir.path());
    assert_eq!(store.list("/registry/").1, live.1);
    let mut all = store.watch("/registry/", ended.oldest + 1).unwrap();
    assert_eq!(
        all.try_next().unwrap().unwrap().revision(),
        ended.oldest + 2
    );
}

#[tokio::test]
async fn a_watch_wakes_up_and_ends_with_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut watch = store.watch("/a/", 0).unwrap();
    let writer = store.clone();
    let task = tokio::spawn(async move {
        writer.commit(Txn::new().put("/b/1", "")).await.unwrap();
        writer.commit(Txn::new().put("/a/1", "")).await.unwrap();
        writer.close().await;
    });
    assert_eq!(watch.next().await.unwrap().revision(), 2);
    assert!(watch.next().await.is_none());
    assert!(watch.ended().is_none());
    task.await.unwrap();
    drop(Arc::new(store));
}

#[tokio::test]
async fn a_large_store_remembers_as_many_changes_as_it_has_objects() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let count = HISTORY_CHANGE_COUNT_MAX + 2_000;
    let write = async |delete: bool| {
        for first in (0..count).step_by(TXN_OPERATION_COUNT_MAX) {
            let keys = first..count.min(first + TXN_OPERATION_COUNT_MAX);
            let txn = keys.fold(Txn::new(), |txn, n| match delete {
                true => txn.delete(key(n)),
                false => txn.put(key(n), "x"),
            });
            store.commit(txn).await.unwrap();
        }
    };
    write(false).await;
    assert!(store.watch("/registry/", 0).is_ok());
    // With the objects goes what is remembered of them.
    write(true).await;
    let oldest = store.oldest();
    let kept = store.revision() - oldest;
    let per_txn = TXN_OPERATION_COUNT_MAX as Revision;
    assert!(kept * per_txn <= HISTORY_CHANGE_COUNT_MAX as Revision + per_txn);
}
