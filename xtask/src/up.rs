//! `cargo xtask up`: the main job, on this machine, from nothing.
//!
//! set-up -> build -> control plane and agent -> images -> an ordinary manifest -> 300 requests by
//! name from the host and from a pod -> who answered, how each pod started, and that not one
//! netfilter rule was added.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{build, census, down, image, netfilter, port, report, run, setup, vm};

/// Requests from the host, and again from the client pod.
const REQUEST_COUNT: usize = 300;
const SERVICE: &str = "web.web.svc.cluster.local";
/// What the pods' resolv.conf names; here it is asked from the host, through the same eBPF.
const RESOLVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 53);
const API_PORT: u16 = 6443;
const KUBECONFIG: &str = "/etc/gantry/admin.kubeconfig";

/// What `up` takes.
#[derive(clap::Args)]
pub struct Arguments {
    /// Leave everything running and return
    #[arg(long)]
    pub detach: bool,
    /// In three virtual machines instead of on this one: without root, and nothing of it is changed
    #[arg(long, conflicts_with = "detach")]
    pub vm: bool,
}

/// The built binaries, and the credentials of the cluster they run.
pub struct Cluster {
    pub bin: PathBuf,
    pub kubeconfig: PathBuf,
}

/// Runs the main job.
pub fn run(arguments: &Arguments) -> Result<()> {
    if arguments.vm {
        return vm::up(|cluster| {
            cluster.web()?;
            let step = report::step(&format!("{REQUEST_COUNT} requests from a pod"));
            let pod = cluster.requests_from_pod();
            let pod = pod.context("requests from the client pod")?;
            answers(&[("client", &pod)])?;
            drop(step);
            report::step("how each pod started");
            cluster.timelines()
        });
    }
    if !run::is_root() {
        setup::explain(setup::For::Up);
        bail!(
            "pods need root. As root, run:\n  cargo xtask up\nor, without root, in virtual \
             machines:\n  cargo xtask up --vm"
        );
    }
    let step = report::step("setting up this machine");
    setup::ensure(setup::For::Up)?;
    drop(step);
    let step = report::step("building (release)");
    let bin = build::binaries(build::Profile::Release, "up")?;
    drop(step);
    let cluster = Cluster {
        bin,
        kubeconfig: KUBECONFIG.into(),
    };
    refuse_second()?;
    let interrupted = interrupts()?;
    let done = main_job(&cluster, interrupted);
    if let Err(error) = &done {
        eprintln!("xtask: {error:#}");
        eprintln!("logs: {0}/control.log {0}/agent.log", directory().display());
    }
    if done.is_ok() && arguments.detach {
        println!("left running; remove everything with: cargo xtask down");
        return Ok(());
    }
    if done.is_ok() {
        println!("Ctrl-C removes everything.");
        while !interrupted.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    if done.is_err() && arguments.detach {
        bail!("left as it is for a look; remove everything with: cargo xtask down");
    }
    let _ = std::io::stdout().flush();
    if writeln!(std::io::stdout()).is_err() {
        say_to_a_file()?;
    }
    down::run()?;
    done.map_err(|_| anyhow::anyhow!("the main job failed (see above)"))
}

/// `target/up`
pub fn directory() -> PathBuf {
    run::target().join("up")
}

fn refuse_second() -> Result<()> {
    let running = census::processes();
    if let Some((pid, name)) = running.iter().find(|(_, n)| n != "gantry-shim") {
        bail!("{name} runs already (pid {pid}). Remove it with:\n  cargo xtask down");
    }
    if std::net::TcpListener::bind(("0.0.0.0", API_PORT)).is_err() {
        let holder = port::listener(API_PORT).map_or_else(
            || "another program".to_owned(),
            |(pid, name)| format!("{name} (pid {pid})"),
        );
        bail!(
            "port {API_PORT}, the control plane's, is taken by {holder}. \
             End it, then run again:\n  cargo xtask up"
        );
    }
    Ok(())
}

/// Ctrl-C and SIGTERM set a flag: the tear-down is ours to do.
fn interrupts() -> Result<&'static AtomicBool> {
    static FLAG: AtomicBool = AtomicBool::new(false);
    extern "C" fn note(_: libc::c_int) {
        FLAG.store(true, Ordering::Relaxed);
    }
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::empty(), SigSet::empty());
    // SIGHUP: the terminal is gone, and with it everyone who could type Ctrl-C.
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }.context("sigaction")?;
    }
    Ok(&FLAG)
}

/// The terminal is closed: what is said from now on goes to `target/up/down.log`, so that the
/// removal goes on.
fn say_to_a_file() -> Result<()> {
    let path = directory().join("down.log");
    let file = std::fs::File::create(&path).with_context(|| path.display().to_string())?;
    nix::unistd::dup2_stdout(&file)?;
    nix::unistd::dup2_stderr(&file)?;
    Ok(())
}

fn main_job(cluster: &Cluster, interrupted: &AtomicBool) -> Result<()> {
    let rules_before = netfilter::rule_count()?;
    cluster.start()?;
    if interrupted.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    cluster.import(&[image::NGINX, image::BUSYBOX])?;
    cluster.web()?;
    let step = report::step(&format!(
        "{REQUEST_COUNT} requests from the host and from a pod"
    ));
    let host = requests_from_host().context("requests from the host")?;
    let pod = cluster
        .requests_from_pod()
        .context("requests from the client pod")?;
    answers(&[("host", &host), ("client", &pod)])?;
    drop(step);
    report::step("how each pod started");
    cluster.timelines()?;
    let rules_after = netfilter::rule_count()?;
    println!("==> netfilter rules: {rules_before} before, {rules_after} after");
    if rules_before != rules_after {
        bail!(
            "the number of netfilter rules has changed: something added {rules_after} - {rules_before}"
        );
    }
    try_next("target/up/env");
    Ok(())
}

/// What a person may type now.
pub fn try_next(env: &str) {
    println!("\nTry next:");
    println!("  . {env}");
    println!("  gantry get pods -A -o wide");
    println!("  gantry -n web logs deploy/web -f");
    println!("  gantry -n web exec -it client -- sh -c 'wget -qO- http://web'");
}

impl Cluster {
    /// The command line, with this cluster's credentials.
    pub fn gantry<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(self.bin.join("gantry"));
        command.args(arguments).env("KUBECONFIG", &self.kubeconfig);
        command
    }

    /// Three nginx behind a Service, and a pod to ask from: until all of it is ready.
    fn web(&self) -> Result<()> {
        let _step = report::step("applying tests/fixtures/manifests/web.yaml");
        let manifest = run::root().join("tests/fixtures/manifests/web.yaml");
        run::shown(self.gantry(["apply", "-f"]).arg(&manifest))?;
        run::shown(&mut self.gantry([
            "-n",
            "web",
            "rollout",
            "status",
            "deployment/web",
            "--timeout=240s",
        ]))?;
        run::shown(&mut self.gantry([
            "-n",
            "web",
            "wait",
            "--for=condition=Ready",
            "pod/client",
            "--timeout=120s",
        ]))?;
        run::shown(&mut self.gantry(["-n", "web", "get", "pods,services", "-o", "wide"]))
    }

    fn start(&self) -> Result<()> {
        let step = report::step("starting gantry-control and gantry-agent");
        let node = hostname()?;
        self.spawn(
            "gantry-control",
            &[
                "--kubeconfig",
                KUBECONFIG,
                "--agent-credentials",
                &format!("/etc/gantry/agent:{node}"),
            ],
            "control.log",
        )?;
        self.answers("control.log", || {
            TcpStream::connect_timeout(
                &SocketAddr::from((Ipv4Addr::LOCALHOST, API_PORT)),
                Duration::from_millis(200),
            )
            .is_ok()
                && Path::new(KUBECONFIG).exists()
        })?;
        self.write_env(&directory().join("env"))?;
        self.spawn("gantry-agent", &["run", "--node-name", &node], "agent.log")?;
        self.answers("agent.log", || {
            let node = run::captured(&mut self.gantry(["get", "node", &node, "-o", "json"]));
            node.ok()
                .and_then(|text| serde_json::from_str(&text).ok())
                .is_some_and(|n| ready(&n))
        })?;
        drop(step);
        run::shown(&mut self.gantry(["get", "nodes", "-o", "wide"]))
    }

    fn spawn(&self, name: &str, arguments: &[&str], log: &str) -> Result<()> {
        let path = directory().join(log);
        let file = std::fs::File::create(&path).with_context(|| path.display().to_string())?;
        let mut command = Command::new(self.bin.join(name));
        command.args(arguments).stdin(Stdio::null());
        command.stdout(file.try_clone()?).stderr(file);
        // A process group of its own: our Ctrl-C is not theirs.
        command.process_group(0);
        command.spawn().with_context(|| format!("start {name}"))?;
        Ok(())
    }

    /// Waits until `is_up`; a process that has ended, or 60 s, end the wait with its log's words.
    fn answers(&self, log: &str, is_up: impl Fn() -> bool) -> Result<()> {
        let name = if log == "control.log" {
            "gantry-control"
        } else {
            "gantry-agent"
        };
        let began = Instant::now();
        while !is_up() {
            let runs = census::processes().iter().any(|(_, n)| n == name);
            if !runs || began.elapsed() > Duration::from_secs(60) {
                let text = std::fs::read_to_string(directory().join(log)).unwrap_or_default();
                let last: Vec<&str> = text.lines().rev().take(8).collect();
                let last: Vec<&str> = last.into_iter().rev().collect();
                let what = if runs {
                    "is not ready after 60 s"
                } else {
                    "has ended"
                };
                bail!("{name} {what}; its last words:\n{}", last.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// A shell file: `. target/up/env; gantry get pods -A`.
    pub fn write_env(&self, path: &Path) -> Result<()> {
        let text = format!(
            "# . {}\nexport PATH='{}':\"$PATH\"\nexport KUBECONFIG='{}'\n",
            path.display(),
            self.bin.display(),
            self.kubeconfig.display()
        );
        std::fs::write(path, text).with_context(|| path.display().to_string())
    }

    fn import(&self, recipes: &[image::Recipe]) -> Result<()> {
        let _step = report::step("making and importing images");
        for recipe in recipes {
            let archive = image::archive(recipe)?;
            let mut import = Command::new(self.bin.join("gantry-agent"));
            run::shown(import.args(["image", "import"]).arg(&archive))?;
        }
        Ok(())
    }

    fn requests_from_pod(&self) -> Result<BTreeMap<String, usize>> {
        let script = format!(
            "i=0; while [ $i -lt {REQUEST_COUNT} ]; do wget -S -q -O /dev/null http://web 2>&1; i=$((i+1)); done"
        );
        let mut exec = self.gantry([
            "-n", "web", "exec", "client", "--", "/bin/sh", "-c", &script,
        ]);
        let said = run::captured(&mut exec)?;
        let mut hits = BTreeMap::new();
        for pod in said
            .lines()
            .filter_map(|l| l.trim().strip_prefix("X-Pod: "))
        {
            *hits.entry(pod.trim().to_owned()).or_insert(0) += 1;
        }
        Ok(hits)
    }

    fn timelines(&self) -> Result<()> {
        let said = run::captured(&mut self.gantry([
            "-n",
            "web",
            "get",
            "events",
            "--field-selector=reason=Timeline",
            "-o",
            "json",
        ]))?;
        let list: Value = serde_json::from_str(&said).context("events as JSON")?;
        let mut rows = Vec::new();
        for event in list["items"].as_array().into_iter().flatten() {
            let pod = event["involvedObject"]["name"].as_str().unwrap_or_default();
            let words = event["message"].as_str().unwrap_or_default();
            rows.push(format!("    {pod}\n      {words}"));
        }
        rows.sort();
        if rows.is_empty() {
            bail!("no pod has a start timeline");
        }
        println!("{}", rows.join("\n"));
        Ok(())
    }
}

fn ready(node: &Value) -> bool {
    let conditions = node["status"]["conditions"].as_array();
    conditions
        .into_iter()
        .flatten()
        .any(|c| c["type"] == "Ready" && c["status"] == "True")
}

fn hostname() -> Result<String> {
    let name = nix::unistd::gethostname().context("gethostname")?;
    Ok(name.to_string_lossy().to_lowercase())
}

fn requests_from_host() -> Result<BTreeMap<String, usize>> {
    let address = resolve(SERVICE)?;
    report::note(format!("{SERVICE} is {address}, says {RESOLVER}"));
    let mut hits = BTreeMap::new();
    for _ in 0..REQUEST_COUNT {
        let pod = get(SocketAddr::new(IpAddr::V4(address), 80))?;
        *hits.entry(pod).or_insert(0) += 1;
    }
    Ok(hits)
}

/// One HTTP request on a connection of its own; returns the X-Pod header.
fn get(address: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))
        .with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n"
    )?;
    let mut pod = None;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 && line.trim() != "" {
        if let Some(name) = line.strip_prefix("X-Pod: ") {
            pod = Some(name.trim().to_owned());
        }
        line.clear();
    }
    reader.read_to_end(&mut Vec::new())?;
    pod.with_context(|| format!("the answer of {address} has no X-Pod header"))
}

/// Asks the cluster's resolver for an IPv4 address, as a pod would.
fn resolve(name: &str) -> Result<Ipv4Addr> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.connect(RESOLVER)?;
    let mut query = vec![0x47, 0x41, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]; // id, recursion, one question
    for label in name.split('.') {
        query.push(label.len() as u8);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]); // root, type A, class IN
    let mut answer = [0u8; 512];
    for _ in 0..3 {
        socket.send(&query)?;
        let Ok(length) = socket.recv(&mut answer) else {
            continue;
        };
        let answer = answer.get(..length).unwrap_or_default();
        // One A record ends the answer section; ours carry nothing after it but EDNS, not asked for.
        let count = answer
            .get(6..8)
            .map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
        if let (true, [.., 0, 4, a, b, c, d]) = (count > 0, answer) {
            return Ok(Ipv4Addr::new(*a, *b, *c, *d));
        }
        bail!("{RESOLVER} has no address for {name}");
    }
    bail!("{RESOLVER} does not answer: is the agent running? see target/up/agent.log")
}

/// Who answered whom: a column for each client.
fn answers(clients: &[(&str, &BTreeMap<String, usize>)]) -> Result<()> {
    let head = std::iter::once("pod").chain(clients.iter().map(|(name, _)| *name));
    let mut rows = vec![head.map(str::to_owned).collect::<Vec<_>>()];
    let names = clients.iter().flat_map(|(_, hits)| hits.keys());
    let names: std::collections::BTreeSet<&String> = names.collect();
    for name in &names {
        let counts = clients.iter().map(|(_, hits)| hits.get(*name).copied());
        let counts = counts.map(|count| count.unwrap_or(0).to_string());
        rows.push(std::iter::once((*name).clone()).chain(counts).collect());
    }
    print!("{}", report::table(&rows));
    for (client, hits) in clients {
        let total: usize = hits.values().sum();
        if total != REQUEST_COUNT {
            bail!("of {REQUEST_COUNT} requests from the {client}, {total} were answered");
        }
    }
    if names.len() < 3 {
        bail!("only {} of 3 pods answered", names.len());
    }
    Ok(())
}
