//! The API: one TLS port, the gRPC services, and the registry that every write passes.
//!
//! ```text
//!  connection ─► TLS: a client certificate of our CA ─► Authorize (identity.rs) ─► Objects  (objects.rs)
//!                or none and a token (tokens.rs)                                ├► Pods, Feed (crate::feed)
//!                or neither ────────────────────────────────────────────────────► Joining (crate::joining)
//! ```
//! One of several control planes over etcd has [`front`] before the services: what it does not answer itself it
//! brings to the one that leads.
//!
//! Invariants: no request but `Join` is served without an identity; a slow or dead client holds memory only for
//! one stream window; a stop ends every stream within [`STREAM_END_DEADLINE`].

pub(crate) mod admit;
mod allocation;
pub(crate) mod audit;
mod commit;
mod event;
mod eviction;
mod families;
pub(crate) mod forwarded;
mod front;
pub mod identity;
mod maintenance;
mod merge;
mod object;
mod objects;
mod pod_admission;
mod qos;
pub(crate) mod rbac;
pub mod registry;
mod resize;
mod rules;
mod scale;
mod service;
mod table;
mod tls;
pub mod tokens;
mod upstream;
mod view;
mod watch;
mod write;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use gantry_api::proto::access_server::AccessServer;
use gantry_api::proto::objects_server::ObjectsServer;
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::service::{AxumRouter, Routes};

use crate::feed::Feed;
use crate::joining::Joining;
use identity::{Authenticator, Service};
use maintenance::MaintenanceService;
use objects::ObjectsService;

pub use audit::AuditSettings;
pub(crate) use eviction::covers;
pub(crate) use front::Front;
pub use object::{decode, present, to_value};
pub use registry::Registry;
pub use rules::Part;
pub use tls::{ServingCertificate, TlsError};
pub use tokens::Tokens;
pub use write::{WriteOptions, Written};

/// Largest request: one object of the largest size, and its envelope.
const REQUEST_BYTES_MAX: usize = 4 << 20;
/// Largest answer to one call: a list of everything.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// Streams that one connection may have open: an agent's tunnels and a user's watches.
const STREAM_COUNT_MAX: u32 = 512;
/// What a client may send on one stream before it is read.
const STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// What a client may send on all its streams: tunnels must not block the feed.
const CONNECTION_WINDOW_BYTES: u32 = 24 << 20;
/// A connection that says nothing for this long is asked whether it is alive.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// What the answer may take.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// What open streams may take to end after a stop.
const STREAM_END_DEADLINE: Duration = Duration::from_secs(5);

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The certificates do not fit.
    #[error("cannot set up TLS: {0}")]
    Tls(#[source] TlsError),
    /// One of several control planes has to end.
    #[error("{0}: start it again, it will follow")]
    Ended(String),
    /// The server ended by itself.
    #[error("the API server failed: {0}")]
    Serve(#[source] tonic::transport::Error),
}

/// The API over one registry, before it listens.
pub struct Server {
    authenticator: Authenticator,
    routes: Routes,
    tls: Arc<rustls::ServerConfig>,
    stop: CancellationToken,
}

impl Server {
    /// A server that shows `serving` and trusts clients of this CA (PEM).
    pub fn new(
        registry: &Registry,
        feed: &Feed,
        ca_certificate: &str,
        serving: ServingCertificate,
        tokens: &Tokens,
    ) -> Result<Server, ServeError> {
        let mut server = Server::reader(registry, ca_certificate, serving, tokens)?;
        let (pods, agents) = (
            server.authenticator.for_service(Service::Pods),
            server.authenticator.for_service(Service::Feed),
        );
        server.routes = server
            .routes
            .add_service(InterceptedService::new(feed.pods_server(), pods.clone()))
            .add_service(InterceptedService::new(feed.stats_server(), pods.clone()))
            .add_service(InterceptedService::new(feed.images_server(), pods))
            .add_service(InterceptedService::new(feed.feed_server(), agents));
        Ok(server)
    }

    /// The part that needs nothing but the registry.
    pub(crate) fn reader(
        registry: &Registry,
        ca_certificate: &str,
        serving: ServingCertificate,
        tokens: &Tokens,
    ) -> Result<Server, ServeError> {
        let tls = tls::config(ca_certificate, serving).map_err(ServeError::Tls)?;
        let stop = CancellationToken::new();
        let authenticator = Authenticator::new(registry.clone(), tokens.clone());
        let objects = ObjectsService::new(registry.clone(), tokens.clone(), stop.clone());
        let objects = ObjectsServer::new(objects)
            .max_decoding_message_size(REQUEST_BYTES_MAX)
            .max_encoding_message_size(ANSWER_BYTES_MAX);
        let routes = Routes::default()
            .add_service(InterceptedService::new(
                objects,
                authenticator.for_service(Service::Objects),
            ))
            .add_service(InterceptedService::new(
                AccessServer::new(rbac::AccessService::new(registry.clone())),
                authenticator.for_service(Service::Objects),
            ));
        Ok(Server {
            authenticator,
            routes,
            tls,
            stop,
        })
    }

    /// Lets machines join, and nodes renew their certificates.
    #[must_use]
    pub fn with_joining(mut self, joining: &Joining) -> Server {
        let admit = self.authenticator.for_joining();
        self.routes = self
            .routes
            .add_service(InterceptedService::new(joining.server(), admit));
        self
    }

    /// Lets administrators look at the store and take backups; the cluster's keys are below `data_dir`, the
    /// store's is in `store_key`.
    #[must_use]
    pub fn with_maintenance(
        mut self,
        registry: &Registry,
        data_dir: &Path,
        store_key: &Path,
    ) -> Server {
        let places = maintenance::Places {
            data_dir: data_dir.to_owned(),
            store_key: store_key.to_owned(),
        };
        let service = MaintenanceService::server(registry.clone(), places);
        let admit = self.authenticator.for_service(Service::Objects);
        self.routes = self
            .routes
            .add_service(InterceptedService::new(service, admit));
        self
    }

    /// Answers what `front` has it answer; the rest goes to who leads.
    #[must_use]
    pub(crate) fn behind(mut self, front: &Front) -> Server {
        let reads = std::mem::take(&mut self.routes);
        front.follow(reads);
        let router = AxumRouter::new().fallback_service(front.clone());
        self.routes = router.into();
        self
    }

    /// Serves until `stop`, then lets open streams end.
    pub async fn serve(
        self,
        listener: TcpListener,
        stop: CancellationToken,
    ) -> Result<(), ServeError> {
        let accepted = tls::accept(listener, self.tls, stop.clone());
        let incoming = ReceiverStream::new(accepted);
        let stopped = stop.clone().cancelled_owned();
        let router = tonic::transport::Server::builder()
            .max_concurrent_streams(STREAM_COUNT_MAX)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .add_routes(self.routes.prepare());
        let serving = router.serve_with_incoming_shutdown(incoming, stopped);
        // Not in the future that is given away: tonic drops it when the connections end first.
        let deadline = async {
            stop.cancelled().await;
            self.stop.cancel();
            tokio::time::sleep(STREAM_END_DEADLINE).await;
        };
        tokio::select! {
            result = serving => result.map_err(ServeError::Serve),
            () = deadline => {
                tracing::warn!("open connections were cut at the deadline");
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests;
