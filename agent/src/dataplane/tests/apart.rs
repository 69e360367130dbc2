//! A pod that talks to a backend through a Service, translated packet by packet, and to the same backend
//! itself, from one and the same port: two connections, whose answers look alike.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};

use super::frames::{ACK, FIN, Mac, RST, SYN, TCP, UDP, assert_checksums, ends, frame, tcp, udp};
use super::maps::Maps;
use super::programs::{OWN_IFINDEX, PASS, Programs, REDIRECT};
use super::wires::{Namespace, SHORT, V4, V6, Wires, at, received};

const POD: Mac = [0x0a, 0x58, 10, 244, 0, 2];
const OTHER: Mac = [0x0a, 0x58, 10, 244, 0, 3];
const GATEWAY: Mac = [0x0a, 0x58, 10, 244, 0, 1];
const OTHER_IFINDEX: u32 = 2;

/// Client, frontend, a backend on another node, one on this node; in both families.
const ENDS: [[&str; 4]; 2] = [
    [
        "10.244.0.2:4000",
        "10.96.0.1:80",
        "10.244.1.9:8080",
        "10.244.0.3:8080",
    ],
    [
        "[fd00:244::2]:4000",
        "[fd00:96::1]:80",
        "[fd00:244:1::9]:8080",
        "[fd00:244::3]:8080",
    ],
];

fn node() -> Option<Programs> {
    let mut programs = Programs::new()?;
    programs.add_pod(7, OWN_IFINDEX, POD, &["10.244.0.2", "fd00:244::2"]);
    programs.add_pod(8, OTHER_IFINDEX, OTHER, &["10.244.0.3", "fd00:244::3"]);
    Some(programs)
}

fn packet(proto: u8, from: &str, to: &str, flags: u8) -> Vec<u8> {
    match proto {
        TCP => tcp(from, to, flags, b""),
        _ => udp(from, to, b"datagram"),
    }
}

/// What the client sends to `to` leaves as: source and destination.
fn leaves(node: &mut Programs, proto: u8, from: &str, to: &str, flags: u8) -> (String, String) {
    let outcome = node.run(
        "from_pod",
        &frame(POD, GATEWAY, &packet(proto, from, to, flags)),
    );
    assert!(
        matches!(outcome.verdict, PASS | REDIRECT),
        "{to}: {outcome:?}"
    );
    assert_checksums(&outcome.frame);
    let (from, to) = ends(&outcome.frame);
    (from.to_string(), to.to_string())
}

/// What an answer to this arrives as.
fn arrives(node: &mut Programs, proto: u8, sent: &(String, String)) -> (String, String) {
    let answer = packet(proto, &sent.1, &sent.0, SYN | ACK);
    let outcome = node.run("to_pod", &frame(GATEWAY, POD, &answer));
    assert_eq!(outcome.verdict, PASS, "{outcome:?}");
    assert_checksums(&outcome.frame);
    let (from, to) = ends(&outcome.frame);
    (from.to_string(), to.to_string())
}

/// Every family, protocol and place of the backend.
fn for_each(test: impl Fn(&mut Programs, u8, &str, &str, &str)) {
    for [client, frontend, remote, local] in ENDS {
        for (proto, backend) in [(TCP, remote), (TCP, local), (UDP, remote), (UDP, local)] {
            let Some(mut node) = node() else { return };
            node.serve(frontend, proto, 10, &[backend]);
            test(&mut node, proto, client, frontend, backend);
        }
    }
}

#[test]
fn a_connection_to_a_backend_itself_is_no_part_of_a_services_flow() {
    for_each(|node, proto, client, frontend, backend| {
        let pair = |from: &str, to: &str| (from.to_owned(), to.to_owned());
        let through = leaves(node, proto, client, frontend, SYN);
        assert_eq!(through, pair(client, backend));
        let direct = leaves(node, proto, client, backend, SYN);
        assert_eq!(direct.1, backend);
        assert_ne!(direct.0, client, "its answers would be the Service's");
        assert_eq!(arrives(node, proto, &direct), pair(backend, client));
        assert_eq!(arrives(node, proto, &through), pair(frontend, client));
        // Both go on, the SYN of the second comes again, and a third client's port is its own.
        for flags in [SYN, ACK] {
            assert_eq!(leaves(node, proto, client, backend, flags), direct);
            assert_eq!(leaves(node, proto, client, frontend, flags), through);
        }
        let third = client.replace(":4000", ":4001");
        let own = leaves(node, proto, &third, backend, SYN);
        assert_eq!(own, pair(&third, backend));
        assert_eq!(arrives(node, proto, &own), pair(backend, &third));
    });
}

#[test]
fn a_port_whose_flow_closes_may_be_used_for_the_backend_itself() {
    for_each(|node, proto, client, frontend, backend| {
        if proto == UDP {
            return;
        }
        for end in [RST | ACK, FIN | ACK] {
            leaves(node, proto, client, frontend, SYN);
            leaves(node, proto, client, frontend, end);
            let direct = leaves(node, proto, client, backend, SYN);
            let answered = arrives(node, proto, &direct);
            assert_eq!(answered, (backend.to_owned(), client.to_owned()));
            assert_eq!(leaves(node, proto, client, backend, ACK), direct);
            leaves(node, proto, client, backend, end);
            // And again, when the Service's flow has been forgotten.
            node.age_flows(100);
            let direct = leaves(node, proto, client, backend, SYN);
            assert_eq!(direct.0, client);
            assert_eq!(leaves(node, proto, client, backend, ACK), direct);
        }
    });
}

#[test]
fn a_service_is_reached_from_a_port_that_has_a_connection_to_the_backend_itself() {
    for_each(|node, proto, client, frontend, backend| {
        let direct = leaves(node, proto, client, backend, SYN);
        assert_eq!(direct.0, client);
        let through = leaves(node, proto, client, frontend, SYN);
        assert_eq!(through.1, backend);
        assert_eq!(
            arrives(node, proto, &through),
            (frontend.to_owned(), client.to_owned())
        );
        // A datagram always begins anew; a connection is where it was.
        let direct = match proto {
            TCP => direct,
            _ => leaves(node, proto, client, backend, 0),
        };
        assert_eq!(leaves(node, proto, client, backend, ACK), direct);
        let answered = arrives(node, proto, &direct);
        assert_eq!(answered, (backend.to_owned(), client.to_owned()));
    });
}

/// A TCP client whose port others may have too.
fn client_at(pod: &Namespace, own: SocketAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    pod.run(|| {
        let family = match own {
            SocketAddr::V4(_) => AddressFamily::Inet,
            SocketAddr::V6(_) => AddressFamily::Inet6,
        };
        let made: OwnedFd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&made, sockopt::ReuseAddr, &true)?;
        setsockopt(&made, sockopt::ReusePort, &true)?;
        let time = nix::sys::time::TimeVal::new(0, SHORT.as_micros() as i64);
        // connect() waits no longer than that either.
        setsockopt(&made, sockopt::SendTimeout, &time)?;
        setsockopt(&made, sockopt::ReceiveTimeout, &time)?;
        bind(made.as_raw_fd(), &SockaddrStorage::from(own))?;
        connect(made.as_raw_fd(), &SockaddrStorage::from(to))?;
        Ok(TcpStream::from(made))
    })
}

fn echo(client: &mut TcpStream, listener: &TcpListener) -> std::io::Result<()> {
    use std::io::{Read, Write};
    let (mut accepted, _) = listener.accept()?;
    accepted.set_read_timeout(Some(SHORT))?;
    std::thread::spawn(move || {
        let mut buffer = [0; 8];
        while let Ok(length @ 1..) = accepted.read(&mut buffer) {
            if accepted.write_all(&buffer[..length]).is_err() {
                return;
            }
        }
    });
    ask(client).map(drop)
}

fn ask(client: &mut TcpStream) -> std::io::Result<[u8; 4]> {
    use std::io::{Read, Write};
    let mut buffer = [0; 4];
    client.write_all(b"ping")?;
    client.read_exact(&mut buffer)?;
    Ok(buffer)
}

#[test]
fn one_port_reaches_a_backend_through_its_service_and_by_itself_at_once() {
    let Some(wires) = Wires::attached() else {
        return;
    };
    let [web, db] = &wires.pods;
    for (family, addresses) in [V4, V6].into_iter().enumerate() {
        let frontend: SocketAddr = ENDS[family][1].parse().unwrap();
        let backend = at(addresses[1], 8080);
        for proto in [TCP, UDP] {
            let base = 10 + 10 * family as u32 + u32::from(proto) * 100;
            wires.serve(&frontend.to_string(), proto, base, &[&backend.to_string()]);
        }
        let listener = db.listen(backend);
        for (port, order) in [(4000, [frontend, backend]), (4001, [backend, frontend])] {
            let own = at(addresses[0], port);
            let mut clients = order.map(|to| {
                let mut client = client_at(web, own, to)
                    .unwrap_or_else(|error| panic!("{own} to {to} of {order:?}: {error}"));
                echo(&mut client, &listener).unwrap();
                client
            });
            for _ in 0..3 {
                for client in &mut clients {
                    assert_eq!(&ask(client).unwrap(), b"ping");
                }
            }
        }
        // One socket for both, and its answers come from whom it has asked.
        let server = db.bind(backend);
        let client = web.bind(at(addresses[0], 4002));
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(SHORT)).unwrap();
        }
        for to in [frontend, backend, frontend, backend] {
            client.send_to(b"question", to).unwrap();
            let (_, seen) = received(&server, &mut [0; 16]).unwrap();
            server.send_to(b"answer", seen).unwrap();
            let (_, answered) = received(&client, &mut [0; 16]).unwrap();
            assert_eq!(answered, to);
        }
    }
}
