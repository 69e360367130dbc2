//! ControllerRevisions: the templates that a DaemonSet or StatefulSet has had.
//!
//! ```text
//!  template ─► hash ─► revision <set>-<hash>, number = the highest + 1 when the template is new
//! ```
//! A pod's label `controller-revision-hash` says of which it is; an old template is read back from
//! its revision. Old revisions beyond the limit go, oldest first, unless a pod is still of it.
//!
//! Source: Kubernetes `pkg/controller/history`.

use std::collections::BTreeSet;

use gantry_api::k8s_openapi::api::apps::v1::ControllerRevision;
use gantry_api::k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use gantry_api::k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use gantry_api::status::{Reason, Status};
use serde_json::{Value, json};

use super::deployment::template_hash;
use super::{Context, pods};
use crate::server::registry::{DeleteOptions, Resource};

/// The label that says of which revision a pod is.
pub(super) const HASH_LABEL: &str = "controller-revision-hash";

/// The hash that a pod was made with.
pub(super) fn hash_of(pod: &Pod) -> &str {
    let labels = pod.metadata.labels.as_ref();
    labels
        .and_then(|labels| labels.get(HASH_LABEL))
        .map(String::as_str)
        .unwrap_or_default()
}

/// What a set's history says.
#[derive(Debug, Default)]
pub(super) struct History {
    /// Oldest first.
    revisions: Vec<ControllerRevision>,
    /// The hash of the template as it is.
    pub(super) current: String,
}

fn revision_hash(revision: &ControllerRevision) -> &str {
    let labels = revision.metadata.labels.as_ref();
    labels
        .and_then(|labels| labels.get(HASH_LABEL))
        .map(String::as_str)
        .unwrap_or_default()
}

impl History {
    /// The template of a revision.
    pub(super) fn template(&self, hash: &str) -> Option<PodTemplateSpec> {
        let found = self.revisions.iter().find(|r| revision_hash(r) == hash)?;
        let data = found.data.as_ref()?;
        serde_json::from_value(data.0.pointer("/spec/template")?.clone()).ok()
    }

    /// What may go: the oldest beyond the limit that no pod is of.
    fn surplus(&self, limit: usize, in_use: &BTreeSet<&str>) -> Vec<&ControllerRevision> {
        let unused = |revision: &&ControllerRevision| {
            let hash = revision_hash(revision);
            hash != self.current && !in_use.contains(hash)
        };
        let unused: Vec<_> = self.revisions.iter().filter(unused).collect();
        let count = unused.len().saturating_sub(limit);
        unused.into_iter().take(count).collect()
    }
}

/// Records the template as it is, if it is new, and returns the history.
pub(super) async fn record<K: Resource>(
    context: &Context,
    owner: &K,
    template: &PodTemplateSpec,
) -> Result<History, Status> {
    let registry = &context.registry;
    let namespace = owner.metadata().namespace.as_deref().unwrap_or_default();
    let name = owner.metadata().name.as_deref().unwrap_or_default();
    let uid = owner.metadata().uid.as_deref().unwrap_or_default();
    let mut revisions: Vec<ControllerRevision> = registry.list(Some(namespace))?.1;
    revisions.retain(|r| pods::controller_of(&r.metadata).is_some_and(|c| c.uid == uid));
    revisions.sort_by_key(|revision| revision.revision);
    let hash = template_hash(template, None);
    let last = revisions.last().map_or(0, |revision| revision.revision);
    let known = revisions.iter().position(|r| revision_hash(r) == hash);
    match known {
        Some(index) if index + 1 == revisions.len() => {}
        // A template that comes back becomes the newest again.
        Some(index) => {
            let mut revision = revisions.remove(index);
            revision.revision = last + 1;
            revisions.push(registry.update(&revision).await?);
        }
        None => {
            let mut labels = template.metadata.as_ref().and_then(|m| m.labels.clone());
            let own = labels.get_or_insert_default();
            own.insert(HASH_LABEL.to_owned(), hash.clone());
            let data: Value = json!({"spec": {"template": template}});
            let revision = ControllerRevision {
                metadata: ObjectMeta {
                    namespace: Some(namespace.to_owned()),
                    name: Some(format!("{name}-{hash}")),
                    labels,
                    owner_references: Some(vec![super::controller_reference(owner)]),
                    ..ObjectMeta::default()
                },
                data: Some(RawExtension(data)),
                revision: last + 1,
            };
            revisions.push(registry.create(&revision).await?);
        }
    }
    Ok(History {
        revisions,
        current: hash,
    })
}

/// Removes what the limit does not cover.
pub(super) async fn truncate(
    context: &Context,
    history: &History,
    limit: Option<i32>,
    in_use: impl Iterator<Item = &Pod>,
) -> Result<(), Status> {
    let in_use: BTreeSet<&str> = in_use.map(hash_of).collect();
    let limit = usize::try_from(limit.unwrap_or(10)).unwrap_or(0);
    for revision in history.surplus(limit, &in_use) {
        let namespace = revision.metadata.namespace.as_deref().unwrap_or_default();
        let name = revision.metadata.name.as_deref().unwrap_or_default();
        let options = DeleteOptions::default();
        let registry = &context.registry;
        let result = registry
            .delete::<ControllerRevision>(namespace, name, &options)
            .await;
        match result {
            Err(status) if status.reason != Reason::NotFound => return Err(status),
            _ => {}
        }
    }
    Ok(())
}
