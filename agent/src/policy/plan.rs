//! From what the maps say to what they must say, one write at a time: pure.
//!
//! ```text
//!  pod ─► policy (number)                             OPEN: nothing asked, CLOSED or no row: nothing allowed
//!  peer's address ─► longest prefix ─► identity (number), 0: none
//!  (policy, identity, ports) or (policy, 0, ports) present ─► allowed
//! ```
//! The meaning of a policy's or an identity's number never changes while a packet can meet it: policies
//! and prefixes are *switched* to other numbers, whose rules were written before. So every pair of a pod
//! and a peer goes from what held to what shall hold in one write, never to anything else:
//! * only classes change: each prefix is switched, the policies stay as they are;
//! * only policies change: each endpoint is switched, the prefixes stay;
//! * both: prefixes are switched to identities of passage, which mean the old class to the old policies
//!   and the new class to the new ones; then the endpoints; then the prefixes to their plain identities.
//!   Where that would take more rules than fit, the pods are closed until all is written.
//!
//! New prefixes are written from long to short, so that none is met by an address that shall match a
//! longer one. Rules that nothing leads to any more stay for a second, for packets that are under way.
//! After a restart the numbers found in the maps mean nothing, so all of them are passed by.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ebpf_maps::policy::{POLICY_CLOSED, POLICY_FIRST, POLICY_OPEN, RULE_COUNT_MAX};

use super::compile::{Class, Match, Rules, Ruling, Rulings, Wanted, ports_of};
use super::prefix::{PortPrefix, Prefix};

/// How long rules stay that nothing leads to.
pub const QUARANTINE: Duration = Duration::from_secs(1);

/// Rules for passage: beside them the old and the new ones fit.
const COPY_COUNT_MAX: usize = RULE_COUNT_MAX as usize / 4;

/// No class at all: what holds for everybody.
const NOBODY: u32 = 0;

/// The numbers of a pod's policies.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pair {
    /// For what it receives.
    pub ingress: u32,
    /// For what it sends.
    pub egress: u32,
}

/// One entry of the rules.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Rule {
    /// The policy's number.
    pub policy: u32,
    /// The peer's identity; 0: any.
    pub identity: u32,
    /// Which ports.
    pub ports: PortPrefix,
}

/// One write to a map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Something is allowed.
    AddRule(Rule),
    /// It is not any more.
    RemoveRule(Rule),
    /// A prefix has this identity from now on.
    SetPeer(Prefix, u32),
    /// It has that of the prefix around it.
    RemovePeer(Prefix),
    /// A pod has these policies from now on.
    SetEndpoint(u64, Pair),
    /// It is gone: nothing is allowed any more.
    RemoveEndpoint(u64),
}

/// What the maps hold.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Found {
    /// Identities by prefix.
    pub peers: BTreeMap<Prefix, u32>,
    /// All rules.
    pub rules: BTreeSet<Rule>,
    /// Policies by the id of the pod.
    pub endpoints: BTreeMap<u64, Pair>,
}

/// See the module: the maps as they are, and what the numbers in them mean.
pub struct Table {
    peers: BTreeMap<Prefix, u32>,
    rules: BTreeMap<(u32, u32), BTreeSet<PortPrefix>>,
    endpoints: BTreeMap<u64, Pair>,
    classes: BTreeMap<u32, Arc<Class>>,
    policies: BTreeMap<u32, Arc<Rules>>,
    /// Rules that nothing leads to, and since when.
    idle: BTreeMap<(u32, u32), Duration>,
    last_policy: u32,
    last_identity: u32,
    /// More rules than this are not written for passage: then pods are closed for the time of the writes.
    copy_count_max: usize,
    /// The numbers of identities have been used up once: the next may be one that is still in use.
    came_round: bool,
}

/// What happens to a prefix.
struct Move {
    prefix: Prefix,
    /// The identity of its addresses now.
    old: u32,
    /// The class that they shall have.
    class: Arc<Class>,
    held: bool,
    wanted: bool,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            peers: BTreeMap::new(),
            rules: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            classes: BTreeMap::new(),
            policies: BTreeMap::new(),
            idle: BTreeMap::new(),
            last_policy: 0,
            last_identity: 0,
            copy_count_max: COPY_COUNT_MAX,
            came_round: false,
        }
    }
}

impl Table {
    /// With room for so many rules of passage.
    #[cfg(test)]
    pub fn with_room(copy_count_max: usize) -> Self {
        Self {
            copy_count_max,
            ..Self::default()
        }
    }

    /// The maps of an earlier agent. Its numbers mean nothing to this one.
    pub fn adopt(found: Found) -> Self {
        let mut table = Self {
            peers: found.peers,
            endpoints: found.endpoints,
            ..Self::default()
        };
        for rule in found.rules {
            let ports = table.rules.entry((rule.policy, rule.identity)).or_default();
            ports.insert(rule.ports);
        }
        let policies = table.rules.keys().map(|(policy, _)| *policy);
        let of_pods = table
            .endpoints
            .values()
            .flat_map(|pair| [pair.ingress, pair.egress]);
        table.last_policy = policies.chain(of_pods).max().unwrap_or(0);
        let identities = table.rules.keys().map(|(_, identity)| *identity);
        table.last_identity = identities
            .chain(table.peers.values().copied())
            .max()
            .unwrap_or(0);
        table
    }

    /// The writes that lead to `wanted`, in their order; the picture is then that of the maps after
    /// them. When one fails, the maps are to be adopted again.
    pub fn plan(&mut self, wanted: &Wanted, now: Duration) -> Vec<Step> {
        let moves = self.moves(wanted);
        let classes_move = moves.iter().any(|m| !self.means(m.old, &m.class));
        let policies_move = wanted.endpoints.iter().any(|(pod, rulings)| {
            self.endpoints
                .get(pod)
                .is_some_and(|pair| !self.rules_as(pair, rulings))
        });
        let both_move = classes_move && policies_move;
        let passage = both_move && self.copies(&moves, wanted) <= self.copy_count_max;
        let mut steps = Vec::new();
        let gone: Vec<u64> = self
            .endpoints
            .keys()
            .filter(|pod| !wanted.endpoints.contains_key(*pod))
            .copied()
            .collect();
        for pod in gone {
            self.endpoints.remove(&pod);
            steps.push(Step::RemoveEndpoint(pod));
        }
        let old_policies = self.policies_in_use();
        if both_move {
            // None of their numbers is taken again: to them, identities of passage mean other classes.
            old_policies.iter().for_each(|policy| {
                self.policies.remove(policy);
            });
        }
        if both_move && !passage {
            self.close(&mut steps);
        }
        let pairs = self.pairs(wanted);
        let (first, last) = self.identities(&moves, passage);
        if passage {
            self.copy_rules(&old_policies, &moves, &first, &mut steps);
        }
        let identities = first.iter().chain(&last).copied().chain([NOBODY]).collect();
        self.add_rules(&pairs, &identities, &mut steps);
        // From long to short: their order is that of the sorted prefixes, turned round.
        for (m, identity) in moves.iter().zip(&first).rev() {
            self.set_peer(m, *identity, &mut steps);
        }
        for (pod, pair) in pairs {
            if self.endpoints.insert(pod, pair) != Some(pair) {
                steps.push(Step::SetEndpoint(pod, pair));
            }
        }
        for (m, identity) in moves.iter().zip(&last).rev().filter(|(m, _)| m.wanted) {
            self.set_peer(m, *identity, &mut steps);
        }
        for m in moves.iter().filter(|m| m.held && !m.wanted) {
            self.peers.remove(&m.prefix);
            steps.push(Step::RemovePeer(m.prefix));
        }
        self.retire(now, &mut steps);
        steps
    }

    /// Whether a pod has policies, if only to be open.
    pub fn has(&self, pod: u64) -> bool {
        self.endpoints.contains_key(&pod)
    }

    /// A pod of which no policy speaks.
    pub fn open(&mut self, pod: u64) -> Step {
        let pair = Pair {
            ingress: POLICY_OPEN,
            egress: POLICY_OPEN,
        };
        self.endpoints.insert(pod, pair);
        Step::SetEndpoint(pod, pair)
    }

    /// A pod that is gone.
    pub fn forget(&mut self, pod: u64) -> Option<Step> {
        self.endpoints
            .remove(&pod)
            .map(|_| Step::RemoveEndpoint(pod))
    }

    /// How many rules the identities of passage would need, of the old policies and of the new ones.
    fn copies(&self, moves: &[Move], wanted: &Wanted) -> usize {
        let mut old_rules: BTreeMap<u32, usize> = BTreeMap::new();
        for ((_, identity), ports) in &self.rules {
            *old_rules.entry(*identity).or_insert(0) += ports.len();
        }
        let both = wanted
            .endpoints
            .values()
            .flat_map(|r| [&r.ingress, &r.egress]);
        let rules = both.filter_map(|ruling| match ruling {
            Ruling::Rules(rules) => Some(rules),
            Ruling::Open | Ruling::Closed => None,
        });
        let rules: BTreeSet<&Arc<Rules>> = rules.collect();
        let mut new_rules: BTreeMap<&Arc<Class>, usize> = BTreeMap::new();
        let moved = moves.iter().filter(|m| !self.means(m.old, &m.class));
        let passages: BTreeSet<(u32, &Arc<Class>)> = moved.map(|m| (m.old, &m.class)).collect();
        let counts = passages.into_iter().map(|(old, class)| {
            let new = new_rules
                .entry(class)
                .or_insert_with(|| rules.iter().map(|rules| ports_of(rules, class).len()).sum());
            old_rules.get(&old).copied().unwrap_or(0) + *new
        });
        counts.sum()
    }

    /// Closes every pod that has policies, until it gets its new ones.
    fn close(&mut self, steps: &mut Vec<Step>) {
        let closed = |policy: u32| policy.min(POLICY_CLOSED);
        for (pod, pair) in &mut self.endpoints {
            let (ingress, egress) = (closed(pair.ingress), closed(pair.egress));
            let new = Pair { ingress, egress };
            if *pair != new {
                *pair = new;
                steps.push(Step::SetEndpoint(*pod, new));
            }
        }
    }

    /// Every prefix that is held or wanted, sorted.
    fn moves(&self, wanted: &Wanted) -> Vec<Move> {
        let all: BTreeSet<Prefix> = self
            .peers
            .keys()
            .chain(wanted.peers.keys())
            .copied()
            .collect();
        let nothing: Arc<Class> = Arc::default();
        let mut around: Vec<(Prefix, u32, Arc<Class>)> = Vec::new();
        let mut moves = Vec::with_capacity(all.len());
        for prefix in all {
            while around
                .last()
                .is_some_and(|(outer, ..)| !outer.contains(prefix))
            {
                around.pop();
            }
            let outer = around.last().map(|(_, old, class)| (*old, class));
            let (old_around, class_around) = outer.unwrap_or((NOBODY, &nothing));
            let (held, new) = (self.peers.get(&prefix), wanted.peers.get(&prefix));
            let (old, class) = (
                *held.unwrap_or(&old_around),
                new.unwrap_or(class_around).clone(),
            );
            around.push((prefix, old, class.clone()));
            let (held, wanted) = (held.is_some(), new.is_some());
            moves.push(Move {
                prefix,
                old,
                class,
                held,
                wanted,
            });
        }
        moves
    }

    /// Whether an identity is known to stand for a class.
    fn means(&self, identity: u32, class: &Class) -> bool {
        match identity {
            NOBODY => class.is_empty(),
            identity => self
                .classes
                .get(&identity)
                .is_some_and(|known| **known == *class),
        }
    }

    /// Whether a pod's policies are known to be these.
    fn rules_as(&self, pair: &Pair, rulings: &Rulings) -> bool {
        let same = |policy: u32, ruling: &Ruling| match ruling {
            Ruling::Open => policy == POLICY_OPEN,
            Ruling::Closed => policy == POLICY_CLOSED,
            Ruling::Rules(rules) => self
                .policies
                .get(&policy)
                .is_some_and(|known| known == rules),
        };
        same(pair.ingress, &rulings.ingress) && same(pair.egress, &rulings.egress)
    }

    fn policies_in_use(&self) -> BTreeSet<u32> {
        let all = self
            .endpoints
            .values()
            .flat_map(|pair| [pair.ingress, pair.egress]);
        all.filter(|policy| *policy >= POLICY_FIRST).collect()
    }

    /// Numbers for what the pods shall have: known ones, or new ones.
    fn pairs(&mut self, wanted: &Wanted) -> BTreeMap<u64, Pair> {
        let known = self
            .policies
            .iter()
            .map(|(number, rules)| (rules.clone(), *number));
        let mut known: BTreeMap<Arc<Rules>, u32> = known.collect();
        let mut number = |ruling: &Ruling| match ruling {
            Ruling::Open => POLICY_OPEN,
            Ruling::Closed => POLICY_CLOSED,
            Ruling::Rules(rules) => *known.entry(rules.clone()).or_insert_with(|| {
                self.last_policy = next(self.last_policy, POLICY_FIRST, |number| {
                    self.rules
                        .range((number, 0)..=(number, u32::MAX))
                        .next()
                        .is_some()
                        || self.policies.contains_key(&number)
                });
                self.policies.insert(self.last_policy, rules.clone());
                self.last_policy
            }),
        };
        let pairs = wanted.endpoints.iter().map(|(pod, rulings)| {
            let (ingress, egress) = (number(&rulings.ingress), number(&rulings.egress));
            (*pod, Pair { ingress, egress })
        });
        pairs.collect()
    }

    /// The identity that each prefix is switched to first, and the one that it ends with.
    fn identities(&mut self, moves: &[Move], passage: bool) -> (Vec<u32>, Vec<u32>) {
        let known = self
            .classes
            .iter()
            .rev()
            .map(|(number, class)| (class.clone(), *number));
        let mut plain: BTreeMap<Arc<Class>, u32> = known.collect();
        plain.insert(Arc::default(), NOBODY);
        let mut passages: BTreeMap<(u32, Arc<Class>), u32> = BTreeMap::new();
        let (mut first, mut last) = (Vec::new(), Vec::new());
        for m in moves {
            if self.means(m.old, &m.class) {
                first.push(m.old);
                last.push(m.old);
                continue;
            }
            let end = match plain.get(&m.class) {
                Some(number) => *number,
                None => {
                    let number = self.new_identity(&m.class);
                    plain.insert(m.class.clone(), number);
                    number
                }
            };
            last.push(end);
            let pair = (m.old, m.class.clone());
            first.push(match passages.get(&pair) {
                _ if !passage => end,
                Some(number) => *number,
                None => {
                    let number = self.new_identity(&m.class);
                    passages.insert(pair, number);
                    number
                }
            });
        }
        (first, last)
    }

    fn new_identity(&mut self, class: &Arc<Class>) -> u32 {
        let last = self.last_identity;
        self.came_round |= last == u32::MAX;
        let used: BTreeSet<u32> = if self.came_round {
            let of_rules = self.rules.keys().map(|(_, identity)| *identity);
            of_rules.chain(self.peers.values().copied()).collect()
        } else {
            BTreeSet::new()
        };
        self.last_identity = next(last, NOBODY + 1, |number| {
            used.contains(&number) || self.classes.contains_key(&number)
        });
        self.classes.insert(self.last_identity, class.clone());
        self.last_identity
    }

    /// To the old policies, an identity of passage is the old identity.
    fn copy_rules(
        &mut self,
        old_policies: &BTreeSet<u32>,
        moves: &[Move],
        first: &[u32],
        steps: &mut Vec<Step>,
    ) {
        let changed = moves
            .iter()
            .zip(first)
            .filter(|(m, first)| m.old != **first);
        let passages: BTreeSet<(u32, u32)> = changed.map(|(m, first)| (*first, m.old)).collect();
        for policy in old_policies {
            for (passage, old) in &passages {
                // What everybody may, identity 0, holds anyway.
                let ports = match *old {
                    NOBODY => BTreeSet::new(),
                    old => self.rules.get(&(*policy, old)).cloned().unwrap_or_default(),
                };
                self.add(*policy, *passage, ports, steps);
            }
        }
    }

    fn add_rules(
        &mut self,
        pairs: &BTreeMap<u64, Pair>,
        identities: &BTreeSet<u32>,
        steps: &mut Vec<Step>,
    ) {
        let used: BTreeSet<u32> = pairs.values().flat_map(|p| [p.ingress, p.egress]).collect();
        for policy in used {
            let Some(rules) = self.policies.get(&policy).cloned() else {
                continue;
            };
            for identity in identities {
                let ports = match (*identity, self.classes.get(identity)) {
                    (NOBODY, _) => rules.get(&Match::Any).cloned().unwrap_or_default(),
                    (_, Some(class)) => ports_of(&rules, class),
                    (_, None) => continue,
                };
                self.add(policy, *identity, ports, steps);
            }
        }
    }

    fn add(
        &mut self,
        policy: u32,
        identity: u32,
        ports: BTreeSet<PortPrefix>,
        steps: &mut Vec<Step>,
    ) {
        if ports.is_empty() {
            return;
        }
        let held = self.rules.entry((policy, identity)).or_default();
        for ports in ports {
            if held.insert(ports) {
                steps.push(Step::AddRule(Rule {
                    policy,
                    identity,
                    ports,
                }));
            }
        }
    }

    fn set_peer(&mut self, m: &Move, identity: u32, steps: &mut Vec<Step>) {
        let known = if m.wanted {
            self.peers.insert(m.prefix, identity)
        } else {
            // It goes at once after, to the class around it.
            self.peers.get(&m.prefix).copied()
        };
        if known != Some(identity) {
            self.peers.insert(m.prefix, identity);
            steps.push(Step::SetPeer(m.prefix, identity));
        }
    }

    /// Removes the rules that have been out of use for long enough, or all of them when the map is
    /// nearly full: then a packet under way may be refused.
    fn retire(&mut self, now: Duration, steps: &mut Vec<Step>) {
        let policies = self.policies_in_use();
        let identities: BTreeSet<u32> = self.peers.values().copied().chain([NOBODY]).collect();
        let used = |(policy, identity): &(u32, u32)| {
            policies.contains(policy) && identities.contains(identity)
        };
        self.idle.retain(|entry, _| !used(entry));
        for entry in self.rules.keys().filter(|entry| !used(entry)) {
            self.idle.entry(*entry).or_insert(now);
        }
        let count: usize = self.rules.values().map(BTreeSet::len).sum();
        let crowded = count > RULE_COUNT_MAX as usize / 2;
        let due = |since: &Duration| crowded || now.saturating_sub(*since) >= QUARANTINE;
        let due: Vec<(u32, u32)> = self
            .idle
            .iter()
            .filter(|(_, since)| due(since))
            .map(|(entry, _)| *entry)
            .collect();
        for entry in due {
            self.idle.remove(&entry);
            let (policy, identity) = entry;
            let ports = self.rules.remove(&entry).unwrap_or_default();
            let rules = ports.into_iter().map(|ports| Rule {
                policy,
                identity,
                ports,
            });
            steps.extend(rules.map(Step::RemoveRule));
        }
        let with_rules: BTreeSet<u32> = self.rules.keys().map(|(policy, _)| *policy).collect();
        self.policies
            .retain(|number, _| policies.contains(number) || with_rules.contains(number));
        let with_rules: BTreeSet<u32> = self.rules.keys().map(|(_, identity)| *identity).collect();
        self.classes
            .retain(|number, _| identities.contains(number) || with_rules.contains(number));
    }
}

/// The next number that nothing uses; numbers come round after four billion.
fn next(last: u32, first: u32, used: impl Fn(u32) -> bool) -> u32 {
    let mut number = last;
    loop {
        number = number.checked_add(1).unwrap_or(first).max(first);
        if !used(number) {
            return number;
        }
    }
}
