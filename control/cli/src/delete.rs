//! `gantry delete`: by file, by name, by selector; waits until the objects are gone.

use crate::Global;
use crate::connection::{Session, key};
use crate::events;
use crate::failure::Failure;
use crate::files::Files;
use crate::names::{self, targets};
use crate::output::{self, Format};
use clap::{ArgAction, Args};
use gantry_api::kinds::Kind;
use gantry_api::proto::{DeleteRequest, ListRequest};
use gantry_api::status::Reason;
use serde_json::Value;
use std::time::{Duration, Instant};

/// How often `--wait` looks.
const POLL: Duration = Duration::from_millis(150);
/// What kubectl gives a deletion with `--force` or `--now`.
const NOW_GRACE_PERIOD_S: i64 = 1;

#[derive(Args, Debug)]
pub(crate) struct Delete {
    /// Types and names: pod web, pod/web, po,svc
    words: Vec<String>,
    #[command(flatten)]
    files: Files,
    /// Label selector
    #[arg(short = 'l', long, default_value = "", hide_default_value = true)]
    selector: String,
    /// Field selector
    #[arg(long, default_value = "", hide_default_value = true)]
    field_selector: String,
    /// Everything of the types in the namespace
    #[arg(long)]
    all: bool,
    /// All namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Seconds between SIGTERM and SIGKILL; -1: the pod's own; 0 only with --force
    #[arg(long, default_value_t = -1, allow_negative_numbers = true)]
    grace_period: i64,
    /// Remove the objects at once, without waiting for the node
    #[arg(long)]
    force: bool,
    /// The same as --grace-period=1
    #[arg(long)]
    now: bool,
    /// Wait until the objects are gone
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_missing_value = "true")]
    wait: bool,
    /// Give up waiting after this long (0: never)
    #[arg(long, default_value = "0", value_parser = names::duration)]
    timeout: Duration,
    /// A missing object is no failure
    #[arg(long)]
    ignore_not_found: bool,
    /// background, foreground or orphan: what happens to dependents
    #[arg(long, default_value = "background", value_parser = ["background", "foreground", "orphan"])]
    cascade: String,
    /// Say what would be deleted: none, client or server
    #[arg(long, default_value = "none", value_parser = ["none", "client", "server"])]
    dry_run: String,
    /// name: print type/name only
    #[arg(short, long, default_value = "", hide_default_value = true, value_parser = output::format)]
    output: Format,
}

/// One object to delete.
struct Doomed {
    kind: &'static Kind,
    namespace: String,
    name: String,
}

impl Delete {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let grace_period_s = self.grace_period_s()?;
        let selecting = self.all || !self.selector.is_empty() || !self.field_selector.is_empty();
        if self.files.is_empty() && self.words.is_empty() {
            return Err(Failure::local(
                "you must provide one or more resources by argument or filename",
            ));
        }
        if self.all && !self.selector.is_empty() {
            return Err(Failure::local(
                "setting 'all' parameter but found a non empty selector",
            ));
        }
        let manifests = if self.files.is_empty() {
            Vec::new()
        } else {
            self.files.read()?
        };
        let targets = if self.words.is_empty() {
            Vec::new()
        } else {
            targets(&self.words)?
        };
        if targets.iter().any(|t| t.names.is_empty()) && !selecting {
            let text = "resource(s) were provided, but no name was specified";
            return Err(Failure::local(text));
        }
        let session = Session::open(global).await?;
        if self.force {
            eprintln!(
                "Warning: Immediate deletion does not wait for confirmation that the running \
                 resource has been terminated. The resource may continue to run on the cluster \
                 indefinitely."
            );
        }
        let mut doomed = Vec::new();
        for manifest in &manifests {
            let namespace = manifest.namespace(&session.namespace, session.namespace_given)?;
            doomed.push(Doomed {
                kind: manifest.kind,
                namespace,
                name: manifest.name().to_owned(),
            });
        }
        for target in &targets {
            if target.names.is_empty() {
                doomed.extend(self.selected(&session, target.kind).await?);
            }
            let named = |name: &String| Doomed {
                kind: target.kind,
                namespace: session.namespace.clone(),
                name: name.clone(),
            };
            doomed.extend(target.names.iter().map(named));
        }
        if doomed.is_empty() {
            output::print("No resources found\n")?;
            return Ok(());
        }
        self.delete(&session, &doomed, grace_period_s).await
    }

    fn grace_period_s(&self) -> Result<Option<i64>, Failure> {
        if self.now && self.grace_period != -1 {
            return Err(Failure::local(
                "--now and --grace-period cannot be specified together",
            ));
        }
        match self.grace_period {
            0 if !self.force => Ok(Some(NOW_GRACE_PERIOD_S)), // as kubectl: 0 needs --force
            seconds if seconds >= 0 => {
                if self.force && seconds > 0 {
                    let text = "--force and --grace-period greater than 0 cannot be specified \
                                together";
                    return Err(Failure::local(text));
                }
                Ok(Some(seconds))
            }
            _ if self.force => Ok(Some(0)),
            _ if self.now => Ok(Some(NOW_GRACE_PERIOD_S)),
            _ => Ok(None),
        }
    }

    async fn selected(
        &self,
        session: &Session,
        kind: &'static Kind,
    ) -> Result<Vec<Doomed>, Failure> {
        let namespace = if self.all_namespaces {
            ""
        } else {
            session.namespace.as_str()
        };
        let request = ListRequest {
            key: Some(key(kind, namespace, "")),
            label_selector: self.selector.clone(),
            field_selector: self.field_selector.clone(),
            ..ListRequest::default()
        };
        let (objects, _) = session.list(request).await?;
        let field = |object: &Value, field: &str| {
            let value = object
                .pointer(&format!("/metadata/{field}"))
                .and_then(Value::as_str);
            value.unwrap_or_default().to_owned()
        };
        let doomed = |object: &Value| Doomed {
            kind,
            namespace: field(object, "namespace"),
            name: field(object, "name"),
        };
        Ok(objects.iter().map(doomed).collect())
    }

    async fn delete(
        &self,
        session: &Session,
        doomed: &[Doomed],
        grace_period_s: Option<i64>,
    ) -> Result<(), Failure> {
        let mut failed = false;
        let mut present = Vec::new();
        // All are read before the first goes: what a deletion takes along (a namespace's content)
        // was there, so its end is a success.
        for one in doomed {
            match session.get(key(one.kind, &one.namespace, &one.name)).await {
                Ok(object) => {
                    let uid = object.pointer("/metadata/uid").and_then(Value::as_str);
                    present.push((one, uid.unwrap_or_default().to_owned()));
                }
                Err(failure) => failed |= self.note(failure)?,
            }
        }
        let mut going = Vec::new();
        for (one, uid) in present {
            match self.delete_one(session, one, grace_period_s).await {
                Ok(()) => going.push((one, uid)),
                Err(failure) if failure.reason() == Some(Reason::NotFound) => self.say(one)?,
                Err(failure) => failed |= self.note(failure)?,
            }
        }
        if self.wait && self.dry_run == "none" {
            let deadline = (!self.timeout.is_zero()).then(|| Instant::now() + self.timeout);
            for (one, uid) in going {
                wait_gone(
                    session,
                    one.kind,
                    &one.namespace,
                    &one.name,
                    Some(&uid),
                    deadline,
                )
                .await?;
            }
        }
        if failed {
            Err(Failure::Reported)
        } else {
            Ok(())
        }
    }

    /// Reports a refusal for one of several objects; true when it counts.
    fn note(&self, failure: Failure) -> Result<bool, Failure> {
        match failure.reason() {
            Some(Reason::NotFound) if self.ignore_not_found => Ok(false),
            Some(_) => {
                eprintln!("{failure}");
                Ok(true)
            }
            None => Err(failure),
        }
    }

    async fn delete_one(
        &self,
        session: &Session,
        one: &Doomed,
        grace_period_s: Option<i64>,
    ) -> Result<(), Failure> {
        let propagation = match self.cascade.as_str() {
            "foreground" => "Foreground",
            "orphan" => "Orphan",
            _ => "Background",
        };
        if self.dry_run != "client" {
            let request = DeleteRequest {
                key: Some(key(one.kind, &one.namespace, &one.name)),
                grace_period_s,
                propagation: propagation.to_owned(),
                uid: String::new(),
                dry_run: self.dry_run == "server",
            };
            crate::connection::warn(&session.delete(request).await?);
        }
        self.say(one)
    }

    fn say(&self, one: &Doomed) -> Result<(), Failure> {
        let suffix = match self.dry_run.as_str() {
            "client" => " (dry run)",
            "server" => " (server dry run)",
            _ => "",
        };
        let deleted = if self.force {
            "force deleted"
        } else {
            "deleted"
        };
        if self.output == Format::Name {
            return output::print(&format!("{}\n", output::object_name(one.kind, &one.name)));
        }
        let kind = one.kind.qualified_singular();
        output::print(&format!("{kind} {:?} {deleted}{suffix}\n", one.name))
    }
}

/// Waits until an object (of this uid) does not exist any more.
pub(crate) async fn wait_gone(
    session: &Session,
    kind: &Kind,
    namespace: &str,
    name: &str,
    uid: Option<&str>,
    deadline: Option<Instant>,
) -> Result<(), Failure> {
    loop {
        let object = session.find(key(kind, namespace, name)).await?;
        let there = object.filter(|object| {
            let own = object.pointer("/metadata/uid").and_then(Value::as_str);
            uid.is_none() || own == uid
        });
        let Some(object) = there else {
            return Ok(());
        };
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            // Best effort: whoever may delete may not be allowed to read events.
            let events = events::about(session, kind, &object).await;
            let why = why_there(&object, &events.unwrap_or_default());
            let (plural, why) = (kind.plural, why.join("; "));
            return Err(Failure::local(format!(
                "timed out waiting for the condition on {plural}/{name}: {why}"
            )));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// What an object that should have gone waits for, as far as it shows; `events` oldest first.
fn why_there(object: &Value, events: &[Value]) -> Vec<String> {
    let text = |at: &str| object.pointer(at).and_then(Value::as_str);
    let mut why = Vec::new();
    let Some(since) = text("/metadata/deletionTimestamp") else {
        return vec!["it is there, and nobody has deleted it".to_owned()];
    };
    why.push(format!("it is being deleted since {since}"));
    let finalizers = object.pointer("/metadata/finalizers");
    let finalizers = finalizers.and_then(Value::as_array).into_iter().flatten();
    for finalizer in finalizers.filter_map(Value::as_str) {
        why.push(format!("its finalizer {finalizer} has not been removed"));
    }
    if let Some(node) = text("/spec/nodeName") {
        why.push(format!("node {node} has not said that it has ended"));
    }
    let newest = |event: &&Value| event.get("type").and_then(Value::as_str) == Some("Warning");
    if let Some(event) = events.iter().rev().find(newest) {
        let part = |field: &str| event.get(field).and_then(Value::as_str).unwrap_or_default();
        why.push(format!("{}: {}", part("reason"), part("message")));
    }
    why
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_still_there_says_what_it_waits_for() {
        let pod = json!({
            "metadata": {"deletionTimestamp": "2026-01-02T03:04:05Z", "finalizers": ["example.com/keep"]},
            "spec": {"nodeName": "node-2"},
        });
        let events = [
            json!({"type": "Warning", "reason": "Unhealthy", "message": "old"}),
            json!({"type": "Warning", "reason": "FailedKillPod", "message": "process 7 (dd)"}),
            json!({"type": "Normal", "reason": "Killing", "message": "Stopping container main"}),
        ];
        assert_eq!(
            why_there(&pod, &events),
            [
                "it is being deleted since 2026-01-02T03:04:05Z",
                "its finalizer example.com/keep has not been removed",
                "node node-2 has not said that it has ended",
                "FailedKillPod: process 7 (dd)",
            ]
        );
        let alive = why_there(&json!({"metadata": {}}), &events);
        assert_eq!(alive, ["it is there, and nobody has deleted it"]);
    }
}
