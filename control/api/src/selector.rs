//! Selectors: which objects a query means, by label (`app=web,tier in (a,b),!old`) and by field
//! (`metadata.name=web,status.phase!=Running`).
//!
//! Source of the label grammar: `apimachinery/pkg/labels/selector.go`. Field selectors know the
//! same few fields as Kubernetes; another field is an error, never an empty answer.

use crate::kinds::Kind;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// The longest selector that is parsed, in bytes.
const SELECTOR_BYTES_MAX: usize = 16 * 1024;

/// Why a text is no selector.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    /// The text does not follow the grammar.
    #[error("unable to parse requirement: found {found:?}, expected {expected}")]
    Syntax {
        /// What stands there.
        found: String,
        /// What could.
        expected: &'static str,
    },
    /// A key or a value breaks the rules for labels.
    #[error("invalid label {what} {text:?}: {detail}")]
    Label {
        /// `key` or `value`.
        what: &'static str,
        /// The text itself.
        text: String,
        /// The rule.
        detail: String,
    },
    /// This kind cannot be selected by this field.
    #[error("field label not supported: {0}")]
    Field(String),
    /// Longer than 16 KiB.
    #[error("selector is {0} bytes long, 16384 are allowed")]
    TooLong(usize),
    /// A LabelSelector with an operator outside In, NotIn, Exists, DoesNotExist, or wrong values.
    #[error("{0}")]
    Expression(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Condition {
    In(BTreeSet<String>),
    NotIn(BTreeSet<String>),
    Exists,
    DoesNotExist,
    GreaterThan(i64),
    LessThan(i64),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    key: String,
    condition: Condition,
}

impl Requirement {
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        let number = || value.and_then(|v| v.parse::<i64>().ok());
        match &self.condition {
            Condition::In(values) => value.is_some_and(|v| values.contains(v)),
            Condition::NotIn(values) => value.is_none_or(|v| !values.contains(v)),
            Condition::Exists => value.is_some(),
            Condition::DoesNotExist => value.is_none(),
            Condition::GreaterThan(n) => number().is_some_and(|v| v > *n),
            Condition::LessThan(n) => number().is_some_and(|v| v < *n),
        }
    }
}

/// A label selector: all its requirements must hold. The default selects everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selector(Vec<Requirement>);

impl Selector {
    /// Parses kubectl's `-l` text; the empty text selects everything.
    ///
    /// # Errors
    /// When the text does not follow the grammar or a key or value is no label.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        if text.len() > SELECTOR_BYTES_MAX {
            return Err(SelectorError::TooLong(text.len()));
        }
        let mut parser = Parser {
            rest: text.trim_start(),
        };
        let mut requirements = Vec::new();
        while !parser.rest.is_empty() {
            requirements.push(parser.requirement()?);
            if parser.take(",") {
                if parser.rest.is_empty() {
                    return Err(parser.error("a label key after ','"));
                }
            } else if !parser.rest.is_empty() {
                return Err(parser.error("',' or the end"));
            }
        }
        Ok(Self(requirements))
    }

    /// The selector of a Deployment, ReplicaSet and the like. As in Kubernetes an absent selector
    /// selects nothing (`None` here) and an empty one everything.
    ///
    /// # Errors
    /// When an expression has an unknown operator or values that do not fit it.
    pub fn from_api(selector: &LabelSelector) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for (key, value) in selector.match_labels.iter().flatten() {
            let condition = Condition::In(BTreeSet::from([value.clone()]));
            requirements.push(Requirement {
                key: key.clone(),
                condition,
            });
        }
        for expression in selector.match_expressions.iter().flatten() {
            let values: BTreeSet<String> = expression.values.iter().flatten().cloned().collect();
            let condition = match expression.operator.as_str() {
                "In" | "NotIn" if values.is_empty() => {
                    let text = "for 'in', 'notin' operators, values set can't be empty";
                    return Err(SelectorError::Expression(text.to_owned()));
                }
                "In" => Condition::In(values),
                "NotIn" => Condition::NotIn(values),
                "Exists" | "DoesNotExist" if !values.is_empty() => {
                    let text = "values set must be empty for exists and does not exist";
                    return Err(SelectorError::Expression(text.to_owned()));
                }
                "Exists" => Condition::Exists,
                "DoesNotExist" => Condition::DoesNotExist,
                other => {
                    let text = format!("{other:?} is not a valid label selector operator");
                    return Err(SelectorError::Expression(text));
                }
            };
            requirements.push(Requirement {
                key: expression.key.clone(),
                condition,
            });
        }
        Ok(Self(requirements))
    }

    /// A selector of equalities, as a Service has it. Unlike there, an empty map selects
    /// everything: the caller decides what an absent selector means.
    #[must_use]
    pub fn from_map(labels: &BTreeMap<String, String>) -> Self {
        let requirement = |(key, value): (&String, &String)| Requirement {
            key: key.clone(),
            condition: Condition::In(BTreeSet::from([value.clone()])),
        };
        Self(labels.iter().map(requirement).collect())
    }

    /// Whether an object with these labels is meant.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|r| r.matches(labels))
    }

    /// Whether a JSON object's `metadata.labels` are meant.
    #[must_use]
    pub fn matches_object(&self, object: &Value) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let labels = object
            .pointer("/metadata/labels")
            .and_then(Value::as_object);
        let labels: BTreeMap<String, String> = labels
            .into_iter()
            .flatten()
            .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
            .collect();
        self.matches(&labels)
    }

    /// A label that everything selected has, if one follows from the selector: for an index.
    #[must_use]
    pub fn certain_label(&self) -> Option<(&str, &str)> {
        self.0.iter().find_map(|r| match &r.condition {
            Condition::In(values) if values.len() == 1 => {
                values.first().map(|value| (r.key.as_str(), value.as_str()))
            }
            _ => None,
        })
    }

    /// Whether it selects everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Requirement { key, condition }) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            let joined =
                |values: &BTreeSet<String>| values.iter().cloned().collect::<Vec<_>>().join(",");
            match condition {
                Condition::In(v) if v.len() == 1 => write!(f, "{key}={}", joined(v))?,
                Condition::NotIn(v) if v.len() == 1 => write!(f, "{key}!={}", joined(v))?,
                Condition::In(v) => write!(f, "{key} in ({})", joined(v))?,
                Condition::NotIn(v) => write!(f, "{key} notin ({})", joined(v))?,
                Condition::Exists => f.write_str(key)?,
                Condition::DoesNotExist => write!(f, "!{key}")?,
                Condition::GreaterThan(n) => write!(f, "{key}>{n}")?,
                Condition::LessThan(n) => write!(f, "{key}<{n}")?,
            }
        }
        Ok(())
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn error(&self, expected: &'static str) -> SelectorError {
        let found = self.rest.chars().take(20).collect();
        SelectorError::Syntax { found, expected }
    }

    fn take(&mut self, token: &str) -> bool {
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest.trim_start();
                true
            }
            None => false,
        }
    }

    fn word(&mut self) -> &'a str {
        let special = |c: char| "=!<>(),".contains(c) || c.is_whitespace();
        let end = self.rest.find(special).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        word
    }

    fn key(&mut self) -> Result<String, SelectorError> {
        if self.rest.is_empty() || self.rest.starts_with(['=', '<', '>', '(', ')', ',', '!']) {
            return Err(self.error("a label key"));
        }
        let key = self.word();
        match crate::validation::names::qualified_name(key)
            .into_iter()
            .next()
        {
            None => Ok(key.to_owned()),
            Some(detail) => Err(SelectorError::Label {
                what: "key",
                text: key.into(),
                detail,
            }),
        }
    }

    fn value(&mut self) -> Result<String, SelectorError> {
        let value = self.word();
        match crate::validation::names::label_value(value)
            .into_iter()
            .next()
        {
            None => Ok(value.to_owned()),
            Some(detail) => Err(SelectorError::Label {
                what: "value",
                text: value.into(),
                detail,
            }),
        }
    }

    fn requirement(&mut self) -> Result<Requirement, SelectorError> {
        if self.take("!") {
            let key = self.key()?;
            return Ok(Requirement {
                key,
                condition: Condition::DoesNotExist,
            });
        }
        let key = self.key()?;
        let condition = if self.take("!=") {
            Condition::NotIn(BTreeSet::from([self.value()?]))
        } else if self.take("==") || self.take("=") {
            Condition::In(BTreeSet::from([self.value()?]))
        } else if self.take(">") {
            Condition::GreaterThan(self.number()?)
        } else if self.take("<") {
            Condition::LessThan(self.number()?)
        } else if self.rest.is_empty() || self.rest.starts_with(',') {
            Condition::Exists
        } else {
            match self.word() {
                "in" => Condition::In(self.set()?),
                "notin" => Condition::NotIn(self.set()?),
                found => {
                    return Err(SelectorError::Syntax {
                        found: found.to_owned(),
                        expected: "in, notin, =, ==, !=, <, >",
                    });
                }
            }
        };
        Ok(Requirement { key, condition })
    }

    fn number(&mut self) -> Result<i64, SelectorError> {
        let word = self.word();
        word.parse().map_err(|_| SelectorError::Syntax {
            found: word.into(),
            expected: "an integer",
        })
    }

    fn set(&mut self) -> Result<BTreeSet<String>, SelectorError> {
        if !self.take("(") {
            return Err(self.error("'('"));
        }
        let mut values = BTreeSet::new();
        loop {
            values.insert(self.value()?);
            if self.take(")") {
                return Ok(values);
            }
            if !self.take(",") {
                return Err(self.error("',' or ')'"));
            }
        }
    }
}

/// A field selector of one kind: `metadata.name=web,spec.nodeName!=`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FieldSelector(Vec<FieldRequirement>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct FieldRequirement {
    field: String,
    pointer: String,
    value: String,
    equal: bool,
}

/// The fields that a kind can be selected by, beside `metadata.name` and `metadata.namespace`.
fn selectable(kind: &Kind) -> &'static [&'static str] {
    match kind.kind {
        "Pod" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        "Event" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        "Node" => &["spec.unschedulable"],
        "Namespace" => &["status.phase"],
        "ReplicaSet" => &["status.replicas"],
        "Secret" => &["type"],
        "Service" => &["spec.clusterIP", "spec.type"],
        _ => &[],
    }
}

impl FieldSelector {
    /// Parses kubectl's `--field-selector` text for `kind`; empty selects everything.
    ///
    /// # Errors
    /// When the text has another form than `field=value`, or the kind lacks the field.
    pub fn parse(kind: &Kind, text: &str) -> Result<Self, SelectorError> {
        if text.len() > SELECTOR_BYTES_MAX {
            return Err(SelectorError::TooLong(text.len()));
        }
        let mut requirements = Vec::new();
        for part in text.split(',').filter(|p| !p.is_empty()) {
            let (field, value, equal) = if let Some((field, value)) = part.split_once("!=") {
                (field, value, false)
            } else if let Some((field, value)) = part.split_once("==") {
                (field, value, true)
            } else if let Some((field, value)) = part.split_once('=') {
                (field, value, true)
            } else {
                let found = part.chars().take(40).collect();
                return Err(SelectorError::Syntax {
                    found,
                    expected: "field=value",
                });
            };
            let known = field == "metadata.name"
                || (field == "metadata.namespace" && kind.namespaced)
                || selectable(kind).contains(&field);
            if !known {
                return Err(SelectorError::Field(field.to_owned()));
            }
            let path = if field == "source" {
                "source.component"
            } else {
                field
            };
            requirements.push(FieldRequirement {
                field: field.to_owned(),
                pointer: format!("/{}", path.replace('.', "/")),
                value: value.to_owned(),
                equal,
            });
        }
        Ok(Self(requirements))
    }

    /// Whether this JSON object is meant. An absent field counts as empty, `false` or 0.
    #[must_use]
    pub fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|r| {
            let equal = match object.pointer(&r.pointer) {
                None | Some(Value::Null) => {
                    r.value.is_empty() || matches!(r.value.as_str(), "false" | "0")
                }
                Some(Value::String(s)) => *s == r.value,
                Some(Value::Bool(b)) => r.value.parse() == Ok(*b),
                Some(Value::Number(n)) => r.value.parse().is_ok_and(|value| *n == value),
                Some(Value::Array(_) | Value::Object(_)) => false,
            };
            equal == r.equal
        })
    }

    /// The value that `field` must equal, if the selector says so: lets a caller read one key
    /// instead of a whole prefix.
    #[must_use]
    pub fn required(&self, field: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|r| r.equal && r.field == field)
            .map(|r| r.value.as_str())
    }

    /// Whether it selects everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn every_operator_selects_as_kubectl_does() {
        let web = labels(&[("app", "web"), ("tier", "a"), ("n", "5")]);
        for (text, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier!=b", true),
            ("app = web , tier in ( a , b )", true),
            ("tier notin (a)", false),
            ("missing notin (a)", true),
            ("missing!=x", true),
            ("app", true),
            ("!app", false),
            ("! missing", true),
            ("n>4,n<6", true),
            ("app>4", false),
            ("app=", false),
            ("tier in (a,)", true),
        ] {
            assert_eq!(
                Selector::parse(text).unwrap().matches(&web),
                expected,
                "{text}"
            );
        }
    }

    #[test]
    fn broken_selectors_are_errors() {
        for text in [
            "=a", "app=web,", "a in b", "a in (b", "a b", ",", "a=b=c", "-x=1", "n>x", "!",
        ] {
            assert!(Selector::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn fields_select_and_unknown_fields_are_errors() {
        let pods = crate::kinds::resolve("po").unwrap();
        let pod = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n1"}, "status": {}});
        let selects = |text: &str| FieldSelector::parse(pods, text).unwrap().matches(&pod);
        assert!(selects("metadata.name=a,spec.nodeName==n1"));
        assert!(selects("status.phase!=Running"));
        assert!(selects("status.phase="));
        assert!(!selects("spec.nodeName!=n1"));
        assert_eq!(
            FieldSelector::parse(pods, "spec.foo=1")
                .unwrap_err()
                .to_string(),
            "field label not supported: spec.foo"
        );
        assert!(FieldSelector::parse(pods, "metadata.name").is_err());
    }

    proptest! {
        #[test]
        fn printing_and_parsing_agree(
            keys in prop::collection::vec("[a-z]{1,4}", 1..5),
            values in prop::collection::vec("[a-z]{1,3}", 1..4),
            operators in prop::collection::vec(0..6u8, 5),
            sample in prop::collection::btree_map("[a-z]{1,4}", "[a-z]{1,3}", 0..4),
        ) {
            let list = values.join(",");
            let parts: Vec<String> = keys.iter().zip(operators).map(|(k, o)| match o {
                0 => format!("{k}={}", values[0]),
                1 => format!("{k}!={}", values[0]),
                2 => format!("{k} in ({list})"),
                3 => format!("{k} notin ({list})"),
                4 => k.clone(),
                _ => format!("!{k}"),
            }).collect();
            let selector = Selector::parse(&parts.join(",")).unwrap();
            let again = Selector::parse(&selector.to_string()).unwrap();
            prop_assert_eq!(again.matches(&sample), selector.matches(&sample));
            prop_assert_eq!(again, selector);
        }

        #[test]
        fn nothing_panics(text in "\\PC{0,60}") {
            let _ = Selector::parse(&text);
            let _ = FieldSelector::parse(crate::kinds::resolve("po").unwrap(), &text);
        }
    }
}
