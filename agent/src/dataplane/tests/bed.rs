//! A place for one test of the data plane: cgroup, bpffs, namespaces; gone when it is dropped.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, IoSliceMut, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use aya::maps::{Map, MapData};
use ebpf_maps::services::{FrontendKey, FrontendValue, PEER_COUNT_MAX, PeerValue, TrafficValue};
use gantry_api::proto;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::super::{BpfDataplane, Options, XdpMode, load, remove_all};
use crate::paths::Paths;
use crate::services::index::{addr_of, ip_of};
use crate::view::{Backends, ServiceName, View};

/// Where the node's own resolver is in tests.
pub(super) const RESOLVER: &str = "127.0.0.53:53";

/// A Service and its backends.
pub(super) type Served = (proto::Service, Backends);

pub(super) struct Bed {
    pub cgroup: PathBuf,
    pub paths: Paths,
    cgroup_v2: PathBuf,
    directory: tempfile::TempDir,
}

impl Bed {
    /// None, with the reason on stderr, where the machine does not allow it.
    pub(super) fn new() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let Some(own) = own_cgroup() else {
            eprintln!("skipped: no cgroup v2 is mounted");
            return None;
        };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let cgroup = own.join(format!("gantry-bpf-test-{}-{number}", std::process::id()));
        let made = fs::create_dir(&cgroup)
            .and_then(|()| fs::write(cgroup.join("cgroup.type"), "threaded"));
        if let Err(error) = made {
            let _ = fs::remove_dir(&cgroup);
            eprintln!(
                "skipped: no threaded cgroup at {}: {error}",
                cgroup.display()
            );
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths {
            run: directory.path().join("run"),
            lib: directory.path().join("lib"),
            log: directory.path().join("log"),
            bpf: directory.path().join("bpf/gantry"),
            kubelet: directory.path().join("kubelet"),
            bin: directory.path().into(),
        };
        Some(Self {
            cgroup_v2: cgroup.clone(),
            cgroup,
            paths,
            directory,
        })
    }

    pub(super) fn start(&self) -> BpfDataplane {
        let resolver = Some(RESOLVER.parse().unwrap());
        let options = Options {
            node: "here".into(),
            resolver,
            masquerade: None,
            xdp: XdpMode::Off,
            fast_path: true,
        };
        BpfDataplane::start(&self.paths, &self.cgroup_v2, options).unwrap()
    }

    /// Runs `f` on a thread of the cgroup, in a new network namespace with loopback up.
    pub(super) fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.joined(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            loopback_up();
            self.show_namespace(&nix::unistd::gettid().to_string());
            f()
        })
    }

    /// Runs `f` on a thread of the cgroup, as are the threads that it starts.
    pub(super) fn joined<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let tid = nix::unistd::gettid().to_string();
                let mut members = fs::File::options()
                    .write(true)
                    .open(self.cgroup.join("cgroup.threads"))
                    .unwrap();
                members.write_all(tid.as_bytes()).unwrap();
                f()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Where the agent looks for the namespaces of its pods.
    fn show_namespace(&self, tid: &str) {
        let pod = self.paths.run.join(format!("pods/thread-{tid}/ns"));
        fs::create_dir_all(&pod).unwrap();
        let own = format!("/proc/self/task/{tid}/ns/net");
        std::os::unix::fs::symlink(own, pod.join("net")).unwrap();
    }

    /// What FRONTENDS holds, read through its pin.
    pub(super) fn frontends(&self) -> Vec<(FrontendKey, FrontendValue)> {
        self.frontends_map().iter().map(Result::unwrap).collect()
    }

    /// The keys of a hash map, read through its pin.
    pub(super) fn keys<K: aya::Pod + Ord, V: aya::Pod>(&self, name: &str) -> BTreeSet<K> {
        let map: aya::maps::HashMap<MapData, K, V> =
            Map::HashMap(self.pinned(name)).try_into().unwrap();
        map.keys().map(Result::unwrap).collect()
    }

    pub(super) fn clear_frontends(&self) {
        let mut map = self.frontends_map();
        for (key, _) in self.frontends() {
            map.remove(&key).unwrap();
        }
    }

    /// Entries of PEERS.
    pub(super) fn peers(&self) -> usize {
        self.peers_map().keys().count()
    }

    /// Connections and choices in TRAFFIC, summed over the first ids.
    pub(super) fn traffic(&self) -> (i64, u64) {
        let map = Map::Array(self.pinned("TRAFFIC"));
        let map: aya::maps::Array<MapData, TrafficValue> = map.try_into().unwrap();
        let all = (0..64).map(|id| map.get(&id, 0).unwrap());
        all.fold((0, 0), |sum, of| {
            (sum.0 + of.connections as i64, sum.1 + of.chosen)
        })
    }

    /// Takes every element with cookies that no socket has.
    pub(super) fn fill_peers(&self) {
        let mut peers = self.peers_map();
        for number in 0..u64::from(PEER_COUNT_MAX) {
            peers
                .insert(u64::MAX - number, PeerValue::default(), 0)
                .unwrap();
        }
    }

    fn peers_map(&self) -> aya::maps::HashMap<MapData, u64, PeerValue> {
        Map::HashMap(self.pinned("PEERS")).try_into().unwrap()
    }

    fn frontends_map(&self) -> aya::maps::HashMap<MapData, FrontendKey, FrontendValue> {
        Map::HashMap(self.pinned("FRONTENDS")).try_into().unwrap()
    }

    fn pinned(&self, name: &str) -> MapData {
        MapData::from_pin(load::map_directory(&self.paths).join(name)).unwrap()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Err(error) = remove_all(&self.paths) {
            eprintln!("clean up: {error}");
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let own = self.directory.path().display().to_string();
        if mounts.contains(&own) && !std::thread::panicking() {
            panic!("{own} is still mounted");
        }
        // A thread leaves its cgroup a moment after its join: the kernel reaps it on its own.
        for _ in 0..100 {
            match fs::remove_dir(&self.cgroup) {
                Ok(()) => return,
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(10)),
            }
        }
        eprintln!("clean up: {} stays", self.cgroup.display());
    }
}

/// This process' directory in cgroup v2, which on hybrid hosts is mounted beside the others.
fn own_cgroup() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let root = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let at = fields.next()?;
        (fields.next()? == "cgroup2").then_some(at)
    })?;
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(root).join(path))
}

fn loopback_up() {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request lives through the call and names its interface.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Switches an offload of an interface of the calling thread's namespace, by the number of its command in
/// `include/uapi/linux/ethtool.h`.
pub(super) fn set_offload(interface: &str, command: u32, on: bool) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut value = [command, u32::from(on)];
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
    // SAFETY: the request and the value that it points to live through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL.into(), &raw mut request) };
    let error = io::Error::last_os_error();
    assert_eq!(result, 0, "{interface}: {error}");
}

/// ETHTOOL_STXCSUM: the sums of what is sent are left to others.
pub(super) const SUMS: u32 = 0x17;
const SIOCETHTOOL: u16 = 0x8946;

/// Runs `ip` in the calling thread's network namespace.
pub(super) fn try_ip(arguments: &str) -> Result<(), String> {
    let output = std::process::Command::new("ip")
        .args(arguments.split(' '))
        .output();
    let output = output.map_err(|error| format!("ip: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    output
        .status
        .success()
        .then_some(())
        .ok_or_else(|| format!("ip {arguments}: {text}"))
}

pub(super) fn ip(arguments: &str) {
    try_ip(arguments).unwrap();
}

/// A character device node of major 1 in the test's directory.
pub(super) fn device_node(bed: &Bed, minor: u64) -> PathBuf {
    let path = bed.directory.path().join(format!("device-{minor}"));
    if !path.exists() {
        mknod(
            &path,
            SFlag::S_IFCHR,
            Mode::S_IRUSR | Mode::S_IWUSR,
            makedev(1, minor),
        )
        .unwrap();
    }
    path
}

/// Receives one datagram and says to which address it was sent.
pub(super) fn udp_destination(server: &UdpSocket) -> Ipv4Addr {
    setsockopt(server, sockopt::Ipv4PacketInfo, &true).unwrap();
    let mut byte = [0; 4];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut control = nix::cmsg_space!(libc::in_pktinfo);
    let message = recvmsg::<()>(
        server.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::empty(),
    )
    .unwrap();
    let info = message.cmsgs().unwrap().find_map(|message| match message {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(info),
        _ => None,
    });
    Ipv4Addr::from(u32::from_be(info.unwrap().ipi_addr.s_addr))
}

pub(super) fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// One serving endpoint on this node.
pub(super) fn backend(address: &str, port: u32) -> (String, u32) {
    (address.into(), port)
}

pub(super) fn service(
    cluster_ip: &str,
    protocol: u32,
    port: u32,
    backends: &[(String, u32)],
) -> Served {
    let bytes = |text: &str| bytes::Bytes::from(octets(text));
    let port = proto::ServicePort {
        name: String::new(),
        protocol,
        port,
        node_port: 0,
    };
    let service = proto::Service {
        cluster_ips: vec![bytes(cluster_ip)],
        ports: vec![port],
        r#type: "ClusterIP".into(),
        ..Default::default()
    };
    let backends = backends.iter().enumerate().map(|(index, (address, port))| {
        let backend = proto::Backend {
            addresses: vec![bytes(address)],
            ports: vec![proto::BackendPort {
                name: String::new(),
                protocol,
                port: *port,
            }],
            node: "here".into(),
            pod_uid: format!("pod-{index}"),
            ..Default::default()
        };
        (index.to_string(), Arc::new(backend))
    });
    (service, backends.collect())
}

pub(super) fn view(rev: u64, services: Vec<(&str, Served)>) -> View {
    let mut view = View {
        rev,
        ..View::default()
    };
    for (name, (service, backends)) in services {
        let name = ServiceName {
            namespace: "default".into(),
            name: name.into(),
        };
        Arc::make_mut(&mut view.services).insert(name.clone(), Arc::new(service));
        Arc::make_mut(&mut view.backends).insert(name, Arc::new(backends));
    }
    view
}

pub(super) fn set_node(view: &mut View, address: &str) {
    let node = proto::NodeRoute {
        pod_cidr: String::new(),
        addresses: vec![octets(address).into()],
        ..proto::NodeRoute::default()
    };
    Arc::make_mut(&mut view.nodes).insert("here".into(), Arc::new(node));
}

fn octets(text: &str) -> Vec<u8> {
    match ip_of(&addr_of(text.parse().unwrap())) {
        std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
        std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}
