//! Evictions: a pod goes only while its disruption budget has room for that.
//!
//! ```text
//!  pods/eviction ─► decide (pure): its budget, its state ─► one transaction: budget counted down, pod deleted
//!                       └─► no room: TooManyRequests, nothing happens
//! ```
//! Both writes have effect together, so a crash between them counts nothing twice and lets nobody through. The
//! budget counts up again when the disruption controller sees the pod gone (`controllers/disruption.rs`).
//!
//! Source: Kubernetes `pkg/registry/core/pod/storage/eviction.go`; the words are its.

use std::sync::Arc;

use gantry_api::field::{FieldError, Path};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::k8s_openapi::api::policy::v1::PodDisruptionBudget;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use gantry_api::kinds::Kind;
use gantry_api::selector::Selector;
use gantry_api::status::{Cause, Reason, Status};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::object::{self, metadata_text};
use super::registry::{DeleteOptions, Disruption, Registry, kind_named};
use super::write::Written;
use crate::controllers::pods;
use crate::store::Revision;

/// Evictions of one budget that its controller has not seen happen.
const UNSEEN_COUNT_MAX: usize = 2000;
/// When a client may ask again.
const RETRY_AFTER_S: u32 = 10;
/// What a refused eviction says.
const REFUSAL: &str = "Cannot evict pod as it would violate the pod's disruption budget.";

/// What an eviction does to the pod's budget.
#[derive(Debug, Clone, PartialEq)]
enum Verdict {
    /// Nothing: there is none, or the pod serves nobody.
    Free,
    /// It has this status afterwards.
    Counted(Box<PodDisruptionBudget>),
}

/// Whether the budget is about the pod. No selector means none, an empty one all.
pub(crate) fn covers(budget: &PodDisruptionBudget, pod: &Pod) -> bool {
    let selector = budget.spec.as_ref().and_then(|s| s.selector.as_ref());
    let Some(Ok(selector)) = selector.map(Selector::from_api) else {
        return false;
    };
    let labels = pod.metadata.labels.clone().unwrap_or_default();
    selector.matches(&labels)
}

fn refused(why: String) -> Status {
    let mut status = Status::new(Reason::TooManyRequests, REFUSAL);
    status.details.retry_after_seconds = RETRY_AFTER_S;
    status.details.causes.push(Cause {
        reason: "DisruptionBudget".to_owned(),
        message: why,
        field: String::new(),
    });
    status
}

/// Decides; `budgets` are those that cover the pod.
fn decide(pod: &Pod, budgets: &[PodDisruptionBudget], now: Timestamp) -> Result<Verdict, Status> {
    // Neither serves anybody, so that it goes disrupts nothing.
    let serves = !pods::is_finished(pod) && pods::phase(pod) != "Pending";
    if !serves || pods::is_terminating(pod) {
        return Ok(Verdict::Free);
    }
    let budget = match budgets {
        [] => return Ok(Verdict::Free),
        [one] => one,
        _ => {
            return Err(Status::internal(
                "This pod has more than one PodDisruptionBudget, which the eviction subresource does not \
                 support.",
            ));
        }
    };
    let name = budget.metadata.name.as_deref().unwrap_or_default();
    let spec = budget.spec.clone().unwrap_or_default();
    let mut status = budget.status.clone().unwrap_or_default();
    let desired = status.desired_healthy.unwrap_or(0);
    let current = status.current_healthy.unwrap_or(0);
    let allowed = status.disruptions_allowed.unwrap_or(0);
    if !pods::is_ready(pod) {
        let always = spec.unhealthy_pod_eviction_policy.as_deref() == Some("AlwaysAllow");
        let enough = desired > 0 && current >= desired;
        if always || enough {
            return Ok(Verdict::Free);
        }
    }
    let observed = status.observed_generation.unwrap_or(0);
    if observed < budget.metadata.generation.unwrap_or(0) {
        let why = format!("The disruption budget {name} is still being processed by the server.");
        return Err(refused(why));
    }
    let disrupted = status.disrupted_pods.get_or_insert_default();
    if disrupted.len() > UNSEEN_COUNT_MAX {
        let text = "DisruptedPods map too big - too many evictions not confirmed by PDB controller";
        return Err(Status::new(Reason::Forbidden, text));
    }
    if allowed <= 0 {
        return Err(refused(format!(
            "The disruption budget {name} needs {desired} healthy pods and has {current} currently"
        )));
    }
    status.disruptions_allowed = Some(allowed - 1);
    let pod = pod.metadata.name.clone().unwrap_or_default();
    disrupted.insert(pod, Time(now));
    Ok(Verdict::Counted(Box::new(PodDisruptionBudget {
        status: Some(status),
        ..budget.clone()
    })))
}

/// What stands in an Eviction: how to delete, and of which object.
pub(super) fn options(
    kind: &Kind,
    name: &str,
    eviction: &Value,
) -> Result<(DeleteOptions, bool), Status> {
    let own = metadata_text(eviction, "name");
    if !own.is_empty() && own != name {
        let path = Path::new("metadata").child("name");
        let error = FieldError::invalid(&path, own, "must be the name of the pod in the request");
        return Err(Status::invalid(kind, name, &[error]));
    }
    let asked = &eviction["deleteOptions"];
    let dry_run = asked["dryRun"]
        .as_array()
        .is_some_and(|all| all.iter().any(|stage| stage == "All"));
    let uid = asked["preconditions"]["uid"].as_str().map(str::to_owned);
    let options = DeleteOptions {
        grace_period_s: asked["gracePeriodSeconds"].as_i64(),
        uid,
        disruption: Some(Disruption {
            reason: "EvictionByEvictionAPI",
            message: "Eviction API: evicting".to_owned(),
        }),
        ..DeleteOptions::default()
    };
    Ok((options, dry_run))
}

impl Registry {
    /// Evicts a pod: deletes it if its budget allows.
    ///
    /// # Errors
    /// TooManyRequests while the budget has no room; as a deletion.
    pub(crate) async fn evict(
        &self,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
        dry_run: bool,
    ) -> Result<Written, Status> {
        // Evictions of a namespace that come at once would lose rounds to each other.
        let _turn = self.quota_turn(namespace).await;
        self.evict_value(namespace, name, options, dry_run).await
    }

    /// What the eviction of this pod also writes: its budget, counted down.
    pub(super) fn disrupt(
        &self,
        pod: &Value,
        now: Timestamp,
    ) -> Result<Vec<(Arc<str>, Revision, bytes::Bytes)>, Status> {
        let pod: Pod = serde_json::from_value(pod.clone())
            .map_err(|error| Status::internal(format!("cannot read back a Pod: {error}")))?;
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let prefix = kind_named("poddisruptionbudgets")?.store_prefix(Some(&namespace));
        let mut entries = Vec::new();
        let mut budgets = Vec::new();
        for entry in self.inner.store.list(&prefix).1 {
            let budget: PodDisruptionBudget = object::decode(&entry)?;
            if covers(&budget, &pod) {
                budgets.push(budget);
                entries.push(entry);
            }
        }
        let Verdict::Counted(budget) = decide(&pod, &budgets, now)? else {
            return Ok(Vec::new());
        };
        let mut also = Vec::new();
        for entry in entries {
            let mut value = object::to_value(&entry)?;
            value["status"] = json!(budget.status);
            also.push((
                Arc::clone(&entry.key),
                entry.mod_revision,
                object::encode(&value)?,
            ));
        }
        Ok(also)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    fn pod(phase: &str, ready: bool) -> Pod {
        let ready = if ready { "True" } else { "False" };
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n", "labels": {"app": "a"}},
            "status": {"phase": phase, "conditions": [{"type": "Ready", "status": ready}]}}))
        .unwrap()
    }

    fn budget(allowed: i32, desired: i32, current: i32) -> PodDisruptionBudget {
        serde_json::from_value(json!({
            "metadata": {"name": "b", "namespace": "n", "generation": 2},
            "spec": {"selector": {"matchLabels": {"app": "a"}}},
            "status": {"disruptionsAllowed": allowed, "desiredHealthy": desired,
                "currentHealthy": current, "expectedPods": 3, "observedGeneration": 2}}))
        .unwrap()
    }

    #[test]
    fn a_budget_without_room_refuses_in_kubernetes_words() {
        let status = decide(&pod("Running", true), &[budget(0, 2, 2)], now()).unwrap_err();
        assert_eq!(status.code, 429);
        assert_eq!(
            status.message,
            "Cannot evict pod as it would violate the pod's disruption budget."
        );
        assert_eq!(
            status.details.causes[0].message,
            "The disruption budget b needs 2 healthy pods and has 2 currently"
        );
        let mut stale = budget(1, 2, 3);
        stale.metadata.generation = Some(3);
        let status = decide(&pod("Running", true), &[stale], now()).unwrap_err();
        assert!(
            status.details.causes[0]
                .message
                .contains("still being processed"),
            "{status}"
        );
        let two = [budget(1, 1, 2), budget(1, 1, 2)];
        let status = decide(&pod("Running", true), &two, now()).unwrap_err();
        assert!(
            status.message.contains("more than one PodDisruptionBudget"),
            "{status}"
        );
    }

    #[test]
    fn what_serves_nobody_may_go() {
        let none = [budget(0, 2, 2)];
        for (pod, goes) in [
            (pod("Pending", false), true),
            (pod("Succeeded", false), true),
            (pod("Running", true), false),
            // Enough others are healthy.
            (pod("Running", false), true),
        ] {
            let verdict = decide(&pod, &none, now());
            assert_eq!(verdict.is_ok(), goes, "{pod:?}");
        }
        // It may be what is missing.
        let short = [budget(0, 2, 1)];
        assert!(decide(&pod("Running", false), &short, now()).is_err());
        let mut always = budget(0, 2, 1);
        let spec = always.spec.get_or_insert_default();
        spec.unhealthy_pod_eviction_policy = Some("AlwaysAllow".to_owned());
        assert_eq!(
            decide(&pod("Running", false), &[always], now()),
            Ok(Verdict::Free)
        );
    }

    proptest! {
        /// Never more evictions than allowed, whatever the order.
        #[test]
        fn a_budget_is_never_overdrawn(allowed in 0..6_i32, tries in 0..12_usize) {
            let mut budget = budget(allowed, 1, 9);
            let mut gone = 0;
            for i in 0..tries {
                let mut pod = pod("Running", true);
                pod.metadata.name = Some(format!("p{i}"));
                match decide(&pod, std::slice::from_ref(&budget), now()) {
                    Ok(Verdict::Counted(counted)) => {
                        budget = *counted;
                        gone += 1;
                    }
                    Ok(Verdict::Free) => prop_assert!(false, "it serves"),
                    Err(_) => {}
                }
            }
            prop_assert_eq!(gone, allowed.min(i32::try_from(tries).unwrap()));
            let status = budget.status.unwrap_or_default();
            prop_assert_eq!(status.disruptions_allowed, Some(allowed - gone));
            let named = status.disrupted_pods.unwrap_or_default().len();
            prop_assert_eq!(named, usize::try_from(gone).unwrap());
        }
    }
}
