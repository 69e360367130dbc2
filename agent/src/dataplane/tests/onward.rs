//! The fast path between pods and other machines, by real sockets: what it carries the node's own stack
//! does not forward, and what it leaves the stack does, as without it. Then by single frames.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use ebpf_maps::event::POINT_TO_POD;
use ebpf_maps::uplink::SWITCH_FAST_PATH;
use nix::sys::socket::{setsockopt, sockopt};

use super::bed::ip;
use super::events::shown;
use super::frames::{SYN, UDP, assert_checksums, frame, tcp, udp, v4};
use super::outside::{CLIENT, MAC, NODE, OTHER, Outside, REMOTE};
use super::programs::{PASS, REDIRECT};
use super::wires::{
    GATEWAY_MAC, Namespace, SHORT, V4, V6, Wires, at, everything_passes, interface, received,
    tcp_between, udp_between,
};
use super::xdp::{CLIENT_MAC, Node, OTHER_MAC};

/// Longer than the programs remember an answer of the kernel's about a way, or that there was none yet.
fn settle() {
    std::thread::sleep(Duration::from_millis(50));
}

/// Packets of each family that the node's stack has forwarded.
fn forwarded(node: &Namespace) -> [u64; 2] {
    let (v4, v6) = node.run(|| {
        let read = |name| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap();
        (read("snmp"), read("snmp6"))
    });
    let mut ip = v4.lines().filter(|line| line.starts_with("Ip:"));
    let (names, values) = (ip.next().unwrap(), ip.next().unwrap());
    let place = names.split(' ').position(|name| name == "ForwDatagrams");
    let v4 = values.split(' ').nth(place.unwrap()).unwrap();
    let v6 = (v6.lines()).find_map(|line| line.strip_prefix("Ip6OutForwDatagrams"));
    [v4, v6.unwrap().trim()].map(|count| count.parse().unwrap())
}

/// Everything goes each way between the node's pods and another node's, and everybody sees the pod's address.
fn both_ways(outside: &Outside) {
    let pod = &outside.wires.pods[0];
    for (own, remote) in [(V4[0], REMOTE[0]), (V6[0], REMOTE[1])] {
        for (from, to, client, server) in [
            (pod, &outside.other, own, at(remote, 8080)),
            (&outside.other, pod, remote, at(own, 8081)),
        ] {
            let seen = tcp_between(from, to, server).unwrap();
            assert_eq!((seen.0.ip().to_string(), seen.1), (client.into(), server));
            let seen = udp_between(from, to, server).unwrap();
            assert_eq!((seen.0.ip().to_string(), seen.1), (client.into(), server));
        }
    }
}

/// Of a node whose other nodes know the way to its pods, and come from their own pods' addresses.
fn node(wires: Option<Wires>) -> Option<Outside> {
    let outside = Outside::around(wires?, None)?;
    outside.other.run(|| {
        let [v4, v6] = [REMOTE[0], REMOTE[1]];
        ip(&format!("route add 10.244.0.0/24 via {} src {v4}", NODE[0]));
        ip(&format!(
            "-6 route add fd00:244::/64 via {} src {v6}",
            NODE[1]
        ));
    });
    Some(outside)
}

fn goes_past_the_stack(wires: Option<Wires>) {
    let Some(mut outside) = node(wires) else {
        return;
    };
    // Neighbours are asked for by the stack.
    both_ways(&outside);
    settle();
    let before = forwarded(&outside.wires.node);
    both_ways(&outside);
    everything_passes(&outside.wires);
    assert_eq!(forwarded(&outside.wires.node), before);
    // A client's own packets to a pod, by a node port, and the answers.
    for family in [0, 1] {
        let backend = at([V4, V6][family][0], 8090);
        let frontend = outside.node_port(family, &[backend]);
        outside.reaches(frontend, &outside.wires.pods[0], backend);
        settle();
        let before = forwarded(&outside.wires.node);
        outside.reaches(frontend, &outside.wires.pods[0], backend);
        assert_eq!(forwarded(&outside.wires.node), before);
    }
    // Where it is off the stack does all of it.
    let before = forwarded(&outside.wires.node);
    (outside.wires.uplinks)
        .switch(SWITCH_FAST_PATH, false)
        .unwrap();
    both_ways(&outside);
    let after = forwarded(&outside.wires.node);
    assert!(
        after[0] > before[0] && after[1] > before[1],
        "{before:?} {after:?}"
    );
}

#[test]
fn pods_and_other_machines_reach_each_other_past_the_nodes_stack() {
    goes_past_the_stack(Wires::attached());
}

#[test]
fn so_do_routed_pods() {
    goes_past_the_stack(Wires::routed());
}

/// A client of pod 0's, its peer a server on the other node.
fn datagrams(outside: &Outside, family: usize) -> (UdpSocket, UdpSocket) {
    let address = at(REMOTE[family], 9090);
    let server = outside.other.bind(address);
    let client = outside.wires.pods[0].run(|| {
        let any = if family == 0 { "0.0.0.0:0" } else { "[::]:0" };
        let client = UdpSocket::bind(any).unwrap();
        client.connect(address).unwrap();
        client
    });
    for socket in [&client, &server] {
        socket.set_read_timeout(Some(SHORT)).unwrap();
    }
    // The way is known from now on.
    client.send(b"first").unwrap();
    received(&server, &mut [0; 16]).unwrap();
    settle();
    (client, server)
}

#[test]
fn a_packet_loses_one_hop_and_one_without_more_is_told_so() {
    let Some(outside) = node(Wires::attached()) else {
        return;
    };
    let (client, server) = datagrams(&outside, 0);
    setsockopt(&server, sockopt::Ipv4RecvTtl, &true).unwrap();
    client.set_ttl(9).unwrap();
    let before = forwarded(&outside.wires.node);
    client.send(b"hops").unwrap();
    assert_eq!(hops_of(&server), 8);
    assert_eq!(forwarded(&outside.wires.node), before);
    client.set_ttl(1).unwrap();
    setsockopt(&client, sockopt::Ipv4RecvErr, &true).unwrap();
    client.send(b"last hop").unwrap();
    let error = client.recv(&mut [0; 16]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{error}");
}

/// The hops that a datagram had left.
fn hops_of(socket: &UdpSocket) -> i32 {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg};
    let mut data = [0; 16];
    let mut buffers = [std::io::IoSliceMut::new(&mut data)];
    let mut space = nix::cmsg_space!(i32);
    let message = recvmsg::<SockaddrIn>(
        socket.as_raw_fd(),
        &mut buffers,
        Some(&mut space),
        MsgFlags::empty(),
    );
    let message = message.unwrap();
    let mut found = message.cmsgs().unwrap().filter_map(|told| match told {
        ControlMessageOwned::Ipv4Ttl(hops) => Some(hops),
        _ => None,
    });
    found.next().unwrap()
}

#[test]
fn what_is_too_long_for_its_way_is_told_so() {
    let Some(outside) = node(Wires::attached()) else {
        return;
    };
    outside.wires.node.run(|| {
        ip(&format!(
            "route replace 10.244.1.0/24 via {} mtu lock 1300",
            OTHER[0]
        ));
        ip(&format!(
            "-6 route replace fd00:244:1::/64 via {} mtu lock 1300",
            OTHER[1]
        ));
    });
    for family in [0, 1] {
        let (client, server) = datagrams(&outside, family);
        client.send(&[1; 1200]).unwrap();
        received(&server, &mut [0; 2000]).unwrap();
        // The first one is lost, and its sender told; so the next one comes in parts.
        client.send(&[1; 1350]).unwrap();
        received(&server, &mut [0; 2000]).unwrap_err();
        let error = client.send(&[1; 1350]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{error}");
        client.send(&[1; 1350]).unwrap();
        received(&server, &mut [0; 2000]).unwrap();
        // TCP learns it, and its segments fit: those that are cut by the device too.
        let server = at(REMOTE[family], 8088);
        tcp_between(&outside.wires.pods[0], &outside.other, server).unwrap();
    }
}

#[test]
fn a_source_from_where_no_such_packet_comes_is_for_the_stack_to_judge() {
    let Some(outside) = node(Wires::attached()) else {
        return;
    };
    outside.wires.node.run(|| {
        std::fs::write("/proc/sys/net/ipv4/conf/eth0/rp_filter", "1").unwrap();
    });
    let server = at(V4[0], 9191);
    let receiver = outside.wires.pods[0].bind(server);
    receiver
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    outside.client.run(|| {
        ip(&format!("route add {}/32 via {}", V4[0], NODE[0]));
        ip(&format!("addr add {}/32 dev lo", V4[1]));
    });
    let send = |source: &str| {
        outside.client.run(|| {
            let socket = UdpSocket::bind((source.parse::<IpAddr>().unwrap(), 0)).unwrap();
            socket.send_to(b"from", server).unwrap();
        });
        received(&receiver, &mut [0; 16])
            .map(|(_, from): (usize, SocketAddr)| from.ip().to_string())
    };
    assert_eq!(send(CLIENT[0]).unwrap(), CLIENT[0]);
    assert_eq!(send(CLIENT[0]).unwrap(), CLIENT[0]);
    send(V4[1]).unwrap_err();
}

/// A datagram with this many hops left.
fn with_hops(source: &str, destination: &str, hops: u8) -> Vec<u8> {
    let mut packet = udp(source, destination, b"data");
    let (place, before) = match packet[0] >> 4 {
        4 => (8, u16::from_be_bytes([packet[8], 0])),
        _ => (7, 0),
    };
    packet[place] = hops;
    if place == 8 {
        let sum = u16::from_be_bytes([packet[10], packet[11]]);
        let after = u16::from_be_bytes([hops, 0]);
        let mended = u32::from(!sum) + u32::from(!before) + u32::from(after);
        let mended = (mended & 0xffff) + (mended >> 16);
        let mended = !((mended & 0xffff) + (mended >> 16)) as u16;
        packet[10..12].copy_from_slice(&mended.to_be_bytes());
    }
    packet
}

fn v4_of(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

#[test]
fn of_what_comes_in_only_what_is_plainly_a_pods_is_put_into_it() {
    let Some(mut node) = Node::new() else { return };
    let (ifindex, pod_mac) = (node.ifindex, interface_mac(0));
    node.events();
    for (client, pod) in [(CLIENT[0], V4[0]), (CLIENT[1], V6[0])] {
        let ends = [at(client, 5000).to_string(), at(pod, 80).to_string()];
        let both = [
            tcp(&ends[0], &ends[1], SYN, b""),
            udp(&ends[0], &ends[1], b"data"),
        ];
        for packet in both {
            let sent = frame(CLIENT_MAC, MAC, &packet);
            let outcome = node.run_at("from_netdev", ifindex, &sent);
            assert_eq!(outcome.verdict, REDIRECT);
            let expected = frame(GATEWAY_MAC, pod_mac, &packet);
            assert_eq!(outcome.frame, expected, "to the pod, from its gateway");
            // A watcher is told as of what comes by the node's own network.
            let told: Vec<String> = node.events().iter().map(shown).collect();
            assert_eq!(
                told,
                [format!("{POINT_TO_POD} passes {client}|5000>{pod}|80")]
            );
        }
    }
    let plain = |source: &str, destination: &str| {
        let port = |address: &str, port: u16| at(address, port).to_string();
        udp(&port(source, 5000), &port(destination, 80), b"data")
    };
    let options = v4(
        v4_of(CLIENT[0]),
        v4_of(V4[0]),
        UDP,
        [0, 0],
        &[7, 7, 4, 0, 0, 0, 0, 0],
        &[0; 12],
    );
    let left = [
        ("to nobody here", MAC, plain(CLIENT[0], "10.244.0.77")),
        ("to a pod elsewhere", MAC, plain(CLIENT[0], REMOTE[0])),
        (
            "to another host of the link",
            OTHER_MAC,
            plain(CLIENT[0], V4[0]),
        ),
        ("with options", MAC, options),
        ("from a pod of this node", MAC, plain(V4[1], V4[0])),
        ("the same", MAC, plain(V6[1], V6[0])),
        ("from this node", MAC, plain(NODE[0], V4[0])),
        ("the same", MAC, plain(NODE[1], V6[0])),
        (
            "from a neighbour who is not known",
            MAC,
            plain("10.244.7.7", V4[0]),
        ),
        ("from where no way leads", MAC, plain("203.0.113.9", V4[0])),
    ];
    for (what, mac, packet) in &left {
        let sent = frame(CLIENT_MAC, *mac, packet);
        let outcome = node.run_at("from_netdev", ifindex, &sent);
        assert_eq!((outcome.verdict, &outcome.frame), (PASS, &sent), "{what}");
    }
    // Not at once into a pod of a third party's wiring, nor where it is switched off.
    let known = frame(CLIENT_MAC, MAC, &plain(CLIENT[0], V4[0]));
    let set_direct = |node: &mut Node, direct: bool| {
        let (inside, programs) = (&node.outside.wires.node, &mut node.outside.wires.programs);
        inside.run(|| {
            let mut interface = interface(0);
            interface.direct = direct;
            programs.attach(&interface).unwrap();
        });
    };
    set_direct(&mut node, false);
    assert_eq!(node.run_at("from_netdev", ifindex, &known).verdict, PASS);
    set_direct(&mut node, true);
    assert_eq!(
        node.run_at("from_netdev", ifindex, &known).verdict,
        REDIRECT
    );
    let uplinks = &mut node.outside.wires.uplinks;
    uplinks.switch(SWITCH_FAST_PATH, false).unwrap();
    assert_eq!(node.run_at("from_netdev", ifindex, &known).verdict, PASS);
}

#[test]
fn of_what_a_pod_sends_only_what_its_gateway_would_send_on_is_sent() {
    let Some(mut node) = Node::new() else { return };
    let (ifindex, pod_mac) = (
        node.outside.wires.node.run(|| interface(0).ifindex),
        interface_mac(0),
    );
    for (pod, server) in [
        ("10.244.0.2:5000", "192.0.2.100:80"),
        ("10.244.0.2:5000", "10.244.1.2:80"),
        ("[fd00:244::2]:5000", "[2001:db8::100]:80"),
        ("[fd00:244::2]:5000", "[fd00:244:1::2]:80"),
    ] {
        let sent = frame(pod_mac, GATEWAY_MAC, &with_hops(pod, server, 64));
        let outcome = node.run_at("from_pod", ifindex, &sent);
        assert_eq!(outcome.verdict, REDIRECT, "{server}");
        let expected = frame(pod_mac, GATEWAY_MAC, &with_hops(pod, server, 63));
        assert_eq!(outcome.frame, expected, "one hop further, its sum mended");
        assert_checksums(&outcome.frame);
        let last = frame(pod_mac, GATEWAY_MAC, &with_hops(pod, server, 1));
        let outcome = node.run_at("from_pod", ifindex, &last);
        assert_eq!(
            (outcome.verdict, outcome.frame),
            (PASS, last),
            "no hop is left"
        );
    }
    let own = "10.244.0.2:5000";
    let options = v4(
        v4_of(V4[0]),
        v4_of(CLIENT[0]),
        UDP,
        [0, 0],
        &[7, 7, 4, 0, 0, 0, 0, 0],
        &[0; 12],
    );
    let fragment = v4(
        v4_of(V4[0]),
        v4_of(CLIENT[0]),
        UDP,
        [0x20, 0],
        &[],
        &[0; 16],
    );
    let left = [
        (
            "past its gateway",
            OTHER_MAC,
            udp(own, "192.0.2.100:80", b""),
        ),
        ("to this node", GATEWAY_MAC, udp(own, "192.0.2.1:80", b"")),
        (
            "to a neighbour who is not known",
            GATEWAY_MAC,
            udp(own, "10.244.7.7:80", b""),
        ),
        (
            "to where no way leads",
            GATEWAY_MAC,
            udp(own, "203.0.113.9:80", b""),
        ),
        ("to many", GATEWAY_MAC, udp(own, "224.0.0.251:5353", b"")),
        ("with options", GATEWAY_MAC, options),
        ("a fragment", GATEWAY_MAC, fragment),
    ];
    for (what, mac, packet) in &left {
        let sent = frame(pod_mac, *mac, packet);
        let outcome = node.run_at("from_pod", ifindex, &sent);
        assert_eq!((outcome.verdict, &outcome.frame), (PASS, &sent), "{what}");
    }
    let uplinks = &mut node.outside.wires.uplinks;
    uplinks.switch(SWITCH_FAST_PATH, false).unwrap();
    let sent = frame(pod_mac, GATEWAY_MAC, &udp(own, "192.0.2.100:80", b""));
    assert_eq!(node.run_at("from_pod", ifindex, &sent).verdict, PASS);
}

/// Of a pod's interface.
fn interface_mac(pod: u8) -> [u8; 6] {
    [0x0a, 0x58, 10, 244, 0, pod + 2]
}
