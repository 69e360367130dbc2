//! A server on a loopback port, and what its handshakes show when a certificate nears its end.

use std::path::Path;
use std::sync::Arc;

use clap::Parser as _;
use gantry_api::proto::objects_client::ObjectsClient;
use gantry_api::proto::{ListRequest, ObjectKey};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use super::*;
use crate::config::Arguments;
use crate::run::Control;

fn arguments(dir: &Path) -> Arguments {
    let path = |name: &str| dir.join(name).display().to_string();
    Arguments::parse_from([
        "gantry-control",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        &path("data"),
        "--kubeconfig",
        &path("admin.kubeconfig"),
        "--agent-credentials",
        &format!("{}:node-a", path("agent")),
    ])
}

/// The certificate that a handshake shows now; the client has one of the CA, or none.
async fn shown(
    control: &Control,
    authority: &Authority,
    client: Option<&Credentials>,
) -> std::io::Result<Vec<u8>> {
    let certificate = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate(authority.certificate())).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match client {
        Some(client) => {
            let key = PrivateKeyDer::from_pem_slice(client.key.as_bytes()).unwrap();
            let chain = vec![certificate(&client.certificate)];
            builder.with_client_auth_cert(chain, key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    let tcp = tokio::net::TcpStream::connect(control.address()).await?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = connector.connect(name, tcp).await?;
    // A refusal of the client's certificate arrives with the first read only.
    let mut byte = [0; 1];
    tokio::io::AsyncReadExt::read_exact(&mut stream, &mut byte).await?;
    let chain = stream.get_ref().1.peer_certificates().unwrap();
    Ok(chain[0].to_vec())
}

#[tokio::test]
async fn a_renewed_certificate_is_in_the_next_handshake_and_open_connections_stay() {
    let dir = tempfile::tempdir().unwrap();
    let stop = CancellationToken::new();
    let arguments = arguments(dir.path());
    let control = Control::open(&arguments, &stop).await.unwrap();
    let authority = Authority::open(&dir.path().join("data")).unwrap();
    let client = authority.client("tester", "system:masters", 1).unwrap();

    let first = shown(&control, &authority, Some(&client)).await.unwrap();
    assert!(!control.renew_certificates().unwrap(), "nothing is due");
    assert_eq!(
        shown(&control, &authority, Some(&client)).await.unwrap(),
        first
    );

    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(authority.certificate()))
        .identity(Identity::from_pem(&client.certificate, &client.key));
    let endpoint = Endpoint::from_shared(format!("https://{}", control.address())).unwrap();
    let channel = endpoint.tls_config(tls).unwrap().connect().await.unwrap();
    let mut open = ObjectsClient::new(channel);
    let list = ListRequest {
        key: Some(ObjectKey {
            plural: "namespaces".into(),
            ..ObjectKey::default()
        }),
        ..ListRequest::default()
    };
    open.list(list.clone()).await.unwrap();

    let agent = dir.path().join("agent/client.crt");
    let agent_before = std::fs::read(&agent).unwrap();
    std::fs::remove_file(&agent).unwrap();
    let names = local_names(&arguments.server_names());
    authority.write_server_ending_in(&names, 10);
    assert!(control.renew_certificates().unwrap(), "its end is near");
    let second = shown(&control, &authority, Some(&client)).await.unwrap();
    assert_ne!(second, first);
    assert_ne!(std::fs::read(&agent).unwrap(), agent_before);
    open.list(list).await.unwrap();

    // Without a certificate a client gets as far as its token's check, and sees the same.
    let seen = shown(&control, &authority, None).await.unwrap();
    assert_eq!(seen, second);
    let other = tempfile::tempdir().unwrap();
    let stranger = Authority::open(other.path()).unwrap();
    let stranger = stranger.client("tester", "system:masters", 1).unwrap();
    assert!(
        shown(&control, &authority, Some(&stranger)).await.is_err(),
        "another CA"
    );
    stop.cancel();
    control.drain().await.unwrap();
}
