//! Logs, exec, attach and forwarded ports for users: finds the pod and its node, opens a tunnel, splices the streams.

use std::time::Duration;

use futures_util::stream;
use gantry_api::k8s_openapi::api::core::v1::{Pod, PodSpec};
use gantry_api::kinds;
use gantry_api::proto;
use gantry_api::proto::open_tunnel::Target;
use gantry_api::proto::{
    exec_input, exec_output, forward_input, forward_output, pods_server, tunnel_down, tunnel_up,
};
use gantry_api::status::Status;
use tokio::time::timeout;
use tonic::{Request, Response, Streaming};

use super::Feed;
use super::tunnels::{BoxedStream, Tunnel, carry, end_after, end_after_error, lost};
use crate::server::identity::Identity;
use crate::server::rbac::{Attributes, caller};

/// Which container is meant when none is named.
const DEFAULT_CONTAINER_ANNOTATION: &str = "kubectl.kubernetes.io/default-container";
/// How long a client may take with the command it wants to run.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// The `Pods` service.
pub struct PodStreams {
    feed: Feed,
}

/// Where a request goes.
pub(super) struct Place {
    pub(super) node: String,
    pub(super) uid: String,
    container: String,
}

impl PodStreams {
    pub(super) fn new(feed: Feed) -> Self {
        Self { feed }
    }

    /// `container`: none when the pod as a whole is meant.
    fn place(&self, namespace: &str, name: &str, container: Option<&str>) -> Result<Place, Status> {
        place(&self.feed, namespace, name, container)
    }

    /// Lets the caller use a subresource of a pod.
    fn authorize(
        &self,
        who: &Identity,
        verb: &str,
        subresource: &str,
        namespace: &str,
        pod: &str,
    ) -> Result<(), Status> {
        let what = Attributes::pod(verb, subresource, or_default(namespace), pod);
        self.feed.inner.registry.authorize_noted(who, &what)
    }

    async fn open(&self, place: &Place, target: Target) -> Result<Tunnel, Status> {
        self.feed
            .inner
            .open_tunnel(&place.node, &place.uid, target)
            .await
    }
}

/// The namespace that is meant.
pub(super) fn or_default(namespace: &str) -> &str {
    match namespace {
        "" => "default",
        namespace => namespace,
    }
}

/// Where a pod, or one of its containers, is.
pub(super) fn place(
    feed: &Feed,
    namespace: &str,
    name: &str,
    container: Option<&str>,
) -> Result<Place, Status> {
    let namespace = or_default(namespace);
    let pod = feed
        .inner
        .registry
        .get::<Pod>(namespace, name)?
        .ok_or_else(|| match kinds::by_plural("", "pods") {
            Some(kind) => Status::not_found(kind, name),
            None => Status::not_served("pods is not a kind of this server"),
        })?;
    let container = match container {
        Some(container) => container_of(&pod, name, container)?,
        None => String::new(),
    };
    let node = pod
        .spec
        .and_then(|spec| spec.node_name)
        .filter(|node| !node.is_empty());
    let node = node
        .ok_or_else(|| Status::bad_request(format!("pod {name} does not have a host assigned")))?;
    Ok(Place {
        node,
        uid: pod.metadata.uid.unwrap_or_default(),
        container,
    })
}

/// The container that is meant.
fn container_of(pod: &Pod, pod_name: &str, wanted: &str) -> Result<String, Status> {
    let empty = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    let main: Vec<&str> = spec.containers.iter().map(|c| c.name.as_str()).collect();
    let init = spec
        .init_containers
        .iter()
        .flatten()
        .map(|c| c.name.as_str());
    let ephemeral = spec
        .ephemeral_containers
        .iter()
        .flatten()
        .map(|c| c.name.as_str());
    let annotations = pod.metadata.annotations.as_ref();
    let default = annotations.and_then(|all| all.get(DEFAULT_CONTAINER_ANNOTATION));
    let wanted = match (wanted, default, main.as_slice()) {
        ("", Some(default), _) => default.as_str(),
        ("", None, [only]) => *only,
        ("", None, all) => {
            return Err(Status::bad_request(format!(
                "a container name must be specified for pod {pod_name}, choose one of: [{}]",
                all.join(" ")
            )));
        }
        (name, _, _) => name,
    };
    if main
        .iter()
        .copied()
        .chain(init)
        .chain(ephemeral)
        .any(|name| name == wanted)
    {
        return Ok(wanted.into());
    }
    Err(Status::bad_request(format!(
        "container {wanted:?} is not valid for pod {pod_name}"
    )))
}

#[tonic::async_trait]
impl pods_server::Pods for PodStreams {
    type LogsStream = BoxedStream<proto::LogsChunk>;
    type ExecStream = BoxedStream<proto::ExecOutput>;
    type ForwardStream = BoxedStream<proto::ForwardOutput>;

    async fn logs(
        &self,
        request: Request<proto::LogsRequest>,
    ) -> Result<Response<Self::LogsStream>, tonic::Status> {
        let who = caller(&request)?;
        let mut request = request.into_inner();
        self.authorize(&who, "get", "log", &request.namespace, &request.pod)?;
        let place = self.place(&request.namespace, &request.pod, Some(&request.container))?;
        request.container.clone_from(&place.container);
        let tunnel = self.open(&place, Target::Logs(request)).await?;
        // The tunnel lives as long as the client reads: dropping the stream closes it.
        let chunks = stream::unfold(tunnel, |mut tunnel| async {
            loop {
                match tunnel.up.message().await {
                    Ok(Some(proto::TunnelUp {
                        message: Some(tunnel_up::Message::Logs(chunk)),
                    })) => {
                        // An empty chunk is the end of the log, and not merely of the connection.
                        return (!chunk.data.is_empty()).then_some((Ok(chunk), tunnel));
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => return Some((Err(lost("the stream ended")), tunnel)),
                    Err(status) => return Some((Err(lost(status.message())), tunnel)),
                }
            }
        });
        Ok(Response::new(end_after_error(chunks)))
    }

    async fn exec(
        &self,
        request: Request<Streaming<proto::ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, tonic::Status> {
        let who = caller(&request)?;
        let mut input = request.into_inner();
        let first = timeout(START_TIMEOUT, input.message()).await;
        let first = first.map_err(|_| Status::timeout("no command in 10 s"))??;
        let Some(exec_input::Input::Start(mut start)) = first.and_then(|first| first.input) else {
            return Err(Status::bad_request("the first message must be the command").into());
        };
        let subresource = if start.attach { "attach" } else { "exec" };
        self.authorize(&who, "create", subresource, &start.namespace, &start.pod)?;
        if start.command.is_empty() && !start.attach {
            return Err(Status::bad_request("you must specify at least one command").into());
        }
        let place = self.place(&start.namespace, &start.pod, Some(&start.container))?;
        start.container.clone_from(&place.container);
        let tunnel = self.open(&place, Target::Exec(start)).await?;
        let output = carry(tunnel, input, tunnel_down::Message::Exec, |up| match up {
            tunnel_up::Message::Exec(output) => Some(output),
            _ => None,
        });
        let ended = |output: &Result<proto::ExecOutput, tonic::Status>| {
            matches!(
                output,
                Ok(proto::ExecOutput {
                    output: Some(exec_output::Output::Exit(_))
                })
            )
        };
        Ok(Response::new(end_after(output, ended)))
    }

    async fn forward(
        &self,
        request: Request<Streaming<proto::ForwardInput>>,
    ) -> Result<Response<Self::ForwardStream>, tonic::Status> {
        let who = caller(&request)?;
        let mut input = request.into_inner();
        let first = timeout(START_TIMEOUT, input.message()).await;
        let first = first.map_err(|_| Status::timeout("no port in 10 s"))??;
        let Some(forward_input::Input::Start(start)) = first.and_then(|first| first.input) else {
            return Err(Status::bad_request("the first message must be the port").into());
        };
        let (namespace, pod) = (&start.namespace, &start.pod);
        self.authorize(&who, "create", "portforward", namespace, pod)?;
        let place = self.place(namespace, pod, None)?;
        let tunnel = self.open(&place, Target::Forward(start)).await?;
        let output = carry(
            tunnel,
            input,
            tunnel_down::Message::Forward,
            |up| match up {
                tunnel_up::Message::Forward(output) => Some(output),
                _ => None,
            },
        );
        let ended = |output: &Result<proto::ForwardOutput, tonic::Status>| {
            matches!(
                output,
                Ok(proto::ForwardOutput {
                    output: Some(forward_output::Output::Closed(_))
                })
            )
        };
        Ok(Response::new(end_after(output, ended)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(annotation: Option<&str>) -> Pod {
        let mut pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "web"},
            "spec": {"containers": [{"name": "a"}, {"name": "b"}], "initContainers": [{"name": "i"}]},
        }))
        .unwrap();
        pod.metadata.annotations = annotation
            .map(|name| [(DEFAULT_CONTAINER_ANNOTATION.to_owned(), name.to_owned())].into());
        pod
    }

    #[test]
    fn a_container_is_found_by_name_annotation_or_because_it_is_alone() {
        assert_eq!(container_of(&pod(None), "web", "i").unwrap(), "i");
        assert_eq!(container_of(&pod(Some("b")), "web", "").unwrap(), "b");
        let status = container_of(&pod(None), "web", "").unwrap_err();
        assert!(status.message.contains("choose one of: [a b]"), "{status}");
        let status = container_of(&pod(None), "web", "x").unwrap_err();
        assert_eq!(status.message, "container \"x\" is not valid for pod web");
        let mut single = pod(None);
        single.spec.as_mut().unwrap().containers.truncate(1);
        assert_eq!(container_of(&single, "web", "").unwrap(), "a");
    }
}
