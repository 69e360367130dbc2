//! Where the feed's tunnels end: a container's log, a command in a container, its own streams, a
//! port of its pod; and, of the whole node, its usage, a volume's directory and its images.

mod images;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use gantry_api::proto;
use gantry_cni::netns::{self, Netns};
use jiff::{SignedDuration, Timestamp};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

use self::images::NodeImages;
use crate::dataplane::Dataplane;
use crate::explain;
use crate::feed::{TunnelError, TunnelTarget};
use crate::flows;
use crate::ids::{ContainerRun, PodUid};
use crate::images::ImageStore;
use crate::paths::Paths;
use crate::runtime::logs::{self, LogOptions};
use crate::runtime::{ExecSession, ExecSpec, RunningContainer, Runtime};
use crate::static_pods::Mirrors;
use crate::stats::Collector;
use crate::view::View;
use crate::volumes::local;

/// Loopback answers at once, or drops: then somebody filters it.
const CONNECT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// The pods of this node, as tunnels see them: through the runtime's records and log files.
pub struct PodTunnels {
    paths: Paths,
    runtime: Arc<dyn Runtime>,
    images: NodeImages,
    usage: Collector,
    mirrors: Mirrors,
    dataplane: Arc<dyn Dataplane>,
    flow_sources: OnceLock<flows::Sources>,
}

impl PodTunnels {
    /// Needs only what survives an agent restart.
    pub fn new(
        paths: Paths,
        runtime: Arc<dyn Runtime>,
        images: ImageStore,
        usage: Collector,
        mirrors: Mirrors,
        dataplane: Arc<dyn Dataplane>,
    ) -> Self {
        Self {
            paths,
            runtime,
            images: NodeImages::new(images),
            usage,
            mirrors,
            dataplane,
            flow_sources: OnceLock::new(),
        }
    }

    /// Whose images are in use, and who is who on the network of this node; the first call counts.
    pub fn follow(&self, node: &str, view: watch::Receiver<Arc<View>>) {
        self.images.follow(view.clone());
        let _ = self.flow_sources.set(flows::Sources {
            node: node.to_owned(),
            pods: self.paths.run.join("pods"),
            view,
            dataplane: self.dataplane.clone(),
        });
    }

    /// What is known of the network.
    fn sources(&self) -> Result<&flows::Sources, TunnelError> {
        let sources = self.flow_sources.get();
        sources.ok_or_else(|| TunnelError("the agent is starting: retry".into()))
    }

    /// The newest running run of a container.
    async fn newest(&self, pod: &PodUid, container: &str) -> Result<ContainerRun, TunnelError> {
        let running = self.running(pod).await?.into_iter();
        let found = running
            .map(|c| c.run)
            .filter(|run| run.name == container)
            .max_by_key(|run| run.attempt);
        found.ok_or_else(|| TunnelError(format!("container not found or not running: {container}")))
    }

    async fn running(&self, pod: &PodUid) -> Result<Vec<RunningContainer>, TunnelError> {
        let running = self.runtime.running(Some(pod)).await;
        running.map_err(|e| TunnelError(e.to_string()))
    }

    /// The network that the pod's containers are in, its own or the node's: by a running process,
    /// so that nothing has to be believed.
    async fn netns(&self, pod: &PodUid) -> Result<Netns, TunnelError> {
        for container in self.running(pod).await? {
            let pid = container.pid;
            let Ok(netns) = Netns::open(Path::new(&format!("/proc/{pid}/ns/net"))) else {
                continue;
            };
            // Still unreaped: the number was this container's when its namespace was opened.
            let records = self.paths.container_run(&container.run);
            if !records.join(gantry_shim::record::EXIT_FILE).exists() {
                return Ok(netns);
            }
        }
        Err(TunnelError("no container of the pod is running".into()))
    }
}

/// Connects inside `netns`. The socket stays in the namespace it was made in.
async fn connect(netns: &Netns, address: SocketAddr) -> Result<TcpStream, TunnelError> {
    let made = netns::within(netns, move || {
        let socket = std::net::TcpStream::connect_timeout(&address, CONNECT_TIMEOUT);
        let socket = socket.and_then(|s| s.set_nonblocking(true).map(|()| s));
        Ok(socket)
    });
    let socket = made.await.map_err(|e| TunnelError(e.to_string()))?;
    socket
        .and_then(TcpStream::from_std)
        .map_err(|e| TunnelError(format!("cannot connect to {address} in the pod: {e}")))
}

#[async_trait]
impl TunnelTarget for PodTunnels {
    async fn services(
        &self,
        request: &proto::ServicesRequest,
    ) -> Result<Vec<proto::ProgrammedService>, TunnelError> {
        let services = self.dataplane.services(request).await;
        services.map_err(|error| TunnelError(error.to_string()))
    }

    fn flows(
        &self,
        request: &proto::FlowsRequest,
    ) -> Result<BoxStream<'static, proto::NodeFlows>, TunnelError> {
        let flows = flows::watch(self.sources()?.clone(), request);
        flows.map_err(|error| TunnelError(error.to_string()))
    }

    async fn explain_client(
        &self,
        request: proto::ExplainClient,
        pod: PodUid,
    ) -> Result<proto::ExplainHalf, TunnelError> {
        let pod = self.mirrors.behind(pod);
        let half = explain::client(self.sources()?, &pod, request).await;
        half.map_err(|error| TunnelError(error.to_string()))
    }

    async fn explain_server(
        &self,
        request: proto::ExplainServer,
    ) -> Result<proto::ExplainHalf, TunnelError> {
        let half = explain::server(self.sources()?, request).await;
        half.map_err(|error| TunnelError(error.to_string()))
    }

    fn drops(&self) -> Result<Vec<proto::DroppedPackets>, TunnelError> {
        let counts = self.dataplane.counts();
        let counts = counts.map_err(|error| TunnelError(error.to_string()))?;
        let drops = counts.drops.into_iter();
        Ok(drops
            .map(|(reason, packets)| proto::DroppedPackets {
                reason: reason.to_owned(),
                packets,
            })
            .collect())
    }

    async fn logs(
        &self,
        request: proto::LogsRequest,
        pod: PodUid,
    ) -> Result<BoxStream<'static, Result<Bytes, TunnelError>>, TunnelError> {
        let pod = self.mirrors.behind(pod);
        let directory = self.paths.pod_log(&request.namespace, &request.pod, &pod);
        let attempt = attempt(&directory.join(&request.container), request.previous)?;
        let run = ContainerRun {
            pod,
            name: request.container.clone(),
            attempt,
        };
        let path = Paths::container_log(&directory, &run);
        let stream = logs::stream(&path, &self.paths.container_run(&run), options(&request)?);
        Ok(stream
            .map(|item| item.map_err(|e| TunnelError(e.to_string())))
            .boxed())
    }

    async fn usage(&self) -> Result<proto::NodeUsage, TunnelError> {
        let mut usage = self.usage.usage().await;
        for pod in &mut usage.pods {
            if let Some(shown) = self.mirrors.shown(&pod.uid) {
                pod.uid = shown.to_string();
            }
        }
        Ok(usage)
    }

    async fn remove_volume(&self, name: &str) -> Result<(), TunnelError> {
        let removed = local::remove(&self.paths, name).await;
        removed.map_err(|e| TunnelError(e.to_string()))
    }

    async fn images(
        &self,
        request: proto::ImagesRequest,
        archive: mpsc::Receiver<Bytes>,
        answers: mpsc::Sender<proto::images_answer::Answer>,
    ) -> Result<(), TunnelError> {
        self.images.serve(request, archive, &answers).await
    }

    async fn exec(&self, start: proto::ExecStart, pod: PodUid) -> Result<ExecSession, TunnelError> {
        let pod = self.mirrors.behind(pod);
        let run = self.newest(&pod, &start.container).await?;
        if start.attach {
            return self.attach(&run, &start).await;
        }
        let spec = ExecSpec {
            run,
            command: start.command,
            stdin: start.stdin,
            tty: start.tty,
        };
        let session = self
            .runtime
            .exec(&spec)
            .await
            .map_err(|e| TunnelError(e.to_string()))?;
        resize(&session.resize, start.size);
        Ok(session)
    }

    async fn forward(&self, port: u16, pod: PodUid) -> Result<TcpStream, TunnelError> {
        let netns = self.netns(&self.mirrors.behind(pod)).await?;
        let v4 = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        let v6 = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), port);
        match connect(&netns, v4).await {
            Ok(socket) => Ok(socket),
            Err(error) => connect(&netns, v6).await.map_err(|_| error),
        }
    }
}

impl PodTunnels {
    async fn attach(
        &self,
        run: &ContainerRun,
        start: &proto::ExecStart,
    ) -> Result<ExecSession, TunnelError> {
        let attached = self.runtime.attach(run, start.stdin).await;
        let mut session = attached.map_err(|e| TunnelError(e.to_string()))?;
        if start.tty {
            // A terminal's output has no second stream, and its client would wait for none.
            session.stderr = None;
        }
        resize(&session.resize, start.size);
        Ok(session)
    }
}

/// The first size: the queue is empty.
fn resize(sizes: &mpsc::Sender<(u16, u16)>, size: Option<proto::TerminalSize>) {
    if let Some(size) = size {
        let size = (cells(size.columns), cells(size.rows));
        let _ = sizes.try_send(size);
    }
}

/// The newest run that has a log, or the one before it.
fn attempt(directory: &Path, previous: bool) -> Result<u32, TunnelError> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let number = |entry: std::fs::DirEntry| {
        entry
            .file_name()
            .to_string_lossy()
            .strip_suffix(".log")?
            .parse::<u32>()
            .ok()
    };
    let mut attempts: Vec<u32> = entries.filter_map(number).collect();
    attempts.sort_unstable();
    if previous {
        attempts.pop();
    }
    attempts.pop().ok_or_else(|| {
        TunnelError(match previous {
            true => "previous terminated container not found".into(),
            false => "the container has not been started yet".into(),
        })
    })
}

fn options(request: &proto::LogsRequest) -> Result<LogOptions, TunnelError> {
    let count = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok());
    let since = match (request.since_s, request.since_time.as_str()) {
        (Some(seconds), _) => {
            // A span longer than all time since 1970 means "everything".
            Timestamp::now()
                .checked_sub(SignedDuration::from_secs(seconds))
                .ok()
        }
        (None, "") => None,
        (None, text) => Some(
            text.parse::<Timestamp>()
                .map_err(|e| TunnelError(format!("--since-time {text:?}: {e}")))?,
        ),
    };
    Ok(LogOptions {
        tail_lines: count(request.tail_lines),
        since,
        timestamps: request.timestamps,
        follow: request.follow,
        limit_bytes: count(request.limit_bytes),
    })
}

fn cells(count: u32) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}
