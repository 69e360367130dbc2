//! Questions that are not the cluster's: asked upstream, through a cache.
//!
//! ```text
//! ask ─► cache ─ fresh ─► answer
//!          │ miss, stale
//!          └─► flight (one per question) ─► the healthiest server ─ 0.4 s ─► the next as well … ─► cache
//!                 stale: 1.8 s for it, none when every server is out; then the stale answer
//! ```
//! A flight goes on when its clients have gone: the next one profits. Health is in [`health`], the
//! exchange itself in [`exchange`](super::exchange). A server whose questions come back to us (the
//! node's resolver asks the cluster's) is found by a name that only we ask for; meanwhile the loop is
//! harmless, because a question that is in flight already waits for itself and nothing multiplies.
//! The number of flights is bounded; beyond it the client is told SERVFAIL at once.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hickory_proto::op::{Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RecordType};
use tokio::sync::{Notify, watch};

use super::cache::{Age, Cache, Question};
use super::exchange;
use super::figures::Counters;
use super::health::Health;
use super::hold::lock;
use crate::network::ResolvConf;
use crate::view::View;

/// Questions in flight at the same time.
const FLIGHT_COUNT_MAX: usize = 512;
/// How long one server has for one try.
const TRY_TIMEOUT: Duration = Duration::from_millis(1500);
/// After this a second server is asked as well.
const STAGGER: Duration = Duration::from_millis(400);
/// How often every server is tried.
const ROUND_COUNT: usize = 2;
/// For all tries: clients give up after five seconds.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(4);
/// With a stale answer at hand, a fresh one has this long (RFC 8767, 5).
const STALE_PATIENCE: Duration = Duration::from_millis(1800);
/// How often the node's resolv.conf is looked at.
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);
/// glibc uses three; more would only delay the failure.
const SERVER_COUNT_MAX: usize = 3;
const DNS_PORT: u16 = 53;
/// Below it are the names that only we ask for.
const LOOP_DOMAIN: &str = "gantry-loop.invalid.";

/// Where the servers come from.
#[derive(Clone, Debug)]
pub enum Upstreams {
    /// These, in order of preference.
    Fixed(Vec<SocketAddr>),
    /// The nameservers of this file, read again when it changes.
    File(PathBuf),
}

/// Why upstream did not answer.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum ForwardError {
    /// resolv.conf names no server, or only ourselves.
    #[error("no upstream nameserver: the node's resolv.conf names none but this resolver")]
    NoServer,
    /// [`FLIGHT_COUNT_MAX`]
    #[error("{FLIGHT_COUNT_MAX} questions are in flight already")]
    Busy,
    /// Every server failed in every round.
    #[error("upstream {server}: {source}")]
    Failed {
        /// The last one tried.
        server: SocketAddr,
        /// Its failure.
        source: Arc<io::Error>,
    },
}

type Outcome = Result<Arc<Message>, ForwardError>;
type Flight = watch::Receiver<Option<Outcome>>;

struct Servers {
    health: Health,
    modified: Option<SystemTime>,
    looked: Option<Instant>,
}

/// Asks upstream.
pub(super) struct Forwarder {
    upstreams: Upstreams,
    /// Never asked: asking ourselves would be a loop. The cluster's address is in the view.
    own: IpAddr,
    view: watch::Receiver<Arc<View>>,
    servers: Mutex<Servers>,
    flights: Mutex<HashMap<Question, Flight>>,
    cache: Mutex<Cache>,
    loop_domain: Name,
    nonce: u64,
    counters: Arc<Counters>,
    /// Told when the file names other servers.
    changed: Notify,
}

impl Forwarder {
    /// * `own` – this resolver's address.
    pub(super) fn new(
        upstreams: Upstreams,
        own: IpAddr,
        view: watch::Receiver<Arc<View>>,
        counters: Arc<Counters>,
    ) -> Arc<Self> {
        let mut loop_domain = Name::from_ascii(LOOP_DOMAIN).unwrap_or_else(|_| Name::root());
        loop_domain.set_fqdn(true);
        Arc::new(Self {
            upstreams,
            own,
            view,
            servers: Mutex::new(Servers {
                health: Health::default(),
                modified: None,
                looked: None,
            }),
            flights: Mutex::default(),
            cache: Mutex::default(),
            loop_domain,
            nonce: rand::random(),
            counters,
            changed: Notify::new(),
        })
    }

    /// What upstream has said lately.
    pub(super) fn known(&self, query: &Query, request: &Message) -> Option<Message> {
        let question = Question::of(query, request);
        match lock(&self.cache).get(&question, Instant::now())? {
            (message, Age::Fresh) => {
                self.counters.cache_hit(message.answers.is_empty());
                Some(message)
            }
            (_, Age::Stale) => None,
        }
    }

    /// Asks. The answer's id and question are to be replaced by the client's.
    ///
    /// * `request` – whose EDNS and CD bit count.
    pub(super) async fn ask(
        self: &Arc<Self>,
        query: &Query,
        request: &Message,
    ) -> Result<Message, ForwardError> {
        let question = Question::of(query, request);
        let cached = lock(&self.cache).get(&question, Instant::now());
        let stale = match cached {
            Some((message, Age::Fresh)) => {
                self.counters.cache_hit(message.answers.is_empty());
                return Ok(message);
            }
            Some((message, Age::Stale)) => Some(message),
            None => None,
        };
        self.counters.cache_misses.add();
        let flight = self.join(query, question);
        let Some(stale) = stale else {
            return wait(flight?).await;
        };
        let patience = match lock(&self.servers).health.all_out() {
            true => Duration::ZERO,
            false => STALE_PATIENCE,
        };
        let fresh = async { wait(flight?).await };
        match tokio::time::timeout(patience, fresh).await {
            Ok(Ok(answer)) if answer.metadata.response_code != ResponseCode::ServFail => Ok(answer),
            _ => {
                self.counters.served_stale.add();
                Ok(stale)
            }
        }
    }

    /// The flight of that question; a new one unless there is one.
    fn join(self: &Arc<Self>, query: &Query, question: Question) -> Result<Flight, ForwardError> {
        let mut flights = lock(&self.flights);
        if let Some(flight) = flights.get(&question) {
            self.counters.merged.add();
            return Ok(flight.clone());
        }
        if flights.len() >= FLIGHT_COUNT_MAX {
            self.counters.rejected.add();
            return Err(ForwardError::Busy);
        }
        let (sender, flight) = watch::channel(None);
        flights.insert(question.clone(), flight.clone());
        drop(flights);
        let landing = Landing {
            forwarder: self.clone(),
            question,
        };
        let query = query.clone();
        tokio::spawn(async move {
            let this = &landing.forwarder;
            let outcome = this.ask_servers(&query, &landing.question).await;
            if let Ok(answer) = &outcome {
                lock(&this.cache).put(&landing.question, answer, Instant::now());
            }
            sender.send_replace(Some(outcome.map(Arc::new)));
        });
        Ok(flight)
    }

    async fn ask_servers(
        self: &Arc<Self>,
        query: &Query,
        question: &Question,
    ) -> Result<Message, ForwardError> {
        let order = self.order();
        let mut left: Vec<SocketAddr> = order.repeat(ROUND_COUNT);
        left.reverse();
        let mut tries = FuturesUnordered::new();
        let mut waiting: Vec<SocketAddr> = Vec::new();
        let (mut unwilling, mut last) = (None, ForwardError::NoServer);
        let total = tokio::time::sleep(TOTAL_TIMEOUT);
        tokio::pin!(total);
        loop {
            if let Some(server) = left.pop() {
                waiting.push(server);
                tries.push(self.try_once(server, query, question));
            } else if tries.is_empty() {
                break;
            }
            tokio::select! {
                // Cancel-safe: the tries stay in their set.
                Some((server, result)) = tries.next() => {
                    let index = waiting.iter().position(|s| *s == server).unwrap_or(0);
                    match result {
                        Ok(answer) if is_willing(&answer) => {
                            // Asked before this one and silent still: as good as a failure.
                            for slow in waiting[..index].iter().filter(|s| **s != server) {
                                self.note_failure(*slow);
                            }
                            return Ok(answer);
                        }
                        Ok(answer) => {
                            left.retain(|other| *other != server);
                            unwilling = Some(answer);
                        }
                        Err(source) => {
                            let source = Arc::new(source);
                            last = ForwardError::Failed { server, source };
                        }
                    }
                    waiting.remove(index);
                }
                () = tokio::time::sleep(STAGGER), if !left.is_empty() => {}
                () = &mut total => break,
            }
        }
        unwilling.ok_or(last)
    }

    async fn try_once(
        self: &Arc<Self>,
        server: SocketAddr,
        query: &Query,
        question: &Question,
    ) -> (SocketAddr, io::Result<Message>) {
        let begun = Instant::now();
        let asked = exchange::ask(server, query, question);
        let result = match tokio::time::timeout(TRY_TIMEOUT, asked).await {
            Ok(result) => result,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        match &result {
            Ok(_) => {
                lock(&self.servers).health.answered(server, begun.elapsed());
            }
            Err(_) => self.note_failure(server),
        }
        (server, result)
    }

    fn note_failure(self: &Arc<Self>, server: SocketAddr) {
        self.counters.upstream_failures.add();
        let (goes, all_out) = {
            let health = &mut lock(&self.servers).health;
            (health.failed(server), health.all_out())
        };
        if goes {
            tracing::info!(%server, all_out, "an upstream nameserver does not answer");
            if all_out {
                self.counters.all_out.add();
            }
            tokio::spawn(self.clone().probe(server));
        }
    }

    /// Asks a server that is out until it answers or is no server of ours any more.
    async fn probe(self: Arc<Self>, server: SocketAddr) {
        loop {
            let Some(pause) = lock(&self.servers).health.probe_pause(server) else {
                return;
            };
            tokio::time::sleep(pause).await;
            if self.ask_own_name(server).await {
                tracing::info!(%server, "an upstream nameserver answers again");
                return;
            }
        }
    }

    /// Asks for a name that only we know; true when anything is answered.
    async fn ask_own_name(self: &Arc<Self>, server: SocketAddr) -> bool {
        let Some(name) = self.loop_name(server) else {
            return true;
        };
        let query = Query::query(name, RecordType::A);
        let question = Question {
            name: query.name().clone(),
            kind: RecordType::A,
            class: DNSClass::IN,
            dnssec_ok: false,
            checking_disabled: false,
        };
        let begun = Instant::now();
        let asked = exchange::ask(server, &query, &question);
        let answered = matches!(tokio::time::timeout(TRY_TIMEOUT, asked).await, Ok(Ok(_)));
        match answered {
            true => {
                lock(&self.servers).health.answered(server, begun.elapsed());
            }
            false => self.note_failure(server),
        }
        answered
    }

    /// `<nonce>-<index of the server>.gantry-loop.invalid.`
    fn loop_name(&self, server: SocketAddr) -> Option<Name> {
        let servers = lock(&self.servers).health.addresses();
        let index = servers.iter().position(|address| *address == server)?;
        let label = format!("{:016x}-{index}", self.nonce);
        self.loop_domain.prepend_label(label).ok()
    }

    /// True when the question is our own: then the server that it was sent to is not asked again.
    pub(super) fn has_looped(&self, name: &Name) -> bool {
        if !self.loop_domain.zone_of(name) {
            return false;
        }
        let servers = lock(&self.servers).health.addresses();
        for server in servers {
            if self.loop_name(server).as_ref() == Some(name)
                && lock(&self.servers).health.loops(server)
            {
                tracing::error!(
                    %server,
                    "this nameserver of the node's resolv.conf asks this resolver again: it is not asked any more"
                );
            }
        }
        true
    }

    /// The servers to ask, now, the best first.
    pub(super) fn order(self: &Arc<Self>) -> Vec<SocketAddr> {
        let (order, new) = {
            let mut servers = lock(&self.servers);
            let before = servers.health.addresses();
            self.reload(&mut servers);
            let mut new = servers.health.addresses();
            new.retain(|server| !before.contains(server));
            (servers.health.order(), new)
        };
        if !new.is_empty() {
            self.changed.notify_one();
        }
        for server in new {
            let this = self.clone();
            // Whether it answers, and whether it loops.
            tokio::spawn(async move { this.ask_own_name(server).await });
        }
        order
    }

    fn reload(&self, servers: &mut Servers) {
        let path = match &self.upstreams {
            Upstreams::Fixed(fixed) => {
                if servers.looked.is_none() {
                    servers.looked = Some(Instant::now());
                    servers.health.replace(fixed);
                }
                return;
            }
            Upstreams::File(path) => path,
        };
        if (servers.looked).is_some_and(|looked| looked.elapsed() < RELOAD_INTERVAL) {
            return;
        }
        servers.looked = Some(Instant::now());
        let modified = std::fs::metadata(path).and_then(|m| m.modified()).ok();
        // An unreadable file keeps the servers that are known: the network may be just changing.
        if (modified.is_none() || modified != servers.modified)
            && let Ok(text) = std::fs::read_to_string(path)
        {
            let cluster = self.view.borrow().settings.dns_service_ip;
            let own: Vec<IpAddr> = cluster.into_iter().chain([self.own]).collect();
            servers.health.replace(&servers_in(&text, &own));
            servers.modified = modified;
        }
    }

    /// Until there are other servers than before.
    pub(super) async fn servers_changed(&self) {
        self.changed.notified().await;
    }

    /// Cached answers, and cached denials.
    pub(super) fn cached(&self) -> [usize; 2] {
        lock(&self.cache).counts()
    }
}

/// Ends a flight, however it ends.
struct Landing {
    forwarder: Arc<Forwarder>,
    question: Question,
}

impl Drop for Landing {
    fn drop(&mut self) {
        lock(&self.forwarder.flights).remove(&self.question);
    }
}

async fn wait(mut flight: Flight) -> Result<Message, ForwardError> {
    let landed = flight.wait_for(Option::is_some).await;
    let outcome = landed.ok().and_then(|outcome| outcome.clone());
    // No outcome: it was dropped because the agent ends.
    let answer = outcome.unwrap_or(Err(ForwardError::NoServer))?;
    Ok(Message::clone(&answer))
}

/// A server that cannot or will not answer is no reason for the next one not to.
fn is_willing(answer: &Message) -> bool {
    let unwilling = [
        ResponseCode::ServFail,
        ResponseCode::Refused,
        ResponseCode::NotImp,
        ResponseCode::FormErr,
    ];
    answer.metadata.op_code == OpCode::Query && !unwilling.contains(&answer.metadata.response_code)
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

    #[tokio::test]
    async fn a_changed_file_is_read_again_and_a_vanished_one_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        std::fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        let forwarder = Forwarder::new(
            Upstreams::File(path.clone()),
            IpAddr::from([127, 0, 0, 1]),
            watch::channel(Arc::default()).1,
            Arc::default(),
        );
        let look = || {
            let mut servers = lock(&forwarder.servers);
            servers.looked = None;
            forwarder.reload(&mut servers);
            servers.health.order()[0].ip().to_string()
        };
        assert_eq!(look(), "192.0.2.1");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(look(), "192.0.2.1");
        std::fs::write(&path, "nameserver 192.0.2.2\n").unwrap();
        assert_eq!(look(), "192.0.2.2");
    }
}
