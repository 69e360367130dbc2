//! Machines that join a whole control plane on a loopback port.

use std::collections::BTreeSet;
use std::path::Path;

use clap::Parser as _;
use gantry_api::bootstrap_token::{
    AUTHENTICATION_KEY, EXPIRATION_KEY, HASH_KEY, NAMESPACE, SECRET_TYPE, USES_KEY,
};
use gantry_api::proto::feed_client::FeedClient;
use gantry_api::proto::joining_client::JoiningClient;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity as TlsIdentity};

use super::*;
use crate::config::Arguments;
use crate::run::Control;

const TOKEN: &str = "abcdef.fedcba9876543210";

struct Bed {
    control: Control,
    ca: String,
    stop: CancellationToken,
    _dir: tempfile::TempDir,
}

async fn bed(more: &[&str]) -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (data, config) = (path("data"), path("admin.kubeconfig"));
    let fixed = [
        "gantry-control",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        &data,
        "--kubeconfig",
        &config,
    ];
    let arguments = Arguments::parse_from([&fixed[..], more].concat());
    let stop = CancellationToken::new();
    let control = Control::start(&arguments, &stop).await.unwrap();
    let ca = std::fs::read_to_string(Path::new(&data).join("pki/ca.crt")).unwrap();
    Bed {
        control,
        ca,
        stop,
        _dir: dir,
    }
}

struct Keys {
    key: KeyPair,
    request: Vec<u8>,
}

fn keys(node: &str) -> Keys {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let name = format!("system:node:{node}");
    params.distinguished_name.push(DnType::CommonName, name);
    let request = params.serialize_request(&key).unwrap().der().to_vec();
    Keys { key, request }
}

impl Bed {
    async fn token(&self, token: &str, more: &[(&str, &str)]) {
        let token = BootstrapToken::parse(token).unwrap();
        let mut data: std::collections::BTreeMap<String, ByteString> = [
            (HASH_KEY, token.hash()),
            (AUTHENTICATION_KEY, "true".to_owned()),
        ]
        .into_iter()
        .map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes())))
        .collect();
        for (key, text) in more {
            data.insert((*key).to_owned(), ByteString(text.as_bytes().to_vec()));
        }
        let mut secret = Secret {
            type_: Some(SECRET_TYPE.to_owned()),
            data: Some(data),
            ..Secret::default()
        };
        secret.metadata.name = Some(token.secret_name());
        secret.metadata.namespace = Some(NAMESPACE.to_owned());
        self.control.registry().create(&secret).await.unwrap();
    }

    async fn channel(&self, own: Option<(&proto::NodeCertificate, &Keys)>) -> Channel {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.ca));
        if let Some((certificate, keys)) = own {
            let key = keys.key.serialize_pem();
            tls = tls.identity(TlsIdentity::from_pem(&certificate.certificate_pem, key));
        }
        let url = format!("https://{}", self.control.address());
        let endpoint = Endpoint::from_shared(url).unwrap().tls_config(tls).unwrap();
        endpoint.connect().await.unwrap()
    }

    async fn join(
        &self,
        token: &str,
        node: &str,
        keys: &Keys,
        machine_id: &str,
    ) -> Result<proto::NodeCertificate, tonic::Status> {
        let request = proto::JoinRequest {
            token: token.to_owned(),
            node: node.to_owned(),
            request_der: keys.request.clone().into(),
            machine_id: machine_id.to_owned(),
            incarnation: 0,
        };
        let mut client = JoiningClient::new(self.channel(None).await);
        client.join(request).await.map(Response::into_inner)
    }

    /// What the feed says to a request that no node may make: who is known is told that.
    async fn feed_says(&self, certificate: &proto::NodeCertificate, keys: &Keys) -> tonic::Status {
        let mut feed = FeedClient::new(self.channel(Some((certificate, keys))).await);
        let request = proto::TokenRequest::default();
        feed.issue_token(request).await.unwrap_err()
    }

    async fn end(self) {
        self.stop.cancel();
        self.control.drain().await.unwrap();
    }
}

fn node(bed: &Bed, name: &str) -> Option<Node> {
    bed.control.registry().get::<Node>("", name).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_joins_once_and_every_refusal_has_its_reason() {
    let bed = bed(&[]).await;
    bed.token(TOKEN, &[]).await;
    let a = keys("a");
    let refused = |outcome: Result<proto::NodeCertificate, tonic::Status>, words: &str| {
        let status = outcome.map(|_| ()).unwrap_err();
        assert!(status.message().contains(words), "{status:?}");
        assert!(!status.message().contains("fedcba9876543210"), "{status:?}");
    };
    refused(bed.join("abcdef", "a", &a, "m").await, "malformed");
    refused(
        bed.join("zzzzzz.0123456789abcdef", "a", &a, "m").await,
        "unknown here",
    );
    refused(
        bed.join("abcdef.aaaaaaaaaaaaaaaa", "a", &a, "m").await,
        "token abcdef is wrong",
    );
    refused(bed.join(TOKEN, "b", &a, "m").await, "not for system:node:b");
    refused(bed.join(TOKEN, "A", &a, "m").await, "no node name");
    assert!(node(&bed, "a").is_none(), "a refusal makes nothing");

    let certificate = bed.join(TOKEN, "a", &a, "m").await.unwrap();
    assert_eq!(certificate.ca_pem, bed.ca);
    let left_s = certificate.not_after_s - Timestamp::now().as_second();
    assert!((1_209_500..=1_209_600).contains(&left_s), "{left_s}");
    let made = node(&bed, "a").unwrap();
    assert_eq!(
        made.metadata.annotations.unwrap()[MACHINE_ANNOTATION],
        "m",
        "the machine is remembered"
    );
    // The answer was lost: the same machine may ask again, another one may not.
    bed.join(TOKEN, "a", &a, "m").await.unwrap();
    refused(
        bed.join(TOKEN, "b", &keys("b"), "n").await,
        "used up (last by a at",
    );
    bed.token("rack00.0123456789abcdef", &[(USES_KEY, "9")])
        .await;
    refused(
        bed.join("rack00.0123456789abcdef", "a", &keys("a"), "n")
            .await,
        "given to another machine",
    );
    bed.token(
        "oldold.0123456789abcdef",
        &[(EXPIRATION_KEY, "2026-01-01T00:00:00Z")],
    )
    .await;
    refused(
        bed.join("oldold.0123456789abcdef", "b", &keys("b"), "n")
            .await,
        "expired at 2026-01-01T00:00:00Z",
    );
    // A name that is taken costs no use.
    let secret = bed.control.registry();
    let secret = secret.get::<Secret>(NAMESPACE, "bootstrap-token-rack00");
    assert_eq!(text_of(&secret.unwrap().unwrap())[USES_KEY], "9");
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_machines_at_once_get_ten_pod_prefixes() {
    let bed = bed(&[]).await;
    bed.token(TOKEN, &[(USES_KEY, "10")]).await;
    let names: Vec<String> = (0..11).map(|number| format!("n{number}")).collect();
    let all: Vec<Keys> = names.iter().map(|name| keys(name)).collect();
    let joins = names
        .iter()
        .zip(&all)
        .map(|(name, keys)| bed.join(TOKEN, name, keys, name));
    let outcomes = futures_util::future::join_all(joins).await;
    let joined = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert_eq!(joined, 10, "eleven asked, ten uses: {outcomes:?}");
    let prefixes = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            let nodes = bed.control.registry().list::<Node>(None).unwrap().1;
            let prefixes: BTreeSet<String> = nodes
                .iter()
                .filter_map(|node| node.spec.as_ref()?.pod_cidr.clone())
                .collect();
            if prefixes.len() == 10 {
                return (prefixes, nodes.len());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let (prefixes, count) = prefixes.await.expect("ten prefixes within 20 s");
    assert_eq!((prefixes.len(), count), (10, 10), "{prefixes:?}");
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_speaks_and_a_deleted_nodes_does_not() {
    let bed = bed(&[]).await;
    bed.token(TOKEN, &[(USES_KEY, "2")]).await;
    let first = keys("a");
    let certificate = bed.join(TOKEN, "a", &first, "m").await.unwrap();
    assert_eq!(
        bed.feed_says(&certificate, &first).await.code(),
        tonic::Code::PermissionDenied,
        "known, and asks for nobody's pod"
    );
    let renew = |keys: &Keys| proto::RenewRequest {
        request_der: keys.request.clone().into(),
    };
    let open = bed.channel(Some((&certificate, &first))).await;
    let second = keys("a");
    let renewed = JoiningClient::new(open.clone()).renew(renew(&second)).await;
    let renewed = renewed.unwrap().into_inner();
    let other = JoiningClient::new(open.clone())
        .renew(renew(&keys("b")))
        .await;
    assert!(
        other
            .unwrap_err()
            .message()
            .contains("not for system:node:a")
    );
    let nobody = JoiningClient::new(bed.channel(None).await)
        .renew(renew(&second))
        .await;
    assert_eq!(nobody.unwrap_err().code(), tonic::Code::Unauthenticated);
    for (certificate, keys) in [(&renewed, &second), (&certificate, &first)] {
        let status = bed.feed_says(certificate, keys).await;
        assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status:?}");
    }
    // By the new one again: the first one's time is over.
    let third = keys("a");
    let open = bed.channel(Some((&renewed, &second))).await;
    let newest = JoiningClient::new(open)
        .renew(renew(&third))
        .await
        .unwrap()
        .into_inner();
    let status = bed.feed_says(&certificate, &first).await;
    assert!(status.message().contains("an earlier join"), "{status:?}");

    let registry = bed.control.registry();
    registry
        .delete::<Node>("", "a", &DeleteOptions::default())
        .await
        .unwrap();
    let status = bed.feed_says(&newest, &third).await;
    assert_eq!(status.code(), tonic::Code::Unauthenticated);
    assert!(status.message().contains("run gantry join"), "{status:?}");
    let fourth = keys("a");
    let again = bed.join(TOKEN, "a", &fourth, "m").await.unwrap();
    let status = bed.feed_says(&again, &fourth).await;
    assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status:?}");
    let status = bed.feed_says(&newest, &third).await;
    assert_eq!(status.code(), tonic::Code::Unauthenticated, "{status:?}");
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_guesses_is_stopped() {
    let bed = bed(&[]).await;
    let a = keys("a");
    let mut stopped = None;
    for number in 0..30 {
        let status = bed.join(TOKEN, "a", &a, "m").await.unwrap_err();
        if status.code() == tonic::Code::ResourceExhausted {
            stopped = Some(number);
            assert!(status.message().contains("wait a minute"), "{status:?}");
            break;
        }
    }
    assert!(stopped.is_some_and(|number| number >= 20), "{stopped:?}");
    let mut client = JoiningClient::new(bed.channel(None).await);
    let large = proto::JoinRequest {
        machine_id: "m".repeat(1 << 20),
        ..Default::default()
    };
    let status = client.join(large).await.unwrap_err();
    assert!(status.message().contains("too large"), "{status:?}");
    bed.end().await;
}
