//! Whether a pod would connect to a Service: asked of the client's node, then of the server's.
//!
//! ```text
//!  pod ─► its node: name, frontend, backend, egress ─► the backend's node: ingress, answer ─► conclusion
//! ```
//! Each node asks its own programs; here the two parts are only put together.

use std::time::Duration;

use gantry_api::proto;
use gantry_api::proto::open_tunnel::Target;
use gantry_api::proto::tunnel_up;
use gantry_api::status::Status;
use tokio::time::timeout;

use super::Feed;
use super::pods::place;

/// How long a node may take after it has accepted.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Asks both nodes.
pub(super) async fn connect(
    feed: &Feed,
    request: &proto::ExplainRequest,
) -> Result<proto::ExplainReply, Status> {
    let client = place(feed, &request.namespace, &request.pod, None)?;
    let target = Target::ExplainClient(proto::ExplainClient {
        service: request.service.clone(),
        port: request.port.clone(),
        udp: request.udp,
    });
    let first = ask(feed, &client.node, &client.uid, target).await?;
    let server = match &first.next {
        Some(next) if first.ok && !first.next_node.is_empty() => {
            let target = Target::ExplainServer(next.clone());
            Some(ask(feed, &first.next_node, "", target).await)
        }
        _ => None,
    };
    Ok(compose(&client.node, first, server))
}

async fn ask(
    feed: &Feed,
    node: &str,
    pod_uid: &str,
    target: Target,
) -> Result<proto::ExplainHalf, Status> {
    let mut tunnel = feed.inner.open_tunnel(node, pod_uid, target).await?;
    let answer = timeout(ANSWER_TIMEOUT, tunnel.up.message()).await;
    match answer.map_err(|_| Status::timeout("no answer in 10 s"))? {
        Ok(Some(proto::TunnelUp {
            message: Some(tunnel_up::Message::Explain(half)),
        })) => Ok(half),
        _ => Err(Status::unavailable("the agent answered something else")),
    }
}

/// One story of both parts. Pure.
fn compose(
    client_node: &str,
    client: proto::ExplainHalf,
    server: Option<Result<proto::ExplainHalf, Status>>,
) -> proto::ExplainReply {
    let mut steps = client.steps;
    for step in &mut steps {
        client_node.clone_into(&mut step.node);
    }
    let would = format!("would connect to {}", client.backend);
    let (connects, conclusion) = match server {
        _ if !client.ok => (false, client.conclusion),
        None if client.conclusion.is_empty() => (true, would),
        None => (true, client.conclusion),
        Some(Ok(mut server)) => {
            // The answer's way is told from its beginning.
            let at = steps.iter().position(|step| step.about == "answer");
            for step in &mut server.steps {
                client.next_node.clone_into(&mut step.node);
            }
            let at = at.unwrap_or(steps.len());
            steps.splice(at..at, server.steps);
            if !server.ok {
                // What would have come after it does not come.
                steps.retain(|step| step.about != "answer" || !step.ok);
            }
            match server.ok {
                true => (true, would),
                false => (false, server.conclusion),
            }
        }
        Some(Err(status)) => {
            steps.push(proto::ExplainStep {
                about: "ingress".into(),
                text: format!("not known: {}", status.message),
                ok: false,
                node: client.next_node.clone(),
            });
            let node = client.next_node;
            (
                false,
                format!(
                    "unknown: node {node} does not answer, and {} is there",
                    client.backend
                ),
            )
        }
    };
    proto::ExplainReply {
        steps,
        connects,
        conclusion,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn half(ok: bool, steps: &[&str], conclusion: &str) -> proto::ExplainHalf {
        let steps = steps.iter().map(|about| proto::ExplainStep {
            about: (*about).to_owned(),
            ok,
            ..Default::default()
        });
        proto::ExplainHalf {
            steps: steps.collect(),
            ok,
            conclusion: conclusion.into(),
            next_node: "n2".into(),
            backend: "shop/web-1 (10.0.0.7:8080)".into(),
            ..Default::default()
        }
    }

    fn told(reply: &proto::ExplainReply) -> Vec<String> {
        let steps = reply.steps.iter();
        steps
            .map(|step| format!("{} {}", step.node, step.about))
            .collect()
    }

    #[test]
    fn two_parts_are_one_story() {
        let client = || half(true, &["name", "egress", "answer"], "");
        let server = half(true, &["ingress", "answer"], "");
        let reply = compose("n1", client(), Some(Ok(server)));
        assert!(reply.connects);
        assert_eq!(
            reply.conclusion,
            "would connect to shop/web-1 (10.0.0.7:8080)"
        );
        let expected = [
            "n1 name",
            "n1 egress",
            "n2 ingress",
            "n2 answer",
            "n1 answer",
        ];
        assert_eq!(told(&reply), expected);
        let server = half(false, &["ingress"], "dropped at ingress: why");
        let reply = compose("n1", client(), Some(Ok(server)));
        assert_eq!(
            (reply.connects, reply.conclusion.as_str()),
            (false, "dropped at ingress: why")
        );
        assert_eq!(told(&reply), ["n1 name", "n1 egress", "n2 ingress"]);
    }

    #[test]
    fn a_client_that_is_stopped_asks_nobody_and_a_silent_node_is_no_yes() {
        let reply = compose("n1", half(false, &["name"], "cannot connect: x"), None);
        assert_eq!(
            (reply.connects, reply.conclusion.as_str()),
            (false, "cannot connect: x")
        );
        let silent = Some(Err(Status::unavailable("node n2 is not connected")));
        let reply = compose("n1", half(true, &["name"], ""), silent);
        assert!(!reply.connects && reply.conclusion.starts_with("unknown: node n2"));
    }
}
