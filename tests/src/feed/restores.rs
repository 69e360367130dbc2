//! A store that is restored from a backup under agents that have gone on: what runs is adopted, and nothing
//! of it is ended by what the backup does not know.

use std::io::Write as _;

use gantry_control::store::backup::{Header, Writer};
use gantry_control::store::{BACKUP_PREFIX, Keys, RESTORED_KEY};

use super::*;

/// A backup of the store as it is now, in `file`.
fn save(store: &Store, file: &Path) {
    let (revision, entries) = store.list(BACKUP_PREFIX);
    let mut writer = Writer::in_clear(&Header {
        lineage_counter: store.lineage().counter,
        lineage_id: store.lineage().id.clone(),
        revision,
        taken: "now".to_owned(),
    });
    for entry in entries {
        writer.entry(&entry).unwrap();
    }
    let mut file = std::fs::File::create(file).unwrap();
    file.write_all(&writer.finish().0).unwrap();
}

/// Puts it in the place of the store in `dir`.
fn restore(file: &Path, dir: &Path) {
    let keys = Keys {
        backup: dir.join("store.key"),
        store: dir.join("store.key"),
    };
    gantry_control::store::restore(file, dir, &keys, |_| Ok(())).unwrap();
}

fn uids(view: &View) -> Vec<String> {
    view.pods
        .keys()
        .map(|uid| uid.as_str().to_owned())
        .collect()
}

/// Looks at every view that is published until the sender is gone or `stop`; returns those that lacked one
/// of `uids`.
fn lacking(
    agent: &Agent,
    uids: &[&PodUid],
    stop: CancellationToken,
) -> tokio::task::JoinHandle<Vec<u64>> {
    let mut views = agent.handle.view.clone();
    let uids: Vec<PodUid> = uids.iter().map(|&uid| uid.clone()).collect();
    tokio::spawn(async move {
        let mut lacking = Vec::new();
        while let Some(Ok(())) = stop.run_until_cancelled(views.changed()).await {
            let view = views.borrow_and_update().clone();
            if uids.iter().any(|uid| !view.pods.contains_key(uid)) {
                lacking.push(view.rev);
            }
        }
        lacking
    })
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec
        .as_ref()?
        .node_name
        .as_deref()
        .filter(|n| !n.is_empty())
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restore_what_runs_is_adopted_and_what_is_not_known_runs_on_for_a_while() {
    let (dir, lib) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(dir.path(), "127.0.0.1:0").await;
    let (address, url) = (control.address.to_string(), control.url());
    let agent = Agent::start(&url, "n1", lib.path());
    agent.live().await;
    let bound = control.create_pod("bound", "n1").await;
    let later = control.create_pod("later", "").await;
    let ended = control.create_pod("ended", "").await;
    let file = dir.path().join("backup");
    save(control.registry.store(), &file);

    // After the backup: two that waited are bound, one of them ends, and one is new.
    for (name, uid) in [("later", &later), ("ended", &ended)] {
        let bind = control.registry.bind("default", name, uid.as_str(), "n1");
        bind.await.unwrap();
    }
    let new = control.create_pod("new", "n1").await;
    agent
        .until("all four arrive", |view| {
            (view.pods.len() == 4).then_some(())
        })
        .await;
    for (uid, name) in [(&bound, "bound"), (&later, "later"), (&new, "new")] {
        agent.report(uid, name, "Running", false);
    }
    agent.report(&ended, "ended", "Succeeded", true);
    agent.handle.reporter.final_persisted(&ended).await;
    eventually("the old history has it all", || {
        let names = ["bound", "later", "new", "ended"];
        let told = |name: &&str| {
            control
                .pod(name)
                .is_some_and(|pod| phase(&pod).is_some_and(|p| p != "Pending"))
        };
        names.iter().all(told).then_some(())
    })
    .await;
    let stop = CancellationToken::new();
    let watched = lacking(&agent, &[&bound, &later, &ended, &new], stop.clone());
    control.stop().await;

    restore(&file, dir.path());
    let restored = open(dir.path());
    let first = restored.get(RESTORED_KEY).unwrap().mod_revision;
    for name in ["later", "ended"] {
        let entry = restored
            .get(&format!("/registry/pods/default/{name}"))
            .unwrap();
        let pod: Pod = serde_json::from_slice(&entry.value).unwrap();
        assert_eq!(
            node_of(&pod),
            None,
            "the backup does not know where {name} is"
        );
    }
    restored.close().await;
    let control = Control::admin(dir.path(), &address).await;
    agent.live().await;

    // Adopted: bound where it runs, before the node's word is in the store.
    let pod = eventually("the pod that ran is bound again", || {
        control
            .pod("later")
            .filter(|pod| node_of(pod) == Some("n1"))
    })
    .await;
    let lease = control
        .registry
        .store()
        .get("/registry/leases/kube-node-lease/n1")
        .unwrap();
    assert!(
        lease.mod_revision > first,
        "the node has spoken in this history"
    );
    assert_eq!(pod.metadata.uid.as_deref(), Some(later.as_str()));
    // Statuses are told again: nothing is known to be durable in a new history.
    for (name, wanted) in [
        ("bound", "Running"),
        ("later", "Running"),
        ("ended", "Succeeded"),
    ] {
        eventually("its status is stored again", || {
            control.pod(name).filter(|pod| phase(pod) == Some(wanted))
        })
        .await;
    }
    assert!(control.pod("new").is_none());
    assert!(
        uids(&agent.view()).contains(&new.as_str().to_owned()),
        "it runs on"
    );
    stop.cancel();
    assert_eq!(
        watched.await.unwrap(),
        [0; 0],
        "a view without one of the pods ends it"
    );

    // Nobody has claimed it in the time that was given.
    let began = std::time::Instant::now();
    agent
        .until("the unknown pod ends", |view| {
            (!view.pods.contains_key(&new)).then_some(())
        })
        .await;
    assert!(began.elapsed() < Duration::from_secs(10));
    let left = uids(&agent.view());
    assert!(left.contains(&bound.as_str().to_owned()) && left.contains(&later.as_str().to_owned()));
    agent.stop().await;
    control.stop().await;
}

/// Bound to another node in the new history: it must not run on here beside it.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_restore_a_pod_of_another_node_ends_at_the_first_commit() {
    let (dir, lib) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(dir.path(), "127.0.0.1:0").await;
    let (address, url) = (control.address.to_string(), control.url());
    let agent = Agent::start(&url, "n1", lib.path());
    agent.live().await;
    let node: Node = serde_json::from_value(json!({"metadata": {"name": "n2"}})).unwrap();
    control.registry.create(&node).await.unwrap();
    let uid = control.create_pod("p", "").await;
    let file = dir.path().join("backup");
    save(control.registry.store(), &file);
    let bind = control.registry.bind("default", "p", uid.as_str(), "n1");
    bind.await.unwrap();
    agent
        .until("it arrives", |view| view.pods.get(&uid).cloned())
        .await;
    control.stop().await;

    // The node was silent for too long: the pod went elsewhere.
    restore(&file, dir.path());
    let control = Control::admin(dir.path(), "127.0.0.1:0").await;
    let bind = control.registry.bind("default", "p", uid.as_str(), "n2");
    bind.await.unwrap();
    control.stop().await;
    let control = Control::admin(dir.path(), &address).await;
    agent
        .until("it ends here", |view| view.pods.is_empty().then_some(()))
        .await;
    let pod = control.pod("p").unwrap();
    assert_eq!(node_of(&pod), Some("n2"));
    agent.stop().await;
    control.stop().await;
}

/// The names of the files below `dir`, at any depth.
fn files(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            names.extend(files(&path));
        } else {
            names.extend(
                path.file_name()
                    .and_then(|name| Some(name.to_str()?.to_owned())),
            );
        }
    }
    names
}

/// A backup brings back pods that have ended and gone since, one bound here and one unbound; the agent that
/// saw them end is dead, and so is its machine's memory.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_restore_what_has_ended_and_gone_is_told_as_ended_and_not_started() {
    let (dir, lib) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let control = Control::admin(dir.path(), "127.0.0.1:0").await;
    let (address, url) = (control.address.to_string(), control.url());
    let agent = Agent::start(&url, "n1", lib.path());
    agent.live().await;
    let pods = [("bound", "n1"), ("unbound", "")];
    let mut uids = Vec::new();
    for (name, node) in pods {
        uids.push(control.create_pod(name, node).await);
    }
    let file = dir.path().join("backup");
    save(control.registry.store(), &file);
    let bind = control
        .registry
        .bind("default", "unbound", uids[1].as_str(), "n1");
    bind.await.unwrap();
    agent
        .until("both arrive", |view| (view.pods.len() == 2).then_some(()))
        .await;
    for ((name, _), uid) in pods.iter().zip(&uids) {
        agent.report(uid, name, "Running", false);
        let options = DeleteOptions::default();
        control
            .registry
            .delete::<Pod>("default", name, &options)
            .await
            .unwrap();
        agent.report(uid, name, "Succeeded", true);
    }
    agent
        .until("both are gone", |view| view.pods.is_empty().then_some(()))
        .await;
    let ended = lib.path().join("feed/ended");
    eventually("their records are tombstones", || {
        let names = files(&ended);
        uids.iter()
            .all(|uid| names.iter().any(|name| name == uid.as_str()))
            .then_some(())
    })
    .await;
    assert_eq!(files(&lib.path().join("feed/final")), [""; 0]);
    agent.kill().await;
    control.stop().await;
    std::fs::remove_dir_all(lib.path().join("run")).unwrap();

    restore(&file, dir.path());
    let agent = Agent::start(&url, "n1", lib.path());
    // Whoever sees one of them in a view knows that it has ended.
    let (mut views, reporter) = (agent.handle.view.clone(), agent.handle.reporter.clone());
    let (stop, watched) = (CancellationToken::new(), uids.clone());
    let token = stop.clone();
    let watch = tokio::spawn(async move {
        let mut startable = Vec::new();
        while let Some(Ok(())) = token.run_until_cancelled(views.changed()).await {
            let view = views.borrow_and_update().clone();
            let back = watched.iter().filter(|uid| view.pods.contains_key(*uid));
            startable.extend(
                back.filter(|uid| reporter.final_status(uid).is_none())
                    .cloned(),
            );
        }
        startable
    });
    let control = Control::admin(dir.path(), &address).await;
    for (name, _) in pods {
        let pod = eventually("its end is in the new history", || {
            control
                .pod(name)
                .filter(|pod| phase(pod) == Some("Succeeded"))
        })
        .await;
        assert_eq!(node_of(&pod), Some("n1"), "{name}");
    }
    agent
        .until("both are in the view", |view| {
            (view.pods.len() == 2).then_some(())
        })
        .await;
    stop.cancel();
    assert_eq!(watch.await.unwrap(), []);
    // Gone once more, remembered once more.
    for (name, _) in pods {
        let options = DeleteOptions::default();
        let deleted = control.registry.delete::<Pod>("default", name, &options);
        deleted.await.unwrap();
    }
    agent
        .until("both are gone", |view| view.pods.is_empty().then_some(()))
        .await;
    eventually("their records are tombstones", || {
        (files(&ended).len() == 2).then_some(())
    })
    .await;
    agent.stop().await;
    control.stop().await;
}
