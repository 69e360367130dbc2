//! `gantry drain`: a node gets no new pods, and those that it has end in order.
//!
//! ```text
//!  cordon ─► what is there ─► a pod that must not go without a flag? ─► nothing is touched, exit code 1
//!                        └─► each pod, side by side: evicted ─► gone ─► "evicted"
//!                               ▲      │ its PodDisruptionBudget has no room
//!                               └ 5 s ─┘ until --timeout
//! ```
//! Flags and words are kubectl's. `--disable-eviction` deletes instead: no budget is asked. Pods of DaemonSets, static pods and pods that have ended hold nothing up.

use std::time::{Duration, Instant};

use clap::Args;
use futures_util::{StreamExt as _, stream};
use gantry_api::kinds::{Kind, resolve};
use gantry_api::proto::{DeleteRequest, ListRequest, WriteRequest};
use gantry_api::status::Reason;
use gantry_api::validation::MIRROR_ANNOTATION;
use serde_json::{Value, json};

use crate::Global;
use crate::connection::{Session, key};
use crate::cordon::{Nodes, set_one};
use crate::delete::wait_gone;
use crate::failure::Failure;
use crate::names;
use crate::output;

/// Until an eviction that was refused is asked for again.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// Pods of a node that leave at once: each waits for its own end.
const LEAVING_COUNT_MAX: usize = 128;

#[derive(Args, Debug)]
pub(crate) struct Drain {
    #[command(flatten)]
    nodes: Nodes,
    /// Go on although pods of DaemonSets stay
    #[arg(long)]
    ignore_daemonsets: bool,
    /// Also end pods whose emptyDir volumes go with them
    #[arg(long)]
    delete_emptydir_data: bool,
    /// Also end pods that nothing will start again
    #[arg(long)]
    force: bool,
    /// Delete pods instead of evicting them: no disruption budget is asked
    #[arg(long)]
    disable_eviction: bool,
    /// Seconds between SIGTERM and SIGKILL; -1: the pod's own
    #[arg(long, default_value_t = -1, allow_negative_numbers = true)]
    grace_period: i64,
    /// Give up after this long (0: never)
    #[arg(long, default_value = "0", value_parser = names::duration)]
    timeout: Duration,
    /// Only pods with these labels
    #[arg(long, default_value = "", hide_default_value = true)]
    pod_selector: String,
    /// Say what would end, and end nothing: none, client or server
    #[arg(long, default_value = "none", value_parser = ["none", "client", "server"], num_args = 0..=1,
        require_equals = true, default_missing_value = "client")]
    dry_run: String,
}

/// One pod, as a drain sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    namespace: String,
    name: String,
    uid: String,
}

impl Found {
    fn of(pod: &Value) -> Self {
        let text = |pointer: &str| {
            pod.pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        Self {
            namespace: text("/metadata/namespace").to_owned(),
            name: text("/metadata/name").to_owned(),
            uid: text("/metadata/uid").to_owned(),
        }
    }

    fn path(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// What is to be done with the pods of a node.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    evict: Vec<Found>,
    /// Lines for stderr.
    warnings: Vec<String>,
    /// Why nothing is to be done.
    errors: Vec<String>,
}

/// What the flags allow.
#[derive(Debug, Clone, Copy, Default)]
struct Allowed {
    daemon_sets: bool,
    empty_dir: bool,
    unmanaged: bool,
}

/// Pure: from the node's pods to what happens to each.
fn plan(pods: &[Value], allowed: Allowed) -> Plan {
    let mut plan = Plan::default();
    let (mut daemons, mut local, mut unmanaged) = (Vec::new(), Vec::new(), Vec::new());
    for pod in pods {
        let annotations = pod.pointer("/metadata/annotations");
        if annotations.is_some_and(|all| all.get(MIRROR_ANNOTATION).is_some()) {
            continue;
        }
        let found = Found::of(pod);
        let phase = pod.pointer("/status/phase").and_then(Value::as_str);
        if matches!(phase, Some("Succeeded" | "Failed")) {
            plan.evict.push(found);
            continue;
        }
        let owners = pod
            .pointer("/metadata/ownerReferences")
            .and_then(Value::as_array);
        let mut owners = owners.into_iter().flatten();
        let controller = owners.find(|owner| owner["controller"] == true);
        if controller.is_some_and(|owner| owner["kind"] == "DaemonSet") {
            daemons.push(found.path());
            continue;
        }
        let volumes = pod.pointer("/spec/volumes").and_then(Value::as_array);
        let mut volumes = volumes.into_iter().flatten();
        if volumes.any(|volume| volume["emptyDir"].is_object()) && !allowed.empty_dir {
            local.push(found.path());
        }
        if controller.is_none() {
            unmanaged.push(found.path());
        }
        plan.evict.push(found);
    }
    let mut refuse = |what: &str, flag: &str, pods: &[String]| {
        let pods = pods.join(", ");
        plan.errors
            .push(format!("cannot delete {what} (use {flag}): {pods}"));
    };
    if !daemons.is_empty() && !allowed.daemon_sets {
        refuse(
            "DaemonSet-managed Pods",
            "--ignore-daemonsets to ignore",
            &daemons,
        );
    }
    if !local.is_empty() {
        refuse(
            "Pods with local storage",
            "--delete-emptydir-data to override",
            &local,
        );
    }
    if !unmanaged.is_empty() && !allowed.unmanaged {
        refuse(
            "Pods that declare no controller",
            "--force to override",
            &unmanaged,
        );
    }
    if !daemons.is_empty() && allowed.daemon_sets {
        let pods = daemons.join(", ");
        plan.warnings
            .push(format!("Warning: ignoring DaemonSet-managed Pods: {pods}"));
    }
    if !unmanaged.is_empty() && allowed.unmanaged {
        let pods = unmanaged.join(", ");
        plan.warnings.push(format!(
            "Warning: deleting Pods that declare no controller: {pods}"
        ));
    }
    plan
}

fn pod_kind() -> Result<&'static Kind, Failure> {
    resolve("pods").ok_or_else(|| Failure::local("this version knows no pods"))
}

impl Drain {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let session = Session::open(global).await?;
        let deadline = (!self.timeout.is_zero()).then(|| Instant::now() + self.timeout);
        let names = self.nodes.names(&session).await?;
        let suffix = match self.dry_run.as_str() {
            "client" => " (dry run)",
            "server" => " (server dry run)",
            _ => "",
        };
        // All of them first: what leaves one must not land on the next.
        for name in &names {
            match suffix {
                "" => output::print(&set_one(&session, name, true).await?)?,
                _ => output::print(&format!("node/{name} cordoned{suffix}\n"))?,
            }
        }
        let mut failed = false;
        for name in &names {
            match self.drain(&session, name, deadline, suffix).await {
                Ok(()) => output::print(&format!("node/{name} drained{suffix}\n"))?,
                Err(failure @ Failure::ClosedPipe) => return Err(failure),
                Err(failure) => {
                    eprintln!("error: unable to drain node {name:?} due to error: {failure}");
                    failed = true;
                }
            }
        }
        if failed {
            Err(Failure::Reported)
        } else {
            Ok(())
        }
    }

    async fn drain(
        &self,
        session: &Session,
        node: &str,
        deadline: Option<Instant>,
        suffix: &str,
    ) -> Result<(), Failure> {
        let request = ListRequest {
            key: Some(key(pod_kind()?, "", "")),
            field_selector: format!("spec.nodeName={node}"),
            label_selector: self.pod_selector.clone(),
            ..ListRequest::default()
        };
        let (pods, _) = session.list(request).await?;
        let plan = plan(
            &pods,
            Allowed {
                daemon_sets: self.ignore_daemonsets,
                empty_dir: self.delete_emptydir_data,
                unmanaged: self.force,
            },
        );
        if !plan.errors.is_empty() {
            let errors = plan.errors.join("; ");
            return Err(Failure::local(format!("{errors}; no pod was touched")));
        }
        for warning in &plan.warnings {
            eprintln!("{warning}");
        }
        if !suffix.is_empty() {
            for pod in &plan.evict {
                output::print(&format!("evicting pod {}{suffix}\n", pod.path()))?;
            }
            return Ok(());
        }
        // Side by side: one that a budget holds back keeps nobody else.
        let leave = |pod| self.leave(session, pod, deadline);
        let mut leaving =
            stream::iter(plan.evict.iter().map(leave)).buffer_unordered(LEAVING_COUNT_MAX);
        let mut failures = Vec::new();
        while let Some(left) = leaving.next().await {
            match left {
                Ok(()) => {}
                Err(failure @ Failure::ClosedPipe) => return Err(failure),
                Err(failure) => failures.push(message(&failure)),
            }
        }
        match failures.as_slice() {
            [] => Ok(()),
            [one] => Err(Failure::local(one.clone())),
            many => Err(Failure::local(format!("[{}]", many.join(", ")))),
        }
    }

    /// One pod, until it is gone.
    async fn leave(
        &self,
        session: &Session,
        pod: &Found,
        deadline: Option<Instant>,
    ) -> Result<(), Failure> {
        loop {
            output::print(&format!("evicting pod {}\n", pod.path()))?;
            let is_leaving = match self.evict(session, pod).await {
                Err(failure) if failure.reason() == Some(Reason::TooManyRequests) => {
                    let (name, namespace) = (&pod.name, &pod.namespace);
                    eprintln!(
                        "error when evicting pods/{name:?} -n {namespace:?} (will retry after 5s): {}",
                        message(&failure)
                    );
                    wait_to_retry(deadline, self.timeout).await?;
                    continue;
                }
                Err(failure) => {
                    let (name, namespace) = (&pod.name, &pod.namespace);
                    let text = format!(
                        "error when evicting pods/{name:?} -n {namespace:?}: {}",
                        message(&failure)
                    );
                    return Err(Failure::local(text));
                }
                Ok(is_leaving) => is_leaving,
            };
            if !is_leaving {
                return Ok(());
            }
            wait_gone(
                session,
                pod_kind()?,
                &pod.namespace,
                &pod.name,
                Some(&pod.uid),
                deadline,
            )
            .await?;
            return output::print(&format!("pod/{} evicted\n", pod.name));
        }
    }

    /// Whether it is there and leaves.
    async fn evict(&self, session: &Session, pod: &Found) -> Result<bool, Failure> {
        let grace_period_s = Some(self.grace_period).filter(|seconds| *seconds >= 0);
        let key = Some(key(pod_kind()?, &pod.namespace, &pod.name));
        let asked = if self.disable_eviction {
            let request = DeleteRequest {
                key,
                grace_period_s,
                uid: pod.uid.clone(),
                ..DeleteRequest::default()
            };
            session.delete(request).await.map(|_| ())
        } else {
            let eviction = eviction(pod, grace_period_s);
            let request = WriteRequest {
                key,
                json: eviction.to_string().into(),
                subresource: "eviction".to_owned(),
                ..WriteRequest::default()
            };
            let created = session
                .objects
                .clone()
                .create(session.request(request))
                .await;
            created.map(|_| ()).map_err(Failure::from)
        };
        match asked {
            Ok(()) => Ok(true),
            // Gone already, or another one of that name: not of this node any more.
            Err(failure)
                if matches!(failure.reason(), Some(Reason::NotFound | Reason::Conflict)) =>
            {
                Ok(false)
            }
            Err(failure) => Err(failure),
        }
    }
}

fn eviction(pod: &Found, grace_period_s: Option<i64>) -> Value {
    let mut options = json!({"preconditions": {"uid": pod.uid}});
    if let Some(seconds) = grace_period_s {
        options["gracePeriodSeconds"] = json!(seconds);
    }
    json!({"apiVersion": "policy/v1", "kind": "Eviction",
        "metadata": {"name": pod.name, "namespace": pod.namespace}, "deleteOptions": options})
}

/// What the server said, without the words around it.
fn message(failure: &Failure) -> String {
    match failure {
        Failure::Server { status, .. } => status.message.clone(),
        Failure::Local(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Waits a while, if there is still that much time.
async fn wait_to_retry(deadline: Option<Instant>, timeout: Duration) -> Result<(), Failure> {
    let at = Instant::now() + RETRY_PAUSE;
    if let Some(deadline) = deadline.filter(|deadline| *deadline < at) {
        tokio::time::sleep_until(deadline.into()).await;
        return Err(Failure::local(format!(
            "global timeout reached: {timeout:?}"
        )));
    }
    tokio::time::sleep_until(at.into()).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, owner: &str, extra: Value) -> Value {
        let mut pod = json!({"metadata": {"name": name, "namespace": "n", "uid": name},
            "spec": {}, "status": {"phase": "Running"}});
        if !owner.is_empty() {
            pod["metadata"]["ownerReferences"] = json!([{"kind": owner, "controller": true}]);
        }
        if let (Some(spec), Some(extra)) = (pod["spec"].as_object_mut(), extra.as_object()) {
            spec.extend(extra.clone());
        }
        pod
    }

    fn names(plan: &Plan) -> Vec<&str> {
        plan.evict.iter().map(|pod| pod.name.as_str()).collect()
    }

    #[test]
    fn an_eviction_is_of_this_very_pod() {
        let found = Found::of(&pod("web", "ReplicaSet", json!({})));
        let own = eviction(&found, None);
        assert_eq!(own["metadata"], json!({"name": "web", "namespace": "n"}));
        let options = json!({"preconditions": {"uid": "web"}});
        assert_eq!(own["deleteOptions"], options);
        let short = eviction(&found, Some(3));
        assert_eq!(short["deleteOptions"]["gracePeriodSeconds"], 3);
    }

    #[test]
    fn what_a_flag_does_not_allow_stops_everything_with_its_name() {
        let empty_dir = json!({"volumes": [{"name": "v", "emptyDir": {}}]});
        let mut mirror = pod("static", "", json!({}));
        mirror["metadata"]["annotations"] = json!({MIRROR_ANNOTATION: "x"});
        let mut ended = pod("ended", "", empty_dir.clone());
        ended["status"]["phase"] = json!("Succeeded");
        let pods = [
            pod("web", "ReplicaSet", json!({})),
            pod("daemon", "DaemonSet", empty_dir.clone()),
            pod("cache", "ReplicaSet", empty_dir),
            pod("alone", "", json!({})),
            mirror,
            ended,
        ];
        let refused = plan(&pods, Allowed::default());
        assert_eq!(
            refused.errors,
            [
                "cannot delete DaemonSet-managed Pods (use --ignore-daemonsets to ignore): n/daemon",
                "cannot delete Pods with local storage (use --delete-emptydir-data to override): n/cache",
                "cannot delete Pods that declare no controller (use --force to override): n/alone",
            ]
        );
        let all = Allowed {
            daemon_sets: true,
            empty_dir: true,
            unmanaged: true,
        };
        let taken = plan(&pods, all);
        assert_eq!(names(&taken), ["web", "cache", "alone", "ended"]);
        assert!(taken.errors.is_empty());
        assert_eq!(taken.warnings.len(), 2);
        assert!(
            taken.warnings[0].ends_with("n/daemon"),
            "{:?}",
            taken.warnings
        );
        assert_eq!(plan(&[], Allowed::default()), Plan::default());
    }
}
