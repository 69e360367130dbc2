//! What the maps hold, in the words of Services: for `gantry svc` and for metrics. Pure.
//!
//! Read from the maps and not from what the agent means to have written, so that a difference shows.
//! The view only lends names: of pods, and of nodes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use ebpf_maps::services::{
    Addr, BACKEND_IN_USE, BACKEND_ON_TRIAL, BACKEND_RETIRED, BackendValue, FrontendKey,
    FrontendValue, SCOPE_ADDRESS, SCOPE_NODE_PORT, TrafficValue,
};
use gantry_api::proto;

use super::ejection::{Ejections, Standing, Target};
use super::index::{BackendSet, ip_of, parse_address};
use super::plan::BackendId;
use crate::view::{Backends, ServiceName};

/// One frontend as it is in the maps.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The Service it was programmed for; none: nobody's any more.
    pub service: Option<ServiceName>,
    /// Its key in FRONTENDS.
    pub key: FrontendKey,
    /// Its value there.
    pub value: FrontendValue,
    /// What its slots hold; none: they lie outside of the arena.
    pub slots: Option<Vec<(BackendId, BackendValue)>>,
}

/// How full a map is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fill {
    /// Its name.
    pub map: &'static str,
    /// Elements that are used, or not free yet.
    pub used: u32,
    /// All elements.
    pub limit: u32,
}

/// From here on somebody should be told.
const NEARLY_FULL_PERCENT: u64 = 90;

impl Fill {
    /// Additions will soon not fit.
    pub fn is_nearly_full(&self) -> bool {
        u64::from(self.used) * 100 >= u64::from(self.limit) * NEARLY_FULL_PERCENT
    }
}

/// Those that are nearly full, in words; "" when none is.
pub fn warning(fills: &[Fill]) -> String {
    let full = fills.iter().filter(|fill| fill.is_nearly_full());
    let words = full.map(|fill| {
        let Fill { map, used, limit } = fill;
        format!("{map} has {used} of {limit} entries")
    });
    words.collect::<Vec<_>>().join(", ")
}

/// Services in order of their names.
///
/// * `traffic` – what was done with a backend.
/// * `backends` – the view's backends of a Service, for the names of pods.
/// * `stuck` – what could not be programmed, and why.
pub fn show<'a>(
    entries: Vec<Entry>,
    traffic: impl Fn(BackendId) -> TrafficValue,
    backends: impl Fn(&ServiceName) -> Option<&'a Backends>,
    stuck: &BTreeMap<ServiceName, String>,
) -> Vec<proto::ProgrammedService> {
    let mut services: BTreeMap<ServiceName, proto::ProgrammedService> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let nobody = || ServiceName {
        namespace: String::new(),
        name: String::new(),
    };
    for (name, reason) in stuck {
        services
            .entry(name.clone())
            .or_default()
            .stuck
            .clone_from(reason);
    }
    let mut pods: HashMap<ServiceName, Pods<'a>> = HashMap::new();
    for entry in entries {
        let name = entry.service.unwrap_or_else(nobody);
        let service = services.entry(name.clone()).or_default();
        let slots = entry.slots.unwrap_or_default();
        let ids: BTreeSet<BackendId> = slots.iter().map(|(id, _)| *id).collect();
        service
            .frontends
            .push(frontend(&entry.key, &entry.value, ids.len()));
        let pods = pods
            .entry(name)
            .or_insert_with_key(|name| pods_of(backends(name)));
        for (id, value) in slots {
            if seen.insert(id) {
                service.backends.push(backend(&value, &traffic(id), pods));
            }
        }
    }
    let named = services.into_iter().map(|(name, mut service)| {
        service.namespace = name.namespace;
        service.name = name.name;
        service
            .frontends
            .sort_by_key(|f| (f.set, f.scope.clone(), f.address.clone(), f.port));
        service
            .backends
            .sort_by_key(|b| (b.set, b.address.clone(), b.port));
        service
    });
    named.collect()
}

/// Adds the backends that are left out because they do not answer; no slot holds them.
///
/// * `sets` – the Service's, with all of their backends.
pub fn show_left_out(
    service: &mut proto::ProgrammedService,
    sets: &[BackendSet],
    ejections: &Ejections,
    backends: Option<&Backends>,
    now: Duration,
) {
    let pods = pods_of(backends);
    let mut seen = BTreeSet::new();
    for set in sets {
        let standings = ejections.standings(&set.backends).into_iter();
        let out = (set.backends.iter().zip(standings)).filter(|(_, own)| *own == Standing::Out);
        for (backend, _) in out {
            let wait = Target::of(backend).and_then(|target| ejections.wait(&target, now));
            if !seen.insert(*backend) {
                continue;
            }
            let seconds = wait.unwrap_or_default().as_secs() + 1;
            let (pod, node) = pods.get(&backend.addr).copied().unwrap_or_default();
            service.backends.push(proto::ProgrammedBackend {
                address: bytes_of(&backend.addr),
                port: u16::from_be(backend.port_be).into(),
                protocol: backend.proto.into(),
                state: format!("left out: it does not answer; tried again in {seconds} s"),
                pod: pod.into(),
                node: node.into(),
                ..Default::default()
            });
        }
    }
}

/// Pod and node by address.
type Pods<'a> = HashMap<Addr, (&'a str, &'a str)>;

fn pods_of(backends: Option<&Backends>) -> Pods<'_> {
    let mut pods = Pods::new();
    for backend in backends.into_iter().flat_map(Backends::values) {
        for addr in backend
            .addresses
            .iter()
            .filter_map(|bytes| parse_address(bytes))
        {
            pods.insert(addr, (backend.pod_name.as_str(), backend.node.as_str()));
        }
    }
    pods
}

fn bytes_of(addr: &Addr) -> bytes::Bytes {
    match ip_of(addr) {
        IpAddr::V4(v4) => bytes::Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes::Bytes::copy_from_slice(&v6.octets()),
    }
}

fn frontend(key: &FrontendKey, value: &FrontendValue, count: usize) -> proto::ProgrammedFrontend {
    let scope = match key.scope {
        SCOPE_ADDRESS => "",
        SCOPE_NODE_PORT => "node port",
        _ => "from outside",
    };
    proto::ProgrammedFrontend {
        address: bytes_of(&key.addr),
        port: u16::from_be(key.port_be).into(),
        protocol: key.proto.into(),
        scope: scope.into(),
        generation: value.generation,
        set: value.service_id,
        backend_count: u32::try_from(count).unwrap_or(u32::MAX),
        affinity_s: value.affinity_s,
    }
}

fn backend(
    value: &BackendValue,
    traffic: &TrafficValue,
    pods: &Pods<'_>,
) -> proto::ProgrammedBackend {
    let (pod, node) = pods.get(&value.addr).copied().unwrap_or_default();
    let state = match value.state {
        BACKEND_IN_USE => "in use",
        BACKEND_ON_TRIAL => "on trial: it did not answer",
        BACKEND_RETIRED => "retired",
        _ => "unused",
    };
    proto::ProgrammedBackend {
        address: bytes_of(&value.addr),
        port: u16::from_be(value.port_be).into(),
        protocol: value.proto.into(),
        set: value.service_id,
        state: state.into(),
        generation: value.generation,
        pod: pod.into(),
        node: node.into(),
        chosen: traffic.chosen,
        // Below zero for a moment, where a repair met a close.
        connections: u64::try_from(traffic.connections as i64).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::index::{TCP, addr_of};

    fn name(text: &str) -> ServiceName {
        ServiceName {
            namespace: "shop".into(),
            name: text.into(),
        }
    }

    fn entry(service: Option<&str>, port: u16, scope: u8, ids: &[u32]) -> Entry {
        let addr = |last| addr_of(IpAddr::from([10, 244, 0, last]));
        let slots = ids.iter().map(|id| {
            let value = BackendValue {
                addr: addr(*id as u8),
                port_be: 8080u16.to_be(),
                proto: TCP,
                state: BACKEND_IN_USE,
                service_id: 7,
                ..BackendValue::default()
            };
            (BackendId(*id), value)
        });
        Entry {
            service: service.map(name),
            key: FrontendKey {
                addr: addr_of(IpAddr::from([10, 96, 0, 1])),
                port_be: port.to_be(),
                proto: TCP,
                scope,
            },
            value: FrontendValue {
                service_id: 7,
                generation: 42,
                ..FrontendValue::default()
            },
            slots: Some(slots.collect()),
        }
    }

    #[test]
    fn frontends_share_their_backends_and_each_is_shown_once() {
        let backend = proto::Backend {
            addresses: vec![vec![10, 244, 0, 1].into()],
            pod_name: "web-1".into(),
            node: "n1".into(),
            ..Default::default()
        };
        let backends: Backends = [("u1".to_owned(), std::sync::Arc::new(backend))]
            .into_iter()
            .collect();
        let traffic = |id: BackendId| TrafficValue {
            connections: if id.0 == 1 { u64::MAX } else { 2 },
            chosen: u64::from(id.0) * 10,
        };
        let entries = vec![
            // A table of slots names a backend many times.
            entry(Some("web"), 80, SCOPE_ADDRESS, &[1, 2, 1]),
            entry(Some("web"), 30_080, SCOPE_NODE_PORT, &[1, 2]),
            entry(None, 81, SCOPE_ADDRESS, &[]),
        ];
        let stuck = BTreeMap::from([(name("late"), "SLOTS is full".to_owned())]);
        let shown = show(
            entries,
            traffic,
            |of| (of.name == "web").then_some(&backends),
            &stuck,
        );
        let names: Vec<&str> = shown.iter().map(|service| service.name.as_str()).collect();
        assert_eq!(names, ["", "late", "web"]);
        assert_eq!(shown[1].stuck, "SLOTS is full");
        let web = &shown[2];
        assert_eq!(web.frontends.len(), 2);
        assert_eq!(
            (web.frontends[0].port, web.frontends[0].backend_count),
            (80, 2)
        );
        assert_eq!(
            (web.frontends[1].scope.as_str(), web.frontends[1].generation),
            ("node port", 42)
        );
        let backends: Vec<_> = web
            .backends
            .iter()
            .map(|b| (b.pod.as_str(), b.chosen, b.connections))
            .collect();
        assert_eq!(backends, [("web-1", 10, 0), ("", 20, 2)]);
    }

    #[test]
    fn a_map_is_told_of_before_it_is_full() {
        let fill = |used| Fill {
            map: "SLOTS",
            used,
            limit: 1000,
        };
        assert_eq!(warning(&[fill(899)]), "");
        assert_eq!(
            warning(&[fill(900), fill(0)]),
            "SLOTS has 900 of 1000 entries"
        );
    }
}
