//! [`Runtime`] by one `gantry-shim` per pod and one `gantry-rt` per create or exec.
//!
//! ```text
//! start_container: intent.json ─► config.json, filters, log directory ─► shim: start ─► started ─► answer
//! after a crash:   /run/gantry/pods/*: shim alive? connect : spawn (it adopts from `started`)
//!                  intent without started, shim not at it: kill by cgroup, remove, as if it had never been
//! ```
//! Everything that must be known after a crash is on disk before the act, everything that is told
//! was on disk before; so recovery reads and never guesses. libcontainer's state files are never
//! read here: a killed create leaves them unreadable (11 of 210 times). Membership of the cgroup
//! says what belongs to a run.
//!
//! The agent must *not* be a child subreaper: a dead shim's containers then belong to pid 1, which
//! reaps them, and the replacement reads their status from the kernel where it tells (6.15).

mod exec;
mod link;
mod records;
mod sandbox;
mod survivors;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use gantry_shim::wire::{Request, Start};
use gantry_shim::{cgroup, record};
use oci_spec::runtime::Spec;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use self::link::{Answer, Link, lock};
pub(crate) use self::link::{receive, register};
use self::records::{Intent, SandboxIntent};
use self::sandbox::Sandbox;
use super::{
    ContainerSpec, ExecSession, ExecSpec, ObservedContainer, ObservedSandbox, OpenLog,
    RunningContainer, Runtime, RuntimeError, RuntimeEvent, SandboxSpec, seccomp, spec,
};
use crate::ids::{ContainerRun, PodUid};
use crate::paths::Paths;

/// Exits that may wait for the pod workers.
const EVENT_COUNT_MAX: usize = 1024;
/// After SIGKILL a process is gone in milliseconds, unless it hangs in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two looks at what was killed.
const KILL_PAUSE: Duration = Duration::from_millis(5);
/// Containers that are made at the same time, per CPU.
const TURNS_PER_CPU: usize = 2;
/// A start that hangs (a dead file server below a mount) holds its turn: others wait this long.
const TURN_WAIT: Duration = Duration::from_secs(1);
/// The executor drops to these when libcontainer was told to leave capabilities alone.
const CAPABILITIES_ANNOTATION: &str = "gantry.dev/capabilities";
/// Where the shims live. The first makes it and `cleanup` removes it: a node with pods that come and go
/// would make and remove it, in every hierarchy, for each of them.
const SHIM_CGROUP: &str = "/gantry-shims";

/// The runtime of this machine.
pub struct ShimRuntime {
    paths: Paths,
    sandboxes: Mutex<HashMap<PodUid, Arc<Sandbox>>>,
    events: mpsc::Sender<RuntimeEvent>,
    taken: Mutex<Option<mpsc::Receiver<RuntimeEvent>>>,
    /// A hundred containers made at once stand in each other's way: in the kernel's locks for
    /// cgroups and mounts, and three processes for each.
    turns: Semaphore,
}

fn io_error(context: &str, path: &Path) -> impl FnOnce(io::Error) -> RuntimeError {
    let context = format!("{context} {}", path.display());
    move |source| RuntimeError::Io { context, source }
}

/// gantry-rt's JSON line, or the shim's own words.
fn report_error(report: &str) -> RuntimeError {
    #[derive(serde::Deserialize)]
    struct Report {
        error: String,
        #[serde(default)]
        context: Vec<String>,
    }
    match serde_json::from_str::<Report>(report) {
        // A missing program explains itself; anything else needs the first thing that failed.
        Ok(r) if r.error.starts_with("exec: ") || r.context.is_empty() => {
            RuntimeError::Container(r.error)
        }
        Ok(r) => RuntimeError::Container(format!("{} ({})", r.error, r.context[0])),
        Err(_) => RuntimeError::Shim(report.to_owned()),
    }
}

impl ShimRuntime {
    /// Removes the cgroup of the shims once the last of them has gone: for `cleanup`.
    ///
    /// # Errors
    /// After some seconds, when a shim is still in it.
    pub async fn remove_shim_cgroup(&self) -> Result<(), RuntimeError> {
        remove_cgroup(SHIM_CGROUP).await
    }

    /// The runtime whose files are below `paths.run` and whose binaries are in `paths.bin`.
    /// Touches nothing; call inside a tokio runtime.
    pub fn new(paths: Paths) -> Self {
        let (events, receiver) = mpsc::channel(EVENT_COUNT_MAX);
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            paths,
            sandboxes: Mutex::default(),
            events,
            taken: Mutex::new(Some(receiver)),
            turns: Semaphore::new(TURNS_PER_CPU * cpus),
        }
    }

    /// The sandbox, its keeper started unless it runs. None when there is no such directory.
    fn sandbox(&self, pod: &PodUid) -> Option<Arc<Sandbox>> {
        let directory = self.paths.sandbox(pod);
        if !matches!(SandboxIntent::read(&directory), Ok(Some(_))) {
            return None;
        }
        let mut sandboxes = lock(&self.sandboxes);
        let sandbox = sandboxes.entry(pod.clone()).or_insert_with(|| {
            let events = self.events.clone();
            Arc::new(Sandbox::keep(
                pod.clone(),
                directory,
                &self.paths.bin,
                events,
            ))
        });
        Some(Arc::clone(sandbox))
    }

    /// Every pod with a sandbox directory.
    fn pods(&self) -> Result<Vec<PodUid>, RuntimeError> {
        let root = self.paths.run.join("pods");
        let names = match fs::read_dir(&root) {
            Ok(entries) => entries
                .flatten()
                .filter_map(|e| e.file_name().into_string().ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("cannot read", &root)(error)),
        };
        Ok(names.filter_map(|name| PodUid::new(&name).ok()).collect())
    }

    async fn link(&self, run: &ContainerRun) -> Result<Arc<Link>, RuntimeError> {
        let sandbox = self.sandbox(&run.pod).ok_or_else(|| not_found(run))?;
        sandbox.link().await
    }

    /// When the run was let go, if it ever was.
    fn started_at(&self, run: &ContainerRun) -> Result<Option<SystemTime>, RuntimeError> {
        let directory = self.paths.container_run(run);
        let started =
            records::started(&directory).map_err(io_error("cannot read records in", &directory))?;
        Ok(started.map(|s| records::time(s.started_ns)))
    }

    /// Intent first, then everything that the shim will need.
    fn prepare(&self, container: &ContainerSpec) -> Result<Start, RuntimeError> {
        let run = &container.run;
        let directory = self.paths.container_run(run);
        let cgroup = cgroup_of(&container.oci)?;
        let seccomp_path = seccomp::ensure(&container.seccomp, &container.oci, &self.paths)
            .map_err(|error| RuntimeError::Container(error.to_string()))?
            .unwrap_or_default();
        fs::create_dir_all(&directory).map_err(io_error("cannot create", &directory))?;
        let intent = Intent {
            cgroup,
            log_path: container.log_path.clone(),
            seccomp_path,
        };
        intent
            .write(&directory)
            .map_err(io_error("cannot write an intent in", &directory))?;
        if let Some(parent) = container.log_path.parent() {
            fs::create_dir_all(parent).map_err(io_error("cannot create", parent))?;
        }
        ensure_working_directory(&container.oci)?;
        let config = directory.join("config.json");
        adapt(container)?
            .save(&config)
            .map_err(|e| RuntimeError::Shim(format!("cannot write {}: {e}", config.display())))?;
        Ok(Start {
            run: records::key(run),
            cgroup: intent.cgroup,
            log_path: text(&intent.log_path)?,
            seccomp_path: text(&intent.seccomp_path)?,
            tty: container.tty,
            stdin: container.stdin,
            stdin_once: container.stdin_once,
        })
    }

    /// One try of [`Runtime::start_container`].
    async fn try_to_start(&self, container: &ContainerSpec) -> Result<SystemTime, RuntimeError> {
        let run = &container.run;
        if let Some(time) = self.started_at(run)? {
            return Ok(time);
        }
        let link = self.link(run).await?;
        if !link.was_creating(&records::key(run)) {
            // An intent without a start: an earlier agent died in between.
            self.clean(run).await?;
        } else if let Some(time) = self.started_at(run)? {
            return Ok(time);
        }
        let start = self.prepare(container)?;
        if let Some(sandbox) = self.sandbox(&run.pod) {
            hold(&sandbox, run, &container.log_path, container.tty);
        }
        // Without a turn after all this time it starts as well.
        let _turn = timeout(TURN_WAIT, self.turns.acquire()).await;
        match link.ask(&Request::Start(start), &[]).await? {
            Ok(Answer::Started(ns)) => Ok(records::time(ns)),
            Ok(other) => Err(RuntimeError::Shim(format!(
                "a start was answered by {other:?}"
            ))),
            Err(report) => {
                // The next try begins with nothing.
                self.clean(run).await?;
                Err(report_error(&report))
            }
        }
    }

    /// Removes everything a run left, by its intent. Idempotent.
    async fn clean(&self, run: &ContainerRun) -> Result<(), RuntimeError> {
        let directory = self.paths.container_run(run);
        let intent =
            Intent::read(&directory).map_err(io_error("cannot read the intent in", &directory))?;
        if let Some(intent) = intent {
            kill_all(&intent.cgroup).await?;
            remove_cgroup(&intent.cgroup).await?;
        }
        if let Some(sandbox) = lock(&self.sandboxes).get(&run.pod) {
            sandbox.forget(run);
        }
        remove_run(&directory)?;
        // The container's own directory goes with its last run.
        if let Some(parent) = directory.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }

    async fn wait_for_exit(&self, run: &ContainerRun) {
        let directory = self.paths.container_run(run);
        let end = Instant::now() + KILL_TIMEOUT;
        while Instant::now() < end {
            let exited = matches!(record::Exit::read(&directory), Ok(Some(_)));
            if exited || !matches!(records::started(&directory), Ok(Some(_))) {
                return;
            }
            tokio::time::sleep(KILL_PAUSE).await;
        }
    }

    fn observe(&self, sandbox: &Sandbox, run: ContainerRun) -> Option<ObservedContainer> {
        let directory = self.paths.container_run(&run);
        let exit = record::Exit::read(&directory)
            .ok()?
            .map(|e| records::exit(&e));
        let started = records::started(&directory).ok()?;
        match (&exit, &started) {
            (Some(_), _) => sandbox.mark_told(&run),
            (None, Some(s)) => hold(sandbox, &run, Path::new(&s.log_path), s.tty),
            (None, None) => {}
        }
        Some(ObservedContainer {
            started_at: started.as_ref().map(|s| records::time(s.started_ns)),
            pid: started
                .filter(|_| exit.is_none())
                .and_then(|s| u32::try_from(s.pid).ok()),
            exit,
            run,
        })
    }
}

#[async_trait]
impl Runtime for ShimRuntime {
    async fn ensure_sandbox(&self, sandbox: &SandboxSpec) -> Result<(), RuntimeError> {
        let directory = self.paths.sandbox(&sandbox.pod);
        fs::create_dir_all(&directory).map_err(io_error("cannot create", &directory))?;
        let intent = SandboxIntent {
            title: sandbox.title.clone(),
            cgroup: sandbox.cgroup.clone(),
        };
        let known = SandboxIntent::read(&directory).ok().flatten();
        if known.as_ref() != Some(&intent) {
            intent
                .write(&directory)
                .map_err(io_error("cannot write an intent in", &directory))?;
        }
        fs::create_dir_all(&sandbox.log_dir)
            .map_err(io_error("cannot create", &sandbox.log_dir))?;
        let found = self
            .sandbox(&sandbox.pod)
            .ok_or_else(|| RuntimeError::NotFound(sandbox.pod.to_string()))?;
        found.link().await.map(|_| ())
    }

    async fn start_container(&self, container: &ContainerSpec) -> Result<SystemTime, RuntimeError> {
        match self.try_to_start(container).await {
            // Our own program died or was killed: that is no reason for a container to wait.
            Err(RuntimeError::Shim(words)) => {
                tracing::warn!(run = %container.run, %words, "a start broke; trying once more");
                self.try_to_start(container).await
            }
            other => other,
        }
    }

    async fn signal_container(&self, run: &ContainerRun, signal: i32) -> Result<(), RuntimeError> {
        let directory = self.paths.container_run(run);
        if matches!(record::Exit::read(&directory), Ok(Some(_))) {
            return Ok(());
        }
        if !matches!(records::started(&directory), Ok(Some(_))) {
            return Err(not_found(run));
        }
        let request = Request::Signal {
            run: records::key(run),
            signal,
        };
        let answer = self.link(run).await?.ask(&request, &[]).await?;
        answer.map(|_| ()).map_err(RuntimeError::Shim)
    }

    async fn kill_container(&self, run: &ContainerRun) -> Result<(), RuntimeError> {
        let directory = self.paths.container_run(run);
        match Intent::read(&directory).map_err(io_error("cannot read the intent in", &directory))? {
            Some(intent) => kill_all(&intent.cgroup).await,
            None => Ok(()),
        }
    }

    async fn remove_container(&self, run: &ContainerRun) -> Result<(), RuntimeError> {
        self.kill_container(run).await?;
        // The shim must have written its record before the cgroup and its counters go. It refuses to
        // forget a run whose end it has not recorded, and knows none that it was told to forget.
        self.wait_for_exit(run).await;
        if let Some(sandbox) = self.sandbox(&run.pod) {
            let request = Request::Forget {
                run: records::key(run),
            };
            if self.paths.container_run(run).exists() {
                let answer = sandbox.link().await?.ask(&request, &[]).await?;
                answer.map_err(RuntimeError::Shim)?;
            }
            self.clean(run).await?;
            sandbox.forget(run);
        }
        Ok(())
    }

    async fn remove_sandbox(&self, pod: &PodUid) -> Result<(), RuntimeError> {
        let directory = self.paths.sandbox(pod);
        let intent = SandboxIntent::read(&directory)
            .map_err(io_error("cannot read the intent in", &directory))?;
        let Some(intent) = intent else {
            lock(&self.sandboxes).remove(pod);
            return Ok(());
        };
        for run in records::runs(pod, &directory) {
            self.remove_container(&run).await?;
        }
        kill_all(&intent.cgroup).await?;
        if let Some(sandbox) = self.sandbox(pod) {
            let link = sandbox.link().await?;
            lock(&self.sandboxes).remove(pod);
            sandbox.stop_replacing();
            // No answer at all: gone before it could say so.
            if let Ok(Err(report)) = link.ask(&Request::ShutDown, &[]).await {
                return Err(RuntimeError::Shim(report));
            }
        }
        wait_for_shim_end(&directory).await;
        remove_cgroup(&intent.cgroup).await?;
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            // The namespaces' pins are mounts of the network's.
            if entry.file_name() != "ns" && entry.file_name() != "sandbox.json" {
                remove_any(&entry.path())?;
            }
        }
        // The intent last: until here a crash repeats all of this.
        remove_any(&directory.join("sandbox.json"))?;
        let _ = fs::remove_dir(&directory);
        Ok(())
    }

    async fn pid(&self, run: &ContainerRun) -> Result<Option<u32>, RuntimeError> {
        let directory = self.paths.container_run(run);
        let context = || io_error("cannot read records in", &directory);
        if record::Exit::read(&directory).map_err(context())?.is_some() {
            return Ok(None);
        }
        let started = records::started(&directory).map_err(context())?;
        // A pid that was given to somebody else has another start time.
        let alive = started.filter(|s| record::start_ticks(s.pid) == Some(s.start_ticks));
        Ok(alive.and_then(|s| u32::try_from(s.pid).ok()))
    }

    async fn exec(&self, exec: &ExecSpec) -> Result<ExecSession, RuntimeError> {
        let run = &exec.run;
        let directory = self.paths.container_run(run);
        if exec.command.is_empty() {
            return Err(RuntimeError::Container("no command specified".into()));
        }
        let running = matches!(records::started(&directory), Ok(Some(_)))
            && matches!(record::Exit::read(&directory), Ok(None));
        let intent = Intent::read(&directory).ok().flatten().filter(|_| running);
        let intent = intent.ok_or_else(|| not_found(run))?;
        let link = self.link(run).await?;
        exec::start(
            link,
            exec,
            records::key(run),
            &directory,
            &intent.seccomp_path,
        )
        .await
    }

    async fn attach(&self, run: &ContainerRun, stdin: bool) -> Result<ExecSession, RuntimeError> {
        let directory = self.paths.container_run(run);
        let link = self.link(run).await?;
        exec::attach(link, records::key(run), stdin, &directory).await
    }

    fn open_logs(&self) -> Vec<OpenLog> {
        let sandboxes: Vec<_> = lock(&self.sandboxes).values().cloned().collect();
        sandboxes.iter().flat_map(|s| s.open_logs()).collect()
    }

    async fn rotate_log(
        &self,
        run: &ContainerRun,
        log_path: &Path,
        to: &Path,
    ) -> Result<(), RuntimeError> {
        let link = self.link(run).await?;
        match fs::rename(log_path, to) {
            // Asked again: only the shim's part is missing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            done => done.map_err(io_error("cannot rotate", log_path))?,
        }
        let request = Request::ReopenLog {
            run: records::key(run),
        };
        let answer = link.ask(&request, &[]).await?;
        answer.map(|_| ()).map_err(RuntimeError::Shim)
    }

    async fn running(&self, pod: Option<&PodUid>) -> Result<Vec<RunningContainer>, RuntimeError> {
        let pods = match pod {
            Some(pod) => vec![pod.clone()],
            None => self.pods()?,
        };
        let mut running = Vec::new();
        for pod in pods {
            for run in records::runs(&pod, &self.paths.sandbox(&pod)) {
                let directory = self.paths.container_run(&run);
                let started = records::started(&directory).ok().flatten();
                let ended = !matches!(record::Exit::read(&directory), Ok(None));
                if let Some(started) = started.filter(|_| !ended)
                    && let Ok(pid) = u32::try_from(started.pid)
                {
                    running.push(RunningContainer { run, pid });
                }
            }
        }
        Ok(running)
    }

    async fn list(&self) -> Result<Vec<ObservedSandbox>, RuntimeError> {
        let pods = self.pods()?;
        // All keepers first, so that the shims start or connect side by side.
        let found: Vec<_> = pods.iter().filter_map(|pod| self.sandbox(pod)).collect();
        let mut observed = Vec::new();
        for sandbox in found {
            let link = sandbox.link().await;
            if let Err(error) = &link {
                tracing::warn!(pod = %sandbox.pod, %error, "sandbox listed without its shim");
            }
            let mut containers = Vec::new();
            for run in records::runs(&sandbox.pod, &sandbox.directory) {
                let creating = link
                    .as_ref()
                    .is_ok_and(|l| l.was_creating(&records::key(&run)));
                if !creating && self.started_at(&run)?.is_none() {
                    // Nothing was let go: as if it had never been.
                    self.clean(&run).await?;
                    continue;
                }
                containers.extend(self.observe(&sandbox, run));
            }
            observed.push(ObservedSandbox {
                pod: sandbox.pod.clone(),
                containers,
            });
        }
        Ok(observed)
    }

    fn take_events(&self) -> Option<mpsc::Receiver<RuntimeEvent>> {
        lock(&self.taken).take()
    }
}

/// Without it the container runs as well; only a shim's sudden end could cost its last words.
fn hold(sandbox: &Sandbox, run: &ContainerRun, log_path: &Path, tty: bool) {
    if let Err(error) = sandbox.hold(run, log_path, tty) {
        tracing::warn!(%run, %error, "hold the container's output");
    }
}

fn not_found(run: &ContainerRun) -> RuntimeError {
    RuntimeError::NotFound(run.to_string())
}

fn text(path: &Path) -> Result<String, RuntimeError> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| RuntimeError::Container(format!("path {} is not UTF-8", path.display())))
}

fn cgroup_of(oci: &Spec) -> Result<String, RuntimeError> {
    let path = oci.linux().as_ref().and_then(|l| l.cgroups_path().clone());
    match path {
        Some(path) if path.is_absolute() => text(&path),
        other => Err(RuntimeError::Container(format!(
            "linux.cgroupsPath must be absolute, is {other:?}"
        ))),
    }
}

/// runc makes a working directory that the image lacks; libcontainer fails.
fn ensure_working_directory(oci: &Spec) -> Result<(), RuntimeError> {
    let (Some(root), Some(process)) = (oci.root(), oci.process()) else {
        return Ok(());
    };
    // Best effort: it may lie in a volume, or the root may be read-only; then init says so.
    let _ = spec::mounts::ensure_directory(root.path(), process.cwd());
    Ok(())
}

/// The document gantry-rt reads. Without no_new_privs a filter can only be loaded while
/// CAP_SYS_ADMIN is there: then libcontainer must not drop capabilities, the executor does.
fn adapt(container: &ContainerSpec) -> Result<Spec, RuntimeError> {
    let mut oci = container.oci.clone();
    if !container.allow_privilege_escalation || container.seccomp == super::Seccomp::Unconfined {
        return Ok(oci);
    }
    let Some(process) = oci.process_mut() else {
        return Ok(oci);
    };
    let bounding = process
        .capabilities()
        .as_ref()
        .and_then(|c| c.bounding().clone())
        .unwrap_or_default();
    let mut mask = 0;
    for capability in bounding {
        let name = format!("CAP_{capability}");
        let known = caps::Capability::from_str(&name)
            .map_err(|_| RuntimeError::Container(format!("unknown capability {name}")))?;
        mask |= known.bitmask();
    }
    process.set_capabilities(None);
    process.set_no_new_privileges(None);
    let mut annotations = oci.annotations().clone().unwrap_or_default();
    annotations.insert(CAPABILITIES_ANNOTATION.to_owned(), format!("{mask:x}"));
    oci.set_annotations(Some(annotations));
    Ok(oci)
}

/// Kills by membership until nobody is left: a process may fork between the list and the signal.
async fn kill_all(path: &str) -> Result<(), RuntimeError> {
    let end = Instant::now() + KILL_TIMEOUT;
    while cgroup::kill_members(path) > 0 {
        if Instant::now() > end {
            let pids = cgroup::members(path);
            return Err(RuntimeError::Shim(format!(
                "SIGKILL does not end process {}; it is tried again",
                survivors::words(&pids)
            )));
        }
        tokio::time::sleep(KILL_PAUSE).await;
    }
    Ok(())
}

async fn remove_cgroup(path: &str) -> Result<(), RuntimeError> {
    let end = Instant::now() + KILL_TIMEOUT;
    loop {
        match cgroup::remove(path) {
            Ok(()) => return Ok(()),
            // A zombie still counts as a member until its parent has seen it.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {
                tokio::time::sleep(KILL_PAUSE).await;
            }
            Err(error) => return Err(io_error("cannot remove cgroup", Path::new(path))(error)),
        }
    }
}

/// The shim holds a lock for its whole life.
pub(crate) async fn wait_for_shim_end(directory: &Path) {
    let Ok(lock) = fs::File::options()
        .write(true)
        .open(directory.join("shim.lock"))
    else {
        return;
    };
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        if lock.try_lock().is_ok() {
            return;
        }
        tokio::time::sleep(KILL_PAUSE).await;
    }
}

/// In an order that a crash at any point leaves what the next agent cleans: a run without its start has
/// never been, and the intent, by which runs are found, goes last.
fn remove_run(directory: &Path) -> Result<(), RuntimeError> {
    remove_any(&directory.join(record::STARTED_FILE))?;
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries.filter(|e| e.file_name() != records::INTENT_FILE) {
        remove_any(&entry.path())?;
    }
    remove_directory(directory)
}

fn remove_directory(path: &Path) -> Result<(), RuntimeError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("cannot remove", path)(error))
        }
        _ => Ok(()),
    }
}

fn remove_any(path: &PathBuf) -> Result<(), RuntimeError> {
    if path.is_dir() && !path.is_symlink() {
        return remove_directory(path);
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error("cannot remove", path)(error))
        }
        _ => Ok(()),
    }
}
