//! Rules for a pod's volumes and a container's mounts of them.

use super::pod::quantity;
use super::{each, names, one_of};
use crate::field::{FieldError, Path};
use crate::quantity::Quantity;
use k8s_openapi::api::core::v1::{
    Container, DownwardAPIVolumeFile, KeyToPath, ProjectedVolumeSource,
    ServiceAccountTokenProjection, Volume, VolumeMount,
};
use std::collections::BTreeSet;

/// A token lives at least this long: `MinTokenAgeSec` of Kubernetes' validation.
const TOKEN_LIFE_S_MIN: i64 = 10 * 60;
/// And at most this long.
const TOKEN_LIFE_S_MAX: i64 = 1 << 32;
/// `csiDriverNameMaxLength`, as the CSI specification has it.
const CSI_DRIVER_BYTES_MAX: usize = 63;
/// Fields of the pod that a file may take its text from; more than variables may, and no address.
const FILE_FIELD_PATHS: &[&str] = &[
    "metadata.annotations",
    "metadata.labels",
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
];

/// The pod's volumes; returns their names.
pub(super) fn volumes<'a>(
    volumes: &'a [Volume],
    path: &Path,
    errors: &mut Vec<FieldError>,
) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    for (i, volume) in volumes.iter().enumerate() {
        let path = path.child("volumes").index(i);
        let name = &path.child("name");
        if volume.name.is_empty() {
            errors.push(FieldError::required(name, ""));
        } else {
            let broken = names::dns1123_label(&volume.name);
            each(name, &volume.name, broken, errors);
        }
        if !seen.insert(volume.name.as_str()) {
            errors.push(FieldError::duplicate(name, volume.name.as_str()));
        }
        volume_source(volume, &path, errors);
    }
    seen
}

fn volume_source(volume: &Volume, path: &Path, errors: &mut Vec<FieldError>) {
    let sources = [
        volume.config_map.is_some(),
        volume.downward_api.is_some(),
        volume.projected.is_some(),
        volume.empty_dir.is_some(),
        volume.ephemeral.is_some(),
        volume.host_path.is_some(),
        volume.image.is_some(),
        volume.persistent_volume_claim.is_some(),
        volume.secret.is_some(),
        volume.csi.is_some(),
        volume.nfs.is_some(),
    ];
    if sources.iter().filter(|set| **set).count() > 1 {
        let detail = "may not specify more than 1 volume type";
        errors.push(FieldError::forbidden(path, detail));
    }
    files_source(volume, path, errors);
    remote_source(volume, path, errors);
    if let Some(source) = &volume.host_path {
        let path = path.child("hostPath");
        if source.path.is_empty() {
            errors.push(FieldError::required(&path.child("path"), ""));
        } else {
            inner_path(&path.child("path"), &source.path, true, errors);
        }
        let types = [
            "DirectoryOrCreate",
            "Directory",
            "FileOrCreate",
            "File",
            "Socket",
            "CharDevice",
            "BlockDevice",
        ];
        one_of(&path.child("type"), source.type_.as_deref(), &types, errors);
    }
    if let Some(source) = &volume.empty_dir {
        let path = path.child("emptyDir");
        let medium = source.medium.as_deref();
        let sizes = medium.and_then(|medium| medium.strip_prefix("HugePages-"));
        let is_of_pages = sizes.is_some_and(|size| Quantity::parse(size).is_ok());
        let media = ["HugePages", "HugePages-2Mi", "Memory"];
        let medium = medium.filter(|_| !is_of_pages);
        one_of(&path.child("medium"), medium, &media, errors);
        if let Some(limit) = &source.size_limit {
            quantity(&path.child("sizeLimit"), &limit.0, errors);
        }
    }
    if let Some(source) = &volume.image {
        let path = path.child("image");
        if source.reference.as_ref().is_none_or(String::is_empty) {
            errors.push(FieldError::required(&path.child("reference"), ""));
        }
        let policies = ["Always", "IfNotPresent", "Never"];
        let policy = source.pull_policy.as_deref();
        one_of(&path.child("pullPolicy"), policy, &policies, errors);
    }
    if let Some(source) = &volume.persistent_volume_claim {
        let path = path.child("persistentVolumeClaim").child("claimName");
        if source.claim_name.is_empty() {
            errors.push(FieldError::required(&path, ""));
        } else {
            let broken = names::dns1123_subdomain(&source.claim_name);
            each(&path, &source.claim_name, broken, errors);
        }
    }
    if let Some(source) = &volume.ephemeral {
        let path = path.child("ephemeral").child("volumeClaimTemplate");
        match &source.volume_claim_template {
            None => errors.push(FieldError::required(&path, "")),
            Some(claim) => {
                super::claim_spec(Some(&claim.spec), &path.child("spec"), errors);
            }
        }
    }
}

/// A driver's name: a domain, in any case, of at most 63 characters.
pub(super) fn csi_driver(field: &Path, name: &str, errors: &mut Vec<FieldError>) {
    if name.is_empty() {
        return errors.push(FieldError::required(field, ""));
    }
    if name.len() > CSI_DRIVER_BYTES_MAX {
        errors.push(FieldError::too_long(field, CSI_DRIVER_BYTES_MAX));
    }
    let broken = names::dns1123_subdomain(&name.to_lowercase());
    each(field, name, broken, errors);
}

/// Where an NFS server has what is mounted.
pub(super) fn nfs(server: &str, export: &str, path: &Path, errors: &mut Vec<FieldError>) {
    let field = &path.child("server");
    if server.is_empty() {
        errors.push(FieldError::required(field, ""));
    } else if server.contains(|c: char| c.is_whitespace() || c.is_control() || ",/".contains(c)) {
        let detail = "must be a host name or an address";
        errors.push(FieldError::invalid(field, server, detail));
    }
    let field = &path.child("path");
    if export.is_empty() {
        errors.push(FieldError::required(field, ""));
    } else if !export.starts_with('/') {
        errors.push(FieldError::invalid(
            field,
            export,
            "must be an absolute path",
        ));
    } else {
        inner_path(field, export, true, errors);
    }
}

/// Sources that are mounted from elsewhere.
fn remote_source(volume: &Volume, path: &Path, errors: &mut Vec<FieldError>) {
    if let Some(source) = &volume.csi {
        let path = path.child("csi");
        csi_driver(&path.child("driver"), &source.driver, errors);
        if let Some(secret) = &source.node_publish_secret_ref {
            let path = path.child("nodePublishSecretRef").child("name");
            if secret.name.is_empty() {
                errors.push(FieldError::required(&path, ""));
            } else {
                let broken = names::dns1123_subdomain(&secret.name);
                each(&path, &secret.name, broken, errors);
            }
        }
    }
    if let Some(source) = &volume.nfs {
        nfs(&source.server, &source.path, &path.child("nfs"), errors);
    }
}

/// Sources whose content is files that the node writes.
fn files_source(volume: &Volume, path: &Path, errors: &mut Vec<FieldError>) {
    if let Some(source) = &volume.config_map {
        let path = path.child("configMap");
        if source.name.is_empty() {
            errors.push(FieldError::required(&path.child("name"), ""));
        }
        file_mode(&path.child("defaultMode"), source.default_mode, errors);
        items(source.items.as_deref(), &path, errors);
    }
    if let Some(source) = &volume.secret {
        let path = path.child("secret");
        if source.secret_name.as_ref().is_none_or(String::is_empty) {
            errors.push(FieldError::required(&path.child("secretName"), ""));
        }
        file_mode(&path.child("defaultMode"), source.default_mode, errors);
        items(source.items.as_deref(), &path, errors);
    }
    if let Some(source) = &volume.downward_api {
        let path = path.child("downwardAPI");
        file_mode(&path.child("defaultMode"), source.default_mode, errors);
        downward(source.items.as_deref(), &path, errors);
    }
    if let Some(source) = &volume.projected {
        projected(source, &path.child("projected"), errors);
    }
}

fn projected(source: &ProjectedVolumeSource, path: &Path, errors: &mut Vec<FieldError>) {
    file_mode(&path.child("defaultMode"), source.default_mode, errors);
    let mut seen = BTreeSet::new();
    for (i, part) in source.sources.iter().flatten().enumerate() {
        let path = path.child("sources").index(i);
        let given = [
            part.config_map.is_some(),
            part.downward_api.is_some(),
            part.secret.is_some(),
            part.service_account_token.is_some(),
            part.cluster_trust_bundle.is_some(),
        ];
        if given.iter().filter(|set| **set).count() > 1 {
            let detail = "may not specify more than 1 volume type per source";
            errors.push(FieldError::forbidden(&path, detail));
        }
        let mut paths: Vec<&str> = Vec::new();
        if let Some(part) = &part.config_map {
            named(&part.name, &path.child("configMap"), errors);
            items(part.items.as_deref(), &path.child("configMap"), errors);
            paths.extend(part.items.iter().flatten().map(|item| item.path.as_str()));
        }
        if let Some(part) = &part.secret {
            named(&part.name, &path.child("secret"), errors);
            items(part.items.as_deref(), &path.child("secret"), errors);
            paths.extend(part.items.iter().flatten().map(|item| item.path.as_str()));
        }
        if let Some(part) = &part.downward_api {
            downward(part.items.as_deref(), &path.child("downwardAPI"), errors);
            paths.extend(part.items.iter().flatten().map(|item| item.path.as_str()));
        }
        if let Some(part) = &part.service_account_token {
            token(part, &path.child("serviceAccountToken"), errors);
            paths.push(&part.path);
        }
        for file in paths.into_iter().filter(|file| !file.is_empty()) {
            if !seen.insert(file) {
                let detail = "conflicting duplicate paths";
                errors.push(FieldError::invalid(&path, file, detail));
            }
        }
    }
}

fn named(name: &str, path: &Path, errors: &mut Vec<FieldError>) {
    if name.is_empty() {
        errors.push(FieldError::required(&path.child("name"), ""));
    }
}

fn token(part: &ServiceAccountTokenProjection, path: &Path, errors: &mut Vec<FieldError>) {
    if let Some(life_s) = part.expiration_seconds {
        let path = path.child("expirationSeconds");
        if life_s < TOKEN_LIFE_S_MIN {
            let detail = "may not specify a duration less than 10 minutes";
            errors.push(FieldError::invalid(&path, life_s, detail));
        } else if life_s > TOKEN_LIFE_S_MAX {
            let detail = "may not specify a duration larger than 2^32 seconds";
            errors.push(FieldError::invalid(&path, life_s, detail));
        }
    }
    file_path(&path.child("path"), &part.path, errors);
}

fn items(items: Option<&[KeyToPath]>, path: &Path, errors: &mut Vec<FieldError>) {
    for (i, item) in items.unwrap_or_default().iter().enumerate() {
        let path = path.child("items").index(i);
        if item.key.is_empty() {
            errors.push(FieldError::required(&path.child("key"), ""));
        }
        file_path(&path.child("path"), &item.path, errors);
        file_mode(&path.child("mode"), item.mode, errors);
    }
}

fn downward(items: Option<&[DownwardAPIVolumeFile]>, path: &Path, errors: &mut Vec<FieldError>) {
    for (i, item) in items.unwrap_or_default().iter().enumerate() {
        let path = path.child("items").index(i);
        file_path(&path.child("path"), &item.path, errors);
        file_mode(&path.child("mode"), item.mode, errors);
        match (&item.field_ref, &item.resource_field_ref) {
            (Some(_), Some(_)) => {
                let detail = "fieldRef and resourceFieldRef can not be specified simultaneously";
                errors.push(FieldError::invalid(&path, "resource", detail));
            }
            (None, None) => {
                let detail = "one of fieldRef and resourceFieldRef is required";
                errors.push(FieldError::required(&path, detail));
            }
            (Some(field), None) => {
                let path = path.child("fieldRef").child("fieldPath");
                let text = field.field_path.as_str();
                let by_key = ["metadata.labels['", "metadata.annotations['"];
                if !by_key.iter().any(|prefix| text.starts_with(prefix)) {
                    one_of(&path, Some(text), FILE_FIELD_PATHS, errors);
                }
            }
            (None, Some(resource)) => {
                let path = path.child("resourceFieldRef").child("containerName");
                if resource
                    .container_name
                    .as_ref()
                    .is_none_or(String::is_empty)
                {
                    errors.push(FieldError::required(&path, ""));
                }
            }
        }
    }
}

fn file_mode(path: &Path, mode: Option<i32>, errors: &mut Vec<FieldError>) {
    if let Some(mode) = mode.filter(|m| !(0..=0o777).contains(m)) {
        let detail = "must be a number between 0 and 0777 (octal), both inclusive";
        errors.push(FieldError::invalid(path, mode, detail));
    }
}

/// Where a file lies in its volume; names that start with `..` belong to the atomic writer.
fn file_path(field: &Path, text: &str, errors: &mut Vec<FieldError>) {
    if text.is_empty() {
        errors.push(FieldError::required(field, ""));
        return;
    }
    let before = errors.len();
    inner_path(field, text, false, errors);
    if errors.len() == before && text.starts_with("..") {
        errors.push(FieldError::invalid(field, text, "must not start with '..'"));
    }
}

/// A path that stays inside its volume: no `..`, and relative unless `absolute`.
fn inner_path(field: &Path, text: &str, absolute: bool, errors: &mut Vec<FieldError>) {
    if !absolute && text.starts_with('/') {
        errors.push(FieldError::invalid(field, text, "must be a relative path"));
    }
    if text.split('/').any(|part| part == "..") {
        errors.push(FieldError::invalid(field, text, "must not contain '..'"));
    }
    if text.contains('\0') {
        let detail = "must not contain a NUL byte";
        errors.push(FieldError::invalid(field, text, detail));
    }
}

/// The volumeMounts of a container at `path`.
pub(super) fn mounts(
    container: &Container,
    path: &Path,
    volumes: &BTreeSet<&str>,
    errors: &mut Vec<FieldError>,
) {
    let context = container.security_context.as_ref();
    let privileged = context.and_then(|c| c.privileged) == Some(true);
    let mut seen = BTreeSet::new();
    for (i, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let path = path.child("volumeMounts").index(i);
        if mount.name.is_empty() {
            errors.push(FieldError::required(&path.child("name"), ""));
        } else if !volumes.contains(mount.name.as_str()) {
            let name = mount.name.as_str();
            errors.push(FieldError::not_found(&path.child("name"), name));
        }
        let mount_path = &path.child("mountPath");
        let text = mount.mount_path.as_str();
        if text.is_empty() {
            errors.push(FieldError::required(mount_path, ""));
        } else if !seen.insert(text.trim_end_matches('/')) {
            errors.push(FieldError::invalid(mount_path, text, "must be unique"));
        }
        if text.contains(':') {
            errors.push(FieldError::invalid(
                mount_path,
                text,
                "must not contain ':'",
            ));
        }
        inner_path(mount_path, text, true, errors);
        mount_options(mount, &path, privileged, errors);
    }
}

fn mount_options(mount: &VolumeMount, path: &Path, privileged: bool, errors: &mut Vec<FieldError>) {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    if let Some(sub_path) = given(&mount.sub_path) {
        inner_path(&path.child("subPath"), &sub_path, false, errors);
    }
    if let Some(expression) = given(&mount.sub_path_expr) {
        let path = path.child("subPathExpr");
        if given(&mount.sub_path).is_some() {
            let detail = "subPathExpr and subPath are mutually exclusive";
            errors.push(FieldError::invalid(&path, expression.as_str(), detail));
        }
        inner_path(&path, &expression, false, errors);
    }
    let propagation = given(&mount.mount_propagation);
    let modes = ["Bidirectional", "HostToContainer", "None"];
    let field = path.child("mountPropagation");
    one_of(&field, propagation.as_deref(), &modes, errors);
    if propagation.as_deref() == Some("Bidirectional") && !privileged {
        let detail = "Bidirectional mount propagation is available only to privileged containers";
        errors.push(FieldError::forbidden(&field, detail));
    }
    let recursive = given(&mount.recursive_read_only);
    let field = path.child("recursiveReadOnly");
    let modes = ["Disabled", "Enabled", "IfPossible"];
    one_of(&field, recursive.as_deref(), &modes, errors);
    if recursive.is_some_and(|mode| mode != "Disabled") {
        if mount.read_only != Some(true) {
            let detail = "may only be specified when readOnly is true";
            errors.push(FieldError::forbidden(&field, detail));
        }
        if propagation.is_some_and(|mode| mode != "None") {
            let detail = "may only be specified when mountPropagation is None or not specified";
            errors.push(FieldError::forbidden(&field, detail));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::PodSpec;
    use serde_json::{Value, json};

    fn broken(spec: Value) -> Vec<String> {
        let spec: PodSpec = serde_json::from_value(spec).unwrap();
        let errors = super::super::pod_spec(&spec, &Path::new("spec"));
        errors.into_iter().map(|e| e.to_string()).collect()
    }

    fn with_volume(volume: Value) -> Vec<String> {
        let mut volume = volume;
        volume["name"] = json!("v");
        broken(json!({"containers": [{"name": "c", "image": "i"}], "volumes": [volume]}))
    }

    fn with_mount(mount: Value, privileged: bool) -> Vec<String> {
        let mut mount = mount;
        mount["name"] = json!("v");
        mount["mountPath"] = json!("/m");
        broken(json!({
            "containers": [{"name": "c", "image": "i", "volumeMounts": [mount],
                "securityContext": {"privileged": privileged}}],
            "volumes": [{"name": "v", "emptyDir": {}}],
        }))
    }

    #[test]
    fn what_a_volume_may_say() {
        let token = |life: i64, path: &str| {
            let token = json!({"expirationSeconds": life, "path": path});
            json!({"projected": {"sources": [{"serviceAccountToken": token}]}})
        };
        let file = |item: Value| json!({"downwardAPI": {"items": [item]}});
        for fine in [
            json!({"hostPath": {"path": "/x", "type": "Socket"}}),
            json!({"image": {"reference": "model:1", "pullPolicy": "Never"}}),
            json!({"persistentVolumeClaim": {"claimName": "data"}}),
            json!({"csi": {"driver": "Files.csi.example.com", "nodePublishSecretRef": {"name": "s"}}}),
            json!({"nfs": {"server": "fd00::5", "path": "/exports/a"}}),
            json!({"emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}),
            json!({"emptyDir": {"medium": "HugePages"}}),
            json!({"emptyDir": {"medium": "HugePages-1Gi"}}),
            token(3607, "token"),
            file(json!({"path": "l", "fieldRef": {"fieldPath": "metadata.labels"}})),
        ] {
            assert_eq!(with_volume(fine.clone()), Vec::<String>::new(), "{fine}");
        }
        for (bad, field) in [
            (
                json!({"hostPath": {"path": "/x", "type": "Pipe"}}),
                "hostPath.type",
            ),
            (json!({"hostPath": {"path": "/x/../y"}}), "hostPath.path"),
            (json!({"csi": {"driver": ""}}), "csi.driver"),
            (json!({"csi": {"driver": "a_b"}}), "csi.driver"),
            (json!({"csi": {"driver": "x".repeat(64)}}), "csi.driver"),
            (
                json!({"csi": {"driver": "a", "nodePublishSecretRef": {"name": "B"}}}),
                "csi.nodePublishSecretRef.name",
            ),
            (json!({"nfs": {"server": "", "path": "/"}}), "nfs.server"),
            (
                json!({"nfs": {"server": "a,addr=b", "path": "/"}}),
                "nfs.server",
            ),
            (json!({"nfs": {"server": "a", "path": "x"}}), "nfs.path"),
            (json!({"nfs": {"server": "a", "path": ""}}), "nfs.path"),
            (json!({"image": {"reference": ""}}), "image.reference"),
            (
                json!({"persistentVolumeClaim": {"claimName": "A"}}),
                "claimName",
            ),
            (
                json!({"emptyDir": {"sizeLimit": "-1"}}),
                "emptyDir.sizeLimit",
            ),
            (
                json!({"emptyDir": {"medium": "HugePages-many"}}),
                "emptyDir.medium",
            ),
            (token(599, "token"), "expirationSeconds"),
            (token(1 << 33, "token"), "expirationSeconds"),
            (token(600, "../token"), "serviceAccountToken.path"),
            (token(600, "..data"), "serviceAccountToken.path"),
            (file(json!({"path": "l"})), "items[0]"),
            (
                file(json!({"path": "l", "fieldRef": {"fieldPath": "status.podIP"}})),
                "fieldRef.fieldPath",
            ),
            (
                json!({"projected": {"sources": [
                    {"serviceAccountToken": {"path": "a"}},
                    {"secret": {"name": "s", "items": [{"key": "k", "path": "a"}]}}]}}),
                "projected.sources[1]",
            ),
            (
                json!({"emptyDir": {}, "secret": {"secretName": "s"}}),
                "spec.volumes[0]",
            ),
        ] {
            let errors = with_volume(bad.clone());
            assert!(
                errors.len() == 1 && errors[0].contains(field),
                "{bad}: {errors:?}"
            );
        }
    }

    #[test]
    fn what_a_mount_may_say() {
        for fine in [
            json!({"readOnly": true, "recursiveReadOnly": "Enabled"}),
            json!({"readOnly": true, "recursiveReadOnly": "IfPossible", "mountPropagation": "None"}),
            json!({"recursiveReadOnly": "Disabled", "mountPropagation": "HostToContainer"}),
            json!({"subPathExpr": "$(POD)/x"}),
        ] {
            assert_eq!(
                with_mount(fine.clone(), false),
                Vec::<String>::new(),
                "{fine}"
            );
        }
        assert_eq!(
            with_mount(json!({"mountPropagation": "Bidirectional"}), true),
            Vec::<String>::new()
        );
        for (bad, field) in [
            (json!({"recursiveReadOnly": "Enabled"}), "recursiveReadOnly"),
            (
                json!({"readOnly": true, "recursiveReadOnly": "Enabled",
                    "mountPropagation": "HostToContainer"}),
                "recursiveReadOnly",
            ),
            (
                json!({"mountPropagation": "Bidirectional"}),
                "mountPropagation",
            ),
            (json!({"mountPropagation": "Shared"}), "mountPropagation"),
            (json!({"subPath": "a", "subPathExpr": "b"}), "subPathExpr"),
            (json!({"subPathExpr": "../b"}), "subPathExpr"),
        ] {
            let errors = with_mount(bad.clone(), false);
            assert!(
                errors.len() == 1 && errors[0].contains(field),
                "{bad}: {errors:?}"
            );
        }
    }
}
