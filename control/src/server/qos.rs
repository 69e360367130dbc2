//! A pod's quality-of-service class, fixed at its creation. Pure.
//!
//! Source: Kubernetes' `pkg/apis/core/v1/helper/qos/qos.go`. There sums over containers are compared;
//! since a request never exceeds its limit, that is the same as each container by itself.

use gantry_api::quantity::Quantity;
use serde_json::Value;

/// What counts.
const RESOURCES: [&str; 2] = ["cpu", "memory"];

/// `Guaranteed`, `Burstable` or `BestEffort`.
pub(super) fn qos_class(pod: &Value) -> &'static str {
    let spec = &pod["spec"];
    let own = &spec["resources"];
    let parts: Vec<&Value> = if states_something(own) {
        vec![own]
    } else {
        ["containers", "initContainers"]
            .into_iter()
            .filter_map(|list| spec[list].as_array())
            .flatten()
            .map(|container| &container["resources"])
            .collect()
    };
    if !parts.iter().any(|part| states_something(part)) {
        return "BestEffort";
    }
    let is_guaranteed = |part: &&Value| {
        RESOURCES.iter().all(|resource| {
            let limit = amount(part, "limits", resource);
            // A request that is left out is the limit.
            let request = amount(part, "requests", resource).or(limit);
            limit.is_some() && request == limit
        })
    };
    if parts.iter().all(is_guaranteed) {
        "Guaranteed"
    } else {
        "Burstable"
    }
}

fn states_something(resources: &Value) -> bool {
    ["requests", "limits"].iter().any(|side| {
        RESOURCES
            .iter()
            .any(|resource| amount(resources, side, resource).is_some())
    })
}

/// A quantity above zero.
fn amount(resources: &Value, side: &str, resource: &str) -> Option<Quantity> {
    let text = resources[side][resource].as_str()?;
    let quantity = Quantity::parse(text).ok()?;
    (quantity > Quantity::from_units(0)).then_some(quantity)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn class(containers: &[Value]) -> &'static str {
        let containers: Vec<Value> = containers
            .iter()
            .map(|resources| json!({"resources": resources}))
            .collect();
        qos_class(&json!({"spec": {"containers": containers}}))
    }

    #[test]
    fn classes_are_kubernetes() {
        let full = json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m"}});
        let half = json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}});
        let none = json!({"limits": {"cpu": "0"}});
        assert_eq!(class(&[json!(null), none.clone()]), "BestEffort");
        assert_eq!(class(std::slice::from_ref(&full)), "Guaranteed");
        assert_eq!(class(&[full.clone(), full.clone()]), "Guaranteed");
        assert_eq!(class(&[full.clone(), none]), "Burstable");
        assert_eq!(class(&[full, half]), "Burstable");
        assert_eq!(
            class(&[json!({"requests": {"memory": "1Mi"}})]),
            "Burstable"
        );
        assert_eq!(class(&[json!({"limits": {"memory": "1Mi"}})]), "Burstable");
    }
}
