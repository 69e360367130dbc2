//! Services for packets that no socket hook has seen: single frames, each with what it becomes.

use ebpf_maps::flow::{
    OTHER_ESTABLISHED_TICKS, TCP_CLOSING_TICKS, TCP_ESTABLISHED_TICKS, TCP_OPENING_TICKS,
};
use ebpf_maps::services::SCOPE_ADDRESS;

use super::frames::{
    ACK, FIN, Mac, RST, SYN, TCP, UDP, assert_checksums, ends, frame, icmp, quoted_ends, tcp, udp,
    v4,
};
use super::maps::Maps;
use super::programs::{OWN_IFINDEX, PASS, Programs, REDIRECT, SHOT};

const POD: Mac = [0x0a, 0x58, 10, 244, 0, 2];
const OTHER: Mac = [0x0a, 0x58, 10, 244, 0, 3];
const GATEWAY: Mac = [0x0a, 0x58, 10, 244, 0, 1];

/// The addresses of one family: the pod under test, another pod of the node, a frontend, a second
/// one, a backend on another node, a router on the way to it.
struct Family {
    pod: &'static str,
    other: &'static str,
    frontend: &'static str,
    second: &'static str,
    remote: &'static str,
    router: &'static str,
    hairpin: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        pod: "10.244.0.2",
        other: "10.244.0.3",
        frontend: "10.96.0.1",
        second: "10.96.0.2",
        remote: "10.244.1.9",
        router: "192.0.2.1",
        hairpin: "169.254.42.1",
    },
    Family {
        pod: "fd00:244::2",
        other: "fd00:244::3",
        frontend: "fd00:96::1",
        second: "fd00:96::2",
        remote: "fd00:244:1::9",
        router: "2001:db8::1",
        hairpin: "fd67:616e:7472:7900::1",
    },
];

fn at(address: &str, port: u16) -> String {
    std::net::SocketAddr::new(address.parse().unwrap(), port).to_string()
}

/// A segment or datagram; `flags` are for TCP.
fn packet(proto: u8, from: &str, to: &str, flags: u8, data: &[u8]) -> Vec<u8> {
    match proto {
        TCP => tcp(from, to, flags, data),
        _ => udp(from, to, data),
    }
}

fn node() -> Option<Programs> {
    let mut programs = Programs::new()?;
    for family in &FAMILIES {
        programs.add_pod(7, OWN_IFINDEX, POD, &[family.pod]);
        programs.add_pod(8, 2, OTHER, &[family.other]);
    }
    Some(programs)
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

fn shown(frame: &[u8]) -> (String, String) {
    let (from, to) = ends(frame);
    (from.to_string(), to.to_string())
}

#[test]
fn a_packet_to_a_frontend_goes_to_a_backend_and_its_answer_comes_from_the_frontend() {
    for_each(|node, family, proto| {
        let (client, frontend) = (at(family.pod, 4000), at(family.frontend, 80));
        let backend = at(family.remote, 8080);
        node.serve(&frontend, proto, 10, &[&backend]);
        for (flags, data) in [(SYN, &b""[..]), (ACK, b"GET /"), (ACK, b"odd")] {
            let sent = frame(
                POD,
                GATEWAY,
                &packet(proto, &client, &frontend, flags, data),
            );
            let outcome = node.run("from_pod", &sent);
            assert_eq!(outcome.verdict, PASS, "on to the gateway: {outcome:?}");
            assert_eq!(shown(&outcome.frame), (client.clone(), backend.clone()));
            assert_checksums(&outcome.frame);
            assert_eq!(outcome.frame[..12], sent[..12], "the gateway routes it");
        }
        assert_eq!(node.flows().len(), 2, "one flow");
        let answer = frame(GATEWAY, POD, &packet(proto, &backend, &client, ACK, b"200"));
        let outcome = node.run("to_pod", &answer);
        assert_eq!(outcome.verdict, PASS);
        assert_eq!(shown(&outcome.frame), (frontend, client));
        assert_checksums(&outcome.frame);
    });
}

#[test]
fn a_backend_on_the_same_node_gets_it_at_once() {
    for_each(|node, family, proto| {
        let (client, frontend) = (at(family.pod, 4000), at(family.frontend, 80));
        let backend = at(family.other, 8080);
        node.serve(&frontend, proto, 10, &[&backend]);
        let sent = frame(POD, GATEWAY, &packet(proto, &client, &frontend, SYN, b""));
        let outcome = node.run("from_pod", &sent);
        assert_eq!(outcome.verdict, REDIRECT, "{outcome:?}");
        assert_eq!(shown(&outcome.frame), (client, backend));
        assert_eq!(
            outcome.frame[..6],
            OTHER,
            "addressed to the pod's own interface"
        );
        assert_checksums(&outcome.frame);
    });
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    for_each(|node, family, proto| {
        let (client, frontend) = (at(family.pod, 4000), at(family.frontend, 80));
        let (own, hairpin) = (at(family.pod, 8080), at(family.hairpin, 4000));
        node.serve(&frontend, proto, 10, &[&own]);
        let sent = frame(POD, GATEWAY, &packet(proto, &client, &frontend, SYN, b"me"));
        let outcome = node.run("from_pod", &sent);
        assert_eq!(outcome.verdict, REDIRECT, "{outcome:?}");
        assert_eq!(shown(&outcome.frame), (hairpin.clone(), own.clone()));
        assert_eq!(outcome.frame[..6], POD);
        assert_checksums(&outcome.frame);
        let answer = frame(POD, GATEWAY, &packet(proto, &own, &hairpin, SYN | ACK, b""));
        let outcome = node.run("from_pod", &answer);
        assert_eq!(outcome.verdict, REDIRECT, "{outcome:?}");
        assert_eq!(shown(&outcome.frame), (frontend, client));
        assert_eq!(outcome.frame[..6], POD);
        assert_checksums(&outcome.frame);
    });
}

#[test]
fn a_frontend_without_backends_is_refused_at_once() {
    for_each(|node, family, proto| {
        let (client, frontend) = (at(family.pod, 4000), at(family.frontend, 80));
        node.serve(&frontend, proto, 10, &[]);
        let data = [0x55; 301];
        let sent = frame(POD, GATEWAY, &packet(proto, &client, &frontend, SYN, &data));
        let outcome = node.run("from_pod", &sent);
        assert_eq!(outcome.verdict, REDIRECT, "back into the pod: {outcome:?}");
        assert_eq!(outcome.dropped, Some("no_backend"));
        assert_checksums(&outcome.frame);
        assert_eq!(outcome.frame[..6], POD);
        let header = 14 + if family.pod.contains(':') { 40 } else { 20 };
        if proto == TCP {
            assert_eq!(shown(&outcome.frame), (frontend, client));
            let segment = &outcome.frame[header..];
            assert_eq!((segment.len(), segment[13]), (20, RST | ACK));
            // The sequence number of the SYN and one.
            assert_eq!(segment[8..12], 1001_u32.to_be_bytes());
        } else {
            let (from, to) = ends(&outcome.frame);
            assert_eq!(
                (from.ip().to_string(), to.ip().to_string()),
                (family.frontend.to_owned(), family.pod.to_owned())
            );
            let message = &outcome.frame[header..];
            let port_unreachable = if header == 34 { [3, 3] } else { [1, 4] };
            assert_eq!(message[..2], port_unreachable);
            let (from, to) = quoted_ends(&outcome.frame);
            assert_eq!((from.to_string(), to.to_string()), (client, frontend));
        }
        assert!(node.flows().is_empty());
    });
}

#[test]
fn a_reset_to_a_frontend_without_backends_gets_no_answer() {
    let Some(mut node) = node() else { return };
    node.serve("10.96.0.1:80", TCP, 10, &[]);
    let reset = frame(
        POD,
        GATEWAY,
        &tcp("10.244.0.2:4000", "10.96.0.1:80", RST, b""),
    );
    let outcome = node.run("from_pod", &reset);
    assert_eq!(
        (outcome.verdict, outcome.dropped),
        (SHOT, Some("no_backend"))
    );
    // What belongs to a connection is reset where its sender stands.
    let data = frame(
        POD,
        GATEWAY,
        &tcp("10.244.0.2:4000", "10.96.0.1:80", ACK, b"x"),
    );
    let outcome = node.run("from_pod", &data);
    assert_eq!(outcome.verdict, REDIRECT);
    assert_eq!(outcome.frame[34 + 13], RST);
    assert_eq!(outcome.frame[34 + 4..34 + 8], 2000_u32.to_be_bytes());
    assert_checksums(&outcome.frame);
}

/// Type and code of errors by family: port unreachable, time exceeded, too big.
const ERRORS: [[[u8; 2]; 3]; 2] = [[[3, 3], [11, 0], [3, 4]], [[1, 4], [3, 0], [2, 0]]];

#[test]
fn an_icmp_error_is_about_what_its_receiver_has_sent() {
    for_each(|node, family, proto| {
        let (client, frontend) = (at(family.pod, 4000), at(family.frontend, 80));
        let backend = at(family.remote, 8080);
        node.serve(&frontend, proto, 10, &[&backend]);
        let sent = packet(proto, &client, &frontend, SYN, b"question");
        let outcome = node.run("from_pod", &frame(POD, GATEWAY, &sent));
        let translated = &outcome.frame[14..];
        let is_v6 = family.pod.contains(':');
        for head in ERRORS[usize::from(is_v6)] {
            for (speaker, becomes) in [
                (family.remote, family.frontend),
                (family.router, family.router),
            ] {
                let error = icmp(
                    speaker,
                    family.pod,
                    head,
                    [0, 0, 5, 0],
                    &translated[..48.min(translated.len())],
                );
                let outcome = node.run("to_pod", &frame(GATEWAY, POD, &error));
                assert_eq!(outcome.verdict, PASS);
                assert_checksums(&outcome.frame);
                let (from, to) = ends(&outcome.frame);
                assert_eq!(from.ip().to_string(), becomes, "{head:?}");
                assert_eq!(to.ip().to_string(), family.pod);
                let (from, to) = quoted_ends(&outcome.frame);
                assert_eq!(
                    (from.to_string(), to.to_string()),
                    (client.clone(), frontend.clone())
                );
            }
        }
        // The pod's own error about an answer goes to the backend.
        let answer = packet(proto, &backend, &client, ACK, b"answer");
        let outcome = node.run("to_pod", &frame(GATEWAY, POD, &answer));
        let seen = &outcome.frame[14..];
        let head = ERRORS[usize::from(is_v6)][0];
        let error = icmp(
            family.pod,
            family.frontend,
            head,
            [0; 4],
            &seen[..48.min(seen.len())],
        );
        let outcome = node.run("from_pod", &frame(POD, GATEWAY, &error));
        assert_eq!(outcome.verdict, PASS, "{outcome:?}");
        assert_checksums(&outcome.frame);
        let (from, to) = ends(&outcome.frame);
        assert_eq!(from.ip().to_string(), family.pod);
        assert_eq!(to.ip().to_string(), family.remote);
        let (from, to) = quoted_ends(&outcome.frame);
        assert_eq!((from.to_string(), to.to_string()), (backend, client));
    });
}

#[test]
fn two_services_and_one_source_port_do_not_become_one_flow() {
    for_each(|node, family, proto| {
        let client = at(family.pod, 4000);
        let (first, second) = (at(family.frontend, 80), at(family.second, 80));
        let backend = at(family.remote, 8080);
        node.serve(&first, proto, 10, &[&backend]);
        node.serve(&second, proto, 20, &[&backend]);
        let mut sources = Vec::new();
        for frontend in [&first, &second, &first, &second] {
            let sent = packet(proto, &client, frontend, ACK, b"");
            let outcome = node.run("from_pod", &frame(POD, GATEWAY, &sent));
            let (from, to) = shown(&outcome.frame);
            assert_eq!(to, backend);
            assert_checksums(&outcome.frame);
            // Its answer comes from the right Service, to the port that the client knows.
            let answer = packet(proto, &backend, &from, ACK, b"");
            let outcome = node.run("to_pod", &frame(GATEWAY, POD, &answer));
            assert_eq!(shown(&outcome.frame), (frontend.clone(), client.clone()));
            assert_checksums(&outcome.frame);
            sources.push(from);
        }
        assert_eq!(sources[0], client);
        assert_ne!(sources[0], sources[1]);
        assert_eq!(sources[..2], sources[2..]);
    });
}

#[test]
fn what_begins_anew_leaves_a_retired_backend_and_what_is_connected_stays() {
    for_each(|node, family, proto| {
        let (client, frontend) = (at(family.pod, 4000), at(family.frontend, 80));
        let (old, new) = (at(family.remote, 8080), at(family.router, 8080));
        node.serve(&frontend, proto, 10, &[&old]);
        let goes_to = |node: &mut Programs, flags| {
            let sent = packet(proto, &client, &frontend, flags, b"");
            shown(&node.run("from_pod", &frame(POD, GATEWAY, &sent)).frame).1
        };
        assert_eq!(goes_to(node, SYN), old);
        node.retire(10);
        node.serve(&frontend, proto, 20, &[&new]);
        if proto == TCP {
            assert_eq!(goes_to(node, ACK), old, "an open connection goes on");
            assert_eq!(goes_to(node, SYN), new);
        }
        assert_eq!(goes_to(node, ACK), new);
    });
}

#[test]
fn a_flow_is_forgotten_when_its_state_allows() {
    let Some(mut node) = node() else { return };
    let (client, frontend, backend) = ("10.244.0.2:4000", "10.96.0.1:80", "10.244.1.9:8080");
    for proto in [TCP, UDP] {
        node.serve(frontend, proto, 10 * u32::from(proto), &[backend]);
    }
    // An answer to what is forgotten is not translated.
    let lives = |node: &mut Programs, proto, flags| {
        let answer = frame(GATEWAY, POD, &packet(proto, backend, client, flags, b""));
        shown(&node.run("to_pod", &answer).frame).0 == frontend
    };
    let send = |node: &mut Programs, proto, flags| {
        let sent = frame(POD, GATEWAY, &packet(proto, client, frontend, flags, b""));
        assert_eq!(shown(&node.run("from_pod", &sent).frame).1, backend);
    };
    send(&mut node, TCP, SYN);
    node.age_flows(TCP_OPENING_TICKS + 2);
    assert!(!lives(&mut node, TCP, SYN | ACK), "nobody answered the SYN");
    send(&mut node, TCP, SYN);
    assert!(lives(&mut node, TCP, SYN | ACK));
    node.age_flows(u32::MAX);
    assert!(
        lives(&mut node, TCP, ACK),
        "last seen by a CPU whose clock is a tick ahead"
    );
    node.age_flows(TCP_ESTABLISHED_TICKS - 2);
    send(&mut node, TCP, ACK);
    node.age_flows(TCP_OPENING_TICKS + 2);
    assert!(lives(&mut node, TCP, ACK), "one side keeps both entries");
    send(&mut node, TCP, ACK | FIN);
    assert!(lives(&mut node, TCP, ACK), "the other side may go on");
    node.age_flows(TCP_CLOSING_TICKS + 2);
    assert!(!lives(&mut node, TCP, ACK));
    send(&mut node, UDP, 0);
    assert!(lives(&mut node, UDP, 0));
    node.age_flows(OTHER_ESTABLISHED_TICKS + 2);
    assert!(!lives(&mut node, UDP, 0));
}

#[test]
fn a_new_connection_from_the_port_of_a_closed_one_begins_anew() {
    let Some(mut node) = node() else { return };
    let (client, frontend) = ("10.244.0.2:4000", "10.96.0.1:80");
    node.serve(frontend, TCP, 10, &["10.244.1.9:8080"]);
    let goes_to = |node: &mut Programs, flags| {
        let sent = frame(POD, GATEWAY, &tcp(client, frontend, flags, b""));
        shown(&node.run("from_pod", &sent).frame).1
    };
    goes_to(&mut node, SYN);
    goes_to(&mut node, ACK | RST);
    node.serve(frontend, TCP, 20, &["10.244.1.10:8080"]);
    assert_eq!(goes_to(&mut node, SYN), "10.244.1.10:8080");
}

#[test]
fn node_ports_and_affinity_work_as_at_sockets() {
    for_each(|node, family, proto| {
        let any = if family.pod.contains(':') {
            "::"
        } else {
            "0.0.0.0"
        };
        let (port, backend) = (at(any, 30_080), at(family.remote, 8080));
        node.serve_node_port(family.router, &port, proto, 10, &backend);
        let client = at(family.pod, 4000);
        let sent = packet(proto, &client, &at(family.router, 30_080), SYN, b"");
        let outcome = node.run("from_pod", &frame(POD, GATEWAY, &sent));
        assert_eq!(shown(&outcome.frame), (client.clone(), backend));
        let elsewhere = packet(proto, &client, &at(family.remote, 30_080), SYN, b"");
        let outcome = node.run("from_pod", &frame(POD, GATEWAY, &elsewhere));
        assert_eq!(
            shown(&outcome.frame).1,
            at(family.remote, 30_080),
            "no node"
        );

        let backends: Vec<String> = (1..=4).map(|port| at(family.remote, 9000 + port)).collect();
        let backends: Vec<&str> = backends.iter().map(String::as_str).collect();
        let frontend = at(family.frontend, 80);
        let reached = |node: &mut Programs| -> std::collections::BTreeSet<String> {
            let from = |port| packet(proto, &at(family.pod, port), &frontend, SYN, b"");
            let sent = (5000..5040).map(|port| frame(POD, GATEWAY, &from(port)));
            sent.map(|sent| shown(&node.run("from_pod", &sent).frame).1)
                .collect()
        };
        node.serve_as(&frontend, proto, SCOPE_ADDRESS, 20, 600, &backends);
        assert_eq!(reached(node).len(), 1, "one client, one backend");
        // Without affinity, and by other ports: all of them, but for 1 in 100,000 runs.
        node.age_flows(TCP_ESTABLISHED_TICKS + 2);
        node.serve(&frontend, proto, 30, &backends);
        assert_eq!(reached(node).len(), 4);
    });
}

#[test]
fn fragments_and_other_protocols_are_left_alone() {
    let Some(mut node) = node() else { return };
    node.serve("10.96.0.1:80", UDP, 10, &["10.244.1.9:8080"]);
    let (from, to) = ("10.244.0.2".parse().unwrap(), "10.96.0.1".parse().unwrap());
    let datagram = &udp("10.244.0.2:4000", "10.96.0.1:80", &[0; 64])[20..];
    let frames = [
        v4(from, to, UDP, [0x20, 0], &[], datagram),
        v4(from, to, UDP, [0, 9], &[], datagram),
        v4(from, to, 132, [0x40, 0], &[], datagram),
        icmp("10.244.0.2", "10.96.0.1", [8, 0], [0, 1, 0, 1], b"ping"),
    ];
    for packet in frames {
        let sent = frame(POD, GATEWAY, &packet);
        let outcome = node.run("from_pod", &sent);
        assert_eq!((outcome.verdict, &outcome.frame), (PASS, &sent));
    }
}

/// `cargo test --workspace --lib measure_packets -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn measure_packets() {
    let Some(mut node) = node() else { return };
    let to = |address: &str| frame(POD, OTHER, &tcp("10.244.0.2:4000", address, ACK, &[0; 64]));
    let measure = |node: &mut Programs, what: &str, program, frame: &[u8]| {
        eprintln!("{what}: {} ns", node.time(program, frame));
    };
    measure(
        &mut node,
        "to a pod of the node",
        "from_pod",
        &to("10.244.0.3:80"),
    );
    measure(
        &mut node,
        "to anywhere else",
        "from_pod",
        &to("198.51.100.7:80"),
    );
    let from = frame(
        GATEWAY,
        POD,
        &tcp("198.51.100.7:80", "10.244.0.2:4000", ACK, &[0; 64]),
    );
    measure(&mut node, "into a pod", "to_pod", &from);
    // The backend has the frontend's address, so that every run finds a flow to rewrite.
    node.serve("10.96.0.1:80", TCP, 10, &["10.96.0.1:80"]);
    let service = frame(
        POD,
        GATEWAY,
        &tcp("10.244.0.2:4000", "10.96.0.1:80", ACK, &[0; 64]),
    );
    measure(
        &mut node,
        "of a known flow to a Service",
        "from_pod",
        &service,
    );
    measure(
        &mut node,
        "to anywhere else, with flows about",
        "from_pod",
        &to("198.51.100.7:80"),
    );
    measure(
        &mut node,
        "to a pod of the node, with flows about",
        "from_pod",
        &to("10.244.0.3:80"),
    );
}
