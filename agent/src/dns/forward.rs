//! Questions that are not the cluster's: asked upstream, over UDP and TCP, with failover.
//!
//! The last server that answered is asked first. Each question has a socket, a port and an id of
//! its own, and only an answer from that server to that question counts (RFC 5452). The number of
//! questions in flight is bounded; beyond it the client is told SERVFAIL at once.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use hickory_proto::op::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::cache::{Cache, CacheKey};
use crate::network::ResolvConf;

/// Questions in flight at the same time.
const IN_FLIGHT_MAX: usize = 512;
/// How long one server has for one try.
const TRY_TIMEOUT: Duration = Duration::from_millis(1500);
/// How often every server is tried.
const ROUND_COUNT: usize = 2;
/// How often the node's resolv.conf is looked at.
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);
/// glibc uses three; more would only delay the failure.
const SERVER_COUNT_MAX: usize = 3;
const DNS_PORT: u16 = 53;

/// Where the servers come from.
#[derive(Clone, Debug)]
pub enum Upstreams {
    /// These, in order of preference.
    Fixed(Vec<SocketAddr>),
    /// The nameservers of this file, read again when it changes.
    File(PathBuf),
}

/// Which transport a question came by; it is forwarded by the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Transport {
    /// Answers may be truncated.
    Udp,
    /// Answers are whole.
    Tcp,
}

/// Why upstream did not answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ForwardError {
    /// resolv.conf names no server, or only ourselves.
    #[error("no upstream nameserver: the node's resolv.conf names none")]
    NoServer,
    /// [`IN_FLIGHT_MAX`]
    #[error("{IN_FLIGHT_MAX} questions are in flight already")]
    Busy,
    /// Every server failed in every round.
    #[error("upstream {server}: {source}")]
    Failed {
        /// The last one tried.
        server: SocketAddr,
        /// Its failure.
        source: io::Error,
    },
    /// The question cannot be encoded.
    #[error("question: {0}")]
    Encode(String),
}

struct FileServers {
    servers: Vec<SocketAddr>,
    modified: Option<SystemTime>,
    looked: Option<Instant>,
}

/// Asks upstream, through a cache.
pub(super) struct Forwarder {
    upstreams: Upstreams,
    /// Never asked: our own addresses.
    own: Vec<IpAddr>,
    file: Mutex<FileServers>,
    preferred: AtomicUsize,
    in_flight: Semaphore,
    cache: Mutex<Cache>,
}

impl Forwarder {
    /// * `own` – addresses of this resolver: asking them would be a loop.
    pub(super) fn new(upstreams: Upstreams, own: Vec<IpAddr>) -> Self {
        Self {
            upstreams,
            own,
            file: Mutex::new(FileServers {
                servers: Vec::new(),
                modified: None,
                looked: None,
            }),
            preferred: AtomicUsize::new(0),
            in_flight: Semaphore::new(IN_FLIGHT_MAX),
            cache: Mutex::default(),
        }
    }

    /// Asks; the answer has the request's id.
    pub(super) async fn ask(
        &self,
        request: &Message,
        transport: Transport,
    ) -> Result<Message, ForwardError> {
        let key = CacheKey::of(request);
        if let Some(key) = &key {
            let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(mut message) = cache.get(key, Instant::now()) {
                message.metadata.id = request.metadata.id;
                message.queries.clone_from(&request.queries);
                return Ok(message);
            }
        }
        let _permit = self
            .in_flight
            .try_acquire()
            .map_err(|_| ForwardError::Busy)?;
        let mut answer = self.ask_servers(request, transport).await?;
        if let Some(key) = key {
            let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
            cache.put(key, &answer, Instant::now());
        }
        answer.metadata.id = request.metadata.id;
        Ok(answer)
    }

    async fn ask_servers(
        &self,
        request: &Message,
        transport: Transport,
    ) -> Result<Message, ForwardError> {
        let servers = self.servers();
        if servers.is_empty() {
            return Err(ForwardError::NoServer);
        }
        let mut question = request.clone();
        question.metadata.recursion_desired = true;
        let mut last = None;
        for attempt in 0..servers.len() * ROUND_COUNT {
            let index = (self.preferred.load(Ordering::Relaxed) + attempt) % servers.len();
            let server = servers[index];
            question.metadata.id = rand::random();
            let bytes = question
                .to_vec()
                .map_err(|error| ForwardError::Encode(error.to_string()))?;
            let exchange = async {
                match transport {
                    Transport::Udp => ask_udp(server, &bytes, &question).await,
                    Transport::Tcp => ask_tcp(server, &bytes, &question).await,
                }
            };
            match tokio::time::timeout(TRY_TIMEOUT, exchange).await {
                Ok(Ok(answer)) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Ok(Err(source)) => last = Some(ForwardError::Failed { server, source }),
                Err(_) => {
                    let source = io::ErrorKind::TimedOut.into();
                    last = Some(ForwardError::Failed { server, source });
                }
            }
        }
        Err(last.unwrap_or(ForwardError::NoServer))
    }

    /// The servers to ask, now.
    fn servers(&self) -> Vec<SocketAddr> {
        let path = match &self.upstreams {
            Upstreams::Fixed(servers) => return servers.clone(),
            Upstreams::File(path) => path,
        };
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if file
            .looked
            .is_some_and(|looked| looked.elapsed() < RELOAD_INTERVAL)
        {
            return file.servers.clone();
        }
        file.looked = Some(Instant::now());
        let modified = std::fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok();
        // An unreadable file keeps the servers that are known: the network may be just changing.
        if (modified.is_none() || modified != file.modified)
            && let Ok(text) = std::fs::read_to_string(path)
        {
            file.servers = servers_in(&text, &self.own);
            file.modified = modified;
        }
        file.servers.clone()
    }
}

/// The servers of a resolv.conf, without ourselves.
fn servers_in(text: &str, own: &[IpAddr]) -> Vec<SocketAddr> {
    let servers = ResolvConf::parse(text).nameservers;
    (servers.iter())
        .filter_map(|server| server.parse::<IpAddr>().ok())
        .filter(|address| !own.contains(address))
        .map(|address| SocketAddr::new(address, DNS_PORT))
        .take(SERVER_COUNT_MAX)
        .collect()
}

/// True when `answer` answers `question`.
fn belongs(answer: &Message, question: &Message) -> bool {
    answer.metadata.id == question.metadata.id
        && answer.metadata.message_type == hickory_proto::op::MessageType::Response
        && answer.queries.first() == question.queries.first()
}

async fn ask_udp(server: SocketAddr, bytes: &[u8], question: &Message) -> io::Result<Message> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => IpAddr::from([0; 4]),
        SocketAddr::V6(_) => IpAddr::from([0; 16]),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let size = socket.recv(&mut buffer).await?;
        match Message::from_vec(&buffer[..size]) {
            Ok(answer) if belongs(&answer, question) => return Ok(answer),
            // A late or forged one: the right one may still come.
            _ => {}
        }
    }
}

async fn ask_tcp(server: SocketAddr, bytes: &[u8], question: &Message) -> io::Result<Message> {
    let size = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut stream = TcpStream::connect(server).await?;
    let mut framed = size.to_be_bytes().to_vec();
    framed.extend_from_slice(bytes);
    stream.write_all(&framed).await?;
    let mut buffer = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut buffer).await?;
    match Message::from_vec(&buffer) {
        Ok(answer) if belongs(&answer, question) => Ok(answer),
        Ok(_) => Err(io::Error::other("answered another question")),
        Err(error) => Err(io::Error::other(format!("malformed answer: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_servers_are_taken_without_ourselves() {
        let own = [
            IpAddr::from([169, 254, 20, 10]),
            IpAddr::from([10, 96, 0, 10]),
        ];
        let text = "nameserver 169.254.20.10\nnameserver 192.0.2.1\nnameserver nonsense\n\
                    nameserver 10.96.0.10\nnameserver ::1\n";
        let servers: Vec<_> = servers_in(text, &own)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(servers, ["192.0.2.1:53", "[::1]:53"]);
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_vanished_one_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        let forwarder = Forwarder::new(Upstreams::File(path.clone()), Vec::new());
        assert_eq!(forwarder.servers()[0].ip(), IpAddr::from([192, 0, 2, 1]));
        std::fs::remove_file(&path).unwrap();
        forwarder.file.lock().unwrap().looked = None;
        assert_eq!(forwarder.servers().len(), 1);
        std::fs::write(&path, "nameserver 192.0.2.2\n").unwrap();
        forwarder.file.lock().unwrap().looked = None;
        assert_eq!(forwarder.servers()[0].ip(), IpAddr::from([192, 0, 2, 2]));
    }
}
