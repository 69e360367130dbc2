//! What a pod's status says, in the words that controllers use.
//!
//! Source: Kubernetes `pkg/api/v1/pod/util.go` and `pkg/controller/controller_utils.go`.

use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Pod, PodCondition, PodStatus, Volume};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    ObjectMeta, OwnerReference, Time,
};
use gantry_api::k8s_openapi::jiff::Timestamp;

/// The pod's phase; empty before the first status.
pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
        .unwrap_or_default()
}

/// Every container has ended for good.
pub(crate) fn is_finished(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// Deletion has been asked for.
pub(crate) fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// The pod counts as a replica: neither finished nor being deleted.
pub(crate) fn is_active(pod: &Pod) -> bool {
    !is_finished(pod) && !is_terminating(pod)
}

/// The node that the pod is bound to.
pub(crate) fn node(pod: &Pod) -> Option<&str> {
    let name = pod.spec.as_ref()?.node_name.as_deref()?;
    (!name.is_empty()).then_some(name)
}

/// The condition of this type.
pub(crate) fn condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_deref()?;
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Sets a condition. Its transition time is the one before where its value stays, `now` otherwise.
pub(crate) fn set_condition(status: &mut PodStatus, condition: PodCondition, now: Timestamp) {
    let conditions = status.conditions.get_or_insert_default();
    let old = conditions
        .iter_mut()
        .find(|old| old.type_ == condition.type_);
    let since = old
        .as_ref()
        .filter(|old| old.status == condition.status)
        .and_then(|old| old.last_transition_time.clone());
    let condition = PodCondition {
        last_transition_time: since.or(Some(Time(now))),
        ..condition
    };
    match old {
        Some(old) => *old = condition,
        None => conditions.push(condition),
    }
}

/// Condition Ready is True.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|condition| condition.status == "True")
}

/// How long until the pod has been ready for `min_ready_s` seconds: zero when it is available,
/// `None` when it is not ready at all.
pub(crate) fn until_available(pod: &Pod, min_ready_s: i32, now: Timestamp) -> Option<Duration> {
    let ready = condition(pod, "Ready").filter(|condition| condition.status == "True")?;
    let Ok(min_ready) = u64::try_from(min_ready_s) else {
        return Some(Duration::ZERO);
    };
    let wanted = Duration::from_secs(min_ready);
    if wanted.is_zero() {
        return Some(wanted);
    }
    // A ready pod without a transition time has not been ready for any known time.
    let since = ready
        .last_transition_time
        .as_ref()
        .map_or(now, |time| time.0);
    let passed = Duration::try_from(now.duration_since(since)).unwrap_or_default();
    Some(wanted.saturating_sub(passed))
}

/// The claims that a pod uses, by name.
pub(crate) fn claims(pod: &Pod) -> Vec<String> {
    let volumes = pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten());
    volumes
        .filter_map(|volume| {
            if let Some(source) = &volume.persistent_volume_claim {
                return Some(source.claim_name.clone());
            }
            let is_ephemeral = volume.ephemeral.is_some();
            is_ephemeral.then(|| ephemeral_claim(pod, volume))
        })
        .collect()
}

/// Those of its claims that are made for it.
pub(crate) fn ephemeral_claims(pod: &Pod) -> Vec<String> {
    let volumes = pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten());
    let made = volumes.filter(|volume| volume.ephemeral.is_some());
    made.map(|volume| ephemeral_claim(pod, volume)).collect()
}

/// The name of the claim that is made for an ephemeral volume.
pub(crate) fn ephemeral_claim(pod: &Pod, volume: &Volume) -> String {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    format!("{name}-{}", volume.name)
}

/// Whether the pod is among the owners.
pub(crate) fn is_owned_by(metadata: &ObjectMeta, pod: &Pod) -> bool {
    let uid = pod.metadata.uid.as_deref();
    let mut owners = metadata.owner_references.iter().flatten();
    owners.any(|owner| Some(owner.uid.as_str()) == uid)
}

/// The owner reference whose `controller` is true.
pub(crate) fn controller_of(metadata: &ObjectMeta) -> Option<&OwnerReference> {
    metadata
        .owner_references
        .iter()
        .flatten()
        .find(|owner| owner.controller == Some(true))
}
