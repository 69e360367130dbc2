//! From request bytes to response bytes, whatever the request.
//!
//! ```text
//! decide ─┬─► silent   a response, or no header: two resolvers would talk for ever
//!         ├─► reply    malformed, refused, or a name of the cluster: answered at once
//!         └─► ask      what only upstream knows ─► finish ─► reply
//! ```
//! Malformed packets get FORMERR if they can be answered at all. Answers that exceed what the client
//! takes are sent empty with the truncation bit, so that it comes again over TCP. A first name of a
//! pod's search list that does not exist is answered with the first that does: see [`search`].
//!
//! [`search`]: super::search

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use gantry_api::k8s_openapi::api::core::v1::Pod;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::CNAME;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use rand::seq::SliceRandom;
use tokio::sync::watch;

use super::figures::Counters;
use super::forward::Forwarder;
use super::hold::lock;
use super::search::{SearchLists, candidates};
use super::zone::{Answer, Zone};
use crate::ids::PodUid;
use crate::view::{Settings, View};

/// What a client without EDNS takes over UDP (RFC 1035), in bytes.
const UDP_SIZE_MIN: usize = 512;
/// What we send and take over UDP: no fragments on common links (DNS flag day 2020), in bytes.
pub(super) const UDP_SIZE_MAX: usize = 1232;
/// Aliases followed for one question.
const ALIAS_DEPTH_MAX: usize = 8;
/// A DNS header, in bytes: less cannot be answered.
const HEADER_SIZE: usize = 12;
/// For all names of a search list; a client gives up after five seconds.
const WALK_TIMEOUT: Duration = Duration::from_millis(4500);
/// How old what is known of the node's resolv.conf may be.
const NODE_AGE_MAX: Duration = Duration::from_secs(5);
/// How long the alias to a name found by a search list may be cached: a Service of the asked name may
/// come, in seconds.
const SEARCH_TTL_S: u32 = 5;

/// How a question came, and its answer goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Transport {
    /// Answers may be truncated.
    Udp,
    /// Answers are whole.
    Tcp,
}

/// What to do about a request.
pub(super) enum Decision {
    /// Nothing.
    Silent,
    /// Send this.
    Reply(Vec<u8>),
    /// Upstream has to be asked: see [`Responder::finish`].
    Ask(Box<Pending>),
}

/// A request whose answer needs upstream.
pub(super) struct Pending {
    request: Message,
    transport: Transport,
    begun: Instant,
    /// What upstream is asked for.
    query: Query,
    /// The cluster's aliases that lead to it.
    aliases: Vec<Record>,
    walk: Option<Walk>,
}

/// Along a client's search list.
struct Walk {
    /// What else it would try.
    names: VecDeque<Name>,
    /// What it is being tried with.
    name: Name,
    /// What it is told when none of them exists.
    nothing: Message,
}

/// What the cluster's own names say about one name.
enum Local {
    /// The response is whole.
    Whole(Message),
    /// The name, or what an alias leads to, is upstream's.
    Upstream { aliases: Vec<Record>, query: Query },
}

/// Search lists, and what they were made from (held weakly: an old view is nobody's).
struct Lists {
    lists: SearchLists,
    pods: Weak<BTreeMap<PodUid, Arc<Pod>>>,
    settings: Weak<Settings>,
    node: Arc<str>,
}

struct NodeFile {
    text: Arc<str>,
    read: Instant,
}

/// Where the node's resolv.conf is read.
pub type ReadNode = fn() -> String;

/// Answers requests from the newest view and from upstream.
pub(super) struct Responder {
    view: watch::Receiver<Arc<View>>,
    zone: ArcSwapOption<Zone>,
    lists: ArcSwapOption<Lists>,
    node: Mutex<Option<NodeFile>>,
    read_node: ReadNode,
    own: IpAddr,
    pub(super) forwarder: Arc<Forwarder>,
    pub(super) counters: Arc<Counters>,
}

impl Responder {
    /// * `view` – where the cluster's names come from.
    /// * `own` – the address that it is asked at.
    pub(super) fn new(
        view: watch::Receiver<Arc<View>>,
        forwarder: Arc<Forwarder>,
        read_node: ReadNode,
        own: IpAddr,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            view,
            zone: ArcSwapOption::empty(),
            lists: ArcSwapOption::empty(),
            node: Mutex::new(None),
            read_node,
            own,
            forwarder,
            counters,
        }
    }

    /// The zone of the newest view; made anew only when that has changed.
    pub(super) fn zone(&self) -> Arc<Zone> {
        let view = self.view.borrow().clone();
        if let Some(zone) = self.zone.load_full()
            && Arc::ptr_eq(zone.view(), &view)
        {
            return zone;
        }
        let zone = Arc::new(Zone::new(view));
        self.zone.store(Some(zone.clone()));
        zone
    }

    /// Decides about one request: at once, without waiting for anything.
    pub(super) fn decide(&self, bytes: &[u8], client: IpAddr, transport: Transport) -> Decision {
        let begun = Instant::now();
        let request = match parse(bytes) {
            Parsed::Request(request) => *request,
            Parsed::Malformed(response) => return reply_with(encode(*response, None, transport)),
            Parsed::Ignore => return Decision::Silent,
        };
        if let Some(code) = refuse(&request) {
            let response = reply(&request, code);
            return reply_with(encode(response, Some(&request), transport));
        }
        let Some(query) = request.queries.first().cloned() else {
            return Decision::Silent;
        };
        let zone = self.zone();
        let cluster = zone.is_own(query.name());
        self.counters
            .request(cluster, transport, query.query_type());
        if !cluster && self.forwarder.has_looped(query.name()) {
            let response = reply(&request, ResponseCode::Refused);
            return reply_with(encode(response, Some(&request), transport));
        }
        let (query, aliases, walk) = match local(&zone, &request, query.clone()) {
            Local::Upstream { aliases, query } => (query, aliases, None),
            Local::Whole(response) => {
                let names = match response.metadata.response_code {
                    ResponseCode::NXDomain => self.searched(&zone, &query, client),
                    _ => None,
                };
                let Some(names) = names else {
                    return self.send(response, &request, transport, begun);
                };
                let walk = Walk {
                    names: names.into(),
                    name: query.name().clone(),
                    nothing: response,
                };
                (query, Vec::new(), Some(walk))
            }
        };
        let mut pending = Pending {
            request,
            transport,
            begun,
            query,
            aliases,
            walk,
        };
        let mut response = self.step(&zone, &mut pending);
        // What upstream has said before is answered as quickly as the cluster's names.
        while response.is_none()
            && let Some(answer) = self.forwarder.known(&pending.query, &pending.request)
        {
            response = self.advance(&zone, &mut pending, answer);
        }
        match response {
            Some(response) => self.send(response, &pending.request, transport, begun),
            None => Decision::Ask(Box::new(pending)),
        }
    }

    /// Asks upstream and completes the answer. Bounded in time.
    pub(super) async fn finish(&self, mut pending: Box<Pending>) -> Option<Vec<u8>> {
        let asked = tokio::time::timeout(WALK_TIMEOUT, self.complete(&mut pending)).await;
        let request = &pending.request;
        let response = asked.unwrap_or_else(|_| reply(request, ResponseCode::ServFail));
        match self.send(response, request, pending.transport, pending.begun) {
            Decision::Reply(bytes) => Some(bytes),
            _ => None,
        }
    }

    async fn complete(&self, pending: &mut Pending) -> Message {
        loop {
            let answer = self.forwarder.ask(&pending.query, &pending.request).await;
            let answer = match answer {
                Ok(answer) => answer,
                Err(error) => {
                    tracing::debug!(%error, "question not answered");
                    return reply(&pending.request, ResponseCode::ServFail);
                }
            };
            if let Some(response) = self.advance(&self.zone(), pending, answer) {
                return response;
            }
        }
    }

    /// Takes upstream's answer to `pending.query`: a response, or none when that is now another
    /// question to upstream.
    fn advance(&self, zone: &Zone, pending: &mut Pending, answer: Message) -> Option<Message> {
        let code = answer.metadata.response_code;
        if pending.walk.is_some() && code == ResponseCode::NXDomain {
            return self.step(zone, pending);
        }
        let mut response = reply(&pending.request, plain(code));
        if !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
            return Some(response);
        }
        // Validated by upstream, which knows nothing of our aliases.
        response.metadata.authentic_data =
            answer.metadata.authentic_data && pending.aliases.is_empty() && pending.walk.is_none();
        response.metadata.truncation = answer.metadata.truncation;
        let mut found = std::mem::take(&mut pending.aliases);
        found.extend(answer.answers);
        response.answers = self.aliased(pending, found);
        response.authorities = answer.authorities;
        response.additionals = answer.additionals;
        Some(response)
    }

    /// Goes on along a search list: a response, or none when upstream is to be asked for
    /// `pending.query`.
    fn step(&self, zone: &Zone, pending: &mut Pending) -> Option<Message> {
        let kind = pending.query.query_type();
        loop {
            let walk = pending.walk.as_mut()?;
            let Some(name) = walk.names.pop_front() else {
                return Some(walk.nothing.clone());
            };
            walk.name = name.clone();
            match local(zone, &pending.request, Query::query(name, kind)) {
                Local::Upstream { aliases, query } => {
                    (pending.aliases, pending.query) = (aliases, query);
                    return None;
                }
                Local::Whole(response)
                    if response.metadata.response_code == ResponseCode::NXDomain => {}
                Local::Whole(mut response) => {
                    let found = std::mem::take(&mut response.answers);
                    response.answers = self.aliased(pending, found);
                    return Some(response);
                }
            }
        }
    }

    /// With the alias from the asked name to the one that the search list has found.
    fn aliased(&self, pending: &Pending, mut found: Vec<Record>) -> Vec<Record> {
        if let (Some(walk), Some(asked)) = (&pending.walk, pending.request.queries.first()) {
            self.counters.one_hop.add();
            let shortest = found.iter().map(|record| record.ttl).min();
            let ttl_s = shortest.unwrap_or(1).min(SEARCH_TTL_S);
            let data = RData::CNAME(CNAME(walk.name.clone()));
            found.insert(0, Record::from_rdata(asked.name().clone(), ttl_s, data));
        }
        found
    }

    /// What the client will try next, if it is a pod that goes through its search list.
    fn searched(&self, zone: &Zone, query: &Query, client: IpAddr) -> Option<Vec<Name>> {
        let is_address = matches!(query.query_type(), RecordType::A | RecordType::AAAA);
        if !is_address || zone.is_of_service(query.name()) {
            return None;
        }
        let lists = self.lists(zone.view());
        let list = lists.lists.list(client, client == self.own, query.name())?;
        candidates(query.name(), list)
    }

    /// Made anew when the pods, the settings or the node's resolv.conf have changed.
    fn lists(&self, view: &Arc<View>) -> Arc<Lists> {
        let node = self.node();
        let pods = Arc::downgrade(&view.pods);
        let settings = Arc::downgrade(&view.settings);
        if let Some(lists) = self.lists.load_full()
            && Weak::ptr_eq(&lists.pods, &pods)
            && Weak::ptr_eq(&lists.settings, &settings)
            && lists.node == node
        {
            return lists;
        }
        let made = Arc::new(Lists {
            lists: SearchLists::of(view, &node),
            pods,
            settings,
            node,
        });
        self.lists.store(Some(made.clone()));
        made
    }

    fn node(&self) -> Arc<str> {
        let mut node = lock(&self.node);
        match &*node {
            Some(file) if file.read.elapsed() < NODE_AGE_MAX => file.text.clone(),
            _ => {
                let text: Arc<str> = (self.read_node)().into();
                *node = Some(NodeFile {
                    text: text.clone(),
                    read: Instant::now(),
                });
                text
            }
        }
    }

    fn send(
        &self,
        response: Message,
        request: &Message,
        transport: Transport,
        begun: Instant,
    ) -> Decision {
        let name = request.queries.first().map(Query::name);
        let cluster = name.is_some_and(|name| self.zone().is_own(name));
        let code = response.metadata.response_code;
        self.counters.response(cluster, code, begun.elapsed());
        reply_with(encode(response, Some(request), transport))
    }
}

/// Follows the cluster's names from `query` as far as they go.
fn local(zone: &Zone, request: &Message, mut query: Query) -> Local {
    let mut response = reply(request, ResponseCode::NoError);
    response.metadata.authoritative = true;
    for _ in 0..ALIAS_DEPTH_MAX {
        match zone.answer(&query) {
            Answer::Found {
                mut answers,
                mut additionals,
            } => {
                // Clients take the first: everyone gets another one.
                answers.shuffle(&mut rand::rng());
                additionals.shuffle(&mut rand::rng());
                if answers.is_empty() {
                    response.authorities = vec![zone.soa(query.name())];
                }
                response.answers.append(&mut answers);
                response.additionals = additionals;
                return Local::Whole(response);
            }
            Answer::NoName => {
                response.metadata.response_code = ResponseCode::NXDomain;
                response.authorities = vec![zone.soa(query.name())];
                return Local::Whole(response);
            }
            Answer::NotReady => return Local::Whole(reply(request, ResponseCode::ServFail)),
            Answer::Alias { record, target } => {
                response.answers.push(record);
                query = Query::query(target, query.query_type());
            }
            Answer::Forward => {
                return Local::Upstream {
                    aliases: response.answers,
                    query,
                };
            }
        }
    }
    // A circle of aliases.
    Local::Whole(reply(request, ResponseCode::ServFail))
}

enum Parsed {
    Request(Box<Message>),
    Malformed(Box<Message>),
    Ignore,
}

fn parse(bytes: &[u8]) -> Parsed {
    let [id_high, id_low, flags, ..] = bytes else {
        return Parsed::Ignore;
    };
    // QR: a response, and nobody was asked here.
    if bytes.len() < HEADER_SIZE || flags & 0x80 != 0 {
        return Parsed::Ignore;
    }
    match Message::from_vec(bytes) {
        Ok(message) if message.metadata.message_type == MessageType::Query => {
            Parsed::Request(Box::new(message))
        }
        Ok(_) => Parsed::Ignore,
        Err(_) => {
            let id = u16::from_be_bytes([*id_high, *id_low]);
            let op_code = OpCode::from_u8((flags >> 3) & 0x0f);
            // The body of another operation need not be one that we can read.
            let code = match op_code {
                OpCode::Query => ResponseCode::FormErr,
                _ => ResponseCode::NotImp,
            };
            Parsed::Malformed(Box::new(Message::error_msg(id, op_code, code)))
        }
    }
}

/// What is refused before the question is looked at.
fn refuse(request: &Message) -> Option<ResponseCode> {
    if request.metadata.op_code != OpCode::Query {
        return Some(ResponseCode::NotImp);
    }
    let [query] = request.queries.as_slice() else {
        return Some(ResponseCode::FormErr);
    };
    if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return Some(ResponseCode::BADVERS);
    }
    let transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
    if transfer || query.query_class() != DNSClass::IN {
        return Some(ResponseCode::Refused);
    }
    None
}

/// Codes beyond the header's four bits need an OPT record of upstream's, which is not the client's.
fn plain(code: ResponseCode) -> ResponseCode {
    match u16::from(code) {
        0..16 => code,
        _ => ResponseCode::ServFail,
    }
}

/// An empty response to `request`.
fn reply(request: &Message, code: ResponseCode) -> Message {
    let mut response = Message::response(request.metadata.id, request.metadata.op_code);
    response.metadata.recursion_desired = request.metadata.recursion_desired;
    response.metadata.checking_disabled = request.metadata.checking_disabled;
    response.metadata.recursion_available = true;
    response.metadata.response_code = code;
    // One question at most: that is all that was looked at. Spelled as the client did (0x20).
    response.queries = request.queries.iter().take(1).cloned().collect();
    response
}

fn reply_with(encoded: Option<Vec<u8>>) -> Decision {
    encoded.map_or(Decision::Silent, Decision::Reply)
}

/// SERVFAIL to a request that there is no room for.
pub(super) fn too_busy(pending: &Pending) -> Option<Vec<u8>> {
    let response = reply(&pending.request, ResponseCode::ServFail);
    encode(response, Some(&pending.request), pending.transport)
}

/// How many bytes the client takes.
fn size_limit(request: Option<&Message>, transport: Transport) -> usize {
    match (transport, request.and_then(|request| request.edns.as_ref())) {
        (Transport::Tcp, _) => usize::from(u16::MAX),
        (Transport::Udp, None) => UDP_SIZE_MIN,
        (Transport::Udp, Some(edns)) => {
            usize::from(edns.max_payload()).clamp(UDP_SIZE_MIN, UDP_SIZE_MAX)
        }
    }
}

fn encode(
    mut response: Message,
    request: Option<&Message>,
    transport: Transport,
) -> Option<Vec<u8>> {
    // EDNS is between neighbours: the client's question decides, not the upstream's answer.
    response.edns = request
        .and_then(|request| request.edns.as_ref())
        .map(|asked| {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_SIZE_MAX as u16);
            edns.set_dnssec_ok(asked.flags().dnssec_ok);
            edns
        });
    let limit = size_limit(request, transport);
    let whole = response.to_vec().ok().filter(|bytes| bytes.len() <= limit);
    whole.or_else(|| {
        // Additional records are a courtesy; without them it may fit (RFC 2181, 9).
        let additionals: Vec<Record> = std::mem::take(&mut response.additionals);
        let shorter = (!additionals.is_empty())
            .then(|| response.to_vec().ok())
            .flatten();
        shorter
            .filter(|bytes| bytes.len() <= limit)
            .or_else(|| response.truncate().to_vec().ok())
    })
}
