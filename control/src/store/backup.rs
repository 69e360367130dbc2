//! A backup: every object at one revision, in one file that tells whether it is whole.
//!
//! ```text
//!  "gantry backup 1\n"   frame*   sha256 of everything before
//!  frame: length (4 bytes, little endian, of what follows), tag, payload
//!    H  first: JSON, see [`Header`]
//!    K  second, unless everything is in clear: the key of what is sealed, itself wrapped ([`super::seal`]); JSON
//!    F  a file of the control plane: length of its name (2), name, content
//!    E  an object: create revision (8), mod revision (8), length of its key (2), key, value
//!    G, S  the same, with content and value sealed: files, and what the store seals
//!    Z  last: JSON, see [`Totals`]
//! ```
//! Writer and reader hold one frame at a time. A file that was cut short, to which something was added or
//! of which a bit has changed is told by the digest; nothing of it may be used before [`Reader::read`] has
//! returned `None`.

use std::io::Read;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::seal::{DataKey, KeyError, KeyFile, SEALED_PREFIX, Wrapped, WrappingKey, place};
use super::{Entry, KEY_BYTES_MAX, Lineage, Revision, VALUE_BYTES_MAX};

const MAGIC: &[u8; 16] = b"gantry backup 1\n";
const DIGEST_BYTES: usize = 32;
/// Both revisions and the length of the key.
const ENTRY_HEADER_BYTES: usize = 18;
/// Longest frame: the largest entry, and what may be put around it.
const FRAME_BYTES_MAX: usize = 1 + ENTRY_HEADER_BYTES + KEY_BYTES_MAX + VALUE_BYTES_MAX + 4_096;

const TAG_HEADER: u8 = b'H';
const TAG_KEY: u8 = b'K';
const TAG_FILE: u8 = b'F';
const TAG_SEALED_FILE: u8 = b'G';
const TAG_ENTRY: u8 = b'E';
const TAG_SEALED_ENTRY: u8 = b'S';
const TAG_END: u8 = b'Z';

/// Of what a backup is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// See [`Lineage::counter`].
    pub lineage_counter: u64,
    /// See [`Lineage::id`].
    pub lineage_id: String,
    /// The store's revision: every object is as it was then.
    pub revision: Revision,
    /// When, RFC 3339: for people.
    pub taken: String,
}

impl Header {
    /// For what the key of a backup is wrapped: for no other one.
    fn purpose(&self) -> String {
        let (id, revision, taken) = (&self.lineage_id, self.revision, &self.taken);
        format!("backup of {id} at revision {revision}, {taken}")
    }

    /// Of which history it is.
    pub fn lineage(&self) -> Lineage {
        Lineage {
            counter: self.lineage_counter,
            id: self.lineage_id.clone(),
        }
    }
}

/// What a backup must have had before its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Objects.
    pub entries: u64,
    /// Files of the control plane.
    pub files: u64,
}

/// One frame after the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// An object.
    Entry(Entry),
    /// A file of the control plane.
    File {
        /// Its name, for example `ca.crt`.
        name: String,
        /// All of it.
        content: Bytes,
    },
}

/// Makes the bytes of a backup, frame by frame.
pub struct Writer {
    buffer: Vec<u8>,
    digest: Sha256,
    totals: Totals,
    bytes: u64,
    /// `None`: everything in clear.
    key: Option<DataKey>,
}

/// What a finished backup is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    /// What is in it.
    pub totals: Totals,
    /// Its length.
    pub bytes: u64,
}

impl Writer {
    /// A backup whose files and Secrets are sealed by a new key, which is wrapped by `by`.
    pub fn sealed(header: &Header, by: &WrappingKey) -> Result<Writer, KeyError> {
        let key = DataKey::make()?;
        let wrapped = key.wrap(by, &header.purpose())?;
        let mut writer = Writer::in_clear(header);
        writer.frame(TAG_KEY, &[&json(&wrapped)]);
        writer.key = Some(key);
        Ok(writer)
    }

    /// A backup that everybody can read.
    pub fn in_clear(header: &Header) -> Writer {
        let mut writer = Writer {
            buffer: Vec::new(),
            digest: Sha256::new(),
            totals: Totals::default(),
            bytes: 0,
            key: None,
        };
        writer.put(MAGIC);
        writer.frame(TAG_HEADER, &[&json(header)]);
        writer
    }

    fn put(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        self.buffer.extend_from_slice(bytes);
        self.bytes += bytes.len() as u64;
    }

    fn frame(&mut self, tag: u8, parts: &[&[u8]]) {
        let length = 1 + parts.iter().map(|part| part.len()).sum::<usize>();
        // Keys and values are far below 4 GiB: the store has checked them.
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        self.put(&length.to_le_bytes());
        self.put(&[tag]);
        for part in parts {
            self.put(part);
        }
    }

    /// Adds an object.
    pub fn entry(&mut self, entry: &Entry) -> Result<(), KeyError> {
        let key = self.key.as_ref();
        let key = key.filter(|_| entry.key.starts_with(SEALED_PREFIX));
        let sealed = key
            .map(|key| key.seal(&place(&entry.key, entry.mod_revision), &entry.value))
            .transpose()?;
        let (tag, value) = match &sealed {
            Some(sealed) => (TAG_SEALED_ENTRY, sealed.as_slice()),
            None => (TAG_ENTRY, &*entry.value),
        };
        let name = entry.key.as_bytes();
        self.totals.entries += 1;
        self.frame(
            tag,
            &[
                &entry.create_revision.to_le_bytes(),
                &entry.mod_revision.to_le_bytes(),
                &length_of(name),
                name,
                value,
            ],
        );
        Ok(())
    }

    /// Adds a file of the control plane.
    pub fn file(&mut self, name: &str, content: &[u8]) -> Result<(), KeyError> {
        let key = self.key.as_ref();
        let sealed = key
            .map(|key| key.seal(&place(name, 0), content))
            .transpose()?;
        let (tag, content) = match &sealed {
            Some(sealed) => (TAG_SEALED_FILE, sealed.as_slice()),
            None => (TAG_FILE, content),
        };
        self.totals.files += 1;
        let name = name.as_bytes();
        self.frame(tag, &[&length_of(name), name, content]);
        Ok(())
    }

    /// Bytes that wait to be taken.
    pub fn waiting(&self) -> usize {
        self.buffer.len()
    }

    /// Takes what was made so far.
    pub fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.buffer).into()
    }

    /// The last bytes.
    pub fn finish(mut self) -> (Bytes, Finished) {
        let totals = self.totals;
        self.frame(TAG_END, &[&json(&totals)]);
        let digest = std::mem::take(&mut self.digest).finalize();
        self.buffer.extend_from_slice(&digest);
        let bytes = self.bytes + DIGEST_BYTES as u64;
        (self.buffer.into(), Finished { totals, bytes })
    }
}

/// Numbers and text only: never fails.
fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

/// Of a key or a name: at most 1,024 bytes.
fn length_of(text: &[u8]) -> [u8; 2] {
    u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes()
}

/// Why a file is no whole backup.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// It cannot be read.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// It does not begin as one.
    #[error("it is no backup of Gantry, or of another version")]
    NotABackup,
    /// It ends too early.
    #[error("it ends at byte {0}, before its end: it was cut short")]
    CutShort(u64),
    /// A part of it makes no sense.
    #[error("{what} at byte {at}: it has changed since it was written")]
    Changed {
        /// What is wrong.
        what: &'static str,
        /// Where.
        at: u64,
    },
    /// There is no key file at all.
    #[error(
        "it is sealed by key {0}, and there is no key file: give the one that the control plane had then with --backup-key"
    )]
    NoKey(String),
    /// Its key cannot be opened.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Reads a backup, frame by frame.
pub struct Reader<R> {
    source: R,
    digest: Sha256,
    at: u64,
    totals: Totals,
    header: Header,
    ended: bool,
    keys: Option<KeyFile>,
    key: Option<DataKey>,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    ///
    /// * `keys` – opens what is sealed; not needed for a backup in clear.
    pub fn new(mut source: R, keys: Option<KeyFile>) -> Result<Reader<R>, Damage> {
        let mut magic = [0; MAGIC.len()];
        match source.read_exact(&mut magic) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(Damage::NotABackup);
            }
            other => other?,
        }
        if magic != *MAGIC {
            return Err(Damage::NotABackup);
        }
        let mut digest = Sha256::new();
        digest.update(magic);
        let mut reader = Reader {
            source,
            digest,
            at: MAGIC.len() as u64,
            totals: Totals::default(),
            header: Header {
                lineage_counter: 0,
                lineage_id: String::new(),
                revision: 0,
                taken: String::new(),
            },
            ended: false,
            keys,
            key: None,
        };
        let (tag, payload) = reader.frame()?;
        let header = serde_json::from_slice(&payload).ok();
        reader.header = header
            .filter(|_| tag == TAG_HEADER)
            .ok_or(reader.changed("the header cannot be read"))?;
        Ok(reader)
    }

    /// Of what it is.
    pub fn header(&self) -> &Header {
        &self.header
    }

    fn changed(&self, what: &'static str) -> Damage {
        Damage::Changed { what, at: self.at }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Damage> {
        self.source.read_exact(bytes).map_err(|error| {
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                return Damage::CutShort(self.at);
            }
            Damage::Io(error)
        })?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn frame(&mut self) -> Result<(u8, Bytes), Damage> {
        let mut length = [0; 4];
        self.fill(&mut length)?;
        self.digest.update(length);
        let length = u32::from_le_bytes(length) as usize;
        if !(1..=FRAME_BYTES_MAX).contains(&length) {
            return Err(self.changed("the length of a part cannot be"));
        }
        let mut payload = vec![0; length];
        self.fill(&mut payload)?;
        self.digest.update(&payload);
        let payload = Bytes::from(payload);
        Ok((payload[0], payload.slice(1..)))
    }

    /// The next frame; `None` when the backup has ended and is whole.
    pub fn read(&mut self) -> Result<Option<Frame>, Damage> {
        if self.ended {
            return Ok(None);
        }
        let (mut tag, mut payload) = self.frame()?;
        if tag == TAG_KEY && self.key.is_none() && self.totals == Totals::default() {
            self.unwrap_key(&payload)?;
            (tag, payload) = self.frame()?;
        }
        let frame = match tag {
            TAG_ENTRY => decode_entry(&payload).map(Frame::Entry),
            TAG_SEALED_ENTRY => self.open_entry(&payload),
            TAG_FILE => decode_file(&payload),
            TAG_SEALED_FILE => self.open_file(&payload),
            TAG_END => {
                self.end(&payload)?;
                return Ok(None);
            }
            _ => None,
        };
        let frame = frame.ok_or(self.changed("a part cannot be read"))?;
        match &frame {
            Frame::Entry(_) => self.totals.entries += 1,
            Frame::File { .. } => self.totals.files += 1,
        }
        Ok(Some(frame))
    }

    fn unwrap_key(&mut self, payload: &[u8]) -> Result<(), Damage> {
        let wrapped: Wrapped =
            serde_json::from_slice(payload).map_err(|_| self.changed("the key cannot be read"))?;
        let Some(keys) = &self.keys else {
            return Err(Damage::NoKey(wrapped.by));
        };
        let what = ("the backup", "--backup-key");
        let key = DataKey::unwrap(&wrapped, keys, &self.header.purpose(), what)?;
        self.key = Some(key);
        Ok(())
    }

    fn open_entry(&self, payload: &Bytes) -> Option<Frame> {
        let mut entry = decode_entry(payload)?;
        let place = place(&entry.key, entry.mod_revision);
        entry.value = self.key.as_ref()?.open(&place, &entry.value)?.into();
        Some(Frame::Entry(entry))
    }

    fn open_file(&self, payload: &Bytes) -> Option<Frame> {
        let Frame::File { name, content } = decode_file(payload)? else {
            return None;
        };
        let content = self.key.as_ref()?.open(&place(&name, 0), &content)?;
        Some(Frame::File {
            name,
            content: content.into(),
        })
    }

    fn end(&mut self, payload: &[u8]) -> Result<(), Damage> {
        let wanted = std::mem::take(&mut self.digest).finalize();
        let mut digest = [0; DIGEST_BYTES];
        self.fill(&mut digest)?;
        let totals = serde_json::from_slice::<Totals>(payload).ok();
        if digest[..] != wanted[..] || totals != Some(self.totals) {
            return Err(self.changed("the digest is another one"));
        }
        if self.source.read(&mut [0])? != 0 {
            return Err(self.changed("something follows the end"));
        }
        self.ended = true;
        Ok(())
    }
}

fn decode_entry(payload: &Bytes) -> Option<Entry> {
    let number = |range: std::ops::Range<usize>| -> Option<u64> {
        Some(u64::from_le_bytes(payload.get(range)?.try_into().ok()?))
    };
    let (create_revision, mod_revision) = (number(0..8)?, number(8..16)?);
    let (key, value) = split_text(payload, 16)?;
    Some(Entry {
        key: key.into(),
        value,
        create_revision,
        mod_revision,
    })
}

fn decode_file(payload: &Bytes) -> Option<Frame> {
    let (name, content) = split_text(payload, 0)?;
    Some(Frame::File { name, content })
}

/// A text with its length before it, at `at`, and what follows it.
fn split_text(payload: &Bytes, at: usize) -> Option<(String, Bytes)> {
    let length = payload.get(at..at + 2)?.try_into().ok()?;
    let start = at + 2;
    let end = start + usize::from(u16::from_le_bytes(length));
    let text = std::str::from_utf8(payload.get(start..end)?).ok()?;
    Some((text.to_owned(), payload.slice(end..)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        Header {
            lineage_counter: 3,
            lineage_id: "id".to_owned(),
            revision: 40,
            taken: "2026-01-01T00:00:00Z".to_owned(),
        }
    }

    fn entry(key: &str, value: &[u8]) -> Entry {
        Entry {
            key: key.into(),
            value: Bytes::copy_from_slice(value),
            create_revision: 7,
            mod_revision: 9,
        }
    }

    /// In clear, and sealed if there are keys.
    fn write(entries: &[Entry], keys: Option<&KeyFile>) -> Vec<u8> {
        let mut writer = match keys {
            Some(keys) => Writer::sealed(&header(), keys.first()).unwrap(),
            None => Writer::in_clear(&header()),
        };
        writer.file("ca.key", b"certain words").unwrap();
        let mut all = Vec::new();
        for entry in entries {
            writer.entry(entry).unwrap();
            all.extend_from_slice(&writer.take());
        }
        let (rest, finished) = writer.finish();
        all.extend_from_slice(&rest);
        assert_eq!(finished.bytes, all.len() as u64);
        assert_eq!(finished.totals.entries, entries.len() as u64);
        all
    }

    fn read(bytes: &[u8], keys: Option<&KeyFile>) -> Result<Vec<Frame>, Damage> {
        let mut reader = Reader::new(bytes, keys.cloned())?;
        let mut frames = Vec::new();
        while let Some(frame) = reader.read()? {
            frames.push(frame);
        }
        Ok(frames)
    }

    fn keys() -> (tempfile::TempDir, KeyFile) {
        let dir = tempfile::tempdir().unwrap();
        let keys = KeyFile::make(&dir.path().join("store.key")).unwrap();
        (dir, keys)
    }

    fn contains(bytes: &[u8], words: &[u8]) -> bool {
        bytes.windows(words.len()).any(|window| window == words)
    }

    #[test]
    fn files_and_secrets_are_sealed_and_open_by_the_right_key_only() {
        let (_dir, keys) = keys();
        let secret = entry("/registry/secrets/a/b", b"hunter two");
        let map = entry("/registry/configmaps/a/b", b"for everybody");
        let sealed = write(&[secret.clone(), map.clone()], Some(&keys));
        for words in [&b"hunter"[..], b"certain words"] {
            assert!(!contains(&sealed, words));
            assert!(contains(&write(std::slice::from_ref(&secret), None), words));
        }
        assert!(contains(&sealed, b"for everybody"));
        let frames = read(&sealed, Some(&keys.rotate().unwrap())).unwrap();
        assert_eq!(frames[1..], [Frame::Entry(secret), Frame::Entry(map)]);
        let (_other_dir, other) = self::keys();
        let error = read(&sealed, Some(&other)).unwrap_err().to_string();
        assert!(
            error.contains(&keys.first().id()) && error.contains("--backup-key"),
            "{error}"
        );
        let error = read(&sealed, None).unwrap_err().to_string();
        assert!(
            error.contains(&keys.first().id()) && error.contains("--backup-key"),
            "{error}"
        );
    }

    fn objects() -> impl Strategy<Value = Vec<(String, Vec<u8>)>> {
        let value = prop::collection::vec(any::<u8>(), 0..200);
        let key = prop_oneof!["/[a-z]{1,30}", "/registry/secrets/[a-z]{1,30}"];
        prop::collection::vec((key, value), 0..12)
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(objects in objects(), sealed in any::<bool>()) {
            let entries: Vec<Entry> = objects.iter().map(|(k, v)| entry(k, v)).collect();
            let (_dir, keys) = keys();
            let keys = sealed.then_some(&keys);
            let frames = read(&write(&entries, keys), keys).unwrap();
            let file = Frame::File { name: "ca.key".to_owned(), content: Bytes::from_static(b"certain words") };
            prop_assert_eq!(&frames[0], &file);
            let expected: Vec<Frame> = entries.into_iter().map(Frame::Entry).collect();
            prop_assert_eq!(&frames[1..], &expected[..]);
        }

        /// Any cut, any changed bit, anything added: told before the end is reached.
        #[test]
        fn damage_anywhere_is_told(
            objects in objects(), at in any::<prop::sample::Index>(), bit in 0..8_u32, more in 1..9_usize,
            sealed in any::<bool>(),
        ) {
            let entries: Vec<Entry> = objects.iter().map(|(k, v)| entry(k, v)).collect();
            let (_dir, keys) = keys();
            let keys = sealed.then_some(&keys);
            let whole = write(&entries, keys);
            let read = |bytes: &[u8]| read(bytes, keys);
            let place = at.index(whole.len());
            prop_assert!(read(&whole[..place]).is_err(), "cut at {}", place);
            let mut flipped = whole.clone();
            flipped[place] ^= 1 << bit;
            prop_assert!(read(&flipped).is_err(), "bit {} of byte {}", bit, place);
            let mut longer = whole;
            longer.extend(std::iter::repeat_n(0, more));
            prop_assert!(read(&longer).is_err());
        }

        #[test]
        fn nonsense_is_no_backup(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(read(&bytes, None).is_err());
            let mut begun = MAGIC.to_vec();
            begun.extend_from_slice(&bytes);
            prop_assert!(read(&begun, None).is_err());
        }
    }
}
