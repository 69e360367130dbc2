//! Image names: what people write, and the one full name everything is kept under.
//!
//! ```text
//! nginx                     ─► docker.io/library/nginx:latest
//! 127.0.0.1:5000/web:v2     ─► 127.0.0.1:5000/web:v2
//! web@sha256:<64 hex>       ─► docker.io/library/web@sha256:<64 hex>
//! ```
//! A name with tag and digest means the digest; the tag is decoration. Pure.
//!
//! Source: the grammar of github.com/distribution/reference, as Docker and containerd use it.

use std::fmt;

/// The whole name, without tag and digest, may have this many bytes.
const NAME_BYTES_MAX: usize = 255;
/// Longest tag.
const TAG_BYTES_MAX: usize = 128;

/// The name cannot be one of an image.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("invalid image name {name:?}: {reason}")]
pub struct InvalidName {
    /// As written.
    pub name: String,
    /// What is wrong, where.
    pub reason: String,
}

/// `sha256:` and 64 lower-case hex digits.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// Takes `sha256:<64 hex>`; other algorithms are not used by any registry in practice.
    pub fn parse(text: &str) -> Result<Self, String> {
        let hex = text
            .strip_prefix("sha256:")
            .ok_or_else(|| format!("digest {text:?}: want sha256:<64 hex digits>"))?;
        let fits = hex.len() == 64
            && hex
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "digest {text:?}: want 64 lower-case hex digits after sha256:"
            ))
        }
    }

    /// From the hash itself.
    pub fn from_hash(hash: &[u8]) -> Self {
        use fmt::Write as _;
        let mut text = String::from("sha256:");
        for byte in hash {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    /// `sha256:<hex>`
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The hex digits.
    pub fn hex(&self) -> &str {
        self.0.trim_start_matches("sha256:")
    }
}

impl TryFrom<String> for Digest {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A full image name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Reference {
    /// `docker.io`, `127.0.0.1:5000`
    pub registry: String,
    /// `library/nginx`
    pub repository: String,
    /// `latest` when neither tag nor digest was given.
    pub tag: Option<String>,
    /// The pin.
    pub digest: Option<Digest>,
}

impl Reference {
    /// Parses and completes a name as a person or a pod spec writes it.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let fail = |reason: String| InvalidName {
            name: text.chars().take(300).collect(),
            reason,
        };
        if text.is_empty() {
            return Err(fail("it is empty".into()));
        }
        if text.trim() != text {
            return Err(fail("white space around it".into()));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest).map_err(&fail)?)),
            None => (text, None),
        };
        // A colon after the last slash starts the tag; before it, a port.
        let slash = rest.rfind('/').map_or(0, |at| at + 1);
        let (name, tag) = match rest.get(slash..).and_then(|last| last.find(':')) {
            Some(at) => (&rest[..slash + at], Some(&rest[slash + at + 1..])),
            None => (rest, None),
        };
        if let Some(tag) = tag {
            check_tag(tag).map_err(&fail)?;
        }
        let (registry, path) = split_registry(name);
        check_registry(registry).map_err(&fail)?;
        let repository = match registry {
            "docker.io" if !path.contains('/') => format!("library/{path}"),
            _ => path.to_owned(),
        };
        check_repository(&repository).map_err(&fail)?;
        if registry.len() + 1 + repository.len() > NAME_BYTES_MAX {
            return Err(fail(format!("longer than {NAME_BYTES_MAX} characters")));
        }
        if tag.is_none() && digest.is_none() && is_hex64(name) {
            return Err(fail("64 hex digits are an image ID, not a name".into()));
        }
        let tag = tag.map(str::to_owned);
        Ok(Self {
            registry: registry.to_owned(),
            repository,
            tag: tag.or_else(|| digest.is_none().then(|| "latest".to_owned())),
            digest,
        })
    }

    /// `docker.io/library/nginx`
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The same name pinned to a digest.
    pub fn pinned(&self, digest: &Digest) -> Self {
        Self {
            tag: None,
            digest: Some(digest.clone()),
            ..self.clone()
        }
    }

    /// The registry is on this machine: plain HTTP, as Docker does it.
    pub fn is_loopback(&self) -> bool {
        let host = match self.registry.strip_prefix('[') {
            Some(v6) => v6.split(']').next().unwrap_or(v6),
            None => self.registry.split(':').next().unwrap_or(&self.registry),
        };
        host == "localhost"
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|a| a.is_loopback())
    }
}

/// The key of the reference table: with a digest the tag is left out.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        match (&self.digest, &self.tag) {
            (Some(digest), _) => write!(f, "@{digest}"),
            (None, Some(tag)) => write!(f, ":{tag}"),
            (None, None) => Ok(()),
        }
    }
}

fn is_hex64(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The first component is a registry if it looks like a host; else all of it is a path.
fn split_registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, path))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            // Docker's alias for its own registry.
            (
                if first == "index.docker.io" {
                    "docker.io"
                } else {
                    first
                },
                path,
            )
        }
        _ => ("docker.io", name),
    }
}

fn check_registry(registry: &str) -> Result<(), String> {
    let fail = || format!("registry {registry:?}: want host or host:port");
    let (host, port) = match registry.strip_prefix('[') {
        Some(v6) => {
            let (host, rest) = v6.split_once(']').ok_or_else(fail)?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| fail())?;
            match rest.strip_prefix(':') {
                Some(port) => (None, Some(port)),
                None if rest.is_empty() => (None, None),
                None => return Err(fail()),
            }
        }
        None => match registry.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(registry), None),
        },
    };
    let label = |l: &str| {
        !l.is_empty()
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    let host_fits = host.is_none_or(|h| h.split('.').all(label));
    let port_fits = port.is_none_or(|p| p.parse::<u16>().is_ok() && !p.starts_with('+'));
    if host_fits && port_fits {
        Ok(())
    } else {
        Err(fail())
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` per component.
fn check_repository(repository: &str) -> Result<(), String> {
    for part in repository.split('/') {
        let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let fits = !part.is_empty()
            && part.bytes().next().is_some_and(alphanumeric)
            && part.bytes().last().is_some_and(alphanumeric)
            && part
                .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                .all(|gap| matches!(gap, "" | "." | "_" | "__") || gap.bytes().all(|b| b == b'-'));
        if !fits {
            let hint = match part.bytes().any(|b| b.is_ascii_uppercase()) {
                true => "want lower case",
                false => "want a-z, 0-9 and single '.', '_', '__' or '-' between them",
            };
            return Err(format!("path component {part:?}: {hint}"));
        }
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<(), String> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let fits = tag.bytes().next().is_some_and(word)
        && tag.len() <= TAG_BYTES_MAX
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-');
    if fits {
        Ok(())
    } else {
        Err(format!(
            "tag {tag:?}: want 1 to 128 letters, digits, '_', '.' or '-'"
        ))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn full(text: &str) -> String {
        Reference::parse(text).unwrap().to_string()
    }

    #[test]
    fn short_names_are_completed_like_docker() {
        assert_eq!(full("nginx"), "docker.io/library/nginx:latest");
        assert_eq!(full("nginx:1.27"), "docker.io/library/nginx:1.27");
        assert_eq!(full("me/web"), "docker.io/me/web:latest");
        assert_eq!(
            full("index.docker.io/library/x"),
            "docker.io/library/x:latest"
        );
        assert_eq!(full("localhost/web:v1"), "localhost/web:v1");
        assert_eq!(full("127.0.0.1:5000/a/b__c:v"), "127.0.0.1:5000/a/b__c:v");
        assert_eq!(full("[::1]:5000/a"), "[::1]:5000/a:latest");
        assert_eq!(full("Registry/web"), "Registry/web:latest");
        let pin = format!("web:v1@sha256:{HEX}");
        assert_eq!(full(&pin), format!("docker.io/library/web@sha256:{HEX}"));
        assert!(Reference::parse("[::1]:5000/a").unwrap().is_loopback());
        assert!(Reference::parse("127.9.9.9:5/a").unwrap().is_loopback());
        assert!(!Reference::parse("example.com/a").unwrap().is_loopback());
    }

    #[test]
    fn bad_names_say_why() {
        let bad = [
            "",
            " nginx",
            "nginx ",
            "Nginx",
            "nginx:",
            "nginx:-x",
            "a//b",
            "/a",
            "a/",
            "a..b",
            "a___b",
            "a.-b",
            "web@sha256:12",
            "web@md5:00",
            "host:port/web",
            "host:99999/web",
            "-h.com/a",
            "[::1/a",
            "[zz]:1/a",
            "a:b:c",
            "../etc",
            "a/../b",
            HEX,
        ];
        for name in bad {
            let error = Reference::parse(name).unwrap_err().to_string();
            assert!(error.starts_with("invalid image name"), "{error}");
        }
        assert!(Reference::parse(&"a".repeat(300)).is_err());
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_full_names_are_stable(text in "\\PC{0,60}|[a-z./:@_-]{0,40}") {
            if let Ok(reference) = Reference::parse(&text) {
                let full = reference.to_string();
                prop_assert!(!full.split('/').any(|p| p == ".." || p.is_empty()));
                prop_assert_eq!(Reference::parse(&full).unwrap().to_string(), full);
            }
        }
    }
}
