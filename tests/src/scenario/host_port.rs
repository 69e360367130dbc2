//! Host ports: a port of the node is a pod's, for who is on the node and for who is outside.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::sleeper;
use crate::cluster::{Cluster, NODE};

const PORT: u16 = 18_080;

const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: front}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [httpd, -f, -p, \"8080\", -h, /etc]
      ports:
        - {containerPort: 8080, hostPort: 18080}
";

/// The name of the host that answers.
fn hostname(at: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET /hostname HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().last().unwrap_or_default().to_owned())
}

/// The node's port answers from the host and from another pod, also after an agent restart, and is
/// free when the pod has gone.
pub(super) fn host_port(cluster: &mut Cluster) -> Result<()> {
    let node = cluster.get(&["node", NODE])?;
    let addresses = node["status"]["addresses"].as_array().cloned();
    let address = addresses
        .into_iter()
        .flatten()
        .find(|a| a["type"] == "InternalIP");
    let address = address.context("the node has no address")?["address"].clone();
    let at: SocketAddr = format!("{}:{PORT}", address.as_str().context("no text")?).parse()?;
    cluster.apply_ok(POD)?;
    cluster.apply_ok(&sleeper("other", ""))?;
    for pod in ["front", "other"] {
        cluster.wait_ready("default", pod)?;
    }
    let answers = |_: &Cluster| Ok(hostname(at).is_ok_and(|name| name == "front"));
    let limit = Duration::from_secs(30);
    cluster.wait("the host port to answer from the host", limit, answers)?;
    let script = format!("timeout 5 wget -q -O - http://{at}/hostname");
    cluster.wait("the host port to answer from a pod", limit, |c| {
        let said = c.gantry(&["exec", "other", "--", "sh", "-c", &script])?;
        Ok(said.stdout.trim() == "front")
    })?;
    cluster.kill_agent()?;
    ensure!(hostname(at)? == "front", "without the agent");
    cluster.start_agent()?;
    cluster.wait("the host port to answer after a restart", limit, answers)?;
    cluster.ok(&["delete", "pod", "front", "--timeout=60s"])?;
    cluster.wait("the host port to be free", limit, |_| {
        Ok(hostname(at).is_err())
    })
}
