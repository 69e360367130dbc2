//! Credentials for registries, from imagePullSecrets.
//!
//! A `kubernetes.io/dockerconfigjson` Secret holds `{"auths": {"<registry>": {"auth": "<base64>"}}}`;
//! the older `kubernetes.io/dockercfg` holds the inner map alone. Pure.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use gantry_api::k8s_openapi::api::core::v1::Secret;
use serde::Deserialize;

use super::reference::Reference;

/// How to say who we are.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// User name and password.
    Basic(String, String),
    /// A token that the registry takes as it is.
    Bearer(String),
}

/// A credential and for which registry (and path below it) it is meant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RegistryAuth {
    /// `docker.io`, `127.0.0.1:5000`, `example.com/team`
    pub registry: String,
    /// The secret part; never printed.
    pub credential: Credential,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Basic(user, _) => write!(f, "Basic({user:?}, <hidden>)"),
            Self::Bearer(_) => f.write_str("Bearer(<hidden>)"),
        }
    }
}

#[derive(Deserialize)]
struct Config {
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    registrytoken: String,
}

/// The credentials in a pull secret; an error names what is wrong with it, never its content.
pub fn from_secret(secret: &Secret) -> Result<Vec<RegistryAuth>, String> {
    let name = secret.metadata.name.as_deref().unwrap_or("");
    let data = |key: &str| {
        secret
            .data
            .as_ref()
            .and_then(|d| d.get(key))
            .map(|v| v.0.as_slice())
    };
    let parsed = match (data(".dockerconfigjson"), data(".dockercfg")) {
        (Some(json), _) => serde_json::from_slice::<Config>(json).map(|c| c.auths),
        (None, Some(json)) => serde_json::from_slice(json),
        (None, None) => {
            return Err(format!(
                "secret {name:?}: no key .dockerconfigjson: not a pull secret"
            ));
        }
    };
    // serde_json's messages may quote the value: only the position is told.
    let entries = parsed.map_err(|e| {
        format!(
            "secret {name:?}: no docker configuration (line {}, column {})",
            e.line(),
            e.column()
        )
    })?;
    entries
        .into_iter()
        .map(|(registry, entry)| credential(name, &registry, entry))
        .collect()
}

fn credential(secret: &str, registry: &str, entry: Entry) -> Result<RegistryAuth, String> {
    let bad =
        || format!("secret {secret:?}: entry {registry:?}: auth is not base64 of user:password");
    let credential = if !entry.registrytoken.is_empty() {
        Credential::Bearer(entry.registrytoken)
    } else if !entry.auth.is_empty() {
        let text = BASE64_STANDARD
            .decode(entry.auth.trim())
            .map_err(|_| bad())?;
        let text = String::from_utf8(text).map_err(|_| bad())?;
        let (user, password) = text.split_once(':').ok_or_else(bad)?;
        Credential::Basic(user.to_owned(), password.trim_end_matches('\0').to_owned())
    } else {
        Credential::Basic(entry.username, entry.password)
    };
    Ok(RegistryAuth {
        registry: normalise(registry),
        credential,
    })
}

/// `https://index.docker.io/v1/` is what docker login writes for Docker Hub.
fn normalise(registry: &str) -> String {
    let bare = registry
        .trim_start_matches("https://")
        .trim_start_matches("http://");
    let bare = bare.trim_end_matches('/');
    let bare = bare
        .strip_suffix("/v1")
        .or_else(|| bare.strip_suffix("/v2"))
        .unwrap_or(bare);
    match bare {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_owned(),
    }
}

/// Those that fit, the most specific first, as the kubelet tries them.
pub(super) fn matching<'a>(auths: &'a [RegistryAuth], image: &Reference) -> Vec<&'a RegistryAuth> {
    let name = image.name();
    let mut found: Vec<&RegistryAuth> = auths
        .iter()
        .filter(|a| fits(&a.registry, &image.registry, &name))
        .collect();
    found.sort_by_key(|a| std::cmp::Reverse(a.registry.len()));
    found
}

fn fits(pattern: &str, registry: &str, name: &str) -> bool {
    let (host, path) = pattern
        .split_once('/')
        .map_or((pattern, None), |(h, p)| (h, Some(p)));
    let host_fits = match host.strip_prefix("*.") {
        // As many labels as the pattern has: *.example.com is not a.b.example.com.
        Some(rest) => registry.split_once('.').is_some_and(|(_, r)| r == rest),
        None => host == registry,
    };
    let path_fits = path.is_none_or(|p| {
        let own = name.split_once('/').map_or("", |(_, own)| own);
        own.strip_prefix(p)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    });
    host_fits && path_fits
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn secret(key: &str, value: &str) -> Secret {
        let data = json!({ key: BASE64_STANDARD.encode(value) });
        serde_json::from_value(json!({"metadata": {"name": "regcred"}, "data": data})).unwrap()
    }

    #[test]
    fn docker_login_output_is_read() {
        let config = json!({"auths": {
            "https://index.docker.io/v1/": {"auth": BASE64_STANDARD.encode("me:pa:ss")},
            "example.com/team": {"username": "u", "password": "p"},
        }});
        let auths = from_secret(&secret(".dockerconfigjson", &config.to_string())).unwrap();
        let hub = Reference::parse("nginx").unwrap();
        let found = matching(&auths, &hub);
        assert_eq!(found.len(), 1);
        assert_eq!(
            found[0].credential,
            Credential::Basic("me".into(), "pa:ss".into())
        );
        assert!(!format!("{found:?}").contains("pa:ss"));
        assert_eq!(
            matching(&auths, &Reference::parse("example.com/team/x").unwrap()).len(),
            1
        );
        assert_eq!(
            matching(&auths, &Reference::parse("example.com/teams/x").unwrap()).len(),
            0
        );
    }

    #[test]
    fn broken_secrets_are_named_and_not_quoted() {
        let error =
            from_secret(&secret(".dockerconfigjson", "{\"auths\": \"s3cret\"}")).unwrap_err();
        assert!(
            error.contains("regcred") && !error.contains("s3cret"),
            "{error}"
        );
        assert!(
            from_secret(&secret("other", "x"))
                .unwrap_err()
                .contains(".dockerconfigjson")
        );
    }
}
