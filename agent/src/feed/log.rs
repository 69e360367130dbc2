//! The feed's copy on disk: what this node starts from when no control plane answers.
//!
//! ```text
//! <lib>/feed/state = magic, record, record, ...        record = length u32, hash u64, payload
//! ```
//! The first record holds everything, each later one the batch of one commit, so replaying the file
//! gives the state at the last whole record. A record is written before its commit is applied; one
//! with a new pod is also on the disk (fdatasync), since a pod must not run that a power cut
//! un-assigns. The others follow within a second.
//! Secrets are not in it ([`super::secrets`]).
//! When the file has grown to several times its content it is rewritten beside itself and renamed.
//!
//! Invariants: a torn or damaged tail costs the records after it and never the file; every replayed
//! commit passes the same digest check as one from the network.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes};
use gantry_api::digest::item_hash;
use gantry_api::proto;
use prost::Message;

use super::content::Content;
use super::secrets::{self, SecretFiles, Withheld};
use super::settings_of;

const MAGIC: &[u8; 16] = b"gantry-feed-v1\n\0";
/// Length and hash before each payload.
const HEADER_BYTES: usize = 12;
/// A longer record is damage: no view is that large.
const RECORD_BYTES_MAX: u32 = 1 << 30;
/// The file is not compacted below this.
const COMPACT_BYTES_MIN: u64 = 1 << 20;
/// The file is compacted at this multiple of its size after the last compaction.
const COMPACT_RATIO: u64 = 4;

/// What could not be done with which file.
#[derive(Debug, thiserror::Error)]
#[error("{action} {path}: {source}")]
pub(super) struct DiskError {
    action: &'static str,
    path: String,
    source: io::Error,
}

/// Adds the action and the path to an I/O error.
pub(super) fn at<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> DiskError + 'a {
    move |source| DiskError {
        action,
        path: path.display().to_string(),
        source,
    }
}

/// One commit as it came.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Record {
    /// The lineage that the commit is of.
    #[prost(message, optional, tag = "1")]
    pub(super) lineage: Option<proto::Lineage>,
    /// The items are everything, not a difference.
    #[prost(bool, tag = "2")]
    pub(super) full: bool,
    /// Encoded items.
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub(super) items: Vec<Bytes>,
    /// What they lead to.
    #[prost(message, optional, tag = "4")]
    pub(super) commit: Option<proto::Commit>,
    /// The session's settings.
    #[prost(message, optional, tag = "5")]
    pub(super) welcome: Option<proto::Welcome>,
    /// What stands for the Secrets among the items; filled by [`Log::append`].
    #[prost(message, repeated, tag = "6")]
    pub(super) withheld: Vec<Withheld>,
}

/// The open file.
pub(super) struct Log {
    path: PathBuf,
    file: File,
    len: u64,
    compacted_len: u64,
    unsynced: bool,
    secrets: SecretFiles,
}

/// What the file held.
#[derive(Default)]
pub(super) struct Loaded {
    pub(super) content: Content,
    pub(super) lineage: Option<proto::Lineage>,
}

impl Log {
    /// Opens or creates `<dir>/state`, replays it and cuts off what is damaged.
    pub(super) fn open(dir: &Path, secrets: SecretFiles) -> Result<(Self, Loaded), DiskError> {
        std::fs::create_dir_all(dir).map_err(at("create", dir))?;
        let path = dir.join("state");
        // Which pods run and what they are told is for root alone.
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        let mut file = options.open(&path).map_err(at("open", &path))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(at("read", &path))?;
        let found = bytes.len() as u64;
        let bytes = Bytes::from(bytes);
        let inline = records(bytes.clone()).any(|(r, _)| !secrets::withhold(r.items).1.is_empty());
        let (mut loaded, good) = replay(bytes, &secrets);
        loaded.content.forget_missing();
        secrets.retain(&loaded.content.secret_hashes());
        let mut log = Self {
            path,
            file,
            len: good,
            compacted_len: good,
            unsynced: false,
            secrets,
        };
        if good < found {
            tracing::warn!(path = %log.path.display(), good, found, "cutting off a damaged tail");
        }
        if good == 0 {
            log.truncate(0)?;
            log.append_bytes(MAGIC)?;
        } else {
            log.truncate(good)?;
        }
        if inline {
            log.compact()?; // an earlier version wrote Secrets here
        }
        Ok((log, loaded))
    }

    fn truncate(&mut self, len: u64) -> Result<(), DiskError> {
        self.file.set_len(len).map_err(at("truncate", &self.path))?;
        self.file
            .seek(SeekFrom::Start(len))
            .map_err(at("seek in", &self.path))?;
        self.len = len;
        Ok(())
    }

    fn append_bytes(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        let start = self.len;
        if let Err(source) = self.file.write_all(bytes) {
            // Half a record would hide every later one.
            self.truncate(start)?;
            return Err(at("write", &self.path)(source));
        }
        self.len += bytes.len() as u64;
        self.unsynced = true;
        Ok(())
    }

    /// Writes one commit, before it is applied. With `sync` it is on the disk when this returns.
    pub(super) fn append(&mut self, record: Record, sync: bool) -> Result<(), DiskError> {
        let record = self.withhold(record);
        self.append_bytes(&frame(&record))?;
        if self.len > COMPACT_BYTES_MIN && self.len / COMPACT_RATIO > self.compacted_len {
            return self.compact();
        }
        if sync { self.sync() } else { Ok(()) }
    }

    /// Puts the Secrets of a record into their own files.
    fn withhold(&self, mut record: Record) -> Record {
        let (items, secrets) = secrets::withhold(record.items);
        record.items = items;
        for (withheld, item) in secrets {
            self.secrets.keep(&withheld, &item);
            record.withheld.push(withheld);
        }
        record
    }

    /// The Secrets that the content holds now: the files of others go.
    pub(super) fn retain_secrets(&self, hashes: &BTreeSet<u64>) {
        self.secrets.retain(hashes);
    }

    /// Brings what was appended to the disk.
    pub(super) fn sync(&mut self) -> Result<(), DiskError> {
        if self.unsynced {
            self.file.sync_data().map_err(at("sync", &self.path))?;
            self.unsynced = false;
        }
        Ok(())
    }

    /// Rewrites the file as one record with everything, beside itself, and renames it.
    pub(super) fn compact(&mut self) -> Result<(), DiskError> {
        self.file
            .seek(SeekFrom::Start(0))
            .map_err(at("seek in", &self.path))?;
        let mut bytes = Vec::new();
        self.file
            .read_to_end(&mut bytes)
            .map_err(at("read", &self.path))?;
        let mut last = Record::default();
        let mut live = BTreeMap::new();
        let mut withheld = BTreeMap::new();
        for (record, _) in records(Bytes::from(bytes)) {
            let record = self.withhold(record);
            if record.full {
                live.clear();
                withheld.clear();
            }
            for item in &record.items {
                let Ok(decoded) = proto::Item::decode(item.clone()) else {
                    continue;
                };
                match decoded.value {
                    None | Some(proto::item::Value::Deleted(_)) => {
                        withheld.remove(&decoded.key);
                        live.remove(&decoded.key)
                    }
                    Some(_) => live.insert(decoded.key, item.clone()),
                };
            }
            for secret in &record.withheld {
                withheld.insert(secret.key.clone(), secret.clone());
            }
            last = Record {
                items: Vec::new(),
                withheld: Vec::new(),
                ..record
            };
        }
        let everything = Record {
            full: true,
            items: live.into_values().collect(),
            withheld: withheld.into_values().collect(),
            ..last
        };
        let mut content = MAGIC.to_vec();
        content.extend(frame(&everything));
        write_atomically(&self.path, &content)?;
        self.file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.path)
            .map_err(at("open", &self.path))?;
        self.truncate(content.len() as u64)?;
        self.compacted_len = self.len;
        self.unsynced = false;
        Ok(())
    }
}

/// Replaces a file as a whole: written beside it, on the disk, renamed, the directory synced.
pub(super) fn write_atomically(path: &Path, content: &[u8]) -> Result<(), DiskError> {
    let beside = path.with_extension("new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&beside).map_err(at("create", &beside))?;
    file.write_all(content).map_err(at("write", &beside))?;
    file.sync_all().map_err(at("sync", &beside))?;
    std::fs::rename(&beside, path).map_err(at("rename", &beside))?;
    let dir = path.parent().unwrap_or(Path::new("."));
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(at("sync", dir))
}

/// Length, hash, payload.
pub(super) fn frame(record: &impl Message) -> Vec<u8> {
    let payload = record.encode_to_vec();
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(item_hash(&payload).to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// Takes one framed payload off the front; none when the rest is torn or damaged.
pub(super) fn unframe(bytes: &mut Bytes) -> Option<Bytes> {
    if bytes.len() < HEADER_BYTES {
        return None;
    }
    let (len, hash) = (bytes.get_u32_le(), bytes.get_u64_le());
    if len > RECORD_BYTES_MAX || bytes.len() < len as usize {
        return None;
    }
    let payload = bytes.split_to(len as usize);
    (item_hash(&payload) == hash).then_some(payload)
}

/// The whole records of a file, each with the offset of its end.
fn records(mut bytes: Bytes) -> impl Iterator<Item = (Record, u64)> {
    let total = bytes.len();
    let fits = bytes.starts_with(MAGIC);
    if fits {
        bytes.advance(MAGIC.len());
    }
    std::iter::from_fn(move || {
        let record = Record::decode(unframe(&mut bytes)?).ok()?;
        Some((record, (total - bytes.len()) as u64))
    })
    .take_while(move |_| fits)
}

/// The state after the last good record, and where that record ends (0: nothing is usable).
pub(super) fn replay(bytes: Bytes, secrets: &SecretFiles) -> (Loaded, u64) {
    let mut good = if bytes.starts_with(MAGIC) {
        MAGIC.len() as u64
    } else {
        0
    };
    let mut loaded = Loaded::default();
    for (mut record, end) in records(bytes) {
        let Some(commit) = &record.commit else { break };
        let same_lineage = loaded.lineage == record.lineage;
        record.withheld.retain(|secret| match secrets.read(secret) {
            Some(item) => {
                record.items.push(item);
                false
            }
            None => true,
        });
        let (full, items) = (record.full, &record.items);
        let missing = &record.withheld;
        let content = &loaded.content;
        match content.prepare_with(full, same_lineage, items, missing, commit) {
            Ok(prepared) => loaded.content.apply(prepared),
            Err(mismatch) => {
                tracing::warn!(%mismatch, "the feed's file holds a commit that does not add up");
                break;
            }
        };
        loaded.lineage = record.lineage;
        if let Some(welcome) = &record.welcome {
            loaded.content.set_settings(settings_of(welcome));
        }
        good = end;
    }
    (loaded, good)
}

#[cfg(test)]
mod tests;
