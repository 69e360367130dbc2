//! `gantry-shim hold <directory>`: keeps sockets open that must outlive the agent.
//!
//! ```text
//! list          ──► names <name>...          what is kept
//! take <name>   ──► kept (fd) | none         a copy: it stays here too
//! keep <name> (fd), drop <name> ──►          not answered
//! end           ──► done                     and the process ends
//! ```
//! The agent's resolver listens on sockets that are also here. When the agent is killed or replaced,
//! they go on existing: queries wait in them instead of being refused, and the next agent takes them
//! up. Until then queries over UDP are answered here, as far as that goes (`stand_in.rs`).
//!
//! A message is one `SOCK_SEQPACKET` datagram, its fields separated by NUL. What was sent before an
//! agent died is done before the next one is heard: connections are served before new ones are
//! accepted.
//!
//! Bounded: [`KEPT_MAX`] descriptors, [`CONNECTIONS_MAX`] connections, names of [`NAME_BYTES_MAX`].

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use gantry_shim::wire::MESSAGE_BYTES_MAX;

use crate::stand_in::StandIn;
use crate::sys;

/// Two listeners, and the TCP connections whose questions are being answered.
const KEPT_MAX: usize = 300;
/// One agent; another that is starting; somebody who ends it.
const CONNECTIONS_MAX: usize = 4;
const NAME_BYTES_MAX: usize = 48;
/// How often, without an agent, it looks whether its directory is still there.
const ALONE_MS: i32 = 10_000;
/// How often it looks for what upstream did not answer.
const RELAY_MS: i32 = 100;
/// What the socket for datagrams is called.
const DATAGRAMS: &str = "udp ";

/// What is kept, and for whom.
pub(crate) struct Hold {
    listener: OwnedFd,
    connections: Vec<OwnedFd>,
    kept: Vec<(String, OwnedFd)>,
    stand_in: Option<StandIn>,
    ended: bool,
}

impl Hold {
    pub(crate) fn new(listener: OwnedFd) -> Self {
        Self {
            listener,
            connections: Vec::new(),
            kept: Vec::new(),
            stand_in: None,
            ended: false,
        }
    }

    /// Until told to end.
    pub(crate) fn serve(&mut self) {
        while !self.ended {
            let is_alone = self.connections.is_empty();
            if is_alone && self.stand_in.is_none() {
                self.stand_in = self.stand_in();
            }
            let stand_in = self
                .stand_in
                .iter()
                .flat_map(|stand_in| stand_in.fds(is_alone));
            let sources = std::iter::once(&self.listener).chain(&self.connections);
            let sources = sources.map(|fd| fd.as_raw_fd()).chain(stand_in);
            let mut fds: Vec<libc::pollfd> = sources
                .map(|fd| libc::pollfd {
                    fd,
                    events: libc::POLLIN,
                    revents: 0,
                })
                .collect();
            let is_idle = self.stand_in.as_ref().is_none_or(StandIn::is_idle);
            let patience_ms = match (is_idle, is_alone) {
                (false, _) => RELAY_MS,
                (true, true) => ALONE_MS,
                // With an agent connected only what it says matters.
                (true, false) => -1,
            };
            sys::poll(&mut fds, patience_ms);
            // The directory was removed: no agent will ever find us.
            self.ended |= std::fs::metadata(".").is_ok_and(|m| m.nlink() == 0);
            for index in (0..self.connections.len()).rev() {
                if fds[index + 1].revents != 0 && !self.hear(index) {
                    self.connections.remove(index);
                }
            }
            if fds[0].revents != 0
                && let Ok(connection) = sys::accept(self.listener.as_fd())
                && self.connections.len() < CONNECTIONS_MAX
            {
                self.connections.push(connection);
            }
            // An agent that is there reads the queries itself.
            let is_alone = self.connections.is_empty();
            if let Some(stand_in) = &mut self.stand_in {
                stand_in.work(is_alone);
            }
            if !is_alone {
                self.stand_in.take_if(|stand_in| stand_in.is_idle());
            }
        }
    }

    fn stand_in(&self) -> Option<StandIn> {
        let (_, socket) = self
            .kept
            .iter()
            .find(|(name, _)| name.starts_with(DATAGRAMS))?;
        StandIn::new(socket.try_clone().ok()?.into())
    }

    /// Everything that a connection has said; false when it has gone.
    fn hear(&mut self, index: usize) -> bool {
        let mut buffer = [0; MESSAGE_BYTES_MAX];
        loop {
            let connection = &self.connections[index];
            let (length, fds) = match sys::receive(connection.as_fd(), &mut buffer) {
                Ok((0, _)) => return false,
                Ok(received) => received,
                Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
            };
            let text = String::from_utf8_lossy(&buffer[..length]);
            let (verb, name) = text.split_once('\0').unwrap_or((&text, ""));
            let (answer, fd) = match verb {
                "list" => {
                    let names = self.kept.iter().map(|(name, _)| format!("\0{name}"));
                    (format!("names{}", names.collect::<String>()), None)
                }
                "take" => match self.kept.iter().find(|(kept, _)| kept == name) {
                    Some((_, fd)) => ("kept".to_owned(), Some(fd.as_fd())),
                    None => ("none".to_owned(), None),
                },
                "end" => {
                    self.ended = true;
                    ("done".to_owned(), None)
                }
                _ => {
                    self.change(verb, name.to_owned(), fds);
                    continue;
                }
            };
            // A peer that does not read is none.
            if sys::send(connection.as_fd(), answer.as_bytes(), fd).is_err() {
                return false;
            }
        }
    }

    fn change(&mut self, verb: &str, name: String, mut fds: Vec<OwnedFd>) {
        if !matches!(verb, "keep" | "drop") {
            return;
        }
        self.kept.retain(|(kept, _)| *kept != name);
        if verb == "keep"
            && self.kept.len() < KEPT_MAX
            && name.len() <= NAME_BYTES_MAX
            && let Some(fd) = fds.pop()
        {
            self.kept.push((name, fd));
        }
    }
}
