//! Typed caches of the store: what the controllers read instead of the store itself.
//!
//! ```text
//!              list + watch of all keys                     ┌─► Cache<Pod>        ─► handlers ─► work queues
//!  store ─────────────────────────────────► Informer (1 task) ─┼─► Cache<ReplicaSet> ─► handlers ─► …
//!              Compacted ⇒ list again                          └─► … one per kind
//! ```
//! One task feeds every cache from one watch, so all caches together are the store's view at one
//! revision. A controller that waits for the revision of its own last write
//! ([`Informer::caught_up`]) before it looks at the same key again therefore never acts on a state
//! without that write: no expectations are needed, and no pod is created twice.
//!
//! Invariants: only the feeding task writes; an object is decoded once per change; handlers run on
//! the feeding task after the cache shows the change, and must not block.
//!
//! Source: client-go `tools/cache` (reflector, shared informer, indexer).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::pods::controller_of;
use crate::server::registry::{Resource, decode};
use crate::store::{Change, Entry, Revision, Store};

/// Every key of the API starts with this.
pub(crate) const REGISTRY_PREFIX: &str = "/registry/";
/// Pause before a watch that ended is started again.
const RELIST_PAUSE: Duration = Duration::from_millis(100);

/// Namespace (empty when cluster-scoped) and name of an object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ObjectKey {
    /// Empty when the kind is cluster-scoped.
    pub(crate) namespace: String,
    /// The object's name.
    pub(crate) name: String,
}

impl ObjectKey {
    /// A key from its parts.
    pub(crate) fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// The key of the object with this metadata.
    pub(crate) fn of(metadata: &ObjectMeta) -> Self {
        Self::new(
            metadata.namespace.as_deref().unwrap_or_default(),
            metadata.name.as_deref().unwrap_or_default(),
        )
    }
}

impl std::fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// Splits `/registry/<plural>/[<namespace>/]<name>` into plural and the rest as an [`ObjectKey`].
pub(crate) fn parse_store_key(key: &str) -> Option<(&str, ObjectKey)> {
    let (plural, rest) = key.strip_prefix(REGISTRY_PREFIX)?.split_once('/')?;
    let object = match rest.split_once('/') {
        Some((namespace, name)) => ObjectKey::new(namespace, name),
        None => ObjectKey::new("", rest),
    };
    Some((plural, object))
}

/// One step of one object, as handlers see it.
#[derive(Debug)]
pub(crate) enum Delta<K> {
    /// The object is new or changed.
    Applied {
        /// As it is now.
        new: Arc<K>,
        /// As it was; `None` when it is new to this cache.
        old: Option<Arc<K>>,
    },
    /// The object is gone; its last known state.
    Deleted(Arc<K>),
}

impl<K> Delta<K> {
    /// The object as last known.
    pub(crate) fn object(&self) -> &Arc<K> {
        match self {
            Delta::Applied { new, .. } => new,
            Delta::Deleted(last) => last,
        }
    }

    /// Every state of the object that the change touches: the old one and the new one.
    pub(crate) fn states(&self) -> impl Iterator<Item = &Arc<K>> {
        let old = match self {
            Delta::Applied { old, .. } => old.as_ref(),
            Delta::Deleted(_) => None,
        };
        old.into_iter().chain(std::iter::once(self.object()))
    }
}

type Handler<K> = Box<dyn Fn(&Delta<K>) + Send + Sync>;
type Objects<K> = BTreeMap<ObjectKey, Arc<K>>;

/// The objects of one kind with their indexes.
pub(crate) struct Cache<K> {
    plural: &'static str,
    state: RwLock<Indexed<K>>,
    handlers: RwLock<Vec<Handler<K>>>,
    node_of: fn(&K) -> Option<&str>,
}

struct Indexed<K> {
    /// Ordered by namespace, so a namespace is a range.
    objects: Objects<K>,
    by_owner_uid: HashMap<String, BTreeSet<ObjectKey>>,
    by_node: HashMap<String, BTreeSet<ObjectKey>>,
    /// Per namespace, the objects without an owner reference whose `controller` is true.
    uncontrolled: HashMap<String, BTreeSet<ObjectKey>>,
}

impl<K: Resource> Cache<K> {
    /// An empty cache; `node_of` says to which node an object belongs, for [`Cache::on_node`].
    pub(crate) fn new(node_of: fn(&K) -> Option<&str>) -> Arc<Self> {
        Arc::new(Self {
            plural: K::URL_PATH_SEGMENT,
            state: RwLock::new(Indexed {
                objects: BTreeMap::new(),
                by_owner_uid: HashMap::new(),
                by_node: HashMap::new(),
                uncontrolled: HashMap::new(),
            }),
            handlers: RwLock::new(Vec::new()),
            node_of,
        })
    }

    /// Calls `handler` for every change from now on. Register before the informer runs.
    pub(crate) fn on_change(&self, handler: impl Fn(&Delta<K>) + Send + Sync + 'static) {
        self.handlers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Box::new(handler));
    }

    fn read(&self) -> RwLockReadGuard<'_, Indexed<K>> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// One object.
    pub(crate) fn get(&self, key: &ObjectKey) -> Option<Arc<K>> {
        self.read().objects.get(key).cloned()
    }

    /// Every object, ordered by namespace and name.
    pub(crate) fn all(&self) -> Vec<Arc<K>> {
        self.read().objects.values().cloned().collect()
    }

    /// The objects of one namespace, ordered by name.
    pub(crate) fn in_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        let start = Bound::Included(ObjectKey::new(namespace, ""));
        let state = self.read();
        let range = state.objects.range((start, Bound::Unbounded));
        range
            .take_while(|(key, _)| key.namespace == namespace)
            .map(|(_, object)| Arc::clone(object))
            .collect()
    }

    /// The objects with an owner reference to `uid`.
    pub(crate) fn owned_by(&self, uid: &str) -> Vec<Arc<K>> {
        let state = self.read();
        pick(&state.objects, state.by_owner_uid.get(uid))
    }

    /// The objects that belong to a node.
    pub(crate) fn on_node(&self, node: &str) -> Vec<Arc<K>> {
        let state = self.read();
        pick(&state.objects, state.by_node.get(node))
    }

    /// The objects of one namespace that no controller owns.
    pub(crate) fn without_controller(&self, namespace: &str) -> Vec<Arc<K>> {
        let state = self.read();
        pick(&state.objects, state.uncontrolled.get(namespace))
    }

    fn insert(&self, key: ObjectKey, new: Arc<K>) {
        let old = {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            let old = state.objects.insert(key.clone(), Arc::clone(&new));
            if let Some(old) = &old {
                state.unindex(&key, old, self.node_of);
            }
            state.index(&key, &new, self.node_of);
            old
        };
        self.notify(&Delta::Applied { new, old });
    }

    fn remove(&self, key: &ObjectKey) {
        let old = {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            let Some(old) = state.objects.remove(key) else {
                return;
            };
            state.unindex(key, &old, self.node_of);
            old
        };
        self.notify(&Delta::Deleted(old));
    }

    fn notify(&self, delta: &Delta<K>) {
        for handler in self
            .handlers
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            handler(delta);
        }
    }
}

fn pick<K>(objects: &Objects<K>, keys: Option<&BTreeSet<ObjectKey>>) -> Vec<Arc<K>> {
    let keys = keys.into_iter().flatten();
    keys.filter_map(|key| objects.get(key).cloned()).collect()
}

fn drop_from_index(index: &mut HashMap<String, BTreeSet<ObjectKey>>, value: &str, key: &ObjectKey) {
    if let Some(keys) = index.get_mut(value) {
        keys.remove(key);
        if keys.is_empty() {
            index.remove(value);
        }
    }
}

impl<K: Resource> Indexed<K> {
    fn index(&mut self, key: &ObjectKey, object: &K, node_of: fn(&K) -> Option<&str>) {
        for owner in object.metadata().owner_references.iter().flatten() {
            self.by_owner_uid
                .entry(owner.uid.clone())
                .or_default()
                .insert(key.clone());
        }
        if let Some(node) = node_of(object) {
            self.by_node
                .entry(node.to_owned())
                .or_default()
                .insert(key.clone());
        }
        if controller_of(object.metadata()).is_none() {
            self.uncontrolled
                .entry(key.namespace.clone())
                .or_default()
                .insert(key.clone());
        }
    }

    fn unindex(&mut self, key: &ObjectKey, object: &K, node_of: fn(&K) -> Option<&str>) {
        for owner in object.metadata().owner_references.iter().flatten() {
            drop_from_index(&mut self.by_owner_uid, &owner.uid, key);
        }
        if let Some(node) = node_of(object) {
            drop_from_index(&mut self.by_node, node, key);
        }
        drop_from_index(&mut self.uncontrolled, &key.namespace, key);
    }
}

/// What the informer feeds: a typed cache, or something that looks at every kind.
pub(crate) trait Sink: Send + Sync {
    /// The plural it wants; `None`: all kinds.
    fn plural(&self) -> Option<&'static str>;
    /// The entry is new or changed.
    fn put(&self, entry: &Entry);
    /// The key is gone.
    fn delete(&self, store_key: &str);
    /// These are all the entries that there are (of its kind).
    fn replace(&self, entries: &[&Entry]);
}

impl<K: Resource> Sink for Cache<K> {
    fn plural(&self) -> Option<&'static str> {
        Some(self.plural)
    }

    fn put(&self, entry: &Entry) {
        let Some((_, key)) = parse_store_key(&entry.key) else {
            return;
        };
        match decode::<K>(entry) {
            // A copy has no room to spare, which is much of what was decoded; it is kept for long.
            Ok(object) => self.insert(key, Arc::new(object.clone())),
            // Only a newer server could have written it; going on with the rest is better than to stop.
            Err(error) => tracing::error!(key = %entry.key, %error, "cannot decode an object"),
        }
    }

    fn delete(&self, store_key: &str) {
        if let Some((_, key)) = parse_store_key(store_key) {
            self.remove(&key);
        }
    }

    fn replace(&self, entries: &[&Entry]) {
        let listed: BTreeSet<ObjectKey> = entries
            .iter()
            .filter_map(|entry| Some(parse_store_key(&entry.key)?.1))
            .collect();
        let known: Vec<ObjectKey> = self.read().objects.keys().cloned().collect();
        for gone in known.iter().filter(|key| !listed.contains(key)) {
            self.remove(gone);
        }
        for entry in entries {
            self.put(entry);
        }
    }
}

/// The feeding task's shared state.
pub(crate) struct Informer {
    store: Store,
    sinks: Vec<Arc<dyn Sink>>,
    /// `None` until the first list is in.
    progress: watch::Sender<Option<Revision>>,
}

impl Informer {
    /// Feeds these caches once [`Informer::run`] is polled.
    pub(crate) fn new(store: Store, sinks: Vec<Arc<dyn Sink>>) -> Self {
        Self {
            store,
            sinks,
            progress: watch::Sender::new(None),
        }
    }

    /// Returns once the caches show `revision` or a later one. Cancel safe.
    pub(crate) async fn caught_up(&self, revision: Revision) {
        let mut progress = self.progress.subscribe();
        // The sender lives in self, so the only end is the condition.
        let _ = progress
            .wait_for(|seen| seen.is_some_and(|seen| seen >= revision))
            .await;
    }

    /// Feeds the caches until shutdown.
    pub(crate) async fn run(&self, shutdown: &CancellationToken) {
        while !shutdown.is_cancelled() {
            let after = self.relist();
            // Every key, so that any commit's revision is reached, also one outside the API.
            let mut watch = match self.store.watch("", after) {
                Ok(watch) => watch,
                Err(compacted) => {
                    tracing::warn!(%compacted, "the list was outdated at once: listing again");
                    continue;
                }
            };
            loop {
                let change = tokio::select! {
                    // Both arms are cancel safe: a change is returned or still there.
                    change = watch.next() => change,
                    () = shutdown.cancelled() => return,
                };
                let Some(change) = change else { break };
                self.apply(&change);
                while let Ok(Some(change)) = watch.try_next() {
                    self.apply(&change);
                }
                self.progress.send_replace(Some(watch.revision()));
            }
            tracing::warn!("the controllers' watch fell behind: listing again");
            tokio::select! {
                () = tokio::time::sleep(RELIST_PAUSE) => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    fn sinks_of<'a>(&'a self, plural: &'a str) -> impl Iterator<Item = &'a Arc<dyn Sink>> {
        self.sinks
            .iter()
            .filter(move |sink| sink.plural().is_none_or(|wanted| wanted == plural))
    }

    fn apply(&self, change: &Change) {
        let key = change.key();
        let Some((plural, _)) = parse_store_key(key) else {
            return;
        };
        for sink in self.sinks_of(plural) {
            match change {
                Change::Put { entry, .. } => sink.put(entry),
                Change::Delete { .. } => sink.delete(key),
            }
        }
    }

    /// Makes every cache equal to the store; returns the revision of that state.
    fn relist(&self) -> Revision {
        let (revision, entries) = self.store.list(REGISTRY_PREFIX);
        for sink in &self.sinks {
            let wanted = |entry: &&Entry| {
                let plural = parse_store_key(&entry.key).map(|(plural, _)| plural);
                plural.is_some() && (sink.plural().is_none() || sink.plural() == plural)
            };
            let entries: Vec<&Entry> = entries.iter().map(|e| &**e).filter(wanted).collect();
            sink.replace(&entries);
        }
        self.progress.send_replace(Some(revision));
        revision
    }
}
