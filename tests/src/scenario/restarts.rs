//! The agent is killed and started again, at every phase of its start, while clients on the host and in
//! a pod open connections through a Service as fast as the machine lets them: none is refused, reset
//! or lost, and one that stays open stays open.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{MAIN_JOB, get};
use crate::cluster::Cluster;

/// Kills, unless `GANTRY_RESTARTS` says another number (100 on a night of its own).
const COUNT: u32 = 12;
/// An agent lives for as long as its number of these: some die while they load their programs.
const LIFE: Duration = Duration::from_millis(150);
/// After so many lives it begins again with the shortest.
const LIVES: u32 = 9;
/// Clients on the host, each with a connection every four milliseconds: 1,000 a second.
const CLIENT_COUNT: u32 = 4;
const EVERY: Duration = Duration::from_millis(4);
/// Between two requests on the connection that stays open.
const KEEP_ALIVE: Duration = Duration::from_millis(200);

/// What the clients on the host have seen.
#[derive(Default)]
struct Seen {
    answered: AtomicU64,
    kept: AtomicU64,
    errors: Mutex<Vec<String>>,
    over: AtomicBool,
}

impl Seen {
    fn note(&self, what: &str, error: &anyhow::Error) {
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        errors.push(format!("{what}: {error:#}"));
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn connect_again_and_again(&self, address: SocketAddr) {
        let mut next = Instant::now();
        while !self.is_over() {
            match get(address) {
                Ok(_) => {
                    self.answered.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => self.note("a new connection", &error),
            }
            next += EVERY;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }

    fn keep_open(&self, address: SocketAddr) {
        let mut stream = None;
        while !self.is_over() {
            match ask_on(&mut stream, address) {
                Ok(()) => {
                    self.kept.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => self.note("the open connection", &error),
            }
            std::thread::sleep(KEEP_ALIVE);
        }
    }
}

/// One request on a connection that is made once.
fn ask_on(stream: &mut Option<TcpStream>, address: SocketAddr) -> Result<()> {
    let stream = match stream {
        Some(stream) => stream,
        None => {
            let new = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
            new.set_read_timeout(Some(Duration::from_secs(10)))?;
            stream.insert(new)
        }
    };
    write!(stream, "HEAD / HTTP/1.1\r\nHost: web\r\n\r\n")?;
    let (mut answer, mut byte) = (Vec::new(), [0]);
    while !answer.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        answer.push(byte[0]);
        ensure!(answer.len() < 4096, "no end of the head");
    }
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "not 200");
    Ok(())
}

/// See the head of the file.
pub(super) fn restarts_under_load(cluster: &mut Cluster) -> Result<()> {
    let count = match std::env::var("GANTRY_RESTARTS") {
        Ok(text) => text.parse().context("GANTRY_RESTARTS")?,
        Err(_) => COUNT,
    };
    cluster.import("nginx")?;
    cluster.apply_ok(MAIN_JOB)?;
    let rollout = ["-n", "web", "rollout", "status", "deployment/web"];
    cluster.ok(&[&rollout[..], &["--timeout=120s"]].concat())?;
    cluster.wait_ready("web", "client")?;
    let service = cluster.get(&["service", "web", "-n", "web"])?;
    let address = service["spec"]["clusterIP"].as_str();
    let address = SocketAddr::new(address.context("no cluster IP")?.parse()?, 80);
    let pods = |cluster: &Cluster| {
        let pods = cluster.get(&["pods", "-n", "web"])?;
        let all = pods["items"].as_array().cloned().unwrap_or_default();
        anyhow::Ok(
            all.into_iter()
                .map(|pod| pod["status"].clone())
                .collect::<Vec<_>>(),
        )
    };
    let before = pods(cluster)?;

    // By address: names are not what this is about.
    let script = format!(
        "n=0; lost=0; while [ ! -e /tmp/over ]; do n=$((n+1)); \
         wget -q -O /dev/null http://{address}/ || lost=$((lost+1)); done; echo $n $lost"
    );
    // Started while the agent lives; its stream ends with the agent, the loop goes on in the pod.
    let script = format!("({script}) > /tmp/counts 2>&1 < /dev/null &");
    cluster.ok(&["-n", "web", "exec", "client", "--", "sh", "-c", &script])?;

    let (seen, began) = (Seen::default(), Instant::now());
    let killed = std::thread::scope(|scope| {
        for _ in 0..CLIENT_COUNT {
            scope.spawn(|| seen.connect_again_and_again(address));
        }
        scope.spawn(|| seen.keep_open(address));
        let killed = (0..count).try_for_each(|number| {
            std::thread::sleep(LIFE * (number % LIVES + 1));
            cluster.kill_agent()?;
            cluster.start_agent()
        });
        seen.over.store(true, Ordering::Relaxed);
        killed
    });
    let took = began.elapsed().as_secs_f64();
    killed?;
    cluster.wait("the agent's streams", Duration::from_secs(60), |cluster| {
        let over = ["-n", "web", "exec", "client", "--", "touch", "/tmp/over"];
        Ok(cluster.gantry(&over)?.code == 0)
    })?;
    let counts = |cluster: &Cluster| {
        let said = cluster.ok(&["-n", "web", "exec", "client", "--", "cat", "/tmp/counts"])?;
        let numbers = said.split_whitespace().filter_map(|n| n.parse().ok());
        anyhow::Ok(numbers.collect::<Vec<u64>>())
    };
    cluster.wait("the client's counts", Duration::from_secs(30), |cluster| {
        Ok(counts(cluster)?.len() == 2)
    })?;
    let counts = counts(cluster)?;

    let errors = seen
        .errors
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let (answered, kept) = (seen.answered.into_inner(), seen.kept.into_inner());
    let rate = answered as f64 / took;
    eprintln!(
        "{count} restarts in {took:.1} s: {answered} connections from the host ({rate:.0} a second), \
         {} from the pod, {kept} requests on an open one",
        counts[0]
    );
    ensure!(
        errors.is_empty(),
        "{} of {answered} went wrong, first: {:?}",
        errors.len(),
        &errors[..errors.len().min(3)]
    );
    ensure!(counts[1] == 0, "the pod asked and lost {counts:?}");
    // Else it was no load: a machine that is this slow shows nothing.
    ensure!(rate > 50.0 && counts[0] > 20 && kept > 5, "too little load");
    let after = pods(cluster)?;
    ensure!(before == after, "pods were touched: {before:?} {after:?}");
    cluster.ok(&["delete", "namespace", "web", "--timeout=60s"])?;
    Ok(())
}
