//! One pod's shim as the agent sees it: a task that keeps it alive and connected.
//!
//! ```text
//!          no socket          ready                     closed
//! Down ───────────────► spawn ─────► Up (link published) ─────► Down ─► spawn a replacement, which
//!   ▲  error: back-off 0.1 .. 5 s │                                     takes over from its records
//!   └─────────────────────────────┘
//! ```

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gantry_shim::record;
use gantry_shim::wire::{self, Phase};
use nix::errno::Errno;
use nix::sys::stat::Mode;
use tokio::sync::{mpsc, watch};

use super::link::{Link, News, lock};
use super::records;
use crate::ids::{ContainerRun, PodUid};
use crate::open_files;
use crate::runtime::{OpenLog, RuntimeError, RuntimeEvent};

/// A shim is ready in milliseconds; a machine that needs longer than this is in trouble.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// The exit code of a shim that found another one in charge.
const EXIT_TAKEN: i32 = 3;

/// A pod's shim.
pub(super) struct Sandbox {
    pub(super) pod: PodUid,
    pub(super) directory: PathBuf,
    link: watch::Receiver<Option<Arc<Link>>>,
    /// Runs whose exit was told, as an event or by a list: nobody hears of it twice.
    told: Arc<Mutex<HashSet<String>>>,
    /// Runs that have not ended.
    held: Arc<Mutex<HashMap<String, Held>>>,
    /// Set when the shim is about to be told to end: its end is then no accident.
    ending: Arc<AtomicBool>,
    task: tokio::task::AbortHandle,
}

/// What is kept of a run until it ends.
struct Held {
    log_path: PathBuf,
    /// Open only to be open; none with a terminal.
    _fifos: Option<[OwnedFd; 2]>,
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Sandbox {
    /// Starts keeping the shim of this sandbox; its directory exists.
    pub(super) fn keep(
        pod: PodUid,
        directory: PathBuf,
        bin: &Path,
        events: mpsc::Sender<RuntimeEvent>,
    ) -> Self {
        let (publish, link) = watch::channel(None);
        let told = Arc::new(Mutex::new(HashSet::new()));
        let held = Arc::default();
        let ending = Arc::new(AtomicBool::new(false));
        let keeper = Keeper {
            ending: Arc::clone(&ending),
            pod: pod.clone(),
            directory: directory.clone(),
            shim: bin.join("gantry-shim"),
            rt: bin.join("gantry-rt"),
            told: Arc::clone(&told),
            held: Arc::clone(&held),
            events,
        };
        let task = tokio::spawn(keeper.run(publish)).abort_handle();
        Self {
            pod,
            directory,
            link,
            told,
            held,
            ending,
            task,
        }
    }

    /// The connected shim, waiting for it if it is being (re)started.
    pub(super) async fn link(&self) -> Result<Arc<Link>, RuntimeError> {
        let mut link = self.link.clone();
        let ready = tokio::time::timeout(READY_TIMEOUT, link.wait_for(Option::is_some)).await;
        match ready {
            Ok(Ok(link)) => Ok(link.clone().ok_or_else(|| self.not_ready())?),
            _ => Err(self.not_ready()),
        }
    }

    fn not_ready(&self) -> RuntimeError {
        RuntimeError::Shim(format!(
            "the shim of pod {} is not ready after {} s; see the agent's log",
            self.pod,
            READY_TIMEOUT.as_secs()
        ))
    }

    /// The shim may end without being replaced.
    pub(super) fn stop_replacing(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// Notes a run and keeps its FIFOs open, making them where they are missing: what is in a FIFO is gone
    /// when nobody has it open, as when a container ends while its shim is being replaced.
    pub(super) fn hold(&self, run: &ContainerRun, log_path: &Path, tty: bool) -> io::Result<()> {
        let directory = self.directory.join(records::key(run));
        let fifos = || {
            Ok([
                open_fifo(&directory.join(wire::STDOUT_FILE))?,
                open_fifo(&directory.join(wire::STDERR_FILE))?,
            ])
        };
        let (fifos, outcome) = match (!tty).then(fifos).transpose() {
            Ok(fifos) => (fifos, Ok(())),
            Err(error) => (None, Err(error)),
        };
        let held = Held {
            log_path: log_path.to_owned(),
            _fifos: fifos,
        };
        lock(&self.held).insert(records::key(run), held);
        outcome
    }

    /// The logs of the runs that have not ended.
    pub(super) fn open_logs(&self) -> Vec<OpenLog> {
        let held = lock(&self.held);
        let logs = held.iter().filter_map(|(key, held)| {
            Some(OpenLog {
                run: records::run_of(&self.pod, key)?,
                path: held.log_path.clone(),
            })
        });
        logs.collect()
    }

    /// No event will be sent for this run's exit any more.
    pub(super) fn mark_told(&self, run: &ContainerRun) {
        lock(&self.told).insert(records::key(run));
    }

    /// The run was removed.
    pub(super) fn forget(&self, run: &ContainerRun) {
        lock(&self.held).remove(&records::key(run));
        lock(&self.told).remove(&records::key(run));
    }
}

struct Keeper {
    ending: Arc<AtomicBool>,
    pod: PodUid,
    directory: PathBuf,
    shim: PathBuf,
    rt: PathBuf,
    told: Arc<Mutex<HashSet<String>>>,
    held: Arc<Mutex<HashMap<String, Held>>>,
    events: mpsc::Sender<RuntimeEvent>,
}

impl Keeper {
    async fn run(self, publish: watch::Sender<Option<Arc<Link>>>) {
        let mut retry = RETRY_MIN;
        loop {
            match self.connect().await {
                Ok(link) => {
                    retry = RETRY_MIN;
                    let link = Arc::new(link);
                    let error = self.listen(&link, &publish).await;
                    publish.send_replace(None);
                    link.fail_all();
                    tracing::info!(pod = %self.pod, %error, "shim connection ended");
                    if self.ending.load(Ordering::Relaxed) {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(pod = %self.pod, %error, "cannot reach or start the shim");
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(RETRY_MAX);
                }
            }
        }
    }

    async fn connect(&self) -> io::Result<Link> {
        if let Ok(link) = Link::connect(&self.directory) {
            return Ok(link);
        }
        let mut command = Command::new(&self.shim);
        command
            .arg(&self.directory)
            .arg(&self.rt)
            .args(open_files::given().map(|soft| soft.to_string()))
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // std's spawn, which never runs code in a half-copied process; waiting for the first
        // process blocks until the shim listens, so it gets a thread.
        let output = tokio::task::spawn_blocking(move || command.output())
            .await
            .map_err(io::Error::other)?
            .map_err(|e| io::Error::other(format!("cannot run {}: {e}", self.shim.display())))?;
        if !output.status.success() && output.status.code() != Some(EXIT_TAKEN) {
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(io::Error::other(format!("{}: {words}", output.status)));
        }
        Link::connect(&self.directory)
    }

    /// Until the connection ends.
    async fn listen(
        &self,
        link: &Arc<Link>,
        publish: &watch::Sender<Option<Arc<Link>>>,
    ) -> io::Error {
        loop {
            match link.news().await {
                Ok(News::Ready) => {
                    for (run, phase) in link.greeted_runs() {
                        if phase == Phase::Ended {
                            self.tell(&run).await;
                        }
                    }
                    publish.send_replace(Some(Arc::clone(link)));
                }
                Ok(News::Exited(run)) => self.tell(&run).await,
                Err(error) => return error,
            }
        }
    }

    async fn tell(&self, name: &str) {
        let Some(run) = records::run_of(&self.pod, name) else {
            return;
        };
        let directory = self.directory.join(name);
        let exit = match record::Exit::read(&directory) {
            Ok(Some(exit)) => exit,
            // Removed meanwhile: whoever removed it knew.
            _ => return,
        };
        lock(&self.held).remove(name);
        if lock(&self.told).insert(name.to_owned()) {
            let event = RuntimeEvent::Exited(run, records::exit(&exit));
            // Nobody listens any more: the agent is ending.
            let _ = self.events.send(event).await;
        }
    }
}

/// Whether `name` may be a run's directory; re-exported for scans.
pub(super) fn is_run(name: &str) -> bool {
    wire::is_run(name)
}

/// Both sides at once, so that the open never waits for another process.
fn open_fifo(path: &Path) -> io::Result<OwnedFd> {
    match nix::unistd::mkfifo(path, Mode::from_bits_truncate(0o600)) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let mut options = File::options();
    options.read(true).write(true);
    options.custom_flags(libc::O_NONBLOCK);
    Ok(options.open(path)?.into())
}
