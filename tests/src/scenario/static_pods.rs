//! Static pods: with the control plane dead, in the API when it is back, and untouched by it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::sleeper;
use crate::cluster::{Cluster, NODE};

const DIRECTORY: &str = "/etc/gantry/manifests";
const LIMIT: Duration = Duration::from_secs(120);

fn manifest(word: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: hello}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: Never
      command: [\"sh\", \"-c\", \"echo {word}; exec sleep 3600\"]
"
    )
}

/// Removes the directory when the scenario has ended, whatever its end.
struct Manifests;

impl Manifests {
    fn write(&self, name: &str, text: &str) -> Result<()> {
        std::fs::create_dir_all(DIRECTORY)?;
        // As an editor does: the file is there as a whole or not at all.
        let new = Path::new(DIRECTORY).join(".new");
        std::fs::write(&new, text)?;
        Ok(std::fs::rename(new, Path::new(DIRECTORY).join(name))?)
    }
}

impl Drop for Manifests {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(DIRECTORY);
    }
}

/// Logs of the static pod on this machine.
fn logs() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/var/log/pods").into_iter().flatten();
    let ours = format!("default_hello-{NODE}_");
    let ours = entries
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with(&ours));
    ours.map(|e| e.path().join("main/0.log")).collect()
}

fn has_said(word: &str) -> bool {
    let mut texts = logs()
        .into_iter()
        .filter_map(|path| std::fs::read_to_string(path).ok());
    texts.any(|text| text.contains(word))
}

/// What the API shows of it, if it does, and if its status has arrived.
fn shown(cluster: &Cluster) -> Option<Value> {
    let name = format!("hello-{NODE}");
    let pod = cluster.get(&["pod", &name]).ok()?;
    let is_whole =
        pod["status"]["phase"] == "Running" && pod["metadata"]["deletionTimestamp"].is_null();
    is_whole.then_some(pod)
}

fn started(pod: &Value) -> &Value {
    &pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
}

/// Runs on a node that has never met a control plane, is shown, survives deletion by the API,
/// follows its file, and goes with it.
pub(super) fn static_pods(cluster: &mut Cluster) -> Result<()> {
    let manifests = Manifests;
    cluster.kill_control()?;
    cluster.kill_agent()?;
    // As on a fresh machine: nothing was ever heard of a control plane.
    std::fs::remove_dir_all("/var/lib/gantry/feed")?;
    manifests.write("hello.yaml", &manifest("first"))?;
    manifests.write("bad.yaml", "kind: Pod\nmetadata: [")?;
    let secret = "  volumes: [{name: s, secret: {secretName: s}}]\n";
    let refused = manifest("refused").replace("name: hello", "name: refused") + secret;
    manifests.write("refused.yaml", &refused)?;
    cluster.start_agent()?;
    cluster.wait("the static pod to run", LIMIT, |_| Ok(has_said("first")))?;
    let log = String::from_utf8_lossy(&cluster.log("gantry-agent")?).into_owned();
    for words in [
        "bad.yaml: error parsing /etc/gantry/manifests/bad.yaml: line 2",
        "refused.yaml: line 11: spec.volumes[0].secret: a static pod cannot refer to an object of the API",
    ] {
        ensure!(log.contains(words), "no {words:?} in the agent's log");
    }

    cluster.start_control()?;
    cluster.wait("the mirror pod", LIMIT, |c| Ok(shown(c).is_some()))?;
    let before = shown(cluster).context("the mirror pod went")?;
    let name = format!("hello-{NODE}");
    let said = cluster.ok(&["logs", &name])?;
    ensure!(said == "first\n", "logs of the mirror pod: {said:?}");
    let inside = cluster.ok(&["exec", &name, "--", "cat", "/etc/hostname"])?;
    ensure!(
        inside.trim() == name,
        "hostname of the static pod: {inside:?}"
    );
    cluster.wait("an event about the bad file", LIMIT, |c| {
        Ok(c.ok(&["get", "events"])?.contains("InvalidStaticManifest"))
    })?;
    let annotations = &before["metadata"]["annotations"];
    let uid = annotations["kubernetes.io/config.mirror"].as_str();
    ensure!(
        uid.is_some_and(|uid| logs()
            .iter()
            .any(|path| path.to_string_lossy().contains(uid))),
        "the mirror does not name the static pod: {annotations}"
    );
    let fake = sleeper("fake", "")
        .replace(
            "  name: fake",
            "  name: fake\n  annotations: {kubernetes.io/config.mirror: x}",
        )
        .replace("spec:\n", &format!("spec:\n  nodeName: {NODE}\n"));
    let fake = cluster.apply(&fake)?;
    ensure!(
        fake.code != 0 && fake.stderr.contains("only a node makes mirror pods"),
        "a user made a mirror pod: {fake:?}"
    );

    cluster.ok(&["delete", "pod", &name, "--wait=false"])?;
    cluster.wait("another mirror pod", LIMIT, |c| {
        Ok(shown(c).is_some_and(|now| now["metadata"]["uid"] != before["metadata"]["uid"]))
    })?;
    let now = shown(cluster).context("the mirror pod went")?;
    ensure!(
        started(&now) == started(&before) && started(&now).is_string(),
        "the deletion of the mirror has touched the pod: {before} {now}"
    );
    cluster.kill_agent()?;
    cluster.start_agent()?;

    manifests.write("hello.yaml", &manifest("second"))?;
    cluster.wait("the changed pod to run", LIMIT, |c| {
        let now = shown(c);
        Ok(has_said("second") && now.is_some_and(|now| started(&now) != started(&before)))
    })?;
    manifests.write("hello.yaml", "kind: Pod\nnonsense")?;
    cluster.wait("the broken file to be told", LIMIT, |c| {
        let log = c.log("gantry-agent")?;
        Ok(String::from_utf8_lossy(&log)
            .contains("static manifest /etc/gantry/manifests/hello.yaml"))
    })?;
    ensure!(has_said("second"), "a broken file has ended its pod");
    std::fs::remove_file(Path::new(DIRECTORY).join("hello.yaml"))?;
    cluster.wait("pod and mirror to go", LIMIT, |c| {
        let gone = c.gantry(&["get", "pod", &name])?.code != 0;
        Ok(gone && logs().is_empty())
    })
}
