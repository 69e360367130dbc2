//! Frames as an uplink's driver has them, one at a time: what is sent on before the kernel has made packets of
//! them, and that everything else is left as it came. Routes and neighbours are those of `outside`'s node.

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, Map, MapData, PerCpuArray, RingBuf};
use aya::programs::{Program, TestRun, TestRunOptions};
use ebpf_maps::counter::XDP_SENT;
use ebpf_maps::drop::DROP_NAMES;
use ebpf_maps::event::FlowEvent;
use ebpf_maps::flow::{FlowKey, FlowValue, IS_REPLY, REPLIED};
use ebpf_maps::services::{
    FRONTEND_DIRECT_RETURN, FRONTEND_DROP, FRONTEND_RESTRICTED, SCOPE_OUTSIDE_ADDRESS,
    SCOPE_OUTSIDE_NODE_PORT, SOURCE_RANGE_BITS, SourceRangeKey,
};
use ebpf_maps::uplink::SOURCE_PORT_MIN;
use nix::net::if_::if_nametoindex;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::bed::ip;
use super::frames::{
    ACK, Mac, SYN, TCP, UDP, arp, assert_checksums, ends, frame, icmp, partial, tcp, udp, v4,
};
use super::maps::Maps;
use super::outside::{CLIENT, MAC, NODE, OTHER, Outside, REMOTE, ROUTED};
use super::programs::Outcome;
use super::wires::{V4, V6, at};
use crate::dataplane::pods::Attachment;
use crate::dataplane::{load, monotonic_ns, sys, xdp};
use crate::services::index::addr_of;

/// What sees a frame where the kernel has made a packet of it.
const LATER: &str = "from_netdev";
/// `enum xdp_action`
const DROP: i32 = 1;
const PASS: i32 = 2;
const SEND_BACK: i32 = 3;
pub(super) const OTHER_MAC: Mac = [2, 0, 0, 0, 1, 2];
pub(super) const CLIENT_MAC: Mac = [2, 0, 0, 0, 1, 3];
/// The size of `struct xdp_md`, and where its fields are.
const MD_BYTES: usize = 24;
const MD_END: usize = 4;
const MD_IFINDEX: usize = 12;
/// Where `struct __sk_buff` has its interface.
const SK_BUFF_BYTES: usize = 192;
const SK_IFINDEX: usize = 40;

/// The node of `outside`, with programs that are run by hand on its maps.
pub(super) struct Node {
    pub outside: Outside,
    ebpf: Ebpf,
    /// The uplink's.
    pub ifindex: u32,
}

impl Node {
    pub(super) fn new() -> Option<Self> {
        let outside = Outside::new(Some(Attachment::Clsact))?;
        let mut ebpf = load::open(&load::map_directory(&outside.wires.paths), true).unwrap();
        for program in [xdp::PROGRAM, LATER, "from_pod"] {
            load::load_program(&mut ebpf, program).unwrap();
        }
        let ifindex = outside.wires.node.run(|| {
            for (addresses, mac) in [(OTHER, "02:00:00:00:01:02"), (CLIENT, "02:00:00:00:01:03")] {
                for address in addresses {
                    let lladdr = format!("lladdr {mac} dev eth0 nud permanent");
                    ip(&format!("neigh replace {address} {lladdr}"));
                }
            }
            // Nobody is there.
            ip("route add 10.244.7.0/24 via 192.0.2.77");
            ip("-6 route add fd00:244:7::/64 via 2001:db8::77");
            if_nametoindex("eth0").unwrap()
        });
        Some(Self {
            outside,
            ebpf,
            ifindex,
        })
    }

    /// The frame has come by the uplink.
    fn run(&self, frame: &[u8]) -> Outcome {
        let before = self.drops();
        let mut ctx = [0; MD_BYTES];
        ctx[MD_END..MD_END + 4].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
        ctx[MD_IFINDEX..MD_IFINDEX + 4].copy_from_slice(&self.ifindex.to_ne_bytes());
        let mut outcome = self.test_run(xdp::PROGRAM, frame, &ctx, 1).0;
        let after = self.drops();
        let dropped = (0..before.len()).find(|index| after[*index] > before[*index]);
        outcome.dropped = dropped.map(|index| DROP_NAMES[index]);
        outcome
    }

    /// The same where the kernel has made a packet of it.
    fn run_later(&self, frame: &[u8]) -> Outcome {
        self.run_at(LATER, self.ifindex, frame)
    }

    /// The frame has come by an interface, as a packet of the kernel's.
    pub(super) fn run_at(&self, program: &str, ifindex: u32, frame: &[u8]) -> Outcome {
        let mut ctx = [0; SK_BUFF_BYTES];
        ctx[SK_IFINDEX..SK_IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        self.test_run(program, frame, &ctx, 1).0
    }

    /// Somebody watches from now on: the events since the last call.
    pub(super) fn events(&mut self) -> Vec<FlowEvent> {
        let watch = Array::<_, u64>::try_from(self.ebpf.map_mut("WATCH").unwrap());
        watch.unwrap().set(0, u64::MAX, 0).unwrap();
        let ring = self.ebpf.map_mut("EVENTS").unwrap();
        let mut ring: RingBuf<&mut MapData> = ring.try_into().unwrap();
        let mut events = Vec::new();
        while let Some(item) = ring.next() {
            events.push(sys::read_pod(&item).unwrap());
        }
        events
    }

    fn test_run(&self, program: &str, frame: &[u8], ctx: &[u8], repeat: u32) -> (Outcome, u128) {
        let mut out = vec![0; frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(ctx),
            repeat,
            ..TestRunOptions::default()
        };
        let program = self.ebpf.program(program).unwrap();
        // Its routes are those of the calling thread's namespace.
        let result = self.outside.wires.node.run(|| match program {
            Program::Xdp(program) => program.test_run(options),
            Program::SchedClassifier(program) => program.test_run(options),
            _ => panic!("no packet program"),
        });
        let result = result.unwrap();
        out.truncate(result.data_size_out as usize);
        let outcome = Outcome {
            verdict: result.return_value as i32,
            frame: out,
            dropped: None,
        };
        (outcome, result.duration.as_nanos())
    }

    /// Nanoseconds of a run, the least mean of many. A run finds what the one before has left, one hop
    /// further: so it is repeated as often as a packet has hops.
    fn time(&self, program: &str, frame: &[u8]) -> u128 {
        let mut ctx = vec![0; SK_BUFF_BYTES];
        let ifindex = self.ifindex.to_ne_bytes();
        if program == xdp::PROGRAM {
            ctx.truncate(MD_BYTES);
            ctx[MD_END..MD_END + 4].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
            ctx[MD_IFINDEX..MD_IFINDEX + 4].copy_from_slice(&ifindex);
        } else {
            ctx[SK_IFINDEX..SK_IFINDEX + 4].copy_from_slice(&ifindex);
        }
        let times = (0..400).map(|_| self.test_run(program, frame, &ctx, 200).1);
        times.min().unwrap()
    }

    fn drops(&self) -> Vec<u64> {
        (DROP_NAMES
            .iter()
            .map(|name| self.outside.wires.dropped(name)))
        .collect()
    }

    fn sent_count(&self) -> u64 {
        let counters = Map::PerCpuArray(self.outside.wires.data("COUNTERS"));
        let counters = PerCpuArray::<_, u64>::try_from(counters).unwrap();
        counters.get(&XDP_SENT, 0).unwrap().iter().sum()
    }

    fn watch(&mut self, until_ns: u64) {
        let watch = self.ebpf.map_mut("WATCH").unwrap();
        let mut watch = Array::<_, u64>::try_from(watch).unwrap();
        watch.set(0, until_ns, 0).unwrap();
    }

    fn passes(&self, sent: &[u8], why: &str) {
        let left = self.run(sent);
        assert_eq!((left.verdict, left.dropped), (PASS, None), "{why}");
        assert_eq!(left.frame, sent, "{why}");
    }
}

fn packet(proto: u8, from: impl ToString, to: impl ToString, flags: u8, data: &[u8]) -> Vec<u8> {
    let (from, to) = (from.to_string(), to.to_string());
    match proto {
        TCP => tcp(&from, &to, flags, data),
        _ => udp(&from, &to, data),
    }
}

fn from_client(packet: &[u8]) -> Vec<u8> {
    frame(CLIENT_MAC, MAC, packet)
}

/// Hops and, for IPv4, the checksum are one further.
fn hops(frame: &[u8]) -> u8 {
    if frame[14] >> 4 == 4 {
        frame[22]
    } else {
        frame[21]
    }
}

#[test]
fn what_goes_on_elsewhere_leaves_as_from_netdev_would_send_it() {
    let Some(node) = Node::new() else { return };
    let mut count = 0;
    for family in [0, 1] {
        let backend = at(REMOTE[family], 8080);
        let frontend = node.outside.node_port(family, &[backend]);
        for proto in [TCP, UDP] {
            let client = at(CLIENT[family], 4000);
            for (flags, data) in [(SYN, &b""[..]), (ACK, b"GET /"), (ACK, b"odd")] {
                let sent = from_client(&packet(proto, client, frontend, flags, data));
                let left = node.run(&sent);
                assert_eq!((left.verdict, left.dropped), (SEND_BACK, None));
                assert_eq!(left.frame[..12], [OTHER_MAC, MAC].concat());
                assert_checksums(&left.frame);
                let (from, to) = ends(&left.frame);
                assert_eq!((from.ip(), to), (at(NODE[family], 0).ip(), backend));
                assert!(u32::from(from.port()) >= SOURCE_PORT_MIN, "{from}");
                assert_eq!(hops(&left.frame), 63);
                assert_eq!(node.run_later(&sent).frame[14..], left.frame[14..]);
                let answer = frame(OTHER_MAC, MAC, &packet(proto, backend, from, ACK, data));
                let back = node.run(&answer);
                assert_eq!(back.verdict, SEND_BACK);
                assert_eq!(back.frame[..12], [CLIENT_MAC, MAC].concat());
                assert_checksums(&back.frame);
                assert_eq!(ends(&back.frame), (frontend, client));
                assert_eq!(node.run_later(&answer).frame[14..], back.frame[14..]);
                count += 2;
            }
        }
    }
    assert_eq!(node.sent_count(), count);
}

#[test]
fn what_is_for_this_node_or_not_plain_is_left_as_it_came() {
    let Some(node) = Node::new() else { return };
    for family in [0, 1] {
        let frontend = node.outside.node_port(family, &[at(REMOTE[family], 8080)]);
        let client = at(CLIENT[family], 4001);
        for proto in [TCP, UDP] {
            let sent = from_client(&packet(proto, client, frontend, SYN, b"data"));
            assert_eq!(node.run(&sent).verdict, SEND_BACK);
            let header = [34, 54][family] + if proto == TCP { 16 } else { 8 };
            for length in 14..header {
                node.passes(&sent[..length], "cut off");
            }
            node.passes(&partial(&sent), "its sum is not complete");
            let mut last = sent.clone();
            last[if family == 0 { 22 } else { 21 }] = 1;
            node.passes(&last, "its last hop");
            let mut other = sent.clone();
            other[5] = 9;
            node.passes(&other, "for somebody else");
            let long = packet(proto, client, frontend, ACK, &[0; 1600]);
            node.passes(&from_client(&long), "too long for the uplink");
            let nobody = packet(proto, client, at(NODE[family], 30_081), SYN, b"");
            node.passes(&from_client(&nobody), "nobody's port");
            let host = packet(proto, client, at(NODE[family], 22), SYN, b"");
            node.passes(&from_client(&host), "the node's own");
        }
        let echo = [[8, 0], [128, 0]][family];
        let ping = icmp(CLIENT[family], NODE[family], echo, [0, 1, 0, 1], b"ping");
        node.passes(&from_client(&ping), "a ping");
        // A backend of this node, and one that cannot be reached at once.
        let wires = &node.outside.wires;
        for (base, number, backend) in [
            (400, 31_000, at([V4, V6][family][0], 8080)),
            (410, 31_001, at(["10.244.7.2", "fd00:244:7::2"][family], 80)),
        ] {
            let any = at(["0.0.0.0", "::"][family], number).to_string();
            let backend = backend.to_string();
            wires.serve_as(&any, TCP, SCOPE_OUTSIDE_NODE_PORT, base, 0, &[&backend]);
            let to = at(NODE[family], number);
            for flags in [SYN, ACK] {
                node.passes(&from_client(&packet(TCP, client, to, flags, b"")), &backend);
            }
        }
    }
    let datagram = udp("192.0.2.100:4001", "192.0.2.1:30080", b"data");
    let (from, to) = ("192.0.2.100".parse().unwrap(), "192.0.2.1".parse().unwrap());
    let above = &datagram[20..];
    let first = v4(from, to, UDP, [0x20, 0], &[], above);
    node.passes(&from_client(&first), "a fragment");
    let optioned = v4(from, to, UDP, [0x40, 0], &[1; 4], above);
    node.passes(&from_client(&optioned), "options");
    let ask = arp(1, (CLIENT_MAC, CLIENT[0]), ([0; 6], NODE[0]));
    node.passes(&from_client(&ask), "ARP");
}

#[test]
fn who_is_kept_out_is_dropped_unless_somebody_watches() {
    let Some(mut node) = Node::new() else { return };
    for family in [0, 1] {
        let address = at(ROUTED[family], 80);
        let scope = SCOPE_OUTSIDE_ADDRESS;
        let client = at(CLIENT[family], 4002);
        let sent = from_client(&packet(TCP, client, address, SYN, b""));
        let backend = at(REMOTE[family], 8080);
        node.outside.serve(ROUTED[family], 80, scope, &[backend]);
        node.outside.set_flags(address, scope, FRONTEND_RESTRICTED);
        let left = node.run(&sent);
        assert_eq!((left.verdict, left.dropped), (DROP, Some("source_range")));
        node.watch(monotonic_ns() + 60_000_000_000);
        node.passes(&sent, "from_netdev tells of it");
        node.watch(0);
        let mut ranges: LpmTrie<_, SourceRangeKey, u32> =
            Map::LpmTrie(node.outside.wires.data("SOURCE_RANGES"))
                .try_into()
                .unwrap();
        let data = SourceRangeKey {
            service_id: 160,
            addr: addr_of(CLIENT[family].parse().unwrap()),
        };
        let key = Key::new(SOURCE_RANGE_BITS + 128, data);
        ranges.insert(&key, 1, 0).unwrap();
        assert_eq!(
            node.run(&sent).verdict,
            SEND_BACK,
            "the client is in the range"
        );
        // Nobody serves it: refused by from_netdev; or by other nodes only.
        node.outside.serve(ROUTED[family], 80, scope, &[]);
        let sent = from_client(&packet(TCP, at(CLIENT[family], 4003), address, SYN, b""));
        node.passes(&sent, "refused later");
        node.outside.set_flags(address, scope, FRONTEND_DROP);
        let left = node.run(&sent);
        assert_eq!(
            (left.verdict, left.dropped),
            (DROP, Some("no_backend_here"))
        );
        let mut other = sent.clone();
        other[5] = 9;
        node.passes(&other, "for somebody else");
    }
}

#[test]
fn what_a_watcher_is_told_of_is_left_to_from_netdev() {
    let Some(mut node) = Node::new() else { return };
    let frontend = node.outside.node_port(0, &[at(REMOTE[0], 8080)]);
    let sent =
        |proto, flags| from_client(&packet(proto, at(CLIENT[0], 4004), frontend, flags, b""));
    for (proto, flags) in [(TCP, SYN), (TCP, ACK), (UDP, 0)] {
        assert_eq!(node.run(&sent(proto, flags)).verdict, SEND_BACK);
    }
    node.watch(monotonic_ns() + 60_000_000_000);
    node.passes(&sent(TCP, SYN), "a connection begins");
    node.passes(&sent(UDP, 0), "datagrams are told of now and then");
    assert_eq!(node.run(&sent(TCP, ACK)).verdict, SEND_BACK, "and goes on");
}

#[test]
fn a_datagram_without_a_sum_stays_without() {
    let Some(node) = Node::new() else { return };
    let frontend = node.outside.node_port(0, &[at(REMOTE[0], 8080)]);
    let mut sent = from_client(&packet(UDP, at(CLIENT[0], 4005), frontend, 0, b"data"));
    sent[40..42].copy_from_slice(&[0, 0]);
    let left = node.run(&sent);
    assert_eq!(left.verdict, SEND_BACK);
    assert_eq!(left.frame[40..42], [0, 0]);
    assert_eq!(ends(&left.frame).1, at(REMOTE[0], 8080));
}

#[test]
fn with_direct_return_only_hops_and_hardware_addresses_change() {
    let Some(node) = Node::new() else { return };
    for family in [0, 1] {
        let backend = at(REMOTE[family], 8080);
        node.outside
            .serve(ROUTED[family], 80, SCOPE_OUTSIDE_ADDRESS, &[backend]);
        let frontend = at(ROUTED[family], 80);
        node.outside
            .set_flags(frontend, SCOPE_OUTSIDE_ADDRESS, FRONTEND_DIRECT_RETURN);
        for (proto, flags) in [(TCP, SYN), (TCP, ACK), (UDP, 0)] {
            let client = at(CLIENT[family], 4006);
            let sent = from_client(&packet(proto, client, frontend, flags, b"data"));
            let left = node.run(&sent);
            assert_eq!(left.verdict, SEND_BACK);
            assert_eq!(left.frame[..12], [OTHER_MAC, MAC].concat());
            assert_checksums(&left.frame);
            assert_eq!(ends(&left.frame), (client, frontend));
            assert_eq!(hops(&left.frame), 63);
            assert_eq!(node.run_later(&sent).frame[14..], left.frame[14..]);
        }
    }
}

#[test]
fn a_frame_that_is_not_sent_is_not_touched() {
    let Some(node) = Node::new() else { return };
    let frontends = [0, 1].map(|family| {
        let any = at(["0.0.0.0", "::"][family], 30_080).to_string();
        for (base, proto) in [(500, TCP), (520, UDP)] {
            let base = base + 2 * family as u32;
            let backend = at(REMOTE[family], 8080).to_string();
            let scope = SCOPE_OUTSIDE_NODE_PORT;
            node.outside
                .wires
                .serve_as(&any, proto, scope, base, 0, &[&backend]);
        }
        at(NODE[family], 30_080)
    });
    let changes = prop::collection::vec((0..80_usize, any::<u8>()), 0..3);
    let frames = (
        0..2_usize,
        prop_oneof![Just(TCP), Just(UDP)],
        any::<u16>(),
        changes,
    );
    let outcome = TestRunner::default().run(&frames, |(family, proto, port, changes)| {
        let client = at(CLIENT[family], port);
        let packet = packet(
            proto,
            client,
            frontends[family],
            SYN,
            b"some data to ask for",
        );
        let mut sent = from_client(&packet);
        for (at, byte) in changes {
            if let Some(place) = sent.get_mut(at) {
                *place = byte;
            }
        }
        let left = node.run(&sent);
        match left.verdict {
            SEND_BACK => {
                prop_assert_eq!(&left.frame[..12], &[OTHER_MAC, MAC].concat()[..]);
                prop_assert_eq!(left.frame.len(), sent.len());
            }
            PASS => prop_assert_eq!(&left.frame, &sent),
            verdict => prop_assert!(false, "verdict {}", verdict),
        }
        Ok(())
    });
    outcome.unwrap();
    let sent_count = node.sent_count();
    assert!(sent_count > 20, "most frames are good: {sent_count}");
}

/// `cargo test --workspace --lib measure_xdp -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn measure_xdp() {
    let Some(node) = Node::new() else { return };
    let mut flows = node.outside.wires.hash::<FlowKey, FlowValue>("FLOWS");
    for family in [0, 1] {
        // What the packet becomes becomes the packet again, and always comes back to this node: every run
        // finds a flow.
        node.outside.wires.node.run(|| {
            ip(&format!(
                "neigh replace {} lladdr 02:00:00:00:01:01 dev eth0 nud permanent",
                OTHER[family]
            ));
            let prefix = ["198.51.100.0/24", "2001:db8:7::/64"][family];
            ip(&format!("route add {prefix} via {}", OTHER[family]));
        });
        let (client, frontend) = (at(CLIENT[family], 4000), at(ROUTED[family], 80));
        let backend = at(REMOTE[family], 8080);
        node.outside
            .serve(ROUTED[family], 80, SCOPE_OUTSIDE_ADDRESS, &[backend]);
        let mut sent = from_client(&packet(TCP, client, frontend, ACK, &[0; 64]));
        sent[if family == 0 { 22 } else { 21 }] = 255;
        assert_eq!(node.run(&sent).verdict, SEND_BACK);
        let (key, value) = (node.outside.wires.flows().into_iter())
            .find(|(key, _)| key.ends.source == addr_of(client.ip()))
            .unwrap();
        let again = FlowValue {
            ends: key.ends,
            flags: IS_REPLY | REPLIED,
            ..value
        };
        let ends = value.ends;
        flows.insert(FlowKey { ends, ..key }, again, 0).unwrap();
        let other = from_client(&packet(TCP, client, at(NODE[family], 22), ACK, &[0; 64]));
        let pod = at([V4, V6][family][0], 8080);
        let to_pod = from_client(&packet(TCP, client, pod, ACK, &[0; 64]));
        for (what, program, frame) in [
            ("nobody's port", xdp::PROGRAM, &other),
            ("a known flow", xdp::PROGRAM, &sent),
            ("nobody's port, later", LATER, &other),
            ("a known flow, later", LATER, &sent),
            ("into a pod", LATER, &to_pod),
        ] {
            eprintln!("{what}, family {family}: {} ns", node.time(program, frame));
        }
    }
}
