//! No two pods ever share a host id, whatever the history.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn pod(n: u8) -> PodUid {
    PodUid::new(&format!("pod-{n}")).unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    Allocate(u8),
    Release(u8),
    Retain(Vec<u8>),
    /// Another agent process takes over: nothing is in memory.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u8..12).prop_map(Step::Allocate),
        2 => (0u8..12).prop_map(Step::Release),
        1 => proptest::collection::vec(0u8..12, 0..12).prop_map(Step::Retain),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn ranges_are_distinct_and_stay_with_their_pod(steps in proptest::collection::vec(step(), 1..60)) {
        let directory = tempfile::tempdir().unwrap();
        let mut ranges = Ranges::new(directory.path());
        let mut model: HashMap<u8, Range> = HashMap::new();
        for step in steps {
            match step {
                Step::Allocate(n) => {
                    let range = ranges.allocate(&pod(n)).unwrap();
                    let others = model.iter().filter(|(other, _)| **other != n);
                    for (other, held) in others {
                        let apart = range.first.abs_diff(held.first) >= RANGE_LENGTH;
                        prop_assert!(apart, "pods {n} and {other}: {range:?}, {held:?}");
                    }
                    if let Some(before) = model.insert(n, range) {
                        prop_assert_eq!(before, range);
                    }
                }
                Step::Release(n) => {
                    ranges.release(&pod(n)).unwrap();
                    model.remove(&n);
                }
                Step::Retain(live) => {
                    ranges.retain(&live.iter().map(|n| pod(*n)).collect()).unwrap();
                    model.retain(|n, _| live.contains(n));
                }
                Step::Restart => ranges = Ranges::new(directory.path()),
            }
            prop_assert_eq!(ranges.slots().unwrap().len(), model.len());
        }
    }

    #[test]
    fn a_chosen_slot_is_free_and_in_bounds(taken in proptest::collection::btree_set(0u32..5000, 0..200)) {
        let slot = choose(&taken).unwrap();
        prop_assert!(!taken.contains(&slot) && slot < SLOT_COUNT);
        let last = Range::of_slot(SLOT_COUNT - 1).first;
        prop_assert!(last.checked_add(RANGE_LENGTH).is_some_and(|end| end < 0x7fff_0000));
    }
}

#[test]
fn a_full_node_and_foreign_files_are_seen() {
    assert_eq!(choose(&(0..SLOT_COUNT).collect()), None);
    let directory = tempfile::tempdir().unwrap();
    let ranges = Ranges::new(directory.path());
    fs::create_dir_all(&ranges.dir).unwrap();
    fs::write(ranges.dir.join("note"), "not ours").unwrap();
    // A regular file in a slot's place: taken by nobody, and the next slot is used.
    assert_eq!(ranges.allocate(&pod(1)).unwrap(), Range::of_slot(0));
    assert_eq!(
        ranges.allocate(&pod(2)).unwrap().map(),
        "0 1879113728 65536\n"
    );
}

#[test]
fn threads_that_race_get_different_ranges() {
    let directory = tempfile::tempdir().unwrap();
    let ranges = Ranges::new(directory.path());
    let firsts: Vec<u32> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16u8)
            .map(|n| {
                let ranges = ranges.clone();
                scope.spawn(move || ranges.allocate(&pod(n)).unwrap().first)
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let distinct: BTreeSet<&u32> = firsts.iter().collect();
    assert_eq!(distinct.len(), 16);
}

/// A user namespace that lives as long as its process.
struct Holder(std::process::Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_mapped_directory_shows_the_pods_ids_and_goes_without_its_content() {
    use std::os::unix::fs::MetadataExt as _;
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: mounting needs root");
    }
    let child = std::process::Command::new("unshare")
        .args(["--user", "sleep", "60"])
        .spawn();
    let Ok(child) = child else {
        return eprintln!("skipped: no program unshare");
    };
    let holder = Holder(child);
    let own = fs::read_link("/proc/self/ns/user").unwrap();
    let path = PathBuf::from(format!("/proc/{}/ns/user", holder.0.id()));
    let made = || fs::read_link(&path).is_ok_and(|ns| ns != own);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !made() && std::time::Instant::now() < end {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let range = Range::of_slot(SLOT_COUNT - 1);
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{}/{map}", holder.0.id()), range.map()).unwrap();
    }
    let user = UserNamespace { path, range };
    let directory = tempfile::tempdir().unwrap();
    let (volume, run) = (
        directory.path().join("volume"),
        directory.path().join("run"),
    );
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("precious"), "kept").unwrap();
    let place = idmap::directory(&run, &pod(1));
    let shown = match idmap::ensure(&volume, &place, "volume-a", &user) {
        Ok(shown) => shown,
        Err(error) if error.reason.contains("pod's ids") => {
            return eprintln!("skipped: {error}");
        }
        Err(error) => panic!("{error}"),
    };
    assert_eq!(
        idmap::ensure(&volume, &place, "volume-a", &user).unwrap(),
        shown
    );
    let file = fs::metadata(shown.join("precious")).unwrap();
    assert_eq!((file.uid(), file.gid()), (range.first, range.first));
    let single = idmap::ensure(&volume.join("precious"), &place, "file", &user).unwrap();
    assert_eq!(fs::metadata(&single).unwrap().uid(), range.first);
    assert_eq!(fs::metadata(&place).unwrap().mode() & 0o777, 0o700);
    assert_eq!(fs::metadata(volume.join("precious")).unwrap().uid(), 0);
    idmap::remove(&place).unwrap();
    idmap::remove(&place).unwrap();
    idmap::remove_all(&run).unwrap();
    assert!(!place.exists());
    assert_eq!(fs::read(volume.join("precious")).unwrap(), b"kept");
}
