//! The store itself, for administrators: backups.
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
use crate::store::BACKUP_PREFIX;
use crate::store::backup::{Header, Writer};

/// Bytes of one message.
const CHUNK_BYTES: usize = 256 << 10;
/// Messages that a slow reader leaves waiting.
const CHUNKS_WAITING_MAX: usize = 4;

/// The service; see the module.
pub(super) struct MaintenanceService {
    registry: Registry,
    data_dir: PathBuf,
}

impl MaintenanceService {
    /// Over this registry's store, with the keys below `data_dir`.
    pub(super) fn server(registry: Registry, data_dir: PathBuf) -> StoreServer<Self> {
        StoreServer::new(Self { registry, data_dir })
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

#[tonic::async_trait]
impl StoreApi for MaintenanceService {
    type BackupStream = ReceiverStream<Chunk>;

    async fn backup(
        &self,
        request: Request<proto::BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, tonic::Status> {
        check_master(&request, "take a backup")?;
        let files = carried_files(&self.data_dir)
            .map_err(|error| Status::internal(format!("no backup without the keys: {error}")))?;
        let store = self.registry.store();
        let lineage = store.lineage().clone();
        let (revision, entries) = store.list(BACKUP_PREFIX);
        let mut writer = Writer::new(&Header {
            lineage_counter: lineage.counter,
            lineage_id: lineage.id,
            revision,
            taken: Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        });
        for (name, text) in &files {
            writer.file(name, text.as_bytes());
        }
        let (chunks, stream) = mpsc::channel(CHUNKS_WAITING_MAX);
        tokio::spawn(async move {
            for entry in entries {
                writer.entry(&entry);
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
}
