//! Pods without a bridge, beside those that came before the node was told so: names, Services, the host,
//! and each other reach all of them, also after the node is told otherwise again.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{MAIN_JOB, get};
use crate::cluster::{Cluster, NODE};

/// A server that tells its own name.
fn server(name: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [httpd, -f, -p, \"8080\", -h, /etc]
"
    )
}

/// The node's ends of pods' veths, and how many of them are ports of the bridge.
fn links() -> Result<(usize, usize)> {
    let (mut all, mut ports) = (0, 0);
    for link in std::fs::read_dir("/sys/class/net")? {
        let link = link?;
        if link.file_name().to_string_lossy().starts_with("gv") {
            all += 1;
            ports += usize::from(Path::new(&link.path()).join("master").exists());
        }
    }
    Ok((all, ports))
}

fn pod_ip(cluster: &Cluster, name: &str) -> Result<String> {
    let pod = cluster.get(&["pod", name])?;
    let ip = pod["status"]["podIP"].as_str();
    Ok(ip.with_context(|| format!("{name} has no address"))?.into())
}

fn all_reach(cluster: &Cluster, names: &[&str]) -> Result<()> {
    for to in names {
        let address = pod_ip(cluster, to)?;
        for from in names.iter().filter(|from| *from != to) {
            let url = format!("http://{address}:8080/hostname");
            let script = format!("timeout 5 wget -q -O - {url}");
            let said = cluster.ok(&["exec", from, "--", "sh", "-c", &script])?;
            ensure!(said.trim() == *to, "{from} asked {to}: {said}");
        }
    }
    Ok(())
}

/// See the head of the file.
pub(super) fn routed_pods(cluster: &mut Cluster) -> Result<()> {
    let refused = cluster.agent(&["run", "--node-name", NODE, "--max-pods", "1200"])?;
    let words = format!("{}{}", refused.stdout, refused.stderr);
    ensure!(
        refused.code != 0 && words.contains("--pod-link routed"),
        "1,200 pods on a bridge: {refused:?}"
    );
    cluster.apply_ok(&server("early"))?;
    cluster.wait_ready("default", "early")?;
    cluster.kill_agent()?;
    let routed = ["--pod-link", "routed", "--max-pods", "1200"];
    cluster.start_agent_with(&routed)?;
    cluster.apply_ok(&server("routed"))?;
    cluster.wait_ready("default", "routed")?;
    all_reach(cluster, &["early", "routed"])?;

    cluster.import("nginx")?;
    cluster.apply_ok(MAIN_JOB)?;
    let rollout = ["-n", "web", "rollout", "status", "deployment/web"];
    cluster.ok(&[&rollout[..], &["--timeout=120s"]].concat())?;
    cluster.wait_ready("web", "client")?;
    let (all, ports) = links()?;
    ensure!(
        all >= 6 && ports == 1,
        "{ports} of {all} links are ports of the bridge"
    );
    let service = cluster.get(&["service", "web", "-n", "web"])?;
    let address = service["spec"]["clusterIP"].as_str();
    let address = SocketAddr::new(address.context("no cluster IP")?.parse()?, 80);
    get(address)?;
    let by_name = "wget -q -O /dev/null http://web";
    cluster.ok(&["-n", "web", "exec", "client", "--", "sh", "-c", by_name])?;

    // Told otherwise again: who runs stays as it is.
    let had = pod_ip(cluster, "routed")?;
    cluster.kill_agent()?;
    get(address)?;
    cluster.start_agent()?;
    cluster.apply_ok(&server("late"))?;
    cluster.wait_ready("default", "late")?;
    ensure!(pod_ip(cluster, "routed")? == had, "it has another address");
    all_reach(cluster, &["early", "routed", "late"])?;
    cluster.ok(&["-n", "web", "exec", "client", "--", "sh", "-c", by_name])?;
    cluster.ok(&["delete", "namespace", "web", "--timeout=60s"])?;
    for name in ["early", "routed", "late"] {
        cluster.ok(&["delete", "pod", name, "--timeout=60s"])?;
    }
    let limit = Duration::from_secs(30);
    cluster.wait("the pods' links to go", limit, |_| {
        // Those that wait for pods are ports of the bridge again.
        let (all, ports) = links()?;
        Ok(all == ports)
    })
}
