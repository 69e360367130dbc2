//! Direct server return, by real sockets: the node of `outside` sends on what its client has asked it to a
//! second node, with programs and tables of its own, which answers.

use std::net::{SocketAddr, UdpSocket};

use aya::maps::MapData;
use ebpf_maps::services::{
    Addr, FRONTEND_DIRECT_RETURN, FrontendKey, FrontendValue, SCOPE_OUTSIDE_ADDRESS,
    SCOPE_OUTSIDE_NODE_PORT,
};
use ebpf_maps::uplink::{NODE_OTHER, NODE_OWN};
use gantry_cni::uplinks::Uplink;
use nix::net::if_::if_nametoindex;

use super::bed::ip;
use super::frames::{TCP, UDP};
use super::maps::Maps;
use super::outside::{CLIENT, NODE, OTHER, Outside};
use super::wires::{Place, SHORT, Wires, at, received, tcp_to, udp_to};
use crate::dataplane::uplinks::UplinkPrograms;
use crate::dataplane::{XdpMode, load};
use crate::services::index::addr_of;

/// A pod of the second node.
const REMOTE: [&str; 2] = ["10.244.1.2", "fd00:244:1::2"];
/// A load balancer's address, announced by the first.
const ROUTED: [&str; 2] = ["198.51.100.7", "2001:db8:7::7"];
const NODE_PORT: u16 = 30_080;

/// The programs of a second node.
struct Second {
    place: Place,
    _uplinks: UplinkPrograms,
}

impl Maps for Second {
    fn data(&self, name: &str) -> MapData {
        MapData::from_pin(load::map_directory(&self.place.paths).join(name)).unwrap()
    }
}

impl Second {
    /// On the namespace of the other node.
    fn new(outside: &Outside) -> Self {
        let place = Place::new();
        let mut ebpf = load::load(&place.paths).unwrap().ebpf;
        let mut uplinks = UplinkPrograms::take(&mut ebpf, &place.paths, XdpMode::Off).unwrap();
        outside.other.run(|| {
            let uplink = Uplink {
                index: if_nametoindex("eth0").unwrap(),
                name: "eth0".into(),
                kind: "veth".into(),
                mac: [2, 0, 0, 0, 1, 2],
                addresses: OTHER.map(|text| text.parse().unwrap()).into(),
            };
            uplinks.set(&[uplink]).unwrap();
        });
        let second = Self {
            place,
            _uplinks: uplinks,
        };
        set_nodes(&outside.wires, NODE, OTHER);
        set_nodes(&second, OTHER, NODE);
        second
    }
}

fn set_nodes(maps: &impl Maps, own: [&str; 2], other: [&str; 2]) {
    let mut nodes = maps.hash::<Addr, u32>("NODE_ADDRESSES");
    for (addresses, owner) in [(own, NODE_OWN), (other, NODE_OTHER)] {
        for address in addresses {
            let addr = addr_of(address.parse().unwrap());
            nodes.insert(addr, owner, 0).unwrap();
        }
    }
}

/// Serves both ways of a family by the remote pod, on one node; with direct return or without.
fn serve(maps: &impl Maps, family: usize, flags: u32) {
    let backend = at(REMOTE[family], 8080).to_string();
    let ways = [
        (
            ["0.0.0.0", "::"][family],
            NODE_PORT,
            SCOPE_OUTSIDE_NODE_PORT,
        ),
        (ROUTED[family], 80, SCOPE_OUTSIDE_ADDRESS),
    ];
    let mut base = 100 + 20 * family as u32;
    for (address, port, scope) in ways {
        for proto in [TCP, UDP] {
            let frontend = at(address, port);
            maps.serve_as(&frontend.to_string(), proto, scope, base, 0, &[&backend]);
            base += 2;
            let mut frontends = maps.hash::<FrontendKey, FrontendValue>("FRONTENDS");
            let key = FrontendKey {
                addr: addr_of(frontend.ip()),
                port_be: port.to_be(),
                proto,
                scope,
            };
            let value = frontends.get(&key, 0).unwrap();
            frontends
                .insert(key, FrontendValue { flags, ..value }, 0)
                .unwrap();
        }
    }
}

/// Whom the pod sees as its client, by TCP and by UDP; the client is answered by what it asked.
fn seen(outside: &Outside, family: usize, frontend: SocketAddr) -> [SocketAddr; 2] {
    let backend = at(REMOTE[family], 8080);
    let listener = outside.other.listen(backend);
    let socket = outside.other.bind(backend);
    let (tcp, peer) = tcp_to(&outside.client, &listener, frontend).unwrap();
    let (udp, answered) = udp_to(&outside.client, &socket, frontend).unwrap();
    assert_eq!((peer, answered), (frontend, frontend));
    [tcp, udp]
}

#[test]
fn a_backend_of_another_node_sees_the_client_and_answers_it_directly() {
    let Some(wires) = Wires::attached() else {
        return;
    };
    let Some(outside) = Outside::around(wires, None) else {
        return;
    };
    let second = Second::new(&outside);
    // Answers must come from addresses that are on no interface there.
    outside.client.run(|| {
        for name in ["all", "eth0"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"), "0").unwrap();
        }
    });
    for family in [0, 1] {
        let client = at(CLIENT[family], 0).ip();
        let ways = [at(NODE[family], NODE_PORT), at(ROUTED[family], 80)];
        serve(&outside.wires, family, FRONTEND_DIRECT_RETURN);
        serve(&second, family, FRONTEND_DIRECT_RETURN);
        for frontend in ways {
            for _ in 0..3 {
                let seen = seen(&outside, family, frontend);
                assert!(seen.iter().all(|seen| seen.ip() == client), "{seen:?}");
            }
        }
        // Without it the client is this node.
        serve(&outside.wires, family, 0);
        serve(&second, family, 0);
        for frontend in ways {
            let seen = seen(&outside, family, frontend);
            let node = at(NODE[family], 0).ip();
            assert!(seen.iter().all(|seen| seen.ip() == node), "{seen:?}");
        }
    }
    for reason in ["flows_full", "malformed", "no_source", "ttl"] {
        assert_eq!(outside.wires.dropped(reason), 0, "{reason}");
    }
}

#[test]
fn a_port_of_another_node_is_not_this_ones_without_direct_return() {
    let Some(wires) = Wires::attached() else {
        return;
    };
    let Some(outside) = Outside::around(wires, None) else {
        return;
    };
    let second = Second::new(&outside);
    serve(&second, 0, 0);
    // The client takes the second node for a router to the first.
    outside.client.run(|| {
        ip(&format!("route add {}/32 via {}", NODE[0], OTHER[0]));
    });
    let frontend = at(NODE[0], NODE_PORT);
    let connect = || {
        let client = &outside.client;
        client.run(|| std::net::TcpStream::connect_timeout(&frontend, super::wires::SHORT))
    };
    let listener = outside.other.listen(at(REMOTE[0], 8080));
    listener.set_nonblocking(true).unwrap();
    assert!(connect().is_err());
    serve(&second, 0, FRONTEND_DIRECT_RETURN);
    connect().unwrap();
}

/// A client of direct return: its socket, the server's, and what it asks.
fn asks(outside: &Outside, second: &Second, family: usize) -> (UdpSocket, UdpSocket, SocketAddr) {
    serve(&outside.wires, family, FRONTEND_DIRECT_RETURN);
    serve(second, family, FRONTEND_DIRECT_RETURN);
    let backend = at(REMOTE[family], 8080);
    let server = outside.other.bind(backend);
    let any = at(["0.0.0.0", "::"][family], 0);
    let client = outside.client.bind(any);
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(SHORT)).unwrap();
    }
    (client, server, at(NODE[family], NODE_PORT))
}

#[test]
fn fragments_go_on_as_they_are_too() {
    let Some(wires) = Wires::attached() else {
        return;
    };
    let Some(outside) = Outside::around(wires, None) else {
        return;
    };
    let second = Second::new(&outside);
    for family in [0, 1] {
        let (client, server, frontend) = asks(&outside, &second, family);
        for _ in 0..3 {
            client.send_to(&[7; 4000], frontend).unwrap();
            let (length, from) = received(&server, &mut [0; 5000]).unwrap();
            assert_eq!((length, from.ip()), (4000, at(CLIENT[family], 0).ip()));
        }
    }
}

#[test]
fn a_client_goes_on_by_this_node_when_the_way_is_no_longer_direct() {
    let Some(wires) = Wires::attached() else {
        return;
    };
    let Some(outside) = Outside::around(wires, None) else {
        return;
    };
    let second = Second::new(&outside);
    for family in [0, 1] {
        let (client, server, frontend) = asks(&outside, &second, family);
        let mut buffer = [0; 16];
        client.send_to(b"question", frontend).unwrap();
        let (_, from) = received(&server, &mut buffer).unwrap();
        assert_eq!(from.ip(), at(CLIENT[family], 0).ip());
        // The pod is on the link itself: nobody stands between.
        outside.wires.node.run(|| {
            let (of, prefix) = [("", "10.244.1.0/24"), ("-6 ", "fd00:244:1::/64")][family];
            ip(&format!("{of}route del {prefix}"));
            ip(&format!("{of}route add {prefix} dev eth0"));
            let (pod, mac) = (REMOTE[family], "02:00:00:00:01:02");
            ip(&format!(
                "neigh replace {pod} lladdr {mac} dev eth0 nud permanent"
            ));
        });
        let from = (0..4).find_map(|_| {
            client.send_to(b"again", frontend).unwrap();
            received(&server, &mut buffer).ok()
        });
        let (_, from) = from.expect("it never gets through again");
        assert_eq!(from.ip(), at(NODE[family], 0).ip());
        server.send_to(b"answer", from).unwrap();
        assert_eq!(received(&client, &mut buffer).unwrap().1, frontend);
    }
}
