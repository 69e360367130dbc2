//! Metrics on a unix socket, `/run/gantry/metrics.sock`: no port is opened on a worker.
//!
//! `curl --unix-socket /run/gantry/metrics.sock http://node/metrics`, or any scraper that speaks HTTP
//! over such a socket. One request per connection; requests, their size, their number at a time
//! and the time they may take are bounded. The socket belongs to root and nobody else may connect.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::Collector;
use futures_util::future::BoxFuture;

use super::metrics::{self, AgentFigures};

/// Requests at a time; more wait.
const REQUESTS_MAX: usize = 4;
/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// For one request, from its first byte to the answer's last.
const PATIENCE: Duration = Duration::from_secs(10);

/// Gives the agent's own figures.
pub type Figures = Arc<dyn Fn() -> BoxFuture<'static, AgentFigures> + Send + Sync>;

/// Listens at `path`, replacing what an earlier agent left there.
pub fn listen(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves until `shutdown`.
pub async fn serve(
    listener: UnixListener,
    collector: Collector,
    figures: Figures,
    shutdown: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(REQUESTS_MAX));
    loop {
        let accepted = tokio::select! {
            // Cancel-safe: both only wait.
            () = shutdown.cancelled() => return,
            accepted = accept(&listener, &slots) => accepted,
        };
        let Some((stream, slot)) = accepted else {
            continue;
        };
        let (collector, figures) = (collector.clone(), figures.clone());
        tokio::spawn(async move {
            let done = tokio::time::timeout(PATIENCE, answer(stream, &collector, &figures)).await;
            debug!(?done, "metrics request");
            drop(slot);
        });
    }
}

async fn accept(
    listener: &UnixListener,
    slots: &Arc<Semaphore>,
) -> Option<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    // A slot first: what waits in the backlog costs nothing.
    let slot = slots.clone().acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _)) => Some((stream, slot)),
        Err(error) => {
            debug!(%error, "accept a metrics request");
            // Out of descriptors: do not spin.
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

async fn answer(
    mut stream: UnixStream,
    collector: &Collector,
    figures: &Figures,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut chunk = [0u8; 1024];
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        let length = stream.read(&mut chunk).await?;
        if length == 0 || head.len() + length > HEAD_BYTES_MAX {
            return Ok(()); // no request, or none that a scraper makes
        }
        head.extend_from_slice(&chunk[..length]);
    }
    let text = String::from_utf8_lossy(&head);
    let (status, body) = match path(&text) {
        Some("/metrics" | "/metrics/cadvisor" | "/metrics/resource") => {
            let sample = collector.sample().await;
            ("200 OK", metrics::render(&sample, &figures().await))
        }
        Some("/healthz") => ("200 OK", "ok".to_owned()),
        Some(_) => ("404 Not Found", "want /metrics or /healthz\n".to_owned()),
        None => ("405 Method Not Allowed", "want GET\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        metrics::CONTENT_TYPE,
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

/// The path of a GET request, without its query.
fn path(head: &str) -> Option<&str> {
    let target = head.strip_prefix("GET ")?.split(' ').next()?;
    target.split('?').next()
}

/// The agent's own resident memory, bytes.
pub fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroups::{Cgroups, Policy};
    use crate::paths::Paths;

    async fn ask(path: &Path, request: &str) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        let mut answer = String::new();
        // The server may hang up while too long a request is still being written.
        let _ = stream.write_all(request.as_bytes()).await;
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    #[tokio::test]
    async fn a_scraper_gets_what_it_asks_for_and_nonsense_gets_nothing() {
        let Ok(cgroups) = Cgroups::detect(Policy::default()) else {
            return eprintln!("skipped: no cgroups with the needed controllers");
        };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.sock");
        let paths = Paths::standard("/nowhere".into());
        let collector = Collector::new("n".into(), cgroups, paths);
        let figures: Figures = Arc::new(|| {
            Box::pin(std::future::ready(AgentFigures {
                evictions: 3,
                ..AgentFigures::default()
            }))
        });
        let shutdown = CancellationToken::new();
        std::fs::write(&path, "left by an earlier agent").unwrap();
        let listener = listen(&path).unwrap();
        let server = tokio::spawn(serve(listener, collector, figures, shutdown.clone()));
        let answer = ask(&path, "GET /metrics?x=1 HTTP/1.1\r\nHost: n\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("kubelet_evictions 3\n"), "{answer}");
        let answer = ask(&path, "GET /else HTTP/1.1\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
        let answer = ask(&path, "POST /metrics HTTP/1.1\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
        assert_eq!(ask(&path, &"x".repeat(HEAD_BYTES_MAX + 2000)).await, "");
        shutdown.cancel();
        server.await.unwrap();
    }
}
