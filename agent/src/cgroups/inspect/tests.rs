use super::*;

#[test]
fn huge_pages_are_counted_by_size() {
    let directory = tempfile::tempdir().unwrap();
    for (name, count) in [("hugepages-2048kB", "3\n"), ("hugepages-1048576kB", "0\n")] {
        let one = directory.path().join(name);
        std::fs::create_dir(&one).unwrap();
        std::fs::write(one.join("nr_hugepages"), count).unwrap();
    }
    std::fs::create_dir(directory.path().join("other")).unwrap();
    let want = BTreeMap::from([(2 << 20, 6 << 20), (1 << 30, 0)]);
    assert_eq!(hugepages(directory.path()), want);
    assert!(hugepages(Path::new("/no/such/directory")).is_empty());
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

const TABLE: &str = "#subsys_name\thierarchy\tnum_cgroups\tenabled
cpuset\t0\t1\t1
cpu\t0\t1\t1
blkio\t0\t1\t1
memory\t0\t90\t1
devices\t0\t1\t1
hugetlb\t0\t1\t1
pids\t0\t1\t1
";

fn v2() -> Facts {
    Facts {
        is_v2: true,
        root: "/sys/fs/cgroup".into(),
        offered: set(&["memory", "cpu", "pids", "cpuset", "io", "hugetlb"]),
        table: parse_table(TABLE),
        has_pressure: true,
        ..Facts::default()
    }
}

fn v1() -> Facts {
    Facts {
        offered: set(&[
            "memory", "cpu", "pids", "cpuset", "hugetlb", "devices", "freezer",
        ]),
        table: parse_table(&TABLE.replace("\t0\t", "\t5\t")),
        unified: Some(set(&[])),
        ..Facts::default()
    }
}

fn without(mut facts: Facts, name: &str) -> Facts {
    facts.offered.remove(name);
    facts
}

/// What is said of one controller.
fn said(facts: &Facts, name: &str) -> String {
    let lacks = judge(facts).unwrap();
    let found = lacks.iter().find(|l| l.controller == Some(name)).unwrap();
    assert!(!found.remedy.is_empty());
    found.to_string()
}

#[test]
fn a_whole_machine_lacks_no_controller() {
    assert_eq!(judge(&v2()).unwrap(), []);
    let lacks = judge(&v1()).unwrap();
    assert!(lacks.iter().all(|l| l.controller.is_none()), "{lacks:?}");
}

#[test]
fn a_missing_controller_is_named_with_its_cost_and_what_brings_it_back() {
    let mut facts = without(v2(), "memory");
    let built_out = Facts {
        table: parse_table(&TABLE.replace("memory", "misc")),
        ..facts.clone()
    };
    assert!(said(&built_out, "memory").contains("CONFIG_MEMCG"));
    facts.table.insert("memory".into(), (0, false));
    let words = said(&facts, "memory");
    assert!(
        words.contains("pods with a memory limit are not started"),
        "{words}"
    );
    assert!(words.contains("cgroup_enable=memory"), "{words}");
    facts.table.insert("memory".into(), (4, true));
    assert!(said(&facts, "memory").contains("unified_cgroup_hierarchy=1"));
    facts.table.insert("memory".into(), (0, true));
    facts.is_below = true;
    let words = said(&facts, "memory");
    assert!(words.contains("cgroup.subtree_control"), "{words}");
    assert!(words.contains("Delegate=yes"), "{words}");
}

#[test]
fn on_v1_a_controller_is_mounted_or_taken_back_from_v2() {
    let mut facts = without(v1(), "pids");
    assert!(said(&facts, "pids").contains("mount -t cgroup -o pids pids"));
    facts.unified = Some(set(&["pids"]));
    assert!(said(&facts, "pids").contains("v2 side"));
}

#[test]
fn without_device_rules_nothing_starts_on_v1() {
    let error = judge(&without(v1(), "devices")).unwrap_err().to_string();
    assert!(error.contains("every device of the machine"), "{error}");
    assert!(error.contains("mount -t cgroup -o devices"), "{error}");
    // v2 has no such controller: the rules are an eBPF program.
    assert!(judge(&v2()).is_ok());
}

proptest::proptest! {
    #[test]
    fn every_set_of_controllers_is_judged_and_each_missing_one_named_once(
        bits in 0u8..64, is_v2: bool, is_below: bool, enabled: bool, hierarchy in 0u32..3,
    ) {
        let names = CONTROLLERS.map(|c| if is_v2 { c.name } else { c.v1 });
        let kept = names.iter().enumerate().filter(|(at, _)| bits >> at & 1 == 1);
        let mut offered: BTreeSet<String> = kept.map(|(_, name)| (*name).to_owned()).collect();
        offered.insert("devices".into());
        let table = CONTROLLERS.map(|c| (c.v1.to_owned(), (hierarchy, enabled)));
        let facts = Facts { is_v2, is_below, offered, table: table.into(), ..Facts::default() };
        let lacks = judge(&facts).unwrap();
        for controller in &CONTROLLERS {
            let named = lacks.iter().filter(|l| l.controller == Some(controller.name)).count();
            let wanted = facts.lacks(controller) && (is_v2 || controller.name != "io");
            proptest::prop_assert_eq!(named, usize::from(wanted));
        }
        proptest::prop_assert!(lacks.iter().filter(|l| l.controller.is_some()).all(|l| !l.remedy.is_empty()));
    }
}
