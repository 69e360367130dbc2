//! Tokens of service accounts: signed, short-lived, bound to what they were issued for.
//!
//! ```text
//!  agent ── Feed.IssueToken ┐
//!  gantry create token ─────┴► issue: account, pod and node as they are now ─► JWT (ES256)
//!  any call with `authorization: Bearer JWT` ─► signature, time, audience ─► do account and pod still
//!                                               exist with the same uid? ─► system:serviceaccount:NS:NAME
//! ```
//! Invariants: a token dies with the pod, Secret or node that it is bound to, and with its account, whatever
//! its expiry says; nothing is issued for an account that does not exist; a token is never logged.
//! Deciding parts get the time as an argument.
//!
//! Source: Kubernetes `pkg/serviceaccount` (claims.go, jwt.go), KEP-1205 (bound tokens).

use std::sync::Arc;

use gantry_api::k8s_openapi::api::authentication::v1::{
    TokenRequest, TokenRequestStatus, TokenReview, TokenReviewStatus, UserInfo,
};
use gantry_api::k8s_openapi::api::core::v1::{Node, Pod, Secret, ServiceAccount};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::kinds;
use gantry_api::status::Status;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};

use super::identity::Identity;
use super::registry::{Registry, Resource};

/// What a token lives when nobody says.
pub const LIFETIME_S: i64 = 3_600;
/// The shortest life that may be asked for (Kubernetes' limit).
pub const LIFETIME_S_MIN: i64 = 600;
/// A longer life is shortened to this where nobody says otherwise; the answer says when the token ends.
pub const LIFETIME_S_MAX: i64 = 24 * 3_600;
/// Longest token that is looked at, in bytes.
const TOKEN_BYTES_MAX: usize = 16 << 10;
/// Audiences of one token.
const AUDIENCE_COUNT_MAX: usize = 16;
/// What precedes namespace and name in an account's user name.
pub const ACCOUNT_USER_PREFIX: &str = "system:serviceaccount:";

/// An object that a token is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// Its name.
    pub name: String,
    /// Its uid: a later object of the same name is another one.
    pub uid: String,
}

/// Whom a token speaks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// The account's namespace.
    pub namespace: String,
    /// The account.
    pub serviceaccount: Reference,
    /// The pod that the token ends with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Reference>,
    /// The Secret that the token ends with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Reference>,
    /// The pod's node, for audits; without a pod the node that the token ends with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Reference>,
}

#[derive(Serialize, Deserialize)]
struct Claims {
    aud: Vec<String>,
    exp: i64,
    iat: i64,
    nbf: i64,
    iss: String,
    jti: String,
    sub: String,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Subject,
}

/// A new token.
pub struct Issued {
    /// The JWT.
    pub token: String,
    /// When it ends.
    pub expires_at: Timestamp,
}

/// The signing key and what it may be used for; clones share it.
#[derive(Clone)]
pub struct Tokens {
    inner: Arc<Keys>,
    lifetime_s_max: i64,
}

struct Keys {
    signing: EncodingKey,
    verifying: DecodingKey,
    key_id: String,
    issuer: String,
}

impl Tokens {
    /// Signs with this ECDSA P-256 key as `issuer` (a URL), which is the API's audience as well.
    pub fn new(key: &rcgen::KeyPair, issuer: &str) -> Tokens {
        use base64::Engine as _;
        use sha2::Digest as _;
        let public = key.public_key_raw();
        let digest = sha2::Sha256::digest(public);
        let keys = Keys {
            signing: EncodingKey::from_ec_der(&key.serialize_der()),
            verifying: DecodingKey::from_ec_der(public),
            key_id: base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(digest),
            issuer: issuer.to_owned(),
        };
        Tokens {
            inner: Arc::new(keys),
            lifetime_s_max: LIFETIME_S_MAX,
        }
    }

    /// The same, whose tokens live for at most so many seconds, whatever is asked for.
    pub fn with_lifetime_max(self, lifetime_s_max: i64) -> Tokens {
        Tokens {
            lifetime_s_max,
            ..self
        }
    }

    /// The audience of this API.
    pub fn api_audience(&self) -> &str {
        &self.inner.issuer
    }

    /// Signs a token; no audience means the API's.
    pub fn issue(
        &self,
        subject: Subject,
        audiences: &[String],
        lifetime_s: i64,
        now: Timestamp,
    ) -> Result<Issued, Status> {
        if lifetime_s < LIFETIME_S_MIN {
            let text = format!(
                "a token must live for at least {LIFETIME_S_MIN} seconds, {lifetime_s} were asked for"
            );
            return Err(Status::bad_request(text));
        }
        if audiences.len() > AUDIENCE_COUNT_MAX {
            let text = format!("a token has at most {AUDIENCE_COUNT_MAX} audiences");
            return Err(Status::bad_request(text));
        }
        let issued_at_s = now.as_second();
        let expires_at_s = issued_at_s + lifetime_s.min(self.lifetime_s_max);
        let account = &subject.serviceaccount.name;
        let mut aud = audiences.to_vec();
        if aud.is_empty() {
            aud.push(self.inner.issuer.clone());
        }
        let claims = Claims {
            aud,
            exp: expires_at_s,
            iat: issued_at_s,
            nbf: issued_at_s,
            iss: self.inner.issuer.clone(),
            jti: uuid::Uuid::new_v4().to_string(),
            sub: format!("{ACCOUNT_USER_PREFIX}{}:{account}", subject.namespace),
            kubernetes: subject,
        };
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.inner.key_id.clone());
        let token = jsonwebtoken::encode(&header, &claims, &self.inner.signing)
            .map_err(|error| Status::internal(format!("cannot sign the token: {error}")))?;
        Ok(Issued {
            token,
            expires_at: Timestamp::from_second(expires_at_s).unwrap_or(Timestamp::MAX),
        })
    }

    /// Whom a token speaks for and to whom, if it is ours and of this time.
    ///
    /// # Errors
    /// Unauthorized; the text says why and never repeats the token.
    pub fn verify(&self, token: &str, now: Timestamp) -> Result<(Subject, Vec<String>), Status> {
        let refused = |why: &str| Status::unauthorized(format!("the token is refused: {why}"));
        if token.len() > TOKEN_BYTES_MAX {
            return Err(refused("it is too long"));
        }
        // Only the signature is the library's: times are judged by the clock we are given.
        let mut validation = Validation::new(Algorithm::ES256);
        validation.required_spec_claims.clear();
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.validate_aud = false;
        let decoded = jsonwebtoken::decode::<Claims>(token, &self.inner.verifying, &validation)
            .map_err(|_| refused("it was not signed by this cluster"))?;
        let claims = decoded.claims;
        let now_s = now.as_second();
        if claims.iss != self.inner.issuer {
            return Err(refused("another issuer made it"));
        }
        if now_s >= claims.exp {
            return Err(refused("it has expired"));
        }
        if now_s < claims.nbf {
            return Err(refused("it is not valid yet: check the clock"));
        }
        Ok((claims.kubernetes, claims.aud))
    }
}

/// The account as it is now.
fn account(registry: &Registry, namespace: &str, name: &str) -> Result<ServiceAccount, Status> {
    let found = registry.get::<ServiceAccount>(namespace, name)?;
    found.ok_or_else(|| match kinds::by_plural("", "serviceaccounts") {
        Some(kind) => Status::not_found(kind, name),
        None => Status::not_served("serviceaccounts is not a kind of this server"),
    })
}

fn reference(name: &str, uid: Option<&String>) -> Reference {
    Reference {
        name: name.to_owned(),
        uid: uid.cloned().unwrap_or_default(),
    }
}

/// The subject that a token of `pod` speaks for.
pub fn pod_subject(registry: &Registry, namespace: &str, pod: &Pod) -> Result<Subject, Status> {
    let spec = pod.spec.as_ref();
    let name = spec.and_then(|spec| spec.service_account_name.as_deref());
    let name = name.filter(|name| !name.is_empty()).unwrap_or("default");
    let account = account(registry, namespace, name)?;
    let node = spec.and_then(|spec| spec.node_name.clone());
    let node = node.filter(|node| !node.is_empty());
    let node_object = match &node {
        Some(node) => registry.get::<Node>("", node)?,
        None => None,
    };
    let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
    Ok(Subject {
        namespace: namespace.to_owned(),
        serviceaccount: reference(name, account.metadata.uid.as_ref()),
        pod: Some(reference(pod_name, pod.metadata.uid.as_ref())),
        secret: None,
        node: node.map(|node| {
            let uid = node_object
                .as_ref()
                .and_then(|node| node.metadata.uid.as_ref());
            reference(&node, uid)
        }),
    })
}

/// What a token is to be bound to, if it is the object of that uid.
fn bound_object<K: Resource>(
    registry: &Registry,
    namespace: &str,
    name: &str,
    uid: &Option<String>,
) -> Result<K, Status> {
    let found = registry.get::<K>(namespace, name)?;
    let found = found.filter(|found| uid.is_none() || found.metadata().uid == *uid);
    found.ok_or_else(|| {
        let kind = K::KIND;
        Status::bad_request(format!("there is no {kind} {name:?} of this uid"))
    })
}

/// Whether the object is still there, and the same.
fn is_there<K: Resource>(
    registry: &Registry,
    namespace: &str,
    bound: &Reference,
) -> Result<bool, Status> {
    let found = registry.get::<K>(namespace, &bound.name)?;
    Ok(found.is_some_and(|found| found.metadata().uid.as_ref() == Some(&bound.uid)))
}

/// Answers a TokenRequest for an account, as `gantry create token` sends it.
pub fn answer_request(
    registry: &Registry,
    tokens: &Tokens,
    namespace: &str,
    name: &str,
    mut request: TokenRequest,
    now: Timestamp,
) -> Result<TokenRequest, Status> {
    let mut spec = request.spec.take().unwrap_or_default();
    let mut subject = Subject {
        namespace: namespace.to_owned(),
        serviceaccount: reference(
            name,
            account(registry, namespace, name)?.metadata.uid.as_ref(),
        ),
        pod: None,
        secret: None,
        node: None,
    };
    if let Some(bound) = &spec.bound_object_ref {
        let (object, uid) = (bound.name.as_deref().unwrap_or_default(), &bound.uid);
        match bound.kind.as_deref().unwrap_or_default() {
            "Pod" => {
                let pod = bound_object::<Pod>(registry, namespace, object, uid)?;
                subject = pod_subject(registry, namespace, &pod)?;
                if subject.serviceaccount.name != name {
                    let text = format!("pod {object:?} does not run as service account {name:?}");
                    return Err(Status::bad_request(text));
                }
            }
            "Secret" => {
                let secret = bound_object::<Secret>(registry, namespace, object, uid)?;
                subject.secret = Some(reference(object, secret.metadata.uid.as_ref()));
            }
            "Node" => {
                let node = bound_object::<Node>(registry, "", object, uid)?;
                subject.node = Some(reference(object, node.metadata.uid.as_ref()));
            }
            kind => {
                let text =
                    format!("a token can be bound to a Pod, a Secret or a Node, not to a {kind:?}");
                return Err(Status::bad_request(text));
            }
        }
    }
    let lifetime_s = spec.expiration_seconds.unwrap_or(LIFETIME_S);
    let audiences = spec.audiences.clone().unwrap_or_default();
    let issued = tokens.issue(subject, &audiences, lifetime_s, now)?;
    if audiences.is_empty() {
        spec.audiences = Some(vec![tokens.api_audience().to_owned()]);
    }
    request.spec = Some(spec);
    request.status = Some(TokenRequestStatus {
        expiration_timestamp: Some(Time(issued.expires_at)),
        token: Some(issued.token),
    });
    Ok(request)
}

/// The caller that a token names, when what it is bound to still exists.
pub fn authenticate(
    registry: &Registry,
    tokens: &Tokens,
    token: &str,
    audiences: &[String],
    now: Timestamp,
) -> Result<Identity, Status> {
    let (subject, meant_for) = tokens.verify(token, now)?;
    if !audiences
        .iter()
        .any(|audience| meant_for.contains(audience))
    {
        let text = "the token is refused: it is meant for another audience";
        return Err(Status::unauthorized(text));
    }
    let gone =
        |what: &str| Status::unauthorized(format!("the token is refused: its {what} is gone"));
    let Subject {
        namespace,
        serviceaccount,
        pod,
        secret,
        node,
    } = subject;
    if !is_there::<ServiceAccount>(registry, &namespace, &serviceaccount)? {
        return Err(gone("service account"));
    }
    if let Some(bound) = secret
        && !is_there::<Secret>(registry, &namespace, &bound)?
    {
        return Err(gone("Secret"));
    }
    match (pod, node) {
        (Some(bound), _) if !is_there::<Pod>(registry, &namespace, &bound)? => {
            return Err(gone("pod"));
        }
        (None, Some(bound)) if !is_there::<Node>(registry, "", &bound)? => {
            return Err(gone("node"));
        }
        _ => {}
    }
    Ok(Identity {
        user: format!("{ACCOUNT_USER_PREFIX}{namespace}:{}", serviceaccount.name),
        groups: vec![
            "system:serviceaccounts".to_owned(),
            format!("system:serviceaccounts:{namespace}"),
            "system:authenticated".to_owned(),
        ],
        impersonated_by: None,
    })
}

/// Answers a TokenReview: whose token is it?
pub fn review(
    registry: &Registry,
    tokens: &Tokens,
    mut review: TokenReview,
    now: Timestamp,
) -> TokenReview {
    let asked = review.spec.audiences.clone().unwrap_or_default();
    let audiences = match asked.is_empty() {
        true => vec![tokens.api_audience().to_owned()],
        false => asked,
    };
    let token = std::mem::take(&mut review.spec.token);
    review.status = Some(
        match authenticate(registry, tokens, &token, &audiences, now) {
            Err(status) => TokenReviewStatus {
                authenticated: Some(false),
                error: Some(status.message),
                ..TokenReviewStatus::default()
            },
            Ok(identity) => TokenReviewStatus {
                authenticated: Some(true),
                audiences: Some(audiences),
                user: Some(UserInfo {
                    username: Some(identity.user),
                    groups: Some(identity.groups),
                    ..UserInfo::default()
                }),
                ..TokenReviewStatus::default()
            },
        },
    );
    review
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_api::status::Reason;
    use proptest::prelude::*;

    fn tokens() -> Tokens {
        Tokens::new(&rcgen::KeyPair::generate().unwrap(), "https://api")
    }

    fn subject() -> Subject {
        Subject {
            namespace: "shop".to_owned(),
            serviceaccount: reference("web", Some(&"u1".to_owned())),
            pod: Some(reference("web-1", Some(&"u2".to_owned()))),
            secret: None,
            node: None,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_token_is_good_from_its_issue_to_its_expiry() {
        let tokens = tokens();
        let issued = tokens.issue(subject(), &[], 600, at(1_000)).unwrap();
        assert_eq!(issued.expires_at, at(1_600));
        for (now, good) in [(999, false), (1_000, true), (1_599, true), (1_600, false)] {
            let result = tokens.verify(&issued.token, at(now));
            assert_eq!(result.is_ok(), good, "at {now}");
        }
        let (found, audiences) = tokens.verify(&issued.token, at(1_001)).unwrap();
        assert_eq!(
            (found, audiences),
            (subject(), vec!["https://api".to_owned()])
        );
        let long = tokens.issue(subject(), &[], i64::MAX / 4, at(0)).unwrap();
        assert_eq!(long.expires_at, at(LIFETIME_S_MAX));
        let limited = tokens.clone().with_lifetime_max(30);
        let limited = limited.issue(subject(), &[], 600, at(0)).unwrap();
        assert_eq!(limited.expires_at, at(30));
        let short = tokens.issue(subject(), &[], 599, at(0)).err().unwrap();
        assert_eq!(short.reason, Reason::BadRequest);
    }

    #[test]
    fn another_clusters_token_is_refused() {
        let issued = tokens().issue(subject(), &[], 600, at(0)).unwrap();
        let refused = tokens().verify(&issued.token, at(1)).unwrap_err();
        assert_eq!(refused.reason, Reason::Unauthorized);
        assert!(!refused.message.contains(&issued.token), "{refused}");
    }

    proptest! {
        /// No change of one byte of a token is accepted, and no text makes a panic.
        #[test]
        fn a_changed_token_is_refused(at_byte in 0_usize..4_096, byte in 0x20_u8..0x7f, text in ".{0,200}") {
            let tokens = tokens();
            let issued = tokens.issue(subject(), &[], 600, at(0)).unwrap();
            let mut bytes = issued.token.clone().into_bytes();
            let index = at_byte % bytes.len();
            // The last character of a segment carries bits that decode to nothing.
            let last = index + 1 == bytes.len() || bytes[index + 1] == b'.';
            prop_assume!(bytes[index] != byte && !last);
            bytes[index] = byte;
            let changed = String::from_utf8(bytes).unwrap();
            prop_assert!(tokens.verify(&changed, at(1)).is_err());
            prop_assert!(tokens.verify(&text, at(1)).is_err());
        }
    }
}
