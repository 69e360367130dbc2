//! `gantry wait`: until objects have a condition, or are gone.

use crate::Global;
use crate::connection::{Session, key};
use crate::delete::wait_gone;
use crate::failure::Failure;
use crate::names::{self, targets};
use crate::output;
use clap::Args;
use gantry_api::kinds::Kind;
use gantry_api::proto::ListRequest;
use serde_json::Value;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(200);

#[derive(Args, Debug)]
pub(crate) struct Wait {
    /// Types and names: pod/web, pods
    #[arg(required = true, value_name = "TYPE|TYPE/NAME")]
    words: Vec<String>,
    /// delete, condition=Ready, condition=Ready=false or jsonpath={.status.phase}=Running
    #[arg(long = "for", value_parser = goal)]
    goal: Goal,
    /// Give up after this long; 0 looks once
    #[arg(long, default_value = "30s", value_parser = names::duration)]
    timeout: Duration,
    /// Label selector
    #[arg(short = 'l', long, default_value = "", hide_default_value = true)]
    selector: String,
    /// Everything of the types in the namespace
    #[arg(long)]
    all: bool,
}

/// What to wait for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Goal {
    Delete,
    Condition {
        name: String,
        status: String,
    },
    Field {
        pointer: String,
        value: Option<String>,
    },
}

fn goal(text: &str) -> Result<Goal, String> {
    if text.eq_ignore_ascii_case("delete") {
        return Ok(Goal::Delete);
    }
    if let Some(condition) = text.strip_prefix("condition=") {
        let (name, status) = condition.split_once('=').unwrap_or((condition, "true"));
        if !name.is_empty() {
            return Ok(Goal::Condition {
                name: name.to_owned(),
                status: status.to_owned(),
            });
        }
    }
    if let Some(rest) = text.strip_prefix("jsonpath=") {
        // Quotes that a shell left are no part of either side.
        let rest = rest.replace('\'', "");
        let (path, value) = match rest.split_once("}=") {
            Some((path, value)) => (path, Some(value.to_owned())),
            None => (rest.as_str(), None),
        };
        let path = path.trim_matches(['{', '}']);
        let parts = path.split(['.', '[', ']']).filter(|p| !p.is_empty());
        let pointer: String = parts.map(|p| format!("/{p}")).collect();
        if !pointer.is_empty() {
            return Ok(Goal::Field { pointer, value });
        }
    }
    Err(format!("unrecognized condition: {text:?}"))
}

impl Goal {
    fn is_met(&self, object: &Value) -> bool {
        match self {
            Self::Delete => false,
            Self::Condition { name, status } => {
                let conditions = object
                    .pointer("/status/conditions")
                    .and_then(Value::as_array);
                let text = |c: &Value, field: &str| {
                    c.get(field)
                        .and_then(Value::as_str)
                        .unwrap_or_default()
                        .to_owned()
                };
                conditions.into_iter().flatten().any(|c| {
                    text(c, "type").eq_ignore_ascii_case(name)
                        && text(c, "status").eq_ignore_ascii_case(status)
                })
            }
            Self::Field { pointer, value } => match (object.pointer(pointer), value) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(Value::String(own)), Some(value)) => own == value,
                (Some(own), Some(value)) => {
                    serde_json::from_str(value).is_ok_and(|v: Value| v == *own)
                }
            },
        }
    }
}

impl Wait {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let targets = targets(&self.words)?;
        if targets.iter().any(|t| t.names.is_empty()) && self.selector.is_empty() && !self.all {
            let text = "resource(s) were provided, but no name, label selector, or --all flag \
                        specified";
            return Err(Failure::local(text));
        }
        let session = Session::open(global).await?;
        let deadline = Instant::now() + self.timeout;
        let mut wanted: Vec<(&'static Kind, String)> = Vec::new();
        for target in &targets {
            wanted.extend(target.names.iter().map(|name| (target.kind, name.clone())));
            if target.names.is_empty() {
                let request = ListRequest {
                    key: Some(key(target.kind, &session.namespace, "")),
                    label_selector: self.selector.clone(),
                    ..ListRequest::default()
                };
                let (objects, _) = session.list(request).await?;
                let name = |o: &Value| {
                    let name = o.pointer("/metadata/name").and_then(Value::as_str);
                    (target.kind, name.unwrap_or_default().to_owned())
                };
                wanted.extend(objects.iter().map(name));
            }
        }
        if wanted.is_empty() {
            if self.goal == Goal::Delete {
                return Ok(());
            }
            return Err(Failure::local("no matching resources found"));
        }
        for (kind, name) in wanted {
            self.one(&session, kind, &name, deadline).await?;
        }
        Ok(())
    }

    async fn one(
        &self,
        session: &Session,
        kind: &Kind,
        name: &str,
        deadline: Instant,
    ) -> Result<(), Failure> {
        if self.goal == Goal::Delete {
            wait_gone(
                session,
                kind,
                &session.namespace,
                name,
                None,
                Some(deadline),
            )
            .await?;
        } else {
            loop {
                let object = session.get(session.key(kind, name)).await?;
                if self.goal.is_met(&object) {
                    break;
                }
                if Instant::now() >= deadline {
                    return Err(Failure::local(format!(
                        "timed out waiting for the condition on {}/{name}",
                        kind.plural
                    )));
                }
                tokio::time::sleep(POLL).await;
            }
        }
        output::print(&format!(
            "{} condition met\n",
            output::object_name(kind, name)
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn goals_are_read_and_met() {
        let pod = json!({"status": {"phase": "Running", "n": 3,
            "conditions": [{"type": "Ready", "status": "True"}]}});
        for (text, met) in [
            ("condition=Ready", true),
            ("condition=ready=true", true),
            ("condition=Ready=False", false),
            ("condition=Other", false),
            ("jsonpath={.status.phase}=Running", true),
            ("jsonpath='{.status.n}'=3", true),
            ("jsonpath={.status.none}", false),
            ("delete", false),
        ] {
            assert_eq!(goal(text).unwrap().is_met(&pod), met, "{text}");
        }
        for text in ["", "condition=", "ready", "jsonpath="] {
            assert!(goal(text).is_err(), "{text}");
        }
    }
}
