//! How a machine becomes a node, and stays one.
//!
//! ```text
//!  machine ─ token, name, request ─► Join ─► limit ─► request proven ─► claim ─► token spent ─► Node ─► signed
//!  node ──── request, own identity ─► Renew ─────────► request proven ────────────────────────► Node ─► signed
//! ```
//! The Node object names the keys that speak for it ([`claim::KEYS_ANNOTATION`]); whoever deletes it takes
//! the certificates back. A renewal leaves the key in use and the new one.
//!
//! Invariants: a token is spent by a compare-and-set before anything is given for it; whoever comes again
//! with the same key, because an answer was lost, gets the same for nothing; a refusal says why and what to
//! do, and never repeats a secret; nothing here is larger than [`REQUEST_MESSAGE_BYTES_MAX`].

mod claim;
mod limit;
mod token;

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gantry_api::bootstrap_token::{self, BootstrapToken};
use gantry_api::k8s_openapi::ByteString;
use gantry_api::k8s_openapi::api::core::v1::{Node, Pod, Secret};
use gantry_api::kinds::{self, Kind};
use gantry_api::proto;
use gantry_api::proto::joining_server::JoiningServer;
use gantry_api::status::{Reason, Status};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response};

use crate::certificates::Certificates;
use crate::config::check_node_name;
use crate::controllers::pods;
use crate::feed::{Feed, INCARNATION_ANNOTATION};
use crate::pki::NodeKey;
use crate::server::forwarded;
use crate::server::identity::{CertificateFacts, Identity};
use crate::server::registry::DeleteOptions;
use crate::server::{Part, Registry, WriteOptions};

use claim::{Admission, Machine};
pub use claim::{KEYS_ANNOTATION, MACHINE_ANNOTATION};
use limit::Limit;
use token::{Applicant, Data};

/// A token, a name and a certificate request.
const REQUEST_MESSAGE_BYTES_MAX: usize = 16 << 10;
/// A machine id is 32 digits.
const MACHINE_ID_LEN_MAX: usize = 64;
/// Between two looks for tokens that nobody asks for any more.
const CLEAN_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// Whether this key speaks for the node.
pub(crate) fn speaks_for(node: &Node, key_hash: &str) -> bool {
    claim::keys(node).any(|key| key == key_hash)
}

/// The service; clones share it.
#[derive(Clone)]
pub struct Joining {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    feed: Feed,
    certificates: Arc<Certificates>,
    life_s: i64,
    limit: Mutex<Limit>,
}

fn node_kind() -> Result<&'static Kind, Status> {
    kinds::by_plural("", "nodes")
        .ok_or_else(|| Status::not_served("nodes is not a kind of this server"))
}

fn secret_kind() -> Result<&'static Kind, Status> {
    kinds::by_plural("", "secrets")
        .ok_or_else(|| Status::not_served("secrets is not a kind of this server"))
}

impl Joining {
    /// Signs with the CA of `certificates`, for `life` each.
    pub fn new(
        registry: Registry,
        feed: Feed,
        certificates: Arc<Certificates>,
        life: Duration,
    ) -> Joining {
        let inner = Inner {
            registry,
            feed,
            certificates,
            life_s: i64::try_from(life.as_secs()).unwrap_or(i64::MAX),
            limit: Mutex::default(),
        };
        Joining {
            inner: Arc::new(inner),
        }
    }

    /// The gRPC service.
    pub fn server(&self) -> JoiningServer<Joining> {
        JoiningServer::new(self.clone()).max_decoding_message_size(REQUEST_MESSAGE_BYTES_MAX)
    }

    /// Removes tokens that ended more than a day ago, until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        loop {
            self.inner.clean().await;
            tokio::select! {
                // Both arms are cancel safe.
                () = stop.cancelled() => return,
                () = tokio::time::sleep(CLEAN_INTERVAL) => {}
            }
        }
    }
}

fn refuse(words: impl Into<String>) -> Status {
    Status::new(Reason::Forbidden, words)
}

/// The data of a Secret as text; what is none counts as empty.
fn text_of(secret: &Secret) -> Data {
    let data = secret.data.iter().flatten();
    data.map(|(key, ByteString(bytes))| {
        let text = String::from_utf8(bytes.clone()).unwrap_or_default();
        (key.clone(), text)
    })
    .collect()
}

impl Inner {
    async fn join(
        &self,
        request: &proto::JoinRequest,
        now: Timestamp,
    ) -> Result<proto::NodeCertificate, Status> {
        let node = &*request.node;
        check_node_name(node).map_err(Status::bad_request)?;
        if request.machine_id.len() > MACHINE_ID_LEN_MAX {
            return Err(Status::bad_request("the machine id is too long"));
        }
        let token = BootstrapToken::parse(&request.token).map_err(Status::unauthorized)?;
        let key = NodeKey::of_request(&request.request_der, node).map_err(Status::bad_request)?;
        let applicant = Applicant {
            node,
            key_hash: key.hash(),
        };
        // First without spending: a name that is taken costs no use.
        let secret = self
            .registry
            .get::<Secret>(bootstrap_token::NAMESPACE, &token.secret_name())?;
        let secret =
            secret.filter(|secret| secret.type_.as_deref() == Some(bootstrap_token::SECRET_TYPE));
        token::spend(
            secret.as_ref().map(text_of).as_ref(),
            &token,
            applicant,
            now,
        )
        .map_err(Status::unauthorized)?;
        let machine = Machine {
            key_hash: key.hash(),
            machine_id: &request.machine_id,
            incarnation: request.incarnation,
        };
        let found = self.registry.get::<Node>("", node)?;
        self.claim(node, found.as_ref(), machine).map_err(refuse)?;
        self.spend(&token, applicant, now).await?;
        self.write_node(node, machine).await?;
        let certificate = self.sign(node, &key, now)?;
        tracing::info!(node, token = token.id(), "a machine has joined");
        Ok(certificate)
    }

    fn claim(
        &self,
        name: &str,
        node: Option<&Node>,
        machine: Machine<'_>,
    ) -> Result<Admission, String> {
        if node.is_none() {
            return Ok(Admission::Create);
        }
        let all = self.registry.list::<Pod>(None);
        let all = all
            .map(|(_, pods)| pods)
            .map_err(|status| status.to_string())?;
        let bound = |pod: &&Pod| pods::node(pod) == Some(name) && !pods::is_finished(pod);
        let count = all.iter().filter(bound).count();
        claim::decide(name, node, machine, self.feed.is_connected(name), count)
    }

    /// Spends the token, whoever else does so at this moment.
    async fn spend(
        &self,
        token: &BootstrapToken,
        applicant: Applicant<'_>,
        now: Timestamp,
    ) -> Result<(), Status> {
        let change = |old: &Value| {
            let secret: Secret = serde_json::from_value(old.clone())
                .map_err(|error| Status::internal(format!("a token's Secret: {error}")))?;
            let data = token::spend(Some(&text_of(&secret)), token, applicant, now)
                .map_err(Status::unauthorized)?;
            let data = data
                .into_iter()
                .map(|(key, text)| (key, ByteString(text.into_bytes())));
            let secret = Secret {
                data: Some(data.collect()),
                ..secret
            };
            serde_json::to_value(secret)
                .map_err(|error| Status::internal(format!("a token's Secret: {error}")))
        };
        let options = WriteOptions::default();
        let name = token.secret_name();
        self.registry
            .change_value(
                secret_kind()?,
                bootstrap_token::NAMESPACE,
                &name,
                Part::Object,
                &options,
                change,
            )
            .await?;
        Ok(())
    }

    /// Makes the Node, or notes the key on it. Decided again on what is there at that moment.
    async fn write_node(&self, name: &str, machine: Machine<'_>) -> Result<(), Status> {
        let kind = node_kind()?;
        let options = WriteOptions::default();
        let annotated = |old: &Value, admission: Admission| {
            let mut new = old.clone();
            let before = old["metadata"]["annotations"][KEYS_ANNOTATION].as_str();
            let before = before
                .filter(|_| admission == Admission::Keep)
                .unwrap_or_default();
            if !new["metadata"]["annotations"].is_object() {
                new["metadata"]["annotations"] = json!({});
            }
            // A new installation has a new key only: who holds the old one is another machine.
            let keys = if before.split(',').any(|key| key == machine.key_hash) {
                claim::with_key(before, machine.key_hash)
            } else {
                machine.key_hash.to_owned()
            };
            let annotations = &mut new["metadata"]["annotations"];
            annotations[KEYS_ANNOTATION] = json!(keys);
            annotations[MACHINE_ANNOTATION] = json!(machine.machine_id);
            if let (Admission::TakeOver, Some(map)) = (admission, annotations.as_object_mut()) {
                map.remove(INCARNATION_ANNOTATION);
            }
            new
        };
        if self.registry.get::<Node>("", name)?.is_none() {
            let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
            let node = annotated(&node, Admission::Create);
            match self.registry.create_value(kind, "", node, &options).await {
                Ok(_) => return self.mark_expected(name).await,
                Err(status) if status.reason == Reason::AlreadyExists => {}
                Err(status) => return Err(status),
            }
        }
        let change = |old: &Value| {
            let node: Node = serde_json::from_value(old.clone())
                .map_err(|error| Status::internal(format!("node {name}: {error}")))?;
            let admission = self.claim(name, Some(&node), machine).map_err(refuse)?;
            Ok(annotated(old, admission))
        };
        self.registry
            .change_value(kind, "", name, Part::Object, &options, change)
            .await?;
        Ok(())
    }

    /// A node that has not come yet holds no state: nobody waits for it to program anything.
    async fn mark_expected(&self, name: &str) -> Result<(), Status> {
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let change = |old: &Value| {
            let mut new = old.clone();
            if new["status"]["conditions"].is_null() {
                new["status"]["conditions"] = json!([{
                    "type": "Ready", "status": "Unknown", "reason": "NodeStatusNeverUpdated",
                    "message": "The machine has joined; its agent has not come yet.",
                    "lastTransitionTime": now,
                }]);
            }
            Ok(new)
        };
        let options = WriteOptions::default();
        self.registry
            .change_value(node_kind()?, "", name, Part::Status, &options, change)
            .await?;
        Ok(())
    }

    async fn renew(
        &self,
        identity: &Identity,
        facts: &CertificateFacts,
        request: &proto::RenewRequest,
        now: Timestamp,
    ) -> Result<proto::NodeCertificate, Status> {
        let node = identity.check_is_node()?;
        let Some(held) = &facts.joined_key else {
            return Err(refuse(format!(
                "the certificate of node {node} was made by --agent-credentials: the control plane renews it"
            )));
        };
        let key = NodeKey::of_request(&request.request_der, node).map_err(Status::bad_request)?;
        let change = |old: &Value| {
            let mut new = old.clone();
            let keys = old["metadata"]["annotations"][KEYS_ANNOTATION].as_str();
            let keys = keys.unwrap_or_default();
            // Another machine may have taken the name since the connection was made.
            if !keys.split(',').any(|known| known == held) {
                return Err(Status::unauthorized(format!(
                    "another machine has joined as node {node}: run gantry join here again"
                )));
            }
            let keys = claim::with_key(held, key.hash());
            new["metadata"]["annotations"][KEYS_ANNOTATION] = json!(keys);
            Ok(new)
        };
        let options = WriteOptions::default();
        self.registry
            .change_value(node_kind()?, "", node, Part::Object, &options, change)
            .await?;
        let certificate = self.sign(node, &key, now)?;
        tracing::info!(
            node,
            end_s = certificate.not_after_s,
            "a certificate was renewed"
        );
        Ok(certificate)
    }

    fn sign(
        &self,
        node: &str,
        key: &NodeKey,
        now: Timestamp,
    ) -> Result<proto::NodeCertificate, Status> {
        let signed = self.certificates.sign_node(node, key, self.life_s, now);
        let (certificate_pem, not_after_s) =
            signed.map_err(|error| Status::internal(error.to_string()))?;
        Ok(proto::NodeCertificate {
            certificate_pem,
            ca_pem: self.certificates.ca().to_owned(),
            not_after_s,
        })
    }

    async fn clean(&self) {
        let secrets = self
            .registry
            .list::<Secret>(Some(bootstrap_token::NAMESPACE));
        let Ok((_, secrets)) = secrets else { return };
        for secret in secrets {
            let is_token = secret.type_.as_deref() == Some(bootstrap_token::SECRET_TYPE);
            if !is_token || !token::is_past(&text_of(&secret), Timestamp::now()) {
                continue;
            }
            let name = secret.metadata.name.as_deref().unwrap_or_default();
            let options = DeleteOptions {
                uid: secret.metadata.uid.clone(),
                ..DeleteOptions::default()
            };
            let removed = self
                .registry
                .delete::<Secret>(bootstrap_token::NAMESPACE, name, &options)
                .await;
            match removed {
                Ok(()) => tracing::info!(secret = name, "a token ended long ago and is gone"),
                Err(status) => tracing::warn!(secret = name, %status, "a token stays"),
            }
        }
    }

    fn may_try(&self, address: Option<IpAddr>) -> Result<(), Status> {
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        if address.is_none_or(|address| limit.may_try(address, Instant::now())) {
            return Ok(());
        }
        Err(Status::new(
            Reason::TooManyRequests,
            "too many failed joins from this address: wait a minute, then try again",
        ))
    }

    fn failed(&self, address: Option<IpAddr>) {
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(address) = address {
            limit.failed(address, Instant::now());
        }
    }
}

#[tonic::async_trait]
impl proto::joining_server::Joining for Joining {
    async fn join(
        &self,
        request: Request<proto::JoinRequest>,
    ) -> Result<Response<proto::NodeCertificate>, tonic::Status> {
        let address = forwarded::address(&request);
        self.inner.may_try(address)?;
        let request = request.into_inner();
        match self.inner.join(&request, Timestamp::now()).await {
            Ok(certificate) => Ok(Response::new(certificate)),
            Err(status) => {
                self.inner.failed(address);
                // The name is the stranger's choice: shown as Rust would, so that it stays one line.
                let (node, address) = (request.node.get(..64).unwrap_or(&request.node), address);
                tracing::warn!(?node, ?address, reason = %status, "a machine was not let in");
                Err(status.into())
            }
        }
    }

    async fn renew(
        &self,
        request: Request<proto::RenewRequest>,
    ) -> Result<Response<proto::NodeCertificate>, tonic::Status> {
        let extensions = request.extensions();
        let (identity, facts) = (
            extensions.get::<Identity>(),
            extensions.get::<CertificateFacts>(),
        );
        let (Some(identity), Some(facts)) = (identity.cloned(), facts.cloned()) else {
            let words = "no client certificate: only a node can renew its own";
            return Err(Status::unauthorized(words).into());
        };
        let renewed = self
            .inner
            .renew(&identity, &facts, request.get_ref(), Timestamp::now())
            .await?;
        Ok(Response::new(renewed))
    }
}

#[cfg(test)]
mod tests;
