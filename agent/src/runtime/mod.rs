//! Containers: from an OCI spec to a process that a shim owns.
//!
//! ```text
//! agent ──spawn──► gantry-shim (one per pod, setsid, subreaper) ──spawn──► gantry-rt create (one shot, libcontainer)
//!   │  shim.sock: start, signal, exec, attach                                  └─► init: a CHILD OF THE SHIM
//!   └── reads <container>/<attempt>/exit, written by the shim (write, fsync, rename) before it tells anyone
//! ```
//! The agent never forks raw, never calls libcontainer and is no parent of any container, so its
//! death changes nothing. After a start it adopts: [`Runtime::list`] reads what the shims wrote.

pub mod logs;
pub mod seccomp;
pub mod shim;
pub mod spec;

use std::path::PathBuf;
use std::time::SystemTime;

use async_trait::async_trait;
use oci_spec::runtime::Spec;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::ids::{ContainerRun, PodUid};

/// What a shim needs to know once.
#[derive(Clone, Debug)]
pub struct SandboxSpec {
    /// The pod.
    pub pod: PodUid,
    /// For people: `namespace/name`.
    pub title: String,
    /// The pod's cgroup, absolute below each hierarchy's root: `/gantry/burstable/pod<uid>`.
    pub cgroup: String,
    /// `/var/log/pods/<ns>_<name>_<uid>`.
    pub log_dir: PathBuf,
}

/// Which seccomp filter is loaded before the first instruction of init and of every exec.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Seccomp {
    /// Docker's default profile.
    #[default]
    RuntimeDefault,
    /// None.
    Unconfined,
    /// A profile file below the agent's seccomp directory, by relative path.
    Localhost(String),
}

/// One container to create and start.
#[derive(Clone, Debug)]
pub struct ContainerSpec {
    /// Which run of which container.
    pub run: ContainerRun,
    /// Complete: process, mounts, namespaces, resources. Made by [`spec`].
    pub oci: Spec,
    /// Loaded by gantry-rt's executor, not by libcontainer.
    pub seccomp: Seccomp,
    /// `securityContext.allowPrivilegeEscalation`: no_new_privs is not set when true.
    pub allow_privilege_escalation: bool,
    /// CRI log file.
    pub log_path: PathBuf,
    /// Keep stdin open for attach.
    pub stdin: bool,
    /// End stdin when the first client that was attached to it has left.
    pub stdin_once: bool,
    /// Give the container a terminal.
    pub tty: bool,
}

/// How a container ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Exit {
    /// The exit code; 128 + signal when a signal ended it.
    pub code: i32,
    /// The signal, 0 when it exited by itself.
    pub signal: i32,
    /// The kernel's OOM killer hit its cgroup since the start, and it died of SIGKILL or 137.
    pub oom_killed: bool,
    /// When init was started.
    pub started_at: SystemTime,
    /// When it was reaped.
    pub finished_at: SystemTime,
    /// The status was lost (shim died): code is 137 and nobody knows better.
    pub unknown: bool,
}

/// What runs or ran, as the shim's files tell after an agent start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ObservedContainer {
    /// Which run.
    pub run: ContainerRun,
    /// Absent while it is being created.
    pub started_at: Option<SystemTime>,
    /// Present when it has ended.
    pub exit: Option<Exit>,
    /// Init's pid in the host's pid namespace, while it runs.
    pub pid: Option<u32>,
}

/// A container that runs now, by its records alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RunningContainer {
    /// Which run.
    pub run: ContainerRun,
    /// Init's pid in the host's pid namespace.
    pub pid: u32,
}

/// A CRI log that is written now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenLog {
    /// By which run.
    pub run: ContainerRun,
    /// The file; absent while the run is being made, or after a rotation that broke off.
    pub path: PathBuf,
}

/// A sandbox found on this machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ObservedSandbox {
    /// The pod.
    pub pod: PodUid,
    /// Every container run whose record exists.
    pub containers: Vec<ObservedContainer>,
}

/// A change that nobody asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RuntimeEvent {
    /// The container's init was reaped and its log is complete on disk.
    Exited(ContainerRun, Exit),
}

/// A command running beside a container's init, which dropping this kills; or init's own streams,
/// which dropping this leaves.
pub struct ExecSession {
    /// Where the command reads; none when stdin was not asked for.
    pub stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// What it writes; with a terminal everything comes here.
    pub stdout: Box<dyn AsyncRead + Send + Unpin>,
    /// None with a terminal.
    pub stderr: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Resolves when the command was reaped, or the attached container has ended.
    pub exit: tokio::sync::oneshot::Receiver<Result<i32, RuntimeError>>,
    /// New terminal sizes (columns, rows); ignored without a terminal.
    pub resize: tokio::sync::mpsc::Sender<(u16, u16)>,
}

/// What to run beside init, with the container's own user, capabilities and seccomp filter.
#[derive(Clone, Debug)]
pub struct ExecSpec {
    /// In which container.
    pub run: ContainerRun,
    /// argv, at least one word.
    pub command: Vec<String>,
    /// Connect stdin.
    pub stdin: bool,
    /// Allocate a terminal.
    pub tty: bool,
}

/// Why the runtime could not do it. All are worth a retry unless said otherwise.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The container's own fault (no such binary, bad working directory): Kubernetes' reason
    /// `RunContainerError` / `CreateContainerError`; a retry needs another spec or image.
    #[error("{0}")]
    Container(String),
    /// No sandbox or container of that name.
    #[error("no such container: {0}")]
    NotFound(String),
    /// The machine's fault.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, to which path.
        context: String,
        /// The error of the call.
        source: std::io::Error,
    },
    /// The shim or gantry-rt answered with an error or not at all.
    #[error("{0}")]
    Shim(String),
}

/// The container side of a node. One implementation ([`shim`]), one fake in tests.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Starts the pod's shim unless it runs. Idempotent.
    async fn ensure_sandbox(&self, sandbox: &SandboxSpec) -> Result<(), RuntimeError>;
    /// Creates and starts one container; returns when its process was let go. Idempotent per run:
    /// a run that was started once is never started again, its start time is returned.
    async fn start_container(&self, container: &ContainerSpec) -> Result<SystemTime, RuntimeError>;
    /// Sends a signal to init. Ok when it has already ended.
    async fn signal_container(&self, run: &ContainerRun, signal: i32) -> Result<(), RuntimeError>;
    /// Kills everything in the container's cgroup. Ok when nothing is left.
    async fn kill_container(&self, run: &ContainerRun) -> Result<(), RuntimeError>;
    /// Removes the records and the cgroup of an ended run. Idempotent.
    async fn remove_container(&self, run: &ContainerRun) -> Result<(), RuntimeError>;
    /// Kills what is left, ends the shim, removes the pod's cgroup and sandbox directory (the
    /// namespaces' pins belong to [`crate::network`]). Idempotent.
    async fn remove_sandbox(&self, pod: &PodUid) -> Result<(), RuntimeError>;
    /// Init's pid in the host's pid namespace, while the run is alive.
    async fn pid(&self, run: &ContainerRun) -> Result<Option<u32>, RuntimeError>;
    /// Starts a command in a running container.
    async fn exec(&self, exec: &ExecSpec) -> Result<ExecSession, RuntimeError>;
    /// Connects to a running container's own streams: what it writes from now on and, if asked for,
    /// its stdin. A reader that takes nothing for 5 s is dropped. Dropping the session does not
    /// touch the container.
    async fn attach(&self, run: &ContainerRun, stdin: bool) -> Result<ExecSession, RuntimeError>;
    /// The logs of the runs that this agent has started or found and that have not ended. From memory,
    /// no file is looked at: somebody asks for all of them every ten seconds.
    fn open_logs(&self) -> Vec<OpenLog>;
    /// Moves the run's log aside to `to` (same file system) and has the shim go on in a new one.
    /// No line is lost or split: the shim writes to the old file until it has opened the new.
    ///
    /// # Errors
    /// [`RuntimeError::Io`] when the rename fails; then nothing has changed. After a shim's error
    /// the old file, under its new name, is still written: ask again.
    async fn rotate_log(
        &self,
        run: &ContainerRun,
        log_path: &std::path::Path,
        to: &std::path::Path,
    ) -> Result<(), RuntimeError>;
    /// What runs now, of one pod or of all: looks and changes nothing, at any time.
    async fn running(&self, pod: Option<&PodUid>) -> Result<Vec<RunningContainer>, RuntimeError>;
    /// Everything found on this machine, half-made starts removed, dead shims repaired on the way. Only for
    /// the start of an agent: a container that is being started now looks half made.
    async fn list(&self) -> Result<Vec<ObservedSandbox>, RuntimeError>;
    /// The stream of exits; taken once, by the pod workers' owner.
    fn take_events(&self) -> Option<tokio::sync::mpsc::Receiver<RuntimeEvent>>;
}
