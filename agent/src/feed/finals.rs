//! Final statuses on disk, one small checksummed file each.
//!
//! ```text
//!  <lib>/feed/final/<uid>           on the disk before the status is sent; the control plane may lack it
//!            │ ▲                    bury: the control plane holds it and the pod has left the view
//!            ▼ │                    exhume: the pod is in the view again
//!  <lib>/feed/ended/<hour>/<uid>    a tombstone, set in this hour of the agent's time
//! ```
//! Without the first a power cut between a pod's end and the answer of the control plane would start a
//! finished pod again, without the second a restored store would. Both moves are renames, so a crash
//! leaves a record in one of the two places, and either keeps the pod from being started. The highest
//! directory is the hour that it is: made by [`Finals::begin_hour`], so no clock is written down.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use gantry_api::rules::{self, Rule};
use prost::Message;

use super::log::{DiskError, at, frame, unframe, write_atomically};
use super::reports::Status;
use super::tombstones::{HOURS_MAX, Tombstone, Tombstones};
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
    #[prost(bool, tag = "5")]
    mirror: bool,
}

/// The directories of the records.
#[derive(Clone, Debug)]
pub(super) struct Finals {
    dir: PathBuf,
    ended: PathBuf,
    /// A record is moved by one thread at a time.
    turn: Arc<Mutex<()>>,
}

/// What [`Finals::open`] has found.
pub(super) struct Found {
    /// Final statuses that the control plane may lack.
    pub(super) records: Vec<(PodUid, Status)>,
    pub(super) tombstones: Tombstones,
}

impl Finals {
    /// Creates the directories and reads the records in the first; unreadable ones are removed. Of the
    /// tombstones only the names are read: there may be thousands.
    pub(super) fn open(feed_dir: &Path) -> Result<(Self, Found), DiskError> {
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
        let ended = feed_dir.join("ended");
        std::fs::create_dir_all(&ended).map_err(at("create", &ended))?;
        let tombstones = read_tombstones(&ended)?;
        let turn = Arc::default();
        let files = Self { dir, ended, turn };
        Ok((
            files,
            Found {
                records,
                tombstones,
            },
        ))
    }

    /// Writes a record; on the disk when this returns.
    pub(super) fn write(&self, uid: &PodUid, status: &Status) -> Result<(), DiskError> {
        let record = FinalRecord {
            namespace: status.namespace.clone(),
            name: status.name.clone(),
            json: status.json.clone(),
            released: status.released,
            mirror: status.is_mirror,
        };
        write_atomically(&self.dir.join(uid.as_str()), &frame(&record))
    }

    /// Removes a record; fine when it is not there.
    pub(super) fn remove(&self, uid: &PodUid) -> Result<(), DiskError> {
        remove(&self.dir.join(uid.as_str()))
    }

    /// Makes a record a tombstone; fine when it is one.
    pub(super) fn bury(&self, (uid, hour): &Tombstone) -> Result<(), DiskError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = self.hour_dir(*hour);
        std::fs::create_dir_all(&dir).map_err(at("create", &dir))?;
        let from = self.dir.join(uid.as_str());
        match std::fs::rename(&from, dir.join(uid.as_str())) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(at("rename", &from)(error)),
            _ => Ok(()),
        }
    }

    /// Makes a tombstone a record again and reads it. None: it cannot be read, which is logged.
    pub(super) fn exhume(&self, (uid, hour): &Tombstone) -> Option<Status> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.dir.join(uid.as_str());
        let from = self.hour_dir(*hour).join(uid.as_str());
        if let Err(error) = std::fs::rename(&from, &path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::error!(path = %from.display(), %error, "a tombstone stays where it is");
            return read(&from);
        }
        read(&path)
    }

    /// The namespace and the name of these pods, as their tombstones have them; unreadable ones are left out.
    pub(super) fn names(&self, tombstones: &[Tombstone]) -> Vec<(PodUid, String, String)> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let name = |(uid, hour): &Tombstone| {
            let buried = self.hour_dir(*hour).join(uid.as_str());
            let path = match buried.exists() {
                true => buried,
                false => self.dir.join(uid.as_str()),
            };
            let status = read(&path)?;
            Some((uid.clone(), status.namespace, status.name))
        };
        tombstones.iter().filter_map(name).collect()
    }

    /// Removes a tombstone; fine when it is not there.
    pub(super) fn forget(&self, (uid, hour): &Tombstone) -> Result<(), DiskError> {
        remove(&self.hour_dir(*hour).join(uid.as_str()))
    }

    /// It is this hour now, also after a restart. The directories of hours that are over go.
    pub(super) fn begin_hour(&self, hour: u64) -> Result<(), DiskError> {
        let dir = self.hour_dir(hour);
        std::fs::create_dir_all(&dir).map_err(at("create", &dir))?;
        for (at_hour, path) in hours(&self.ended)? {
            if at_hour + HOURS_MAX <= hour {
                std::fs::remove_dir_all(&path).map_err(at("remove", &path))?;
            }
        }
        Ok(())
    }

    fn hour_dir(&self, hour: u64) -> PathBuf {
        self.ended.join(hour.to_string())
    }
}

fn remove(path: &Path) -> Result<(), DiskError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(at("remove", path)(error)),
        _ => Ok(()),
    }
}

fn read(path: &Path) -> Option<Status> {
    match std::fs::read(path) {
        Ok(bytes) => {
            let status = decode(Bytes::from(bytes));
            if status.is_none() {
                tracing::error!(path = %path.display(), "a tombstone is damaged");
            }
            status
        }
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "a tombstone cannot be read");
            None
        }
    }
}

/// The directories of the hours.
fn hours(ended: &Path) -> Result<Vec<(u64, PathBuf)>, DiskError> {
    let mut hours = Vec::new();
    for dir in std::fs::read_dir(ended).map_err(at("list", ended))? {
        let path = dir.map_err(at("list", ended))?.path();
        let hour = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        hours.extend(hour.map(|hour| (hour, path)));
    }
    Ok(hours)
}

fn read_tombstones(ended: &Path) -> Result<Tombstones, DiskError> {
    let (mut last, mut found) = (0, Vec::new());
    for (hour, dir) in hours(ended)? {
        last = last.max(hour);
        for file in std::fs::read_dir(&dir).map_err(at("list", &dir))? {
            let name = file.map_err(at("list", &dir))?.file_name();
            let uid = name.to_str().map(PodUid::new);
            found.extend(uid.and_then(Result::ok).map(|uid| (uid, hour)));
        }
    }
    Ok(Tombstones::new(last, found))
}

fn decode(mut bytes: Bytes) -> Option<Status> {
    let record = FinalRecord::decode(unframe(&mut bytes)?).ok()?;
    Some(Status {
        namespace: record.namespace,
        name: record.name,
        json: record.json,
        is_final: true,
        released: record.released,
        is_mirror: record.mirror,
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
        Err(error) if error.kind() == ErrorKind::NotFound => unix_seconds(),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(name: &str) -> PodUid {
        PodUid::new(name).unwrap()
    }

    fn status(name: &str) -> Status {
        Status {
            namespace: "d".into(),
            name: name.into(),
            json: Bytes::from_static(b"{}"),
            is_final: true,
            released: true,
            is_mirror: false,
        }
    }

    #[test]
    fn a_tombstone_outlives_the_agent_and_comes_back_as_a_record() {
        let dir = tempfile::tempdir().unwrap();
        let (files, _) = Finals::open(dir.path()).unwrap();
        files.begin_hour(4).unwrap();
        files.write(&uid("a"), &status("p")).unwrap();
        files.bury(&(uid("a"), 4)).unwrap();
        files.bury(&(uid("a"), 4)).unwrap();
        files.begin_hour(5).unwrap();

        let (files, found) = Finals::open(dir.path()).unwrap();
        assert!(found.records.is_empty());
        assert_eq!(found.tombstones, Tombstones::new(5, [(uid("a"), 4)]));
        let names = files.names(&[(uid("a"), 4), (uid("absent"), 4)]);
        assert_eq!(names, [(uid("a"), "d".to_owned(), "p".to_owned())]);
        assert_eq!(files.exhume(&(uid("a"), 4)), Some(status("p")));
        assert_eq!(files.exhume(&(uid("a"), 4)), Some(status("p")), "once more");

        let (_, found) = Finals::open(dir.path()).unwrap();
        assert_eq!(found.records, [(uid("a"), status("p"))]);
        assert_eq!(found.tombstones, Tombstones::new(5, []));
    }

    #[test]
    fn tombstones_go_with_their_hour_and_damaged_ones_say_so() {
        let dir = tempfile::tempdir().unwrap();
        let (files, _) = Finals::open(dir.path()).unwrap();
        for (name, hour) in [("old", 1), ("young", 2), ("torn", 2)] {
            files.write(&uid(name), &status(name)).unwrap();
            files.bury(&(uid(name), hour)).unwrap();
        }
        std::fs::write(dir.path().join("ended/2/torn"), b"xx").unwrap();
        std::fs::write(dir.path().join("ended/stray"), b"").unwrap();
        files.begin_hour(1 + HOURS_MAX).unwrap();
        let (files, found) = Finals::open(dir.path()).unwrap();
        let left: Vec<_> = found.tombstones.all().collect();
        assert_eq!(left, [(uid("torn"), 2), (uid("young"), 2)]);
        assert_eq!(found.tombstones.hour(), 1 + HOURS_MAX);
        assert_eq!(files.exhume(&(uid("torn"), 2)), None);
        assert_eq!(files.exhume(&(uid("old"), 1)), None);
        files.forget(&(uid("young"), 2)).unwrap();
        files.forget(&(uid("young"), 2)).unwrap();
        assert_eq!(files.exhume(&(uid("young"), 2)), None);
    }
}
