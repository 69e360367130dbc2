//! Rules for a Job's pod failure policy and success policy.

use std::collections::{BTreeSet, HashSet};

use super::{names, not_negative};
use crate::field::{FieldError, Path};
use k8s_openapi::api::batch::v1::{
    JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
    PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule, SuccessPolicy, SuccessPolicyRule,
};
use serde_json::Value;

/// Rules of a policy.
const RULE_COUNT_MAX: usize = 20;
/// Patterns of conditions in a rule.
const PATTERN_COUNT_MAX: usize = 20;
/// Exit codes in a rule.
const EXIT_CODE_COUNT_MAX: usize = 255;
/// Text of `succeededIndexes`.
const INDEXES_BYTES_MAX: usize = 64 * 1024;

const ACTIONS: [&str; 4] = ["Count", "FailIndex", "FailJob", "Ignore"];
const OPERATORS: [&str; 2] = ["In", "NotIn"];
const STATUSES: [&str; 3] = ["False", "True", "Unknown"];

/// An enumeration that must be given.
fn required_of(at: &Path, value: &str, allowed: &[&str], errors: &mut Vec<FieldError>) {
    if value.is_empty() {
        let quoted: Vec<String> = allowed.iter().map(|value| format!("{value:?}")).collect();
        let detail = format!("valid values: [{}]", quoted.join(" "));
        errors.push(FieldError::required(at, &detail));
    } else if !allowed.contains(&value) {
        errors.push(FieldError::not_supported(at, value, allowed));
    }
}

/// What is to become of failed pods.
pub(super) fn pod_failure_policy(
    policy: &PodFailurePolicy,
    spec: &JobSpec,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    let path = path.child("rules");
    let count = policy.rules.len();
    if count > RULE_COUNT_MAX {
        errors.push(FieldError::too_many(&path, count, RULE_COUNT_MAX));
    }
    let pod = spec.template.spec.as_ref();
    let containers = pod.into_iter().flat_map(|pod| {
        let init = pod.init_containers.iter().flatten();
        init.chain(&pod.containers)
    });
    let names: HashSet<&str> = containers
        .map(|container| container.name.as_str())
        .collect();
    for (i, rule) in policy.rules.iter().enumerate() {
        failure_rule(rule, spec, &names, &path.index(i), errors);
    }
}

fn failure_rule(
    rule: &PodFailurePolicyRule,
    spec: &JobSpec,
    containers: &HashSet<&str>,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    let at = path.child("action");
    required_of(&at, &rule.action, &ACTIONS, errors);
    if rule.action == "FailIndex" && spec.backoff_limit_per_index.is_none() {
        let detail = "requires the backoffLimitPerIndex to be set";
        errors.push(FieldError::invalid(&at, rule.action.as_str(), detail));
    }
    if let Some(codes) = &rule.on_exit_codes {
        exit_codes(codes, containers, &path.child("onExitCodes"), errors);
    }
    let patterns = rule.on_pod_conditions.as_deref().unwrap_or_default();
    conditions(patterns, &path.child("onPodConditions"), errors);
    let detail = match (rule.on_exit_codes.is_some(), !patterns.is_empty()) {
        (true, true) => "specifying both OnExitCodes and OnPodConditions is not supported",
        (false, false) => "specifying one of OnExitCodes and OnPodConditions is required",
        _ => return,
    };
    errors.push(FieldError::invalid_as_a_whole(path, detail));
}

fn exit_codes(
    codes: &PodFailurePolicyOnExitCodesRequirement,
    containers: &HashSet<&str>,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    required_of(&path.child("operator"), &codes.operator, &OPERATORS, errors);
    if let Some(name) = codes.container_name.as_deref()
        && !containers.contains(name)
    {
        let detail = "must be one of the container or initContainer names in the pod template";
        errors.push(FieldError::invalid(
            &path.child("containerName"),
            name,
            detail,
        ));
    }
    let (path, values) = (path.child("values"), &codes.values);
    let all = || Value::from(values.clone());
    if values.is_empty() {
        errors.push(FieldError::invalid(
            &path,
            all(),
            "at least one value is required",
        ));
    } else if values.len() > EXIT_CODE_COUNT_MAX {
        errors.push(FieldError::too_many(
            &path,
            values.len(),
            EXIT_CODE_COUNT_MAX,
        ));
    }
    let mut seen = BTreeSet::new();
    for (i, value) in values.iter().enumerate() {
        let at = path.index(i);
        if codes.operator == "In" && *value == 0 {
            let detail = "must not be 0 for the In operator";
            errors.push(FieldError::invalid(&at, *value, detail));
        }
        if !seen.insert(value) {
            errors.push(FieldError::duplicate(&at, *value));
        }
    }
    if !values.is_sorted() {
        errors.push(FieldError::invalid(&path, all(), "must be ordered"));
    }
}

fn conditions(
    patterns: &[PodFailurePolicyOnPodConditionsPattern],
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    if patterns.len() > PATTERN_COUNT_MAX {
        errors.push(FieldError::too_many(
            path,
            patterns.len(),
            PATTERN_COUNT_MAX,
        ));
    }
    for (i, pattern) in patterns.iter().enumerate() {
        let path = path.index(i);
        let broken = names::qualified_name(&pattern.type_);
        super::each(&path.child("type"), &pattern.type_, broken, errors);
        let status = pattern.status.as_deref().unwrap_or_default();
        required_of(&path.child("status"), status, &STATUSES, errors);
    }
}

/// Which successes are enough.
pub(super) fn success_policy(
    policy: &SuccessPolicy,
    spec: &JobSpec,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    if spec.completion_mode.as_deref() != Some("Indexed") {
        let value = serde_json::to_value(policy).unwrap_or(Value::Null);
        let detail = "requires indexed completion mode";
        errors.push(FieldError::invalid(path, value, detail));
        return;
    }
    let path = path.child("rules");
    let count = policy.rules.len();
    if count == 0 {
        let detail = "at least one rules must be specified when the successPolicy is specified";
        errors.push(FieldError::required(&path, detail));
    } else if count > RULE_COUNT_MAX {
        errors.push(FieldError::too_many(&path, count, RULE_COUNT_MAX));
    }
    // Without completions, which is an error of its own, no index is too large.
    let completions = spec.completions.unwrap_or(i32::MAX);
    for (i, rule) in policy.rules.iter().enumerate() {
        success_rule(rule, completions, &path.index(i), errors);
    }
}

fn success_rule(
    rule: &SuccessPolicyRule,
    completions: i32,
    path: &Path,
    errors: &mut Vec<FieldError>,
) {
    if rule.succeeded_count.is_none() && rule.succeeded_indexes.is_none() {
        let detail = "at least one of succeededCount or succeededIndexes must be specified";
        errors.push(FieldError::required(path, detail));
    }
    let mut named = None;
    if let Some(text) = rule.succeeded_indexes.as_deref() {
        let at = path.child("succeededIndexes");
        if text.len() > INDEXES_BYTES_MAX {
            errors.push(FieldError::too_long(&at, INDEXES_BYTES_MAX));
        }
        match count_indexes(text, completions) {
            Ok(count) => named = Some(count),
            Err(error) => {
                let detail = format!("error parsing succeededIndexes: {error}");
                errors.push(FieldError::invalid(&at, text, &detail));
                named = Some(0);
            }
        }
    }
    let Some(count) = rule.succeeded_count else {
        return;
    };
    let at = path.child("succeededCount");
    not_negative(&at, Some(i64::from(count)), errors);
    let mut at_most = |most: i32, of: &str| {
        if count > most {
            let detail = format!("must be less than or equal to {most} (the number of {of})");
            errors.push(FieldError::invalid(&at, count, &detail));
        }
    };
    at_most(completions, "specified completions");
    if let Some(named) = named {
        at_most(named, "indexes in the specified succeededIndexes field");
    }
}

/// How many indexes a text as `1,3-5` names, all of them below `completions` and in order.
fn count_indexes(text: &str, completions: i32) -> Result<i32, String> {
    if text.is_empty() {
        return Ok(0);
    }
    let parse = |part: &str| {
        let index: i32 = part
            .parse()
            .ok()
            .filter(|index| *index >= 0)
            .ok_or_else(|| format!("cannot convert string to integer for index: {part:?}"))?;
        if index >= completions {
            return Err(format!("too large index: {part:?}"));
        }
        Ok(index)
    };
    let increasing = |previous: i32, current: i32| {
        if previous < current {
            return Ok(());
        }
        let words = "non-increasing order, previous:";
        Err(format!("{words} {previous}, current: {current}"))
    };
    let (mut count, mut previous) = (0_i32, None);
    for fragment in text.split(',') {
        let parts: Vec<&str> = fragment.split('-').collect();
        let (first, last) = match parts.as_slice() {
            [only] => {
                let only = parse(only)?;
                (only, only)
            }
            [first, last] => {
                let range = (parse(first)?, parse(last)?);
                increasing(range.0, range.1)?;
                range
            }
            _ => {
                return Err(format!(
                    "the fragment {fragment:?} violates the requirement that an index interval can \
                     have at most two parts separated by '-'"
                ));
            }
        };
        if let Some(previous) = previous {
            increasing(previous, first)?;
        }
        previous = Some(last);
        count = count.saturating_add(last - first + 1);
    }
    Ok(count)
}
