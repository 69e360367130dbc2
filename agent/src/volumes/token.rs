//! Tokens of service accounts in projected volumes: asked for, renewed in time, never on a disk.
//!
//! ```text
//! the volume's file ─► renewal due? ─ no ─► the same token again
//!   (none, or old)          └─ yes ─► TokenSource ─► new token   (refused, offline: the old one stays)
//! ```
//! The token in the volume is all the state there is: when it was issued and when it ends stand in
//! it. So an agent that was away renews what is due, and one without a control plane changes
//! nothing. After a reboot without a control plane a pod starts without the token that it did not
//! ask for ([`is_automatic`]), and gets it when somebody issues tokens again. Renewed at 80 % of its life, or after 24 h. Source: kubelet `pkg/kubelet/token`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use gantry_api::k8s_openapi::api::core::v1::{Pod, ServiceAccountTokenProjection};
use jiff::Timestamp;

use super::{VolumeError, payload};
use crate::ids::PodUid;
use crate::paths::Paths;

/// `expirationSeconds` where nothing is said.
const LIFE_S: i64 = 3600;
/// A token is renewed when it is this old, however long it lives.
const AGE_S_MAX: i64 = 24 * 3600;

/// What a token shall be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TokenRequest {
    /// metadata.namespace of the pod.
    pub namespace: String,
    /// metadata.name of the pod.
    pub pod: String,
    /// metadata.uid of the pod: the token ends with it.
    pub uid: String,
    /// Whom it is for; none: the API server.
    pub audience: Option<String>,
    /// Seconds it shall live.
    pub expiration_s: i64,
}

/// Why there is no token.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TokenError {
    /// Nobody there to issue one.
    #[error("{0}")]
    Away(String),
    /// It was refused.
    #[error("{0}")]
    Refused(String),
}

/// Who issues tokens: the control plane; a fake in tests.
#[async_trait]
pub trait TokenSource: Send + Sync + 'static {
    /// A new token, or why there is none.
    async fn token(&self, request: &TokenRequest) -> Result<String, TokenError>;
}

/// What the name of a volume begins with that every pod gets without asking (admission writes it).
const AUTOMATIC: &str = "kube-api-access-";

/// Whether the pod may start without the volume's token: it did not ask for it, and without a control
/// plane there is nobody to show it to.
pub(super) fn is_automatic(volume: &str) -> bool {
    volume.starts_with(AUTOMATIC)
}

/// Tokens by volume and path in it.
pub(super) type Tokens = BTreeMap<(String, String), String>;

/// Whether a pod has tokens, which have to be looked at from time to time.
pub fn wanted(pod: &Pod) -> bool {
    projections(pod).next().is_some()
}

fn projections(pod: &Pod) -> impl Iterator<Item = (&str, &ServiceAccountTokenProjection)> {
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    volumes.flat_map(|volume| {
        let sources = volume.projected.iter().flat_map(|p| p.sources.iter());
        sources
            .flatten()
            .filter_map(|s| s.service_account_token.as_ref())
            .map(|token| (volume.name.as_str(), token))
    })
}

/// Every token of the pod: the one in its file, or a new one. `root` holds the pod's volumes.
pub(super) async fn gather(
    pod: &Pod,
    root: &Path,
    source: &dyn TokenSource,
) -> Result<Tokens, VolumeError> {
    let mut tokens = Tokens::new();
    for (volume, projection) in projections(pod) {
        let path = payload::check_path(&projection.path).map_err(|reason| {
            let volume = volume.to_owned();
            VolumeError::Invalid { volume, reason }
        })?;
        let directory = super::directory(root, "projected", volume)?;
        let file = directory.join("..data").join(&path);
        let held = tokio::fs::read_to_string(file).await.ok();
        let token = match held {
            Some(held) if due_in_s(&held, Timestamp::now().as_second()) > 0 => held,
            held => match (source.token(&request(pod, projection)).await, held) {
                (Ok(token), _) => token,
                (Err(words), Some(held)) => {
                    tracing::warn!(volume, "a token is due and stays for now: {words}");
                    held
                }
                (Err(TokenError::Away(words)), None) if is_automatic(volume) => {
                    tracing::warn!(
                        volume,
                        "the pod starts without its token, which follows: {words}"
                    );
                    continue;
                }
                (Err(words), None) => {
                    let account = pod
                        .spec
                        .as_ref()
                        .and_then(|s| s.service_account_name.clone());
                    let account = account.unwrap_or_else(|| "default".into());
                    return Err(VolumeError::Waiting(format!(
                        "volume {volume:?}: no token of service account {account:?}: {words}"
                    )));
                }
            },
        };
        tokens.insert((volume.to_owned(), path), token);
    }
    Ok(tokens)
}

/// In how long the first token of the pod has to be renewed: zero is now. Reads its files and nothing else.
pub async fn next_renewal(pod: &Pod, paths: &Paths, uid: &PodUid) -> Duration {
    let root = paths.pod_lib(uid).join("volumes");
    let now_s = Timestamp::now().as_second();
    let mut first_s = u64::MAX;
    for (volume, projection) in projections(pod) {
        let file = payload::check_path(&projection.path).ok().and_then(|path| {
            let directory = super::directory(&root, "projected", volume).ok()?;
            Some(directory.join("..data").join(path))
        });
        let held = match file {
            Some(file) => tokio::fs::read_to_string(file).await.ok(),
            None => None,
        };
        first_s = first_s.min(held.map_or(0, |held| due_in_s(&held, now_s)));
    }
    Duration::from_secs(first_s)
}

fn request(pod: &Pod, projection: &ServiceAccountTokenProjection) -> TokenRequest {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    TokenRequest {
        namespace: text(&pod.metadata.namespace),
        pod: text(&pod.metadata.name),
        uid: text(&pod.metadata.uid),
        audience: projection.audience.clone().filter(|a| !a.is_empty()),
        expiration_s: projection.expiration_seconds.unwrap_or(LIFE_S),
    }
}

/// In how many seconds a token has to be renewed; 0 is now, and so is what cannot be read.
fn due_in_s(token: &str, now_s: i64) -> u64 {
    #[derive(serde::Deserialize)]
    struct Claims {
        iat: i64,
        exp: i64,
    }
    let claims = token
        .split('.')
        .nth(1)
        .and_then(|part| BASE64_URL_SAFE_NO_PAD.decode(part).ok())
        .and_then(|json| serde_json::from_slice::<Claims>(&json).ok());
    let Some(Claims { iat, exp }) = claims else {
        return 0;
    };
    let life_s = exp.saturating_sub(iat).max(0);
    let age_s = now_s.saturating_sub(iat);
    // A clock that was set back makes no token young for ever: it is due before its end.
    let left_s = (life_s / 5 * 4).min(AGE_S_MAX).saturating_sub(age_s);
    match age_s {
        ..0 => 0,
        _ => u64::try_from(left_s).unwrap_or(0),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::sync::Mutex;

    /// A token like the control plane's, without a signature.
    pub(in crate::volumes) fn token(iat: i64, exp: i64) -> String {
        let part = |json: serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(json.to_string());
        format!(
            "{}.{}.x",
            part(json!({})),
            part(json!({"iat": iat, "exp": exp}))
        )
    }

    /// Hands out what it was given, and notes what was asked for.
    #[derive(Default)]
    pub(in crate::volumes) struct Issuer {
        pub(in crate::volumes) tokens: Mutex<Vec<String>>,
        pub(in crate::volumes) asked: Mutex<Vec<TokenRequest>>,
    }

    #[async_trait]
    impl TokenSource for Issuer {
        async fn token(&self, request: &TokenRequest) -> Result<String, TokenError> {
            self.asked.lock().unwrap().push(request.clone());
            let token = self.tokens.lock().unwrap().pop();
            token.ok_or(TokenError::Away("offline".into()))
        }
    }

    proptest! {
        #[test]
        fn a_token_is_renewed_before_its_end_and_not_at_once(
            iat in 0i64..1 << 40, life in 10i64..1 << 33, age in 0i64..1 << 33,
        ) {
            let due_in = due_in_s(&token(iat, iat + life), iat + age) as i64;
            prop_assert!(due_in == 0 || age + due_in < life, "past its end");
            prop_assert_eq!(due_in == 0, age >= (life / 5 * 4).min(AGE_S_MAX));
            prop_assert_eq!(due_in_s(&token(iat, iat + life), iat + age + due_in), 0);
        }

        #[test]
        fn any_text_is_survived(text in ".*") { prop_assert_eq!(due_in_s(&text, 0), 0); }
    }
}
