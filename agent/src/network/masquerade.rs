//! Which packets of pods leave from the node's own address: what the map MASQUERADE is to say.
//!
//! ```text
//!  POD    the prefix of this node's pods, and the one of static pods before a control plane
//!  NEVER  both of them, the cluster's and all other nodes' prefixes, the Services', what the
//!         administrator names; link-local, multicast, broadcast
//! ```
//! The nodes' own addresses are in NODE_ADDRESSES, where the programs look too: a node that is reached
//! directly is sent the pods' own addresses. One behind the tunnel is not: its answers would come by the
//! tunnel, to packets that went by the uplink, and be refused there as forged. Private addresses
//! (RFC 1918) are masqueraded like all others: a host on the node's own network knows no way back to a
//! pod either. Whoever has made routes to pods names the networks with `--non-masquerade-cidrs`.
//!
//! Invariant, checked by the tests: the value of an address by its longest prefix is that of all prefixes
//! that contain it.

use std::collections::BTreeMap;

use ebpf_maps::uplink::{NEVER, POD};
use ipnet::IpNet;

use crate::policy::prefix::Prefix;
use crate::view::View;

/// What `--non-masquerade-cidrs` may name at most.
pub const NEVER_COUNT_MAX: usize = 1024;

/// Never of the outside: "this network", link-local, multicast and broadcast of IPv4; loopback,
/// link-local and multicast of IPv6.
const NOWHERE: [&str; 7] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/3",
    "::/127",
    "fe80::/10",
    "ff00::/8",
];

/// What the administrator wants.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Masquerade {
    /// Who is sent the pods' own addresses, besides the cluster.
    pub never: Vec<IpNet>,
    /// The prefix of static pods before a control plane has allocated this node's.
    pub standalone: Option<IpNet>,
}

/// Rows of MASQUERADE.
pub fn rows(masquerade: &Masquerade, view: &View) -> BTreeMap<Prefix, u32> {
    let settings = &view.settings;
    let mut given: BTreeMap<Prefix, u32> = BTreeMap::new();
    let mut add = |net: IpNet, value: u32| *given.entry(net.into()).or_default() |= value;
    for own in settings.pod_cidrs().chain(masquerade.standalone) {
        add(own, POD | NEVER);
    }
    let cluster = settings.cluster_cidrs().chain(settings.service_cidrs());
    let nowhere = NOWHERE.iter().filter_map(|text| text.parse().ok());
    let never = cluster
        .chain(masquerade.never.iter().copied())
        .chain(nowhere);
    never.for_each(|net| add(net, NEVER));
    let within: Vec<Prefix> = settings.cluster_cidrs().map(Prefix::from).collect();
    let parts = view
        .nodes
        .values()
        .flat_map(|node| node.pod_cidr.split(','));
    for net in parts.filter_map(|part| part.trim().parse::<IpNet>().ok()) {
        // Mostly in the cluster's prefix, and then nothing new.
        if !within.iter().any(|cluster| cluster.contains(net.into())) {
            add(net, NEVER);
        }
    }
    let of = |prefix: &Prefix| {
        let around = given.iter().filter(|(other, _)| other.contains(*prefix));
        around.fold(0, |value, (_, other)| value | other)
    };
    given.keys().map(|prefix| (*prefix, of(prefix))).collect()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::sync::Arc;

    use gantry_api::proto;
    use proptest::prelude::*;

    use super::*;
    use crate::services::index::addr_of;
    use crate::view::Settings;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn view(settings: Settings, nodes: &[&str]) -> View {
        let mut view = View {
            settings: Arc::new(settings),
            ..View::default()
        };
        for (index, cidr) in nodes.iter().enumerate() {
            let node = proto::NodeRoute {
                pod_cidr: (*cidr).into(),
                ..Default::default()
            };
            Arc::make_mut(&mut view.nodes).insert(index.to_string(), Arc::new(node));
        }
        view
    }

    /// As the kernel finds it: by the longest prefix.
    fn found(rows: &BTreeMap<Prefix, u32>, address: &str) -> u32 {
        let address: IpAddr = address.parse().unwrap();
        let address = Prefix::host(&addr_of(address));
        let around = rows.iter().filter(|(prefix, _)| prefix.contains(address));
        around
            .max_by_key(|(prefix, _)| prefix.bits())
            .map_or(0, |(_, value)| *value)
    }

    #[test]
    fn only_the_own_pods_are_masqueraded_and_never_towards_the_cluster() {
        let settings = Settings {
            pod_cidr: Some(net("10.244.1.0/24")),
            cluster_cidr: Some(net("10.244.0.0/16")),
            service_cidr: Some(net("10.96.0.0/12")),
            ..Settings::default()
        };
        let view = view(
            settings,
            &["10.244.2.0/24", "172.30.7.0/24,fd00:7::/64", ""],
        );
        let masquerade = Masquerade {
            never: vec![net("192.168.0.0/16"), net("2001:db8::/32")],
            standalone: Some(net("10.243.255.0/24")),
        };
        let rows = rows(&masquerade, &view);
        assert_eq!(found(&rows, "10.244.1.9"), POD | NEVER);
        assert_eq!(found(&rows, "10.243.255.9"), POD | NEVER);
        for never in [
            "10.244.2.9",
            "172.30.7.1",
            "fd00:7::1",
            "10.97.0.1",
            "192.168.4.4",
            "2001:db8::1",
            "169.254.169.254",
            "224.0.0.251",
            "255.255.255.255",
            "fe80::1",
            "ff02::1",
        ] {
            assert_eq!(found(&rows, never), NEVER, "{never}");
        }
        for outside in [
            "192.0.2.1",
            "10.0.0.1",
            "172.16.0.1",
            "1.1.1.1",
            "2001:db9::1",
        ] {
            assert_eq!(found(&rows, outside), 0, "{outside}");
        }
    }

    #[test]
    fn a_node_without_a_prefix_masquerades_nobody() {
        let rows = rows(&Masquerade::default(), &View::default());
        assert!(rows.values().all(|value| value & POD == 0));
    }

    proptest! {
        #[test]
        fn the_longest_prefix_says_what_all_of_them_say(
            nets in proptest::collection::vec((any::<[u8; 2]>(), 0_u8..=24), 0..12),
            own in 8_u8..=24,
            address in any::<[u8; 4]>(),
        ) {
            // Few different first bytes, so that prefixes lie in each other.
            let of = |bytes: [u8; 2], len| {
                IpNet::new([10, bytes[0] & 3, bytes[1] & 3, 0].into(), len).unwrap().trunc()
            };
            let never: Vec<IpNet> = nets.iter().map(|(bytes, len)| of(*bytes, *len)).collect();
            let pods = of([1, 1], own);
            let settings = Settings { pod_cidr: Some(pods), ..Settings::default() };
            let masquerade = Masquerade { never: never.clone(), standalone: None };
            let rows = rows(&masquerade, &view(settings, &[]));
            let address: IpAddr = [10, address[1] & 3, address[2] & 3, address[3]].into();
            let mut expected = 0;
            if pods.contains(&address) {
                expected |= POD | NEVER;
            }
            if never.iter().any(|net| net.contains(&address)) {
                expected |= NEVER;
            }
            prop_assert_eq!(found(&rows, &address.to_string()), expected);
        }
    }
}
