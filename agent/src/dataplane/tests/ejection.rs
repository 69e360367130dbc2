//! Backends that do not answer, by real sockets of a pod: one whose queue of connections is full, one
//! that refuses, and the connects that do not happen to them any more. And what must leave nobody out:
//! what a policy drops, and what goes wrong in a namespace of the client's own.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ebpf_maps::services::{
    BACKEND_ON_TRIAL, BackendValue, FailureKey, FailureValue, SCOPE_OUTSIDE_ADDRESS, TrafficValue,
};
use ebpf_maps::uplink::UplinkValue;
use gantry_api::proto;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, connect, listen, socket,
};

use super::bed::{Bed, backend, block_on, ip, service, view};
use super::frames::{ACK, Mac, SYN, TCP, frame, tcp};
use super::maps::Maps;
use super::policy_wires::{pod, rule};
use super::programs::{OWN_IFINDEX, Programs};
use super::wires::{Namespace, V4, Wires, at, interface, patiently};
use crate::dataplane::{BackendChange, BpfDataplane, Dataplane};
use crate::ids::PodUid;
use crate::policy::PolicyName;
use crate::services::ejection::Standing;
use crate::view::View;

const FRONTEND: &str = "10.96.0.1:80";
/// Of pod 1; the last is the one that fails.
const PORTS: [u16; 4] = [8080, 8081, 8082, 8083];
const FAILING: usize = 3;
const PACE: Duration = Duration::from_millis(100);
/// Shorter than the time after which a SYN is sent again.
const PATIENCE: Duration = Duration::from_millis(150);

/// A node with two pods in the data plane, and Service `web` in front of four servers of pod 1.
struct Node {
    dataplane: BpfDataplane,
    view: View,
    wires: Wires,
    bed: Bed,
}

impl Node {
    fn new() -> Option<Self> {
        let wires = Wires::new()?;
        let bed = Bed::new()?;
        let dataplane = bed.start();
        let backends = PORTS.map(|port| backend(V4[1], port.into()));
        let mut view = view(1, vec![("web", service("10.96.0.1", 6, 80, &backends))]);
        let pods = [("pod-0", "web"), ("pod-1", "db")];
        let pods = pods.map(|(uid, name)| (PodUid::new(uid).unwrap(), Arc::new(pod(name))));
        view.pods = Arc::new(pods.into_iter().collect());
        for pod in [0, 1] {
            wires
                .node
                .run(|| dataplane.attach_pod(&interface(pod)).unwrap());
        }
        assert_eq!(dataplane.apply_policies(&view).unwrap(), []);
        block_on(dataplane.apply(&view)).unwrap();
        Some(Self {
            dataplane,
            view,
            wires,
            bed,
        })
    }

    /// The address of a server.
    fn server(&self, index: usize) -> SocketAddr {
        at(V4[1], PORTS[index])
    }

    /// A server that accepts all that comes.
    fn serve(&self, index: usize) -> TcpListener {
        let address = self.server(index);
        let listener = self.wires.pods[1].listen(address);
        listener.set_nonblocking(true).unwrap();
        listener
    }

    /// A server that is too busy to accept, and the connection that fills its queue.
    fn busy(&self, index: usize) -> (TcpListener, TcpStream) {
        let address = self.server(index);
        self.wires.pods[1].run(|| {
            let listener = patiently(|| TcpListener::bind(address));
            listen(&listener.as_fd(), Backlog::new(0).unwrap()).unwrap();
            let filler = TcpStream::connect(address).unwrap();
            (listener, filler)
        })
    }

    /// Connects as clients of this namespace do, for so long or until something changes; how many were not
    /// answered, and what changed.
    fn connect_for(
        &self,
        client: &Namespace,
        listeners: &[TcpListener],
        time: Duration,
        until: impl Fn(&BackendChange) -> bool,
    ) -> (u32, Vec<(Duration, BackendChange)>) {
        let begun = Instant::now();
        let frontend: SocketAddr = FRONTEND.parse().unwrap();
        let (mut failed, mut changes) = (0, Vec::new());
        while begun.elapsed() < time {
            failed += self.bed.joined(|| {
                client.run(|| {
                    let clients = (0..4).map(|_| TcpStream::connect_timeout(&frontend, PATIENCE));
                    clients.filter(Result::is_err).count() as u32
                })
            });
            for listener in listeners {
                while listener.accept().is_ok() {}
            }
            let now = block_on(self.dataplane.look_at_failures()).unwrap();
            let is_over = now.iter().any(&until);
            changes.extend(now.into_iter().map(|change| (begun.elapsed(), change)));
            if is_over {
                break;
            }
            std::thread::sleep(PACE);
        }
        (failed, changes)
    }

    fn states(&self) -> Vec<(u16, String)> {
        let asked = proto::ServicesRequest::default();
        let shown = block_on(self.dataplane.services(&asked)).unwrap();
        let mut named = shown.into_iter().filter(|service| service.name == "web");
        let backends = named.next().unwrap().backends.into_iter();
        backends
            .map(|backend| (backend.port as u16, backend.state))
            .collect()
    }

    /// How many are in use.
    fn in_use(&self) -> usize {
        let states = self.states().into_iter();
        states.filter(|(_, state)| state == "in use").count()
    }

    /// Pod 1 takes nothing but this; none: everything.
    fn ingress(&mut self, rules: Option<Vec<proto::PolicyRule>>) {
        let name = PolicyName {
            namespace: "d".into(),
            name: "db".into(),
        };
        let policies = Arc::make_mut(&mut self.view.policies);
        policies.clear();
        if let Some(incoming) = rules {
            let policy = proto::Policy {
                pod_selector_json: bytes::Bytes::from_static(br#"{"matchLabels":{"app":"db"}}"#),
                ingress: true,
                incoming,
                ..Default::default()
            };
            policies.insert(name, Arc::new(policy));
        }
        self.view.rev += 1;
        assert_eq!(self.dataplane.apply_policies(&self.view).unwrap(), []);
    }
}

fn is_out(change: &BackendChange) -> bool {
    change.standing == Standing::Out
}

fn never(_: &BackendChange) -> bool {
    false
}

const LIMIT: Duration = Duration::from_secs(10);

/// Out within three seconds, one connect lost to its trial, back when it has time again.
fn is_left_out_and_comes_back(node: &Node, client: &Namespace) {
    let listeners = [0, 1, 2].map(|index: usize| node.serve(index));
    let (busy, filler) = node.busy(FAILING);
    let (failed, changes) = node.connect_for(client, &listeners, LIMIT, is_out);
    assert!(failed >= 2, "{failed}");
    let (after, change) = changes.last().unwrap();
    assert!(*after <= Duration::from_secs(3), "{after:?}");
    assert_eq!(
        (change.address, change.standing),
        (node.server(FAILING), Standing::Out)
    );
    assert_eq!(change.service.name, "web");
    // Nobody gets it for the second that it is out.
    let time = Duration::from_millis(600);
    let (failed, changes) = node.connect_for(client, &listeners, time, is_out);
    assert_eq!((failed, changes.len()), (0, 0));
    let shown = node.states();
    let out = shown.iter().find(|(port, _)| *port == PORTS[FAILING]);
    let words = "left out: it does not answer; tried again in ";
    assert!(out.is_some_and(|(_, state)| state.starts_with(words)));
    assert_eq!(node.in_use(), 3);
    // On trial it costs one client one connect, and it is out again for longer.
    let time = Duration::from_secs(5);
    let (failed, changes) = node.connect_for(client, &listeners, time, is_out);
    assert_eq!(failed, 1, "{changes:?}");
    let standings: Vec<_> = changes.iter().map(|(_, change)| change.standing).collect();
    assert_eq!(standings, [Standing::OnTrial, Standing::Out]);
    assert_eq!(changes[1].1.times, 2);
    // It has time again.
    drop(filler);
    busy.set_nonblocking(true).unwrap();
    listen(&busy.as_fd(), Backlog::new(64).unwrap()).unwrap();
    let mut listeners = Vec::from(listeners);
    listeners.push(busy);
    let is_back = |change: &BackendChange| change.standing == Standing::Serving;
    let (failed, changes) = node.connect_for(client, &listeners, LIMIT, is_back);
    assert_eq!(failed, 0);
    assert_eq!(changes.last().unwrap().1.standing, Standing::Serving);
    assert_eq!(node.in_use(), 4, "{:?}", node.states());
    assert_eq!(node.dataplane.ejections(), [2, 1]);
}

#[test]
fn a_backend_with_a_full_queue_is_left_out_within_three_seconds_and_comes_back() {
    let Some(node) = Node::new() else { return };
    is_left_out_and_comes_back(&node, &node.wires.pods[0]);
}

#[test]
fn the_nodes_own_clients_notice_it_as_well() {
    let Some(node) = Node::new() else { return };
    is_left_out_and_comes_back(&node, &node.wires.node);
}

#[test]
fn clients_that_wait_are_noticed_by_what_the_kernel_sends_again() {
    let Some(node) = Node::new() else { return };
    let listeners = [0, 1, 2].map(|index: usize| node.serve(index));
    let (_busy, _filler) = node.busy(FAILING);
    let begun = Instant::now();
    // Longer than all that is waited for here: a SYN is sent again after a second.
    let frontend: SocketAddr = FRONTEND.parse().unwrap();
    let clients: Vec<OwnedFd> = node.bed.joined(|| {
        node.wires.pods[0].run(|| {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let clients = (0..24).map(|_| {
                let made = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
                let _ = connect(made.as_raw_fd(), &SockaddrStorage::from(frontend));
                made
            });
            clients.collect()
        })
    });
    let mut out = None;
    while out.is_none() && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(PACE);
        for listener in &listeners {
            while listener.accept().is_ok() {}
        }
        let changes = block_on(node.dataplane.look_at_failures()).unwrap();
        out = changes.into_iter().find(is_out);
    }
    assert_eq!(out.map(|change| change.address), Some(node.server(FAILING)));
    let took = begun.elapsed();
    assert!(took <= Duration::from_secs(3), "{took:?}");
    drop(clients);
}

#[test]
fn a_backend_that_refuses_is_left_out_and_if_all_do_none_is() {
    let Some(node) = Node::new() else { return };
    let client = &node.wires.pods[0];
    let listeners = [0, 1, 2].map(|index: usize| node.serve(index));
    let (_, changes) = node.connect_for(client, &listeners, LIMIT, is_out);
    let (after, change) = changes.last().unwrap();
    assert!(*after <= Duration::from_secs(3), "{after:?}");
    assert_eq!(change.address, node.server(FAILING));
    // The others refuse too: clients are told so, and not that nobody serves.
    drop(listeners);
    let (failed, _) = node.connect_for(client, &[], Duration::from_secs(3), never);
    assert!(failed > 20);
    assert!(node.in_use() >= 2, "{:?}", node.states());
}

#[test]
fn what_a_policy_drops_is_nobodys_fault() {
    let Some(mut node) = Node::new() else { return };
    let listeners = [0, 1, 2, 3].map(|index: usize| node.serve(index));
    let (first, last) = (PORTS[0].into(), PORTS[2].into());
    let allowed = proto::PolicyRule {
        any_peer: true,
        ..rule(&[(6, first, last)])
    };
    node.ingress(Some(vec![allowed]));
    let client = &node.wires.pods[0];
    let (failed, changes) = node.connect_for(client, &listeners, Duration::from_secs(3), never);
    assert!(failed >= 4, "{failed}");
    assert_eq!(changes, []);
    assert_eq!(node.in_use(), 4);
    node.ingress(None);
    let client = &node.wires.pods[0];
    let (failed, _) = node.connect_for(client, &listeners, Duration::from_secs(1), never);
    assert_eq!(failed, 0);
}

#[test]
fn what_does_not_leave_the_client_is_nobodys_fault() {
    let Some(node) = Node::new() else { return };
    // A namespace within a pod: its sockets are in the pod's cgroup, its packets go nowhere.
    let nested = Namespace::new();
    nested.run(|| {
        ip("link add hole type veth peer name nobody");
        ip("link set hole up");
        ip("link set nobody up");
        ip(&format!("addr add {}/24 dev hole", V4[0]));
        ip(&format!(
            "neigh add {} lladdr 02:00:00:00:00:01 dev hole",
            V4[1]
        ));
    });
    let (failed, changes) = node.connect_for(&nested, &[], Duration::from_secs(3), never);
    assert!(failed >= 8, "{failed}");
    assert_eq!(changes, []);
    assert_eq!(node.in_use(), 4);
}

const CLIENT_MAC: Mac = [2, 0, 0, 0, 0, 3];
const NODE_MAC: Mac = [2, 0, 0, 0, 0, 1];

/// Packets of clients whose sockets are not on this machine.
#[test]
fn answers_are_counted_where_a_backend_is_watched_and_one_on_trial_gets_one_flow() {
    let Some(mut node) = Programs::new() else {
        return;
    };
    let uplink = UplinkValue {
        v4: [0; 4],
        v6: [0; 4],
        mac: NODE_MAC,
        xdp: 0,
        _pad: 0,
    };
    let mut uplinks = node.hash::<u32, UplinkValue>("UPLINKS");
    uplinks.insert(OWN_IFINDEX, uplink, 0).unwrap();
    let address = "198.51.100.7:80";
    let backends = ["10.244.1.2:8080", "10.244.1.3:8080"];
    node.serve_as(address, TCP, SCOPE_OUTSIDE_ADDRESS, 10, 0, &backends);
    let key = |backend: &str| {
        let backend: SocketAddr = backend.parse().unwrap();
        FailureKey {
            addr: crate::services::index::addr_of(backend.ip()),
            port_be: backend.port().to_be(),
            _pad: 0,
        }
    };
    let mut failures = node.hash::<FailureKey, FailureValue>("FAILURES");
    let watched = FailureValue {
        resent: 1,
        ..FailureValue::default()
    };
    failures.insert(key(backends[0]), watched, 0).unwrap();
    for backend in backends {
        let answer = tcp(backend, "10.244.0.2:4000", SYN | ACK, b"");
        node.run("from_netdev", &frame(CLIENT_MAC, NODE_MAC, &answer));
    }
    let answered = FailureValue {
        answered: 1,
        ..watched
    };
    let rows: Vec<_> = failures.iter().map(Result::unwrap).collect();
    assert_eq!(rows, [(key(backends[0]), answered)]);

    let mut map = node.array::<BackendValue>("BACKENDS");
    let trial = BackendValue {
        state: BACKEND_ON_TRIAL,
        ..map.get(&10, 0).unwrap()
    };
    map.set(10, trial, 0).unwrap();
    let mut traffic = node.array::<TrafficValue>("TRAFFIC");
    for id in [10, 11] {
        traffic.set(id, TrafficValue::default(), 0).unwrap();
    }
    for port in 5000..5040 {
        let packet = tcp(&format!("192.0.2.100:{port}"), address, SYN, b"");
        node.run("from_netdev", &frame(CLIENT_MAC, NODE_MAC, &packet));
    }
    assert_eq!(traffic.get(&10, 0).unwrap().chosen, 1, "one flow, to see");
    assert_eq!(traffic.get(&11, 0).unwrap().chosen, 39);
}
