//! The garbage collector: what becomes of objects whose owners go.
//!
//! ```text
//!  every change of every kind ─► Graph: uid ─► owners, dependents, finalizers ─► queue of uids
//!                                                                                   │ decide (pure)
//!   owner gone ⇒ delete   some owners gone ⇒ drop those references   orphan ⇒ drop ours   ◄──┘
//!   foreground: dependents that block go first, then the finalizer
//! ```
//! The graph is the store's view at one revision, so an owner that is not in it does not exist: no
//! look-up is needed before a deletion. A cycle of owners stands until one of its members is
//! deleted; in the background the rest follows one by one, in the foreground the reference that
//! would wait for itself stops blocking.
//!
//! Invariants: an object goes only when none of its owners is left; a write is refused if the object
//! changed since it was decided about.
//!
//! Source: Kubernetes `pkg/controller/garbagecollector`.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use gantry_api::kinds::{self, Kind};
use gantry_api::status::{Reason, Status};
use serde::Deserialize;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::informer::{ObjectKey, Sink, parse_store_key};
use super::queue::WorkQueue;
use super::{Context, Controller, WORKER_COUNT};
use crate::server::registry::{DeleteOptions, Propagation};
use crate::server::{Part, WriteOptions};
use crate::store::{Entry, Revision};

/// Finalizer of an object that waits for its dependents to be deleted.
const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer of an object whose dependents are to lose it as an owner.
const ORPHAN: &str = "orphan";

/// What the collector knows of one object.
#[derive(Debug, Clone)]
struct Node {
    kind: &'static Kind,
    key: ObjectKey,
    revision: Revision,
    owners: Vec<OwnerReference>,
    is_deleting: bool,
    has_foreground: bool,
    has_orphan: bool,
}

impl Node {
    fn waits_for_dependents(&self) -> bool {
        self.is_deleting && self.has_foreground
    }

    /// Whether a reference from an object in `namespace` means this object.
    fn is_meant_by(&self, reference: &OwnerReference, namespace: &str) -> bool {
        self.kind.kind == reference.kind
            && self.key.name == reference.name
            && (!self.kind.namespaced || self.key.namespace == namespace)
            && reference
                .api_version
                .split_once('/')
                .map_or("", |(group, _)| group)
                == self.kind.group
    }
}

/// Who owns whom, of every kind.
#[derive(Debug, Default)]
struct Objects {
    nodes: HashMap<String, Node>,
    uid_by_store_key: HashMap<String, String>,
    /// By the uid of the owner, which may not exist.
    dependents: HashMap<String, BTreeSet<String>>,
}

/// What to do about one object.
#[derive(Debug, PartialEq, Eq)]
enum Action {
    /// It stays.
    Nothing,
    /// Look at these.
    Visit(Vec<String>),
    /// Take the owner out of its dependents, then its `orphan` finalizer away.
    Orphan { dependents: Vec<String> },
    /// Nothing blocks it any more: take its `foregroundDeletion` finalizer away.
    Release,
    /// Take the references to these owners out of it.
    Forget { owners: Vec<String> },
    /// Delete it; first let its own references stop blocking, if it is part of a waiting cycle.
    Delete {
        propagation: Propagation,
        unblock: bool,
    },
}

impl Objects {
    fn insert(&mut self, store_key: String, uid: String, node: Node) {
        self.remove(&store_key);
        for owner in &node.owners {
            self.dependents
                .entry(owner.uid.clone())
                .or_default()
                .insert(uid.clone());
        }
        self.uid_by_store_key.insert(store_key, uid.clone());
        self.nodes.insert(uid, node);
    }

    fn remove(&mut self, store_key: &str) -> Option<(String, Node)> {
        let uid = self.uid_by_store_key.remove(store_key)?;
        let node = self.nodes.remove(&uid)?;
        for owner in &node.owners {
            if let Some(uids) = self.dependents.get_mut(&owner.uid) {
                uids.remove(&uid);
                if uids.is_empty() {
                    self.dependents.remove(&owner.uid);
                }
            }
        }
        Some((uid, node))
    }

    fn dependents_of(&self, uid: &str) -> Vec<String> {
        self.dependents
            .get(uid)
            .into_iter()
            .flatten()
            .cloned()
            .collect()
    }

    /// Owners of `node` that are waiting for it, or could be.
    fn leaving_owners(&self, node: &Node) -> impl Iterator<Item = String> {
        let leaving = |owner: &&OwnerReference| {
            self.nodes
                .get(&owner.uid)
                .is_some_and(|owner| owner.is_deleting)
        };
        node.owners
            .iter()
            .filter(leaving)
            .map(|owner| owner.uid.clone())
    }

    /// Decides about one object.
    fn decide(&self, uid: &str) -> Action {
        let Some(node) = self.nodes.get(uid) else {
            return Action::Nothing;
        };
        if node.is_deleting && node.has_orphan {
            return Action::Orphan {
                dependents: self.dependents_of(uid),
            };
        }
        if node.waits_for_dependents() {
            let dependents = self.dependents_of(uid);
            let blocks = |dependent: &String| {
                let owners = self.nodes.get(dependent).map(|node| node.owners.as_slice());
                owners
                    .unwrap_or_default()
                    .iter()
                    .any(|owner| owner.uid == uid && owner.block_owner_deletion == Some(true))
            };
            return match dependents.iter().any(blocks) {
                false => Action::Release,
                true => Action::Visit(dependents),
            };
        }
        if node.is_deleting || node.owners.is_empty() {
            return Action::Nothing;
        }
        self.decide_by_owners(uid, node)
    }

    fn decide_by_owners(&self, uid: &str, node: &Node) -> Action {
        let (mut solid, mut waiting, mut dangling) = (0, Vec::new(), Vec::new());
        for reference in &node.owners {
            match self.nodes.get(&reference.uid) {
                Some(owner) if owner.is_meant_by(reference, &node.key.namespace) => {
                    if owner.waits_for_dependents() {
                        waiting.push(reference.uid.clone());
                    } else {
                        solid += 1;
                    }
                }
                // A cluster-scoped object cannot name the namespace of its owner: left alone.
                Some(_) if !node.kind.namespaced => solid += 1,
                _ => dangling.push(reference.uid.clone()),
            }
        }
        if solid > 0 {
            dangling.extend(waiting);
            return match dangling.is_empty() {
                true => Action::Nothing,
                false => Action::Forget { owners: dangling },
            };
        }
        let dependents = self.dependents_of(uid);
        if !waiting.is_empty() && !dependents.is_empty() {
            let in_cycle = dependents
                .iter()
                .any(|d| self.nodes.get(d).is_some_and(Node::waits_for_dependents));
            return Action::Delete {
                propagation: Propagation::Foreground,
                unblock: in_cycle,
            };
        }
        let propagation = match (node.has_orphan, node.has_foreground) {
            (true, _) => Propagation::Orphan,
            (false, true) => Propagation::Foreground,
            (false, false) => Propagation::Background,
        };
        Action::Delete {
            propagation,
            unblock: false,
        }
    }
}

/// The graph and the queue of objects to decide about.
pub(super) struct Graph {
    objects: RwLock<Objects>,
    queue: WorkQueue<String>,
}

/// The part of an object that is looked at.
#[derive(Deserialize)]
struct Partial {
    metadata: PartialMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PartialMetadata {
    uid: String,
    #[serde(default)]
    owner_references: Vec<OwnerReference>,
    #[serde(default)]
    finalizers: Vec<String>,
    deletion_timestamp: Option<String>,
}

fn read(entry: &Entry) -> Option<(String, Node)> {
    let (plural, key) = parse_store_key(&entry.key)?;
    let kind = kinds::KINDS.iter().find(|kind| kind.plural == plural)?;
    let partial: Partial = match serde_json::from_slice(&entry.value) {
        Ok(partial) => partial,
        Err(error) => {
            tracing::error!(key = %entry.key, %error, "cannot read the owners of an object");
            return None;
        }
    };
    let metadata = partial.metadata;
    let has = |name: &str| {
        metadata
            .finalizers
            .iter()
            .any(|finalizer| finalizer == name)
    };
    let node = Node {
        kind,
        key,
        revision: entry.mod_revision,
        is_deleting: metadata.deletion_timestamp.is_some(),
        has_foreground: has(FOREGROUND),
        has_orphan: has(ORPHAN),
        owners: metadata.owner_references,
    };
    Some((metadata.uid, node))
}

impl Graph {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            objects: RwLock::default(),
            queue: WorkQueue::new(),
        })
    }

    /// Every object is looked at when it appears or changes, if anything can follow from that.
    fn is_worth_a_look(node: &Node) -> bool {
        !node.owners.is_empty() || (node.is_deleting && (node.has_foreground || node.has_orphan))
    }

    fn visit(&self, uids: impl IntoIterator<Item = String>) {
        uids.into_iter().for_each(|uid| self.queue.add(uid));
    }
}

impl Sink for Graph {
    fn plural(&self) -> Option<&'static str> {
        None
    }

    fn put(&self, entry: &Entry) {
        let Some((uid, node)) = read(entry) else {
            return;
        };
        let mut objects = self.objects.write().unwrap_or_else(PoisonError::into_inner);
        let mut visit = Vec::new();
        if let Some((old_uid, old)) = objects.remove(&entry.key) {
            // A reference that was taken out or stopped blocking may free its owner.
            visit.extend(objects.leaving_owners(&old));
            if old_uid != uid {
                visit.extend(objects.dependents_of(&old_uid));
            }
        }
        if Self::is_worth_a_look(&node) {
            visit.push(uid.clone());
        }
        objects.insert(entry.key.to_string(), uid, node);
        drop(objects);
        self.visit(visit);
    }

    fn delete(&self, store_key: &str) {
        let mut objects = self.objects.write().unwrap_or_else(PoisonError::into_inner);
        let Some((uid, node)) = objects.remove(store_key) else {
            return;
        };
        let mut visit = objects.dependents_of(&uid);
        visit.extend(objects.leaving_owners(&node));
        drop(objects);
        self.visit(visit);
    }

    /// In one step: a worker must never see a dependent before its owner.
    fn replace(&self, entries: &[&Entry]) {
        let mut new = Objects::default();
        for entry in entries {
            if let Some((uid, node)) = read(entry) {
                new.insert(entry.key.to_string(), uid, node);
            }
        }
        let looks = new
            .nodes
            .iter()
            .filter(|(_, node)| Self::is_worth_a_look(node));
        let visit: Vec<String> = looks.map(|(uid, _)| uid.clone()).collect();
        *self.objects.write().unwrap_or_else(PoisonError::into_inner) = new;
        self.visit(visit);
    }
}

struct Collector {
    context: Arc<Context>,
}

impl Collector {
    fn node(&self, uid: &str) -> Option<Node> {
        let objects = &self.context.caches.graph.objects;
        objects
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .nodes
            .get(uid)
            .cloned()
    }

    /// Changes `metadata` of one object, if it is still the one that was decided about.
    async fn change_metadata(
        &self,
        uid: &str,
        node: &Node,
        change: impl Fn(&mut serde_json::Map<String, Value>) + Send + Sync,
    ) -> Result<(), Status> {
        let change = |object: &Value| {
            if object["metadata"]["uid"].as_str() != Some(uid) {
                return Err(Status::not_found(node.kind, &node.key.name));
            }
            let mut object = object.clone();
            if let Some(metadata) = object["metadata"].as_object_mut() {
                change(metadata);
            }
            Ok(object)
        };
        let (part, options) = (Part::Object, WriteOptions::default());
        let (namespace, name) = (&node.key.namespace, &node.key.name);
        let registry = &self.context.registry;
        let written = registry
            .change_value(node.kind, namespace, name, part, &options, change)
            .await;
        super::ignore_not_found(written)
    }

    async fn drop_finalizer(&self, uid: &str, node: &Node, name: &str) -> Result<(), Status> {
        self.change_metadata(uid, node, |metadata| {
            retain(metadata, "finalizers", |finalizer| {
                finalizer.as_str() != Some(name)
            });
        })
        .await
    }

    async fn drop_owners(&self, uid: &str, node: &Node, owners: &[String]) -> Result<(), Status> {
        self.change_metadata(uid, node, |metadata| {
            retain(metadata, "ownerReferences", |reference| {
                !owners
                    .iter()
                    .any(|owner| reference["uid"].as_str() == Some(owner))
            });
        })
        .await
    }

    async fn unblock(&self, uid: &str, node: &Node) -> Result<(), Status> {
        self.change_metadata(uid, node, |metadata| {
            let references = metadata
                .get_mut("ownerReferences")
                .and_then(Value::as_array_mut);
            for reference in references.into_iter().flatten() {
                reference["blockOwnerDeletion"] = Value::Bool(false);
            }
        })
        .await
    }

    async fn delete(&self, uid: &str, node: &Node, propagation: Propagation) -> Result<(), Status> {
        let registry = &self.context.registry;
        let (namespace, name) = (&node.key.namespace, &node.key.name);
        let stored = registry.store().get(&node.kind.store_key(namespace, name));
        if stored.is_some_and(|stored| stored.mod_revision != node.revision) {
            // It may have got another owner meanwhile: its change brings it back here.
            return Err(Status::new(
                Reason::Conflict,
                format!("{} has changed", node.key),
            ));
        }
        let options = DeleteOptions {
            uid: Some(uid.to_owned()),
            propagation,
            ..DeleteOptions::default()
        };
        tracing::debug!(kind = node.kind.kind, key = %node.key, "deleting: its owners are gone");
        let result = registry
            .delete_value(node.kind, namespace, name, &options, false)
            .await;
        super::ignore_not_found(result)
    }
}

/// Keeps the wanted entries of a list; an empty list goes.
fn retain(
    metadata: &mut serde_json::Map<String, Value>,
    field: &str,
    keep: impl Fn(&Value) -> bool,
) {
    if let Some(list) = metadata.get_mut(field).and_then(Value::as_array_mut) {
        list.retain(keep);
        if list.is_empty() {
            metadata.remove(field);
        }
    }
}

impl Controller for Collector {
    const NAME: &'static str = "garbage-collector";
    type Key = String;

    async fn reconcile(&self, uid: &String) -> Result<Option<Duration>, Status> {
        let graph = &self.context.caches.graph;
        let (node, action) = {
            let objects = graph.objects.read().unwrap_or_else(PoisonError::into_inner);
            let Some(node) = objects.nodes.get(uid) else {
                return Ok(None);
            };
            (node.clone(), objects.decide(uid))
        };
        match action {
            Action::Nothing => {}
            Action::Visit(uids) => graph.visit(uids),
            Action::Orphan { dependents } => {
                for dependent in &dependents {
                    let Some(dependent_node) = self.node(dependent) else {
                        continue;
                    };
                    let owners = std::slice::from_ref(uid);
                    self.drop_owners(dependent, &dependent_node, owners).await?;
                }
                self.drop_finalizer(uid, &node, ORPHAN).await?;
            }
            Action::Release => self.drop_finalizer(uid, &node, FOREGROUND).await?,
            Action::Forget { owners } => self.drop_owners(uid, &node, &owners).await?,
            Action::Delete {
                propagation,
                unblock: true,
            } => {
                // The write changes the revision: the deletion follows when it has been seen.
                if node
                    .owners
                    .iter()
                    .any(|owner| owner.block_owner_deletion == Some(true))
                {
                    self.unblock(uid, &node).await?;
                } else {
                    self.delete(uid, &node, propagation).await?;
                }
            }
            Action::Delete {
                propagation,
                unblock: false,
            } => {
                self.delete(uid, &node, propagation).await?;
            }
        }
        Ok(None)
    }
}

/// Starts the workers.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let queue = context.caches.graph.queue.clone();
    let controller = Collector {
        context: Arc::clone(context),
    };
    super::spawn_workers(controller, &queue, WORKER_COUNT, context, tasks, shutdown);
}

#[cfg(test)]
#[path = "garbage_tests.rs"]
mod tests;
