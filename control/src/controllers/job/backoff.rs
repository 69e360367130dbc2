//! How long a Job pauses after failures: 10 s, doubling with each since the last success, at most 10 min.
//! With `backoffLimitPerIndex` every index pauses for itself. Pure.
//!
//! Source: Kubernetes `pkg/controller/job/backoff_utils.go`.

use gantry_api::k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use gantry_api::k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::indexes::Failures;
use super::observed::Observed;
use crate::controllers::pods;

/// Pause after the first failure; it doubles with each.
const PAUSE_MIN_S: i64 = 10;
/// Longest pause.
const PAUSE_MAX_S: i64 = 600;
/// Doublings after which the pause is the longest in any case.
const DOUBLINGS_MAX: u32 = 10;

/// The end of the pause after so many failures.
fn pause_end(failure_count: usize, last: Timestamp) -> Option<Timestamp> {
    let doublings = u32::try_from(failure_count.checked_sub(1)?).unwrap_or(u32::MAX);
    let pause_s = (PAUSE_MIN_S << doublings.min(DOUBLINGS_MAX)).min(PAUSE_MAX_S);
    last.checked_add(SignedDuration::from_secs(pause_s)).ok()
}

/// Until when no new pod of a Job is started.
pub(super) fn until(observed: &Observed<'_>) -> Option<Timestamp> {
    let times = |succeeded: bool| {
        let ended = observed.pods.iter();
        let ended = ended.filter(move |pod| observed.ended(pod) == Some(succeeded));
        ended.filter_map(|pod| finish_time(pod))
    };
    let success = times(true).max();
    let failures: Vec<Timestamp> = times(false)
        .filter(|time| success.is_none_or(|success| *time > success))
        .collect();
    pause_end(failures.len(), *failures.iter().max()?)
}

/// Until when a failed pod is not replaced.
pub(super) fn until_replaced(failed: &Pod) -> Option<Timestamp> {
    let before = usize::try_from(Failures::before(failed).total()).unwrap_or(0);
    pause_end(before + 1, finish_time(failed)?)
}

/// When a pod has ended, as far as it can be told: by its containers, its condition Ready, its deletion,
/// at last its creation.
pub(super) fn finish_time(pod: &Pod) -> Option<Timestamp> {
    let by_containers = || {
        let statuses = pod.status.as_ref()?.container_statuses.as_deref()?;
        let end = |status: &ContainerStatus| {
            let terminated = status.state.as_ref()?.terminated.as_ref()?;
            Some(terminated.finished_at.as_ref()?.0)
        };
        // One that has no end says that the others' ends are not the pod's.
        let ends: Option<Vec<Timestamp>> = statuses.iter().map(end).collect();
        ends?.into_iter().max()
    };
    let by_condition = || {
        let ready = pods::condition(pod, "Ready").filter(|ready| ready.status == "False")?;
        Some(ready.last_transition_time.as_ref()?.0)
    };
    let by_deletion = || {
        let end = pod.metadata.deletion_timestamp.as_ref()?.0;
        let grace_s = pod.metadata.deletion_grace_period_seconds.unwrap_or(0);
        end.checked_sub(SignedDuration::from_secs(grace_s)).ok()
    };
    let created = || Some(pod.metadata.creation_timestamp.as_ref()?.0);
    by_containers()
        .or_else(by_condition)
        .or_else(by_deletion)
        .or_else(created)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn time(text: &str) -> Timestamp {
        format!("2026-01-01T{text}Z").parse().unwrap()
    }

    #[test]
    fn the_pause_doubles_and_stops_at_ten_minutes() {
        let start = time("00:00:00");
        assert_eq!(pause_end(0, start), None);
        for (failures, end) in [
            (1, "00:00:10"),
            (2, "00:00:20"),
            (6, "00:05:20"),
            (7, "00:10:00"),
            (99, "00:10:00"),
        ] {
            assert_eq!(pause_end(failures, start), Some(time(end)), "{failures}");
        }
    }

    #[test]
    fn the_end_of_a_pod_is_told_by_the_best_that_is_known() {
        let ended = json!({"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 1, "finishedAt": "2026-01-01T00:00:01Z"}}});
        let mut pod: Pod = serde_json::from_value(json!({
            "metadata": {"creationTimestamp": "2026-01-01T00:00:04Z",
                "deletionTimestamp": "2026-01-01T00:00:33Z", "deletionGracePeriodSeconds": 30},
            "status": {"containerStatuses": [ended], "conditions": [
                {"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-01T00:00:02Z"}]},
        }))
        .unwrap();
        assert_eq!(finish_time(&pod), Some(time("00:00:01")));
        pod.status
            .as_mut()
            .unwrap()
            .container_statuses
            .as_mut()
            .unwrap()[0]
            .state = None;
        assert_eq!(finish_time(&pod), Some(time("00:00:02")));
        pod.status.as_mut().unwrap().conditions = None;
        assert_eq!(finish_time(&pod), Some(time("00:00:03")));
        pod.metadata.deletion_timestamp = None;
        assert_eq!(finish_time(&pod), Some(time("00:00:04")));
    }
}
