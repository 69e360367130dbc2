//! A driver of our own on real sockets: registration, volumes, what a crash leaves.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use gantry_api::k8s_openapi::api::core::v1::Pod;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use super::registration::RegistrationStatusResponse;
use super::registration::registration_server::{Registration, RegistrationServer};
use super::wire::controller_server::{Controller, ControllerServer};
use super::wire::node_server::{Node, NodeServer};
use super::wire::*;
use super::*;
use crate::ids::PodUid;
use crate::view::BlobKey;
use crate::volumes::{Access, Blobs, VolumeError, remote, tmpfs};

const DRIVER: &str = "example.csi.gantry.dev";

/// What the driver is like, and what it has been asked.
#[derive(Default)]
struct Behavior {
    /// Mounts this directory (inline), or `<this>/<handle>` (persistent).
    data: PathBuf,
    stages: bool,
    attaches: bool,
    mount_group: bool,
    /// Calls wait for ever.
    hangs: AtomicBool,
    /// Does its work and then dies instead of answering.
    loses_answers: AtomicBool,
    /// Calls until one fails, in this way.
    fails_in: Mutex<Option<(usize, Failure)>>,
    registered: AtomicU32,
    calls: Mutex<Vec<String>>,
    last_publish: Mutex<Option<NodePublishVolumeRequest>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Failure {
    /// It dies before it does anything.
    Before,
    /// It dies before it answers.
    After,
}

#[derive(Clone)]
struct Example(Arc<Behavior>);

impl Example {
    fn called(&self, call: String) -> Result<(), Status> {
        self.0.calls.lock().unwrap().push(call);
        self.fails(Failure::Before)
    }

    /// Each call asks twice, so each failure has its turn in one of them.
    fn fails(&self, failure: Failure) -> Result<(), Status> {
        let mut fails_in = self.0.fails_in.lock().unwrap();
        match &mut *fails_in {
            Some((count, kind)) if *kind == failure && *count == 0 => {
                *fails_in = None;
                Err(Status::unavailable("it died"))
            }
            Some((count, kind)) if *kind == failure => {
                *count -= 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn answer<T>(&self, done: T) -> Result<Response<T>, Status> {
        self.fails(Failure::After)?;
        if self.0.hangs.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        if self.0.loses_answers.load(Ordering::SeqCst) {
            return Err(Status::unavailable("it died"));
        }
        Ok(Response::new(done))
    }
}

fn is_mounted(path: &str) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().any(|l| l.split(' ').nth(4) == Some(path))
}

fn bind(from: &Path, to: &str) -> Result<(), Status> {
    if is_mounted(to) {
        return Ok(());
    }
    fs::create_dir_all(to)?;
    mount_bind(from, to).map_err(|errno| Status::internal(errno.to_string()))
}

fn unbind(path: &str) -> Result<(), Status> {
    if is_mounted(path) {
        let done = unmount(path, UnmountFlags::NOFOLLOW);
        done.map_err(|errno| Status::internal(errno.to_string()))?;
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

#[tonic::async_trait]
impl Node for Example {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        self.called(format!("stage {}", request.volume_id))?;
        bind(
            &self.0.data.join(&request.volume_id),
            &request.staging_target_path,
        )?;
        self.answer(NodeStageVolumeResponse {}).await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        self.called(format!("unstage {}", request.volume_id))?;
        unbind(&request.staging_target_path)?;
        self.answer(NodeUnstageVolumeResponse {}).await
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let ephemeral = &request.volume_context["csi.storage.k8s.io/ephemeral"];
        self.called(format!("publish ephemeral={ephemeral}"))?;
        *self.0.last_publish.lock().unwrap() = Some(request.clone());
        if request
            .secrets
            .get("word")
            .is_some_and(|word| word == "wrong")
        {
            return Err(Status::permission_denied("the word is wrong"));
        }
        let from = match request.staging_target_path.as_str() {
            "" => self.0.data.clone(),
            staged => staged.into(),
        };
        bind(&from, &request.target_path)?;
        self.answer(NodePublishVolumeResponse {}).await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        self.called("unpublish".into())?;
        unbind(&request.into_inner().target_path)?;
        self.answer(NodeUnpublishVolumeResponse {}).await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        use node_service_capability::rpc::Type;
        let one = |kind: Type| NodeServiceCapability {
            r#type: Some(node_service_capability::Type::Rpc(
                node_service_capability::Rpc {
                    r#type: kind.into(),
                },
            )),
        };
        let all = [
            (self.0.stages, Type::StageUnstageVolume),
            (self.0.mount_group, Type::VolumeMountGroup),
        ];
        let all = all.into_iter().filter(|(has, _)| *has);
        let capabilities = all.map(|(_, kind)| one(kind)).collect();
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse::default()))
    }
}

#[tonic::async_trait]
impl Controller for Example {
    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        use controller_service_capability::{Rpc, Type, rpc};
        let capabilities = vec![ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc {
                r#type: rpc::Type::PublishUnpublishVolume.into(),
            })),
        }];
        Ok(Response::new(ControllerGetCapabilitiesResponse {
            capabilities,
        }))
    }
}

/// The registrar that stands beside a driver.
struct Registrar {
    info: PluginInfo,
    told: Arc<Mutex<Vec<RegistrationStatus>>>,
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(self.info.clone()))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        self.told.lock().unwrap().push(request.into_inner());
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// A driver that runs: two sockets, as real ones have them.
struct Running {
    behavior: Arc<Behavior>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    sockets: [PathBuf; 2],
}

impl Running {
    fn start(paths: &Paths, behavior: Arc<Behavior>) -> Self {
        let plugin = paths.kubelet.join("plugins").join(DRIVER);
        let registry = paths.kubelet.join(REGISTRY);
        for directory in [&plugin, &registry] {
            fs::create_dir_all(directory).unwrap();
        }
        let endpoint = plugin.join("csi.sock");
        let example = Example(behavior.clone());
        let attaches = behavior
            .attaches
            .then(|| ControllerServer::new(example.clone()));
        let served = tonic::transport::Server::builder()
            .add_service(NodeServer::new(example))
            .add_optional_service(attaches)
            .serve_with_incoming(listen(&endpoint));
        let info = PluginInfo {
            r#type: PLUGIN_TYPE.into(),
            name: DRIVER.into(),
            endpoint: endpoint.display().to_string(),
            supported_versions: vec!["1.0.0".into()],
        };
        let (socket, registrar) = serve_registrar(&registry, "example-reg.sock", info);
        let served = tokio::spawn(async move {
            let _ = served.await;
        });
        let told = registrar.1;
        let counted = behavior.clone();
        let counting = tokio::spawn(async move {
            while told.lock().unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            counted.registered.fetch_add(1, Ordering::SeqCst);
        });
        Self {
            behavior,
            tasks: vec![served, registrar.0, counting],
            sockets: [socket, endpoint],
        }
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.behavior.calls.lock().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
        for socket in &self.sockets {
            let _ = fs::remove_file(socket);
        }
    }
}

fn listen(socket: &Path) -> UnixListenerStream {
    let _ = fs::remove_file(socket);
    UnixListenerStream::new(UnixListener::bind(socket).unwrap())
}

type Told = Arc<Mutex<Vec<RegistrationStatus>>>;

fn serve_registrar(
    registry: &Path,
    name: &str,
    info: PluginInfo,
) -> (PathBuf, (tokio::task::JoinHandle<()>, Told)) {
    fs::create_dir_all(registry).unwrap();
    let socket = registry.join(name);
    let told = Told::default();
    let registrar = Registrar {
        info,
        told: told.clone(),
    };
    let served = tonic::transport::Server::builder()
        .add_service(RegistrationServer::new(registrar))
        .serve_with_incoming(listen(&socket));
    let served = tokio::spawn(async move {
        let _ = served.await;
    });
    (socket, (served, told))
}

/// A node's directories, unmounted at the end whatever happens.
struct Bed {
    directory: tempfile::TempDir,
    paths: Paths,
    blobs: Blobs,
    patience: Duration,
    stop: CancellationToken,
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.stop.cancel();
        let _ = tmpfs::unmount_below(self.directory.path());
    }
}

impl Bed {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: volumes need root (mounts)");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let mut paths = Paths::standard("/nowhere".into());
        paths.lib = directory.path().join("lib");
        paths.kubelet = directory.path().join("kubelet");
        paths.run = directory.path().join("run");
        for data in ["data", "data/h-1", "data/h-2"] {
            fs::create_dir_all(directory.path().join(data)).unwrap();
            fs::write(directory.path().join(data).join("file"), data).unwrap();
        }
        Some(Self {
            directory,
            paths,
            blobs: Blobs::new(),
            patience: Duration::from_secs(20),
            stop: CancellationToken::new(),
        })
    }

    fn behavior(&self) -> Behavior {
        Behavior {
            data: self.directory.path().join("data"),
            ..Behavior::default()
        }
    }

    /// An agent's part in this; the one before it ends.
    fn agent(&mut self) -> CsiDrivers {
        self.stop.cancel();
        self.stop = CancellationToken::new();
        let drivers = CsiDrivers::with_patience(&self.paths, self.patience);
        tokio::spawn(drivers.clone().serve(self.stop.clone()));
        drivers
    }

    fn put(&mut self, plural: &str, namespace: &str, name: &str, object: Value) {
        let key = BlobKey {
            plural: plural.into(),
            namespace: namespace.into(),
            name: name.into(),
        };
        self.blobs.insert(key, Arc::new(object));
    }

    /// A PersistentVolume and the claim `shop/<name>` that has it.
    fn put_volume(&mut self, name: &str, mut spec: Value) {
        spec["claimRef"] = json!({"uid": format!("uid-{name}")});
        self.put(
            "persistentvolumes",
            "",
            name,
            json!({"metadata": {"name": name}, "spec": spec}),
        );
        let claim = json!({"metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}")},
            "spec": {"volumeName": name}, "status": {"phase": "Bound"}});
        self.put("persistentvolumeclaims", "shop", name, claim);
    }

    async fn ensure(&self, drivers: &CsiDrivers, pod: &Pod) -> Result<PathBuf, VolumeError> {
        let uid = uid(pod);
        let ready = remote::ensure(pod, &uid, &self.blobs, &self.paths, drivers).await?;
        Ok(ready["vol"].path.clone())
    }

    async fn remove(&self, drivers: &CsiDrivers, pod: &Pod) -> Result<(), VolumeError> {
        crate::volumes::remove(&uid(pod), &self.paths, drivers).await
    }

    fn is_clean(&self, pod: &Pod) {
        let uid = uid(pod);
        assert!(!self.paths.pod_lib(&uid).exists());
        assert!(!self.paths.kubelet_pod(&uid).exists());
        let file = self.directory.path().join("data/file");
        assert_eq!(fs::read_to_string(file).unwrap(), "data", "the data stays");
    }
}

fn uid(pod: &Pod) -> PodUid {
    PodUid::new(pod.metadata.uid.as_deref().unwrap()).unwrap()
}

fn pod(uid: &str, mut volume: Value, security: Value) -> Pod {
    volume["name"] = json!("vol");
    serde_json::from_value(
        json!({"metadata": {"name": "p", "namespace": "shop", "uid": uid},
        "spec": {"containers": [], "volumes": [volume], "securityContext": security}}),
    )
    .unwrap()
}

fn inline(uid: &str, more: Value) -> Pod {
    let mut source = json!({"driver": DRIVER});
    source
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    pod(uid, json!({"csi": source}), json!({}))
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what}: not within 20 s");
}

async fn until_known(drivers: &CsiDrivers) {
    until("registered", || drivers.endpoint(DRIVER).is_some()).await;
}

#[tokio::test]
async fn a_pods_volume_is_published_with_what_the_driver_needs_to_know() {
    let Some(mut bed) = Bed::new() else { return };
    let drivers = bed.agent();
    let secret = json!({"nodePublishSecretRef": {"name": "s"}, "readOnly": true,
        "volumeAttributes": {"size": "1"}, "fsType": "ext4"});
    let web = inline("u-1", secret);
    let arrivals = drivers.arrivals();
    // Without a driver, and without the Secret, it waits and nothing is noted.
    let error = bed.ensure(&drivers, &web).await.unwrap_err();
    assert!(matches!(error, VolumeError::Waiting(_)), "{error}");
    assert!(error.to_string().contains("is not registered"), "{error}");
    let driver = Running::start(&bed.paths, Arc::new(bed.behavior()));
    until_known(&drivers).await;
    until("told", || {
        driver.behavior.registered.load(Ordering::SeqCst) == 1
    })
    .await;
    let error = bed.ensure(&drivers, &web).await.unwrap_err().to_string();
    assert!(error.contains("secret \"shop/s\" not found"), "{error}");
    assert!(!has_records(&bed.paths, &uid(&web)));
    assert!(arrivals.has_changed().unwrap(), "whoever waits is told");
    // What the driver says comes through, the Secret does not.
    bed.put(
        "secrets",
        "shop",
        "s",
        json!({"data": {"word": "d3Jvbmc="}}),
    );
    let error = bed.ensure(&drivers, &web).await.unwrap_err().to_string();
    assert!(error.contains("the word is wrong"), "{error}");
    bed.put(
        "secrets",
        "shop",
        "s",
        json!({"data": {"word": "aHVudGVy"}}),
    );
    let path = bed.ensure(&drivers, &web).await.unwrap();
    let kubelet = bed.paths.kubelet_pod(&uid(&web));
    assert_eq!(path, kubelet.join("volumes/kubernetes.io~csi/vol/mount"));
    assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "data");
    let asked = driver
        .behavior
        .last_publish
        .lock()
        .unwrap()
        .clone()
        .unwrap();
    assert!(asked.readonly && asked.volume_id.starts_with("csi-"));
    assert_eq!(
        asked.secrets,
        HashMap::from([("word".into(), "hunter".into())])
    );
    assert_eq!(asked.volume_context["size"], "1");
    assert_eq!(asked.volume_context["csi.storage.k8s.io/pod.uid"], "u-1");
    let record = fs::read_to_string(bed.paths.csi_records(&uid(&web)).join("vol.json")).unwrap();
    assert!(
        !record.contains("hunter") && !record.contains("word"),
        "{record}"
    );
    let ready = remote::ensure(&web, &uid(&web), &bed.blobs, &bed.paths, &drivers).await;
    assert_eq!(ready.unwrap()["vol"].access, Access::ReadOnly);
    let asked = ["publish ephemeral=true", "publish ephemeral=true"];
    assert_eq!(
        driver.calls(),
        asked,
        "the last one was not asked for again"
    );

    bed.remove(&drivers, &web).await.unwrap();
    bed.remove(&drivers, &web).await.unwrap();
    assert_eq!(driver.calls(), ["unpublish"]);
    bed.is_clean(&web);
}

#[tokio::test]
async fn what_was_cut_short_anywhere_is_taken_back_by_the_next_agent() {
    let Some(mut bed) = Bed::new() else { return };
    let drivers = bed.agent();
    let driver = Running::start(&bed.paths, Arc::new(bed.behavior()));
    until_known(&drivers).await;
    let web = inline("u-1", json!({}));
    // The driver mounts and dies before it says so.
    driver.behavior.loses_answers.store(true, Ordering::SeqCst);
    let error = bed.ensure(&drivers, &web).await.unwrap_err().to_string();
    assert!(
        error.contains("NodePublishVolume") && error.contains("it died"),
        "{error}"
    );
    assert!(has_records(&bed.paths, &uid(&web)), "it may be published");
    // One that hangs is given up, for publishing and for the way back.
    driver.behavior.loses_answers.store(false, Ordering::SeqCst);
    bed.patience = Duration::from_millis(400);
    let drivers = bed.agent();
    until_known(&drivers).await;
    bed.patience = Duration::from_secs(20);
    driver.behavior.hangs.store(true, Ordering::SeqCst);
    let error = bed.ensure(&drivers, &web).await.unwrap_err().to_string();
    assert!(error.contains("no answer within"), "{error}");
    let error = bed.remove(&drivers, &web).await.unwrap_err().to_string();
    assert!(error.contains("stays published"), "{error}");
    // The agent starts anew while the driver is gone: the removal waits for it, and says so.
    let behavior = driver.behavior.clone();
    drop(driver);
    behavior.hangs.store(false, Ordering::SeqCst);
    let drivers = bed.agent();
    let error = bed.remove(&drivers, &web).await.unwrap_err().to_string();
    assert!(error.contains("not registered on this node"), "{error}");
    assert!(has_records(&bed.paths, &uid(&web)));
    let driver = Running::start(&bed.paths, behavior);
    driver.calls();
    // Also before it is registered again: its last address is known.
    bed.remove(&drivers, &web).await.unwrap();
    assert_eq!(driver.calls(), ["unpublish"]);
    bed.is_clean(&web);
}

#[tokio::test]
async fn a_restarted_agent_goes_on_without_the_driver_and_asks_again_after_a_reboot() {
    let Some(mut bed) = Bed::new() else { return };
    let drivers = bed.agent();
    let driver = Running::start(&bed.paths, Arc::new(bed.behavior()));
    until_known(&drivers).await;
    let web = inline("u-1", json!({}));
    let path = bed.ensure(&drivers, &web).await.unwrap();
    let behavior = driver.behavior.clone();
    drop(driver);
    let drivers = bed.agent();
    assert_eq!(bed.ensure(&drivers, &web).await.unwrap(), path);
    // As a reboot leaves it: the record is of another boot, and nothing is mounted.
    let file = bed.paths.csi_records(&uid(&web)).join("vol.json");
    let record = fs::read_to_string(&file).unwrap();
    let other = record.replace(&boot_id().unwrap(), "another");
    fs::write(&file, other).unwrap();
    unbind(path.to_str().unwrap()).unwrap();
    let error = bed.ensure(&drivers, &web).await.unwrap_err();
    assert!(matches!(error, VolumeError::Waiting(_)), "{error}");
    let driver = Running::start(&bed.paths, behavior);
    until_known(&drivers).await;
    driver.calls();
    assert_eq!(bed.ensure(&drivers, &web).await.unwrap(), path);
    assert_eq!(driver.calls(), ["publish ephemeral=true"]);
    // A machine that is cleaned up after its driver has gone.
    drop(driver);
    assert!(bed.remove(&drivers, &web).await.is_err());
    drivers.abandon(&uid(&web)).await.unwrap();
    bed.remove(&drivers, &web).await.unwrap();
    bed.is_clean(&web);
}

#[tokio::test]
async fn a_persistent_volume_is_staged_once_for_all_its_pods() {
    let Some(mut bed) = Bed::new() else { return };
    let drivers = bed.agent();
    let behavior = Behavior {
        stages: true,
        ..bed.behavior()
    };
    let driver = Running::start(&bed.paths, Arc::new(behavior));
    until_known(&drivers).await;
    for handle in ["h-1", "h-2"] {
        let source = json!({"driver": DRIVER, "volumeHandle": handle, "fsType": "ext4",
            "nodeStageSecretRef": {"namespace": "storage", "name": "s"}});
        let spec = json!({"csi": source, "accessModes": ["ReadWriteOnce"],
            "mountOptions": ["noatime"]});
        bed.put_volume(&format!("pv-{handle}"), spec);
    }
    bed.put("secrets", "storage", "s", json!({"data": {}}));
    let user = |uid: &str, claim: &str| {
        let volume = json!({"persistentVolumeClaim": {"claimName": claim}});
        pod(uid, volume, json!({"fsGroup": 4711}))
    };
    let (one, two) = (user("u-1", "pv-h-1"), user("u-2", "pv-h-1"));
    let other = user("u-3", "pv-h-2");
    let path = bed.ensure(&drivers, &one).await.unwrap();
    assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "data/h-1");
    assert_eq!(fs::metadata(path.join("file")).unwrap().gid(), 4711);
    bed.ensure(&drivers, &two).await.unwrap();
    bed.ensure(&drivers, &other).await.unwrap();
    let asked = driver
        .behavior
        .last_publish
        .lock()
        .unwrap()
        .clone()
        .unwrap();
    let Some(volume_capability::AccessType::Mount(mount)) =
        asked.volume_capability.unwrap().access_type
    else {
        panic!("no mount");
    };
    assert_eq!(
        (mount.fs_type.as_str(), mount.mount_flags),
        ("ext4", vec!["noatime".into()])
    );
    driver.calls();
    bed.remove(&drivers, &one).await.unwrap();
    assert_eq!(driver.calls(), ["unpublish"], "two still has it");
    // Two's removal is cut short after the driver has unstaged and before the agent knows.
    driver.behavior.loses_answers.store(true, Ordering::SeqCst);
    assert!(bed.remove(&drivers, &two).await.is_err());
    driver.behavior.loses_answers.store(false, Ordering::SeqCst);
    driver.calls();
    let drivers = bed.agent();
    until_known(&drivers).await;
    bed.remove(&drivers, &two).await.unwrap();
    assert_eq!(driver.calls(), ["unpublish", "unstage h-1"]);
    bed.remove(&drivers, &other).await.unwrap();
    assert_eq!(driver.calls(), ["unpublish", "unstage h-2"]);
    for pod in [&one, &two, &other] {
        bed.is_clean(pod);
    }
    let staged = bed
        .paths
        .kubelet
        .join("plugins/kubernetes.io/csi")
        .join(DRIVER);
    assert_eq!(fs::read_dir(staged).unwrap().count(), 0);
}

/// Whichever call fails, and whether its work was done: the next agent comes to the same end, and no
/// pod loses what it has.
#[tokio::test]
async fn every_call_may_fail_once_before_or_after_its_work() {
    let Some(mut bed) = Bed::new() else { return };
    let behavior = Behavior {
        stages: true,
        ..bed.behavior()
    };
    let driver = Running::start(&bed.paths, Arc::new(behavior));
    let source = json!({"driver": DRIVER, "volumeHandle": "h-1"});
    bed.put_volume(
        "pv",
        json!({"csi": source, "accessModes": ["ReadWriteMany"]}),
    );
    let volume = json!({"persistentVolumeClaim": {"claimName": "pv"}});
    let user = |uid: &str| pod(uid, volume.clone(), json!({}));
    let (one, two) = (user("u-1"), user("u-2"));
    let mut failed = 0;
    // stage publish, stage publish, unpublish, unpublish unstage
    for (call, kind) in (0..7).flat_map(|n| [(n, Failure::Before), (n, Failure::After)]) {
        *driver.behavior.fails_in.lock().unwrap() = Some((call, kind));
        let mut drivers = bed.agent();
        for (pod, comes) in [(&one, true), (&two, true), (&one, false), (&two, false)] {
            until_known(&drivers).await;
            for attempt in 0.. {
                assert!(attempt < 2, "{kind:?} in call {call}");
                let done = match comes {
                    true => bed.ensure(&drivers, pod).await.map(|_| ()),
                    false => bed.remove(&drivers, pod).await,
                };
                if done.is_ok() {
                    break;
                }
                failed += 1;
                drivers = bed.agent();
                until_known(&drivers).await;
            }
            let path = |pod: &Pod| bed.paths.kubelet_pod(&uid(pod));
            let file = path(&two).join("volumes/kubernetes.io~csi/pv/mount/file");
            if pod != &two || comes {
                let has = fs::read_to_string(&file).ok();
                let wanted = (pod == &two || !comes).then(|| "data/h-1".to_owned());
                assert_eq!(has, wanted, "{kind:?} in call {call}");
            }
        }
        bed.is_clean(&one);
        bed.is_clean(&two);
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let here = bed.directory.path().to_str().unwrap();
        assert!(!table.contains(here), "{kind:?} in call {call}: {table}");
    }
    assert_eq!(failed, 14);
}

#[tokio::test]
async fn a_driver_that_attaches_is_refused_in_words() {
    let Some(mut bed) = Bed::new() else { return };
    let drivers = bed.agent();
    let behavior = Behavior {
        attaches: true,
        mount_group: true,
        ..bed.behavior()
    };
    let driver = Running::start(&bed.paths, Arc::new(behavior));
    until_known(&drivers).await;
    bed.put_volume(
        "pv",
        json!({"csi": {"driver": DRIVER, "volumeHandle": "h-1"}}),
    );
    let volume = json!({"persistentVolumeClaim": {"claimName": "pv"}});
    let error = bed.ensure(&drivers, &pod("u-1", volume, json!({}))).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("ControllerPublishVolume"), "{error}");
    // An inline volume of it needs no attaching, and its group is the driver's business.
    let web = pod(
        "u-2",
        json!({"csi": {"driver": DRIVER}}),
        json!({"fsGroup": 5}),
    );
    bed.ensure(&drivers, &web).await.unwrap();
    let asked = driver
        .behavior
        .last_publish
        .lock()
        .unwrap()
        .clone()
        .unwrap();
    let access = asked.volume_capability.unwrap().access_type.unwrap();
    let volume_capability::AccessType::Mount(mount) = access;
    assert_eq!(mount.volume_mount_group, "5");
    bed.remove(&drivers, &web).await.unwrap();
    bed.is_clean(&web);
}

#[tokio::test]
async fn only_drivers_that_can_be_called_are_registered_and_the_others_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let mut paths = Paths::standard("/nowhere".into());
    paths.kubelet = directory.path().to_owned();
    let registry = directory.path().join(REGISTRY);
    let info = |name: &str, endpoint: &str, version: &str| PluginInfo {
        r#type: PLUGIN_TYPE.into(),
        name: name.into(),
        endpoint: endpoint.into(),
        supported_versions: vec![version.into()],
    };
    let (_, (_, device)) = serve_registrar(
        &registry,
        "a-device.sock",
        PluginInfo {
            r#type: "DevicePlugin".into(),
            ..info("example.com/thing", "", "v1beta1")
        },
    );
    let bad = [
        (
            "b-name.sock",
            info("../x", "/a.sock", "1.0.0"),
            "no name of a CSI driver",
        ),
        (
            "c-old.sock",
            info("old.example", "/a.sock", "0.3.0"),
            "speaks 1.x",
        ),
        (
            "d-relative.sock",
            info("relative.example", "a.sock", "1.0.0"),
            "absolute path",
        ),
        (
            "e-dead.sock",
            info("dead.example", "/nonexistent.sock", "1.0.0"),
            "/nonexistent.sock",
        ),
    ];
    let mut told = Vec::new();
    for (name, info, words) in bad {
        told.push((serve_registrar(&registry, name, info).1.1, words));
    }
    // Nobody listens there any more, and nobody answers there.
    drop(std::os::unix::net::UnixListener::bind(registry.join("f-left.sock")).unwrap());
    fs::write(registry.join("g-file.sock"), "").unwrap();
    let stop = CancellationToken::new();
    let drivers = CsiDrivers::new(&paths);
    let serving = tokio::spawn(drivers.clone().serve(stop.clone()));
    for (told, words) in told {
        until(words, || !told.lock().unwrap().is_empty()).await;
        let told = told.lock().unwrap()[0].clone();
        assert!(
            !told.plugin_registered && told.error.contains(words),
            "{told:?}"
        );
    }
    assert!(device.lock().unwrap().is_empty(), "it is none of ours");
    let driver = Running::start(&paths, Arc::new(Behavior::default()));
    until_known(&drivers).await;
    assert_eq!(drivers.registered().len(), 1);
    let told = |driver: &Running, count: u32| {
        let registered = &driver.behavior.registered;
        registered.load(Ordering::SeqCst) == count
    };
    until("told", || told(&driver, 1)).await;
    // One that starts anew at the same path is asked anew; one that goes is forgotten.
    let behavior = driver.behavior.clone();
    drop(driver);
    let driver = Running::start(&paths, behavior);
    until("told again", || told(&driver, 2)).await;
    drop(driver);
    until("gone", || drivers.endpoint(DRIVER).is_none()).await;
    stop.cancel();
    serving.await.unwrap();
}
