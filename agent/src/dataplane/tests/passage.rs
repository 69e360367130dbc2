//! Services and the short way between pods, by the sockets of `wires`. No socket hook is attached
//! there, so every Service is one for packets.

use std::io::ErrorKind;
use std::net::TcpStream;

use super::bed::ip;
use super::frames::{TCP, UDP};
use super::maps::Maps;
use super::wires::{
    SHORT, V4, V6, Wires, at, interface, received, tcp_between, tcp_to, udp_between, udp_to,
};

/// Frontends of each family, and the node's own address for its pods.
const FRONTENDS: [&str; 2] = ["10.96.0.1", "fd00:96::1"];
pub(super) const NODE: [&str; 2] = ["10.244.0.1", "fd00:244::1"];

pub(super) fn serve(wires: &Wires, family: usize, backend: &str, port: u16) {
    let (frontend, backend) = (at(FRONTENDS[family], 80), at(backend, port));
    for proto in [TCP, UDP] {
        // Both ids differ by protocol: a backend is of one.
        let base = 100 + 20 * family as u32 + u32::from(proto) / 6 * 2;
        wires.serve(&frontend.to_string(), proto, base, &[&backend.to_string()]);
    }
}

/// A client in pod 0 reaches `backend` by the frontend and is answered by it.
pub(super) fn reaches(
    wires: &Wires,
    family: usize,
    server: &super::wires::Namespace,
    backend: &str,
    port: u16,
) {
    serve(wires, family, backend, port);
    let (frontend, client) = (at(FRONTENDS[family], 80), [V4, V6][family][0]);
    let listener = server.listen(at(backend, port));
    let socket = server.bind(at(backend, port));
    for _ in 0..3 {
        let (seen, peer) = tcp_to(&wires.pods[0], &listener, frontend).unwrap();
        assert_eq!((seen.ip().to_string().as_str(), peer), (client, frontend));
        let (seen, answered) = udp_to(&wires.pods[0], &socket, frontend).unwrap();
        assert_eq!(
            (seen.ip().to_string().as_str(), answered),
            (client, frontend)
        );
    }
}

#[test]
fn a_service_reaches_another_pod_and_the_node() {
    let Some(wires) = Wires::attached() else {
        return;
    };
    for family in [0, 1] {
        reaches(&wires, family, &wires.pods[1], [V4, V6][family][1], 8080);
        reaches(&wires, family, &wires.node, NODE[family], 8085);
    }
    assert_eq!(wires.dropped("flows_full") + wires.dropped("malformed"), 0);
}

/// As a third party's wiring is, where packets must not leave the host end of the veth.
#[test]
fn a_service_reaches_another_pod_also_by_the_bridge() {
    let Some(mut wires) = Wires::new() else {
        return;
    };
    for pod in [0, 1] {
        let programs = &mut wires.programs;
        wires.node.run(|| {
            let mut interface = interface(pod);
            interface.direct = false;
            programs.attach(&interface).unwrap();
        });
    }
    for family in [0, 1] {
        reaches(&wires, family, &wires.pods[1], [V4, V6][family][1], 8080);
    }
}

#[test]
fn a_pod_reaches_itself_by_its_own_service() {
    if let Some(wires) = Wires::attached() {
        reaches_itself(&wires);
    }
}

pub(super) fn reaches_itself(wires: &Wires) {
    for family in [0, 1] {
        let own = [V4, V6][family][0];
        serve(wires, family, own, 8080);
        let (frontend, pod) = (at(FRONTENDS[family], 80), &wires.pods[0]);
        let listener = pod.listen(at(own, 8080));
        let socket = pod.bind(at(own, 8080));
        let (seen, peer) = tcp_to(pod, &listener, frontend).unwrap();
        assert_ne!(
            seen.ip().to_string(),
            own,
            "its own address it would refuse"
        );
        assert_eq!(peer, frontend);
        let (_, answered) = udp_to(pod, &socket, frontend).unwrap();
        assert_eq!(answered, frontend);
    }
}

#[test]
fn a_service_without_backends_refuses_at_once() {
    let Some(wires) = Wires::attached() else {
        return;
    };
    for frontend in FRONTENDS.map(|address| at(address, 80)) {
        for proto in [TCP, UDP] {
            wires.serve(&frontend.to_string(), proto, 10, &[]);
        }
        let begun = std::time::Instant::now();
        let error = wires.pods[0].run(|| TcpStream::connect_timeout(&frontend, SHORT));
        assert_eq!(error.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        refused_datagram(&wires, frontend);
        assert!(begun.elapsed() < SHORT);
    }
}

/// A connected UDP socket of pod 0 learns that nobody listens.
fn refused_datagram(wires: &Wires, to: std::net::SocketAddr) {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let client = wires.pods[0].bind(any);
    client.set_read_timeout(Some(SHORT)).unwrap();
    client.connect(to).unwrap();
    client.send(b"anybody?").unwrap();
    let error = received(&client, &mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
}

#[test]
fn a_closed_port_behind_a_service_is_told_by_the_service() {
    let Some(wires) = Wires::attached() else {
        return;
    };
    for family in [0, 1] {
        let frontend = at(FRONTENDS[family], 80);
        for backend in [[V4, V6][family][1], NODE[family]] {
            serve(&wires, family, backend, 8090);
            let error = wires.pods[0].run(|| TcpStream::connect_timeout(&frontend, SHORT));
            assert_eq!(error.unwrap_err().kind(), ErrorKind::ConnectionRefused);
            refused_datagram(&wires, frontend);
        }
    }
}

#[test]
fn pods_of_a_node_reach_each_other_past_the_bridge() {
    let Some(wires) = Wires::attached() else {
        return;
    };
    let [a, b] = &wires.pods;
    for addresses in [V4, V6] {
        udp_between(a, b, at(addresses[1], 9000)).unwrap();
        udp_between(b, a, at(addresses[0], 9000)).unwrap();
    }
    // Who has which hardware address is known by now; the bridge forwards nothing any more.
    wires.node.run(|| ip("link set gantry0 down"));
    for addresses in [V4, V6] {
        tcp_between(a, b, at(addresses[1], 9001)).unwrap();
        udp_between(b, a, at(addresses[0], 9001)).unwrap();
    }
}
