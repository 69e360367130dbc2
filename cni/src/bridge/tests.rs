//! In network namespaces of our own: a "node" and its pods. The machine's links are not touched.

use std::future::Future;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::netns::within;

mod routed;

/// Runs `test` with a runtime inside a new network namespace; skips without root.
fn on_a_node<F, T>(test: F)
where
    F: FnOnce() -> T + Send + 'static,
    T: Future<Output = ()>,
{
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: network namespaces need root");
        return;
    }
    let node = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            Netlink::open()
                .unwrap()
                .set_up(crate::netlink::LOOPBACK_INDEX)
                .await
                .unwrap();
            test().await;
        });
    });
    node.join().unwrap();
}

/// A new network namespace; it lives as long as the value.
fn pod_netns() -> Netns {
    let pod = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        Netns::current().unwrap()
    });
    pod.join().unwrap()
}

fn network(lease_dir: PathBuf, prefixes: &[&str]) -> BridgeNetwork {
    let prefixes: Vec<IpNet> = prefixes
        .iter()
        .map(|prefix| prefix.parse().unwrap())
        .collect();
    BridgeNetwork::new(&prefixes, lease_dir).unwrap()
}

fn owner(id: &str) -> Owner {
    Owner {
        container_id: id.into(),
        ifname: "eth0".into(),
    }
}

fn has_ipv6() -> bool {
    let disabled = std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6");
    disabled.is_ok_and(|text| text.trim() == "0")
}

fn prefixes() -> &'static [&'static str] {
    if has_ipv6() {
        &["10.77.1.0/24", "fd77:1::/64"]
    } else {
        eprintln!("skipped: IPv6 part: disabled on this machine");
        &["10.77.1.0/24"]
    }
}

/// A server in `netns` that answers each connection with the client's address as it sees it.
async fn serve_peer_address(netns: &Netns, address: SocketAddr) {
    within(netns, move || {
        let listener = TcpListener::bind(address).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let peer = stream.peer_addr().unwrap().ip();
                write!(stream, "{peer}").unwrap();
            }
        });
        Ok(())
    })
    .await
    .unwrap();
}

fn ask(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3)).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn pods_reach_each_other_with_their_own_addresses() {
    on_a_node(|| async {
        let dir = tempfile::tempdir().unwrap();
        let network = network(dir.path().into(), prefixes());
        let host = Netlink::open().unwrap();
        let (a, b) = (pod_netns(), pod_netns());
        let at_a = add(&host, &network, &owner("a"), &a).await.unwrap();
        let at_b = add(&host, &network, &owner("b"), &b).await.unwrap();
        for (from, to) in at_a.addresses.iter().zip(&at_b.addresses) {
            let server = SocketAddr::new(to.address.addr(), 8080);
            serve_peer_address(&b, server).await;
            let seen = within(&a, move || Ok(ask(server))).await.unwrap();
            assert_eq!(seen, from.address.addr().to_string(), "no NAT between pods");
            // The node reaches the pod, and the pod sees the gateway's address.
            let from_node = tokio::task::spawn_blocking(move || ask(server))
                .await
                .unwrap();
            assert_eq!(from_node, from.gateway.to_string());
        }
    });
}

#[test]
fn add_and_remove_are_idempotent() {
    on_a_node(|| async {
        let dir = tempfile::tempdir().unwrap();
        let network = network(dir.path().into(), prefixes());
        let host = Netlink::open().unwrap();
        let pod = pod_netns();
        let first = add(&host, &network, &owner("a"), &pod).await.unwrap();
        let again = add(&host, &network, &owner("a"), &pod).await.unwrap();
        assert_eq!(first, again);
        let expected: Vec<IpNet> = first.addresses.iter().map(|a| a.address).collect();
        check(&host, &network, &owner("a"), &pod, &expected)
            .await
            .unwrap();
        status(&host, &network).await.unwrap();

        remove(&host, &network, &owner("a"), &[]).await.unwrap();
        remove(&host, &network, &owner("a"), &[]).await.unwrap();
        let error = check(&host, &network, &owner("a"), &pod, &expected)
            .await
            .unwrap_err();
        assert_eq!(error.code(), 102);
        remove_network(&host, &network).await.unwrap();
        remove_network(&host, &network).await.unwrap();
        let names: Vec<_> = host
            .links()
            .await
            .unwrap()
            .into_iter()
            .map(|l| l.name)
            .collect();
        assert_eq!(names, ["lo"]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    });
}

#[test]
fn what_a_crash_leaves_is_repaired_or_removed() {
    on_a_node(|| async {
        let dir = tempfile::tempdir().unwrap();
        let network = network(dir.path().into(), &["10.77.1.0/24"]);
        let host = Netlink::open().unwrap();
        let pod = pod_netns();
        let id = owner("a");

        // Killed after the lease: the next ADD takes it over.
        let leased = ipam(&network).unwrap().allocate(&id).unwrap().addresses;
        let attached = add(&host, &network, &id, &pod).await.unwrap();
        assert_eq!(attached.addresses[0].address.addr(), leased[0]);

        // Killed after the link: address and route are missing.
        let inside = Netlink::open_in(&pod).await.unwrap();
        let eth0 = inside.link_by_name("eth0").await.unwrap().unwrap();
        inside
            .remove_address(eth0.index, attached.addresses[0].address)
            .await
            .unwrap();
        let expected = [attached.addresses[0].address];
        check(&host, &network, &id, &pod, &expected)
            .await
            .unwrap_err();
        assert_eq!(add(&host, &network, &id, &pod).await.unwrap(), attached);
        check(&host, &network, &id, &pod, &expected).await.unwrap();

        // Somebody deleted the bridge: it comes back with its ports.
        let bridge = host.link_by_name("gantry0").await.unwrap().unwrap();
        host.remove_link(bridge.index).await.unwrap();
        assert_eq!(add(&host, &network, &id, &pod).await.unwrap(), attached);
        check(&host, &network, &id, &pod, &expected).await.unwrap();

        // The pod's netns was replaced while the old one still lives.
        let replaced = pod_netns();
        add(&host, &network, &id, &replaced).await.unwrap();
        check(&host, &network, &id, &replaced, &expected)
            .await
            .unwrap();

        // Killed in the middle of DEL: the link is gone, the lease is not.
        let name = host_ifname("gantry", &id);
        let link = host.link_by_name(&name).await.unwrap().unwrap();
        host.remove_link(link.index).await.unwrap();
        remove(&host, &network, &id, &[]).await.unwrap();
        assert!(ipam(&network).unwrap().leases().unwrap().is_empty());
    });
}

#[test]
fn a_failed_add_leaves_nothing() {
    on_a_node(|| async {
        let dir = tempfile::tempdir().unwrap();
        let network = network(dir.path().into(), &["10.77.1.0/30"]);
        let host = Netlink::open().unwrap();
        // The interface name is taken by something that is not ours.
        let pod = pod_netns();
        let inside = Netlink::open_in(&pod).await.unwrap();
        let foreign = BridgeSpec {
            name: "eth0",
            mac: [2, 0, 0, 0, 0, 9],
            mtu: 1500,
        };
        inside.create_bridge(&foreign).await.unwrap();
        let error = add(&host, &network, &owner("a"), &pod).await.unwrap_err();
        assert!(
            error.to_string().contains("interface eth0 exists already"),
            "{error}"
        );
        assert!(ipam(&network).unwrap().leases().unwrap().is_empty());
        // The only address is free for the next one, and then the range is exhausted.
        let (b, c) = (pod_netns(), pod_netns());
        add(&host, &network, &owner("b"), &b).await.unwrap();
        let error = add(&host, &network, &owner("c"), &c).await.unwrap_err();
        assert_eq!(error.code(), 101);
        assert_eq!(status(&host, &network).await.unwrap_err().code(), 50);
        // The node's own namespace is refused.
        let own = Netns::current().unwrap();
        let error = add(&host, &network, &owner("d"), &own).await.unwrap_err();
        assert!(
            error
                .to_string()
                .contains("the node's own network namespace"),
            "{error}"
        );
    });
}

#[test]
fn a_hundred_parallel_adds_get_distinct_addresses() {
    on_a_node(|| async {
        let dir = tempfile::tempdir().unwrap();
        let network = network(dir.path().into(), &["10.77.1.0/24"]);
        let host = Netlink::open().unwrap();
        let pods: Vec<Netns> = (0..100).map(|_| pod_netns()).collect();
        let begun = Instant::now();
        let adds = pods.iter().enumerate().map(|(n, netns)| {
            let (host, network) = (&host, &network);
            async move {
                add(host, network, &owner(&format!("pod-{n}")), netns)
                    .await
                    .unwrap()
            }
        });
        let attached = futures_util::future::join_all(adds).await;
        eprintln!("100 parallel ADDs: {:?}", begun.elapsed());
        let distinct: HashSet<_> = attached.iter().map(|a| a.addresses[0].address).collect();
        assert_eq!(distinct.len(), 100);

        // GC keeps what is named and removes the rest, links and leases.
        let valid: HashSet<Owner> = (0..3).map(|n| owner(&format!("pod-{n}"))).collect();
        collect(&host, &network, &valid).await.unwrap();
        let bridge = host.link_by_name("gantry0").await.unwrap().unwrap();
        assert_eq!(ports(&host.links().await.unwrap(), &bridge).len(), 3);
        assert_eq!(ipam(&network).unwrap().leases().unwrap().len(), 3);
    });
}

#[test]
fn the_mtu_is_the_uplinks_or_the_configured_one() {
    on_a_node(|| async {
        let dir = tempfile::tempdir().unwrap();
        let mut network = network(dir.path().into(), &["10.77.1.0/24"]);
        let host = Netlink::open().unwrap();
        let uplink = BridgeSpec {
            name: "uplink",
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1420,
        };
        host.create_bridge(&uplink).await.unwrap();
        let uplink = host.link_by_name("uplink").await.unwrap().unwrap();
        host.ensure_address(uplink.index, "192.0.2.2/24".parse().unwrap())
            .await
            .unwrap();
        let via = default_route("192.0.2.1".parse().unwrap(), uplink.index);
        host.ensure_route(&via).await.unwrap();
        let pod = pod_netns();
        let attached = add(&host, &network, &owner("a"), &pod).await.unwrap();
        assert_eq!(attached.mtu, 1420);
        network.mtu = Some(1300);
        let attached = add(&host, &network, &owner("a"), &pod).await.unwrap();
        assert_eq!(attached.mtu, 1300);
        let inside = Netlink::open_in(&pod).await.unwrap();
        assert_eq!(
            inside.link_by_name("eth0").await.unwrap().unwrap().mtu,
            1300
        );
    });
}

#[test]
fn node_routes_follow_the_wish() {
    use crate::routes::{NodeRoute, Wanted, Way, ensure};
    on_a_node(|| async {
        let host = Netlink::open().unwrap();
        let uplink = BridgeSpec {
            name: "uplink",
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
        };
        host.create_bridge(&uplink).await.unwrap();
        let uplink = host.link_by_name("uplink").await.unwrap().unwrap();
        host.ensure_address(uplink.index, "192.0.2.2/24".parse().unwrap())
            .await
            .unwrap();
        let node = |cidr: &str, via: &str| NodeRoute {
            pod_cidr: cidr.parse().unwrap(),
            via: via.parse().unwrap(),
            way: Way::Link(uplink.index),
        };
        let of = |routes: &[NodeRoute]| Wanted {
            routes: routes.to_vec(),
            ..Wanted::default()
        };
        let ours = |routes: Vec<Route>| -> Vec<String> {
            let mut ours: Vec<String> = (routes.iter())
                .filter(|route| route.protocol == crate::netlink::ROUTE_PROTOCOL)
                .map(|route| format!("{} {:?}", route.destination, route.gateway.unwrap()))
                .collect();
            ours.sort();
            ours
        };
        let two = [
            node("10.244.2.0/24", "192.0.2.3"),
            node("10.244.3.0/24", "192.0.2.4"),
        ];
        ensure(&host, &of(&two)).await.unwrap();
        let expected = ["10.244.2.0/24 192.0.2.3", "10.244.3.0/24 192.0.2.4"];
        assert_eq!(ours(host.routes().await.unwrap()), expected);
        // One node moved, one left, one is not reachable: the reachable ones are right.
        let next = [
            node("10.244.2.0/24", "192.0.2.9"),
            node("10.244.4.0/24", "198.51.100.1"),
        ];
        let error = ensure(&host, &of(&next)).await.unwrap_err();
        assert!(
            error.to_string().contains("10.244.4.0/24 via 198.51.100.1"),
            "{error}"
        );
        assert_eq!(
            ours(host.routes().await.unwrap()),
            ["10.244.2.0/24 192.0.2.9"]
        );
        ensure(&host, &of(&[])).await.unwrap();
        assert!(ours(host.routes().await.unwrap()).is_empty());
    });
}

/// Not a claim but a figure; run with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement: takes seconds and asserts nothing about time"]
fn measure_add_and_del() {
    on_a_node(|| async {
        let dir = tempfile::tempdir().unwrap();
        let network = network(dir.path().into(), &["10.77.1.0/24"]);
        let host = Netlink::open().unwrap();
        ensure_bridge(&host, &network).await.unwrap();
        let pods: Vec<Netns> = (0..100).map(|_| pod_netns()).collect();
        let (mut adds, mut dels) = (Vec::new(), Vec::new());
        for (n, pod) in pods.iter().enumerate() {
            let begun = Instant::now();
            add(&host, &network, &owner(&format!("pod-{n}")), pod)
                .await
                .unwrap();
            adds.push(begun.elapsed());
        }
        for (n, pod) in pods.into_iter().enumerate().take(30) {
            let begun = Instant::now();
            remove(&host, &network, &owner(&format!("pod-{n}")), &[])
                .await
                .unwrap();
            dels.push(begun.elapsed());
            drop(pod);
        }
        adds.sort();
        dels.sort();
        eprintln!("ADD p50 {:?} min {:?}", adds[50], adds[0]);
        eprintln!(
            "DEL with the netns alive p50 {:?} min {:?}",
            dels[15], dels[0]
        );
    });
}
