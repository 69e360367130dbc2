//! One CSI driver: what it is asked, over its socket. Every call is bounded in time, and none is
//! ever printed: requests hold Secrets.

use std::path::Path;
use std::time::Duration;

use tonic::Code;
use tonic::transport::Channel;

use super::wire::controller_client::ControllerClient;
use super::wire::controller_service_capability::{Type as ControllerType, rpc};
use super::wire::node_client::NodeClient;
use super::wire::node_service_capability::{Type as NodeType, rpc as node_rpc};
use super::wire::{
    ControllerGetCapabilitiesRequest, NodeGetCapabilitiesRequest, NodeGetInfoRequest,
    NodePublishVolumeRequest, NodeStageVolumeRequest, NodeUnpublishVolumeRequest,
    NodeUnstageVolumeRequest,
};
use crate::plugin_socket::{connect, in_time, words};

/// What a driver can do on a node, as far as it matters here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Capabilities {
    /// STAGE_UNSTAGE_VOLUME
    pub(crate) stages: bool,
    /// SINGLE_NODE_MULTI_WRITER: it knows access modes of one node apart.
    pub(crate) single_node_modes: bool,
    /// VOLUME_MOUNT_GROUP: it gives the files to the pod's fsGroup itself.
    pub(crate) mount_group: bool,
}

/// A connection to a driver.
pub(super) struct Driver {
    patience: Duration,
    channel: Channel,
}

impl Driver {
    pub(super) async fn connect(socket: &Path, patience: Duration) -> Result<Self, String> {
        let channel = connect(socket).await?;
        Ok(Self { patience, channel })
    }

    fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    /// Whether it is there and knows its node.
    pub(super) async fn info(&self) -> Result<(), String> {
        let mut node = self.node();
        let answer = in_time(self.patience, node.node_get_info(NodeGetInfoRequest {})).await;
        answer.map_err(|status| format!("NodeGetInfo: {}", words(&status)))?;
        Ok(())
    }

    pub(super) async fn capabilities(&self) -> Result<Capabilities, String> {
        let mut node = self.node();
        let request = NodeGetCapabilitiesRequest {};
        let answer = in_time(self.patience, node.node_get_capabilities(request)).await;
        let answer = answer.map_err(|s| format!("NodeGetCapabilities: {}", words(&s)))?;
        let all = answer.capabilities.into_iter();
        let all: Vec<i32> = all
            .filter_map(|one| one.r#type.map(|NodeType::Rpc(rpc)| rpc.r#type))
            .collect();
        let has = |wanted: node_rpc::Type| all.contains(&i32::from(wanted));
        Ok(Capabilities {
            stages: has(node_rpc::Type::StageUnstageVolume),
            single_node_modes: has(node_rpc::Type::SingleNodeMultiWriter),
            mount_group: has(node_rpc::Type::VolumeMountGroup),
        })
    }

    /// Whether volumes have to be attached first, as far as the node's socket tells: a driver whose
    /// controller runs elsewhere does not implement the question here.
    pub(super) async fn attaches(&self) -> Result<bool, String> {
        let mut controller = ControllerClient::new(self.channel.clone());
        let request = ControllerGetCapabilitiesRequest {};
        let asked = controller.controller_get_capabilities(request);
        let answer = match in_time(self.patience, asked).await {
            Err(status) if status.code() == Code::Unimplemented => return Ok(false),
            answer => answer.map_err(|s| format!("ControllerGetCapabilities: {}", words(&s)))?,
        };
        let attach = i32::from(rpc::Type::PublishUnpublishVolume);
        let mut all = answer.capabilities.into_iter();
        Ok(all.any(|one| {
            one.r#type
                .is_some_and(|ControllerType::Rpc(rpc)| rpc.r#type == attach)
        }))
    }

    pub(super) async fn stage(&self, request: NodeStageVolumeRequest) -> Result<(), String> {
        let mut node = self.node();
        let answer = in_time(self.patience, node.node_stage_volume(request)).await;
        answer.map_err(|status| format!("NodeStageVolume: {}", words(&status)))?;
        Ok(())
    }

    pub(super) async fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), String> {
        let mut node = self.node();
        let answer = in_time(self.patience, node.node_publish_volume(request)).await;
        answer.map_err(|status| format!("NodePublishVolume: {}", words(&status)))?;
        Ok(())
    }

    /// A volume that the driver does not know (any more) is not published.
    pub(super) async fn unpublish(&self, volume_id: &str, target: &str) -> Result<(), String> {
        let mut node = self.node();
        let request = NodeUnpublishVolumeRequest {
            volume_id: volume_id.into(),
            target_path: target.into(),
        };
        match in_time(self.patience, node.node_unpublish_volume(request)).await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(format!("NodeUnpublishVolume: {}", words(&status))),
            Ok(_) => Ok(()),
        }
    }

    /// The same for what was staged.
    pub(super) async fn unstage(&self, volume_id: &str, staging: &str) -> Result<(), String> {
        let mut node = self.node();
        let request = NodeUnstageVolumeRequest {
            volume_id: volume_id.into(),
            staging_target_path: staging.into(),
        };
        match in_time(self.patience, node.node_unstage_volume(request)).await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(format!("NodeUnstageVolume: {}", words(&status))),
            Ok(_) => Ok(()),
        }
    }
}
