//! Pods: a worker per UID around a pure state machine, fed by the view and the runtime.
//!
//! ```text
//!  view ──► PodWorkers ──► worker per UID ──► prepare (sandbox) · launch (container) · probes
//!  exits ──────┘                └──► status, events ──► reporter
//! ```
//! `state.rs` decides (pure), `worker.rs` acts, `status.rs` renders. [`PodWorkers`] only starts
//! workers, routes inputs to them and, once after an agent start, removes what no pod of the view
//! owns. One task owns one pod: there is no lock on a pod's state.
//!
//! Invariants: a UID has at most one worker; a UID whose last word is on disk (`records.rs`) never
//! starts again; nothing is removed from the machine before the first view is known.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use gantry_api::k8s_openapi::api::core::v1::{Node as ApiNode, Pod as ApiPod};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::cgroups::Cgroups;
use crate::cgroups::requests::Amounts;
use crate::dataplane::Dataplane;
use crate::devices::DevicePlugins;
use crate::feed::Reporter;
use crate::ids::PodUid;
use crate::images::ImageStore;
use crate::network::Network;
use crate::paths::Paths;
use crate::runtime::spec::security::Host;
use crate::runtime::{ObservedSandbox, Runtime, RuntimeEvent};
use crate::static_pods::is_static;
use crate::view::View;
use crate::volumes::csi::CsiDrivers;
use crate::volumes::token::TokenSource;

pub mod backoff;
mod check;
mod configs;
mod devices;
pub mod drain;
pub mod hold;
mod hooks;
mod launch;
mod prepare;
pub mod probes;
mod processes;
pub mod records;
pub mod resize;
pub mod rotation;
pub mod state;
pub mod status;
mod termination;
mod timeline;
pub mod tunnels;
mod worker;

use hold::Hold;
pub use prepare::OWNER_MARK as LOG_OWNER_MARK;
use worker::{Handle, Message, Worker};

/// The addresses of a Node object, InternalIP first.
pub fn node_addresses(node: &ApiNode) -> Vec<IpAddr> {
    let addresses = node
        .status
        .iter()
        .flat_map(|s| s.addresses.iter().flatten());
    addresses
        .filter(|a| a.type_ == "InternalIP")
        .filter_map(|a| a.address.parse().ok())
        .collect()
}

/// Pods that are there already and looked at again at the same time.
pub const SECOND_LOOK_COUNT_MAX: usize = 4;

/// What all workers share.
pub struct Node {
    /// The node's name.
    pub name: String,
    /// Its addresses, the first is `status.hostIP`.
    pub host_addresses: Vec<IpAddr>,
    /// What this machine can give to containers.
    pub host: Host,
    /// Where everything lives.
    pub paths: Paths,
    /// Containers.
    pub runtime: Arc<dyn Runtime>,
    /// Pod networks.
    pub network: Arc<dyn Network>,
    /// Images.
    pub images: Arc<ImageStore>,
    /// Limits.
    pub cgroups: Arc<Cgroups>,
    /// What pods may ask for of this node.
    pub allocatable: Amounts,
    /// The machine goes down: no pod is begun any more.
    pub going_down: watch::Receiver<bool>,
    /// Devices that plugins hand out.
    pub devices: DevicePlugins,
    /// Drivers that publish volumes.
    pub csi: CsiDrivers,
    /// Where device rules are an eBPF program (pure cgroup v2): its exemptions.
    pub device_guard: Option<DeviceGuard>,
    /// Second looks at a pod (its sandbox after the agent's start, its volumes when an object has
    /// changed) take turns: an agent that starts has two for every pod, and new pods must not wait
    /// for all of them.
    pub second_looks: tokio::sync::Semaphore,
    /// How many probes are under way at once.
    pub probes: Arc<probes::Limits>,
    /// Statuses and events to the control plane.
    pub reporter: Reporter,
    /// Who issues tokens of service accounts.
    pub tokens: Arc<dyn TokenSource>,
}

/// Who exempts privileged containers from the device rules.
pub struct DeviceGuard {
    /// The data plane holds the exemptions.
    pub dataplane: Arc<dyn Dataplane>,
    /// The root of cgroup v2.
    pub root: PathBuf,
}

impl DeviceGuard {
    /// The cgroup of a container, by its path below the root.
    fn cgroup(&self, pod_cgroup: &str, container: &str) -> PathBuf {
        self.root
            .join(pod_cgroup.trim_start_matches('/'))
            .join(container)
    }
}

/// What other parts of the agent want of a pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Order {
    /// End it: the node needs what it uses.
    Evict {
        /// Which pod.
        pod: PodUid,
        /// Why this one, with the figures.
        message: String,
    },
    /// End it within this time: the machine goes down.
    Shutdown {
        /// Which pod.
        pod: PodUid,
        /// Seconds from SIGTERM to SIGKILL at most.
        grace_s: u64,
    },
    /// A warning for its events.
    Event {
        /// Which pod.
        pod: PodUid,
        /// `OOMKilled`, ...
        reason: &'static str,
        /// What happened, to what, why.
        message: String,
    },
}

/// The owner of all workers.
pub struct PodWorkers {
    node: Arc<Node>,
    orders: mpsc::Receiver<Order>,
    view: watch::Receiver<Arc<View>>,
    found: HashMap<PodUid, ObservedSandbox>,
    handles: HashMap<PodUid, Handle>,
    tasks: JoinSet<PodUid>,
    released: HashSet<PodUid>,
    blobs: Option<usize>,
    swept: bool,
    /// Until the control plane's word, or long enough without one: pods that do not run do not begin.
    hold: Option<Hold>,
}

/// Returns when the hold is over; never without one.
async fn over(hold: &mut Option<Hold>) {
    match hold {
        Some(hold) => hold.over().await,
        None => std::future::pending().await,
    }
}

impl PodWorkers {
    /// * `found` – what the runtime lists at agent start: those pods are adopted.
    /// * `orders` – what other parts of the agent want of pods.
    /// * `hold` – until when pods that do not run yet do not begin.
    pub fn new(
        node: Arc<Node>,
        view: watch::Receiver<Arc<View>>,
        found: Vec<ObservedSandbox>,
        orders: mpsc::Receiver<Order>,
        hold: Hold,
    ) -> Self {
        Self {
            node,
            orders,
            view,
            found: found.into_iter().map(|s| (s.pod.clone(), s)).collect(),
            handles: HashMap::new(),
            tasks: JoinSet::new(),
            released: HashSet::new(),
            blobs: None,
            swept: false,
            hold: Some(hold),
        }
    }

    /// Follows the view and the runtime until `shutdown`; pods are left running.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let Some(mut exits) = self.node.runtime.take_events() else {
            warn!("the runtime's events are taken already: no pod is run");
            return;
        };
        self.view.mark_changed();
        let mut drivers = self.node.csi.arrivals();
        loop {
            tokio::select! {
                // Every arm is cancel-safe: each only waits for something to become ready.
                () = shutdown.cancelled() => return,
                changed = self.view.changed() => match changed {
                    Ok(()) => self.follow().await,
                    Err(_) => return,
                },
                () = over(&mut self.hold) => {
                    self.hold = None;
                    self.follow().await;
                }
                Some(event) = exits.recv() => self.route(event).await,
                Ok(()) = drivers.changed() => self.try_again().await,
                Some(order) = self.orders.recv() => self.pass_on(order).await,
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => {
                    match ended {
                        Ok(uid) => self.ended(uid),
                        // A worker's panic must not take the others down; its pod runs on
                        // unwatched until the next agent start.
                        Err(error) => warn!(%error, "a pod worker has panicked"),
                    }
                }
            }
        }
    }

    /// Brings the set of workers to the newest view.
    async fn follow(&mut self) {
        let view = self.view.borrow_and_update().clone();
        for (uid, pod) in view.pods.iter() {
            if let Some(handle) = self.handles.get(uid) {
                let same = |old: &Option<Arc<_>>| old.as_ref().is_some_and(|o| Arc::ptr_eq(o, pod));
                handle.newest.send_if_modified(|slot| {
                    let changed = !same(slot);
                    if changed {
                        *slot = Some(pod.clone());
                    }
                    changed
                });
            } else if !self.released.contains(uid) && self.may_begin(uid, pod) {
                self.start(uid, pod.clone());
            }
        }
        for (uid, handle) in &self.handles {
            if !view.pods.contains_key(uid) {
                handle.newest.send_if_modified(|slot| slot.take().is_some());
            }
        }
        self.released.retain(|uid| view.pods.contains_key(uid));
        self.pass_on_blobs(&view).await;
        // Before the first commit only static pods are known: nothing else is unknown yet.
        if !self.swept && view.rev > 0 {
            self.swept = true;
            self.sweep(&view).await;
        }
    }

    fn may_begin(&self, uid: &PodUid, pod: &ApiPod) -> bool {
        self.hold.is_none() || self.found.contains_key(uid) || is_static(pod)
    }

    /// Its object may stay in the view until the control plane has heard of it.
    fn ended(&mut self, uid: PodUid) {
        self.handles.remove(&uid);
        if self.view.borrow().pods.contains_key(&uid) {
            self.released.insert(uid);
        }
    }

    fn start(&mut self, uid: &PodUid, pod: Arc<ApiPod>) {
        let found = self
            .found
            .remove(uid)
            .map(|s| s.containers)
            .unwrap_or_default();
        let view = self.view.clone();
        let (worker, handle) = Worker::new(self.node.clone(), uid.clone(), pod, found, view);
        self.handles.insert(uid.clone(), handle);
        let uid = uid.clone();
        self.tasks.spawn(async move {
            worker.run().await;
            uid
        });
    }

    /// A ConfigMap or Secret has changed: mounted copies follow, waiting sandboxes are tried again.
    async fn pass_on_blobs(&mut self, view: &View) {
        let identity = Arc::as_ptr(&view.blobs).addr();
        if self.blobs.replace(identity) == Some(identity) {
            return;
        }
        for handle in self.handles.values() {
            let _ = handle.inputs.send(Box::new(Message::Blobs)).await;
        }
    }

    /// A driver has come: those that wait for it, to begin or to end, wait no longer.
    async fn try_again(&self) {
        for handle in self.handles.values() {
            let _ = handle
                .inputs
                .send(Box::new(Message::Input(state::Input::Retry)))
                .await;
        }
    }

    async fn route(&self, event: RuntimeEvent) {
        let RuntimeEvent::Exited(run, exit) = event;
        match self.handles.get(&run.pod) {
            Some(handle) => {
                let input = state::Input::Exited(run, exit);
                let _ = handle.inputs.send(Box::new(Message::Input(input))).await;
            }
            None => info!(%run, code = exit.code, "a container of no known pod has ended"),
        }
    }

    /// A pod that has gone meanwhile needs no order.
    async fn pass_on(&self, order: Order) {
        let (pod, message) = match order {
            Order::Evict { pod, message } => (pod, Message::Input(state::Input::Evict(message))),
            Order::Shutdown { pod, grace_s } => {
                (pod, Message::Input(state::Input::Shutdown(grace_s)))
            }
            Order::Event {
                pod,
                reason,
                message,
            } => (pod, Message::Warning(reason, message)),
        };
        if let Some(handle) = self.handles.get(&pod) {
            let _ = handle.inputs.send(Box::new(message)).await;
        }
    }

    /// Removes sandboxes, networks and cgroups of pods that are not in the view: what a crash, or a
    /// deletion while the agent was away, has left.
    async fn sweep(&mut self, view: &View) {
        for (uid, sandbox) in std::mem::take(&mut self.found) {
            info!(pod = %uid, containers = sandbox.containers.len(), "removing an unknown pod");
            if let Err(words) = prepare::remove_unknown(&self.node, &uid, &sandbox).await {
                warn!(pod = %uid, "remove an unknown pod: {words}");
            }
        }
        let live: HashSet<PodUid> = view.pods.keys().cloned().collect();
        if let Err(error) = self.node.network.retain(&live).await {
            warn!(%error, "remove networks of unknown pods");
        }
        for (uid, _) in self.node.cgroups.pods() {
            if !live.contains(&uid)
                && let Err(error) = self.node.cgroups.remove_pod(&uid).await
            {
                warn!(pod = %uid, %error, "remove the cgroup of an unknown pod");
            }
        }
        prepare::sweep_files(&self.node, &live, &self.view).await;
    }
}
