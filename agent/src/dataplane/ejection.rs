//! Looks after backends that do not answer, for as long as the agent runs, and tells of them.

use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{BackendChange, Dataplane};
use crate::feed::Reporter;
use crate::services::ejection::Standing;
use crate::view::View;

/// Between two looks: a part of what a SYN waits before it is sent again.
const PACE: Duration = Duration::from_millis(250);
/// After a failure.
const RETRY: Duration = Duration::from_secs(5);

/// Runs until shutdown; failures are logged and tried again.
pub async fn look_after_backends(
    node: String,
    dataplane: Arc<dyn Dataplane>,
    view: watch::Receiver<Arc<View>>,
    reporter: Reporter,
    shutdown: CancellationToken,
) {
    let mut wait = PACE;
    // Cancel-safe: it only sleeps.
    while let Some(()) = shutdown.run_until_cancelled(tokio::time::sleep(wait)).await {
        wait = PACE;
        match dataplane.look_at_failures().await {
            Ok(changes) => {
                for change in changes {
                    tell(&change, &node, &reporter);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "backends that do not answer are not left out; trying again");
                wait = RETRY;
                // What was half done is made whole by the next view, and there may be none for long.
                let newest = view.borrow().clone();
                if let Err(error) = dataplane.apply(&newest).await {
                    tracing::warn!(%error, "nor does the data plane follow");
                }
            }
        }
    }
}

fn tell(change: &BackendChange, node: &str, reporter: &Reporter) {
    let BackendChange {
        service,
        address,
        standing,
        times,
        ..
    } = change;
    let (namespace, name) = (&service.namespace, &service.name);
    tracing::info!(%namespace, %name, %address, ?standing, times, "backend");
    if let Some(event) = event(change, node) {
        reporter.event(event);
    }
}

/// When it is left out and when it is back; what is between is in the log and in `gantry svc show`.
fn event(change: &BackendChange, node: &str) -> Option<Event> {
    let address = change.address;
    let (reason, kind, message) = match (change.was, change.standing) {
        (Standing::Serving, Standing::Out) => (
            "BackendEjected",
            "Warning",
            format!("{address} does not answer: node {node} leaves it out until it does"),
        ),
        (_, Standing::Serving) => (
            "BackendReturned",
            "Normal",
            format!("{address} answers again: node {node} sends to it"),
        ),
        _ => return None,
    };
    let stamp = Time(Timestamp::now());
    Some(Event {
        metadata: ObjectMeta {
            namespace: Some(change.service.namespace.clone()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Service".into()),
            namespace: Some(change.service.namespace.clone()),
            name: Some(change.service.name.clone()),
            ..ObjectReference::default()
        },
        reason: Some(reason.into()),
        message: Some(message),
        type_: Some(kind.into()),
        source: Some(EventSource {
            component: Some("gantry-agent".into()),
            host: Some(node.into()),
        }),
        first_timestamp: Some(stamp.clone()),
        last_timestamp: Some(stamp),
        count: Some(1),
        ..Event::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::ServiceName;

    #[test]
    fn events_tell_when_it_begins_and_ends() {
        let told = |was, standing| {
            let change = BackendChange {
                service: ServiceName {
                    namespace: "shop".into(),
                    name: "web".into(),
                },
                address: "10.244.0.3:8080".parse().unwrap(),
                was,
                standing,
                times: 1,
            };
            event(&change, "n1").map(|event| (event.reason.unwrap(), event.message.unwrap()))
        };
        let (reason, message) = told(Standing::Serving, Standing::Out).unwrap();
        assert_eq!(reason, "BackendEjected");
        assert_eq!(
            message,
            "10.244.0.3:8080 does not answer: node n1 leaves it out until it does"
        );
        assert_eq!(told(Standing::OnTrial, Standing::Out), None);
        assert_eq!(told(Standing::Out, Standing::OnTrial), None);
        let (reason, _) = told(Standing::OnTrial, Standing::Serving).unwrap();
        assert_eq!(reason, "BackendReturned");
    }
}
