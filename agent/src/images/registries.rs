//! Where names are looked for: the operator's search list and mirrors.
//!
//! ```text
//! /etc/gantry/registries.yaml
//!   search: [docker.io, registry.example]        a name without a registry is tried in each, in order
//!   mirrors:
//!     docker.io:
//!       endpoint: ["http://10.0.0.5:5000", "https://mirror.example"]   then the registry itself
//! ```
//! Without the file a short name means docker.io and every registry is asked itself. A mirror is
//! believed what a tag means, as its operator wants; content is checked by digest wherever it comes
//! from. Credentials of a pod go to the host they are for, never to a mirror of it.
//!
//! Source: k3s `registries.yaml` and containerd `hosts.toml`, the part they have in common.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use serde::Deserialize;

use super::reference::{InvalidName, Reference};

/// Longest configuration, bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Registries a short name is looked for in, and mirrors of one registry.
const LIST_MAX: usize = 16;

/// What the file says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Registries {
    search: Vec<String>,
    mirrors: BTreeMap<String, Vec<Endpoint>>,
}

/// A host that serves a registry's content.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// `10.0.0.5:5000`
    pub host: String,
    /// Without TLS.
    pub plain_http: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    search: Vec<String>,
    #[serde(default)]
    mirrors: BTreeMap<String, Mirror>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mirror {
    endpoint: Vec<String>,
}

impl Registries {
    /// Reads the file; none is no configuration.
    ///
    /// # Errors
    /// In words for the operator: the agent must not start with a file that it reads differently
    /// from what was meant.
    pub fn read(path: &Path) -> Result<Self, String> {
        use std::io::Read as _;
        let mut text = String::new();
        match std::fs::File::open(path) {
            Ok(file) => file
                .take(FILE_BYTES_MAX)
                .read_to_string(&mut text)
                .map_err(|e| format!("cannot read {}: {e}", path.display()))?,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
        };
        Self::parse(&text).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// The pure part of [`Registries::read`].
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let file: File = serde_saphyr::from_str(text).map_err(|e| e.to_string())?;
        if file.search.len() > LIST_MAX {
            return Err(format!("search: more than {LIST_MAX} registries"));
        }
        for registry in file.search.iter().chain(file.mirrors.keys()) {
            Reference::parse(&format!("{registry}/name"))
                .ok()
                .filter(|r| r.registry == *registry)
                .ok_or_else(|| {
                    format!("{registry:?}: want a registry's host, as docker.io or host:5000")
                })?;
        }
        let mut mirrors = BTreeMap::new();
        for (registry, mirror) in file.mirrors {
            if mirror.endpoint.len() > LIST_MAX {
                return Err(format!(
                    "mirrors: {registry}: more than {LIST_MAX} endpoints"
                ));
            }
            let endpoints = mirror.endpoint.iter().map(|e| Endpoint::parse(e));
            let endpoints = endpoints
                .collect::<Result<_, _>>()
                .map_err(|e| format!("mirrors: {registry}: {e}"))?;
            mirrors.insert(registry, endpoints);
        }
        Ok(Self {
            search: file.search,
            mirrors,
        })
    }

    /// The full names that a written one may mean, in order.
    pub fn candidates(&self, written: &str) -> Result<Vec<Reference>, InvalidName> {
        let plain = Reference::parse(written)?;
        if self.search.is_empty() || !is_short(written) {
            return Ok(vec![plain]);
        }
        self.search
            .iter()
            .map(|registry| Reference::parse(&format!("{registry}/{written}")))
            .collect()
    }

    /// Whom to ask for content of a registry, in order; the registry itself comes last.
    pub fn endpoints(&self, name: &Reference) -> Vec<Endpoint> {
        let mirrors = self.mirrors.get(&name.registry).into_iter().flatten();
        let own = Endpoint {
            host: name.registry.clone(),
            plain_http: name.is_loopback(),
        };
        mirrors.cloned().chain([own]).collect()
    }
}

impl Endpoint {
    /// `https://host[:port]`, `http://host[:port]`; a path is refused.
    fn parse(text: &str) -> Result<Self, String> {
        let (host, plain_http) = if let Some(host) = text.strip_prefix("https://") {
            (host, false)
        } else if let Some(host) = text.strip_prefix("http://") {
            (host, true)
        } else {
            return Err(format!(
                "endpoint {text:?}: want http:// or https:// and a host"
            ));
        };
        let host = host.trim_end_matches('/');
        let fits = !host.contains('/')
            && Reference::parse(&format!("{host}/name")).is_ok_and(|r| r.registry == host);
        if !fits {
            return Err(format!(
                "endpoint {text:?}: want a host, with a port or without, no path"
            ));
        }
        Ok(Self {
            host: host.to_owned(),
            plain_http,
        })
    }
}

/// Whether no registry is named.
fn is_short(written: &str) -> bool {
    match written.split_once('/') {
        None => true,
        Some((first, _)) => {
            !first.contains(['.', ':'])
                && first != "localhost"
                && !first.bytes().any(|b| b.is_ascii_uppercase())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: &str = "search: [docker.io, registry.example]\nmirrors:\n  docker.io:\n    endpoint: ['http://10.0.0.5:5000', https://mirror.example/]\n";

    fn names(registries: &Registries, written: &str) -> Vec<String> {
        let all = registries.candidates(written).unwrap();
        all.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn short_names_are_tried_in_each_registry_of_the_list() {
        let registries = Registries::parse(FILE).unwrap();
        let want = ["docker.io/library/nginx:1", "registry.example/nginx:1"];
        assert_eq!(names(&registries, "nginx:1"), want);
        let want = ["docker.io/me/web:latest", "registry.example/me/web:latest"];
        assert_eq!(names(&registries, "me/web"), want);
        assert_eq!(names(&registries, "quay.io/a/b:c"), ["quay.io/a/b:c"]);
        assert_eq!(names(&registries, "localhost/b:c"), ["localhost/b:c"]);
        assert_eq!(
            names(&Registries::default(), "x"),
            ["docker.io/library/x:latest"]
        );
    }

    #[test]
    fn mirrors_come_first_and_the_registry_last() {
        let registries = Registries::parse(FILE).unwrap();
        let hosts = |name: &str| -> Vec<(String, bool)> {
            let name = Reference::parse(name).unwrap();
            let endpoints = registries.endpoints(&name).into_iter();
            endpoints.map(|e| (e.host, e.plain_http)).collect()
        };
        let host = |h: &str, plain| (h.to_owned(), plain);
        let want = [
            host("10.0.0.5:5000", true),
            host("mirror.example", false),
            host("docker.io", false),
        ];
        assert_eq!(hosts("nginx"), want);
        assert_eq!(hosts("quay.io/a"), [host("quay.io", false)]);
        assert_eq!(hosts("127.0.0.1:5/a"), [host("127.0.0.1:5", true)]);
    }

    #[test]
    fn a_file_that_means_something_else_is_refused() {
        for (text, word) in [
            ("serch: [docker.io]", "serch"),
            ("search: [docker.io/library]", "docker.io/library"),
            ("search: [nodots]", "nodots"),
            (
                "mirrors: {docker.io: {endpoint: ['mirror.example']}}",
                "http://",
            ),
            (
                "mirrors: {docker.io: {endpoint: ['https://m.example/proxy']}}",
                "no path",
            ),
        ] {
            let error = Registries::parse(text).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        assert_eq!(Registries::parse("\n").unwrap(), Registries::default());
        let none = Registries::read(Path::new("/nonexistent/registries.yaml"));
        assert_eq!(none.unwrap(), Registries::default());
    }

    proptest! {
        #[test]
        fn any_file_parses_or_is_refused(text in "\\PC{0,80}") {
            let _ = Registries::parse(&text);
        }
    }
}
