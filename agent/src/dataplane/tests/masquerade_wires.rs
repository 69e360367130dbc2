//! Pods reach the outside, by real sockets in the namespaces of `outside`: its client is a host there,
//! which knows no way to a pod.

use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};

use ebpf_maps::services::Addr;
use ebpf_maps::uplink::{NODE_OTHER, SOURCE_PORT_MIN};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use super::bed::{ip, view};
use super::maps::Maps;
use super::outside::{CLIENT, NODE, OTHER, Outside};
use super::wires::{Namespace, SHORT, V4, V6, Wires, at, received, tcp_to, udp_to};
use crate::dataplane::pods::Attachment;
use crate::network::masquerade::{Masquerade, rows};
use crate::services::index::addr_of;
use crate::view::Settings;

/// A node that masquerades, with the packet programs of its pods or without.
fn masquerading(attachment: Option<Attachment>, with_pods: bool) -> Option<Outside> {
    let wires = if with_pods {
        Wires::attached()?
    } else {
        Wires::new()?
    };
    masquerading_around(wires, attachment)
}

fn masquerading_around(wires: Wires, attachment: Option<Attachment>) -> Option<Outside> {
    let mut outside = Outside::around(wires, attachment)?;
    let mut nodes = outside.wires.hash::<Addr, u32>("NODE_ADDRESSES");
    for address in OTHER {
        let addr = addr_of(address.parse().unwrap());
        nodes.insert(addr, NODE_OTHER, 0).unwrap();
    }
    masquerade(&mut outside, Some(&[]));
    Some(outside)
}

/// As the agent does it.
///
/// * `never` – further networks that know pods; none: it is off.
fn masquerade(outside: &mut Outside, never: Option<&[&str]>) {
    let mut view = view(1, Vec::new());
    view.settings = std::sync::Arc::new(Settings {
        pod_cidr: Some("10.244.0.0/24".parse().unwrap()),
        cluster_cidr: Some("10.244.0.0/16".parse().unwrap()),
        ..Settings::default()
    });
    let rows = never.map(|never| {
        let masquerade = Masquerade {
            never: never.iter().map(|net| net.parse().unwrap()).collect(),
            // The pods of these tests have both families.
            standalone: Some("fd00:244::/64".parse().unwrap()),
        };
        rows(&masquerade, &view)
    });
    let uplinks = &mut outside.wires.uplinks;
    uplinks.masquerade(rows.as_ref()).unwrap();
    assert_eq!(uplinks.is_masquerading().unwrap(), never.is_some());
}

/// A pod reaches a server outside, by both protocols; whom the server sees.
fn seen_by(outside: &Outside, server: &Namespace, address: SocketAddr) -> Vec<SocketAddr> {
    let listener = server.listen(address);
    let socket = server.bind(address);
    let pods = outside.wires.pods.iter();
    let seen = pods.flat_map(|pod| {
        let (tcp, peer) = tcp_to(pod, &listener, address).unwrap();
        assert_eq!(peer, address);
        let (udp, answered) = udp_to(pod, &socket, address).unwrap();
        assert_eq!(answered, address);
        [tcp, udp]
    });
    seen.collect()
}

/// An echo of a pod to an address is answered.
fn is_echoed(pod: &Namespace, address: SocketAddr) -> bool {
    pod.run(|| {
        fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
        let (family, proto, kind) = match address {
            SocketAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8),
            SocketAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128),
        };
        let made = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, proto).unwrap();
        let socket = UdpSocket::from(made);
        socket.set_read_timeout(Some(SHORT)).unwrap();
        socket.connect(address).unwrap();
        socket.send(&[kind, 0, 0, 0, 0, 0, 0, 1, 7, 7]).unwrap();
        let mut buffer = [0; 64];
        received(&socket, &mut buffer).is_ok_and(|(length, _)| length >= 8)
    })
}

fn pods_reach_the_outside(attachment: Option<Attachment>, with_pods: bool) {
    if let Some(outside) = masquerading(attachment, with_pods) {
        reach_the_outside(outside);
    }
}

fn reach_the_outside(mut outside: Outside) {
    for family in [0, 1] {
        let server = at(CLIENT[family], 8080);
        let seen = seen_by(&outside, &outside.client, server);
        for seen in seen {
            assert_eq!(seen.ip(), at(NODE[family], 0).ip());
            assert!(u32::from(seen.port()) >= SOURCE_PORT_MIN, "{seen}");
        }
        assert!(is_echoed(&outside.wires.pods[0], at(CLIENT[family], 0)));
        // Nobody listens: the host says so, to the node.
        let pod = &outside.wires.pods[1];
        let socket = pod.bind((["0.0.0.0", "::"][family], 0));
        socket.set_read_timeout(Some(SHORT)).unwrap();
        socket.connect(at(CLIENT[family], 8099)).unwrap();
        socket.send(b"anybody?").unwrap();
        let error = received(&socket, &mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
    // Off: nobody knows the way back.
    masquerade(&mut outside, None);
    let socket = outside.client.bind(at(CLIENT[0], 8085));
    assert!(udp_to(&outside.wires.pods[0], &socket, at(CLIENT[0], 8085)).is_err());
    for reason in ["flows_full", "no_port", "malformed", "fragment"] {
        assert_eq!(outside.wires.dropped(reason), 0, "{reason}");
    }
}

#[test]
fn pods_reach_the_outside_from_the_nodes_address_by_links() {
    pods_reach_the_outside(Some(Attachment::Tcx), true);
}

#[test]
fn pods_reach_the_outside_from_the_nodes_address_by_filters() {
    pods_reach_the_outside(Some(Attachment::Clsact), true);
}

#[test]
fn pods_without_a_bridge_reach_the_outside_too() {
    let wires = Wires::routed();
    if let Some(outside) = wires.and_then(|wires| masquerading_around(wires, None)) {
        reach_the_outside(outside);
    }
}

#[test]
fn pods_without_packet_programs_reach_the_outside_too() {
    pods_reach_the_outside(None, false);
}

#[test]
fn fragments_reach_the_outside_and_come_back() {
    let Some(outside) = masquerading(None, true) else {
        return;
    };
    for family in [0, 1] {
        let address = at(CLIENT[family], 8081);
        let server = outside.client.bind(address);
        let pod = &outside.wires.pods[0];
        let client = pod.bind((["0.0.0.0", "::"][family], 0));
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(SHORT)).unwrap();
        }
        let large: Vec<u8> = (0..7000_u32).map(|byte| byte as u8).collect();
        client.send_to(&large, address).unwrap();
        let mut buffer = [0; 8000];
        let (length, seen) = received(&server, &mut buffer).unwrap();
        assert_eq!(
            (&buffer[..length], seen.ip()),
            (&large[..], at(NODE[family], 0).ip())
        );
        server.send_to(&large, seen).unwrap();
        let (length, answered) = received(&client, &mut buffer).unwrap();
        assert_eq!((&buffer[..length], answered), (&large[..], address));
    }
}

#[test]
fn other_nodes_and_networks_that_know_pods_see_their_own_addresses() {
    let Some(mut outside) = masquerading(None, true) else {
        return;
    };
    for namespace in [&outside.other, &outside.client] {
        namespace.run(|| {
            ip(&format!("route add 10.244.0.0/24 via {}", NODE[0]));
            ip(&format!("-6 route add fd00:244::/64 via {}", NODE[1]));
        });
    }
    let is_pod = |seen: &SocketAddr| {
        let seen = seen.ip().to_string();
        V4.contains(&seen.as_str()) || V6.contains(&seen.as_str())
    };
    for family in [0, 1] {
        let seen = seen_by(&outside, &outside.other, at(OTHER[family], 8080));
        assert!(seen.iter().all(is_pod), "{seen:?}");
        let seen = seen_by(&outside, &outside.client, at(CLIENT[family], 8080));
        assert!(!seen.iter().any(is_pod), "{seen:?}");
        // Who comes to the pod's own address is answered from it.
        let server = at([V4, V6][family][1], 8082);
        let pod = &outside.wires.pods[1];
        let listener = pod.listen(server);
        let socket = pod.bind(server);
        let (seen, _) = tcp_to(&outside.client, &listener, server).unwrap();
        assert_eq!(seen.ip(), at(CLIENT[family], 0).ip());
        let (_, answered) = udp_to(&outside.client, &socket, server).unwrap();
        assert_eq!(answered, server);
    }
    masquerade(&mut outside, Some(&["192.0.2.96/28", "2001:db8::100/120"]));
    for family in [0, 1] {
        let seen = seen_by(&outside, &outside.client, at(CLIENT[family], 8083));
        assert!(seen.iter().all(is_pod), "{seen:?}");
    }
}
