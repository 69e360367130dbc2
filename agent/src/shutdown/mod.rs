//! The machine goes down: pods end in order, each within its share of the time, and say why.
//!
//! ```text
//!  gantry-agent shutdown ─► /run/gantry/agent.sock ─► going down: node not ready, new pods refused
//!  (a unit's ExecStop)            │                       └─► round by round (plan.rs, pure) ─► pods are Failed
//!                                 └◄── lines of progress, at last "done"
//! ```
//! What the pods say is on the disk before they are gone (`pods/records.rs`), so it is shown when the
//! node is back. Nothing takes a shutdown back but a new start of the agent.
//!
//! Why a command, and not an inhibitor lock of logind: a lock delays a shutdown by 5 s unless
//! logind's own configuration is changed (the kubelet writes it), needs D-Bus and its crates in the
//! agent, and does not exist without systemd. A unit whose ExecStop is this command may take as
//! long as its own TimeoutStopSec, is ordered before the agent and the network by systemd itself,
//! and any other init system can call it too: `agent/systemd/gantry-shutdown.service`.
//!
//! Source: Kubernetes `pkg/kubelet/nodeshutdown`.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Pod;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub mod plan;

use crate::feed::Reporter;
use crate::ids::PodUid;
use crate::paths::Paths;
use crate::pods::{Order, records, status};
use crate::runtime::Runtime;
use crate::static_pods::is_static;
use crate::view::View;
use plan::{Ending, Periods, rounds};

/// `status.reason` of a pod that the shutdown has ended.
pub const REASON: &str = "Terminated";
/// Its message.
pub const MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";
/// `status.reason` of a pod that came too late.
pub const REFUSED: &str = "NodeShutdown";
/// Its message.
pub const REFUSED_MESSAGE: &str = "Pod was rejected as the node is shutting down.";

/// Between two looks at what still runs.
const LOOK: Duration = Duration::from_millis(100);
/// What SIGKILL and the records take after the last grace period.
const SLACK: Duration = Duration::from_secs(2);
/// The longest request.
const REQUEST_BYTES_MAX: u64 = 64;
const REQUEST: &str = "shutdown";

/// Who can ask, and what is needed to answer.
pub struct Shutdown {
    /// How long everything may take.
    pub periods: Periods,
    /// True from the request on.
    pub going_down: watch::Sender<bool>,
    /// The pods of this node.
    pub view: watch::Receiver<Arc<View>>,
    /// To the pod workers.
    pub orders: mpsc::Sender<Order>,
    /// What still runs.
    pub runtime: Arc<dyn Runtime>,
    /// The node's condition goes up at once.
    pub reporter: Reporter,
    /// Where pods' last words are kept.
    pub paths: Paths,
}

fn socket(paths: &Paths) -> PathBuf {
    paths.run.join("agent.sock")
}

/// Listens, replacing what an earlier agent left there; only root may connect.
pub fn listen(paths: &Paths) -> io::Result<UnixListener> {
    crate::stats::socket::listen(&socket(paths))
}

impl Shutdown {
    /// Answers requests, one at a time, until `shutdown` of the agent itself.
    pub async fn serve(self, listener: UnixListener, shutdown: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                // Cancel-safe: both only wait. A shutdown of pods is not waited for: they go on ending.
                () = shutdown.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "accept a request on the agent's socket");
                    tokio::time::sleep(LOOK).await;
                    continue;
                }
            };
            tokio::select! {
                // As above; dropping the answer in the middle leaves the pods' ends to their workers.
                () = shutdown.cancelled() => return,
                answered = self.answer(stream) => if let Err(error) = answered {
                    warn!(%error, "the one who asked for the shutdown is gone");
                },
            }
        }
    }

    async fn answer(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut line = String::new();
        let (read, mut write) = stream.split();
        let mut read = BufReader::new(read.take(REQUEST_BYTES_MAX));
        let request = tokio::time::timeout(SLACK, read.read_line(&mut line)).await;
        if request.is_err() || line.trim() != REQUEST {
            return write.write_all(b"error: want \"shutdown\"\n").await;
        }
        if self.periods.all.is_zero() {
            let words = b"error: --shutdown-grace-period is 0: pods end with the machine\n";
            return write.write_all(words).await;
        }
        // Whoever asked may go: what has begun is finished.
        let mut tell = |words: String| {
            info!("{words}");
            let _ = stream.try_write(format!("{words}\n").as_bytes());
        };
        let left = self.end_all(&mut tell).await;
        let last = match left {
            0 => "done\n".to_owned(),
            left => format!("error: {left} pods have not ended in time\n"),
        };
        stream.write_all(last.as_bytes()).await
    }

    /// Ends all pods; returns how many still run when the time is over.
    async fn end_all(&self, tell: &mut (dyn FnMut(String) + Send)) -> usize {
        self.going_down.send_replace(true);
        self.reporter.beat();
        let pods = endings(&self.view.borrow());
        let rounds = rounds(&pods, self.periods);
        tell(format!(
            "shutting down: {} pods have {} s",
            pods.len(),
            self.periods.all.as_secs()
        ));
        for round in &rounds {
            let count = round.pods.len();
            let (began, end) = (Instant::now(), Instant::now() + round.at_most + SLACK);
            for (pod, grace_s) in &round.pods {
                let order = Order::Shutdown {
                    pod: pod.clone(),
                    grace_s: *grace_s,
                };
                let _ = self.orders.send(order).await;
            }
            let uids: BTreeSet<&PodUid> = round.pods.iter().map(|(uid, _)| uid).collect();
            let mut left = self.alive(&uids).await;
            while left > 0 && Instant::now() < end {
                tokio::time::sleep(LOOK).await;
                left = self.alive(&uids).await;
            }
            let took = began.elapsed().as_millis();
            tell(format!(
                "{count} pods, {left} still running after {took} ms"
            ));
        }
        // The last words: on the disk, and with the control plane if there is one.
        let end = Instant::now() + SLACK;
        let has_words = |pod: &Ending| records::read_final(&self.paths, &pod.uid).is_some();
        while !pods.iter().all(has_words) && Instant::now() < end {
            tokio::time::sleep(LOOK).await;
        }
        self.reporter.flushed(SLACK).await;
        let all: BTreeSet<&PodUid> = pods.iter().map(|pod| &pod.uid).collect();
        self.alive(&all).await
    }

    /// How many of these pods have a running container.
    async fn alive(&self, uids: &BTreeSet<&PodUid>) -> usize {
        match self.runtime.running(None).await {
            Ok(running) => {
                let pods: BTreeSet<&PodUid> = running.iter().map(|c| &c.run.pod).collect();
                pods.intersection(uids).count()
            }
            Err(error) => {
                warn!(%error, "look at what still runs");
                uids.len()
            }
        }
    }
}

/// The pods that have not ended yet.
fn endings(view: &View) -> Vec<Ending> {
    let has_ended = |pod: &Pod| pod.status.as_ref().is_some_and(status::is_final);
    let pods = view.pods.iter().filter(|(_, pod)| !has_ended(pod));
    pods.map(|(uid, pod)| {
        let spec = pod.spec.as_ref();
        let grace = spec.and_then(|spec| spec.termination_grace_period_seconds);
        Ending {
            uid: uid.clone(),
            priority: spec.and_then(|spec| spec.priority).unwrap_or(0),
            is_static: is_static(pod),
            grace_s: u64::try_from(grace.unwrap_or(30)).unwrap_or(0),
        }
    })
    .collect()
}

/// Whether the last word on a pod is that the machine went down.
pub fn has_ended(paths: &Paths, pod: &PodUid) -> bool {
    let last = records::read_final(paths, pod);
    let reason = last.and_then(|status| status.reason);
    reason.is_some_and(|reason| reason == REASON || reason == REFUSED)
}

/// `gantry-agent shutdown`: asks the agent of this machine and waits for the end.
pub async fn ask(paths: &Paths, mut tell: impl FnMut(&str)) -> Result<(), String> {
    ask_at(&socket(paths), &mut tell).await
}

async fn ask_at(socket: &Path, tell: &mut impl FnMut(&str)) -> Result<(), String> {
    let refused = |error: io::Error| {
        let path = socket.display();
        format!("no agent answers at {path} ({error}): pods are not ended in order")
    };
    let mut stream = UnixStream::connect(socket).await.map_err(refused)?;
    let request = format!("{REQUEST}\n");
    stream
        .write_all(request.as_bytes())
        .await
        .map_err(refused)?;
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next_line().await.map_err(refused)? {
        if line == "done" {
            return Ok(());
        }
        if let Some(words) = line.strip_prefix("error: ") {
            return Err(words.to_owned());
        }
        tell(&line);
    }
    Err("the agent has gone before the pods had ended".into())
}
