//! The maps. The agent pins all of them, so their contents outlive it; see `ebpf_maps` for what
//! the rows mean and who writes them.

use core::arch::asm;

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use ebpf_maps::bandwidth::{BANDWIDTH_COUNT_MAX, BandwidthKey, BandwidthValue};
use ebpf_maps::counter::COUNTER_COUNT;
use ebpf_maps::device::{DEVICE_EXEMPT_COUNT_MAX, DEVICE_RULE_COUNT_MAX, DeviceRuleKey};
use ebpf_maps::drop::DROP_COUNT;
use ebpf_maps::endpoint::{
    ENDPOINT_COUNT_MAX, EndpointValue, INTERFACE_COUNT_MAX, InterfaceValue, NEAR_COUNT, NearValue,
    near_place,
};
use ebpf_maps::event::{BUDGET_COUNT, Budget, EVENTS_BYTES, SEEN_COUNT_MAX};
use ebpf_maps::flow::{FLOW_COUNT_MAX, FlowKey, FlowValue, ZONE_COUNT};
use ebpf_maps::policy::{
    self, OPEN_POD_COUNT, PEER_PREFIX_COUNT_MAX, POLICY_POD_COUNT_MAX, PodPolicies, RULE_COUNT_MAX,
    RuleKey,
};
use ebpf_maps::services::{
    AFFINITY_COUNT_MAX, Addr, AffinityKey, AffinityValue, BACKEND_COUNT, BackendValue,
    FAILURE_COUNT_MAX, FRONTEND_COUNT_MAX, FailureKey, FailureValue, FrontendKey, FrontendValue,
    NODE_ADDRESS_COUNT_MAX, PEER_COUNT_MAX, PeerValue, REVERSE_COUNT_MAX, ReverseKey, ReverseValue,
    SLOT_COUNT, SLOTS_PER_ELEMENT, SOURCE_RANGE_COUNT_MAX, SourceRangeKey, TrafficValue,
};
use ebpf_maps::uplink::{
    ANNOUNCED_COUNT_MAX, MASQUERADE_COUNT_MAX, SWITCH_COUNT, UPLINK_COUNT_MAX, UplinkValue,
};

use crate::way::{WAY_COUNT, Way};
use crate::work::Work;

/// What clients address. Written by the agent only, one element at a time.
#[map]
pub static FRONTENDS: HashMap<FrontendKey, FrontendValue> =
    HashMap::with_max_entries(FRONTEND_COUNT_MAX, BPF_F_NO_PREALLOC);

/// The arena of backend ids, two per element. Written by the agent only, through its mapping.
#[map]
pub static SLOTS: Array<[u32; SLOTS_PER_ELEMENT as usize]> =
    Array::with_max_entries(SLOT_COUNT / SLOTS_PER_ELEMENT, BPF_F_MMAPABLE);

/// Where connections go. Written by the agent only, through its mapping.
#[map]
pub static BACKENDS: Array<BackendValue> = Array::with_max_entries(BACKEND_COUNT, BPF_F_MMAPABLE);

/// Who may use the restricted frontends from outside. Written by the agent only.
#[map]
pub static SOURCE_RANGES: LpmTrie<SourceRangeKey, u32> =
    LpmTrie::with_max_entries(SOURCE_RANGE_COUNT_MAX, BPF_F_NO_PREALLOC);

/// The addresses of all nodes: where node ports answer. `NODE_OWN` or `NODE_OTHER`.
#[map]
pub static NODE_ADDRESSES: HashMap<Addr, u32> =
    HashMap::with_max_entries(NODE_ADDRESS_COUNT_MAX, BPF_F_NO_PREALLOC);

/// Which frontend a connected socket went through, by its cookie. All elements exist from the
/// start, and there is no order of age to keep: with it a connect through a Service costs 0.22 us
/// more than one to the pod, with `REVERSE_NAT` it was 0.44. Written by the programs only, which
/// remove the entry with its socket.
#[map]
pub static PEERS: HashMap<u64, PeerValue> = HashMap::with_max_entries(PEER_COUNT_MAX, 0);

/// What was done with each backend, by its id. The programs add and subtract; the agent reads, clears
/// it for a new backend, and repairs counts of connections whose end they could not see.
#[map]
pub static TRAFFIC: Array<TrafficValue> = Array::with_max_entries(BACKEND_COUNT, BPF_F_MMAPABLE);

/// Who did not answer connects lately. Written by the programs; the agent takes entries out.
#[map]
pub static FAILURES: HashMap<FailureKey, FailureValue> =
    HashMap::with_max_entries(FAILURE_COUNT_MAX, BPF_F_NO_PREALLOC);

/// Which frontend an unconnected datagram went through. Written by the programs only.
#[map]
pub static REVERSE_NAT: LruHashMap<ReverseKey, ReverseValue> =
    LruHashMap::with_max_entries(REVERSE_COUNT_MAX, 0);

/// Which backend a client had last. Written by the programs only.
#[map]
pub static AFFINITY: LruHashMap<AffinityKey, AffinityValue> =
    LruHashMap::with_max_entries(AFFINITY_COUNT_MAX, 0);

/// `ebpf_maps::counter`.
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTER_COUNT, 0);

/// The pods of this node by their addresses. Written by the agent only.
#[map]
pub static ENDPOINTS: HashMap<Addr, EndpointValue> =
    HashMap::with_max_entries(ENDPOINT_COUNT_MAX, BPF_F_NO_PREALLOC);

/// The same again, where they are found without a call. Written by the agent only, through its mapping.
#[map]
pub static NEAR: Array<NearValue> = Array::with_max_entries(NEAR_COUNT, BPF_F_MMAPABLE);

/// The pod of this node that has this address.
#[inline(always)]
pub fn endpoint(addr: &Addr) -> Option<&'static EndpointValue> {
    let near = NEAR.get(near_place(addr))?;
    let is_here = near.value.ifindex != 0
        && near.addr[3] == addr[3]
        && near.addr[2] == addr[2]
        && near.addr[1] == addr[1]
        && near.addr[0] == addr[0];
    if is_here {
        return Some(&near.value);
    }
    if near.is_whole != 0 {
        return None;
    }
    // SAFETY: the element stays mapped while the program runs; if it is reused meanwhile, the packet
    // goes to the pod that has taken the place, which drops what is not addressed to it.
    ENDPOINTS.get_ptr(addr).map(|value| unsafe { &*value })
}

/// The pods of this node by the host ends of their veths. Written by the agent only.
#[map]
pub static INTERFACES: HashMap<u32, InterfaceValue> =
    HashMap::with_max_entries(INTERFACE_COUNT_MAX, BPF_F_NO_PREALLOC);

/// What pods may send and be sent. The agent makes the rows, the programs move their time.
#[map]
pub static BANDWIDTH: HashMap<BandwidthKey, BandwidthValue> =
    HashMap::with_max_entries(BANDWIDTH_COUNT_MAX, BPF_F_NO_PREALLOC);

/// The node's interfaces towards the outside, by index. Written by the agent only.
#[map]
pub static UPLINKS: HashMap<u32, UplinkValue> =
    HashMap::with_max_entries(UPLINK_COUNT_MAX, BPF_F_NO_PREALLOC);

/// Addresses on no interface of which this node says that it has them. Written by the agent only.
#[map]
pub static ANNOUNCED: HashMap<Addr, u32> =
    HashMap::with_max_entries(ANNOUNCED_COUNT_MAX, BPF_F_NO_PREALLOC);

/// Which addresses are pods of this node, and who is sent those as they are. Written by the agent only.
#[map]
pub static MASQUERADE: LpmTrie<Addr, u32> =
    LpmTrie::with_max_entries(MASQUERADE_COUNT_MAX, BPF_F_NO_PREALLOC);

/// What is done at all: 0 or 1 each. Written by the agent only.
#[map]
pub static SWITCHES: Array<u32> = Array::with_max_entries(SWITCH_COUNT, 0);

/// Whether one of them is on.
#[inline(always)]
pub fn is_on(switch: u32) -> bool {
    match SWITCHES.get(switch) {
        Some(on) => *on != 0,
        None => false,
    }
}

/// `ebpf_maps::flow`. Written by the programs only.
#[map]
pub static FLOWS: LruHashMap<FlowKey, FlowValue> = LruHashMap::with_max_entries(FLOW_COUNT_MAX, 0);

/// Where a packet program works: see [`Work`].
#[map]
static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);

/// See [`Way`].
#[map]
pub static WAYS: PerCpuArray<Way> = PerCpuArray::with_max_entries(WAY_COUNT, 0);

/// This CPU's place to work. None cannot happen, but the verifier wants it looked at.
#[inline(always)]
pub fn work() -> Option<&'static mut Work> {
    // SAFETY: the pointer is this CPU's own element. Packet programs run with soft interrupts off,
    // and one ends before the next begins: no two have it at once.
    WORK.get_ptr_mut(0).map(|work| unsafe { &mut *work })
}

/// The same where a caller may hold it.
#[inline(always)]
pub fn work_in_use() -> Option<*mut Work> {
    WORK.get_ptr_mut(0)
}

/// The same for a function that is verified by itself: the place that its caller has passed to it. Linux 6.1
/// takes no key of a map from what is behind an argument of such a function.
#[inline(always)]
pub fn work_of(held: *mut Work) -> Option<&'static mut Work> {
    let mut work = held;
    let own = WORK.get_ptr_mut(0)?;
    // SAFETY: both are this CPU's own element. Seen as made from the argument, because the caller's reference
    // to it is unique: what is written by it would not be there, and what is written here not seen.
    unsafe {
        asm!("{} = {}", inout(reg) work, in(reg) own);
        Some(&mut *work)
    }
}

/// Until when somebody watches, nanoseconds of the monotonic clock; 0: nobody. Written by the agent only.
#[map]
pub static WATCH: Array<u64> = Array::with_max_entries(1, 0);

/// `ebpf_maps::event::FlowEvent`s. Written by the programs only.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(EVENTS_BYTES, 0);

/// Flows that were told: when, and in the lower 8 bits the points at which. Written by the programs only.
#[map]
pub static SEEN: LruHashMap<u64, u64> = LruHashMap::with_max_entries(SEEN_COUNT_MAX, 0);

/// How much this CPU has told. Written by the programs only.
#[map]
pub static BUDGETS: PerCpuArray<Budget> = PerCpuArray::with_max_entries(BUDGET_COUNT, 0);

/// Which zones of FLOWS were ever used: 0 or 1 each. Written by the programs only.
#[map]
pub static ZONES: Array<u32> = Array::with_max_entries(ZONE_COUNT, 0);

/// `ebpf_maps::drop`.
#[map]
pub static DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(DROP_COUNT, 0);

/// What is allowed to each pod and from it. This and the next three are written by the agent only.
#[map]
pub static POLICY_PODS: HashMap<u64, PodPolicies> =
    HashMap::with_max_entries(POLICY_POD_COUNT_MAX, BPF_F_NO_PREALLOC);

/// Pods that POLICY_PODS says are open both ways. Written by the agent only, through its mapping.
#[map]
pub static OPEN_PODS: Array<u64> = Array::with_max_entries(OPEN_POD_COUNT, BPF_F_MMAPABLE);

/// The identity of a peer, by its address; the longest prefix counts.
#[map]
pub static POLICY_PEERS: LpmTrie<Addr, u32> =
    LpmTrie::with_max_entries(PEER_PREFIX_COUNT_MAX, BPF_F_NO_PREALLOC);

/// What is there is allowed; a prefix stands for every port or protocol that begins with it.
#[map]
pub static POLICY_RULES: LpmTrie<RuleKey, u8> =
    LpmTrie::with_max_entries(RULE_COUNT_MAX, BPF_F_NO_PREALLOC);

/// What policies have allowed, and when it was last used.
#[map]
pub static POLICY_FLOWS: LruHashMap<policy::FlowKey, u64> =
    LruHashMap::with_max_entries(policy::FLOW_COUNT_MAX, 0);

/// Ids of the cgroups (of privileged pods) that the device guard lets pass.
#[map]
pub static DEVICE_EXEMPT: HashMap<u64, u32> =
    HashMap::with_max_entries(DEVICE_EXEMPT_COUNT_MAX, BPF_F_NO_PREALLOC);

/// Devices that single containers were given. Written by the agent only.
#[map]
pub static DEVICE_RULES: HashMap<DeviceRuleKey, u32> =
    HashMap::with_max_entries(DEVICE_RULE_COUNT_MAX, BPF_F_NO_PREALLOC);

/// Adds to a word of a map that programs of other CPUs add to at the same time. Rust has no atomic
/// addition for a target without compare-and-swap; alone, without a result, it is an instruction of
/// every kernel.
///
/// # Safety
/// `word` is 8 bytes of a map's element, aligned, and was checked by a lookup.
#[inline(always)]
pub unsafe fn add(word: *mut u64, change: i64) {
    // SAFETY: the caller's promise.
    unsafe { asm!("lock *(u64 *)({} + 0) += {}", in(reg) word, in(reg) change) }
}

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(counter: u32) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter) {
        // SAFETY: the pointer is this CPU's own element, checked by the lookup, and programs of
        // one CPU do not run in the middle of each other at these hooks.
        unsafe { *value += 1 }
    }
}
