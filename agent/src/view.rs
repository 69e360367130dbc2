//! What this node must make true: the store's view at exactly one revision.
//!
//! The feed builds a new [`View`] at each commit and publishes it whole; readers never see a state
//! between two revisions. Maps are behind `Arc`, so an unchanged part is shared with the view
//! before it and a reader can tell by pointer that nothing changed. Within a map that did change,
//! everything but the path to the changed entries is shared too ([`OrdMap`]): making the next view
//! while readers hold the last one costs the difference, whatever the number of Services.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::proto;
use imbl::OrdMap;
use ipnet::IpNet;

use crate::ids::PodUid;
use crate::policy::{Peers, PolicyName};

/// `namespace/name` of a Service.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ServiceName {
    /// metadata.namespace
    pub namespace: String,
    /// metadata.name
    pub name: String,
}

/// A ConfigMap or a Secret that a pod of this node names.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BlobKey {
    /// `configmaps` or `secrets`.
    pub plural: String,
    /// metadata.namespace
    pub namespace: String,
    /// metadata.name
    pub name: String,
}

/// The backends of one Service, by the feed's backend id (the pod UID, or slice/address without a pod).
pub type Backends = OrdMap<String, Arc<proto::Backend>>;

/// Cluster-wide settings, from the control plane's Welcome.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    /// This node's pod prefix; none until the control plane has allocated it.
    pub pod_cidr: Option<IpNet>,
    /// The one of the second family, in a cluster that has two.
    pub pod_cidr_second: Option<IpNet>,
    /// All nodes' pod prefixes lie within this.
    pub cluster_cidr: Option<IpNet>,
    /// Those of the second family.
    pub cluster_cidr_second: Option<IpNet>,
    /// Where cluster IPs come from.
    pub service_cidr: Option<IpNet>,
    /// Those of the second family.
    pub service_cidr_second: Option<IpNet>,
    /// `cluster.local`
    pub cluster_domain: String,
    /// The resolver address in the pods' resolv.conf; a frontend that every node serves itself.
    pub dns_service_ip: Option<IpAddr>,
}

impl Settings {
    /// This node's pod prefixes, one of each family at most.
    pub fn pod_cidrs(&self) -> impl Iterator<Item = IpNet> + use<> {
        self.pod_cidr.into_iter().chain(self.pod_cidr_second)
    }

    /// Where all nodes' pod prefixes lie.
    pub fn cluster_cidrs(&self) -> impl Iterator<Item = IpNet> + use<> {
        self.cluster_cidr
            .into_iter()
            .chain(self.cluster_cidr_second)
    }

    /// Where cluster IPs come from.
    pub fn service_cidrs(&self) -> impl Iterator<Item = IpNet> + use<> {
        self.service_cidr
            .into_iter()
            .chain(self.service_cidr_second)
    }
}

/// Everything this node must know at one revision.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The store revision; 0 before the first commit.
    pub rev: u64,
    /// From Welcome.
    pub settings: Arc<Settings>,
    /// All Services of the cluster.
    pub services: Arc<OrdMap<ServiceName, Arc<proto::Service>>>,
    /// Their backends; a Service without any may be absent.
    pub backends: Arc<OrdMap<ServiceName, Arc<Backends>>>,
    /// Other nodes' prefixes and addresses, by node name; this node included.
    pub nodes: Arc<OrdMap<String, Arc<proto::NodeRoute>>>,
    /// The pods bound to this node.
    pub pods: Arc<BTreeMap<PodUid, Arc<Pod>>>,
    /// The ConfigMaps and Secrets those pods name, as JSON objects: as few as this node's pods.
    pub blobs: Arc<BTreeMap<BlobKey, Arc<serde_json::Value>>>,
    /// The NetworkPolicies that select those pods.
    pub policies: Arc<OrdMap<PolicyName, Arc<proto::Policy>>>,
    /// The pods that those policies mean by their selectors.
    pub peers: Arc<Peers>,
}
