//! Which node says that it has a load balancer address: exactly one, chosen without talk.
//!
//! Every node gives the address a weight by its own name; the heaviest of those that the feed names
//! announces it. So a node that comes or goes moves only its own share of addresses. With
//! `externalTrafficPolicy: Local` only nodes with a backend are asked, as long as there are any. A node
//! that the control plane has given up announces nothing; were it all of them, it is the control plane
//! that is cut off, and nothing moves.
//!
//! Invariant, checked by the tests: nodes that see the same view agree.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_maps::services::{Addr, mix, weight};
use gantry_api::proto;
use gantry_api::proto::backend::State;

use super::index::{label32, parse_address};
use crate::view::{Backends, ServiceName, View};

/// The addresses that this node announces, by Service.
#[derive(Debug, Default)]
pub struct Announcements {
    by_service: BTreeMap<ServiceName, BTreeSet<Addr>>,
}

impl Announcements {
    /// Looks at these Services again; those that are gone announce nothing.
    pub fn update<'a>(
        &mut self,
        names: impl Iterator<Item = &'a ServiceName>,
        view: &View,
        node: &str,
    ) {
        for name in names {
            let service = view.services.get(name);
            let backends = view.backends.get(name).map(AsRef::as_ref);
            let own = service.map(|service| {
                let addresses = service.load_balancer_ips.iter();
                let addresses = addresses.filter_map(|bytes| parse_address(bytes));
                let is_own = |addr: &Addr| {
                    announcer(addr, &candidates(service, backends, view)) == Some(node)
                };
                addresses.filter(is_own).collect::<BTreeSet<Addr>>()
            });
            match own.filter(|own| !own.is_empty()) {
                Some(own) => drop(self.by_service.insert(name.clone(), own)),
                None => drop(self.by_service.remove(name)),
            }
        }
    }

    /// All of them.
    pub fn addresses(&self) -> BTreeSet<Addr> {
        self.by_service.values().flatten().copied().collect()
    }
}

fn candidates<'a>(
    service: &proto::Service,
    backends: Option<&'a Backends>,
    view: &'a View,
) -> BTreeSet<&'a str> {
    let names = |dead: bool| -> BTreeSet<&'a str> {
        let nodes = view.nodes.iter();
        let alive = nodes.filter(|(_, node)| dead || !node.dead);
        alive.map(|(name, _)| name.as_str()).collect()
    };
    let alive = names(false);
    let all = if alive.is_empty() { names(true) } else { alive };
    if !service.external_local {
        return all;
    }
    let serving = backends.into_iter().flat_map(Backends::values);
    let serving = serving.filter(|backend| backend.state() == State::Serving);
    let serving: BTreeSet<&str> = serving.map(|backend| backend.node.as_str()).collect();
    let both: BTreeSet<&str> = all.intersection(&serving).copied().collect();
    if both.is_empty() { all } else { both }
}

fn announcer<'a>(addr: &Addr, nodes: &BTreeSet<&'a str>) -> Option<&'a str> {
    let address = addr
        .iter()
        .fold(0, |hash, word| mix(hash ^ u32::from_be(*word)));
    let heaviest = nodes
        .iter()
        .max_by_key(|node| (weight(address, mix(label32(node))), **node));
    heaviest.copied()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

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
        assert!(of("b", &after).is_empty());
        let (a, c) = (of("a", &after), of("c", &after));
        assert_eq!(a.len() + c.len(), 40, "each has one announcer");
        assert!(a.is_superset(&of("a", &before)) && c.is_superset(&of("c", &before)));
        for name in ["a", "c"] {
            Arc::make_mut(&mut after.nodes).insert(name.into(), Arc::new(dead.clone()));
        }
        assert_eq!(of("b", &after), of("b", &before), "nothing moves");
    }

    fn name(number: u8) -> ServiceName {
        ServiceName {
            namespace: "default".into(),
            name: format!("s{number}"),
        }
    }

    fn of(node: &str, view: &View) -> BTreeSet<Addr> {
        let mut announcements = Announcements::default();
        announcements.update(view.services.keys(), view, node);
        announcements.addresses()
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
    fn a_service_that_is_gone_announces_nothing() {
        let mut view = view(&["a"], false, &[]);
        let mut announcements = Announcements::default();
        announcements.update(view.services.keys(), &view, "a");
        Arc::make_mut(&mut view.services).remove(&name(7));
        announcements.update([name(7)].iter(), &view, "a");
        assert_eq!(announcements.addresses().len(), 39);
    }
}
