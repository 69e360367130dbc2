//! What checks look at, and the words that they share.

use std::collections::{BTreeMap, BTreeSet};

use gantry_api::k8s_openapi::api::core::v1::{
    ContainerPort, Lifecycle, PodSecurityContext, PodSpec, Probe, SecurityContext,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// What a pod does that its namespace's level does not allow.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation {
    pub(super) reason: String,
    pub(super) detail: String,
}

pub(super) fn violation(reason: &str, detail: String) -> Violation {
    Violation {
        reason: reason.to_owned(),
        detail,
    }
}

/// A container of any of the three lists.
pub(super) struct Member<'a> {
    pub(super) name: &'a str,
    pub(super) security: Option<&'a SecurityContext>,
    pub(super) ports: &'a [ContainerPort],
    pub(super) probes: Vec<&'a Probe>,
    pub(super) lifecycle: Option<&'a Lifecycle>,
}

/// One pod under one version of the levels.
pub(super) struct Check<'a> {
    pub(super) annotations: Option<&'a BTreeMap<String, String>>,
    pub(super) spec: &'a PodSpec,
    pub(super) members: Vec<Member<'a>>,
    pub(super) minor: u32,
}

impl<'a> Check<'a> {
    pub(super) fn new(metadata: &'a ObjectMeta, spec: &'a PodSpec, minor: u32) -> Check<'a> {
        let mut members = Vec::new();
        let init = spec.init_containers.iter().flatten();
        for one in init.chain(&spec.containers) {
            let probes = [
                &one.liveness_probe,
                &one.readiness_probe,
                &one.startup_probe,
            ];
            members.push(Member {
                name: &one.name,
                security: one.security_context.as_ref(),
                ports: one.ports.as_deref().unwrap_or_default(),
                probes: probes.into_iter().flatten().collect(),
                lifecycle: one.lifecycle.as_ref(),
            });
        }
        for one in spec.ephemeral_containers.iter().flatten() {
            members.push(Member {
                name: &one.name,
                security: one.security_context.as_ref(),
                ports: one.ports.as_deref().unwrap_or_default(),
                probes: Vec::new(),
                lifecycle: None,
            });
        }
        Check {
            annotations: metadata.annotations.as_ref(),
            spec,
            members,
            minor,
        }
    }

    pub(super) fn security(&self) -> Option<&'a PodSecurityContext> {
        self.spec.security_context.as_ref()
    }

    /// A pod in a user namespace is nobody on the node, whoever it is inside: since 1.35 it may be root.
    pub(super) fn is_in_user_namespace(&self) -> bool {
        self.minor >= 35 && self.spec.host_users == Some(false)
    }

    /// Names of the containers that do what they must not.
    pub(super) fn bad(&self, is_bad: impl Fn(&Member<'a>) -> bool) -> Vec<&'a str> {
        let bad = self.members.iter().filter(|member| is_bad(member));
        bad.map(|member| member.name).collect()
    }
}

/// `"a", "b"`
pub(super) fn quoted<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let all: Vec<String> = names.into_iter().map(|name| format!("{name:?}")).collect();
    all.join(", ")
}

pub(super) fn plural<'a>(one: &'a str, many: &'a str, count: usize) -> &'a str {
    if count == 1 { one } else { many }
}

/// `container "a"`, `containers "a", "b"`
pub(super) fn containers(names: &[&str]) -> String {
    let word = plural("container", "containers", names.len());
    format!("{word} {}", quoted(names.iter().copied()))
}

/// `pod and container "a"`: who says something wrong.
pub(super) fn setters(pod: bool, names: &[&str]) -> Option<String> {
    let mut all = Vec::new();
    if pod {
        all.push("pod".to_owned());
    }
    if !names.is_empty() {
        all.push(containers(names));
    }
    (!all.is_empty()).then(|| all.join(" and "))
}

/// Texts, each once and in order.
pub(super) fn sorted<'a>(texts: impl IntoIterator<Item = &'a str>) -> BTreeSet<&'a str> {
    texts.into_iter().collect()
}
