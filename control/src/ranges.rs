//! Ranges of addresses, one for each family: IPv4, and IPv6 in a cluster that has both.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// `10.244.0.0/16`, or `10.244.0.0/16,fd00:10:244::/56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranges {
    /// The first family: what a Service gets that asks for none.
    pub v4: Ipv4Net,
    /// The second one; none: the cluster has one family.
    pub v6: Option<Ipv6Net>,
}

impl Ranges {
    /// Those there are, the first family first.
    pub fn all(&self) -> impl Iterator<Item = IpNet> + use<> {
        [IpNet::V4(self.v4)]
            .into_iter()
            .chain(self.v6.map(IpNet::V6))
    }

    /// The one of a family.
    pub fn of_family(&self, is_v4: bool) -> Option<IpNet> {
        self.all().find(|net| net.addr().is_ipv4() == is_v4)
    }

    /// Whether an address is in one of them.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.all().any(|net| net.contains(&address))
    }
}

impl From<Ipv4Net> for Ranges {
    fn from(v4: Ipv4Net) -> Self {
        Self { v4, v6: None }
    }
}

impl FromStr for Ranges {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "want one IPv4 range, or one of each family with a comma: \
                        10.244.0.0/16,fd00:10:244::/56";
        let parts: Result<Vec<IpNet>, _> =
            text.split(',').map(|part| part.trim().parse()).collect();
        match parts.as_deref() {
            Ok([IpNet::V4(v4)]) => Ok((*v4).into()),
            Ok([IpNet::V4(v4), IpNet::V6(v6)]) => Ok(Self {
                v4: *v4,
                v6: Some(*v6),
            }),
            Ok([IpNet::V6(_), ..]) => {
                Err(format!("the first range must be an IPv4 one: {expected}"))
            }
            _ => Err(expected.to_owned()),
        }
    }
}

impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.v6 {
            Some(v6) => write!(f, "{},{v6}", self.v4),
            None => write!(f, "{}", self.v4),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_each_family_is_written_as_it_is_read() {
        for text in ["10.244.0.0/16", "10.244.0.0/16,fd00:10:244::/56"] {
            let ranges: Ranges = text.parse().unwrap();
            assert_eq!(ranges.to_string(), text);
        }
        for bad in [
            "",
            "10.244.0.0",
            "10.0.0.0/8,10.1.0.0/16",
            "fd00::/56",
            "fd00::/56,10.0.0.0/8",
        ] {
            assert!(bad.parse::<Ranges>().is_err(), "{bad}");
        }
    }
}
