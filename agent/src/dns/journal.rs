//! The datagrams whose answers are being waited for, in a file of `/run`.
//!
//! ```text
//! socket ─ look ─► answered at once ───────────────────────────► taken from the socket
//!             └──► upstream is asked: written here ─► taken ─► answered ─► blanked here
//! ```
//! A query is in the socket, here, or answered: so whenever the agent is killed, the next one finds
//! it. The file is on tmpfs; no write waits for a disk. Slots have a fixed size, the lowest free one
//! is used, so that the file stays as small as the number of queries at a time.
//!
//! A slot: length (2 bytes, 0 is free), port (2), address (16, v4 mapped), the query.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::hold::lock;

/// Datagrams waiting for upstream at the same time.
pub(super) const SLOT_COUNT: u16 = 1024;
/// Divides a page: a write that is killed between two pages cannot tear a slot.
const SLOT_SIZE: usize = 512;
const HEAD_SIZE: usize = 20;

/// The file; without one nothing is remembered, and the number of slots still bounds.
pub(super) struct Journal {
    file: Option<File>,
    free: Mutex<BTreeSet<u16>>,
}

/// A place in it. Dropped without [`Slot::clear`] (the agent ends) it stays for the next agent.
pub(super) struct Slot {
    journal: Arc<Journal>,
    index: u16,
}

/// A query that an earlier agent left.
pub(super) struct Left {
    pub(super) slot: Slot,
    pub(super) client: SocketAddr,
    pub(super) request: Vec<u8>,
}

impl Journal {
    /// Without memory.
    pub(super) fn none() -> Arc<Self> {
        Arc::new(Self {
            file: None,
            free: Mutex::new((0..SLOT_COUNT).collect()),
        })
    }

    /// The file, made if it is not there, and what is in it.
    pub(super) fn open(path: &Path) -> io::Result<(Arc<Self>, Vec<Left>)> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.mode(0o600).open(path)?;
        let text = std::fs::read(path)?;
        let journal = Arc::new(Self {
            file: Some(file),
            free: Mutex::new((0..SLOT_COUNT).collect()),
        });
        let mut left = Vec::new();
        for (index, raw) in (0..SLOT_COUNT).zip(text.chunks(SLOT_SIZE)) {
            if let Some((client, request)) = decode(raw) {
                lock(&journal.free).remove(&index);
                let slot = Slot {
                    journal: journal.clone(),
                    index,
                };
                left.push(Left {
                    slot,
                    client,
                    request,
                });
            }
        }
        Ok((journal, left))
    }

    /// A free slot with that query in it; none when all are taken. A query too long for a slot has
    /// one, but is not remembered.
    pub(super) fn note(self: &Arc<Self>, client: SocketAddr, request: &[u8]) -> Option<Slot> {
        let index = lock(&self.free).pop_first()?;
        let slot = Slot {
            journal: self.clone(),
            index,
        };
        if let Some(raw) = encode(client, request) {
            slot.write(&raw);
        }
        Some(slot)
    }
}

impl Slot {
    /// It is answered.
    pub(super) fn clear(self) {
        self.write(&[0; 2]);
    }

    fn write(&self, bytes: &[u8]) {
        if let Some(file) = &self.journal.file
            && let Err(error) = file.write_all_at(bytes, u64::from(self.index) * SLOT_SIZE as u64)
        {
            tracing::debug!(%error, "the resolver's file of queries in work");
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        lock(&self.journal.free).insert(self.index);
    }
}

fn encode(client: SocketAddr, request: &[u8]) -> Option<Vec<u8>> {
    if request.is_empty() || request.len() > SLOT_SIZE - HEAD_SIZE {
        return None;
    }
    let address = match client.ip() {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    let mut raw = Vec::with_capacity(HEAD_SIZE + request.len());
    raw.extend_from_slice(&(request.len() as u16).to_be_bytes());
    raw.extend_from_slice(&client.port().to_be_bytes());
    raw.extend_from_slice(&address.octets());
    raw.extend_from_slice(request);
    Some(raw)
}

/// None: free, or torn.
fn decode(raw: &[u8]) -> Option<(SocketAddr, Vec<u8>)> {
    let (head, rest) = raw.split_at_checked(HEAD_SIZE)?;
    let length = usize::from(u16::from_be_bytes([head[0], head[1]]));
    let port = u16::from_be_bytes([head[2], head[3]]);
    let address = <[u8; 16]>::try_from(&head[4..]).ok()?;
    let request = rest.get(..length).filter(|request| !request.is_empty())?;
    let address = Ipv6Addr::from(address).to_canonical();
    Some((SocketAddr::new(address, port), request.to_vec()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_next_agent_finds_what_was_not_answered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("in-flight");
        let (journal, left) = Journal::open(&path).unwrap();
        assert!(left.is_empty());
        let client: SocketAddr = "10.244.0.5:4242".parse().unwrap();
        let first = journal.note(client, b"first").unwrap();
        let second = journal
            .note("[fd00::5]:53".parse().unwrap(), b"second")
            .unwrap();
        let third = journal.note(client, b"third").unwrap();
        let long = journal.note(client, &[1; SLOT_SIZE]).unwrap();
        second.clear();
        // Killed: nothing else is written.
        std::mem::forget((first, third, long));
        let (journal, left) = Journal::open(&path).unwrap();
        let found: Vec<_> = left
            .iter()
            .map(|left| (left.client, left.request.as_slice()))
            .collect();
        assert_eq!(found, [(client, &b"first"[..]), (client, &b"third"[..])]);
        // New ones do not write over what is being answered again.
        let slot = journal.note(client, b"fourth").unwrap();
        assert_eq!(slot.index, 1);
        left.into_iter().for_each(|left| left.slot.clear());
        slot.clear();
        assert!(Journal::open(&path).unwrap().1.is_empty());
    }

    #[test]
    fn the_number_of_slots_bounds() {
        let journal = Journal::none();
        let client: SocketAddr = "10.244.0.5:4242".parse().unwrap();
        let mut slots: Vec<_> = (0..SLOT_COUNT)
            .map(|_| journal.note(client, b"q").unwrap())
            .collect();
        assert!(journal.note(client, b"q").is_none());
        slots.pop().unwrap().clear();
        assert!(journal.note(client, b"q").is_some());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            address in any::<std::net::Ipv4Addr>(), port: u16,
            request in proptest::collection::vec(any::<u8>(), 1..=SLOT_SIZE - HEAD_SIZE),
        ) {
            let client = SocketAddr::new(address.into(), port);
            let mut raw = encode(client, &request).unwrap();
            raw.resize(SLOT_SIZE, 7);
            prop_assert_eq!(decode(&raw), Some((client, request)));
        }

        /// A file of anything is read without harm.
        #[test]
        fn any_slot_is_read(raw in proptest::collection::vec(any::<u8>(), 0..SLOT_SIZE)) {
            if let Some((_, request)) = decode(&raw) {
                prop_assert!(!request.is_empty() && request.len() <= SLOT_SIZE - HEAD_SIZE);
            }
        }
    }
}
