//! NetworkPolicies and clients outside of the nodes, by real sockets: by node port, load balancer or
//! external address. Where the client's own address is kept (a backend of the node that was asked, so also
//! all of `externalTrafficPolicy: Local`) it is what a policy sees; where another node was asked, it sees that
//! node.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ebpf_maps::services::{SCOPE_OUTSIDE_ADDRESS, SCOPE_OUTSIDE_NODE_PORT};
use gantry_api::proto;

use super::bed::ip;
use super::frames::{TCP, UDP};
use super::maps::Maps;
use super::outside::{CLIENT, NODE, OTHER, Outside};
use super::policy_wires::{Node, rule};
use super::wires::{Namespace, SHORT, V4, V6, at, tcp_to, udp_to};
use crate::policy::PolicyName;
use crate::view::View;

/// On no interface of the node: a load balancer's or an external address.
const ROUTED: [&str; 2] = ["198.51.100.7", "2001:db8:7::7"];
const NODE_PORT: u16 = 30_080;
const PORT: u16 = 8080;

struct World {
    outside: Outside,
    view: View,
}

/// Who asks, and whether by TCP and by UDP he is answered; the same in both families.
type Reached = [bool; 2];
const BOTH: Reached = [true, true];
const NEITHER: Reached = [false, false];

impl World {
    fn new() -> Option<Self> {
        let Node { wires, mut view } = Node::new()?;
        let outside = Outside::around(wires, None)?;
        let mut base = 100;
        for (family, (any, pod)) in [("0.0.0.0", V4[1]), ("::", V6[1])].into_iter().enumerate() {
            let backend = at(pod, PORT).to_string();
            for (address, port, scope) in [
                (any, NODE_PORT, SCOPE_OUTSIDE_NODE_PORT),
                (ROUTED[family], 80, SCOPE_OUTSIDE_ADDRESS),
            ] {
                for proto in [TCP, UDP] {
                    let frontend = at(address, port).to_string();
                    (outside.wires).serve_as(&frontend, proto, scope, base, 0, &[&backend]);
                    base += 2;
                }
            }
        }
        view.rev += 1;
        Some(Self { outside, view })
    }

    /// Pod 1 is sent only what comes from here, but for a part of it.
    fn allow(&mut self, blocks: &[(&str, &[&str])], ports: &[(u32, u32, u32)]) {
        let blocks = blocks.iter().map(|(cidr, except)| proto::PolicyBlock {
            cidr: (*cidr).into(),
            except: except.iter().map(|text| (*text).to_owned()).collect(),
        });
        let from = proto::PolicyRule {
            any_peer: blocks.len() == 0,
            blocks: blocks.collect(),
            ..rule(ports)
        };
        let policy = proto::Policy {
            pod_selector_json: Bytes::from_static(br#"{"matchLabels":{"app":"db"}}"#),
            ingress: true,
            egress: true,
            incoming: vec![from],
            ..Default::default()
        };
        let name = PolicyName {
            namespace: "d".into(),
            name: "db".into(),
        };
        Arc::make_mut(&mut self.view.policies).insert(name, Arc::new(policy));
        self.view.rev += 1;
        let now = Duration::from_secs(self.view.rev);
        let policies = &mut self.outside.wires.policies;
        assert_eq!(policies.apply(&self.view, now).unwrap(), []);
    }

    /// Whether `from` reaches pod 1 by these addresses, one of each family; whom the pod then sees.
    fn reaches(&self, from: &Namespace, by: [SocketAddr; 2], seen_as: [&str; 2]) -> Reached {
        let pod = &self.outside.wires.pods[1];
        let [v4, v6] = [0, 1].map(|family: usize| {
            let backend = at([V4, V6][family][1], PORT);
            let listener = pod.listen(backend);
            let socket = pod.bind(backend);
            let seen = [
                tcp_to(from, &listener, by[family]).ok(),
                udp_to(from, &socket, by[family]).ok(),
            ];
            seen.map(|seen| match seen {
                Some((client, answered)) => {
                    let own = at(seen_as[family], 0).ip();
                    assert_eq!((client.ip(), answered), (own, by[family]));
                    true
                }
                None => false,
            })
        });
        assert_eq!(v4, v6, "the families differ by {by:?}");
        v4
    }

    /// Whether the client does, whichever way he asks this node.
    fn client_reaches(&self) -> Reached {
        let ways = [
            [0, 1].map(|family: usize| at(NODE[family], NODE_PORT)),
            [0, 1].map(|family: usize| at(ROUTED[family], 80)),
        ];
        let [a, b] = ways.map(|by| self.reaches(&self.outside.client, by, CLIENT));
        assert_eq!(a, b, "the ways differ");
        a
    }
}

#[test]
fn a_policy_sees_the_address_of_a_client_outside() {
    let Some(mut world) = World::new() else {
        return;
    };
    world.allow(&[], &[]);
    // A rule without peers allows everybody.
    assert_eq!(world.client_reaches(), BOTH);
    world.allow(&[("192.0.2.100/32", &[]), ("2001:db8::100/128", &[])], &[]);
    assert_eq!(world.client_reaches(), BOTH);
    // The node that he asks is not the client.
    world.allow(&[("192.0.2.1/32", &[]), ("2001:db8::1/128", &[])], &[]);
    let before = world.outside.wires.dropped("policy");
    assert_eq!(world.client_reaches(), NEITHER);
    assert!(world.outside.wires.dropped("policy") > before);
    world.allow(
        &[
            ("192.0.2.0/24", &["192.0.2.96/28"]),
            ("2001:db8::/64", &["2001:db8::100/120"]),
        ],
        &[],
    );
    assert_eq!(world.client_reaches(), NEITHER);
    // Ports are those of the pod, not of the Service.
    let everybody: [(&str, &[&str]); 2] = [("0.0.0.0/0", &[]), ("::/0", &[])];
    world.allow(&everybody, &[(6, PORT.into(), PORT.into())]);
    assert_eq!(world.client_reaches(), [true, false]);
    world.allow(&everybody, &[(6, 80, 80), (17, 30_080, 30_080)]);
    assert_eq!(world.client_reaches(), NEITHER);
}

#[test]
fn a_policy_sees_the_node_that_a_client_has_asked_where_that_is_another() {
    let Some(mut world) = World::new() else {
        return;
    };
    // The other node sends on what it was asked, from its own address.
    let routes = || {
        ip(&format!("route add 10.244.0.0/24 via {}", NODE[0]));
        ip(&format!("-6 route add fd00:244::/64 via {}", NODE[1]));
    };
    world.outside.other.run(routes);
    let to_pod = [at(V4[1], PORT), at(V6[1], PORT)];
    let reaches = |world: &World| world.reaches(&world.outside.other, to_pod, OTHER);
    world.allow(&[("192.0.2.2/32", &[]), ("2001:db8::2/128", &[])], &[]);
    assert_eq!(reaches(&world), BOTH);
    assert_eq!(world.client_reaches(), NEITHER);
    // Another node is no exception, as the pod's own is for its probes.
    world.allow(&[("192.0.2.100/32", &[]), ("2001:db8::100/128", &[])], &[]);
    assert_eq!(reaches(&world), NEITHER);
    assert_eq!(world.client_reaches(), BOTH);
}

#[test]
fn a_connection_from_outside_goes_on_when_a_policy_comes() {
    use std::io::{Read, Write};
    let Some(mut world) = World::new() else {
        return;
    };
    let view = world.view.clone();
    let policies = &mut world.outside.wires.policies;
    assert_eq!(
        policies
            .apply(&view, Duration::from_secs(view.rev))
            .unwrap(),
        []
    );
    let listener = world.outside.wires.pods[1].listen(at(V4[1], PORT));
    let frontend = at(NODE[0], NODE_PORT);
    let connect = |world: &World| {
        let client = &world.outside.client;
        client.run(|| TcpStream::connect_timeout(&frontend, SHORT))
    };
    let mut client = connect(&world).unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    world.allow(&[("203.0.113.0/24", &[])], &[]);
    let mut buffer = [0; 4];
    for stream in [&client, &accepted] {
        stream.set_read_timeout(Some(SHORT)).unwrap();
    }
    client.write_all(b"ping").unwrap();
    accepted.read_exact(&mut buffer).unwrap();
    accepted.write_all(b"pong").unwrap();
    client.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"pong");
    assert!(connect(&world).is_err(), "a new one is judged");
}
