//! When the node is short of something: thresholds, and conditions that do not flap. Pure.
//!
//! ```text
//!            a threshold is met                         none met for the transition period
//!  False ─────────────────────────► True ──────────────────────────────────────────────────► False
//!                                    └─ met again: the period starts anew
//! ```
//! A percentage of a large disk is still a lot of room: a disk threshold given in percent is only
//! met when less than [`DISK_ENOUGH_BYTES`] are free as well. One given in bytes is taken literally.
//!
//! Source: the kubelet's `pkg/kubelet/eviction` (signals, hard thresholds, transition period).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use gantry_api::quantity::Quantity;

/// So much free disk is never too little, whatever share of the disk it is.
pub const DISK_ENOUGH_BYTES: u64 = 8 << 30;
/// The kubelet's hard eviction thresholds.
pub const DEFAULT: &str = "memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%,\
                           imagefs.available<15%,pid.available<10%";
/// Tasks that stood still for lack of memory, percent of the last 10 s: the machine thrashes.
pub const STALL_PERCENT: u64 = 20;
/// Stalls count only with less than this share of memory available: a pod that thrashes at its own
/// limit is no reason to evict another.
const STALL_AVAILABLE_PERCENT: u64 = 10;

/// What is looked at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Signal {
    /// Memory of the machine that can be had without swapping.
    Memory,
    /// Memory that pods may still use below the limit of all pods.
    PodsMemory,
    /// The file system of `/var/lib/gantry`: volumes, writable layers.
    Nodefs,
    /// Its inodes.
    NodefsInodes,
    /// The file system of images.
    Imagefs,
    /// Process ids.
    Pids,
}

impl Signal {
    const ALL: [Self; 6] = [
        Self::Memory,
        Self::PodsMemory,
        Self::Nodefs,
        Self::NodefsInodes,
        Self::Imagefs,
        Self::Pids,
    ];

    /// The kubelet's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory.available",
            Self::PodsMemory => "allocatableMemory.available",
            Self::Nodefs => "nodefs.available",
            Self::NodefsInodes => "nodefs.inodesFree",
            Self::Imagefs => "imagefs.available",
            Self::Pids => "pid.available",
        }
    }

    /// What runs short.
    pub fn resource(self) -> Resource {
        match self {
            Self::Memory | Self::PodsMemory => Resource::Memory,
            Self::Nodefs | Self::NodefsInodes | Self::Imagefs => Resource::Disk,
            Self::Pids => Resource::Pids,
        }
    }
}

/// What a node condition speaks about.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Resource {
    /// MemoryPressure
    Memory,
    /// DiskPressure
    Disk,
    /// PIDPressure
    Pids,
}

impl Resource {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Memory, Self::Disk, Self::Pids];

    /// The node condition's type.
    pub fn condition(self) -> &'static str {
        match self {
            Self::Memory => "MemoryPressure",
            Self::Disk => "DiskPressure",
            Self::Pids => "PIDPressure",
        }
    }

    /// The resource's name in eviction messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "ephemeral-storage",
            Self::Pids => "pids",
        }
    }
}

/// A part of the capacity, or a number of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Amount {
    /// Hundredths of the capacity.
    Percent(u64),
    /// Bytes, inodes or process ids.
    Absolute(u64),
}

/// One reading.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reading {
    /// All there is.
    pub capacity: u64,
    /// What is left.
    pub available: u64,
}

/// All readings of one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Readings {
    /// Signals that could be read.
    pub signals: BTreeMap<Signal, Reading>,
    /// PSI "full" of memory over 10 s, percent, for the whole machine.
    pub memory_stall_percent: u64,
}

/// The hard thresholds, by signal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Thresholds(pub BTreeMap<Signal, Amount>);

impl std::str::FromStr for Thresholds {
    type Err = String;

    /// `memory.available<100Mi,nodefs.available<10%`; signals that are left out evict nobody.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut thresholds = BTreeMap::new();
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (name, amount) = part
                .split_once('<')
                .ok_or_else(|| format!("{part:?}: want signal<amount"))?;
            let signal = Signal::ALL.into_iter().find(|s| s.as_str() == name.trim());
            let signal = signal.ok_or_else(|| {
                let names = Signal::ALL.map(Signal::as_str).join(", ");
                format!("{name:?} is no eviction signal; want one of {names}")
            })?;
            thresholds.insert(signal, parse_amount(amount.trim())?);
        }
        // What pods may use in all is guarded like the machine's own memory.
        if let Some(memory) = thresholds.get(&Signal::Memory).copied() {
            thresholds.entry(Signal::PodsMemory).or_insert(memory);
        }
        Ok(Self(thresholds))
    }
}

fn parse_amount(text: &str) -> Result<Amount, String> {
    if let Some(percent) = text.strip_suffix('%') {
        let percent = percent.parse::<u64>().ok().filter(|p| *p <= 100);
        return percent
            .map(Amount::Percent)
            .ok_or_else(|| format!("{text:?}: want 0% to 100%"));
    }
    let quantity = Quantity::parse(text).map_err(|error| format!("{text:?}: {error}"))?;
    let units = u64::try_from(quantity.units()).map_err(|_| format!("{text:?}: is negative"))?;
    Ok(Amount::Absolute(units))
}

impl Amount {
    /// In units of the reading.
    pub fn of(self, capacity: u64) -> u64 {
        match self {
            Self::Percent(percent) => capacity / 100 * percent,
            Self::Absolute(units) => units,
        }
    }
}

/// A threshold that is met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shortage {
    /// Which signal.
    pub signal: Signal,
    /// The threshold in units of the signal.
    pub threshold: u64,
    /// What was read.
    pub available: u64,
    /// PSI was the reason: percent of time in which all tasks stood still.
    pub stall_percent: Option<u64>,
}

impl Thresholds {
    /// What the machine is short of now, at most one per signal.
    pub fn shortages(&self, readings: &Readings) -> Vec<Shortage> {
        let mut found = Vec::new();
        for (signal, amount) in &self.0 {
            let Some(reading) = readings.signals.get(signal).filter(|r| r.capacity > 0) else {
                continue;
            };
            let threshold = amount.of(reading.capacity);
            let enough = matches!(amount, Amount::Percent(_))
                && matches!(signal, Signal::Nodefs | Signal::Imagefs)
                && reading.available >= DISK_ENOUGH_BYTES;
            let stalls = *signal == Signal::Memory
                && readings.memory_stall_percent >= STALL_PERCENT
                && reading.available < reading.capacity / 100 * STALL_AVAILABLE_PERCENT;
            let short = reading.available < threshold && !enough;
            if short || stalls {
                found.push(Shortage {
                    signal: *signal,
                    threshold,
                    available: reading.available,
                    stall_percent: (!short).then_some(readings.memory_stall_percent),
                });
            }
        }
        found
    }
}

/// The node's pressure conditions over time.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Pressures {
    /// When a threshold of the resource was met last.
    last_met: BTreeMap<Resource, Duration>,
}

impl Pressures {
    /// Takes what is short at `now` (a monotonic clock) and returns the conditions that are True.
    pub fn observe(
        &mut self,
        shortages: &[Shortage],
        now: Duration,
        transition: Duration,
    ) -> BTreeSet<Resource> {
        for shortage in shortages {
            self.last_met.insert(shortage.signal.resource(), now);
        }
        self.last_met
            .retain(|_, met| now.saturating_sub(*met) < transition || *met == now);
        self.last_met.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn read(signal: Signal, capacity: u64, available: u64) -> Readings {
        let reading = Reading {
            capacity,
            available,
        };
        Readings {
            signals: [(signal, reading)].into(),
            memory_stall_percent: 0,
        }
    }

    fn defaults() -> Thresholds {
        DEFAULT.parse().unwrap()
    }

    #[test]
    fn the_kubelets_defaults_parse() {
        let thresholds = defaults();
        assert_eq!(thresholds.0[&Signal::Memory], Amount::Absolute(100 << 20));
        assert_eq!(
            thresholds.0[&Signal::PodsMemory],
            Amount::Absolute(100 << 20)
        );
        assert_eq!(thresholds.0[&Signal::Nodefs], Amount::Percent(10));
        for bad in [
            "memory<1Mi",
            "memory.available=1",
            "pid.available<101%",
            "a<b",
        ] {
            assert!(bad.parse::<Thresholds>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_large_disk_that_is_nearly_full_has_room_all_the_same() {
        let roomy = read(Signal::Nodefs, 1000 * GIB, 20 * GIB);
        assert!(defaults().shortages(&roomy).is_empty());
        let full = read(Signal::Nodefs, 1000 * GIB, 7 * GIB);
        assert_eq!(defaults().shortages(&full).len(), 1);
        let small = read(Signal::Nodefs, 20 * GIB, 3 * GIB);
        assert!(defaults().shortages(&small).is_empty());
        let literal: Thresholds = "nodefs.available<30Gi".parse().unwrap();
        assert_eq!(literal.shortages(&roomy).len(), 1);
    }

    #[test]
    fn stalls_count_only_where_memory_is_scarce() {
        let mut readings = read(Signal::Memory, 10 * GIB, GIB / 2);
        assert!(defaults().shortages(&readings).is_empty());
        readings.memory_stall_percent = 30;
        let short = defaults().shortages(&readings);
        assert_eq!(short[0].stall_percent, Some(30));
        let mut plenty = read(Signal::Memory, 10 * GIB, 5 * GIB);
        plenty.memory_stall_percent = 90;
        assert!(defaults().shortages(&plenty).is_empty());
    }

    proptest! {
        #[test]
        fn a_condition_turns_false_only_after_a_quiet_period(
            history in prop::collection::vec((0u64..10, any::<bool>()), 1..60),
        ) {
            let transition = Duration::from_secs(20);
            let thresholds: Thresholds = "pid.available<10%".parse().unwrap();
            let (mut pressures, mut now) = (Pressures::default(), Duration::ZERO);
            let mut last_short: Option<Duration> = None;
            for (step, short) in history {
                now += Duration::from_secs(step);
                let readings = read(Signal::Pids, 1000, if short { 50 } else { 500 });
                let shortages = thresholds.shortages(&readings);
                prop_assert_eq!(!shortages.is_empty(), short);
                let active = pressures.observe(&shortages, now, transition);
                if short { last_short = Some(now); }
                let want = last_short.is_some_and(|at| at == now || now - at < transition);
                prop_assert_eq!(active.contains(&Resource::Pids), want);
            }
        }
    }
}
