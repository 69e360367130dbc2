//! After a restore: nobody is placed and nobody is ended before it is known what runs.
//!
//! ```text
//!  restored ─► Holding: every node has renewed its lease in this lineage, or has been silent for the
//!              grace period, by our clock ─► entry removed (durable) ─► Over
//! ```
//! The store of a backup does not know what was bound after it was taken. A scheduler that bound such a pod
//! again would have one UID run on two nodes. So scheduler, taint eviction and the removal of pods without
//! a node wait; meanwhile each agent says in its Hello which pods it has, and those that the store shows as
//! unbound are bound to it (`feed/adopt.rs`). A node that was marked as lost before the backup is as good as
//! any other: only silence in this lineage counts.
//!
//! Invariants: a lease renewed in this lineage has a `mod_revision` above that of
//! [`RESTORED_KEY`], and is written after the adoptions of its node; a control plane that is restarted
//! meanwhile holds again; time in which this process stood still is not silence.

use std::collections::BTreeMap;
use std::time::Duration;

use gantry_api::rules::{self, Rule};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::store::{RESTORED_KEY, Revision, Store, StoreError, Txn};

const NODES: &str = "/registry/nodes/";
const LEASES: &str = "/registry/leases/kube-node-lease/";
/// Between two looks.
const PERIOD: Duration = Duration::from_millis(250);
/// Most silence that one look adds.
const SILENCE_PER_LOOK_MAX: Duration = Duration::from_secs(1);
/// How often the log says who is waited for.
const TOLD_EVERY: Duration = Duration::from_secs(10);

/// Whether the hold is on; clones share it.
#[derive(Clone, Debug)]
pub struct Hold(watch::Receiver<bool>);

impl Default for Hold {
    /// None: of a store that was never restored.
    fn default() -> Hold {
        Hold(watch::channel(false).1)
    }
}

impl Hold {
    /// The hold of this store, and the sender that [`run`] ends it with.
    pub fn of(store: &Store) -> (Hold, watch::Sender<bool>) {
        let is_on = store.get(RESTORED_KEY).is_some() && !rules::is_off(Rule::Hold);
        let (sender, receiver) = watch::channel(is_on);
        (Hold(receiver), sender)
    }

    /// Whether nobody may be placed or ended yet.
    pub fn is_on(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns when the hold is over. Cancel safe.
    pub async fn over(&self) {
        let mut receiver = self.0.clone();
        if receiver.wait_for(|is_on| !is_on).await.is_err() {
            // Its task ended before the hold did: the process is about to end.
            std::future::pending::<()>().await;
        }
    }
}

/// The nodes that have not spoken since the restore.
fn silent<'a>(
    restored: Revision,
    nodes: impl Iterator<Item = &'a str>,
    leases: &BTreeMap<&str, Revision>,
) -> Vec<String> {
    let has_spoken = |node: &&str| leases.get(node).is_some_and(|at| *at > restored);
    nodes
        .filter(|node| !has_spoken(node))
        .map(str::to_owned)
        .collect()
}

/// Of this moment: who has not spoken. `None`: there is no hold.
fn look(store: &Store) -> Option<Vec<String>> {
    let restored = store.get(RESTORED_KEY)?.mod_revision;
    // Leases first: a node seen with an older lease is looked at again.
    let (_, leases) = store.list(LEASES);
    let leases = leases
        .iter()
        .filter_map(|lease| Some((lease.key.strip_prefix(LEASES)?, lease.mod_revision)))
        .collect();
    let (_, nodes) = store.list(NODES);
    let nodes = nodes.iter().filter_map(|node| node.key.strip_prefix(NODES));
    Some(silent(restored, nodes, &leases))
}

/// Ends the hold when it may end, and removes the entry that stands for it.
pub async fn run(
    store: Store,
    grace: Duration,
    sender: watch::Sender<bool>,
    stop: CancellationToken,
) {
    let (mut silence, mut last, mut told) = (Duration::ZERO, Instant::now(), None::<Instant>);
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // Both arms are cancel safe: a tick that is not taken comes again.
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        let Some(silent) = look(&store) else {
            break;
        };
        silence += last.elapsed().min(SILENCE_PER_LOOK_MAX);
        last = Instant::now();
        if !silent.is_empty() && silence <= grace {
            if told.is_none_or(|at| at.elapsed() >= TOLD_EVERY) {
                told = Some(Instant::now());
                let nodes = silent.join(", ");
                tracing::info!(
                    nodes,
                    "restored from a backup: nobody is placed or evicted before these nodes have spoken"
                );
            }
            continue;
        }
        match store.commit(Txn::new().delete(RESTORED_KEY)).await {
            Ok(_) => {
                let silent = silent.join(", ");
                tracing::info!(silent, "the hold after the restore is over");
                break;
            }
            Err(StoreError::Closed) => return,
            // Tried again at the next look.
            Err(error) => tracing::warn!(%error, "the hold after the restore cannot be ended"),
        }
    }
    sender.send_replace(false);
    // Kept until the end, so that nobody takes a dropped sender for an unfinished hold.
    stop.cancelled().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_renewed_its_lease_since_has_spoken() {
        let leases = [("a", 101), ("b", 100), ("c", 7)].into_iter().collect();
        let nodes = ["a", "b", "c", "d"].into_iter();
        assert_eq!(silent(100, nodes, &leases), ["b", "c", "d"]);
        assert!(silent(100, ["a"].into_iter(), &leases).is_empty());
    }

    #[test]
    fn without_nodes_nobody_is_waited_for() {
        assert!(silent(100, std::iter::empty(), &BTreeMap::new()).is_empty());
    }

    #[tokio::test]
    async fn a_silent_node_is_waited_for_no_longer_than_the_grace() {
        let dir = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
        let path = dir.path().join("store.redb");
        let store = Store::open(&path).unwrap_or_else(|error| panic!("{error}"));
        let put = |key: &str| Txn::new().put(key, "{}");
        for txn in [put(RESTORED_KEY), put("/registry/nodes/a")] {
            store
                .commit(txn)
                .await
                .unwrap_or_else(|error| panic!("{error}"));
        }
        let (hold, sender) = Hold::of(&store);
        assert!(hold.is_on());
        let stop = CancellationToken::new();
        let grace = Duration::from_millis(1_500);
        let began = Instant::now();
        tokio::spawn(run(store.clone(), grace, sender, stop.clone()));
        hold.over().await;
        let held = began.elapsed();
        assert!(
            held >= grace && held < grace + Duration::from_secs(10),
            "{held:?}"
        );
        assert!(
            store.get(RESTORED_KEY).is_none(),
            "the next start does not hold"
        );
        assert!(!Hold::of(&store).0.is_on());
        stop.cancel();
    }

    #[tokio::test]
    async fn the_last_word_ends_the_hold() {
        let dir = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
        let path = dir.path().join("store.redb");
        let store = Store::open(&path).unwrap_or_else(|error| panic!("{error}"));
        let put = |key: &str| Txn::new().put(key, "{}");
        let lease = |node: &str| put(&format!("{LEASES}{node}"));
        for txn in [
            put("/registry/nodes/a"),
            put("/registry/nodes/b"),
            lease("a"),
            put(RESTORED_KEY),
        ] {
            store
                .commit(txn)
                .await
                .unwrap_or_else(|error| panic!("{error}"));
        }
        let (hold, sender) = Hold::of(&store);
        let stop = CancellationToken::new();
        tokio::spawn(run(
            store.clone(),
            Duration::from_secs(40),
            sender,
            stop.clone(),
        ));
        for node in ["a", "b"] {
            tokio::time::sleep(Duration::from_millis(600)).await;
            assert!(hold.is_on(), "{node} has not spoken");
            store
                .commit(lease(node))
                .await
                .unwrap_or_else(|error| panic!("{error}"));
        }
        let over = tokio::time::timeout(Duration::from_secs(20), hold.over());
        assert!(over.await.is_ok(), "long before the grace is over");
        stop.cancel();
    }
}
