//! What this node has for pods: what it keeps back, what is left, and who watches that it lasts.
//!
//! ```text
//! flags ─► reservation (pure) ─┬─► cgroups: limits of all pods
//!                              ├─► node_info: capacity, allocatable, conditions ◄─┐
//!                              └─► pressure::Monitor ──── what is short ──────────┘
//!                                  oom::Watcher ───► orders ──► pod workers
//! ```

pub mod flags;
pub mod reservation;

use std::collections::BTreeSet;
use std::sync::Arc;

use std::sync::atomic::{AtomicU64, Ordering};

use gantry_api::proto::ServicesRequest;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use self::flags::ResourceFlags;
use crate::cgroups::Cgroups;
use crate::cgroups::requests::Amounts;
use crate::dataplane::{Counts, Dataplane};
use crate::devices::Offered;
use crate::dns;
use crate::feed::NodeInfoSource;
use crate::feed::node_info::{self, NodeIdentity};
use crate::images::ImageStore;
use crate::network::Routes;
use crate::oom;
use crate::paths::Paths;
use crate::pods::Order;
use crate::pressure::thresholds::Resource;
use crate::pressure::{Monitor, signals::Sources};
use crate::runtime::spec::security::Host;
use crate::services::shown::warning;
use crate::stats::{self, Collector, metrics::AgentFigures};
use crate::view::View;

/// Orders to pods that may wait for the workers.
const ORDERS_MAX: usize = 256;

/// The node's resources from the flags on.
pub struct NodeResources {
    flags: ResourceFlags,
    cgroups: Cgroups,
    paths: Paths,
    identity: Arc<NodeIdentity>,
    usage: Collector,
    pressures: watch::Sender<BTreeSet<Resource>>,
    going_down: watch::Sender<bool>,
    names: Option<dns::Metrics>,
    routes: watch::Receiver<Routes>,
    wireguard_key: Option<String>,
}

impl NodeResources {
    /// Looks at what the machine has. `cgroups` were made with [`ResourceFlags::policy`].
    pub fn new(
        flags: ResourceFlags,
        node_name: &str,
        cgroups: &Cgroups,
        host: &Host,
        paths: &Paths,
    ) -> Self {
        let capacity = node_info::capacity(flags.max_pods);
        let room = flags.eviction_room(&capacity, node_info::disk_bytes(&paths.lib));
        let mut identity = NodeIdentity::new(node_name.to_owned());
        identity.pods_max = flags.max_pods;
        identity.reserved = flags.reserved(&capacity).plus(room);
        identity.hugepages = cgroups.hugepages().clone();
        identity.degraded = cgroups.lacks().iter().map(ToString::to_string).collect();
        if !host.may_lower_oom_score() {
            identity.degraded.push(
                "the agent lacks CAP_SYS_RESOURCE: containers keep the agent's oom_score_adj where \
                 theirs would be lower"
                    .to_owned(),
            );
        }
        let (pressures, _) = watch::channel(BTreeSet::new());
        Self {
            flags,
            cgroups: cgroups.clone(),
            paths: paths.clone(),
            identity: Arc::new(identity),
            usage: Collector::new(node_name.to_owned(), cgroups.clone(), paths.clone()),
            pressures,
            going_down: watch::Sender::new(false),
            names: None,
            // The sender may go: the last value stays readable.
            routes: watch::channel(Routes::default()).1,
            wireguard_key: None,
        }
    }

    /// Shows how other nodes are reached as well.
    pub fn with_routes(mut self, routes: watch::Receiver<Routes>) -> Self {
        self.routes = routes;
        self
    }

    /// Tells the others this node's WireGuard key.
    pub fn with_wireguard_key(mut self, key: Option<String>) -> Self {
        self.wireguard_key = key;
        self
    }

    /// What limits on this machine do not hold.
    pub fn degraded(&self) -> &[String] {
        &self.identity.degraded
    }

    /// The Node object's side of it, read anew at each call.
    pub fn info(
        &self,
        devices: &watch::Receiver<Offered>,
        dataplane: &Arc<dyn Dataplane>,
    ) -> NodeInfoSource {
        let dataplane = dataplane.clone();
        let (identity, lib) = (self.identity.clone(), self.paths.lib.clone());
        let pressures = self.pressures.subscribe();
        let going_down = self.going_down.subscribe();
        let devices = devices.clone();
        let routes = self.routes.clone();
        let own_address = node_info::OwnAddress::default();
        let key = self.wireguard_key.clone();
        Arc::new(move || {
            let node = node_info::read(&identity, &lib, &own_address, &pressures.borrow());
            let node = node_info::with_devices(node, &devices.borrow());
            let node = node_info::with_service_maps(node, &warning(&dataplane.fill()));
            let node = node_info::with_routes(node, &routes.borrow());
            let node = node_info::with_wireguard_key(node, key.as_deref());
            match *going_down.borrow() {
                true => node_info::going_down(node),
                false => node,
            }
        })
    }

    /// What pods may ask for.
    pub fn allocatable(&self) -> Amounts {
        let capacity = node_info::capacity(self.flags.max_pods);
        let kept = self.identity.reserved;
        Amounts {
            cpu_millicores: Some((capacity.cpu_count * 1000).saturating_sub(kept.cpu_millicores)),
            memory_bytes: Some(capacity.memory_without(&kept)),
        }
    }

    /// Set to true when the machine goes down.
    pub fn going_down(&self) -> watch::Sender<bool> {
        self.going_down.clone()
    }

    /// Readings of what everything uses.
    pub fn usage(&self) -> Collector {
        self.usage.clone()
    }

    /// Shows the resolver's figures as well.
    pub fn with_names(mut self, figures: dns::Metrics) -> Self {
        self.names = Some(figures);
        self
    }

    /// Starts watching for pressure and hit limits, and serving metrics; returns what they want of
    /// pods, and how others may say what they want.
    pub fn watch(
        self,
        images: &Arc<ImageStore>,
        view: &watch::Receiver<Arc<View>>,
        dataplane: &Arc<dyn Dataplane>,
        tasks: &TaskTracker,
        shutdown: &CancellationToken,
    ) -> (mpsc::Sender<Order>, mpsc::Receiver<Order>) {
        let (orders, ordered) = mpsc::channel(ORDERS_MAX);
        self.usage.follow(view.clone());
        let (usage, socket) = (self.usage.clone(), self.paths.run.join("metrics.sock"));
        let pressures = self.pressures.subscribe();
        let sources = Sources {
            lib: self.paths.lib.clone(),
            images: self.paths.lib.join("images"),
            cgroups: self.cgroups.clone(),
        };
        let monitor = Monitor::new(
            self.flags.pressure(),
            sources,
            self.paths,
            images.clone(),
            view.clone(),
            orders.clone(),
            self.pressures,
        );
        let evictions = monitor.eviction_count();
        let (names, routes) = (self.names, self.routes);
        let figures = figures(evictions, pressures, view.clone(), dataplane, names, routes);
        match stats::socket::listen(&socket) {
            Ok(listener) => {
                tasks.spawn(stats::socket::serve(
                    listener,
                    usage,
                    figures,
                    shutdown.clone(),
                ));
            }
            // Pods do not need it.
            Err(error) => warn!(%error, socket = %socket.display(), "metrics are not served"),
        }
        tasks.spawn(monitor.run(shutdown.clone()));
        let watcher = oom::Watcher::new(self.cgroups, view.clone(), orders.clone());
        tasks.spawn(watcher.run(shutdown.clone()));
        (orders, ordered)
    }
}

/// What the agent counts itself, for the metrics.
fn figures(
    evictions: Arc<AtomicU64>,
    pressures: watch::Receiver<BTreeSet<Resource>>,
    view: watch::Receiver<Arc<View>>,
    dataplane: &Arc<dyn Dataplane>,
    names: Option<dns::Metrics>,
    routes: watch::Receiver<Routes>,
) -> stats::socket::Figures {
    let dataplane = dataplane.clone();
    Arc::new(move || {
        let figures = AgentFigures {
            evictions: evictions.load(Ordering::Relaxed),
            pressures: Resource::ALL.map(|r| pressures.borrow().contains(&r)),
            resident_bytes: stats::socket::resident_bytes(),
            revision: view.borrow().rev,
            sockets_ended: dataplane.sockets_ended(),
            ejections: dataplane.ejections(),
            fill: dataplane.fill(),
            services: Vec::new(),
            counts: dataplane.counts().unwrap_or_else(|error| {
                warn!(%error, "no counts of packets");
                Counts::default()
            }),
            xdp: dataplane.xdp(),
            routes: routes.borrow().counts(),
            unreached: routes.borrow().problems.len(),
            names: names.as_ref().map(|text| text()).unwrap_or_default(),
        };
        let dataplane = dataplane.clone();
        Box::pin(async move {
            let all = dataplane.services(&ServicesRequest::default()).await;
            let services = all.unwrap_or_else(|error| {
                warn!(%error, "no figures of Services");
                Vec::new()
            });
            AgentFigures {
                services,
                ..figures
            }
        })
    })
}
