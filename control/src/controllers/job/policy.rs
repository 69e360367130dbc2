//! What a Job's policies say: of a failed pod, and of the indexes that have succeeded. Pure.
//!
//! Source: Kubernetes `pkg/controller/job/{pod_failure_policy,success_policy}.go`, KEP-3329, KEP-3998.

use gantry_api::k8s_openapi::api::batch::v1::{
    PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
    PodFailurePolicyOnPodConditionsPattern, SuccessPolicy,
};
use gantry_api::k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodCondition};

use super::indexes::Indexes;

/// What a failed pod means for its Job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// One more failure.
    Count,
    /// A failure that never was: the pod is only replaced.
    Ignore,
    /// Its index has failed for good.
    FailIndex,
    /// The whole Job has failed: why.
    FailJob(String),
}

impl Verdict {
    pub(super) fn counts(&self) -> bool {
        *self != Self::Ignore
    }
}

/// Judges a failed pod by the first rule that fits; without one it counts.
pub(super) fn judge(policy: Option<&PodFailurePolicy>, pod: &Pod) -> Verdict {
    for (at, rule) in policy.iter().flat_map(|policy| &policy.rules).enumerate() {
        let found = match (&rule.on_exit_codes, &rule.on_pod_conditions) {
            (Some(wanted), _) => with_exit_code(pod, wanted),
            (None, Some(patterns)) => with_condition(pod, patterns),
            (None, None) => None,
        };
        let Some(found) = found else { continue };
        match rule.action.as_str() {
            "Ignore" => return Verdict::Ignore,
            "Count" => return Verdict::Count,
            "FailIndex" => return Verdict::FailIndex,
            "FailJob" => {
                return Verdict::FailJob(format!("{found} matching FailJob rule at index {at}"));
            }
            // Validation knows no other; one of a later version is as if it were not there.
            _ => {}
        }
    }
    Verdict::Count
}

fn title(pod: &Pod) -> String {
    let part = |text: &Option<String>| text.clone().unwrap_or_default();
    let metadata = &pod.metadata;
    format!("{}/{}", part(&metadata.namespace), part(&metadata.name))
}

/// The container that has ended as the rule says, in words.
fn with_exit_code(pod: &Pod, wanted: &PodFailurePolicyOnExitCodesRequirement) -> Option<String> {
    let status = pod.status.as_ref()?;
    let named = |container: &&ContainerStatus| {
        let name = wanted.container_name.as_ref();
        name.is_none_or(|name| *name == container.name)
    };
    let containers = status.container_statuses.iter().flatten();
    let all = containers.chain(status.init_container_statuses.iter().flatten());
    all.filter(named).find_map(|container| {
        let code = container.state.as_ref()?.terminated.as_ref()?.exit_code;
        let listed = wanted.values.contains(&code);
        let fits = match wanted.operator.as_str() {
            "In" => listed,
            "NotIn" => !listed,
            _ => false,
        };
        let name = &container.name;
        // A success is no failure, also where a rule is about all codes but some.
        (code != 0 && fits).then(|| {
            let pod = title(pod);
            format!("Container {name} for pod {pod} failed with exit code {code}")
        })
    })
}

/// The pod's condition that one of the patterns is about, in words.
fn with_condition(
    pod: &Pod,
    patterns: &[PodFailurePolicyOnPodConditionsPattern],
) -> Option<String> {
    let fits = |condition: &&PodCondition| {
        let mut patterns = patterns.iter();
        patterns.any(|pattern| {
            let status = pattern.status.as_deref().unwrap_or("True");
            pattern.type_ == condition.type_ && status == condition.status
        })
    };
    let mut conditions = pod.status.as_ref()?.conditions.iter().flatten();
    let condition = conditions.find(fits)?;
    Some(format!(
        "Pod {} has condition {}",
        title(pod),
        condition.type_
    ))
}

/// Whether the indexes that have succeeded are enough: in words, which rule says so.
pub(super) fn is_success(
    policy: Option<&SuccessPolicy>,
    completions: i32,
    succeeded: &Indexes,
) -> Option<String> {
    if succeeded.is_empty() {
        return None;
    }
    let mut rules = policy.iter().flat_map(|policy| &policy.rules);
    let met = rules.position(|rule| {
        let Some(text) = &rule.succeeded_indexes else {
            let wanted = rule.succeeded_count;
            return wanted.is_some_and(|count| succeeded.count() >= count);
        };
        let wanted = Indexes::parse(text, completions);
        let shared = wanted.count_shared(succeeded);
        let all = shared == wanted.count();
        !wanted.is_empty() && (all || rule.succeeded_count.is_some_and(|count| shared >= count))
    });
    met.map(|at| format!("Matched rules at index {at}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(init: Value, main: Value, conditions: Value) -> Pod {
        let statuses = |codes: Value| {
            let codes = codes.as_object().cloned().unwrap_or_default();
            let all = codes.into_iter().map(|(name, code)| {
                let state = match code {
                    Value::Null => json!({"running": {}}),
                    code => json!({"terminated": {"exitCode": code}}),
                };
                json!({"name": name, "image": "", "imageID": "", "ready": false, "restartCount": 0,
                    "state": state})
            });
            all.collect::<Vec<_>>()
        };
        serde_json::from_value(json!({
            "metadata": {"namespace": "a", "name": "p"},
            "status": {"phase": "Failed", "conditions": conditions,
                "initContainerStatuses": statuses(init), "containerStatuses": statuses(main)},
        }))
        .unwrap()
    }

    fn policy(rules: Value) -> PodFailurePolicy {
        serde_json::from_value(json!({"rules": rules})).unwrap()
    }

    #[test]
    fn the_first_rule_that_fits_is_the_verdict() {
        let codes = |action: &str, operator: &str, values: Value, name: Value| {
            json!({"action": action, "onExitCodes":
                {"operator": operator, "values": values, "containerName": name}})
        };
        let condition = |action: &str, status: Value| {
            json!({"action": action, "onPodConditions": [
                {"type": "Other", "status": "True"}, {"type": "DisruptionTarget", "status": status}]})
        };
        let failed_42 = || pod(json!({}), json!({"c": 42}), json!([]));
        let disrupted = || {
            let conditions = json!([{"type": "DisruptionTarget", "status": "True"}]);
            pod(json!({}), json!({"c": 137}), conditions)
        };
        let fail_job = |words: &str| Verdict::FailJob(words.to_owned());
        for (rules, pod, expected) in [
            (json!([]), failed_42(), Verdict::Count),
            (
                json!([codes("FailJob", "In", json!([1, 42]), json!(null))]),
                failed_42(),
                fail_job(
                    "Container c for pod a/p failed with exit code 42 matching FailJob rule at index 0",
                ),
            ),
            (
                json!([
                    condition("Ignore", json!("True")),
                    codes("FailJob", "NotIn", json!([1]), json!("c"))
                ]),
                failed_42(),
                fail_job(
                    "Container c for pod a/p failed with exit code 42 matching FailJob rule at index 1",
                ),
            ),
            (
                json!([codes("FailIndex", "In", json!([42]), json!("c"))]),
                failed_42(),
                Verdict::FailIndex,
            ),
            // Another container, another code, another status: no rule fits.
            (
                json!([
                    codes("FailJob", "In", json!([42]), json!("d")),
                    codes("FailJob", "In", json!([1]), json!("c")),
                    condition("Ignore", json!("False"))
                ]),
                failed_42(),
                Verdict::Count,
            ),
            (
                json!([
                    condition("Ignore", json!(null)),
                    codes("FailJob", "In", json!([137]), json!(null))
                ]),
                disrupted(),
                Verdict::Ignore,
            ),
            (
                json!([condition("FailJob", json!("True"))]),
                disrupted(),
                fail_job("Pod a/p has condition DisruptionTarget matching FailJob rule at index 0"),
            ),
            (
                json!([
                    codes("Count", "NotIn", json!([1]), json!(null)),
                    condition("FailJob", json!("True"))
                ]),
                disrupted(),
                Verdict::Count,
            ),
            // Success and what still runs match nothing; init containers do.
            (
                json!([codes("FailJob", "NotIn", json!([7]), json!(null))]),
                pod(json!({"i": 7}), json!({"c": 0, "d": null}), json!([])),
                Verdict::Count,
            ),
            (
                json!([codes("Ignore", "In", json!([7]), json!("i"))]),
                pod(json!({"i": 7}), json!({"c": null}), json!([])),
                Verdict::Ignore,
            ),
            (
                json!([codes("Later", "In", json!([42]), json!(null))]),
                failed_42(),
                Verdict::Count,
            ),
        ] {
            let policy = policy(rules);
            assert_eq!(judge(Some(&policy), &pod), expected, "{policy:?}");
        }
        assert_eq!(judge(None, &failed_42()), Verdict::Count);
    }

    #[test]
    fn one_rule_that_is_met_is_enough_for_success() {
        for (rules, succeeded, expected) in [
            (json!([{"succeededCount": 2}]), "3", None),
            (json!([{"succeededCount": 2}]), "3,7", Some(0)),
            (json!([{"succeededIndexes": "0-2"}]), "0,1,5", None),
            (json!([{"succeededIndexes": "0-2"}]), "0-2", Some(0)),
            (
                json!([{"succeededIndexes": "0-2", "succeededCount": 2}]),
                "0,5,6",
                None,
            ),
            (
                json!([{"succeededIndexes": "0-2", "succeededCount": 2}]),
                "0,2",
                Some(0),
            ),
            (
                json!([{"succeededCount": 9}, {"succeededIndexes": "5"}]),
                "5",
                Some(1),
            ),
            (
                json!([{"succeededIndexes": "5", "succeededCount": 0}]),
                "",
                None,
            ),
            (json!([]), "0-9", None),
        ] {
            let policy: SuccessPolicy = serde_json::from_value(json!({"rules": rules})).unwrap();
            let met = is_success(Some(&policy), 10, &Indexes::parse(succeeded, 10));
            let expected = expected.map(|at: i32| format!("Matched rules at index {at}"));
            assert_eq!(met, expected, "{policy:?} {succeeded}");
        }
    }
}
