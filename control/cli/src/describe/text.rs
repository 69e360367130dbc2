//! The layout of a description: labels with values in one column, nested by indentation.

use crate::output::table_text;
use gantry_api::merge::LAST_APPLIED;
use serde_json::Value;

/// A text field; "" when absent.
pub(super) fn field<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

pub(super) fn number(object: &Value, pointer: &str) -> i64 {
    object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
}

pub(super) fn items<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object
        .pointer(pointer)
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}

/// A text without its quotes, or any other value as JSON.
pub(super) fn scalar(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// Bytes behind a base64 text.
pub(super) fn base64_len(text: &str) -> usize {
    text.trim_end_matches('=').len() * 3 / 4
}

/// Labels, one per line.
pub(super) fn label_lines(labels: Option<&Value>) -> Vec<String> {
    let map = labels.and_then(Value::as_object);
    map.into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", scalar(v)))
        .collect()
}

/// Annotations, one per line, without the copy of the manifest.
pub(super) fn annotation_lines(object: &Value) -> Vec<String> {
    let map = object
        .pointer("/metadata/annotations")
        .and_then(Value::as_object);
    let shown = map
        .into_iter()
        .flatten()
        .filter(|(key, _)| *key != LAST_APPLIED);
    shown
        .map(|(key, value)| format!("{key}: {}", scalar(value).trim()))
        .collect()
}

pub(super) fn taint_lines(node: &Value) -> Vec<String> {
    let line = |taint: &Value| match field(taint, "/value") {
        "" => format!("{}:{}", field(taint, "/key"), field(taint, "/effect")),
        value => format!(
            "{}={value}:{}",
            field(taint, "/key"),
            field(taint, "/effect")
        ),
    };
    items(node, "/spec/taints").iter().map(line).collect()
}

/// `ReplicaSet/web-5d4f`, or "" when nothing controls the object.
pub(super) fn controller(object: &Value) -> String {
    items(object, "/metadata/ownerReferences")
        .iter()
        .find(|owner| owner.get("controller") == Some(&Value::Bool(true)))
        .map(|owner| format!("{}/{}", field(owner, "/kind"), field(owner, "/name")))
        .unwrap_or_default()
}

/// The conditions of a status as a table of these fields.
pub(super) fn conditions(object: &Value, columns: &[&str], text: &mut Text) {
    let all = items(object, "/status/conditions");
    if all.is_empty() {
        return;
    }
    text.head(0, "Conditions");
    let mut rows = vec![columns.iter().map(|c| (*c).to_owned()).collect::<Vec<_>>()];
    for condition in all {
        let cell = |column: &&str| {
            field(
                condition,
                &format!("/{}{}", column[..1].to_lowercase(), &column[1..]),
            )
            .to_owned()
        };
        rows.push(columns.iter().map(cell).collect());
    }
    text.table(2, &rows);
}

enum Line {
    Pair {
        indent: usize,
        label: String,
        value: String,
    },
    Raw(String),
}

/// Lines gathered first, aligned at the end.
#[derive(Default)]
pub(super) struct Text {
    lines: Vec<Line>,
}

impl Text {
    /// `Label:   value`; nothing when the value is empty.
    pub(super) fn line(&mut self, indent: usize, label: &str, value: &str) {
        if !value.is_empty() {
            let (label, value) = (format!("{label}:"), value.to_owned());
            self.lines.push(Line::Pair {
                indent,
                label,
                value,
            });
        }
    }

    /// Several values below each other; `<none>` when there are none.
    pub(super) fn lines(&mut self, indent: usize, label: &str, values: &[String]) {
        let Some((first, rest)) = values.split_first() else {
            return self.line(indent, label, "<none>");
        };
        self.line(indent, label, first);
        for value in rest {
            let value = value.clone();
            self.lines.push(Line::Pair {
                indent,
                label: String::new(),
                value,
            });
        }
    }

    /// `Label:` with nested lines to follow.
    pub(super) fn head(&mut self, indent: usize, label: &str) {
        self.lines
            .push(Line::Raw(format!("{}{label}:\n", " ".repeat(indent))));
    }

    pub(super) fn table(&mut self, indent: usize, rows: &[Vec<String>]) {
        let pad = " ".repeat(indent);
        let text: String = table_text(rows, &[])
            .lines()
            .map(|l| format!("{pad}{l}\n"))
            .collect();
        self.lines.push(Line::Raw(text));
    }

    pub(super) fn raw(&mut self, text: &str) {
        self.lines.push(Line::Raw(text.to_owned()));
    }

    pub(super) fn blank(&mut self) {
        self.raw("\n");
    }

    /// The whole text: values of neighbouring lines of one depth start in one column.
    pub(super) fn finish(&self) -> String {
        let mut text = String::new();
        // kubectl aligns the whole description; so does the widest label of each depth here.
        let width = |wanted: usize| {
            self.lines
                .iter()
                .filter_map(|line| match line {
                    Line::Pair { indent, label, .. } if *indent == wanted => {
                        Some(label.chars().count())
                    }
                    _ => None,
                })
                .max()
                .unwrap_or(0)
        };
        for line in &self.lines {
            match line {
                Line::Raw(raw) => text.push_str(raw),
                Line::Pair {
                    indent,
                    label,
                    value,
                } => {
                    let fill = width(*indent) - label.chars().count() + 2;
                    text.push_str(&" ".repeat(*indent));
                    text.push_str(label);
                    text.push_str(&" ".repeat(fill));
                    text.push_str(value);
                    text.push('\n');
                }
            }
        }
        text
    }
}
