//! A small device plugin: two devices with the numbers of `/dev/fuse`, one of them through CDI.
//!
//! It speaks the kubelet's API as any vendor's plugin does: registers at `kubelet.sock`, registers
//! again when that socket is a new one, tells its devices, and answers Allocate.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use anyhow::Result;
use futures_util::Stream;
use gantry_agent::devices::wire::device_plugin_server::{DevicePlugin, DevicePluginServer};
use gantry_agent::devices::wire::registration_client::RegistrationClient;
use gantry_agent::devices::wire::{
    AllocateRequest, AllocateResponse, CdiDevice, ContainerAllocateResponse, Device,
    DevicePluginOptions, DeviceSpec, Empty, ListAndWatchResponse, PreStartContainerRequest,
    PreStartContainerResponse, PreferredAllocationRequest, PreferredAllocationResponse,
    RegisterRequest,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::plugin_socket::listen;

/// What it offers.
pub const RESOURCE: &str = "example.com/fuse";
/// The name of its socket.
const SOCKET: &str = "example-fuse.sock";
/// The node of both devices on this machine; whoever starts the plugin makes it.
pub const HOST_PATH: &str = "/dev/gantry-example";
/// Where the hook of the CDI device puts the state that it is given.
pub const HOOK_FILE: &str = "/run/gantry-example-hook";
/// The device that comes by its CDI name.
const BY_CDI: &str = "fuse-1";
/// A CDI spec that defines it; its hook runs while the container is made.
pub const CDI_SPEC: &str = r#"{"cdiVersion": "0.6.0", "kind": "example.com/fuse", "devices": [
    {"name": "fuse-1", "containerEdits": {"env": ["BY_CDI=yes"],
     "deviceNodes": [{"path": "/dev/example", "hostPath": "/dev/gantry-example", "permissions": "rw"}],
     "hooks": [{"hookName": "createContainer", "path": "/bin/sh", "env": ["PATH=/bin:/usr/bin"],
                "args": ["sh", "-c", "cat > /run/gantry-example-hook"]}]}}]}"#;

struct Plugin {
    healthy: watch::Receiver<bool>,
}

#[tonic::async_trait]
impl DevicePlugin for Plugin {
    async fn get_device_plugin_options(
        &self,
        _: Request<Empty>,
    ) -> Result<Response<DevicePluginOptions>, Status> {
        Ok(Response::new(DevicePluginOptions::default()))
    }

    type ListAndWatchStream =
        Pin<Box<dyn Stream<Item = Result<ListAndWatchResponse, Status>> + Send>>;

    async fn list_and_watch(
        &self,
        _: Request<Empty>,
    ) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let (sender, receiver) = mpsc::channel(1);
        let mut healthy = self.healthy.clone();
        tokio::spawn(async move {
            loop {
                let is_healthy = *healthy.borrow_and_update();
                let device = |id: &str| Device {
                    id: id.into(),
                    health: if is_healthy { "Healthy" } else { "Unhealthy" }.into(),
                    topology: None,
                };
                let answer = ListAndWatchResponse {
                    devices: vec![device("fuse-0"), device(BY_CDI)],
                };
                if sender.send(Ok(answer)).await.is_err() || healthy.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn get_preferred_allocation(
        &self,
        _: Request<PreferredAllocationRequest>,
    ) -> Result<Response<PreferredAllocationResponse>, Status> {
        Err(Status::unimplemented("no preference"))
    }

    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        let answer = |ids: Vec<String>| {
            let mut answer = ContainerAllocateResponse {
                envs: [("EXAMPLE_DEVICES".to_owned(), ids.join(","))].into(),
                ..Default::default()
            };
            for id in ids {
                if id == BY_CDI {
                    let name = format!("{RESOURCE}={id}");
                    answer.cdi_devices.push(CdiDevice { name });
                } else {
                    answer.devices.push(DeviceSpec {
                        container_path: "/dev/example".into(),
                        host_path: HOST_PATH.into(),
                        permissions: "rw".into(),
                    });
                }
            }
            answer
        };
        let requests = request.into_inner().container_requests;
        let container_responses = requests.into_iter().map(|one| answer(one.devices_ids));
        Ok(Response::new(AllocateResponse {
            container_responses: container_responses.collect(),
        }))
    }

    async fn pre_start_container(
        &self,
        _: Request<PreStartContainerRequest>,
    ) -> Result<Response<PreStartContainerResponse>, Status> {
        Ok(Response::new(PreStartContainerResponse {}))
    }
}

/// Serves until the process, or the runtime, ends.
///
/// * `directory` – `/var/lib/kubelet/device-plugins`
/// * `healthy` – whether the devices are.
///
/// # Errors
/// Its socket cannot be made, or serving fails.
pub async fn serve(directory: &Path, healthy: watch::Receiver<bool>) -> Result<()> {
    let served = tonic::transport::Server::builder()
        .add_service(DevicePluginServer::new(Plugin { healthy }))
        .serve_with_incoming(listen(&directory.join(SOCKET))?);
    let kubelet = directory.join("kubelet.sock");
    let registered = async {
        let mut known = None;
        loop {
            // A new socket is a new kubelet.
            let now = std::fs::metadata(&kubelet)
                .ok()
                .map(|m| (m.ino(), m.ctime_nsec()));
            if now.is_some() && now != known && register(&kubelet).await.is_ok() {
                known = now;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::select! {
        served = served => Ok(served?),
        () = registered => Ok(()),
    }
}

async fn register(kubelet: &Path) -> Result<()> {
    let uri = format!("unix://{}", kubelet.display());
    let mut client = RegistrationClient::connect(uri).await?;
    let request = RegisterRequest {
        version: "v1beta1".into(),
        endpoint: SOCKET.into(),
        resource_name: RESOURCE.into(),
        options: None,
    };
    client.register(request).await?;
    Ok(())
}
