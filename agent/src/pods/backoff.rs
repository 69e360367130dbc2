//! How long a container waits before it is started again. Pure.
//!
//! Kubernetes' rule: the first restart is immediate, then 10 s, doubling to 5 min; a run of 10 min
//! forgets the past. Failed starts (image, configuration) wait from the first time on.

use std::time::Duration;

/// First wait.
pub const BACKOFF_FIRST: Duration = Duration::from_secs(10);
/// Longest wait.
pub const BACKOFF_MAX: Duration = Duration::from_secs(300);
/// A run this long resets the back-off.
pub const BACKOFF_RESET_AFTER: Duration = Duration::from_secs(600);

/// The failures in a row of one container.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The container ended after `ran`; returns the wait before the next start.
    pub fn after_exit(&mut self, ran: Duration) -> Duration {
        if ran >= BACKOFF_RESET_AFTER {
            self.failures = 0;
        }
        let wait = match self.failures {
            0 => Duration::ZERO,
            n => doubled(n - 1),
        };
        self.failures = self.failures.saturating_add(1);
        wait
    }

    /// The container could not be started at all; returns the wait before the next try.
    pub fn after_failed_start(&mut self) -> Duration {
        let wait = doubled(self.failures);
        self.failures = self.failures.saturating_add(1);
        wait
    }

    /// A start worked: failed starts before it do not count against the container's own exits.
    pub fn forget_failed_starts(&mut self) {
        self.failures = 0;
    }

    /// Rebuilt after an agent start from the number of restarts the records show.
    pub fn from_restarts(restarts: u32) -> Self {
        Self { failures: restarts }
    }
}

fn doubled(times: u32) -> Duration {
    // 2^5 x 10 s is above the cap already; the shift cannot overflow.
    (BACKOFF_FIRST * (1 << times.min(5))).min(BACKOFF_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_restart_is_immediate_then_doubles_to_five_minutes() {
        let mut backoff = Backoff::default();
        let waits: Vec<u64> = (0..8)
            .map(|_| backoff.after_exit(Duration::from_secs(1)).as_secs())
            .collect();
        assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn ten_minutes_of_running_forget_the_past() {
        let mut backoff = Backoff::from_restarts(6);
        assert_eq!(backoff.after_exit(BACKOFF_RESET_AFTER), Duration::ZERO);
        assert_eq!(backoff.after_exit(Duration::from_secs(1)), BACKOFF_FIRST);
    }

    #[test]
    fn failed_starts_wait_from_the_first_time() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.after_failed_start(), BACKOFF_FIRST);
        assert_eq!(backoff.after_failed_start(), BACKOFF_FIRST * 2);
    }
}
