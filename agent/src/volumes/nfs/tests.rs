use std::time::Instant;

use super::*;

const TABLE: &str = "\
22 1 254:1 / / rw - ext4 /dev/vda1 rw
30 22 0:44 / /lib/pods/a/volumes/kubernetes.io~nfs/data rw - nfs4 filer:/data rw,addr=10.0.0.5
31 22 0:44 /x /lib/pods/a/volume-subpaths/data/c/0 rw shared:3 - nfs4 filer:/data rw
32 22 0:45 / /lib/pods/a/volumes/kubernetes.io~nfs/two\\040 rw - nfs filer:/two rw
33 22 0:45 / /lib/pods/b/volumes/kubernetes.io~nfs/two rw - nfs filer:/two rw
34 22 0:46 / /lib/pods/a/volume-subpaths/host/c/0 rw - nfs4 other:/ rw
35 22 0:47 / /lib/pods/a/volumes/kubernetes.io~secret/s rw - tmpfs tmpfs rw
36 30 0:48 / /lib/pods/a/volumes/kubernetes.io~nfs/data/sub rw - nfs4 filer:/data/sub rw
broken line";

#[test]
fn only_the_pods_own_exports_go_and_shared_ones_are_not_forced() {
    let entries = entries(TABLE);
    assert_eq!(entries.len(), 8);
    let names = ["data".to_owned(), "two ".to_owned()];
    let found = to_unmount(&entries, Path::new("/lib/pods/a"), &names);
    let place = |name: &str| PathBuf::from("/lib/pods/a").join(name);
    assert_eq!(
        found,
        [
            (place("volumes/kubernetes.io~nfs/data/sub"), true),
            (place("volumes/kubernetes.io~nfs/two "), false),
            (place("volume-subpaths/data/c/0"), true),
            (place("volumes/kubernetes.io~nfs/data"), true),
        ],
        "what was mounted last goes first; pod b has files of filer:/two"
    );
    assert!(to_unmount(&entries, Path::new("/lib/pods/a"), &[]).is_empty());
    assert!(to_unmount(&entries, Path::new("/lib/pods"), &names).is_empty());
}

#[test]
fn addresses_with_colons_are_bracketed() {
    assert_eq!(source("filer", "/a"), "filer:/a");
    assert_eq!(source("fd00::5", "/a"), "[fd00::5]:/a");
    assert_eq!(source("[fd00::5]", "/a"), "[fd00::5]:/a");
}

/// The agent's command line, as far as the helper's is a part of it.
#[derive(clap::Parser)]
struct Agent {
    #[command(subcommand)]
    command: Helper,
}

#[derive(clap::Subcommand)]
enum Helper {
    #[command(name = HELPER)]
    MountNfs(Mount),
}

#[test]
fn the_helper_understands_what_it_is_told() {
    use clap::Parser as _;
    let options = ["hard,vers=4.1".to_owned(), "-x".to_owned()];
    let export = Export {
        server: "fd00::5",
        path: "/-a b",
        options: &options,
        read_only: true,
    };
    let address: IpAddr = "fd00::5".parse().unwrap();
    let command = own_helper(
        Path::new("/bin"),
        &export,
        address,
        Path::new("/lib/target"),
    );
    let words = command.as_std().get_args();
    let words = std::iter::once(std::ffi::OsStr::new("gantry-agent")).chain(words);
    let Helper::MountNfs(mount) = Agent::try_parse_from(words).unwrap().command;
    let wanted = Mount {
        source: "[fd00::5]:/-a b".into(),
        target: "/lib/target".into(),
        address,
        options: options.to_vec(),
        read_only: true,
    };
    assert_eq!(mount, wanted);
}

#[tokio::test]
async fn servers_are_found_by_address_and_name() {
    assert_eq!(lookup("10.0.0.5").await.unwrap().to_string(), "10.0.0.5");
    assert_eq!(lookup("[fd00::5]").await.unwrap().to_string(), "fd00::5");
    assert!(lookup("localhost").await.unwrap().is_loopback());
    let error = lookup("no-such-host.invalid").await.unwrap_err();
    assert!(error.starts_with("its name"), "{error}");
}

#[tokio::test]
async fn a_helper_that_hangs_is_killed_and_its_words_are_passed_on() {
    let directory = tempfile::tempdir().unwrap();
    let mark = directory.path().join("survived");
    let script = format!("sleep 1; touch {}", mark.display());
    let began = Instant::now();
    let mut command = Command::new("sh");
    let error = run(command.args(["-c", &script]), Duration::from_millis(200)).await;
    assert!(error.unwrap_err().contains("does not answer"));
    assert!(began.elapsed() < Duration::from_secs(1));
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(!mark.exists(), "it has gone on");
    let limit = Duration::from_secs(20);
    let mut command = Command::new("sh");
    let error = run(
        command.args(["-c", "echo no such export >&2; exit 32"]),
        limit,
    )
    .await;
    assert_eq!(error.unwrap_err(), "no such export");
    let mut command = Command::new("sh");
    run(command.args(["-c", "exit 0"]), limit).await.unwrap();
    let error = run(&mut Command::new("/nonexistent/mount.nfs"), limit).await;
    assert!(error.unwrap_err().starts_with("/nonexistent/mount.nfs: "));
}

#[tokio::test]
async fn a_thread_that_does_not_come_back_is_left_behind() {
    let limit = Duration::from_millis(100);
    let began = Instant::now();
    let hangs = in_thread(limit, || std::thread::sleep(Duration::from_secs(5))).await;
    assert!(hangs.is_none() && began.elapsed() < Duration::from_secs(4));
    assert_eq!(in_thread(Duration::from_secs(20), || 7).await, Some(7));
}

/// Nobody listens there: whether this kernel has an NFS client or not, it is told and not waited for.
#[test]
fn the_kernels_answer_comes_in_words() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: mounts need root");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mount = |options: &str| Mount {
        source: "127.0.0.1:/export".into(),
        target: directory.path().to_owned(),
        address: IpAddr::from([127, 0, 0, 1]),
        options: vec![options.into()],
        read_only: true,
    };
    let error = mount_here(&mount("soft,timeo=10,retrans=1")).unwrap_err();
    assert!(
        error.contains("no NFS client") || error.contains("nobody listens"),
        "{error}"
    );
    let error = mount_here(&mount("nfsvers=3")).unwrap_err();
    assert!(error.contains("needs mount.nfs"), "{error}");
}

#[tokio::test]
async fn a_pod_is_told_what_its_export_lacks() {
    let directory = tempfile::tempdir().unwrap();
    let mut paths = Paths::standard("/nowhere".into());
    paths.lib = directory.path().to_owned();
    let uid = PodUid::new("u-1").unwrap();
    let options = ["bg".to_owned()];
    let export = Export {
        server: "filer",
        path: "/a",
        options: &options,
        read_only: false,
    };
    let error = ensure(&uid, &paths, "data", export).await.unwrap_err();
    let words = error.to_string();
    assert!(
        words.starts_with("volume \"data\": nfs filer:/a: "),
        "{words}"
    );
    unmount_all(&uid, &paths).await.unwrap();
    assert!(ensure(&uid, &paths, "../x", export).await.is_err());
}

/// Where mount.nfs is not installed, the agent's own helper is asked, and not believed blindly.
#[tokio::test]
async fn a_helper_that_mounts_nothing_is_not_believed() {
    use std::os::unix::fs::PermissionsExt as _;
    if MOUNT_NFS.iter().any(|helper| Path::new(helper).exists()) {
        eprintln!("skipped: mount.nfs is installed");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut paths = Paths::standard(directory.path().join("bin"));
    paths.lib = directory.path().join("lib");
    fs::create_dir(&paths.bin).unwrap();
    let helper = paths.bin.join("gantry-agent");
    let uid = PodUid::new("u-1").unwrap();
    let export = Export {
        server: "127.0.0.1",
        path: "/a",
        options: &[],
        read_only: false,
    };
    for (script, words) in [
        ("#!/bin/sh\nexit 0\n", "mounted nothing"),
        ("#!/bin/sh\necho busy >&2\nexit 1\n", "127.0.0.1:/a: busy"),
    ] {
        // Written elsewhere first: a file that is open for writing cannot be run.
        let new = paths.bin.join("new");
        fs::write(&new, script).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&new, &helper).unwrap();
        let error = ensure(&uid, &paths, "data", export).await.unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    unmount_all(&uid, &paths).await.unwrap();
}

#[tokio::test]
async fn an_unmount_is_done_whether_requests_may_be_aborted_or_not() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: mounts need root");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for alone in [true, false] {
        let flags = rustix::mount::MountFlags::empty();
        mount("tmpfs", directory.path(), "tmpfs", flags, None).unwrap();
        let file = fs::File::create(directory.path().join("open")).unwrap();
        unmount_one(directory.path().to_owned(), alone)
            .await
            .unwrap();
        let point = directory.path().canonicalize().unwrap();
        assert!(table().unwrap().iter().all(|entry| entry.point != point));
        drop(file);
    }
}
