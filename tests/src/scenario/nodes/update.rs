//! Ordered drain over nodes: a Deployment is restarted under load, and every node is waited for.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::main_job::spread;
use crate::machines::Nodes;
use crate::scenario::rolling_update::Seen;

const ROUNDS: usize = 2;

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
    let status = [
        "-n",
        "web",
        "rollout",
        "status",
        "deployment/web",
        "--timeout=180s",
    ];
    cluster.ok(&status)?;
    cluster.wait_ready("web", "client")?;
    let service = cluster.get(&["service", "web", "-n", "web"])?;
    let ip = service["spec"]["clusterIP"].as_str();
    let address = SocketAddr::new(ip.context("no cluster IP")?.parse()?, 80);

    // A pause between two requests: three machines share the host's processors.
    let script = "n=0; lost=0; while [ ! -e /tmp/over ]; do n=$((n+1)); \
                  wget -q -O /dev/null http://web/ || lost=$((lost+1)); sleep 0.2; done; echo $n $lost";
    let mut inside = cluster.command(&["-n", "web", "exec", "client", "--", "sh", "-c", script]);
    let inside = inside
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    let (seen, over) = (Seen::default(), AtomicBool::new(false));
    let rolled = std::thread::scope(|scope| {
        scope.spawn(|| seen.ask_until(&over, address, Duration::from_millis(50)));
        let rolled = (0..ROUNDS).try_for_each(|_| {
            cluster.ok(&["-n", "web", "rollout", "restart", "deployment/web"])?;
            cluster.ok(&status).map(drop)
        });
        over.store(true, Ordering::Relaxed);
        rolled
    });
    cluster.ok(&["-n", "web", "exec", "client", "--", "touch", "/tmp/over"])?;
    let inside = inside.wait_with_output()?;
    rolled?;
    let answered = seen.all_answered()?;
    ensure!(answered > 50, "only {answered} requests from node-1");
    let said = String::from_utf8_lossy(&inside.stdout);
    let numbers: Vec<u64> = said
        .split_whitespace()
        .filter_map(|n| n.parse().ok())
        .collect();
    ensure!(
        matches!(numbers[..], [asked, 0] if asked > 20),
        "the pod asked and lost {said:?}: {}",
        String::from_utf8_lossy(&inside.stderr)
    );
    let events = cluster.ok(&["-n", "web", "get", "events"])?;
    let acked = format!("drained: acked {count}/{count} nodes in ");
    ensure!(events.contains(&acked), "no {acked:?} in {events}");
    ensure!(!events.contains("drained: not by all"), "{events}");
    Ok(())
}
