//! Tokens of service accounts, asked for on the connection that the stream has opened.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use gantry_api::proto;
use gantry_api::proto::feed_client::FeedClient;
use tokio::time::timeout;
use tonic::Code;
use tonic::transport::Channel;

use super::{Shared, lock};
use crate::volumes::token::{TokenError, TokenRequest, TokenSource};

/// A pod's start waits this long for a token, and is then tried again.
const TIMEOUT: Duration = Duration::from_secs(10);
/// An agent that has just started has its connection within this, if there is anything to connect to.
const CONNECTED_IN: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The control plane as issuer of tokens.
pub struct ControlPlaneTokens {
    pub(super) shared: Arc<Shared>,
}

impl ControlPlaneTokens {
    async fn channel(&self) -> Channel {
        loop {
            if let Some(channel) = lock(&self.shared.channel).clone() {
                return channel;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

#[async_trait]
impl TokenSource for ControlPlaneTokens {
    async fn token(&self, request: &TokenRequest) -> Result<String, TokenError> {
        let connected = timeout(CONNECTED_IN, self.channel()).await;
        let away = |_| TokenError::Away("the control plane is not connected".into());
        let channel = connected.map_err(away)?;
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
            Ok(Err(status)) => {
                let words = status.message().to_owned();
                // What the transport says, and not the server.
                let away = matches!(status.code(), Code::Unavailable | Code::Unknown);
                Err(match away {
                    true => TokenError::Away(words),
                    false => TokenError::Refused(words),
                })
            }
            Err(_) => {
                let words = format!("no answer in {} s", TIMEOUT.as_secs());
                Err(TokenError::Away(words))
            }
        }
    }
}
