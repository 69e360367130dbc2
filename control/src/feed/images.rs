//! The images of nodes, for `gantry images`: each agent is asked on its own stream. To see them takes the right
//! `get nodes/images`, everything else `update nodes/images`.

use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Node;
use gantry_api::kinds;
use gantry_api::proto;
use gantry_api::proto::images_answer::Answer;
use gantry_api::proto::images_request::Action;
use gantry_api::proto::open_tunnel::Target;
use gantry_api::proto::{images_input, images_server, tunnel_down, tunnel_up};
use gantry_api::status::Status;
use tokio::time::timeout;
use tonic::{Request, Response, Streaming};

use super::Feed;
use super::tunnels::{BoxedStream, carry, end_after};
use crate::server::rbac::{Attributes, caller};

/// How long a client may take to say what it wants.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// The `Images` service.
pub struct NodeImages {
    feed: Feed,
}

impl NodeImages {
    pub(super) fn new(feed: Feed) -> Self {
        Self { feed }
    }

    fn check_node(&self, name: &str) -> Result<(), Status> {
        let found = self.feed.inner.registry.get::<Node>("", name)?;
        match (found, kinds::by_plural("", "nodes")) {
            (Some(_), _) => Ok(()),
            (None, Some(kind)) => Err(Status::not_found(kind, name)),
            (None, None) => Err(Status::not_served("nodes is not a kind of this server")),
        }
    }
}

#[tonic::async_trait]
impl images_server::Images for NodeImages {
    type AskStream = BoxedStream<proto::ImagesAnswer>;

    async fn ask(
        &self,
        request: Request<Streaming<proto::ImagesInput>>,
    ) -> Result<Response<Self::AskStream>, tonic::Status> {
        let who = caller(&request)?;
        let mut input = request.into_inner();
        let first = timeout(START_TIMEOUT, input.message()).await;
        let first = first.map_err(|_| Status::timeout("no request in 10 s"))??;
        let Some(images_input::Input::Request(request)) = first.and_then(|first| first.input)
        else {
            return Err(Status::bad_request("the first message must be the request").into());
        };
        let changes = !matches!(request.action, Some(Action::List(_)));
        let what = Attributes {
            verb: if changes { "update" } else { "get" },
            resource: "nodes",
            subresource: "images",
            name: &request.node,
            ..Attributes::default()
        };
        self.feed.inner.registry.authorize_noted(&who, &what)?;
        self.check_node(&request.node)?;
        let node = request.node.clone();
        let target = Target::Images(request);
        let tunnel = self.feed.inner.open_tunnel(&node, "", target).await?;
        // Dropping the stream closes the tunnel, and that ends a pull.
        let output = carry(tunnel, input, tunnel_down::Message::Images, |up| match up {
            tunnel_up::Message::Images(answer) => Some(answer),
            _ => None,
        });
        let ended = |answer: &Result<proto::ImagesAnswer, tonic::Status>| {
            let last = answer
                .as_ref()
                .ok()
                .and_then(|answer| answer.answer.as_ref());
            matches!(last, Some(Answer::Done(_) | Answer::Error(_)))
        };
        Ok(Response::new(end_after(output, ended)))
    }
}
