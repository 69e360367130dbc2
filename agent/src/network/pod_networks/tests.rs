//! On a "node" of our own: a thread with network and mount namespaces that nobody else sees.

use std::future::Future;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_cni::netlink::BridgeSpec;
use gantry_cni::netns::within;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use super::super::chain::IFNAME;
use super::super::{census, remove_all};
use super::*;
use crate::dataplane::fake::FakeDataplane;
use crate::view::Settings;

mod routed;

struct Node {
    dir: tempfile::TempDir,
    settings: Settings,
    dataplane: Arc<FakeDataplane>,
    ready_count: usize,
    link: PodLink,
}

/// Runs `test` on a fresh node; skips without root.
fn on_a_node<F, T>(test: F)
where
    F: FnOnce(Node) -> T + Send + 'static,
    T: Future<Output = ()>,
{
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: namespaces need root");
        return;
    }
    let node = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            Netlink::open()
                .unwrap()
                .set_up(LOOPBACK_INDEX)
                .await
                .unwrap();
            let settings = Settings {
                pod_cidr: Some("10.78.1.0/24".parse().unwrap()),
                ..Settings::default()
            };
            let dir = tempfile::tempdir().unwrap();
            let dataplane = Arc::default();
            test(Node {
                dir,
                settings,
                dataplane,
                ready_count: 0,
                link: PodLink::Bridge,
            })
            .await;
        });
    });
    node.join().unwrap();
}

impl Node {
    fn paths(&self) -> Paths {
        Paths {
            run: self.dir.path().join("run"),
            ..Paths::standard("/nonexistent".into())
        }
    }

    fn networks(&self) -> PodNetworks {
        let view = View {
            settings: Arc::new(self.settings.clone()),
            ..View::default()
        };
        // The sender may go: the last value stays readable.
        self.networks_of(watch::channel(Arc::new(view)).1)
    }

    fn networks_of(&self, view: watch::Receiver<Arc<View>>) -> PodNetworks {
        let config = NetworkConfig {
            conf_dir: self.dir.path().join("net.d"),
            plugin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            node_addresses: vec![IpAddr::from([192, 0, 2, 7])],
            ready_count: self.ready_count,
            link: self.link,
            ..NetworkConfig::standard(Vec::new())
        };
        PodNetworks::new(self.paths(), config, view, self.dataplane.clone())
    }

    fn configure(&self, list: &serde_json::Value) {
        let dir = self.dir.path().join("net.d");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("20-third.conflist"), list.to_string()).unwrap();
    }
}

fn spec(name: &str) -> PodNetworkSpec {
    PodNetworkSpec {
        pod: PodUid::new(&format!("uid-{name}")).unwrap(),
        namespace: "default".into(),
        name: name.into(),
        hostname: format!("host-{name}"),
        host_network: false,
        user_range: None,
        bandwidth: Bandwidth::default(),
    }
}

/// A server in pod `to` tells the client in pod `from` which address it sees.
async fn seen_address(from: &PodNetwork, to: &PodNetwork) -> IpAddr {
    seen_address_of(0, from, to).await
}

/// The same by another of their addresses.
async fn seen_address_of(which: usize, from: &PodNetwork, to: &PodNetwork) -> IpAddr {
    let server = SocketAddr::new(to.addresses[which], 8080);
    let netns = Netns::open(to.netns.as_ref().unwrap()).unwrap();
    within(&netns, move || {
        let listener = TcpListener::bind(server).unwrap();
        std::thread::spawn(move || {
            let (mut stream, peer) = listener.accept().unwrap();
            // The answer's end may be another server's beginning, at the same address.
            drop(listener);
            write!(stream, "{}", peer.ip()).unwrap();
        });
        Ok(())
    })
    .await
    .unwrap();
    let netns = Netns::open(from.netns.as_ref().unwrap()).unwrap();
    let text = within(&netns, move || {
        let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(3)).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        Ok(text)
    });
    text.await.unwrap().parse().unwrap()
}

fn hostname_in(utsns: &Path) -> String {
    let file = fs::File::open(utsns).unwrap();
    let inside = std::thread::spawn(move || {
        setns(file, CloneFlags::CLONE_NEWUTS).unwrap();
        nix::unistd::gethostname().unwrap().into_string().unwrap()
    });
    inside.join().unwrap()
}

fn ids(names: &[&str]) -> HashSet<PodUid> {
    names.iter().map(|name| spec(name).pod).collect()
}

#[test]
fn pods_get_networks_and_leave_nothing() {
    on_a_node(|node| async move {
        // A new network namespace takes it from the machine, where something else may forward.
        let before = gantry_cni::sysctl::read("net/ipv4/ip_forward").unwrap();
        let networks = node.networks();
        let a = networks.ensure(&spec("a")).await.unwrap();
        let b = networks.ensure(&spec("b")).await.unwrap();
        assert_eq!(a.addresses, [IpAddr::from([10, 78, 1, 2])]);
        assert_eq!(hostname_in(a.utsns.as_ref().unwrap()), "host-a");
        assert_eq!(seen_address(&a, &b).await, a.addresses[0], "no NAT");
        assert_eq!(
            gantry_cni::sysctl::read("net/ipv4/ip_forward").unwrap(),
            "1"
        );
        // A second call, also by a new agent, finds the same.
        let path = node.dataplane.pod(&spec("a").pod).unwrap();
        assert_eq!(node.networks().ensure(&spec("a")).await.unwrap(), a);
        assert_eq!(node.dataplane.pod(&spec("a").pod), Some(path.clone()));
        assert_in_the_packet_path(&a, &path).await;

        networks.remove(&spec("a").pod).await.unwrap();
        networks.remove(&spec("a").pod).await.unwrap();
        assert_eq!(node.dataplane.pod(&spec("a").pod), None);
        let left = census(&node.paths()).await.unwrap();
        assert_eq!(
            (left.links.len(), left.leases.len(), left.namespaces.len()),
            (2, 1, 1)
        );
        networks.remove(&spec("b").pod).await.unwrap();
        assert_eq!(
            census(&node.paths()).await.unwrap().lines(),
            ["link gantry0"]
        );
        remove_all(&node.paths()).await.unwrap();
        remove_all(&node.paths()).await.unwrap();
        assert!(census(&node.paths()).await.unwrap().is_empty());
        assert_eq!(
            gantry_cni::sysctl::read("net/ipv4/ip_forward").unwrap(),
            before
        );
    });
}

#[test]
fn a_new_agent_mends_a_port_that_was_broken_meanwhile() {
    on_a_node(|node| async move {
        let a = node.networks().ensure(&spec("a")).await.unwrap();
        let b = node.networks().ensure(&spec("b")).await.unwrap();
        let host = Netlink::open().unwrap();
        let bridge = node.networks().own_network().unwrap();
        let port = bridge::host_ifname(&bridge.name, &owner(&spec("a").pod));
        let link = host.link_by_name(&port).await.unwrap().unwrap();
        host.remove_link(link.index).await.unwrap();
        assert_eq!(node.networks().ensure(&spec("a")).await.unwrap(), a);
        assert_eq!(seen_address(&a, &b).await, a.addresses[0]);
        // The bridge with all its ports.
        let link = host.link_by_name(&bridge.bridge).await.unwrap().unwrap();
        host.remove_link(link.index).await.unwrap();
        assert_eq!(node.networks().ensure(&spec("a")).await.unwrap(), a);
        assert_eq!(node.networks().ensure(&spec("b")).await.unwrap(), b);
        assert_eq!(seen_address(&b, &a).await, b.addresses[0]);
        for name in ["a", "b"] {
            node.networks().remove(&spec(name).pod).await.unwrap();
        }
        remove_all(&node.paths()).await.unwrap();
    });
}

#[test]
fn host_network_pods_have_the_nodes_addresses_and_an_ipc_namespace() {
    on_a_node(|node| async move {
        let networks = node.networks();
        let mut spec = spec("a");
        spec.host_network = true;
        let network = networks.ensure(&spec).await.unwrap();
        assert_eq!(network.addresses, [IpAddr::from([192, 0, 2, 7])]);
        assert_eq!((network.netns, network.utsns), (None, None));
        assert_eq!(node.dataplane.pod(&spec.pod), None);
        assert!(gantry_cni::netns::is_pinned(&network.ipcns));
        networks.remove(&spec.pod).await.unwrap();
        assert!(census(&node.paths()).await.unwrap().is_empty());
    });
}

#[test]
fn without_a_prefix_a_pod_waits_and_nothing_is_left() {
    on_a_node(|mut node| async move {
        node.settings.pod_cidr = None;
        let error = node.networks().ensure(&spec("a")).await.unwrap_err();
        assert!(matches!(error, NetworkError::NotReady(_)), "{error}");
        assert!(census(&node.paths()).await.unwrap().is_empty());
    });
}

#[test]
fn what_a_crash_leaves_is_finished_or_removed() {
    on_a_node(|node| async move {
        let networks = node.networks();
        let pod = spec("a").pod;
        let dir = node.paths().namespaces(&pod);
        let whole = networks.ensure(&spec("a")).await.unwrap();

        // Killed after the intent, before ADD's end: the record has no result.
        let mut record = Record::load(&node.paths().run, &pod).unwrap().unwrap();
        (record.result, record.addresses) = (None, Vec::new());
        record.store(&node.paths().run, &pod).unwrap();
        assert_eq!(networks.ensure(&spec("a")).await.unwrap(), whole);

        // Killed between two pins.
        nix::mount::umount2(&dir.join("uts"), nix::mount::MntFlags::MNT_DETACH).unwrap();
        assert_eq!(networks.ensure(&spec("a")).await.unwrap(), whole);
        let b = networks.ensure(&spec("b")).await.unwrap();
        assert_eq!(seen_address(&whole, &b).await, whole.addresses[0]);

        // Killed in the middle of a removal: pins gone, the rest not.
        namespaces::remove(&dir).unwrap();
        networks.remove(&pod).await.unwrap();
        // The record lost: names are enough.
        Record::remove(&node.paths().run, &spec("b").pod).unwrap();
        networks.remove(&spec("b").pod).await.unwrap();
        assert_eq!(
            census(&node.paths()).await.unwrap().lines(),
            ["link gantry0"]
        );
    });
}

/// Until the pool has what it is to have.
async fn filled(networks: &PodNetworks, count: usize) {
    networks.pool.fill(&networks.wirer);
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while networks.pool.len() < count {
        assert!(std::time::Instant::now() < deadline, "the pool stays empty");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn a_pod_takes_over_a_sandbox_that_was_made_in_advance() {
    on_a_node(|mut node| async move {
        node.ready_count = 2;
        let networks = node.networks();
        filled(&networks, 2).await;
        let waiting = census(&node.paths()).await.unwrap();
        assert_eq!((waiting.links.len(), waiting.leases.len()), (3, 2));

        let a = networks.ensure(&spec("a")).await.unwrap();
        let b = networks.ensure(&spec("b")).await.unwrap();
        assert_eq!(hostname_in(a.utsns.as_ref().unwrap()), "host-a");
        assert_eq!(seen_address(&a, &b).await, a.addresses[0], "no NAT");
        let path = node.dataplane.pod(&spec("a").pod).unwrap();
        assert!(path.prepared && node.dataplane.is_prepared(path.ifindex));
        assert_in_the_packet_path(&a, &path).await;
        let after = census(&node.paths()).await.unwrap();
        let both = |census: &super::super::Census| (census.links.clone(), census.leases.clone());
        assert_eq!(both(&after).0.len(), 3, "nothing was made for these pods");

        // A new agent finds the pods, and gives back what the old one had in waiting.
        filled(&networks, 2).await;
        drop(networks);
        node.ready_count = 0;
        let networks = node.networks();
        networks.retain(&ids(&["a", "b"])).await.unwrap();
        assert_eq!(networks.ensure(&spec("a")).await.unwrap(), a);
        assert!(!node.dataplane.pod(&spec("a").pod).unwrap().prepared);
        let left = census(&node.paths()).await.unwrap();
        assert_eq!((left.links.len(), left.leases.len()), (3, 2));
        networks.remove(&spec("a").pod).await.unwrap();
        networks.remove(&spec("b").pod).await.unwrap();
        let left = census(&node.paths()).await.unwrap();
        assert_eq!(left.lines(), ["link gantry0"]);
    });
}

#[test]
fn a_pod_has_its_address_again_though_a_sandbox_in_waiting_has_it() {
    on_a_node(|mut node| async move {
        node.ready_count = 2;
        let mut view = View {
            settings: Arc::new(node.settings.clone()),
            ..View::default()
        };
        // As the disk has them after a reboot; the pool leases the lowest addresses first.
        for (name, address) in [("a", "10.78.1.3"), ("b", "10.78.1.2")] {
            let pod: Pod = serde_json::from_value(serde_json::json!({
                "metadata": {"name": name}, "status": {"podIP": address}
            }))
            .unwrap();
            Arc::make_mut(&mut view.pods).insert(spec(name).pod, Arc::new(pod));
        }
        let networks = node.networks_of(watch::channel(Arc::new(view)).1);
        filled(&networks, 2).await;
        for (name, address) in [("a", [10, 78, 1, 3]), ("b", [10, 78, 1, 2])] {
            let network = networks.ensure(&spec(name)).await.unwrap();
            assert_eq!(network.addresses, [IpAddr::from(address)], "{name}");
        }
        for name in ["a", "b"] {
            networks.remove(&spec(name).pod).await.unwrap();
        }
    });
}

#[test]
fn a_crash_while_a_sandbox_is_taken_over_is_finished() {
    on_a_node(|mut node| async move {
        node.ready_count = 1;
        let networks = node.networks();
        filled(&networks, 1).await;
        let pod = spec("a").pod;
        let whole = networks.ensure(&spec("a")).await.unwrap();
        // Killed after the record, before the pins: the namespaces went with the agent.
        namespaces::remove(&node.paths().namespaces(&pod)).unwrap();
        assert_eq!(networks.ensure(&spec("a")).await.unwrap(), whole);
        // Killed before the record: the pod makes its own, the lease is given back.
        filled(&networks, 1).await;
        let taken = networks.pool.take(networks.wirer.prefixes().as_ref());
        let container = taken.unwrap().wires.unwrap().container;
        networks.pool.recorded(&container);
        node.ready_count = 0;
        let networks = node.networks();
        networks.retain(&ids(&["a"])).await.unwrap();
        let left = census(&node.paths()).await.unwrap();
        assert_eq!((left.links.len(), left.leases.len()), (2, 1));
        networks.remove(&pod).await.unwrap();
    });
}

#[test]
fn the_last_addresses_go_to_pods_and_not_to_sandboxes_in_waiting() {
    on_a_node(|mut node| async move {
        // Five for pods: of the eight, two are the network's own and one is the bridge's.
        node.settings.pod_cidr = Some("10.78.1.0/29".parse().unwrap());
        node.ready_count = 2;
        let networks = node.networks();
        filled(&networks, 2).await;
        let names = ["a", "b", "c", "d"];
        for name in names {
            // Begun before: such a pod takes nothing from the pool.
            fs::create_dir_all(node.paths().namespaces(&spec(name).pod)).unwrap();
            networks.ensure(&spec(name)).await.unwrap();
        }
        assert_eq!(networks.pool.len(), 0);
        let leases = census(&node.paths()).await.unwrap().leases;
        let of_pods = leases.iter().filter(|lease| lease.contains("uid-"));
        assert_eq!(of_pods.count(), 4, "{leases:?}");
        for name in names {
            networks.remove(&spec(name).pod).await.unwrap();
        }
    });
}

#[test]
fn sandboxes_of_an_earlier_prefix_are_not_given_to_pods() {
    on_a_node(|mut node| async move {
        node.ready_count = 1;
        let (sender, view) = watch::channel(Arc::new(View {
            settings: Arc::new(node.settings.clone()),
            ..View::default()
        }));
        let networks = node.networks_of(view);
        filled(&networks, 1).await;
        let settings = Settings {
            pod_cidr: Some("10.78.9.0/24".parse().unwrap()),
            ..Settings::default()
        };
        sender.send_replace(Arc::new(View {
            settings: Arc::new(settings),
            ..View::default()
        }));
        let a = networks.ensure(&spec("a")).await.unwrap();
        assert_eq!(a.addresses, [IpAddr::from([10, 78, 9, 2])]);
        // The old one is removed, and one of the new prefix made.
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        loop {
            let leases = census(&node.paths()).await.unwrap().leases;
            if leases.len() == 2 && leases.iter().all(|lease| lease.contains("10.78.9.")) {
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{leases:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        networks.remove(&spec("a").pod).await.unwrap();
        networks.pool.discard(&networks.wirer, |_| true).await;
    });
}

#[test]
fn retain_removes_what_no_living_pod_owns() {
    on_a_node(|node| async move {
        let networks = node.networks();
        for name in ["a", "b", "c", "d"] {
            networks.ensure(&spec(name)).await.unwrap();
        }
        // c: only its link is left; d: only its lease.
        let (c, d) = (spec("c").pod, spec("d").pod);
        Record::remove(&node.paths().run, &c).unwrap();
        networks.detach_lease_only(&c).await;
        networks.remove(&d).await.unwrap();
        let prefixes = ["10.78.1.0/24".parse().unwrap()];
        let network = networks.wirer.network(&prefixes, PodLink::Bridge).unwrap();
        bridge::ipam(&network)
            .unwrap()
            .allocate(&owner(&d))
            .unwrap();

        networks.retain(&ids(&["a"])).await.unwrap();
        let left = census(&node.paths()).await.unwrap();
        let name = bridge::host_ifname("gantry", &owner(&spec("a").pod));
        let mut links = left.links.clone();
        links.sort();
        let mut wanted = vec!["gantry0".to_string(), name];
        wanted.sort();
        assert_eq!(links, wanted);
        assert_eq!(
            (
                left.leases.len(),
                left.namespaces.len(),
                left.attachments.len()
            ),
            (1, 1, 1)
        );
        networks.retain(&HashSet::new()).await.unwrap();
        assert_eq!(
            census(&node.paths()).await.unwrap().lines(),
            ["link gantry0"]
        );
    });
}

impl PodNetworks {
    async fn detach_lease_only(&self, pod: &PodUid) {
        let (host, network) = (Netlink::open().unwrap(), self.own_network().unwrap());
        bridge::release(&host, &network, &owner(pod), &[])
            .await
            .unwrap();
        namespaces::remove(&self.paths.namespaces(pod)).unwrap();
    }
}

/// The data plane was told the pod's addresses, its veth, and whom it sends by, as the kernel has them.
async fn assert_in_the_packet_path(network: &PodNetwork, path: &PodInterface) {
    assert_eq!(path.addresses, network.addresses);
    let netns = Netns::open(network.netns.as_ref().unwrap()).unwrap();
    let inside = Netlink::open_in(&netns).await.unwrap();
    let inner = inside.link_by_name(IFNAME).await.unwrap().unwrap();
    let host = Netlink::open().unwrap();
    let outer = host.link_by_index(path.ifindex).await.unwrap().unwrap();
    assert_eq!(inner.peer, Some(outer.index));
    let gateway = match outer.master {
        Some(bridge) => host.link_by_index(bridge).await.unwrap().unwrap(),
        None => outer,
    };
    assert_eq!(
        (inner.mac, gateway.mac),
        (Some(path.pod_mac), Some(path.gateway_mac))
    );
}

/// Whether Debian's containernetworking-plugins are there; if not, the reason is printed.
fn debian_plugins(names: &[&str]) -> bool {
    let missing = names
        .iter()
        .find(|name| !Path::new("/usr/lib/cni").join(name).exists());
    if let Some(name) = missing {
        eprintln!(
            "skipped: /usr/lib/cni/{name} is missing: apt-get install \
                   containernetworking-plugins"
        );
    }
    missing.is_none()
}

fn third_party(node: &Node, main: &str) -> serde_json::Value {
    serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "third",
        "plugins": [
            {
                "type": main,
                "bridge": "third0",
                "isGateway": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{ "subnet": "10.79.0.0/24" }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                    "dataDir": node.dir.path().join("host-local"),
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
}

#[test]
fn a_third_partys_plugins_wire_pods_and_give_everything_back() {
    if !debian_plugins(&["bridge", "ptp", "host-local", "portmap"]) {
        return;
    }
    for main in ["bridge", "ptp"] {
        on_a_node(move |node| async move {
            node.configure(&third_party(&node, main));
            let networks = node.networks();
            let a = networks.ensure(&spec("a")).await.unwrap();
            let b = networks.ensure(&spec("b")).await.unwrap();
            assert!(a.addresses[0].to_string().starts_with("10.79.0."), "{a:?}");
            gantry_cni::sysctl::ensure("net/ipv4/ip_forward", "1").unwrap();
            assert_eq!(seen_address(&a, &b).await, a.addresses[0]);
            // Found again, without running a plugin: the directory of plugins is gone.
            let mut again = node.networks();
            again.runner.path.clear();
            assert_eq!(again.ensure(&spec("a")).await.unwrap(), a);
            let path = node.dataplane.pod(&spec("a").pod).unwrap();
            assert_in_the_packet_path(&a, &path).await;
            // The configuration changes while pods live: they leave as they came.
            fs::remove_dir_all(node.dir.path().join("net.d")).unwrap();
            // ADD was interrupted: undone, then done again.
            let mut record = Record::load(&node.paths().run, &spec("a").pod)
                .unwrap()
                .unwrap();
            record.result = None;
            record.store(&node.paths().run, &spec("a").pod).unwrap();
            node.configure(&third_party(&node, main));
            let c = networks.ensure(&spec("a")).await.unwrap();
            assert_ne!(c.addresses, b.addresses);
            networks.remove(&spec("a").pod).await.unwrap();
            networks.remove(&spec("a").pod).await.unwrap();
            networks.retain(&HashSet::new()).await.unwrap();
            let leases = fs::read_dir(node.dir.path().join("host-local/third")).unwrap();
            let leases: Vec<_> = leases
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter(|name| name.parse::<IpAddr>().is_ok())
                .collect();
            assert!(leases.is_empty(), "{leases:?}");
            assert!(census(&node.paths()).await.unwrap().is_empty());
        });
    }
}

#[test]
fn a_pod_without_veth_runs_and_is_not_in_the_packet_path() {
    if !debian_plugins(&["ipvlan", "host-local"]) {
        return;
    }
    on_a_node(|node| async move {
        let host = Netlink::open().unwrap();
        let spec_of_uplink = BridgeSpec {
            name: "uplink0",
            mac: [2, 0, 0, 0, 0, 9],
            mtu: 1500,
        };
        host.create_bridge(&spec_of_uplink).await.unwrap();
        let mut list = third_party(&node, "ipvlan");
        list["plugins"].as_array_mut().unwrap().truncate(1);
        list["plugins"][0]["master"] = serde_json::json!("uplink0");
        node.configure(&list);
        match node.networks().ensure(&spec("a")).await {
            Ok(network) => assert_eq!(network.addresses.len(), 1),
            Err(error) if error.to_string().contains("not supported") => {
                return eprintln!("skipped: no ipvlan: {error}");
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!(node.dataplane.pod(&spec("a").pod), None);
        node.networks().remove(&spec("a").pod).await.unwrap();
    });
}

#[test]
fn a_third_partys_refusal_is_shown_in_its_own_words() {
    if !debian_plugins(&["bridge"]) {
        return;
    }
    on_a_node(|node| async move {
        let mut list = third_party(&node, "bridge");
        list["plugins"][0]["ipam"]["ranges"] = serde_json::json!([[{ "subnet": "10.79.0.0/32" }]]);
        node.configure(&list);
        let error = node
            .networks()
            .ensure(&spec("a"))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("cni bridge: "), "{error}");
        assert!(error.contains("10.79.0.0"), "{error}");
        list["plugins"][0]["type"] = serde_json::json!("no-such-plugin");
        node.configure(&list);
        let error = node
            .networks()
            .ensure(&spec("b"))
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("cni plugin no-such-plugin: not in /opt/cni/bin"),
            "{error}"
        );
    });
}

/// Not a claim but a figure; run with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement: takes seconds and asserts nothing about time"]
fn measure_ensure_and_remove() {
    on_a_node(|node| async move {
        let networks = node.networks();
        let (mut ensures, mut removes) = (Vec::new(), Vec::new());
        let names: Vec<String> = (0..100).map(|n| n.to_string()).collect();
        for name in &names {
            let begun = std::time::Instant::now();
            networks.ensure(&spec(name)).await.unwrap();
            ensures.push(begun.elapsed());
        }
        for name in &names[..50] {
            let begun = std::time::Instant::now();
            networks.remove(&spec(name).pod).await.unwrap();
            removes.push(begun.elapsed());
        }
        let begun = std::time::Instant::now();
        networks.retain(&HashSet::new()).await.unwrap();
        let batch = begun.elapsed();
        ensures.sort();
        removes.sort();
        eprintln!("ensure p50 {:?} min {:?}", ensures[50], ensures[0]);
        eprintln!(
            "remove p50 {:?} min {:?}; 50 at once {batch:?}",
            removes[25], removes[0]
        );
    });
}
