//! Creates one container: cgroup, process and file system are made here, who it runs as and how
//! it execs is libcontainer's.
//!
//! ```text
//! gantry-rt                                         init (child of the shim)
//! ─────────                                         ────
//! cgroup ─► notify socket, told "start" ─► clone ─► join its cgroups (v1; on v2 it begins in it)
//!    │                                              cgroup namespace; join net, ipc, uts
//!    │                                              root file system ─► wait for "go"
//!    ├─ "go" ─────────────────────────────────────► resource limits
//!    ├─ state.json, for exec                        libcontainer: user, groups, capabilities,
//!    └─ wait ◄──────────── ready │ error ────────────   working directory, our Executor ─► execve
//! ```
//! Why not all of libcontainer: it makes 2,100 system calls for a container, most of them to find
//! its way safely by paths; by descriptors there is nothing to find. What it is best at, the order
//! in which a process gives its rights away, stays its own: its init runs here as for an exec into
//! namespaces that are ready.
//!
//! Invariants: nothing of the container runs before it is in its cgroup, and init ends when this
//! process dies before saying "go"; so membership of the cgroup finds all that a crash leaves.
//! Every error of init reaches the report.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, anyhow};
use libcgroups::common::CgroupConfig;
use libcontainer::container::{ContainerStatus, State};
use libcontainer::notify_socket::{NOTIFY_FILE, NotifyListener, NotifySocket};
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Spec};
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::channel::{self, InitReceiver, MainSender};
use libcontainer::process::init::container_init_process;
use libcontainer::syscall::Syscall;
use libcontainer::syscall::syscall::SyscallType;
use nix::sched::{CloneFlags, setns, unshare};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::cgroup::Leaf;
use crate::executor::Workload;
use crate::process::{self, New};
use crate::rootfs::Rootfs;
use crate::{STATE, now_ns};

/// Whether all that the spec asks for is made here; libcontainer's own way knows more.
pub(crate) fn is_enough_for(spec: &Spec) -> bool {
    let terminal = spec
        .process()
        .as_ref()
        .is_some_and(|p| p.terminal().unwrap_or(false));
    let linux = spec.linux().as_ref();
    let namespaces = linux
        .and_then(|l| l.namespaces().as_deref())
        .unwrap_or_default();
    let has = |kind| namespaces.iter().any(|n| n.typ() == kind);
    let mapped = spec.mounts().iter().flatten().any(|m| {
        let words = m.options().as_deref().unwrap_or_default();
        words.iter().any(|w| w == "idmap" || w == "ridmap")
    });
    !terminal
        && !mapped
        && spec.hooks().is_none()
        && has(LinuxNamespaceType::Mount)
        && !has(LinuxNamespaceType::User)
        && !has(LinuxNamespaceType::Time)
}

/// Returns init's pid and the time just before it was made.
pub(crate) fn create(
    mut spec: Spec,
    bundle: &Path,
    root: &Path,
    workload: Workload,
) -> anyhow::Result<(i32, u128)> {
    let linux = spec
        .linux()
        .as_ref()
        .context("the spec has no linux part")?;
    let cgroup = linux
        .cgroups_path()
        .clone()
        .context("the spec has no cgroupsPath")?;
    let leaf = Leaf::create(&cgroup, &linux.resources().clone().unwrap_or_default())?;
    let namespaces = Namespaces::of(&spec)?;
    let new = namespaces.new;
    if let Some(path) = &namespaces.pid {
        join(path, CloneFlags::CLONE_NEWPID)?;
    }
    // Init is a copy of this process: processes whose namespaces it joins may not look into it.
    nix::sys::prctl::set_dumpable(false)?;

    let state = root.join(STATE);
    fs::create_dir_all(&state).with_context(|| format!("create {}", state.display()))?;
    let socket = state.join(NOTIFY_FILE);
    let notify_listener = NotifyListener::new(&socket)?;
    // Told in advance: init is let go by "go", and has nobody to wait for when it is ready.
    NotifySocket::new(&socket).notify_container_start()?;
    let (mut to_main, mut from_init) = channel::main_channel()?;
    let (to_init, mut at_init) = channel::init_channel()?;
    let (wait, go) = pipe_with(PipeFlags::CLOEXEC)?;

    let rootfs_path = spec
        .root()
        .as_ref()
        .map(|r| r.path().clone())
        .unwrap_or_default();
    let full = Rc::new(spec.clone());
    // It joins nothing and makes nothing: all of that is done when libcontainer takes over.
    if let Some(linux) = spec.linux_mut() {
        linux.set_namespaces(Some(Vec::new()));
    }
    let arguments = ContainerArgs {
        container_type: ContainerType::TenantContainer { exec_notify_fd: -1 },
        syscall: SyscallType::default(),
        spec: Rc::new(spec),
        rootfs: rootfs_path,
        console_socket: None,
        notify_listener,
        preserve_fds: 0,
        container: None,
        user_ns_config: None,
        cgroup_config: CgroupConfig {
            cgroup_path: cgroup,
            systemd_cgroup: false,
            container_name: STATE.to_owned(),
        },
        detached: true,
        executor: Box::new(workload),
        no_pivot: false,
        stdin: None,
        stdout: None,
        stderr: None,
        as_sibling: true,
        pid_file: None,
    };
    let mut init = Init {
        spec: full,
        namespaces,
        leaf: &leaf,
        arguments: &arguments,
    };
    let started_ns = now_ns();
    let mut go = Some(go);
    let pid = process::clone_sibling(new, leaf.unified(), || {
        // Held on, the end of the other process would not be seen.
        drop(go.take());
        init.run(wait, &mut to_main, &mut at_init)
    })
    .context("clone3")?;
    to_main.close()?;
    let _ = to_init.close();
    if let Some(go) = go.take() {
        // A broken pipe is an init that has failed already: its error comes below.
        let _ = fs::File::from(go).write_all(b"g");
    }
    let status = ContainerStatus::Running;
    // Both paths are absolute: nothing is to be made canonical.
    State::new(STATE, status, Some(pid), bundle.to_owned()).save(&state)?;
    from_init.wait_for_init_ready()?;
    Ok((pid, started_ns))
}

/// Which namespaces are made and which are joined.
struct Namespaces {
    new: New,
    cgroup: bool,
    /// For children only, so joined before the clone.
    pid: Option<std::path::PathBuf>,
    joined: Vec<(std::path::PathBuf, CloneFlags)>,
}

impl Namespaces {
    fn of(spec: &Spec) -> anyhow::Result<Self> {
        let list = spec
            .linux()
            .as_ref()
            .and_then(|l| l.namespaces().as_deref());
        let mut found = Self {
            new: New {
                mount: false,
                pid: false,
            },
            cgroup: false,
            pid: None,
            joined: Vec::new(),
        };
        for namespace in list.unwrap_or_default() {
            let kind = namespace.typ();
            let flag = match kind {
                LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
                LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
                LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
                LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
                LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
                LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
                other => return Err(anyhow!("namespace {other:?} is not made here")),
            };
            match (kind, namespace.path()) {
                (LinuxNamespaceType::Mount, None) => found.new.mount = true,
                (LinuxNamespaceType::Pid, None) => found.new.pid = true,
                (LinuxNamespaceType::Cgroup, None) => found.cgroup = true,
                (LinuxNamespaceType::Pid, Some(path)) => found.pid = Some(path.clone()),
                (_, Some(path)) => found.joined.push((path.clone(), flag)),
                (other, None) => return Err(anyhow!("namespace {other:?} needs a path")),
            }
        }
        Ok(found)
    }

    fn join(&self) -> anyhow::Result<()> {
        self.joined
            .iter()
            .try_for_each(|(path, flag)| join(path, *flag))
    }
}

fn join(path: &Path, kind: CloneFlags) -> anyhow::Result<()> {
    let context = || format!("cannot join namespace {}", path.display());
    let file = fs::File::open(path).with_context(context)?;
    setns(&file, kind).with_context(context)
}

/// The container's first process, until libcontainer's init takes it over.
struct Init<'a> {
    spec: Rc<Spec>,
    namespaces: Namespaces,
    leaf: &'a Leaf,
    arguments: &'a ContainerArgs,
}

impl Init<'_> {
    /// The exit code, when there is one.
    fn run(&mut self, wait: OwnedFd, main: &mut MainSender, own: &mut InitReceiver) -> i32 {
        let words = match self.prepare(wait) {
            Ok(true) => match container_init_process(self.arguments, main, own) {
                Ok(()) => return 0,
                Err(error) => error.to_string(),
            },
            // Nobody is left who would take a report.
            Ok(false) => return 255,
            Err(error) => format!("{error:#}"),
        };
        // After "ready" the channel is closed: the executor has written to the container's stderr.
        let _ = main.exec_failed(words);
        255
    }

    /// False when the process that made this one has gone.
    fn prepare(&self, wait: OwnedFd) -> anyhow::Result<bool> {
        let syscall = self.arguments.syscall.create_syscall();
        let rootfs = Rootfs::read(&self.spec, syscall.as_ref())?;
        self.leaf.enter()?;
        self.new_cgroup_namespace()?;
        self.namespaces.join()?;
        rootfs.enter()?;
        let mut byte = [0];
        if fs::File::from(wait).read(&mut byte).unwrap_or(0) == 0 {
            return Ok(false);
        }
        self.limit(syscall.as_ref())?;
        Ok(true)
    }

    /// Its root is the cgroup that the process is in.
    fn new_cgroup_namespace(&self) -> anyhow::Result<()> {
        if self.namespaces.cgroup {
            unshare(CloneFlags::CLONE_NEWCGROUP).context("make a cgroup namespace")?;
        }
        Ok(())
    }

    /// Last: a small limit must not hinder what comes before.
    fn limit(&self, syscall: &dyn Syscall) -> anyhow::Result<()> {
        let process = self.spec.process().as_ref();
        for limit in process
            .and_then(|p| p.rlimits().as_ref())
            .into_iter()
            .flatten()
        {
            syscall
                .set_rlimit(limit)
                .map_err(|error| anyhow!("set {}: {error}", limit.typ()))?;
        }
        Ok(())
    }
}
