//! One packet program at a time, without any interface: BPF_PROG_TEST_RUN on maps of its own.
//!
//! The kernel presents the frame as one that came by `lo`, so index 1 is the interface of the pod
//! under test. What a redirect does beyond its verdict is seen in `wires`.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{Map, MapData, PerCpuArray, RingBuf};
use aya::programs::{Program, SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader, Pod};
use ebpf_maps::drop::DROP_NAMES;
use ebpf_maps::endpoint::{DIRECT, EndpointValue, InterfaceValue, NEAR_COUNT, near_place};
use ebpf_maps::event::{Budget, FlowEvent};
use ebpf_maps::policy::{POLICY_OPEN, PodPolicies, open_place};
use ebpf_maps::services::Addr;

use super::frames::Mac;
use super::maps::Maps;
use crate::dataplane::near::NearMap;
use crate::dataplane::{load, sys, xdp};
use crate::services::index::addr_of;

/// The index of the interface under test.
pub(super) const OWN_IFINDEX: u32 = 1;
/// The size of `struct __sk_buff`, and where its `ingress_ifindex` is; `ifindex` follows.
const SK_BUFF_BYTES: usize = 192;
const INGRESS_IFINDEX: usize = 36;
/// `TC_ACT_UNSPEC`: goes on.
pub(super) const PASS: i32 = -1;
/// `TC_ACT_REDIRECT`: put into a pod.
pub(super) const REDIRECT: i32 = 7;
/// `TC_ACT_SHOT`
pub(super) const SHOT: i32 = 2;

/// The programs that see packets, on new maps that nothing pins. Each is loaded when it runs first: the verifier
/// has most of a test's time, on an emulated machine ten seconds a program.
pub(super) struct Programs {
    ebpf: Ebpf,
    near: NearMap,
    endpoints: BTreeMap<Addr, EndpointValue>,
}

/// What became of a frame.
#[derive(Debug)]
pub(super) struct Outcome {
    pub verdict: i32,
    pub frame: Vec<u8>,
    /// The reason that was counted, if any was.
    pub dropped: Option<&'static str>,
}

impl Maps for Programs {
    fn data(&self, name: &str) -> MapData {
        let map = match self.ebpf.map(name).unwrap() {
            Map::Array(map) | Map::HashMap(map) | Map::LruHashMap(map) | Map::PerCpuArray(map) => {
                map
            }
            _ => panic!("{name} is of a kind that no test needs"),
        };
        MapData::from_id(map.info().unwrap().id()).unwrap()
    }
}

impl Programs {
    /// None, with the reason on stderr, without root.
    pub(super) fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let ebpf = EbpfLoader::new().btf(None).load(load::OBJECT).unwrap();
        let Some(Map::Array(near)) = ebpf.map("NEAR") else {
            panic!("NEAR is no array");
        };
        let mut near = NearMap::map(near.fd().as_fd()).unwrap();
        for place in 0..NEAR_COUNT {
            near.settle(place, std::iter::empty()).unwrap();
        }
        Some(Self {
            ebpf,
            near,
            endpoints: BTreeMap::new(),
        })
    }

    /// A packet program, loaded.
    fn classifier(&mut self, name: &str) -> &SchedClassifier {
        let ebpf = &mut self.ebpf;
        let is_loaded = |program: &Program| program.fd().is_ok();
        if !ebpf.program(name).is_some_and(is_loaded) {
            load::load_program(ebpf, name).unwrap();
        }
        let Some(Program::SchedClassifier(classifier)) = ebpf.program(name) else {
            panic!("{name} is no packet program");
        };
        classifier
    }

    /// A trie of the object.
    pub(super) fn trie<K: Pod, V: Pod>(&mut self, name: &str) -> LpmTrie<&mut MapData, K, V> {
        self.ebpf.map_mut(name).unwrap().try_into().unwrap()
    }

    /// A pod of this node: its rows, as the agent writes them.
    pub(super) fn add_pod(&mut self, pod_id: u64, ifindex: u32, pod_mac: Mac, addresses: &[&str]) {
        let gateway_mac = [0x0e, 0, 0, 0, 0, ifindex as u8];
        let interface = InterfaceValue {
            pod_id,
            pod_mac,
            gateway_mac,
            flags: 0,
        };
        self.set_policies(pod_id, POLICY_OPEN, POLICY_OPEN);
        let mut interfaces = self.hash::<u32, InterfaceValue>("INTERFACES");
        interfaces.insert(ifindex, interface, 0).unwrap();
        for address in addresses {
            let endpoint = EndpointValue {
                pod_id,
                ifindex,
                flags: DIRECT,
                pod_mac,
                gateway_mac,
                _pad: [0; 4],
            };
            let addr = addr_of(address.parse().unwrap());
            self.near.doubt(&addr).unwrap();
            let mut endpoints = self.hash::<Addr, EndpointValue>("ENDPOINTS");
            endpoints.insert(addr, endpoint, 0).unwrap();
            self.endpoints.insert(addr, endpoint);
            let rows = self.endpoints.iter();
            self.near.settle(near_place(&addr), rows).unwrap();
        }
    }

    /// The pod's policies, by number.
    pub(super) fn set_policies(&mut self, pod_id: u64, ingress: u32, egress: u32) {
        let row = PodPolicies {
            pod_id,
            ingress,
            egress,
        };
        let is_open = [ingress, egress] == [POLICY_OPEN; 2];
        let mut open = self.array::<u64>("OPEN_PODS");
        open.set(open_place(pod_id), 0, 0).unwrap();
        let mut pods = self.hash::<u64, PodPolicies>("POLICY_PODS");
        pods.insert(pod_id, row, 0).unwrap();
        if is_open {
            open.set(open_place(pod_id), pod_id, 0).unwrap();
        }
    }

    /// Runs a program once.
    pub(super) fn run(&mut self, program: &str, frame: &[u8]) -> Outcome {
        self.run_from(program, frame, 0)
    }

    /// The same for a frame that came by the interface `ingress_ifindex`; 0: the node made it.
    pub(super) fn run_from(
        &mut self,
        program: &str,
        frame: &[u8],
        ingress_ifindex: u32,
    ) -> Outcome {
        let before = self.drops();
        let mut out = vec![0; frame.len() + 256];
        // `struct __sk_buff`; of the two fields, one is where it came from and the other its own.
        let mut ctx = [0; SK_BUFF_BYTES];
        ctx[INGRESS_IFINDEX..INGRESS_IFINDEX + 4].copy_from_slice(&ingress_ifindex.to_ne_bytes());
        ctx[INGRESS_IFINDEX + 4..INGRESS_IFINDEX + 8].copy_from_slice(&OWN_IFINDEX.to_ne_bytes());
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: (ingress_ifindex != 0).then_some(&ctx[..]),
            ..TestRunOptions::default()
        };
        let result = self.classifier(program).test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        let after = self.drops();
        let dropped = (0..before.len()).find(|index| after[*index] > before[*index]);
        Outcome {
            verdict: result.return_value as i32,
            frame: out,
            dropped: dropped.map(|index| DROP_NAMES[index]),
        }
    }

    /// Nanoseconds of one run, the least mean of many: what else the machine does only ever adds. The frame
    /// is what the run before has left.
    pub(super) fn time(&mut self, program: &str, frame: &[u8]) -> u128 {
        let mut out = vec![0; frame.len() + 256];
        let classifier = self.classifier(program);
        let mut mean = || {
            let options = TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                repeat: 2_000,
                ..TestRunOptions::default()
            };
            classifier.test_run(options).unwrap().duration.as_nanos()
        };
        (0..1_000).map(|_| mean()).min().unwrap_or(0)
    }

    /// Somebody watches until then, nanoseconds of the monotonic clock; 0: nobody does.
    pub(super) fn watch(&mut self, until_ns: u64) {
        self.array::<u64>("WATCH").set(0, until_ns, 0).unwrap();
    }

    /// What was told since the last call.
    pub(super) fn events(&mut self) -> Vec<FlowEvent> {
        let mut ring = RingBuf::try_from(self.ebpf.map_mut("EVENTS").unwrap()).unwrap();
        let mut events = Vec::new();
        while let Some(item) = ring.next() {
            assert_eq!(item.len(), size_of::<FlowEvent>());
            events.push(sys::read_pod(&item).unwrap());
        }
        events
    }

    /// Events of a kind that were told in the last tick and not told ever, on all CPUs.
    pub(super) fn budget(&self, kind: u32) -> (u64, u64) {
        let budgets = self.ebpf.map("BUDGETS").unwrap();
        let budgets: PerCpuArray<&MapData, Budget> = budgets.try_into().unwrap();
        let all = budgets.get(&kind, 0).unwrap();
        let sum = |of: fn(&Budget) -> u64| all.iter().map(of).sum();
        (sum(|budget| budget.told), sum(|budget| budget.missed))
    }

    /// Loads all, and returns the instructions that the verifier walked, by program.
    pub(super) fn verified(&mut self) -> Vec<(String, u32)> {
        load::load_hooks(&mut self.ebpf).unwrap();
        load::load_program(&mut self.ebpf, xdp::PROGRAM).unwrap();
        let programs = self.ebpf.programs();
        let infos = programs.filter_map(|(name, program)| match program {
            Program::SchedClassifier(classifier) => Some((name, classifier.info())),
            Program::Xdp(xdp) => Some((name, xdp.info())),
            Program::CgroupSockAddr(socket) => Some((name, socket.info())),
            Program::CgroupSock(socket) => Some((name, socket.info())),
            _ => None,
        });
        infos
            .map(|(name, info)| {
                let count = info.unwrap().verified_instruction_count();
                (name.to_owned(), count.unwrap_or(0))
            })
            .collect()
    }

    fn drops(&self) -> Vec<u64> {
        let drops = self.ebpf.map("DROPS").unwrap();
        let drops: PerCpuArray<&MapData, u64> = drops.try_into().unwrap();
        let count = DROP_NAMES.len() as u32;
        let sum = |index: u32| drops.get(&index, 0).unwrap().iter().sum();
        (0..count).map(sum).collect()
    }
}
