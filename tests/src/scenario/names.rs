//! Names: what the cluster's DNS says, and that no query is lost while the agent is killed.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::resources::scrape;
use crate::cluster::Cluster;

/// The cluster's DNS.
const RESOLVER: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 53);
const A: u16 = 1;
const SRV: u16 = 33;
/// Longer than any absence of the agent here: an answer that takes longer is lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// One query, sent once: the code and the number of answers.
fn ask(name: &str, kind: u16) -> Result<(u8, u16)> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    // Connected: a refusal is an error, not silence.
    socket.connect(RESOLVER)?;
    // id, recursion, one question
    let mut query = vec![0x47, 0x41, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len())?);
        query.extend(label.as_bytes());
    }
    query.push(0);
    query.extend(kind.to_be_bytes());
    query.extend([0, 1]);
    socket.send(&query).context("send")?;
    let mut answer = [0; 1500];
    let size = socket.recv(&mut answer).with_context(|| name.to_owned())?;
    match answer.get(..size) {
        Some([0x47, 0x41, _, flags, _, _, high, low, ..]) => {
            Ok((flags & 0x0f, u16::from_be_bytes([*high, *low])))
        }
        other => bail!("{name}: not an answer: {other:?}"),
    }
}

/// Clients that ask for a name without a pause for breath.
pub(super) struct Queries {
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<Result<()>>>,
}

impl Queries {
    /// Begins to ask for the address of `name`, which exists.
    pub(super) fn begin(name: &str) -> Self {
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let clients = (0..4).map(|_| {
            let (name, stop) = (name.to_owned(), stop.clone());
            let asked: Arc<AtomicUsize> = Arc::clone(&asked);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let (code, count) = ask(&name, A)?;
                    ensure!(
                        code == 0 && count > 0,
                        "{name}: code {code}, {count} answers"
                    );
                    asked.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(())
            })
        });
        let clients = clients.collect();
        Self {
            stop,
            asked,
            clients,
        }
    }

    /// How many were answered; an error when one was refused, lost or answered wrongly.
    pub(super) fn end(self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            let ended = client.join();
            ended.map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(self.asked.load(Ordering::Relaxed))
    }
}

/// Addresses, ports and pods have names; a search list takes one hop; kills lose no query.
pub(super) fn names(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(
        "apiVersion: v1
kind: Service
metadata: {name: db}
spec:
  clusterIP: None
  selector: {app: db}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: db}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata:
  name: first
  labels: {app: db}
spec:
  hostname: db-0
  subdomain: db
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"httpd\", \"-f\", \"-p\", \"8080\", \"-h\", \"/etc\"]
",
    )?;
    cluster.wait_ready("default", "first")?;
    let exists = |name: &str, kind| Ok(ask(name, kind)? == (0, 1));
    cluster.wait("the names", Duration::from_secs(10), |_| {
        exists("db-0.db.default.svc.cluster.local", A)
    })?;
    for (name, kind, expected) in [
        ("web.default.svc.cluster.local", A, (0, 1)),
        ("db.default.svc.cluster.local", A, (0, 1)),
        ("_http._tcp.db.default.svc.cluster.local", SRV, (0, 1)),
        ("_http._tcp.web.default.svc.cluster.local", SRV, (0, 1)),
        // Exists, without this type; does not exist.
        ("web.default.svc.cluster.local", 15, (0, 0)),
        ("no.default.svc.cluster.local", A, (3, 0)),
    ] {
        let said = ask(name, kind)?;
        ensure!(
            said == expected,
            "{name} {kind}: {said:?}, not {expected:?}"
        );
    }
    // `web.default` is no first name of the pod's search list: one hop all the same.
    let before = figure("coredns_autopath_success_total")?;
    let fetch = ["wget", "-q", "-O", "/dev/null", "http://web.default/passwd"];
    let said = cluster.ok(&[&["exec", "first", "--"][..], &fetch].concat());
    said.context("a name with its namespace, from a pod")?;
    let after = figure("coredns_autopath_success_total")?;
    ensure!(after > before, "no search list was answered in one hop");

    // What the agent leaves behind is at most 2 s old, and the Service may be younger.
    cluster.wait("the agent's last words", Duration::from_secs(5), |_| {
        let words = std::fs::read_to_string("/run/gantry/resolver/names")?;
        Ok(words.contains("web.default"))
    })?;
    let queries = Queries::begin("web.default.svc.cluster.local");
    for round in 0..5 {
        std::thread::sleep(Duration::from_millis(500 + 130 * round));
        cluster.kill_agent()?;
        std::thread::sleep(Duration::from_millis(300 * round));
        cluster.start_agent()?;
    }
    let answered = queries.end().context("under kills of the agent")?;
    ensure!(answered > 500, "only {answered} queries were answered");
    cluster.ok(&["delete", "pod", "first", "--timeout=30s"])?;
    Ok(())
}

/// The sum of a family of the agent's metrics.
fn figure(name: &str) -> Result<f64> {
    let text = scrape()?;
    let lines = text.lines().filter(|line| line.starts_with(name));
    let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    Ok(values.sum())
}
