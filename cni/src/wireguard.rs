//! What carries the tunnel when nobody on the way may read it: one WireGuard device, a peer for each node.
//!
//! ```text
//!  pod's packet ─► gantry-vxlan ─► to the peer's inner address ─► gantry-wg ─► encrypted ─► peer's node
//! ```
//! Every node has an inner address that follows from its own ([`inner_address`]); a peer may send from its
//! inner address only, and what comes from there was sealed with the peer's key. VXLAN inside, because the
//! packet programs want frames, and because what is behind a node is then the tunnel's matter in both ways
//! of sending.
//!
//! The private key is in the kernel and with whoever gives it; the public one is the kernel's to compute.
//!
//! Source: Linux `include/uapi/linux/wireguard.h`; Donenfeld, "WireGuard", NDSS 2017.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv6Net};
use rtnetlink::LinkWireguard;

use crate::error::CniError;
use crate::genetlink::{Attributes, Socket, attributes};
use crate::netlink::{Link, Netlink, errno, refused};

/// The device's name.
pub const WIREGUARD_NAME: &str = "gantry-wg";
/// WireGuard's usual UDP port.
pub const PORT_DEFAULT: u16 = 51_820;
/// What it takes of a packet: IPv6 40, UDP 8, its own 32. Over IPv4 20 less, which is not used.
pub const OVERHEAD: u32 = 80;
/// Inner addresses.
const INNER: [u16; 4] = [0xfd67, 0x616e, 0x7472, 0x7901];

const FAMILY: &str = "wireguard";
const VERSION: u8 = 1;
/// Commands.
const GET_DEVICE: u8 = 0;
const SET_DEVICE: u8 = 1;
/// Attributes of the device.
const IFNAME: u16 = 2;
const PRIVATE_KEY: u16 = 3;
const PUBLIC_KEY: u16 = 4;
const LISTEN_PORT: u16 = 6;
const PEERS: u16 = 8;
/// Of a peer.
const PEER_KEY: u16 = 1;
const PEER_FLAGS: u16 = 3;
const PEER_ENDPOINT: u16 = 4;
const PEER_ALLOWED: u16 = 9;
const REMOVE_ME: u32 = 1;
const REPLACE_ALLOWED: u32 = 2;
/// Of a prefix that a peer may send from.
const ALLOWED_FAMILY: u16 = 1;
const ALLOWED_ADDRESS: u16 = 2;
const ALLOWED_MASK: u16 = 3;
/// Peers that are told at once: a message's length has 16 bits.
const PEERS_AT_ONCE: usize = 256;

/// A key, private or public.
pub type Key = [u8; 32];

/// This node's end, and the peers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WireGuard {
    /// This node's private key.
    pub private_key: Key,
    /// UDP port, here and there.
    pub port: u16,
    /// This node's inner address.
    pub inner: Ipv6Addr,
    /// Bytes, of what is inside.
    pub mtu: u32,
    /// The others, by public key.
    pub peers: BTreeMap<Key, Peer>,
}

/// Another node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Where it is.
    pub endpoint: SocketAddr,
    /// The address that it sends from.
    pub inner: Ipv6Addr,
}

/// The inner address of a node: the same whoever computes it. Of an IPv4 address it has all bytes, of an
/// IPv6 address a hash.
pub fn inner_address(node: IpAddr) -> Ipv6Addr {
    let low: u64 = match node {
        IpAddr::V4(address) => u64::from(u32::from(address)),
        IpAddr::V6(address) => {
            // FNV-1a: stable across versions and machines.
            let hash = address
                .octets()
                .iter()
                .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                    (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
                });
            // Never one of IPv4's.
            hash | 1 << 63
        }
    };
    let high = INNER
        .iter()
        .fold(0_u64, |high, word| high << 16 | u64::from(*word));
    Ipv6Addr::from(u128::from(high) << 64 | u128::from(low))
}

/// What the kernel has.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct State {
    private_key: Option<Key>,
    public_key: Option<Key>,
    port: u16,
    peers: BTreeMap<Key, Known>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Known {
    endpoint: Option<SocketAddr>,
    allowed: Vec<IpNet>,
}

impl Known {
    fn is(&self, peer: &Peer) -> bool {
        self.endpoint == Some(peer.endpoint) && self.allowed == [host(peer.inner)]
    }
}

fn host(address: Ipv6Addr) -> IpNet {
    IpNet::from(IpAddr::V6(address))
}

/// Makes the device exist with this key, and returns its public key: what peers must know.
///
/// # Errors
/// In words for people when the kernel has no WireGuard.
pub async fn prepare(host: &Netlink, private_key: &Key, port: u16) -> Result<Key, CniError> {
    ensure_device(host).await?;
    let socket = open()?;
    set_key(&socket, &read(&socket)?, private_key, port)?;
    let public_key = read(&socket)?.public_key;
    public_key.ok_or_else(|| CniError::Container(format!("link {WIREGUARD_NAME} has no key")))
}

/// Makes the device exist with everything that is wanted; other peers stay for now.
pub(crate) async fn ensure(host: &Netlink, wanted: &WireGuard) -> Result<(), CniError> {
    let link = ensure_device(host).await?;
    if link.mtu != wanted.mtu {
        host.set_mtu(link.index, wanted.mtu).await?;
    }
    if !link.up {
        host.set_up(link.index).await?;
    }
    // Its network is all inner addresses: the route to them comes with it.
    let inner = IpNet::V6(Ipv6Net::new_assert(wanted.inner, 64));
    host.ensure_address(link.index, inner).await?;
    let socket = open()?;
    let there = read(&socket)?;
    set_key(&socket, &there, &wanted.private_key, wanted.port)?;
    let missing = wanted.peers.iter().filter(|(key, peer)| {
        let known = there.peers.get(*key);
        !known.is_some_and(|known| known.is(peer))
    });
    let missing: Vec<Attributes> = missing.map(|(key, peer)| to_peer(key, peer)).collect();
    tell(&socket, &missing)
}

/// Removes peers and addresses that are no more.
pub(crate) async fn forget_others(host: &Netlink, wanted: &WireGuard) -> Result<(), CniError> {
    let socket = open()?;
    let there = read(&socket)?;
    let gone = there
        .peers
        .keys()
        .filter(|key| !wanted.peers.contains_key(*key));
    let gone: Vec<Attributes> = gone
        .map(|key| {
            Attributes::default()
                .with(PEER_KEY, key)
                .with(PEER_FLAGS, &REMOVE_ME.to_ne_bytes())
        })
        .collect();
    tell(&socket, &gone)?;
    let Some(link) = host.link_by_name(WIREGUARD_NAME).await? else {
        return Ok(());
    };
    for address in host.addresses(link.index).await? {
        if address.addr() != IpAddr::V6(wanted.inner) {
            host.remove_address(link.index, address).await?;
        }
    }
    Ok(())
}

/// Removes the device, and with it key and peers. Ok when it is gone already.
pub async fn remove(host: &Netlink) -> Result<(), CniError> {
    match host.link_by_name(WIREGUARD_NAME).await? {
        Some(link) if link.kind == FAMILY => host.remove_link(link.index).await,
        _ => Ok(()),
    }
}

async fn ensure_device(host: &Netlink) -> Result<Link, CniError> {
    if let Some(link) = host.link_by_name(WIREGUARD_NAME).await? {
        return match link.kind == FAMILY {
            true => Ok(link),
            false => Err(CniError::Container(format!(
                "link {WIREGUARD_NAME} exists and is of kind {:?}, not a WireGuard: rename it",
                link.kind
            ))),
        };
    }
    let message = LinkWireguard::new(WIREGUARD_NAME).build();
    let created = host.handle.link().add(message).execute().await;
    created.map_err(|error| {
        let advice = match errno(&error) {
            Some(libc::EOPNOTSUPP) => {
                " (the kernel has no WireGuard: load the module wireguard, or use another --routing)"
            }
            _ => "",
        };
        refused(format!("create link {WIREGUARD_NAME}{advice}"), error)
    })?;
    let made = host.link_by_name(WIREGUARD_NAME).await?;
    made.ok_or_else(|| {
        CniError::Container(format!("link {WIREGUARD_NAME}: removed while being used"))
    })
}

fn open() -> Result<Socket, CniError> {
    Socket::open(FAMILY, VERSION).map_err(|error| words("speak to WireGuard in the kernel", &error))
}

fn words(what: &str, error: &io::Error) -> CniError {
    CniError::Container(format!("{what}: {error}"))
}

fn device() -> Attributes {
    Attributes::default().with(IFNAME, format!("{WIREGUARD_NAME}\0").as_bytes())
}

fn set_key(socket: &Socket, there: &State, key: &Key, port: u16) -> Result<(), CniError> {
    if there.private_key == Some(clamped(*key)) && there.port == port {
        return Ok(());
    }
    let attributes = device()
        .with(PRIVATE_KEY, key)
        .with(LISTEN_PORT, &port.to_ne_bytes());
    socket.tell(SET_DEVICE, &attributes).map_err(|error| {
        let advice = match error.raw_os_error() {
            Some(libc::EADDRINUSE) => " (another WireGuard has this port: --wireguard-port)",
            _ => "",
        };
        words(
            &format!("set key and UDP port {port} of {WIREGUARD_NAME}{advice}"),
            &error,
        )
    })
}

/// As the kernel keeps it: a scalar of Curve25519.
fn clamped(mut key: Key) -> Key {
    key[0] &= 248;
    key[31] = key[31] & 127 | 64;
    key
}

fn tell(socket: &Socket, peers: &[Attributes]) -> Result<(), CniError> {
    for some in peers.chunks(PEERS_AT_ONCE) {
        let list = some.iter().fold(Attributes::default(), |list, peer| {
            list.with_nested(0, peer)
        });
        let told = socket.tell(SET_DEVICE, &device().with_nested(PEERS, &list));
        told.map_err(|error| words(&format!("set peers of {WIREGUARD_NAME}"), &error))?;
    }
    Ok(())
}

fn to_peer(key: &Key, peer: &Peer) -> Attributes {
    let allowed = Attributes::default()
        .with(ALLOWED_FAMILY, &(libc::AF_INET6 as u16).to_ne_bytes())
        .with(ALLOWED_ADDRESS, &peer.inner.octets())
        .with(ALLOWED_MASK, &[128]);
    let list = Attributes::default().with_nested(0, &allowed);
    Attributes::default()
        .with(PEER_KEY, key)
        .with(PEER_FLAGS, &REPLACE_ALLOWED.to_ne_bytes())
        .with(PEER_ENDPOINT, &to_sockaddr(peer.endpoint))
        .with_nested(PEER_ALLOWED, &list)
}

/// `struct sockaddr_in` or `struct sockaddr_in6`.
fn to_sockaddr(address: SocketAddr) -> Vec<u8> {
    let family = match address {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    let mut bytes = (family as u16).to_ne_bytes().to_vec();
    bytes.extend(address.port().to_be_bytes());
    match address.ip() {
        IpAddr::V4(ip) => bytes.extend([&ip.octets()[..], &[0; 8]].concat()),
        IpAddr::V6(ip) => bytes.extend([&[0; 4][..], &ip.octets(), &[0; 4]].concat()),
    }
    bytes
}

fn from_sockaddr(bytes: &[u8]) -> Option<SocketAddr> {
    let head: &[u8; 4] = bytes.first_chunk()?;
    let port = u16::from_be_bytes([head[2], head[3]]);
    let family = i32::from(u16::from_ne_bytes([head[0], head[1]]));
    let ip: IpAddr = match family {
        libc::AF_INET => Ipv4Addr::from(*bytes.get(4..)?.first_chunk::<4>()?).into(),
        libc::AF_INET6 => Ipv6Addr::from(*bytes.get(8..)?.first_chunk::<16>()?).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

fn read(socket: &Socket) -> Result<State, CniError> {
    let messages = socket
        .dump(GET_DEVICE, &device())
        .map_err(|error| words(&format!("read {WIREGUARD_NAME}"), &error))?;
    Ok(parse(&messages))
}

/// A peer whose prefixes do not fit one message comes again in the next.
fn parse(messages: &[Vec<u8>]) -> State {
    let mut state = State::default();
    for (kind, value) in messages.iter().flat_map(|message| attributes(message)) {
        match kind {
            PRIVATE_KEY => state.private_key = value.try_into().ok(),
            PUBLIC_KEY => state.public_key = value.try_into().ok(),
            LISTEN_PORT => {
                state.port = value
                    .first_chunk()
                    .map_or(0, |port| u16::from_ne_bytes(*port));
            }
            PEERS => {
                for (_, peer) in attributes(value) {
                    note_peer(&mut state, peer);
                }
            }
            _ => {}
        }
    }
    state
}

fn note_peer(state: &mut State, peer: &[u8]) {
    let find = |wanted: u16| attributes(peer).find(|(kind, _)| *kind == wanted);
    let Some(key) = find(PEER_KEY).and_then(|(_, key)| Key::try_from(key).ok()) else {
        return;
    };
    let known = state.peers.entry(key).or_default();
    if let Some((_, endpoint)) = find(PEER_ENDPOINT) {
        known.endpoint = from_sockaddr(endpoint);
    }
    let lists = attributes(peer).filter(|(kind, _)| *kind == PEER_ALLOWED);
    for (_, one) in lists.flat_map(|(_, list)| attributes(list)) {
        let find = |wanted: u16| attributes(one).find(|(kind, _)| *kind == wanted);
        let address = find(ALLOWED_ADDRESS).and_then(|(_, bytes)| match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
            _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        });
        let mask = find(ALLOWED_MASK).and_then(|(_, mask)| mask.first().copied());
        if let (Some(address), Some(mask)) = (address, mask)
            && let Ok(net) = IpNet::new(address, mask)
        {
            known.allowed.push(net);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(last: u8) -> Peer {
        let node = IpAddr::from([192, 0, 2, last]);
        Peer {
            endpoint: SocketAddr::new(node, PORT_DEFAULT),
            inner: inner_address(node),
        }
    }

    #[test]
    fn inner_addresses_are_as_many_as_nodes() {
        let of = |text: &str| inner_address(text.parse().unwrap());
        assert_eq!(of("192.0.2.7").to_string(), "fd67:616e:7472:7901::c000:207");
        assert_ne!(of("192.0.2.7"), of("192.0.2.8"));
        assert_ne!(of("2001:db8::7"), of("2001:db8::8"));
    }

    #[test]
    fn what_is_told_of_a_peer_is_what_is_read_of_it() {
        let v6 = Peer {
            endpoint: "[2001:db8::7]:51820".parse().unwrap(),
            inner: inner_address("2001:db8::7".parse().unwrap()),
        };
        let peers = [([1; 32], peer(1)), ([2; 32], v6)];
        let list = peers
            .iter()
            .fold(Attributes::default(), |list, (key, peer)| {
                list.with_nested(0, &to_peer(key, peer))
            });
        let message = device()
            .with(LISTEN_PORT, &7_u16.to_ne_bytes())
            .with(PUBLIC_KEY, &[9; 32])
            .with_nested(PEERS, &list);
        let state = parse(&[message.into_bytes()]);
        assert_eq!((state.port, state.public_key), (7, Some([9; 32])));
        for (key, peer) in peers {
            assert!(state.peers[&key].is(&peer), "{:?}", state.peers[&key]);
        }
        assert!(!state.peers[&[1; 32]].is(&peer(2)));
    }

    #[test]
    fn a_key_that_the_kernel_has_is_not_set_again() {
        assert_eq!(clamped([0xff; 32])[0], 0xf8);
        assert_eq!(clamped([0xff; 32])[31], 0x7f);
        assert_eq!(clamped(clamped([7; 32])), clamped([7; 32]));
    }
}
