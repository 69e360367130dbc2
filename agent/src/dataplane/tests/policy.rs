//! What NetworkPolicies do to single frames. Each case is a sentence.
//!
//! The pod under test is 10.244.0.2, fd00:244::2; its policy's rules are written as the agent would.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use aya::maps::MapData;
use aya::maps::lpm_trie::{Key, LpmTrie};
use ebpf_maps::policy::{
    POLICY_CLOSED, POLICY_OPEN, RULE_BITS_ALL, RULE_BITS_PORT, RULE_BITS_PROTO, RuleKey,
};
use ebpf_maps::services::Addr;
use ipnet::IpNet;

use super::bed::{Bed, view};
use super::frames::{ACK, Mac, RST, SYN, TCP, UDP, frame, icmp, tcp, udp, v4};
use super::maps::Maps;
use super::policy_wires::pod;
use super::programs::{OWN_IFINDEX, PASS, Programs, SHOT};
use crate::dataplane::Dataplane;
use crate::ids::PodUid;
use crate::policy::prefix::Prefix;
use crate::services::index::label64;

const POD: Mac = [0x0a, 0x58, 10, 244, 0, 2];
const OTHER: Mac = [0x0a, 0x58, 10, 244, 0, 3];
/// Where what reaches the pod came from.
const ELSEWHERE: u32 = 2;
const ICMP: u8 = 1;

/// The policies of the pod under test, and the identities of its peers.
const INGRESS: u32 = 5;
const EGRESS: u32 = 6;
const FRIEND: u32 = 9;

/// How a packet goes.
#[derive(Clone, Copy, Debug)]
enum Way {
    Out,
    In,
    /// To the pod from the node itself.
    FromNode,
}
use Way::{FromNode, In, Out};

/// Both directions are isolated; 10.0.0.0/8 and fd00:9::/64 are friends, but for 10.66.0.0/16.
fn node() -> Option<Programs> {
    let mut programs = Programs::new()?;
    programs.add_pod(7, OWN_IFINDEX, POD, &["10.244.0.2", "fd00:244::2"]);
    programs.set_policies(7, INGRESS, EGRESS);
    for (cidr, identity) in [
        ("10.0.0.0/8", FRIEND),
        ("10.66.0.0/16", 0),
        ("fd00:9::/64", FRIEND),
    ] {
        let prefix = Prefix::from(cidr.parse::<IpNet>().unwrap());
        let mut peers: LpmTrie<&mut MapData, Addr, u32> = programs.trie("POLICY_PEERS");
        peers
            .insert(&Key::new(prefix.bits(), prefix.addr()), identity, 0)
            .unwrap();
    }
    Some(programs)
}

fn allow(programs: &mut Programs, policy: u32, identity: u32, bits: u32, proto: u8, port: u16) {
    let key = RuleKey {
        policy,
        identity,
        _pad: 0,
        proto,
        port_be: port.to_be(),
    };
    let mut rules: LpmTrie<&mut MapData, RuleKey, u8> = programs.trie("POLICY_RULES");
    rules.insert(&Key::new(bits, key), 1, 0).unwrap();
}

/// Friends may reach port 80 and, by UDP, ports 64 to 127; anybody may be asked for names.
fn with_rules() -> Option<Programs> {
    let mut programs = node()?;
    allow(&mut programs, INGRESS, FRIEND, RULE_BITS_PORT, TCP, 80);
    allow(
        &mut programs,
        INGRESS,
        FRIEND,
        RULE_BITS_PROTO + 10,
        UDP,
        64,
    );
    allow(&mut programs, EGRESS, 0, RULE_BITS_PORT, UDP, 53);
    Some(programs)
}

fn pass(programs: &mut Programs, way: Way, packet: &[u8]) -> bool {
    let outcome = match way {
        Out => programs.run("from_pod", &frame(POD, OTHER, packet)),
        In => programs.run_from("to_pod", &frame(OTHER, POD, packet), ELSEWHERE),
        FromNode => programs.run("to_pod", &frame(OTHER, POD, packet)),
    };
    match outcome.verdict {
        SHOT => {
            assert_eq!(outcome.dropped, Some("policy"));
            false
        }
        verdict => {
            assert_eq!((verdict, outcome.dropped), (PASS, None));
            true
        }
    }
}

/// Packets one after the other, and whether each passes.
type Case<'a> = (&'a str, Vec<(Way, Vec<u8>, bool)>);

fn check(cases: Vec<Case<'_>>, make: impl Fn() -> Option<Programs>) {
    for (sentence, packets) in cases {
        let Some(mut programs) = make() else { return };
        for (i, (way, packet, wanted)) in packets.iter().enumerate() {
            let passed = pass(&mut programs, *way, packet);
            assert_eq!(passed, *wanted, "{sentence}: packet {i}, {way:?}");
        }
    }
}

#[test]
fn rules_are_met_by_peer_protocol_and_port() {
    let syn = |from: &str, to: &str| tcp(from, to, SYN, b"");
    let fragment = |offset: [u8; 2], id: u8, payload: &[u8]| {
        let mut packet = v4(
            "10.9.9.9".parse().unwrap(),
            "10.244.0.2".parse().unwrap(),
            UDP,
            offset,
            &[],
            payload,
        );
        packet[5] = id;
        packet
    };
    let udp_head = udp("10.9.9.9:4000", "10.244.0.2:100", &[0; 64])[20..].to_vec();
    let other_port = udp("10.9.9.9:4000", "10.244.0.2:200", &[0; 64])[20..].to_vec();
    let question = udp("10.244.0.2:4000", "192.0.2.1:53", b"?");
    let answer = udp("192.0.2.1:53", "10.244.0.2:4000", b"!");
    let error = |about: &[u8]| icmp("198.51.100.1", "10.244.0.2", [3, 4], [0; 4], about);
    check(
        vec![
            (
                "a friend reaches the port",
                vec![(In, syn("10.9.9.9:1", "10.244.0.2:80"), true)],
            ),
            (
                "by IPv6 too",
                vec![(In, syn("[fd00:9::1]:1", "[fd00:244::2]:80"), true)],
            ),
            (
                "no other port",
                vec![(In, syn("10.9.9.9:1", "10.244.0.2:81"), false)],
            ),
            (
                "by UDP, a range of ports",
                vec![
                    (In, udp("10.9.9.9:1", "10.244.0.2:80", b""), true),
                    (In, udp("10.9.9.9:1", "10.244.0.2:128", b""), false),
                    (In, udp("10.9.9.9:1", "10.244.0.2:63", b""), false),
                ],
            ),
            (
                "an exception is no friend",
                vec![(In, syn("10.66.0.1:1", "10.244.0.2:80"), false)],
            ),
            (
                "a stranger is none",
                vec![
                    (In, syn("192.0.2.1:1", "10.244.0.2:80"), false),
                    (In, syn("[fd00:8::1]:1", "[fd00:244::2]:80"), false),
                ],
            ),
            (
                "nobody pings",
                vec![(
                    In,
                    icmp("10.9.9.9", "10.244.0.2", [8, 0], [0, 1, 0, 1], b"ping"),
                    false,
                )],
            ),
            (
                "the node itself reaches everything, and is answered",
                vec![
                    (FromNode, syn("10.244.0.1:9", "10.244.0.2:81"), true),
                    (
                        Out,
                        tcp("10.244.0.2:81", "10.244.0.1:9", SYN | ACK, b""),
                        true,
                    ),
                    (
                        Out,
                        tcp("10.244.0.2:82", "10.244.0.1:9", SYN | ACK, b""),
                        false,
                    ),
                ],
            ),
            (
                "a connection is answered, and goes on",
                vec![
                    (
                        Out,
                        tcp("10.244.0.2:80", "10.9.9.9:1", SYN | ACK, b""),
                        false,
                    ),
                    (In, syn("10.9.9.9:1", "10.244.0.2:80"), true),
                    (
                        Out,
                        tcp("10.244.0.2:80", "10.9.9.9:1", SYN | ACK, b""),
                        true,
                    ),
                    (In, tcp("10.9.9.9:1", "10.244.0.2:80", ACK, b"data"), true),
                    (Out, tcp("10.244.0.2:80", "10.9.9.9:1", RST, b""), true),
                ],
            ),
            (
                "a connection opens none the other way",
                vec![
                    (In, syn("10.9.9.9:1", "10.244.0.2:80"), true),
                    (Out, syn("10.244.0.2:80", "10.9.9.9:1"), false),
                ],
            ),
            (
                "an answer passes after its question only",
                vec![
                    (In, answer.clone(), false),
                    (Out, question.clone(), true),
                    (In, answer, true),
                ],
            ),
            (
                "an error about what was sent passes, from any router",
                vec![
                    (In, error(&question), false),
                    (Out, question.clone(), true),
                    (In, error(&question), true),
                    (
                        In,
                        error(&udp("10.244.0.2:4001", "192.0.2.1:53", b"?")),
                        false,
                    ),
                ],
            ),
            (
                "the pod may complain of what it got",
                vec![
                    (In, udp("10.9.9.9:1", "10.244.0.2:100", b"x"), true),
                    (
                        Out,
                        icmp(
                            "10.244.0.2",
                            "10.9.9.9",
                            [3, 3],
                            [0; 4],
                            &udp("10.9.9.9:1", "10.244.0.2:100", b"x"),
                        ),
                        true,
                    ),
                    (
                        Out,
                        icmp(
                            "10.244.0.2",
                            "10.9.9.9",
                            [3, 3],
                            [0; 4],
                            &udp("10.9.9.9:2", "10.244.0.2:100", b"x"),
                        ),
                        false,
                    ),
                ],
            ),
            (
                "the fragments of what is allowed pass, of this packet only",
                vec![
                    (In, fragment([0, 9], 1, &[0; 64]), false),
                    (In, fragment([0x20, 0], 1, &udp_head), true),
                    (In, fragment([0, 9], 1, &[0; 64]), true),
                    (In, fragment([0, 9], 2, &[0; 64]), false),
                ],
            ),
            (
                "a fragment of what is refused does not",
                vec![
                    (In, fragment([0x20, 0], 3, &other_port), false),
                    (In, fragment([0, 9], 3, &[0; 64]), false),
                ],
            ),
            (
                "neighbour discovery is nobody's to forbid",
                vec![
                    (
                        In,
                        icmp("fe80::1", "fd00:244::2", [135, 0], [0; 4], &[0; 16]),
                        true,
                    ),
                    (
                        Out,
                        icmp("fd00:244::2", "ff02::1:ff00:1", [135, 0], [0; 4], &[0; 16]),
                        true,
                    ),
                ],
            ),
        ],
        with_rules,
    );
}

#[test]
fn wide_rules_and_their_absence() {
    let ping = icmp("10.9.9.9", "10.244.0.2", [8, 0], [0, 1, 0, 1], b"ping");
    let later = v4(
        "10.9.9.9".parse().unwrap(),
        "10.244.0.2".parse().unwrap(),
        UDP,
        [0, 9],
        &[],
        &[0; 64],
    );
    let datagram = udp("10.9.9.9:1", "10.244.0.2:9", b"");
    let with = |bits: u32, proto: u8| {
        move || {
            let mut programs = node()?;
            allow(&mut programs, INGRESS, FRIEND, bits, proto, 0);
            Some(programs)
        }
    };
    check(
        vec![(
            "every port of UDP is not ping, and a late fragment has no port to forbid",
            vec![
                (In, datagram.clone(), true),
                (In, ping.clone(), false),
                (In, later.clone(), true),
            ],
        )],
        with(RULE_BITS_PROTO, UDP),
    );
    check(
        vec![(
            "every protocol is ping too",
            vec![
                (In, datagram.clone(), true),
                (In, ping.clone(), true),
                (In, later.clone(), true),
            ],
        )],
        with(RULE_BITS_ALL, ICMP),
    );
    check(
        vec![(
            "without a rule nothing passes",
            vec![
                (In, datagram.clone(), false),
                (In, ping, false),
                (In, later, false),
            ],
        )],
        node,
    );
    let set = |ingress, egress| {
        move || {
            let mut programs = node()?;
            programs.set_policies(7, ingress, egress);
            Some(programs)
        }
    };
    let out = tcp("10.244.0.2:9", "192.0.2.1:80", SYN, b"");
    let back = tcp("192.0.2.1:80", "10.244.0.2:9", SYN | ACK, b"");
    check(
        vec![(
            "isolated for what comes in only, it gets answers to what it sends",
            vec![
                (In, back.clone(), false),
                (Out, out.clone(), true),
                (In, back.clone(), true),
            ],
        )],
        set(INGRESS, POLICY_OPEN),
    );
    check(
        vec![(
            "closed, it gets what the node sends and nothing else",
            vec![
                (In, datagram.clone(), false),
                (Out, out.clone(), false),
                (FromNode, datagram, true),
            ],
        )],
        set(POLICY_CLOSED, POLICY_CLOSED),
    );
    let Some(mut programs) = set(POLICY_OPEN, POLICY_OPEN)() else {
        return;
    };
    assert!(pass(&mut programs, Out, &out));
    programs.set_policies(7, INGRESS, EGRESS);
    assert!(
        pass(&mut programs, In, &back),
        "a connection outlives the coming of a policy"
    );
    programs
        .hash::<u64, ebpf_maps::policy::PodPolicies>("POLICY_PODS")
        .remove(&7)
        .unwrap();
    assert!(
        !pass(&mut programs, Out, &out),
        "a pod that nobody has judged passes nothing"
    );
}

#[test]
fn a_pod_that_has_come_since_keeps_its_row_when_the_others_are_swept() {
    let Some(bed) = Bed::new() else { return };
    let dataplane = bed.start();
    let mut view = view(1, Vec::new());
    let [old, new] = ["pod-old", "pod-new"].map(|uid| PodUid::new(uid).unwrap());
    let pods = [(&old, "old"), (&new, "new")].map(|(uid, name)| (uid.clone(), Arc::new(pod(name))));
    view.pods = Arc::new(pods.into_iter().collect());
    assert_eq!(dataplane.apply_policies(&view).unwrap(), []);
    let rows = || bed.keys::<u64, ebpf_maps::policy::PodPolicies>("POLICY_PODS");
    let both: BTreeSet<u64> = [&old, &new].map(|uid| label64(uid.as_str())).into();
    assert_eq!(rows(), both);
    // The sweep goes by a view in which neither was.
    dataplane.retain_pods(&HashSet::new()).unwrap();
    assert_eq!(rows(), both);

    // One that an earlier agent left is in no view of this one.
    drop(dataplane);
    let dataplane = bed.start();
    dataplane
        .retain_pods(&HashSet::from([new.clone()]))
        .unwrap();
    assert_eq!(rows(), BTreeSet::from([label64(new.as_str())]));
}
