//! What the programs tell of flows: single frames first, then sockets and the agent's own watch.

use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use ebpf_maps::drop;
use ebpf_maps::event::{
    AT_INGRESS, BUDGET, BUDGET_DROPPED, BUDGET_PASSED, FlowEvent, IS_TRANSLATED, NO_IP,
    NOT_DROPPED, POINT_CONNECT, POINT_SEND,
};
use ebpf_maps::policy::{POLICY_CLOSED, POLICY_OPEN};
use tokio::time::timeout;

use super::bed::{Bed, backend, block_on, service, view};
use super::frames::{ACK, Mac, SYN, TCP, UDP, arp, frame, icmp, tcp, udp};
use super::maps::Maps;
use super::programs::{OWN_IFINDEX, Programs};
use crate::dataplane::{Dataplane, FlowNews, monotonic_ns, netns_cookie};
use crate::services::index::ip_of;

const POD: Mac = [0x0a, 0x58, 10, 244, 0, 2];
const OTHER: Mac = [0x0a, 0x58, 10, 244, 0, 3];
const GATEWAY: Mac = [0x0a, 0x58, 10, 244, 0, 1];
/// Where what reaches the pod came from.
const ELSEWHERE: u32 = 2;
/// Somebody watches for as long as any test.
const WATCHED: u64 = u64::MAX;

/// A pod under test, another one, a Service with a backend elsewhere and one without any.
fn node() -> Option<Programs> {
    let mut programs = Programs::new()?;
    programs.add_pod(7, OWN_IFINDEX, POD, &["10.244.0.2", "fd00:244::2"]);
    programs.add_pod(8, 2, OTHER, &["10.244.0.3", "fd00:244::3"]);
    for (proto, base) in [(TCP, 10), (UDP, 20)] {
        programs.serve("10.96.0.1:80", proto, base, &["10.244.1.9:8080"]);
        programs.serve(
            "[fd00:96::1]:80",
            proto,
            base + 4,
            &["[fd00:244:1::9]:8080"],
        );
        programs.serve("10.96.0.2:80", proto, base + 100, &[]);
    }
    Some(programs)
}

/// An event in words: `point reason flags source > destination [frontend]`.
pub(super) fn shown(event: &FlowEvent) -> String {
    let end = |addr, port: u16| format!("{}|{}", ip_of(addr), u16::from_be(port));
    let reason = match event.reason {
        NOT_DROPPED => "passes",
        reason => drop::DROP_NAMES[usize::from(reason)],
    };
    let mut text = format!("{} {reason} ", event.point);
    if event.flags & NO_IP != 0 {
        return format!("{text}no IP");
    }
    if event.flags & AT_INGRESS != 0 {
        text.push_str("ingress ");
    }
    text.push_str(&end(&event.source, event.source_port_be));
    text.push('>');
    text.push_str(&end(&event.destination, event.destination_port_be));
    if event.flags & IS_TRANSLATED != 0 {
        let frontend = end(&event.frontend, event.frontend_port_be);
        text.push_str(&format!(" for {frontend}"));
    }
    text
}

fn told(programs: &mut Programs) -> Vec<String> {
    programs.events().iter().map(shown).collect()
}

#[test]
fn nothing_is_told_noted_or_counted_while_nobody_watches() {
    let Some(mut programs) = node() else { return };
    programs.set_policies(8, POLICY_CLOSED, POLICY_OPEN);
    let (client, other) = ("10.244.0.2:4000", "10.244.0.3:80");
    let frames = [
        frame(POD, GATEWAY, &tcp(client, "10.96.0.1:80", SYN, b"")),
        frame(POD, GATEWAY, &udp(client, "10.96.0.1:80", b"a")),
        frame(POD, OTHER, &tcp(client, other, SYN, b"")),
        frame(POD, GATEWAY, &tcp("192.0.2.1:1", other, SYN, b"")),
    ];
    // 1: the time until which somebody watched is long ago.
    for until in [0, 1] {
        programs.watch(until);
        for frame in &frames {
            programs.run("from_pod", frame);
        }
        assert_eq!(told(&mut programs), [""; 0]);
        for kind in [BUDGET_PASSED, BUDGET_DROPPED] {
            assert_eq!(programs.budget(kind), (0, 0));
        }
    }
    programs.watch(0);
    assert_eq!(
        programs.hash::<u64, u64>("SEEN").keys().count(),
        2,
        "of the old watch"
    );
}

#[test]
fn the_first_packet_of_a_flow_is_told() {
    let client = "10.244.0.2:4000";
    let cases: Vec<(&str, &str, u32, Vec<u8>, &str)> = vec![
        (
            "a connection to another node's pod",
            "from_pod",
            0,
            frame(POD, GATEWAY, &tcp(client, "10.244.1.9:80", SYN, b"")),
            "2 passes 10.244.0.2|4000>10.244.1.9|80",
        ),
        (
            "a datagram by IPv6 to a pod of this node",
            "from_pod",
            0,
            frame(POD, OTHER, &udp("[fd00:244::2]:1", "[fd00:244::3]:53", b"")),
            "2 passes fd00:244::2|1>fd00:244::3|53",
        ),
        (
            "an echo request, with its identifier",
            "from_pod",
            0,
            frame(
                POD,
                GATEWAY,
                &icmp("10.244.0.2", "192.0.2.9", [8, 0], [0, 5, 0, 1], b"ping"),
            ),
            "2 passes 10.244.0.2|5>192.0.2.9|5",
        ),
        (
            "a packet to a Service, with its backend",
            "from_pod",
            0,
            frame(POD, GATEWAY, &tcp(client, "10.96.0.1:80", SYN, b"")),
            "2 passes 10.244.0.2|4000>10.244.1.9|8080 for 10.96.0.1|80",
        ),
        (
            "and by IPv6",
            "from_pod",
            0,
            frame(
                POD,
                GATEWAY,
                &udp("[fd00:244::2]:1", "[fd00:96::1]:80", b"a"),
            ),
            "2 passes fd00:244::2|1>fd00:244:1::9|8080 for fd00:96::1|80",
        ),
        (
            "a Service without backends refuses",
            "from_pod",
            0,
            frame(POD, GATEWAY, &tcp(client, "10.96.0.2:80", SYN, b"")),
            "2 no_backend 10.244.0.2|4000>10.96.0.2|80",
        ),
        (
            "somebody else's address is dropped, and shown",
            "from_pod",
            0,
            frame(POD, GATEWAY, &tcp("192.0.2.1:1", "192.0.2.9:80", SYN, b"")),
            "2 source_address 192.0.2.1|1>192.0.2.9|80",
        ),
        (
            "ARP for somebody else has no ends",
            "from_pod",
            0,
            frame(
                POD,
                GATEWAY,
                &arp(2, (POD, "10.244.0.1"), (GATEWAY, "10.244.0.1")),
            ),
            "2 neighbour no IP",
        ),
        (
            "what comes to the pod by the node's network",
            "to_pod",
            ELSEWHERE,
            frame(
                GATEWAY,
                POD,
                &tcp("10.244.1.9:1", "10.244.0.2:80", SYN, b""),
            ),
            "3 passes 10.244.1.9|1>10.244.0.2|80",
        ),
    ];
    for (sentence, program, from, packet, expected) in cases {
        let Some(mut programs) = node() else { return };
        programs.watch(WATCHED);
        programs.run_from(program, &packet, from);
        let events = programs.events();
        let words: Vec<String> = events.iter().map(shown).collect();
        assert_eq!(words, [expected], "{sentence}");
        assert_eq!(
            (events[0].ifindex, events[0].netns_cookie),
            (OWN_IFINDEX, 0),
            "{sentence}"
        );
        let age = monotonic_ns() - events[0].time_ns;
        assert!(age < 10_000_000_000, "{sentence}: {age}");
    }
}

#[test]
fn the_rest_of_a_flow_its_answers_and_the_links_own_talk_are_not_told() {
    let Some(mut programs) = node() else { return };
    programs.watch(WATCHED);
    let (client, other) = ("10.244.0.2:4000", "10.244.0.3:53");
    let far = "10.244.1.9:8080";
    let run = |programs: &mut Programs, program: &str, packet: Vec<u8>| {
        programs.run_from(program, &packet, ELSEWHERE);
        told(programs).len()
    };
    let query = || frame(POD, OTHER, &udp(client, other, b"query"));
    assert_eq!(run(&mut programs, "from_pod", query()), 1);
    assert_eq!(run(&mut programs, "from_pod", query()), 0, "again");
    let answer = frame(OTHER, POD, &udp(other, client, b"answer"));
    assert_eq!(run(&mut programs, "to_pod", answer), 0, "the answer");
    // The answers of a Service come from its backend.
    let query = frame(POD, GATEWAY, &udp(client, "10.96.0.1:80", b"query"));
    assert_eq!(run(&mut programs, "from_pod", query), 1);
    let answer = frame(GATEWAY, POD, &udp(far, client, b"answer"));
    assert_eq!(
        run(&mut programs, "to_pod", answer),
        0,
        "from the frontend again"
    );
    for (sentence, flags) in [("established", ACK), ("the answer", SYN | ACK)] {
        let packet = frame(POD, OTHER, &tcp(client, other, flags, b""));
        assert_eq!(run(&mut programs, "from_pod", packet), 0, "{sentence}");
    }
    let target = "fd00:244::2"
        .parse::<std::net::Ipv6Addr>()
        .unwrap()
        .octets();
    let discovery = icmp("fd00:244::2", "ff02::1", [136, 0], [0; 4], &target);
    let packet = frame(POD, GATEWAY, &discovery);
    assert_eq!(run(&mut programs, "from_pod", packet), 0, "discovery");
    // A SYN is a new connection each time.
    for _ in 0..2 {
        let packet = frame(POD, OTHER, &tcp(client, other, SYN, b""));
        assert_eq!(run(&mut programs, "from_pod", packet), 1);
    }
}

#[test]
fn a_policys_refusal_says_which_direction() {
    let Some(mut programs) = node() else { return };
    programs.watch(WATCHED);
    let packet = frame(POD, OTHER, &tcp("10.244.0.2:1", "10.244.0.3:80", SYN, b""));
    for (own, other, expected) in [
        (
            POLICY_CLOSED,
            POLICY_OPEN,
            "2 policy 10.244.0.2|1>10.244.0.3|80",
        ),
        (
            POLICY_OPEN,
            POLICY_CLOSED,
            "2 policy ingress 10.244.0.2|1>10.244.0.3|80",
        ),
        (
            POLICY_CLOSED,
            POLICY_CLOSED,
            "2 policy 10.244.0.2|1>10.244.0.3|80",
        ),
    ] {
        programs.set_policies(7, POLICY_OPEN, own);
        programs.set_policies(8, other, POLICY_OPEN);
        for _ in 0..2 {
            // By its interface: what the node itself has made may go anywhere.
            programs.run_from("from_pod", &packet, OWN_IFINDEX);
            assert_eq!(told(&mut programs), [expected], "each time");
        }
    }
}

#[test]
fn of_what_comes_from_outside_only_services_are_told() {
    let Some(mut programs) = node() else { return };
    programs.watch(WATCHED);
    let ssh = frame(GATEWAY, POD, &tcp("192.0.2.9:1", "192.0.2.1:22", SYN, b""));
    programs.run("from_netdev", &ssh);
    assert_eq!(told(&mut programs), [""; 0]);
}

#[test]
fn under_load_a_budget_is_told_and_the_rest_counted() {
    let Some(mut programs) = node() else { return };
    programs.watch(WATCHED);
    let wanted = BUDGET * 4;
    let flood = |programs: &mut Programs, to: &str, first: u64| {
        for i in 0..wanted {
            let from = format!("10.244.0.2:{}", first + i);
            programs.run("from_pod", &frame(POD, OTHER, &tcp(&from, to, SYN, b"")));
        }
        programs.events().len() as u64
    };
    let cpus = std::thread::available_parallelism().unwrap().get() as u64;
    let shown = flood(&mut programs, "10.244.0.3:80", 1_000);
    let (_, missed) = programs.budget(BUDGET_PASSED);
    assert_eq!(shown + missed, wanted, "each is told or counted");
    if missed == 0 {
        assert!(
            cpus > 3,
            "{shown} are more than {cpus} CPUs may tell at once"
        );
    }
    // Drops have a budget of their own: the flood has not hidden them.
    programs.set_policies(7, POLICY_OPEN, POLICY_CLOSED);
    let one = frame(POD, OTHER, &tcp("10.244.0.2:9", "10.244.0.3:80", SYN, b""));
    programs.run("from_pod", &one);
    assert_eq!(told(&mut programs).len(), 1);
}

/// The price of watching, and of not watching; printed, because machines differ.
#[test]
fn an_established_connection_costs_no_more_while_it_is_watched() {
    let Some(mut programs) = node() else { return };
    let packet = frame(POD, OTHER, &tcp("10.244.0.2:1", "10.244.0.3:80", ACK, b"x"));
    let best = |programs: &mut Programs| {
        let times = (0..5).map(|_| programs.time("from_pod", &packet));
        times.min().unwrap()
    };
    let unwatched = best(&mut programs);
    programs.watch(WATCHED);
    let watched = best(&mut programs);
    eprintln!("from_pod: {unwatched} ns, watched {watched} ns");
    // Not a measurement: only that nothing is told of such packets, which would cost many times as much.
    assert!(watched < 2 * unwatched + 200, "{watched} {unwatched}");
    assert_eq!(told(&mut programs).len(), 0);
}

#[test]
fn sockets_tell_where_a_service_sent_them() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let web = service("10.96.0.1", 6, 80, &[backend("127.0.0.2", 8080)]);
    let dns = service("10.96.0.10", 17, 53, &[backend("127.0.0.2", 5353)]);
    let none = service("10.96.0.3", 6, 80, &[]);
    let services = vec![("web", web), ("dns", dns), ("none", none)];
    block_on(dataplane.apply(&view(1, services))).unwrap();
    let next = async |news: &mut tokio::sync::broadcast::Receiver<FlowNews>| match timeout(
        Duration::from_secs(5),
        news.recv(),
    )
    .await
    {
        Ok(Ok(FlowNews::Event(event))) => event,
        other => panic!("{other:?}"),
    };
    let call = || {
        bed.inside(|| {
            let _server = TcpListener::bind("127.0.0.2:8080").unwrap();
            TcpStream::connect("10.96.0.1:80").unwrap();
            TcpStream::connect("10.96.0.3:80").unwrap_err();
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            for _ in 0..3 {
                socket.send_to(b"a", "10.96.0.10:53").unwrap();
            }
            netns_cookie().unwrap()
        })
    };
    block_on(async {
        let mut watch = dataplane.watch_flows().unwrap();
        assert_eq!(watch.recent, []);
        let cookie = call();
        let mut words = Vec::new();
        for _ in 0..3 {
            let event = next(&mut watch.news).await;
            assert_eq!(event.netns_cookie, cookie);
            words.push((event.point, shown(&event)));
        }
        let expected = [
            (
                POINT_CONNECT,
                "0 passes ::|0>127.0.0.2|8080 for 10.96.0.1|80",
            ),
            (
                POINT_CONNECT,
                "0 no_backend ::|0>10.96.0.3|80 for 10.96.0.3|80",
            ),
            (POINT_SEND, "1 passes ::|0>127.0.0.2|5353 for 10.96.0.10|53"),
        ];
        assert_eq!(
            words,
            expected.map(|(point, text)| (point, text.to_owned()))
        );
        // Who comes later learns what was.
        assert_eq!(dataplane.watch_flows().unwrap().recent.len(), 3);
        drop(watch);
        // Nobody watches: after the task has seen it, there is nothing to be read.
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        call();
        let mut watch = dataplane.watch_flows().unwrap();
        assert_eq!(watch.recent, []);
        let late = timeout(Duration::from_millis(300), watch.news.recv()).await;
        assert!(late.is_err(), "{late:?}");
        call();
        next(&mut watch.news).await;
    });
}
