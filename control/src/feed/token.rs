//! Tokens for pods, asked for by the agent of the pod's node over its own connection.
//!
//! An agent gets tokens of pods that are bound to its node, and for the audiences that the pod's own
//! projected volumes name: a node that is taken over speaks for what ran on it and for nothing else.
//!
//! Source: Kubernetes' NodeRestriction and ServiceAccountNodeAudienceRestriction.

use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::proto;
use gantry_api::status::{Reason, Status};

use super::Inner;
use crate::server::identity::Identity;
use crate::server::tokens::{self, LIFETIME_S};

impl Inner {
    pub(super) fn pod_token(
        &self,
        identity: &Identity,
        request: &proto::TokenRequest,
    ) -> Result<proto::IssuedToken, Status> {
        let proto::TokenRequest { namespace, pod, .. } = request;
        let found = self.registry.get::<Pod>(namespace, pod)?;
        let found = found.filter(|pod| pod.metadata.uid.as_ref() == Some(&request.pod_uid));
        // The same words as for a pod of another node: a node learns nothing of those.
        let refused = || {
            let text = format!("pod {namespace}/{pod} of this uid is not bound to your node");
            Status::new(Reason::Forbidden, text)
        };
        let found = found.ok_or_else(refused)?;
        let node = found
            .spec
            .as_ref()
            .and_then(|spec| spec.node_name.as_deref());
        let node = node.filter(|node| !node.is_empty()).ok_or_else(refused)?;
        identity.check_node(node).map_err(|_| refused())?;
        let api = self.settings.tokens.api_audience();
        let named = |wanted: &String| wanted == api || audiences(&found).any(|a| a == wanted);
        if let Some(audience) = request.audiences.iter().find(|wanted| !named(wanted)) {
            let text = format!("no volume of pod {namespace}/{pod} asks for audience {audience:?}");
            return Err(Status::new(Reason::Forbidden, text));
        }
        let subject = tokens::pod_subject(&self.registry, namespace, &found)?;
        let lifetime_s = match request.expiration_s {
            0 => LIFETIME_S,
            asked => asked,
        };
        let tokens = &self.settings.tokens;
        let issued = tokens.issue(subject, &request.audiences, lifetime_s, Timestamp::now())?;
        Ok(proto::IssuedToken {
            token: issued.token,
        })
    }
}

/// The audiences that the pod's volumes ask for.
fn audiences(pod: &Pod) -> impl Iterator<Item = &String> {
    let volumes = pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten());
    let projected = volumes.filter_map(|volume| volume.projected.as_ref());
    let sources = projected.flat_map(|projected| projected.sources.iter().flatten());
    sources.filter_map(|source| source.service_account_token.as_ref()?.audience.as_ref())
}
