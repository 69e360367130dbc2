//! A node's Hello: its Node object and its Lease, written by every stream anew.
//!
//! Only what the machine knows is written: its labels, capacity, addresses, nodeInfo and the
//! conditions that the agent gives. Labels, annotations, taints and conditions of others stay. The
//! revision of the Lease's write is the session's number and the least revision it may start at.

use gantry_api::k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use gantry_api::k8s_openapi::api::core::v1::Node;
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    MicroTime, ObjectMeta, OwnerReference,
};
use gantry_api::k8s_openapi::jiff::Timestamp;
use gantry_api::kinds::{self, Kind};
use gantry_api::proto;
use gantry_api::rules::{self, Rule};
use gantry_api::status::{Reason, Status};
use serde_json::{Map, Value, json};

use super::Inner;
use super::adopt::Told;
use crate::joining::{KEYS_ANNOTATION, MACHINE_ANNOTATION};
use crate::server::{Part, WriteOptions};

/// On the Node: the number of the last agent start that registered. An older start is refused.
pub const INCARNATION_ANNOTATION: &str = "gantry.io/agent-incarnation";
const LEASE_NAMESPACE: &str = "kube-node-lease";
/// Written into the Lease for other readers: the grace after which a silent node is given up.
const LEASE_DURATION_S: i32 = 40;

fn node_kind() -> Result<&'static Kind, Status> {
    kinds::by_plural("", "nodes")
        .ok_or_else(|| Status::not_served("nodes is not a kind of this server"))
}

impl Inner {
    /// Registers or refreshes the node and adopts what it runs; returns the session's number and the pods
    /// that the store does not know.
    ///
    /// * `joined` – the digest of the agent's key, of a node that has joined: it is refreshed only, for
    ///   who deleted it took its certificate back.
    pub(super) async fn register(
        &self,
        told: &Told,
        joined: Option<&str>,
    ) -> Result<(u64, Vec<String>), Status> {
        let hello = &told.hello;
        let info = hello
            .info
            .as_ref()
            .map(|info| info.node_json.as_ref())
            .unwrap_or(b"{}");
        let machine: Value = serde_json::from_slice(info)
            .map_err(|error| Status::bad_request(format!("the node's info is no JSON: {error}")))?;
        let node = self.write_node(hello, joined, &machine).await?;
        self.write_node_status(&hello.node, &machine["status"])
            .await?;
        let unknown = self.adopt(told).await?;
        let uid = node["metadata"]["uid"].as_str().unwrap_or_default();
        let lease = self.renew_lease(&hello.node, Some(uid)).await?;
        let revision = lease.metadata.resource_version.unwrap_or_default();
        let revision = revision
            .parse()
            .map_err(|_| Status::internal(format!("the lease has resourceVersion {revision:?}")))?;
        Ok((revision, unknown))
    }

    async fn write_node(
        &self,
        hello: &proto::Hello,
        joined: Option<&str>,
        machine: &Value,
    ) -> Result<Value, Status> {
        let kind = node_kind()?;
        let options = WriteOptions::default();
        if joined.is_none() && self.registry.get::<Node>("", &hello.node)?.is_none() {
            let mut node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {}});
            node["metadata"]["name"] = json!(hello.node);
            let node = merge_metadata(&node, hello, machine)?;
            match self.registry.create_value(kind, "", node, &options).await {
                Ok(written) => return Ok(written.object),
                Err(status) if status.reason == Reason::AlreadyExists => {}
                Err(status) => return Err(status),
            }
        }
        let change = |old: &Value| {
            let keys = old["metadata"]["annotations"][KEYS_ANNOTATION].as_str();
            let keys = keys.unwrap_or_default();
            if joined.is_some_and(|key| !keys.split(',').any(|known| known == key)) {
                let words = format!("another machine has joined as node {}", hello.node);
                return Err(Status::new(Reason::Forbidden, words));
            }
            merge_metadata(old, hello, machine)
        };
        let written = self
            .registry
            .change_value(kind, "", &hello.node, Part::Object, &options, change)
            .await?;
        Ok(written.object)
    }

    /// Writes what the agent says of its machine; `status` may hold only some of the fields.
    pub(super) async fn write_node_status(&self, node: &str, status: &Value) -> Result<(), Status> {
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let change = |old: &Value| {
            let mut new = old.clone();
            new["status"] = merge_status(&old["status"], status, &now);
            Ok(new)
        };
        let options = WriteOptions::default();
        self.registry
            .change_value(node_kind()?, "", node, Part::Status, &options, change)
            .await?;
        Ok(())
    }

    /// Says that the node is alive. With `owner`, the Node's UID, the Lease is made if it is absent.
    pub(super) async fn renew_lease(
        &self,
        node: &str,
        owner: Option<&str>,
    ) -> Result<Lease, Status> {
        let now = Some(MicroTime(Timestamp::now()));
        let old = self.registry.get::<Lease>(LEASE_NAMESPACE, node)?;
        let mut lease = old.clone().unwrap_or_else(|| Lease {
            metadata: ObjectMeta {
                namespace: Some(LEASE_NAMESPACE.into()),
                name: Some(node.into()),
                ..Default::default()
            },
            spec: None,
        });
        if let Some(uid) = owner {
            // The Lease goes with its Node.
            lease.metadata.owner_references = Some(vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: node.into(),
                uid: uid.into(),
                ..Default::default()
            }]);
        }
        lease.metadata.resource_version = None; // there is one writer of this object
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(node.into()),
            lease_duration_seconds: Some(LEASE_DURATION_S),
            renew_time: now,
            ..lease.spec.unwrap_or_default()
        });
        match old {
            Some(_) => self.registry.update(&lease).await,
            None => self.registry.create(&lease).await,
        }
    }
}

/// The node's own labels and the agent's number over what is there.
fn merge_metadata(old: &Value, hello: &proto::Hello, machine: &Value) -> Result<Value, Status> {
    let last = old["metadata"]["annotations"][INCARNATION_ANNOTATION].as_str();
    let last: u64 = last.and_then(|text| text.parse().ok()).unwrap_or(0);
    if hello.incarnation < last && !rules::is_off(Rule::StatusOrder) {
        return Err(Status::new(
            Reason::Conflict,
            format!(
                "a newer start of the agent of node {} has registered ({last}, this is {}): \
                 stop one of the two",
                hello.node, hello.incarnation
            ),
        ));
    }
    let mut new = old.clone();
    let labels = machine["metadata"]["labels"]
        .as_object()
        .cloned()
        .unwrap_or_default();
    extend(&mut new["metadata"]["labels"], labels);
    let mut annotations = machine["metadata"]["annotations"]
        .as_object()
        .cloned()
        .unwrap_or_default();
    // Written by who lets machines in.
    annotations.retain(|name, _| name != KEYS_ANNOTATION && name != MACHINE_ANNOTATION);
    annotations.insert(
        INCARNATION_ANNOTATION.into(),
        json!(hello.incarnation.to_string()),
    );
    extend(&mut new["metadata"]["annotations"], annotations);
    Ok(new)
}

fn extend(slot: &mut Value, fields: Map<String, Value>) {
    match slot {
        Value::Object(map) => map.extend(fields),
        other => *other = Value::Object(fields),
    }
}

/// The agent's fields over the old ones; conditions by type, with the times of their last change.
fn merge_status(old: &Value, new: &Value, now: &str) -> Value {
    let mut merged = old.as_object().cloned().unwrap_or_default();
    for (field, value) in new.as_object().into_iter().flatten() {
        if field != "conditions" && !value.is_null() {
            merged.insert(field.clone(), value.clone());
        }
    }
    let conditions = |status: &Value| status["conditions"].as_array().cloned().unwrap_or_default();
    let mut all = conditions(old);
    for mut condition in conditions(new) {
        let place = all
            .iter()
            .position(|other| other["type"] == condition["type"]);
        let before = place.map(|place| all[place].clone()).unwrap_or_default();
        let since = Some(&before["lastTransitionTime"])
            .filter(|since| since.is_string() && before["status"] == condition["status"]);
        condition["lastTransitionTime"] = since.cloned().unwrap_or_else(|| json!(now));
        condition["lastHeartbeatTime"] = json!(now);
        match place {
            Some(place) => all[place] = condition,
            None => all.push(condition),
        }
    }
    if !all.is_empty() {
        merged.insert("conditions".into(), Value::Array(all));
    }
    Value::Object(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(incarnation: u64) -> proto::Hello {
        proto::Hello {
            node: "n".into(),
            incarnation,
            ..Default::default()
        }
    }

    #[test]
    fn registration_keeps_what_users_wrote() {
        let old = json!({"metadata": {"name": "n", "labels": {"rack": "7", "kubernetes.io/os": "x"}},
            "spec": {"taints": [{"key": "k"}]}});
        let machine = json!({"metadata": {"labels": {"kubernetes.io/os": "linux"}}});
        let new = merge_metadata(&old, &hello(3), &machine).unwrap();
        assert_eq!(
            new["metadata"]["labels"],
            json!({"rack": "7", "kubernetes.io/os": "linux"})
        );
        assert_eq!(new["metadata"]["annotations"][INCARNATION_ANNOTATION], "3");
        assert_eq!(new["spec"], old["spec"]);
    }

    #[test]
    fn an_older_agent_start_is_refused() {
        let old = json!({"metadata": {"annotations": {INCARNATION_ANNOTATION: "4"}}});
        assert!(merge_metadata(&old, &hello(4), &json!({})).is_ok());
        let status = merge_metadata(&old, &hello(3), &json!({})).unwrap_err();
        assert_eq!(status.reason, Reason::Conflict);
    }

    #[test]
    fn a_condition_keeps_its_time_until_it_changes() {
        let old = json!({"conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "t0"},
            {"type": "NetworkUnavailable", "status": "False", "lastTransitionTime": "t0"}]});
        let same = json!({"conditions": [{"type": "Ready", "status": "True"}]});
        let merged = merge_status(&old, &same, "t1");
        assert_eq!(merged["conditions"][0]["lastTransitionTime"], "t0");
        assert_eq!(merged["conditions"][1]["type"], "NetworkUnavailable");
        let other = json!({"conditions": [{"type": "Ready", "status": "False"}]});
        let merged = merge_status(&old, &other, "t1");
        assert_eq!(merged["conditions"][0]["lastTransitionTime"], "t1");
    }
}
