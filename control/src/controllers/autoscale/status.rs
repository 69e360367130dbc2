//! A scaler's conditions.

use gantry_api::k8s_openapi::api::autoscaling::v2::{
    HorizontalPodAutoscalerCondition, HorizontalPodAutoscalerStatus,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use gantry_api::k8s_openapi::jiff::Timestamp;

/// Sets a condition; its time is the one before where its value stays.
pub(super) fn set(
    status: &mut HorizontalPodAutoscalerStatus,
    type_: &str,
    value: bool,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let value = if value { "True" } else { "False" };
    let all = status.conditions.get_or_insert_default();
    let known = all.iter().position(|condition| condition.type_ == type_);
    let since = known
        .map(|at| &all[at])
        .filter(|condition| condition.status == value)
        .and_then(|condition| condition.last_transition_time.clone());
    let condition = HorizontalPodAutoscalerCondition {
        type_: type_.to_owned(),
        status: value.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_transition_time: since.or(Some(Time(now))),
    };
    match known {
        Some(at) => all[at] = condition,
        None => all.push(condition),
    }
}
