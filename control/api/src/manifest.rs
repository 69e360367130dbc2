//! Manifests: YAML or JSON text to objects, with the line and column of what is wrong.
//!
//! YAML is read as kubectl reads it (YAML 1.1 scalars as go-yaml knows them: `0644` is octal,
//! `yes` is true, `<<` merges), several documents per file, `kind: List` flattened. Duplicate keys
//! are refused, since one of the two values would vanish. Everything is bounded: bytes, documents,
//! depth, aliases.
//!
//! 2026-11: serde-saphyr, because it alone of four crates follows kubectl here; see the README.

use serde_json::Value;

/// The longest text that is read, in bytes.
pub const MANIFEST_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Documents in one text.
const DOCUMENTS_MAX: usize = 10_000;
/// Lists inside lists that are flattened.
const LIST_DEPTH_MAX: usize = 8;

/// Why a text is no manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The text does not parse.
    #[error("error parsing {source_name}: line {line}, column {column}: {message}")]
    Syntax {
        /// File name, or `STDIN`.
        source_name: String,
        /// From 1.
        line: u64,
        /// From 1, in characters.
        column: u64,
        /// What is wrong.
        message: String,
    },
    /// The text parses, but an object in it is none.
    #[error("error parsing {source_name}: document {number}: {message}")]
    Document {
        /// File name, or `STDIN`.
        source_name: String,
        /// From 1.
        number: usize,
        /// What is wrong.
        message: String,
    },
    /// The text is too long.
    #[error("{source_name} is {bytes} bytes long, {MANIFEST_BYTES_MAX} are allowed")]
    TooLong {
        /// File name, or `STDIN`.
        source_name: String,
        /// Its length.
        bytes: usize,
    },
}

/// Reads all objects of a text; each is a map with `apiVersion` and `kind`.
///
/// # Errors
/// The first thing that is wrong, with its place.
pub fn documents(source_name: &str, text: &str) -> Result<Vec<Value>, ManifestError> {
    let source = || source_name.to_owned();
    if text.len() > MANIFEST_BYTES_MAX {
        return Err(ManifestError::TooLong {
            source_name: source(),
            bytes: text.len(),
        });
    }
    let values = match json_documents(text) {
        Some(values) => values,
        None => yaml_documents(source_name, text)?,
    };
    let mut objects = Vec::new();
    for (i, value) in values.into_iter().enumerate() {
        flatten(value, 0, &mut objects).map_err(|message| ManifestError::Document {
            source_name: source(),
            number: i + 1,
            message,
        })?;
    }
    Ok(objects)
}

/// The values of a text that is JSON throughout (one or several after each other).
fn json_documents(text: &str) -> Option<Vec<Value>> {
    if !text.trim_start().starts_with('{') {
        return None;
    }
    if let Ok(value) = crate::decode::parse_value(text.as_bytes()) {
        return Some(vec![value]);
    }
    // A duplicate key is an error in both languages: the YAML reader says where.
    let stream =
        serde_json::Deserializer::from_str(text).into_iter::<&serde_json::value::RawValue>();
    let mut values = Vec::new();
    for raw in stream.take(DOCUMENTS_MAX) {
        values.push(crate::decode::parse_value(raw.ok()?.get().as_bytes()).ok()?);
    }
    Some(values)
}

fn yaml_documents(source_name: &str, text: &str) -> Result<Vec<Value>, ManifestError> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_documents: DOCUMENTS_MAX,
            max_events: 4_000_000,
            max_nodes: 2_000_000,
            max_depth: 100,
        },
        legacy_octal_numbers: true,
        strict_booleans: false,
        with_snippet: false,
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    serde_saphyr::from_multiple_with_options::<Value>(text, options)
        .map_err(|error| syntax_error(source_name, text, &error))
}

fn syntax_error(source_name: &str, text: &str, error: &serde_saphyr::Error) -> ManifestError {
    let (mut line, mut column) = error
        .location()
        .map_or((1, 1), |place| (place.line(), place.column()));
    let mut message = error.without_snippet().to_string();
    // "at line 3, column 5" is said by our own text already.
    if let Some(cut) = message
        .find(" at line ")
        .or_else(|| message.find("line ").filter(|p| *p == 0))
        && cut > 0
    {
        message.truncate(cut);
    }
    if let Some((tab_line, tab_column)) = tab_before(text, line) {
        (line, column) = (tab_line, tab_column);
        "found a tab used for indentation: use spaces".clone_into(&mut message);
    }
    ManifestError::Syntax {
        source_name: source_name.to_owned(),
        line,
        column,
        message,
    }
}

/// The last tab in the indentation of a line up to the failing one (and the one after, where the
/// parser points at the end of what it understood).
fn tab_before(text: &str, failing_line: u64) -> Option<(u64, u64)> {
    let near = failing_line.saturating_sub(2)..=failing_line.saturating_add(1);
    (1_u64..)
        .zip(text.lines())
        .filter(|(number, _)| near.contains(number))
        .find_map(|(number, line)| {
            let indent = line.len() - line.trim_start_matches([' ', '\t']).len();
            let tab = line[..indent].find('\t')?;
            // A line of blanks alone is no indentation.
            (indent < line.len()).then_some((number, tab as u64 + 1))
        })
}

fn flatten(value: Value, depth: usize, objects: &mut Vec<Value>) -> Result<(), String> {
    let map = match value {
        // `---` with nothing behind it.
        Value::Null => return Ok(()),
        Value::Object(map) => map,
        other => {
            let text: String = other.to_string().chars().take(40).collect();
            return Err(format!(
                "expected an object (a map with apiVersion and kind), found {text}"
            ));
        }
    };
    let field = |name: &str| map.get(name).and_then(Value::as_str).unwrap_or_default();
    for name in ["apiVersion", "kind"] {
        if field(name).is_empty() {
            return Err(format!(
                "Object '{}' is missing",
                if name == "kind" { "Kind" } else { name }
            ));
        }
    }
    if field("kind").ends_with("List") && map.get("items").is_some_and(Value::is_array) {
        if depth >= LIST_DEPTH_MAX {
            return Err(format!("lists are nested more than {LIST_DEPTH_MAX} deep"));
        }
        let Some(Value::Array(items)) = map.get("items").cloned() else {
            return Ok(());
        };
        for item in items {
            flatten(item, depth + 1, objects)?;
        }
        return Ok(());
    }
    objects.push(Value::Object(map));
    Ok(())
}

/// An object as YAML, keys in alphabetical order as `kubectl get -o yaml` prints them.
#[must_use]
pub fn to_yaml(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => emit(value, 0, &mut out),
        Value::Array(list) if !list.is_empty() => emit(value, 0, &mut out),
        scalar => {
            emit_scalar(scalar, 0, &mut out);
        }
    }
    out
}

fn indent(level: usize, out: &mut String) {
    for _ in 0..level {
        out.push_str("  ");
    }
}

fn emit(value: &Value, level: usize, out: &mut String) {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<&String> = map.keys().collect();
            keys.sort();
            for (i, key) in keys.into_iter().enumerate() {
                // The first key of a list's element stands behind its dash.
                if i > 0 || !out.ends_with("- ") {
                    indent(level, out);
                }
                out.push_str(&plain_or_quoted(key));
                out.push(':');
                emit_after_key(&map[key], level, out);
            }
        }
        Value::Array(list) => {
            for (i, item) in list.iter().enumerate() {
                if i > 0 || !out.ends_with("- ") {
                    indent(level, out);
                }
                out.push_str("- ");
                match item {
                    Value::Object(map) if !map.is_empty() => emit(item, level + 1, out),
                    Value::Array(inner) if !inner.is_empty() => emit(item, level + 1, out),
                    scalar => emit_scalar(scalar, level + 1, out),
                }
            }
        }
        scalar => emit_scalar(scalar, level, out),
    }
}

fn emit_after_key(value: &Value, level: usize, out: &mut String) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            out.push('\n');
            emit(value, level + 1, out);
        }
        // Lists stand at the level of their key, as kubectl writes them.
        Value::Array(list) if !list.is_empty() => {
            out.push('\n');
            emit(value, level, out);
        }
        scalar => {
            out.push(' ');
            emit_scalar(scalar, level + 1, out);
        }
    }
}

fn emit_scalar(value: &Value, level: usize, out: &mut String) {
    match value {
        Value::String(text) if is_block(text) => {
            let body = text.strip_suffix('\n').unwrap_or(text);
            out.push_str(if body.len() == text.len() {
                "|-\n"
            } else {
                "|\n"
            });
            for line in body.split('\n') {
                if !line.is_empty() {
                    indent(level.max(1), out);
                    out.push_str(line);
                }
                out.push('\n');
            }
            return;
        }
        Value::String(text) => out.push_str(&plain_or_quoted(text)),
        Value::Object(_) => out.push_str("{}"),
        Value::Array(_) => out.push_str("[]"),
        other => out.push_str(&other.to_string()),
    }
    out.push('\n');
}

/// Whether a text reads best, and safely, as a literal block.
fn is_block(text: &str) -> bool {
    let body = text.strip_suffix('\n').unwrap_or(text);
    text.contains('\n')
        && !body.is_empty()
        && !body.starts_with([' ', '\t', '\n'])
        && !body.ends_with(['\n', ' ', '\t'])
        && text
            .chars()
            .all(|c| c == '\n' || c == '\t' || (c >= ' ' && !is_unprintable(c)))
        && body.split('\n').all(|line| !line.ends_with([' ', '\t']))
}

fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{85}' | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}'
        )
}

/// A text as a plain scalar if no YAML reader can take it for anything else.
fn plain_or_quoted(text: &str) -> String {
    let first_letter = text.trim_start_matches('-');
    let dashes = text.len() - first_letter.len();
    let letter = |c: char| c.is_ascii_alphabetic() || (dashes == 0 && "/_".contains(c));
    let starts_well = (dashes <= 2 && first_letter.starts_with(letter)) || is_number_like(text);
    let inner =
        |c: char| c.is_ascii_alphanumeric() || "-_./@+=()%,; '*<>$!&?~^|\"[]{}`".contains(c);
    // A colon or hash is only special next to a blank; commas only inside flow collections.
    let colons_fine = !text.contains(": ") && !text.ends_with(':') && !text.contains(" #");
    let plain = starts_well
        && colons_fine
        && !text.ends_with(' ')
        && text.chars().all(|c| inner(c) || c == ':' || c == '#')
        && !looks_typed(text);
    if plain {
        return text.to_owned();
    }
    let json = Value::from(text).to_string();
    let mut quoted = String::with_capacity(json.len());
    for c in json.chars() {
        if is_unprintable(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                quoted.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            quoted.push(c);
        }
    }
    quoted
}

/// Addresses, uids, quantities: a digit first, but no number, date or time to any YAML reader.
fn is_number_like(text: &str) -> bool {
    let harmless = |c: char| c.is_ascii_alphanumeric() || "./-%".contains(c);
    let bytes = text.as_bytes();
    bytes.first().is_some_and(u8::is_ascii_digit)
        && text.chars().all(harmless)
        && bytes.get(4) != Some(&b'-')
        && !(bytes[0] == b'0' && bytes.get(1).is_some_and(u8::is_ascii_alphabetic))
}

/// Words that YAML 1.1 reads as something else than text.
fn looks_typed(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    matches!(
        lower.as_str(),
        "true"
            | "false"
            | "yes"
            | "no"
            | "on"
            | "off"
            | "y"
            | "n"
            | "null"
            | "nan"
            | "inf"
            | "infinity"
            | "_"
    ) || text.parse::<f64>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn read(text: &str) -> Result<Vec<Value>, ManifestError> {
        documents("web.yaml", text)
    }

    #[test]
    fn documents_lists_and_json_are_read() {
        let objects = read(
            "# comment\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\n\n---\n\
             apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod}\n\
             - {apiVersion: v1, kind: Node}\n",
        )
        .unwrap();
        let kinds: Vec<&str> = objects.iter().filter_map(|o| o["kind"].as_str()).collect();
        assert_eq!(kinds, ["Pod", "Pod", "Node"]);
        let two = "{\"apiVersion\": \"v1\", \"kind\": \"Pod\"}\n{\"apiVersion\": \"v1\", \"kind\": \"Node\"}";
        assert_eq!(read(two).unwrap().len(), 2);
        assert!(read("").unwrap().is_empty());
    }

    #[test]
    fn scalars_read_as_kubectl_reads_them() {
        let objects = read(
            "apiVersion: v1\nkind: X\nmode: 0644\non: yes\nversion: \"1.0\"\nport: 80\n\
             base: &b {a: 1}\nmerged: {<<: *b, c: 2}\nempty:\ntext: |\n  a\n  b\n",
        )
        .unwrap();
        let object = &objects[0];
        assert_eq!(object["mode"], 420);
        assert_eq!(object["version"], "1.0");
        assert_eq!(object["merged"], json!({"a": 1, "c": 2}));
        assert_eq!(object["empty"], Value::Null);
        assert_eq!(object["text"], "a\nb\n");
    }

    #[test]
    fn a_tab_is_called_a_tab() {
        let error =
            read("apiVersion: v1\nkind: Pod\nspec:\n\tcontainers:\n\t- name: a\n").unwrap_err();
        assert_eq!(
            error.to_string(),
            "error parsing web.yaml: line 4, column 1: found a tab used for indentation: use spaces"
        );
        let error = read("apiVersion: v1\nkind: Pod\nspec:\n  a: 1\n  \tb: 2\n").unwrap_err();
        assert!(
            error.to_string().contains("line 5, column 3: found a tab"),
            "{error}"
        );
    }

    #[test]
    fn errors_say_where() {
        let error = read("apiVersion: v1\nkind: Pod\nspec:\n  a: 1\n  a: 2\n").unwrap_err();
        assert!(error.to_string().contains("line 5, column 3"), "{error}");
        assert!(error.to_string().contains("duplicate"), "{error}");
        let error = read("apiVersion: v1\nkind: Pod\n  image: x\n name: y\n").unwrap_err();
        assert!(
            matches!(error, ManifestError::Syntax { line: 3..=4, .. }),
            "{error}"
        );
        let error = read("kind: Pod\n").unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("Object 'apiVersion' is missing"),
            "{error}"
        );
        assert!(read("- a\n").is_err());
        let bomb = format!("a: &a [x]\n{}", "b: [*a, *a]\n".repeat(3));
        assert!(read(&bomb).is_err());
    }

    #[test]
    fn yaml_output_reads_like_kubectls() {
        let object = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "a",
            "annotations": {"w": "1", "x": "true"}, "labels": {}},
            "spec": {"containers": [{"name": "c", "args": ["-c", "10.0.0.1", "2026-01-01", "a\nb\n"]}]}});
        assert_eq!(
            to_yaml(&object),
            "apiVersion: v1\nkind: Pod\nmetadata:\n  annotations:\n    w: \"1\"\n    x: \"true\"\n  \
             labels: {}\n  name: a\nspec:\n  containers:\n  - args:\n    - -c\n    - 10.0.0.1\n    - \"2026-01-01\"\n    - |\n      a\n      \
             b\n    name: c\n"
        );
    }

    fn tree() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "\\PC{0,12}".prop_map(Value::from),
            "[a-z:#\\-0-9 \n\t'\"{}\\[\\]&*!|>%@`]{0,12}".prop_map(Value::from),
            "[ -~\u{85}\u{2028}é]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z]{1,6}|[ -~]{1,6}", inner, 0..4).prop_map(|map| {
                    // `<<` would merge when read.
                    Value::Object(map.into_iter().filter(|(k, _)| k != "<<").collect())
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(value in tree()) {
            let object = json!({"apiVersion": "v1", "kind": "X", "value": value});
            let yaml = to_yaml(&object);
            let back = read(&yaml).map_err(|e| TestCaseError::fail(format!("{e}\n{yaml}")))?;
            prop_assert_eq!(&back, &vec![object], "{}", yaml);
        }

        #[test]
        fn no_text_panics(text in "([a-z]: |- |\t|\n| |\\PC){0,40}") {
            let _ = read(&text);
        }
    }
}
