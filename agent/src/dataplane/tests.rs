//! The data plane on the running kernel. Each test has its own cgroup below its own process'
//! cgroup, its own bpffs and network namespaces, so nothing else on the machine is affected.
//!
//! `packets` and `translation` run the packet programs on single frames, `wires` between real
//! namespaces.
//!
//! A test's client is a thread: in a *threaded* cgroup a single thread can be a member, and a
//! thread can have a network namespace of its own.

mod apart;
mod bandwidth;
mod batches;
mod bed;
mod direct;
mod ejection;
mod events;
mod explain;
mod frames;
mod maps;
mod masquerade;
mod masquerade_wires;
mod onward;
mod outside;
mod outside_packets;
mod outside_policy;
mod packets;
mod passage;
mod policy;
mod policy_wires;
mod programs;
mod routed;
mod translation;
mod wires;
mod xdp;
mod xdp_wires;

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use self::bed::{Bed, backend, block_on, device_node, service, set_node, udp_destination, view};
use super::hooks::SERVICE_HOOKS;
use super::*;
use crate::services::index::addr_of;
use gantry_api::proto;

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn refused(error: &io::Error) -> bool {
    // EPERM before Linux 6.1.
    matches!(error.raw_os_error(), Some(libc::ECONNREFUSED | libc::EPERM))
}

fn udp(local: &str) -> UdpSocket {
    let socket = UdpSocket::bind(local).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    socket
}

#[test]
fn tcp_goes_to_a_backend_and_shows_the_service_as_its_peer() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let web = service("10.96.0.1", 6, 80, &[backend("127.0.0.2", 8080)]);
    block_on(dataplane.apply(&view(1, vec![("web", web)]))).unwrap();
    bed.inside(|| {
        let server = TcpListener::bind("127.0.0.2:8080").unwrap();
        let client = TcpStream::connect("10.96.0.1:80").unwrap();
        assert_eq!(client.peer_addr().unwrap(), addr("10.96.0.1:80"));
        let (accepted, from) = server.accept().unwrap();
        assert_eq!(from, client.local_addr().unwrap());
        assert_eq!(accepted.local_addr().unwrap(), addr("127.0.0.2:8080"));
        // A v4-mapped client of the same service.
        let mapped = TcpStream::connect("[::ffff:10.96.0.1]:80").unwrap();
        assert_eq!(mapped.peer_addr().unwrap(), addr("[::ffff:10.96.0.1]:80"));
        server.accept().unwrap();
        // What is no frontend is left alone.
        TcpStream::connect("127.0.0.2:8080").unwrap();
    });
    let counters = dataplane.counters().unwrap();
    assert!(counters.contains(&("translated", 2)), "{counters:?}");
    assert_eq!(bed.peers(), 0, "closed sockets leave nothing");
}

#[test]
fn sockets_that_were_refused_or_are_unconnected_leave_nothing_of_a_connection() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let web = service("10.96.0.1", 6, 80, &[backend("127.0.0.2", 8080)]);
    let dns = service("10.96.0.10", 17, 53, &[backend("127.0.0.2", 5353)]);
    block_on(dataplane.apply(&view(1, vec![("web", web), ("dns", dns)]))).unwrap();
    bed.inside(|| {
        // Nobody listens: the kernel clears the socket's port, and its entry must go all the same.
        TcpStream::connect("10.96.0.1:80").unwrap_err();
        let server = udp("127.0.0.2:5353");
        let client = udp("0.0.0.0:0");
        client.connect("10.96.0.10:53").unwrap();
        assert_eq!(bed.peers(), 1);
        // Connected elsewhere, to the backend's port at another address: no Service's name.
        client.connect("127.0.0.3:5353").unwrap();
        assert_eq!(client.peer_addr().unwrap(), addr("127.0.0.3:5353"));
        drop((client, server));
    });
    assert_eq!(bed.peers(), 0);
}

/// More connections than PEERS has elements: the others' names are kept by age.
#[test]
fn a_connection_that_finds_no_room_still_shows_the_service() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let web = service("10.96.0.1", 6, 80, &[backend("127.0.0.2", 8080)]);
    block_on(dataplane.apply(&view(1, vec![("web", web)]))).unwrap();
    bed.fill_peers();
    bed.inside(|| {
        let _server = TcpListener::bind("127.0.0.2:8080").unwrap();
        let client = TcpStream::connect("10.96.0.1:80").unwrap();
        assert_eq!(client.peer_addr().unwrap(), addr("10.96.0.1:80"));
    });
}

#[test]
fn a_backend_reaches_itself_through_its_service() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let own = service("10.96.0.1", 6, 80, &[backend("127.0.0.1", 8080)]);
    block_on(dataplane.apply(&view(1, vec![("own", own)]))).unwrap();
    bed.inside(|| {
        let server = TcpListener::bind("127.0.0.1:8080").unwrap();
        let client = TcpStream::connect("10.96.0.1:80").unwrap();
        let (accepted, _) = server.accept().unwrap();
        assert_eq!(accepted.peer_addr().unwrap(), client.local_addr().unwrap());
    });
}

#[test]
fn udp_answers_come_from_the_service() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let dns = service("10.96.0.10", 17, 53, &[backend("127.0.0.2", 5353)]);
    block_on(dataplane.apply(&view(1, vec![("dns", dns)]))).unwrap();
    bed.inside(|| {
        let server = udp("127.0.0.2:5353");
        let mut buffer = [0; 16];
        let mut answer = || {
            let (len, from) = server.recv_from(&mut buffer).unwrap();
            server.send_to(&buffer[..len], from).unwrap();
        };
        let mut reply = [0; 16];
        let unconnected = udp("0.0.0.0:0");
        unconnected.send_to(b"a", "10.96.0.10:53").unwrap();
        answer();
        assert_eq!(
            unconnected.recv_from(&mut reply).unwrap(),
            (1, addr("10.96.0.10:53"))
        );
        let connected = udp("0.0.0.0:0");
        connected.connect("10.96.0.10:53").unwrap();
        assert_eq!(connected.peer_addr().unwrap(), addr("10.96.0.10:53"));
        connected.send(b"b").unwrap();
        answer();
        assert_eq!(connected.recv(&mut reply).unwrap(), 1);
        let mapped = udp("[::]:0");
        mapped.send_to(b"c", "[::ffff:10.96.0.10]:53").unwrap();
        answer();
        let (_, from) = mapped.recv_from(&mut reply).unwrap();
        assert_eq!(from, addr("[::ffff:10.96.0.10]:53"));
    });
}

#[test]
fn ipv6_services_work_like_ipv4_ones() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let web = service("fd00:96::1", 6, 80, &[backend("::1", 8080)]);
    let dns = service("fd00:96::a", 17, 53, &[backend("::1", 5353)]);
    block_on(dataplane.apply(&view(1, vec![("web", web), ("dns", dns)]))).unwrap();
    bed.inside(|| {
        if UdpSocket::bind("[::1]:0").is_err() {
            return eprintln!("skipped: no IPv6 on this machine");
        }
        let _server = TcpListener::bind("[::1]:8080").unwrap();
        let client = TcpStream::connect("[fd00:96::1]:80").unwrap();
        assert_eq!(client.peer_addr().unwrap(), addr("[fd00:96::1]:80"));
        let server = udp("[::1]:5353");
        let (client, mut buffer) = (udp("[::]:0"), [0; 4]);
        client.send_to(b"a", "[fd00:96::a]:53").unwrap();
        let (_, from) = server.recv_from(&mut buffer).unwrap();
        server.send_to(b"b", from).unwrap();
        assert_eq!(
            client.recv_from(&mut buffer).unwrap(),
            (1, addr("[fd00:96::a]:53"))
        );
    });
}

#[test]
fn a_service_without_backends_refuses_at_once() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let tcp = service("10.96.0.1", 6, 80, &[]);
    let datagrams = service("10.96.0.2", 17, 53, &[]);
    block_on(dataplane.apply(&view(1, vec![("tcp", tcp), ("udp", datagrams)]))).unwrap();
    bed.inside(|| {
        assert!(refused(&TcpStream::connect("10.96.0.1:80").unwrap_err()));
        assert!(refused(
            &udp("0.0.0.0:0").send_to(b"a", "10.96.0.2:53").unwrap_err()
        ));
    });
    assert!(dataplane.counters().unwrap().contains(&("no_backend", 2)));
}

#[test]
fn node_ports_answer_at_every_nodes_address() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let mut web = service("10.96.0.1", 6, 80, &[backend("127.0.0.2", 8080)]);
    web.0.ports[0].node_port = 30_080;
    let mut view = view(1, vec![("web", web)]);
    set_node(&mut view, "192.0.2.1");
    block_on(dataplane.apply(&view)).unwrap();
    bed.inside(|| {
        let _server = TcpListener::bind("127.0.0.2:8080").unwrap();
        let client = TcpStream::connect("192.0.2.1:30080").unwrap();
        assert_eq!(client.peer_addr().unwrap(), addr("192.0.2.1:30080"));
        assert!(
            TcpStream::connect("192.0.2.2:30080").is_err(),
            "no node's address"
        );
    });
}

#[test]
fn the_cluster_dns_address_is_the_nodes_own_resolver() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let mut view = view(1, vec![]);
    Arc::make_mut(&mut view.settings).dns_service_ip = Some("10.96.0.10".parse().unwrap());
    block_on(dataplane.apply(&view)).unwrap();
    bed.inside(|| {
        let server = udp(bed::RESOLVER);
        let client = udp("0.0.0.0:0");
        client.send_to(b"a", "10.96.0.10:53").unwrap();
        assert_eq!(server.recv_from(&mut [0; 4]).unwrap().0, 1);
    });
}

#[test]
fn the_backend_that_holds_its_connections_gets_fewer_of_them() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let ports = [9101, 9102, 9103, 9104, 9105];
    let of = |ip, port, least_connections| {
        let backends: Vec<_> = ports
            .iter()
            .map(|port| backend("127.0.0.1", *port))
            .collect();
        let mut served = service(ip, 6, port, &backends);
        served.0.least_connections = least_connections;
        served
    };
    let services = vec![
        ("random", of("10.96.0.1", 80, false)),
        ("least", of("10.96.0.2", 80, true)),
    ];
    block_on(dataplane.apply(&view(1, services))).unwrap();
    // The first backend is slow: its connections stay, the others' are over at once.
    let slow_share = |service: &str| {
        let listeners = ports.map(|port| TcpListener::bind(format!("127.0.0.1:{port}")).unwrap());
        for listener in &listeners {
            listener.set_nonblocking(true).unwrap();
        }
        let mut held = Vec::new();
        for _ in 0..200 {
            let client = TcpStream::connect(service).unwrap();
            let chosen = listeners
                .iter()
                .position(|listener| listener.accept().is_ok());
            if chosen == Some(0) {
                held.push(client);
            }
        }
        held.len()
    };
    bed.inside(|| {
        let (random, least) = (slow_share("10.96.0.1:80"), slow_share("10.96.0.2:80"));
        assert!(random >= 20, "{random} of 200, about 40 by chance");
        assert!(least <= 5, "{least} of 200 went to the busiest backend");
    });
    let asked = proto::ServicesRequest {
        name: "least".into(),
        ..Default::default()
    };
    let shown = block_on(dataplane.services(&asked)).unwrap();
    assert_eq!(shown.len(), 1);
    assert_eq!((shown[0].frontends.len(), shown[0].backends.len()), (1, 5));
    assert_eq!(shown[0].backends.iter().map(|b| b.chosen).sum::<u64>(), 200);
    assert!(dataplane.fill().iter().all(|fill| !fill.is_nearly_full()));
    let (left, chosen) = bed.traffic();
    assert_eq!(left, 0, "every connection that ended is taken out again");
    assert_eq!(chosen, 400, "every choice is counted");
}

#[test]
fn a_datagram_socket_that_connects_again_is_counted_once() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let mut served = service("10.96.0.1", 17, 53, &[backend("127.0.0.1", 9201)]);
    served.0.least_connections = true;
    block_on(dataplane.apply(&view(1, vec![("dns", served)]))).unwrap();
    bed.inside(|| {
        let client = udp("0.0.0.0:0");
        for _ in 0..3 {
            client.connect("10.96.0.1:53").unwrap();
        }
        assert_eq!(bed.traffic().0, 1);
    });
    assert_eq!(bed.traffic(), (0, 3));
}

/// Waits at most a second for what a dead socket says.
fn fails_soon(read: impl FnOnce() -> io::Result<usize>) {
    let begun = Instant::now();
    let error = read().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED), "{error}");
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );
}

#[test]
fn a_socket_whose_backend_has_gone_is_told_at_once_and_others_are_not() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let state = |rev, of: Option<proto::backend::State>| {
        let with = |proto, port| {
            let mut served = service("10.96.0.1", proto, port, &[backend("127.0.0.3", port)]);
            if rev == 1 {
                served.1.clear();
            }
            if let Some(state) = of {
                let leaving = service("10.96.0.1", proto, port, &[backend("127.0.0.2", port)]).1;
                let mut leaving = proto::Backend::clone(&leaving["0"]);
                leaving.set_state(state);
                served.1.insert("leaving".into(), Arc::new(leaving));
            }
            served
        };
        let services = vec![("tcp", with(6, 8080)), ("udp", with(17, 5353))];
        block_on(dataplane.apply(&view(rev, services))).unwrap();
    };
    state(1, Some(proto::backend::State::Serving));
    bed.inside(|| {
        let _listener = TcpListener::bind("127.0.0.2:8080").unwrap();
        let other = udp("127.0.0.3:5353");
        let wait = Some(Duration::from_secs(5));
        let mut idle = TcpStream::connect("10.96.0.1:8080").unwrap();
        let mapped = TcpStream::connect("[::ffff:10.96.0.1]:8080").unwrap();
        let direct = TcpStream::connect("127.0.0.2:8080").unwrap();
        for socket in [&idle, &mapped, &direct] {
            socket.set_read_timeout(wait).unwrap();
        }
        let (client, direct_udp) = (udp("0.0.0.0:0"), udp("0.0.0.0:0"));
        client.connect("10.96.0.1:5353").unwrap();
        direct_udp.connect("127.0.0.2:5353").unwrap();

        // Leaving, it may finish what it has.
        state(2, Some(proto::backend::State::Draining));
        std::thread::sleep(Duration::from_millis(100));
        idle.set_nonblocking(true).unwrap();
        let busy = io::Read::read(&mut idle, &mut [0]).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
        idle.set_nonblocking(false).unwrap();
        assert_eq!(dataplane.sockets_ended(), 0);

        state(3, None);
        fails_soon(|| io::Read::read(&mut idle, &mut [0]));
        fails_soon(|| io::Read::read(&mut &mapped, &mut [0]));
        fails_soon(|| client.recv(&mut [0]));
        // Counted a moment after the last one was told.
        let until = Instant::now() + Duration::from_secs(5);
        while dataplane.sockets_ended() != 3 {
            assert!(Instant::now() < until, "{}", dataplane.sockets_ended());
            std::thread::sleep(Duration::from_millis(1));
        }
        // The client asks the Service again and is served.
        client.connect("10.96.0.1:5353").unwrap();
        client.send(b"again").unwrap();
        assert_eq!(other.recv(&mut [0; 8]).unwrap(), 5);
        // Who never asked a Service is not meant.
        direct.set_nonblocking(true).unwrap();
        assert_eq!(
            direct.peek(&mut [0]).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        assert_eq!(direct_udp.peer_addr().unwrap(), addr("127.0.0.2:5353"));
    });
}

#[test]
fn what_went_while_no_agent_ran_is_found_by_the_next_one() {
    let Some(bed) = Bed::new() else { return };
    let served = |at| service("10.96.0.1", 17, 53, &[backend(at, 5353)]);
    let before = bed.start();
    block_on(before.apply(&view(1, vec![("dns", served("127.0.0.2"))]))).unwrap();
    bed.inside(|| {
        let client = udp("0.0.0.0:0");
        client.connect("10.96.0.1:53").unwrap();
        drop(before);
        let after = bed.start();
        block_on(after.apply(&view(2, vec![("dns", served("127.0.0.3"))]))).unwrap();
        fails_soon(|| client.recv(&mut [0]));
    });
}

#[test]
fn a_host_port_is_the_pods_until_it_has_ended_and_after_a_restart() {
    let Some(bed) = Bed::new() else { return };
    let with = |rev, phase: &str| {
        let pod = serde_json::json!({
            "metadata": {"name": "p", "uid": "u1"},
            "spec": {"containers": [
                {"name": "c", "ports": [{"containerPort": 8080, "hostPort": 8088}]},
            ]},
            "status": {"phase": phase, "podIPs": [{"ip": "127.0.0.2"}]},
        });
        let mut view = view(rev, Vec::new());
        set_node(&mut view, "127.0.0.9");
        let pod = Arc::new(serde_json::from_value(pod).unwrap());
        Arc::make_mut(&mut view.pods).insert(PodUid::new("u1").unwrap(), pod);
        view
    };
    let dataplane = bed.start();
    block_on(dataplane.apply(&with(1, "Running"))).unwrap();
    bed.inside(|| {
        let server = TcpListener::bind("127.0.0.2:8080").unwrap();
        let reached = || {
            let client = TcpStream::connect("127.0.0.9:8088")?;
            server.accept()?;
            client.peer_addr()
        };
        assert_eq!(reached().unwrap(), addr("127.0.0.9:8088"));
        drop(dataplane);
        assert!(reached().is_ok(), "without an agent");
        let dataplane = bed.start();
        block_on(dataplane.apply(&with(2, "Running"))).unwrap();
        assert!(reached().is_ok(), "with a new one");
        block_on(dataplane.apply(&with(3, "Failed"))).unwrap();
        assert!(refused(&reached().unwrap_err()));
    });
}

/// Sends one datagram through `send` and says which of the servers got it.
fn receiver(servers: &[UdpSocket], send: impl FnOnce()) -> usize {
    send();
    let got = servers.iter().position(|server| {
        server.set_nonblocking(true).unwrap();
        server.recv(&mut [0; 4]).is_ok()
    });
    got.expect("loopback delivers before send returns")
}

#[test]
fn affinity_keeps_a_client_on_its_backend_until_that_leaves() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let ports = [9001, 9002, 9003, 9004];
    let apply = |rev: u64, left: Option<usize>| {
        let backends: Vec<_> = (0..4)
            .filter(|i| left != Some(*i))
            .map(|i| backend("127.0.0.1", ports[i]))
            .collect();
        let mut sticky = service("10.96.0.1", 17, 53, &backends);
        sticky.0.client_ip_affinity = true;
        block_on(dataplane.apply(&view(rev, vec![("sticky", sticky)]))).unwrap();
    };
    apply(1, None);
    let chosen = bed.inside(|| {
        let servers: Vec<_> = ports.map(|port| udp(&format!("127.0.0.1:{port}"))).into();
        let connect = || {
            receiver(&servers, || {
                let client = udp("0.0.0.0:0");
                client.connect("10.96.0.1:53").unwrap();
                client.send(b"a").unwrap();
            })
        };
        let first = connect();
        for _ in 0..20 {
            assert_eq!(connect(), first);
        }
        apply(2, Some(first));
        let second = connect();
        assert_ne!(second, first);
        for _ in 0..20 {
            assert_eq!(connect(), second);
        }
        first
    });
    // Another network namespace is another client; it draws its own lot, and never the one gone.
    bed.inside(|| {
        let servers: Vec<_> = ports.map(|port| udp(&format!("127.0.0.1:{port}"))).into();
        let client = udp("0.0.0.0:0");
        let got = receiver(&servers, || {
            assert_eq!(client.send_to(b"a", "10.96.0.1:53").unwrap(), 1)
        });
        assert_ne!(got, chosen);
    });
}

#[test]
fn connections_are_spread_and_an_unconnected_socket_stays() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let ports = [9001, 9002, 9003];
    let backends = ports.map(|port| backend("127.0.0.1", port));
    let spread = service("10.96.0.1", 17, 53, &backends);
    block_on(dataplane.apply(&view(1, vec![("spread", spread)]))).unwrap();
    bed.inside(|| {
        let servers: Vec<_> = ports.map(|port| udp(&format!("127.0.0.1:{port}"))).into();
        let mut hits = [0; 3];
        for _ in 0..300 {
            hits[receiver(&servers, || {
                let client = udp("0.0.0.0:0");
                client.connect("10.96.0.1:53").unwrap();
                client.send(b"a").unwrap();
            })] += 1;
        }
        assert!(hits.iter().all(|hits| *hits > 50), "{hits:?}");
        let client = udp("0.0.0.0:0");
        let send = || assert_eq!(client.send_to(b"a", "10.96.0.1:53").unwrap(), 1);
        let first = receiver(&servers, send);
        for _ in 0..20 {
            assert_eq!(receiver(&servers, send), first);
        }
    });
}

/// (link id, program id) of every hook.
fn links(bed: &Bed) -> Vec<(u32, u32)> {
    let info = |hook: &hooks::Hook| {
        let pin = hooks::directory(&bed.paths).join(hook.program);
        let info = sys::link_info(sys::open_pinned(&pin).unwrap().as_fd()).unwrap();
        (info.id, info.program_id)
    };
    SERVICE_HOOKS.iter().map(info).collect()
}

#[test]
fn services_go_on_while_the_agent_is_dead_and_through_its_restart() {
    let Some(bed) = Bed::new() else { return };
    let state = view(
        7,
        vec![(
            "web",
            service("10.96.0.1", 6, 80, &[backend("127.0.0.2", 8080)]),
        )],
    );
    let first = bed.start();
    block_on(first.apply(&state)).unwrap();
    let before = links(&bed);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            bed.inside(|| {
                let server = TcpListener::bind("127.0.0.2:8080").unwrap();
                let mut connects = 0;
                while !done.load(Ordering::Relaxed) {
                    let client = TcpStream::connect("10.96.0.1:80").unwrap();
                    assert_eq!(client.peer_addr().unwrap(), addr("10.96.0.1:80"));
                    server.accept().unwrap();
                    connects += 1;
                }
                connects
            })
        });
        drop(first);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(links(&bed), before, "still attached");
        let second = bed.start();
        let after = links(&bed);
        for ((link, program), (link_now, program_now)) in before.iter().zip(&after) {
            assert_eq!(link, link_now, "the same link");
            assert_ne!(program, program_now, "a new program behind it");
        }
        let generation = bed.frontends()[0].1.generation;
        block_on(second.apply(&View {
            rev: 8,
            ..state.clone()
        }))
        .unwrap();
        assert_eq!(
            bed.frontends()[0].1.generation,
            generation,
            "nothing was rewritten"
        );
        std::thread::sleep(Duration::from_millis(20));
        done.store(true, Ordering::Relaxed);
        let connects: u32 = client.join().unwrap();
        assert!(connects > 20, "only {connects} connects");
        // What the agent missed while it was dead.
        block_on(second.apply(&view(9, vec![]))).unwrap();
        assert!(bed.frontends().is_empty());
    });
}

#[test]
fn another_layout_serves_until_the_new_maps_are_filled() {
    let Some(bed) = Bed::new() else { return };
    let state = view(
        1,
        vec![(
            "web",
            service("10.96.0.1", 6, 80, &[backend("127.0.0.2", 8080)]),
        )],
    );
    let old = bed.start();
    block_on(old.apply(&state)).unwrap();
    drop(old);
    let maps = load::map_directory(&bed.paths);
    let other = bed.paths.bpf.join("maps-v0");
    std::fs::rename(&maps, &other).unwrap();
    let before = links(&bed);
    let connect = || {
        bed.inside(|| {
            let _server = TcpListener::bind("127.0.0.2:8080").unwrap();
            TcpStream::connect("10.96.0.1:80").unwrap();
        });
    };
    let new = bed.start();
    assert_eq!(links(&bed), before, "the old programs serve");
    connect();
    block_on(new.apply(&state)).unwrap();
    assert_ne!(links(&bed), before);
    connect();
    assert!(!other.exists());
}

#[test]
fn resync_repairs_what_somebody_else_broke() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let state = view(
        1,
        vec![(
            "web",
            service("10.96.0.1", 6, 80, &[backend("127.0.0.2", 8080)]),
        )],
    );
    block_on(dataplane.apply(&state)).unwrap();
    bed.clear_frontends();
    block_on(dataplane.apply(&state)).unwrap();
    assert!(
        bed.frontends().is_empty(),
        "apply goes by the view's changes"
    );
    block_on(dataplane.resync(&state)).unwrap();
    assert_eq!(
        bed.frontends()[0].0.addr,
        addr_of("10.96.0.1".parse::<IpAddr>().unwrap())
    );
}

#[test]
fn stuck_services_are_named_and_cost_no_other() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let one = service("10.96.0.1", 6, 80, &[backend("127.0.0.2", 8080)]);
    let same = service("10.96.0.1", 6, 80, &[backend("127.0.0.3", 8080)]);
    let sctp = service("10.96.0.2", 132, 80, &[]);
    let services = vec![("a", one), ("b", same), ("c", sctp)];
    let stuck = block_on(dataplane.apply(&view(1, services))).unwrap();
    let names: Vec<&str> = stuck.iter().map(|stuck| stuck.service.as_str()).collect();
    assert_eq!(names, ["default/b", "default/c"], "{stuck:?}");
    assert_eq!(bed.frontends().len(), 1);
}

#[test]
fn removal_leaves_nothing_and_can_be_repeated() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let web = service("10.96.0.1", 6, 80, &[backend("127.0.0.2", 8080)]);
    block_on(dataplane.apply(&view(1, vec![("web", web)]))).unwrap();
    dataplane.attach_device_guard(&bed.cgroup).unwrap();
    remove_all(&bed.paths).unwrap();
    remove_all(&bed.paths).unwrap();
    assert!(!bed.paths.bpf.exists());
    bed.inside(|| {
        let _server = TcpListener::bind("127.0.0.2:8080").unwrap();
        assert!(TcpStream::connect("10.96.0.1:80").is_err());
        std::fs::File::open(device_node(&bed, 11)).unwrap();
    });
}

#[test]
fn programs_load_also_for_kernels_without_set_retval() {
    let Some(bed) = Bed::new() else { return };
    drop(bed.start()); // mounts and makes the directories
    let mut ebpf = load::open(&load::map_directory(&bed.paths), false).unwrap();
    load::load_hooks(&mut ebpf).unwrap();
}

#[test]
fn of_programs_that_cannot_be_loaded_the_first_is_told() {
    let Some(bed) = Bed::new() else { return };
    drop(bed.start());
    let mut ebpf = load::open(&load::map_directory(&bed.paths), true).unwrap();
    let error = load::load_programs(&mut ebpf, &["connect4", "nobody", "connect6", "nothing"]);
    let words = error.unwrap_err().to_string();
    assert!(
        words.contains("nobody") && !words.contains("nothing"),
        "{words}"
    );
    load::load_hooks(&mut ebpf).unwrap();
    // Loaded twice: refused, the first in the order of the names.
    let words = load::load_hooks(&mut ebpf).unwrap_err().to_string();
    assert!(words.contains(load::of_packets()[0]), "{words}");
}

/// What an agent's start waits for. `cargo test --workspace --lib measure_load -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn measure_load() {
    let Some(bed) = Bed::new() else { return };
    drop(bed.start());
    for _ in 0..5 {
        let mut ebpf = load::open(&load::map_directory(&bed.paths), true).unwrap();
        let began = Instant::now();
        load::load_hooks(&mut ebpf).unwrap();
        let together = began.elapsed();
        let mut ebpf = load::open(&load::map_directory(&bed.paths), true).unwrap();
        let mut names = load::of_packets();
        names.extend(hooks::SERVICE_HOOKS.iter().map(|hook| hook.program));
        let began = Instant::now();
        for name in names {
            load::load_program(&mut ebpf, name).unwrap();
        }
        println!(
            "together {together:?}, one after the other {:?}",
            began.elapsed()
        );
    }
}

#[test]
fn pods_in_namespaces_of_their_own_reach_each_other_and_themselves() {
    let Some(bed) = Bed::new() else { return };
    if let Err(reason) = bed.inside(|| bed::try_ip("link add v0 type veth peer name v1")) {
        return eprintln!("skipped: no veth pair: {reason}");
    }
    let dataplane = bed.start();
    let web = service("10.96.0.1", 6, 80, &[backend("10.244.0.2", 8080)]);
    block_on(dataplane.apply(&view(1, vec![("web", web)]))).unwrap();
    let (tell_tid, tid) = std::sync::mpsc::channel();
    let (tell_linked, linked) = std::sync::mpsc::channel();
    let (tell_ready, ready) = std::sync::mpsc::channel();
    let (tell_done, done) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let bed = &bed;
        let server = scope.spawn(move || {
            bed.inside(move || {
                tell_tid.send(nix::unistd::gettid().as_raw()).unwrap();
                linked.recv().unwrap();
                bed::ip("addr add 10.244.0.2/24 dev eth0");
                bed::ip("link set eth0 up");
                let server = TcpListener::bind("10.244.0.2:8080").unwrap();
                tell_ready.send(()).unwrap();
                let (_, from) = server.accept().unwrap();
                assert_eq!(from.ip().to_string(), "10.244.0.1");
                // Hairpin: its own Service, its own address on both ends.
                let own = TcpStream::connect("10.96.0.1:80").unwrap();
                let (_, from) = server.accept().unwrap();
                assert_eq!(from, own.local_addr().unwrap());
                drop(tell_done);
            })
        });
        bed.inside(move || {
            let tid = tid.recv().unwrap();
            bed::ip(&format!(
                "link add eth0 type veth peer name eth0 netns {tid}"
            ));
            bed::ip("addr add 10.244.0.1/24 dev eth0");
            bed::ip("link set eth0 up");
            tell_linked.send(()).unwrap();
            ready.recv().unwrap();
            let client = TcpStream::connect("10.96.0.1:80").unwrap();
            assert_eq!(client.peer_addr().unwrap(), addr("10.96.0.1:80"));
            // With this namespace goes its end of the pair, and with it the server's and its address.
            let _ = done.recv();
        });
        server.join().unwrap();
    });
}

#[test]
fn ten_thousand_services_fit_and_a_change_costs_one_service() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let names: Vec<String> = (0..10_000).map(|i| format!("s{i}")).collect();
    let services = names.iter().enumerate().map(|(i, name)| {
        let backends: Vec<_> = (0..10)
            .map(|j| backend(&format!("10.244.{}.{}", i % 250, j + 1), 8080))
            .collect();
        let address = format!("10.96.{}.{}", i / 250, i % 250 + 1);
        (name.as_str(), service(&address, 6, 80, &backends))
    });
    let mut state = view(1, services.collect());
    let begun = Instant::now();
    assert!(block_on(dataplane.apply(&state)).unwrap().is_empty());
    let (whole, begun) = (begun.elapsed(), std::time::Instant::now());
    state.rev = 2;
    let (changed, backends) = service("10.96.0.1", 6, 80, &[backend("127.0.0.2", 8080)]);
    let name = crate::view::ServiceName {
        namespace: "default".into(),
        name: "s0".into(),
    };
    Arc::make_mut(&mut state.services).insert(name.clone(), Arc::new(changed));
    Arc::make_mut(&mut state.backends).insert(name, Arc::new(backends));
    assert!(block_on(dataplane.apply(&state)).unwrap().is_empty());
    eprintln!(
        "10,000 services x 10 backends in {whole:?}, one change in {:?}",
        begun.elapsed()
    );
    let written = bed.frontends();
    assert_eq!(written.len(), 10_000);
    assert_eq!(
        written
            .iter()
            .filter(|(_, value)| value.generation == 2)
            .count(),
        1
    );
    bed.inside(|| {
        let _server = TcpListener::bind("127.0.0.2:8080").unwrap();
        TcpStream::connect("10.96.0.1:80").unwrap();
    });
}

/// A writer replaces a Service's backends as fast as it can; every connect must get one of a
/// generation that was current at some moment of the connect.
#[test]
fn a_switch_under_load_never_misses_and_never_mixes() {
    const CONNECTS: u32 = 20_000;
    let count_of = |generation: u64| 3 + (generation % 5) as u8;
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let apply = |generation: u64| {
        // The address tells generation and index: 127.x.y.index, port 9000.
        let [.., high, low] = generation.to_be_bytes();
        let backends: Vec<_> = (1..=count_of(generation))
            .map(|index| backend(&format!("127.{high}.{low}.{index}"), 9000))
            .collect();
        let web = service("10.96.0.1", 17, 53, &backends);
        block_on(dataplane.apply(&view(generation, vec![("web", web)]))).unwrap();
    };
    apply(1);
    let (begun, ended) = (AtomicU64::new(1), AtomicU64::new(1));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for generation in 2..=65_000 {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                begun.store(generation, Ordering::SeqCst);
                apply(generation);
                ended.store(generation, Ordering::SeqCst);
            }
        });
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            bed.inside(|| {
                let server = udp("0.0.0.0:9000");
                for _ in 0..CONNECTS {
                    let oldest = ended.load(Ordering::SeqCst);
                    let client = UdpSocket::bind("0.0.0.0:0").unwrap();
                    client.connect("10.96.0.1:53").unwrap();
                    let newest = begun.load(Ordering::SeqCst);
                    match client.send(b"a").map_err(|error| error.raw_os_error()) {
                        Ok(_) => {}
                        // Its backend has left meanwhile, and socket repair has told it.
                        Err(Some(libc::EDESTADDRREQ | libc::ECONNABORTED)) => continue,
                        Err(other) => panic!("{other:?}"),
                    }
                    let [_, high, low, index] = udp_destination(&server).octets();
                    let generation = u64::from(u16::from_be_bytes([high, low]));
                    assert!(
                        (oldest..=newest).contains(&generation),
                        "generation {generation} is none of {oldest}..={newest}"
                    );
                    assert!(index <= count_of(generation), "slot beyond its generation");
                }
            });
        }));
        done.store(true, Ordering::Relaxed);
        checked.unwrap();
    });
    let switches = ended.load(Ordering::SeqCst);
    eprintln!("{CONNECTS} connects against {switches} switches: 0 misses, 0 mixed");
    let broken = dataplane
        .counters()
        .unwrap()
        .into_iter()
        .find(|(name, _)| *name == "broken_slot");
    assert_eq!(broken, Some(("broken_slot", 0)));
}

#[test]
fn the_device_guard_holds_below_its_cgroup_and_exempts_by_id() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    dataplane.attach_device_guard(&bed.cgroup).unwrap();
    dataplane.attach_device_guard(&bed.cgroup).unwrap();
    let kmsg = bed.inside(|| {
        std::fs::File::open("/dev/null").unwrap();
        std::fs::File::options()
            .write(true)
            .open("/dev/zero")
            .unwrap();
        let kmsg = device_node(&bed, 11); // making it is allowed
        let error = std::fs::File::open(&kmsg).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        kmsg
    });
    std::fs::File::open(&kmsg).expect("outside of the cgroup nothing is guarded");
    assert!(
        dataplane
            .counters()
            .unwrap()
            .contains(&("device_denied", 1))
    );

    let id = bpf::cgroup_id(&bed.cgroup).unwrap();
    dataplane.exempt(id).unwrap();
    bed.inside(|| std::fs::File::open(&kmsg).map(drop)).unwrap();
    dataplane.remove_exemption(id).unwrap();
    dataplane.remove_exemption(id).unwrap();
    bed.inside(|| std::fs::File::open(&kmsg).map(drop))
        .unwrap_err();
    drop(dataplane);
    bed.inside(|| std::fs::File::open(&kmsg).map(drop))
        .unwrap_err();
}

#[test]
fn a_kernel_that_refuses_ebpf_is_told_with_what_to_do() {
    let told = |errno| {
        let error = std::io::Error::from_raw_os_error(errno);
        DataplaneError::kernel("program connect4", &error).to_string()
    };
    for (errno, words) in [
        (libc::EPERM, &["CAP_BPF", "seccomp", "lockdown"][..]),
        (libc::EACCES, &["CAP_BPF"]),
        (libc::ENOSYS, &["CONFIG_BPF_SYSCALL", "6.1"]),
        (libc::EINVAL, &["Linux 6.1 or newer", "uname -r"]),
        (libc::ENOMEM, &["out of memory"]),
    ] {
        let text = told(errno);
        assert!(text.starts_with("program connect4: "), "{text}");
        for word in words {
            assert!(
                text.contains(word),
                "{errno} says nothing of {word}: {text}"
            );
        }
    }
    let other = told(libc::EIO);
    assert!(
        !other.ends_with("; "),
        "no advice where there is none: {other}"
    );
}
