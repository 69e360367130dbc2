//! LimitRanges: what a container, pod or claim of a namespace gets where it says nothing, and how much or
//! how little it may ask for. Pure.
//!
//! Source: Kubernetes' plugin LimitRanger (`plugin/pkg/admission/limitranger`); the words are its.

use std::collections::BTreeSet;

use gantry_api::k8s_openapi::api::core::v1::{
    Container, LimitRange, LimitRangeItem, PersistentVolumeClaim, Pod,
};
use gantry_api::pod_resources::{Amounts, amounts, limits, requests};
use gantry_api::quantity::Quantity;
use serde_json::{Map, Value, json};

/// Says which numbers of a pod are none of its author's.
const ANNOTATION: &str = "kubernetes.io/limit-ranger";

fn items<'a>(range: &'a LimitRange, type_: &'a str) -> impl Iterator<Item = &'a LimitRangeItem> {
    let all = range.spec.iter().flat_map(|spec| &spec.limits);
    all.filter(move |item| item.type_ == type_)
}

/// Whether a change leaves alone what limits are about.
pub(super) fn same_resources(is_pod: bool, old: &Value, new: &Value) -> bool {
    if !is_pod {
        return old["spec"]["resources"] == new["spec"]["resources"];
    }
    let of = |pod: &Value| -> Vec<Value> {
        let lists = ["containers", "initContainers"].map(|list| pod["spec"][list].clone());
        let lists = lists.iter().filter_map(Value::as_array).flatten();
        let all = lists.map(|container| container["resources"].clone());
        all.chain([pod["spec"]["resources"].clone()]).collect()
    };
    of(old) == of(new)
}

/// Gives containers the limits and requests that they leave out, and notes which.
pub(super) fn set_defaults(pod: &mut Value, range: &LimitRange) {
    let (mut default_limits, mut default_requests) = (Amounts::new(), Amounts::new());
    for item in items(range, "Container") {
        default_limits.extend(amounts(item.default.as_ref()));
        default_requests.extend(amounts(item.default_request.as_ref()));
    }
    let mut set = Vec::new();
    for (list, what) in [
        ("containers", "container"),
        ("initContainers", "init container"),
    ] {
        let containers = pod["spec"].get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            let name = container["name"].as_str().unwrap_or_default().to_owned();
            for (side, defaults, word) in [
                ("requests", &default_requests, "request"),
                ("limits", &default_limits, "limit"),
            ] {
                let added = fill(container, side, defaults);
                if !added.is_empty() {
                    set.push(format!("{} {word} for {what} {name}", added.join(", ")));
                }
            }
        }
    }
    if !set.is_empty() {
        let text = format!("LimitRanger plugin set: {}", set.join("; "));
        let annotations = &mut pod["metadata"]["annotations"];
        if !annotations.is_object() {
            *annotations = json!({});
        }
        annotations[ANNOTATION] = json!(text);
    }
}

/// Puts in what one side of a container's resources lacks; the names of it.
fn fill(container: &mut Value, side: &str, defaults: &Amounts) -> Vec<String> {
    let mut added = Vec::new();
    for (name, amount) in defaults {
        let resources = &mut container["resources"];
        if !resources.is_object() {
            *resources = Value::Object(Map::new());
        }
        let list = &mut resources[side];
        if !list.is_object() {
            *list = Value::Object(Map::new());
        }
        if list.get(name).is_none() {
            list[name] = json!(amount.to_string());
            added.push(name.clone());
        }
    }
    added
}

/// What of a pod breaks the range.
pub(super) fn check_pod(pod: &Pod, range: &LimitRange) -> Vec<String> {
    let mut errors = Vec::new();
    let Some(spec) = &pod.spec else { return errors };
    for item in items(range, "Container") {
        let containers = spec.containers.iter();
        for container in containers.chain(spec.init_containers.iter().flatten()) {
            let (requests, limits) = of_container(container);
            check(item, &requests, &limits, &mut errors);
        }
    }
    for item in items(range, "Pod") {
        check(item, &requests(spec), &limits(spec), &mut errors);
    }
    errors
}

fn of_container(container: &Container) -> (Amounts, Amounts) {
    let resources = container.resources.as_ref();
    (
        amounts(resources.and_then(|r| r.requests.as_ref())),
        amounts(resources.and_then(|r| r.limits.as_ref())),
    )
}

/// What of a claim breaks the range.
pub(super) fn check_claim(claim: &PersistentVolumeClaim, range: &LimitRange) -> Vec<String> {
    let spec = claim.spec.as_ref();
    let resources = spec.and_then(|spec| spec.resources.as_ref());
    let requests = amounts(resources.and_then(|r| r.requests.as_ref()));
    let mut errors = Vec::new();
    for item in items(range, "PersistentVolumeClaim") {
        for (name, least) in amounts(item.min.as_ref()) {
            errors.extend(too_little(item, &name, least, &requests, &Amounts::new()));
        }
        for (name, most) in amounts(item.max.as_ref()) {
            let start = format!("maximum {name} usage per {} is {most}", item.type_);
            match requests.get(&name) {
                None => errors.push(format!("{start}.  No request is specified")),
                Some(asked) if *asked > most => {
                    errors.push(format!("{start}, but request is {asked}"));
                }
                Some(_) => {}
            }
        }
    }
    errors
}

fn check(item: &LimitRangeItem, requests: &Amounts, limits: &Amounts, errors: &mut Vec<String>) {
    for (name, least) in amounts(item.min.as_ref()) {
        errors.extend(too_little(item, &name, least, requests, limits));
    }
    for (name, most) in amounts(item.max.as_ref()) {
        errors.extend(too_much(item, &name, most, requests, limits));
    }
    for (name, most) in amounts(item.max_limit_request_ratio.as_ref()) {
        errors.extend(too_far_apart(item, &name, most, requests, limits));
    }
}

fn too_little(
    item: &LimitRangeItem,
    name: &str,
    least: Quantity,
    requests: &Amounts,
    limits: &Amounts,
) -> Option<String> {
    let start = format!("minimum {name} usage per {} is {least}", item.type_);
    let Some(asked) = requests.get(name) else {
        return Some(format!("{start}.  No request is specified"));
    };
    if *asked < least {
        return Some(format!("{start}, but request is {asked}"));
    }
    let limit = limits.get(name).filter(|limit| **limit < least)?;
    Some(format!("{start}, but limit is {limit}"))
}

fn too_much(
    item: &LimitRangeItem,
    name: &str,
    most: Quantity,
    requests: &Amounts,
    limits: &Amounts,
) -> Option<String> {
    let start = format!("maximum {name} usage per {} is {most}", item.type_);
    let Some(limit) = limits.get(name) else {
        return Some(format!("{start}.  No limit is specified"));
    };
    if *limit > most {
        return Some(format!("{start}, but limit is {limit}"));
    }
    let asked = requests.get(name).filter(|asked| **asked > most)?;
    Some(format!("{start}, but request is {asked}"))
}

fn too_far_apart(
    item: &LimitRangeItem,
    name: &str,
    most: Quantity,
    requests: &Amounts,
    limits: &Amounts,
) -> Option<String> {
    let type_ = &item.type_;
    let start = format!("{name} max limit to request ratio per {type_} is {most}, but");
    let positive = |list: &Amounts| list.get(name).copied().filter(|a| !a.is_zero());
    let Some(asked) = positive(requests) else {
        return Some(format!("{start} no request is specified or request is 0"));
    };
    let Some(limit) = positive(limits) else {
        return Some(format!("{start} no limit is specified or limit is 0"));
    };
    let ratio = limit.as_f64() / asked.as_f64();
    (ratio > most.as_f64()).then(|| format!("{start} provided ratio is {ratio:.6}"))
}

/// Several errors as one, each once, as Kubernetes prints them.
pub(super) fn joined(errors: &[String]) -> String {
    let mut seen = BTreeSet::new();
    let all: Vec<&str> = errors
        .iter()
        .filter(|error| seen.insert(error.as_str()))
        .map(String::as_str)
        .collect();
    match all.as_slice() {
        [one] => (*one).to_owned(),
        many => format!("[{}]", many.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(item: Value) -> LimitRange {
        serde_json::from_value(json!({"spec": {"limits": [item]}})).unwrap()
    }

    fn pod(resources: &Value) -> Value {
        json!({"metadata": {"name": "p"}, "spec": {"containers": [
            {"name": "a", "resources": resources}, {"name": "b", "resources": resources},
        ]}})
    }

    fn check(resources: Value, item: Value) -> Vec<String> {
        let pod: Pod = serde_json::from_value(pod(&resources)).unwrap();
        check_pod(&pod, &range(item))
    }

    #[test]
    fn refusals_are_in_kubernetes_words() {
        let asked = json!({"requests": {"cpu": "200m"}, "limits": {"cpu": "1"}});
        for (item, words) in [
            (
                json!({"type": "Container", "max": {"cpu": "500m"}}),
                "maximum cpu usage per Container is 500m, but limit is 1",
            ),
            (
                json!({"type": "Container", "max": {"memory": "1Gi"}}),
                "maximum memory usage per Container is 1Gi.  No limit is specified",
            ),
            (
                json!({"type": "Container", "min": {"cpu": "300m"}}),
                "minimum cpu usage per Container is 300m, but request is 200m",
            ),
            (
                json!({"type": "Pod", "min": {"memory": "1Mi"}}),
                "minimum memory usage per Pod is 1Mi.  No request is specified",
            ),
            (
                json!({"type": "Pod", "max": {"cpu": "1500m"}}),
                "maximum cpu usage per Pod is 1500m, but limit is 2",
            ),
            (
                json!({"type": "Container", "maxLimitRequestRatio": {"cpu": "3"}}),
                "cpu max limit to request ratio per Container is 3, but provided ratio is 5.000000",
            ),
            (
                json!({"type": "Pod", "maxLimitRequestRatio": {"memory": "3"}}),
                "memory max limit to request ratio per Pod is 3, but no request is specified or \
                 request is 0",
            ),
        ] {
            assert_eq!(joined(&check(asked.clone(), item)), words);
        }
        let both = json!({"type": "Container", "max": {"cpu": "500m"}, "min": {"cpu": "300m"}});
        assert_eq!(
            joined(&check(asked.clone(), both)),
            "[minimum cpu usage per Container is 300m, but request is 200m, \
             maximum cpu usage per Container is 500m, but limit is 1]"
        );
        let fine = json!({"type": "Pod", "max": {"cpu": "2"}, "min": {"cpu": "400m"},
            "maxLimitRequestRatio": {"cpu": "5"}});
        assert!(check(asked, fine).is_empty());
    }

    #[test]
    fn a_claim_is_measured_by_its_request() {
        let claim = |size: Value| -> PersistentVolumeClaim {
            serde_json::from_value(json!({"spec": {"resources": {"requests": size}}})).unwrap()
        };
        let item = json!({"type": "PersistentVolumeClaim", "min": {"storage": "1Gi"},
            "max": {"storage": "5Gi"}});
        let check = |size: Value| joined(&check_claim(&claim(size), &range(item.clone())));
        assert_eq!(
            check(json!({"storage": "6Gi"})),
            "maximum storage usage per PersistentVolumeClaim is 5Gi, but request is 6Gi"
        );
        assert_eq!(
            check(json!({"storage": "1Mi"})),
            "minimum storage usage per PersistentVolumeClaim is 1Gi, but request is 1Mi"
        );
        assert!(check_claim(&claim(json!({"storage": "2Gi"})), &range(item)).is_empty());
    }

    #[test]
    fn what_a_container_leaves_out_is_put_in_and_noted() {
        let item = json!({"type": "Container", "default": {"cpu": "1", "memory": "1Gi"},
            "defaultRequest": {"cpu": "100m"}});
        let mut pod = pod(&json!({"requests": {"cpu": "5m"}}));
        set_defaults(&mut pod, &range(item.clone()));
        let first = &pod["spec"]["containers"][0]["resources"];
        assert_eq!(first["requests"], json!({"cpu": "5m"}));
        assert_eq!(first["limits"], json!({"cpu": "1", "memory": "1Gi"}));
        assert_eq!(
            pod["metadata"]["annotations"][ANNOTATION],
            "LimitRanger plugin set: cpu, memory limit for container a; cpu, memory limit for \
             container b"
        );
        let before = pod.clone();
        set_defaults(&mut pod, &range(item));
        assert_eq!(pod, before);
    }

    proptest! {
        /// What gets its numbers from a range that fits together is never refused by it.
        #[test]
        fn defaults_pass_their_own_range(
            mut numbers in proptest::collection::vec(1..5000_i64, 4), memory in 1..9_i64,
        ) {
            numbers.sort_unstable();
            let milli = |n: i64| format!("{n}m");
            let item = json!({"type": "Container",
                "min": {"cpu": milli(numbers[0])}, "defaultRequest": {"cpu": milli(numbers[1])},
                "default": {"cpu": milli(numbers[2]), "memory": format!("{memory}Mi")},
                "max": {"cpu": milli(numbers[3])}});
            let mut pod = pod(&json!({}));
            set_defaults(&mut pod, &range(item.clone()));
            let pod: Pod = serde_json::from_value(pod).unwrap();
            prop_assert_eq!(check_pod(&pod, &range(item)), Vec::<String>::new());
        }
    }
}
