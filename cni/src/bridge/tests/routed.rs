//! Pods without a bridge, beside such as are ports of one.

use super::*;
use crate::netlink::POD_ROUTE_PROTOCOL;
use crate::sysctl;

fn routed(dir: &tempfile::TempDir) -> BridgeNetwork {
    BridgeNetwork {
        link: PodLink::Routed,
        ..network(dir.path().into(), prefixes())
    }
}

/// As an agent has done it before.
fn forward() {
    sysctl::ensure(sysctl::IPV4_FORWARDING, "1").unwrap();
    if has_ipv6() {
        sysctl::ensure(sysctl::IPV6_FORWARDING, "1").unwrap();
    }
}

fn addresses(attached: &Attached) -> Vec<IpAddr> {
    let addresses = attached.addresses.iter();
    addresses.map(|it| it.address.addr()).collect()
}

/// Whom `to` sees when `from` asks it, in every family.
async fn assert_reach(from: (&Netns, &Attached), to: (&Netns, &Attached)) {
    for (client, server) in addresses(from.1).into_iter().zip(addresses(to.1)) {
        let server = SocketAddr::new(server, 8080);
        let seen = within(from.0, move || Ok(ask(server))).await.unwrap();
        assert_eq!(seen, client.to_string(), "no NAT between pods");
    }
}

async fn serve_all(netns: &Netns, attached: &Attached) {
    for address in addresses(attached) {
        serve_peer_address(netns, SocketAddr::new(address, 8080)).await;
    }
}

async fn pod_routes(host: &Netlink) -> usize {
    let routes = host.routes().await.unwrap().into_iter();
    routes
        .filter(|route| route.protocol == POD_ROUTE_PROTOCOL)
        .count()
}

#[test]
fn routed_pods_reach_each_other_and_the_node_without_a_bridge() {
    on_a_node(|| async {
        forward();
        let dir = tempfile::tempdir().unwrap();
        let network = routed(&dir);
        let host = Netlink::open().unwrap();
        let (a, b) = (pod_netns(), pod_netns());
        let at_a = add(&host, &network, &owner("a"), &a).await.unwrap();
        let at_b = add(&host, &network, &owner("b"), &b).await.unwrap();
        let port = host.link_by_index(at_a.host_ifindex).await.unwrap();
        let port = port.unwrap();
        assert_eq!((port.master, port.mac), (None, Some(at_a.host_mac)));
        let bridge = host.link_by_name("gantry0").await.unwrap().unwrap();
        assert!(ports(&host.links().await.unwrap(), &bridge).is_empty());
        serve_all(&a, &at_a).await;
        serve_all(&b, &at_b).await;
        assert_reach((&a, &at_a), (&b, &at_b)).await;
        assert_reach((&b, &at_b), (&a, &at_a)).await;
        for to in &at_b.addresses {
            let server = SocketAddr::new(to.address.addr(), 8080);
            let seen = tokio::task::spawn_blocking(move || ask(server)).await;
            assert_eq!(
                seen.unwrap(),
                to.gateway.to_string(),
                "as from a bridge's node"
            );
        }
        // The node, at its address of the pods' side.
        let node = Netns::current().unwrap();
        for (own, gateway) in at_a.addresses.iter().zip(network.gateways()) {
            let server = SocketAddr::new(gateway.addr(), 8081);
            serve_peer_address(&node, server).await;
            let seen = within(&a, move || Ok(ask(server))).await.unwrap();
            assert_eq!(seen, own.address.addr().to_string());
        }
    });
}

#[test]
fn a_routed_attachment_is_idempotent_mended_and_leaves_nothing() {
    on_a_node(|| async {
        forward();
        let dir = tempfile::tempdir().unwrap();
        let network = routed(&dir);
        let host = Netlink::open().unwrap();
        let (pod, id) = (pod_netns(), owner("a"));
        let first = add(&host, &network, &id, &pod).await.unwrap();
        assert_eq!(add(&host, &network, &id, &pod).await.unwrap(), first);
        let expected: Vec<IpNet> = first.addresses.iter().map(|it| it.address).collect();
        let all = addresses(&first);
        check(&host, &network, &id, &pod, &expected).await.unwrap();

        // Somebody takes a route, then the device with the gateways' addresses and with it all routes.
        let routes = host.routes().await.unwrap();
        let lost = routes
            .iter()
            .find(|route| route.protocol == POD_ROUTE_PROTOCOL);
        host.remove_route(lost.unwrap()).await.unwrap();
        let error = check(&host, &network, &id, &pod, &expected).await;
        let words = error.unwrap_err().to_string();
        assert!(
            words.contains("route to") && words.contains("missing"),
            "{words}"
        );
        let found = standing(&host, &network, &id, &all).await.unwrap().unwrap();
        assert_eq!(
            (found.port, found.gateway_mac),
            (first.host_ifindex, first.host_mac)
        );
        check(&host, &network, &id, &pod, &expected).await.unwrap();
        let bridge = host.link_by_name("gantry0").await.unwrap().unwrap();
        host.remove_link(bridge.index).await.unwrap();
        standing(&host, &network, &id, &all).await.unwrap().unwrap();
        check(&host, &network, &id, &pod, &expected).await.unwrap();
        serve_all(&pod, &first).await;
        for address in &all {
            let server = SocketAddr::new(*address, 8080);
            let asked = tokio::task::spawn_blocking(move || ask(server)).await;
            asked.unwrap();
        }

        // Its link is that of a bridge's pod: another one takes its place.
        let on_bridge = BridgeNetwork {
            link: PodLink::Bridge,
            ..network.clone()
        };
        let of_other_kind = standing(&host, &on_bridge, &id, &all).await.unwrap();
        assert_eq!(of_other_kind, None);
        let joined = add(&host, &on_bridge, &id, &pod).await.unwrap();
        assert_eq!(pod_routes(&host).await, 0);
        assert!(
            standing(&host, &network, &id, &all)
                .await
                .unwrap()
                .is_none()
        );
        let back = add(&host, &network, &id, &pod).await.unwrap();
        assert_eq!(addresses(&joined), addresses(&back));
        assert_eq!(pod_routes(&host).await, all.len());

        let bridge = host.link_by_name("gantry0").await.unwrap().unwrap();
        remove(&host, &network, &id, &all).await.unwrap();
        remove(&host, &network, &id, &all).await.unwrap();
        assert_eq!(pod_routes(&host).await, 0);
        assert!(host.proxies(bridge.index).await.unwrap().is_empty());
        remove_network(&host, &network).await.unwrap();
        let links = host.links().await.unwrap().into_iter();
        let names: Vec<String> = links.map(|link| link.name).collect();
        assert_eq!(names, ["lo"]);
    });
}

#[test]
fn pods_of_both_kinds_reach_each_other() {
    on_a_node(|| async {
        forward();
        let dir = tempfile::tempdir().unwrap();
        let network = routed(&dir);
        let on_bridge = BridgeNetwork {
            link: PodLink::Bridge,
            ..network.clone()
        };
        let host = Netlink::open().unwrap();
        let pods = [pod_netns(), pod_netns(), pod_netns(), pod_netns()];
        let mut attached = Vec::new();
        // Told otherwise twice.
        for (n, network) in [&on_bridge, &network, &on_bridge, &network]
            .into_iter()
            .enumerate()
        {
            let id = owner(&format!("pod-{n}"));
            let pod = add(&host, network, &id, &pods[n]).await.unwrap();
            serve_all(&pods[n], &pod).await;
            attached.push(pod);
        }
        for from in 0..4 {
            for to in (0..4).filter(|to| *to != from) {
                assert_reach((&pods[from], &attached[from]), (&pods[to], &attached[to])).await;
            }
        }
        // By default the node's answer for another waits up to 0.8 s.
        for family in ["ipv4", "ipv6"].iter().take(prefixes().len()) {
            let delay = sysctl::read(&format!("net/{family}/neigh/gantry0/proxy_delay"));
            assert_eq!(delay.unwrap(), "0", "{family}");
        }
        // A routed pod's address comes to a pod of the bridge: only that one answers for it.
        let bridge = host.link_by_name("gantry0").await.unwrap().unwrap();
        let answered = host.proxies(bridge.index).await.unwrap();
        let v6 = addresses(&attached[3]).into_iter().filter(IpAddr::is_ipv6);
        assert!(v6.clone().all(|address| answered.contains(&address)));
        let had = addresses(&attached[3]);
        let id = owner("pod-3");
        remove(&host, &network, &id, &had).await.unwrap();
        prefer(&on_bridge, &id, had.clone()).await.unwrap();
        let pod = pod_netns();
        let again = add(&host, &on_bridge, &id, &pod).await.unwrap();
        assert_eq!(addresses(&again), had);
        let answered = host.proxies(bridge.index).await.unwrap();
        assert!(!answered.iter().any(|address| had.contains(address)));
        serve_all(&pod, &again).await;
        assert_reach((&pods[1], &attached[1]), (&pod, &again)).await;
    });
}

#[test]
fn what_a_crash_leaves_of_routed_pods_is_collected() {
    on_a_node(|| async {
        let dir = tempfile::tempdir().unwrap();
        let network = routed(&dir);
        let host = Netlink::open().unwrap();
        let pods = [pod_netns(), pod_netns()];
        let mut attached = Vec::new();
        for (n, pod) in pods.iter().enumerate() {
            let id = owner(&format!("pod-{n}"));
            attached.push(add(&host, &network, &id, pod).await.unwrap());
        }
        let bridge = host.link_by_name("gantry0").await.unwrap().unwrap();
        let v6_of = |attached: &Attached| -> Vec<IpAddr> {
            let addresses = addresses(attached).into_iter();
            addresses.filter(IpAddr::is_ipv6).collect()
        };
        // One that is answered for and was never attached, one that lacks its answer.
        let foreign: Option<IpAddr> = has_ipv6().then(|| "fd77:1::99".parse().unwrap());
        if let Some(foreign) = foreign {
            host.ensure_proxy(bridge.index, foreign).await.unwrap();
        }
        for address in v6_of(&attached[0]) {
            host.remove_proxy(bridge.index, address).await.unwrap();
        }
        let valid = HashSet::from([owner("pod-0")]);
        super::super::routed::collect(&host, &network, &valid)
            .await
            .unwrap();
        collect(&host, &network, &valid).await.unwrap();
        let links = host.links().await.unwrap();
        let left: Vec<&str> = links
            .iter()
            .filter(|link| super::super::routed::is_of(link))
            .map(|link| link.name.as_str())
            .collect();
        assert_eq!(left, [attached[0].host_ifname.as_str()]);
        assert_eq!(
            host.proxies(bridge.index).await.unwrap(),
            v6_of(&attached[0])
        );
        assert_eq!(pod_routes(&host).await, addresses(&attached[0]).len());
        // A bridge plugin's GC, which does not know of these, leaves them alone.
        collect(&host, &network, &valid).await.unwrap();
        assert_eq!(pod_routes(&host).await, addresses(&attached[0]).len());
    });
}

#[test]
fn a_full_bridge_says_so_and_routed_pods_still_come() {
    on_a_node(|| async {
        let dir = tempfile::tempdir().unwrap();
        let network = routed(&dir);
        let on_bridge = BridgeNetwork {
            link: PodLink::Bridge,
            ..network.clone()
        };
        let host = Netlink::open().unwrap();
        let bridge = ensure_bridge(&host, &on_bridge).await.unwrap();
        fill(&host, bridge.index).await;
        let links = host.links().await.unwrap();
        let is_port = |link: &&Link| link.master == Some(bridge.index);
        let count = links.iter().filter(is_port).count();
        assert_eq!(count, crate::netlink::BRIDGE_PORT_COUNT_MAX as usize);
        let pod = pod_netns();
        let error = add(&host, &on_bridge, &owner("a"), &pod).await.unwrap_err();
        let words = error.to_string();
        assert!(words.contains("takes 1023 ports"), "{words}");
        assert!(words.contains("--pod-link routed"), "{words}");
        assert!(ipam(&network).unwrap().leases().unwrap().is_empty());
        add(&host, &network, &owner("a"), &pod).await.unwrap();
    });
}

/// Both ends of veth pairs, until the bridge takes no more.
async fn fill(host: &Netlink, bridge: u32) {
    for n in 0..=crate::netlink::BRIDGE_PORT_COUNT_MAX / 2 {
        let names = [format!("left{n}"), format!("right{n}")];
        let message = rtnetlink::LinkVeth::new(&names[0], &names[1]).build();
        host.handle.link().add(message).execute().await.unwrap();
        for name in &names {
            let link = host.link_by_name(name).await.unwrap().unwrap();
            if let Err(error) = host.set_master(link.index, bridge).await {
                assert_eq!(error.raw_os_error(), Some(libc::EXFULL), "{error}");
                return;
            }
        }
    }
    panic!("the bridge takes more");
}
