//! Which Service a frontend belongs to, and the ids of its sets.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ebpf_maps::services::FrontendKey;

use super::{Plan, Table, describe};
use crate::services::index::BackendSet;
use crate::view::ServiceName;

impl Table {
    /// Makes room for the first plan of a node at once, for growing step by step moves everything
    /// many times. Later ones are small, or repeat what is there.
    pub(super) fn reserve(&mut self, wanted: &BTreeMap<ServiceName, Vec<BackendSet>>) {
        if !self.frontends.is_empty() {
            return;
        }
        let sets = || wanted.values().flatten();
        let most = self.limits.frontend_count as usize;
        let frontends = sets().map(|set| set.frontends.len()).sum::<usize>();
        let backends = sets().map(|set| set.backends.len()).sum::<usize>();
        self.frontends.reserve(frontends.min(most));
        self.claims.reserve(frontends.min(most));
        self.services.reserve(wanted.len().min(most));
        self.service_ids_in_use.reserve(sets().count().min(most));
        self.ranges.reserve(sets().count().min(most));
        let most = self.limits.backend_count as usize;
        self.backends.reserve(backends.min(most));
    }

    /// Gives up the frontends and names that a Service does not want any more.
    pub(super) fn let_go(&mut self, name: &ServiceName, sets: &[BackendSet]) {
        let Some(own) = self.services.get_mut(name) else {
            return;
        };
        let wanted: BTreeSet<_> = sets.iter().flat_map(|set| set.frontends.iter()).collect();
        own.keys.retain(|key| {
            let keep = wanted.contains(key);
            if !keep {
                self.claims.remove(key);
                self.unclaimed.insert(*key);
            }
            keep
        });
        if sets.is_empty() {
            for (_, id) in &own.ids {
                self.service_ids_in_use.remove(id);
            }
            self.services.remove(name);
        }
    }

    pub(super) fn claim(&mut self, name: &ServiceName, sets: &[BackendSet], plan: &mut Plan) {
        if sets.is_empty() {
            return;
        }
        let known = self.services.get_key_value(name);
        let known = known.map(|(known, _)| known.clone());
        let claimant = known.unwrap_or_else(|| Arc::new(name.clone()));
        let mut keys = Vec::new();
        for key in sets.iter().flat_map(|set| &set.frontends) {
            match self.claims.entry(*key) {
                Entry::Occupied(claim) if *claim.get() == claimant => {}
                Entry::Occupied(claim) => {
                    let ServiceName {
                        namespace,
                        name: other,
                    } = claim.get().as_ref();
                    let reason = format!("{} belongs to {namespace}/{other}", describe(key));
                    plan.stuck.insert(name.clone(), reason);
                }
                Entry::Vacant(claim) => {
                    claim.insert(claimant.clone());
                    self.unclaimed.remove(key);
                    keys.push(*key);
                }
            }
        }
        if !keys.is_empty() {
            let own = self.services.entry(claimant).or_default();
            match own.keys.is_empty() {
                true => own.keys = keys,
                false => own.keys.append(&mut keys),
            }
        }
    }

    /// The id of a set: the one it has, else the one its frontends were found with, else a new one.
    pub(super) fn service_id(
        &mut self,
        name: &ServiceName,
        set: &BackendSet,
        keys: &[FrontendKey],
    ) -> u32 {
        let own = self.services.get(name);
        let known = own.and_then(|own| own.ids.iter().find(|(known, _)| *known == set.name));
        if let Some((_, id)) = known {
            return *id;
        }
        let found = keys
            .iter()
            .filter_map(|key| self.frontends.get(key))
            .map(|value| value.service_id)
            .find(|id| *id != 0 && !self.service_ids_in_use.contains(id));
        let id = found.unwrap_or_else(|| {
            let id = self.next_service_id;
            self.next_service_id = id.wrapping_add(1).max(1);
            id
        });
        // Who has a frontend to plan is there since its claim.
        if let Some(own) = self.services.get_mut(name) {
            own.ids.push((set.name.clone(), id));
            self.service_ids_in_use.insert(id);
        }
        id
    }
}
