//! Admission that looks at other objects: what a pod's account, class of priority and a claim's class say.
//!
//! | object | gets |
//! |---|---|
//! | Pod | `serviceAccountName`, the account's pull secrets and its token, `priority` and `preemptionPolicy` of its class, for how long it stays on a node that is not ready or not heard of |
//! | PersistentVolumeClaim | the default class when it names none |
//!
//! Pure but for the look-ups. Source: Kubernetes' plugins ServiceAccount, Priority, DefaultStorageClass,
//! DefaultTolerationSeconds.

use gantry_api::k8s_openapi::api::core::v1::{ServiceAccount, Taint, Toleration};
use gantry_api::k8s_openapi::api::scheduling::v1::PriorityClass;
use gantry_api::k8s_openapi::api::storage::v1::StorageClass;
use gantry_api::kinds::Kind;
use gantry_api::status::Status;
use gantry_api::validation::{MIRROR_ANNOTATION, SYSTEM_PRIORITIES};
use serde_json::{Value, json};

use super::object::metadata_text;
use super::registry::{Patience, Registry};
use super::rules::generated_name;
use crate::controllers::PROVISIONER;
use crate::controllers::taint_eviction::tolerates;

/// The account of pods that name none; the one account that may still be missing.
const DEFAULT_ACCOUNT: &str = "default";
/// Where programs look for the account's token, the API's certificate and their namespace.
const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// What the name of the volume begins with that holds them.
const TOKEN_VOLUME_PREFIX: &str = "kube-api-access-";
/// Kubernetes' odd number tells tokens that pods get by default from those that ask for an hour.
const TOKEN_LIFE_S: i64 = 3607;
/// The annotation of the class of claims that name none.
const DEFAULT_CLASS: &str = "storageclass.kubernetes.io/is-default-class";
/// The class whose volumes are directories of a node.
const LOCAL_CLASS: &str = "local";

/// Classes that every cluster has from its first start: plural and object.
pub(super) fn default_classes() -> Vec<(&'static str, Value)> {
    let mut classes = vec![(
        "storageclasses",
        json!({
            "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass",
            "metadata": {"name": LOCAL_CLASS, "annotations": {DEFAULT_CLASS: "true"}},
            "provisioner": PROVISIONER, "reclaimPolicy": "Delete",
            "volumeBindingMode": "WaitForFirstConsumer",
        }),
    )];
    classes.extend(SYSTEM_PRIORITIES.iter().map(|(name, value)| {
        let class = json!({
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass",
            "metadata": {"name": name}, "value": value,
        });
        ("priorityclasses", class)
    }));
    classes
}

/// What a pod gets from its class of priority.
fn set_priority(
    kind: &Kind,
    pod: &mut Value,
    named: Option<&PriorityClass>,
    default: Option<&PriorityClass>,
) -> Result<(), Status> {
    let pod_name = metadata_text(pod, "name").to_owned();
    let spec = &mut pod["spec"];
    let asked = spec["priorityClassName"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let class = match (asked.as_str(), named) {
        ("", _) => default,
        (_, Some(class)) => Some(class),
        (asked, None) => {
            let detail = format!("no PriorityClass with name {asked} was found");
            return Err(Status::forbidden(kind, &pod_name, &detail));
        }
    };
    let value = class.and_then(|class| class.value).unwrap_or(0);
    // A number of the pod's own is only accepted when it is the class's.
    if spec["priority"]
        .as_i64()
        .is_some_and(|own| own != i64::from(value))
    {
        let detail = format!(
            "the integer value of priority ({}) must not be provided in pod spec; priority admission \
             controller computed {value} from the given PriorityClass name",
            spec["priority"]
        );
        return Err(Status::forbidden(kind, &pod_name, &detail));
    }
    spec["priority"] = json!(value);
    if let Some(class) = class {
        spec["priorityClassName"] = json!(class.metadata.name);
    }
    if spec["preemptionPolicy"].is_null() {
        let policy = class.and_then(|class| class.preemption_policy.clone());
        spec["preemptionPolicy"] = json!(policy.as_deref().unwrap_or("PreemptLowerPriority"));
    }
    Ok(())
}

/// What a pod gets from its account.
fn set_account(pod: &mut Value, name: &str, account: Option<&ServiceAccount>) {
    let spec = &mut pod["spec"];
    spec["serviceAccountName"] = json!(name);
    spec["serviceAccount"] = json!(name);
    let secrets = account.and_then(|account| account.image_pull_secrets.as_ref());
    let own = spec["imagePullSecrets"]
        .as_array()
        .is_some_and(|own| !own.is_empty());
    if let Some(secrets) = secrets.filter(|_| !own) {
        spec["imagePullSecrets"] = json!(secrets);
    }
}

/// Whether the pod's containers get its account's token: the pod says, else the account.
fn wants_token(pod: &Value, account: Option<&ServiceAccount>) -> bool {
    let own = pod["spec"]["automountServiceAccountToken"].as_bool();
    let accounts = account.and_then(|account| account.automount_service_account_token);
    own.or(accounts).unwrap_or(true)
}

/// Mounts the token, the certificate and the namespace where nothing else is mounted there.
fn mount_token(pod: &mut Value) {
    let spec = &mut pod["spec"];
    let is_ours = |volume: &Value| {
        let name = volume["name"].as_str().unwrap_or_default();
        name.starts_with(TOKEN_VOLUME_PREFIX)
    };
    // A pod that was read from the API and is made again brings its volume along.
    let held = spec["volumes"].as_array().and_then(|all| {
        let held = all.iter().find(|volume| is_ours(volume))?;
        held["name"].as_str().map(str::to_owned)
    });
    let name = held
        .clone()
        .unwrap_or_else(|| generated_name(TOKEN_VOLUME_PREFIX));
    let mut is_used = false;
    for list in ["initContainers", "containers"] {
        // Indexing would leave a null where there is no such list.
        let containers = spec.get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            let mounts = &mut container["volumeMounts"];
            let mut taken = mounts.as_array().into_iter().flatten();
            if taken.any(|mount| mount["mountPath"] == TOKEN_PATH) {
                continue;
            }
            let mount = json!({"name": name, "readOnly": true, "mountPath": TOKEN_PATH});
            push(mounts, mount);
            is_used = true;
        }
    }
    if is_used && held.is_none() {
        let volume = json!({"name": name, "projected": {"defaultMode": 0o644, "sources": [
            {"serviceAccountToken": {"expirationSeconds": TOKEN_LIFE_S, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt",
                "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace",
                "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}}]}});
        push(&mut spec["volumes"], volume);
    }
}

/// Gives a pod that says nothing of a node's end the time that it stays there.
fn set_patience(pod: &mut Value, patience: Patience) {
    let own = pod["spec"]["tolerations"].clone();
    // Validation has passed it.
    let Ok(own) = serde_json::from_value::<Option<Vec<Toleration>>>(own) else {
        return;
    };
    let mut all = own.unwrap_or_default();
    for (key, seconds) in [
        ("node.kubernetes.io/not-ready", patience.not_ready_s),
        ("node.kubernetes.io/unreachable", patience.unreachable_s),
    ] {
        let taint = Taint {
            key: key.to_owned(),
            effect: "NoExecute".to_owned(),
            ..Taint::default()
        };
        if !all.iter().any(|one| tolerates(one, &taint)) {
            all.push(Toleration {
                key: Some(key.to_owned()),
                operator: Some("Exists".to_owned()),
                effect: Some(taint.effect),
                toleration_seconds: Some(seconds),
                ..Toleration::default()
            });
        }
    }
    pod["spec"]["tolerations"] = json!(all);
}

/// Appends to a list that may not be there.
fn push(list: &mut Value, item: Value) {
    match list {
        Value::Array(list) => list.push(item),
        none => *none = json!([item]),
    }
}

impl Registry {
    /// Completes a new object by what other objects say.
    pub(super) fn admit(&self, kind: &'static Kind, object: &mut Value) -> Result<(), Status> {
        match kind.kind {
            "Pod" => self.admit_pod(kind, object),
            "PersistentVolumeClaim" => self.admit_claim(object),
            _ => Ok(()),
        }
    }

    fn admit_pod(&self, kind: &Kind, pod: &mut Value) -> Result<(), Status> {
        // It stands for a pod that a node has from a file: what it runs with is said there.
        let is_mirror = pod["metadata"]["annotations"].get(MIRROR_ANNOTATION);
        let is_mirror = is_mirror.is_some();
        let namespace = metadata_text(pod, "namespace").to_owned();
        let text = |field: &str| pod["spec"][field].as_str().unwrap_or_default().to_owned();
        let mut name = text("serviceAccountName");
        if name.is_empty() {
            DEFAULT_ACCOUNT.clone_into(&mut name);
        }
        let account: Option<ServiceAccount> = self.get(&namespace, &name)?;
        // Account `default` of a new namespace comes a moment later; the pod's token waits for it.
        if account.is_none() && name != DEFAULT_ACCOUNT {
            let detail = format!(
                "error looking up service account {namespace}/{name}: serviceaccount {name:?} not found"
            );
            return Err(Status::forbidden(kind, metadata_text(pod, "name"), &detail));
        }
        let class = text("priorityClassName");
        let named: Option<PriorityClass> = match class.as_str() {
            "" => None,
            class => self.get("", class)?,
        };
        let default = if class.is_empty() {
            let classes = self.list::<PriorityClass>(None)?.1.into_iter();
            let defaults = classes.filter(|class| class.global_default == Some(true));
            defaults.min_by_key(|class| class.value)
        } else {
            None
        };
        if !is_mirror {
            set_account(pod, &name, account.as_ref());
            if wants_token(pod, account.as_ref()) {
                mount_token(pod);
            }
            set_patience(pod, self.patience());
        }
        set_priority(kind, pod, named.as_ref(), default.as_ref())
    }

    fn admit_claim(&self, claim: &mut Value) -> Result<(), Status> {
        if !claim["spec"]["storageClassName"].is_null() {
            return Ok(());
        }
        let classes = self.list::<StorageClass>(None)?.1.into_iter();
        let is_default = |class: &StorageClass| {
            let annotations = class.metadata.annotations.as_ref();
            annotations
                .and_then(|all| all.get(DEFAULT_CLASS))
                .is_some_and(|v| v == "true")
        };
        // Of several the newest, as in Kubernetes.
        let newest = classes
            .filter(is_default)
            .max_by_key(|class| class.metadata.creation_timestamp.clone());
        if let Some(name) = newest.and_then(|class| class.metadata.name) {
            claim["spec"]["storageClassName"] = json!(name);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_api::kinds::resolve;

    fn class(name: &str, value: i32) -> PriorityClass {
        let class =
            json!({"metadata": {"name": name}, "value": value, "preemptionPolicy": "Never"});
        serde_json::from_value(class).unwrap()
    }

    #[test]
    fn a_class_gives_its_number_and_a_pod_cannot_give_its_own() {
        let kind = resolve("pod").unwrap();
        let (high, normal) = (class("high", 1000), class("normal", 5));
        let mut pod = json!({"metadata": {"name": "p"}, "spec": {"priorityClassName": "high"}});
        set_priority(kind, &mut pod, Some(&high), Some(&normal)).unwrap();
        assert_eq!(pod["spec"]["priority"], 1000);
        assert_eq!(pod["spec"]["preemptionPolicy"], "Never");
        let mut plain = json!({"metadata": {"name": "p"}, "spec": {}});
        set_priority(kind, &mut plain, None, Some(&normal)).unwrap();
        assert_eq!(plain["spec"]["priorityClassName"], "normal");
        let mut own = json!({"metadata": {"name": "p"}, "spec": {"priority": 7}});
        assert!(set_priority(kind, &mut own, None, Some(&normal)).is_err());
        let mut missing = json!({"metadata": {"name": "p"}, "spec": {"priorityClassName": "x"}});
        let status = set_priority(kind, &mut missing, None, None).unwrap_err();
        assert!(
            status.message.contains("no PriorityClass with name x"),
            "{status}"
        );
    }

    #[test]
    fn an_account_gives_its_pull_secrets_to_pods_without_any() {
        let account = json!({"metadata": {"name": "a"}, "imagePullSecrets": [{"name": "s"}]});
        let account: ServiceAccount = serde_json::from_value(account).unwrap();
        let mut pod = json!({"spec": {}});
        set_account(&mut pod, "a", Some(&account));
        assert_eq!(pod["spec"]["serviceAccountName"], "a");
        assert_eq!(pod["spec"]["imagePullSecrets"][0]["name"], "s");
    }

    #[test]
    fn a_pod_stays_300_s_on_a_node_that_has_gone_unless_it_says_otherwise() {
        let seconds = |tolerations: Value| -> Vec<(String, Value)> {
            let mut pod = json!({"spec": {"tolerations": tolerations}});
            set_patience(&mut pod, Patience::default());
            let all = pod["spec"]["tolerations"].as_array().unwrap().clone();
            let key = |one: &Value| one["key"].as_str().unwrap_or("*").to_owned();
            all.iter()
                .map(|one| (key(one), one["tolerationSeconds"].clone()))
                .collect()
        };
        let (not_ready, unreachable) = (
            "node.kubernetes.io/not-ready".to_owned(),
            "node.kubernetes.io/unreachable".to_owned(),
        );
        let both = [(not_ready.clone(), json!(300)), (unreachable, json!(300))];
        assert_eq!(seconds(Value::Null), both);
        let own = json!([{"key": not_ready, "operator": "Exists", "tolerationSeconds": 7,
            "effect": "NoExecute"}]);
        assert_eq!(seconds(own), [(not_ready, json!(7)), both[1].clone()]);
        assert_eq!(
            seconds(json!([{"operator": "Exists"}])),
            [("*".to_owned(), Value::Null)]
        );
    }

    #[test]
    fn the_pod_decides_about_its_token_and_then_the_account() {
        let account = |automount: Value| -> ServiceAccount {
            let account =
                json!({"metadata": {"name": "a"}, "automountServiceAccountToken": automount});
            serde_json::from_value(account).unwrap()
        };
        let (silent, not) = (account(Value::Null), account(json!(false)));
        for (pod, account, wanted) in [
            (Value::Null, None, true),
            (Value::Null, Some(&silent), true),
            (Value::Null, Some(&not), false),
            (json!(true), Some(&not), true),
            (json!(false), Some(&silent), false),
        ] {
            let pod = json!({"spec": {"automountServiceAccountToken": pod}});
            assert_eq!(wants_token(&pod, account), wanted, "{pod} {account:?}");
        }
    }

    #[test]
    fn every_container_gets_the_token_once_and_a_mount_of_its_own_wins() {
        let mut pod = json!({"spec": {
            "initContainers": [{"name": "i"}],
            "containers": [{"name": "a", "volumeMounts": [{"name": "x", "mountPath": "/x"}]},
                {"name": "b", "volumeMounts": [{"name": "x", "mountPath": TOKEN_PATH}]}],
            "volumes": [{"name": "x", "emptyDir": {}}]}});
        mount_token(&mut pod);
        let spec = &pod["spec"];
        let name = spec["volumes"][1]["name"].as_str().unwrap();
        assert!(
            name.starts_with(TOKEN_VOLUME_PREFIX) && name.len() == TOKEN_VOLUME_PREFIX.len() + 5
        );
        assert_eq!(spec["initContainers"][0]["volumeMounts"][0]["name"], name);
        assert_eq!(
            spec["containers"][0]["volumeMounts"][1]["mountPath"],
            TOKEN_PATH
        );
        assert_eq!(
            spec["containers"][1]["volumeMounts"]
                .as_array()
                .unwrap()
                .len(),
            1
        );
        let whole = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {
            "containers": [{"name": "a", "image": "a"}]}});
        let mut whole = whole;
        mount_token(&mut whole);
        let typed: gantry_api::k8s_openapi::api::core::v1::Pod =
            serde_json::from_value(whole.clone()).unwrap();
        let again = serde_json::to_value(&typed).unwrap();
        assert_eq!(again["spec"], whole["spec"], "an update would see a change");
        let errors = gantry_api::validation::pod(&typed);
        assert!(
            errors.iter().all(|e| !e.field.contains("volume")),
            "{errors:?}"
        );
        // The same again, as read from the API: nothing is added.
        let before = pod.clone();
        mount_token(&mut pod);
        assert_eq!(pod, before);
    }
}
