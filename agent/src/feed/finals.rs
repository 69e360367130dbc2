//! Final statuses on disk: `<lib>/feed/final/<uid>`, one small checksummed file each.
//!
//! Written before the status is sent, removed when the control plane holds it and the pod has left
//! the view. Without them a power cut between a pod's end and the answer of the control plane would
//! start a finished pod again.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use gantry_api::rules::{self, Rule};
use prost::Message;

use super::log::{DiskError, at, frame, unframe, write_atomically};
use super::reports::Status;
use crate::ids::PodUid;

#[derive(Clone, PartialEq, Message)]
struct FinalRecord {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(bytes = "bytes", tag = "3")]
    json: Bytes,
    #[prost(bool, tag = "4")]
    released: bool,
}

/// The directory of the records.
#[derive(Clone, Debug)]
pub(super) struct Finals {
    dir: PathBuf,
}

impl Finals {
    /// Creates the directory and reads the records in it; unreadable ones are removed.
    pub(super) fn open(feed_dir: &Path) -> Result<(Self, Vec<(PodUid, Status)>), DiskError> {
        let dir = feed_dir.join("final");
        std::fs::create_dir_all(&dir).map_err(at("create", &dir))?;
        let mut records = Vec::new();
        for file in std::fs::read_dir(&dir).map_err(at("list", &dir))? {
            let path = file.map_err(at("list", &dir))?.path();
            let uid = path
                .file_name()
                .and_then(|name| name.to_str())
                .map(PodUid::new);
            let bytes = std::fs::read(&path).map_err(at("read", &path))?;
            match (uid, decode(Bytes::from(bytes))) {
                (Some(Ok(uid)), Some(status)) => records.push((uid, status)),
                _ => {
                    tracing::warn!(path = %path.display(), "removing an unreadable final record");
                    std::fs::remove_file(&path).map_err(at("remove", &path))?;
                }
            }
        }
        Ok((Self { dir }, records))
    }

    /// Writes a record; on the disk when this returns.
    pub(super) fn write(&self, uid: &PodUid, status: &Status) -> Result<(), DiskError> {
        let record = FinalRecord {
            namespace: status.namespace.clone(),
            name: status.name.clone(),
            json: status.json.clone(),
            released: status.released,
        };
        write_atomically(&self.dir.join(uid.as_str()), &frame(&record))
    }

    /// Removes a record; fine when it is not there.
    pub(super) fn remove(&self, uid: &PodUid) -> Result<(), DiskError> {
        let path = self.dir.join(uid.as_str());
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(at("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }
}

fn decode(mut bytes: Bytes) -> Option<Status> {
    let record = FinalRecord::decode(unframe(&mut bytes)?).ok()?;
    Some(Status {
        namespace: record.namespace,
        name: record.name,
        json: record.json,
        is_final: true,
        released: record.released,
    })
}

/// Counts this start of the agent: one more than the number in `<lib>/feed/incarnation`, which is
/// on the disk before any status carries it.
pub(super) fn next_incarnation(feed_dir: &Path) -> Result<u64, DiskError> {
    std::fs::create_dir_all(feed_dir).map_err(at("create", feed_dir))?;
    let path = feed_dir.join("incarnation");
    let last = match std::fs::read_to_string(&path) {
        Ok(text) => text
            .trim()
            .parse::<u64>()
            .unwrap_or_else(|_| unix_seconds()),
        // After a loss of the disk the count goes on above everything this node ever sent.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => unix_seconds(),
        Err(error) => return Err(at("read", &path)(error)),
    };
    let next = match rules::is_off(Rule::Incarnation) {
        false => last.saturating_add(1),
        true => 1,
    };
    write_atomically(&path, format!("{next}\n").as_bytes())?;
    Ok(next)
}

fn unix_seconds() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map(|since| since.as_secs()).unwrap_or(0)
}
