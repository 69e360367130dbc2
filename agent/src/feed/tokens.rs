//! Tokens of service accounts, asked for on the connection that the stream has opened.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use gantry_api::proto;
use gantry_api::proto::feed_client::FeedClient;
use tokio::time::timeout;

use super::{Shared, lock};
use crate::volumes::token::{TokenRequest, TokenSource};

/// A pod's start waits this long for a token, and is then tried again.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The control plane as issuer of tokens.
pub struct ControlPlaneTokens {
    pub(super) shared: Arc<Shared>,
}

#[async_trait]
impl TokenSource for ControlPlaneTokens {
    async fn token(&self, request: &TokenRequest) -> Result<String, String> {
        let channel = lock(&self.shared.channel).clone();
        let channel = channel.ok_or("the control plane is not connected")?;
        let request = proto::TokenRequest {
            namespace: request.namespace.clone(),
            pod: request.pod.clone(),
            pod_uid: request.uid.clone(),
            audiences: request.audience.iter().cloned().collect(),
            expiration_s: request.expiration_s,
        };
        let mut client = FeedClient::new(channel);
        match timeout(TIMEOUT, client.issue_token(request)).await {
            Ok(Ok(issued)) => Ok(issued.into_inner().token),
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_) => Err(format!("no answer in {} s", TIMEOUT.as_secs())),
        }
    }
}
