//! Answers names while no agent is connected: addresses of the cluster from the agent's last file
//! ([`names`]), other names by asking upstream the same.
//!
//! ```text
//! agent gone ─► read the file ─► each query: reply | relay ─► upstream's answer ─► client
//! agent there ─► no query is read any more; what is on its way to upstream is still answered
//! ```
//! Bounded: [`RELAYS_MAX`] questions upstream, each asked [`TRIES_MAX`] times.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

use gantry_shim::names::{self, Answer};

use crate::sys;

/// Questions on their way to upstream at the same time.
const RELAYS_MAX: usize = 64;
const TRIES_MAX: usize = 3;
/// For one try: all of them are over before a client gives up.
const TRY_MS: u64 = 1500;
/// Queries answered between two looks at the agent's socket.
const BURST: usize = 64;
const DATAGRAM_SIZE_MAX: usize = 4096;

/// Stands in for the agent.
pub(crate) struct StandIn {
    socket: UdpSocket,
    text: String,
    upstreams: Vec<SocketAddr>,
    relays: Vec<Relay>,
}

/// A question on its way.
struct Relay {
    socket: UdpSocket,
    client: SocketAddr,
    query: Vec<u8>,
    id: [u8; 2],
    tries: usize,
    deadline_ms: u64,
}

impl StandIn {
    /// None without a file: then queries wait.
    pub(crate) fn new(socket: UdpSocket) -> Option<Self> {
        let text = std::fs::read_to_string(names::FILE).ok()?;
        let upstreams = names::field(&text, names::UPSTREAM);
        let upstreams = upstreams.filter_map(|text| text.parse().ok()).collect();
        Some(Self {
            socket,
            text,
            upstreams,
            relays: Vec::new(),
        })
    }

    /// What becomes readable: queries, then upstream's answers.
    pub(crate) fn fds(&self, reads: bool) -> impl Iterator<Item = RawFd> {
        let own = reads.then(|| self.socket.as_raw_fd());
        let relays = self.relays.iter().map(|relay| relay.socket.as_raw_fd());
        own.into_iter().chain(relays)
    }

    /// Nothing is on its way.
    pub(crate) fn is_idle(&self) -> bool {
        self.relays.is_empty()
    }

    /// Does what can be done without waiting.
    pub(crate) fn work(&mut self, reads: bool) {
        self.take_answers();
        let mut buffer = [0; DATAGRAM_SIZE_MAX];
        let burst = if reads { BURST } else { 0 };
        for _ in 0..burst {
            match self.socket.recv_from(&mut buffer) {
                Ok((size, client)) => self.answer(&buffer[..size], client),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // An earlier answer's.
                Err(_) => {}
            }
        }
        self.try_again();
    }

    fn answer(&mut self, query: &[u8], client: SocketAddr) {
        match names::answer(&self.text, query) {
            Answer::Silent => {}
            Answer::Reply(reply) => {
                let _ = self.socket.send_to(&reply, client);
            }
            // Beyond the bound the client asks again after its timeout.
            Answer::Relay if self.relays.len() >= RELAYS_MAX => {}
            Answer::Relay => {
                let query = query.to_vec();
                if let Some(relay) = ask(&self.upstreams, client, query, 0) {
                    self.relays.push(relay);
                }
            }
        }
    }

    fn take_answers(&mut self) {
        let mut buffer = [0; DATAGRAM_SIZE_MAX];
        let mut index = 0;
        while index < self.relays.len() {
            let relay = &mut self.relays[index];
            match relay.socket.recv(&mut buffer) {
                Ok(size) if relay.is_answered_by(&buffer[..size]) => {
                    buffer[..2].copy_from_slice(&relay.query[..2]);
                    let _ = self.socket.send_to(&buffer[..size], relay.client);
                    self.relays.swap_remove(index);
                    continue;
                }
                // A late or forged one: the right one may still come.
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // Refused: the next server.
                Err(_) => relay.deadline_ms = 0,
            }
            index += 1;
        }
    }

    fn try_again(&mut self) {
        let now = sys::monotonic_ms();
        let (waiting, over) = std::mem::take(&mut self.relays)
            .into_iter()
            .partition(|relay: &Relay| relay.deadline_ms > now);
        self.relays = waiting;
        for relay in over {
            let tries = relay.tries + 1;
            if tries < TRIES_MAX {
                let again = ask(&self.upstreams, relay.client, relay.query, tries);
                self.relays.extend(again);
            }
        }
    }
}

impl Relay {
    /// The same question, answered, with the id that only we and upstream know.
    fn is_answered_by(&self, answer: &[u8]) -> bool {
        let asked = &self.query;
        let mut end = 12;
        while asked.get(end).is_some_and(|size| *size != 0) {
            end += 1 + usize::from(asked[end]);
        }
        let end = (end + 5).min(asked.len());
        answer.len() >= end
            && answer[..2] == self.id
            && answer[2] & 0x80 != 0
            && answer[12..end].eq_ignore_ascii_case(&asked[12..end])
    }
}

/// Sends `query` to the server whose turn it is, from a socket and with an id of its own.
fn ask(
    upstreams: &[SocketAddr],
    client: SocketAddr,
    mut query: Vec<u8>,
    tries: usize,
) -> Option<Relay> {
    let server = upstreams.get(tries % upstreams.len().max(1))?;
    let any: IpAddr = match server {
        SocketAddr::V4(_) => IpAddr::from([0; 4]),
        SocketAddr::V6(_) => IpAddr::from([0; 16]),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(server).ok()?;
    socket.set_nonblocking(true).ok()?;
    let id = sys::random_u16().to_ne_bytes();
    let own = [query[0], query[1]];
    query[..2].copy_from_slice(&id);
    let _ = socket.send(&query);
    query[..2].copy_from_slice(&own);
    Some(Relay {
        socket,
        client,
        query,
        id,
        tries,
        deadline_ms: sys::monotonic_ms() + TRY_MS,
    })
}
