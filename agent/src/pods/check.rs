//! One look at a container, for probes and hooks: a command in it, or a request to it.
//!
//! HTTP follows the kubelet: no redirect is followed, certificates are not verified (the pod's own
//! address is asked), no connection is kept. gRPC is `grpc.health.v1.Health/Check`. Nothing here
//! waits for longer than its caller lets it: dropping the future ends the command or connection.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{
    Container, GRPCAction, HTTPGetAction, TCPSocketAction,
};
use gantry_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use http::uri::PathAndQuery;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tonic::transport::Endpoint;

use crate::ids::ContainerRun;
use crate::runtime::{ExecSpec, Runtime};

/// What an answer may take in memory; the rest is not read.
const ANSWER_BYTES_MAX: usize = 10 * 1024;
/// For output of a command that has ended, while a child of it keeps the stream open.
const LAST_WORDS_WAIT: Duration = Duration::from_millis(100);
const USER_AGENT: &str = "kube-probe/1.36";

/// The container that is looked at.
#[derive(Clone)]
pub struct Target {
    /// Which run.
    pub run: ContainerRun,
    /// Its configuration.
    pub config: Container,
    /// The pod's address, or the node's with host network.
    pub address: IpAddr,
    /// For commands.
    pub runtime: Arc<dyn Runtime>,
}

impl Target {
    /// Runs a command in the container; an exit code other than 0 is a failure, with its output.
    pub async fn exec(&self, command: Vec<String>) -> Result<(), String> {
        let spec = ExecSpec {
            run: self.run.clone(),
            command,
            stdin: false,
            tty: false,
        };
        let session = self.runtime.exec(&spec).await.map_err(|e| e.to_string())?;
        let mut limited = session.stdout.take(ANSWER_BYTES_MAX as u64);
        let mut output = Vec::new();
        // What it says only explains a failure; a command that says more is not held up.
        let stdout = async {
            let read = limited.read_to_end(&mut output).await;
            let drained = tokio::io::copy(limited.get_mut(), &mut tokio::io::sink()).await;
            read.and(drained)
        };
        let mut errors = Vec::new();
        let stderr = async {
            let Some(stderr) = session.stderr else {
                return Ok(0);
            };
            let mut limited = stderr.take(ANSWER_BYTES_MAX as u64);
            let read = limited.read_to_end(&mut errors).await;
            let drained = tokio::io::copy(limited.get_mut(), &mut tokio::io::sink()).await;
            read.and(drained)
        };
        // A daemon that the command leaves behind keeps the streams: its exit is what counts.
        let code = {
            let streams = async { tokio::join!(stdout, stderr) };
            let exit = session.exit;
            tokio::pin!(streams, exit);
            let mut read = false;
            let code = loop {
                tokio::select! {
                    // Cancel-safe: both are polled again, never started anew.
                    _ = &mut streams, if !read => read = true,
                    code = &mut exit => break code,
                }
            };
            if !read {
                // Its last words are in the pipe already.
                let _ = tokio::time::timeout(LAST_WORDS_WAIT, &mut streams).await;
            }
            code
        };
        match code {
            Ok(Ok(0)) => Ok(()),
            Ok(Ok(code)) => {
                output.extend(errors);
                let words = String::from_utf8_lossy(&output);
                Err(format!("command exited with {code}: {}", words.trim()))
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the command's shim went away".into()),
        }
    }

    /// One GET; returns the status code.
    pub async fn http(&self, get: &HTTPGetAction) -> Result<u16, String> {
        let address = self.socket_address(get.host.as_deref(), &get.port).await?;
        let path = match get.path.as_deref() {
            None | Some("") => "/".to_owned(),
            Some(path) if path.starts_with('/') => path.to_owned(),
            Some(path) => format!("/{path}"),
        };
        let headers = get.http_headers.iter().flatten();
        let host = headers
            .clone()
            .find(|h| h.name.eq_ignore_ascii_case("host"));
        let mut request = http::Request::get(&path).header(
            "host",
            host.map_or(address.to_string(), |h| h.value.clone()),
        );
        let own = |name: &str| headers.clone().any(|h| h.name.eq_ignore_ascii_case(name));
        if !own("user-agent") {
            request = request.header("user-agent", USER_AGENT);
        }
        if !own("accept") {
            request = request.header("accept", "*/*");
        }
        request = request.header("connection", "close");
        for header in headers.clone().filter(|h| {
            let name = h.name.to_ascii_lowercase();
            name != "host" && name != "connection"
        }) {
            request = request.header(&header.name, &header.value);
        }
        let request = request
            .body(Empty::<bytes::Bytes>::new())
            .map_err(|e| e.to_string())?;
        let stream = TcpStream::connect(address)
            .await
            .map_err(|e| format!("Get \"http://{address}{path}\": dial tcp {address}: {e}"))?;
        if get.scheme.as_deref() == Some("HTTPS") {
            let stream = tls::connect_unverified(stream, address.ip()).await?;
            answer(TokioIo::new(stream), request).await
        } else {
            answer(TokioIo::new(stream), request).await
        }
    }

    /// Whether somebody listens.
    pub async fn tcp(&self, tcp: &TCPSocketAction) -> Result<(), String> {
        let address = self.socket_address(tcp.host.as_deref(), &tcp.port).await?;
        match TcpStream::connect(address).await {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("dial tcp {address}: {error}")),
        }
    }

    /// Asks the container's own health service.
    pub async fn grpc(&self, action: &GRPCAction) -> Result<(), String> {
        let port = port_number(&self.config, &IntOrString::Int(action.port))?;
        let address = SocketAddr::new(self.address, port);
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .and_then(|e| e.user_agent(USER_AGENT))
            .map_err(|e| e.to_string())?
            .connect()
            .await
            .map_err(|e| format!("dial tcp {address}: {}", innermost(&e)))?;
        let mut client =
            tonic::client::Grpc::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
        client
            .ready()
            .await
            .map_err(|e| format!("grpc {address}: {e}"))?;
        let request = tonic::Request::new(health::CheckRequest {
            service: action.service.clone().unwrap_or_default(),
        });
        let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
        let codec =
            tonic_prost::ProstCodec::<health::CheckRequest, health::CheckResponse>::default();
        match client.unary(request, path, codec).await {
            Ok(answer) => match answer.into_inner().status {
                health::SERVING => Ok(()),
                status => Err(format!(
                    "service unhealthy (responded with {})",
                    health::name(status)
                )),
            },
            Err(status) if status.code() == tonic::Code::Unimplemented => Err(format!(
                "{address} does not implement the grpc health protocol (grpc.health.v1.Health)"
            )),
            Err(status) => Err(format!(
                "grpc {address}: {}: {}",
                status.code(),
                status.message()
            )),
        }
    }

    async fn socket_address(
        &self,
        host: Option<&str>,
        port: &IntOrString,
    ) -> Result<SocketAddr, String> {
        let port = port_number(&self.config, port)?;
        let Some(host) = host.filter(|h| !h.is_empty()) else {
            return Ok(SocketAddr::new(self.address, port));
        };
        let mut found = tokio::net::lookup_host((host, port))
            .await
            .map_err(|e| format!("lookup {host}: {e}"))?;
        found
            .next()
            .ok_or_else(|| format!("lookup {host}: no address"))
    }
}

/// The cause that a person can act on.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// A number, or the number of the container port of that name.
pub fn port_number(config: &Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => config
            .ports
            .iter()
            .flatten()
            .find(|p| p.name.as_deref() == Some(name))
            .map(|p| p.container_port)
            .or_else(|| name.parse().ok())
            .ok_or_else(|| format!("container {} has no port named {name:?}", config.name))?,
    };
    u16::try_from(number)
        .ok()
        .filter(|n| *n > 0)
        .ok_or_else(|| format!("port {number} is not within 1..=65535"))
}

/// Sends one request, reads a bounded part of the answer, returns its status code.
async fn answer<T>(io: T, request: http::Request<Empty<bytes::Bytes>>) -> Result<u16, String>
where
    T: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io)
        .await
        .map_err(|e| e.to_string())?;
    // It ends as soon as the answer is read, perhaps before we have looked at it: a task of its own.
    let driver = tokio::spawn(connection);
    let exchange = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|e| e.to_string())?;
        let status = response.status().as_u16();
        // A server that is cut off in its answer logs an error at every probe: read it out.
        let _ = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await;
        Ok(status)
    };
    let status = exchange.await;
    driver.abort();
    status
}

/// The messages of grpc.health.v1, two fields in all.
mod health {
    /// `HealthCheckRequest`
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct CheckRequest {
        /// Empty: the server as a whole.
        #[prost(string, tag = "1")]
        pub(super) service: String,
    }

    /// `HealthCheckResponse`
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct CheckResponse {
        /// `ServingStatus`
        #[prost(int32, tag = "1")]
        pub(super) status: i32,
    }

    /// `ServingStatus.SERVING`
    pub(super) const SERVING: i32 = 1;

    pub(super) fn name(status: i32) -> String {
        match status {
            0 => "UNKNOWN".into(),
            2 => "NOT_SERVING".into(),
            3 => "SERVICE_UNKNOWN".into(),
            other => other.to_string(),
        }
    }
}

/// TLS to the pod's own address: a probe asks whether something answers, not who it is.
mod tls {
    use std::net::IpAddr;
    use std::sync::Arc;

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
    use tokio::net::TcpStream;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client::TlsStream;

    #[derive(Debug)]
    struct AnyCertificate;

    impl ServerCertVerifier for AnyCertificate {
        fn verify_server_cert(
            &self,
            _end_entity: &CertificateDer<'_>,
            _intermediates: &[CertificateDer<'_>],
            _server_name: &ServerName<'_>,
            _ocsp: &[u8],
            _now: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            rustls::crypto::aws_lc_rs::default_provider()
                .signature_verification_algorithms
                .supported_schemes()
        }
    }

    pub(super) async fn connect_unverified(
        stream: TcpStream,
        address: IpAddr,
    ) -> Result<TlsStream<TcpStream>, String> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate))
            .with_no_client_auth();
        TlsConnector::from(Arc::new(config))
            .connect(ServerName::IpAddress(address.into()), stream)
            .await
            .map_err(|e| format!("tls: {e}"))
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
