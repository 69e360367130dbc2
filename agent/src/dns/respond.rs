//! From request bytes to response bytes, whatever the request.
//!
//! Malformed packets get FORMERR if they can be answered at all; a response is never answered (two
//! resolvers would talk for ever). Answers that exceed what the client takes are sent empty with
//! the truncation bit, so that it comes again over TCP.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Record, RecordType};
use rand::seq::SliceRandom;
use tokio::sync::watch;

use super::forward::{Forwarder, Transport};
use super::zone::{Answer, Zone};
use crate::view::View;

/// What a client without EDNS takes over UDP (RFC 1035), in bytes.
const UDP_SIZE_MIN: usize = 512;
/// What we send and take over UDP: no fragments on common links (DNS flag day 2020), in bytes.
pub(super) const UDP_SIZE_MAX: usize = 1232;
/// Aliases followed for one question.
const ALIAS_DEPTH_MAX: usize = 8;
/// A DNS header, in bytes: less cannot be answered.
const HEADER_SIZE: usize = 12;

/// Answers requests from the newest view and from upstream.
pub(super) struct Responder {
    view: watch::Receiver<Arc<View>>,
    zone: ArcSwapOption<Zone>,
    forwarder: Forwarder,
}

impl Responder {
    /// * `view` – where the cluster's names come from.
    pub(super) fn new(view: watch::Receiver<Arc<View>>, forwarder: Forwarder) -> Self {
        Self {
            view,
            zone: ArcSwapOption::empty(),
            forwarder,
        }
    }

    /// The zone of the newest view; made anew only when that has changed.
    fn zone(&self) -> Arc<Zone> {
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

    /// Answers one request; none: say nothing.
    pub(super) async fn respond(&self, bytes: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let request = match parse(bytes) {
            Parsed::Request(request) => request,
            Parsed::Malformed(response) => return encode(&response, None, transport),
            Parsed::Ignore => return None,
        };
        let response = match refuse(&request) {
            Some(code) => reply(&request, code),
            None => self.answer(&request, transport).await,
        };
        encode(&response, Some(&request), transport)
    }

    async fn answer(&self, request: &Message, transport: Transport) -> Message {
        let Some(query) = request.queries.first() else {
            return reply(request, ResponseCode::FormErr);
        };
        let zone = self.zone();
        let mut response = reply(request, ResponseCode::NoError);
        let mut query = query.clone();
        for depth in 0..ALIAS_DEPTH_MAX {
            match zone.answer(&query) {
                Answer::Found {
                    mut answers,
                    mut additionals,
                } => {
                    response.metadata.authoritative = true;
                    // Clients take the first: everyone gets another one.
                    answers.shuffle(&mut rand::rng());
                    additionals.shuffle(&mut rand::rng());
                    let empty = answers.is_empty();
                    response.answers.append(&mut answers);
                    response.additionals = additionals;
                    if empty {
                        response.authorities = vec![zone.soa()];
                    }
                    return response;
                }
                Answer::NoName => {
                    response.metadata.authoritative = true;
                    response.metadata.response_code = ResponseCode::NXDomain;
                    response.authorities = vec![zone.soa()];
                    return response;
                }
                Answer::NotReady => return reply(request, ResponseCode::ServFail),
                Answer::Alias { record, target } => {
                    response.metadata.authoritative = true;
                    response.answers.push(record);
                    query = Query::query(target, query.query_type());
                }
                Answer::Forward if depth == 0 => return self.forward(request, transport).await,
                Answer::Forward => {
                    self.follow(&mut response, query, transport).await;
                    return response;
                }
            }
        }
        // A circle of aliases.
        reply(request, ResponseCode::ServFail)
    }

    async fn forward(&self, request: &Message, transport: Transport) -> Message {
        match self.forwarder.ask(request, transport).await {
            Ok(mut answer) => {
                answer.metadata.recursion_available = true;
                answer
            }
            Err(error) => {
                tracing::debug!(%error, "question not answered");
                reply(request, ResponseCode::ServFail)
            }
        }
    }

    /// Appends what upstream says about the target of an alias.
    async fn follow(&self, response: &mut Message, query: Query, transport: Transport) {
        let mut question = Message::query();
        question.add_query(query);
        let mut answer = self.forward(&question, transport).await;
        if answer.metadata.truncation && transport == Transport::Udp {
            answer = self.forward(&question, Transport::Tcp).await;
        }
        response.metadata.response_code = answer.metadata.response_code;
        response.metadata.authoritative = false;
        response.answers.append(&mut answer.answers);
        response.authorities = answer.authorities;
    }
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
            let response = Message::error_msg(id, op_code, ResponseCode::FormErr);
            Parsed::Malformed(Box::new(response))
        }
    }
}

/// What is refused before the question is looked at.
fn refuse(request: &Message) -> Option<ResponseCode> {
    let [query] = request.queries.as_slice() else {
        return Some(ResponseCode::FormErr);
    };
    if request.metadata.op_code != OpCode::Query {
        return Some(ResponseCode::NotImp);
    }
    if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return Some(ResponseCode::BADVERS);
    }
    let transfer = matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR);
    if transfer || query.query_class() != DNSClass::IN {
        return Some(ResponseCode::Refused);
    }
    None
}

/// An empty response to `request`.
fn reply(request: &Message, code: ResponseCode) -> Message {
    let mut response = Message::response(request.metadata.id, request.metadata.op_code);
    response.metadata.recursion_desired = request.metadata.recursion_desired;
    response.metadata.checking_disabled = request.metadata.checking_disabled;
    response.metadata.recursion_available = true;
    response.metadata.response_code = code;
    // One question at most: that is all that was looked at.
    response.queries = request.queries.iter().take(1).cloned().collect();
    response
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

fn encode(response: &Message, request: Option<&Message>, transport: Transport) -> Option<Vec<u8>> {
    let mut response = response.clone();
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
