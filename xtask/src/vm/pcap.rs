//! The last frames that a switch has seen, for when something fails: a ring in memory, written as a pcap
//! file that tcpdump and Wireshark open.
//!
//! Invariant: memory is bounded, by bytes; a frame keeps its length and its first [`SNAP`] bytes.
//!
//! Source: IETF draft-ietf-opsawg-pcap (magic 0xa1b2c3d4: microseconds, the writer's byte order).

use std::collections::VecDeque;
use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes kept of a frame: all headers of a tunnelled packet, and the begin of what it carries.
pub const SNAP: usize = 256;
/// Bytes kept of all frames.
const ROOM: usize = 8 << 20;
/// What a frame costs beside its bytes.
const OVERHEAD: usize = 64;
const MAGIC: u32 = 0xa1b2_c3d4;
const ETHERNET: u32 = 1;

/// See the module.
#[derive(Default)]
pub struct Ring {
    frames: VecDeque<Kept>,
    bytes: usize,
}

struct Kept {
    at: Duration,
    length: usize,
    first: Box<[u8]>,
}

impl Ring {
    /// Notes a frame, and forgets the oldest when there is no more room.
    pub fn put(&mut self, frame: &[u8]) {
        let first = frame.get(..SNAP).unwrap_or(frame);
        let at = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        self.bytes += first.len() + OVERHEAD;
        self.frames.push_back(Kept {
            at,
            length: frame.len(),
            first: first.into(),
        });
        while self.bytes > ROOM {
            let Some(oldest) = self.frames.pop_front() else {
                return;
            };
            self.bytes -= oldest.first.len() + OVERHEAD;
        }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Whether these bytes are in what is kept of a frame.
    pub fn holds(&self, wanted: &[u8]) -> bool {
        let mut frames = self.frames.iter();
        !wanted.is_empty()
            && frames.any(|kept| kept.first.windows(wanted.len()).any(|part| part == wanted))
    }

    /// Writes all of it as a pcap file.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        // Version 2.4, then time zone and accuracy, which nobody uses.
        for word in [MAGIC, 2 | 4 << 16, 0, 0, SNAP as u32, ETHERNET] {
            to.write_all(&word.to_ne_bytes())?;
        }
        for kept in &self.frames {
            let words = [
                kept.at.as_secs() as u32,
                kept.at.subsec_micros(),
                kept.first.len() as u32,
                u32::try_from(kept.length).unwrap_or(u32::MAX),
            ];
            for word in words {
                to.write_all(&word.to_ne_bytes())?;
            }
            to.write_all(&kept.first)?;
        }
        to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn a_reader_finds_every_frame_by_its_header() {
        let mut ring = Ring::default();
        ring.put(&[1; 60]);
        ring.put(&[2; 1514]);
        let mut file = Vec::new();
        ring.write(&mut file).unwrap();
        assert_eq!((word(&file, 0), word(&file, 20)), (MAGIC, ETHERNET));
        assert_eq!(
            file[4..8],
            [2u16.to_ne_bytes(), 4u16.to_ne_bytes()].concat()
        );
        let mut at = 24;
        let mut seen = Vec::new();
        while at < file.len() {
            let (kept, length) = (word(&file, at + 8) as usize, word(&file, at + 12));
            seen.push((kept, length, file[at + 16]));
            at += 16 + kept;
        }
        assert_eq!(at, file.len());
        assert_eq!(seen, [(60, 60, 1), (SNAP, 1514, 2)]);
    }

    #[test]
    fn the_oldest_go_when_there_is_no_room() {
        let mut ring = Ring::default();
        let count = ROOM / (SNAP + OVERHEAD) + 10;
        for number in 0..count {
            ring.put(&[number as u8; 2000]);
        }
        assert!(ring.bytes <= ROOM && ring.frames.len() < count);
        assert_eq!(ring.frames.back().unwrap().first[0], (count - 1) as u8);
    }
}
