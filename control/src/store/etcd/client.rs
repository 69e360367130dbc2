//! A connection to one of etcd's servers, and to another one when that fails.
//!
//! ```text
//!  call ─► connected? ─► answer
//!            │ no, or the connection breaks: next server
//! ```
//! An error says whether the call can have had an effect ([`Failure`]): what was never sent, or was refused
//! before it was proposed, is tried again elsewhere; what may have happened is told. A server that has stopped
//! without a word is noticed by the first call that times out; streams leave it with that call ([`Open::left`]).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::proto::kv_client::KvClient;
use super::proto::lease_client::LeaseClient;
use super::proto::maintenance_client::MaintenanceClient;
use super::proto::watch_client::WatchClient;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// What a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// What a call may take: etcd answers within its election timeout, or says that it cannot.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// etcd's servers refuse to be asked more often whether they are alive.
const KEEPALIVE: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer: a page of a list.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// Where etcd is, and how it is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Servers {
    /// `https://a:2379`, in the order in which they are tried.
    pub urls: Vec<String>,
    /// PEM: the CA of the servers' certificates, and our own certificate with its key.
    pub tls: Option<Tls>,
}

/// See [`Servers::tls`].
#[derive(Clone, PartialEq, Eq)]
pub struct Tls {
    /// The CA of the servers' certificates.
    pub ca: String,
    /// Our certificate and its key.
    pub client: Option<(String, String)>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

/// Why a call did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    /// Nothing has happened; another try may succeed.
    #[error("{0}")]
    NotDone(String),
    /// It may have happened or may yet.
    #[error("{0}")]
    Unknown(String),
    /// etcd says no, and would again.
    #[error("{0}")]
    Refused(String),
}

impl Failure {
    fn of(status: &tonic::Status, url: &str) -> Failure {
        let words = format!("{url}: {}", status.message());
        let says = |text: &str| status.message().contains(text);
        match status.code() {
            tonic::Code::Unavailable if says("no leader") || says("not capable") => {
                Failure::NotDone(words)
            }
            tonic::Code::ResourceExhausted if says("too many requests") => Failure::NotDone(words),
            tonic::Code::InvalidArgument
            | tonic::Code::PermissionDenied
            | tonic::Code::Unauthenticated
            | tonic::Code::ResourceExhausted
            | tonic::Code::OutOfRange
            | tonic::Code::NotFound
            | tonic::Code::FailedPrecondition => Failure::Refused(words),
            _ => Failure::Unknown(words),
        }
    }
}

struct Connected {
    url: String,
    channel: Channel,
    left: CancellationToken,
}

struct State {
    /// The server to be tried next.
    next: usize,
    connected: Option<Arc<Connected>>,
}

/// See the module; clones share it.
#[derive(Clone)]
pub(super) struct Client {
    servers: Arc<Servers>,
    state: Arc<Mutex<State>>,
}

/// One server's connection, for a call or a stream.
#[derive(Clone)]
pub(super) struct Open {
    connected: Arc<Connected>,
}

impl Open {
    pub(super) fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.connected.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    pub(super) fn watch(&self) -> WatchClient<Channel> {
        WatchClient::new(self.connected.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    pub(super) fn lease(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.connected.channel.clone())
    }

    pub(super) fn maintenance(&self) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.connected.channel.clone())
    }

    /// Returns when a call on this connection has failed: what else is open on it will not do better.
    pub(super) async fn left(&self) {
        self.connected.left.cancelled().await;
    }

    pub(super) fn url(&self) -> &str {
        &self.connected.url
    }
}

impl Client {
    pub(super) fn new(servers: Servers) -> Client {
        Client {
            servers: Arc::new(servers),
            state: Arc::new(Mutex::new(State {
                next: 0,
                connected: None,
            })),
        }
    }

    pub(super) fn servers(&self) -> &Servers {
        &self.servers
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection in use, or a new one to the next server that takes one.
    pub(super) async fn open(&self) -> Result<Open, Failure> {
        if let Some(connected) = self.state().connected.clone() {
            return Ok(Open { connected });
        }
        let mut last = Failure::NotDone("no server is given".to_owned());
        for _ in 0..self.servers.urls.len() {
            let url = {
                let mut state = self.state();
                let url = self.servers.urls[state.next % self.servers.urls.len()].clone();
                state.next += 1;
                url
            };
            match self.connect(&url).await {
                Ok(channel) => {
                    let connected = Arc::new(Connected {
                        url,
                        channel,
                        left: CancellationToken::new(),
                    });
                    self.state().connected = Some(connected.clone());
                    return Ok(Open { connected });
                }
                Err(reason) => last = Failure::NotDone(reason),
            }
        }
        Err(last)
    }

    async fn connect(&self, url: &str) -> Result<Channel, String> {
        let words = |error: &dyn std::error::Error| match error.source() {
            Some(source) => format!("{url}: {error}: {source}"),
            None => format!("{url}: {error}"),
        };
        let mut endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|error| words(&error))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        if let Some(tls) = &self.servers.tls {
            let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&tls.ca));
            if let Some((certificate, key)) = &tls.client {
                config = config.identity(Identity::from_pem(certificate, key));
            }
            endpoint = endpoint.tls_config(config).map_err(|error| words(&error))?;
        }
        let connecting = tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect());
        match connecting.await {
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(error)) => Err(words(&error)),
            Err(_) => Err(format!("{url}: no connection in {CONNECT_TIMEOUT:?}")),
        }
    }

    /// This connection has failed: the next call goes to another server.
    pub(super) fn leave(&self, open: &Open) {
        open.connected.left.cancel();
        let mut state = self.state();
        let is_it = |connected: &Arc<Connected>| Arc::ptr_eq(connected, &open.connected);
        if state.connected.as_ref().is_some_and(is_it) {
            state.connected = None;
        }
    }

    /// One call on the connection in use, with [`CALL_TIMEOUT`].
    pub(super) async fn call<T, F>(&self, call: impl FnOnce(Open) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        self.call_within(CALL_TIMEOUT, call).await
    }

    /// One call on the connection in use, which may take this long.
    pub(super) async fn call_within<T, F>(
        &self,
        limit: Duration,
        call: impl FnOnce(Open) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let open = self.open().await?;
        match tokio::time::timeout(limit, call(open.clone())).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => {
                let failure = Failure::of(&status, open.url());
                if !matches!(failure, Failure::Refused(_)) {
                    self.leave(&open);
                }
                Err(failure)
            }
            Err(_) => {
                self.leave(&open);
                let url = open.url();
                Err(Failure::Unknown(format!("{url}: no answer in {limit:?}")))
            }
        }
    }

    /// A call that changes nothing: tried on every server until `patience` is over.
    pub(super) async fn ask<T, F>(
        &self,
        patience: Duration,
        call: impl Fn(Open) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let began = tokio::time::Instant::now();
        loop {
            match self.call(&call).await {
                Err(Failure::NotDone(words) | Failure::Unknown(words))
                    if began.elapsed() < patience =>
                {
                    tracing::debug!(words, "etcd does not answer, trying again");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                other => return other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_cannot_have_happened_is_tried_again() {
        let of = |code, words: &str| Failure::of(&tonic::Status::new(code, words), "u");
        let unavailable = tonic::Code::Unavailable;
        assert!(matches!(
            of(unavailable, "etcdserver: no leader"),
            Failure::NotDone(_)
        ));
        for words in [
            "etcdserver: request timed out",
            "etcdserver: leader changed",
            "transport is closing",
        ] {
            assert!(
                matches!(of(unavailable, words), Failure::Unknown(_)),
                "{words}"
            );
        }
        let large = of(
            tonic::Code::InvalidArgument,
            "etcdserver: request is too large",
        );
        assert!(matches!(large, Failure::Refused(_)));
    }
}
