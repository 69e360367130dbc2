//! From the samples of all rounds to figures, ratios and targets: pure.
//!
//! A figure is the median over rounds; a ratio is the median over rounds of what was measured side by
//! side in the same round, so that a round which a neighbour has spoiled counts once and alike for all.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::super::report::{Bound, Target, median, number};
use super::model::Size;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Measure {
    ConnectP50,
    ConnectP99,
    Crr,
    Rr,
    RrP50,
    Stream,
    Cpu,
    ChangeP50,
    ChangeP99,
    Load,
    Memory,
}

impl Measure {
    pub(super) const ALL: [Self; 11] = [
        Self::ConnectP50,
        Self::ConnectP99,
        Self::Crr,
        Self::Rr,
        Self::RrP50,
        Self::Stream,
        Self::Cpu,
        Self::ChangeP50,
        Self::ChangeP99,
        Self::Load,
        Self::Memory,
    ];

    /// Its name in files.
    pub(super) fn key(self) -> &'static str {
        match self {
            Self::ConnectP50 => "connect_p50",
            Self::ConnectP99 => "connect_p99",
            Self::Crr => "crr",
            Self::Rr => "rr",
            Self::RrP50 => "rr_p50",
            Self::Stream => "stream",
            Self::Cpu => "cpu",
            Self::ChangeP50 => "change_p50",
            Self::ChangeP99 => "change_p99",
            Self::Load => "load",
            Self::Memory => "memory",
        }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::ConnectP50 => "connect(), p50",
            Self::ConnectP99 => "connect(), p99",
            Self::Crr => "connect, request, response, close",
            Self::Rr => "requests on an open connection",
            Self::RrP50 => "request on an open connection, p50",
            Self::Stream => "one stream",
            Self::Cpu => "CPU of a connection",
            Self::ChangeP50 => "first connection after an endpoint change, p50",
            Self::ChangeP99 => "first connection after an endpoint change, p99",
            Self::Load => "loading everything",
            Self::Memory => "kernel memory",
        }
    }

    pub(super) fn unit(self) -> &'static str {
        match self {
            Self::ConnectP50 | Self::ConnectP99 | Self::RrP50 | Self::Cpu => "us",
            Self::Crr | Self::Rr => "per s",
            Self::Stream => "Gbit/s",
            Self::ChangeP50 | Self::ChangeP99 | Self::Load => "ms",
            Self::Memory => "MiB",
        }
    }

    /// More of it is better.
    pub(super) fn is_rate(self) -> bool {
        matches!(self, Self::Crr | Self::Rr | Self::Stream)
    }

    /// Compared with the plain bridge; else with Gantry.
    pub(super) fn is_of_traffic(self) -> bool {
        self < Self::ChangeP50
    }

    /// How it is measured, in words.
    pub(super) fn how(self) -> &'static str {
        match self {
            Self::ConnectP50 | Self::ConnectP99 => {
                "The connect() of each connection of `connect, request, response, close`: client and server on one \
                 processor, so that it is what its instructions cost and no wake-up of another processor."
            }
            Self::Crr => {
                "Connect, 64 bytes there, 64 bytes back, the server closes, the client resets; one after the other, \
                 both on one processor."
            }
            Self::Rr | Self::RrP50 => {
                "64 bytes there and 64 back on one connection that stays open, both on one processor."
            }
            Self::Stream => {
                "As many bytes as one connection takes, until the server has read all; client and server on two \
                 processors, where there are two."
            }
            Self::Cpu => {
                "What the kernel's scheduler counts for client and servers (/proc/PID/schedstat) by connection of \
                 `connect, request, response, close`. Packets are handled while one of them runs, and so are in \
                 it; kernel threads are not."
            }
            Self::ChangeP50 | Self::ChangeP99 => {
                "All endpoints of the measured Service are replaced. From the moment when the change is handed to the \
                 layout (Gantry: the view, to plan and apply; iptables-restore --noflush and nft -f: the process is \
                 started, its text is ready) until a client that connects without pause is answered by a new \
                 endpoint."
            }
            Self::Load => {
                "All Services at once, into empty tables. Gantry: plan and apply; the others: the process, from its \
                 start to its end. Above 2,000 Services iptables-nft is spared --noflush, which kube-proxy uses and \
                 which then takes minutes."
            }
            Self::Memory => {
                "Growth of Slab, VmallocUsed and Percpu in /proc/meminfo by loading; Gantry's with its programs and \
                 maps, whose arrays are of fixed size. Of the whole machine, so others' noise is in it."
            }
        }
    }
}

/// Who is measured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Case {
    Pair,
    Direct,
    DirectAgain,
    Routed,
    Gantry,
    GantryPod,
    GantrySocket,
    GantryPacket,
    GantryNodePort,
    IptablesNft,
    IptablesNftNodePort,
    IptablesLegacy,
    IptablesLegacyNodePort,
    Nftables,
    NftablesNodePort,
}

impl Case {
    pub(super) const ALL: [Self; 15] = [
        Self::Pair,
        Self::Direct,
        Self::DirectAgain,
        Self::Routed,
        Self::Gantry,
        Self::GantryPod,
        Self::GantrySocket,
        Self::GantryPacket,
        Self::GantryNodePort,
        Self::IptablesNft,
        Self::IptablesNftNodePort,
        Self::IptablesLegacy,
        Self::IptablesLegacyNodePort,
        Self::Nftables,
        Self::NftablesNodePort,
    ];

    /// In tables: at most 24 characters.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Pair => "bare veth pair",
            Self::Direct => "direct (plain bridge)",
            Self::DirectAgain => "direct again (noise)",
            Self::Routed => "direct from outside",
            Self::Gantry => "Gantry",
            Self::GantryPod => "Gantry, pod IP",
            Self::GantrySocket => "Gantry, socket",
            Self::GantryPacket => "Gantry, packets",
            Self::GantryNodePort => "Gantry, node port",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesNftNodePort => "iptables-nft, node port",
            Self::IptablesLegacy => "iptables-legacy",
            Self::IptablesLegacyNodePort => "iptables-legacy, n. port",
            Self::Nftables => "nftables",
            Self::NftablesNodePort => "nftables, node port",
        }
    }

    pub(super) fn key(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::Direct => "direct",
            Self::DirectAgain => "direct_again",
            Self::Routed => "routed",
            Self::Gantry => "gantry",
            Self::GantryPod => "gantry_pod",
            Self::GantrySocket => "gantry_socket",
            Self::GantryPacket => "gantry_packet",
            Self::GantryNodePort => "gantry_node_port",
            Self::IptablesNft => "iptables_nft",
            Self::IptablesNftNodePort => "iptables_nft_node_port",
            Self::IptablesLegacy => "iptables_legacy",
            Self::IptablesLegacyNodePort => "iptables_legacy_node_port",
            Self::Nftables => "nftables",
            Self::NftablesNodePort => "nftables_node_port",
        }
    }

    /// What it is, for a reader who sees it for the first time.
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Pair => "two network namespaces and nothing between them but a veth pair",
            Self::Direct => {
                "from a pod to the addresses of the Service's pods in turn, over a Linux bridge without any rule: the floor"
            }
            Self::DirectAgain => {
                "the same again at the end of each turn: how much of a difference is noise"
            }
            Self::Routed => "from outside to a pod's address, routed by a node without any rule",
            Self::Gantry => "Gantry's data plane as a whole",
            Self::GantryPod => "from pod to pod by address, with Gantry's programs on both",
            Self::GantrySocket => "a cluster IP, translated at connect()",
            Self::GantryPacket => {
                "a cluster IP, from a client whose cgroup has no socket programs: packets are translated"
            }
            Self::GantryNodePort => "the node's port, from outside",
            Self::IptablesNft => {
                "a cluster IP by kube-proxy's rules, loaded by iptables-nft, Debian's default"
            }
            Self::IptablesNftNodePort => "the node's port, from outside, by the same",
            Self::IptablesLegacy => {
                "the same rules in the kernel's older tables, by iptables-legacy"
            }
            Self::IptablesLegacyNodePort => "the node's port, from outside, by the same",
            Self::Nftables => "a cluster IP by kube-proxy's nftables mode",
            Self::NftablesNodePort => "the node's port, from outside, by the same",
        }
    }

    /// Has the port of a node in it, or its floor.
    pub(super) fn is_outside(self) -> bool {
        matches!(
            self,
            Self::Routed
                | Self::GantryNodePort
                | Self::IptablesNftNodePort
                | Self::IptablesLegacyNodePort
                | Self::NftablesNodePort
        )
    }
}

/// That a layout really spreads connections.
#[derive(Clone, Debug)]
pub(super) struct Balance {
    pub size: Size,
    pub case: Case,
    pub endpoints: usize,
    pub reached: usize,
    pub connections: usize,
    pub chi_square: f64,
    pub chi_square_max: f64,
}

impl Balance {
    /// * `counts` – of the endpoints that answered.
    pub(super) fn of(size: Size, case: Case, counts: &[f64]) -> Self {
        let endpoints = size.endpoints;
        let connections: f64 = counts.iter().sum();
        let expected = connections / endpoints as f64;
        let of_reached: f64 = counts.iter().map(|n| (n - expected).powi(2)).sum();
        let missing = endpoints.saturating_sub(counts.len()) as f64;
        let dispersion = match case {
            Case::GantryNodePort => 1.0 + 2.0 * connections / CLIENT_PORT_COUNT,
            _ => 1.0,
        };
        Self {
            size,
            case,
            endpoints,
            reached: counts.len(),
            connections: connections as usize,
            chi_square: of_reached / expected + missing * expected,
            chi_square_max: chi_square_max(endpoints.saturating_sub(1) as f64) * dispersion,
        }
    }

    pub(super) fn is_even(&self) -> bool {
        self.reached == self.endpoints && self.chi_square <= self.chi_square_max
    }
}

/// Of those that Linux picks for connect(): every other one of its range. Clients outside are spread by
/// a hash, the same on every node, so a client's port always leads to the same endpoint, and a client
/// that connects more often than it has ports makes fewer choices than connections.
const CLIENT_PORT_COUNT: f64 = 14_000.0;

/// What an even choice exceeds once in some three million times (five standard deviations), by the
/// approximation of Wilson and Hilferty.
fn chi_square_max(freedom: f64) -> f64 {
    let spread = 2.0 / (9.0 * freedom);
    freedom * (1.0 - spread + 5.0 * spread.sqrt()).powi(3)
}

/// Everything that was found.
#[derive(Default)]
pub(super) struct Figures {
    /// In the order of running.
    pub sizes: Vec<Size>,
    pub samples: BTreeMap<(Measure, Case, Size), Vec<f64>>,
    pub balance: Vec<Balance>,
    /// What is measured once: name, unit, value, how.
    pub singles: Vec<(String, &'static str, f64, &'static str)>,
    pub targets: Vec<Target>,
    /// Of the machine and the programs.
    pub facts: Vec<(&'static str, String)>,
    /// What was not measured, and why.
    pub skipped: Vec<String>,
}

impl Figures {
    /// One round's value.
    pub(super) fn add(&mut self, measure: Measure, case: Case, size: Size, value: f64) {
        let samples = self.samples.entry((measure, case, size)).or_default();
        samples.push(value);
    }

    fn rounds(&self, measure: Measure, case: Case, size: Size) -> &[f64] {
        let samples = self.samples.get(&(measure, case, size));
        samples.map_or(&[], Vec::as_slice)
    }

    /// The median over rounds.
    pub(super) fn value(&self, measure: Measure, case: Case, size: Size) -> Option<f64> {
        median(self.rounds(measure, case, size))
    }

    /// Beside another case of the same size, round by round.
    pub(super) fn ratio_to(
        &self,
        measure: Measure,
        case: Case,
        by: Case,
        size: Size,
    ) -> Option<f64> {
        let of = self.rounds(measure, case, size);
        let by = self.rounds(measure, by, size);
        let each: Vec<f64> = of.iter().zip(by).map(|(a, b)| a / b).collect();
        median(&each)
    }

    /// Beside what the measure is compared with: traffic with the plain bridge, the rest with Gantry.
    pub(super) fn ratio(&self, measure: Measure, case: Case, size: Size) -> Option<f64> {
        if measure.is_of_traffic() {
            return self.ratio_to(measure, case, Case::Direct, size);
        }
        let gantry = self.value(measure, Case::Gantry, size)?;
        Some(self.value(measure, case, size)? / gantry)
    }

    /// The cases that a measure has.
    pub(super) fn cases(&self, measure: Measure) -> Vec<Case> {
        let has = |case: &Case| {
            let sizes = self.sizes.iter();
            sizes
                .map(|size| self.rounds(measure, *case, *size).len())
                .any(|rounds| rounds > 0)
        };
        Case::ALL.into_iter().filter(has).collect()
    }

    pub(super) fn target(&mut self, what: String, bound: Bound, limit: f64, got: Option<f64>) {
        let got = got.unwrap_or(f64::NAN);
        self.targets.push(Target::new(&what, bound, limit, got));
    }

    /// The promises of the product about these figures. Those about layouts that were not measured are
    /// left out.
    pub(super) fn judge(&mut self) {
        for size in self.sizes.clone() {
            let label = size.label();
            for (case, measure, bound, limit) in [
                (Case::GantrySocket, Measure::ConnectP50, Bound::Max, 1.02),
                (Case::GantrySocket, Measure::Crr, Bound::Min, 1.0),
                (Case::GantrySocket, Measure::Stream, Bound::Min, 0.99),
                (Case::GantryPacket, Measure::ConnectP50, Bound::Max, 1.08),
                (Case::GantryNodePort, Measure::ConnectP50, Bound::Max, 1.08),
            ] {
                let Some(ratio) = self.ratio(measure, case, size) else {
                    continue;
                };
                let what = format!("{} / direct, {}, {label}", case.label(), measure.title());
                self.target(what, bound, limit, Some(ratio));
            }
            let pair = self.ratio_to(Measure::RrP50, Case::GantryPod, Case::Pair, size);
            if let Some(ratio) = pair {
                let what = format!("pod to pod / bare veth pair, request p50, {label}");
                self.target(what, Bound::Max, 1.06, Some(ratio));
            }
            let is_ordinary = size.endpoints == Size::of(1).endpoints;
            let change = self.value(Measure::ChangeP99, Case::Gantry, size);
            if let Some(ms) = change.filter(|_| is_ordinary) {
                let what = format!("endpoint change, p99, ms, {label}");
                self.target(what, Bound::Max, 20.0, Some(ms));
            }
        }
        let of = |size: &Size| self.ratio(Measure::ConnectP50, Case::GantrySocket, *size);
        let ordinary = |size: &&Size| size.endpoints == Size::of(1).endpoints;
        let sizes: Vec<Size> = self.sizes.iter().filter(ordinary).copied().collect();
        if let [first, .., last] = sizes.as_slice()
            && let (Some(a), Some(b)) = (of(first), of(last))
        {
            let what = format!(
                "connect() with {} services / with {}",
                last.label(),
                first.label()
            );
            self.target(what, Bound::Max, 1.02, Some(b / a));
        }
    }

    /// The document of `target/bench/services.json`.
    pub(super) fn to_json(&self) -> Value {
        let mut measures = Map::new();
        for measure in Measure::ALL {
            let mut cases = Map::new();
            for case in self.cases(measure) {
                let mut sizes = Map::new();
                for size in &self.sizes {
                    let rounds = self.rounds(measure, case, *size);
                    let Some(value) = median(rounds) else {
                        continue;
                    };
                    let each: Vec<Value> = rounds.iter().map(|value| number(*value)).collect();
                    let ratio = self.ratio(measure, case, *size).unwrap_or(f64::NAN);
                    let figures = json!({
                        "value": number(value), "ratio": number(ratio), "rounds": each,
                    });
                    sizes.insert(size.label(), figures);
                }
                cases.insert(case.key().into(), Value::Object(sizes));
            }
            if !cases.is_empty() {
                measures.insert(
                    measure.key().into(),
                    json!({
                        "title": measure.title(), "unit": measure.unit(), "how": measure.how(), "cases": cases,
                    }),
                );
            }
        }
        let balance: Vec<Value> = self.balance.iter().map(Balance::to_json).collect();
        let singles = self.singles.iter().map(|(name, unit, value, how)| {
            let single = json!({"unit": unit, "value": number(*value), "how": how});
            (name.clone(), single)
        });
        let facts = self
            .facts
            .iter()
            .map(|(name, value)| ((*name).to_owned(), json!(value)));
        json!({
            "bench": "services",
            "sizes": self.sizes.iter().map(|size| size.label()).collect::<Vec<_>>(),
            "facts": facts.collect::<Map<_, _>>(),
            "measures": measures,
            "singles": singles.collect::<Map<_, _>>(),
            "balance": balance,
            "targets": self.targets.iter().map(Target::to_json).collect::<Vec<_>>(),
            "skipped": self.skipped,
        })
    }
}

impl Balance {
    fn to_json(&self) -> Value {
        json!({
            "size": self.size.label(), "case": self.case.key(),
            "endpoints": self.endpoints, "reached": self.reached, "connections": self.connections,
            "chi_square": number(self.chi_square), "chi_square_max": number(self.chi_square_max),
        })
    }
}

#[cfg(test)]
#[path = "figures_tests.rs"]
mod tests;
