//! The packet programs of pods: rows in the maps, then programs on the host end of the pod's veth.
//!
//! ```text
//!  attach   INTERFACES, ENDPOINTS, NEAR ─► from_pod (ingress), to_pod (egress)
//!             clsact: filter of priority 1, handle 1, made or replaced
//!             tcx, where the kernel has no such filters:
//!                     no pin, or its interface is gone ─► link ─► pin
//!                     pinned                           ─► the program behind the link is replaced
//!  prepare  clsact filters alone, for an interface that waits for its pod
//!  detach   ENDPOINTS, INTERFACES ─► pins             (a filter goes with its interface)
//! ```
//! Rows come first: an interface that has a program and no row passes nothing. Everything is found
//! by the pod's id, the hash of its UID, so an agent that starts, or one that was killed half-way,
//! needs no other record.
//!
//! Invariants: a row is removed only by the pod that owns it; attaching again changes nothing that
//! a packet could see.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError};
use aya::programs::ProgramFd;
use ebpf_maps::endpoint::{
    DIRECT, ENDPOINT_COUNT_MAX, EndpointValue, INTERFACE_COUNT_MAX, InterfaceValue, LIMITED,
    NEAR_COUNT, near_place,
};
use ebpf_maps::services::Addr;

use super::bandwidth::BandwidthMap;
use super::clsact::{self, Direction};
use super::load::{absent_is_fine, failed, program_fd, take_map, unexpected};
use super::near::NearMap;
use super::{Bandwidth, DataplaneError, PodInterface, PodPlaces, TrialPod, hooks, sys};
use crate::ids::PodUid;
use crate::paths::Paths;
use crate::services::index::{addr_of, ip_of, label64};

/// A program of an interface.
pub(super) struct Hook {
    /// The function in `ebpf/programs/src/main.rs`.
    pub program: &'static str,
    pub direction: Direction,
}

/// What a pod is sent is judged before it can send.
pub(super) const POD_HOOKS: [Hook; 2] = [
    Hook {
        program: "to_pod",
        direction: Direction::Egress,
    },
    Hook {
        program: "from_pod",
        direction: Direction::Ingress,
    },
];

impl Direction {
    /// `enum bpf_attach_type`: BPF_TCX_INGRESS, BPF_TCX_EGRESS.
    fn tcx(self) -> u32 {
        match self {
            Self::Ingress => 46,
            Self::Egress => 47,
        }
    }
}

/// How programs come onto an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Attachment {
    /// Links: Linux 6.6.
    Tcx,
    /// Filters of a qdisc.
    Clsact,
}

impl Attachment {
    /// Asks the kernel, by an interface that cannot exist.
    pub(super) fn probe(program: BorrowedFd<'_>) -> Self {
        match sys::link_create_tcx(program, 0, Direction::Ingress.tcx()) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Self::Clsact,
            _ => Self::Tcx,
        }
    }
}

/// The pods that have programs, and what is needed to give them to more.
pub(super) struct PodPrograms {
    links: PathBuf,
    programs: Vec<(&'static Hook, ProgramFd)>,
    attachment: Attachment,
    endpoints: HashMap<MapData, Addr, EndpointValue>,
    near: NearMap,
    interfaces: HashMap<MapData, u32, InterfaceValue>,
    bandwidth: BandwidthMap,
    /// What the maps hold: whose it is.
    owners: Owners,
}

#[derive(Default)]
struct Owners {
    addresses: BTreeMap<Addr, EndpointValue>,
    interfaces: BTreeMap<u32, u64>,
}

impl PodPrograms {
    /// Takes maps and loaded programs out of the object, and reads what is attached already.
    pub(super) fn take(ebpf: &mut Ebpf, paths: &Paths) -> Result<Self, DataplaneError> {
        let mut programs = Vec::new();
        for hook in &POD_HOOKS {
            let program = program_fd(ebpf, hook.program)?.try_clone();
            let program = program.map_err(|error| DataplaneError::kernel(hook.program, &error))?;
            programs.push((hook, program));
        }
        let endpoints = take_map(ebpf, "ENDPOINTS")?.try_into();
        let interfaces = take_map(ebpf, "INTERFACES")?.try_into();
        let mut taken = Self {
            links: hooks::directory(paths),
            programs,
            // A tcx link makes its maker wait for a grace period of the kernel, with the lock of all
            // interfaces held: 9 ms a program here, at attaching and at the interface's end.
            attachment: Attachment::Clsact,
            endpoints: endpoints.map_err(|error: MapError| unexpected("ENDPOINTS", error))?,
            near: NearMap::take(ebpf)?,
            interfaces: interfaces.map_err(|error: MapError| unexpected("INTERFACES", error))?,
            bandwidth: BandwidthMap::take(ebpf)?,
            owners: Owners::default(),
        };
        for row in taken.endpoints.iter() {
            let (addr, value) = row.map_err(|error| failed("read ENDPOINTS", &error))?;
            taken.owners.addresses.insert(addr, value);
        }
        let mut by_place: BTreeMap<u32, Vec<(Addr, EndpointValue)>> = BTreeMap::new();
        for (addr, row) in &taken.owners.addresses {
            by_place
                .entry(near_place(addr))
                .or_default()
                .push((*addr, *row));
        }
        for place in 0..NEAR_COUNT {
            let rows = by_place.get(&place).into_iter().flatten();
            taken
                .near
                .settle(place, rows.map(|(addr, row)| (addr, row)))?;
        }
        for row in taken.interfaces.iter() {
            let (ifindex, value) = row.map_err(|error| failed("read INTERFACES", &error))?;
            taken.owners.interfaces.insert(ifindex, value.pod_id);
        }
        Ok(taken)
    }

    /// See [`super::Dataplane::pod_places`].
    pub(super) fn places(&self) -> PodPlaces {
        let addresses = self.owners.addresses.iter();
        PodPlaces {
            addresses: addresses
                .map(|(addr, row)| (ip_of(addr), row.pod_id))
                .collect(),
            interfaces: self.owners.interfaces.clone(),
        }
    }

    /// See [`super::Dataplane::trial_pod`].
    pub(super) fn trial_pod(&self, pod: &PodUid) -> Option<TrialPod> {
        let pod_id = label64(pod.as_str());
        let mut rows = self.owners.interfaces.iter();
        let (ifindex, _) = rows.find(|(_, owner)| **owner == pod_id)?;
        let row = self.interfaces.get(ifindex, 0).ok()?;
        Some(TrialPod::of(*ifindex, &row))
    }

    /// By which means; tests compare both.
    #[cfg(test)]
    pub(super) fn attachment(&mut self) -> &mut Attachment {
        &mut self.attachment
    }

    /// From now on by the means that uplinks have on this kernel.
    #[cfg(test)]
    pub(super) fn probe_attachment(&mut self) {
        if let Some((_, program)) = self.programs.first() {
            self.attachment = Attachment::probe(program.as_fd());
        }
    }

    /// See [`super::Dataplane::attach_pod`].
    pub(super) fn attach(&mut self, pod: &PodInterface) -> Result<(), DataplaneError> {
        let pod_id = label64(pod.pod.as_str());
        let addresses: BTreeSet<Addr> = pod.addresses.iter().copied().map(addr_of).collect();
        self.remove_rows(pod_id, |addr| addresses.contains(addr), Some(pod.ifindex))?;
        self.bandwidth.set(pod_id, pod.bandwidth)?;
        let limited = match pod.bandwidth == Bandwidth::default() {
            true => 0,
            false => LIMITED,
        };
        let value = InterfaceValue {
            pod_id,
            pod_mac: pod.pod_mac,
            gateway_mac: pod.gateway_mac,
            flags: limited,
        };
        (self.interfaces.insert(pod.ifindex, value, 0))
            .map_err(|error| full("INTERFACES", INTERFACE_COUNT_MAX, &error))?;
        self.owners.interfaces.insert(pod.ifindex, pod_id);
        for addr in addresses {
            let value = EndpointValue {
                pod_id,
                ifindex: pod.ifindex,
                flags: limited | if pod.direct { DIRECT } else { 0 },
                pod_mac: pod.pod_mac,
                gateway_mac: pod.gateway_mac,
                _pad: [0; 4],
            };
            self.near.doubt(&addr)?;
            (self.endpoints.insert(addr, value, 0))
                .map_err(|error| full("ENDPOINTS", ENDPOINT_COUNT_MAX, &error))?;
            self.owners.addresses.insert(addr, value);
            self.settle(near_place(&addr))?;
        }
        if pod.prepared {
            return Ok(());
        }
        for (hook, program) in &self.programs {
            let by_link = || {
                let pin = self.links.join(pin_name(pod_id, hook));
                attach_tcx(&pin, hook.direction, program.as_fd(), pod.ifindex)
            };
            let attached = match self.attachment {
                Attachment::Tcx => by_link(),
                Attachment::Clsact => match by_filter(hook, program.as_fd(), pod.ifindex) {
                    // No such modules: links, where the kernel has them, else say what lacks.
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                        by_link().map_err(|_| error)
                    }
                    other => other,
                },
            };
            attached.map_err(|error| {
                let whose = format!("{} of pod {}", pod.ifindex, pod.pod);
                DataplaneError::kernel(attaching(hook, whose), &error)
            })?;
        }
        Ok(())
    }

    /// See [`super::Dataplane::prepare_interface`]. By filters only: a link is pinned by its pod.
    pub(super) fn prepare(&self, ifindex: u32) -> Result<(), DataplaneError> {
        for (hook, program) in &self.programs {
            by_filter(hook, program.as_fd(), ifindex)
                .map_err(|error| DataplaneError::kernel(attaching(hook, ifindex), &error))?;
        }
        Ok(())
    }

    /// See [`super::Dataplane::detach_pod`].
    pub(super) fn detach(&mut self, pod: &PodUid) -> Result<(), DataplaneError> {
        self.detach_id(label64(pod.as_str()))
    }

    /// See [`super::Dataplane::retain_pods`].
    pub(super) fn retain<'a>(
        &mut self,
        live: impl Iterator<Item = &'a PodUid>,
    ) -> Result<(), DataplaneError> {
        let live: BTreeSet<u64> = live.map(|pod| label64(pod.as_str())).collect();
        let owners = &self.owners;
        let mut found: BTreeSet<u64> = owners.addresses.values().map(|row| row.pod_id).collect();
        found.extend(owners.interfaces.values());
        found.extend(self.bandwidth.pods());
        let pins = fs::read_dir(&self.links).into_iter().flatten().flatten();
        found.extend(pins.filter_map(|pin| pod_of_pin(pin.file_name().to_str()?)));
        let mut first = Ok(());
        for pod_id in found.difference(&live) {
            first = first.and(self.detach_id(*pod_id));
        }
        first
    }

    fn detach_id(&mut self, pod_id: u64) -> Result<(), DataplaneError> {
        self.remove_rows(pod_id, |_| false, None)?;
        self.bandwidth.set(pod_id, Bandwidth::default())?;
        for hook in &POD_HOOKS {
            let pin = self.links.join(pin_name(pod_id, hook));
            match fs::remove_file(&pin) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    let what = format!("unpin {}", pin.display());
                    return Err(DataplaneError::kernel(what, &error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Programs find again what ENDPOINTS has at this place of NEAR.
    fn settle(&mut self, place: u32) -> Result<(), DataplaneError> {
        self.near.settle(place, self.owners.addresses.iter())
    }

    /// Removes the rows of this pod, but for those that it is to keep.
    fn remove_rows(
        &mut self,
        pod_id: u64,
        keep: impl Fn(&Addr) -> bool,
        interface: Option<u32>,
    ) -> Result<(), DataplaneError> {
        let rows = self.owners.addresses.iter();
        let of_pod = rows.filter(|(_, row)| row.pod_id == pod_id);
        let gone: Vec<Addr> = of_pod
            .map(|(addr, _)| *addr)
            .filter(|addr| !keep(addr))
            .collect();
        for addr in gone {
            self.near.doubt(&addr)?;
            absent_is_fine(self.endpoints.remove(&addr))
                .map_err(|error| failed("remove from ENDPOINTS", &error))?;
            self.owners.addresses.remove(&addr);
            self.settle(near_place(&addr))?;
        }
        let owners = &mut self.owners;
        let of_pod = owners.interfaces.iter().filter(|(_, id)| **id == pod_id);
        let gone: Vec<u32> = of_pod.map(|(ifindex, _)| *ifindex).collect();
        for ifindex in gone
            .into_iter()
            .filter(|ifindex| Some(*ifindex) != interface)
        {
            absent_is_fine(self.interfaces.remove(&ifindex))
                .map_err(|error| failed("remove from INTERFACES", &error))?;
            owners.interfaces.remove(&ifindex);
        }
        Ok(())
    }
}

fn by_filter(hook: &Hook, program: BorrowedFd<'_>, ifindex: u32) -> io::Result<()> {
    clsact::attach(ifindex, hook.direction, hook.program, program)
}

fn attaching(hook: &Hook, to: impl std::fmt::Display) -> String {
    format!("attach program {} to interface {to}", hook.program)
}

/// `pod-<id>-from_pod`: bpffs allows no dot in a name.
fn pin_name(pod_id: u64, hook: &Hook) -> String {
    format!("pod-{pod_id:016x}-{}", hook.program)
}

fn pod_of_pin(name: &str) -> Option<u64> {
    let (id, _) = name.strip_prefix("pod-")?.split_once('-')?;
    u64::from_str_radix(id, 16).ok()
}

/// Puts a program on an interface by a pinned link, or in the place of the one that is pinned.
pub(super) fn attach_tcx(
    pin: &Path,
    direction: Direction,
    program: BorrowedFd<'_>,
    ifindex: u32,
) -> io::Result<()> {
    attach_pinned(pin, program, ifindex, || {
        sys::link_create_tcx(program, ifindex, direction.tcx())
    })
}

/// Puts a program on an interface by the link that is pinned here, or by a new one.
pub(super) fn attach_pinned(
    pin: &Path,
    program: BorrowedFd<'_>,
    ifindex: u32,
    create: impl FnOnce() -> io::Result<OwnedFd>,
) -> io::Result<()> {
    match sys::open_pinned(pin) {
        Ok(link) => {
            if sys::link_info(link.as_fd())?.ifindex == ifindex {
                return sys::link_update(link.as_fd(), program);
            }
            // Of an interface that is gone, or another one.
            fs::remove_file(pin)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let link = create()?;
    // If this fails the link goes with its descriptor: nothing is left behind.
    sys::pin(link.as_fd(), pin)
}

pub(super) fn full(map: &str, count_max: u32, error: &MapError) -> DataplaneError {
    match error {
        MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
            DataplaneError::Kernel {
                what: format!("write {map}"),
                reason: format!(
                    "full: it holds {count_max}; run fewer pods on this node (--max-pods)"
                ),
            }
        }
        other => failed(&format!("write {map}"), other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_tells_its_pod() {
        for pod_id in [0, 7, u64::MAX] {
            for hook in &POD_HOOKS {
                assert_eq!(pod_of_pin(&pin_name(pod_id, hook)), Some(pod_id));
            }
        }
        assert_eq!(pod_of_pin("connect4"), None);
        assert_eq!(pod_of_pin("pod-x-to_pod"), None);
    }
}
