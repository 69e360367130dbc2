//! Names, filters and words of events.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use ebpf_maps::drop;
use ebpf_maps::event::{
    AT_INGRESS, FlowEvent, IS_TRANSLATED, NO_IP, NOT_DROPPED, POINT_CONNECT, POINT_FROM_POD,
    POINT_TO_POD,
};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::proto;
use proptest::prelude::*;

use super::names::{Names, Namespaces};
use super::shown::{Clock, Filter, show};
use crate::dataplane::PodPlaces;
use crate::ids::PodUid;
use crate::services::index::{addr_of, label64};
use crate::view::{ServiceName, View};

fn bytes(address: &str) -> bytes::Bytes {
    match address.parse().unwrap() {
        std::net::IpAddr::V4(v4) => bytes::Bytes::copy_from_slice(&v4.octets()),
        std::net::IpAddr::V6(v6) => bytes::Bytes::copy_from_slice(&v6.octets()),
    }
}

/// Pod shop/client is here, shop/web-1 elsewhere behind shop/web; the nodes are n1 (this one) and n2.
fn names() -> Names {
    let mut view = View::default();
    let pod: Pod = serde_json::from_value(serde_json::json!({
        "metadata": {"namespace": "shop", "name": "client", "uid": "u-client"},
    }))
    .unwrap();
    let uid = PodUid::new("u-client").unwrap();
    view.pods = Arc::new(BTreeMap::from([(uid, Arc::new(pod))]));
    let name = ServiceName {
        namespace: "shop".into(),
        name: "web".into(),
    };
    let service = proto::Service {
        cluster_ips: vec![bytes("10.96.0.1")],
        ports: vec![proto::ServicePort {
            name: String::new(),
            protocol: 6,
            port: 80,
            node_port: 30_080,
        }],
        ..Default::default()
    };
    Arc::make_mut(&mut view.services).insert(name.clone(), Arc::new(service));
    let backend = proto::Backend {
        addresses: vec![bytes("10.244.1.9")],
        pod_name: "web-1".into(),
        pod_namespace: "shop".into(),
        ..Default::default()
    };
    let backends = [("b".to_owned(), Arc::new(backend))].into_iter().collect();
    Arc::make_mut(&mut view.backends).insert(name, Arc::new(backends));
    for (node, address) in [("n1", "192.0.2.1"), ("n2", "192.0.2.2")] {
        let route = proto::NodeRoute {
            addresses: vec![bytes(address)],
            ..Default::default()
        };
        Arc::make_mut(&mut view.nodes).insert(node.into(), Arc::new(route));
    }
    let id = label64("u-client");
    let places = PodPlaces {
        addresses: BTreeMap::from([("10.244.0.2".parse().unwrap(), id)]),
        interfaces: BTreeMap::from([(5, id)]),
    };
    let namespaces = Namespaces {
        pods: HashMap::from([(77, id)]),
        own: 1,
        ..Namespaces::default()
    };
    Names::new("n1", &view, &places, &namespaces)
}

const CLOCK: Clock = Clock {
    wall_us: 1_000_000,
    monotonic_ns: 5_000_000,
};

fn event(point: u8, source: &str, destination: &str) -> FlowEvent {
    let (source, destination): (std::net::SocketAddr, std::net::SocketAddr) =
        (source.parse().unwrap(), destination.parse().unwrap());
    FlowEvent {
        time_ns: 6_000_000,
        source: addr_of(source.ip()),
        source_port_be: source.port().to_be(),
        destination: addr_of(destination.ip()),
        destination_port_be: destination.port().to_be(),
        proto: 6,
        point,
        reason: NOT_DROPPED,
        ifindex: 5,
        ..FlowEvent::default()
    }
}

fn end(end: &Option<proto::FlowEnd>) -> String {
    match end {
        None => "-".into(),
        Some(end) => format!("{} {}/{}:{}", end.kind, end.namespace, end.name, end.port),
    }
}

fn words(event: &FlowEvent) -> String {
    let flow = show(event, &names(), &CLOCK);
    let (source, destination) = (end(&flow.source), end(&flow.destination));
    let frontend = end(&flow.frontend);
    format!(
        "{source} > {destination} ({frontend}) {} {}",
        flow.verdict, flow.reason
    )
}

#[test]
fn both_ends_have_names() {
    let mut packet = event(POINT_FROM_POD, "10.244.0.2:4000", "10.244.1.9:8080");
    assert_eq!(
        words(&packet),
        "pod shop/client:4000 > pod shop/web-1:8080 (-) forwarded "
    );
    packet.flags = IS_TRANSLATED;
    packet.frontend = addr_of("10.96.0.1".parse().unwrap());
    packet.frontend_port_be = 80_u16.to_be();
    assert_eq!(
        words(&packet),
        "pod shop/client:4000 > pod shop/web-1:8080 (service shop/web:80) forwarded "
    );
    packet.frontend = addr_of("192.0.2.2".parse().unwrap());
    packet.frontend_port_be = 30_080_u16.to_be();
    assert!(
        words(&packet).contains("(service shop/web:30080)"),
        "a node port"
    );
    assert_eq!(show(&packet, &names(), &CLOCK).time_us, 1_001_000);
    let probe = event(POINT_TO_POD, "192.0.2.1:4000", "10.244.0.2:80");
    assert_eq!(
        words(&probe),
        "node /n1:4000 > pod shop/client:80 (-) forwarded "
    );
    let stranger = event(POINT_FROM_POD, "198.51.100.1:1", "203.0.113.1:2");
    assert_eq!(
        words(&stranger),
        "pod shop/client:1 >  /:2 (-) forwarded ",
        "by its interface"
    );
}

#[test]
fn sockets_are_known_by_their_namespace() {
    let mut call = event(POINT_CONNECT, "[::]:0", "10.244.1.9:8080");
    call.flags = IS_TRANSLATED;
    call.frontend = addr_of("10.96.0.1".parse().unwrap());
    call.frontend_port_be = 80_u16.to_be();
    for (cookie, source) in [(77, "pod shop/client:0"), (1, "node /n1:0"), (9, " /:0")] {
        call.netns_cookie = cookie;
        assert_eq!(
            words(&call),
            format!("{source} > pod shop/web-1:8080 (service shop/web:80) translated ")
        );
        assert_eq!(names().knows(&call), cookie != 9);
    }
    call.netns_cookie = 77;
    call.reason = drop::NO_BACKEND as u8;
    assert_eq!(
        words(&call),
        "pod shop/client:0 > - (service shop/web:80) refused no_backend"
    );
}

#[test]
fn reasons_are_those_of_the_metric_and_policies_say_the_direction() {
    let mut packet = event(POINT_FROM_POD, "10.244.0.2:4000", "10.244.1.9:8080");
    packet.reason = drop::POLICY as u8;
    assert!(words(&packet).ends_with("dropped policy (egress)"));
    packet.flags = AT_INGRESS;
    assert!(words(&packet).ends_with("dropped policy (ingress)"));
    packet.reason = drop::NEIGHBOUR as u8;
    packet.flags = NO_IP;
    assert_eq!(
        words(&packet),
        "pod shop/client:0 >  /:0 (-) dropped neighbour"
    );
}

proptest! {
    /// A filter takes what has an end in the namespace, that pod and that verdict, whatever else it has.
    #[test]
    fn a_filter_takes_what_is_asked_for(
        ends in proptest::collection::vec(("(shop|db|)", "(web|client)", "(pod|service)"), 3),
        verdict in "(forwarded|dropped)",
        namespace in "(shop|db|)",
        pod in "(web|client|)",
        verdicts in proptest::collection::vec("(forwarded|dropped)", 0..2),
    ) {
        let end = |i: usize| {
            let (namespace, name, kind) = ends[i].clone();
            Some(proto::FlowEnd { namespace, name, kind, ..Default::default() })
        };
        let flow = proto::Flow {
            source: end(0), destination: end(1), frontend: end(2),
            verdict: verdict.clone(), ..Default::default()
        };
        let request = proto::FlowsRequest {
            namespace: namespace.clone(), pod: pod.clone(), verdicts: verdicts.clone(),
            ..Default::default()
        };
        let meant = ends.iter().any(|(ns, name, kind)| {
            (namespace.is_empty() || *ns == namespace)
                && (pod.is_empty() || kind == "pod" && *name == pod)
        });
        let wanted = meant && (verdicts.is_empty() || verdicts.contains(&verdict));
        prop_assert_eq!(Filter::of(&request).wants(&flow), wanted);
    }

    /// No event, whatever its bytes, is more than the words can say.
    #[test]
    fn any_event_has_words(bytes in proptest::array::uniform8(any::<u8>()), time_ns: u64) {
        let [proto, point, reason, flags, a, b, c, d] = bytes;
        let event = FlowEvent {
            time_ns,
            source: [0, 0, 0xffff_0000, u32::from_ne_bytes([a, b, c, d])],
            proto, point, reason, flags,
            ..FlowEvent::default()
        };
        let flow = show(&event, &names(), &CLOCK);
        prop_assert!(!flow.verdict.is_empty());
        prop_assert_eq!(flow.reason.is_empty(), reason == NOT_DROPPED);
    }
}
