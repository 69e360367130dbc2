//! One leader at a time: the others follow.
//!
//! ```text
//!  Following ─ nobody holds the key ─► lease, key created ─► Leading ─ the lease has ended, the key is another's,
//!      ▲                                                        │      or etcd was not reached for PATIENCE
//!      └──────── the process is started again ◄── Lost ◄────────┘
//! ```
//! The key [`KEY`] lives as long as its lease. Every transaction of the leader compares the key's creation
//! ([`Term`]): one that was stopped for a while, and whose place was taken, can write nothing any more, whatever
//! it believes. So no clock has to be trusted for that; ours only ends a leader that is cut off.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::client::{Client, Failure};
use super::proto::{
    Compare, KeyValue, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, PutRequest,
    RangeRequest, TxnRequest,
};
use super::wire::{is_made_at, put, range_of};

/// Who leads: the key's value is a [`Replica`].
pub(super) const KEY: &str = "/gantry/leader";
/// How long the key outlives its holder.
const TTL: Duration = Duration::from_secs(3);
const RENEW_EVERY: Duration = Duration::from_millis(800);
/// What a renewal may take: another server can be asked before the lease ends.
const RENEW_TIMEOUT: Duration = Duration::from_secs(1);
/// A leader that has not reached etcd for this long ends. More than the lease, for etcd prolongs it when it
/// elects a leader itself.
const PATIENCE: Duration = Duration::from_secs(5);
/// The watch says at once when the key goes; this is for a watch that is stuck.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A control plane, as the others know it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// For people.
    pub name: String,
    /// Where it serves: `https://...`; "" for what does not serve, as a restore.
    pub url: String,
}

/// Who leads, as far as is known here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leader {
    /// `None`: nobody.
    pub replica: Option<Replica>,
    /// etcd's revision of its beginning.
    created: i64,
    /// etcd's revision of the last change of this.
    changed: i64,
}

impl Leader {
    /// Of the key as it was read, or seen to change.
    pub(super) fn of(kv: &KeyValue, is_gone: bool) -> Leader {
        // A value of another version names nobody that can be reached; it still leads.
        let replica = || serde_json::from_slice(&kv.value).unwrap_or_default();
        Leader {
            replica: (!is_gone).then(replica),
            created: kv.create_revision,
            changed: kv.mod_revision,
        }
    }
}

/// A time in office: what every transaction compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Term {
    created: i64,
}

impl Term {
    /// Holds as long as nobody else has led since.
    pub(super) fn holds(self) -> Compare {
        is_made_at(KEY, self.created)
    }

    /// Whether the key as it was read is ours.
    pub(super) fn is(self, created: Option<i64>) -> bool {
        created == Some(self.created)
    }

    /// Whether this was seen after the term's end.
    fn has_ended(self, seen: &Leader) -> bool {
        seen.changed > self.created && (seen.replica.is_none() || seen.created != self.created)
    }
}

/// Waits until nobody else leads.
///
/// * `seen` – what the watch says; a sender that says nothing is fine, etcd is asked as well.
/// * `lost` – cancelled when this ends to lead, unless by `stop`.
pub(super) async fn stand(
    client: &Client,
    us: &Replica,
    mut seen: watch::Receiver<Leader>,
    lost: CancellationToken,
    stop: &CancellationToken,
) -> Result<Term, Failure> {
    let mut told = Replica::default();
    loop {
        seen.borrow_and_update();
        match holder(client).await {
            Ok(None) => {
                if let Some((term, lease, since)) = campaign(client, us).await? {
                    tracing::info!(name = us.name, "this control plane leads");
                    let holding = Holding {
                        client: client.clone(),
                        lease,
                        term,
                        renewed: since,
                    };
                    tokio::spawn(holding.run(seen, lost, stop.clone()));
                    return Ok(term);
                }
            }
            Ok(Some(other)) if other != told => {
                tracing::info!(leader = other.name, url = other.url, "following");
                told = other;
            }
            Ok(Some(_)) => {}
            Err(failure) => tracing::warn!(%failure, "etcd does not answer, trying again"),
        }
        let gone = async {
            if seen.wait_for(|now| now.replica.is_none()).await.is_err() {
                std::future::pending::<()>().await;
            }
            // Not all at once, and not in a loop while the watch is behind.
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        tokio::select! {
            // All arms are cancel safe.
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = gone => {}
            () = stop.cancelled() => return Err(Failure::NotDone("stopped while following".to_owned())),
        }
    }
}

/// Who leads now.
pub(super) async fn holder(client: &Client) -> Result<Option<Replica>, Failure> {
    let request = range_of(KEY);
    let answer = client
        .call(|open| async move { open.kv().range(request).await })
        .await?;
    let holder = answer.kvs.first();
    Ok(holder.and_then(|kv| Leader::of(kv, false).replica))
}

/// Tries to become it; with the lease and the moment from which it runs.
async fn campaign(client: &Client, us: &Replica) -> Result<Option<(Term, i64, Instant)>, Failure> {
    let since = Instant::now();
    let request = LeaseGrantRequest {
        ttl: i64::try_from(TTL.as_secs()).unwrap_or(3),
        id: 0,
    };
    let granted = client.call(|open| async move { open.lease().lease_grant(request).await });
    let lease = match granted.await {
        Ok(granted) => granted.id,
        Err(failure @ Failure::Refused(_)) => return Err(failure),
        Err(_) => return Ok(None),
    };
    let value = serde_json::to_vec(us).map_err(|e| Failure::Refused(e.to_string()))?;
    let request = TxnRequest {
        compare: vec![is_made_at(KEY, 0)],
        success: vec![put(PutRequest {
            key: KEY.into(),
            value: value.into(),
            lease,
        })],
        failure: Vec::new(),
    };
    let answer = client
        .call(|open| async move { open.kv().txn(request).await })
        .await;
    match answer {
        Ok(answer) if answer.succeeded => {
            let created = answer.header.map_or(0, |header| header.revision);
            Ok(Some((Term { created }, lease, since)))
        }
        // Somebody else was faster, or it is not known: the lease ends, and with it what may have been.
        _ => {
            give_back(client, lease).await;
            Ok(None)
        }
    }
}

pub(super) async fn give_back(client: &Client, lease: i64) {
    let request = LeaseRevokeRequest { id: lease };
    // If it fails, the lease ends by itself.
    let _ = client
        .call(|open| async move { open.lease().lease_revoke(request).await })
        .await;
}

/// The leader's hold on its place.
struct Holding {
    client: Client,
    lease: i64,
    term: Term,
    renewed: Instant,
}

impl Holding {
    /// Renews the lease until `stop`, then gives it back; cancels `lost` when it is not ours any more.
    async fn run(
        mut self,
        mut seen: watch::Receiver<Leader>,
        lost: CancellationToken,
        stop: CancellationToken,
    ) {
        let term = self.term;
        let taken = async {
            if seen.wait_for(|now| term.has_ended(now)).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let reason = tokio::select! {
            // All arms are cancel safe: a renewal that is dropped is made again, or the lease ends.
            () = stop.cancelled() => {
                // The next one need not wait for its end.
                return give_back(&self.client, self.lease).await;
            }
            reason = self.renew() => reason,
            () = taken => "another one may lead",
        };
        tracing::error!(reason, "this control plane does not lead any more: it ends");
        lost.cancel();
    }

    /// Returns why the lease cannot be relied on any more.
    async fn renew(&mut self) -> &'static str {
        loop {
            // Counted from before the call: etcd counts from after it.
            let before = Instant::now();
            let pause = match keep_alive(&self.client, self.lease).await {
                Ok(true) => {
                    self.renewed = before;
                    RENEW_EVERY
                }
                Ok(false) => return "the lease has ended",
                Err(failure) => {
                    tracing::warn!(%failure, "the lease was not renewed");
                    Duration::from_millis(100)
                }
            };
            if self.renewed.elapsed() >= PATIENCE {
                return "etcd is not reached";
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// False: it has ended.
pub(super) async fn keep_alive(client: &Client, lease: i64) -> Result<bool, Failure> {
    let answer = client.call_within(RENEW_TIMEOUT, |open| async move {
        let request = tokio_stream::once(LeaseKeepAliveRequest { id: lease });
        let mut answers = open.lease().lease_keep_alive(request).await?.into_inner();
        let answer = answers.message().await?;
        Ok(tonic::Response::new(answer))
    });
    Ok(answer.await?.is_some_and(|answer| answer.ttl > 0))
}

/// For the failure branch of a transaction: the key, so that it can be told whose it is.
pub(super) fn look() -> RangeRequest {
    RangeRequest {
        keys_only: true,
        ..range_of(KEY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_ends_with_the_key_and_not_before_it_was_seen() {
        let term = Term { created: 10 };
        let leader = |replica: bool, created, changed| Leader {
            replica: replica.then(Replica::default),
            created,
            changed,
        };
        // What a watch that is behind still shows: nobody, or the one before.
        assert!(!term.has_ended(&Leader::default()));
        assert!(!term.has_ended(&leader(true, 3, 3)));
        assert!(!term.has_ended(&leader(false, 0, 9)));
        assert!(!term.has_ended(&leader(true, 10, 10)));
        assert!(term.has_ended(&leader(false, 0, 11)));
        assert!(term.has_ended(&leader(true, 12, 12)));
    }
}
