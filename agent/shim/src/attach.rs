//! Readers of a container's output beside its log.
//!
//! ```text
//! stream ── read ──► log, always
//!               └──► each attachment's pipe: taken ─► next read
//!                                            full ──► the stream is not read until the pipe has room,
//!                                                     at most 5 s; then the attachment is dropped
//! ```
//! Invariants: what a reader gets has no hole up to its end; no reader stops a container for
//! longer than [`STALL_MS_MAX`]; an ended container waits for no reader at all.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::sys;

/// A reader that takes nothing for so long is dropped: the container goes on.
pub(crate) const STALL_MS_MAX: u64 = 5_000;
/// Only an ended container's last words pile up: what its processes wrote before they were gone.
const PENDING_BYTES_MAX: usize = 1 << 20;
/// Attachments to one run at a time.
pub(crate) const ATTACHMENT_COUNT_MAX: usize = 16;

/// One stream's way to one reader.
struct Sink {
    /// A pipe's write end, non-blocking.
    fd: OwnedFd,
    /// Read from the container and not yet taken.
    pending: Vec<u8>,
    /// Since when it is not.
    stalled_ms: Option<u64>,
}

/// What the flush of a sink left.
#[derive(PartialEq, Eq)]
enum Flushed {
    All,
    Some,
    ReaderGone,
}

impl Sink {
    fn flush(&mut self) -> Flushed {
        while !self.pending.is_empty() {
            match sys::write(self.fd.as_fd(), &self.pending) {
                Ok(n) => {
                    self.pending.drain(..n);
                    self.stalled_ms = None;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Flushed::Some,
                Err(_) => return Flushed::ReaderGone,
            }
        }
        Flushed::All
    }
}

/// One reader: of stdout, and of stderr where the container has no terminal.
pub(crate) struct Attachment {
    /// Whose it is.
    pub(crate) connection: u32,
    /// The request that made it.
    pub(crate) id: u64,
    sinks: [Sink; 2],
}

impl Attachment {
    /// Takes the write ends of two pipes.
    pub(crate) fn new(connection: u32, id: u64, stdout: OwnedFd, stderr: OwnedFd) -> Self {
        let sink = |fd: OwnedFd| {
            sys::set_nonblocking(fd.as_fd());
            Sink {
                fd,
                pending: Vec::new(),
                stalled_ms: None,
            }
        };
        Self {
            connection,
            id,
            sinks: [sink(stdout), sink(stderr)],
        }
    }

    fn sink(&mut self, stream: &str) -> &mut Sink {
        &mut self.sinks[usize::from(stream == "stderr")]
    }

    /// Gives the reader what was read from `stream`; false: it has gone.
    pub(crate) fn offer(&mut self, stream: &str, data: &[u8], now_ms: u64) -> bool {
        let sink = self.sink(stream);
        if sink.pending.len() > PENDING_BYTES_MAX {
            return false;
        }
        sink.pending.extend_from_slice(data);
        match sink.flush() {
            Flushed::ReaderGone => false,
            Flushed::All => true,
            Flushed::Some => {
                sink.stalled_ms.get_or_insert(now_ms);
                true
            }
        }
    }

    /// Tries again what was not taken; false: the reader has gone, or takes nothing.
    pub(crate) fn retry(&mut self, now_ms: u64) -> bool {
        self.sinks.iter_mut().all(|sink| match sink.flush() {
            Flushed::ReaderGone => false,
            Flushed::All => true,
            Flushed::Some => {
                let since = *sink.stalled_ms.get_or_insert(now_ms);
                now_ms < since + STALL_MS_MAX
            }
        })
    }

    /// This pipe has to take something before `stream` is read again.
    pub(crate) fn full(&self, stream: &str) -> bool {
        !self.sinks[usize::from(stream == "stderr")]
            .pending
            .is_empty()
    }

    /// The pipes that have not taken everything.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &OwnedFd> {
        let waiting = self.sinks.iter().filter(|sink| !sink.pending.is_empty());
        waiting.map(|sink| &sink.fd)
    }

    /// When [`Self::retry`] gives up, if something is waiting.
    pub(crate) fn deadline_ms(&self) -> Option<u64> {
        let stalled = self.sinks.iter().filter_map(|sink| sink.stalled_ms);
        stalled.min().map(|since| since + STALL_MS_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    fn attached() -> (Attachment, File, File) {
        let (out, stdout) = sys::pipe().unwrap();
        let (err, stderr) = sys::pipe().unwrap();
        (
            Attachment::new(1, 2, stdout, stderr),
            out.into(),
            err.into(),
        )
    }

    #[test]
    fn a_reader_gets_every_byte_of_its_stream_in_order() {
        let (mut attachment, mut out, mut err) = attached();
        assert!(attachment.offer("stderr", b"oops", 0));
        let data: Vec<u8> = (0..200_000_u32).map(|i| (i % 251) as u8).collect();
        let mut got = Vec::new();
        let mut buffer = [0; 4096];
        for part in data.chunks(8192) {
            assert!(attachment.offer("stdout", part, 0));
            while attachment.full("stdout") {
                let n = out.read(&mut buffer).unwrap();
                got.extend_from_slice(&buffer[..n]);
                assert!(attachment.retry(1));
            }
        }
        drop(attachment);
        while let Ok(n @ 1..) = out.read(&mut buffer) {
            got.extend_from_slice(&buffer[..n]);
        }
        assert!(got == data);
        assert_eq!(err.read(&mut buffer).unwrap(), 4);
    }

    #[test]
    fn a_reader_that_takes_nothing_is_given_up_and_one_that_left_is_noticed() {
        let (mut attachment, out, _err) = attached();
        let full = vec![7; 1 << 20];
        assert!(attachment.offer("stdout", &full, 100));
        assert!(attachment.full("stdout") && !attachment.full("stderr"));
        assert_eq!(attachment.waiting().count(), 1);
        assert_eq!(attachment.deadline_ms(), Some(100 + STALL_MS_MAX));
        assert!(attachment.retry(100 + STALL_MS_MAX - 1));
        assert!(!attachment.retry(100 + STALL_MS_MAX));
        drop(out);
        assert!(!attachment.retry(101));
    }
}
