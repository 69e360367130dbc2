//! kube-proxy's nftables mode as text for `nft -f -`: pure.
//!
//! ```text
//!  nat-prerouting, nat-output ─► services ─ verdict map ip . proto . port ─► service-x ─ numgen random ─► endpoint-x ─► dnat
//!                                         └ verdict map proto . port      ─► external-x ─► service-x
//!  nat-postrouting ─► masquerading ─ marked by mark-for-masquerade ─► masquerade
//! ```
//! A change writes what a partial sync writes: the chains of the changed Service. In kube-proxy's
//! favour, chains of old endpoints are neither listed nor flushed, and making the text is not timed.
//!
//! Source: Kubernetes' `pkg/proxy/nftables` and its README.

use std::fmt::Write;
use std::net::Ipv4Addr;

use super::model::{Model, POD_PREFIX, SERVICE_PORT, SERVICE_PREFIX, Service, TARGET_PORT, hashed};

const TABLE: &str = "ip kube-proxy";

/// What does not depend on Services: base chains, sets, maps and what they are asked for.
const FRAME: &str = r#"add table ip kube-proxy { comment "rules for kube-proxy" ; }
add set ip kube-proxy cluster-ips { type ipv4_addr ; comment "Active ClusterIPs" ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; comment "IPs that accept NodePort traffic" ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add chain ip kube-proxy filter-prerouting { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-input { type filter hook input priority -110 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority -110 ; }
add chain ip kube-proxy filter-output { type filter hook output priority -110 ; }
add chain ip kube-proxy filter-output-post-dnat { type filter hook output priority -90 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy services
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy masquerading
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy service-endpoints-check
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy firewall-check
add rule ip kube-proxy filter-prerouting ct state new jump firewall-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump firewall-check
add rule ip kube-proxy filter-output-post-dnat ct state new jump cluster-ips-check
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
"#;

/// Everything, into an empty ruleset; `node` is the address that accepts node ports.
pub(super) fn whole(model: &Model, node: Ipv4Addr) -> String {
    let mut text = FRAME.to_owned();
    put(
        &mut text,
        format_args!("add rule {TABLE} cluster-ips-check ip daddr {{ {SERVICE_PREFIX} }} drop"),
    );
    put(
        &mut text,
        format_args!("add element {TABLE} nodeport-ips {{ {node} }}"),
    );
    for service in &model.services {
        chains(&mut text, service);
        elements(&mut text, service);
    }
    text
}

/// What a sync writes after this Service's endpoints have changed.
pub(super) fn change(changed: &Service) -> String {
    let mut text = String::new();
    chains(&mut text, changed);
    text
}

/// Chains are made, emptied and filled in one transaction, whether they are there or not.
fn chains(text: &mut String, service: &Service) {
    let (address, chain) = (service.address, service_chain(service));
    ensure(text, &chain);
    put(
        text,
        format_args!(
            "add rule {TABLE} {chain} ip daddr {address} tcp dport {SERVICE_PORT} ip saddr != \
             {POD_PREFIX} jump mark-for-masquerade"
        ),
    );
    if service.node_port.is_some() {
        let external = external_chain(service);
        ensure(text, &external);
        put(
            text,
            format_args!("add rule {TABLE} {external} jump mark-for-masquerade"),
        );
        put(
            text,
            format_args!("add rule {TABLE} {external} goto {chain}"),
        );
    }
    let targets: Vec<String> = service
        .endpoints
        .iter()
        .map(|endpoint| endpoint_chain(service, *endpoint))
        .collect();
    targets.iter().for_each(|target| ensure(text, target));
    let verdicts = targets.iter().enumerate();
    let verdicts: Vec<String> = verdicts
        .map(|(index, target)| format!("{index} : goto {target}"))
        .collect();
    put(
        text,
        format_args!(
            "add rule {TABLE} {chain} numgen random mod {} vmap {{ {} }}",
            targets.len(),
            verdicts.join(" , ")
        ),
    );
    for (endpoint, target) in service.endpoints.iter().zip(&targets) {
        put(
            text,
            format_args!("add rule {TABLE} {target} ip saddr {endpoint} jump mark-for-masquerade"),
        );
        put(
            text,
            format_args!(
                "add rule {TABLE} {target} meta l4proto tcp dnat to {endpoint}:{TARGET_PORT}"
            ),
        );
    }
}

/// What leads to a Service.
fn elements(text: &mut String, service: &Service) {
    let (address, chain) = (service.address, service_chain(service));
    put(
        text,
        format_args!("add element {TABLE} cluster-ips {{ {address} }}"),
    );
    put(
        text,
        format_args!(
            "add element {TABLE} service-ips {{ {address} . tcp . {SERVICE_PORT} : goto {chain} }}"
        ),
    );
    if let Some(port) = service.node_port {
        let external = external_chain(service);
        put(
            text,
            format_args!(
                "add element {TABLE} service-nodeports {{ tcp . {port} : goto {external} }}"
            ),
        );
    }
}

fn ensure(text: &mut String, chain: &str) {
    put(text, format_args!("add chain {TABLE} {chain}"));
    put(text, format_args!("flush chain {TABLE} {chain}"));
}

fn put(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}");
}

/// `bench/svc-7/tcp/http`
fn path(service: &Service) -> String {
    service.name.replace(':', "/tcp/")
}

fn service_chain(service: &Service) -> String {
    format!("service-{}-{}", hashed(&service.name, 8), path(service))
}

fn external_chain(service: &Service) -> String {
    format!("external-{}-{}", hashed(&service.name, 8), path(service))
}

fn endpoint_chain(service: &Service, endpoint: Ipv4Addr) -> String {
    let to = format!("{endpoint}/{TARGET_PORT}");
    let hash = hashed(&format!("{}{to}", service.name), 8);
    format!("endpoint-{hash}-{}__{to}", path(service))
}

#[cfg(test)]
mod tests {
    use super::super::model::Size;
    use super::*;

    fn readable(text: &str, service: &Service) -> String {
        let mut text = text
            .replace(&service_chain(service), "SERVICE")
            .replace(&external_chain(service), "EXTERNAL")
            .replace("ip kube-proxy ", "");
        for (index, endpoint) in service.endpoints.iter().enumerate() {
            text = text.replace(
                &endpoint_chain(service, *endpoint),
                &format!("ENDPOINT-{index}"),
            );
        }
        text
    }

    #[test]
    fn a_change_is_the_chains_that_kube_proxy_writes() {
        let model = Model::new(Size::of(1));
        let service = Service {
            endpoints: model.measured().endpoints[..2].to_vec(),
            ..model.measured().clone()
        };
        let wanted = "\
add chain SERVICE
flush chain SERVICE
add rule SERVICE ip daddr 10.96.0.10 tcp dport 80 ip saddr != 10.244.0.0/16 jump mark-for-masquerade
add chain EXTERNAL
flush chain EXTERNAL
add rule EXTERNAL jump mark-for-masquerade
add rule EXTERNAL goto SERVICE
add chain ENDPOINT-0
flush chain ENDPOINT-0
add chain ENDPOINT-1
flush chain ENDPOINT-1
add rule SERVICE numgen random mod 2 vmap { 0 : goto ENDPOINT-0 , 1 : goto ENDPOINT-1 }
add rule ENDPOINT-0 ip saddr 10.244.8.1 jump mark-for-masquerade
add rule ENDPOINT-0 meta l4proto tcp dnat to 10.244.8.1:8080
add rule ENDPOINT-1 ip saddr 10.244.8.2 jump mark-for-masquerade
add rule ENDPOINT-1 meta l4proto tcp dnat to 10.244.8.2:8080
";
        assert_eq!(readable(&change(&service), &service), wanted);
    }

    #[test]
    fn maps_lead_to_every_service_and_one_node_port() {
        let model = Model::new(Size::of(100));
        let text = whole(&model, Ipv4Addr::new(192, 0, 2, 1));
        let lines: Vec<&str> = text.lines().collect();
        let count = |part: &str| lines.iter().filter(|line| line.starts_with(part)).count();
        assert_eq!(count("add element ip kube-proxy service-ips "), 100);
        assert_eq!(count("add element ip kube-proxy cluster-ips "), 100);
        assert_eq!(count("add chain ip kube-proxy endpoint-"), 300);
        let text = readable(&text, model.measured());
        for line in [
            "add element nodeport-ips { 192.0.2.1 }\n",
            "add element service-ips { 10.96.0.60 . tcp . 80 : goto SERVICE }\n",
            "add element service-nodeports { tcp . 30080 : goto EXTERNAL }\n",
            "add rule cluster-ips-check ip daddr { 10.96.0.0/12 } drop\n",
        ] {
            assert!(text.contains(line), "{line}");
        }
    }

    #[test]
    fn names_are_such_as_nft_takes() {
        let model = Model::new(Size::of(1));
        let chain = endpoint_chain(model.measured(), model.measured().endpoints[0]);
        assert!(
            chain.ends_with("-bench/svc-0/tcp/http__10.244.8.1/8080"),
            "{chain}"
        );
        assert!(chain.len() <= 128);
    }
}
