//! `gantry-agent join`: a machine with a token becomes a node of a cluster.
//!
//! ```text
//!  HOST:PORT, CA hash ─► the CA ([`pin`]) ─► a connection checked against it ─► token, name, request
//!                                                           files in /etc/gantry/agent ◄─ certificate
//! ```
//! Of several control planes of one cluster one that answers is enough; the agent gets the addresses of all.
//! Then `gantry-agent run` needs no flags: the name is in the certificate, the control plane's address
//! beside it. The key is made here and never leaves. A join that was cut off is repeated with the same key,
//! which uses up nothing; one on a machine that has joined and is still known says so and does nothing.

pub mod pin;

use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_api::bootstrap_token::BootstrapToken;
use gantry_api::proto;
use gantry_api::proto::joining_client::JoiningClient;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use crate::credentials::{self, CredentialsError};
pub use pin::CaHash;

/// What one call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
const PORT_DEFAULT: u16 = 6443;
/// Control planes that one join may name.
const SERVER_COUNT_MAX: usize = 16;

/// Why the machine has not joined, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Not an address.
    #[error("{0:?} is no control plane: want HOST:PORT, for example 192.0.2.10:6443")]
    Address(String),
    /// Nobody answers.
    #[error(
        "the control plane at {server} cannot be reached: {reason}; is gantry-control running there, and \
         does every firewall in between let the port through?"
    )]
    Unreachable {
        /// `HOST:PORT`
        server: String,
        /// What happened.
        reason: String,
    },
    /// Another cluster, or somebody in between.
    #[error(
        "the CA of {server} is {found}, and --ca-hash says {wanted}: it is another cluster, or somebody is \
         in between. On the control plane, gantry token create --print-join-command prints the right line"
    )]
    OtherCa {
        /// `HOST:PORT`
        server: String,
        /// The digest of the CA there.
        found: CaHash,
        /// The one that was asked for.
        wanted: CaHash,
    },
    /// The server's certificate does not fit.
    #[error(
        "{server} has the right CA, but no certificate for that name or of this time ({reason}): use \
         another of its names, or start gantry-control with --san; check both clocks"
    )]
    Name {
        /// `HOST:PORT`
        server: String,
        /// What TLS said.
        reason: String,
    },
    /// The control plane says no.
    #[error("{0}")]
    Refused(String),
    /// This machine is a node already.
    #[error(
        "this machine is node {node} already, and {wanted} was asked for: run gantry reset first, then join \
         again"
    )]
    OtherName {
        /// Its name.
        node: String,
        /// What was asked for.
        wanted: String,
    },
    /// The files.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// Not a token.
    #[error("{0}")]
    Token(&'static str),
}

/// What a join is to do.
pub struct Join {
    /// `HOST:PORT` or an `https://` URL of that, or several with commas between.
    pub server: String,
    /// `abcdef.0123456789abcdef`
    pub token: String,
    /// Whom to believe.
    pub ca_hash: CaHash,
    /// The name to get.
    pub node: String,
    /// Where the credentials go.
    pub credentials: PathBuf,
    /// `/etc/machine-id`; empty where there is none.
    pub machine_id: String,
    /// Agent starts that this machine remembers.
    pub incarnation: u64,
}

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Joined {
    /// The node's name.
    pub node: String,
    /// `https://HOST:PORT`, or several with commas between.
    pub server: String,
    /// When the certificate ends, Unix time.
    pub not_after_s: i64,
    /// It had joined before; nothing was done.
    pub before: bool,
}

fn authority_text(host: &str, port: u16) -> String {
    if host.contains(':') {
        return format!("[{host}]:{port}");
    }
    format!("{host}:{port}")
}

/// Host and port of `HOST[:PORT]`, `[IPV6]:PORT` or `https://` and one of these.
fn host_and_port(text: &str) -> Result<(String, u16), JoinError> {
    let wrong = || JoinError::Address(text.to_owned());
    let rest = text.strip_prefix("https://").unwrap_or(text);
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if rest.parse::<Ipv6Addr>().is_ok() {
        return Ok((rest.to_owned(), PORT_DEFAULT));
    }
    let (host, port) = match rest.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(wrong)?;
            host.parse::<Ipv6Addr>().map_err(|_| wrong())?;
            let port = match port {
                "" => None,
                port => Some(port.strip_prefix(':').ok_or_else(wrong)?),
            };
            (host, port)
        }
        None => match rest.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (rest, None),
        },
    };
    let port = match port {
        None => PORT_DEFAULT,
        Some(port) => port
            .parse()
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(wrong)?,
    };
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
    if host.is_empty() || !host.chars().all(is_plain) {
        return Err(wrong());
    }
    Ok((host.to_owned(), port))
}

/// One control plane.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Server {
    host: String,
    port: u16,
}

impl Server {
    fn address(&self) -> String {
        authority_text(&self.host, self.port)
    }

    fn url(&self) -> String {
        format!("https://{}", self.address())
    }
}

/// All of a list with commas, each once.
fn servers(text: &str) -> Result<Vec<Server>, JoinError> {
    let mut servers = Vec::new();
    for word in text.split(',') {
        let (host, port) = host_and_port(word.trim())?;
        let server = Server { host, port };
        if !servers.contains(&server) {
            servers.push(server);
        }
    }
    match servers.len() > SERVER_COUNT_MAX {
        true => Err(JoinError::Address(text.to_owned())),
        false => Ok(servers),
    }
}

/// The count of agent starts below `/var/lib/gantry`; 0: none.
pub fn incarnation(lib: &Path) -> u64 {
    let text = std::fs::read_to_string(lib.join("feed/incarnation"));
    text.ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

/// See the module.
///
/// # Errors
/// In words for who ran the command: why not, and what to do.
pub async fn join(join: &Join) -> Result<Joined, JoinError> {
    let servers = servers(&join.server)?;
    let token = BootstrapToken::parse(&join.token).map_err(JoinError::Token)?;
    let urls = servers.iter().map(Server::url).collect::<Vec<_>>();
    let urls = urls.join(",");
    if let Some(held) = credentials::joined(&join.credentials)? {
        if held.node != join.node {
            return Err(JoinError::OtherName {
                node: held.node,
                wanted: join.node.clone(),
            });
        }
        let is_here = credentials::server(&join.credentials) == Some(urls.clone());
        if is_here && !held.has_ended() && is_known(&servers, &join.credentials).await {
            return Ok(Joined {
                node: held.node,
                server: urls,
                not_after_s: held.not_after_s,
                before: true,
            });
        }
    }
    let (server, ca) = reachable(&servers, join.ca_hash).await?;
    let request = credentials::join_request(&join.credentials, &join.node)?;
    let reply = call(server, &ca, join, &token, &request).await?;
    credentials::write_joined(
        &join.credentials,
        &urls,
        &ca,
        &reply.certificate_pem,
        &request.key,
    )?;
    Ok(Joined {
        node: join.node.clone(),
        server: urls,
        not_after_s: reply.not_after_s,
        before: false,
    })
}

/// The first that answers, and its CA. One that shows another CA ends it: what the others say is not asked.
async fn reachable(servers: &[Server], wanted: CaHash) -> Result<(&Server, String), JoinError> {
    let mut reasons = Vec::new();
    for server in servers {
        match pin::authority(&server.host, server.port, wanted).await {
            Ok(ca) => return Ok((server, ca)),
            Err(JoinError::Unreachable { server, reason }) => reasons.push((server, reason)),
            Err(error) => return Err(error),
        }
    }
    let all = reasons.iter().map(|(server, _)| server.as_str());
    let server = all.collect::<Vec<_>>().join(" or ");
    let words = reasons.iter().map(|(_, reason)| reason.as_str());
    let reason = words.collect::<Vec<_>>().join("; ");
    Err(JoinError::Unreachable { server, reason })
}

/// Whether the control plane takes the certificate that is there; one that cannot be asked counts as yes.
async fn is_known(servers: &[Server], directory: &Path) -> bool {
    for server in servers {
        if let Some(is_known) = knows(server, directory).await {
            return is_known;
        }
    }
    true
}

/// `None`: it cannot be asked.
async fn knows(server: &Server, directory: &Path) -> Option<bool> {
    let Ok(pem) = credentials::read(directory) else {
        return Some(false);
    };
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(pem.ca))
        .identity(Identity::from_pem(pem.certificate, pem.key));
    let endpoint = Endpoint::from_shared(server.url());
    let endpoint = endpoint.and_then(|endpoint| endpoint.tls_config(tls));
    let Ok(endpoint) = endpoint else {
        return Some(false);
    };
    let endpoint = endpoint.connect_timeout(CALL_TIMEOUT).timeout(CALL_TIMEOUT);
    let channel = endpoint.connect().await.ok()?;
    // A request for nothing: who is known is told that it cannot be read.
    let asked = JoiningClient::new(channel)
        .renew(proto::RenewRequest::default())
        .await;
    Some(!asked.is_err_and(|status| status.code() == tonic::Code::Unauthenticated))
}

async fn call(
    server: &Server,
    ca: &str,
    join: &Join,
    token: &BootstrapToken,
    request: &credentials::Request,
) -> Result<proto::NodeCertificate, JoinError> {
    let name = |reason: String| JoinError::Name {
        server: server.address(),
        reason,
    };
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
    let endpoint = Endpoint::from_shared(server.url())
        .map_err(|_| JoinError::Address(server.address()))?
        .connect_timeout(CALL_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        .tls_config(tls)
        .map_err(|error| name(error.to_string()))?;
    // The address answered a moment ago: what fails now is the full check of the certificate.
    let channel = endpoint.connect().await.map_err(|error| {
        let mut words = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(error) = source {
            words = error.to_string();
            source = error.source();
        }
        name(words)
    })?;
    let message = proto::JoinRequest {
        token: token.expose().to_owned(),
        node: join.node.clone(),
        request_der: request.der.clone().into(),
        machine_id: join.machine_id.clone(),
        incarnation: join.incarnation,
    };
    let reply = JoiningClient::new(channel).join(message).await;
    let reply = reply.map_err(|status| match status.code() {
        tonic::Code::Unimplemented => {
            JoinError::Refused("that control plane is older and lets no machine join".into())
        }
        _ => JoinError::Refused(status.message().to_owned()),
    })?;
    Ok(reply.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_control_plane_is_a_host_and_a_port() {
        for (text, host, port) in [
            ("192.0.2.1:6443", "192.0.2.1", 6443),
            ("control.example", "control.example", 6443),
            ("https://c:7/", "c", 7),
            ("[2001:db8::1]:8", "2001:db8::1", 8),
            ("[2001:db8::1]", "2001:db8::1", 6443),
            ("2001:db8::1", "2001:db8::1", 6443),
        ] {
            assert_eq!(
                host_and_port(text).unwrap(),
                (host.to_owned(), port),
                "{text}"
            );
        }
        for text in [
            "", ":6443", "c:", "c:0", "c:70000", "c:x", "http://c", "a@c", "c/x", "c d",
        ] {
            assert!(host_and_port(text).is_err(), "{text}");
        }
    }

    #[test]
    fn several_control_planes_are_a_list_with_commas() {
        let urls = |text: &str| {
            let servers = servers(text).unwrap();
            servers.iter().map(Server::url).collect::<Vec<_>>()
        };
        assert_eq!(urls("a"), ["https://a:6443"]);
        assert_eq!(
            urls("a:1, https://b:2/,a:1,[2001:db8::1]"),
            ["https://a:1", "https://b:2", "https://[2001:db8::1]:6443"]
        );
        assert!(servers("a,").is_err());
        assert!(servers("a,c d").is_err());
        let many = (0..17).map(|n| format!("c{n}")).collect::<Vec<_>>();
        assert!(servers(&many[1..].join(",")).is_ok());
        assert!(servers(&many.join(",")).is_err());
    }

    proptest! {
        #[test]
        fn no_address_panics(text in "\\PC{0,20}|[a-z0-9:\\[\\]/.@]{0,20}") {
            let _ = host_and_port(&text);
        }
    }
}
