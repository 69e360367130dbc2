//! Generic netlink, as much as one device needs: a family by name, a request, its answers.
//!
//! ```text
//!  nlmsghdr 16 │ genlmsghdr 4 │ attributes: length 2, type 2, value, padded to 4
//! ```
//! Encoding and decoding are pure; a [`Socket`] asks in the namespace of the thread that opened it, and
//! the kernel answers before the call that asked has returned.
//!
//! Source: Linux `include/uapi/linux/{netlink,genetlink}.h`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    socket,
};

const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;
const ATTRIBUTE_HEADER: usize = 4;
/// Types of messages.
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// Flags of requests.
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
/// The type of an attribute without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const TYPE_MASK: u16 = 0x3fff;
const NESTED: u16 = 0x8000;
/// The controller, which knows all families.
const CONTROLLER: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
/// The kernel's own limit of what it puts into one answer of a dump, and more.
const ANSWER_MAX: usize = 64 * 1024;
/// Messages of one answer: far more than any device has.
const ANSWER_COUNT_MAX: usize = 65_536;

/// Attributes of a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// Adds one. Values are short: a length beyond 16 bits is cut off with its value.
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let value = &value[..value.len().min(usize::from(u16::MAX) - ATTRIBUTE_HEADER)];
        let length = (ATTRIBUTE_HEADER + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds one that consists of attributes.
    #[must_use]
    pub fn with_nested(self, kind: u16, inside: &Self) -> Self {
        self.with(kind | NESTED, &inside.0)
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// As they are sent.
    #[cfg(test)]
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// There is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The attributes in these bytes: type and value. What is cut off ends the list.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let head: &[u8; ATTRIBUTE_HEADER] = bytes.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let value = bytes.get(ATTRIBUTE_HEADER..length)?;
        let kind = u16::from_ne_bytes([head[2], head[3]]) & TYPE_MASK;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// What one datagram of the kernel says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answer {
    /// Attributes of each message.
    messages: Vec<Vec<u8>>,
    /// Nothing follows.
    is_end: bool,
    /// The kernel's refusal, an errno.
    refused: Option<i32>,
}

fn parse(mut bytes: &[u8]) -> Answer {
    let mut answer = Answer::default();
    while let Some(head) = bytes.first_chunk::<HEADER>() {
        let length = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let Some(message) = bytes.get(HEADER..length) else {
            break;
        };
        match u16::from_ne_bytes([head[4], head[5]]) {
            kind @ (ERROR | DONE) => {
                answer.is_end = true;
                let code = message
                    .first_chunk()
                    .map_or(0, |code| i32::from_ne_bytes(*code));
                if kind == ERROR && code != 0 || code < 0 {
                    answer.refused = Some(code.saturating_neg());
                }
            }
            _ => answer
                .messages
                .push(message.get(GENERIC_HEADER..).unwrap_or_default().to_vec()),
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    answer
}

fn request(family: u16, flags: u16, command: u8, version: u8, attributes: &Attributes) -> Vec<u8> {
    let length = (HEADER + GENERIC_HEADER + attributes.len()) as u32;
    let mut bytes = Vec::with_capacity(length as usize);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(family.to_ne_bytes());
    bytes.extend((REQUEST | flags).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([command, version, 0, 0]);
    bytes.extend(&attributes.0);
    bytes
}

/// A connection to one family.
pub struct Socket {
    fd: OwnedFd,
    family: u16,
    version: u8,
}

impl Socket {
    /// Opens it in the namespace of the calling thread; ENOENT: the kernel has no such family.
    pub fn open(family: &str, version: u8) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::NetlinkGeneric;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        let mut socket = Self {
            fd,
            family: CONTROLLER,
            version: 1,
        };
        let name = [family.as_bytes(), &[0]].concat();
        let name = Attributes::default().with(FAMILY_NAME, &name);
        let answers = socket.ask(ACK, GET_FAMILY, &name)?;
        let id = answers.iter().find_map(|answer| {
            let (_, value) = attributes(answer).find(|(kind, _)| *kind == FAMILY_ID)?;
            value.first_chunk().map(|id| u16::from_ne_bytes(*id))
        });
        socket.family = id.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        socket.version = version;
        Ok(socket)
    }

    /// Asks for all that there is; the attributes of each message.
    pub fn dump(&self, command: u8, attributes: &Attributes) -> io::Result<Vec<Vec<u8>>> {
        self.ask(DUMP, command, attributes)
    }

    /// Tells, and waits until it is done.
    pub fn tell(&self, command: u8, attributes: &Attributes) -> io::Result<()> {
        self.ask(ACK, command, attributes).map(drop)
    }

    fn ask(&self, flags: u16, command: u8, attributes: &Attributes) -> io::Result<Vec<Vec<u8>>> {
        let bytes = request(self.family, flags, command, self.version, attributes);
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.fd.as_raw_fd(), &bytes, &kernel, MsgFlags::empty())?;
        let mut messages = Vec::new();
        let mut buffer = vec![0; ANSWER_MAX];
        loop {
            let length = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let answer = parse(&buffer[..length]);
            messages.extend(answer.messages);
            if let Some(errno) = answer.refused {
                return Err(io::Error::from_raw_os_error(errno));
            }
            if answer.is_end {
                return Ok(messages);
            }
            if messages.len() > ANSWER_COUNT_MAX {
                return Err(io::Error::other("the kernel's answer does not end"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_controller_knows_itself_and_no_nonsense() {
        assert_eq!(Socket::open("nlctrl", 2).unwrap().family, CONTROLLER);
        let error = Socket::open("no-such-family", 1).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }

    proptest! {
        #[test]
        fn attributes_are_read_as_they_were_written(
            all in proptest::collection::vec((0_u16..0x3fff, proptest::collection::vec(any::<u8>(), 0..40)), 0..20),
        ) {
            let written = all.iter().fold(Attributes::default(), |a, (kind, value)| a.with(*kind, value));
            let read: Vec<_> = attributes(&written.0).map(|(kind, value)| (kind, value.to_vec())).collect();
            prop_assert_eq!(&read, &all);
            let outer = Attributes::default().with_nested(7, &written);
            let (kind, inside) = attributes(&outer.0).next().unwrap();
            prop_assert_eq!((kind, attributes(inside).count()), (7, all.len()));
        }

        #[test]
        fn nothing_that_comes_is_too_much(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
            prop_assert!(attributes(&bytes).count() <= 50);
        }
    }
}
