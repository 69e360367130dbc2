//! Defaults of a LimitRange. Source: Kubernetes' `pkg/apis/core/v1/defaults.go`.

use k8s_openapi::api::core::v1::LimitRange;

/// A container's default limit is the maximum where none is given; its default request is the default
/// limit, or else the minimum.
pub fn limit_range(range: &mut LimitRange) {
    let Some(spec) = &mut range.spec else { return };
    for item in spec.limits.iter_mut().filter(|i| i.type_ == "Container") {
        let limits = item.default.get_or_insert_default();
        for (name, amount) in item.max.iter().flatten() {
            limits.entry(name.clone()).or_insert(amount.clone());
        }
        let requests = item.default_request.get_or_insert_default();
        for (name, amount) in limits.iter().chain(item.min.iter().flatten()) {
            requests.entry(name.clone()).or_insert(amount.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_left_out_follows_from_the_rest() {
        let mut range: LimitRange = serde_json::from_value(json!({"spec": {"limits": [
            {"type": "Container", "max": {"cpu": "2"}, "min": {"cpu": "100m", "memory": "1Mi"},
             "default": {"memory": "4Mi"}},
            {"type": "Pod", "max": {"cpu": "4"}},
        ]}}))
        .unwrap();
        limit_range(&mut range);
        let range = serde_json::to_value(&range).unwrap();
        let first = &range["spec"]["limits"][0];
        assert_eq!(first["default"], json!({"cpu": "2", "memory": "4Mi"}));
        assert_eq!(
            first["defaultRequest"],
            json!({"cpu": "2", "memory": "4Mi"})
        );
        assert!(range["spec"]["limits"][1].get("default").is_none());
    }
}
