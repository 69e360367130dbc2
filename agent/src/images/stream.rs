//! A layer's bytes on their way to disk: counted, hashed, decompressed, hashed again.
//!
//! ```text
//! file ─► Counted (digest, size) ─► gzip | zstd | plain ─► Counted (diff ID, ceiling) ─► tar entries
//! ```
//! Everything is streamed: memory does not grow with the layer. The ceiling on decompressed bytes
//! stops a decompression bomb wherever it unfolds.

use std::io::{self, BufRead, BufReader, Read};

use sha2::{Digest as _, Sha256};

use super::reference::Digest;

/// A zstd frame may ask for 2^24 = 16 MiB of window; levels up to 19 use 8 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 24;
const BUFFER_BYTES: usize = 64 * 1024;

/// Counts and hashes what is read through it; more than `max` bytes are an error.
pub(super) struct Counted<R> {
    inner: R,
    hasher: Sha256,
    count: u64,
    max: u64,
    what: &'static str,
}

impl<R: Read> Counted<R> {
    pub(super) fn new(inner: R, max: u64, what: &'static str) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
            count: 0,
            max,
            what,
        }
    }

    /// Reads the rest, then tells the hash and the number of bytes.
    pub(super) fn finish(mut self) -> io::Result<(Digest, u64)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((Digest::from_hash(&self.hasher.finalize()), self.count))
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.count += n as u64;
        if self.count > self.max {
            return Err(io::Error::other(format!(
                "more than {} bytes of {}",
                self.max, self.what
            )));
        }
        self.hasher.update(&buf[..n]);
        Ok(n)
    }
}

/// How a stream is compressed, told by its first bytes: media types are often wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Compression {
    Gzip,
    Zstd,
    None,
}

impl Compression {
    pub(super) fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// The decompressed content of `input`.
pub(super) fn decompressed<'a>(input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut input = BufReader::with_capacity(BUFFER_BYTES, input);
    Ok(match Compression::of(input.fill_buf()?) {
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
        Compression::None => Box::new(input),
    })
}
