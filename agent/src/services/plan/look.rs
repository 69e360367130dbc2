//! What the picture of the maps says, for others.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ebpf_maps::services::{FRONTEND_LEAST_CONNECTIONS, FrontendKey, FrontendValue};

use super::{BackendId, Limits, Range, Table};
use crate::services::ejection::Target;
use crate::services::index::ip_of;
use crate::services::shown::Fill;
use crate::view::ServiceName;

impl Table {
    /// Frontends programmed now.
    pub fn frontend_count(&self) -> usize {
        self.frontends.len()
    }

    /// Backends that some frontend refers to now.
    pub fn backend_count(&self) -> usize {
        self.backends.len()
    }

    /// Where the backends are that some frontend refers to: of Services, of host ports, the node's own.
    pub fn places(&self) -> impl Iterator<Item = (IpAddr, u16)> {
        let backends = self.backends.values().map(|known| known.backend);
        backends.map(|backend| (ip_of(&backend.addr), u16::from_be(backend.port_be)))
    }

    /// How full the maps are. What is in quarantine counts as free: after a restart that is all that
    /// is not in use, and an apply that needs it waits for it.
    pub fn fill(&self) -> Vec<Fill> {
        let of = |map, used: u32, limit: u32| Fill { map, used, limit };
        let Limits {
            frontend_count,
            slot_count,
            backend_count,
            source_range_count,
        } = self.limits;
        let ranges = self.source_ranges.values().map(|own| own.ranges.len());
        let ranges = u32::try_from(ranges.sum::<usize>()).unwrap_or(u32::MAX);
        let frontends = u32::try_from(self.frontends.len()).unwrap_or(u32::MAX);
        let slots = slot_count.saturating_sub(self.slots.unused_count());
        let backends = backend_count.saturating_sub(self.ids.unused_count());
        vec![
            of("FRONTENDS", frontends, frontend_count),
            of("SLOTS", slots, slot_count),
            of("BACKENDS", backends, backend_count),
            of("SOURCE_RANGES", ranges, source_range_count),
        ]
    }

    /// Who owns a frontend.
    pub fn owner(&self, key: &FrontendKey) -> Option<&ServiceName> {
        self.claims.get(key).map(Arc::as_ref)
    }

    /// Backends of frontends whose connections are counted.
    pub fn counted(&self) -> BTreeSet<u32> {
        let counted = |value: &&FrontendValue| value.flags & FRONTEND_LEAST_CONNECTIONS != 0;
        let values = self.frontends.values().filter(counted);
        let ranges = values.filter_map(|value| self.ranges.get(&value.base));
        ranges
            .flat_map(|range| range.ids.iter().map(|id| id.0))
            .collect()
    }

    /// The ids of the backends that listen there, and whose they are.
    ///
    /// A look at every backend: for those few that do not answer.
    pub fn at(&self, targets: &BTreeSet<Target>) -> BTreeMap<Target, Vec<BackendId>> {
        let mut found: BTreeMap<Target, Vec<BackendId>> = BTreeMap::new();
        for (id, known) in &self.backends {
            if let Some(target) = Target::of(&known.backend)
                && targets.contains(&target)
            {
                found.entry(target).or_default().push(*id);
            }
        }
        found
    }

    /// The Services whose ranges hold one of these ids.
    pub fn owners_of(&self, ids: &[BackendId]) -> BTreeSet<ServiceName> {
        let holds = |range: &&Range| range.ids.iter().any(|id| ids.contains(id));
        let held: HashSet<u32> = self
            .ranges
            .values()
            .filter(holds)
            .map(|r| r.service_id)
            .collect();
        let services = self.services.iter();
        let owners = services.filter(|(_, own)| own.ids.iter().any(|(_, id)| held.contains(id)));
        owners.map(|(name, _)| name.as_ref().clone()).collect()
    }
}
