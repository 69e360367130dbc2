use std::slice::from_ref;

use gantry_api::digest::Digest;
use gantry_api::proto::item::Value;

use super::*;

/// On a disk or not: Secrets are not kept here.
fn open(dir: &Path) -> Result<(Log, Loaded), DiskError> {
    Log::open(dir, SecretFiles::open(Path::new("/proc/no-such-place")))
}

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
        withheld: Vec::new(),
    }
}

/// Writes three commits; returns the directory and the length of the file after each.
fn three_commits() -> (tempfile::TempDir, Vec<u64>) {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, loaded) = open(dir.path()).unwrap();
    assert_eq!(loaded.content.rev(), 0);
    let (a, b, c) = (service("a", "1"), service("b", "1"), service("a", "2"));
    let mut lengths = Vec::new();
    for record in [
        record(3, true, from_ref(&a), from_ref(&a)),
        record(5, false, from_ref(&b), &[a.clone(), b.clone()]),
        record(9, false, from_ref(&c), &[b.clone(), c.clone()]),
    ] {
        log.append(record, lengths.is_empty()).unwrap();
        lengths.push(log.len);
    }
    (dir, lengths)
}

fn reopened_rev(dir: &Path) -> u64 {
    open(dir).unwrap().1.content.rev()
}

#[test]
fn a_reopened_log_has_the_last_commit_and_the_settings() {
    let (dir, _) = three_commits();
    let (_, loaded) = open(dir.path()).unwrap();
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
    let (mut log, _) = open(dir.path()).unwrap();
    assert_eq!(log.len, lengths[1]);
    let all = [service("z", "1")];
    log.append(record(12, true, &all, &all), true).unwrap();
    assert_eq!(reopened_rev(dir.path()), 12);
}

#[test]
fn compaction_keeps_the_content_and_bounds_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path()).unwrap();
    let big = "x".repeat(10_000);
    for rev in 1..=2_000 {
        let item = [service("a", &format!("{rev}{big}"))];
        log.append(record(rev, rev == 1, &item, &item), false)
            .unwrap();
        assert!(
            log.len <= COMPACT_BYTES_MIN + 20_000,
            "{} bytes at {rev}",
            log.len
        );
    }
    let (_, loaded) = open(dir.path()).unwrap();
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
fn the_file_is_for_root_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let (dir, _) = three_commits();
    let mode = || {
        std::fs::metadata(dir.path().join("state"))
            .unwrap()
            .permissions()
            .mode()
    };
    assert_eq!(mode() & 0o077, 0);
    let (mut log, _) = open(dir.path()).unwrap();
    log.compact().unwrap();
    assert_eq!(mode() & 0o077, 0);
}

/// A disk and a memory, for Secrets.
struct Places {
    disk: tempfile::TempDir,
    memory: tempfile::TempDir,
}

impl Places {
    fn new() -> Self {
        Self {
            disk: tempfile::tempdir().unwrap(),
            memory: tempfile::tempdir_in("/dev/shm").unwrap(),
        }
    }

    fn open(&self) -> (Log, Loaded) {
        Log::open(self.disk.path(), SecretFiles::open(self.memory.path())).unwrap()
    }

    fn on_disk(&self, text: &str) -> bool {
        let bytes = std::fs::read(self.disk.path().join("state")).unwrap();
        bytes.windows(text.len()).any(|w| w == text.as_bytes())
    }

    fn files(&self) -> usize {
        std::fs::read_dir(self.memory.path()).unwrap().count()
    }
}

fn secret(name: &str, value: Option<&str>) -> Bytes {
    let json = |text: &str| Value::BlobJson(format!("{{\"data\":{{\"k\":\"{text}\"}}}}").into());
    proto::Item {
        key: format!("blob/secrets/d/{name}"),
        rev: 7,
        value: Some(value.map_or(Value::Deleted(true), json)),
    }
    .encode_to_vec()
    .into()
}

/// A commit after which `secrets` and the service `a` are held.
fn private(rev: u64, full: bool, items: &[Bytes], secrets: &[Bytes]) -> Record {
    let mut record = record(rev, full, items, from_ref(&service("a", "1")));
    let digest: Digest = secrets.iter().map(|item| item_hash(item)).collect();
    record.commit.as_mut().unwrap().private_digest = digest.value();
    record
}

fn values(loaded: &Loaded) -> Vec<String> {
    let view = loaded.content.view();
    let blobs = view.blobs.values();
    blobs
        .map(|b| b["data"]["k"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_secret_is_never_on_disk_and_is_there_again_until_the_reboot() {
    let places = Places::new();
    let (a, one, two) = (
        service("a", "1"),
        secret("one", Some("sesame")),
        secret("two", Some("x")),
    );
    let (mut log, _) = places.open();
    let all = [a.clone(), one.clone(), two.clone()];
    log.append(private(3, true, &all, &all[1..]), true).unwrap();
    let newer = secret("one", Some("open"));
    log.append(
        private(4, false, from_ref(&newer), &[newer.clone(), two.clone()]),
        true,
    )
    .unwrap();
    assert!(!places.on_disk("sesame") && !places.on_disk("open"));
    // The agent starts again: everything is there, and what is old is gone.
    let mut loaded;
    (log, loaded) = places.open();
    assert_eq!(values(&loaded), ["open", "x"]);
    assert_eq!(places.files(), 2);
    log.compact().unwrap();
    (log, loaded) = places.open();
    assert_eq!(values(&loaded), ["open", "x"]);
    let gone = secret("two", None);
    log.append(private(5, false, from_ref(&gone), from_ref(&newer)), true)
        .unwrap();
    log.compact().unwrap();
    (_, loaded) = places.open();
    assert_eq!(
        (values(&loaded), places.files()),
        (vec!["open".to_owned()], 1)
    );
    // A reboot: the rest of the state is there, and the Secret is not claimed to be held.
    std::fs::remove_dir_all(places.memory.path()).unwrap();
    (log, loaded) = places.open();
    assert_eq!(
        (loaded.content.rev(), loaded.content.view().services.len()),
        (5, 1)
    );
    assert!(loaded.content.private_keys().is_empty() && values(&loaded).is_empty());
    // The control plane sends it again, beside what is new.
    let commit = private(6, false, from_ref(&newer), from_ref(&newer));
    let answer =
        loaded
            .content
            .prepare(false, true, &commit.items, commit.commit.as_ref().unwrap());
    loaded.content.apply(answer.unwrap());
    assert_eq!(values(&loaded), ["open"]);
    log.append(commit, true).unwrap();
    assert_eq!(values(&places.open().1), ["open"]);
}

#[test]
fn secrets_that_an_earlier_version_wrote_leave_the_disk() {
    let places = Places::new();
    let all = [service("a", "1"), secret("one", Some("sesame"))];
    let mut bytes = MAGIC.to_vec();
    bytes.extend(frame(&private(3, true, &all, &all[1..])));
    std::fs::write(places.disk.path().join("state"), bytes).unwrap();
    assert!(places.on_disk("sesame"));
    assert_eq!(values(&places.open().1), ["sesame"]);
    assert!(!places.on_disk("sesame"));
    assert_eq!(values(&places.open().1), ["sesame"]);
}

#[test]
fn without_memory_a_secret_is_asked_for_again() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, _) = open(dir.path()).unwrap();
    let all = [service("a", "1"), secret("one", Some("sesame"))];
    log.append(private(3, true, &all, &all[1..]), true).unwrap();
    let (_, loaded) = open(dir.path()).unwrap();
    assert_eq!(
        (loaded.content.rev(), loaded.content.private_keys().len()),
        (3, 0)
    );
}
