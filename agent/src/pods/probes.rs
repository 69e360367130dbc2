//! Probes: exec, HTTP and TCP checks of running containers, and the thresholds they must cross.
//!
//! ```text
//!            startup succeeds                 threshold crossed
//! Startup ─────────────────► Live ──────────────────────────────► Input::Probe
//!            (or none)       liveness and readiness side by side
//! ```
//! The counters ([`Threshold`]) are pure. One task per container probes; it ends with the run.
//! HTTP follows the kubelet: any 200..=399 is healthy, no redirect is followed, certificates of
//! HTTPS probes are not verified (the pod's own address is asked), no connection is kept.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Container, HTTPGetAction, Probe};
use gantry_api::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::state::{Input, ProbeKind};
use crate::ids::ContainerRun;
use crate::runtime::{ExecSpec, Runtime};

/// What an HTTP or exec probe's answer may take in memory; the rest is not read.
const ANSWER_BYTES_MAX: usize = 10 * 1024;

/// A probe's verdicts become a change only after so many in a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Threshold {
    success: u32,
    failure: u32,
    streak: u32,
    streak_healthy: bool,
    reported: Option<bool>,
}

impl Threshold {
    /// `reported` is what is known already: a restarted agent reports no change that is none.
    pub fn new(probe: &Probe, reported: Option<bool>) -> Self {
        let at_least_one = |n: Option<i32>, default: i32| n.unwrap_or(default).max(1) as u32;
        Self {
            success: at_least_one(probe.success_threshold, 1),
            failure: at_least_one(probe.failure_threshold, 3),
            streak: 0,
            streak_healthy: false,
            reported,
        }
    }

    /// Takes one verdict; returns the new state when a threshold is crossed.
    pub fn take(&mut self, healthy: bool) -> Option<bool> {
        if healthy == self.streak_healthy {
            self.streak = self.streak.saturating_add(1);
        } else {
            self.streak_healthy = healthy;
            self.streak = 1;
        }
        let needed = if healthy { self.success } else { self.failure };
        if self.streak < needed || self.reported == Some(healthy) {
            return None;
        }
        self.reported = Some(healthy);
        Some(healthy)
    }
}

/// Where and with what a container's probes work.
pub struct Prober {
    /// Which run.
    pub run: ContainerRun,
    /// Its configuration.
    pub config: Container,
    /// The pod's address, or the node's with host network.
    pub address: IpAddr,
    /// For exec probes.
    pub runtime: Arc<dyn Runtime>,
    /// Verdicts go here.
    pub inputs: mpsc::Sender<Input>,
    /// Failures go here, for events: words of one failed check.
    pub failures: mpsc::Sender<(ProbeKind, String)>,
    /// Known from before an agent restart.
    pub already_started: bool,
    /// Known from before an agent restart.
    pub already_ready: bool,
}

impl Prober {
    /// Probes until the run ends (the task is aborted) or the receiver is gone.
    pub async fn watch(self) {
        if let Some(probe) = &self.config.startup_probe
            && !self.already_started
        {
            self.repeat(probe, ProbeKind::Startup, None, true).await;
        }
        let liveness = async {
            if let Some(probe) = &self.config.liveness_probe {
                self.repeat(probe, ProbeKind::Liveness, Some(true), false)
                    .await;
            }
        };
        let readiness = async {
            if let Some(probe) = &self.config.readiness_probe {
                let known = Some(self.already_ready);
                self.repeat(probe, ProbeKind::Readiness, known, false).await;
            }
        };
        tokio::join!(liveness, readiness);
    }

    async fn repeat(&self, probe: &Probe, kind: ProbeKind, known: Option<bool>, until_ok: bool) {
        let seconds =
            |n: Option<i32>, default: i32| Duration::from_secs(n.unwrap_or(default).max(0) as u64);
        let period = seconds(probe.period_seconds, 10).max(Duration::from_secs(1));
        let limit = seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1));
        let mut threshold = Threshold::new(probe, known);
        if !self.already_started {
            sleep(seconds(probe.initial_delay_seconds, 0)).await;
        }
        loop {
            let began = Instant::now();
            let verdict = match timeout(limit, self.check(probe)).await {
                Ok(verdict) => verdict,
                Err(_) => Err(format!("no answer within {} s", limit.as_secs())),
            };
            if let Err(words) = &verdict {
                // A full channel only means that the same words are on their way already.
                let _ = self.failures.try_send((kind, words.clone()));
            }
            if let Some(healthy) = threshold.take(verdict.is_ok()) {
                let input = Input::Probe(self.run.clone(), kind, healthy);
                if self.inputs.send(input).await.is_err() || (until_ok && healthy) {
                    return;
                }
            }
            sleep(period.saturating_sub(began.elapsed())).await;
        }
    }

    /// One check: healthy, or the words of the failure.
    async fn check(&self, probe: &Probe) -> Result<(), String> {
        if let Some(exec) = &probe.exec {
            return self.exec(exec.command.clone().unwrap_or_default()).await;
        }
        if let Some(get) = &probe.http_get {
            return self.http(get).await;
        }
        if let Some(tcp) = &probe.tcp_socket {
            let address = self.socket_address(tcp.host.as_deref(), &tcp.port).await?;
            return match TcpStream::connect(address).await {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("dial tcp {address}: {error}")),
            };
        }
        Err("the probe names no exec, httpGet or tcpSocket".into())
    }

    async fn exec(&self, command: Vec<String>) -> Result<(), String> {
        let spec = ExecSpec {
            run: self.run.clone(),
            command,
            stdin: false,
            tty: false,
        };
        let session = self.runtime.exec(&spec).await.map_err(|e| e.to_string())?;
        let mut output = Vec::new();
        let mut limited = session.stdout.take(ANSWER_BYTES_MAX as u64);
        // What it says only explains a failure; a command that says more is not held up.
        let (_, code) = tokio::join!(
            async {
                let read = limited.read_to_end(&mut output).await;
                let drained = tokio::io::copy(limited.get_mut(), &mut tokio::io::sink()).await;
                read.and(drained)
            },
            session.exit
        );
        match code {
            Ok(Ok(0)) => Ok(()),
            Ok(Ok(code)) => {
                let words = String::from_utf8_lossy(&output);
                Err(format!("command exited with {code}: {}", words.trim()))
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the command's shim went away".into()),
        }
    }

    async fn http(&self, get: &HTTPGetAction) -> Result<(), String> {
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
        let mut request = http::Request::get(&path)
            .header(
                "host",
                host.map_or(address.to_string(), |h| h.value.clone()),
            )
            .header("user-agent", "kube-probe/1.36")
            .header("connection", "close");
        for header in headers.filter(|h| !h.name.eq_ignore_ascii_case("host")) {
            request = request.header(&header.name, &header.value);
        }
        let request = request
            .body(Empty::<bytes::Bytes>::new())
            .map_err(|e| e.to_string())?;
        let stream = TcpStream::connect(address)
            .await
            .map_err(|e| format!("Get \"http://{address}{path}\": dial tcp {address}: {e}"))?;
        let https = get.scheme.as_deref() == Some("HTTPS");
        let status = if https {
            let stream = tls::connect_unverified(stream, address.ip()).await?;
            answer(TokioIo::new(stream), request).await?
        } else {
            answer(TokioIo::new(stream), request).await?
        };
        if (200..400).contains(&status) {
            return Ok(());
        }
        Err(format!("HTTP probe failed with statuscode: {status}"))
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn probe(success: i32, failure: i32) -> Probe {
        Probe {
            success_threshold: Some(success),
            failure_threshold: Some(failure),
            ..Probe::default()
        }
    }

    #[test]
    fn failures_count_only_in_a_row() {
        let mut threshold = Threshold::new(&probe(1, 3), Some(true));
        let verdicts = [false, false, true, false, false, false, false];
        let changes: Vec<_> = verdicts.iter().map(|v| threshold.take(*v)).collect();
        assert_eq!(changes, [None, None, None, None, None, Some(false), None]);
    }

    #[test]
    fn a_state_known_before_is_not_reported_again() {
        let mut threshold = Threshold::new(&probe(1, 1), Some(true));
        assert_eq!(threshold.take(true), None);
        let mut fresh = Threshold::new(&probe(1, 1), Some(false));
        assert_eq!(fresh.take(true), Some(true));
    }

    #[test]
    fn named_ports_are_looked_up() {
        let config: Container = serde_json::from_value(serde_json::json!({
            "name": "a", "ports": [{"name": "web", "containerPort": 8080}]
        }))
        .unwrap();
        assert_eq!(
            port_number(&config, &IntOrString::String("web".into())),
            Ok(8080)
        );
        assert!(port_number(&config, &IntOrString::String("nope".into())).is_err());
        assert!(port_number(&config, &IntOrString::Int(0)).is_err());
        assert!(port_number(&config, &IntOrString::Int(70_000)).is_err());
    }

    proptest! {
        #[test]
        fn reports_alternate(
            success in 1i32..4,
            failure in 1i32..4,
            verdicts in prop::collection::vec(any::<bool>(), 0..60),
        ) {
            let mut threshold = Threshold::new(&probe(success, failure), None);
            let reports: Vec<bool> = verdicts.iter().filter_map(|v| threshold.take(*v)).collect();
            prop_assert!(reports.windows(2).all(|w| w[0] != w[1]));
        }
    }
}
