//! A pod's containers of all roles, by name. Pure.

use std::borrow::Cow;

use gantry_api::k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod};

use super::state::Role;

/// Names and roles: init containers and sidecars in order, then the main ones, then the ephemeral.
pub fn roles(pod: &Pod) -> Vec<(String, Role)> {
    let Some(spec) = &pod.spec else {
        return Vec::new();
    };
    let init = |c: &Container| match c.restart_policy.as_deref() {
        Some("Always") => (c.name.clone(), Role::Sidecar),
        _ => (c.name.clone(), Role::Init),
    };
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    (spec.init_containers.iter().flatten().map(init))
        .chain(spec.containers.iter().map(|c| (c.name.clone(), Role::Main)))
        .chain(ephemeral.map(|c| (c.name.clone(), Role::Ephemeral)))
        .collect()
}

/// The configuration of a container of any role.
pub fn find<'a>(pod: &'a Pod, name: &str) -> Option<Cow<'a, Container>> {
    let spec = pod.spec.as_ref()?;
    let mut usual = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers);
    if let Some(found) = usual.find(|c| c.name == name) {
        return Some(Cow::Borrowed(found));
    }
    let mut ephemeral = spec.ephemeral_containers.iter().flatten();
    ephemeral
        .find(|c| c.name == name)
        .map(|c| Cow::Owned(as_container(c)))
}

/// An ephemeral container is a container with fewer rights and one field more.
pub fn as_container(ephemeral: &EphemeralContainer) -> Container {
    let one = ephemeral.clone();
    Container {
        args: one.args,
        command: one.command,
        env: one.env,
        env_from: one.env_from,
        image: one.image,
        image_pull_policy: one.image_pull_policy,
        name: one.name,
        resources: one.resources,
        security_context: one.security_context,
        stdin: one.stdin,
        stdin_once: one.stdin_once,
        termination_message_path: one.termination_message_path,
        termination_message_policy: one.termination_message_policy,
        tty: one.tty,
        volume_devices: one.volume_devices,
        volume_mounts: one.volume_mounts,
        working_dir: one.working_dir,
        ..Container::default()
    }
}

/// The container whose processes this one sees.
pub fn target<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    let ephemeral = pod.spec.as_ref()?.ephemeral_containers.as_ref()?;
    let one = ephemeral.iter().find(|c| c.name == name)?;
    one.target_container_name
        .as_deref()
        .filter(|n| !n.is_empty())
}
