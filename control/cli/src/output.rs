//! What is printed: tables as kubectl aligns them, YAML, JSON, names.

use crate::failure::Failure;
use gantry_api::kinds::Kind;
use gantry_api::manifest::to_yaml;
use gantry_api::table::widths;
use serde_json::Value;
use std::io::Write;

/// `-o`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Format {
    #[default]
    Table,
    Wide,
    Yaml,
    Json,
    Name,
}

/// Reads the value of `-o`.
pub(crate) fn format(text: &str) -> Result<Format, String> {
    match text {
        "" => Ok(Format::Table),
        "wide" => Ok(Format::Wide),
        "yaml" => Ok(Format::Yaml),
        "json" => Ok(Format::Json),
        "name" => Ok(Format::Name),
        other => Err(format!(
            "unable to match a printer suitable for the output format {other:?}, allowed formats \
             are: json,name,wide,yaml"
        )),
    }
}

/// Blanks between columns.
const GAP: usize = 3;

/// A table's text: columns as wide as their widest cell, or as `at_least` says.
pub(crate) fn table_text(rows: &[Vec<String>], at_least: &[usize]) -> String {
    let mut widths = widths(rows.iter().map(Vec::as_slice));
    for (width, least) in widths.iter_mut().zip(at_least) {
        *width = (*width).max(*least);
    }
    let mut text = String::new();
    for row in rows {
        for (i, cell) in row.iter().enumerate() {
            // A cell with a line break would break the table.
            let cell = cell.replace(['\n', '\r'], " ");
            text.push_str(&cell);
            if i + 1 < row.len() {
                let width = widths.get(i).copied().unwrap_or(0);
                let fill = width.saturating_sub(cell.chars().count()) + GAP;
                text.extend(std::iter::repeat_n(' ', fill));
            }
        }
        text.push('\n');
    }
    text
}

/// Writes to stdout at once.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// An object's line for `-o name` and for messages: `deployment.apps/web`.
pub(crate) fn object_name(kind: &Kind, name: &str) -> String {
    format!("{}/{name}", kind.qualified_singular())
}

/// An object, or a list of several, as YAML or JSON.
pub(crate) fn print_value(value: &Value, format: Format) -> Result<(), Failure> {
    let text = if format == Format::Json {
        let pretty = serde_json::to_string_pretty(value).unwrap_or_default();
        // kubectl indents by four.
        let widened = |line: &str| {
            let indent = line.len() - line.trim_start().len();
            format!("{}{line}\n", " ".repeat(indent))
        };
        pretty.lines().map(widened).collect()
    } else {
        to_yaml(value)
    };
    print(&text)
}

/// What `-o yaml` shows of a last applied manifest is noise in a list of changes; kubectl keeps
/// it, and so do we. Objects without apiVersion (old store entries) get theirs.
pub(crate) fn with_type(kind: &Kind, mut object: Value) -> Value {
    if let Some(map) = object.as_object_mut() {
        map.entry("apiVersion")
            .or_insert_with(|| kind.api_version().into());
        map.entry("kind").or_insert_with(|| kind.kind.into());
    }
    object
}

/// Several objects as one `List`.
pub(crate) fn list(items: Vec<Value>) -> Value {
    serde_json::json!({
        "apiVersion": "v1",
        "items": items,
        "kind": "List",
        "metadata": {"resourceVersion": ""}
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[&str]) -> Vec<String> {
        cells.iter().map(|c| (*c).to_owned()).collect()
    }

    #[test]
    fn columns_align_with_three_blanks_and_no_trailing_ones() {
        let rows = [row(&["NAME", "READY", "AGE"]), row(&["web-é", "1/1", "5m"])];
        assert_eq!(
            table_text(&rows, &[]),
            "NAME    READY   AGE\nweb-é   1/1     5m\n"
        );
        assert_eq!(table_text(&[row(&["a", "b"])], &[4]), "a      b\n");
        assert_eq!(table_text(&[row(&["a\nb", "c"])], &[]), "a b   c\n");
    }

    #[test]
    fn only_known_formats_are_taken() {
        assert_eq!(format("wide"), Ok(Format::Wide));
        assert!(
            format("xml")
                .unwrap_err()
                .contains("allowed formats are: json,name,wide,yaml")
        );
    }
}
