//! What a scaler's metrics ask for together. Pure.

use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::autoscaling::v2::{
    ContainerResourceMetricStatus, MetricSpec, MetricStatus, MetricTarget, MetricValueStatus,
    ResourceMetricStatus,
};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::proto::{PodUsage, Usage};
use gantry_api::quantity::Quantity;

use super::Figures;
use super::replicas::{Figure, Observed, Source, Target, Tolerances, Wish, wish};

/// What all metrics of a scaler come to.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// The highest wish and the metric behind it; `None` when it cannot be said.
    pub(super) wish: Option<(i64, String)>,
    pub(super) statuses: Vec<MetricStatus>,
    /// Reason and message of each metric without a figure.
    pub(super) failures: Vec<(&'static str, String)>,
}

/// A metric, read.
struct Metric {
    source: Source,
    target: Target,
    failure: &'static str,
}

impl Metric {
    fn of(spec: &MetricSpec) -> Option<Metric> {
        if let Some(own) = &spec.resource {
            return Some(Metric {
                source: Source {
                    resource: own.name.clone(),
                    container: String::new(),
                },
                target: target(&own.target)?,
                failure: "FailedGetResourceMetric",
            });
        }
        let own = spec.container_resource.as_ref()?;
        Some(Metric {
            source: Source {
                resource: own.name.clone(),
                container: own.container.clone(),
            },
            target: target(&own.target)?,
            failure: "FailedGetContainerResourceMetric",
        })
    }

    /// As conditions and events name it.
    fn text(&self) -> String {
        let name = &self.source.resource;
        let of = match self.source.container.as_str() {
            "" => "resource",
            _ => "container resource",
        };
        match self.target {
            Target::Utilization(_) => format!("{name} {of} utilization (percentage of request)"),
            Target::AverageValue(_) => format!("{name} {of}"),
        }
    }

    fn status(&self, wish: &Wish) -> MetricStatus {
        let amount = match self.source.resource.as_str() {
            "memory" => Quantity::from_units(wish.average / 1000),
            _ => Quantity::from_milli(wish.average),
        };
        let percent = wish
            .utilization
            .map(|u| i32::try_from(u).unwrap_or(i32::MAX));
        let current = MetricValueStatus {
            average_utilization: percent,
            average_value: Some(ApiQuantity(amount.to_string())),
            value: None,
        };
        let name = self.source.resource.clone();
        match self.source.container.as_str() {
            "" => MetricStatus {
                type_: "Resource".to_owned(),
                resource: Some(ResourceMetricStatus { current, name }),
                ..MetricStatus::default()
            },
            container => MetricStatus {
                type_: "ContainerResource".to_owned(),
                container_resource: Some(ContainerResourceMetricStatus {
                    container: container.to_owned(),
                    current,
                    name,
                }),
                ..MetricStatus::default()
            },
        }
    }
}

fn target(target: &MetricTarget) -> Option<Target> {
    if let Some(percent) = target.average_utilization {
        return Some(Target::Utilization(i64::from(percent)));
    }
    let amount = Quantity::parse(&target.average_value.as_ref()?.0).ok()?;
    Some(Target::AverageValue(amount.milli()))
}

/// Thousandths of a core or of a byte.
fn value(usage: &Usage, resource: &str) -> i64 {
    let narrow = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    match resource {
        "memory" => narrow(usage.memory_working_set_bytes).saturating_mul(1000),
        _ => narrow(usage.cpu_nanocores / 1_000_000),
    }
}

/// The figures of these pods for one source. One pod with a container that was not measured has none.
fn figures(pods: &[Arc<Pod>], usage: &[PodUsage], source: &Source, now: Timestamp) -> Figures {
    let mut figures = Figures::new();
    for pod in pods {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let Some(measured) = usage.iter().find(|usage| usage.uid == uid) else {
            continue;
        };
        let wanted = |name: &str| source.container.is_empty() || source.container == name;
        let mut sum = 0_i64;
        let mut window_ms = None;
        let mut is_whole = true;
        for container in measured.containers.iter().filter(|c| wanted(&c.name)) {
            match &container.usage {
                Some(usage) => {
                    sum = sum.saturating_add(value(usage, &source.resource));
                    window_ms = Some(usage.window_ms);
                }
                None => is_whole = false,
            }
        }
        if let (Some(window_ms), true) = (window_ms, is_whole) {
            let name = pod.metadata.name.clone().unwrap_or_default();
            let window = Duration::from_millis(window_ms);
            figures.insert(
                name,
                Figure {
                    value: sum,
                    at: now,
                    window,
                },
            );
        }
    }
    figures
}

/// The highest wish counts; where a metric has no figure, only one for more.
pub(super) fn evaluate(
    specs: &[MetricSpec],
    current: i64,
    pods: &[Arc<Pod>],
    usage: &[PodUsage],
    tolerances: Tolerances,
    now: Timestamp,
) -> Outcome {
    let mut outcome = Outcome::default();
    for spec in specs {
        let Some(metric) = Metric::of(spec) else {
            let why = format!("unknown metric source type {:?}", spec.type_);
            outcome.failures.push(("InvalidMetricSourceType", why));
            continue;
        };
        let figures = figures(pods, usage, &metric.source, now);
        let wished = wish(&Observed {
            current,
            source: &metric.source,
            target: metric.target,
            pods,
            figures: &figures,
            tolerances,
            now,
        });
        match wished {
            Ok(wish) => {
                outcome.statuses.push(metric.status(&wish));
                let is_highest = outcome
                    .wish
                    .as_ref()
                    .is_none_or(|(highest, _)| wish.replicas > *highest);
                if is_highest {
                    outcome.wish = Some((wish.replicas, metric.text()));
                }
            }
            Err(why) => {
                let (resource, failure) = (&metric.source.resource, metric.failure);
                let why = format!("failed to get {resource} usage: {why}");
                outcome.failures.push((failure, why));
            }
        }
    }
    let is_down = outcome
        .wish
        .as_ref()
        .is_some_and(|(wish, _)| *wish < current);
    if !outcome.failures.is_empty() && is_down {
        outcome.wish = None;
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_api::proto::ContainerUsage;
    use serde_json::{Value, json};

    fn now() -> Timestamp {
        "2026-01-01T01:00:00Z".parse().unwrap()
    }

    fn pod(name: &str) -> Arc<Pod> {
        let requests = json!({"requests": {"cpu": "1", "memory": "100Mi"}});
        let pod = json!({"metadata": {"name": name, "uid": name}, "spec": {"containers": [
            {"name": "a", "resources": requests}, {"name": "b", "resources": requests}]},
            "status": {"phase": "Running", "startTime": "2026-01-01T00:00:00Z", "conditions": [
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:10Z"}]}});
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn used(name: &str, of_a: u64, of_b: u64) -> PodUsage {
        let container = |name: &str, millicores: u64| ContainerUsage {
            name: name.to_owned(),
            usage: Some(Usage {
                cpu_nanocores: millicores * 1_000_000,
                memory_working_set_bytes: 10 << 20,
                window_ms: 1000,
                ..Usage::default()
            }),
        };
        PodUsage {
            uid: name.to_owned(),
            name: name.to_owned(),
            containers: vec![container("a", of_a), container("b", of_b)],
            ..PodUsage::default()
        }
    }

    fn specs(all: Value) -> Vec<MetricSpec> {
        serde_json::from_value(all).unwrap()
    }

    fn resource(name: &str, target: Value) -> Value {
        json!({"type": "Resource", "resource": {"name": name, "target": target}})
    }

    fn evaluated(all: Value, usage: &[PodUsage]) -> Outcome {
        let tolerances = Tolerances { down: 0.1, up: 0.1 };
        let pods = [pod("x"), pod("y")];
        evaluate(&specs(all), 2, &pods, usage, tolerances, now())
    }

    #[test]
    fn the_highest_wish_counts_and_each_metric_is_shown() {
        let percent = |n: i32| json!({"type": "Utilization", "averageUtilization": n});
        let all = json!([
            resource("cpu", percent(50)),
            resource("memory", json!({"type": "AverageValue", "averageValue": "5Mi"})),
            {"type": "ContainerResource", "containerResource": {"name": "cpu", "container": "a",
                "target": percent(100)}},
        ]);
        let usage = [used("x", 2000, 0), used("y", 2000, 0)];
        let outcome = evaluated(all, &usage);
        // cpu: 100 % of 50; memory: 20 MiB of 5 MiB; container a: 200 % of 100.
        assert_eq!(outcome.wish, Some((8, "memory resource".to_owned())));
        assert!(outcome.failures.is_empty(), "{:?}", outcome.failures);
        let shown = serde_json::to_value(&outcome.statuses).unwrap();
        assert_eq!(
            shown[0]["resource"]["current"],
            json!({"averageUtilization": 100, "averageValue": "2"})
        );
        assert_eq!(
            shown[1]["resource"]["current"],
            json!({"averageValue": "20971520"})
        );
        assert_eq!(
            shown[2]["containerResource"]["current"],
            json!({"averageUtilization": 200, "averageValue": "2"})
        );
    }

    #[test]
    fn a_metric_that_cannot_be_had_lets_nothing_go() {
        let percent = |n: i32| json!({"type": "Utilization", "averageUtilization": n});
        let lost = json!({"type": "ContainerResource", "containerResource": {"name": "cpu",
            "container": "nobody", "target": percent(50)}});
        let low = [used("x", 100, 100), used("y", 100, 100)];
        let outcome = evaluated(json!([resource("cpu", percent(50)), lost]), &low);
        assert_eq!(outcome.wish, None);
        assert_eq!(outcome.failures[0].0, "FailedGetContainerResourceMetric");
        let high = [used("x", 2000, 2000), used("y", 2000, 2000)];
        let outcome = evaluated(json!([resource("cpu", percent(50)), lost]), &high);
        assert_eq!(outcome.wish.map(|(wish, _)| wish), Some(8));
        // Figures of another pod of that name are none.
        let mut other = used("x", 100, 100);
        other.uid = "other".to_owned();
        let outcome = evaluated(json!([resource("cpu", percent(50))]), &[other]);
        assert_eq!(
            outcome.failures[0].1,
            "failed to get cpu usage: did not receive metrics for targeted pods (pods might be unready)"
        );
    }
}
