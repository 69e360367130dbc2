//! The gRPC door of the feed: who speaks, and for which node.

use std::time::Duration;

use gantry_api::proto;
use gantry_api::proto::feed_server;
use gantry_api::proto::{tunnel_up, up};
use gantry_api::status::Status;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Streaming};

use super::{Feed, session};
use crate::server::identity::{CertificateFacts, Identity};

/// How long an agent may take with its first message.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Messages between a session and its connection.
const DOWN_QUEUE: usize = 4;

fn identity<T>(request: &Request<T>) -> Result<Identity, Status> {
    let identity = request.extensions().get::<Identity>().cloned();
    identity.ok_or_else(|| Status::unauthorized("no client certificate: the feed is for agents"))
}

async fn first<T>(inbound: &mut Streaming<T>) -> Result<T, tonic::Status> {
    let message = timeout(FIRST_MESSAGE_TIMEOUT, inbound.message()).await;
    let message = message.map_err(|_| Status::timeout("no first message in 10 s"))??;
    Ok(message.ok_or_else(|| Status::bad_request("the stream ended before its first message"))?)
}

#[tonic::async_trait]
impl feed_server::Feed for Feed {
    type SessionStream = ReceiverStream<Result<proto::Down, tonic::Status>>;
    type TunnelStream = ReceiverStream<Result<proto::TunnelDown, tonic::Status>>;

    async fn session(
        &self,
        request: Request<Streaming<proto::Up>>,
    ) -> Result<Response<Self::SessionStream>, tonic::Status> {
        let identity = identity(&request)?;
        let facts = request.extensions().get::<CertificateFacts>().cloned();
        let mut inbound = request.into_inner();
        let Some(up::Message::Hello(hello)) = first(&mut inbound).await?.message else {
            return Err(Status::bad_request("the first message must be Hello").into());
        };
        identity.check_node(&hello.node)?;
        let (down, stream) = mpsc::channel(DOWN_QUEUE);
        let session = session::run(self.inner.clone(), hello, facts, inbound, down);
        tokio::spawn(session);
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn tunnel(
        &self,
        request: Request<Streaming<proto::TunnelUp>>,
    ) -> Result<Response<Self::TunnelStream>, tonic::Status> {
        let identity = identity(&request)?;
        let mut inbound = request.into_inner();
        let Some(tunnel_up::Message::Opened(opened)) = first(&mut inbound).await?.message else {
            return Err(Status::bad_request("the first message must be TunnelOpened").into());
        };
        let down = self.inner.tunnels.answer(&identity, opened, inbound)?;
        Ok(Response::new(ReceiverStream::new(down)))
    }

    async fn issue_token(
        &self,
        request: Request<proto::TokenRequest>,
    ) -> Result<Response<proto::IssuedToken>, tonic::Status> {
        let identity = identity(&request)?;
        let reply = self.inner.pod_token(&identity, &request.into_inner())?;
        Ok(Response::new(reply))
    }
}
