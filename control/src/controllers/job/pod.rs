//! The pods that a Job makes. Pure.

use std::collections::BTreeMap;

use gantry_api::k8s_openapi::api::batch::v1::{Job, JobSpec};
use gantry_api::k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod};

use super::indexes::{FAILURE_COUNT, IGNORED_FAILURE_COUNT, INDEX};
use super::observed::TRACKING;
use super::plan::NewPod;
use crate::controllers::owned;

/// Longest beginning of a name that random characters follow.
const GENERATE_NAME_BYTES_MAX: usize = 58;

/// `<job>-<index>-`, of a long name as much as leaves room for the index.
fn generate_name(job: &str, index: i32) -> String {
    let end = format!("-{index}-");
    let room = GENERATE_NAME_BYTES_MAX.saturating_sub(end.len());
    format!("{}{end}", &job[..job.floor_char_boundary(room)])
}

/// A pod of the Job.
pub(super) fn pod_of(job: &Job, spec: &JobSpec, new: NewPod) -> Pod {
    let mut pod = owned::pod_of(job, &spec.template);
    pod.metadata
        .finalizers
        .get_or_insert_default()
        .push(TRACKING.to_owned());
    let Some(index) = new.index else { return pod };
    let name = job.metadata.name.as_deref().unwrap_or_default();
    pod.metadata.generate_name = Some(generate_name(name, index));
    let text = index.to_string();
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert(INDEX.to_owned(), text.clone());
    if let Some(failures) = new.failures {
        annotations.insert(FAILURE_COUNT.to_owned(), failures.counted.to_string());
        if failures.ignored > 0 {
            let ignored = failures.ignored.to_string();
            annotations.insert(IGNORED_FAILURE_COUNT.to_owned(), ignored);
        }
    }
    let labels: &mut BTreeMap<String, String> = pod.metadata.labels.get_or_insert_default();
    labels.insert(INDEX.to_owned(), text);
    if let Some(spec) = &mut pod.spec {
        spec.hostname
            .get_or_insert_with(|| format!("{name}-{index}"));
        let variable = EnvVar {
            name: "JOB_COMPLETION_INDEX".to_owned(),
            value_from: Some(EnvVarSource {
                field_ref: Some(ObjectFieldSelector {
                    field_path: format!("metadata.annotations['{INDEX}']"),
                    ..ObjectFieldSelector::default()
                }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        };
        let init = spec.init_containers.iter_mut().flatten();
        for container in spec.containers.iter_mut().chain(init) {
            let variables = container.env.get_or_insert_default();
            if variables.iter().all(|known| known.name != variable.name) {
                variables.push(variable.clone());
            }
        }
    }
    pod
}

#[cfg(test)]
mod tests {
    use super::super::indexes::{Failures, index_of};
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_says_which_index_it_is_and_what_failed_before() {
        let job: Job = serde_json::from_value(json!({
            "metadata": {"name": "j", "namespace": "a", "uid": "u"},
            "spec": {"template": {"spec": {"containers": [{"name": "c"}]}}},
        }))
        .unwrap();
        let spec = job.spec.clone().unwrap();
        let failures = Failures {
            counted: 2,
            ignored: 0,
        };
        let new = NewPod {
            index: Some(7),
            failures: Some(failures),
        };
        let pod = pod_of(&job, &spec, new);
        assert_eq!(index_of(&pod), Some(7));
        assert_eq!(Failures::before(&pod), failures);
        let annotations = pod.metadata.annotations.unwrap();
        assert!(!annotations.contains_key(IGNORED_FAILURE_COUNT));
        assert_eq!(pod.spec.unwrap().hostname.as_deref(), Some("j-7"));
        let plain = pod_of(&job, &spec, NewPod::default()).metadata;
        assert_eq!(plain.annotations, None);
        assert_eq!(plain.finalizers.unwrap(), [TRACKING]);
    }

    #[test]
    fn a_long_name_keeps_its_index() {
        assert_eq!(generate_name("j", 3), "j-3-");
        let long = generate_name(&"j".repeat(63), 99_999);
        assert_eq!((long.len(), &long[50..]), (58, "j-99999-"));
    }
}
