//! Which policies speak of a pod, and which of them allow something: for `gantry explain`. Pure.
//!
//! The verdict is the programs'; this only finds whose it is.

use std::collections::BTreeMap;
use std::net::IpAddr;

use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use gantry_api::proto;
use gantry_api::selector::Selector;
use imbl::OrdMap;
use ipnet::IpNet;
use std::sync::Arc;

use super::{Peers, PolicyName};
use crate::services::index::{ip_of, parse_address};

/// One end of a connection, seen from a pod.
#[derive(Clone, Copy, Debug)]
pub struct Exchange<'a> {
    /// The pod begins it; else it is asked.
    pub outgoing: bool,
    /// The other end.
    pub peer: IpAddr,
    /// IANA protocol number.
    pub protocol: u8,
    /// The port that is asked for.
    pub port: u16,
    /// The pod's named ports.
    pub own_ports: &'a [proto::BackendPort],
}

/// The policies that select a pod in this direction, in order of their names.
pub fn selecting<'a>(
    policies: &'a OrdMap<PolicyName, Arc<proto::Policy>>,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    outgoing: bool,
) -> Vec<(&'a PolicyName, &'a proto::Policy)> {
    let selects = |policy: &proto::Policy| {
        let selector = serde_json::from_slice::<LabelSelector>(&policy.pod_selector_json);
        // As `compile` has it: what cannot be read selects everything.
        let selector = selector.ok().and_then(|s| Selector::from_api(&s).ok());
        selector.unwrap_or_default().matches(labels)
    };
    let all = policies.iter().map(|(name, policy)| (name, &**policy));
    all.filter(|(name, policy)| {
        let speaks = if outgoing {
            policy.egress
        } else {
            policy.ingress
        };
        speaks && name.namespace == namespace && selects(policy)
    })
    .collect()
}

/// Whether one of the policy's rules allows it.
pub fn allows(policy: &proto::Policy, peers: &Peers, exchange: &Exchange<'_>) -> bool {
    let rules = if exchange.outgoing {
        &policy.outgoing
    } else {
        &policy.incoming
    };
    rules.iter().any(|rule| {
        let by_peer = |peer: Option<&proto::PolicyPeer>| has_port(rule, peer, exchange);
        if rule.any_peer && by_peer(None) {
            return true;
        }
        let members = rule.sets.iter().filter_map(|set| peers.get(set));
        let mut members = members.flat_map(|set| set.values());
        let in_set = members.any(|peer| has(peer, exchange.peer) && by_peer(Some(peer)));
        in_set || rule.blocks.iter().any(|b| is_in(b, exchange.peer)) && by_peer(None)
    })
}

fn has(peer: &proto::PolicyPeer, address: IpAddr) -> bool {
    let addresses = peer
        .addresses
        .iter()
        .filter_map(|bytes| parse_address(bytes));
    addresses.map(|addr| ip_of(&addr)).any(|own| own == address)
}

fn is_in(block: &proto::PolicyBlock, address: IpAddr) -> bool {
    let contains = |cidr: &String| (cidr.parse::<IpNet>()).is_ok_and(|net| net.contains(&address));
    contains(&block.cidr) && !block.except.iter().any(contains)
}

/// A named port is that of the target: the pod's own, or the peer's.
fn has_port(
    rule: &proto::PolicyRule,
    peer: Option<&proto::PolicyPeer>,
    exchange: &Exchange<'_>,
) -> bool {
    let named: &[proto::BackendPort] = match (exchange.outgoing, peer) {
        (false, _) => exchange.own_ports,
        (true, Some(peer)) => &peer.ports,
        (true, None) => &[],
    };
    let (protocol, port) = (u32::from(exchange.protocol), u32::from(exchange.port));
    rule.any_port
        || rule.ports.iter().any(|wanted| {
            wanted.protocol == protocol
                && match wanted.name.as_str() {
                    "" => (wanted.first..=wanted.last).contains(&port),
                    name => named.iter().any(|own| {
                        own.name == name && own.protocol == protocol && own.port == port
                    }),
                }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(cidr: &str, except: &[&str]) -> proto::PolicyBlock {
        proto::PolicyBlock {
            cidr: cidr.into(),
            except: except.iter().map(|text| (*text).to_owned()).collect(),
        }
    }

    fn port(first: u32, last: u32, name: &str) -> proto::PolicyPort {
        proto::PolicyPort {
            protocol: 6,
            first,
            last,
            name: name.into(),
        }
    }

    #[test]
    fn a_rule_is_met_by_peer_and_port() {
        let peer = proto::PolicyPeer {
            addresses: vec![vec![10, 0, 0, 7].into()],
            ports: vec![proto::BackendPort {
                name: "http".into(),
                protocol: 6,
                port: 8_080,
            }],
        };
        let members = [("shop/web".to_owned(), Arc::new(peer))]
            .into_iter()
            .collect();
        let peers: Peers = [("s".to_owned(), Arc::new(members))].into_iter().collect();
        let sets = |ports| proto::PolicyRule {
            sets: vec!["s".into()],
            ports,
            ..Default::default()
        };
        let blocks = |ports| proto::PolicyRule {
            blocks: vec![block("10.0.0.0/8", &["10.0.1.0/24"])],
            any_port: true,
            ports,
            ..Default::default()
        };
        let cases = [
            (
                "a member on a port in the range",
                sets(vec![port(80, 90, "")]),
                "10.0.0.7",
                85,
                true,
            ),
            (
                "beyond the range",
                sets(vec![port(80, 90, "")]),
                "10.0.0.7",
                91,
                false,
            ),
            (
                "nobody of the set",
                sets(vec![port(80, 90, "")]),
                "10.0.0.8",
                85,
                false,
            ),
            (
                "the peer's named port",
                sets(vec![port(0, 0, "http")]),
                "10.0.0.7",
                8_080,
                true,
            ),
            (
                "another port than that",
                sets(vec![port(0, 0, "http")]),
                "10.0.0.7",
                80,
                false,
            ),
            ("in the block", blocks(vec![]), "10.9.9.9", 1, true),
            ("in its exception", blocks(vec![]), "10.0.1.9", 1, false),
        ];
        for (sentence, rule, peer, port, expected) in cases {
            let policy = proto::Policy {
                egress: true,
                outgoing: vec![rule],
                ..Default::default()
            };
            let mut exchange = Exchange {
                outgoing: true,
                peer: peer.parse().unwrap(),
                protocol: 6,
                port,
                own_ports: &[],
            };
            assert_eq!(allows(&policy, &peers, &exchange), expected, "{sentence}");
            exchange.outgoing = false;
            assert!(
                !allows(&policy, &peers, &exchange),
                "{sentence}: nothing comes in"
            );
        }
    }

    #[test]
    fn policies_select_by_namespace_labels_and_direction() {
        let policy = |selector: &str, ingress, egress| {
            Arc::new(proto::Policy {
                pod_selector_json: selector.as_bytes().to_vec().into(),
                ingress,
                egress,
                ..Default::default()
            })
        };
        let name = |namespace: &str, name: &str| PolicyName {
            namespace: namespace.into(),
            name: name.into(),
        };
        let policies: OrdMap<_, _> = [
            (name("shop", "all"), policy("{}", true, false)),
            (
                name("shop", "web"),
                policy(r#"{"matchLabels":{"app":"web"}}"#, true, true),
            ),
            (
                name("shop", "db"),
                policy(r#"{"matchLabels":{"app":"db"}}"#, true, true),
            ),
            (name("other", "all"), policy("{}", true, true)),
        ]
        .into_iter()
        .collect();
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        let found = |outgoing| {
            let found = selecting(&policies, "shop", &labels, outgoing);
            found
                .iter()
                .map(|(name, _)| name.name.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(found(false), ["all", "web"]);
        assert_eq!(found(true), ["web"]);
    }
}
