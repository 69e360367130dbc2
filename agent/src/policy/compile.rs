//! From policies and peers to what the maps must say: pure.
//!
//! ```text
//!  policies that select a pod ─► Rules: from whom (an atom) to which ports     one per pod and direction
//!  atoms of all rules ─► prefixes, each with its class: the atoms it is in     one table for the node
//! ```
//! An *atom* is something that a rule can name: a set of peers, those of a set whose named port is a
//! certain number, a block without its exceptions. A *class* is the set of atoms that an address is in.
//! The class of an address is that of its longest prefix in the table, because every prefix of a block
//! and of an exception is in the table: so overlapping blocks cost one lookup, like any address.
//!
//! What does not fit into the maps is refused, never allowed: the pod is closed and reported.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use gantry_api::proto;
use gantry_api::selector::Selector;
use imbl::OrdMap;
use ipnet::IpNet;

use super::prefix::{PortPrefix, Prefix, blocks};
use super::{Peers, PolicyName, StuckPod};

/// A pod of this node, as far as policies go.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct LocalPod {
    /// The pod's id in the maps: the hash of its UID.
    pub id: u64,
    /// metadata.namespace
    pub namespace: String,
    /// metadata.name
    pub name: String,
    /// metadata.labels
    pub labels: BTreeMap<String, String>,
    /// Its named ports.
    pub ports: Vec<proto::BackendPort>,
}

/// Something that a rule can name as a peer.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Atom {
    /// A block without its exceptions.
    Block {
        /// All of it.
        cidr: Prefix,
        /// Inside it, and not meant.
        except: BTreeSet<Prefix>,
    },
    /// The pods that a pair of selectors means.
    Set(String),
    /// Those of a set whose port `name` is `port`.
    Named {
        /// The set.
        set: String,
        /// IANA's number.
        protocol: u8,
        /// The port's name in the pod.
        name: String,
        /// Its number there.
        port: u16,
    },
}

/// The atoms that an address is in.
pub type Class = BTreeSet<Atom>;

/// Whose traffic a rule allows.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Match {
    /// Everybody's.
    Any,
    /// That of the addresses in an atom.
    In(Atom),
}

/// What a pod may receive, or send: everything that some entry allows.
pub type Rules = BTreeMap<Match, BTreeSet<PortPrefix>>;

/// What holds for one direction of a pod.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Ruling {
    /// No policy speaks of it: everything is allowed.
    Open,
    /// Nothing is allowed: its rules did not fit.
    Closed,
    /// Only this is allowed.
    Rules(Arc<Rules>),
}

/// Incoming and outgoing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rulings {
    /// What the pod may receive.
    pub ingress: Ruling,
    /// What it may send.
    pub egress: Ruling,
}

/// What the maps must say.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Wanted {
    /// Prefixes whose class differs from that of the one around them.
    pub peers: BTreeMap<Prefix, Arc<Class>>,
    /// Every pod of this node, by its id.
    pub endpoints: BTreeMap<u64, Rulings>,
}

/// How much fits.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Prefixes.
    pub peers: usize,
    /// Entries of all rules for all classes.
    pub rules: usize,
}

/// The ports that a class may use by these rules, beside what everybody may.
pub fn ports_of(rules: &Rules, class: &Class) -> BTreeSet<PortPrefix> {
    let found = class
        .iter()
        .filter_map(|atom| rules.get(&Match::In(atom.clone())));
    found.flatten().copied().collect()
}

/// A policy, read.
struct Reading<'a> {
    selector: Selector,
    policy: &'a proto::Policy,
}

fn read<'a>(
    policies: &'a OrdMap<PolicyName, Arc<proto::Policy>>,
) -> BTreeMap<&'a str, Vec<Reading<'a>>> {
    let mut by_namespace: BTreeMap<&str, Vec<Reading<'_>>> = BTreeMap::new();
    for (name, policy) in policies {
        let selector = serde_json::from_slice::<LabelSelector>(&policy.pod_selector_json);
        // One that cannot be read selects all pods of the namespace: rather closed than open.
        let selector = selector.ok().and_then(|s| Selector::from_api(&s).ok());
        let selector = selector.unwrap_or_default();
        let policies = by_namespace.entry(&name.namespace).or_default();
        policies.push(Reading { selector, policy });
    }
    by_namespace
}

/// Everything that the maps must say, and the pods whose rules do not fit.
pub fn compile(
    pods: &[LocalPod],
    policies: &OrdMap<PolicyName, Arc<proto::Policy>>,
    peers: &Peers,
    limits: Limits,
) -> (Wanted, Vec<StuckPod>) {
    let by_namespace = read(policies);
    let mut known: BTreeMap<Rules, Arc<Rules>> = BTreeMap::new();
    let mut share = |rules: Rules| {
        known
            .entry(rules.clone())
            .or_insert_with(|| rules.into())
            .clone()
    };
    let mut rulings = Vec::new();
    for pod in pods {
        let in_namespace = by_namespace.get(&*pod.namespace).into_iter().flatten();
        let selecting: Vec<&proto::Policy> = in_namespace
            .filter(|reading| reading.selector.matches(&pod.labels))
            .map(|reading| reading.policy)
            .collect();
        let ingress = selecting.iter().any(|policy| policy.ingress).then(|| {
            let policies = selecting.iter().filter(|policy| policy.ingress);
            share(incoming(pod, policies.flat_map(|policy| &policy.incoming)))
        });
        let egress = selecting.iter().any(|policy| policy.egress).then(|| {
            let policies = selecting.iter().filter(|policy| policy.egress);
            share(outgoing(
                peers,
                policies.flat_map(|policy| &policy.outgoing),
            ))
        });
        rulings.push((pod, [ingress, egress]));
    }
    let mut fit = Fit::new(peers, limits.peers);
    let mut stuck: BTreeMap<String, String> = BTreeMap::new();
    let wanted = rulings.iter().flat_map(|(_, both)| both.iter().flatten());
    let fitting: BTreeSet<&Arc<Rules>> = wanted.filter(|rules| fit.take(rules)).collect();
    let table = fit.table();
    let classes: BTreeSet<&Arc<Class>> = table.values().collect();
    let mut accepted: BTreeMap<&Arc<Rules>, bool> = BTreeMap::new();
    let mut free = limits.rules;
    let mut endpoints = BTreeMap::new();
    for (pod, both) in &rulings {
        let [ingress, egress] = both.each_ref().map(|rules| match rules {
            None => Ruling::Open,
            Some(rules) => {
                let fits = *accepted.entry(rules).or_insert_with(|| {
                    let cost = entries(rules, &classes);
                    let fits = fitting.contains(rules) && cost <= free;
                    free -= if fits { cost } else { 0 };
                    fits
                });
                if fits {
                    Ruling::Rules(rules.clone())
                } else {
                    let reason = format!(
                        "its network policies need more than the {} addresses or {} rules that this node \
                         can hold, so its traffic is refused",
                        limits.peers, limits.rules
                    );
                    stuck.insert(format!("{}/{}", pod.namespace, pod.name), reason);
                    Ruling::Closed
                }
            }
        });
        endpoints.insert(pod.id, Rulings { ingress, egress });
    }
    drop(accepted);
    let stuck = stuck
        .into_iter()
        .map(|(pod, reason)| StuckPod { pod, reason });
    let stuck = stuck.collect();
    let peers = table;
    (Wanted { peers, endpoints }, stuck)
}

fn entries(rules: &Rules, classes: &BTreeSet<&Arc<Class>>) -> usize {
    let any = rules.get(&Match::Any).map_or(0, BTreeSet::len);
    let own = classes.iter().map(|class| ports_of(rules, class).len());
    any + own.sum::<usize>()
}

fn incoming<'a>(pod: &LocalPod, rules: impl Iterator<Item = &'a proto::PolicyRule>) -> Rules {
    let mut all = Rules::new();
    for rule in rules {
        let mut ports = numbered(rule);
        // A named port is the pod's own.
        for port in rule.ports.iter().filter(|port| !port.name.is_empty()) {
            ports.extend(number_of(&pod.ports, port).and_then(single));
        }
        allow(&mut all, rule, &ports);
    }
    all
}

fn outgoing<'a>(peers: &Peers, rules: impl Iterator<Item = &'a proto::PolicyRule>) -> Rules {
    let mut all = Rules::new();
    for rule in rules {
        allow(&mut all, rule, &numbered(rule));
        // A named port is the peer's: it may be another number in each.
        for wanted in rule.ports.iter().filter(|port| !port.name.is_empty()) {
            for set in &rule.sets {
                let members = peers
                    .get(set)
                    .into_iter()
                    .flat_map(|members| members.values());
                let numbers = members.filter_map(|peer| number_of(&peer.ports, wanted));
                for (protocol, port) in numbers.collect::<BTreeSet<_>>() {
                    let (set, name) = (set.clone(), wanted.name.clone());
                    let atom = Atom::Named {
                        set,
                        protocol,
                        name,
                        port,
                    };
                    let ports = all.entry(Match::In(atom)).or_default();
                    ports.extend(single((protocol, port)));
                }
            }
        }
    }
    all
}

/// The ports of a rule that are given by number.
fn numbered(rule: &proto::PolicyRule) -> BTreeSet<PortPrefix> {
    if rule.any_port {
        return BTreeSet::from([PortPrefix::All]);
    }
    let given = rule.ports.iter().filter(|port| port.name.is_empty());
    let ranges = given.filter_map(|port| {
        Some((
            u8::try_from(port.protocol).ok()?,
            u16::try_from(port.first).ok()?,
            u16::try_from(port.last).ok()?,
        ))
    });
    ranges
        .flat_map(|(protocol, first, last)| blocks(protocol, first, last))
        .collect()
}

fn number_of(ports: &[proto::BackendPort], wanted: &proto::PolicyPort) -> Option<(u8, u16)> {
    let same =
        |port: &&proto::BackendPort| port.name == wanted.name && port.protocol == wanted.protocol;
    let found = ports.iter().find(same)?;
    Some((
        u8::try_from(found.protocol).ok()?,
        u16::try_from(found.port).ok()?,
    ))
}

fn single((protocol, port): (u8, u16)) -> Option<PortPrefix> {
    blocks(protocol, port, port).into_iter().next()
}

/// Adds what a rule allows on ports that are the same for all its peers.
fn allow(all: &mut Rules, rule: &proto::PolicyRule, ports: &BTreeSet<PortPrefix>) {
    if ports.is_empty() {
        return;
    }
    let sets = rule
        .sets
        .iter()
        .map(|set| Match::In(Atom::Set(set.clone())));
    let blocks = rule.blocks.iter().filter_map(block).map(Match::In);
    // Beside everybody, sets are named only for their named ports.
    let any = rule.any_peer.then_some(Match::Any);
    let named = sets.chain(blocks).filter(|_| !rule.any_peer);
    for peer in any.into_iter().chain(named) {
        all.entry(peer).or_default().extend(ports);
    }
}

/// None: it cannot be read, so it allows nobody.
fn block(block: &proto::PolicyBlock) -> Option<Atom> {
    let prefix = |text: &String| text.parse::<IpNet>().ok().map(Prefix::from);
    let except = block.except.iter().map(prefix);
    Some(Atom::Block {
        cidr: prefix(&block.cidr)?,
        except: except.collect::<Option<_>>()?,
    })
}

/// Which atoms' prefixes fit into the table together.
struct Fit<'a> {
    peers: &'a Peers,
    max: usize,
    atoms: BTreeMap<Atom, usize>,
    prefixes: BTreeMap<Prefix, Change>,
}

/// What begins, and what ends, at a prefix: numbers of atoms.
#[derive(Clone, Default)]
struct Change {
    begins: BTreeSet<usize>,
    ends: BTreeSet<usize>,
}

impl<'a> Fit<'a> {
    fn new(peers: &'a Peers, max: usize) -> Self {
        Self {
            peers,
            max,
            atoms: BTreeMap::new(),
            prefixes: BTreeMap::new(),
        }
    }

    /// Takes in the atoms of these rules, or none of them.
    fn take(&mut self, rules: &Rules) -> bool {
        let new = rules.keys().filter_map(|peer| match peer {
            Match::In(atom) if !self.atoms.contains_key(atom) => Some(atom),
            _ => None,
        });
        let new: Vec<(Atom, Vec<Prefix>)> = new
            .map(|atom| (atom.clone(), self.prefixes_of(atom)))
            .collect();
        let more = new.iter().flat_map(|(_, prefixes)| prefixes);
        let more: BTreeSet<&Prefix> = more
            .filter(|prefix| !self.prefixes.contains_key(*prefix))
            .collect();
        // One is left for the border between the families.
        if self.prefixes.len() + more.len() + 1 > self.max {
            return false;
        }
        for (atom, prefixes) in new {
            let number = self.atoms.len();
            for prefix in prefixes {
                let change = self.prefixes.entry(prefix).or_default();
                match &atom {
                    Atom::Block { except, .. } if except.contains(&prefix) => {
                        change.ends.insert(number);
                    }
                    _ => {
                        change.begins.insert(number);
                    }
                }
            }
            self.atoms.insert(atom, number);
        }
        true
    }

    fn prefixes_of(&self, atom: &Atom) -> Vec<Prefix> {
        let (set, port) = match atom {
            Atom::Block { cidr, except } => {
                return std::iter::once(cidr).chain(except).copied().collect();
            }
            Atom::Set(set) => (set, None),
            Atom::Named {
                set,
                protocol,
                name,
                port,
            } => (set, Some((*protocol, name, *port))),
        };
        let has = |peer: &proto::PolicyPeer| {
            port.is_none_or(|(protocol, name, port)| {
                peer.ports
                    .iter()
                    .find(|p| p.name == *name && p.protocol == u32::from(protocol))
                    .is_some_and(|p| p.port == u32::from(port))
            })
        };
        let members = self
            .peers
            .get(set)
            .into_iter()
            .flat_map(|members| members.values());
        let addresses = members
            .filter(|peer| has(peer))
            .flat_map(|peer| &peer.addresses);
        addresses
            .filter_map(|bytes| Prefix::from_bytes(bytes))
            .collect()
    }

    /// The class of every prefix where it differs from the class around it.
    fn table(self) -> BTreeMap<Prefix, Arc<Class>> {
        let mut names: Vec<Atom> = vec![Atom::Set(String::new()); self.atoms.len()];
        for (atom, number) in self.atoms {
            names[number] = atom;
        }
        let mut changes = self.prefixes;
        if changes.keys().any(|prefix| prefix.contains(Prefix::IPV4)) {
            changes.entry(Prefix::IPV4).or_default();
        }
        let mut shared: BTreeMap<BTreeSet<usize>, Arc<Class>> = BTreeMap::new();
        let mut around: Vec<(Prefix, BTreeSet<usize>)> = Vec::new();
        let mut table = BTreeMap::new();
        for (prefix, change) in changes {
            while around
                .last()
                .is_some_and(|(outer, _)| !outer.contains(prefix))
            {
                around.pop();
            }
            let outer = around
                .last()
                .map(|(_, class)| class.clone())
                .unwrap_or_default();
            // Blocks of IPv6 end where IPv4 begins.
            let inherited = if prefix == Prefix::IPV4 {
                BTreeSet::new()
            } else {
                outer.clone()
            };
            let mut class: BTreeSet<usize> = inherited.difference(&change.ends).copied().collect();
            class.extend(&change.begins);
            if class != outer {
                let content = shared.entry(class.clone()).or_insert_with(|| {
                    Arc::new(class.iter().map(|number| names[*number].clone()).collect())
                });
                table.insert(prefix, content.clone());
            }
            around.push((prefix, class));
        }
        table
    }
}
