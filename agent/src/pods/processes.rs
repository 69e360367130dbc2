//! Pid namespaces that containers share: a pod's (`shareProcessNamespace`), or another container's
//! (an ephemeral container with a target).
//!
//! ```text
//! gantry.init (gantry-shim init, process 1: reaps) ─ owns ─► pid namespace ◄─ joined by ─ containers
//! ```
//! The first process is a run of the shim like any container, under a name that no container can
//! have (it has a dot): so it is recorded, adopted, counted and removed like one. When it dies the
//! kernel kills everything in its namespace; the containers' restarts then make a new one.
//!
//! A namespace is handed on as an open descriptor (`/proc/<agent>/fd/<n>`), looked at again after it
//! was opened: a pid that was given to another process in between is never joined.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gantry_api::k8s_openapi::api::core::v1::Pod;
use oci_spec::runtime::Spec;
use serde_json::json;
use tokio::sync::Mutex;

use super::prepare::{Failure, names};
use super::{Node, configs};
use crate::cgroups::limits::qos_class;
use crate::ids::{ContainerRun, PodUid};
use crate::network::PodNetwork;
use crate::paths::Paths;
use crate::runtime::{ContainerSpec, Seccomp};

/// No container name has a dot.
const INIT: &str = "gantry.init";
/// nobody
const USER: u32 = 65535;
/// It is the last one that the OOM killer should choose: the kubelet's value for pause.
const OOM_SCORE_ADJ: i32 = -998;

/// Held by one start of the pod at a time.
pub type Turn = Arc<Mutex<()>>;

/// An open pid namespace.
pub struct PidNamespace {
    file: File,
}

impl PidNamespace {
    /// A path that is good as long as this value lives.
    pub fn path(&self) -> PathBuf {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&self.file);
        PathBuf::from(format!("/proc/{}/fd/{fd}", std::process::id()))
    }
}

/// The namespace that a container joins; none: one of its own, or the host's.
pub async fn namespace_of(
    node: &Arc<Node>,
    pod: &Pod,
    run: &ContainerRun,
    network: &PodNetwork,
    turn: &Turn,
    target: Option<ContainerRun>,
) -> Result<Option<PidNamespace>, Failure> {
    let spec = pod.spec.as_ref();
    if spec.is_some_and(|s| s.host_pid == Some(true)) {
        return Ok(None);
    }
    if spec.is_some_and(|s| s.share_process_namespace == Some(true)) {
        let _turn = turn.lock().await;
        return ensure_init(node, pod, &run.pod, network).await.map(Some);
    }
    let Some(name) = configs::target(pod, &run.name) else {
        return Ok(None);
    };
    let found = match target {
        Some(target) => open(node, &target).await?,
        None => None,
    };
    found.map(Some).ok_or_else(|| Failure {
        reason: "CreateContainerError",
        message: format!("the target container {name:?} is not running"),
    })
}

/// The namespace of a running container; none when it does not run.
async fn open(node: &Node, run: &ContainerRun) -> Result<Option<PidNamespace>, Failure> {
    let pid = || async {
        let pid = node.runtime.pid(run).await;
        pid.map_err(|e| Failure::new("CreateContainerError", e))
    };
    let Some(before) = pid().await? else {
        return Ok(None);
    };
    let Ok(file) = File::open(format!("/proc/{before}/ns/pid")) else {
        return Ok(None);
    };
    let same = pid().await? == Some(before);
    Ok(same.then_some(PidNamespace { file }))
}

/// The pod's own namespace, with its first process.
async fn ensure_init(
    node: &Arc<Node>,
    pod: &Pod,
    uid: &PodUid,
    network: &PodNetwork,
) -> Result<PidNamespace, Failure> {
    let run = |attempt| ContainerRun {
        pod: uid.clone(),
        name: INIT.into(),
        attempt,
    };
    let error = |e: &dyn std::fmt::Display| Failure::new("FailedCreatePodSandBox", e);
    let last = last_attempt(&node.paths.sandbox(uid).join(INIT));
    if let Some(last) = last {
        if let Some(namespace) = open(node, &run(last)).await? {
            return Ok(namespace);
        }
        // Whatever it has left, members of its namespace included, ends before the next one begins.
        node.runtime
            .remove_container(&run(last))
            .await
            .map_err(|e| error(&e))?;
    }
    let run = run(last.map_or(0, |last| last + 1));
    let spec = init_spec(node, pod, &run, network).map_err(|e| error(&e))?;
    let started = node.runtime.start_container(&spec).await;
    started.map_err(|e| error(&e))?;
    let opened = open(node, &run).await?;
    opened.ok_or_else(|| error(&"the pod's first process ended at once"))
}

fn last_attempt(directory: &Path) -> Option<u32> {
    let entries = std::fs::read_dir(directory).ok()?;
    let numbers = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok());
    numbers.max()
}

/// A root file system with one file in it.
fn init_spec(
    node: &Node,
    pod: &Pod,
    run: &ContainerRun,
    network: &PodNetwork,
) -> std::io::Result<ContainerSpec> {
    let root = node.paths.pod_lib(&run.pod).join("init");
    for name in ["proc", "dev"] {
        std::fs::create_dir_all(root.join(name))?;
    }
    File::create(root.join("init"))?;
    let cgroup = node.cgroups.pod_path(&run.pod, qos_class(pod));
    let shim = node.paths.bin.join("gantry-shim");
    let (namespace, name) = names(pod);
    let logs = node.paths.pod_log(namespace, name, &run.pod);
    Ok(ContainerSpec {
        run: run.clone(),
        oci: oci_spec(&root, &shim, &format!("{cgroup}/{INIT}"), network)
            .map_err(std::io::Error::other)?,
        seccomp: Seccomp::RuntimeDefault,
        allow_privilege_escalation: false,
        log_path: Paths::container_log(&logs, run),
        stdin: false,
        stdin_once: false,
        tty: false,
    })
}

fn oci_spec(
    root: &Path,
    shim: &Path,
    cgroup: &str,
    network: &PodNetwork,
) -> Result<Spec, serde_json::Error> {
    let mut namespaces = vec![
        json!({"type": "mount"}),
        json!({"type": "cgroup"}),
        json!({"type": "pid"}),
        json!({"type": "ipc", "path": network.ipcns}),
    ];
    if let Some(path) = &network.netns {
        namespaces.push(json!({"type": "network", "path": path}));
    }
    if let Some(path) = &network.utsns {
        namespaces.push(json!({"type": "uts", "path": path}));
    }
    serde_json::from_value(json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": USER, "gid": USER},
            "args": ["/init", "init"],
            "env": ["PATH=/", "HOME=/"],
            "cwd": "/",
            "capabilities": {},
            "noNewPrivileges": true,
            "oomScoreAdj": OOM_SCORE_ADJ,
        },
        "root": {"path": root, "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
                "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=64k"]},
            {"destination": "/init", "type": "bind", "source": shim,
                "options": ["bind", "rprivate", "ro", "nosuid", "nodev"]},
        ],
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": namespaces,
            // Its root is made by a process that is in the cgroup already, and gives it a /dev/null.
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
            ]},
            "maskedPaths": crate::runtime::spec::security::MASKED_PATHS,
            "readonlyPaths": crate::runtime::spec::security::READONLY_PATHS,
        },
    }))
}
