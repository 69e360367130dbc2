//! A manifest file of this node as pods: the same door as the API's, and what only a node may not do.
//!
//! Pure but for the reading of the file. Source: Kubernetes `pkg/kubelet/config/{file,common}.go`.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use gantry_api::admission;
use gantry_api::k8s_openapi::api::core::v1::{Pod, Toleration};
use gantry_api::kinds::resolve;
use gantry_api::manifest::documents;
use gantry_api::validation::{MIRROR_ANNOTATION, SYSTEM_PRIORITIES};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::plan::Wanted;

/// Longest manifest.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Pods in one file.
const POD_COUNT_MAX: usize = 64;
/// Says where a pod is from.
const SOURCE_ANNOTATION: &str = "kubernetes.io/config.source";

/// Whether this is a static pod, as this node runs it.
pub fn is_static(pod: &Pod) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    annotations.is_some_and(|all| {
        all.get(SOURCE_ANNOTATION)
            .is_some_and(|from| from == "file")
    })
}

/// Whether a file of the directory is a manifest: editors leave others behind.
pub fn is_manifest(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    !name.starts_with('.')
        && [".yaml", ".yml", ".json"]
            .iter()
            .any(|end| name.ends_with(end))
}

/// The pods of a file, or in words what is wrong with it and where.
pub fn read(path: &Path, node: &str) -> Result<Vec<Wanted>, String> {
    let mut text = String::new();
    // A pipe must not hold the agent up until somebody writes.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(|error| format!("cannot be opened: {error}"))?;
    let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
    if !is_file {
        return Err("is no regular file".into());
    }
    // One byte more than allowed tells that there is more.
    let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(|error| format!("cannot be read: {error}"))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("is longer than {FILE_BYTES_MAX} bytes"));
    }
    pods(&path.to_string_lossy(), &text, node)
}

fn pods(name: &str, text: &str, node: &str) -> Result<Vec<Wanted>, String> {
    let documents = documents(name, text).map_err(|error| error.to_string())?;
    if documents.len() > POD_COUNT_MAX {
        return Err(format!("holds more than {POD_COUNT_MAX} pods"));
    }
    let lines = document_lines(text);
    let is_one_each = lines.len() == documents.len();
    let mut wanted = Vec::new();
    for (index, object) in documents.into_iter().enumerate() {
        let digest: String = Sha256::digest(object.to_string())
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let pod = pod(object, node).map_err(|words| {
            let from = lines.get(index).filter(|_| is_one_each).copied();
            let first = from.unwrap_or(1);
            format!("line {}: {words}", line_of(text, first, &words))
        })?;
        wanted.push(Wanted { digest, pod });
    }
    Ok(wanted)
}

/// The lines at which YAML documents with anything in them begin, from 1.
fn document_lines(text: &str) -> Vec<usize> {
    let mut lines = Vec::new();
    let mut is_new = true;
    for (index, line) in text.lines().enumerate() {
        if line.trim_end() == "---" {
            is_new = true;
        } else if is_new && !line.trim().is_empty() && !line.trim_start().starts_with('#') {
            is_new = false;
            lines.push(index + 1);
        }
    }
    lines
}

/// Where a field that a sentence begins with, or names in quotes, stands: its keys are looked for
/// one after the other from the document's first line on, as far as they are found.
fn line_of(text: &str, first: usize, words: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    let path = words
        .split([' ', '"', ',', ':'])
        .find(|word| word.starts_with("spec.") || word.starts_with("metadata."))
        .unwrap_or_default();
    let mut at = first.saturating_sub(1);
    for part in path.split('.') {
        let (key, index) = part.split_once('[').unwrap_or((part, "0]"));
        let is_key = |line: &&str| {
            let line = line.trim_start_matches([' ', '-', '"', '{', '[']);
            let rest = line.strip_prefix(key);
            rest.is_some_and(|rest| rest.trim_start_matches('"').starts_with(':'))
        };
        let rest = lines.get(at..).unwrap_or_default();
        let Some(offset) = rest.iter().position(is_key) else {
            break;
        };
        at += offset;
        if index != "0]" {
            break; // items are not told apart here
        }
    }
    at + 1
}

fn pod(mut object: Value, node: &str) -> Result<Pod, String> {
    let kind = object["kind"].as_str().unwrap_or_default();
    if kind != "Pod" || object["apiVersion"] != "v1" {
        return Err(format!(
            "holds a {kind:?}: static manifests are v1 Pods, nothing else"
        ));
    }
    if !(object["metadata"].is_object() && object["spec"].is_object()) {
        return Err("a pod needs metadata and spec".into());
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    if name.is_empty() {
        return Err("metadata.name is missing".into());
    }
    object["metadata"]["name"] = json!(format!("{name}-{node}"));
    if object["metadata"]["namespace"].is_null() {
        object["metadata"]["namespace"] = json!("default");
    }
    match object["spec"]["nodeName"].as_str() {
        None | Some("") => object["spec"]["nodeName"] = json!(node),
        Some(other) if other == node => {}
        Some(other) => {
            return Err(format!("spec.nodeName: is {other}, this node is {node}"));
        }
    }
    annotate(&mut object["metadata"]["annotations"])?;
    let mut references = Vec::new();
    api_references(&object["spec"], "spec", &mut references);
    if let Some(path) = references.first() {
        return Err(format!(
            "{path}: a static pod cannot refer to an object of the API"
        ));
    }
    set_priority(&mut object["spec"])?;
    let kind = resolve("pods").ok_or("this build does not know pods")?;
    let prepared = admission::prepare_create_value(kind, object, true);
    let prepared = prepared.map_err(|status| status.message)?;
    let mut pod: Pod =
        serde_json::from_value(prepared.object).map_err(|error| error.to_string())?;
    // Nobody but the file ends it.
    let spec = pod.spec.get_or_insert_default();
    let always = Toleration {
        effect: Some("NoExecute".into()),
        operator: Some("Exists".into()),
        ..Toleration::default()
    };
    let tolerations = spec.tolerations.get_or_insert_default();
    if !tolerations.contains(&always) {
        tolerations.push(always);
    }
    Ok(pod)
}

fn annotate(annotations: &mut Value) -> Result<(), String> {
    if annotations.is_null() {
        *annotations = json!({});
    }
    let Some(annotations) = annotations.as_object_mut() else {
        return Err("metadata.annotations: is no map".into());
    };
    if annotations.contains_key(MIRROR_ANNOTATION) {
        return Err(format!(
            "metadata.annotations: {MIRROR_ANNOTATION} is for mirror pods, which nobody writes by hand"
        ));
    }
    annotations.insert(SOURCE_ANNOTATION.into(), json!("file"));
    Ok(())
}

/// Only the classes that every cluster has are known without one.
fn set_priority(spec: &mut Value) -> Result<(), String> {
    let class = spec["priorityClassName"].as_str().unwrap_or_default();
    let value = match class {
        "" => return Ok(()),
        class => SYSTEM_PRIORITIES.iter().find(|(name, _)| *name == class),
    };
    let Some((_, value)) = value else {
        return Err(format!(
            "spec.priorityClassName: a static pod cannot refer to an object of the API but for \
             system-cluster-critical and system-node-critical; this is {class}"
        ));
    };
    spec["priority"] = json!(value);
    Ok(())
}

/// Paths of fields that name ConfigMaps, Secrets, claims or accounts.
fn api_references(value: &Value, path: &str, found: &mut Vec<String>) {
    const FIELDS: [&str; 15] = [
        "configMap",
        "configMapRef",
        "configMapKeyRef",
        "secret",
        "secretRef",
        "secretKeyRef",
        "persistentVolumeClaim",
        "ephemeral",
        "resourceClaims",
        "serviceAccountToken",
        "serviceAccount",
        "serviceAccountName",
        "imagePullSecrets",
        "nodePublishSecretRef",
        "clusterTrustBundle",
    ];
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = format!("{path}.{name}");
                let is_label_map = path == "spec.nodeSelector";
                if is_label_map {
                    continue;
                }
                if FIELDS.contains(&name.as_str()) && !value.is_null() {
                    found.push(path);
                } else {
                    api_references(value, &path, found);
                }
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                api_references(value, &format!("{path}[{index}]"), found);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  containers: [{name: main, image: nginx}]
";

    #[test]
    fn a_pod_is_defaulted_named_after_the_node_and_bound_to_it() {
        let pods = pods("web.yaml", WEB, "n1").unwrap();
        let [Wanted { pod, .. }] = &pods[..] else {
            panic!("{pods:?}")
        };
        assert_eq!(pod.metadata.name.as_deref(), Some("web-n1"));
        assert_eq!(pod.metadata.namespace.as_deref(), Some("default"));
        let spec = pod.spec.as_ref().unwrap();
        assert_eq!(spec.node_name.as_deref(), Some("n1"));
        assert_eq!(spec.restart_policy.as_deref(), Some("Always"));
        assert!(is_static(pod));
    }

    #[test]
    fn what_is_written_decides_and_not_how() {
        let digest = |text: &str| pods("w", text, "n").unwrap()[0].digest.clone();
        let commented = WEB.replace("kind: Pod", "kind: Pod # the web");
        assert_eq!(digest(WEB), digest(&commented));
        assert_ne!(digest(WEB), digest(&WEB.replace("nginx", "nginx:2")));
    }

    #[test]
    fn what_cannot_be_is_refused_by_line_and_path() {
        let of = |text: &str| pods("x.yaml", text, "n1").unwrap_err();
        assert!(of("kind: Deployment\napiVersion: apps/v1\n").contains("Deployment"));
        assert!(of(&WEB.replace("name: web", "labels: {}")).contains("metadata.name"));
        assert!(of(&format!("{WEB}  nodeName: other\n")).starts_with("line 6: spec.nodeName"));
        for (field, path) in [
            (
                "volumes: [{name: v, configMap: {name: c}}]",
                "volumes[0].configMap",
            ),
            (
                "volumes: [{name: v, secret: {secretName: c}}]",
                "volumes[0].secret",
            ),
            (
                "volumes: [{name: v, csi: {driver: d, nodePublishSecretRef: {name: c}}}]",
                "volumes[0].csi.nodePublishSecretRef",
            ),
            (
                "volumes: [{name: v, persistentVolumeClaim: {claimName: c}}]",
                "volumes[0].persistentVolumeClaim",
            ),
            (
                "volumes: [{name: v, projected: {sources: [{serviceAccountToken: {path: t}}]}}]",
                "volumes[0].projected.sources[0].serviceAccountToken",
            ),
            ("serviceAccountName: a", "serviceAccountName"),
            ("imagePullSecrets: [{name: s}]", "imagePullSecrets"),
            ("priorityClassName: gold", "priorityClassName"),
        ] {
            let words = of(&format!("{WEB}  {field}\n"));
            let begin = format!("line 6: spec.{path}: ");
            assert!(words.starts_with(&begin), "{words}, wanted {begin}");
        }
        let env = WEB.replace(
            "image: nginx",
            "image: nginx, envFrom: [{secretRef: {name: s}}]",
        );
        assert!(of(&env).starts_with("line 5: spec.containers[0].envFrom[0].secretRef: "));
        let unknown = of(&format!("# a comment\n---\n{WEB}  nonsense: 1\n"));
        assert!(unknown.starts_with("line 8: "), "{unknown}");
        assert!(unknown.contains("nonsense"), "{unknown}");
        assert!(of("kind: Pod\nmetadata: [").contains("line 2"));
        let mirror = WEB.replace(
            "{name: web}",
            "{name: web, annotations: {kubernetes.io/config.mirror: x}}",
        );
        assert!(of(&mirror).contains("mirror"));
    }

    #[test]
    fn only_manifests_are_read() {
        for (name, is) in [
            ("a.yaml", true),
            ("a.json", true),
            (".a.yaml", false),
            ("a.yaml~", false),
        ] {
            assert_eq!(is_manifest(Path::new(name)), is, "{name}");
        }
        let directory = tempfile::tempdir().unwrap();
        let long = directory.path().join("long.yaml");
        std::fs::write(&long, vec![b' '; (1 << 20) + 1]).unwrap();
        assert!(read(&long, "n").unwrap_err().contains("longer"));
        let pipe = directory.path().join("pipe.yaml");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read(&pipe, "n").unwrap_err().contains("no regular file"));
    }
}
