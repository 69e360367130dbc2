//! What the agent asks of the data plane.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use gantry_api::proto;
use gantry_cni::uplinks::Uplink;
use tokio::sync::watch;

use super::{BpfDataplane, Last, cgroup_id, take_over};
use crate::dataplane::flows::FlowWatch;
use crate::dataplane::nodes::Near;
use crate::dataplane::trial::{BpfTrial, Trial, TrialPod};
use crate::dataplane::xdp::XdpStanding;
use crate::dataplane::{
    BackendChange, Counts, Dataplane, DataplaneError, DeviceRule, PodInterface, PodPlaces,
    StuckService,
};
use crate::ids::PodUid;
use crate::policy::StuckPod;
use crate::services::announce::Watch;
use crate::services::changed::Shared;
use crate::services::gone::lost;
use crate::services::index::{BackendSet, addr_of};
use crate::services::liveness::Seen;
use crate::services::shown::{Entry, Fill, show, show_left_out};
use crate::view::{ServiceName, View};

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
        let last = state.last.as_ref();
        let lost = last.map(|last| lost(&last.shared, view, wanted.keys()));
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
