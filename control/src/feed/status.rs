//! Statuses of pods: taken once each, in order, durable before they are acknowledged.
//!
//! | pod in the store                 | answer      | effect                                      |
//! |----------------------------------|-------------|---------------------------------------------|
//! | absent, or another UID           | GONE        | none                                        |
//! | unbound, or bound elsewhere      | NOT_BOUND   | none: the agent keeps the record            |
//! | bound here, number not higher    | DURABLE     | none: a newer one is in the store           |
//! | bound here                       | DURABLE     | written; final + released + deleted: removed|
//! | the store cannot write now       | none        | the session ends, the agent sends it again  |
//! | refused as invalid               | DURABLE     | dropped, with an error in the log           |

use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::kinds;
use gantry_api::proto;
use gantry_api::proto::status_ack::Outcome;
use gantry_api::rules::{self, Rule};
use gantry_api::status::{Reason, Status};
use serde_json::{Value, json};

use super::{Inner, NodeLink};
use crate::server::registry::DISRUPTION_TARGET;
use crate::server::{Part, WriteOptions};

/// UIDs whose highest number is remembered before those of removed pods are dropped.
const REMEMBERED_MAX: usize = 1_024;

impl Inner {
    /// Takes one report. An error is one that a later try may not meet; nothing was acknowledged.
    pub(super) async fn take_status(
        &self,
        node: &str,
        link: &NodeLink,
        report: proto::StatusReport,
    ) -> Result<proto::StatusAck, Status> {
        let outcome = match self.write_status(node, link, &report).await {
            Ok(outcome) => outcome,
            Err(status) if status.is_retryable() || status.reason == Reason::Conflict => {
                return Err(status);
            }
            Err(status) => {
                // It would be refused for ever and keep every later one of the pod waiting.
                let (namespace, name) = (&report.namespace, &report.name);
                tracing::error!(node, namespace, name, %status, "dropping a status that is refused");
                Outcome::Durable
            }
        };
        let mut ack = proto::StatusAck {
            uid: report.uid,
            incarnation: report.incarnation,
            seq: report.seq,
            ..Default::default()
        };
        ack.set_outcome(outcome);
        Ok(ack)
    }

    async fn write_status(
        &self,
        node: &str,
        link: &NodeLink,
        report: &proto::StatusReport,
    ) -> Result<Outcome, Status> {
        let (namespace, name) = (report.namespace.as_str(), report.name.as_str());
        let Some(pod) = self.registry.get::<Pod>(namespace, name)? else {
            return Ok(Outcome::Gone);
        };
        if pod.metadata.uid.as_deref() != Some(&report.uid) {
            return Ok(Outcome::Gone);
        }
        // A pod is bound once and for all, so this cannot change under the write below.
        let bound_to = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        if bound_to != Some(node) {
            return Ok(Outcome::NotBound);
        }
        if self.is_higher(node, link, report) {
            match self.store_status(report).await {
                Err(status) if status.reason == Reason::NotFound => return Ok(Outcome::Gone),
                other => other?,
            }
            let number = (report.incarnation, report.seq);
            link.state().statuses.insert(report.uid.clone(), number);
        }
        if report.r#final && report.released && pod.metadata.deletion_timestamp.is_some() {
            self.registry
                .remove_pod(namespace, name, &report.uid)
                .await?;
            tracing::info!(
                node,
                uid = report.uid,
                namespace,
                name,
                "pod removed: it has ended"
            );
        }
        Ok(Outcome::Durable)
    }

    fn is_higher(&self, node: &str, link: &NodeLink, report: &proto::StatusReport) -> bool {
        if link.state().statuses.len() >= REMEMBERED_MAX {
            // Locks are taken in one order everywhere: the index before a link's state.
            let index = self.index();
            let mut state = link.state();
            // A node may have more pods than that: then not with every report of theirs.
            if state.statuses.len() >= 2 * index.pod_count(node) {
                let bound = index.pod_uids(node);
                (state.statuses).retain(|uid, _| bound.contains(uid.as_str()));
            }
        }
        let state = link.state();
        let last = state.statuses.get(&report.uid);
        last.is_none_or(|last| (report.incarnation, report.seq) > *last)
            || rules::is_off(Rule::StatusOrder)
    }

    async fn store_status(&self, report: &proto::StatusReport) -> Result<(), Status> {
        let status: Value = serde_json::from_slice(&report.status_json)
            .map_err(|error| Status::bad_request(format!("a pod status is no JSON: {error}")))?;
        let kind = kinds::by_plural("", "pods")
            .ok_or_else(|| Status::not_served("pods is not a kind of this server"))?;
        let options = WriteOptions::default();
        let change = |old: &Value| {
            if old["metadata"]["uid"] != json!(report.uid) {
                return Err(Status::not_found(kind, &report.name));
            }
            let mut new = old.clone();
            new["status"] = merge(&old["status"], &status);
            Ok(new)
        };
        let (namespace, name) = (&report.namespace, &report.name);
        self.registry
            .change_value(kind, namespace, name, Part::Status, &options, change)
            .await?;
        Ok(())
    }
}

/// Conditions of the agent's own that are over when it reports them no more.
const OVER_WHEN_GONE: [&str; 2] = ["PodResizePending", "PodResizeInProgress"];

/// Whether a condition is over when the agent does not report it. DisruptionTarget has several authors:
/// an eviction that a restart of the agent has called off takes its own along and no other's.
fn is_agents_own(condition: &Value) -> bool {
    let mut own = OVER_WHEN_GONE.iter();
    own.any(|type_| condition["type"] == *type_)
        || condition["type"] == DISRUPTION_TARGET && condition["reason"] == TERMINATION_BY_AGENT
}

/// The reason by which the agent's DisruptionTarget is told from others'.
const TERMINATION_BY_AGENT: &str = "TerminationByKubelet";

/// The status to store: the agent's, with what others wrote beside it. A pod that has ended stays
/// so, whatever an agent that lost its memory says.
fn merge(old: &Value, new: &Value) -> Value {
    let ended = |status: &Value| matches!(status["phase"].as_str(), Some("Succeeded" | "Failed"));
    if ended(old) && !ended(new) && !rules::is_off(Rule::FinalStays) {
        return old.clone();
    }
    let mut merged = new.clone();
    let types: Vec<Value> = conditions(new)
        .map(|condition| condition["type"].clone())
        .collect();
    // PodScheduled is the scheduler's, readiness gates are their owners'.
    let kept = conditions(old).filter(|condition| {
        // Why a pod has ended does not change any more.
        let over = !ended(old) && is_agents_own(condition);
        !over && !types.contains(&condition["type"])
    });
    let all: Vec<Value> = kept.chain(conditions(new)).cloned().collect();
    if !all.is_empty() {
        merged["conditions"] = Value::Array(all);
    }
    for field in ["qosClass", "startTime", "nominatedNodeName"] {
        if merged[field].is_null() && !old[field].is_null() {
            merged[field] = old[field].clone();
        }
    }
    // Indexing has left nulls where neither had a value.
    if let Value::Object(fields) = &mut merged {
        fields.retain(|_, value| !value.is_null());
    }
    merged
}

fn conditions(status: &Value) -> impl Iterator<Item = &Value> {
    status["conditions"].as_array().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_of_others_survive_the_agents_status() {
        let old = json!({"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}]});
        let new = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
        let merged = merge(&old, &new);
        assert_eq!(merged["phase"], "Running");
        assert_eq!(merged["conditions"].as_array().unwrap().len(), 2);
        assert_eq!(merged["conditions"][0]["type"], "PodScheduled");
        assert_eq!(merged["conditions"][1]["status"], "True");
        // Merging again changes nothing: no write, no new revision, no echo.
        assert_eq!(merge(&merged, &new), merged);
    }

    #[test]
    fn a_disruption_stays_unless_the_agent_itself_has_called_it_off() {
        let status = |phase: &str, reason: Option<&str>| {
            let condition = reason.map(
                |reason| json!({"type": DISRUPTION_TARGET, "status": "True", "reason": reason}),
            );
            let conditions: Vec<Value> = condition.into_iter().collect();
            json!({"phase": phase, "conditions": conditions})
        };
        let reason = |status: &Value| {
            let mut all = conditions(status);
            let found = all.find(|condition| condition["type"] == DISRUPTION_TARGET);
            found.and_then(|condition| condition["reason"].as_str().map(str::to_owned))
        };
        for (old, phase, new, kept) in [
            // The victim of a preemption ends: the scheduler's word stays.
            ("PreemptionByScheduler", "Running", None, true),
            ("PreemptionByScheduler", "Failed", None, true),
            // An evicted pod ends as such; an agent that started anew evicts it no more.
            (
                TERMINATION_BY_AGENT,
                "Failed",
                Some(TERMINATION_BY_AGENT),
                true,
            ),
            (TERMINATION_BY_AGENT, "Running", None, false),
        ] {
            let merged = merge(&status("Running", Some(old)), &status(phase, new));
            let expected = kept.then(|| old.to_owned());
            assert_eq!(reason(&merged), expected, "{old} {phase} {new:?}");
        }
        let ended = status("Failed", Some(TERMINATION_BY_AGENT));
        let merged = merge(&ended, &status("Failed", None));
        assert_eq!(reason(&merged).as_deref(), Some(TERMINATION_BY_AGENT));
    }

    #[test]
    fn a_final_phase_is_never_taken_back() {
        let old = json!({"phase": "Succeeded"});
        assert_eq!(merge(&old, &json!({"phase": "Running"})), old);
        assert_eq!(merge(&old, &json!({"phase": "Failed"}))["phase"], "Failed");
    }
}
