use std::slice::from_ref;

use gantry_api::digest::Digest;
use gantry_api::proto::item::Value;

use super::*;

fn service(name: &str, text: &str) -> Bytes {
    let service = proto::Service {
        uid: text.into(),
        ..Default::default()
    };
    let key = format!("service/d/{name}");
    proto::Item {
        key,
        rev: 0,
        value: Some(Value::Service(service)),
    }
    .encode_to_vec()
    .into()
}

fn record(rev: u64, full: bool, items: &[Bytes], all: &[Bytes]) -> Record {
    Record {
        lineage: Some(proto::Lineage {
            counter: 1,
            id: "a".into(),
        }),
        full,
        items: items.to_vec(),
        commit: Some(proto::Commit {
            rev,
            common_digest: all
                .iter()
                .map(|item| item_hash(item))
                .collect::<Digest>()
                .value(),
            ..Default::default()
        }),
        welcome: Some(proto::Welcome {
            cluster_domain: "cluster.local".into(),
            ..Default::default()
        }),
    }
}

/// Writes three commits; returns the directory and the length of the file after each.
fn three_commits() -> (tempfile::TempDir, Vec<u64>) {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, loaded) = Log::open(dir.path()).unwrap();
    assert_eq!(loaded.content.rev(), 0);
    let (a, b, c) = (service("a", "1"), service("b", "1"), service("a", "2"));
    let mut lengths = Vec::new();
    for record in [
        record(3, true, from_ref(&a), from_ref(&a)),
        record(5, false, from_ref(&b), &[a.clone(), b.clone()]),
        record(9, false, from_ref(&c), &[b.clone(), c.clone()]),
    ] {
        log.append(&record, lengths.is_empty()).unwrap();
        lengths.push(log.len);
    }
    (dir, lengths)
}

fn reopened_rev(dir: &Path) -> u64 {
    Log::open(dir).unwrap().1.content.rev()
}

#[test]
fn a_reopened_log_has_the_last_commit_and_the_settings() {
    let (dir, _) = three_commits();
    let (_, loaded) = Log::open(dir.path()).unwrap();
    assert_eq!(loaded.content.rev(), 9);
    assert_eq!(loaded.lineage.unwrap().id, "a");
    let view = loaded.content.view();
    assert_eq!(view.settings.cluster_domain, "cluster.local");
    let uids: Vec<_> = view
        .services
        .values()
        .map(|service| service.uid.as_str())
        .collect();
    assert_eq!(uids, ["2", "1"]);
}

#[test]
fn a_torn_tail_costs_the_last_commit_only_wherever_it_is_torn() {
    let (dir, lengths) = three_commits();
    let path = dir.path().join("state");
    let whole = std::fs::read(&path).unwrap();
    for cut in lengths[1]..lengths[2] {
        std::fs::write(&path, &whole[..cut as usize]).unwrap();
        assert_eq!(reopened_rev(dir.path()), 5, "cut at {cut}");
        assert_eq!(
            std::fs::metadata(&path).unwrap().len(),
            lengths[1],
            "cut at {cut}"
        );
    }
    std::fs::write(&path, &whole[..7]).unwrap();
    assert_eq!(reopened_rev(dir.path()), 0, "half the magic: an empty log");
    assert_eq!(reopened_rev(dir.path()), 0, "which is usable");
}

#[test]
fn a_damaged_record_costs_itself_and_what_follows() {
    let (dir, lengths) = three_commits();
    let path = dir.path().join("state");
    let whole = std::fs::read(&path).unwrap();
    for place in lengths[0]..lengths[1] {
        let mut damaged = whole.clone();
        damaged[place as usize] ^= 0x10;
        std::fs::write(&path, damaged).unwrap();
        assert_eq!(reopened_rev(dir.path()), 3, "damaged at {place}");
    }
}

#[test]
fn a_log_goes_on_after_a_torn_tail() {
    let (dir, lengths) = three_commits();
    let path = dir.path().join("state");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
    let (mut log, _) = Log::open(dir.path()).unwrap();
    assert_eq!(log.len, lengths[1]);
    let all = [service("z", "1")];
    log.append(&record(12, true, &all, &all), true).unwrap();
    assert_eq!(reopened_rev(dir.path()), 12);
}

#[test]
fn compaction_keeps_the_content_and_bounds_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = Log::open(dir.path()).unwrap();
    let big = "x".repeat(10_000);
    for rev in 1..=2_000 {
        let item = [service("a", &format!("{rev}{big}"))];
        log.append(&record(rev, rev == 1, &item, &item), false)
            .unwrap();
        assert!(
            log.len <= COMPACT_BYTES_MIN + 20_000,
            "{} bytes at {rev}",
            log.len
        );
    }
    let (_, loaded) = Log::open(dir.path()).unwrap();
    assert_eq!(loaded.content.rev(), 2_000);
    assert!(
        loaded
            .content
            .view()
            .services
            .values()
            .all(|s| s.uid.starts_with("2000x"))
    );
}

#[test]
fn secrets_on_disk_are_for_root_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let (dir, _) = three_commits();
    let mode = || {
        std::fs::metadata(dir.path().join("state"))
            .unwrap()
            .permissions()
            .mode()
    };
    assert_eq!(mode() & 0o077, 0);
    let (mut log, _) = Log::open(dir.path()).unwrap();
    log.compact().unwrap();
    assert_eq!(mode() & 0o077, 0);
}
