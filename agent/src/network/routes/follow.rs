//! Keeps the kernel's routes, and the tunnel, what the plan says.
//!
//! ```text
//!  the view has other nodes ─┐
//!  the kernel tells a change ├─► look: facts ─► plan ─► gantry_cni::routes::ensure ─► what is shown
//!  now and then              ┘
//! ```
//! Nothing is remembered between two looks but what was said, so whoever removes a route finds it again:
//! at once where the kernel tells (routes, addresses, links), by the next look else (the tunnel's entries).
//! Before the node holds any state of the cluster nothing is touched: what is there is from before a
//! restart, and works.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use gantry_cni::CniError;
use gantry_cni::netlink::{Netlink, POD_ROUTE_PROTOCOL};
use gantry_cni::routes::{self, Changes};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Facts, Routes, Routing, RoutingConfig, RoutingPlan, plan};
use crate::dataplane::Dataplane;
use crate::network::{chain, forwarding};
use crate::view::View;

/// A look without a change told.
const LOOK_INTERVAL: Duration = Duration::from_secs(15);
/// What is configured has several changes at once, and so has what we write ourselves.
const SETTLE: Duration = Duration::from_millis(200);
/// Between attempts after a failure.
const RETRY: Duration = Duration::from_secs(2);

/// Runs until shutdown. The routes stay: pods need no agent.
///
/// * `run` – `/run/gantry`, where the settings are kept that were there before.
/// * `shown` – gets what has become of it.
pub async fn follow_routes(
    config: RoutingConfig,
    run: PathBuf,
    mut view: watch::Receiver<Arc<View>>,
    shown: watch::Sender<Routes>,
    shutdown: CancellationToken,
) {
    let mut changes = Changes::open().ok();
    let mut told = BTreeSet::new();
    let mut done: Option<Arc<View>> = None;
    let mut is_due = true;
    let mut wait = LOOK_INTERVAL;
    loop {
        let newest = view.borrow_and_update().clone();
        if newest.rev > 0 && (is_due || done.as_ref().is_none_or(|done| differs(done, &newest))) {
            let (routes, is_done) = match look(&config, &run, &newest).await {
                Ok(done) => done,
                Err(reason) => {
                    let problems = vec![reason];
                    let before = shown.borrow().clone();
                    (Routes { problems, ..before }, false)
                }
            };
            // What only is in the way goes with a change that the kernel or the view tells.
            wait = if is_done { LOOK_INTERVAL } else { RETRY };
            say(&routes, &mut told);
            shown.send_if_modified(|old| {
                let is_new = *old != routes;
                *old = routes;
                is_new
            });
            done = Some(newest);
        }
        let changed = async {
            match &mut changes {
                Some(changes) => changes.next().await,
                None => std::future::pending().await,
            }
        };
        is_due = tokio::select! {
            // Cancel-safe: all only wait.
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(wait) => true,
            changed = view.changed() => {
                if changed.is_err() {
                    return;
                }
                false
            }
            change = changed => {
                if change.is_none() {
                    changes = Changes::open().ok();
                }
                tokio::time::sleep(SETTLE).await;
                // One look for all that has come meanwhile.
                while changes.as_mut().and_then(|c| c.next().now_or_never().flatten()).is_some() {}
                true
            }
        };
    }
}

/// Tells the data plane which nodes are sent the pods' own addresses. Runs until shutdown.
pub async fn follow_near(
    dataplane: Arc<dyn Dataplane>,
    mut routes: watch::Receiver<Routes>,
    shutdown: CancellationToken,
) {
    let mut done: Option<Option<BTreeSet<IpAddr>>> = None;
    loop {
        let newest = tokio::select! {
            // Cancel-safe: both only wait. The first value is from before the first look.
            () = shutdown.cancelled() => return,
            changed = routes.changed() => match changed {
                Ok(()) => routes.borrow_and_update().near.clone(),
                Err(_) => return,
            },
        };
        if done.as_ref() == Some(&newest) {
            continue;
        }
        match dataplane.set_near(newest.as_ref()).await {
            Ok(()) => done = Some(newest),
            Err(error) => {
                tracing::warn!(%error, "pods may not reach the addresses of other nodes");
                routes.mark_changed();
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Whether the plan may be another one.
fn differs(before: &View, now: &View) -> bool {
    !Arc::ptr_eq(&before.nodes, &now.nodes) || before.settings != now.settings
}

/// Each problem once, until it is gone.
fn say(routes: &Routes, told: &mut BTreeSet<String>) {
    let problems: BTreeSet<String> = routes.problems.iter().cloned().collect();
    for problem in problems.difference(told) {
        tracing::warn!("route to another node's pods: {problem}");
    }
    if !told.is_empty() && problems.is_empty() {
        tracing::info!(
            routes = routes.summary(),
            "every node's pods have a route again"
        );
    }
    *told = problems;
}

/// What is shown, and whether the kernel took all of it.
async fn look(config: &RoutingConfig, run: &Path, view: &View) -> Result<(Routes, bool), String> {
    let words = |error: CniError| error.to_string();
    let host = Netlink::open().map_err(words)?;
    let plan = match has_third_party(config) {
        true => RoutingPlan::default(),
        false => plan(config, view, &facts(&host).await.map_err(words)?),
    };
    let families = plan.wanted.routes.iter();
    let families = families.map(|route| route.pod_cidr.addr().is_ipv4());
    // A node without a pod may still send on what comes for a Service.
    let forwarded = forwarding::ensure_families(run, &families.collect());
    let ensured = routes::ensure(&host, &plan.wanted).await;
    let refused = ensured.err().map(|error| error.to_string());
    let refused = refused.or(forwarded.err().map(|error| error.to_string()));
    let is_done = refused.is_none();
    Ok((Routes::new(&plan, refused), is_done))
}

/// Whether other plugins wire pods: then they know the ways between nodes, unless one of ours is wanted.
fn has_third_party(config: &RoutingConfig) -> bool {
    let list = chain::load(&config.conf_dir).ok().flatten();
    config.routing == Routing::Auto && list.is_some_and(|list| !list.is_ours())
}

/// The links are those that carry an address: each pod of the node has a link too.
async fn facts(host: &Netlink) -> Result<Facts, CniError> {
    let networks = host.all_networks().await?;
    let indexes: BTreeSet<u32> = networks.iter().map(|(index, _)| *index).collect();
    let mut links = Vec::new();
    for index in indexes {
        links.extend(host.link_by_index(index).await?);
    }
    let mut table = host.routes().await?;
    // Those to its own pods come and go with every pod.
    table.retain(|route| route.protocol != POD_ROUTE_PROTOCOL);
    Ok(Facts {
        links,
        networks,
        table,
    })
}
