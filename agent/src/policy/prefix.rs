//! Prefixes of addresses and of ports, in the forms that the maps use.

use std::net::IpAddr;

use ebpf_maps::services::Addr;
use ipnet::IpNet;

use crate::services::index::parse_address;

/// Where IPv4 begins: `::ffff:0:0/96`.
const MAPPED: u128 = 0xffff_0000_0000;
const MAPPED_LEN: u8 = 96;
const ADDRESS_BITS: u8 = 128;
const PORT_BITS: u8 = 16;

/// A prefix of addresses of either family, IPv4 in its v4-mapped form. Sorted, a prefix comes
/// directly after those that contain it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Prefix {
    bits: u128,
    len: u8,
}

impl Prefix {
    /// All of IPv4. No IPv6 prefix reaches into it.
    pub const IPV4: Self = Self {
        bits: MAPPED,
        len: MAPPED_LEN,
    };

    /// From a map's key. Bits beyond the prefix are ignored.
    pub fn from_key(addr: &Addr, len: u32) -> Self {
        let len = u8::try_from(len).unwrap_or(ADDRESS_BITS).min(ADDRESS_BITS);
        Self {
            bits: number(addr) & mask(len),
            len,
        }
    }

    /// One address.
    pub fn host(addr: &Addr) -> Self {
        Self::from_key(addr, u32::from(ADDRESS_BITS))
    }

    /// One address, as the feed writes it; none for bytes that are no address.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        parse_address(bytes).map(|addr| Self::host(&addr))
    }

    /// The address part of a map's key.
    pub fn addr(self) -> Addr {
        let bytes = self.bits.to_be_bytes();
        std::array::from_fn(|i| {
            u32::from_ne_bytes([
                bytes[4 * i],
                bytes[4 * i + 1],
                bytes[4 * i + 2],
                bytes[4 * i + 3],
            ])
        })
    }

    /// Its length in bits.
    pub fn bits(self) -> u32 {
        u32::from(self.len)
    }

    /// Whether every address of `other` is in it.
    pub fn contains(self, other: Self) -> bool {
        other.len >= self.len && other.bits & mask(self.len) == self.bits
    }
}

impl From<IpNet> for Prefix {
    fn from(net: IpNet) -> Self {
        match net {
            IpNet::V4(net) => {
                let len = MAPPED_LEN + net.prefix_len();
                let bits = MAPPED | u128::from(u32::from(net.addr()));
                Self {
                    bits: bits & mask(len),
                    len,
                }
            }
            IpNet::V6(net) => Self {
                bits: u128::from(net.addr()) & mask(net.prefix_len()),
                len: net.prefix_len(),
            },
        }
    }
}

impl From<IpAddr> for Prefix {
    fn from(address: IpAddr) -> Self {
        Self::from(IpNet::from(address))
    }
}

fn number(addr: &Addr) -> u128 {
    let mut bytes = [0; 16];
    for (part, word) in bytes.chunks_exact_mut(4).zip(addr) {
        part.copy_from_slice(&word.to_ne_bytes());
    }
    u128::from_be_bytes(bytes)
}

const fn mask(len: u8) -> u128 {
    match len {
        0 => 0,
        len => u128::MAX << (ADDRESS_BITS - len),
    }
}

/// What a rule says of ports, as a prefix: of every protocol, of every port of one, or of a block of
/// ports of one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PortPrefix {
    /// Every protocol, those without ports included.
    All,
    /// The ports of a protocol whose first `len` bits are those of `port`; `len` 0: all of them.
    Of {
        /// IANA's number.
        protocol: u8,
        /// The first port of the block.
        port: u16,
        /// How many bits count.
        len: u8,
    },
}

/// A range of ports as the fewest blocks: at most 30.
pub fn blocks(protocol: u8, first: u16, last: u16) -> Vec<PortPrefix> {
    let mut blocks = Vec::new();
    let (mut next, last) = (u32::from(first), u32::from(last));
    while next <= last {
        // The largest block that starts here and does not go too far.
        let aligned = next.trailing_zeros().min(u32::from(PORT_BITS));
        let fits = (last - next + 1).ilog2();
        let bits = aligned.min(fits);
        blocks.push(PortPrefix::Of {
            protocol,
            port: u16::try_from(next).unwrap_or(u16::MAX),
            len: PORT_BITS - u8::try_from(bits).unwrap_or(PORT_BITS),
        });
        next += 1 << bits;
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prefix(text: &str) -> Prefix {
        Prefix::from(text.parse::<IpNet>().unwrap())
    }

    #[test]
    fn families_share_one_space() {
        assert_eq!(prefix("0.0.0.0/0"), Prefix::IPV4);
        let key = prefix("10.1.2.3/8").addr();
        assert_eq!(
            key,
            ebpf_maps::services::v4_mapped(u32::from_ne_bytes([10, 0, 0, 0]))
        );
        assert_eq!(Prefix::from_key(&key, 104), prefix("10.0.0.0/8"));
        assert!(prefix("10.0.0.0/8").contains(prefix("10.9.0.0/16")));
        assert!(!prefix("10.9.0.0/16").contains(prefix("10.0.0.0/8")));
        assert!(!prefix("2001:db8::/32").contains(prefix("10.0.0.0/8")));
        assert_eq!(
            Prefix::from_bytes(&[10, 0, 0, 1]),
            Some(prefix("10.0.0.1/32"))
        );
        assert_eq!(Prefix::from_bytes(&[10]), None);
    }

    proptest! {
        #[test]
        fn blocks_are_the_range(a in any::<u16>(), b in any::<u16>(), probe in any::<u16>()) {
            let (first, last) = (a.min(b), a.max(b));
            let blocks = blocks(6, first, last);
            prop_assert!(blocks.len() <= 30);
            for port in [probe, first, last, first.wrapping_sub(1), last.wrapping_add(1)] {
                let hits = blocks.iter().filter(|block| match **block {
                    PortPrefix::All => true,
                    PortPrefix::Of { port: start, len, .. } => {
                        len == 0 || (start ^ port) >> (16 - len) == 0
                    }
                });
                prop_assert_eq!(hits.count(), usize::from((first..=last).contains(&port)));
            }
        }

        #[test]
        fn sorting_puts_a_prefix_after_what_contains_it(bits in any::<[u32; 4]>(), a in 0..=128u32, b in 0..=128u32) {
            let (a, b) = (Prefix::from_key(&bits, a.min(b)), Prefix::from_key(&bits, a.max(b)));
            prop_assert!(a.contains(b) && a <= b);
        }
    }
}
