//! Backups over the API while others write, and what a restore makes of them.

use std::path::PathBuf;

use gantry_api::k8s_openapi::api::core::v1::{ConfigMap, Node};
use gantry_api::proto::store_client::StoreClient;
use gantry_api::proto::{BackupDone, BackupRequest};

use super::*;
use crate::restore::{self, RestoreArguments};
use crate::store::RESTORED_KEY;

async fn save(cluster: &Cluster, file: &Path) -> BackupDone {
    save_as(cluster, file, false).await
}

async fn save_as(cluster: &Cluster, file: &Path, in_clear: bool) -> BackupDone {
    let administrator = cluster.authority().client("tester", "system:masters", 1);
    let channel = cluster.channel(Some(&administrator.unwrap()));
    let mut stream = StoreClient::new(channel)
        .backup(BackupRequest { in_clear })
        .await
        .unwrap()
        .into_inner();
    let (mut all, mut done) = (Vec::new(), None);
    while let Some(chunk) = stream.message().await.unwrap() {
        all.extend_from_slice(&chunk.data);
        done = chunk.done;
    }
    std::fs::write(file, &all).unwrap();
    let done = done.unwrap();
    assert_eq!(done.bytes, all.len() as u64);
    done
}

/// With the key file of the directory.
fn restore_into(data_dir: PathBuf, file: &Path) -> Result<String, String> {
    restore_with(data_dir, file, None)
}

fn restore_with(
    data_dir: PathBuf,
    file: &Path,
    backup_key: Option<PathBuf>,
) -> Result<String, String> {
    let arguments = RestoreArguments {
        file: file.to_owned(),
        data_dir,
        etcd: crate::config::EtcdArguments::default(),
        store_key: None,
        backup_key,
    };
    restore::run(&arguments).map_err(|error| error.to_string())
}

fn counter(name: &str, n: u64) -> ConfigMap {
    let value =
        json!({"metadata": {"name": name, "namespace": "default"}, "data": {"n": n.to_string()}});
    serde_json::from_value(value).unwrap()
}

fn read(registry: &Registry, name: &str) -> u64 {
    let map = registry.get::<ConfigMap>("default", name).unwrap().unwrap();
    map.data.unwrap()["n"].parse().unwrap()
}

/// Two objects that are written one after the other, for ever: `a` is never behind `b`, and at most one
/// ahead.
async fn writer(registry: Registry, stop: CancellationToken) {
    for n in 0.. {
        for name in ["a", "b"] {
            let object = counter(name, n);
            match n {
                0 => registry.create(&object).await.unwrap(),
                _ => registry.update(&object).await.unwrap(),
            };
        }
        if stop.is_cancelled() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_taken_while_others_write_is_of_one_revision() {
    let cluster = Cluster::start().await;
    let stop = CancellationToken::new();
    let writing = tokio::spawn(writer(cluster.registry().clone(), stop.clone()));
    eventually("something is written", || {
        let last = cluster.registry().get::<ConfigMap>("default", "b").unwrap();
        last.is_some()
    })
    .await;
    let file = cluster.dir.path().join("backup");
    let key = cluster.dir.path().join("data/pki/store.key");
    for round in 0..5 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        let before = cluster.registry().store().revision();
        let done = save(&cluster, &file).await;
        assert!(done.revision >= before);
        let data_dir = cluster.dir.path().join(format!("restored-{round}"));
        restore_with(data_dir.clone(), &file, Some(key.clone())).unwrap();
        let keys = data_dir.join("pki/store.key");
        let store = Store::open_sealed(&data_dir.join("store.redb"), &keys).unwrap();
        let (_, entries) = store.list("/registry/");
        assert_eq!(entries.len() as u64, done.entries);
        assert!(entries.iter().all(|e| e.mod_revision <= done.revision));
        let settings = crate::server::registry::Settings {
            service_cidr: "10.96.0.0/16".parse().unwrap(),
            reserved_addresses: Vec::new(),
        };
        let registry = Registry::new(store, &settings);
        let (a, b) = (read(&registry, "a"), read(&registry, "b"));
        assert!(a == b || a == b + 1, "not of one revision: {a} {b}");
    }
    stop.cancel();
    writing.await.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_control_plane_is_the_same_cluster_in_a_new_history() {
    let cluster = Cluster::start().await;
    let registry = cluster.registry().clone();
    registry.create(&counter("kept", 1)).await.unwrap();
    let file = cluster.dir.path().join("backup");
    let done = save(&cluster, &file).await;
    registry.create(&counter("lost", 1)).await.unwrap();
    let lost_at = registry.store().revision();
    let lineage = registry.store().lineage().clone();
    let ca = cluster.authority().certificate().to_owned();
    drop(registry);

    let data_dir = cluster.dir.path().join("data");
    let refusal = restore_into(data_dir.clone(), &file).unwrap_err();
    assert!(
        refusal.contains("gantry-control runs on") && refusal.contains("nothing was changed"),
        "{refusal}"
    );
    let dir = cluster.stop().await;

    // Into the same directory: what was there stays beside it.
    let words = restore_into(data_dir.clone(), &file).unwrap();
    assert!(words.contains("store.redb.before-restore"), "{words}");
    assert!(
        words.contains(&format!("{} objects", done.entries)),
        "{words}"
    );
    assert!(!data_dir.join("store.redb.new").exists());
    let cluster = Cluster::start_in(dir).await;
    let store = cluster.registry().store();
    assert!(store.lineage().counter > lineage.counter && store.lineage().id != lineage.id);
    assert!(store.get(RESTORED_KEY).is_some());
    assert_eq!(read(cluster.registry(), "kept"), 1);
    let gone = cluster
        .registry()
        .get::<ConfigMap>("default", "lost")
        .unwrap();
    assert!(gone.is_none());
    // No version of the old history means anything in this one: its clients list again.
    assert!(store.revision() > lost_at + 1_000_000);
    for version in [1, done.revision, lost_at, lost_at + 1] {
        let refused = store.watch("/registry/", version).err().unwrap();
        assert!(refused.oldest > lost_at, "{refused}");
    }
    let dir = cluster.stop().await;

    // Into an empty one, on another machine: the same CA, so nodes and users come back.
    let elsewhere = tempfile::tempdir().unwrap();
    let refusal = restore_into(elsewhere.path().join("data"), &file).unwrap_err();
    assert!(refusal.contains("--backup-key"), "{refusal}");
    let key = Some(dir.path().join("data/pki/store.key"));
    restore_with(elsewhere.path().join("data"), &file, key).unwrap();
    let cluster = Cluster::start_in(elsewhere).await;
    assert_eq!(cluster.authority().certificate(), ca);
    assert_eq!(read(cluster.registry(), "kept"), 1);
    cluster.stop().await;
    drop(dir);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_restored_changes_nothing() {
    let cluster = Cluster::start().await;
    let file = cluster.dir.path().join("backup");
    save(&cluster, &file).await;
    cluster
        .registry()
        .create(&counter("later", 1))
        .await
        .unwrap();
    let dir = cluster.stop().await;
    let data_dir = dir.path().join("data");

    let whole = std::fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    let bad = dir.path().join("bad");
    for (content, words) in [
        (&whole[..whole.len() - 1], "cut short"),
        (&whole[..40], "cut short"),
        (&flipped[..], "changed since"),
        (&b"apiVersion: v1\n"[..], "no backup"),
        (b"", "no backup"),
    ] {
        std::fs::write(&bad, content).unwrap();
        let refusal = restore_into(data_dir.clone(), &bad).unwrap_err();
        assert!(
            refusal.contains(words) && refusal.contains("bad"),
            "{refusal}"
        );
    }
    let refusal = restore_into(data_dir.clone(), &dir.path().join("absent")).unwrap_err();
    assert!(refusal.contains("absent"), "{refusal}");

    // Another cluster's directory: its nodes would not come back.
    let other = Cluster::start().await;
    let other = other.stop().await;
    let refusal = restore_into(other.path().join("data"), &file).unwrap_err();
    assert!(refusal.contains("--backup-key"), "another key: {refusal}");
    let key = Some(data_dir.join("pki/store.key"));
    let refusal = restore_with(other.path().join("data"), &file, key).unwrap_err();
    assert!(refusal.contains("another cluster"), "{refusal}");

    let cluster = Cluster::start_in(dir).await;
    assert_eq!(read(cluster.registry(), "later"), 1, "nothing was restored");
    cluster.stop().await;
    Cluster::start_in(other).await.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_administrators_take_backups() {
    let cluster = Cluster::start().await;
    for (user, group, words) in [
        ("jane", "dev", "only group system:masters"),
        ("system:node:a", "system:nodes", "cannot use the service"),
    ] {
        let credentials = cluster.authority().client(user, group, 1).unwrap();
        let mut client = StoreClient::new(cluster.channel(Some(&credentials)));
        let refusal = status(
            client
                .backup(BackupRequest::default())
                .await
                .map(|_| tonic::Response::new(())),
        );
        assert_eq!(refusal.reason, Reason::Forbidden);
        assert!(refusal.message.contains(words), "{refusal}");
    }
    cluster.stop().await;
}

/// Nobody is placed while the nodes have not spoken; then everybody is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_scheduler_waits_until_every_node_has_spoken() {
    let cluster = Cluster::start().await;
    let registry = cluster.registry();
    let node = |name: &str| -> Node {
        let value = json!({"metadata": {"name": name}, "status": {
            "allocatable": {"cpu": "4", "memory": "4Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True"}]}});
        serde_json::from_value(value).unwrap()
    };
    for name in ["node-a", "node-b"] {
        registry.create(&node(name)).await.unwrap();
        registry.update_status(&node(name)).await.unwrap();
    }
    let pod = json!({"metadata": {"name": "p", "namespace": "default"},
        "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let pod: Pod = serde_json::from_value(pod).unwrap();
    registry.create(&pod).await.unwrap();
    let file = cluster.dir.path().join("backup");
    save(&cluster, &file).await;
    let dir = cluster.stop().await;
    restore_into(dir.path().join("data"), &file).unwrap();

    let stop = CancellationToken::new();
    let arguments = arguments(dir.path(), "127.0.0.1:0");
    let control = Control::start(&arguments, &stop).await.unwrap();
    let registry = control.registry();
    let placed = || {
        let pod = registry.get::<Pod>("default", "p").unwrap().unwrap();
        pod.spec.unwrap().node_name
    };
    for name in ["node-a", "node-b"] {
        tokio::time::sleep(Duration::from_millis(800)).await;
        assert_eq!(placed(), None, "{name} has not spoken");
        let lease = json!({"metadata": {"name": name, "namespace": "kube-node-lease"},
            "spec": {"holderIdentity": name}});
        let lease: gantry_api::k8s_openapi::api::coordination::v1::Lease =
            serde_json::from_value(lease).unwrap();
        registry.create(&lease).await.unwrap();
    }
    for _ in 0..200 {
        if placed().is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(placed().is_some(), "nobody was placed after the hold");
    assert!(registry.store().get(RESTORED_KEY).is_none());
    stop.cancel();
    control.drain().await.unwrap();
}

fn secret(name: &str, words: &str) -> gantry_api::k8s_openapi::api::core::v1::Secret {
    let value =
        json!({"metadata": {"name": name, "namespace": "default"}, "stringData": {"w": words}});
    serde_json::from_value(value).unwrap()
}

/// How Secrets are written in JSON: base64.
fn contains_words(file: &Path, words: &str) -> bool {
    use base64::Engine as _;
    let words = base64::engine::general_purpose::STANDARD.encode(words);
    let bytes = std::fs::read(file).unwrap();
    bytes
        .windows(words.len())
        .any(|window| window == words.as_bytes())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_are_in_no_file_unless_asked_and_another_key_refuses_the_start() {
    use gantry_api::proto::{
        RotateKeyRequest, StoreCompactRequest, StoreReadRequest, StoreStatusRequest,
    };
    const WORDS: &str = "a password of thirty-odd letters";
    let cluster = Cluster::start().await;
    let registry = cluster.registry();
    registry.create(&secret("s", WORDS)).await.unwrap();
    let (sealed, clear) = (
        cluster.dir.path().join("sealed"),
        cluster.dir.path().join("clear"),
    );
    save_as(&cluster, &sealed, false).await;
    save_as(&cluster, &clear, true).await;
    assert!(
        contains_words(&clear, WORDS),
        "the test knows what to look for"
    );
    assert!(!contains_words(&sealed, WORDS));
    let ca_key = std::fs::read_to_string(cluster.dir.path().join("data/pki/ca.key")).unwrap();
    let ca_line = ca_key.lines().nth(1).unwrap().as_bytes().to_vec();
    let has_ca = |file: &Path| {
        std::fs::read(file)
            .unwrap()
            .windows(ca_line.len())
            .any(|w| w == ca_line)
    };
    assert!(has_ca(&clear) && !has_ca(&sealed));

    let administrator = cluster
        .authority()
        .client("tester", "system:masters", 1)
        .unwrap();
    let mut client = StoreClient::new(cluster.channel(Some(&administrator)));
    let before = client
        .status(StoreStatusRequest {})
        .await
        .unwrap()
        .into_inner();
    let rotated = client
        .rotate_key(RotateKeyRequest {})
        .await
        .unwrap()
        .into_inner();
    assert!(before.sealed_by.len() == 8 && rotated.key != before.sealed_by);
    loop {
        let now = client
            .status(StoreStatusRequest {})
            .await
            .unwrap()
            .into_inner();
        assert_eq!(now.sealed_by, rotated.key);
        if !now.is_resealing {
            break;
        }
    }
    let compacted = client
        .compact(StoreCompactRequest {})
        .await
        .unwrap()
        .into_inner();
    let now = client
        .status(StoreStatusRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (now.oldest, now.revision),
        (compacted.revision, compacted.revision)
    );
    let mut entries = client
        .read(StoreReadRequest {
            prefix: "/registry/secrets/".to_owned(),
            keys_only: false,
        })
        .await
        .unwrap()
        .into_inner();
    let entry = entries.message().await.unwrap().unwrap();
    assert_eq!(entry.key, "/registry/secrets/default/s");
    assert!(entries.message().await.unwrap().is_none());

    let dir = cluster.stop().await;
    let (store, key) = (
        dir.path().join("data/store.redb"),
        dir.path().join("data/pki/store.key"),
    );
    assert!(!contains_words(&store, WORDS));
    // The old backup opens by the old key, which is still in the file.
    restore_into(dir.path().join("data"), &sealed).unwrap();
    assert!(!contains_words(&store, WORDS));
    let right = std::fs::read(&key).unwrap();
    let refused = |words: &str| {
        let (arguments, words) = (arguments(dir.path(), "127.0.0.1:0"), words.to_owned());
        async move {
            let stop = CancellationToken::new();
            let error = Control::open(&arguments, &stop)
                .await
                .err()
                .unwrap()
                .to_string();
            assert!(error.contains(&words), "{error}");
        }
    };
    std::fs::write(&key, "/v3+/v3+/v3+/v3+/v3+/v3+/v3+/v3+/v3+/v3+/v0=\n").unwrap();
    refused("give the right file with --store-key").await;
    std::fs::remove_file(&key).unwrap();
    refused("put it back").await;
    assert!(!key.exists(), "no new key is made over sealed Secrets");
    std::fs::write(&key, right).unwrap();
    let cluster = Cluster::start_in(dir).await;
    let read = cluster
        .registry()
        .get::<gantry_api::k8s_openapi::api::core::v1::Secret>("default", "s");
    let data = read.unwrap().unwrap().data.unwrap();
    assert_eq!(data["w"].0, WORDS.as_bytes());
    cluster.stop().await;
}
