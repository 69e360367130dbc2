//! Tells the node's owner of a map of Services that is nearly full, before anything does not fit.

use std::collections::BTreeSet;

use gantry_api::k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use jiff::Timestamp;

use super::Dataplane;
use crate::feed::Reporter;
use crate::services::shown::{Fill, warning};

/// What has been told.
pub struct FullMaps {
    node: String,
    told: BTreeSet<&'static str>,
}

impl FullMaps {
    /// Of the node with this name.
    pub fn new(node: String) -> Self {
        Self {
            node,
            told: BTreeSet::new(),
        }
    }

    /// Looks after an apply: an event for each map that has become nearly full, and the node's
    /// condition goes up at once when it changes.
    pub fn look(&mut self, dataplane: &dyn Dataplane, reporter: &Reporter) {
        let (changed, words) = self.compare(&dataplane.fill());
        if changed {
            reporter.beat();
        }
        if let Some(words) = words {
            tracing::warn!("{words}");
            reporter.event(self.event(words));
        }
    }

    /// Whether the condition is another one, and what is new and to be told.
    fn compare(&mut self, fills: &[Fill]) -> (bool, Option<String>) {
        let full = fills.iter().filter(|fill| fill.is_nearly_full());
        let full: BTreeSet<&'static str> = full.map(|fill| fill.map).collect();
        let changed = full != self.told;
        let more = !full.is_subset(&self.told);
        self.told = full;
        let words = || {
            format!(
                "{}: Services will soon not fit on this node",
                warning(fills)
            )
        };
        (changed, more.then(words))
    }

    fn event(&self, message: String) -> Event {
        let stamp = Time(Timestamp::now());
        Event {
            metadata: ObjectMeta {
                namespace: Some("default".into()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Node".into()),
                name: Some(self.node.clone()),
                uid: Some(self.node.clone()),
                ..ObjectReference::default()
            },
            reason: Some("ServiceMapsNearlyFull".into()),
            message: Some(message),
            type_: Some("Warning".into()),
            source: Some(EventSource {
                component: Some("gantry-agent".into()),
                host: Some(self.node.clone()),
            }),
            first_timestamp: Some(stamp.clone()),
            last_timestamp: Some(stamp),
            count: Some(1),
            ..Event::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_map_is_told_of_once_until_it_has_room_again() {
        let mut maps = FullMaps::new("n".into());
        let fills = |slots, backends| {
            let of = |map, used| Fill {
                map,
                used,
                limit: 100,
            };
            [of("SLOTS", slots), of("BACKENDS", backends)]
        };
        assert_eq!(maps.compare(&fills(89, 0)), (false, None));
        let (changed, words) = maps.compare(&fills(90, 0));
        assert!(changed && words.unwrap().starts_with("SLOTS has 90 of 100 entries: "));
        assert_eq!(maps.compare(&fills(95, 0)), (false, None), "told");
        assert!(maps.compare(&fills(95, 99)).1.is_some(), "another one");
        assert_eq!(maps.compare(&fills(10, 99)), (true, None), "room again");
        assert!(maps.compare(&fills(90, 99)).1.is_some());
    }
}
