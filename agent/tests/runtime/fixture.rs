//! One pod sandbox on this machine, made of a busybox root file system and pinned namespaces.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use gantry_agent::ids::{ContainerRun, PodUid};
use gantry_agent::paths::Paths;
use gantry_agent::runtime::shim::ShimRuntime;
use gantry_agent::runtime::spec::{
    self, GivenDevices, Namespaces, PodFiles, SpecInput, security::Host,
};
use gantry_agent::runtime::{
    ContainerSpec, ExecSession, ExecSpec, Exit, ObservedContainer, Runtime, RuntimeError,
    SandboxSpec, Seccomp,
};
use gantry_api::k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use tempfile::TempDir;

const BUSYBOX: &str = "/bin/busybox";
/// Generous: the machine may be busy with eight other things.
const WAIT: Duration = Duration::from_secs(60);

static NEXT: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Fixture {
    pub(crate) runtime: ShimRuntime,
    directory: TempDir,
    paths: Paths,
    uid: PodUid,
    cgroup: String,
    host: Host,
    next_attempt: u32,
    last: Option<ContainerSpec>,
    specs: BTreeMap<u32, ContainerSpec>,
}

impl Fixture {
    pub(crate) async fn new() -> Option<Self> {
        let bin = std::env::current_exe()
            .ok()?
            .parent()?
            .parent()?
            .to_path_buf();
        let missing = if !nix::unistd::geteuid().is_root() {
            Some("needs root".to_owned())
        } else if !Path::new(BUSYBOX).exists() {
            Some(format!("needs {BUSYBOX} (apt-get install busybox-static)"))
        } else {
            let absent = ["gantry-shim", "gantry-rt"]
                .into_iter()
                .find(|b| !bin.join(b).exists());
            absent.map(|b| format!("needs {} (cargo build --workspace)", bin.join(b).display()))
        };
        if let Some(reason) = missing {
            eprintln!("skipped: {reason}");
            return None;
        }
        let directory = tempfile::Builder::new()
            .prefix("gantry-rt-test")
            .tempdir()
            .unwrap();
        let base = directory.path();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("t{}-{number}", std::process::id());
        let paths = Paths {
            run: base.join("run"),
            lib: base.join("lib"),
            log: base.join("log"),
            bpf: base.join("bpf"),
            kubelet: base.join("kubelet"),
            bin,
        };
        let uid = PodUid::new(&name).unwrap();
        let fixture = Self {
            runtime: ShimRuntime::new(paths.clone()),
            cgroup: format!("/gantry-test/pod{name}"),
            host: Host::detect(),
            next_attempt: 0,
            last: None,
            specs: BTreeMap::new(),
            uid,
            paths,
            directory,
        };
        make_rootfs(&fixture.rootfs());
        fs::create_dir(fixture.outside()).unwrap();
        fs::write(fixture.directory.path().join("hosts"), "of the pod\n").unwrap();
        fs::create_dir_all(fixture.namespaces()).unwrap();
        pin_namespaces(&fixture.namespaces());
        fixture
            .runtime
            .ensure_sandbox(&fixture.sandbox())
            .await
            .unwrap();
        Some(fixture)
    }

    fn sandbox(&self) -> SandboxSpec {
        SandboxSpec {
            pod: self.uid.clone(),
            title: "default/test".into(),
            cgroup: self.cgroup.clone(),
            log_dir: self.paths.pod_log("default", "test", &self.uid),
        }
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }

    /// A directory that no container may reach.
    pub(crate) fn outside(&self) -> PathBuf {
        self.directory.path().join("outside")
    }

    /// The image has a link where it had a directory; back to a directory without a target.
    pub(crate) fn link_in_image(&self, name: &str, target: Option<&Path>) {
        let path = self.rootfs().join(name);
        match target {
            Some(target) => {
                fs::rename(&path, path.with_extension("before")).unwrap();
                symlink(target, path).unwrap();
            }
            None => {
                fs::remove_file(&path).unwrap();
                fs::rename(path.with_extension("before"), path).unwrap();
            }
        }
    }

    fn namespaces(&self) -> PathBuf {
        self.paths.namespaces(&self.uid)
    }

    pub(crate) fn run_directory(&self, run: &ContainerRun) -> PathBuf {
        self.paths.container_run(run)
    }

    pub(crate) fn log_path(&self, run: &ContainerRun) -> PathBuf {
        Paths::container_log(&self.paths.pod_log("default", "test", &self.uid), run)
    }

    pub(crate) fn cgroup_of(&self, run: &ContainerRun) -> String {
        format!("{}/{}", self.cgroup, run.name)
    }

    fn new_run(&mut self) -> ContainerRun {
        self.next_attempt += 1;
        ContainerRun {
            pod: self.uid.clone(),
            name: format!("c{}", self.next_attempt),
            attempt: 0,
        }
    }

    /// `sh -c script` with more fields of a container.
    pub(crate) async fn run(
        &mut self,
        script: &str,
        mut patch: serde_json::Value,
    ) -> Result<ContainerRun, RuntimeError> {
        patch["command"] = json!(["sh", "-c", script]);
        self.start(patch).await
    }

    pub(crate) async fn start(
        &mut self,
        patch: serde_json::Value,
    ) -> Result<ContainerRun, RuntimeError> {
        let run = self.new_run();
        self.start_run(&run, patch).await?;
        Ok(run)
    }

    pub(crate) async fn start_run(
        &mut self,
        run: &ContainerRun,
        patch: serde_json::Value,
    ) -> Result<SystemTime, RuntimeError> {
        let net = self.namespaces().join("net");
        let container = self.container(run, patch, &net);
        self.last = Some(container.clone());
        self.specs.insert(self.next_attempt, container.clone());
        self.runtime.start_container(&container).await
    }

    pub(crate) async fn start_in_netns(&mut self, net: &str) -> Result<SystemTime, RuntimeError> {
        let run = self.new_run();
        let container = self.container(&run, json!({"command": ["true"]}), Path::new(net));
        self.runtime.start_container(&container).await
    }

    pub(crate) async fn start_again(&self, run: &ContainerRun) -> Result<SystemTime, RuntimeError> {
        let container = self.last.as_ref().filter(|c| c.run == *run).unwrap();
        self.runtime.start_container(container).await
    }

    pub(crate) fn seccomp_of_last(&self) -> Seccomp {
        self.last.as_ref().unwrap().seccomp.clone()
    }

    fn container(&self, run: &ContainerRun, patch: serde_json::Value, net: &Path) -> ContainerSpec {
        let mut container = json!({"name": run.name, "image": "busybox"});
        for (key, value) in patch.as_object().unwrap() {
            container[key] = value.clone();
        }
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "test", "namespace": "default", "uid": self.uid.as_str()},
            "spec": {"containers": [container]},
        }))
        .unwrap();
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let image = serde_json::from_value(json!({
            "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []},
        }))
        .unwrap();
        let identity = spec::identity::resolve(&pod, container, &image, &self.rootfs()).unwrap();
        let namespaces = self.namespaces();
        let oci = spec::build(&SpecInput {
            devices: &GivenDevices::default(),
            app_armor: None,
            pod: &pod,
            container,
            image: &image,
            rootfs: &self.rootfs(),
            identity: &identity,
            env: &[],
            hostname: "test",
            volumes: &BTreeMap::new(),
            mount_sub_path: &|_| Err(std::io::Error::other("no volumes here")),
            files: PodFiles {
                hosts: Some(&self.directory.path().join("hosts")),
                ..PodFiles::default()
            },
            namespaces: Namespaces {
                net: Some(net),
                ipc: Some(&namespaces.join("ipc")),
                uts: Some(&namespaces.join("uts")),
                user: None,
                pid: None,
            },
            pod_cgroup: &self.cgroup,
            host: &self.host,
        })
        .unwrap();
        ContainerSpec {
            run: run.clone(),
            oci,
            seccomp: spec::seccomp_of(&pod, container),
            allow_privilege_escalation: spec::allows_privilege_escalation(container),
            log_path: self.log_path(run),
            stdin: container.stdin.unwrap_or(false),
            stdin_once: container.stdin_once.unwrap_or(false),
            tty: container.tty.unwrap_or(false),
        }
    }

    pub(crate) async fn exec(
        &self,
        run: &ContainerRun,
        script: &str,
        stdin: bool,
        tty: bool,
    ) -> Result<ExecSession, RuntimeError> {
        let exec = ExecSpec {
            run: run.clone(),
            command: vec!["sh".into(), "-c".into(), script.into()],
            stdin,
            tty,
        };
        self.runtime.exec(&exec).await
    }

    pub(crate) async fn observed(&self) -> Vec<ObservedContainer> {
        let sandboxes = self.runtime.list().await.unwrap();
        assert_eq!(sandboxes.len(), 1);
        sandboxes.into_iter().next().unwrap().containers
    }

    pub(crate) async fn exit(&self, run: &ContainerRun) -> Exit {
        let end = Instant::now() + WAIT;
        loop {
            let observed = self.observed().await;
            let found = observed.into_iter().find(|c| c.run == *run);
            if let Some(exit) = found.and_then(|c| c.exit) {
                return exit;
            }
            assert!(Instant::now() < end, "{run} did not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) async fn wait_for_log(&self, run: &ContainerRun, text: &str) {
        let end = Instant::now() + WAIT;
        while !fs::read_to_string(self.log_path(run))
            .unwrap_or_default()
            .contains(text)
        {
            assert!(Instant::now() < end, "{text:?} never came");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// What the container wrote, both streams, in order.
    pub(crate) fn text(&self, run: &ContainerRun) -> String {
        let log = fs::read_to_string(self.log_path(run)).unwrap();
        let mut text = String::new();
        for line in log.lines() {
            let mut fields = line.splitn(4, ' ').skip(2);
            let tag = fields.next().unwrap();
            text.push_str(fields.next().unwrap());
            if tag == "F" {
                text.push('\n');
            }
        }
        text
    }

    pub(crate) fn has_process(&self, run: &ContainerRun, command: &str) -> bool {
        gantry_shim::cgroup::members(&self.cgroup_of(run))
            .iter()
            .any(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&line).contains(command)
            })
    }

    /// As SIGKILL would: nothing is told to anyone, descriptors close.
    pub(crate) fn drop_agent(&mut self) {
        let elsewhere = Paths {
            run: self.directory.path().join("no-agent"),
            ..self.paths.clone()
        };
        self.runtime = ShimRuntime::new(elsewhere);
    }

    pub(crate) fn new_agent(&mut self) {
        self.runtime = ShimRuntime::new(self.paths.clone());
    }

    /// The pid of this sandbox's own shim, by its working directory.
    fn shim_pid(&self) -> Option<i32> {
        let directory = self.paths.sandbox(&self.uid);
        fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let name = fs::read_to_string(entry.path().join("comm")).ok()?;
            let cwd = fs::read_link(entry.path().join("cwd")).ok()?;
            (name.trim() == "gantry-shim" && cwd == directory).then_some(pid)
        })
    }

    pub(crate) fn kill_shim(&self) {
        let pid = nix::unistd::Pid::from_raw(self.shim_pid().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    /// The sandbox goes without a word to its shim, whose pid is returned.
    pub(crate) fn abandon(&mut self) -> i32 {
        let pid = self.shim_pid().unwrap();
        self.drop_agent();
        unpin_namespaces(&self.namespaces());
        fs::remove_dir_all(self.paths.sandbox(&self.uid)).unwrap();
        self.new_agent();
        pid
    }

    pub(crate) fn cut_off_start(&mut self) -> ContainerRun {
        let run = self.new_run();
        let directory = self.run_directory(&run);
        fs::create_dir_all(directory.join("state")).unwrap();
        fs::write(directory.join("state/state.json"), "{\"ociVers").unwrap();
        let intent = json!({"cgroup": self.cgroup_of(&run), "logPath": "/x", "seccompPath": ""});
        fs::write(directory.join("intent.json"), intent.to_string()).unwrap();
        for root in gantry_shim::cgroup::roots() {
            let path = gantry_shim::cgroup::below(&root, &self.cgroup_of(&run));
            fs::create_dir_all(path).unwrap();
        }
        run
    }

    /// Removes everything through the runtime and checks that nothing is left.
    pub(crate) async fn finish(self) {
        self.runtime.remove_sandbox(&self.uid).await.unwrap();
        self.runtime.remove_sandbox(&self.uid).await.unwrap();
        assert_eq!(self.shim_pid(), None, "the shim survived");
        unpin_namespaces(&self.namespaces());
        let left: Vec<_> = fs::read_dir(self.paths.sandbox(&self.uid))
            .map(|entries| entries.flatten().map(|e| e.path()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "{left:?}");
        for root in gantry_shim::cgroup::roots() {
            let path = gantry_shim::cgroup::below(&root, &self.cgroup);
            assert!(!path.exists(), "{}", path.display());
            // Shared with the other tests: the last one succeeds.
            let _ = fs::remove_dir(gantry_shim::cgroup::below(&root, "/gantry-test"));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let own = self.directory.path().to_str().unwrap();
        assert!(!mounts.contains(own), "{mounts}");
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            assert!(!line.contains(own), "{line:?} still runs");
        }
        // Shared likewise; a shim that has just ended may still count for a moment.
        let removed = self.runtime.remove_shim_cgroup();
        let _ = tokio::time::timeout(std::time::Duration::from_millis(200), removed).await;
    }
}

/// After a failed test: what [`Fixture::finish`] would have removed.
impl Drop for Fixture {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        // Else the agent would replace the shim.
        self.drop_agent();
        if let Some(pid) = self.shim_pid() {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let end = Instant::now() + Duration::from_secs(2);
        while gantry_shim::cgroup::kill_members(&self.cgroup) > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = gantry_shim::cgroup::remove(&self.cgroup);
        for name in ["net", "ipc", "uts"] {
            let path = self.namespaces().join(name);
            let _ = nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

fn make_rootfs(rootfs: &Path) {
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "root"] {
        fs::create_dir_all(rootfs.join(directory)).unwrap();
    }
    fs::copy(BUSYBOX, rootfs.join("bin/busybox")).unwrap();
    for name in [
        "sh", "cat", "echo", "sleep", "true", "grep", "ls", "wc", "head", "touch", "unshare", "id",
        "stty", "tty", "printf",
    ] {
        symlink("busybox", rootfs.join("bin").join(name)).unwrap();
    }
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
}

/// A thread of its own unshares and ends; the mounts keep the namespaces.
fn pin_namespaces(directory: &Path) {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    let directory = directory.to_path_buf();
    let pin = move || {
        let new = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
        unshare(new).unwrap();
        for name in ["net", "ipc", "uts"] {
            let to = directory.join(name);
            fs::File::create(&to).unwrap();
            let from = format!("/proc/thread-self/ns/{name}");
            let none: Option<&str> = None;
            mount(Some(from.as_str()), &to, none, MsFlags::MS_BIND, none).unwrap();
        }
    };
    std::thread::spawn(pin).join().unwrap();
}

fn unpin_namespaces(directory: &Path) {
    if !directory.exists() {
        return; // abandoned
    }
    for name in ["net", "ipc", "uts"] {
        let path = directory.join(name);
        nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH).unwrap();
        fs::remove_file(path).unwrap();
    }
    fs::remove_dir(directory).unwrap();
    let _ = directory.parent().map(fs::remove_dir);
}
