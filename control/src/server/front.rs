//! Before the services of one of several control planes over etcd: what it answers itself, and what goes to the
//! one that leads.
//!
//! ```text
//!  request ─► a read? ─► wait until the index is as new as etcd ─► own services
//!               │ no
//!               ├─ we lead ─► own services
//!               └─ we follow ─► the leader, over our own connection (upstream.rs), with who asks
//!                                 └─ none yet: wait HOLD for one; it may be us
//! ```
//! Reads and watches are answered here, from the same index with the same revisions on every control plane. What
//! writes, and everything that concerns the sessions of agents (logs, exec, joining), needs what only the leader
//! has in memory. It goes there as HTTP: no message is decoded, streams stay streams in both directions.
//!
//! Who asks is said by the client's certificate, which this control plane has verified and sends along in
//! [`forwarded::CERTIFICATE`]; the leader believes that of a certificate of the group
//! [`super::identity::CONTROL_GROUP`] alone, which nobody but the owner of the CA's key can make. A token goes
//! along as it is.
//!
//! Invariants: a request is sent on at most once, and never a second time by who got it so; what was under way at
//! a leader that is none any more ends with an error instead of waiting for it.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use gantry_api::status::Status;
use http::{Request, Response};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::service::{AxumBody, Routes};

use super::upstream::Upstream;
use super::{Server, forwarded};
use crate::certificates::Certificates;
use crate::store::{Leader, Replica, Store};

/// How long a request waits for somebody to lead: an election takes less.
const HOLD: Duration = Duration::from_secs(8);
/// Between two looks while nobody does, or the one that does is not reached.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What every control plane answers itself.
const READS: [&str; 11] = [
    "/gantry.v1.Objects/Get",
    "/gantry.v1.Objects/List",
    "/gantry.v1.Objects/Watch",
    "/gantry.v1.Objects/Table",
    "/gantry.v1.Objects/Kinds",
    "/gantry.v1.Access/Review",
    "/gantry.v1.Access/Rules",
    "/gantry.v1.Access/WhoAmI",
    "/gantry.v1.Store/Backup",
    "/gantry.v1.Store/Read",
    "/gantry.v1.Store/Status",
];

/// Whose services answer.
enum Mode {
    /// Reads alone.
    Follows(Routes),
    /// Everything.
    Leads(Routes),
}

struct Inner {
    store: Store,
    leader: watch::Receiver<Leader>,
    /// Ours, as the leader's key names it.
    us: Replica,
    mode: ArcSwap<Mode>,
    upstream: Upstream,
    stop: CancellationToken,
}

/// See the module; clones share it.
#[derive(Clone)]
pub(crate) struct Front {
    inner: Arc<Inner>,
}

impl Front {
    /// Answers nothing before [`Front::follow`].
    pub(crate) fn new(
        store: Store,
        leader: watch::Receiver<Leader>,
        us: &Replica,
        certificates: &Arc<Certificates>,
        stop: &CancellationToken,
    ) -> Front {
        let upstream = Upstream::new(certificates.clone());
        tokio::spawn(upstream.clone().follow(leader.clone(), stop.clone()));
        let inner = Inner {
            store,
            leader,
            us: us.clone(),
            mode: ArcSwap::from_pointee(Mode::Follows(Routes::default())),
            upstream,
            stop: stop.clone(),
        };
        Front {
            inner: Arc::new(inner),
        }
    }

    /// Answers reads by these.
    pub(super) fn follow(&self, reads: Routes) {
        let mode = Mode::Follows(reads.prepare());
        self.inner.mode.store(Arc::new(mode));
    }

    /// Answers everything by the services of this server from now on.
    pub(crate) fn lead(&self, server: Server) {
        let mode = Mode::Leads(server.routes.prepare());
        self.inner.mode.store(Arc::new(mode));
        // The streams of those services end with this one's.
        let (stop, streams) = (self.inner.stop.clone(), server.stop);
        tokio::spawn(async move {
            stop.cancelled().await;
            streams.cancel();
        });
    }
}

async fn serve(routes: &Routes, request: Request<AxumBody>) -> Response<Body> {
    let answer = routes.clone().call(request).await;
    answer.unwrap_or_else(|never| match never {})
}

fn unavailable(text: impl Into<String>) -> tonic::Status {
    Status::unavailable(text.into()).into()
}

impl Inner {
    async fn answer(&self, request: Request<AxumBody>) -> Result<Response<Body>, tonic::Status> {
        if READS.contains(&request.uri().path()) {
            let fresh = self.store.fresh().await;
            fresh.map_err(|error| unavailable(format!("etcd does not answer: {error}")))?;
            return Ok(match &*self.mode.load_full() {
                Mode::Follows(routes) | Mode::Leads(routes) => serve(routes, request).await,
            });
        }
        let was_forwarded = request.headers().contains_key(forwarded::MARK);
        let deadline = Instant::now() + HOLD;
        let mut reason = "no control plane leads".to_owned();
        loop {
            if let Mode::Leads(routes) = &*self.mode.load_full() {
                return Ok(serve(routes, request).await);
            }
            let leader = self.leader.borrow().clone();
            match &leader.replica {
                None => {}
                // We have been elected a moment ago, or were before we were started again.
                Some(replica) if replica.url == self.us.url => {}
                Some(_) if was_forwarded => {
                    return Err(unavailable("this control plane does not lead any more"));
                }
                Some(replica) => match self.upstream.place(&leader, &replica.url).await {
                    Ok(place) => {
                        let request = forwarded::mark(request)?;
                        return place.send(&self.upstream, request).await;
                    }
                    Err(error) => reason = error,
                },
            }
            if Instant::now() >= deadline {
                return Err(unavailable(format!("{reason}: try again")));
            }
            tokio::select! {
                // Both arms are cancel safe.
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = self.stop.cancelled() => return Err(unavailable("the server is stopping")),
            }
        }
    }
}

impl Service<Request<AxumBody>> for Front {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<AxumBody>) -> Self::Future {
        let inner = self.inner.clone();
        Box::pin(async move {
            let answer = inner.answer(request).await;
            Ok(answer.unwrap_or_else(|status| status.into_http()))
        })
    }
}
