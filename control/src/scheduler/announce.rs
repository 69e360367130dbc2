//! Events about bindings, written beside them: a binding does not wait for its event.
//!
//! ```text
//!  bound ─► queue (bounded) ─[`PAUSE`]─► at most [`AT_ONCE`] writes ─► store
//!              └── full: dropped, counted, told once
//! ```
//! The store keeps no more than some thousand events, so in a burst of more pods than that most of them
//! would be written only to be removed; what waits longest is then not written at all.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Event;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::server::registry::{EVENT_COUNT_MAX, Registry};

/// Writes under way: few, so that the store's groups are left to bindings.
const AT_ONCE: usize = 16;
/// How long an event waits: the pod that it tells of is starting, and its node and this program may share
/// their processors and the disk.
const PAUSE: Duration = Duration::from_millis(50);

/// The way in. Dropping it ends the writer when everything is written.
pub(super) struct Announcer {
    queue: mpsc::Sender<(Instant, Event)>,
    dropped: Arc<AtomicU64>,
}

impl Announcer {
    /// Starts the writer.
    pub(super) fn start(registry: Registry) -> Announcer {
        Announcer::with_room(registry, EVENT_COUNT_MAX)
    }

    fn with_room(registry: Registry, count: usize) -> Announcer {
        let (queue, events) = mpsc::channel(count);
        let dropped = Arc::<AtomicU64>::default();
        tokio::spawn(write(registry, events, Arc::clone(&dropped)));
        Announcer { queue, dropped }
    }

    /// Never waits.
    pub(super) fn tell(&self, event: Event) {
        let at = Instant::now() + PAUSE;
        if self.queue.try_send((at, event)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn write(
    registry: Registry,
    mut events: mpsc::Receiver<(Instant, Event)>,
    dropped: Arc<AtomicU64>,
) {
    let mut writes = JoinSet::new();
    loop {
        tokio::select! {
            // Both arms are cancel safe: an event or an outcome that is not taken stays.
            event = events.recv(), if writes.len() < AT_ONCE => {
                let Some((at, event)) = event else { break };
                tokio::time::sleep_until(at).await;
                let registry = registry.clone();
                writes.spawn(async move { registry.event(event).await });
            }
            Some(_) = writes.join_next() => {}
        }
        let lost = match events.is_empty() {
            true => dropped.swap(0, Ordering::Relaxed),
            false => 0,
        };
        if lost > 0 {
            tracing::warn!(
                lost,
                "events of bindings were not written: too many at once"
            );
        }
    }
    while writes.join_next().await.is_some() {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::registry::Settings;
    use crate::store::Store;
    use gantry_api::k8s_openapi::api::core::v1::Pod;

    use crate::controllers::{EventType, event_about};

    #[tokio::test]
    async fn a_burst_is_written_as_far_as_there_is_room_and_nobody_waits() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store")).unwrap();
        let settings = Settings {
            service_cidr: "10.96.0.0/16".parse().unwrap(),
            reserved_addresses: Vec::new(),
        };
        let registry = Registry::new(store, &settings);
        registry.ensure_defaults().await.unwrap();
        let announcer = Announcer::with_room(registry.clone(), 40);
        // One thread: the writer has no turn before this one waits.
        for number in 0..50 {
            let mut pod = Pod::default();
            pod.metadata.namespace = Some("default".to_owned());
            pod.metadata.name = Some(format!("p{number}"));
            let message = "bound".to_owned();
            announcer.tell(event_about(
                &pod,
                "s",
                EventType::Normal,
                "Scheduled",
                message,
            ));
        }
        assert_eq!(announcer.dropped.load(Ordering::Relaxed), 10);
        let written = async {
            while registry.list::<Event>(None).unwrap().1.len() < 40 {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        let patience = std::time::Duration::from_secs(20);
        tokio::time::timeout(patience, written).await.unwrap();
        assert_eq!(announcer.dropped.load(Ordering::Relaxed), 0, "told of");
    }
}
