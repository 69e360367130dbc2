//! `-f`: files, directories and stdin to objects, in the order given.

use crate::failure::Failure;
use clap::Args;
use gantry_api::kinds::{Kind, by_api_version};
use gantry_api::manifest::{self, MANIFEST_BYTES_MAX};
use serde_json::Value;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// Files in one directory tree.
const FILES_MAX: usize = 10_000;

#[derive(Args, Debug, Clone, Default)]
pub(crate) struct Files {
    /// File or directory with manifests (YAML or JSON); - for stdin; may be repeated
    #[arg(short = 'f', long = "filename", value_delimiter = ',')]
    pub(crate) filename: Vec<PathBuf>,
    /// Also read the directories inside a directory
    #[arg(short = 'R', long)]
    pub(crate) recursive: bool,
}

/// One object of a manifest.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) kind: &'static Kind,
    pub(crate) object: Value,
    /// File name, or `STDIN`.
    pub(crate) source: String,
}

impl Manifest {
    pub(crate) fn name(&self) -> &str {
        self.object
            .pointer("/metadata/name")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }

    /// The object's namespace: its own, or `default`; "" for cluster-scoped kinds.
    ///
    /// # Errors
    /// When `-n` was given and says something else.
    pub(crate) fn namespace(&self, default: &str, given: bool) -> Result<String, Failure> {
        if !self.kind.namespaced {
            return Ok(String::new());
        }
        let own = self
            .object
            .pointer("/metadata/namespace")
            .and_then(Value::as_str);
        match own.filter(|n| !n.is_empty()) {
            Some(own) if given && own != default => Err(Failure::local(format!(
                "the namespace from the provided object {own:?} does not match the namespace \
                 {default:?}. You must pass '--namespace={own}' to perform this operation."
            ))),
            Some(own) => Ok(own.to_owned()),
            None => Ok(default.to_owned()),
        }
    }
}

impl Files {
    pub(crate) fn is_empty(&self) -> bool {
        self.filename.is_empty()
    }

    /// All objects, or the first thing that is wrong with any of the files.
    pub(crate) fn read(&self) -> Result<Vec<Manifest>, Failure> {
        let mut manifests = Vec::new();
        for path in &self.filename {
            if path == Path::new("-") {
                let mut text = String::new();
                std::io::stdin()
                    .take(MANIFEST_BYTES_MAX as u64 + 1)
                    .read_to_string(&mut text)
                    .map_err(|e| Failure::local(format!("cannot read stdin: {e}")))?;
                add("STDIN", &text, &mut manifests)?;
                continue;
            }
            let mut files = Vec::new();
            let meta = std::fs::metadata(path).map_err(|e| {
                if e.kind() == std::io::ErrorKind::NotFound {
                    Failure::local(format!("the path {:?} does not exist", path.display()))
                } else {
                    Failure::local(format!("cannot read {}: {e}", path.display()))
                }
            })?;
            if meta.is_dir() {
                collect(path, self.recursive, &mut files)?;
            } else {
                files.push(path.clone());
            }
            for file in files {
                let shown = file.display().to_string();
                let text = read_file(&file)
                    .map_err(|e| Failure::local(format!("cannot read {shown}: {e}")))?;
                add(&shown, &text, &mut manifests)?;
            }
        }
        if manifests.is_empty() {
            return Err(Failure::local("no objects passed to apply"));
        }
        Ok(manifests)
    }
}

fn read_file(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let file = std::fs::File::open(path)?;
    file.take(MANIFEST_BYTES_MAX as u64 + 1)
        .read_to_string(&mut text)?;
    Ok(text)
}

/// Manifest files of a directory, by name, so that the order does not depend on the disk.
fn collect(dir: &Path, recursive: bool, files: &mut Vec<PathBuf>) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::local(format!("cannot read {}: {e}", dir.display()));
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // Links to directories are not followed: they may lead back.
        entries.push((entry.path(), entry.file_type().map_err(failed)?.is_dir()));
        if entries.len() + files.len() > FILES_MAX {
            let text = format!("{} holds more than {FILES_MAX} files", dir.display());
            return Err(Failure::Local(text));
        }
    }
    entries.sort();
    for (path, is_dir) in entries {
        if is_dir {
            if recursive {
                collect(&path, true, files)?;
            }
        } else if path
            .extension()
            .is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
        {
            files.push(path);
        }
    }
    Ok(())
}

fn add(source: &str, text: &str, manifests: &mut Vec<Manifest>) -> Result<(), Failure> {
    let objects = manifest::documents(source, text).map_err(|e| Failure::local(e.to_string()))?;
    for object in objects {
        let field = |name: &str| object.get(name).and_then(Value::as_str).unwrap_or_default();
        let Some(kind) = by_api_version(field("apiVersion"), field("kind")) else {
            let name = object
                .pointer("/metadata/name")
                .and_then(Value::as_str)
                .unwrap_or_default();
            return Err(Failure::local(format!(
                "resource mapping not found for name: {name:?} from {source:?}: no matches for \
                 kind {:?} in version {:?}",
                field("kind"),
                field("apiVersion")
            )));
        };
        manifests.push(Manifest {
            kind,
            object,
            source: source.to_owned(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, kind: &str| {
            let text = format!("apiVersion: v1\nkind: {kind}\nmetadata: {{name: {name}}}\n");
            std::fs::write(dir.path().join(name), text).unwrap();
        };
        write("b.yaml", "Pod");
        write("a.yml", "Namespace");
        write("ignored.txt", "Pod");
        let files = Files {
            filename: vec![dir.path().to_owned()],
            recursive: false,
        };
        let kinds: Vec<&str> = files.read().unwrap().iter().map(|m| m.kind.kind).collect();
        assert_eq!(kinds, ["Namespace", "Pod"]);
        write("c.yaml", "Widget");
        let error = files.read().unwrap_err().to_string();
        assert!(
            error.contains("no matches for kind \"Widget\" in version \"v1\""),
            "{error}"
        );
    }

    #[test]
    fn a_namespace_that_contradicts_is_refused() {
        let mut manifests = Vec::new();
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop}\n";
        add("x", text, &mut manifests).unwrap();
        assert_eq!(manifests[0].namespace("default", false).unwrap(), "shop");
        assert!(manifests[0].namespace("other", true).is_err());
    }
}
