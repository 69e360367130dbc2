//! The kinds that Gantry serves: one static table for names, groups and scope.
//!
//! Everything that turns a word into a kind (URLs, `gantry get po`, manifests, store keys) reads
//! this table, so a kind is added here once. The names are Kubernetes' own, see `kubectl
//! api-resources`.

/// One kind: where it lives in the API and how people call it.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// API group; empty for the core group.
    pub group: &'static str,
    /// API version inside the group.
    pub version: &'static str,
    /// `Deployment`.
    pub kind: &'static str,
    /// `deployments`: lower case, as in URLs and store keys.
    pub plural: &'static str,
    /// `deployment`.
    pub singular: &'static str,
    /// `deploy`.
    pub short_names: &'static [&'static str],
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// Whether `.status` is a subresource: writes to the object leave it alone.
    pub has_status: bool,
    /// Whether `get all` includes it.
    pub in_all: bool,
}

const fn core(
    kind: &'static str,
    plural: &'static str,
    singular: &'static str,
    short_names: &'static [&'static str],
    namespaced: bool,
) -> Kind {
    Kind {
        group: "",
        version: "v1",
        kind,
        plural,
        singular,
        short_names,
        namespaced,
        has_status: false,
        in_all: false,
    }
}

const fn grouped(
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    singular: &'static str,
    short_names: &'static [&'static str],
) -> Kind {
    Kind {
        group,
        ..core(kind, plural, singular, short_names, true)
    }
}

/// Every kind, in the order in which `api-resources` prints them.
pub static KINDS: &[Kind] = &[
    core("ConfigMap", "configmaps", "configmap", &["cm"], true),
    core("Event", "events", "event", &["ev"], true),
    core("LimitRange", "limitranges", "limitrange", &["limits"], true),
    Kind {
        has_status: true,
        ..core("Namespace", "namespaces", "namespace", &["ns"], false)
    },
    Kind {
        has_status: true,
        ..core("Node", "nodes", "node", &["no"], false)
    },
    Kind {
        has_status: true,
        in_all: true,
        ..core("Pod", "pods", "pod", &["po"], true)
    },
    Kind {
        has_status: true,
        in_all: true,
        ..core(
            "ReplicationController",
            "replicationcontrollers",
            "replicationcontroller",
            &["rc"],
            true,
        )
    },
    Kind {
        has_status: true,
        ..core(
            "PersistentVolumeClaim",
            "persistentvolumeclaims",
            "persistentvolumeclaim",
            &["pvc"],
            true,
        )
    },
    Kind {
        has_status: true,
        ..core(
            "PersistentVolume",
            "persistentvolumes",
            "persistentvolume",
            &["pv"],
            false,
        )
    },
    Kind {
        has_status: true,
        ..core(
            "ResourceQuota",
            "resourcequotas",
            "resourcequota",
            &["quota"],
            true,
        )
    },
    core("Secret", "secrets", "secret", &[], true),
    Kind {
        has_status: true,
        in_all: true,
        ..core("Service", "services", "service", &["svc"], true)
    },
    core(
        "ServiceAccount",
        "serviceaccounts",
        "serviceaccount",
        &["sa"],
        true,
    ),
    Kind {
        has_status: true,
        in_all: true,
        ..grouped(
            "apps",
            "Deployment",
            "deployments",
            "deployment",
            &["deploy"],
        )
    },
    Kind {
        has_status: true,
        in_all: true,
        ..grouped("apps", "ReplicaSet", "replicasets", "replicaset", &["rs"])
    },
    Kind {
        has_status: true,
        in_all: true,
        ..grouped("apps", "DaemonSet", "daemonsets", "daemonset", &["ds"])
    },
    Kind {
        has_status: true,
        in_all: true,
        ..grouped(
            "apps",
            "StatefulSet",
            "statefulsets",
            "statefulset",
            &["sts"],
        )
    },
    grouped(
        "apps",
        "ControllerRevision",
        "controllerrevisions",
        "controllerrevision",
        &[],
    ),
    Kind {
        version: "v2",
        has_status: true,
        in_all: true,
        ..grouped(
            "autoscaling",
            "HorizontalPodAutoscaler",
            "horizontalpodautoscalers",
            "horizontalpodautoscaler",
            &["hpa"],
        )
    },
    Kind {
        has_status: true,
        in_all: true,
        ..grouped("batch", "Job", "jobs", "job", &[])
    },
    Kind {
        has_status: true,
        in_all: true,
        ..grouped("batch", "CronJob", "cronjobs", "cronjob", &["cj"])
    },
    Kind {
        has_status: true,
        ..grouped(
            "policy",
            "PodDisruptionBudget",
            "poddisruptionbudgets",
            "poddisruptionbudget",
            &["pdb"],
        )
    },
    Kind {
        namespaced: false,
        ..grouped(
            "scheduling.k8s.io",
            "PriorityClass",
            "priorityclasses",
            "priorityclass",
            &["pc"],
        )
    },
    Kind {
        namespaced: false,
        ..grouped(
            "storage.k8s.io",
            "StorageClass",
            "storageclasses",
            "storageclass",
            &["sc"],
        )
    },
    grouped("rbac.authorization.k8s.io", "Role", "roles", "role", &[]),
    grouped(
        "rbac.authorization.k8s.io",
        "RoleBinding",
        "rolebindings",
        "rolebinding",
        &[],
    ),
    Kind {
        namespaced: false,
        ..grouped(
            "rbac.authorization.k8s.io",
            "ClusterRole",
            "clusterroles",
            "clusterrole",
            &[],
        )
    },
    Kind {
        namespaced: false,
        ..grouped(
            "rbac.authorization.k8s.io",
            "ClusterRoleBinding",
            "clusterrolebindings",
            "clusterrolebinding",
            &[],
        )
    },
    grouped("coordination.k8s.io", "Lease", "leases", "lease", &[]),
    grouped(
        "discovery.k8s.io",
        "EndpointSlice",
        "endpointslices",
        "endpointslice",
        &[],
    ),
    grouped(
        "networking.k8s.io",
        "NetworkPolicy",
        "networkpolicies",
        "networkpolicy",
        &["netpol"],
    ),
];

impl Kind {
    /// `apps/v1`, or `v1` in the core group.
    #[must_use]
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// `deployments.apps`, or `pods`: how errors name the resource.
    #[must_use]
    pub fn qualified_resource(&self) -> String {
        qualified(self.plural, self.group)
    }

    /// `deployment.apps`, or `pod`: how `apply` and `delete` name an object's type.
    #[must_use]
    pub fn qualified_singular(&self) -> String {
        qualified(self.singular, self.group)
    }

    /// `Deployment.apps`, or `Pod`: how validation errors name the kind.
    #[must_use]
    pub fn qualified_kind(&self) -> String {
        qualified(self.kind, self.group)
    }

    /// The object's key in the store; `namespace` is ignored for cluster-scoped kinds.
    #[must_use]
    pub fn store_key(&self, namespace: &str, name: &str) -> String {
        format!("{}{name}", self.store_prefix(Some(namespace)))
    }

    /// The prefix of all keys of this kind, or of those in one namespace. Ends with `/`.
    #[must_use]
    pub fn store_prefix(&self, namespace: Option<&str>) -> String {
        match namespace {
            Some(namespace) if self.namespaced && !namespace.is_empty() => {
                format!("/registry/{}/{namespace}/", self.plural)
            }
            _ => format!("/registry/{}/", self.plural),
        }
    }
}

fn qualified(name: &str, group: &str) -> String {
    if group.is_empty() {
        name.to_owned()
    } else {
        format!("{name}.{group}")
    }
}

/// The kind with this plural; `group` may be empty when the plural is unique.
#[must_use]
pub fn by_plural(group: &str, plural: &str) -> Option<&'static Kind> {
    KINDS
        .iter()
        .find(|k| k.plural == plural && (group.is_empty() || k.group == group))
}

/// The kind with this group, version and name.
#[must_use]
pub fn by_gvk(group: &str, version: &str, kind: &str) -> Option<&'static Kind> {
    KINDS
        .iter()
        .find(|k| k.group == group && k.version == version && k.kind == kind)
}

/// The kind that an object's `apiVersion` and `kind` name.
#[must_use]
pub fn by_api_version(api_version: &str, kind: &str) -> Option<&'static Kind> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    by_gvk(group, version, kind)
}

/// The kind of a Kubernetes type, e.g. `of::<Pod>()`; `None` when Gantry does not serve it.
#[must_use]
pub fn of<K: k8s_openapi::Resource>() -> Option<&'static Kind> {
    by_gvk(K::GROUP, K::VERSION, K::KIND)
}

/// The kind that a user's word means: plural, singular, short name or kind, in any case, with an
/// optional group (`deploy`, `deployments.apps`, `Deployment.v1.apps`).
#[must_use]
pub fn resolve(word: &str) -> Option<&'static Kind> {
    let word = word.to_ascii_lowercase();
    let (name, group) = match word.split_once('.') {
        None => (word.as_str(), None),
        Some((name, rest)) => {
            // "v1.apps" and "v1." name the version first.
            let group = match rest.split_once('.') {
                Some((version, group)) if KINDS.iter().any(|k| k.version == version) => group,
                _ => rest,
            };
            (name, Some(group))
        }
    };
    KINDS.iter().find(|k| {
        group.is_none_or(|g| g == k.group)
            && (k.plural == name
                || k.singular == name
                || k.short_names.contains(&name)
                || k.kind.eq_ignore_ascii_case(name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_word_names_one_kind() {
        let mut seen = BTreeSet::new();
        for kind in KINDS {
            let mut words = vec![kind.plural, kind.singular];
            words.extend(kind.short_names);
            for word in words {
                assert!(seen.insert(word), "{word} names two kinds");
                assert_eq!(resolve(word), Some(kind));
            }
            assert_eq!(resolve(kind.kind), Some(kind));
            assert_eq!(by_plural("", kind.plural), Some(kind));
            assert_eq!(by_plural(kind.group, kind.plural), Some(kind));
            assert_eq!(by_api_version(&kind.api_version(), kind.kind), Some(kind));
        }
    }

    #[test]
    fn groups_and_versions_in_a_word_must_match() {
        let deployment = by_gvk("apps", "v1", "Deployment");
        assert!(deployment.is_some());
        assert_eq!(resolve("deploy.apps"), deployment);
        assert_eq!(resolve("deployments.v1.apps"), deployment);
        assert_eq!(resolve("deployments.batch"), None);
        assert_eq!(resolve("Pod.v1."), by_gvk("", "v1", "Pod"));
        assert_eq!(resolve("ingresses"), None);
        assert_eq!(of::<k8s_openapi::api::apps::v1::Deployment>(), deployment);
    }

    #[test]
    fn keys_follow_the_scope() {
        let pod = resolve("po").unwrap();
        let node = resolve("no").unwrap();
        assert_eq!(pod.store_key("a", "b"), "/registry/pods/a/b");
        assert_eq!(node.store_key("", "b"), "/registry/nodes/b");
        assert_eq!(node.store_key("ignored", "b"), "/registry/nodes/b");
        assert_eq!(pod.store_prefix(None), "/registry/pods/");
    }
}
