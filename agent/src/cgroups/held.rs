//! Limits that a pod asks for and this machine has no controller for. Pure.
//!
//! A pod with a memory limit is refused: run without, it could take the memory of its neighbours,
//! who rely on its limit. So is one that wants huge pages. CPU is given out anew all the time: a
//! pod without its CPU limit takes no more than one that never had any, so it runs and is told.

use gantry_api::k8s_openapi::api::core::v1::Pod;

use super::inspect::Lack;
use super::limits::{Limits, Policy, container_limits, pod_limits};
use super::requests::all_containers;

/// What becomes of a pod's limits on this machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Held {
    /// All are in the kernel's files.
    All,
    /// It runs without some, as these words say.
    Not(String),
    /// It must not run here, for this reason.
    Refused(String),
}

impl Limits {
    /// The controller that is missing for a limit which must hold, and what it is a limit of.
    pub(super) fn unheld<'a>(&self, lacks: &'a [Lack]) -> Option<(&'static str, &'a Lack)> {
        let lack = |name| lacks.iter().find(|lack| lack.controller == Some(name));
        if self.memory_limit_bytes.is_some()
            && let Some(lack) = lack("memory")
        {
            return Some(("a memory limit", lack));
        }
        if self.hugepages.values().any(|bytes| *bytes > 0)
            && let Some(lack) = lack("hugetlb")
        {
            return Some(("huge pages", lack));
        }
        None
    }
}

/// Whether a pod's limits can be held where `lacks` is what the machine lacks.
pub fn held(pod: &Pod, policy: &Policy, lacks: &[Lack]) -> Held {
    if lacks.iter().all(|lack| lack.controller.is_none()) {
        return Held::All;
    }
    let containers = pod.spec.iter().flat_map(all_containers);
    let mut all: Vec<(String, Limits)> = containers
        .map(|c| {
            let limits = container_limits(pod, c, policy);
            (format!("container {:?}", c.name), limits)
        })
        .collect();
    all.push(("the pod".to_owned(), pod_limits(pod, policy)));
    for (who, limits) in &all {
        if let Some((what, lack)) = limits.unheld(lacks) {
            return Held::Refused(format!(
                "{who} asks for {what}, which this node cannot hold: {lack}. Mend that and restart \
                 the agent, or choose another node, or take the limit away"
            ));
        }
    }
    let quota = all.iter().find(|(_, l)| l.cpu_quota_us.is_some());
    let lack = lacks.iter().find(|lack| lack.controller == Some("cpu"));
    match (quota, lack) {
        (Some((who, _)), Some(lack)) => Held::Not(format!(
            "{who} has a CPU limit and runs without it on this node: {lack}"
        )),
        _ => Held::All,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(resources: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({
            "spec": {"containers": [{"name": "free"}, {"name": "main", "resources": resources}]}
        }))
        .unwrap()
    }

    fn without(names: &[&'static str]) -> Vec<Lack> {
        let lack = |name: &&'static str| Lack {
            controller: Some(*name),
            what: format!("no {name}"),
            remedy: format!("mount {name}"),
        };
        names.iter().map(lack).collect()
    }

    fn on(resources: serde_json::Value, lacks: &[&'static str]) -> Held {
        held(&pod(resources), &Policy::default(), &without(lacks))
    }

    #[test]
    fn a_memory_limit_that_cannot_be_held_keeps_the_pod_from_running() {
        let limit = serde_json::json!({"limits": {"memory": "64Mi"}});
        let Held::Refused(words) = on(limit.clone(), &["memory"]) else {
            panic!("it would run without its limit");
        };
        for part in ["\"main\"", "a memory limit", "no memory", "mount memory"] {
            assert!(words.contains(part), "{part}: {words}");
        }
        assert_eq!(on(limit.clone(), &["cpu", "pids"]), Held::All);
        let request = serde_json::json!({"requests": {"memory": "64Mi"}});
        assert_eq!(on(request, &["memory"]), Held::All);
        let pages = serde_json::json!({"limits": {"hugepages-2Mi": "4Mi", "memory": "1Mi"}});
        assert!(matches!(on(pages, &["hugetlb"]), Held::Refused(_)));
    }

    #[test]
    fn a_cpu_limit_that_cannot_be_held_is_told() {
        let limit = serde_json::json!({"limits": {"cpu": "500m"}});
        let Held::Not(words) = on(limit.clone(), &["cpu"]) else {
            panic!("nobody is told");
        };
        assert!(
            words.contains("\"main\"") && words.contains("mount cpu"),
            "{words}"
        );
        assert_eq!(on(limit, &[]), Held::All);
        assert_eq!(
            on(serde_json::json!({}), &["cpu", "memory", "hugetlb"]),
            Held::All
        );
    }
}
