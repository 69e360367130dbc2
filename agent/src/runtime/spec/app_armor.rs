//! AppArmor: which profile a container runs under, and whether this node can enforce it.
//!
//! ```text
//! appArmorProfile, else the old annotation ─► Wanted ─┐
//! /sys/module/apparmor, /sys/kernel/security ─► Node ─┴─► decide (pure) ─► process.apparmorProfile, or refused in kubelet's words
//! ```
//! The profile is set at execve, for init and for every exec (libcontainer writes
//! `attr/apparmor/exec`). Profiles are the machine's: an operator loads them with apparmor_parser.
//! Without a wish a container gets `gantry-default` where that is loaded.
//!
//! Source: kubelet `pkg/security/apparmor`, containerd `apparmor_default`.

use std::collections::BTreeSet;
use std::fs;

use gantry_api::k8s_openapi::api::core::v1::{AppArmorProfile, Container, Pod};

use super::SpecError;

/// What `RuntimeDefault` means.
pub const DEFAULT_PROFILE: &str = "gantry-default";
/// Of the time before the field; one per container.
const ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";

/// What a manifest asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// Nothing: the node's default where there is one.
    Unset,
    /// The node's default, and nothing less.
    RuntimeDefault,
    /// None.
    Unconfined,
    /// A profile of the node.
    Localhost(String),
}

/// What this node can enforce.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Node {
    /// The kernel has no AppArmor, or it is off.
    Off,
    /// Loaded profiles by name.
    Loaded(BTreeSet<String>),
    /// It is on and its profiles cannot be listed; why.
    Unknown(String),
}

impl Node {
    /// Looks at `/sys`.
    pub fn look() -> Self {
        if !fs::read_to_string(ENABLED).is_ok_and(|text| text.trim() == "Y") {
            return Self::Off;
        }
        match fs::read_to_string(PROFILES) {
            Ok(text) => Self::Loaded(parse_profiles(&text)),
            Err(error) => Self::Unknown(format!(
                "cannot read {PROFILES}: {error}; is securityfs mounted on /sys/kernel/security?"
            )),
        }
    }
}

/// Lines of `name (mode)`.
fn parse_profiles(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter_map(|line| line.rsplit_once(" ("))
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// The container's own field, the pod's, the annotation: the first that is there.
pub fn wanted(pod: &Pod, container: &Container) -> Wanted {
    let own = container
        .security_context
        .as_ref()
        .and_then(|c| c.app_armor_profile.as_ref());
    let pods = || {
        let context = pod.spec.as_ref()?.security_context.as_ref()?;
        context.app_armor_profile.as_ref()
    };
    if let Some(profile) = own.or_else(pods) {
        return of_field(profile);
    }
    let key = format!("{ANNOTATION}{}", container.name);
    let annotation = pod.metadata.annotations.as_ref().and_then(|a| a.get(&key));
    match annotation.map(String::as_str) {
        None | Some("") => Wanted::Unset,
        Some("runtime/default") => Wanted::RuntimeDefault,
        Some("unconfined") => Wanted::Unconfined,
        Some(other) => {
            Wanted::Localhost(other.strip_prefix("localhost/").unwrap_or(other).to_owned())
        }
    }
}

fn of_field(profile: &AppArmorProfile) -> Wanted {
    match profile.type_.as_str() {
        "RuntimeDefault" => Wanted::RuntimeDefault,
        "Unconfined" => Wanted::Unconfined,
        _ => Wanted::Localhost(profile.localhost_profile.clone().unwrap_or_default()),
    }
}

/// The profile to run under; none: as the agent itself, which is unconfined.
///
/// # Errors
/// [`SpecError::Refused`] when the node cannot enforce what is asked for.
pub fn decide(wanted: &Wanted, privileged: bool, node: &Node) -> Result<Option<String>, SpecError> {
    let refused = |why: String| {
        Err(SpecError::Refused(format!(
            "Cannot enforce AppArmor: {why}"
        )))
    };
    let (name, explicit) = match wanted {
        Wanted::Unconfined => return Ok(None),
        Wanted::Unset if privileged => return Ok(None),
        Wanted::Unset => (DEFAULT_PROFILE, false),
        Wanted::RuntimeDefault => (DEFAULT_PROFILE, true),
        Wanted::Localhost(name) => (name.as_str(), true),
    };
    match node {
        Node::Loaded(profiles) if profiles.contains(name) => Ok(Some(name.to_owned())),
        _ if !explicit => Ok(None),
        Node::Off => refused("AppArmor is not enabled on the host".to_owned()),
        Node::Unknown(why) => refused(why.clone()),
        Node::Loaded(_) => refused(format!(
            "profile {name:?} is not loaded on this node: load it with apparmor_parser -r FILE"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(value: serde_json::Value) -> Pod {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_nearest_wish_counts_and_the_annotation_last() {
        let of = |own: serde_json::Value, pods: serde_json::Value, annotation: &str| {
            let pod = pod(json!({
                "metadata": { "annotations": { format!("{ANNOTATION}c"): annotation } },
                "spec": {
                    "securityContext": pods,
                    "containers": [{ "name": "c", "securityContext": own }],
                },
            }));
            wanted(&pod, &pod.spec.as_ref().unwrap().containers[0])
        };
        let local = json!({"appArmorProfile": {"type": "Localhost", "localhostProfile": "p"}});
        let off = json!({"appArmorProfile": {"type": "Unconfined"}});
        assert_eq!(
            of(local.clone(), off.clone(), "x"),
            Wanted::Localhost("p".into())
        );
        assert_eq!(of(json!({}), off, "localhost/q"), Wanted::Unconfined);
        assert_eq!(
            of(json!({}), json!({}), "localhost/q"),
            Wanted::Localhost("q".into())
        );
        assert_eq!(
            of(json!({}), json!({}), "runtime/default"),
            Wanted::RuntimeDefault
        );
        assert_eq!(of(json!({}), json!({}), ""), Wanted::Unset);
    }

    #[test]
    fn what_cannot_be_enforced_is_refused() {
        let loaded = Node::Loaded(parse_profiles(
            "/usr/bin/man (enforce)\nmy prof (complain)\n",
        ));
        let local = |name: &str| Wanted::Localhost(name.into());
        let profile = decide(&local("my prof"), false, &loaded).unwrap();
        assert_eq!(profile.as_deref(), Some("my prof"));
        for (wanted, node, word) in [
            (local("nope"), &loaded, "not loaded"),
            (local("my prof"), &Node::Off, "not enabled on the host"),
            (Wanted::RuntimeDefault, &Node::Off, "not enabled"),
            (Wanted::RuntimeDefault, &loaded, DEFAULT_PROFILE),
            (
                local("p"),
                &Node::Unknown("no securityfs".into()),
                "securityfs",
            ),
        ] {
            let error = decide(&wanted, false, node).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        for node in [&loaded, &Node::Off] {
            for wanted in [Wanted::Unset, Wanted::Unconfined] {
                assert_eq!(decide(&wanted, false, node).unwrap(), None);
            }
        }
        let default = Node::Loaded(BTreeSet::from([DEFAULT_PROFILE.to_owned()]));
        assert!(decide(&Wanted::Unset, false, &default).unwrap().is_some());
        assert!(decide(&Wanted::Unset, true, &default).unwrap().is_none());
    }
}
