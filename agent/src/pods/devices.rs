//! What device plugins give to a container of a pod: asked for, looked up on this machine, as rules.

use std::path::Path;

use gantry_api::k8s_openapi::api::core::v1::{Container, Pod};
use gantry_api::quantity::Quantity;
use oci_spec::runtime::LinuxDeviceType;

use super::launch::Job;
use super::prepare::Failure;
use super::state::Role;
use super::{configs, status};
use crate::dataplane::DeviceRule;
use crate::devices::plan::{Asker, Grant, is_extended};
use crate::ids::PodUid;
use crate::runtime::spec::{GivenDevices, GivenNode, security};

/// Devices that the container asks for, by resource.
fn wanted(config: &Container) -> Vec<(String, usize)> {
    let limits = config.resources.as_ref().and_then(|r| r.limits.as_ref());
    let limits = limits.into_iter().flatten();
    let extended = limits.filter(|(name, _)| is_extended(name));
    extended
        .filter_map(|(name, amount)| {
            let amount = Quantity::parse(&amount.0).ok()?.units();
            Some((name.clone(), usize::try_from(amount).ok()?))
        })
        .filter(|(_, count)| *count > 0)
        .collect()
}

/// Asks the plugins for what the container wants, or finds what it has already.
pub(super) async fn grant(job: &Job, config: &Container) -> Result<Grant, Failure> {
    let role = configs::roles(&job.pod)
        .into_iter()
        .find(|(name, _)| *name == config.name);
    let asker = Asker {
        pod: job.run.pod.as_str(),
        container: &config.name,
        is_init: role.is_some_and(|(_, role)| role == Role::Init),
    };
    let is_here = |uid: &str| {
        let Ok(uid) = PodUid::new(uid) else {
            return false;
        };
        let has_ended = |pod: &Pod| pod.status.as_ref().is_some_and(status::is_final);
        let known = job.view.pods.get(&uid);
        known.is_some_and(|pod| !has_ended(pod)) || job.node.paths.sandbox(&uid).exists()
    };
    let wanted = wanted(config);
    let granted = job.node.devices.allocate(asker, &wanted, is_here);
    granted
        .await
        .map_err(|words| Failure::new("CreateContainerError", words))
}

/// The nodes as they are on this machine now.
pub(super) fn look_up(grant: &Grant) -> Result<GivenDevices, String> {
    let nodes = grant.nodes.iter().map(|node| {
        let (host, container) = (Path::new(&node.host_path), Path::new(&node.container_path));
        Ok(GivenNode {
            device: security::device_node(host, container)?,
            host_path: host.to_owned(),
            access: node.permissions.clone(),
        })
    });
    Ok(GivenDevices {
        nodes: nodes.collect::<Result<_, String>>()?,
        mounts: grant.mounts.clone(),
        hooks: grant.hooks.clone(),
    })
}

/// The same for the device guard.
pub(super) fn rules(devices: &GivenDevices) -> Vec<DeviceRule> {
    let nodes = devices.nodes.iter();
    nodes
        .map(|node| DeviceRule {
            is_block: node.device.typ() == LinuxDeviceType::B,
            major: u32::try_from(node.device.major()).unwrap_or(0),
            minor: u32::try_from(node.device.minor()).unwrap_or(0),
            read: node.access.contains('r'),
            write: node.access.contains('w'),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::plan::Node;
    use serde_json::json;

    #[test]
    fn devices_are_asked_for_by_limit_and_found_on_this_machine() {
        let config = json!({"name": "c", "resources": {"limits": {
            "cpu": "1", "example.com/a": "2", "example.com/none": "0", "hugepages-2Mi": "2Mi"}}});
        let config: Container = serde_json::from_value(config).unwrap();
        assert_eq!(wanted(&config), [("example.com/a".to_owned(), 2)]);
        let grant = |path: &str| Grant {
            nodes: vec![Node {
                host_path: path.into(),
                container_path: "/dev/thing".into(),
                permissions: "r".into(),
            }],
            ..Grant::default()
        };
        let rules = rules(&look_up(&grant("/dev/null")).unwrap());
        let want = DeviceRule {
            is_block: false,
            major: 1,
            minor: 3,
            read: true,
            write: false,
        };
        assert_eq!(rules, [want]);
        assert!(
            look_up(&grant("/etc/passwd"))
                .unwrap_err()
                .contains("no device node")
        );
    }
}
