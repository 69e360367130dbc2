//! The names under which the server can be reached.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Most addresses of this machine that go into the certificate.
const LOCAL_ADDRESS_COUNT_MAX: usize = 64;

/// A DNS name or an address in the server's certificate.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ServerName {
    /// An address.
    Address(IpAddr),
    /// A DNS name.
    Dns(String),
}

impl ServerName {
    /// An address if the text is one, else a DNS name.
    pub fn parse(text: &str) -> ServerName {
        match text.parse() {
            Ok(address) => ServerName::Address(address),
            Err(_) => ServerName::Dns(text.to_owned()),
        }
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServerName::Address(address) => address.fmt(f),
            ServerName::Dns(name) => name.fmt(f),
        }
    }
}

/// What every server certificate carries, this machine's names, and `extra`.
pub fn local_names(extra: &[String]) -> Vec<ServerName> {
    let mut names = vec![
        ServerName::Dns("localhost".to_owned()),
        ServerName::Dns("kubernetes".to_owned()),
        ServerName::Dns("kubernetes.default".to_owned()),
        ServerName::Dns("kubernetes.default.svc".to_owned()),
        ServerName::Address(Ipv4Addr::LOCALHOST.into()),
        ServerName::Address(Ipv6Addr::LOCALHOST.into()),
    ];
    if let Ok(name) = nix::unistd::gethostname()
        && let Ok(name) = name.into_string()
        && is_dns_name(&name)
    {
        names.push(ServerName::Dns(name));
    }
    names.extend(local_addresses().into_iter().map(ServerName::Address));
    names.extend(extra.iter().map(|name| ServerName::parse(name)));
    names.sort();
    names.dedup();
    names
}

/// Whether the text can stand in a certificate as a DNS name.
pub(super) fn is_dns_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
}

/// Addresses of this machine that others can use; link-local ones need a zone, which certificates
/// cannot name.
fn local_addresses() -> Vec<IpAddr> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else {
        return Vec::new();
    };
    let addresses = interfaces.filter_map(|interface| {
        let address = interface.address?;
        if let Some(v4) = address.as_sockaddr_in() {
            let v4 = v4.ip();
            return (!v4.is_link_local()).then_some(IpAddr::V4(v4));
        }
        let v6 = address.as_sockaddr_in6()?.ip();
        (!v6.is_unicast_link_local()).then_some(IpAddr::V6(v6))
    });
    addresses.take(LOCAL_ADDRESS_COUNT_MAX).collect()
}
