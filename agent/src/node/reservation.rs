//! What a node keeps back from its pods: for the system, for the agent, and as the room in which
//! eviction works. Pure.
//!
//! ```text
//! capacity ─ system ─ agent ─ eviction threshold = allocatable   (what the scheduler counts with)
//! capacity ─ system ─ agent                      = limit of /gantry (what the kernel enforces)
//! ```
//! Source: Kubernetes "Reserve Compute Resources for System Daemons". The defaults are our own: the
//! agent and a shim per pod need far less than kubelet and container runtime, so they reserve less.

use gantry_api::quantity::Quantity;

/// Memory that system daemons get by default, and the share of the machine's that comes on top.
const SYSTEM_MEMORY_BYTES: u64 = 100 << 20;
const SYSTEM_MEMORY_PERCENT: u64 = 1;
/// The agent and the control plane's side of it, and each pod's shim.
const AGENT_MEMORY_BYTES: u64 = 64 << 20;
const AGENT_MEMORY_PER_POD_BYTES: u64 = 256 << 10;
/// No default takes more than this share of a small machine.
const DEFAULT_PERCENT_MAX: u64 = 20;
/// CPU of the first core and of each further one, thousandths, for system and for agent.
const SYSTEM_CPU_MILLICORES: (u64, u64) = (40, 10);
const AGENT_CPU_MILLICORES: (u64, u64) = (20, 5);
/// Process ids that stay for the system.
const SYSTEM_PIDS: u64 = 1_000;

/// An amount of each resource.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reservation {
    /// 1000 = one CPU.
    pub cpu_millicores: u64,
    /// Bytes.
    pub memory_bytes: u64,
    /// Bytes of the file system of `/var/lib/gantry`.
    pub disk_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
}

impl Reservation {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            cpu_millicores: self.cpu_millicores.saturating_add(other.cpu_millicores),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_add(other.disk_bytes),
            pids: self.pids.saturating_add(other.pids),
        }
    }
}

impl std::str::FromStr for Reservation {
    type Err = String;

    /// `cpu=100m,memory=200Mi,ephemeral-storage=1Gi,pid=1000`; what is left out is 0.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut reservation = Self::default();
        for part in text.split(',').filter(|part| !part.trim().is_empty()) {
            let (name, amount) = part
                .split_once('=')
                .ok_or_else(|| format!("{part:?}: want name=amount, for example memory=200Mi"))?;
            let quantity =
                Quantity::parse(amount.trim()).map_err(|error| format!("{part:?}: {error}"))?;
            let value = match name.trim() {
                "cpu" => quantity.milli(),
                _ => quantity.units(),
            };
            let value = u64::try_from(value).map_err(|_| format!("{part:?}: is negative"))?;
            match name.trim() {
                "cpu" => reservation.cpu_millicores = value,
                "memory" => reservation.memory_bytes = value,
                "ephemeral-storage" => reservation.disk_bytes = value,
                "pid" => reservation.pids = value,
                other => {
                    return Err(format!(
                        "{other:?}: want cpu, memory, ephemeral-storage or pid"
                    ));
                }
            }
        }
        Ok(reservation)
    }
}

/// What the machine has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Capacity {
    /// Cores that the agent may run on.
    pub cpu_count: u64,
    /// Bytes.
    pub memory_bytes: u64,
    /// Of those, set aside as huge pages: no memory for anything else.
    pub hugepage_bytes: u64,
    /// Pods at most.
    pub pods: u64,
}

impl Capacity {
    /// Bytes that are left for pods, huge pages apart.
    pub fn memory_without(&self, reserved: &Reservation) -> u64 {
        self.memory_bytes
            .saturating_sub(reserved.memory_bytes)
            .saturating_sub(self.hugepage_bytes)
    }
}

fn cpu(capacity: &Capacity, (first, further): (u64, u64)) -> u64 {
    first.saturating_add(further.saturating_mul(capacity.cpu_count.saturating_sub(1)))
}

fn bounded(capacity: &Capacity, bytes: u64) -> u64 {
    bytes.min(capacity.memory_bytes / 100 * DEFAULT_PERCENT_MAX)
}

/// `--system-reserved` when it is not given.
pub fn default_system(capacity: &Capacity) -> Reservation {
    let share = capacity.memory_bytes / 100 * SYSTEM_MEMORY_PERCENT;
    Reservation {
        cpu_millicores: cpu(capacity, SYSTEM_CPU_MILLICORES),
        memory_bytes: bounded(capacity, SYSTEM_MEMORY_BYTES.saturating_add(share)),
        disk_bytes: 0,
        pids: SYSTEM_PIDS,
    }
}

/// `--agent-reserved` when it is not given.
pub fn default_agent(capacity: &Capacity) -> Reservation {
    let shims = AGENT_MEMORY_PER_POD_BYTES.saturating_mul(capacity.pods);
    Reservation {
        cpu_millicores: cpu(capacity, AGENT_CPU_MILLICORES),
        memory_bytes: bounded(capacity, AGENT_MEMORY_BYTES.saturating_add(shims)),
        ..Reservation::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reservations_are_written_like_the_kubelets() {
        let got: Reservation = "cpu=100m, memory=200Mi,ephemeral-storage=1Gi,pid=1k"
            .parse()
            .unwrap();
        let want = Reservation {
            cpu_millicores: 100,
            memory_bytes: 200 << 20,
            disk_bytes: 1 << 30,
            pids: 1000,
        };
        assert_eq!(got, want);
        assert_eq!("".parse(), Ok(Reservation::default()));
        for bad in ["memory", "memory=x", "disk=1Gi", "cpu=-1"] {
            assert!(bad.parse::<Reservation>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn defaults_leave_most_of_any_machine(
            cpu_count in 1u64..512, memory_bytes in 1u64 << 26..1 << 42, pods in 1u64..2000,
        ) {
            let capacity = Capacity { cpu_count, memory_bytes, hugepage_bytes: 0, pods };
            let both = default_system(&capacity).plus(default_agent(&capacity));
            prop_assert!(both.memory_bytes <= memory_bytes / 5 * 2);
            prop_assert!(both.cpu_millicores <= cpu_count * 60);
        }
    }
}
