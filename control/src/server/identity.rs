//! Who calls: the client certificate, or else the bearer token of a service account, names the user; the groups
//! say which services they come to.
//!
//! | group            | may                                                   |
//! |------------------|-------------------------------------------------------|
//! | `system:masters` | everything                                            |
//! | `system:nodes`   | the Feed service, as the node its user name names     |
//! | any other        | what roles are bound to them ([`super::rbac`])        |
//!
//! Who may impersonate asks as somebody else ([`super::rbac::impersonation`]), and then as nobody but them.
//! Of a control plane (group [`CONTROL_GROUP`]) the certificate counts that it sends along, or the token.
//!
//! TLS has verified the chain, the dates and the key before this is asked. The certificate of a node that
//! has joined (organizational unit [`JOINED_UNIT`]) speaks for it as long as the Node object names its
//! key: with the object its certificates go. What `--agent-credentials` makes needs no object.

use std::borrow::Cow;

use gantry_api::k8s_openapi::api::core::v1::Node;
use gantry_api::status::{Reason, Status};
use jiff::Timestamp;
use tonic::service::Interceptor;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::forwarded;
use super::rbac::impersonation;
use super::registry::Registry;
use super::tokens::{self, Tokens};
use crate::joining;
use crate::pki::key_hash;

/// Group that may do everything.
pub const MASTERS_GROUP: &str = "system:masters";
/// Group of the node agents.
pub const NODES_GROUP: &str = "system:nodes";
/// Group of the control planes, for requests that one brings to another ([`super::forwarded`]).
pub const CONTROL_GROUP: &str = "system:control-planes";
/// Organizational unit of the certificates of nodes that have joined.
pub const JOINED_UNIT: &str = "gantry:joined";
/// What precedes the node's name in an agent's user name.
pub const NODE_USER_PREFIX: &str = "system:node:";

/// The caller of a request. The services find it in the request's extensions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The certificate's common name.
    pub user: String,
    /// The certificate's organizations.
    pub groups: Vec<String>,
    /// Who really asks, where that is somebody else.
    pub impersonated_by: Option<Box<Identity>>,
}

impl Identity {
    /// Reads user and groups from a certificate in DER.
    pub fn from_certificate(der: &[u8]) -> Result<Identity, Status> {
        let unreadable = || Status::unauthorized("the client certificate cannot be read");
        let (_, certificate) = X509Certificate::from_der(der).map_err(|_| unreadable())?;
        let subject = certificate.subject();
        let text = |value: &x509_parser::x509::AttributeTypeAndValue<'_>| {
            value.as_str().map(str::to_owned).map_err(|_| unreadable())
        };
        let user = subject.iter_common_name().next().map(text).transpose()?;
        let user = user.filter(|user| !user.is_empty()).ok_or_else(|| {
            Status::unauthorized("the client certificate has no common name: it names no user")
        })?;
        let groups = subject
            .iter_organization()
            .map(text)
            .collect::<Result<_, _>>()?;
        Ok(Identity {
            user,
            groups,
            impersonated_by: None,
        })
    }

    /// Whether the caller is the agent of some node.
    pub(crate) fn check_is_node(&self) -> Result<&str, Status> {
        self.node_name()
            .ok_or_else(|| self.refuse("speak for a node: only nodes can"))
    }

    /// The one whom the connection proves.
    pub(crate) fn real(&self) -> &Identity {
        self.impersonated_by.as_deref().unwrap_or(self)
    }

    fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// Whether the caller may do everything.
    pub fn is_master(&self) -> bool {
        self.is_in(MASTERS_GROUP)
    }

    /// Whether another control plane has connected, with what its clients ask.
    pub(super) fn is_control_plane(&self) -> bool {
        self.is_in(CONTROL_GROUP)
    }

    /// Whether the caller comes as a node's agent, whatever node.
    pub(crate) fn is_node(&self) -> bool {
        self.is_in(NODES_GROUP)
    }

    /// The node that the caller is the agent of.
    pub fn node_name(&self) -> Option<&str> {
        let name = self.user.strip_prefix(NODE_USER_PREFIX)?;
        (self.is_in(NODES_GROUP) && !name.is_empty()).then_some(name)
    }

    /// Whether the caller may speak for this node.
    pub fn check_node(&self, node: &str) -> Result<(), Status> {
        if self.is_master() || self.node_name() == Some(node) {
            return Ok(());
        }
        Err(self.refuse(&format!("speak for node {node:?}")))
    }

    /// Whether the caller may use this service.
    pub fn check_service(&self, service: Service) -> Result<(), Status> {
        let may = match service {
            Service::Feed => self.is_master() || self.node_name().is_some(),
            // Each call asks for the right that it needs.
            Service::Objects | Service::Pods => self.is_master() || !self.is_node(),
        };
        if may {
            return Ok(());
        }
        Err(self.refuse(&format!("use the service {service:?}")))
    }

    fn refuse(&self, what: &str) -> Status {
        let (user, groups) = (&self.user, self.groups.join(", "));
        let text = format!("User {user:?} (groups: {groups}) cannot {what}");
        Status::new(Reason::Forbidden, text)
    }
}

/// What a client certificate says beside who it is of. The services find it in the request's extensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFacts {
    /// Digest of its key, if its node got it by joining.
    pub joined_key: Option<String>,
    /// When it ends, Unix time.
    pub not_after_s: i64,
}

impl CertificateFacts {
    /// Reads them from a certificate in DER.
    pub fn from_certificate(der: &[u8]) -> Result<CertificateFacts, Status> {
        let (_, certificate) = X509Certificate::from_der(der)
            .map_err(|_| Status::unauthorized("the client certificate cannot be read"))?;
        let mut units = certificate.subject().iter_organizational_unit();
        let has_joined = units.any(|unit| unit.as_str().is_ok_and(|unit| unit == JOINED_UNIT));
        Ok(CertificateFacts {
            joined_key: has_joined.then(|| key_hash(certificate.public_key().raw)),
            not_after_s: certificate.validity().not_after.timestamp(),
        })
    }
}

/// The gRPC services, as authorization sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Users' verbs.
    Objects,
    /// Logs and exec.
    Pods,
    /// The agents' stream.
    Feed,
}

/// Finds out who calls.
#[derive(Clone)]
pub struct Authenticator {
    registry: Registry,
    tokens: Tokens,
}

impl Authenticator {
    /// Accepts tokens of the accounts in this registry.
    pub fn new(registry: Registry, tokens: Tokens) -> Authenticator {
        Authenticator { registry, tokens }
    }

    /// The door of one service.
    pub fn for_service(&self, service: Service) -> Authorize {
        Authorize {
            authenticator: self.clone(),
            service,
        }
    }

    /// The door of the service that machines without an identity come to: it judges by itself.
    pub fn for_joining(&self) -> Admit {
        Admit {
            authenticator: self.clone(),
        }
    }

    /// Who the client's certificate names; `None` without one.
    fn certified(
        &self,
        request: &tonic::Request<()>,
    ) -> Result<Option<(Identity, CertificateFacts)>, Status> {
        let certificates = request.peer_certs();
        let Some(leaf) = certificates.as_deref().and_then(|chain| chain.first()) else {
            return Ok(None);
        };
        let mut leaf = Cow::from(leaf.as_ref());
        let mut identity = Identity::from_certificate(&leaf)?;
        if identity.is_control_plane() {
            // Not an identity of its own: without a client's certificate the client's token speaks.
            let Some(brought) = forwarded::certificate(request)? else {
                return Ok(None);
            };
            leaf = brought.into();
            identity = Identity::from_certificate(&leaf)?;
        }
        let facts = CertificateFacts::from_certificate(&leaf)?;
        self.check_joined(&identity, &facts)?;
        Ok(Some((identity, facts)))
    }

    /// The certificate of a node that has joined goes with the Node object.
    fn check_joined(&self, identity: &Identity, facts: &CertificateFacts) -> Result<(), Status> {
        let (Some(key), Some(name)) = (&facts.joined_key, identity.node_name()) else {
            return Ok(());
        };
        let node = self.registry.get::<Node>("", name)?;
        let Some(node) = node else {
            return Err(Status::unauthorized(format!(
                "node {name} was deleted, and its certificate with it: run gantry join on it again, with a \
                 new token"
            )));
        };
        if joining::speaks_for(&node, key) {
            return Ok(());
        }
        Err(Status::unauthorized(format!(
            "the certificate is of an earlier join of node {name}: another one has taken the name; run \
             gantry join on this machine again, with a new token"
        )))
    }

    /// A certificate goes before a token: it was proven by the connection itself.
    fn identify(
        &self,
        request: &tonic::Request<()>,
    ) -> Result<(Identity, Option<CertificateFacts>), Status> {
        if let Some((identity, facts)) = self.certified(request)? {
            return Ok((identity, Some(facts)));
        }
        let header = request.metadata().get("authorization");
        let token = header
            .and_then(|value| value.to_str().ok())
            .and_then(|text| text.strip_prefix("Bearer "));
        let token = token.ok_or_else(|| {
            Status::unauthorized(
                "neither a client certificate nor a bearer token: use the ones in the kubeconfig",
            )
        })?;
        let audience = [self.tokens.api_audience().to_owned()];
        let identity = tokens::authenticate(
            &self.registry,
            &self.tokens,
            token.trim(),
            &audience,
            Timestamp::now(),
        )?;
        Ok((identity, None))
    }
}

/// Lets a request through to a service, or refuses it; adds the [`Identity`] to its extensions.
#[derive(Clone)]
pub struct Authorize {
    authenticator: Authenticator,
    service: Service,
}

impl Interceptor for Authorize {
    fn call(
        &mut self,
        mut request: tonic::Request<()>,
    ) -> Result<tonic::Request<()>, tonic::Status> {
        let (identity, facts) = self.authenticator.identify(&request)?;
        let check = |identity: &Identity| {
            identity.check_service(self.service).inspect_err(|status| {
                tracing::warn!(user = %identity.user, reason = %status, "refused");
            })
        };
        check(&identity)?;
        let identity = match impersonation::Wanted::of(request.metadata())? {
            None => identity,
            // The stream is bound to the certificate of its connection.
            Some(_) if self.service == Service::Feed => {
                return Err(identity.refuse("speak for a node as somebody else").into());
            }
            Some(wanted) => {
                let registry = &self.authenticator.registry;
                let assumed = impersonation::assume(registry, identity, wanted)?;
                check(&assumed)?;
                assumed
            }
        };
        request.extensions_mut().insert(identity);
        if let Some(facts) = facts {
            request.extensions_mut().insert(facts);
        }
        Ok(request)
    }
}

/// Lets everybody through; adds the [`Identity`] and the [`CertificateFacts`] of who has a certificate.
#[derive(Clone)]
pub struct Admit {
    authenticator: Authenticator,
}

impl Interceptor for Admit {
    fn call(
        &mut self,
        mut request: tonic::Request<()>,
    ) -> Result<tonic::Request<()>, tonic::Status> {
        if impersonation::Wanted::of(request.metadata())?.is_some() {
            return Err(Status::bad_request("nobody joins as somebody else").into());
        }
        if let Some((identity, facts)) = self.authenticator.certified(&request)? {
            request.extensions_mut().insert(identity);
            request.extensions_mut().insert(facts);
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(user: &str, group: &str) -> Identity {
        Identity {
            user: user.to_owned(),
            groups: vec![group.to_owned()],
            impersonated_by: None,
        }
    }

    #[test]
    fn groups_decide() {
        let admin = identity("kubernetes-admin", MASTERS_GROUP);
        for service in [Service::Objects, Service::Pods, Service::Feed] {
            admin.check_service(service).unwrap();
        }
        admin.check_node("any").unwrap();

        let node = identity("system:node:a", NODES_GROUP);
        node.check_service(Service::Feed).unwrap();
        node.check_node("a").unwrap();
        let status = node.check_service(Service::Objects).unwrap_err();
        assert_eq!(status.reason, Reason::Forbidden);
        assert_eq!(
            status.message,
            "User \"system:node:a\" (groups: system:nodes) cannot use the service Objects"
        );
        assert!(node.check_node("b").unwrap_err().message.contains("\"b\""));

        let user = identity("jane", "dev");
        user.check_service(Service::Objects).unwrap();
        user.check_service(Service::Pods).unwrap();
        assert!(user.check_service(Service::Feed).is_err());
    }

    #[test]
    fn a_node_name_needs_the_group_too() {
        for (user, group) in [
            ("system:node:a", "dev"),
            ("system:node:", NODES_GROUP),
            ("a", NODES_GROUP),
        ] {
            assert!(identity(user, group).check_service(Service::Feed).is_err());
        }
    }
}
