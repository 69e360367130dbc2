//! Three `gantry-control` processes over three real etcd servers, killed and stopped under load; what clients
//! were told and saw is checked afterwards: nothing acknowledged is lost, no event is lost, doubled or reordered.
//!
//! Everything is on loopback and in a directory of its own; nothing of a cluster is touched.

#![allow(clippy::unwrap_used, reason = "a test's panic is its error report")]

use std::collections::BTreeMap;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gantry_api::proto::objects_client::ObjectsClient;
use gantry_api::proto::watch_event::Type;
use gantry_api::proto::{ListRequest, ObjectKey, WatchRequest, WriteRequest};
use gantry_control::pki::{Authority, Credentials};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

const COUNT: usize = 3;
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// What a start may take on a busy machine.
const START: Duration = Duration::from_secs(60);

fn etcd() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).chain(["/usr/bin".into()]);
    places.find_map(|place| Some(place.join("etcd")).filter(|file| file.is_file()))
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// A process that ends with this.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().try_into().unwrap()), signal).unwrap();
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    fn wait(&mut self, limit: Duration) -> std::process::ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < limit, "it did not end in {limit:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Machines {
    dir: tempfile::TempDir,
    bin: PathBuf,
    etcd: PathBuf,
    /// Clients' and peers'.
    etcd_ports: Vec<(u16, u16)>,
    ports: Vec<u16>,
    servers: Vec<Option<Process>>,
    controls: Vec<Option<Process>>,
    /// Starts of each control plane: one log each.
    starts: Vec<usize>,
}

impl Machines {
    /// None, with the reason on stderr, where it cannot run.
    async fn start() -> Option<Machines> {
        let Some(bin) = std::env::var_os("GANTRY_BIN").map(PathBuf::from) else {
            eprintln!("skipped: replicas: needs GANTRY_BIN, which `cargo xtask test` sets");
            return None;
        };
        let Some(etcd) = etcd() else {
            eprintln!("skipped: replicas: etcd is not installed (Debian: etcd-server)");
            return None;
        };
        let mut machines = Machines {
            dir: tempfile::tempdir().unwrap(),
            bin,
            etcd,
            etcd_ports: (0..COUNT).map(|_| (free_port(), free_port())).collect(),
            ports: (0..COUNT).map(|_| free_port()).collect(),
            servers: (0..COUNT).map(|_| None).collect(),
            controls: (0..COUNT).map(|_| None).collect(),
            starts: vec![0; COUNT],
        };
        for index in 0..COUNT {
            machines.run_etcd(index);
        }
        machines.run(0);
        machines.serves(0).await;
        for index in 1..COUNT {
            let to = machines.data(index).join("pki");
            std::fs::create_dir_all(&to).unwrap();
            for entry in std::fs::read_dir(machines.data(0).join("pki")).unwrap() {
                let path = entry.unwrap().path();
                std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
            }
            machines.run(index);
        }
        for index in 1..COUNT {
            machines.serves(index).await;
        }
        Some(machines)
    }

    fn data(&self, index: usize) -> PathBuf {
        self.dir.path().join(format!("{index}/data"))
    }

    fn run_etcd(&mut self, index: usize) {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let peer = |index: usize| url(self.etcd_ports[index].1);
        let all: Vec<String> = (0..COUNT).map(|i| format!("m{i}={}", peer(i))).collect();
        let client = url(self.etcd_ports[index].0);
        let child = Command::new(&self.etcd)
            .args(["--name", &format!("m{index}")])
            .arg("--data-dir")
            .arg(self.dir.path().join(format!("etcd-{index}")))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer(index)])
            .args(["--initial-advertise-peer-urls", &peer(index)])
            .args(["--initial-cluster", &all.join(",")])
            .args(["--initial-cluster-state", "new", "--logger", "zap"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.servers[index] = Some(Process(child));
    }

    fn run(&mut self, index: usize) {
        let places = self
            .etcd_ports
            .iter()
            .map(|(port, _)| format!("127.0.0.1:{port}"));
        let store = format!("etcd://{}", places.collect::<Vec<_>>().join(","));
        self.starts[index] += 1;
        std::fs::create_dir_all(self.data(index)).unwrap();
        let log = File::create(self.log(index)).unwrap();
        let child = Command::new(self.bin.join("gantry-control"))
            .args(["--store", &store])
            .arg("--data-dir")
            .arg(self.data(index))
            .arg("--kubeconfig")
            .arg(self.dir.path().join(format!("{index}/kubeconfig")))
            .args(["--listen", &format!("127.0.0.1:{}", self.ports[index])])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.controls[index] = Some(Process(child));
    }

    fn log(&self, index: usize) -> PathBuf {
        let start = self.starts[index];
        self.dir.path().join(format!("{index}/log-{start}"))
    }

    async fn serves(&self, index: usize) {
        let began = Instant::now();
        let place = format!("127.0.0.1:{}", self.ports[index]);
        while tokio::net::TcpStream::connect(&place).await.is_err() {
            let log = std::fs::read_to_string(self.log(index)).unwrap_or_default();
            assert!(began.elapsed() < START, "{index} does not serve: {log}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn ended(&mut self, index: usize) -> Option<std::process::ExitStatus> {
        self.controls[index].as_mut()?.0.try_wait().unwrap()
    }

    fn last_words(&self, index: usize) -> String {
        let log = std::fs::read_to_string(self.log(index)).unwrap_or_default();
        let lines = log.lines().filter(|line| line.contains("ERROR"));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// The one that leads: who does not any more ends.
    async fn leader(&self) -> usize {
        let began = Instant::now();
        loop {
            for index in 0..COUNT {
                let log = std::fs::read_to_string(self.log(index)).unwrap_or_default();
                if self.controls[index].is_some() && log.contains("this control plane leads") {
                    return index;
                }
            }
            assert!(began.elapsed() < START, "nobody leads");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn clients(&self) -> Clients {
        let authority = Authority::open(&self.data(0)).unwrap();
        Clients {
            ca: authority.certificate().to_owned(),
            credentials: authority.client("tester", "system:masters", 1).unwrap(),
            ports: self.ports.clone(),
        }
    }
}

#[derive(Clone)]
struct Clients {
    ca: String,
    credentials: Credentials,
    ports: Vec<u16>,
}

impl Clients {
    async fn connect(&self, index: usize) -> Result<ObjectsClient<Channel>, String> {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.ca))
            .identity(Identity::from_pem(
                &self.credentials.certificate,
                &self.credentials.key,
            ));
        let url = format!("https://127.0.0.1:{}", self.ports[index % COUNT]);
        let endpoint = Endpoint::from_shared(url).unwrap().tls_config(tls).unwrap();
        let connecting = tokio::time::timeout(Duration::from_millis(500), endpoint.connect());
        let channel = connecting.await.map_err(|_| "no answer".to_owned())?;
        Ok(ObjectsClient::new(channel.map_err(|e| e.to_string())?))
    }
}

fn config_maps() -> Option<ObjectKey> {
    Some(ObjectKey {
        plural: "configmaps".to_owned(),
        namespace: "default".to_owned(),
        ..ObjectKey::default()
    })
}

fn version(object: &Value) -> u64 {
    let text = object["metadata"]["resourceVersion"].as_str().unwrap();
    text.parse().unwrap()
}

fn name(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap().to_owned()
}

#[derive(Default)]
struct Told {
    acknowledged: BTreeMap<String, u64>,
    times: Vec<Instant>,
    unknown: usize,
}

/// Creates objects that nobody else creates, at one control plane after the other as they fail.
async fn write(clients: Clients, writer: usize, told: Arc<Mutex<Told>>, stop: CancellationToken) {
    let mut at = writer;
    let mut client = None;
    for n in 0.. {
        if stop.is_cancelled() {
            return;
        }
        let Some(open) = &mut client else {
            client = clients.connect(at).await.ok();
            if client.is_none() {
                at += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            continue;
        };
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": format!("w-{writer}-{n}"), "namespace": "default"}});
        let request = WriteRequest {
            key: config_maps(),
            json: object.to_string().into(),
            ..WriteRequest::default()
        };
        let answer = tokio::time::timeout(Duration::from_secs(1), open.create(request)).await;
        let mut told = told.lock().unwrap();
        match answer {
            Ok(Ok(reply)) => {
                let object: Value = serde_json::from_slice(&reply.into_inner().json).unwrap();
                told.acknowledged.insert(name(&object), version(&object));
                told.times.push(Instant::now());
            }
            // Its fate is unknown, and nobody writes it again.
            _ => {
                told.unknown += 1;
                client = None;
                at += 1;
            }
        }
    }
}

/// Watches from `after` on, going on at another control plane whenever one fails.
async fn watch(
    clients: Clients,
    first: usize,
    mut after: u64,
    stop: CancellationToken,
) -> Vec<(u64, String)> {
    let (mut seen, mut at) = (Vec::new(), first);
    while !stop.is_cancelled() {
        let Ok(mut client) = clients.connect(at).await else {
            at += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let request = WatchRequest {
            key: config_maps(),
            resource_version: after.to_string(),
            ..WatchRequest::default()
        };
        let opened = tokio::time::timeout(Duration::from_secs(3), client.watch(request)).await;
        let mut events = match opened {
            Ok(Ok(events)) => events.into_inner(),
            Ok(Err(status)) if status.code() == tonic::Code::OutOfRange => {
                panic!("{status}: the watch cannot go on at {at}")
            }
            _ => {
                at += 1;
                continue;
            }
        };
        loop {
            // Nothing for a while: it may be one that is stopped.
            let next = tokio::time::timeout(Duration::from_secs(2), events.message());
            let event = match stop.run_until_cancelled(next).await {
                Some(Ok(Ok(Some(event)))) => event,
                None => return seen,
                Some(other) => {
                    if let Ok(Err(status)) = other {
                        let text = status.message();
                        assert!(
                            !text.contains("too old"),
                            "the watch cannot go on at {at}: {text}"
                        );
                    }
                    at += 1;
                    break;
                }
            };
            after = event.resource_version.parse().unwrap();
            match event.r#type() {
                Type::Bookmark => {}
                Type::Added => {
                    let object: Value = serde_json::from_slice(&event.json).unwrap();
                    seen.push((after, name(&object)));
                }
                _ => {}
            }
        }
    }
    seen
}

struct Load {
    told: Arc<Mutex<Told>>,
    writers: Vec<JoinHandle<()>>,
    watches: Vec<JoinHandle<Vec<(u64, String)>>>,
    no_more_writes: CancellationToken,
    seen_all: CancellationToken,
}

impl Load {
    async fn start(clients: &Clients) -> Load {
        let mut load = Load {
            told: Arc::default(),
            writers: Vec::new(),
            watches: Vec::new(),
            no_more_writes: CancellationToken::new(),
            seen_all: CancellationToken::new(),
        };
        let request = ListRequest {
            key: config_maps(),
            ..ListRequest::default()
        };
        let list = clients.connect(0).await.unwrap().list(request).await;
        let began = list.unwrap().into_inner().resource_version.parse().unwrap();
        for index in 0..COUNT {
            let stop = load.seen_all.clone();
            let watching = watch(clients.clone(), index, began, stop);
            load.watches.push(tokio::spawn(watching));
        }
        for writer in 0..COUNT {
            let stop = load.no_more_writes.clone();
            let writing = write(clients.clone(), writer, load.told.clone(), stop);
            load.writers.push(tokio::spawn(writing));
        }
        load
    }

    /// How long nobody could write after `began`; half a second of it does not count, for what was under way.
    async fn pause(&self, what: &str, began: Instant) {
        let late = began + Duration::from_millis(500);
        for _ in 0..300 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let first = {
                let told = self.told.lock().unwrap();
                told.times.iter().find(|at| **at > late).copied()
            };
            if let Some(first) = first {
                let pause = first - began;
                eprintln!("{what}: a write was taken again after {pause:?}");
                return assert!(pause <= PAUSE_MAX, "{what}: no write for {pause:?}");
            }
        }
        panic!("{what}: no write was taken any more");
    }

    async fn check(self, clients: &Clients) {
        self.no_more_writes.cancel();
        for writer in self.writers {
            writer.await.unwrap();
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        self.seen_all.cancel();
        // Everybody who tells has ended.
        let told = std::mem::take(&mut *self.told.lock().unwrap());
        eprintln!(
            "{} writes, {} of unknown fate",
            told.acknowledged.len(),
            told.unknown
        );
        assert!(told.acknowledged.len() > 100);
        let mut histories = Vec::new();
        for watch in self.watches {
            histories.push(watch.await.unwrap());
        }
        for history in &histories {
            let is_ordered = history.windows(2).all(|pair| pair[0].0 < pair[1].0);
            assert!(is_ordered, "an event is doubled or out of order");
            let seen: BTreeMap<&str, u64> = history.iter().map(|(at, n)| (&**n, *at)).collect();
            assert_eq!(seen.len(), history.len(), "an object appeared twice");
            for (name, at) in &told.acknowledged {
                assert_eq!(seen.get(&**name), Some(at), "the event of {name} is lost");
            }
            assert_eq!(history, &histories[0]);
        }
        for index in 0..COUNT {
            let request = ListRequest {
                key: config_maps(),
                ..ListRequest::default()
            };
            let list = clients.connect(index).await.unwrap().list(request).await;
            let list = list.unwrap().into_inner();
            let objects = list
                .items
                .iter()
                .map(|json| serde_json::from_slice(json).unwrap());
            let now: BTreeMap<String, u64> = objects
                .map(|object: Value| (name(&object), version(&object)))
                .collect();
            for (name, at) in &told.acknowledged {
                assert_eq!(now.get(name), Some(at), "{name} is lost at {index}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_or_stopping_one_of_three_loses_nothing_and_writes_go_on() {
    let Some(mut machines) = Machines::start().await else {
        return;
    };
    let clients = machines.clients();
    let load = Load::start(&clients).await;
    tokio::time::sleep(Duration::from_secs(1)).await;

    // The leader of ours dies.
    let leader = machines.leader().await;
    machines.controls[leader].take().unwrap().kill();
    load.pause("the leader killed", Instant::now()).await;
    machines.run(leader);
    machines.serves(leader).await;

    // It sleeps until another one leads, and ends when it wakes up.
    let leader = machines.leader().await;
    machines.controls[leader]
        .as_ref()
        .unwrap()
        .signal(Signal::SIGSTOP);
    load.pause("the leader stopped", Instant::now()).await;
    let mut asleep = machines.controls[leader].take().unwrap();
    machines.leader().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    asleep.signal(Signal::SIGCONT);
    let status = asleep.wait(START);
    eprintln!("who slept ended: {status}");
    machines.run(leader);
    machines.serves(leader).await;

    // One that follows dies.
    let leader = machines.leader().await;
    let follower = (leader + 1) % COUNT;
    machines.controls[follower].take().unwrap().kill();
    load.pause("a follower killed", Instant::now()).await;
    machines.run(follower);
    machines.serves(follower).await;

    // Each server of etcd dies, and sleeps.
    for index in 0..COUNT {
        machines.servers[index].take().unwrap().kill();
        load.pause(&format!("server {index} of etcd killed"), Instant::now())
            .await;
        machines.run_etcd(index);
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    machines.servers[0]
        .as_ref()
        .unwrap()
        .signal(Signal::SIGSTOP);
    load.pause("server 0 of etcd stopped", Instant::now()).await;
    machines.servers[0]
        .as_ref()
        .unwrap()
        .signal(Signal::SIGCONT);
    // An etcd leader that wakes up may end leases that it holds for expired (etcd issue 15247): then ours ends
    // as well, and is started again as the service manager would.
    let awake = Instant::now();
    tokio::time::sleep(Duration::from_secs(2)).await;
    for index in 0..COUNT {
        if let Some(status) = machines.ended(index) {
            eprintln!("{index} ended: {status}: {}", machines.last_words(index));
            machines.run(index);
            machines.serves(index).await;
        }
    }
    load.pause("server 0 of etcd awake", awake).await;
    load.check(&clients).await;

    // The command line goes to the first that answers.
    machines.controls[0].take().unwrap().kill();
    let kubeconfig = machines.dir.path().join("1/kubeconfig");
    let text = std::fs::read_to_string(&kubeconfig).unwrap();
    let url = |index: usize| format!("https://127.0.0.1:{}", machines.ports[index]);
    let text = text.replace(&url(1), &format!("{},{}", url(0), url(1)));
    std::fs::write(&kubeconfig, text).unwrap();
    assert!(gantry(&machines.bin, &kubeconfig).contains("kube-system"));
}

fn gantry(bin: &Path, kubeconfig: &Path) -> String {
    let output = Command::new(bin.join("gantry"))
        .arg("--kubeconfig")
        .arg(kubeconfig)
        .args(["get", "namespaces"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}
