//! The stored roles and bindings as grants by subject and namespace: what a request is looked up in. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use gantry_api::k8s_openapi::api::rbac::v1::{
    ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject,
};
use gantry_api::selector::Selector;

use super::{AUTHENTICATED_GROUP, Attributes, rule_allows};
use crate::server::tokens::ACCOUNT_USER_PREFIX;

/// Rules, shared by all bindings that name their role.
pub(crate) type Rules = Arc<Vec<PolicyRule>>;

/// What one binding gives one subject.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Grant {
    pub(crate) rules: Rules,
    /// `RoleBinding "a/b" of Role "c" to User "d"`, for answers and audits.
    pub(crate) by: Arc<str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum SubjectKind {
    User,
    Group,
}

/// Grants by namespace; "" are those of the whole cluster.
type ByNamespace = HashMap<String, Vec<Grant>>;

/// Who may do what.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    users: HashMap<String, ByNamespace>,
    groups: HashMap<String, ByNamespace>,
    roles: BTreeMap<(String, String), Rules>,
    cluster_roles: BTreeMap<String, Rules>,
}

impl Policy {
    /// Reads everything that is stored.
    pub(crate) fn new(
        cluster_roles: &[ClusterRole],
        roles: &[Role],
        cluster_bindings: &[ClusterRoleBinding],
        bindings: &[RoleBinding],
    ) -> Policy {
        let mut policy = Policy {
            cluster_roles: resolve(cluster_roles),
            ..Policy::default()
        };
        for role in roles {
            let namespace = role.metadata.namespace.clone().unwrap_or_default();
            let name = role.metadata.name.clone().unwrap_or_default();
            let rules = Arc::new(role.rules.clone().unwrap_or_default());
            policy.roles.insert((namespace, name), rules);
        }
        for binding in cluster_bindings {
            let name = binding.metadata.name.as_deref().unwrap_or_default();
            let subjects = binding.subjects.as_deref().unwrap_or_default();
            let what = format!("ClusterRoleBinding {name:?}");
            policy.bind("", &what, &binding.role_ref, subjects);
        }
        for binding in bindings {
            let name = binding.metadata.name.as_deref().unwrap_or_default();
            let namespace = binding.metadata.namespace.as_deref().unwrap_or_default();
            let subjects = binding.subjects.as_deref().unwrap_or_default();
            // One without a namespace cannot be: it must not come to count for the whole cluster.
            if !namespace.is_empty() {
                let what = format!("RoleBinding \"{namespace}/{name}\"");
                policy.bind(namespace, &what, &binding.role_ref, subjects);
            }
        }
        policy
    }

    fn bind(&mut self, namespace: &str, what: &str, role: &RoleRef, subjects: &[Subject]) {
        let Some(rules) = self.role(role, namespace).cloned() else {
            return; // The role may still come.
        };
        for subject in subjects {
            let Some((kind, key, shown)) = key_of(subject, namespace) else {
                continue;
            };
            let by = format!("{what} of {} {:?} to {shown}", role.kind, role.name);
            let grant = Grant {
                rules: Arc::clone(&rules),
                by: by.into(),
            };
            let subjects = match kind {
                SubjectKind::User => &mut self.users,
                SubjectKind::Group => &mut self.groups,
            };
            let of = subjects.entry(key).or_default();
            of.entry(namespace.to_owned()).or_default().push(grant);
        }
    }

    /// The rules that a binding in this namespace ("": of the cluster) refers to.
    pub(crate) fn role(&self, role: &RoleRef, namespace: &str) -> Option<&Rules> {
        match role.kind.as_str() {
            "ClusterRole" => self.cluster_roles.get(&role.name),
            "Role" if !namespace.is_empty() => {
                self.roles.get(&(namespace.to_owned(), role.name.clone()))
            }
            _ => None,
        }
    }

    /// What these subjects hold in a namespace: the cluster's grants, and the namespace's own.
    pub(crate) fn grants<'a>(
        &'a self,
        user: &str,
        groups: &[String],
        namespace: &'a str,
    ) -> impl Iterator<Item = &'a Grant> {
        let mut found: Vec<&ByNamespace> = self.users.get(user).into_iter().collect();
        let all = (!groups.iter().any(|group| group == AUTHENTICATED_GROUP))
            .then_some(AUTHENTICATED_GROUP);
        let groups = groups.iter().map(String::as_str).chain(all);
        found.extend(groups.filter_map(|group| self.groups.get(group)));
        let places = std::iter::once("").chain((!namespace.is_empty()).then_some(namespace));
        places
            .flat_map(move |place| found.clone().into_iter().map(move |of| of.get(place)))
            .flatten()
            .flatten()
    }

    /// The grant that allows the request.
    pub(crate) fn allows<'a>(
        &'a self,
        user: &str,
        groups: &[String],
        what: &Attributes<'a>,
    ) -> Option<&'a Grant> {
        self.grants(user, groups, what.namespace)
            .find(|grant| grant.rules.iter().any(|rule| rule_allows(rule, what)))
    }
}

/// Whom a subject means: what requests are looked up by, and in words.
fn key_of(subject: &Subject, namespace: &str) -> Option<(SubjectKind, String, String)> {
    let name = subject.name.as_str();
    match subject.kind.as_str() {
        "User" => Some((SubjectKind::User, name.to_owned(), format!("User {name:?}"))),
        "Group" => Some((
            SubjectKind::Group,
            name.to_owned(),
            format!("Group {name:?}"),
        )),
        "ServiceAccount" => {
            let own = subject.namespace.as_deref().filter(|n| !n.is_empty());
            let place = own.unwrap_or(namespace);
            if place.is_empty() {
                return None;
            }
            let shown = format!("ServiceAccount \"{place}/{name}\"");
            Some((
                SubjectKind::User,
                format!("{ACCOUNT_USER_PREFIX}{place}:{name}"),
                shown,
            ))
        }
        _ => None,
    }
}

/// The rules of each ClusterRole; an aggregated one has those of the roles that it selects, and they of
/// the ones that they select.
fn resolve(roles: &[ClusterRole]) -> BTreeMap<String, Rules> {
    let selected: Vec<Option<Vec<usize>>> = roles.iter().map(|role| selects(role, roles)).collect();
    let rules = |index: usize| {
        let Some(direct) = &selected[index] else {
            return roles[index].rules.clone().unwrap_or_default();
        };
        let mut seen = BTreeSet::from([index]);
        let mut open = direct.clone();
        let mut rules = Vec::new();
        while let Some(next) = open.pop() {
            if !seen.insert(next) {
                continue;
            }
            match &selected[next] {
                Some(further) => open.extend(further),
                None => rules.extend(roles[next].rules.iter().flatten().cloned()),
            }
        }
        rules
    };
    let name = |role: &ClusterRole| role.metadata.name.clone().unwrap_or_default();
    let named = roles.iter().enumerate();
    named
        .map(|(index, role)| (name(role), Arc::new(rules(index))))
        .collect()
}

/// The roles that an aggregated one selects; `None` for one with rules of its own.
fn selects(role: &ClusterRole, roles: &[ClusterRole]) -> Option<Vec<usize>> {
    let aggregation = role.aggregation_rule.as_ref()?;
    let selectors: Vec<Selector> = aggregation
        .cluster_role_selectors
        .iter()
        .flatten()
        .filter_map(|selector| Selector::from_api(selector).ok())
        .collect();
    let none = BTreeMap::new();
    let matches = |role: &ClusterRole| {
        let labels = role.metadata.labels.as_ref().unwrap_or(&none);
        selectors.iter().any(|selector| selector.matches(labels))
    };
    let found = roles.iter().enumerate().filter(|(_, role)| matches(role));
    Some(found.map(|(index, _)| index).collect())
}
