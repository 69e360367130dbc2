//! Our connections to the one that leads.
//!
//! ```text
//!  request ─► a connection with room (STREAMS_MAX), or a new one ─► answer, whose body holds its place
//!  another leader, or none ─► everything under way at the old one ends
//! ```
//! A connection carries few enough streams that all of them can stand still with full windows, and none of them
//! waits for another: so a stalled log reader stops only itself, as on a connection of its own.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{Request, Response};
use http_body_util::{BodyStream, StreamBody};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::{Body as HttpBody, Service as _};
use tonic::service::AxumBody;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::{CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES};
use crate::certificates::Certificates;
use crate::store::Leader;

/// Streams of one connection.
const STREAMS_MAX: usize = 64;
const _: () =
    assert!(STREAMS_MAX * STREAM_WINDOW_BYTES as usize <= CONNECTION_WINDOW_BYTES as usize);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const KEEPALIVE: Duration = Duration::from_secs(5);

struct Connection {
    channel: Channel,
    streams: Arc<AtomicUsize>,
}

#[derive(Default)]
struct State {
    /// To whom the connections are.
    leader: Leader,
    connections: Vec<Connection>,
    /// Ends what is under way.
    ended: CancellationToken,
}

/// See the module; clones share it.
#[derive(Clone)]
pub(super) struct Upstream {
    certificates: Arc<Certificates>,
    state: Arc<Mutex<State>>,
}

/// A place on a connection.
pub(super) struct Placed {
    channel: Channel,
    place: Place,
    ended: CancellationToken,
}

/// Held as long as the stream is open.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Upstream {
    pub(super) fn new(certificates: Arc<Certificates>) -> Upstream {
        Upstream {
            certificates,
            state: Arc::default(),
        }
    }

    /// Ends what is under way at a leader as soon as it is none.
    pub(super) async fn follow(self, mut leader: watch::Receiver<Leader>, stop: CancellationToken) {
        while let Some(Ok(())) = stop.run_until_cancelled(leader.changed()).await {
            let now = leader.borrow_and_update().clone();
            self.turn_to(&now);
        }
        self.turn_to(&Leader::default());
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn_to(&self, leader: &Leader) {
        let mut state = self.state();
        if state.leader != *leader {
            let old = std::mem::take(&mut *state);
            state.leader = leader.clone();
            drop(state);
            old.ended.cancel();
        }
    }

    /// A place on a connection to this leader.
    pub(super) async fn place(&self, leader: &Leader, url: &str) -> Result<Placed, String> {
        self.turn_to(leader);
        if let Some(placed) = self.state().place() {
            return Ok(placed);
        }
        let channel = self.connect(url).await?;
        let mut state = self.state();
        if state.leader != *leader {
            return Err(format!("{url} does not lead any more"));
        }
        state.connections.push(Connection {
            channel,
            streams: Arc::default(),
        });
        state.place().ok_or_else(|| format!("{url}: no room"))
    }

    async fn connect(&self, url: &str) -> Result<Channel, String> {
        let words = |error: &dyn std::error::Error| match error.source() {
            Some(source) => format!("the leader {url}: {error}: {source}"),
            None => format!("the leader {url}: {error}"),
        };
        let ours = self.certificates.control_plane();
        let ours = ours.map_err(|error| words(&error))?;
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.certificates.ca()))
            .identity(Identity::from_pem(&ours.certificate, &ours.key));
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|error| words(&error))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .tls_config(tls)
            .map_err(|error| words(&error))?;
        match tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect()).await {
            Ok(connected) => connected.map_err(|error| words(&error)),
            Err(_) => Err(format!("the leader {url} does not answer")),
        }
    }

    /// A connection that failed is not used again.
    fn leave(&self, streams: &Arc<AtomicUsize>) {
        let mut state = self.state();
        state
            .connections
            .retain(|connection| !Arc::ptr_eq(&connection.streams, streams));
    }
}

impl State {
    fn place(&mut self) -> Option<Placed> {
        let has_room = |it: &&Connection| it.streams.load(Ordering::Relaxed) < STREAMS_MAX;
        let connection = self.connections.iter().find(has_room)?;
        connection.streams.fetch_add(1, Ordering::Relaxed);
        Some(Placed {
            channel: connection.channel.clone(),
            place: Place(connection.streams.clone()),
            ended: self.ended.clone(),
        })
    }
}

fn gone() -> tonic::Status {
    let text =
        "the control plane that leads has gone: what was under way there may have been done or not";
    gantry_api::status::Status::unavailable(text).into()
}

impl Placed {
    /// Sends the request; its answer's body ends with an error when the leader is none any more.
    pub(super) async fn send(
        mut self,
        upstream: &Upstream,
        request: Request<AxumBody>,
    ) -> Result<Response<Body>, tonic::Status> {
        let request = request.map(Body::new);
        let asked = async {
            std::future::poll_fn(|context| self.channel.poll_ready(context)).await?;
            self.channel.call(request).await
        };
        let answer = match self.ended.run_until_cancelled(asked).await {
            Some(Ok(answer)) => answer,
            Some(Err(error)) => {
                upstream.leave(&self.place.0);
                tracing::debug!(%error, "the leader did not answer");
                return Err(gone());
            }
            None => return Err(gone()),
        };
        let (ended, place) = (self.ended, self.place);
        Ok(answer.map(|body| Body::new(carried(body, ended, place))))
    }
}

/// The body of an answer on its way, with its place on the connection.
fn carried(
    body: Body,
    ended: CancellationToken,
    place: Place,
) -> impl HttpBody<Data = Bytes, Error = tonic::Status> + Send {
    let under_way = Some((BodyStream::new(body), ended, place));
    StreamBody::new(stream::unfold(under_way, |under_way| async {
        let (mut frames, ended, place) = under_way?;
        // Cancel safe: a frame that was not taken is lost with the body.
        match ended.run_until_cancelled(frames.next()).await {
            Some(frame) => Some((frame?, Some((frames, ended, place)))),
            None => Some((Err(gone()), None)),
        }
    }))
}
