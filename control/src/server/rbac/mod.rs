//! Role-based access control: who may do what, decided from the stored roles and bindings.
//!
//! ```text
//!  Role, ClusterRole, RoleBinding, ClusterRoleBinding ──► Policy: grants by subject   (policy.rs)
//!        │ a change in the store: built again before the next request                 (guard.rs)
//!  RPC ─► Attributes ─► system:masters? ─► system:nodes? ─► grants of user and groups ─► allowed by …
//!                          everything       refused          none fits: refused
//!  write of a role or a binding ─► does the writer hold the rights that it gives?     (escalation.rs)
//! ```
//! Invariants: a right comes from a binding only (and from `system:masters`), rights only add up; a binding in a
//! namespace gives nothing outside of it; what cannot be read gives nothing; who writes roles gains no right by it.
//!
//! Source: Kubernetes `pkg/apis/rbac/v1/evaluation_helpers.go`, `pkg/registry/rbac/validation`
//! (rule.go, policy_comparator.go), `plugin/pkg/auth/authorizer/rbac`.

mod defaults;
mod escalation;
mod guard;
pub(crate) mod impersonation;
mod policy;
mod service;
mod validation;

use gantry_api::k8s_openapi::api::rbac::v1::PolicyRule;
use gantry_api::kinds::Kind;

pub(super) use defaults::ensure as ensure_defaults;
pub(crate) use escalation::Judge;
pub(crate) use guard::{Access, Verdict, caller};
pub(crate) use policy::{Grant, Policy, Rules};
pub(super) use service::AccessService;

/// API group of the four kinds.
pub(crate) const RBAC_GROUP: &str = "rbac.authorization.k8s.io";
/// Every caller is in it: nobody is served without an identity.
pub(crate) const AUTHENTICATED_GROUP: &str = "system:authenticated";

/// What a request is about, as rules see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes<'a> {
    pub(crate) verb: &'a str,
    pub(crate) group: &'a str,
    /// Plural.
    pub(crate) resource: &'a str,
    pub(crate) subresource: &'a str,
    /// Empty: everywhere, or not in a namespace.
    pub(crate) namespace: &'a str,
    /// Empty: no single object, or one without a name yet.
    pub(crate) name: &'a str,
}

impl<'a> Attributes<'a> {
    /// A verb on a kind. A namespace counts only where the kind has one: otherwise a binding in it would
    /// reach objects of the whole cluster. A Namespace is in itself.
    pub(crate) fn of(verb: &'a str, kind: &'a Kind, namespace: &'a str, name: &'a str) -> Self {
        let namespace = match kind.kind {
            "Namespace" => name,
            _ if kind.namespaced => namespace,
            _ => "",
        };
        Attributes {
            verb,
            group: kind.group,
            resource: kind.plural,
            subresource: "",
            namespace,
            name,
        }
    }

    /// A verb on a pod's subresource.
    pub(crate) fn pod(
        verb: &'a str,
        subresource: &'a str,
        namespace: &'a str,
        name: &'a str,
    ) -> Self {
        Attributes {
            verb,
            resource: "pods",
            subresource,
            namespace,
            name,
            ..Attributes::default()
        }
    }

    /// The same on a subresource.
    pub(crate) fn sub(self, subresource: &'a str) -> Self {
        Attributes {
            subresource,
            ..self
        }
    }

    /// `pods/log`, or `pods`: the resource as rules write it.
    pub(crate) fn resource_text(&self) -> String {
        match self.subresource {
            "" => self.resource.to_owned(),
            sub => format!("{}/{sub}", self.resource),
        }
    }
}

fn list(values: Option<&Vec<String>>) -> &[String] {
    values.map_or(&[], Vec::as_slice)
}

fn has(values: &[String], wanted: &str) -> bool {
    values.iter().any(|value| value == "*" || value == wanted)
}

/// Whether a rule allows the request.
pub(crate) fn rule_allows(rule: &PolicyRule, what: &Attributes<'_>) -> bool {
    has(&rule.verbs, what.verb)
        && has(list(rule.api_groups.as_ref()), what.group)
        && resources_match(
            list(rule.resources.as_ref()),
            what.resource,
            what.subresource,
        )
        && names_match(list(rule.resource_names.as_ref()), what.name)
}

fn resources_match(patterns: &[String], resource: &str, subresource: &str) -> bool {
    patterns.iter().any(|pattern| {
        if pattern == "*" {
            return true;
        }
        match pattern.split_once('/') {
            None => subresource.is_empty() && pattern == resource,
            Some((of, sub)) => {
                !subresource.is_empty() && sub == subresource && (of == "*" || of == resource)
            }
        }
    })
}

fn names_match(names: &[String], name: &str) -> bool {
    names.is_empty() || names.iter().any(|wanted| wanted == name)
}

#[cfg(test)]
mod tests;
