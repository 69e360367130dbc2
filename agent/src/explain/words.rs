//! The sentences of an explanation. Pure.

use std::net::{IpAddr, SocketAddr};

use ebpf_maps::drop::{DROP_NAMES, NO_BACKEND, POLICY};
use ebpf_maps::event::AT_INGRESS;
use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::network_policy::named_ports;
use gantry_api::proto;

use crate::dataplane::Tried;
use crate::policy::why::{Exchange, allows, selecting};
use crate::view::View;

/// What was found so far.
#[derive(Default, Debug)]
pub(super) struct Story {
    half: proto::ExplainHalf,
}

impl Story {
    /// All is well here.
    pub(super) fn good(&mut self, about: &str, text: impl Into<String>) {
        self.step(about, text.into(), true);
    }

    /// The end of it: nothing comes after.
    pub(super) fn bad(
        mut self,
        about: &str,
        text: impl Into<String>,
        conclusion: impl Into<String>,
    ) -> proto::ExplainHalf {
        self.step(about, text.into(), false);
        self.half.conclusion = conclusion.into();
        self.half
    }

    /// Nothing stands in the way.
    pub(super) fn end(mut self) -> proto::ExplainHalf {
        self.half.ok = true;
        self.half
    }

    /// Who would be reached.
    pub(super) fn backend(&mut self, backend: String) {
        self.half.backend = backend;
    }

    /// Instead of the usual words where all is well.
    pub(super) fn conclude(&mut self, conclusion: String) {
        self.half.conclusion = conclusion;
    }

    /// Where it goes on, and by whose name.
    pub(super) fn next(&mut self, node: &str, backend: String, server: proto::ExplainServer) {
        self.half.next_node = node.to_owned();
        self.half.backend = backend;
        self.half.next = Some(server);
    }

    fn step(&mut self, about: &str, text: String, ok: bool) {
        self.half.steps.push(proto::ExplainStep {
            about: about.to_owned(),
            text,
            ok,
            ..Default::default()
        });
    }
}

/// Why a packet was dropped, as the metric says it; none: it passes.
pub(super) fn drop_reason(tried: &Tried) -> Option<String> {
    if tried.passes {
        return None;
    }
    let reason = tried.event.map(|event| usize::from(event.reason));
    let name = reason.and_then(|reason| DROP_NAMES.get(reason));
    Some(name.map_or_else(|| "an unknown reason".to_owned(), |name| (*name).to_owned()))
}

/// It was refused because nobody serves the frontend.
pub(super) fn is_refused(tried: &Tried) -> bool {
    tried
        .event
        .is_some_and(|e| u32::from(e.reason) == NO_BACKEND)
}

/// A policy has dropped it; at its receiver, else at its sender.
pub(super) fn policy_drop(tried: &Tried) -> Option<bool> {
    let event = tried
        .event
        .filter(|event| u32::from(event.reason) == POLICY)?;
    Some(event.flags & AT_INGRESS != 0)
}

/// What the policies say of an exchange of this pod.
pub(super) struct PolicyWords {
    /// Where it passes.
    pub(super) allowed: String,
    /// Where it does not: a sentence, and the shorter one of a conclusion.
    pub(super) refused: String,
    pub(super) short: String,
}

pub(super) fn policies(
    view: &View,
    pod: &Pod,
    outgoing: bool,
    peer: SocketAddr,
    own_port: u16,
    protocol: u8,
    peer_name: &str,
) -> PolicyWords {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let labels = pod.metadata.labels.clone().unwrap_or_default();
    let direction = if outgoing { "egress" } else { "ingress" };
    let found = selecting(&view.policies, namespace, &labels, outgoing);
    let own_ports = pod.spec.as_ref().map(named_ports).unwrap_or_default();
    let exchange = Exchange {
        outgoing,
        peer: peer.ip(),
        protocol,
        port: if outgoing { peer.port() } else { own_port },
        own_ports: &own_ports,
    };
    let full = |policy: &crate::policy::PolicyName| format!("{}/{}", policy.namespace, policy.name);
    let allowing = found
        .iter()
        .filter(|(_, p)| allows(p, &view.peers, &exchange));
    let allowing: Vec<String> = allowing.map(|(name, _)| full(name)).collect();
    let all: Vec<String> = found.iter().map(|(name, _)| full(name)).collect();
    let (noun, verb) = match all.len() {
        1 => ("NetworkPolicy", "selects"),
        _ => ("NetworkPolicies", "select"),
    };
    let list = all.join(", ");
    let allowed = match (all.is_empty(), allowing.is_empty()) {
        (true, _) => {
            format!("no NetworkPolicy selects {name} for {direction}: everything is allowed")
        }
        (false, false) => format!("allowed by {} ({list} {verb} {name})", allowing.join(", ")),
        (false, true) => format!(
            "allowed without a rule (the node itself, or its resolver), though {list} {verb} {name}"
        ),
    };
    let short = match all.is_empty() {
        // The pod's row is closed: not judged yet, or its rules do not fit.
        true => {
            format!("{name} is closed: its policies are not programmed, or do not fit this node")
        }
        false => format!("{noun} {list} {verb} {name} and no rule allows {peer_name}"),
    };
    let refused = format!("{short} on port {}", exchange.port);
    PolicyWords {
        allowed,
        refused,
        short,
    }
}

/// `web-1 (10.0.0.7:8080)`
pub(super) fn placed(name: &str, at: SocketAddr) -> String {
    match name {
        "" => at.to_string(),
        name => format!("{name} ({at})"),
    }
}

pub(super) fn bytes_of(address: IpAddr) -> bytes::Bytes {
    match address {
        IpAddr::V4(v4) => bytes::Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes::Bytes::copy_from_slice(&v6.octets()),
    }
}
