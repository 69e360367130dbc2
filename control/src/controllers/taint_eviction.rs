//! Pods leave nodes with a NoExecute taint that they do not tolerate, or tolerate for a while only.
//!
//! ```text
//!  taint on the node, pod on the node ─► no toleration ──────────► deleted at once
//!                                     ─► tolerationSeconds: 300 ─► deleted after 300 s of this taint
//!                                     ─► toleration without end ─► stays
//! ```
//! The time is this process's own, counted per pod and taint while it looks; time in which it stood still
//! is not counted, and one that (re)started begins anew. The object of a pod on a silent node stays until
//! that node has ended the pod and said so, or the node is deleted: its UID runs nowhere else meanwhile,
//! and the pod that takes its place has another one.
//!
//! Source: Kubernetes `pkg/controller/tainteviction`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Node, Pod, Taint, Toleration};
use gantry_api::status::Status;
use gantry_api::validation::MIRROR_ANNOTATION;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::informer::ObjectKey;
use super::{Context, EventType, pods};
use crate::server::registry::{DeleteOptions, Disruption};

/// How often pods are looked at.
const PERIOD: Duration = Duration::from_secs(1);
/// Most time that one look adds.
const ELAPSED_PER_LOOK_MAX: Duration = Duration::from_secs(3);

/// How long a pod has been on a node with a taint: by its UID and the taint's key and value.
type Clocks = HashMap<(String, String), Duration>;

/// Whether a toleration is meant for a taint.
pub(crate) fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let (effect, key) = (text(&toleration.effect), text(&toleration.key));
    if (!effect.is_empty() && effect != taint.effect) || (!key.is_empty() && key != taint.key) {
        return false;
    }
    match toleration.operator.as_deref() {
        Some("Exists") => true,
        None | Some("" | "Equal") => text(&toleration.value) == text(&taint.value),
        Some(_) => false,
    }
}

/// How long a pod puts up with a taint; `None`: for ever.
fn patience(tolerations: &[Toleration], taint: &Taint) -> Option<Duration> {
    match tolerations.iter().find(|one| tolerates(one, taint)) {
        None => Some(Duration::ZERO),
        Some(one) => {
            let seconds = one.toleration_seconds?;
            // Kubernetes: negative is at once.
            Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
        }
    }
}

fn no_execute(node: &Node) -> impl Iterator<Item = &Taint> {
    let spec = node.spec.as_ref();
    let taints = spec
        .and_then(|spec| spec.taints.as_deref())
        .unwrap_or_default();
    taints.iter().filter(|taint| taint.effect == "NoExecute")
}

/// Whether the pod is one that taints can move.
fn is_movable(pod: &Pod) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    // A static pod: its node has it from a file.
    let is_mirror = annotations.is_some_and(|all| all.contains_key(MIRROR_ANNOTATION));
    pods::is_active(pod) && !is_mirror
}

/// One look at a pod on a node with taints: adds to its clocks; whether it has to go, and why.
fn look(
    old: &Clocks,
    new: &mut Clocks,
    pod: &Pod,
    node: &Node,
    elapsed: Duration,
) -> Option<String> {
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    let spec = pod.spec.as_ref();
    let tolerations = spec
        .and_then(|spec| spec.tolerations.as_deref())
        .unwrap_or_default();
    let mut reason = None;
    for taint in no_execute(node) {
        let value = taint.value.as_deref().unwrap_or_default();
        let name = format!("{}={value}", taint.key);
        let key = (uid.clone(), name);
        // The first look begins at zero.
        let passed = old
            .get(&key)
            .map_or(Duration::ZERO, |passed| *passed + elapsed);
        if patience(tolerations, taint).is_some_and(|patience| passed >= patience) {
            reason = Some(taint.key.clone());
        }
        new.insert(key, passed);
    }
    reason
}

struct Eviction {
    context: Arc<Context>,
    clocks: Clocks,
}

impl Eviction {
    async fn look(&mut self, elapsed: Duration) {
        let elapsed = elapsed.min(ELAPSED_PER_LOOK_MAX);
        let mut clocks = Clocks::new();
        for node in self.context.caches.nodes.all() {
            if no_execute(&node).next().is_none() {
                continue;
            }
            let name = node.metadata.name.as_deref().unwrap_or_default();
            for pod in self.context.caches.pods.on_node(name) {
                if !is_movable(&pod) {
                    continue;
                }
                let Some(taint) = look(&self.clocks, &mut clocks, &pod, &node, elapsed) else {
                    continue;
                };
                // The next look tries again.
                if let Err(status) = self.evict(&pod, &taint).await {
                    let key = ObjectKey::of(&pod.metadata);
                    tracing::warn!(pod = %key, node = name, %status, "a pod was not evicted");
                }
            }
        }
        self.clocks = clocks;
    }

    async fn evict(&self, pod: &Pod, taint: &str) -> Result<(), Status> {
        let key = ObjectKey::of(&pod.metadata);
        tracing::info!(pod = %key, node = pods::node(pod), taint, "evicting a pod: its node has a taint");
        let registry = &self.context.registry;
        let message = format!("Marking for deletion Pod {key}");
        let (component, reason) = ("taint-eviction-controller", "TaintManagerEviction");
        let event = super::event_about(pod, component, EventType::Normal, reason, message);
        registry.event(event).await;
        let options = DeleteOptions {
            uid: pod.metadata.uid.clone(),
            disruption: Some(Disruption {
                reason: "DeletionByTaintManager",
                message: format!("Taint manager: deleting due to NoExecute taint {taint}"),
            }),
            ..DeleteOptions::default()
        };
        let deleted = registry
            .delete::<Pod>(&key.namespace, &key.name, &options)
            .await;
        super::ignore_not_found(deleted)
    }
}

/// Starts the looking task.
pub(super) fn start(context: &Arc<Context>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let context = Arc::clone(context);
    let shutdown = shutdown.clone();
    tasks.spawn(async move {
        let mut eviction = Eviction {
            context,
            clocks: Clocks::new(),
        };
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last = Instant::now();
        loop {
            tokio::select! {
                // Both arms are cancel safe: a tick that is not taken comes again.
                _ = ticks.tick() => {}
                () = shutdown.cancelled() => return,
            }
            if eviction.context.settings.hold.is_on() {
                continue;
            }
            // What was deleted by the last look is seen as deleted by this one.
            let written = eviction.context.registry.store().revision();
            eviction.context.informer.caught_up(written).await;
            let elapsed = last.elapsed();
            last = Instant::now();
            eviction.look(elapsed).await;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const UNREACHABLE: &str = "node.kubernetes.io/unreachable";

    fn node(taints: Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": {"taints": taints}}))
            .unwrap()
    }

    fn pod(tolerations: Value) -> Pod {
        let pod = json!({"metadata": {"name": "p", "uid": "u"},
            "spec": {"containers": [], "tolerations": tolerations}});
        serde_json::from_value(pod).unwrap()
    }

    /// The look, counted in seconds, at which the pod has to go.
    fn goes_after(pod: &Pod, node: &Node, looks: u64) -> Option<u64> {
        let mut clocks = Clocks::new();
        (0..looks).find(|_| {
            let mut new = Clocks::new();
            let goes = look(&clocks, &mut new, pod, node, Duration::from_secs(1)).is_some();
            clocks = new;
            goes
        })
    }

    #[test]
    fn a_pod_goes_when_its_patience_is_over() {
        let silent = node(json!([
            {"key": UNREACHABLE, "effect": "NoSchedule"},
            {"key": UNREACHABLE, "effect": "NoExecute"}]));
        let of = |seconds: Value| {
            json!([{"key": UNREACHABLE, "operator": "Exists", "effect": "NoExecute",
                "tolerationSeconds": seconds}])
        };
        assert_eq!(goes_after(&pod(json!([])), &silent, 10), Some(0));
        assert_eq!(goes_after(&pod(of(json!(5))), &silent, 10), Some(5));
        assert_eq!(goes_after(&pod(of(json!(-1))), &silent, 10), Some(0));
        assert_eq!(goes_after(&pod(of(Value::Null)), &silent, 10), None);
        assert_eq!(
            goes_after(&pod(json!([{"operator": "Exists"}])), &silent, 10),
            None
        );
        let other = json!([{"key": "x", "operator": "Exists", "effect": "NoExecute"}]);
        assert_eq!(goes_after(&pod(other), &silent, 10), Some(0));
        let schedule_only = node(json!([{"key": "x", "effect": "NoSchedule"}]));
        assert_eq!(goes_after(&pod(json!([])), &schedule_only, 10), None);
    }

    #[test]
    fn the_clock_of_a_taint_begins_anew_when_it_comes_back() {
        let tainted = node(json!([{"key": "k", "value": "v", "effect": "NoExecute"}]));
        let pod = pod(json!([{"key": "k", "value": "v", "effect": "NoExecute",
            "tolerationSeconds": 2}]));
        let second = Duration::from_secs(1);
        let mut clocks = Clocks::new();
        for (node, goes) in [
            (&tainted, false),
            (&tainted, false),
            (&node(json!([])), false),
            (&tainted, false),
            (&tainted, false),
            (&tainted, true),
        ] {
            let mut new = Clocks::new();
            assert_eq!(look(&clocks, &mut new, &pod, node, second).is_some(), goes);
            clocks = new;
        }
    }

    #[test]
    fn a_static_pod_and_one_that_goes_already_are_left_alone() {
        let mut mirror = pod(json!([]));
        assert!(is_movable(&mirror));
        let annotations = [(MIRROR_ANNOTATION.to_owned(), "m".to_owned())];
        mirror.metadata.annotations = Some(annotations.into_iter().collect());
        assert!(!is_movable(&mirror));
    }

    proptest! {
        /// However time passes between looks, nobody goes before, and everybody by the first look after.
        #[test]
        fn nobody_goes_early(seconds in 0_i64..60, steps in prop::collection::vec(1_u64..3_000, 1..200)) {
            let silent = node(json!([{"key": UNREACHABLE, "effect": "NoExecute"}]));
            let pod = pod(json!([{"key": UNREACHABLE, "operator": "Exists", "effect": "NoExecute",
                "tolerationSeconds": seconds}]));
            let (mut clocks, mut passed) = (Clocks::new(), 0);
            for (number, step) in steps.into_iter().enumerate() {
                passed += if number == 0 { 0 } else { step };
                let mut new = Clocks::new();
                let goes = look(&clocks, &mut new, &pod, &silent, Duration::from_millis(step)).is_some();
                prop_assert_eq!(goes, passed >= seconds.unsigned_abs() * 1000);
                clocks = new;
            }
        }
    }
}
