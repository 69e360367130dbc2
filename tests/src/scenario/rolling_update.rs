//! Ordered drain as a user sees it: under constant load through the Service, from the host and from a
//! pod, a Deployment is restarted again and again, and no request is lost. Its server, nginx, ends at
//! once at SIGTERM, and nothing in the manifest waits for anybody.

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{MAIN_JOB, get};
use crate::cluster::Cluster;

/// Restarts, each of three pods.
const ROUNDS: usize = 3;
/// Between two requests of one client on the host.
const EVERY: Duration = Duration::from_millis(5);

/// What clients on the host have seen.
#[derive(Default)]
pub(super) struct Seen {
    answered: AtomicU64,
    lost: AtomicU64,
    first: std::sync::Mutex<Option<String>>,
}

impl Seen {
    /// Asks there until it is over, with a pause after each request.
    pub(super) fn ask_until(&self, over: &AtomicBool, address: SocketAddr, every: Duration) {
        while !over.load(Ordering::Relaxed) {
            match get(address) {
                Ok(_) => self.answered.fetch_add(1, Ordering::Relaxed),
                Err(error) => {
                    let mut first = self.first.lock().unwrap_or_else(|e| e.into_inner());
                    first.get_or_insert_with(|| format!("{error:#}"));
                    self.lost.fetch_add(1, Ordering::Relaxed)
                }
            };
            std::thread::sleep(every);
        }
    }

    /// How many were answered; an error if one was not.
    pub(super) fn all_answered(self) -> Result<u64> {
        let (answered, lost) = (self.answered.into_inner(), self.lost.into_inner());
        let first = self.first.into_inner().unwrap_or_else(|e| e.into_inner());
        ensure!(lost == 0, "the host lost {lost} of {answered}: {first:?}");
        Ok(answered)
    }
}

/// No request is lost by any of several restarts, and events say for whom each pod waited.
pub(super) fn rolling_update(cluster: &mut Cluster) -> Result<()> {
    cluster.import("nginx")?;
    let strategy =
        "spec:\n  replicas: 3\n  strategy:\n    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}\n";
    let manifest = MAIN_JOB.replacen("spec:\n  replicas: 3\n", strategy, 1);
    ensure!(
        manifest != MAIN_JOB,
        "the manifest has no Deployment of three"
    );
    cluster.apply_ok(&manifest)?;
    rolled_out(cluster)?;
    cluster.wait_ready("web", "client")?;
    let service = cluster.get(&["service", "web", "-n", "web"])?;
    let address = service["spec"]["clusterIP"].as_str();
    let address = SocketAddr::new(address.context("no cluster IP")?.parse()?, 80);

    let script = "n=0; lost=0; while [ ! -e /tmp/over ]; do n=$((n+1)); \
                  wget -q -O /dev/null http://web/ || lost=$((lost+1)); done; echo $n $lost";
    let mut inside = cluster.command(&["-n", "web", "exec", "client", "--", "sh", "-c", script]);
    let inside = inside
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (seen, over) = (Seen::default(), AtomicBool::new(false));
    let rolled = std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| seen.ask_until(&over, address, EVERY));
        }
        let rolled = (0..ROUNDS).try_for_each(|_| {
            cluster.ok(&["-n", "web", "rollout", "restart", "deployment/web"])?;
            rolled_out(cluster)
        });
        over.store(true, Ordering::Relaxed);
        rolled
    });
    cluster.ok(&["-n", "web", "exec", "client", "--", "touch", "/tmp/over"])?;
    let inside = inside.wait_with_output()?;
    rolled?;

    let answered = seen.all_answered()?;
    ensure!(answered > 100, "only {answered} requests from the host");
    let said = String::from_utf8_lossy(&inside.stdout);
    let numbers: Vec<u64> = said
        .split_whitespace()
        .filter_map(|n| n.parse().ok())
        .collect();
    let words = String::from_utf8_lossy(&inside.stderr);
    ensure!(
        matches!(numbers[..], [asked, 0] if asked > 50),
        "the pod asked and lost {said:?}: {words}"
    );
    let events = cluster.ok(&["-n", "web", "get", "events"])?;
    ensure!(events.contains("drained: acked 1/1 nodes in "), "{events}");
    ensure!(!events.contains("drained: not by all"), "{events}");
    cluster.ok(&["delete", "namespace", "web", "--timeout=60s"])?;
    Ok(())
}

fn rolled_out(cluster: &Cluster) -> Result<()> {
    let status = [
        "-n",
        "web",
        "rollout",
        "status",
        "deployment/web",
        "--timeout=120s",
    ];
    cluster.ok(&status).map(drop)
}
