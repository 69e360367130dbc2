//! The cluster's certificates: one CA, the server's certificate, and the first client credentials.
//!
//! ```text
//!  <data dir>/pki/ca.{crt,key}       made once, 10 years, ECDSA P-256
//!  <data dir>/pki/server.{crt,key}   1 year; again when a name is missing or the end is near
//!  <data dir>/pki/service-accounts.key  made once, ECDSA P-256: signs tokens
//!  <kubeconfig>                      the administrator: kubernetes-admin in system:masters
//!  <dir>/{client.crt,client.key,ca.crt}  an agent: system:node:NAME in system:nodes
//!  a node that joins ([`node`])      the same, for its own key; kept by the node alone
//! ```
//! Every start checks each of them and makes only what is missing, about to expire, of another CA or
//! (the server's) lacks a name. Files with keys are 0600 and appear whole or not at all.

mod carried;
mod file;
mod node;
mod san;

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp, Zoned, tz::TimeZone};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension};

use crate::server::identity::{MASTERS_GROUP, NODE_USER_PREFIX, NODES_GROUP};
pub(crate) use file::read_if_there;
use file::write_atomic;

pub use carried::{carried_files, differing_file, write_carried};
pub use node::{NodeKey, REQUEST_BYTES_MAX, key_hash};
pub use san::{ServerName, local_names};

const CA_NAME: &str = "gantry-ca";
const CA_DAYS: i64 = 3_653;
const LEAF_DAYS: i64 = 365;
/// A certificate that ends within this time is made again.
const RENEW_DAYS: i64 = 30;
const ADMIN_USER: &str = "kubernetes-admin";

/// Files that only their owner may read.
const PRIVATE: u32 = 0o600;
/// Files without a secret.
const PUBLIC: u32 = 0o644;

/// Writes a file that only its owner may read, in a directory that is made if it is not there: it appears
/// whole or not at all.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> Result<(), PkiError> {
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        file::ensure_directory(parent)?;
    }
    write_atomic(path, content, PRIVATE)
}

/// Why the certificates are not to be had.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file cannot be read or written.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// read, write or create
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is there but is not what it should be.
    #[error("{path}: {reason}")]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A certificate could not be made.
    #[error("cannot make the certificate of {name}: {source}")]
    Make {
        /// Its common name.
        name: String,
        /// What rcgen said.
        source: rcgen::Error,
    },
}

/// A certificate and its key, both as PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

/// The certificate authority in `<data dir>/pki`.
pub struct Authority {
    directory: PathBuf,
    certificate: String,
    /// The certificate's DER, to check leaves against.
    der: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

/// What a leaf certificate is for.
enum Purpose<'a> {
    Server(&'a [ServerName]),
    Client { group: &'a str },
}

impl Authority {
    /// Opens the authority, making it at the first start.
    pub fn open(data_dir: &Path) -> Result<Authority, PkiError> {
        let directory = data_dir.join("pki");
        file::ensure_directory(&directory)?;
        let (certificate_path, key_path) = (directory.join("ca.crt"), directory.join("ca.key"));
        let bad = |reason: &str| PkiError::Bad {
            path: certificate_path.clone(),
            reason: reason.to_owned(),
        };
        let (certificate, key) =
            match (read_if_there(&certificate_path)?, read_if_there(&key_path)?) {
                (Some(certificate), Some(key)) => (certificate, key),
                (None, None) => {
                    let made = make_authority()?;
                    // The key first: a certificate without its key would stop the next start.
                    write_atomic(&key_path, made.key.as_bytes(), PRIVATE)?;
                    write_atomic(&certificate_path, made.certificate.as_bytes(), PUBLIC)?;
                    tracing::info!(path = %certificate_path.display(), "made the cluster's CA");
                    (made.certificate, made.key)
                }
                (None, Some(_)) => {
                    return Err(bad(
                        "ca.key is there, ca.crt is not: restore it, or remove ca.key to \
                                start a new CA (all credentials are then made again)",
                    ));
                }
                (Some(_), None) => {
                    return Err(bad(
                        "ca.key is missing beside it: restore it, or remove ca.crt to start \
                                a new CA (all credentials are then made again)",
                    ));
                }
            };
        let key = KeyPair::from_pem(&key).map_err(|error| PkiError::Bad {
            path: key_path,
            reason: format!("not a private key in PEM: {error}"),
        })?;
        let der = der_of(&certificate).ok_or_else(|| bad("not a certificate in PEM"))?;
        check_authority(&der, &key).map_err(|reason| bad(&reason))?;
        Ok(Authority {
            directory,
            certificate,
            der,
            issuer: Issuer::new(authority_params(), key),
        })
    }

    /// The CA's certificate as PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// The key that signs the tokens of service accounts, made at the first start. Whoever removes it
    /// makes every token invalid at the next start.
    pub fn token_key(&self) -> Result<KeyPair, PkiError> {
        let path = self.directory.join("service-accounts.key");
        if let Some(text) = read_if_there(&path)? {
            return KeyPair::from_pem(&text).map_err(|error| PkiError::Bad {
                reason: format!(
                    "not a private key in PEM: {error}; restore it, or remove it to sign with a new one"
                ),
                path,
            });
        }
        let key = KeyPair::generate().map_err(|source| PkiError::Make {
            name: "service accounts".to_owned(),
            source,
        })?;
        write_atomic(&path, key.serialize_pem().as_bytes(), PRIVATE)?;
        Ok(key)
    }

    /// The server's credentials for these names.
    pub fn server(&self, names: &[ServerName]) -> Result<Credentials, PkiError> {
        let certificate_path = self.directory.join("server.crt");
        let key_path = self.directory.join("server.key");
        if let (Some(certificate), Some(key)) =
            (read_if_there(&certificate_path)?, read_if_there(&key_path)?)
        {
            let found = Credentials { certificate, key };
            match self.reason_to_renew(&found, names) {
                None => return Ok(found),
                Some(reason) => tracing::info!(%reason, "the server's certificate is made again"),
            }
        }
        let made = self.make_leaf("gantry-control", &Purpose::Server(names))?;
        write_atomic(&key_path, made.key.as_bytes(), PRIVATE)?;
        write_atomic(&certificate_path, made.certificate.as_bytes(), PUBLIC)?;
        Ok(made)
    }

    /// Puts a certificate that ends in `days` in place of the server's.
    #[cfg(test)]
    pub(crate) fn write_server_ending_in(&self, names: &[ServerName], days: i64) {
        let made = self.make_leaf_for("gantry-control", &Purpose::Server(names), days);
        let made = made.unwrap_or_else(|error| panic!("{error}"));
        for (name, text) in [("server.key", &made.key), ("server.crt", &made.certificate)] {
            let path = self.directory.join(name);
            write_atomic(&path, text.as_bytes(), PRIVATE).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    /// Makes sure that the kubeconfig at `path` lets its reader administrate the cluster at `server`
    /// (a URL).
    pub fn ensure_kubeconfig(&self, path: &Path, server: &str) -> Result<(), PkiError> {
        if let Some(text) = read_if_there(path)?
            && text.contains(&format!("server: {server}\n"))
            && let Some(found) = kubeconfig_credentials(&text)
            && self.reason_to_renew(&found, &[]).is_none()
        {
            return Ok(());
        }
        let purpose = Purpose::Client {
            group: MASTERS_GROUP,
        };
        let made = self.make_leaf(ADMIN_USER, &purpose)?;
        let text = kubeconfig(server, &self.certificate, &made);
        if let Some(parent) = path.parent() {
            file::ensure_parent(parent)?;
        }
        write_atomic(path, text.as_bytes(), PRIVATE)?;
        tracing::info!(path = %path.display(), "wrote the administrator's kubeconfig");
        Ok(())
    }

    /// Makes sure that `directory` holds the credentials of the agent on `node`.
    pub fn ensure_agent(&self, directory: &Path, node: &str) -> Result<(), PkiError> {
        file::ensure_directory(directory)?;
        let paths = ["client.crt", "client.key", "ca.crt"].map(|name| directory.join(name));
        let [certificate_path, key_path, ca_path] = &paths;
        let user = format!("{NODE_USER_PREFIX}{node}");
        let found = [
            read_if_there(certificate_path)?,
            read_if_there(key_path)?,
            read_if_there(ca_path)?,
        ];
        if let [Some(certificate), Some(key), Some(ca)] = found {
            let found = Credentials { certificate, key };
            let is_current = self.reason_to_renew(&found, &[]).is_none()
                && common_name(&found.certificate).as_deref() == Some(&*user)
                && ca == self.certificate;
            if is_current {
                return Ok(());
            }
        }
        let purpose = Purpose::Client { group: NODES_GROUP };
        let made = self.make_leaf(&user, &purpose)?;
        write_atomic(ca_path, self.certificate.as_bytes(), PUBLIC)?;
        write_atomic(key_path, made.key.as_bytes(), PRIVATE)?;
        write_atomic(certificate_path, made.certificate.as_bytes(), PRIVATE)?;
        tracing::info!(directory = %directory.display(), node, "wrote an agent's credentials");
        Ok(())
    }

    /// Credentials of any user for some days: kept nowhere.
    pub fn client(
        &self,
        user: &str,
        group: &str,
        validity_days: i64,
    ) -> Result<Credentials, PkiError> {
        self.make_leaf_for(user, &Purpose::Client { group }, validity_days)
    }

    fn make_leaf(&self, name: &str, purpose: &Purpose<'_>) -> Result<Credentials, PkiError> {
        self.make_leaf_for(name, purpose, LEAF_DAYS)
    }

    fn make_leaf_for(
        &self,
        name: &str,
        purpose: &Purpose<'_>,
        days: i64,
    ) -> Result<Credentials, PkiError> {
        self.try_make_leaf(name, purpose, days)
            .map_err(|source| PkiError::Make {
                name: name.to_owned(),
                source,
            })
    }

    fn try_make_leaf(
        &self,
        name: &str,
        purpose: &Purpose<'_>,
        days: i64,
    ) -> Result<Credentials, rcgen::Error> {
        let mut params = CertificateParams::default();
        set_validity(&mut params, days);
        let mut subject = DistinguishedName::new();
        subject.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        match purpose {
            Purpose::Server(names) => {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
                let names = names.iter().map(|name| match name {
                    ServerName::Address(address) => Ok(SanType::IpAddress(*address)),
                    ServerName::Dns(name) => name.as_str().try_into().map(SanType::DnsName),
                });
                params.subject_alt_names = names.collect::<Result<_, _>>()?;
            }
            Purpose::Client { group } => {
                subject.push(DnType::OrganizationName, *group);
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            }
        }
        params.distinguished_name = subject;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Credentials {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }

    /// Whether the certificate names the CA's key as its issuer's. These files are our own: this
    /// detects a new CA, not a forgery.
    fn has_issued(&self, certificate: &X509Certificate<'_>) -> bool {
        let Ok((_, authority)) = X509Certificate::from_der(&self.der) else {
            return false;
        };
        let issuer = authority_key_id(certificate);
        issuer.is_some() && issuer == subject_key_id(&authority)
    }

    /// Why found credentials do not do: unreadable, of another CA or key, near their end, or without
    /// one of `names`.
    fn reason_to_renew(&self, found: &Credentials, names: &[ServerName]) -> Option<String> {
        let Some(der) = der_of(&found.certificate) else {
            return Some("it cannot be read".to_owned());
        };
        let Ok((_, certificate)) = X509Certificate::from_der(&der) else {
            return Some("it cannot be read".to_owned());
        };
        if !self.has_issued(&certificate) {
            return Some("it is of another CA".to_owned());
        }
        let own_key = KeyPair::from_pem(&found.key).ok();
        if !own_key.is_some_and(|key| key_matches(&certificate, &key)) {
            return Some("its key is another one".to_owned());
        }
        if ends_soon(&certificate) {
            return Some(format!("it ends at {}", certificate.validity().not_after));
        }
        let held = names_of(&certificate);
        let missing = names.iter().find(|name| !held.contains(name))?;
        Some(format!("it lacks the name {missing}"))
    }
}

/// The key identifiers that tie a leaf to the key of its CA: digests of that key.
fn authority_key_id<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a [u8]> {
    certificate
        .extensions()
        .iter()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(id) => Some(id.key_identifier.as_ref()?.0),
            _ => None,
        })
}

fn subject_key_id<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a [u8]> {
    certificate
        .extensions()
        .iter()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0),
            _ => None,
        })
}

fn make_authority() -> Result<Credentials, PkiError> {
    let make = || -> Result<Credentials, rcgen::Error> {
        let mut params = authority_params();
        set_validity(&mut params, CA_DAYS);
        // rcgen's default: ECDSA P-256.
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        Ok(Credentials {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    };
    make().map_err(|source| PkiError::Make {
        name: CA_NAME.to_owned(),
        source,
    })
}

/// The same at every start, so that a leaf's issuer is what the CA's certificate says.
fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, CA_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
    ];
    params
}

fn check_authority(der: &[u8], key: &KeyPair) -> Result<(), String> {
    let (_, certificate) =
        X509Certificate::from_der(der).map_err(|_| "not an X.509 certificate".to_owned())?;
    if !key_matches(&certificate, key) {
        return Err("ca.key belongs to another certificate: restore the pair".to_owned());
    }
    if !certificate.validity().is_valid() {
        let end = certificate.validity().not_after;
        return Err(format!(
            "the cluster's CA is not valid now (until {end}): check the clock; if it has expired, \
             move the pki directory away and start again: all credentials are then made again"
        ));
    }
    Ok(())
}

/// From yesterday, so that a clock that is a little behind accepts it too.
fn set_validity(params: &mut CertificateParams, days: i64) {
    let today = Timestamp::now().to_zoned(TimeZone::UTC);
    let day = |offset_days: i64| {
        let moment: Zoned = today
            .checked_add(SignedDuration::from_hours(24 * offset_days))
            .unwrap_or_else(|_| today.clone());
        let part = |number: i8| u8::try_from(number).unwrap_or(1);
        let year = i32::from(moment.year());
        rcgen::date_time_ymd(year, part(moment.month()), part(moment.day()))
    };
    params.not_before = day(-1);
    params.not_after = day(days);
}

fn ends_soon(certificate: &X509Certificate<'_>) -> bool {
    let end_s = certificate.validity().not_after.timestamp();
    let renew = Timestamp::now() + SignedDuration::from_hours(24 * RENEW_DAYS);
    end_s < renew.as_second()
}

fn key_matches(certificate: &X509Certificate<'_>, key: &KeyPair) -> bool {
    certificate.public_key().subject_public_key.data.as_ref() == key.public_key_raw()
}

fn names_of(certificate: &X509Certificate<'_>) -> Vec<ServerName> {
    let extension = certificate.subject_alternative_name().ok().flatten();
    let names = extension.map(|e| e.value.general_names.as_slice());
    names
        .unwrap_or_default()
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(ServerName::Dns((*name).to_owned())),
            GeneralName::IPAddress(bytes) => {
                let address = <[u8; 4]>::try_from(*bytes)
                    .map(IpAddr::from)
                    .or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
                address.ok().map(ServerName::Address)
            }
            _ => None,
        })
        .collect()
}

fn common_name(certificate: &str) -> Option<String> {
    let der = der_of(certificate)?;
    let (_, certificate) = X509Certificate::from_der(&der).ok()?;
    let name = certificate.subject().iter_common_name().next()?;
    name.as_str().ok().map(str::to_owned)
}

fn der_of(pem: &str) -> Option<Vec<u8>> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).ok()?;
    Some(pem.contents)
}

fn kubeconfig(server: &str, ca: &str, admin: &Credentials) -> String {
    let (ca, certificate, key) = (
        to_base64(ca),
        to_base64(&admin.certificate),
        to_base64(&admin.key),
    );
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: gantry
  cluster:
    server: {server}
    certificate-authority-data: {ca}
users:
- name: {ADMIN_USER}
  user:
    client-certificate-data: {certificate}
    client-key-data: {key}
contexts:
- name: {ADMIN_USER}@gantry
  context:
    cluster: gantry
    user: {ADMIN_USER}
current-context: {ADMIN_USER}@gantry
"
    )
}

/// The credentials in a kubeconfig that this program wrote; `None` for any other one.
fn kubeconfig_credentials(text: &str) -> Option<Credentials> {
    let field = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.trim().strip_prefix(name))?;
        from_base64(line.trim())
    };
    Some(Credentials {
        certificate: field("client-certificate-data: ")?,
        key: field("client-key-data: ")?,
    })
}

fn to_base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

fn from_base64(text: &str) -> Option<String> {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text)
        .ok()?;
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests;
