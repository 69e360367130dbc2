//! Which cluster IPs and node ports are taken, and which one is next.
//!
//! The truth is the store's Services; this is its summary, rebuilt at the start. A number is claimed
//! before its Service is written and settled by the outcome, so two writes in flight never get the
//! same one. An outcome that is unknown keeps the claim: a leak until the restart, never a double.
//!
//! Cluster IPs are drawn at random from the upper part of the range; the lower part is left to people
//! who choose addresses themselves, as in Kubernetes (KEP-3070: min(max(16, size/16), 256)).

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::Ipv4Net;

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
    pub(super) addresses: Vec<Ipv4Addr>,
    /// Ports that must be these.
    pub(super) ports: Vec<u16>,
    /// Whether any one address is to be drawn.
    pub(super) draw_address: bool,
    /// How many ports are to be drawn.
    pub(super) draw_port_count: usize,
}

/// The summary of what is taken; clones share it.
#[derive(Clone)]
pub(super) struct Allocator {
    range: Ipv4Net,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Default)]
struct Taken {
    /// Address to the store key of its Service.
    addresses: HashMap<Ipv4Addr, Arc<str>>,
    ports: HashMap<u16, Arc<str>>,
}

/// Numbers taken for a Service that is about to be written.
#[must_use = "settle it with the outcome of the write"]
#[derive(Debug)]
pub(super) struct Claim {
    /// The addresses drawn, at most one.
    pub(super) drawn_address: Option<Ipv4Addr>,
    /// The ports drawn, as many as asked for.
    pub(super) drawn_ports: Vec<u16>,
    key: Arc<str>,
    new_addresses: Vec<Ipv4Addr>,
    new_ports: Vec<u16>,
}

impl Allocator {
    /// Nothing is taken but what `reserved` names.
    pub(super) fn new(range: Ipv4Net, reserved: &[Ipv4Addr]) -> Allocator {
        let mut taken = Taken::default();
        for address in reserved {
            taken
                .addresses
                .insert(*address, "the cluster itself".into());
        }
        Allocator {
            range,
            taken: Arc::new(Mutex::new(taken)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what the Service at `key` wants in addition to what it holds; nothing on an error.
    pub(super) fn claim(&self, key: &Arc<str>, wanted: &Wanted) -> Result<Claim, AllocationError> {
        let mut taken = self.lock();
        let mut claim = Claim {
            drawn_address: None,
            drawn_ports: Vec::new(),
            key: Arc::clone(key),
            new_addresses: Vec::new(),
            new_ports: Vec::new(),
        };
        let result = self.fill(&mut taken, &mut claim, wanted);
        if let Err(error) = result {
            taken.give_back(&claim);
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
                    range: self.range.to_string(),
                });
            }
            match taken.addresses.get(address) {
                Some(holder) if *holder == claim.key => {}
                Some(_) => return Err(AllocationError::Taken("IP")),
                None => taken.take_address(*address, claim),
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
            match taken.ports.get(port) {
                Some(holder) if *holder == claim.key => {}
                Some(_) => return Err(AllocationError::Taken("port")),
                None => taken.take_port(*port, claim),
            }
        }
        if wanted.draw_address {
            let address = self.draw_address(taken).ok_or(AllocationError::Full)?;
            taken.take_address(address, claim);
            claim.drawn_address = Some(address);
        }
        for _ in 0..wanted.draw_port_count {
            let port = draw_port(taken).ok_or(AllocationError::Full)?;
            taken.take_port(port, claim);
            claim.drawn_ports.push(port);
        }
        Ok(())
    }

    /// Neither the network's nor the broadcast address, as `Ipv4Net::hosts` sees it.
    fn is_usable(&self, address: Ipv4Addr) -> bool {
        self.range.contains(&address)
            && (self.range.prefix_len() >= 31
                || (address != self.range.network() && address != self.range.broadcast()))
    }

    fn draw_address(&self, taken: &Taken) -> Option<Ipv4Addr> {
        let first = u32::from(self.range.network());
        let size = 1_u64 << (32 - u32::from(self.range.prefix_len()));
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let reserved = (size / 16).clamp(16, 256).min(size / 2);
        let free =
            |address: &Ipv4Addr| self.is_usable(*address) && !taken.addresses.contains_key(address);
        let drawn = (0..DRAW_COUNT_MAX)
            .map(|_| Ipv4Addr::from(first + rand::random_range(reserved..size)))
            .find(free);
        // The upper part in order, then the lower one.
        drawn.or_else(|| {
            (reserved..size)
                .chain(0..reserved)
                .map(|offset| Ipv4Addr::from(first + offset))
                .find(free)
        })
    }

    /// Ends a claim whose write was refused: its numbers are free again.
    pub(super) fn release_claim(&self, claim: &Claim) {
        self.lock().give_back(claim);
    }

    /// The Service at `key` now holds exactly these.
    pub(super) fn set(&self, key: &Arc<str>, addresses: &[Ipv4Addr], ports: &[u16]) {
        let mut taken = self.lock();
        taken.addresses.retain(|_, holder| holder != key);
        taken.ports.retain(|_, holder| holder != key);
        for address in addresses {
            taken.addresses.insert(*address, Arc::clone(key));
        }
        for port in ports {
            taken.ports.insert(*port, Arc::clone(key));
        }
    }

    /// Notes what a Service in the store holds, without a search for what it held before; returns
    /// the numbers that another one holds already.
    pub(super) fn restore(
        &self,
        key: &Arc<str>,
        addresses: &[Ipv4Addr],
        ports: &[u16],
    ) -> Vec<String> {
        let mut taken = self.lock();
        let mut doubles = Vec::new();
        for address in addresses {
            let holder = taken
                .addresses
                .entry(*address)
                .or_insert_with(|| Arc::clone(key));
            if holder != key {
                doubles.push(address.to_string());
            }
        }
        for port in ports {
            let holder = taken.ports.entry(*port).or_insert_with(|| Arc::clone(key));
            if holder != key {
                doubles.push(port.to_string());
            }
        }
        doubles
    }
}

impl Taken {
    fn take_address(&mut self, address: Ipv4Addr, claim: &mut Claim) {
        self.addresses.insert(address, Arc::clone(&claim.key));
        claim.new_addresses.push(address);
    }

    fn take_port(&mut self, port: u16, claim: &mut Claim) {
        self.ports.insert(port, Arc::clone(&claim.key));
        claim.new_ports.push(port);
    }

    fn give_back(&mut self, claim: &Claim) {
        for address in &claim.new_addresses {
            self.addresses.remove(address);
        }
        for port in &claim.new_ports {
            self.ports.remove(port);
        }
    }
}

fn draw_port(taken: &Taken) -> Option<u16> {
    let free = |port: &u16| !taken.ports.contains_key(port);
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
            &["10.96.0.10".parse().unwrap()],
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
        let error = allocator.claim(&key(2), &wanted("10.97.0.1")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "provided IP is not in the valid range. The range of valid IPs is 10.96.0.0/16"
        );
        allocator.release_claim(&claim);
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
    fn a_refused_claim_takes_nothing() {
        let allocator = Allocator::new("10.96.0.0/16".parse().unwrap(), &[]);
        let wanted = Wanted {
            addresses: vec!["10.96.0.7".parse().unwrap()],
            ports: vec![30_001, 80],
            ..Wanted::default()
        };
        assert!(allocator.claim(&key(1), &wanted).is_err());
        let taken = allocator.lock();
        assert!(taken.addresses.is_empty() && taken.ports.is_empty());
    }

    proptest! {
        #[test]
        fn no_number_has_two_holders(steps in proptest::collection::vec((0..6_usize, 0..4_u8), 1..80)) {
            let allocator = Allocator::new("10.0.0.0/27".parse().unwrap(), &[]);
            let mut held: HashMap<usize, (Vec<Ipv4Addr>, Vec<u16>)> = HashMap::new();
            for (service, step) in steps {
                let wanted = Wanted { draw_address: true, draw_port_count: 2, ..Wanted::default() };
                match (step, held.contains_key(&service)) {
                    (0 | 1, false) => if let Ok(claim) = allocator.claim(&key(service), &wanted) {
                        if step == 0 {
                            let addresses = vec![claim.drawn_address.unwrap()];
                            allocator.set(&key(service), &addresses, &claim.drawn_ports);
                            held.insert(service, (addresses, claim.drawn_ports.clone()));
                        } else {
                            allocator.release_claim(&claim);
                        }
                    },
                    (2, true) => {
                        held.remove(&service);
                        allocator.set(&key(service), &[], &[]);
                    }
                    _ => {}
                }
                let taken = allocator.lock();
                prop_assert_eq!(taken.addresses.len(), held.values().map(|h| h.0.len()).sum::<usize>());
                prop_assert_eq!(taken.ports.len(), held.values().map(|h| h.1.len()).sum::<usize>());
                for (service, (addresses, ports)) in &held {
                    prop_assert!(addresses.iter().all(|a| taken.addresses[a] == key(*service)));
                    prop_assert!(ports.iter().all(|p| taken.ports[p] == key(*service)));
                }
            }
        }
    }
}
