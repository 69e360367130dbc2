//! What pods are held to, in BANDWIDTH: see `ebpf_maps::bandwidth`.

use std::collections::BTreeSet;

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError};
use ebpf_maps::bandwidth::{
    BANDWIDTH_COUNT_MAX, BandwidthKey, BandwidthValue, INTO_POD, OUT_OF_POD,
};

use super::load::{absent_is_fine, failed, take_map, unexpected};
use super::pods::full;
use super::{Bandwidth, DataplaneError};

/// What may be saved up: so long at the rate. A sender that has lost a whole flight is silent for 200 ms (TCP's
/// least retransmission time), and has this on the whole then too; with 100 ms it got half of its rate.
const BURST_NS: u64 = 300_000_000;
/// And never less than so many bytes: the largest packet between pods.
const BURST_BYTES_MIN: u64 = 128 * 1024;
const PS_PER_S: u64 = 1_000_000_000_000;
const PS_PER_NS: u64 = 1_000;
const BITS: u64 = 8;

/// The row of a rate in bits per second.
fn value_of(bits: u64) -> BandwidthValue {
    // Beyond 8 Tbit/s a byte costs less than can be said.
    let byte_ps = (PS_PER_S * BITS / bits.max(1)).max(1);
    BandwidthValue {
        byte_ps,
        burst_ns: BURST_NS.max(BURST_BYTES_MIN * byte_ps / PS_PER_NS),
        paid_ns: 0,
    }
}

/// BANDWIDTH.
pub(super) struct BandwidthMap(HashMap<MapData, BandwidthKey, BandwidthValue>);

impl BandwidthMap {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, DataplaneError> {
        let map = take_map(ebpf, "BANDWIDTH")?.try_into();
        map.map(Self)
            .map_err(|error: MapError| unexpected("BANDWIDTH", error))
    }

    /// Makes a pod's rows these. What it has used of those that stay is not forgotten.
    pub(super) fn set(&mut self, pod_id: u64, limits: Bandwidth) -> Result<(), DataplaneError> {
        for (direction, limit) in [(INTO_POD, limits.ingress), (OUT_OF_POD, limits.egress)] {
            let key = BandwidthKey {
                pod_id,
                direction,
                _pad: 0,
            };
            let Some(bits) = limit else {
                absent_is_fine(self.0.remove(&key))
                    .map_err(|error| failed("remove from BANDWIDTH", &error))?;
                continue;
            };
            let value = value_of(bits);
            let stands = |there: BandwidthValue| {
                there.byte_ps == value.byte_ps && there.burst_ns == value.burst_ns
            };
            if !self.0.get(&key, 0).is_ok_and(stands) {
                (self.0.insert(key, value, 0))
                    .map_err(|error| full("BANDWIDTH", BANDWIDTH_COUNT_MAX, &error))?;
            }
        }
        Ok(())
    }

    /// The pods that have rows.
    pub(super) fn pods(&self) -> BTreeSet<u64> {
        let keys = self.0.keys().filter_map(Result::ok);
        keys.map(|key| key.pod_id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_costs_its_time() {
        let of = |bits| value_of(bits);
        assert_eq!(of(8_000_000).byte_ps, 1_000_000);
        assert_eq!(of(8_000_000_000).byte_ps, 1_000);
        assert_eq!(of(8_000_000_000).burst_ns, BURST_NS);
        // 128 KiB at 1 Mbit/s take about a second, at 1 kbit/s a quarter of an hour.
        assert_eq!(of(1_000_000).burst_ns / 1_000_000, 1_048);
        assert_eq!(of(1_000).burst_ns / 1_000_000_000, 1_048);
        assert_eq!(of(1_000_000_000_000_000).byte_ps, 1);
    }
}
