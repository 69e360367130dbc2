//! Which backends have gone for good, so that a socket which still points at one can only hang.
//!
//! | between two views | TCP | UDP |
//! |---|---|---|
//! | serving ─► draining, not ready | goes on: the pod may finish its work | goes on |
//! | draining ─► no backend: the pod is gone | ended | ended |
//! | serving or not ready ─► no backend: relabelled, or forced away | goes on | ended |
//!
//! A backend that has left its Service may be a pod that lives: its connections are its own, and if it
//! has died, its kernel has said so. A datagram has no such end; a client that is told asks again, by
//! the Service's address. What some Service has as a backend (again) is left alone.

use std::collections::BTreeSet;
use std::net::IpAddr;

use gantry_api::proto;
use gantry_api::proto::backend::State;

use super::changed::Shared;
use super::index::{TCP, UDP, ip_of, parse_address};
use crate::view::{ServiceName, View};

/// An address, port and protocol (IANA) that nobody answers at any more.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Target {
    /// Of the backend.
    pub address: IpAddr,
    /// Of the backend.
    pub port: u16,
    /// [`TCP`] or [`UDP`].
    pub proto: u8,
}

/// The targets that Services have lost between `last` and `view`; `names` are the Services that
/// differ. Those that are [`present`] have not gone: another Service has them.
pub fn lost<'a>(
    last: &Shared,
    view: &View,
    names: impl Iterator<Item = &'a ServiceName>,
) -> BTreeSet<Target> {
    let mut gone = BTreeSet::new();
    for name in names {
        let Some(before) = last.backends(name) else {
            continue;
        };
        let now = view.backends.get(name);
        for (id, backend) in before {
            let still = now.and_then(|now| now.get(id));
            let is_pods_end = still.is_none() && backend.state() == State::Draining;
            let kept: BTreeSet<Target> = still.into_iter().flat_map(|b| targets(b)).collect();
            let lost = targets(backend).filter(|target| !kept.contains(target));
            gone.extend(lost.filter(|target| target.proto == UDP || is_pods_end));
        }
    }
    gone
}

/// All that some backend answers at.
pub fn present(view: &View) -> BTreeSet<(IpAddr, u16)> {
    let backends = view
        .backends
        .values()
        .flat_map(|backends| backends.values());
    let targets = backends.flat_map(|backend| targets(backend));
    targets
        .map(|target| (target.address, target.port))
        .collect()
}

fn targets(backend: &proto::Backend) -> impl Iterator<Item = Target> {
    let addresses = backend
        .addresses
        .iter()
        .filter_map(|bytes| parse_address(bytes));
    addresses.flat_map(|addr| {
        backend.ports.iter().filter_map(move |port| {
            let proto = u8::try_from(port.protocol).ok()?;
            Some(Target {
                address: ip_of(&addr),
                port: u16::try_from(port.port).ok()?,
                proto: Some(proto).filter(|proto| [TCP, UDP].contains(proto))?,
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use imbl::OrdMap;
    use proptest::prelude::*;

    use super::*;
    use crate::services::changed::changed;
    use crate::view::Backends;

    fn name(service: u8) -> ServiceName {
        ServiceName {
            namespace: "default".into(),
            name: format!("s{service}"),
        }
    }

    fn backend(host: u8, proto: u8, state: State) -> Arc<proto::Backend> {
        let mut backend = proto::Backend {
            addresses: vec![vec![10, 244, 0, host].into()],
            ports: vec![proto::BackendPort {
                name: String::new(),
                protocol: proto.into(),
                port: 80,
            }],
            ..Default::default()
        };
        backend.set_state(state);
        Arc::new(backend)
    }

    /// (service, pod, host, proto, state)
    fn view(backends: &[(u8, u8, u8, u8, State)]) -> View {
        let mut all: OrdMap<ServiceName, Arc<Backends>> = OrdMap::new();
        let mut services = OrdMap::new();
        for (service, pod, host, proto, state) in backends {
            let mut of = all
                .get(&name(*service))
                .map(|b| Backends::clone(b))
                .unwrap_or_default();
            of.insert(format!("p{pod}"), backend(*host, *proto, *state));
            all.insert(name(*service), Arc::new(of));
        }
        (0..3).for_each(|service| {
            services.insert(name(service), Arc::new(proto::Service::default()));
        });
        View {
            rev: 1,
            services: Arc::new(services),
            backends: Arc::new(all),
            ..View::default()
        }
    }

    fn gone_between(before: &View, after: &View) -> Vec<(IpAddr, u8)> {
        let last = Shared::of(before);
        let there = present(after);
        let lost = lost(&last, after, changed(&last, after).iter());
        let gone = lost
            .into_iter()
            .filter(|t| !there.contains(&(t.address, t.port)));
        gone.map(|target| (target.address, target.proto)).collect()
    }

    #[test]
    fn the_end_of_a_pod_ends_what_points_at_it_and_nothing_else_does() {
        use State::{Draining, NotReady, Serving};
        let at = |host: u8, proto: u8| (IpAddr::from([10, 244, 0, host]), proto);
        let cases = [
            (
                "draining",
                vec![(0, 1, 1, TCP, Serving)],
                vec![(0, 1, 1, TCP, Draining)],
                vec![],
            ),
            (
                "not ready",
                vec![(0, 1, 1, UDP, Serving)],
                vec![(0, 1, 1, UDP, NotReady)],
                vec![],
            ),
            (
                "gone",
                vec![(0, 1, 1, TCP, Draining)],
                vec![],
                vec![at(1, TCP)],
            ),
            (
                "gone, UDP",
                vec![(0, 1, 1, UDP, Draining)],
                vec![],
                vec![at(1, UDP)],
            ),
            ("relabelled", vec![(0, 1, 1, TCP, Serving)], vec![], vec![]),
            (
                "relabelled, UDP",
                vec![(0, 1, 1, UDP, Serving)],
                vec![],
                vec![at(1, UDP)],
            ),
            (
                "of another Service still",
                vec![(0, 1, 1, UDP, Serving), (1, 1, 1, UDP, Serving)],
                vec![(1, 1, 1, UDP, Serving)],
                vec![],
            ),
            (
                "its address has a new owner",
                vec![(0, 1, 1, TCP, Draining)],
                vec![(0, 2, 1, TCP, Serving)],
                vec![],
            ),
        ];
        for (what, before, after, wanted) in cases {
            assert_eq!(
                gone_between(&view(&before), &view(&after)),
                wanted,
                "{what}"
            );
        }
    }

    proptest! {
        /// What any Service still has as a backend, in whatever state, is never ended.
        #[test]
        fn nothing_that_is_there_is_gone(
            before in prop::collection::vec((0u8..3, 0u8..4, 0u8..4, 0u8..2, 0i32..3), 0..8),
            after in prop::collection::vec((0u8..3, 0u8..4, 0u8..4, 0u8..2, 0i32..3), 0..8),
        ) {
            let of = |list: &[(u8, u8, u8, u8, i32)]| view(&list.iter().map(|(s, p, h, udp, state)| {
                let state = State::try_from(*state).unwrap();
                (*s, *p, *h, if *udp == 1 { UDP } else { TCP }, state)
            }).collect::<Vec<_>>());
            let (before, after) = (of(&before), of(&after));
            let gone = gone_between(&before, &after);
            let there = after.backends.values().flat_map(|b| b.values());
            for target in there.flat_map(|backend| targets(backend)) {
                prop_assert!(!gone.contains(&(target.address, target.proto)), "{:?}", target);
            }
            prop_assert!(gone_between(&after, &after).is_empty());
        }
    }
}
