//! The picture of the maps, made from the maps: what an earlier agent programmed goes on unchanged.
//!
//! Nothing found is trusted beyond what can be checked: a frontend whose range lies outside the
//! arena, overlaps another one or holds backends of another Service is written anew by the next
//! plan, and its range is treated as free.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use ebpf_maps::services::{
    BACKEND_IN_USE, BACKEND_ON_TRIAL, BackendValue, FRONTEND_TABLE, FrontendKey, FrontendValue,
};

use super::{BackendId, ByNumber, Known, Limits, Range, SourceRanges, Table, backend_of};
use crate::services::arena::Arena;
use crate::services::index::SourceRange;

/// What the maps hold, as found when the agent starts.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// All of FRONTENDS, any order.
    pub frontends: Vec<(FrontendKey, FrontendValue)>,
    /// For each frontend in the same order: the ids in its slots and the backends behind them;
    /// none if an index was out of range.
    pub backends: Vec<Option<Vec<(BackendId, BackendValue)>>>,
    /// All of SOURCE_RANGES, any order: service id and range.
    pub source_ranges: Vec<(u32, SourceRange)>,
    /// Ids of all backends of BACKENDS that are in use or on trial by their state.
    pub in_use: Vec<BackendId>,
}

impl Table {
    /// Adopts what an earlier agent left in the maps; an empty `found` is a fresh start.
    ///
    /// * `release_at` – when places that no frontend refers to may be used: that agent may have
    ///   let go of them a moment ago. Zero with new maps.
    pub fn adopt(found: Found, limits: Limits, release_at: Duration) -> Self {
        let mut frontends = HashMap::new();
        let mut ranges: ByNumber<u32, Range> = ByNumber::default();
        let mut backends: ByNumber<BackendId, Known> = ByNumber::default();
        let mut used_slots = BTreeMap::new();
        let mut used_ids = BTreeMap::new();
        let mut next_service_id = 1;
        for ((key, value), slots) in found.frontends.into_iter().zip(found.backends) {
            next_service_id = next_service_id.max(value.service_id.saturating_add(1));
            if let Some(range) = ranges.get_mut(&value.base)
                && value.count as usize == range.ids.len()
                && value.service_id == range.service_id
                && is_table(&value) == range.is_table
            {
                range.frontend_count += 1;
                frontends.insert(key, value);
                continue;
            }
            let sound = value.check == key.check() && !overlaps(&used_slots, &value);
            let slots = slots.filter(|slots| {
                let whole = slots.len() == value.count as usize;
                sound
                    && whole
                    && slots
                        .iter()
                        .all(|(id, backend)| belongs(*id, backend, &value))
            });
            let Some(slots) = slots else {
                // Not ours or torn by a crash of the machine: any write over it is an improvement.
                frontends.insert(
                    key,
                    FrontendValue {
                        check: !key.check(),
                        base: 0,
                        count: 0,
                        ..value
                    },
                );
                continue;
            };
            frontends.insert(key, value);
            if slots.is_empty() {
                continue;
            }
            used_slots.insert(value.base, value.count);
            for (id, found) in &slots {
                used_ids.insert(id.0, 1);
                backends
                    .entry(*id)
                    .or_insert(Known {
                        backend: backend_of(found),
                        slot_count: 0,
                    })
                    .slot_count += 1;
            }
            let ids = slots.into_iter().map(|(id, _)| id).collect();
            let range = Range {
                ids,
                is_table: is_table(&value),
                service_id: value.service_id,
                frontend_count: 1,
            };
            ranges.insert(value.base, range);
        }
        // That agent died between the switch that left them and their retirement: an affinity would go on
        // leading to them.
        let (ids, limit) = (found.in_use.into_iter(), limits.backend_count);
        let unretired: BTreeSet<BackendId> = ids
            .filter(|id| (1..limit).contains(&id.0) && !backends.contains_key(id))
            .collect();
        used_ids.extend(unretired.iter().map(|id| (id.0, 1)));
        let mut source_ranges: BTreeMap<u32, SourceRanges> = BTreeMap::new();
        for (service_id, range) in found.source_ranges {
            // An id that only a range has is not to be given to anyone before the range is gone.
            next_service_id = next_service_id.max(service_id.saturating_add(1));
            source_ranges
                .entry(service_id)
                .or_default()
                .ranges
                .insert(range);
        }
        Self {
            limits,
            unclaimed: frontends.keys().copied().collect(),
            frontends,
            ranges,
            backends,
            slots: Arena::new(0, limits.slot_count, &used_slots, release_at),
            ids: Arena::new(1, limits.backend_count, &used_ids, release_at),
            left_ranges: Vec::new(),
            left_ids: Vec::new(),
            unretired,
            claims: HashMap::new(),
            services: HashMap::new(),
            service_ids_in_use: HashSet::default(),
            next_service_id,
            source_ranges,
        }
    }
}

fn is_table(value: &FrontendValue) -> bool {
    value.flags & FRONTEND_TABLE != 0
}

/// Whether a value's range meets one that is taken.
fn overlaps(used: &BTreeMap<u32, u32>, value: &FrontendValue) -> bool {
    let end = value.base.saturating_add(value.count);
    value.count > 0
        && used
            .range(..end)
            .next_back()
            .is_some_and(|(base, len)| base.saturating_add(*len) > value.base)
}

fn belongs(id: BackendId, backend: &BackendValue, value: &FrontendValue) -> bool {
    id.0 != 0
        && backend.service_id == value.service_id
        && matches!(backend.state, BACKEND_IN_USE | BACKEND_ON_TRIAL)
}
