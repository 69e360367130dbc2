//! Would this pod connect to that Service, and if not, why: `gantry explain connect`.
//!
//! ```text
//!  client's node  name ─► frontend ─► backends ─► SYN out of the pod (dataplane::trial) ─► backend, egress
//!                                                 answer to the pod ─► from the Service again
//!  server's node  SYN to the backend's pod ─► ingress ─► its answer out of the pod
//! ```
//! What the packets meet is asked of the attached programs with the maps as they are; the view only lends
//! names and says which NetworkPolicies there are. A connect() itself is translated by programs at the
//! socket, which no kernel lets anybody try; they look into the same maps by the same functions as the
//! program that the packet meets.
//!
//! Deciding is a function of the facts and of a [`Trial`], so tests bring their own of both.

mod client;
mod server;
mod target;
mod words;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use gantry_api::proto;

pub use self::client::{ClientFacts, decide as decide_client};
pub use self::server::{ServerFacts, decide as decide_server};

use crate::dataplane::{DataplaneError, TrialPod};
use crate::flows::Sources;
use crate::ids::PodUid;
use crate::services::index::{ip_of, label64, parse_address};
use crate::view::{ServiceName, View};

/// Why nothing can be said at all.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// The kernel's refusal.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// What was asked about is not here.
    #[error("{0}")]
    Absent(String),
}

/// The part of the client's node.
pub async fn client(
    sources: &Sources,
    pod: &PodUid,
    request: proto::ExplainClient,
) -> Result<proto::ExplainHalf, ExplainError> {
    let view = sources.view.borrow().clone();
    let facts = ClientFacts {
        programmed: Vec::new(),
        local: local(sources, &view),
        node: sources.node.clone(),
        uid: pod.clone(),
        view,
    };
    let asked = facts.service(&request);
    let programmed = match asked {
        Some(ServiceName { namespace, name }) => {
            let request = proto::ServicesRequest {
                namespace,
                name,
                ..Default::default()
            };
            sources.dataplane.services(&request).await?
        }
        None => Vec::new(),
    };
    let facts = ClientFacts {
        programmed,
        ..facts
    };
    let dataplane = sources.dataplane.clone();
    // Loading a copy of the programs takes the verifier's time.
    blocking(move || client::decide(&facts, &request, || dataplane.trial())).await
}

/// The part of the server's node.
pub async fn server(
    sources: &Sources,
    request: proto::ExplainServer,
) -> Result<proto::ExplainHalf, ExplainError> {
    let view = sources.view.borrow().clone();
    let local = local(sources, &view);
    let facts = ServerFacts { local, view };
    let dataplane = sources.dataplane.clone();
    blocking(move || server::decide(&facts, &request, || dataplane.trial())).await
}

async fn blocking<F>(decide: F) -> Result<proto::ExplainHalf, ExplainError>
where
    F: FnOnce() -> Result<proto::ExplainHalf, ExplainError> + Send + 'static,
{
    let decided = tokio::task::spawn_blocking(decide).await;
    decided.unwrap_or_else(|_| Err(ExplainError::Absent("the agent is going down".into())))
}

/// A pod of this node that is in the packet path.
#[derive(Clone, Debug)]
pub struct Local {
    /// Its UID.
    pub uid: PodUid,
    /// Its addresses.
    pub addresses: Vec<std::net::IpAddr>,
    /// Its interface.
    pub interface: TrialPod,
}

fn local(sources: &Sources, view: &Arc<View>) -> Vec<Local> {
    let places = sources.dataplane.pod_places();
    let pods = view.pods.keys().filter_map(|uid| {
        let id = label64(uid.as_str());
        let own = places.addresses.iter().filter(|(_, owner)| **owner == id);
        Some(Local {
            uid: uid.clone(),
            addresses: own.map(|(address, _)| *address).collect(),
            interface: sources.dataplane.trial_pod(uid)?,
        })
    });
    pods.collect()
}

fn address(bytes: &[u8]) -> Option<std::net::IpAddr> {
    parse_address(bytes).map(|addr| ip_of(&addr))
}
