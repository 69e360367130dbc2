//! Packets from clients outside of the nodes, one frame at a time: what comes in by an uplink, and what
//! its answer becomes as it leaves. What is sent on needs routes: that is `outside`.

use aya::maps::lpm_trie::Key;
use ebpf_maps::services::{
    Addr, BACKEND_ON_TRIAL, BackendValue, FRONTEND_DROP, FRONTEND_RESTRICTED, FrontendKey,
    FrontendValue, SCOPE_OUTSIDE_ADDRESS, SCOPE_OUTSIDE_NODE_PORT, SOURCE_RANGE_BITS,
    SourceRangeKey, TrafficValue,
};
use ebpf_maps::uplink::{NODE_OWN, UplinkValue};

use super::frames::{
    ACK, Mac, RST, SYN, TCP, UDP, arp, assert_checksums, ends, frame, icmp, quoted_ends, tcp, udp,
};
use super::maps::Maps;
use super::programs::{OWN_IFINDEX, PASS, Programs, REDIRECT, SHOT};
use crate::services::index::addr_of;

const NODE_MAC: Mac = [2, 0, 0, 0, 0, 1];
const CLIENT_MAC: Mac = [2, 0, 0, 0, 0, 3];
const ALL: Mac = [0xff; 6];

/// The addresses of one family: the node, a client, an address routed to the node, a pod of the node,
/// and no address at all.
struct Family {
    node: &'static str,
    client: &'static str,
    routed: &'static str,
    pod: &'static str,
    any: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        node: "192.0.2.1",
        client: "192.0.2.100",
        routed: "198.51.100.7",
        pod: "10.244.0.2",
        any: "0.0.0.0",
    },
    Family {
        node: "2001:db8::1",
        client: "2001:db8::100",
        routed: "2001:db8:7::7",
        pod: "fd00:244::2",
        any: "::",
    },
];

fn addr(text: &str) -> Addr {
    addr_of(text.parse().unwrap())
}

fn at(address: &str, port: u16) -> String {
    std::net::SocketAddr::new(address.parse().unwrap(), port).to_string()
}

fn shown(frame: &[u8]) -> (String, String) {
    let (from, to) = ends(frame);
    (from.to_string(), to.to_string())
}

fn packet(proto: u8, from: &str, to: &str, flags: u8, data: &[u8]) -> Vec<u8> {
    match proto {
        TCP => tcp(from, to, flags, data),
        _ => udp(from, to, data),
    }
}

fn node() -> Option<Programs> {
    let programs = Programs::new()?;
    let value = UplinkValue {
        v4: addr(FAMILIES[0].node),
        v6: addr(FAMILIES[1].node),
        mac: NODE_MAC,
        xdp: 0,
        _pad: 0,
    };
    let mut uplinks = programs.hash::<u32, UplinkValue>("UPLINKS");
    uplinks.insert(OWN_IFINDEX, value, 0).unwrap();
    let mut nodes = programs.hash::<Addr, u32>("NODE_ADDRESSES");
    for family in &FAMILIES {
        nodes.insert(addr(family.node), NODE_OWN, 0).unwrap();
    }
    Some(programs)
}

fn for_each(test: impl Fn(&mut Programs, &Family, u8)) {
    for family in &FAMILIES {
        for proto in [TCP, UDP] {
            let Some(mut programs) = node() else { return };
            test(&mut programs, family, proto);
        }
    }
}

fn comes(node: &mut Programs, packet: &[u8]) -> super::programs::Outcome {
    node.run("from_netdev", &frame(CLIENT_MAC, NODE_MAC, packet))
}

fn leaves(node: &mut Programs, packet: &[u8]) -> super::programs::Outcome {
    node.run("to_netdev", &frame(NODE_MAC, CLIENT_MAC, packet))
}

#[test]
fn a_node_port_and_a_routed_address_lead_to_a_backend_and_back() {
    for_each(|node, family, proto| {
        let (client, backend) = (at(family.client, 4000), at(family.pod, 8080));
        let port = at(family.any, 30_080);
        node.serve_as(&port, proto, SCOPE_OUTSIDE_NODE_PORT, 10, 0, &[&backend]);
        let address = at(family.routed, 80);
        node.serve_as(&address, proto, SCOPE_OUTSIDE_ADDRESS, 20, 0, &[&backend]);
        for (number, frontend) in [at(family.node, 30_080), address].iter().enumerate() {
            let client = at(family.client, 4000 + number as u16);
            for (flags, data) in [(SYN, &b""[..]), (ACK, b"GET /"), (ACK, b"odd")] {
                let outcome = comes(node, &packet(proto, &client, frontend, flags, data));
                assert_eq!(outcome.verdict, PASS, "{outcome:?}");
                assert_eq!(shown(&outcome.frame), (client.clone(), backend.clone()));
                assert_checksums(&outcome.frame);
            }
            let outcome = leaves(node, &packet(proto, &backend, &client, ACK, b"200"));
            assert_eq!(outcome.verdict, PASS);
            assert_eq!(shown(&outcome.frame), (frontend.clone(), client));
            assert_checksums(&outcome.frame);
        }
        assert_eq!(node.flows().len(), 4);
        // Nobody's port, nobody's address, and another protocol than it is served by.
        let other = if proto == TCP { UDP } else { TCP };
        for (proto, to) in [
            (proto, at(family.node, 30_081)),
            (proto, at(family.pod, 30_080)),
            (other, at(family.routed, 80)),
        ] {
            let sent = packet(proto, &client, &to, SYN, b"");
            let outcome = comes(node, &sent);
            assert_eq!((outcome.verdict, &outcome.frame[14..]), (PASS, &sent[..]));
        }
    });
}

#[test]
fn a_frontend_without_backends_refuses_or_drops_or_keeps_out() {
    for_each(|node, family, proto| {
        let (client, frontend) = (at(family.client, 4000), at(family.routed, 80));
        node.serve_as(&frontend, proto, SCOPE_OUTSIDE_ADDRESS, 10, 0, &[]);
        let sent = packet(proto, &client, &frontend, SYN, b"");
        let outcome = comes(node, &sent);
        assert_eq!(
            (outcome.verdict, outcome.dropped),
            (REDIRECT, Some("no_backend"))
        );
        assert_checksums(&outcome.frame);
        assert_eq!(outcome.frame[..12], [CLIENT_MAC, NODE_MAC].concat());
        let header = 14 + if family.pod.contains(':') { 40 } else { 20 };
        if proto == TCP {
            assert_eq!(shown(&outcome.frame), (frontend.clone(), client.clone()));
            assert_eq!(outcome.frame[header + 13], RST | ACK);
        } else {
            let (from, to) = quoted_ends(&outcome.frame);
            assert_eq!(
                (from.to_string(), to.to_string()),
                (client.clone(), frontend.clone())
            );
        }
        let mut frontends = node.hash::<FrontendKey, FrontendValue>("FRONTENDS");
        let (key, value) = frontends.iter().map(Result::unwrap).next().unwrap();
        let mut set = |flags| {
            frontends
                .insert(key, FrontendValue { flags, ..value }, 0)
                .unwrap();
        };
        set(FRONTEND_DROP);
        let outcome = comes(node, &sent);
        assert_eq!(
            (outcome.verdict, outcome.dropped),
            (SHOT, Some("no_backend_here"))
        );
        set(FRONTEND_DROP | FRONTEND_RESTRICTED);
        let outcome = comes(node, &sent);
        assert_eq!(
            (outcome.verdict, outcome.dropped),
            (SHOT, Some("source_range"))
        );
        let data = SourceRangeKey {
            service_id: 10,
            addr: addr(family.client),
        };
        let mut ranges = node.trie::<SourceRangeKey, u32>("SOURCE_RANGES");
        ranges
            .insert(&Key::new(SOURCE_RANGE_BITS + 120, data), 1, 0)
            .unwrap();
        let outcome = comes(node, &sent);
        assert_eq!(
            outcome.dropped,
            Some("no_backend_here"),
            "the client is in the range"
        );
    });
}

#[test]
fn what_is_for_another_host_of_the_link_is_left_to_it() {
    for_each(|node, family, proto| {
        let (client, backend) = (at(family.client, 4000), at(family.pod, 8080));
        for (base, port, backends) in [(10, 80, &[backend.as_str()][..]), (20, 81, &[])] {
            let frontend = at(family.routed, port);
            node.serve_as(&frontend, proto, SCOPE_OUTSIDE_ADDRESS, base, 0, backends);
            let sent = packet(proto, &client, &frontend, SYN, b"data");
            let sent = frame(CLIENT_MAC, [2, 0, 0, 0, 0, 9], &sent);
            let outcome = node.run("from_netdev", &sent);
            assert_eq!((outcome.verdict, outcome.dropped), (PASS, None));
            assert_eq!(outcome.frame, sent);
        }
        assert_eq!(node.flows().len(), 0);
    });
}

#[test]
fn a_connection_finds_a_backend_though_all_of_its_place_are_on_trial() {
    for_each(|node, family, proto| {
        let backends: Vec<String> = (1..=12).map(|port| at(family.pod, port)).collect();
        let backends: Vec<&str> = backends.iter().map(String::as_str).collect();
        let frontend = at(family.routed, 80);
        node.serve_as(&frontend, proto, SCOPE_OUTSIDE_ADDRESS, 20, 0, &backends);
        let mut all = node.array::<BackendValue>("BACKENDS");
        let mut traffic = node.array::<TrafficValue>("TRAFFIC");
        // All but the last have had the one connection of their trial.
        for id in 20..31 {
            let value = all.get(&id, 0).unwrap();
            let state = BACKEND_ON_TRIAL;
            all.set(id, BackendValue { state, ..value }, 0).unwrap();
            let tried = TrafficValue {
                chosen: 1,
                ..TrafficValue::default()
            };
            traffic.set(id, tried, 0).unwrap();
        }
        for port in 4000..4040 {
            let client = at(family.client, port);
            let outcome = comes(node, &packet(proto, &client, &frontend, SYN, b""));
            assert_eq!((outcome.verdict, outcome.dropped), (PASS, None), "{port}");
            assert_ne!(shown(&outcome.frame).1, frontend);
        }
    });
}

#[test]
fn an_error_of_a_backend_is_about_the_frontend() {
    for_each(|node, family, proto| {
        let (client, backend) = (at(family.client, 4000), at(family.pod, 8080));
        let frontend = at(family.routed, 80);
        node.serve_as(&frontend, proto, SCOPE_OUTSIDE_ADDRESS, 20, 0, &[&backend]);
        let outcome = comes(node, &packet(proto, &client, &frontend, SYN, b"question"));
        let quoted = &outcome.frame[14..][..48.min(outcome.frame.len() - 14)];
        let head = if family.pod.contains(':') {
            [1, 4]
        } else {
            [3, 3]
        };
        let outcome = leaves(node, &icmp(family.pod, family.client, head, [0; 4], quoted));
        assert_eq!(outcome.verdict, PASS);
        assert_checksums(&outcome.frame);
        assert_eq!(ends(&outcome.frame).0.ip().to_string(), family.routed);
        let (from, to) = quoted_ends(&outcome.frame);
        assert_eq!((from.to_string(), to.to_string()), (client, frontend));
    });
}

#[test]
fn who_asks_for_an_announced_address_is_answered() {
    let Some(mut node) = node() else { return };
    let mut announced = node.hash::<Addr, u32>("ANNOUNCED");
    announced.insert(addr("192.0.2.200"), 1, 0).unwrap();
    let ask = |target| arp(1, (CLIENT_MAC, "192.0.2.100"), ([0; 6], target));
    let asked = frame(CLIENT_MAC, ALL, &ask("192.0.2.200"));
    let outcome = node.run("from_netdev", &asked);
    assert_eq!(outcome.verdict, REDIRECT);
    let answer = arp(2, (NODE_MAC, "192.0.2.200"), (CLIENT_MAC, "192.0.2.100"));
    assert_eq!(outcome.frame, frame(NODE_MAC, CLIENT_MAC, &answer));
    let asked = frame(CLIENT_MAC, ALL, &ask("192.0.2.201"));
    let outcome = node.run("from_netdev", &asked);
    assert_eq!(
        (outcome.verdict, outcome.frame),
        (PASS, asked),
        "it is not ours"
    );
}

/// A solicitation; without an option when nobody asks, who wants the address for himself.
fn solicitation(asker: &str, target: &str) -> Vec<u8> {
    let target: std::net::Ipv6Addr = target.parse().unwrap();
    let [.., a, b, c] = target.octets();
    let group = format!("ff02::1:ff{a:02x}:{b:02x}{c:02x}");
    let mut message = target.octets().to_vec();
    if asker != "::" {
        message.extend([&[1, 1][..], &CLIENT_MAC].concat());
    }
    let mut packet = icmp(asker, &group, [135, 0], [0; 4], &message);
    packet[7] = 255; // the hop limit
    packet
}

#[test]
fn who_solicits_an_announced_address_gets_an_advertisement() {
    let Some(mut node) = node() else { return };
    let mut announced = node.hash::<Addr, u32>("ANNOUNCED");
    announced.insert(addr("2001:db8::200"), 1, 0).unwrap();
    let group: Mac = [0x33, 0x33, 0xff, 0, 2, 0];
    for (asker, to, to_mac, flags) in [
        ("2001:db8::100", "2001:db8::100", CLIENT_MAC, 0x60),
        ("::", "ff02::1", [0x33, 0x33, 0, 0, 0, 1], 0x20),
    ] {
        let asked = frame(CLIENT_MAC, group, &solicitation(asker, "2001:db8::200"));
        let outcome = node.run("from_netdev", &asked);
        assert_eq!(outcome.verdict, REDIRECT, "{asker}");
        assert_checksums(&outcome.frame);
        let mut message = addr_bytes("2001:db8::200");
        message.extend([&[2, 1][..], &NODE_MAC].concat());
        let mut answer = icmp("2001:db8::200", to, [136, 0], [flags, 0, 0, 0], &message);
        answer[7] = 255;
        assert_eq!(outcome.frame, frame(NODE_MAC, to_mac, &answer));
    }
    let mut routed = solicitation("2001:db8::100", "2001:db8::200");
    routed[7] = 64;
    let other = solicitation("2001:db8::100", "2001:db8::201");
    for (packet, why) in [(routed, "from beyond a router"), (other, "not ours")] {
        let asked = frame(CLIENT_MAC, group, &packet);
        let outcome = node.run("from_netdev", &asked);
        assert_eq!((outcome.verdict, outcome.frame), (PASS, asked), "{why}");
    }
}

fn addr_bytes(text: &str) -> Vec<u8> {
    text.parse::<std::net::Ipv6Addr>().unwrap().octets().into()
}
