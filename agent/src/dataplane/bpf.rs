//! The data plane of this node: what changed in the view since the last time becomes a plan, and
//! the plan becomes writes to the maps.
//!
//! ```text
//!  start: maps found pinned ─► Table::adopt ─► attach at once          (restart: nothing changes)
//!         no maps, no links ─► empty Table  ─► attach at once          (first start)
//!         maps of another layout, links pinned ─► empty Table          (upgrade: the old programs
//!                              and maps serve until the first apply has filled the new ones)
//! ```
//! Invariants: one `apply` at a time; a failed write makes the picture void, and the next `apply`
//! adopts the maps again before it plans; a view of revision 0 knows nothing and changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError, PerCpuArray};
use aya::programs::ProgramFd;
use ebpf_maps::counter::COUNTER_NAMES;
use ebpf_maps::device::DeviceRuleKey;
use ebpf_maps::drop::DROP_NAMES;
use ebpf_maps::services::Addr;
use ebpf_maps::uplink::SWITCH_FAST_PATH;
use gantry_api::k8s_openapi::api::core::v1::Pod;
use tokio::sync::{Mutex, watch};

use super::failures::FailureMap;
use super::flows::Flows;
use super::hooks::{self, SERVICE_HOOKS};
use super::load::{self, Loaded, program_fd, take_map, unexpected};
use super::nodes::{Near, Nodes};
use super::pods::PodPrograms;
use super::policies::Policies;
use super::repair::Repair;
use super::tables::Tables;
use super::uplinks::UplinkPrograms;
use super::xdp::XdpMode;
use super::{Dataplane, DataplaneError, StuckService, bpffs, sys};
use crate::ids::PodUid;
use crate::network::masquerade::{self, Masquerade};
use crate::paths::Paths;
use crate::services::announce::{Announcements, Watch};
use crate::services::arena::QUARANTINE;
use crate::services::changed::Shared;
use crate::services::ejection::{Ejections, Target};
use crate::services::index::{BackendSet, Surroundings};
use crate::services::liveness::Seen;
use crate::services::plan::{Found, Limits, Plan, Table};
use crate::services::shown::Fill;
use crate::view::{ServiceName, Settings, View};

mod calls;
mod devices;
mod state;

pub use super::hooks::cgroup_id;

/// Times that one `apply` waits for a quarantine before it reports a Service as stuck.
const QUARANTINE_WAITS: u32 = 3;

/// What the data plane needs to know of its node.
#[derive(Clone, Debug)]
pub struct Options {
    /// This node's name: which backends are local.
    pub node: String,
    /// Where the node's own resolver listens; it then answers the cluster's DNS address.
    pub resolver: Option<SocketAddr>,
    /// Pods' packets to the outside leave from the node's own address; none: they do not.
    pub masquerade: Option<Masquerade>,
    /// Where frames from outside are looked at first.
    pub xdp: XdpMode,
    /// Packets between pods and other machines go past the node's IP stack.
    pub fast_path: bool,
}

/// The programs and maps of this node. Dropping it leaves all of them in the kernel.
pub struct BpfDataplane {
    paths: Paths,
    options: Options,
    started: Instant,
    state: Mutex<State>,
    counters: PerCpuArray<MapData, u64>,
    drops: PerCpuArray<MapData, u64>,
    pods: std::sync::Mutex<PodPrograms>,
    policies: std::sync::Mutex<Policies>,
    repair: Repair,
    fill: std::sync::Mutex<Vec<Fill>>,
    uplinks: std::sync::Mutex<UplinkPrograms>,
    watch: watch::Sender<Option<Watch>>,
    flows: Flows,
    failures: std::sync::Mutex<FailureMap>,
    ejections: [AtomicU64; 2],
    device_guard: Result<ProgramFd, String>,
    device_exempt: std::sync::Mutex<HashMap<MapData, u64, u32>>,
    device_rules: std::sync::Mutex<HashMap<MapData, DeviceRuleKey, u32>>,
}

struct State {
    tables: Tables,
    table: Table,
    /// The last view that was programmed: what it shares with the next one is not looked at.
    last: Option<Last>,
    /// Every Service is to be planned, whatever the last view was.
    whole: bool,
    surroundings: Surroundings,
    announcements: Announcements,
    /// What is seen of the other nodes on the link; none: nobody has looked yet.
    seen: Option<Seen>,
    /// The host ports of this node's pods, as last planned.
    host_ports: Wanted,
    pub(super) ejections: Ejections,
    /// The Services of the backends that are watched.
    pub(super) owners: BTreeMap<Target, BTreeSet<ServiceName>>,
    node_addresses: BTreeMap<Addr, u32>,
    /// Other nodes' addresses that answer pods by the way that they are asked; all, if nobody has said
    /// which. Until then each stays what the maps have.
    near: Option<Near>,
    /// Whole or partial failures, by Service; planned again at each apply.
    stuck: BTreeMap<ServiceName, String>,
    /// Parts of Services that make no sense; planned again when the Service changes.
    faults: BTreeMap<ServiceName, String>,
    /// Connections of some backends are, or were, counted.
    has_counted: bool,
    /// A write failed: `table` may not be what the maps hold.
    void: bool,
    /// Programs that wait for the first apply before they take over from those of another layout.
    upgrade: Option<Upgrade>,
}

struct Last {
    shared: Shared,
    rev: u64,
    nodes: Arc<Nodes>,
    settings: Arc<Settings>,
    pods: Arc<BTreeMap<PodUid, Arc<Pod>>>,
}

struct Upgrade {
    ebpf: Ebpf,
    cgroup_root: PathBuf,
}

/// What a Service wants, and what of it could not be understood.
type Wanted = BTreeMap<ServiceName, Vec<BackendSet>>;

impl BpfDataplane {
    /// Loads the programs, adopts what is pinned, attaches to `cgroup_root`: the root of cgroup v2
    /// (`/sys/fs/cgroup`, on hybrid hosts `/sys/fs/cgroup/unified`), so that pods and the node's
    /// own processes are seen alike.
    ///
    /// # Errors
    /// The kernel's refusal, with what to do about it. Nothing is half-attached in the sense that
    /// matters: programs on empty maps change nothing.
    pub fn start(
        paths: &Paths,
        cgroup_root: &Path,
        options: Options,
    ) -> Result<Self, DataplaneError> {
        bpffs::ensure(paths)?;
        let links = hooks::directory(paths);
        fs::create_dir_all(&links).map_err(|error| {
            DataplaneError::kernel(format!("create {}", links.display()), &error)
        })?;
        let attached = fs::read_dir(&links).is_ok_and(|mut pins| pins.next().is_some());
        let Loaded {
            mut ebpf,
            fresh,
            device_guard,
        } = load::load(paths)?;
        log_programs(&mut ebpf);
        let tables = Tables::take(&mut ebpf)?;
        let release_at = if fresh { Duration::ZERO } else { QUARANTINE };
        let found = match fresh {
            true => Found::default(),
            false => tables.to_adopt()?,
        };
        let table = Table::adopt(found, Limits::default(), release_at);
        let node_addresses = tables.node_addresses()?;
        let counters = take_map(&mut ebpf, "COUNTERS")?.try_into();
        let counters = counters.map_err(|error: MapError| unexpected("COUNTERS", error))?;
        let drops = take_map(&mut ebpf, "DROPS")?.try_into();
        let drops = drops.map_err(|error: MapError| unexpected("DROPS", error))?;
        let pods = PodPrograms::take(&mut ebpf, paths)?;
        let policies = Policies::take(&mut ebpf, options.resolver.map(|at| at.ip()))?;
        let peers = take_map(&mut ebpf, "PEERS")?.try_into();
        let peers = peers.map_err(|error: MapError| unexpected("PEERS", error))?;
        let traffic = tables.traffic();
        let traffic = traffic.map_err(|error| DataplaneError::kernel("map TRAFFIC", &error))?;
        let repair = Repair::start(paths, peers, traffic)?;
        let mut uplinks = UplinkPrograms::take(&mut ebpf, paths, options.xdp)?;
        uplinks.switch(SWITCH_FAST_PATH, options.fast_path)?;
        let flows = Flows::take(&mut ebpf)?;
        let failures = FailureMap::take(&mut ebpf)?;
        let exempt = take_map(&mut ebpf, "DEVICE_EXEMPT")?.try_into();
        let exempt = exempt.map_err(|error: MapError| unexpected("DEVICE_EXEMPT", error))?;
        let rules = take_map(&mut ebpf, "DEVICE_RULES")?.try_into();
        let rules = rules.map_err(|error: MapError| unexpected("DEVICE_RULES", error))?;
        let adopted = table.frontend_count();
        let mut upgrade = Some(Upgrade {
            ebpf,
            cgroup_root: cgroup_root.into(),
        });
        if !(fresh && attached && !load::other_map_directories(paths).is_empty()) {
            take_over(paths, &mut upgrade)?;
        }
        tracing::info!(frontends = adopted, fresh, cgroup = %cgroup_root.display(), "data plane started");
        let state = State {
            tables,
            table,
            last: None,
            whole: true,
            surroundings: Surroundings {
                node: options.node.clone(),
                ..Surroundings::default()
            },
            announcements: Announcements::default(),
            seen: None,
            host_ports: Wanted::new(),
            ejections: Ejections::default(),
            owners: BTreeMap::new(),
            node_addresses,
            near: None,
            stuck: BTreeMap::new(),
            faults: BTreeMap::new(),
            has_counted: false,
            void: false,
            upgrade,
        };
        Ok(Self {
            paths: paths.clone(),
            options,
            started: Instant::now(),
            state: Mutex::new(state),
            counters,
            drops,
            pods: std::sync::Mutex::new(pods),
            policies: std::sync::Mutex::new(policies),
            repair,
            fill: std::sync::Mutex::default(),
            uplinks: std::sync::Mutex::new(uplinks),
            watch: watch::channel(None).0,
            flows,
            failures: std::sync::Mutex::new(failures),
            ejections: Default::default(),
            device_guard,
            device_exempt: std::sync::Mutex::new(exempt),
            device_rules: std::sync::Mutex::new(rules),
        })
    }

    /// Compares the maps themselves, not the last view, with `view`, and repairs every difference.
    /// A safety net: costs milliseconds per 10,000 Services.
    pub async fn resync(&self, view: &View) -> Result<Vec<StuckService>, DataplaneError> {
        self.state.lock().await.void = true;
        self.apply(view).await
    }

    /// What the programs counted since the maps were made: name and sum over all CPUs.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, DataplaneError> {
        sums(&self.counters, "COUNTERS", &COUNTER_NAMES)
    }

    /// How many packets the programs dropped since the maps were made, by reason.
    pub fn drops(&self) -> Result<Vec<(&'static str, u64)>, DataplaneError> {
        sums(&self.drops, "DROPS", &DROP_NAMES)
    }

    pub(super) fn pods(&self) -> std::sync::MutexGuard<'_, PodPrograms> {
        // What a panic leaves half-written is written again by the next call for that pod.
        let locked = self.pods.lock();
        locked.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn policies(&self) -> std::sync::MutexGuard<'_, Policies> {
        // As above: the maps are read again after anything that was not finished.
        let locked = self.policies.lock();
        locked.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn failures(&self) -> std::sync::MutexGuard<'_, FailureMap> {
        // As above.
        let locked = self.failures.lock();
        locked.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(super) fn uplinks(&self) -> std::sync::MutexGuard<'_, UplinkPrograms> {
        // As above.
        let locked = self.uplinks.lock();
        locked.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whose packets leave from the node's own address.
    fn masquerade(&self, view: &View) -> Result<(), DataplaneError> {
        let wanted = self.options.masquerade.as_ref();
        let rows = wanted.map(|wanted| masquerade::rows(wanted, view));
        self.uplinks().masquerade(rows.as_ref())
    }

    /// Answers for exactly these addresses, and says who is to be watched because of them.
    fn announce(&self, state: &State, announced: &BTreeSet<Addr>) -> Result<(), DataplaneError> {
        let watch = Some(state.announcements.watch());
        self.watch.send_if_modified(|old| {
            let is_new = *old != watch;
            *old = watch;
            is_new
        });
        match state.seen {
            Some(_) => self.uplinks().announce(announced),
            None => Ok(()),
        }
    }

    /// Plans and performs, and waits out a quarantine if only that is in the way.
    async fn program(
        &self,
        state: &mut State,
        mut wanted: Wanted,
        rev: u64,
    ) -> Result<(), DataplaneError> {
        for attempt in 0..=QUARANTINE_WAITS {
            let plan = state.table.plan(&wanted, rev, self.now());
            let Plan {
                steps,
                stuck,
                retry_at,
            } = plan;
            if let Err(error) = state.tables.perform(&steps) {
                state.void = true;
                return Err(error);
            }
            state.table.performed(self.now());
            for name in wanted.keys() {
                state.stuck.remove(name);
            }
            wanted.retain(|name, _| stuck.contains_key(name));
            state.stuck.extend(stuck);
            match retry_at {
                Some(at) if attempt < QUARANTINE_WAITS => {
                    tokio::time::sleep(at.saturating_sub(self.now())).await;
                }
                _ => return Ok(()),
            }
        }
        Ok(())
    }
}

/// The sum over all CPUs of each element that has a name.
fn sums(
    map: &PerCpuArray<MapData, u64>,
    map_name: &str,
    names: &[&'static str],
) -> Result<Vec<(&'static str, u64)>, DataplaneError> {
    let sums = (0..).zip(names).map(|(index, name)| {
        let values = map.get(&index, 0);
        let values = values.map_err(|error| unexpected(map_name, error))?;
        Ok((*name, values.iter().sum()))
    });
    sums.collect()
}

/// Attaches the loaded programs, or puts them behind the pinned links, and drops what other
/// versions of the agent pinned. Does nothing the second time.
fn take_over(paths: &Paths, upgrade: &mut Option<Upgrade>) -> Result<(), DataplaneError> {
    let Some(Upgrade { ebpf, cgroup_root }) = upgrade else {
        return Ok(());
    };
    for hook in &SERVICE_HOOKS {
        let program = program_fd(ebpf, hook.program)?;
        hooks::attach(paths, hook, program.as_fd(), cgroup_root)?;
    }
    // The links hold the programs, the programs their maps: the object is needed no longer.
    *upgrade = None;
    for directory in load::other_map_directories(paths) {
        if let Err(error) = fs::remove_dir_all(&directory) {
            tracing::warn!(path = %directory.display(), %error, "cannot remove old maps");
        }
    }
    Ok(())
}

/// Forwards the programs' logs, if the object was built with any and a runtime is there to read.
fn log_programs(ebpf: &mut Ebpf) {
    if ebpf.map("AYA_LOGS").is_none() || tokio::runtime::Handle::try_current().is_err() {
        return;
    }
    let logger = match aya_log::EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(error) => return tracing::warn!(%error, "no logs from the eBPF programs"),
    };
    match sys::watch_readable(logger) {
        Ok(mut logger) => drop(tokio::spawn(async move {
            while let Ok(mut ready) = logger.readable_mut().await {
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
        })),
        Err(error) => tracing::warn!(%error, "no logs from the eBPF programs"),
    }
}
