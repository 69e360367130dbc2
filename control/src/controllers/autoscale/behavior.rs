//! How fast, and how far back, a workload follows what its metrics ask for. Pure.
//!
//! ```text
//!  wish ─► stabilize: up no further than the lowest wish of the window for up (0 s),
//!          down no further than the highest of the window for down (300 s)
//!       ─► rate: at most what the policies allow since their periods began ─► min, max ─► replicas
//! ```
//! A scaler that says nothing about it has Kubernetes' defaults. What was wished and done is in memory: after
//! a restart the windows begin anew, so nothing is taken down before the window for down is over.
//!
//! Source: Kubernetes `pkg/controller/podautoscaler/horizontal.go` (normalizeDesiredReplicasWithBehaviors).

use std::collections::VecDeque;
use std::time::Duration;

use gantry_api::k8s_openapi::api::autoscaling::v2::{
    HPAScalingPolicy, HPAScalingRules, HorizontalPodAutoscalerBehavior,
};
use gantry_api::quantity::Quantity;
use tokio::time::Instant;

use super::replicas::{TOLERANCE, Tolerances};

/// Highest wish of this time counts where a scaler says nothing.
const WINDOW_DOWN_S: i32 = 300;
/// Longest window or period that there can be.
const KEPT: Duration = Duration::from_secs(3600);
/// Wishes and changes that are kept: two per second of the longest window.
const KEPT_COUNT_MAX: usize = 7200;

/// What one direction allows.
#[derive(Debug, Clone, PartialEq)]
struct Rules {
    window: Duration,
    /// `Max`, `Min` or `Disabled`.
    select: String,
    policies: Vec<HPAScalingPolicy>,
    tolerance: f64,
}

fn policy(type_: &str, value: i32) -> HPAScalingPolicy {
    HPAScalingPolicy {
        period_seconds: 15,
        type_: type_.to_owned(),
        value,
    }
}

impl Rules {
    fn of(own: Option<&HPAScalingRules>, window_s: i32, policies: Vec<HPAScalingPolicy>) -> Rules {
        let seconds = own.and_then(|r| r.stabilization_window_seconds);
        let seconds = u64::try_from(seconds.unwrap_or(window_s)).unwrap_or(0);
        let tolerance = own.and_then(|r| Quantity::parse(&r.tolerance.as_ref()?.0).ok());
        Rules {
            window: Duration::from_secs(seconds),
            select: own
                .and_then(|r| r.select_policy.clone())
                .unwrap_or_else(|| "Max".to_owned()),
            policies: own.and_then(|r| r.policies.clone()).unwrap_or(policies),
            tolerance: tolerance.map_or(TOLERANCE, Quantity::as_f64),
        }
    }
}

/// What both directions allow.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Behavior {
    up: Rules,
    down: Rules,
}

impl Behavior {
    /// What the scaler says, and the defaults.
    pub(super) fn of(own: Option<&HorizontalPodAutoscalerBehavior>) -> Behavior {
        let up = own.and_then(|b| b.scale_up.as_ref());
        let down = own.and_then(|b| b.scale_down.as_ref());
        let double = vec![policy("Pods", 4), policy("Percent", 100)];
        Behavior {
            up: Rules::of(up, 0, double),
            down: Rules::of(down, WINDOW_DOWN_S, vec![policy("Percent", 100)]),
        }
    }

    pub(super) fn tolerances(&self) -> Tolerances {
        Tolerances {
            down: self.down.tolerance,
            up: self.up.tolerance,
        }
    }
}

/// What has been wished and done.
#[derive(Debug, Default)]
pub(super) struct History {
    wishes: VecDeque<(Instant, i64)>,
    /// Replicas added (positive) and taken (negative).
    changes: VecDeque<(Instant, i64)>,
}

impl History {
    fn forget_old(&mut self, now: Instant) {
        let is_old = |at: Instant| now.saturating_duration_since(at) > KEPT;
        for list in [&mut self.wishes, &mut self.changes] {
            while list.len() > KEPT_COUNT_MAX || list.front().is_some_and(|(at, _)| is_old(*at)) {
                list.pop_front();
            }
        }
    }

    /// Notes that the number was changed.
    pub(super) fn changed(&mut self, from: i64, to: i64, now: Instant) {
        self.changes.push_back((now, to - from));
        self.forget_old(now);
    }

    /// Added and taken since the period began.
    fn in_period(&self, period_s: i32, now: Instant) -> (i64, i64) {
        let period = Duration::from_secs(u64::try_from(period_s).unwrap_or(0));
        let recent = self.changes.iter();
        let recent = recent.filter(|(at, _)| now.saturating_duration_since(*at) < period);
        let (mut added, mut taken) = (0, 0);
        for (_, change) in recent {
            added += (*change).max(0);
            taken += (-*change).max(0);
        }
        (added, taken)
    }
}

/// How many there may be, why, and in Kubernetes' words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Limited {
    pub(super) replicas: i64,
    /// Condition `AbleToScale`: reason and message.
    pub(super) able: (&'static str, &'static str),
    /// Condition `ScalingLimited`: whether, reason and message.
    pub(super) limited: (bool, &'static str, &'static str),
}

/// Decides how many replicas there are to be, now that the metrics ask for `wish`.
pub(super) fn follow(
    behavior: &Behavior,
    history: &mut History,
    current: i64,
    wish: i64,
    (least, most): (i64, i64),
    now: Instant,
) -> Limited {
    let (stable, able) = stabilize(behavior, history, current, wish, now);
    let (replicas, limited) = limit(behavior, history, current, stable, (least, most), now);
    Limited {
        replicas,
        able,
        limited,
    }
}

fn stabilize(
    behavior: &Behavior,
    history: &mut History,
    current: i64,
    wish: i64,
    now: Instant,
) -> (i64, (&'static str, &'static str)) {
    let (mut up, mut down) = (wish, wish);
    for (at, earlier) in &history.wishes {
        let age = now.saturating_duration_since(*at);
        if age < behavior.up.window {
            up = up.min(*earlier);
        }
        if age < behavior.down.window {
            down = down.max(*earlier);
        }
    }
    let stable = current.max(up).min(down);
    history.wishes.push_back((now, wish));
    history.forget_old(now);
    let able = if stable > wish {
        (
            "ScaleDownStabilized",
            "recent recommendations were higher than current one, applying the highest recent recommendation",
        )
    } else if stable < wish {
        (
            "ScaleUpStabilized",
            "recent recommendations were lower than current one, applying the lowest recent recommendation",
        )
    } else {
        ("ReadyForNewScale", "recommended size matches current size")
    };
    (stable, able)
}

fn limit(
    behavior: &Behavior,
    history: &History,
    current: i64,
    wish: i64,
    (least, most): (i64, i64),
    now: Instant,
) -> (i64, (bool, &'static str, &'static str)) {
    if wish > current {
        let rate = up_limit(&behavior.up, history, current, now).max(current);
        let (allowed, why) = if most > rate {
            let text = "the desired replica count is increasing faster than the maximum scale rate";
            (rate, (true, "ScaleUpLimit", text))
        } else {
            let text = "the desired replica count is more than the maximum replica count";
            (most, (true, "TooManyReplicas", text))
        };
        if wish > allowed {
            return (allowed, why);
        }
    } else if wish < current {
        let rate = down_limit(&behavior.down, history, current, now).min(current);
        let (allowed, why) = if least < rate {
            let text = "the desired replica count is decreasing faster than the maximum scale rate";
            (rate, (true, "ScaleDownLimit", text))
        } else {
            let text = "the desired replica count is less than the minimum replica count";
            (least, (true, "TooFewReplicas", text))
        };
        if wish < allowed {
            return (allowed, why);
        }
    }
    let text = "the desired count is within the acceptable range";
    (wish, (false, "DesiredWithinRange", text))
}

/// Most replicas that the policies allow now.
fn up_limit(rules: &Rules, history: &History, current: i64, now: Instant) -> i64 {
    if rules.select == "Disabled" {
        return current;
    }
    let proposals = rules.policies.iter().map(|policy| {
        let (added, taken) = history.in_period(policy.period_seconds, now);
        let start = current - added + taken;
        let value = i64::from(policy.value);
        match policy.type_.as_str() {
            "Pods" => start.saturating_add(value),
            // Rounded up.
            _ => (start.saturating_mul(100 + value) + 99) / 100,
        }
    });
    let limit = match rules.select.as_str() {
        "Min" => proposals.min(),
        _ => proposals.max(),
    };
    limit.unwrap_or(current)
}

/// Fewest replicas that the policies allow now.
fn down_limit(rules: &Rules, history: &History, current: i64, now: Instant) -> i64 {
    if rules.select == "Disabled" {
        return current;
    }
    let proposals = rules.policies.iter().map(|policy| {
        let (added, taken) = history.in_period(policy.period_seconds, now);
        let start = current - added + taken;
        let value = i64::from(policy.value);
        match policy.type_.as_str() {
            "Pods" => start - value,
            _ => start.saturating_mul(100 - value) / 100,
        }
    });
    // The most change is the fewest that stay.
    let limit = match rules.select.as_str() {
        "Min" => proposals.max(),
        _ => proposals.min(),
    };
    limit.unwrap_or(current)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn behavior(own: Value) -> Behavior {
        let own: HorizontalPodAutoscalerBehavior = serde_json::from_value(own).unwrap();
        Behavior::of(Some(&own))
    }

    fn step(
        behavior: &Behavior,
        history: &mut History,
        current: i64,
        wish: i64,
        now: Instant,
    ) -> (i64, &'static str) {
        let limited = follow(behavior, history, current, wish, (1, 100), now);
        if limited.replicas != current {
            history.changed(current, limited.replicas, now);
        }
        (limited.replicas, limited.limited.1)
    }

    #[test]
    fn by_default_it_doubles_at_once_and_goes_down_after_five_minutes() {
        let default = Behavior::of(None);
        let mut history = History::default();
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        assert_eq!(
            step(&default, &mut history, 1, 50, at(0)),
            (5, "ScaleUpLimit")
        );
        assert_eq!(
            step(&default, &mut history, 5, 50, at(5)),
            (5, "ScaleUpLimit")
        );
        assert_eq!(
            step(&default, &mut history, 5, 50, at(15)),
            (10, "ScaleUpLimit")
        );
        assert_eq!(
            step(&default, &mut history, 10, 1, at(30)),
            (10, "DesiredWithinRange")
        );
        assert_eq!(
            step(&default, &mut history, 10, 1, at(314)),
            (10, "DesiredWithinRange")
        );
        assert_eq!(
            step(&default, &mut history, 10, 1, at(331)),
            (1, "DesiredWithinRange")
        );
    }

    #[test]
    fn policies_and_windows_hold_it_back() {
        let slow = behavior(json!({
            "scaleUp": {"stabilizationWindowSeconds": 60, "policies": [
                {"type": "Pods", "value": 2, "periodSeconds": 30}]},
            "scaleDown": {"stabilizationWindowSeconds": 0, "selectPolicy": "Min", "policies": [
                {"type": "Pods", "value": 1, "periodSeconds": 60},
                {"type": "Percent", "value": 50, "periodSeconds": 60}]}}));
        let mut history = History::default();
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        assert_eq!(step(&slow, &mut history, 4, 4, at(0)).0, 4);
        // The lowest wish of a minute.
        assert_eq!(step(&slow, &mut history, 4, 20, at(30)).0, 4);
        assert_eq!(
            step(&slow, &mut history, 4, 20, at(61)),
            (6, "ScaleUpLimit")
        );
        assert_eq!(
            step(&slow, &mut history, 6, 20, at(80)),
            (6, "ScaleUpLimit")
        );
        assert_eq!(
            step(&slow, &mut history, 6, 20, at(91)),
            (8, "ScaleUpLimit")
        );
        // The smaller of both policies, counted from when the period began.
        assert_eq!(
            step(&slow, &mut history, 8, 2, at(200)),
            (7, "ScaleDownLimit")
        );
        assert_eq!(
            step(&slow, &mut history, 7, 2, at(230)),
            (7, "ScaleDownLimit")
        );
        assert_eq!(
            step(&slow, &mut history, 7, 2, at(261)),
            (6, "ScaleDownLimit")
        );
        let never = behavior(
            json!({"scaleDown": {"selectPolicy": "Disabled", "stabilizationWindowSeconds": 0}}),
        );
        assert_eq!(step(&never, &mut History::default(), 5, 1, at(0)).0, 5);
    }

    #[test]
    fn the_ends_of_the_range_are_named() {
        let free = behavior(json!({"scaleDown": {"stabilizationWindowSeconds": 0}}));
        let now = Instant::now();
        let ends = |current, wish| {
            let mut history = History::default();
            follow(&free, &mut history, current, wish, (2, 6), now)
        };
        assert_eq!(ends(4, 9).replicas, 6);
        assert_eq!(ends(4, 9).limited.1, "TooManyReplicas");
        assert_eq!(ends(4, 0).replicas, 2);
        assert_eq!(ends(4, 0).limited.1, "TooFewReplicas");
        assert_eq!(ends(4, 5).limited.1, "DesiredWithinRange");
    }

    proptest! {
        /// Whatever is wished, the number stays in its range, changes the right way or not at all, and no
        /// faster than the policies allow.
        #[test]
        fn it_stays_in_range_and_within_its_rate(
            wishes in proptest::collection::vec((0..60_i64, 1..40_u64), 1..40),
            pods in 1..6_i32, period in 1..60_i32, window in 0..120_i32,
        ) {
            let rules = json!({"stabilizationWindowSeconds": window, "policies": [
                {"type": "Pods", "value": pods, "periodSeconds": period}]});
            let own = behavior(json!({"scaleUp": rules, "scaleDown": rules}));
            let mut history = History::default();
            let (mut now, mut current) = (Instant::now(), 10_i64);
            let mut done: Vec<(Instant, i64)> = Vec::new();
            for (wish, pause) in wishes {
                now += Duration::from_secs(pause);
                let limited = follow(&own, &mut history, current, wish, (2, 40), now);
                let next = limited.replicas;
                prop_assert!((2..=40).contains(&next));
                if next != current {
                    history.changed(current, next, now);
                    done.push((now, next - current));
                }
                let period = Duration::from_secs(u64::try_from(period).unwrap());
                let net: i64 = done.iter()
                    .filter(|(at, _)| now.duration_since(*at) < period)
                    .map(|(_, change)| change).sum();
                let towards = net * (next - current).signum();
                prop_assert!(towards <= i64::from(pods), "{:?}", done);
                current = next;
            }
        }
    }
}
