//! Volumes of a CSI driver: given, shared, kept without the driver, and taken back when it is there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::with_volume;
use crate::cluster::Cluster;
use crate::csi_driver::{self, DRIVER, POD_FILE, SECRET_FILE, plugin_directory, registrar_socket};

const LIMIT: Duration = Duration::from_secs(120);
const KUBELET: &str = "/var/lib/kubelet";
const WORD: &str = "open-sesame-0815";
const HANDLE: &str = "shared-1";

/// The driver while it runs; its volumes outlive it.
struct Driver {
    runtime: Option<tokio::runtime::Runtime>,
    data: PathBuf,
}

impl Driver {
    fn start(data: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let volumes = data.to_owned();
        runtime.spawn(async move {
            if let Err(error) = csi_driver::serve(Path::new(KUBELET), &volumes).await {
                eprintln!("the example CSI driver: {error:#}");
            }
        });
        Ok(Self {
            runtime: Some(runtime),
            data: data.to_owned(),
        })
    }

    /// Kills it; its sockets stay, as a crash leaves them.
    fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    fn volumes(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.data)?;
        let names = entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned()));
        names.collect()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.kill();
        let kubelet = Path::new(KUBELET);
        let _ = std::fs::remove_file(registrar_socket(kubelet));
        let _ = std::fs::remove_dir_all(plugin_directory(kubelet));
    }
}

fn objects() -> String {
    format!(
        "apiVersion: v1
kind: Secret
metadata: {{name: word}}
stringData: {{word: {WORD}}}
---
apiVersion: v1
kind: PersistentVolume
metadata: {{name: shared}}
spec:
  accessModes: [ReadWriteMany]
  capacity: {{storage: 1Gi}}
  storageClassName: by-hand
  mountOptions: [noatime]
  csi: {{driver: {DRIVER}, volumeHandle: {HANDLE}}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: shared}}
spec:
  accessModes: [ReadWriteMany]
  storageClassName: by-hand
  resources: {{requests: {{storage: 1Gi}}}}
"
    )
}

/// Mount points whose path has this in it.
fn mounts_with(part: &str) -> Result<Vec<String>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let found = points.filter(|point| point.contains(part));
    Ok(found.map(str::to_owned).collect())
}

fn is_gone(cluster: &Cluster, pod: &str) -> Result<bool> {
    Ok(!cluster.ok(&["get", "pods"])?.contains(pod))
}

/// A pod waits for its driver, has its volume, keeps it without the driver and without the agent,
/// and is not gone before the driver has taken it back; two pods share one that is staged once.
pub(super) fn csi_volumes(cluster: &mut Cluster) -> Result<()> {
    let data = tempfile::tempdir()?;
    cluster.apply_ok(&objects())?;
    let inline = format!(
        "csi: {{driver: {DRIVER}, volumeAttributes: {{size: small}}, \
         nodePublishSecretRef: {{name: word}}}}"
    );
    cluster.apply_ok(&with_volume("own", &inline))?;
    cluster.wait("the pod to be told that its driver is absent", LIMIT, |c| {
        let events = c.ok(&["get", "events"])?;
        Ok(events.contains("FailedMount") && events.contains("is not registered on this node"))
    })?;

    let mut driver = Driver::start(data.path())?;
    cluster.wait_ready("default", "own")?;
    let script =
        format!("cat /data/{POD_FILE}; echo; cat /data/{SECRET_FILE}; echo hello > /data/file");
    let said = cluster.ok(&["exec", "own", "--", "sh", "-c", &script])?;
    ensure!(
        said.split_whitespace().collect::<Vec<_>>() == ["own", WORD.len().to_string().as_str()],
        "the driver was told {said:?}"
    );
    ensure!(
        mounts_with("kubernetes.io~csi/data")?.len() == 1,
        "the volume is no mount"
    );

    let claim = "persistentVolumeClaim: {claimName: shared}";
    for name in ["one", "two"] {
        cluster.apply_ok(&with_volume(name, claim))?;
        cluster.wait_ready("default", name)?;
    }
    cluster.ok(&["exec", "one", "--", "sh", "-c", "echo shared > /data/file"])?;
    let said = cluster.ok(&["exec", "two", "--", "cat", "/data/file"])?;
    ensure!(said.trim() == "shared", "the second pod reads {said:?}");
    ensure!(mounts_with("globalmount")?.len() == 1, "it is staged once");

    // Neither is needed for what runs.
    driver.kill();
    cluster.kill_agent()?;
    cluster.start_agent()?;
    cluster.wait("the volume to be there without its driver", LIMIT, |c| {
        let said = c.ok(&["exec", "own", "--", "cat", "/data/file"])?;
        Ok(said.trim() == "hello")
    })?;
    let own = cluster.get(&["pod", "own"])?;
    let restarts = own["status"]["containerStatuses"][0]["restartCount"].as_u64();
    ensure!(
        restarts.context("no status")? == 0,
        "its container was restarted"
    );

    cluster.ok(&["delete", "pod", "own", "--wait=false"])?;
    std::thread::sleep(Duration::from_secs(5));
    ensure!(
        !is_gone(cluster, "own")?,
        "the pod is gone while its volume is published"
    );
    cluster.wait("the pod's events to tell why it stays", LIMIT, |c| {
        let events = c.ok(&["get", "events"])?;
        Ok(events.contains("FailedKillPod") && events.contains("stays published"))
    })?;
    let mut driver = Driver::start(data.path())?;
    cluster.wait("the pod to go when its driver is back", LIMIT, |c| {
        is_gone(c, "own")
    })?;
    ensure!(
        mounts_with("kubernetes.io~csi/data")?.is_empty(),
        "its volume is still mounted"
    );
    ensure!(
        driver.volumes()? == [HANDLE],
        "the driver was not told: {:?}",
        driver.volumes()?
    );

    cluster.ok(&["delete", "pod", "one"])?;
    cluster.wait("the first user to go", LIMIT, |c| is_gone(c, "one"))?;
    ensure!(
        mounts_with("globalmount")?.len() == 1,
        "the second user has lost the stage"
    );
    let said = cluster.ok(&["exec", "two", "--", "cat", "/data/file"])?;
    ensure!(said.trim() == "shared", "the second pod reads {said:?}");
    cluster.ok(&["delete", "pod", "two"])?;
    cluster.wait("the last user to go", LIMIT, |c| is_gone(c, "two"))?;
    ensure!(
        mounts_with(KUBELET)?.is_empty(),
        "left: {:?}",
        mounts_with(KUBELET)?
    );
    let kept = std::fs::read_to_string(data.path().join(HANDLE).join("file"))?;
    ensure!(kept.trim() == "shared", "the volume has {kept:?}");
    driver.kill();
    Ok(())
}
