//! What must work, each as a user would see it and as the kernel shows it: one file an area.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cluster::{Cluster, Installation};

mod bad_input;
mod bad_pods;
mod csi_volumes;
mod degraded;
mod device_plugins;
mod guarantees;
mod host_port;
mod images;
mod isolation;
mod join;
mod kills;
mod leaks;
mod life_cycle;
mod limits;
mod main_job;
mod names;
mod network_policy;
mod nfs;
pub mod nodes;
mod policies;
mod pressure;
mod probes;
mod reboot;
mod resources;
mod restarts;
mod restore;
mod rolling_update;
mod routed_pods;
mod security;
mod see;
mod shutdown;
mod static_pods;
mod streams;
mod tokens;
mod tunnel;
mod unkillable;
mod volumes;
mod workloads;

/// A named scenario.
pub struct Scenario {
    /// For `--scenario`.
    pub name: &'static str,
    /// What it shows depends on the kernel's version or on the version of cgroups: `cargo xtask test`
    /// runs it in the virtual machine as well, the others on the machine itself only.
    pub is_for_every_kernel: bool,
    run: fn(&mut Cluster) -> Result<()>,
}

const fn scenario(name: &'static str, run: fn(&mut Cluster) -> Result<()>) -> Scenario {
    Scenario {
        name,
        is_for_every_kernel: false,
        run,
    }
}

const fn for_every_kernel(name: &'static str, run: fn(&mut Cluster) -> Result<()>) -> Scenario {
    Scenario {
        is_for_every_kernel: true,
        ..scenario(name, run)
    }
}

/// Why a scenario cannot run on this machine. It is an error, so that nothing after it runs; those
/// who call [`Scenario::run`] print it as `skipped` and count it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Skipped(pub String);

/// Why a scenario failed, as one line of a console: who keeps only the lines of verdicts has all of it.
#[must_use]
pub fn in_a_line(error: &anyhow::Error) -> String {
    let words = format!("{error:#}");
    let lines = words.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" | ")
}

/// All of them, each on a cluster of its own.
pub const ALL: &[Scenario] = &[
    for_every_kernel("main-job", main_job::main_job),
    for_every_kernel("limits", limits::limits),
    for_every_kernel("devices", limits::devices),
    for_every_kernel("isolation", isolation::isolation),
    for_every_kernel("agent-kill", kills::agent_kill),
    scenario("control-kill", kills::control_kill),
    scenario("restore", restore::restore),
    scenario("probes-and-restarts", probes::probes_and_restarts),
    scenario("bad-input", bad_input::bad_input),
    scenario("logs-and-exec", streams::logs_and_exec),
    for_every_kernel("security", security::security),
    for_every_kernel("user-namespaces", security::user_namespaces),
    for_every_kernel("volumes", volumes::volumes),
    scenario("life-cycle", life_cycle::life_cycle),
    for_every_kernel("processes", life_cycle::processes),
    for_every_kernel("resources", resources::resources),
    for_every_kernel("guarantees", guarantees::guarantees),
    scenario("node-pressure", pressure::node_pressure),
    scenario("streams", streams::streams),
    scenario("static-pods", static_pods::static_pods),
    scenario("shutdown", shutdown::shutdown),
    scenario("images", images::images),
    scenario("bad-pods", bad_pods::bad_pods),
    scenario("leaks", leaks::leaks),
    scenario("workloads", workloads::workloads),
    scenario("policies", policies::policies),
    scenario("rolling-update", rolling_update::rolling_update),
    for_every_kernel("device-plugins", device_plugins::device_plugins),
    for_every_kernel("csi-volumes", csi_volumes::csi_volumes),
    for_every_kernel("nfs", nfs::nfs),
    scenario("no-ebpf", degraded::no_ebpf),
    for_every_kernel("missing-controller", degraded::missing_controller),
    for_every_kernel("reboot", reboot::reboot),
    scenario("host-port", host_port::host_port),
    for_every_kernel("network-policy", network_policy::network_policy),
    scenario("restarts-under-load", restarts::restarts_under_load),
    for_every_kernel("names", names::names),
    for_every_kernel("see", see::see),
    for_every_kernel("tunnel", tunnel::tunnel),
    scenario("join", join::join),
    scenario("routed-pods", routed_pods::routed_pods),
    scenario("tokens", tokens::tokens),
    scenario("unkillable", unkillable::unkillable),
];

impl Scenario {
    /// Starts a cluster, runs, removes everything, counts what is left.
    ///
    /// # Errors
    /// [`Skipped`] when this machine lacks what the scenario needs.
    pub fn run(&self, installation: &Installation) -> Result<()> {
        let mut cluster = Cluster::start(installation)?;
        let done = (self.run)(&mut cluster);
        if done.as_ref().is_err_and(|error| !error.is::<Skipped>()) {
            eprintln!("{}", cluster.last_words());
            let objects = "pods,services,endpointslices,events";
            for words in [
                &["get", objects, "-A", "-o", "wide"][..],
                &["svc", "list", "-A"],
                &["svc", "drops"],
            ] {
                let said = cluster.gantry(words);
                eprintln!("{}", said.map(|o| o.stdout + &o.stderr).unwrap_or_default());
            }
        }
        let finished = cluster.finish();
        done.and(finished)
    }
}

/// Whether somebody accepts a connection there; the error says why not.
fn accepts(address: SocketAddr, limit: Duration) -> Result<bool> {
    let connected = TcpStream::connect_timeout(&address, limit);
    connected.with_context(|| format!("connect to {address}"))?;
    Ok(true)
}

/// The manifest of the main job.
const MAIN_JOB: &str = include_str!("../fixtures/manifests/web.yaml");

/// One HTTP request; returns the X-Pod header.
fn get(address: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let header = answer.lines().find_map(|l| l.strip_prefix("X-Pod: "));
    Ok(header
        .with_context(|| format!("no X-Pod in {answer:?}"))?
        .trim()
        .to_owned())
}

/// A pod that sleeps, with more of its container's configuration.
fn sleeper(name: &str, more: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {name}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sleep\", \"3600\"]
{more}"
    )
}

/// A pod that sleeps, with a volume at /data.
fn with_volume(name: &str, volume: &str) -> String {
    let mounts = "      volumeMounts: [{name: data, mountPath: /data}]\n";
    sleeper(
        name,
        &format!("{mounts}  volumes: [{{name: data, {volume}}}]\n"),
    )
}

/// A file of the cgroup of a pod's container `main`, or of the pod's own with container "".
fn cgroup_file(
    cluster: &Cluster,
    pod: &str,
    container: &str,
    v2: &str,
    v1: (&str, &str),
) -> Result<String> {
    let path = cgroup_path(cluster, pod, container, v2, v1)?;
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.trim().to_owned())
}

/// Where that file is.
fn cgroup_path(
    cluster: &Cluster,
    pod: &str,
    container: &str,
    v2: &str,
    v1: (&str, &str),
) -> Result<PathBuf> {
    let object = cluster.get(&["pod", pod])?;
    let uid = object["metadata"]["uid"].as_str().context("no uid")?;
    let qos = object["status"]["qosClass"]
        .as_str()
        .context("no qosClass")?
        .to_lowercase();
    let below = format!("gantry/{qos}/pod{uid}/{container}");
    let unified = PathBuf::from("/sys/fs/cgroup").join(&below).join(v2);
    if unified.exists() {
        return Ok(unified);
    }
    let of_controller = PathBuf::from("/sys/fs/cgroup").join(v1.0);
    Ok(of_controller.join(&below).join(v1.1))
}
