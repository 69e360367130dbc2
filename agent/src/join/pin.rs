//! The control plane's CA, known by the digest of its key only.
//!
//! One handshake, whose chain must hold a certificate with that key; nothing is sent. What is found is the
//! root that the next connection is checked against in full (chain, dates, names), before it carries the
//! token. Source: kubeadm's `--discovery-token-ca-cert-hash`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gantry_api::bootstrap_token::hex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::JoinError;
use crate::credentials::key_hash;

const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// What a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Digest of a CA's public key: `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaHash([u8; 32]);

impl std::str::FromStr for CaHash {
    type Err = String;

    fn from_str(text: &str) -> Result<CaHash, String> {
        let wrong = || {
            format!(
                "{text:?} is no CA hash: want sha256: and 64 hexadecimal digits; gantry token create \
                 --print-join-command on the control plane prints it"
            )
        };
        let digits = text.strip_prefix("sha256:").ok_or_else(wrong)?;
        if digits.len() != 64 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
        }
        Ok(CaHash(hash))
    }
}

impl std::fmt::Display for CaHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sha256:{}", hex(&self.0))
    }
}

/// Takes a chain that holds the pinned key, and remembers that certificate.
#[derive(Debug)]
struct Pin {
    wanted: CaHash,
    provider: Arc<CryptoProvider>,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    pinned: Option<CertificateDer<'static>>,
    /// The chain's last certificate has this key.
    last: Option<CaHash>,
}

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for certificate in std::iter::once(end_entity).chain(intermediates) {
            let hash = key_hash(certificate).map(CaHash);
            if hash == Some(self.wanted) {
                seen.pinned = Some(certificate.clone().into_owned());
                return Ok(ServerCertVerified::assertion());
            }
            seen.last = hash;
        }
        Err(CertificateError::UnknownIssuer.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// The CA of the control plane at `host:port`, as PEM, if its key has this digest.
pub(super) async fn authority(host: &str, port: u16, wanted: CaHash) -> Result<String, JoinError> {
    let server = super::authority_text(host, port);
    let unreachable = |reason: String| JoinError::Unreachable {
        server: server.clone(),
        reason,
    };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let pin = Arc::new(Pin {
        wanted,
        provider: provider.clone(),
        seen: Mutex::default(),
    });
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unreachable(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(pin.clone())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name =
        ServerName::try_from(host.to_owned()).map_err(|_| JoinError::Address(server.clone()))?;
    let tcp = timeout(DIAL_TIMEOUT, TcpStream::connect((host, port)));
    let tcp = tcp
        .await
        .map_err(|_| unreachable("no answer within 10 s".into()))?
        .map_err(|error| unreachable(error.to_string()))?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let shaken = timeout(HANDSHAKE_TIMEOUT, connector.connect(name, tcp)).await;
    let mut seen = pin.seen.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(certificate) = seen.pinned.take() {
        return Ok(pem(&certificate));
    }
    if let Some(found) = seen.last {
        return Err(JoinError::OtherCa {
            server: server.clone(),
            found,
            wanted,
        });
    }
    Err(match shaken {
        Err(_) => unreachable("it speaks no TLS (nothing within 10 s)".into()),
        Ok(Err(error)) => unreachable(error.to_string()),
        Ok(Ok(_)) => unreachable("it showed no certificate".into()),
    })
}

fn pem(der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_read_and_shown_and_nonsense_is_refused() {
        let text = format!("sha256:{}", "0aF".repeat(21) + "b");
        let hash: CaHash = text.parse().unwrap();
        assert_eq!(hash.to_string(), text.to_lowercase());
        for text in [
            "",
            "sha256:",
            "0aF",
            &text[..70],
            &format!("{text}0"),
            &text.replace("sha256", "md5"),
            &text.replace('b', "é"),
            &text.replace('b', "+"),
        ] {
            let words = text.parse::<CaHash>().unwrap_err();
            assert!(words.contains("--print-join-command"), "{words}");
        }
    }
}
