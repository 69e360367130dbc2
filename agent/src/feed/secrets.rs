//! Secrets of the feed: in memory and on tmpfs, never on a disk.
//!
//! ```text
//! commit ─┬─ <lib>/feed/state     every item, but of a Secret only key, revision and hash (Withheld)
//!         └─ <run>/secrets/<hash> the Secret's item, mode 0600
//! start:  state ─► each Withheld ─► its file here? taken : left out, and asked for at the next Hello
//! ```
//! So a restarted agent has its Secrets at once, without a control plane. A *reboot* takes them:
//! the content is then the last commit without Secrets, pods that name none start from the disk,
//! those that do wait until the control plane has sent them again. Encrypting them at rest would
//! let them start too, but the key would lie on the same disk as the file.
//!
//! Invariants: a file is written before the record that names it and is named by its content, so a
//! crash leaves at most a file that nobody names, which the next commit removes; where `<run>` is
//! not in memory nothing is written and Secrets live as long as the agent. Not covered: swap (use
//! none, or encrypted swap), and the hash on disk, by which a guess of a whole Secret can be tested.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use gantry_api::digest::item_hash;
use gantry_api::proto;
use prost::Message;

/// Keys of the feed that carry Secrets.
pub(super) const PREFIX: &str = "blob/secrets/";
/// `statfs` types of file systems without a disk. Source: linux/magic.h.
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// What the disk holds of a Secret.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Withheld {
    /// The item's key.
    #[prost(string, tag = "1")]
    pub(super) key: String,
    /// The object's own revision.
    #[prost(uint64, tag = "2")]
    pub(super) rev: u64,
    /// [`item_hash`] of the item.
    #[prost(fixed64, tag = "3")]
    pub(super) hash: u64,
}

/// Takes the Secrets out of `items`.
pub(super) fn withhold(items: Vec<Bytes>) -> (Vec<Bytes>, Vec<(Withheld, Bytes)>) {
    let mut rest = Vec::with_capacity(items.len());
    let mut secrets = Vec::new();
    for item in items {
        match secret(&item) {
            Some(withheld) => secrets.push((withheld, item)),
            None => rest.push(item),
        }
    }
    (rest, secrets)
}

/// Only what holds the key's prefix somewhere is decoded: most of a cluster's items are others.
fn secret(item: &Bytes) -> Option<Withheld> {
    let prefix = PREFIX.as_bytes();
    if !item.windows(prefix.len()).any(|window| window == prefix) {
        return None;
    }
    let decoded = proto::Item::decode(item.clone()).ok()?;
    let has_value = matches!(decoded.value, Some(proto::item::Value::BlobJson(_)));
    (has_value && decoded.key.starts_with(PREFIX)).then(|| Withheld {
        key: decoded.key,
        rev: decoded.rev,
        hash: item_hash(item),
    })
}

/// The files, if they may be written.
pub(super) struct SecretFiles {
    directory: Option<PathBuf>,
}

impl SecretFiles {
    /// Files below `directory`, which is made for root alone.
    pub(super) fn open(directory: &Path) -> Self {
        match make(directory) {
            Ok(true) => Self {
                directory: Some(directory.to_owned()),
            },
            Ok(false) => {
                tracing::warn!(
                    directory = %directory.display(),
                    "not in memory: Secrets are asked for again after every start of the agent"
                );
                Self { directory: None }
            }
            Err(error) => {
                tracing::warn!(directory = %directory.display(), %error, "Secrets are not kept");
                Self { directory: None }
            }
        }
    }

    fn path(&self, hash: u64) -> Option<PathBuf> {
        Some(self.directory.as_ref()?.join(format!("{hash:016x}")))
    }

    /// Keeps a Secret's item. Without a place for it, it is in memory only.
    pub(super) fn keep(&self, withheld: &Withheld, item: &Bytes) {
        let Some(path) = self.path(withheld.hash).filter(|path| !path.exists()) else {
            return;
        };
        if let Err(error) = write(&path, item) {
            // The words name the Secret, never its content.
            let key = &withheld.key;
            tracing::warn!(key, %error, "a Secret will be asked for again after a restart");
        }
    }

    /// The item, when it is here and whole.
    pub(super) fn read(&self, withheld: &Withheld) -> Option<Bytes> {
        let item = Bytes::from(fs::read(self.path(withheld.hash)?).ok()?);
        (secret(&item)? == *withheld).then_some(item)
    }

    /// Removes every file but these.
    pub(super) fn retain(&self, hashes: &BTreeSet<u64>) {
        let entries = self.directory.as_ref().map(fs::read_dir);
        for entry in entries.into_iter().flatten().flatten().flatten() {
            let name = entry.file_name();
            let hash = name.to_str().and_then(|n| u64::from_str_radix(n, 16).ok());
            if hash.is_none_or(|hash| !hashes.contains(&hash)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// False: the directory is on a disk.
fn make(directory: &Path) -> io::Result<bool> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let kind = rustix::fs::statfs(directory)?.f_type;
    Ok(IN_MEMORY.contains(&kind))
}

fn write(path: &Path, item: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(&beside)?.write_all(item)?;
    fs::rename(&beside, path)
}
