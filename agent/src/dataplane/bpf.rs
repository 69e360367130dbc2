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

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError, PerCpuArray};
use aya::programs::ProgramFd;
use ebpf_maps::counter::COUNTER_NAMES;
use ebpf_maps::device::{BLOCK, CHARACTER, DeviceRuleKey, READ, WRITE};
use ebpf_maps::drop::DROP_NAMES;
use ebpf_maps::services::Addr;
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::proto;
use gantry_cni::uplinks::Uplink;
use tokio::sync::{Mutex, watch};

use super::failures::FailureMap;
use super::flows::{FlowWatch, Flows};
use super::hooks::{self, DEVICE_HOOK, SERVICE_HOOKS};
use super::load::{self, Loaded, program_fd, take_map, unexpected};
use super::nodes::{Near, Nodes, node_rows};
use super::pods::PodPrograms;
use super::policies::Policies;
use super::repair::Repair;
use super::tables::Tables;
use super::trial::{BpfTrial, Trial, TrialPod};
use super::uplinks::UplinkPrograms;
use super::xdp::{XdpMode, XdpStanding};
use super::{
    BackendChange, Counts, Dataplane, DataplaneError, DeviceRule, PodInterface, PodPlaces,
    StuckService, bpffs, sys,
};
use crate::ids::PodUid;
use crate::network::masquerade::{self, Masquerade};
use crate::paths::Paths;
use crate::policy::StuckPod;
use crate::services::announce::{Announcements, Around, Watch};
use crate::services::arena::QUARANTINE;
use crate::services::changed::{Shared, changed};
use crate::services::ejection::{Ejections, Failures, Standing, Target, WATCHED_COUNT_MAX};
use crate::services::gone::lost;
use crate::services::host_port::{host_ports, is_host_ports};
use crate::services::index::{
    Backend, BackendSet, Surroundings, addr_of, index, ip_of, resolver_service, resolver_sets,
};
use crate::services::liveness::Seen;
use crate::services::plan::{Limits, Plan, Table};
use crate::services::shown::{Entry, Fill, show, show_left_out};
use crate::view::{ServiceName, Settings, View};

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
        let table = Table::adopt(tables.found()?, Limits::default(), release_at);
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
        let uplinks = UplinkPrograms::take(&mut ebpf, paths, options.xdp)?;
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

    /// Holds every process below `cgroup` (a cgroup v2 directory, `/gantry`) to the standard
    /// devices. Idempotent; survives the agent. For hosts without cgroup v1's device controller.
    pub fn attach_device_guard(&self, cgroup: &Path) -> Result<(), DataplaneError> {
        let program = self
            .device_guard
            .as_ref()
            .map_err(|reason| DataplaneError::Kernel {
                what: "device guard".into(),
                reason: reason.clone(),
            })?;
        hooks::attach(&self.paths, &DEVICE_HOOK, program.as_fd(), cgroup)
    }

    /// Lets a cgroup and all below it open any device: privileged pods. See [`cgroup_id`].
    pub fn exempt(&self, cgroup_id: u64) -> Result<(), DataplaneError> {
        let inserted = self.exempt_map().insert(cgroup_id, 1, 0);
        inserted.map_err(|error| unexpected("DEVICE_EXEMPT", error))
    }

    /// Takes an exemption back. Idempotent.
    pub fn remove_exemption(&self, cgroup_id: u64) -> Result<(), DataplaneError> {
        let mut exempt = self.exempt_map();
        if exempt.get(&cgroup_id, 0).is_err() {
            return Ok(());
        }
        exempt
            .remove(&cgroup_id)
            .map_err(|error| unexpected("DEVICE_EXEMPT", error))
    }

    fn exempt_map(&self) -> std::sync::MutexGuard<'_, HashMap<MapData, u64, u32>> {
        // A panic while holding it cannot leave a kernel map half-written.
        self.device_exempt
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn rules_map(&self) -> std::sync::MutexGuard<'_, HashMap<MapData, DeviceRuleKey, u32>> {
        // As above.
        self.device_rules
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes the devices of a cgroup exactly these.
    fn set_rules(&self, cgroup_id: u64, rules: &[DeviceRule]) -> Result<(), DataplaneError> {
        let key = |rule: &DeviceRule| DeviceRuleKey {
            cgroup_id,
            kind: if rule.is_block { BLOCK } else { CHARACTER },
            major: rule.major,
            minor: rule.minor,
            _pad: 0,
        };
        let mut map = self.rules_map();
        let failed = |error: MapError| unexpected("DEVICE_RULES", error);
        let wanted: BTreeMap<DeviceRuleKey, u32> = rules
            .iter()
            .map(|rule| {
                (
                    key(rule),
                    (u32::from(rule.read) * READ) | (u32::from(rule.write) * WRITE),
                )
            })
            .collect();
        let there: Vec<DeviceRuleKey> = map.keys().filter_map(Result::ok).collect();
        for old in there.iter().filter(|key| key.cgroup_id == cgroup_id) {
            if !wanted.contains_key(old) {
                map.remove(old).map_err(failed)?;
            }
        }
        for (key, access) in wanted {
            map.insert(key, access, 0).map_err(failed)?;
        }
        Ok(())
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

#[async_trait]
impl Dataplane for BpfDataplane {
    async fn services(
        &self,
        request: &proto::ServicesRequest,
    ) -> Result<Vec<proto::ProgrammedService>, DataplaneError> {
        let state = self.state.lock().await;
        let wanted = |name: &ServiceName| {
            (request.namespace.is_empty() || name.namespace == request.namespace)
                && (request.name.is_empty() || name.name == request.name)
        };
        let found = state.tables.found()?;
        let entries = found.frontends.into_iter().zip(found.backends);
        let entries = entries.map(|((key, value), slots)| Entry {
            service: state.table.owner(&key).cloned(),
            key,
            value,
            slots,
        });
        let all = request.namespace.is_empty() && request.name.is_empty();
        let entries = entries.filter(|entry| entry.service.as_ref().map_or(all, wanted));
        let stuck = state.stuck.iter().chain(&state.faults);
        let stuck = stuck.filter(|(name, _)| wanted(name));
        let stuck = stuck
            .map(|(name, why)| (name.clone(), why.clone()))
            .collect();
        let traffic = |id| state.tables.traffic_of(id).unwrap_or_default();
        let backends = |name: &ServiceName| state.last.as_ref()?.shared.backends(name);
        let mut shown = show(entries.collect(), traffic, backends, &stuck);
        for service in &mut shown {
            let name = ServiceName {
                namespace: service.namespace.clone(),
                name: service.name.clone(),
            };
            let sets = state.owners.values().any(|owners| owners.contains(&name));
            if sets && let Some(sets) = state.all_sets_of(&name) {
                show_left_out(
                    service,
                    &sets,
                    &state.ejections,
                    backends(&name),
                    self.now(),
                );
            }
        }
        Ok(shown)
    }

    fn fill(&self) -> Vec<Fill> {
        let fill = self.fill.lock();
        fill.unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    fn sockets_ended(&self) -> u64 {
        self.repair.ended()
    }

    fn counts(&self) -> Result<Counts, DataplaneError> {
        Ok(Counts {
            drops: self.drops()?,
            events: self.counters()?,
        })
    }

    fn watch_flows(&self) -> Result<FlowWatch, DataplaneError> {
        self.flows.watch()
    }

    fn pod_places(&self) -> PodPlaces {
        self.pods().places()
    }

    fn trial(&self) -> Result<Box<dyn Trial>, DataplaneError> {
        Ok(Box::new(BpfTrial::load(&self.paths)?))
    }

    fn trial_pod(&self, pod: &PodUid) -> Option<TrialPod> {
        self.pods().trial_pod(pod)
    }

    async fn look_at_failures(&self) -> Result<Vec<BackendChange>, DataplaneError> {
        let failures = self.failures().news()?;
        let mut guard = self.state.lock().await;
        let state = &mut *guard;
        if state.void || state.last.is_none() || failures.is_empty() && state.ejections.is_empty() {
            return Ok(Vec::new());
        }
        let (changes, wanted) = state.judge(&failures, self.now())?;
        let ejections = &state.ejections;
        self.failures().keep(|target| ejections.watches(target))?;
        for (total, now) in self.ejections.iter().zip(state.ejections.totals()) {
            total.store(now, Ordering::Relaxed);
        }
        let rev = state.last.as_ref().map_or(0, |last| last.rev);
        self.program(state, wanted, rev).await?;
        Ok(changes)
    }

    fn ejections(&self) -> [u64; 2] {
        [0, 1].map(|index: usize| self.ejections[index].load(Ordering::Relaxed))
    }

    fn apply_policies(&self, view: &View) -> Result<Vec<StuckPod>, DataplaneError> {
        self.policies().apply(view, self.now())
    }

    fn prepare_interface(&self, ifindex: u32) -> Result<(), DataplaneError> {
        self.pods().prepare(ifindex)
    }

    fn attach_pod(&self, pod: &PodInterface) -> Result<(), DataplaneError> {
        self.policies().attach(&pod.pod);
        self.pods().attach(pod)
    }

    fn xdp(&self) -> Vec<XdpStanding> {
        self.uplinks().xdp()
    }

    fn set_uplinks(&self, uplinks: &[Uplink]) -> Result<(), DataplaneError> {
        self.uplinks().set(uplinks)
    }

    fn watched_nodes(&self) -> watch::Receiver<Option<Watch>> {
        self.watch.subscribe()
    }

    async fn set_seen(&self, seen: &Seen) -> Result<(), DataplaneError> {
        let mut guard = self.state.lock().await;
        let state = &mut *guard;
        let is_back = |before: &Seen| !before.silent.is_subset(&seen.silent);
        let is_back = state.seen.as_ref().is_some_and(is_back);
        state.seen = Some(seen.clone());
        let Some(announced) = state.announced_again() else {
            return Ok(());
        };
        self.announce(state, &announced)?;
        if is_back {
            // The link was parted, and who was beyond has told its part that these are its own.
            self.uplinks().announce_again()?;
        }
        Ok(())
    }

    async fn set_near(&self, near: Option<&BTreeSet<IpAddr>>) -> Result<(), DataplaneError> {
        let near: Near = near.map(|all| all.iter().map(|it| addr_of(*it)).collect());
        let mut state = self.state.lock().await;
        if state.near.as_ref() == Some(&near) {
            return Ok(());
        }
        state.near = Some(near);
        match state.last.as_ref().map(|last| last.nodes.clone()) {
            Some(nodes) => state.apply_nodes(&nodes),
            None => Ok(()),
        }
    }

    fn detach_pod(&self, pod: &PodUid) -> Result<(), DataplaneError> {
        self.pods().detach(pod)?;
        self.policies().detach(pod)
    }

    fn retain_pods(&self, live: &HashSet<PodUid>) -> Result<(), DataplaneError> {
        let retained = self.pods().retain(live.iter());
        retained.and(self.policies().retain(live.iter()))
    }

    fn exempt_devices(&self, cgroup: &Path) -> Result<(), DataplaneError> {
        self.exempt(cgroup_id(cgroup).map_err(|error| {
            DataplaneError::kernel(format!("cgroup {}", cgroup.display()), &error)
        })?)
    }

    fn allow_devices(&self, cgroup: &Path, rules: &[DeviceRule]) -> Result<(), DataplaneError> {
        let id = cgroup_id(cgroup).map_err(|error| {
            DataplaneError::kernel(format!("cgroup {}", cgroup.display()), &error)
        })?;
        self.set_rules(id, rules)
    }

    fn end_device_exemption(&self, cgroup: &Path) -> Result<(), DataplaneError> {
        match cgroup_id(cgroup) {
            Ok(id) => {
                self.set_rules(id, &[])?;
                self.remove_exemption(id)
            }
            // A cgroup that is gone has no processes to exempt.
            Err(_) => Ok(()),
        }
    }

    async fn apply(&self, view: &View) -> Result<Vec<StuckService>, DataplaneError> {
        let mut guard = self.state.lock().await;
        let state = &mut *guard;
        if view.rev == 0 {
            // Static pods on a node that has no control plane yet. After a restart the kernel knows better.
            if !self.uplinks().is_masquerading()? {
                self.masquerade(view)?;
            }
            return Ok(Vec::new());
        }
        if state.void {
            state.adopt_again(self.now())?;
        }
        state.apply_settings(&view.settings, &self.options);
        state.apply_zone(view);
        let wanted = state.changes(view, &self.options);
        let lost = state.last.as_ref().map(|last| {
            let names = wanted.keys().cloned().collect();
            lost(&last.shared, view, &names)
        });
        let counted = |sets: &Vec<BackendSet>| sets.iter().any(|set| set.least_connections);
        state.has_counted |= wanted.values().any(counted);
        let announced = state.announced(view, &wanted);
        self.program(state, wanted, view.rev).await?;
        self.announce(state, &announced)?;
        let is_same = |last: &Last| {
            Arc::ptr_eq(&last.settings, &view.settings) && Arc::ptr_eq(&last.nodes, &view.nodes)
        };
        if !state.last.as_ref().is_some_and(is_same) {
            self.masquerade(view)?;
        }
        let is_same = |last: &Last| Arc::ptr_eq(&last.nodes, &view.nodes);
        if !state.last.as_ref().is_some_and(is_same) {
            state.apply_nodes(&view.nodes)?;
        }
        state.whole = false;
        state.last = Some(Last {
            shared: Shared::of(view),
            rev: view.rev,
            nodes: view.nodes.clone(),
            settings: view.settings.clone(),
            pods: view.pods.clone(),
        });
        take_over(&self.paths, &mut state.upgrade)?;
        *self
            .fill
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = state.table.fill();
        if state.has_counted {
            let ids = state.table.counted();
            state.has_counted = !ids.is_empty();
            self.repair.count(ids, view);
        }
        match lost {
            Some(lost) if !self.repair.has_missed() => self.repair.end(lost, view),
            _ => self.repair.look(view, state.table.places().collect()),
        }
        Ok(state.report())
    }
}

impl State {
    /// What has failed, judged: what changed, and the Services to be planned again because of it.
    fn judge(
        &mut self,
        failures: &BTreeMap<Target, Failures>,
        now: Duration,
    ) -> Result<(Vec<BackendChange>, Wanted), DataplaneError> {
        let targets: BTreeSet<Target> =
            failures.keys().chain(self.owners.keys()).copied().collect();
        let ids = self.table.at(&targets);
        for (target, ids) in &ids {
            if !self.owners.contains_key(target) && self.owners.len() < WATCHED_COUNT_MAX {
                let owners = self.table.owners_of(ids);
                self.owners.insert(*target, owners);
            }
        }
        let there = self.targets_of_owners();
        let mut chosen: BTreeMap<Target, u64> = BTreeMap::new();
        for target in self.owners.keys().filter(|target| there.contains(target)) {
            let mut sum = 0_u64;
            for id in ids.get(target).into_iter().flatten() {
                sum += self.tables.traffic_of(*id)?.chosen;
            }
            chosen.insert(*target, sum);
        }
        let changes = (self.ejections).look(failures, |target| chosen.get(target).copied(), now);
        let mut names: BTreeSet<ServiceName> = BTreeSet::new();
        let mut told = Vec::new();
        for change in changes {
            let owners = self.owners.get(&change.target).cloned().unwrap_or_default();
            let address = SocketAddr::new(
                ip_of(&change.target.addr),
                u16::from_be(change.target.port_be),
            );
            told.extend(owners.first().map(|service| BackendChange {
                service: service.clone(),
                address,
                was: change.was,
                standing: change.standing,
                times: change.times,
            }));
            names.extend(owners);
        }
        let ejections = &self.ejections;
        self.owners.retain(|target, _| ejections.watches(target));
        let wanted = names.into_iter().filter_map(|name| {
            let sets = self.sets_of(&name)?;
            Some((name, sets))
        });
        Ok((told, wanted.collect()))
    }

    /// Every backend that the Services have of which one is watched.
    fn targets_of_owners(&self) -> BTreeSet<Target> {
        let owners: BTreeSet<&ServiceName> = self.owners.values().flatten().collect();
        let sets = owners.into_iter().filter_map(|name| self.all_sets_of(name));
        let backends = sets.flatten().flat_map(|set| set.backends);
        backends
            .filter_map(|backend| Target::of(&backend))
            .collect()
    }

    /// As the last view has it, whatever answers; none: it is no Service any more.
    fn all_sets_of(&self, name: &ServiceName) -> Option<Vec<BackendSet>> {
        let shared = &self.last.as_ref()?.shared;
        let service = shared.service(name)?;
        Some(index(service, shared.backends(name), &self.surroundings).sets)
    }

    /// The same without those that do not answer.
    fn sets_of(&self, name: &ServiceName) -> Option<Vec<BackendSet>> {
        let mut sets = self.all_sets_of(name)?;
        self.leave_out(&mut sets);
        Some(sets)
    }

    fn leave_out(&self, sets: &mut [BackendSet]) {
        if self.ejections.is_idle() {
            return;
        }
        for set in sets {
            let standings = self.ejections.standings(&set.backends);
            let all = std::mem::take(&mut set.backends).into_iter().zip(standings);
            let kept = all.filter(|(_, standing)| *standing != Standing::Out);
            set.backends = kept
                .map(|(backend, standing)| Backend {
                    on_trial: standing == Standing::OnTrial,
                    ..backend
                })
                .collect();
        }
    }

    /// Makes the picture of the maps anew, from the maps.
    fn adopt_again(&mut self, now: Duration) -> Result<(), DataplaneError> {
        self.table = Table::adopt(self.tables.found()?, Limits::default(), now + QUARANTINE);
        self.node_addresses = self.tables.node_addresses()?;
        self.last = None;
        self.whole = true;
        self.void = false;
        Ok(())
    }

    /// The frontends that the node's resolver takes from every Service.
    fn apply_settings(&mut self, settings: &Settings, options: &Options) {
        let reserved = resolver(settings, options);
        let reserved: BTreeSet<_> = reserved
            .iter()
            .flat_map(|set| set.frontends.iter().copied())
            .collect();
        if reserved != self.surroundings.reserved {
            self.surroundings.reserved = reserved;
            self.whole = true;
        }
    }

    /// Which zone this node is in: which backends are close.
    fn apply_zone(&mut self, view: &View) {
        let own = view.nodes.get(&self.surroundings.node);
        let zone = own.map(|node| node.zone.as_str()).unwrap_or_default();
        if zone != self.surroundings.zone {
            self.surroundings.zone = zone.to_owned();
            self.whole = true;
        }
    }

    /// What is to be planned: the Services that differ from the last view, and those that were
    /// stuck. No set: the Service is gone.
    fn changes(&mut self, view: &View, options: &Options) -> Wanted {
        let mut wanted = Wanted::new();
        let settings = self
            .last
            .as_ref()
            .is_none_or(|last| !Arc::ptr_eq(&last.settings, &view.settings));
        if self.whole || settings || self.stuck.contains_key(&resolver_service()) {
            wanted.insert(resolver_service(), resolver(&view.settings, options));
        }
        let nothing = Shared::default();
        let last = self.last.as_ref().map_or(&nothing, |last| &last.shared);
        let mut names = changed(last, view);
        if self.whole {
            names.extend(view.services.keys().cloned());
        }
        names.extend(self.stuck.keys().chain(self.faults.keys()).cloned());
        names.remove(&resolver_service());
        names.retain(|name| !is_host_ports(name));
        for name in names {
            let Some(service) = view.services.get(&name) else {
                self.faults.remove(&name);
                wanted.insert(name, Vec::new());
                continue;
            };
            let backends = view.backends.get(&name);
            let mut indexed = index(service, backends.map(Arc::as_ref), &self.surroundings);
            self.leave_out(&mut indexed.sets);
            match indexed.faults.is_empty() {
                true => self.faults.remove(&name),
                false => self.faults.insert(name.clone(), indexed.faults.join("; ")),
            };
            wanted.insert(name, indexed.sets);
        }
        self.host_port_changes(view, &mut wanted);
        wanted
    }

    /// Of the pods' host ports those that differ, and those that were stuck.
    fn host_port_changes(&mut self, view: &View, wanted: &mut Wanted) {
        let is_same = |last: &Last| {
            Arc::ptr_eq(&last.pods, &view.pods) && Arc::ptr_eq(&last.nodes, &view.nodes)
        };
        let is_stuck = self.stuck.keys().any(is_host_ports);
        if !self.whole && !is_stuck && self.last.as_ref().is_some_and(is_same) {
            return;
        }
        let new = host_ports(view, &self.surroundings.node);
        let gone = self
            .host_ports
            .keys()
            .filter(|name| !new.contains_key(*name));
        wanted.extend(gone.map(|name| (name.clone(), Vec::new())));
        let (whole, stuck, old) = (self.whole, &self.stuck, &self.host_ports);
        let changed = new.iter().filter(|(name, sets)| {
            whole || stuck.contains_key(name) || old.get(*name) != Some(*sets)
        });
        wanted.extend(changed.map(|(name, sets)| (name.clone(), sets.clone())));
        self.host_ports = new;
    }

    /// The load balancer addresses that this node answers for.
    fn announced(&mut self, view: &View, changed: &Wanted) -> BTreeSet<Addr> {
        let last = self.last.as_ref();
        let same_nodes = last.is_some_and(|last| Arc::ptr_eq(&last.nodes, &view.nodes));
        let nothing = Seen::default();
        let around = Around {
            nodes: &view.nodes,
            own: &self.surroundings.node,
            seen: self.seen.as_ref().unwrap_or(&nothing),
        };
        let services = Shared::of(view);
        if same_nodes {
            self.announcements
                .update(changed.keys(), &services, &around);
        } else {
            let names = view.services.keys().chain(changed.keys());
            self.announcements.update(names, &services, &around);
        }
        self.announcements.addresses()
    }

    /// The same for the last view, after something else was seen; none: there is none yet.
    fn announced_again(&mut self) -> Option<BTreeSet<Addr>> {
        let (last, seen) = (self.last.as_ref()?, self.seen.as_ref()?);
        let around = Around {
            nodes: &last.nodes,
            own: &self.surroundings.node,
            seen,
        };
        let names = last.shared.names();
        self.announcements.update(names, &last.shared, &around);
        Some(self.announcements.addresses())
    }

    fn apply_nodes(&mut self, nodes: &Nodes) -> Result<(), DataplaneError> {
        let wanted = node_rows(
            nodes,
            &self.surroundings.node,
            self.near.as_ref(),
            &self.node_addresses,
        );
        for addr in self.node_addresses.keys() {
            if !wanted.contains_key(addr) {
                self.tables.set_node_address(addr, None)?;
            }
        }
        for (addr, owner) in &wanted {
            if self.node_addresses.get(addr) != Some(owner) {
                self.tables.set_node_address(addr, Some(*owner))?;
            }
        }
        self.node_addresses = wanted;
        Ok(())
    }

    fn report(&self) -> Vec<StuckService> {
        let stuck = self.stuck.iter().chain(&self.faults);
        stuck
            .map(|(name, reason)| StuckService {
                service: format!("{}/{}", name.namespace, name.name),
                reason: reason.clone(),
            })
            .collect()
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

/// What the cluster's DNS address means on this node.
fn resolver(settings: &Settings, options: &Options) -> Vec<BackendSet> {
    match (settings.dns_service_ip, options.resolver) {
        (Some(cluster), Some(own)) => resolver_sets(cluster, own, &options.node),
        _ => Vec::new(),
    }
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
