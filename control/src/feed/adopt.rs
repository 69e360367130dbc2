//! Pods that a node has from another history of the store: after a restore it runs what this store does not
//! know of, or does not know where.
//!
//! | the pod in the store            | what is done                                                     |
//! |---------------------------------|------------------------------------------------------------------|
//! | there, unbound                  | bound to this node: adopted                                      |
//! | there, bound to this node       | nothing                                                          |
//! | there, bound to another node    | nothing: here it ends at the first commit                        |
//! | not there, or of another UID    | told in Welcome: the agent lets it run on for a while            |
//!
//! The same goes for pods that have ended there and whose objects are gone: a backup may bring them back
//! unbound, and bound elsewhere they would begin once more. There may be thousands of them, so the agent
//! says in Hello only how many, and is asked for them when its history is an earlier one ([`ask_ended`]).
//! The agent then tells how each has ended, as it does of those that the backup has bound to it.
//!
//! It comes before the write of the node's lease, which is this session's least revision and, to
//! [`crate::hold`], the node's word: so no commit older than an adoption ends the pod, and nobody else is
//! given it first.

use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::proto;
use gantry_api::proto::{down, up};
use gantry_api::rules::{self, Rule};
use gantry_api::status::{Reason, Status};
use tokio::time::timeout;
use tonic::Streaming;

use super::Inner;
use super::session::Down;
use crate::controllers::pods;
use crate::store::Lineage;

/// More ended pods than an agent remembers.
const ENDED_MAX: usize = 20_000;
/// How long an agent may take to read them from its disk.
const ENDED_TIMEOUT: Duration = Duration::from_secs(20);

/// What an agent has said before its session begins.
pub(super) struct Told {
    pub(super) hello: proto::Hello,
    /// Pods that have ended there, when they are asked for.
    pub(super) ended: Vec<proto::HeldPod>,
}

/// Whether what the agent has is of an earlier history than this store's. One of a later history refuses us.
fn is_earlier(theirs: Option<&proto::Lineage>, ours: &Lineage) -> bool {
    theirs.is_some_and(|theirs| theirs.id != ours.id && theirs.counter < ours.counter)
}

/// Asks for the pods that have ended on a node, if it has any from an earlier history than ours.
///
/// # Errors
/// The words for who has to dial again.
pub(super) async fn ask_ended(
    hello: &proto::Hello,
    ours: &Lineage,
    inbound: &mut Streaming<proto::Up>,
    down: &Down,
) -> Result<Vec<proto::HeldPod>, String> {
    let mut ended = Vec::new();
    if hello.ended_count == 0 || !is_earlier(hello.held_lineage.as_ref(), ours) {
        return Ok(ended);
    }
    let ask = proto::Down {
        message: Some(down::Message::AskEnded(proto::AskEnded {})),
    };
    let answer = async {
        let sent = down.send(Ok(ask)).await;
        sent.map_err(|_| "the agent has left".to_owned())?;
        loop {
            let part = inbound.message().await;
            let part = part.map_err(|status| format!("stream: {status}"))?;
            match part.and_then(|part| part.message) {
                Some(up::Message::Ended(part)) => {
                    ended.extend(part.pods);
                    if ended.len() > ENDED_MAX {
                        return Err(format!("more than {ENDED_MAX} ended pods"));
                    }
                    if part.is_last {
                        return Ok(ended);
                    }
                }
                Some(_) => return Err("asked for ended pods, got something else".to_owned()),
                None => return Err("the agent has left".to_owned()),
            }
        }
    };
    let answered = timeout(ENDED_TIMEOUT, answer).await;
    answered.unwrap_or_else(|_| Err("the ended pods were not told in 20 s".to_owned()))
}

impl Inner {
    /// Binds what is unbound and runs or has ended there; returns the UIDs of what runs and is not known.
    pub(super) async fn adopt(&self, told: &Told) -> Result<Vec<String>, Status> {
        let mut unknown = Vec::new();
        let hello = &told.hello;
        if !is_earlier(hello.held_lineage.as_ref(), self.registry.store().lineage()) {
            return Ok(unknown);
        }
        let node = &hello.node;
        for held in &hello.held_pods {
            if !self.adopt_one(node, held).await? {
                unknown.push(held.uid.clone());
            }
        }
        for ended in &told.ended {
            self.adopt_one(node, ended).await?;
        }
        if !unknown.is_empty() {
            let count = unknown.len();
            tracing::warn!(
                node,
                count,
                "the node has pods that this store does not know"
            );
        }
        Ok(unknown)
    }

    /// False: the store does not know it.
    async fn adopt_one(&self, node: &str, held: &proto::HeldPod) -> Result<bool, Status> {
        let (namespace, name) = (&held.namespace, &held.name);
        let pod = self.registry.get::<Pod>(namespace, name)?;
        let pod = pod.filter(|pod| pod.metadata.uid.as_ref() == Some(&held.uid));
        let Some(pod) = pod else {
            return Ok(false);
        };
        if pods::node(&pod).is_some() || rules::is_off(Rule::Adopt) {
            return Ok(true);
        }
        match self.registry.bind(namespace, name, &held.uid, node).await {
            Ok(()) => tracing::info!(node, namespace, name, "adopted a pod that ran there"),
            // Gone, or bound by somebody else, at this very moment: the first commit tells.
            Err(status) if matches!(status.reason, Reason::Conflict | Reason::NotFound) => {
                tracing::warn!(node, namespace, name, %status, "a pod that ran there was not adopted");
            }
            Err(status) if status.is_retryable() => return Err(status),
            // Nothing that the next try would change, and no reason to keep the node out.
            Err(status) => {
                tracing::error!(node, namespace, name, %status, "a pod that ran there was not adopted");
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_of_an_earlier_history_is_adopted() {
        let ours = Lineage {
            counter: 7,
            id: "b".to_owned(),
        };
        let theirs = |counter, id: &str| proto::Lineage {
            counter,
            id: id.to_owned(),
        };
        assert!(is_earlier(Some(&theirs(6, "a")), &ours));
        assert!(!is_earlier(Some(&theirs(7, "b")), &ours), "the same");
        assert!(!is_earlier(Some(&theirs(7, "c")), &ours), "a rival");
        assert!(!is_earlier(Some(&theirs(8, "c")), &ours), "a later one");
        assert!(!is_earlier(None, &ours), "no history at all");
    }
}
