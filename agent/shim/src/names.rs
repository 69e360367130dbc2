//! What is said about names while there is no agent. Pure: a query and a file give an answer.
//!
//! The agent writes the file [`FILE`] beside the sockets that the holder keeps:
//! ```text
//! domain cluster.local
//! upstream 192.0.2.53:53
//! web.shop 10.96.0.7 fd96::7 *           <name>.<namespace>; * is for the names of its backends
//! db.shop 10.244.1.5                     headless
//! db-0.db.shop 10.244.1.5                a backend of it
//! ext.shop =                             an alias
//! ```
//! Addresses of Services and of backends of headless ones are all that is known; types and names that
//! the file cannot hold (SRV, aliases, names of addresses) get SERVFAIL, so that nobody takes them for
//! absent. The rest of the cluster's names do not exist, and other names are for upstream. A search
//! list is gone through by the client itself.
//!
//! Found by a search through the text, not an index: hundreds of microseconds for ten thousand
//! Services, and nothing to keep in memory while the agent lives.

use std::net::IpAddr;

/// Beside the holder's socket.
pub const FILE: &str = "names";
/// Line with the cluster's domain.
pub const DOMAIN: &str = "domain ";
/// Lines with servers for other names, the best first.
pub const UPSTREAM: &str = "upstream ";
/// Instead of addresses: an alias for another name.
pub const ALIAS: &str = "=";
/// Beside addresses: there are names below this one that the file does not have.
pub const MORE: &str = "*";

/// How long an answer may be cached, in seconds: it may be older than its Service.
const TTL_S: u32 = 1;
/// What every client takes over UDP (RFC 1035), in bytes.
const SIZE_MAX: usize = 512;
const HEADER_SIZE: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;

const NO_ERROR: u8 = 0;
const FORM_ERR: u8 = 1;
const SERV_FAIL: u8 = 2;
const NX_DOMAIN: u8 = 3;
const NOT_IMP: u8 = 4;
const REFUSED: u8 = 5;

/// What to do about a query.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Nothing: it is no query.
    Silent,
    /// Send this.
    Reply(Vec<u8>),
    /// Ask an upstream server the same.
    Relay,
}

struct Question {
    /// Lower case; none: not letters, digits, `-` and `_`, so nobody's.
    labels: Vec<Option<String>>,
    kind: u16,
    class: u16,
    /// Where the question section ends.
    end: usize,
}

/// Answers one query.
///
/// * `text` – the file.
pub fn answer(text: &str, query: &[u8]) -> Answer {
    if query.len() < HEADER_SIZE || query[2] & 0x80 != 0 {
        return Answer::Silent;
    }
    if query[2] & 0x78 != 0 {
        return refusal(query, NOT_IMP);
    }
    let Some(question) = question(query) else {
        return refusal(query, FORM_ERR);
    };
    let code = |code| Answer::Reply(reply(query, &question, code, &[]));
    if question.class != CLASS_IN {
        return code(REFUSED);
    }
    let Some(domain) = field(text, DOMAIN).next() else {
        return code(SERV_FAIL);
    };
    let Some(below) = below(&question.labels, domain) else {
        return Answer::Relay;
    };
    let Some(below) = below.iter().cloned().collect::<Option<Vec<String>>>() else {
        return code(NX_DOMAIN);
    };
    let Some((kind, rest)) = below.split_last() else {
        return code(NO_ERROR);
    };
    let is_address = matches!(question.kind, TYPE_A | TYPE_AAAA);
    match (kind.as_str(), rest) {
        // The service and namespace of a port's name, an address in a name.
        ("pod", [_, _]) => code(SERV_FAIL),
        ("svc", [_, ..]) if !is_address => code(SERV_FAIL),
        ("svc", []) | ("pod", [] | [_]) => code(NO_ERROR),
        ("svc", rest) => match find(text, &rest.join(".")) {
            Some(ALIAS) => code(SERV_FAIL),
            Some(addresses) => {
                let addresses = addresses.split(' ').filter_map(|word| word.parse().ok());
                let wanted = |ip: &IpAddr| ip.is_ipv4() == (question.kind == TYPE_A);
                let addresses: Vec<IpAddr> = addresses.filter(wanted).collect();
                Answer::Reply(reply(query, &question, NO_ERROR, &addresses))
            }
            None => match rest {
                [_, service @ ..] if has_more(text, &service.join(".")) => code(SERV_FAIL),
                _ => code(NX_DOMAIN),
            },
        },
        _ => code(NX_DOMAIN),
    }
}

/// The values of lines that begin with `key`.
pub fn field<'a>(text: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    // They come first: before any name.
    let head = text
        .lines()
        .take_while(|line| line.starts_with(DOMAIN) || line.starts_with(UPSTREAM));
    head.filter_map(move |line| line.strip_prefix(key))
}

/// What the file says about a name.
fn find<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let key = format!("\n{name} ");
    let start = text.find(&key)? + key.len();
    text[start..].lines().next()
}

fn has_more(text: &str, name: &str) -> bool {
    find(text, name).is_some_and(|words| words.split(' ').any(|word| word == MORE))
}

/// The labels before the domain; none when the name is elsewhere.
fn below<'a>(labels: &'a [Option<String>], domain: &str) -> Option<&'a [Option<String>]> {
    let domain: Vec<&str> = domain.split('.').collect();
    let depth = labels.len().checked_sub(domain.len())?;
    let (below, end) = labels.split_at(depth);
    let same = end
        .iter()
        .zip(&domain)
        .all(|(label, domain)| label.as_deref() == Some(*domain));
    same.then_some(below)
}

/// The one question of a query.
fn question(query: &[u8]) -> Option<Question> {
    if query.get(4..6)? != [0, 1] {
        return None;
    }
    let (mut labels, mut at) = (Vec::new(), HEADER_SIZE);
    loop {
        let size = usize::from(*query.get(at)?);
        at += 1;
        if size == 0 {
            break;
        }
        // A pointer has no business in the first name.
        if size > 63 || at + size - HEADER_SIZE > 254 {
            return None;
        }
        let label = query.get(at..at + size)?;
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let text = label.iter().all(plain).then(|| {
            let lower = label
                .iter()
                .map(|byte| char::from(byte.to_ascii_lowercase()));
            lower.collect::<String>()
        });
        labels.push(text);
        at += size;
    }
    let rest = query.get(at..at + 4)?;
    Some(Question {
        labels,
        kind: u16::from_be_bytes([rest[0], rest[1]]),
        class: u16::from_be_bytes([rest[2], rest[3]]),
        end: at + 4,
    })
}

/// Query and response bits: the client's opcode and RD.
fn header(query: &[u8], code: u8, counts: [u16; 2]) -> Vec<u8> {
    let mut header = query[..2].to_vec();
    header.extend([0x80 | query[2] & 0x79, 0x80 | code]);
    header.extend(counts.iter().flat_map(|count| count.to_be_bytes()));
    header.extend([0; 4]);
    header
}

fn refusal(query: &[u8], code: u8) -> Answer {
    Answer::Reply(header(query, code, [0, 0]))
}

/// As many addresses as every client takes: some are as good as all, and TCP waits for the agent.
fn reply(query: &[u8], question: &Question, code: u8, addresses: &[IpAddr]) -> Vec<u8> {
    let room = SIZE_MAX.saturating_sub(question.end);
    let record_size = if question.kind == TYPE_A { 16 } else { 28 };
    let addresses = &addresses[..addresses.len().min(room / record_size)];
    let mut reply = header(query, code, [1, addresses.len() as u16]);
    reply.extend_from_slice(&query[HEADER_SIZE..question.end]);
    for address in addresses {
        // The question's name, type, class.
        reply.extend([0xc0, HEADER_SIZE as u8]);
        reply.extend(question.kind.to_be_bytes());
        reply.extend(CLASS_IN.to_be_bytes());
        reply.extend(TTL_S.to_be_bytes());
        match address {
            IpAddr::V4(ip) => {
                reply.extend([0, 4]);
                reply.extend(ip.octets());
            }
            IpAddr::V6(ip) => {
                reply.extend([0, 16]);
                reply.extend(ip.octets());
            }
        }
    }
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "domain cluster.local\nupstream 192.0.2.53:53\n\
        web.shop 10.96.0.7 fd96::7 *\ndb.shop 10.244.0.5 10.244.0.6\ndb-0.db.shop 10.244.0.5\n\
        ext.shop =\nempty.shop \n";

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut query = vec![7, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.').filter(|label| !label.is_empty()) {
            query.push(label.len() as u8);
            query.extend(label.as_bytes());
        }
        query.extend([0]);
        query.extend(kind.to_be_bytes());
        query.extend([0, 1]);
        query
    }

    /// Code and number of answers.
    fn said(name: &str, kind: u16) -> Option<(u8, u16)> {
        let query = query(name, kind);
        match answer(TEXT, &query) {
            Answer::Reply(reply) => {
                assert_eq!(reply[..2], query[..2]);
                assert_eq!(reply[12..query.len()], query[12..], "the client's spelling");
                Some((reply[3] & 15, u16::from_be_bytes([reply[6], reply[7]])))
            }
            Answer::Relay => None,
            Answer::Silent => panic!("silent about {name}"),
        }
    }

    #[test]
    fn addresses_of_services_and_backends_are_known() {
        assert_eq!(said("web.shop.svc.cluster.local", TYPE_A), Some((0, 1)));
        assert_eq!(said("WEB.Shop.svc.Cluster.local", TYPE_AAAA), Some((0, 1)));
        assert_eq!(said("db.shop.svc.cluster.local", TYPE_A), Some((0, 2)));
        assert_eq!(said("db.shop.svc.cluster.local", TYPE_AAAA), Some((0, 0)));
        assert_eq!(said("db-0.db.shop.svc.cluster.local", TYPE_A), Some((0, 1)));
        assert_eq!(said("empty.shop.svc.cluster.local", TYPE_A), Some((0, 0)));
        let Answer::Reply(reply) = answer(TEXT, &query("web.shop.svc.cluster.local", TYPE_A))
        else {
            panic!("no reply");
        };
        assert!(reply.ends_with(&[0, 4, 10, 96, 0, 7]));
    }

    #[test]
    fn what_does_not_exist_is_told_from_what_is_not_known() {
        for name in [
            "no.shop.svc.cluster.local",
            "eb.shop.svc.cluster.local",
            "example.org.shop.svc.cluster.local",
            "example.org.svc.cluster.local",
            "example.org.cluster.local",
            "x!.shop.svc.cluster.local",
        ] {
            assert_eq!(said(name, TYPE_A), Some((3, 0)), "{name}");
        }
        for (name, kind) in [
            ("ext.shop.svc.cluster.local", TYPE_A),
            ("10-244-0-9.web.shop.svc.cluster.local", TYPE_A),
            ("_http._tcp.web.shop.svc.cluster.local", 33),
            ("10-244-0-5.shop.pod.cluster.local", TYPE_A),
        ] {
            assert_eq!(said(name, kind), Some((2, 0)), "{name}");
        }
        for name in ["example.org", "cluster.local.example.org", "local", ""] {
            assert_eq!(said(name, TYPE_A), None, "{name}");
        }
        assert_eq!(said("cluster.local", TYPE_A), Some((0, 0)));
        assert_eq!(field(TEXT, UPSTREAM).collect::<Vec<_>>(), ["192.0.2.53:53"]);
    }

    #[test]
    fn more_addresses_than_fit_are_left_out() {
        let many: Vec<String> = (0..200).map(|n| format!("10.0.0.{n}")).collect();
        let text = format!("domain cluster.local\nbig.shop {}\n", many.join(" "));
        let Answer::Reply(reply) = answer(&text, &query("big.shop.svc.cluster.local", TYPE_A))
        else {
            panic!("no reply");
        };
        assert!(reply.len() <= SIZE_MAX && reply.len() > SIZE_MAX - 16);
    }

    #[test]
    fn no_packet_harms() {
        let mut seed = 1u64;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize
        };
        for _ in 0..200_000 {
            let mut packet = query("_http._tcp.web.shop.svc.cluster.local", TYPE_A);
            for _ in 0..next() % 5 {
                let at = next() % packet.len();
                packet[at] = next() as u8;
            }
            packet.truncate(next() % (packet.len() + 1));
            match answer(TEXT, &packet) {
                Answer::Silent => assert!(packet.len() < 12 || packet[2] & 0x80 != 0),
                Answer::Reply(reply) => {
                    assert!(reply.len() <= SIZE_MAX.max(packet.len()) && reply[2] & 0x80 != 0);
                    assert_eq!(reply[..2], packet[..2]);
                }
                Answer::Relay => {}
            }
        }
    }
}
