//! Several nodes on one machine: each a network namespace with the agent's own parts for pods' networks,
//! Services, policies and routes in it; no control plane, the test publishes the view itself.
//!
//! ```text
//!  Joined::Link     a, b, c ── br0 ── client                      everybody is on one link
//!  Joined::Router   a, c ── br0 ── client ── (routes) ── br1 ── b      b is on another
//! ```
//! Pods are namespaces too, made by the agent's code; what runs in them is a thread of the test. Nothing
//! of it is seen by the machine but cgroups and directories, which go with the [`Lab`].

pub mod claims;

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use aya::maps::{HashMap, Map, MapData};
use gantry_agent::dataplane::{self, BpfDataplane, Dataplane, Options, XdpMode};
use gantry_agent::ids::PodUid;
use gantry_agent::network::masquerade::Masquerade;
use gantry_agent::network::{
    self, Network, NetworkConfig, PodNetworkSpec, PodNetworks, Routes, Routing, RoutingConfig,
};
use gantry_agent::paths::Paths;
use gantry_agent::view::{Settings, View};
use gantry_api::k8s_openapi::api::core::v1::Pod as PodObject;
use gantry_api::proto;
use gantry_cni::netlink::{BridgeSpec, LOOPBACK_INDEX, Netlink, Route, VethSpec};
use gantry_cni::netns::{Netns, NetnsGuard};
use ipnet::IpNet;
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::json;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::scenario::Skipped;

/// Longer than anything here takes, shorter than a second SYN.
pub const SHORT: Duration = Duration::from_millis(900);
/// For what has to become true.
pub const SOON: Duration = Duration::from_secs(5);

/// The size of a row of the map UPLINKS.
const UPLINK_BYTES: usize = 40;

/// The one pod of each node is a server here.
pub const PORT: u16 = 8080;

/// How the nodes are joined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Joined {
    /// All on one link.
    Link,
    /// The second behind a router.
    Router,
}

/// A network namespace, and threads in it.
pub struct Space {
    netns: Netns,
    runtime: Option<Runtime>,
    /// What was spawned and has not ended.
    tasks: TaskTracker,
}

impl Space {
    fn new() -> Result<Self> {
        let made = std::thread::spawn(|| -> Result<Netns> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(Netns::current()?)
        });
        let netns = made.join().map_err(|_| anyhow!("a thread panicked"))??;
        let inside = netns.clone();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .on_thread_start(move || {
                // A thread in the wrong namespace would change the machine's links.
                if setns(&inside, CloneFlags::CLONE_NEWNET).is_err() {
                    std::process::abort();
                }
            })
            .build()?;
        let space = Self {
            netns,
            runtime: Some(runtime),
            tasks: TaskTracker::new(),
        };
        space.run(async { Ok(Netlink::open()?.set_up(LOOPBACK_INDEX).await?) })?;
        Ok(space)
    }

    /// Runs a future on a thread that is inside.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let runtime = self.runtime.as_ref().context("it has ended")?;
        runtime.block_on(runtime.spawn(work))?
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(runtime) = &self.runtime {
            self.tasks.spawn_on(work, runtime.handle());
        }
    }

    /// Sets a setting of the namespace.
    fn sysctl(&self, name: &'static str, value: &'static str) -> Result<()> {
        self.run(async move { Ok(fs::write(format!("/proc/sys/{name}"), value)?) })
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Runs `work` on a thread in a namespace; sockets made there stay in it.
pub fn inside<T: Send>(netns: &Netns, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let _guard = NetnsGuard::enter(netns)?;
            work()
        });
        thread.join().map_err(|_| anyhow!("a thread panicked"))?
    })
}

/// A pod: where it is and what its address is.
pub struct Pod {
    pub uid: PodUid,
    pub netns: Netns,
    pub address: IpAddr,
    object: Arc<PodObject>,
}

impl Pod {
    /// Where its server listens.
    pub fn server(&self) -> SocketAddr {
        SocketAddr::new(self.address, PORT)
    }
}

/// A node with one pod.
pub struct Node {
    pub name: &'static str,
    pub address: IpAddr,
    pub prefix: IpNet,
    pub space: Space,
    pub paths: Paths,
    pub dataplane: Arc<BpfDataplane>,
    pub routes: watch::Receiver<Routes>,
    pub pod: Pod,
    /// A cgroup whose threads' connections are this node's to translate.
    cgroup: PathBuf,
    agent: CancellationToken,
    view: watch::Sender<Arc<View>>,
    _directory: tempfile::TempDir,
}

/// The nodes, what joins them, and a machine that is no node.
pub struct Lab {
    pub nodes: Vec<Node>,
    pub client: Space,
    pub middle: Space,
    /// What all nodes know.
    pub view: View,
}

impl Lab {
    /// Three nodes with a pod each, which know of each other.
    ///
    /// # Errors
    /// [`Skipped`] where the machine lacks something.
    pub fn new(joined: Joined) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Skipped("network namespaces need root".into()).into());
        }
        let middle = Space::new()?;
        middle.sysctl("net/ipv4/ip_forward", "1")?;
        middle.run(async {
            let host = Netlink::open()?;
            for (name, last, address) in [
                ("br0", 1, "192.0.2.254/24"),
                ("br1", 2, "198.51.100.254/24"),
            ] {
                let bridge = BridgeSpec {
                    name,
                    mac: [2, 0, 0, 0, 0xfe, last],
                    mtu: 1500,
                };
                host.create_bridge(&bridge).await?;
                let link = host.link_by_name(name).await?.context("no bridge")?;
                host.ensure_address(link.index, address.parse()?).await?;
                host.set_up(link.index).await?;
            }
            Ok(())
        })?;
        if joined == Joined::Router {
            needs_vxlan(&middle)?;
        }
        let client = Space::new()?;
        plug(&middle, &client, "client", "br0", "192.0.2.99/24".parse()?)?;
        let far = match joined {
            Joined::Link => ("br0", "192.0.2.2/24"),
            Joined::Router => ("br1", "198.51.100.2/24"),
        };
        let mut nodes = Vec::new();
        let places = [
            ("a", "br0", "192.0.2.1/24"),
            ("b", far.0, far.1),
            ("c", "br0", "192.0.2.3/24"),
        ];
        for (index, (name, bridge, address)) in places.into_iter().enumerate() {
            let space = Space::new()?;
            // As systemd leaves it; a loose one for all would be everybody's.
            space.sysctl("net/ipv4/conf/all/rp_filter", "0")?;
            plug(&middle, &space, name, bridge, address.parse()?)?;
            let address: IpNet = address.parse()?;
            nodes.push(Node::start(name, index, address.addr(), space)?);
        }
        let mut view = View::default();
        for node in &nodes {
            insert_node(&mut view, node);
        }
        let mut lab = Self {
            nodes,
            client,
            middle,
            view,
        };
        lab.publish()?;
        lab.settle()?;
        Ok(lab)
    }

    /// Tells all nodes what the view is now, and waits until Services and policies are programmed.
    pub fn publish(&mut self) -> Result<()> {
        self.view.rev += 1;
        for node in &self.nodes {
            let mut view = self.view.clone();
            view.settings = Arc::new(settings(Some(node.prefix)));
            let pod = (node.pod.uid.clone(), node.pod.object.clone());
            view.pods = Arc::new(BTreeMap::from([pod]));
            node.program(Arc::new(view))?;
        }
        Ok(())
    }

    /// Waits until every node has a way to every other, and Services know the tunnel.
    fn settle(&self) -> Result<()> {
        for node in &self.nodes {
            let others = self.nodes.len() - 1;
            eventually("routes to all nodes", || {
                let routes = node.routes.borrow().clone();
                let done = routes.reached.len() == others && routes.problems.is_empty();
                done.then_some(())
                    .with_context(|| format!("{}: {routes:?}", node.name))
            })?;
            let tunnelled = node.routes.borrow().counts().1 > 0;
            eventually("uplinks with programs", || {
                let links = node.uplink_count()?;
                let wanted = 1 + usize::from(tunnelled);
                (links == wanted)
                    .then_some(())
                    .with_context(|| format!("{links}"))
            })?;
        }
        Ok(())
    }

    pub fn node(&self, name: &str) -> &Node {
        let found = self.nodes.iter().find(|node| node.name == name);
        found.unwrap_or(&self.nodes[0])
    }
}

fn settings(pod_cidr: Option<IpNet>) -> Settings {
    Settings {
        pod_cidr,
        cluster_cidr: "10.244.0.0/16".parse().ok(),
        service_cidr: "10.96.0.0/12".parse().ok(),
        ..Settings::default()
    }
}

/// Shows a node to the others.
pub fn insert_node(view: &mut View, node: &Node) {
    let route = proto::NodeRoute {
        pod_cidr: node.prefix.to_string(),
        addresses: vec![octets(node.address).into()],
        ..Default::default()
    };
    Arc::make_mut(&mut view.nodes).insert(node.name.into(), Arc::new(route));
}

/// 4 or 16 bytes.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn needs_vxlan(space: &Space) -> Result<()> {
    let tunnel = gantry_cni::tunnel::Tunnel {
        vni: 1,
        port: 4789,
        local: "192.0.2.254".parse()?,
        mac: [2, 0, 0, 0, 0, 9],
        mtu: 1400,
        addresses: Vec::new(),
        ends: Vec::new(),
    };
    space.run(async move {
        let host = Netlink::open()?;
        let wanted = gantry_cni::routes::Wanted {
            routes: Vec::new(),
            tunnel: Some(tunnel),
            wireguard: None,
        };
        let made = gantry_cni::routes::ensure(&host, &wanted).await;
        gantry_cni::routes::ensure(&host, &gantry_cni::routes::Wanted::default()).await?;
        match made {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Err(Skipped("this kernel has no VXLAN, and loads no module vxlan".into()).into())
            }
            other => Ok(other?),
        }
    })
}

/// Joins a namespace to a bridge in the middle: `eth0`, with an address and a default route.
fn plug(
    middle: &Space,
    space: &Space,
    name: &'static str,
    bridge: &'static str,
    address: IpNet,
) -> Result<()> {
    let netns = space.netns.clone();
    middle.run(async move {
        let host = Netlink::open()?;
        let master = host.link_by_name(bridge).await?.context("no bridge")?;
        let last = octets(address.addr());
        let veth = VethSpec {
            host_name: &format!("to-{name}"),
            peer_name: "eth0",
            host_mac: None,
            peer_mac: [2, 0, last[0], last[1], last[2], last[3]],
            netns: &netns,
            master: Some(master.index),
            mtu: 1500,
        };
        Ok(host.create_veth(&veth).await?)
    })?;
    space.run(async move {
        let host = Netlink::open()?;
        let link = host.link_by_name("eth0").await?.context("no eth0")?;
        host.ensure_address(link.index, address).await?;
        host.set_up(link.index).await?;
        let router = IpNet::new(address.network(), 24)?;
        let router = match router.network() {
            IpAddr::V4(net) => IpAddr::from((u32::from(net) + 254).to_be_bytes()),
            v6 => v6,
        };
        let default = Route {
            destination: "0.0.0.0/0".parse()?,
            gateway: Some(router),
            link: Some(link.index),
            protocol: 4,
            ..Route::default()
        };
        Ok(host.ensure_route(&default).await?)
    })
}

impl Node {
    fn start(name: &'static str, index: usize, address: IpAddr, space: Space) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let paths = Paths {
            run: directory.path().join("run"),
            lib: directory.path().join("lib"),
            log: directory.path().join("log"),
            bpf: directory.path().join("bpf/gantry"),
            kubelet: directory.path().join("kubelet"),
            bin: directory.path().into(),
        };
        let prefix: IpNet = format!("10.244.{index}.0/24").parse()?;
        let cgroup = threaded_cgroup(name)?;
        let options = Options {
            node: name.into(),
            resolver: None,
            masquerade: Some(Masquerade::default()),
            xdp: XdpMode::Off,
            fast_path: true,
        };
        let (of_paths, of_cgroup) = (paths.clone(), cgroup.clone());
        let dataplane =
            space.run(async move { Ok(BpfDataplane::start(&of_paths, &of_cgroup, options)?) })?;
        let dataplane = Arc::new(dataplane);
        let first = View {
            settings: Arc::new(settings(Some(prefix))),
            ..View::default()
        };
        let (view, follow) = watch::channel(Arc::new(first));
        let (shown, routes) = watch::channel(Routes::default());
        let config = NetworkConfig {
            conf_dir: directory.path().join("net.d"),
            ready_count: 0,
            routes: routes.clone(),
            ..NetworkConfig::standard(vec![address])
        };
        let of_trait: Arc<dyn Dataplane> = dataplane.clone();
        let networks = PodNetworks::new(paths.clone(), config, follow.clone(), of_trait.clone());
        let networks = Arc::new(networks);
        let agent = CancellationToken::new();
        let routing = RoutingConfig {
            node: name.into(),
            addresses: vec![address],
            routing: Routing::Auto,
            port: 4789,
            wireguard: None,
            conf_dir: directory.path().join("net.d"),
        };
        space.spawn(network::follow_near(
            of_trait.clone(),
            routes.clone(),
            agent.clone(),
        ));
        space.spawn(dataplane::look_after_neighbours(
            of_trait.clone(),
            follow.clone(),
            agent.clone(),
        ));
        space.spawn(network::follow_routes(
            routing,
            paths.run.clone(),
            follow,
            shown,
            agent.clone(),
        ));
        space.spawn(network::follow_uplinks(
            of_trait,
            vec![address],
            agent.clone(),
        ));
        space.spawn(networks.follow_packet_size(agent.clone()));
        let pod = start_pod(&space, name, networks)?;
        Ok(Self {
            name,
            address,
            prefix,
            space,
            paths,
            dataplane,
            routes,
            pod,
            cgroup,
            agent,
            view,
            _directory: directory,
        })
    }

    fn program(&self, view: Arc<View>) -> Result<()> {
        let dataplane = self.dataplane.clone();
        let of_dataplane = view.clone();
        self.space.run(async move {
            let stuck = dataplane.apply(&of_dataplane).await?;
            anyhow::ensure!(stuck.is_empty(), "{stuck:?}");
            let closed = dataplane.apply_policies(&of_dataplane)?;
            anyhow::ensure!(closed.is_empty(), "{closed:?}");
            Ok(())
        })?;
        self.view.send_replace(view);
        Ok(())
    }

    /// The agent dies: what it follows is followed no more, what is in the kernel stays.
    pub fn kill_agent(&self) {
        self.agent.cancel();
    }

    /// Links whose packets the programs of uplinks see, by the rows that are pinned.
    fn uplink_count(&self) -> Result<usize> {
        let mut count = 0;
        for directory in fs::read_dir(&self.paths.bpf)?.flatten() {
            let Ok(pinned) = MapData::from_pin(directory.path().join("UPLINKS")) else {
                continue;
            };
            let rows = HashMap::<_, u32, [u8; UPLINK_BYTES]>::try_from(Map::HashMap(pinned))?;
            count += rows.keys().count();
        }
        Ok(count)
    }

    /// Runs `work` in the pod, as a process of the node's cgroups or as none.
    pub fn in_pod<T: Send>(
        &self,
        has_sockets_translated: bool,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        inside(&self.pod.netns, || {
            if has_sockets_translated {
                let tid = nix::unistd::gettid().to_string();
                fs::write(self.cgroup.join("cgroup.threads"), tid)?;
            }
            work()
        })
    }

    /// The routes of ours, as text.
    pub fn own_routes(&self) -> Result<Vec<String>> {
        self.space.run(async {
            let host = Netlink::open()?;
            let routes = host.routes().await?.into_iter();
            let ours = routes.filter(|it| it.protocol == gantry_cni::netlink::ROUTE_PROTOCOL);
            Ok(ours.map(|route| route.to_string()).collect())
        })
    }

    /// The size of packets inside the pod and on both host sides.
    pub fn pod_mtu(&self) -> Result<u32> {
        let netns = self.pod.netns.clone();
        self.space.run(async move {
            let pod = Netlink::open_in(&netns).await?;
            let link = pod.link_by_name("eth0").await?.context("no eth0")?;
            Ok(link.mtu)
        })
    }

    /// Sets it at both ends of the pod's veth, behind the agent's back.
    pub fn set_pod_mtu(&self, mtu: u32) -> Result<()> {
        let netns = self.pod.netns.clone();
        self.space.run(async move {
            let (host, pod) = (Netlink::open()?, Netlink::open_in(&netns).await?);
            let inner = pod.link_by_name("eth0").await?.context("no eth0")?;
            pod.set_mtu(inner.index, mtu).await?;
            host.set_mtu(inner.peer.context("no peer")?, mtu).await?;
            let bridge = host.link_by_name("gantry0").await?.context("no bridge")?;
            Ok(host.set_mtu(bridge.index, mtu).await?)
        })
    }

    /// As the machine's administrator does.
    pub fn set_uplink_mtu(&self, mtu: u32) -> Result<()> {
        self.space.run(async move {
            let host = Netlink::open()?;
            let link = host.link_by_name("eth0").await?.context("no eth0")?;
            Ok(host.set_mtu(link.index, mtu).await?)
        })
    }

    /// Removes all that the agent has made in the namespace; what is left.
    pub fn clean_up(&self) -> Result<Vec<String>> {
        self.agent.cancel();
        let (paths, tasks) = (self.paths.clone(), self.space.tasks.clone());
        tasks.close();
        self.space.run(async move {
            // One that is in the middle of a look would make again what is removed here.
            tasks.wait().await;
            network::remove_all(&paths).await?;
            Ok(network::census(&paths).await?.lines())
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.clean_up() {
            eprintln!("clean up of node {}: {error:#}", self.name);
        }
        if let Err(error) = dataplane::remove_all(&self.paths) {
            eprintln!("clean up of node {}: {error}", self.name);
        }
        // A thread leaves its cgroup a moment after its end.
        for _ in 0..100 {
            if fs::remove_dir(&self.cgroup).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("clean up: {} stays", self.cgroup.display());
    }
}

fn start_pod(space: &Space, name: &'static str, networks: Arc<PodNetworks>) -> Result<Pod> {
    let uid = PodUid::new(&format!("pod-of-{name}"))?;
    let spec = PodNetworkSpec {
        pod: uid.clone(),
        namespace: "default".into(),
        name: name.into(),
        hostname: name.into(),
        host_network: false,
        user_range: None,
        bandwidth: Default::default(),
    };
    let made = space.run(async move { Ok(networks.ensure(&spec).await?) })?;
    let netns = Netns::open(&made.netns.context("no namespace")?)?;
    let address = *made.addresses.first().context("no address")?;
    let object: PodObject = serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": {"containers": [{"name": "main"}]},
    }))?;
    serve(&netns, SocketAddr::new(address, PORT))?;
    Ok(Pod {
        uid,
        netns,
        address,
        object: Arc::new(object),
    })
}

/// A server of the node itself; it stays.
fn serve_once(space: &Space, address: SocketAddr) -> Result<()> {
    match serve(&space.netns, address) {
        Err(error) if is_in_use(&error) => Ok(()),
        other => other,
    }
}

fn is_in_use(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::AddrInUse)
}

/// A server that tells each client by which address it sees it, and then sends much.
fn serve(netns: &Netns, address: SocketAddr) -> Result<()> {
    use std::io::Write;
    let listener = inside(netns, move || Ok(TcpListener::bind(address)?))?;
    std::thread::Builder::new().spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let seen = stream.peer_addr().map(|peer| peer.ip().to_string());
            let text = format!("{:40}", seen.unwrap_or_default());
            let much = vec![b'x'; 512 * 1024];
            // A client that has gone away is none of the server's troubles.
            drop(
                stream
                    .write_all(text.as_bytes())
                    .and_then(|()| stream.write_all(&much)),
            );
        }
    })?;
    Ok(())
}

/// Asks a server in the calling thread's namespace, and takes all it sends: the address that it sees.
pub fn ask(server: SocketAddr) -> Result<IpAddr> {
    ask_within(SOON, server)
}

/// The same of a server that may be silent for so long.
pub fn ask_within(silence: Duration, server: SocketAddr) -> Result<IpAddr> {
    use std::io::Read;
    let mut stream = TcpStream::connect_timeout(&server, SHORT)?;
    stream.set_read_timeout(Some(silence))?;
    let mut text = [0; 40];
    stream.read_exact(&mut text)?;
    let mut much = Vec::new();
    stream.read_to_end(&mut much)?;
    anyhow::ensure!(much.len() == 512 * 1024, "{} bytes", much.len());
    Ok(std::str::from_utf8(&text)?.trim().parse()?)
}

/// Tries until it is so; the last error if it never was.
pub fn eventually<T>(what: &str, look: impl FnMut() -> Result<T>) -> Result<T> {
    within(SOON, what, look)
}

/// The same for so long.
pub fn within<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    loop {
        match look() {
            Ok(value) => return Ok(value),
            Err(error) if began.elapsed() > limit => return Err(error.context(what.to_owned())),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Below this process' own, so that a thread of it can be a member.
fn threaded_cgroup(name: &str) -> Result<PathBuf> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let root = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let at = fields.next()?;
        (fields.next()? == "cgroup2").then_some(at)
    });
    let root = root.ok_or_else(|| Skipped("no cgroup v2 is mounted".into()))?;
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let leaf = format!("gantry-node-{name}-{}-{number}", std::process::id());
    let path = Path::new(root).join(own.unwrap_or_default()).join(leaf);
    let made = fs::create_dir(&path).and_then(|()| fs::write(path.join("cgroup.type"), "threaded"));
    made.map_err(|error| {
        let _ = fs::remove_dir(&path);
        Skipped(format!("no threaded cgroup at {}: {error}", path.display()))
    })?;
    Ok(path)
}
