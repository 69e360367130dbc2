//! Connects that nobody answered, as the programs have noted them in FAILURES.
//!
//! ```text
//!  sock_release, packet programs ─► FAILURES ─► news ─► services::ejection
//!                                       ▲                      │
//!                                       └── keep: whom it watches, for their answers are counted there
//! ```

use std::collections::BTreeMap;

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError};
use ebpf_maps::services::{FailureKey, FailureValue};

use super::DataplaneError;
use super::load::{absent_is_fine, failed, take_map, unexpected};
use crate::services::ejection::{Failures, Target};

/// FAILURES, and what was read of it.
pub(super) struct FailureMap {
    map: HashMap<MapData, FailureKey, FailureValue>,
    known: BTreeMap<Target, FailureValue>,
}

impl FailureMap {
    /// Takes the map out of the object. What an agent before has not judged is old by now.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, DataplaneError> {
        let map = take_map(ebpf, "FAILURES")?.try_into();
        let mut taken = Self {
            map: map.map_err(|error: MapError| unexpected("FAILURES", error))?,
            known: BTreeMap::new(),
        };
        taken.news()?;
        taken.keep(|_| false)?;
        Ok(taken)
    }

    /// What has come since the last call.
    pub(super) fn news(&mut self) -> Result<BTreeMap<Target, Failures>, DataplaneError> {
        let rows: Result<Vec<(FailureKey, FailureValue)>, MapError> = self.map.iter().collect();
        let rows = rows.map_err(|error| failed("read FAILURES", &error))?;
        let mut news = BTreeMap::new();
        for (key, value) in rows {
            let FailureKey { addr, port_be, .. } = key;
            let target = Target { addr, port_be };
            let before = self.known.insert(target, value).unwrap_or_default();
            if before != value {
                let since = |now: u32, before: u32| u64::from(now.wrapping_sub(before));
                let own = Failures {
                    resent: since(value.resent, before.resent),
                    given_up: since(value.given_up, before.given_up),
                    refused: since(value.refused, before.refused),
                    answered: since(value.answered, before.answered),
                };
                news.insert(target, own);
            }
        }
        Ok(news)
    }

    /// Takes out all but these. What comes to one in between is lost: a failure more or less.
    pub(super) fn keep(&mut self, is_kept: impl Fn(&Target) -> bool) -> Result<(), DataplaneError> {
        let known = self.known.keys();
        let gone: Vec<Target> = known.filter(|target| !is_kept(target)).copied().collect();
        for target in gone {
            let Target { addr, port_be } = target;
            let key = FailureKey {
                addr,
                port_be,
                _pad: 0,
            };
            absent_is_fine(self.map.remove(&key))
                .map_err(|error| failed("remove from FAILURES", &error))?;
            self.known.remove(&target);
        }
        Ok(())
    }
}
