//! Keeps the node's uplinks in the packet path: those that carry one of its addresses, as they come,
//! go and change.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use gantry_cni::CniError;
use gantry_cni::netlink::Netlink;
use gantry_cni::tunnel::TUNNEL_NAME;
use gantry_cni::uplinks::{AddressChanges, Uplink, uplinks};
use tokio_util::sync::CancellationToken;

use crate::dataplane::Dataplane;

/// A look without a change told: what a lost message or a renamed link would hide.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// An interface that is configured has several changes at once.
const SETTLE: Duration = Duration::from_secs(1);
/// Between attempts after a failure.
const RETRY: Duration = Duration::from_secs(5);

/// Runs until shutdown; failures are logged, once each, and tried again.
pub async fn follow_uplinks(
    dataplane: Arc<dyn Dataplane>,
    node_addresses: Vec<IpAddr>,
    shutdown: CancellationToken,
) {
    let mut changes = AddressChanges::open().ok();
    let mut done: Option<Vec<Uplink>> = None;
    let mut told = None;
    loop {
        let outcome = look(&dataplane, &node_addresses, &mut done).await;
        let wait = match outcome {
            Ok(()) => {
                told = None;
                LOOK_INTERVAL
            }
            Err(reason) => {
                if told.as_ref() != Some(&reason) {
                    tracing::warn!("clients outside of the nodes may not reach Services: {reason}");
                    told = Some(reason);
                }
                RETRY
            }
        };
        let changed = async {
            match &mut changes {
                Some(changes) => changes.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // Cancel-safe: all only wait.
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
            change = changed => {
                if change.is_none() {
                    changes = None;
                }
                tokio::time::sleep(SETTLE).await;
                // One look for all that has come meanwhile: it reads every address of the node.
                while changes.as_mut().and_then(|c| c.next().now_or_never().flatten()).is_some() {}
            }
        }
    }
}

/// Attaches what is new, detaches what is gone; nothing if all is as it was `done`.
async fn look(
    dataplane: &Arc<dyn Dataplane>,
    node_addresses: &[IpAddr],
    done: &mut Option<Vec<Uplink>>,
) -> Result<(), String> {
    let words = |error: CniError| error.to_string();
    let host = Netlink::open().map_err(words)?;
    let addresses = host.all_addresses().await.map_err(words)?;
    let of_node = addresses
        .iter()
        .filter(|(_, address)| node_addresses.contains(address));
    let mut indexes: BTreeSet<u32> = of_node.map(|(index, _)| *index).collect();
    let tunnel = host.link_by_name(TUNNEL_NAME).await.map_err(words)?;
    indexes.extend(tunnel.map(|link| link.index));
    let mut links = Vec::new();
    // These alone: each pod of the node has a link too.
    for index in indexes {
        links.extend(host.link_by_index(index).await.map_err(words)?);
    }
    let mut found = uplinks(&links, &addresses, node_addresses);
    found.sort();
    if done.as_ref() == Some(&found) {
        return Ok(());
    }
    let names: Vec<&str> = found.iter().map(|uplink| uplink.name.as_str()).collect();
    tracing::info!(uplinks = ?names, "Services are reached from outside by these");
    let (own, wanted) = (Arc::clone(dataplane), found.clone());
    let set = tokio::task::spawn_blocking(move || own.set_uplinks(&wanted)).await;
    set.map_err(|error| error.to_string())?
        .map_err(|error| error.to_string())?;
    *done = Some(found);
    Ok(())
}
