//! Mirrors and the search list, pins and pruning, against a real registry on loopback.

use std::sync::Mutex;

use super::*;

/// An address at which nobody listens.
fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[tokio::test]
async fn a_short_name_comes_from_a_mirror_of_the_second_registry_and_stays_while_pinned() {
    if !root() {
        return;
    }
    let image = Handmade::new();
    let Some(registry) = Registry::start(&image, false) else {
        return;
    };
    let file = format!(
        "search: ['{}', second.invalid]\nmirrors:\n  second.invalid:\n    endpoint: ['http://{}', 'http://{}']\n",
        nobody(),
        nobody(),
        registry.address
    );
    let lib = tempfile::tempdir().unwrap();
    let store = ImageStore::open_with(lib.path(), Registries::parse(&file).unwrap()).unwrap();
    let seen = Mutex::new(Vec::new());
    let watch = |progress: Progress| seen.lock().unwrap().push(progress);
    let policy = PullPolicy::IfNotPresent;
    let pulled = store
        .ensure_watched("team/hand:1", policy, &[], &watch)
        .await
        .unwrap();
    let full = "second.invalid/team/hand:1".to_owned();
    assert!(pulled.references.contains(&full), "{:?}", pulled.references);
    {
        let mut seen = seen.lock().unwrap();
        assert_eq!(seen[0], Progress::default(), "told when the pull began");
        let most = seen.iter().map(|p| p.done_bytes).max();
        assert_eq!(most, Some(pulled.size_bytes));
        seen.clear();
    }
    let again = store
        .ensure_watched("team/hand:1", policy, &[], &watch)
        .await
        .unwrap();
    assert_eq!(again.id, pulled.id);
    assert!(seen.lock().unwrap().is_empty(), "nothing was pulled");
    drop((pulled, again));

    assert!(store.set_pinned(&full, true).await.unwrap().pinned);
    assert!(store.set_pinned("nobody/none:1", true).await.is_err());
    let everything = BTreeSet::new();
    assert!(store.remove_unused(&everything).await.unwrap().is_empty());
    assert!(!store.set_pinned("team/hand:1", false).await.unwrap().pinned);
    assert!(
        store.prune(&Wanted::new()).await.unwrap().is_empty(),
        "used a moment ago: a pod may be about to start"
    );
    // A pod names it as it was written.
    let keep = BTreeSet::from(["team/hand:1".to_owned()]);
    assert!(store.remove_unused(&keep).await.unwrap().is_empty());
    assert_eq!(store.remove_unused(&everything).await.unwrap().len(), 1);
    assert_empty(lib.path());
}
