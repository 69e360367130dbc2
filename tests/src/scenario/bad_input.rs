//! Wrong input gets a clear answer and loses nothing.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::sleeper;
use crate::cluster::Cluster;

/// Every wrong input gets a clear answer and loses nothing.
pub(super) fn bad_input(cluster: &mut Cluster) -> Result<()> {
    let refused = |manifest: &str, words: &[&str]| -> Result<()> {
        let output = cluster.apply(manifest)?;
        ensure!(output.code == 1, "taken: {manifest}\n{}", output.stdout);
        for word in words {
            ensure!(
                output.stderr.contains(word),
                "no {word:?} in: {}",
                output.stderr
            );
        }
        Ok(())
    };
    refused(
        "apiVersion: v1\nkind: Pod\nmetadata:\n\tname: x\n",
        &["tab", "line 4"],
    )?;
    refused(
        "apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: rs}
spec:
  replicas: 1
  selector: {matchLabels: {app: a}}
  template:
    metadata: {labels: {app: b}}
    spec: {containers: [{name: c, image: busybox}]}
",
        &["spec.template.metadata.labels", "selector"],
    )?;
    refused(
        "apiVersion: v1
kind: Pod
metadata: {name: typo}
spec:
  containers:
    - name: main
      image: busybox
      imagePullPolice: Never
",
        &["spec.containers[0].imagePullPolice"],
    )?;
    refused(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: Upper}\nspec: {containers: [{name: a, image: b}]}\n",
        &["metadata.name"],
    )?;
    cluster.apply_ok(&sleeper(
        "waiting",
        "      volumeMounts: [{name: page, mountPath: /page}]
  volumes:
    - name: page
      configMap: {name: not-there}
",
    ))?;
    cluster.apply_ok(
        "apiVersion: v1
kind: Pod
metadata: {name: no-image}
spec:
  containers:
    - name: main
      image: gantry.local/nothing:here
      imagePullPolicy: Never
",
    )?;
    cluster.wait(
        "the missing ConfigMap in describe",
        Duration::from_secs(20),
        |c| Ok(c.ok(&["describe", "pod", "waiting"])?.contains("not-there")),
    )?;
    cluster.wait("ErrImageNeverPull", Duration::from_secs(20), |c| {
        Ok(c.ok(&["get", "pod", "no-image"])?
            .contains("ErrImageNeverPull"))
    })?;
    // The pod goes on as soon as what it waits for is there.
    cluster
        .apply_ok("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: not-there}\ndata: {a: b}\n")?;
    cluster.wait_ready("default", "waiting")?;
    ensure!(cluster.ok(&["exec", "waiting", "--", "cat", "/page/a"])? == "b");
    let output = cluster.gantry(&["get", "pod", "nobody"])?;
    ensure!(
        output.code == 1 && output.stderr.contains("pods \"nobody\" not found"),
        "{output:?}"
    );
    Ok(())
}
