//! Secrets at rest: sealed by a key of the store, which is sealed by a key outside of it.
//!
//! ```text
//!  key file   one key a line; the first wraps, the others open what they have wrapped before
//!     │ wraps
//!  data keys  in the store, by number; the highest seals, the others open until nothing of theirs is left
//!     │ seals
//!  values     below [`SEALED_PREFIX`]
//! ```
//! AES-256-GCM with random nonces. A sealed value is bound to its key and revision, a data key to its number
//! and a backup: none can be put in the place of another. Whoever has the store's file, a copy of it or a
//! backup, and not the key file, learns the names, sizes and times of Secrets, and nothing of what is in them.
//!
//! Invariants: a key file is made only when nothing was sealed yet; a new key is in the file, durably, before
//! anything is sealed by it; no key leaves the file by itself, for old backups need it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha2::{Digest as _, Sha256};

use super::Revision;
use crate::pki::{PkiError, read_if_there, write_private};

/// Keys of the store whose values are sealed.
pub const SEALED_PREFIX: &str = "/registry/secrets/";
/// The key file below the data directory, if nobody says another.
pub const KEY_FILE: &str = "pki/store.key";

const KEY_BYTES: usize = 32;
const TAG_BYTES: usize = 16;
/// Lines of a key file.
const KEY_COUNT_MAX: usize = 64;

/// Why keys are not to be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] PkiError),
    /// The file is not what it should be.
    #[error("{path}: {reason}")]
    Bad {
        /// The key file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Something is sealed by a key that is not there.
    #[error("{what} is sealed by {keys}: give the right file with {flag}")]
    Missing {
        /// What cannot be opened.
        what: &'static str,
        /// The id of the key that could, and those that the file has.
        keys: String,
        /// Where the right one is given.
        flag: &'static str,
    },
    /// The key is right and the content is not.
    #[error("{what} cannot be opened by its own key {key}: it was changed since")]
    Changed {
        /// What cannot be opened.
        what: &'static str,
        /// The id of its key.
        key: String,
    },
    /// The cipher failed; not known to happen.
    #[error("cannot encrypt: the cipher failed")]
    Cipher,
}

/// A secret of 32 bytes; it prints as its id.
#[derive(Clone, PartialEq, Eq)]
pub struct WrappingKey([u8; KEY_BYTES]);

impl WrappingKey {
    fn make() -> WrappingKey {
        WrappingKey(random_bytes())
    }

    /// By which it is named: says nothing of the key itself.
    pub fn id(&self) -> String {
        let mut digest = Sha256::new();
        digest.update(b"gantry store key\n");
        digest.update(self.0);
        let digest = digest.finalize();
        digest[..4]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    fn cipher(&self) -> Result<RandomizedNonceKey, KeyError> {
        cipher(&self.0)
    }
}

impl fmt::Debug for WrappingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WrappingKey({})", self.id())
    }
}

fn random_bytes() -> [u8; KEY_BYTES] {
    rand::random()
}

fn cipher(key: &[u8; KEY_BYTES]) -> Result<RandomizedNonceKey, KeyError> {
    RandomizedNonceKey::new(&AES_256_GCM, key).map_err(|_| KeyError::Cipher)
}

/// nonce, ciphertext, tag
fn seal(cipher: &RandomizedNonceKey, bound_to: &[u8], clear: &[u8]) -> Result<Vec<u8>, KeyError> {
    let mut sealed = Vec::with_capacity(NONCE_LEN + clear.len() + TAG_BYTES);
    sealed.extend_from_slice(&[0; NONCE_LEN]);
    sealed.extend_from_slice(clear);
    let (nonce_place, text) = sealed.split_at_mut(NONCE_LEN);
    let (nonce, tag) = cipher
        .seal_in_place_separate_tag(Aad::from(bound_to), text)
        .map_err(|_| KeyError::Cipher)?;
    nonce_place.copy_from_slice(nonce.as_ref());
    sealed.extend_from_slice(tag.as_ref());
    Ok(sealed)
}

/// `None`: by another key, or changed.
fn open(cipher: &RandomizedNonceKey, bound_to: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
    let (nonce, text) = sealed.split_at_checked(NONCE_LEN)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
    let mut text = text.to_vec();
    let length = cipher
        .open_in_place(nonce, Aad::from(bound_to), &mut text)
        .ok()?
        .len();
    text.truncate(length);
    Some(text)
}

/// The keys of a key file.
#[derive(Clone, Debug)]
pub struct KeyFile {
    path: PathBuf,
    keys: Vec<WrappingKey>,
}

impl KeyFile {
    /// Reads the file; `None` when there is none.
    pub fn read(path: &Path) -> Result<Option<KeyFile>, KeyError> {
        let Some(text) = read_if_there(path)? else {
            return Ok(None);
        };
        let keys = parse(&text).map_err(|reason| KeyError::Bad {
            path: path.to_owned(),
            reason,
        })?;
        Ok(Some(KeyFile {
            path: path.to_owned(),
            keys,
        }))
    }

    /// Makes a file with one new key.
    pub fn make(path: &Path) -> Result<KeyFile, KeyError> {
        let file = KeyFile {
            path: path.to_owned(),
            keys: vec![WrappingKey::make()],
        };
        file.write()?;
        tracing::info!(path = %path.display(), key = file.first().id(), "made the store's key");
        Ok(file)
    }

    /// The file, made if nothing can have been sealed by what is lost.
    pub fn read_or_make(path: &Path, may_make: bool) -> Result<KeyFile, KeyError> {
        match KeyFile::read(path)? {
            Some(file) => Ok(file),
            None if may_make => KeyFile::make(path),
            None => Err(KeyError::Bad {
                path: path.to_owned(),
                reason: "is not there, and the store's Secrets are sealed by a key in it: put it back, or \
                         give its place with --store-key"
                    .to_owned(),
            }),
        }
    }

    fn write(&self) -> Result<(), KeyError> {
        let mut text = String::from(
            "# Opens the Secrets of Gantry's store and backups. The first key seals; those below open what is older.\n",
        );
        for key in &self.keys {
            text.push_str(&BASE64.encode(key.0));
            text.push('\n');
        }
        Ok(write_private(&self.path, text.as_bytes())?)
    }

    /// Puts a new key first. It is on the disk when this returns.
    pub fn rotate(&self) -> Result<KeyFile, KeyError> {
        let mut keys = vec![WrappingKey::make()];
        keys.extend(self.keys.iter().take(KEY_COUNT_MAX - 1).cloned());
        let file = KeyFile {
            path: self.path.clone(),
            keys,
        };
        file.write()?;
        Ok(file)
    }

    /// The key that wraps. There is one.
    pub fn first(&self) -> &WrappingKey {
        &self.keys[0]
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The ids of all keys, for people.
    fn ids(&self) -> String {
        let ids: Vec<String> = self.keys.iter().map(WrappingKey::id).collect();
        ids.join(", ")
    }
}

/// At least one key.
fn parse(text: &str) -> Result<Vec<WrappingKey>, String> {
    let mut keys = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let key = BASE64.decode(line).ok().and_then(|key| key.try_into().ok());
        // The line itself may be most of a key: it is not shown.
        let key = key.ok_or_else(|| {
            let number = number + 1;
            format!("line {number} is no key: 32 bytes in base64 are (`head -c 32 /dev/urandom | base64`)")
        })?;
        keys.push(WrappingKey(key));
    }
    match keys.len() {
        0 => Err(
            "has no key: put one back, or remove the file if nothing was ever sealed".to_owned(),
        ),
        1..=KEY_COUNT_MAX => Ok(keys),
        count => Err(format!("has {count} keys, the limit is {KEY_COUNT_MAX}")),
    }
}

/// A data key as it is kept: sealed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Wrapped {
    /// The id of the key that opens it.
    pub by: String,
    /// nonce, ciphertext, tag; base64
    pub key: String,
}

/// A key that seals values, opened.
pub struct DataKey {
    bytes: [u8; KEY_BYTES],
    cipher: RandomizedNonceKey,
}

impl DataKey {
    /// A new one.
    pub fn make() -> Result<DataKey, KeyError> {
        DataKey::of(random_bytes())
    }

    fn of(bytes: [u8; KEY_BYTES]) -> Result<DataKey, KeyError> {
        let cipher = cipher(&bytes)?;
        Ok(DataKey { bytes, cipher })
    }

    /// Sealed by `by`, for this purpose alone.
    pub fn wrap(&self, by: &WrappingKey, purpose: &str) -> Result<Wrapped, KeyError> {
        let sealed = seal(&by.cipher()?, purpose.as_bytes(), &self.bytes)?;
        Ok(Wrapped {
            by: by.id(),
            key: BASE64.encode(sealed),
        })
    }

    /// Opens what `wrap` made for the same purpose.
    pub fn unwrap(
        wrapped: &Wrapped,
        file: &KeyFile,
        purpose: &str,
        (what, flag): (&'static str, &'static str),
    ) -> Result<DataKey, KeyError> {
        let key = file.keys.iter().find(|key| key.id() == wrapped.by);
        let key = key.ok_or_else(|| KeyError::Missing {
            what,
            keys: format!(
                "key {}, and {} has {}",
                wrapped.by,
                file.path.display(),
                file.ids()
            ),
            flag,
        })?;
        let changed = || KeyError::Changed {
            what,
            key: wrapped.by.clone(),
        };
        let sealed = BASE64.decode(&wrapped.key).map_err(|_| changed())?;
        let bytes = open(&key.cipher()?, purpose.as_bytes(), &sealed).ok_or_else(changed)?;
        DataKey::of(bytes.try_into().map_err(|_| changed())?)
    }

    /// Seals a value for this place.
    pub fn seal(&self, bound_to: &[u8], clear: &[u8]) -> Result<Vec<u8>, KeyError> {
        seal(&self.cipher, bound_to, clear)
    }

    /// Opens what was sealed for this place; `None`: it was changed, or put here from elsewhere.
    pub fn open(&self, bound_to: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        open(&self.cipher, bound_to, sealed)
    }
}

/// To what a value is bound.
pub fn place(key: &str, revision: Revision) -> Vec<u8> {
    let mut place = revision.to_le_bytes().to_vec();
    place.extend_from_slice(key.as_bytes());
    place
}

/// For what a data key of a store is wrapped.
pub(super) fn purpose(number: u32) -> String {
    format!("data key {number} of a store")
}

/// A data key that is not in use yet.
pub(super) struct Next {
    pub(super) number: u32,
    /// To be kept.
    pub(super) wrapped: Wrapped,
    key: DataKey,
}

/// The data keys of a store, opened.
pub(super) struct DataKeys {
    keys: BTreeMap<u32, DataKey>,
    /// Seals; the highest.
    current: u32,
}

impl DataKeys {
    /// Opens those of a store; at least one.
    pub(super) fn open(
        wrapped: &BTreeMap<u32, Wrapped>,
        file: &KeyFile,
    ) -> Result<DataKeys, KeyError> {
        let mut keys = BTreeMap::new();
        for (number, wrapped) in wrapped {
            let what = ("the store's data key", "--store-key");
            let key = DataKey::unwrap(wrapped, file, &purpose(*number), what)?;
            keys.insert(*number, key);
        }
        let current = keys.keys().next_back().copied().unwrap_or_default();
        Ok(DataKeys { keys, current })
    }

    /// The number of the key that seals.
    pub(super) fn current(&self) -> u32 {
        self.current
    }

    /// Makes the next one; it seals nothing before [`DataKeys::take`].
    pub(super) fn next(&self, by: &WrappingKey) -> Result<Next, KeyError> {
        let number = self.current + 1;
        let key = DataKey::make()?;
        let wrapped = key.wrap(by, &purpose(number))?;
        Ok(Next {
            number,
            wrapped,
            key,
        })
    }

    /// Seals by this one from now on: its wrapped form is durable.
    pub(super) fn take(&mut self, next: Next) {
        self.keys.insert(next.number, next.key);
        self.current = next.number;
    }

    /// None at all: [`DataKeys::next`] follows.
    pub(super) fn none() -> DataKeys {
        DataKeys {
            keys: BTreeMap::new(),
            current: 0,
        }
    }

    /// Forgets all but the one that seals; returns their numbers.
    pub(super) fn retire(&mut self) -> Vec<u32> {
        let current = self.keys.split_off(&self.current);
        let old = std::mem::replace(&mut self.keys, current);
        old.into_keys().collect()
    }

    /// The number of the key, and the sealed value.
    pub(super) fn seal(&self, place: &[u8], clear: &[u8]) -> Result<(u32, Vec<u8>), KeyError> {
        let key = self.keys.get(&self.current).ok_or(KeyError::Cipher)?;
        Ok((self.current, key.seal(place, clear)?))
    }

    /// Opens a value; `None`: no such key, or it was changed.
    pub(super) fn open_value(&self, number: u32, place: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        self.keys.get(&number)?.open(place, sealed)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;

    use super::*;

    fn file(dir: &Path) -> KeyFile {
        KeyFile::make(&dir.join("store.key")).unwrap()
    }

    #[test]
    fn a_key_file_is_private_and_keeps_its_keys() {
        let dir = tempfile::tempdir().unwrap();
        let made = file(dir.path());
        let mode = std::fs::metadata(made.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let rotated = made.rotate().unwrap();
        let read = KeyFile::read(made.path()).unwrap().unwrap();
        assert_eq!(read.keys, rotated.keys);
        assert_eq!(read.keys[1], made.keys[0], "the old one stays");
        assert_ne!(read.first(), made.first());
        assert!(!format!("{made:?}").contains(&BASE64.encode(made.keys[0].0)));
        assert!(KeyFile::read(&dir.path().join("absent")).unwrap().is_none());
        assert!(KeyFile::read_or_make(&dir.path().join("absent"), false).is_err());
    }

    #[test]
    fn a_key_file_that_is_none_is_refused_without_showing_it() {
        for (text, words) in [
            ("", "no key"),
            ("# only words\n\n", "no key"),
            ("c2VjcmV0\n", "line 1"),
            ("not base64 at all\n", "line 1"),
        ] {
            let reason = parse(text).unwrap_err();
            assert!(reason.contains(words), "{reason}");
            assert!(!reason.contains("c2VjcmV0"));
        }
    }

    #[test]
    fn a_data_key_opens_by_its_own_key_for_its_own_purpose() {
        let dir = tempfile::tempdir().unwrap();
        let first = file(dir.path());
        let key = DataKey::make().unwrap();
        let wrapped = key.wrap(first.first(), "a").unwrap();
        let what = ("the backup", "--backup-key");
        let opened = DataKey::unwrap(&wrapped, &first.rotate().unwrap(), "a", what).unwrap();
        assert_eq!(
            opened.bytes, key.bytes,
            "also when it is no longer the first"
        );
        let error = |file: &KeyFile, purpose: &str| {
            DataKey::unwrap(&wrapped, file, purpose, what)
                .err()
                .unwrap()
                .to_string()
        };
        assert!(error(&first, "b").contains("changed since"));
        let other = KeyFile::make(&dir.path().join("other")).unwrap();
        let words = error(&other, "a");
        for part in [&wrapped.by, &other.first().id(), "--backup-key", "other"] {
            assert!(words.contains(part), "{words} lacks {part}");
        }
    }

    #[test]
    fn old_data_keys_open_until_they_are_retired() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(dir.path());
        let mut keys = DataKeys::none();
        let mut kept = BTreeMap::new();
        let mut add = |keys: &mut DataKeys| {
            let next = keys.next(file.first()).unwrap();
            kept.insert(next.number, next.wrapped.clone());
            keys.take(next);
        };
        assert!(keys.seal(b"place", b"value").is_err(), "no key yet");
        add(&mut keys);
        let (number, sealed) = keys.seal(b"place", b"value").unwrap();
        add(&mut keys);
        let mut keys = DataKeys::open(&kept, &file).unwrap();
        assert_eq!(keys.current(), 2);
        assert_eq!(
            keys.open_value(number, b"place", &sealed).unwrap(),
            b"value"
        );
        assert_eq!(keys.retire(), [1]);
        assert!(keys.open_value(number, b"place", &sealed).is_none());
        let (number, sealed) = keys.seal(b"place", b"value").unwrap();
        assert_eq!(
            keys.open_value(number, b"place", &sealed).unwrap(),
            b"value"
        );
    }

    proptest! {
        #[test]
        fn a_sealed_value_opens_in_its_place_and_unchanged_only(
            value in prop::collection::vec(any::<u8>(), 0..300), name in "[a-z]{1,9}", revision in 1_u64..1000,
            at in any::<prop::sample::Index>(), bit in 0..8_u32,
        ) {
            let key = DataKey::make().unwrap();
            let here = place(&name, revision);
            let sealed = key.seal(&here, &value).unwrap();
            prop_assert_eq!(sealed.len(), value.len() + NONCE_LEN + TAG_BYTES);
            prop_assert_eq!(key.open(&here, &sealed), Some(value.clone()));
            prop_assert_eq!(key.open(&place(&name, revision + 1), &sealed), None);
            prop_assert_eq!(key.open(&place("other-name", revision), &sealed), None);
            let mut changed = sealed.clone();
            changed[at.index(sealed.len())] ^= 1 << bit;
            prop_assert_eq!(key.open(&here, &changed), None);
            prop_assert_eq!(key.open(&here, &sealed[..at.index(sealed.len())]), None);
            let other = DataKey::make().unwrap();
            prop_assert_eq!(other.open(&here, &sealed), None);
            prop_assert_ne!(key.seal(&here, &value).unwrap(), sealed, "a nonce of its own each time");
        }
    }
}
