//! Kubeconfig files: which server, as whom, in which namespace.
//!
//! Looked for in this order: `--kubeconfig`, `$KUBECONFIG` (a colon-separated list; the first file
//! that defines a name wins), `~/.kube/config`, `/etc/gantry/admin.kubeconfig`.

use crate::failure::Failure;
use base64::Engine as _;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Where `gantry-control` writes the administrator's credentials.
const ADMIN_KUBECONFIG: &str = "/etc/gantry/admin.kubeconfig";
/// A kubeconfig larger than this is none.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

#[derive(Deserialize, Debug, Default)]
#[serde(default, rename_all = "kebab-case")]
struct File {
    current_context: String,
    clusters: Vec<Named<ClusterEntry>>,
    contexts: Vec<Named<ContextEntry>>,
    users: Vec<Named<UserEntry>>,
}

#[derive(Deserialize, Debug)]
struct Named<T> {
    name: String,
    #[serde(alias = "cluster", alias = "context", alias = "user")]
    value: T,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default, rename_all = "kebab-case")]
struct ClusterEntry {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    tls_server_name: Option<String>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default, rename_all = "kebab-case")]
struct ContextEntry {
    cluster: String,
    user: String,
    namespace: Option<String>,
}

#[derive(Deserialize, Debug, Default)]
#[serde(default, rename_all = "kebab-case")]
struct UserEntry {
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    #[serde(rename = "as")]
    as_user: Option<String>,
    as_groups: Vec<String>,
    exec: Option<serde::de::IgnoredAny>,
    auth_provider: Option<serde::de::IgnoredAny>,
    username: Option<String>,
}

/// Somebody else, for whom a caller asks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Impersonated {
    pub(crate) user: String,
    pub(crate) groups: Vec<String>,
}

/// What a connection needs. Certificates and keys are PEM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) server: String,
    pub(crate) authority: Option<Vec<u8>>,
    pub(crate) server_name: Option<String>,
    pub(crate) certificate: Option<Vec<u8>>,
    pub(crate) key: Option<Vec<u8>>,
    /// A bearer token; the server looks at it where there is no certificate.
    pub(crate) token: Option<String>,
    pub(crate) impersonated: Option<Impersonated>,
    pub(crate) namespace: String,
}

/// Where to look; `KUBECONFIG` and `HOME` are passed in, so that tests need no environment.
pub(crate) fn locations(
    flag: Option<&Path>,
    kubeconfig: Option<&str>,
    home: Option<&str>,
) -> Vec<PathBuf> {
    if let Some(path) = flag {
        return vec![path.to_owned()];
    }
    if let Some(list) = kubeconfig.filter(|list| !list.is_empty()) {
        return list
            .split(':')
            .filter(|p| !p.is_empty())
            .map(PathBuf::from)
            .collect();
    }
    let home = home
        .filter(|home| !home.is_empty())
        .map(|home| Path::new(home).join(".kube/config"));
    home.into_iter()
        .filter(|p| p.exists())
        .chain([PathBuf::from(ADMIN_KUBECONFIG)])
        .take(1)
        .collect()
}

/// Reads the files and resolves `context` (or the current one).
pub(crate) fn load(paths: &[PathBuf], context: Option<&str>) -> Result<Access, Failure> {
    let mut merged = Vec::new();
    let single = paths.len() == 1;
    for path in paths {
        match read(path) {
            Ok(file) => merged.push((path, file)),
            // In a list, files that are not there are skipped, as kubectl does.
            Err((true, _)) if !single => {}
            Err((_, text)) => return Err(Failure::Local(text)),
        }
    }
    let wanted = context.map(str::to_owned).or_else(|| {
        merged
            .iter()
            .map(|(_, f)| f.current_context.clone())
            .find(|name| !name.is_empty())
    });
    let Some(wanted) = wanted else {
        let names: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
        let text = format!("no current-context in {}: use --context", names.join(", "));
        return Err(Failure::Local(text));
    };
    let (_, context) = find(&merged, |f| &f.contexts, &wanted)
        .ok_or_else(|| Failure::local(format!("context {wanted:?} does not exist")))?;
    let (cluster_file, cluster) = find(&merged, |f| &f.clusters, &context.cluster)
        .ok_or_else(|| Failure::local(format!("cluster {:?} does not exist", context.cluster)))?;
    let (user_file, user) = find(&merged, |f| &f.users, &context.user)
        .ok_or_else(|| Failure::local(format!("auth info {:?} does not exist", context.user)))?;
    let from = |file: &Path, data: &Option<String>, path: &Option<PathBuf>, field: &str| {
        pem(file, data.as_deref(), path.as_deref(), field)
    };
    Ok(Access {
        server: cluster.server.clone(),
        authority: from(
            cluster_file,
            &cluster.certificate_authority_data,
            &cluster.certificate_authority,
            "certificate-authority",
        )?,
        server_name: cluster.tls_server_name.clone(),
        certificate: from(
            user_file,
            &user.client_certificate_data,
            &user.client_certificate,
            "client-certificate",
        )?,
        key: from(
            user_file,
            &user.client_key_data,
            &user.client_key,
            "client-key",
        )?,
        token: token(user_file, user)?,
        impersonated: impersonated(user, &context.user)?,
        namespace: context
            .namespace
            .clone()
            .filter(|n| !n.is_empty())
            .unwrap_or_else(|| "default".to_owned()),
    })
}

/// The user's token; the one of a file goes before the one beside it, for files are renewed.
fn token(file: &Path, user: &UserEntry) -> Result<Option<String>, Failure> {
    let Some(path) = &user.token_file else {
        return Ok(user.token.clone().filter(|token| !token.is_empty()));
    };
    let path = beside(file, path);
    let shown = file.display();
    let text = std::fs::read_to_string(&path).map_err(|e| {
        Failure::local(format!(
            "kubeconfig {shown}: tokenFile {}: {e}",
            path.display()
        ))
    })?;
    match text.trim() {
        "" => Err(Failure::local(format!(
            "kubeconfig {shown}: tokenFile {} is empty",
            path.display()
        ))),
        token => Ok(Some(token.to_owned())),
    }
}

/// For whom the user asks. A user with nothing but what is not supported is refused here, where the reason
/// is known.
fn impersonated(user: &UserEntry, name: &str) -> Result<Option<Impersonated>, Failure> {
    let has_certificate =
        user.client_certificate.is_some() || user.client_certificate_data.is_some();
    let has_token = user.token.is_some() || user.token_file.is_some();
    let unsupported = [
        ("exec", user.exec.is_some()),
        ("auth-provider", user.auth_provider.is_some()),
        ("username", user.username.is_some()),
    ];
    let unsupported = unsupported.into_iter().find(|(_, given)| *given);
    if let Some((field, _)) = unsupported.filter(|_| !has_certificate && !has_token) {
        return Err(Failure::local(format!(
            "auth info {name:?} has {field}, which is not supported: use a client certificate, token or \
             tokenFile"
        )));
    }
    match (&user.as_user, user.as_groups.is_empty()) {
        (Some(other), _) => Ok(Some(Impersonated {
            user: other.clone(),
            groups: user.as_groups.clone(),
        })),
        (None, true) => Ok(None),
        (None, false) => Err(Failure::local(format!(
            "auth info {name:?} has as-groups without as: groups alone are nobody"
        ))),
    }
}

/// Relative to the kubeconfig, not to the working directory.
fn beside(file: &Path, path: &Path) -> PathBuf {
    file.parent().unwrap_or_else(|| Path::new(".")).join(path)
}

fn find<'a, T>(
    files: &'a [(&PathBuf, File)],
    list: impl Fn(&'a File) -> &'a Vec<Named<T>>,
    name: &str,
) -> Option<(&'a Path, &'a T)> {
    files.iter().find_map(|(path, file)| {
        let entry = list(file).iter().find(|entry| entry.name == name)?;
        Some((path.as_path(), &entry.value))
    })
}

/// The file, or whether it is only missing, and the text that says what is wrong.
fn read(path: &Path) -> Result<File, (bool, String)> {
    let shown = path.display();
    let meta = std::fs::metadata(path).map_err(|e| {
        let missing = e.kind() == std::io::ErrorKind::NotFound;
        let hint = if missing {
            "; set KUBECONFIG or use --kubeconfig"
        } else {
            ""
        };
        (
            missing,
            format!("cannot read kubeconfig {shown}: {e}{hint}"),
        )
    })?;
    if meta.len() > FILE_BYTES_MAX {
        return Err((
            false,
            format!("kubeconfig {shown} is {} bytes long, too many", meta.len()),
        ));
    }
    let text = std::fs::read_to_string(path)
        .map_err(|e| (false, format!("cannot read kubeconfig {shown}: {e}")))?;
    serde_saphyr::from_str(&text).map_err(|e| {
        (
            false,
            format!("kubeconfig {shown} is malformed: {}", e.without_snippet()),
        )
    })
}

fn pem(
    file: &Path,
    data: Option<&str>,
    path: Option<&Path>,
    field: &str,
) -> Result<Option<Vec<u8>>, Failure> {
    let shown = file.display();
    if let Some(data) = data.filter(|d| !d.is_empty()) {
        let data: String = data.split_whitespace().collect();
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(data)
            .map_err(|e| Failure::local(format!("kubeconfig {shown}: {field}-data: {e}")))?;
        return Ok(Some(bytes));
    }
    let Some(path) = path else { return Ok(None) };
    let path = beside(file, path);
    let bytes = std::fs::read(&path).map_err(|e| {
        Failure::local(format!(
            "kubeconfig {shown}: {field} {}: {e}",
            path.display()
        ))
    })?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "apiVersion: v1\nkind: Config\ncurrent-context: a\nclusters:\n- name: c\n  \
        cluster: {server: 'https://127.0.0.1:6443', certificate-authority: ca.crt}\nusers:\n\
        - name: u\n  user: {client-certificate-data: eA==, client-key-data: eQ==}\ncontexts:\n\
        - name: a\n  context: {cluster: c, user: u, namespace: shop}\n\
        - name: b\n  context: {cluster: nowhere, user: u}\n";

    #[test]
    fn a_context_becomes_access() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        std::fs::write(&path, TEXT).unwrap();
        std::fs::write(dir.path().join("ca.crt"), "pem").unwrap();
        let missing = dir.path().join("missing");
        let access = load(&[missing.clone(), path.clone()], None).unwrap();
        assert_eq!(access.server, "https://127.0.0.1:6443");
        assert_eq!(access.authority.as_deref(), Some(&b"pem"[..]));
        assert_eq!(access.certificate.as_deref(), Some(&b"x"[..]));
        assert_eq!(access.namespace, "shop");
        for (paths, context, text) in [
            (
                vec![path.clone()],
                Some("b"),
                "cluster \"nowhere\" does not exist",
            ),
            (
                vec![path.clone()],
                Some("z"),
                "context \"z\" does not exist",
            ),
            (vec![missing], None, "No such file"),
        ] {
            let error = load(&paths, context).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    /// Access of a user with these fields.
    fn access_of(dir: &Path, user: &str) -> Result<Access, Failure> {
        let path = dir.join("config");
        let text = format!(
            "current-context: a\nclusters:\n- name: c\n  cluster: {{server: 'https://127.0.0.1:6443'}}\n\
             contexts:\n- name: a\n  context: {{cluster: c, user: u}}\nusers:\n- name: u\n  user: {user}\n"
        );
        std::fs::write(&path, text).unwrap();
        load(&[path], None)
    }

    #[test]
    fn users_have_tokens_and_stand_for_others() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("t"), "from-file\n").unwrap();
        std::fs::write(dir.path().join("empty"), "\n").unwrap();
        let token = |user: &str| access_of(dir.path(), user).map(|access| access.token);
        assert_eq!(token("{token: abc}").unwrap().as_deref(), Some("abc"));
        let both = token("{token: abc, tokenFile: t}").unwrap();
        assert_eq!(both.as_deref(), Some("from-file"));
        assert_eq!(token("{client-certificate-data: eA==}").unwrap(), None);
        let access = access_of(dir.path(), "{token: abc, as: jane, as-groups: [dev]}").unwrap();
        let other = access.impersonated.unwrap();
        assert_eq!(
            (other.user.as_str(), other.groups.as_slice()),
            ("jane", &["dev".to_owned()][..])
        );
        for (user, text) in [
            ("{tokenFile: missing}", "tokenFile"),
            ("{tokenFile: empty}", "is empty"),
            ("{exec: {command: aws}}", "has exec, which is not supported"),
            (
                "{username: u, password: p}",
                "has username, which is not supported",
            ),
            ("{token: t, as-groups: [dev]}", "as-groups without as"),
        ] {
            let error = access_of(dir.path(), user).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn the_flag_goes_before_the_environment() {
        let flag = Path::new("/f");
        assert_eq!(
            locations(Some(flag), Some("/a:/b"), None),
            [PathBuf::from("/f")]
        );
        assert_eq!(locations(None, Some("/a::/b"), None).len(), 2);
        assert_eq!(
            locations(None, None, Some("/nonexistent")),
            [PathBuf::from(ADMIN_KUBECONFIG)]
        );
    }
}
