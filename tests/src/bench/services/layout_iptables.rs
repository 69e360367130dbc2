//! kube-proxy's iptables mode as text for `iptables-restore --noflush`: pure.
//!
//! ```text
//!  PREROUTING, OUTPUT ─► KUBE-SERVICES ─ a rule per cluster IP ─► KUBE-SVC-x ─ statistic random ─► KUBE-SEP-x ─► DNAT
//!                                      └ last: to the node itself ─► KUBE-NODEPORTS ─► KUBE-EXT-x ─► KUBE-SVC-x
//!  POSTROUTING ─► KUBE-POSTROUTING ─ marked by KUBE-MARK-MASQ ─► MASQUERADE
//! ```
//! A change writes what kube-proxy's partial sync writes: the chains of the changed Service and
//! KUBE-SERVICES, whose rules are one a Service. In kube-proxy's favour, chains of old endpoints are
//! neither listed nor deleted, and making the text is not timed.
//!
//! Source: the structure documented in Kubernetes' `pkg/proxy/iptables` and seen in
//! `iptables-save` of a node.

use std::fmt::Write;
use std::net::Ipv4Addr;

use super::model::{Model, POD_PREFIX, SERVICE_PORT, Service, TARGET_PORT, hashed};

const FILTER_CHAINS: [&str; 5] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FORWARD",
    "KUBE-NODEPORTS",
    "KUBE-PROXY-FIREWALL",
];

/// Where the kernel's own chains lead to kube-proxy's: chain, target, only new connections, why.
const FILTER_JUMPS: [(&str, &str, bool, &str); 10] = [
    (
        "INPUT",
        "KUBE-PROXY-FIREWALL",
        true,
        "kubernetes load balancer firewall",
    ),
    (
        "INPUT",
        "KUBE-NODEPORTS",
        false,
        "kubernetes health check service ports",
    ),
    (
        "INPUT",
        "KUBE-EXTERNAL-SERVICES",
        true,
        "kubernetes externally-visible service portals",
    ),
    (
        "FORWARD",
        "KUBE-PROXY-FIREWALL",
        true,
        "kubernetes load balancer firewall",
    ),
    (
        "FORWARD",
        "KUBE-FORWARD",
        false,
        "kubernetes forwarding rules",
    ),
    (
        "FORWARD",
        "KUBE-SERVICES",
        true,
        "kubernetes service portals",
    ),
    (
        "FORWARD",
        "KUBE-EXTERNAL-SERVICES",
        true,
        "kubernetes externally-visible service portals",
    ),
    (
        "OUTPUT",
        "KUBE-PROXY-FIREWALL",
        true,
        "kubernetes load balancer firewall",
    ),
    (
        "OUTPUT",
        "KUBE-SERVICES",
        true,
        "kubernetes service portals",
    ),
    (
        "OUTPUT",
        "KUBE-EXTERNAL-SERVICES",
        true,
        "kubernetes externally-visible service portals",
    ),
];

/// Everything, into empty tables.
pub(super) fn whole(model: &Model) -> String {
    let mut text = String::new();
    filter(&mut text, true);
    nat(&mut text, true, &model.services, &model.services);
    text
}

/// What a sync writes after `changed` has changed: it takes the place of the Service of its name.
pub(super) fn change(model: &Model, changed: &Service) -> String {
    let mut text = String::new();
    filter(&mut text, false);
    nat(
        &mut text,
        false,
        &model.services,
        std::slice::from_ref(changed),
    );
    text
}

fn filter(text: &mut String, jumps: bool) {
    text.push_str("*filter\n");
    declare(text, FILTER_CHAINS.iter().copied());
    for (chain, target, new, comment) in FILTER_JUMPS.iter().filter(|_| jumps) {
        let state = if *new {
            "-m conntrack --ctstate NEW "
        } else {
            ""
        };
        put(
            text,
            format_args!("-A {chain} {state}-m comment --comment \"{comment}\" -j {target}"),
        );
    }
    text.push_str(
        "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         COMMIT\n",
    );
}

fn nat(text: &mut String, jumps: bool, all: &[Service], written: &[Service]) {
    text.push_str("*nat\n");
    let fixed = [
        "KUBE-SERVICES",
        "KUBE-NODEPORTS",
        "KUBE-POSTROUTING",
        "KUBE-MARK-MASQ",
    ];
    declare(text, fixed.into_iter());
    for service in written {
        declare(text, std::iter::once(service_chain(service).as_str()));
        if service.node_port.is_some() {
            declare(text, std::iter::once(external_chain(service).as_str()));
        }
        for endpoint in &service.endpoints {
            declare(
                text,
                std::iter::once(endpoint_chain(service, *endpoint).as_str()),
            );
        }
    }
    if jumps {
        text.push_str(
            "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
             -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n",
        );
    }
    text.push_str(
        "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n",
    );
    for service in all {
        dispatch(text, service);
    }
    for service in written {
        chains(text, service);
    }
    text.push_str(
        "-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n\
         COMMIT\n",
    );
}

/// The rules that lead to a Service.
fn dispatch(text: &mut String, service: &Service) {
    let (name, address) = (&service.name, service.address);
    let chain = service_chain(service);
    put(
        text,
        format_args!(
            "-A KUBE-SERVICES -m comment --comment \"{name} cluster IP\" -m tcp -p tcp -d {address} \
             --dport {SERVICE_PORT} -j {chain}"
        ),
    );
    if let Some(port) = service.node_port {
        let chain = external_chain(service);
        put(
            text,
            format_args!(
                "-A KUBE-NODEPORTS -m comment --comment {name} -m tcp -p tcp --dport {port} -j {chain}"
            ),
        );
    }
}

/// The chains of a Service.
fn chains(text: &mut String, service: &Service) {
    let (name, address) = (&service.name, service.address);
    let chain = service_chain(service);
    if service.node_port.is_some() {
        let external = external_chain(service);
        put(
            text,
            format_args!(
                "-A {external} -m comment --comment \"masquerade traffic for {name} external \
                 destinations\" -j KUBE-MARK-MASQ"
            ),
        );
        put(text, format_args!("-A {external} -j {chain}"));
    }
    put(
        text,
        format_args!(
            "-A {chain} -m comment --comment \"{name} cluster IP\" -m tcp -p tcp -d {address} --dport \
             {SERVICE_PORT} ! -s {POD_PREFIX} -j KUBE-MARK-MASQ"
        ),
    );
    let count = service.endpoints.len();
    for (index, endpoint) in service.endpoints.iter().enumerate() {
        let target = endpoint_chain(service, *endpoint);
        // Each of those that are left is as probable as the others; the last takes what remains.
        let chance = match count - index {
            1 => String::new(),
            left => format!(
                "-m statistic --mode random --probability {:.10} ",
                1.0 / left as f64
            ),
        };
        put(
            text,
            format_args!(
                "-A {chain} -m comment --comment \"{name} -> {endpoint}:{TARGET_PORT}\" {chance}-j {target}"
            ),
        );
    }
    for endpoint in &service.endpoints {
        let chain = endpoint_chain(service, *endpoint);
        put(
            text,
            format_args!("-A {chain} -m comment --comment {name} -s {endpoint} -j KUBE-MARK-MASQ"),
        );
        put(
            text,
            format_args!(
                "-A {chain} -m comment --comment {name} -m tcp -p tcp -j DNAT --to-destination \
                 {endpoint}:{TARGET_PORT}"
            ),
        );
    }
}

fn declare<'a>(text: &mut String, chains: impl Iterator<Item = &'a str>) {
    for chain in chains {
        put(text, format_args!(":{chain} - [0:0]"));
    }
}

fn put(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}");
}

fn service_chain(service: &Service) -> String {
    format!("KUBE-SVC-{}", hashed(&service.name, 16))
}

fn external_chain(service: &Service) -> String {
    format!("KUBE-EXT-{}", hashed(&service.name, 16))
}

fn endpoint_chain(service: &Service, endpoint: Ipv4Addr) -> String {
    let text = format!("{}{endpoint}:{TARGET_PORT}", service.name);
    format!("KUBE-SEP-{}", hashed(&text, 16))
}

#[cfg(test)]
mod tests {
    use super::super::model::Size;
    use super::*;

    /// With short names in the place of hashes.
    fn readable(text: &str, service: &Service) -> String {
        let mut text = text
            .replace(&service_chain(service), "SVC")
            .replace(&external_chain(service), "EXT");
        for (index, endpoint) in service.endpoints.iter().enumerate() {
            text = text.replace(&endpoint_chain(service, *endpoint), &format!("SEP-{index}"));
        }
        text
    }

    #[test]
    fn a_service_is_the_chains_that_kube_proxy_makes() {
        let model = Model::new(Size::of(1));
        let service = model.measured();
        let mut text = String::new();
        chains(&mut text, service);
        let wanted = r#"-A EXT -m comment --comment "masquerade traffic for bench/svc-0:http external destinations" -j KUBE-MARK-MASQ
-A EXT -j SVC
-A SVC -m comment --comment "bench/svc-0:http cluster IP" -m tcp -p tcp -d 10.96.0.10 --dport 80 ! -s 10.244.0.0/16 -j KUBE-MARK-MASQ
-A SVC -m comment --comment "bench/svc-0:http -> 10.244.8.1:8080" -m statistic --mode random --probability 0.3333333333 -j SEP-0
-A SVC -m comment --comment "bench/svc-0:http -> 10.244.8.2:8080" -m statistic --mode random --probability 0.5000000000 -j SEP-1
-A SVC -m comment --comment "bench/svc-0:http -> 10.244.8.3:8080" -j SEP-2
-A SEP-0 -m comment --comment bench/svc-0:http -s 10.244.8.1 -j KUBE-MARK-MASQ
-A SEP-0 -m comment --comment bench/svc-0:http -m tcp -p tcp -j DNAT --to-destination 10.244.8.1:8080
-A SEP-1 -m comment --comment bench/svc-0:http -s 10.244.8.2 -j KUBE-MARK-MASQ
-A SEP-1 -m comment --comment bench/svc-0:http -m tcp -p tcp -j DNAT --to-destination 10.244.8.2:8080
-A SEP-2 -m comment --comment bench/svc-0:http -s 10.244.8.3 -j KUBE-MARK-MASQ
-A SEP-2 -m comment --comment bench/svc-0:http -m tcp -p tcp -j DNAT --to-destination 10.244.8.3:8080
"#;
        assert_eq!(readable(&text, service), wanted);
    }

    #[test]
    fn the_tables_frame_them_as_kube_proxy_does() {
        let model = Model::new(Size::of(1));
        let text = readable(&whole(&model), model.measured());
        let (filter, nat) = text.split_once("*nat\n").unwrap();
        assert!(filter.starts_with("*filter\n:KUBE-SERVICES - [0:0]\n"));
        assert!(filter.contains(
            "-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" \
             -j KUBE-SERVICES\n"
        ));
        let nat: Vec<&str> = nat.lines().collect();
        let at = |rule: &str| nat.iter().position(|line| line.starts_with(rule)).unwrap();
        for chain in ["SVC", "EXT", "SEP-0", "SEP-1", "SEP-2"] {
            assert!(at(&format!(":{chain} - [0:0]")) < at("-A PREROUTING"));
        }
        assert!(nat.contains(&"-A KUBE-SERVICES -m comment --comment \"bench/svc-0:http cluster IP\" -m tcp -p tcp -d 10.96.0.10 --dport 80 -j SVC"));
        assert!(nat.contains(
            &"-A KUBE-NODEPORTS -m comment --comment bench/svc-0:http -m tcp -p tcp --dport 30080 -j EXT"
        ));
        let last = [nat[nat.len() - 2].rsplit(' ').next(), nat.last().copied()];
        assert_eq!(last, [Some("KUBE-NODEPORTS"), Some("COMMIT")]);
    }

    #[test]
    fn a_change_writes_all_dispatch_rules_and_one_service() {
        let model = Model::new(Size::of(100));
        let text = change(&model, &model.moved());
        let count = |part: &str| text.lines().filter(|line| line.starts_with(part)).count();
        assert_eq!(count("-A KUBE-SERVICES "), 101);
        assert_eq!(count(":KUBE-SVC-"), 1);
        assert_eq!(count(":KUBE-SEP-"), 3);
        assert_eq!(count("-A PREROUTING"), 0, "it would be there twice");
        assert!(text.contains("--to-destination 10.244.8.4:8080"));
        assert!(!text.contains("--to-destination 10.244.8.1:8080"));
    }
}
