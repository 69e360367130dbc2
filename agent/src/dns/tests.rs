//! Over loopback, with real messages; "upstream" is a server of our own.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};

use gantry_api::proto;
use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use imbl::OrdMap;
use proptest::prelude::*;

use super::zone::tests::view;
use super::*;
use crate::view::ServiceName;

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

async fn start(view: Arc<View>, upstreams: Vec<SocketAddr>) -> (Resolver, CancellationToken) {
    let config = ResolverConfig {
        listen: LOOPBACK,
        add_to_loopback: false,
        upstreams: Upstreams::Fixed(upstreams),
    };
    let shutdown = CancellationToken::new();
    let receiver = watch::channel(view).1;
    (
        Resolver::start(config, receiver, shutdown.clone())
            .await
            .unwrap(),
        shutdown,
    )
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

async fn ask_bytes(server: SocketAddr, bytes: &[u8]) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
    socket.send_to(bytes, server).await.unwrap();
    let mut buffer = vec![0; 65_535];
    let answer = tokio::time::timeout(Duration::from_secs(5), socket.recv(&mut buffer)).await;
    answer.ok().map(|size| buffer[..size.unwrap()].to_vec())
}

async fn ask(server: SocketAddr, question: &Message) -> Message {
    let bytes = ask_bytes(server, &question.to_vec().unwrap())
        .await
        .expect("no answer");
    let answer = Message::from_vec(&bytes).unwrap();
    assert_eq!(answer.metadata.id, question.metadata.id);
    answer
}

async fn ask_over_tcp(server: SocketAddr, question: &Message) -> Message {
    let mut stream = TcpStream::connect(server).await.unwrap();
    let bytes = question.to_vec().unwrap();
    stream.write_u16(bytes.len() as u16).await.unwrap();
    stream.write_all(&bytes).await.unwrap();
    let mut buffer = vec![0; usize::from(stream.read_u16().await.unwrap())];
    stream.read_exact(&mut buffer).await.unwrap();
    Message::from_vec(&buffer).unwrap()
}

fn addresses(message: &Message) -> Vec<String> {
    let mut texts: Vec<_> = message.answers.iter().map(|r| r.data.to_string()).collect();
    texts.sort();
    texts
}

/// An upstream that answers every A question with 192.0.2.1 and counts them.
async fn upstream() -> (SocketAddr, Arc<AtomicUsize>) {
    let tcp = TcpListener::bind(LOOPBACK).await.unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(address).await.unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    fn answer(bytes: &[u8]) -> Vec<u8> {
        let question = Message::from_vec(bytes).unwrap();
        let mut answer = Message::response(question.metadata.id, OpCode::Query);
        answer.queries.clone_from(&question.queries);
        let data = RData::A(A(Ipv4Addr::new(192, 0, 2, 1)));
        answer.add_answer(Record::from_rdata(
            question.queries[0].name().clone(),
            60,
            data,
        ));
        answer.to_vec().unwrap()
    }
    let counter = count.clone();
    tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        loop {
            let (size, client) = udp.recv_from(&mut buffer).await.unwrap();
            counter.fetch_add(1, Ordering::SeqCst);
            udp.send_to(&answer(&buffer[..size]), client).await.unwrap();
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let mut buffer = vec![0; usize::from(stream.read_u16().await.unwrap())];
            stream.read_exact(&mut buffer).await.unwrap();
            let bytes = answer(&buffer);
            stream.write_u16(bytes.len() as u16).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
        }
    });
    (address, count)
}

const WEB: &str = "web.shop.svc.cluster.local.";

#[tokio::test]
async fn cluster_names_are_answered_over_udp_and_tcp() {
    let (resolver, shutdown) = start(view(), Vec::new()).await;
    let server = resolver.address();
    let answer = ask(server, &question(WEB, RecordType::A)).await;
    assert_eq!(addresses(&answer), ["10.96.0.7"]);
    assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
    let answer = ask_over_tcp(server, &question(WEB, RecordType::AAAA)).await;
    assert_eq!(addresses(&answer), ["fd96::7"]);

    let nobody = ask(
        server,
        &question("no.shop.svc.cluster.local.", RecordType::A),
    )
    .await;
    assert_eq!(nobody.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(nobody.authorities[0].record_type(), RecordType::SOA);
    let no_data = ask(server, &question(WEB, RecordType::MX)).await;
    assert_eq!(no_data.metadata.response_code, ResponseCode::NoError);
    assert_eq!(no_data.authorities[0].record_type(), RecordType::SOA);
    shutdown.cancel();
    resolver.ended().await;
}

#[tokio::test]
async fn other_names_are_forwarded_once_and_then_cached() {
    let (up, count) = upstream().await;
    let (resolver, _shutdown) = start(view(), vec![up]).await;
    let server = resolver.address();
    for _ in 0..3 {
        let answer = ask(server, &question("www.Example.org.", RecordType::A)).await;
        assert_eq!(addresses(&answer), ["192.0.2.1"]);
        assert_eq!(answer.queries[0].name().to_string(), "www.Example.org.");
    }
    assert_eq!(count.load(Ordering::SeqCst), 1);
    let answer = ask_over_tcp(server, &question("tcp.example.org.", RecordType::A)).await;
    assert_eq!(addresses(&answer), ["192.0.2.1"]);
    // An alias is followed upstream in the same answer.
    let answer = ask(
        server,
        &question("ext.shop.svc.cluster.local.", RecordType::A),
    )
    .await;
    assert_eq!(addresses(&answer), ["192.0.2.1", "www.example.org."]);
}

#[tokio::test]
async fn a_dead_upstream_is_left_for_the_next() {
    let (up, _) = upstream().await;
    // Bound and silent: every question to it times out.
    let silent = UdpSocket::bind(LOOPBACK).await.unwrap();
    let (resolver, _shutdown) = start(view(), vec![silent.local_addr().unwrap(), up]).await;
    let answer = ask(
        resolver.address(),
        &question("a.example.org.", RecordType::A),
    )
    .await;
    assert_eq!(addresses(&answer), ["192.0.2.1"]);
    let begun = std::time::Instant::now();
    ask(
        resolver.address(),
        &question("b.example.org.", RecordType::A),
    )
    .await;
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "the live one is asked first now"
    );
}

#[tokio::test]
async fn without_upstream_the_client_is_told_so() {
    let (resolver, _shutdown) = start(view(), Vec::new()).await;
    let answer = ask(
        resolver.address(),
        &question("www.example.org.", RecordType::A),
    )
    .await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    // Nor is the cluster known before the first view.
    let (resolver, _shutdown) = start(Arc::default(), Vec::new()).await;
    let answer = ask(resolver.address(), &question(WEB, RecordType::A)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
}

/// A headless Service with that many backends.
fn crowded(count: u8) -> Arc<View> {
    let name = ServiceName {
        namespace: "shop".into(),
        name: "crowd".into(),
    };
    let backends = (0..count).map(|n| {
        let backend = proto::Backend {
            addresses: vec![bytes::Bytes::copy_from_slice(&[10, 244, 3, n])],
            ..proto::Backend::default()
        };
        (n.to_string(), Arc::new(backend))
    });
    Arc::new(View {
        rev: 1,
        services: Arc::new(OrdMap::unit(name.clone(), Arc::default())),
        backends: Arc::new(OrdMap::unit(name, Arc::new(backends.collect()))),
        ..View::default()
    })
}

#[tokio::test]
async fn what_does_not_fit_is_truncated_and_whole_over_tcp() {
    let (resolver, _shutdown) = start(crowded(200), Vec::new()).await;
    let server = resolver.address();
    let mut crowd = question("crowd.shop.svc.cluster.local.", RecordType::A);
    let answer = ask(server, &crowd).await;
    assert!(answer.metadata.truncation && answer.answers.is_empty());
    assert_eq!(ask_over_tcp(server, &crowd).await.answers.len(), 200);

    // With EDNS the client's size counts, up to ours, and the answer has an OPT record.
    let (resolver, _shutdown) = start(crowded(60), Vec::new()).await;
    let server = resolver.address();
    assert!(ask(server, &crowd).await.metadata.truncation);
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    crowd.set_edns(edns);
    let answer = ask(server, &crowd).await;
    assert_eq!(answer.answers.len(), 60);
    assert_eq!(answer.edns.unwrap().max_payload(), 1232);
}

#[tokio::test]
async fn everyone_gets_another_backend_first() {
    let (resolver, _shutdown) = start(crowded(20), Vec::new()).await;
    let crowd = question("crowd.shop.svc.cluster.local.", RecordType::A);
    let mut first = std::collections::HashSet::new();
    for _ in 0..50 {
        first.insert(
            ask(resolver.address(), &crowd).await.answers[0]
                .data
                .to_string(),
        );
    }
    assert!(first.len() > 5, "{first:?}");
}

#[tokio::test]
async fn strange_requests_get_the_code_for_it() {
    let (resolver, _shutdown) = start(view(), Vec::new()).await;
    let server = resolver.address();
    let code = |message: Message| async move { ask(server, &message).await.response_code };
    let mut update = question(WEB, RecordType::A);
    update.metadata.op_code = OpCode::Update;
    assert_eq!(code(update).await, ResponseCode::NotImp);
    assert_eq!(
        code(question(WEB, RecordType::AXFR)).await,
        ResponseCode::Refused
    );
    let mut twice = question(WEB, RecordType::A);
    twice.add_query(twice.queries[0].clone());
    assert_eq!(code(twice).await, ResponseCode::FormErr);
    let mut newer = question(WEB, RecordType::A);
    let mut edns = Edns::new();
    edns.set_version(1);
    newer.set_edns(edns);
    // 16: BADVERS, which hickory decodes as its namesake of TSIG.
    assert_eq!(u16::from(code(newer).await), 16);
    // A header that promises a question which is not there.
    let broken = [0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    let answer = Message::from_vec(&ask_bytes(server, &broken).await.unwrap()).unwrap();
    assert_eq!(
        (answer.id, answer.response_code),
        (0x1234, ResponseCode::FormErr)
    );
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let (resolver, _shutdown) = start(view(), Vec::new()).await;
    let config = ResolverConfig {
        listen: resolver.address(),
        add_to_loopback: false,
        upstreams: Upstreams::Fixed(Vec::new()),
    };
    let receiver = watch::channel(view()).1;
    let second = Resolver::start(config, receiver, CancellationToken::new()).await;
    let error = second.err().unwrap().to_string();
    assert!(
        error.contains(&format!("listen on {} (tcp)", resolver.address())),
        "{error}"
    );
}

proptest! {
    /// Random bytes and damaged questions: never a panic, never an answer to an answer.
    #[test]
    fn no_packet_harms(
        mut packet in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..200),
            Just(question(WEB, RecordType::SRV).to_vec().unwrap()),
        ],
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        tcp in any::<bool>(),
    ) {
        for (index, byte) in damage {
            if !packet.is_empty() {
                let at = index.index(packet.len());
                packet[at] = byte;
            }
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let forwarder = Forwarder::new(Upstreams::Fixed(Vec::new()), Vec::new());
        let responder = Responder::new(watch::channel(view()).1, forwarder);
        let transport = if tcp { Transport::Tcp } else { Transport::Udp };
        let answer = runtime.block_on(responder.respond(&packet, transport));
        if packet.len() < 12 || packet[2] & 0x80 != 0 {
            prop_assert!(answer.is_none());
        }
        if let Some(answer) = answer {
            prop_assert_eq!(&answer[..2], &packet[..2]);
            prop_assert!(tcp || answer.len() <= 1232);
        }
    }
}
