use std::sync::Arc;

use gantry_api::proto::backend::State;
use gantry_api::proto::{BackendPort, ServicePort};

use super::*;

fn ip(text: &str) -> bytes::Bytes {
    match text.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec().into(),
        IpAddr::V6(v6) => v6.octets().to_vec().into(),
    }
}

fn service(cluster_ips: &[&str]) -> proto::Service {
    proto::Service {
        cluster_ips: cluster_ips.iter().map(|text| ip(text)).collect(),
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: 6,
            port: 80,
            node_port: 0,
        }],
        r#type: "ClusterIP".into(),
        ..Default::default()
    }
}

fn endpoint(address: &str, port: u32, state: State, node: &str) -> Arc<proto::Backend> {
    Arc::new(proto::Backend {
        addresses: vec![ip(address)],
        ports: vec![BackendPort {
            name: "http".into(),
            protocol: 6,
            port,
        }],
        state: state as i32,
        node: node.into(),
        pod_uid: format!("pod-{address}"),
        ..Default::default()
    })
}

fn backends(list: &[Arc<proto::Backend>]) -> Backends {
    list.iter()
        .enumerate()
        .map(|(i, backend)| (i.to_string(), backend.clone()))
        .collect()
}

fn here() -> Surroundings {
    Surroundings {
        node: "here".into(),
        zone: "z1".into(),
        reserved: BTreeSet::new(),
    }
}

fn text(backend: &Backend) -> String {
    SocketAddr::new(ip_of(&backend.addr), u16::from_be(backend.port_be)).to_string()
}

fn texts(set: &BackendSet) -> Vec<String> {
    set.backends.iter().map(text).collect()
}

#[test]
fn serving_backends_answer_and_draining_ones_only_when_none_serves() {
    let serving = endpoint("10.244.0.1", 8080, State::Serving, "here");
    let draining = endpoint("10.244.0.2", 8080, State::Draining, "here");
    let unready = endpoint("10.244.0.3", 8080, State::NotReady, "here");
    let all = backends(&[serving, draining.clone(), unready.clone()]);
    let web = service(&["10.96.0.1"]);
    assert_eq!(
        texts(&index(&web, Some(&all), &here()).sets[0]),
        ["10.244.0.1:8080"]
    );
    let rest = backends(&[draining, unready.clone()]);
    assert_eq!(
        texts(&index(&web, Some(&rest), &here()).sets[0]),
        ["10.244.0.2:8080"]
    );
    let none = backends(std::slice::from_ref(&unready));
    assert!(
        index(&web, Some(&none), &here()).sets[0]
            .backends
            .is_empty()
    );
    let published = proto::Service {
        publish_not_ready: true,
        ..web
    };
    let indexed = index(&published, Some(&backends(&[unready])), &here());
    assert_eq!(texts(&indexed.sets[0]), ["10.244.0.3:8080"]);
}

#[test]
fn a_service_without_backends_has_frontends_that_refuse() {
    let indexed = index(&service(&["10.96.0.1"]), None, &here());
    assert_eq!(indexed.sets.len(), 1);
    assert_eq!(indexed.sets[0].frontends.len(), 1);
    assert!(indexed.sets[0].backends.is_empty());
}

#[test]
fn headless_and_external_name_services_have_no_frontend() {
    assert_eq!(index(&service(&[]), None, &here()), Indexed::default());
    let external = proto::Service {
        r#type: "ExternalName".into(),
        ..service(&["10.96.0.1"])
    };
    assert_eq!(index(&external, None, &here()), Indexed::default());
}

#[test]
fn families_are_sets_of_their_own() {
    let both = service(&["10.96.0.1", "fd00:96::1"]);
    let pod = Arc::new(proto::Backend {
        addresses: vec![ip("10.244.0.1"), ip("fd00:244::1")],
        ..(*endpoint("10.244.0.1", 8080, State::Serving, "here")).clone()
    });
    let indexed = index(&both, Some(&backends(&[pod])), &here());
    assert_eq!(indexed.sets.len(), 2);
    assert_eq!(texts(&indexed.sets[0]), ["10.244.0.1:8080"]);
    assert_eq!(texts(&indexed.sets[1]), ["[fd00:244::1]:8080"]);
    assert!(indexed.sets[1].name.v6 && !indexed.sets[0].name.v6);
}

#[test]
fn a_named_target_port_may_differ_per_pod_and_a_missing_one_is_no_backend() {
    let mut other = (*endpoint("10.244.0.3", 1, State::Serving, "here")).clone();
    other.ports[0].name = "admin".into();
    let all = backends(&[
        endpoint("10.244.0.1", 8080, State::Serving, "here"),
        endpoint("10.244.0.2", 9090, State::Serving, "here"),
        Arc::new(other),
    ]);
    let indexed = index(&service(&["10.96.0.1"]), Some(&all), &here());
    assert_eq!(
        texts(&indexed.sets[0]),
        ["10.244.0.1:8080", "10.244.0.2:9090"]
    );
}

#[test]
fn internal_policy_local_limits_the_cluster_ip_only() {
    let all = backends(&[
        endpoint("10.244.0.1", 8080, State::Serving, "here"),
        endpoint("10.244.1.1", 8080, State::Serving, "there"),
    ]);
    let mut local = service(&["10.96.0.1"]);
    local.internal_local = true;
    local.external_ips = vec![ip("192.0.2.1")];
    local.ports[0].node_port = 30_080;
    let indexed = index(&local, Some(&all), &here());
    assert_eq!(indexed.sets.len(), 2);
    assert_eq!(texts(&indexed.sets[1]), ["10.244.0.1:8080"]);
    assert_eq!(indexed.sets[0].frontends.len(), 4);
    assert_eq!(
        texts(&indexed.sets[0]),
        ["10.244.0.1:8080", "10.244.1.1:8080"]
    );
    let node_port = indexed.sets[0]
        .frontends
        .iter()
        .find(|key| key.scope == SCOPE_NODE_PORT);
    assert_eq!(node_port.unwrap().port_be, 30_080u16.to_be());
}

#[test]
fn one_set_serves_every_address_of_the_same_policy() {
    let mut web = service(&["10.96.0.1"]);
    web.load_balancer_ips = vec![ip("192.0.2.7")];
    web.ports[0].node_port = 30_080;
    let indexed = index(&web, None, &here());
    assert_eq!(indexed.sets.len(), 1);
    let scopes: Vec<u8> = indexed.sets[0]
        .frontends
        .iter()
        .map(|key| key.scope)
        .collect();
    let (own, outside) = (
        [SCOPE_NODE_PORT, SCOPE_ADDRESS, SCOPE_ADDRESS],
        [SCOPE_OUTSIDE_NODE_PORT, SCOPE_OUTSIDE_ADDRESS],
    );
    for scope in own.into_iter().chain(outside) {
        assert!(scopes.contains(&scope), "{scope} in {scopes:?}");
    }
    assert_eq!(scopes.len(), 5);
}

/// The set that has a frontend of this scope.
fn set_of(indexed: &Indexed, scope: u8) -> &BackendSet {
    let has = |set: &&BackendSet| set.frontends.iter().any(|key| key.scope == scope);
    indexed.sets.iter().find(has).unwrap()
}

#[test]
fn external_policy_local_limits_the_outside_to_this_node() {
    let here_and_there = backends(&[
        endpoint("10.244.0.1", 8080, State::Serving, "here"),
        endpoint("10.244.1.1", 8080, State::Serving, "there"),
    ]);
    let mut web = service(&["10.96.0.1"]);
    web.external_local = true;
    web.ports[0].node_port = 30_080;
    let indexed = index(&web, Some(&here_and_there), &here());
    let outside = set_of(&indexed, SCOPE_OUTSIDE_NODE_PORT);
    assert_eq!(texts(outside), ["10.244.0.1:8080"]);
    assert!(!outside.elsewhere);
    assert_eq!(set_of(&indexed, SCOPE_NODE_PORT).backends.len(), 2);
    let there = backends(&[endpoint("10.244.1.1", 8080, State::Serving, "there")]);
    let indexed = index(&web, Some(&there), &here());
    let outside = set_of(&indexed, SCOPE_OUTSIDE_NODE_PORT);
    assert!(outside.backends.is_empty() && outside.elsewhere);
    let indexed = index(&web, None, &here());
    assert!(
        !set_of(&indexed, SCOPE_OUTSIDE_NODE_PORT).elsewhere,
        "refused"
    );
}

#[test]
fn source_ranges_limit_the_load_balancer_addresses_only() {
    let mut web = service(&["10.96.0.1"]);
    web.load_balancer_ips = vec![ip("192.0.2.7"), ip("2001:db8::7")];
    web.external_ips = vec![ip("192.0.2.8")];
    web.ports[0].node_port = 30_080;
    web.source_ranges = [("198.51.100.0", 24), ("2001:db8:1::", 48), ("0.0.0.0", 33)]
        .map(|(address, prefix)| proto::SourceRange {
            address: ip(address),
            prefix,
        })
        .to_vec();
    let indexed = index(&web, None, &here());
    assert_eq!(indexed.faults.len(), 1, "{:?}", indexed.faults);
    let [v4, v6] = &indexed.sets[..] else {
        panic!("one set per family");
    };
    let texts = |set: &BackendSet| {
        let address = |key: &FrontendKey| ip_of(&key.addr).to_string();
        set.restricted.iter().map(address).collect::<Vec<_>>()
    };
    assert_eq!(
        (texts(v4), texts(v6)),
        (vec!["192.0.2.7".into()], vec!["2001:db8::7".into()])
    );
    assert!(v4.restricted.iter().all(FrontendKey::is_outside));
    let prefixes = |set: &BackendSet| {
        set.source_ranges
            .iter()
            .map(|r| r.prefix)
            .collect::<Vec<_>>()
    };
    assert_eq!((prefixes(v4), prefixes(v6)), (vec![24 + 96], vec![48]));
    // Ranges that make no sense let nobody in, rather than everybody.
    web.source_ranges.drain(..2);
    let indexed = index(&web, None, &here());
    assert_eq!(indexed.sets[0].restricted.len(), 1);
    assert!(indexed.sets[0].source_ranges.is_empty());
}

#[test]
fn affinity_has_kubernetes_default_timeout() {
    let mut web = service(&["10.96.0.1"]);
    web.client_ip_affinity = true;
    assert_eq!(index(&web, None, &here()).sets[0].affinity_s, 10_800);
    web.affinity_timeout_s = 5;
    assert_eq!(index(&web, None, &here()).sets[0].affinity_s, 5);
}

#[test]
fn the_same_address_twice_is_one_backend() {
    let one = endpoint("10.244.0.1", 8080, State::Serving, "here");
    let indexed = index(
        &service(&["10.96.0.1"]),
        Some(&backends(&[one.clone(), one])),
        &here(),
    );
    assert_eq!(indexed.sets[0].backends.len(), 1);
}

#[test]
fn bad_input_is_named_and_costs_only_itself() {
    let mut web = service(&["10.96.0.1"]);
    web.external_ips = vec![bytes::Bytes::from_static(&[1, 2, 3])];
    web.ports.push(ServicePort {
        name: "sctp".into(),
        protocol: 132,
        port: 9,
        node_port: 0,
    });
    web.ports.push(ServicePort {
        name: "zero".into(),
        protocol: 6,
        port: 0,
        node_port: 0,
    });
    web.ports.push(ServicePort {
        name: "big".into(),
        protocol: 6,
        port: 81,
        node_port: 70_000,
    });
    let indexed = index(&web, None, &here());
    assert_eq!(indexed.sets.len(), 2);
    assert_eq!(indexed.faults.len(), 4, "{:?}", indexed.faults);
}

#[test]
fn the_nodes_resolver_takes_the_dns_address_from_any_service() {
    let dns: IpAddr = "10.96.0.10".parse().unwrap();
    let sets = resolver_sets(dns, "169.254.20.10:53".parse().unwrap(), "here");
    assert_eq!(sets.len(), 2);
    assert_eq!(texts(&sets[0]), ["169.254.20.10:53"]);
    let mut kube_dns = service(&["10.96.0.10"]);
    kube_dns.ports[0] = ServicePort {
        name: "dns".into(),
        protocol: 17,
        port: 53,
        node_port: 0,
    };
    let reserved = sets.iter().flat_map(|set| set.frontends.clone()).collect();
    let around = Surroundings {
        zone: String::new(),
        node: "here".into(),
        reserved,
    };
    assert!(index(&kube_dns, None, &around).sets.is_empty());
    assert!(
        resolver_sets(
            "fd00::a".parse().unwrap(),
            "169.254.20.10:53".parse().unwrap(),
            ""
        )
        .is_empty()
    );
}

#[test]
fn addresses_survive_the_maps_form() {
    for text in ["10.96.0.1", "fd00:96::1:2", "::1", "255.255.255.255"] {
        let address: IpAddr = text.parse().unwrap();
        assert_eq!(ip_of(&addr_of(address)), address);
    }
}

#[test]
fn traffic_stays_close_as_long_as_every_serving_backend_has_a_hint() {
    let hinted = |host: u8, state, zones: &[&str], nodes: &[&str]| {
        let backend = endpoint(&format!("10.244.0.{host}"), 8080, state, "there");
        Arc::new(proto::Backend {
            zone_hints: zones.iter().map(|zone| (*zone).into()).collect(),
            node_hints: nodes.iter().map(|node| (*node).into()).collect(),
            ..proto::Backend::clone(&backend)
        })
    };
    let s = State::Serving;
    let (near, far) = (hinted(1, s, &["z1"], &[]), hinted(2, s, &["z2"], &[]));
    let (own, other) = (
        hinted(3, s, &["z1"], &["here"]),
        hinted(4, s, &["z1"], &["there"]),
    );
    let (plain, leaving) = (hinted(5, s, &[], &[]), hinted(6, State::Draining, &[], &[]));
    type Case<'a> = (&'a str, Vec<&'a Arc<proto::Backend>>, &'a [u8]);
    let cases: [Case<'_>; 7] = [
        ("the zone's", vec![&near, &far], &[1]),
        ("nothing in the zone", vec![&far], &[2]),
        ("one has no hint", vec![&near, &far, &plain], &[1, 2, 5]),
        (
            "a draining one needs none",
            vec![&near, &far, &leaving],
            &[1],
        ),
        ("the node's", vec![&own, &other], &[3]),
        ("not all name a node: the zone's", vec![&other, &far], &[4]),
        ("only draining ones are left", vec![&leaving], &[6]),
    ];
    let web = service(&["10.96.0.1"]);
    for (what, list, wanted) in cases {
        let list: Vec<_> = list.into_iter().cloned().collect();
        let wanted: Vec<_> = wanted
            .iter()
            .map(|host| format!("10.244.0.{host}:8080"))
            .collect();
        let got = texts(&index(&web, Some(&backends(&list)), &here()).sets[0]);
        assert_eq!(got, wanted, "{what}");
    }
    let nowhere = Surroundings {
        zone: String::new(),
        ..here()
    };
    let all = backends(&[near, far]);
    assert_eq!(
        texts(&index(&web, Some(&all), &nowhere).sets[0]).len(),
        2,
        "no zone is known"
    );
}

#[test]
fn a_local_policy_without_a_local_backend_refuses_whatever_the_hints() {
    let mut web = service(&["10.96.0.1"]);
    web.internal_local = true;
    let there = backends(&[Arc::new(proto::Backend {
        node_hints: vec!["here".into()],
        ..proto::Backend::clone(&endpoint("10.244.0.1", 8080, State::Serving, "there"))
    })]);
    let indexed = index(&web, Some(&there), &here());
    assert_eq!(indexed.sets.len(), 1);
    assert!(indexed.sets[0].backends.is_empty() && !indexed.sets[0].frontends.is_empty());
    let leaving = backends(&[endpoint("10.244.0.1", 8080, State::Draining, "here")]);
    let indexed = index(&web, Some(&leaving), &here());
    assert_eq!(
        texts(&indexed.sets[0]),
        ["10.244.0.1:8080"],
        "the last local one"
    );
}
