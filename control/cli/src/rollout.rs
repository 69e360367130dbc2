//! `gantry rollout`: follow and restart a Deployment's, DaemonSet's or StatefulSet's rollout; pause,
//! resume and list a Deployment's.

use crate::Global;
use crate::connection::{Session, key};
use crate::failure::Failure;
use crate::names;
use crate::output;
use clap::{ArgAction, Args, Subcommand};
use gantry_api::kinds::{Kind, resolve};
use gantry_api::proto::ListRequest;
use gantry_api::proto::patch_request::Type;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(200);
const REVISION: &str = "deployment.kubernetes.io/revision";
/// So long nodes may take to learn of a Service's first backend: the control plane waits a second for all of
/// them, and begins to when it has heard of the backend.
const PROGRAMMED_WAIT: Duration = Duration::from_secs(3);

#[derive(Subcommand, Debug)]
pub(crate) enum Rollout {
    /// Say how far the rollout is, until it is done
    Status(Status),
    /// Start new pods in place of all old ones, by the rollout strategy
    Restart(Names),
    /// List the revisions
    History(Names),
    /// Stop rolling out changes
    Pause(Names),
    /// Go on rolling out changes
    Resume(Names),
}

#[derive(Args, Debug)]
pub(crate) struct Names {
    /// A Deployment, DaemonSet or StatefulSet: deploy/web
    #[arg(required = true)]
    words: Vec<String>,
}

#[derive(Args, Debug)]
pub(crate) struct Status {
    #[command(flatten)]
    names: Names,
    /// Wait until it is done
    #[arg(short, long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_missing_value = "true")]
    watch: bool,
    /// Give up after this long (0: never)
    #[arg(long, default_value = "0", value_parser = names::duration)]
    timeout: Duration,
}

impl Names {
    fn deployment(&self) -> Result<(&'static Kind, String), Failure> {
        let (kind, name) = names::one(&self.words, None)?;
        if kind.kind == "Deployment" {
            return Ok((kind, name));
        }
        Err(Failure::local(format!(
            "{} has no rollout: name a Deployment",
            kind.qualified_resource()
        )))
    }
}

impl Names {
    /// What rolls out by itself.
    fn workload(&self) -> Result<(&'static Kind, String), Failure> {
        let (kind, name) = names::one(&self.words, None)?;
        if matches!(kind.kind, "Deployment" | "DaemonSet" | "StatefulSet") {
            return Ok((kind, name));
        }
        Err(Failure::local(format!(
            "{} has no rollout: name a Deployment, a DaemonSet or a StatefulSet",
            kind.qualified_resource()
        )))
    }
}

impl Rollout {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        match self {
            Self::Status(status) => status.run(global).await,
            Self::Restart(names) => {
                let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
                let annotations = json!({"kubectl.kubernetes.io/restartedAt": now});
                let template = json!({"metadata": {"annotations": annotations}});
                let patch = json!({"spec": {"template": template}});
                change(names.workload()?, global, &patch, "restarted").await
            }
            Self::Pause(names) => {
                let patch = json!({"spec": {"paused": true}});
                change(names.deployment()?, global, &patch, "paused").await
            }
            Self::Resume(names) => {
                let patch = json!({"spec": {"paused": null}});
                change(names.deployment()?, global, &patch, "resumed").await
            }
            Self::History(names) => history(names, global).await,
        }
    }
}

async fn change(
    (kind, name): (&'static Kind, String),
    global: &Global,
    patch: &Value,
    done: &str,
) -> Result<(), Failure> {
    let session = Session::open(global).await?;
    session
        .patch(session.key(kind, &name), Type::Strategic, patch)
        .await?;
    output::print(&format!("{} {done}\n", output::object_name(kind, &name)))
}

async fn history(names: &Names, global: &Global) -> Result<(), Failure> {
    let (kind, name) = names.deployment()?;
    let session = Session::open(global).await?;
    let deployment = session.get(session.key(kind, &name)).await?;
    let uid = deployment
        .pointer("/metadata/uid")
        .cloned()
        .unwrap_or_default();
    let sets =
        resolve("rs").ok_or_else(|| Failure::local("this build does not know ReplicaSets"))?;
    let request = ListRequest {
        key: Some(key(sets, &session.namespace, "")),
        ..ListRequest::default()
    };
    let (sets, _) = session.list(request).await?;
    let annotation = |set: &Value, name: &str| {
        let value = set
            .pointer("/metadata/annotations")
            .and_then(|a| a.get(name));
        value.and_then(Value::as_str).map(str::to_owned)
    };
    let owned = |set: &&Value| {
        let owners = set
            .pointer("/metadata/ownerReferences")
            .and_then(Value::as_array);
        owners.is_some_and(|owners| owners.iter().any(|o| o.get("uid") == Some(&uid)))
    };
    let mut revisions: Vec<(u64, String)> = sets
        .iter()
        .filter(owned)
        .filter_map(|set| {
            let cause = annotation(set, "kubernetes.io/change-cause");
            let revision = annotation(set, REVISION)?.parse().ok()?;
            Some((revision, cause.unwrap_or_else(|| "<none>".to_owned())))
        })
        .collect();
    revisions.sort();
    let mut rows = vec![vec!["REVISION".to_owned(), "CHANGE-CAUSE".to_owned()]];
    rows.extend(
        revisions
            .into_iter()
            .map(|(revision, cause)| vec![revision.to_string(), cause]),
    );
    output::print(&format!("{} \n", output::object_name(kind, &name)))?;
    output::print(&output::table_text(&rows, &[]))
}

/// How far a rollout is, in kubectl's sentences.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Going(String),
    Done(String),
    Failed(String),
}

/// Source: kubectl's `pkg/polymorphichelpers/rollout_status.go`.
fn progress(deployment: &Value) -> Progress {
    let name = deployment
        .pointer("/metadata/name")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let number = |pointer: &str| {
        deployment
            .pointer(pointer)
            .and_then(Value::as_i64)
            .unwrap_or(0)
    };
    if number("/metadata/generation") > number("/status/observedGeneration") {
        return Progress::Going("Waiting for deployment spec update to be observed...".to_owned());
    }
    let conditions = deployment
        .pointer("/status/conditions")
        .and_then(Value::as_array);
    let deadline_exceeded = conditions.into_iter().flatten().any(|condition| {
        condition.get("type") == Some(&"Progressing".into())
            && condition.get("reason") == Some(&"ProgressDeadlineExceeded".into())
    });
    if deadline_exceeded {
        return Progress::Failed(format!(
            "deployment {name:?} exceeded its progress deadline"
        ));
    }
    let wanted = deployment
        .pointer("/spec/replicas")
        .and_then(Value::as_i64)
        .unwrap_or(1);
    let updated = number("/status/updatedReplicas");
    let old = number("/status/replicas") - updated;
    let available = number("/status/availableReplicas");
    let waiting = format!("Waiting for deployment {name:?} rollout to finish:");
    if updated < wanted {
        let text = format!("{waiting} {updated} out of {wanted} new replicas have been updated...");
        return Progress::Going(text);
    }
    if old > 0 {
        return Progress::Going(format!(
            "{waiting} {old} old replicas are pending termination..."
        ));
    }
    if available < updated {
        let text = format!("{waiting} {available} of {updated} updated replicas are available...");
        return Progress::Going(text);
    }
    Progress::Done(format!("deployment {name:?} successfully rolled out"))
}

fn counted(object: &Value) -> impl Fn(&str) -> i64 + '_ {
    |pointer| object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
}

/// A DaemonSet's rollout.
fn daemon_set_progress(set: &Value) -> Progress {
    let name = set.pointer("/metadata/name").and_then(Value::as_str);
    let (name, number) = (name.unwrap_or_default(), counted(set));
    let strategy = set
        .pointer("/spec/updateStrategy/type")
        .and_then(Value::as_str);
    if strategy == Some("OnDelete") {
        let text = "rollout status is only available for RollingUpdate strategy type";
        return Progress::Failed(text.to_owned());
    }
    if number("/metadata/generation") > number("/status/observedGeneration") {
        return Progress::Going("Waiting for daemon set spec update to be observed...".to_owned());
    }
    let waiting = format!("Waiting for daemon set {name:?} rollout to finish:");
    let desired = number("/status/desiredNumberScheduled");
    let updated = number("/status/updatedNumberScheduled");
    let available = number("/status/numberAvailable");
    if updated < desired {
        return Progress::Going(format!(
            "{waiting} {updated} out of {desired} new pods have been updated..."
        ));
    }
    if available < desired {
        return Progress::Going(format!(
            "{waiting} {available} of {desired} updated pods are available..."
        ));
    }
    Progress::Done(format!("daemon set {name:?} successfully rolled out"))
}

/// A StatefulSet's rollout; below a partition old pods stay.
fn stateful_set_progress(set: &Value) -> Progress {
    let number = counted(set);
    let strategy = set
        .pointer("/spec/updateStrategy/type")
        .and_then(Value::as_str);
    if strategy == Some("OnDelete") {
        let text = "rollout status is only available for RollingUpdate strategy type";
        return Progress::Failed(text.to_owned());
    }
    let observed = number("/status/observedGeneration");
    if observed == 0 || number("/metadata/generation") > observed {
        return Progress::Going("Waiting for statefulset spec update to be observed...".to_owned());
    }
    let replicas = number("/spec/replicas");
    let ready = number("/status/readyReplicas");
    if ready < replicas {
        return Progress::Going(format!(
            "Waiting for {} pods to be ready...",
            replicas - ready
        ));
    }
    let updated = number("/status/updatedReplicas");
    let partition = number("/spec/updateStrategy/rollingUpdate/partition");
    if partition > 0 {
        let wanted = (replicas - partition).max(0);
        if updated < wanted {
            return Progress::Going(format!(
                "Waiting for partitioned roll out to finish: {updated} out of {wanted} new pods \
                 have been updated..."
            ));
        }
        return Progress::Done(format!(
            "partitioned roll out complete: {updated} new pods have been updated..."
        ));
    }
    let revision = |field: &str| {
        set.pointer(field)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let new = revision("/status/updateRevision");
    if new != revision("/status/currentRevision") {
        return Progress::Going(format!(
            "waiting for statefulset rolling update to complete {updated} pods at revision {new}..."
        ));
    }
    let current = number("/status/currentReplicas");
    Progress::Done(format!(
        "statefulset rolling update complete {current} pods at revision {new}..."
    ))
}

/// The Services in front of these pods of which not every node knows yet that somebody serves them.
fn unprogrammed(services: &[Value], workload: &Value) -> Vec<String> {
    let available = ["availableReplicas", "numberAvailable", "readyReplicas"];
    let has_any = available.iter().any(|field| {
        let count = workload.pointer(&format!("/status/{field}"));
        count.and_then(Value::as_i64).unwrap_or(0) > 0
    });
    let labels = workload.pointer("/spec/template/metadata/labels");
    let selects = |service: &Value| {
        let selector = service.pointer("/spec/selector").and_then(Value::as_object);
        selector.is_some_and(|selector| {
            let meets = |(key, value): (&String, &Value)| {
                labels.and_then(|labels| labels.get(key)) == Some(value)
            };
            !selector.is_empty() && selector.iter().all(meets)
        })
    };
    let is_programmed = |service: &Value| {
        let conditions = service.pointer("/status/conditions");
        let conditions = conditions.and_then(Value::as_array).into_iter().flatten();
        conditions.into_iter().any(|condition| {
            condition.get("type") == Some(&"Programmed".into())
                && condition.get("status") == Some(&"True".into())
        })
    };
    let name = |service: &Value| {
        let name = service.pointer("/metadata/name").and_then(Value::as_str);
        name.unwrap_or_default().to_owned()
    };
    let mut waiting: Vec<String> = services
        .iter()
        .filter(|service| has_any && selects(service) && !is_programmed(service))
        .map(name)
        .collect();
    waiting.sort();
    waiting
}

/// Waits for the nodes to learn of the first backends of Services; not for ever, since a rollout is done when
/// its pods are.
async fn until_programmed(session: &Session, workload: &Value) -> Result<(), Failure> {
    let services = resolve("svc").ok_or_else(|| Failure::local("this build knows no Services"))?;
    let until = Instant::now() + PROGRAMMED_WAIT;
    let mut said = false;
    loop {
        let request = ListRequest {
            key: Some(key(services, &session.namespace, "")),
            ..ListRequest::default()
        };
        let (all, _) = session.list(request).await?;
        let waiting = unprogrammed(&all, workload);
        if waiting.is_empty() {
            return Ok(());
        }
        let names = waiting.join(", ");
        if Instant::now() >= until {
            return output::print(&format!("Not every node is known to serve {names} yet\n"));
        }
        if !said {
            said = true;
            output::print(&format!("Waiting for every node to serve {names}...\n"))?;
        }
        tokio::time::sleep(POLL).await;
    }
}

impl Status {
    async fn run(&self, global: &Global) -> Result<(), Failure> {
        let (kind, name) = self.names.workload()?;
        let session = Session::open(global).await?;
        let judge = match kind.kind {
            "DaemonSet" => daemon_set_progress,
            "StatefulSet" => stateful_set_progress,
            _ => progress,
        };
        let deadline = (!self.timeout.is_zero()).then(|| Instant::now() + self.timeout);
        let mut said = String::new();
        loop {
            let deployment = session.get(session.key(kind, &name)).await?;
            match judge(&deployment) {
                Progress::Done(text) => {
                    if self.watch {
                        until_programmed(&session, &deployment).await?;
                    }
                    return output::print(&format!("{text}\n"));
                }
                Progress::Failed(text) => return Err(Failure::Local(text)),
                Progress::Going(text) if text != said => {
                    output::print(&format!("{text}\n"))?;
                    said = text;
                }
                Progress::Going(_) => {}
            }
            if !self.watch {
                return Ok(());
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(Failure::local("timed out waiting for the condition"));
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_done_when_every_pod_is_new_and_serves() {
        let mut set = json!({"metadata": {"name": "d", "generation": 1}, "status": {
            "observedGeneration": 1, "desiredNumberScheduled": 2, "updatedNumberScheduled": 1}});
        let text = "Waiting for daemon set \"d\" rollout to finish: 1 out of 2 new pods have been \
                    updated...";
        assert_eq!(daemon_set_progress(&set), Progress::Going(text.to_owned()));
        set["status"]["updatedNumberScheduled"] = json!(2);
        set["status"]["numberAvailable"] = json!(2);
        assert!(matches!(daemon_set_progress(&set), Progress::Done(_)));
        let mut set = json!({"metadata": {"name": "s", "generation": 1}, "spec": {"replicas": 2},
            "status": {"observedGeneration": 1, "readyReplicas": 2, "updatedReplicas": 1,
                "currentRevision": "s-a", "updateRevision": "s-b"}});
        assert!(matches!(stateful_set_progress(&set), Progress::Going(_)));
        set["status"]["currentRevision"] = json!("s-b");
        assert!(matches!(stateful_set_progress(&set), Progress::Done(_)));
    }

    #[test]
    fn services_of_a_workload_are_waited_for_until_every_node_serves_them() {
        let workload = json!({"spec": {"template": {"metadata": {"labels": {"app": "web", "v": "2"}}}},
            "status": {"availableReplicas": 1}});
        let service = |name: &str, selector: Value, conditions: Value| {
            json!({"metadata": {"name": name}, "spec": {"selector": selector},
                "status": {"conditions": conditions}})
        };
        let condition = |status: &str| json!([{"type": "Programmed", "status": status}]);
        let services = [
            service("web", json!({"app": "web"}), condition("False")),
            service("new", json!({"app": "web", "v": "2"}), Value::Null),
            service("done", json!({"app": "web"}), condition("True")),
            service("other", json!({"app": "db"}), condition("False")),
            service("older", json!({"app": "web", "v": "1"}), Value::Null),
            service("by-hand", json!({}), Value::Null),
            service("by-hand", Value::Null, Value::Null),
        ];
        assert_eq!(unprogrammed(&services, &workload), ["new", "web"]);
        let mut none = workload.clone();
        none["status"] = json!({"availableReplicas": 0});
        assert!(unprogrammed(&services, &none).is_empty(), "nobody serves");
    }

    #[test]
    fn progress_is_told_in_kubectls_sentences() {
        let deployment = |generation: i64, status: Value| {
            json!({"metadata": {"name": "web", "generation": generation},
                "spec": {"replicas": 3}, "status": status})
        };
        let going = |text: &str| Progress::Going(text.to_owned());
        assert_eq!(
            progress(&deployment(2, json!({"observedGeneration": 1}))),
            going("Waiting for deployment spec update to be observed...")
        );
        assert_eq!(
            progress(&deployment(
                1,
                json!({"observedGeneration": 1, "updatedReplicas": 1})
            )),
            going(
                "Waiting for deployment \"web\" rollout to finish: 1 out of 3 new replicas have \
                   been updated..."
            )
        );
        assert_eq!(
            progress(&deployment(
                1,
                json!({"observedGeneration": 1, "updatedReplicas": 3,
                "replicas": 4})
            )),
            going(
                "Waiting for deployment \"web\" rollout to finish: 1 old replicas are pending \
                   termination..."
            )
        );
        assert_eq!(
            progress(&deployment(
                1,
                json!({"observedGeneration": 1, "updatedReplicas": 3,
                "replicas": 3, "availableReplicas": 2})
            )),
            going(
                "Waiting for deployment \"web\" rollout to finish: 2 of 3 updated replicas are \
                   available..."
            )
        );
        assert_eq!(
            progress(&deployment(
                1,
                json!({"observedGeneration": 1, "updatedReplicas": 3,
                "replicas": 3, "availableReplicas": 3})
            )),
            Progress::Done("deployment \"web\" successfully rolled out".to_owned())
        );
        let condition = json!({"type": "Progressing", "reason": "ProgressDeadlineExceeded"});
        assert!(matches!(
            progress(&deployment(
                1,
                json!({"observedGeneration": 1, "conditions": [condition]})
            )),
            Progress::Failed(_)
        ));
    }
}
