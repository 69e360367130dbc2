//! Which cluster IPs and node ports are taken, and which one is next.
//!
//! ```text
//!            claim                 settle: the write is durable and holds it
//!  free ───────────────► claimed ────────────────────────────────────────────► held
//!    ▲                      │ release: the write was refused, nobody else claims it │
//!    └──────────────────────┴──────────── settle: the Service holds it no more ─────┘
//! ```
//! The truth is the store's Services; this is its summary, rebuilt at the start. A number is claimed
//! before its Service is written and settled by the outcome, so two writes in flight never get the
//! same one, also when they are writes of the same Service: claims are counted. An outcome that is
//! unknown keeps the claim: a leak until the restart, never a double.
//!
//! Cluster IPs are drawn at random from the upper part of the range; the lower part is left to people
//! who choose addresses themselves, as in Kubernetes (KEP-3070: min(max(16, size/16), 256)).

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ranges::Ranges;

/// Ports that Services of type NodePort and LoadBalancer take.
pub(super) const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;
/// Random draws before the range is searched from its start.
const DRAW_COUNT_MAX: usize = 32;

/// Why an address or port cannot be had. The texts are Kubernetes' own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum AllocationError {
    /// Somebody else has it.
    #[error("provided {0} is already allocated")]
    Taken(&'static str),
    /// It is outside the range.
    #[error("provided {what} is not in the valid range. The range of valid {plural} is {range}")]
    OutOfRange {
        /// IP or port.
        what: &'static str,
        /// Its plural.
        plural: &'static str,
        /// The range.
        range: String,
    },
    /// Every number is taken.
    #[error("range is full")]
    Full,
}

/// What one Service holds or asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Addresses that must be these.
    pub(super) addresses: Vec<IpAddr>,
    /// Ports that must be these.
    pub(super) ports: Vec<u16>,
    /// Whether any one IPv4 address is to be drawn.
    pub(super) draw_address: bool,
    /// The same of IPv6.
    pub(super) draw_address_v6: bool,
    /// How many ports are to be drawn.
    pub(super) draw_port_count: usize,
}

/// The summary of what is taken; clones share it.
#[derive(Clone)]
pub(super) struct Allocator {
    ranges: Ranges,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Default)]
struct Taken {
    addresses: Ledger<IpAddr>,
    ports: Ledger<u16>,
}

/// Who has which number.
struct Ledger<N> {
    holders: HashMap<N, Holder>,
}

struct Holder {
    /// Store key of the Service.
    key: Arc<str>,
    /// The stored Service has it.
    is_held: bool,
    /// It is this Service's also when there is no such Service.
    is_reserved: bool,
    /// Writes of the Service in flight that want it.
    claim_count: u32,
}

/// Numbers taken for a Service that is about to be written.
#[must_use = "settle or release it by the outcome of the write"]
#[derive(Debug)]
pub(super) struct Claim {
    /// The IPv4 address drawn.
    pub(super) drawn_address: Option<IpAddr>,
    /// The IPv6 address drawn.
    pub(super) drawn_address_v6: Option<IpAddr>,
    /// The ports drawn, as many as asked for.
    pub(super) drawn_ports: Vec<u16>,
    key: Arc<str>,
    addresses: Vec<IpAddr>,
    ports: Vec<u16>,
}

impl<N> Default for Ledger<N> {
    fn default() -> Ledger<N> {
        Ledger {
            holders: HashMap::new(),
        }
    }
}

impl<N: Copy + Eq + Hash> Ledger<N> {
    fn is_free(&self, number: N) -> bool {
        !self.holders.contains_key(&number)
    }

    /// Counts a claim; false when another Service has the number.
    fn claim(&mut self, number: N, key: &Arc<str>) -> bool {
        let holder = self.holders.entry(number).or_insert_with(|| Holder {
            key: Arc::clone(key),
            is_held: false,
            is_reserved: false,
            claim_count: 0,
        });
        let is_ours = holder.key == *key;
        holder.claim_count += u32::from(is_ours);
        is_ours
    }

    /// Takes a claim back; the number is free when nothing else wants it.
    fn release(&mut self, number: N) {
        let Some(holder) = self.holders.get_mut(&number) else {
            return;
        };
        holder.claim_count = holder.claim_count.saturating_sub(1);
        if holder.claim_count == 0 && !holder.is_held && !holder.is_reserved {
            self.holders.remove(&number);
        }
    }

    /// The stored Service has exactly these; what else it had is free unless claimed again.
    fn settle(&mut self, key: &Arc<str>, held: &[N]) {
        self.holders.retain(|number, holder| {
            if holder.key != *key {
                return true;
            }
            holder.is_held = held.contains(number);
            holder.is_held || holder.is_reserved || holder.claim_count > 0
        });
        for number in held {
            self.hold(*number, key);
        }
    }

    /// Notes that the Service has the number; false when another one has it.
    fn hold(&mut self, number: N, key: &Arc<str>) -> bool {
        let holder = self.holders.entry(number).or_insert_with(|| Holder {
            key: Arc::clone(key),
            is_held: true,
            is_reserved: false,
            claim_count: 0,
        });
        holder.key == *key
    }

    /// The number is this Service's for ever.
    fn reserve(&mut self, number: N, key: &Arc<str>) {
        let holder = Holder {
            key: Arc::clone(key),
            is_held: false,
            is_reserved: true,
            claim_count: 0,
        };
        self.holders.insert(number, holder);
    }
}

impl Allocator {
    /// Nothing is taken but what `reserved` names: addresses and the store key of their Service.
    pub(super) fn new(ranges: Ranges, reserved: &[(Ipv4Addr, String)]) -> Allocator {
        let mut taken = Taken::default();
        for (address, key) in reserved {
            let address = IpAddr::V4(*address);
            taken.addresses.reserve(address, &key.as_str().into());
        }
        Allocator {
            ranges,
            taken: Arc::new(Mutex::new(taken)),
        }
    }

    /// Whether Services may have IPv6 addresses.
    pub(super) fn has_v6(&self) -> bool {
        self.ranges.v6.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what the Service at `key` wants; nothing on an error.
    pub(super) fn claim(&self, key: &Arc<str>, wanted: &Wanted) -> Result<Claim, AllocationError> {
        let mut taken = self.lock();
        let mut claim = Claim {
            drawn_address: None,
            drawn_address_v6: None,
            drawn_ports: Vec::new(),
            key: Arc::clone(key),
            addresses: Vec::new(),
            ports: Vec::new(),
        };
        let result = self.fill(&mut taken, &mut claim, wanted);
        if let Err(error) = result {
            taken.release(&claim);
            return Err(error);
        }
        Ok(claim)
    }

    fn fill(
        &self,
        taken: &mut Taken,
        claim: &mut Claim,
        wanted: &Wanted,
    ) -> Result<(), AllocationError> {
        for address in &wanted.addresses {
            if !self.is_usable(*address) {
                return Err(AllocationError::OutOfRange {
                    what: "IP",
                    plural: "IPs",
                    range: match self.ranges.of_family(address.is_ipv4()) {
                        Some(range) => range.to_string(),
                        None => self.ranges.to_string(),
                    },
                });
            }
            if !taken.claim_address(*address, claim) {
                return Err(AllocationError::Taken("IP"));
            }
        }
        for port in &wanted.ports {
            if !NODE_PORTS.contains(port) {
                return Err(AllocationError::OutOfRange {
                    what: "port",
                    plural: "ports",
                    range: format!("{}-{}", NODE_PORTS.start(), NODE_PORTS.end()),
                });
            }
            if !taken.claim_port(*port, claim) {
                return Err(AllocationError::Taken("port"));
            }
        }
        if wanted.draw_address {
            let address = self.draw_address(taken, true);
            let address = address.ok_or(AllocationError::Full)?;
            taken.claim_address(address, claim);
            claim.drawn_address = Some(address);
        }
        if wanted.draw_address_v6 {
            let address = self.draw_address(taken, false);
            let address = address.ok_or(AllocationError::Full)?;
            taken.claim_address(address, claim);
            claim.drawn_address_v6 = Some(address);
        }
        for _ in 0..wanted.draw_port_count {
            let port = draw_port(taken).ok_or(AllocationError::Full)?;
            taken.claim_port(port, claim);
            claim.drawn_ports.push(port);
        }
        Ok(())
    }

    /// Neither the network's nor the broadcast address, as `IpNet::hosts` sees it.
    fn is_usable(&self, address: IpAddr) -> bool {
        let range = self.ranges.of_family(address.is_ipv4());
        range.is_some_and(|range| {
            let is_short = range.max_prefix_len() - range.prefix_len() <= 1;
            let is_last = address.is_ipv4() && address == range.broadcast();
            range.contains(&address) && (is_short || address != range.network() && !is_last)
        })
    }

    fn draw_address(&self, taken: &Taken, is_v4: bool) -> Option<IpAddr> {
        let range = self.ranges.of_family(is_v4)?;
        // Of an IPv6 range no more than the first 4 billion are given out.
        let bits = u32::from(range.max_prefix_len() - range.prefix_len()).min(32);
        let size = u32::try_from(1_u64 << bits).unwrap_or(u32::MAX);
        let reserved = (size / 16).clamp(16, 256).min(size / 2);
        let at = |offset: u32| match range.network() {
            IpAddr::V4(first) => {
                IpAddr::from(Ipv4Addr::from(u32::from(first).saturating_add(offset)))
            }
            IpAddr::V6(first) => IpAddr::from(Ipv6Addr::from(
                u128::from(first).saturating_add(u128::from(offset)),
            )),
        };
        let free = |address: &IpAddr| self.is_usable(*address) && taken.addresses.is_free(*address);
        let drawn = (0..DRAW_COUNT_MAX)
            .map(|_| at(rand::random_range(reserved..size)))
            .find(free);
        // The upper part in order, then the lower one.
        drawn.or_else(|| (reserved..size).chain(0..reserved).map(at).find(free))
    }

    /// Ends a claim whose write was refused.
    pub(super) fn release(&self, claim: &Claim) {
        self.lock().release(claim);
    }

    /// Ends a claim whose write is durable (`None`: the Service went). `held` reads what the stored
    /// Service has now: under the lock, so that of two outcomes the later look counts.
    pub(super) fn settle(
        &self,
        key: &Arc<str>,
        claim: Option<&Claim>,
        held: impl FnOnce() -> (Vec<IpAddr>, Vec<u16>),
    ) {
        let mut taken = self.lock();
        let (addresses, ports) = held();
        taken.addresses.settle(key, &addresses);
        taken.ports.settle(key, &ports);
        if let Some(claim) = claim {
            taken.release(claim);
        }
    }

    /// Notes what a Service in the store has; returns the numbers that another one has already.
    pub(super) fn restore(
        &self,
        key: &Arc<str>,
        addresses: &[IpAddr],
        ports: &[u16],
    ) -> Vec<String> {
        let mut taken = self.lock();
        let mut doubles = Vec::new();
        for address in addresses {
            if !taken.addresses.hold(*address, key) {
                doubles.push(address.to_string());
            }
        }
        for port in ports {
            if !taken.ports.hold(*port, key) {
                doubles.push(port.to_string());
            }
        }
        doubles
    }
}

impl Taken {
    fn claim_address(&mut self, address: IpAddr, claim: &mut Claim) -> bool {
        let is_ours = self.addresses.claim(address, &claim.key);
        claim.addresses.extend(is_ours.then_some(address));
        is_ours
    }

    fn claim_port(&mut self, port: u16, claim: &mut Claim) -> bool {
        let is_ours = self.ports.claim(port, &claim.key);
        claim.ports.extend(is_ours.then_some(port));
        is_ours
    }

    fn release(&mut self, claim: &Claim) {
        for address in &claim.addresses {
            self.addresses.release(*address);
        }
        for port in &claim.ports {
            self.ports.release(*port);
        }
    }
}

fn draw_port(taken: &Taken) -> Option<u16> {
    let free = |port: &u16| taken.ports.is_free(*port);
    let drawn = (0..DRAW_COUNT_MAX)
        .map(|_| rand::random_range(NODE_PORTS))
        .find(free);
    drawn.or_else(|| NODE_PORTS.clone().find(free))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(n: usize) -> Arc<str> {
        format!("/registry/services/a/{n}").into()
    }

    fn one_address() -> Wanted {
        Wanted {
            draw_address: true,
            ..Wanted::default()
        }
    }

    #[test]
    fn a_taken_address_is_refused_with_kubernetes_words() {
        let allocator = Allocator::new(
            "10.96.0.0/16".parse().unwrap(),
            &[("10.96.0.10".parse().unwrap(), key(9).to_string())],
        );
        let wanted = |text: &str| Wanted {
            addresses: vec![text.parse().unwrap()],
            ..Wanted::default()
        };
        let claim = allocator.claim(&key(1), &wanted("10.96.0.7")).unwrap();
        assert_eq!(claim.drawn_address, None);
        let error = allocator.claim(&key(2), &wanted("10.96.0.7")).unwrap_err();
        assert_eq!(error.to_string(), "provided IP is already allocated");
        assert_eq!(
            allocator.claim(&key(2), &wanted("10.96.0.10")).unwrap_err(),
            AllocationError::Taken("IP")
        );
        // It is its Service's, there or not.
        let own = allocator.claim(&key(9), &wanted("10.96.0.10")).unwrap();
        allocator.settle(&key(9), Some(&own), || (Vec::new(), Vec::new()));
        assert!(allocator.claim(&key(2), &wanted("10.96.0.10")).is_err());
        let error = allocator.claim(&key(2), &wanted("10.97.0.1")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "provided IP is not in the valid range. The range of valid IPs is 10.96.0.0/16"
        );
        allocator.release(&claim);
        let _ = allocator.claim(&key(2), &wanted("10.96.0.7")).unwrap();
    }

    #[test]
    fn every_address_of_a_small_range_is_given_once() {
        let allocator = Allocator::new("10.0.0.0/28".parse().unwrap(), &[]);
        let mut seen = std::collections::BTreeSet::new();
        for n in 0..14 {
            let claim = allocator.claim(&key(n), &one_address()).unwrap();
            assert!(seen.insert(claim.drawn_address.unwrap()));
        }
        assert_eq!(
            allocator.claim(&key(99), &one_address()).unwrap_err(),
            AllocationError::Full
        );
    }

    #[test]
    fn addresses_of_both_families_are_drawn_from_their_ranges() {
        let ranges: Ranges = "10.0.0.0/28,fd96::/124".parse().unwrap();
        let allocator = Allocator::new(ranges, &[]);
        let both = Wanted {
            draw_address_v6: true,
            ..one_address()
        };
        let mut seen = std::collections::BTreeSet::new();
        for n in 0..14 {
            let claim = allocator.claim(&key(n), &both).unwrap();
            let drawn = [claim.drawn_address, claim.drawn_address_v6].map(Option::unwrap);
            assert!(drawn[0].is_ipv4() && drawn[1].is_ipv6());
            assert!(drawn.iter().all(|address| ranges.contains(*address)));
            assert!(drawn.into_iter().all(|address| seen.insert(address)));
        }
        // One family is full: nothing of the other is taken.
        assert_eq!(
            allocator.claim(&key(99), &both).unwrap_err(),
            AllocationError::Full
        );
        assert_eq!(allocator.lock().addresses.holders.len(), 28);
        let one = Allocator::new("10.0.0.0/28".parse().unwrap(), &[]);
        let wanted = Wanted {
            addresses: vec!["fd96::7".parse().unwrap()],
            ..Wanted::default()
        };
        let error = one.claim(&key(1), &wanted).unwrap_err().to_string();
        assert!(
            error.ends_with("The range of valid IPs is 10.0.0.0/28"),
            "{error}"
        );
    }

    #[test]
    fn a_refused_claim_takes_nothing() {
        let allocator = Allocator::new("10.96.0.0/16".parse().unwrap(), &[]);
        let wanted = Wanted {
            addresses: vec!["10.96.0.7".parse().unwrap()],
            ports: vec![30_001, 80],
            ..Wanted::default()
        };
        assert!(allocator.claim(&key(1), &wanted).is_err());
        let taken = allocator.lock();
        assert!(taken.addresses.holders.is_empty() && taken.ports.holders.is_empty());
    }

    /// Writes of three Services in flight, in any order, some refused: whatever a Service got is
    /// nobody else's, and what nobody has or wants is free.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Claim(usize),
        Commit(usize),
        Refuse(usize),
        Remove(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = (0..4_u8, 0..6_usize).prop_map(|(what, n)| match what {
            0 => Step::Claim(n % 3),
            1 => Step::Commit(n),
            2 => Step::Refuse(n),
            _ => Step::Remove(n % 3),
        });
        proptest::collection::vec(step, 1..120)
    }

    proptest! {
        #[test]
        fn no_number_has_two_holders(steps in steps()) {
            let allocator = Allocator::new("10.0.0.0/28".parse().unwrap(), &[]);
            let mut stored: HashMap<usize, (Vec<IpAddr>, Vec<u16>)> = HashMap::new();
            let mut flying: Vec<(usize, Claim)> = Vec::new();
            for step in steps {
                match step {
                    Step::Claim(service) => {
                        let mut wanted = Wanted { draw_port_count: 1, ..one_address() };
                        if let Some((addresses, ports)) = stored.get(&service) {
                            // An update keeps what it has and wants one more port.
                            wanted = Wanted {
                                addresses: addresses.clone(),
                                ports: ports.iter().copied().take(1).collect(),
                                draw_address: false,
                                draw_address_v6: false,
                                draw_port_count: 1,
                            };
                        }
                        if let Ok(claim) = allocator.claim(&key(service), &wanted) {
                            flying.push((service, claim));
                        }
                    }
                    Step::Commit(n) if n < flying.len() => {
                        let (service, claim) = flying.remove(n);
                        let held = (claim.addresses.clone(), claim.ports.clone());
                        stored.insert(service, held.clone());
                        allocator.settle(&key(service), Some(&claim), || held);
                    }
                    Step::Refuse(n) if n < flying.len() => {
                        allocator.release(&flying.remove(n).1);
                    }
                    Step::Remove(service) => {
                        stored.remove(&service);
                        allocator.settle(&key(service), None, Default::default);
                    }
                    _ => {}
                }
                let mut owners: HashMap<IpAddr, usize> = HashMap::new();
                let of_stored = stored.iter().map(|(s, held)| (*s, &held.0));
                let of_flying = flying.iter().map(|(s, claim)| (*s, &claim.addresses));
                for (service, addresses) in of_stored.chain(of_flying) {
                    for address in addresses {
                        prop_assert_eq!(*owners.entry(*address).or_insert(service), service);
                    }
                }
                let taken = allocator.lock();
                prop_assert_eq!(taken.addresses.holders.len(), owners.len());
                for (address, service) in owners {
                    prop_assert_eq!(&taken.addresses.holders[&address].key, &key(service));
                }
            }
        }
    }
}
