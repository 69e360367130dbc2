//! What watches promise, for random histories: ordered, unique, atomic, reliable, resumable, also
//! across a restart; and transactions against a plain map.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    /// Keys to put and to delete, and keys that must be absent.
    Txn(Vec<u8>, Vec<u8>, Vec<u8>),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let keys = || proptest::collection::vec(0..6_u8, 0..3);
    let txn =
        (keys(), keys(), keys()).prop_map(|(put, delete, absent)| Step::Txn(put, delete, absent));
    let step = prop_oneof![12 => txn, 1 => Just(Step::Reopen)];
    proptest::collection::vec(step, 1..40)
}

fn name(key: u8) -> String {
    format!(
        "/{}/{key}",
        if key.is_multiple_of(2) { "even" } else { "odd" }
    )
}

/// The expected state and history.
#[derive(Default)]
struct Model {
    values: BTreeMap<String, String>,
    revision: Revision,
    history: Vec<(Revision, String, Option<Bytes>)>,
}

impl Model {
    /// Whether the store must take the transaction, and its effect.
    fn take(&mut self, put: &[u8], delete: &[u8], absent: &[u8]) -> bool {
        if absent.iter().any(|k| self.values.contains_key(&name(*k))) {
            return false;
        }
        let mut changes: BTreeMap<String, Option<String>> = BTreeMap::new();
        for key in put {
            changes.insert(name(*key), Some(format!("r{}", self.revision + 1)));
        }
        for key in delete
            .iter()
            .filter(|k| self.values.contains_key(&name(**k)))
        {
            changes.insert(name(*key), None);
        }
        if !changes.is_empty() {
            self.revision += 1;
        }
        for (key, value) in changes {
            let bytes = value.clone().map(Bytes::from);
            self.history.push((self.revision, key.clone(), bytes));
            match value {
                Some(value) => self.values.insert(key, value),
                None => self.values.remove(&key),
            };
        }
        true
    }
}

fn unique(keys: &[u8], taken: &[u8]) -> Vec<u8> {
    let mut keys = keys.to_vec();
    keys.sort_unstable();
    keys.dedup();
    keys.retain(|key| !taken.contains(key));
    keys
}

async fn run(steps: Vec<Step>, resume_at: prop::sample::Index) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    let mut model = Model::default();
    for step in steps {
        match step {
            Step::Reopen => {
                store.close().await;
                store = open(dir.path());
            }
            Step::Txn(put, delete, absent) => {
                let put = unique(&put, &[]);
                let delete = unique(&delete, &put);
                let mut txn = Txn::new();
                for key in &absent {
                    txn = txn.require_absent(name(*key));
                }
                for key in &put {
                    txn = txn.put(name(*key), format!("r{}", model.revision + 1));
                }
                for key in &delete {
                    txn = txn.delete(name(*key));
                }
                let taken = model.take(&put, &delete, &absent);
                let result = store.commit(txn).await;
                prop_assert_eq!(result.is_ok(), taken, "{:?}", result);
                if taken {
                    prop_assert_eq!(result, Ok(model.revision));
                }
            }
        }
        let (revision, entries) = store.list("/");
        let values: BTreeMap<String, String> = entries
            .iter()
            .map(|e| {
                (
                    e.key.to_string(),
                    String::from_utf8(e.value.to_vec()).unwrap(),
                )
            })
            .collect();
        prop_assert_eq!(revision, model.revision);
        prop_assert_eq!(&values, &model.values);
    }
    // A watch from any revision, under any prefix, sees exactly the rest of the history.
    let from = resume_at.index(usize::try_from(model.revision).unwrap() + 1) as Revision;
    for prefix in ["/", "/even/", "/odd/", "/none/"] {
        let mut watch = store.watch(prefix, from).unwrap();
        let mut seen = Vec::new();
        while let Some(change) = watch.try_next().unwrap() {
            seen.push(shown(&change));
        }
        let expected: Vec<_> = model
            .history
            .iter()
            .filter(|(revision, key, _)| *revision > from && key.starts_with(prefix))
            .cloned()
            .collect();
        prop_assert_eq!(seen, expected);
        prop_assert_eq!(watch.revision(), model.revision);
    }
    store.close().await;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn watches_deliver_exactly_the_history(
        steps in steps(), resume_at in any::<prop::sample::Index>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(run(steps, resume_at))?;
    }
}

/// Readers beside writers: every watcher sees every transaction whole, once, in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_watchers_see_whole_transactions() {
    const TXN_COUNT: u64 = 300;
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let watchers: Vec<_> = (0..4)
        .map(|_| {
            let mut watch = store.watch("/", 0).unwrap();
            let store = store.clone();
            tokio::spawn(async move {
                for revision in 1..=TXN_COUNT {
                    for expected in ["/a", "/b", "/c"] {
                        let change = watch.next().await.unwrap();
                        assert_eq!((change.revision(), &**change.key()), (revision, expected));
                    }
                    // A list at least as new as the change sees all three keys of one write.
                    let (at, entries) = store.list("/");
                    assert!(at >= revision);
                    assert!(entries.iter().all(|e| e.mod_revision == at));
                    assert_eq!(entries.len(), 3);
                }
            })
        })
        .collect();
    for _ in 0..TXN_COUNT {
        let txn = Txn::new().put("/c", "x").put("/a", "x").put("/b", "x");
        store.commit(txn).await.unwrap();
    }
    for watcher in watchers {
        watcher.await.unwrap();
    }
}
