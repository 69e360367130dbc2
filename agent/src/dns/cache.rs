//! A small cache of upstream answers. Pure: the time is an argument.
//!
//! Invariants: at most [`ENTRY_COUNT_MAX`] entries, the oldest leaves first; nothing is kept
//! longer than its shortest TTL nor than [`TTL_MAX`]; failures and truncated answers never enter.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};

/// Entries kept.
pub(super) const ENTRY_COUNT_MAX: usize = 2048;
/// An answer is kept at most this long: the node's resolver is a shield, not an archive.
pub(super) const TTL_MAX: Duration = Duration::from_secs(30);
/// "Does not exist" is kept at most this long.
pub(super) const NEGATIVE_TTL_MAX: Duration = Duration::from_secs(5);

/// What makes two questions the same.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct CacheKey {
    name: Name,
    kind: RecordType,
    class: DNSClass,
    dnssec_ok: bool,
    checking_disabled: bool,
}

impl CacheKey {
    /// None when the message is no plain question.
    pub(super) fn of(request: &Message) -> Option<Self> {
        let query = request.queries.first()?;
        Some(Self {
            name: query.name().to_lowercase(),
            kind: query.query_type(),
            class: query.query_class(),
            dnssec_ok: request
                .edns
                .as_ref()
                .is_some_and(|edns| edns.flags().dnssec_ok),
            checking_disabled: request.metadata.checking_disabled,
        })
    }
}

struct Entry {
    message: Message,
    stored: Instant,
    expires: Instant,
}

/// The cache.
#[derive(Default)]
pub(super) struct Cache {
    entries: HashMap<CacheKey, Entry>,
    order: VecDeque<CacheKey>,
}

impl Cache {
    /// The answer with what is left of its TTLs. The id is that of the stored message.
    pub(super) fn get(&self, key: &CacheKey, now: Instant) -> Option<Message> {
        let entry = self.entries.get(key).filter(|entry| now < entry.expires)?;
        let age_s = now.duration_since(entry.stored).as_secs() as u32;
        let mut message = entry.message.clone();
        let sections = [
            &mut message.answers,
            &mut message.authorities,
            &mut message.additionals,
        ];
        for record in sections.into_iter().flatten() {
            record.decrement_ttl(age_s.min(record.ttl));
        }
        Some(message)
    }

    /// Keeps an answer, if it may be kept.
    pub(super) fn put(&mut self, key: CacheKey, message: &Message, now: Instant) {
        let Some(ttl) = lifetime(message) else {
            return;
        };
        let entry = Entry {
            message: message.clone(),
            stored: now,
            expires: now + ttl,
        };
        if self.entries.insert(key.clone(), entry).is_none() {
            self.order.push_back(key);
        }
        while self.order.len() > ENTRY_COUNT_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.entries.remove(&oldest);
            }
        }
    }
}

/// How long an answer may be kept; none: not at all.
fn lifetime(message: &Message) -> Option<Duration> {
    if message.metadata.truncation {
        return None;
    }
    let positive = message.metadata.response_code == ResponseCode::NoError;
    if positive && !message.answers.is_empty() {
        let shortest = message.answers.iter().map(|record| record.ttl).min()?;
        let ttl = Duration::from_secs(shortest.into()).min(TTL_MAX);
        return (!ttl.is_zero()).then_some(ttl);
    }
    if !positive && message.metadata.response_code != ResponseCode::NXDomain {
        return None;
    }
    // RFC 2308: no SOA, no negative caching.
    let soa = message
        .authorities
        .iter()
        .find_map(|record| match &record.data {
            RData::SOA(soa) => Some(soa.minimum.min(record.ttl)),
            _ => None,
        })?;
    let ttl = Duration::from_secs(soa.into()).min(NEGATIVE_TTL_MAX);
    (!ttl.is_zero()).then_some(ttl)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::op::{OpCode, Query};
    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::A;

    use super::*;

    fn question(name: &str) -> (CacheKey, Message) {
        let mut message = Message::response(7, OpCode::Query);
        let name = Name::from_ascii(name).unwrap();
        message.add_query(Query::query(name, RecordType::A));
        (CacheKey::of(&message).unwrap(), message)
    }

    fn answered(name: &str, ttl_s: u32) -> (CacheKey, Message) {
        let (key, mut message) = question(name);
        let name = Name::from_ascii(name).unwrap();
        let data = RData::A(A(Ipv4Addr::LOCALHOST));
        message.add_answer(Record::from_rdata(name, ttl_s, data));
        (key, message)
    }

    #[test]
    fn answers_age_and_expire() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let (key, message) = answered("WWW.example.", 20);
        cache.put(key, &message, now);
        let (key, _) = answered("www.EXAMPLE.", 0);
        let aged = cache.get(&key, now + Duration::from_secs(15)).unwrap();
        assert_eq!(aged.answers[0].ttl, 5);
        assert!(cache.get(&key, now + Duration::from_secs(20)).is_none());
        let (key, message) = answered("long.example.", 86_400);
        cache.put(key.clone(), &message, now);
        assert!(cache.get(&key, now + TTL_MAX).is_none());
    }

    #[test]
    fn what_must_not_be_kept_is_not() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let (key, zero) = answered("a.", 0);
        cache.put(key.clone(), &zero, now);
        let (_, mut truncated) = answered("a.", 9);
        truncated.metadata.truncation = true;
        cache.put(key.clone(), &truncated, now);
        let (_, mut failed) = question("a.");
        failed.metadata.response_code = ResponseCode::ServFail;
        cache.put(key.clone(), &failed, now);
        assert!(cache.get(&key, now).is_none());
    }

    #[test]
    fn the_cache_is_bounded() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        for n in 0..ENTRY_COUNT_MAX + 10 {
            let (key, message) = answered(&format!("n{n}."), 9);
            cache.put(key, &message, now);
        }
        assert_eq!(cache.entries.len(), ENTRY_COUNT_MAX);
        assert!(cache.get(&answered("n9.", 0).0, now).is_none());
        assert!(cache.get(&answered("n10.", 0).0, now).is_some());
    }
}
