use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use proptest::prelude::*;
use serde_json::json;

use super::token::tests::{Issuer, token};
use super::*;

/// A pod's directories in a temporary place; unmounted at the end whatever happens.
struct Node {
    dir: tempfile::TempDir,
    paths: Paths,
    blobs: Blobs,
    issuer: Issuer,
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = tmpfs::unmount_below(self.dir.path());
    }
}

impl Node {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: volumes need root (mounts, owners)");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths {
            run: dir.path().join("run"),
            lib: dir.path().join("lib"),
            log: dir.path().join("log"),
            bpf: dir.path().join("bpf"),
            kubelet: dir.path().join("kubelet"),
            bin: dir.path().join("bin"),
        };
        Some(Self {
            dir,
            paths,
            blobs: Blobs::new(),
            issuer: Issuer::default(),
        })
    }

    fn put(&mut self, plural: &str, name: &str, object: serde_json::Value) {
        let key = BlobKey {
            plural: plural.to_owned(),
            namespace: "shop".to_owned(),
            name: name.to_owned(),
        };
        self.blobs.insert(key, Arc::new(object));
    }

    fn pod(&self, volume: serde_json::Value, security: serde_json::Value) -> Pod {
        let mut volume = volume;
        volume["name"] = json!("vol");
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "shop", "uid": "u-1", "labels": {"app": "web"}},
            "spec": {"containers": [{"name": "c",
                "resources": {"limits": {"cpu": "1", "memory": "32Mi"}}}],
                "securityContext": security, "volumes": [volume]}}))
        .unwrap()
    }

    async fn ensure(&self, volume: serde_json::Value) -> Result<PathBuf, VolumeError> {
        let pod = self.pod(volume, json!({}));
        Ok(
            ensure(&pod, &self.blobs, &self.paths, &self.issuer).await?["vol"]
                .path
                .clone(),
        )
    }

    async fn remove(&self) {
        let uid = PodUid::new("u-1").unwrap();
        let drivers = csi::CsiDrivers::new(&self.paths);
        remove(&uid, &self.paths, &drivers).await.unwrap();
        let drivers = csi::CsiDrivers::new(&self.paths);
        remove(&uid, &self.paths, &drivers).await.unwrap();
        assert!(!self.paths.pod_lib(&uid).exists());
    }
}

fn read(path: PathBuf) -> String {
    fs::read_to_string(path).unwrap()
}

#[tokio::test]
async fn config_map_waits_then_appears_and_changes_at_once() {
    let Some(mut node) = Node::new() else { return };
    let volume = json!({"configMap": {"name": "page"}});
    let error = node.ensure(volume.clone()).await.unwrap_err();
    assert!(matches!(&error, VolumeError::Waiting(_)));
    assert_eq!(
        error.to_string(),
        "volume \"vol\": configmap \"page\" not found"
    );
    node.put(
        "configmaps",
        "page",
        json!({"data": {"a.html": "one", "b": "two"}, "binaryData": {"raw": "/w=="}}),
    );
    let dir = node.ensure(volume.clone()).await.unwrap();
    assert_eq!(read(dir.join("a.html")), "one");
    assert_eq!(fs::read(dir.join("raw")).unwrap(), [0xff]);
    assert_eq!(
        fs::metadata(dir.join("a.html")).unwrap().mode() & 0o7777,
        0o644
    );
    let version = fs::read_link(dir.join("..data")).unwrap();
    node.ensure(volume.clone()).await.unwrap();
    assert_eq!(
        fs::read_link(dir.join("..data")).unwrap(),
        version,
        "nothing changed"
    );
    // A reader that holds the old version keeps it while the new one is switched in.
    let open = fs::File::open(dir.join("a.html")).unwrap();
    node.put("configmaps", "page", json!({"data": {"a.html": "new"}}));
    node.ensure(volume).await.unwrap();
    assert_eq!(std::io::read_to_string(open).unwrap(), "one");
    assert_eq!(read(dir.join("a.html")), "new");
    assert!(!dir.join("b").exists() && fs::symlink_metadata(dir.join("b")).is_err());
    let versions = fs::read_dir(&dir).unwrap().flatten();
    let versions = versions
        .filter(|e| e.file_name().to_string_lossy().starts_with("..2"))
        .count();
    assert_eq!(versions, 1, "old versions are gone");
    node.remove().await;
}

#[tokio::test]
async fn items_modes_and_optional_objects() {
    let Some(mut node) = Node::new() else { return };
    node.put("configmaps", "page", json!({"data": {"k": "v"}}));
    let item = |key: &str, path: &str| {
        json!({"configMap": {"name": "page", "defaultMode": 0o600,
            "items": [{"key": key, "path": path, "mode": 0o755}]}})
    };
    let dir = node.ensure(item("k", "bin/deep/tool")).await.unwrap();
    assert_eq!(
        fs::metadata(dir.join("bin/deep/tool")).unwrap().mode() & 0o7777,
        0o755
    );
    let missing = node
        .ensure(item("none", "x"))
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(
        missing,
        "volume \"vol\": configmap \"page\" has no key \"none\""
    );
    for path in ["../x", "/x", "a/../../x", "..data", "..", ""] {
        let error = node.ensure(item("k", path)).await.unwrap_err();
        assert!(
            matches!(error, VolumeError::Invalid { .. }),
            "{path}: {error}"
        );
    }
    let empty = json!({"configMap": {"name": "none", "optional": true}});
    let dir = node.ensure(empty).await.unwrap();
    assert!(!dir.join("k").exists());
    node.remove().await;
}

#[tokio::test]
async fn secret_is_on_tmpfs_and_belongs_to_the_group() {
    let Some(mut node) = Node::new() else { return };
    node.put("secrets", "pass", json!({"data": {"word": "aHVudGVy"}}));
    let volume = json!({"secret": {"secretName": "pass", "defaultMode": 0o400}});
    let pod = node.pod(volume, json!({"fsGroup": 4242}));
    let dir = ensure(&pod, &node.blobs, &node.paths, &node.issuer)
        .await
        .unwrap()["vol"]
        .path
        .clone();
    let again = ensure(&pod, &node.blobs, &node.paths, &node.issuer)
        .await
        .unwrap()["vol"]
        .path
        .clone();
    assert_eq!(dir, again);
    assert_eq!(read(dir.join("word")), "hunter");
    assert_eq!(
        rustix::fs::statfs(&dir).unwrap().f_type,
        0x0102_1994,
        "tmpfs"
    );
    let meta = fs::metadata(dir.join("word")).unwrap();
    assert_eq!((meta.gid(), meta.mode() & 0o777), (4242, 0o440));
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(
        table.matches(dir.to_str().unwrap()).count(),
        1,
        "mounted once"
    );
    node.remove().await;
}

#[tokio::test]
async fn empty_dir_on_disk_and_in_memory() {
    let Some(node) = Node::new() else { return };
    let dir = node.ensure(json!({"emptyDir": {}})).await.unwrap();
    assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o7777, 0o777);
    fs::write(dir.join("kept"), "x").unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    node.ensure(json!({"emptyDir": {}})).await.unwrap();
    assert_eq!(read(dir.join("kept")), "x");
    assert_eq!(
        fs::metadata(&dir).unwrap().mode() & 0o7777,
        0o700,
        "the container's own chmod"
    );
    node.remove().await;
    let memory = json!({"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}});
    let dir = node.ensure(memory).await.unwrap();
    let stat = rustix::fs::statvfs(&dir).unwrap();
    assert_eq!(
        stat.f_blocks * stat.f_frsize,
        32 << 20,
        "the pod's memory limit is less"
    );
    let odd = node
        .ensure(json!({"emptyDir": {"medium": "HugePages"}}))
        .await
        .unwrap_err();
    assert!(odd.to_string().contains("no huge pages"), "{odd}");
    node.remove().await;
}

#[tokio::test]
async fn host_path_is_checked_by_type() {
    let Some(node) = Node::new() else { return };
    let base = node.dir.path().join("host");
    fs::create_dir(&base).unwrap();
    fs::write(base.join("file"), "x").unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(base.join("sock")).unwrap();
    let at = |name: &str, kind: &str| json!({"hostPath": {"path": base.join(name), "type": kind}});
    for (name, kind) in [
        ("file", ""),
        ("file", "File"),
        ("file", "FileOrCreate"),
        ("sock", "Socket"),
        (".", "Directory"),
        ("new/deep", "DirectoryOrCreate"),
        ("fresh", "FileOrCreate"),
    ] {
        let path = node.ensure(at(name, kind)).await.unwrap();
        assert!(path.exists(), "{name} {kind}");
    }
    assert!(
        node.ensure(json!({"hostPath": {"path": "/dev/null", "type": "CharDevice"}}))
            .await
            .is_ok()
    );
    for (name, kind, part) in [
        ("file", "Directory", "is not a directory"),
        ("file", "DirectoryOrCreate", "is not a directory"),
        ("sock", "File", "is not a file"),
        ("file", "BlockDevice", "is not a block device"),
        ("none", "Directory", "does not exist"),
        ("a/../../etc", "", "without '..'"),
    ] {
        let error = node.ensure(at(name, kind)).await.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let error = node
        .ensure(at("no/parent", "FileOrCreate"))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("no/parent"), "{error}");
    node.remove().await;
    assert_eq!(read(base.join("file")), "x", "the host's own files stay");
}

#[tokio::test]
async fn pod_fields_and_projections_become_files() {
    let Some(mut node) = Node::new() else { return };
    let items = json!([
        {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
        {"path": "mem", "resourceFieldRef":
            {"containerName": "c", "resource": "limits.memory", "divisor": "1Mi"}}]);
    let dir = node
        .ensure(json!({"downwardAPI": {"items": items}}))
        .await
        .unwrap();
    assert_eq!(
        (read(dir.join("labels")), read(dir.join("mem"))),
        ("app=\"web\"".into(), "32".into())
    );
    node.put("configmaps", "page", json!({"data": {"a": "1"}}));
    node.put("secrets", "pass", json!({"data": {"b": "Mg=="}}));
    let projected = json!({"projected": {"sources": [{"configMap": {"name": "page"}},
        {"secret": {"name": "pass"}}, {"downwardAPI": {"items": items}}]}});
    let dir = node.ensure(projected).await.unwrap();
    assert_eq!(
        (read(dir.join("a")), read(dir.join("b"))),
        ("1".to_owned(), "2".to_owned())
    );
    let disk = json!({"iscsi": {"targetPortal": "p", "iqn": "q", "lun": 0}});
    let error = node.ensure(disk).await.unwrap_err().to_string();
    assert_eq!(error, "volume \"vol\": iscsi is not supported");
    node.remove().await;
}

#[tokio::test]
async fn removal_takes_any_depth_and_leaves_what_is_not_ours() {
    let Some(node) = Node::new() else { return };
    let outside = node.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("precious"), "x").unwrap();
    let dir = node.ensure(json!({"emptyDir": {}})).await.unwrap();
    symlink(&outside, dir.join("link")).unwrap();
    fs::create_dir_all(dir.join(".gantry-removing-1/.gantry-removing-2/x")).unwrap();
    // A bind mount that nobody told us about.
    fs::create_dir(dir.join("bound")).unwrap();
    rustix::mount::mount_bind(&outside, dir.join("bound")).unwrap();
    // Deeper than a path may be long (4096), and than descriptors a recursion may hold (1024).
    let mut at = rustix::fs::open(
        &dir,
        rustix::fs::OFlags::DIRECTORY,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    for _ in 0..2_100 {
        rustix::fs::mkdirat(&at, "d", rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
        at = rustix::fs::openat(
            &at,
            "d",
            rustix::fs::OFlags::DIRECTORY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
    }
    drop(at);
    // The tree alone never enters a mount: it stops and says so.
    assert!(tree::remove(&dir).is_err());
    assert_eq!(read(outside.join("precious")), "x");
    node.remove().await;
    assert_eq!(read(outside.join("precious")), "x");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_sequence_of_payloads_ends_in_the_last(
        versions in prop::collection::vec(
            prop::collection::btree_map("[a-c](/[a-c]){0,2}", "[x-z]{0,3}", 0..5), 1..5),
    ) {
        if !rustix::process::geteuid().is_root() {
            return Ok(());
        }
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("v");
        for version in &versions {
            // A name that is both file and directory cannot be: such payloads are dropped.
            let clash = version.keys().any(|a| version.keys().any(|b| b.starts_with(&format!("{a}/"))));
            if clash {
                continue;
            }
            let wanted: payload::Payload = version.iter().map(|(k, v)| {
                (k.clone(), payload::PayloadFile::new(v.clone().into_bytes(), 0o644))
            }).collect();
            atomic::write(&dir, &wanted, None).unwrap();
            for (name, file) in &wanted {
                prop_assert_eq!(fs::read(dir.join(name)).unwrap(), file.data.clone());
            }
            let names: std::collections::BTreeSet<String> = fs::read_dir(&dir).unwrap().flatten()
                .map(|e| e.file_name().to_string_lossy().into_owned())
                .filter(|n| !n.starts_with("..")).collect();
            let tops = wanted.keys().map(|k| k.split('/').next().unwrap().to_owned()).collect();
            prop_assert_eq!(names, tops);
        }
    }

    #[test]
    fn accepted_paths_stay_inside(path in "\\PC{0,40}|[a./]{0,20}") {
        if let Ok(clean) = payload::check_path(&path) {
            prop_assert!(!clean.starts_with("..") && !clean.starts_with('/'));
            prop_assert!(clean.split('/').all(|p| !p.is_empty() && p != ".." && p != "."));
        }
    }
}

#[tokio::test]
async fn a_token_is_renewed_in_time_and_stays_when_nobody_answers() {
    let Some(node) = Node::new() else { return };
    let volume = json!({"projected": {"defaultMode": 0o644, "sources": [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
        {"downwardAPI": {"items": [
            {"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}}]}});
    let error = node.ensure(volume.clone()).await.unwrap_err().to_string();
    let words = "volume \"vol\": no token of service account \"default\": offline";
    assert_eq!(error, words);
    let now = jiff::Timestamp::now().as_second();
    let (old, new) = (token(now - 3000, now + 607), token(now, now + 3607));
    *node.issuer.tokens.lock().unwrap() = vec![new.clone(), old.clone()];
    let dir = node.ensure(volume.clone()).await.unwrap();
    assert_eq!(read(dir.join("token")), old);
    assert_eq!(
        fs::metadata(dir.join("token")).unwrap().mode() & 0o777,
        0o644
    );
    assert_eq!(read(dir.join("namespace")), "shop");
    assert_eq!(
        rustix::fs::statfs(&dir).unwrap().f_type,
        0x0102_1994,
        "on tmpfs"
    );
    // 80 % of its life is over: the next look renews it, the one after that does not.
    node.ensure(volume.clone()).await.unwrap();
    assert_eq!(read(dir.join("token")), new);
    node.ensure(volume.clone()).await.unwrap();
    assert_eq!(node.issuer.asked.lock().unwrap().len(), 3);
    assert_eq!(node.issuer.asked.lock().unwrap()[2].expiration_s, 3607);
    // One user, or a group: they alone read it.
    *node.issuer.tokens.lock().unwrap() = vec![old.clone()];
    node.remove().await;
    let pod = node.pod(volume, json!({"runAsUser": 1234, "fsGroup": 99}));
    ensure(&pod, &node.blobs, &node.paths, &node.issuer)
        .await
        .unwrap();
    let meta = fs::metadata(dir.join("token")).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.mode() & 0o777),
        (1234, 99, 0o640)
    );
    // Due and nobody there: a pod that runs keeps what it has.
    ensure(&pod, &node.blobs, &node.paths, &node.issuer)
        .await
        .unwrap();
    assert_eq!(read(dir.join("token")), old);
    node.remove().await;
}

#[tokio::test]
async fn a_token_that_nobody_asked_for_holds_no_pod_up_while_the_control_plane_is_away() {
    let Some(node) = Node::new() else { return };
    let mut pod = node.pod(
        json!({"projected": {"sources": [{"serviceAccountToken": {"path": "token"}},
            {"downwardAPI": {"items": [
                {"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}}]}}),
        json!({}),
    );
    pod.spec.as_mut().unwrap().volumes.as_mut().unwrap()[0].name = "kube-api-access-x".into();
    let again = || ensure(&pod, &node.blobs, &node.paths, &node.issuer);
    let dir = again().await.unwrap()["kube-api-access-x"].path.clone();
    assert_eq!(read(dir.join("namespace")), "shop");
    assert!(!dir.join("token").exists());
    let now = jiff::Timestamp::now().as_second();
    let new = token(now, now + 3607);
    *node.issuer.tokens.lock().unwrap() = vec![new.clone()];
    again().await.unwrap();
    assert_eq!(read(dir.join("token")), new, "it follows");
    node.remove().await;
}

#[tokio::test]
async fn a_claim_leads_to_its_volume_and_the_data_stays() {
    let Some(mut node) = Node::new() else { return };
    let data = node.dir.path().join("disk");
    let volume = json!({"persistentVolumeClaim": {"claimName": "data"}});
    let waits = |error: VolumeError, words: &str| {
        assert!(matches!(&error, VolumeError::Waiting(_)), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    waits(
        node.ensure(volume.clone()).await.unwrap_err(),
        "\"data\" not found",
    );
    let claim = |phase: &str| {
        json!({"metadata": {"name": "data", "namespace": "shop", "uid": "c-1"},
            "spec": {"volumeName": "pv-1"}, "status": {"phase": phase}})
    };
    node.put("persistentvolumeclaims", "data", claim("Pending"));
    waits(node.ensure(volume.clone()).await.unwrap_err(), "not bound");
    node.put("persistentvolumeclaims", "data", claim("Bound"));
    waits(
        node.ensure(volume.clone()).await.unwrap_err(),
        "\"pv-1\" not found",
    );
    let put_volume = |node: &mut Node, uid: &str| {
        let key = BlobKey {
            plural: "persistentvolumes".into(),
            namespace: String::new(),
            name: "pv-1".into(),
        };
        let object = json!({"metadata": {"name": "pv-1"},
            "spec": {"local": {"path": &data}, "claimRef": {"uid": uid}}});
        node.blobs.insert(key, Arc::new(object));
    };
    put_volume(&mut node, "c-2");
    let error = node.ensure(volume.clone()).await.unwrap_err().to_string();
    assert!(error.contains("belongs to another claim"), "{error}");
    put_volume(&mut node, "c-1");
    waits(
        node.ensure(volume.clone()).await.unwrap_err(),
        "No such file",
    );
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "kept").unwrap();
    let pod = node.pod(volume.clone(), json!({"fsGroup": 99}));
    let ready = ensure(&pod, &node.blobs, &node.paths, &node.issuer)
        .await
        .unwrap();
    assert_eq!(
        (&ready["vol"].path, ready["vol"].access),
        (&data, Access::ReadWrite)
    );
    assert_eq!(fs::metadata(data.join("file")).unwrap().gid(), 99);
    let read_only = json!({"persistentVolumeClaim": {"claimName": "data", "readOnly": true}});
    let pod = node.pod(read_only, json!({}));
    let ready = ensure(&pod, &node.blobs, &node.paths, &node.issuer)
        .await
        .unwrap();
    assert_eq!(ready["vol"].access, Access::ReadOnly);
    node.remove().await;
    assert_eq!(read(data.join("file")), "kept");
}
