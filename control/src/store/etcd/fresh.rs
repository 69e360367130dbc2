//! Reads that are as new as any write that was acknowledged before, by whatever control plane.
//!
//! ```text
//!  readers ─► queue ─► one look at HEAD for all that wait ─► each waits until the index has its revision
//! ```
//! Every transaction of the store writes [`super::wire::HEAD`], so that its revision is that of the store's
//! last change, deletions included. The look is linearizable: etcd asks a majority whether its leader still
//! is one. A control plane that was cut off, or slept, cannot answer from what it remembers.

use tokio::sync::{mpsc, oneshot};

use super::super::StoreError;
use super::client::Client;
use super::wire::{HEAD, range_of};
use super::{PATIENCE, unavailable};

/// Readers that wait at once; more wait to be queued.
const QUEUE: usize = 4_096;

type Answer = Result<i64, StoreError>;

/// Asks for all readers; clones share it.
#[derive(Clone)]
pub(super) struct Looks {
    queue: mpsc::Sender<oneshot::Sender<Answer>>,
}

impl Looks {
    /// Ends with the last clone.
    pub(super) fn start(client: Client) -> Looks {
        let (queue, waiting) = mpsc::channel(QUEUE);
        tokio::spawn(run(client, waiting));
        Looks { queue }
    }

    /// etcd's revision of the last change of the store; 0 before the first.
    pub(super) async fn last(&self) -> Answer {
        let (answer, answered) = oneshot::channel();
        let queued = self.queue.send(answer).await;
        queued.map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }
}

async fn run(client: Client, mut waiting: mpsc::Receiver<oneshot::Sender<Answer>>) {
    let mut readers = Vec::new();
    // Who comes while a look is under way waits for the next one: it may have seen a later write.
    while waiting.recv_many(&mut readers, QUEUE).await > 0 {
        let answer = look(&client).await;
        for reader in readers.drain(..) {
            // A reader that has gone away is none of ours.
            let _ = reader.send(answer.clone());
        }
    }
}

async fn look(client: &Client) -> Answer {
    let request = range_of(HEAD);
    let found = client
        .ask(PATIENCE, |open| {
            let request = request.clone();
            async move { open.kv().range(request).await }
        })
        .await
        .map_err(unavailable)?;
    Ok(found.kvs.first().map_or(0, |kv| kv.mod_revision))
}
