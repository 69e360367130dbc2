//! Throw-away nodes: named network namespaces, joined as `gantry-cni` joins them.
//!
//! ```text
//!  outside ── eth0 ─ veth ─ eth0 ── node ── gantry0 (bridge) ─┬─ gvpod0 ─ veth ─ eth0  client
//!  192.0.2.100             192.0.2.1    10.244.0.1            ├─ gvpod1 ─ veth ─ eth0  backend1
//!                                                             ├─ gvpod2 ─ veth ─ eth0  backend2
//!                                                             ├─ gvpod3 ─ veth ─ eth0  backend3
//!                                                             └─ gvpod4 ─ veth ─ eth0  second
//! ```
//! Everything has the prefix [`PREFIX`]: the census counts it, and [`clear`] removes it by name alone, so a
//! run that was killed leaves what the next one finds. Neighbours are permanent: what ARP costs once is
//! not a layout's.

use std::fs::{self, File};
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use gantry_agent::paths::Paths;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::model::TARGET_PORT;
use crate::census;

/// Of namespaces, cgroup, pins and directories of this benchmark.
pub(super) const PREFIX: &str = "gantry-bench";
/// Pods with endpoints.
pub(super) const BACKEND_COUNT: usize = 3;
/// The node's address on the bridge.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 1);
/// Of the bridge.
pub(super) const GATEWAY_MAC: [u8; 6] = [0x0a, 0x58, 10, 244, 0, 1];
/// All pods: a client, the backends, another client.
pub(super) const POD_COUNT: usize = BACKEND_COUNT + 2;
/// The pod with the client.
pub(super) const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 2);
const SECOND: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 3);
/// The node's address towards the outside.
pub(super) const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(super) const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);
const OUTSIDE_MAC: &str = "02:00:00:00:01:64";
/// The ends of the bare pair.
const PAIR: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 10), Ipv4Addr::new(192, 0, 2, 11)];

/// A network namespace with a name, which goes with this.
pub(super) struct Namespace {
    name: String,
    file: File,
}

impl Namespace {
    fn new(name: &str) -> Result<Self> {
        let _making = super::making();
        let name = format!("{PREFIX}-{name}");
        let path = census::netns_directory().join(&name);
        let make = || -> Result<File> {
            fs::create_dir_all(census::netns_directory())?;
            File::create(&path)?;
            unshare(CloneFlags::CLONE_NEWNET).context("unshare")?;
            let own = Path::new("/proc/thread-self/ns/net");
            mount(
                Some(own),
                &path,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )?;
            Ok(File::open(&path)?)
        };
        let made = std::thread::scope(|scope| scope.spawn(make).join());
        let made = made.map_err(|_| anyhow::anyhow!("a thread ended"))?;
        let file = made.with_context(|| format!("make the namespace {}", path.display()))?;
        let namespace = Self { name, file };
        // Nothing but what is measured: no router solicitation, no duplicate address detection.
        namespace.set("net/ipv6/conf/all/disable_ipv6", "1")?;
        namespace.set("net/ipv6/conf/default/disable_ipv6", "1")?;
        namespace.ip("link set lo up\n")?;
        Ok(namespace)
    }

    /// Where it is pinned.
    pub(super) fn path(&self) -> PathBuf {
        census::netns_directory().join(&self.name)
    }

    /// Runs `f` on a thread that is in it.
    pub(super) fn run<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("enter {}", self.name))?;
                f()
            });
            let joined = thread.join();
            joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs a program in it with this input; an error carries what it said.
    pub(super) fn program(&self, words: &[&str], input: &str) -> Result<String> {
        self.run(|| feed(words, input))
    }

    fn ip(&self, batch: &str) -> Result<()> {
        self.program(&["ip", "-batch", "-"], batch).map(drop)
    }

    fn set(&self, sysctl: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(sysctl);
        self.run(|| fs::write(&path, value).with_context(|| format!("write {}", path.display())))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = unpin(&self.path()) {
            eprintln!("remove {}: {error}", self.path().display());
        }
    }
}

fn feed(words: &[&str], input: &str) -> Result<String> {
    let Some((program, arguments)) = words.split_first() else {
        bail!("no program");
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env("XTABLES_LOCKFILE", directory().join("xtables.lock"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {program}"))?;
    let mut stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        // Of its own: a program that talks before it has read all would wait for us for ever.
        scope.spawn(move || {
            // A program that ends early says why itself.
            stdin
                .take()
                .map(|mut stdin| stdin.write_all(input.as_bytes()))
        });
        child.wait_with_output()
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said: String = said.lines().take(5).collect::<Vec<_>>().join("\n");
        bail!("`{}`: {}: {said}", words.join(" "), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A node with a client, backends and somebody outside.
pub(super) struct Bed {
    pub node: Namespace,
    pub client: Namespace,
    /// Whose connections never meet those of the first client at a backend.
    pub second: Namespace,
    pub backends: Vec<Namespace>,
    pub outside: Namespace,
}

impl Bed {
    /// * `live` – the addresses that answer, dealt to the backend pods in turn.
    /// * `filtered` – bridged packets pass through iptables and nftables, as kube-proxy needs it.
    pub(super) fn new(name: &str, live: &[Ipv4Addr], filtered: bool) -> Result<Self> {
        let namespace = |role: &str| Namespace::new(&format!("{name}-{role}"));
        let node = namespace("node")?;
        let (client, second) = (namespace("client")?, namespace("second")?);
        let outside = namespace("outside")?;
        let backends: Vec<Namespace> = (1..=BACKEND_COUNT)
            .map(|number| namespace(&format!("backend{number}")))
            .collect::<Result<_>>()?;
        let pods = std::iter::once(&client).chain(&backends);
        let pods: Vec<&Namespace> = pods.chain([&second]).collect();
        let (uplink, gateway) = (text_of(UPLINK_MAC), text_of(GATEWAY_MAC));
        let mut links = format!(
            "link add gantry0 address {gateway} type bridge\nlink set gantry0 up\n\
             addr add {GATEWAY}/16 dev gantry0\n\
             link add eth0 address {uplink} type veth peer name eth0 address {OUTSIDE_MAC} netns {}\n\
             link set eth0 up\naddr add {NODE_ADDRESS}/24 dev eth0\n",
            outside.name
        );
        for (pod, namespace) in pods.iter().enumerate() {
            links += &format!(
                "link add gvpod{pod} address {} type veth peer name eth0 address {} netns {}\n\
                 link set gvpod{pod} master gantry0\nlink set gvpod{pod} up\n",
                text_of(host_mac(pod)),
                text_of(pod_mac(pod)),
                namespace.name
            );
        }
        links += &neighbours("gantry0", live);
        links += &format!("neigh add {OUTSIDE} lladdr {OUTSIDE_MAC} nud permanent dev eth0\n");
        node.ip(&links)?;
        for interface in ["all", "default", "gantry0", "eth0"] {
            node.set(&format!("net/ipv4/conf/{interface}/send_redirects"), "0")?;
        }
        node.set("net/ipv4/ip_forward", "1")?;
        let bridged = "net/bridge/bridge-nf-call-iptables";
        if filtered {
            node.set(bridged, "1")
                .context("kube-proxy's rules need br_netfilter, which this kernel has not")?;
        } else {
            // Without it nothing has to be switched off.
            let _ = node.set(bridged, "0");
        }
        outside.ip(&format!(
            "link set eth0 up\naddr add {OUTSIDE}/24 dev eth0\n\
             route add 10.0.0.0/8 via {NODE_ADDRESS}\n\
             neigh add {NODE_ADDRESS} lladdr {uplink} nud permanent dev eth0\n"
        ))?;
        for (pod, namespace) in pods.iter().enumerate() {
            let mut text = String::from("link set eth0 up\n");
            for address in addresses(pod, live) {
                text += &format!("addr add {address}/16 dev eth0\n");
            }
            text += &format!("route add default via {GATEWAY}\n");
            text += &format!("neigh add {GATEWAY} lladdr {gateway} nud permanent dev eth0\n");
            text += &neighbours("eth0", live);
            namespace.ip(&text)?;
        }
        Ok(Self {
            node,
            client,
            second,
            backends,
            outside,
        })
    }
}

/// Two namespaces joined by nothing but a veth pair; the second one's address.
pub(super) fn pair() -> Result<([Namespace; 2], Ipv4Addr)> {
    let both = [Namespace::new("pair-a")?, Namespace::new("pair-b")?];
    both[0].ip(&format!(
        "link add eth0 type veth peer name eth0 netns {}\n",
        both[1].name
    ))?;
    for (namespace, address) in both.iter().zip(PAIR) {
        namespace.ip(&format!(
            "link set eth0 up\naddr add {address}/24 dev eth0\n"
        ))?;
    }
    Ok((both, PAIR[1]))
}

/// The addresses of pod 0, the client, of a backend pod, or of the last, the second client.
pub(super) fn addresses(pod: usize, live: &[Ipv4Addr]) -> Vec<Ipv4Addr> {
    match pod.checked_sub(1) {
        None => vec![CLIENT],
        Some(BACKEND_COUNT) => vec![SECOND],
        Some(backend) => live
            .iter()
            .skip(backend)
            .step_by(BACKEND_COUNT)
            .copied()
            .collect(),
    }
}

/// Rows for every address of a pod; one's own does no harm.
fn neighbours(device: &str, live: &[Ipv4Addr]) -> String {
    let rows = (0..POD_COUNT).flat_map(|pod| {
        let mac = text_of(pod_mac(pod));
        let own = addresses(pod, live).into_iter();
        own.map(move |address| {
            format!("neigh replace {address} lladdr {mac} nud permanent dev {device}\n")
        })
    });
    rows.collect()
}

/// Hardware address in a pod.
pub(super) fn pod_mac(pod: usize) -> [u8; 6] {
    [0x0a, 0x58, 10, 244, 0, pod as u8 + 2]
}

/// Hardware address of the host end of a pod's veth.
fn host_mac(pod: usize) -> [u8; 6] {
    [0x0e, 0, 0, 0, 0, pod as u8 + 2]
}

fn text_of(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// `address:port` of an endpoint.
pub(super) fn target(endpoint: Ipv4Addr) -> String {
    format!("{endpoint}:{TARGET_PORT}")
}

/// Where this benchmark keeps its files while it runs.
pub(super) fn directory() -> PathBuf {
    Path::new("/run").join(PREFIX)
}

/// Where Gantry's data plane of this benchmark is.
pub(super) fn paths() -> Paths {
    let directory = directory();
    Paths {
        run: directory.join("run"),
        lib: directory.join("lib"),
        log: directory.join("log"),
        bpf: Path::new("/sys/fs/bpf").join(PREFIX),
        kubelet: directory.join("kubelet"),
        bin: directory,
    }
}

/// The cgroup whose processes have Gantry's socket programs.
pub(super) fn cgroup() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let root = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let at = fields.next()?;
        (fields.next()? == "cgroup2").then_some(at)
    });
    let root = root.context("no cgroup v2 is mounted")?;
    Ok(Path::new(root).join(PREFIX))
}

/// Removes whatever a run has made, by name. Idempotent; goes on after an error and returns the first.
pub fn clear() -> Result<()> {
    let mut first = Ok(());
    for name in census::bench_netns() {
        let path = census::netns_directory().join(name);
        let removed = unpin(&path).with_context(|| format!("remove {}", path.display()));
        first = first.and(removed);
    }
    first = first.and(clear_programs());
    if let Ok(cgroup) = cgroup() {
        first = first.and(remove_cgroup(&cgroup));
    }
    first.and(match fs::remove_dir_all(directory()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    })
}

/// Ends Gantry's programs and maps of this benchmark.
pub(super) fn clear_programs() -> Result<()> {
    // Its rows name interfaces by index: of a node's namespace, never of this one.
    let cleared = std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> Result<()> {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare")?;
            Ok(gantry_agent::dataplane::remove_all(&paths())?)
        });
        thread.join()
    });
    cleared.map_err(|_| anyhow::anyhow!("a thread ended"))?
}

fn unpin(path: &Path) -> std::io::Result<()> {
    // Not a mount: a run that was killed between making the file and mounting on it.
    let _ = umount2(path, MntFlags::MNT_DETACH);
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn remove_cgroup(cgroup: &Path) -> Result<()> {
    // Only clients of ours are in it. Kernels before 5.14 have no such file: there they end with us.
    let _ = fs::write(cgroup.join("cgroup.kill"), "1");
    // A process that was killed leaves its cgroup a moment later.
    for _ in 0..200 {
        match fs::remove_dir(cgroup) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
            Ok(()) => return Ok(()),
        }
    }
    bail!("{} has processes that do not end", cgroup.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_dealt_to_pods_and_everybody_knows_where_they_are() {
        let live: Vec<Ipv4Addr> = (1..=7)
            .map(|last| Ipv4Addr::new(10, 244, 8, last))
            .collect();
        let of = |pod| -> Vec<u8> {
            let own = addresses(pod, &live).into_iter();
            own.map(|address| address.octets()[3]).collect()
        };
        assert_eq!(
            [of(0), of(1), of(2), of(3)],
            [vec![2], vec![1, 4, 7], vec![2, 5], vec![3, 6]]
        );
        assert_eq!(of(4), [3]);
        let rows = neighbours("eth0", &live);
        for (pod, last) in [(1, 4), (3, 6)] {
            let mac = text_of(pod_mac(pod));
            let row = format!("10.244.8.{last} lladdr {mac} nud permanent dev eth0\n");
            assert!(rows.contains(&row), "{rows}");
        }
        assert_eq!(rows.lines().count(), 9);
    }
}
