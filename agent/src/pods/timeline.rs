//! Where a pod's start went: a duration per phase, told once in an event and in `describe`.
//!
//! Phases overlap (network, volumes and images are made side by side), so each carries its own
//! duration and the total is not their sum.

use std::time::{Duration, Instant};

/// Stopwatch of one pod's first start.
#[derive(Clone, Debug)]
pub struct Timeline {
    began: Instant,
    phases: Vec<(&'static str, Duration)>,
    told: bool,
}

impl Timeline {
    /// Starts when the agent first hears of the pod.
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            phases: Vec::new(),
            told: false,
        }
    }

    /// Adds what a phase took; the same phase of a second container adds up.
    pub fn add(&mut self, phase: &'static str, took: Duration) {
        match self.phases.iter_mut().find(|(name, _)| *name == phase) {
            Some((_, total)) => *total += took,
            None => self.phases.push((phase, took)),
        }
    }

    /// The line for people, the first time that everything runs: `running 31 ms after the agent
    /// heard of it: network 3.1, volumes 0.4, ...`.
    pub fn tell(&mut self) -> Option<String> {
        if self.told {
            return None;
        }
        self.told = true;
        let parts: Vec<String> = self
            .phases
            .iter()
            .map(|(name, took)| format!("{name} {:.1}", took.as_secs_f64() * 1e3))
            .collect();
        let total = self.began.elapsed().as_secs_f64() * 1e3;
        Some(format!("running after {total:.1} ms: {}", parts.join(", ")))
    }

    /// An adopted pod was started by an agent before this one.
    pub fn nothing_to_tell(&mut self) {
        self.told = true;
    }
}

impl Default for Timeline {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs `work` and returns what it took beside its result.
pub async fn timed<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let began = Instant::now();
    let result = work.await;
    (result, began.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_and_are_told_once() {
        let mut timeline = Timeline::new();
        timeline.add("network", Duration::from_micros(3100));
        timeline.add("create", Duration::from_millis(10));
        timeline.add("create", Duration::from_millis(5));
        let words = timeline.tell().unwrap();
        assert!(words.ends_with("ms: network 3.1, create 15.0"), "{words}");
        assert_eq!(timeline.tell(), None);
    }
}
