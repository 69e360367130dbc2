use super::*;
use proptest::prelude::*;

fn owner(index: u8, blocks: bool) -> OwnerReference {
    OwnerReference {
        api_version: "v1".to_owned(),
        kind: "ConfigMap".to_owned(),
        name: format!("m{index}"),
        uid: format!("u{index}"),
        block_owner_deletion: Some(blocks),
        controller: None,
    }
}

fn node(index: u8, owners: Vec<OwnerReference>) -> Node {
    Node {
        kind: kinds::by_plural("", "configmaps").unwrap(),
        key: ObjectKey::new("shop", format!("m{index}")),
        revision: 1,
        owners,
        is_deleting: false,
        has_foreground: false,
        has_orphan: false,
    }
}

fn insert(objects: &mut Objects, index: u8, node: Node) {
    objects.insert(
        format!("/registry/configmaps/shop/m{index}"),
        format!("u{index}"),
        node,
    );
}

fn delete(propagation: Propagation) -> Action {
    Action::Delete {
        propagation,
        unblock: false,
    }
}

#[test]
fn an_object_goes_with_its_last_owner() {
    let mut objects = Objects::default();
    insert(&mut objects, 1, node(1, vec![]));
    insert(
        &mut objects,
        3,
        node(3, vec![owner(1, false), owner(2, false)]),
    );
    assert_eq!(objects.decide("u1"), Action::Nothing);
    assert_eq!(
        objects.decide("u3"),
        Action::Forget {
            owners: vec!["u2".to_owned()]
        }
    );
    objects.remove("/registry/configmaps/shop/m1");
    assert_eq!(objects.decide("u3"), delete(Propagation::Background));
}

#[test]
fn a_reference_means_uid_name_kind_and_namespace_together() {
    let mut objects = Objects::default();
    insert(&mut objects, 1, node(1, vec![]));
    let mut wrong_name = owner(1, false);
    wrong_name.name = "other".to_owned();
    insert(&mut objects, 2, node(2, vec![wrong_name]));
    assert_eq!(objects.decide("u2"), delete(Propagation::Background));
    let mut elsewhere = node(3, vec![owner(1, false)]);
    elsewhere.key.namespace = "other".to_owned();
    insert(&mut objects, 3, elsewhere);
    assert_eq!(objects.decide("u3"), delete(Propagation::Background));
}

#[test]
fn foreground_waits_for_those_that_block() {
    let mut objects = Objects::default();
    let mut leaving = node(1, vec![]);
    (leaving.is_deleting, leaving.has_foreground) = (true, true);
    insert(&mut objects, 1, leaving);
    insert(&mut objects, 2, node(2, vec![owner(1, true)]));
    insert(&mut objects, 3, node(3, vec![owner(1, false)]));
    let all = vec!["u2".to_owned(), "u3".to_owned()];
    assert_eq!(objects.decide("u1"), Action::Visit(all));
    assert_eq!(objects.decide("u2"), delete(Propagation::Background));
    objects.remove("/registry/configmaps/shop/m2");
    assert_eq!(objects.decide("u1"), Action::Release, "m3 does not block");
}

#[test]
fn orphaning_takes_the_owner_out_first() {
    let mut objects = Objects::default();
    let mut leaving = node(1, vec![]);
    (leaving.is_deleting, leaving.has_orphan) = (true, true);
    insert(&mut objects, 1, leaving);
    insert(&mut objects, 2, node(2, vec![owner(1, true)]));
    let dependents = vec!["u2".to_owned()];
    assert_eq!(objects.decide("u1"), Action::Orphan { dependents });
    assert_eq!(
        objects.decide("u2"),
        Action::Nothing,
        "its owner still exists"
    );
}

proptest! {
    /// Any owner graph, cycles included: after one object is deleted in any way and every decision
    /// is carried out, nothing waits for ever, and exactly those stay that have a living owner left
    /// or never had one.
    #[test]
    fn every_deletion_ends(
        edges in proptest::collection::btree_map((0_u8..7, 0_u8..7), any::<bool>(), 0..14),
        root in 0_u8..7, way in 0_u8..3,
    ) {
        let mut objects = Objects::default();
        for index in 0..7 {
            let owners = edges
                .iter()
                .filter(|((from, to), _)| *from == index && *to != index)
                .map(|((_, to), blocks)| owner(*to, *blocks))
                .collect();
            insert(&mut objects, index, node(index, owners));
        }
        let has_owner: Vec<bool> =
            (0..7).map(|i| !objects.nodes[&format!("u{i}")].owners.is_empty()).collect();
        carry_out_delete(&mut objects, root, match way {
            0 => Propagation::Background,
            1 => Propagation::Foreground,
            _ => Propagation::Orphan,
        });
        let mut quiet = false;
        for _ in 0..200 {
            quiet = true;
            for index in 0..7_u8 {
                let uid = format!("u{index}");
                let Some(mut node) = objects.nodes.get(&uid).cloned() else { continue };
                match objects.decide(&uid) {
                    Action::Nothing | Action::Visit(_) => continue,
                    Action::Orphan { dependents } => {
                        for dependent in dependents {
                            let mut changed = objects.nodes[&dependent].clone();
                            changed.owners.retain(|owner| owner.uid != uid);
                            let number = dependent[1..].parse().unwrap();
                            insert(&mut objects, number, changed);
                        }
                        objects.remove(&format!("/registry/configmaps/shop/m{index}"));
                    }
                    Action::Release => {
                        objects.remove(&format!("/registry/configmaps/shop/m{index}"));
                    }
                    Action::Forget { owners } => {
                        node.owners.retain(|owner| !owners.contains(&owner.uid));
                        insert(&mut objects, index, node);
                    }
                    Action::Delete { propagation, unblock } => {
                        let blocking = |owner: &OwnerReference| {
                            owner.block_owner_deletion == Some(true)
                        };
                        if unblock && node.owners.iter().any(blocking) {
                            for owner in &mut node.owners {
                                owner.block_owner_deletion = Some(false);
                            }
                            insert(&mut objects, index, node);
                        } else {
                            carry_out_delete(&mut objects, index, propagation);
                        }
                    }
                }
                quiet = false;
            }
            if quiet {
                break;
            }
        }
        prop_assert!(quiet, "it goes on for ever");
        prop_assert!(!objects.nodes.contains_key(&format!("u{root}")), "the root waits for ever");
        for node in objects.nodes.values() {
            prop_assert!(!node.is_deleting, "{} waits for ever", node.key);
            for owner in &node.owners {
                prop_assert!(objects.nodes.contains_key(&owner.uid), "dangling owner");
            }
        }
        for (index, had_owner) in has_owner.iter().enumerate() {
            if !had_owner && index != usize::from(root) {
                prop_assert!(objects.nodes.contains_key(&format!("u{index}")), "u{} was no dependent", index);
            }
        }
    }
}

/// What the registry does with a deletion.
fn carry_out_delete(objects: &mut Objects, index: u8, propagation: Propagation) {
    let uid = format!("u{index}");
    let mut node = objects.nodes[&uid].clone();
    match propagation {
        Propagation::Background => {
            objects.remove(&format!("/registry/configmaps/shop/m{index}"));
            return;
        }
        Propagation::Foreground => node.has_foreground = true,
        Propagation::Orphan => node.has_orphan = true,
    }
    node.is_deleting = true;
    insert(objects, index, node);
}
