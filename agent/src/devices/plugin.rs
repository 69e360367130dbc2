//! One device plugin: what it is asked, over its socket.
//!
//! Everything it answers is bounded in size and time; nothing it says is trusted further than the
//! fields that are used.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::Channel;

use super::cdi;
use super::plan::{Choice, DEVICE_COUNT_MAX, Grant, Mount, Node};
use super::wire::device_plugin_client::DevicePluginClient;
use super::wire::{
    AllocateRequest, ContainerAllocateRequest, ContainerAllocateResponse,
    ContainerPreferredAllocationRequest, DevicePluginOptions, ListAndWatchResponse,
    PreStartContainerRequest, PreferredAllocationRequest,
};
use crate::plugin_socket::{connect, words};

/// The largest answer.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// A plugin has this long for one answer (the kubelet's pre-start limit).
const PATIENCE: Duration = Duration::from_secs(30);

/// A registered plugin.
#[derive(Clone, Debug)]
pub(super) struct Plugin {
    pub(super) socket: PathBuf,
    pub(super) options: DevicePluginOptions,
    client: DevicePluginClient<Channel>,
}

impl Plugin {
    pub(super) async fn connect(
        socket: &Path,
        options: DevicePluginOptions,
    ) -> Result<Self, String> {
        let channel = connect(socket).await?;
        Ok(Self {
            socket: socket.to_owned(),
            options,
            client: DevicePluginClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX),
        })
    }

    /// Its devices, again whenever they change.
    pub(super) async fn watch(&self) -> Result<tonic::Streaming<ListAndWatchResponse>, String> {
        let mut client = self.client.clone();
        let stream = client.list_and_watch(super::wire::Empty {}).await;
        Ok(stream.map_err(|status| words(&status))?.into_inner())
    }

    /// Which of the available devices it would take.
    pub(super) async fn preferred(&self, choice: &Choice) -> Result<Vec<String>, String> {
        if !self.options.get_preferred_allocation_available {
            return Ok(Vec::new());
        }
        let request = PreferredAllocationRequest {
            container_requests: vec![ContainerPreferredAllocationRequest {
                available_device_ids: choice.available.iter().cloned().collect(),
                must_include_device_ids: choice.must_include.iter().cloned().collect(),
                allocation_size: i32::try_from(choice.count).unwrap_or(i32::MAX),
            }],
        };
        let mut client = self.client.clone();
        let answer = in_time(client.get_preferred_allocation(request)).await?;
        let first = answer.container_responses.into_iter().next();
        Ok(first.map(|one| one.device_ids).unwrap_or_default())
    }

    /// What a container with these devices needs.
    pub(super) async fn allocate(
        &self,
        ids: impl IntoIterator<Item = String>,
        cdi_directories: &[PathBuf],
    ) -> Result<Grant, String> {
        let request = AllocateRequest {
            container_requests: vec![ContainerAllocateRequest {
                devices_ids: ids.into_iter().collect(),
            }],
        };
        let mut client = self.client.clone();
        let answer = in_time(client.allocate(request)).await?;
        let Some(answer) = answer.container_responses.into_iter().next() else {
            return Err("answers Allocate without a container".into());
        };
        grant(answer, cdi_directories)
    }

    /// The container is about to start.
    pub(super) async fn pre_start(&self, ids: Vec<String>) -> Result<(), String> {
        if !self.options.pre_start_required {
            return Ok(());
        }
        let mut client = self.client.clone();
        let request = PreStartContainerRequest { devices_ids: ids };
        in_time(client.pre_start_container(request)).await?;
        Ok(())
    }
}

async fn in_time<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, String> {
    let answer = crate::plugin_socket::in_time(PATIENCE, call).await;
    answer.map_err(|status| words(&status))
}

/// The devices of an answer; the first ones, and whether each is healthy.
pub(super) fn devices(answer: &ListAndWatchResponse) -> BTreeMap<String, bool> {
    let devices = answer.devices.iter().take(DEVICE_COUNT_MAX);
    devices
        .filter(|device| !device.id.is_empty())
        .map(|device| (device.id.clone(), device.health == "Healthy"))
        .collect()
}

/// An answer in our words, with what its CDI devices stand for.
fn grant(answer: ContainerAllocateResponse, cdi_directories: &[PathBuf]) -> Result<Grant, String> {
    let names: Vec<String> = answer.cdi_devices.into_iter().map(|d| d.name).collect();
    let mut grant = Grant {
        env: answer.envs.into_iter().collect(),
        mounts: answer
            .mounts
            .into_iter()
            .map(|mount| Mount {
                host_path: mount.host_path,
                container_path: mount.container_path,
                read_only: mount.read_only,
            })
            .collect(),
        nodes: answer
            .devices
            .into_iter()
            .map(|device| Node {
                host_path: device.host_path,
                container_path: device.container_path,
                permissions: device.permissions,
            })
            .collect(),
        ..Grant::default()
    };
    if !names.is_empty() {
        grant.add(cdi::resolve(&names, cdi_directories)?);
    }
    check(&grant)?;
    Ok(grant)
}

/// What a plugin may not say.
fn check(grant: &Grant) -> Result<(), String> {
    let is_plain = |path: &str| {
        path.starts_with('/') && !path.split('/').any(|part| part == "..") && !path.contains('\0')
    };
    let mounts = grant.mounts.iter();
    let mounts = mounts.flat_map(|mount| [&mount.host_path, &mount.container_path]);
    let nodes = grant.nodes.iter();
    let nodes = nodes.flat_map(|node| [&node.host_path, &node.container_path]);
    if let Some(path) = mounts.chain(nodes).find(|path| !is_plain(path)) {
        return Err(format!(
            "names the path {path:?}, which is not absolute and plain"
        ));
    }
    let permissions = |node: &Node| {
        !node.permissions.is_empty() && node.permissions.chars().all(|c| "rwm".contains(c))
    };
    if let Some(node) = grant.nodes.iter().find(|node| !permissions(node)) {
        let (path, said) = (&node.host_path, &node.permissions);
        return Err(format!(
            "gives {path} the permissions {said:?}: want some of rwm"
        ));
    }
    let is_name = |name: &String| !name.is_empty() && !name.contains(['=', '\0']);
    if let Some(name) = grant.env.keys().find(|name| !is_name(name)) {
        return Err(format!("names the variable {name:?}, which cannot be one"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugins_answer_is_not_believed_blindly() {
        let node = |host: &str, permissions: &str| Grant {
            nodes: vec![Node {
                host_path: host.into(),
                container_path: "/dev/x".into(),
                permissions: permissions.into(),
            }],
            ..Grant::default()
        };
        assert!(check(&node("/dev/x", "rw")).is_ok());
        assert!(check(&node("dev/x", "rw")).is_err());
        assert!(check(&node("/dev/../etc", "rw")).is_err());
        assert!(check(&node("/dev/x", "rwx")).is_err());
        assert!(check(&node("/dev/x", "")).is_err());
        let env = BTreeMap::from([("A=B".to_owned(), String::new())]);
        let env = Grant {
            env,
            ..Grant::default()
        };
        assert!(check(&env).is_err());
    }
}
