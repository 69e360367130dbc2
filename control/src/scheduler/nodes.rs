//! What every node has and what is already promised of it.
//!
//! The state is kept up to date by single changes: a pod that is bound, or assumed to be as soon as
//! its binding was decided, takes its part until it has finished or is gone. So several pods can be
//! placed before the first of their bindings is durable, without promising anything twice, and no
//! decision scans pods.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use gantry_api::k8s_openapi::api::core::v1::{Node, Taint};

use super::request::{HostPort, PodRequest, Resources};

/// Pods on a node that does not say how many it takes (the kubelet's default).
const POD_COUNT_UNSAID: i64 = 110;

/// One node.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct NodeState {
    pub(super) name: Arc<str>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) taints: Vec<Taint>,
    pub(super) is_ready: bool,
    pub(super) is_cordoned: bool,
    pub(super) allocatable: Resources,
    pub(super) pod_count_max: i64,
    /// Sum of the requests of its pods.
    pub(super) used: Resources,
    /// The same for scoring: pods without requests weigh a little.
    pub(super) scored: Resources,
    pub(super) pod_count: i64,
    pub(super) host_ports: Vec<HostPort>,
    /// Its pods.
    pub(super) pods: Vec<Arc<PodRequest>>,
}

impl NodeState {
    /// An empty node.
    pub(super) fn of(node: &Node) -> Self {
        let spec = node.spec.as_ref();
        let status = node.status.as_ref();
        let allocatable = status.and_then(|status| status.allocatable.as_ref());
        let pod_count_max = allocatable
            .and_then(|list| list.get("pods"))
            .and_then(|count| count.0.parse().ok())
            .unwrap_or(POD_COUNT_UNSAID);
        Self {
            name: node.metadata.name.as_deref().unwrap_or_default().into(),
            labels: node.metadata.labels.clone().unwrap_or_default(),
            taints: taints(node),
            is_ready: crate::controllers::node_is_ready(node),
            is_cordoned: spec.and_then(|spec| spec.unschedulable).unwrap_or(false),
            allocatable: Resources::of(allocatable),
            pod_count_max,
            used: Resources::default(),
            scored: Resources::default(),
            pod_count: 0,
            host_ports: Vec::new(),
            pods: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, request: &Arc<PodRequest>) {
        self.pods.push(Arc::clone(request));
        self.used.add(&request.resources);
        self.scored.add(&request.scored);
        self.pod_count += 1;
        self.host_ports.extend(request.host_ports.iter().cloned());
    }

    pub(super) fn subtract(&mut self, request: &PodRequest) {
        if let Some(index) = self.pods.iter().position(|pod| pod.uid == request.uid) {
            self.pods.swap_remove(index);
        }
        self.used.subtract(&request.resources);
        self.scored.subtract(&request.scored);
        self.pod_count -= 1;
        for port in &request.host_ports {
            if let Some(index) = self.host_ports.iter().position(|held| held == port) {
                self.host_ports.swap_remove(index);
            }
        }
    }

    /// Whether a pod that fits nowhere may fit here after this change of the node itself.
    fn is_more_than(&self, old: &Self) -> bool {
        let own = |node: &Self| {
            (
                node.labels.clone(),
                node.taints.clone(),
                node.allocatable.clone(),
                node.pod_count_max,
            )
        };
        (self.is_ready && !old.is_ready)
            || (!self.is_cordoned && old.is_cordoned)
            || own(self) != own(old)
    }
}

/// The taint that keeps pods without requests off a node that is short of memory.
pub(super) const MEMORY_PRESSURE: &str = "node.kubernetes.io/memory-pressure";
/// Node conditions that count as a taint.
const PRESSURES: [(&str, &str); 3] = [
    ("MemoryPressure", MEMORY_PRESSURE),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
];

/// The node's own taints, and one for each resource that it is short of: an evicted pod's successor
/// would be the next to go. Source: Kubernetes' TaintNodesByCondition.
fn taints(node: &Node) -> Vec<Taint> {
    let mut taints = node
        .spec
        .as_ref()
        .and_then(|spec| spec.taints.clone())
        .unwrap_or_default();
    let conditions = node
        .status
        .iter()
        .flat_map(|s| s.conditions.iter().flatten());
    for condition in conditions.filter(|condition| condition.status == "True") {
        let named = PRESSURES
            .iter()
            .find(|(type_, _)| condition.type_ == *type_);
        let Some((_, key)) = named else { continue };
        // Somebody may have set the taint itself.
        if !taints.iter().any(|taint| taint.key == *key) {
            taints.push(Taint {
                effect: "NoSchedule".to_owned(),
                key: (*key).to_owned(),
                ..Taint::default()
            });
        }
    }
    taints
}

/// Where a pod is counted.
#[derive(Debug, Clone)]
struct Placement {
    request: Arc<PodRequest>,
    node: Arc<str>,
    /// Its binding was decided here but not yet seen in the store.
    is_assumed: bool,
}

/// All nodes and placements.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    states: Vec<NodeState>,
    index: HashMap<Arc<str>, usize>,
    placements: HashMap<Arc<str>, Placement>,
}

impl Nodes {
    /// Every node, in no order that means anything.
    pub(super) fn states(&self) -> &[NodeState] {
        &self.states
    }

    /// A node is new or changed; returns whether waiting pods may fit now.
    pub(super) fn put(&mut self, node: &Node) -> bool {
        let mut new = NodeState::of(node);
        if let Some(index) = self.index.get(&new.name) {
            let old = &mut self.states[*index];
            let more = new.is_more_than(old);
            // What its pods hold stays; it does not come from the node object.
            new.used = std::mem::take(&mut old.used);
            new.scored = std::mem::take(&mut old.scored);
            new.pod_count = old.pod_count;
            new.host_ports = std::mem::take(&mut old.host_ports);
            new.pods = std::mem::take(&mut old.pods);
            *old = new;
            return more;
        }
        for placement in self.placements.values() {
            if placement.node == new.name {
                new.add(&placement.request);
            }
        }
        self.index.insert(Arc::clone(&new.name), self.states.len());
        self.states.push(new);
        true
    }

    /// A node is gone. Its pods stay counted for it, in case it comes back.
    pub(super) fn remove(&mut self, name: &str) {
        let Some(index) = self.index.remove(name) else {
            return;
        };
        self.states.swap_remove(index);
        if let Some(moved) = self.states.get(index) {
            self.index.insert(Arc::clone(&moved.name), index);
        }
    }

    fn state_mut(&mut self, name: &str) -> Option<&mut NodeState> {
        self.index.get(name).map(|index| &mut self.states[*index])
    }

    /// The binding of a pod was decided.
    pub(super) fn assume(&mut self, request: Arc<PodRequest>, node: &str) {
        self.place(request, node, true);
    }

    /// The store says that a pod is bound.
    pub(super) fn confirm(&mut self, request: Arc<PodRequest>, node: &str) {
        let known = self.placements.get_mut(&request.uid);
        if let Some(known) = known.filter(|k| *k.node == *node && *k.request == *request) {
            known.is_assumed = false;
            return;
        }
        self.place(request, node, false);
    }

    fn place(&mut self, request: Arc<PodRequest>, node: &str, is_assumed: bool) {
        self.forget(&request.uid);
        if let Some(state) = self.state_mut(node) {
            state.add(&request);
        }
        let uid = Arc::clone(&request.uid);
        self.placements.insert(
            uid,
            Placement {
                request,
                node: node.into(),
                is_assumed,
            },
        );
    }

    /// A pod holds nothing any more; returns whether it held something.
    pub(super) fn forget(&mut self, uid: &str) -> bool {
        let Some(placement) = self.placements.remove(uid) else {
            return false;
        };
        if let Some(state) = self.state_mut(&placement.node) {
            state.subtract(&placement.request);
        }
        true
    }

    /// A decided binding was refused; returns whether it was still only assumed.
    pub(super) fn forget_assumed(&mut self, uid: &str) -> bool {
        let assumed = self
            .placements
            .get(uid)
            .is_some_and(|placement| placement.is_assumed);
        assumed && self.forget(uid)
    }

    /// Whether the pod is counted somewhere.
    pub(super) fn has(&self, uid: &str) -> bool {
        self.placements.contains_key(uid)
    }

    /// The uids of all pods that are counted.
    pub(super) fn placed(&self) -> Vec<Arc<str>> {
        self.placements.keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::peers::Rules;
    use super::*;
    use proptest::prelude::*;

    fn node(name: &str) -> Node {
        let mut node = Node::default();
        node.metadata.name = Some(name.to_owned());
        node
    }

    fn request(uid: u8, cpu: i64) -> Arc<PodRequest> {
        let resources = Resources {
            cpu_millicores: cpu,
            ..Resources::default()
        };
        Arc::new(PodRequest {
            key: crate::controllers::informer::ObjectKey::new("a", uid.to_string()),
            uid: uid.to_string().into(),
            priority: 0,
            scored: resources.clone(),
            resources,
            host_ports: vec![HostPort {
                address: String::new(),
                protocol: "TCP".to_owned(),
                port: i32::from(uid),
            }],
            node_selector: BTreeMap::new(),
            required_affinity: None,
            tolerations: Vec::new(),
            never_preempts: false,
            rules: Rules::default(),
            claims: Vec::new(),
            own_claims: Vec::new(),
            volumes: Vec::new(),
            is_gated: false,
        })
    }

    proptest! {
        /// After any sequence, each node holds exactly what its placements ask for.
        #[test]
        fn sums_equal_the_placements(
            steps in proptest::collection::vec((0_u8..7, 0_u8..6, 0_u8..3, 1_i64..50), 0..120),
        ) {
            let mut nodes = Nodes::default();
            for (step, uid, node_index, cpu) in steps {
                let name = format!("n{node_index}");
                match step {
                    0 => { nodes.put(&node(&name)); }
                    1 => nodes.remove(&name),
                    2 => nodes.assume(request(uid, cpu), &name),
                    3 | 4 => nodes.confirm(request(uid, cpu), &name),
                    5 => { nodes.forget(&uid.to_string()); }
                    _ => { nodes.forget_assumed(&uid.to_string()); }
                }
                for state in nodes.states() {
                    let here = nodes.placements.values().filter(|p| p.node == state.name);
                    let sum: i64 = here.clone().map(|p| p.request.resources.cpu_millicores).sum();
                    prop_assert_eq!(state.used.cpu_millicores, sum);
                    prop_assert_eq!(state.pod_count, i64::try_from(here.clone().count()).unwrap());
                    prop_assert_eq!(state.host_ports.len(), here.count());
                }
            }
        }
    }
}
