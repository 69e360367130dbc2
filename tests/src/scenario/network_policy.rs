//! NetworkPolicies: who reaches whom.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail, ensure};

use super::resources::script;
use crate::cluster::Cluster;
use crate::nodes::within;

/// Longer than a policy takes to reach the node, and an agent to begin, on an emulated machine that has other
/// things to do.
const SOON: Duration = Duration::from_secs(120);
/// A question that a policy drops takes all of it.
const PATIENCE_S: u32 = 2;

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

/// One HTTP request in words of a shell, true when it is answered in time.
fn question(url: &str) -> String {
    // busybox's wget dies of its own `-T`.
    format!("timeout {PATIENCE_S} wget -q -O /dev/null {url}")
}

/// One HTTP request out of a pod: whether it was answered. An error where nobody could ask, because there is
/// no agent yet.
fn fetch(cluster: &Cluster, namespace: &str, url: &str) -> Result<bool> {
    let command = question(url) + " && echo yes || echo no";
    let asked = ["-n", namespace, "exec", "web", "--", "sh", "-c", &command];
    let output = cluster.gantry(&asked)?;
    match output.stdout.trim() {
        "yes" => Ok(true),
        "no" => Ok(false),
        said => bail!("exec ended with {}: {said}{}", output.code, output.stderr),
    }
}

/// Until the pod of a namespace reaches `url`, or no longer does.
fn reaches(cluster: &Cluster, namespace: &str, url: &str, wanted: bool) -> Result<()> {
    let reach = if wanted { "reaches" } else { "does not reach" };
    let what = format!("web in {namespace} {reach} {url}");
    within(SOON, &what, || {
        let is_reached = fetch(cluster, namespace, url)?;
        ensure!(is_reached == wanted, "so far it is the other way round");
        Ok(())
    })
}

/// Nobody can be told to ask while there is no agent: this pod asks all the time, and its log says when.
fn asking_pod(url: &str) -> String {
    let question = question(url);
    let endless = format!(
        "while :; do at=$(date +%s); {question} && echo $at open || echo $at shut; sleep 0.2; done"
    );
    script("asking", &endless, "")
}

/// The lines of that pod's log since then, in seconds since 1970.
fn answers(cluster: &Cluster, from: u64) -> Result<Vec<String>> {
    let log = cluster.ok(&["logs", "asking"])?;
    let since = |line: &&str| {
        let at = line.split(' ').next().and_then(|at| at.parse::<u64>().ok());
        at.is_some_and(|at| at >= from)
    };
    Ok(log.lines().filter(since).map(str::to_owned).collect())
}

/// Kills the agent and starts another one: what no pod may reach stays so in between.
fn without_agent(cluster: &mut Cluster) -> Result<()> {
    let killed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    cluster.kill_agent()?;
    std::thread::sleep(Duration::from_secs(2 * u64::from(PATIENCE_S)));
    cluster.start_agent()?;
    let asked = within(SOON, "what was asked without an agent", || {
        let asked = answers(cluster, killed)?;
        ensure!(!asked.is_empty(), "nothing yet");
        Ok(asked)
    })?;
    let open: Vec<&String> = asked.iter().filter(|line| line.ends_with("open")).collect();
    ensure!(open.is_empty(), "reached, at: {open:?}");
    cluster.ok(&["delete", "pod", "asking", "--wait=false"])?;
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
    cluster.apply_ok(&asking_pod(&sql))?;
    within(SOON, "the pod that asks all the time", || {
        let answers = answers(cluster, 0)?;
        let is_open = answers.iter().any(|line| line.ends_with("open"));
        ensure!(is_open, "not answered yet: {answers:?}");
        Ok(())
    })?;
    cluster.apply_ok(&policy("db", "  policyTypes: [Ingress]\n"))?;
    for namespace in [own, other] {
        reaches(cluster, namespace, &sql, false)?;
        reaches(cluster, namespace, by_name, false)?;
    }
    without_agent(cluster)?;
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
