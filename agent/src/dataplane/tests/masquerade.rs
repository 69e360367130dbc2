//! Pods' packets to the outside, one frame at a time: what leaves by an uplink, and what comes back.

use aya::maps::lpm_trie::Key;
use ebpf_maps::flow::{FlowKey, FlowValue, ZONE_OUTSIDE};
use ebpf_maps::services::Addr;
use ebpf_maps::uplink::{
    NEVER, NODE_BEHIND, NODE_OTHER, POD, SOURCE_PORT_COUNT, SOURCE_PORT_MIN, SWITCH_MASQUERADE,
    UplinkValue,
};

use super::frames::{
    ACK, Mac, SYN, TCP, UDP, assert_checksums, ends, frame, icmp, quoted_ends, tcp, udp, v4, v6,
};
use super::maps::Maps;
use super::programs::{OWN_IFINDEX, PASS, Programs, SHOT};
use crate::services::index::addr_of;

const NODE_MAC: Mac = [2, 0, 0, 0, 0, 1];
const ROUTER_MAC: Mac = [2, 0, 0, 0, 0, 2];
const GRE: u8 = 47;
const FRAGMENT: u8 = 44;

/// The addresses of one family: two pods of the node, the node, another node, a pod there, a host of
/// the world and a router on the way to it.
struct Family {
    pod: &'static str,
    second: &'static str,
    node: &'static str,
    other: &'static str,
    remote: &'static str,
    world: &'static str,
    router: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        pod: "10.244.0.2",
        second: "10.244.0.3",
        node: "192.0.2.1",
        other: "192.0.2.2",
        remote: "10.244.1.9",
        world: "203.0.113.5",
        router: "192.0.2.254",
    },
    Family {
        pod: "fd00:244::2",
        second: "fd00:244::3",
        node: "2001:db8::1",
        other: "2001:db8::2",
        remote: "fd00:244:1::9",
        world: "2001:db9::5",
        router: "2001:db8::fe",
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

/// A node that masquerades; the interface under test is its uplink.
fn node() -> Option<Programs> {
    let mut programs = Programs::new()?;
    set_uplink(&programs, FAMILIES[0].node, FAMILIES[1].node);
    let mut nodes = programs.hash::<Addr, u32>("NODE_ADDRESSES");
    let mut rows = programs.trie::<Addr, u32>("MASQUERADE");
    for family in &FAMILIES {
        nodes.insert(addr(family.other), NODE_OTHER, 0).unwrap();
        let (own, all) = if family.pod.contains(':') {
            (64, 40)
        } else {
            (96 + 24, 96 + 16)
        };
        rows.insert(&Key::new(own, addr(family.pod)), POD | NEVER, 0)
            .unwrap();
        rows.insert(&Key::new(all, addr(family.remote)), NEVER, 0)
            .unwrap();
    }
    switch(&programs, 1);
    Some(programs)
}

fn set_uplink(programs: &Programs, v4: &str, v6: &str) {
    let value = UplinkValue {
        v4: addr(v4),
        v6: addr(v6),
        mac: NODE_MAC,
        xdp: 0,
        _pad: 0,
    };
    let mut uplinks = programs.hash::<u32, UplinkValue>("UPLINKS");
    uplinks.insert(OWN_IFINDEX, value, 0).unwrap();
}

fn switch(programs: &Programs, on: u32) {
    let mut switches = programs.array::<u32>("SWITCHES");
    switches.set(SWITCH_MASQUERADE, on, 0).unwrap();
}

/// Runs `test` for every family and protocol, each on a new node.
fn for_each(test: impl Fn(&mut Programs, &Family, u8)) {
    for family in &FAMILIES {
        for proto in [TCP, UDP] {
            let Some(mut programs) = node() else { return };
            test(&mut programs, family, proto);
        }
    }
}

fn leaves(node: &mut Programs, packet: &[u8]) -> Vec<u8> {
    let outcome = node.run("to_netdev", &frame(NODE_MAC, ROUTER_MAC, packet));
    assert_eq!(outcome.verdict, PASS, "{outcome:?}");
    outcome.frame
}

fn comes(node: &mut Programs, packet: &[u8]) -> Vec<u8> {
    let outcome = node.run("from_netdev", &frame(ROUTER_MAC, NODE_MAC, packet));
    assert_eq!(outcome.verdict, PASS, "{outcome:?}");
    outcome.frame
}

fn is_untouched(node: &mut Programs, program: &str, packet: &[u8]) {
    let sent = frame(NODE_MAC, ROUTER_MAC, packet);
    let outcome = node.run(program, &sent);
    assert_eq!((outcome.verdict, &outcome.frame), (PASS, &sent));
}

/// The identifier of an echo.
fn id_of(frame: &[u8]) -> u16 {
    let at = 14 + if frame[14] >> 4 == 4 { 20 } else { 40 } + 4;
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

/// An echo of the addresses' family.
fn echo(from: &str, to: &str, is_reply: bool, id: u16) -> Vec<u8> {
    let kind = match (from.contains(':'), is_reply) {
        (false, false) => 8,
        (false, true) => 0,
        (true, false) => 128,
        (true, true) => 129,
    };
    let [high, low] = id.to_be_bytes();
    icmp(from, to, [kind, 0], [high, low, 0, 1], b"are you there")
}

#[test]
fn what_a_pod_sends_to_the_outside_leaves_from_the_node_and_its_answer_comes_back() {
    for_each(|node, family, proto| {
        let (client, server) = (at(family.pod, 4000), at(family.world, 443));
        let mut source = None;
        for (flags, data) in [(SYN, &b""[..]), (ACK, b"hello"), (ACK, b"odd")] {
            let left = leaves(node, &packet(proto, &client, &server, flags, data));
            assert_checksums(&left);
            let (from, to) = ends(&left);
            assert_eq!(
                (from.ip(), to.to_string()),
                (family.node.parse().unwrap(), server.clone())
            );
            assert!(u32::from(from.port()) >= SOURCE_PORT_MIN, "{from}");
            assert_eq!(*source.get_or_insert(from), from, "one flow, one port");
        }
        assert_eq!(node.flows().len(), 2);
        let source = source.unwrap().to_string();
        let came = comes(
            node,
            &packet(proto, &server, &source, ACK, b"hello yourself"),
        );
        assert_eq!(shown(&came), (server.clone(), client));
        assert_checksums(&came);
        // To a port that nothing left from: the node's own.
        let other = at(family.node, 60_000);
        is_untouched(
            node,
            "from_netdev",
            &packet(proto, &server, &other, ACK, b""),
        );
    });
}

#[test]
fn an_echo_leaves_with_an_identifier_of_the_nodes() {
    for family in &FAMILIES {
        let Some(mut node) = node() else { return };
        let mut ids = Vec::new();
        // Both pods ask with one identifier.
        for pod in [family.pod, family.second] {
            let left = leaves(&mut node, &echo(pod, family.world, false, 77));
            assert_checksums(&left);
            assert_eq!(ends(&left).0.ip().to_string(), family.node);
            ids.push(id_of(&left));
        }
        assert_ne!(ids[0], ids[1]);
        for (pod, id) in [family.pod, family.second].iter().zip(ids) {
            let came = comes(&mut node, &echo(family.world, family.node, true, id));
            assert_checksums(&came);
            assert_eq!(ends(&came).1.ip().to_string(), *pod);
            assert_eq!(id_of(&came), 77);
        }
        // Who asks the node itself is answered by it.
        is_untouched(
            &mut node,
            "from_netdev",
            &echo(family.world, family.node, false, 77),
        );
        is_untouched(
            &mut node,
            "to_netdev",
            &echo(family.node, family.world, true, 77),
        );
    }
}

#[test]
fn only_pods_are_masqueraded_and_only_to_the_outside() {
    for_each(|node, family, proto| {
        let client = at(family.pod, 4000);
        for inside in [family.remote, family.other] {
            is_untouched(
                node,
                "to_netdev",
                &packet(proto, &client, &at(inside, 443), SYN, b""),
            );
        }
        let (own, server) = (at(family.node, 4000), at(family.world, 443));
        is_untouched(node, "to_netdev", &packet(proto, &own, &server, SYN, b""));
        assert!(node.flows().is_empty());
        // Off, and on an uplink that has no address of the family.
        switch(node, 0);
        is_untouched(
            node,
            "to_netdev",
            &packet(proto, &client, &server, SYN, b""),
        );
        switch(node, 1);
        let mut uplinks = node.hash::<u32, UplinkValue>("UPLINKS");
        let mut value = uplinks.get(&OWN_IFINDEX, 0).unwrap();
        (value.v4, value.v6) = ([0; 4], [0; 4]);
        uplinks.insert(OWN_IFINDEX, value, 0).unwrap();
        is_untouched(
            node,
            "to_netdev",
            &packet(proto, &client, &server, SYN, b""),
        );
    });
}

/// Its answers to a pod would come by the tunnel, and be refused there.
#[test]
fn a_node_behind_the_tunnel_is_asked_from_the_nodes_own_address() {
    for_each(|node, family, proto| {
        let (client, server) = (at(family.pod, 4000), at(family.other, 6443));
        let mut nodes = node.hash::<Addr, u32>("NODE_ADDRESSES");
        nodes.insert(addr(family.other), NODE_BEHIND, 0).unwrap();
        let left = leaves(node, &packet(proto, &client, &server, SYN, b""));
        assert_checksums(&left);
        let (from, to) = ends(&left);
        assert_eq!(from.ip(), family.node.parse::<std::net::IpAddr>().unwrap());
        assert_eq!(to.to_string(), server);
        let source = from.to_string();
        let came = comes(node, &packet(proto, &server, &source, SYN | ACK, b""));
        assert_eq!(shown(&came), (server.clone(), client.clone()));
        // A flow goes on as it began when its node becomes a neighbour.
        nodes.insert(addr(family.other), NODE_OTHER, 0).unwrap();
        let left = leaves(node, &packet(proto, &client, &server, ACK, b"more"));
        assert_eq!(shown(&left).0, source);
        let second = packet(proto, &at(family.pod, 4001), &server, SYN, b"");
        is_untouched(node, "to_netdev", &second);
    });
}

#[test]
fn who_reaches_a_pod_by_its_own_address_is_answered_from_it() {
    for_each(|node, family, proto| {
        let (client, server) = (at(family.world, 4000), at(family.pod, 8080));
        is_untouched(
            node,
            "from_netdev",
            &packet(proto, &client, &server, SYN, b"you?"),
        );
        is_untouched(
            node,
            "to_netdev",
            &packet(proto, &server, &client, SYN | ACK, b""),
        );
        is_untouched(
            node,
            "from_netdev",
            &packet(proto, &client, &server, ACK, b"more"),
        );
        is_untouched(
            node,
            "to_netdev",
            &packet(proto, &server, &client, ACK, b"me"),
        );
        is_untouched(
            node,
            "from_netdev",
            &echo(family.world, family.pod, false, 5),
        );
        is_untouched(node, "to_netdev", &echo(family.pod, family.world, true, 5));
    });
}

#[test]
fn an_answer_that_begins_nothing_stays_as_it_is() {
    let Some(mut node) = node() else { return };
    let answer = tcp("10.244.0.2:8080", "203.0.113.5:4000", SYN | ACK, b"");
    is_untouched(&mut node, "to_netdev", &answer);
}

#[test]
fn a_forgotten_flow_goes_on_from_its_port() {
    for_each(|node, family, proto| {
        let sent = packet(
            proto,
            &at(family.pod, 4000),
            &at(family.world, 443),
            ACK,
            b"x",
        );
        let before = shown(&leaves(node, &sent)).0;
        let mut flows = node.hash::<FlowKey, FlowValue>("FLOWS");
        for (key, _) in node.flows() {
            flows.remove(&key).unwrap();
        }
        assert_eq!(shown(&leaves(node, &sent)).0, before);
    });
}

#[test]
fn flows_to_one_peer_have_ports_of_their_own() {
    for_each(|node, family, proto| {
        let server = at(family.world, 443);
        let pods = [family.pod, family.second];
        let clients = pods
            .iter()
            .flat_map(|pod| (1..=200).map(|port| at(pod, port)));
        let clients: Vec<String> = clients.collect();
        let sources: std::collections::BTreeSet<String> = clients
            .iter()
            .map(|client| shown(&leaves(node, &packet(proto, client, &server, SYN, b""))).0)
            .collect();
        assert_eq!(sources.len(), clients.len());
    });
}

#[test]
fn without_a_free_port_a_new_flow_is_dropped_and_counted() {
    for_each(|node, family, proto| {
        let server = at(family.world, 443);
        let first = at(family.pod, 4000);
        leaves(node, &packet(proto, &first, &server, SYN, b""));
        let (_, value) = node.flows()[0];
        // Every port is another pod's.
        let mut flows = node.hash::<FlowKey, FlowValue>("FLOWS");
        for offset in 0..SOURCE_PORT_COUNT {
            let port_be = ((SOURCE_PORT_MIN + offset) as u16).to_be();
            let ends = ebpf_maps::flow::Ends {
                source: addr(family.world),
                destination: addr(family.node),
                source_port_be: 443_u16.to_be(),
                destination_port_be: port_be,
            };
            let key = FlowKey {
                ends,
                proto,
                zone: ZONE_OUTSIDE,
                _pad: 0,
            };
            let taken = FlowValue {
                ends: ebpf_maps::flow::Ends {
                    destination: addr(family.remote),
                    ..ends
                },
                ..value
            };
            flows.insert(key, taken, 0).unwrap();
        }
        let sent = packet(proto, &at(family.second, 4001), &server, SYN, b"");
        let outcome = node.run("to_netdev", &frame(NODE_MAC, ROUTER_MAC, &sent));
        assert_eq!((outcome.verdict, outcome.dropped), (SHOT, Some("no_port")));
        // To another peer there are as many again.
        leaves(
            node,
            &packet(
                proto,
                &at(family.second, 4001),
                &at(family.world, 80),
                SYN,
                b"",
            ),
        );
        // And when the flows have ended.
        node.age_flows(ebpf_maps::flow::TCP_ESTABLISHED_TICKS + 2);
        leaves(node, &sent);
    });
}

/// Type and code of errors by family: port unreachable, time exceeded, too big.
const ERRORS: [[[u8; 2]; 3]; 2] = [[[3, 3], [11, 0], [3, 4]], [[1, 4], [3, 0], [2, 0]]];

#[test]
fn an_error_about_what_a_pod_sent_reaches_the_pod() {
    for_each(|node, family, proto| {
        let (client, server) = (at(family.pod, 4000), at(family.world, 443));
        let left = leaves(node, &packet(proto, &client, &server, SYN, b"question"));
        let is_v6 = family.pod.contains(':');
        for head in ERRORS[usize::from(is_v6)] {
            for speaker in [family.world, family.router] {
                let quoted = &left[14..][..48.min(left.len() - 14)];
                let error = icmp(speaker, family.node, head, [0, 0, 5, 0], quoted);
                let came = comes(node, &error);
                assert_checksums(&came);
                let (from, to) = ends(&came);
                assert_eq!(from.ip().to_string(), speaker);
                assert_eq!(to.ip().to_string(), family.pod);
                let (from, to) = quoted_ends(&came);
                assert_eq!(
                    (from.to_string(), to.to_string()),
                    (client.clone(), server.clone())
                );
            }
        }
        // The pod's own error about an answer quotes what the world has sent.
        let source = shown(&left).0;
        let came = comes(node, &packet(proto, &server, &source, ACK, b"answer"));
        let head = ERRORS[usize::from(is_v6)][0];
        let quoted = &came[14..][..48.min(came.len() - 14)];
        let left = leaves(node, &icmp(family.pod, family.world, head, [0; 4], quoted));
        assert_checksums(&left);
        let (from, to) = ends(&left);
        assert_eq!(from.ip().to_string(), family.node);
        assert_eq!(to.ip().to_string(), family.world);
        let (from, to) = quoted_ends(&left);
        assert_eq!((from.to_string(), to.to_string()), (server, source));
    });
}

#[test]
fn an_error_about_an_echo_quotes_the_pods_identifier() {
    for family in &FAMILIES {
        let Some(mut node) = node() else { return };
        let left = leaves(&mut node, &echo(family.pod, family.world, false, 77));
        let is_v6 = family.pod.contains(':');
        let exceeded = ERRORS[usize::from(is_v6)][1];
        let came = comes(
            &mut node,
            &icmp(family.router, family.node, exceeded, [0; 4], &left[14..]),
        );
        assert_checksums(&came);
        assert_eq!(ends(&came).1.ip().to_string(), family.pod);
        assert_eq!(quoted_ends(&came).0.ip().to_string(), family.pod);
        let header = if is_v6 { 40 } else { 20 };
        let quoted = &came[14 + header + 8 + header + 4..];
        assert_eq!(quoted[..2], 77_u16.to_be_bytes());
    }
}

/// A datagram in two fragments, as its sender's stack makes them.
fn fragments(from: &str, to: &str, id: u8) -> [Vec<u8>; 2] {
    let whole = udp(from, to, &[0x33; 100]);
    let is_v6 = whole[0] >> 4 == 6;
    let (source, destination) = ends(&frame(NODE_MAC, ROUTER_MAC, &whole));
    let datagram = &whole[if is_v6 { 40 } else { 20 }..];
    let piece = |first: bool| {
        let (part, offset) = if first {
            (&datagram[..64], 0)
        } else {
            (&datagram[64..], 64_u16)
        };
        match (source.ip(), destination.ip()) {
            (std::net::IpAddr::V4(source), std::net::IpAddr::V4(destination)) => {
                let field = (offset / 8) | if first { 0x2000 } else { 0 };
                let mut packet = v4(source, destination, UDP, field.to_be_bytes(), &[], part);
                // The id, and the checksum by which it differs from 7.
                packet[5] = id;
                let sum = u16::from_be_bytes([packet[10], packet[11]]);
                let sum = sum.checked_sub(u16::from(id) - 7).unwrap();
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
                packet
            }
            (std::net::IpAddr::V6(source), std::net::IpAddr::V6(destination)) => {
                let field = offset | u16::from(first);
                let [high, low] = field.to_be_bytes();
                let header = [UDP, 0, high, low, 0, 0, 0, id];
                v6(source, destination, FRAGMENT, &[&header[..], part].concat())
            }
            _ => unreachable!("one family"),
        }
    };
    [piece(true), piece(false)]
}

/// The addresses and the ports of a fragment, 0 where it has none.
fn fragment_ends(frame: &[u8], is_first: bool) -> (String, String) {
    let is_v6 = frame[14] >> 4 == 6;
    let mut plain = frame.to_vec();
    if is_v6 {
        plain.drain(54..62);
        plain[20] = UDP;
    }
    let (mut from, mut to) = ends(&plain);
    if !is_first {
        from.set_port(0);
        to.set_port(0);
    }
    (from.to_string(), to.to_string())
}

#[test]
fn fragments_follow_the_first_of_their_packet() {
    for family in &FAMILIES {
        let Some(mut node) = node() else { return };
        let (client, server) = (at(family.pod, 4000), at(family.world, 53));
        let [first, rest] = fragments(&client, &server, 9);
        let outcome = node.run("to_netdev", &frame(NODE_MAC, ROUTER_MAC, &rest));
        assert_eq!(
            (outcome.verdict, outcome.dropped),
            (SHOT, Some("fragment")),
            "it would show the pod's address"
        );
        let left = leaves(&mut node, &first);
        let source = fragment_ends(&left, true);
        assert_eq!(source.1, server);
        let left = leaves(&mut node, &rest);
        let seen = fragment_ends(&left, false);
        assert_eq!(seen, (at(family.node, 0), at(family.world, 0)));
        // The answer's too.
        let [first, rest] = fragments(&server, &source.0, 10);
        let came = comes(&mut node, &first);
        assert_eq!(fragment_ends(&came, true), (server, client));
        let came = comes(&mut node, &rest);
        assert_eq!(
            fragment_ends(&came, false),
            (at(family.world, 0), at(family.pod, 0))
        );
        // Another packet's are not.
        let [_, rest] = fragments(&at(family.world, 53), &source.0, 11);
        is_untouched(&mut node, "from_netdev", &rest);
        let [_, rest] = fragments(&at(family.node, 53), &at(family.world, 53), 12);
        is_untouched(&mut node, "to_netdev", &rest);
    }
}

#[test]
fn what_has_no_ports_is_one_pods_at_a_time() {
    for family in &FAMILIES {
        let Some(mut node) = node() else { return };
        let ip = |from: &str, to: &str| {
            super::frames::ip(from.parse().unwrap(), to.parse().unwrap(), GRE, &[0; 24])
        };
        let left = leaves(&mut node, &ip(family.pod, family.world));
        assert_eq!(ends(&left).0.ip().to_string(), family.node);
        let came = comes(&mut node, &ip(family.world, family.node));
        assert_eq!(ends(&came).1.ip().to_string(), family.pod);
        let second = frame(NODE_MAC, ROUTER_MAC, &ip(family.second, family.world));
        let outcome = node.run("to_netdev", &second);
        assert_eq!((outcome.verdict, outcome.dropped), (SHOT, Some("no_port")));
    }
}

/// `cargo test --workspace --lib measure_masquerade -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn measure_masquerade() {
    let Some(mut node) = node() else { return };
    let measure = |node: &mut Programs, what: &str, packet: &[u8]| {
        let frame = frame(NODE_MAC, ROUTER_MAC, packet);
        let times = (0..7).map(|_| node.time("to_netdev", &frame));
        eprintln!("{what}: {} ns", times.min().unwrap());
    };
    let own = tcp("192.0.2.1:4000", "203.0.113.5:443", ACK, &[0; 64]);
    let pod = tcp("10.244.0.2:4000", "10.244.1.9:443", ACK, &[0; 64]);
    switch(&node, 0);
    measure(&mut node, "off", &own);
    switch(&node, 1);
    measure(&mut node, "the node's own", &own);
    measure(&mut node, "of a pod to a pod elsewhere", &pod);
    node.add_pod(7, 7, [2; 6], &["10.244.0.2"]);
    measure(&mut node, "the same of a pod that is known", &pod);
    leaves(
        &mut node,
        &tcp("10.244.0.2:4000", "203.0.113.5:443", ACK, b""),
    );
    measure(&mut node, "the node's own, with flows about", &own);
    measure(
        &mut node,
        "of a pod to a pod elsewhere, with flows about",
        &pod,
    );
}
