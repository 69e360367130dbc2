//! What of the store a read is about: a kind, a namespace or a name, and selectors. Pure.

use gantry_api::kinds::{self, Kind};
use gantry_api::proto::ObjectKey;
use gantry_api::selector::{FieldSelector, Selector};
use gantry_api::status::{Reason, Status};
use serde_json::Value;

use super::object;
use super::rbac::Attributes;
use crate::store::Entry;

/// The kind that a request names.
pub(super) fn kind_of_key(key: Option<ObjectKey>) -> Result<(&'static Kind, ObjectKey), Status> {
    let key = key.ok_or_else(|| Status::bad_request("the request has no key"))?;
    let kind = kinds::by_plural(&key.group, &key.plural).ok_or_else(|| {
        let group = if key.group.is_empty() { "" } else { "." };
        let text = format!(
            "the server doesn't have a resource type \"{}{group}{}\"",
            key.plural, key.group
        );
        Status::new(Reason::NotFound, text)
    })?;
    Ok((kind, key))
}

/// A kind's objects as far as a request asks for them.
#[derive(Debug)]
pub(super) struct View {
    pub(super) kind: &'static Kind,
    /// Prefix of the store keys; the whole key when a name is given.
    pub(super) prefix: String,
    /// It is about one object by name.
    pub(super) is_one: bool,
    namespace: String,
    /// The one name that there can be.
    name: String,
    labels: Selector,
    fields: FieldSelector,
}

impl View {
    /// Reads a request.
    pub(super) fn new(
        key: Option<ObjectKey>,
        label_selector: &str,
        field_selector: &str,
    ) -> Result<View, Status> {
        let (kind, key) = kind_of_key(key)?;
        let bad = |what: &str, error: &dyn std::fmt::Display| {
            Status::bad_request(format!("unable to parse the {what} selector: {error}"))
        };
        let labels = Selector::parse(label_selector).map_err(|e| bad("label", &e))?;
        let fields = FieldSelector::parse(kind, field_selector).map_err(|e| bad("field", &e))?;
        let is_one = !key.name.is_empty();
        if is_one && kind.namespaced && key.namespace.is_empty() {
            return Err(Status::bad_request(
                "a resource cannot be retrieved by name across all namespaces",
            ));
        }
        let prefix = if is_one {
            kind.store_key(&key.namespace, &key.name)
        } else {
            kind.store_prefix(Some(&key.namespace))
        };
        let selected = fields.required("metadata.name").unwrap_or_default();
        let name = if is_one { &key.name } else { selected };
        Ok(View {
            name: name.to_owned(),
            namespace: key.namespace,
            kind,
            prefix,
            is_one,
            labels,
            fields,
        })
    }

    /// What reading this needs.
    pub(super) fn attributes<'a>(&'a self, verb: &'a str) -> Attributes<'a> {
        Attributes::of(verb, self.kind, &self.namespace, &self.name)
    }

    /// Whether the entry is meant; parses it only where a selector needs that.
    pub(super) fn has(&self, entry: &Entry) -> Result<bool, Status> {
        if self.is_one && *entry.key != *self.prefix {
            return Ok(false);
        }
        if self.labels.is_empty() && self.fields.is_empty() {
            return Ok(true);
        }
        Ok(self.selects(&object::to_value(entry)?))
    }

    fn selects(&self, value: &Value) -> bool {
        self.labels.matches_object(value) && self.fields.matches(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn entry(name: &str, labels: Value) -> Entry {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "a", "labels": labels},
            "spec": {"nodeName": "n"},
        });
        Entry {
            key: format!("/registry/pods/a/{name}").into(),
            value: object::encode(&object).unwrap(),
            create_revision: 1,
            mod_revision: 1,
        }
    }

    fn key(plural: &str, namespace: &str, name: &str) -> Option<ObjectKey> {
        Some(ObjectKey {
            group: String::new(),
            plural: plural.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }

    #[test]
    fn selectors_and_names_choose() {
        let web = entry("web", json!({"app": "web"}));
        let other = entry("web-1", json!({"app": "other"}));
        let has = |name: &str, labels: &str, fields: &str| {
            let view = View::new(key("pods", "a", name), labels, fields).unwrap();
            (view.has(&web).unwrap(), view.has(&other).unwrap())
        };
        assert_eq!(has("", "", ""), (true, true));
        assert_eq!(has("web", "", ""), (true, false));
        assert_eq!(has("", "app!=web", ""), (false, true));
        assert_eq!(
            has("", "", "spec.nodeName=n,metadata.name=web"),
            (true, false)
        );
    }

    #[test]
    fn what_is_not_served_is_named() {
        let text = |result: Result<View, Status>| result.unwrap_err().message;
        let unknown = text(View::new(key("gadgets", "", ""), "", ""));
        assert_eq!(
            unknown,
            "the server doesn't have a resource type \"gadgets\""
        );
        assert!(text(View::new(key("pods", "", "web"), "", "")).contains("by name"));
        assert!(text(View::new(key("pods", "", ""), "a in (", "")).contains("label selector"));
        assert!(text(View::new(key("pods", "", ""), "", "spec.x=1")).contains("spec.x"));
    }
}
