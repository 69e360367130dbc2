use proptest::prelude::*;
use serde_json::{Value as Json, json};

use gantry_api::digest::item_hash;

use super::super::floor::Floors;
use super::*;

/// The items an agent holds, kept by nothing but what is sent.
#[derive(Clone, Default)]
struct Agent {
    items: BTreeMap<String, Bytes>,
    rev: u64,
}

fn is_private(key: &str) -> bool {
    key.starts_with("pod/") || key.starts_with("blob/") || policies::is_ours(key)
}

impl Agent {
    fn digest(&self, private: bool) -> u64 {
        let items = self
            .items
            .iter()
            .filter(|(key, _)| is_private(key) == private);
        items
            .map(|(_, item)| item_hash(item))
            .collect::<Digest>()
            .value()
    }

    fn take(&mut self, step: &Step) {
        for bytes in &step.items {
            let item = proto::Item::decode(bytes.clone()).unwrap();
            match item.value {
                None | Some(Value::Deleted(_)) => self.items.remove(&item.key),
                Some(_) => self.items.insert(item.key, bytes.clone()),
            };
        }
        self.rev = step.commit.rev;
        assert_eq!(self.digest(false), step.commit.common_digest, "common part");
        assert_eq!(
            self.digest(true),
            step.commit.private_digest,
            "private part"
        );
    }

    /// A new stream: the cursor that the control plane makes of this agent's Hello.
    fn connect(&mut self, index: &Index) -> Cursor {
        match index.resume_at(self.rev, self.digest(false)) {
            Some(rev) => {
                let private = self.items.iter().filter(|(key, _)| is_private(key));
                let inventory = private.map(|(key, bytes)| {
                    (key.clone(), proto::Item::decode(bytes.clone()).unwrap().rev)
                });
                Cursor::resume(Some(rev), inventory.collect())
            }
            None => {
                self.items.clear();
                Cursor::default()
            }
        }
    }
}

/// A store small enough to think about: key, JSON, the revision of the last write.
#[derive(Default)]
struct Store {
    rev: u64,
    objects: BTreeMap<String, (Bytes, u64)>,
}

impl Store {
    /// V(R) from scratch.
    fn index(&self) -> Index {
        let mut index = Index::with_tombstones(self.rev, 8);
        for (key, (json, rev)) in &self.objects {
            index.apply(key, Some(json), *rev);
        }
        index.advance(self.rev);
        index
    }

    fn view_of(&self, node: &str) -> BTreeMap<String, Bytes> {
        let mut agent = Agent::default();
        agent.take(&self.index().step(node, &mut Cursor::default()).unwrap());
        agent.items
    }

    fn put(&mut self, index: &mut Index, key: &str, object: &Json) {
        self.rev += 1;
        let json = Bytes::from(object.to_string());
        index.apply(key, Some(&json), self.rev);
        self.objects.insert(key.into(), (json, self.rev));
        index.advance(self.rev);
    }

    fn delete(&mut self, index: &mut Index, key: &str) {
        if self.objects.remove(key).is_some() {
            self.rev += 1;
            index.apply(key, None, self.rev);
            index.advance(self.rev);
        }
    }
}

fn node(ready: &str) -> Json {
    json!({"metadata": {"name": "n"}, "spec": {"podCIDR": "10.244.0.0/24"}, "status": {
        "conditions": [{"type": "Ready", "status": ready}],
        "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}})
}

fn service(publish_not_ready: bool) -> Json {
    json!({"metadata": {"name": "s", "namespace": "d"}, "spec": {
        "clusterIPs": ["10.96.0.9"], "publishNotReadyAddresses": publish_not_ready,
        "ports": [{"port": 80, "protocol": "TCP"}]}})
}

fn slice(service: &str, pods: &[(&str, &str)]) -> Json {
    let endpoints: Vec<Json> = pods
        .iter()
        .enumerate()
        .map(|(i, (name, uid))| {
            json!({"addresses": [format!("10.244.0.{}", i + 2)],
                "targetRef": {"kind": "Pod", "namespace": "d", "name": name, "uid": uid}})
        })
        .collect();
    json!({"metadata": {"name": "x", "namespace": "d",
        "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 8080}]})
}

fn pod(uid: &str, node: &str, ready: bool, deleting: bool, secret: &str) -> Json {
    let mut pod = json!({"metadata": {"name": "p", "namespace": "d", "uid": uid},
        "spec": {"nodeName": node, "containers": [{"name": "c",
            "envFrom": [{"secretRef": {"name": secret}}]}]},
        "status": {"phase": "Running", "podIP": "10.244.0.7", "conditions": [
            {"type": "Ready", "status": if ready { "True" } else { "False" }}]}});
    if deleting {
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    }
    pod
}

fn secret(value: u8) -> Json {
    json!({"metadata": {"name": "k", "namespace": "d"}, "data": {"v": value.to_string()}})
}

/// One random step of the world.
#[derive(Clone, Debug)]
enum Op {
    Node(usize, u8),
    Service(usize, bool),
    Slice(usize, usize, Vec<(usize, u8)>),
    Pod(usize, u8, usize, bool, bool, usize),
    Secret(usize, u8),
    Namespace(usize, u8),
    Policy(usize, u8),
    Delete(usize, usize),
    /// The agent of node 0 or 1 takes what is there.
    Step(usize),
    /// Its stream breaks.
    Break(usize),
    /// The control plane starts again: the index is rebuilt, tombstones are lost.
    Restart,
    /// The index falls out of the store's history and is brought up by the difference.
    Reload,
}

const PODS: [&str; 3] = ["p0", "p1", "p2"];
const NODES: [&str; 3] = ["n0", "n1", ""];

fn key(kind: usize, i: usize) -> String {
    match kind {
        0 => format!("/registry/nodes/{}", NODES[i % 2]),
        1 => format!("/registry/services/d/s{}", i % 2),
        2 => format!("/registry/endpointslices/d/x{i}"),
        3 => format!("/registry/pods/d/{}", PODS[i]),
        5 => format!("/registry/namespaces/{}", ["d", "e"][i % 2]),
        6 => format!("/registry/networkpolicies/d/q{i}"),
        _ => format!("/registry/secrets/d/k{}", i % 2),
    }
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let endpoints = proptest::collection::vec((0..3usize, 0..2u8), 0..4);
    let op = prop_oneof![
        (0..2usize, 0..3u8).prop_map(|(i, state)| Op::Node(i, state)),
        (0..2usize, any::<bool>()).prop_map(|(i, publish)| Op::Service(i, publish)),
        (0..3usize, 0..2usize, endpoints).prop_map(|(i, s, pods)| Op::Slice(i, s, pods)),
        (
            0..3usize,
            0..2u8,
            0..3usize,
            any::<bool>(),
            any::<bool>(),
            0..2usize
        )
            .prop_map(|(i, uid, n, ready, going, k)| Op::Pod(i, uid, n, ready, going, k)),
        (0..2usize, any::<u8>()).prop_map(|(i, value)| Op::Secret(i, value)),
        (0..2usize, 0..2u8).prop_map(|(i, label)| Op::Namespace(i, label)),
        (0..3usize, 0..4u8).prop_map(|(i, peers)| Op::Policy(i, peers)),
        (0..7usize, 0..3usize).prop_map(|(kind, i)| Op::Delete(kind, i)),
        (0..2usize).prop_map(Op::Step),
        (0..2usize).prop_map(Op::Step),
        (0..2usize).prop_map(Op::Break),
        Just(Op::Restart),
        Just(Op::Reload),
    ];
    proptest::collection::vec(op, 1..120)
}

fn play(op: &Op, store: &mut Store, index: &mut Index) {
    match op {
        Op::Node(i, state) => {
            let ready = ["True", "False", "Unknown"][usize::from(*state)];
            store.put(index, &key(0, *i), &node(ready));
        }
        Op::Service(i, publish) => store.put(index, &key(1, *i), &service(*publish)),
        Op::Slice(i, service, pods) => {
            let uids = ["u0", "u1"];
            let pods: Vec<_> = pods
                .iter()
                .map(|(pod, uid)| (PODS[*pod], uids[usize::from(*uid)]))
                .collect();
            let mut object = slice(&format!("s{service}"), &pods);
            object["metadata"]["name"] = json!(format!("x{i}"));
            store.put(index, &key(2, *i), &object);
        }
        Op::Pod(i, uid, n, ready, going, k) => {
            // Endpoints name one of two UIDs of a name; so that UIDs stay unique, each pod has its own.
            let uid = if *i == 0 {
                format!("u{uid}")
            } else {
                format!("u{uid}-{i}")
            };
            let object = pod(&uid, NODES[*n], *ready, *going, &format!("k{k}"));
            store.put(index, &key(3, *i), &object);
        }
        Op::Secret(i, value) => store.put(index, &key(4, *i), &secret(*value)),
        Op::Namespace(i, label) => {
            let object = json!({"metadata": {"labels": {"l": label.to_string()}}});
            store.put(index, &key(5, *i), &object);
        }
        Op::Policy(i, peers) => {
            let peer = match peers {
                0 => json!({"podSelector": {}}),
                n => json!({"namespaceSelector": {"matchLabels": {"l": (n % 2).to_string()}}}),
            };
            let object = json!({"spec": {"podSelector": {}, "policyTypes": ["Ingress"],
                "ingress": [{"from": [peer]}]}});
            store.put(index, &key(6, *i), &object);
        }
        Op::Delete(kind, i) => store.delete(index, &key(*kind, *i)),
        Op::Restart => *index = store.index(),
        Op::Reload => {
            // Out of date on purpose: the newest half of the store is not known.
            let mut stale = Index::with_tombstones(store.rev, 8);
            for (key, (json, rev)) in store.objects.iter().step_by(2) {
                stale.apply(key, Some(json), *rev);
            }
            let entries = store
                .objects
                .iter()
                .map(|(key, (json, rev))| (key.as_str(), (json, *rev)));
            stale.replace(&entries.collect(), store.rev);
            stale.advance(store.rev);
            *index = stale;
        }
        Op::Step(_) | Op::Break(_) => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever happens to the store, to streams and to the control plane: at each commit the agent
    /// holds exactly what a fresh index says, and no digest ever differs.
    #[test]
    fn agent_content_is_the_view_at_each_commit(ops in ops()) {
        let mut store = Store::default();
        let mut index = store.index();
        let mut agents = [Agent::default(), Agent::default()];
        let mut cursors: [Option<Cursor>; 2] = [None, None];
        for op in &ops {
            play(op, &mut store, &mut index);
            match op {
                Op::Restart | Op::Reload => cursors = [None, None],
                Op::Break(i) => cursors[*i] = None,
                Op::Step(i) => {
                    let agent = &mut agents[*i];
                    let cursor = cursors[*i].get_or_insert_with(|| agent.connect(&index));
                    if let Some(step) = index.step(NODES[*i], cursor) {
                        agent.take(&step);
                    }
                    prop_assert_eq!(&agent.items, &store.view_of(NODES[*i]));
                }
                _ => {}
            }
        }
    }
}

fn states(index: &Index) -> BTreeMap<String, proto::backend::State> {
    let mut agent = Agent::default();
    agent.take(&index.step("n", &mut Cursor::default()).unwrap());
    let items = agent
        .items
        .into_values()
        .map(|item| proto::Item::decode(item).unwrap());
    items
        .filter_map(|item| match item.value {
            Some(Value::Backend(backend)) => Some((item.key, backend.state())),
            _ => None,
        })
        .collect()
}

fn one_backend() -> (Store, Index) {
    let (mut store, mut index) = (Store::default(), Index::new(0));
    store.put(&mut index, "/registry/nodes/n", &node("True"));
    store.put(&mut index, "/registry/services/d/s", &service(false));
    store.put(
        &mut index,
        "/registry/endpointslices/d/x",
        &slice("s", &[("p", "u")]),
    );
    store.put(
        &mut index,
        "/registry/pods/d/p",
        &pod("u", "n", true, false, "k"),
    );
    (store, index)
}

const BACKEND: &str = "backend/d/s/u";

#[test]
fn a_backend_drains_at_the_revision_of_its_pods_deletion() {
    let (mut store, mut index) = one_backend();
    assert_eq!(states(&index)[BACKEND], proto::backend::State::Serving);
    let mut cursor = Cursor::default();
    index.step("other", &mut cursor).unwrap();
    store.put(
        &mut index,
        "/registry/pods/d/p",
        &pod("u", "n", true, true, "k"),
    );
    let step = index.step("other", &mut cursor).unwrap();
    assert_eq!((step.commit.rev, step.items.len()), (store.rev, 1));
    assert_eq!(states(&index)[BACKEND], proto::backend::State::Draining);
}

/// Counterexample 10: a writer of slices with a stale cache re-adds a pod after its end.
#[test]
fn a_late_slice_cannot_bring_a_deleted_pod_back() {
    let (mut store, mut index) = one_backend();
    store.put(
        &mut index,
        "/registry/pods/d/p",
        &pod("u", "n", true, true, "k"),
    );
    store.put(&mut index, "/registry/endpointslices/d/x", &slice("s", &[]));
    assert!(states(&index).is_empty());
    store.put(
        &mut index,
        "/registry/endpointslices/d/x",
        &slice("s", &[("p", "u")]),
    );
    assert_eq!(states(&index)[BACKEND], proto::backend::State::Draining);
    store.delete(&mut index, "/registry/pods/d/p");
    store.put(
        &mut index,
        "/registry/endpointslices/d/x",
        &slice("s", &[("p", "u")]),
    );
    assert!(states(&index).is_empty());
    // Nor does it name the pod of the same name that came after.
    store.put(
        &mut index,
        "/registry/pods/d/p",
        &pod("v", "n", true, false, "k"),
    );
    assert!(states(&index).is_empty());
}

/// Counterexample 11: a Secret older than the cursor enters the view by a binding.
#[test]
fn a_binding_brings_a_secret_older_than_the_cursor() {
    let (mut store, mut index) = (Store::default(), Index::new(0));
    store.put(&mut index, "/registry/secrets/d/k", &secret(1));
    store.put(
        &mut index,
        "/registry/pods/d/p",
        &pod("u", "", false, false, "k"),
    );
    let (mut agent, mut cursor) = (Agent::default(), Cursor::default());
    agent.take(&index.step("n", &mut cursor).unwrap());
    assert!(agent.items.is_empty());
    store.put(
        &mut index,
        "/registry/pods/d/p",
        &pod("u", "n", false, false, "k"),
    );
    agent.take(&index.step("n", &mut cursor).unwrap());
    let keys: Vec<_> = agent.items.keys().map(String::as_str).collect();
    assert_eq!(keys, ["blob/secrets/d/k", "pod/u"]);
    // And leaves with the pod; no other node ever had it.
    assert_eq!(store.view_of("other").len(), 0);
    store.delete(&mut index, "/registry/pods/d/p");
    agent.take(&index.step("n", &mut cursor).unwrap());
    assert!(agent.items.is_empty());
}

#[test]
fn a_volumes_secrets_go_where_its_claim_is_used_and_follow_their_changes() {
    let (mut store, mut index) = (Store::default(), Index::new(0));
    let other = "/registry/secrets/storage/s";
    store.put(&mut index, other, &secret(1));
    store.put(
        &mut index,
        "/registry/persistentvolumes/v",
        &json!({"metadata": {"name": "v"}, "spec": {"csi": {"driver": "x", "volumeHandle": "h",
            "nodePublishSecretRef": {"namespace": "storage", "name": "s"}}}}),
    );
    let claim = json!({"metadata": {"name": "c", "namespace": "d"}, "spec": {"volumeName": "v"}});
    store.put(&mut index, "/registry/persistentvolumeclaims/d/c", &claim);
    let mut user = pod("u", "n", true, false, "");
    user["spec"]["volumes"] = json!([{"name": "x", "persistentVolumeClaim": {"claimName": "c"}},
        {"name": "y", "csi": {"driver": "x", "nodePublishSecretRef": {"name": "own"}}}]);
    store.put(&mut index, "/registry/pods/d/p", &user);
    store.put(&mut index, "/registry/secrets/d/own", &secret(3));
    let (mut agent, mut cursor) = (Agent::default(), Cursor::default());
    agent.take(&index.step("n", &mut cursor).unwrap());
    let secrets = |agent: &Agent| -> Vec<String> {
        let keys = agent.items.keys();
        keys.filter(|key| key.contains("secrets"))
            .cloned()
            .collect()
    };
    assert_eq!(
        secrets(&agent),
        ["blob/secrets/d/own", "blob/secrets/storage/s"]
    );
    assert_eq!(store.view_of("other").len(), 0);
    store.put(&mut index, other, &secret(2));
    agent.take(&index.step("n", &mut cursor).unwrap());
    assert_eq!(agent.items, store.view_of("n"));
    store.delete(&mut index, "/registry/persistentvolumes/v");
    agent.take(&index.step("n", &mut cursor).unwrap());
    assert_eq!(secrets(&agent), ["blob/secrets/d/own"]);
}

#[test]
fn a_dead_node_takes_its_backends_out_and_brings_them_back() {
    let (mut store, mut index) = one_backend();
    store.put(&mut index, "/registry/nodes/n", &node("Unknown"));
    assert_eq!(states(&index)[BACKEND], proto::backend::State::NotReady);
    store.put(&mut index, "/registry/nodes/n", &node("False"));
    assert_eq!(states(&index)[BACKEND], proto::backend::State::Serving);
}

#[test]
fn publish_not_ready_addresses_ignores_readiness_and_nothing_else() {
    let (mut store, mut index) = one_backend();
    store.put(
        &mut index,
        "/registry/pods/d/p",
        &pod("u", "n", false, false, "k"),
    );
    assert_eq!(states(&index)[BACKEND], proto::backend::State::NotReady);
    store.put(&mut index, "/registry/services/d/s", &service(true));
    assert_eq!(states(&index)[BACKEND], proto::backend::State::Serving);
    store.put(
        &mut index,
        "/registry/pods/d/p",
        &pod("u", "n", false, true, "k"),
    );
    assert_eq!(states(&index)[BACKEND], proto::backend::State::Draining);
}

#[test]
fn endpoints_without_a_pod_are_taken_as_written() {
    let (mut store, mut index) = (Store::default(), Index::new(0));
    store.put(&mut index, "/registry/services/d/s", &service(false));
    let mut object = slice("s", &[]);
    object["endpoints"] = json!([
        {"addresses": ["192.0.2.7"]},
        {"addresses": ["192.0.2.8"], "conditions": {"ready": false}},
        {"addresses": ["192.0.2.9"], "conditions": {"ready": false, "terminating": true}}]);
    store.put(&mut index, "/registry/endpointslices/d/x", &object);
    let states: Vec<_> = states(&index).into_values().collect();
    use proto::backend::State;
    assert_eq!(states, [State::Serving, State::NotReady, State::Draining]);
}

/// A slow reader costs nothing and gets the last state, once.
#[test]
fn a_slow_reader_gets_each_key_once_however_often_it_changed() {
    let (mut store, mut index) = one_backend();
    let mut cursor = Cursor::default();
    index.step("other", &mut cursor).unwrap();
    for i in 0..10_000 {
        store.put(
            &mut index,
            "/registry/pods/d/p",
            &pod("u", "n", i % 2 == 0, false, "k"),
        );
    }
    let step = index.step("other", &mut cursor).unwrap();
    assert_eq!((step.items.len(), step.commit.rev), (1, store.rev));
    assert_eq!(index.common.since(0).count(), 3); // service, backend, node: no history kept
}

/// However many nodes there are, each gets the same bytes, and not merely equal ones.
#[test]
fn a_change_is_encoded_once_for_all_nodes() {
    let (mut store, mut index) = one_backend();
    let mut cursors = [Cursor::default(), Cursor::default(), Cursor::default()];
    let mut steps = |index: &Index| -> Vec<Vec<*const u8>> {
        let nodes = ["a", "b", "c"].into_iter().zip(&mut cursors);
        let steps = nodes.map(|(node, cursor)| index.step(node, cursor).unwrap());
        let items = steps.map(|step| step.items.iter().map(|item| item.as_ptr()).collect());
        items.collect()
    };
    let all_are_one = |steps: &[Vec<*const u8>], count: usize| {
        assert_eq!(steps[0].len(), count);
        assert!(steps.iter().all(|step| step == &steps[0]));
    };
    all_are_one(&steps(&index), 3);
    store.put(&mut index, "/registry/services/d/s", &service(true));
    all_are_one(&steps(&index), 1);
    store.delete(&mut index, "/registry/services/d/s");
    all_are_one(&steps(&index), 2); // the Service and its backend
}

#[test]
fn an_agent_older_than_the_tombstones_starts_from_everything() {
    let (mut store, mut index) = (Store::default(), Index::with_tombstones(0, 2));
    store.put(&mut index, "/registry/nodes/n", &node("True"));
    let mut agent = Agent::default();
    agent.take(&index.step("n", &mut Cursor::default()).unwrap());
    for i in 0..3 {
        store.put(
            &mut index,
            &format!("/registry/services/d/s{i}"),
            &service(false),
        );
    }
    assert!(index.resume_at(agent.rev, agent.digest(false)).is_some());
    for i in 0..3 {
        store.delete(&mut index, &format!("/registry/services/d/s{i}"));
    }
    // The content is the same again, so nothing is lost by going on.
    assert!(index.resume_at(agent.rev, agent.digest(false)).is_some());
    store.put(&mut index, "/registry/services/d/t", &service(false));
    assert!(index.resume_at(agent.rev, agent.digest(false)).is_none());
    assert!(
        index.resume_at(store.rev + 1, 0).is_none(),
        "a revision from the future"
    );
}

#[test]
fn a_restarted_control_plane_sends_nothing_when_nothing_changed() {
    let (store, index) = one_backend();
    let mut agent = Agent::default();
    agent.take(&index.step("n", &mut Cursor::default()).unwrap());
    let restarted = store.index();
    let mut cursor = agent.connect(&restarted);
    let step = restarted.step("n", &mut cursor).unwrap();
    assert!(step.items.is_empty(), "only the commit");
    assert!(restarted.step("n", &mut cursor).is_none());
}

/// Found by the simulation: a floor was answered by an ack from before a deletion that the restarted control plane
/// had not seen, and a pod ended while its node still got connections for it.
#[test]
fn an_ack_from_before_a_deletion_is_no_floor_after_a_restart() {
    let (mut store, mut index) = one_backend();
    let acked = store.rev;
    store.delete(&mut index, "/registry/endpointslices/d/x");
    let restarted = store.index();
    let floors = |acked: u64| {
        let nodes = vec![("n".to_owned(), acked)];
        Floors::new(nodes, restarted.rev(), restarted.common_rev())
    };
    assert!(floors(acked).reached(store.rev).is_none());
    assert!(floors(store.rev).reached(store.rev).is_some());
}
