//! The oracle: everything that was in the store at every revision, and what follows from it. Written anew
//! from the rules, not with the feed's own code.
//!
//! | | |
//! |---|---|
//! | I1 | after a SIGTERM by floor no node sends new connections to the pod |
//! | I2 | a node's view is V(R) of one R; R does not fall within a history |
//! | I3 | no UID runs on two nodes, none starts after it has ended |
//! | I4 | what was acked is programmed |
//! | I5 | when faults stop, everything comes to rest as it was asked for ([`super::world`]) |
//! | I6 | a final status is in the store before its pod goes, and is not overwritten |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use gantry_agent::ids::PodUid;
use gantry_agent::view::View;
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::proto::backend::State as Backend;
use gantry_control::store::{Change, Lineage, Store};
use serde_json::Value;

use super::host;
use super::state::{State, trace, with};

/// Kinds that the oracle reads.
const KINDS: [&str; 4] = ["nodes", "pods", "services", "endpointslices"];

/// A key's values, by the revision of each.
type Versions = BTreeMap<String, Vec<(u64, Option<Arc<Value>>)>>;

#[derive(Default)]
pub struct History {
    lineage: String,
    head: u64,
    /// The revision from which this history is whole.
    begins: u64,
    versions: Versions,
    /// Views that were published before the oracle had heard of their revision.
    unchecked: Vec<(usize, String, Arc<View>)>,
    pub checked: u64,
    /// Revisions that were answered to a writer.
    pub answered: u64,
}

/// What a view should be, by [`History::expected`].
#[derive(PartialEq, Eq, Debug, Default)]
struct Expected {
    /// UID and version of each pod of the node.
    pods: BTreeMap<String, String>,
    services: BTreeSet<String>,
    /// `namespace/service/UID`.
    backends: BTreeMap<String, Backend>,
}

impl History {
    fn at(&self, key: &str, rev: u64) -> Option<&Arc<Value>> {
        let versions = self.versions.get(key)?;
        let before = versions.iter().rev().find(|(at, _)| *at <= rev)?;
        before.1.as_ref()
    }

    fn of_kind(&self, kind: &str, rev: u64) -> impl Iterator<Item = (&str, &Arc<Value>)> {
        let prefix = format!("/registry/{kind}/");
        let from = self.versions.range(prefix.clone()..);
        from.take_while(move |(key, _)| key.starts_with(&prefix))
            .filter_map(move |(key, _)| Some((key.as_str(), self.at(key, rev)?)))
    }

    /// The objects of a kind as they are now.
    pub fn now(&self, kind: &str) -> Vec<Arc<Value>> {
        self.of_kind(kind, u64::MAX)
            .map(|(_, value)| value.clone())
            .collect()
    }

    /// A node that was given up, or never registered.
    pub fn is_dead(&self, node: &str, rev: u64) -> bool {
        let node = self.at(&format!("/registry/nodes/{node}"), rev);
        node.is_none_or(|node| condition(node, "Ready") == Some("Unknown"))
    }

    /// The id of the history that is in force.
    pub fn lineage(&self) -> &str {
        &self.lineage
    }

    /// The backends of each Service that get new connections, by the newest revision.
    pub fn serving(&self) -> BTreeMap<String, BTreeSet<PodUid>> {
        let mut serving = BTreeMap::<String, BTreeSet<PodUid>>::new();
        for (id, state) in self.expected("", u64::MAX).backends {
            if let (Backend::Serving, Some((service, uid))) = (state, id.rsplit_once('/')) {
                let set = serving.entry(service.to_owned()).or_default();
                set.extend(PodUid::new(uid));
            }
        }
        serving
    }

    pub fn head(&self) -> u64 {
        self.head
    }

    fn expected(&self, node: &str, rev: u64) -> Expected {
        let mut expected = Expected::default();
        for (_, pod) in self.of_kind("pods", rev) {
            if pod["spec"]["nodeName"] == node {
                let uid = text(&pod["metadata"]["uid"]);
                expected.pods.insert(uid, version(pod));
            }
        }
        for (key, _) in self.of_kind("services", rev) {
            let name = key.trim_start_matches("/registry/services/");
            expected.services.insert(name.to_owned());
        }
        for (_, slice) in self.of_kind("endpointslices", rev) {
            let namespace = text(&slice["metadata"]["namespace"]);
            let service = &slice["metadata"]["labels"]["kubernetes.io/service-name"];
            for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
                let target = &endpoint["targetRef"];
                let key = format!("/registry/pods/{namespace}/{}", text(&target["name"]));
                let pod = self.at(&key, rev);
                let Some(pod) = pod.filter(|pod| pod["metadata"]["uid"] == target["uid"]) else {
                    continue;
                };
                let on = text(&pod["spec"]["nodeName"]);
                let state = if !pod["metadata"]["deletionTimestamp"].is_null() {
                    Backend::Draining
                } else if self.is_dead(&on, rev) || has_ended(pod) {
                    Backend::NotReady
                } else if condition(pod, "Ready") == Some("True") {
                    Backend::Serving
                } else {
                    Backend::NotReady
                };
                let id = format!("{namespace}/{}/{}", text(service), text(&target["uid"]));
                expected.backends.insert(id, state);
            }
        }
        expected
    }
}

/// What tells one version of a pod from another: the store's bytes have no resourceVersion.
fn version(pod: &Value) -> String {
    let (metadata, status) = (&pod["metadata"], &pod["status"]);
    let deleted = text(&metadata["deletionTimestamp"]);
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let conditions = conditions.map(|c| format!("{}={}", text(&c["type"]), text(&c["status"])));
    let conditions: Vec<_> = conditions.collect();
    let (phase, address) = (text(&status["phase"]), text(&status["podIP"]));
    format!("{deleted} {phase} {address} {}", conditions.join(" "))
}

/// The same of a pod that is not JSON any more.
fn version_of(pod: &Pod) -> String {
    let deleted = pod.metadata.deletion_timestamp.as_ref();
    let deleted = deleted.map(|time| text(&serde_json::to_value(time).unwrap_or_default()));
    let Some(status) = &pod.status else {
        return format!("{}   ", deleted.unwrap_or_default());
    };
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let conditions = conditions
        .iter()
        .map(|c| format!("{}={}", c.type_, c.status));
    let conditions: Vec<_> = conditions.collect();
    let (phase, address) = (&status.phase, &status.pod_ip);
    format!(
        "{} {} {} {}",
        deleted.unwrap_or_default(),
        phase.as_deref().unwrap_or_default(),
        address.as_deref().unwrap_or_default(),
        conditions.join(" ")
    )
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// The status of a condition.
pub fn condition<'a>(object: &'a Value, type_: &str) -> Option<&'a str> {
    let mut all = object["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten();
    all.find(|condition| condition["type"] == type_)?["status"].as_str()
}

/// Whether a pod's phase is final.
pub fn has_ended(pod: &Value) -> bool {
    matches!(
        pod["status"]["phase"].as_str(),
        Some("Succeeded" | "Failed")
    )
}

/// What the view shows, in the oracle's words.
fn shown(view: &View) -> Expected {
    let mut shown = Expected::default();
    for (uid, pod) in view.pods.iter() {
        shown.pods.insert(uid.as_str().to_owned(), version_of(pod));
    }
    for name in view.services.keys() {
        shown
            .services
            .insert(format!("{}/{}", name.namespace, name.name));
    }
    for (name, backends) in view.backends.iter() {
        for (id, backend) in backends.iter().filter(|(_, b)| !b.pod_uid.is_empty()) {
            let id = format!("{}/{}/{id}", name.namespace, name.name);
            shown.backends.insert(id, backend.state());
        }
    }
    shown
}

impl State {
    /// A node has published a view.
    pub fn published(&mut self, node: usize, lineage: String, view: &Arc<View>) {
        let machine = &mut self.machines[node];
        if let Some((old, rev)) = &machine.seen
            && *old == lineage
            && view.rev < *rev
        {
            let text = format!(
                "I2: the view of {} falls from {rev} to {}",
                machine.name, view.rev
            );
            self.violated(text);
        }
        self.machines[node].seen = Some((lineage.clone(), view.rev));
        self.history.unchecked.push((node, lineage, view.clone()));
        self.check_views();
    }

    fn check_views(&mut self) {
        let head = self.history.head;
        let all = std::mem::take(&mut self.history.unchecked);
        for (node, lineage, view) in all {
            if lineage != self.history.lineage || view.rev < self.history.begins {
                continue; // of a history that is no more
            }
            if view.rev > head {
                self.history.unchecked.push((node, lineage, view));
                continue;
            }
            self.history.checked += 1;
            let name = self.machines[node].name.clone();
            let (want, mut got) = (self.history.expected(&name, view.rev), shown(&view));
            // After a restore those that the store does not know run on for a while.
            let known = |uid: &String| {
                let mut all = self.history.of_kind("pods", u64::MAX);
                all.any(|(_, pod)| pod["metadata"]["uid"] == **uid)
            };
            got.pods
                .retain(|uid, _| want.pods.contains_key(uid) || known(uid));
            if got != want {
                let text = format!(
                    "I2: {name} at revision {} shows {got:?}, the store had {want:?}",
                    view.rev
                );
                self.violated(text);
            }
        }
    }

    fn take_change(&mut self, change: &Change) {
        let (key, rev) = (change.key().to_string(), change.revision());
        if rev < self.history.head {
            let text = format!("revision {rev} of {key} comes after {}", self.history.head);
            self.violated(text);
        }
        self.history.head = rev;
        let kind = key.trim_start_matches("/registry/").split('/').next();
        if !kind.is_some_and(|kind| KINDS.contains(&kind)) {
            return;
        }
        let value = match change {
            Change::Put { entry, .. } => read(&entry.value),
            Change::Delete { .. } => None,
        };
        if kind == Some("pods") {
            self.check_pod(&key, value.as_deref());
        }
        let versions = self.history.versions.entry(key).or_default();
        versions.push((rev, value));
    }

    /// I6.
    fn check_pod(&mut self, key: &str, new: Option<&Value>) {
        let Some(old) = self.history.at(key, u64::MAX).cloned() else {
            return;
        };
        let uid = text(&old["metadata"]["uid"]);
        match new.filter(|new| new["metadata"]["uid"] == *uid) {
            Some(new) if has_ended(&old) => {
                let containers = |pod: &Value| pod["status"]["containerStatuses"].clone();
                if !has_ended(new) || containers(new) != containers(&old) {
                    self.violated(format!(
                        "I6: the final status of {key} was overwritten: {} by {}",
                        old["status"], new["status"]
                    ));
                }
            }
            Some(_) => {}
            None => {
                let was_started =
                    PodUid::new(&uid).is_ok_and(|uid| self.started.contains_key(&uid));
                // Restored as it was before it was bound, and deleted before its node has spoken: nobody
                // is asked.
                let is_bound = !old["spec"]["nodeName"].is_null();
                if was_started && is_bound && !has_ended(&old) {
                    self.violated(format!("I6: {key} ({uid}) has gone without a final status"));
                }
                self.trace(&format!("store: {key} is gone"));
            }
        }
    }

    /// A control plane has opened its store. The revision after which it is to be watched.
    fn opened(&mut self, lineage: &Lineage, store: &Store) -> u64 {
        let answered = self.history.answered.max(self.history.head);
        if self.history.lineage == lineage.id {
            if store.revision() < answered {
                self.violated(format!(
                    "revision {answered} was answered, the store has come back at {}",
                    store.revision()
                ));
            }
            return self.history.head;
        }
        // A backup brings back pods that have ended since: they serve until their nodes have said so.
        self.ended_by_floor.clear();
        let (rev, entries) = store.list("/registry/");
        let history = &mut self.history;
        history.lineage.clone_from(&lineage.id);
        (history.head, history.begins, history.answered) = (rev, rev, 0);
        history.versions.clear();
        history.unchecked.clear();
        for entry in entries {
            let kind = entry.key.split('/').nth(2).unwrap_or_default();
            if KINDS.contains(&kind) {
                let value = read(&entry.value);
                let versions = history.versions.entry(entry.key.to_string()).or_default();
                versions.push((entry.mod_revision, value));
            }
        }
        rev
    }
}

fn read(value: &[u8]) -> Option<Arc<Value>> {
    serde_json::from_slice(value).ok().map(Arc::new)
}

/// Takes the backup that is to have a pod without a node, if there is one.
fn save_unbound(store: &Store) {
    let Some(file) = with(|state| state.backup_of_unbound.clone()) else {
        return;
    };
    let (_, pods) = store.list("/registry/pods/");
    let is_unbound = |pod: &Value| pod["spec"]["nodeName"].is_null();
    let mut pods = pods.iter().filter_map(|entry| read(&entry.value));
    if pods.any(|pod| is_unbound(&pod)) {
        with(|state| state.backup_of_unbound = None);
        super::control::save(store, &file).expect("a backup");
        trace("a backup is taken");
    }
}

/// Follows a store from within its control plane.
pub async fn follow(store: Store) {
    let mut after = with(|state| state.opened(store.lineage(), &store));
    loop {
        let mut watch = match store.watch("/registry/", after) {
            Ok(watch) => watch,
            Err(error) => {
                with(|state| state.violated(format!("the store cannot be watched: {error}")));
                return;
            }
        };
        while let Some(change) = watch.next().await {
            if host::is_killed() {
                return;
            }
            with(|state| {
                state.take_change(&change);
                // What belongs to one revision comes at once.
                while let Ok(Some(change)) = watch.try_next() {
                    state.take_change(&change);
                }
                state.history.head = state.history.head.max(watch.revision());
                state.check_views();
            });
            save_unbound(&store);
        }
        if watch.ended().is_none() {
            return;
        }
        trace("the oracle's watch has ended: it begins anew");
        after = with(|state| state.history.head);
    }
}
