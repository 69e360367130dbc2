//! Ordered drain over nodes: a Deployment is restarted under load, and every node is waited for.
//!
//! A pod is told to end when all nodes have acked that they send it nothing new, or after a second. On a host
//! that is too slow for three machines an ack takes longer; what is lost then is no defect, so a round in
//! which that happened is tried again. A round in which all nodes acked loses nothing.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::main_job::spread;
use crate::cluster::Cluster;
use crate::machines::Nodes;
use crate::scenario::rolling_update::Seen;

/// One with all acks is enough.
const ROUNDS: usize = 5;

const ROLLED_OUT: [&str; 6] = [
    "-n",
    "web",
    "rollout",
    "status",
    "deployment/web",
    "--timeout=240s",
];

/// No request of a client on node-1 or of a pod is lost, and every pod's end was acked by all nodes.
pub(super) fn rolling_update(nodes: &mut Nodes) -> Result<()> {
    let cluster = &nodes.cluster;
    let count = nodes.numbers().len();
    // One more than there are nodes may run at a time, so the replicas need not be spread evenly.
    let manifest = spread(nodes)?
        .replacen("DoNotSchedule", "ScheduleAnyway", 1)
        .replacen(
            "spec:\n  replicas:",
            "spec:\n  strategy:\n    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}\n  replicas:",
            1,
        );
    ensure!(manifest.contains("maxSurge"), "the manifest has changed");
    cluster.apply_ok(&manifest)?;
    cluster.ok(&ROLLED_OUT)?;
    cluster.wait_ready("web", "client")?;
    let service = cluster.get(&["service", "web", "-n", "web"])?;
    let ip = service["spec"]["clusterIP"].as_str();
    let address = SocketAddr::new(ip.context("no cluster IP")?.parse()?, 80);

    for round in 1..=ROUNDS {
        let before = too_late(cluster)?;
        let lost = restart_under_load(cluster, address)?;
        let late = too_late(cluster)? - before;
        if late == 0 {
            ensure!(lost.is_empty(), "all nodes acked, but {}", lost.join("; "));
            let events = cluster.ok(&["-n", "web", "get", "events"])?;
            let acked = format!("drained: acked {count}/{count} nodes in ");
            ensure!(events.contains(&acked), "no {acked:?} in {events}");
            return Ok(());
        }
        println!("vm: round {round}: {late} pods were not acked by all within the second");
    }
    bail!(
        "the host is too slow: in none of {ROUNDS} rounds every pod was acked by all nodes in time"
    )
}

/// Pods that ended without all acks.
fn too_late(cluster: &Cluster) -> Result<usize> {
    let events = cluster.ok(&["-n", "web", "get", "events"])?;
    Ok(events.matches("drained: not by all").count())
}

/// Restarts the Deployment while a client on node-1 and one in a pod ask; says what they lost.
fn restart_under_load(cluster: &Cluster, address: SocketAddr) -> Result<Vec<String>> {
    // A pause between two requests: three machines share the host's processors.
    let script = "rm -f /tmp/over; n=0; lost=0; while [ ! -e /tmp/over ]; do n=$((n+1)); \
                  wget -q -O /dev/null http://web/ || lost=$((lost+1)); sleep 0.2; done; echo $n $lost";
    let mut inside = cluster.command(&["-n", "web", "exec", "client", "--", "sh", "-c", script]);
    let inside = inside
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    let (seen, over) = (Seen::default(), AtomicBool::new(false));
    let rolled = std::thread::scope(|scope| {
        scope.spawn(|| seen.ask_until(&over, address, Duration::from_millis(50)));
        let rolled = cluster
            .ok(&["-n", "web", "rollout", "restart", "deployment/web"])
            .and_then(|_| cluster.ok(&ROLLED_OUT));
        over.store(true, Ordering::Relaxed);
        rolled
    });
    cluster.ok(&["-n", "web", "exec", "client", "--", "touch", "/tmp/over"])?;
    let inside = inside.wait_with_output()?;
    rolled?;
    let mut lost = Vec::new();
    match seen.all_answered() {
        Ok(answered) => ensure!(answered > 25, "only {answered} requests from node-1"),
        Err(words) => lost.push(words.to_string()),
    }
    let said = String::from_utf8_lossy(&inside.stdout);
    let numbers: Vec<u64> = said
        .split_whitespace()
        .filter_map(|n| n.parse().ok())
        .collect();
    let [asked, failed] = numbers[..] else {
        let words = String::from_utf8_lossy(&inside.stderr);
        bail!(
            "the pod said {said:?}, exec ended with {}: {words}",
            inside.status
        );
    };
    ensure!(asked > 10, "only {asked} requests from the pod");
    if failed > 0 {
        let words = String::from_utf8_lossy(&inside.stderr);
        lost.push(format!("the pod lost {failed} of {asked}: {words}"));
    }
    Ok(lost)
}
