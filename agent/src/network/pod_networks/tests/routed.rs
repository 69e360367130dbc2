//! Pods that are no ports of the bridge: few of them in every situation, and more than a bridge takes.

use std::time::Instant;

use super::super::super::packet_size;
use super::*;

/// More than the ports of a bridge.
const MANY: usize = 1_200;
/// Of those, as many are asked, spread over all.
const SAMPLE_STEP: usize = 100;

fn has_ipv6() -> bool {
    let disabled = fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6");
    disabled.is_ok_and(|text| text.trim() == "0")
}

/// As [`on_a_node`], with prefixes for many pods, of both families where the machine has them.
fn on_a_routed_node<F, T>(test: F)
where
    F: FnOnce(Node) -> T + Send + 'static,
    T: Future<Output = ()>,
{
    on_a_node(|mut node| {
        node.link = PodLink::Routed;
        node.settings.pod_cidr = Some("10.78.0.0/20".parse().unwrap());
        match has_ipv6() {
            true => node.settings.pod_cidr_second = Some("fd78::/64".parse().unwrap()),
            false => eprintln!("skipped: IPv6 part: disabled on this machine"),
        }
        test(node)
    });
}

/// Both directions, every family, with their own addresses.
async fn assert_reach(a: &PodNetwork, b: &PodNetwork) {
    for which in 0..a.addresses.len() {
        assert_eq!(seen_address_of(which, a, b).await, a.addresses[which]);
        assert_eq!(seen_address_of(which, b, a).await, b.addresses[which]);
    }
}

/// The node asks the pod, which sees the gateway.
async fn assert_reached_by_node(pod: &PodNetwork) {
    for address in pod.addresses.clone() {
        let server = SocketAddr::new(address, 8090);
        let netns = Netns::open(pod.netns.as_ref().unwrap()).unwrap();
        let listener = within(&netns, move || Ok(TcpListener::bind(server).unwrap())).await;
        let listener = listener.unwrap();
        let asked = tokio::task::spawn_blocking(move || {
            TcpStream::connect_timeout(&server, Duration::from_secs(3))
        });
        let client = asked.await.unwrap().unwrap();
        let (_, seen) = listener.accept().unwrap();
        assert_eq!(seen, client.local_addr().unwrap());
        let gateway = match seen.ip() {
            IpAddr::V4(ip) => ip.octets().ends_with(&[0, 1]),
            IpAddr::V6(ip) => ip.octets().ends_with(&[0, 1]),
        };
        assert!(gateway, "{seen}");
    }
}

/// Of the pod's veth on the node.
async fn master_of(node: &Node, name: &str) -> Option<u32> {
    let path = node.dataplane.pod(&spec(name).pod).unwrap();
    let host = Netlink::open().unwrap();
    let link = host.link_by_index(path.ifindex).await.unwrap().unwrap();
    link.master
}

#[test]
fn routed_pods_are_reached_found_again_and_leave_nothing() {
    on_a_routed_node(|node| async move {
        let networks = node.networks();
        let a = networks.ensure(&spec("a")).await.unwrap();
        let b = networks.ensure(&spec("b")).await.unwrap();
        assert_eq!(master_of(&node, "a").await, None);
        assert_reach(&a, &b).await;
        assert_reached_by_node(&a).await;
        // A second call, also by a new agent, finds the same.
        let path = node.dataplane.pod(&spec("a").pod).unwrap();
        assert_eq!(node.networks().ensure(&spec("a")).await.unwrap(), a);
        assert_eq!(node.dataplane.pod(&spec("a").pod), Some(path.clone()));
        assert_in_the_packet_path(&a, &path).await;

        // The device with the gateways' addresses goes, and the routes from there; then a pod's link.
        let host = Netlink::open().unwrap();
        let bridge = host.link_by_name("gantry0").await.unwrap().unwrap();
        host.remove_link(bridge.index).await.unwrap();
        for name in ["a", "b"] {
            node.networks().ensure(&spec(name)).await.unwrap();
        }
        assert_reach(&a, &b).await;
        assert_reached_by_node(&b).await;
        host.remove_link(path.ifindex).await.unwrap();
        assert_eq!(node.networks().ensure(&spec("a")).await.unwrap(), a);
        assert_reach(&a, &b).await;

        networks.retain(&ids(&["a"])).await.unwrap();
        assert_reached_by_node(&a).await;
        let left = census(&node.paths()).await.unwrap();
        let families = a.addresses.len();
        assert_eq!(
            (left.links.len(), left.leases.len(), left.routes.len()),
            (2, families, families)
        );
        networks.remove(&spec("a").pod).await.unwrap();
        assert_eq!(
            census(&node.paths()).await.unwrap().lines(),
            ["link gantry0"]
        );
        remove_all(&node.paths()).await.unwrap();
        assert!(census(&node.paths()).await.unwrap().is_empty());
    });
}

#[test]
fn routed_pods_of_the_pool_and_ports_of_the_bridge_reach_each_other() {
    on_a_routed_node(|mut node| async move {
        // Three agents: the node is told otherwise twice, and pods stay as they are.
        node.link = PodLink::Bridge;
        let a = node.networks().ensure(&spec("a")).await.unwrap();
        node.link = PodLink::Routed;
        node.ready_count = 1;
        let networks = node.networks();
        filled(&networks, 1).await;
        let b = networks.ensure(&spec("b")).await.unwrap();
        assert!(node.dataplane.pod(&spec("b").pod).unwrap().prepared);
        // Its next one goes with it.
        filled(&networks, 1).await;
        drop(networks);
        node.link = PodLink::Bridge;
        node.ready_count = 0;
        let networks = node.networks();
        networks.retain(&ids(&["a", "b"])).await.unwrap();
        let c = networks.ensure(&spec("c")).await.unwrap();
        assert_eq!(networks.ensure(&spec("a")).await.unwrap(), a);
        assert_eq!(networks.ensure(&spec("b")).await.unwrap(), b);
        assert!(master_of(&node, "a").await.is_some());
        assert_eq!(master_of(&node, "b").await, None);
        assert_eq!(master_of(&node, "c").await, master_of(&node, "a").await);
        for (from, to) in [(&a, &b), (&b, &c), (&a, &c)] {
            assert_reach(from, to).await;
        }
        for pod in [&a, &b, &c] {
            assert_reached_by_node(pod).await;
        }
        // The size of packets is changed for both kinds.
        packet_size::apply(&networks.wirer, &networks.pool, 1_400)
            .await
            .unwrap();
        let host = Netlink::open().unwrap();
        for (name, pod) in [("a", &a), ("b", &b)] {
            let index = node.dataplane.pod(&spec(name).pod).unwrap().ifindex;
            let outer = host.link_by_index(index).await.unwrap().unwrap();
            let netns = Netns::open(pod.netns.as_ref().unwrap()).unwrap();
            let inside = Netlink::open_in(&netns).await.unwrap();
            let inner = inside.link_by_name(IFNAME).await.unwrap().unwrap();
            assert_eq!((outer.mtu, inner.mtu), (1_400, 1_400), "{name}");
        }
        for name in ["a", "b", "c"] {
            networks.remove(&spec(name).pod).await.unwrap();
        }
        assert_eq!(
            census(&node.paths()).await.unwrap().lines(),
            ["link gantry0"]
        );
    });
}

#[test]
fn a_crash_of_a_routed_pod_is_finished_or_removed() {
    on_a_routed_node(|node| async move {
        let networks = node.networks();
        let pod = spec("a").pod;
        let whole = networks.ensure(&spec("a")).await.unwrap();
        // Killed after the intent, before ADD's end: the record has no result.
        let mut record = Record::load(&node.paths().run, &pod).unwrap().unwrap();
        (record.result, record.addresses) = (None, Vec::new());
        record.store(&node.paths().run, &pod).unwrap();
        assert_eq!(networks.ensure(&spec("a")).await.unwrap(), whole);
        // The record lost, by an agent that is told otherwise now: names are enough.
        networks.ensure(&spec("b")).await.unwrap();
        Record::remove(&node.paths().run, &pod).unwrap();
        let mut node = node;
        node.link = PodLink::Bridge;
        node.networks().retain(&ids(&["b"])).await.unwrap();
        let left = census(&node.paths()).await.unwrap();
        assert_eq!((left.links.len(), left.attachments.len()), (2, 1));
        assert_eq!(left.routes.len(), whole.addresses.len());
        node.networks().retain(&ids(&[])).await.unwrap();
        assert_eq!(
            census(&node.paths()).await.unwrap().lines(),
            ["link gantry0"]
        );
    });
}

#[test]
fn a_node_has_more_routed_pods_than_a_bridge_has_ports() {
    on_a_routed_node(|node| async move {
        let networks = node.networks();
        let names: Vec<String> = (0..MANY).map(|n| n.to_string()).collect();
        let begun = Instant::now();
        let mut pods = Vec::new();
        for name in &names {
            pods.push(networks.ensure(&spec(name)).await.unwrap());
        }
        let per = |begun: Instant| begun.elapsed() / MANY as u32;
        eprintln!("{MANY} routed pods made: {:?} each", per(begun));
        let all: HashSet<IpAddr> = pods.iter().flat_map(|pod| pod.addresses.clone()).collect();
        assert_eq!(all.len(), MANY * pods[0].addresses.len());
        let sample: Vec<&PodNetwork> = pods.iter().step_by(SAMPLE_STEP).collect();
        for (n, pod) in sample.iter().enumerate() {
            assert_reached_by_node(pod).await;
            assert_reach(pod, sample[(n + 1) % sample.len()]).await;
        }
        // The last one is beyond what the ports of a bridge end at.
        assert_reach(&pods[MANY - 1], &pods[0]).await;
        let made = census(&node.paths()).await.unwrap();
        assert_eq!(made.links.len(), MANY + 1);
        assert_eq!(made.routes.len(), all.len());

        let begun = Instant::now();
        let agent = node.networks();
        for (name, pod) in names.iter().zip(&pods) {
            assert_eq!(agent.ensure(&spec(name)).await.unwrap(), *pod);
        }
        eprintln!(
            "{MANY} routed pods found by a new agent: {:?} each",
            per(begun)
        );
        let begun = Instant::now();
        let (first, rest) = names.split_at(100);
        for name in first {
            agent.remove(&spec(name).pod).await.unwrap();
        }
        eprintln!("100 removed one by one: {:?} each", begun.elapsed() / 100);
        let begun = Instant::now();
        agent.retain(&HashSet::new()).await.unwrap();
        eprintln!("{} removed at once: {:?}", rest.len(), begun.elapsed());
        assert_eq!(
            census(&node.paths()).await.unwrap().lines(),
            ["link gantry0"]
        );
        remove_all(&node.paths()).await.unwrap();
        assert!(census(&node.paths()).await.unwrap().is_empty());
    });
}
