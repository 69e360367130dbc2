//! What is explained, beside what happens: the same node tries a connection on its programs, and then
//! real sockets make it.

use std::net::SocketAddr;
use std::sync::Arc;

use ebpf_maps::flow::{FlowKey, FlowValue};
use ebpf_maps::policy;
use gantry_api::proto;

use super::frames::TCP;
use super::maps::Maps;
use super::policy_wires::{Node, rule};
use super::wires::{V4, V6, at, interface, tcp_between};
use crate::dataplane::DataplaneError;
use crate::dataplane::trial::{BpfTrial, Trial};
use crate::explain::{ClientFacts, Local, ServerFacts, decide_client, decide_server};
use crate::ids::PodUid;
use crate::view::ServiceName;

/// Of the cluster IPs.
const PREFIXES: [&str; 2] = ["10.96.0.", "fd00:96::"];

fn bytes(address: &str) -> bytes::Bytes {
    match address.parse().unwrap() {
        std::net::IpAddr::V4(v4) => bytes::Bytes::copy_from_slice(&v4.octets()),
        std::net::IpAddr::V6(v6) => bytes::Bytes::copy_from_slice(&v6.octets()),
    }
}

/// Service `db` in front of pod 1, and `nobody` in front of nothing.
fn with_services(node: &mut Node) -> Vec<proto::ProgrammedService> {
    let mut programmed = Vec::new();
    for (number, name) in [(1, "db"), (2, "nobody")] {
        let addresses = PREFIXES.map(|prefix| format!("{prefix}{number}"));
        let name = ServiceName {
            namespace: "d".into(),
            name: name.into(),
        };
        let service = proto::Service {
            cluster_ips: addresses.iter().map(|address| bytes(address)).collect(),
            ports: vec![proto::ServicePort {
                name: "sql".into(),
                protocol: 6,
                port: 80,
                node_port: 0,
            }],
            r#type: "ClusterIP".into(),
            ..Default::default()
        };
        Arc::make_mut(&mut node.view.services).insert(name.clone(), Arc::new(service));
        let mut of = proto::ProgrammedService {
            namespace: "d".into(),
            name: name.name.clone(),
            ..Default::default()
        };
        for (family, address) in addresses.iter().enumerate() {
            let backend = at([V4, V6][family][1], 8080).to_string();
            let backends: Vec<&str> = if number == 1 { vec![&backend] } else { vec![] };
            let base = 10 * number + 4 * family as u32;
            let frontend = at(address, 80).to_string();
            node.wires.serve(&frontend, TCP, base, &backends);
            of.frontends.push(proto::ProgrammedFrontend {
                address: bytes(address),
                port: 80,
                protocol: 6,
                set: base,
                backend_count: backends.len() as u32,
                ..Default::default()
            });
        }
        programmed.push(of);
        if number == 1 {
            let backend = proto::Backend {
                addresses: vec![bytes(V4[1]), bytes(V6[1])],
                node: "n1".into(),
                pod_name: "db".into(),
                pod_namespace: "d".into(),
                ..Default::default()
            };
            let backends = [("b".to_owned(), Arc::new(backend))].into_iter().collect();
            Arc::make_mut(&mut node.view.backends).insert(name, Arc::new(backends));
        }
    }
    programmed
}

/// Both parts as the control plane would ask for them.
fn explain(node: &Node, programmed: &[proto::ProgrammedService], to: &str) -> (bool, String) {
    let (service, port) = to.rsplit_once(':').unwrap();
    let request = proto::ExplainClient {
        service: service.into(),
        port: port.into(),
        udp: false,
    };
    let wires = &node.wires;
    wires.node.run(|| {
        let local: Vec<Local> = [0, 1]
            .map(|pod| {
                let uid = PodUid::new(&format!("pod-{pod}")).unwrap();
                Local {
                    interface: wires.programs.trial_pod(&uid).unwrap(),
                    addresses: interface(pod).addresses,
                    uid,
                }
            })
            .into();
        let trial = || -> Result<Box<dyn Trial>, DataplaneError> {
            Ok(Box::new(BpfTrial::load(&wires.paths)?))
        };
        let facts = ClientFacts {
            view: Arc::new(node.view.clone()),
            node: "n1".into(),
            uid: PodUid::new("pod-0").unwrap(),
            local: local.clone(),
            programmed: programmed
                .iter()
                .filter(|of| of.name == if service == "nobody" { "nobody" } else { "db" })
                .cloned()
                .collect(),
        };
        let half = decide_client(&facts, &request, trial).unwrap();
        eprintln!("{to}: {half:#?}");
        if !half.ok {
            return (false, half.conclusion);
        }
        let facts = ServerFacts {
            view: Arc::new(node.view.clone()),
            local,
        };
        let next = half.next.unwrap();
        let half = decide_server(&facts, &next, trial).unwrap();
        eprintln!("{half:#?}");
        (half.ok, half.conclusion)
    })
}

/// Everything that packets leave behind.
fn traces(node: &Node) -> (usize, usize, u64) {
    let flows = node.wires.hash::<FlowKey, FlowValue>("FLOWS");
    let allowed = node.wires.hash::<policy::FlowKey, u64>("POLICY_FLOWS");
    let reasons = ["policy", "no_backend", "source_address"];
    let dropped = reasons.map(|reason| node.wires.dropped(reason));
    (
        flows.keys().count(),
        allowed.keys().count(),
        dropped.iter().sum(),
    )
}

#[test]
fn what_is_explained_is_what_happens_and_leaves_no_trace() {
    let Some(mut node) = Node::new() else { return };
    let programmed = with_services(&mut node);
    node.apply();
    let connects = |node: &Node, family: usize| {
        let [web, db] = &node.wires.pods;
        let server: SocketAddr = at([V4, V6][family][1], 8080);
        tcp_between(web, db, server).is_ok()
    };
    let before = traces(&node);
    let names = ["db:80", "db.d.svc:sql", "10.96.0.1:80", "[fd00:96::1]:80"];
    for name in names {
        assert_eq!(
            explain(&node, &programmed, name),
            (true, String::new()),
            "{name}"
        );
    }
    assert_eq!(
        explain(&node, &programmed, "10.244.0.3:8080"),
        (true, String::new())
    );
    let (ok, why) = explain(&node, &programmed, "nobody:80");
    assert_eq!((ok, why.as_str()), (false, "refused: no endpoint is ready"));

    // Isolated at the server, then allowed by one policy, then isolated at the client.
    node.ingress(Vec::new());
    for name in ["db:80", "[fd00:96::1]:80", "10.244.0.3:8080"] {
        let (ok, why) = explain(&node, &programmed, name);
        let expected = "dropped at ingress: NetworkPolicy d/db selects db and no rule allows web";
        assert_eq!((ok, why.as_str()), (false, expected), "{name}");
    }
    assert_eq!(
        traces(&node),
        before,
        "nothing is counted, nothing is remembered"
    );
    assert!(!connects(&node, 0) && !connects(&node, 1));

    node.set_members(&[V4[0], V6[0]]);
    let allowed = proto::PolicyRule {
        sets: vec!["web".into()],
        ..rule(&[(6, 8080, 8080)])
    };
    node.ingress(vec![allowed]);
    assert_eq!(explain(&node, &programmed, "db:80"), (true, String::new()));
    assert!(connects(&node, 0) && connects(&node, 1));

    let egress = proto::Policy {
        egress: true,
        ..Default::default()
    };
    node.set("web", Some(egress));
    let before = traces(&node);
    let (ok, why) = explain(&node, &programmed, "db:80");
    let expected = "dropped at egress: NetworkPolicy d/web selects web and no rule allows d/db (10.244.0.3:8080)";
    assert_eq!((ok, why.as_str()), (false, expected));
    assert_eq!(traces(&node), before);
    assert!(!connects(&node, 0));
}
