//! Certificates for nodes that bring a key of their own: the request is read, proven and signed.

use std::time::Duration;

use jiff::Timestamp;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyUsagePurpose,
    PublicKeyData, SignatureAlgorithm,
};
use rustls::pki_types::SignatureVerificationAlgorithm;
use sha2::{Digest, Sha256};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

use gantry_api::bootstrap_token::hex;

use super::{Authority, PkiError};
use crate::server::identity::{JOINED_UNIT, NODE_USER_PREFIX, NODES_GROUP};

/// A P-256 request with our one name is some 250 bytes.
pub const REQUEST_BYTES_MAX: usize = 4 << 10;
/// 0x04, x, y.
const POINT_LEN: usize = 65;
/// A clock that is this much behind takes the certificate too; less for a very short one.
const BACKDATE_S: i64 = 300;

/// A key that its holder has proven to have.
pub struct NodeKey {
    point: Vec<u8>,
    hash: String,
}

impl PublicKeyData for NodeKey {
    fn der_bytes(&self) -> &[u8] {
        &self.point
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

/// SHA-256 of a SubjectPublicKeyInfo in DER: what `--ca-hash` and the keys of nodes are named by.
pub fn key_hash(subject_public_key_info: &[u8]) -> String {
    hex(&Sha256::digest(subject_public_key_info))
}

impl NodeKey {
    /// Reads a PKCS #10 request for `node`, signed by the key in it.
    ///
    /// # Errors
    /// In words: what is wrong with it.
    pub fn of_request(der: &[u8], node: &str) -> Result<NodeKey, String> {
        if der.len() > REQUEST_BYTES_MAX {
            return Err(format!(
                "the certificate request has {} bytes, and {REQUEST_BYTES_MAX} at most",
                der.len()
            ));
        }
        let unreadable = || "the certificate request cannot be read".to_owned();
        let (rest, request) = X509CertificationRequest::from_der(der).map_err(|_| unreadable())?;
        if !rest.is_empty() {
            return Err(unreadable());
        }
        let info = &request.certification_request_info;
        let wanted = format!("{NODE_USER_PREFIX}{node}");
        let mut names = info.subject.iter_common_name();
        let name = names.next().and_then(|name| name.as_str().ok());
        if name != Some(&*wanted) || names.next().is_some() {
            return Err(format!("the certificate request is not for {wanted}"));
        }
        let point = info.subject_pki.subject_public_key.data.to_vec();
        if point.len() != POINT_LEN {
            return Err("the certificate request's key is not ECDSA P-256".to_owned());
        }
        let algorithm: &dyn SignatureVerificationAlgorithm =
            webpki_algorithm().ok_or("no ECDSA P-256 here")?;
        let signature: &[u8] = &request.signature_value.data;
        algorithm
            .verify_signature(&point, info.raw, signature)
            .map_err(|_| "the certificate request is not signed by its own key".to_owned())?;
        let mut key = NodeKey {
            point,
            hash: String::new(),
        };
        // Of what the certificate will say, which is not more than what was asked with.
        key.hash = key_hash(&key.subject_public_key_info());
        Ok(key)
    }

    /// Its name among keys.
    pub fn hash(&self) -> &str {
        &self.hash
    }
}

/// ECDSA P-256 with SHA-256.
fn webpki_algorithm() -> Option<&'static dyn SignatureVerificationAlgorithm> {
    let all = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
    let (_, algorithms) = all
        .mapping
        .iter()
        .find(|(scheme, _)| *scheme == rustls::SignatureScheme::ECDSA_NISTP256_SHA256)?;
    algorithms.iter().copied().find(|algorithm| {
        algorithm.public_key_alg_id() == rustls::pki_types::alg_id::ECDSA_P256
            && algorithm.signature_alg_id() == rustls::pki_types::alg_id::ECDSA_SHA256
    })
}

impl Authority {
    /// A certificate for a node's own key; returns it as PEM, and when it ends.
    ///
    /// # Errors
    /// It cannot be signed.
    pub fn sign_node(
        &self,
        node: &str,
        key: &NodeKey,
        life_s: i64,
        now: Timestamp,
    ) -> Result<(String, i64), PkiError> {
        let mut params = CertificateParams::default();
        let moment = |unix_s: i64| {
            let since = Duration::from_secs(u64::try_from(unix_s).unwrap_or(0));
            rcgen::date_time_ymd(1970, 1, 1) + since
        };
        let end = now.as_second().saturating_add(life_s);
        params.not_before = moment(now.as_second() - BACKDATE_S.min(life_s / 10));
        params.not_after = moment(end);
        let name = format!("{NODE_USER_PREFIX}{node}");
        let mut subject = DistinguishedName::new();
        subject.push(DnType::CommonName, &*name);
        subject.push(DnType::OrganizationName, NODES_GROUP);
        subject.push(DnType::OrganizationalUnitName, JOINED_UNIT);
        params.distinguished_name = subject;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let signed = params
            .signed_by(key, &self.issuer)
            .map_err(|source| PkiError::Make { name, source })?;
        Ok((signed.pem(), end))
    }

    /// The digest of the CA's key, as `--ca-hash` takes it.
    pub fn hash(&self) -> String {
        match x509_parser::prelude::X509Certificate::from_der(&self.der) {
            Ok((_, certificate)) => format!("sha256:{}", key_hash(certificate.public_key().raw)),
            // Checked when it was opened.
            Err(_) => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::KeyPair;
    use x509_parser::prelude::X509Certificate;

    fn request(name: &str, key: &KeyPair) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.serialize_request(key).unwrap().der().to_vec()
    }

    #[test]
    fn a_node_gets_a_certificate_for_its_key_its_name_and_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open(dir.path()).unwrap();
        let key = KeyPair::generate().unwrap();
        let own = request("system:node:a", &key);
        let proven = NodeKey::of_request(&own, "a").unwrap();
        let now: Timestamp = "2026-03-01T12:34:56Z".parse().unwrap();
        let (pem, end) = authority.sign_node("a", &proven, 3600, now).unwrap();
        assert_eq!(end, now.as_second() + 3600);
        let der = super::super::der_of(&pem).unwrap();
        let (_, certificate) = X509Certificate::from_der(&der).unwrap();
        assert_eq!(certificate.validity().not_after.timestamp(), end);
        assert_eq!(
            certificate.validity().not_before.timestamp(),
            now.as_second() - 300
        );
        assert_eq!(key_hash(certificate.public_key().raw), proven.hash());
        assert!(super::super::key_matches(&certificate, &key));
        let identity = crate::server::identity::Identity::from_certificate(&der).unwrap();
        assert_eq!(identity.node_name(), Some("a"));
        let short = authority.sign_node("a", &proven, 10, now).unwrap().0;
        let der = super::super::der_of(&short).unwrap();
        let (_, certificate) = X509Certificate::from_der(&der).unwrap();
        assert_eq!(
            certificate.validity().not_before.timestamp(),
            now.as_second() - 1
        );
    }

    #[test]
    fn a_request_for_another_name_or_by_another_key_is_refused() {
        let key = KeyPair::generate().unwrap();
        let own = request("system:node:a", &key);
        let refused = |der: &[u8], node: &str| match NodeKey::of_request(der, node) {
            Ok(_) => panic!("taken"),
            Err(words) => words,
        };
        assert!(refused(&own, "b").contains("not for system:node:b"));
        let admin = request("kubernetes-admin", &key);
        assert!(refused(&admin, "a").contains("not for system:node:a"));
        let mut forged = own.clone();
        *forged.last_mut().unwrap() ^= 1;
        let words = refused(&forged, "a");
        assert!(
            words.contains("not signed") || words.contains("cannot be read"),
            "{words}"
        );
        for len in [0, 1, 20, own.len() - 1] {
            assert!(refused(&own[..len], "a").contains("cannot be read"));
        }
        let mut longer = own.clone();
        longer.push(0);
        assert!(refused(&longer, "a").contains("cannot be read"));
        assert!(refused(&vec![0; REQUEST_BYTES_MAX + 1], "a").contains("at most"));
        let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let large = request("system:node:a", &p384);
        assert!(refused(&large, "a").contains("P-256"));
    }
}
