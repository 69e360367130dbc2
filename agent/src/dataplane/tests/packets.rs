//! What the packet programs do to single frames. Each case is a sentence.

use std::net::{IpAddr, Ipv6Addr};

use super::frames::{ACK, Mac, RST, SYN, TCP, UDP, arp, frame, framed, icmp, tcp, udp, v4, v6};
use super::programs::{OWN_IFINDEX, PASS, Programs, REDIRECT, SHOT};

const POD: Mac = [0x0a, 0x58, 10, 244, 0, 2];
const OTHER: Mac = [0x0a, 0x58, 10, 244, 0, 3];
const GATEWAY: Mac = [0x0a, 0x58, 10, 244, 0, 1];
const ALL: Mac = [0xff; 6];
/// The pod's link-local address, by its hardware address.
const LINK_LOCAL: &str = "fe80::858:aff:fef4:2";

/// The most that the verifier may have to walk: a tenth of its own limit. Starts of the agent wait for it.
const VERIFIED_MAX: u32 = 100_000;

/// A pod under test with an address of each family, and another one beside it.
fn node() -> Option<Programs> {
    let mut programs = Programs::new()?;
    programs.add_pod(7, OWN_IFINDEX, POD, &["10.244.0.2", "fd00:244::2"]);
    programs.add_pod(8, 2, OTHER, &["10.244.0.3", "fd00:244::3"]);
    Some(programs)
}

fn ip6(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

/// Neighbour discovery about `target`, without options.
fn discovery(source: &str, destination: &str, kind: u8, target: &str) -> Vec<u8> {
    let target = ip6(target).octets();
    icmp(source, destination, [kind, 0], [0; 4], &target)
}

/// A hop-by-hop header with a router alert, as multicast listener reports have.
fn behind_router_alert(packet: &[u8]) -> Vec<u8> {
    let (head, rest) = packet.split_at(40);
    let source = Ipv6Addr::from(<[u8; 16]>::try_from(&head[8..24]).unwrap());
    let destination = Ipv6Addr::from(<[u8; 16]>::try_from(&head[24..40]).unwrap());
    let extended = [&[head[6], 0, 5, 2, 0, 0, 1, 0], rest].concat();
    v6(source, destination, 0, &extended)
}

#[test]
fn every_program_is_far_from_the_verifiers_limit() {
    let Some(mut programs) = Programs::new() else {
        return;
    };
    let verified = programs.verified();
    assert!(!verified.is_empty());
    for (name, count) in verified {
        eprintln!("{name}: {count} instructions verified");
        assert!((1..=VERIFIED_MAX).contains(&count), "{name}: {count}");
    }
}

#[test]
fn a_pod_speaks_for_itself_only() {
    let Some(mut programs) = node() else { return };
    let v4_fragment = |source: &str, fragment: [u8; 2]| {
        let (source, to) = (source.parse().unwrap(), "10.244.0.3".parse().unwrap());
        v4(source, to, UDP, fragment, &[], &[0; 32])
    };
    let cases: Vec<(&str, Option<&str>, Vec<u8>)> = vec![
        (
            "its own IPv4 address may send TCP",
            None,
            frame(
                POD,
                OTHER,
                &tcp("10.244.0.2:4000", "10.244.0.3:80", SYN, b""),
            ),
        ),
        (
            "its own IPv6 address may send UDP",
            None,
            frame(
                POD,
                OTHER,
                &udp("[fd00:244::2]:4000", "[fd00:244::3]:53", b"query"),
            ),
        ),
        (
            "its own address may ping a node beyond the gateway",
            None,
            frame(
                POD,
                GATEWAY,
                &icmp("10.244.0.2", "192.0.2.9", [8, 0], [0, 1, 0, 1], b"ping"),
            ),
        ),
        (
            "the other pod's address is not its own",
            Some("source_address"),
            frame(
                POD,
                OTHER,
                &tcp("10.244.0.3:4000", "10.244.0.3:80", SYN, b""),
            ),
        ),
        (
            "nor is the other pod's IPv6 address",
            Some("source_address"),
            frame(
                POD,
                OTHER,
                &udp("[fd00:244::3]:4000", "[fd00:244::3]:53", b""),
            ),
        ),
        (
            "nor an address of no pod",
            Some("source_address"),
            frame(POD, GATEWAY, &udp("198.51.100.1:1", "192.0.2.9:2", b"")),
        ),
        (
            "its own address from another hardware address is refused",
            Some("source_mac"),
            frame(OTHER, GATEWAY, &udp("10.244.0.2:1", "192.0.2.9:2", b"")),
        ),
        (
            "a fragment without ports from its own address passes",
            None,
            frame(POD, OTHER, &v4_fragment("10.244.0.2", [0, 4])),
        ),
        (
            "a fragment without ports from another address does not",
            Some("source_address"),
            frame(POD, OTHER, &v4_fragment("10.244.0.3", [0x20, 4])),
        ),
        ("its own packet with IPv4 options passes", None, {
            let (from, to) = ("10.244.0.2".parse().unwrap(), "10.244.0.3".parse().unwrap());
            let segment = &tcp("10.244.0.2:4000", "10.244.0.3:80", ACK | RST, b"")[20..];
            frame(POD, OTHER, &v4(from, to, TCP, [0x40, 0], &[1; 8], segment))
        }),
        (
            "a header shorter than itself is malformed",
            Some("malformed"),
            framed(POD, OTHER, [8, 0], &[0x44; 40]),
        ),
        (
            "more IPv6 extension headers than are followed are malformed",
            Some("malformed"),
            {
                let (from, to) = (ip6("fd00:244::2"), ip6("fd00:244::3"));
                let options = [60, 0, 1, 4, 0, 0, 0, 0].repeat(6);
                frame(POD, OTHER, &v6(from, to, 60, &options))
            },
        ),
        (
            "a frame of another protocol is refused",
            Some("link_protocol"),
            framed(POD, ALL, [0x88, 0xcc], &[0; 46]),
        ),
        (
            "so is a frame in a VLAN",
            Some("link_protocol"),
            framed(
                POD,
                ALL,
                [0x81, 0],
                &[0, 5, 8, 0, 0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0],
            ),
        ),
        (
            "a DHCP client may ask without an address",
            None,
            frame(
                POD,
                ALL,
                &udp("0.0.0.0:68", "255.255.255.255:67", &[1; 240]),
            ),
        ),
        (
            "nobody else may send without an address",
            Some("source_address"),
            frame(
                POD,
                ALL,
                &udp("0.0.0.0:69", "255.255.255.255:67", &[1; 240]),
            ),
        ),
    ];
    for (sentence, reason, frame) in cases {
        let outcome = programs.run("from_pod", &frame);
        assert_eq!(outcome.dropped, reason, "{sentence}: {outcome:?}");
        assert_eq!(outcome.verdict == SHOT, reason.is_some(), "{sentence}");
        assert_eq!(outcome.frame, frame, "{sentence}: nothing is changed");
    }
}

#[test]
fn a_pod_answers_for_its_own_addresses_only() {
    let Some(mut programs) = node() else { return };
    let zero: Mac = [0; 6];
    let cases: Vec<(&str, bool, Vec<u8>)> = vec![
        (
            "it may ask by ARP who has its neighbour's address",
            true,
            frame(POD, ALL, &arp(1, (POD, "10.244.0.2"), (zero, "10.244.0.3"))),
        ),
        (
            "it may answer for its own",
            true,
            frame(
                POD,
                OTHER,
                &arp(2, (POD, "10.244.0.2"), (OTHER, "10.244.0.3")),
            ),
        ),
        (
            "it may probe for its own before it uses it",
            true,
            frame(POD, ALL, &arp(1, (POD, "0.0.0.0"), (zero, "10.244.0.2"))),
        ),
        (
            "it may not answer for its neighbour",
            false,
            frame(
                POD,
                GATEWAY,
                &arp(2, (POD, "10.244.0.3"), (GATEWAY, "10.244.0.1")),
            ),
        ),
        (
            "nor for the gateway",
            false,
            frame(POD, ALL, &arp(2, (POD, "10.244.0.1"), (ALL, "10.244.0.1"))),
        ),
        (
            "nor for itself with another hardware address inside",
            false,
            frame(
                POD,
                ALL,
                &arp(2, (OTHER, "10.244.0.2"), (ALL, "10.244.0.2")),
            ),
        ),
        (
            "nor probe for an address of others",
            false,
            frame(POD, ALL, &arp(1, (POD, "0.0.0.0"), (zero, "10.244.0.3"))),
        ),
        (
            "ARP for another kind of address is none of a pod's business",
            false,
            framed(
                POD,
                ALL,
                [8, 6],
                &[[0, 6, 8, 0, 6, 4, 0, 1].as_slice(), &[0; 20]].concat(),
            ),
        ),
        (
            "it may solicit a neighbour from its own address",
            true,
            frame(
                POD,
                ALL,
                &discovery("fd00:244::2", "ff02::1:ff00:3", 135, "fd00:244::3"),
            ),
        ),
        (
            "and from its link-local one",
            true,
            frame(
                POD,
                ALL,
                &discovery(LINK_LOCAL, "ff02::1:ff00:3", 135, "fd00:244::3"),
            ),
        ),
        (
            "it may look for duplicates of its own address from nobody's",
            true,
            frame(
                POD,
                ALL,
                &discovery("::", "ff02::1:ff00:2", 135, "fd00:244::2"),
            ),
        ),
        (
            "and of its link-local one",
            true,
            frame(
                POD,
                ALL,
                &discovery("::", "ff02::1:fff4:2", 135, LINK_LOCAL),
            ),
        ),
        (
            "but not of an address of others",
            false,
            frame(
                POD,
                ALL,
                &discovery("::", "ff02::1:ff00:3", 135, "fd00:244::3"),
            ),
        ),
        (
            "it may advertise its own address",
            true,
            frame(
                POD,
                ALL,
                &discovery("fd00:244::2", "ff02::1", 136, "fd00:244::2"),
            ),
        ),
        (
            "and its link-local one",
            true,
            frame(POD, ALL, &discovery(LINK_LOCAL, "ff02::1", 136, LINK_LOCAL)),
        ),
        (
            "it may not advertise the gateway's",
            false,
            frame(
                POD,
                ALL,
                &discovery("fd00:244::2", "ff02::1", 136, "fd00:244::1"),
            ),
        ),
        (
            "not from its link-local address either",
            false,
            frame(
                POD,
                ALL,
                &discovery(LINK_LOCAL, "ff02::1", 136, "fd00:244::3"),
            ),
        ),
        (
            "it may ask for routers",
            true,
            frame(POD, ALL, &discovery(LINK_LOCAL, "ff02::2", 133, "::")),
        ),
        (
            "it may not be one",
            false,
            frame(POD, ALL, &discovery(LINK_LOCAL, "ff02::1", 134, "::")),
        ),
        (
            "not with its own address either",
            false,
            frame(POD, ALL, &discovery("fd00:244::2", "ff02::1", 134, "::")),
        ),
        (
            "nor redirect others",
            false,
            frame(
                POD,
                OTHER,
                &discovery("fd00:244::2", "fd00:244::3", 137, "fd00:244::2"),
            ),
        ),
        (
            "it may report multicast groups, behind a router alert",
            true,
            frame(
                POD,
                ALL,
                &behind_router_alert(&discovery(LINK_LOCAL, "ff02::16", 143, "::")),
            ),
        ),
        (
            "it may not be the querier",
            false,
            frame(
                POD,
                ALL,
                &behind_router_alert(&discovery(LINK_LOCAL, "ff02::1", 130, "::")),
            ),
        ),
    ];
    for (sentence, passes, frame) in cases {
        let outcome = programs.run("from_pod", &frame);
        let reason = (!passes).then_some("neighbour");
        assert_eq!(outcome.dropped, reason, "{sentence}: {outcome:?}");
        assert_eq!(outcome.verdict != SHOT, passes, "{sentence}");
    }
}

#[test]
fn a_link_local_address_is_for_discovery_alone() {
    let Some(mut programs) = node() else { return };
    let data = udp(&format!("[{LINK_LOCAL}]:5353"), "[ff02::fb]:5353", b"name");
    let echo = icmp(LINK_LOCAL, "ff02::1", [128, 0], [0; 4], b"");
    let foreign = discovery("fe80::1", "ff02::1:ff00:3", 135, "fd00:244::3");
    for packet in [data, echo, foreign] {
        let outcome = programs.run("from_pod", &frame(POD, ALL, &packet));
        assert_eq!(outcome.dropped, Some("source_address"), "{outcome:?}");
    }
}

#[test]
fn an_interface_of_no_pod_passes_nothing() {
    let Some(mut programs) = Programs::new() else {
        return;
    };
    let packet = frame(POD, OTHER, &udp("10.244.0.2:1", "10.244.0.3:2", b""));
    for program in ["from_pod", "to_pod"] {
        let outcome = programs.run(program, &packet);
        assert_eq!(outcome.dropped, Some("no_pod"), "{program}: {outcome:?}");
        assert_eq!(outcome.verdict, SHOT);
    }
}

#[test]
fn what_a_pod_is_sent_passes_but_for_what_nobody_can_judge() {
    let Some(mut programs) = node() else { return };
    let passing = [
        frame(
            OTHER,
            POD,
            &tcp("10.244.0.3:80", "10.244.0.2:4000", SYN | ACK, b""),
        ),
        frame(
            GATEWAY,
            POD,
            &udp("192.0.2.9:53", "10.244.0.2:4000", b"answer"),
        ),
        frame(
            GATEWAY,
            ALL,
            &arp(1, (GATEWAY, "10.244.0.1"), ([0; 6], "10.244.0.2")),
        ),
    ];
    for packet in passing {
        assert_eq!(programs.run("to_pod", &packet).verdict, PASS);
    }
    let options = [60, 0, 1, 4, 0, 0, 0, 0].repeat(6);
    let long = v6(ip6("fd00:244::3"), ip6("fd00:244::2"), 60, &options);
    let outcome = programs.run("to_pod", &frame(OTHER, POD, &long));
    assert_eq!(outcome.dropped, Some("malformed"));
}

/// Random bytes behind a valid or invalid head: a verdict, and never a change without one.
#[test]
fn no_frame_confuses_the_programs() {
    let Some(mut programs) = node() else { return };
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..3_000 {
        // The kernel itself refuses to run programs on less than an IP header.
        let mut frame: Vec<u8> = (0..54 + random() % 80).map(|_| random() as u8).collect();
        if round % 2 == 0 {
            frame[6..12].copy_from_slice(&POD);
        }
        let ethertype = [[8, 0], [0x86, 0xdd], [8, 6]][(random() % 3) as usize];
        frame[12..14].copy_from_slice(&ethertype);
        if round % 3 == 0 {
            frame[14] = if ethertype == [8, 0] { 0x45 } else { 0x60 };
            let own: IpAddr = "10.244.0.2".parse().unwrap();
            if let (IpAddr::V4(own), [8, 0]) = (own, ethertype) {
                frame[26..30].copy_from_slice(&own.octets());
            }
        }
        for program in ["from_pod", "to_pod"] {
            let outcome = programs.run(program, &frame);
            match outcome.verdict {
                PASS | REDIRECT => assert_eq!(outcome.frame, frame),
                SHOT => assert!(outcome.dropped.is_some(), "{frame:?}"),
                verdict => panic!("verdict {verdict} for {frame:?}"),
            }
        }
    }
}
