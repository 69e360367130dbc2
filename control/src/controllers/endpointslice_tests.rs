use super::*;
use gantry_api::k8s_openapi::api::core::v1::{
    Container, ContainerPort, PodCondition, PodIP, PodSpec, PodStatus, ServiceSpec,
};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use proptest::prelude::*;

fn service(families: &[&str]) -> Service {
    Service {
        metadata: ObjectMeta {
            name: Some("web".to_owned()),
            namespace: Some("shop".to_owned()),
            uid: Some("service".to_owned()),
            ..ObjectMeta::default()
        },
        spec: Some(ServiceSpec {
            ports: Some(vec![ServicePort {
                name: Some("http".to_owned()),
                port: 80,
                target_port: Some(IntOrString::String("web".to_owned())),
                ..ServicePort::default()
            }]),
            ip_families: Some(families.iter().map(|family| (*family).to_owned()).collect()),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

/// A pod with an address of each family whose port `web` is `port`.
fn pod(index: u32, port: i32, ready: bool) -> Arc<Pod> {
    let address = std::net::Ipv4Addr::from(0x0af4_0000 + index).to_string();
    let condition = PodCondition {
        type_: "Ready".to_owned(),
        status: if ready { "True" } else { "False" }.to_owned(),
        ..PodCondition::default()
    };
    Arc::new(Pod {
        metadata: ObjectMeta {
            name: Some(format!("p{index}")),
            namespace: Some("shop".to_owned()),
            uid: Some(format!("uid{index}")),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec {
            node_name: Some("n1".to_owned()),
            containers: vec![Container {
                ports: Some(vec![ContainerPort {
                    name: Some("web".to_owned()),
                    container_port: port,
                    ..ContainerPort::default()
                }]),
                ..Container::default()
            }],
            ..PodSpec::default()
        }),
        status: Some(PodStatus {
            phase: Some("Running".to_owned()),
            pod_ips: Some(vec![
                PodIP { ip: address },
                PodIP {
                    ip: format!("fd00::{index:x}"),
                },
            ]),
            conditions: Some(vec![condition]),
            ..PodStatus::default()
        }),
    })
}

/// Carries a plan out as the registry would.
fn apply(slices: &mut Vec<Arc<EndpointSlice>>, plan: Plan, serial: &mut u32) {
    for gone in plan.delete {
        slices.retain(|slice| slice.metadata.name != gone.metadata.name);
    }
    for new in plan.update {
        let slot = slices
            .iter_mut()
            .find(|slice| slice.metadata.name == new.metadata.name);
        *slot.unwrap() = Arc::new(new);
    }
    for mut new in plan.create {
        *serial += 1;
        new.metadata.name = Some(format!("web-{serial:05}"));
        slices.push(Arc::new(new));
    }
}

fn no_zones() -> HashMap<String, String> {
    HashMap::new()
}

fn write_count(plan: &Plan) -> usize {
    plan.create.len() + plan.update.len() + plan.delete.len()
}

#[test]
fn an_endpoint_tells_what_consumers_need() {
    let mut service = service(&["IPv4"]);
    let mut pod = Pod::clone(&pod(7, 8080, true));
    pod.spec.as_mut().unwrap().hostname = Some("web-0".to_owned());
    pod.spec.as_mut().unwrap().subdomain = Some("web".to_owned());
    let zones = HashMap::from([("n1".to_owned(), "z1".to_owned())]);
    let first = |service: &Service, pod: &Pod| {
        let mut plan = plan(service, &[Arc::new(pod.clone())], &[], &zones);
        assert_eq!(write_count(&plan), 1);
        let slice = plan.create.remove(0);
        (slice.endpoints.clone().unwrap().remove(0), slice)
    };
    let (endpoint, slice) = first(&service, &pod);
    assert_eq!(slice.ports.as_ref().unwrap()[0].port, Some(8080));
    assert_eq!(
        slice.ports.as_ref().unwrap()[0].protocol.as_deref(),
        Some("TCP")
    );
    let labels = slice.metadata.labels.unwrap();
    assert_eq!(labels[SERVICE_NAME], "web");
    assert_eq!(labels[MANAGED_BY], MANAGER);
    assert!(!labels.contains_key(HEADLESS));
    assert_eq!(endpoint.addresses, ["10.244.0.7"]);
    assert_eq!(endpoint.hostname.as_deref(), Some("web-0"));
    assert_eq!(endpoint.node_name.as_deref(), Some("n1"));
    assert_eq!(endpoint.zone.as_deref(), Some("z1"));
    assert_eq!(endpoint.target_ref.unwrap().name.as_deref(), Some("p7"));
    let conditions = |endpoint: Endpoint| {
        let conditions = endpoint.conditions.unwrap();
        [conditions.ready, conditions.serving, conditions.terminating].map(Option::unwrap)
    };
    assert_eq!(conditions(first(&service, &pod).0), [true, true, false]);
    pod.metadata.deletion_timestamp = Some(Time("2026-01-01T00:00:00Z".parse().unwrap()));
    assert_eq!(conditions(first(&service, &pod).0), [false, true, true]);
    service.spec.as_mut().unwrap().publish_not_ready_addresses = Some(true);
    assert_eq!(conditions(first(&service, &pod).0), [true, true, true]);
}

#[test]
fn each_family_and_each_set_of_ports_has_its_own_slices() {
    let pods = [pod(1, 8080, true), pod(2, 8080, true), pod(3, 9090, true)];
    let plan = plan(&service(&["IPv4", "IPv6"]), &pods, &[], &no_zones());
    let mut shapes: Vec<(String, i32, usize)> = plan
        .create
        .iter()
        .map(|slice| {
            let port = slice.ports.as_ref().unwrap()[0].port.unwrap();
            (
                slice.address_type.clone(),
                port,
                slice.endpoints.as_ref().unwrap().len(),
            )
        })
        .collect();
    shapes.sort();
    let expected = [
        ("IPv4", 8080, 2),
        ("IPv4", 9090, 1),
        ("IPv6", 8080, 2),
        ("IPv6", 9090, 1),
    ];
    assert_eq!(
        shapes,
        expected.map(|(family, port, n)| (family.to_owned(), port, n))
    );
}

#[test]
fn a_service_without_endpoints_keeps_one_empty_slice() {
    let service = service(&["IPv4"]);
    let (mut slices, mut serial) = (Vec::new(), 0);
    apply(
        &mut slices,
        plan(&service, &[], &[], &no_zones()),
        &mut serial,
    );
    assert_eq!(slices.len(), 1);
    assert_eq!(slices[0].endpoints, Some(Vec::new()));
    assert_eq!(write_count(&plan(&service, &[], &slices, &no_zones())), 0);
    // The empty slice takes the first endpoint, and is left behind by the last: one write each.
    let first = plan(&service, &[pod(1, 80, true)], &slices, &no_zones());
    assert_eq!((first.update.len(), write_count(&first)), (1, 1));
    apply(&mut slices, first, &mut serial);
    let last = plan(&service, &[], &slices, &no_zones());
    assert_eq!((last.update.len(), write_count(&last)), (1, 1));
    apply(&mut slices, last, &mut serial);
    assert_eq!(slices.len(), 1);
    assert_eq!(write_count(&plan(&service, &[], &slices, &no_zones())), 0);
}

#[test]
fn one_pods_change_writes_one_slice() {
    let service = service(&["IPv4"]);
    let mut pods: Vec<Arc<Pod>> = (0..250).map(|index| pod(index, 80, true)).collect();
    let (mut slices, mut serial) = (Vec::new(), 0);
    apply(
        &mut slices,
        plan(&service, &pods, &[], &no_zones()),
        &mut serial,
    );
    assert_eq!(slices.len(), 3);
    pods[120] = pod(120, 80, false);
    let flip = plan(&service, &pods, &slices, &no_zones());
    assert_eq!((flip.update.len(), write_count(&flip)), (1, 1));
    apply(&mut slices, flip, &mut serial);
    pods.remove(5);
    pods.push(pod(900, 80, true));
    let replacement = plan(&service, &pods, &slices, &no_zones());
    assert_eq!(
        (replacement.update.len(), write_count(&replacement)),
        (1, 1)
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// After any history of pods: all of them, once, in full slices only, and nothing left to do.
    #[test]
    fn planning_is_complete_bounded_and_idempotent(
        rounds in proptest::collection::vec(
            proptest::collection::btree_map(0_u32..400, (0_i32..3, any::<bool>()), 0..330), 1..5,
        ),
    ) {
        let service = service(&["IPv4", "IPv6"]);
        let (mut slices, mut serial) = (Vec::new(), 0);
        for round in rounds {
            let pods: Vec<Arc<Pod>> = round
                .iter()
                .map(|(index, (port, ready))| pod(*index, 8000 + port, *ready))
                .collect();
            let next = plan(&service, &pods, &slices, &no_zones());
            apply(&mut slices, next, &mut serial);
            for family in ["IPv4", "IPv6"] {
                let of_family: Vec<_> =
                    slices.iter().filter(|slice| slice.address_type == family).collect();
                prop_assert!(!of_family.is_empty());
                let mut seen: BTreeMap<String, i32> = BTreeMap::new();
                for slice in of_family {
                    let endpoints = slice.endpoints.as_ref().unwrap();
                    prop_assert!(endpoints.len() <= ENDPOINT_COUNT_MAX);
                    for endpoint in endpoints {
                        let uid = endpoint.target_ref.clone().unwrap().uid.unwrap();
                        let port = slice.ports.as_ref().unwrap()[0].port.unwrap();
                        prop_assert!(seen.insert(uid, port).is_none(), "twice");
                    }
                }
                let wanted: BTreeMap<String, i32> = round
                    .iter()
                    .map(|(index, (port, _))| (format!("uid{index}"), 8000 + port))
                    .collect();
                prop_assert_eq!(seen, wanted);
            }
            let again = plan(&service, &pods, &slices, &no_zones());
            prop_assert_eq!(write_count(&again), 0);
        }
    }
}

#[test]
fn hints_follow_the_distribution_and_only_ready_endpoints_have_them() {
    let zones = HashMap::from([("n1".to_owned(), "z1".to_owned())]);
    let hints = |distribution: Option<&str>, ready, zones: &HashMap<String, String>| {
        let mut service = service(&["IPv4"]);
        service.spec.as_mut().unwrap().traffic_distribution = distribution.map(str::to_owned);
        let plan = plan(&service, &[pod(1, 8080, ready)], &[], zones);
        let hints = plan.create[0].endpoints.as_ref().unwrap()[0].hints.clone();
        let hints = hints.unwrap_or_default();
        let zones = hints.for_zones.into_iter().flatten().map(|zone| zone.name);
        let nodes = hints.for_nodes.into_iter().flatten().map(|node| node.name);
        (zones.collect::<Vec<_>>(), nodes.collect::<Vec<_>>())
    };
    let none: (Vec<String>, Vec<String>) = Default::default();
    assert_eq!(hints(None, true, &zones), none);
    let zone = (vec!["z1".to_owned()], vec![]);
    assert_eq!(hints(Some("PreferClose"), true, &zones), zone);
    assert_eq!(hints(Some("PreferSameZone"), true, &zones), zone);
    assert_eq!(
        hints(Some("PreferSameZone"), false, &zones),
        none,
        "not ready"
    );
    let node = (vec!["z1".to_owned()], vec!["n1".to_owned()]);
    assert_eq!(hints(Some("PreferSameNode"), true, &zones), node);
    let nowhere = HashMap::new();
    assert_eq!(
        hints(Some("PreferSameZone"), true, &nowhere),
        none,
        "no zone known"
    );
    let node = (vec![], vec!["n1".to_owned()]);
    assert_eq!(hints(Some("PreferSameNode"), true, &nowhere), node);
}
