//! The control planes over one etcd: a key of each, which lives as long as it does.
//!
//! ```text
//!  start ─► lease, key ─► renewed every RENEW_EVERY ─ stop ─► given back
//!             ▲                 └─ ended ─┐             (a process that dies: gone with its lease)
//!             └───────────────────────────┘
//! ```
//! Nothing is decided by these keys: who leads is [`super::leader`]'s. They tell where the API is served.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::client::{Client, Failure};
use super::leader::{Replica, give_back, keep_alive};
use super::proto::{LeaseGrantRequest, PutRequest, RangeRequest, TxnRequest};
use super::wire::put;

/// What the keys have before the URL.
const PREFIX: &str = "/gantry/replicas/";
/// What follows the last of them.
const END: &str = "/gantry/replicas0";
/// How long a key outlives its control plane.
const TTL_S: i64 = 15;
const RENEW_EVERY: Duration = Duration::from_secs(4);
const RETRY: Duration = Duration::from_secs(1);
/// Of an answer: more control planes than anybody runs.
const COUNT_MAX: i64 = 64;

/// Keeps our key until `stop`.
pub(super) async fn announce(client: &Client, us: &Replica, stop: &CancellationToken) {
    let mut held = None;
    let keep = async {
        loop {
            let kept = match held {
                None => begin(client, us).await.map(|lease| held = Some(lease)),
                Some(lease) => keep_alive(client, lease).await.map(|is_there| {
                    if !is_there {
                        held = None;
                    }
                }),
            };
            let pause = match kept {
                Ok(()) if held.is_some() => RENEW_EVERY,
                Ok(()) => Duration::ZERO,
                Err(failure) => {
                    tracing::debug!(%failure, "this control plane is not named in etcd, trying again");
                    RETRY
                }
            };
            tokio::time::sleep(pause).await;
        }
    };
    let stopped: Option<()> = stop.run_until_cancelled(keep).await;
    if let (None, Some(lease)) = (stopped, held) {
        give_back(client, lease).await;
    }
}

/// A lease with our key.
async fn begin(client: &Client, us: &Replica) -> Result<i64, Failure> {
    let request = LeaseGrantRequest { ttl: TTL_S, id: 0 };
    let granted = client.call(|open| async move { open.lease().lease_grant(request).await });
    let lease = granted.await?.id;
    let value = serde_json::to_vec(us).map_err(|e| Failure::Refused(e.to_string()))?;
    let request = TxnRequest {
        compare: Vec::new(),
        success: vec![put(PutRequest {
            key: format!("{PREFIX}{}", us.url).into(),
            value: value.into(),
            lease,
        })],
        failure: Vec::new(),
    };
    client
        .call(|open| async move { open.kv().txn(request).await })
        .await?;
    Ok(lease)
}

/// All that serve now, as far as etcd knows; by their URLs.
pub(super) async fn all(client: &Client) -> Result<Vec<Replica>, Failure> {
    let request = RangeRequest {
        key: PREFIX.into(),
        range_end: END.into(),
        limit: COUNT_MAX,
        ..RangeRequest::default()
    };
    let answer = client
        .call(|open| async move { open.kv().range(request).await })
        .await?;
    let replicas = answer.kvs.iter();
    let replicas = replicas.filter_map(|kv| serde_json::from_slice(&kv.value).ok());
    Ok(replicas.collect())
}
