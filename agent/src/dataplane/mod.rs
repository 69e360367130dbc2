//! The eBPF side: loads, attaches and pins the programs, writes the maps, reads the counters.
//!
//! ```text
//!  View ─► bpf (what changed?) ─► services::{index, plan} ─► tables (maps, mapped arenas)
//!           │ start: bpffs ─► load (object, pinned maps) ─► hooks (pinned links on cgroups)
//!           ├ repair: sockets whose backend has gone
//!           └ cleanup: remove_all
//!  connects unanswered ─► failures ─► services::ejection ─► bpf (planned without them)
//!  View ─► policies (what pods may exchange: policy::{compile, plan}) ─► their maps
//!  links ────────► neighbours (who answers on them: whose addresses are taken over)
//!  uplinks ──────► uplinks (the same on the node's interfaces towards the outside) ─► xdp (in their drivers)
//!  flows ◄─ what the programs tell, while somebody watches
//!  pod networks ─► pods (rows, programs on the host ends of veths: clsact filters or tcx links)
//! ```
//! Invariants: only this module knows aya, and only `sys` makes raw system calls; maps and links
//! are pinned, so Services go on while the agent is dead; a restart replaces programs behind the
//! same links and writes only what has changed.

mod bandwidth;
mod bpffs;
mod clsact;
mod discovery;
mod ejection;
mod failures;
mod flows;
mod full;
mod hooks;
mod load;
mod near;
mod neighbours;
mod nodes;
mod pods;
mod policies;
mod repair;
mod sys;
mod tables;
mod takeover;
mod trial;
mod uplinks;
mod xdp;

pub mod bpf;
pub mod cleanup;

#[cfg(test)]
pub mod fake;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};

use async_trait::async_trait;
use gantry_api::bandwidth::{EGRESS_ANNOTATION, INGRESS_ANNOTATION, bits_per_second};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::proto;
use gantry_cni::uplinks::Uplink;
use tokio::sync::watch;

pub use self::bpf::{BpfDataplane, Options};
pub use self::cleanup::remove_all;
pub use self::ejection::look_after_backends;
pub use self::flows::{FlowNews, FlowWatch};
pub use self::full::FullMaps;
pub use self::neighbours::look_after_neighbours;
pub use self::trial::{SYN, SYN_ACK, Trial, TrialPacket, TrialPod, Tried};
pub use self::xdp::{XdpMode, XdpStanding};
use crate::ids::PodUid;
use crate::policy::StuckPod;
use crate::services::announce::Watch;
use crate::services::ejection::Standing;
use crate::services::liveness::Seen;
use crate::services::shown::Fill;
use crate::view::{ServiceName, View};

/// The clock of the events' times: nanoseconds.
pub fn monotonic_ns() -> u64 {
    sys::monotonic_ns()
}

/// The cookie of the calling thread's network namespace.
pub fn netns_cookie() -> std::io::Result<u64> {
    sys::netns_cookie()
}

/// A Service that could not be programmed; the others are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StuckService {
    /// `namespace/name`
    pub service: String,
    /// Why: which map is full, which field is out of range.
    pub reason: String,
}

/// Why the data plane could not follow at all.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The kernel refused a program, a map or an attachment.
    #[error("{what}: {reason}")]
    Kernel {
        /// Which program, map or hook.
        what: String,
        /// The kernel's answer and what to do about it.
        reason: String,
    },
}

impl DataplaneError {
    /// An error of the kernel about `what`, with advice where the code alone does not say it.
    fn kernel(what: impl Into<String>, error: &std::io::Error) -> Self {
        let advice = advice(error.raw_os_error());
        Self::Kernel {
            what: what.into(),
            reason: format!("{error}{advice}"),
        }
    }
}

/// What to do about the kernel's answer to a bpf call; starts with what it means.
fn advice(errno: Option<i32>) -> &'static str {
    match errno {
        Some(libc::EPERM | libc::EACCES) => {
            "; the agent is not allowed to use eBPF. Start it as root with CAP_BPF, CAP_NET_ADMIN and \
             CAP_SYS_ADMIN, outside of any container that is not privileged and without a seccomp \
             filter (systemd: SystemCallFilter=) that refuses bpf(); /sys/kernel/security/lockdown \
             must not say [confidentiality]"
        }
        Some(libc::ENOSYS) => {
            "; this kernel has no eBPF, and Services need it. Boot one with CONFIG_BPF_SYSCALL=y and \
             CONFIG_CGROUP_BPF=y, Linux 6.1 or newer"
        }
        Some(libc::EINVAL) => {
            "; this kernel does not know what was asked of it. Gantry needs Linux 6.1 or newer with \
             CONFIG_CGROUP_BPF=y (`uname -r` says what runs)"
        }
        Some(libc::ENOMEM) => {
            "; the agent's cgroup or the machine is out of memory. Free some, or raise the limit"
        }
        _ => "",
    }
}

/// How much a pod may send and be sent, in bits per second; none: as much as it likes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Bandwidth {
    /// What it is sent.
    pub ingress: Option<u64>,
    /// What it sends.
    pub egress: Option<u64>,
}

impl Bandwidth {
    /// As a pod's annotations say. What they should not say is refused by the API.
    pub fn of(pod: &Pod) -> Self {
        let limit = |name: &str| {
            let text = pod.metadata.annotations.as_ref()?.get(name)?;
            bits_per_second(text).ok()
        };
        Self {
            ingress: limit(INGRESS_ANNOTATION),
            egress: limit(EGRESS_ANNOTATION),
        }
    }
}

/// How a pod is joined to its node: what the packet programs need to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodInterface {
    /// The pod.
    pub pod: PodUid,
    /// The host end of its veth.
    pub ifindex: u32,
    /// Hardware address that the pod's packets to everybody else are addressed to: the bridge's, or that of
    /// the host end.
    pub gateway_mac: [u8; 6],
    /// Hardware address of the interface in the pod.
    pub pod_mac: [u8; 6],
    /// The pod's addresses: it may send from these and from no other.
    pub addresses: Vec<IpAddr>,
    /// Packets may be put into the pod at once, and sent on as they leave it: nothing else on the host end
    /// must see them.
    pub direct: bool,
    /// The programs are on it already: [`Dataplane::prepare_interface`] in this process.
    pub prepared: bool,
    /// What it is held to.
    pub bandwidth: Bandwidth,
}

/// The pods in the packet path, by the hashes of their UIDs (`services::index::label64`).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PodPlaces {
    /// Whose each address is.
    pub addresses: BTreeMap<IpAddr, u64>,
    /// Whose host end each interface is.
    pub interfaces: BTreeMap<u32, u64>,
}

/// Sums of what the programs counted: each with its name, also those that are 0.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Packets that were dropped, by reason: `ebpf_maps::drop::DROP_NAMES`.
    pub drops: Vec<(&'static str, u64)>,
    /// Everything else: `ebpf_maps::counter::COUNTER_NAMES`.
    pub events: Vec<(&'static str, u64)>,
}

/// A backend that was left out on this node, is on trial, or serves again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackendChange {
    /// One of the Services that have it.
    pub service: ServiceName,
    /// Where it listens.
    pub address: SocketAddr,
    /// What it was.
    pub was: Standing,
    /// What it is from now on.
    pub standing: Standing,
    /// How often it was left out since it last served well.
    pub times: u32,
}

/// A device that a container was given, where the device guard is attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceRule {
    /// Else a character device.
    pub is_block: bool,
    /// Its number.
    pub major: u32,
    /// Its number.
    pub minor: u32,
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
}

/// The service data plane of a node. One implementation, one fake in tests.
#[async_trait]
pub trait Dataplane: Send + Sync + 'static {
    /// Makes the kernel's state that of `view`. Idempotent; returns when every change is visible to
    /// new connections. Removals never fail; additions that do not fit are returned as stuck.
    async fn apply(&self, view: &View) -> Result<Vec<StuckService>, DataplaneError>;

    /// Makes the kernel's state that of the policies of `view`. Idempotent; blocks for as long as the
    /// writes take, and waits for nothing. A pod passes nothing before the first view that has it is
    /// applied. Returns the pods that pass nothing because their rules do not fit.
    fn apply_policies(&self, view: &View) -> Result<Vec<StuckPod>, DataplaneError>;

    /// Services as the maps have them now, those that are asked for.
    async fn services(
        &self,
        request: &proto::ServicesRequest,
    ) -> Result<Vec<proto::ProgrammedService>, DataplaneError>;

    /// How full the maps of Services were after the last apply.
    fn fill(&self) -> Vec<Fill>;

    /// Sockets that were ended since the agent's start because their backend had gone.
    fn sockets_ended(&self) -> u64;

    /// Puts the programs of pods on the host end of a veth whose pod is not known yet: nothing passes
    /// there before [`Dataplane::attach_pod`]. Idempotent. Blocks for the time of a few system calls.
    fn prepare_interface(&self, ifindex: u32) -> Result<(), DataplaneError>;

    /// What the programs counted since the maps were made, on all CPUs.
    fn counts(&self) -> Result<Counts, DataplaneError>;

    /// Watches flows, from now until the watch is dropped. To be called within a runtime.
    fn watch_flows(&self) -> Result<FlowWatch, DataplaneError> {
        Err(DataplaneError::Kernel {
            what: "flows".into(),
            reason: "this data plane tells of none".into(),
        })
    }

    /// Which pods are where: what an event's interface and addresses mean.
    fn pod_places(&self) -> PodPlaces {
        PodPlaces::default()
    }

    /// Programs to try packets on, with the tables of this moment. Blocks for the verifier's time.
    fn trial(&self) -> Result<Box<dyn Trial>, DataplaneError> {
        Err(DataplaneError::Kernel {
            what: "explain".into(),
            reason: "this data plane has no programs to try".into(),
        })
    }

    /// A pod's interface, if it is in the packet path.
    fn trial_pod(&self, _pod: &PodUid) -> Option<TrialPod> {
        None
    }

    /// Looks for backends that do not answer, and leaves them out or takes them in again. Cheap while all
    /// answer: two system calls. Returns what has changed.
    async fn look_at_failures(&self) -> Result<Vec<BackendChange>, DataplaneError>;

    /// How often since the agent's start a backend was left out, and how often one came back.
    fn ejections(&self) -> [u64; 2];

    /// Puts a pod into the packet path, before it can send. Idempotent; after the agent's start it is
    /// called for every pod that is there, and replaces the programs without a gap. Blocks for the
    /// time of a few system calls.
    fn attach_pod(&self, pod: &PodInterface) -> Result<(), DataplaneError>;

    /// Takes a pod out of it: to be called when its interface is gone and before its addresses are
    /// given to another. Idempotent.
    fn detach_pod(&self, pod: &PodUid) -> Result<(), DataplaneError>;

    /// Takes every pod out of it that is not in `live`: what a crash left behind. The policies of pods that a
    /// view has brought since stay.
    fn retain_pods(&self, live: &HashSet<PodUid>) -> Result<(), DataplaneError>;

    /// Makes these interfaces, and no others, the ways by which clients outside of the nodes reach
    /// Services. Idempotent. Blocks for the time of a few system calls.
    fn set_uplinks(&self, uplinks: &[Uplink]) -> Result<(), DataplaneError>;

    /// Pods' own addresses are sent to these of other nodes only, because their answers come by the way that
    /// they are asked; none: to all of them. Idempotent.
    async fn set_near(&self, near: Option<&BTreeSet<IpAddr>>) -> Result<(), DataplaneError>;

    /// The nodes whose load balancer addresses this one may have to take over; none: not known yet.
    fn watched_nodes(&self) -> watch::Receiver<Option<Watch>>;

    /// What was seen of them. Until it is called for the first time since the agent's start, the addresses
    /// that are announced stay what they are. Idempotent.
    async fn set_seen(&self, seen: &Seen) -> Result<(), DataplaneError>;
    /// How each uplink's frames are looked at, and why not as it was wanted.
    fn xdp(&self) -> Vec<XdpStanding> {
        Vec::new()
    }

    /// A privileged container's cgroup: its processes may open every device. Needed where the
    /// device guard is attached (pure cgroup v2). Idempotent.
    fn exempt_devices(&self, cgroup: &std::path::Path) -> Result<(), DataplaneError>;

    /// The devices that a container's cgroup was given, all of them. Needed where the device guard
    /// is attached. Idempotent.
    fn allow_devices(
        &self,
        cgroup: &std::path::Path,
        rules: &[DeviceRule],
    ) -> Result<(), DataplaneError>;

    /// Takes both back; to be called while the cgroup is still there. Idempotent.
    fn end_device_exemption(&self, cgroup: &std::path::Path) -> Result<(), DataplaneError>;
}
