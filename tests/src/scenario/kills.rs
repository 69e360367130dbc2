//! SIGKILL of the agent and of the control plane.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::names::Queries;
use super::{accepts, sleeper};
use crate::cluster::Cluster;

/// SIGKILL of the agent: pods untouched, Services go on, no log line and no exit code lost.
pub(super) fn agent_kill(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(
        "apiVersion: v1
kind: Pod
metadata:
  name: counter
  labels: {app: counter}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"httpd -p 8080 -h /etc; i=0; while true; do i=$((i+1)); echo line $i; sleep 0.01; done\"]
---
apiVersion: v1
kind: Pod
metadata:
  name: leaver
spec:
  restartPolicy: Never
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"nc -l -p 9000 < /dev/null; echo last words; exit 7\"]
---
apiVersion: v1
kind: Service
metadata:
  name: counter
spec:
  selector: {app: counter}
  ports: [{port: 80, targetPort: 8080}]
",
    )?;
    cluster.wait_ready("default", "counter")?;
    cluster.wait_ready("default", "leaver")?;
    let service = cluster.get(&["service", "counter"])?;
    let address: SocketAddr = format!(
        "{}:80",
        service["spec"]["clusterIP"]
            .as_str()
            .context("no cluster IP")?
    )
    .parse()?;
    cluster.wait("the Service to answer", Duration::from_secs(10), |_| {
        accepts(address, Duration::from_secs(1))
    })?;
    let before = cluster.get(&["pod", "counter"])?;
    let leaver = cluster.get(&["pod", "leaver"])?;
    let leaver = leaver["status"]["podIP"].as_str().context("no address")?;
    let leaver = SocketAddr::new(leaver.parse()?, 9000);
    let queries = Queries::begin("counter.default.svc.cluster.local");
    // What is said about names in the agent's absence is written a moment after they come.
    std::thread::sleep(Duration::from_secs(1));
    cluster.kill_agent()?;
    // It ends when somebody connects: now, while nobody looks after it.
    cluster.wait("the leaver to listen", Duration::from_secs(60), |_| {
        accepts(leaver, Duration::from_secs(1))
    })?;
    for _ in 0..20 {
        TcpStream::connect_timeout(&address, Duration::from_secs(2))
            .context("the Service does not answer while the agent is dead")?;
        std::thread::sleep(Duration::from_millis(400));
    }
    cluster.start_agent()?;
    queries.end().context("names while the agent was dead")?;
    cluster.wait_phase("default", "leaver", "Failed")?;
    let leaver = cluster.get(&["pod", "leaver"])?;
    let ended = &leaver["status"]["containerStatuses"][0]["state"]["terminated"];
    ensure!(ended["exitCode"] == 7, "exit code: {ended}");
    ensure!(
        cluster.ok(&["logs", "leaver"])?.trim() == "last words",
        "the leaver's log is not whole"
    );
    let after = cluster.get(&["pod", "counter"])?;
    let status = |pod: &Value| pod["status"]["containerStatuses"][0].clone();
    ensure!(
        status(&before) == status(&after),
        "touched: {} {}",
        status(&before),
        status(&after)
    );
    let ready = |pod: &Value| {
        let conditions = pod["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        conditions
            .into_iter()
            .find(|c| c["type"] == "Ready")
            .map(|c| c["lastTransitionTime"].clone())
    };
    ensure!(ready(&before) == ready(&after), "readiness has flipped");
    let log = cluster.ok(&["logs", "counter"])?;
    for (index, line) in log.lines().enumerate() {
        ensure!(
            line == format!("line {}", index + 1),
            "line {} of the log is {line:?}",
            index + 1
        );
    }
    ensure!(
        log.lines().count() > 300,
        "only {} lines",
        log.lines().count()
    );
    cluster.ok(&["delete", "pod", "counter", "leaver", "--timeout=30s"])?;
    Ok(())
}

/// SIGKILL of the control plane: pods and Services go on, nothing acknowledged is lost.
pub(super) fn control_kill(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(
        "apiVersion: v1
kind: Pod
metadata:
  name: server
  labels: {app: server}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"httpd\", \"-f\", \"-p\", \"8080\", \"-h\", \"/etc\"]
---
apiVersion: v1
kind: Service
metadata: {name: server}
spec:
  selector: {app: server}
  ports: [{port: 80, targetPort: 8080}]
",
    )?;
    cluster.wait_ready("default", "server")?;
    let service = cluster.get(&["service", "server"])?;
    let address = service["spec"]["clusterIP"]
        .as_str()
        .context("no cluster IP")?;
    let address: SocketAddr = format!("{address}:80").parse()?;
    cluster.wait("the Service to answer", Duration::from_secs(10), |_| {
        accepts(address, Duration::from_secs(1))
    })?;
    for number in 0..10 {
        cluster.apply_ok(&format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: c{number}}}\ndata: {{n: \"{number}\"}}\n"
        ))?;
    }
    let before = cluster.get(&["pod", "server"])?;
    cluster.kill_control()?;
    accepts(address, Duration::from_secs(1)).context("without the control plane")?;
    let output = cluster.gantry(&["get", "pods"])?;
    ensure!(
        output.code == 1 && output.stderr.contains("was refused"),
        "{output:?}"
    );
    cluster.start_control()?;
    for number in 0..10 {
        let map = cluster.get(&["configmap", &format!("c{number}")])?;
        let kept = number.to_string();
        ensure!(
            map["data"]["n"] == kept.as_str(),
            "acknowledged and lost: {map}"
        );
    }
    let after = cluster.get(&["pod", "server"])?;
    let status = |pod: &Value| pod["status"]["containerStatuses"].clone();
    ensure!(
        status(&before) == status(&after),
        "touched: {}",
        status(&after)
    );
    // The agent's stream comes back by itself: a new pod runs.
    cluster.apply_ok(&sleeper("later", ""))?;
    cluster.wait_ready("default", "later")
}
