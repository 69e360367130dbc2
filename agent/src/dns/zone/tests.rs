use bytes::Bytes;
use imbl::OrdMap;
use proptest::prelude::*;

use super::*;
use crate::view::{Backends, Settings};

fn ip(text: &str) -> Bytes {
    match text.parse::<IpAddr>().unwrap() {
        IpAddr::V4(address) => Bytes::copy_from_slice(&address.octets()),
        IpAddr::V6(address) => Bytes::copy_from_slice(&address.octets()),
    }
}

fn service_name(namespace: &str, name: &str) -> ServiceName {
    ServiceName {
        namespace: namespace.into(),
        name: name.into(),
    }
}

fn http(port: u32) -> proto::ServicePort {
    proto::ServicePort {
        name: "http".into(),
        protocol: 6,
        port,
        node_port: 0,
    }
}

fn backend(address: &str, hostname: &str, state: State) -> Arc<proto::Backend> {
    Arc::new(proto::Backend {
        addresses: vec![ip(address)],
        ports: vec![proto::BackendPort {
            name: "http".into(),
            protocol: 6,
            port: 8080,
        }],
        state: state as i32,
        hostname: hostname.into(),
        ..proto::Backend::default()
    })
}

/// web: two families; db: headless; ext: an alias; all in namespace shop.
pub(in crate::dns) fn view() -> Arc<View> {
    let web = proto::Service {
        cluster_ips: vec![ip("10.96.0.7"), ip("fd96::7")],
        ports: vec![http(80)],
        ..proto::Service::default()
    };
    let db = proto::Service {
        ports: vec![http(80)],
        ..proto::Service::default()
    };
    let ext = proto::Service {
        r#type: "ExternalName".into(),
        external_name: "www.example.org".into(),
        ..proto::Service::default()
    };
    let services = [
        (service_name("shop", "web"), Arc::new(web)),
        (service_name("shop", "db"), Arc::new(db)),
        (service_name("shop", "ext"), Arc::new(ext)),
    ]
    .into_iter()
    .collect();
    let backends: Backends = [
        (
            "a".to_owned(),
            backend("10.244.1.5", "db-0", State::Serving),
        ),
        ("b".to_owned(), backend("10.244.2.6", "", State::Serving)),
        ("c".to_owned(), backend("10.244.2.7", "", State::NotReady)),
        ("d".to_owned(), backend("fd24::9", "", State::Serving)),
        ("e".to_owned(), backend("10.244.2.8", "", State::Draining)),
    ]
    .into_iter()
    .collect();
    Arc::new(View {
        rev: 7,
        settings: Arc::new(Settings {
            cluster_domain: "cluster.local".into(),
            service_cidr: Some("10.96.0.0/16".parse().unwrap()),
            cluster_cidr: Some("10.244.0.0/16".parse().unwrap()),
            ..Settings::default()
        }),
        services: Arc::new(services),
        backends: Arc::new(OrdMap::unit(service_name("shop", "db"), Arc::new(backends))),
        ..View::default()
    })
}

fn ask(name: &str, kind: RecordType) -> Answer {
    answer(
        &Query::query(Name::from_ascii(name).unwrap(), kind),
        &view(),
    )
}

/// The data of the answer section as text, sorted.
fn data(name: &str, kind: RecordType) -> Vec<String> {
    match ask(name, kind) {
        Answer::Found { answers, .. } => {
            let mut texts: Vec<_> = answers.iter().map(|r| r.data.to_string()).collect();
            texts.sort();
            texts
        }
        other => panic!("{name} {kind}: {other:?}"),
    }
}

const SHOP: &str = "shop.svc.cluster.local.";

#[test]
fn services_have_their_cluster_ips() {
    assert_eq!(data(&format!("web.{SHOP}"), RecordType::A), ["10.96.0.7"]);
    assert_eq!(data(&format!("web.{SHOP}"), RecordType::AAAA), ["fd96::7"]);
    assert!(data(&format!("web.{SHOP}"), RecordType::MX).is_empty());
}

#[test]
fn names_compare_without_case_and_answers_repeat_the_spelling() {
    let name = "WeB.sHoP.svc.CLUSTER.local.";
    let Answer::Found { answers, .. } = ask(name, RecordType::A) else {
        panic!("not found");
    };
    assert_eq!(answers[0].name.to_string(), name);
    assert_eq!(answers[0].ttl, SERVICE_TTL_S);
}

#[test]
fn headless_services_have_their_serving_backends() {
    assert_eq!(
        data(&format!("db.{SHOP}"), RecordType::A),
        ["10.244.1.5", "10.244.2.6"]
    );
    assert_eq!(data(&format!("db.{SHOP}"), RecordType::AAAA), ["fd24::9"]);
    assert_eq!(
        data(&format!("db-0.db.{SHOP}"), RecordType::A),
        ["10.244.1.5"]
    );
    assert!(data(&format!("db-0.db.{SHOP}"), RecordType::AAAA).is_empty());
    assert_eq!(
        data(&format!("10-244-2-6.db.{SHOP}"), RecordType::A),
        ["10.244.2.6"]
    );
    assert_eq!(
        data(&format!("fd24-0-0-0-0-0-0-9.db.{SHOP}"), RecordType::AAAA),
        ["fd24::9"]
    );
    assert_eq!(
        ask(&format!("10-244-2-7.db.{SHOP}"), RecordType::A),
        Answer::NoName
    );
}

#[test]
fn named_ports_have_srv_records_with_addresses() {
    let Answer::Found {
        answers,
        additionals,
    } = ask(&format!("_http._tcp.web.{SHOP}"), RecordType::SRV)
    else {
        panic!("not found");
    };
    assert_eq!(answers[0].data.to_string(), format!("0 100 80 web.{SHOP}"));
    assert_eq!(additionals.len(), 2);
    assert_eq!(
        data(&format!("_http._tcp.db.{SHOP}"), RecordType::SRV),
        [
            format!("0 100 8080 10-244-2-6.db.{SHOP}"),
            format!("0 100 8080 db-0.db.{SHOP}"),
            format!("0 100 8080 fd24-0-0-0-0-0-0-9.db.{SHOP}"),
        ]
    );
    assert_eq!(
        ask(&format!("_http._udp.web.{SHOP}"), RecordType::SRV),
        Answer::NoName
    );
    assert!(data(&format!("_tcp.web.{SHOP}"), RecordType::SRV).is_empty());
    assert!(data(&format!("_http._tcp.web.{SHOP}"), RecordType::A).is_empty());
}

#[test]
fn addresses_have_names() {
    let ptr = |name: &str| data(name, RecordType::PTR);
    assert_eq!(ptr("7.0.96.10.in-addr.arpa."), [format!("web.{SHOP}")]);
    assert_eq!(ptr("5.1.244.10.in-addr.arpa."), [format!("db-0.db.{SHOP}")]);
    let nobody = ask("9.9.244.10.in-addr.arpa.", RecordType::PTR);
    assert_eq!(nobody, Answer::NoName);
    assert_eq!(
        ask("1.1.1.1.in-addr.arpa.", RecordType::PTR),
        Answer::Forward
    );
    assert_eq!(ask("in-addr.arpa.", RecordType::NS), Answer::Forward);
    assert_eq!(
        data("10-244-1-5.shop.pod.cluster.local.", RecordType::A),
        ["10.244.1.5"]
    );
}

#[test]
fn an_external_name_is_an_alias() {
    let Answer::Alias { record, target } = ask(&format!("ext.{SHOP}"), RecordType::A) else {
        panic!("no alias");
    };
    assert_eq!(target.to_string(), "www.example.org.");
    assert_eq!(record.data.to_string(), "www.example.org.");
    assert_eq!(
        data(&format!("ext.{SHOP}"), RecordType::CNAME),
        ["www.example.org."]
    );
}

#[test]
fn cluster_names_that_do_not_exist_never_go_upstream() {
    for name in [
        "nobody.shop.svc.cluster.local.",
        "web.other.svc.cluster.local.",
        "other.svc.cluster.local.",
        "x.cluster.local.",
        "a.b.c.d.web.shop.svc.cluster.local.",
        "not-an-address.shop.pod.cluster.local.",
    ] {
        assert_eq!(ask(name, RecordType::A), Answer::NoName, "{name}");
    }
    for name in ["cluster.local.", "svc.cluster.local.", SHOP] {
        assert!(data(name, RecordType::A).is_empty(), "{name}");
    }
    assert_eq!(ask("www.example.org.", RecordType::A), Answer::Forward);
    assert_eq!(ask("web.", RecordType::A), Answer::Forward);
    assert_eq!(data("cluster.local.", RecordType::SOA).len(), 1);
}

#[test]
fn a_denial_belongs_to_a_zone_above_the_name() {
    let zone = Zone::new(view());
    let owner = |name: &str| zone.soa(&Name::from_ascii(name).unwrap()).name.to_ascii();
    assert_eq!(owner("no.Shop.svc.cluster.local."), "cluster.local.");
    assert_eq!(owner("9.9.244.10.in-addr.arpa."), "in-addr.arpa.");
    assert_eq!(owner("1.0.0.0.ip6.arpa."), "ip6.arpa.");
    // Names of addresses are below any namespace: RFC 8020.
    assert!(data("shop.pod.cluster.local.", RecordType::A).is_empty());
}

#[test]
fn before_the_first_view_the_client_is_told_to_try_again() {
    let name = Name::from_ascii("web.shop.svc.cluster.local.").unwrap();
    let query = Query::query(name, RecordType::A);
    assert_eq!(answer(&query, &Arc::default()), Answer::NotReady);
}

proptest! {
    /// Any name: no panic, and what is below the domain stays here.
    #[test]
    fn cluster_names_stay_here(
        labels in proptest::collection::vec(
            prop_oneof![
                proptest::collection::vec(any::<u8>(), 1..9),
                Just(b"svc".to_vec()), Just(b"pod".to_vec()), Just(b"shop".to_vec()),
                Just(b"db".to_vec()), Just(b"_tcp".to_vec()), Just(b"_http".to_vec()),
            ],
            0..7,
        ),
        kind in any::<u16>(),
    ) {
        let below = Name::from_labels(labels.iter().map(Vec::as_slice));
        let name = below.unwrap().append_domain(&"cluster.local.".parse().unwrap()).unwrap();
        let answer = answer(&Query::query(name, RecordType::from(kind)), &view());
        prop_assert_ne!(answer, Answer::Forward);
    }
}
