//! Manifests and indexes of OCI and Docker: pure parsing of the few fields that matter here.

use std::collections::BTreeMap;

use oci_spec::image::ImageConfiguration;
use serde::Deserialize;

use super::reference::Digest;

/// A manifest, index or configuration larger than this is refused, bytes.
pub(super) const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// overlayfs takes more, but no builder makes more and the mount options are one page.
pub(super) const LAYERS_MAX: usize = 127;

/// Media types asked of a registry.
pub(super) const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// A pointer to content.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: Digest,
    pub(super) size: u64,
    #[serde(default)]
    pub(super) platform: Option<Platform>,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
}

/// For which machines an index entry is.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Platform {
    pub(super) os: String,
    pub(super) architecture: String,
    #[serde(default)]
    pub(super) variant: Option<String>,
}

/// A parsed document.
#[derive(Clone, Debug)]
pub(super) enum Document {
    Index(Vec<Descriptor>),
    Manifest {
        config: Descriptor,
        layers: Vec<Descriptor>,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    schema_version: u64,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

impl Document {
    /// Parses a manifest or an index, told apart by their fields.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let raw: Raw = serde_json::from_slice(bytes).map_err(|e| format!("no manifest: {e}"))?;
        if raw.schema_version != 2 {
            return Err(format!("manifest schema {}: want 2", raw.schema_version));
        }
        match (raw.manifests, raw.config, raw.layers) {
            (Some(manifests), None, None) => Ok(Self::Index(manifests)),
            (None, Some(config), Some(layers)) => {
                check_layers(&layers)?;
                Ok(Self::Manifest { config, layers })
            }
            _ => Err("neither a manifest (config, layers) nor an index (manifests)".to_owned()),
        }
    }
}

fn check_layers(layers: &[Descriptor]) -> Result<(), String> {
    if layers.len() > LAYERS_MAX {
        return Err(format!(
            "{} layers: at most {LAYERS_MAX} are supported",
            layers.len()
        ));
    }
    for layer in layers {
        let kind = layer.media_type.as_str();
        let tar = kind.contains("image.layer.") || kind.contains("image.rootfs.");
        if !tar || kind.contains("encrypted") {
            return Err(format!(
                "layer {}: media type {kind:?} is no tar layer",
                layer.digest
            ));
        }
    }
    Ok(())
}

/// This machine, in Go's words.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// The index entry for this machine; the only entry of an index that names no platform.
pub(super) fn choose(entries: &[Descriptor]) -> Result<&Descriptor, String> {
    if let [only] = entries
        && only.platform.is_none()
    {
        return Ok(only);
    }
    let ours = |d: &&Descriptor| {
        d.platform.as_ref().is_some_and(|p| {
            let variant = p.variant.as_deref();
            p.os == "linux"
                && p.architecture == architecture()
                && matches!(variant, None | Some("v8" | "v1"))
        })
    };
    entries.iter().find(ours).ok_or_else(|| {
        let offered: Vec<String> = entries
            .iter()
            .filter_map(|d| d.platform.as_ref())
            .map(|p| format!("{}/{}", p.os, p.architecture))
            .filter(|p| p != "unknown/unknown")
            .collect();
        format!(
            "no image for linux/{}; there is: {}",
            architecture(),
            offered.join(", ")
        )
    })
}

/// Parses an image configuration and its diff IDs, one per layer.
pub(super) fn parse_config(
    bytes: &[u8],
    layer_count: usize,
) -> Result<(ImageConfiguration, Vec<Digest>), String> {
    let config: ImageConfiguration =
        serde_json::from_slice(bytes).map_err(|e| format!("no image configuration: {e}"))?;
    let (os, arch) = (config.os().to_string(), config.architecture().to_string());
    if os != "linux" || arch != architecture() {
        return Err(format!(
            "made for {os}/{arch}, this machine is linux/{}",
            architecture()
        ));
    }
    let diff_ids = config.rootfs().diff_ids();
    if diff_ids.len() != layer_count {
        return Err(format!(
            "{} diff IDs for {layer_count} layers",
            diff_ids.len()
        ));
    }
    let diff_ids = diff_ids
        .iter()
        .map(|d| Digest::parse(d))
        .collect::<Result<_, _>>()?;
    Ok((config, diff_ids))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn digest(fill: char) -> String {
        format!("sha256:{}", String::from(fill).repeat(64))
    }

    #[test]
    fn index_entry_of_this_machine_is_chosen() {
        let entry = |os: &str, arch: &str, fill| json!({"digest": digest(fill), "size": 1, "platform": {"os": os, "architecture": arch}});
        let index = json!({"schemaVersion": 2, "manifests": [
            entry("unknown", "unknown", 'a'), entry("linux", "s390x", 'b'),
            entry("linux", architecture(), 'c')]});
        let Document::Index(entries) = Document::parse(index.to_string().as_bytes()).unwrap()
        else {
            panic!("an index");
        };
        assert_eq!(choose(&entries).unwrap().digest.as_str(), digest('c'));
        let error = choose(&entries[..2]).unwrap_err();
        assert!(
            error.contains("linux/s390x") && !error.contains("unknown"),
            "{error}"
        );
    }

    #[test]
    fn odd_documents_are_refused_in_words() {
        let config = json!({"digest": digest('a'), "size": 1});
        let layer = |kind: &str| json!({"digest": digest('b'), "size": 1, "mediaType": kind});
        let cases = [
            (json!({"schemaVersion": 1}), "schema 1"),
            (json!({"schemaVersion": 2}), "neither"),
            (
                json!({"schemaVersion": 2, "config": config, "layers": [layer("text/plain")]}),
                "no tar layer",
            ),
            (
                json!({"schemaVersion": 2, "config": {"digest": "x", "size": 1}, "layers": []}),
                "digest",
            ),
            (
                json!({"schemaVersion": 2, "config": config,
                "layers": vec![layer("application/vnd.oci.image.layer.v1.tar"); 128]}),
                "at most 127",
            ),
        ];
        for (document, part) in cases {
            let error = Document::parse(document.to_string().as_bytes()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
