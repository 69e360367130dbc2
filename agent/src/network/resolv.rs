//! A pod's `/etc/resolv.conf`, as the kubelet writes it. Pure.
//!
//! ```text
//! ClusterFirst             cluster resolver; ns.svc.domain, svc.domain, domain + the node's search; ndots:5
//! ClusterFirstWithHostNet  the same, also with hostNetwork
//! Default, and ClusterFirst with hostNetwork          the node's file
//! None                     empty
//! each                     then dnsConfig is appended; its options win
//! ```
//! Source: kubernetes `pkg/kubelet/network/dns/dns.go` and its limits.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;

use gantry_api::k8s_openapi::api::core::v1::PodSpec;

use crate::view::Settings;

/// More nameservers are ignored by glibc, so they are not written.
const NAMESERVER_COUNT_MAX: usize = 3;
/// The kubelet's limit on search domains.
const SEARCH_COUNT_MAX: usize = 32;
/// The kubelet's limit on the search list, in bytes.
const SEARCH_SIZE_MAX: usize = 2048;

/// The content of a resolv.conf.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ResolvConf {
    /// Addresses, in order of preference.
    pub nameservers: Vec<String>,
    /// Domains tried for names with too few dots.
    pub search: Vec<String>,
    /// `ndots:5`, `rotate`, …
    pub options: Vec<String>,
}

impl ResolvConf {
    /// Reads resolv.conf(5); unknown lines are ignored, the last `search` or `domain` wins.
    pub fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        for line in text.lines() {
            let line = line.split(['#', ';']).next().unwrap_or_default();
            let mut words = line.split_whitespace().map(str::to_string);
            match words.next().as_deref() {
                Some("nameserver") => conf.nameservers.extend(words.next()),
                Some("search") => conf.search = words.collect(),
                Some("domain") => conf.search = words.take(1).collect(),
                Some("options") => conf.options.extend(words),
                _ => {}
            }
        }
        conf
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        for nameserver in &self.nameservers {
            text.push_str(&format!("nameserver {nameserver}\n"));
        }
        for (keyword, words) in [("search", &self.search), ("options", &self.options)] {
            if !words.is_empty() {
                text.push_str(&format!("{keyword} {}\n", words.join(" ")));
            }
        }
        text
    }
}

/// The text for a pod.
///
/// * `spec` – its dnsPolicy, hostNetwork and dnsConfig count.
/// * `namespace` – metadata.namespace.
/// * `settings` – the cluster's resolver and domain; without a resolver `ClusterFirst` is `Default`.
/// * `node` – the node's own resolv.conf: see [`node_resolv_conf`].
pub fn resolv_conf(spec: &PodSpec, namespace: &str, settings: &Settings, node: &str) -> String {
    formed(spec, namespace, settings, node).to_text()
}

/// What did not fit into that text, in words for an event `DNSConfigForming`.
pub fn resolv_conf_warnings(
    spec: &PodSpec,
    namespace: &str,
    settings: &Settings,
    node: &str,
) -> Vec<String> {
    limit(&mut merged(spec, namespace, settings, node))
}

fn formed(spec: &PodSpec, namespace: &str, settings: &Settings, node: &str) -> ResolvConf {
    let mut conf = merged(spec, namespace, settings, node);
    limit(&mut conf);
    conf
}

/// Before the limits.
fn merged(spec: &PodSpec, namespace: &str, settings: &Settings, node: &str) -> ResolvConf {
    let node = ResolvConf::parse(node);
    let host_network = spec.host_network.unwrap_or(false);
    let policy = spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
    let wants_cluster = match policy {
        "ClusterFirst" => !host_network,
        "ClusterFirstWithHostNet" => true,
        _ => false,
    };
    let mut conf = match settings.dns_service_ip {
        Some(resolver) if wants_cluster => cluster_first(resolver, namespace, settings, &node),
        _ if policy == "None" => ResolvConf::default(),
        _ => node,
    };
    if let Some(extra) = &spec.dns_config {
        conf.nameservers
            .extend(extra.nameservers.iter().flatten().cloned());
        conf.search.extend(extra.searches.iter().flatten().cloned());
        for option in extra.options.iter().flatten() {
            let name = option.name.clone().unwrap_or_default();
            conf.options
                .retain(|held| held.split(':').next() != Some(name.as_str()));
            conf.options.push(match &option.value {
                Some(value) => format!("{name}:{value}"),
                None => name,
            });
        }
    }
    conf
}

fn cluster_first(
    resolver: IpAddr,
    namespace: &str,
    settings: &Settings,
    node: &ResolvConf,
) -> ResolvConf {
    let domain = &settings.cluster_domain;
    let mut search = vec![
        format!("{namespace}.svc.{domain}"),
        format!("svc.{domain}"),
        domain.clone(),
    ];
    search.extend(node.search.iter().cloned());
    ResolvConf {
        nameservers: vec![resolver.to_string()],
        search,
        options: vec!["ndots:5".into()],
    }
}

/// Drops repetitions and what exceeds the limits, from the end; the latter in the kubelet's words.
fn limit(conf: &mut ResolvConf) -> Vec<String> {
    let mut words = Vec::new();
    let mut seen = BTreeSet::new();
    conf.nameservers
        .retain(|server| seen.insert(server.clone()));
    if conf.nameservers.len() > NAMESERVER_COUNT_MAX {
        conf.nameservers.truncate(NAMESERVER_COUNT_MAX);
        words.push(format!(
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied \
             nameserver line is: {}",
            conf.nameservers.join(" ")
        ));
    }
    let mut seen = BTreeSet::new();
    conf.search.retain(|domain| seen.insert(domain.clone()));
    let mut size = 0;
    let fits = conf
        .search
        .iter()
        .take(SEARCH_COUNT_MAX)
        .take_while(|domain| {
            size += domain.len() + 1;
            size <= SEARCH_SIZE_MAX + 1
        });
    let count = fits.count();
    if conf.search.len() > count {
        conf.search.truncate(count);
        words.push(format!(
            "Search Line limits were exceeded, some search paths have been omitted, the applied \
             search line is: {}",
            conf.search.join(" ")
        ));
    }
    words
}

/// The node's resolv.conf: the file whose nameservers also pods can reach. With systemd-resolved
/// `/etc/resolv.conf` names a loopback address; the real servers are in its own file.
pub fn node_resolv_conf() -> String {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let only_loopback = {
        let servers = ResolvConf::parse(&text).nameservers;
        !servers.is_empty()
            && (servers.iter()).all(|server| {
                let address = server.parse::<IpAddr>();
                address.is_ok_and(|address| address.is_loopback())
            })
    };
    if only_loopback && let Ok(real) = fs::read_to_string("/run/systemd/resolve/resolv.conf") {
        return real;
    }
    text
}

#[cfg(test)]
mod tests {
    use gantry_api::k8s_openapi::api::core::v1::{PodDNSConfig, PodDNSConfigOption};
    use proptest::prelude::*;

    use super::*;

    const NODE: &str = "# by hand\nnameserver 192.0.2.53\nsearch example.org\noptions rotate\n";

    fn settings() -> Settings {
        Settings {
            cluster_domain: "cluster.local".into(),
            dns_service_ip: Some(IpAddr::from([10, 96, 0, 10])),
            ..Settings::default()
        }
    }

    fn text(policy: Option<&str>, host_network: bool) -> String {
        let spec = PodSpec {
            dns_policy: policy.map(Into::into),
            host_network: Some(host_network),
            ..PodSpec::default()
        };
        resolv_conf(&spec, "shop", &settings(), NODE)
    }

    const CLUSTER: &str = "nameserver 10.96.0.10\nsearch shop.svc.cluster.local \
         svc.cluster.local cluster.local example.org\noptions ndots:5\n";
    const HOST: &str = "nameserver 192.0.2.53\nsearch example.org\noptions rotate\n";

    #[test]
    fn each_policy_gives_the_kubelets_text() {
        assert_eq!(text(None, false), CLUSTER);
        assert_eq!(text(Some("ClusterFirst"), false), CLUSTER);
        assert_eq!(text(Some("ClusterFirst"), true), HOST);
        assert_eq!(text(Some("ClusterFirstWithHostNet"), true), CLUSTER);
        assert_eq!(text(Some("Default"), false), HOST);
        assert_eq!(text(Some("None"), false), "");
    }

    #[test]
    fn without_a_cluster_resolver_the_nodes_is_used() {
        let text = resolv_conf(&PodSpec::default(), "shop", &Settings::default(), NODE);
        assert_eq!(text, HOST);
    }

    #[test]
    fn dns_config_is_appended_and_its_options_win() {
        let option = |name: &str, value: Option<&str>| PodDNSConfigOption {
            name: Some(name.into()),
            value: value.map(Into::into),
        };
        let mut spec = PodSpec {
            dns_config: Some(PodDNSConfig {
                nameservers: Some(vec!["192.0.2.1".into(), "10.96.0.10".into()]),
                searches: Some(vec!["corp".into()]),
                options: Some(vec![option("ndots", Some("2")), option("edns0", None)]),
            }),
            ..PodSpec::default()
        };
        assert_eq!(
            resolv_conf(&spec, "shop", &settings(), NODE),
            "nameserver 10.96.0.10\nnameserver 192.0.2.1\nsearch shop.svc.cluster.local \
             svc.cluster.local cluster.local example.org corp\noptions ndots:2 edns0\n"
        );
        spec.dns_policy = Some("None".into());
        assert_eq!(
            resolv_conf(&spec, "shop", &settings(), NODE),
            "nameserver 192.0.2.1\nnameserver 10.96.0.10\nsearch corp\noptions ndots:2 edns0\n"
        );
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let spec = PodSpec {
            dns_config: Some(PodDNSConfig {
                nameservers: Some((1..4).map(|n| format!("192.0.2.{n}")).collect()),
                searches: Some((0..30).map(|n| format!("d{n}.example")).collect()),
                ..PodDNSConfig::default()
            }),
            ..PodSpec::default()
        };
        let warnings = resolv_conf_warnings(&spec, "shop", &settings(), NODE);
        assert_eq!(warnings.len(), 2);
        assert!(warnings[0].ends_with("line is: 10.96.0.10 192.0.2.1 192.0.2.2"));
        assert!(
            warnings[1].ends_with(" d26.example d27.example"),
            "{warnings:?}"
        );
        assert!(resolv_conf_warnings(&PodSpec::default(), "shop", &settings(), NODE).is_empty());
    }

    proptest! {
        /// Any node file: the limits hold and the cluster's resolver comes first.
        #[test]
        fn limits_hold(node in "((nameserver|search|options|junk)( [a-z.:0-9]{0,30}){0,40}\n){0,9}") {
            let text = resolv_conf(&PodSpec::default(), "shop", &settings(), &node);
            let conf = ResolvConf::parse(&text);
            prop_assert_eq!(&conf.nameservers, &["10.96.0.10"]);
            prop_assert!(conf.search.len() <= SEARCH_COUNT_MAX);
            prop_assert!(conf.search.join(" ").len() <= SEARCH_SIZE_MAX);
            prop_assert_eq!(&conf.search[0], "shop.svc.cluster.local");
        }
    }
}
