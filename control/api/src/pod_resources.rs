//! What a pod asks for as a whole: requests and limits at its peak. Pure.
//!
//! All containers and sidecars together, or one init container with the sidecars before it, whichever is
//! more, plus the overhead. A number of the whole pod (`spec.resources`) takes the sum's place.
//!
//! Source: Kubernetes `component-helpers/resource` (PodRequests, PodLimits).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;

use crate::quantity::Quantity;

/// Amounts by the name of the resource.
pub type Amounts = BTreeMap<String, Quantity>;

type List = BTreeMap<String, ApiQuantity>;

/// A resource list, parsed; what is no quantity counts as nothing (validation refuses it).
#[must_use]
pub fn amounts(list: Option<&List>) -> Amounts {
    let all = list.into_iter().flatten();
    all.filter_map(|(name, text)| Some((name.clone(), Quantity::parse(&text.0).ok()?)))
        .collect()
}

/// Amounts as the API writes them.
#[must_use]
pub fn to_list(amounts: &Amounts) -> List {
    let all = amounts.iter();
    all.map(|(name, amount)| (name.clone(), ApiQuantity(amount.to_string())))
        .collect()
}

/// Adds one to the other.
pub fn add(total: &mut Amounts, more: &Amounts) {
    for (name, amount) in more {
        total
            .entry(name.clone())
            .and_modify(|sum| *sum = sum.plus(*amount))
            .or_insert(*amount);
    }
}

fn raise_to(total: &mut Amounts, other: &Amounts) {
    for (name, amount) in other {
        let mine = total.entry(name.clone()).or_insert(*amount);
        *mine = (*mine).max(*amount);
    }
}

/// What the pod requests.
#[must_use]
pub fn requests(spec: &PodSpec) -> Amounts {
    let mut total = peak(spec, |resources| resources.requests.as_ref());
    add(&mut total, &amounts(spec.overhead.as_ref()));
    total
}

/// What the pod is limited to; a resource that no container limits is not in it.
#[must_use]
pub fn limits(spec: &PodSpec) -> Amounts {
    peak(spec, |resources| resources.limits.as_ref())
}

fn peak(spec: &PodSpec, side: fn(&ResourceRequirements) -> Option<&List>) -> Amounts {
    let of = |container: &Container| amounts(container.resources.as_ref().and_then(side));
    let mut total = Amounts::new();
    for container in &spec.containers {
        add(&mut total, &of(container));
    }
    let (mut sidecars, mut init_peak) = (Amounts::new(), Amounts::new());
    for container in spec.init_containers.iter().flatten() {
        let mut now = of(container);
        if container.restart_policy.as_deref() == Some("Always") {
            add(&mut sidecars, &now);
            now.clone_from(&sidecars);
        } else {
            add(&mut now, &sidecars);
        }
        raise_to(&mut init_peak, &now);
    }
    add(&mut total, &sidecars);
    raise_to(&mut total, &init_peak);
    total.extend(amounts(spec.resources.as_ref().and_then(side)));
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_peak_counts_and_the_pods_own_number_wins() {
        let spec = |init: serde_json::Value, whole: serde_json::Value| -> PodSpec {
            serde_json::from_value(json!({
                "containers": [
                    {"name": "a", "resources": {"requests": {"cpu": "500m"}, "limits": {"cpu": "1"}}},
                    {"name": "b", "resources": {"requests": {"cpu": "1", "memory": "1Gi"}}},
                ],
                "initContainers": init, "resources": whole,
            }))
            .unwrap()
        };
        let text = |amounts: Amounts| -> Vec<String> {
            amounts.iter().map(|(n, a)| format!("{n}={a}")).collect()
        };
        let plain = spec(json!([]), json!({}));
        assert_eq!(text(requests(&plain)), ["cpu=1500m", "memory=1Gi"]);
        assert_eq!(text(limits(&plain)), ["cpu=1"]);
        let init = json!([
            {"name": "s", "restartPolicy": "Always", "resources": {"requests": {"cpu": "1"}}},
            {"name": "i", "resources": {"requests": {"cpu": "2", "memory": "1Mi"}}},
        ]);
        let all = text(requests(&spec(init.clone(), json!({}))));
        assert_eq!(all, ["cpu=3", "memory=1Gi"]);
        let own = text(requests(&spec(init, json!({"requests": {"cpu": "250m"}}))));
        assert_eq!(own, ["cpu=250m", "memory=1Gi"]);
    }
}
