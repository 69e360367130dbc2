//! What names, labels and ports may look like. Each function returns the rules that a text breaks,
//! in Kubernetes' words (`apimachinery/pkg/util/validation`); empty means valid.

/// RFC 1123 label, at most 63 bytes: names of containers, volumes, namespaces.
#[must_use]
pub fn dns1123_label(text: &str) -> Vec<String> {
    let mut broken = too_long(text, 63);
    if !is_dns1123_label(text) {
        broken.push(
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or \
             '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or \
             '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
                .to_owned(),
        );
    }
    broken
}

/// RFC 1123 subdomain, at most 253 bytes: names of most objects.
#[must_use]
pub fn dns1123_subdomain(text: &str) -> Vec<String> {
    let mut broken = too_long(text, 253);
    if !text.split('.').all(is_dns1123_label) {
        broken.push(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, \
             '-' or '.', and must start and end with an alphanumeric character (e.g. \
             'example.com', regex used for validation is \
             '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
                .to_owned(),
        );
    }
    broken
}

/// RFC 1035 label, at most 63 bytes: names of Services, which are DNS labels.
#[must_use]
pub fn dns1035_label(text: &str) -> Vec<String> {
    let mut broken = too_long(text, 63);
    if !is_dns1123_label(text) || !text.starts_with(|c: char| c.is_ascii_lowercase()) {
        broken.push(
            "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start \
             with an alphabetic character, and end with an alphanumeric character (e.g. \
             'my-name',  or 'abc-123', regex used for validation is \
             '[a-z]([-a-z0-9]*[a-z0-9])?')"
                .to_owned(),
        );
    }
    broken
}

/// A name that is one part of a path: what RBAC's objects are called.
#[must_use]
pub fn path_segment(text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    if matches!(text, "." | "..") {
        broken.push(format!("may not be '{text}'"));
    }
    for illegal in ["/", "%"] {
        if text.contains(illegal) {
            broken.push(format!("may not contain '{illegal}'"));
        }
    }
    if text.len() > 253 {
        broken.push("must be no more than 253 bytes".to_owned());
    }
    broken
}

/// A label or annotation key: an optional DNS prefix, `/`, and a name of at most 63 bytes.
#[must_use]
pub fn qualified_name(text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    let name = match text.split_once('/') {
        None => text,
        Some((_, name)) if name.contains('/') => {
            let rule = "a qualified name must consist of alphanumeric characters, '-', '_' or \
                        '.', and must start and end with an alphanumeric character, with an \
                        optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')";
            return vec![rule.to_owned()];
        }
        Some(("", _)) => {
            broken.push("prefix part must be non-empty".to_owned());
            text.trim_start_matches('/')
        }
        Some((prefix, name)) => {
            let prefixed = |rule: String| format!("prefix part {rule}");
            broken.extend(dns1123_subdomain(prefix).into_iter().map(prefixed));
            name
        }
    };
    if name.is_empty() {
        broken.push("name part must be non-empty".to_owned());
    }
    broken.extend(
        too_long(name, 63)
            .into_iter()
            .map(|rule| format!("name part {rule}")),
    );
    if !is_label_text(name) {
        broken.push(
            "name part must consist of alphanumeric characters, '-', '_' or '.', and must start \
             and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', \
             regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
                .to_owned(),
        );
    }
    broken
}

/// A label's value: empty, or at most 63 bytes of letters, digits, `-`, `_`, `.`.
#[must_use]
pub fn label_value(text: &str) -> Vec<String> {
    let mut broken = too_long(text, 63);
    if !text.is_empty() && !is_label_text(text) {
        broken.push(
            "a valid label must be an empty string or consist of alphanumeric characters, '-', \
             '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  \
             or 'my_value',  or '12345', regex used for validation is \
             '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
                .to_owned(),
        );
    }
    broken
}

/// A key of a ConfigMap or Secret: it becomes a file name.
#[must_use]
pub fn config_key(text: &str) -> Vec<String> {
    let mut broken = too_long(text, 253);
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if text.is_empty() || !text.bytes().all(allowed) {
        broken.push(
            "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. \
             'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is \
             '[-._a-zA-Z0-9]+')"
                .to_owned(),
        );
    }
    if text == "." || text == ".." {
        broken.push(format!("must not be '{text}'"));
    } else if text.starts_with("..") {
        broken.push("must not start with '..'".to_owned());
    }
    broken
}

/// An environment variable's name: any printable ASCII except `=`.
#[must_use]
pub fn env_name(text: &str) -> Vec<String> {
    if !text.is_empty()
        && text
            .bytes()
            .all(|b| (b' '..=b'~').contains(&b) && b != b'=')
    {
        return Vec::new();
    }
    let rule = "a valid environment variable name must consist only of printable ASCII \
                characters other than '='";
    vec![rule.to_owned()]
}

/// A named port: at most 15 bytes, with a letter, no `--`.
#[must_use]
pub fn port_name(text: &str) -> Vec<String> {
    let mut broken = too_long(text, 15);
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if text.is_empty() || !text.bytes().all(allowed) {
        broken.push(
            "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned(),
        );
    }
    if !text.bytes().any(|b| b.is_ascii_lowercase()) {
        broken.push("must contain at least one letter (a-z)".to_owned());
    }
    if text.contains("--") {
        broken.push("must not contain consecutive hyphens".to_owned());
    }
    if text.starts_with('-') || text.ends_with('-') {
        broken.push("must not begin or end with a hyphen".to_owned());
    }
    broken
}

/// A port number.
#[must_use]
pub fn port_number(port: i32) -> Vec<String> {
    if (1..=65_535).contains(&port) {
        return Vec::new();
    }
    vec!["must be between 1 and 65535, inclusive".to_owned()]
}

fn too_long(text: &str, max_bytes: usize) -> Vec<String> {
    if text.len() <= max_bytes {
        return Vec::new();
    }
    vec![format!("must be no more than {max_bytes} bytes")]
}

fn is_dns1123_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty() && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

fn is_label_text(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.iter().all(|b| inner(*b)) && edge(bytes.first()) && edge(bytes.last())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_and_invalid_names() {
        for good in ["a", "a-b", "0", "a0"] {
            assert!(dns1123_label(good).is_empty(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "é", &"a".repeat(64)] {
            assert!(!dns1123_label(bad).is_empty(), "{bad}");
        }
        assert!(dns1123_subdomain("a.b-c.d").is_empty());
        assert!(!dns1123_subdomain("a..b").is_empty());
        assert!(!dns1035_label("1web").is_empty());
        assert!(qualified_name("example.com/My_name.1").is_empty());
        for bad in ["", "/a", "a/", "a/b/c", "-a", "a b", "UPPER.com/a"] {
            assert!(!qualified_name(bad).is_empty(), "{bad}");
        }
        assert!(label_value("").is_empty());
        assert!(!label_value("a b").is_empty());
        assert!(config_key("nginx.conf").is_empty());
        assert!(config_key(".hidden").is_empty());
        for bad in ["", "..", "../x", "..data", "a/b"] {
            assert!(!config_key(bad).is_empty(), "{bad}");
        }
        assert!(port_name("http-1").is_empty());
        for bad in ["", "123", "a--b", "-a", "HTTP", "averyveryverylong"] {
            assert!(!port_name(bad).is_empty(), "{bad}");
        }
        assert!(env_name("FOO.bar").is_empty());
        assert!(!env_name("a=b").is_empty());
        assert!(port_number(0).len() == 1 && port_number(65_536).len() == 1);
    }
}
