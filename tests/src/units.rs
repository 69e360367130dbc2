//! Both daemons as units of a real systemd, which is the first process of a virtual machine.
//!
//! ```text
//!  gantry-vm-init ─► modules, the unit of this, exec systemd ─► gantry-vm.service ─► `gantry init`
//!                    ─► the agent is restarted, hangs, is stopped; the control plane dies; systemd itself
//!                       starts anew: the pod does not notice ─► shutdown ─► `gantry reset`
//! ```
//! Where no systemd is the first process it is skipped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::census;
use crate::cluster::{Installation, KUBECONFIG, NODE, Output, run};
use crate::scenario::Skipped;

/// For `--scenario`.
pub const NAME: &str = "systemd-units";
const AGENT: &str = "gantry-agent.service";
const CONTROL: &str = "gantry-control.service";
/// On an emulated machine.
const LIMIT: Duration = Duration::from_secs(120);
/// A minute otherwise, which nobody wants to wait here.
const SHORT_WATCHDOG: &str = "[Service]\nWatchdogSec=5\n";
const DROP_IN: &str = "/etc/systemd/system/gantry-agent.service.d/short.conf";
const MEMORY: u64 = 64 << 20;

const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: lasting}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sleep, \"98765\"]
      resources: {limits: {memory: 64Mi}}
";

/// The units do what is written in them, and `gantry reset` leaves none.
pub fn units(installation: &Installation) -> Result<()> {
    let first = fs::read_to_string("/proc/1/comm")?;
    if first.trim() != "systemd" {
        return Err(Skipped(format!("the first process is {}", first.trim())).into());
    }
    let machine = Machine { installation };
    machine.import()?;
    let said = machine.ok("gantry", &["init", "--node-name", NODE])?;
    ensure!(said.contains("node node-1 is ready"), "{said}");
    for unit in [AGENT, CONTROL] {
        let shown = show(unit, &["ActiveState", "Type", "WatchdogUSec", "StatusText"])?;
        let is_so = shown[..3] == ["active", "notify", "1min"] && !shown[3].is_empty();
        ensure!(is_so, "{unit}: {shown:?}");
    }
    machine.apply(POD)?;
    let wait = [
        "wait",
        "--for=condition=Ready",
        "pod/lasting",
        "--timeout=120s",
    ];
    machine.ok("gantry", &wait)?;
    let pod = machine.pod()?;

    let first = main_pid(AGENT)?;
    systemctl(&["restart", AGENT])?;
    ensure!(main_pid(AGENT)? != first, "no other agent runs");
    machine.untouched(&pod).context("after a restart")?;

    fs::create_dir_all(Path::new(DROP_IN).parent().context("no directory")?)?;
    fs::write(DROP_IN, SHORT_WATCHDOG)?;
    systemctl(&["daemon-reload"])?;
    systemctl(&["restart", AGENT])?;
    machine.untouched(&pod).context("after a new unit")?;
    // It says that it is alive, or it would not live so long.
    let lives = main_pid(AGENT)?;
    std::thread::sleep(Duration::from_secs(12));
    ensure!(
        main_pid(AGENT)? == lives,
        "the watchdog has ended a live agent"
    );
    signal("STOP", lives)?;
    until("the watchdog to end an agent that hangs", || {
        let shown = show(AGENT, &["NRestarts", "ActiveState"])?;
        Ok(shown[0] != "0" && shown[1] == "active" && main_pid(AGENT)? != lives)
    })?;
    machine.untouched(&pod).context("after the watchdog")?;

    let dead = main_pid(CONTROL)?;
    signal("KILL", dead)?;
    until("another control plane to run", || {
        Ok(show(CONTROL, &["ActiveState"])?[0] == "active" && main_pid(CONTROL)? != dead)
    })?;
    machine
        .untouched(&pod)
        .context("after the control plane's death")?;

    // systemd looks anew at every cgroup that it knows; the pods' are none of them.
    systemctl(&["daemon-reexec"])?;
    systemctl(&["daemon-reload"])?;
    machine.untouched(&pod).context("after a new systemd")?;

    systemctl(&["stop", AGENT])?;
    ensure!(pod.runs(), "the pod has ended with its agent's unit");
    systemctl(&["start", AGENT])?;
    machine.untouched(&pod).context("after a stop")?;

    systemctl(&["stop", "gantry-shutdown.service"])?;
    ensure!(!pod.runs(), "the pod runs on after the machine's shutdown");
    until("the pod's last words", || {
        let status = machine.get(&["pod", "lasting"])?["status"].clone();
        Ok(status["phase"] == "Failed" && status["reason"] == "Terminated")
    })?;

    fs::remove_file(DROP_IN)?;
    machine.ok("gantry", &["reset", "--force"])?;
    for unit in [AGENT, CONTROL, "gantry-shutdown.service"] {
        let loaded = show(unit, &["LoadState", "ActiveState"])?;
        ensure!(
            loaded[0] == "not-found" && loaded[1] != "active",
            "{unit}: {loaded:?}"
        );
    }
    let left = census::take();
    ensure!(census::is_zero(&left), "left: {:?}", census::rows(&left));
    Ok(())
}

struct Machine<'a> {
    installation: &'a Installation,
}

/// What must not change.
#[derive(Debug, PartialEq)]
struct Pod {
    container: Value,
    restarts: Value,
    address: Value,
    pid: u32,
    cgroup: PathBuf,
}

impl Pod {
    fn runs(&self) -> bool {
        is_ours(self.pid)
    }
}

impl Machine<'_> {
    fn run(&self, program: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(self.installation.bin.join(program));
        run(command.args(arguments).env("KUBECONFIG", KUBECONFIG))
    }

    fn ok(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = self.run(program, arguments)?;
        ensure!(
            output.code == 0,
            "{program} {arguments:?}: {output:?}\n{}",
            journal()
        );
        Ok(output.stdout)
    }

    fn import(&self) -> Result<()> {
        let archives = fs::read_dir(&self.installation.images)?;
        let mut archives = archives.flatten().map(|entry| entry.path());
        let archive = archives.find(|path| path.to_string_lossy().contains("busybox"));
        let archive = archive.context("no image")?.display().to_string();
        self.ok("gantry-agent", &["image", "import", &archive])
            .map(drop)
    }

    fn apply(&self, manifest: &str) -> Result<()> {
        let path = std::env::temp_dir().join("units.yaml");
        fs::write(&path, manifest)?;
        let path = path.display().to_string();
        self.ok("gantry", &["apply", "-f", &path]).map(drop)
    }

    fn get(&self, what: &[&str]) -> Result<Value> {
        let words = [&["get", "-o", "json"][..], what].concat();
        Ok(serde_json::from_str(&self.ok("gantry", &words)?)?)
    }

    fn pod(&self) -> Result<Pod> {
        let pod = self.get(&["pod", "lasting"])?;
        let container = &pod["status"]["containerStatuses"][0];
        let mut own = processes().into_iter().filter(|pid| is_ours(*pid));
        let (pid, more) = (own.next().context("no process of the pod")?, own.next());
        ensure!(more.is_none(), "two processes of the pod");
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::/"));
        Ok(Pod {
            container: container["containerID"].clone(),
            restarts: container["restartCount"].clone(),
            address: pod["status"]["podIP"].clone(),
            pid,
            cgroup: Path::new("/sys/fs/cgroup").join(cgroup.context("no cgroup")?),
        })
    }

    /// With the node ready and every limit in place.
    fn untouched(&self, before: &Pod) -> Result<()> {
        until("the node to be ready", || {
            let node = self.get(&["node", NODE])?;
            let conditions = node["status"]["conditions"].as_array();
            let mut conditions = conditions.into_iter().flatten();
            Ok(conditions.any(|c| c["type"] == "Ready" && c["status"] == "True"))
        })?;
        let now = self.pod()?;
        ensure!(now == *before, "the pod was {before:?} and is {now:?}");
        let limit = fs::read_to_string(now.cgroup.join("memory.max"))?;
        ensure!(limit.trim() == MEMORY.to_string(), "memory.max is {limit}");
        Ok(())
    }
}

fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// The pod's one process, by its words.
fn is_ours(pid: u32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == b"sleep\x0098765\0")
}

fn signal(name: &str, pid: u32) -> Result<()> {
    let status = Command::new("/bin/busybox")
        .args(["kill", &format!("-{name}"), &pid.to_string()])
        .status()?;
    ensure!(status.success(), "kill -{name} {pid}: {status}");
    Ok(())
}

fn systemctl(arguments: &[&str]) -> Result<String> {
    let output = run(Command::new("systemctl").args(arguments))?;
    ensure!(
        output.code == 0,
        "systemctl {arguments:?}: {output:?}\n{}",
        journal()
    );
    Ok(output.stdout)
}

/// Properties of a unit, in that order.
fn show(unit: &str, properties: &[&str]) -> Result<Vec<String>> {
    let value = |property: &&str| {
        let said = systemctl(&["show", "--value", "--property", property, unit])?;
        Ok(said.trim().to_owned())
    };
    properties.iter().map(value).collect()
}

fn main_pid(unit: &str) -> Result<u32> {
    Ok(show(unit, &["MainPID"])?[0].parse()?)
}

fn journal() -> String {
    let words = ["-u", "gantry-*", "-n", "40", "--no-pager", "-o", "cat"];
    let said = run(Command::new("journalctl").args(words));
    said.map_or_else(
        |error| format!("{error:#}"),
        |said| said.stdout + &said.stderr,
    )
}

fn until(what: &str, is_so: impl Fn() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    loop {
        let words = match is_so() {
            Ok(true) => return Ok(()),
            Ok(false) => "no".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        if began.elapsed() > LIMIT {
            bail!(
                "waited {} s for {what}: {words}\n{}",
                LIMIT.as_secs(),
                journal()
            );
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}
