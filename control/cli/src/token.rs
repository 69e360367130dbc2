//! `gantry token`: bootstrap tokens, with which machines join the cluster.
//!
//! A token is shown once, when it is made: the cluster keeps a digest. `list` names tokens by their id, the
//! part before the dot.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::time::Duration;

use base64::Engine as _;
use clap::Subcommand;
use gantry_api::bootstrap_token::{
    AUTHENTICATION_KEY, BootstrapToken, DESCRIPTION_KEY, EXPIRATION_KEY, HASH_KEY, ID_KEY,
    NAME_PREFIX, NAMESPACE, SECRET_TYPE, USED_BY_KEY, USES_KEY, hex,
};
use gantry_api::kinds::{Kind, resolve};
use gantry_api::proto::{DeleteRequest, ListRequest, WriteRequest};
use jiff::Timestamp;
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::Global;
use crate::connection::{Session, key};
use crate::failure::Failure;
use crate::names;
use crate::output;

/// As kubeadm has it.
const TTL_DEFAULT: &str = "24h";
/// Enough for a token, whatever is left out.
const RANDOM_BYTES: usize = 64;

#[derive(Subcommand, Debug)]
pub(crate) enum Token {
    /// Make a token and print it, this once
    Create {
        /// How long it can be used (0: for ever)
        #[arg(long, default_value = TTL_DEFAULT, value_parser = names::duration)]
        ttl: Duration,
        /// How many machines may join with it
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100_000))]
        uses: u64,
        /// Words for those who see it in the list
        #[arg(long, default_value = "", hide_default_value = true)]
        description: String,
        /// Print the whole command for the machine that is to join
        #[arg(long)]
        print_join_command: bool,
        /// The control plane's address in that command, or those of several [default: what pods use]
        #[arg(long, value_name = "HOST:PORT,...")]
        server: Option<String>,
    },
    /// List tokens, without what they are used with
    List,
    /// Delete tokens: nobody joins with them any more
    Delete {
        /// Ids, or whole tokens
        #[arg(required = true)]
        tokens: Vec<String>,
    },
}

fn secrets() -> Result<&'static Kind, Failure> {
    resolve("secrets").ok_or_else(|| Failure::local("this version knows no Secrets"))
}

impl Token {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let session = Session::open(global).await?;
        match self {
            Self::Create {
                ttl,
                uses,
                description,
                print_join_command,
                server,
            } => {
                let token = create(&session, *ttl, *uses, description).await?;
                if !print_join_command {
                    return output::print(&format!("{}\n", token.expose()));
                }
                let line = join_line(&session, server.as_deref(), &token).await?;
                output::print(&format!("{line}\n"))
            }
            Self::List => list(&session).await,
            Self::Delete { tokens } => {
                for token in tokens {
                    delete(&session, token).await?;
                }
                Ok(())
            }
        }
    }
}

/// Makes a token.
pub(crate) async fn create(
    session: &Session,
    ttl: Duration,
    uses: u64,
    description: &str,
) -> Result<BootstrapToken, Failure> {
    let mut bytes = [0; RANDOM_BYTES];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let token = BootstrapToken::from_random(&bytes)
        .ok_or_else(|| Failure::local("too few random bytes: try again"))?;
    let object = secret(&token, ttl, uses, description, Timestamp::now())?;
    let request = WriteRequest {
        key: Some(key(secrets()?, NAMESPACE, &token.secret_name())),
        json: object.to_string().into(),
        strict: true,
        field_manager: "gantry".to_owned(),
        ..WriteRequest::default()
    };
    session
        .objects
        .clone()
        .create(session.request(request))
        .await?;
    Ok(token)
}

fn secret(
    token: &BootstrapToken,
    ttl: Duration,
    uses: u64,
    description: &str,
    now: Timestamp,
) -> Result<Value, Failure> {
    let mut data = json!({
        ID_KEY: token.id(),
        HASH_KEY: token.hash(),
        AUTHENTICATION_KEY: "true",
        USES_KEY: uses.to_string(),
    });
    if !ttl.is_zero() {
        let end = now
            .checked_add(ttl)
            .map_err(|_| Failure::local("--ttl is too long: give 0 for a token without an end"))?;
        data[EXPIRATION_KEY] = json!(format!("{end:.0}"));
    }
    if !description.is_empty() {
        data[DESCRIPTION_KEY] = json!(description);
    }
    Ok(json!({
        "apiVersion": "v1", "kind": "Secret", "type": SECRET_TYPE,
        "metadata": {"name": token.secret_name(), "namespace": NAMESPACE},
        "stringData": data,
    }))
}

/// The digest of the CA's key, as kubeadm has it.
fn ca_hash(pem: &[u8]) -> Result<String, Failure> {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject as _;
    let unreadable = || Failure::local("the kubeconfig's certificate-authority cannot be read");
    let der = CertificateDer::from_pem_slice(pem).map_err(|_| unreadable())?;
    let (_, certificate) = X509Certificate::from_der(&der).map_err(|_| unreadable())?;
    let digest = gantry_api::bootstrap_token::sha256(certificate.public_key().raw);
    Ok(format!("sha256:{}", hex(&digest)))
}

/// What to run on the machine that is to join.
pub(crate) async fn join_line(
    session: &Session,
    server: Option<&str>,
    token: &BootstrapToken,
) -> Result<String, Failure> {
    let authority = session.authority.as_deref();
    let authority = authority.ok_or_else(|| {
        Failure::local("the kubeconfig names no certificate-authority to tell others")
    })?;
    let server = match server {
        Some(server) => server.to_owned(),
        None => address(session).await?,
    };
    let (token, hash) = (token.expose(), ca_hash(authority)?);
    Ok(format!(
        "gantry join {server} --token {token} --ca-hash {hash}"
    ))
}

/// Where other machines reach the control plane, or all of several: as pods do.
async fn address(session: &Session) -> Result<String, Failure> {
    let kind = resolve("endpointslices");
    let kind = kind.ok_or_else(|| Failure::local("this version knows no EndpointSlices"))?;
    let slice = session.find(key(kind, "default", "kubernetes")).await?;
    let addresses = addresses(&slice.unwrap_or_default());
    if addresses.is_empty() {
        return Err(Failure::local(
            "the control plane knows no address of its own that others can reach: give one with --server, or \
             start gantry-control with --advertise-address",
        ));
    }
    Ok(addresses.join(","))
}

/// All of a slice, with their port.
fn addresses(slice: &Value) -> Vec<String> {
    let port = slice.pointer("/ports/0/port").and_then(Value::as_i64);
    let endpoints = slice["endpoints"].as_array().into_iter().flatten();
    let addresses = endpoints.filter_map(|endpoint| {
        let (address, port) = (endpoint.pointer("/addresses/0")?.as_str()?, port?);
        Some(match address.contains(':') {
            true => format!("[{address}]:{port}"),
            false => format!("{address}:{port}"),
        })
    });
    addresses.collect()
}

fn text_of(secret: &Value) -> BTreeMap<String, String> {
    let data = secret["data"].as_object();
    let decode = |value: &Value| {
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(value.as_str()?)
            .ok()?;
        String::from_utf8(bytes).ok()
    };
    data.into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key.clone(), decode(value)?)))
        .collect()
}

/// A token's line: TOKEN ID, USES LEFT, EXPIRES, LAST USED BY, DESCRIPTION.
fn row(secret: &Value, now: Timestamp) -> Vec<String> {
    let data = text_of(secret);
    let text = |key: &str| data.get(key).map_or("", |text| text.trim());
    let name = secret
        .pointer("/metadata/name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let used_by = text(USED_BY_KEY).lines().next().unwrap_or_default();
    let used_by = used_by.split(' ').next().unwrap_or_default();
    let uses = match data.get(USES_KEY) {
        Some(uses) => uses.clone(),
        None => u8::from(used_by.is_empty()).to_string(),
    };
    let end = match data.get(EXPIRATION_KEY).map(|end| end.parse::<Timestamp>()) {
        None => "never".to_owned(),
        Some(Ok(end)) if end <= now => format!("{end:.0} (expired)"),
        Some(Ok(end)) => format!("{end:.0}"),
        Some(Err(_)) => "<unreadable>".to_owned(),
    };
    let or_none = |text: &str| {
        if text.is_empty() {
            "<none>".to_owned()
        } else {
            text.to_owned()
        }
    };
    vec![
        name.strip_prefix(NAME_PREFIX).unwrap_or(name).to_owned(),
        uses,
        end,
        or_none(used_by),
        or_none(text(DESCRIPTION_KEY)),
    ]
}

async fn list(session: &Session) -> Result<(), Failure> {
    let request = ListRequest {
        key: Some(key(secrets()?, NAMESPACE, "")),
        ..ListRequest::default()
    };
    let (objects, _) = session.list(request).await?;
    let now = Timestamp::now();
    let tokens = objects
        .iter()
        .filter(|object| object["type"] == SECRET_TYPE);
    let mut rows: Vec<Vec<String>> = tokens.map(|secret| row(secret, now)).collect();
    if rows.is_empty() {
        return output::print(
            "No tokens found; make one with: gantry token create --print-join-command\n",
        );
    }
    let head = [
        "TOKEN ID",
        "USES LEFT",
        "EXPIRES",
        "LAST USED BY",
        "DESCRIPTION",
    ];
    rows.insert(0, head.map(str::to_owned).to_vec());
    output::print(&output::table_text(&rows, &[]))
}

async fn delete(session: &Session, word: &str) -> Result<(), Failure> {
    let id = word.split('.').next().unwrap_or_default();
    let is_id = id.len() == 6
        && id
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if !is_id {
        let text = "want the id of a token, its part before the dot; gantry token list shows them";
        return Err(Failure::local(text));
    }
    let request = DeleteRequest {
        key: Some(key(secrets()?, NAMESPACE, &format!("{NAME_PREFIX}{id}"))),
        ..DeleteRequest::default()
    };
    match session.delete(request).await {
        Ok(_) => output::print(&format!("token {id} deleted\n")),
        Err(failure) if failure.reason() == Some(gantry_api::status::Reason::NotFound) => {
            Err(Failure::local(format!(
                "there is no token {id}; gantry token list shows those there are"
            )))
        }
        Err(failure) => Err(failure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secret_holds_a_digest_and_the_list_no_more_than_the_id() {
        let token = BootstrapToken::parse("abcdef.0123456789abcdef").unwrap();
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let ttl = Duration::from_secs(3600);
        let mut secret = secret(&token, ttl, 20, "rack 7", now).unwrap();
        assert!(!secret.to_string().contains("0123456789"), "{secret}");
        let encode = |text: &Value| {
            let text = text.as_str().unwrap_or_default();
            json!(base64::engine::general_purpose::STANDARD.encode(text))
        };
        let data = secret["stringData"].take();
        let data = data.as_object().unwrap().iter();
        let data: serde_json::Map<_, _> = data
            .map(|(key, text)| (key.clone(), encode(text)))
            .collect();
        secret["data"] = Value::Object(data);
        assert_eq!(
            row(&secret, now),
            ["abcdef", "20", "2026-01-01T01:00:00Z", "<none>", "rack 7"]
        );
        let later = "2026-01-01T02:00:00Z".parse().unwrap();
        assert_eq!(row(&secret, later)[2], "2026-01-01T01:00:00Z (expired)");
        secret["data"][USED_BY_KEY] = encode(&json!("node-a k t\nnode-b k t"));
        assert_eq!(row(&secret, now)[3], "node-a");
        let endless = super::secret(&token, Duration::ZERO, 1, "", now).unwrap();
        assert!(endless["stringData"].get(EXPIRATION_KEY).is_none());
        assert_eq!(
            row(&json!({"metadata": {"name": "x"}}), now),
            ["x", "1", "never", "<none>", "<none>"]
        );
    }
}
