//! ResourceQuotas: what objects of a namespace use, which of them a quota counts, and whether one more fits.
//! Pure.
//!
//! | object | uses |
//! |---|---|
//! | Pod | `count/pods`; until it has ended `pods` and its requests and limits |
//! | Service | `services`, `services.nodeports`, `services.loadbalancers` |
//! | PersistentVolumeClaim | `persistentvolumeclaims`, `requests.storage`, both also per class |
//! | any other | `count/NAME.GROUP`, and `NAME` for a few of the core group |
//!
//! Source: Kubernetes `pkg/quota/v1/evaluator/core`, `apiserver/pkg/admission/plugin/resourcequota`; the words
//! are theirs.

use std::collections::{BTreeMap, BTreeSet};

use gantry_api::k8s_openapi::api::core::v1::{
    Container, PersistentVolumeClaim, Pod, ResourceQuota, ResourceQuotaSpec,
    ScopedResourceSelectorRequirement, Service,
};
use gantry_api::kinds::{KINDS, Kind};
use gantry_api::pod_resources::{Amounts, add, amounts, limits, requests};
use gantry_api::quantity::Quantity;
use jiff::{SignedDuration, Timestamp};

/// Kinds whose plain plural is a resource of its own.
const PLAIN: [&str; 6] = [
    "configmaps",
    "persistentvolumeclaims",
    "replicationcontrollers",
    "resourcequotas",
    "secrets",
    "services",
];
/// What every container must state where a quota limits it. Kubernetes calls that a mistake and keeps it.
const MUST_BE_STATED: [&str; 6] = [
    "cpu",
    "limits.cpu",
    "limits.memory",
    "memory",
    "requests.cpu",
    "requests.memory",
];
/// What stands behind the name of a class.
const CLASS_SUFFIX: &str = ".storageclass.storage.k8s.io/";

fn one() -> Quantity {
    Quantity::from_units(1)
}

/// What the object itself counts as, whatever is in it.
pub(crate) fn object_count(kind: &Kind) -> Amounts {
    let mut uses = Amounts::from([(format!("count/{}", kind.qualified_resource()), one())]);
    if kind.group.is_empty() && PLAIN.contains(&kind.plural) {
        uses.insert(kind.plural.to_owned(), one());
    }
    uses
}

/// Requests and limits under the names that quotas have for them.
fn compute(requests: &Amounts, limits: &Amounts) -> Amounts {
    let mut uses = Amounts::from([("pods".to_owned(), one())]);
    for (name, amount) in requests {
        let plain = matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage")
            || name.starts_with("hugepages-");
        if plain {
            uses.insert(name.clone(), *amount);
        }
        uses.insert(format!("requests.{name}"), *amount);
    }
    for name in ["cpu", "memory", "ephemeral-storage"] {
        if let Some(amount) = limits.get(name) {
            uses.insert(format!("limits.{name}"), *amount);
        }
    }
    uses
}

/// When a pod that is being deleted counts no more: its node is not heard of, and others may start.
pub(crate) fn released_at(pod: &Pod) -> Option<Timestamp> {
    let end = pod.metadata.deletion_timestamp.as_ref()?;
    let grace_s = pod.metadata.deletion_grace_period_seconds?;
    end.0.checked_add(SignedDuration::from_secs(grace_s)).ok()
}

fn pod_usage(pod: &Pod, now: Timestamp) -> Amounts {
    let mut uses = Amounts::from([("count/pods".to_owned(), one())]);
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    let has_ended = matches!(phase, Some("Succeeded" | "Failed"));
    if has_ended || released_at(pod).is_some_and(|at| now > at) {
        return uses;
    }
    if let Some(spec) = &pod.spec {
        add(&mut uses, &compute(&requests(spec), &limits(spec)));
    }
    uses
}

fn service_usage(service: &Service, uses: &mut Amounts) {
    let Some(spec) = &service.spec else { return };
    let ports = spec.ports.as_deref().unwrap_or_default();
    let balanced = spec.type_.as_deref() == Some("LoadBalancer");
    let with_ports = match spec.type_.as_deref() {
        Some("NodePort") => ports.len(),
        // Without an allocation only ports that somebody chose.
        Some("LoadBalancer") if spec.allocate_load_balancer_node_ports == Some(false) => {
            let chosen = ports.iter().filter(|p| p.node_port.unwrap_or(0) != 0);
            chosen.count()
        }
        Some("LoadBalancer") => ports.len(),
        _ => 0,
    };
    let count = |n: usize| Quantity::from_units(i64::try_from(n).unwrap_or(i64::MAX));
    uses.insert("services.nodeports".to_owned(), count(with_ports));
    uses.insert(
        "services.loadbalancers".to_owned(),
        count(usize::from(balanced)),
    );
}

fn claim_usage(claim: &PersistentVolumeClaim, uses: &mut Amounts) {
    let spec = claim.spec.as_ref();
    let class = spec.and_then(|s| s.storage_class_name.as_deref());
    let asked = spec
        .and_then(|s| s.resources.as_ref())
        .and_then(|r| r.requests.as_ref());
    let storage = amounts(asked).get("storage").copied();
    if let Some(storage) = storage {
        uses.insert("requests.storage".to_owned(), storage);
    }
    if let Some(class) = class.filter(|class| !class.is_empty()) {
        let name = |what: &str| format!("{class}{CLASS_SUFFIX}{what}");
        uses.insert(name("persistentvolumeclaims"), one());
        if let Some(storage) = storage {
            uses.insert(name("requests.storage"), storage);
        }
    }
}

/// An object as far as quotas look into it.
#[derive(Debug, Clone)]
pub(crate) enum Counted {
    Pod(Box<Pod>),
    Service(Box<Service>),
    Claim(Box<PersistentVolumeClaim>),
    /// By its kind alone.
    Other,
}

impl Counted {
    /// What it uses.
    pub(crate) fn usage(&self, kind: &Kind, now: Timestamp) -> Amounts {
        let mut uses = object_count(kind);
        match self {
            Counted::Pod(pod) => return pod_usage(pod, now),
            Counted::Service(service) => service_usage(service, &mut uses),
            Counted::Claim(claim) => claim_usage(claim, &mut uses),
            Counted::Other => {}
        }
        uses
    }

    /// Whether the quota is about it, by its scopes: they speak of pods only.
    fn is_in_scopes(&self, spec: &ResourceQuotaSpec) -> bool {
        match self {
            Counted::Pod(pod) => is_in_scopes(pod, spec),
            _ => scopes(spec).is_empty(),
        }
    }
}

/// All scopes of a quota, the plain ones as selectors.
fn scopes(spec: &ResourceQuotaSpec) -> Vec<ScopedResourceSelectorRequirement> {
    let plain = spec.scopes.iter().flatten().map(|scope| {
        let scope_name = scope.clone();
        ScopedResourceSelectorRequirement {
            operator: "Exists".to_owned(),
            scope_name,
            values: None,
        }
    });
    let selector = spec.scope_selector.iter();
    let selected = selector.flat_map(|s| s.match_expressions.iter().flatten().cloned());
    plain.chain(selected).collect()
}

pub(crate) fn is_in_scopes(pod: &Pod, spec: &ResourceQuotaSpec) -> bool {
    scopes(spec).iter().all(|scope| has_scope(pod, scope))
}

fn has_scope(pod: &Pod, scope: &ScopedResourceSelectorRequirement) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let ends = spec.active_deadline_seconds.is_some_and(|s| s >= 0);
    let qos = pod.status.as_ref().and_then(|s| s.qos_class.as_deref());
    let best_effort = qos == Some("BestEffort");
    let class = spec.priority_class_name.as_deref().unwrap_or_default();
    let listed = || scope.values.iter().flatten().any(|value| value == class);
    match (scope.scope_name.as_str(), scope.operator.as_str()) {
        ("Terminating", _) => ends,
        ("NotTerminating", _) => !ends,
        ("BestEffort", _) => best_effort,
        ("NotBestEffort", _) => !best_effort,
        ("PriorityClass", "Exists") => !class.is_empty(),
        ("PriorityClass", "DoesNotExist") => class.is_empty(),
        ("PriorityClass", "In") => !class.is_empty() && listed(),
        ("PriorityClass", "NotIn") => class.is_empty() || !listed(),
        ("CrossNamespacePodAffinity", _) => reaches_other_namespaces(pod),
        _ => false,
    }
}

fn reaches_other_namespaces(pod: &Pod) -> bool {
    let Some(affinity) = pod.spec.as_ref().and_then(|s| s.affinity.as_ref()) else {
        return false;
    };
    let near = affinity.pod_affinity.iter().flat_map(|a| {
        let preferred = a
            .preferred_during_scheduling_ignored_during_execution
            .iter();
        let preferred = preferred.flatten().map(|term| &term.pod_affinity_term);
        let required = a.required_during_scheduling_ignored_during_execution.iter();
        required.flatten().chain(preferred)
    });
    let apart = affinity.pod_anti_affinity.iter().flat_map(|a| {
        let preferred = a
            .preferred_during_scheduling_ignored_during_execution
            .iter();
        let preferred = preferred.flatten().map(|term| &term.pod_affinity_term);
        let required = a.required_during_scheduling_ignored_during_execution.iter();
        required.flatten().chain(preferred)
    });
    let mut terms = near.chain(apart);
    terms.any(|term| {
        let named = term.namespaces.as_ref().is_some_and(|n| !n.is_empty());
        named || term.namespace_selector.is_some()
    })
}

/// Which of these names no container may leave out; where one does, by name of the resource.
fn unstated(pod: &Pod, hard: &Amounts) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let whole = spec.resources.as_ref().map(|own| {
        let requests = amounts(own.requests.as_ref());
        compute(&requests, &amounts(own.limits.as_ref()))
    });
    let mut missing: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let init = spec.init_containers.iter().flatten();
    for container in spec.containers.iter().chain(init) {
        let stated = stated(container);
        for name in MUST_BE_STATED {
            let of_pod = whole.as_ref().is_some_and(|w| w.contains_key(name));
            if hard.contains_key(name) && !stated.contains_key(name) && !of_pod {
                missing.entry(name).or_default().insert(&container.name);
            }
        }
    }
    if missing.is_empty() {
        return None;
    }
    let parts: Vec<String> = missing
        .iter()
        .map(|(name, containers)| {
            let containers: Vec<&str> = containers.iter().copied().collect();
            format!("{name} for: {}", containers.join(","))
        })
        .collect();
    Some(format!("must specify {}", parts.join("; ")))
}

fn stated(container: &Container) -> Amounts {
    let resources = container.resources.as_ref();
    let requests = amounts(resources.and_then(|r| r.requests.as_ref()));
    compute(
        &requests,
        &amounts(resources.and_then(|r| r.limits.as_ref())),
    )
}

/// `cpu=1,pods=2`
fn printed<'a>(amounts: impl Iterator<Item = (&'a String, Quantity)>) -> String {
    let parts: Vec<String> = amounts.map(|(name, n)| format!("{name}={n}")).collect();
    parts.join(",")
}

/// What the quota has in use with one write more: `None` when that changes nothing.
///
/// # Errors
/// Why the write is refused, in Kubernetes' words.
pub(crate) fn charge(
    quota: &ResourceQuota,
    kind: &Kind,
    old: Option<&Counted>,
    new: &Counted,
    now: Timestamp,
) -> Result<Option<Amounts>, String> {
    let spec = quota.spec.clone().unwrap_or_default();
    if !new.is_in_scopes(&spec) {
        return Ok(None);
    }
    let mut delta = new.usage(kind, now);
    if let Some(old) = old.filter(|old| old.is_in_scopes(&spec)) {
        let before = old.usage(kind, now);
        for (name, amount) in &mut delta {
            if let Some(before) = before.get(name) {
                *amount = amount.minus(*before);
            }
        }
    }
    let name = quota.metadata.name.as_deref().unwrap_or_default();
    let status = quota.status.as_ref();
    let hard = amounts(status.and_then(|s| s.hard.as_ref()));
    let used = amounts(status.and_then(|s| s.used.as_ref()));
    // Also a pod that asks for nothing must say so, when it is new.
    if let (Counted::Pod(pod), None) = (new, old)
        && let Some(why) = unstated(pod, &hard)
    {
        return Err(format!("failed quota: {name}: {why}"));
    }
    delta.retain(|name, amount| *amount > Quantity::from_units(0) && hard.contains_key(name));
    if delta.is_empty() {
        return Ok(None);
    }
    let unknown: Vec<&str> = delta
        .keys()
        .filter(|name| !used.contains_key(*name))
        .map(String::as_str)
        .collect();
    if !unknown.is_empty() {
        let unknown = unknown.join(",");
        return Err(format!(
            "status unknown for quota: {name}, resources: {unknown}"
        ));
    }
    let exceeded = |name: &String, amount: &Quantity| used[name].plus(*amount) > hard[name];
    let over: Vec<&String> = delta
        .iter()
        .filter(|(name, amount)| exceeded(name, amount))
        .map(|(name, _)| name)
        .collect();
    if !over.is_empty() {
        let of = |list: &Amounts| printed(over.iter().map(|name| (*name, list[*name])));
        return Err(format!(
            "exceeded quota: {name}, requested: {}, used: {}, limited: {}",
            of(&delta),
            of(&used),
            of(&hard)
        ));
    }
    let mut used = used;
    add(&mut used, &delta);
    Ok(Some(used))
}

/// What there is in a namespace.
pub(crate) struct Content<'a> {
    pub(crate) pods: &'a [std::sync::Arc<Pod>],
    pub(crate) services: &'a [std::sync::Arc<Service>],
    pub(crate) claims: &'a [std::sync::Arc<PersistentVolumeClaim>],
    /// How many objects of a kind there are.
    pub(crate) count: &'a dyn Fn(&Kind) -> usize,
}

/// What all of it uses of what the quota limits.
pub(crate) fn used(spec: &ResourceQuotaSpec, content: &Content<'_>, now: Timestamp) -> Amounts {
    let hard = amounts(spec.hard.as_ref());
    let mut total = Amounts::new();
    let is_scoped = !scopes(spec).is_empty();
    for pod in content.pods.iter().filter(|pod| is_in_scopes(pod, spec)) {
        add(&mut total, &pod_usage(pod, now));
    }
    if !is_scoped {
        for service in content.services {
            let mut uses = Amounts::new();
            service_usage(service, &mut uses);
            add(&mut total, &uses);
        }
        for claim in content.claims {
            let mut uses = Amounts::new();
            claim_usage(claim, &mut uses);
            add(&mut total, &uses);
        }
        for kind in KINDS.iter().filter(|k| k.namespaced && k.plural != "pods") {
            let names = object_count(kind);
            if names.keys().any(|name| hard.contains_key(name)) {
                let count = i64::try_from((content.count)(kind)).unwrap_or(i64::MAX);
                total.extend(names.into_keys().map(|n| (n, Quantity::from_units(count))));
            }
        }
    }
    let zero = Quantity::from_units(0);
    let of = |name: String| {
        let amount = total.get(&name).copied().unwrap_or(zero);
        (name, amount)
    };
    hard.into_keys().map(of).collect()
}

#[cfg(test)]
#[path = "quota_tests.rs"]
mod tests;
