//! The feed's content digest: do both ends of a stream hold the same items?
//!
//! The digest of a set is the XOR of a 64-bit hash of each item's bytes as sent (an encoded
//! `proto::Item`, which starts with its key), so both sides keep it with two operations per change
//! and the order of changes does not matter. It finds faults of ours and of memory; it is no
//! defence against an adversary, who would have to be inside the mTLS stream anyway.
//!
//! The hash is SHA-256 cut to 8 bytes: specified for ever, already linked for image digests, and
//! a backend (51 bytes) is one block, so 30,000 of them cost milliseconds.

use sha2::{Digest as _, Sha256};

/// The XOR of the hashes of a set of items.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Digest(u64);

/// The hash of one encoded item: the first 8 bytes of its SHA-256, little endian.
pub fn item_hash(item: &[u8]) -> u64 {
    let hash = Sha256::digest(item);
    let mut first = [0u8; 8];
    first.copy_from_slice(&hash[..8]);
    u64::from_le_bytes(first)
}

impl Digest {
    /// Adds an item that is not in the set, or takes away one that is: XOR does both.
    pub fn toggle(&mut self, item_hash: u64) {
        self.0 ^= item_hash;
    }

    /// As it travels in `Commit`.
    pub fn value(self) -> u64 {
        self.0
    }
}

impl From<u64> for Digest {
    fn from(value: u64) -> Self {
        Self(value)
    }
}

impl FromIterator<u64> for Digest {
    fn from_iter<T: IntoIterator<Item = u64>>(hashes: T) -> Self {
        let mut digest = Self::default();
        for hash in hashes {
            digest.toggle(hash);
        }
        digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn item_hash_is_truncated_sha256() {
        // SHA-256 of the empty string starts e3b0c442 98fc1c14.
        assert_eq!(
            item_hash(b""),
            u64::from_le_bytes([0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14])
        );
    }

    #[test]
    fn digest_ignores_order_and_forgets_removed_items() {
        let (a, b) = (item_hash(b"a"), item_hash(b"b"));
        let mut digest: Digest = [a, b].into_iter().collect();
        assert_eq!(digest, [b, a].into_iter().collect());
        digest.toggle(a);
        assert_eq!(digest.value(), b);
    }
}
