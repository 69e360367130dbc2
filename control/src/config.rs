//! The command line of `gantry-control`, parsed and checked before anything is opened.

mod etcd;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::controllers::PoolRange;
use crate::controllers::api_service::API_SERVICE_KEY;
use crate::ranges::Ranges;
use crate::restore::RestoreArguments;
use crate::store::seal::KEY_FILE;

pub use etcd::{EtcdArguments, EtcdPlaces};

/// What makes a configuration unusable: exit code 64.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{flag} {value}: {reason}")]
pub struct ConfigError {
    flag: &'static str,
    value: String,
    reason: String,
}

/// Gantry's control plane: API server, store, scheduler, controllers and the agents' feed in one
/// process on one port.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "gantry-control",
    version,
    about,
    max_term_width = 100,
    args_conflicts_with_subcommands = true
)]
pub struct Arguments {
    /// Something else than to serve
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Where the store and the certificates are kept
    #[arg(long, value_name = "DIR", default_value = "/var/lib/gantry-control")]
    pub data_dir: PathBuf,

    /// The key that opens the store's Secrets; made at the first start
    /// [default: pki/store.key in the data directory]
    #[arg(long, value_name = "FILE")]
    pub store_key: Option<PathBuf>,

    /// Where the store is, if not in a file
    #[command(flatten)]
    pub etcd: EtcdArguments,

    /// The one address and port of the API (gRPC over TLS)
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:6443")]
    pub listen: SocketAddr,

    /// Where the administrator's credentials are written
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/gantry/admin.kubeconfig"
    )]
    pub kubeconfig: PathBuf,

    /// Also write the credentials of the agent on NODE into DIR (may be repeated)
    #[arg(long, value_name = "DIR:NODE", value_parser = parse_agent_credentials)]
    pub agent_credentials: Vec<AgentCredentials>,

    /// Where pods reach the API [default: the address of --listen, else of the default route]
    #[arg(long, value_name = "ADDRESS")]
    pub advertise_address: Option<IpAddr>,

    /// A further name or address in the server's certificate (may be repeated)
    #[arg(long = "san", value_name = "NAME")]
    pub sans: Vec<String>,

    /// Pods get their addresses from here; with an IPv6 range as well they get one of each family
    #[arg(long, value_name = "CIDR[,CIDR]", default_value = "10.244.0.0/16")]
    pub cluster_cidr: Ranges,

    /// Length of each node's part of the cluster CIDR
    #[arg(long, value_name = "BITS", default_value_t = 24)]
    pub node_cidr_prefix: u8,

    /// The same of the IPv6 one
    #[arg(long, value_name = "BITS", default_value_t = 64)]
    pub node_cidr_prefix_v6: u8,

    /// Services get their cluster IPs from here; with an IPv6 range as well they may have one of each
    /// family
    #[arg(long, value_name = "CIDR[,CIDR]", default_value = "10.96.0.0/16")]
    pub service_cidr: Ranges,

    /// Services of type LoadBalancer get their addresses from here: addresses that routers or
    /// neighbours bring to the nodes, and that nothing else uses (may be repeated) [default: none]
    #[arg(long, value_name = "CIDR|FIRST-LAST,...", value_delimiter = ',')]
    pub load_balancer_pool: Vec<PoolRange>,

    /// A node that has said nothing for this many seconds is not ready
    #[arg(long, value_name = "SECONDS", default_value_t = 40, value_parser = clap::value_parser!(u64).range(10..=3600))]
    pub node_grace_period_s: u64,

    /// Pods that do not say how long they stay on a node that is not ready stay this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(i64).range(0..))]
    pub default_not_ready_toleration_seconds: i64,

    /// The same for a node that is not heard of
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(i64).range(0..))]
    pub default_unreachable_toleration_seconds: i64,

    /// Certificates of nodes that join last this many seconds; they are renewed at two thirds
    #[arg(long, value_name = "SECONDS", default_value_t = 1_209_600, value_parser = clap::value_parser!(u64).range(5..=31_536_000))]
    pub node_certificate_life_s: u64,

    /// Tokens of service accounts live for at most this many seconds, also where more is asked for
    #[arg(long, value_name = "SECONDS", default_value_t = crate::server::tokens::LIFETIME_S_MAX, value_parser = clap::value_parser!(i64).range(30..=1 << 32))]
    pub service_account_max_token_expiration_s: i64,

    /// Who asked for what is written here, a line of JSON a request (audit.k8s.io/v1, level Metadata)
    /// [default: none]
    #[arg(long, value_name = "FILE")]
    pub audit_log: Option<PathBuf>,

    /// The audit log is renamed when it is this large
    #[arg(long, value_name = "MIB", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    pub audit_log_maxsize: u64,

    /// Renamed audit logs that are kept
    #[arg(long, value_name = "COUNT", default_value_t = 10, value_parser = clap::value_parser!(u16).range(0..=1000))]
    pub audit_log_maxbackup: u16,

    /// The domain of Service names
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,

    /// What is logged, as in RUST_LOG: a level, or target=level pairs
    #[arg(
        long,
        value_name = "FILTER",
        env = "GANTRY_LOG",
        default_value = "info"
    )]
    pub log: String,
}

/// What else the program does.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Make the store of a stopped control plane what a backup says
    Restore(RestoreArguments),
}

/// A directory and the node whose agent's credentials go there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentCredentials {
    /// The directory.
    pub directory: PathBuf,
    /// The node's name.
    pub node: String,
}

fn parse_agent_credentials(text: &str) -> Result<AgentCredentials, String> {
    let (directory, node) = text
        .rsplit_once(':')
        .filter(|(directory, _)| !directory.is_empty())
        .ok_or("expected DIR:NODE, for example /etc/gantry/agent:worker-1")?;
    check_node_name(node)?;
    Ok(AgentCredentials {
        directory: directory.into(),
        node: node.to_owned(),
    })
}

/// Node names are DNS subdomains; it also becomes part of a user name.
pub(crate) fn check_node_name(name: &str) -> Result<(), String> {
    let label_is_fine = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() <= 253 && name.split('.').all(label_is_fine) {
        return Ok(());
    }
    Err(format!(
        "{name:?} is no node name: lower case letters, digits, '-' and '.', at most 253 characters"
    ))
}

impl Arguments {
    /// Refuses what cannot work together.
    pub fn check(&self) -> Result<(), ConfigError> {
        let error = |flag, value: &dyn ToString, reason: String| {
            Err(ConfigError {
                flag,
                value: value.to_string(),
                reason,
            })
        };
        let both = [
            ("--cluster-cidr", self.cluster_cidr),
            ("--service-cidr", self.service_cidr),
        ];
        for (flag, range) in both
            .iter()
            .flat_map(|(flag, it)| it.all().map(move |it| (flag, it)))
        {
            if range.addr() != range.network() {
                let reason = format!("bits are set beyond the prefix: use {}", range.trunc());
                return error(flag, &range, reason);
            }
        }
        let (clusters, services) = (self.cluster_cidr.all(), self.service_cidr.all());
        let services: Vec<IpNet> = services.collect();
        for cluster in clusters {
            let overlaps = |it: &&IpNet| cluster.contains(*it) || it.contains(&cluster);
            if let Some(range) = services.iter().find(overlaps) {
                let reason = format!("overlaps with --cluster-cidr {cluster}");
                return error("--service-cidr", range, reason);
            }
        }
        if let Some(cluster) = self.cluster_cidr.v6 {
            self.check_v6(cluster)?;
        } else if let Some(range) = self.service_cidr.v6 {
            let reason = "pods have no IPv6 addresses: give --cluster-cidr one of each family too";
            return error("--service-cidr", &range, reason.to_owned());
        }
        let (cluster, services) = (self.cluster_cidr.v4, self.service_cidr.v4);
        if !(8..=28).contains(&services.prefix_len()) {
            let reason = "the prefix must be between /8 and /28".to_owned();
            return error("--service-cidr", &services, reason);
        }
        let prefix = self.node_cidr_prefix;
        if prefix < cluster.prefix_len() || prefix > 30 {
            let reason = format!(
                "must be between {} (the cluster CIDR's own) and 30",
                cluster.prefix_len()
            );
            return error("--node-cidr-prefix", &prefix, reason);
        }
        if prefix - cluster.prefix_len() > 16 {
            let reason = "would cut the cluster CIDR into more than 65,536 parts".to_owned();
            return error("--node-cidr-prefix", &prefix, reason);
        }
        for range in &self.load_balancer_pool {
            let others = both
                .iter()
                .flat_map(|(flag, it)| it.all().map(move |it| (flag, it)));
            if let Some((flag, net)) = others.into_iter().find(|(_, net)| range.overlaps(net)) {
                let reason = format!("overlaps with {flag} {net}");
                return error("--load-balancer-pool", range, reason);
            }
        }
        self.etcd.check()?;
        let is_name = |text: &str| check_node_name(text).is_ok();
        if !is_name(&self.cluster_domain) {
            let reason = "must be a DNS name without a trailing dot".to_owned();
            return error("--cluster-domain", &self.cluster_domain, reason);
        }
        if let Some(address) = self.advertise_address
            && (address.is_loopback() || address.is_unspecified())
        {
            let reason = "is no address that a pod can connect to".to_owned();
            return error("--advertise-address", &address, reason);
        }
        let bad_san = self
            .sans
            .iter()
            .find(|san| san.parse::<IpAddr>().is_err() && !is_name(san));
        if let Some(san) = bad_san {
            return error("--san", san, "must be a DNS name or an address".to_owned());
        }
        Ok(())
    }

    /// The key file of the store.
    pub fn store_key(&self) -> PathBuf {
        let given = self.store_key.clone();
        given.unwrap_or_else(|| self.data_dir.join(KEY_FILE))
    }

    fn check_v6(&self, cluster: Ipv6Net) -> Result<(), ConfigError> {
        let error = |flag, value: &dyn ToString, reason: String| {
            Err(ConfigError {
                flag,
                value: value.to_string(),
                reason,
            })
        };
        let prefix = self.node_cidr_prefix_v6;
        let least = cluster.prefix_len();
        if prefix < least || prefix > 120 {
            let reason = format!("must be between {least} (the IPv6 cluster CIDR's own) and 120");
            return error("--node-cidr-prefix-v6", &prefix, reason);
        }
        if prefix - least > 16 {
            let reason = "would cut the IPv6 cluster CIDR into more than 65,536 parts".to_owned();
            return error("--node-cidr-prefix-v6", &prefix, reason);
        }
        match self.service_cidr.v6 {
            Some(range) if !(48..=124).contains(&range.prefix_len()) => {
                let reason = "the IPv6 prefix must be between /48 and /124".to_owned();
                error("--service-cidr", &range, reason)
            }
            _ => Ok(()),
        }
    }

    /// The resolver's cluster IP: the tenth address of the service range, as Kubernetes has it.
    pub fn dns_service_ip(&self) -> Ipv4Addr {
        nth_address(self.service_cidr.v4, 10)
    }

    /// The API's cluster IP: the first of the service range, as Kubernetes has it.
    pub fn api_service_ip(&self) -> Ipv4Addr {
        nth_address(self.service_cidr.v4, 1)
    }

    /// Cluster IPs that no other Service may take, with whose they are.
    pub fn reserved_service_ips(&self) -> Vec<(Ipv4Addr, String)> {
        vec![
            (self.api_service_ip(), API_SERVICE_KEY.to_owned()),
            (self.dns_service_ip(), "the nodes' resolver".to_owned()),
        ]
    }

    /// The names of the API inside the cluster, for its certificate, and those that were asked for.
    pub fn server_names(&self) -> Vec<String> {
        let mut names = self.sans.clone();
        names.push(self.api_service_ip().to_string());
        names.push(format!("kubernetes.default.svc.{}", self.cluster_domain));
        names.extend(self.advertise_address.map(|address| address.to_string()));
        names
    }

    /// Where clients on this machine reach the API listening on `address`.
    pub fn server_url(address: SocketAddr) -> String {
        let host = match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
            ip => ip,
        };
        format!("https://{}", SocketAddr::new(host, address.port()))
    }
}

fn nth_address(range: Ipv4Net, n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(range.network()).saturating_add(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Arguments, String> {
        let arguments = [&["gantry-control"], arguments].concat();
        let parsed = Arguments::try_parse_from(arguments).map_err(|e| e.to_string())?;
        parsed.check().map_err(|e| e.to_string())?;
        Ok(parsed)
    }

    #[test]
    fn defaults_are_valid() {
        let arguments = parse(&[]).unwrap();
        assert_eq!(arguments.dns_service_ip().to_string(), "10.96.0.10");
        assert_eq!(
            Arguments::server_url(arguments.listen),
            "https://127.0.0.1:6443"
        );
    }

    #[test]
    fn etcd_is_a_list_of_places() {
        let arguments = parse(&["--store", "etcd://127.0.0.1:1,localhost:2,[::1]:3"]).unwrap();
        let servers = arguments.etcd.servers().unwrap().unwrap();
        assert_eq!(
            servers.urls,
            ["http://127.0.0.1:1", "http://localhost:2", "http://[::1]:3"]
        );
        assert_eq!(parse(&[]).unwrap().etcd.servers().unwrap(), None);
    }

    #[test]
    fn a_restore_is_no_start() {
        let arguments = parse(&["restore", "file", "--data-dir", "d"]).unwrap();
        let Some(Command::Restore(restore)) = arguments.command else {
            panic!("{arguments:?}")
        };
        assert_eq!(
            (restore.file, restore.data_dir),
            ("file".into(), "d".into())
        );
        assert!(parse(&["--listen", "127.0.0.1:1", "restore", "file"]).is_err());
    }

    #[test]
    fn a_cluster_may_have_both_families() {
        let arguments = parse(&[
            "--cluster-cidr",
            "10.244.0.0/16,fd00:10:244::/56",
            "--service-cidr",
            "10.96.0.0/16,fd00:10:96::/112",
        ]);
        let arguments = arguments.unwrap();
        assert_eq!(arguments.cluster_cidr.all().count(), 2);
        assert_eq!(arguments.dns_service_ip().to_string(), "10.96.0.10");
    }

    #[test]
    fn agents_are_directory_and_node() {
        let arguments = parse(&["--agent-credentials", "/etc/a:b:worker-1.rack"]).unwrap();
        let expected = AgentCredentials {
            directory: "/etc/a:b".into(),
            node: "worker-1.rack".to_owned(),
        };
        assert_eq!(arguments.agent_credentials, [expected]);
        for bad in ["worker", ":worker", "/etc:Worker", "/etc:"] {
            assert!(parse(&["--agent-credentials", bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_cannot_work_is_refused_by_flag_and_value() {
        for (arguments, text) in [
            (&["--cluster-cidr", "10.96.0.0/12"][..], "overlaps"),
            (&["--service-cidr", "10.96.0.1/16"], "use 10.96.0.0/16"),
            (&["--service-cidr", "10.96.0.0/30"], "/28"),
            (&["--node-cidr-prefix", "8"], "between 16"),
            (&["--cluster-cidr", "fd00::/56"], "IPv4"),
            (
                &["--cluster-cidr", "10.0.0.0/16,fd00::1/56"],
                "use fd00::/56",
            ),
            (
                &["--service-cidr", "10.96.0.0/16,fd96::/112"],
                "--cluster-cidr",
            ),
            (
                &[
                    "--node-cidr-prefix-v6",
                    "56",
                    "--cluster-cidr",
                    "10.244.0.0/16,fd00::/64",
                ],
                "between 64",
            ),
            (
                &[
                    "--service-cidr",
                    "10.96.0.0/16,fd00:0:0:1::/112",
                    "--cluster-cidr",
                    "10.244.0.0/16,fd00::/56",
                ],
                "overlaps",
            ),
            (&["--cluster-domain", "Cluster.Local"], "DNS name"),
            (&["--san", "a b"], "DNS name"),
            (
                &["--load-balancer-pool", "192.0.2.0/24,10.96.3.0-10.96.3.9"],
                "overlaps",
            ),
            (
                &["--load-balancer-pool", "192.0.2.9-192.0.2.1"],
                "smaller address first",
            ),
            (&["--advertise-address", "127.0.0.1"], "no address"),
            (
                &["--store", "etcd://127.0.0.1:2379,192.0.2.1:2379"],
                "another machine",
            ),
            (&["--store", "etcd://127.0.0.1"], "no HOST:PORT"),
            (&["--store", "redis://127.0.0.1:1"], "expected etcd://"),
        ] {
            let error = parse(arguments).unwrap_err();
            assert!(
                error.contains(text) && error.contains(arguments[0]),
                "{error}"
            );
        }
    }
}
