//! What would become of a packet: the programs that are attached, run by `BPF_PROG_TEST_RUN`.
//!
//! ```text
//!  the same object, loaded once more ─┬► the agent's tables: the pinned maps, which programs only read
//!                                     └► what programs write (flows, counters, affinity): maps of its own
//!  a packet ─► from_pod, to_pod ─► verdict, the packet as it goes on, the event that a watcher is told
//! ```
//! So a trial sees Services and policies as every packet does at this moment, and leaves no trace: no flow,
//! no count, no clock of an affinity. What it cannot see is state of earlier packets; a connection's first
//! packet does not depend on any, but for the backend that an affinity remembers.

use std::net::{IpAddr, SocketAddr};

use aya::maps::{Array, MapData, RingBuf};
use aya::programs::{Program, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use ebpf_maps::endpoint::InterfaceValue;
use ebpf_maps::event::FlowEvent;

use super::load::{self, map_directory, unexpected};
use super::{DataplaneError, sys};
use crate::paths::Paths;

/// Maps that only the agent writes. Every other one is a trial's own.
const LIVE_MAPS: [&str; 14] = [
    "FRONTENDS",
    "SLOTS",
    "BACKENDS",
    "TRAFFIC",
    "SOURCE_RANGES",
    "NODE_ADDRESSES",
    "ENDPOINTS",
    "NEAR",
    "INTERFACES",
    "UPLINKS",
    "POLICY_PODS",
    "OPEN_PODS",
    "POLICY_PEERS",
    "POLICY_RULES",
];
/// The large ones of the rest, and entries enough for one connection, on every CPU.
const OWN_MAPS: [&str; 6] = [
    "FLOWS",
    "POLICY_FLOWS",
    "AFFINITY",
    "REVERSE_NAT",
    "PEERS",
    "SEEN",
];
const OWN_ENTRIES: u32 = 2_048;

/// The size of `struct __sk_buff`, and where its `ingress_ifindex` is; `ifindex` follows.
const SK_BUFF_BYTES: usize = 192;
const INGRESS_IFINDEX: usize = 36;
/// `TC_ACT_SHOT`
const SHOT: u32 = 2;

const ETHERNET_BYTES: usize = 14;
const V4_BYTES: usize = 20;
const V6_BYTES: usize = 40;
const TCP_BYTES: usize = 20;
const UDP_BYTES: usize = 8;
/// IANA protocol number.
const UDP: u8 = 17;

/// TCP flags of a connection's first two packets.
pub const SYN: u8 = 2;
/// See [`SYN`].
pub const SYN_ACK: u8 = 18;

/// A packet without data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TrialPacket {
    /// Whence.
    pub source: SocketAddr,
    /// Whither; of the same family.
    pub destination: SocketAddr,
    /// IANA protocol number: TCP, else UDP.
    pub protocol: u8,
    /// Of TCP.
    pub flags: u8,
}

/// What would become of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tried {
    /// It goes on.
    pub passes: bool,
    /// What a watcher is told; none of answers that pass.
    pub event: Option<FlowEvent>,
    /// As it goes on.
    pub source: SocketAddr,
    /// As above.
    pub destination: SocketAddr,
}

/// A pod's interface, as the packet programs know it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TrialPod {
    /// The host end.
    pub ifindex: u32,
    /// Of the interface in the pod.
    pub pod_mac: [u8; 6],
    /// See [`super::PodInterface`].
    pub gateway_mac: [u8; 6],
}

/// Programs to try packets on. What one packet has begun the next ones go on with.
pub trait Trial: Send {
    /// The pod sends a packet, to whoever is at that address.
    fn sent(&mut self, pod: &TrialPod, packet: &TrialPacket) -> Result<Tried, DataplaneError>;

    /// The pod is sent a packet by the node's network: from elsewhere, or by the node itself.
    fn received(
        &mut self,
        pod: &TrialPod,
        packet: &TrialPacket,
        by_node: bool,
    ) -> Result<Tried, DataplaneError>;
}

pub(super) struct BpfTrial {
    ebpf: Ebpf,
}

impl TrialPod {
    pub(super) fn of(ifindex: u32, row: &InterfaceValue) -> Self {
        Self {
            ifindex,
            pod_mac: row.pod_mac,
            gateway_mac: row.gateway_mac,
        }
    }
}

impl BpfTrial {
    pub(super) fn load(paths: &Paths) -> Result<Self, DataplaneError> {
        let directory = map_directory(paths);
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        for name in LIVE_MAPS {
            loader.map_pin_path(name, directory.join(name));
        }
        for name in OWN_MAPS {
            loader.map_max_entries(name, OWN_ENTRIES);
        }
        let mut ebpf = loader
            .load(load::OBJECT)
            .map_err(|error| unexpected("of a trial", error))?;
        for program in ["from_pod", "to_pod"] {
            load::load_program(&mut ebpf, program)?;
        }
        let watch = ebpf.map_mut("WATCH").map(Array::<_, u64>::try_from);
        let watched = watch.map(|watch| watch.and_then(|mut watch| watch.set(0, u64::MAX, 0)));
        match watched {
            Some(Ok(())) => Ok(Self { ebpf }),
            Some(Err(error)) => Err(unexpected("WATCH", error)),
            None => Err(unexpected("WATCH", "not in the object")),
        }
    }

    fn run(
        &mut self,
        name: &str,
        ifindex: u32,
        ingress_ifindex: u32,
        frame: &[u8],
    ) -> Result<Tried, DataplaneError> {
        let program = self.ebpf.program(name);
        let Some(Program::SchedClassifier(program)) = program else {
            return Err(unexpected(name, "no packet program"));
        };
        let mut context = [0; SK_BUFF_BYTES];
        let fields = [ingress_ifindex.to_ne_bytes(), ifindex.to_ne_bytes()].concat();
        context[INGRESS_IFINDEX..INGRESS_IFINDEX + fields.len()].copy_from_slice(&fields);
        let mut out = vec![0; frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::default()
        };
        let ran = program.test_run(options).map_err(|error| {
            let text = format!("{error}: {}", cause(&error));
            unexpected(name, text)
        })?;
        out.truncate(ran.data_size_out as usize);
        let Some((source, destination)) = ends(&out) else {
            return Err(unexpected(name, "has made something else of the packet"));
        };
        Ok(Tried {
            passes: ran.return_value != SHOT,
            event: self.event()?,
            source,
            destination,
        })
    }

    fn event(&mut self) -> Result<Option<FlowEvent>, DataplaneError> {
        let ring: Option<RingBuf<&mut MapData>> =
            (self.ebpf.map_mut("EVENTS")).and_then(|map| map.try_into().ok());
        let mut ring = ring.ok_or_else(|| unexpected("EVENTS", "no ring buffer"))?;
        let mut last = None;
        while let Some(item) = ring.next() {
            last = sys::read_pod(&item);
        }
        Ok(last)
    }
}

fn cause(error: &dyn std::error::Error) -> String {
    error.source().map(ToString::to_string).unwrap_or_default()
}

impl Trial for BpfTrial {
    fn sent(&mut self, pod: &TrialPod, packet: &TrialPacket) -> Result<Tried, DataplaneError> {
        let frame = frame(packet, pod.gateway_mac, pod.pod_mac);
        self.run("from_pod", pod.ifindex, pod.ifindex, &frame)
    }

    fn received(
        &mut self,
        pod: &TrialPod,
        packet: &TrialPacket,
        by_node: bool,
    ) -> Result<Tried, DataplaneError> {
        let frame = frame(packet, pod.pod_mac, pod.gateway_mac);
        // Any interface that is not the pod's: programs ask only whether there was one.
        let from = if by_node { 0 } else { 1 };
        self.run("to_pod", pod.ifindex, from, &frame)
    }
}

/// The frame. Its checksums are 0: the programs mend sums, and do not check them.
fn frame(packet: &TrialPacket, to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    let mut frame = [to, from].concat();
    let ports = [packet.source.port(), packet.destination.port()].map(u16::to_be_bytes);
    let mut segment = ports.concat();
    if packet.protocol == UDP {
        segment.extend([0, UDP_BYTES as u8, 0, 0]);
    } else {
        segment.extend([0, 0, 0, 1, 0, 0, 0, 0]);
        // The header's length in words, flags, window.
        segment.extend([
            (TCP_BYTES as u8 / 4) << 4,
            packet.flags,
            0xff,
            0xff,
            0,
            0,
            0,
            0,
        ]);
    }
    let length = segment.len() as u8; // 8 or 20
    match (packet.source.ip(), packet.destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            frame.extend([0x08, 0x00]);
            frame.extend([0x45, 0, 0, V4_BYTES as u8 + length, 0, 1, 0x40, 0]);
            frame.extend([64, packet.protocol, 0, 0]);
            frame.extend(source.octets());
            frame.extend(destination.octets());
        }
        (source, destination) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, length, packet.protocol, 64]);
            frame.extend(v6(source));
            frame.extend(v6(destination));
        }
    }
    frame.extend(segment);
    frame
}

fn v6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The other way; none: it is no such frame.
fn ends(frame: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let array = |at: usize| <[u8; 4]>::try_from(frame.get(at..at + 4)?).ok();
    let array_v6 = |at: usize| <[u8; 16]>::try_from(frame.get(at..at + 16)?).ok();
    let (source, destination, l4): (IpAddr, IpAddr, usize) = match frame.get(12..14)? {
        [0x08, 0x00] => (
            array(ETHERNET_BYTES + 12)?.into(),
            array(ETHERNET_BYTES + 16)?.into(),
            ETHERNET_BYTES + V4_BYTES,
        ),
        [0x86, 0xdd] => (
            array_v6(ETHERNET_BYTES + 8)?.into(),
            array_v6(ETHERNET_BYTES + 24)?.into(),
            ETHERNET_BYTES + V6_BYTES,
        ),
        _ => return None,
    };
    let [a, b, c, d] = array(l4)?;
    let (from, to) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    Some((
        SocketAddr::new(source, from),
        SocketAddr::new(destination, to),
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_frame_says_its_ends(
            v4 in any::<([u8; 4], [u8; 4])>(), v6 in any::<([u8; 16], [u8; 16])>(), is_v6: bool,
            ports in any::<(u16, u16)>(), is_udp: bool, cut in 0..60_usize,
        ) {
            let (from, to): (IpAddr, IpAddr) = match is_v6 {
                false => (v4.0.into(), v4.1.into()),
                true => (v6.0.into(), v6.1.into()),
            };
            let packet = TrialPacket {
                source: SocketAddr::new(from, ports.0),
                destination: SocketAddr::new(to, ports.1),
                protocol: if is_udp { UDP } else { 6 },
                flags: SYN,
            };
            let frame = frame(&packet, [1; 6], [2; 6]);
            prop_assert_eq!(ends(&frame), Some((packet.source, packet.destination)));
            // Whatever is cut off, nothing panics.
            let _ = ends(&frame[..cut.min(frame.len())]);
        }
    }
}
