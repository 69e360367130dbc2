//! NetworkPolicies between real namespaces: from a view to sockets that connect, or do not.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::network_policy::RESOLVER_PEER;
use gantry_api::proto;
use serde_json::json;

use super::wires::{GATEWAY, SHORT, V4, V6, Wires, at, tcp_between, udp_between};
use crate::ids::PodUid;
use crate::policy::PolicyName;
use crate::view::View;

/// A view with both pods, these policies on pod 1 (`db`) or pod 0 (`web`), and set `web` with pod 0.
pub(super) struct Node {
    pub wires: Wires,
    pub view: View,
}

pub(super) fn pod(name: &str) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "d", "labels": {"app": name}},
        "spec": {"containers": [{"name": "c", "ports": [{"name": "sql", "containerPort": 8080}]}]}}))
    .unwrap()
}

pub(super) fn rule(ports: &[(u32, u32, u32)]) -> proto::PolicyRule {
    let port = |(protocol, first, last): &(u32, u32, u32)| proto::PolicyPort {
        protocol: *protocol,
        first: *first,
        last: *last,
        name: String::new(),
    };
    proto::PolicyRule {
        any_port: ports.is_empty(),
        ports: ports.iter().map(port).collect(),
        ..Default::default()
    }
}

impl Node {
    pub(super) fn new() -> Option<Self> {
        Wires::attached().map(Self::of)
    }

    fn of(wires: Wires) -> Self {
        let mut view = View {
            rev: 1,
            ..View::default()
        };
        let pods = [("pod-0", "web"), ("pod-1", "db")];
        let pods = pods.map(|(uid, name)| (PodUid::new(uid).unwrap(), Arc::new(pod(name))));
        view.pods = Arc::new(BTreeMap::from(pods));
        Self { wires, view }
    }

    /// Makes this the policy of the pods with `app`, until the next of the same name.
    pub(super) fn set(&mut self, app: &str, policy: Option<proto::Policy>) {
        let name = PolicyName {
            namespace: "d".into(),
            name: app.into(),
        };
        let policies = Arc::make_mut(&mut self.view.policies);
        match policy {
            Some(policy) => {
                let selector = json!({"matchLabels": {"app": app}}).to_string();
                let pod_selector_json = Bytes::from(selector);
                policies.insert(
                    name,
                    Arc::new(proto::Policy {
                        pod_selector_json,
                        ..policy
                    }),
                );
            }
            None => {
                policies.remove(&name);
            }
        }
        self.apply();
    }

    pub(super) fn ingress(&mut self, rules: Vec<proto::PolicyRule>) {
        let policy = proto::Policy {
            ingress: true,
            incoming: rules,
            ..Default::default()
        };
        self.set("db", Some(policy));
    }

    /// Who is in set `web`, by address.
    pub(super) fn set_members(&mut self, addresses: &[&str]) {
        let octets = |text: &&str| match text.parse().unwrap() {
            std::net::IpAddr::V4(a) => Bytes::copy_from_slice(&a.octets()),
            std::net::IpAddr::V6(a) => Bytes::copy_from_slice(&a.octets()),
        };
        let peer = proto::PolicyPeer {
            addresses: addresses.iter().map(octets).collect(),
            ports: Vec::new(),
        };
        let members = std::iter::once(("d/web".to_owned(), Arc::new(peer))).collect();
        Arc::make_mut(&mut self.view.peers).insert("web".into(), Arc::new(members));
        self.apply();
    }

    pub(super) fn apply(&mut self) {
        self.view.rev += 1;
        let now = Duration::from_secs(self.view.rev);
        assert_eq!(self.wires.policies.apply(&self.view, now).unwrap(), []);
    }

    /// Whether pod 0 reaches this port of pod 1 by TCP and by UDP; the same in both families.
    fn reaches(&self, port: u16) -> (bool, bool) {
        let [web, db] = &self.wires.pods;
        let [v4, v6] = [V4, V6].map(|addresses| {
            let server = at(addresses[1], port);
            (
                tcp_between(web, db, server).is_ok(),
                udp_between(web, db, server).is_ok(),
            )
        });
        assert_eq!(v4, v6, "the families differ at port {port}");
        v4
    }
}

const NEITHER: (bool, bool) = (false, false);
const BOTH: (bool, bool) = (true, true);

#[test]
fn a_pod_that_is_isolated_gets_answers_and_its_node() {
    if let Some(node) = Node::new() {
        is_isolated(node);
    }
}

#[test]
fn a_pod_without_a_bridge_is_isolated_as_well() {
    if let Some(wires) = Wires::routed() {
        is_isolated(Node::of(wires));
    }
}

fn is_isolated(mut node: Node) {
    node.apply();
    assert_eq!(node.reaches(8080), BOTH);
    node.ingress(Vec::new());
    assert_eq!(node.reaches(8080), NEITHER);
    assert!(node.wires.dropped("policy") > 0);
    let [web, db] = &node.wires.pods;
    for (port, addresses) in [(8081, V4), (8082, V6)] {
        tcp_between(db, web, at(addresses[0], port)).unwrap();
        udp_between(db, web, at(addresses[0], port)).unwrap();
        tcp_between(&node.wires.node, db, at(addresses[1], port)).unwrap();
        udp_between(&node.wires.node, db, at(addresses[1], port)).unwrap();
    }
    // The API forgets the pod before the node is done with it: what held, holds.
    let uid = PodUid::new("pod-1").unwrap();
    node.wires.policies.attach(&uid);
    let pods = node.view.pods.clone();
    Arc::make_mut(&mut node.view.pods).remove(&uid);
    node.set("db", None);
    let policies = std::mem::take(&mut node.view.policies);
    node.apply();
    assert_eq!(node.reaches(8083), BOTH, "its policy has gone");
    node.ingress(Vec::new());
    assert_eq!(node.reaches(8084), NEITHER, "a policy holds for it");
    (node.view.pods, node.view.policies) = (pods, policies);
    node.apply();
    assert_eq!(node.reaches(8085), BOTH);
    node.wires.policies.detach(&uid).unwrap();
    assert_eq!(node.reaches(8086), NEITHER, "nobody has judged it");
}

#[test]
fn peers_are_allowed_by_set_by_port_and_by_block() {
    let Some(mut node) = Node::new() else { return };
    let from_web = |ports: &[(u32, u32, u32)]| proto::PolicyRule {
        sets: vec!["web".into()],
        ..rule(ports)
    };
    node.ingress(vec![from_web(&[(6, 8000, 8500)])]);
    assert_eq!(node.reaches(8080), NEITHER, "the set has no members yet");
    node.set_members(&[V4[0], V6[0]]);
    assert_eq!(node.reaches(8080), (true, false));
    assert_eq!(node.reaches(8501), NEITHER);
    node.ingress(vec![from_web(&[])]);
    assert_eq!(node.reaches(8501), BOTH);
    node.set_members(&["10.9.9.9"]);
    assert_eq!(node.reaches(8502), NEITHER);
    let block = |cidr: &str, except: &[&str]| proto::PolicyBlock {
        cidr: cidr.into(),
        except: except.iter().map(|text| (*text).to_owned()).collect(),
    };
    let all = |except: [&[&str]; 2]| proto::PolicyRule {
        blocks: vec![block("0.0.0.0/0", except[0]), block("::/0", except[1])],
        ..rule(&[])
    };
    node.ingress(vec![all([&["10.244.0.0/30"], &["fd00:244::/120"]])]);
    assert_eq!(node.reaches(8503), NEITHER, "both are in an exception");
    node.ingress(vec![all([&["10.244.0.3/32"], &["fd00:244::3/128"]])]);
    assert_eq!(node.reaches(8504), BOTH);
    let named = proto::PolicyRule {
        any_peer: true,
        ports: vec![proto::PolicyPort {
            protocol: 6,
            name: "sql".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    node.ingress(vec![named]);
    assert_eq!(node.reaches(8080), (true, false));
    assert_eq!(node.reaches(8505), NEITHER);
}

#[test]
fn what_a_pod_sends_is_limited_too() {
    let Some(mut node) = Node::new() else { return };
    let to_names = proto::Policy {
        egress: true,
        outgoing: vec![proto::PolicyRule {
            any_peer: true,
            ..rule(&[(17, 53, 53)])
        }],
        ..Default::default()
    };
    node.set("web", Some(to_names));
    assert_eq!(node.reaches(53), (false, true));
    assert_eq!(node.reaches(8080), NEITHER);
    let [web, db] = &node.wires.pods;
    // It answers whoever asks, also its node, and asks the node for names.
    tcp_between(db, web, at(V4[0], 8081)).unwrap();
    udp_between(&node.wires.node, web, at(V6[0], 8081)).unwrap();
    udp_between(web, &node.wires.node, at(GATEWAY, 53)).unwrap();
    tcp_between(web, &node.wires.node, at(GATEWAY, 8082)).unwrap_err();
    // The resolver of the node is the cluster's DNS, whoever it is to the rule.
    let to_resolver = proto::Policy {
        egress: true,
        outgoing: vec![proto::PolicyRule {
            sets: vec!["dns".into()],
            ..rule(&[(17, 53, 53)])
        }],
        ..Default::default()
    };
    node.set("web", Some(to_resolver));
    let [web, _] = &node.wires.pods;
    udp_between(web, &node.wires.node, at(GATEWAY, 53)).unwrap_err();
    let (namespace, name) = RESOLVER_PEER;
    let peer = proto::PolicyPeer {
        addresses: vec![Bytes::from_static(&[10, 96, 0, 10])],
        ports: Vec::new(),
    };
    let members = std::iter::once((format!("{namespace}/{name}"), Arc::new(peer))).collect();
    Arc::make_mut(&mut node.view.peers).insert("dns".into(), Arc::new(members));
    node.apply();
    let [web, _] = &node.wires.pods;
    udp_between(web, &node.wires.node, at(GATEWAY, 53)).unwrap();
    assert_eq!(node.reaches(53), NEITHER);
    node.set("web", None);
    assert_eq!(node.reaches(8083), BOTH);
}

#[test]
fn a_connection_outlives_the_policy_that_would_have_refused_it() {
    let Some(mut node) = Node::new() else { return };
    node.apply();
    let [web, db] = &node.wires.pods;
    for addresses in [V4, V6] {
        let server = at(addresses[1], 8090);
        let listener = db.listen(server);
        let mut client = web
            .run(|| TcpStream::connect_timeout(&server, SHORT))
            .unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        let [web_policy, db_policy] = [true, false].map(|egress| proto::Policy {
            ingress: true,
            egress,
            ..Default::default()
        });
        let policies = Arc::make_mut(&mut node.view.policies);
        for (app, policy) in [("web", web_policy), ("db", db_policy)] {
            let name = PolicyName {
                namespace: "d".into(),
                name: app.into(),
            };
            let pod_selector_json = Bytes::from_static(b"{}");
            policies.insert(
                name,
                Arc::new(proto::Policy {
                    pod_selector_json,
                    ..policy
                }),
            );
        }
        node.view.rev += 1;
        node.wires
            .policies
            .apply(&node.view, Duration::from_secs(node.view.rev))
            .unwrap();
        for stream in [&client, &accepted] {
            stream.set_read_timeout(Some(SHORT)).unwrap();
        }
        let mut buffer = [0; 4];
        accepted.write_all(b"ping").unwrap();
        client.read_exact(&mut buffer).unwrap();
        client.write_all(b"pong").unwrap();
        accepted.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"pong");
        web.run(|| TcpStream::connect_timeout(&server, SHORT))
            .unwrap_err();
        node.view.policies = Arc::default();
        node.view.rev += 1;
        node.wires
            .policies
            .apply(&node.view, Duration::from_secs(node.view.rev))
            .unwrap();
    }
}

#[test]
fn a_new_agent_finds_the_policies_in_force_and_goes_on() {
    let Some(mut node) = Node::new() else { return };
    node.ingress(Vec::new());
    assert_eq!(node.reaches(8080), NEITHER);
    // The agent is killed, and starts again without a view.
    let mut ebpf = super::super::load::load(&node.wires.paths).unwrap().ebpf;
    node.wires.policies = super::super::policies::Policies::take(&mut ebpf, None).unwrap();
    assert_eq!(
        node.wires
            .policies
            .apply(&View::default(), Duration::ZERO)
            .unwrap(),
        []
    );
    assert_eq!(node.reaches(8080), NEITHER);
    node.set("db", None);
    assert_eq!(node.reaches(8081), BOTH);
}
