//! Tunnels: asked for on the feed, opened by the agent, handed to the one who asked.
//!
//! ```text
//! open(node, target) ─► OpenTunnel{id} on the session ─► agent: Feed.Tunnel, TunnelOpened{id} ─► answer
//!      └───────────────────────── waits, at most 10 s ◄──────────────────────────────────────────┘
//! ```
//! An id is random and good for one answer by the node it was meant for. Flow control is HTTP/2's
//! per stream plus bounded channels; [`carry`] splices both directions; dropping [`Tunnel`] ends the stream, and the agent ends what
//! is behind it.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{Stream, StreamExt as _, stream};
use gantry_api::proto;
use gantry_api::proto::open_tunnel::Target;
use gantry_api::proto::{tunnel_down, tunnel_up};
use gantry_api::status::{Reason, Status};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::timeout;
use tonic::Streaming;

use super::Inner;
use crate::server::identity::Identity;

/// Streams for logs and exec per node: the connection's window is sized for this many.
pub(super) const TUNNELS_PER_NODE_MAX: usize = 64;
/// How long an agent may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Input messages between a client and the agent.
const DOWN_QUEUE: usize = 4;

/// What a service answers with.
pub(super) type BoxedStream<T> = Pin<Box<dyn Stream<Item = Result<T, tonic::Status>> + Send>>;

type DownSender = mpsc::Sender<Result<proto::TunnelDown, tonic::Status>>;

/// An open tunnel; dropping it closes it.
pub(super) struct Tunnel {
    /// What the agent sends.
    pub(super) up: Streaming<proto::TunnelUp>,
    /// What it gets; the agent takes the end of this as the end of the tunnel.
    down: DownSender,
    _slot: OwnedSemaphorePermit,
}

struct Answer {
    up: Streaming<proto::TunnelUp>,
    down: DownSender,
    error: String,
}

struct Pending {
    node: String,
    answer: oneshot::Sender<Answer>,
}

/// Tunnels that were asked for and are not open yet.
#[derive(Default)]
pub(super) struct Tunnels {
    pending: Arc<Mutex<HashMap<String, Pending>>>,
}

/// Forgets an id when the one who asked has left or was served.
struct Forget {
    id: String,
    pending: Arc<Mutex<HashMap<String, Pending>>>,
}

fn lock(pending: &Mutex<HashMap<String, Pending>>) -> MutexGuard<'_, HashMap<String, Pending>> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Forget {
    fn drop(&mut self) {
        lock(&self.pending).remove(&self.id);
    }
}

impl Tunnels {
    /// Takes an agent's stream for the tunnel it names; returns what to send down on it.
    pub(super) fn answer(
        &self,
        identity: &Identity,
        opened: proto::TunnelOpened,
        up: Streaming<proto::TunnelUp>,
    ) -> Result<mpsc::Receiver<Result<proto::TunnelDown, tonic::Status>>, Status> {
        let gone = || Status::gone("nobody waits for this tunnel");
        let mut pending = lock(&self.pending);
        let node = pending
            .get(&opened.id)
            .map(|pending| pending.node.clone())
            .ok_or_else(gone)?;
        identity.check_node(&node)?;
        let waiting = pending.remove(&opened.id).ok_or_else(gone)?;
        drop(pending);
        let (down, receiver) = mpsc::channel(DOWN_QUEUE);
        let answer = Answer {
            up,
            down,
            error: opened.error,
        };
        waiting.answer.send(answer).map_err(|_| gone())?;
        Ok(receiver)
    }
}

impl Inner {
    /// Opens a tunnel to a pod on `node`.
    ///
    /// # Errors
    /// The node is not connected, has too many tunnels, does not answer in 10 s, or says why the
    /// target cannot be reached.
    pub(super) async fn open_tunnel(
        &self,
        node: &str,
        pod_uid: &str,
        target: Target,
    ) -> Result<Tunnel, Status> {
        let not_connected = || Status::unavailable(format!("node {node} is not connected"));
        let link = self.known_link(node).ok_or_else(not_connected)?;
        let session = link.state().tunnels.clone().ok_or_else(not_connected)?;
        let slot = link.tunnel_slots.clone().try_acquire_owned().map_err(|_| {
            let text = format!("node {node} serves {TUNNELS_PER_NODE_MAX} streams already: retry");
            Status::new(Reason::TooManyRequests, text)
        })?;
        let id = uuid::Uuid::new_v4().to_string();
        let (answer, answered) = oneshot::channel();
        let pending = self.tunnels.pending.clone();
        lock(&pending).insert(
            id.clone(),
            Pending {
                node: node.into(),
                answer,
            },
        );
        let _forget = Forget {
            id: id.clone(),
            pending,
        };

        let open = proto::OpenTunnel {
            id,
            target: Some(target),
            pod_uid: pod_uid.into(),
        };
        let answered = timeout(ANSWER_TIMEOUT, async {
            session.send(open).await.map_err(|_| not_connected())?;
            answered.await.map_err(|_| not_connected())
        });
        let slow = || Status::timeout(format!("node {node} did not open the stream in 10 s"));
        let answer = answered.await.map_err(|_| slow())??;
        if !answer.error.is_empty() {
            return Err(Status::bad_request(answer.error));
        }
        Ok(Tunnel {
            up: answer.up,
            down: answer.down,
            _slot: slot,
        })
    }
}

/// Carries both directions of a tunnel until one of its ends has gone.
pub(super) fn carry<I: Send + 'static, O: Send + 'static>(
    tunnel: Tunnel,
    input: Streaming<I>,
    wrap: fn(I) -> tunnel_down::Message,
    unwrap: fn(tunnel_up::Message) -> Option<O>,
) -> impl Stream<Item = Result<O, tonic::Status>> + Send + 'static {
    let forward = Forward(tokio::spawn(forward_input(
        input,
        tunnel.down.clone(),
        wrap,
    )));
    stream::unfold((tunnel, forward), move |(mut tunnel, forward)| async move {
        let item = loop {
            match tunnel.up.message().await {
                Ok(Some(up)) => {
                    if let Some(output) = up.message.and_then(unwrap) {
                        break Ok(output);
                    }
                }
                Ok(None) => break Err(lost("the stream ended")),
                Err(status) => break Err(lost(status.message())),
            }
        };
        Some((item, (tunnel, forward)))
    })
}

pub(super) fn lost(how: &str) -> tonic::Status {
    Status::unavailable(format!("the connection to the node was lost: {how}")).into()
}

pub(super) fn end_after_error<T: Send + 'static>(
    stream: impl Stream<Item = Result<T, tonic::Status>> + Send + 'static,
) -> BoxedStream<T> {
    end_after(stream, |_| false)
}

/// Ends a stream after the first error, and after the first item for which `last` holds.
pub(super) fn end_after<T: Send + 'static>(
    stream: impl Stream<Item = Result<T, tonic::Status>> + Send + 'static,
    last: impl Fn(&Result<T, tonic::Status>) -> bool + Send + 'static,
) -> BoxedStream<T> {
    let ended = stream.scan(false, move |ended, item| {
        if *ended {
            return std::future::ready(None);
        }
        *ended = item.is_err() || last(&item);
        std::future::ready(Some(item))
    });
    Box::pin(ended)
}

/// The task that carries a client's input; it ends with the output.
struct Forward(tokio::task::JoinHandle<()>);

impl Drop for Forward {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Carries input until the client has no more; the tunnel stays open for the output.
async fn forward_input<I>(
    mut input: Streaming<I>,
    down: DownSender,
    wrap: fn(I) -> tunnel_down::Message,
) {
    while let Ok(Some(message)) = input.message().await {
        if down
            .send(Ok(proto::TunnelDown {
                message: Some(wrap(message)),
            }))
            .await
            .is_err()
        {
            return;
        }
    }
}
