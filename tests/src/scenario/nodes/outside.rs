//! Services for who is outside: node-1 without an agent, on the link of the workers.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{LIMIT, ask, delete, pod_ip, server, service};
use crate::cluster::Cluster;
use crate::machines::Nodes;

/// A load balancer address that moves is answered again within this.
const FAIL_OVER: Duration = Duration::from_secs(3);
/// An answer of a machine that shares a loaded host with others.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two questions while an address moves.
const EVERY: Duration = Duration::from_millis(20);

/// Says who asks: the peer's address of every connection, in its log.
const WITNESS: &str = "apiVersion: v1
kind: Pod
metadata: {name: witness, labels: {app: witness}}
spec:
  nodeSelector: {kubernetes.io/hostname: node-2}
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command:
        - sh
        - -c
        - |
          echo witness > /tmp/index.html
          exec httpd -f -v -v -p 8080 -h /tmp 2>&1
      readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
";

/// Node ports answer on every worker, of pods on both; with `externalTrafficPolicy: Local` on the pod's
/// own node only, which sees the client's address. A load balancer address answers on the link.
pub(super) fn outside(nodes: &mut Nodes) -> Result<()> {
    let manifest = [
        server("a", 2, "echo"),
        server("b", 3, "echo"),
        WITNESS.into(),
        service("echo", "echo", "  type: LoadBalancer\n"),
        service(
            "local",
            "witness",
            "  type: NodePort\n  externalTrafficPolicy: Local\n",
        ),
    ];
    let cluster = &nodes.cluster;
    cluster.apply_ok(&manifest.concat())?;
    for pod in ["a", "b", "witness"] {
        cluster.wait_ready("default", pod)?;
    }
    let port = node_port(cluster, "echo")?;
    for worker in &nodes.workers {
        let at = SocketAddr::new(worker.address.into(), port);
        both_answer(cluster, at).with_context(|| format!("the node port of {}", worker.name))?;
    }
    let balancer = balancer(cluster, "echo")?;
    both_answer(cluster, balancer).context("the load balancer address")?;

    let port = node_port(cluster, "local")?;
    let own = SocketAddr::new(nodes.address(2).into(), port);
    cluster.wait("the pod's node to answer", LIMIT, |_| {
        Ok(ask(own, PATIENCE).is_ok_and(|who| who == "witness"))
    })?;
    let log = cluster.ok(&["logs", "witness"])?;
    let client = nodes.address(1).to_string();
    ensure!(log.contains(&client), "{client} is not in {log:?}");
    let other = SocketAddr::new(nodes.address(3).into(), port);
    ensure!(
        ask(other, Duration::from_secs(2)).is_err(),
        "a node without a pod of the Service answered"
    );
    delete(cluster, "service", &["echo", "local"])?;
    delete(cluster, "pod", &["a", "b", "witness"])
}

/// With direct return a node without a pod of the Service sends the packet on as it is: the pod, on another
/// node, sees the client's address, and answers past the node that was asked.
pub(super) fn direct_return(nodes: &mut Nodes) -> Result<()> {
    let direct = service("direct", "witness", "  type: NodePort\n").replacen(
        "metadata: {name: direct}",
        "metadata: {name: direct, annotations: {gantry.dev/direct-server-return: \"true\"}}",
        1,
    );
    let cluster = &nodes.cluster;
    cluster.apply_ok(&(WITNESS.to_owned() + &direct))?;
    cluster.wait_ready("default", "witness")?;
    let port = node_port(cluster, "direct")?;
    let other = SocketAddr::new(nodes.address(3).into(), port);
    cluster.wait("the other node to answer", LIMIT, |_| {
        Ok(ask(other, PATIENCE).is_ok_and(|who| who == "witness"))
    })?;
    for _ in 0..10 {
        ask(other, PATIENCE)?;
    }
    let log = cluster.ok(&["logs", "witness"])?;
    let (client, asked) = (nodes.address(1).to_string(), nodes.address(3).to_string());
    let by = |address: &str| log.lines().filter(|line| line.contains(address)).count();
    ensure!(by(&client) >= 10, "{client} is in too few lines: {log}");
    ensure!(by(&asked) == 0, "the node that was asked is in {log}");
    delete(cluster, "service", &["direct"])?;
    delete(cluster, "pod", &["witness"])
}

/// The pod on the node that has the address goes; the address moves to the other node.
pub(super) fn fail_over(nodes: &mut Nodes) -> Result<()> {
    let silence = moved(nodes)?;
    println!("vm: the address was silent for {} ms", silence.as_millis());
    ensure!(
        silence <= FAIL_OVER,
        "the address was silent for {} ms",
        silence.as_millis()
    );
    Ok(())
}

/// Moves an address, and says how long nobody answered there.
pub(crate) fn moved(nodes: &mut Nodes) -> Result<Duration> {
    let local = "  type: LoadBalancer\n  externalTrafficPolicy: Local\n";
    let manifest = [
        server("a", 2, "moved"),
        server("b", 3, "moved"),
        service("moved", "moved", local),
    ];
    let cluster = &nodes.cluster;
    cluster.apply_ok(&manifest.concat())?;
    for pod in ["a", "b"] {
        cluster.wait_ready("default", pod)?;
    }
    let at = balancer(cluster, "moved")?;
    cluster.wait("the address to answer", LIMIT, |_| {
        Ok(ask(at, PATIENCE).is_ok())
    })?;
    // Only the node that has the address answers, with its own pod.
    let first = ask(at, PATIENCE)?;
    let second = if first == "a" { "b" } else { "a" };
    let mut delete = cluster.command(&["delete", "pod", &first, "--timeout=240s"]);
    let mut deleting = delete.spawn().context("gantry delete")?;
    // From the first question that nobody answered to the first that the other did.
    let began = Instant::now();
    let mut failed = None;
    let silence = loop {
        let asked = Instant::now();
        match ask(at, Duration::from_millis(500)) {
            Ok(who) if who == second => {
                break failed.map_or(Duration::ZERO, |at: Instant| at.elapsed());
            }
            Ok(_) => failed = None,
            Err(_) => {
                failed.get_or_insert(asked);
            }
        }
        ensure!(
            began.elapsed() < LIMIT,
            "{second} never answered at {at}, after {first} had gone"
        );
        std::thread::sleep(EVERY);
    };
    deleting.wait()?;
    ensure!(pod_ip(cluster, "default", second).is_ok());
    super::delete(cluster, "service", &["moved"])?;
    super::delete(cluster, "pod", &[second])?;
    Ok(silence)
}

/// The node that has the address loses its power: another one answers within seconds, and it gets its
/// address back when it has come back, without a pause.
pub(super) fn balancer_power_cut(nodes: &mut Nodes) -> Result<()> {
    taken_over(nodes).map(drop)
}

/// The same: for how long the address was silent.
pub(crate) fn taken_over(nodes: &mut Nodes) -> Result<Duration> {
    let manifest = [
        server("a", 2, "kept"),
        server("b", 3, "kept"),
        service("kept", "kept", "  type: LoadBalancer\n"),
    ];
    let cluster = &nodes.cluster;
    cluster.apply_ok(&manifest.concat())?;
    for pod in ["a", "b"] {
        cluster.wait_ready("default", pod)?;
    }
    let at = balancer(cluster, "kept")?;
    both_answer(cluster, at)?;
    let victim = nodes.worker(announcer(at.ip())?)?.clone();
    let (gone, left) = if victim.name == "node-2" {
        ("a", "b")
    } else {
        ("b", "a")
    };
    // What is measured is the address: the only backend stays.
    delete(cluster, "pod", &[gone])?;
    cluster.wait("the other pod alone to answer", LIMIT, |_| {
        Ok((0..20).all(|_| ask(at, PATIENCE).is_ok_and(|who| who == left)))
    })?;
    nodes.ask(&format!("power-cut {}", victim.name))?;
    let cut = Instant::now();
    while ask(at, Duration::from_millis(300)).is_err() {
        ensure!(
            cut.elapsed() < LIMIT,
            "nobody took {at} over from {}",
            victim.name
        );
        std::thread::sleep(EVERY);
    }
    let silence = cut.elapsed();
    println!(
        "vm: after {} had lost its power its address was silent for {} ms",
        victim.name,
        silence.as_millis()
    );
    ensure!(
        silence <= FAIL_OVER,
        "it was silent for {} ms",
        silence.as_millis()
    );
    ensure!(
        announcer(at.ip())? != announcer_of(&victim.name)?,
        "who answered?"
    );
    nodes.ask(&format!("power-on {}", victim.name))?;
    let (on, mut answered, mut longest) = (Instant::now(), Instant::now(), Duration::ZERO);
    while announcer(at.ip())? != announcer_of(&victim.name)? {
        ensure!(
            on.elapsed() < 2 * LIMIT,
            "{} never got {at} back",
            victim.name
        );
        if ask(at, Duration::from_millis(500)).is_ok() {
            longest = longest.max(answered.elapsed());
            answered = Instant::now();
        }
        std::thread::sleep(EVERY);
    }
    nodes.wait_up(&victim)?;
    nodes.wait_ready(&victim.name)?;
    println!(
        "vm: it had its address back {} s after its power, and answers came at most {} ms apart",
        on.elapsed().as_secs(),
        longest.as_millis()
    );
    ensure!(
        longest <= FAIL_OVER,
        "a pause of {} ms",
        longest.as_millis()
    );
    let cluster = &nodes.cluster;
    ask(at, PATIENCE).context("from the machine that is back")?;
    delete(cluster, "service", &["kept"])?;
    delete(cluster, "pod", &[left])?;
    Ok(silence)
}

/// The number of the machine that answers for an address, by what this machine's kernel has learnt.
fn announcer(address: IpAddr) -> Result<u8> {
    let table = std::fs::read_to_string("/proc/net/arp")?;
    let mut rows = table.lines().map(|line| line.split_whitespace());
    let row = rows.find(|row| row.clone().next() == Some(&address.to_string()));
    let mac = row.and_then(|mut row| row.nth(3));
    let last = mac.and_then(|mac| mac.rsplit(':').next());
    let last = last.with_context(|| format!("{address} is not in {table}"))?;
    // Hardware addresses are 52:54:0:0:SEGMENT:(10 + number).
    Ok(u8::from_str_radix(last, 16)?.wrapping_sub(10))
}

fn announcer_of(name: &str) -> Result<u8> {
    let number = name.strip_prefix("node-").context("a machine's name")?;
    Ok(number.parse()?)
}

fn node_port(cluster: &Cluster, name: &str) -> Result<u16> {
    let object = cluster.get(&["service", name])?;
    let port = object["spec"]["ports"][0]["nodePort"].as_u64();
    Ok(u16::try_from(
        port.with_context(|| format!("{name} has no node port"))?,
    )?)
}

fn balancer(cluster: &Cluster, name: &str) -> Result<SocketAddr> {
    let address = |c: &Cluster| -> Result<Option<IpAddr>> {
        let object = c.get(&["service", name])?;
        let ip = object["status"]["loadBalancer"]["ingress"][0]["ip"].as_str();
        Ok(ip.map(str::parse).transpose()?)
    };
    cluster.wait("a load balancer address", LIMIT, |c| {
        Ok(address(c)?.is_some())
    })?;
    let ip = address(cluster)?.context("it has gone")?;
    Ok(SocketAddr::new(ip, 80))
}

fn both_answer(cluster: &Cluster, at: SocketAddr) -> Result<()> {
    cluster.wait("an answer", LIMIT, |_| Ok(ask(at, PATIENCE).is_ok()))?;
    let mut seen = BTreeSet::new();
    for _ in 0..30 {
        seen.insert(ask(at, PATIENCE)?);
    }
    ensure!(seen.len() == 2, "only {seen:?} answered at {at}");
    Ok(())
}
