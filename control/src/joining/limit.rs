//! How often one address may be wrong: a guess costs a look into the store, and a log line.
//!
//! Each address has [`BURST`] failures at once and one more every [`REFILL`]. Successes are free, so a
//! rack behind one address joins at once. An IPv6 network (/64) counts as one address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

/// Failures at once.
const BURST: u32 = 20;
/// The time for one more.
const REFILL: Duration = Duration::from_secs(3);
/// Addresses remembered; of more the one with the fewest failures is forgotten.
const ADDRESSES_MAX: usize = 1_024;

#[derive(Default)]
pub(super) struct Limit {
    /// Failures not yet forgiven, as of a moment.
    failures: HashMap<IpAddr, (u32, Instant)>,
}

fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let bits = u128::from(address) >> 64 << 64;
            IpAddr::V6(bits.into())
        }
        v4 => v4,
    }
}

fn left((count, since): (u32, Instant), now: Instant) -> (u32, Instant) {
    let passed = now.duration_since(since);
    let forgiven = u32::try_from(passed.as_secs() / REFILL.as_secs()).unwrap_or(u32::MAX);
    (
        count.saturating_sub(forgiven),
        // What is left of the running period stays.
        since + REFILL.saturating_mul(forgiven).min(passed),
    )
}

impl Limit {
    /// Whether the address may try.
    pub(super) fn may_try(&mut self, address: IpAddr, now: Instant) -> bool {
        let Some(entry) = self.failures.get_mut(&network(address)) else {
            return true;
        };
        *entry = left(*entry, now);
        entry.0 < BURST
    }

    /// Counts a failure.
    pub(super) fn failed(&mut self, address: IpAddr, now: Instant) {
        let address = network(address);
        if self.failures.len() >= ADDRESSES_MAX && !self.failures.contains_key(&address) {
            let fewest = self
                .failures
                .iter()
                .min_by_key(|(_, entry)| left(**entry, now).0)
                .map(|(address, _)| *address);
            if let Some(fewest) = fewest {
                self.failures.remove(&fewest);
            }
        }
        let entry = self.failures.entry(address).or_insert((0, now));
        *entry = left(*entry, now);
        entry.0 += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_guesses_waits_and_others_do_not() {
        let mut limit = Limit::default();
        let now = Instant::now();
        let (bad, good): (IpAddr, IpAddr) =
            ("2001:db8::1".parse().unwrap(), "192.0.2.1".parse().unwrap());
        for _ in 0..BURST {
            assert!(limit.may_try(bad, now));
            limit.failed(bad, now);
        }
        assert!(
            !limit.may_try("2001:db8::ffff".parse().unwrap(), now),
            "its network"
        );
        assert!(limit.may_try(good, now));
        assert!(!limit.may_try(bad, now + REFILL - Duration::from_secs(1)));
        assert!(limit.may_try(bad, now + REFILL));
        limit.failed(bad, now + REFILL);
        assert!(!limit.may_try(bad, now + REFILL));
    }

    #[test]
    fn many_addresses_need_no_more_memory() {
        let mut limit = Limit::default();
        let now = Instant::now();
        let guesser: IpAddr = "192.0.2.1".parse().unwrap();
        for _ in 0..BURST {
            limit.failed(guesser, now);
        }
        for number in 0..5_000_u32 {
            limit.failed(IpAddr::V4(number.into()), now);
        }
        assert!(limit.failures.len() <= ADDRESSES_MAX);
        assert!(!limit.may_try(guesser, now), "the worst one is remembered");
    }
}
