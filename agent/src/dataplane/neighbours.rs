//! Asks the nodes whose load balancer addresses this one is to take over whether they are there, for as long
//! as the agent runs.
//!
//! ```text
//!  data plane: whom to watch ─┐
//!  view: addresses, links ────┴► liveness ─► questions ─► discovery ─► answers ─► liveness ─► data plane
//! ```
//! Without an address to take over nobody is asked and nothing is open. A node that is on no link of this
//! one is not watched: the control plane tells of it.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gantry_cni::CniError;
use gantry_cni::netlink::Netlink;
use ipnet::IpNet;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Dataplane;
use super::discovery::{Asked, Discovery};
use crate::network::routes::node_addresses;
use crate::services::announce::Watch;
use crate::services::index::ip_of;
use crate::services::liveness::{Liveness, Seen, WATCHED_COUNT_MAX, Watched};
use crate::view::View;

/// After a failure, and between two looks at the node's links.
const LOOK_INTERVAL: Duration = Duration::from_secs(15);

/// A link of this node, with an address of this node on it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Place {
    asked: Asked,
    network: IpNet,
}

/// Runs until shutdown. Failures are logged, once each: then the control plane alone tells who has gone.
pub async fn look_after_neighbours(
    dataplane: Arc<dyn Dataplane>,
    mut view: watch::Receiver<Arc<View>>,
    shutdown: CancellationToken,
) {
    let mut wanted = dataplane.watched_nodes();
    let (clock, mut liveness) = (Instant::now(), Liveness::default());
    let mut discovery: Option<Discovery> = None;
    let mut places: BTreeMap<String, Asked> = BTreeMap::new();
    let (mut told, mut said): (Option<Seen>, Option<String>) = (None, None);
    let mut nodes = view.borrow().nodes.clone();
    let mut is_due = true;
    let mut look_at = Duration::ZERO;
    loop {
        if is_due || clock.elapsed() >= look_at {
            let watch = wanted.borrow_and_update().clone();
            let newest = view.borrow_and_update().clone();
            nodes = newest.nodes.clone();
            if let Some(watch) = watch {
                let found = look(&watch, &newest, &mut discovery).await;
                if let (Err(reason), true) = (&found, said.is_none()) {
                    tracing::warn!(
                        "a load balancer address moves only when the control plane has given its node up: {reason}"
                    );
                    said = Some(reason.clone());
                }
                if found.is_ok() {
                    said = None;
                }
                let found = found.unwrap_or_default();
                places = found
                    .iter()
                    .map(|(name, (_, asked))| (name.clone(), *asked))
                    .collect();
                let watched = found
                    .into_iter()
                    .map(|(name, (watched, _))| (name, watched));
                liveness.watch(watched.collect(), clock.elapsed());
            }
            look_at = clock.elapsed() + LOOK_INTERVAL;
        }
        if let Some(discovery) = &discovery {
            for question in liveness.turn(clock.elapsed()) {
                if let Some(asked) = places.get(&question.node) {
                    // A link that is down is one that does not answer.
                    let _ = discovery.ask(*asked, question.address, question.mac);
                }
            }
        }
        let has_watch = wanted.borrow().is_some();
        let seen = liveness.seen(clock.elapsed());
        let is_known = has_watch && (told.is_some() || liveness.is_settled());
        if is_known && told.as_ref() != Some(&seen) {
            tell(told.as_ref(), &seen);
            match dataplane.set_seen(&seen).await {
                Ok(()) => told = Some(seen),
                Err(error) => {
                    tracing::warn!(%error, "load balancer addresses of nodes that have gone")
                }
            }
        }
        let next = liveness.next().filter(|_| discovery.is_some());
        let wait = next
            .unwrap_or(look_at)
            .min(look_at)
            .saturating_sub(clock.elapsed());
        // With nobody to watch only a change wakes it.
        let is_idle = wanted.borrow().as_ref().is_some_and(Watch::is_empty);
        let answered = async {
            match &discovery {
                Some(discovery) => discovery.answer().await,
                None => std::future::pending().await,
            }
        };
        is_due = tokio::select! {
            // Cancel-safe: all only wait, or return what they have taken.
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(wait), if !is_idle => false,
            answer = answered => {
                match answer {
                    Ok((address, mac)) => liveness.answered(address, mac, clock.elapsed()),
                    Err(_) => discovery = None,
                }
                discovery.is_none()
            }
            changed = wanted.changed() => match changed {
                Ok(()) => true,
                Err(_) => return,
            },
            changed = view.changed() => match changed {
                // Views are many, and of pods mostly.
                Ok(()) => !is_idle && !Arc::ptr_eq(&nodes, &view.borrow_and_update().nodes),
                Err(_) => return,
            },
        };
    }
}

fn tell(before: Option<&Seen>, now: &Seen) {
    let nothing = Seen::default();
    let before = &before.unwrap_or(&nothing).silent;
    for node in now.silent.difference(before) {
        tracing::warn!(
            node,
            "does not answer on the link: its load balancer addresses are taken over"
        );
    }
    for node in before.difference(&now.silent) {
        tracing::info!(node, "its load balancer addresses are its own again");
    }
}

type Found = BTreeMap<String, (Watched, Asked)>;

/// Whom to ask where; opens what is needed for it, and closes it when it is not.
async fn look(
    watch: &Watch,
    view: &View,
    discovery: &mut Option<Discovery>,
) -> Result<Found, String> {
    if watch.is_empty() {
        *discovery = None;
        return Ok(Found::new());
    }
    let here = places().await.map_err(|error| error.to_string())?;
    let found = find(watch, view, &here);
    if found.is_empty() {
        *discovery = None;
    } else if discovery.is_none() {
        let opened = Discovery::open();
        *discovery = Some(opened.map_err(|error: io::Error| format!("packet sockets: {error}"))?);
    }
    Ok(found)
}

/// This node's addresses, on links that have hardware addresses.
async fn places() -> Result<Vec<Place>, CniError> {
    let host = Netlink::open()?;
    let mut places = Vec::new();
    for (ifindex, network) in host.all_networks().await? {
        let link = host.link_by_index(ifindex).await?;
        let Some(mac) = link.filter(|link| link.up).and_then(|link| link.mac) else {
            continue;
        };
        let from = network.addr();
        places.push(Place {
            asked: Asked { ifindex, mac, from },
            network,
        });
    }
    Ok(places)
}

/// Those of the nodes that have an address on a link of this one.
fn find(watch: &Watch, view: &View, here: &[Place]) -> Found {
    let found = watch.iter().filter_map(|(name, claim)| {
        let node = view.nodes.get(name)?;
        node_addresses(node).into_iter().find_map(|address| {
            let mut on = here.iter();
            let place = on.find(|it| it.network.contains(&address) && it.asked.from != address)?;
            // Asked from an address of the same family.
            let claim = claim.as_ref().map(ip_of);
            let watched = Watched {
                address,
                claim: claim.filter(|claim| claim.is_ipv4() == address.is_ipv4()),
                is_dead: node.dead,
            };
            Some((name.clone(), (watched, place.asked)))
        })
    });
    found.take(WATCHED_COUNT_MAX).collect()
}

#[cfg(test)]
mod tests {
    use gantry_api::proto;

    use super::*;
    use crate::services::index::addr_of;

    #[test]
    fn only_nodes_on_a_link_of_ours_are_asked_and_from_our_address_there() {
        let mut view = View::default();
        for (name, address, dead) in [
            ("near", [192, 0, 2, 2], true),
            ("far", [198, 51, 100, 2], false),
        ] {
            let node = proto::NodeRoute {
                addresses: vec![address.to_vec().into()],
                dead,
                ..proto::NodeRoute::default()
            };
            Arc::make_mut(&mut view.nodes).insert(name.into(), Arc::new(node));
        }
        let asked = Asked {
            ifindex: 2,
            mac: [2, 0, 0, 0, 0, 1],
            from: [192, 0, 2, 1].into(),
        };
        let here = [Place {
            asked,
            network: "192.0.2.1/24".parse().unwrap(),
        }];
        let claim = addr_of([192, 0, 2, 200].into());
        let watch: Watch = ["near", "far", "unknown"]
            .map(|name| (name.into(), Some(claim)))
            .into();
        let watched = Watched {
            address: [192, 0, 2, 2].into(),
            claim: Some([192, 0, 2, 200].into()),
            is_dead: true,
        };
        assert_eq!(
            find(&watch, &view, &here),
            [("near".to_owned(), (watched, asked))].into()
        );
    }
}
