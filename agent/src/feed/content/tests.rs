use proptest::prelude::*;
use serde_json::json;

use super::*;

fn item(key: &str, rev: u64, value: Value) -> Bytes {
    proto::Item {
        key: key.into(),
        rev,
        value: Some(value),
    }
    .encode_to_vec()
    .into()
}

fn pod(uid: &str, rev: u64) -> Bytes {
    let json = json!({"metadata": {"uid": uid, "resourceVersion": rev.to_string()}}).to_string();
    item(&format!("pod/{uid}"), rev, Value::PodJson(json.into()))
}

fn service(name: &str, port: u32) -> Bytes {
    let ports = vec![proto::ServicePort {
        port,
        ..Default::default()
    }];
    item(
        &format!("service/d/{name}"),
        0,
        Value::Service(proto::Service {
            ports,
            ..Default::default()
        }),
    )
}

fn backend(service: &str, id: &str, node: &str) -> Bytes {
    let backend = proto::Backend {
        node: node.into(),
        ..Default::default()
    };
    item(
        &format!("backend/d/{service}/{id}"),
        0,
        Value::Backend(backend),
    )
}

fn deleted(key: &str) -> Bytes {
    item(key, 0, Value::Deleted(true))
}

/// What the control plane has.
#[derive(Default)]
struct Server {
    rev: u64,
    items: BTreeMap<String, Bytes>,
}

impl Server {
    fn set(&mut self, bytes: &Bytes) {
        self.rev += 1;
        let item = proto::Item::decode(bytes.clone()).unwrap();
        match item.value {
            Some(Value::Deleted(_)) => self.items.remove(&item.key),
            _ => self.items.insert(item.key, bytes.clone()),
        };
    }

    fn commit(&self) -> proto::Commit {
        let digest = |private| {
            let items = self
                .items
                .iter()
                .filter(|(key, _)| is_private(key) == private);
            items
                .map(|(_, bytes)| item_hash(bytes))
                .collect::<Digest>()
                .value()
        };
        proto::Commit {
            rev: self.rev,
            common_digest: digest(false),
            private_digest: digest(true),
            want_ack: true,
        }
    }

    fn all(&self) -> Vec<Bytes> {
        self.items.values().cloned().collect()
    }
}

fn take(content: &mut Content, full: bool, items: &[Bytes], commit: &proto::Commit) {
    let prepared = content.prepare(full, true, items, commit).unwrap();
    assert_eq!(content.apply(prepared), Vec::<String>::new());
}

#[derive(Clone, Debug)]
enum Op {
    Pod(u8, u64),
    Service(u8, u32),
    Backend(u8, u8, u8),
    Delete(u8, u8),
    /// The changes since the last commit, as a difference.
    Commit,
    /// The same with one bit of one item flipped on the way.
    Flipped(usize, u8),
    /// Everything anew.
    Full,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        (0..3u8, 1..9u64).prop_map(|(i, rev)| Op::Pod(i, rev)),
        (0..3u8, 1..9u32).prop_map(|(i, port)| Op::Service(i, port)),
        (0..3u8, 0..3u8, 0..3u8).prop_map(|(s, i, n)| Op::Backend(s, i, n)),
        (0..3u8, 0..3u8).prop_map(|(kind, i)| Op::Delete(kind, i)),
        Just(Op::Commit),
        (any::<usize>(), 0..8u8).prop_map(|(place, bit)| Op::Flipped(place, bit)),
        Just(Op::Full),
    ];
    proptest::collection::vec(op, 1..80)
}

fn change(op: &Op) -> Option<Bytes> {
    Some(match op {
        Op::Pod(i, rev) => pod(&format!("u{i}"), *rev),
        Op::Service(i, port) => service(&format!("s{i}"), *port),
        Op::Backend(s, i, n) => backend(&format!("s{s}"), &format!("u{i}"), &format!("n{n}")),
        Op::Delete(0, i) => deleted(&format!("pod/u{i}")),
        Op::Delete(1, i) => deleted(&format!("service/d/s{i}")),
        Op::Delete(_, i) => deleted(&format!("backend/d/s{i}/u{i}")),
        Op::Commit | Op::Flipped(..) | Op::Full => return None,
    })
}

/// A content made from everything at once: what an incremental one has to equal.
fn fresh(server: &Server) -> Content {
    let mut content = Content::default();
    take(&mut content, true, &server.all(), &server.commit());
    content
}

fn text(content: &Content) -> String {
    format!("{:?}", content.view())
}

proptest! {
    #[test]
    fn content_is_the_servers_at_every_commit_and_a_flipped_bit_is_found(ops in ops()) {
        let (mut server, mut content) = (Server::default(), Content::default());
        let mut pending = Vec::new();
        for op in &ops {
            if let Some(bytes) = change(op) {
                server.set(&bytes);
                pending.push(bytes);
            }
            match op {
                Op::Commit => take(&mut content, false, &pending, &server.commit()),
                Op::Full => take(&mut content, true, &server.all(), &server.commit()),
                Op::Flipped(place, bit) if !pending.is_empty() => {
                    let mut flipped = pending.clone();
                    let at = place % flipped.len();
                    let mut bytes = flipped[at].to_vec();
                    let byte = (place / 7) % bytes.len();
                    bytes[byte] ^= 1 << bit;
                    flipped[at] = bytes.into();
                    let before = text(&content);
                    // Either it is found, or it was in an item that a later one replaces.
                    if let Ok(prepared) = content.prepare(false, true, &flipped, &server.commit()) {
                        content.apply(prepared);
                    } else {
                        prop_assert_eq!(&text(&content), &before, "a refused batch changes nothing");
                        content = Content::default(); // what the driver does: ask for everything
                        take(&mut content, true, &server.all(), &server.commit());
                    }
                }
                _ => continue,
            }
            pending.clear();
            prop_assert_eq!(text(&content), text(&fresh(&server)));
            prop_assert_eq!(content.common_digest(), server.commit().common_digest);
        }
    }
}

#[test]
fn a_flipped_bit_is_found_at_the_commit_and_everything_heals_it() {
    let mut server = Server::default();
    server.set(&backend("s", "u", "n"));
    let mut content = fresh(&server);
    server.set(&backend("s", "v", "n"));
    let mut flipped = backend("s", "v", "n").to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    let refused = content
        .prepare(false, true, &[flipped.into()], &server.commit())
        .unwrap_err();
    assert!(
        matches!(refused, Mismatch::Digest { part: "common", .. }),
        "{refused}"
    );
    assert_eq!(content.rev(), 1, "what was held stays in force");
    take(&mut content, true, &server.all(), &server.commit());
    assert_eq!(text(&content), text(&fresh(&server)));
}

#[test]
fn revisions_never_fall_within_a_lineage() {
    let mut server = Server::default();
    server.set(&service("s", 80));
    server.set(&service("s", 81));
    let content = fresh(&server);
    let old = proto::Commit {
        rev: 1,
        ..server.commit()
    };
    let refused = content.prepare(false, true, &[], &old).unwrap_err();
    assert_eq!(refused, Mismatch::StepBack { got: 1, held: 2 });
    assert!(
        content.prepare(true, false, &server.all(), &old).is_ok(),
        "another lineage may"
    );
}

#[test]
fn what_did_not_change_keeps_its_arc_also_across_a_full_copy() {
    let mut server = Server::default();
    server.set(&service("s", 80));
    server.set(&pod("u", 2));
    let mut content = fresh(&server);
    let before = content.view();
    let next = pod("u", 3);
    server.set(&next);
    take(&mut content, false, &[next], &server.commit());
    let after = content.view();
    assert!(Arc::ptr_eq(&before.services, &after.services));
    assert!(!Arc::ptr_eq(&before.pods, &after.pods));
    take(&mut content, true, &server.all(), &server.commit());
    assert!(Arc::ptr_eq(&after.pods, &content.view().pods));
    assert!(Arc::ptr_eq(&after.services, &content.view().services));
}

/// Of the values that a view holds, those whose entry stands in the other view's tree as a copy:
/// a copied entry holds the value a second time.
fn copied<K: Ord, V>(map: &OrdMap<K, Arc<V>>) -> usize {
    map.values()
        .filter(|value| Arc::strong_count(value) > 1)
        .count()
}

#[test]
fn a_commit_costs_its_difference_and_not_the_number_of_services() {
    const SERVICE_COUNT: u32 = 10_000;
    /// Entries in the nodes on the way to one entry: a leaf and what is beside it when it splits.
    const COPIED_MAX: usize = 128;
    let mut server = Server::default();
    for number in 0..SERVICE_COUNT {
        server.set(&service(&format!("s{number:05}"), 80));
        server.set(&backend(&format!("s{number:05}"), "uid", "node"));
    }
    let mut content = fresh(&server);
    // A reader holds the view while the next one is made: the worst case for sharing.
    for (turn, change) in [
        service("s05000", 81),
        service("new", 80),
        backend("s05000", "uid", "other"),
        backend("s05000", "another", "node"),
        deleted("service/d/s00007"),
        deleted("backend/d/s00007/uid"),
    ]
    .into_iter()
    .enumerate()
    {
        let held = content.view();
        assert_eq!(copied(&held.services) + copied(&held.backends), 0);
        server.set(&change);
        take(&mut content, false, &[change], &server.commit());
        let copies = copied(&held.services) + copied(&held.backends);
        assert!(
            copies <= COPIED_MAX,
            "change {turn}: {copies} entries copied"
        );
        assert_eq!(
            crate::services::changed::changed(
                &crate::services::changed::Shared::of(&held),
                &content.view(),
            )
            .len(),
            usize::from(turn != 5),
            "change {turn}"
        );
    }
}

#[test]
fn an_item_of_a_newer_control_plane_counts_in_the_digest_and_is_left_out() {
    let mut server = Server::default();
    server.set(&item("policy/d/x", 0, Value::PodJson(Bytes::new())));
    server.set(&item("pod/../../etc", 1, Value::PodJson("{}".into())));
    let mut content = Content::default();
    let prepared = content
        .prepare(true, true, &server.all(), &server.commit())
        .unwrap();
    assert_eq!(content.apply(prepared), ["pod/../../etc", "policy/d/x"]);
    assert!(content.view().pods.is_empty());
    assert_eq!(content.common_digest(), server.commit().common_digest);
}

#[test]
fn policies_and_their_peers_are_in_the_view_while_they_are_sent() {
    let policy = item("policy/d/p", 7, Value::Policy(proto::Policy::default()));
    let peer = |pod: &str| {
        let peer = proto::PolicyPeer::default();
        item(&format!("peer/s/d/{pod}"), 8, Value::Peer(peer))
    };
    let (mut content, mut server) = (Content::default(), Server::default());
    let items = [policy, peer("a"), peer("b")];
    items.iter().for_each(|item| server.set(item));
    take(&mut content, false, &items, &server.commit());
    let view = content.view();
    let name = PolicyName {
        namespace: "d".into(),
        name: "p".into(),
    };
    assert!(view.policies.contains_key(&name));
    let members: Vec<&String> = view.peers["s"].keys().collect();
    assert_eq!(members, ["d/a", "d/b"]);
    let keys: Vec<_> = content
        .private_keys()
        .into_iter()
        .map(|k| (k.key, k.rev))
        .collect();
    let wanted = [("peer/s/d/a", 8), ("peer/s/d/b", 8), ("policy/d/p", 7)];
    assert_eq!(keys, wanted.map(|(key, rev)| (key.to_owned(), rev)));
    let items = [
        deleted("policy/d/p"),
        deleted("peer/s/d/a"),
        deleted("peer/s/d/b"),
    ];
    items.iter().for_each(|item| server.set(item));
    take(&mut content, false, &items, &server.commit());
    assert!(content.view().policies.is_empty() && content.view().peers.is_empty());
}
