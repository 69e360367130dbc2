//! Level restricted: what hardens a pod besides. In the order of Kubernetes' names for the checks.

use gantry_api::k8s_openapi::api::core::v1::Volume;

use super::baseline::{added_capabilities, seccomp, wrong_seccomp};
use super::checks::{Check, Violation, containers, plural, quoted, setters, sorted, violation};

pub(super) fn violations(check: &Check<'_>) -> Vec<Violation> {
    [
        privilege_escalation(check),
        capabilities(check),
        volumes(check),
        non_root(check),
        user(check),
        seccomp_stated(check),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn privilege_escalation(check: &Check<'_>) -> Option<Violation> {
    if check.minor < 8 {
        return None;
    }
    let bad = check
        .bad(|member| member.security.and_then(|s| s.allow_privilege_escalation) != Some(false));
    (!bad.is_empty()).then(|| {
        let who = containers(&bad);
        let detail = format!("{who} must set securityContext.allowPrivilegeEscalation=false");
        violation("allowPrivilegeEscalation != false", detail)
    })
}

fn capabilities(check: &Check<'_>) -> Option<Violation> {
    if check.minor < 22 {
        return None;
    }
    let missing = check.bad(|member| {
        let capabilities = member.security.and_then(|s| s.capabilities.as_ref());
        let dropped = capabilities.and_then(|c| c.drop.as_ref());
        !dropped.into_iter().flatten().any(|name| name == "ALL")
    });
    let (adding, added) = added_capabilities(check, &["NET_BIND_SERVICE"]);
    let mut details = Vec::new();
    if !missing.is_empty() {
        let who = containers(&missing);
        details.push(format!(
            "{who} must set securityContext.capabilities.drop=[\"ALL\"]"
        ));
    }
    if !adding.is_empty() {
        let (who, added) = (
            containers(&adding),
            quoted(added.iter().map(String::as_str)),
        );
        details.push(format!(
            "{who} must not include {added} in securityContext.capabilities.add"
        ));
    }
    (!details.is_empty()).then(|| violation("unrestricted capabilities", details.join("; ")))
}

/// The kind of a volume's source that is not among the allowed ones.
fn restricted_type(volume: &Volume) -> Option<String> {
    let value = serde_json::to_value(volume).ok()?;
    let fields = value.as_object()?;
    let mut sources = fields.keys().filter(|field| *field != "name");
    match sources.next().map(String::as_str) {
        Some(
            "configMap"
            | "csi"
            | "downwardAPI"
            | "emptyDir"
            | "ephemeral"
            | "persistentVolumeClaim"
            | "projected"
            | "secret",
        ) => None,
        Some(source) => Some(source.to_owned()),
        None => Some("unknown".to_owned()),
    }
}

fn volumes(check: &Check<'_>) -> Option<Violation> {
    let mut types = Vec::new();
    let mut bad = Vec::new();
    for volume in check.spec.volumes.iter().flatten() {
        if let Some(kind) = restricted_type(volume) {
            bad.push(volume.name.as_str());
            types.push(kind);
        }
    }
    let types = sorted(types.iter().map(String::as_str));
    let word = plural("volume", "volumes", bad.len());
    let verb = plural("uses", "use", bad.len());
    let kind = plural(
        "restricted volume type",
        "restricted volume types",
        types.len(),
    );
    (!bad.is_empty()).then(|| {
        let (bad, types) = (quoted(bad.iter().copied()), quoted(types));
        violation(
            "restricted volume types",
            format!("{word} {bad} {verb} {kind} {types}"),
        )
    })
}

fn non_root(check: &Check<'_>) -> Option<Violation> {
    if check.is_in_user_namespace() {
        return None;
    }
    let reason = "runAsNonRoot != true";
    let of_pod = check.security().and_then(|s| s.run_as_non_root);
    let of = |non_root: Option<bool>| {
        check.bad(|member| member.security.and_then(|s| s.run_as_non_root) == non_root)
    };
    if let Some(who) = setters(of_pod == Some(false), &of(Some(false))) {
        let detail = format!("{who} must not set securityContext.runAsNonRoot=false");
        return Some(violation(reason, detail));
    }
    let silent = of(None);
    (of_pod.is_none() && !silent.is_empty()).then(|| {
        let who = containers(&silent);
        let detail = format!("pod or {who} must set securityContext.runAsNonRoot=true");
        violation(reason, detail)
    })
}

fn user(check: &Check<'_>) -> Option<Violation> {
    if check.minor < 23 || check.is_in_user_namespace() {
        return None;
    }
    let of_pod = check.security().and_then(|s| s.run_as_user) == Some(0);
    let bad = check.bad(|member| member.security.and_then(|s| s.run_as_user) == Some(0));
    let who = setters(of_pod, &bad)?;
    Some(violation(
        "runAsUser=0",
        format!("{who} must not set runAsUser=0"),
    ))
}

fn seccomp_stated(check: &Check<'_>) -> Option<Violation> {
    if check.minor < 19 {
        return seccomp(check);
    }
    if let Some(wrong) = seccomp(check) {
        return Some(wrong);
    }
    let of_pod = check.security().and_then(|s| s.seccomp_profile.as_ref());
    if of_pod.is_some() && wrong_seccomp(of_pod).is_none() {
        return None;
    }
    let silent = check.bad(|member| {
        let profile = member.security.and_then(|s| s.seccomp_profile.as_ref());
        profile.is_none()
    });
    (!silent.is_empty()).then(|| {
        let who = containers(&silent);
        let detail = format!(
            "pod or {who} must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \
             \"Localhost\""
        );
        violation("seccompProfile", detail)
    })
}
