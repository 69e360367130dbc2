//! Defaults of the workloads beside Deployments. Source: Kubernetes' `pkg/apis/{apps,batch}/v1`.

use super::{pod_spec, text};
use k8s_openapi::api::apps::v1::{DaemonSet, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job, JobSpec};
use k8s_openapi::api::core::v1::{PodTemplateSpec, ReplicationController};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

fn template(template: &mut PodTemplateSpec) {
    if let Some(spec) = &mut template.spec {
        pod_spec(spec);
    }
}

/// Defaults of a DaemonSet.
pub fn daemon_set(set: &mut DaemonSet) {
    let Some(spec) = &mut set.spec else { return };
    spec.revision_history_limit.get_or_insert(10);
    let strategy = spec.update_strategy.get_or_insert_default();
    text(&mut strategy.type_, "RollingUpdate");
    if strategy.type_.as_deref() == Some("RollingUpdate") {
        let rolling = strategy.rolling_update.get_or_insert_default();
        rolling.max_unavailable.get_or_insert(IntOrString::Int(1));
        rolling.max_surge.get_or_insert(IntOrString::Int(0));
    }
    template(&mut spec.template);
}

/// Defaults of a StatefulSet.
pub fn stateful_set(set: &mut StatefulSet) {
    let Some(spec) = &mut set.spec else { return };
    spec.replicas.get_or_insert(1);
    spec.revision_history_limit.get_or_insert(10);
    text(&mut spec.pod_management_policy, "OrderedReady");
    let strategy = spec.update_strategy.get_or_insert_default();
    text(&mut strategy.type_, "RollingUpdate");
    if strategy.type_.as_deref() == Some("RollingUpdate") {
        let rolling = strategy.rolling_update.get_or_insert_default();
        rolling.partition.get_or_insert(0);
        rolling.max_unavailable.get_or_insert(IntOrString::Int(1));
    }
    let retention = spec
        .persistent_volume_claim_retention_policy
        .get_or_insert_default();
    text(&mut retention.when_deleted, "Retain");
    text(&mut retention.when_scaled, "Retain");
    for claim in spec.volume_claim_templates.iter_mut().flatten() {
        super::persistent_volume_claim(claim);
    }
    template(&mut spec.template);
}

/// Defaults of a Job; its selector comes with its uid.
pub fn job(job: &mut Job) {
    if let Some(spec) = &mut job.spec {
        job_spec(spec);
    }
}

fn job_spec(spec: &mut JobSpec) {
    if spec.completions.is_none() && spec.parallelism.is_none() {
        spec.completions = Some(1);
    }
    spec.parallelism.get_or_insert(1);
    // Where every index has a limit of its own, the Job has none unless it says so.
    let limit = spec.backoff_limit_per_index.map_or(6, |_| i32::MAX);
    spec.backoff_limit.get_or_insert(limit);
    spec.suspend.get_or_insert(false);
    text(&mut spec.completion_mode, "NonIndexed");
    // How a pod has ended is known when it has.
    let replaced = match spec.pod_failure_policy {
        Some(_) => "Failed",
        None => "TerminatingOrFailed",
    };
    text(&mut spec.pod_replacement_policy, replaced);
    let rules = spec
        .pod_failure_policy
        .iter_mut()
        .flat_map(|policy| &mut policy.rules);
    for pattern in rules.flat_map(|rule| rule.on_pod_conditions.iter_mut().flatten()) {
        text(&mut pattern.status, "True");
    }
    template(&mut spec.template);
}

/// Defaults of a CronJob.
pub fn cron_job(job: &mut CronJob) {
    let spec = &mut job.spec;
    text(&mut spec.concurrency_policy, "Allow");
    spec.suspend.get_or_insert(false);
    spec.successful_jobs_history_limit.get_or_insert(3);
    spec.failed_jobs_history_limit.get_or_insert(1);
    if let Some(spec) = &mut spec.job_template.spec {
        job_spec(spec);
    }
}

/// Defaults of a ReplicationController: selector and labels follow its template.
pub fn replication_controller(controller: &mut ReplicationController) {
    let Some(spec) = &mut controller.spec else {
        return;
    };
    spec.replicas.get_or_insert(1);
    if let Some(template) = &mut spec.template {
        let labels = template.metadata.as_ref().and_then(|m| m.labels.clone());
        if spec
            .selector
            .as_ref()
            .is_none_or(std::collections::BTreeMap::is_empty)
        {
            spec.selector.clone_from(&labels);
        }
        if controller.metadata.labels.is_none() {
            controller.metadata.labels = labels;
        }
        self::template(template);
    }
}
