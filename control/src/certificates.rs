//! Keeps the certificates of a running control plane fresh.
//!
//! ```text
//!  start ─► renew ─► port opens        every RENEWAL_INTERVAL ─► renew ─► the next handshake shows it
//!                                                                  └► the agents' files, the kubeconfig
//! ```
//! [`crate::pki`] decides what has to be made again; here is when, and who hears of it. An agent
//! reads its files at every dial, the command line at every call: neither is told, neither restarts.
//!
//! Invariants: a failure changes nothing and is tried again; connections that are open stay open.

use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::config::AgentCredentials;
use crate::pki::{Authority, Credentials, NodeKey, PkiError, local_names};
use crate::server::identity::CONTROL_GROUP;
use crate::server::{ServingCertificate, TlsError};

/// Between two looks. A certificate is made again 30 days before its end, so that some 60 looks can
/// fail; names that this machine gets (an address by DHCP) are in the certificate after one of them.
pub(crate) const RENEWAL_INTERVAL: Duration = Duration::from_secs(12 * 60 * 60);

const CONTROL_USER: &str = "system:gantry-control";

/// Why a renewal failed.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// The files.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// What was made cannot be served with.
    #[error("the server's new certificate: {0}")]
    Tls(#[from] TlsError),
}

/// With the CA's certificate behind the server's: a machine that joins knows the CA by its digest only.
fn with_ca(served: &Credentials, authority: &Authority) -> Credentials {
    Credentials {
        certificate: format!("{}{}", served.certificate, authority.certificate()),
        key: served.key.clone(),
    }
}

/// Where what is kept fresh lies.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// Further names of the server.
    pub(crate) sans: Vec<String>,
    /// Agents on this machine.
    pub(crate) agents: Vec<AgentCredentials>,
    /// The administrator's.
    pub(crate) kubeconfig: PathBuf,
    /// The API as the kubeconfig names it.
    pub(crate) server_url: String,
}

/// The CA and what it has made, kept fresh.
pub struct Certificates {
    authority: Authority,
    places: Places,
    served: std::sync::Mutex<Credentials>,
    serving: ServingCertificate,
}

impl Certificates {
    /// Makes what is missing and writes all of it.
    pub(crate) fn open(authority: Authority, places: Places) -> Result<Self, RenewalError> {
        let served = authority.server(&local_names(&places.sans))?;
        let serving = ServingCertificate::new(&with_ca(&served, &authority))?;
        let certificates = Self {
            authority,
            places,
            served: std::sync::Mutex::new(served),
            serving,
        };
        certificates.renew_clients()?;
        Ok(certificates)
    }

    /// A certificate for a node's own key; see [`Authority::sign_node`].
    pub(crate) fn sign_node(
        &self,
        node: &str,
        key: &NodeKey,
        life_s: i64,
        now: Timestamp,
    ) -> Result<(String, i64), PkiError> {
        self.authority.sign_node(node, key, life_s, now)
    }

    /// What another control plane knows us by; kept nowhere.
    pub(crate) fn control_plane(&self) -> Result<Credentials, PkiError> {
        let days = 365;
        self.authority.client(CONTROL_USER, CONTROL_GROUP, days)
    }

    /// The digest of the CA's key, as `--ca-hash` takes it.
    pub(crate) fn ca_hash(&self) -> String {
        self.authority.hash()
    }

    /// The CA's certificate as PEM.
    pub(crate) fn ca(&self) -> &str {
        self.authority.certificate()
    }

    /// What handshakes show.
    pub(crate) fn serving(&self) -> ServingCertificate {
        self.serving.clone()
    }

    /// Makes again what is near its end, lacks a name or is gone. Returns whether handshakes show
    /// another certificate now.
    pub(crate) fn renew(&self) -> Result<bool, RenewalError> {
        let found = self.authority.server(&local_names(&self.places.sans))?;
        // Nothing below can leave it half-changed.
        let mut served = self
            .served
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let is_new = *served != found;
        if is_new {
            self.serving.set(&with_ca(&found, &self.authority))?;
            *served = found;
        }
        drop(served);
        self.renew_clients()?;
        Ok(is_new)
    }

    fn renew_clients(&self) -> Result<(), PkiError> {
        let Places {
            agents,
            kubeconfig,
            server_url,
            ..
        } = &self.places;
        for agent in agents {
            self.authority.ensure_agent(&agent.directory, &agent.node)?;
        }
        self.authority.ensure_kubeconfig(kubeconfig, server_url)
    }

    /// Renews every `interval` until `stop`.
    pub(crate) async fn run(&self, interval: Duration, stop: CancellationToken) {
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + interval, interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // Both arms are cancel safe.
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            match self.renew() {
                Ok(true) => tracing::info!("the next connections see a new server certificate"),
                Ok(false) => {}
                Err(error) => tracing::error!(
                    %error,
                    "certificates were not renewed; trying again in {} h",
                    interval.as_secs() / 3600,
                ),
            }
        }
    }
}

#[cfg(test)]
mod tests;
