//! What node, pods and containers use: one reading, shown three ways.
//!
//! ```text
//! cgroup files, /proc/<pid>/net/dev, disk ─► sample ─┬─► usage (rates, pure) ─► tunnel ─► `gantry top`
//!                                                    └─► metrics (text, pure) ─► socket ─► Prometheus
//! ```
//! Nothing is read unless somebody asks: an idle agent stays idle. Rates need two readings; the one
//! before is kept for a minute, and without one the first question waits a second for a second.
//! Counting a pod's files is slow, so that figure may be a minute old.

pub mod metrics;
pub mod sample;
pub mod socket;
pub mod usage;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use gantry_api::proto;
use tokio::sync::watch;

use self::sample::Sample;
use crate::cgroups::Cgroups;
use crate::ids::PodUid;
use crate::paths::Paths;
use crate::view::View;

/// An older reading says nothing about now.
const SAMPLE_AGE_MAX: Duration = Duration::from_secs(60);
/// Rates over less than this are noise.
const WINDOW_MIN: Duration = Duration::from_millis(900);
/// How old a pod's disk usage may be.
const DISK_AGE_MAX: Duration = Duration::from_secs(60);

/// Bytes on disk by pod, and when they were counted.
type DiskUsage = HashMap<PodUid, (Instant, u64)>;

/// Takes readings when asked. Cheap to clone.
#[derive(Clone)]
pub struct Collector {
    shared: Arc<Shared>,
}

struct Shared {
    node: String,
    cgroups: Cgroups,
    paths: Paths,
    view: OnceLock<watch::Receiver<Arc<View>>>,
    before: Mutex<Option<Arc<Sample>>>,
    disk: Mutex<DiskUsage>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Collector {
    /// Knows no pods until [`Collector::follow`].
    pub fn new(node: String, cgroups: Cgroups, paths: Paths) -> Self {
        let shared = Shared {
            node,
            cgroups,
            paths,
            view: OnceLock::new(),
            before: Mutex::default(),
            disk: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Where the pods' names come from; the first call counts.
    pub fn follow(&self, view: watch::Receiver<Arc<View>>) {
        let _ = self.shared.view.set(view);
    }

    /// A reading of now.
    pub async fn sample(&self) -> Arc<Sample> {
        let this = self.clone();
        let read = tokio::task::spawn_blocking(move || Arc::new(this.read()));
        read.await.unwrap_or_default()
    }

    /// Usage with rates since the reading before.
    pub async fn usage(&self) -> proto::NodeUsage {
        let fresh = |s: &Arc<Sample>| s.at.elapsed() < SAMPLE_AGE_MAX;
        let before = lock(&self.shared.before).clone().filter(fresh);
        let before = match before {
            Some(before) => before,
            None => self.sample().await,
        };
        // Cut short only by a reading that is young: the window would tell nothing.
        tokio::time::sleep(WINDOW_MIN.saturating_sub(before.at.elapsed())).await;
        let now = self.sample().await;
        *lock(&self.shared.before) = Some(now.clone());
        usage::between(&self.shared.node, &before, &now)
    }

    fn read(&self) -> Sample {
        let shared = &self.shared;
        let pods = match shared.view.get() {
            Some(view) => view.borrow().pods.clone(),
            None => Arc::default(),
        };
        let disk = |uid: &PodUid, count: &dyn Fn() -> u64| {
            if let Some((at, bytes)) = lock(&shared.disk).get(uid)
                && at.elapsed() < DISK_AGE_MAX
            {
                return *bytes;
            }
            let bytes = count();
            lock(&shared.disk).insert(uid.clone(), (Instant::now(), bytes));
            bytes
        };
        let sample = sample::read(&pods, &shared.cgroups, &shared.paths, disk);
        lock(&shared.disk).retain(|uid, _| pods.contains_key(uid));
        sample
    }
}
