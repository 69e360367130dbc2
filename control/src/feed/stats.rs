//! What nodes and pods use, for `gantry top`, which Services nodes have programmed, for `gantry svc`, and
//! what happens to flows, for `gantry flows`: every agent is asked on its own stream, side by side.
//!
//! | asked for | right |
//! |---|---|
//! | use of nodes | `list nodes.metrics.k8s.io` |
//! | use of pods | `list pods.metrics.k8s.io`, in each namespace that is shown |
//! | programmed Services | `list services` in the namespace, or everywhere; drops: `get nodes/stats` |
//! | flows, explanations | `get pods/flows` in the namespace, or everywhere |

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::{BoxFuture, join_all};
use gantry_api::k8s_openapi::api::core::v1::Node;
use gantry_api::proto;
use gantry_api::proto::open_tunnel::Target;
use gantry_api::proto::{stats_server, tunnel_up};
use gantry_api::quantity::Quantity;
use gantry_api::status::Status;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response};

use super::pods::or_default;
use super::{Feed, explain};
use crate::controllers::UsageSource;
use crate::server::identity::Identity;
use crate::server::rbac::{Attributes, Verdict, caller};

/// An agent takes a second for its rates, and a reading.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Parts of answers on their way to the one who asked.
const PARTS: usize = 4;

/// The `Stats` service.
pub struct NodeStats {
    feed: Feed,
}

impl NodeStats {
    pub(super) fn new(feed: Feed) -> Self {
        Self { feed }
    }

    fn nodes(&self, wanted: &str) -> Result<Vec<Node>, Status> {
        let (_, mut nodes) = self.feed.inner.registry.list::<Node>(None)?;
        nodes.retain(|n| wanted.is_empty() || n.metadata.name.as_deref() == Some(wanted));
        Ok(nodes)
    }

    /// The same, and an error when the node that is wanted does not exist.
    fn nodes_named(&self, wanted: &str) -> Result<Vec<Node>, tonic::Status> {
        let nodes = self.nodes(wanted)?;
        if nodes.is_empty() && !wanted.is_empty() {
            return Err(tonic::Status::not_found(format!("no node {wanted}")));
        }
        Ok(nodes)
    }

    fn authorize(&self, who: &Identity, what: &Attributes<'_>) -> Result<(), Status> {
        self.feed.inner.registry.authorize_noted(who, what)
    }

    fn may(&self, who: &Identity, what: &Attributes<'_>) -> Result<bool, Status> {
        Ok(self.feed.inner.registry.verdict(who, what)? != Verdict::Refused)
    }

    /// Takes out what the caller may not see: nodes' figures, and pods of other namespaces.
    fn keep_allowed(&self, who: &Identity, usage: &mut proto::NodeUsage) -> Result<(), Status> {
        if !self.may(who, &metrics("nodes", ""))? {
            usage.usage = None;
            usage.allocatable_cpu_millicores = 0;
            usage.allocatable_memory_bytes = 0;
        }
        if self.may(who, &metrics("pods", ""))? {
            return Ok(());
        }
        let mut allowed = BTreeMap::new();
        for pod in &usage.pods {
            if !allowed.contains_key(&pod.namespace) {
                let may = self.may(who, &metrics("pods", &pod.namespace))?;
                allowed.insert(pod.namespace.clone(), may);
            }
        }
        usage.pods.retain(|pod| allowed[&pod.namespace]);
        Ok(())
    }

    async fn ask(&self, node: &Node) -> Result<proto::NodeUsage, Status> {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let target = Target::Usage(proto::UsageRequest {
            node: name.to_owned(),
        });
        let mut tunnel = self.feed.inner.open_tunnel(name, "", target).await?;
        let answer = timeout(ANSWER_TIMEOUT, tunnel.up.message()).await;
        let answer = answer.map_err(|_| Status::timeout("no answer in 10 s"))?;
        match answer {
            Ok(Some(proto::TunnelUp {
                message: Some(tunnel_up::Message::Usage(mut usage)),
            })) => {
                // The agent says what it measured; who it is, the control plane knows.
                name.clone_into(&mut usage.node);
                fill_in(&mut usage, node);
                Ok(usage)
            }
            _ => Err(Status::unavailable("the agent answered something else")),
        }
    }
}

/// Listing these figures, in one namespace or everywhere.
fn metrics<'a>(resource: &'a str, namespace: &'a str) -> Attributes<'a> {
    Attributes {
        verb: "list",
        group: "metrics.k8s.io",
        resource,
        namespace,
        ..Attributes::default()
    }
}

/// Passes on the parts of one node's answer.
async fn pass_on_services(
    feed: Feed,
    node: String,
    request: proto::ServicesRequest,
    parts: mpsc::Sender<Result<proto::NodeServices, tonic::Status>>,
) {
    let passed = async {
        let target = Target::Services(request);
        let mut tunnel = feed.inner.open_tunnel(&node, "", target).await?;
        loop {
            let answer = timeout(ANSWER_TIMEOUT, tunnel.up.message()).await;
            let answer = answer.map_err(|_| Status::timeout("no answer in 10 s"))?;
            let Ok(Some(proto::TunnelUp {
                message: Some(tunnel_up::Message::Services(mut part)),
            })) = answer
            else {
                return Err(Status::unavailable("the agent has not answered to the end"));
            };
            node.clone_into(&mut part.node);
            let is_last = part.last;
            if parts.send(Ok(part)).await.is_err() || is_last {
                return Ok::<_, Status>(()); // nobody listens any more, or all is said
            }
        }
    };
    if let Err(status) = passed.await {
        let part = proto::NodeServices {
            node,
            error: status.message,
            last: true,
            ..Default::default()
        };
        let _ = parts.send(Ok(part)).await;
    }
}

/// Passes on the flows of one node until it has told them, or nobody listens any more.
async fn pass_on_flows(
    feed: Feed,
    node: String,
    request: proto::FlowsRequest,
    parts: mpsc::Sender<Result<proto::NodeFlows, tonic::Status>>,
) {
    let passed = async {
        let target = Target::Flows(request);
        let mut tunnel = feed.inner.open_tunnel(&node, "", target).await?;
        loop {
            let Ok(Some(proto::TunnelUp {
                message: Some(tunnel_up::Message::Flows(mut part)),
            })) = tunnel.up.message().await
            else {
                return Err(Status::unavailable("the connection to the node was lost"));
            };
            node.clone_into(&mut part.node);
            let is_last = part.last;
            if parts.send(Ok(part)).await.is_err() || is_last {
                return Ok::<_, Status>(());
            }
        }
    };
    // Cancel-safe: dropping the tunnel closes it. A quiet node would not show that the client has left.
    let passed = tokio::select! {
        passed = passed => passed,
        () = parts.closed() => return,
    };
    if let Err(status) = passed {
        let part = proto::NodeFlows {
            node,
            error: status.message,
            last: true,
            ..Default::default()
        };
        let _ = parts.send(Ok(part)).await;
    }
}

/// What pods may ask for of the node.
fn fill_in(usage: &mut proto::NodeUsage, node: &Node) {
    let allocatable = node.status.as_ref().and_then(|s| s.allocatable.as_ref());
    let of = |name: &str| Quantity::parse(&allocatable?.get(name)?.0).ok();
    let positive = |amount: i64| u64::try_from(amount).unwrap_or(0);
    usage.allocatable_cpu_millicores = of("cpu").map_or(0, |q| positive(q.milli()));
    usage.allocatable_memory_bytes = of("memory").map_or(0, |q| positive(q.units()));
}

impl UsageSource for Feed {
    fn usage<'a>(&'a self, nodes: &'a BTreeSet<String>) -> BoxFuture<'a, Vec<proto::PodUsage>> {
        let stats = NodeStats::new(self.clone());
        Box::pin(async move {
            let mut known = match stats.nodes("") {
                Ok(known) => known,
                Err(status) => {
                    tracing::warn!(%status, "cannot read the nodes to ask for what their pods use");
                    return Vec::new();
                }
            };
            known.retain(|node| {
                node.metadata
                    .name
                    .as_ref()
                    .is_some_and(|n| nodes.contains(n))
            });
            let answers = join_all(known.iter().map(|node| stats.ask(node))).await;
            let mut pods = Vec::new();
            for (node, answer) in known.iter().zip(answers) {
                match answer {
                    Ok(usage) => pods.extend(usage.pods),
                    Err(status) => {
                        let name = node.metadata.name.as_deref().unwrap_or_default();
                        tracing::debug!(node = name, %status, "no figures for autoscalers");
                    }
                }
            }
            pods
        })
    }
}

#[tonic::async_trait]
impl stats_server::Stats for NodeStats {
    async fn explain(
        &self,
        request: Request<proto::ExplainRequest>,
    ) -> Result<Response<proto::ExplainReply>, tonic::Status> {
        let who = caller(&request)?;
        let request = request.into_inner();
        let namespace = or_default(&request.namespace);
        self.authorize(
            &who,
            &Attributes::pod("get", "flows", namespace, &request.pod),
        )?;
        let reply = explain::connect(&self.feed, &request).await;
        Ok(Response::new(reply?))
    }

    type FlowsStream = ReceiverStream<Result<proto::NodeFlows, tonic::Status>>;

    async fn flows(
        &self,
        request: Request<proto::FlowsRequest>,
    ) -> Result<Response<Self::FlowsStream>, tonic::Status> {
        let who = caller(&request)?;
        let request = request.into_inner();
        let what = Attributes::pod("get", "flows", &request.namespace, &request.pod);
        self.authorize(&who, &what)?;
        let nodes = self.nodes_named(&request.node)?;
        let (parts, stream) = mpsc::channel(PARTS);
        for node in nodes {
            let name = node.metadata.name.unwrap_or_default();
            let (feed, request, parts) = (self.feed.clone(), request.clone(), parts.clone());
            tokio::spawn(pass_on_flows(feed, name, request, parts));
        }
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type ServicesStream = ReceiverStream<Result<proto::NodeServices, tonic::Status>>;

    async fn services(
        &self,
        request: Request<proto::ServicesRequest>,
    ) -> Result<Response<Self::ServicesStream>, tonic::Status> {
        let who = caller(&request)?;
        let request = request.into_inner();
        let what = match request.drops {
            true => Attributes {
                verb: "get",
                resource: "nodes",
                subresource: "stats",
                name: &request.node,
                ..Attributes::default()
            },
            false => Attributes {
                verb: "list",
                resource: "services",
                namespace: &request.namespace,
                name: &request.name,
                ..Attributes::default()
            },
        };
        self.authorize(&who, &what)?;
        let nodes = self.nodes_named(&request.node)?;
        let (parts, stream) = mpsc::channel(PARTS);
        for node in nodes {
            let name = node.metadata.name.unwrap_or_default();
            let (feed, request, parts) = (self.feed.clone(), request.clone(), parts.clone());
            tokio::spawn(pass_on_services(feed, name, request, parts));
        }
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn usage(
        &self,
        request: Request<proto::UsageRequest>,
    ) -> Result<Response<proto::UsageReply>, tonic::Status> {
        let who = caller(&request)?;
        // Who sees figures neither of nodes nor of all pods gets those of the pods that they may see.
        let nodes = self.nodes(&request.into_inner().node)?;
        let answers = join_all(nodes.iter().map(|node| self.ask(node))).await;
        let mut reply = proto::UsageReply::default();
        for (node, answer) in nodes.iter().zip(answers) {
            let name = node.metadata.name.as_deref().unwrap_or_default();
            match answer {
                Ok(mut usage) => {
                    self.keep_allowed(&who, &mut usage)?;
                    reply.nodes.push(usage);
                }
                Err(status) => reply.missing.push(format!("{name}: {}", status.message)),
            }
        }
        // Without any right nothing is left, and then the names of nodes are nobody's business either.
        let is_bare = |node: &proto::NodeUsage| node.usage.is_none() && node.pods.is_empty();
        if reply.nodes.iter().all(is_bare) && !self.may(&who, &metrics("nodes", ""))? {
            self.authorize(&who, &metrics("pods", ""))?;
        }
        Ok(Response::new(reply))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_what_pods_may_ask_for() {
        let node: Node = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "n"},
            "status": {"allocatable": {"cpu": "1900m", "memory": "1Gi"}},
        }))
        .unwrap();
        let mut usage = proto::NodeUsage::default();
        fill_in(&mut usage, &node);
        assert_eq!(usage.allocatable_cpu_millicores, 1900);
        assert_eq!(usage.allocatable_memory_bytes, 1 << 30);
        fill_in(&mut usage, &Node::default());
        assert_eq!(usage.allocatable_cpu_millicores, 0);
    }
}
