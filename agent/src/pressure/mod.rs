//! Node pressure: reads what is left, tells the node's conditions, and evicts one pod at a time.
//!
//! ```text
//! /proc, statvfs, /gantry ─► signals ─► thresholds (pure) ─► conditions ─► node_info ─► Node status
//!   PSI trigger, 2 s timer ──┘              └─ short now ─► reclaim images, else victim (pure) ─► PodWorkers: Fail
//! ```
//! [`thresholds`] and [`victim`] decide; this file acts. Between two evictions the node waits until
//! the victim's cgroup is gone, at most [`VICTIM_PATIENCE`]: one pod may be enough.
//!
//! Nothing is remembered on disk: after a restart of the agent the machine is looked at anew.

pub mod signals;
pub mod thresholds;
pub mod usage;
pub mod victim;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Pod;
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::signals::Sources;
use self::thresholds::{Pressures, Resource, Shortage, Thresholds};
use self::victim::{CRITICAL_PRIORITY, Candidate};
use crate::cgroups::limits::{pod_requests, qos_class};
use crate::ids::PodUid;
use crate::images::{ImageStore, images_of};
use crate::paths::Paths;
use crate::pods::Order;
use crate::readiness;
use crate::static_pods::is_static;
use crate::view::View;

/// How often the signals are read without a PSI event.
const PERIOD: Duration = Duration::from_secs(2);
/// How long a victim may take to go before the next one is chosen.
const VICTIM_PATIENCE: Duration = Duration::from_secs(30);
/// Unused images are removed at most this often.
const RECLAIM_EVERY: Duration = Duration::from_secs(60);
/// Wake when some task stood still for 150 ms of 1 s (a window that unprivileged users may not
/// have: then the timer alone wakes).
const PSI_TRIGGER: &str = "some 150000 1000000";

/// What the operator has set.
#[derive(Clone, Debug)]
pub struct Config {
    /// Hard eviction thresholds.
    pub thresholds: Thresholds,
    /// How long a condition stays True after its threshold was met last.
    pub transition: Duration,
}

/// The task that watches the machine.
pub struct Monitor {
    config: Config,
    sources: Sources,
    paths: Paths,
    images: Arc<ImageStore>,
    view: watch::Receiver<Arc<View>>,
    orders: mpsc::Sender<Order>,
    conditions: watch::Sender<BTreeSet<Resource>>,
    pressures: Pressures,
    began: Instant,
    victim: Option<(PodUid, Instant)>,
    reclaimed_at: Option<Instant>,
    evicted: Arc<std::sync::atomic::AtomicU64>,
}

impl Monitor {
    /// * `orders` – to the pod workers;
    /// * `conditions` – those that are True, for the node's status.
    pub fn new(
        config: Config,
        sources: Sources,
        paths: Paths,
        images: Arc<ImageStore>,
        view: watch::Receiver<Arc<View>>,
        orders: mpsc::Sender<Order>,
        conditions: watch::Sender<BTreeSet<Resource>>,
    ) -> Self {
        let mut monitor = Self {
            config,
            sources,
            paths,
            images,
            view,
            orders,
            conditions,
            pressures: Pressures::default(),
            began: Instant::now(),
            victim: None,
            reclaimed_at: None,
            evicted: Arc::default(),
        };
        // The first status of the node already tells the truth.
        monitor.look();
        monitor
    }

    /// Evictions since the agent's start, for the metrics.
    pub fn eviction_count(&self) -> Arc<std::sync::atomic::AtomicU64> {
        self.evicted.clone()
    }

    /// Watches until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let trigger = match psi_trigger() {
            Ok(trigger) => Some(trigger),
            Err(error) => {
                debug!(%error, "no PSI trigger: pressure is looked at every 2 s only");
                None
            }
        };
        loop {
            let stalled = async {
                match &trigger {
                    // The kernel raises it at most once per window.
                    Some(fd) => match fd.ready(Interest::PRIORITY).await {
                        Ok(mut guard) => guard.clear_ready_matching(Ready::PRIORITY),
                        Err(_) => std::future::pending().await,
                    },
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // Each arm is cancel-safe: it only waits.
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(PERIOD) => {}
                () = stalled => {}
            }
            let shortages = self.look();
            if let Some(shortage) = shortages.first() {
                self.relieve(shortage).await;
            }
        }
    }

    /// Reads the signals and publishes the conditions.
    fn look(&mut self) -> Vec<Shortage> {
        let shortages = self.config.thresholds.shortages(&self.sources.read());
        let now = self.began.elapsed();
        let active = self
            .pressures
            .observe(&shortages, now, self.config.transition);
        self.conditions.send_if_modified(|held| {
            let changed = *held != active;
            if changed {
                info!(?active, ?shortages, "node pressure");
                *held = active;
            }
            changed
        });
        shortages
    }

    /// Frees something: unused images first, then one pod.
    async fn relieve(&mut self, shortage: &Shortage) {
        if let Some((uid, since)) = &self.victim {
            let gone = !self.sources.cgroups.has_pod(uid);
            if !gone && since.elapsed() < VICTIM_PATIENCE {
                return;
            }
            self.victim = None;
            return; // the signals are read once more before the next one
        }
        let resource = shortage.signal.resource();
        if resource == Resource::Disk && self.reclaim_images().await {
            return;
        }
        let candidates = self.candidates(resource).await;
        let Some(victim) = victim::choose(resource, &candidates) else {
            debug!(?shortage, "no pod may be evicted");
            return;
        };
        let message = victim::explain(shortage, victim, &candidates);
        warn!(pod = %victim.uid, name = victim.title, "evicting: {message}");
        let order = Order::Evict {
            pod: victim.uid.clone(),
            message,
        };
        self.victim = Some((victim.uid.clone(), Instant::now()));
        self.evicted
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let _ = self.orders.send(order).await;
    }

    /// True when something was removed.
    async fn reclaim_images(&mut self) -> bool {
        let due = |at: &Instant| at.elapsed() >= RECLAIM_EVERY;
        if !self.reclaimed_at.as_ref().is_none_or(due) {
            return false;
        }
        self.reclaimed_at = Some(Instant::now());
        let view = self.view.borrow().clone();
        let keep: BTreeSet<String> = view.pods.values().flat_map(|pod| images_of(pod)).collect();
        match self.images.remove_unused(&keep).await {
            Ok(removed) => {
                info!(
                    count = removed.len(),
                    "removed unused images for disk space"
                );
                !removed.is_empty()
            }
            Err(error) => {
                warn!(%error, "remove unused images");
                false
            }
        }
    }

    /// The pods that run here, with what they use of the scarce resource.
    async fn candidates(&self, resource: Resource) -> Vec<Candidate> {
        let view = self.view.borrow().clone();
        let (cgroups, paths) = (self.sources.cgroups.clone(), self.paths.clone());
        // Counting files on disk may take long.
        let counted = tokio::task::spawn_blocking(move || {
            view.pods
                .iter()
                .filter(|(_, pod)| pod.metadata.deletion_timestamp.is_none())
                .filter_map(|(uid, pod)| candidate(resource, uid, pod, &cgroups, &paths))
                .collect()
        });
        counted.await.unwrap_or_default()
    }
}

/// None when nothing of the pod runs.
fn candidate(
    resource: Resource,
    uid: &PodUid,
    pod: &Pod,
    cgroups: &crate::cgroups::Cgroups,
    paths: &Paths,
) -> Option<Candidate> {
    let class = qos_class(pod);
    let stats = cgroups
        .stats(&cgroups.pod_path(uid, class))
        .ok()
        .flatten()?;
    let spec = pod.spec.as_ref()?;
    let (namespace, name) = (
        pod.metadata.namespace.as_deref().unwrap_or_default(),
        pod.metadata.name.as_deref().unwrap_or_default(),
    );
    let (usage, request) = match resource {
        Resource::Memory => (
            stats.memory_working_set_bytes,
            pod_requests(pod).memory_bytes.unwrap_or(0),
        ),
        Resource::Disk => {
            let log = paths.pod_log(namespace, name, uid);
            let usage = usage::disk_bytes(&[&paths.pod_lib(uid), &log]);
            (usage, crate::cgroups::requests::pod_disk_request(pod))
        }
        Resource::Pids => (stats.task_count, 0),
    };
    let priority = spec.priority.unwrap_or(0);
    Some(Candidate {
        uid: uid.clone(),
        title: format!("{namespace}/{name}"),
        class,
        priority,
        critical: is_static(pod) || priority >= CRITICAL_PRIORITY,
        usage,
        request,
    })
}

/// A descriptor that becomes readable with priority when memory stalls.
fn psi_trigger() -> std::io::Result<AsyncFd<std::fs::File>> {
    let mut file = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/proc/pressure/memory")?;
    // The kernel wants the terminating zero and one write.
    std::io::Write::write_all(&mut file, format!("{PSI_TRIGGER}\0").as_bytes())?;
    readiness::watch(file, Interest::PRIORITY)
}
