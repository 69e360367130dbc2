//! How many pods fit on this node: by how they are attached, by the packet path's tables, and by the
//! addresses that the node has for them.

use std::sync::Arc;

use ebpf_maps::bandwidth::BANDWIDTH_COUNT_MAX;
use ebpf_maps::endpoint::{ENDPOINT_COUNT_MAX, INTERFACE_COUNT_MAX};
use ebpf_maps::policy::POLICY_POD_COUNT_MAX;
use gantry_cni::config::PodLink;
use gantry_cni::ipam::Range;
use gantry_cni::netlink::BRIDGE_PORT_COUNT_MAX;
use ipnet::IpNet;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::view::View;

/// Pods of one node at most.
pub const PODS_MAX: u32 = 4_000;
/// Pods that are ports of one bridge at most. The rest of its ports is for sandboxes in waiting, and for
/// pods that come while others go.
pub const BRIDGE_PODS_MAX: u32 = 1_000;

// With an address of each family, a limit in each direction, and some that come while others go.
const _: () = {
    assert!(BRIDGE_PODS_MAX + 16 <= BRIDGE_PORT_COUNT_MAX);
    assert!(PODS_MAX + 64 <= INTERFACE_COUNT_MAX);
    assert!(PODS_MAX + 64 <= POLICY_POD_COUNT_MAX);
    assert!(2 * (PODS_MAX + 64) <= ENDPOINT_COUNT_MAX);
    assert!(2 * (PODS_MAX + 64) <= BANDWIDTH_COUNT_MAX);
};

/// Whether as many pods as the administrator wants can be attached like that.
///
/// # Errors
/// In words, with what to do instead.
pub fn check(pods_max: u32, link: PodLink) -> Result<(), String> {
    if pods_max > PODS_MAX {
        return Err(format!(
            "--max-pods {pods_max}: a node has {PODS_MAX} at most, which the tables of its packet path are \
             made for; give it less, and pods to further nodes"
        ));
    }
    if link == PodLink::Bridge && pods_max > BRIDGE_PODS_MAX {
        return Err(format!(
            "--max-pods {pods_max}: pods are ports of a bridge, which takes {BRIDGE_PORT_COUNT_MAX}, for \
             {BRIDGE_PODS_MAX} pods at most; start the agent with --pod-link routed as well, or with a \
             lower --max-pods"
        ));
    }
    Ok(())
}

/// What is wrong with the node's prefixes for so many pods, and what to do.
fn too_small(pods_max: u32, prefixes: impl Iterator<Item = IpNet>) -> Option<String> {
    for prefix in prefixes {
        let size = Range::new(prefix).map_or(0, |range| range.size());
        if size < u64::from(pods_max) {
            let flag = match prefix {
                IpNet::V4(_) => "--node-cidr-prefix",
                IpNet::V6(_) => "--node-cidr-prefix-v6",
            };
            return Some(format!(
                "--max-pods {pods_max}: this node's pod prefix {prefix} has addresses for {size} pods; pods \
                 beyond wait. Lower --max-pods, or make the cluster with gantry-control {flag} {}",
                fitting(pods_max, prefix)
            ));
        }
    }
    None
}

/// The longest prefix that has addresses for so many pods.
fn fitting(pods_max: u32, prefix: IpNet) -> u8 {
    // Network, gateway, broadcast, and sandboxes in waiting.
    let bits = u64::from(pods_max).saturating_add(8).next_power_of_two();
    let bits = u8::try_from(bits.trailing_zeros()).unwrap_or(u8::MAX);
    prefix.max_prefix_len().saturating_sub(bits)
}

/// Says so whenever the node's prefixes are, or become, too small. Runs until shutdown.
pub async fn follow(
    pods_max: u32,
    mut view: watch::Receiver<Arc<View>>,
    shutdown: CancellationToken,
) {
    let mut said = None;
    loop {
        let prefixes: Vec<IpNet> = view.borrow_and_update().settings.pod_cidrs().collect();
        if said.as_ref() != Some(&prefixes) {
            if let Some(words) = too_small(pods_max, prefixes.iter().copied()) {
                tracing::warn!("{words}");
            }
            said = Some(prefixes);
        }
        tokio::select! {
            // Cancel-safe: both only wait.
            () = shutdown.cancelled() => return,
            changed = view.changed() => if changed.is_err() { return },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_pods_than_a_bridge_takes_are_refused_with_what_to_do() {
        assert_eq!(check(110, PodLink::Bridge), Ok(()));
        assert_eq!(check(BRIDGE_PODS_MAX, PodLink::Bridge), Ok(()));
        let words = check(1_200, PodLink::Bridge).unwrap_err();
        for part in ["--max-pods 1200", "1023", "1000", "--pod-link routed"] {
            assert!(words.contains(part), "{words}");
        }
        assert_eq!(check(1_200, PodLink::Routed), Ok(()));
        assert_eq!(check(PODS_MAX, PodLink::Routed), Ok(()));
        let words = check(PODS_MAX + 1, PodLink::Routed).unwrap_err();
        assert!(words.contains("4000 at most"), "{words}");
    }

    #[test]
    fn a_prefix_with_too_few_addresses_is_named_with_one_that_has_enough() {
        let of = |pods_max: u32, prefixes: &[&str]| {
            let prefixes = prefixes.iter().map(|text| text.parse().unwrap());
            too_small(pods_max, prefixes)
        };
        assert_eq!(of(110, &["10.244.1.0/24", "fd00::/64"]), None);
        assert_eq!(of(253, &["10.244.1.0/24"]), None);
        let words = of(1_200, &["10.244.1.0/24"]).unwrap();
        for part in ["10.244.1.0/24", "253 pods", "--node-cidr-prefix 21"] {
            assert!(words.contains(part), "{words}");
        }
        let words = of(4_000, &["10.244.0.0/20", "fd00::/118"]).unwrap();
        assert!(words.contains("--node-cidr-prefix-v6 116"), "{words}");
        // What it advises is enough, and half of it is not.
        for pods_max in [5, 110, 500, 1_000, 1_016, 1_017, 2_040, PODS_MAX] {
            for family in ["10.0.0.0/8", "fd00::/8"] {
                let any: IpNet = family.parse().unwrap();
                let length = fitting(pods_max, any);
                let prefix = IpNet::new_assert(any.addr(), length);
                assert_eq!(too_small(pods_max, [prefix].into_iter()), None, "{prefix}");
                let half = IpNet::new_assert(any.addr(), length + 2);
                assert!(too_small(pods_max, [half].into_iter()).is_some(), "{half}");
            }
        }
    }
}
