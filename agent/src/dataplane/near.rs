//! NEAR: the rows of ENDPOINTS once more, where programs find them without a call.
//!
//! ```text
//!  a row comes, changes or goes:  doubt its place ─► ENDPOINTS ─► settle the place
//!                                 programs ask ENDPOINTS          they do not
//! ```
//! Invariants: what a place says is in ENDPOINTS, and stays there until the place is doubted; a place that says
//! it is whole has every row of ENDPOINTS that belongs there. A crash leaves a place in doubt, or as it was
//! before; the next start settles all of them.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{Ordering, fence};

use aya::Ebpf;
use aya::maps::Map;
use ebpf_maps::endpoint::{EndpointValue, NEAR_COUNT, NearValue, near_place};
use ebpf_maps::services::Addr;

use super::DataplaneError;
use super::load::{take_map, unexpected};
use super::sys::MappedArray;

const NAME: &str = "NEAR";
/// Words of a place.
const WORDS: u32 = (size_of::<NearValue>() / size_of::<u64>()) as u32;
/// The word with the interface of the row that is there; 0: none is.
const INTERFACE: usize = (offset_of!(NearValue, value) + offset_of!(EndpointValue, ifindex)) / 8;
/// The word that says that it is whole.
const WHOLE: usize = offset_of!(NearValue, is_whole) / 8;

/// See the module.
pub(super) struct NearMap {
    words: MappedArray<u64>,
}

impl NearMap {
    /// Takes the map out of a loaded object.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, DataplaneError> {
        match take_map(ebpf, NAME)? {
            Map::Array(data) => Self::map(data.fd().as_fd()),
            _ => Err(unexpected(NAME, "not an array")),
        }
    }

    /// Maps it into memory.
    pub(super) fn map(array: BorrowedFd<'_>) -> Result<Self, DataplaneError> {
        let words = MappedArray::map(array, NEAR_COUNT * WORDS);
        let words = words.map_err(failed)?;
        Ok(Self { words })
    }

    /// The row of this address changes: until its place is settled again, ENDPOINTS is asked.
    pub(super) fn doubt(&mut self, addr: &Addr) -> Result<(), DataplaneError> {
        let place = near_place(addr);
        self.write(place, WHOLE, 0)?;
        let words = value_words(addr, &EndpointValue::default());
        if self.read(place, 0)? == words[0] && self.read(place, 1)? == words[1] {
            self.write(place, INTERFACE, 0)?;
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// ENDPOINTS has these rows, and no other that belongs to this place.
    pub(super) fn settle<'a>(
        &mut self,
        place: u32,
        rows: impl Iterator<Item = (&'a Addr, &'a EndpointValue)>,
    ) -> Result<(), DataplaneError> {
        let mut own = rows.filter(|(addr, _)| near_place(addr) == place);
        let (first, is_whole) = (own.next(), own.next().is_none());
        let wanted = first.map_or([0; WORDS as usize], |(addr, value)| {
            value_words(addr, value)
        });
        let whole = both(u32::from(is_whole), 0);
        let mut is_same = self.read(place, WHOLE)? == whole;
        for (word, value) in wanted.iter().enumerate().take(WHOLE) {
            is_same &= self.read(place, word)? == *value;
        }
        if is_same {
            return Ok(());
        }
        // Who finds an address here finds all of its row.
        self.write(place, INTERFACE, 0)?;
        fence(Ordering::SeqCst);
        for (word, value) in wanted.iter().enumerate().take(WHOLE) {
            if word != INTERFACE {
                self.write(place, word, *value)?;
            }
        }
        fence(Ordering::SeqCst);
        self.write(place, INTERFACE, wanted[INTERFACE])?;
        fence(Ordering::SeqCst);
        self.write(place, WHOLE, whole)
    }

    fn read(&self, place: u32, word: usize) -> Result<u64, DataplaneError> {
        let read = self.words.read(place * WORDS + word as u32);
        Ok(read.map_err(failed)?.unwrap_or(0))
    }

    fn write(&mut self, place: u32, word: usize, value: u64) -> Result<(), DataplaneError> {
        let written = self.words.write(place * WORDS + word as u32, value);
        written.map(drop).map_err(failed)
    }
}

fn failed(error: io::Error) -> DataplaneError {
    DataplaneError::kernel(format!("map {NAME} into memory"), &error)
}

/// Two words of memory as the one that they are of 8 bytes.
fn both(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// A place with this row, as words of memory; but for whether it is whole.
fn value_words(addr: &Addr, value: &EndpointValue) -> [u64; WORDS as usize] {
    let [a, b, c, d] = *addr;
    let [m0, m1, m2, m3, m4, m5] = value.pod_mac;
    let [h0, h1, h2, h3, h4, h5] = value.gateway_mac;
    [
        both(a, b),
        both(c, d),
        value.pod_id,
        both(value.ifindex, value.flags),
        u64::from_ne_bytes([m0, m1, m2, m3, m4, m5, h0, h1]),
        u64::from_ne_bytes([h2, h3, h4, h5, 0, 0, 0, 0]),
        0,
        0,
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ebpf_maps::services::v4_mapped;
    use proptest::prelude::*;

    use super::*;

    /// What a program does, see `ebpf/programs/src/maps.rs`.
    fn found(
        near: &NearMap,
        endpoints: &BTreeMap<Addr, EndpointValue>,
        addr: &Addr,
    ) -> Option<u32> {
        let place = near_place(addr);
        let word = |word| near.read(place, word).unwrap();
        let own = value_words(addr, &EndpointValue::default());
        let ifindex = word(INTERFACE) as u32; // the first of two
        if ifindex != 0 && word(0) == own[0] && word(1) == own[1] {
            return Some(ifindex);
        }
        if word(WHOLE) != 0 {
            return None;
        }
        endpoints.get(addr).map(|row| row.ifindex)
    }

    /// Addresses of which some share a place.
    fn addresses() -> Vec<Addr> {
        let all = (1..40_000).map(|number: u32| v4_mapped((0x0a00_0000 | number).to_be()));
        let mut by_place: BTreeMap<u32, Vec<Addr>> = BTreeMap::new();
        for addr in all {
            by_place.entry(near_place(&addr)).or_default().push(addr);
        }
        let crowded = by_place.values().filter(|all| all.len() > 2).take(2);
        crowded.flat_map(|all| all[..3].to_vec()).collect()
    }

    proptest! {
        #[test]
        fn at_every_moment_a_program_finds_what_endpoints_has(
            changes in prop::collection::vec((0..6_usize, prop::option::of(1..9_u32)), 1..40),
        ) {
            let memory = tempfile::tempfile().unwrap();
            memory.set_len(u64::from(NEAR_COUNT * WORDS) * 8).unwrap();
            let mut near = NearMap::map(memory.as_fd()).unwrap();
            let addresses = addresses();
            let mut endpoints = BTreeMap::new();
            let check = |near: &NearMap, endpoints: &BTreeMap<Addr, EndpointValue>| {
                for addr in &addresses {
                    let wanted = endpoints.get(addr).map(|row| row.ifindex);
                    assert_eq!(found(near, endpoints, addr), wanted);
                }
            };
            check(&near, &endpoints);
            for place in 0..NEAR_COUNT {
                near.settle(place, endpoints.iter()).unwrap();
            }
            for (index, ifindex) in changes {
                let addr = addresses[index];
                near.doubt(&addr).unwrap();
                check(&near, &endpoints);
                match ifindex {
                    Some(ifindex) => {
                        endpoints.insert(addr, EndpointValue { ifindex, ..EndpointValue::default() })
                    }
                    None => endpoints.remove(&addr),
                };
                check(&near, &endpoints);
                near.settle(near_place(&addr), endpoints.iter()).unwrap();
                check(&near, &endpoints);
            }
        }
    }
}
