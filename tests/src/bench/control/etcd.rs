//! etcd, as far as it is compared with: one member on loopback with TLS and client certificates, as
//! Kubernetes runs it, and puts by its gRPC API.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use gantry_control::pki::{Authority, ServerName};
use tonic::transport::Channel;

use super::super::api::Access;

const START_TIMEOUT: Duration = Duration::from_secs(30);
const PUT: &str = "/etcdserverpb.KV/Put";

/// `etcdserverpb.PutRequest`, the fields that are used.
#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// `etcdserverpb.PutResponse`; nothing of it is used.
#[derive(Clone, PartialEq, prost::Message)]
struct PutResponse {}

/// A running member. Dropping it kills it.
pub(super) struct Etcd {
    child: Child,
    access: Access,
}

/// One client's connection.
#[derive(Clone)]
pub(super) struct EtcdClient(tonic::client::Grpc<Channel>);

impl Etcd {
    /// Starts a member whose data is in `dir`; the reason where there is no etcd.
    pub(super) async fn start(dir: &Path) -> Result<Result<Self, String>> {
        let authority = Authority::open(dir)?;
        let serving = authority.server(&[ServerName::parse("127.0.0.1")])?;
        let client = authority.client("root", "bench", 1)?;
        let (certificate, key) = (dir.join("etcd.crt"), dir.join("etcd.key"));
        std::fs::write(&certificate, &serving.certificate)?;
        std::fs::write(&key, &serving.key)?;
        let [client_port, peer_port] = free_ports()?;
        let url = format!("https://127.0.0.1:{client_port}");
        let peer = format!("http://127.0.0.1:{peer_port}");
        let mut command = Command::new("etcd");
        command.args(["--name", "bench", "--log-level", "error"]);
        command.args([
            "--listen-client-urls",
            &url,
            "--advertise-client-urls",
            &url,
        ]);
        command.args(["--listen-peer-urls", &peer]);
        command.args(["--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("bench={peer}")]);
        // The gateway would dial its own port with a certificate that is for servers only.
        command.args(["--enable-grpc-gateway=false", "--client-cert-auth"]);
        command.arg("--data-dir").arg(dir.join("etcd"));
        command.arg("--trusted-ca-file").arg(dir.join("pki/ca.crt"));
        command.arg("--cert-file").arg(certificate);
        command.arg("--key-file").arg(key);
        let log = std::fs::File::create(dir.join("etcd.log"))?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Err("etcd is not installed".into()));
            }
            Err(error) => return Err(error).context("start etcd"),
        };
        let access = Access {
            server: url,
            ca: authority.certificate().as_bytes().to_vec(),
            certificate: client.certificate.into_bytes(),
            key: client.key.into_bytes(),
        };
        let mut etcd = Self { child, access };
        let began = Instant::now();
        loop {
            if let Some(status) = etcd.child.try_wait()? {
                let said = std::fs::read_to_string(dir.join("etcd.log")).unwrap_or_default();
                bail!("etcd has ended, {status}: {}", said.trim_end());
            }
            let first = async { etcd.client().await?.put("/bench", b"first").await };
            match first.await {
                Ok(()) => return Ok(Ok(etcd)),
                Err(error) if began.elapsed() > START_TIMEOUT => {
                    return Err(error.context("etcd does not take a put"));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// A connection of its own.
    pub(super) async fn client(&self) -> Result<EtcdClient> {
        let channel = self.access.connect().await?;
        Ok(EtcdClient(tonic::client::Grpc::new(channel)))
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl EtcdClient {
    /// Durable when it returns.
    pub(super) async fn put(&mut self, key: &str, value: &[u8]) -> Result<()> {
        let request = PutRequest {
            key: key.as_bytes().to_vec(),
            value: value.to_vec(),
        };
        self.0.ready().await?;
        let codec = tonic_prost::ProstCodec::<PutRequest, PutResponse>::default();
        let path = http::uri::PathAndQuery::from_static(PUT);
        self.0
            .unary(tonic::Request::new(request), path, codec)
            .await?;
        Ok(())
    }
}

/// Ports that nobody listens on now.
fn free_ports() -> Result<[u16; 2]> {
    let listeners = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0"));
    let [first, second] = listeners;
    Ok([first?.local_addr()?.port(), second?.local_addr()?.port()])
}
