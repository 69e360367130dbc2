//! Clients outside of the nodes, by real sockets: a client, the node of `wires` and another node on one
//! link. What they reach is on the node, in its pods, or on the other node.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use aya::maps::Map;
use aya::maps::lpm_trie::{Key, LpmTrie};
use ebpf_maps::services::{
    Addr, FRONTEND_DROP, FRONTEND_RESTRICTED, FrontendKey, FrontendValue, SCOPE_OUTSIDE_ADDRESS,
    SCOPE_OUTSIDE_NODE_PORT, SOURCE_RANGE_BITS, SourceRangeKey,
};
use ebpf_maps::uplink::{NODE_OWN, SOURCE_PORT_MIN, SWITCH_FAST_PATH};
use gantry_cni::uplinks::Uplink;
use nix::net::if_::if_nametoindex;

use super::bed::ip;
use super::frames::{TCP, UDP};
use super::maps::Maps;
use super::wires::{Namespace, SHORT, V4, V6, Wires, at, tcp_to, udp_to};
use crate::dataplane::discovery::{Asked, Discovery};
use crate::dataplane::pods::Attachment;
use crate::services::index::addr_of;

pub(super) const NODE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
pub(super) const OTHER: [&str; 2] = ["192.0.2.2", "2001:db8::2"];
pub(super) const CLIENT: [&str; 2] = ["192.0.2.100", "2001:db8::100"];
/// A pod of the other node.
pub(super) const REMOTE: [&str; 2] = ["10.244.1.2", "fd00:244:1::2"];
/// Addresses that are routed to the node and on no interface of it.
pub(super) const ROUTED: [&str; 2] = ["198.51.100.7", "2001:db8:7::7"];
pub(super) const NODE_PORT: u16 = 30_080;
pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];

pub(super) struct Outside {
    pub wires: Wires,
    pub client: Namespace,
    pub other: Namespace,
    pub lan: Namespace,
}

/// Joins a namespace to the link, as its `eth0`.
pub(super) fn join(lan: &Namespace, namespace: &Namespace, number: u8, addresses: [&str; 2]) {
    namespace.run(|| {
        let (peer, mac) = (lan.path(), MAC.map(|byte| format!("{byte:02x}")));
        let mac = format!("{}:{number:02x}", mac[..5].join(":"));
        ip(&format!(
            "link add eth0 address {mac} type veth peer name port{number} netns {peer}"
        ));
        // As in `wires`: a router solicits from its link-local address.
        std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_dad", "0").unwrap();
        ip("link set eth0 up");
        ip(&format!("addr add {}/24 dev eth0", addresses[0]));
        ip(&format!("addr add {}/64 dev eth0 nodad", addresses[1]));
    });
    lan.run(|| {
        ip(&format!("link set port{number} master lan0"));
        ip(&format!("link set port{number} up"));
    });
}

impl Outside {
    /// By the means that the agent takes on this kernel, or by one that is named.
    pub(super) fn new(attachment: Option<Attachment>) -> Option<Self> {
        Self::around(Wires::attached()?, attachment)
    }

    /// With these pods. None, with the reason on stderr, where the kernel does not have the means.
    pub(super) fn around(mut wires: Wires, attachment: Option<Attachment>) -> Option<Self> {
        let (wanted, own) = (attachment, wires.uplinks.attachment());
        if wanted == Some(Attachment::Tcx) && *own == Attachment::Clsact {
            eprintln!("skipped: this kernel has no tcx");
            return None;
        }
        *own = wanted.unwrap_or(*own);
        let [lan, client, other] = [(); 3].map(|()| Namespace::new());
        lan.run(|| {
            ip("link add lan0 type bridge");
            ip("link set lan0 up");
        });
        join(&lan, &wires.node, 1, NODE);
        join(&lan, &other, 2, OTHER);
        join(&lan, &client, 3, CLIENT);
        other.run(|| {
            ip(&format!("addr add {}/32 dev lo", REMOTE[0]));
            ip(&format!("addr add {}/128 dev lo nodad", REMOTE[1]));
        });
        (wires.uplinks).switch(SWITCH_FAST_PATH, true).unwrap();
        wires.node.run(|| {
            ip(&format!("route add 10.244.1.0/24 via {}", OTHER[0]));
            ip(&format!("-6 route add fd00:244:1::/64 via {}", OTHER[1]));
        });
        client.run(|| {
            ip(&format!("route add 198.51.100.0/24 via {}", NODE[0]));
            ip(&format!("-6 route add 2001:db8:7::/64 via {}", NODE[1]));
        });
        let mut nodes = wires.hash::<Addr, u32>("NODE_ADDRESSES");
        for address in NODE {
            let addr = addr_of(address.parse().unwrap());
            nodes.insert(addr, NODE_OWN, 0).unwrap();
        }
        let mut outside = Self {
            wires,
            client,
            other,
            lan,
        };
        outside.attach();
        Some(outside)
    }

    pub(super) fn attach(&mut self) {
        let (node, uplinks) = (&self.wires.node, &mut self.wires.uplinks);
        node.run(|| {
            let uplink = Uplink {
                index: if_nametoindex("eth0").unwrap(),
                name: "eth0".into(),
                kind: "veth".into(),
                mac: MAC,
                addresses: NODE.map(|text| text.parse().unwrap()).into(),
            };
            uplinks.set(&[uplink]).unwrap();
        });
    }

    /// Serves an address, TCP and UDP, by these backends.
    pub(super) fn serve(&self, address: &str, port: u16, scope: u8, backends: &[SocketAddr]) {
        let shown: Vec<String> = backends.iter().map(ToString::to_string).collect();
        let shown: Vec<&str> = shown.iter().map(String::as_str).collect();
        for proto in [TCP, UDP] {
            let base = 100 + u32::from(proto) * 10;
            let frontend = at(address, port).to_string();
            self.wires
                .serve_as(&frontend, proto, scope, base, 0, &shown);
        }
    }

    pub(super) fn node_port(&self, family: usize, backends: &[SocketAddr]) -> SocketAddr {
        let any = ["0.0.0.0", "::"][family];
        self.serve(any, NODE_PORT, SCOPE_OUTSIDE_NODE_PORT, backends);
        at(NODE[family], NODE_PORT)
    }

    /// Sets flags of a frontend that is there.
    pub(super) fn set_flags(&self, address: SocketAddr, scope: u8, flags: u32) {
        let mut frontends = self.wires.hash::<FrontendKey, FrontendValue>("FRONTENDS");
        for proto in [TCP, UDP] {
            let key = FrontendKey {
                addr: addr_of(address.ip()),
                port_be: address.port().to_be(),
                proto,
                scope,
            };
            let value = frontends.get(&key, 0).unwrap();
            frontends
                .insert(key, FrontendValue { flags, ..value }, 0)
                .unwrap();
        }
    }

    /// The client reaches `backend` in `server` by `frontend`, by both protocols, and is answered by
    /// the frontend; what the server sees as its client.
    pub(super) fn reaches(
        &self,
        frontend: SocketAddr,
        server: &Namespace,
        backend: SocketAddr,
    ) -> [SocketAddr; 2] {
        let listener = server.listen(backend);
        let socket = server.bind(backend);
        let (tcp_seen, peer) = tcp_to(&self.client, &listener, frontend).unwrap();
        assert_eq!(peer, frontend);
        let (udp_seen, answered) = udp_to(&self.client, &socket, frontend).unwrap();
        assert_eq!(answered, frontend);
        [tcp_seen, udp_seen]
    }

    pub(super) fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.client.run(|| TcpStream::connect_timeout(&to, SHORT))
    }

    /// What became of a datagram to nobody.
    fn send(&self, to: SocketAddr) -> io::Error {
        let socket = self.client.run(|| {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(to).unwrap();
            socket
        });
        socket.set_read_timeout(Some(SHORT)).unwrap();
        socket.send(b"question").unwrap();
        socket.recv(&mut [0; 16]).unwrap_err()
    }
}

fn backends_everywhere(attachment: Attachment) {
    if let Some(outside) = Outside::new(Some(attachment)) {
        reaches_everywhere(&outside);
    }
}

/// Backends on this node, in its own network and on another one, by every kind of frontend.
pub(super) fn reaches_everywhere(outside: &Outside) {
    for family in [0, 1] {
        let client = at(CLIENT[family], 0).ip();
        // A pod of the node sees the client's own address.
        let backend = at([V4, V6][family][0], 8080);
        let frontend = outside.node_port(family, &[backend]);
        let seen = outside.reaches(frontend, &outside.wires.pods[0], backend);
        assert!(seen.iter().all(|seen| seen.ip() == client), "{seen:?}");
        // So does a pod in the host's network namespace.
        let backend = at(NODE[family], 9090);
        let frontend = outside.node_port(family, &[backend]);
        let seen = outside.reaches(frontend, &outside.wires.node, backend);
        assert!(seen.iter().all(|seen| seen.ip() == client), "{seen:?}");
        // One of another node sees this node's.
        let backend = at(REMOTE[family], 8080);
        let frontend = outside.node_port(family, &[backend]);
        let seen = outside.reaches(frontend, &outside.other, backend);
        assert!(
            seen.iter()
                .all(|seen| seen.ip() == at(NODE[family], 0).ip()),
            "{seen:?}"
        );
        assert!(
            seen.iter()
                .all(|seen| u32::from(seen.port()) >= SOURCE_PORT_MIN),
            "{seen:?}"
        );
        // An address that is routed to the node and on no interface of it.
        let backend = at([V4, V6][family][1], 8080);
        outside.serve(ROUTED[family], 80, SCOPE_OUTSIDE_ADDRESS, &[backend]);
        let frontend = at(ROUTED[family], 80);
        let seen = outside.reaches(frontend, &outside.wires.pods[1], backend);
        assert!(seen.iter().all(|seen| seen.ip() == client), "{seen:?}");
    }
    for reason in ["flows_full", "malformed", "no_source", "ttl"] {
        assert_eq!(outside.wires.dropped(reason), 0, "{reason}");
    }
}

#[test]
fn a_client_outside_reaches_backends_everywhere_by_links() {
    backends_everywhere(Attachment::Tcx);
}

#[test]
fn a_client_outside_reaches_backends_everywhere_by_filters() {
    backends_everywhere(Attachment::Clsact);
}

/// In the other node's stead, or no longer.
fn announce(outside: &mut Outside, addresses: &[&str]) {
    let addresses = addresses.iter().map(|text| addr_of(text.parse().unwrap()));
    let addresses = addresses.collect();
    let (node, uplinks) = (&outside.wires.node, &mut outside.wires.uplinks);
    node.run(|| uplinks.announce(&addresses).unwrap());
}

const ANNOUNCED: [&str; 2] = ["192.0.2.200", "2001:db8::200"];

#[test]
fn an_announced_address_is_answered_for() {
    let Some(mut outside) = Outside::new(None) else {
        return;
    };
    for family in [0, 1] {
        let (address, backend) = (ANNOUNCED[family], at([V4, V6][family][0], 8080));
        outside.serve(address, 80, SCOPE_OUTSIDE_ADDRESS, &[backend]);
        assert!(outside.connect(at(address, 80)).is_err(), "nobody has it");
        announce(&mut outside, &[address]);
        outside.client.run(|| ip("neigh flush dev eth0"));
        outside.reaches(at(address, 80), &outside.wires.pods[0], backend);
        announce(&mut outside, &[]);
        outside.client.run(|| ip("neigh flush dev eth0"));
        assert!(
            outside.connect(at(address, 80)).is_err(),
            "nobody has it again"
        );
    }
}

/// Asks on the client's link until somebody answers; none: nobody does within a second.
fn who_has(outside: &Outside, family: usize, address: &str) -> Option<[u8; 6]> {
    let address: IpAddr = address.parse().unwrap();
    outside.client.run(|| {
        let asked = Asked {
            ifindex: if_nametoindex("eth0").unwrap(),
            mac: [MAC[0], MAC[1], MAC[2], MAC[3], MAC[4], 3],
            from: CLIENT[family].parse().unwrap(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let discovery = Discovery::open().unwrap();
            for _ in 0..10 {
                discovery.ask(asked, address, None).unwrap();
                let answer = async {
                    loop {
                        let (who, mac) = discovery.answer().await.unwrap();
                        if who == address {
                            return mac;
                        }
                    }
                };
                let answer = tokio::time::timeout(Duration::from_millis(100), answer);
                if let Ok(mac) = answer.await {
                    return Some(mac);
                }
            }
            None
        })
    })
}

#[test]
fn a_question_finds_who_has_an_address_and_who_announces_one() {
    let Some(mut outside) = Outside::new(None) else {
        return;
    };
    for family in [0, 1] {
        assert_eq!(
            who_has(&outside, family, NODE[family]),
            Some(MAC),
            "its kernel answers"
        );
        assert_eq!(who_has(&outside, family, ANNOUNCED[family]), None);
        announce(&mut outside, &[ANNOUNCED[family]]);
        assert_eq!(
            who_has(&outside, family, ANNOUNCED[family]),
            Some(MAC),
            "a program does"
        );
        announce(&mut outside, &[]);
    }
    outside.wires.node.run(|| ip("link set eth0 down"));
    assert_eq!(who_has(&outside, 0, NODE[0]), None, "it has gone");
}

#[test]
fn an_address_that_moves_to_this_node_is_reached_within_three_seconds() {
    let Some(mut outside) = Outside::new(None) else {
        return;
    };
    for family in [0, 1] {
        let (address, backend) = (ANNOUNCED[family], at([V4, V6][family][0], 8080));
        let frontend = at(address, 80);
        outside.serve(address, 80, SCOPE_OUTSIDE_ADDRESS, &[backend]);
        // The other node has it, and the client has talked to it.
        let prefix = [24, 64][family];
        outside.other.run(|| {
            let nodad = if family == 1 { " nodad" } else { "" };
            ip(&format!("addr add {address}/{prefix} dev eth0{nodad}"));
        });
        let listener = outside.other.listen(frontend);
        // Its link has just come up.
        let begun = std::time::Instant::now();
        while let Err(error) = outside.connect(frontend) {
            assert!(begun.elapsed().as_secs() < 20, "{error}");
        }
        drop(listener);
        // It fails; the client still sends to its hardware address.
        outside.other.run(|| ip("link set eth0 down"));
        assert!(outside.connect(frontend).is_err());
        let begun = std::time::Instant::now();
        announce(&mut outside, &[address]);
        let listener = outside.wires.pods[0].listen(backend);
        while let Err(error) = outside.connect(frontend) {
            assert!(begun.elapsed().as_secs() < 3, "{error}");
        }
        drop(listener);
        eprintln!("{address} moved in {:?}", begun.elapsed());
        outside.other.run(|| {
            ip(&format!("addr flush to {address} dev eth0"));
            ip("link set eth0 up");
        });
    }
}

#[test]
fn a_frontend_without_backends_refuses_or_drops() {
    let Some(outside) = Outside::new(None) else {
        return;
    };
    for family in [0, 1] {
        let frontend = outside.node_port(family, &[]);
        let refused = outside.connect(frontend).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(outside.send(frontend).kind(), ErrorKind::ConnectionRefused);
        outside.serve(ROUTED[family], 80, SCOPE_OUTSIDE_ADDRESS, &[]);
        let frontend = at(ROUTED[family], 80);
        let refused = outside.connect(frontend).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(outside.send(frontend).kind(), ErrorKind::ConnectionRefused);
        outside.set_flags(frontend, SCOPE_OUTSIDE_ADDRESS, FRONTEND_DROP);
        let before = outside.wires.dropped("no_backend_here");
        assert_eq!(
            outside.connect(frontend).unwrap_err().kind(),
            ErrorKind::TimedOut
        );
        assert!(outside.wires.dropped("no_backend_here") > before);
    }
}

#[test]
fn source_ranges_keep_other_clients_out() {
    let Some(outside) = Outside::new(None) else {
        return;
    };
    let ranges = outside.wires.data("SOURCE_RANGES");
    let mut ranges: LpmTrie<_, SourceRangeKey, u32> = Map::LpmTrie(ranges).try_into().unwrap();
    for family in [0, 1] {
        let backend = at([V4, V6][family][0], 8080);
        outside.serve(ROUTED[family], 80, SCOPE_OUTSIDE_ADDRESS, &[backend]);
        let frontend = at(ROUTED[family], 80);
        outside.set_flags(frontend, SCOPE_OUTSIDE_ADDRESS, FRONTEND_RESTRICTED);
        assert_eq!(
            outside.connect(frontend).unwrap_err().kind(),
            ErrorKind::TimedOut
        );
        assert!(outside.wires.dropped("source_range") > 0);
        for proto in [TCP, UDP] {
            let data = SourceRangeKey {
                service_id: 100 + u32::from(proto) * 10,
                addr: addr_of(CLIENT[family].parse().unwrap()),
            };
            let prefix = [96 + 24, 64][family];
            ranges
                .insert(&Key::new(SOURCE_RANGE_BITS + prefix, data), 1, 0)
                .unwrap();
        }
        outside.reaches(frontend, &outside.wires.pods[0], backend);
    }
}

#[test]
fn an_error_of_a_backend_is_about_the_frontend() {
    let Some(outside) = Outside::new(None) else {
        return;
    };
    for family in [0, 1] {
        // Nobody listens there: the pod says so, about an address that the client has never heard of.
        for backend in [at([V4, V6][family][0], 8088), at(REMOTE[family], 8088)] {
            let frontend = outside.node_port(family, &[backend]);
            assert_eq!(
                outside.send(frontend).kind(),
                ErrorKind::ConnectionRefused,
                "{backend}"
            );
            let refused = outside.connect(frontend).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{backend}");
        }
    }
}

#[test]
fn connections_are_spread_and_those_of_one_client_stay_together_with_affinity() {
    let Some(outside) = Outside::new(None) else {
        return;
    };
    let backends = [at(V4[0], 8080), at(V4[1], 8080)];
    let shown = backends.map(|backend| backend.to_string());
    let shown = [shown[0].as_str(), shown[1].as_str()];
    let listeners = [0, 1].map(|pod| {
        let listener = outside.wires.pods[pod].listen(backends[pod]);
        listener.set_nonblocking(true).unwrap();
        listener
    });
    let counts = |affinity_s: u32| {
        let frontend = format!("0.0.0.0:{NODE_PORT}");
        let scope = SCOPE_OUTSIDE_NODE_PORT;
        outside
            .wires
            .serve_as(&frontend, TCP, scope, 160, affinity_s, &shown);
        for _ in 0..24 {
            outside.connect(at(NODE[0], NODE_PORT)).unwrap();
        }
        [0, 1].map(|pod| std::iter::from_fn(|| listeners[pod].accept().ok()).count())
    };
    let spread = counts(0);
    assert!(spread.iter().all(|count| *count > 2), "{spread:?}");
    let together = counts(60);
    assert!(
        together.contains(&0) && together.contains(&24),
        "{together:?}"
    );
}

fn left_alone(attachment: Attachment) {
    let Some(mut outside) = Outside::new(Some(attachment)) else {
        return;
    };
    let backend = at(V4[0], 8080);
    let frontend = outside.node_port(0, &[backend]);
    outside.reaches(frontend, &outside.wires.pods[0], backend);
    let (node, uplinks) = (&outside.wires.node, &mut outside.wires.uplinks);
    node.run(|| uplinks.set(&[]).unwrap());
    let pins = outside.wires.pins();
    assert!(
        pins.iter().all(|pin| !pin.starts_with("uplink-")),
        "{pins:?}"
    );
    let refused = outside.connect(frontend).unwrap_err();
    assert_eq!(
        refused.kind(),
        ErrorKind::ConnectionRefused,
        "by the node itself"
    );
    outside.attach();
    outside.attach();
    outside.reaches(frontend, &outside.wires.pods[0], backend);
}

#[test]
fn an_interface_that_is_no_uplink_any_more_is_left_alone_by_links() {
    left_alone(Attachment::Tcx);
}

#[test]
fn an_interface_that_is_no_uplink_any_more_is_left_alone_by_filters() {
    left_alone(Attachment::Clsact);
}
