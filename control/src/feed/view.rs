//! What each node must know at the store's head: an index kept up by every change of the store.
//!
//! ```text
//!  change of /registry/...  ──► Index ──┬─► Latest: services, backends, node routes   (common: same bytes for all)
//!                                       ├─► pods of a node, the blobs they name       (private: by inventory)
//!                                       └─► Policies: those of its pods, their peers  (private: by difference)
//!  Cursor of a stream ──► Index::step ──► items + Commit(rev, digests) ──► next Cursor
//! ```
//! Pure: values in, values out. `V(R)` of a node is what [`Index::step`] gives to an empty cursor.
//!
//! Invariants: between two calls of [`Index::advance`] the state is exactly that of one revision; a
//! step runs to *now*, never to a revision in between; the private part is compared by inventory,
//! because a Secret enters a node's view by a binding and not by a change of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::OnceLock;

use bytes::Bytes;
use gantry_api::digest::Digest;
use gantry_api::k8s_openapi::api::core::v1 as core;
use gantry_api::k8s_openapi::api::discovery::v1::EndpointSlice;
use gantry_api::proto;
use gantry_api::proto::item::Value;
use gantry_api::rules::{self, Rule};
use prost::Message as _;
use serde::de::DeserializeOwned;

use super::join::{self, CLAIMS, EndpointId, Name, NodeFacts, PodFacts, PodOnNode, SliceFacts};
use super::latest::{Encoded, Latest, TOMBSTONES_MAX};
use super::policies::{self, Policies};
use super::programmed::{Serving, Turn};

const VOLUMES: &str = "persistentvolumes";
const SECRETS: &str = "secrets";

/// Plural, namespace, name.
type BlobName = (String, String, String);

/// An object that travels as JSON; encoded when the first stream asks for it.
struct Document {
    rev: u64,
    json: Bytes,
    encoded: OnceLock<Encoded>,
}

impl Document {
    fn new(rev: u64, json: &Bytes) -> Self {
        Self {
            rev,
            json: json.clone(),
            encoded: OnceLock::new(),
        }
    }

    fn encoded(&self, key: &str, value: fn(Bytes) -> Value) -> &Encoded {
        self.encoded
            .get_or_init(|| Encoded::new(key, self.rev, value(self.json.clone())))
    }
}

struct PodSlot {
    facts: PodFacts,
    document: Document,
}

/// How far one stream has come.
#[derive(Clone, Debug, Default)]
pub(super) struct Cursor {
    /// The revision of the common part that the agent holds; none: it needs everything.
    pub(super) common: Option<u64>,
    /// What it holds of its pods and blobs: key, the object's own revision.
    pub(super) private: BTreeMap<String, u64>,
    /// Digest of `private` and the revision of the last look at it; none: not looked at yet.
    private_seen: Option<(u64, u64)>,
    /// The rest of the private part: policies and their peers.
    policies: policies::Seen,
    /// A first commit is owed even when nothing changed.
    welcomed: bool,
}

impl Cursor {
    /// A stream whose agent holds the common part at `common` and this private inventory.
    pub(super) fn resume(common: Option<u64>, private: BTreeMap<String, u64>) -> Self {
        let (policies, private) = private
            .into_iter()
            .partition(|(key, _)| policies::is_ours(key));
        Self {
            common,
            private,
            private_seen: None,
            policies: policies::Seen::resume(policies),
            welcomed: false,
        }
    }
}

/// One batch and the commit that ends it.
#[derive(Debug)]
pub(super) struct Step {
    /// Encoded items: shared, not copied.
    pub(super) items: Vec<Bytes>,
    pub(super) commit: proto::Commit,
}

/// See the module.
pub(super) struct Index {
    rev: u64,
    common: Latest,
    /// Value: spec.publishNotReadyAddresses.
    services: BTreeMap<Name, bool>,
    slices: BTreeMap<Name, SliceFacts>,
    slices_by_service: BTreeMap<Name, BTreeSet<Name>>,
    slices_by_pod: BTreeMap<Name, BTreeSet<Name>>,
    pods: BTreeMap<Name, PodSlot>,
    pods_by_node: BTreeMap<String, BTreeSet<Name>>,
    blobs: BTreeMap<BlobName, Document>,
    blob_users: BTreeMap<BlobName, BTreeSet<Name>>,
    /// The volume of each claim that has one, and the other way round.
    claim_volumes: BTreeMap<BlobName, String>,
    volume_claims: BTreeMap<String, BTreeSet<BlobName>>,
    /// The Secrets that a volume's driver is given, and the other way round.
    volume_secrets: BTreeMap<String, BTreeSet<Name>>,
    secret_volumes: BTreeMap<Name, BTreeSet<String>>,
    nodes: BTreeMap<String, NodeFacts>,
    policies: Policies,
    serving: Serving,
    /// The revision of the last change of each node's private part. Kept when the node goes: a stream
    /// that is still open must see that its pods have gone too.
    private_changed_at: BTreeMap<String, u64>,
    touched: BTreeSet<String>,
}

impl Index {
    /// Empty. It knows of no deletion at or before `start_rev`.
    pub(super) fn new(start_rev: u64) -> Self {
        Self::with_tombstones(start_rev, TOMBSTONES_MAX)
    }

    fn with_tombstones(start_rev: u64, tombstones_max: usize) -> Self {
        Self {
            rev: start_rev,
            common: Latest::new(start_rev, tombstones_max),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            slices_by_service: BTreeMap::new(),
            slices_by_pod: BTreeMap::new(),
            pods: BTreeMap::new(),
            pods_by_node: BTreeMap::new(),
            blobs: BTreeMap::new(),
            blob_users: BTreeMap::new(),
            claim_volumes: BTreeMap::new(),
            volume_claims: BTreeMap::new(),
            volume_secrets: BTreeMap::new(),
            secret_volumes: BTreeMap::new(),
            nodes: BTreeMap::new(),
            policies: Policies::default(),
            serving: Serving::default(),
            private_changed_at: BTreeMap::new(),
            touched: BTreeSet::new(),
        }
    }

    /// The revision of this state.
    pub(super) fn rev(&self) -> u64 {
        self.rev
    }

    /// The last revision that changed the common part, or may have: what was deleted before the control plane
    /// started is not known.
    pub(super) fn common_rev(&self) -> u64 {
        self.common.changed_at()
    }

    /// A Node object, as far as the feed needs it.
    pub(super) fn node(&self, name: &str) -> Option<&NodeFacts> {
        self.nodes.get(name)
    }

    /// Every registered node, with whether it was declared dead.
    pub(super) fn nodes(&self) -> impl Iterator<Item = (&str, bool)> {
        self.nodes
            .iter()
            .map(|(name, facts)| (name.as_str(), facts.dead))
    }

    /// The state is now that of `rev`: every change of it has been applied. Returns the nodes whose
    /// private part changed since the last call.
    pub(super) fn advance(&mut self, rev: u64) -> BTreeSet<String> {
        self.rev = self.rev.max(rev);
        let mut touched = std::mem::take(&mut self.touched);
        touched.append(&mut self.policies.take_touched());
        touched
    }

    /// The Services that have got their first serving backend, or lost the last, since the last call.
    pub(super) fn take_turns(&mut self) -> BTreeMap<Name, Turn> {
        self.serving.take()
    }

    /// The cluster's DNS, which policies can name as a peer.
    pub(super) fn add_resolver(&mut self, address: IpAddr) {
        self.policies.add_resolver(address, self.rev);
    }

    /// Takes one key of the store: its new value, or none when it was deleted, at `rev`.
    /// Keys of kinds that the feed does not carry are ignored.
    pub(super) fn apply(&mut self, key: &str, value: Option<&Bytes>, rev: u64) {
        let mut parts = key.trim_start_matches("/registry/").splitn(3, '/');
        let (Some(plural), Some(first)) = (parts.next(), parts.next()) else {
            return;
        };
        match (plural, parts.next()) {
            ("nodes", None) => self.apply_node(first, parse(key, value), rev),
            ("services", Some(name)) => {
                self.apply_service(&(first.into(), name.into()), parse(key, value), rev);
            }
            ("endpointslices", Some(name)) => {
                self.apply_slice((first.into(), name.into()), parse(key, value), rev);
            }
            ("pods", Some(name)) => {
                let pod: Option<core::Pod> = parse(key, value);
                let name = (first.into(), name.into());
                self.policies.apply_pod(&name, pod.as_ref(), rev);
                let slot = pod.zip(value).map(|(pod, json)| PodSlot {
                    facts: PodFacts::new(&pod),
                    document: Document::new(rev, json),
                });
                self.apply_pod(name, slot, rev);
            }
            ("namespaces", None) => {
                self.policies.apply_namespace(first, parse(key, value), rev);
            }
            ("networkpolicies", Some(name)) => {
                let policy = parse(key, value);
                let name = (first.into(), name.into());
                self.policies.apply_policy(&name, policy.as_ref(), rev);
            }
            (VOLUMES, None) => {
                self.apply_volume(first, parse(key, value));
                self.apply_blob((plural.into(), String::new(), first.into()), value, rev);
            }
            (CLAIMS, Some(name)) => {
                let claim = (plural.into(), first.into(), name.into());
                self.apply_claim(&claim, parse(key, value));
                self.apply_blob(claim, value, rev);
            }
            ("configmaps" | SECRETS, Some(name)) => {
                self.apply_blob((plural.into(), first.into(), name.into()), value, rev);
            }
            _ => {}
        }
    }

    /// Brings the index to a snapshot at `rev` by the difference: what is not in it is deleted.
    pub(super) fn replace(&mut self, entries: &BTreeMap<&str, (&Bytes, u64)>, rev: u64) {
        let named = |plural: &str, name: &Name| format!("/registry/{plural}/{}/{}", name.0, name.1);
        let nodes = self
            .nodes
            .keys()
            .map(|name| format!("/registry/nodes/{name}"));
        let services = self.services.keys().map(|name| named("services", name));
        let slices = self.slices.keys().map(|name| named("endpointslices", name));
        let pods = self.pods.keys().map(|name| named("pods", name));
        let blobs = self
            .blobs
            .keys()
            .map(|(plural, namespace, name)| match namespace.as_str() {
                "" => format!("/registry/{plural}/{name}"),
                _ => named(plural, &(namespace.clone(), name.clone())),
            });
        let policies = self
            .policies
            .held()
            .map(|(plural, namespace, name)| match namespace {
                "" => format!("/registry/{plural}/{name}"),
                _ => format!("/registry/{plural}/{namespace}/{name}"),
            });
        let held = nodes.chain(services).chain(slices).chain(pods);
        let held = held.chain(blobs).chain(policies);
        let gone: Vec<String> = held.filter(|key| !entries.contains_key(&**key)).collect();
        for key in gone {
            self.apply(&key, None, rev);
        }
        for (key, (value, mod_revision)) in entries {
            self.apply(key, Some(value), *mod_revision);
        }
    }

    /// How many pods are bound to a node.
    pub(super) fn pod_count(&self, node: &str) -> usize {
        self.pods_by_node.get(node).map_or(0, |names| names.len())
    }

    /// Their UIDs.
    pub(super) fn pod_uids(&self, node: &str) -> BTreeSet<&str> {
        let names = self.pods_by_node.get(node).into_iter().flatten();
        names
            .filter_map(|name| Some(self.pods.get(name)?.facts.uid.as_str()))
            .collect()
    }

    fn apply_service(&mut self, name: &Name, service: Option<core::Service>, rev: u64) {
        let key = format!("service/{}/{}", name.0, name.1);
        let value = service.as_ref().map(join::service);
        match &value {
            Some(value) => self.services.insert(name.clone(), value.publish_not_ready),
            None => self.services.remove(name),
        };
        self.common.set(
            &key,
            value.map(|v| Encoded::new(&key, 0, Value::Service(v))),
            rev,
        );
        for slice in self
            .slices_by_service
            .get(name)
            .cloned()
            .unwrap_or_default()
        {
            let members = self.slices.get(&slice).map(|slice| &slice.endpoints);
            let ids: Vec<_> = members
                .into_iter()
                .flatten()
                .map(|(id, _)| id.clone())
                .collect();
            ids.iter()
                .for_each(|id| self.refresh_backend(name, id, rev));
        }
    }

    fn apply_slice(&mut self, name: Name, slice: Option<EndpointSlice>, rev: u64) {
        let new = slice.as_ref().and_then(SliceFacts::new);
        let old = self.slices.remove(&name);
        if old == new {
            if let Some(old) = old {
                self.slices.insert(name, old);
            }
            return;
        }
        let mut stale = BTreeSet::new();
        if let Some(old) = old {
            remove_from(&mut self.slices_by_service, &old.service, &name);
            for id in old.endpoints.keys() {
                if let Some(pod) = pod_name(id) {
                    remove_from(&mut self.slices_by_pod, &pod, &name);
                }
                stale.insert((old.service.clone(), id.clone()));
            }
        }
        if let Some(new) = new {
            self.slices_by_service
                .entry(new.service.clone())
                .or_default()
                .insert(name.clone());
            for id in new.endpoints.keys() {
                if let Some(pod) = pod_name(id) {
                    self.slices_by_pod
                        .entry(pod)
                        .or_default()
                        .insert(name.clone());
                }
                stale.insert((new.service.clone(), id.clone()));
            }
            self.slices.insert(name, new);
        }
        for (service, id) in &stale {
            self.refresh_backend(service, id, rev);
        }
    }

    fn apply_pod(&mut self, name: Name, new: Option<PodSlot>, rev: u64) {
        let new_facts = new.as_ref().map(|slot| slot.facts.clone());
        let old = match new {
            Some(slot) => self.pods.insert(name.clone(), slot),
            None => self.pods.remove(&name),
        };
        if let Some(old) = old {
            remove_from(&mut self.pods_by_node, &old.facts.node, &name);
            for (plural, blob) in &old.facts.blobs {
                let blob = ((*plural).into(), name.0.clone(), blob.clone());
                remove_from(&mut self.blob_users, &blob, &name);
            }
            self.touch(&old.facts.node, rev);
        }
        if let Some(new) = new_facts.filter(|new| !new.node.is_empty()) {
            self.pods_by_node
                .entry(new.node.clone())
                .or_default()
                .insert(name.clone());
            for (plural, blob) in new.blobs {
                let blob = (plural.into(), name.0.clone(), blob);
                self.blob_users
                    .entry(blob)
                    .or_default()
                    .insert(name.clone());
            }
            self.touch(&new.node, rev);
        }
        self.refresh_pod(&name, rev);
    }

    /// Which volume a claim has, so that a pod's node gets both.
    fn apply_claim(&mut self, name: &BlobName, claim: Option<core::PersistentVolumeClaim>) {
        let volume = claim.and_then(|claim| claim.spec?.volume_name);
        if let Some(old) = self.claim_volumes.remove(name) {
            remove_from(&mut self.volume_claims, &old, name);
        }
        if let Some(volume) = volume.filter(|volume| !volume.is_empty()) {
            self.volume_claims
                .entry(volume.clone())
                .or_default()
                .insert(name.clone());
            self.claim_volumes.insert(name.clone(), volume);
        }
    }

    /// Which Secrets go with a volume to the nodes that use it.
    fn apply_volume(&mut self, name: &str, volume: Option<core::PersistentVolume>) {
        let name = name.to_owned();
        for secret in self.volume_secrets.remove(&name).into_iter().flatten() {
            remove_from(&mut self.secret_volumes, &secret, &name);
        }
        let secrets = volume.as_ref().map(join::volume_secrets);
        for secret in secrets.into_iter().flatten() {
            let volumes = self.secret_volumes.entry(secret.clone()).or_default();
            volumes.insert(name.clone());
            let secrets = self.volume_secrets.entry(name.clone()).or_default();
            secrets.insert(secret);
        }
    }

    /// The pods that use an object: a volume is used through its claims, and a Secret also through
    /// the volumes that name it.
    fn users_of(&self, name: &BlobName) -> BTreeSet<Name> {
        if name.0 == VOLUMES {
            return self.volume_users(&name.2).cloned().collect();
        }
        let mut users = self.blob_users.get(name).cloned().unwrap_or_default();
        if name.0 == SECRETS {
            let secret = (name.1.clone(), name.2.clone());
            let volumes = self.secret_volumes.get(&secret).into_iter().flatten();
            users.extend(
                volumes
                    .flat_map(|volume| self.volume_users(volume))
                    .cloned(),
            );
        }
        users
    }

    fn volume_users(&self, volume: &str) -> impl Iterator<Item = &Name> {
        let claims = self.volume_claims.get(volume).into_iter().flatten();
        claims
            .filter_map(|claim| self.blob_users.get(claim))
            .flatten()
    }

    /// A claim's volume, and the Secrets that go with that.
    fn of_claim(&self, claim: &BlobName) -> Vec<BlobName> {
        let Some(volume) = self.claim_volumes.get(claim) else {
            return Vec::new();
        };
        let secrets = self.volume_secrets.get(volume).into_iter().flatten();
        let secrets =
            secrets.map(|(namespace, name)| (SECRETS.to_owned(), namespace.clone(), name.clone()));
        let volume = (VOLUMES.to_owned(), String::new(), volume.clone());
        std::iter::once(volume).chain(secrets).collect()
    }

    fn apply_blob(&mut self, name: BlobName, json: Option<&Bytes>, rev: u64) {
        for pod in self.users_of(&name) {
            if let Some(node) = self.pods.get(&pod).map(|pod| pod.facts.node.clone()) {
                self.touch(&node, rev);
            }
        }
        match json {
            Some(json) => self.blobs.insert(name, Document::new(rev, json)),
            None => self.blobs.remove(&name),
        };
    }

    fn apply_node(&mut self, name: &str, node: Option<core::Node>, rev: u64) {
        let new = node.as_ref().map(NodeFacts::new);
        let key = format!("node/{name}");
        let route = new.as_ref().and_then(NodeFacts::route);
        self.common.set(
            &key,
            route.map(|route| Encoded::new(&key, 0, Value::Node(route))),
            rev,
        );
        let old = match new {
            Some(new) => self.nodes.insert(name.into(), new),
            None => self.nodes.remove(name),
        };
        if old.as_ref() != self.nodes.get(name) {
            for pod in self.pods_by_node.get(name).cloned().unwrap_or_default() {
                self.refresh_pod(&pod, rev);
            }
        }
    }

    fn touch(&mut self, node: &str, rev: u64) {
        if !node.is_empty() {
            self.private_changed_at.insert(node.into(), rev);
            self.touched.insert(node.into());
        }
    }

    /// Joins every backend that names this pod anew.
    fn refresh_pod(&mut self, pod: &Name, rev: u64) {
        let first = EndpointId::Pod {
            namespace: pod.0.clone(),
            name: pod.1.clone(),
            uid: String::new(),
        };
        let mut stale = BTreeSet::new();
        for slice in self.slices_by_pod.get(pod).into_iter().flatten() {
            let Some(slice) = self.slices.get(slice) else {
                continue;
            };
            let ids = slice.endpoints.range(&first..).map(|(id, _)| id);
            for id in ids.take_while(|id| pod_name(id).as_ref() == Some(pod)) {
                stale.insert((slice.service.clone(), id.clone()));
            }
        }
        for (service, id) in &stale {
            self.refresh_backend(service, id, rev);
        }
    }

    fn refresh_backend(&mut self, service: &Name, id: &EndpointId, rev: u64) {
        let key = format!("backend/{}/{}/{}", service.0, service.1, id.text());
        let value = self.join_backend(service, id);
        // A slice may pair this UID with the name of another pod: such an endpoint is nobody, and
        // its end is not the end of the pod that has the UID.
        if value.is_none() && self.common.get(&key).is_some_and(|held| !is_of(held, id)) {
            return;
        }
        self.serving.note(service, &key, value.as_ref(), rev);
        self.common.set(
            &key,
            value.map(|v| Encoded::new(&key, 0, Value::Backend(v))),
            rev,
        );
    }

    fn join_backend(&self, service: &Name, id: &EndpointId) -> Option<proto::Backend> {
        let publish_not_ready = *self.services.get(service)?;
        let slices = self.slices_by_service.get(service)?;
        let members: Vec<_> = slices
            .iter()
            .filter_map(|slice| self.slices.get(slice))
            .filter_map(|slice| Some((slice, slice.endpoints.get(id)?)))
            .collect();
        let pod = match id {
            EndpointId::Address { .. } => None,
            EndpointId::Pod {
                namespace,
                name,
                uid,
            } => {
                let pod = self.pods.get(&(namespace.clone(), name.clone()));
                pod.map(|slot| &slot.facts)
                    .filter(|facts| facts.uid == *uid)
                    .map(|pod| PodOnNode {
                        pod,
                        node: self.nodes.get(&pod.node),
                    })
            }
        };
        join::backend(id, &members, pod.as_ref(), publish_not_ready)
    }

    /// The private part of a node: key, the object's own revision, the item.
    fn private(&self, node: &str) -> BTreeMap<String, (u64, &Encoded)> {
        let mut items = BTreeMap::new();
        for name in self.pods_by_node.get(node).into_iter().flatten() {
            let Some(slot) = self.pods.get(name) else {
                continue;
            };
            let key = format!("pod/{}", slot.facts.uid);
            let encoded = slot.document.encoded(&key, Value::PodJson);
            items.insert(key, (slot.document.rev, encoded));
            for (plural, blob) in &slot.facts.blobs {
                let blob = ((*plural).to_owned(), name.0.clone(), blob.clone());
                let more = self.of_claim(&blob);
                for blob in std::iter::once(blob).chain(more) {
                    let Some(document) = self.blobs.get(&blob) else {
                        continue;
                    };
                    let key = format!("blob/{}/{}/{}", blob.0, blob.1, blob.2);
                    let encoded = document.encoded(&key, Value::BlobJson);
                    items.insert(key, (document.rev, encoded));
                }
            }
        }
        items
    }

    /// Where a stream may go on whose agent holds the common part at `rev` with `digest`.
    /// None: it needs everything (it is from the future, or older than the tombstones).
    pub(super) fn resume_at(&self, rev: u64, digest: u64) -> Option<u64> {
        if rev == 0 || rev > self.rev {
            return None;
        }
        if digest == self.common.digest() {
            return Some(self.rev); // the same content, whatever happened in between
        }
        (rev >= self.common.complete_since()).then_some(rev)
    }

    /// What brings `cursor` to now, and moves it there. None: nothing to say.
    pub(super) fn step(&self, node: &str, cursor: &mut Cursor) -> Option<Step> {
        let mut items: Vec<Bytes> = match cursor.common {
            None => self.common.all().collect(),
            Some(rev) => self.common.since(rev).collect(),
        };
        let common_changed = !items.is_empty();
        let changed_at = self.private_changed_at.get(node).copied().unwrap_or(0);
        let private_digest = match cursor.private_seen {
            Some((digest, seen_at)) if seen_at >= changed_at => digest,
            _ => self.step_private(node, cursor, &mut items),
        };
        cursor.private_seen = Some((private_digest, self.rev));
        let seen = &mut cursor.policies;
        let policy_digest = self.policies.step(node, seen, self.rev, &mut items);
        let private_digest: Digest = [private_digest, policy_digest].into_iter().collect();
        cursor.common = Some(self.rev);
        if rules::is_off(Rule::BatchIsWhole) && cursor.welcomed {
            items.pop();
        }
        if items.is_empty() && cursor.welcomed {
            return None;
        }
        cursor.welcomed = true;
        let commit = proto::Commit {
            rev: self.rev,
            common_digest: self.common.digest(),
            private_digest: private_digest.value(),
            want_ack: common_changed,
        };
        Some(Step { items, commit })
    }

    fn step_private(&self, node: &str, cursor: &mut Cursor, items: &mut Vec<Bytes>) -> u64 {
        let wanted = self.private(node);
        let gone = cursor
            .private
            .keys()
            .filter(|key| !wanted.contains_key(*key));
        items.extend(gone.map(|key| Encoded::deletion(key)));
        for (key, (rev, encoded)) in &wanted {
            if cursor.private.get(key) != Some(rev) {
                items.push(encoded.bytes.clone());
            }
        }
        let digest: Digest = wanted.values().map(|(_, encoded)| encoded.hash).collect();
        cursor.private = wanted
            .into_iter()
            .map(|(key, (rev, _))| (key, rev))
            .collect();
        digest.value()
    }
}

fn pod_name(id: &EndpointId) -> Option<Name> {
    match id {
        EndpointId::Pod {
            namespace, name, ..
        } => Some((namespace.clone(), name.clone())),
        EndpointId::Address { .. } => None,
    }
}

/// Whether a published backend is the one of this endpoint.
fn is_of(held: &Encoded, id: &EndpointId) -> bool {
    let Some((namespace, name)) = pod_name(id) else {
        return true;
    };
    match proto::Item::decode(held.bytes.clone()).map(|item| item.value) {
        Ok(Some(Value::Backend(b))) => b.pod_namespace == namespace && b.pod_name == name,
        _ => true,
    }
}

fn remove_from<K: Ord, V: Ord>(map: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = map.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            map.remove(key);
        }
    }
}

/// An object of the store; what does not parse was written by another version and is left out.
fn parse<T: DeserializeOwned>(key: &str, value: Option<&Bytes>) -> Option<T> {
    match serde_json::from_slice(value?) {
        Ok(object) => Some(object),
        Err(error) => {
            tracing::warn!(key, %error, "the feed leaves out an object that it cannot read");
            None
        }
    }
}

#[cfg(test)]
mod tests;
