//! A machine that goes down and comes up again, as far as one process tree can show it: everything
//! that a reboot takes is taken (processes, mounts, cgroups, `/run`, eBPF objects), and what a disk
//! keeps stays.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use gantry_agent::pods::hold::SERVICES_PATIENCE;

use crate::cluster::{Cluster, KUBECONFIG};

const LIMIT: Duration = Duration::from_secs(90);

const PODS: &str = "apiVersion: v1
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
      command: [\"sh\", \"-c\", \"mkdir -p /w && echo served > /w/index.html && exec httpd -f -p 8080 -h /w\"]
---
apiVersion: v1
kind: Pod
metadata:
  name: done
spec:
  restartPolicy: Never
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"true\"]
---
apiVersion: v1
kind: Service
metadata:
  name: server
spec:
  selector: {app: server}
  ports: [{port: 80, targetPort: 8080}]
";

/// Pods start again from the disk (after 30 s) and their Service answers (after 45 s, and not before: till then
/// drains elsewhere count on this node), all before the control plane is back; a pod that had ended stays ended.
pub(super) fn reboot(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(PODS)?;
    cluster.wait_ready("default", "server")?;
    cluster.wait_phase("default", "done", "Succeeded")?;
    let ended = cluster.get(&["pod", "done"])?["status"]["containerStatuses"].clone();
    let service = cluster.get(&["service", "server"])?;
    let address = service["spec"]["clusterIP"].as_str();
    let address = SocketAddr::new(address.context("no cluster IP")?.parse()?, 80);
    cluster.wait("the Service to answer", LIMIT, |_| {
        Ok(served(address).is_ok())
    })?;

    cluster.kill_agent()?;
    cluster.kill_control()?;
    cluster.lose_all_but_the_disk()?;
    ensure!(served(address).is_err(), "something still answers");

    let began = Instant::now();
    cluster.start_agent()?;
    cluster.wait(
        "the Service to answer without a control plane",
        LIMIT,
        |_| Ok(served(address).is_ok()),
    )?;
    let waited = began.elapsed();
    ensure!(
        waited >= SERVICES_PATIENCE,
        "a Service answered {} s after a reboot without a control plane",
        waited.as_secs()
    );
    cluster.start_control()?;
    // The node's heartbeat must be a new one, and the pod's readiness what the new probe found.
    cluster.wait_ready("default", "server")?;
    cluster.wait("the node's stream", LIMIT, |c| {
        Ok(c.gantry(&["exec", "server", "--", "true"])?.code == 0)
    })?;
    ensure!(
        served(address).is_ok(),
        "the Service does not answer with the control plane back"
    );
    api_in_the_cluster(cluster)?;
    let now = &cluster.get(&["pod", "done"])?["status"]["containerStatuses"];
    ensure!(
        *now == ended,
        "a pod that had ended was touched: {ended} then {now}"
    );
    Ok(())
}

/// The API answers at its cluster IP, with a certificate that names it, and a pod gets there.
fn api_in_the_cluster(cluster: &Cluster) -> Result<()> {
    let service = cluster.get(&["service", "kubernetes"])?;
    let ip = service["spec"]["clusterIP"].as_str();
    let ip = ip.context("no cluster IP")?.to_owned();
    let config = std::fs::read_to_string(KUBECONFIG)?;
    let inside: Vec<String> = config
        .lines()
        .map(|line| match line.split_once("server: ") {
            Some((before, _)) => format!("{before}server: https://{ip}:443"),
            None => line.to_owned(),
        })
        .collect();
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), inside.join("\n") + "\n")?;
    let kubeconfig = format!("--kubeconfig={}", file.path().display());
    cluster.wait("the API to answer at its cluster IP", LIMIT, |c| {
        Ok(c.gantry(&[&kubeconfig, "get", "namespaces"])?.code == 0)
    })?;
    let connect = format!("nc -w 5 {ip} 443 < /dev/null");
    cluster.wait("a pod to reach the API", LIMIT, |c| {
        Ok(c.gantry(&["exec", "server", "--", "sh", "-c", &connect])?
            .code
            == 0)
    })
}

/// One request through the Service: a whole answer, not only a connection.
fn served(address: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.ends_with("served\n"), "{answer:?}");
    Ok(())
}
