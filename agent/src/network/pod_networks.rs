//! [`PodNetworks`]: the one implementation of [`Network`].
//!
//! ```text
//! ensure  a set of the pool that has wires: record ─► pins ─► the pod's rows in the packet path
//!         else pins ─► record (intent) ─► bridge::add in process, or the chain's ADD ─► record (result)
//!         ─► packet programs
//! remove  chain: DEL ─► pins ─► packet programs ─► record
//!         bridge: pins (the kernel takes the veth with the netns) ─► packet programs ─► wait ─► lease
//!         ─► record
//! ```
//! The record stays until the rest is gone, so whatever a crash interrupts is found and finished:
//! by the next `ensure` or `remove` of that pod, or by `retain`.
//!
//! Invariant: an address is given back only when the link that answers for it is gone.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use gantry_cni::CniError;
use gantry_cni::bridge;
use gantry_cni::config::{BridgeNetwork, PodLink, mac_of};
use gantry_cni::ipam::Owner;
use gantry_cni::netlink::{LOOPBACK_INDEX, Netlink};
use gantry_cni::netns::Netns;
use gantry_cni::result as bridge_result;
use ipnet::IpNet;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::chain::{self, NetworkList, Runner, Subject, pod_addresses};
use super::namespaces::{self, Kinds};
use super::pool::{Pool, Ready};
use super::record::{Record, Wiring};
use super::wires::{self, Wirer, Wires};
use super::{Network, NetworkError, PodNetwork, PodNetworkSpec, Routes};
use super::{forwarding, interface, packet_size};
use crate::dataplane::{Bandwidth, Dataplane, DataplaneError, PodInterface};
use crate::ids::PodUid;
use crate::paths::Paths;
use crate::user_namespaces::UserNamespace;
use crate::view::View;

/// How long the kernel may take to remove a link with its namespace before we delete it ourselves.
const LINK_GONE_WAIT: Duration = Duration::from_millis(500);
/// A few pods at once.
const READY_COUNT: usize = 4;

/// What the machine's administrator decides.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// Where third-party network lists are: `/etc/cni/net.d`.
    pub conf_dir: PathBuf,
    /// Where plugins are: `/opt/cni/bin`, `/usr/lib/cni`.
    pub plugin_dirs: Vec<PathBuf>,
    /// The node's own addresses, for pods with host network.
    pub node_addresses: Vec<IpAddr>,
    /// Sandboxes kept ready for pods to come.
    pub ready_count: usize,
    /// How other nodes are reached: pods send packets that fit every way.
    pub routes: watch::Receiver<Routes>,
    /// How new pods are attached; those that run stay as they are.
    pub link: PodLink,
}

/// Types of the plugins of the third party's list that counts on this machine, in order of ADD.
pub fn third_party_plugins() -> Vec<String> {
    let list = chain::load(&NetworkConfig::standard(Vec::new()).conf_dir);
    let list = list.ok().flatten().filter(|list| !list.is_ours());
    let plugins = list.into_iter().flat_map(|list| list.plugins);
    plugins
        .map(|plugin| chain::kind(&plugin).to_owned())
        .collect()
}

impl NetworkConfig {
    /// The standard places.
    pub fn standard(node_addresses: Vec<IpAddr>) -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            plugin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            node_addresses,
            ready_count: READY_COUNT,
            // The sender may go: the last value stays readable.
            routes: watch::channel(Routes::default()).1,
            link: PodLink::default(),
        }
    }
}

/// Pod networks of this node. Calls for different pods may run at the same time; calls for one
/// pod come one after the other, from its pod worker.
pub struct PodNetworks {
    paths: Paths,
    config: NetworkConfig,
    runner: Runner,
    view: watch::Receiver<Arc<View>>,
    dataplane: Arc<dyn Dataplane>,
    pool: Arc<Pool>,
    wirer: Arc<Wirer>,
}

/// What an attachment has come to.
struct Attached {
    addresses: Vec<IpAddr>,
    /// None: it cannot be told, which has been said.
    interface: Option<PodInterface>,
}

impl Attached {
    fn on_bridge(pod: &PodUid, attached: &bridge_result::Attached) -> Self {
        let addresses = addresses_of(attached);
        let interface = PodInterface {
            pod: pod.clone(),
            ifindex: attached.host_ifindex,
            gateway_mac: attached.gateway_mac,
            pod_mac: attached.mac,
            addresses: addresses.clone(),
            direct: true,
            prepared: false,
            bandwidth: Bandwidth::default(),
        };
        Self {
            addresses,
            interface: Some(interface),
        }
    }
}

/// What there is on the node.
struct Found {
    /// Every pod of which anything is left.
    pods: BTreeSet<PodUid>,
    /// Containers of living pods, and of the pool.
    kept: HashSet<Owner>,
}

impl PodNetworks {
    /// * `paths` – namespaces, records and leases are below `paths.run`.
    /// * `view` – its settings say this node's pod prefix.
    /// * `dataplane` – every pod with a network of its own is put into its packet path.
    pub fn new(
        paths: Paths,
        config: NetworkConfig,
        view: watch::Receiver<Arc<View>>,
        dataplane: Arc<dyn Dataplane>,
    ) -> Self {
        let runner = Runner {
            path: config.plugin_dirs.clone(),
        };
        let wirer = Wirer {
            paths: paths.clone(),
            conf_dir: config.conf_dir.clone(),
            view: view.clone(),
            dataplane: dataplane.clone(),
            routes: config.routes.clone(),
            link: config.link,
        };
        Self {
            pool: Arc::new(Pool::new(config.ready_count)),
            wirer: Arc::new(wirer),
            paths,
            config,
            runner,
            view,
            dataplane,
        }
    }

    /// Gives the pods that run the size of packets that fits the ways to other nodes, until shutdown.
    pub fn follow_packet_size(
        &self,
        shutdown: CancellationToken,
    ) -> impl Future<Output = ()> + Send + use<> {
        let (wirer, pool) = (self.wirer.clone(), self.pool.clone());
        packet_size::follow(wirer, pool, self.config.routes.clone(), shutdown)
    }

    /// What a new pod is attached with, now.
    fn wiring(&self) -> Result<Wiring, NetworkError> {
        match chain::load(&self.config.conf_dir)? {
            Some(list) if !list.is_ours() => {
                self.runner.find_all(&list)?;
                Ok(Wiring::Chain(list))
            }
            _ => {
                let prefixes: Vec<IpNet> = self.view.borrow().settings.pod_cidrs().collect();
                match prefixes.is_empty() {
                    false => Ok(Wiring::Bridge {
                        prefixes,
                        link: self.config.link,
                    }),
                    true => Err(NetworkError::NotReady(
                        "this node has no pod prefix yet: the control plane has not allocated one"
                            .into(),
                    )),
                }
            }
        }
    }

    /// The addresses that the API knows of a pod. After a reboot every Service on every node still
    /// sends there, so the pod should have them again, also while no control plane can tell of others.
    fn addresses_in_view(&self, pod: &PodUid) -> Vec<IpAddr> {
        let view = self.view.borrow();
        let status = view.pods.get(pod).and_then(|pod| pod.status.as_ref());
        let addresses = status.into_iter().flat_map(|status| {
            let all = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
            all.chain(status.pod_ip.as_deref())
        });
        addresses.filter_map(|text| text.parse().ok()).collect()
    }

    /// The network as its leases and links are found by.
    fn own_network(&self) -> Result<BridgeNetwork, NetworkError> {
        self.wirer.network(&[], self.config.link)
    }

    /// Namespaces and attachment: those of the pool for a new pod, where they fit.
    async fn sandbox(
        &self,
        spec: &PodNetworkSpec,
        dir: PathBuf,
        netns: &Path,
        kinds: Kinds,
        is_recorded: bool,
    ) -> Result<Attached, NetworkError> {
        let is_new = !is_recorded && !dir.exists();
        let mut ready = None;
        if is_new && kinds == Kinds::Own {
            let known = self.addresses_in_view(&spec.pod);
            ready = match known.is_empty() {
                true => self.pool.take(self.wirer.prefixes().as_ref()),
                // After a reboot the pool may have leased what its pods had before.
                false => self.pool.take_of(&known),
            };
        }
        if let Some(mut set) = ready.take() {
            match set.wires.take() {
                Some(wires) => return self.take_over(spec, dir, set, wires).await,
                None => ready = Some(set),
            }
        }
        let hostname = spec.hostname.clone();
        let new = namespaces::ensure(dir, kinds, hostname, || ready).await?;
        self.attach(spec, netns, new).await
    }

    /// Attaches a pod whose namespaces are pinned.
    async fn attach(
        &self,
        spec: &PodNetworkSpec,
        netns_path: &Path,
        netns_is_new: bool,
    ) -> Result<Attached, NetworkError> {
        let (run, pod) = (&self.paths.run, &spec.pod);
        let found = Record::load(run, pod)?;
        let existed = found.is_some();
        let mut record = match found {
            Some(record) => record,
            None => Record::intent(spec, self.wiring()?),
        };
        let owner = record.owner(pod);
        match record.wiring.clone() {
            Wiring::Bridge { prefixes, link } => {
                let network = self.wirer.network(&prefixes, link)?;
                if record.addresses.is_empty() {
                    record.store(run, pod)?;
                }
                forwarding::ensure(run, &network)?;
                let (host, netns) = (
                    Netlink::open().map_err(from_cni)?,
                    Netns::open(netns_path).map_err(from_cni)?,
                );
                // An agent's start asks for every pod of the node.
                let was_attached = !record.addresses.is_empty() && !netns_is_new;
                if was_attached {
                    let addresses = &record.addresses;
                    let standing = bridge::standing(&host, &network, &owner, addresses).await;
                    if let Some(standing) = standing.map_err(from_cni)?
                        && let Some(first) = record.addresses.first()
                    {
                        let interface = PodInterface {
                            pod: pod.clone(),
                            ifindex: standing.port,
                            gateway_mac: standing.gateway_mac,
                            pod_mac: mac_of(*first),
                            addresses: record.addresses.clone(),
                            direct: true,
                            prepared: false,
                            bandwidth: Bandwidth::default(),
                        };
                        return Ok(Attached {
                            addresses: record.addresses,
                            interface: Some(interface),
                        });
                    }
                }
                if record.addresses.is_empty() {
                    let had = self.addresses_in_view(pod);
                    let preferred = bridge::prefer(&network, &owner, had).await;
                    preferred.map_err(from_cni)?;
                }
                let mut attached = bridge::add(&host, &network, &owner, &netns).await;
                // The last addresses may be those of sandboxes in waiting.
                if let Err(CniError::Exhausted { .. }) = attached
                    && self.pool.discard(&self.wirer, |_| true).await > 0
                {
                    attached = bridge::add(&host, &network, &owner, &netns).await;
                }
                let attached = attached.map_err(from_cni)?;
                if record.addresses != addresses_of(&attached) {
                    record.addresses = addresses_of(&attached);
                    record.result = Some(attached.to_json("1.1.0"));
                    record.store(run, pod)?;
                }
                return Ok(Attached::on_bridge(pod, &attached));
            }
            Wiring::Chain(_) if record.result.is_some() && !netns_is_new => {}
            Wiring::Chain(list) => {
                if existed {
                    let subject = subject(&record, pod, Some(netns_path));
                    // ADD did not finish, or for a namespace that is gone: undo it first.
                    self.runner
                        .remove(&list, &subject, record.result.as_ref())
                        .await?;
                    record.wiring = self.wiring()?;
                    record.result = None;
                }
                record = self.attach_chain(record, pod, netns_path).await?;
            }
        }
        Ok(Attached {
            interface: interface_of(&record, pod, netns_path).await?,
            addresses: record.addresses,
        })
    }

    async fn attach_chain(
        &self,
        mut record: Record,
        pod: &PodUid,
        netns_path: &Path,
    ) -> Result<Record, NetworkError> {
        let run = &self.paths.run;
        record.store(run, pod)?;
        let Wiring::Chain(list) = record.wiring.clone() else {
            // The configuration changed to ours meanwhile: the next try takes it.
            return Err(NetworkError::NotReady(
                "cni configuration has just changed".into(),
            ));
        };
        let netns = Netns::open(netns_path).map_err(from_cni)?;
        let inside = Netlink::open_in(&netns).await.map_err(from_cni)?;
        inside.set_up(LOOPBACK_INDEX).await.map_err(from_cni)?;
        let subject = subject(&record, pod, Some(netns_path));
        let added = self.runner.add(&list, &subject).await;
        let addresses = added.and_then(|result| {
            let addresses = pod_addresses(&list, &result)?;
            Ok((result, addresses))
        });
        match addresses {
            Ok((result, addresses)) => {
                record.result = Some(result);
                record.addresses = addresses;
                record.store(run, pod)?;
                Ok(record)
            }
            Err(error) => {
                // The specification asks for a DEL after a failed ADD; the ADD's error counts.
                if self.runner.remove(&list, &subject, None).await.is_ok() {
                    Record::remove(run, pod)?;
                }
                Err(error)
            }
        }
    }

    /// Gives a new pod the sandbox that the pool has made. Recorded before it is pinned: a crash in
    /// between leaves a lease that is found by the record.
    async fn take_over(
        &self,
        spec: &PodNetworkSpec,
        dir: PathBuf,
        ready: Ready,
        wires: Wires,
    ) -> Result<Attached, NetworkError> {
        let (mut record, pod) = (Record::intent(spec, self.wiring()?), &spec.pod);
        let Wires {
            container,
            mut attached,
            ..
        } = wires;
        attached.netns = dir.join("net").display().to_string();
        record.container = Some(container.clone());
        record.addresses = addresses_of(&attached);
        record.result = Some(attached.to_json("1.1.0"));
        record.store(&self.paths.run, pod)?;
        self.pool.recorded(&container);
        let hostname = spec.hostname.clone();
        namespaces::ensure(dir, Kinds::Own, hostname, || Some(ready)).await?;
        let mut attached = Attached::on_bridge(pod, &attached);
        if let Some(interface) = &mut attached.interface {
            interface.prepared = true;
        }
        Ok(attached)
    }

    /// The bridge's part of a removal; the pins are gone already.
    async fn detach_bridge(
        &self,
        pod: &PodUid,
        owner: &Owner,
        network: &BridgeNetwork,
        addresses: &[IpAddr],
    ) -> Result<(), NetworkError> {
        let host = Netlink::open().map_err(from_cni)?;
        let name = bridge::host_ifname(&network.name, owner);
        let mut pause = Duration::from_millis(1);
        let mut waited = Duration::ZERO;
        while host.link_by_name(&name).await.map_err(from_cni)?.is_some() {
            if waited >= LINK_GONE_WAIT {
                // Something still holds the namespace. The pod is over, so its link goes too.
                tracing::debug!(%pod, link = %name, "namespace still held; link deleted");
                return bridge::remove(&host, network, owner, addresses)
                    .await
                    .map_err(from_cni);
            }
            tokio::time::sleep(pause).await;
            waited += pause;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        bridge::release(&host, network, owner, addresses)
            .await
            .map_err(from_cni)
    }

    /// Every pod of which anything is left, and the containers that are not to be touched.
    async fn found(&self, live: &HashSet<PodUid>) -> Result<Found, NetworkError> {
        // In this order: an attachment that leaves the pool between two looks is in a record then.
        let leases = bridge::ipam(&self.own_network()?).and_then(|ipam| ipam.leases());
        let leases = leases.map_err(from_cni)?;
        let owners: HashSet<Owner> = leases.into_values().collect();
        let held = |owner: &&Owner| self.pool.is_held(&owner.container_id);
        let mut kept: HashSet<Owner> = owners.iter().filter(held).cloned().collect();
        let (run, mut recorded) = (&self.paths.run, HashSet::new());
        let mut pods: BTreeSet<PodUid> = Record::pods(run)?.into_iter().collect();
        for pod in &pods {
            let owner = Record::load(run, pod)?.map_or_else(|| owner(pod), |it| it.owner(pod));
            if live.contains(pod) {
                kept.insert(owner.clone());
            }
            recorded.insert(owner);
        }
        pods.extend(pinned(&self.paths)?.into_iter().map(|(pod, _)| pod));
        let of_nobody = (owners.iter()).filter(|it| !kept.contains(it) && !recorded.contains(it));
        pods.extend(of_nobody.filter_map(|owner| PodUid::new(&owner.container_id).ok()));
        Ok(Found { pods, kept })
    }
}

#[async_trait]
impl Network for PodNetworks {
    async fn ensure(&self, spec: &PodNetworkSpec) -> Result<PodNetwork, NetworkError> {
        let dir = self.paths.namespaces(&spec.pod);
        let ipcns = dir.join("ipc");
        if spec.host_network {
            let hostname = spec.hostname.clone();
            namespaces::ensure(dir, Kinds::HostNetwork, hostname, || None).await?;
            return Ok(PodNetwork {
                addresses: self.config.node_addresses.clone(),
                netns: None,
                ipcns,
                utsns: None,
                userns: None,
            });
        }
        let (netns, utsns) = (dir.join("net"), dir.join("uts"));
        // Nothing is pinned for a pod that cannot be attached yet.
        let is_recorded = Record::load(&self.paths.run, &spec.pod)?.is_some();
        if !is_recorded {
            self.wiring()?;
        }
        let userns = spec.user_range.map(|range| UserNamespace {
            path: dir.join("user"),
            range,
        });
        let kinds = match spec.user_range {
            Some(range) => Kinds::Mapped {
                range,
                rt: self.paths.bin.join("gantry-rt"),
            },
            None => Kinds::Own,
        };
        let attached = self.sandbox(spec, dir, &netns, kinds, is_recorded).await?;
        self.pool.fill(&self.wirer);
        if let Some(mut interface) = attached.interface {
            interface.bandwidth = spec.bandwidth;
            self.packets(move |dataplane| dataplane.attach_pod(&interface))
                .await?;
        }
        Ok(PodNetwork {
            addresses: attached.addresses,
            netns: Some(netns),
            ipcns,
            utsns: Some(utsns),
            userns,
        })
    }

    async fn remove(&self, pod: &PodUid) -> Result<(), NetworkError> {
        let record = Record::load(&self.paths.run, pod)?;
        let dir = self.paths.namespaces(pod);
        let netns_path = dir.join("net");
        if let Some(Wiring::Chain(list)) = record.as_ref().map(|record| &record.wiring)
            && let Some(record) = &record
        {
            let netns = Netns::open(&netns_path).ok();
            let subject = subject(record, pod, netns.as_ref().map(Netns::path));
            self.runner
                .remove(list, &subject, record.result.as_ref())
                .await?;
        }
        namespaces::remove(&dir)?;
        let owned = pod.clone();
        self.packets(move |dataplane| dataplane.detach_pod(&owned))
            .await?;
        match &record {
            Some(record) => match &record.wiring {
                Wiring::Chain(_) => {}
                Wiring::Bridge { prefixes, link } => {
                    let owner = record.owner(pod);
                    let network = self.wirer.network(prefixes, *link)?;
                    self.detach_bridge(pod, &owner, &network, &record.addresses)
                        .await?;
                }
            },
            // Host network, nothing at all, or a lost record: then the names still find it.
            None => {
                let network = self.own_network()?;
                self.detach_bridge(pod, &owner(pod), &network, &[]).await?;
            }
        }
        Record::remove(&self.paths.run, pod)
    }

    async fn retain(&self, live: &HashSet<PodUid>) -> Result<(), NetworkError> {
        self.pool.fill(&self.wirer);
        let mut first = Ok(());
        let Found { pods, mut kept } = self.found(live).await?;
        let dead = pods.iter().filter(|pod| !live.contains(*pod));
        // At the same time: the kernel takes namespaces down in batches.
        let removals = dead.map(|pod| async move {
            tracing::info!(%pod, "network of a pod that is no more: removed");
            self.remove(pod).await
        });
        for result in futures_util::future::join_all(removals).await {
            first = first.and(result);
        }
        let pods = live.clone();
        let detached = self.packets(move |dataplane| dataplane.retain_pods(&pods));
        first = first.and(detached.await);
        // Ports whose lease and record are both gone.
        kept.extend(live.iter().map(owner));
        let host = Netlink::open().map_err(from_cni)?;
        let network = self.own_network()?;
        let collected = bridge::routed::collect(&host, &network, &kept).await;
        first = first.and(collected.map_err(from_cni));
        let collected = bridge::collect(&host, &network, &kept).await;
        first = first.and(collected.map_err(from_cni));
        if let Some(list) = self.third_party() {
            first = first.and(self.runner.collect(&list, live).await);
        }
        first
    }
}

impl PodNetworks {
    /// Off the runtime's workers: the kernel's lock of all interfaces may be held for a while.
    async fn packets(
        &self,
        work: impl FnOnce(&dyn Dataplane) -> Result<(), DataplaneError> + Send + 'static,
    ) -> Result<(), NetworkError> {
        let dataplane = self.dataplane.clone();
        match tokio::task::spawn_blocking(move || work(dataplane.as_ref())).await {
            Ok(result) => result.map_err(|error| NetworkError::Packets(error.to_string())),
            Err(error) => Err(NetworkError::Packets(error.to_string())),
        }
    }

    fn third_party(&self) -> Option<NetworkList> {
        let list = chain::load(&self.config.conf_dir).ok().flatten()?;
        (!list.is_ours() && self.runner.find_all(&list).is_ok()).then_some(list)
    }
}

/// The node's end of what a third party's plugins made; none, and said so, when it cannot be told.
async fn interface_of(
    record: &Record,
    pod: &PodUid,
    netns_path: &Path,
) -> Result<Option<PodInterface>, NetworkError> {
    let netns = Netns::open(netns_path).map_err(from_cni)?;
    let host = Netlink::open().map_err(from_cni)?;
    let inside = Netlink::open_in(&netns).await.map_err(from_cni)?;
    let (addresses, result) = (&record.addresses, record.result.as_ref());
    let found = interface::find(&host, &inside, pod, addresses, result).await;
    match found.map_err(from_cni)? {
        Ok(interface) => Ok(Some(interface)),
        Err(words) => {
            tracing::warn!(
                %pod,
                "this pod's packets are not seen by Gantry: {words}. NetworkPolicy, the check of its                  source addresses and Services without sockets do not work for it"
            );
            Ok(None)
        }
    }
}

/// The pods with a directory of pins, and that directory.
pub(super) fn pinned(paths: &Paths) -> Result<Vec<(PodUid, PathBuf)>, NetworkError> {
    let pods_dir = paths.run.join("pods");
    let failed = |source| NetworkError::Io {
        context: format!("list {}", pods_dir.display()),
        source,
    };
    let entries = match fs::read_dir(&pods_dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut pods = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        if let Some(pod) = name.to_str().and_then(|name| PodUid::new(name).ok()) {
            let dir = paths.namespaces(&pod);
            if dir.exists() {
                pods.push((pod, dir));
            }
        }
    }
    Ok(pods)
}

/// `/run/gantry/ipam`
pub(super) fn lease_dir(paths: &Paths) -> PathBuf {
    paths.run.join("ipam")
}

fn subject<'a>(record: &'a Record, pod: &'a PodUid, netns: Option<&'a Path>) -> Subject<'a> {
    Subject {
        pod,
        namespace: &record.namespace,
        name: &record.name,
        netns,
    }
}

/// The container of a pod that made its own attachment.
fn owner(pod: &PodUid) -> Owner {
    wires::owner(pod.as_str())
}

pub(super) fn addresses_of(attached: &bridge_result::Attached) -> Vec<IpAddr> {
    let addresses = attached.addresses.iter();
    addresses.map(|ip| ip.address.addr()).collect()
}

/// An error of the built-in wiring, in the pod worker's terms.
pub(super) fn from_cni(error: CniError) -> NetworkError {
    match error {
        CniError::Io { context, source }
        | CniError::Kernel {
            what: context,
            source,
        } => NetworkError::Io { context, source },
        CniError::NotReady(message) => NetworkError::NotReady(message),
        other => NetworkError::Cni {
            plugin: "gantry-bridge".into(),
            message: other.to_string(),
        },
    }
}

#[cfg(test)]
mod tests;
