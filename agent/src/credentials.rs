//! What this node proves its name with: the files below `/etc/gantry/agent`.
//!
//! ```text
//!  client.pem   key and certificate of a node that has joined; replaced as one file at a renewal
//!  client.crt, client.key   what a control plane on this machine writes (`--agent-credentials`)
//!  ca.crt       whom the node believes
//!  server       https://HOST:PORT, what it joined; several with commas between
//!  join.key     only while a join is under way: whoever asks again with the same key uses nothing up
//! ```
//! `client.pem` goes before the pair. Invariants: a file appears whole or not at all; keys are 0600 and
//! leave the machine never.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

const JOINED: &str = "client.pem";
const CA: &str = "ca.crt";
const SERVER: &str = "server";
const JOIN_KEY: &str = "join.key";
const USER_PREFIX: &str = "system:node:";

/// Why credentials cannot be read, made or written.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file.
    #[error("{action} {path}: {source}")]
    Io {
        /// read, write or create
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is not what it should be.
    #[error("{path}: {reason}")]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A key or a request could not be made.
    #[error("make a key: {0}")]
    Make(#[from] rcgen::Error),
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CredentialsError {
    let path = path.to_owned();
    move |source| CredentialsError::Io {
        action,
        path,
        source,
    }
}

/// What is needed to dial, all as PEM.
pub struct Pem {
    /// The CA's certificate.
    pub ca: Vec<u8>,
    /// The node's certificate.
    pub certificate: Vec<u8>,
    /// Its key.
    pub key: Vec<u8>,
}

/// What the certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The node's name.
    pub node: String,
    /// From when it is valid, Unix time.
    pub not_before_s: i64,
    /// When it ends, Unix time.
    pub not_after_s: i64,
}

/// A key and the request for a certificate for it.
pub struct Request {
    /// PEM.
    pub key: String,
    /// PKCS #10.
    pub der: Vec<u8>,
}

/// SHA-256 of the public key of a certificate (SubjectPublicKeyInfo), as kubeadm has it.
pub fn key_hash(certificate_der: &[u8]) -> Option<[u8; 32]> {
    let (_, certificate) = X509Certificate::from_der(certificate_der).ok()?;
    Some(Sha256::digest(certificate.public_key().raw).into())
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, CredentialsError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io("read", path)(error)),
    }
}

/// The files to dial with.
///
/// # Errors
/// One is missing or cannot be read.
pub fn read(directory: &Path) -> Result<Pem, CredentialsError> {
    let need = |name: &str| {
        let path = directory.join(name);
        std::fs::read(&path).map_err(io("read", &path))
    };
    let ca = need(CA)?;
    if let Some(both) = read_if_there(&directory.join(JOINED))? {
        return Ok(Pem {
            ca,
            certificate: both.clone(),
            key: both,
        });
    }
    Ok(Pem {
        ca,
        certificate: need("client.crt")?,
        key: need("client.key")?,
    })
}

/// The certificate that this node got by joining; `None`: it has not joined.
///
/// # Errors
/// It is there and cannot be read.
pub fn joined(directory: &Path) -> Result<Option<Held>, CredentialsError> {
    let path = directory.join(JOINED);
    let Some(pem) = read_if_there(&path)? else {
        return Ok(None);
    };
    held(&pem).map(Some).ok_or_else(|| CredentialsError::Bad {
        path,
        reason: "it holds no certificate of a node: run gantry reset, then join again".into(),
    })
}

/// The name that whatever certificate is there is for; `None`: there is none.
pub fn node_name(directory: &Path) -> Option<String> {
    let pem = read(directory).ok()?;
    held(&pem.certificate).map(|held| held.node)
}

fn held(pem: &[u8]) -> Option<Held> {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject as _;
    let der = CertificateDer::from_pem_slice(pem).ok()?;
    let (_, certificate) = X509Certificate::from_der(&der).ok()?;
    let name = certificate.subject().iter_common_name().next()?;
    let validity = certificate.validity();
    Some(Held {
        node: name.as_str().ok()?.strip_prefix(USER_PREFIX)?.to_owned(),
        not_before_s: validity.not_before.timestamp(),
        not_after_s: validity.not_after.timestamp(),
    })
}

impl Held {
    /// Whether its time is over, by this machine's clock.
    pub fn has_ended(&self) -> bool {
        self.not_after_s <= unix_seconds()
    }
}

/// This machine's clock: certificates know no other time.
pub fn unix_seconds() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.ok()
        .and_then(|since| i64::try_from(since.as_secs()).ok())
        .unwrap_or(0)
}

/// The control plane that was joined.
pub fn server(directory: &Path) -> Option<String> {
    let text = std::fs::read_to_string(directory.join(SERVER)).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// A new key and the request for its certificate.
///
/// # Errors
/// The key cannot be made.
pub fn request(node: &str) -> Result<Request, CredentialsError> {
    request_of(node, &KeyPair::generate()?)
}

fn request_of(node: &str, key: &KeyPair) -> Result<Request, CredentialsError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let name = format!("{USER_PREFIX}{node}");
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(Request {
        der: params.serialize_request(key)?.der().to_vec(),
        key: key.serialize_pem(),
    })
}

/// The request of a join: with the key of an earlier try, if one was cut off.
///
/// # Errors
/// The directory or the key cannot be made.
pub fn join_request(directory: &Path, node: &str) -> Result<Request, CredentialsError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(io("create", directory))?;
    let path = directory.join(JOIN_KEY);
    let earlier = read_if_there(&path)?.and_then(|pem| String::from_utf8(pem).ok());
    if let Some(key) = earlier.and_then(|pem| KeyPair::from_pem(&pem).ok()) {
        return request_of(node, &key);
    }
    let made = request(node)?;
    write(&path, made.key.as_bytes(), 0o600)?;
    Ok(made)
}

/// Keeps what a join has given. The certificate comes last: with it the node has joined.
///
/// # Errors
/// A file cannot be written.
pub fn write_joined(
    directory: &Path,
    server: &str,
    ca_pem: &str,
    certificate_pem: &str,
    key_pem: &str,
) -> Result<(), CredentialsError> {
    write(&directory.join(CA), ca_pem.as_bytes(), 0o644)?;
    write(
        &directory.join(SERVER),
        format!("{server}\n").as_bytes(),
        0o644,
    )?;
    write_renewed(directory, certificate_pem, key_pem)?;
    let path = directory.join(JOIN_KEY);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io("remove", &path)(error)),
        _ => Ok(()),
    }
}

/// Puts a renewed certificate and its key in place of the ones before.
///
/// # Errors
/// The file cannot be written: the ones before stay.
pub fn write_renewed(
    directory: &Path,
    certificate_pem: &str,
    key_pem: &str,
) -> Result<(), CredentialsError> {
    let both = format!("{key_pem}{certificate_pem}");
    write(&directory.join(JOINED), both.as_bytes(), 0o600)
}

/// Writes beside the target, syncs, renames.
fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), CredentialsError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let draft = path.with_file_name(name);
    let put = || -> std::io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&draft)?;
        // A draft that a crash left behind keeps the mode it was made with.
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&draft, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    put().map_err(io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(node: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let name = format!("system:node:{node}");
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = rcgen::date_time_ymd(2026, 1, 1);
        params.not_after = rcgen::date_time_ymd(2026, 1, 31);
        let certificate = params.self_signed(&key).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    #[test]
    fn what_was_joined_goes_before_what_a_local_control_plane_writes() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(joined(dir.path()).unwrap(), None);
        assert!(read(dir.path()).is_err());
        let (local, key) = certificate("local");
        std::fs::write(dir.path().join("ca.crt"), &local).unwrap();
        std::fs::write(dir.path().join("client.crt"), &local).unwrap();
        std::fs::write(dir.path().join("client.key"), &key).unwrap();
        assert_eq!(node_name(dir.path()).as_deref(), Some("local"));
        let (own, key) = certificate("a");
        write_joined(dir.path(), "https://c:6443", &local, &own, &key).unwrap();
        assert_eq!(node_name(dir.path()).as_deref(), Some("a"));
        let held = joined(dir.path()).unwrap().unwrap();
        assert_eq!(held.not_after_s - held.not_before_s, 30 * 24 * 3600);
        assert_eq!(server(dir.path()).as_deref(), Some("https://c:6443"));
        let mode = std::fs::metadata(dir.path().join(JOINED))
            .unwrap()
            .permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        std::fs::write(dir.path().join(JOINED), "nonsense").unwrap();
        let error = joined(dir.path()).unwrap_err().to_string();
        assert!(error.contains("gantry reset"), "{error}");
    }

    #[test]
    fn a_join_that_was_cut_off_goes_on_with_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("agent");
        let first = join_request(&directory, "a").unwrap();
        let second = join_request(&directory, "a").unwrap();
        assert_eq!(first.key, second.key);
        write_joined(&directory, "s", "ca", &certificate("a").0, &first.key).unwrap();
        assert!(join_request(&directory, "a").unwrap().key != first.key);
    }
}
