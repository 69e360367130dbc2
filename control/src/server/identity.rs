//! Who calls, and what they may: the client certificate, or else the bearer token of a service
//! account, names the user; the groups decide.
//!
//! | group            | may                                                   |
//! |------------------|-------------------------------------------------------|
//! | `system:masters` | everything                                            |
//! | `system:nodes`   | the Feed service, as the node its user name names     |
//! | any other        | nothing                                               |
//!
//! TLS has verified the chain, the dates and the key before this is asked.

use gantry_api::status::{Reason, Status};
use jiff::Timestamp;
use tonic::service::Interceptor;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::registry::Registry;
use super::tokens::{self, Tokens};

/// Group that may do everything.
pub const MASTERS_GROUP: &str = "system:masters";
/// Group of the node agents.
pub const NODES_GROUP: &str = "system:nodes";
/// What precedes the node's name in an agent's user name.
pub const NODE_USER_PREFIX: &str = "system:node:";

/// The caller of a request. The services find it in the request's extensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The certificate's common name.
    pub user: String,
    /// The certificate's organizations.
    pub groups: Vec<String>,
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
        Ok(Identity { user, groups })
    }

    fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// Whether the caller may do everything.
    pub fn is_master(&self) -> bool {
        self.is_in(MASTERS_GROUP)
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
            Service::Objects | Service::Pods => self.is_master(),
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

    /// A certificate goes before a token: it was proven by the connection itself.
    fn identify(&self, request: &tonic::Request<()>) -> Result<Identity, Status> {
        let certificates = request.peer_certs();
        if let Some(leaf) = certificates.as_ref().and_then(|chain| chain.first()) {
            return Identity::from_certificate(leaf);
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
        tokens::authenticate(
            &self.registry,
            &self.tokens,
            token.trim(),
            &audience,
            Timestamp::now(),
        )
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
        let identity = self.authenticator.identify(&request)?;
        identity.check_service(self.service).inspect_err(|status| {
            tracing::warn!(user = %identity.user, reason = %status, "refused");
        })?;
        request.extensions_mut().insert(identity);
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
