//! The Services that every layout is given, and names made of them: pure.
//!
//! Only the measured Service, in the middle of all, has endpoints that answer. Those of the others
//! are addresses that nobody has, and nobody connects to.

use std::net::Ipv4Addr;

/// Pods' addresses; clients outside of it are masqueraded by kube-proxy's rules.
pub(super) const POD_PREFIX: &str = "10.244.0.0/16";
/// Cluster IPs.
pub(super) const SERVICE_PREFIX: &str = "10.96.0.0/12";
/// Of every Service.
pub(super) const SERVICE_PORT: u16 = 80;
/// Of every endpoint.
pub(super) const TARGET_PORT: u16 = 8080;
/// Of the measured Service; the others have none.
pub(super) const NODE_PORT: u16 = 30_080;
/// Endpoints of an ordinary Service.
const ENDPOINT_COUNT: usize = 3;

const FIRST_CLUSTER_IP: u32 = u32::from_be_bytes([10, 96, 0, 10]);
const FIRST_LIVE: u32 = u32::from_be_bytes([10, 244, 8, 1]);
const FIRST_SILENT: u32 = u32::from_be_bytes([10, 128, 0, 1]);

/// How much is loaded.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Size {
    /// All Services.
    pub services: usize,
    /// Endpoints of the measured one.
    pub endpoints: usize,
}

impl Size {
    /// Services of three endpoints each.
    pub(super) fn of(services: usize) -> Self {
        let endpoints = ENDPOINT_COUNT;
        Self {
            services,
            endpoints,
        }
    }

    /// `1000`, or `1x1000` for one Service of so many endpoints.
    pub(super) fn label(self) -> String {
        match self.endpoints {
            ENDPOINT_COUNT => self.services.to_string(),
            endpoints => format!("{}x{endpoints}", self.services),
        }
    }
}

/// One Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Service {
    /// Its name and its port's, as kube-proxy writes them: `bench/svc-7:http`.
    pub name: String,
    pub address: Ipv4Addr,
    pub node_port: Option<u16>,
    pub endpoints: Vec<Ipv4Addr>,
}

/// All of them.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub services: Vec<Service>,
    measured: usize,
}

impl Model {
    pub(super) fn new(size: Size) -> Self {
        let measured = size.services / 2;
        let service = |index: usize| {
            let (node_port, endpoints) = match index == measured {
                true => (Some(NODE_PORT), live(0, size.endpoints)),
                false => (None, silent(index)),
            };
            Service {
                name: format!("bench/svc-{index}:http"),
                address: offset(FIRST_CLUSTER_IP, index),
                node_port,
                endpoints,
            }
        };
        Self {
            services: (0..size.services).map(service).collect(),
            measured,
        }
    }

    /// The one that is connected to.
    pub(super) fn measured(&self) -> &Service {
        &self.services[self.measured]
    }

    /// The measured Service with as many other endpoints: all of them are replaced.
    pub(super) fn moved(&self) -> Service {
        let old = self.measured();
        let count = old.endpoints.len();
        Service {
            endpoints: live(count, count),
            ..old.clone()
        }
    }

    /// The addresses that answer: of the measured Service, before and after it is moved.
    pub(super) fn live(&self) -> Vec<Ipv4Addr> {
        live(0, 2 * self.measured().endpoints.len())
    }
}

fn live(from: usize, count: usize) -> Vec<Ipv4Addr> {
    (from..from + count)
        .map(|index| offset(FIRST_LIVE, index))
        .collect()
}

fn silent(service: usize) -> Vec<Ipv4Addr> {
    let first = service * ENDPOINT_COUNT;
    (first..first + ENDPOINT_COUNT)
        .map(|index| offset(FIRST_SILENT, index))
        .collect()
}

fn offset(first: u32, index: usize) -> Ipv4Addr {
    // Sizes are bounded far below the prefixes (`Options`).
    Ipv4Addr::from(first + index as u32)
}

/// A stable name of `length` letters and digits for `text`, of the length and alphabet (base 32) that
/// kube-proxy's hashes have; which hash it is changes nothing that is measured.
pub(super) fn hashed(text: &str, length: usize) -> String {
    const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let fnv = |seed: u64| {
        text.bytes().fold(seed, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    };
    let mixed = |hash: u64| {
        let hash = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^ (hash >> 29)
    };
    let words = [0xcbf2_9ce4_8422_2325, 0x6c62_272e_07bb_0142].map(|seed| mixed(fnv(seed)));
    let letters = words.iter().flat_map(|word| {
        (0..12).map(move |place| ALPHABET[(word >> (5 * place)) as usize & 31] as char)
    });
    letters.take(length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_measured_service_is_in_the_middle_and_all_addresses_differ() {
        let model = Model::new(Size::of(10_000));
        assert_eq!(model.measured().name, "bench/svc-5000:http");
        assert_eq!(model.measured().node_port, Some(NODE_PORT));
        let addresses: BTreeSet<_> = model.services.iter().map(|s| s.address).collect();
        assert_eq!(addresses.len(), 10_000);
        let endpoints: BTreeSet<_> = model.services.iter().flat_map(|s| &s.endpoints).collect();
        assert_eq!(endpoints.len(), 30_000);
        let with_port = model.services.iter().filter(|s| s.node_port.is_some());
        assert_eq!(with_port.count(), 1);
    }

    #[test]
    fn a_moved_service_shares_no_endpoint_with_what_it_was() {
        for size in [
            Size::of(1),
            Size {
                services: 1,
                endpoints: 1000,
            },
        ] {
            let model = Model::new(size);
            let (old, new) = (&model.measured().endpoints, model.moved().endpoints);
            assert_eq!(old.len(), new.len());
            assert!(new.iter().all(|endpoint| !old.contains(endpoint)));
            let both: Vec<_> = old.iter().chain(&new).copied().collect();
            assert_eq!(model.live(), both);
        }
    }

    #[test]
    fn sizes_are_named_as_the_command_line_names_them() {
        let one = Size {
            services: 1,
            endpoints: 1000,
        };
        assert_eq!([Size::of(100).label(), one.label()], ["100", "1x1000"]);
    }

    #[test]
    fn hashes_are_stable_long_enough_and_differ() {
        assert_eq!(hashed("a", 16).len(), 16);
        assert_eq!(hashed("a", 16), hashed("a", 16));
        let all: BTreeSet<_> = (0..100_000)
            .map(|index| hashed(&format!("bench/svc-{index}:http"), 8))
            .collect();
        assert_eq!(all.len(), 100_000);
    }
}
