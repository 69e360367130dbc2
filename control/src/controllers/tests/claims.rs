//! Pods with claims: bound where the pod goes, kept for the next one, gone with whom they were for.

use super::*;

/// Notes what was asked for, and refuses while it is told to.
#[derive(Default)]
pub(super) struct FakeDisks {
    pub(super) removed: std::sync::Mutex<Vec<String>>,
    pub(super) is_away: std::sync::atomic::AtomicBool,
}

impl VolumeRemover for FakeDisks {
    fn remove<'a>(
        &'a self,
        node: &'a str,
        volume: &'a str,
    ) -> futures_util::future::BoxFuture<'a, Result<(), Status>> {
        let away = self.is_away.load(std::sync::atomic::Ordering::SeqCst);
        async move {
            if away {
                return Err(Status::unavailable(format!("node {node} is not connected")));
            }
            let mut removed = self.removed.lock().unwrap();
            removed.push(format!("{node}/{volume}"));
            Ok(())
        }
        .boxed()
    }
}

impl Cluster {
    fn claim(&self, name: &str) -> Option<PersistentVolumeClaim> {
        self.get("default", name)
    }

    /// The volume of a claim that is bound.
    fn bound(&self, name: &str) -> Option<String> {
        let claim = self.claim(name)?;
        let phase = claim.status.and_then(|status| status.phase);
        let volume = claim.spec.and_then(|spec| spec.volume_name);
        volume.filter(|_| phase.as_deref() == Some("Bound"))
    }

    fn serves(&self, name: &str) -> bool {
        let pod: Option<Pod> = self.get("default", name);
        pod.is_some_and(|pod| pods::is_ready(&pod) && !pods::is_terminating(&pod))
    }

    async fn remove<K: Resource>(&self, name: &str) {
        self.delete::<K>("default", name, Propagation::Background)
            .await;
    }

    async fn new_claim(&self, name: &str, class: &str, mode: &str) {
        let _: PersistentVolumeClaim = self
            .create(json!({
                "apiVersion": "v1", "kind": "PersistentVolumeClaim",
                "metadata": {"name": name, "namespace": "default"},
                "spec": {"storageClassName": class, "accessModes": [mode],
                    "resources": {"requests": {"storage": "1Mi"}}},
            }))
            .await;
    }

    async fn new_pod(&self, name: &str, volume: serde_json::Value) {
        let _: Pod = self
            .create(json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": "default"},
                "spec": {"containers": [{"name": "c", "image": "a"}], "volumes": [volume]},
            }))
            .await;
    }
}

fn of_claim(name: &str) -> serde_json::Value {
    json!({"name": "data", "persistentVolumeClaim": {"claimName": name}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stateful_sets_pod_comes_back_to_its_claim_on_its_node() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    cluster.node("n2", "4").await;
    let _: StatefulSet = cluster
        .create(json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet",
            "metadata": {"name": "s", "namespace": "default"},
            "spec": {"replicas": 2, "serviceName": "s",
                "selector": {"matchLabels": {"app": "s"}}, "template": template("s"),
                "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "resources": {"requests": {"storage": "1Mi"}}}}]},
        }))
        .await;
    eventually("both serve", || {
        cluster.serves("s-0") && cluster.serves("s-1")
    })
    .await;
    eventually("the claims are bound", || {
        cluster.bound("data-s-0").is_some() && cluster.bound("data-s-1").is_some()
    })
    .await;
    let volume = cluster.bound("data-s-0");
    let before: Pod = cluster.get("default", "s-0").unwrap();
    cluster.remove::<Pod>("s-0").await;
    eventually("it is back", || {
        let now: Option<Pod> = cluster.get("default", "s-0");
        now.is_some_and(|now| now.metadata.uid != before.metadata.uid && pods::is_ready(&now))
    })
    .await;
    assert_eq!(cluster.bound("data-s-0"), volume, "the same volume");
    let after: Pod = cluster.get("default", "s-0").unwrap();
    let (after, before) = (pods::node(&after), pods::node(&before));
    assert_eq!(after, before, "where its volume is");
    cluster.remove::<StatefulSet>("s").await;
    eventually("the pods go", || cluster.list::<Pod>("default").is_empty()).await;
    assert!(
        cluster.bound("data-s-1").is_some(),
        "claims outlive the set"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_goes_after_its_pod_and_its_directory_before_its_volume() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    cluster.new_claim("c", "local", "ReadWriteOnce").await;
    eventually("it waits for a pod", || {
        cluster.events("WaitForFirstConsumer").len() == 1
    })
    .await;
    assert_eq!(cluster.bound("c"), None);
    cluster.new_pod("p", of_claim("c")).await;
    eventually("bound", || {
        cluster.bound("c").is_some() && cluster.serves("p")
    })
    .await;
    let name = cluster.bound("c").unwrap();
    let volume = || cluster.get::<PersistentVolume>("", &name);

    cluster
        .disks
        .is_away
        .store(true, std::sync::atomic::Ordering::SeqCst);
    cluster.remove::<PersistentVolumeClaim>("c").await;
    cluster.remove::<PersistentVolume>(&name).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(cluster.claim("c").is_some(), "a pod uses it");
    assert!(volume().is_some(), "a claim has it");
    cluster.remove::<Pod>("p").await;
    eventually("the claim goes", || cluster.claim("c").is_none()).await;
    eventually("the user is told that the node is away", || {
        let told = cluster.events("VolumeFailedDelete");
        told.iter().any(|text| text.contains("n1 is not connected"))
    })
    .await;
    assert!(volume().is_some(), "its directory is still there");
    cluster
        .disks
        .is_away
        .store(false, std::sync::atomic::Ordering::SeqCst);
    let ready = |status: &'static str| {
        move |node: &mut Node| {
            let conditions = node.status.as_mut().unwrap().conditions.as_mut().unwrap();
            conditions[0].status = status.to_owned();
        }
    };
    cluster.change_status("n1", ready("False")).await;
    cluster.change_status("n1", ready("True")).await;
    eventually("the volume goes", || volume().is_none()).await;
    let removed = cluster.disks.removed.lock().unwrap().clone();
    assert!(removed.contains(&format!("n1/{name}")), "{removed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_to_be_retained_is_retained() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let _: gantry_api::k8s_openapi::api::storage::v1::StorageClass = cluster
        .create(json!({
            "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
            "metadata": {"name": "kept"}, "provisioner": volume_binder::PROVISIONER,
            "reclaimPolicy": "Retain", "volumeBindingMode": "WaitForFirstConsumer",
        }))
        .await;
    let _: PersistentVolume = cluster
        .create(json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "by-hand"},
            "spec": {"capacity": {"storage": "1Mi"}, "accessModes": ["ReadWriteOnce"],
                "persistentVolumeReclaimPolicy": "Delete", "storageClassName": "manual",
                "hostPath": {"path": "/srv/by-hand"}},
        }))
        .await;
    cluster.new_claim("a", "kept", "ReadWriteOnce").await;
    cluster.new_claim("b", "manual", "ReadWriteOnce").await;
    cluster.new_pod("a", of_claim("a")).await;
    eventually("bound", || {
        cluster.bound("a").is_some() && cluster.bound("b").is_some()
    })
    .await;
    let kept = cluster.bound("a").unwrap();
    cluster.remove::<Pod>("a").await;
    cluster.remove::<PersistentVolumeClaim>("a").await;
    cluster.remove::<PersistentVolumeClaim>("b").await;
    let phase = |name: &str| {
        let volume: Option<PersistentVolume> = cluster.get("", name);
        volume.and_then(|volume| volume.status?.phase)
    };
    eventually("released", || phase(&kept).as_deref() == Some("Released")).await;
    eventually("nobody can delete it", || {
        phase("by-hand").as_deref() == Some("Failed")
    })
    .await;
    assert_eq!(*cluster.disks.removed.lock().unwrap(), Vec::<String>::new());
    cluster.remove::<PersistentVolume>("by-hand").await;
    eventually("by hand it goes", || phase("by-hand").is_none()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ephemeral_volumes_claim_lives_as_long_as_its_pod() {
    let cluster = Cluster::start().await;
    cluster.node("n1", "4").await;
    let volume = json!({"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"spec": {
        "accessModes": ["ReadWriteOncePod"], "resources": {"requests": {"storage": "1Mi"}}}}}});
    cluster.new_pod("p", volume.clone()).await;
    eventually("bound", || {
        cluster.bound("p-scratch").is_some() && cluster.serves("p")
    })
    .await;
    let held = cluster.bound("p-scratch").unwrap();
    // Another pod may not have it meanwhile.
    cluster.new_pod("q", of_claim("p-scratch")).await;
    eventually("the other waits", || {
        let told = cluster.events("FailedScheduling");
        told.iter().any(|text| text.contains("ReadWriteOncePod"))
    })
    .await;
    cluster.remove::<Pod>("q").await;
    cluster.remove::<Pod>("p").await;
    eventually("claim and volume go", || {
        let volume: Option<PersistentVolume> = cluster.get("", &held);
        cluster.claim("p-scratch").is_none() && volume.is_none()
    })
    .await;
    // A claim that is somebody else's is never taken.
    cluster
        .new_claim("r-scratch", "local", "ReadWriteOnce")
        .await;
    cluster.new_pod("r", volume).await;
    eventually("the user is told", || {
        let told = cluster.events("FailedBinding");
        told.iter()
            .any(|text| text.contains("not made for this pod"))
    })
    .await;
    assert!(!cluster.serves("r"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_is_bound_to_the_smallest_volume_that_serves_it() {
    let cluster = Cluster::start().await;
    for (name, size) in [("large", "9Gi"), ("small", "2Gi"), ("tiny", "1Mi")] {
        let _: PersistentVolume = cluster
            .create(json!({
                "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
                "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"],
                    "storageClassName": "by-hand", "hostPath": {"path": format!("/srv/{name}")}},
            }))
            .await;
    }
    let _: PersistentVolumeClaim = cluster
        .create(json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": {"name": "c", "namespace": "default"},
            "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "by-hand",
                "resources": {"requests": {"storage": "1Gi"}}},
        }))
        .await;
    let claim = || {
        cluster
            .get::<PersistentVolumeClaim>("default", "c")
            .unwrap()
    };
    let volume = |name: &str| cluster.get::<PersistentVolume>("", name).unwrap();
    let phase = |name: &str| volume(name).status.and_then(|status| status.phase);
    // No class of that name: only what is there can serve.
    eventually("bound", || {
        claim().status.and_then(|s| s.phase).as_deref() == Some("Bound")
    })
    .await;
    assert_eq!(claim().spec.unwrap().volume_name.as_deref(), Some("small"));
    eventually("the volume says so", || {
        phase("small").as_deref() == Some("Bound")
    })
    .await;
    eventually("the others are free", || {
        phase("large").as_deref() == Some("Available")
    })
    .await;
    cluster
        .delete::<PersistentVolumeClaim>("default", "c", Propagation::Background)
        .await;
    eventually("released", || phase("small").as_deref() == Some("Released")).await;
}
