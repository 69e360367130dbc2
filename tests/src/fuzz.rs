//! What may come from outside, read by the code that reads it: nothing panics, and what was taken is stable.
//!
//! ```text
//!  tests/fuzz/fuzz_targets/*.rs (cargo-fuzz, libFuzzer) ─┐
//!                                                        ├─► target(bytes)        bodies: here
//!  cargo test: corpus + seeded mutations ────────────────┘                        corpus: tests/fuzz/corpus
//! ```
//! A target takes any bytes and returns; a panic, an overflow or a broken property is a finding. An input
//! that found something is committed to the corpus, and so is run for ever.

use bytes::Bytes;
use gantry_api::proto;
use gantry_control::store::backup::Reader;
use prost::Message as _;

mod api;
#[cfg(test)]
mod tests;

pub use api::{manifests, patches, quantities, selectors};

/// A target.
pub type Target = fn(&[u8]);

/// All of them, by the names of their corpora.
pub const TARGETS: [(&str, Target); 6] = [
    ("manifests", manifests),
    ("patches", patches),
    ("selectors", selectors),
    ("quantities", quantities),
    ("store_files", store_files),
    ("feed_messages", feed_messages),
];

/// A backup, as a restore reads it.
pub fn store_files(data: &[u8]) {
    let backup = data.strip_prefix(b"R").unwrap_or(data);
    if let Ok(mut reader) = Reader::new(backup, None) {
        while let Ok(Some(_)) = reader.read() {}
    }
}

/// A message of either side; an item of a commit; the agent's state file; a change of the store as the feed's
/// index takes it (`key`, a zero byte, value).
pub fn feed_messages(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let _ = proto::Up::decode(bytes.clone());
    let mut items = vec![bytes.clone()];
    if let Ok(proto::Down {
        message: Some(proto::down::Message::Batch(batch)),
    }) = proto::Down::decode(bytes.clone())
    {
        items.extend(batch.items);
    }
    if let Ok(batch) = proto::Batch::decode(bytes.clone()) {
        items.extend(batch.items);
    }
    items.retain(|item| proto::Item::decode(item.clone()).is_ok());
    gantry_agent::feed::read_untrusted(bytes.clone(), &items);
    if let Some(end) = data.iter().position(|byte| *byte == 0) {
        let key = String::from_utf8_lossy(&data[..end]).into_owned();
        let value = bytes.slice(end + 1..);
        let put = |value| (key.clone(), Some(value));
        let changes = [put(value.clone()), (key.clone(), None), put(value)];
        gantry_control::feed::index_untrusted(&changes);
    }
}
