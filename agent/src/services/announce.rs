//! Which node says that it has a load balancer address: exactly one, chosen without talk.
//!
//! Every node gives the address a weight by its own name; the heaviest of those that the feed names
//! announces it. So a node that comes or goes moves only its own share of addresses. With
//! `externalTrafficPolicy: Local` only nodes with a backend are asked, as long as there are any.
//!
//! Which nodes are there is seen on the link (see [`super::liveness`]): a machine that has lost its power
//! is out within two seconds, one that only the control plane does not hear stays. Where nothing is seen,
//! a node that the control plane has given up announces nothing. This node always takes its own share:
//! whoever sees it expects that.
//!
//! Invariants, checked by the tests: nodes that see the same agree; whatever each has seen, an address
//! whose first node is there and believed to be is that node's; whoever announces has nobody before it
//! that it does not believe to be gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ebpf_maps::services::{Addr, mix, weight};
use gantry_api::proto;
use gantry_api::proto::backend::State;
use imbl::OrdMap;

use super::changed::Shared;
use super::index::{label32, parse_address};
use super::liveness::Seen;
use crate::view::{Backends, ServiceName};

/// So many nodes that come before this one for an address are watched, for their power may be lost at once.
pub const DEPTH: usize = 4;

/// What is to be watched: nodes, each with an address that it announces when it is there.
pub type Watch = BTreeMap<String, Option<Addr>>;

/// Who chooses, and what is known of the others.
pub struct Around<'a> {
    /// The nodes of the view.
    pub nodes: &'a OrdMap<String, Arc<proto::NodeRoute>>,
    /// This one.
    pub own: &'a str,
    /// What of them is seen on the link.
    pub seen: &'a Seen,
}

impl Around<'_> {
    /// Whether a node takes its share. This node does; of others the link knows better than the control
    /// plane.
    fn is_there(&self, name: &str, node: &proto::NodeRoute) -> bool {
        let answers = name == self.own || self.seen.answers.contains(name);
        answers || !node.dead && !self.seen.silent.contains(name)
    }
}

/// The addresses that this node announces, by Service, and whom it watches because of them.
#[derive(Debug, Default)]
pub struct Announcements {
    by_service: BTreeMap<ServiceName, Share>,
}

/// Of one Service.
#[derive(Debug, Default)]
struct Share {
    own: BTreeSet<Addr>,
    watch: Watch,
}

impl Announcements {
    /// Looks at these Services again; those that are gone announce nothing.
    pub fn update<'a>(
        &mut self,
        names: impl Iterator<Item = &'a ServiceName>,
        services: &Shared,
        around: &Around<'_>,
    ) {
        for name in names {
            let service = services.service(name);
            let share = service.map(|it| share(it, services.backends(name), around));
            match share.filter(|it| !it.own.is_empty() || !it.watch.is_empty()) {
                Some(share) => drop(self.by_service.insert(name.clone(), share)),
                None => drop(self.by_service.remove(name)),
            }
        }
    }

    /// Looks at every Service again.
    pub fn update_all(&mut self, services: &Shared, around: &Around<'_>) {
        self.by_service.clear();
        // Most have no such address, and are not looked for.
        let balanced = services.services();
        let balanced = balanced.filter(|(_, it)| !it.load_balancer_ips.is_empty());
        self.update(balanced.map(|(name, _)| name), services, around);
    }

    /// All of them.
    pub fn addresses(&self) -> BTreeSet<Addr> {
        let shares = self.by_service.values();
        shares.flat_map(|share| &share.own).copied().collect()
    }

    /// Whom this node has to take addresses over from.
    pub fn watch(&self) -> Watch {
        let mut all = Watch::new();
        for (name, claim) in self.by_service.values().flat_map(|share| &share.watch) {
            let known = all.entry(name.clone()).or_insert(*claim);
            *known = [*known, *claim].into_iter().flatten().min();
        }
        all
    }
}

fn share(service: &proto::Service, backends: Option<&Backends>, around: &Around<'_>) -> Share {
    let mut share = Share::default();
    let addresses = service.load_balancer_ips.iter();
    let mut addresses = addresses
        .filter_map(|bytes| parse_address(bytes))
        .peekable();
    if addresses.peek().is_none() {
        return share;
    }
    let all: BTreeSet<&str> = around.nodes.keys().map(String::as_str).collect();
    let nodes = around.nodes.iter();
    let there = nodes.filter(|(name, node)| around.is_there(name, node));
    let there: BTreeSet<&str> = there.map(|(name, _)| name.as_str()).collect();
    let there = if there.is_empty() { &all } else { &there };
    let (all, there) = match service.external_local {
        true => (serving(backends, &all), serving(backends, there)),
        false => (all.clone(), there.clone()),
    };
    for addr in addresses {
        if announcer(&addr, &there) == Some(around.own) {
            share.own.insert(addr);
        }
        let mut order: Vec<&str> = all.iter().copied().collect();
        order.sort_by_cached_key(|node| std::cmp::Reverse(rank(&addr, node)));
        let ahead = order.iter().position(|node| *node == around.own);
        // Without a backend of its own it comes after all that have one. Nearest first: those are next to
        // take it over.
        let ahead = &order[..ahead.unwrap_or(order.len())];
        for node in ahead.iter().rev().take(DEPTH) {
            let with = there.iter().copied().chain([*node]).collect();
            let claim = (announcer(&addr, &with) == Some(*node)).then_some(addr);
            let known = share.watch.entry((*node).to_owned()).or_insert(claim);
            *known = [*known, claim].into_iter().flatten().min();
        }
    }
    share
}

/// With `externalTrafficPolicy: Local`: those with a backend, as long as there are any.
fn serving<'a>(backends: Option<&Backends>, nodes: &BTreeSet<&'a str>) -> BTreeSet<&'a str> {
    let serving = backends.into_iter().flat_map(Backends::values);
    let serving = serving.filter(|backend| backend.state() == State::Serving);
    let serving: BTreeSet<&str> = serving.map(|backend| backend.node.as_str()).collect();
    let both = nodes.iter().copied().filter(|node| serving.contains(node));
    let both: BTreeSet<&str> = both.collect();
    if both.is_empty() { nodes.clone() } else { both }
}

fn rank<'a>(addr: &Addr, node: &'a str) -> (u32, &'a str) {
    let address = addr
        .iter()
        .fold(0, |hash, word| mix(hash ^ u32::from_be(*word)));
    (weight(address, mix(label32(node))), node)
}

fn announcer<'a>(addr: &Addr, nodes: &BTreeSet<&'a str>) -> Option<&'a str> {
    nodes.iter().copied().max_by_key(|node| rank(addr, node))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::view::View;

    fn view(nodes: &[&str], local: bool, backends: &[&str]) -> View {
        let mut view = View::default();
        for node in nodes {
            Arc::make_mut(&mut view.nodes).insert((*node).into(), Arc::default());
        }
        for number in 0..40_u8 {
            let service = proto::Service {
                load_balancer_ips: vec![vec![192, 0, 2, number].into()],
                external_local: local,
                ..proto::Service::default()
            };
            Arc::make_mut(&mut view.services).insert(name(number), Arc::new(service));
            let backends = backends.iter().map(|node| {
                let backend = proto::Backend {
                    node: (*node).into(),
                    ..proto::Backend::default()
                };
                ((*node).to_owned(), Arc::new(backend))
            });
            let backends: Backends = backends.collect();
            Arc::make_mut(&mut view.backends).insert(name(number), Arc::new(backends));
        }
        view
    }

    #[test]
    fn a_dead_node_announces_nothing_until_it_is_back() {
        let before = view(&["a", "b", "c"], false, &[]);
        let mut after = view(&["a", "b", "c"], false, &[]);
        let dead = proto::NodeRoute {
            dead: true,
            ..proto::NodeRoute::default()
        };
        Arc::make_mut(&mut after.nodes).insert("b".into(), Arc::new(dead.clone()));
        assert!(!of("b", &before).is_empty());
        let (a, c) = (of("a", &after), of("c", &after));
        assert_eq!(a.len() + c.len(), 40, "each has one announcer");
        assert!(a.is_superset(&of("a", &before)) && c.is_superset(&of("c", &before)));
        // Its own share is its own, whatever it is told: who sees it on the link expects that.
        assert!(of("b", &after).is_superset(&of("b", &before)));
    }

    #[test]
    fn the_link_knows_better_than_the_control_plane() {
        let view_of = |dead: bool| {
            let mut view = view(&["a", "b", "c"], false, &[]);
            let node = proto::NodeRoute {
                dead,
                ..proto::NodeRoute::default()
            };
            Arc::make_mut(&mut view.nodes).insert("b".into(), Arc::new(node));
            view
        };
        let (alive, dead) = (view_of(false), view_of(true));
        let gone = Seen {
            silent: set(&["b"]),
            ..Seen::default()
        };
        let there = Seen {
            answers: set(&["b"]),
            ..Seen::default()
        };
        for node in ["a", "c"] {
            // Without power, before anybody has told: its share is taken over.
            let taken = looking(node, &alive, &gone).addresses();
            assert_eq!(taken, of(node, &dead));
            assert!(taken.len() > of(node, &alive).len());
            // Only the control plane does not hear it: nothing moves.
            assert_eq!(looking(node, &dead, &there).addresses(), of(node, &alive));
        }
    }

    #[test]
    fn watched_is_who_comes_before_for_what_it_would_announce() {
        let view = view(&["a", "b", "c"], false, &[]);
        let all = ["a", "b", "c"].map(|node| (node, of(node, &view)));
        let gone = Seen {
            silent: set(&["b"]),
            ..Seen::default()
        };
        for seen in [&Seen::default(), &gone] {
            for node in ["a", "c"] {
                let watch = looking(node, &view, seen).watch();
                assert!(
                    watch
                        .keys()
                        .eq(["a", "b", "c"].iter().filter(|it| **it != node))
                );
                let claim = watch["b"].unwrap();
                assert!(all[1].1.contains(&claim), "which it has when it is there");
            }
        }
        let none = View {
            nodes: view.nodes.clone(),
            ..View::default()
        };
        assert!(
            looking("a", &none, &gone).watch().is_empty(),
            "no address, no question"
        );
    }

    proptest! {
        /// Each node has its own picture of the others: those that truly are gone are silent to all who
        /// watch them, the rest is as it may be for a moment.
        #[test]
        fn one_node_takes_over_and_nobody_whose_turn_it_is_not(
            count in 2_usize..7,
            gone in any::<u8>(),
            dead in any::<u8>(),
            local in any::<bool>(),
            serving in any::<u8>(),
        ) {
            let names: Vec<String> = (0..count).map(|index| format!("n{index}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let has = |bits: u8, index: usize| bits >> index & 1 == 1;
            let backends: Vec<&str> = (0..count).filter(|it| has(serving, *it)).map(|it| names[it]).collect();
            let mut view = view(&names, local, &backends);
            for (index, name) in names.iter().enumerate() {
                let node = proto::NodeRoute { dead: has(dead, index), ..proto::NodeRoute::default() };
                Arc::make_mut(&mut view.nodes).insert((*name).into(), Arc::new(node));
            }
            // Fewer than DEPTH at once, or the control plane has to tell.
            let mut left = DEPTH - 1;
            let is_gone: Vec<bool> = (0..count).map(|index| {
                let it = has(gone, index) && left > 0;
                left -= usize::from(it);
                it
            }).collect();
            if is_gone.iter().all(|gone| *gone) {
                return Ok(());
            }
            let mut seen = Seen::default();
            for (index, name) in names.iter().enumerate() {
                let set = if is_gone[index] { &mut seen.silent } else { &mut seen.answers };
                set.insert((*name).to_owned());
            }
            let mut times: BTreeMap<Addr, usize> = BTreeMap::new();
            for (index, name) in names.iter().enumerate() {
                if is_gone[index] {
                    continue;
                }
                // It sees whom it watches, and only those.
                let before = looking(name, &view, &Seen::default()).watch();
                let only = |all: &BTreeSet<String>| all.iter().filter(|it| before.contains_key(*it)).cloned().collect();
                let own = Seen { answers: only(&seen.answers), silent: only(&seen.silent) };
                for addr in looking(name, &view, &own).addresses() {
                    *times.entry(addr).or_default() += 1;
                }
            }
            let all_serving_are_gone = local && !backends.is_empty()
                && names.iter().enumerate().all(|(index, name)| is_gone[index] || !backends.contains(name));
            if !all_serving_are_gone {
                prop_assert_eq!(times.len(), 40);
                prop_assert!(times.values().all(|times| *times == 1), "{:?}", times);
            }
        }
    }

    fn name(number: u8) -> ServiceName {
        ServiceName {
            namespace: "default".into(),
            name: format!("s{number}"),
        }
    }

    fn of(node: &str, view: &View) -> BTreeSet<Addr> {
        looking(node, view, &Seen::default()).addresses()
    }

    fn looking(node: &str, view: &View, seen: &Seen) -> Announcements {
        let mut announcements = Announcements::default();
        let around = Around {
            nodes: &view.nodes,
            own: node,
            seen,
        };
        announcements.update(view.services.keys(), &Shared::of(view), &around);
        announcements
    }

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn every_address_has_one_node_and_only_the_leavers_move() {
        let three = view(&["a", "b", "c"], false, &[]);
        let shares = ["a", "b", "c"].map(|node| of(node, &three));
        assert_eq!(shares.iter().map(BTreeSet::len).sum::<usize>(), 40);
        assert!(shares.iter().all(|share| share.len() > 4), "{shares:?}");
        let all: BTreeSet<Addr> = shares.iter().flatten().copied().collect();
        assert_eq!(all.len(), 40);
        let two = view(&["a", "c"], false, &[]);
        assert!(of("a", &two).is_superset(&shares[0]) && of("c", &two).is_superset(&shares[2]));
    }

    #[test]
    fn with_policy_local_a_node_with_a_backend_answers() {
        let local = view(&["a", "b", "c"], true, &["b", "elsewhere"]);
        assert_eq!(of("b", &local).len(), 40);
        assert!(of("a", &local).is_empty());
        let none = view(&["a"], true, &[]);
        assert_eq!(of("a", &none).len(), 40);
    }

    #[test]
    fn a_look_at_all_finds_what_a_look_at_each_finds_and_forgets_who_is_gone() {
        let full = view(&["a", "b"], false, &[]);
        let mut empty = full.clone();
        empty.services = Arc::default();
        let seen = Seen::default();
        let mut all = looking("a", &full, &seen);
        let each = (all.addresses(), all.watch());
        let around = |view| Around {
            nodes: view,
            own: "a",
            seen: &seen,
        };
        all.update_all(&Shared::of(&full), &around(&full.nodes));
        assert_eq!((all.addresses(), all.watch()), each);
        assert!(!each.1.is_empty(), "the test has something to find");
        all.update_all(&Shared::of(&empty), &around(&empty.nodes));
        assert_eq!((all.addresses(), all.watch()), Default::default());
    }

    #[test]
    fn a_service_that_is_gone_announces_nothing() {
        let mut view = view(&["a"], false, &[]);
        let seen = Seen::default();
        let mut announcements = looking("a", &view, &seen);
        Arc::make_mut(&mut view.services).remove(&name(7));
        let around = Around {
            nodes: &view.nodes,
            own: "a",
            seen: &seen,
        };
        announcements.update([name(7)].iter(), &Shared::of(&view), &around);
        assert_eq!(announcements.addresses().len(), 39);
    }
}
