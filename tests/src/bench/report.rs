//! From samples to the figures of one benchmark: pure.
//!
//! `samples ─► percentiles per round ─► median over rounds ─► ratios, targets ─► JSON`
//!
//! The median over rounds, and not the percentile of all samples: a round that a neighbour has
//! spoiled then counts as one round, and a ratio compares what ran at the same time.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// Which side of the limit is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// At most.
    Max,
    /// At least.
    Min,
}

/// A promise and what was found.
#[derive(Clone, Debug)]
pub struct Target {
    /// What is promised, in words.
    pub what: String,
    /// Which side is good.
    pub bound: Bound,
    /// Of what.
    pub limit: f64,
    /// NaN: not measured.
    pub got: f64,
}

impl Target {
    /// A promise about a figure.
    pub fn new(what: &str, bound: Bound, limit: f64, got: f64) -> Self {
        Self {
            what: what.into(),
            bound,
            limit,
            got,
        }
    }

    /// Whether the promise is kept; what could not be measured keeps none.
    pub fn is_met(&self) -> bool {
        match self.bound {
            Bound::Max => self.got <= self.limit,
            Bound::Min => self.got >= self.limit,
        }
    }

    pub(super) fn to_json(&self) -> Value {
        let bound = match self.bound {
            Bound::Max => "max",
            Bound::Min => "min",
        };
        let mut target = Map::new();
        target.insert("what".into(), json!(self.what));
        target.insert(bound.into(), json!(self.limit));
        target.insert("got".into(), number(self.got));
        target.insert("met".into(), json!(self.is_met()));
        Value::Object(target)
    }
}

/// p50, p90 and p99 of a case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantiles {
    /// Half of the samples are at most this.
    pub p50: f64,
    /// 90 of 100.
    pub p90: f64,
    /// 99 of 100.
    pub p99: f64,
}

/// One benchmark's figures.
pub struct Report {
    bench: &'static str,
    unit: &'static str,
    /// Samples of each case, by round.
    cases: BTreeMap<String, Vec<Vec<f64>>>,
    ratios: Vec<(String, f64)>,
    targets: Vec<Target>,
    counts: BTreeMap<String, f64>,
    phases: BTreeMap<String, Vec<f64>>,
}

impl Report {
    /// Nothing measured yet; `unit` is that of every sample.
    pub fn new(bench: &'static str, unit: &'static str) -> Self {
        Self {
            bench,
            unit,
            cases: BTreeMap::new(),
            ratios: Vec::new(),
            targets: Vec::new(),
            counts: BTreeMap::new(),
            phases: BTreeMap::new(),
        }
    }

    /// Adds a round's samples of one case; a round without samples is none.
    pub fn add_round(&mut self, case: &str, samples: Vec<f64>) {
        if !samples.is_empty() {
            self.cases.entry(case.into()).or_default().push(samples);
        }
    }

    /// The median over rounds of each percentile; None when the case was not measured.
    pub fn quantiles(&self, case: &str) -> Option<Quantiles> {
        let rounds = self.cases.get(case)?;
        let over_rounds = |q: f64| {
            let each: Vec<f64> = rounds.iter().filter_map(|r| percentile(r, q)).collect();
            median(&each)
        };
        Some(Quantiles {
            p50: over_rounds(0.5)?,
            p90: over_rounds(0.9)?,
            p99: over_rounds(0.99)?,
        })
    }

    /// The median over rounds of `of`'s p50 by `by`'s p50 in the same round, also kept for the JSON
    /// as `of/by`. NaN when one of them was not measured.
    pub fn ratio(&mut self, of: &str, by: &str) -> f64 {
        let p50 = |case: &str| -> Vec<f64> {
            let rounds = self.cases.get(case).into_iter().flatten();
            rounds.filter_map(|r| percentile(r, 0.5)).collect()
        };
        let each: Vec<f64> = p50(of).iter().zip(p50(by)).map(|(a, b)| a / b).collect();
        let ratio = median(&each).unwrap_or(f64::NAN);
        self.ratios.push((format!("{of}/{by}"), ratio));
        ratio
    }

    /// A promise about a figure.
    pub fn target(&mut self, what: &str, bound: Bound, limit: f64, got: f64) {
        self.targets.push(Target::new(what, bound, limit, got));
    }

    /// A figure that is counted once, such as system calls.
    pub fn count(&mut self, what: &str, got: f64) {
        self.counts.insert(what.into(), got);
    }

    /// One sample of a part of what was measured: where the time goes.
    pub fn add_phase(&mut self, phase: &str, sample: f64) {
        self.phases.entry(phase.into()).or_default().push(sample);
    }

    /// The document of `target/bench/NAME.json`.
    pub fn to_json(&self) -> Value {
        let cases: Map<String, Value> = self
            .cases
            .keys()
            .filter_map(|case| {
                let q = self.quantiles(case)?;
                let figures = json!({
                    "p50": number(q.p50), "p90": number(q.p90), "p99": number(q.p99),
                });
                Some((case.clone(), figures))
            })
            .collect();
        let ratios: Map<String, Value> = self
            .ratios
            .iter()
            .map(|(name, ratio)| (name.clone(), json!({"p50": number(*ratio)})))
            .collect();
        let runs = self.cases.values().map(Vec::len).min().unwrap_or(0);
        let mut document = json!({
            "bench": self.bench,
            "unit": self.unit,
            "runs": runs,
            "cases": cases,
            "ratios": ratios,
            "targets": self.targets.iter().map(Target::to_json).collect::<Vec<_>>(),
        });
        if !self.counts.is_empty() {
            let counts = self.counts.iter().map(|(k, v)| (k.clone(), number(*v)));
            document["counts"] = Value::Object(counts.collect());
        }
        if !self.phases.is_empty() {
            let phases = self.phases.iter().filter_map(|(name, samples)| {
                Some((name.clone(), json!({"p50": number(median(samples)?)})))
            });
            document["phases"] = Value::Object(phases.collect());
        }
        document
    }
}

/// Four significant digits: more would be noise. What was not measured is null.
pub(super) fn number(value: f64) -> Value {
    let rounded = format!("{value:.3e}").parse::<f64>();
    rounded.map_or(Value::Null, |v| json!(v))
}

/// The nearest-rank percentile, `q` in 0..=1; None without samples.
pub fn percentile(samples: &[f64], q: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// The middle one; of an even number the mean of the middle two.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    Some((sorted[sorted.len() / 2 - 1] + upper) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let samples: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&samples, 0.5), Some(50.0));
        assert_eq!(percentile(&samples, 0.99), Some(99.0));
        assert_eq!(percentile(&samples, 1.0), Some(100.0));
        assert_eq!(percentile(&[7.0], 0.01), Some(7.0));
        assert_eq!(percentile(&[], 0.5), None);
        assert_eq!(median(&[3.0, 1.0, 2.0, 10.0]), Some(2.5));
    }

    #[test]
    fn a_spoiled_round_does_not_move_the_figure() {
        let mut report = Report::new("x", "ms");
        for scale in [1.0, 1.0, 50.0, 1.0, 1.0] {
            report.add_round("gantry", vec![2.0 * scale; 3]);
            report.add_round("runc", vec![4.0 * scale; 3]);
        }
        assert_eq!(report.quantiles("gantry").unwrap().p50, 2.0);
        assert_eq!(report.ratio("gantry", "runc"), 0.5);
        assert_eq!(report.to_json()["runs"], 5);
    }

    #[test]
    fn the_document_has_the_agreed_form() {
        let mut report = Report::new("pod_start", "ms");
        report.add_round("gantry", vec![1.23456]);
        report.add_round("runc", vec![2.0]);
        let ratio = report.ratio("gantry", "runc");
        report.target("gantry/runc p50", Bound::Max, 1.0, ratio);
        let got = report.to_json();
        let wanted = json!({
            "bench": "pod_start", "unit": "ms", "runs": 1,
            "cases": {
                "gantry": {"p50": 1.235, "p90": 1.235, "p99": 1.235},
                "runc": {"p50": 2.0, "p90": 2.0, "p99": 2.0},
            },
            "ratios": {"gantry/runc": {"p50": 0.6173}},
            "targets": [{"what": "gantry/runc p50", "max": 1.0, "got": 0.6173, "met": true}],
        });
        assert_eq!(got, wanted);
    }

    #[test]
    fn what_was_not_measured_meets_no_target() {
        let mut report = Report::new("x", "ms");
        let ratio = report.ratio("gantry", "runc");
        report.target("a", Bound::Max, 1.0, ratio);
        report.target("b", Bound::Min, 1.0, ratio);
        assert!(!report.targets.iter().any(Target::is_met));
        assert!(report.to_json()["targets"][0]["got"].is_null());
    }

    proptest! {
        #[test]
        fn percentiles_are_samples_and_rise(samples in prop::collection::vec(0.0..1e9, 1..50)) {
            let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|q| percentile(&samples, q).unwrap());
            prop_assert!(p50 <= p90 && p90 <= p99);
            prop_assert!(samples.contains(&p50) && samples.contains(&p99));
        }
    }
}
