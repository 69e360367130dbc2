//! What is seen of the network: flows as they happen, why they are dropped, and what would happen.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cluster::Cluster;

/// Longer than anything here takes on a machine that has other things to do.
const SOON: Duration = Duration::from_secs(20);

/// A server behind a Service, a Service without anybody, and a client.
const PODS: &str = "apiVersion: v1
kind: Pod
metadata: {name: db, labels: {app: db}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [httpd, -f, -p, \"8080\", -h, /etc]
      ports: [{name: sql, containerPort: 8080}]
      readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {selector: {app: db}, ports: [{port: 80, targetPort: sql}]}
---
apiVersion: v1
kind: Service
metadata: {name: nobody}
spec: {selector: {app: nobody}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sleep, \"3600\"]
";

const DENY: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny}
spec: {podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress]}
";

/// `gantry flows -f`, until it is dropped.
struct Follower {
    process: std::process::Child,
    lines: Receiver<String>,
}

impl Follower {
    fn start(cluster: &Cluster) -> Result<Self> {
        let mut command = cluster.command(&["flows", "-f", "-o", "json"]);
        let mut process = command.stdout(Stdio::piped()).spawn()?;
        let stdout = process.stdout.take().context("no stdout")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { process, lines })
    }

    /// The next flow for which this holds, which has to come soon; `act` is done until it does.
    fn next(
        &self,
        what: &str,
        act: impl Fn() -> Result<()>,
        is_it: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let start = Instant::now();
        let mut seen = Vec::new();
        while start.elapsed() < SOON {
            act()?;
            while let Ok(line) = self.lines.recv_timeout(Duration::from_millis(500)) {
                let flow: Value = serde_json::from_str(&line)?;
                if is_it(&flow) {
                    return Ok(flow);
                }
                seen.push(line);
            }
        }
        bail!("no flow came: {what}; these did: {}", seen.join("\n"))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// One HTTP request out of the client.
fn fetch(cluster: &Cluster, url: &str) -> Result<bool> {
    let command = [
        "exec",
        "client",
        "--",
        "timeout",
        "1",
        "wget",
        "-q",
        "-O",
        "/dev/null",
    ];
    Ok(cluster.gantry(&[&command[..], &[url]].concat())?.code == 0)
}

/// The explanation's last line, and whether it says yes.
fn explain(cluster: &Cluster, to: &str) -> Result<(bool, String)> {
    let output = cluster.gantry(&["explain", "connect", "client", to])?;
    let last = output.stdout.lines().last().unwrap_or_default().to_owned();
    ensure!(!last.is_empty(), "explain {to}: {}", output.stderr);
    eprintln!("{}", output.stdout);
    Ok((output.code == 0, last))
}

fn dropped_by_policy() -> Result<f64> {
    let mut socket = UnixStream::connect("/run/gantry/metrics.sock")?;
    socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n")?;
    let mut text = String::new();
    socket.read_to_string(&mut text)?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("gantry_drop_packets_total{reason=\"policy\"} "));
    Ok(line
        .context("no gantry_drop_packets_total")?
        .trim()
        .parse()?)
}

/// Flows with names, verdicts and reasons; explanations that agree with what happens; counters.
pub(super) fn see(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(PODS)?;
    for pod in ["db", "client"] {
        cluster.wait_ready("default", pod)?;
    }
    let object = cluster.get(&["pod", "db"])?;
    let address = object["status"]["podIP"].as_str().unwrap_or_default();
    let place = format!("default/db ({address}:8080)");
    // The resolver has the Service a moment after the pod is ready.
    let start = Instant::now();
    while !fetch(cluster, "http://db/hostname")? {
        ensure!(
            start.elapsed() < SOON,
            "the client does not reach the Service"
        );
    }

    let follower = Follower::start(cluster)?;
    let request = || fetch(cluster, "http://db/hostname").map(drop);
    let is_client = |flow: &Value| flow["source"]["name"] == "client";
    let flow = follower.next("translated at the socket", request, |flow| {
        flow["verdict"] == "translated" && flow["service"]["name"] == "db" && is_client(flow)
    })?;
    ensure!(flow["destination"]["name"] == "db", "{flow}");
    let flow = follower.next("from pod to pod", request, |flow| {
        flow["verdict"] == "forwarded" && is_client(flow) && flow["destination"]["port"] == 8080
    })?;
    ensure!(
        flow["point"] == "from-pod" && flow["protocol"] == "TCP",
        "{flow}"
    );
    ensure!(flow["destination"]["name"] == "db", "{flow}");
    let nobody = || fetch(cluster, "http://nobody/").map(drop);
    let flow = follower.next("refused", nobody, |flow| flow["verdict"] == "refused")?;
    ensure!(
        flow["service"]["name"] == "nobody" && flow["reason"] == "no_backend",
        "{flow}"
    );

    let would = (true, format!("would connect to {place}"));
    ensure!(explain(cluster, "db:80")? == would, "explain says no");
    ensure!(
        explain(cluster, "db.default:80")? == would,
        "explain says no"
    );
    let (connects, why) = explain(cluster, "nobody:80")?;
    ensure!(!connects && why == "refused: no endpoint is ready", "{why}");
    let (connects, why) = explain(cluster, "absent:80")?;
    ensure!(!connects && why.contains("no Service absent"), "{why}");

    let before = dropped_by_policy()?;
    cluster.apply_ok(DENY)?;
    let flow = follower.next("dropped", request, |flow| flow["verdict"] == "dropped")?;
    ensure!(
        flow["reason"] == "policy (ingress)" && is_client(&flow),
        "{flow}"
    );
    let (connects, why) = explain(cluster, "db:80")?;
    let expected =
        "dropped at ingress: NetworkPolicy default/deny selects db and no rule allows client";
    ensure!(!connects && why == expected, "{why}");
    ensure!(dropped_by_policy()? > before, "the drop is not counted");
    let drops = cluster.ok(&["svc", "drops", "--no-headers"])?;
    ensure!(drops.contains("policy"), "{drops}");

    // The lines for people, filtered by the agent.
    drop(follower);
    request()?;
    let output = cluster.ok(&[
        "flows",
        "--pod",
        "client",
        "--verdict",
        "dropped",
        "--last",
        "3",
    ])?;
    ensure!(output.lines().count() <= 4, "{output}");
    ensure!(
        output.lines().all(|line| line.chars().count() <= 100),
        "{output}"
    );
    cluster.ok(&["delete", "networkpolicy", "deny"])?;
    let start = Instant::now();
    while explain(cluster, "db:80")? != would {
        ensure!(
            start.elapsed() < SOON,
            "the policy has gone and still drops"
        );
    }
    ensure!(
        fetch(cluster, "http://db/hostname")?,
        "explain says yes, and it is no"
    );
    Ok(())
}
