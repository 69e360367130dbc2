//! Whether a machine may have a node's name: pure.
//!
//! ```text
//!  nobody has it ───────────────────────────────────────────► Create
//!  this very key was let in before (an answer was lost) ────► Keep
//!  its agent is heard ──────────────────────────────────────► refused
//!  the same installation (machine id, memory of its pods) ──► Keep
//!  another machine got it and has not come yet ─────────────► refused
//!  silent, and no pod is bound to it ───────────────────────► TakeOver
//!  silent, with pods ───────────────────────────────────────► refused
//! ```
//! Why the last: a pod's UID may run on one node only. A machine without memory of the pods that are
//! bound to its name would start them while the old machine, cut off, may run them still.

use gantry_api::k8s_openapi::api::core::v1::Node;

use crate::feed::INCARNATION_ANNOTATION;

/// On the Node: the digests of the keys whose certificates speak for it, newest first.
pub const KEYS_ANNOTATION: &str = "gantry.io/joined-keys";
/// On the Node: the machine that joined under this name.
pub const MACHINE_ANNOTATION: &str = "gantry.io/machine-id";
/// The key in use and the one before: the renewed certificate is on its way.
const KEYS_MAX: usize = 2;

/// What the machine says of itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine<'a> {
    pub(super) key_hash: &'a str,
    pub(super) machine_id: &'a str,
    pub(super) incarnation: u64,
}

/// What happens to the Node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// It is made.
    Create,
    /// It stays, with this key.
    Keep,
    /// It stays, with this key and nothing of the machine before.
    TakeOver,
}

fn annotation<'a>(node: &'a Node, name: &str) -> &'a str {
    let annotations = node.metadata.annotations.as_ref();
    annotations
        .and_then(|all| all.get(name))
        .map(String::as_str)
        .unwrap_or_default()
}

/// The keys that speak for a node.
pub(super) fn keys(node: &Node) -> impl Iterator<Item = &str> {
    annotation(node, KEYS_ANNOTATION)
        .split(',')
        .filter(|key| !key.is_empty())
}

/// The annotation with a key before the others.
pub(super) fn with_key(old: &str, key: &str) -> String {
    let others = old
        .split(',')
        .filter(|other| !other.is_empty() && *other != key);
    let all: Vec<&str> = std::iter::once(key).chain(others).take(KEYS_MAX).collect();
    all.join(",")
}

/// Whether the control plane hears the node: the agent's word on Ready stands.
fn is_heard(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|s| s.conditions.as_ref());
    let ready = conditions.and_then(|all| all.iter().find(|c| c.type_ == "Ready"));
    ready.is_some_and(|ready| ready.status != "Unknown")
}

/// See the module.
///
/// * `connected` – a stream of the node's agent is open.
/// * `pods` – pods bound to the node that have not ended.
///
/// # Errors
/// In words: why not, and what to do.
pub(super) fn decide(
    name: &str,
    node: Option<&Node>,
    machine: Machine<'_>,
    connected: bool,
    pods: usize,
) -> Result<Admission, String> {
    let Some(node) = node else {
        return Ok(Admission::Create);
    };
    if keys(node).any(|key| key == machine.key_hash) {
        return Ok(Admission::Keep);
    }
    if connected || is_heard(node) {
        return Err(format!(
            "node name {name} is taken by a node that is alive: choose another one with --node-name; if \
             that node is no more, wait until it is NotReady, or run: gantry delete node {name}"
        ));
    }
    let info = node.status.as_ref().and_then(|s| s.node_info.as_ref());
    let last = info
        .map(|info| info.machine_id.as_str())
        .filter(|id| !id.is_empty());
    let last = last.unwrap_or_else(|| annotation(node, MACHINE_ANNOTATION));
    let is_same = !machine.machine_id.is_empty() && last == machine.machine_id;
    let registered: Option<u64> = annotation(node, INCARNATION_ANNOTATION).parse().ok();
    if is_same && registered.is_none_or(|last| machine.incarnation >= last) {
        return Ok(Admission::Keep);
    }
    if registered.is_none() && !last.is_empty() {
        return Err(format!(
            "node name {name} was given to another machine, which has not come yet: choose another one \
             with --node-name; if it will not come, run: gantry delete node {name}"
        ));
    }
    if pods > 0 {
        return Err(format!(
            "node {name} is silent and {pods} of its pods may still run: if that machine is no more (or \
             was reset), run: gantry delete node {name}, then join again"
        ));
    }
    Ok(Admission::TakeOver)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(ready: &str, machine: &str, incarnation: Option<u64>, keys: &str) -> Node {
        let mut node = json!({"metadata": {"annotations": {KEYS_ANNOTATION: keys}}, "status": {
            "conditions": [{"type": "Ready", "status": ready}]}});
        match incarnation {
            Some(number) => {
                node["metadata"]["annotations"][INCARNATION_ANNOTATION] = json!(number.to_string());
                node["status"]["nodeInfo"] = json!({"machineID": machine, "architecture": "",
                    "bootID": "", "containerRuntimeVersion": "", "kernelVersion": "",
                    "kubeProxyVersion": "", "kubeletVersion": "", "operatingSystem": "",
                    "osImage": "", "systemUUID": ""});
            }
            None => node["metadata"]["annotations"][MACHINE_ANNOTATION] = json!(machine),
        }
        serde_json::from_value(node).unwrap()
    }

    fn machine<'a>(key_hash: &'a str, machine_id: &'a str, incarnation: u64) -> Machine<'a> {
        Machine {
            key_hash,
            machine_id,
            incarnation,
        }
    }

    fn judge(node: &Node, machine: Machine<'_>, connected: bool, pods: usize) -> String {
        match decide("n", Some(node), machine, connected, pods) {
            Ok(admission) => format!("{admission:?}"),
            Err(words) => words,
        }
    }

    #[test]
    fn the_name_of_a_living_node_is_taken_and_everybody_elses_is_judged() {
        let new = machine("k9", "other", 0);
        assert_eq!(decide("n", None, new, false, 0), Ok(Admission::Create));
        for ready in ["True", "False"] {
            let alive = node(ready, "m", Some(5), "k1");
            assert!(judge(&alive, new, false, 0).contains("alive"));
            assert_eq!(judge(&alive, machine("k1", "m", 5), true, 3), "Keep");
        }
        let silent = node("Unknown", "m", Some(5), "k1,k0");
        assert!(
            judge(&silent, new, true, 0).contains("alive"),
            "its stream is open"
        );
        assert_eq!(judge(&silent, machine("k0", "", 0), false, 3), "Keep");
        assert_eq!(judge(&silent, machine("k9", "m", 5), false, 3), "Keep");
        let reset = judge(&silent, machine("k9", "m", 0), false, 3);
        assert!(
            reset.contains("3 of its pods") && reset.contains("gantry delete node n"),
            "{reset}"
        );
        assert_eq!(judge(&silent, machine("k9", "m", 0), false, 0), "TakeOver");
        assert_eq!(judge(&silent, new, false, 0), "TakeOver");
        let expected = node("Unknown", "m", None, "k1");
        assert!(judge(&expected, new, false, 0).contains("not come yet"));
        assert_eq!(judge(&expected, machine("k9", "m", 0), false, 0), "Keep");
    }

    #[test]
    fn a_node_has_its_newest_key_and_the_one_before() {
        assert_eq!(with_key("", "a"), "a");
        assert_eq!(with_key("a", "b"), "b,a");
        assert_eq!(with_key("b,a", "c"), "c,b");
        assert_eq!(with_key("b,a", "a"), "a,b");
    }
}
