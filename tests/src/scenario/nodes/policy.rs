//! NetworkPolicies between pods of different nodes.

use anyhow::Result;

use super::{LIMIT, delete, pod_ip, server};
use crate::machines::Nodes;

const POLICY: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db}
spec:
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress]
  ingress:
    - from: [{podSelector: {matchLabels: {app: web}}}]
      ports: [{port: 8080}]
";

/// Only who is allowed reaches a pod of another node; without the policy everybody does again.
pub(super) fn policy(nodes: &mut Nodes) -> Result<()> {
    let cluster = &nodes.cluster;
    let pods = [
        server("db", 2, "db"),
        server("web", 3, "web"),
        server("other", 3, "other"),
        server("near", 2, "other"),
    ];
    cluster.apply_ok(&pods.concat())?;
    for pod in ["db", "web", "other", "near"] {
        cluster.wait_ready("default", pod)?;
    }
    let db = pod_ip(cluster, "default", "db")?;
    let reaches = |pod: &str| {
        let script = format!("timeout 4 wget -q -O - http://{db}:8080/ || true");
        let said = cluster.ok(&["exec", pod, "--", "sh", "-c", &script]);
        said.map(|said| said.trim() == "db")
    };
    let all_are = |wanted: [bool; 3], what: &str| {
        cluster.wait(what, LIMIT, |_| {
            let now = [reaches("web")?, reaches("other")?, reaches("near")?];
            anyhow::ensure!(now == wanted, "web, other and near reach it: {now:?}");
            Ok(true)
        })
    };
    all_are([true; 3], "everybody to reach the pod")?;
    cluster.apply_ok(POLICY)?;
    all_are([true, false, false], "only web to reach the pod")?;
    delete(cluster, "networkpolicy", &["db"])?;
    all_are([true; 3], "everybody to reach the pod again")?;
    delete(cluster, "pod", &["db", "web", "other", "near"])
}
