//! Both ends of what is measured: single-threaded child processes in pods, each on one processor.
//!
//! ```text
//! parent ── "crr ADDRESS COUNT" ────────► ask    connects, asks, is answered, closes; COUNT times
//!        ── "open ADDRESS", "rr ADDRESS COUNT" ► asks on a connection that stays
//!        ── "stream ADDRESS MS" ────────►        sends for so long, until the server has it all
//!        ── "reach ADDRESS COUNT" ──────►        which endpoints have answered, how often
//!        ── "until ADDRESS LOW HIGH" ───►        when an endpoint between the two answers
//!        ── "cpu NUMBER" ───────────────► serve  goes on on another processor
//! ```
//! A request is 64 bytes whose first says what follows; the reply is 64 bytes that begin with the
//! address by which the server was reached: which endpoint it was. The server closes first, so that
//! nothing of a connection is left to do while the next one is timed; then the client resets, so that
//! no port stays in TIME-WAIT.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, sockopt};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;

use super::super::probe::{Probe, answer};
use super::bed::Namespace;
use super::model::TARGET_PORT;

const MESSAGE_BYTES: usize = 64;
/// First bytes of requests: the server closes after the reply, keeps the connection, or swallows
/// whatever comes until the client has sent all.
const CLOSE: u8 = b'c';
const KEEP: u8 = b'k';
const SWALLOW: u8 = b's';
const CHUNK_BYTES: usize = 256 * 1024;
/// Longer than anything takes here, also a SYN that is sent a second time.
const PATIENCE: TimeVal = TimeVal::new(2, 0);
const BACKLOG: i32 = 128;
/// For an endpoint to answer after a change.
const CHANGE: Duration = Duration::from_secs(60);

/// A client or a server; dropping it ends it.
pub(super) struct Peer {
    probe: Probe,
    cpu_file: String,
}

impl Peer {
    /// A server for every address of the namespace.
    pub(super) fn serve(namespace: &Namespace, cpu: usize) -> Result<Self> {
        let mut peer = Self::start("serve", namespace, cpu)?;
        peer.probe.line()?;
        Ok(peer)
    }

    /// A client.
    pub(super) fn client(namespace: &Namespace, cpu: usize) -> Result<Self> {
        let mut peer = Self::start("ask", namespace, cpu)?;
        // It is there when it answers, and not before: its start must not be a part of anything.
        peer.probe.ask("ready")?;
        Ok(peer)
    }

    fn start(what: &str, namespace: &Namespace, cpu: usize) -> Result<Self> {
        let path = namespace.path().display().to_string();
        let probe = Probe::start(&[what, &path, &cpu.to_string()])?;
        let cpu_file = format!("/proc/{}/schedstat", probe.id());
        Ok(Self { probe, cpu_file })
    }

    /// Puts it into a cgroup.
    pub(super) fn join(&self, cgroup: &Path) -> Result<()> {
        let file = cgroup.join("cgroup.procs");
        std::fs::write(&file, self.probe.id().to_string())
            .with_context(|| format!("write {}", file.display()))
    }

    /// Asks, and waits for the answer's numbers.
    pub(super) fn ask(&mut self, question: &str) -> Result<Vec<f64>> {
        self.probe.ask(question)
    }

    /// Asks, and does not wait.
    pub(super) fn send(&mut self, question: &str) -> Result<()> {
        self.probe.send(question)
    }

    /// The answer to what was sent.
    pub(super) fn answer(&mut self) -> Result<Vec<f64>> {
        self.probe.numbers()
    }

    /// Nanoseconds that it has run, in user space and in the kernel: also for the packets that were
    /// handled while it ran, as all are that it sends.
    pub(super) fn cpu_ns(&self) -> Result<f64> {
        let text = std::fs::read_to_string(&self.cpu_file)
            .with_context(|| format!("read {}", self.cpu_file))?;
        let first = text.split(' ').next().unwrap_or_default();
        Ok(first.parse()?)
    }
}

/// The clock that all processes share. Whoever sets it meanwhile spoils a sample.
pub(super) fn now_ns() -> Result<u128> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(now.context("read the clock")?.as_nanos())
}

/// What a child is asked to be, after `probe`; None: not ours.
pub fn main(words: &[&str]) -> Option<Result<()>> {
    let (namespace, cpu) = match words {
        ["serve" | "ask", namespace, cpu] => (namespace, cpu),
        _ => return None,
    };
    let run = || {
        let file = File::open(namespace).with_context(|| format!("open {namespace}"))?;
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("enter {namespace}"))?;
        stay_on(cpu)?;
        match words[0] {
            "serve" => serve(),
            _ => {
                let mut open = HashMap::new();
                answer(|question| work(question, &mut open))
            }
        }
    };
    Some(run())
}

fn stay_on(cpu: &str) -> Result<()> {
    let mut one = CpuSet::new();
    one.set(cpu.parse().context("number of a processor")?)?;
    sched_setaffinity(Pid::from_raw(0), &one).context("stay on one processor")
}

fn work(words: &[&str], open: &mut HashMap<String, TcpStream>) -> Result<Vec<u128>> {
    match words {
        ["ready"] => Ok(vec![0]),
        ["crr", address, count] => crr(address, count.parse()?),
        ["reach", address, count] => reach(address, count.parse()?),
        ["until", address, low, high] => until(address, low.parse()?..high.parse()?),
        ["stream", address, ms] => stream(address, Duration::from_millis(ms.parse()?)),
        ["open", address] => {
            let (_, mut stream) = connect(&mut Target::parse(address)?)?;
            // The server waits for the first request and for nobody else until then.
            rr(&mut stream, 1)?;
            open.insert((*address).to_owned(), stream);
            Ok(vec![0])
        }
        ["rr", address, count] => {
            let stream = open.get_mut(*address).context("not open")?;
            rr(stream, count.parse()?)
        }
        _ => bail!("no such question: {words:?}"),
    }
}

/// `10.244.8.1*3:8080`: one of three addresses that follow each other, another one each time, as a
/// Service would choose; without the asterisk, always the same.
struct Target {
    first: u32,
    count: u32,
    port: u16,
    state: u32,
}

impl Target {
    fn parse(text: &str) -> Result<Self> {
        let (addresses, port) = text.split_once(':').context("no port")?;
        let (first, count) = addresses.split_once('*').unwrap_or((addresses, "1"));
        let count: u32 = count.parse().context("how many addresses?")?;
        ensure!(count > 0, "no address");
        Ok(Self {
            first: first.parse::<Ipv4Addr>().context("address")?.into(),
            count,
            port: port.parse().context("port")?,
            state: std::process::id() | 1,
        })
    }

    /// Xorshift: what a choice costs must not be seen.
    fn next(&mut self) -> SocketAddrV4 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 17;
        self.state ^= self.state << 5;
        let address = self.first + self.state % self.count;
        SocketAddrV4::new(address.into(), self.port)
    }
}

/// The time that connect() took, and the connection.
fn connect(target: &mut Target) -> Result<(u128, TcpStream)> {
    let address = target.next();
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd: OwnedFd = socket::socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    // Bounds connect too: an address that nobody answers for must not take two minutes.
    socket::setsockopt(&fd, sockopt::SendTimeout, &PATIENCE)?;
    socket::setsockopt(&fd, sockopt::ReceiveTimeout, &PATIENCE)?;
    let to = SockaddrIn::from(address);
    let began = Instant::now();
    socket::connect(fd.as_raw_fd(), &to).with_context(|| format!("connect to {address}"))?;
    let took = began.elapsed().as_nanos();
    Ok((took, TcpStream::from(fd)))
}

/// One connection from its beginning to its end: the time of connect(), and who answered.
fn exchange(target: &mut Target) -> Result<(u128, u32)> {
    let (took, mut stream) = connect(target)?;
    stream.write_all(&request(CLOSE))?;
    let mut reply = [0; MESSAGE_BYTES + 1];
    let mut length = 0;
    loop {
        match stream.read(&mut reply[length..])? {
            0 => break,
            read => length += read,
        }
    }
    ensure!(length == MESSAGE_BYTES, "a reply of {length} bytes");
    let reset = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    socket::setsockopt(&stream, sockopt::Linger, &reset)?;
    Ok((took, endpoint_of(&reply)))
}

fn request(kind: u8) -> [u8; MESSAGE_BYTES] {
    let mut request = [b'.'; MESSAGE_BYTES];
    request[0] = kind;
    request
}

fn endpoint_of(reply: &[u8]) -> u32 {
    u32::from_be_bytes([reply[0], reply[1], reply[2], reply[3]])
}

/// First the time of all, then that of each connect().
fn crr(address: &str, count: usize) -> Result<Vec<u128>> {
    let mut target = Target::parse(address)?;
    let mut times = Vec::with_capacity(count + 1);
    times.push(0);
    let began = Instant::now();
    for _ in 0..count {
        times.push(exchange(&mut target)?.0);
    }
    times[0] = began.elapsed().as_nanos();
    Ok(times)
}

/// The time of each request on an open connection.
fn rr(stream: &mut TcpStream, count: usize) -> Result<Vec<u128>> {
    let question = request(KEEP);
    let mut reply = [0; MESSAGE_BYTES];
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        stream.write_all(&question)?;
        stream.read_exact(&mut reply)?;
        times.push(began.elapsed().as_nanos());
    }
    Ok(times)
}

/// Bytes sent, and the nanoseconds until the server had them all.
fn stream(address: &str, time: Duration) -> Result<Vec<u128>> {
    let (_, mut stream) = connect(&mut Target::parse(address)?)?;
    let chunk = vec![0; CHUNK_BYTES];
    let began = Instant::now();
    stream.write_all(&request(SWALLOW))?;
    let mut sent = 0;
    while began.elapsed() < time {
        stream.write_all(&chunk)?;
        sent += chunk.len() as u128;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut reply = [0; MESSAGE_BYTES];
    stream.read_exact(&mut reply)?;
    Ok(vec![sent, began.elapsed().as_nanos()])
}

/// Pairs: an endpoint, and how often it has answered.
fn reach(address: &str, count: usize) -> Result<Vec<u128>> {
    let mut target = Target::parse(address)?;
    let mut answers = BTreeMap::new();
    for _ in 0..count {
        *answers.entry(exchange(&mut target)?.1).or_insert(0) += 1;
    }
    let pairs = answers.into_iter();
    Ok(pairs
        .flat_map(|(endpoint, count)| [u128::from(endpoint), count])
        .collect())
}

/// When an endpoint of the range has answered, and how many connections had failed by then.
fn until(address: &str, wanted: std::ops::Range<u32>) -> Result<Vec<u128>> {
    let mut target = Target::parse(address)?;
    let began = Instant::now();
    let mut failed = 0;
    while began.elapsed() < CHANGE {
        match exchange(&mut target) {
            Ok((_, endpoint)) if wanted.contains(&endpoint) => return Ok(vec![now_ns()?, failed]),
            Ok(_) => {}
            Err(_) => failed += 1,
        }
    }
    bail!("no new endpoint has answered within {} s", CHANGE.as_secs())
}

fn serve() -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", TARGET_PORT)).context("bind")?;
    socket::listen(&listener, socket::Backlog::new(BACKLOG)?)?;
    println!("ready");
    let mut stdin = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut kept: Vec<TcpStream> = Vec::new();
    loop {
        let mut ready: Vec<PollFd<'_>> = [stdin.as_fd(), listener.as_fd()]
            .into_iter()
            .chain(kept.iter().map(AsFd::as_fd))
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        let ready: Vec<bool> = ready.iter().map(|fd| fd.any() == Some(true)).collect();
        if ready[1] {
            let (stream, _) = listener.accept()?;
            // What a client does wrong is its own error.
            if let Ok(Some(stream)) = greet(stream) {
                kept.push(stream);
            }
            continue;
        }
        if ready[0] {
            let mut line = [0; 64];
            let length = stdin.read(&mut line)?;
            let line = String::from_utf8_lossy(&line[..length]);
            match line.trim().strip_prefix("cpu ") {
                Some(cpu) => {
                    stay_on(cpu)?;
                    println!("0");
                }
                None => return Ok(()), // the parent has gone
            }
        }
        let mut is_ready = ready[2..].iter();
        kept.retain_mut(|stream| {
            is_ready.next() != Some(&true) || matches!(reply(stream), Ok(Some(KEEP)))
        });
    }
}

/// The first request of a connection; the connection, if it is kept.
fn greet(mut stream: TcpStream) -> Result<Option<TcpStream>> {
    socket::setsockopt(&stream, sockopt::ReceiveTimeout, &PATIENCE)?;
    Ok((reply(&mut stream)? == Some(KEEP)).then_some(stream))
}

/// Answers one request; what kind it was, or none: the client has closed.
fn reply(stream: &mut TcpStream) -> Result<Option<u8>> {
    let mut message = [0; MESSAGE_BYTES];
    match stream.read_exact(&mut message) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let kind = message[0];
    if kind == SWALLOW {
        let mut chunk = vec![0; CHUNK_BYTES];
        while stream.read(&mut chunk)? > 0 {}
    }
    if let std::net::IpAddr::V4(own) = stream.local_addr()?.ip() {
        message[..4].copy_from_slice(&own.octets());
    }
    stream.write_all(&message)?;
    Ok(Some(kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server on a thread, for as many connections.
    fn server(count: usize) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            for _ in 0..count {
                let kept = greet(listener.accept().unwrap().0).unwrap();
                let Some(mut stream) = kept else { continue };
                while let Ok(Some(KEEP)) = reply(&mut stream) {}
            }
        });
        address
    }

    #[test]
    fn every_kind_of_request_is_answered_and_says_by_whom() {
        let address = server(6);
        let mut open = HashMap::new();
        let mut ask = |question: &str| {
            let words: Vec<&str> = question.split(' ').collect();
            work(&words, &mut open).unwrap()
        };
        let times = ask(&format!("crr {address} 3"));
        assert_eq!(times.len(), 4);
        assert!(times[0] > times[1..].iter().sum());
        let own = u128::from(u32::from_be_bytes([127, 0, 0, 1]));
        assert_eq!(ask(&format!("reach {address} 1")), [own, 1]);
        let sent = ask(&format!("stream {address} 20"));
        assert!(
            sent[0] >= CHUNK_BYTES as u128 && sent[1] >= 20_000_000,
            "{sent:?}"
        );
        ask(&format!("open {address}"));
        assert_eq!(ask(&format!("rr {address} 5")).len(), 5);
    }

    #[test]
    fn a_target_is_one_of_its_addresses_and_each_has_its_turn() {
        let mut target = Target::parse("10.244.8.1*3:8080").unwrap();
        let seen: std::collections::BTreeSet<_> = (0..100).map(|_| target.next()).collect();
        let wanted = ["10.244.8.1:8080", "10.244.8.2:8080", "10.244.8.3:8080"];
        assert!(seen.iter().map(ToString::to_string).eq(wanted));
        let mut one = Target::parse("10.96.0.10:80").unwrap();
        assert_eq!(one.next().to_string(), "10.96.0.10:80");
        for wrong in ["10.96.0.10", "10.96.0.10*0:80", "x:80", "10.96.0.10:http"] {
            assert!(Target::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_refused_connection_is_an_error_and_no_figure() {
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        assert!(crr(&address.to_string(), 1).is_err());
    }
}
