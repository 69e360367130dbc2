use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use ebpf_maps::policy::{POLICY_CLOSED, POLICY_OPEN};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use gantry_api::selector::Selector;
use ipnet::IpNet;
use proptest::prelude::*;

use super::plan::{Found, Pair, Rule, Step, Table};
use super::prefix::{PortPrefix, Prefix};
use super::*;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Direction {
    Ingress,
    Egress,
}

/// What a packet asks.
type Question = (Direction, IpAddr, u8, u16);

// --- the maps, and the lookups that the eBPF program makes

#[derive(Clone, Default)]
struct Maps(Found);

impl Maps {
    fn perform(&mut self, step: &Step) {
        let maps = &mut self.0;
        match *step {
            Step::AddRule(rule) => assert!(maps.rules.insert(rule), "{rule:?} is there"),
            Step::RemoveRule(rule) => assert!(maps.rules.remove(&rule), "{rule:?} is not there"),
            Step::SetPeer(prefix, identity) => {
                maps.peers.insert(prefix, identity);
            }
            Step::RemovePeer(prefix) => assert!(maps.peers.remove(&prefix).is_some()),
            Step::SetEndpoint(pod, pair) => {
                maps.endpoints.insert(pod, pair);
            }
            Step::RemoveEndpoint(pod) => assert!(maps.endpoints.remove(&pod).is_some()),
        }
    }

    fn allows(&self, pod: u64, (direction, peer, protocol, port): Question) -> bool {
        let closed = Pair {
            ingress: POLICY_CLOSED,
            egress: POLICY_CLOSED,
        };
        let pair = self.0.endpoints.get(&pod).copied().unwrap_or(closed);
        let policy = match direction {
            Direction::Ingress => pair.ingress,
            Direction::Egress => pair.egress,
        };
        match policy {
            POLICY_OPEN => return true,
            POLICY_CLOSED => return false,
            _ => {}
        }
        let peer = Prefix::from(peer);
        let covers = self
            .0
            .peers
            .iter()
            .filter(|(prefix, _)| prefix.contains(peer));
        let identity = covers
            .max_by_key(|(prefix, _)| prefix.bits())
            .map_or(0, |(_, i)| *i);
        [identity, 0].iter().any(|identity| {
            let rules = self.0.rules.iter();
            let mut own = rules.filter(|r| r.policy == policy && r.identity == *identity);
            own.any(|rule| covers_port(rule, protocol, port))
        })
    }
}

fn covers_port(rule: &Rule, protocol: u8, port: u16) -> bool {
    match rule.ports {
        PortPrefix::All => true,
        PortPrefix::Of {
            protocol: wanted,
            port: start,
            len,
        } => protocol == wanted && (len == 0 || (start ^ port) >> (16 - len) == 0),
    }
}

// --- the documentation of the API, word by word

#[derive(Clone, Default, Debug)]
struct World {
    pods: BTreeMap<usize, LocalPod>,
    policies: OrdMap<PolicyName, Arc<proto::Policy>>,
    peers: Peers,
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn same_port(
    ports: &[proto::BackendPort],
    wanted: &proto::PolicyPort,
    protocol: u8,
    port: u16,
) -> bool {
    let found = ports
        .iter()
        .find(|p| p.name == wanted.name && p.protocol == wanted.protocol);
    found.is_some_and(|p| p.protocol == u32::from(protocol) && p.port == u32::from(port))
}

impl World {
    fn peers_at(&self, set: &str, address: IpAddr) -> Vec<Arc<proto::PolicyPeer>> {
        let members = self
            .peers
            .get(set)
            .into_iter()
            .flat_map(|members| members.values());
        members
            .filter(|peer| peer.addresses.iter().any(|a| **a == bytes(address)))
            .cloned()
            .collect()
    }

    fn rule_allows(&self, pod: &LocalPod, rule: &proto::PolicyRule, question: Question) -> bool {
        let (direction, peer, protocol, port) = question;
        let in_sets: Vec<_> = rule
            .sets
            .iter()
            .flat_map(|set| self.peers_at(set, peer))
            .collect();
        let in_block = rule.blocks.iter().any(|block| {
            let net = |text: &String| text.parse::<IpNet>().unwrap();
            net(&block.cidr).contains(&peer) && !block.except.iter().any(|e| net(e).contains(&peer))
        });
        let peer_matches = rule.any_peer || !in_sets.is_empty() || in_block;
        let numbered = rule.any_port
            || rule.ports.iter().filter(|p| p.name.is_empty()).any(|p| {
                p.protocol == u32::from(protocol) && (p.first..=p.last).contains(&u32::from(port))
            });
        let mut named = rule.ports.iter().filter(|p| !p.name.is_empty());
        let named = match direction {
            Direction::Ingress => named.any(|p| same_port(&pod.ports, p, protocol, port)),
            Direction::Egress => named.any(|p| {
                in_sets
                    .iter()
                    .any(|peer| same_port(&peer.ports, p, protocol, port))
            }),
        };
        peer_matches && (numbered || named)
    }

    fn allows(&self, pod: &LocalPod, question: Question) -> bool {
        let selects = |name: &PolicyName, policy: &proto::Policy| {
            let selector: LabelSelector =
                serde_json::from_slice(&policy.pod_selector_json).unwrap();
            name.namespace == pod.namespace
                && Selector::from_api(&selector).unwrap().matches(&pod.labels)
        };
        let selecting = self
            .policies
            .iter()
            .filter(|(name, policy)| selects(name, policy));
        let rules: Vec<_> = selecting
            .filter_map(|(_, policy)| match question.0 {
                Direction::Ingress => policy.ingress.then_some(&policy.incoming),
                Direction::Egress => policy.egress.then_some(&policy.outgoing),
            })
            .collect();
        rules.is_empty()
            || rules
                .iter()
                .any(|rules| rules.iter().any(|r| self.rule_allows(pod, r, question)))
    }

    fn compile(&self, limits: Limits) -> (compile::Wanted, Vec<StuckPod>) {
        let pods: Vec<LocalPod> = self.pods.values().cloned().collect();
        compile(&pods, &self.policies, &self.peers, limits)
    }
}

const PEERS: [&str; 11] = [
    "10.0.0.1",
    "10.0.0.2",
    "10.0.0.5",
    "10.1.0.1",
    "10.1.0.2",
    "192.0.2.1",
    "0.0.0.0",
    "fd00::1",
    "fd00::2",
    "2001:db8::1",
    "::1",
];

fn questions() -> Vec<Question> {
    let mut questions = Vec::new();
    for direction in [Direction::Ingress, Direction::Egress] {
        for peer in PEERS {
            for (protocol, port) in [(6, 80), (6, 81), (6, 65_535), (17, 53), (17, 80), (1, 0)] {
                questions.push((direction, peer.parse().unwrap(), protocol, port));
            }
        }
    }
    questions
}

// --- random worlds

#[derive(Clone, Debug)]
enum Op {
    Pod(usize, Option<(bool, bool)>),
    Policy(usize, Option<proto::Policy>),
    Set(usize, Vec<(usize, u32)>),
}

fn pod(i: usize, a: bool, b: bool) -> LocalPod {
    let labels = [("a", a), ("b", b)].into_iter().filter(|(_, has)| *has);
    LocalPod {
        id: i as u64,
        namespace: ["u", "v"][i % 2].to_owned(),
        name: format!("p{i}"),
        labels: labels
            .map(|(key, _)| (key.to_owned(), "x".to_owned()))
            .collect(),
        ports: vec![backend_port("web", 6, 80 + u32::from(b))],
    }
}

fn backend_port(name: &str, protocol: u32, port: u32) -> proto::BackendPort {
    proto::BackendPort {
        name: name.to_owned(),
        protocol,
        port,
    }
}

fn rule() -> impl Strategy<Value = proto::PolicyRule> {
    let block = prop_oneof![
        Just(("0.0.0.0/0", vec![])),
        Just(("0.0.0.0/0", vec!["10.0.0.0/8", "192.0.2.0/24"])),
        Just(("10.0.0.0/8", vec!["10.1.0.0/16", "10.0.0.0/30"])),
        Just(("10.0.0.0/30", vec!["10.0.0.1/32"])),
        Just(("10.1.0.1/32", vec![])),
        Just(("::/0", vec!["fd00::/64"])),
        Just(("fd00::/8", vec!["fd00::1/128"])),
        Just(("::/1", vec![])),
    ];
    let block = block.prop_map(|(cidr, except)| proto::PolicyBlock {
        cidr: cidr.to_owned(),
        except: except.into_iter().map(str::to_owned).collect(),
    });
    let port = prop_oneof![
        Just((6, 80, 80, "")),
        Just((6, 0, 65_535, "")),
        Just((6, 81, 65_535, "")),
        Just((17, 50, 80, "")),
        Just((6, 0, 0, "web")),
    ];
    let port = port.prop_map(|(protocol, first, last, name)| proto::PolicyPort {
        protocol,
        first,
        last,
        name: name.to_owned(),
    });
    let sets = proptest::collection::btree_set(0..3usize, 0..3);
    let blocks = proptest::collection::vec(block, 0..3);
    let ports = proptest::collection::vec(port, 0..3);
    (sets, blocks, ports).prop_map(|(sets, blocks, ports)| proto::PolicyRule {
        any_peer: sets.is_empty() && blocks.is_empty(),
        sets: sets.into_iter().map(|i| format!("s{i}")).collect(),
        blocks,
        any_port: ports.is_empty(),
        ports,
    })
}

fn policy() -> impl Strategy<Value = proto::Policy> {
    let selector = prop_oneof![
        Just("{}"),
        Just(r#"{"matchLabels":{"a":"x"}}"#),
        Just(r#"{"matchExpressions":[{"key":"b","operator":"DoesNotExist"}]}"#),
    ];
    let rules = || proptest::collection::vec(rule(), 0..3);
    (selector, any::<(bool, bool)>(), rules(), rules()).prop_map(
        |(selector, (ingress, egress), incoming, outgoing)| proto::Policy {
            pod_selector_json: Bytes::from_static(selector.as_bytes()),
            ingress: ingress || !egress,
            egress,
            incoming,
            outgoing,
        },
    )
}

fn op() -> impl Strategy<Value = Op> {
    let labels = proptest::option::weighted(0.8, any::<(bool, bool)>());
    let members = proptest::collection::vec((0..PEERS.len(), 80..83u32), 0..5);
    prop_oneof![
        (0..4usize, labels).prop_map(|(i, labels)| Op::Pod(i, labels)),
        (0..4usize, proptest::option::weighted(0.8, policy())).prop_map(|(i, p)| Op::Policy(i, p)),
        (0..3usize, members).prop_map(|(i, members)| Op::Set(i, members)),
    ]
}

fn play(world: &mut World, op: &Op) {
    match op {
        Op::Pod(i, None) => {
            world.pods.remove(i);
        }
        Op::Pod(i, Some((a, b))) => {
            world.pods.insert(*i, pod(*i, *a, *b));
        }
        Op::Policy(i, policy) => {
            let (namespace, name) = (["u", "v"][i % 2].to_owned(), format!("q{i}"));
            let name = PolicyName { namespace, name };
            match policy {
                Some(policy) => world.policies.insert(name, Arc::new(policy.clone())),
                None => world.policies.remove(&name),
            };
        }
        Op::Set(i, members) => {
            let peer = |(address, port): &(usize, u32)| proto::PolicyPeer {
                addresses: vec![Bytes::from(bytes(PEERS[*address].parse().unwrap()))],
                ports: vec![backend_port("web", 6, *port)],
            };
            let members = members
                .iter()
                .map(|m| (format!("{m:?}"), Arc::new(peer(m))))
                .collect();
            world.peers.insert(format!("s{i}"), Arc::new(members));
        }
    }
}

const ROOMY: Limits = Limits {
    peers: 10_000,
    rules: 100_000,
};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The lookups say what the API's documentation says; on the way from one state to the next, write
    /// by write, what both allow is allowed and what both refuse is refused; also after a restart.
    #[test]
    fn no_write_shows_what_neither_state_says(
        history in proptest::collection::vec((proptest::collection::vec(op(), 1..4), 0..8u8), 1..10)
    ) {
        let (mut world, mut maps, mut table) = (World::default(), Maps::default(), Table::default());
        let questions = questions();
        for (second, (batch, restart)) in (0u64..).zip(history) {
            let before = world.clone();
            batch.iter().for_each(|op| play(&mut world, op));
            if restart == 0 {
                table = Table::adopt(maps.0.clone());
            }
            let (wanted, stuck) = world.compile(ROOMY);
            prop_assert!(stuck.is_empty());
            let steps = table.plan(&wanted, Duration::from_millis(second * 700));
            let kept = world.pods.iter().filter_map(|(i, new)| Some((before.pods.get(i)?, new)));
            let certain = kept.flat_map(|(old, new)| {
                questions.iter().map(move |question| (old, new, *question))
            });
            let certain: Vec<_> = certain
                .filter(|(old, new, question)| {
                    before.allows(old, *question) == world.allows(new, *question)
                })
                .map(|(_, new, question)| (new.id, question, world.allows(new, question)))
                .collect();
            for step in &steps {
                maps.perform(step);
                for (pod, question, both) in &certain {
                    let shown = maps.allows(*pod, *question);
                    prop_assert_eq!(shown, *both, "{:?} after {:?} of {:?}", question, step, steps);
                }
            }
            for pod in world.pods.values() {
                for question in &questions {
                    let wanted = world.allows(pod, *question);
                    prop_assert_eq!(maps.allows(pod.id, *question), wanted, "{:?} {:?}", pod, question);
                }
            }
            let again = table.plan(&wanted, Duration::from_millis(second * 700));
            prop_assert_eq!(again, Vec::new());
        }
        // Everything goes in the end.
        let nothing = compile::Wanted::default();
        for second in [100, 102] {
            table.plan(&nothing, Duration::from_secs(second)).iter().for_each(|step| maps.perform(step));
        }
        prop_assert!(maps.0.rules.is_empty() && maps.0.peers.is_empty() && maps.0.endpoints.is_empty());
    }

    /// Without room for passage pods are closed meanwhile: nothing is allowed that both states refuse, and
    /// in the end all is as it should be.
    #[test]
    fn without_room_for_passage_pods_are_closed_meanwhile(
        history in proptest::collection::vec(proptest::collection::vec(op(), 1..4), 1..10)
    ) {
        let (mut world, mut maps, mut table) = (World::default(), Maps::default(), Table::with_room(0));
        let questions = questions();
        for (second, batch) in (0u64..).zip(history) {
            let before = world.clone();
            batch.iter().for_each(|op| play(&mut world, op));
            let (wanted, _) = world.compile(ROOMY);
            let steps = table.plan(&wanted, Duration::from_secs(second));
            let kept = world.pods.iter().filter_map(|(i, new)| Some((before.pods.get(i)?, new)));
            let refused: Vec<_> = kept
                .flat_map(|(old, new)| questions.iter().map(move |question| (old, new, *question)))
                .filter(|(old, new, question)| {
                    !before.allows(old, *question) && !world.allows(new, *question)
                })
                .map(|(_, new, question)| (new.id, question))
                .collect();
            for step in &steps {
                maps.perform(step);
                for (pod, question) in &refused {
                    prop_assert!(!maps.allows(*pod, *question), "{:?} after {:?}", question, step);
                }
            }
            for pod in world.pods.values() {
                for question in &questions {
                    prop_assert_eq!(maps.allows(pod.id, *question), world.allows(pod, *question));
                }
            }
        }
    }

    /// Where the maps are too small a pod is closed and reported; never is anything allowed that the
    /// policies refuse, and other pods are served.
    #[test]
    fn what_does_not_fit_is_refused(ops in proptest::collection::vec(op(), 1..20), peers in 1..20usize, rules in 1..60usize) {
        let mut world = World::default();
        ops.iter().for_each(|op| play(&mut world, op));
        let (wanted, stuck) = world.compile(Limits { peers, rules });
        prop_assert!(wanted.peers.len() <= peers);
        let (mut maps, mut table) = (Maps::default(), Table::default());
        table.plan(&wanted, Duration::ZERO).iter().for_each(|step| maps.perform(step));
        prop_assert!(maps.0.rules.len() <= rules);
        let stuck: BTreeSet<String> = stuck.into_iter().map(|stuck| stuck.pod).collect();
        for pod in world.pods.values() {
            for question in questions() {
                let (allowed, shown) = (world.allows(pod, question), maps.allows(pod.id, question));
                prop_assert!(allowed || !shown, "{pod:?} {question:?}");
                let is_stuck = stuck.contains(&format!("{}/{}", pod.namespace, pod.name));
                prop_assert!(is_stuck || shown == allowed, "{pod:?} {question:?}");
            }
        }
    }
}

#[test]
fn one_peer_more_is_one_write() {
    let mut world = World::default();
    play(&mut world, &Op::Pod(0, Some((true, true))));
    let rule = |sets: &[&str]| proto::PolicyRule {
        sets: sets.iter().map(|s| (*s).to_owned()).collect(),
        any_port: true,
        ..Default::default()
    };
    let policy = proto::Policy {
        pod_selector_json: Bytes::from_static(b"{}"),
        ingress: true,
        incoming: vec![rule(&["s0"])],
        ..Default::default()
    };
    play(&mut world, &Op::Policy(0, Some(policy)));
    let members = |n: u32| {
        let peer = |i: u32| proto::PolicyPeer {
            addresses: vec![Bytes::copy_from_slice(&(0x0a02_0000 + i).to_be_bytes())],
            ports: Vec::new(),
        };
        Arc::new(
            (0..n)
                .map(|i| (format!("d/{i}"), Arc::new(peer(i))))
                .collect(),
        )
    };
    let mut table = Table::default();
    world.peers.insert("s0".to_owned(), members(5_000));
    let steps = table.plan(&world.compile(ROOMY).0, Duration::ZERO);
    // One rule for all of them, one entry each, and the pod itself.
    assert_eq!(steps.len(), 1 + 5_000 + 1);
    world.peers.insert("s0".to_owned(), members(5_001));
    let steps = table.plan(&world.compile(ROOMY).0, Duration::ZERO);
    assert!(matches!(steps[..], [Step::SetPeer(..)]), "{steps:?}");
}

#[test]
fn the_numbers_of_a_dead_agent_mean_nothing() {
    let rule = Rule {
        policy: 7,
        identity: 9,
        ports: PortPrefix::All,
    };
    let pair = Pair {
        ingress: 7,
        egress: POLICY_OPEN,
    };
    let peer = Prefix::from("10.0.0.2".parse::<IpAddr>().unwrap());
    let found = Found {
        peers: BTreeMap::from([(peer, 9)]),
        rules: BTreeSet::from([rule]),
        endpoints: BTreeMap::from([(3, pair)]),
    };
    let mut table = Table::adopt(found);
    let steps = table.plan(&compile::Wanted::default(), Duration::from_secs(5));
    let wanted = [
        Step::RemoveEndpoint(3),
        Step::SetPeer(peer, 0),
        Step::RemovePeer(peer),
    ];
    assert_eq!(steps, wanted);
    let steps = table.plan(&compile::Wanted::default(), Duration::from_secs(6));
    assert_eq!(steps, [Step::RemoveRule(rule)]);
}

#[test]
fn numbers_that_come_round_are_not_those_in_use() {
    let mut world = World::default();
    play(&mut world, &Op::Pod(0, Some((true, true))));
    let mut policy = proto::Policy {
        pod_selector_json: Bytes::from_static(b"{}"),
        ingress: true,
        ..Default::default()
    };
    policy.incoming = vec![proto::PolicyRule {
        sets: vec!["s0".to_owned()],
        any_port: true,
        ..Default::default()
    }];
    play(&mut world, &Op::Policy(0, Some(policy)));
    play(&mut world, &Op::Set(0, vec![(0, 80)]));
    let prefix = |text: &str| Prefix::from(text.parse::<IpAddr>().unwrap());
    let in_use = [(1, "192.0.2.1"), (3, "192.0.2.3"), (u32::MAX, "192.0.2.9")];
    let rule = |policy| Rule {
        policy,
        identity: 1,
        ports: PortPrefix::All,
    };
    let found = Found {
        peers: in_use.map(|(number, text)| (prefix(text), number)).into(),
        rules: [rule(2), rule(u32::MAX)].into(),
        endpoints: BTreeMap::from([(
            0,
            Pair {
                ingress: u32::MAX,
                egress: 2,
            },
        )]),
    };
    let steps = Table::adopt(found).plan(&world.compile(ROOMY).0, Duration::ZERO);
    for step in steps {
        match step {
            Step::AddRule(Rule { identity, .. }) | Step::SetPeer(_, identity) => {
                assert!(![1, 3, u32::MAX].contains(&identity), "{step:?}");
            }
            _ => {}
        }
    }
}
