//! What this node holds of the store, and how a batch becomes the next revision of it. Pure.
//!
//! ```text
//! Batch, Batch, Commit ──► prepare: the difference, the digests it would lead to
//!                             │ equal to the Commit's          │ different
//!                             ▼                                ▼
//!                   (written to disk) ──► apply ──► View    Mismatch: discard, ask for everything
//! ```
//! Invariants: the content is V(R) of one R at any time; what did not change keeps its `Arc`, also
//! across a full copy, so readers tell by pointer that there is nothing to do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use gantry_api::digest::{Digest, item_hash};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::proto;
use gantry_api::proto::item::Value;
use gantry_api::rules::{self, Rule};
use imbl::OrdMap;
use prost::Message as _;

use super::secrets::{self, Withheld};
use crate::ids::PodUid;
use crate::policy::PolicyName;
use crate::view::{BlobKey, ServiceName, Settings, View};

/// Why a batch was not taken. The way on is always the same: ask for everything.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Mismatch {
    /// An element of the batch is no item.
    #[error("an item of {0} bytes cannot be decoded")]
    Item(usize),
    /// The content would not be what the control plane has.
    #[error("the {part} part would have digest {got:016x} at revision {rev}, want {want:016x}")]
    Digest {
        /// `common` or `private`.
        part: &'static str,
        /// The Commit's revision.
        rev: u64,
        /// What the batch leads to.
        got: u64,
        /// What the Commit says.
        want: u64,
    },
    /// Within one lineage revisions never fall.
    #[error("commit {got} is older than what this node holds, {held}")]
    StepBack {
        /// The Commit's revision.
        got: u64,
        /// What is held.
        held: u64,
    },
}

/// What is kept of a key beside its value in the view.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Held {
    hash: u64,
    rev: u64,
}

/// A batch that was checked against its Commit and can be applied without failing.
#[derive(Debug)]
pub(super) struct Prepared {
    /// Only what differs from the content: the new item, or none to remove the key.
    changes: BTreeMap<String, Option<(Held, proto::Item)>>,
    common: Digest,
    private: Digest,
    rev: u64,
}

impl Prepared {
    /// Whether a Secret comes, changes or goes.
    pub(super) fn changes_secrets(&self) -> bool {
        let from = self.changes.range(secrets::PREFIX.to_owned()..).next();
        from.is_some_and(|(key, _)| key.starts_with(secrets::PREFIX))
    }

    /// The pods that this batch adds or changes.
    pub(super) fn pods(&self) -> BTreeSet<PodUid> {
        let uids = self
            .changes
            .keys()
            .filter_map(|key| key.strip_prefix("pod/"));
        uids.filter_map(|uid| PodUid::new(uid).ok()).collect()
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Content {
    entries: BTreeMap<String, Held>,
    common: Digest,
    private: Digest,
    view: View,
    /// Pods of an earlier history that the control plane does not know: no part of the content, but of the
    /// view until their time is over.
    lingering: BTreeMap<PodUid, Arc<Pod>>,
}

fn is_private(key: &str) -> bool {
    let private = ["pod/", "blob/", "policy/", "peer/"];
    private.iter().any(|prefix| key.starts_with(prefix))
}

impl Content {
    /// The revision held; 0: none.
    pub(super) fn rev(&self) -> u64 {
        self.view.rev
    }

    /// Digest of the common part held.
    pub(super) fn common_digest(&self) -> u64 {
        self.common.value()
    }

    /// The inventory of the private part for Hello.
    pub(super) fn private_keys(&self) -> Vec<proto::PrivateKey> {
        let private = self.entries.iter().filter(|(key, _)| is_private(key));
        private
            .map(|(key, held)| proto::PrivateKey {
                key: key.clone(),
                rev: held.rev,
            })
            .collect()
    }

    /// The state as readers see it; cheap: the maps are shared.
    pub(super) fn view(&self) -> Arc<View> {
        let mut view = self.view.clone();
        if !self.lingering.is_empty() {
            let pods = Arc::make_mut(&mut view.pods);
            for (uid, pod) in &self.lingering {
                pods.entry(uid.clone()).or_insert_with(|| pod.clone());
            }
        }
        Arc::new(view)
    }

    /// Another history has taken the place of the one that `before` is of: of its pods those that the
    /// control plane does not know (`unknown`) stay in the view. Returns how many.
    pub(super) fn let_linger(&mut self, before: &View, unknown: &[String]) -> usize {
        let unknown = unknown.iter().filter_map(|uid| PodUid::new(uid).ok());
        let known = |uid: &PodUid| self.view.pods.contains_key(uid);
        self.lingering = unknown
            .filter(|uid| !known(uid))
            .filter_map(|uid| before.pods.get(&uid).map(|pod| (uid, pod.clone())))
            .collect();
        self.lingering.len()
    }

    /// The time of those pods is over. Returns whether there were any.
    pub(super) fn end_lingering(&mut self) -> bool {
        !std::mem::take(&mut self.lingering).is_empty()
    }

    /// The pods that this node has, for Hello.
    pub(super) fn held_pods(&self) -> Vec<proto::HeldPod> {
        let lingering = self.lingering.iter();
        let pods = self.view.pods.iter().chain(lingering);
        pods.map(|(uid, pod)| proto::HeldPod {
            uid: uid.as_str().to_owned(),
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
        })
        .collect()
    }

    /// Takes the cluster's settings; they are no part of the digest.
    pub(super) fn set_settings(&mut self, settings: Settings) {
        if *self.view.settings != settings {
            self.view.settings = Arc::new(settings);
        }
    }

    /// Checks what `items` would lead to against `commit`.
    pub(super) fn prepare(
        &self,
        full: bool,
        same_lineage: bool,
        items: &[Bytes],
        commit: &proto::Commit,
    ) -> Result<Prepared, Mismatch> {
        self.prepare_with(full, same_lineage, items, &[], commit)
    }

    /// The same for a commit from the disk, of which some Secrets may be missing: they count in the
    /// digest. [`Content::forget_missing`] follows.
    ///
    /// * `full` – the items are everything; else they are the difference to the content held.
    /// * `same_lineage` – the content held is of the commit's lineage, so revisions may not fall.
    pub(super) fn prepare_with(
        &self,
        full: bool,
        same_lineage: bool,
        items: &[Bytes],
        missing: &[Withheld],
        commit: &proto::Commit,
    ) -> Result<Prepared, Mismatch> {
        if same_lineage && commit.rev < self.rev() {
            return Err(Mismatch::StepBack {
                got: commit.rev,
                held: self.rev(),
            });
        }
        let mut wanted: BTreeMap<String, Option<(Held, proto::Item)>> = BTreeMap::new();
        if full {
            wanted.extend(self.entries.keys().map(|key| (key.clone(), None)));
        }
        for bytes in items {
            // A copy of its own: a slice would keep the whole network buffer alive.
            let item = proto::Item::decode(Bytes::copy_from_slice(bytes))
                .map_err(|_| Mismatch::Item(bytes.len()))?;
            let value = match item.value {
                None | Some(Value::Deleted(_)) => None,
                Some(_) => Some((
                    Held {
                        hash: item_hash(bytes),
                        rev: item.rev,
                    },
                    item.clone(),
                )),
            };
            wanted.insert(item.key, value);
        }
        for secret in missing {
            let (hash, rev) = (secret.hash, secret.rev);
            let item = proto::Item {
                key: secret.key.clone(),
                rev,
                value: None,
            };
            wanted.insert(secret.key.clone(), Some((Held { hash, rev }, item)));
        }
        let (mut common, mut private) = (self.common, self.private);
        wanted.retain(|key, new| {
            let old = self.entries.get(key);
            let digest = if is_private(key) {
                &mut private
            } else {
                &mut common
            };
            old.iter().for_each(|old| digest.toggle(old.hash));
            new.iter().for_each(|(new, _)| digest.toggle(new.hash));
            old.map(|old| old.hash) != new.as_ref().map(|(new, _)| new.hash)
        });
        check("common", commit.rev, common, commit.common_digest)?;
        check("private", commit.rev, private, commit.private_digest)?;
        Ok(Prepared {
            changes: wanted,
            common,
            private,
            rev: commit.rev,
        })
    }

    /// The commit of a batch that is everything, for [`super::read_untrusted`].
    pub(super) fn commit_of(&self, items: &[Bytes]) -> proto::Commit {
        let mut hashes = BTreeMap::new();
        for bytes in items {
            if let Ok(item) = proto::Item::decode(bytes.clone()) {
                let is_there = !matches!(item.value, None | Some(Value::Deleted(_)));
                hashes.insert(item.key, is_there.then(|| item_hash(bytes)));
            }
        }
        let digest = |of_private| {
            let hashes = hashes
                .iter()
                .filter(|(key, _)| is_private(key) == of_private);
            let digest: Digest = hashes.filter_map(|(_, hash)| *hash).collect();
            digest.value()
        };
        proto::Commit {
            rev: self.rev() + 1,
            common_digest: digest(false),
            private_digest: digest(true),
            want_ack: false,
        }
    }

    /// The hashes of the Secrets held.
    pub(super) fn secret_hashes(&self) -> BTreeSet<u64> {
        self.secrets().map(|(_, held)| held.hash).collect()
    }

    fn secrets(&self) -> impl Iterator<Item = (&String, &Held)> {
        let from = self.entries.range(secrets::PREFIX.to_owned()..);
        from.take_while(|(key, _)| key.starts_with(secrets::PREFIX))
    }

    /// Takes out the Secrets whose value was not found: they are asked for again.
    pub(super) fn forget_missing(&mut self) {
        let held = |key: &str| match Key::parse(key) {
            Some(Key::Blob(blob)) => self.view.blobs.contains_key(&blob),
            _ => false,
        };
        let missing: Vec<_> = self
            .secrets()
            .filter(|(key, _)| !held(key))
            .map(|(key, held)| (key.clone(), held.hash))
            .collect();
        for (key, hash) in missing {
            self.entries.remove(&key);
            self.private.toggle(hash);
        }
    }

    /// Makes a prepared batch the content. Returns the keys whose value could not be understood:
    /// they count in the digest and are missing in the view.
    pub(super) fn apply(&mut self, prepared: Prepared) -> Vec<String> {
        let mut unreadable = Vec::new();
        for (key, new) in prepared.changes {
            match new {
                None => {
                    self.entries.remove(&key);
                    remove_from_view(&mut self.view, &key);
                }
                Some((held, item)) => {
                    if insert_into_view(&mut self.view, &key, item).is_none() {
                        remove_from_view(&mut self.view, &key);
                        unreadable.push(key.clone());
                    }
                    self.entries.insert(key, held);
                }
            }
        }
        self.common = prepared.common;
        self.private = prepared.private;
        self.view.rev = prepared.rev;
        unreadable
    }
}

fn check(part: &'static str, rev: u64, got: Digest, want: u64) -> Result<(), Mismatch> {
    let got = got.value();
    if got == want || rules::is_off(Rule::Digest) {
        Ok(())
    } else {
        Err(Mismatch::Digest {
            part,
            rev,
            got,
            want,
        })
    }
}

/// A key of the feed, taken apart.
enum Key {
    Service(ServiceName),
    Backend(ServiceName, String),
    Node(String),
    Pod(PodUid),
    Blob(BlobKey),
    Policy(PolicyName),
    /// The set, and `namespace/name` of the pod in it.
    Peer(String, String),
}

impl Key {
    fn parse(key: &str) -> Option<Self> {
        let (kind, rest) = key.split_once('/')?;
        let mut parts = rest.splitn(3, '/').map(str::to_owned);
        let first = parts.next()?;
        Some(match kind {
            "service" => Self::Service(ServiceName {
                namespace: first,
                name: parts.next()?,
            }),
            "backend" => {
                let service = ServiceName {
                    namespace: first,
                    name: parts.next()?,
                };
                Self::Backend(service, parts.next()?)
            }
            "node" => Self::Node(first),
            "pod" => Self::Pod(PodUid::new(&first).ok()?),
            "blob" => Self::Blob(BlobKey {
                plural: first,
                namespace: parts.next()?,
                name: parts.next()?,
            }),
            "policy" => Self::Policy(PolicyName {
                namespace: first,
                name: parts.next()?,
            }),
            "peer" => Self::Peer(first, format!("{}/{}", parts.next()?, parts.next()?)),
            _ => return None,
        })
    }
}

/// None: the key or the value is not understood.
fn insert_into_view(view: &mut View, key: &str, item: proto::Item) -> Option<()> {
    match (Key::parse(key)?, item.value?) {
        (Key::Service(name), Value::Service(service)) => {
            Arc::make_mut(&mut view.services).insert(name, Arc::new(service));
        }
        (Key::Backend(name, id), Value::Backend(backend)) => {
            let backends = Arc::make_mut(&mut view.backends).entry(name).or_default();
            Arc::make_mut(backends).insert(id, Arc::new(backend));
        }
        (Key::Node(name), Value::Node(route)) => {
            Arc::make_mut(&mut view.nodes).insert(name, Arc::new(route));
        }
        (Key::Pod(uid), Value::PodJson(json)) => {
            let decoded: Pod = serde_json::from_slice(&json).ok()?;
            // A copy has no room to spare, which is half of what was decoded; it is kept for long.
            Arc::make_mut(&mut view.pods).insert(uid, Arc::new(decoded.clone()));
        }
        (Key::Blob(blob), Value::BlobJson(json)) => {
            let object: serde_json::Value = serde_json::from_slice(&json).ok()?;
            Arc::make_mut(&mut view.blobs).insert(blob, Arc::new(object));
        }
        (Key::Policy(name), Value::Policy(policy)) => {
            Arc::make_mut(&mut view.policies).insert(name, Arc::new(policy));
        }
        (Key::Peer(set, pod), Value::Peer(peer)) => {
            let members = Arc::make_mut(&mut view.peers).entry(set).or_default();
            Arc::make_mut(members).insert(pod, Arc::new(peer));
        }
        _ => return None,
    }
    Some(())
}

fn remove_from_view(view: &mut View, key: &str) {
    match Key::parse(key) {
        Some(Key::Service(name)) => {
            remove(&mut view.services, &name);
        }
        Some(Key::Backend(name, id)) if view.backends.contains_key(&name) => {
            let all = Arc::make_mut(&mut view.backends);
            if let Some(backends) = all.get_mut(&name) {
                remove(backends, &id);
                if backends.is_empty() {
                    all.remove(&name);
                }
            }
        }
        Some(Key::Node(name)) => remove(&mut view.nodes, &name),
        Some(Key::Pod(uid)) if view.pods.contains_key(&uid) => {
            Arc::make_mut(&mut view.pods).remove(&uid);
        }
        Some(Key::Blob(blob)) if view.blobs.contains_key(&blob) => {
            Arc::make_mut(&mut view.blobs).remove(&blob);
        }
        Some(Key::Policy(name)) => remove(&mut view.policies, &name),
        Some(Key::Peer(set, pod)) if view.peers.contains_key(&set) => {
            let all = Arc::make_mut(&mut view.peers);
            if let Some(members) = all.get_mut(&set) {
                remove(members, &pod);
                if members.is_empty() {
                    all.remove(&set);
                }
            }
        }
        Some(Key::Backend(..) | Key::Pod(_) | Key::Blob(_) | Key::Peer(..)) | None => {}
    }
}

/// Leaves a map that lacks the key as it is, so that its pointer still tells of no change.
fn remove<K: Ord + Clone, V>(map: &mut Arc<OrdMap<K, Arc<V>>>, key: &K) {
    if map.contains_key(key) {
        Arc::make_mut(map).remove(key);
    }
}

#[cfg(test)]
mod tests;
