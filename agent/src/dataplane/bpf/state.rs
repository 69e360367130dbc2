//! From a view to what is to be planned, and what is known beside the maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ebpf_maps::services::Addr;
use gantry_api::proto;

use super::{Last, Options, State, Wanted};
use crate::dataplane::nodes::{Nodes, node_rows};
use crate::dataplane::{BackendChange, DataplaneError, StuckService};
use crate::services::announce::Around;
use crate::services::arena::QUARANTINE;
use crate::services::changed::{Shared, changed, every};
use crate::services::ejection::{Failures, Standing, Target, WATCHED_COUNT_MAX};
use crate::services::host_port::{host_ports, is_host_ports};
use crate::services::index::{Backend, BackendSet, index, ip_of, resolver_service, resolver_sets};
use crate::services::liveness::Seen;
use crate::services::plan::{Limits, Table};
use crate::view::{Backends, ServiceName, Settings, View};

impl State {
    /// What has failed, judged: what changed, and the Services to be planned again because of it.
    pub(super) fn judge(
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
    pub(super) fn targets_of_owners(&self) -> BTreeSet<Target> {
        let owners: BTreeSet<&ServiceName> = self.owners.values().flatten().collect();
        let sets = owners.into_iter().filter_map(|name| self.all_sets_of(name));
        let backends = sets.flatten().flat_map(|set| set.backends);
        backends
            .filter_map(|backend| Target::of(&backend))
            .collect()
    }

    /// As the last view has it, whatever answers; none: it is no Service any more.
    pub(super) fn all_sets_of(&self, name: &ServiceName) -> Option<Vec<BackendSet>> {
        let shared = &self.last.as_ref()?.shared;
        let service = shared.service(name)?;
        Some(index(service, shared.backends(name), &self.surroundings).sets)
    }

    /// The same without those that do not answer.
    pub(super) fn sets_of(&self, name: &ServiceName) -> Option<Vec<BackendSet>> {
        let mut sets = self.all_sets_of(name)?;
        self.leave_out(&mut sets);
        Some(sets)
    }

    pub(super) fn leave_out(&self, sets: &mut [BackendSet]) {
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
    pub(super) fn adopt_again(&mut self, now: Duration) -> Result<(), DataplaneError> {
        self.table = Table::adopt(self.tables.to_adopt()?, Limits::default(), now + QUARANTINE);
        self.node_addresses = self.tables.node_addresses()?;
        self.last = None;
        self.whole = true;
        self.void = false;
        Ok(())
    }

    /// The frontends that the node's resolver takes from every Service.
    pub(super) fn apply_settings(&mut self, settings: &Settings, options: &Options) {
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
    pub(super) fn apply_zone(&mut self, view: &View) {
        let own = view.nodes.get(&self.surroundings.node);
        let zone = own.map(|node| node.zone.as_str()).unwrap_or_default();
        if zone != self.surroundings.zone {
            self.surroundings.zone = zone.to_owned();
            self.whole = true;
        }
    }

    /// What is to be planned: the Services that differ from the last view, and those that were
    /// stuck. No set: the Service is gone.
    pub(super) fn changes(&mut self, view: &View, options: &Options) -> Wanted {
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
        let mut names = match self.whole {
            // Those of the view are looked at all the same.
            true => {
                let old = last.services().map(|(name, _)| name);
                let gone = old.filter(|name| !view.services.contains_key(*name));
                gone.cloned().collect()
            }
            false => changed(last, view),
        };
        names.extend(self.stuck.keys().chain(self.faults.keys()).cloned());
        names.remove(&resolver_service());
        names.retain(|name| !is_host_ports(name));
        if self.whole {
            names.retain(|name| !view.services.contains_key(name));
            let resolver = resolver_service();
            let all = every(view).filter(|(name, ..)| **name != resolver && !is_host_ports(name));
            let all = all.map(|(name, service, backends)| {
                let sets = self.indexed(name, service, backends);
                (name.clone(), sets)
            });
            // Collected in order it is built without a search for the place of each.
            let mut all: Wanted = all.collect();
            all.append(&mut wanted);
            wanted = all;
        }
        for name in names {
            let Some(service) = view.services.get(&name) else {
                self.faults.remove(&name);
                wanted.insert(name, Vec::new());
                continue;
            };
            let backends = view.backends.get(&name).map(Arc::as_ref);
            let sets = self.indexed(&name, service, backends);
            wanted.insert(name, sets);
        }
        self.host_port_changes(view, &mut wanted);
        wanted
    }

    /// What a Service wants now; what of it makes no sense is noted.
    pub(super) fn indexed(
        &mut self,
        name: &ServiceName,
        service: &proto::Service,
        backends: Option<&Backends>,
    ) -> Vec<BackendSet> {
        let mut indexed = index(service, backends, &self.surroundings);
        self.leave_out(&mut indexed.sets);
        match indexed.faults.is_empty() {
            true => self.faults.remove(name),
            false => (self.faults).insert(name.clone(), indexed.faults.join("; ")),
        };
        indexed.sets
    }

    /// Of the pods' host ports those that differ, and those that were stuck.
    pub(super) fn host_port_changes(&mut self, view: &View, wanted: &mut Wanted) {
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
    pub(super) fn announced(&mut self, view: &View, changed: &Wanted) -> BTreeSet<Addr> {
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
            self.announcements.update_all(&services, &around);
        }
        self.announcements.addresses()
    }

    /// The same for the last view, after something else was seen; none: there is none yet.
    pub(super) fn announced_again(&mut self) -> Option<BTreeSet<Addr>> {
        let (last, seen) = (self.last.as_ref()?, self.seen.as_ref()?);
        let around = Around {
            nodes: &last.nodes,
            own: &self.surroundings.node,
            seen,
        };
        self.announcements.update_all(&last.shared, &around);
        Some(self.announcements.addresses())
    }

    pub(super) fn apply_nodes(&mut self, nodes: &Nodes) -> Result<(), DataplaneError> {
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

    pub(super) fn report(&self) -> Vec<StuckService> {
        let stuck = self.stuck.iter().chain(&self.faults);
        stuck
            .map(|(name, reason)| StuckService {
                service: format!("{}/{}", name.namespace, name.name),
                reason: reason.clone(),
            })
            .collect()
    }
}

/// What the cluster's DNS address means on this node.
fn resolver(settings: &Settings, options: &Options) -> Vec<BackendSet> {
    match (settings.dns_service_ip, options.resolver) {
        (Some(cluster), Some(own)) => resolver_sets(cluster, own, &options.node),
        _ => Vec::new(),
    }
}
