//! Mirror pods: how the API shows what a node runs on its own account.
//!
//! ```text
//! agent: MirrorPods (all of them) ─► absent: created, bound to the node, owned by its Node
//!                                    of another content, or not wanted: removed
//! ```
//! The agent names the pods; this makes the objects equal to that. An agent can touch only mirror
//! pods of its own node. Statuses come as those of any pod. A user's deletion removes the object
//! and nothing else: the agent lets it go at once and asks for it again.

use std::collections::BTreeSet;

use gantry_api::k8s_openapi::api::core::v1::{Node, Pod};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use gantry_api::status::{Reason, Status};
use gantry_api::validation::MIRROR_ANNOTATION;

use super::Inner;
use crate::server::registry::DeleteOptions;

/// Static pods of one node.
const POD_COUNT_MAX: usize = 512;

/// The static pod behind a mirror pod.
fn mirrored(pod: &Pod) -> Option<&str> {
    let annotations = pod.metadata.annotations.as_ref()?;
    annotations.get(MIRROR_ANNOTATION).map(String::as_str)
}

/// What has to be done so that the mirror pods are the wanted ones. Pure.
#[derive(Debug, Default)]
struct Plan<'a> {
    create: Vec<&'a Pod>,
    remove: Vec<&'a Pod>,
    /// Another pod has the name.
    taken: Vec<&'a Pod>,
}

fn plan<'a>(node: &str, wanted: &'a [Pod], all: &'a [Pod]) -> Plan<'a> {
    let name = |pod: &Pod| (pod.metadata.namespace.clone(), pod.metadata.name.clone());
    let is_ours = |pod: &&Pod| {
        let bound_to = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        bound_to == Some(node) && mirrored(pod).is_some()
    };
    let mut plan = Plan::default();
    let mut names = BTreeSet::new();
    for pod in wanted.iter().filter(is_ours).take(POD_COUNT_MAX) {
        if !names.insert(name(pod)) {
            continue;
        }
        match all.iter().find(|other| name(other) == name(pod)) {
            None => plan.create.push(pod),
            Some(other) if !is_ours(&other) => plan.taken.push(pod),
            // Created by the next report, once the old one is gone.
            Some(other) if mirrored(other) != mirrored(pod) => plan.remove.push(other),
            Some(_) => {}
        }
    }
    let unwanted = all.iter().filter(is_ours);
    plan.remove
        .extend(unwanted.filter(|pod| !names.contains(&name(pod))));
    plan
}

impl Inner {
    /// Makes the mirror pods of `node` those of a report.
    pub(super) async fn mirror(&self, node: &str, report: &[bytes::Bytes]) {
        let wanted: Vec<Pod> = report
            .iter()
            .filter_map(|json| {
                let pod = serde_json::from_slice(json);
                pod.inspect_err(|error| tracing::warn!(node, %error, "a static pod is no pod"))
                    .ok()
            })
            .collect();
        if let Err(status) = self.mirror_all(node, &wanted).await {
            tracing::warn!(node, %status, "mirror pods are not up to date; the agent asks again");
        }
    }

    /// One pod that cannot be shown keeps no other one from it.
    async fn mirror_all(&self, node: &str, wanted: &[Pod]) -> Result<(), Status> {
        let (_, all) = self.registry.list::<Pod>(None)?;
        let plan = plan(node, wanted, &all);
        for pod in plan.taken {
            let name = title(pod);
            tracing::warn!(
                node,
                name,
                "a static pod is not shown: another pod has its name"
            );
        }
        for pod in plan.remove {
            let (metadata, name) = (&pod.metadata, title(pod));
            let options = DeleteOptions {
                grace_period_s: Some(0),
                uid: metadata.uid.clone(),
                ..DeleteOptions::default()
            };
            let (namespace, plain) = (&metadata.namespace, &metadata.name);
            let removed = self
                .registry
                .delete::<Pod>(
                    namespace.as_deref().unwrap_or_default(),
                    plain.as_deref().unwrap_or_default(),
                    &options,
                )
                .await;
            match removed {
                Err(status) if status.reason != Reason::NotFound => {
                    tracing::warn!(node, name, %status, "a mirror pod is not removed");
                }
                _ => tracing::info!(node, name, "mirror pod removed"),
            }
        }
        let owner = self.registry.get::<Node>("", node)?;
        for pod in plan.create {
            let name = title(pod);
            match self
                .registry
                .create_mirror(&shown(pod, owner.as_ref()))
                .await
            {
                Ok(()) => tracing::info!(node, name, "mirror pod created"),
                Err(status) => {
                    tracing::warn!(node, name, %status, "a static pod is not shown; trying again");
                }
            }
        }
        Ok(())
    }
}

fn title(pod: &Pod) -> String {
    let part = |text: &Option<String>| text.clone().unwrap_or_default();
    let metadata = &pod.metadata;
    format!("{}/{}", part(&metadata.namespace), part(&metadata.name))
}

/// The mirror pod's object: it goes with its node's.
fn shown(pod: &Pod, node: Option<&Node>) -> Pod {
    let mut pod = pod.clone();
    pod.metadata.uid = None;
    pod.metadata.creation_timestamp = None;
    pod.metadata.owner_references = node.map(|node| {
        vec![OwnerReference {
            api_version: "v1".into(),
            kind: "Node".into(),
            name: node.metadata.name.clone().unwrap_or_default(),
            uid: node.metadata.uid.clone().unwrap_or_default(),
            controller: Some(true),
            ..OwnerReference::default()
        }]
    });
    pod
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, node: &str, mirror: Option<&str>) -> Pod {
        let mut pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"nodeName": node, "containers": []}}))
        .unwrap();
        pod.metadata.annotations =
            mirror.map(|uid| [(MIRROR_ANNOTATION.to_owned(), uid.to_owned())].into());
        pod
    }

    fn names(pods: &[&Pod]) -> Vec<String> {
        pods.iter()
            .filter_map(|pod| pod.metadata.name.clone())
            .collect()
    }

    #[test]
    fn mirror_pods_become_the_wanted_ones_and_nobody_elses_pod_is_touched() {
        let all = [
            pod("same", "n", Some("1")),
            pod("changed", "n", Some("2")),
            pod("gone", "n", Some("3")),
            pod("other-node", "m", Some("4")),
            pod("plain", "n", None),
        ];
        let wanted = [
            pod("same", "n", Some("1")),
            pod("changed", "n", Some("9")),
            pod("new", "n", Some("5")),
            pod("new", "n", Some("6")),
            pod("plain", "n", Some("7")),
            pod("other-node", "n", Some("8")),
            pod("foreign", "m", Some("9")),
            pod("no-mirror", "n", None),
        ];
        let plan = plan("n", &wanted, &all);
        assert_eq!(names(&plan.create), ["new"]);
        assert_eq!(names(&plan.remove), ["changed", "gone"]);
        assert_eq!(names(&plan.taken), ["plain", "other-node"]);
    }
}
