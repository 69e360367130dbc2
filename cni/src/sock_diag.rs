//! The sockets of a network namespace, and their end: NETLINK_SOCK_DIAG.
//!
//! A [`SockDiag`] belongs to the namespace in which it was opened, whatever thread uses it later.
//! [`SockDiag::destroy`] is `ss --kill`: a TCP socket is reset and its owner gets ECONNABORTED at
//! once, a connected UDP socket gets the same error and is unconnected. The kernel compares the
//! cookie, so a socket that took the same addresses meanwhile is not meant.
//!
//! Layouts are those of `struct inet_diag_req_v2` and `struct inet_diag_msg` in the kernel's
//! `include/uapi/linux/inet_diag.h`. Needs CONFIG_INET_DIAG_DESTROY, which every distribution sets.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::error::CniError;
use crate::netns::{Netns, NetnsGuard};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const HEADER: usize = 16;
/// `struct inet_diag_sockid`
const ID: usize = 48;
/// `struct inet_diag_msg`
const MESSAGE: usize = 72;
/// All states but listening ones, TIME_WAIT and its like: nobody's descriptor is behind those.
const STATES: u32 = 0xfff & !(1 << 6) & !(1 << 10);
/// The kernel fills at most this much of one answer (`NLMSG_GOODSIZE` and its larger variant).
const BUFFER: usize = 32 * 1024;
/// Messages of one dump; more sockets than that are not one namespace's.
const MESSAGES_MAX: usize = 100_000;

/// The transport of sockets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Transport {
    /// IPPROTO_TCP
    Tcp,
    /// IPPROTO_UDP
    Udp,
}

/// A connected socket as the kernel shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Socket {
    /// The one that eBPF programs know it by: never reused while the machine is up.
    pub cookie: u64,
    /// Where it is connected to, IPv4 as such also for sockets of IPv6.
    pub peer: IpAddr,
    /// The port there.
    pub peer_port: u16,
    family: u8,
    transport: Transport,
    id: [u8; ID],
}

/// A connection to the kernel's socket diagnosis in one namespace.
pub struct SockDiag {
    socket: OwnedFd,
    sequence: u32,
}

impl SockDiag {
    /// Opens it in another namespace.
    pub fn open_in(netns: &Netns) -> Result<Self, CniError> {
        let _inside = NetnsGuard::enter(netns)?;
        Self::open()
    }

    /// Opens it in the namespace of the calling thread.
    pub fn open() -> Result<Self, CniError> {
        let failed = |errno: nix::Error| CniError::io("open socket diagnosis")(errno.into());
        let protocol = SockProtocol::NetlinkSockDiag;
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol);
        let socket = socket.map_err(failed)?;
        // The kernel answers at once; a fault of either side must not hold the thread for ever.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(5)).map_err(failed)?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// All connected sockets of this transport, both families.
    ///
    /// # Errors
    /// ENOENT: the kernel has no diagnosis for it (modules `tcp_diag`, `udp_diag`).
    pub fn sockets(&mut self, transport: Transport) -> Result<Vec<Socket>, CniError> {
        let mut sockets = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let family = family as u8;
            let flags = NLM_F_REQUEST | NLM_F_DUMP;
            let request = (SOCK_DIAG_BY_FAMILY, flags);
            self.ask(request, family, transport, &[0; ID])
                .and_then(|()| self.receive(family, transport, &mut sockets))
                .map_err(CniError::io(format!("list {transport:?} sockets")))?;
        }
        Ok(sockets)
    }

    /// Ends a socket. False: it has ended by itself.
    pub fn destroy(&mut self, victim: &Socket) -> Result<bool, CniError> {
        let request = (SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK);
        let done = self
            .ask(request, victim.family, victim.transport, &victim.id)
            .and_then(|()| self.receive(victim.family, victim.transport, &mut Vec::new()));
        match done {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => {
                let to = (victim.peer, victim.peer_port);
                Err(CniError::io(format!("end a socket to {to:?}"))(error))
            }
        }
    }

    fn ask(
        &mut self,
        (kind, flags): (u16, u16),
        family: u8,
        transport: Transport,
        id: &[u8; ID],
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let protocol = match transport {
            Transport::Tcp => libc::IPPROTO_TCP,
            Transport::Udp => libc::IPPROTO_UDP,
        };
        let mut message = Vec::with_capacity(HEADER + 8 + ID);
        message.extend(((HEADER + 8 + ID) as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        message.extend([family, protocol as u8, 0, 0]);
        message.extend(STATES.to_ne_bytes());
        message.extend(id);
        send(self.socket.as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(())
    }

    /// Reads the answer to the last question to its end.
    fn receive(
        &mut self,
        family: u8,
        transport: Transport,
        sockets: &mut Vec<Socket>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        for _ in 0..MESSAGES_MAX {
            let len = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..len];
            while let Some((kind, sequence, body, after)) = next_message(rest) {
                rest = after;
                if sequence != self.sequence {
                    continue; // the end of an answer that was given up
                }
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        return match body.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
                            Some(0) => Ok(()),
                            Some(code) => Err(io::Error::from_raw_os_error(-code)),
                            None => Err(io::ErrorKind::InvalidData.into()),
                        };
                    }
                    _ => sockets.extend(parse(body, family, transport)),
                }
            }
        }
        Err(io::Error::other("an answer without an end"))
    }
}

/// Kind, sequence and body of the first message, and what follows it.
fn next_message(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let header = bytes.first_chunk::<HEADER>()?;
    let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let kind = u16::from_ne_bytes([header[4], header[5]]);
    let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
    let body = bytes.get(HEADER..len)?;
    let after = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, sequence, body, after))
}

/// A `struct inet_diag_msg`.
fn parse(body: &[u8], family: u8, transport: Transport) -> Option<Socket> {
    let message = body.first_chunk::<MESSAGE>()?;
    let id: [u8; ID] = message[4..4 + ID].try_into().ok()?;
    let peer_port = u16::from_be_bytes([id[2], id[3]]);
    let peer: [u8; 16] = id[20..36].try_into().ok()?;
    let peer = match i32::from(message[0]) {
        libc::AF_INET => IpAddr::from(Ipv4Addr::new(peer[0], peer[1], peer[2], peer[3])),
        _ => IpAddr::from(Ipv6Addr::from(peer)).to_canonical(),
    };
    let low = u32::from_ne_bytes([id[40], id[41], id[42], id[43]]);
    let high = u32::from_ne_bytes([id[44], id[45], id[46], id[47]]);
    (peer_port != 0).then_some(Socket {
        cookie: u64::from(high) << 32 | u64::from(low),
        peer,
        peer_port,
        family,
        transport,
        id,
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_destroyed_socket_fails_at_once_and_its_neighbour_does_not() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("skipped: needs root");
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let (mut one, other) = (
            TcpStream::connect(to).unwrap(),
            TcpStream::connect(to).unwrap(),
        );
        let cookie = rustix::net::sockopt::socket_cookie(&one).unwrap();
        let mut diag = SockDiag::open().unwrap();
        let found = diag.sockets(Transport::Tcp).unwrap();
        let victim = found.iter().find(|socket| socket.cookie == cookie).unwrap();
        assert_eq!((victim.peer, victim.peer_port), (to.ip(), to.port()));
        assert!(diag.destroy(victim).unwrap());
        let error = io::Read::read(&mut one, &mut [0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED));
        other.set_nonblocking(true).unwrap();
        assert_eq!(
            other.peek(&mut [0]).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        assert!(!diag.destroy(victim).unwrap(), "it has ended");
    }

    #[test]
    fn a_connected_udp_socket_is_ended_too() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("skipped: needs root");
        }
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let cookie = rustix::net::sockopt::socket_cookie(&client).unwrap();
        let mut diag = SockDiag::open().unwrap();
        let found = match diag.sockets(Transport::Udp) {
            Ok(found) => found,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let victim = found.iter().find(|socket| socket.cookie == cookie).unwrap();
        assert!(diag.destroy(victim).unwrap());
        let error = client.recv(&mut [0]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED));
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_reader_fail(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut rest = &bytes[..];
            let mut count = 0;
            while let Some((_, _, body, after)) = next_message(rest) {
                let _ = parse(body, libc::AF_INET as u8, Transport::Tcp);
                prop_assert!(after.len() < rest.len());
                rest = after;
                count += 1;
            }
            prop_assert!(count <= 12);
        }
    }
}
