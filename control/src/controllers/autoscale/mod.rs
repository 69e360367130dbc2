//! HorizontalPodAutoscalers: as many replicas as the use of CPU and memory asks for.
//!
//! ```text
//!  every 15 s: scalers ─► their targets' pods ─► nodes ─► agents: what each pod uses   (UsageSource)
//!                                                            │
//!     each metric ─► wish (replicas.rs) ─► the highest ─► window, rate, range (behavior.rs)
//!                                                            └─► spec.replicas of the target, status, event
//! ```
//! The agents are asked only while there are scalers, and only those of nodes with pods of a target. A node
//! that does not answer leaves its pods without figures, which speaks against a change.
//!
//! Invariants: the number stays between `minReplicas` and `maxReplicas`; a target with no replicas is left
//! alone; nothing is taken away for a metric that cannot be had.
//!
//! Source: Kubernetes `pkg/controller/podautoscaler`; conditions, reasons and words are its.

mod behavior;
mod metrics;
mod replicas;
mod status;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use gantry_api::k8s_openapi::api::autoscaling::v2::{
    HorizontalPodAutoscaler, HorizontalPodAutoscalerSpec, HorizontalPodAutoscalerStatus,
};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, Time};
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::kinds::{self, Kind};
use gantry_api::proto::PodUsage;
use gantry_api::status::Status;
use serde_json::json;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::behavior::{Behavior, History, follow};
use self::metrics::Outcome;
use super::informer::{Delta, ObjectKey};
use super::{Caches, Context, EventType, event_about, pods, selects};
use crate::server::{Part, WriteOptions};

/// For logs and events.
const NAME: &str = "horizontal-pod-autoscaler";
/// Between looks that a changed scaler asks for.
const PAUSE_MIN: Duration = Duration::from_secs(1);

/// Who knows what pods use.
pub trait UsageSource: Send + Sync + 'static {
    /// What the pods of these nodes use now; nodes that do not answer are left out.
    fn usage<'a>(&'a self, nodes: &'a BTreeSet<String>) -> BoxFuture<'a, Vec<PodUsage>>;
}

/// What a scaler scales.
#[derive(Debug)]
struct Target {
    kind: &'static Kind,
    /// `spec.replicas`.
    wanted: i64,
    /// `status.replicas`.
    current: i64,
    pods: Vec<Arc<Pod>>,
}

struct Autoscalers {
    context: Arc<Context>,
    source: Arc<dyn UsageSource>,
    wake: Arc<Notify>,
}

impl Autoscalers {
    async fn run(&self) {
        let informer = &self.context.informer;
        informer.caught_up(0).await;
        let mut histories: HashMap<String, History> = HashMap::new();
        loop {
            let scalers = self.context.caches.scalers.all();
            let uid =
                |scaler: &HorizontalPodAutoscaler| scaler.metadata.uid.clone().unwrap_or_default();
            let known: BTreeSet<String> = scalers.iter().map(|scaler| uid(scaler)).collect();
            histories.retain(|uid, _| known.contains(uid));
            if !scalers.is_empty() {
                let usage = self.usage(&scalers).await;
                for scaler in &scalers {
                    let history = histories.entry(uid(scaler)).or_default();
                    if let Err(status) = self.scale(scaler, history, &usage).await {
                        let key = ObjectKey::of(&scaler.metadata);
                        tracing::warn!(controller = NAME, %key, %status, "failed, trying again");
                    }
                }
                // What was written is seen before anything is decided from it.
                informer
                    .caught_up(self.context.registry.store().revision())
                    .await;
            }
            tokio::time::sleep(PAUSE_MIN).await;
            let rest = self.context.settings.autoscale_interval;
            tokio::select! {
                // Both arms are cancel safe: a wake that comes meanwhile is kept.
                () = tokio::time::sleep(rest.saturating_sub(PAUSE_MIN)) => {}
                () = self.wake.notified() => {}
            }
        }
    }

    /// What the pods of all targets use.
    async fn usage(&self, scalers: &[Arc<HorizontalPodAutoscaler>]) -> Vec<PodUsage> {
        let mut nodes = BTreeSet::new();
        for scaler in scalers {
            if let Ok(target) = target(&self.context.caches, scaler) {
                let of_pods = target.pods.iter().filter_map(|pod| pods::node(pod));
                nodes.extend(of_pods.map(str::to_owned));
            }
        }
        match nodes.is_empty() {
            true => Vec::new(),
            false => self.source.usage(&nodes).await,
        }
    }

    async fn scale(
        &self,
        scaler: &HorizontalPodAutoscaler,
        history: &mut History,
        usage: &[PodUsage],
    ) -> Result<(), Status> {
        let now = Timestamp::now();
        let mut new = scaler.status.clone().unwrap_or_default();
        let target = match target(&self.context.caches, scaler) {
            Ok(target) => target,
            Err(why) => {
                let text = format!(
                    "the HPA controller was unable to get the target's current scale: {why}"
                );
                status::set(&mut new, "AbleToScale", false, "FailedGetScale", &text, now);
                self.tell(scaler, EventType::Warning, "FailedGetScale", why)
                    .await;
                return self.report(scaler, new).await;
            }
        };
        new.current_replicas = Some(narrow(target.current));
        let spec = scaler.spec.clone();
        let decided = self
            .decide(scaler, &spec, &target, history, usage, &mut new)
            .await;
        let Some((replicas, why)) = decided else {
            return self.report(scaler, new).await;
        };
        new.desired_replicas = narrow(replicas);
        if replicas != target.wanted {
            let written = self.write(scaler, &target, replicas).await;
            match written {
                Ok(()) => {
                    history.changed(target.wanted, replicas, Instant::now());
                    new.last_scale_time = Some(Time(now));
                    let text = format!(
                        "the HPA controller was able to update the target scale to {replicas}"
                    );
                    status::set(
                        &mut new,
                        "AbleToScale",
                        true,
                        "SucceededRescale",
                        &text,
                        now,
                    );
                    let message = format!("New size: {replicas}; reason: {why}");
                    self.tell(scaler, EventType::Normal, "SuccessfulRescale", message)
                        .await;
                }
                Err(error) => {
                    let text = format!(
                        "the HPA controller was unable to update the target scale: {error}"
                    );
                    status::set(
                        &mut new,
                        "AbleToScale",
                        false,
                        "FailedUpdateScale",
                        &text,
                        now,
                    );
                    new.desired_replicas = narrow(target.wanted);
                    let message = format!("New size: {replicas}; reason: {why}; error: {error}");
                    self.tell(scaler, EventType::Warning, "FailedRescale", message)
                        .await;
                }
            }
        }
        self.report(scaler, new).await
    }

    /// How many replicas there are to be, and why; `None` when that cannot be said.
    async fn decide(
        &self,
        scaler: &HorizontalPodAutoscaler,
        spec: &HorizontalPodAutoscalerSpec,
        target: &Target,
        history: &mut History,
        usage: &[PodUsage],
        new: &mut HorizontalPodAutoscalerStatus,
    ) -> Option<(i64, String)> {
        let now = Timestamp::now();
        let (least, most) = (
            i64::from(spec.min_replicas.unwrap_or(1)),
            i64::from(spec.max_replicas),
        );
        let text = "the HPA controller was able to get the target's current scale";
        status::set(new, "AbleToScale", true, "SucceededGetScale", text, now);
        if target.wanted == 0 {
            let text = "scaling is disabled since the replica count of the target is zero";
            status::set(new, "ScalingActive", false, "ScalingDisabled", text, now);
            return Some((0, String::new()));
        }
        if target.wanted > most {
            return Some((
                most,
                "Current number of replicas above Spec.MaxReplicas".to_owned(),
            ));
        }
        if target.wanted < least {
            return Some((
                least,
                "Current number of replicas below Spec.MinReplicas".to_owned(),
            ));
        }
        let behavior = Behavior::of(spec.behavior.as_ref());
        let outcome = metrics::evaluate(
            spec.metrics.as_deref().unwrap_or_default(),
            target.wanted,
            &target.pods,
            usage,
            behavior.tolerances(),
            now,
        );
        let Outcome {
            wish,
            statuses,
            failures,
        } = outcome;
        new.current_metrics = Some(statuses).filter(|all| !all.is_empty());
        for (reason, why) in &failures {
            let message = why.clone();
            self.tell(scaler, EventType::Warning, reason, message).await;
        }
        let Some((wish, metric)) = wish else {
            let (reason, why) = failures.into_iter().next().unwrap_or_else(|| {
                let why = "the scaler has no metric".to_owned();
                ("InvalidMetricSourceType", why)
            });
            let text = format!("the HPA was unable to compute the replica count: {why}");
            status::set(new, "ScalingActive", false, reason, &text, now);
            return None;
        };
        let text =
            format!("the HPA was able to successfully calculate a replica count from {metric}");
        status::set(new, "ScalingActive", true, "ValidMetricFound", &text, now);
        let limited = follow(
            &behavior,
            history,
            target.wanted,
            wish,
            (least, most),
            Instant::now(),
        );
        let (reason, text) = limited.able;
        status::set(new, "AbleToScale", true, reason, text, now);
        let (is_limited, reason, text) = limited.limited;
        status::set(new, "ScalingLimited", is_limited, reason, text, now);
        let why = if limited.replicas > target.wanted {
            format!("{metric} above target")
        } else {
            "All metrics below target".to_owned()
        };
        Some((limited.replicas, why))
    }

    /// Writes the number, if it is still the one that was decided from.
    async fn write(
        &self,
        scaler: &HorizontalPodAutoscaler,
        target: &Target,
        replicas: i64,
    ) -> Result<(), Status> {
        let namespace = scaler.metadata.namespace.as_deref().unwrap_or_default();
        let spec = scaler.spec.clone();
        let name = spec.scale_target_ref.name.as_str();
        let change = |old: &serde_json::Value| {
            if old["spec"]["replicas"].as_i64().unwrap_or(1) != target.wanted {
                return Err(Status::modified(target.kind, name));
            }
            let mut new = old.clone();
            new["spec"]["replicas"] = json!(replicas);
            Ok(new)
        };
        let options = WriteOptions::default();
        let registry = &self.context.registry;
        registry
            .change_value(target.kind, namespace, name, Part::Object, &options, change)
            .await?;
        Ok(())
    }

    async fn tell(
        &self,
        scaler: &HorizontalPodAutoscaler,
        type_: EventType,
        reason: &str,
        message: String,
    ) {
        let event = event_about(scaler, NAME, type_, reason, message);
        self.context.registry.event(event).await;
    }

    async fn report(
        &self,
        scaler: &HorizontalPodAutoscaler,
        status: HorizontalPodAutoscalerStatus,
    ) -> Result<(), Status> {
        if scaler.status.as_ref() == Some(&status) {
            return Ok(());
        }
        let mut new = scaler.clone();
        new.status = Some(status);
        // The user may have changed it meanwhile: the status is of this moment anyway.
        new.metadata.resource_version = None;
        super::ignore_not_found(self.context.registry.update_status(&new).await)
    }
}

fn narrow(n: i64) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

/// What a scaler names, with its pods; else why there is none.
fn target(caches: &Caches, scaler: &HorizontalPodAutoscaler) -> Result<Target, String> {
    let namespace = scaler.metadata.namespace.as_deref().unwrap_or_default();
    let spec = scaler.spec.clone();
    let named = &spec.scale_target_ref;
    let kind = match named.api_version.as_deref() {
        Some(version) if !version.is_empty() => kinds::by_api_version(version, &named.kind),
        _ => kinds::resolve(&named.kind),
    };
    let unknown = || format!("no matches for kind {:?}", named.kind);
    let kind = kind.ok_or_else(unknown)?;
    let key = ObjectKey::new(namespace, &named.name);
    let lost = || Status::not_found(kind, &named.name).message;
    let (wanted, current, selector) = match kind.kind {
        "Deployment" => {
            let it = caches.deployments.get(&key).ok_or_else(lost)?;
            let spec = it.spec.clone().unwrap_or_default();
            let current = it.status.as_ref().and_then(|s| s.replicas);
            (spec.replicas, current, spec.selector)
        }
        "ReplicaSet" => {
            let it = caches.replica_sets.get(&key).ok_or_else(lost)?;
            let spec = it.spec.clone().unwrap_or_default();
            let current = it.status.as_ref().map(|s| s.replicas);
            (spec.replicas, current, spec.selector)
        }
        "StatefulSet" => {
            let it = caches.stateful_sets.get(&key).ok_or_else(lost)?;
            let spec = it.spec.clone().unwrap_or_default();
            let current = it.status.as_ref().map(|s| s.replicas);
            (spec.replicas, current, spec.selector)
        }
        "ReplicationController" => {
            let it = caches.replication_controllers.get(&key).ok_or_else(lost)?;
            let spec = it.spec.clone().unwrap_or_default();
            let current = it.status.as_ref().map(|s| s.replicas);
            let selector = LabelSelector {
                match_labels: spec.selector,
                match_expressions: None,
            };
            (spec.replicas, current, selector)
        }
        _ => {
            let resource = kind.qualified_resource();
            return Err(format!("{resource} have no scale subresource"));
        }
    };
    let of_target = |pod: &Arc<Pod>| selects(&selector, pod.metadata.labels.as_ref());
    let pods = caches.pods.in_namespace(namespace).into_iter();
    Ok(Target {
        kind,
        wanted: i64::from(wanted.unwrap_or(1)),
        current: i64::from(current.unwrap_or(0)),
        pods: pods.filter(of_target).collect(),
    })
}

/// Starts the one loop.
pub(super) fn start(
    context: &Arc<Context>,
    source: Arc<dyn UsageSource>,
    tasks: &mut JoinSet<()>,
    shutdown: &CancellationToken,
) {
    let wake = Arc::new(Notify::new());
    let own = Arc::clone(&wake);
    context
        .caches
        .scalers
        .on_change(move |delta: &Delta<HorizontalPodAutoscaler>| {
            if let Delta::Applied { new, old } = delta
                && old.as_ref().is_none_or(|old| old.spec != new.spec)
            {
                own.notify_one();
            }
        });
    let scalers = Autoscalers {
        context: Arc::clone(context),
        source,
        wake,
    };
    let stop = shutdown.clone();
    tasks.spawn(async move {
        tokio::select! {
            // Cancelled anywhere: every action is a transaction of its own.
            () = scalers.run() => {}
            () = stop.cancelled() => {}
        }
    });
}

/// Figures by name of the pod, of pods that are still the measured ones.
type Figures = BTreeMap<String, replicas::Figure>;
