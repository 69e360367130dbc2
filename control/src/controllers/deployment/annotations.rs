//! What a Deployment writes into the metadata of its ReplicaSets, and the numbers of its strategy.
//!
//! Source: Kubernetes `pkg/controller/deployment/util/deployment_util.go`.

use std::collections::BTreeMap;

use gantry_api::k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, ReplicaSet};
use gantry_api::k8s_openapi::api::core::v1::PodTemplateSpec;
use gantry_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::controllers::owned;

/// Number of a rollout; on the Deployment the current one.
pub(super) const REVISION: &str = "deployment.kubernetes.io/revision";
/// Earlier numbers of a ReplicaSet that was rolled back to.
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
/// `spec.replicas` of the Deployment when it last sized the ReplicaSet: tells scaling from rolling.
const DESIRED_REPLICAS: &str = "deployment.kubernetes.io/desired-replicas";
/// Most pods of the Deployment at that time: the base of proportional scaling.
const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";
/// Label that keeps the pods of two templates apart.
pub(super) const TEMPLATE_HASH: &str = "pod-template-hash";

/// Annotations that belong to the Deployment alone.
const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED_REPLICAS,
    MAX_REPLICAS,
    "deprecated.deployment.rollback.to",
];

/// Digits of a template hash: no vowels, so that no words appear (as in Kubernetes' `rand`).
const SAFE_DIGITS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// `spec.replicas`, defaulted and never negative.
pub(super) fn desired(deployment: &Deployment) -> i32 {
    deployment
        .spec
        .as_ref()
        .and_then(|spec| spec.replicas)
        .unwrap_or(1)
        .max(0)
}

/// `spec.replicas` of a ReplicaSet.
pub(super) fn size(set: &ReplicaSet) -> i32 {
    set.spec
        .as_ref()
        .and_then(|spec| spec.replicas)
        .unwrap_or(1)
        .max(0)
}

/// Whether the strategy is RollingUpdate (the default).
pub(super) fn is_rolling(spec: &DeploymentSpec) -> bool {
    let type_ = spec
        .strategy
        .as_ref()
        .and_then(|strategy| strategy.type_.as_deref());
    type_.is_none_or(|type_| type_ == "RollingUpdate")
}

/// maxSurge and maxUnavailable in pods. Surge rounds up, unavailable down; both zero would stand
/// still, so unavailable is then 1.
pub(super) fn limits(deployment: &Deployment) -> (i32, i32) {
    let desired = desired(deployment);
    let Some(spec) = deployment.spec.as_ref().filter(|spec| is_rolling(spec)) else {
        return (0, 0);
    };
    let rolling = spec
        .strategy
        .as_ref()
        .and_then(|strategy| strategy.rolling_update.as_ref());
    let quarter = IntOrString::String("25%".to_owned());
    let surge = rolling
        .and_then(|r| r.max_surge.as_ref())
        .unwrap_or(&quarter);
    let unavailable = rolling
        .and_then(|r| r.max_unavailable.as_ref())
        .unwrap_or(&quarter);
    let surge = owned::pod_count(surge, desired, true);
    let mut unavailable = owned::pod_count(unavailable, desired, false);
    if surge == 0 && unavailable == 0 {
        unavailable = 1;
    }
    (surge, unavailable.min(desired))
}

/// Whether two templates ask for the same pods, the hash label aside.
pub(super) fn same_template(a: &PodTemplateSpec, b: &PodTemplateSpec) -> bool {
    without_hash(a) == without_hash(b)
}

fn without_hash(template: &PodTemplateSpec) -> PodTemplateSpec {
    let mut template = template.clone();
    let mut metadata = template.metadata.take().unwrap_or_default();
    metadata.creation_timestamp = None;
    if let Some(labels) = &mut metadata.labels {
        labels.remove(TEMPLATE_HASH);
    }
    metadata.labels = metadata.labels.filter(|labels| !labels.is_empty());
    metadata.annotations = metadata
        .annotations
        .filter(|annotations| !annotations.is_empty());
    template.metadata = Some(metadata);
    template
}

/// The hash that names a template: FNV-1a (32 bits) of its JSON and the collision count, in
/// [`SAFE_DIGITS`]. Equal templates give equal hashes because the schema's fields and maps have one
/// order; the value differs from Kubernetes', which hashes a Go struct dump.
pub(in crate::controllers) fn template_hash(
    template: &PodTemplateSpec,
    collision_count: Option<i32>,
) -> String {
    let json = serde_json::to_vec(&without_hash(template)).unwrap_or_default();
    let suffix = collision_count.map(i32::to_le_bytes);
    let bytes = json.iter().chain(suffix.iter().flatten());
    let hash = bytes.fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    });
    let digits = hash.to_string();
    digits
        .bytes()
        .map(|b| char::from(SAFE_DIGITS[usize::from(b) % SAFE_DIGITS.len()]))
        .collect()
}

fn annotation<'a>(set: &'a ReplicaSet, key: &str) -> Option<&'a str> {
    set.metadata
        .annotations
        .as_ref()?
        .get(key)
        .map(String::as_str)
}

/// The rollout number of a ReplicaSet; 0 when it has none.
pub(super) fn revision(set: &ReplicaSet) -> i64 {
    annotation(set, REVISION)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

/// The Deployment's size when the ReplicaSet was last sized.
pub(super) fn desired_when_sized(set: &ReplicaSet) -> Option<i32> {
    annotation(set, DESIRED_REPLICAS).and_then(|text| text.parse().ok())
}

/// The Deployment's largest pod count when the ReplicaSet was last sized.
pub(super) fn max_when_sized(set: &ReplicaSet) -> Option<i32> {
    annotation(set, MAX_REPLICAS).and_then(|text| text.parse().ok())
}

/// Records the sizes on a ReplicaSet.
pub(super) fn set_sizes(set: &mut ReplicaSet, desired: i32, max: i32) {
    let annotations = set.metadata.annotations.get_or_insert_default();
    annotations.insert(DESIRED_REPLICAS.to_owned(), desired.to_string());
    annotations.insert(MAX_REPLICAS.to_owned(), max.to_string());
}

/// Copies the Deployment's annotations and gives the current ReplicaSet its rollout number; the old
/// number, if any, goes to the history.
pub(super) fn set_current(set: &mut ReplicaSet, deployment: &Deployment, new_revision: i64) {
    let old_revision = revision(set);
    let annotations = set.metadata.annotations.get_or_insert_default();
    let empty = BTreeMap::new();
    for (key, value) in deployment.metadata.annotations.as_ref().unwrap_or(&empty) {
        if !NOT_COPIED.contains(&key.as_str()) {
            annotations.insert(key.clone(), value.clone());
        }
    }
    if old_revision >= new_revision {
        return;
    }
    annotations.insert(REVISION.to_owned(), new_revision.to_string());
    if old_revision > 0 {
        let history = annotations.entry(REVISION_HISTORY.to_owned()).or_default();
        let old = old_revision.to_string();
        if !history.split(',').any(|entry| entry == old) {
            if !history.is_empty() {
                history.push(',');
            }
            history.push_str(&old);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_api::k8s_openapi::api::apps::v1::{DeploymentStrategy, RollingUpdateDeployment};

    fn deployment(replicas: i32, surge: &str, unavailable: &str) -> Deployment {
        let value = |text: &str| match text.parse() {
            Ok(n) => IntOrString::Int(n),
            Err(_) => IntOrString::String(text.to_owned()),
        };
        Deployment {
            spec: Some(DeploymentSpec {
                replicas: Some(replicas),
                strategy: Some(DeploymentStrategy {
                    type_: Some("RollingUpdate".to_owned()),
                    rolling_update: Some(RollingUpdateDeployment {
                        max_surge: Some(value(surge)),
                        max_unavailable: Some(value(unavailable)),
                    }),
                }),
                ..DeploymentSpec::default()
            }),
            ..Deployment::default()
        }
    }

    #[test]
    fn surge_rounds_up_and_unavailable_down() {
        assert_eq!(limits(&deployment(3, "25%", "25%")), (1, 0));
        assert_eq!(limits(&deployment(10, "25%", "25%")), (3, 2));
        assert_eq!(limits(&deployment(4, "1", "50%")), (1, 2));
        assert_eq!(
            limits(&deployment(5, "0", "10%")),
            (0, 1),
            "both zero would stand still"
        );
        assert_eq!(limits(&deployment(2, "0", "7")), (0, 2));
        assert_eq!(limits(&deployment(0, "0", "0")), (0, 0));
    }

    #[test]
    fn hash_ignores_its_own_label_and_follows_the_template() {
        let mut template = PodTemplateSpec::default();
        let metadata = template.metadata.get_or_insert_default();
        metadata.labels = Some(BTreeMap::from([("app".to_owned(), "web".to_owned())]));
        let first = template_hash(&template, None);
        let mut labelled = template.clone();
        let labels = labelled
            .metadata
            .as_mut()
            .and_then(|m| m.labels.as_mut())
            .unwrap();
        labels.insert(TEMPLATE_HASH.to_owned(), first.clone());
        assert_eq!(template_hash(&labelled, None), first);
        assert!(same_template(&template, &labelled));
        assert_ne!(template_hash(&template, Some(1)), first);
        assert!(first.len() <= 10 && first.bytes().all(|b| SAFE_DIGITS.contains(&b)));
        template.spec.get_or_insert_default().hostname = Some("x".to_owned());
        assert_ne!(template_hash(&template, None), first);
        assert!(!same_template(&template, &labelled));
    }

    #[test]
    fn rolling_back_keeps_earlier_revisions() {
        let deployment = deployment(1, "1", "0");
        let mut set = ReplicaSet::default();
        for revision in [1, 4, 9] {
            set_current(&mut set, &deployment, revision);
        }
        assert_eq!(revision(&set), 9);
        assert_eq!(annotation(&set, REVISION_HISTORY), Some("1,4"));
    }
}
