//! What the resolver counts, under CoreDNS's names, so that its dashboards work.
//!
//! Counters are atomics: counting takes no lock. `zone` is the cluster's domain or `.`, as in the
//! usual Corefile; what CoreDNS does not have is called `gantry_dns_…`.
//! Source: CoreDNS, `plugin/{metrics,cache,forward,autopath}/README.md`.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;

use super::forward::Forwarder;
use super::respond::Transport;

/// One number that only grows.
#[derive(Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Types that are counted by name; the last is the rest.
const KINDS: [&str; 9] = [
    "A", "AAAA", "SRV", "PTR", "TXT", "CNAME", "MX", "SOA", "other",
];
const CODES: [&str; 7] = [
    "NOERROR", "NXDOMAIN", "SERVFAIL", "REFUSED", "FORMERR", "NOTIMP", "other",
];
/// Upper bounds of the histogram, microseconds: every second one of CoreDNS's.
const BUCKETS_US: [u64; 8] = [
    250, 1_000, 4_000, 16_000, 64_000, 256_000, 1_024_000, 4_096_000,
];

/// Everything that is counted.
#[derive(Default)]
pub(super) struct Counters {
    /// By zone (the cluster's, the rest), transport and type.
    requests: [[[Counter; KINDS.len()]; 2]; 2],
    /// By zone and code.
    responses: [[Counter; CODES.len()]; 2],
    durations: [[Counter; BUCKETS_US.len() + 1]; 2],
    duration_us: [AtomicU64; 2],
    cache_hits: Counter,
    cache_denial_hits: Counter,
    pub(super) cache_misses: Counter,
    pub(super) served_stale: Counter,
    pub(super) merged: Counter,
    pub(super) rejected: Counter,
    pub(super) upstream_failures: Counter,
    pub(super) all_out: Counter,
    pub(super) one_hop: Counter,
    pub(super) recovered: Counter,
}

impl Counters {
    pub(super) fn cache_hit(&self, denial: bool) {
        match denial {
            true => self.cache_denial_hits.add(),
            false => self.cache_hits.add(),
        }
    }

    pub(super) fn request(&self, cluster: bool, transport: Transport, kind: RecordType) {
        let place = KINDS.iter().position(|name| *name == <&str>::from(kind));
        let tcp = usize::from(transport == Transport::Tcp);
        self.requests[usize::from(!cluster)][tcp][place.unwrap_or(KINDS.len() - 1)].add();
    }

    pub(super) fn response(&self, cluster: bool, code: ResponseCode, took: Duration) {
        let place = match code {
            ResponseCode::NoError => 0,
            ResponseCode::NXDomain => 1,
            ResponseCode::ServFail => 2,
            ResponseCode::Refused => 3,
            ResponseCode::FormErr => 4,
            ResponseCode::NotImp => 5,
            _ => 6,
        };
        let zone = usize::from(!cluster);
        self.responses[zone][place].add();
        let took_us = took.as_micros() as u64;
        let bucket = BUCKETS_US.iter().position(|bound| took_us <= *bound);
        self.durations[zone][bucket.unwrap_or(BUCKETS_US.len())].add();
        self.duration_us[zone].fetch_add(took_us, Ordering::Relaxed);
    }

    /// As Prometheus text.
    pub(super) fn render(&self, address: &str, domain: &str, forwarder: &Forwarder) -> String {
        let server = format!("server=\"dns://{address}\"");
        let zones = [domain, "."].map(|zone| format!("{server},zone=\"{zone}\""));
        let mut text = Text(String::new());
        text.family(
            "coredns_dns_requests_total",
            "counter",
            "Counter of DNS requests made per zone, protocol and type.",
        );
        for (zone, transports) in zones.iter().zip(&self.requests) {
            for (proto, kinds) in ["udp", "tcp"].iter().zip(transports) {
                for (kind, count) in KINDS.iter().zip(kinds) {
                    let labels = format!("{zone},proto=\"{proto}\",type=\"{kind}\"");
                    text.counted("coredns_dns_requests_total", &labels, count.get());
                }
            }
        }
        text.family(
            "coredns_dns_responses_total",
            "counter",
            "Counter of response status codes.",
        );
        for (zone, codes) in zones.iter().zip(&self.responses) {
            for (code, count) in CODES.iter().zip(codes) {
                let labels = format!("{zone},rcode=\"{code}\"");
                text.counted("coredns_dns_responses_total", &labels, count.get());
            }
        }
        self.render_durations(&zones, &mut text);
        let [successes, denials] = forwarder.cached();
        let kinds = ["success", "denial"].map(|kind| format!("{server},type=\"{kind}\""));
        text.family(
            "coredns_cache_entries",
            "gauge",
            "The number of elements in the cache.",
        );
        text.line("coredns_cache_entries", &kinds[0], successes as f64);
        text.line("coredns_cache_entries", &kinds[1], denials as f64);
        let name = "coredns_cache_hits_total";
        text.family(name, "counter", "The count of cache hits.");
        text.line(name, &kinds[0], self.cache_hits.get() as f64);
        text.line(name, &kinds[1], self.cache_denial_hits.get() as f64);
        let single = [
            (
                "coredns_cache_misses_total",
                "The count of cache misses.",
                &self.cache_misses,
            ),
            (
                "coredns_cache_served_stale_total",
                "The number of requests served from stale cache entries.",
                &self.served_stale,
            ),
            (
                "coredns_autopath_success_total",
                "Counter of requests that did autopath.",
                &self.one_hop,
            ),
            (
                "coredns_forward_max_concurrent_rejects_total",
                "Counter of the number of queries rejected because the concurrent queries were at maximum.",
                &self.rejected,
            ),
            (
                "coredns_forward_healthcheck_broken_total",
                "Counter of the number of complete failures of the healthchecks.",
                &self.all_out,
            ),
            (
                "gantry_dns_upstream_failures_total",
                "Questions that an upstream nameserver did not answer in time.",
                &self.upstream_failures,
            ),
            (
                "gantry_dns_merged_total",
                "Questions that were answered by one that was already in flight.",
                &self.merged,
            ),
            (
                "gantry_dns_recovered_total",
                "Queries and connections taken over from an agent that had ended.",
                &self.recovered,
            ),
        ];
        for (name, help, count) in single {
            text.family(name, "counter", help);
            text.line(name, &server, count.get() as f64);
        }
        text.0
    }

    fn render_durations(&self, zones: &[String; 2], text: &mut Text) {
        let name = "coredns_dns_request_duration_seconds";
        text.family(
            name,
            "histogram",
            "Histogram of the time (in seconds) each request took per zone.",
        );
        for (index, zone) in zones.iter().enumerate() {
            let mut sum = 0;
            for (count, bound) in self.durations[index].iter().zip(BUCKETS_US) {
                sum += count.get();
                let labels = format!("{zone},le=\"{}\"", bound as f64 / 1e6);
                text.line(&format!("{name}_bucket"), &labels, sum as f64);
            }
            sum += self.durations[index][BUCKETS_US.len()].get();
            let labels = format!("{zone},le=\"+Inf\"");
            text.line(&format!("{name}_bucket"), &labels, sum as f64);
            let total_us = self.duration_us[index].load(Ordering::Relaxed);
            text.line(&format!("{name}_sum"), zone, total_us as f64 / 1e6);
            text.line(&format!("{name}_count"), zone, sum as f64);
        }
    }
}

struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &str, value: f64) {
        let _ = writeln!(self.0, "{name}{{{labels}}} {value}");
    }

    /// Left out while it is zero: most types and codes are never seen.
    fn counted(&mut self, name: &str, labels: &str, value: u64) {
        if value > 0 {
            self.line(name, labels, value as f64);
        }
    }
}
