//! A node: the agent's own feed, and a runtime and a data plane that are only remembered.
//!
//! ```text
//!  feed::run (real) ─view─► plane: one Service after the other, then Reporter::programmed
//!                   └─view─► pods: Hold (real) ─► worker of each pod: start ─► Running ─► drain ─► SIGTERM
//!                                                  ▲ part_of (real), Reporter::floor    ─► final, persisted
//! ```
//! What the kernel would keep while the agent is dead is in [`Machine`]: containers and programmed Services.
//! What is done by a process that has been killed has no effect: [`alive`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use gantry_agent::feed::{self, Link, Reporter, TunnelError, TunnelTarget};
use gantry_agent::ids::PodUid;
use gantry_agent::paths::Paths;
use gantry_agent::pods::drain::part_of;
use gantry_agent::pods::hold::{self, Hold, PATIENCE};
use gantry_agent::pods::state::DRAIN_CAP;
use gantry_agent::runtime::ExecSession;
use gantry_agent::view::View;
use gantry_api::k8s_openapi::api::core::v1::{Node, Pod, PodStatus};
use gantry_api::proto;
use gantry_api::proto::backend::State as Backend;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::host;
use super::state::{Container, Event, Machine, S, State, trace, with};
use super::wire;

/// A task's pods run for so many seconds, by this annotation.
pub const RUNS_FOR: &str = "simulation/runs-for-s";
/// What the agent waits after it has programmed: a connection that was under way.
const SYN_IN_FLIGHT: Duration = Duration::from_millis(2);

/// Nobody looks into the pods.
struct Nobody;

#[tonic::async_trait]
impl TunnelTarget for Nobody {
    async fn logs(
        &self,
        _: proto::LogsRequest,
        _: PodUid,
    ) -> Result<BoxStream<'static, Result<Bytes, TunnelError>>, TunnelError> {
        Err(TunnelError("no logs are kept".into()))
    }

    async fn exec(&self, _: proto::ExecStart, _: PodUid) -> Result<ExecSession, TunnelError> {
        Err(TunnelError("nothing can be run".into()))
    }

    async fn forward(&self, _: u16, _: PodUid) -> Result<tokio::net::TcpStream, TunnelError> {
        Err(TunnelError("nothing listens".into()))
    }
}

/// Never returns in a process that has been killed.
async fn alive() {
    if host::is_killed() {
        std::future::pending::<()>().await;
    }
}

async fn some_time(low_ms: u64, high_ms: u64) {
    let ms = with(|state| state.choices.between(low_ms, high_ms));
    sleep(Duration::from_millis(ms)).await;
    alive().await;
}

fn node_object(node: usize) -> Node {
    let (name, boot) = with(|state| {
        let machine = &state.machines[node];
        (machine.name.clone(), machine.boot)
    });
    let room = json!({"cpu": "8", "memory": "16Gi", "pods": "110"});
    let object = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {
            "capacity": room, "allocatable": room,
            "addresses": [{"type": "InternalIP", "address": format!("192.168.0.{}", node + 10)}],
            "nodeInfo": {"bootID": format!("{name}-{boot}"), "architecture": "amd64",
                "containerRuntimeVersion": "none", "kernelVersion": "6", "kubeProxyVersion": "",
                "kubeletVersion": "v1", "machineID": name, "operatingSystem": "linux",
                "osImage": "none", "systemUUID": name},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    });
    serde_json::from_value(object).expect("a Node")
}

/// Starts the agent in the current runtime. False: its files cannot be used now.
pub fn start(node: usize) -> bool {
    let (name, dir) = with(|state| {
        let machine = &state.machines[node];
        (machine.name.clone(), machine.dir.clone())
    });
    let mut paths = Paths::standard(dir.join("bin"));
    (paths.lib, paths.run) = (dir.join("lib"), dir.join("run"));
    let (server, none) = ("http://127.0.0.1:1".to_owned(), Path::new("").to_owned());
    let mut config = feed::Config::new(server, none, name.clone(), &paths);
    config.linger = Duration::from_secs(30);
    config.dialer = Some(wire::dialer(node));
    let info = Arc::new(move || node_object(node));
    let handle = match feed::run(config, info, Arc::new(Nobody), CancellationToken::new()) {
        Ok(handle) => handle,
        Err(error) => {
            trace(format!("{name}: the agent cannot start: {error}"));
            return false;
        }
    };
    if host::is_killed() {
        return true;
    }
    let rev = handle.view.borrow().rev;
    with(|state| state.loaded(node, rev));
    let (view, link, reporter) = (handle.view, handle.link, handle.reporter);
    tokio::spawn(watch_views(
        node,
        view.clone(),
        link.clone(),
        reporter.clone(),
    ));
    let token = CancellationToken::new();
    let services = hold::services(&dir.join("run"), view.clone(), link.clone(), token);
    tokio::spawn(plane(node, services, reporter.clone()));
    tokio::spawn(pods(node, view, link, reporter));
    true
}

impl State {
    /// I4, over a start of the agent: what was acked is in the view that it begins with.
    fn loaded(&mut self, node: usize, rev: u64) {
        let machine = &self.machines[node];
        let name = machine.name.clone();
        if let Some((_, programmed)) = &machine.programmed
            && rev < *programmed
        {
            let text = format!("I4: {name} has acked {programmed} and comes back with {rev}");
            self.violated(text);
        }
        self.trace(&format!("{name}: agent starts at revision {rev}"));
    }
}

async fn watch_views(
    node: usize,
    mut view: watch::Receiver<Arc<View>>,
    link: watch::Receiver<Link>,
    reporter: Reporter,
) {
    let mut mismatches = 0;
    while view.changed().await.is_ok() {
        alive().await;
        let newest = view.borrow_and_update().clone();
        let is_live = matches!(&*link.borrow(), Link::Live { .. });
        let counters = reporter.counters();
        with(|state| {
            state.digest_mismatches += counters.digest_mismatches - mismatches;
            // One control plane serves at a time: what a live stream brings is of its history.
            let lineage = state.history.lineage().to_owned();
            state.machines[node].is_back |= is_live;
            state.published(node, lineage, &newest);
        });
        mismatches = counters.digest_mismatches;
    }
}

/// Programs every new view, one Service after the other, then says so.
async fn plane(node: usize, mut view: watch::Receiver<Arc<View>>, reporter: Reporter) {
    view.mark_changed();
    while view.changed().await.is_ok() {
        let newest = view.borrow_and_update().clone();
        if newest.rev == 0 {
            continue;
        }
        some_time(0, 3).await;
        if with(|state| state.choices.percent(4)) {
            some_time(50, 1_500).await; // a busy machine
        }
        let mut wanted = BTreeMap::new();
        for (name, backends) in newest.backends.iter() {
            let serving = backends
                .iter()
                .filter(|(_, b)| b.state() == Backend::Serving);
            let serving = serving.filter_map(|(_, b)| PodUid::new(&b.pod_uid).ok());
            let name = format!("{}/{}", name.namespace, name.name);
            wanted.insert(name, serving.collect::<BTreeSet<_>>());
        }
        let old = with(|state| state.machines[node].plane.clone());
        for name in old.keys().filter(|name| !wanted.contains_key(*name)) {
            with(|state| state.machines[node].plane.remove(name));
        }
        for (name, backends) in wanted {
            if old.get(&name) != Some(&backends) {
                some_time(0, 1).await;
                with(|state| state.program(node, name, backends));
            }
        }
        with(|state| {
            let lineage = state.history.lineage().to_owned();
            state.machines[node].programmed = Some((lineage, newest.rev));
        });
        sleep(SYN_IN_FLIGHT).await;
        alive().await;
        reporter.programmed(newest.rev, Vec::new());
    }
}

/// Gives each pod of the view its worker.
async fn pods(
    node: usize,
    view: watch::Receiver<Arc<View>>,
    link: watch::Receiver<Link>,
    reporter: Reporter,
) {
    let mut workers: BTreeMap<PodUid, watch::Sender<Option<Arc<Pod>>>> = BTreeMap::new();
    let running = with(|state| state.machines[node].containers.clone());
    let begin = |uid: &PodUid, pod: Option<Arc<Pod>>| {
        let (sender, receiver) = watch::channel(pod);
        let worker = Worker {
            node,
            uid: uid.clone(),
            pod: receiver,
            view: view.clone(),
            reporter: reporter.clone(),
        };
        tokio::spawn(worker.run());
        sender
    };
    let first = view.borrow().clone();
    for uid in running.keys() {
        workers.insert(uid.clone(), begin(uid, first.pods.get(uid).cloned()));
    }
    let mut hold = Hold::new(link, PATIENCE);
    let mut is_held = true;
    let mut views = view.clone();
    loop {
        let newest = views.borrow_and_update().clone();
        alive().await;
        for (uid, pod) in newest.pods.iter() {
            match workers.get(uid) {
                Some(worker) => drop(worker.send_replace(Some(pod.clone()))),
                None if is_held => {}
                None => drop(workers.insert(uid.clone(), begin(uid, Some(pod.clone())))),
            }
        }
        workers.retain(|uid, worker| {
            // A container that no view has had yet is decided about by the first commit.
            let is_there = newest.pods.contains_key(uid);
            if !is_there && !is_held {
                worker.send_replace(None);
            }
            is_there || is_held
        });
        tokio::select! {
            changed = views.changed() => if changed.is_err() { return },
            () = hold.over(), if is_held => is_held = false,
        }
    }
}

/// One pod on this node, from its first sight to its last word.
struct Worker {
    node: usize,
    uid: PodUid,
    pod: watch::Receiver<Option<Arc<Pod>>>,
    view: watch::Receiver<Arc<View>>,
    reporter: Reporter,
}

fn is_deleting(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

impl Worker {
    async fn run(mut self) {
        let container =
            |state: &mut State| state.machines[self.node].containers.get(&self.uid).cloned();
        let mut container = with(container);
        let first = self.pod.borrow_and_update().clone();
        if container.is_none() {
            let Some(pod) = first else { return };
            if let Some(last) = self.reporter.final_status(&self.uid) {
                return self.rest(&pod, last).await;
            }
            if is_deleting(&pod) || pod.status.as_ref().is_some_and(has_ended) {
                return self.never_began(&pod).await;
            }
            some_time(5, 60).await;
            container = Some(with(|state| {
                state.start_container(self.node, &self.uid, &pod)
            }));
        }
        let container = container.expect("it runs");
        let end = match container.exited {
            Some(_) => None,
            None => self.while_running(&container).await,
        };
        self.end(&container, end).await;
    }

    fn say(&self, container: &Container, status: &PodStatus, is_final: bool, released: bool) {
        let (namespace, name) = (&container.namespace, &container.name);
        self.reporter
            .status(&self.uid, namespace, name, status, is_final, released);
    }

    /// Returns the pod as it was when it had to end; none when the view has it no more.
    async fn while_running(&mut self, container: &Container) -> Option<Arc<Pod>> {
        let began = Instant::now();
        let mut last = None;
        loop {
            alive().await;
            let pod = self.pod.borrow_and_update().clone();
            if last.is_none() {
                self.say(container, &running(container), false, false);
            }
            let Some(pod) = pod else {
                if last.is_some() {
                    return None;
                }
                // Not in the view that the agent has begun with.
                self.pod.changed().await.ok()?;
                if self.pod.borrow().is_none() {
                    return None;
                }
                continue;
            };
            if is_deleting(&pod) {
                self.drain(&pod).await;
                return Some(pod);
            }
            let annotations = pod.metadata.annotations.as_ref();
            let life = annotations.and_then(|all| all.get(RUNS_FOR)?.parse().ok());
            let life: Option<u64> = life;
            last = Some(pod.clone());
            let over = async {
                match life {
                    Some(s) => tokio::time::sleep_until(began + Duration::from_secs(s)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.pod.changed() => if changed.is_err() { return std::future::pending().await },
                () = over => return Some(pod),
            }
        }
    }

    /// As the agent's drain: the view first, then the floor, a second at most.
    async fn drain(&mut self, pod: &Pod) {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let asked = timeout(DRAIN_CAP, async {
            let rev = loop {
                let newest = self.view.borrow_and_update().clone();
                match part_of(&newest, &namespace, &self.uid) {
                    None => return "no backend",
                    Some(part) if !part.is_serving => break newest.rev,
                    Some(_) if self.reporter.is_cut_off() => return "cut off",
                    Some(_) => {}
                }
                let _ = timeout(Duration::from_millis(100), self.view.changed()).await;
            };
            // The local flip comes first.
            while with(|state| !state.has_programmed(self.node, rev)) {
                sleep(Duration::from_millis(2)).await;
            }
            let mut answers = self.reporter.floor(rev);
            loop {
                let floor = answers.borrow_and_update().clone();
                match floor {
                    Some(floor) if floor.missing_count == 0 => return "acked",
                    None if self.reporter.is_cut_off() => return "cut off",
                    _ => {}
                }
                let _ = timeout(Duration::from_millis(100), answers.changed()).await;
            }
        });
        let how = asked.await.unwrap_or("capped");
        alive().await;
        with(|state| {
            *state.drained.entry(how).or_default() += 1;
            state.sigterm(self.node, &self.uid, how);
        });
    }

    /// The container's end, and the last word on it.
    async fn end(&mut self, container: &Container, pod: Option<Arc<Pod>>) {
        alive().await;
        if container.exited.is_none() {
            some_time(0, 300).await;
        }
        let code = container.exited.unwrap_or(0);
        with(|state| state.exited(self.node, &self.uid, code));
        let last = ended(container, code);
        let deleting = pod.as_deref().is_none_or(is_deleting) || self.is_deleting();
        self.say(container, &last, true, deleting);
        if with(|state| state.choices.percent(10)) {
            // A probe that was under way says what it has seen.
            some_time(0, 20).await;
            self.say(container, &running(container), false, false);
        }
        self.reporter.final_persisted(&self.uid).await;
        alive().await;
        with(|state| state.forgotten(self.node, &self.uid));
        let pod = self.pod.borrow().clone();
        if let Some(pod) = pod {
            self.rest(&pod, last).await;
        }
    }

    fn is_deleting(&self) -> bool {
        self.pod.borrow().as_deref().is_none_or(is_deleting)
    }

    /// Ended; when it is deleted, it may go.
    async fn rest(&mut self, pod: &Pod, last: PodStatus) {
        let container = container_of(pod, String::new());
        loop {
            alive().await;
            let released = self.is_deleting();
            self.say(&container, &last, true, released);
            if self.pod.changed().await.is_err() {
                return;
            }
        }
    }

    /// Deleted before anything was started.
    async fn never_began(&mut self, pod: &Pod) {
        alive().await;
        let container = container_of(pod, String::new());
        let last = match pod.status.clone().filter(has_ended) {
            Some(last) => last,
            None => ended(&container, 137),
        };
        self.rest(pod, last).await;
    }
}

pub fn has_ended(status: &PodStatus) -> bool {
    matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
}

fn container_of(pod: &Pod, address: String) -> Container {
    Container {
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        name: pod.metadata.name.clone().unwrap_or_default(),
        address,
        exited: None,
    }
}

fn status(value: serde_json::Value) -> PodStatus {
    serde_json::from_value(value).expect("a PodStatus")
}

fn running(container: &Container) -> PodStatus {
    status(json!({
        "phase": "Running", "podIP": container.address, "podIPs": [{"ip": container.address}],
        "conditions": [{"type": "Ready", "status": "True"},
            {"type": "ContainersReady", "status": "True"}, {"type": "Initialized", "status": "True"}],
    }))
}

fn ended(container: &Container, code: i32) -> PodStatus {
    let phase = if code == 0 { "Succeeded" } else { "Failed" };
    status(json!({
        "phase": phase, "podIP": container.address, "podIPs": [{"ip": container.address}],
        "conditions": [{"type": "Ready", "status": "False"}],
        "containerStatuses": [{"name": "c", "image": "x", "imageID": "x", "ready": false,
            "restartCount": 0, "state": {"terminated": {"exitCode": code}}}],
    }))
}

impl State {
    fn has_programmed(&self, node: usize, rev: u64) -> bool {
        let programmed = self.machines[node].programmed.as_ref();
        programmed.is_some_and(|(_, programmed)| *programmed >= rev)
    }

    /// I3.
    fn start_container(&mut self, node: usize, uid: &PodUid, pod: &Pod) -> Container {
        let name = pod.metadata.name.clone().unwrap_or_default();
        let on = self.machines[node].name.clone();
        for other in 0..self.machines.len() {
            let machine = &self.machines[other];
            let runs = machine
                .containers
                .get(uid)
                .is_some_and(|c| c.exited.is_none());
            if other != node && runs {
                let text = format!(
                    "I3: {name} ({uid}) starts on {on} and runs on {}",
                    machine.name
                );
                self.violated(text);
            }
        }
        // Who was silent through the hold after a restore could not say what has ended there.
        let has_spoken = |machine: &Machine| {
            let seen = machine.seen.as_ref();
            seen.is_some_and(|(lineage, _)| lineage == self.history.lineage())
        };
        let mut machines = self.machines.iter().enumerate();
        let knows = |(number, machine): (usize, &Machine)| {
            machine.ended.contains(uid) && (number == node || has_spoken(machine))
        };
        if machines.any(knows) {
            self.violated(format!(
                "I3: {name} ({uid}) starts on {on} after it has ended"
            ));
        }
        let machine = &mut self.machines[node];
        machine.addresses += 1;
        let address = format!("10.{}.{}.{}", 100 + node, machine.boot, machine.addresses);
        let container = container_of(pod, address);
        machine.containers.insert(uid.clone(), container.clone());
        self.started.entry(uid.clone()).or_default().insert(node);
        self.trace(&format!("{on}: {name} starts ({uid})"));
        container
    }

    /// I1, from when a pod was ended by floor on: nobody begins to send to it once more.
    fn program(&mut self, node: usize, service: String, backends: BTreeSet<PodUid>) {
        let machine = &mut self.machines[node];
        let name = machine.name.clone();
        // Off or alone for so long that it was given up, or would have been by a control plane.
        let is_excused = !machine.is_back && host::now_ns() > machine.stopped_at + 40 * S;
        let ended = backends.intersection(&self.ended_by_floor).next().cloned();
        machine.plane.insert(service, backends);
        let is_dead = self.history.is_dead(&name, self.history.head());
        if let Some(uid) = ended.filter(|_| !is_excused && !is_dead) {
            self.violated(format!(
                "I1: {name} sends to {uid}, which was ended by floor"
            ));
        }
    }

    /// I1.
    fn sigterm(&mut self, node: usize, uid: &PodUid, how: &str) {
        let owner = self.machines[node].name.clone();
        self.trace(&format!("{owner}: SIGTERM to {uid}: {how}"));
        if how != "acked" {
            return;
        }
        self.ended_by_floor.insert(uid.clone());
        for (other, pause) in std::mem::take(&mut self.reboots_at_floor) {
            match other == node {
                true => drop(self.reboots_at_floor.insert(other, pause)),
                false => self.after(0, Event::LosesPower(other, pause)),
            }
        }
        for other in 0..self.machines.len() {
            let machine = &self.machines[other];
            let sends = machine
                .plane
                .iter()
                .find(|(_, serving)| serving.contains(uid));
            let Some((service, _)) = sends else { continue };
            let is_dead = self.history.is_dead(&machine.name, self.history.head());
            if !is_dead {
                let text = format!(
                    "I1: {owner} ends {uid} by floor, and {} sends to it for {service}",
                    machine.name
                );
                self.violated(text);
            }
        }
    }

    fn exited(&mut self, node: usize, uid: &PodUid, code: i32) {
        let machine = &mut self.machines[node];
        if let Some(container) = machine.containers.get_mut(uid) {
            container.exited = Some(code);
        }
    }

    /// The last trace goes, the last word is on the disk.
    fn forgotten(&mut self, node: usize, uid: &PodUid) {
        let machine = &mut self.machines[node];
        if let Some(container) = machine.containers.remove(uid) {
            machine.ended.insert(uid.clone());
            if std::mem::take(&mut self.dies_at_end) {
                host::kill_after_operations(Some(1));
            }
            let text = format!("{}: {} has ended ({uid})", machine.name, container.name);
            self.trace(&text);
        }
    }
}

/// The machine stops: what is not on its disk is gone.
pub fn stop_machine(node: usize) {
    let dir = with(|state| {
        let machine = &mut state.machines[node];
        machine.boot += 1;
        machine.containers.clear();
        machine.plane.clear();
        (machine.programmed, machine.is_back, machine.seen) = (None, false, None);
        machine.stopped_at = host::now_ns();
        machine.dir.clone()
    });
    let _ = std::fs::remove_dir_all(dir.join("run"));
    with(|state| {
        host::cut_power(&dir.join("lib"), |sectors| {
            match state.choices.between(0, 2) {
                0 => 0,
                1 => sectors,
                _ => state.choices.between(0, sectors as u64) as usize,
            }
        });
    });
}
