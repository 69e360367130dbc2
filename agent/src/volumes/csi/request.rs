//! What a driver is asked for, from the pod and its volume: pure.
//!
//! | | inline (`volumes[].csi`) | persistent (`persistentVolume.spec.csi`) |
//! |---|---|---|
//! | volume id | `csi-<sha256 of pod UID and volume name>` | `volumeHandle` |
//! | staged | never | when the driver stages |
//! | access mode | SINGLE_NODE_WRITER or its like | by the volume's first access mode |
//! | fsGroup | with `fsType` | with `fsType` and ReadWriteOnce |
//!
//! CSIDriver objects are no kind here, so what they would say is taken as follows: the pod's name is
//! always given (podInfoOnMount), a volume is never attached (attachRequired), fsGroup follows
//! ReadWriteOnceWithFSType, which is what Kubernetes does for a driver without such an object, no token
//! of the pod's account is made for it (tokenRequests), and it is asked once (requiresRepublish). A
//! driver that takes the group itself (VOLUME_MOUNT_GROUP) is given it, and nothing is changed here.
//!
//! Source: Kubernetes `pkg/volume/csi/csi_{mounter,attacher,client}.go`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use gantry_api::k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, CSIVolumeSource, PersistentVolumeSpec, Pod, SecretReference,
};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::driver::Capabilities;
use super::wire::VolumeCapability;
use super::wire::volume_capability::access_mode::Mode;
use super::wire::volume_capability::{AccessMode, AccessType, MountVolume};
use crate::view::BlobKey;

/// One volume as its driver is asked for it.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct VolumeRequest {
    /// The driver's name.
    pub(crate) driver: String,
    /// What the driver knows the volume by.
    pub(crate) volume_id: String,
    /// The directory below the pod's: the PersistentVolume's name, or the volume's in the pod.
    pub(crate) place: String,
    /// A PersistentVolume: outlives the pod, may be staged, has an access mode.
    pub(crate) is_persistent: bool,
    fs_type: String,
    pub(crate) read_only: bool,
    attributes: BTreeMap<String, String>,
    mount_options: Vec<String>,
    access_mode: String,
    pub(crate) publish_secret: Option<BlobKey>,
    pub(crate) stage_secret: Option<BlobKey>,
}

impl VolumeRequest {
    /// `volumes[].csi`
    pub(crate) fn inline(pod: &Pod, volume_name: &str, source: &CSIVolumeSource) -> Self {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let secret = source.node_publish_secret_ref.as_ref();
        Self {
            driver: source.driver.clone(),
            volume_id: format!("csi-{}", hex(&[uid, volume_name])),
            place: volume_name.to_owned(),
            is_persistent: false,
            fs_type: source.fs_type.clone().unwrap_or_default(),
            read_only: source.read_only == Some(true),
            attributes: source.volume_attributes.clone().unwrap_or_default(),
            mount_options: Vec::new(),
            access_mode: "ReadWriteOnce".to_owned(),
            publish_secret: secret.map(|secret| secret_key(namespace, &secret.name)),
            stage_secret: None,
        }
    }

    /// `persistentVolume.spec.csi`; `read_only`: the pod's claim says so.
    pub(crate) fn persistent(
        name: &str,
        spec: &PersistentVolumeSpec,
        source: &CSIPersistentVolumeSource,
        read_only: bool,
    ) -> Self {
        let secret = |reference: &Option<SecretReference>| {
            let reference = reference.as_ref()?;
            let namespace = reference.namespace.as_deref()?;
            Some(secret_key(namespace, reference.name.as_deref()?))
        };
        let modes = spec.access_modes.as_deref().unwrap_or_default();
        Self {
            driver: source.driver.clone(),
            volume_id: source.volume_handle.clone(),
            place: name.to_owned(),
            is_persistent: true,
            fs_type: source.fs_type.clone().unwrap_or_default(),
            read_only: read_only || source.read_only == Some(true),
            attributes: source.volume_attributes.clone().unwrap_or_default(),
            mount_options: spec.mount_options.clone().unwrap_or_default(),
            access_mode: modes.first().cloned().unwrap_or_default(),
            publish_secret: secret(&source.node_publish_secret_ref),
            stage_secret: secret(&source.node_stage_secret_ref),
        }
    }

    /// What the driver needs to know of how the volume is used.
    pub(crate) fn capability(&self, can: Capabilities, group: Option<u32>) -> VolumeCapability {
        let mount = MountVolume {
            fs_type: self.fs_type.clone(),
            mount_flags: self.mount_options.clone(),
            volume_mount_group: group
                .filter(|_| can.mount_group)
                .map_or_else(String::new, |group| group.to_string()),
        };
        VolumeCapability {
            access_type: Some(AccessType::Mount(mount)),
            access_mode: Some(AccessMode {
                mode: mode(&self.access_mode, can.single_node_modes).into(),
            }),
        }
    }

    /// The volume's attributes, for staging.
    pub(crate) fn stage_context(&self) -> std::collections::HashMap<String, String> {
        self.attributes.clone().into_iter().collect()
    }

    /// The volume's attributes and who the pod is. The pod's own words do not replace the node's.
    pub(crate) fn publish_context(&self, pod: &Pod) -> std::collections::HashMap<String, String> {
        let metadata = &pod.metadata;
        let account = pod
            .spec
            .as_ref()
            .and_then(|s| s.service_account_name.clone());
        let is_ephemeral = !self.is_persistent;
        let of_pod = [
            ("pod.name", metadata.name.clone().unwrap_or_default()),
            (
                "pod.namespace",
                metadata.namespace.clone().unwrap_or_default(),
            ),
            ("pod.uid", metadata.uid.clone().unwrap_or_default()),
            ("serviceAccount.name", account.unwrap_or_default()),
            ("ephemeral", is_ephemeral.to_string()),
        ];
        let of_pod = of_pod.map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value));
        self.stage_context().into_iter().chain(of_pod).collect()
    }

    /// The group that this node gives the volume's files to, of the pod's fsGroup.
    pub(crate) fn group_to_give(&self, can: Capabilities, fs_group: Option<u32>) -> Option<u32> {
        let once = matches!(
            self.access_mode.as_str(),
            "ReadWriteOnce" | "ReadWriteOncePod"
        );
        fs_group.filter(|_| !can.mount_group && !self.read_only && !self.fs_type.is_empty() && once)
    }

    /// Where the driver stages the volume, once for all pods of the node.
    pub(crate) fn staging(&self, kubelet: &Path) -> PathBuf {
        let plugins = kubelet.join("plugins/kubernetes.io/csi");
        let volume = hex(&[&self.volume_id]);
        plugins.join(&self.driver).join(volume).join("globalmount")
    }
}

/// A driver's name is a component of paths.
pub(crate) fn is_driver_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    name.len() <= 63
        && name.chars().all(plain)
        && edge(name.chars().next())
        && edge(name.chars().last())
}

fn secret_key(namespace: &str, name: &str) -> BlobKey {
    BlobKey {
        plural: "secrets".to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }
}

fn hex(parts: &[&str]) -> String {
    let digest = Sha256::digest(parts.concat());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn mode(kubernetes: &str, single_node_modes: bool) -> Mode {
    match (kubernetes, single_node_modes) {
        ("ReadWriteOnce", true) => Mode::SingleNodeMultiWriter,
        ("ReadWriteOncePod", true) => Mode::SingleNodeSingleWriter,
        ("ReadOnlyMany", _) => Mode::MultiNodeReaderOnly,
        ("ReadWriteMany", _) => Mode::MultiNodeMultiWriter,
        _ => Mode::SingleNodeWriter,
    }
}

/// A Secret's keys and texts; the error names a key and never a value.
pub(crate) fn secret_data(
    secret: &Value,
) -> Result<std::collections::HashMap<String, String>, String> {
    let data = secret.get("data").and_then(Value::as_object);
    let decode = |(key, value): (&String, &Value)| {
        let text = value.as_str().unwrap_or_default();
        let bytes = BASE64_STANDARD.decode(text);
        let bytes = bytes.map_err(|_| format!("key {key:?} is not base64"))?;
        let text = String::from_utf8(bytes);
        let text = text.map_err(|_| format!("key {key:?} is not text, which drivers want"))?;
        Ok((key.clone(), text))
    };
    data.into_iter().flatten().map(decode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn pod() -> Pod {
        serde_json::from_value(
            json!({"metadata": {"name": "p", "namespace": "shop", "uid": "u-1"},
            "spec": {"containers": [], "serviceAccountName": "web"}}),
        )
        .unwrap()
    }

    fn persistent(source: Value, more: Value, read_only: bool) -> VolumeRequest {
        let mut spec = more;
        spec["csi"] = source;
        let spec: PersistentVolumeSpec = serde_json::from_value(spec).unwrap();
        VolumeRequest::persistent("pv-1", &spec, spec.csi.as_ref().unwrap(), read_only)
    }

    #[test]
    fn an_inline_volume_is_the_pods_own() {
        let source = json!({"driver": "d.example", "fsType": "ext4", "readOnly": true,
            "volumeAttributes": {"size": "1", "csi.storage.k8s.io/pod.name": "somebody else"},
            "nodePublishSecretRef": {"name": "s"}});
        let source: CSIVolumeSource = serde_json::from_value(source).unwrap();
        let request = VolumeRequest::inline(&pod(), "scratch", &source);
        // sha256 of "u-1scratch"
        assert_eq!(request.volume_id.len(), 4 + 64);
        assert_ne!(
            request.volume_id,
            VolumeRequest::inline(&pod(), "other", &source).volume_id
        );
        assert!(request.read_only && !request.is_persistent);
        assert_eq!(request.publish_secret, Some(secret_key("shop", "s")));
        let context = request.publish_context(&pod());
        for (key, value) in [
            ("size", "1"),
            ("csi.storage.k8s.io/pod.name", "p"),
            ("csi.storage.k8s.io/pod.namespace", "shop"),
            ("csi.storage.k8s.io/pod.uid", "u-1"),
            ("csi.storage.k8s.io/serviceAccount.name", "web"),
            ("csi.storage.k8s.io/ephemeral", "true"),
        ] {
            assert_eq!(context[key], value, "{key}");
        }
        assert_eq!(context.len(), 6);
    }

    #[test]
    fn access_modes_are_the_drivers_as_far_as_it_knows_them() {
        for (kubernetes, old, new) in [
            (
                "ReadWriteOnce",
                Mode::SingleNodeWriter,
                Mode::SingleNodeMultiWriter,
            ),
            (
                "ReadWriteOncePod",
                Mode::SingleNodeWriter,
                Mode::SingleNodeSingleWriter,
            ),
            (
                "ReadOnlyMany",
                Mode::MultiNodeReaderOnly,
                Mode::MultiNodeReaderOnly,
            ),
            (
                "ReadWriteMany",
                Mode::MultiNodeMultiWriter,
                Mode::MultiNodeMultiWriter,
            ),
        ] {
            assert_eq!(
                (mode(kubernetes, false), mode(kubernetes, true)),
                (old, new)
            );
        }
    }

    #[test]
    fn the_group_is_given_by_driver_or_node_and_never_by_both() {
        let group = |fs_type: &str, access: &str, read_only: bool, mount_group: bool| {
            let source = json!({"driver": "d", "volumeHandle": "h", "fsType": fs_type});
            let request = persistent(source, json!({"accessModes": [access]}), read_only);
            let can = Capabilities {
                mount_group,
                ..Capabilities::default()
            };
            let capability = request.capability(can, Some(7));
            let Some(AccessType::Mount(mount)) = capability.access_type else {
                panic!("no mount");
            };
            (
                request.group_to_give(can, Some(7)),
                mount.volume_mount_group,
            )
        };
        let nobody = String::new;
        assert_eq!(
            group("ext4", "ReadWriteOnce", false, false),
            (Some(7), nobody())
        );
        assert_eq!(group("", "ReadWriteOnce", false, false), (None, nobody()));
        assert_eq!(
            group("ext4", "ReadWriteMany", false, false),
            (None, nobody())
        );
        assert_eq!(
            group("ext4", "ReadWriteOnce", true, false),
            (None, nobody())
        );
        assert_eq!(
            group("ext4", "ReadWriteOnce", false, true),
            (None, "7".into())
        );
    }

    #[test]
    fn a_persistent_volume_keeps_its_handle_options_and_secrets() {
        let source = json!({"driver": "d", "volumeHandle": "h/1", "readOnly": true,
            "nodeStageSecretRef": {"name": "a", "namespace": "x"},
            "nodePublishSecretRef": {"name": "b", "namespace": "y"}});
        let request = persistent(source, json!({"mountOptions": ["noatime"]}), false);
        assert_eq!(
            (request.volume_id.as_str(), request.place.as_str()),
            ("h/1", "pv-1")
        );
        assert!(request.read_only && request.is_persistent);
        assert_eq!(request.stage_secret, Some(secret_key("x", "a")));
        assert_eq!(request.publish_secret, Some(secret_key("y", "b")));
        assert_eq!(
            request.publish_context(&pod())["csi.storage.k8s.io/ephemeral"],
            "false"
        );
        assert!(request.stage_context().is_empty());
        let staging = request.staging(Path::new("/k"));
        assert!(staging.starts_with("/k/plugins/kubernetes.io/csi/d"));
        assert!(staging.ends_with("globalmount"));
    }

    #[test]
    fn secrets_are_text_and_errors_name_the_key_alone() {
        let secret = json!({"data": {"user": "YWRtaW4=", "word": "aHVudGVy"}});
        assert_eq!(secret_data(&secret).unwrap()["word"], "hunter");
        assert!(secret_data(&json!({})).unwrap().is_empty());
        for bad in ["/w==", "%%secret%%"] {
            let words = secret_data(&json!({"data": {"key": bad}})).unwrap_err();
            assert!(words.contains("\"key\"") && !words.contains(bad), "{words}");
        }
    }

    proptest! {
        #[test]
        fn a_drivers_name_never_leaves_its_directory(name in "[a-zA-Z0-9._/\\-]{0,70}") {
            if is_driver_name(&name) {
                let joined = Path::new("/k").join(&name);
                prop_assert_eq!(joined.parent(), Some(Path::new("/k")));
                prop_assert!(joined.file_name().is_some());
            }
            for bad in ["", ".", "..", "a/b", "-a", "a."] {
                prop_assert!(!is_driver_name(bad));
            }
        }

        #[test]
        fn volumes_of_one_driver_are_staged_apart(a in ".{1,40}", b in ".{1,40}") {
            let of = |handle: &str| {
                let source = json!({"driver": "d", "volumeHandle": handle});
                persistent(source, json!({}), false).staging(Path::new("/k"))
            };
            prop_assert_eq!(of(&a) == of(&b), a == b);
        }
    }
}
