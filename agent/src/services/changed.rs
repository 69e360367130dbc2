//! Which Services differ between two views, without a look at those that do not.
//!
//! The views' maps share every part that no commit has touched, and a shared part is skipped whole:
//! one change among 10,000 Services costs a few nodes of two trees.
//!
//! Invariant, checked by the tests: a Service whose object or whose backends differ is named, also
//! one that came or went; no other is.

use std::collections::BTreeSet;
use std::sync::Arc;

use gantry_api::proto;
use imbl::OrdMap;
use imbl::ordmap::DiffItem;

use crate::view::{Backends, ServiceName, View};

/// The parts of a view that Services are made of; cheap to keep.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    services: Arc<OrdMap<ServiceName, Arc<proto::Service>>>,
    backends: Arc<OrdMap<ServiceName, Arc<Backends>>>,
}

impl Shared {
    /// Keeps those parts of `view`.
    pub fn of(view: &View) -> Self {
        Self {
            services: view.services.clone(),
            backends: view.backends.clone(),
        }
    }
}

impl Shared {
    /// A Service, then.
    pub fn service(&self, name: &ServiceName) -> Option<&proto::Service> {
        self.services.get(name).map(Arc::as_ref)
    }

    /// The backends of a Service, then.
    pub fn backends(&self, service: &ServiceName) -> Option<&Backends> {
        self.backends.get(service).map(Arc::as_ref)
    }
}

impl Shared {
    /// All Services, then.
    pub fn services(&self) -> impl Iterator<Item = (&ServiceName, &proto::Service)> {
        self.services.iter().map(|(name, it)| (name, it.as_ref()))
    }
}

/// Every Service of a view with its backends, in order of names: one walk through both maps, where a
/// search for each of 30,000 names costs more than to understand what is found.
pub fn every(
    view: &View,
) -> impl Iterator<Item = (&ServiceName, &proto::Service, Option<&Backends>)> {
    let mut backends = view.backends.iter().peekable();
    view.services.iter().map(move |(name, service)| {
        while backends.next_if(|(other, _)| *other < name).is_some() {}
        let own = backends.next_if(|(other, _)| *other == name);
        (name, service.as_ref(), own.map(|(_, own)| own.as_ref()))
    })
}

/// The Services of `last` or `view` that are not the same in both. Backends of a name that is no
/// Service are nobody's and name nothing.
pub fn changed(last: &Shared, view: &View) -> BTreeSet<ServiceName> {
    let mut names = BTreeSet::new();
    if !Arc::ptr_eq(&last.services, &view.services) {
        names.extend(last.services.diff(&view.services).map(|item| key(&item)));
    }
    if !Arc::ptr_eq(&last.backends, &view.backends) {
        let differ = last.backends.diff(&view.backends).map(|item| key(&item));
        names.extend(differ.filter(|name| view.services.contains_key(name)));
    }
    names
}

fn key<V>(item: &DiffItem<'_, '_, ServiceName, V>) -> ServiceName {
    match item {
        DiffItem::Add(name, _) | DiffItem::Remove(name, _) => (*name).clone(),
        DiffItem::Update { new: (name, _), .. } => (*name).clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(number: u16) -> ServiceName {
        ServiceName {
            namespace: format!("ns{}", number % 3),
            name: format!("s{number:05}"),
        }
    }

    fn service(number: u8) -> Arc<proto::Service> {
        Arc::new(proto::Service {
            cluster_ips: vec![vec![10, 96, 0, number].into()],
            ..proto::Service::default()
        })
    }

    fn backends(number: u8) -> Arc<Backends> {
        let backend = proto::Backend {
            node: format!("n{number}"),
            ..proto::Backend::default()
        };
        Arc::new(Backends::unit("uid".into(), Arc::new(backend)))
    }

    #[derive(Clone, Debug)]
    enum Change {
        Service(u16, u8),
        NoService(u16),
        Backends(u16, u8),
        NoBackends(u16),
    }

    fn change() -> impl Strategy<Value = Change> {
        let (name, number) = (0..200_u16, 0..3_u8);
        prop_oneof![
            (name.clone(), number.clone()).prop_map(|(n, v)| Change::Service(n, v)),
            name.clone().prop_map(Change::NoService),
            (name.clone(), number).prop_map(|(n, v)| Change::Backends(n, v)),
            name.prop_map(Change::NoBackends),
        ]
    }

    fn apply(view: &mut View, change: &Change) {
        match change {
            Change::Service(number, value) => {
                Arc::make_mut(&mut view.services).insert(name(*number), service(*value));
            }
            Change::NoService(number) => {
                Arc::make_mut(&mut view.services).remove(&name(*number));
            }
            Change::Backends(number, value) => {
                Arc::make_mut(&mut view.backends).insert(name(*number), backends(*value));
            }
            Change::NoBackends(number) => {
                Arc::make_mut(&mut view.backends).remove(&name(*number));
            }
        }
    }

    proptest! {
        #[test]
        fn exactly_what_differs_is_named(
            first in prop::collection::vec(change(), 0..300),
            then in prop::collection::vec(change(), 0..20),
        ) {
            let mut view = View::default();
            first.iter().for_each(|change| apply(&mut view, change));
            let last = Shared::of(&view);
            then.iter().for_each(|change| apply(&mut view, change));
            let wanted: BTreeSet<_> = (0..200)
                .map(name)
                .filter(|name| {
                    let (old, new) = (last.services.get(name), view.services.get(name));
                    let backends = last.backends.get(name) != view.backends.get(name);
                    old != new || (new.is_some() && backends)
                })
                .collect();
            prop_assert_eq!(changed(&last, &view), wanted);
        }

        /// The one walk finds what a search for each name finds.
        #[test]
        fn every_service_comes_once_with_its_own_backends(
            changes in prop::collection::vec(change(), 0..300),
        ) {
            let mut view = View::default();
            changes.iter().for_each(|change| apply(&mut view, change));
            let walked: Vec<_> = every(&view).collect();
            let searched = view.services.iter().map(|(name, service)| {
                (name, service.as_ref(), view.backends.get(name).map(Arc::as_ref))
            });
            prop_assert_eq!(walked, searched.collect::<Vec<_>>());
        }
    }
}
