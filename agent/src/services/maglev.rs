//! Which backend serves a connection from outside, so that every node gives the same answer.
//!
//! Up to [`RENDEZVOUS_COUNT_MAX`] backends the programs pick the one with the highest weight for the
//! connection (`ebpf_maps::services::weight`): no table, no memory, and a backend that comes or goes
//! moves only its own share. More backends share a Maglev table, whose lookup does not grow with
//! them: each fills the slots of its own permutation in turn.
//!
//! Both start from [`identity`], which is made of address, port and protocol and of nothing that
//! differs between nodes.
//!
//! Invariants, checked by the tests: a table is the same for the same backends; each has its share
//! of slots, give or take one; a change moves few slots of backends that stay.
//!
//! Source: D. Eisenbud et al., Maglev: A Fast and Reliable Software Network Load Balancer, NSDI 2016,
//! section 3.4.

use ebpf_maps::services::{RENDEZVOUS_COUNT_MAX, mix};

use super::index::Backend;

/// Table sizes: primes, so that every step is a permutation.
const SIZES: [u32; 4] = [1021, 4093, 16_381, 65_537];
/// Slots per backend: shares then differ by 1 % at most.
const SLOTS_PER_BACKEND: usize = 100;

/// A hash of what makes a backend the same on every node.
pub fn identity(backend: &Backend) -> u32 {
    let port = (u32::from(u16::from_be(backend.port_be)) << 8) | u32::from(backend.proto);
    let words = backend.addr.iter().map(|word| u32::from_be(*word));
    words
        .chain([port])
        .fold(0x9e37_79b9, |hash, word| mix(hash ^ word).rotate_left(13))
}

/// Whether so many backends need a table.
pub fn needs_table(backend_count: usize) -> bool {
    backend_count > RENDEZVOUS_COUNT_MAX as usize
}

/// The size of the table for so many backends.
fn size(backend_count: usize) -> u32 {
    let enough = backend_count.saturating_mul(SLOTS_PER_BACKEND);
    let fits = SIZES.into_iter().find(|size| *size as usize >= enough);
    fits.unwrap_or(SIZES[SIZES.len() - 1])
}

/// The table: for each slot an index into `backends`, which must be sorted and unique. Empty if there
/// is no backend; those beyond the largest table get no slot.
pub fn table(backends: &[Backend]) -> Vec<usize> {
    let size = size(backends.len());
    let mut steps: Vec<(u32, u32)> = backends
        .iter()
        .map(|backend| permutation(backend, size))
        .collect();
    let mut slots: Vec<Option<usize>> = vec![None; size as usize];
    let mut empty = size;
    while empty > 0 && !steps.is_empty() {
        for (index, (at, skip)) in steps.iter_mut().enumerate() {
            while slots[*at as usize].is_some() {
                *at = (*at + *skip) % size;
            }
            slots[*at as usize] = Some(index);
            empty -= 1;
            if empty == 0 {
                break;
            }
        }
    }
    slots.into_iter().flatten().collect()
}

/// Where a backend's permutation starts and how it goes on.
fn permutation(backend: &Backend, size: u32) -> (u32, u32) {
    let identity = identity(backend);
    let (offset, skip) = (mix(identity ^ 0x5bd1_e995), mix(identity ^ 0x1b87_3593));
    (offset % size, skip % (size - 1) + 1)
}

#[cfg(test)]
mod tests {
    use ebpf_maps::services::{Addr, v4_mapped, weight};
    use proptest::prelude::*;

    use super::*;

    fn backend(number: u16) -> Backend {
        let [high, low] = number.to_be_bytes();
        Backend {
            addr: v4_mapped(u32::from_ne_bytes([10, 244, high, low])),
            port_be: 8080_u16.to_be(),
            proto: 6,
            node_id: 1,
            pod_id: 2,
            on_trial: false,
        }
    }

    fn backends(numbers: impl IntoIterator<Item = u16>) -> Vec<Backend> {
        let mut all: Vec<Backend> = numbers.into_iter().map(backend).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// For each slot the backend, in the programs' own words.
    fn resolved(backends: &[Backend]) -> Vec<Addr> {
        table(backends)
            .into_iter()
            .map(|index| backends[index].addr)
            .collect()
    }

    /// What the programs do with a list: see `choose` in the programs' `outside`.
    fn heaviest(backends: &[Backend], flow: u32) -> usize {
        let weights = backends
            .iter()
            .map(|backend| weight(flow, identity(backend)));
        let heaviest = weights
            .enumerate()
            .max_by_key(|(index, weight)| (*weight, std::cmp::Reverse(*index)));
        heaviest.unwrap().0
    }

    #[test]
    fn sizes_are_prime_and_large_enough() {
        let is_prime = |n: u32| {
            (2..n)
                .take_while(|d| d * d <= n)
                .all(|d| !n.is_multiple_of(d))
        };
        assert!(SIZES.into_iter().all(is_prime));
        for (count, wanted) in [
            (9, 1021),
            (11, 4093),
            (40, 4093),
            (41, 16_381),
            (655, 65_537),
            (9999, 65_537),
        ] {
            assert_eq!(size(count), wanted, "{count}");
        }
        assert!(table(&[]).is_empty());
    }

    #[test]
    fn a_backend_that_leaves_moves_little_beside_its_own_share() {
        let all = backends(0..40);
        let before = resolved(&all);
        for gone in [0, 17, 39] {
            let mut rest = all.clone();
            let left = rest.remove(gone);
            let after = resolved(&rest);
            let moved = before
                .iter()
                .zip(&after)
                .filter(|(b, a)| **b != left.addr && b != a)
                .count();
            // The paper measured about as many again as the share itself at 100 slots per backend.
            assert!(
                moved <= 2 * before.len() / all.len(),
                "{moved} of {} slots moved",
                before.len()
            );
        }
    }

    /// Pearson's test over the shares that flows get: 0.1 % of fair choices are beyond the bound.
    fn chi_square(counts: &[u32]) -> f64 {
        let total: u32 = counts.iter().sum();
        let expected = f64::from(total) / counts.len() as f64;
        counts
            .iter()
            .map(|count| (f64::from(*count) - expected).powi(2) / expected)
            .sum()
    }

    fn flows(count: u32) -> impl Iterator<Item = u32> {
        // Flows as clients make them: addresses and ports that follow one another.
        (0..count).map(|n| {
            let client = v4_mapped(u32::from_ne_bytes([192, 0, 2, (n % 200) as u8]));
            let server = v4_mapped(u32::from_ne_bytes([192, 0, 2, 250]));
            let port = (32_768 + n / 200) as u16;
            ebpf_maps::services::flow_hash(&client, port.to_be(), &server, 80_u16.to_be(), 6)
        })
    }

    #[test]
    fn connections_are_spread_evenly() {
        let all = backends(0..8);
        let mut counts = vec![0; all.len()];
        flows(80_000).for_each(|flow| counts[heaviest(&all, flow)] += 1);
        assert!(
            chi_square(&counts) < 24.3,
            "7 degrees of freedom: {counts:?}"
        );
        let all = backends(0..20);
        let table = table(&all);
        let mut counts = vec![0; all.len()];
        flows(80_000).for_each(|flow| counts[table[flow as usize % table.len()]] += 1);
        // A share is up to half a percent off by the size of the table: 2 beside the noise.
        assert!(
            chi_square(&counts) < 43.8 + 2.0,
            "19 degrees of freedom: {counts:?}"
        );
    }

    #[test]
    fn of_a_few_backends_only_the_one_that_leaves_loses_connections() {
        let all = backends(0..8);
        for flow in flows(2000) {
            let chosen = heaviest(&all, flow);
            let gone = (chosen + 1) % all.len();
            let mut rest = all.clone();
            rest.remove(gone);
            assert_eq!(rest[heaviest(&rest, flow)], all[chosen]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn shares_differ_by_one_and_labels_do_not_matter(
            numbers in prop::collection::btree_set(any::<u16>(), 9..120),
        ) {
            let all = backends(numbers);
            let slots = table(&all);
            let mut counts = vec![0_usize; all.len()];
            slots.iter().for_each(|index| counts[*index] += 1);
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            prop_assert!(most - least <= 1, "{least} and {most}");
            let elsewhere: Vec<Backend> = all
                .iter()
                .map(|backend| Backend { node_id: 7, pod_id: 9, ..*backend })
                .collect();
            prop_assert_eq!(table(&elsewhere), slots);
        }
    }
}
