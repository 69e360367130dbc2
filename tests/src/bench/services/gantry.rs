//! Gantry's own data plane on a throw-away node: the agent's library, on its own cgroup, maps and pins.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::MapInfo;
use aya::programs::{ProgramInfo, SchedClassifier, TestRun, TestRunOptions, loaded_programs};
use aya::sys::Stats;
use gantry_agent::dataplane::{Bandwidth, BpfDataplane, Dataplane, Options, PodInterface, XdpMode};
use gantry_agent::ids::PodUid;
use gantry_agent::view::View;
use gantry_cni::uplinks::Uplink;
use nix::net::if_::if_nametoindex;
use tokio::runtime::Runtime;

use super::bed::{
    self, Bed, CLIENT, GATEWAY_MAC, NODE_ADDRESS, POD_COUNT, UPLINK_MAC, addresses, pod_mac,
};
use super::layout_gantry::{NODE, looped, node};
use super::model::{Model, Service, TARGET_PORT};

/// Runs of a program in one measurement by TEST_RUN.
const REPEAT: u32 = 200_000;
/// `struct __sk_buff`: its size, and where its `ifindex` is.
const SK_BUFF_BYTES: usize = 192;
const IFINDEX: usize = 40;
/// A Service that leads to itself, beyond all others.
const LOOP: Ipv4Addr = Ipv4Addr::new(10, 111, 255, 254);

/// A running data plane and what it was told last.
pub(super) struct Gantry {
    dataplane: BpfDataplane,
    view: View,
    /// The id of its map of frontends: a program that has it is one of this data plane.
    frontends: u32,
}

impl Gantry {
    /// Starts it with empty maps, in the place of one that ran before.
    pub(super) fn start() -> Result<Self> {
        let _making = super::making();
        bed::clear_programs()?;
        let cgroup = bed::cgroup()?;
        fs::create_dir_all(&cgroup).with_context(|| format!("create {}", cgroup.display()))?;
        let options = Options {
            node: NODE.into(),
            resolver: None,
            masquerade: None,
            xdp: XdpMode::Off,
            fast_path: true,
        };
        let dataplane = BpfDataplane::start(&bed::paths(), &cgroup, options)?;
        let pods = (0..POD_COUNT).map(uid).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            dataplane,
            view: node(&pods, NODE_ADDRESS),
            frontends: frontends_id()?,
        })
    }

    /// Puts the bed's pods and its uplink into the packet path.
    pub(super) fn attach(&self, bed: &Bed, live: &[Ipv4Addr]) -> Result<()> {
        self.dataplane.apply_policies(&self.view)?;
        bed.node.run(|| {
            for pod in 0..POD_COUNT {
                let addresses = addresses(pod, live).into_iter().map(IpAddr::V4);
                self.dataplane.attach_pod(&PodInterface {
                    pod: uid(pod)?,
                    ifindex: if_nametoindex(format!("gvpod{pod}").as_str())?,
                    gateway_mac: GATEWAY_MAC,
                    pod_mac: pod_mac(pod),
                    addresses: addresses.collect(),
                    direct: true,
                    prepared: false,
                    bandwidth: Bandwidth::default(),
                })?;
            }
            let uplink = Uplink {
                index: if_nametoindex("eth0")?,
                name: "eth0".into(),
                kind: "veth".into(),
                mac: UPLINK_MAC,
                addresses: vec![IpAddr::V4(NODE_ADDRESS)],
            };
            Ok(self.dataplane.set_uplinks(&[uplink])?)
        })
    }

    /// Loads all Services of the model; how long planning and writing took.
    pub(super) fn load(&mut self, runtime: &Runtime, model: &Model) -> Result<Duration> {
        let next = super::layout_gantry::loaded(&self.view, model)?;
        self.apply(runtime, next)
    }

    /// The view after a change, to be applied.
    pub(super) fn after(&self, service: &Service) -> Result<View> {
        super::layout_gantry::changed(&self.view, service)
    }

    /// Plans and writes; how long it took.
    pub(super) fn apply(&mut self, runtime: &Runtime, view: View) -> Result<Duration> {
        let began = Instant::now();
        let stuck = runtime.block_on(self.dataplane.apply(&view))?;
        let took = began.elapsed();
        ensure!(stuck.is_empty(), "could not be programmed: {stuck:?}");
        self.view = view;
        Ok(took)
    }

    /// Packets that the programs dropped, by reason.
    pub(super) fn drops(&self) -> Result<String> {
        let drops = self.dataplane.drops()?.into_iter();
        let some = drops.filter(|(_, count)| *count > 0);
        let words: Vec<String> = some
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        Ok(words.join(", "))
    }

    /// Nanoseconds of one run of `from_pod` on a packet of a known flow to a Service, by
    /// BPF_PROG_TEST_RUN: the least of several means. The Service is its own backend, so that every
    /// run translates: the kernel does not put the packet back.
    pub(super) fn time_from_pod(&mut self, runtime: &Runtime, bed: &Bed) -> Result<f64> {
        self.apply(runtime, looped(&self.view, LOOP))?;
        let times = (0..7).map(|_| self.time_once(bed, LOOP));
        let times = times.collect::<Result<Vec<f64>>>()?;
        Ok(times.into_iter().fold(f64::INFINITY, f64::min))
    }

    fn time_once(&self, bed: &Bed, frontend: Ipv4Addr) -> Result<f64> {
        let program =
            SchedClassifier::from_program_info(self.info("from_pod")?, "from_pod".into())?;
        let frame = frame(frontend);
        bed.node.run(|| {
            // The kernel presents the frame as one that came by the client's interface.
            let mut ctx = [0; SK_BUFF_BYTES];
            let ifindex = if_nametoindex("gvpod0")?;
            ctx[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
            let mut out = vec![0; frame.len() + 256];
            let options = TestRunOptions {
                data_in: Some(&frame),
                data_out: Some(&mut out),
                ctx_in: Some(&ctx),
                repeat: REPEAT,
                ..TestRunOptions::default()
            };
            let result = program.test_run(options)?;
            ensure!(
                out[14 + 16..14 + 20] == frontend.octets(),
                "from_pod has translated the packet to somebody else"
            );
            Ok(result.duration.as_nanos() as f64)
        })
    }

    /// Nanoseconds of one run of `connect4` while `work` connects, by the kernel's own statistics, which
    /// cost some of them. (TEST_RUN does not know programs of this type.)
    pub(super) fn time_connect(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let enabled = aya::sys::enable_stats(Stats::RunTime)?;
        let before = self.info("connect4")?;
        work()?;
        let after = self.info("connect4")?;
        drop(enabled);
        let runs = after.run_count().saturating_sub(before.run_count());
        ensure!(runs > 0, "nothing has run connect4");
        let spent = after.run_time().saturating_sub(before.run_time());
        Ok(spent.as_nanos() as f64 / runs as f64)
    }

    fn info(&self, name: &str) -> Result<ProgramInfo> {
        let is_own = |program: &ProgramInfo| {
            let maps = program.map_ids().ok().flatten();
            program.name_as_str() == Some(name)
                && maps.is_some_and(|maps| maps.contains(&self.frontends))
        };
        let found = loaded_programs().filter_map(Result::ok).find(is_own);
        found.with_context(|| format!("program {name} is not loaded"))
    }
}

fn frontends_id() -> Result<u32> {
    let pins = bed::paths().bpf;
    let entries = fs::read_dir(&pins).with_context(|| format!("read {}", pins.display()))?;
    let mut maps = entries
        .flatten()
        .map(|entry| entry.path().join("FRONTENDS"));
    let pin = maps
        .find(|path| path.exists())
        .context("no map of frontends")?;
    Ok(MapInfo::from_pin(pin)?.id())
}

fn uid(pod: usize) -> Result<PodUid> {
    PodUid::new(&format!("bench-{pod}")).map_err(|error| anyhow::anyhow!("{error}"))
}

/// A TCP segment with 64 bytes from the client to `frontend`. Its TCP checksum is of no matter: it is
/// updated, never checked.
fn frame(frontend: Ipv4Addr) -> Vec<u8> {
    const DATA: usize = 64;
    let mut frame = GATEWAY_MAC.to_vec();
    frame.extend(pod_mac(0));
    frame.extend([0x08, 0]);
    let length = (20 + 20 + DATA) as u16;
    let mut header = [0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0].to_vec();
    header[2..4].copy_from_slice(&length.to_be_bytes());
    header.extend(CLIENT.octets());
    header.extend(frontend.octets());
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    header[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    frame.extend(header);
    frame.extend(40_000_u16.to_be_bytes());
    frame.extend(TARGET_PORT.to_be_bytes());
    frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0x20, 0, 0, 0, 0, 0]);
    frame.extend([0; DATA]);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_a_segment_whose_ip_checksum_holds() {
        let frame = frame(Ipv4Addr::new(10, 96, 0, 10));
        assert_eq!(frame.len(), 14 + 20 + 20 + 64);
        let header = frame[14..34].chunks(2);
        let sum: u32 = header
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }
}
