//! Volumes of an NFS server: mounted by the kernel alone, shared, refused in words, and given up when the
//! server is dead.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Skipped, sleeper, with_volume};
use crate::cluster::Cluster;
use crate::nfs_server::{self, NfsServer};

const LIMIT: Duration = Duration::from_secs(120);
/// A dead server is waited for a few seconds, an unmount for 30.
const DEAD: Duration = Duration::from_secs(90);

const CLAIM: &str = "apiVersion: v1
kind: PersistentVolume
metadata: {name: shared}
spec:
  accessModes: [ReadWriteMany]
  capacity: {storage: 1Gi}
  storageClassName: by-hand
  mountOptions: [nfsvers=4.1, noatime]
  nfs: {server: 127.0.0.1, path: /}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: shared}
spec:
  accessModes: [ReadWriteMany]
  storageClassName: by-hand
  resources: {requests: {storage: 1Gi}}
";

/// The options of every NFS mount on this node, as the kernel has them.
fn mounts() -> Result<Vec<String>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let of_nfs = table.lines().filter(|line| line.contains(" - nfs4 "));
    Ok(of_nfs.map(str::to_owned).collect())
}

/// What a pod writes is on the server and in the other's volume; a server that has died holds up
/// neither the pod's end nor its neighbours.
pub(super) fn nfs(cluster: &mut Cluster) -> Result<()> {
    if let Err(words) = nfs_server::is_possible() {
        return Err(Skipped(words).into());
    }
    let directory = tempfile::tempdir()?;
    let server = NfsServer::start(directory.path())?;
    cluster.apply_ok(CLAIM)?;
    cluster.apply_ok(&with_volume("writer", "nfs: {server: 127.0.0.1, path: /}"))?;
    cluster.wait_ready("default", "writer")?;
    cluster.ok(&[
        "exec",
        "writer",
        "--",
        "sh",
        "-c",
        "echo hello > /data/file",
    ])?;
    let written = std::fs::read_to_string(directory.path().join("file"));
    ensure!(
        written.as_ref().is_ok_and(|text| text == "hello\n"),
        "the server has {written:?}"
    );
    readers(cluster)?;
    refused(cluster)?;
    cluster.apply_ok(&sleeper("neighbour", ""))?;
    cluster.wait_ready("default", "neighbour")?;
    dies(cluster, &server)?;
    drop(server);
    ensure!(
        Path::new(directory.path()).join("file").exists(),
        "a file was lost"
    );
    Ok(())
}

/// Two more users of the export: by a claim with options of its own, and for reading only.
fn readers(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(&with_volume(
        "claimed",
        "persistentVolumeClaim: {claimName: shared}",
    ))?;
    let read_only = "nfs: {server: 127.0.0.1, path: /, readOnly: true}";
    cluster.apply_ok(&with_volume("reader", read_only))?;
    for name in ["claimed", "reader"] {
        cluster.wait_ready("default", name)?;
        let said = cluster.ok(&["exec", name, "--", "cat", "/data/file"])?;
        ensure!(said == "hello\n", "{name} reads {said:?}");
    }
    let mounts = mounts()?;
    let claimed = mounts.iter().filter(|line| line.contains("vers=4.1"));
    ensure!(claimed.count() == 1, "mountOptions: {mounts:#?}");
    let write = ["exec", "reader", "--", "sh", "-c", "echo no > /data/file"];
    let refused = cluster.gantry(&write)?;
    let words = refused.stdout + &refused.stderr;
    ensure!(words.contains("Read-only file system"), "{words:?}");
    Ok(())
}

/// What the server does not have, and a server that nobody knows: the pod is told.
fn refused(cluster: &mut Cluster) -> Result<()> {
    let wrong = [
        (
            "absent",
            "nfs: {server: 127.0.0.1, path: /absent}",
            "no such export",
        ),
        (
            "nobody",
            "nfs: {server: nobody.invalid, path: /}",
            "nfs nobody.invalid:/: its name",
        ),
    ];
    for (name, volume, _) in wrong {
        cluster.apply_ok(&with_volume(name, volume))?;
    }
    for (name, _, words) in wrong {
        cluster.wait(&format!("{name} to be told {words:?}"), LIMIT, |c| {
            let events = c.ok(&["get", "events"])?;
            Ok(events.contains("FailedMount") && events.contains(words))
        })?;
        cluster.ok(&["delete", "pod", name])?;
    }
    Ok(())
}

/// The server ends while three pods have its files.
fn dies(cluster: &mut Cluster, server: &NfsServer) -> Result<()> {
    server.stop()?;
    let began = Instant::now();
    for name in ["writer", "claimed", "reader"] {
        cluster.ok(&["delete", "pod", name, "--wait=false"])?;
    }
    let said = cluster.ok(&["exec", "neighbour", "--", "echo", "here"])?;
    ensure!(said == "here\n", "its neighbour says {said:?}");
    cluster.wait("the pods of a dead server to be gone", DEAD, |c| {
        let pods = c.ok(&["get", "pods"])?;
        Ok(["writer", "claimed", "reader"]
            .iter()
            .all(|name| !pods.contains(name)))
    })?;
    let left = mounts()?;
    ensure!(left.is_empty(), "still mounted: {left:#?}");
    let neighbour = cluster.get(&["pod", "neighbour"])?;
    let restarts = neighbour["status"]["containerStatuses"][0]["restartCount"].as_u64();
    ensure!(
        restarts.context("no status")? == 0,
        "its neighbour was restarted"
    );
    eprintln!(
        "pods of a dead server were gone after {} s",
        began.elapsed().as_secs()
    );
    Ok(())
}
