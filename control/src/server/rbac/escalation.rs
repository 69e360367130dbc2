//! Nobody gives what they do not hold: who writes a role needs its rights, or the verb `escalate` on it; who
//! writes a binding needs the rights of its role, or the verb `bind` on that. Pure but for the look-up.
//!
//! A rule is taken apart into its single rights, each of which one held rule must cover.
//!
//! Source: Kubernetes `pkg/registry/rbac/{clusterrole,rolebinding}/policybased`, `policy_comparator.go`.

use gantry_api::field::{FieldError, Path};
use gantry_api::k8s_openapi::api::rbac::v1::{PolicyRule, RoleRef};
use gantry_api::kinds::Kind;
use gantry_api::status::Status;
use serde_json::Value;

use super::guard::Verdict;
use super::{Attributes, RBAC_GROUP, Rules, list, validation};
use crate::server::identity::Identity;
use crate::server::object::metadata_text;
use crate::server::registry::Registry;

/// Single rights that one role may be taken apart into by who does not hold everything.
const RIGHT_COUNT_MAX: usize = 16 << 10;
/// Missing rights that a refusal names.
const NAMED_COUNT_MAX: usize = 16;

/// Judges the writes of one caller: the verb, and what the object comes to be.
pub(crate) struct Judge<'a> {
    registry: &'a Registry,
    who: &'a Identity,
}

impl<'a> Judge<'a> {
    pub(crate) fn new(registry: &'a Registry, who: &'a Identity) -> Judge<'a> {
        Judge { registry, who }
    }

    /// Whether the caller may use this verb.
    pub(crate) fn verb(&self, what: &Attributes<'_>) -> Result<(), Status> {
        self.registry.authorize(self.who, what)
    }

    /// Whether the caller may turn `old` (`None`: nothing) into `new`.
    pub(crate) fn content(
        &self,
        kind: &Kind,
        namespace: &str,
        old: Option<&Value>,
        new: &Value,
    ) -> Result<(), Status> {
        if kind.group != RBAC_GROUP {
            return Ok(());
        }
        let errors = validation::errors(kind, new);
        if !errors.is_empty() {
            return Err(Status::invalid(kind, metadata_text(new, "name"), &errors));
        }
        let namespace = if kind.namespaced { namespace } else { "" };
        match kind.kind {
            "Role" | "ClusterRole" => self.role(kind, namespace, old, new),
            _ => self.binding(kind, namespace, old, new),
        }
    }

    fn role(
        &self,
        kind: &Kind,
        namespace: &str,
        old: Option<&Value>,
        new: &Value,
    ) -> Result<(), Status> {
        let same = |field: &str| old.is_some_and(|old| old.pointer(field) == new.pointer(field));
        // Labels count: another role may select it by them, and give its rules to others.
        let is_as_before = ["/rules", "/aggregationRule", "/metadata/labels"]
            .into_iter()
            .all(same);
        if self.who.is_master() || is_as_before {
            return Ok(());
        }
        let name = metadata_text(new, "name");
        let escalate = Attributes::of("escalate", kind, namespace, name);
        if self.may(&escalate)? {
            return Ok(());
        }
        let rules: Option<Vec<PolicyRule>> = read(&new["rules"], "rules")?;
        let mut rules = rules.unwrap_or_default();
        // What it selects later, nobody knows: only who holds everything may let it select, or stop it.
        let selects = |object: &Value| !object["aggregationRule"].is_null();
        if selects(new) || old.is_some_and(selects) {
            rules.extend(everything());
        }
        self.holds(kind, name, namespace, &rules)
    }

    fn binding(
        &self,
        kind: &Kind,
        namespace: &str,
        old: Option<&Value>,
        new: &Value,
    ) -> Result<(), Status> {
        let name = metadata_text(new, "name");
        let changed = |old: &Value, field: &str| old["roleRef"][field] != new["roleRef"][field];
        if old.is_some_and(|old| changed(old, "kind") || changed(old, "name")) {
            let path = Path::new("roleRef");
            let error = FieldError::invalid(&path, new["roleRef"].clone(), "cannot change roleRef");
            return Err(Status::invalid(kind, name, &[error]));
        }
        let same = old.is_some_and(|old| old["subjects"] == new["subjects"]);
        if self.who.is_master() || same {
            return Ok(());
        }
        let role: Option<RoleRef> = read(&new["roleRef"], "roleRef")?;
        let Some(role) = role else {
            return Ok(()); // Validation says that it is missing.
        };
        let bind = Attributes {
            verb: "bind",
            group: RBAC_GROUP,
            resource: match role.kind.as_str() {
                "Role" => "roles",
                _ => "clusterroles",
            },
            namespace,
            name: &role.name,
            ..Attributes::default()
        };
        if self.may(&bind)? {
            return Ok(());
        }
        let policy = self.registry.policy()?;
        let rules: Rules = policy.role(&role, namespace).cloned().ok_or_else(|| {
            // One that does not exist yet may come with any rights.
            let detail = format!(
                "there is no {} {:?} whose rights could be compared",
                role.kind, role.name
            );
            Status::forbidden(kind, name, &detail)
        })?;
        self.holds(kind, name, namespace, &rules)
    }

    fn may(&self, what: &Attributes<'_>) -> Result<bool, Status> {
        Ok(self.registry.verdict(self.who, what)? != Verdict::Refused)
    }

    /// Whether the caller holds all of these rights in the namespace.
    fn holds(
        &self,
        kind: &Kind,
        name: &str,
        namespace: &str,
        wanted: &[PolicyRule],
    ) -> Result<(), Status> {
        let policy = self.registry.policy()?;
        let grants = policy.grants(&self.who.user, &self.who.groups, namespace);
        let held: Vec<&PolicyRule> = grants.flat_map(|grant| grant.rules.iter()).collect();
        let missing = match uncovered(&held, wanted) {
            Ok(missing) if missing.is_empty() => return Ok(()),
            Ok(missing) => missing,
            Err(TooMany) => {
                let detail = format!(
                    "its rules are more than {RIGHT_COUNT_MAX} single rights, too many to compare with those of \
                     user {:?}: write several roles",
                    self.who.user
                );
                return Err(Status::forbidden(kind, name, &detail));
            }
        };
        let more = match missing.len().saturating_sub(NAMED_COUNT_MAX) {
            0 => String::new(),
            count => format!("\nand {count} more"),
        };
        let named: Vec<String> = missing.iter().take(NAMED_COUNT_MAX).map(shown).collect();
        let detail = format!(
            "user {:?} (groups={:?}) is attempting to grant RBAC permissions not currently held:\n{}{more}",
            self.who.user,
            self.who.groups,
            named.join("\n"),
        );
        Err(Status::forbidden(kind, name, &detail))
    }
}

fn read<T: serde::de::DeserializeOwned>(value: &Value, field: &str) -> Result<T, Status> {
    serde_json::from_value(value.clone())
        .map_err(|error| Status::bad_request(format!("{field}: {error}")))
}

fn strings(values: &[&str]) -> Vec<String> {
    values.iter().map(|value| (*value).to_owned()).collect()
}

/// The rights of `cluster-admin`.
pub(super) fn everything() -> [PolicyRule; 2] {
    let all = || strings(&["*"]);
    [
        PolicyRule {
            api_groups: Some(all()),
            resources: Some(all()),
            verbs: all(),
            ..PolicyRule::default()
        },
        PolicyRule {
            non_resource_urls: Some(all()),
            verbs: all(),
            ..PolicyRule::default()
        },
    ]
}

/// The rules are more single rights than are compared.
#[derive(Debug, PartialEq)]
pub(super) struct TooMany;

/// The single rights of `wanted` that no rule of `held` covers.
pub(super) fn uncovered(
    held: &[&PolicyRule],
    wanted: &[PolicyRule],
) -> Result<Vec<PolicyRule>, TooMany> {
    let mut missing = Vec::new();
    let mut count = 0_usize;
    for rule in wanted {
        // As a whole first: who holds everything need not have it taken apart.
        if held.iter().any(|held| covers(held, rule)) {
            continue;
        }
        count = count.saturating_add(right_count(rule));
        if count > RIGHT_COUNT_MAX {
            return Err(TooMany);
        }
        let rights = rights(rule);
        missing.extend(
            rights
                .into_iter()
                .filter(|right| !held.iter().any(|held| covers(held, right))),
        );
    }
    Ok(missing)
}

fn right_count(rule: &PolicyRule) -> usize {
    let names = list(rule.resource_names.as_ref()).len().max(1);
    let resources = [
        list(rule.api_groups.as_ref()).len(),
        list(rule.resources.as_ref()).len(),
        names,
    ];
    let resources = resources.into_iter().fold(1, usize::saturating_mul);
    let urls = list(rule.non_resource_urls.as_ref()).len();
    rule.verbs
        .len()
        .saturating_mul(resources.saturating_add(urls))
}

/// A rule taken apart: one verb, one group, one resource, at most one name each.
fn rights(rule: &PolicyRule) -> Vec<PolicyRule> {
    let one = |value: &String| Some(vec![value.clone()]);
    let names = list(rule.resource_names.as_ref());
    let names: Vec<Option<Vec<String>>> = match names {
        [] => vec![None],
        names => names.iter().map(one).collect(),
    };
    let mut rights = Vec::new();
    for verb in &rule.verbs {
        for group in list(rule.api_groups.as_ref()) {
            for resource in list(rule.resources.as_ref()) {
                rights.extend(names.iter().map(|name| PolicyRule {
                    verbs: vec![verb.clone()],
                    api_groups: one(group),
                    resources: one(resource),
                    resource_names: name.clone(),
                    non_resource_urls: None,
                }));
            }
        }
        let urls = list(rule.non_resource_urls.as_ref()).iter();
        rights.extend(urls.map(|url| PolicyRule {
            verbs: vec![verb.clone()],
            non_resource_urls: one(url),
            ..PolicyRule::default()
        }));
    }
    rights
}

/// Whether one rule gives everything that the other one gives.
pub(super) fn covers(held: &PolicyRule, wanted: &PolicyRule) -> bool {
    let all = |held: &[String], wanted: &[String]| {
        held.iter().any(|value| value == "*") || wanted.iter().all(|value| held.contains(value))
    };
    if !all(&held.verbs, &wanted.verbs) {
        return false;
    }
    let urls = list(wanted.non_resource_urls.as_ref());
    let held_urls = list(held.non_resource_urls.as_ref());
    if !urls.iter().all(|url| url_is_held(held_urls, url)) {
        return false;
    }
    let resources = list(wanted.resources.as_ref());
    let groups = list(wanted.api_groups.as_ref());
    if !urls.is_empty() && resources.is_empty() && groups.is_empty() {
        return true;
    }
    let held_resources = list(held.resources.as_ref());
    let names = list(wanted.resource_names.as_ref());
    let held_names = list(held.resource_names.as_ref());
    all(list(held.api_groups.as_ref()), groups)
        && resources
            .iter()
            .all(|resource| resource_is_held(held_resources, resource))
        && (held_names.is_empty()
            || (!names.is_empty() && names.iter().all(|name| held_names.contains(name))))
}

fn resource_is_held(held: &[String], resource: &str) -> bool {
    let any = resource
        .split_once('/')
        .map(|(_, subresource)| format!("*/{subresource}"));
    held.iter().any(|value| {
        value == "*" || value == resource || any.as_ref().is_some_and(|any| value == any)
    })
}

fn url_is_held(held: &[String], url: &str) -> bool {
    held.iter().any(|value| {
        let prefix = value.strip_suffix('*');
        value == url || prefix.is_some_and(|prefix| url.starts_with(prefix))
    })
}

/// `{APIGroups:[""], Resources:["pods"], Verbs:["get"]}`
fn shown(rule: &PolicyRule) -> String {
    let parts = [
        ("APIGroups", list(rule.api_groups.as_ref())),
        ("Resources", list(rule.resources.as_ref())),
        ("ResourceNames", list(rule.resource_names.as_ref())),
        ("NonResourceURLs", list(rule.non_resource_urls.as_ref())),
        ("Verbs", rule.verbs.as_slice()),
    ];
    let parts = parts.into_iter().filter(|(_, values)| !values.is_empty());
    let parts: Vec<String> = parts
        .map(|(name, values)| format!("{name}:{values:?}"))
        .collect();
    format!("{{{}}}", parts.join(", "))
}
