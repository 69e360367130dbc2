//! A small cache of upstream answers. Pure: the time is an argument.
//!
//! ```text
//! put ─► fresh ─ TTL, at most 30 s ─► stale ─ 1 h ─► gone
//! ```
//! Stale answers are for when upstream gives none (RFC 8767), and then live 30 s with the client.
//!
//! Invariants: at most [`ENTRY_COUNT_MAX`] entries and [`SIZE_MAX_BYTES`], what was not asked for
//! lately leaves first (CLOCK); nothing is fresh longer than its shortest TTL nor than [`TTL_MAX`];
//! failures and truncated answers never enter.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};

/// Entries kept.
pub(super) const ENTRY_COUNT_MAX: usize = 2048;
/// Bytes of answers kept, as they were on the wire.
pub(super) const SIZE_MAX_BYTES: usize = 384 << 10;
/// An answer is fresh at most this long: the node's resolver is a shield, not an archive.
pub(super) const TTL_MAX: Duration = Duration::from_secs(30);
/// "Does not exist" is fresh at most this long.
pub(super) const NEGATIVE_TTL_MAX: Duration = Duration::from_secs(5);
/// How long an answer may be used after that, when there is no other.
pub(super) const STALE_MAX: Duration = Duration::from_secs(3600);
/// What a client may do with a stale answer (RFC 8767, 4), in seconds.
const STALE_TTL_S: u32 = 30;

/// What makes two questions the same.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Question {
    /// Lower case.
    pub(super) name: Name,
    pub(super) kind: RecordType,
    pub(super) class: DNSClass,
    pub(super) dnssec_ok: bool,
    pub(super) checking_disabled: bool,
}

impl Question {
    /// `request`: its EDNS and its CD bit count.
    pub(super) fn of(query: &Query, request: &Message) -> Self {
        Self {
            name: query.name().to_lowercase(),
            kind: query.query_type(),
            class: query.query_class(),
            dnssec_ok: request
                .edns
                .as_ref()
                .is_some_and(|edns| edns.flags().dnssec_ok),
            checking_disabled: request.metadata.checking_disabled,
        }
    }
}

/// How good a cached answer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Age {
    Fresh,
    /// Only if there is no other.
    Stale,
}

struct Entry {
    /// On the wire: a tenth of what it takes as a [`Message`].
    bytes: Box<[u8]>,
    denial: bool,
    stored: Instant,
    fresh: Duration,
    /// Since the hand came by.
    used: bool,
}

/// The cache.
#[derive(Default)]
pub(super) struct Cache {
    entries: HashMap<Arc<Question>, Entry>,
    order: VecDeque<Arc<Question>>,
    size_bytes: usize,
}

impl Cache {
    /// The answer with what is left of its TTLs.
    pub(super) fn get(&mut self, question: &Question, now: Instant) -> Option<(Message, Age)> {
        let entry = self.entries.get_mut(question)?;
        let age = now.duration_since(entry.stored);
        if age >= entry.fresh + STALE_MAX {
            return None;
        }
        entry.used = true;
        let mut message = Message::from_vec(&entry.bytes).ok()?;
        let is_fresh = age < entry.fresh;
        let age_s = age.as_secs() as u32;
        let sections = [
            &mut message.answers,
            &mut message.authorities,
            &mut message.additionals,
        ];
        for record in sections.into_iter().flatten() {
            record.ttl = if is_fresh {
                record.ttl.saturating_sub(age_s)
            } else {
                STALE_TTL_S
            };
        }
        Some((message, if is_fresh { Age::Fresh } else { Age::Stale }))
    }

    /// Keeps an answer, if it may be kept.
    pub(super) fn put(&mut self, question: &Question, message: &Message, now: Instant) {
        let Some(fresh) = lifetime(message) else {
            return;
        };
        let Ok(bytes) = message.to_vec() else {
            return;
        };
        let entry = Entry {
            bytes: bytes.into_boxed_slice(),
            denial: message.answers.is_empty(),
            stored: now,
            fresh,
            used: false,
        };
        self.size_bytes += entry.bytes.len();
        let question = Arc::new(question.clone());
        match self.entries.insert(question.clone(), entry) {
            Some(old) => self.size_bytes -= old.bytes.len(),
            None => self.order.push_back(question),
        }
        while self.order.len() > ENTRY_COUNT_MAX || self.size_bytes > SIZE_MAX_BYTES {
            let Some(oldest) = self.order.pop_front() else {
                return;
            };
            match self.entries.get_mut(&oldest) {
                // A second chance, once round.
                Some(entry) if entry.used => {
                    entry.used = false;
                    self.order.push_back(oldest);
                }
                _ => {
                    let gone = self.entries.remove(&oldest);
                    self.size_bytes -= gone.map_or(0, |entry| entry.bytes.len());
                }
            }
        }
    }

    /// Entries: answers, and denials.
    pub(super) fn counts(&self) -> [usize; 2] {
        let denials = self.entries.values().filter(|entry| entry.denial).count();
        [self.entries.len() - denials, denials]
    }
}

/// How long an answer is fresh; none: it is not to be kept at all.
fn lifetime(message: &Message) -> Option<Duration> {
    if message.metadata.truncation {
        return None;
    }
    let positive = message.metadata.response_code == ResponseCode::NoError;
    if !positive && message.metadata.response_code != ResponseCode::NXDomain {
        return None;
    }
    let shortest = message.answers.iter().map(|record| record.ttl).min();
    // RFC 2308: no SOA, no negative caching.
    let soa = message
        .authorities
        .iter()
        .find_map(|record| match &record.data {
            RData::SOA(soa) => Some(soa.minimum.min(record.ttl)),
            _ => None,
        });
    let (ttl_s, max) = match (positive, shortest) {
        (true, Some(ttl_s)) => (ttl_s, TTL_MAX),
        (false, Some(ttl_s)) => (ttl_s.min(soa?), NEGATIVE_TTL_MAX),
        (_, None) => (soa?, NEGATIVE_TTL_MAX),
    };
    let ttl = Duration::from_secs(ttl_s.into()).min(max);
    (!ttl.is_zero()).then_some(ttl)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::op::OpCode;
    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::{A, SOA};
    use proptest::prelude::*;

    use super::*;

    fn question(name: &str) -> (Question, Message) {
        let mut message = Message::response(7, OpCode::Query);
        let name = Name::from_ascii(name).unwrap();
        message.add_query(Query::query(name, RecordType::A));
        (Question::of(&message.queries[0], &message), message)
    }

    fn answered(name: &str, ttl_s: u32) -> (Question, Message) {
        let (key, mut message) = question(name);
        let name = Name::from_ascii(name).unwrap();
        let data = RData::A(A(Ipv4Addr::LOCALHOST));
        message.add_answer(Record::from_rdata(name, ttl_s, data));
        (key, message)
    }

    fn fresh(cache: &mut Cache, key: &Question, now: Instant) -> Option<Message> {
        let (message, age) = cache.get(key, now)?;
        (age == Age::Fresh).then_some(message)
    }

    #[test]
    fn answers_age_get_stale_and_go() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let (key, message) = answered("WWW.example.", 20);
        cache.put(&key, &message, now);
        let (key, _) = answered("www.EXAMPLE.", 0);
        let aged = fresh(&mut cache, &key, now + Duration::from_secs(15)).unwrap();
        assert_eq!(aged.answers[0].ttl, 5);
        let (stale, age) = cache.get(&key, now + Duration::from_secs(20)).unwrap();
        assert_eq!((stale.answers[0].ttl, age), (STALE_TTL_S, Age::Stale));
        let end = now + Duration::from_secs(20) + STALE_MAX;
        assert!(cache.get(&key, end).is_none());
        let (key, message) = answered("long.example.", 86_400);
        cache.put(&key, &message, now);
        assert!(fresh(&mut cache, &key, now + TTL_MAX).is_none());
    }

    #[test]
    fn a_denial_is_kept_as_long_as_its_soa_says() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let (key, mut denied) = question("no.example.");
        denied.metadata.response_code = ResponseCode::NXDomain;
        cache.put(&key, &denied, now);
        assert!(cache.get(&key, now).is_none(), "without a SOA it is not");
        let root = Name::root();
        let soa = SOA::new(root.clone(), root.clone(), 1, 1, 1, 1, 3);
        denied.add_authority(Record::from_rdata(root, 60, RData::SOA(soa)));
        cache.put(&key, &denied, now);
        assert!(fresh(&mut cache, &key, now + Duration::from_secs(2)).is_some());
        assert!(fresh(&mut cache, &key, now + Duration::from_secs(3)).is_none());
        assert_eq!(cache.counts(), [0, 1]);
    }

    #[test]
    fn what_must_not_be_kept_is_not() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let (key, zero) = answered("a.", 0);
        cache.put(&key, &zero, now);
        let (_, mut truncated) = answered("a.", 9);
        truncated.metadata.truncation = true;
        cache.put(&key, &truncated, now);
        let (_, mut failed) = question("a.");
        failed.metadata.response_code = ResponseCode::ServFail;
        cache.put(&key, &failed, now);
        assert!(cache.get(&key, now).is_none());
    }

    #[test]
    fn what_is_asked_for_outlives_what_is_not() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        for n in 0..ENTRY_COUNT_MAX {
            let (key, message) = answered(&format!("n{n}."), 9);
            cache.put(&key, &message, now);
        }
        assert!(cache.get(&answered("n0.", 0).0, now).is_some());
        for n in ENTRY_COUNT_MAX..ENTRY_COUNT_MAX + 10 {
            let (key, message) = answered(&format!("n{n}."), 9);
            cache.put(&key, &message, now);
        }
        assert_eq!(cache.entries.len(), ENTRY_COUNT_MAX);
        assert!(cache.get(&answered("n0.", 0).0, now).is_some());
        assert!(cache.get(&answered("n10.", 0).0, now).is_none());
        assert!(cache.get(&answered("n11.", 0).0, now).is_some());
    }

    proptest! {
        /// Any order of puts and gets: both bounds hold, and sizes are counted right.
        #[test]
        fn the_cache_is_bounded(steps in proptest::collection::vec((0..60u32, 1..600u32, any::<bool>()), 1..300)) {
            let (mut cache, now) = (Cache::default(), Instant::now());
            for (n, count, asks) in steps {
                let (key, mut message) = answered(&format!("n{n}."), 9);
                for address in 0..count {
                    let name = message.queries[0].name().clone();
                    message.add_answer(Record::from_rdata(name, 9, RData::A(A(address.into()))));
                }
                cache.put(&key, &message, now);
                if asks {
                    cache.get(&key, now);
                }
                let sum: usize = cache.entries.values().map(|entry| entry.bytes.len()).sum();
                prop_assert_eq!(sum, cache.size_bytes);
                prop_assert!(sum <= SIZE_MAX_BYTES && cache.order.len() == cache.entries.len());
            }
        }
    }
}
