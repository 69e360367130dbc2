//! What the cluster's own names mean at one revision. Pure: a question and a view give an answer.
//!
//! ```text
//! web.shop.svc.cluster.local         A, AAAA  cluster IPs; of a headless Service: every serving backend
//! _http._tcp.web.shop.svc.…          SRV      the named port, once per cluster IP name or backend
//! db-0.db.shop.svc.…                 A, AAAA  one backend of a headless Service, by hostname
//! 10-244-1-5.db.shop.svc.…           A, AAAA  … or by its address with dashes
//! 10-244-1-5.shop.pod.…              A, AAAA  any pod address
//! 1.0.96.10.in-addr.arpa             PTR      cluster IPs and backends of headless Services
//! ext.shop.svc.…                     CNAME    a Service of type ExternalName
//! ```
//! A name below the domain is answered here or does not exist; it is never asked upstream. Names
//! compare without case, and the answer repeats the question's spelling.
//!
//! Source: "Kubernetes DNS-Based Service Discovery" 1.1.0, and RFC 2308 for negative answers.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, OnceLock};

use gantry_api::proto;
use gantry_api::proto::backend::State;
use gantry_shim::names::{ALIAS, MORE};
use hickory_proto::op::Query;
use hickory_proto::rr::rdata::{A, AAAA, CNAME, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use crate::view::{ServiceName, View};

/// How long a cluster IP may be cached, in seconds. It changes only when a Service is made anew.
const SERVICE_TTL_S: u32 = 5;
/// How long a backend's address, or a name's absence, may be cached, in seconds.
const BACKEND_TTL_S: u32 = 1;
/// The version of the schema above, served as `dns-version.<domain>`.
const SCHEMA_VERSION: &str = "1.1.0";
/// Where no domain is configured (yet).
const DOMAIN_DEFAULT: &str = "cluster.local";
/// SRV: all backends alike.
const SRV_PRIORITY: u16 = 0;
const SRV_WEIGHT: u16 = 100;

/// What to answer.
#[allow(
    clippy::large_enum_variant,
    reason = "one is alive per question in work"
)]
#[derive(Clone, PartialEq, Debug)]
pub enum Answer {
    /// The name is not the cluster's: ask upstream.
    Forward,
    /// It is, but the cluster's state is not known yet: SERVFAIL, so that the client tries again.
    NotReady,
    /// Records; an empty list means that the name exists, but not with this type.
    Found {
        /// The answer section.
        answers: Vec<Record>,
        /// Addresses of SRV targets.
        additionals: Vec<Record>,
    },
    /// An alias; the target's records of the same type follow, from wherever they are.
    Alias {
        /// The CNAME record.
        record: Record,
        /// Where it leads.
        target: Name,
    },
    /// No such name.
    NoName,
}

/// The cluster's names at one view.
pub struct Zone {
    view: Arc<View>,
    domain: Name,
    /// Built at the first reverse question: most views never see one.
    reverse: OnceLock<HashMap<IpAddr, Name>>,
}

/// Answers one question. A shorthand for a [`Zone`] used once.
pub fn answer(query: &Query, view: &Arc<View>) -> Answer {
    Zone::new(view.clone()).answer(query)
}

impl Zone {
    /// Takes the domain from the view's settings.
    pub fn new(view: Arc<View>) -> Self {
        let configured = view.settings.cluster_domain.trim_end_matches('.');
        let domain = if configured.is_empty() {
            DOMAIN_DEFAULT
        } else {
            configured
        };
        let mut domain = Name::from_ascii(domain)
            .or_else(|_| Name::from_ascii(DOMAIN_DEFAULT))
            .unwrap_or_else(|_| Name::root());
        domain.set_fqdn(true);
        Self {
            view,
            domain: domain.to_lowercase(),
            reverse: OnceLock::new(),
        }
    }

    /// The view it answers from.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// `cluster.local.`
    pub fn domain(&self) -> String {
        self.domain.to_ascii()
    }

    /// Whether a name is the cluster's domain or below it.
    pub fn is_own(&self, name: &Name) -> bool {
        self.domain.zone_of(name)
    }

    /// Whether a name is that of a Service that exists, or below it.
    pub(super) fn is_of_service(&self, name: &Name) -> bool {
        let name = name.to_lowercase();
        let depth = name.num_labels().checked_sub(self.domain.num_labels());
        let labels = name.iter().take(depth.unwrap_or(0).into());
        let labels: Option<Vec<&str>> = labels.map(|l| std::str::from_utf8(l).ok()).collect();
        let Some([.., name, namespace, "svc"]) = labels.as_deref() else {
            return false;
        };
        self.view.services.contains_key(&ServiceName {
            namespace: (*namespace).into(),
            name: (*name).into(),
        })
    }

    /// Answers one question.
    pub fn answer(&self, query: &Query) -> Answer {
        let name = query.name().to_lowercase();
        if self.domain.zone_of(&name) {
            if self.view.rev == 0 {
                return Answer::NotReady;
            }
            let depth = usize::from(name.num_labels() - self.domain.num_labels());
            let labels: Option<Vec<&str>> = name
                .iter()
                .take(depth)
                .map(|label| std::str::from_utf8(label).ok())
                .collect();
            return match labels {
                Some(labels) => self.forward_name(query, &labels),
                None => Answer::NoName,
            };
        }
        match name.parse_arpa_name() {
            Ok(prefix) if prefix.prefix_len() == prefix.max_prefix_len() => {
                self.reverse_name(query, prefix.addr())
            }
            _ => Answer::Forward,
        }
    }

    /// `labels`: what stands before the domain, lower case.
    fn forward_name(&self, query: &Query, labels: &[&str]) -> Answer {
        match labels {
            [] if query.query_type() == RecordType::SOA => found(vec![self.soa(query.name())]),
            [] | ["svc"] | ["pod"] => found(Vec::new()),
            ["dns-version"] => match query.query_type() {
                RecordType::TXT => {
                    let text = RData::TXT(TXT::new(vec![SCHEMA_VERSION.into()]));
                    found(vec![record(query.name(), SERVICE_TTL_S, text)])
                }
                _ => found(Vec::new()),
            },
            [namespace, "svc"] if self.has_namespace(namespace) => found(Vec::new()),
            // Names of addresses exist below any namespace, so it exists too (RFC 8020).
            [_namespace, "pod"] => found(Vec::new()),
            [rest @ .., name, namespace, "svc"] => {
                let service = ServiceName {
                    namespace: (*namespace).into(),
                    name: (*name).into(),
                };
                match self.view.services.get(&service) {
                    Some(found) => self.service(query, rest, &service, found),
                    None => Answer::NoName,
                }
            }
            [address, _namespace, "pod"] => match dashed(address) {
                Some(address) => found(address_record(query, query.name(), address, BACKEND_TTL_S)),
                None => Answer::NoName,
            },
            _ => Answer::NoName,
        }
    }

    fn has_namespace(&self, namespace: &str) -> bool {
        let first = ServiceName {
            namespace: namespace.into(),
            name: String::new(),
        };
        let mut after = self.view.services.range(first..);
        after
            .next()
            .is_some_and(|(name, _)| name.namespace == namespace)
    }

    /// `rest`: what stands before the Service's own name.
    fn service(
        &self,
        query: &Query,
        rest: &[&str],
        name: &ServiceName,
        service: &proto::Service,
    ) -> Answer {
        if service.r#type == "ExternalName" {
            return match rest {
                [] => alias(query, &service.external_name),
                _ => Answer::NoName,
            };
        }
        match rest {
            [] if query.query_type() == RecordType::SRV => self.srv(query, name, service, |_| true),
            [] => found(self.service_addresses(query, name, service)),
            [protocol] if protocol_number(protocol).is_some() => found(Vec::new()),
            [host] => {
                let mut records = Vec::new();
                let mut exists = false;
                for backend in self.serving(name, service) {
                    for address in addresses(&backend.addresses) {
                        if host_label(backend, address) == *host {
                            exists = true;
                            let owner = query.name();
                            records.extend(address_record(query, owner, address, BACKEND_TTL_S));
                        }
                    }
                }
                if exists {
                    found(records)
                } else {
                    Answer::NoName
                }
            }
            [port, protocol] => {
                let (Some(port), Some(number)) =
                    (port.strip_prefix('_'), protocol_number(protocol))
                else {
                    return Answer::NoName;
                };
                let wanted = |p: &proto::ServicePort| p.name == port && p.protocol == number;
                if !service.ports.iter().any(wanted) {
                    return Answer::NoName;
                }
                match query.query_type() {
                    RecordType::SRV => self.srv(query, name, service, wanted),
                    _ => found(Vec::new()),
                }
            }
            _ => Answer::NoName,
        }
    }

    fn service_addresses(
        &self,
        query: &Query,
        name: &ServiceName,
        service: &proto::Service,
    ) -> Vec<Record> {
        let owner = query.name();
        if !service.cluster_ips.is_empty() {
            let ips = addresses(&service.cluster_ips);
            return ips
                .flat_map(|ip| address_record(query, owner, ip, SERVICE_TTL_S))
                .collect();
        }
        (self.serving(name, service))
            .flat_map(|backend| addresses(&backend.addresses))
            .flat_map(|ip| address_record(query, owner, ip, BACKEND_TTL_S))
            .collect()
    }

    /// SRV records of the ports that `wanted` takes, with the targets' addresses.
    fn srv(
        &self,
        query: &Query,
        name: &ServiceName,
        service: &proto::Service,
        wanted: impl Fn(&proto::ServicePort) -> bool,
    ) -> Answer {
        let (mut answers, mut additionals) = (Vec::new(), Vec::new());
        let owner = query.name();
        let Some(service_name) = self.name_of(&[&name.name, &name.namespace, "svc"]) else {
            return Answer::NoName;
        };
        let srv = |port: u32, target: &Name| {
            let port = u16::try_from(port).unwrap_or_default();
            RData::SRV(SRV::new(SRV_PRIORITY, SRV_WEIGHT, port, target.clone()))
        };
        let ports: Vec<_> = service.ports.iter().filter(|port| wanted(port)).collect();
        if !service.cluster_ips.is_empty() {
            for port in ports {
                let data = srv(port.port, &service_name);
                answers.push(record(owner, SERVICE_TTL_S, data));
            }
            for ip in addresses(&service.cluster_ips) {
                additionals.push(record(&service_name, SERVICE_TTL_S, rdata(ip)));
            }
            return Answer::Found {
                answers,
                additionals,
            };
        }
        for backend in self.serving(name, service) {
            for address in addresses(&backend.addresses) {
                let host = host_label(backend, address);
                let Some(target) = self.name_of(&[&host, &name.name, &name.namespace, "svc"])
                else {
                    continue;
                };
                for port in &ports {
                    let pair = backend.ports.iter().find(|backend_port| {
                        backend_port.name == port.name && backend_port.protocol == port.protocol
                    });
                    if let Some(pair) = pair {
                        answers.push(record(owner, BACKEND_TTL_S, srv(pair.port, &target)));
                    }
                }
                additionals.push(record(&target, BACKEND_TTL_S, rdata(address)));
            }
        }
        Answer::Found {
            answers,
            additionals,
        }
    }

    /// The backends whose addresses are published.
    fn serving<'a>(
        &'a self,
        name: &ServiceName,
        service: &'a proto::Service,
    ) -> impl Iterator<Item = &'a proto::Backend> {
        let backends = self.view.backends.get(name);
        backends
            .into_iter()
            .flat_map(|backends| backends.values())
            .filter_map(|backend| {
                let serves = backend.state() == State::Serving || service.publish_not_ready;
                serves.then_some(backend.as_ref())
            })
    }

    fn reverse_name(&self, query: &Query, address: IpAddr) -> Answer {
        let settings = &self.view.settings;
        let known = self.reverse.get_or_init(|| self.reverse_index());
        if let Some(name) = known.get(&address) {
            return match query.query_type() {
                RecordType::PTR => {
                    let data = RData::PTR(PTR(name.clone()));
                    found(vec![record(query.name(), BACKEND_TTL_S, data)])
                }
                _ => found(Vec::new()),
            };
        }
        let mut prefixes = settings.service_cidrs().chain(settings.cluster_cidrs());
        if prefixes.any(|prefix| prefix.contains(&address)) {
            return Answer::NoName;
        }
        Answer::Forward
    }

    fn reverse_index(&self) -> HashMap<IpAddr, Name> {
        let mut index = HashMap::new();
        for (name, service) in self.view.services.iter() {
            let labels = [name.name.as_str(), name.namespace.as_str(), "svc"];
            for ip in addresses(&service.cluster_ips) {
                if let Some(name) = self.name_of(&labels) {
                    index.insert(ip, name);
                }
            }
            if !service.cluster_ips.is_empty() {
                continue;
            }
            for backend in self.serving(name, service) {
                for address in addresses(&backend.addresses) {
                    let host = host_label(backend, address);
                    if let Some(name) = self.name_of(&[&host, labels[0], labels[1], "svc"]) {
                        index.entry(address).or_insert(name);
                    }
                }
            }
        }
        index
    }

    /// Every name below `svc` that has addresses, as [`gantry_shim::names`] wants it: the name
    /// without `svc` and the domain, and words.
    pub(super) fn each_name(&self, mut take: impl FnMut(&str, &[String])) {
        for (name, service) in self.view.services.iter() {
            let own = format!("{}.{}", name.name, name.namespace);
            let mut words: Vec<String> = addresses(&service.cluster_ips)
                .map(|ip| ip.to_string())
                .collect();
            if service.r#type == "ExternalName" {
                words = vec![ALIAS.to_owned()];
            } else if !words.is_empty() {
                words.push(MORE.to_owned());
            }
            if !words.is_empty() {
                take(&own, &words);
                continue;
            }
            let mut hosts: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for backend in self.serving(name, service) {
                for address in addresses(&backend.addresses) {
                    words.push(address.to_string());
                    let host = format!("{}.{own}", host_label(backend, address));
                    hosts.entry(host).or_default().push(address.to_string());
                }
            }
            take(&own, &words);
            for (host, words) in hosts {
                take(&host, &words);
            }
        }
    }

    /// A name below the domain; none when a label is no label (the API would have refused it).
    fn name_of(&self, labels: &[&str]) -> Option<Name> {
        let relative = Name::from_labels(labels.iter().map(|label| label.as_bytes())).ok()?;
        relative.append_domain(&self.domain).ok()
    }

    /// The record that goes with every negative answer. Its owner is above the asked name: caches
    /// believe no other (RFC 2308).
    pub fn soa(&self, asked: &Name) -> Record {
        let owner = match self.is_own(asked) {
            true => self.domain.clone(),
            // `in-addr.arpa` or `ip6.arpa`
            false => asked.trim_to(2),
        };
        let below = |label: &str| {
            self.name_of(&[label])
                .unwrap_or_else(|| self.domain.clone())
        };
        // The serial wraps after 2^32 revisions; nobody transfers this zone.
        let serial = self.view.rev as u32;
        let (refresh_s, retry_s, expire_s) = (7200, 1800, 86_400);
        let data = SOA::new(
            below("ns"),
            below("hostmaster"),
            serial,
            refresh_s,
            retry_s,
            expire_s,
            BACKEND_TTL_S,
        );
        record(&owner, BACKEND_TTL_S, RData::SOA(data))
    }
}

fn found(answers: Vec<Record>) -> Answer {
    Answer::Found {
        answers,
        additionals: Vec::new(),
    }
}

fn record(owner: &Name, ttl_s: u32, data: RData) -> Record {
    Record::from_rdata(owner.clone(), ttl_s, data)
}

fn rdata(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    }
}

/// One record when the question asks for the address's family, else none.
fn address_record(query: &Query, owner: &Name, address: IpAddr, ttl_s: u32) -> Vec<Record> {
    let data = rdata(address);
    if data.record_type() == query.query_type() {
        vec![record(owner, ttl_s, data)]
    } else {
        Vec::new()
    }
}

fn alias(query: &Query, external_name: &str) -> Answer {
    let Ok(mut target) = Name::from_ascii(external_name) else {
        return found(Vec::new());
    };
    target.set_fqdn(true);
    let record = record(
        query.name(),
        SERVICE_TTL_S,
        RData::CNAME(CNAME(target.clone())),
    );
    match query.query_type() {
        RecordType::CNAME => found(vec![record]),
        _ => Answer::Alias { record, target },
    }
}

/// `_tcp` -> 6
fn protocol_number(label: &str) -> Option<u32> {
    match label {
        "_tcp" => Some(6),
        "_udp" => Some(17),
        "_sctp" => Some(132),
        _ => None,
    }
}

/// The label of one backend: its hostname, or its address with dashes.
fn host_label(backend: &proto::Backend, address: IpAddr) -> String {
    if !backend.hostname.is_empty() {
        return backend.hostname.to_ascii_lowercase();
    }
    match address {
        IpAddr::V4(address) => address.to_string().replace('.', "-"),
        // Uncompressed: a label must not begin or end with a dash.
        IpAddr::V6(address) => address
            .segments()
            .map(|segment| format!("{segment:x}"))
            .join("-"),
    }
}

/// `10-244-1-5` or `fd00-0-0-0-0-0-0-5` (also `fd00--5`).
fn dashed(label: &str) -> Option<IpAddr> {
    let v4 = label
        .replace('-', ".")
        .parse::<Ipv4Addr>()
        .ok()
        .map(IpAddr::V4);
    v4.or_else(|| {
        label
            .replace('-', ":")
            .parse::<Ipv6Addr>()
            .ok()
            .map(IpAddr::V6)
    })
}

/// Addresses of 4 or 16 bytes; others are not addresses.
fn addresses<B: AsRef<[u8]>>(raw: &[B]) -> impl Iterator<Item = IpAddr> {
    raw.iter().filter_map(|bytes| {
        let bytes = bytes.as_ref();
        let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
        v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
            .ok()
    })
}

#[cfg(test)]
pub(super) mod tests;
