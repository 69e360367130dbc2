//! Where the feed's tunnels end: a container's log, a command in a container.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use gantry_api::proto;
use jiff::{SignedDuration, Timestamp};

use crate::feed::{TunnelError, TunnelTarget};
use crate::ids::{ContainerRun, PodUid};
use crate::paths::Paths;
use crate::runtime::logs::{self, LogOptions};
use crate::runtime::{ExecSession, ExecSpec, Runtime};
use crate::stats::Collector;

/// The pods of this node, as tunnels see them: through the runtime's records and log files.
pub struct PodTunnels {
    paths: Paths,
    runtime: Arc<dyn Runtime>,
    usage: Collector,
}

impl PodTunnels {
    /// Needs only what survives an agent restart.
    pub fn new(paths: Paths, runtime: Arc<dyn Runtime>, usage: Collector) -> Self {
        Self {
            paths,
            runtime,
            usage,
        }
    }

    /// The newest started run of a container.
    async fn newest(&self, pod: &PodUid, container: &str) -> Result<ContainerRun, TunnelError> {
        let sandboxes = self
            .runtime
            .list()
            .await
            .map_err(|e| TunnelError(e.to_string()))?;
        let found = sandboxes
            .into_iter()
            .filter(|s| s.pod == *pod)
            .flat_map(|s| s.containers)
            .filter(|c| c.run.name == container && c.started_at.is_some() && c.exit.is_none())
            .map(|c| c.run)
            .max_by_key(|run| run.attempt);
        found.ok_or_else(|| TunnelError(format!("container not found or not running: {container}")))
    }
}

#[async_trait]
impl TunnelTarget for PodTunnels {
    async fn logs(
        &self,
        request: proto::LogsRequest,
        pod: PodUid,
    ) -> Result<BoxStream<'static, Result<Bytes, TunnelError>>, TunnelError> {
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
        Ok(self.usage.usage().await)
    }

    async fn exec(&self, start: proto::ExecStart, pod: PodUid) -> Result<ExecSession, TunnelError> {
        let run = self.newest(&pod, &start.container).await?;
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
        if let Some(size) = start.size {
            let size = (cells(size.columns), cells(size.rows));
            let _ = session.resize.send(size).await;
        }
        Ok(session)
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
