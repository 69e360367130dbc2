//! The server's side: a packet that reaches its pod, and the answer that leaves it.

use std::net::SocketAddr;
use std::sync::Arc;

use gantry_api::proto;

use super::words::{Story, drop_reason, placed, policies, policy_drop};
use super::{ExplainError, Local, address};
use crate::dataplane::{DataplaneError, SYN, SYN_ACK, Trial, TrialPacket};
use crate::view::View;

/// What is known.
pub struct ServerFacts {
    /// The state that this node follows.
    pub view: Arc<View>,
    /// The pods in the packet path.
    pub local: Vec<Local>,
}

/// The story of one connection, as far as this node tells it.
pub fn decide(
    facts: &ServerFacts,
    request: &proto::ExplainServer,
    trial: impl FnOnce() -> Result<Box<dyn Trial>, DataplaneError>,
) -> Result<proto::ExplainHalf, ExplainError> {
    let place = |bytes: &[u8], port: u32| {
        let port = u16::try_from(port).ok()?;
        Some(SocketAddr::new(address(bytes)?, port))
    };
    let client = place(&request.client, request.client_port);
    let server = place(&request.server, request.server_port);
    let (Some(client), Some(server)) = (client, server) else {
        return Err(ExplainError::Absent(
            "what was asked names no addresses".into(),
        ));
    };
    let protocol = u8::try_from(request.protocol).unwrap_or_default();
    let mut story = Story::default();
    let of = |local: &&Local| local.addresses.contains(&server.ip());
    let found = facts.local.iter().find(of);
    let found = found.and_then(|local| Some((local, facts.view.pods.get(&local.uid)?)));
    let Some((local, pod)) = found else {
        story.good(
            "ingress",
            format!(
                "{server} is no pod in this node's packet path (host network?): nothing is asked"
            ),
        );
        return Ok(story.end());
    };
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let mut trial = trial()?;
    let packet = TrialPacket {
        source: client,
        destination: server,
        protocol,
        flags: SYN,
    };
    let tried = trial.received(&local.interface, &packet, request.by_node)?;
    let client_name = placed(&request.client_name, client);
    let policy = policies(
        &facts.view,
        pod,
        false,
        client,
        server.port(),
        protocol,
        &request.client_name,
    );
    match (policy_drop(&tried), drop_reason(&tried)) {
        (Some(_), _) => {
            let conclusion = format!("dropped at ingress: {}", policy.short);
            return Ok(story.bad("ingress", policy.refused, conclusion));
        }
        (None, Some(reason)) => {
            let conclusion = format!("dropped at ingress of {name}: {reason}");
            return Ok(story.bad("ingress", format!("dropped: {reason}"), conclusion));
        }
        (None, None) => story.good("ingress", policy.allowed),
    }
    let answer = TrialPacket {
        source: server,
        destination: client,
        protocol,
        flags: SYN_ACK,
    };
    let back = trial.sent(&local.interface, &answer)?;
    match drop_reason(&back) {
        None => story.good("answer", format!("leaves {name} for {client_name}")),
        Some(reason) => {
            let text = format!("dropped as it leaves {name}: {reason}");
            return Ok(story.bad("answer", &*text, format!("the answer is {text}")));
        }
    }
    Ok(story.end())
}
