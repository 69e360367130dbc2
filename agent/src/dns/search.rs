//! Search lists in one hop: which names a client will try after the one that it has asked for. Pure.
//!
//! ```text
//! pod of namespace web asks  example.org            ndots:5, so its resolver begins with the list:
//!   example.org.web.svc.cluster.local  ◄── asked     does not exist
//!   example.org.svc.cluster.local                    ┐
//!   example.org.cluster.local                        │ candidates: the first that exists is answered
//!   example.org.<the node's search domains>          │ at once, with an alias from the asked name
//!   example.org                                      ┘
//! ```
//! The pod is known by its address, its list by its dnsPolicy and dnsConfig, as its resolv.conf was
//! written. Pods with host network share the node's address: their namespace is in the question, and
//! they are answered like this only while all of them there have the same list.
//!
//! Sound because existence does not depend on the type asked for: A and AAAA, which musl asks for at
//! the same time, stop at the same candidate; a client that goes on after an answer without records
//! (glibc) finds under the next names what it would have found anyway. Only the *first* name of the
//! list is answered like this, and only where more than one label stands before it and no Service has
//! that name: a cluster's name asked for whole that does not exist (a Service or a peer that is not
//! there yet) must not be taken for another. Differs from CoreDNS, whose autopath takes it.
//!
//! Source: CoreDNS's autopath, which does this for pods by their API objects.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use gantry_api::k8s_openapi::api::core::v1::Pod;
use hickory_proto::rr::Name;

use crate::network::{ResolvConf, resolv_conf};
use crate::view::View;

/// The search lists of this node's pods, at one view.
#[derive(Default)]
pub(super) struct SearchLists {
    by_address: HashMap<IpAddr, Arc<[Name]>>,
    /// Of pods with host network, by namespace; none: they differ.
    on_host: HashMap<String, Option<Arc<[Name]>>>,
}

impl SearchLists {
    /// * `node` – the node's resolv.conf.
    pub(super) fn of(view: &View, node: &str) -> Self {
        let mut lists = Self::default();
        for pod in view.pods.values() {
            lists.add(pod, view, node);
        }
        lists
    }

    fn add(&mut self, pod: &Pod, view: &View, node: &str) {
        let Some(spec) = &pod.spec else { return };
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
        let has_ended = matches!(phase, Some("Succeeded" | "Failed"));
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let text = resolv_conf(spec, namespace, &view.settings, node);
        let conf = ResolvConf::parse(&text);
        // Clients ask the first server: only where that is us is the rest of the list ours to walk.
        let resolver = view.settings.dns_service_ip.map(|ip| ip.to_string());
        if has_ended || resolver.is_none() || conf.nameservers.first() != resolver.as_ref() {
            return;
        }
        let names = conf.search.iter().filter_map(|domain| absolute(domain));
        let list: Arc<[Name]> = names.collect();
        if spec.host_network.unwrap_or(false) {
            self.on_host
                .entry(namespace.to_owned())
                .and_modify(|known| {
                    if known.as_ref() != Some(&list) {
                        *known = None;
                    }
                })
                .or_insert(Some(list));
            return;
        }
        let addresses = pod.status.iter().flat_map(|s| s.pod_ips.iter().flatten());
        for address in addresses.filter_map(|address| address.ip.parse().ok()) {
            self.by_address.insert(address, list.clone());
        }
    }

    /// The list of the client at that address, if it is a pod of this node that asks us first.
    ///
    /// * `is_host` – the address is the node's own.
    /// * `asked` – whose namespace tells pods with host network apart.
    pub(super) fn list(&self, client: IpAddr, is_host: bool, asked: &Name) -> Option<&Arc<[Name]>> {
        if !is_host {
            return self.by_address.get(&client);
        }
        let of_the_name = |(_, list): &(&String, &Option<Arc<[Name]>>)| {
            let first = list.as_ref().and_then(|list| list.first());
            first.is_some_and(|first| first.zone_of(asked))
        };
        self.on_host.iter().find(of_the_name)?.1.as_ref()
    }
}

/// What the client tries after `asked`, in its order; none when `asked` is no first try of its list,
/// or may as well be the whole name of a Service.
pub(super) fn candidates(asked: &Name, list: &[Name]) -> Option<Vec<Name>> {
    let first = list.first()?;
    let depth = asked.num_labels().checked_sub(first.num_labels())?;
    if depth < 2 || !first.zone_of(asked) {
        return None;
    }
    let base = Name::from_labels(asked.iter().take(depth.into())).ok()?;
    let searched = list[1..].iter().filter_map(|domain| {
        // Too long for a name: the client cannot try it either.
        base.clone().append_domain(domain).ok()
    });
    let mut candidates: Vec<Name> = searched.collect();
    let mut alone = base.clone();
    alone.set_fqdn(true);
    candidates.push(alone);
    Some(candidates)
}

fn absolute(domain: &str) -> Option<Name> {
    let mut name = Name::from_ascii(domain).ok()?;
    name.set_fqdn(true);
    Some(name.to_lowercase())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use gantry_api::k8s_openapi::serde_json::{Value, from_value, json};
    use proptest::prelude::*;

    use super::*;
    use crate::ids::PodUid;
    use crate::view::Settings;

    fn name(text: &str) -> Name {
        absolute(text).unwrap()
    }

    fn view(pods: &[Value]) -> View {
        let pods = pods.iter().enumerate().map(|(n, pod)| {
            let uid = PodUid::new(&format!("u{n}")).unwrap();
            (uid, Arc::new(from_value::<Pod>(pod.clone()).unwrap()))
        });
        View {
            rev: 1,
            pods: Arc::new(pods.collect::<BTreeMap<_, _>>()),
            settings: Arc::new(Settings {
                cluster_domain: "cluster.local".into(),
                dns_service_ip: Some(IpAddr::from([10, 96, 0, 10])),
                ..Settings::default()
            }),
            ..View::default()
        }
    }

    fn pod(ip: &str, spec: Value) -> Value {
        json!({"metadata": {"namespace": "web", "name": "p"}, "spec": spec,
               "status": {"phase": "Running", "podIPs": [{"ip": ip}]}})
    }

    #[test]
    fn only_pods_that_ask_us_first_have_a_list() {
        let plain = json!({"containers": []});
        let with = |more: Value| {
            let mut spec = plain.clone();
            spec.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            spec
        };
        let mut ended = pod("10.244.0.6", plain.clone());
        ended["status"]["phase"] = json!("Failed");
        let view = view(&[
            pod("10.244.0.2", plain.clone()),
            pod("10.244.0.3", with(json!({"dnsPolicy": "Default"}))),
            pod(
                "10.244.0.4",
                with(json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["192.0.2.1"]}})),
            ),
            pod(
                "10.244.0.5",
                with(json!({"dnsConfig": {"searches": ["corp"]}})),
            ),
            ended,
            pod(
                "192.0.2.9",
                with(json!({"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"})),
            ),
        ]);
        let lists = SearchLists::of(&view, "search example.org\n");
        let of = |ip: &str, is_host| {
            let asked = name("x.web.svc.cluster.local");
            let list = lists.list(ip.parse().unwrap(), is_host, &asked);
            list.map(|list| {
                list.iter()
                    .map(Name::to_ascii)
                    .collect::<Vec<_>>()
                    .join(" ")
            })
        };
        let cluster = "web.svc.cluster.local. svc.cluster.local. cluster.local. example.org.";
        assert_eq!(of("10.244.0.2", false).as_deref(), Some(cluster));
        assert_eq!(of("10.244.0.3", false), None);
        assert_eq!(of("10.244.0.4", false), None);
        assert_eq!(of("10.244.0.5", false), Some(format!("{cluster} corp.")));
        assert_eq!(of("10.244.0.6", false), None);
        assert_eq!(of("10.244.9.9", false), None);
        assert_eq!(of("169.254.20.10", true).as_deref(), Some(cluster));
        let other = name("x.shop.svc.cluster.local");
        assert!(
            lists
                .list(IpAddr::from([169, 254, 20, 10]), true, &other)
                .is_none()
        );
    }

    #[test]
    fn pods_with_host_network_and_different_lists_are_not_told_apart() {
        let spec = |searches: &str| {
            json!({"containers": [], "hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet",
                   "dnsConfig": {"searches": [searches]}})
        };
        let asked = name("x.web.svc.cluster.local");
        let host = IpAddr::from([169, 254, 20, 10]);
        let same = view(&[pod("1.1.1.1", spec("a")), pod("1.1.1.1", spec("a"))]);
        assert!(
            SearchLists::of(&same, "")
                .list(host, true, &asked)
                .is_some()
        );
        let differ = view(&[
            pod("1.1.1.1", spec("a")),
            pod("1.1.1.1", spec("b")),
            pod("1.1.1.1", spec("b")),
        ]);
        assert!(
            SearchLists::of(&differ, "")
                .list(host, true, &asked)
                .is_none()
        );
    }

    #[test]
    fn the_rest_of_the_list_and_then_the_name_alone() {
        let list: Vec<Name> = ["web.svc.cluster.local", "svc.cluster.local", "corp"]
            .map(name)
            .into();
        let of = |asked: &str| {
            let found = candidates(&Name::from_ascii(asked).unwrap(), &list)?;
            Some(found.iter().map(Name::to_ascii).collect::<Vec<_>>())
        };
        assert_eq!(
            of("Example.org.web.svc.cluster.local.").unwrap(),
            [
                "Example.org.svc.cluster.local.",
                "Example.org.corp.",
                "Example.org."
            ]
        );
        assert_eq!(of("web.svc.cluster.local."), None);
        assert_eq!(of("no.web.svc.cluster.local."), None);
        assert_eq!(of("example.org.shop.svc.cluster.local."), None);
        assert_eq!(of("example.org."), None);
    }

    /// What the world says about a name.
    #[derive(Clone, Copy, PartialEq, Debug)]
    enum World {
        NoName,
        NoData,
        Data,
    }

    /// A client's resolver: goes through its list, then asks for the name alone (its dots are fewer
    /// than ndots). musl ends at an answer without records, glibc goes on and remembers.
    fn resolve(
        base: &Name,
        list: &[Name],
        ends_at_no_data: bool,
        ask: &dyn Fn(&Name) -> (World, Name),
    ) -> (World, Option<Name>) {
        let searched = list
            .iter()
            .map(|domain| base.clone().append_domain(domain).unwrap());
        let mut alone = base.clone();
        alone.set_fqdn(true);
        let mut seen = World::NoName;
        for name in searched.chain([alone]) {
            match ask(&name) {
                (World::Data, found) => return (World::Data, Some(found)),
                (World::NoData, _) if ends_at_no_data => return (World::NoData, None),
                (World::NoData, _) => seen = World::NoData,
                (World::NoName, _) => {}
            }
        }
        (seen, None)
    }

    proptest! {
        /// Whatever exists: a client ends with the same answer as without the shortcut, and when a
        /// name of its list has records, after one question.
        #[test]
        fn one_hop_changes_no_answer(
            labels in proptest::collection::vec("[a-c]{1,2}", 1..4),
            domains in proptest::collection::vec("[a-c]{1,2}(\\.[a-c]{1,2}){0,2}", 1..5),
            worlds in proptest::collection::vec(0..3u8, 6),
            musl: bool,
        ) {
            let base = Name::from_labels(labels.iter().map(|l| l.as_bytes())).unwrap();
            let mut list: Vec<Name> = domains.iter().map(|d| name(d)).collect();
            let mut seen = std::collections::HashSet::new();
            list.retain(|domain| seen.insert(domain.clone()));
            let mut all: Vec<Name> = list.iter().map(|d| base.clone().append_domain(d).unwrap()).collect();
            let mut alone = base.clone();
            alone.set_fqdn(true);
            all.push(alone);
            let mut facts: HashMap<Name, World> = HashMap::new();
            for (name, world) in all.iter().zip(&worlds) {
                let world = [World::NoName, World::NoData, World::Data][usize::from(*world)];
                facts.entry(name.clone()).or_insert(world);
            }
            let fact = |name: &Name| facts.get(name).copied().unwrap_or(World::NoName);
            let plain = |name: &Name| (fact(name), name.clone());
            let shortcut = |asked: &Name| {
                if fact(asked) != World::NoName {
                    return plain(asked);
                }
                let rest = candidates(asked, &list).unwrap_or_default();
                let first = rest.iter().find(|name| fact(name) != World::NoName);
                first.map_or((World::NoName, asked.clone()), plain)
            };
            let without = resolve(&base, &list, musl, &plain);
            let with = resolve(&base, &list, musl, &shortcut);
            prop_assert_eq!(&without, &with);
            if musl && without.0 == World::Data && labels.len() > 1 {
                let questions = std::cell::Cell::new(0);
                let counted = |name: &Name| {
                    questions.set(questions.get() + 1);
                    shortcut(name)
                };
                resolve(&base, &list, musl, &counted);
                prop_assert_eq!(questions.get(), 1);
            }
        }
    }
}
