//! Who may use the restricted frontends of a set: added before a frontend asks for them, removed
//! after the last one that did.

use std::collections::{BTreeMap, BTreeSet};

use super::{Plan, Step, Table};
use crate::services::index::{BackendSet, SetName, SourceRange};
use crate::view::ServiceName;

/// The source ranges of one set.
#[derive(Debug, Default)]
pub(super) struct SourceRanges {
    /// None: found in the map, and nobody has asked for them since.
    pub(super) owner: Option<(ServiceName, SetName)>,
    pub(super) ranges: BTreeSet<SourceRange>,
}

impl Table {
    /// Adds what is missing of a set's source ranges. False: they do not fit.
    pub(super) fn add_source_ranges(
        &mut self,
        name: &ServiceName,
        set: &BackendSet,
        service_id: u32,
        plan: &mut Plan,
    ) -> bool {
        if set.source_ranges.is_empty() {
            return true;
        }
        let count: usize = self
            .source_ranges
            .values()
            .map(|own| own.ranges.len())
            .sum();
        let own = self.source_ranges.entry(service_id).or_default();
        own.owner = Some((name.clone(), set.name.clone()));
        let wanted = set.source_ranges.iter();
        let new: Vec<SourceRange> = wanted
            .filter(|range| !own.ranges.contains(range))
            .copied()
            .collect();
        let limit = self.limits.source_range_count;
        if count + new.len() > limit as usize {
            let reason = format!("SOURCE_RANGES is full ({limit} entries)");
            plan.stuck.insert(name.clone(), reason);
            return false;
        }
        own.ranges.extend(&new);
        let steps = new
            .into_iter()
            .map(|range| Step::AddSourceRange { service_id, range });
        plan.steps.extend(steps);
        true
    }

    /// Removes the source ranges that no set of the changed Services asks for any more.
    pub(super) fn remove_source_ranges(
        &mut self,
        wanted: &BTreeMap<ServiceName, Vec<BackendSet>>,
        plan: &mut Plan,
    ) {
        for (service_id, own) in &mut self.source_ranges {
            let asked: &[SourceRange] = match &own.owner {
                None => &[],
                Some((service, set_name)) => match wanted.get(service) {
                    None => continue,
                    Some(sets) => {
                        let set = sets.iter().find(|set| set.name == *set_name);
                        set.map_or(&[], |set| &set.source_ranges)
                    }
                },
            };
            let gone: Vec<SourceRange> = own
                .ranges
                .iter()
                .filter(|range| !asked.contains(range))
                .copied()
                .collect();
            for range in gone {
                own.ranges.remove(&range);
                let service_id = *service_id;
                plan.steps
                    .push(Step::RemoveSourceRange { service_id, range });
            }
        }
        self.source_ranges.retain(|_, own| !own.ranges.is_empty());
    }
}
