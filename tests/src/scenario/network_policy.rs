//! NetworkPolicies: who reaches whom.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::cluster::Cluster;

/// Longer than a policy takes to reach the node, on a machine that has other things to do.
const SOON: Duration = Duration::from_secs(30);

/// A server with readiness probe, two clients with labels, one in a namespace of its own.
const PODS: &str = "apiVersion: v1
kind: Namespace
metadata: {name: other, labels: {team: other}}
---
apiVersion: v1
kind: Pod
metadata: {name: db, labels: {app: db}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sh, -c, \"httpd -p 8081 -h /etc; exec httpd -f -p 8080 -h /etc\"]
      ports: [{name: sql, containerPort: 8080}]
      readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {selector: {app: db}, ports: [{port: 80, targetPort: sql}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sleep, \"3600\"]
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: other, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sleep, \"3600\"]
";

/// A policy of the pods `app`, with more of its spec.
fn policy(app: &str, more: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {app}}}
spec:
  podSelector: {{matchLabels: {{app: {app}}}}}
{more}"
    )
}

/// One HTTP request out of a pod.
fn fetch(cluster: &Cluster, namespace: &str, url: &str) -> Result<bool> {
    let command = [
        "-n",
        namespace,
        "exec",
        "web",
        "--",
        // busybox's wget dies of its own `-T`.
        "timeout",
        "1",
        "wget",
        "-q",
        "-O",
        "/dev/null",
    ];
    let output = cluster.gantry(&[&command[..], &[url]].concat())?;
    Ok(output.code == 0)
}

/// Until the pod of a namespace reaches `url`, or no longer does.
fn reaches(cluster: &Cluster, namespace: &str, url: &str, wanted: bool) -> Result<()> {
    let start = Instant::now();
    while fetch(cluster, namespace, url)? != wanted {
        let seconds = SOON.as_secs();
        ensure!(
            start.elapsed() < SOON,
            "after {seconds} s: web in {namespace} to {url} is not {wanted}"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// Default deny, allow by label, namespace and named port, egress with DNS; over a restart of the
/// agent, and gone with the policies.
pub(super) fn network_policy(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(PODS)?;
    for (namespace, pod) in [("default", "db"), ("default", "web"), ("other", "web")] {
        cluster.wait_ready(namespace, pod)?;
    }
    let object = cluster.get(&["pod", "db"])?;
    let address = object["status"]["podIP"].as_str().unwrap_or_default();
    let (sql, admin) = (
        format!("http://{address}:8080/hostname"),
        format!("http://{address}:8081/hostname"),
    );
    let (own, other, by_name) = ("default", "other", "http://db.default/hostname");
    for namespace in [own, other] {
        reaches(cluster, namespace, &sql, true)?;
        reaches(cluster, namespace, by_name, true)?;
    }
    cluster.apply_ok(&policy("db", "  policyTypes: [Ingress]\n"))?;
    for namespace in [own, other] {
        reaches(cluster, namespace, &sql, false)?;
        reaches(cluster, namespace, by_name, false)?;
    }
    cluster.kill_agent()?;
    ensure!(
        !fetch(cluster, own, &sql).unwrap_or(false),
        "open while the agent is dead"
    );
    cluster.start_agent()?;
    // The node probes it all the same.
    cluster.wait_ready(own, "db")?;
    reaches(cluster, own, &sql, false)?;

    let from_web = "  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: sql}]
";
    cluster.apply_ok(&policy("db", from_web))?;
    reaches(cluster, own, &sql, true)?;
    reaches(cluster, own, by_name, true)?;
    reaches(cluster, own, &admin, false)?;
    reaches(cluster, other, &sql, false)?;
    let from_other = "  ingress:
  - from: [{namespaceSelector: {matchLabels: {team: other}}, podSelector: {matchLabels: {app: web}}}]
    ports: [{port: 8000, endPort: 8100}]
";
    cluster.apply_ok(&policy("db", from_other))?;
    reaches(cluster, other, &admin, true)?;
    reaches(cluster, own, &sql, false)?;
    // Labels of pods and of namespaces decide, as they are now.
    cluster.apply_ok(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: other, labels: {team: none}}\n",
    )?;
    reaches(cluster, other, &admin, false)?;
    cluster.ok(&["delete", "networkpolicy", "db"])?;
    reaches(cluster, own, &admin, true)?;

    let to_names = "  policyTypes: [Egress]
  egress:
  - to: [{namespaceSelector: {}, podSelector: {matchLabels: {k8s-app: kube-dns}}}]
    ports: [{port: 53, protocol: UDP}, {port: 53}]
";
    cluster.apply_ok(&policy("web", to_names))?;
    reaches(cluster, own, &sql, false)?;
    let lookup = cluster.gantry(&[
        "exec",
        "web",
        "--",
        "nslookup",
        "db.default.svc.cluster.local",
    ])?;
    ensure!(
        lookup.code == 0,
        "no name: {}{}",
        lookup.stdout,
        lookup.stderr
    );
    let to_db = format!("{to_names}  - to: [{{podSelector: {{matchLabels: {{app: db}}}}}}]\n");
    cluster.apply_ok(&policy("web", &to_db))?;
    reaches(cluster, own, by_name, true)?;
    let listed = cluster.ok(&["get", "netpol"])?;
    ensure!(listed.contains("app=web"), "{listed}");
    let refused = cluster.apply(&policy(
        "web",
        "  egress:\n  - ports: [{port: 1, protocol: SCTP}]\n",
    ))?;
    let words = "spec.egress[0].ports[0].protocol";
    ensure!(
        refused.code != 0 && refused.stderr.contains(words),
        "{}",
        refused.stderr
    );
    cluster.ok(&["delete", "netpol", "web"])?;
    reaches(cluster, own, &admin, true)
}
