use std::process::{Child, Command, Stdio};

use super::*;

/// A tree of our own beside `/gantry`, removed at the end.
struct Scratch(Cgroups);

impl Scratch {
    fn new(name: &str) -> Option<Self> {
        Self::with(name, Policy::default())
    }

    fn with(name: &str, policy: Policy) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: cgroups need root");
            return None;
        }
        let base = format!("/gantry-test-{name}-{}", std::process::id());
        match Cgroups::detect_at(&base, policy) {
            Ok(cgroups) => {
                for note in cgroups.lacks() {
                    eprintln!("degraded: {note}");
                }
                if let Err(e) = cgroups.ensure_root_blocking() {
                    eprintln!("skipped: {e}");
                    return None;
                }
                Some(Self(cgroups))
            }
            Err(e) => {
                eprintln!("skipped: {e}");
                None
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = self.0.remove_blocking(&self.0.shared.base);
    }
}

fn uid(text: &str) -> PodUid {
    PodUid::new(text).unwrap()
}

fn limits() -> Limits {
    Limits {
        cpu_shares: 512,
        cpu_quota_us: Some(50_000),
        memory_limit_bytes: Some(64 << 20),
        pids_max: Some(32),
        cpu_request_millicores: 500,
        memory_min_bytes: 0,
        memory_low_bytes: 32 << 20,
        oom_group: true,
        ..Limits::default()
    }
}

/// The container's cgroup, as the runtime makes it: on v2 a leaf enables nothing for children.
fn make_leaf(cgroups: &Cgroups, leaf: &str) {
    if cgroups.is_v2() {
        tree::mkdir(&cgroups.dirs(leaf).unwrap()[0]).unwrap();
    } else {
        cgroups.ensure_dir(leaf).unwrap();
    }
}

/// A process in every hierarchy's leaf below `pod`, with a child that ignores SIGTERM.
fn occupy(cgroups: &Cgroups, pod: &str) -> Child {
    let leaf = format!("{pod}/c1");
    make_leaf(cgroups, &leaf);
    let child = Command::new("sh")
        .args(["-c", "trap '' TERM; sleep 600 & sleep 0.1; sleep 600"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    for dir in cgroups.dirs(&leaf).unwrap() {
        tree::write(&dir.join("cgroup.procs"), &child.id().to_string()).unwrap();
    }
    child
}

#[tokio::test]
async fn pod_gets_its_limits_and_goes_with_all_processes() {
    let Some(scratch) = Scratch::new("pod") else {
        return;
    };
    let cgroups = &scratch.0;
    let (pod, qos) = (uid("p-1"), QosClass::Burstable);
    let path = cgroups.ensure_pod(&pod, qos, &limits()).await.unwrap();
    assert_eq!(
        cgroups.ensure_pod(&pod, qos, &limits()).await.unwrap(),
        path
    );
    assert_eq!(cgroups.pods(), vec![(pod.clone(), qos)]);
    let read = |controller: &str, file: &str| {
        let dir = join(cgroups.layout().root_of(controller).unwrap(), &path);
        tree::read(&dir.join(file))
            .unwrap()
            .unwrap()
            .trim()
            .to_owned()
    };
    assert_eq!(read("pids", "pids.max"), "32");
    if cgroups.is_v2() {
        assert_eq!(read("memory", "memory.max"), (64 << 20).to_string());
        assert_eq!(read("cpu", "cpu.max"), "50000 100000");
        assert_eq!(read("cpu", "cpu.weight"), "59");
    } else {
        assert_eq!(
            read("memory", "memory.limit_in_bytes"),
            (64 << 20).to_string()
        );
        assert_eq!(read("cpu", "cpu.cfs_quota_us"), "50000");
        let level = join(cgroups.layout().root_of("cpu").unwrap(), &path);
        let level = tree::read(&level.parent().unwrap().join("cpu.shares"))
            .unwrap()
            .unwrap();
        assert_eq!(
            level.trim(),
            "512",
            "the level weighs what its pods request"
        );
    }
    let all = limits();
    let leaf = cgroups.ensure_container(&path, "c1", &all).await.unwrap();
    let file = |v2: (&str, &str), v1: (&str, &str)| {
        let (controller, file) = if cgroups.is_v2() { v2 } else { v1 };
        let dir = join(cgroups.layout().root_of(controller).unwrap(), &leaf);
        let text = tree::read(&dir.join(file)).unwrap();
        text.map(|t| t.trim().to_owned())
    };
    let memory = file(
        ("memory", "memory.max"),
        ("memory", "memory.limit_in_bytes"),
    );
    assert_eq!(memory, Some((64 << 20).to_string()));
    if cgroups.is_v2() {
        assert_eq!(
            file(("memory", "memory.oom.group"), ("", "")),
            Some("1".into())
        );
        assert_eq!(
            file(("memory", "memory.low"), ("", "")),
            Some((32 << 20).to_string())
        );
    }
    // Up and down again: v1 wants the two memory limits in another order each time.
    for bytes in [128 << 20, 48 << 20] {
        let other = Limits {
            memory_limit_bytes: Some(bytes),
            cpu_quota_us: Some(bytes >> 12),
            cpu_burst_us: bytes >> 13,
            ..limits()
        };
        let again = cgroups.ensure_container(&path, "c1", &other);
        assert_eq!(again.await.unwrap(), leaf);
        let memory = file(
            ("memory", "memory.max"),
            ("memory", "memory.memsw.limit_in_bytes"),
        );
        assert_eq!(memory.unwrap_or(bytes.to_string()), bytes.to_string());
        let burst = file(("cpu", "cpu.max.burst"), ("cpu", "cpu.cfs_burst_us"));
        assert_eq!(
            burst.unwrap_or((bytes >> 13).to_string()),
            (bytes >> 13).to_string()
        );
    }
    let mut child = occupy(cgroups, &path);
    assert!(
        cgroups
            .members(&path)
            .unwrap()
            .contains(&(child.id() as i32))
    );
    let stats = cgroups.stats(&path).unwrap().unwrap();
    assert!(stats.task_count >= 1 && stats.memory_usage_bytes >= stats.memory_working_set_bytes);
    assert_eq!(cgroups.oom_kills(&path).unwrap(), 0);
    let reaper = std::thread::spawn(move || child.wait().unwrap());
    cgroups.remove_pod(&pod).await.unwrap();
    cgroups.remove_pod(&pod).await.unwrap();
    assert!(!reaper.join().unwrap().success());
    assert_eq!(cgroups.pods(), vec![]);
    assert_eq!(cgroups.stats(&path).unwrap(), None);
}

#[tokio::test]
async fn oom_kills_are_counted_below_the_pod() {
    let Some(scratch) = Scratch::new("oom") else {
        return;
    };
    let cgroups = &scratch.0;
    let small = Limits {
        memory_limit_bytes: Some(16 << 20),
        ..limits()
    };
    let path = cgroups
        .ensure_pod(&uid("o"), QosClass::Burstable, &small)
        .await
        .unwrap();
    let leaf = format!("{path}/c1");
    make_leaf(cgroups, &leaf);
    let procs = join(cgroups.layout().root_of("memory").unwrap(), &leaf).join("cgroup.procs");
    // tail keeps the endless line in memory: 16 MiB are soon not enough. The ulimit guards the
    // machine should the cgroup's limit not hold.
    let procs = procs.display();
    let script = format!("ulimit -v 400000; echo $$ > {procs} && exec tail /dev/zero");
    let status = Command::new("sh")
        .args(["-c", &script])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(!status.success());
    assert!(cgroups.oom_kills(&path).unwrap() >= 1);
}

#[test]
fn only_paths_below_our_root_are_touched() {
    let Some(scratch) = Scratch::new("path") else {
        return;
    };
    let cgroups = &scratch.0;
    let base = cgroups.shared.base.clone();
    for path in [
        "/",
        "",
        "/system.slice",
        "/gantry",
        &format!("{base}x"),
        &format!("{base}/../x"),
    ] {
        let refused = matches!(cgroups.members(path), Err(CgroupError::ForeignPath(_)));
        assert!(refused, "{path}");
    }
    assert!(
        cgroups
            .members(&format!("{base}/burstable"))
            .unwrap()
            .is_empty()
    );
}

#[test]
fn v2_kills_and_removes_by_the_kernels_own_means() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: cgroups need root");
    }
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let unified = detect::parse(&table).and_then(|l| l.unified().map(Path::to_owned));
    let Some(unified) = unified else {
        return eprintln!("skipped: no cgroup2 mounted");
    };
    let dir = unified.join(format!("gantry-test-kill-{}", std::process::id()));
    tree::mkdir(&dir).unwrap();
    tree::mkdir(&dir.join("deep")).unwrap();
    let mut child = Command::new("sleep").arg("600").spawn().unwrap();
    tree::write(&dir.join("deep/cgroup.procs"), &child.id().to_string()).unwrap();
    let reaper = std::thread::spawn(move || child.wait().unwrap());
    let patience = Duration::from_secs(5);
    tree::kill_all(std::slice::from_ref(&dir), patience).unwrap();
    tree::remove(&dir, patience).unwrap();
    assert!(!reaper.join().unwrap().success());
    assert!(!dir.exists());
}

#[tokio::test]
async fn whole_cpus_are_exclusive_across_a_restart_and_given_back() {
    let policy = Policy {
        exclusive_cpus: true,
        ..Policy::default()
    };
    let Some(scratch) = Scratch::with("pins", policy) else {
        return;
    };
    let cgroups = &scratch.0;
    let online = std::thread::available_parallelism().unwrap().get();
    let Some(root) = cgroups.layout().root_of("cpuset") else {
        return eprintln!("skipped: no cpusets");
    };
    if online < 2 || !cgroups.has("cpuset") {
        return eprintln!("skipped: no cpusets, or one CPU only");
    }
    let set = |path: &str| {
        let text = tree::read(&join(root, path).join("cpuset.cpus")).unwrap();
        cpu_pinning::parse(&text.unwrap_or_default()).unwrap()
    };
    let (plain, class) = (limits(), QosClass::Guaranteed);
    let one = Limits {
        exclusive_cpus: 1,
        ..limits()
    };
    let pod = cgroups.ensure_pod(&uid("a"), class, &one).await.unwrap();
    let shared_pod = cgroups.ensure_pod(&uid("s"), class, &plain).await.unwrap();
    let other = cgroups
        .ensure_container(&shared_pod, "c", &plain)
        .await
        .unwrap();
    let own = cgroups.ensure_container(&pod, "c", &one).await.unwrap();
    let held = set(&own);
    let best_effort = format!("{}/besteffort", cgroups.shared.base);
    assert_eq!(held.len(), 1);
    assert!(set(&best_effort).is_disjoint(&held) && set(&other).is_disjoint(&held));
    assert_eq!(set(&best_effort).len(), online - 1);
    // Another agent finds it so, and has no more than there is.
    let again = Cgroups::detect_at(&cgroups.shared.base, policy).unwrap();
    again.ensure_root_blocking().unwrap();
    assert_eq!(set(&own), held);
    let all = Limits {
        exclusive_cpus: online,
        ..limits()
    };
    let pod = again.ensure_pod(&uid("b"), class, &all).await.unwrap();
    let refused = again.ensure_container(&pod, "c", &all).await;
    assert!(matches!(refused, Err(CgroupError::NoExclusiveCpus { .. })));
    again.remove_pod(&uid("a")).await.unwrap();
    assert_eq!(set(&best_effort).len(), online);
    assert_eq!(set(&other).len(), online);
}

#[tokio::test]
async fn a_cgroup_made_in_advance_is_taken_once_and_only_with_its_limits() {
    let Some(scratch) = Scratch::new("ahead") else {
        return;
    };
    let cgroups = &scratch.0;
    let (pod, qos, all) = (uid("a-1"), QosClass::Burstable, limits());
    let path = cgroups.ensure_pod(&pod, qos, &all).await.unwrap();
    let in_advance = || cgroups.containers_in_advance(&path, vec![("c".into(), all.clone())]);
    let file = join(
        cgroups.layout().root_of("pids").unwrap(),
        &format!("{path}/c/pids.max"),
    );
    let pids_max = || tree::read(&file).unwrap().unwrap().trim().to_owned();
    in_advance().await;
    assert_eq!(pids_max(), "32", "the cgroup is there, with its limits");
    // What nobody writes stays as it is: that tells which call has written.
    tree::write(&file, "31").unwrap();
    cgroups.ensure_container(&path, "c", &all).await.unwrap();
    assert_eq!(pids_max(), "31", "taken as it was made");
    cgroups.ensure_container(&path, "c", &all).await.unwrap();
    assert_eq!(pids_max(), "32", "not a second time");

    in_advance().await;
    let fewer = Limits {
        pids_max: Some(16),
        ..all.clone()
    };
    cgroups.ensure_container(&path, "c", &fewer).await.unwrap();
    assert_eq!(pids_max(), "16", "other limits are written");

    in_advance().await;
    cgroups.remove(&format!("{path}/c")).await.unwrap();
    cgroups.ensure_container(&path, "c", &all).await.unwrap();
    assert_eq!(pids_max(), "32", "one that has gone is made");

    in_advance().await;
    cgroups.remove_pod(&pod).await.unwrap();
    assert!(cgroups.shared.ready.lock().unwrap().is_empty());
}
