//! The agent's flags about resources, and what they mean on this machine.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use gantry_cni::config::PodLink;
use gantry_cni::tunnel::PORT_DEFAULT;
use ipnet::IpNet;

use super::reservation::{Capacity, Reservation, default_agent, default_system};
use crate::cgroups::limits::{POD_PIDS_MAX, Policy};
use crate::dataplane::XdpMode;
use crate::feed::node_info::PODS_MAX_DEFAULT;
use crate::network::masquerade::{Masquerade, NEVER_COUNT_MAX};
use crate::network::routes::OwnKey;
use crate::network::{NetworkConfig, Routing, RoutingConfig};
use crate::pressure;
use crate::pressure::thresholds::{self, Signal, Thresholds};
use crate::shutdown::plan::Periods;

/// Flags about resources.
#[derive(clap::Args, Clone, Debug)]
pub struct ResourceFlags {
    /// Kept for the system's own processes: cpu=100m,memory=200Mi,ephemeral-storage=1Gi,pid=1000
    /// [default: computed from the machine]
    #[arg(long, value_name = "AMOUNTS")]
    pub system_reserved: Option<Reservation>,
    /// Kept for the agent and the pods' shims, written as above [default: computed]
    #[arg(long, value_name = "AMOUNTS", visible_alias = "kube-reserved")]
    pub agent_reserved: Option<Reservation>,
    /// Pods on this node at most: 1000 on a bridge, 4000 with --pod-link routed
    #[arg(long, value_name = "COUNT", default_value_t = PODS_MAX_DEFAULT)]
    pub max_pods: u32,
    /// Processes and threads of one pod at most; -1: no limit
    #[arg(long, value_name = "COUNT", default_value_t = POD_PIDS_MAX as i64, allow_hyphen_values = true)]
    pub pod_max_pids: i64,
    /// static: a Guaranteed container with whole CPUs gets them for itself
    #[arg(long, value_name = "POLICY", default_value = "none", value_parser = ["none", "static"])]
    pub cpu_manager_policy: String,
    /// Evict pods when one of these is met
    #[arg(long, value_name = "THRESHOLDS", default_value = thresholds::DEFAULT)]
    pub eviction_hard: Thresholds,
    /// How long a pressure condition stays after its threshold was met last
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    pub eviction_pressure_transition_period: Duration,
    /// Slow a container down from this part of the way between its memory request and its limit
    /// (memory.high, cgroup v2); 0: never, it is killed at its limit
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=100))]
    pub memory_throttling_percent: u64,
    /// How long pods have when the machine goes down (gantry-agent shutdown); 0s: they are not ended
    /// in order
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub shutdown_grace_period: Duration,
    /// The last part of it, for critical pods alone
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    pub shutdown_grace_period_critical_pods: Duration,
}

/// Flags about the pods' network.
#[derive(clap::Args, Clone, Debug)]
pub struct NetworkFlags {
    /// Pods reach addresses outside of the cluster from this node's own address
    #[arg(
        long, value_name = "BOOL", default_value_t = true, default_missing_value = "true",
        num_args = 0..=1, require_equals = true, action = clap::ArgAction::Set
    )]
    pub masquerade: bool,
    /// Networks that know the way to pods and are sent the pods' own addresses, besides the cluster's
    /// pods, nodes and Services
    #[arg(long, value_name = "CIDRS", value_delimiter = ',')]
    pub non_masquerade_cidrs: Vec<IpNet>,
    /// Services for clients outside: where the node's interfaces look at frames first
    #[arg(long, value_name = "WHERE", value_enum, default_value_t)]
    pub xdp: XdpMode,
    /// Packets between pods and other machines go past this node's IP stack, and its netfilter rules do not
    /// see them
    #[arg(
        long, value_name = "BOOL", default_value_t = true, default_missing_value = "true",
        num_args = 0..=1, require_equals = true, action = clap::ArgAction::Set
    )]
    pub fast_path: bool,
    /// How new pods are attached: bridge (ports of one), or routed (no bridge: a route to each address,
    /// for more than 1000 pods)
    #[arg(long, value_name = "HOW", default_value_t)]
    pub pod_link: PodLink,
    /// How the pods of other nodes are reached; the same on all nodes
    #[arg(long, value_name = "WAY", value_enum, default_value_t)]
    pub routing: Routing,
    /// UDP port of the tunnel between nodes, the same on all nodes
    #[arg(long, value_name = "PORT", default_value_t = PORT_DEFAULT, value_parser = clap::value_parser!(u16).range(1..))]
    pub vxlan_port: u16,
    /// UDP port of WireGuard, the same on all nodes
    #[arg(long, value_name = "PORT", default_value_t = gantry_cni::wireguard::PORT_DEFAULT, value_parser = clap::value_parser!(u16).range(1..))]
    pub wireguard_port: u16,
}

impl NetworkFlags {
    /// What the routes to other nodes are made by.
    ///
    /// * `wireguard` – see [`Self::wireguard`].
    pub fn routing(
        &self,
        node: &str,
        addresses: &[IpAddr],
        wireguard: Option<Result<OwnKey, String>>,
    ) -> RoutingConfig {
        RoutingConfig {
            wireguard,
            node: node.into(),
            addresses: addresses.to_vec(),
            routing: self.routing,
            port: self.vxlan_port,
            conf_dir: NetworkConfig::standard(Vec::new()).conf_dir,
        }
    }

    /// This node's side of WireGuard, where it is wanted, or why it has none.
    pub async fn wireguard(&self, lib: &Path) -> Option<Result<OwnKey, String>> {
        match self.routing {
            Routing::Wireguard => Some(OwnKey::open(lib, self.wireguard_port).await),
            _ => None,
        }
    }

    /// What the data plane is told.
    ///
    /// # Errors
    /// In words: what a flag says that it must not.
    pub fn masquerade(&self, standalone: IpNet) -> Result<Option<Masquerade>, String> {
        let count = self.non_masquerade_cidrs.len();
        if count > NEVER_COUNT_MAX {
            return Err(format!(
                "--non-masquerade-cidrs: {count} prefixes, and {NEVER_COUNT_MAX} at most; name larger ones"
            ));
        }
        Ok(self.masquerade.then(|| Masquerade {
            never: self.non_masquerade_cidrs.clone(),
            standalone: Some(standalone),
        }))
    }
}

/// `90s`, `5m`, `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?}: want a number and s, m or h, for example 5m");
    let split = text.len().checked_sub(1).ok_or_else(wrong)?;
    let (number, unit) = text.split_at_checked(split).ok_or_else(wrong)?;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(wrong()),
    };
    Ok(Duration::from_secs(number.saturating_mul(factor)))
}

impl ResourceFlags {
    /// What system and agent keep of this machine.
    pub fn reserved(&self, capacity: &Capacity) -> Reservation {
        let system = self.system_reserved;
        let agent = self.agent_reserved;
        system
            .unwrap_or_else(|| default_system(capacity))
            .plus(agent.unwrap_or_else(|| default_agent(capacity)))
    }

    /// Memory and disk that pods may ask for, but that eviction defends: allocatable leaves it out.
    pub fn eviction_room(&self, capacity: &Capacity, disk_bytes: u64) -> Reservation {
        let of = |signal: Signal, whole: u64| {
            let amount = self.eviction_hard.0.get(&signal);
            let room = amount.map_or(0, |amount| amount.of(whole));
            // A large disk's share is not needed: see DISK_ENOUGH_BYTES.
            match signal {
                Signal::Nodefs => room.min(thresholds::DISK_ENOUGH_BYTES),
                _ => room,
            }
        };
        Reservation {
            memory_bytes: of(Signal::Memory, capacity.memory_bytes),
            disk_bytes: of(Signal::Nodefs, disk_bytes),
            ..Reservation::default()
        }
    }

    /// What all pods are held to.
    pub fn policy(&self, capacity: &Capacity, pid_max: u64) -> Policy {
        let reserved = self.reserved(capacity);
        Policy {
            pod_pids_max: u64::try_from(self.pod_max_pids).ok().filter(|max| *max > 0),
            memory_throttling_percent: self.memory_throttling_percent,
            memory_allocatable_bytes: capacity.memory_without(&reserved),
            cpu_allocatable_millicores: (capacity.cpu_count * 1000)
                .saturating_sub(reserved.cpu_millicores),
            exclusive_cpus: self.cpu_manager_policy == "static",
            reserved_cpu_count: usize::try_from(reserved.cpu_millicores.div_ceil(1000))
                .unwrap_or(usize::MAX)
                .max(1),
            pids_allocatable: pid_max.checked_sub(reserved.pids).filter(|pids| *pids > 0),
        }
    }

    /// What pods have when the machine goes down.
    pub fn shutdown(&self) -> Periods {
        Periods {
            all: self.shutdown_grace_period,
            critical: self.shutdown_grace_period_critical_pods,
        }
    }

    /// For the watch over pressure.
    pub fn pressure(&self) -> pressure::Config {
        pressure::Config {
            thresholds: self.eviction_hard.clone(),
            transition: self.eviction_pressure_transition_period,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        flags: ResourceFlags,
    }

    fn parse(words: &str) -> Result<ResourceFlags, String> {
        let words = std::iter::once("agent").chain(words.split_whitespace());
        let line = Line::try_parse_from(words).map_err(|e| e.to_string())?;
        Ok(line.flags)
    }

    const MACHINE: Capacity = Capacity {
        cpu_count: 4,
        memory_bytes: 16 << 30,
        hugepage_bytes: 1 << 30,
        pods: 110,
    };

    #[test]
    fn flags_become_what_the_kernel_holds_pods_to() {
        let flags = parse(
            "--system-reserved cpu=500m,memory=1Gi,pid=100 --kube-reserved memory=1Gi \
             --pod-max-pids 64 --memory-throttling-percent 90",
        )
        .unwrap();
        let policy = flags.policy(&MACHINE, 32_768);
        assert_eq!(policy.memory_allocatable_bytes, 13 << 30);
        assert_eq!(policy.cpu_allocatable_millicores, 3500);
        assert_eq!(policy.pids_allocatable, Some(32_668));
        assert_eq!(policy.pod_pids_max, Some(64));
        let unlimited = parse("--pod-max-pids -1").unwrap();
        assert_eq!(unlimited.policy(&MACHINE, 0).pod_pids_max, None);
        assert_eq!(unlimited.policy(&MACHINE, 0).pids_allocatable, None);
    }

    #[test]
    fn the_eviction_threshold_is_no_room_for_pods() {
        let flags = parse("").unwrap();
        let room = flags.eviction_room(&MACHINE, 20 << 30);
        assert_eq!(
            (room.memory_bytes, room.disk_bytes),
            (100 << 20, (20 << 30) / 100 * 10)
        );
        let large = flags.eviction_room(&MACHINE, 1000 << 30);
        assert_eq!(large.disk_bytes, 8 << 30);
    }

    #[derive(Parser)]
    struct NetworkLine {
        #[command(flatten)]
        flags: NetworkFlags,
    }

    #[test]
    fn pods_are_masqueraded_unless_told_otherwise() {
        let parse = |words: &str| {
            let words = std::iter::once("agent").chain(words.split_whitespace());
            let line = NetworkLine::try_parse_from(words).map_err(|error| error.to_string())?;
            line.flags.masquerade("10.243.255.0/24".parse().unwrap())
        };
        assert!(parse("").unwrap().is_some());
        assert!(parse("--masquerade").unwrap().is_some());
        assert!(parse("--masquerade=false").unwrap().is_none());
        let some = parse("--non-masquerade-cidrs 192.168.0.0/16,fd00::/8").unwrap();
        assert_eq!(some.unwrap().never.len(), 2);
        assert!(parse("--non-masquerade-cidrs 192.168.0.1").is_err());
        let many = vec!["192.0.2.0/24"; NEVER_COUNT_MAX + 1].join(",");
        let words = parse(&format!("--non-masquerade-cidrs {many}")).unwrap_err();
        assert!(words.contains("1024 at most"), "{words}");
    }

    #[test]
    fn nodes_are_reached_as_the_administrator_wants() {
        let parse = |words: &str| {
            let words = std::iter::once("agent").chain(words.split_whitespace());
            let line = NetworkLine::try_parse_from(words).map_err(|error| error.to_string())?;
            Ok::<_, String>(line.flags.routing("here", &[], None))
        };
        let usual = parse("").unwrap();
        assert_eq!((usual.routing, usual.port), (Routing::Auto, 4789));
        let other = parse("--routing vxlan --vxlan-port 8472").unwrap();
        assert_eq!((other.routing, other.port), (Routing::Vxlan, 8472));
        assert_eq!(
            parse("--routing wireguard").unwrap().routing,
            Routing::Wireguard
        );
        assert!(parse("--routing bgp").is_err());
        assert!(parse("--vxlan-port 0").is_err());
    }

    #[test]
    fn pods_are_ports_of_a_bridge_unless_told_otherwise() {
        let parse = |words: &str| {
            let words = std::iter::once("agent").chain(words.split_whitespace());
            let line = NetworkLine::try_parse_from(words).map_err(|error| error.to_string())?;
            Ok::<_, String>(line.flags.pod_link)
        };
        assert_eq!(parse("").unwrap(), PodLink::Bridge);
        assert_eq!(parse("--pod-link routed").unwrap(), PodLink::Routed);
        let words = parse("--pod-link macvlan").unwrap_err();
        assert!(words.contains("want bridge or routed"), "{words}");
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "--system-reserved disk=1",
            "--eviction-hard memory<1",
            "--eviction-pressure-transition-period 5",
            "--memory-throttling-percent 101",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
