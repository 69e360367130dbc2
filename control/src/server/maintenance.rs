//! The store itself, for administrators: what is in it, how it is, backups, a new key.
//!
//! A backup is of one revision: the list of the entries is taken at once, and shares their values with the
//! index. What is encoded and not sent yet is bounded by [`CHUNK_BYTES`] and [`CHUNKS_WAITING_MAX`].

use std::path::PathBuf;

use bytes::Bytes;
use gantry_api::proto;
use gantry_api::proto::store_server::{Store as StoreApi, StoreServer};
use gantry_api::status::{Reason, Status};
use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response};

use super::rbac::caller;
use super::registry::Registry;
use crate::pki::carried_files;
use crate::store::backup::{Header, Writer};
use crate::store::seal::{KeyError, KeyFile};
use crate::store::{BACKUP_PREFIX, RESTORED_KEY};

/// Bytes of one message.
const CHUNK_BYTES: usize = 256 << 10;
/// Messages that a slow reader leaves waiting.
const CHUNKS_WAITING_MAX: usize = 4;

/// Where the keys are that a backup takes along, and the one that seals it.
pub(super) struct Places {
    pub(super) data_dir: PathBuf,
    pub(super) store_key: PathBuf,
}

/// The service; see the module.
pub(super) struct MaintenanceService {
    registry: Registry,
    places: Places,
}

impl MaintenanceService {
    /// Over this registry's store.
    pub(super) fn server(registry: Registry, places: Places) -> StoreServer<Self> {
        StoreServer::new(Self { registry, places })
    }

    /// A backup that has only its header and the keys yet.
    fn begin(&self, header: &Header, in_clear: bool) -> Result<Writer, Status> {
        let no_backup = |error: &dyn std::fmt::Display| {
            Status::internal(format!("no backup can be taken: {error}"))
        };
        let mut writer = match in_clear {
            true => Writer::in_clear(header),
            false => {
                // Read each time: a rotation, or an operator, may have put another one first.
                let keys = KeyFile::read(&self.places.store_key).map_err(|e| no_backup(&e))?;
                let keys = keys.ok_or_else(|| {
                    let path = self.places.store_key.display();
                    no_backup(&format!("the key file {path} is gone: put it back"))
                })?;
                Writer::sealed(header, keys.first()).map_err(|e| no_backup(&e))?
            }
        };
        let files = carried_files(&self.places.data_dir).map_err(|e| no_backup(&e))?;
        for (name, text) in &files {
            writer
                .file(name, text.as_bytes())
                .map_err(|e| no_backup(&e))?;
        }
        Ok(writer)
    }
}

/// Whoever reads the store reads every Secret.
fn check_master<T>(request: &Request<T>, what: &str) -> Result<(), Status> {
    let caller = caller(request)?;
    if caller.is_master() {
        return Ok(());
    }
    let user = &caller.user;
    let text = format!("User {user:?} cannot {what}: only group system:masters can");
    Err(Status::new(Reason::Forbidden, text))
}

type Chunk = Result<proto::BackupChunk, tonic::Status>;

fn chunk(data: Bytes) -> Chunk {
    Ok(proto::BackupChunk { data, done: None })
}

fn cannot_seal(error: &KeyError) -> tonic::Status {
    Status::internal(format!("the backup ends here: {error}")).into()
}

#[tonic::async_trait]
impl StoreApi for MaintenanceService {
    type BackupStream = ReceiverStream<Chunk>;
    type ReadStream = ReceiverStream<Result<proto::StoreEntry, tonic::Status>>;

    async fn backup(
        &self,
        request: Request<proto::BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, tonic::Status> {
        check_master(&request, "take a backup")?;
        let store = self.registry.store();
        let lineage = store.lineage().clone();
        let (revision, entries) = store.list(BACKUP_PREFIX);
        let header = Header {
            lineage_counter: lineage.counter,
            lineage_id: lineage.id,
            revision,
            taken: Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        };
        let mut writer = self.begin(&header, request.get_ref().in_clear)?;
        let (chunks, stream) = mpsc::channel(CHUNKS_WAITING_MAX);
        tokio::spawn(async move {
            for entry in entries {
                if let Err(error) = writer.entry(&entry) {
                    let _ = chunks.send(Err(cannot_seal(&error))).await;
                    return;
                }
                // A reader that goes away ends the backup.
                if writer.waiting() >= CHUNK_BYTES
                    && chunks.send(chunk(writer.take())).await.is_err()
                {
                    return;
                }
            }
            let (rest, finished) = writer.finish();
            let done = proto::BackupDone {
                bytes: finished.bytes,
                entries: finished.totals.entries,
                revision,
            };
            let last = proto::BackupChunk {
                data: Bytes::new(),
                done: Some(done),
            };
            if chunks.send(chunk(rest)).await.is_ok() {
                let _ = chunks.send(Ok(last)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn read(
        &self,
        request: Request<proto::StoreReadRequest>,
    ) -> Result<Response<Self::ReadStream>, tonic::Status> {
        check_master(&request, "read the store")?;
        let proto::StoreReadRequest { prefix, keys_only } = request.into_inner();
        let (_, entries) = self.registry.store().list(&prefix);
        let (sender, stream) = mpsc::channel(CHUNKS_WAITING_MAX);
        tokio::spawn(async move {
            for entry in entries {
                let value = match keys_only {
                    true => Bytes::new(),
                    false => entry.value.clone(),
                };
                let entry = proto::StoreEntry {
                    key: entry.key.to_string(),
                    value,
                    create_revision: entry.create_revision,
                    mod_revision: entry.mod_revision,
                };
                if sender.send(Ok(entry)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn status(
        &self,
        request: Request<proto::StoreStatusRequest>,
    ) -> Result<Response<proto::StoreStatus>, tonic::Status> {
        check_master(&request, "see how the store is")?;
        let store = self.registry.store();
        let report = store.report().await.map_err(Status::unavailable)?;
        let lineage = store.lineage();
        Ok(Response::new(proto::StoreStatus {
            place: report.place,
            bytes: report.bytes,
            revision: store.revision(),
            oldest: store.oldest(),
            objects: store.count(BACKUP_PREFIX) as u64,
            lineage_counter: lineage.counter,
            lineage_id: lineage.id.clone(),
            sealed_by: report.sealed_by.unwrap_or_default(),
            is_resealing: report.is_resealing,
            is_held: store.get(RESTORED_KEY).is_some(),
        }))
    }

    async fn compact(
        &self,
        request: Request<proto::StoreCompactRequest>,
    ) -> Result<Response<proto::StoreCompacted>, tonic::Status> {
        check_master(&request, "compact the store")?;
        let store = self.registry.store();
        let revision = store.compact().await.map_err(Status::unavailable)?;
        let report = store.report().await.map_err(Status::unavailable)?;
        let bytes = report.bytes;
        Ok(Response::new(proto::StoreCompacted { revision, bytes }))
    }

    async fn rotate_key(
        &self,
        request: Request<proto::RotateKeyRequest>,
    ) -> Result<Response<proto::KeyRotated>, tonic::Status> {
        check_master(&request, "give the store a new key")?;
        let key = self.registry.store().rotate_key().await;
        let key = key
            .map_err(|reason| Status::unavailable(format!("the store has no new key: {reason}")))?;
        Ok(Response::new(proto::KeyRotated { key }))
    }
}
