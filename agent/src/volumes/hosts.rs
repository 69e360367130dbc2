//! `/etc/hosts` and `/etc/hostname` of a pod, byte for byte as the kubelet writes them.
//!
//! Source: Kubernetes `pkg/kubelet/kubelet_pods.go` (managedHostsFileContent, GeneratePodHostNameAndDomain).

use std::fmt::Write as _;
use std::net::IpAddr;

use gantry_api::k8s_openapi::api::core::v1::{HostAlias, Pod};

use crate::view::Settings;

/// A host name longer than this is cut, as the kernel and DNS have it.
const HOST_NAME_BYTES_MAX: usize = 63;

/// The pod's host name: `spec.hostname`, or its name, cut to what a host name may be. With
/// `setHostnameAsFQDN` the full name.
pub fn host_name(pod: &Pod, settings: &Settings) -> String {
    let spec = pod.spec.as_ref();
    let chosen = spec
        .and_then(|s| s.hostname.as_deref())
        .filter(|h| !h.is_empty());
    let name = chosen
        .or(pod.metadata.name.as_deref())
        .unwrap_or("localhost");
    let mut end = name.len().min(HOST_NAME_BYTES_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let name = name[..end].trim_end_matches(['-', '.']).to_owned();
    match (
        spec.and_then(|s| s.set_hostname_as_fqdn),
        domain(pod, settings),
    ) {
        (Some(true), Some(domain)) => format!("{name}.{domain}"),
        _ => name,
    }
}

/// `<subdomain>.<namespace>.svc.<cluster domain>`, where the pod has a subdomain.
fn domain(pod: &Pod, settings: &Settings) -> Option<String> {
    let subdomain = pod
        .spec
        .as_ref()?
        .subdomain
        .as_deref()
        .filter(|s| !s.is_empty())?;
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    Some(format!(
        "{subdomain}.{namespace}.svc.{}",
        settings.cluster_domain
    ))
}

/// The content of `/etc/hosts`. With host network it is the node's own, which is read here.
///
/// * `addresses` – the pod's; the first is the one its host name stands for first.
/// * `host_name` – as [`host_name`] gives it.
pub fn etc_hosts(pod: &Pod, addresses: &[IpAddr], host_name: &str, settings: &Settings) -> String {
    let spec = pod.spec.as_ref();
    let aliases = spec
        .and_then(|s| s.host_aliases.as_deref())
        .unwrap_or_default();
    if spec.and_then(|s| s.host_network).unwrap_or(false) {
        // A node without the file has nothing to pass on.
        let own = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
        return of_host(&own, aliases);
    }
    of_pod(
        addresses,
        host_name,
        domain(pod, settings).as_deref(),
        aliases,
    )
}

fn of_host(own: &str, aliases: &[HostAlias]) -> String {
    let mut text = "# Kubernetes-managed hosts file (host network).\n".to_owned();
    text.push_str(own);
    add_aliases(&mut text, aliases);
    text
}

fn of_pod(
    addresses: &[IpAddr],
    host_name: &str,
    domain: Option<&str>,
    aliases: &[HostAlias],
) -> String {
    let mut text = "# Kubernetes-managed hosts file.\n\
        127.0.0.1\tlocalhost\n\
        ::1\tlocalhost ip6-localhost ip6-loopback\n\
        fe00::0\tip6-localnet\n\
        fe00::0\tip6-mcastprefix\n\
        fe00::1\tip6-allnodes\n\
        fe00::2\tip6-allrouters\n"
        .to_owned();
    // With setHostnameAsFQDN the name carries the domain already.
    let short = match domain {
        Some(domain) => host_name
            .strip_suffix(&format!(".{domain}"))
            .unwrap_or(host_name),
        None => host_name,
    };
    for address in addresses {
        // Writing to a String cannot fail.
        let _ = match domain {
            Some(domain) => writeln!(text, "{address}\t{short}.{domain}\t{short}"),
            None => writeln!(text, "{address}\t{short}"),
        };
    }
    add_aliases(&mut text, aliases);
    text
}

fn add_aliases(text: &mut String, aliases: &[HostAlias]) {
    if aliases.is_empty() {
        return;
    }
    text.push_str("\n# Entries added by HostAliases.\n");
    for alias in aliases {
        let names = alias.hostnames.as_deref().unwrap_or_default();
        let _ = writeln!(text, "{}\t{}", alias.ip, names.join("\t"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn settings() -> Settings {
        Settings {
            cluster_domain: "cluster.local".to_owned(),
            ..Settings::default()
        }
    }

    fn pod(spec: serde_json::Value) -> Pod {
        let meta = json!({"name": "web-0", "namespace": "shop"});
        serde_json::from_value(json!({"metadata": meta, "spec": spec})).unwrap()
    }

    #[test]
    fn pod_is_in_its_own_hosts_file() {
        let pod = pod(json!({"containers": [], "subdomain": "web",
            "hostAliases": [{"ip": "192.0.2.9", "hostnames": ["foo", "bar"]}]}));
        let name = host_name(&pod, &settings());
        assert_eq!(name, "web-0");
        let text = etc_hosts(&pod, &["10.244.0.5".parse().unwrap()], &name, &settings());
        assert!(text.starts_with("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"));
        assert!(text.contains("\n10.244.0.5\tweb-0.web.shop.svc.cluster.local\tweb-0\n"));
        assert!(text.ends_with("\n\n# Entries added by HostAliases.\n192.0.2.9\tfoo\tbar\n"));
    }

    #[test]
    fn long_and_full_names_are_what_the_kernel_takes() {
        let mut long = pod(json!({"containers": []}));
        long.metadata.name = Some(format!("{}-x", "a".repeat(62)));
        assert_eq!(host_name(&long, &settings()), "a".repeat(62));
        let full = pod(json!({"containers": [], "subdomain": "web", "setHostnameAsFQDN": true}));
        let name = host_name(&full, &settings());
        assert_eq!(name, "web-0.web.shop.svc.cluster.local");
        let text = etc_hosts(&full, &["10.0.0.1".parse().unwrap()], &name, &settings());
        assert!(text.contains("10.0.0.1\tweb-0.web.shop.svc.cluster.local\tweb-0\n"));
    }

    #[test]
    fn host_network_passes_the_nodes_own_file_on() {
        assert_eq!(
            of_host("127.0.0.1 localhost\n", &[]),
            "# Kubernetes-managed hosts file (host network).\n127.0.0.1 localhost\n"
        );
    }
}
