//! The kill sweep: SIGKILL at the N-th system call of a pod's creation and deletion.
//!
//! ```text
//! a pod's life under strace ─► every system call of gantry-rt, gantry-shim, the agent = a point
//! point ─► strace --inject=CALL:signal=KILL:when=N ─► pod runs, ends, is deleted ─► nothing left? ─► next
//! ```
//! The agent is attached to while it runs, and started again when it was killed.
//!
//! What each point requires: the pod runs in the end (started anew where it was killed), its log and
//! its exit code are those of a pod that nobody disturbed, its deletion ends, and then the node holds
//! no more of anything than before: processes, links, mounts, cgroups, leases, files, map entries,
//! and no more open files, threads and zombies of the agent.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::cluster::{Cluster, Installation};
use crate::inventory;

mod points;
mod tracer;

pub use self::points::Choice;
use self::points::{Point, Program, choose, points};
use self::tracer::{Attached, WRAPPED, Wrapped};

/// A failed start waits 10 s, then 20: a point may hit twice.
const CONVERGE: Duration = Duration::from_secs(90);
/// After a pod's object has gone nothing may be left for longer than this.
const SETTLE: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(50);
/// More failing points than these say no more about what is wrong.
const FAILURE_COUNT_MAX: usize = 20;
const NAME: &str = "swept";
/// Speaks, waits until it is asked to end, speaks again and fails: log and exit code have a content.
const MANIFEST: &str = "apiVersion: v1
kind: Service
metadata: {name: swept}
spec:
  selector: {app: swept}
  ports: [{port: 80}]
---
apiVersion: v1
kind: Pod
metadata:
  name: swept
  labels: {app: swept}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 5
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command:
        - sh
        - -c
        - trap 'exit 0' TERM; echo one; echo two; while [ ! -e /tmp/end ]; do sleep 0.05; done; echo three; exit 7
";
const LOG: [&str; 3] = ["one", "two", "three"];
const EXIT_CODE: i64 = 7;
/// What is reported when nobody saw the status, which may only be so when the shim was killed.
const EXIT_CODE_LOST: i64 = 137;

/// Runs the sweep; prints each point before it is tried. What fails at one point does not hide what
/// fails at others: they are tried on a new cluster.
///
/// # Errors
/// The points that did not converge or left something, in words that name them.
pub fn run(installation: &Installation, choice: &Choice) -> Result<()> {
    let (wrapped, installation) = Wrapped::set_up(installation)?;
    let mut cluster = Cluster::start(&installation)?;
    let recorded = Sweep::of(&wrapped, &mut cluster).record();
    if recorded.is_err() {
        eprintln!("{}", cluster.last_words());
    }
    let all = recorded?;
    let mut chosen = VecDeque::from(choose(&all, choice));
    println!(
        "sweep {choice:?}: {} of {} points",
        chosen.len(),
        all.values().map(Vec::len).sum::<usize>()
    );
    let began = Instant::now();
    let mut failures = Vec::new();
    while let Err(failure) = Sweep::of(&wrapped, &mut cluster).try_all(&mut chosen, began) {
        eprintln!("{failure:#}\n{}", cluster.last_words());
        failures.push(format!("{failure:#}"));
        ensure!(
            failures.len() < FAILURE_COUNT_MAX,
            "given up, with {} points to go: {}",
            chosen.len(),
            failures.join("\n")
        );
        for name in WRAPPED {
            wrapped.clear(name);
        }
        drop(cluster);
        cluster = Cluster::start(&installation)?;
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    cluster.finish()
}

struct Sweep<'a> {
    wrapped: &'a Wrapped,
    cluster: &'a mut Cluster,
}

impl<'a> Sweep<'a> {
    fn of(wrapped: &'a Wrapped, cluster: &'a mut Cluster) -> Self {
        Self { wrapped, cluster }
    }

    /// Takes the points off as they are tried, the one that fails too.
    fn try_all(&mut self, chosen: &mut VecDeque<Point>, began: Instant) -> Result<()> {
        self.first()?;
        let before = inventory::settled(self.cluster.agent_pid()?, SETTLE)?;
        while let Some(point) = chosen.pop_front() {
            println!("sweep: {} s: {point}", began.elapsed().as_secs());
            let tried = self.try_point(&point).and_then(|()| {
                inventory::wait_for_no_more(&before, self.cluster.agent_pid()?, SETTLE)
            });
            tried.with_context(|| format!("killed at {point}"))?;
        }
        Ok(())
    }

    /// What the first pod makes for all: seccomp filters, directories, connections.
    fn first(&mut self) -> Result<()> {
        self.make()?;
        self.end(&[EXIT_CODE])?;
        self.delete()
    }

    /// One pod's life under strace.
    fn record(&mut self) -> Result<BTreeMap<Program, Vec<Point>>> {
        self.first()?;
        let mut all = BTreeMap::new();
        // Not at once: strace on the agent slows what the others would be traced in.
        for name in WRAPPED {
            let file = self.wrapped.trace_file(name).display().to_string();
            self.wrapped.set(name, &format!("-o {file}"))?;
        }
        self.make()?;
        self.end(&[EXIT_CODE])?;
        self.delete()?;
        for (program, name) in [(Program::Rt, "gantry-rt"), (Program::Shim, "gantry-shim")] {
            let trace = read_trace(&self.wrapped.trace_file(name))?;
            all.insert(program, points(program, &trace));
        }
        for program in [Program::AgentCreates, Program::AgentDeletes] {
            let file = self.wrapped.trace_file("agent");
            let output = file.display().to_string();
            let attached = Attached::to(self.cluster.agent_pid()?, &["-o", &output])?;
            match program {
                Program::AgentCreates => self.make()?,
                _ => self.delete()?,
            }
            drop(attached);
            all.insert(program, points(program, &read_trace(&file)?));
        }
        for (program, points) in &all {
            ensure!(!points.is_empty(), "no system call of {program:?} was seen");
        }
        Ok(all)
    }

    /// A pod's life with the kill in it.
    fn try_point(&mut self, point: &Point) -> Result<()> {
        let inject = format!("inject={}:signal=SIGKILL:when={}", point.call, point.nth);
        let trace = format!("trace={}", point.call);
        let name = match point.program {
            Program::Rt => "gantry-rt",
            Program::Shim => "gantry-shim",
            Program::AgentCreates | Program::AgentDeletes => return self.try_agent(point),
        };
        let options = format!("-o /dev/null -e {trace} -e {inject}");
        self.wrapped.set(name, &options)?;
        self.make()?;
        match point.program {
            Program::Shim => self.end(&[EXIT_CODE, EXIT_CODE_LOST])?,
            _ => self.end(&[EXIT_CODE])?,
        }
        self.wrapped.clear(name);
        self.delete()
    }

    fn try_agent(&mut self, point: &Point) -> Result<()> {
        let inject = format!("inject={}:signal=SIGKILL:when={}", point.call, point.nth);
        let trace = format!("trace={}", point.call);
        let options = ["-o", "/dev/null", "-e", &trace, "-e", &inject];
        if point.program == Program::AgentCreates {
            let attached = Attached::to(self.cluster.agent_pid()?, &options)?;
            self.make()?;
            drop(attached);
            self.end(&[EXIT_CODE])?;
            return self.delete();
        }
        self.make()?;
        let attached = Attached::to(self.cluster.agent_pid()?, &options)?;
        self.delete()?;
        drop(attached);
        self.cluster.revive_agent().map(drop)
    }

    /// The pod runs in the end, whoever is killed on the way.
    fn make(&mut self) -> Result<()> {
        self.cluster.apply_ok(MANIFEST)?;
        self.until("the pod to run", |c| {
            let pod = c.get(&["pod", NAME])?;
            Ok(crate::cluster::is_ready(&pod))
        })
    }

    /// Lets the container end; its log and exit code are whole.
    fn end(&mut self, codes: &[i64]) -> Result<()> {
        self.until("the pod to end", |c| {
            // Lost with a shim or an agent that is killed meanwhile: asked again.
            c.gantry(&["exec", NAME, "--", "touch", "/tmp/end"])?;
            Ok(c.get(&["pod", NAME])?["status"]["phase"] == "Failed")
        })?;
        let pod = self.cluster.get(&["pod", NAME])?;
        let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
        let code = ended["exitCode"].as_i64().context("no exit code")?;
        ensure!(codes.contains(&code), "exit code {code}: {ended}");
        let log = self.cluster.ok(&["logs", NAME])?;
        // A start that was killed after the container was let go is made again: so are its words.
        let lines: Vec<&str> = log.lines().collect();
        let whole = lines.ends_with(&LOG) && lines.iter().all(|line| LOG.contains(line));
        ensure!(whole, "the log is {log:?}");
        Ok(())
    }

    /// The pod's object is gone in the end.
    fn delete(&mut self) -> Result<()> {
        self.cluster.ok(&["delete", "pod", NAME, "--wait=false"])?;
        self.until("the pod to be gone", |c| {
            Ok(c.gantry(&["get", "pod", NAME])?.code != 0)
        })
    }

    fn until(&mut self, what: &str, is_true: impl Fn(&Cluster) -> Result<bool>) -> Result<()> {
        let began = Instant::now();
        loop {
            self.cluster.revive_agent()?;
            if matches!(is_true(self.cluster), Ok(true)) {
                return Ok(());
            }
            if began.elapsed() > CONVERGE {
                let described = self.cluster.gantry(&["describe", "pod", NAME]);
                let described = described.map(|o| o.stdout).unwrap_or_default();
                bail!("waited {} s for {what}:\n{described}", CONVERGE.as_secs());
            }
            std::thread::sleep(PAUSE);
        }
    }
}

fn read_trace(file: &Path) -> Result<String> {
    let bytes = fs::read(file).with_context(|| file.display().to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
