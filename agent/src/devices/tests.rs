//! A plugin of our own on real sockets: registration, devices, allocation, restart.

use std::pin::Pin;
use std::time::Duration;

use futures_util::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::wire::device_plugin_server::{DevicePlugin, DevicePluginServer};
use super::wire::registration_client::RegistrationClient;
use super::wire::{
    AllocateRequest, AllocateResponse, ContainerAllocateResponse,
    ContainerPreferredAllocationResponse, Device, DeviceSpec, ListAndWatchResponse,
    PreStartContainerRequest, PreStartContainerResponse, PreferredAllocationRequest,
    PreferredAllocationResponse,
};
use super::*;

const RESOURCE: &str = "example.com/thing";

/// Offers what it is told to; prefers the last device.
struct Example {
    devices: watch::Receiver<Vec<(&'static str, &'static str)>>,
    started: mpsc::UnboundedSender<Vec<String>>,
}

#[tonic::async_trait]
impl DevicePlugin for Example {
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
        let (sender, receiver) = mpsc::channel(4);
        let mut devices = self.devices.clone();
        tokio::spawn(async move {
            loop {
                let now = devices.borrow_and_update().clone();
                let devices_now = now.into_iter().map(|(id, health)| Device {
                    id: id.into(),
                    health: health.into(),
                    topology: None,
                });
                let answer = ListAndWatchResponse {
                    devices: devices_now.collect(),
                };
                if sender.send(Ok(answer)).await.is_err() || devices.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<PreferredAllocationRequest>,
    ) -> Result<Response<PreferredAllocationResponse>, Status> {
        let asked = request.into_inner().container_requests.remove(0);
        let last = asked.available_device_ids.last().cloned();
        let container_responses = vec![ContainerPreferredAllocationResponse {
            device_ids: last.into_iter().collect(),
        }];
        Ok(Response::new(PreferredAllocationResponse {
            container_responses,
        }))
    }

    async fn allocate(
        &self,
        request: Request<AllocateRequest>,
    ) -> Result<Response<AllocateResponse>, Status> {
        let ids = request
            .into_inner()
            .container_requests
            .remove(0)
            .devices_ids;
        let answer = ContainerAllocateResponse {
            envs: [("THINGS".to_owned(), ids.join(","))].into(),
            devices: vec![DeviceSpec {
                container_path: "/dev/thing".into(),
                host_path: "/dev/null".into(),
                permissions: "rw".into(),
            }],
            ..Default::default()
        };
        Ok(Response::new(AllocateResponse {
            container_responses: vec![answer],
        }))
    }

    async fn pre_start_container(
        &self,
        request: Request<PreStartContainerRequest>,
    ) -> Result<Response<PreStartContainerResponse>, Status> {
        let _ = self.started.send(request.into_inner().devices_ids);
        Ok(Response::new(PreStartContainerResponse {}))
    }
}

fn paths(directory: &Path) -> Paths {
    let mut paths = Paths::standard("/nowhere".into());
    paths.lib = directory.to_owned();
    paths
}

async fn until(plugins: &DevicePlugins, wanted: (usize, usize)) {
    let mut amounts = plugins.amounts();
    let came = amounts.wait_for(|amounts| amounts.get(RESOURCE) == Some(&wanted));
    tokio::time::timeout(Duration::from_secs(20), came)
        .await
        .unwrap_or_else(|_| panic!("no {wanted:?} devices came"))
        .unwrap();
}

fn asker(pod: &str) -> Asker<'_> {
    Asker {
        pod,
        container: "c",
        is_init: false,
    }
}

#[tokio::test]
async fn a_plugin_registers_allocates_and_is_found_again_by_the_next_agent() {
    let directory = tempfile::tempdir().unwrap();
    let (lib, sockets) = (
        directory.path().join("lib"),
        directory.path().join("sockets"),
    );
    std::fs::create_dir_all(&lib).unwrap();
    let stop = CancellationToken::new();
    let plugins = DevicePlugins::open(&sockets, &paths(&lib), stop.clone());
    let serving = tokio::spawn(plugins.clone().serve());
    let socket = sockets.join(SOCKET);
    while !socket.exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    let (offer, devices) = watch::channel(vec![("a", "Healthy"), ("b", "Healthy")]);
    let (started, mut starts) = mpsc::unbounded_channel();
    let listener = UnixListener::bind(sockets.join("example.sock")).unwrap();
    let served = tonic::transport::Server::builder()
        .add_service(DevicePluginServer::new(Example { devices, started }))
        .serve_with_incoming(UnixListenerStream::new(listener));
    let plugin = tokio::spawn(served);
    let mut register = RegistrationClient::connect(format!("unix://{}", socket.display()))
        .await
        .unwrap();
    let mut request = RegisterRequest {
        version: VERSION.into(),
        endpoint: "example.sock".into(),
        resource_name: RESOURCE.into(),
        options: Some(DevicePluginOptions {
            pre_start_required: true,
            get_preferred_allocation_available: true,
        }),
    };
    for (version, resource, endpoint) in [
        ("v1alpha", RESOURCE, "example.sock"),
        (VERSION, "cpu", "example.sock"),
        (VERSION, RESOURCE, "../x"),
    ] {
        let bad = RegisterRequest {
            version: version.into(),
            resource_name: resource.into(),
            endpoint: endpoint.into(),
            options: None,
        };
        assert!(
            register.register(bad).await.is_err(),
            "{version} {resource}"
        );
    }
    register.register(request.clone()).await.unwrap();
    until(&plugins, (2, 2)).await;

    let wanted = [(RESOURCE.to_owned(), 1)];
    let everyone = |_: &str| true;
    let first = plugins
        .allocate(asker("p"), &wanted, everyone)
        .await
        .unwrap();
    assert_eq!(first.env["THINGS"], "b"); // the plugin's preference
    assert_eq!(first.nodes[0].container_path, "/dev/thing");
    assert_eq!(starts.recv().await.unwrap(), ["b"]);
    offer.send_replace(vec![("a", "Unhealthy"), ("b", "Healthy")]);
    until(&plugins, (2, 1)).await;
    let none = plugins.allocate(asker("q"), &wanted, everyone).await;
    assert!(none.unwrap_err().contains("0 free and healthy of 2"));

    // The next agent: what is held is known, and the plugin is dialled without having to register.
    stop.cancel();
    serving.await.unwrap();
    let stop = CancellationToken::new();
    let plugins = DevicePlugins::open(&sockets, &paths(&lib), stop.clone());
    assert_eq!(plugins.amounts().borrow()[RESOURCE], (2, 0));
    let serving = tokio::spawn(plugins.clone().serve());
    offer.send_replace(vec![("a", "Healthy"), ("b", "Healthy")]);
    until(&plugins, (2, 2)).await;
    let again = plugins
        .allocate(asker("p"), &wanted, everyone)
        .await
        .unwrap();
    assert_eq!(again, first);
    let other = plugins
        .allocate(asker("q"), &wanted, everyone)
        .await
        .unwrap();
    assert_eq!(other.env["THINGS"], "a");
    // A pod that is gone leaves its device to others.
    let third = plugins
        .allocate(asker("r"), &wanted, |pod| pod != "q")
        .await;
    assert_eq!(third.unwrap().env["THINGS"], "a");

    // Registered again, as after the plugin's own restart; then it ends.
    request.options = None;
    let mut register = loop {
        let uri = format!("unix://{}", socket.display());
        if let Ok(client) = RegistrationClient::connect(uri).await {
            break client;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    register.register(request).await.unwrap();
    plugin.abort();
    drop(offer);
    until(&plugins, (2, 0)).await;
    stop.cancel();
    serving.await.unwrap();
}
