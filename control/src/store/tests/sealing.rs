//! Secrets on disk: sealed, readable through any number of new keys and restarts at any moment, and never
//! by another key.

use std::path::PathBuf;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::store::seal::{KeyFile, SEALED_PREFIX};

const WORDS: &[u8] = b"words that are on no disk";

fn places(dir: &Path) -> (PathBuf, PathBuf) {
    (dir.join("store.redb"), dir.join("store.key"))
}

fn open_sealed(dir: &Path) -> Store {
    let (path, keys) = places(dir);
    Store::open_sealed(&path, &keys).unwrap()
}

fn is_on_disk(dir: &Path) -> bool {
    let bytes = std::fs::read(places(dir).0).unwrap();
    bytes.windows(WORDS.len()).any(|window| window == WORDS)
}

fn secret(n: usize) -> String {
    format!("{SEALED_PREFIX}a/{n}")
}

async fn settled(store: &Store) -> Report {
    loop {
        let report = store.report().await.unwrap();
        if !report.is_resealing {
            return report;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_secret_is_sealed_and_a_config_map_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_sealed(dir.path());
    store.commit(Txn::new().put(key(1), WORDS)).await.unwrap();
    store.close().await;
    assert!(is_on_disk(dir.path()), "the test knows what to look for");

    let dir = tempfile::tempdir().unwrap();
    let store = open_sealed(dir.path());
    let txn = Txn::new().put(secret(1), WORDS).put(key(1), "open");
    store.commit(txn).await.unwrap();
    store
        .commit(Txn::new().put(secret(1), "newer"))
        .await
        .unwrap();
    store.close().await;
    assert!(!is_on_disk(dir.path()));
    let store = open_sealed(dir.path());
    assert_eq!(store.get(&secret(1)).unwrap().value, "newer");
    // Its history is there too, with what was replaced.
    let mut watch = store.watch(SEALED_PREFIX, 1).unwrap();
    let change = watch.try_next().unwrap().unwrap();
    assert_eq!(change.previous().unwrap().value, WORDS);
    store.close().await;
    let error = Store::open(&places(dir.path()).0).err().unwrap();
    assert!(
        error.to_string().contains("with its key file only"),
        "{error}"
    );
}

#[tokio::test]
async fn a_store_from_before_is_sealed_while_it_works() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    // More than one step of rewriting.
    for n in 0..6 {
        let mut txn = Txn::new();
        for m in 0..500 {
            txn = txn.put(secret(n * 500 + m), WORDS);
        }
        store.commit(txn).await.unwrap();
    }
    let all = store.list("/");
    store.close().await;
    assert!(is_on_disk(dir.path()));
    let store = open_sealed(dir.path());
    assert_eq!(store.list("/"), all);
    // Writes are taken meanwhile.
    store.commit(Txn::new().put(key(1), "x")).await.unwrap();
    settled(&store).await;
    store.compact().await.unwrap();
    store.close().await;
    let store = open_sealed(dir.path());
    assert_eq!(store.list(SEALED_PREFIX).1, all.1);
    store.close().await;
}

#[tokio::test]
async fn compaction_forgets_the_history_and_gives_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_sealed(dir.path());
    let value = vec![b'x'; 100_000];
    for _ in 0..60 {
        store
            .commit(Txn::new().put(key(1), value.clone()))
            .await
            .unwrap();
    }
    let mut ahead = store.watch("/", store.revision()).unwrap();
    let mut behind = store.watch("/", 3).unwrap();
    let before = store.report().await.unwrap().bytes;
    assert_eq!(store.compact().await, Ok(60));
    assert!(store.report().await.unwrap().bytes < before / 2);
    assert_eq!(store.oldest(), 60);
    assert!(behind.next().await.is_none());
    assert_eq!(behind.ended().unwrap().oldest, 60);
    assert!(store.watch("/", 59).is_err());
    store.commit(Txn::new().delete(key(1))).await.unwrap();
    assert_eq!(ahead.next().await.unwrap().revision(), 61);
    store.close().await;
    let store = open_sealed(dir.path());
    assert_eq!(
        (store.revision(), store.oldest(), store.count("/")),
        (61, 60, 0)
    );
    store.close().await;
}

#[tokio::test]
async fn a_key_that_cannot_be_written_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_sealed(dir.path());
    store
        .commit(Txn::new().put(secret(1), WORDS))
        .await
        .unwrap();
    let sealed_by = store.report().await.unwrap().sealed_by;
    let (_, keys) = places(dir.path());
    // Its draft cannot be made: a directory has the name.
    std::fs::create_dir(keys.with_file_name("store.key.new")).unwrap();
    let error = store.rotate_key().await.unwrap_err();
    assert!(error.contains("store.key"), "{error}");
    assert_eq!(store.report().await.unwrap().sealed_by, sealed_by);
    store
        .commit(Txn::new().put(secret(2), WORDS))
        .await
        .unwrap();
    store.close().await;
    let store = open_sealed(dir.path());
    assert_eq!(store.count(SEALED_PREFIX), 2);
    store.close().await;
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8),
    Delete(u8),
    Rotate,
    /// The operator puts a key first, while the store is closed.
    NewKeyFile,
    Reopen,
    Settle,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..5_u8).prop_map(Step::Put),
        2 => (0..5_u8).prop_map(Step::Delete),
        2 => Just(Step::Rotate),
        1 => Just(Step::NewKeyFile),
        2 => Just(Step::Reopen),
        1 => Just(Step::Settle),
    ];
    proptest::collection::vec(step, 1..30)
}

async fn run(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    let (_, keys) = places(dir.path());
    let mut store = open_sealed(dir.path());
    let first = KeyFile::read(&keys).unwrap().unwrap().first().id();
    let mut rotated = false;
    for (number, step) in steps.into_iter().enumerate() {
        match step {
            Step::Put(n) => {
                let value = format!("{} {number}", String::from_utf8_lossy(WORDS));
                store
                    .commit(Txn::new().put(secret(n.into()), value))
                    .await
                    .unwrap();
            }
            Step::Delete(n) => {
                store
                    .commit(Txn::new().delete(secret(n.into())))
                    .await
                    .unwrap();
            }
            Step::Rotate => {
                store.rotate_key().await.unwrap();
                rotated = true;
            }
            Step::Settle => {
                settled(&store).await;
            }
            Step::NewKeyFile | Step::Reopen => {
                let before = store.list("/");
                store.close().await;
                if matches!(step, Step::NewKeyFile) {
                    KeyFile::read(&keys).unwrap().unwrap().rotate().unwrap();
                    rotated = true;
                }
                store = open_sealed(dir.path());
                prop_assert_eq!(store.list("/"), before);
            }
        }
    }
    let report = settled(&store).await;
    let file = KeyFile::read(&keys).unwrap().unwrap();
    prop_assert_eq!(report.sealed_by.as_deref(), Some(&*file.first().id()));
    prop_assert_eq!(file.first().id() != first, rotated);
    let before = store.list("/");
    store.close().await;
    prop_assert!(!is_on_disk(dir.path()));
    // Settled: the newest key alone opens all of it.
    let text = std::fs::read_to_string(&keys).unwrap();
    let newest: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .take(1)
        .collect();
    std::fs::write(&keys, newest.concat()).unwrap();
    let store = open_sealed(dir.path());
    prop_assert_eq!(store.list("/"), before);
    store.close().await;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn values_are_readable_through_any_keys_and_restarts(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(run(steps))?;
    }
}
