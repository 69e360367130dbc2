//! Programs the policies of every new view, and says in the pods' events what does not fit.
//!
//! Beside the Services, and not after them: a plan of Services may wait for a quarantine, and a new pod
//! must not wait with it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::StuckPod;
use crate::dataplane::{Dataplane, DataplaneError};
use crate::pods::Order;
use crate::view::View;

const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Until `shutdown`.
pub async fn follow(
    dataplane: Arc<dyn Dataplane>,
    mut view: watch::Receiver<Arc<View>>,
    orders: mpsc::Sender<Order>,
    shutdown: CancellationToken,
) {
    let mut retry = RETRY_FIRST;
    let mut known = BTreeMap::new();
    view.mark_changed();
    // Cancel-safe: it only waits.
    while let Some(Ok(())) = shutdown.run_until_cancelled(view.changed()).await {
        let newest = view.borrow_and_update().clone();
        match program(&dataplane, &newest).await {
            Ok(stuck) => {
                tell(&newest, &mut known, stuck, &orders).await;
                retry = RETRY_FIRST;
            }
            Err(error) => {
                error!(rev = newest.rev, %error, "network policies are not programmed; trying again");
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(RETRY_MAX);
                view.mark_changed();
            }
        }
    }
}

/// Off the runtime's workers: many peers are many system calls.
async fn program(
    dataplane: &Arc<dyn Dataplane>,
    view: &Arc<View>,
) -> Result<Vec<StuckPod>, DataplaneError> {
    let (dataplane, view) = (dataplane.clone(), view.clone());
    let task = tokio::task::spawn_blocking(move || dataplane.apply_policies(&view));
    task.await.unwrap_or_else(|error| {
        Err(DataplaneError::Kernel {
            what: "apply policies".into(),
            reason: error.to_string(),
        })
    })
}

/// An event for each pod that is newly closed.
async fn tell(
    view: &View,
    known: &mut BTreeMap<String, String>,
    stuck: Vec<StuckPod>,
    orders: &mpsc::Sender<Order>,
) {
    let stuck: BTreeMap<String, String> = stuck
        .into_iter()
        .map(|stuck| (stuck.pod, stuck.reason))
        .collect();
    for (name, reason) in stuck.iter().filter(|(name, _)| !known.contains_key(*name)) {
        let found = view.pods.iter().find(|(_, pod)| {
            let (namespace, own) = (&pod.metadata.namespace, &pod.metadata.name);
            name.split_once('/')
                == Some((
                    namespace.as_deref().unwrap_or_default(),
                    own.as_deref().unwrap_or_default(),
                ))
        });
        if let Some((uid, _)) = found {
            let order = Order::Event {
                pod: uid.clone(),
                reason: "NetworkPolicyTooLarge",
                message: reason.clone(),
            };
            let _ = orders.send(order).await;
        }
    }
    *known = stuck;
}
