//! TLS of the API's port: whose certificate a handshake shows may change while the port is open.
//!
//! ```text
//!  TcpListener ─► handshakes, at most HANDSHAKES_MAX at once, each within HANDSHAKE_TIMEOUT ─► tonic
//!                     ▲ the certificate of this moment
//!  crate::certificates ─► ServingCertificate::set
//! ```
//! tonic's own TLS fixes the certificate when the server is built; this is what it does, with a
//! certificate that can be replaced. Invariants: a client with a certificate of another CA gets no
//! further than the handshake (one without has to bring a token); nothing is resumed, so every handshake looks at the client's
//! certificate and shows the newest of ours; a slow client holds one place and stops nobody.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use crate::pki::Credentials;

/// What a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at once; more clients wait in the kernel's queue.
const HANDSHAKES_MAX: usize = 256;
/// Connections that are through the handshake and not yet taken.
const ACCEPTED_MAX: usize = 16;
/// The pause after the system refused a connection, for example for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why credentials cannot be served with.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Not a certificate or not a key.
    #[error("{what} cannot be read: {reason}")]
    Pem {
        /// Which part.
        what: &'static str,
        /// What the parser said.
        reason: String,
    },
    /// The TLS library refuses them.
    #[error("{0}")]
    Refused(String),
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// What the next handshake shows. Clones share it.
#[derive(Clone, Debug)]
pub struct ServingCertificate {
    current: Arc<ArcSwap<CertifiedKey>>,
}

impl ServingCertificate {
    /// Serves with these credentials until [`ServingCertificate::set`].
    pub fn new(credentials: &Credentials) -> Result<Self, TlsError> {
        let current = Arc::new(ArcSwap::new(Arc::new(certified_key(credentials)?)));
        Ok(Self { current })
    }

    /// The next handshake shows these. Connections that are open stay.
    pub fn set(&self, credentials: &Credentials) -> Result<(), TlsError> {
        self.current.store(Arc::new(certified_key(credentials)?));
        Ok(())
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

fn certified_key(credentials: &Credentials) -> Result<CertifiedKey, TlsError> {
    let chain = certificates("the certificate", &credentials.certificate)?;
    let key = PrivateKeyDer::from_pem_slice(credentials.key.as_bytes()).map_err(|error| {
        TlsError::Pem {
            what: "the key",
            reason: error.to_string(),
        }
    })?;
    CertifiedKey::from_der(chain, key, &provider())
        .map_err(|error| TlsError::Refused(error.to_string()))
}

fn certificates(what: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bad = |reason: String| TlsError::Pem { what, reason };
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let parsed = parsed.map_err(|error| bad(error.to_string()))?;
    if parsed.is_empty() {
        return Err(bad("there is no certificate in it".into()));
    }
    Ok(parsed)
}

/// TLS that shows `serving` and takes certificates of this CA (PEM) only.
pub(super) fn config(
    ca_certificate: &str,
    serving: ServingCertificate,
) -> Result<Arc<ServerConfig>, TlsError> {
    let refused = |error: &dyn std::fmt::Display| TlsError::Refused(error.to_string());
    let mut roots = RootCertStore::empty();
    for certificate in certificates("the CA's certificate", ca_certificate)? {
        roots.add(certificate).map_err(|error| refused(&error))?;
    }
    // Pods have a token instead; a certificate that is given must be good.
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| refused(&error))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| refused(&error))?
        .with_client_cert_verifier(clients)
        .with_cert_resolver(Arc::new(serving));
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Connections that are through the handshake; no more after `stop`.
pub(super) fn accept(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    stop: CancellationToken,
) -> mpsc::Receiver<io::Result<TlsStream<TcpStream>>> {
    let (accepted, connections) = mpsc::channel(ACCEPTED_MAX);
    tokio::spawn(async move {
        let acceptor = TlsAcceptor::from(config);
        let mut handshakes = JoinSet::new();
        loop {
            tokio::select! {
                // Every arm is cancel safe: an accepted connection is returned, the others only wait.
                () = stop.cancelled() => return,
                () = accepted.closed() => return,
                Some(_) = handshakes.join_next() => {}
                connection = listener.accept(), if handshakes.len() < HANDSHAKES_MAX => {
                    match connection {
                        Ok((stream, _)) => {
                            handshakes.spawn(handshake(acceptor.clone(), stream, accepted.clone()));
                        }
                        Err(error) => {
                            tracing::warn!(%error, "a connection could not be accepted");
                            tokio::time::sleep(ACCEPT_PAUSE).await;
                        }
                    }
                }
            }
        }
    });
    connections
}

async fn handshake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    accepted: mpsc::Sender<io::Result<TlsStream<TcpStream>>>,
) {
    // Without it small answers wait for the client's acknowledgement; a failure costs only that.
    let _ = stream.set_nodelay(true);
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => drop(accepted.send(Ok(stream)).await),
        Ok(Err(error)) => tracing::debug!(%error, "a client did not get through the handshake"),
        Err(_) => tracing::debug!("a handshake took too long"),
    }
}
