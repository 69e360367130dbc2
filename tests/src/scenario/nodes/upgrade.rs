//! A new agent on every machine, while connections are open and new ones are made.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::drain::lost_while;
use super::faults::identity;
use super::{LIMIT, cluster_ip, delete, pod_ip, server, service};
use crate::machines::Nodes;
use crate::machines::hand::Machine;

const ECHO_PORT: u16 = 9_000;
const PATIENCE: Duration = Duration::from_secs(30);

/// What comes goes back, on each connection until its client closes it.
fn echo(node: u8) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: echo-{node}, labels: {{app: echo}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: node-{node}}}
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [nc, -ll, -p, \"{ECHO_PORT}\", -e, cat]
      readinessProbe: {{tcpSocket: {{port: {ECHO_PORT}}}, periodSeconds: 1}}
---
"
    )
}

const ECHO_SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: echo}
spec:
  selector: {app: echo}
  ports: [{port: 9000, targetPort: 9000}]
---
";

/// The file is replaced and the agent told to end, as a package's upgrade does; on every worker, and on
/// node-1 by SIGKILL. No connection through a Service is reset, no request is lost, no pod is touched.
pub(super) fn agent_upgrade(nodes: &mut Nodes) -> Result<()> {
    let numbers = nodes.numbers();
    let names: Vec<String> = numbers.iter().map(|n| format!("web-{n}")).collect();
    let echoes: Vec<String> = numbers.iter().map(|n| format!("echo-{n}")).collect();
    let mut manifest = ECHO_SERVICE.to_owned();
    for (number, name) in numbers.iter().zip(&names) {
        manifest += &(server(name, *number, "web") + &echo(*number));
    }
    nodes
        .cluster
        .apply_ok(&(manifest + &service("web", "web", "")))?;
    let web = cluster_ip(&nodes.cluster, "web")?;
    for name in names.iter().chain(&echoes) {
        nodes.cluster.wait_ready("default", name)?;
    }
    let all: Vec<&String> = names.iter().chain(&echoes).collect();
    let identities = |nodes: &Nodes| -> Result<Vec<_>> {
        let each = all.iter().map(|name| identity(&nodes.cluster, name));
        each.collect()
    };
    let before = identities(nodes)?;
    let mut open = connections(nodes, &echoes)?;
    let lost = lost_while(web, || {
        for worker in nodes.workers.clone() {
            upgrade(nodes, &worker)?;
            for (to, connection) in &mut open {
                still_echoes(connection)
                    .with_context(|| format!("to {to}, {} has a new agent", worker.name))?;
            }
        }
        nodes.cluster.kill_agent()?;
        nodes.cluster.start_agent()?;
        nodes.wait_ready("node-1")?;
        for (to, connection) in &mut open {
            still_echoes(connection).with_context(|| format!("to {to}, node-1 has a new agent"))?;
        }
        Ok(())
    })?;
    drop(open);
    ensure!(lost.is_empty(), "requests were lost: {}", lost.join("; "));
    let after = identities(nodes)?;
    ensure!(before == after, "pods were touched: {before:?}, {after:?}");
    let all: Vec<&str> = all.into_iter().map(String::as_str).collect();
    delete(&nodes.cluster, "service", &["web", "echo"])?;
    delete(&nodes.cluster, "pod", &all)
}

/// Some through the Service, and one to each pod's own address.
fn connections(nodes: &Nodes, echoes: &[String]) -> Result<Vec<(String, TcpStream)>> {
    let object = nodes.cluster.get(&["service", "echo"])?;
    let ip = object["spec"]["clusterIP"].as_str();
    let ip: IpAddr = ip.context("no cluster IP")?.parse()?;
    let mut to = vec![(String::from("the Service"), ip); 6];
    for name in echoes {
        to.push((name.clone(), pod_ip(&nodes.cluster, "default", name)?));
    }
    let connect = |(name, ip): (String, IpAddr)| -> Result<(String, TcpStream)> {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(ip, ECHO_PORT), PATIENCE)
            .with_context(|| name.clone())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        still_echoes(&mut stream).with_context(|| name.clone())?;
        Ok((name, stream))
    };
    to.into_iter().map(connect).collect()
}

fn still_echoes(connection: &mut TcpStream) -> Result<()> {
    connection.write_all(b"still?\n")?;
    let mut answer = [0; 7];
    connection.read_exact(&mut answer)?;
    ensure!(&answer == b"still?\n", "{answer:?} came back");
    Ok(())
}

/// Another file by the same name, SIGTERM, and until the new file runs and its node is ready.
fn upgrade(nodes: &Nodes, worker: &Machine) -> Result<()> {
    let replace = "cd /usr/lib/gantry && cp gantry-agent new && mv new gantry-agent && \
                   kill $(pidof gantry-agent)";
    worker.ok(&["sh", "-c", replace])?;
    let same = "p=$(pidof gantry-agent) && [ $(stat -L -c %i /proc/$p/exe) = \
                $(stat -c %i /usr/lib/gantry/gantry-agent) ]";
    let what = format!("the new agent of {}", worker.name);
    nodes.cluster.wait(&what, LIMIT, |_| {
        Ok(worker.run(&["sh", "-c", same])?.code == 0)
    })?;
    nodes.wait_ready(&worker.name)
}
