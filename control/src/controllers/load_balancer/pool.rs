//! The addresses that Services of type LoadBalancer may get.
//!
//! A CIDR gives all its addresses but, for IPv4, the network's and the broadcast address; a range
//! `FIRST-LAST` gives exactly what it says.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;

/// Addresses from the first to the last, of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolRange {
    first: IpAddr,
    last: IpAddr,
}

/// All ranges, in the order in which they are used up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressPool {
    ranges: Vec<PoolRange>,
}

/// Where the next search of a family goes on: addresses before it are taken.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    range: usize,
    offset: u128,
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

impl PoolRange {
    fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.first.is_ipv4() && self.first <= address && address <= self.last
    }

    fn at(&self, offset: u128) -> Option<IpAddr> {
        let number = number(self.first).checked_add(offset)?;
        let address = match self.first {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from(u32::try_from(number).ok()?)),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(number)),
        };
        self.contains(address).then_some(address)
    }

    /// Whether any address is also in `net`.
    pub fn overlaps(&self, net: &IpNet) -> bool {
        self.contains(net.network()) || net.contains(&self.first)
    }
}

impl FromStr for PoolRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((first, last)) = text.split_once('-') {
            let parse = |part: &str| {
                let address = part.trim().parse::<IpAddr>();
                address.map_err(|_| format!("{part:?} is no address"))
            };
            let (first, last) = (parse(first)?, parse(last)?);
            if first.is_ipv4() != last.is_ipv4() || first > last {
                return Err("want FIRST-LAST of one family, the smaller address first".to_owned());
            }
            return Ok(Self { first, last });
        }
        let advice = "want a CIDR or FIRST-LAST, for example 192.0.2.0/28 or 192.0.2.10-192.0.2.20";
        let net: IpNet = text.parse().map_err(|_| advice.to_owned())?;
        if net.addr() != net.network() {
            let net = net.trunc();
            return Err(format!("bits are set beyond the prefix: use {net}"));
        }
        match net {
            IpNet::V4(v4) if v4.prefix_len() < 31 => {
                let (first, last) = (u32::from(v4.network()), u32::from(v4.broadcast()));
                Ok(Self {
                    first: Ipv4Addr::from(first + 1).into(),
                    last: Ipv4Addr::from(last - 1).into(),
                })
            }
            net => Ok(Self {
                first: net.network(),
                last: net.broadcast(),
            }),
        }
    }
}

impl fmt::Display for PoolRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl AddressPool {
    /// A pool of these ranges; they may overlap.
    pub fn new(ranges: Vec<PoolRange>) -> Self {
        Self { ranges }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub(super) fn contains(&self, address: IpAddr) -> bool {
        self.ranges.iter().any(|range| range.contains(address))
    }

    pub(super) fn has_family(&self, v6: bool) -> bool {
        self.ranges.iter().any(|range| range.first.is_ipv6() == v6)
    }

    /// The first address of the family that is not taken. `taken` only grows while a cursor is used.
    pub(super) fn free(
        &self,
        v6: bool,
        taken: &BTreeSet<IpAddr>,
        cursor: &mut Cursor,
    ) -> Option<IpAddr> {
        while let Some(range) = self.ranges.get(cursor.range) {
            if range.first.is_ipv6() == v6 {
                while let Some(address) = range.at(cursor.offset) {
                    cursor.offset += 1;
                    if !taken.contains(&address) {
                        return Some(address);
                    }
                }
            }
            cursor.range += 1;
            cursor.offset = 0;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str) -> Vec<String> {
        let pool = AddressPool::new(vec![text.parse().unwrap()]);
        let (mut cursor, v6) = (Cursor::default(), text.contains(':'));
        let taken = BTreeSet::new();
        std::iter::from_fn(|| pool.free(v6, &taken, &mut cursor))
            .map(|address| address.to_string())
            .collect()
    }

    #[test]
    fn ranges_and_prefixes_give_what_they_say() {
        assert_eq!(all("192.0.2.8/30"), ["192.0.2.9", "192.0.2.10"]);
        assert_eq!(all("192.0.2.8/31"), ["192.0.2.8", "192.0.2.9"]);
        assert_eq!(all("192.0.2.8/32"), ["192.0.2.8"]);
        assert_eq!(all("192.0.2.255-192.0.3.0"), ["192.0.2.255", "192.0.3.0"]);
        assert_eq!(all("255.255.255.255-255.255.255.255").len(), 1);
        assert_eq!(all("2001:db8::/127"), ["2001:db8::", "2001:db8::1"]);
        for bad in [
            "",
            "x",
            "192.0.2.1/24",
            "192.0.2.9-192.0.2.1",
            "192.0.2.1-::1",
            "-",
        ] {
            assert!(bad.parse::<PoolRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn overlaps_are_seen_from_both_sides() {
        let range: PoolRange = "10.0.0.5-10.0.0.9".parse().unwrap();
        for (net, overlaps) in [
            ("10.0.0.0/8", true),
            ("10.0.0.6/32", true),
            ("10.0.1.0/24", false),
        ] {
            assert_eq!(range.overlaps(&net.parse().unwrap()), overlaps, "{net}");
        }
    }
}
