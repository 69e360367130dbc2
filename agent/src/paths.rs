//! Where everything lives. One value, passed as an argument: tests use a directory of their own.
//!
//! What must be gone after a reboot (namespaces, sockets, exit records of this boot) is below
//! `run`; what must survive it (images, volumes, the last feed state) is below `lib`.

use std::path::{Path, PathBuf};

use crate::ids::{ContainerRun, PodUid};

/// The roots of the agent's files.
#[derive(Clone, Debug)]
pub struct Paths {
    /// `/run/gantry`, on tmpfs.
    pub run: PathBuf,
    /// `/var/lib/gantry`.
    pub lib: PathBuf,
    /// `/var/log/pods`, CRI log format.
    pub log: PathBuf,
    /// `/sys/fs/bpf/gantry`.
    pub bpf: PathBuf,
    /// `/var/lib/kubelet`: where plugins of nodes look for the node, and drivers put volumes.
    pub kubelet: PathBuf,
    /// Where `gantry-shim` and `gantry-rt` are: the directory of the agent's own binary.
    pub bin: PathBuf,
}

impl Paths {
    /// The standard places; `bin` is where the agent's binary lies.
    pub fn standard(bin: PathBuf) -> Self {
        Self {
            run: "/run/gantry".into(),
            lib: "/var/lib/gantry".into(),
            log: "/var/log/pods".into(),
            bpf: "/sys/fs/bpf/gantry".into(),
            kubelet: "/var/lib/kubelet".into(),
            bin,
        }
    }

    /// `/run/gantry/pods/<uid>`: the sandbox: `shim.sock`, `ns/`, a directory per container.
    pub fn sandbox(&self, pod: &PodUid) -> PathBuf {
        self.run.join("pods").join(pod.as_str())
    }

    /// `/run/gantry/pods/<uid>/ns`: `net`, `ipc` and `uts`, each a bind mount of the namespace.
    pub fn namespaces(&self, pod: &PodUid) -> PathBuf {
        self.sandbox(pod).join("ns")
    }

    /// `/run/gantry/pods/<uid>/<container>/<attempt>`: intent, bundle, FIFOs, exit record.
    pub fn container_run(&self, run: &ContainerRun) -> PathBuf {
        self.sandbox(&run.pod)
            .join(&run.name)
            .join(run.attempt.to_string())
    }

    /// `/var/lib/gantry/pods`
    pub fn pods_lib(&self) -> PathBuf {
        self.lib.join("pods")
    }

    /// `/var/lib/gantry/pods/<uid>`: volumes and writable layers.
    pub fn pod_lib(&self, pod: &PodUid) -> PathBuf {
        self.pods_lib().join(pod.as_str())
    }

    /// `/var/lib/gantry/pods/<uid>/volume-subpaths`: mounts of parts of volumes.
    pub fn volume_sub_paths(&self, pod: &PodUid) -> PathBuf {
        self.pod_lib(pod).join("volume-subpaths")
    }

    /// `/var/lib/gantry/pods/<uid>/containers/<container>/<attempt>`: overlay upper, work, rootfs.
    pub fn container_layers(&self, run: &ContainerRun) -> PathBuf {
        self.pod_lib(&run.pod)
            .join("containers")
            .join(&run.name)
            .join(run.attempt.to_string())
    }

    /// `/var/lib/gantry/pods/<uid>/csi`: what drivers have been asked to publish for the pod.
    pub fn csi_records(&self, pod: &PodUid) -> PathBuf {
        self.pod_lib(pod).join("csi")
    }

    /// `/var/lib/kubelet/pods/<uid>`: where drivers put the pod's volumes.
    pub fn kubelet_pod(&self, pod: &PodUid) -> PathBuf {
        self.kubelet.join("pods").join(pod.as_str())
    }

    /// `/var/log/pods/<ns>_<name>_<uid>`.
    pub fn pod_log(&self, namespace: &str, name: &str, pod: &PodUid) -> PathBuf {
        self.log.join(format!("{namespace}_{name}_{pod}"))
    }

    /// `/var/log/pods/<ns>_<name>_<uid>/<container>/<attempt>.log`, CRI format.
    pub fn container_log(pod_log: &Path, run: &ContainerRun) -> PathBuf {
        pod_log.join(&run.name).join(format!("{}.log", run.attempt))
    }
}
