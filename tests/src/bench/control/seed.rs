//! A store with nodes and pods in it, written by the control plane's own registry before any program
//! runs: what is measured then begins from the same state each time.

use std::path::Path;

use anyhow::{Context, Result};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use gantry_api::k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use gantry_control::server::Registry;
use gantry_control::server::registry::Settings;
use gantry_control::store::seal::KEY_FILE;
use gantry_control::store::{STORE_FILE, Store};
use serde_json::{Value, json};

use super::super::api::NAMESPACE;

/// Writes at a time: what the store takes as one group.
const AT_ONCE: usize = 256;
/// No node gets more pods than this: those of a large cluster are not on few nodes.
const PODS_PER_NODE_MAX: usize = 40;

/// `node-00042`
pub(super) fn node_name(number: usize) -> String {
    format!("node-{number:05}")
}

/// A machine as its agent tells of it.
pub(super) fn machine(number: usize) -> Value {
    let name = node_name(number);
    let (high, low) = (number >> 8, number & 0xff);
    let resources = json!({
        "cpu": "32", "memory": "128Gi", "ephemeral-storage": "100Gi",
        "pods": PODS_PER_NODE_MAX.to_string(),
    });
    let condition = |type_: &str, status: &str, reason: &str| {
        json!({
            "type": type_, "status": status, "reason": reason, "message": "hollow",
            "lastHeartbeatTime": "2026-01-01T00:00:00Z",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        })
    };
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {
            "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
            "topology.kubernetes.io/zone": format!("zone-{}", number % 3),
        }},
        "status": {
            "capacity": resources, "allocatable": resources,
            "addresses": [
                {"type": "InternalIP", "address": format!("172.20.{high}.{low}")},
                {"type": "Hostname", "address": name},
            ],
            "conditions": [
                condition("Ready", "True", "AgentReady"),
                condition("MemoryPressure", "False", "AgentHasSufficientMemory"),
                condition("DiskPressure", "False", "AgentHasNoDiskPressure"),
                condition("PIDPressure", "False", "AgentHasSufficientPID"),
            ],
            "nodeInfo": {
                "machineID": "", "systemUUID": "", "bootID": "hollow",
                "kernelVersion": "6.12.0", "osImage": "hollow", "containerRuntimeVersion": "gantry://0",
                "kubeletVersion": "v1.34.0", "kubeProxyVersion": "", "operatingSystem": "linux",
                "architecture": "amd64",
            },
        },
    })
}

/// A web server's pod, as a Deployment would make it.
fn pod(number: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("web-{number:06}"), "namespace": NAMESPACE,
            "labels": {"app": "web", "tier": format!("t{}", number % 10)},
        },
        "spec": {
            "automountServiceAccountToken": false,
            "containers": [{
                "name": "web", "image": "registry.example/web:1.27", "ports": [{"containerPort": 8080}],
                "env": [{"name": "LISTEN", "value": ":8080"}],
                "resources": {
                    "requests": {"cpu": "100m", "memory": "64Mi"},
                    "limits": {"memory": "128Mi"},
                },
                "readinessProbe": {"httpGet": {"path": "/", "port": 8080}},
            }],
        },
    })
}

/// Fills the store below `data` with what is not there yet: so many nodes, with prefixes, and pods that
/// wait.
pub(super) async fn fill(data: &Path, nodes: usize, pods: usize) -> Result<()> {
    std::fs::create_dir_all(data.join("pki"))?;
    let store = Store::open_sealed(&data.join(STORE_FILE), &data.join(KEY_FILE))?;
    let settings = Settings {
        service_cidr: "10.96.0.0/16".parse().map_err(anyhow::Error::msg)?,
        reserved_addresses: Vec::new(),
    };
    let registry = Registry::new(store, &settings);
    registry.ensure_defaults().await?;
    if registry.get::<Namespace>("", NAMESPACE)?.is_none() {
        let object = json!({"metadata": {"name": NAMESPACE}});
        let space: Namespace = serde_json::from_value(object)?;
        registry.create(&space).await?;
        let object = json!({"metadata": {"name": "default", "namespace": NAMESPACE}});
        let account: ServiceAccount = serde_json::from_value(object)?;
        registry.create(&account).await?;
    }
    let held = registry.list::<Node>(None)?.1.len();
    at_once(held..nodes, |number| {
        let registry = registry.clone();
        async move {
            let mut node: Node = serde_json::from_value(machine(number))?;
            let prefix = 100 * (1 << 24) + (64 << 16) + (u32::try_from(number)? << 8);
            let prefix = format!("{}/24", std::net::Ipv4Addr::from(prefix));
            node.spec.get_or_insert_default().pod_cidr = Some(prefix.clone());
            node.spec.get_or_insert_default().pod_cidrs = Some(vec![prefix]);
            let status = node.status.clone();
            let mut made = registry.create(&node).await?;
            made.status = status;
            registry.update_status(&made).await?;
            Ok(())
        }
    })
    .await
    .context("write the nodes")?;
    at_once(0..pods, |number| {
        let registry = registry.clone();
        async move {
            let pod: Pod = serde_json::from_value(pod(number))?;
            registry.create(&pod).await?;
            Ok(())
        }
    })
    .await
    .context("write the pods")?;
    registry.store().close().await;
    Ok(())
}

async fn at_once<F>(numbers: std::ops::Range<usize>, write: impl Fn(usize) -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    stream::iter(numbers)
        .map(write)
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}
