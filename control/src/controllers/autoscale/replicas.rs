//! How many replicas a metric asks for. Pure.
//!
//! ```text
//!  pods ─► ready | not ready yet | without figures | leaving
//!            use / target of the ready ones = ratio ─► within 10 %: as many as there are
//!  scaling up:   those without figures and those not ready yet use nothing
//!  scaling down: those without figures use all that they may
//!  a ratio that turns over by this: as many as there are
//! ```
//! Every doubt is decided against a change, so pods that start do not make more pods start.
//!
//! Source: Kubernetes `pkg/controller/podautoscaler/replica_calculator.go`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Container, Pod};
use gantry_api::k8s_openapi::jiff::{SignedDuration, Timestamp};
use gantry_api::pod_resources::amounts;

use crate::controllers::pods;

/// A pod's CPU counts only from when its start is over.
const CPU_INITIALIZATION: SignedDuration = SignedDuration::from_secs(300);
/// A pod that was not ready for this long after its start has never been.
const INITIAL_READINESS: SignedDuration = SignedDuration::from_secs(30);
/// A ratio this near to one changes nothing.
pub(super) const TOLERANCE: f64 = 0.1;

/// What a metric is about: a resource of pods, or of one of their containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    /// `cpu` or `memory`.
    pub(super) resource: String,
    /// Empty: all containers.
    pub(super) container: String,
}

/// What a metric aims at, in thousandths of a core or of a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// Percent of what the pods request.
    Utilization(i64),
    /// Thousandths per pod.
    AverageValue(i64),
}

/// One pod's figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Figure {
    /// Thousandths.
    pub(super) value: i64,
    /// When it was measured.
    pub(super) at: Timestamp,
    /// Over how long.
    pub(super) window: Duration,
}

/// How near to one a ratio changes nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Tolerances {
    pub(super) down: f64,
    pub(super) up: f64,
}

impl Tolerances {
    fn hold(self, ratio: f64) -> bool {
        (1.0 - self.down..=1.0 + self.up).contains(&ratio)
    }
}

/// What is decided from.
pub(super) struct Observed<'a> {
    pub(super) current: i64,
    pub(super) source: &'a Source,
    pub(super) target: Target,
    pub(super) pods: &'a [Arc<Pod>],
    /// By name of the pod.
    pub(super) figures: &'a BTreeMap<String, Figure>,
    pub(super) tolerances: Tolerances,
    pub(super) now: Timestamp,
}

/// What a metric asks for, and what it shows.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Wish {
    pub(super) replicas: i64,
    /// Percent of the requests, where that is the target.
    pub(super) utilization: Option<i64>,
    /// Thousandths per pod.
    pub(super) average: i64,
}

/// The pods by what their figures say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Groups<'a> {
    ready_count: usize,
    unready: Vec<&'a str>,
    missing: Vec<&'a str>,
    ignored: Vec<&'a str>,
}

fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

fn group<'a>(observed: &Observed<'a>) -> Groups<'a> {
    let mut groups = Groups::default();
    for pod in observed.pods {
        let name = name(pod);
        if pods::is_terminating(pod) || pods::is_finished(pod) {
            groups.ignored.push(name);
        } else if pods::phase(pod) == "Pending" {
            groups.unready.push(name);
        } else if let Some(figure) = observed.figures.get(name) {
            let is_cpu = observed.source.resource == "cpu";
            if is_cpu && !is_past_its_start(pod, figure, observed.now) {
                groups.unready.push(name);
            } else {
                groups.ready_count += 1;
            }
        } else {
            groups.missing.push(name);
        }
    }
    groups
}

/// Whether a pod's CPU figure is one of its work, and not of its start.
fn is_past_its_start(pod: &Pod, figure: &Figure, now: Timestamp) -> bool {
    let start = pod.status.as_ref().and_then(|s| s.start_time.as_ref());
    let ready = pods::condition(pod, "Ready");
    let (Some(start), Some(ready)) = (start, ready) else {
        return false;
    };
    let is_ready = ready.status == "True";
    let since = ready.last_transition_time.as_ref().map_or(start.0, |t| t.0);
    if now.duration_since(start.0) < CPU_INITIALIZATION {
        let window = SignedDuration::try_from(figure.window).unwrap_or_default();
        return is_ready && figure.at.duration_since(since) >= window;
    }
    // It has been ready once: its figures count, also while it is not.
    is_ready || since.duration_since(start.0) > INITIAL_READINESS
}

/// What each pod requests, in thousandths.
fn requests<'a>(pods: &'a [Arc<Pod>], source: &Source) -> Result<BTreeMap<&'a str, i64>, String> {
    let mut all = BTreeMap::new();
    for pod in pods {
        let Some(spec) = &pod.spec else { continue };
        let is_sidecar = |c: &&Container| c.restart_policy.as_deref() == Some("Always");
        let sidecars = spec.init_containers.iter().flatten().filter(is_sidecar);
        let mut sum = 0_i64;
        for container in spec.containers.iter().chain(sidecars) {
            if !source.container.is_empty() && container.name != source.container {
                continue;
            }
            let resources = container.resources.as_ref();
            let requests = amounts(resources.and_then(|r| r.requests.as_ref()));
            let Some(request) = requests.get(&source.resource) else {
                return Err(format!(
                    "missing request for {} in container {} of Pod {}",
                    source.resource,
                    container.name,
                    name(pod)
                ));
            };
            sum = sum.saturating_add(request.milli());
        }
        all.insert(name(pod), sum);
    }
    Ok(all)
}

/// What the figures come to: the ratio to the target, percent of the requests, and the average.
#[derive(Debug, Clone, Copy)]
struct Ratio {
    ratio: f64,
    utilization: i64,
    average: i64,
}

#[expect(clippy::cast_precision_loss, reason = "a ratio needs no 64 digits")]
fn ratio(
    figures: &BTreeMap<&str, i64>,
    requests: &BTreeMap<&str, i64>,
    target: Target,
) -> Result<Ratio, String> {
    let sum = figures
        .values()
        .fold(0_i64, |sum, v| sum.saturating_add(*v));
    let average = sum / i64::try_from(figures.len()).unwrap_or(i64::MAX).max(1);
    match target {
        Target::AverageValue(wanted) => Ok(Ratio {
            ratio: average as f64 / wanted.max(1) as f64,
            utilization: 0,
            average,
        }),
        Target::Utilization(wanted) => {
            let of = figures.keys().filter_map(|name| requests.get(name));
            let requested = of.fold(0_i64, |sum, v| sum.saturating_add(*v));
            if requested == 0 {
                return Err("no metrics returned matched known pods".to_owned());
            }
            let percent = i128::from(sum) * 100 / i128::from(requested);
            let utilization = i64::try_from(percent).unwrap_or(i64::MAX);
            Ok(Ratio {
                ratio: utilization as f64 / wanted.max(1) as f64,
                utilization,
                average,
            })
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "`as` saturates, and nobody has 2^53 pods"
)]
fn times(ratio: f64, count: usize) -> i64 {
    (ratio * count as f64).ceil() as i64
}

/// Decides what one metric asks for.
///
/// # Errors
/// Why its figures say nothing, in Kubernetes' words.
pub(super) fn wish(observed: &Observed<'_>) -> Result<Wish, String> {
    if observed.pods.is_empty() {
        return Err("no pods returned by selector while calculating replica count".to_owned());
    }
    let groups = group(observed);
    let counted = |name: &&str| !groups.ignored.contains(name) && !groups.unready.contains(name);
    let mut figures: BTreeMap<&str, i64> = observed
        .pods
        .iter()
        .map(|pod| name(pod))
        .filter(counted)
        .filter_map(|name| Some((name, observed.figures.get(name)?.value)))
        .collect();
    if figures.is_empty() {
        let text = "did not receive metrics for targeted pods (pods might be unready)";
        return Err(text.to_owned());
    }
    let requests = match observed.target {
        Target::Utilization(_) => requests(observed.pods, observed.source)?,
        Target::AverageValue(_) => BTreeMap::new(),
    };
    let first = ratio(&figures, &requests, observed.target)?;
    let wish = |replicas: i64| Wish {
        replicas,
        utilization: matches!(observed.target, Target::Utilization(_)).then_some(first.utilization),
        average: first.average,
    };
    let up_with_unready = !groups.unready.is_empty() && first.ratio > 1.0;
    if !up_with_unready && groups.missing.is_empty() {
        if observed.tolerances.hold(first.ratio) {
            return Ok(wish(observed.current));
        }
        return Ok(wish(times(first.ratio, groups.ready_count)));
    }
    for name in &groups.missing {
        let assumed = if first.ratio < 1.0 {
            match observed.target {
                // At least all that it requests, so that it is no reason to have fewer.
                Target::Utilization(wanted) => {
                    let requested = requests.get(name).copied().unwrap_or(0);
                    requested.saturating_mul(wanted.max(100)) / 100
                }
                Target::AverageValue(wanted) => wanted,
            }
        } else if first.ratio > 1.0 {
            0
        } else {
            continue;
        };
        figures.insert(name, assumed);
    }
    if up_with_unready {
        figures.extend(groups.unready.iter().map(|name| (*name, 0)));
    }
    let again = ratio(&figures, &requests, observed.target)?;
    let turns =
        (first.ratio < 1.0 && again.ratio > 1.0) || (first.ratio > 1.0 && again.ratio < 1.0);
    if observed.tolerances.hold(again.ratio) || turns {
        return Ok(wish(observed.current));
    }
    let replicas = times(again.ratio, figures.len());
    let is_wrong_way = (again.ratio < 1.0 && replicas > observed.current)
        || (again.ratio > 1.0 && replicas < observed.current);
    Ok(wish(if is_wrong_way {
        observed.current
    } else {
        replicas
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn now() -> Timestamp {
        "2026-01-01T01:00:00Z".parse().unwrap()
    }

    fn pod(name: &str, phase: &str, ready: &str, started: &str) -> Arc<Pod> {
        let pod = json!({"metadata": {"name": name}, "spec": {"containers": [
            {"name": "a", "resources": {"requests": {"cpu": "1"}}},
            {"name": "b", "resources": {"requests": {"cpu": "500m"}}}]},
            "status": {"phase": phase, "startTime": started, "conditions": [
                {"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T00:50:00Z"}]}});
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn running(count: usize) -> Vec<Arc<Pod>> {
        let one = |i| pod(&format!("p{i}"), "Running", "True", "2026-01-01T00:00:00Z");
        (0..count).map(one).collect()
    }

    fn figures(values: &[i64]) -> BTreeMap<String, Figure> {
        let one = |(i, value): (usize, &i64)| {
            let window = Duration::from_secs(1);
            (
                format!("p{i}"),
                Figure {
                    value: *value,
                    at: now(),
                    window,
                },
            )
        };
        values.iter().enumerate().map(one).collect()
    }

    fn wished(
        current: i64,
        target: Target,
        pods: &[Arc<Pod>],
        figures: &BTreeMap<String, Figure>,
    ) -> Result<i64, String> {
        let source = Source {
            resource: "cpu".to_owned(),
            container: String::new(),
        };
        let tolerances = Tolerances {
            down: TOLERANCE,
            up: TOLERANCE,
        };
        let (source, now) = (&source, now());
        wish(&Observed {
            current,
            source,
            target,
            pods,
            figures,
            tolerances,
            now,
        })
        .map(|wish| wish.replicas)
    }

    #[test]
    fn the_ratio_to_the_target_decides() {
        let half = Target::Utilization(50);
        let pods = running(3);
        // 1500m requested each: 100 % of it in use, 50 % wanted.
        assert_eq!(wished(3, half, &pods, &figures(&[1500; 3])), Ok(6));
        assert_eq!(wished(3, half, &pods, &figures(&[750; 3])), Ok(3));
        assert_eq!(
            wished(3, half, &pods, &figures(&[820; 3])),
            Ok(3),
            "within 10 %"
        );
        assert_eq!(wished(3, half, &pods, &figures(&[300; 3])), Ok(2));
        assert_eq!(wished(3, half, &pods, &figures(&[0; 3])), Ok(0));
        let raw = Target::AverageValue(500);
        assert_eq!(wished(3, raw, &pods, &figures(&[1000, 1000, 250])), Ok(5));
    }

    #[test]
    fn what_is_not_known_speaks_against_a_change() {
        let half = Target::Utilization(50);
        let pods = running(4);
        // Two of four without figures: up, as if they used nothing.
        assert_eq!(wished(4, half, &pods, &figures(&[1500, 1500])), Ok(4));
        assert_eq!(wished(4, half, &pods, &figures(&[4500, 4500])), Ok(12));
        // Down, as if they used all that they request: 100 % of two, 0 of two is 50 %.
        assert_eq!(wished(4, half, &pods, &figures(&[0, 0])), Ok(4));
        assert_eq!(
            wished(4, half, &pods, &BTreeMap::new()).unwrap_err(),
            "did not receive metrics for targeted pods (pods might be unready)"
        );
        assert_eq!(
            wished(0, half, &[], &BTreeMap::new()).unwrap_err(),
            "no pods returned by selector while calculating replica count"
        );
    }

    #[test]
    fn pods_that_start_do_not_make_more_start() {
        let half = Target::Utilization(50);
        let mut pods = running(1);
        pods.push(pod("p1", "Pending", "False", "2026-01-01T00:59:50Z"));
        pods.push(pod("p2", "Running", "False", "2026-01-01T00:59:50Z"));
        // 100 % of one; the others count as nothing: 33 %, the other way round: no change.
        assert_eq!(wished(3, half, &pods, &figures(&[1500, 9000, 9000])), Ok(3));
        assert_eq!(wished(3, half, &pods, &figures(&[4500, 9000, 9000])), Ok(6));
        // Down they are not asked.
        assert_eq!(wished(3, half, &pods, &figures(&[300, 9000, 9000])), Ok(1));
        // One that was ready and is not any more counts.
        let late = pod("p0", "Running", "False", "2026-01-01T00:00:00Z");
        assert_eq!(wished(1, half, &[late], &figures(&[1500])), Ok(2));
        let never = Arc::new({
            let mut pod = Pod::clone(&pod("p0", "Running", "False", "2026-01-01T00:50:00Z"));
            let conditions = pod.status.as_mut().unwrap().conditions.as_mut().unwrap();
            conditions[0].last_transition_time = None;
            pod
        });
        assert!(wished(1, half, &[never], &figures(&[1500])).is_err());
    }

    #[test]
    fn a_container_without_a_request_is_named() {
        let bare = json!({"metadata": {"name": "p0"}, "spec": {"containers": [{"name": "a"}]},
            "status": {"phase": "Running", "startTime": "2026-01-01T00:00:00Z", "conditions": [
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:50:00Z"}]}});
        let bare: Arc<Pod> = Arc::new(serde_json::from_value(bare).unwrap());
        let got = wished(
            1,
            Target::Utilization(50),
            &[Arc::clone(&bare)],
            &figures(&[1]),
        );
        assert_eq!(
            got.unwrap_err(),
            "missing request for cpu in container a of Pod p0"
        );
        assert_eq!(
            wished(1, Target::AverageValue(1), &[bare], &figures(&[3])),
            Ok(3)
        );
    }

    proptest! {
        /// More use never asks for fewer; a change goes the way that the use says.
        #[test]
        fn more_use_asks_for_no_fewer(
            uses in proptest::collection::vec(0..6000_i64, 1..9), more in 0..3000_i64,
            wanted in 1..200_i64, unknown in 0..4_usize,
        ) {
            let pods = running(uses.len() + unknown);
            let current = i64::try_from(pods.len()).unwrap();
            let target = Target::Utilization(wanted);
            let got = wished(current, target, &pods, &figures(&uses)).unwrap();
            let raised: Vec<i64> = uses.iter().map(|u| u + more).collect();
            let got_more = wished(current, target, &pods, &figures(&raised)).unwrap();
            prop_assert!(got_more >= got, "{} then {}", got, got_more);
            let sum: i64 = uses.iter().sum();
            let used = sum * 100 / (1500 * i64::try_from(uses.len()).unwrap());
            if used > wanted {
                prop_assert!(got >= current);
            } else if used < wanted && unknown == 0 {
                prop_assert!(got <= current);
            }
        }
    }
}
