//! The service maps as the agent writes them: performs a plan's steps, and reads back what an
//! earlier agent wrote.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, Map, MapData, MapError};
use ebpf_maps::services::{
    Addr, BACKEND_COUNT, BACKEND_IN_USE, BACKEND_ON_TRIAL, BACKEND_RETIRED, BackendValue,
    FrontendKey, FrontendValue, SLOT_COUNT, SOURCE_RANGE_BITS, SourceRangeKey, TrafficValue,
};

use super::DataplaneError;
use super::load::{absent_is_fine, failed, take_map, unexpected};
use super::sys::{self, MappedArray};
use crate::services::index::SourceRange;
use crate::services::plan::{BackendId, Found, Step, Write, in_batches};

/// Frontends that are written by one system call.
const SWITCH_COUNT_MAX: usize = 1_024;

/// Words of a `TrafficValue`.
const TRAFFIC_WORDS: u32 = 2;

/// The words of a backend in TRAFFIC: connections, chosen.
pub(super) fn traffic_words(id: BackendId) -> [u32; 2] {
    let first = id.0.saturating_mul(TRAFFIC_WORDS);
    [first, first.saturating_add(1)]
}

/// FRONTENDS, SLOTS, BACKENDS, SOURCE_RANGES and NODE_ADDRESSES.
pub(super) struct Tables {
    frontends: HashMap<MapData, FrontendKey, FrontendValue>,
    /// The same map, for calls that the library lacks.
    pub(super) frontends_fd: OwnedFd,
    slots: MappedArray<u32>,
    backends: MappedArray<BackendValue>,
    source_ranges: LpmTrie<MapData, SourceRangeKey, u32>,
    node_addresses: HashMap<MapData, Addr, u32>,
    /// Two words a backend, as in `TrafficValue`.
    traffic: MappedArray<u64>,
}

impl Tables {
    /// Takes the maps out of a loaded object.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, DataplaneError> {
        let hash = |ebpf: &mut Ebpf, name: &str| take_map(ebpf, name);
        let frontends = hash(ebpf, "FRONTENDS")?;
        let frontends_fd = match &frontends {
            Map::HashMap(data) => data.fd().as_fd().try_clone_to_owned(),
            _ => return Err(unexpected("FRONTENDS", "not a hash map")),
        };
        let frontends_fd =
            frontends_fd.map_err(|error| DataplaneError::kernel("map FRONTENDS", &error))?;
        let frontends = frontends.try_into();
        let source_ranges = hash(ebpf, "SOURCE_RANGES")?.try_into();
        let node_addresses = hash(ebpf, "NODE_ADDRESSES")?.try_into();
        Ok(Self {
            frontends: frontends.map_err(|error: MapError| unexpected("FRONTENDS", error))?,
            frontends_fd,
            slots: mapped(ebpf, "SLOTS", SLOT_COUNT)?,
            backends: mapped(ebpf, "BACKENDS", BACKEND_COUNT)?,
            source_ranges: source_ranges
                .map_err(|error: MapError| unexpected("SOURCE_RANGES", error))?,
            node_addresses: node_addresses
                .map_err(|error: MapError| unexpected("NODE_ADDRESSES", error))?,
            traffic: mapped(ebpf, "TRAFFIC", BACKEND_COUNT * TRAFFIC_WORDS)?,
        })
    }

    /// Performs steps in the order of [`in_batches`].
    ///
    /// # Errors
    /// The steps before the failed one have been performed, the ones after it have not.
    pub(super) fn perform(&mut self, steps: &[Step]) -> Result<(), DataplaneError> {
        in_batches(steps, SWITCH_COUNT_MAX, |write| match write {
            Write::Switches(keys, values) => self.switch(keys, values),
            Write::One(step) => self.perform_one(step),
        })
    }

    fn switch(
        &mut self,
        keys: &[FrontendKey],
        values: &[FrontendValue],
    ) -> Result<(), DataplaneError> {
        // Whoever sees a frontend's new value also sees its slots and backends.
        fence(Ordering::SeqCst);
        if keys.len() > 1 && sys::update_batch(self.frontends_fd.as_fd(), keys, values).is_ok() {
            return Ok(());
        }
        // A kernel without such calls, or one that stopped at an element: it has written those before, and
        // to write them again changes nothing. If one cannot be written this says which error it is.
        for (key, value) in keys.iter().zip(values) {
            let inserted = self.frontends.insert(key, value, 0);
            inserted.map_err(|error| failed("write FRONTENDS", &error))?;
        }
        Ok(())
    }

    /// A second view of TRAFFIC, for another thread.
    pub(super) fn traffic(&self) -> io::Result<MappedArray<u64>> {
        self.traffic.again()
    }

    /// What was done with a backend.
    pub(super) fn traffic_of(&self, id: BackendId) -> Result<TrafficValue, DataplaneError> {
        let [connections, chosen] = traffic_words(id);
        let read = |word| Ok(self.traffic.read(word).map_err(unmapped)?.unwrap_or(0));
        Ok(TrafficValue {
            connections: read(connections)?,
            chosen: read(chosen)?,
        })
    }

    /// Everything in the maps, for [`crate::services::plan::Table::adopt`].
    pub(super) fn to_adopt(&self) -> Result<Found, DataplaneError> {
        let mut found = self.found()?;
        // Mapped for this look only: what is mapped counts as this process's memory.
        let backends = self.backends.again().map_err(unmapped)?;
        for id in 1..BACKEND_COUNT {
            let backend = backends.read(id).map_err(unmapped)?.unwrap_or_default();
            if matches!(backend.state, BACKEND_IN_USE | BACKEND_ON_TRIAL) {
                found.in_use.push(BackendId(id));
            }
        }
        Ok(found)
    }

    /// What frontends lead to, and who may use them.
    pub(super) fn found(&self) -> Result<Found, DataplaneError> {
        let mut found = Found::default();
        for entry in self.frontends.iter() {
            let (key, value) = entry.map_err(|error| failed("read FRONTENDS", &error))?;
            found.frontends.push((key, value));
            let backends = self.slots_of(&value);
            found.backends.push(backends.map_err(unmapped)?);
        }
        for key in self.source_ranges.keys() {
            let key = key.map_err(|error| failed("read SOURCE_RANGES", &error))?;
            let (length, SourceRangeKey { service_id, addr }) = (key.prefix_len(), key.data());
            let prefix = length.saturating_sub(SOURCE_RANGE_BITS);
            found
                .source_ranges
                .push((service_id, SourceRange { addr, prefix }));
        }
        Ok(found)
    }

    /// The addresses at which node ports answer now, and whose they are.
    pub(super) fn node_addresses(&self) -> Result<BTreeMap<Addr, u32>, DataplaneError> {
        let rows = self.node_addresses.iter();
        rows.map(|row| row.map_err(|error| failed("read NODE_ADDRESSES", &error)))
            .collect()
    }

    /// Writes one of them, or removes it.
    ///
    /// * `owner` – `NODE_OWN` or `NODE_OTHER`.
    pub(super) fn set_node_address(
        &mut self,
        addr: &Addr,
        owner: Option<u32>,
    ) -> Result<(), DataplaneError> {
        if let Some(owner) = owner {
            let inserted = self.node_addresses.insert(addr, owner, 0);
            return inserted.map_err(|error| failed("write NODE_ADDRESSES", &error));
        }
        absent_is_fine(self.node_addresses.remove(addr))
            .map_err(|error| failed("remove from NODE_ADDRESSES", &error))
    }

    fn perform_one(&mut self, step: &Step) -> Result<(), DataplaneError> {
        let written = match step {
            Step::WriteBackend { id, value } => self.write_backend(*id, *value),
            Step::WriteSlots { base, ids } => self.write_slots(*base, ids),
            Step::RetireBackend { id } => self.retire(*id),
            Step::SetFrontend { key, value } => return self.switch(&[*key], &[*value]),
            Step::AddSourceRange { service_id, range } => {
                let inserted = self
                    .source_ranges
                    .insert(&range_key(*service_id, range), 1, 0);
                return inserted.map_err(|error| failed("write SOURCE_RANGES", &error));
            }
            Step::RemoveSourceRange { service_id, range } => {
                let removed = self.source_ranges.remove(&range_key(*service_id, range));
                return absent_is_fine(removed)
                    .map_err(|error| failed("remove from SOURCE_RANGES", &error));
            }
            Step::RemoveFrontend { key } => {
                return absent_is_fine(self.frontends.remove(key))
                    .map_err(|error| failed("remove from FRONTENDS", &error));
            }
        };
        if written.map_err(unmapped)? {
            return Ok(());
        }
        Err(DataplaneError::Kernel {
            what: format!("{step:?}"),
            reason: "out of the arena's range, a fault of the planner".into(),
        })
    }

    fn write_backend(&mut self, id: BackendId, value: BackendValue) -> io::Result<bool> {
        for word in traffic_words(id) {
            self.traffic.write(word, 0)?;
        }
        self.backends.write(id.0, value)
    }

    fn write_slots(&mut self, base: u32, ids: &[BackendId]) -> io::Result<bool> {
        for (slot, id) in (base..).zip(ids) {
            if !self.slots.write(slot, id.0)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn retire(&mut self, id: BackendId) -> io::Result<bool> {
        let Some(value) = self.backends.read(id.0)? else {
            return Ok(false);
        };
        let retired = BackendValue {
            state: BACKEND_RETIRED,
            ..value
        };
        self.backends.write(id.0, retired)
    }

    /// None when the value points beyond the arrays.
    fn slots_of(
        &self,
        value: &FrontendValue,
    ) -> io::Result<Option<Vec<(BackendId, BackendValue)>>> {
        let end = value.base.checked_add(value.count);
        let Some(end) = end.filter(|end| *end <= SLOT_COUNT) else {
            return Ok(None);
        };
        let mut slots = Vec::with_capacity(value.count as usize);
        for slot in value.base..end {
            let Some(id) = self.slots.read(slot)? else {
                return Ok(None);
            };
            let Some(backend) = self.backends.read(id)? else {
                return Ok(None);
            };
            slots.push((BackendId(id), backend));
        }
        Ok(Some(slots))
    }
}

fn range_key(service_id: u32, range: &SourceRange) -> Key<SourceRangeKey> {
    let data = SourceRangeKey {
        service_id,
        addr: range.addr,
    };
    Key::new(SOURCE_RANGE_BITS + range.prefix, data)
}

fn unmapped(error: io::Error) -> DataplaneError {
    DataplaneError::kernel("map SLOTS, BACKENDS or TRAFFIC into memory", &error)
}

fn mapped<T: aya::Pod>(
    ebpf: &mut Ebpf,
    name: &str,
    count: u32,
) -> Result<MappedArray<T>, DataplaneError> {
    match take_map(ebpf, name)? {
        Map::Array(data) => MappedArray::map(data.fd().as_fd(), count)
            .map_err(|error| DataplaneError::kernel(format!("map {name} into memory"), &error)),
        _ => Err(unexpected(name, "not an array")),
    }
}
