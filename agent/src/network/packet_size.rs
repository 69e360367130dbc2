//! The size of packets of pods that run: it follows the ways to other nodes.
//!
//! ```text
//!  smaller   inside ─► host end ─► bridge        larger   bridge ─► host end ─► inside
//! ```
//! In this order nothing is sent that the next link does not take. New pods get the size when they are
//! attached ([`Wirer::network`]); sandboxes in waiting with another one are thrown away.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use gantry_cni::bridge;
use gantry_cni::config::BRIDGE_NAME;
use gantry_cni::netlink::{Link, Netlink};
use gantry_cni::netns::Netns;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::chain::IFNAME;
use super::pod_networks::{from_cni, pinned};
use super::pool::Pool;
use super::record::{Record, Wiring};
use super::wires::Wirer;
use super::{NetworkError, Routes};

/// Between attempts after a failure.
const RETRY: Duration = Duration::from_secs(5);

/// Runs until shutdown, or until nobody tells the size any more.
pub(super) async fn follow(
    wirer: Arc<Wirer>,
    pool: Arc<Pool>,
    mut routes: watch::Receiver<Routes>,
    shutdown: CancellationToken,
) {
    let mut done = None;
    loop {
        let wanted = routes.borrow_and_update().mtu;
        let mut is_due = false;
        if let Some(mtu) = wanted.filter(|_| wanted != done) {
            match apply(&wirer, &pool, mtu).await {
                Ok(()) => done = wanted,
                Err(error) => {
                    tracing::warn!(mtu, %error, "pods may send packets of another size");
                    is_due = true;
                }
            }
        }
        let retry = async {
            match is_due {
                true => tokio::time::sleep(RETRY).await,
                false => std::future::pending().await,
            }
        };
        tokio::select! {
            // Cancel-safe: all only wait.
            () = shutdown.cancelled() => return,
            () = retry => {}
            changed = routes.changed() => if changed.is_err() { return },
        }
    }
}

/// Gives all pods of our bridge this size. Goes on after a failure and returns the first.
pub(super) async fn apply(
    wirer: &Arc<Wirer>,
    pool: &Arc<Pool>,
    mtu: u32,
) -> Result<(), NetworkError> {
    let host = Netlink::open().map_err(from_cni)?;
    let bridge = host.link_by_name(BRIDGE_NAME).await.map_err(from_cni)?;
    let Some(bridge) = bridge.filter(|link| link.kind == "bridge") else {
        return Ok(());
    };
    if bridge.mtu < mtu {
        host.set_mtu(bridge.index, mtu).await.map_err(from_cni)?;
    }
    let name = wirer.network(&[], wirer.link)?.name;
    let mut count = 0;
    let mut first = Ok(());
    for (pod, dir) in pinned(&wirer.paths)? {
        let Some(record) = Record::load(&wirer.paths.run, &pod)? else {
            continue;
        };
        if !matches!(record.wiring, Wiring::Bridge { .. }) {
            continue;
        }
        let port = bridge::host_ifname(&name, &record.owner(&pod));
        match resize(&host, &port, &dir.join("net"), mtu).await {
            Ok(is_new) => count += usize::from(is_new),
            Err(error) => first = first.and(Err(error)),
        }
    }
    if bridge.mtu > mtu {
        host.set_mtu(bridge.index, mtu).await.map_err(from_cni)?;
    }
    let is_other = |mtu_of_set: u32| mtu_of_set != mtu;
    pool.discard(wirer, |set| {
        (set.wires.as_ref()).is_some_and(|wires| is_other(wires.attached.mtu))
    })
    .await;
    if bridge.mtu != mtu {
        tracing::info!(mtu, pods = count, "packets of pods have another size");
    }
    first
}

/// Both ends of a pod's veth; false: they have it, or the pod has gone meanwhile.
async fn resize(host: &Netlink, port: &str, netns: &Path, mtu: u32) -> Result<bool, NetworkError> {
    let outer = host.link_by_name(port).await.map_err(from_cni)?;
    let (Some(outer), Ok(netns)) = (outer, Netns::open(netns)) else {
        return Ok(false);
    };
    let pod = Netlink::open_in(&netns).await.map_err(from_cni)?;
    let inner = pod.link_by_name(IFNAME).await.map_err(from_cni)?;
    let Some(inner) = inner.filter(|inner| inner.peer == Some(outer.index)) else {
        return Ok(false);
    };
    let mut ends: [(&Netlink, &Link); 2] = [(host, &outer), (&pod, &inner)];
    if mtu < inner.mtu {
        ends.reverse();
    }
    let mut is_new = false;
    for (side, link) in ends {
        if link.mtu != mtu {
            side.set_mtu(link.index, mtu).await.map_err(from_cni)?;
            is_new = true;
        }
    }
    Ok(is_new)
}
