//! A whole cluster of one node: started from the built binaries, driven by the command line as a
//! user would, removed completely.
//!
//! It uses the standard directories of the machine, so there is one at a time: a lock file says so.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tonic::Code;

use crate::api::{Api, Question};
use crate::census;

/// Where `gantry-control` writes the administrator's credentials.
pub const KUBECONFIG: &str = "/etc/gantry/admin.kubeconfig";
/// The node's name, whatever the machine is called.
pub const NODE: &str = "node-1";
const START: Duration = Duration::from_secs(120);

/// Where the binaries and images are.
#[derive(Clone, Debug)]
pub struct Installation {
    /// gantry-control, gantry-agent, gantry-rt, gantry-shim, gantry.
    pub bin: PathBuf,
    /// OCI archives.
    pub images: PathBuf,
}

impl Installation {
    /// What `cargo xtask test` has prepared; otherwise the reason why a test cannot run.
    pub fn find() -> Result<Self, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("needs root".into());
        }
        let directory = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_dir())
                .ok_or_else(|| format!("needs {name}, which `cargo xtask test` sets"))
        };
        Ok(Self {
            bin: directory("GANTRY_BIN")?,
            images: directory("GANTRY_IMAGES")?,
        })
    }
}

/// A running cluster. Dropping it removes everything.
pub struct Cluster {
    installation: Installation,
    logs: tempfile::TempDir,
    /// Of every start of the control plane and of the agent.
    flags: [Vec<String>; 2],
    control: Option<Child>,
    agent: Option<Child>,
    api: Mutex<Option<Api>>,
    _lock: File,
}

/// What a command printed.
#[derive(Debug)]
pub struct Output {
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Cluster {
    /// Starts control plane and agent, imports the images, waits until the node is ready.
    pub fn start(installation: &Installation) -> Result<Self> {
        Self::start_with(installation, &[], &[])
    }

    /// The same with flags for the control plane and for the agent, whenever they start.
    pub fn start_with(
        installation: &Installation,
        control: &[&str],
        agent: &[&str],
    ) -> Result<Self> {
        let mut cluster = Self::prepare(installation, control, agent)?;
        cluster.start_control()?;
        cluster.import("busybox")?;
        cluster.start_agent()?;
        cluster.wait("the node to be ready", START, |c| c.node_is_ready())?;
        Ok(cluster)
    }

    /// A cluster of which nothing runs yet. Its agent may be one of several, on other machines.
    pub fn prepare(installation: &Installation, control: &[&str], agent: &[&str]) -> Result<Self> {
        let lock = File::create(std::env::temp_dir().join("gantry-tests.lock"))?;
        lock.lock()?;
        let census = census::take();
        if !census::is_zero(&census) {
            bail!(
                "something of Gantry is on this machine already: {:?}",
                census::rows(&census)
            );
        }
        let logs = tempfile::tempdir()?;
        Ok(Self {
            installation: installation.clone(),
            logs,
            flags: [control, agent].map(|words| words.iter().map(|&w| w.into()).collect()),
            control: None,
            agent: None,
            api: Mutex::new(None),
            _lock: lock,
        })
    }

    /// Starts `gantry-control` and waits until it serves.
    pub fn start_control(&mut self) -> Result<()> {
        self.start_control_with(&[])
    }

    /// Starts `gantry-control` with more flags and waits until it serves.
    pub fn start_control_with(&mut self, flags: &[&str]) -> Result<()> {
        let agent = format!("/etc/gantry/agent:{NODE}");
        let mut arguments = vec!["--agent-credentials", &agent];
        arguments.extend(self.flags[0].iter().map(String::as_str));
        arguments.extend(flags);
        let child = self.start_program("gantry-control", &arguments)?;
        self.control = Some(child);
        self.wait("gantry-control to serve", START, |c| {
            Ok(Path::new(KUBECONFIG).exists() && c.gantry(&["get", "namespaces"])?.code == 0)
        })
    }

    /// Starts `gantry-agent`.
    pub fn start_agent(&mut self) -> Result<()> {
        self.start_agent_with(&[])
    }

    /// Starts `gantry-agent` with more flags.
    pub fn start_agent_with(&mut self, flags: &[&str]) -> Result<()> {
        let mut arguments = vec!["run", "--node-name", NODE];
        arguments.extend(
            self.flags[1]
                .iter()
                .map(String::as_str)
                .chain(flags.iter().copied()),
        );
        self.agent = Some(self.start_program("gantry-agent", &arguments)?);
        Ok(())
    }

    /// Starts `gantry-agent` as whatever node `credentials` are for.
    pub fn start_joined_agent(&mut self, credentials: &Path) -> Result<()> {
        let credentials = credentials.display().to_string();
        let arguments = ["run", "--credentials", &credentials];
        self.agent = Some(self.start_program("gantry-agent", &arguments)?);
        Ok(())
    }

    /// Runs `gantry-agent` with `arguments` behind another command (strace, unshare) to its end.
    pub fn run_agent_behind(&self, command: &[&str], arguments: &[&str]) -> Result<Output> {
        run(self.behind(command)?.args(arguments))
    }

    /// Starts `gantry-agent` behind another command that becomes it.
    pub fn start_agent_behind(&mut self, command: &[&str]) -> Result<()> {
        let mut command = self.behind(command)?;
        command.args(["run", "--node-name", NODE]);
        self.agent = Some(self.spawn(command, "gantry-agent")?);
        Ok(())
    }

    fn behind(&self, command: &[&str]) -> Result<Command> {
        let (program, arguments) = command.split_first().context("no command")?;
        let mut command = Command::new(program);
        command.args(arguments);
        command.arg(self.installation.bin.join("gantry-agent"));
        Ok(command)
    }

    /// The agent's process.
    pub fn agent_pid(&self) -> Result<u32> {
        Ok(self.agent.as_ref().context("no agent runs")?.id())
    }

    /// Starts the agent again if it has ended. Returns whether it had.
    pub fn revive_agent(&mut self) -> Result<bool> {
        let agent = self.agent.as_mut().context("no agent runs")?;
        if agent.try_wait()?.is_none() {
            return Ok(false);
        }
        self.start_agent()?;
        Ok(true)
    }

    /// SIGKILL to the agent.
    pub fn kill_agent(&mut self) -> Result<()> {
        let mut agent = self.agent.take().context("no agent runs")?;
        agent.kill()?;
        agent.wait()?;
        Ok(())
    }

    /// Starts the control plane unless it runs.
    pub fn ensure_control(&mut self) -> Result<()> {
        match self.control {
            Some(_) => Ok(()),
            None => self.start_control(),
        }
    }

    /// SIGKILL to the control plane.
    pub fn kill_control(&mut self) -> Result<()> {
        let mut control = self.control.take().context("no control plane runs")?;
        control.kill()?;
        control.wait()?;
        Ok(())
    }

    /// What a reboot takes is gone: processes, mounts, cgroups, links, eBPF objects, `/run`. What the
    /// disk holds is as it was, but for the logs. Agent and control plane must not run.
    pub fn lose_all_but_the_disk(&self) -> Result<()> {
        let (disk, aside) = (
            Path::new("/var/lib/gantry"),
            Path::new("/var/lib/gantry.aside"),
        );
        unmount_below(disk)?;
        std::fs::rename(disk, aside).context("put the disk aside")?;
        let cleaned = self.cleanup();
        let made = disk.exists();
        if made {
            std::fs::remove_dir_all(disk)?;
        }
        std::fs::rename(aside, disk).context("put the disk back")?;
        cleaned?;
        ensure!(!made, "cleanup has made {}", disk.display());
        Ok(())
    }

    fn cleanup(&self) -> Result<()> {
        let mut cleanup = Command::new(self.installation.bin.join("gantry-agent"));
        let output = run(cleanup.arg("cleanup"))?;
        ensure!(
            output.code == 0,
            "cleanup: {}{}",
            output.stdout,
            output.stderr
        );
        Ok(())
    }

    /// Starts a program of ours.
    fn start_program(&self, name: &str, arguments: &[&str]) -> Result<Child> {
        let mut command = Command::new(self.installation.bin.join(name));
        command.args(arguments);
        self.spawn(command, name)
    }

    /// Starts a command whose words go to the log of `name`.
    fn spawn(&self, mut command: Command, name: &str) -> Result<Child> {
        let log = self.logs.path().join(format!("{name}.log"));
        let log = File::options().create(true).append(true).open(&log)?;
        command.stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log);
        command.spawn().with_context(|| format!("start {name}"))
    }

    /// The archive whose name contains `name`.
    pub fn archive(&self, name: &str) -> Result<PathBuf> {
        std::fs::read_dir(&self.installation.images)?
            .flatten()
            .map(|e| e.path())
            .find(|p| {
                let file = p
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned();
                file.contains(name) && file.ends_with(".tar")
            })
            .with_context(|| format!("no {name} archive"))
    }

    /// Imports the archive whose name contains `name`.
    pub fn import(&self, name: &str) -> Result<()> {
        let archive = self.archive(name)?;
        let mut import = Command::new(self.installation.bin.join("gantry-agent"));
        let output = run(import.args(["image", "import"]).arg(archive))?;
        if output.code != 0 {
            bail!("import {name}: {}{}", output.stdout, output.stderr);
        }
        Ok(())
    }

    /// Runs the command line.
    pub fn gantry(&self, arguments: &[&str]) -> Result<Output> {
        run(&mut self.command(arguments))
    }

    /// Runs `gantry-agent` with a command for people.
    pub fn agent(&self, arguments: &[&str]) -> Result<Output> {
        run(Command::new(self.installation.bin.join("gantry-agent")).args(arguments))
    }

    /// The command line, to be run by the caller.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.installation.bin.join("gantry"));
        command.args(arguments).env("KUBECONFIG", KUBECONFIG);
        command
    }

    /// Runs the command line, which must succeed; returns its output.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        let output = self.gantry(arguments)?;
        if output.code != 0 {
            bail!(
                "gantry {} exited with {}: {}{}",
                arguments.join(" "),
                output.code,
                output.stdout,
                output.stderr
            );
        }
        Ok(output.stdout)
    }

    /// Applies a manifest.
    pub fn apply(&self, manifest: &str) -> Result<Output> {
        let file = self.logs.path().join("manifest.yaml");
        std::fs::write(&file, manifest)?;
        self.gantry(&["apply", "-f", &file.to_string_lossy()])
    }

    /// Applies a manifest, which must be taken.
    pub fn apply_ok(&self, manifest: &str) -> Result<()> {
        let output = self.apply(manifest)?;
        if output.code != 0 {
            bail!("apply: {}{}", output.stdout, output.stderr);
        }
        Ok(())
    }

    /// One object, or a List, as JSON: by a connection that stays, where it knows the question.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        if let Some(question) = Question::parse(arguments) {
            return self.ask(&question);
        }
        let mut all = vec!["get", "-o", "json"];
        all.extend(arguments);
        Ok(serde_json::from_str(&self.ok(&all)?)?)
    }

    fn ask(&self, question: &Question) -> Result<Value> {
        let mut api = self.api.lock().unwrap_or_else(PoisonError::into_inner);
        // A control plane that was killed has ended the connection, and may come back as another one.
        let is_broken = |status: &tonic::Status| {
            matches!(
                status.code(),
                Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded
            )
        };
        if let Some(kept) = api.take() {
            let answer = kept.ask(question);
            if !answer.as_ref().is_err_and(is_broken) {
                *api = Some(kept);
                return Ok(answer?);
            }
        }
        let connected = Api::connect(Path::new(KUBECONFIG))?;
        let answer = connected.ask(question)?;
        *api = Some(connected);
        Ok(answer)
    }

    /// Asks until it is true; the error tells what was waited for and the last words of both logs.
    pub fn wait(
        &self,
        what: &str,
        limit: Duration,
        is_true: impl Fn(&Self) -> Result<bool>,
    ) -> Result<()> {
        let began = Instant::now();
        loop {
            let asked = Instant::now();
            let last = is_true(self);
            if matches!(last, Ok(true)) {
                return Ok(());
            }
            // An emulated machine takes longer to ask than what it waits for would take: no question
            // may cost that more than half of a processor.
            let pause = asked.elapsed().max(Duration::from_millis(50));
            if began.elapsed() > limit {
                let why = last.err().map(|e| format!("{e:#}; ")).unwrap_or_default();
                bail!(
                    "waited {} s for {what}; {why}\n{}",
                    limit.as_secs(),
                    self.last_words()
                );
            }
            std::thread::sleep(pause);
        }
    }

    /// Waits for a pod's condition Ready.
    pub fn wait_ready(&self, namespace: &str, pod: &str) -> Result<()> {
        self.wait(
            &format!("pod {pod} to be ready"),
            Duration::from_secs(120),
            |c| Ok(is_ready(&c.get(&["pod", pod, "-n", namespace])?)),
        )
    }

    /// Waits until a pod's phase is that.
    pub fn wait_phase(&self, namespace: &str, pod: &str, phase: &str) -> Result<()> {
        self.wait(
            &format!("pod {pod} to be {phase}"),
            Duration::from_secs(120),
            |c| Ok(c.get(&["pod", pod, "-n", namespace])?["status"]["phase"] == phase),
        )
    }

    fn node_is_ready(&self) -> Result<bool> {
        Ok(is_ready(&self.get(&["node", NODE])?))
    }

    /// Everything that a program of ours has logged.
    pub fn log(&self, program: &str) -> Result<Vec<u8>> {
        Ok(std::fs::read(
            self.logs.path().join(format!("{program}.log")),
        )?)
    }

    /// The ends of both logs.
    pub fn last_words(&self) -> String {
        let mut words = String::new();
        for name in ["gantry-control.log", "gantry-agent.log"] {
            let text = std::fs::read_to_string(self.logs.path().join(name)).unwrap_or_default();
            let last: Vec<&str> = text.lines().rev().take(25).collect();
            words.push_str(&format!("--- {name}\n"));
            for line in last.iter().rev() {
                words.push_str(line);
                words.push('\n');
            }
        }
        words
    }

    /// Removes everything; an error when something is left.
    pub fn finish(mut self) -> Result<()> {
        self.leave()
    }

    /// The same; afterwards nothing can be asked.
    pub fn leave(&mut self) -> Result<()> {
        self.remove()?;
        let census = census::take();
        if !census::is_zero(&census) {
            bail!(
                "left behind: {:?}\n{}",
                census::rows(&census),
                self.last_words()
            );
        }
        Ok(())
    }

    fn remove(&mut self) -> Result<()> {
        for mut child in [self.agent.take(), self.control.take()]
            .into_iter()
            .flatten()
        {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let began = Instant::now();
            while child.try_wait()?.is_none() {
                if began.elapsed() > Duration::from_secs(10) {
                    child.kill()?;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let cleaned = self.cleanup();
        for file in census::FILES {
            let path = Path::new(file);
            let _ = if path.is_dir() {
                std::fs::remove_dir_all(path)
            } else {
                std::fs::remove_file(path)
            };
        }
        cleaned
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("removing the test cluster: {error:#}");
        }
    }
}

/// Detaches every mount below a directory, the innermost first.
fn unmount_below(directory: &Path) -> Result<()> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let below: Vec<&str> = points
        .filter(|point| Path::new(point).starts_with(directory))
        .collect();
    for point in below.iter().rev() {
        nix::mount::umount2(*point, nix::mount::MntFlags::MNT_DETACH)
            .with_context(|| format!("unmount {point}"))?;
    }
    Ok(())
}

/// condition Ready is True.
pub fn is_ready(object: &Value) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions
        .into_iter()
        .flatten()
        .any(|c| c["type"] == "Ready" && c["status"] == "True")
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run {name}"))?;
    Ok(Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
