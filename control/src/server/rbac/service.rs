//! The `Access` service: who the caller is and what they may do. To ask about somebody else takes the verb
//! `impersonate` on that user, and on each group.

use gantry_api::k8s_openapi::api::rbac::v1::PolicyRule;
use gantry_api::kinds;
use gantry_api::proto;
use gantry_api::proto::access_server::Access;
use gantry_api::status::Status;
use tonic::{Request, Response};

use super::guard::{Verdict, refusal_text};
use super::{AUTHENTICATED_GROUP, Attributes, caller, escalation, impersonation};
use crate::server::identity::Identity;
use crate::server::registry::Registry;

/// The service over one registry.
pub(in crate::server) struct AccessService {
    registry: Registry,
}

impl AccessService {
    pub(in crate::server) fn new(registry: Registry) -> AccessService {
        AccessService { registry }
    }

    /// Whom the question is about.
    fn subject(&self, who: Identity, wanted: Option<proto::Subject>) -> Result<Identity, Status> {
        let Some(wanted) = wanted else {
            return Ok(with_all(who));
        };
        let (user, groups) = (wanted.user, wanted.groups);
        let wanted = impersonation::Wanted { user, groups };
        impersonation::assume(&self.registry, who, wanted).map(with_all)
    }
}

/// The group that everybody is in is shown like the others.
fn with_all(mut who: Identity) -> Identity {
    if !who.groups.iter().any(|group| group == AUTHENTICATED_GROUP) {
        who.groups.push(AUTHENTICATED_GROUP.to_owned());
    }
    who
}

fn rule(rule: &PolicyRule, by: &str) -> proto::AccessRule {
    proto::AccessRule {
        verbs: rule.verbs.clone(),
        groups: rule.api_groups.clone().unwrap_or_default(),
        resources: rule.resources.clone().unwrap_or_default(),
        names: rule.resource_names.clone().unwrap_or_default(),
        urls: rule.non_resource_urls.clone().unwrap_or_default(),
        by: by.to_owned(),
    }
}

#[tonic::async_trait]
impl Access for AccessService {
    async fn review(
        &self,
        request: Request<proto::AccessReviewRequest>,
    ) -> Result<Response<proto::AccessReviewReply>, tonic::Status> {
        let who = caller(&request)?;
        let request = request.into_inner();
        let who = self.subject(who, request.r#as)?;
        let kind = kinds::by_plural(&request.group, &request.resource);
        let (verb, namespace, name) = (&request.verb, &request.namespace, &request.name);
        let what = match kind.filter(|kind| kind.group == request.group) {
            Some(kind) => Attributes::of(verb, kind, namespace, name).sub(&request.subresource),
            None => Attributes {
                verb,
                group: &request.group,
                resource: &request.resource,
                subresource: &request.subresource,
                namespace,
                name,
            },
        };
        let reply = match self.registry.verdict(&who, &what)? {
            Verdict::Allowed(by) => proto::AccessReviewReply {
                allowed: true,
                reason: by.to_string(),
            },
            Verdict::Refused => proto::AccessReviewReply {
                allowed: false,
                reason: refusal_text(&who, &what),
            },
        };
        Ok(Response::new(reply))
    }

    async fn rules(
        &self,
        request: Request<proto::AccessRulesRequest>,
    ) -> Result<Response<proto::AccessRulesReply>, tonic::Status> {
        let who = caller(&request)?;
        let request = request.into_inner();
        let who = self.subject(who, request.r#as)?;
        let mut reply = proto::AccessRulesReply::default();
        if who.is_master() {
            let all = escalation::everything();
            reply.rules = all
                .iter()
                .map(|all| rule(all, "group system:masters"))
                .collect();
        } else if !who.is_node() {
            let policy = self.registry.policy()?;
            let grants = policy.grants(&who.user, &who.groups, &request.namespace);
            let rules = grants.flat_map(|grant| grant.rules.iter().map(|one| rule(one, &grant.by)));
            reply.rules = rules.collect();
        }
        Ok(Response::new(reply))
    }

    async fn who_am_i(
        &self,
        request: Request<proto::WhoAmIRequest>,
    ) -> Result<Response<proto::Subject>, tonic::Status> {
        let who = caller(&request)?;
        let who = self.subject(who, request.into_inner().r#as)?;
        Ok(Response::new(proto::Subject {
            user: who.user,
            groups: who.groups,
        }))
    }
}
