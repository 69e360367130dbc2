//! Over loopback, with real messages; "upstream" is a server of our own.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};

use gantry_api::proto;
use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use imbl::OrdMap;
use proptest::prelude::*;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::respond::{Decision, Transport};
use super::zone::tests::view;
use super::*;
use crate::view::ServiceName;

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

async fn start(view: Arc<View>, upstreams: Vec<SocketAddr>) -> (Resolver, CancellationToken) {
    let config = ResolverConfig {
        listen: LOOPBACK,
        add_to_loopback: false,
        upstreams: Upstreams::Fixed(upstreams),
        node_resolv_conf: || "search corp.example\n".into(),
        hold: None,
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

/// What an upstream of ours does with a question: its answer is sent over UDP, or over TCP (true).
type Behaviour = Arc<dyn Fn(&Message, bool) -> Option<Message> + Send + Sync>;

fn reply_to(question: &Message) -> Message {
    let mut answer = Message::response(question.metadata.id, OpCode::Query);
    answer.queries.clone_from(&question.queries);
    answer
}

fn with_address(question: &Message) -> Message {
    let mut answer = reply_to(question);
    let data = RData::A(A(Ipv4Addr::new(192, 0, 2, 1)));
    answer.add_answer(Record::from_rdata(
        question.queries[0].name().clone(),
        60,
        data,
    ));
    answer
}

/// An upstream and the number of questions it had, without the resolver's own. The behaviour of
/// one that is silent for a question is None.
async fn upstream_that(behaves: Behaviour) -> (SocketAddr, Arc<AtomicUsize>) {
    let tcp = TcpListener::bind(LOOPBACK).await.unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(address).await.unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    let answer = Arc::new(move |bytes: &[u8], over_tcp: bool| {
        let question = Message::from_vec(bytes).unwrap();
        let name = question.queries[0].name().to_ascii();
        if !name.ends_with("gantry-loop.invalid.") {
            counter.fetch_add(1, Ordering::SeqCst);
        }
        behaves(&question, over_tcp).map(|answer| answer.to_vec().unwrap())
    });
    let answers = answer.clone();
    tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        loop {
            let (size, client) = udp.recv_from(&mut buffer).await.unwrap();
            if let Some(bytes) = answers(&buffer[..size], false) {
                udp.send_to(&bytes, client).await.unwrap();
            }
        }
    });
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = tcp.accept().await.unwrap();
            let mut buffer = vec![0; usize::from(stream.read_u16().await.unwrap())];
            stream.read_exact(&mut buffer).await.unwrap();
            if let Some(bytes) = answer(&buffer, true) {
                stream.write_u16(bytes.len() as u16).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
            }
        }
    });
    (address, count)
}

/// An upstream that answers every question with 192.0.2.1.
async fn upstream() -> (SocketAddr, Arc<AtomicUsize>) {
    upstream_that(Arc::new(|question, _| Some(with_address(question)))).await
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
        node_resolv_conf: String::new,
        hold: None,
    };
    let receiver = watch::channel(view()).1;
    let second = Resolver::start(config, receiver, CancellationToken::new()).await;
    let error = second.err().unwrap().to_string();
    assert!(
        error.contains(&format!("listen on {} (tcp)", resolver.address())),
        "{error}"
    );
}

/// A pod of namespace web at 127.0.0.1, from where tests ask.
fn with_pod(view: &View) -> Arc<View> {
    let pod = serde_json::json!({
        "metadata": {"namespace": "web", "name": "client"},
        "spec": {"containers": []},
        "status": {"phase": "Running", "podIPs": [{"ip": "127.0.0.1"}]},
    });
    let mut settings = (*view.settings).clone();
    settings.dns_service_ip = Some(IpAddr::from([10, 96, 0, 10]));
    let uid = crate::ids::PodUid::new("u").unwrap();
    let pods = [(uid, Arc::new(serde_json::from_value(pod).unwrap()))];
    Arc::new(View {
        pods: Arc::new(pods.into()),
        settings: Arc::new(settings),
        ..view.clone()
    })
}

/// A listener on 127.0.0.1 is asked by the node itself: the pod asks at another loopback address.
async fn start_for_pod(upstreams: Vec<SocketAddr>) -> SocketAddr {
    let config = ResolverConfig {
        listen: SocketAddr::from(([127, 0, 0, 2], 0)),
        add_to_loopback: false,
        upstreams: Upstreams::Fixed(upstreams),
        node_resolv_conf: || "search corp.example\n".into(),
        hold: None,
    };
    let receiver = watch::channel(with_pod(&view())).1;
    let resolver = Resolver::start(config, receiver, CancellationToken::new());
    resolver.await.unwrap().address()
}

#[tokio::test]
async fn a_search_list_is_answered_in_one_hop() {
    // Upstream knows www.example.org and nothing below corp.example.
    let (up, count) = upstream_that(Arc::new(|question, _| {
        let name = question.queries[0].name().to_ascii().to_lowercase();
        let mut answer = match (name.as_str(), question.queries[0].query_type()) {
            ("www.example.org.", RecordType::A) => with_address(question),
            _ => reply_to(question),
        };
        if !name.ends_with("example.org.") {
            answer.metadata.response_code = ResponseCode::NXDomain;
        }
        Some(answer)
    }))
    .await;
    let server = start_for_pod(vec![up]).await;
    let asked = "Www.example.org.web.svc.cluster.local.";
    let answer = ask(server, &question(asked, RecordType::A)).await;
    assert_eq!(addresses(&answer), ["192.0.2.1", "Www.example.org."]);
    assert_eq!(answer.answers[0].name.to_ascii(), asked);
    assert_eq!(answer.answers[0].record_type(), RecordType::CNAME);
    assert!(!answer.metadata.authoritative);
    // corp.example was asked for first.
    assert_eq!(count.load(Ordering::SeqCst), 2);
    // musl asks for both types at once: the name exists, without this type.
    let answer = ask(server, &question(asked, RecordType::AAAA)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert_eq!(addresses(&answer), ["Www.example.org."]);
    // `name.namespace` of the cluster itself needs no upstream.
    let before = count.load(Ordering::SeqCst);
    let asked = "web.shop.web.svc.cluster.local.";
    let answer = ask(server, &question(asked, RecordType::A)).await;
    assert_eq!(
        addresses(&answer),
        ["10.96.0.7", "web.shop.svc.cluster.local."]
    );
    // What does not exist anywhere does not exist, and other types are not searched for.
    let answer = ask(
        server,
        &question("no.where.web.svc.cluster.local.", RecordType::A),
    )
    .await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert!(answer.answers.is_empty() && !answer.authorities.is_empty());
    assert_eq!(count.load(Ordering::SeqCst), before + 2);
    let answer = ask(
        server,
        &question("www.example.org.web.svc.cluster.local.", RecordType::MX),
    )
    .await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    // A Service that is not there yet is not to be taken for a name of upstream's.
    let before = count.load(Ordering::SeqCst);
    let asked = question("www.web.svc.cluster.local.", RecordType::A);
    assert_eq!(
        ask(server, &asked).await.metadata.response_code,
        ResponseCode::NXDomain
    );
    assert_eq!(count.load(Ordering::SeqCst), before);
    // Nor for whom is no pod of ours.
    let answer = ask(
        server,
        &question("www.example.org.shop.svc.cluster.local.", RecordType::A),
    )
    .await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn a_truncated_answer_is_got_over_tcp() {
    let (up, _) = upstream_that(Arc::new(|question, over_tcp| {
        let mut answer = reply_to(question);
        if !over_tcp {
            answer.metadata.truncation = true;
            return Some(answer);
        }
        for n in 0..100 {
            let data = RData::A(A(Ipv4Addr::new(192, 0, 2, n)));
            answer.add_answer(Record::from_rdata(
                question.queries[0].name().clone(),
                60,
                data,
            ));
        }
        Some(answer)
    }))
    .await;
    let (resolver, _shutdown) = start(view(), vec![up]).await;
    let big = question("big.example.org.", RecordType::A);
    let answer = ask(resolver.address(), &big).await;
    assert!(answer.metadata.truncation, "1,600 bytes do not fit");
    let answer = ask_over_tcp(resolver.address(), &big).await;
    assert_eq!(answer.answers.len(), 100);
}

#[tokio::test]
async fn the_same_question_in_flight_is_asked_once() {
    let (up, count) = upstream_that(Arc::new(|question, _| {
        std::thread::sleep(Duration::from_millis(100));
        Some(with_address(question))
    }))
    .await;
    let (resolver, _shutdown) = start(view(), vec![up]).await;
    let asks = (0..20).map(|n| {
        let name = if n % 2 == 0 {
            "a.example.org."
        } else {
            "A.Example.org."
        };
        let asked = question(name, RecordType::A);
        let server = resolver.address();
        async move {
            let answer = ask(server, &asked).await;
            assert!(answer.queries[0].name().eq_case(asked.queries[0].name()));
            assert_eq!(answer.answers.len(), 1);
        }
    });
    futures_util::future::join_all(asks).await;
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_unwilling_server_is_left_for_the_next() {
    let (unwilling, _) = upstream_that(Arc::new(|question, _| {
        let mut answer = reply_to(question);
        answer.metadata.response_code = ResponseCode::ServFail;
        Some(answer)
    }))
    .await;
    let (up, _) = upstream().await;
    let (resolver, _shutdown) = start(view(), vec![unwilling, up]).await;
    let asked = question("a.example.org.", RecordType::A);
    assert_eq!(
        addresses(&ask(resolver.address(), &asked).await),
        ["192.0.2.1"]
    );
    let (resolver, _shutdown) = start(view(), vec![unwilling]).await;
    let answer = ask(resolver.address(), &asked).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn a_server_older_than_edns_is_asked_without() {
    let (up, _) = upstream_that(Arc::new(|question, _| {
        let mut answer = with_address(question);
        if question.edns.is_some() {
            answer = Message::error_msg(question.metadata.id, OpCode::Query, ResponseCode::FormErr);
        }
        Some(answer)
    }))
    .await;
    let (resolver, _shutdown) = start(view(), vec![up]).await;
    let answer = ask(
        resolver.address(),
        &question("a.example.org.", RecordType::A),
    )
    .await;
    assert_eq!(addresses(&answer), ["192.0.2.1"]);
}

#[tokio::test]
async fn a_stale_answer_is_better_than_none() {
    let works = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let does = works.clone();
    let (up, _) = upstream_that(Arc::new(move |question, _| {
        let mut answer = with_address(question);
        answer.answers[0].ttl = 1;
        does.load(Ordering::SeqCst).then_some(answer)
    }))
    .await;
    let (resolver, _shutdown) = start(view(), vec![up]).await;
    let asked = question("a.example.org.", RecordType::A);
    assert_eq!(ask(resolver.address(), &asked).await.answers[0].ttl, 1);
    works.store(false, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let begun = std::time::Instant::now();
    let answer = ask(resolver.address(), &asked).await;
    assert_eq!(
        (addresses(&answer), answer.answers[0].ttl),
        (vec!["192.0.2.1".to_owned()], 30)
    );
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "before the client gives up"
    );
    let text = resolver.metrics()();
    assert!(
        text.contains("coredns_cache_served_stale_total{server="),
        "{text}"
    );
    // Never seen: nothing is made up.
    let other = ask(
        resolver.address(),
        &question("b.example.org.", RecordType::A),
    )
    .await;
    assert_eq!(other.metadata.response_code, ResponseCode::ServFail);
}

#[tokio::test]
async fn a_server_that_asks_us_again_is_found_out() {
    // A resolver whose upstream is itself: by another address, as through a resolver on the node.
    let relay = UdpSocket::bind(LOOPBACK).await.unwrap();
    let (resolver, _shutdown) = start(view(), vec![relay.local_addr().unwrap()]).await;
    let server = resolver.address();
    tokio::spawn(async move {
        let relay = Arc::new(relay);
        let mut buffer = vec![0; 4096];
        loop {
            let (size, client) = relay.recv_from(&mut buffer).await.unwrap();
            let (bytes, relay) = (buffer[..size].to_vec(), relay.clone());
            tokio::spawn(async move {
                if let Some(answer) = ask_bytes(server, &bytes).await {
                    relay.send_to(&answer, client).await.unwrap();
                }
            });
        }
    });
    let first = ask(server, &question("a.example.org.", RecordType::A)).await;
    assert_eq!(first.metadata.response_code, ResponseCode::ServFail);
    let begun = std::time::Instant::now();
    let second = ask(server, &question("b.example.org.", RecordType::A)).await;
    assert_eq!(second.metadata.response_code, ResponseCode::ServFail);
    assert!(
        begun.elapsed() < Duration::from_millis(500),
        "it is asked still"
    );
}

#[tokio::test]
async fn questions_on_one_connection_are_answered_in_order() {
    let (resolver, _shutdown) = start(view(), Vec::new()).await;
    let mut stream = TcpStream::connect(resolver.address()).await.unwrap();
    let asked: Vec<_> = (0..5).map(|_| question(WEB, RecordType::A)).collect();
    let mut bytes = Vec::new();
    for question in &asked {
        let question = question.to_vec().unwrap();
        bytes.extend_from_slice(&(question.len() as u16).to_be_bytes());
        bytes.extend_from_slice(&question);
    }
    // Cut anywhere: a question is whole when its last byte is there.
    for part in bytes.chunks(7) {
        stream.write_all(part).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for question in &asked {
        let mut buffer = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut buffer).await.unwrap();
        let answer = Message::from_vec(&buffer).unwrap();
        assert_eq!(answer.metadata.id, question.metadata.id);
        assert_eq!(addresses(&answer), ["10.96.0.7"]);
    }
}

#[tokio::test]
async fn figures_have_the_names_of_dashboards() {
    let (up, _) = upstream().await;
    let (resolver, _shutdown) = start(view(), vec![up]).await;
    for name in [WEB, "a.example.org.", "a.example.org."] {
        ask(resolver.address(), &question(name, RecordType::A)).await;
    }
    let text = resolver.metrics()();
    let server = format!("server=\"dns://{}\"", resolver.address());
    for line in [
        format!(
            "coredns_dns_requests_total{{{server},zone=\"cluster.local.\",proto=\"udp\",type=\"A\"}} 1"
        ),
        format!("coredns_dns_requests_total{{{server},zone=\".\",proto=\"udp\",type=\"A\"}} 2"),
        format!("coredns_dns_responses_total{{{server},zone=\".\",rcode=\"NOERROR\"}} 2"),
        format!("coredns_dns_request_duration_seconds_count{{{server},zone=\".\"}} 2"),
        format!("coredns_cache_hits_total{{{server},type=\"success\"}} 1"),
        format!("coredns_cache_misses_total{{{server}}} 1"),
        format!("coredns_cache_entries{{{server},type=\"success\"}} 1"),
    ] {
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    /// Random bytes and damaged questions: never a panic, never an answer to an answer, and what
    /// is answered is a well-formed response that fits.
    #[test]
    fn no_packet_harms(
        mut packet in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..200),
            Just(question(WEB, RecordType::SRV).to_vec().unwrap()),
            Just(question("a.b.web.svc.cluster.local.", RecordType::A).to_vec().unwrap()),
            Just(question("1.0.96.10.in-addr.arpa.", RecordType::PTR).to_vec().unwrap()),
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
        let receiver = watch::channel(with_pod(&view())).1;
        let (own, counters) = (IpAddr::from([127, 0, 0, 2]), Arc::new(Counters::default()));
        let none = Upstreams::Fixed(Vec::new());
        let forwarder = Forwarder::new(none, own, receiver.clone(), counters.clone());
        let responder = Responder::new(receiver, forwarder, String::new, own, counters);
        let transport = if tcp { Transport::Tcp } else { Transport::Udp };
        let client = IpAddr::from([127, 0, 0, 1]);
        let answer = match responder.decide(&packet, client, transport) {
            Decision::Silent => None,
            Decision::Reply(bytes) => Some(bytes),
            Decision::Ask(pending) => {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let answer = runtime.block_on(responder.finish(pending));
                prop_assert!(answer.is_some());
                answer
            }
        };
        if packet.len() < 12 || packet[2] & 0x80 != 0 {
            prop_assert!(answer.is_none());
        }
        if let Some(bytes) = answer {
            prop_assert_eq!(&bytes[..2], &packet[..2]);
            prop_assert!(tcp || bytes.len() <= 1232);
            let answer = Message::from_vec(&bytes);
            prop_assert!(answer.is_ok(), "{:?}", answer);
            prop_assert_eq!(answer.unwrap().metadata.message_type, hickory_proto::op::MessageType::Response);
        }
    }
}
