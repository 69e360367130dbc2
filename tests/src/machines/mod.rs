//! A cluster of several machines, driven from node-1.
//!
//! ```text
//!  node-1: control plane, the scenarios ──┬── node-2: hand ─► agent
//!          (and an agent, when told)      └── node-3: hand ─► agent    (xtask/src/vm/nodes.rs)
//! ```
//! [`place`]: which machine this is; [`hand`]: acting on another one; [`asks`]: power and network faults;
//! [`bench`] and [`wire`]: figures.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;

use crate::cluster::{Cluster, Installation, KUBECONFIG, NODE};
use crate::scenario::nodes::{ALL, NodeScenario, Stage};
use crate::scenario::{Skipped, in_a_line};

pub mod asks;
pub mod bench;
pub mod hand;
pub mod place;
pub mod wire;

use asks::Asks;
use hand::Machine;
use place::Place;

/// A machine boots, and an agent starts, on a loaded host.
pub const LIMIT: Duration = Duration::from_secs(180);
/// A node that says nothing for so long is not ready: the least that a loaded host keeps.
pub const GRACE_S: u64 = 20;
/// Where Services of type LoadBalancer get their addresses from; on the link of node-1.
const POOL: &str = "10.0.1.200-10.0.1.220";

/// A running cluster of several machines.
pub struct Nodes {
    /// The control plane, and node-1's agent.
    pub cluster: Cluster,
    /// All but node-1.
    pub workers: Vec<Machine>,
    place: Place,
    asks: Asks,
    node_1_has_agent: bool,
}

impl Nodes {
    /// The control plane on this machine, an agent on each of the others.
    pub fn start(installation: &Installation, place: &Place) -> Result<Self> {
        let nodes = Self::prepare(installation, place)?;
        nodes.join_all()?;
        Ok(nodes)
    }

    /// The control plane on this machine; no node yet.
    pub fn prepare(installation: &Installation, place: &Place) -> Result<Self> {
        let workers: Vec<Machine> = place
            .numbers()
            .skip(1)
            .map(|number| Machine {
                name: Place::name(number),
                address: place.address(number),
            })
            .collect();
        let flags = [
            format!("--node-grace-period-s={GRACE_S}"),
            format!("--load-balancer-pool={POOL}"),
            // Of both families.
            "--cluster-cidr=10.244.0.0/16,fd00:10:244::/56".to_owned(),
            "--service-cidr=10.96.0.0/16,fd00:10:96::/112".to_owned(),
        ];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let mut cluster = Cluster::prepare(installation, &flags, &[])?;
        cluster.start_control()?;
        Ok(Self {
            cluster,
            workers,
            place: place.clone(),
            asks: Asks::open()?,
            node_1_has_agent: false,
        })
    }

    /// Every worker becomes a node, unless it is one.
    fn join_all(&self) -> Result<()> {
        let known = self.cluster.ok(&["get", "nodes", "-o", "name"])?;
        for worker in &self.workers {
            self.wait_up(worker)?;
            if !known.lines().any(|line| line.ends_with(&worker.name)) {
                self.join(worker)?;
            }
        }
        for worker in &self.workers {
            self.wait_ready(&worker.name)?;
        }
        Ok(())
    }

    /// The agent of a worker that has joined starts, anew if it runs, with more flags.
    fn start_worker(&self, worker: &Machine, flags: &[&str]) -> Result<()> {
        let server = format!("https://{}:6443", self.place.address(1));
        let mut words = vec!["run", "--node-name", &worker.name, "--server", &server];
        words.extend(flags);
        worker.stop_agent()?;
        worker.start_agent(&words)
    }

    /// Makes a machine a node, as a person would: the line that one machine prints, typed on the other.
    fn join(&self, worker: &Machine) -> Result<()> {
        let server = format!("{}:6443", self.place.address(1));
        let line = [
            "token",
            "create",
            "--print-join-command",
            "--server",
            &server,
        ];
        let line = self.cluster.ok(&line)?;
        let mut words: Vec<&str> = line.split_whitespace().collect();
        words.extend(["--no-start", "--node-name", &worker.name]);
        worker.ok(&words)?;
        self.start_worker(worker, &[])
    }

    /// An agent on node-1 as well.
    pub fn join_node_1(&mut self) -> Result<()> {
        self.cluster.import("busybox")?;
        self.cluster.import("nginx")?;
        self.cluster.start_agent()?;
        self.node_1_has_agent = true;
        self.wait_ready(NODE)
    }

    /// Starts the agents of all nodes anew, with these flags as well.
    pub fn route(&mut self, flags: &[&str]) -> Result<()> {
        let server = format!("https://{}:6443", self.place.address(1));
        for worker in &self.workers {
            worker.stop_agent()?;
            let own = ["run", "--node-name", &worker.name, "--server", &server];
            worker.start_agent(&[&own[..], flags].concat())?;
        }
        if self.node_1_has_agent {
            self.cluster.kill_agent()?;
            self.cluster.start_agent_with(flags)?;
        }
        Ok(())
    }

    /// Runs a line of shell on a machine; it must succeed.
    pub fn on(&self, number: u8, script: &str) -> Result<String> {
        let command = ["sh", "-c", script];
        if let Some(worker) = self.workers.get(usize::from(number).wrapping_sub(2)) {
            return worker.ok(&command);
        }
        let mut shell = std::process::Command::new("sh");
        let output = crate::cluster::run(shell.args(["-c", script]))?;
        let words = output.stdout + &output.stderr;
        ensure!(output.code == 0, "{script} on {NODE}: {words}");
        Ok(words)
    }

    /// The numbers of the machines that are nodes.
    pub fn numbers(&self) -> Vec<u8> {
        let first = if self.node_1_has_agent { 1 } else { 2 };
        self.place.numbers().filter(|n| *n >= first).collect()
    }

    /// The address of a machine.
    pub fn address(&self, number: u8) -> Ipv4Addr {
        self.place.address(number)
    }

    /// Its IPv6 address; none: it is behind the router, which knows no IPv6.
    pub fn address_v6(&self, number: u8) -> Option<Ipv6Addr> {
        let is_near = |other| self.place.segment(number) == self.place.segment(other);
        self.place
            .numbers()
            .all(is_near)
            .then(|| self.place.address_v6(number))
    }

    /// A worker by its number.
    pub fn worker(&self, number: u8) -> Result<&Machine> {
        let worker = self.workers.get(usize::from(number).wrapping_sub(2));
        worker.with_context(|| format!("node-{number} is no worker"))
    }

    /// Asks for a fault, or for its end.
    pub fn ask(&mut self, words: &str) -> Result<()> {
        self.asks.ask(words)
    }

    /// Until the machine does what it is told.
    pub fn wait_up(&self, worker: &Machine) -> Result<()> {
        let what = format!("{} to boot", worker.name);
        self.cluster.wait(&what, LIMIT, |_| Ok(worker.is_up()))
    }

    /// Until the node is ready.
    pub fn wait_ready(&self, name: &str) -> Result<()> {
        self.wait_condition(name, "True", LIMIT)
    }

    /// Until the node's condition Ready is that.
    pub fn wait_condition(&self, name: &str, status: &str, limit: Duration) -> Result<()> {
        let what = format!("node {name} to have Ready {status}");
        let done = self.cluster.wait(&what, limit, |c| {
            let node = c.get(&["node", name])?;
            let conditions = node["status"]["conditions"].as_array();
            let mut conditions = conditions.into_iter().flatten();
            Ok(conditions.any(|c| c["type"] == "Ready" && c["status"] == status))
        });
        done.with_context(|| self.last_words())
    }

    fn last_words(&self) -> String {
        let words = self.workers.iter().map(Machine::last_words);
        words.collect::<Vec<_>>().join("\n")
    }

    /// Everything that could tell why something failed.
    fn explain(&self) -> String {
        let pods = self
            .cluster
            .gantry(&["get", "nodes,pods,events", "-A", "-o", "wide"]);
        let pods = pods.map(|o| o.stdout + &o.stderr).unwrap_or_default();
        // The words of node-1 are in the error, or in its log.
        format!("{}\n{pods}", self.last_words())
    }

    /// No faults, a control plane, and every node ready.
    fn tidy_faults(&mut self) -> Result<()> {
        self.cluster.ensure_control()?;
        self.ask("heal")?;
        for worker in self.workers.clone() {
            self.ask(&format!("power-on {}", worker.name))?;
            self.wait_up(&worker)?;
            self.wait_ready(&worker.name)?;
        }
        Ok(())
    }

    /// After a scenario: no faults, no pods, every node ready.
    fn tidy(&mut self) -> Result<()> {
        self.tidy_faults()?;
        let spaces = self.cluster.ok(&["get", "namespaces", "-o", "name"])?;
        for name in spaces.lines().filter_map(|l| l.rsplit('/').next()) {
            if name != "default" && !name.starts_with("kube-") {
                self.cluster
                    .ok(&["delete", "namespace", name, "--timeout=240s"])?;
            }
        }
        let left = self.cluster.ok(&["get", "pods", "-A", "--no-headers"])?;
        ensure!(left.trim().is_empty(), "pods are left: {left}");
        Ok(())
    }

    /// A scenario that has failed leaves what it made: the next one is not to fail of that.
    fn clear(&self) -> Result<()> {
        let services = self.cluster.ok(&["get", "services", "-o", "name"])?;
        let names = services.lines().filter_map(|l| l.rsplit('/').next());
        for name in names.filter(|name| *name != "kubernetes") {
            self.cluster.ok(&["delete", "service", name])?;
        }
        self.cluster
            .ok(&["delete", "pods", "--all", "--timeout=240s"])
            .map(drop)
    }

    fn hand_over(&mut self) -> Result<()> {
        let config = fs::read(KUBECONFIG)?;
        let base64 = base64::engine::general_purpose::STANDARD.encode(config);
        self.ask(&format!("kubeconfig {base64}"))
    }
}

/// Runs the scenarios that are wanted, and prints a verdict of each.
pub fn run(installation: &Installation, place: &Place, wanted: &str) -> Result<()> {
    if wanted == "bench" {
        println!("vm: figures {}", bench::run(installation, place)?);
        return Ok(());
    }
    let is_wanted = |scenario: &&NodeScenario| match wanted {
        "all" => true,
        "short" => scenario.is_short,
        "none" => false,
        names => names.split(',').any(|name| scenario.name == name),
    };
    let scenarios: Vec<&NodeScenario> = ALL.iter().filter(is_wanted).collect();
    if scenarios.is_empty() && wanted != "none" {
        bail!("{wanted}: no such scenario");
    }
    let began = Instant::now();
    let mut nodes = Nodes::start(installation, place)?;
    let took = began.elapsed().as_secs_f64();
    println!("vm: ok nodes-start {took:.1} s");
    let is_told = |name: &str| place.told.iter().any(|told| told == name);
    for scenario in scenarios.into_iter().filter(|one| !is_told(one.name)) {
        if place.keep && scenario.stage == Stage::Last {
            println!("vm: skipped {}: the cluster is kept", scenario.name);
            continue;
        }
        if scenario.stage != Stage::WorkersOnly && !nodes.node_1_has_agent {
            nodes.join_node_1().context("node-1 joins")?;
        }
        nodes.ask("begin")?;
        let began = Instant::now();
        let done = (scenario.run)(&mut nodes);
        let failed = done.as_ref().is_err_and(|error| !error.is::<Skipped>());
        if failed {
            nodes.ask(&format!("capture {}", scenario.name))?;
            println!("{}", nodes.explain());
        }
        let cleared = match failed && scenario.stage != Stage::Last {
            // A machine may be without power.
            true => nodes.tidy_faults().and_then(|()| nodes.clear()),
            false => Ok(()),
        };
        let tidied = match scenario.stage {
            Stage::Last => Ok(()),
            _ => cleared.and_then(|()| nodes.tidy()).context("afterwards"),
        };
        if !failed && tidied.is_err() {
            nodes.ask(&format!("capture {}", scenario.name))?;
            println!("{}", nodes.explain());
        }
        let took = began.elapsed().as_secs_f64();
        match done.and(tidied) {
            Ok(()) => println!("vm: ok {} {took:.1} s", scenario.name),
            Err(error) if error.is::<Skipped>() => {
                println!("vm: skipped {}: {error}", scenario.name);
            }
            Err(error) => {
                println!("vm: FAILED {}: {}", scenario.name, in_a_line(&error));
            }
        }
    }
    if place.keep {
        if !nodes.node_1_has_agent {
            nodes.join_node_1()?;
        }
        nodes.hand_over()?;
        println!("vm: end");
        loop {
            std::thread::park();
        }
    }
    // The machines lose their power now; what is left behind on one is looked at by `leave`.
    std::mem::forget(nodes);
    Ok(())
}
