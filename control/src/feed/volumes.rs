//! Volumes that nobody has any more, deleted by the agent that has their directory.

use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use gantry_api::proto;
use gantry_api::proto::open_tunnel::Target;
use gantry_api::proto::tunnel_up;
use gantry_api::status::Status;
use tokio::time::timeout;

use super::Feed;
use crate::controllers::VolumeRemover;

/// A directory of millions of files takes minutes. The agent goes on by itself after that.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(600);

impl VolumeRemover for Feed {
    fn remove<'a>(&'a self, node: &'a str, volume: &'a str) -> BoxFuture<'a, Result<(), Status>> {
        let target = Target::RemoveVolume(proto::RemoveVolume {
            name: volume.to_owned(),
        });
        async move {
            let mut tunnel = self.inner.open_tunnel(node, "", target).await?;
            let answer = timeout(REMOVAL_TIMEOUT, tunnel.up.message()).await;
            let answer = answer.map_err(|_| Status::timeout("no answer in 10 minutes"))?;
            match answer {
                Ok(Some(proto::TunnelUp {
                    message: Some(tunnel_up::Message::VolumeRemoved(removed)),
                })) if removed.error.is_empty() => Ok(()),
                Ok(Some(proto::TunnelUp {
                    message: Some(tunnel_up::Message::VolumeRemoved(removed)),
                })) => Err(Status::bad_request(removed.error)),
                _ => Err(Status::unavailable("the agent left before it was done")),
            }
        }
        .boxed()
    }
}
