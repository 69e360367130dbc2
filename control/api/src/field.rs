//! Field paths and field errors: `spec.containers[0].image: Required value`.
//!
//! The texts are those of Kubernetes' `apimachinery/pkg/util/validation/field`, so that a message
//! seen here can be searched for there.

use serde_json::Value;
use std::fmt;

/// A path to a field, as people write it. Cheap enough to build only where an error is near.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path(String);

impl Path {
    /// A path that starts at a top-level field.
    #[must_use]
    pub fn new(root: &str) -> Self {
        Self(root.to_owned())
    }

    /// The field `name` inside this one.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        if self.0.is_empty() {
            Self(name.to_owned())
        } else {
            Self(format!("{}.{name}", self.0))
        }
    }

    /// The element at `index` of this list.
    #[must_use]
    pub fn index(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }

    /// The entry `key` of this map.
    #[must_use]
    pub fn key(&self, key: &str) -> Self {
        Self(format!("{}[{key}]", self.0))
    }

    /// The path as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is wrong with a field; the names are the reasons of metav1.StatusCause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldErrorType {
    /// A value must be given.
    Required,
    /// The value breaks a rule.
    Invalid,
    /// The value is none of the allowed ones.
    NotSupported,
    /// The field may not be set (here, or at all).
    Forbidden,
    /// The value occurs twice in a list that must be unique.
    Duplicate,
    /// The value names something that does not exist.
    NotFound,
    /// The text is too long.
    TooLong,
    /// The list has too many elements.
    TooMany,
}

impl FieldErrorType {
    /// The machine-readable reason, as in `status.details.causes[].reason`.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Required => "FieldValueRequired",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::Duplicate => "FieldValueDuplicate",
            Self::NotFound => "FieldValueNotFound",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Required => "Required value",
            Self::Invalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::Duplicate => "Duplicate value",
            Self::NotFound => "Not found",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
        }
    }
}

/// One error of one field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// What is wrong.
    pub error_type: FieldErrorType,
    /// Where, e.g. `spec.containers[0].image`.
    pub field: String,
    /// The message without the path, e.g. `Invalid value: -1: must be greater than or equal to 0`.
    pub body: String,
}

/// The longest quoted value in a message, in bytes: a 1 MiB ConfigMap must not come back as text.
const VALUE_BYTES_MAX: usize = 256;

impl FieldError {
    fn new(error_type: FieldErrorType, field: &Path, value: Option<&Value>, detail: &str) -> Self {
        let mut body = error_type.text().to_owned();
        if let Some(value) = value {
            body.push_str(": ");
            body.push_str(&shown(value));
        }
        if !detail.is_empty() {
            body.push_str(": ");
            body.push_str(detail);
        }
        Self {
            error_type,
            field: field.0.clone(),
            body,
        }
    }

    /// A value must be given.
    #[must_use]
    pub fn required(field: &Path, detail: &str) -> Self {
        Self::new(FieldErrorType::Required, field, None, detail)
    }

    /// The value breaks a rule, which `detail` says.
    #[must_use]
    pub fn invalid(field: &Path, value: impl Into<Value>, detail: &str) -> Self {
        Self::new(FieldErrorType::Invalid, field, Some(&value.into()), detail)
    }

    /// Fields that go together break a rule; their values say nothing by themselves.
    #[must_use]
    pub fn invalid_as_a_whole(field: &Path, detail: &str) -> Self {
        Self::new(FieldErrorType::Invalid, field, None, detail)
    }

    /// The value is none of `supported`.
    #[must_use]
    pub fn not_supported(field: &Path, value: impl Into<Value>, supported: &[&str]) -> Self {
        let list: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
        let detail = format!("supported values: {}", list.join(", "));
        Self::new(
            FieldErrorType::NotSupported,
            field,
            Some(&value.into()),
            &detail,
        )
    }

    /// The field may not be set, for the reason in `detail`.
    #[must_use]
    pub fn forbidden(field: &Path, detail: &str) -> Self {
        Self::new(FieldErrorType::Forbidden, field, None, detail)
    }

    /// The value occurs twice.
    #[must_use]
    pub fn duplicate(field: &Path, value: impl Into<Value>) -> Self {
        Self::new(FieldErrorType::Duplicate, field, Some(&value.into()), "")
    }

    /// The value names something that does not exist.
    #[must_use]
    pub fn not_found(field: &Path, value: impl Into<Value>) -> Self {
        Self::new(FieldErrorType::NotFound, field, Some(&value.into()), "")
    }

    /// The text is longer than `max_bytes`.
    #[must_use]
    pub fn too_long(field: &Path, max_bytes: usize) -> Self {
        let detail = format!("may not be more than {max_bytes} bytes");
        Self::new(FieldErrorType::TooLong, field, None, &detail)
    }

    /// The list has `count` elements, `max` are allowed.
    #[must_use]
    pub fn too_many(field: &Path, count: usize, max: usize) -> Self {
        let detail = format!("must have at most {max} items");
        Self::new(FieldErrorType::TooMany, field, Some(&count.into()), &detail)
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.body)
    }
}

fn shown(value: &Value) -> String {
    let text = match value {
        Value::Null => "null".to_owned(),
        Value::String(s) => format!("{s:?}"),
        other => other.to_string(),
    };
    if text.len() <= VALUE_BYTES_MAX {
        return text;
    }
    format!("{}...", &text[..text.floor_char_boundary(VALUE_BYTES_MAX)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_read_like_kubernetes() {
        let path = Path::new("spec")
            .child("containers")
            .index(0)
            .child("image");
        assert_eq!(
            FieldError::required(&path, "").to_string(),
            "spec.containers[0].image: Required value"
        );
        assert_eq!(
            FieldError::invalid(&Path::new("spec").child("replicas"), -1, "must be good")
                .to_string(),
            "spec.replicas: Invalid value: -1: must be good"
        );
        assert_eq!(
            FieldError::not_supported(&Path::new("spec").child("type"), "X", &["A", "B"]).body,
            "Unsupported value: \"X\": supported values: \"A\", \"B\""
        );
        assert_eq!(
            FieldError::duplicate(&Path::new("a").key("k"), "x").to_string(),
            "a[k]: Duplicate value: \"x\""
        );
    }

    #[test]
    fn a_huge_value_is_cut_at_a_character() {
        let error = FieldError::invalid(&Path::new("data"), "é".repeat(10_000), "too big");
        assert!(error.body.len() < 400, "{}", error.body.len());
        assert!(error.body.ends_with("...: too big"));
    }
}
