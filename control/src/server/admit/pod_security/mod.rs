//! Pod Security: what pods of a namespace may do, by the levels in its labels. Pure.
//!
//! ```text
//!  pod-security.kubernetes.io/enforce|audit|warn = privileged | baseline | restricted
//!  pod-security.kubernetes.io/…-version          = latest | v1.N
//!
//!  a pod       ─► enforce: refused    audit: logged    warn: the client is told
//!  a template  ─►                     audit: logged    warn: the client is told
//!  new labels  ─► existing pods that the new level would refuse are named to the client
//! ```
//! Pods that run stay as they are. A label that cannot be read counts as `restricted:latest`; none is
//! written (`gantry-api` refuses it).
//!
//! Source: Kubernetes' plugin PodSecurity (`k8s.io/pod-security-admission`); the words are its.

mod baseline;
mod checks;
mod restricted;

use std::collections::BTreeMap;
use std::fmt;

use gantry_api::k8s_openapi::api::core::v1::{Pod, PodSpec};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use gantry_api::pod_security::{Level, MINOR_LATEST, Mode, version};
use serde_json::Value;

use checks::{Check, Violation};

/// Pods of a namespace that are looked at when its level rises, as in Kubernetes.
pub(super) const PODS_LOOKED_AT_MAX: usize = 3000;

/// A level as of a version of its definition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LevelVersion {
    pub(super) level: Level,
    /// Minor version; [`MINOR_LATEST`]: the newest.
    minor: u32,
}

impl LevelVersion {
    fn of(labels: &BTreeMap<String, String>, mode: Mode) -> Option<LevelVersion> {
        let level = labels.get(&mode.label())?;
        let minor = labels.get(&mode.version_label());
        let parsed = Level::parse(level);
        let minor = minor.map_or(Some(MINOR_LATEST), |text| version(text));
        Some(match parsed.zip(minor) {
            Some((level, minor)) => LevelVersion { level, minor },
            None => LevelVersion {
                level: Level::Restricted,
                minor: MINOR_LATEST,
            },
        })
    }

    fn privileged() -> LevelVersion {
        LevelVersion {
            level: Level::Privileged,
            minor: MINOR_LATEST,
        }
    }
}

impl fmt::Display for LevelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.minor {
            MINOR_LATEST => write!(f, "{}:latest", self.level),
            minor => write!(f, "{}:v1.{minor}", self.level),
        }
    }
}

/// What a namespace's labels ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Policy {
    pub(super) enforce: LevelVersion,
    audit: LevelVersion,
    warn: LevelVersion,
}

impl Policy {
    pub(super) fn of(labels: &BTreeMap<String, String>) -> Policy {
        let of = |mode| LevelVersion::of(labels, mode);
        let enforce = of(Mode::Enforce).unwrap_or(LevelVersion::privileged());
        Policy {
            enforce,
            audit: of(Mode::Audit).unwrap_or(LevelVersion::privileged()),
            // Who is not told otherwise learns from a template what will become of its pods.
            warn: of(Mode::Warn).unwrap_or(enforce),
        }
    }

    /// Whether it asks for nothing.
    pub(super) fn is_idle(&self) -> bool {
        [self.enforce, self.audit, self.warn]
            .iter()
            .all(|of| of.level == Level::Privileged)
    }
}

/// What became of a pod or template.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Why it is refused.
    pub(super) refusal: Option<String>,
    /// For the log.
    pub(super) audit: Option<String>,
    /// For the client.
    pub(super) warning: Option<String>,
}

/// Judges a pod, or with `is_template` what pods will come of it.
pub(super) fn judge(
    policy: &Policy,
    metadata: &ObjectMeta,
    spec: &PodSpec,
    is_template: bool,
) -> Outcome {
    let violated = |of: LevelVersion| details(&violations(of, metadata, spec));
    let mut outcome = Outcome::default();
    if !is_template && let Some(details) = violated(policy.enforce) {
        let text = format!("violates PodSecurity \"{}\": {details}", policy.enforce);
        outcome.refusal = Some(text);
    }
    let would = |of: LevelVersion| {
        let details = violated(of)?;
        Some(format!("would violate PodSecurity \"{of}\": {details}"))
    };
    outcome.audit = would(policy.audit);
    if outcome.refusal.is_none() {
        outcome.warning = would(policy.warn);
    }
    outcome
}

/// What existing pods break of a new level, as warnings.
pub(super) fn existing(namespace: &str, enforce: LevelVersion, pods: &[Pod]) -> Vec<String> {
    let mut by_reason: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for pod in pods.iter().take(PODS_LOOKED_AT_MAX) {
        let Some(spec) = &pod.spec else { continue };
        let violations = violations(enforce, &pod.metadata, spec);
        let reasons: Vec<&str> = violations.iter().map(|v| v.reason.as_str()).collect();
        if !reasons.is_empty() {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            by_reason.entry(reasons.join(", ")).or_default().push(name);
        }
    }
    let mut warnings = Vec::new();
    if pods.len() > PODS_LOOKED_AT_MAX {
        warnings.push(format!(
            "new PodSecurity enforce level only checked against the first {PODS_LOOKED_AT_MAX} of {} \
             existing pods",
            pods.len()
        ));
    }
    if !by_reason.is_empty() {
        warnings.push(format!(
            "existing pods in namespace {namespace:?} violate the new PodSecurity enforce level \
             \"{enforce}\""
        ));
    }
    let mut lines: Vec<String> = by_reason
        .iter()
        .map(|(reason, names)| {
            let first = names.iter().min().copied().unwrap_or_default();
            match names.len() {
                1 => format!("{first}: {reason}"),
                2 => format!("{first} (and 1 other pod): {reason}"),
                count => format!("{first} (and {} other pods): {reason}", count - 1),
            }
        })
        .collect();
    lines.sort();
    warnings.extend(lines);
    warnings
}

fn violations(of: LevelVersion, metadata: &ObjectMeta, spec: &PodSpec) -> Vec<Violation> {
    let check = Check::new(metadata, spec, of.minor);
    match of.level {
        Level::Privileged => Vec::new(),
        Level::Baseline => baseline::violations(&check, false),
        Level::Restricted => {
            let mut all = baseline::violations(&check, true);
            all.extend(restricted::violations(&check));
            all
        }
    }
}

/// `reason (detail), reason (detail)`
fn details(violations: &[Violation]) -> Option<String> {
    let one = |violation: &Violation| match violation.detail.as_str() {
        "" => violation.reason.clone(),
        detail => format!("{} ({detail})", violation.reason),
    };
    let all: Vec<String> = violations.iter().map(one).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// Where a workload says what its pods are.
pub(super) fn template<'a>(kind: &str, object: &'a Value) -> Option<&'a Value> {
    match kind {
        "Deployment"
        | "ReplicaSet"
        | "ReplicationController"
        | "DaemonSet"
        | "StatefulSet"
        | "Job" => object.pointer("/spec/template"),
        "CronJob" => object.pointer("/spec/jobTemplate/spec/template"),
        _ => None,
    }
}

/// Whether a change of a pod is one that levels are about: another image, or one more container.
pub(super) fn is_significant(old: &Value, new: &Value) -> bool {
    let of = |pod: &Value| -> Vec<(Value, Value)> {
        let lists = ["containers", "initContainers", "ephemeralContainers"];
        let containers = lists
            .iter()
            .filter_map(|list| pod["spec"][list].as_array())
            .flatten();
        containers
            .map(|c| (c["name"].clone(), c["image"].clone()))
            .collect()
    };
    of(old) != of(new)
}

#[cfg(test)]
mod tests;
