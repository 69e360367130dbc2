use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

fn owner(n: u32) -> Owner {
    Owner {
        container_id: format!("pod-{n}"),
        ifname: "eth0".into(),
    }
}

fn range(prefix: &str) -> Range {
    Range::new(prefix.parse().unwrap()).unwrap()
}

fn ipam(dir: &Path, boot: &str, prefixes: &[&str]) -> Ipam {
    let ranges = prefixes.iter().map(|prefix| range(prefix)).collect();
    Ipam::new(dir, "gantry", boot, ranges)
}

#[test]
fn network_gateway_and_broadcast_are_never_leased() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = ipam(dir.path(), "boot", &["10.0.0.0/29", "fd00::/125"]);
    assert_eq!(ipam.ranges()[0].gateway().to_string(), "10.0.0.1");
    assert_eq!(ipam.ranges()[1].gateway().to_string(), "fd00::1");
    let leased: Vec<_> = (0..5)
        .map(|n| ipam.allocate(&owner(n)).unwrap().addresses[0])
        .collect();
    let leased: Vec<_> = leased.iter().map(ToString::to_string).collect();
    assert_eq!(
        leased,
        ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]
    );
    let error = ipam.allocate(&owner(9)).unwrap_err();
    assert_eq!(error.code(), 101);
    assert_eq!(
        error.to_string(),
        "no free address in 10.0.0.0/29 of network gantry: all 5 are leased; \
         delete pods or give this node a larger prefix"
    );
}

#[test]
fn exhaustion_of_one_family_gives_the_other_back() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = ipam(dir.path(), "boot", &["10.0.0.0/24", "fd00::/126"]);
    ipam.allocate(&owner(1)).unwrap();
    ipam.allocate(&owner(2)).unwrap();
    ipam.allocate(&owner(3)).unwrap_err();
    assert_eq!(ipam.leases().unwrap().len(), 4);
}

#[test]
fn a_freed_address_is_reused_last() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = ipam(dir.path(), "boot", &["10.0.0.0/29"]);
    let first = ipam.allocate(&owner(1)).unwrap().addresses;
    ipam.release(&owner(1)).unwrap();
    for n in 2..=5 {
        assert_ne!(ipam.allocate(&owner(n)).unwrap().addresses, first);
    }
    assert_eq!(ipam.allocate(&owner(6)).unwrap().addresses, first);
}

#[test]
fn the_same_owner_gets_the_same_addresses() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = ipam(dir.path(), "boot", &["10.0.0.0/24", "fd00::/64"]);
    let first = ipam.allocate(&owner(1)).unwrap().addresses;
    let again = ipam.allocate(&owner(1)).unwrap();
    assert_eq!((again.addresses, again.new), (first.clone(), false));
    assert_eq!(ipam.release(&owner(1)).unwrap(), first);
    assert_eq!(ipam.release(&owner(1)).unwrap(), Vec::<IpAddr>::new());
}

#[test]
fn a_pod_that_starts_again_gets_the_address_it_had_unless_another_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let before = ipam(dir.path(), "boot", &["10.0.0.0/24", "fd00::/64"]);
    for n in 1..=2 {
        before.allocate(&owner(n)).unwrap();
    }
    let had = before.allocate(&owner(3)).unwrap().addresses;
    let after = ipam(dir.path(), "next boot", &["10.0.0.0/24", "fd00::/64"]);
    after.prefer(&owner(3), &had).unwrap();
    assert_eq!(after.allocate(&owner(3)).unwrap().addresses, had);
    // Neither the gateway's, nor one of no range, nor another pod's, nor a second one.
    let refused = ["10.0.0.1", "10.0.0.0", "192.0.2.1", "10.0.0.4", "10.0.0.9"];
    let refused: Vec<IpAddr> = refused.iter().map(|text| text.parse().unwrap()).collect();
    after.prefer(&owner(4), &refused[..4]).unwrap();
    after.prefer(&owner(3), &refused[4..]).unwrap();
    assert_eq!(after.allocate(&owner(3)).unwrap().addresses, had);
    let other = after.allocate(&owner(4)).unwrap().addresses;
    assert!(!refused.contains(&other[0]), "{other:?}");
}

#[test]
fn an_address_of_an_earlier_prefix_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    ipam(dir.path(), "boot", &["10.0.0.0/24"])
        .allocate(&owner(1))
        .unwrap();
    let moved = ipam(dir.path(), "boot", &["10.9.0.0/24"]);
    assert_eq!(
        moved.allocate(&owner(1)).unwrap().addresses[0].to_string(),
        "10.9.0.2"
    );
    assert_eq!(moved.leases().unwrap().len(), 1);
}

#[test]
fn ten_reboots_leak_no_lease() {
    let dir = tempfile::tempdir().unwrap();
    for boot in 0..10 {
        let ipam = ipam(dir.path(), &format!("boot-{boot}"), &["10.0.0.0/28"]);
        assert_eq!(ipam.leases().unwrap().len(), 0, "boot {boot}");
        for n in 0..13 {
            ipam.allocate(&owner(boot * 100 + n)).unwrap();
        }
        ipam.allocate(&owner(9999)).unwrap_err();
    }
}

#[test]
fn parallel_allocations_get_distinct_addresses() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = ipam(dir.path(), "boot", &["10.0.0.0/24"]);
    let threads: Vec<_> = (0..100)
        .map(|n| {
            let ipam = ipam.clone();
            std::thread::spawn(move || ipam.allocate(&owner(n)).unwrap().addresses[0])
        })
        .collect();
    let distinct: HashSet<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    assert_eq!(distinct.len(), 100);
}

#[test]
fn strange_files_among_the_leases_are_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let ipam = ipam(dir.path(), "boot", &["10.0.0.0/24"]);
    ipam.allocate(&owner(1)).unwrap();
    fs::write(dir.path().join("gantry/leases/README"), "x").unwrap();
    fs::write(dir.path().join("gantry/leases/10.0.0.3"), "x").unwrap();
    assert_eq!(ipam.leases().unwrap().len(), 1);
}

#[test]
fn prefixes_without_room_are_refused() {
    for prefix in ["10.0.0.0/31", "10.0.0.0/32", "fd00::/127", "fd00::/128"] {
        let error = Range::new(prefix.parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains(prefix), "{error}");
    }
    assert_eq!(range("10.0.0.0/30").size(), 1);
    assert_eq!(range("fd00::/126").size(), 2);
    assert_eq!(range("10.0.0.0/8").size(), RANGE_SIZE_MAX - 3);
    assert_eq!(range("::/0").size(), RANGE_SIZE_MAX - 2);
}

proptest! {
    /// Whatever was leased before: the pick is free, leasable and, if anything else is free, not
    /// the address that was handed out last.
    #[test]
    fn pick_is_free_and_goes_round(
        taken in proptest::collection::hash_set(0u32..64, 0..64),
        previous in proptest::option::of(0u32..80),
    ) {
        let range = range("10.0.0.0/26");
        let base = u32::from(Ipv4Addr::new(10, 0, 0, 0));
        let address = |offset: u32| IpAddr::V4(Ipv4Addr::from(base + offset));
        let taken: HashSet<IpAddr> = taken.into_iter().map(address).collect();
        let free: Vec<IpAddr> = (2..63).map(address).filter(|a| !taken.contains(a)).collect();
        let previous = previous.map(address);
        match range.pick(taken.iter(), previous) {
            None => prop_assert!(free.is_empty()),
            Some(picked) => {
                prop_assert!(free.contains(&picked));
                if free.len() > 1 {
                    prop_assert_ne!(Some(picked), previous);
                }
            }
        }
    }
}
