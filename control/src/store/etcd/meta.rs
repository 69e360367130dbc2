//! What the store in etcd is: its history, its keys, its cluster. All of it in the one key [`META`].
//!
//! Whoever starts first makes it, by compare-and-set; whoever changes it makes the others look again.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::super::OpenError;
use super::super::seal::{self, DataKeys, KeyFile, SEALED_PREFIX, Wrapped};
use super::client::{Client, Failure};
use super::proto::{Compare, PutRequest, TxnRequest};
use super::wire::{Sealer, is_changed_at, put, range_of};
use super::{START_PATIENCE, cannot_open};

/// Of which history it is, and by which keys it is sealed.
pub(super) const META: &str = "/gantry/meta";
/// Before a value of a Secret: no JSON begins so.
const SEALED_MARK: u8 = 0;
/// How often a start that loses against another one looks again.
const TRIES_MAX: usize = 16;

/// See [`META`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meta {
    pub(super) format: u64,
    pub(super) lineage_counter: u64,
    pub(super) lineage_id: String,
    /// Between etcd's revisions and those that are shown.
    pub(super) offset: u64,
    pub(super) data_keys: BTreeMap<u32, Wrapped>,
    /// Digest of the CA and of the key of tokens that all control planes have; after a restore, of the first
    /// that starts.
    pub(super) cluster: Option<String>,
}

pub(super) const FORMAT: u64 = 1;
/// While a restore fills it.
pub(super) const RESTORING: u64 = 0;

/// Seals values as the store in a file does, bound to their key.
pub(super) struct Values {
    pub(super) keys: DataKeys,
    pub(super) file: KeyFile,
}

impl Sealer for Values {
    fn seal(&self, key: &str, value: &Bytes) -> Result<Bytes, String> {
        if !key.starts_with(SEALED_PREFIX) {
            return Ok(value.clone());
        }
        let sealed = self.keys.seal(&seal::place(key, 0), value);
        let (number, sealed) = sealed.map_err(|error| error.to_string())?;
        let mut bytes = vec![SEALED_MARK];
        bytes.extend_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(&sealed);
        Ok(bytes.into())
    }

    fn open(&self, key: &str, value: Bytes) -> Result<Bytes, String> {
        let Some((&SEALED_MARK, sealed)) = value.split_first() else {
            return Ok(value);
        };
        let opened = sealed
            .split_first_chunk::<4>()
            .and_then(|(number, sealed)| {
                let number = u32::from_le_bytes(*number);
                self.keys.open_value(number, &seal::place(key, 0), sealed)
            });
        opened
            .map(Bytes::from)
            .ok_or_else(|| format!("{key} cannot be opened: it was changed since it was sealed"))
    }
}

impl Values {
    /// Opens the data keys that are there, and makes none.
    pub(super) fn reopened(meta: &Meta, keys: &Path) -> Result<Values, seal::KeyError> {
        let file = KeyFile::read_or_make(keys, false)?;
        let keys = DataKeys::open(&meta.data_keys, &file)?;
        Ok(Values { keys, file })
    }
}

/// Reads what the store is, making it if there is none, and opens its keys, adding the one that the key file
/// now has first.
pub(super) async fn open(
    client: &Client,
    keys: &Path,
    cluster: &str,
) -> Result<(Meta, i64, Values), OpenError> {
    for _ in 0..TRIES_MAX {
        let (found, revision) = read(client)
            .await
            .map_err(|reason| corrupt(client, reason))?;
        let mut meta = found.clone().unwrap_or_else(|| Meta {
            format: FORMAT,
            lineage_counter: 1,
            lineage_id: uuid::Uuid::new_v4().to_string(),
            offset: 0,
            data_keys: BTreeMap::new(),
            cluster: None,
        });
        check_format(client, &meta)?;
        if *meta.cluster.get_or_insert_with(|| cluster.to_owned()) != cluster {
            return Err(OpenError::OtherCluster {
                path: client.servers().urls.join(","),
            });
        }
        let values = open_values(&mut meta, keys)?;
        if found.as_ref() == Some(&meta) {
            return Ok((meta, revision, values));
        }
        match write(client, &meta, revision, None).await {
            Ok(Some(revision)) => return Ok((meta, revision, values)),
            // Another one was faster: look at what it made.
            Ok(None) | Err(Failure::Unknown(_) | Failure::NotDone(_)) => {}
            Err(failure) => return Err(cannot_open(client, failure)),
        }
    }
    Err(cannot_open(client, format!("{META} changes all the time")))
}

fn check_format(client: &Client, meta: &Meta) -> Result<(), OpenError> {
    match meta.format {
        FORMAT => Ok(()),
        RESTORING => {
            let words = "a restore into it was cut off: run it again";
            Err(corrupt(client, words.to_owned()))
        }
        format => {
            let words = format!("its format is {format}, this program reads {FORMAT}");
            Err(corrupt(client, words))
        }
    }
}

fn corrupt(client: &Client, reason: String) -> OpenError {
    OpenError::Corrupt {
        path: client.servers().urls.join(","),
        reason,
    }
}

/// What [`META`] says, and its revision; 0 without it.
pub(super) async fn read(client: &Client) -> Result<(Option<Meta>, i64), String> {
    let request = range_of(META);
    let found = client
        .ask(START_PATIENCE, |open| {
            let request = request.clone();
            async move { open.kv().range(request).await }
        })
        .await
        .map_err(|failure| failure.to_string())?;
    let Some(kv) = found.kvs.into_iter().next() else {
        return Ok((None, 0));
    };
    Ok((Some(parse(&kv.value)?), kv.mod_revision))
}

pub(super) fn parse(value: &[u8]) -> Result<Meta, String> {
    serde_json::from_slice(value).map_err(|error| format!("{META} cannot be read: {error}"))
}

/// Opens the data keys; one that the first key of the file is to wrap is added, and must be written before
/// anything is sealed by it.
pub(super) fn open_values(meta: &mut Meta, keys: &Path) -> Result<Values, seal::KeyError> {
    let file = KeyFile::read_or_make(keys, meta.data_keys.is_empty())?;
    let mut opened = match meta.data_keys.is_empty() {
        true => DataKeys::none(),
        false => DataKeys::open(&meta.data_keys, &file)?,
    };
    let by = meta.data_keys.values().next_back().map(|key| &*key.by);
    if by != Some(&*file.first().id()) {
        let next = opened.next(file.first())?;
        meta.data_keys.insert(next.number, next.wrapped.clone());
        opened.take(next);
    }
    Ok(Values { keys: opened, file })
}

/// Writes [`META`] if it is as it was read; its revision, or `None`: it is not.
///
/// * `holds` – what else has to hold.
pub(super) async fn write(
    client: &Client,
    meta: &Meta,
    revision: i64,
    holds: Option<Compare>,
) -> Result<Option<i64>, Failure> {
    let unchanged = is_changed_at(META, revision);
    let value = serde_json::to_vec(meta).map_err(|e| Failure::Refused(e.to_string()))?;
    let request = TxnRequest {
        compare: holds.into_iter().chain([unchanged]).collect(),
        success: vec![put(PutRequest {
            key: META.into(),
            value: value.into(),
            lease: 0,
        })],
        failure: Vec::new(),
    };
    let answer = client
        .call(|open| async move { open.kv().txn(request).await })
        .await?;
    let revision = answer.header.map_or(0, |header| header.revision);
    Ok(Some(revision).filter(|_| answer.succeeded))
}
