//! Puts a backup in the place of what etcd holds, while no control plane runs.
//!
//! It cannot be one transaction, so [`META`] says meanwhile that a restore is under way: a control
//! plane does not start over half of one, and the restore can be run again.

use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::super::restore::next_history;
use super::super::{Entry, Lineage, Revision};
use super::client::Client;
use super::leader::{self, Leader, Replica, Term};
use super::meta::{self, META, Meta, RESTORING, Values, open_values};
use super::proto::{DeleteRangeRequest, PutRequest, TxnRequest};
use super::wire::{self, Sealer as _, everything, put, range_of};
use super::{OPERATION_COUNT_MAX, START_PATIENCE, Servers};
use crate::store::backup::Header;
use crate::store::{RESTORED_KEY, RestoreError};

/// Bytes of values of one transaction: etcd takes 1.5 MiB, and one value may be as large.
const BATCH_BYTES: usize = 512 << 10;
const TAKEN: &str = "a control plane has become the leader";

/// A restore under way.
pub(in super::super) struct Filling {
    client: Client,
    term: Term,
    stop: CancellationToken,
    meta: Meta,
    meta_revision: i64,
    values: Values,
    batch: Vec<Entry>,
    bytes: usize,
}

fn failed(client: &Client, reason: impl ToString) -> RestoreError {
    RestoreError::Io {
        action: "restore into",
        path: client.servers().urls.join(",").into(),
        reason: reason.to_string(),
    }
}

impl Filling {
    /// Takes the place of the leader and removes what etcd holds of ours.
    ///
    /// * `files` – takes the files of the control plane: nobody leads then, and nothing is removed yet.
    pub(in super::super) async fn begin(
        servers: Servers,
        keys: &std::path::Path,
        header: &Header,
        now_s: u64,
        files: impl FnOnce() -> Result<(), RestoreError>,
    ) -> Result<Filling, RestoreError> {
        let client = Client::new(servers);
        let active = leader::holder(&client).await;
        match active.map_err(|failure| failed(&client, failure))? {
            None => {}
            Some(leader) => return Err(RestoreError::Running { path: leader.name }),
        }
        let (lost, stop) = (CancellationToken::new(), CancellationToken::new());
        let us = Replica {
            name: "a restore".to_owned(),
            url: String::new(),
        };
        // Nothing is watched: etcd is asked.
        let (_says_nothing, seen) = watch::channel(Leader::default());
        let term = leader::stand(&client, &us, seen, lost, &stop)
            .await
            .map_err(|failure| failed(&client, failure))?;
        if let Err(error) = files() {
            stop.cancel();
            return Err(error);
        }
        match Filling::clear(&client, keys, header, now_s, term).await {
            Ok((meta, meta_revision, values)) => Ok(Filling {
                client,
                term,
                stop,
                meta,
                meta_revision,
                values,
                batch: Vec::new(),
                bytes: 0,
            }),
            Err(reason) => {
                stop.cancel();
                Err(failed(&client, reason))
            }
        }
    }

    async fn clear(
        client: &Client,
        keys: &std::path::Path,
        header: &Header,
        now_s: u64,
        term: Term,
    ) -> Result<(Meta, i64, Values), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let (old, revision) = meta::read(client).await?;
        let request = range_of(META);
        let now = client
            .ask(START_PATIENCE, |open| {
                let request = request.clone();
                async move { open.kv().range(request).await }
            })
            .await
            .map_err(|failure| text(&failure))?;
        let raw = now.header.map_or(0, |header| header.revision);
        let held = old.as_ref().map(|meta| {
            let shown = u64::try_from(raw).unwrap_or(0) + meta.offset;
            (meta.lineage_counter, shown)
        });
        let (lineage, first) = next_history(header, held, now_s);
        let mut meta = Meta {
            format: RESTORING,
            lineage_counter: lineage.counter,
            lineage_id: lineage.id,
            offset: first,
            data_keys: std::collections::BTreeMap::new(),
            // The files of the cluster may be other ones now.
            cluster: None,
        };
        let values = open_values(&mut meta, keys).map_err(|error| text(&error))?;
        let written = meta::write(client, &meta, revision, Some(term.holds())).await;
        let Some(revision) = written.map_err(|failure| text(&failure))? else {
            return Err(TAKEN.to_owned());
        };
        let (key, range_end) = everything();
        let request = TxnRequest {
            compare: vec![term.holds()],
            success: vec![
                wire::mark(),
                wire::delete(DeleteRangeRequest { key, range_end }),
            ],
            failure: Vec::new(),
        };
        let answer = client
            .call(|open| async move { open.kv().txn(request).await })
            .await
            .map_err(|failure| text(&failure))?;
        match answer.succeeded {
            true => Ok((meta, revision, values)),
            false => Err(TAKEN.to_owned()),
        }
    }

    /// Adds one object.
    pub(in super::super) async fn put(&mut self, entry: Entry) -> Result<(), RestoreError> {
        let bytes = entry.value.len() + entry.key.len();
        // A large one goes alone: with others it would be more than etcd takes.
        let is_full = self.bytes + bytes > BATCH_BYTES || self.batch.len() >= OPERATION_COUNT_MAX;
        if is_full && !self.batch.is_empty() {
            self.flush().await?;
        }
        self.bytes += bytes;
        self.batch.push(entry);
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), RestoreError> {
        self.bytes = 0;
        let mut request = TxnRequest {
            compare: vec![self.term.holds()],
            success: vec![wire::mark()],
            failure: Vec::new(),
        };
        for entry in self.batch.drain(..) {
            let value = self.values.seal(&entry.key, &entry.value);
            let value = value.map_err(|reason| failed(&self.client, reason))?;
            request.success.push(put(PutRequest {
                key: wire::outer(&entry.key),
                value,
                lease: 0,
            }));
        }
        let answer = self
            .client
            .call(|open| async move { open.kv().txn(request).await })
            .await;
        match answer {
            Ok(answer) if answer.succeeded => Ok(()),
            Ok(_) => Err(failed(&self.client, TAKEN)),
            Err(failure) => Err(failed(&self.client, failure)),
        }
    }

    /// The mark of the restore, and then the moment: what etcd holds is a store.
    pub(in super::super) async fn finish(
        mut self,
        header: &Header,
    ) -> Result<(Lineage, Revision), RestoreError> {
        self.flush().await?;
        let value = serde_json::to_vec(header).unwrap_or_default();
        self.batch.push(Entry {
            key: RESTORED_KEY.into(),
            value: Bytes::from(value),
            create_revision: 0,
            mod_revision: 0,
        });
        self.flush().await?;
        self.meta.format = meta::FORMAT;
        let holds = Some(self.term.holds());
        let written = meta::write(&self.client, &self.meta, self.meta_revision, holds).await;
        let written = written.map_err(|failure| failed(&self.client, failure))?;
        if written.is_none() {
            return Err(failed(&self.client, TAKEN));
        }
        self.stop.cancel();
        let lineage = Lineage {
            counter: self.meta.lineage_counter,
            id: self.meta.lineage_id.clone(),
        };
        // The lease is given back by another task: a moment for it.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        Ok((lineage, self.meta.offset))
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
