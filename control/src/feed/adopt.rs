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
//! It comes before the write of the node's lease, which is this session's least revision and, to
//! [`crate::hold`], the node's word: so no commit older than an adoption ends the pod, and nobody else is
//! given it first.

use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::proto;
use gantry_api::rules::{self, Rule};
use gantry_api::status::{Reason, Status};

use super::Inner;
use crate::controllers::pods;
use crate::store::Lineage;

/// Whether what the agent has is of an earlier history than this store's. One of a later history refuses us.
fn is_earlier(theirs: Option<&proto::Lineage>, ours: &Lineage) -> bool {
    theirs.is_some_and(|theirs| theirs.id != ours.id && theirs.counter < ours.counter)
}

impl Inner {
    /// Binds what runs unbound; returns the UIDs that the store does not know.
    pub(super) async fn adopt(&self, hello: &proto::Hello) -> Result<Vec<String>, Status> {
        let mut unknown = Vec::new();
        if !is_earlier(hello.held_lineage.as_ref(), self.registry.store().lineage()) {
            return Ok(unknown);
        }
        let node = &hello.node;
        for held in &hello.held_pods {
            let (namespace, name) = (&held.namespace, &held.name);
            let pod = self.registry.get::<Pod>(namespace, name)?;
            let pod = pod.filter(|pod| pod.metadata.uid.as_ref() == Some(&held.uid));
            let Some(pod) = pod else {
                unknown.push(held.uid.clone());
                continue;
            };
            if pods::node(&pod).is_some() || rules::is_off(Rule::Adopt) {
                continue;
            }
            match self.registry.bind(namespace, name, &held.uid, node).await {
                Ok(()) => tracing::info!(node, namespace, name, "adopted a pod that runs"),
                // Gone, or bound by somebody else, at this very moment: the first commit tells.
                Err(status) if matches!(status.reason, Reason::Conflict | Reason::NotFound) => {
                    tracing::warn!(node, namespace, name, %status, "a pod that runs was not adopted");
                }
                Err(status) if status.is_retryable() => return Err(status),
                // Nothing that the next try would change, and no reason to keep the node out.
                Err(status) => {
                    tracing::error!(node, namespace, name, %status, "a pod that runs was not adopted");
                }
            }
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
