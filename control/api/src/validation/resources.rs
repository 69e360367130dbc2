//! What a pod may ask for beside plain amounts (huge pages, resources of the pod as a whole, resize
//! policies), and which changes of a running pod's resources are taken.
//!
//! Source: Kubernetes' `ValidatePodResize`, `validatePodResources`. One difference: stock Kubernetes wants the `resize`
//! subresource for it, here an ordinary update (`gantry apply`) may do it too.

use super::pod::CPU_BURST_ANNOTATION;
use crate::field::{FieldError, Path};
use crate::quantity::Quantity as Amount;
use k8s_openapi::api::core::v1::{Container, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;

/// What can be resized.
const RESIZABLE: [&str; 2] = ["cpu", "memory"];

const RESIZE_POLICIES: [&str; 2] = ["NotRequired", "RestartContainer"];

type List = Option<BTreeMap<String, Quantity>>;

/// Resources of the pod as a whole, huge pages, resize policies.
pub(super) fn spec(spec: &PodSpec, path: &Path, errors: &mut Vec<FieldError>) {
    if let Some(whole) = &spec.resources {
        pod_level(spec, whole, &path.child("resources"), errors);
    }
    let never = spec.restart_policy.as_deref() == Some("Never");
    for (i, container) in spec.containers.iter().enumerate() {
        let path = path.child("containers").index(i);
        if let Some(resources) = &container.resources {
            hugepages(resources, &path.child("resources"), errors);
        }
        for (i, policy) in container.resize_policy.iter().flatten().enumerate() {
            let path = path.child("resizePolicy").index(i);
            let name = policy.resource_name.as_str();
            if !RESIZABLE.contains(&name) {
                let path = path.child("resourceName");
                errors.push(FieldError::not_supported(&path, name, &RESIZABLE));
            }
            let wanted = policy.restart_policy.as_str();
            let path = path.child("restartPolicy");
            if !RESIZE_POLICIES.contains(&wanted) {
                errors.push(FieldError::not_supported(&path, wanted, &RESIZE_POLICIES));
            } else if never && wanted != "NotRequired" {
                let detail = "must be 'NotRequired' when `restartPolicy` is 'Never'";
                errors.push(FieldError::invalid(&path, wanted, detail));
            }
        }
    }
    for (i, container) in spec.init_containers.iter().flatten().enumerate() {
        if let Some(resources) = &container.resources {
            let path = path.child("initContainers").index(i).child("resources");
            hugepages(resources, &path, errors);
        }
    }
}

/// What device plugins offer: `vendor.example/kind`.
fn is_device(name: &str) -> bool {
    name.contains('/') && !name.contains("kubernetes.io/")
}

/// Huge pages and devices cannot be overcommitted: what is requested is the limit.
fn hugepages(resources: &ResourceRequirements, path: &Path, errors: &mut Vec<FieldError>) {
    let names = |list: &List| -> Vec<String> {
        let all = list.iter().flatten().map(|(name, _)| name.clone());
        all.filter(|name| name.starts_with("hugepages-") || is_device(name))
            .collect()
    };
    for name in names(&resources.requests) {
        let equal = amount(&resources.requests, &name) == amount(&resources.limits, &name);
        if !equal {
            let detail = format!("must be equal to {name} limit");
            let path = path.child("requests").key(&name);
            errors.push(FieldError::forbidden(&path, &detail));
        }
    }
    for name in names(&resources.limits) {
        let path = path.child("limits").key(&name);
        if is_device(&name) {
            let thousandths = amount(&resources.limits, &name).map_or(0, Amount::milli);
            if thousandths < 0 || thousandths % 1000 != 0 {
                errors.push(FieldError::invalid(
                    &path,
                    name.as_str(),
                    "must be an integer",
                ));
            }
            continue;
        }
        let size = name
            .strip_prefix("hugepages-")
            .and_then(|s| Amount::parse(s).ok());
        let bytes = amount(&resources.limits, &name).map_or(0, Amount::units);
        match size.map(Amount::units).filter(|size| *size > 0) {
            None => errors.push(FieldError::invalid(
                &path,
                name.as_str(),
                "names no page size",
            )),
            Some(size) if bytes % size != 0 => {
                let detail = "must be a multiple of the page size";
                errors.push(FieldError::invalid(&path, bytes, detail));
            }
            Some(_) => {}
        }
    }
}

/// `spec.resources`: no container may have more than the pod, and together they may not ask for more.
fn pod_level(
    spec: &PodSpec,
    whole: &ResourceRequirements,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    super::pod::resources(whole, path, errors);
    hugepages(whole, path, errors);
    for (field, list) in [("requests", &whole.requests), ("limits", &whole.limits)] {
        for (name, _) in list.iter().flatten() {
            if !RESIZABLE.contains(&name.as_str()) && !name.starts_with("hugepages-") {
                let path = path.child(field).key(name);
                let allowed = ["cpu", "hugepages-", "memory"];
                errors.push(FieldError::not_supported(&path, name.as_str(), &allowed));
            }
        }
    }
    for name in RESIZABLE {
        let own = |c: &Container, of: fn(&ResourceRequirements) -> &List| {
            c.resources.as_ref().and_then(|r| amount(of(r), name))
        };
        let asked = spec
            .containers
            .iter()
            .filter_map(|c| own(c, |r| &r.requests))
            .fold(Amount::from_units(0), Amount::plus);
        let request = amount(&whole.requests, name).or(amount(&whole.limits, name));
        if request.is_some_and(|request| asked > request) {
            let detail = format!("must be greater than or equal to the containers' sum of {asked}");
            let path = path.child("requests").key(name);
            errors.push(FieldError::invalid(&path, name, &detail));
        }
        let Some(limit) = amount(&whole.limits, name) else {
            continue;
        };
        for container in &spec.containers {
            if own(container, |r| &r.limits).is_some_and(|own| own > limit) {
                let detail = format!("container {} has a larger limit", container.name);
                let path = path.child("limits").key(name);
                errors.push(FieldError::invalid(&path, name, &detail));
            }
        }
    }
}

/// Copies what may change from `new` into `allowed`, with an error for what may not.
pub(super) fn allow(
    new: &PodSpec,
    old: &PodSpec,
    allowed: &mut PodSpec,
    errors: &mut Vec<FieldError>,
) {
    let path = Path::new("spec").child("containers");
    let mut changed = false;
    for (i, (new, old)) in new.containers.iter().zip(&old.containers).enumerate() {
        if new.resources == old.resources {
            continue;
        }
        changed = true;
        let path = path.index(i).child("resources");
        container(new, old, &path, errors);
        if let Some(allowed) = allowed.containers.get_mut(i) {
            allowed.resources.clone_from(&new.resources);
        }
    }
    if changed && class(new) != class(old) {
        let detail = format!(
            "Pod QOS Class may not change as a result of resizing (it is {})",
            class(old)
        );
        errors.push(FieldError::forbidden(&path, &detail));
    }
}

fn container(new: &Container, old: &Container, path: &Path, errors: &mut Vec<FieldError>) {
    let (empty, none) = (ResourceRequirements::default(), None);
    let new = new.resources.as_ref().unwrap_or(&empty);
    let old = old.resources.as_ref().unwrap_or(&empty);
    for (field, new, old) in [
        ("requests", &new.requests, &old.requests),
        ("limits", &new.limits, &old.limits),
    ] {
        let path = path.child(field);
        for name in RESIZABLE {
            if amount(old, name).is_some() && amount(new, name).is_none() {
                let detail = format!("resource {field} cannot be removed");
                errors.push(FieldError::forbidden(&path.key(name), &detail));
            }
        }
        if rest(new) != rest(old) {
            let detail = "only cpu and memory resources are mutable";
            errors.push(FieldError::forbidden(&path, detail));
        }
    }
    if new.claims != old.claims && new.claims != none {
        let detail = "only cpu and memory resources are mutable";
        errors.push(FieldError::forbidden(&path.child("claims"), detail));
    }
}

fn amount(list: &List, name: &str) -> Option<Amount> {
    Amount::parse(&list.as_ref()?.get(name)?.0).ok()
}

fn rest(list: &List) -> BTreeMap<&String, &Quantity> {
    let all = list.iter().flatten();
    all.filter(|(name, _)| !RESIZABLE.contains(&name.as_str()))
        .collect()
}

/// The class as `status.qosClass` has it.
fn class(spec: &PodSpec) -> &'static str {
    let init = spec.init_containers.iter().flatten();
    let mut any = false;
    let mut guaranteed = true;
    for container in spec.containers.iter().chain(init) {
        let resources = container.resources.clone().unwrap_or_default();
        let zero = Amount::from_units(0);
        for name in RESIZABLE {
            let positive = |list| amount(list, name).filter(|a| *a > zero);
            let limit = positive(&resources.limits);
            let request = positive(&resources.requests).or(limit);
            any |= request.is_some();
            guaranteed &= limit.is_some() && request == limit;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// The annotation that lets a pod save up CPU quota.
pub(super) fn burst(annotations: Option<&BTreeMap<String, String>>, errors: &mut Vec<FieldError>) {
    let Some(text) = annotations.and_then(|a| a.get(CPU_BURST_ANNOTATION)) else {
        return;
    };
    if !text.parse::<u64>().is_ok_and(|percent| percent <= 100) {
        let path = Path::new("metadata").child("annotations");
        let detail = "want a percentage of the CPU limit, 0 to 100";
        errors.push(FieldError::invalid(
            &path.key(CPU_BURST_ANNOTATION),
            text.as_str(),
            detail,
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::super::{pod, pod_update};
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::{Value, json};

    fn with(resources: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {"containers": [
            {"name": "a", "image": "i", "resources": resources},
        ]}}))
        .unwrap()
    }

    fn refusals(old: Value, new: Value) -> Vec<String> {
        let errors = pod_update(&with(new), &with(old));
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn cpu_and_memory_may_change_within_the_class() {
        let old = json!({"requests": {"cpu": "1"}, "limits": {"memory": "1Gi"}});
        let new = json!({"requests": {"cpu": "2"}, "limits": {"memory": "2Gi"}});
        assert_eq!(refusals(old.clone(), new), Vec::<String>::new());
        for (new, words) in [
            (json!({}), "cannot be removed"),
            (
                json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1"}}),
                "QOS Class may not change",
            ),
            (
                json!({"requests": {"cpu": "1"},
                       "limits": {"memory": "1Gi", "hugepages-2Mi": "2Mi"}}),
                "only cpu and memory",
            ),
        ] {
            let all = refusals(old.clone(), new);
            assert!(
                all.iter().any(|text| text.contains(words)),
                "{words}: {all:?}"
            );
        }
    }

    #[test]
    fn huge_pages_pod_resources_and_policies_are_checked_by_path() {
        let errors = |spec: Value| -> Vec<String> {
            let mut one = with(json!({}));
            let merged = {
                let mut value = serde_json::to_value(&one).unwrap();
                for (name, field) in spec.as_object().unwrap() {
                    value["spec"][name] = field.clone();
                }
                value
            };
            one = serde_json::from_value(merged).unwrap();
            pod(&one).iter().map(ToString::to_string).collect()
        };
        let container = |resources: Value, policy: Value| json!([{"name": "a", "image": "i", "resources": resources, "resizePolicy": policy}]);
        let cpu = json!({"requests": {"cpu": "1"}, "limits": {"cpu": "2"}});
        let fine = json!({"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "2"}},
                          "containers": container(cpu.clone(), json!([]))});
        assert_eq!(errors(fine), Vec::<String>::new());
        let policy =
            |name: &str, what: &str| json!([{"resourceName": name, "restartPolicy": what}]);
        for (spec, place) in [
            (
                json!({"resources": {"limits": {"cpu": "1500m"}}, "containers": container(cpu.clone(), json!([]))}),
                "spec.resources.limits[cpu]",
            ),
            (
                json!({"resources": {"requests": {"cpu": "1m"}}, "containers": container(cpu, json!([]))}),
                "spec.resources.requests[cpu]",
            ),
            (
                json!({"resources": {"limits": {"ephemeral-storage": "1"}}}),
                "spec.resources.limits[ephemeral-storage]",
            ),
            (
                json!({"containers": container(json!({"limits": {"hugepages-2Mi": "3Mi"}}), json!([]))}),
                "spec.containers[0].resources.limits[hugepages-2Mi]",
            ),
            (
                json!({"containers": container(json!({"limits": {"example.com/x": "1500m"}}), json!([]))}),
                "spec.containers[0].resources.limits[example.com/x]",
            ),
            (
                json!({"containers": container(json!({"limits": {"example.com/x": "2"}, "requests": {"example.com/x": "1"}}), json!([]))}),
                "spec.containers[0].resources.requests[example.com/x]",
            ),
            (
                json!({"containers": container(json!({}), policy("disk", "NotRequired"))}),
                "spec.containers[0].resizePolicy[0].resourceName",
            ),
            (
                json!({"restartPolicy": "Never", "containers": container(json!({}), policy("cpu", "RestartContainer"))}),
                "spec.containers[0].resizePolicy[0].restartPolicy",
            ),
        ] {
            let all = errors(spec);
            assert!(
                all.iter().any(|text| text.contains(place)),
                "{place}: {all:?}"
            );
        }
    }

    #[test]
    fn the_burst_is_a_percentage() {
        let mut one = with(json!({}));
        for (text, fine) in [("50", true), ("101", false), ("x", false)] {
            let burst = [("gantry.dev/cpu-burst-percent".to_owned(), text.to_owned())];
            one.metadata.annotations = Some(burst.into());
            assert_eq!(pod(&one).is_empty(), fine, "{text}: {:?}", pod(&one));
        }
    }
}
