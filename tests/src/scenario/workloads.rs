//! Jobs (also those that fail as their policies say), DaemonSets and CronJobs from manifest to what they
//! leave behind; claims, and the directories that are theirs; the token that every pod gets.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::Value;

use super::life_cycle::host_pid;
use crate::cluster::{Cluster, NODE, is_ready};

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(120);
/// Where a pod finds its account's token.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Where class `local` makes its directories.
const LOCAL_VOLUMES: &str = "/var/lib/gantry/volumes";

const WORK: &str = r#"
apiVersion: batch/v1
kind: Job
metadata: {name: sum}
spec:
  completions: 2
  parallelism: 2
  completionMode: Indexed
  template:
    spec:
      restartPolicy: Never
      containers:
      - name: c
        image: gantry.local/busybox:debian
        imagePullPolicy: Never
        command: [sh, -c, 'echo index $JOB_COMPLETION_INDEX']
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: each}
spec:
  selector: {matchLabels: {app: each}}
  template:
    metadata: {labels: {app: each}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: c, image: "gantry.local/busybox:debian", imagePullPolicy: Never, command: [sleep, "3600"]}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: nightly}
spec:
  schedule: "0 3 * * *"
  timeZone: Europe/Berlin
  jobTemplate:
    spec:
      template:
        spec:
          restartPolicy: OnFailure
          containers: [{name: c, image: busybox, command: ["true"]}]
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  replicas: 1
  serviceName: db
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: gantry.local/busybox:debian
        imagePullPolicy: Never
        command: [sleep, "3600"]
        volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
  - metadata: {name: data}
    spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}
"#;

/// Jobs that end by what their policies say: index 0 of the first is given up at once, index 1 after a
/// second try; the second Job ends with its first pod.
const POLICIES: &str = r#"
apiVersion: batch/v1
kind: Job
metadata: {name: tries}
spec:
  completions: 3
  parallelism: 3
  completionMode: Indexed
  backoffLimitPerIndex: 1
  podFailurePolicy:
    rules:
    - {action: FailIndex, onExitCodes: {operator: In, values: [42]}}
  template:
    spec:
      restartPolicy: Never
      containers:
      - name: c
        image: gantry.local/busybox:debian
        imagePullPolicy: Never
        command: [sh, -c, 'case $JOB_COMPLETION_INDEX in 0) exit 42;; 1) exit 7;; esac']
---
apiVersion: batch/v1
kind: Job
metadata: {name: stops}
spec:
  completions: 9
  podFailurePolicy:
    rules:
    - {action: FailJob, onExitCodes: {containerName: c, operator: In, values: [3]}}
  template:
    spec:
      restartPolicy: Never
      containers:
      - name: c
        image: gantry.local/busybox:debian
        imagePullPolicy: Never
        command: [sh, -c, 'exit 3']
"#;

/// Failed Jobs with the reason and the numbers that their policies make.
fn policies(cluster: &Cluster) -> Result<()> {
    let failed_by = |name: &str, reason: &str| {
        let what = format!("Job {name} to fail by {reason}");
        cluster.wait(&what, PATIENCE, |cluster| {
            let job = cluster.get(&["job", name])?;
            let conditions = job["status"]["conditions"].as_array();
            let mut conditions = conditions.into_iter().flatten();
            Ok(conditions.any(|c| c["type"] == "Failed" && c["reason"] == reason))
        })
    };
    failed_by("stops", "PodFailurePolicy")?;
    let job = cluster.get(&["job", "stops"])?;
    ensure!(number(&job, "/status/failed") == 1, "{job}");
    failed_by("tries", "FailedIndexes")?;
    let job = cluster.get(&["job", "tries"])?;
    let status = &job["status"];
    let indexes = (&status["failedIndexes"], &status["completedIndexes"]);
    ensure!(indexes.0 == "0,1" && indexes.1 == "2", "{status}");
    ensure!(number(&job, "/status/failed") == 3, "{status}");
    Ok(())
}

fn number(object: &Value, pointer: &str) -> i64 {
    object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
}

/// What somebody made by hand, and claims of every kind.
fn storage(disk: &Path) -> String {
    let disk = disk.display();
    let claim = |name: &str, class: &str, mode: &str| {
        format!(
            "---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: {name}}}
spec: {{storageClassName: {class}, accessModes: [{mode}], resources: {{requests: {{storage: 1Mi}}}}}}
"
        )
    };
    format!(
        "apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: kept}}
provisioner: gantry.io/local
reclaimPolicy: Retain
volumeBindingMode: WaitForFirstConsumer
---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{name: manual}}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
---
apiVersion: v1
kind: PersistentVolume
metadata: {{name: elsewhere}}
spec:
  capacity: {{storage: 1Mi}}
  accessModes: [ReadWriteOnce]
  storageClassName: manual
  local: {{path: {disk}}}
  nodeAffinity: {{required: {{nodeSelectorTerms: [{{matchExpressions: [
    {{key: kubernetes.io/hostname, operator: In, values: [another]}}]}}]}}}}
---
apiVersion: v1
kind: PersistentVolume
metadata: {{name: here}}
spec:
  capacity: {{storage: 2Mi}}
  accessModes: [ReadWriteOnce]
  storageClassName: manual
  local: {{path: {disk}}}
  nodeAffinity: {{required: {{nodeSelectorTerms: [{{matchExpressions: [
    {{key: kubernetes.io/hostname, operator: In, values: [{NODE}]}}]}}]}}}}
{}{}{}",
        claim("by-hand", "manual", "ReadWriteOnce"),
        claim("archive", "kept", "ReadWriteOnce"),
        claim("mine", "local", "ReadWriteOncePod"),
    )
}

/// A pod with one volume on /data.
fn pod(name: &str, volume: &str) -> String {
    let more = format!(
        "      volumeMounts: [{{name: v, mountPath: /data}}]
  volumes:
    - {{name: v, {volume}}}
"
    );
    super::sleeper(name, &more) + "---\n"
}

fn of_claim(name: &str) -> String {
    format!("persistentVolumeClaim: {{claimName: {name}}}")
}

/// Pods for every kind of claim.
fn pods() -> String {
    let scratch = "ephemeral: {volumeClaimTemplate: {spec: {accessModes: [ReadWriteOnce], \
                   resources: {requests: {storage: 1Mi}}}}}";
    let silent = super::sleeper("silent", "")
        .replace("spec:\n", "spec:\n  automountServiceAccountToken: false\n");
    [
        silent + "---\n",
        pod("static", &of_claim("by-hand")),
        pod("archivist", &of_claim("archive")),
        pod("first", &of_claim("mine")),
        pod("scratch", scratch),
        pod("missing", &of_claim("nowhere")),
    ]
    .concat()
}

/// A Job ends, a DaemonSet is on the node, a CronJob waits; claims are mounted, kept and deleted.
pub(super) fn workloads(cluster: &mut Cluster) -> Result<()> {
    let disk = tempfile::tempdir()?;
    cluster.apply_ok(&storage(disk.path()))?;
    cluster.apply_ok(WORK)?;
    cluster.apply_ok(POLICIES)?;
    let early = cluster.get(&["pvc", "archive"])?;
    ensure!(
        early["spec"]["volumeName"].is_null(),
        "bound before a pod: {early}"
    );
    cluster.apply_ok(&pods())?;
    cluster.ok(&["rollout", "status", "ds/each", "--timeout=60s"])?;
    cluster.ok(&["rollout", "status", "sts/db", "--timeout=60s"])?;
    for name in ["static", "archivist", "first", "scratch", "silent"] {
        cluster.wait_ready("default", name)?;
    }
    // One pod at a time has `mine`, and a pod without its claim waits: both say so.
    cluster.apply_ok(&pod("second", &of_claim("mine")))?;
    waits(cluster, "second", "ReadWriteOncePod")?;
    waits(
        cluster,
        "missing",
        "persistentvolumeclaim \"nowhere\" not found",
    )?;
    mounts(cluster, disk.path())?;
    tokens(cluster)?;
    data_outlives_the_pod(cluster)?;
    cluster.wait("the Job is complete", PATIENCE, |cluster| {
        let job = cluster.get(&["job", "sum"])?;
        Ok(number(&job, "/status/succeeded") == 2 && job["status"]["completionTime"].is_string())
    })?;
    policies(cluster)?;
    let table = cluster.ok(&["get", "jobs,cronjobs,pvc"])?;
    for word in ["Complete", "2/2", "0 3 * * *", "Europe/Berlin", "Bound"] {
        ensure!(table.contains(word), "{word:?} is not in {table}");
    }
    claims_go_last(cluster)
}

/// The scheduler's reason is in the pod's condition.
fn waits(cluster: &Cluster, pod: &str, words: &str) -> Result<()> {
    let what = format!("pod {pod} to wait because of {words:?}");
    cluster.wait(&what, PATIENCE, |c| {
        let object = c.get(&["pod", pod])?;
        let conditions = object["status"]["conditions"].as_array();
        let mut messages = conditions.into_iter().flatten().map(|c| &c["message"]);
        Ok(messages.any(|m| m.as_str().is_some_and(|m| m.contains(words))))
    })
}

/// The volume of a claim.
fn volume_of(cluster: &Cluster, claim: &str) -> Result<String> {
    let claim = cluster.get(&["pvc", claim])?;
    ensure!(claim["status"]["phase"] == "Bound", "{claim}");
    let name = claim["spec"]["volumeName"].as_str();
    Ok(name.context("no volumeName")?.to_owned())
}

fn directory_of(cluster: &Cluster, claim: &str) -> Result<PathBuf> {
    Ok(Path::new(LOCAL_VOLUMES).join(volume_of(cluster, claim)?))
}

/// The kernel's own table: each container has its claim's directory on /data, writable.
fn mounts(cluster: &Cluster, disk: &Path) -> Result<()> {
    ensure!(
        volume_of(cluster, "by-hand")? == "here",
        "not the volume of this node"
    );
    let made =
        |claim: &str| -> Result<String> { Ok(format!("/volumes/{}", volume_of(cluster, claim)?)) };
    let last = disk.file_name().unwrap_or_default().to_string_lossy();
    for (pod, root) in [
        ("static", format!("/{last}")),
        ("archivist", made("archive")?),
        ("first", made("mine")?),
        ("scratch", made("scratch-v")?),
        ("db-0", made("data-db-0")?),
    ] {
        let pid = host_pid(cluster, pod, "main", 0)?;
        let table = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
        let mut lines = table
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>());
        let found = lines.find(|fields| fields.get(4) == Some(&"/data"));
        let found = found.with_context(|| format!("{pod}: nothing on /data: {table}"))?;
        let right = found[3].ends_with(&root) && found[5].starts_with("rw");
        ensure!(right, "{pod}: not {root}, writable: {found:?}");
        let write = ["exec", pod, "--", "sh", "-c", "echo kept > /data/word"];
        cluster.ok(&write)?;
    }
    let words = [disk.to_owned(), directory_of(cluster, "archive")?];
    for directory in words {
        let word = std::fs::read_to_string(directory.join("word"))?;
        ensure!(word == "kept\n", "{}: {word:?}", directory.display());
    }
    Ok(())
}

/// Three files on a read-only tmpfs; the token says who the pod is. A pod that wants none has none.
fn tokens(cluster: &Cluster) -> Result<()> {
    let pid = host_pid(cluster, "static", "main", 0)?;
    let table = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let at = |line: &&str| {
        line.split(' ')
            .nth(4)
            .is_some_and(|at| at.ends_with("/serviceaccount"))
    };
    let line = table.lines().find(at).context("no token is mounted")?;
    let read_only = line.split(' ').nth(5).is_some_and(|o| o.starts_with("ro"));
    ensure!(read_only && line.contains(" - tmpfs "), "{line}");
    let script =
        format!("cd {ACCOUNT} && stat -Lc '%n %a %u' ca.crt namespace token && cat namespace");
    let files = cluster.ok(&["exec", "static", "--", "sh", "-c", &script])?;
    let wanted = "ca.crt 644 0\nnamespace 644 0\ntoken 644 0\ndefault";
    ensure!(files.trim() == wanted, "{files}");
    let read =
        |file: &str| cluster.ok(&["exec", "static", "--", "cat", &format!("{ACCOUNT}/{file}")]);
    ensure!(read("ca.crt")?.starts_with("-----BEGIN CERTIFICATE-----"));
    let token = read("token")?;
    let part = token.split('.').nth(1).context("no JWT")?;
    let claims: Value = serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(part)?)?;
    ensure!(
        claims["sub"] == "system:serviceaccount:default:default",
        "{claims}"
    );
    let bound = claims["kubernetes.io"]["pod"]["name"].as_str();
    ensure!(bound == Some("static"), "{claims}");
    let none = cluster.gantry(&["exec", "silent", "--", "ls", ACCOUNT])?;
    ensure!(none.code != 0, "a pod that wants no token: {}", none.stdout);
    let silent = cluster.get(&["pod", "silent"])?;
    ensure!(silent["spec"]["volumes"].is_null(), "{silent}");
    Ok(())
}

/// The pod goes, its claim and the data stay, and it comes back under its name.
fn data_outlives_the_pod(cluster: &Cluster) -> Result<()> {
    let old = cluster.get(&["pod", "db-0"])?["metadata"]["uid"].clone();
    let volume = volume_of(cluster, "data-db-0")?;
    cluster.ok(&["delete", "pod", "db-0", "--timeout=60s"])?;
    cluster.wait("db-0 is back", PATIENCE, |cluster| {
        let found = cluster.gantry(&["get", "pod", "db-0", "-o", "json"])?;
        let pod: Value = serde_json::from_str(&found.stdout).unwrap_or_default();
        Ok(pod["metadata"]["uid"] != old && is_ready(&pod))
    })?;
    let read = cluster.ok(&["exec", "db-0", "--", "cat", "/data/word"])?;
    ensure!(read.trim() == "kept", "the claim lost its data: {read:?}");
    ensure!(volume_of(cluster, "data-db-0")? == volume, "another volume");
    Ok(())
}

fn is_gone(cluster: &Cluster, kind: &str, name: &str) -> Result<bool> {
    let found = cluster.gantry(&["get", kind, name])?;
    Ok(found.code != 0 && found.stderr.contains("not found"))
}

/// A claim stays while a pod has it. Then class local deletes its directory, class kept does not, and
/// an ephemeral volume's went with its pod.
fn claims_go_last(cluster: &Cluster) -> Result<()> {
    let (mine, archive) = (
        directory_of(cluster, "mine")?,
        directory_of(cluster, "archive")?,
    );
    let scratch = directory_of(cluster, "scratch-v")?;
    let (volume, kept) = (volume_of(cluster, "mine")?, volume_of(cluster, "archive")?);
    let claims = [
        "delete",
        "pvc",
        "mine",
        "archive",
        "by-hand",
        "--wait=false",
    ];
    cluster.ok(&claims)?;
    std::thread::sleep(Duration::from_millis(300));
    let claim = cluster.get(&["pvc", "mine"])?;
    let finalizers = claim["metadata"]["finalizers"].to_string();
    ensure!(
        claim["metadata"]["deletionTimestamp"].is_string()
            && finalizers.contains("kubernetes.io/pvc-protection")
            && mine.join("word").exists(),
        "a claim that a pod has: {claim}"
    );
    cluster.ok(&["delete", "pod", "--all", "--timeout=60s"])?;
    for name in ["mine", "archive", "by-hand", "scratch-v"] {
        let what = format!("claim {name} to go");
        cluster.wait(&what, PATIENCE, |c| is_gone(c, "pvc", name))?;
    }
    let gone = |c: &Cluster| Ok(is_gone(c, "pv", &volume)? && !mine.exists() && !scratch.exists());
    cluster.wait("the directories of class local to go", PATIENCE, gone)?;
    cluster.wait("the kept volume to be Released", PATIENCE, |c| {
        Ok(c.get(&["pv", &kept])?["status"]["phase"] == "Released")
    })?;
    let word = std::fs::read_to_string(archive.join("word"))?;
    ensure!(word == "kept\n", "class kept lost its data: {word:?}");
    Ok(())
}
