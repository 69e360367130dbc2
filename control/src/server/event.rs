//! Events: recorded best effort, counted when they repeat, gone after an hour.
//!
//! One record per (object, reason, message, source): a crash loop costs one object and a growing
//! count. Memory and store are bounded by [`EVENT_COUNT_MAX`]; the oldest goes first.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Event;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use gantry_api::kinds;
use gantry_api::status::Status;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::commit::store_status;
use super::object;
use super::registry::kind_named;
use super::rules::generated_name;
use crate::store::{Store, StoreError, Txn};

/// How long an event is kept after it was seen last.
const TIME_TO_LIVE: Duration = Duration::from_secs(3600);
/// Most events in the store.
pub(crate) const EVENT_COUNT_MAX: usize = 5_000;
/// Pause between looks for old events.
const EXPIRY_PAUSE: Duration = Duration::from_secs(60);
/// Longest message; the rest is cut.
const MESSAGE_BYTES_MAX: usize = 1_024;

/// What makes two events the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Identity {
    object: String,
    reason: String,
    message: String,
    source: String,
}

/// Where the latest record of each event is.
pub(super) struct Events {
    keys: Mutex<HashMap<Identity, String>>,
}

impl Events {
    /// Knows the events that are in the store already.
    pub(super) fn restore(store: &Store) -> Events {
        let prefix = kinds::by_plural("", "events").map(|kind| kind.store_prefix(None));
        let entries = prefix.map(|p| store.list(&p).1).unwrap_or_default();
        let known = entries.iter().filter_map(|entry| {
            let event: Event = object::decode(entry).ok()?;
            Some((identity(&event), entry.key.to_string()))
        });
        Events {
            keys: Mutex::new(known.collect()),
        }
    }

    /// Writes the event, or counts it.
    pub(super) async fn record(&self, store: &Store, event: Event) {
        if let Err(error) = self.try_record(store, event).await {
            tracing::warn!(%error, "an event could not be recorded");
        }
    }

    async fn try_record(&self, store: &Store, mut event: Event) -> Result<(), Status> {
        let kind = kind_named("events")?;
        if let Some(message) = event.message.as_mut() {
            message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
        }
        complete(&mut event);
        let namespace = event.metadata.namespace.clone().unwrap_or_default();
        let space = kind_named("namespaces")?.store_key("", &namespace);
        if store.get(&space).is_none() {
            return Err(Status::not_found(kind_named("namespaces")?, &namespace));
        }
        let identity = identity(&event);
        let known = self.lock().get(&identity).cloned();
        if let Some(key) = known
            && count(store, &key, &event).await?
        {
            return Ok(());
        }
        let name = event.metadata.name.clone().unwrap_or_default();
        let key = kind.store_key(&namespace, &name);
        let value = serde_json::to_value(&event)
            .map_err(|error| Status::internal(format!("cannot encode an event: {error}")))?;
        let txn = Txn::new()
            .require_absent(key.as_str())
            // Its namespace may go at the same time.
            .require_exists(space.as_str())
            .put(key.as_str(), object::encode(&value)?);
        store.commit(txn).await.map_err(|e| store_status(&e))?;
        let mut keys = self.lock();
        if keys.len() >= 2 * EVENT_COUNT_MAX {
            // Only happens when events arrive faster than they expire: forgetting costs a count.
            keys.clear();
        }
        keys.insert(identity, key);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Identity, String>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes old and surplus events, until cancelled.
    pub(super) async fn expire(&self, store: &Store, token: CancellationToken) {
        let mut ticks = tokio::time::interval(EXPIRY_PAUSE);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                // Both arms are cancel safe: a tick that is lost comes again.
                () = token.cancelled() => return,
                _ = ticks.tick() => {}
            }
            if let Err(error) = self.remove_old(store, Timestamp::now()).await {
                tracing::warn!(%error, "old events could not be removed");
            }
        }
    }

    async fn remove_old(&self, store: &Store, now: Timestamp) -> Result<(), StoreError> {
        let Some(kind) = kinds::by_plural("", "events") else {
            return Ok(());
        };
        let mut dated: Vec<(Timestamp, String)> = store
            .list(&kind.store_prefix(None))
            .1
            .iter()
            .map(|entry| {
                let event = object::decode::<Event>(entry);
                let seen = event.map_or(Timestamp::UNIX_EPOCH, |event| last_seen(&event));
                (seen, entry.key.to_string())
            })
            .collect();
        dated.sort();
        let surplus = dated.len().saturating_sub(EVENT_COUNT_MAX);
        let oldest = now - jiff::SignedDuration::try_from(TIME_TO_LIVE).unwrap_or_default();
        let old: Vec<String> = dated
            .into_iter()
            .enumerate()
            .filter(|(index, (seen, _))| *index < surplus || *seen < oldest)
            .map(|(_, (_, key))| key)
            .collect();
        for chunk in old.chunks(store.operation_count_max()) {
            let txn = chunk
                .iter()
                .fold(Txn::new(), |txn, k| txn.delete(k.as_str()));
            store.commit(txn).await?;
        }
        self.lock().retain(|_, key| store.get(key).is_some());
        Ok(())
    }
}

/// Adds to the count of the record at `key`; false when it is gone.
async fn count(store: &Store, key: &str, event: &Event) -> Result<bool, Status> {
    for _ in 0..4 {
        let Some(entry) = store.get(key) else {
            return Ok(false);
        };
        let mut record: Event = object::decode(&entry)?;
        let times = record
            .count
            .unwrap_or(1)
            .saturating_add(event.count.unwrap_or(1));
        record.count = Some(times);
        record.last_timestamp.clone_from(&event.last_timestamp);
        let value = serde_json::to_value(&record)
            .map_err(|error| Status::internal(format!("cannot encode an event: {error}")))?;
        let txn = Txn::new()
            .require_at(key, entry.mod_revision)
            .put(key, object::encode(&value)?);
        match store.commit(txn).await {
            Ok(_) => return Ok(true),
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => return Err(store_status(&error)),
        }
    }
    // Somebody else counts it at this very moment: the loss of one is no loss.
    Ok(true)
}

/// Gives the event what its writer left out.
fn complete(event: &mut Event) {
    let now = Time(Timestamp::now());
    let object = &event.involved_object;
    let namespace = event.metadata.namespace.clone().filter(|n| !n.is_empty());
    let namespace = namespace.or_else(|| object.namespace.clone().filter(|n| !n.is_empty()));
    event.metadata.namespace = Some(namespace.unwrap_or_else(|| "default".to_owned()));
    if event
        .metadata
        .name
        .as_deref()
        .unwrap_or_default()
        .is_empty()
    {
        let prefix = object.name.clone().unwrap_or_else(|| "event".to_owned());
        event.metadata.name = Some(generated_name(&format!("{prefix}.")));
    }
    event.metadata.uid = Some(uuid::Uuid::new_v4().to_string());
    event.metadata.creation_timestamp = Some(now.clone());
    event.metadata.resource_version = None;
    let last = event.last_timestamp.get_or_insert(now).clone();
    event.first_timestamp.get_or_insert(last);
    event.count.get_or_insert(1);
    event.type_.get_or_insert_with(|| "Normal".to_owned());
}

fn last_seen(event: &Event) -> Timestamp {
    let time = event.last_timestamp.as_ref();
    let time = time.or(event.metadata.creation_timestamp.as_ref());
    time.map_or(Timestamp::UNIX_EPOCH, |time| time.0)
}

fn identity(event: &Event) -> Identity {
    let object = &event.involved_object;
    let uid = object.uid.as_deref().unwrap_or_default();
    let source = event.source.as_ref();
    let component = source.and_then(|s| s.component.as_deref());
    let host = source.and_then(|s| s.host.as_deref());
    Identity {
        object: format!(
            "{}/{}/{}/{uid}",
            object.kind.as_deref().unwrap_or_default(),
            object.namespace.as_deref().unwrap_or_default(),
            object.name.as_deref().unwrap_or_default(),
        ),
        reason: event.reason.clone().unwrap_or_default(),
        message: event.message.clone().unwrap_or_default(),
        source: format!(
            "{}/{}",
            component.unwrap_or_default(),
            host.unwrap_or_default()
        ),
    }
}
