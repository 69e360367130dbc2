//! Importing from files: OCI layout (directory or archive) and docker-save archives.
//!
//! ```text
//! directory ──────────────► Source ─┬─ index.json     ─► manifests ─► config, layers     (OCI)
//! tar, tar.gz, tar.zst ─► index ─┘  └─ manifest.json ─► config, layers                  (docker save)
//! ```
//! An archive's members are indexed once by position and then read in place: layers are unpacked
//! from the archive itself, no second copy. A compressed archive is decompressed to an unlinked
//! file first. Archives of containerd, docker (old and new), podman, skopeo, umoci.

mod source;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::content::{Content, LayerWant, Record};
use super::document::{Descriptor, Document, LAYERS_MAX, choose, parse_config};
use super::error::ImageError;
use super::reference::{Digest, Reference};
use source::Source;

/// Images of one archive.
const IMAGES_MAX: usize = 64;
/// Indexes may point to indexes.
const INDEX_DEPTH_MAX: usize = 3;

/// How far an import or a pull is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Layer bytes read or found to be here already.
    pub done_bytes: u64,
    /// All layer bytes of the archive or image; 0: not known yet.
    pub total_bytes: u64,
}

/// One imported image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Imported {
    /// The configuration's digest.
    pub id: Digest,
    /// Full names under which it can be used now.
    pub references: Vec<String>,
}

/// An image found in an archive, nothing of it kept yet.
struct Plan {
    config: Vec<u8>,
    manifest: Option<Vec<u8>>,
    layers: Vec<(String, LayerWant)>,
    names: Vec<String>,
}

/// Imports everything `path` holds. All or nothing per image.
pub(super) fn import(
    content: &Content,
    path: &Path,
    progress: &dyn Fn(Progress),
) -> Result<Vec<Imported>, ImageError> {
    let _addition = content.lock_addition()?;
    import_from(content, &Source::open(content, path)?, progress)
}

/// The same for an archive that is open already.
pub(super) fn import_file(
    content: &Content,
    file: File,
    name: &Path,
    progress: &dyn Fn(Progress),
) -> Result<Vec<Imported>, ImageError> {
    let _addition = content.lock_addition()?;
    import_from(content, &Source::of_file(content, name, file)?, progress)
}

fn import_from(
    content: &Content,
    source: &Source,
    progress: &dyn Fn(Progress),
) -> Result<Vec<Imported>, ImageError> {
    let plans = if source.has("index.json") {
        plan_oci(source)?
    } else if source.has("manifest.json") {
        plan_docker(source)?
    } else {
        return Err(source.bad("neither index.json (OCI) nor manifest.json (docker save) in it"));
    };
    if plans.is_empty() {
        return Err(source.bad("no image in it"));
    }
    let mut state = Progress {
        done_bytes: 0,
        total_bytes: plans
            .iter()
            .flat_map(|p| &p.layers)
            .map(|(_, w)| w.size)
            .sum(),
    };
    progress(state);
    plans
        .into_iter()
        .map(|plan| keep(content, source, plan, &mut state, progress))
        .collect()
}

fn keep(
    content: &Content,
    source: &Source,
    plan: Plan,
    state: &mut Progress,
    progress: &dyn Fn(Progress),
) -> Result<Imported, ImageError> {
    for (member, want) in &plan.layers {
        let before = state.done_bytes;
        if !content.has_layer(&want.diff_id) {
            let reader = source.member(member)?;
            let reader = Watched {
                inner: reader,
                tell: |n| {
                    state.done_bytes += n;
                    progress(*state);
                },
            };
            content.unpack(reader, want)?;
        }
        state.done_bytes = before + want.size;
        progress(*state);
    }
    let manifest = plan
        .manifest
        .map(|m| content.put_document(&m))
        .transpose()?;
    let id = content.put_document(&plan.config)?;
    let mut references = plan.names;
    if let Some(digest) = &manifest {
        let pins: Vec<String> = references
            .iter()
            .filter_map(|n| Reference::parse(n).ok())
            .map(|r| r.pinned(digest).to_string())
            .collect();
        references.extend(pins);
    }
    references.sort();
    references.dedup();
    let record = Record {
        layers: plan.layers.iter().map(|(_, w)| w.diff_id.clone()).collect(),
        manifest,
        size_bytes: plan.layers.iter().map(|(_, w)| w.size).sum(),
        pinned: true,
    };
    content.update(|table| {
        table.images.insert(id.clone(), record);
        for name in &references {
            table.references.insert(name.clone(), id.clone());
        }
    })?;
    Ok(Imported { id, references })
}

/// Tells how many bytes went through.
struct Watched<R, F> {
    inner: R,
    tell: F,
}

impl<R: Read, F: FnMut(u64)> Read for Watched<R, F> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        (self.tell)(n as u64);
        Ok(n)
    }
}

// --- OCI --------------------------------------------------------------------------------------

fn plan_oci(source: &Source) -> Result<Vec<Plan>, ImageError> {
    let index = source.read("index.json")?;
    let entries = match Document::parse(&index) {
        Ok(Document::Index(entries)) => entries,
        Ok(_) => return Err(source.corrupt("index.json", "it is a manifest, want an index")),
        Err(reason) => return Err(source.corrupt("index.json", reason)),
    };
    if entries.len() > IMAGES_MAX {
        return Err(source.corrupt("index.json", format!("more than {IMAGES_MAX} images")));
    }
    // Docker 25 and later write both indexes; the names may be only in the old one.
    let tags = if source.has("manifest.json") {
        docker_tags(source)?
    } else {
        HashMap::new()
    };
    // An index whose entries differ only by platform is one image.
    let one_image = entries.len() > 1
        && entries
            .iter()
            .all(|e| e.platform.is_some() && name_annotation(e).is_none());
    let chosen: Vec<&Descriptor> = if one_image {
        vec![choose(&entries).map_err(|r| source.corrupt("index.json", r))?]
    } else {
        entries.iter().collect()
    };
    let mut plans: Vec<Plan> = Vec::new();
    for entry in chosen {
        let plan = plan_oci_image(source, entry, &tags)?;
        // One image under several names has one entry per name.
        match plans
            .iter_mut()
            .find(|p| p.config == plan.config && p.manifest == plan.manifest)
        {
            Some(same) => same.names.extend(plan.names),
            None => plans.push(plan),
        }
    }
    Ok(plans)
}

fn plan_oci_image(
    source: &Source,
    entry: &Descriptor,
    tags: &HashMap<String, Vec<String>>,
) -> Result<Plan, ImageError> {
    let mut at = entry.clone();
    for _ in 0..=INDEX_DEPTH_MAX {
        let what = format!("manifest {}", at.digest);
        let bytes = source.blob(&at)?;
        match Document::parse(&bytes).map_err(|r| source.corrupt(&what, r))? {
            Document::Index(entries) => {
                at = choose(&entries)
                    .map_err(|r| source.corrupt(&what, r))?
                    .clone();
            }
            Document::Manifest { config, layers } => {
                let config_bytes = source.blob(&config)?;
                let what = format!("image configuration {}", config.digest);
                let (_, diff_ids) = parse_config(&config_bytes, layers.len())
                    .map_err(|r| source.corrupt(&what, r))?;
                let layers = layers.iter().zip(diff_ids).map(|(layer, diff_id)| {
                    let want = LayerWant {
                        digest: Some(layer.digest.clone()),
                        size: layer.size,
                        diff_id,
                        origin: source.label(),
                    };
                    (blob_member(&layer.digest), want)
                });
                return Ok(Plan {
                    layers: layers.collect(),
                    names: oci_names(source, entry, tags.get(config.digest.hex()))?,
                    config: config_bytes,
                    manifest: Some(bytes),
                });
            }
        }
    }
    Err(source.corrupt("index.json", "indexes nested too deep"))
}

fn name_annotation(entry: &Descriptor) -> Option<&String> {
    let annotation = |key: &str| entry.annotations.get(key);
    annotation("io.containerd.image.name")
        .or_else(|| annotation("org.opencontainers.image.ref.name"))
}

/// The entry's name: a full one, or a bare tag of an image that is called like its file.
fn oci_names(
    source: &Source,
    entry: &Descriptor,
    tags: Option<&Vec<String>>,
) -> Result<Vec<String>, ImageError> {
    let written = match (name_annotation(entry), tags) {
        (Some(name), _) if name.contains([':', '/', '@']) => vec![name.clone()],
        (_, Some(tags)) if !tags.is_empty() => tags.clone(),
        (Some(tag), _) => vec![format!("{}:{tag}", source.stem())],
        (None, _) => vec![source.stem()],
    };
    full_names(source, &written)
}

fn full_names(source: &Source, written: &[String]) -> Result<Vec<String>, ImageError> {
    let parse = |name: &String| match Reference::parse(name) {
        Ok(reference) => Ok(reference.to_string()),
        Err(e) => Err(source.bad(format!(
            "{e}; name the image in the archive, or rename the file"
        ))),
    };
    written.iter().map(parse).collect()
}

fn blob_member(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

// --- docker save ------------------------------------------------------------------------------

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn saved(source: &Source) -> Result<Vec<Saved>, ImageError> {
    let bytes = source.read("manifest.json")?;
    let images: Vec<Saved> =
        serde_json::from_slice(&bytes).map_err(|e| source.corrupt("manifest.json", e))?;
    if images.len() > IMAGES_MAX {
        return Err(source.corrupt("manifest.json", format!("more than {IMAGES_MAX} images")));
    }
    Ok(images)
}

/// The digest in a configuration's member name: `<hex>.json` or `blobs/sha256/<hex>`.
fn hex_of(member: &str) -> &str {
    let name = member.rsplit('/').next().unwrap_or(member);
    name.strip_suffix(".json").unwrap_or(name)
}

fn docker_tags(source: &Source) -> Result<HashMap<String, Vec<String>>, ImageError> {
    let images = saved(source)?;
    Ok(images
        .into_iter()
        .map(|s| {
            (
                hex_of(&s.config).to_owned(),
                s.repo_tags.unwrap_or_default(),
            )
        })
        .collect())
}

fn plan_docker(source: &Source) -> Result<Vec<Plan>, ImageError> {
    saved(source)?
        .into_iter()
        .map(|image| plan_docker_image(source, image))
        .collect()
}

fn plan_docker_image(source: &Source, image: Saved) -> Result<Plan, ImageError> {
    let what = format!("image configuration {}", image.config);
    let config = source.read(&image.config)?;
    let actual = Digest::from_hash(&Sha256::digest(&config));
    if Digest::parse(&format!("sha256:{}", hex_of(&image.config))).is_ok_and(|d| d != actual) {
        return Err(source.corrupt(&what, format!("content has digest {actual}")));
    }
    if image.layers.len() > LAYERS_MAX {
        return Err(source.corrupt(&what, format!("more than {LAYERS_MAX} layers")));
    }
    let (_, diff_ids) =
        parse_config(&config, image.layers.len()).map_err(|r| source.corrupt(&what, r))?;
    let mut layers = Vec::new();
    for (member, diff_id) in image.layers.into_iter().zip(diff_ids) {
        let want = LayerWant {
            digest: None,
            size: source.size(&member)?,
            diff_id,
            origin: source.label(),
        };
        layers.push((member, want));
    }
    let tags = image
        .repo_tags
        .filter(|t| !t.is_empty())
        .unwrap_or_else(|| vec![source.stem()]);
    Ok(Plan {
        config,
        manifest: None,
        layers,
        names: full_names(source, &tags)?,
    })
}
