//! A small CSI driver: volumes are directories of this machine.
//!
//! It speaks to the node as any vendor's driver and its registrar do: a socket in
//! `plugins_registry` says who it is, another takes the calls. A volume of a pod's own is made when it
//! is published and deleted when it is taken back, with the pod's name in it; one with a handle of its
//! own is staged once and stays. Nothing is kept in memory: a driver that starts anew goes on.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Result;
use gantry_agent::volumes::csi::registration::registration_server::{
    Registration, RegistrationServer,
};
use gantry_agent::volumes::csi::registration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use gantry_agent::volumes::csi::wire::identity_server::{Identity, IdentityServer};
use gantry_agent::volumes::csi::wire::node_server::{Node, NodeServer};
use gantry_agent::volumes::csi::wire::node_service_capability::{Rpc, Type, rpc};
use gantry_agent::volumes::csi::wire::{
    GetPluginInfoRequest, GetPluginInfoResponse, NodeGetCapabilitiesRequest,
    NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse, NodePublishVolumeRequest,
    NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest,
    NodeStageVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse,
    NodeUnstageVolumeRequest, NodeUnstageVolumeResponse,
};
use gantry_agent::volumes::csi::{PLUGIN_TYPE, REGISTRY};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tonic::{Request, Response, Status};

use crate::plugin_socket::listen;

/// Its name.
pub const DRIVER: &str = "directory.csi.example.com";
/// Where it writes the name of the pod that a volume is for.
pub const POD_FILE: &str = "pod";
/// Where it writes that it was given a Secret with the key `word`, and how long that is.
pub const SECRET_FILE: &str = "word-length";

#[derive(Clone)]
struct Driver {
    data: PathBuf,
}

impl Driver {
    /// Volume ids of others must not lead elsewhere.
    fn directory(&self, volume_id: &str) -> Result<PathBuf, Status> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if volume_id.is_empty() || !volume_id.chars().all(plain) {
            return Err(Status::invalid_argument(format!("volume id {volume_id:?}")));
        }
        Ok(self.data.join(volume_id))
    }
}

fn is_mounted(path: &str) -> Result<bool, Status> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mut points = table.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.any(|point| point == path))
}

fn bind(from: &Path, to: &str, read_only: bool) -> Result<(), Status> {
    if is_mounted(to)? {
        return Ok(());
    }
    std::fs::create_dir_all(to)?;
    let none: Option<&str> = None;
    let failed = |errno: nix::Error| Status::internal(format!("mount on {to}: {errno}"));
    mount(Some(from), to, none, MsFlags::MS_BIND, none).map_err(failed)?;
    if read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, to, none, flags, none).map_err(failed)?;
    }
    Ok(())
}

fn unbind(path: &str) -> Result<(), Status> {
    while is_mounted(path)? {
        let failed = |errno: nix::Error| Status::internal(format!("unmount {path}: {errno}"));
        umount2(path, MntFlags::UMOUNT_NOFOLLOW).map_err(failed)?;
    }
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

#[tonic::async_trait]
impl Node for Driver {
    async fn node_stage_volume(
        &self,
        request: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        let directory = self.directory(&request.volume_id)?;
        std::fs::create_dir_all(&directory)?;
        bind(&directory, &request.staging_target_path, false)?;
        Ok(Response::new(NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(
        &self,
        request: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        unbind(&request.into_inner().staging_target_path)?;
        Ok(Response::new(NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let of_pod = |key: &str| {
            let key = format!("csi.storage.k8s.io/{key}");
            request.volume_context.get(&key).cloned()
        };
        let from = if of_pod("ephemeral").as_deref() == Some("true") {
            let directory = self.directory(&request.volume_id)?;
            std::fs::create_dir_all(&directory)?;
            let pod = of_pod("pod.name").unwrap_or_default();
            std::fs::write(directory.join(POD_FILE), pod)?;
            if let Some(word) = request.secrets.get("word") {
                std::fs::write(directory.join(SECRET_FILE), word.len().to_string())?;
            }
            directory
        } else if request.staging_target_path.is_empty() {
            return Err(Status::failed_precondition("the volume is not staged"));
        } else {
            request.staging_target_path.into()
        };
        bind(&from, &request.target_path, request.readonly)?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let directory = self.directory(&request.volume_id)?;
        unbind(&request.target_path)?;
        if directory.join(POD_FILE).exists() {
            std::fs::remove_dir_all(&directory)?;
        }
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let stages = rpc::Type::StageUnstageVolume.into();
        let capabilities = vec![NodeServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: stages })),
        }];
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        let node_id = "this".to_owned();
        Ok(Response::new(NodeGetInfoResponse {
            node_id,
            ..Default::default()
        }))
    }
}

#[tonic::async_trait]
impl Identity for Driver {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER.into(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
        }))
    }
}

/// What stands beside a driver and says who it is.
struct Registrar {
    endpoint: PathBuf,
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: PLUGIN_TYPE.into(),
            name: DRIVER.into(),
            endpoint: self.endpoint.display().to_string(),
            supported_versions: vec!["1.0.0".into()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        if !status.plugin_registered {
            eprintln!("the example CSI driver is not registered: {}", status.error);
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// The driver's own directory: its socket is there.
#[must_use]
pub fn plugin_directory(kubelet: &Path) -> PathBuf {
    kubelet.join("plugins").join(DRIVER)
}

/// The socket at which it is asked who it is.
#[must_use]
pub fn registrar_socket(kubelet: &Path) -> PathBuf {
    kubelet.join(REGISTRY).join(format!("{DRIVER}-reg.sock"))
}

/// Serves until the process, or the runtime, ends.
///
/// * `kubelet` – `/var/lib/kubelet`
/// * `data` – where volumes are.
///
/// # Errors
/// Its sockets cannot be made, or serving fails.
pub async fn serve(kubelet: &Path, data: &Path) -> Result<()> {
    let endpoint = plugin_directory(kubelet).join("csi.sock");
    let driver = Driver {
        data: data.to_owned(),
    };
    let served = tonic::transport::Server::builder()
        .add_service(IdentityServer::new(driver.clone()))
        .add_service(NodeServer::new(driver))
        .serve_with_incoming(listen(&endpoint)?);
    let registrar = RegistrationServer::new(Registrar { endpoint });
    let registered = tonic::transport::Server::builder()
        .add_service(registrar)
        .serve_with_incoming(listen(&registrar_socket(kubelet))?);
    tokio::select! {
        served = served => Ok(served?),
        registered = registered => Ok(registered?),
    }
}
