//! The resolver under SIGKILL: in a network namespace of its own, a process that serves names is
//! killed again and again while clients ask. No query may be refused, and none lost; a client of TCP
//! may have to connect once more.
//!
//! The process is this test program, started again with an environment variable. Needs root and the
//! built `gantry-shim`; says `skipped` otherwise.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test reports by panicking")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use gantry_agent::dns::{self, HoldConfig, Resolver, ResolverConfig, Upstreams};
use gantry_agent::view::{ServiceName, Settings, View};
use gantry_api::proto;
use hickory_proto::op::{Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use imbl::OrdMap;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Where the served process finds its holder.
const DIRECTORY: &str = "GANTRY_TEST_RESOLVER";
const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(169, 254, 20, 10)), 53);
const UPSTREAM: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5300);
/// What upstream needs for an answer: so that most kills find a question waiting for it.
const UPSTREAM_DELAY: Duration = Duration::from_millis(30);
const KILL_COUNT: u64 = 25;
/// Longer than any absence here: an answer that takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(20);

fn bin() -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    Some(own.parent()?.parent()?.to_owned())
}

fn hold(directory: &Path) -> HoldConfig {
    HoldConfig {
        directory: directory.join("resolver"),
        shim: bin().unwrap().join("gantry-shim"),
    }
}

fn view() -> Arc<View> {
    let name = ServiceName {
        namespace: "shop".into(),
        name: "web".into(),
    };
    let service = proto::Service {
        cluster_ips: vec![bytes::Bytes::copy_from_slice(&[10, 96, 0, 7])],
        ..proto::Service::default()
    };
    Arc::new(View {
        rev: 1,
        services: Arc::new(OrdMap::unit(name, Arc::new(service))),
        settings: Arc::new(Settings {
            cluster_domain: "cluster.local".into(),
            ..Settings::default()
        }),
        ..View::default()
    })
}

/// Not a test but the process under test: serves until it is killed.
#[test]
fn the_process_that_is_killed() {
    let Some(directory) = std::env::var_os(DIRECTORY) else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let config = ResolverConfig {
            upstreams: Upstreams::Fixed(vec![UPSTREAM]),
            node_resolv_conf: String::new,
            ..ResolverConfig::standard(hold(Path::new(&directory)))
        };
        // Before the view is known, as after a start.
        let (known, view_of) = watch::channel(Arc::default());
        let resolver = Resolver::start(config, view_of, CancellationToken::new()).await;
        let _resolver = resolver.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        known.send_replace(view());
        std::future::pending::<()>().await;
    });
}

fn serve(directory: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "the_process_that_is_killed"]);
    command.stdout(std::process::Stdio::null());
    command.env(DIRECTORY, directory).spawn().unwrap()
}

/// Answers every question after a while, from a thread per question.
fn upstream() {
    let socket = Arc::new(UdpSocket::bind(UPSTREAM).unwrap());
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        loop {
            let (size, client) = socket.recv_from(&mut buffer).unwrap();
            let asked = Message::from_vec(&buffer[..size]).unwrap();
            let socket = socket.clone();
            std::thread::spawn(move || {
                std::thread::sleep(UPSTREAM_DELAY);
                let mut answer = Message::response(asked.metadata.id, OpCode::Query);
                answer.queries.clone_from(&asked.queries);
                let data = RData::A(A(Ipv4Addr::new(192, 0, 2, 1)));
                let name = asked.queries[0].name().clone();
                answer.add_answer(Record::from_rdata(name, 60, data));
                socket.send_to(&answer.to_vec().unwrap(), client).unwrap();
            });
        }
    });
}

fn question(name: &str) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message
}

fn is_answered(asked: &Message, bytes: &[u8]) -> bool {
    Message::from_vec(bytes).is_ok_and(|answer| {
        answer.metadata.id == asked.metadata.id
            && answer.metadata.response_code == ResponseCode::NoError
            && !answer.answers.is_empty()
    })
}

/// One query, sent once; the words say how it failed.
fn ask_udp(name: &str) -> Result<(), String> {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|e| e.to_string())?;
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let connected = socket.connect(SERVER);
    connected.map_err(|e| format!("{name}: connect: {e}"))?;
    let asked = question(name);
    let sent = socket.send(&asked.to_vec().unwrap());
    sent.map_err(|e| format!("{name}: send: {e}"))?;
    let mut buffer = [0; 2048];
    let size = socket.recv(&mut buffer);
    let size = size.map_err(|e| format!("{name}: {e}"))?;
    match is_answered(&asked, &buffer[..size]) {
        true => Ok(()),
        false => Err(format!("{name}: {:?}", Message::from_vec(&buffer[..size]))),
    }
}

/// As glibc does, once more after a reset: a connection that was accepted microseconds before the
/// kill is nobody's.
fn ask_tcp(name: &str) -> Result<(), String> {
    match try_tcp(name) {
        Err(words) if words.contains("reset by peer") => try_tcp(name),
        other => other,
    }
}

fn try_tcp(name: &str) -> Result<(), String> {
    let failed = |what: &'static str| move |e: std::io::Error| format!("{what}: {e}");
    let mut stream = TcpStream::connect(SERVER).map_err(failed("connect"))?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let asked = question(name);
    let bytes = asked.to_vec().unwrap();
    // In two parts and twice: what is half there, and what follows, survives as well.
    let mut framed = (bytes.len() as u16).to_be_bytes().to_vec();
    framed.extend_from_slice(&bytes);
    let (first, second) = framed.split_at(9);
    stream.write_all(first).map_err(failed("write"))?;
    std::thread::sleep(Duration::from_millis(3));
    stream.write_all(second).map_err(failed("write"))?;
    stream.write_all(&framed).map_err(failed("write"))?;
    for _ in 0..2 {
        let mut size = [0; 2];
        stream.read_exact(&mut size).map_err(failed("read"))?;
        let mut answer = vec![0; usize::from(u16::from_be_bytes(size))];
        stream.read_exact(&mut answer).map_err(failed("read"))?;
        if !is_answered(&asked, &answer) {
            return Err(format!("{name}: {:?}", Message::from_vec(&answer)));
        }
    }
    Ok(())
}

fn holder_pid(directory: &Path) -> Option<i32> {
    let directory = directory.join("resolver");
    std::fs::read_dir("/proc")
        .ok()?
        .flatten()
        .find_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            let cwd = std::fs::read_link(entry.path().join("cwd")).ok()?;
            (name.trim() == "gantry-shim" && cwd == directory).then_some(pid)
        })
}

/// Whether a process has both sockets open that listen at port 53 of this thread's namespace.
fn has_both(pid: i32) -> bool {
    let mut listening = Vec::new();
    for (table, state) in [("udp", "07"), ("tcp", "0A")] {
        let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}"));
        let text = text.unwrap_or_default();
        let rows = text.lines().map(|line| line.split_whitespace().collect());
        let found = rows.filter(|row: &Vec<&str>| {
            row.get(1).is_some_and(|local| local.ends_with(":0035")) && row[3] == state
        });
        listening.extend(found.map(|row| format!("socket:[{}]", row[9])));
    }
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd"));
    let links = fds.into_iter().flatten().flatten();
    let links: Vec<_> = links
        .filter_map(|fd| Some(std::fs::read_link(fd.path()).ok()?.display().to_string()))
        .collect();
    listening.len() == 2 && listening.iter().all(|socket| links.contains(socket))
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Small random numbers from a seed that is printed: a failure can be had again.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

struct Tally {
    asked: AtomicUsize,
    failures: std::sync::Mutex<Vec<String>>,
    stop: AtomicBool,
}

/// Asks until told to stop.
fn client(tally: Arc<Tally>, number: usize, ask: fn(&str) -> Result<(), String>, external: bool) {
    let mut count = 0;
    while !tally.stop.load(Ordering::Relaxed) {
        count += 1;
        let name = match external {
            true => format!("n{count}.c{number}.example.org."),
            false => "web.shop.svc.cluster.local.".to_owned(),
        };
        tally.asked.fetch_add(1, Ordering::Relaxed);
        if let Err(words) = ask(&name) {
            tally.failures.lock().unwrap().push(words);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn no_query_is_refused_or_lost_while_the_resolver_is_killed() {
    let missing = if !nix::unistd::geteuid().is_root() {
        Some("network namespaces need root".to_owned())
    } else {
        let shim = bin().unwrap().join("gantry-shim");
        (!shim.exists()).then(|| format!("needs {} (cargo build --workspace)", shim.display()))
    };
    if let Some(reason) = missing {
        return eprintln!("skipped: {reason}");
    }
    // A thread of its own: what it starts is in its network namespace, and nobody else is.
    let node = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        under_kills();
    });
    node.join().unwrap();
}

fn under_kills() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut dice = Dice(seed);
    let mut resolver = serve(path);
    let begun = Instant::now();
    // The first start makes the address and the sockets: only then can anything be promised.
    while ask_udp("web.shop.svc.cluster.local.").is_err() {
        assert!(begun.elapsed() < PATIENCE, "it does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    upstream();
    let tally = Arc::new(Tally {
        asked: AtomicUsize::new(0),
        failures: std::sync::Mutex::default(),
        stop: AtomicBool::new(false),
    });
    type Ask = fn(&str) -> Result<(), String>;
    let kinds: [(Ask, bool); 6] = [
        (ask_udp, false),
        (ask_udp, false),
        (ask_udp, true),
        (ask_udp, true),
        (ask_tcp, false),
        (ask_tcp, true),
    ];
    let clients: Vec<_> = kinds
        .into_iter()
        .enumerate()
        .map(|(number, (ask, external))| {
            let tally = tally.clone();
            std::thread::spawn(move || client(tally, number, ask, external))
        })
        .collect();
    for round in 0..KILL_COUNT {
        std::thread::sleep(Duration::from_millis(50 + dice.below(150)));
        if round % 5 == 4 {
            // The holder alone: the resolver has the sockets too, and makes another holder. Not
            // before it has started, nor is it killed before the other has been told: then there
            // would be nobody.
            let own = i32::try_from(resolver.id()).unwrap();
            wait_until("it does not start", || has_both(own));
            let old = holder_pid(path).unwrap();
            kill(Pid::from_raw(old), Signal::SIGKILL).unwrap();
            wait_until("no holder comes back", || {
                holder_pid(path).is_some_and(|new| new != old && has_both(new))
            });
            // Connections are told after the two that listen.
            std::thread::sleep(Duration::from_millis(100));
        }
        resolver.kill().unwrap();
        resolver.wait().unwrap();
        std::thread::sleep(Duration::from_millis(dice.below(400)));
        resolver = serve(path);
    }
    std::thread::sleep(Duration::from_millis(300));
    tally.stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.join().unwrap();
    }
    resolver.kill().unwrap();
    resolver.wait().unwrap();
    // With nobody there, names are answered all the same, and at once.
    for name in ["web.shop.svc.cluster.local.", "later.example.org."] {
        let begun = Instant::now();
        ask_udp(name).unwrap();
        assert!(
            begun.elapsed() < Duration::from_secs(1),
            "{name}: {:?}",
            begun.elapsed()
        );
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(dns::end_holder(&hold(path))).unwrap();
    assert_eq!(holder_pid(path), None, "the holder does not end");
    // Shared with other tests; it stays while their shims are in it.
    runtime.block_on(async {
        let paths = gantry_agent::paths::Paths::standard(bin().unwrap());
        let shims = gantry_agent::runtime::shim::ShimRuntime::new(paths);
        let removed = shims.remove_shim_cgroup();
        let _ = tokio::time::timeout(Duration::from_millis(200), removed).await;
    });
    let failures = tally.failures.lock().unwrap();
    let asked = tally.asked.load(Ordering::Relaxed);
    println!(
        "{asked} questions under {KILL_COUNT} kills, {} failed",
        failures.len()
    );
    assert!(asked > 300, "only {asked} questions");
    assert!(
        failures.is_empty(),
        "{} of {asked}: {failures:#?}",
        failures.len()
    );
}
