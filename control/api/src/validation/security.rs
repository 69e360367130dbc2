//! Rules for security contexts: profiles, sysctls, combinations that contradict themselves.
//!
//! Source: Kubernetes `pkg/apis/core/validation/validation.go`, whose words these are.

use std::collections::BTreeSet;
use std::path::{Component, Path as FilePath};

use k8s_openapi::api::core::v1::{AppArmorProfile, Container, PodSpec, SeccompProfile, Sysctl};

use super::{not_negative, one_of};
use crate::field::{FieldError, Path};

const PROFILE_TYPES: &[&str] = &["Localhost", "RuntimeDefault", "Unconfined"];
/// Longest name of a profile, as the kernel's PATH_MAX.
const PROFILE_BYTES_MAX: usize = 4095;
/// Longest name of a sysctl.
const SYSCTL_BYTES_MAX: usize = 253;

/// `spec.securityContext`, and what `hostUsers: false` rules out.
pub(super) fn pod(spec: &PodSpec, path: &Path, errors: &mut Vec<FieldError>) {
    if spec.host_users == Some(false) {
        for (field, on) in [
            ("hostNetwork", spec.host_network),
            ("hostPID", spec.host_pid),
            ("hostIPC", spec.host_ipc),
        ] {
            if on == Some(true) {
                let detail = "not allowed when `hostUsers` is false";
                errors.push(FieldError::forbidden(&path.child(field), detail));
            }
        }
    }
    let Some(context) = &spec.security_context else {
        return;
    };
    let path = path.child("securityContext");
    for (field, id) in [
        ("runAsUser", context.run_as_user),
        ("runAsGroup", context.run_as_group),
        ("fsGroup", context.fs_group),
    ] {
        not_negative(&path.child(field), id, errors);
    }
    for (i, group) in context.supplemental_groups.iter().flatten().enumerate() {
        let path = path.child("supplementalGroups").index(i);
        not_negative(&path, Some(*group), errors);
    }
    let policy = context.supplemental_groups_policy.as_deref();
    let path_of_policy = path.child("supplementalGroupsPolicy");
    one_of(&path_of_policy, policy, &["Merge", "Strict"], errors);
    seccomp(context.seccomp_profile.as_ref(), &path, errors);
    app_armor(context.app_armor_profile.as_ref(), &path, errors);
    let sysctls = context.sysctls.as_deref().unwrap_or_default();
    self::sysctls(sysctls, &path.child("sysctls"), errors);
}

/// `securityContext` of a container.
pub(super) fn container(one: &Container, path: &Path, errors: &mut Vec<FieldError>) {
    let Some(context) = &one.security_context else {
        return;
    };
    let path = path.child("securityContext");
    not_negative(&path.child("runAsUser"), context.run_as_user, errors);
    not_negative(&path.child("runAsGroup"), context.run_as_group, errors);
    let kinds = ["Default", "Unmasked"];
    let proc_mount = context.proc_mount.as_deref();
    one_of(&path.child("procMount"), proc_mount, &kinds, errors);
    seccomp(context.seccomp_profile.as_ref(), &path, errors);
    app_armor(context.app_armor_profile.as_ref(), &path, errors);
    let sys_admin = context
        .capabilities
        .iter()
        .flat_map(|c| c.add.iter().flatten())
        .any(|c| matches!(c.as_str(), "SYS_ADMIN" | "CAP_SYS_ADMIN"));
    let privileged = context.privileged == Some(true);
    if context.allow_privilege_escalation == Some(false) && (privileged || sys_admin) {
        let detail = if privileged {
            "cannot set `allowPrivilegeEscalation` to false and `privileged` to true"
        } else {
            "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN"
        };
        errors.push(FieldError::invalid(&path, "", detail));
    }
}

fn seccomp(profile: Option<&SeccompProfile>, path: &Path, errors: &mut Vec<FieldError>) {
    let Some(profile) = profile else { return };
    let path = path.child("seccompProfile");
    let name = profile.localhost_profile.as_deref();
    if !named(&profile.type_, name, &path, errors) {
        return;
    }
    let name = name.unwrap_or_default();
    let descends = FilePath::new(name)
        .components()
        .all(|c| matches!(c, Component::Normal(_)));
    if !descends {
        let detail = "must be a relative path and must not contain '..'";
        errors.push(FieldError::invalid(
            &path.child("localhostProfile"),
            name,
            detail,
        ));
    }
}

fn app_armor(profile: Option<&AppArmorProfile>, path: &Path, errors: &mut Vec<FieldError>) {
    let Some(profile) = profile else { return };
    let path = path.child("appArmorProfile");
    let name = profile.localhost_profile.as_deref();
    if !named(&profile.type_, name, &path, errors) {
        return;
    }
    let name = name.unwrap_or_default();
    if name.trim() != name {
        let detail = "must not be padded with whitespace";
        errors.push(FieldError::invalid(
            &path.child("localhostProfile"),
            name,
            detail,
        ));
    }
}

/// Type and name fit together; true when the name is to be looked at.
fn named(kind: &str, name: Option<&str>, path: &Path, errors: &mut Vec<FieldError>) -> bool {
    let field = path.child("localhostProfile");
    if kind.is_empty() {
        errors.push(FieldError::required(
            &path.child("type"),
            "type is required",
        ));
        return false;
    }
    one_of(&path.child("type"), Some(kind), PROFILE_TYPES, errors);
    match (kind, name.filter(|n| !n.is_empty())) {
        ("Localhost", None) => {
            let detail = "must be set when `type` is Localhost";
            errors.push(FieldError::required(&field, detail));
            false
        }
        ("Localhost", Some(name)) if name.len() > PROFILE_BYTES_MAX => {
            errors.push(FieldError::too_long(&field, PROFILE_BYTES_MAX));
            false
        }
        ("Localhost", Some(_)) => true,
        (_, Some(name)) => {
            let detail = "can only be set when `type` is Localhost";
            errors.push(FieldError::invalid(&field, name, detail));
            false
        }
        (_, None) => false,
    }
}

/// Which sysctls are safe is each node's own decision.
fn sysctls(sysctls: &[Sysctl], path: &Path, errors: &mut Vec<FieldError>) {
    let mut seen = BTreeSet::new();
    for (i, sysctl) in sysctls.iter().enumerate() {
        let path = path.index(i).child("name");
        let name = sysctl.name.as_str();
        let alphanumeric =
            |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let segment = |s: &str| {
            alphanumeric(s.bytes().next())
                && alphanumeric(s.bytes().last())
                && s.bytes()
                    .all(|b| alphanumeric(Some(b)) || matches!(b, b'-' | b'_'))
        };
        if name.is_empty() {
            errors.push(FieldError::required(&path, ""));
        } else if name.len() > SYSCTL_BYTES_MAX || !name.split(['.', '/']).all(segment) {
            let detail = "must be segments of a-z, 0-9, '-' and '_' with '.' or '/' between them";
            errors.push(FieldError::invalid(&path, name, detail));
        } else if !seen.insert(name.replace('/', ".")) {
            errors.push(FieldError::duplicate(&path, name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn fields(pod_context: Value, own: Value, more: Value) -> Vec<String> {
        let mut spec = json!({
            "securityContext": pod_context,
            "containers": [{ "name": "c", "securityContext": own }],
        });
        for (key, value) in more.as_object().unwrap() {
            spec[key] = value.clone();
        }
        let spec: PodSpec = serde_json::from_value(spec).unwrap();
        let path = Path::new("spec");
        let mut errors = Vec::new();
        pod(&spec, &path, &mut errors);
        container(
            &spec.containers[0],
            &path.child("containers").index(0),
            &mut errors,
        );
        errors.iter().map(|e| e.field.clone()).collect()
    }

    #[test]
    fn profiles_need_a_name_exactly_when_they_are_the_node_s() {
        let pods = |context: Value| fields(context, json!({}), json!({}));
        let local = |field: &str, name: &str| json!({field: {"type": "Localhost", "localhostProfile": name}});
        assert!(pods(local("seccompProfile", "profiles/audit.json")).is_empty());
        assert!(pods(local("appArmorProfile", "my-profile")).is_empty());
        for (context, field) in [
            (
                local("seccompProfile", "../x"),
                "seccompProfile.localhostProfile",
            ),
            (
                local("seccompProfile", "/x"),
                "seccompProfile.localhostProfile",
            ),
            (
                local("seccompProfile", ""),
                "seccompProfile.localhostProfile",
            ),
            (
                local("appArmorProfile", " x"),
                "appArmorProfile.localhostProfile",
            ),
            (
                json!({"seccompProfile": {"type": "Best"}}),
                "seccompProfile.type",
            ),
            (
                json!({"appArmorProfile": {"type": "Unconfined", "localhostProfile": "x"}}),
                "appArmorProfile.localhostProfile",
            ),
            (
                json!({"supplementalGroupsPolicy": "All"}),
                "supplementalGroupsPolicy",
            ),
            (json!({"supplementalGroups": [-1]}), "supplementalGroups[0]"),
        ] {
            assert_eq!(pods(context), [format!("spec.securityContext.{field}")]);
        }
    }

    #[test]
    fn sysctl_names_and_host_namespaces_are_checked() {
        let names = |names: &[&str]| {
            let sysctls: Vec<Value> = names
                .iter()
                .map(|n| json!({"name": n, "value": "1"}))
                .collect();
            fields(json!({ "sysctls": sysctls }), json!({}), json!({}))
        };
        assert!(names(&["net.ipv4.tcp_syncookies", "kernel/shm_rmid_forced"]).is_empty());
        assert_eq!(names(&["a.b", "a/b"]).len(), 1);
        for bad in ["", "a..b", "A.b", "-a.b", "../x"] {
            assert_eq!(names(&[bad]).len(), 1, "{bad}");
        }
        let both = json!({"hostUsers": false, "hostPID": true, "hostNetwork": true});
        let found = fields(json!({}), json!({"procMount": "All"}), both);
        let want = [
            "spec.hostNetwork",
            "spec.hostPID",
            "spec.containers[0].securityContext.procMount",
        ];
        assert_eq!(found, want);
    }
}
