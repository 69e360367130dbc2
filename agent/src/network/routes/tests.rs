use std::sync::Arc;

use gantry_api::proto;
use gantry_cni::netlink::Link;
use proptest::prelude::*;

use super::*;
use crate::view::Settings;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn bytes(text: &str) -> Vec<u8> {
    match address(text) {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Nodes by name: prefix and addresses. `here` is this one.
fn view(nodes: &[(&str, &str, &[&str])]) -> View {
    let mut view = View {
        rev: 1,
        settings: Arc::new(Settings {
            pod_cidr: Some(net("10.244.0.0/24")),
            cluster_cidr: Some(net("10.244.0.0/16")),
            ..Settings::default()
        }),
        ..View::default()
    };
    for (name, cidr, addresses) in nodes {
        let node = proto::NodeRoute {
            pod_cidr: (*cidr).into(),
            addresses: addresses.iter().map(|text| bytes(text).into()).collect(),
            ..Default::default()
        };
        Arc::make_mut(&mut view.nodes).insert((*name).into(), Arc::new(node));
    }
    view
}

fn config() -> RoutingConfig {
    RoutingConfig {
        node: "here".into(),
        addresses: vec![address("192.0.2.1")],
        routing: Routing::Auto,
        port: 4789,
        wireguard: None,
        conf_dir: "/nonexistent".into(),
    }
}

fn link(index: u32, name: &str, mtu: u32) -> Link {
    Link {
        index,
        name: name.into(),
        kind: String::new(),
        mac: Some([2, 0, 0, 0, 0, index as u8]),
        mtu,
        up: true,
        master: None,
        peer: None,
    }
}

/// eth0 with 192.0.2.1/24 and 2001:db8::1/64, gantry0, loopback.
fn facts() -> Facts {
    Facts {
        links: vec![
            link(1, "lo", 65536),
            link(2, "eth0", 1500),
            link(3, "gantry0", 1500),
        ],
        networks: vec![
            (1, net("127.0.0.1/8")),
            (2, net("192.0.2.1/24")),
            (2, net("2001:db8::1/64")),
            (3, net("10.244.0.1/24")),
        ],
        table: Vec::new(),
    }
}

fn foreign(destination: &str, metric: u32) -> Route {
    Route {
        destination: net(destination),
        gateway: Some(address("192.0.2.254")),
        link: Some(2),
        metric,
        protocol: 4,
        ..Route::default()
    }
}

fn only_problem(plan: &RoutingPlan) -> &str {
    assert_eq!(plan.problems.len(), 1, "{:?}", plan.problems);
    &plan.problems[0]
}

#[test]
fn a_node_on_the_link_is_reached_directly_and_any_other_by_the_tunnel() {
    let view = view(&[
        ("here", "10.244.0.0/24", &["192.0.2.1"]),
        ("near", "10.244.1.0/24", &["192.0.2.2"]),
        ("far", "10.244.2.0/24", &["198.51.100.2"]),
    ]);
    let plan = plan(&config(), &view, &facts());
    assert!(plan.problems.is_empty(), "{:?}", plan.problems);
    let routes = [
        NodeRoute {
            pod_cidr: net("10.244.1.0/24"),
            via: address("192.0.2.2"),
            way: Way::Link(2),
        },
        NodeRoute {
            pod_cidr: net("10.244.2.0/24"),
            via: address("10.244.2.1"),
            way: Way::Tunnel,
        },
    ];
    assert_eq!(plan.wanted.routes, routes);
    let tunnel = plan.wanted.tunnel.unwrap();
    assert_eq!((tunnel.local, tunnel.mtu), (address("192.0.2.1"), 1450));
    assert_eq!(tunnel.addresses, [net("10.244.0.1/32")]);
    assert_eq!(tunnel.mac, [0x0e, 0x47, 192, 0, 2, 1]);
    let end = TunnelEnd {
        mac: [0x0e, 0x47, 198, 51, 100, 2],
        remote: address("198.51.100.2"),
        gateways: vec![address("10.244.2.1")],
    };
    assert_eq!(tunnel.ends, [end]);
    assert_eq!(plan.mtu, Some(1450));
    let ways: Vec<_> = plan
        .reached
        .iter()
        .map(|it| (it.node.as_str(), it.way.as_str()))
        .collect();
    assert_eq!(ways, [("far", "vxlan"), ("near", "direct (eth0)")]);
    // Who answers a pod by the tunnel is not asked from the pod's own address.
    assert_eq!(plan.near, Some([address("192.0.2.2")].into()));
}

#[test]
fn the_administrator_may_want_one_way_for_all() {
    let view = view(&[
        ("near", "10.244.1.0/24", &["192.0.2.2"]),
        ("far", "10.244.2.0/24", &["198.51.100.2"]),
    ]);
    let vxlan = RoutingConfig {
        routing: Routing::Vxlan,
        ..config()
    };
    let all = plan(&vxlan, &view, &facts());
    assert!(
        all.wanted
            .routes
            .iter()
            .all(|route| route.way == Way::Tunnel)
    );
    assert_eq!(all.wanted.tunnel.unwrap().ends.len(), 2);
    let direct = RoutingConfig {
        routing: Routing::Direct,
        ..config()
    };
    let some = plan(&direct, &view, &facts());
    assert_eq!(
        (some.wanted.routes.len(), some.wanted.tunnel.is_none()),
        (1, true)
    );
    assert_eq!(some.mtu, Some(1500));
    let words = only_problem(&some);
    assert!(
        words.starts_with("node far: none of its addresses (198.51.100.2) is on a link"),
        "{words}"
    );
}

#[test]
fn both_families_are_alike() {
    let view = view(&[
        (
            "here",
            "10.244.0.0/24,fd00:0::/64",
            &["192.0.2.1", "2001:db8::1"],
        ),
        (
            "near",
            "10.244.1.0/24,fd00:1::/64",
            &["192.0.2.2", "2001:db8::2"],
        ),
        ("half", "10.244.2.0/24,fd00:2::/64", &["192.0.2.3"]),
    ]);
    let plan = plan(&config(), &view, &facts());
    assert!(plan.problems.is_empty(), "{:?}", plan.problems);
    let ways: Vec<(String, Way)> = (plan.wanted.routes.iter())
        .map(|route| (format!("{} via {}", route.pod_cidr, route.via), route.way))
        .collect();
    assert_eq!(
        ways,
        [
            ("10.244.1.0/24 via 192.0.2.2".into(), Way::Link(2)),
            ("10.244.2.0/24 via 192.0.2.3".into(), Way::Link(2)),
            ("fd00:1::/64 via 2001:db8::2".into(), Way::Link(2)),
            // IPv6 of a node without an IPv6 address goes in the tunnel, over IPv4.
            ("fd00:2::/64 via fd00:2::1".into(), Way::Tunnel),
        ]
    );
    let tunnel = plan.wanted.tunnel.unwrap();
    assert_eq!(tunnel.addresses, [net("10.244.0.1/32"), net("fd00::1/128")]);
    assert_eq!(tunnel.ends.len(), 1);
}

#[test]
fn over_ipv6_the_tunnel_leaves_more_room() {
    let view = view(&[
        ("here", "10.244.0.0/24", &["2001:db8::1"]),
        ("far", "10.244.2.0/24", &["2001:db8:1::2"]),
    ]);
    let plan = plan(&config(), &view, &facts());
    assert!(plan.problems.is_empty(), "{:?}", plan.problems);
    let tunnel = plan.wanted.tunnel.unwrap();
    assert_eq!((tunnel.local, tunnel.mtu), (address("2001:db8::1"), 1430));
    assert_eq!(plan.mtu, Some(1430));
}

#[test]
fn what_is_in_the_way_is_named() {
    let here = ("here", "10.244.0.0/24", &["192.0.2.1"][..]);
    let problem = |peer: (&str, &str, &[&str]), facts: &Facts| {
        let plan = plan(&config(), &view(&[here, peer]), facts);
        assert!(plan.wanted.routes.is_empty(), "{:?}", plan.wanted.routes);
        only_problem(&plan).to_owned()
    };
    let at = &["192.0.2.2"][..];
    for (peer, words) in [
        (("b", "10.244.1.0/24", &[][..]), "node b: it has no address"),
        (
            ("b", "10.244.1.0", at),
            "node b: its pod prefix \"10.244.1.0\" is none",
        ),
        (
            ("b", "10.244.0.0/25", at),
            "overlaps 10.244.0.0/24, this node's own",
        ),
        (
            ("b", "192.0.0.0/16", at),
            "overlaps 192.0.2.0/24, the network of this node's link eth0",
        ),
        (("b", "0.0.0.0/0", at), "0.0.0.0/0 is everything"),
        (
            ("b", "198.51.100.0/24", &["198.51.100.7"][..]),
            "its own address 198.51.100.7 lies in its pods' prefix",
        ),
        (
            ("b", "10.244.1.0/31", &["198.51.100.7"][..]),
            "has no room for a gateway",
        ),
        (
            ("b", "10.244.1.0/24", &["2001:db9::7"][..]),
            "no address of that family (2001:db9::7)",
        ),
    ] {
        let told = problem(peer, &facts());
        assert!(told.contains(words), "{told:?} should say {words:?}");
    }
    let mut with_foreign = facts();
    with_foreign.table = vec![foreign("10.244.1.0/24", 0)];
    let told = problem(("b", "10.244.1.0/24", at), &with_foreign);
    assert!(
        told.contains("the route 10.244.1.0/24 via 192.0.2.254 dev eth0 (proto 4) is in the way"),
        "{told}"
    );
    // One that we win against, and one around: neither is.
    with_foreign.table = vec![foreign("10.244.1.0/24", 100), foreign("10.0.0.0/8", 0)];
    let fine = plan(
        &config(),
        &view(&[here, ("b", "10.244.1.0/24", at)]),
        &with_foreign,
    );
    assert_eq!((fine.wanted.routes.len(), fine.problems.len()), (1, 0));
    // One for a part of it: the rest is reached.
    with_foreign.table = vec![foreign("10.244.1.7/32", 0)];
    let part = plan(
        &config(),
        &view(&[here, ("b", "10.244.1.0/24", at)]),
        &with_foreign,
    );
    assert_eq!(part.wanted.routes.len(), 1);
    assert!(only_problem(&part).contains("10.244.1.7/32"));
}

#[test]
fn of_two_with_one_prefix_it_stays_with_the_one_that_has_it() {
    let view = view(&[
        ("a", "10.244.1.0/24", &["192.0.2.2"]),
        ("b", "10.244.1.0/24", &["192.0.2.3"]),
    ]);
    let first = plan(&config(), &view, &facts());
    assert_eq!(first.wanted.routes[0].via, address("192.0.2.2"));
    assert_eq!(
        only_problem(&first),
        "node b: its pod prefix 10.244.1.0/24 overlaps 10.244.1.0/24 of node a"
    );
    let mut facts = facts();
    facts.table = vec![Route {
        gateway: Some(address("192.0.2.3")),
        protocol: ROUTE_PROTOCOL,
        ..foreign("10.244.1.0/24", 0)
    }];
    let then = plan(&config(), &view, &facts);
    assert_eq!(then.wanted.routes[0].via, address("192.0.2.3"));
    assert!(only_problem(&then).starts_with("node a: "));
}

#[test]
fn a_link_that_is_down_or_ours_is_no_way() {
    let view = view(&[("b", "10.244.1.0/24", &["192.0.2.2", "10.244.0.7"])]);
    let mut facts = facts();
    facts.links[1].up = false;
    let plan = plan(&config(), &view, &facts);
    assert_eq!(plan.wanted.routes[0].way, Way::Tunnel);
}

#[test]
fn the_size_of_packets_is_what_every_way_carries() {
    let mtu = |nodes: &[(&str, &str, &[&str])], routing, facts: &Facts| {
        let config = RoutingConfig {
            routing,
            ..config()
        };
        plan(&config, &view(nodes), facts).mtu
    };
    let near = ("near", "10.244.1.0/24", &["192.0.2.2"][..]);
    let mut facts = facts();
    assert_eq!(mtu(&[], Routing::Auto, &facts), Some(1500));
    assert_eq!(mtu(&[], Routing::Vxlan, &facts), Some(1450));
    assert_eq!(mtu(&[near], Routing::Auto, &facts), Some(1500));
    facts.links[1].mtu = 9000;
    assert_eq!(mtu(&[near], Routing::Auto, &facts), Some(9000));
    assert_eq!(mtu(&[near], Routing::Vxlan, &facts), Some(8950));
    // A second link with smaller packets.
    facts.links.push(link(4, "eth1", 1400));
    facts.networks.push((4, net("203.0.113.1/24")));
    let other = ("other", "10.244.3.0/24", &["203.0.113.2"][..]);
    assert_eq!(mtu(&[near, other], Routing::Auto, &facts), Some(1400));
    facts.networks.clear();
    assert_eq!(mtu(&[near], Routing::Auto, &facts), None);
}

#[test]
fn with_wireguard_the_tunnel_goes_between_inner_addresses_of_nodes_whose_keys_are_known() {
    let mut view = view(&[
        ("near", "10.244.1.0/24,fd00:1::/64", &["192.0.2.2"]),
        ("far", "10.244.2.0/24", &["198.51.100.2"]),
        ("mute", "10.244.3.0/24", &["192.0.2.4"]),
    ]);
    for (name, key) in [("near", [2; 32]), ("far", [3; 32])] {
        let nodes = Arc::make_mut(&mut view.nodes);
        let mut node = proto::NodeRoute::clone(&nodes[name]);
        node.wireguard_key = key.to_vec().into();
        nodes.insert(name.into(), Arc::new(node));
    }
    let own = OwnKey {
        private: [1; 32],
        public: [9; 32],
        port: 51_820,
    };
    let mut config = RoutingConfig {
        routing: Routing::Wireguard,
        wireguard: Some(Ok(own)),
        ..config()
    };
    let sealed = plan(&config, &view, &facts());
    assert_eq!(
        only_problem(&sealed),
        "node mute: it has told no WireGuard key: start its agent with --routing wireguard too: its pods \
         (10.244.3.0/24) are not reached"
    );
    let wireguard = sealed.wanted.wireguard.clone().unwrap();
    let inner = |text: &str| wireguard::inner_address(address(text));
    let near = wireguard::Peer {
        endpoint: "192.0.2.2:51820".parse().unwrap(),
        inner: inner("192.0.2.2"),
    };
    assert_eq!(wireguard.peers.len(), 2);
    assert_eq!(wireguard.peers[&[2; 32]], near);
    assert_eq!((wireguard.inner, wireguard.mtu), (inner("192.0.2.1"), 1420));
    let tunnel = sealed.wanted.tunnel.unwrap();
    assert_eq!(
        (tunnel.local, tunnel.mtu),
        (inner("192.0.2.1").into(), 1350)
    );
    assert_eq!(sealed.mtu, Some(1350));
    let end = tunnel
        .ends
        .iter()
        .find(|end| end.remote == IpAddr::V6(near.inner));
    assert_eq!(end.unwrap().gateways.len(), 2, "one of each family");
    for end in &tunnel.ends {
        assert_eq!(
            end.mac,
            gantry_cni::tunnel::mac_of_node(end.remote),
            "as its own device is made"
        );
    }
    assert!(
        sealed
            .wanted
            .routes
            .iter()
            .all(|route| route.way == Way::Tunnel)
    );
    assert_eq!(sealed.near, Some(BTreeSet::new()));
    assert!(
        sealed
            .reached
            .iter()
            .all(|it| it.way == "wireguard" && !it.is_direct)
    );
    // Nobody is reached in the clear because the kernel cannot encrypt.
    config.wireguard = Some(Err("the kernel has no WireGuard".into()));
    let open = plan(&config, &view, &facts());
    assert!(open.wanted.routes.is_empty() && open.wanted.tunnel.is_none());
    assert_eq!(open.problems.len(), 4);
    assert!(
        open.problems
            .iter()
            .all(|it| it.contains("the kernel has no WireGuard"))
    );
}

/// Few values, so that they meet.
fn any_node() -> impl Strategy<Value = (String, Vec<[u8; 4]>)> {
    let cidr = (0_u8..6, 22_u8..=26).prop_map(|(third, len)| {
        let net = IpNet::new([10, 244, third, 0].into(), len).unwrap();
        net.trunc().to_string()
    });
    let address = (prop_oneof![Just(2_u8), Just(3)], 1_u8..6).prop_map(|(a, b)| [192, 0, a, b]);
    let broken = prop_oneof![9 => cidr, 1 => Just("10.244".to_owned())];
    (broken, proptest::collection::vec(address, 0..3))
}

proptest! {
    #[test]
    fn nothing_overlaps_and_nobody_is_left_out_without_a_word(
        nodes in proptest::collection::btree_map("[a-e]", any_node(), 0..6),
        table in proptest::collection::vec((0_u8..6, 22_u8..=32, any::<bool>(), 0_u32..2), 0..4),
        routing in prop_oneof![Just(Routing::Auto), Just(Routing::Direct), Just(Routing::Vxlan)],
    ) {
        let mut view = view(&[("here", "10.244.0.0/24", &["192.0.2.1"])]);
        for (name, (cidr, addresses)) in &nodes {
            let node = proto::NodeRoute {
                pod_cidr: cidr.clone(),
                addresses: addresses.iter().map(|it| it.to_vec().into()).collect(),
                ..Default::default()
            };
            Arc::make_mut(&mut view.nodes).insert(name.clone(), Arc::new(node));
        }
        let mut facts = facts();
        facts.table = (table.into_iter())
            .map(|(third, len, ours, metric)| Route {
                destination: IpNet::new([10, 244, third, 0].into(), len).unwrap().trunc(),
                protocol: if ours { ROUTE_PROTOCOL } else { 4 },
                metric,
                ..Route::default()
            })
            .collect();
        let config = RoutingConfig { routing, ..config() };
        let plan = plan(&config, &view, &facts);
        let routes = &plan.wanted.routes;
        for (index, route) in routes.iter().enumerate() {
            prop_assert!(!overlap(&route.pod_cidr, &net("10.244.0.0/24")));
            prop_assert!(routes[index + 1..].iter().all(|it| !overlap(&it.pod_cidr, &route.pod_cidr)));
            let taken = facts.table.iter().any(|it| {
                it.protocol != ROUTE_PROTOCOL && it.destination == route.pod_cidr && it.metric == 0
            });
            prop_assert!(!taken, "{:?}", route);
        }
        for name in nodes.keys() {
            let is_reached = plan.reached.iter().any(|it| it.node == *name);
            let start = format!("node {name}: ");
            prop_assert!(is_reached || plan.problems.iter().any(|it| it.starts_with(&start)));
        }
        // Nobody is near who is not on a link of ours, or is not routed directly.
        let near = plan.near.clone().unwrap_or_default();
        let all_of = |via: &IpAddr| {
            let all = nodes.values().map(|(_, all)| -> Vec<IpAddr> {
                all.iter().map(|it| IpAddr::from(*it)).collect()
            });
            all.filter(|all| all.contains(via)).flatten().collect::<Vec<_>>()
        };
        let direct = routes.iter().filter(|route| matches!(route.way, Way::Link(_)));
        let direct: Vec<IpAddr> = direct.flat_map(|route| all_of(&route.via)).collect();
        prop_assert!(near.iter().all(|it| direct.contains(it)));
        for route in routes.iter().filter(|route| matches!(route.way, Way::Link(_))) {
            prop_assert!(near.contains(&route.via));
        }
        // The tunnel has an end for each that goes there, and is there for nobody else.
        let through = routes.iter().filter(|route| route.way == Way::Tunnel).count();
        let ends = plan.wanted.tunnel.as_ref().map_or(0, |it| it.ends.iter().map(|e| e.gateways.len()).sum());
        prop_assert_eq!(through, ends);
        prop_assert_eq!(plan.wanted.tunnel.is_some(), through > 0);
    }
}
