//! What may come from outside, read by the code that reads it: nothing panics, and what was taken is stable.
//!
//! ```text
//!  tests/fuzz/fuzz_targets/*.rs (cargo-fuzz, libFuzzer) ─┐
//!                                                        ├─► target(bytes)        bodies: here
//!  cargo test: corpus + seeded mutations ────────────────┘                        corpus: tests/fuzz/corpus
//! ```
//! A target takes any bytes and returns; a panic, an overflow or a broken property is a finding. An input
//! that found something is committed to the corpus, and so is run for ever.

use std::sync::OnceLock;

use bytes::Bytes;
use gantry_api::proto;
use gantry_control::store::backup::Reader;
use gantry_control::store::{Store, Txn};
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

/// A small store, made once.
fn template() -> &'static [u8] {
    static TEMPLATE: OnceLock<Vec<u8>> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("store.redb");
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("a runtime").block_on(async {
            let store = Store::open(&path).expect("a new store");
            for number in 0..40 {
                let key = format!("/registry/pods/default/p{}", number % 25);
                let txn = match number % 7 {
                    6 => Txn::new().delete(key.as_str()),
                    _ => Txn::new().put(key.as_str(), format!("{{\"n\": {number}}}")),
                };
                store.commit(txn).await.expect("a commit");
            }
            store.close().await;
        });
        std::fs::read(&path).expect("the store's file")
    })
}

/// With `R` in front: a backup. Else: changes to the file of a small store, five bytes each (where, xor),
/// and with a `T` in front of them the file is cut where the first one says.
pub fn store_files(data: &[u8]) {
    if let Some(backup) = data.strip_prefix(b"R") {
        if let Ok(mut reader) = Reader::new(backup, None) {
            while let Ok(Some(_)) = reader.read() {}
        }
        return;
    }
    let (is_cut, changes) = match data.strip_prefix(b"T") {
        Some(changes) => (true, changes),
        None => (false, data),
    };
    let mut file = template().to_vec();
    for (number, change) in changes.chunks_exact(5).enumerate() {
        let place = u32::from_le_bytes([change[0], change[1], change[2], change[3]]);
        let place = place as usize % file.len();
        if is_cut && number == 0 {
            file.truncate(place.max(1));
        } else {
            file[place] ^= change[4];
        }
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("store.redb");
    std::fs::write(&path, file).expect("a file");
    if let Ok(store) = Store::open(&path) {
        store.list("/");
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
