use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn pool(ranges: &[&str]) -> AddressPool {
    AddressPool::new(ranges.iter().map(|text| text.parse().unwrap()).collect())
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ours(held: &[&str]) -> Claimant {
    Claimant {
        role: Role::Ours,
        families: vec![false],
        requested: None,
        held: held.iter().map(|text| Some(ip(text))).collect(),
        external_ips: Vec::new(),
    }
}

#[test]
fn the_first_free_address_is_given_and_what_is_held_is_kept() {
    let pool = pool(&["192.0.2.1-192.0.2.3"]);
    let all = [ours(&[]), ours(&["192.0.2.1"]), ours(&[]), ours(&[])];
    let plan = plan(&pool, &all);
    let given = [(0, vec![ip("192.0.2.2")]), (2, vec![ip("192.0.2.3")])];
    assert_eq!(plan.writes, given);
    assert_eq!(plan.pending.len(), 1);
    assert!(plan.pending[0].1.contains("every one is taken"));
}

#[test]
fn the_older_of_two_keeps_a_doubled_address() {
    let pool = pool(&["192.0.2.0/29"]);
    let plan = plan(&pool, &[ours(&["192.0.2.5"]), ours(&["192.0.2.5"])]);
    assert_eq!(plan.writes, [(1, vec![ip("192.0.2.1")])]);
}

#[test]
fn another_type_gives_back_and_another_class_is_left_alone() {
    let pool = pool(&["192.0.2.1-192.0.2.2"]);
    let role = |role, held: &[&str]| Claimant { role, ..ours(held) };
    let all = [
        role(Role::Other, &["192.0.2.1"]),
        role(Role::OtherClass, &["192.0.2.2"]),
        ours(&[]),
        ours(&[]),
    ];
    let plan = plan(&pool, &all);
    assert_eq!(plan.writes, [(0, vec![]), (2, vec![ip("192.0.2.1")])]);
    assert_eq!(plan.pending[0].0, 3);
    // The younger one may be the first in the list: it is given the address after the older let go.
    let all = [ours(&[]), role(Role::Other, &["192.0.2.1"])];
    let plan = super::plan(&pool, &all);
    assert_eq!(plan.writes, [(1, vec![]), (0, vec![ip("192.0.2.1")])]);
}

#[test]
fn without_a_pool_nothing_is_taken_away_and_the_waiting_are_told_what_to_do() {
    let all = [ours(&["198.51.100.1"]), ours(&[])];
    let plan = plan(&AddressPool::default(), &all);
    assert!(plan.writes.is_empty());
    assert_eq!(plan.pending, [(1, NO_POOL.to_owned())]);
}

#[test]
fn an_address_that_is_asked_for_is_given_or_the_reason_told() {
    let pool = pool(&["192.0.2.1-192.0.2.9"]);
    let asking = |text, held: &[&str]| Claimant {
        requested: Some(ip(text)),
        ..ours(held)
    };
    let all = [
        asking("192.0.2.5", &["192.0.2.1"]),
        asking("192.0.2.5", &[]),
        asking("198.51.100.1", &["192.0.2.7"]),
    ];
    let plan = plan(&pool, &all);
    assert_eq!(plan.writes, [(0, vec![ip("192.0.2.5")]), (2, vec![])]);
    let reasons: Vec<&str> = plan.pending.iter().map(|(_, text)| text.as_str()).collect();
    assert!(
        reasons[0].contains("belongs to another Service"),
        "{reasons:?}"
    );
    assert!(reasons[1].contains("not in the pool"), "{reasons:?}");
}

#[test]
fn a_service_of_two_families_gets_one_of_each() {
    let pool = pool(&["2001:db8::/64", "192.0.2.0/29"]);
    let both = Claimant {
        families: vec![false, true],
        ..ours(&[])
    };
    let given = vec![ip("192.0.2.1"), ip("2001:db8::")];
    assert_eq!(
        plan(&pool, std::slice::from_ref(&both)).writes,
        [(0, given)]
    );
    let plan = plan(&super::tests::pool(&["192.0.2.0/29"]), &[both]);
    assert_eq!(plan.writes, [(0, vec![ip("192.0.2.1")])]);
    assert!(plan.pending[0].1.contains("no IPv6 address"));
}

fn service(spec: Value, ingress: Value) -> Service {
    let status = json!({"loadBalancer": {"ingress": ingress}});
    serde_json::from_value(json!({"metadata": {"name": "web"}, "spec": spec, "status": status}))
        .unwrap()
}

#[test]
fn a_service_says_who_it_is() {
    let role = |spec| claimant(&service(spec, json!([]))).role;
    assert_eq!(role(json!({"type": "LoadBalancer"})), Role::Ours);
    let other = json!({"type": "LoadBalancer", "loadBalancerClass": "example.com/x"});
    assert_eq!(role(other), Role::OtherClass);
    assert_eq!(role(json!({"type": "NodePort"})), Role::Other);
    let spec = json!({"type": "LoadBalancer", "ipFamilies": ["IPv6"], "loadBalancerIP": "2001:db8::1",
        "externalIPs": ["192.0.2.200"]});
    let ingress = json!([{"hostname": "x.example"}, {"ip": "192.0.2.1"}]);
    let read = claimant(&service(spec, ingress));
    assert_eq!(read.families, [true]);
    assert_eq!(read.held, [None, Some(ip("192.0.2.1"))]);
    assert_eq!(read.requested, Some(ip("2001:db8::1")));
    assert_eq!(read.external_ips, [ip("192.0.2.200")]);
}

#[test]
fn what_is_written_reads_back_as_held() {
    let bare = service(json!({"type": "LoadBalancer"}), json!([]));
    let addresses = [ip("192.0.2.1"), ip("2001:db8::1")];
    let written = with_addresses(&bare, &addresses);
    assert_eq!(claimant(&written).held, addresses.map(Some));
    assert!(ingress(&with_addresses(&written, &[])).is_empty());
}

proptest! {
    /// Whatever Services hold: after the plan no address has two owners among ours, each is of the
    /// pool, and planning again changes nothing.
    #[test]
    fn addresses_have_one_owner_and_a_second_plan_is_empty(
        drawn in prop::collection::vec(
            (0_u8..3, prop::collection::vec(1_u8..14, 0..3), prop::option::of(1_u8..14)), 0..20),
    ) {
        let address = |n: &u8| ip(&format!("192.0.2.{n}"));
        let pool = pool(&["192.0.2.1-192.0.2.10"]);
        let mut all: Vec<Claimant> = drawn
            .iter()
            .map(|(role, held, asked)| Claimant {
                role: [Role::Ours, Role::OtherClass, Role::Other][usize::from(*role)],
                held: held.iter().map(|n| Some(address(n))).collect(),
                requested: asked.as_ref().map(address),
                ..ours(&[])
            })
            .collect();
        let first = plan(&pool, &all);
        for (index, addresses) in &first.writes {
            all[*index].held = addresses.iter().copied().map(Some).collect();
        }
        let mut seen: BTreeSet<IpAddr> = BTreeSet::new();
        for claimant in all.iter().filter(|claimant| claimant.role == Role::Ours) {
            for address in claimant.held.iter().flatten() {
                prop_assert!(pool.contains(*address) && seen.insert(*address));
            }
        }
        let second = plan(&pool, &all);
        prop_assert_eq!(second.writes, vec![]);
        prop_assert_eq!(second.pending, first.pending);
    }
}
