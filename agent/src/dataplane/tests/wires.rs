//! A node with a bridge and two pods, in network namespaces of their own, joined as `gantry-cni`
//! does it; packets here are those of real sockets.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use aya::maps::{MapData, PerCpuArray};
use ebpf_maps::drop::DROP_NAMES;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns, unshare};

use super::bed::{ip, try_ip};
use super::maps::Maps;
use crate::dataplane::pods::{Attachment, PodPrograms};
use crate::dataplane::policies::Policies;
use crate::dataplane::uplinks::UplinkPrograms;
use crate::dataplane::{Bandwidth, PodInterface, XdpMode, bpffs, hooks, load, remove_all};
use crate::ids::PodUid;
use crate::paths::Paths;

/// Longer than anything on one machine takes, shorter than a retransmission of SYN.
pub(super) const SHORT: Duration = Duration::from_millis(700);

/// A network namespace that lives as long as this.
pub(super) struct Namespace(File);

impl Namespace {
    pub(super) fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Self(made.join().unwrap())
    }

    /// Runs `f` on a thread that is in it; sockets made there stay in it.
    pub(super) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
                f()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Listens at an address of it.
    pub(super) fn listen(&self, address: impl ToSocketAddrs + Copy + Send + Sync) -> TcpListener {
        self.run(|| patiently(|| TcpListener::bind(address)))
    }

    /// Takes datagrams at an address of it.
    pub(super) fn bind(&self, address: impl ToSocketAddrs + Copy + Send + Sync) -> UdpSocket {
        self.run(|| patiently(|| UdpSocket::bind(address)))
    }

    /// As `ip` takes it after `netns`.
    pub(super) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// An address may just have been another socket's that is closed: a child of another test has that one too, until
/// it executes its program, which takes long on a busy or emulated machine.
pub(super) fn patiently<T>(bind: impl Fn() -> std::io::Result<T>) -> T {
    let began = std::time::Instant::now();
    loop {
        match bind() {
            Err(error)
                if error.kind() == std::io::ErrorKind::AddrInUse
                    && began.elapsed() < Duration::from_secs(5) =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other.unwrap(),
        }
    }
}

/// A node, two pods, and the programs that are not yet attached.
pub(super) struct Wires {
    pub node: Namespace,
    pub pods: [Namespace; 2],
    pub programs: PodPrograms,
    pub policies: Policies,
    pub uplinks: UplinkPrograms,
    pub paths: Paths,
    _place: Place,
}

/// The addresses of pod 0 and 1.
pub(super) const V4: [&str; 2] = ["10.244.0.2", "10.244.0.3"];
pub(super) const V6: [&str; 2] = ["fd00:244::2", "fd00:244::3"];

/// The node's address on the bridge, and the bridge's hardware address.
pub(super) const GATEWAY: &str = "10.244.0.1";
pub(super) const GATEWAY_MAC: [u8; 6] = [0x0a, 0x58, 10, 244, 0, 1];

/// An address and a port.
pub(super) fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

impl Wires {
    /// None, with the reason on stderr, where the machine does not allow it.
    pub(super) fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let node = Namespace::new();
        if let Err(reason) = node.run(|| try_ip("link add v0 type veth peer name v1")) {
            eprintln!("skipped: no veth pair: {reason}");
            return None;
        }
        node.run(|| {
            ip("link del v0");
            ip("link add gantry0 address 0a:58:0a:f4:00:01 type bridge");
            // A router solicits from its link-local address, which must not wait for duplicates here.
            fs::write("/proc/sys/net/ipv6/conf/gantry0/accept_dad", "0").unwrap();
            ip("link set gantry0 up");
            ip("addr add 10.244.0.1/24 dev gantry0");
            ip("addr add fd00:244::1/64 dev gantry0 nodad");
            fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        });
        let pods = [0, 1].map(|pod| {
            let namespace = Namespace::new();
            wire(&node, &namespace, pod);
            namespace
        });
        let place = Place::new();
        let paths = place.paths.clone();
        let mut ebpf = load::load(&paths).unwrap().ebpf;
        let programs = PodPrograms::take(&mut ebpf, &paths).unwrap();
        let mut policies = Policies::take(&mut ebpf, Some(GATEWAY.parse().unwrap())).unwrap();
        [0, 1].iter().for_each(|pod| policies.open(&uid(*pod)));
        let uplinks = UplinkPrograms::take(&mut ebpf, &paths, XdpMode::Off).unwrap();
        Some(Self {
            node,
            pods,
            programs,
            policies,
            uplinks,
            paths,
            _place: place,
        })
    }

    /// As [`Wires::new`], with both pods in the packet path.
    pub(super) fn attached() -> Option<Self> {
        let mut wires = Self::new()?;
        wires.attach();
        Some(wires)
    }

    /// As [`Wires::attached`], where the pods are no ports of the bridge: the node has a route to each.
    pub(super) fn routed() -> Option<Self> {
        let mut wires = Self::new()?;
        for pod in [0, 1] {
            unbridge(&wires.node, &wires.pods[pod], pod);
            let programs = &mut wires.programs;
            wires.node.run(|| {
                let mut interface = interface(pod);
                interface.gateway_mac = [0x0e, 0, 0, 0, 0, pod as u8 + 2];
                programs.attach(&interface).unwrap();
            });
        }
        Some(wires)
    }

    /// Puts both pods into the packet path.
    pub(super) fn attach(&mut self) {
        for pod in [0, 1] {
            let programs = &mut self.programs;
            self.node.run(|| programs.attach(&interface(pod)).unwrap());
        }
    }

    /// The pod's veth goes and a new one comes.
    pub(super) fn rewire(&self, pod: usize) {
        self.node.run(|| ip(&format!("link del gvpod{pod}")));
        wire(&self.node, &self.pods[pod], pod);
    }

    /// How often packets were dropped for this reason.
    pub(super) fn dropped(&self, reason: &str) -> u64 {
        let index = DROP_NAMES.iter().position(|name| *name == reason).unwrap();
        let drops = self.data("DROPS");
        let drops = PerCpuArray::<_, u64>::try_from(aya::maps::Map::PerCpuArray(drops)).unwrap();
        drops.get(&(index as u32), 0).unwrap().iter().sum()
    }

    /// Names of the pins of pods' links.
    pub(super) fn pins(&self) -> Vec<String> {
        let pins = fs::read_dir(hooks::directory(&self.paths)).unwrap();
        let names = pins.map(|pin| pin.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    /// Rows of ENDPOINTS and INTERFACES.
    pub(super) fn rows(&self) -> (usize, usize) {
        use ebpf_maps::endpoint::{EndpointValue, InterfaceValue};
        use ebpf_maps::services::Addr;
        let endpoints = self.hash::<Addr, EndpointValue>("ENDPOINTS").keys().count();
        let interfaces = self
            .hash::<u32, InterfaceValue>("INTERFACES")
            .keys()
            .count();
        (endpoints, interfaces)
    }
}

impl Maps for Wires {
    fn data(&self, name: &str) -> MapData {
        MapData::from_pin(load::map_directory(&self.paths).join(name)).unwrap()
    }
}

/// A bpffs in a directory of its own; both go with it, also when a test fails early.
pub(super) struct Place {
    pub(super) paths: Paths,
    _directory: tempfile::TempDir,
}

impl Place {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths {
            run: directory.path().join("run"),
            lib: directory.path().join("lib"),
            log: directory.path().join("log"),
            bpf: directory.path().join("bpf/gantry"),
            kubelet: directory.path().join("kubelet"),
            bin: directory.path().into(),
        };
        let place = Self {
            paths,
            _directory: directory,
        };
        bpffs::ensure(&place.paths).unwrap();
        fs::create_dir_all(hooks::directory(&place.paths)).unwrap();
        place
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = remove_all(&self.paths) {
            eprintln!("clean up: {error}");
        }
    }
}

fn uid(pod: usize) -> PodUid {
    PodUid::new(&format!("pod-{pod}")).unwrap()
}

/// Must be called in the node's namespace.
pub(super) fn interface(pod: usize) -> PodInterface {
    let last = pod as u8 + 2;
    PodInterface {
        pod: uid(pod),
        ifindex: if_nametoindex(format!("gvpod{pod}").as_str()).unwrap(),
        gateway_mac: GATEWAY_MAC,
        pod_mac: [0x0a, 0x58, 10, 244, 0, last],
        addresses: [V4[pod], V6[pod]].map(|text| text.parse().unwrap()).into(),
        direct: true,
        prepared: false,
        bandwidth: Bandwidth::default(),
    }
}

fn wire(node: &Namespace, namespace: &Namespace, pod: usize) {
    let (last, peer) = (pod + 2, namespace.path());
    node.run(|| {
        ip(&format!(
            "link add gvpod{pod} address 0e:00:00:00:00:0{last} type veth peer name eth0 address \
             0a:58:0a:f4:00:0{last} netns {peer}"
        ));
        ip(&format!("link set gvpod{pod} master gantry0"));
        ip(&format!("link set gvpod{pod} up"));
    });
    namespace.run(|| {
        ip("link set eth0 up");
        ip(&format!("addr add {}/24 dev eth0", V4[pod]));
        ip(&format!("addr add {}/64 dev eth0 nodad", V6[pod]));
        ip("route add default via 10.244.0.1");
        ip("-6 route add default via fd00:244::1");
    });
}

/// As `gantry_cni::bridge::routed` has it.
fn unbridge(node: &Namespace, namespace: &Namespace, pod: usize) {
    let last = pod + 2;
    let (mac, host_mac) = (
        format!("0a:58:0a:f4:00:0{last}"),
        format!("0e:00:00:00:00:0{last}"),
    );
    let families = [
        (V4[pod], "24", "32", GATEWAY),
        (V6[pod], "64", "128", "fd00:244::1"),
    ];
    node.run(|| ip(&format!("link set gvpod{pod} nomaster")));
    for (address, of_bridge, alone, gateway) in families {
        namespace.run(|| {
            ip(&format!("addr del {address}/{of_bridge} dev eth0"));
            let nodad = if alone == "128" { " nodad" } else { "" };
            ip(&format!("addr add {address}/{alone} dev eth0{nodad}"));
            ip(&format!(
                "neigh replace {gateway} lladdr {host_mac} dev eth0"
            ));
            let family = if alone == "128" { "-6 " } else { "" };
            ip(&format!(
                "{family}route replace default via {gateway} dev eth0 onlink"
            ));
        });
        node.run(|| {
            ip(&format!(
                "neigh replace {address} lladdr {mac} dev gvpod{pod}"
            ));
            let family = if alone == "128" { "-6 " } else { "" };
            ip(&format!(
                "{family}route add {address}/{alone} dev gvpod{pod} src {gateway}"
            ));
        });
    }
}

/// A TCP server in one namespace, a client in another: what each sees as its peer.
pub(super) fn tcp_between(
    from: &Namespace,
    to: &Namespace,
    server: SocketAddr,
) -> std::io::Result<(SocketAddr, SocketAddr)> {
    let listener = to.listen(server);
    tcp_to(from, &listener, server)
}

/// A client in `from` connects to `address`, which leads to `listener`; some data goes each way.
pub(super) fn tcp_to(
    from: &Namespace,
    listener: &TcpListener,
    address: SocketAddr,
) -> std::io::Result<(SocketAddr, SocketAddr)> {
    use std::io::{Read, Write};
    let mut client = from.run(|| TcpStream::connect_timeout(&address, SHORT))?;
    client.set_read_timeout(Some(SHORT))?;
    let (mut accepted, seen) = listener.accept()?;
    accepted.set_read_timeout(Some(SHORT))?;
    // More than one segment, so that segmentation offload has its part.
    let data = vec![7_u8; 256 * 1024];
    let writer = std::thread::spawn(move || {
        accepted
            .write_all(&data)
            .and_then(|()| accepted.shutdown(std::net::Shutdown::Write))
    });
    let mut received = Vec::new();
    client.read_to_end(&mut received)?;
    writer.join().unwrap()?;
    assert_eq!(received.len(), 256 * 1024);
    Ok((seen, client.peer_addr()?))
}

/// A datagram from `from` to `server` in `to` and back: the source that each side sees.
pub(super) fn udp_between(
    from: &Namespace,
    to: &Namespace,
    server: SocketAddr,
) -> std::io::Result<(SocketAddr, SocketAddr)> {
    let socket = to.bind(server);
    udp_to(from, &socket, server)
}

/// As [`udp_between`], where the client addresses `address`, which leads to `server`.
pub(super) fn udp_to(
    from: &Namespace,
    server: &UdpSocket,
    address: SocketAddr,
) -> std::io::Result<(SocketAddr, SocketAddr)> {
    let any: IpAddr = match address.ip() {
        IpAddr::V4(_) => [0; 4].into(),
        IpAddr::V6(_) => [0; 16].into(),
    };
    let client = from.run(|| UdpSocket::bind((any, 0)))?;
    for socket in [&client, server] {
        socket.set_read_timeout(Some(SHORT))?;
    }
    client.send_to(b"question", address)?;
    let mut buffer = [0; 16];
    let (_, seen) = received(server, &mut buffer)?;
    server.send_to(b"answer", seen)?;
    let (length, answered) = received(&client, &mut buffer)?;
    assert_eq!(&buffer[..length], b"answer");
    Ok((seen, answered))
}

/// One datagram. A socket with a timeout is not asked again by itself after an interruption.
pub(super) fn received(
    socket: &UdpSocket,
    buffer: &mut [u8],
) -> std::io::Result<(usize, SocketAddr)> {
    loop {
        match socket.recv_from(buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Both pods reach each other and the node, by both protocols and families.
pub(super) fn everything_passes(wires: &Wires) {
    let [a, b] = &wires.pods;
    for (port, addresses) in [(8080, V4), (8081, V6)] {
        for (from, to, server, client) in [(a, b, 1, 0), (b, a, 0, 1)] {
            let server = at(addresses[server], port);
            let (seen, peer) = tcp_between(from, to, server).unwrap();
            assert_eq!(
                (seen.ip().to_string(), peer),
                (addresses[client].into(), server)
            );
            let (seen, answered) = udp_between(from, to, server).unwrap();
            assert_eq!(
                (seen.ip().to_string(), answered),
                (addresses[client].into(), server)
            );
        }
    }
    for gateway in ["10.244.0.1", "fd00:244::1"] {
        tcp_between(a, &wires.node, at(gateway, 8082)).unwrap();
        udp_between(b, &wires.node, at(gateway, 8082)).unwrap();
    }
    tcp_between(&wires.node, a, at(V4[0], 8083)).unwrap();
    udp_between(&wires.node, b, at(V6[1], 8083)).unwrap();
}

#[test]
fn pods_reach_each_other_and_their_node_by_links() {
    let Some(mut wires) = Wires::new() else {
        return;
    };
    wires.programs.probe_attachment();
    if *wires.programs.attachment() == Attachment::Clsact {
        return eprintln!("skipped: this kernel has no tcx");
    }
    wires.attach();
    everything_passes(&wires);
    assert_eq!(wires.pins().len(), 4);
    assert_eq!(wires.rows(), (4, 2));
}

#[test]
fn pods_reach_each_other_and_their_node_by_filters() {
    let Some(mut wires) = Wires::new() else {
        return;
    };
    *wires.programs.attachment() = Attachment::Clsact;
    wires.attach();
    wires.attach(); // again: replaced, not added
    everything_passes(&wires);
    assert!(wires.pins().is_empty());
    let filters = wires.node.run(|| {
        let mut tc = std::process::Command::new("tc");
        tc.args(["filter", "show", "dev", "gvpod0", "ingress"])
            .output()
    });
    if let Ok(output) = filters {
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(text.matches("handle 0x").count(), 1, "{text}");
        assert!(text.contains("direct-action"), "{text}");
    }
    foreign_addresses_are_refused(&wires);
}

fn foreign_addresses_are_refused(wires: &Wires) {
    let [a, b] = &wires.pods;
    a.run(|| {
        ip("addr add 10.244.0.99/24 dev eth0");
        ip("addr add fd00:244::99/64 dev eth0 nodad");
    });
    for (server, client) in [(V4[1], "10.244.0.99:0"), (V6[1], "[fd00:244::99]:0")] {
        let before = wires.dropped("source_address") + wires.dropped("neighbour");
        let server = at(server, 9090);
        let receiver = b.bind(server);
        receiver.set_read_timeout(Some(SHORT)).unwrap();
        let sender = a.bind(client);
        sender.send_to(b"forged", server).unwrap();
        received(&receiver, &mut [0; 8]).unwrap_err();
        let after = wires.dropped("source_address") + wires.dropped("neighbour");
        assert!(after > before, "{client}");
    }
    // Or it would be chosen for what the pod sends next.
    a.run(|| {
        ip("addr del 10.244.0.99/24 dev eth0");
        ip("addr del fd00:244::99/64 dev eth0");
    });
}

#[test]
fn a_pod_cannot_send_with_an_address_of_another() {
    let Some(wires) = Wires::attached() else {
        return;
    };
    foreign_addresses_are_refused(&wires);
    // Its own goes on.
    udp_between(&wires.pods[0], &wires.pods[1], at(V4[1], 9091)).unwrap();
}

#[test]
fn an_address_is_the_pods_only_while_it_is_attached_with_it() {
    let Some(mut wires) = Wires::attached() else {
        return;
    };
    let (node, programs) = (&wires.node, &mut wires.programs);
    node.run(|| {
        let mut v4_only = interface(0);
        v4_only.addresses.truncate(1);
        programs.attach(&v4_only).unwrap();
    });
    assert_eq!(wires.rows(), (3, 2));
    let [a, b] = &wires.pods;
    udp_between(a, b, at(V4[1], 9092)).unwrap();
    udp_between(a, b, at(V6[1], 9092)).unwrap_err();
    assert!(wires.dropped("source_address") > 0);
}

#[test]
fn attaching_again_follows_the_pod_and_detaching_leaves_nothing() {
    let Some(mut wires) = Wires::new() else {
        return;
    };
    // Filters stay as long as the interface, which is gone by then; links do not.
    wires.programs.probe_attachment();
    if *wires.programs.attachment() == Attachment::Clsact {
        return eprintln!("skipped: this kernel has no tcx");
    }
    wires.attach();
    wires.attach();
    assert_eq!(wires.rows(), (4, 2));
    wires.rewire(0);
    wires.attach();
    assert_eq!(wires.rows(), (4, 2), "the old interface's row is gone");
    everything_passes(&wires);
    foreign_addresses_are_refused(&wires);
    // A new agent: it finds what is there by the maps and pins alone.
    let mut ebpf = load::load(&wires.paths).unwrap().ebpf;
    wires.programs = PodPrograms::take(&mut ebpf, &wires.paths).unwrap();
    wires.programs.probe_attachment();
    wires.attach();
    everything_passes(&wires);
    wires.programs.retain([uid(1)].iter()).unwrap();
    assert_eq!(wires.rows(), (2, 1));
    wires.programs.detach(&uid(0)).unwrap();
    wires.programs.detach(&uid(1)).unwrap();
    wires.programs.detach(&uid(1)).unwrap();
    assert_eq!(wires.rows(), (0, 0));
    assert!(wires.pins().is_empty(), "{:?}", wires.pins());
    // Nothing filters any more, a moment after: the kernel frees links on its own time.
    let [a, b] = &wires.pods;
    let passes = (0..10).any(|_| tcp_between(a, b, at(V4[1], 8084)).is_ok());
    assert!(passes);
    everything_passes(&wires);
}

#[test]
fn rows_of_an_address_that_another_pod_has_by_now_stay() {
    let Some(mut wires) = Wires::attached() else {
        return;
    };
    let (node, programs) = (&wires.node, &mut wires.programs);
    node.run(|| {
        let mut taken = interface(1);
        taken.addresses.push(V4[0].parse().unwrap());
        programs.attach(&taken).unwrap();
    });
    wires.programs.detach(&uid(0)).unwrap();
    assert_eq!(wires.rows(), (3, 1));
}
