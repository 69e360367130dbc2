//! Which upstream server to ask first. Pure: the time that an answer took is an argument.
//!
//! ```text
//! in service ─ 2 failures in a row ─► out ─ a probe is answered ─► in service
//! any ─ our own probe came back to us ─► loop: not asked until the file changes
//! ```
//! In service the fastest comes first; those that are not asked get faster by neglect, so that each
//! is measured now and then. Servers that are out come last but are asked too when all others fail:
//! an answer from anybody is better than none.

use std::net::SocketAddr;
use std::time::Duration;

/// Failures in a row that put a server out.
const FAILURES_MAX: u32 = 2;
/// Between the first probes of a server that is out; each later one waits twice as long.
const PROBE_PAUSE: Duration = Duration::from_millis(500);
const PROBE_PAUSE_MAX: Duration = Duration::from_secs(10);
/// Of the measured time, what a neglected server keeps per question.
const NEGLECT: f64 = 0.98;

#[derive(Clone, Debug)]
struct Server {
    address: SocketAddr,
    /// Microseconds, smoothed; 0: never measured.
    took_us: f64,
    failures: u32,
    is_out: bool,
    loops: bool,
}

/// What is known of the servers.
#[derive(Clone, Default, Debug)]
pub(super) struct Health {
    servers: Vec<Server>,
}

impl Health {
    /// These are the servers now; what is known of those that stay is kept.
    pub(super) fn replace(&mut self, addresses: &[SocketAddr]) {
        let servers = addresses.iter().map(|address| {
            let known = self.servers.iter().find(|s| s.address == *address);
            known.cloned().unwrap_or(Server {
                address: *address,
                took_us: 0.0,
                failures: 0,
                is_out: false,
                loops: false,
            })
        });
        self.servers = servers.collect();
    }

    /// All of them, as they came.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.servers.iter().map(|server| server.address).collect()
    }

    /// Whom to ask, in this order.
    pub(super) fn order(&self) -> Vec<SocketAddr> {
        let mut servers: Vec<&Server> = self.servers.iter().filter(|s| !s.loops).collect();
        // Stable: of two that were never measured the file's first.
        servers.sort_by(|a, b| {
            let rank = |s: &Server| (s.is_out, if s.is_out { s.failures } else { 0 });
            rank(a).cmp(&rank(b)).then(a.took_us.total_cmp(&b.took_us))
        });
        servers.iter().map(|server| server.address).collect()
    }

    /// It answered after that time; true when it was out.
    pub(super) fn answered(&mut self, address: SocketAddr, took: Duration) -> bool {
        let mut was_out = false;
        for server in &mut self.servers {
            if server.address != address {
                server.took_us *= NEGLECT;
                continue;
            }
            was_out = server.is_out;
            let took_us = took.as_secs_f64() * 1e6;
            server.took_us = match server.took_us {
                0.0 => took_us,
                known => known * 0.75 + took_us * 0.25,
            };
            server.failures = 0;
            server.is_out = false;
        }
        was_out
    }

    /// It did not answer; true when it is out because of that, and was not before.
    pub(super) fn failed(&mut self, address: SocketAddr) -> bool {
        let Some(server) = self.servers.iter_mut().find(|s| s.address == address) else {
            return false;
        };
        server.failures = server.failures.saturating_add(1);
        let goes = server.failures >= FAILURES_MAX && !server.is_out;
        server.is_out |= goes;
        goes
    }

    /// How long to wait before the next probe of a server; none: it is in service, or gone.
    pub(super) fn probe_pause(&self, address: SocketAddr) -> Option<Duration> {
        let server = self.servers.iter().find(|s| s.address == address)?;
        let doublings = server.failures.saturating_sub(FAILURES_MAX).min(8);
        server
            .is_out
            .then(|| (PROBE_PAUSE * (1 << doublings)).min(PROBE_PAUSE_MAX))
    }

    /// Its questions come back to us; true when that is new.
    pub(super) fn loops(&mut self, address: SocketAddr) -> bool {
        let server = self.servers.iter_mut().find(|s| s.address == address);
        server.is_some_and(|server| !std::mem::replace(&mut server.loops, true))
    }

    /// Nobody is in service.
    pub(super) fn all_out(&self) -> bool {
        self.servers
            .iter()
            .all(|server| server.is_out || server.loops)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn server(n: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, n], 53))
    }

    fn three() -> Health {
        let mut health = Health::default();
        health.replace(&[server(1), server(2), server(3)]);
        health
    }

    #[test]
    fn the_files_order_counts_until_one_is_measured_faster() {
        let mut health = three();
        assert_eq!(health.order(), [server(1), server(2), server(3)]);
        health.answered(server(1), Duration::from_millis(20));
        health.answered(server(2), Duration::from_millis(2));
        health.answered(server(3), Duration::from_millis(9));
        assert_eq!(health.order(), [server(2), server(3), server(1)]);
        // A neglected one is measured again after a while.
        for _ in 0..200 {
            health.answered(server(2), Duration::from_millis(2));
        }
        assert_ne!(health.order()[0], server(2));
    }

    #[test]
    fn a_server_that_fails_twice_is_last_until_a_probe_is_answered() {
        let mut health = three();
        assert!(!health.failed(server(1)));
        assert!(health.failed(server(1)));
        assert!(!health.failed(server(1)), "told once");
        assert_eq!(health.order(), [server(2), server(3), server(1)]);
        assert_eq!(health.probe_pause(server(1)), Some(PROBE_PAUSE * 2));
        assert_eq!(health.probe_pause(server(2)), None);
        assert!(health.answered(server(1), Duration::from_millis(1)));
        assert_eq!(health.probe_pause(server(1)), None);
        assert_eq!(health.order().len(), 3);
    }

    #[test]
    fn a_loop_is_never_asked_until_the_servers_change() {
        let mut health = three();
        assert!(health.loops(server(2)) && !health.loops(server(2)));
        assert_eq!(health.order(), [server(1), server(3)]);
        health.replace(&[server(1)]);
        health.replace(&[server(1), server(2)]);
        assert_eq!(health.order(), [server(1), server(2)]);
    }

    proptest! {
        /// Whatever happens, every server that does not loop is in the order exactly once.
        #[test]
        fn nobody_is_forgotten(
            steps in proptest::collection::vec((0..3u8, 0..4u8, 0..5000u64), 0..100)
        ) {
            let mut health = three();
            let mut looping = std::collections::BTreeSet::new();
            for (what, n, took_us) in steps {
                match what {
                    0 => { health.answered(server(n), Duration::from_micros(took_us)); }
                    1 => { health.failed(server(n)); }
                    _ if took_us < 500 && (1..=3).contains(&n) => {
                        health.loops(server(n));
                        looping.insert(server(n));
                    }
                    _ => {}
                }
                let mut order = health.order();
                order.sort();
                let expected: Vec<_> = [1, 2, 3].map(server).into_iter().filter(|s| !looping.contains(s)).collect();
                prop_assert_eq!(order, expected);
                for server in [1, 2, 3].map(server) {
                    prop_assert!(health.probe_pause(server).is_none_or(|pause| pause <= PROBE_PAUSE_MAX));
                }
            }
        }
    }
}
