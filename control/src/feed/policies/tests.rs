use proptest::prelude::*;
use prost::Message as _;
use serde_json::{Value as Json, json};

use gantry_api::digest::item_hash;
use gantry_api::k8s_openapi::serde::de::DeserializeOwned;

use super::*;

/// The API objects, as the store has them.
#[derive(Clone, Default)]
struct World {
    namespaces: BTreeMap<String, Json>,
    pods: BTreeMap<Name, Json>,
    policies: BTreeMap<Name, Json>,
}

/// What one rule allows: whether anybody, which pods.
type Allowed = (bool, BTreeSet<Name>);
/// By policy and direction, its rules.
type Resolved = BTreeMap<(Name, &'static str), Vec<Allowed>>;

// --- the documentation, word by word

fn matches(selector: &Json, labels: &Json) -> bool {
    let mut equalities = selector["matchLabels"].as_object().into_iter().flatten();
    let mut expressions = selector["matchExpressions"]
        .as_array()
        .into_iter()
        .flatten();
    equalities.all(|(key, value)| labels.get(key) == Some(value))
        && expressions.all(|expression| {
            let value = labels.get(expression["key"].as_str().unwrap());
            let values = expression["values"].as_array();
            let among = |v: &Json| values.is_some_and(|values| values.contains(v));
            match expression["operator"].as_str().unwrap() {
                "In" => value.is_some_and(among),
                "NotIn" => !value.is_some_and(among),
                "Exists" => value.is_some(),
                _ => value.is_none(),
            }
        })
}

fn has_network(pod: &Json) -> bool {
    pod["spec"]["hostNetwork"] != json!(true) && pod["status"]["phase"] != json!("Succeeded")
}

fn is_peer(world: &World, policy: &Name, peer: &Json, pod: &Name) -> bool {
    if peer.get("ipBlock").is_some() {
        return false; // the node asks by address
    }
    let labels = &world.pods[pod]["metadata"]["labels"];
    let namespace = match peer.get("namespaceSelector") {
        None => pod.0 == policy.0,
        Some(selector) => {
            let object = world.namespaces.get(&pod.0);
            object.is_some_and(|object| matches(selector, &object["metadata"]["labels"]))
        }
    };
    let pods = peer.get("podSelector");
    namespace && pods.is_none_or(|selector| matches(selector, labels))
}

fn naive(world: &World, node: &str) -> Resolved {
    let mut resolved = Resolved::new();
    for (name, policy) in &world.policies {
        let spec = &policy["spec"];
        let selected = world.pods.iter().any(|(pod, object)| {
            pod.0 == name.0
                && object["spec"]["nodeName"] == json!(node)
                && has_network(object)
                && matches(&spec["podSelector"], &object["metadata"]["labels"])
        });
        if !selected {
            continue;
        }
        for (kind, rules, peers) in [("Ingress", "ingress", "from"), ("Egress", "egress", "to")] {
            if !spec["policyTypes"]
                .as_array()
                .unwrap()
                .contains(&json!(kind))
            {
                continue;
            }
            let rules = spec[rules].as_array().into_iter().flatten();
            let rules = rules.map(|rule| {
                let peers = rule[peers]
                    .as_array()
                    .map(Vec::as_slice)
                    .unwrap_or_default();
                let pods = world.pods.keys().filter(|pod| {
                    has_network(&world.pods[*pod])
                        && world.pods[*pod]["status"].get("podIP").is_some()
                        && peers.iter().any(|peer| is_peer(world, name, peer, pod))
                });
                (peers.is_empty(), pods.cloned().collect())
            });
            resolved.insert((name.clone(), kind), rules.collect());
        }
    }
    resolved
}

// --- what a node holds

#[derive(Clone, Default)]
struct Agent {
    items: BTreeMap<String, Bytes>,
    seen: Option<Seen>,
}

impl Agent {
    fn step(&mut self, policies: &Policies, node: &str, rev: u64) {
        let inventory = || {
            let rev = |bytes: &Bytes| proto::Item::decode(bytes.clone()).unwrap().rev;
            self.items
                .iter()
                .map(|(key, bytes)| (key.clone(), rev(bytes)))
                .collect()
        };
        let seen = self.seen.get_or_insert_with(|| Seen::resume(inventory()));
        let mut items = Vec::new();
        let digest = policies.step(node, seen, rev, &mut items);
        for bytes in items {
            let item = proto::Item::decode(bytes.clone()).unwrap();
            match item.value {
                Some(Value::Deleted(_)) | None => self.items.remove(&item.key),
                Some(_) => self.items.insert(item.key, bytes),
            };
        }
        let held: Digest = self.items.values().map(|bytes| item_hash(bytes)).collect();
        assert_eq!(held.value(), digest);
    }

    fn resolved(&self) -> Resolved {
        let mut resolved = Resolved::new();
        let mut used: BTreeSet<String> = BTreeSet::new();
        for bytes in self.items.values() {
            let item = proto::Item::decode(bytes.clone()).unwrap();
            let Some(Value::Policy(policy)) = item.value else {
                continue;
            };
            let (namespace, name) = item.key["policy/".len()..].split_once('/').unwrap();
            for (kind, has, rules) in [
                ("Ingress", policy.ingress, policy.incoming),
                ("Egress", policy.egress, policy.outgoing),
            ] {
                used.extend(rules.iter().flat_map(|rule| rule.sets.clone()));
                let rules = rules
                    .iter()
                    .map(|rule| (rule.any_peer, self.members(&rule.sets)));
                let key = ((namespace.to_owned(), name.to_owned()), kind);
                if has {
                    resolved.insert(key, rules.collect());
                }
            }
        }
        // No more than it needs.
        for key in self.items.keys().filter(|key| key.starts_with("peer/")) {
            assert!(used.contains(key.split('/').nth(1).unwrap()), "{key}");
        }
        resolved
    }

    fn members(&self, sets: &[String]) -> BTreeSet<Name> {
        let keys = self
            .items
            .keys()
            .filter_map(|key| key.strip_prefix("peer/"));
        let keys = keys.filter_map(|key| key.split_once('/'));
        keys.filter(|(set, _)| sets.iter().any(|s| s == set))
            .map(|(_, pod)| pod.split_once('/').unwrap())
            .map(|(namespace, name)| (namespace.to_owned(), name.to_owned()))
            .collect()
    }
}

// --- random histories

fn typed<T: DeserializeOwned>(object: &Json) -> T {
    serde_json::from_value(object.clone()).unwrap()
}

#[derive(Clone, Debug)]
enum Op {
    Namespace(&'static str, Option<Json>),
    Pod(Name, Option<Json>),
    Policy(Name, Option<Json>),
    Step(usize),
    Break(usize),
    Restart,
}

fn labels() -> impl Strategy<Value = Json> {
    let value = prop_oneof![Just(None), Just(Some("x")), Just(Some("y"))];
    (value.clone(), value).prop_map(|(a, b)| {
        let pairs = [("a", a), ("b", b)].into_iter();
        pairs
            .filter_map(|(k, v)| Some((k.to_owned(), json!(v?))))
            .collect::<serde_json::Map<_, _>>()
            .into()
    })
}

fn selector() -> impl Strategy<Value = Json> {
    let key = prop_oneof![Just("a"), Just("b")];
    let operator = prop_oneof![
        Just("In"),
        Just("NotIn"),
        Just("Exists"),
        Just("DoesNotExist")
    ];
    let values = prop_oneof![Just(json!(["x"])), Just(json!(["x", "y"]))];
    let expression = (key, operator, values).prop_map(|(key, operator, values)| match operator {
        "In" | "NotIn" => json!({"key": key, "operator": operator, "values": values}),
        _ => json!({"key": key, "operator": operator}),
    });
    prop_oneof![
        Just(json!({})),
        labels().prop_map(|labels| json!({"matchLabels": labels})),
        (labels(), expression)
            .prop_map(|(labels, one)| json!({"matchLabels": labels, "matchExpressions": [one]})),
    ]
}

fn peer() -> impl Strategy<Value = Json> {
    prop_oneof![
        selector().prop_map(|pods| json!({"podSelector": pods})),
        selector().prop_map(|namespaces| json!({"namespaceSelector": namespaces})),
        (selector(), selector()).prop_map(
            |(pods, namespaces)| json!({"podSelector": pods, "namespaceSelector": namespaces})
        ),
        Just(json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}})),
    ]
}

fn policy() -> impl Strategy<Value = Json> {
    let peers = || proptest::collection::vec(proptest::collection::vec(peer(), 0..3), 0..3);
    let types = prop_oneof![
        Just(json!(["Ingress"])),
        Just(json!(["Egress"])),
        Just(json!(["Ingress", "Egress"])),
    ];
    (selector(), peers(), peers(), types).prop_map(|(pods, from, to, types)| {
        let ingress: Vec<Json> = from.into_iter().map(|from| json!({"from": from})).collect();
        let egress: Vec<Json> = to.into_iter().map(|to| json!({"to": to})).collect();
        json!({"spec": {"podSelector": pods, "policyTypes": types, "ingress": ingress, "egress": egress}})
    })
}

fn pod() -> impl Strategy<Value = Json> {
    let node = prop_oneof![Just("n0"), Just("n1"), Just("")];
    (labels(), node, 0..5u8, 0..4u8).prop_map(|(labels, node, kind, ip)| {
        let mut pod = json!({"metadata": {"labels": labels},
            "spec": {"containers": [], "nodeName": node}, "status": {"phase": "Running"}});
        match kind {
            0 => pod["spec"]["hostNetwork"] = json!(true),
            1 => pod["status"]["phase"] = json!("Succeeded"),
            _ => {}
        }
        if ip > 0 {
            pod["status"]["podIP"] = json!(format!("10.0.0.{ip}"));
        }
        pod
    })
}

fn op() -> impl Strategy<Value = Op> {
    let namespace = || prop_oneof![Just("u"), Just("v")];
    let name = || (namespace(), 0..3usize).prop_map(|(ns, i)| (ns.to_owned(), format!("o{i}")));
    let maybe = |object: BoxedStrategy<Json>| proptest::option::weighted(0.85, object);
    let labelled = labels().prop_map(|labels| json!({"metadata": {"labels": labels}}));
    prop_oneof![
        1 => (namespace(), maybe(labelled.boxed())).prop_map(|(n, o)| Op::Namespace(n, o)),
        4 => (name(), maybe(pod().boxed())).prop_map(|(n, o)| Op::Pod(n, o)),
        2 => (name(), maybe(policy().boxed())).prop_map(|(n, o)| Op::Policy(n, o)),
        2 => (0..2usize).prop_map(Op::Step),
        1 => (0..2usize).prop_map(Op::Break),
        1 => Just(Op::Restart),
    ]
}

fn set<K: Ord>(map: &mut BTreeMap<K, Json>, key: K, object: Option<Json>) {
    match object {
        Some(object) => map.insert(key, object),
        None => map.remove(&key),
    };
}

fn rebuilt(world: &World, rev: u64) -> Policies {
    let mut policies = Policies::default();
    // In the order of the store's keys.
    for (name, object) in &world.namespaces {
        policies.apply_namespace(name, Some(typed(object)), rev);
    }
    for (name, object) in &world.policies {
        policies.apply_policy(name, Some(&typed(object)), rev);
    }
    for (name, object) in &world.pods {
        policies.apply_pod(name, Some(&typed(object)), rev);
    }
    policies
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever happens, a node that has caught up holds what the API's documentation says of the
    /// objects as they are, with the very bytes that a control plane started now would send.
    #[test]
    fn the_incremental_join_is_the_naive_evaluation(ops in proptest::collection::vec(op(), 1..80)) {
        let nodes = ["n0", "n1"];
        let (mut world, mut policies) = (World::default(), Policies::default());
        let mut agents = [Agent::default(), Agent::default()];
        for (rev, op) in (1u64..).zip(ops) {
            match op {
                Op::Namespace(name, object) => {
                    policies.apply_namespace(name, object.as_ref().map(typed), rev);
                    set(&mut world.namespaces, name.to_owned(), object);
                }
                Op::Pod(name, object) => {
                    let pod: Option<Pod> = object.as_ref().map(typed);
                    policies.apply_pod(&name, pod.as_ref(), rev);
                    set(&mut world.pods, name, object);
                }
                Op::Policy(name, object) => {
                    let policy: Option<NetworkPolicy> = object.as_ref().map(typed);
                    policies.apply_policy(&name, policy.as_ref(), rev);
                    set(&mut world.policies, name, object);
                }
                Op::Step(i) => {
                    agents[i].step(&policies, nodes[i], rev);
                    prop_assert_eq!(agents[i].resolved(), naive(&world, nodes[i]));
                    let mut fresh = Agent::default();
                    fresh.step(&rebuilt(&world, rev), nodes[i], rev);
                    prop_assert_eq!(&agents[i].items, &fresh.items);
                }
                Op::Break(i) => agents[i].seen = None,
                Op::Restart => {
                    policies = rebuilt(&world, rev);
                    agents.iter_mut().for_each(|agent| agent.seen = None);
                }
            }
        }
        // Nothing is left of what has gone.
        for name in world.pods.keys() {
            policies.apply_pod(name, None, 1_000);
        }
        for name in world.policies.keys() {
            policies.apply_policy(name, None, 1_000);
        }
        prop_assert!(policies.sets.is_empty() && policies.reaching.is_empty());
        prop_assert!(policies.selecting.is_empty() && policies.pods.is_empty());
        prop_assert!(policies.nodes.values().all(|n| n.sets.is_empty() && n.policies.is_empty()));
    }
}

#[test]
fn a_pod_among_thousands_costs_its_own_item() {
    let mut policies = Policies::default();
    let policy = typed(
        &json!({"spec": {"podSelector": {}, "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"a": "x"}}}]}]}}),
    );
    policies.apply_policy(&("d".into(), "p".into()), Some(&policy), 1);
    let pod = |i: u32| -> Pod {
        typed(&json!({"metadata": {"labels": {"a": "x"}},
            "spec": {"containers": [], "nodeName": if i == 0 { "n" } else { "other" }},
            "status": {"podIP": format!("10.{}.{}.1", i / 250, i % 250)}}))
    };
    for i in 0..5_000 {
        policies.apply_pod(&("d".into(), format!("p{i}")), Some(&pod(i)), 2);
    }
    let (mut seen, mut items) = (Seen::default(), Vec::new());
    policies.step("n", &mut seen, 2, &mut items);
    assert_eq!(items.len(), 5_001);
    items.clear();
    policies.apply_pod(&("d".into(), "new".into()), Some(&pod(5_000)), 3);
    policies.step("n", &mut seen, 3, &mut items);
    assert_eq!(items.len(), 1);
    assert!(items[0].len() < 120, "{} bytes", items[0].len());
    policies.step("n", &mut seen, 4, &mut items);
    assert_eq!(items.len(), 1, "nothing has happened since");
}

#[test]
fn ports_travel_as_written() {
    let policy: NetworkPolicy = typed(
        &json!({"spec": {"podSelector": {}, "policyTypes": ["Egress"],
        "egress": [{"ports": [{"port": 80, "endPort": 90}, {"port": "dns", "protocol": "UDP"},
            {"protocol": "UDP"}, {"port": 7, "protocol": "SCTP"}]}],
        "ingress": [{}]}}),
    );
    let message = PolicyFacts::new("d", &policy).unwrap().message;
    assert!(message.incoming.is_empty() && !message.ingress && message.egress);
    let port = |protocol, first, last, name: &str| proto::PolicyPort {
        protocol,
        first,
        last,
        name: name.to_owned(),
    };
    let rule = &message.outgoing[0];
    assert!(rule.any_peer && !rule.any_port);
    let wanted = [
        port(6, 80, 90, ""),
        port(17, 0, 0, "dns"),
        port(17, 0, 65_535, ""),
    ];
    assert_eq!(rule.ports, wanted);
    assert_eq!(
        rule.sets.len(),
        1,
        "which of all pods have a port of that name must be known"
    );
}

#[test]
fn names_are_allowed_by_the_labels_of_other_clusters_dns_pods() {
    let mut policies = Policies::default();
    policies.add_resolver([10, 96, 0, 10].into(), 0);
    let namespace = json!({"metadata": {"labels": {"kubernetes.io/metadata.name": "kube-system"}}});
    policies.apply_namespace("kube-system", Some(typed(&namespace)), 1);
    let policy = typed(
        &json!({"spec": {"podSelector": {}, "policyTypes": ["Egress"],
        "egress": [{"to": [{"podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}]}]}}),
    );
    policies.apply_policy(&("d".into(), "p".into()), Some(&policy), 2);
    let pod = typed(&json!({"spec": {"containers": [], "nodeName": "n"}}));
    policies.apply_pod(&("d".into(), "web".into()), Some(&pod), 3);
    let mut agent = Agent::default();
    agent.step(&policies, "n", 3);
    let resolved = agent.resolved();
    let (_, peers) = &resolved[&(("d".into(), "p".into()), "Egress")][0];
    let (namespace, name) = RESOLVER_PEER;
    assert_eq!(
        peers,
        &BTreeSet::from([(namespace.to_owned(), name.to_owned())])
    );
}
