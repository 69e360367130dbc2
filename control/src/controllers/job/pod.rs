//! The pods that a Job makes. Pure.

use std::collections::BTreeMap;

use gantry_api::k8s_openapi::api::batch::v1::{Job, JobSpec};
use gantry_api::k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, ObjectFieldSelector, Pod};

use super::indexes::{FAILURE_COUNT, IGNORED_FAILURE_COUNT, INDEX};
use super::observed::TRACKING;
use super::plan::NewPod;
use crate::controllers::owned;

/// A pod of the Job.
pub(super) fn pod_of(job: &Job, spec: &JobSpec, new: NewPod) -> Pod {
    let mut pod = owned::pod_of(job, &spec.template);
    pod.metadata
        .finalizers
        .get_or_insert_default()
        .push(TRACKING.to_owned());
    let Some(index) = new.index else { return pod };
    let name = job.metadata.name.as_deref().unwrap_or_default();
    pod.metadata.generate_name = Some(format!("{name}-{index}-"));
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
