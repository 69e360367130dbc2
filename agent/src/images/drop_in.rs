//! The drop-in directory of machines without a registry: archives that are put there are imported.
//!
//! ```text
//! /var/lib/gantry/import/*.tar[.gz|.zst] ─► unchanged since the last look ─► import ─► remembered by size and time
//! ```
//! Looked at every few seconds: a copy in progress changes between two looks and is left alone. The
//! files stay where they are; after a restart those that are remembered are not read again. What
//! cannot be imported is told once and tried again when it changes. Source: k3s `agent/images`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::ImageStore;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(5);
/// Archives in the directory; more are left alone, with a word.
const FILES_MAX: usize = 1000;

/// What a file looked like.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Stamp {
    size_bytes: u64,
    modified_ns: u128,
}

type Stamps = BTreeMap<String, Stamp>;

/// Which files to import: new or changed since they were done, and the same as at the last look.
fn due(now: &Stamps, before: &Stamps, done: &Stamps) -> Vec<String> {
    now.iter()
        .filter(|(name, stamp)| before.get(*name) == Some(*stamp))
        .filter(|(name, stamp)| done.get(*name) != Some(*stamp))
        .map(|(name, _)| name.clone())
        .collect()
}

fn is_archive(name: &str) -> bool {
    [".tar", ".tar.gz", ".tgz", ".tar.zst"]
        .iter()
        .any(|end| name.ends_with(end))
}

fn look(directory: &Path) -> Stamps {
    let mut stamps = Stamps::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let (Some(name), Ok(metadata)) = (entry.file_name().into_string().ok(), entry.metadata())
        else {
            continue;
        };
        if !metadata.is_file() || !is_archive(&name) {
            continue;
        }
        if stamps.len() >= FILES_MAX {
            warn!(directory = %directory.display(), "more than {FILES_MAX} archives: the rest is left alone");
            break;
        }
        let modified = metadata.modified().ok();
        let modified = modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        stamps.insert(
            name,
            Stamp {
                size_bytes: metadata.len(),
                modified_ns: modified.map_or(0, |d| d.as_nanos()),
            },
        );
    }
    stamps
}

/// Imports what is put into `directory` until `shutdown`. The directory is made.
pub async fn watch(store: ImageStore, directory: PathBuf, shutdown: CancellationToken) {
    if let Err(error) = std::fs::create_dir_all(&directory) {
        warn!(directory = %directory.display(), %error, "no drop-in directory for images");
        return;
    }
    let record = directory.join(".imported.json");
    let mut done = read(&record);
    let mut before = look(&directory);
    // Files that were there when the agent started are whole.
    let mut now = before.clone();
    loop {
        let count = done.len();
        done.retain(|name, _| now.contains_key(name));
        let mut changed = done.len() != count;
        for name in due(&now, &before, &done) {
            import(&store, &directory.join(&name)).await;
            done.insert(name.clone(), now[&name]);
            changed = true;
        }
        if changed {
            write(&record, &done);
        }
        tokio::select! {
            // Cancel-safe: both only wait.
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        before = now;
        now = look(&directory);
    }
}

async fn import(store: &ImageStore, path: &Path) {
    match store.import(path, |_| {}).await {
        Ok(images) => {
            let names: Vec<String> = images.into_iter().flat_map(|i| i.references).collect();
            info!(archive = %path.display(), images = names.join(", "), "imported");
        }
        Err(error) => {
            warn!(archive = %path.display(), %error, "not imported; tried again when it changes");
        }
    }
}

/// One that cannot be read only costs reading the archives again.
fn read(path: &Path) -> Stamps {
    std::fs::read(path)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}

fn write(path: &Path, stamps: &Stamps) {
    let temporary = path.with_extension("new");
    let written = serde_json::to_vec(stamps)
        .map_err(std::io::Error::other)
        .and_then(|bytes| std::fs::write(&temporary, bytes))
        .and_then(|()| std::fs::rename(&temporary, path));
    if let Err(error) = written {
        warn!(path = %path.display(), %error, "imported archives will be read again at the next start");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamps(parts: &[(&str, u64)]) -> Stamps {
        let stamp = |size_bytes| Stamp {
            size_bytes,
            modified_ns: 1,
        };
        parts
            .iter()
            .map(|(n, s)| ((*n).to_owned(), stamp(*s)))
            .collect()
    }

    #[test]
    fn a_file_is_due_once_it_has_settled_and_until_it_is_done() {
        let (none, small, whole) = (
            stamps(&[]),
            stamps(&[("a.tar", 1)]),
            stamps(&[("a.tar", 9)]),
        );
        assert!(due(&small, &none, &none).is_empty());
        assert!(due(&whole, &small, &none).is_empty());
        assert_eq!(due(&whole, &whole, &none), ["a.tar"]);
        assert!(due(&whole, &whole, &whole).is_empty());
        assert_eq!(due(&whole, &whole, &small), ["a.tar"]);
        assert!(is_archive("x.tar.zst") && is_archive("x.tgz") && !is_archive("x.part"));
    }

    #[test]
    fn the_record_survives_and_a_damaged_one_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".imported.json");
        let some = stamps(&[("a.tar", 3)]);
        write(&path, &some);
        assert_eq!(read(&path), some);
        std::fs::write(&path, "{").unwrap();
        assert!(read(&path).is_empty());
        std::fs::write(directory.path().join("a.tar"), "abc").unwrap();
        std::fs::write(directory.path().join("notes"), "abc").unwrap();
        assert_eq!(look(directory.path()).len(), 1);
    }
}
