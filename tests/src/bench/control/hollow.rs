//! Hollow agents: the agent's own feed ([`gantry_agent::feed`]: its stream, its digests, its file, its
//! reports) without a machine behind it. A pod runs as soon as it is seen, and everything common is
//! programmed as soon as it is known.
//!
//! ```text
//!  gantry-control ◄── mTLS, one connection each ──► feed::run ──► View ──► follow: statuses, acks
//!                                                      └── its file: tmpfs, so that 5,000 disks are not one
//! ```

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures_util::stream::BoxStream;
use gantry_agent::feed::{self, Handle, NodeInfoSource, TunnelError, TunnelTarget};
use gantry_agent::ids::PodUid;
use gantry_agent::paths::Paths;
use gantry_agent::runtime::ExecSession;
use gantry_agent::view::{ServiceName, View};
use gantry_api::k8s_openapi::api::core::v1::{Node, Pod, PodStatus};
use gantry_api::proto;
use gantry_control::pki::Authority;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::super::api::NAMESPACE;
use super::seed;

/// The Service whose changes are timed.
pub(super) const PROBE: &str = "probe";
/// Agents that are not live yet.
const JOINING_MAX: usize = 64;
const JOIN_TIMEOUT: Duration = Duration::from_secs(900);

/// A change of the Service has reached an agent.
pub(super) struct Arrival {
    pub(super) port: u32,
    pub(super) at: Instant,
}

#[derive(Default)]
struct Counts {
    /// Agents whose view is the control plane's.
    live: AtomicUsize,
    /// Pods in all views.
    pods: AtomicUsize,
}

/// So many agents. Dropping them ends them.
pub(super) struct Fleet {
    agents: Vec<feed::Reporter>,
    counts: Arc<Counts>,
    pub(super) arrivals: mpsc::UnboundedReceiver<Arrival>,
    stop: CancellationToken,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Nobody asks a hollow node for anything.
struct Nothing;

fn nothing() -> TunnelError {
    TunnelError("this node is hollow".into())
}

#[tonic::async_trait]
impl TunnelTarget for Nothing {
    async fn logs(
        &self,
        _: proto::LogsRequest,
        _: PodUid,
    ) -> Result<BoxStream<'static, Result<Bytes, TunnelError>>, TunnelError> {
        Err(nothing())
    }

    async fn forward(&self, _: u16, _: PodUid) -> Result<tokio::net::TcpStream, TunnelError> {
        Err(nothing())
    }

    async fn exec(&self, _: proto::ExecStart, _: PodUid) -> Result<ExecSession, TunnelError> {
        Err(nothing())
    }
}

impl Fleet {
    /// Starts them, not all at once, and waits until the last one is live.
    ///
    /// * `dir` – their files, on tmpfs; what an earlier fleet has left there is taken up.
    pub(super) async fn start(
        server: &str,
        data: &Path,
        dir: &Path,
        count: usize,
        mut told: impl FnMut(usize),
    ) -> Result<Self> {
        let authority = Authority::open(data)?;
        let (arrived, arrivals) = mpsc::unbounded_channel();
        let mut fleet = Self {
            agents: Vec::with_capacity(count),
            counts: Arc::default(),
            arrivals,
            stop: CancellationToken::new(),
        };
        let began = Instant::now();
        let mut last = 0;
        while fleet.live() < count {
            while fleet.agents.len() < count && fleet.agents.len() < fleet.live() + JOINING_MAX {
                let number = fleet.agents.len();
                let reporter = fleet.start_one(server, &authority, dir, number, &arrived)?;
                fleet.agents.push(reporter);
            }
            if fleet.live() >= last + JOINING_MAX {
                last = fleet.live();
                told(last);
            }
            if began.elapsed() > JOIN_TIMEOUT {
                bail!(
                    "{} of {count} agents are live after {JOIN_TIMEOUT:?}",
                    fleet.live()
                );
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(fleet)
    }

    fn start_one(
        &self,
        server: &str,
        authority: &Authority,
        dir: &Path,
        number: usize,
        arrived: &mpsc::UnboundedSender<Arrival>,
    ) -> Result<feed::Reporter> {
        let name = seed::node_name(number);
        let own = dir.join(&name);
        let credentials = own.join("credentials");
        std::fs::create_dir_all(&own).with_context(|| own.display().to_string())?;
        authority.ensure_agent(&credentials, &name)?;
        let mut paths = Paths::standard(PathBuf::from("/nonexistent"));
        (paths.lib, paths.run) = (own.clone(), own.join("run"));
        let config = feed::Config::new(server.into(), credentials, name, &paths);
        let node: Node = serde_json::from_value(seed::machine(number))?;
        let info: NodeInfoSource = Arc::new(move || node.clone());
        let handle = feed::run(config, info, Arc::new(Nothing), self.stop.clone())?;
        let reporter = handle.reporter.clone();
        let (counts, stop) = (self.counts.clone(), self.stop.clone());
        let arrived = arrived.clone();
        tokio::spawn(async move {
            stop.run_until_cancelled(follow(handle, number, &counts, &arrived))
                .await;
        });
        Ok(reporter)
    }

    fn live(&self) -> usize {
        self.counts.live.load(Ordering::Relaxed)
    }

    /// Pods that the agents hold.
    pub(super) fn pods(&self) -> usize {
        self.counts.pods.load(Ordering::Relaxed)
    }

    /// Until the control plane holds everything that was reported.
    pub(super) async fn settled(&self, patience: Duration) -> Result<()> {
        let began = Instant::now();
        for agent in &self.agents {
            agent
                .flushed(patience.saturating_sub(began.elapsed()))
                .await;
        }
        if began.elapsed() > patience {
            bail!("statuses are still on their way after {patience:?}");
        }
        Ok(())
    }

    /// Streams that broke, of all agents.
    pub(super) fn broken(&self) -> u64 {
        let of_agent = |agent: &feed::Reporter| agent.counters().streams_broken;
        self.agents.iter().map(of_agent).sum()
    }
}

/// What a node does with its view, without doing it.
async fn follow(
    mut handle: Handle,
    number: usize,
    counts: &Counts,
    arrived: &mpsc::UnboundedSender<Arrival>,
) {
    let probe = ServiceName {
        namespace: NAMESPACE.into(),
        name: PROBE.into(),
    };
    let mut known: HashSet<PodUid> = HashSet::new();
    let (mut is_live, mut last) = (false, 0);
    while handle.view.changed().await.is_ok() {
        let view: Arc<View> = handle.view.borrow_and_update().clone();
        let at = Instant::now();
        let port = view.services.get(&probe).and_then(|s| s.ports.first());
        let port = port.map_or(0, |port| port.port);
        if port != last {
            last = port;
            // Nobody listens any more: the benchmark has ended.
            let _ = arrived.send(Arrival { port, at });
        }
        for (uid, pod) in view.pods.iter() {
            if known.insert(uid.clone()) {
                counts.pods.fetch_add(1, Ordering::Relaxed);
                run(&handle.reporter, uid, pod, number);
            }
        }
        handle.reporter.programmed(view.rev, Vec::new());
        // Every stream begins with a commit, and a view from the file is no change.
        if !std::mem::replace(&mut is_live, true) {
            counts.live.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Says that the pod runs and is ready.
fn run(reporter: &feed::Reporter, uid: &PodUid, pod: &Pod, number: usize) {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let now = "2026-01-01T00:00:00Z";
    let condition =
        |type_: &str| json!({"type": type_, "status": "True", "lastTransitionTime": now});
    let address = format!("100.{}.{}.9", 64 + (number >> 8), number & 0xff);
    let status = json!({
        "phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "hostIP": "172.20.0.1",
        "startTime": now,
        "conditions": [condition("Initialized"), condition("Ready"), condition("ContainersReady")],
        "containerStatuses": [{
            "name": "web", "image": "registry.example/web:1.27", "imageID": "sha256:0", "ready": true,
            "restartCount": 0, "started": true, "containerID": format!("gantry://{uid}/web/0"),
            "state": {"running": {"startedAt": now}},
        }],
    });
    let Ok(status) = serde_json::from_value::<PodStatus>(status) else {
        return;
    };
    let (namespace, name) = (text(&pod.metadata.namespace), text(&pod.metadata.name));
    reporter.status(uid, &namespace, &name, &status, false, false);
}
