//! Volumes as the kernel shows them: mounts, owners, limits, updates, and what is left afterwards.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;

use crate::cluster::Cluster;

/// Bytes that must be in one place only: on tmpfs.
const SECRET: &str = "open-sesame-4711";
/// An API write shows in a mounted ConfigMap within this.
const UPDATE: Duration = Duration::from_secs(10);

/// A directory of the host that is a shared mount of its own, with a mount below.
struct HostDirectory(tempfile::TempDir);

impl HostDirectory {
    fn new() -> Result<Self> {
        let this = Self(tempfile::tempdir()?);
        mount_tmpfs(this.path())?;
        let none: Option<&str> = None;
        mount(none, this.path(), none, MsFlags::MS_SHARED, none)?;
        std::fs::create_dir(this.path().join("below"))?;
        mount_tmpfs(&this.path().join("below"))?;
        std::fs::write(this.path().join("file"), "the host's")?;
        Ok(this)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for HostDirectory {
    fn drop(&mut self) {
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
    }
}

fn mount_tmpfs(path: &Path) -> Result<()> {
    let none: Option<&str> = None;
    mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), none)
        .with_context(|| format!("mount a tmpfs on {}", path.display()))
}

/// A file tells two keys of one ConfigMap from two versions of it: the reader prints MIX.
const READER: &str = "while true; do d=$(readlink /settings/..data); \
    a=$(cat /settings/$d/a 2>/dev/null); b=$(cat /settings/$d/b 2>/dev/null); \
    test -n \"$a\" -a -n \"$b\" -a \"$a\" != \"$b\" && echo MIX $a $b; sleep 0.01; done";

fn settings(value: u32) -> String {
    format!(
        "apiVersion: v1
kind: ConfigMap
metadata: {{name: settings}}
data: {{a: \"{value}\", b: \"{value}\"}}
"
    )
}

fn everything(host: &Path, color: &str) -> String {
    let host = host.display();
    format!(
        "apiVersion: v1
kind: Secret
metadata: {{name: pass}}
stringData: {{word: {SECRET}}}
---
apiVersion: v1
kind: Pod
metadata:
  name: all
  labels: {{color: {color}}}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {{fsGroup: 4711}}
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", '{READER}']
      env:
        - {{name: POD, valueFrom: {{fieldRef: {{fieldPath: metadata.name}}}}}}
        - {{name: WORD, valueFrom: {{secretKeyRef: {{name: pass, key: word}}}}}}
      volumeMounts:
        - {{name: disk, mountPath: /disk}}
        - {{name: disk, mountPath: /part, subPathExpr: $(POD)/deep}}
        - {{name: memory, mountPath: /memory}}
        - {{name: settings, mountPath: /settings}}
        - {{name: settings, mountPath: /single, subPath: a}}
        - {{name: pass, mountPath: /pass}}
        - {{name: host, mountPath: /ro, readOnly: true, recursiveReadOnly: Enabled}}
        - {{name: host, mountPath: /follow, mountPropagation: HostToContainer}}
        - {{name: files, mountPath: /files}}
        - {{name: about, mountPath: /about}}
  volumes:
    - {{name: disk, emptyDir: {{}}}}
    - {{name: memory, emptyDir: {{medium: Memory, sizeLimit: 8Mi}}}}
    - {{name: settings, configMap: {{name: settings}}}}
    - {{name: pass, secret: {{secretName: pass, defaultMode: 0400}}}}
    - {{name: host, hostPath: {{path: {host}, type: Directory}}}}
    - {{name: files, image: {{reference: \"gantry.local/busybox:debian\", pullPolicy: IfNotPresent}}}}
    - name: about
      downwardAPI:
        items: [{{path: color, fieldRef: {{fieldPath: \"metadata.labels['color']\"}}}}]
"
    )
}

fn one_volume(name: &str, source: &str, command: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"{command}\"]
      volumeMounts: [{{name: v, mountPath: /v}}]
  volumes: [{{name: v, {source}}}]
"
    )
}

/// Every kind of volume that needs no control plane object of its own, in one pod; its neighbours
/// are over a limit or ask for what is not there.
pub(super) fn volumes(cluster: &mut Cluster) -> Result<()> {
    let host = HostDirectory::new()?;
    cluster.apply_ok(&settings(0))?;
    cluster.apply_ok(&everything(host.path(), "red"))?;
    let fill = "dd if=/dev/zero of=/v/big bs=1M count=3; sleep 3600";
    cluster.apply_ok(&one_volume("greedy", "emptyDir: {sizeLimit: 1Mi}", fill))?;
    let path = host.path().display();
    let socket = format!("hostPath: {{path: {path}, type: Socket}}");
    cluster.apply_ok(&one_volume("no-socket", &socket, "sleep 3600"))?;
    let vanished = format!("hostPath: {{path: {path}/vanished}}");
    cluster.apply_ok(&one_volume("vanished", &vanished, "sleep 3600"))?;
    cluster.wait_ready("default", "all")?;
    mounts_are_as_asked(cluster)?;
    host_mounts_follow(cluster, host.path())?;
    mounts_reach_the_host(cluster, host.path())?;
    updates_are_whole(cluster)?;
    cluster.apply_ok(&everything(host.path(), "blue"))?;
    cluster.wait("the label to follow", Duration::from_secs(30), |c| {
        Ok(sh(c, "cat /about/color")? == "blue")
    })?;
    secret_is_on_no_disk(cluster)?;
    says(cluster, "no-socket", "is not a socket")?;
    says(cluster, "vanished", "does not exist on this node")?;
    cluster.wait_phase("default", "greedy", "Failed")?;
    let greedy = cluster.get(&["pod", "greedy"])?;
    let status = &greedy["status"];
    ensure!(
        status["reason"] == "Evicted"
            && status["message"] == "Usage of EmptyDir volume \"v\" exceeds the limit \"1Mi\".",
        "{status}"
    );
    cluster.ok(&["delete", "pod", "--all", "--timeout=30s"])?;
    nothing_is_left(host.path())
}

/// Runs a shell in the pod.
fn sh(cluster: &Cluster, script: &str) -> Result<String> {
    let output = cluster.ok(&["exec", "all", "--", "sh", "-c", script])?;
    Ok(output.trim().to_owned())
}

fn mounts_are_as_asked(cluster: &Cluster) -> Result<()> {
    let table = sh(cluster, "cat /proc/self/mountinfo")?;
    let line = |at: &str| {
        let mut lines = table.lines().rev();
        let found = lines.find(|line| line.split(' ').nth(4) == Some(at));
        found.with_context(|| format!("nothing is mounted on {at}: {table}"))
    };
    let read_only = |at: &str| -> Result<bool> {
        let options = line(at)?.split(' ').nth(5).unwrap_or_default();
        Ok(options.split(',').any(|option| option == "ro"))
    };
    for (at, wanted) in [
        ("/disk", false),
        ("/memory", false),
        ("/settings", true),
        ("/pass", true),
        ("/ro", true),
        ("/ro/below", true),
        ("/follow/below", false),
        ("/files", true),
    ] {
        ensure!(
            read_only(at)? == wanted,
            "read-only {}: {}",
            !wanted,
            line(at)?
        );
    }
    ensure!(
        line("/memory")?.contains("size=8192k"),
        "{}",
        line("/memory")?
    );
    ensure!(line("/pass")?.contains(" - tmpfs "), "{}", line("/pass")?);
    ensure!(line("/files")?.contains("noexec"), "{}", line("/files")?);
    ensure!(
        sh(cluster, "ls /files/bin | wc -l")? != "0",
        "the image volume is empty"
    );
    // The group owns what it shares, and what is made inside.
    let stat = "touch /disk/new /part/new; stat -c '%g %a' /disk /memory /pass/..data/word; \
                stat -c %g /disk/new /disk/all/deep/new";
    let owners = sh(cluster, stat)?;
    ensure!(
        owners == "4711 2777\n4711 2777\n4711 440\n4711\n4711",
        "groups and modes: {owners}"
    );
    ensure!(
        sh(cluster, "id -G")?.contains("4711"),
        "fsGroup is no group of the process"
    );
    ensure!(
        sh(cluster, "cat /pass/word; echo $WORD")?.contains(SECRET),
        "no secret"
    );
    Ok(())
}

/// HostToContainer: what the host mounts later is seen.
fn host_mounts_follow(cluster: &Cluster, host: &Path) -> Result<()> {
    let later = host.join("later");
    std::fs::create_dir(&later)?;
    mount_tmpfs(&later)?;
    std::fs::write(later.join("file"), "later")?;
    ensure!(
        sh(cluster, "cat /follow/later/file")? == "later",
        "/follow did not follow"
    );
    Ok(())
}

/// Bidirectional, for privileged containers: what one mounts, the host and other pods have too.
fn mounts_reach_the_host(cluster: &Cluster, host: &Path) -> Result<()> {
    let source = format!("hostPath: {{path: {}}}", host.display());
    let pod = one_volume("mounter", &source, "sleep 3600").replace(
        "volumeMounts: [{name: v, mountPath: /v}]",
        "volumeMounts: [{name: v, mountPath: /v, mountPropagation: Bidirectional}]
      securityContext: {privileged: true}",
    );
    cluster.apply_ok(&pod)?;
    cluster.wait_ready("default", "mounter")?;
    let script = "mkdir /v/made && mount -t tmpfs made /v/made && echo made > /v/made/file";
    cluster.ok(&["exec", "mounter", "--", "sh", "-c", script])?;
    let seen = std::fs::read_to_string(host.join("made/file"));
    ensure!(
        seen.as_ref().is_ok_and(|text| text == "made\n"),
        "the host sees {seen:?}"
    );
    let seen = sh(cluster, "cat /follow/made/file")?;
    ensure!(seen == "made", "another pod sees {seen:?}");
    umount2(&host.join("made"), MntFlags::empty()).context("unmount what the pod has mounted")?;
    Ok(())
}

/// New content within ten seconds, never half of it, and not where a part is mounted.
fn updates_are_whole(cluster: &Cluster) -> Result<()> {
    let pod = cluster.get(&["pod", "all"])?;
    let uid = pod["metadata"]["uid"].as_str().context("no uid")?;
    // Looked at from the host: an exec may take seconds on a busy machine.
    let files = PathBuf::from(format!("/var/lib/gantry/pods/{uid}/volumes"));
    let files = files.join("kubernetes.io~configmap/settings");
    for value in 1..=5 {
        cluster.apply_ok(&settings(value))?;
        cluster.wait("the mounted ConfigMap to follow", UPDATE, |_| {
            Ok(std::fs::read_to_string(files.join("a"))? == value.to_string())
        })?;
        let seen = sh(cluster, "cat /settings/a /settings/b")?;
        ensure!(
            seen == format!("{value}{value}"),
            "the container sees {seen}"
        );
    }
    let log = cluster.ok(&["logs", "all"])?;
    ensure!(!log.contains("MIX"), "a reader saw two versions: {log}");
    ensure!(
        sh(cluster, "cat /single")? == "0",
        "a subPath mount was updated"
    );
    Ok(())
}

/// Neither the agent's logs nor its files on disk hold the secret's bytes, plain or in base64.
fn secret_is_on_no_disk(cluster: &Cluster) -> Result<()> {
    let encoded = cluster.get(&["secret", "pass"])?["data"]["word"].clone();
    let encoded = encoded.as_str().context("no data")?.to_owned();
    let holds = |bytes: &[u8]| {
        [SECRET, &encoded].iter().any(|text| {
            let text = text.as_bytes();
            bytes.windows(text.len()).any(|window| window == text)
        })
    };
    ensure!(
        !holds(&cluster.log("gantry-agent")?),
        "the agent has logged a secret"
    );
    let mut searched = 0;
    for root in ["/var/lib/gantry", "/var/log/pods"] {
        let device = std::fs::metadata(root)?.dev();
        let mut directories = vec![PathBuf::from(root)];
        while let Some(directory) = directories.pop() {
            // The image store holds no state of ours, and is large.
            if directory.ends_with("gantry/images") {
                continue;
            }
            for entry in std::fs::read_dir(&directory)
                .into_iter()
                .flatten()
                .flatten()
            {
                let meta = entry.metadata()?;
                if meta.is_dir() && meta.dev() == device {
                    directories.push(entry.path());
                } else if meta.is_file() && meta.len() < 64 << 20 {
                    searched += 1;
                    let path = entry.path();
                    ensure!(
                        !holds(&std::fs::read(&path)?),
                        "{} holds a secret",
                        path.display()
                    );
                }
            }
        }
    }
    ensure!(searched > 3, "only {searched} files were found to search");
    Ok(())
}

/// The pod waits, and says why.
fn says(cluster: &Cluster, pod: &str, words: &str) -> Result<()> {
    cluster.wait(
        &format!("pod {pod} to say {words:?}"),
        Duration::from_secs(30),
        |c| {
            let message = |object: &Value| object["status"]["message"].as_str().map(str::to_owned);
            let said = message(&c.get(&["pod", pod])?);
            Ok(said.is_some_and(|said| said.contains(words)))
        },
    )
}

/// Every mount of the pods is gone; the host's files and mounts are not.
fn nothing_is_left(host: &Path) -> Result<()> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points: Vec<&str> = table.lines().filter_map(|l| l.split(' ').nth(4)).collect();
    let left: Vec<_> = points
        .iter()
        .filter(|p| p.starts_with("/var/lib/gantry/pods/"))
        .collect();
    ensure!(left.is_empty(), "still mounted: {left:?}");
    for place in ["below", "later"] {
        let place = host.join(place);
        let mounted = points.iter().any(|p| Path::new(p) == place);
        ensure!(mounted, "{} was unmounted with the pod", place.display());
    }
    let file = std::fs::read_to_string(host.join("file"))?;
    ensure!(file == "the host's", "the host's file: {file:?}");
    Ok(())
}
