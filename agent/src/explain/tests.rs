//! Explanations on made-up facts, with a trial that says what it is told to.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ebpf_maps::event::{FlowEvent, IS_TRANSLATED, NOT_DROPPED};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::proto;
use gantry_api::proto::backend::State;

use super::target::{Target, resolve, service_port};
use super::{ClientFacts, Local, decide_client};
use crate::dataplane::{DataplaneError, Trial, TrialPacket, TrialPod, Tried};
use crate::ids::PodUid;
use crate::services::index::addr_of;
use crate::view::{ServiceName, Settings, View};

fn bytes(address: &str) -> bytes::Bytes {
    match address.parse().unwrap() {
        IpAddr::V4(v4) => bytes::Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes::Bytes::copy_from_slice(&v6.octets()),
    }
}

fn name(namespace: &str, name: &str) -> ServiceName {
    ServiceName {
        namespace: namespace.into(),
        name: name.into(),
    }
}

fn port(name: &str, protocol: u32, port: u32) -> proto::ServicePort {
    proto::ServicePort {
        name: name.into(),
        protocol,
        port,
        node_port: 0,
    }
}

/// shop/web (10.96.0.1, http 80/TCP, dns 53/UDP), shop/head (headless), shop/out (an alias).
fn view() -> View {
    let mut view = View {
        settings: Arc::new(Settings {
            cluster_domain: "cluster.local".into(),
            ..Settings::default()
        }),
        ..View::default()
    };
    let services = Arc::make_mut(&mut view.services);
    let web = proto::Service {
        cluster_ips: vec![bytes("10.96.0.1")],
        ports: vec![port("http", 6, 80), port("dns", 17, 53)],
        ..Default::default()
    };
    services.insert(name("shop", "web"), Arc::new(web));
    let head = proto::Service {
        ports: vec![port("http", 6, 80)],
        ..Default::default()
    };
    services.insert(name("shop", "head"), Arc::new(head));
    let out = proto::Service {
        r#type: "ExternalName".into(),
        external_name: "example.com".into(),
        ..Default::default()
    };
    services.insert(name("shop", "out"), Arc::new(out));
    view
}

#[test]
fn a_name_means_what_the_pods_resolver_would_say() {
    let view = view();
    let service = |text: &str| resolve(&view, text, "shop");
    let web = Ok(Target::Service(name("shop", "web")));
    for text in [
        "web",
        "WEB.shop",
        "web.shop.svc",
        "web.shop.svc.cluster.local",
        "web.shop.svc.cluster.local.",
        "10.96.0.1",
    ] {
        assert_eq!(service(text), web, "{text}");
    }
    let address = Target::Address("10.0.0.9".parse().unwrap());
    assert_eq!(service("10.0.0.9"), Ok(address));
    let address = Target::Address("fd00::9".parse().unwrap());
    assert_eq!(service("[fd00::9]"), Ok(address));
    for text in ["db", "web.other", "www.example.com"] {
        assert!(service(text).is_err(), "{text}");
    }
}

#[test]
fn a_port_is_a_number_or_a_name() {
    let view = view();
    let web = &view.services[&name("shop", "web")];
    let found =
        |text: &str, udp| service_port(web, text, udp).map(|port| (port.port, port.protocol));
    assert_eq!(found("80", false), Ok((80, 6)));
    assert_eq!(found("http", false), Ok((80, 6)));
    assert_eq!(found("dns", true), Ok((53, 17)));
    assert_eq!(
        found("53", false),
        Ok((53, 17)),
        "there is nothing else at 53"
    );
    let none = "the Service has no port 81; it has http 80/TCP, dns 53/UDP";
    assert_eq!(found("81", false), Err(none.to_owned()));
    assert!(found("http", true).is_err());
}

/// Sends everything on to one backend, or drops it.
struct FakeTrial {
    backend: SocketAddr,
    frontend: SocketAddr,
    reason: u8,
}

impl Trial for FakeTrial {
    fn sent(&mut self, _pod: &TrialPod, packet: &TrialPacket) -> Result<Tried, DataplaneError> {
        let event = FlowEvent {
            source: addr_of(packet.source.ip()),
            destination: addr_of(self.backend.ip()),
            destination_port_be: self.backend.port().to_be(),
            reason: self.reason,
            flags: IS_TRANSLATED,
            ..FlowEvent::default()
        };
        Ok(Tried {
            passes: self.reason == NOT_DROPPED,
            event: Some(event),
            source: packet.source,
            destination: self.backend,
        })
    }

    fn received(
        &mut self,
        _pod: &TrialPod,
        packet: &TrialPacket,
        _by_node: bool,
    ) -> Result<Tried, DataplaneError> {
        Ok(Tried {
            passes: true,
            event: None,
            source: self.frontend,
            destination: packet.destination,
        })
    }
}

fn facts(states: &[State]) -> ClientFacts {
    let mut view = view();
    let uid = PodUid::new("u").unwrap();
    let pod: Pod = serde_json::from_value(serde_json::json!({
        "metadata": {"namespace": "shop", "name": "client"}, "spec": {"containers": []},
    }))
    .unwrap();
    view.pods = Arc::new(BTreeMap::from([(uid.clone(), Arc::new(pod))]));
    let backends = states.iter().enumerate().map(|(i, state)| {
        let backend = proto::Backend {
            addresses: vec![bytes(&format!("10.0.0.{}", i + 1))],
            ports: vec![proto::BackendPort {
                name: "http".into(),
                protocol: 6,
                port: 8080,
            }],
            state: (*state).into(),
            node: "n2".into(),
            pod_name: format!("web-{}", i + 1),
            pod_namespace: "shop".into(),
            ..Default::default()
        };
        (i.to_string(), Arc::new(backend))
    });
    let backends: crate::view::Backends = backends.collect();
    for service in ["web", "head"] {
        let backends = Arc::new(backends.clone());
        Arc::make_mut(&mut view.backends).insert(name("shop", service), backends);
    }
    let frontend = proto::ProgrammedFrontend {
        address: bytes("10.96.0.1"),
        port: 80,
        protocol: 6,
        backend_count: states.len() as u32,
        generation: 42,
        ..Default::default()
    };
    ClientFacts {
        view: Arc::new(view),
        node: "n1".into(),
        local: vec![Local {
            uid: uid.clone(),
            addresses: vec!["10.0.0.100".parse().unwrap()],
            interface: TrialPod {
                ifindex: 1,
                pod_mac: [0; 6],
                gateway_mac: [0; 6],
            },
        }],
        uid,
        programmed: vec![proto::ProgrammedService {
            namespace: "shop".into(),
            name: "web".into(),
            frontends: vec![frontend],
            ..Default::default()
        }],
    }
}

fn told(facts: &ClientFacts, service: &str, port: &str, reason: u8) -> proto::ExplainHalf {
    let request = proto::ExplainClient {
        service: service.into(),
        port: port.into(),
        udp: false,
    };
    let trial = || -> Result<Box<dyn Trial>, DataplaneError> {
        Ok(Box::new(FakeTrial {
            backend: "10.0.0.1:8080".parse().unwrap(),
            frontend: match service {
                "web" => "10.96.0.1:80".parse().unwrap(),
                _ => "10.0.0.1:8080".parse().unwrap(),
            },
            reason,
        }))
    };
    decide_client(facts, &request, trial).unwrap()
}

#[test]
fn a_connection_is_told_step_by_step() {
    let facts = facts(&[State::Serving]);
    let half = told(&facts, "web", "http", NOT_DROPPED);
    assert!(half.ok, "{half:?}");
    let steps: Vec<&str> = half.steps.iter().map(|step| step.about.as_str()).collect();
    assert_eq!(steps, ["name", "frontend", "backend", "egress", "answer"]);
    assert_eq!(half.backend, "shop/web-1 (10.0.0.1:8080)");
    assert_eq!(half.next_node, "n2");
    let next = half.next.unwrap();
    assert_eq!((next.server_port, &*next.client_name), (8080, "client"));
}

#[test]
fn what_is_wrong_is_the_conclusion() {
    let ready = facts(&[State::Serving]);
    let draining = facts(&[State::NotReady, State::Draining]);
    let no_backend = ebpf_maps::drop::NO_BACKEND as u8;
    let spoofed = ebpf_maps::drop::SOURCE_ADDRESS as u8;
    let cases = [
        (
            &ready,
            "db",
            "80",
            NOT_DROPPED,
            "name",
            "there is no Service db in namespace shop",
        ),
        (
            &ready,
            "web",
            "81",
            NOT_DROPPED,
            "port",
            "the Service has no port 81",
        ),
        (
            &ready,
            "out",
            "80",
            NOT_DROPPED,
            "name",
            "an alias of example.com",
        ),
        (
            &ready,
            "web",
            "dns",
            NOT_DROPPED,
            "frontend",
            "not programmed on node n1",
        ),
        (
            &ready,
            "web",
            "80",
            no_backend,
            "backend",
            "refused: no endpoint is ready",
        ),
        (
            &ready,
            "web",
            "80",
            spoofed,
            "egress",
            "dropped at client: source_address",
        ),
        (
            &draining,
            "head",
            "80",
            NOT_DROPPED,
            "name",
            "web-1 is not ready, web-2 is ending",
        ),
        (
            &ready,
            "10.0.0.9",
            "http",
            NOT_DROPPED,
            "port",
            "give a number",
        ),
        (
            &ready,
            "fd00::9",
            "80",
            NOT_DROPPED,
            "route",
            "no address of the family",
        ),
    ];
    for (facts, service, port, reason, about, conclusion) in cases {
        let half = told(facts, service, port, reason);
        let last = half.steps.last().unwrap();
        assert_eq!(
            (half.ok, last.ok, last.about.as_str()),
            (false, false, about),
            "{half:?}"
        );
        assert!(
            half.conclusion.contains(conclusion),
            "{conclusion}: {half:?}"
        );
    }
    let half = told(&draining, "web", "80", no_backend);
    assert!(
        half.steps
            .last()
            .unwrap()
            .text
            .contains("web-1 is not ready"),
        "{half:?}"
    );
    assert!(
        told(&ready, "head", "80", NOT_DROPPED).ok,
        "a headless Service's backend itself"
    );
}
