//! What lies on disk: blobs by digest, unpacked layers by diff ID, one table of names.
//!
//! ```text
//! images/ ─┬─ references.json          name ─► image ID (the configuration's digest) ─► layers
//!          ├─ blobs/sha256/<hex>       configurations and manifests
//!          ├─ layers/sha256-<hex>/fs   one per diff ID, shared by all images
//!          ├─ ingest/                  what is not whole yet: *.part, unpack-*, trash-*
//!          └─ lock, table.lock         flock: content (shared: add, exclusive: remove), table
//! ```
//! Invariants: a layer has its name only after its content was verified and synced; a name points
//! only to an image whose layers all have theirs. So a crash leaves garbage in `ingest` at worst,
//! and a second process (`image import`) may work beside the agent.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::collect::Disk;
use super::document::DOCUMENT_BYTES_MAX;
use super::error::ImageError;
use super::extract::{self, DevicePolicy, ExtractError, ExtractOptions, Summary};
use super::reference::Digest;
use super::stream::{Counted, decompressed};
use crate::orlov;
use crate::volumes::tree;

/// Entries of one layer; a full desktop distribution has 300,000.
const LAYER_ENTRIES_MAX: u64 = 1_000_000;
/// Decompressed bytes of one layer.
const LAYER_BYTES_MAX: u64 = 64 << 30;
/// A layer may grow by this factor: real ones stay below 20, gzip's ceiling is 1032.
const LAYER_RATIO_MAX: u64 = 200;
/// Below this many bytes any ratio is harmless.
const LAYER_RATIO_FLOOR_BYTES: u64 = 256 << 20;

/// One image of the table.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// Diff IDs, bottom first.
    pub(super) layers: Vec<Digest>,
    /// The manifest it came with; none for docker-save archives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) manifest: Option<Digest>,
    /// Sum of its layers as they came (compressed), bytes.
    pub(super) size_bytes: u64,
    /// Imported from a file: nobody can pull it again, so clean-up leaves it.
    #[serde(default)]
    pub(super) pinned: bool,
}

/// The whole table.
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
pub(super) struct Table {
    /// By image ID.
    pub(super) images: BTreeMap<Digest, Record>,
    /// Full name to image ID.
    pub(super) references: BTreeMap<String, Digest>,
}

/// Holds a lock file's flock until dropped.
pub(super) struct Lock(#[expect(dead_code, reason = "closing it releases the lock")] File);

/// The directories. All calls block.
#[derive(Debug)]
pub(super) struct Content {
    root: PathBuf,
    sequence: AtomicU64,
}

impl Content {
    pub(super) fn open(root: PathBuf) -> Result<Self, ImageError> {
        let blobs = root.join("blobs/sha256");
        fs::create_dir_all(&blobs)
            .map_err(ImageError::io(format!("create {}", blobs.display())))?;
        for dir in ["layers", "ingest"].map(|name| root.join(name)) {
            orlov::ensure_apart(&[&dir])
                .map_err(ImageError::io(format!("create {}", dir.display())))?;
        }
        // Layers hold other people's setuid binaries: only root may look inside.
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700))
            .map_err(ImageError::io(format!("chmod {}", root.display())))?;
        let content = Self {
            root,
            sequence: AtomicU64::new(0),
        };
        content.clear_ingest();
        Ok(content)
    }

    /// What a crash left behind, unless another process is at work. Partial downloads stay: the
    /// next pull goes on from there.
    fn clear_ingest(&self) {
        let Ok(Some(_lock)) = self.try_lock_removal() else {
            return;
        };
        for entry in fs::read_dir(self.ingest()).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with("unpack-") || name.starts_with("trash-") {
                let _ = tree::remove(&entry.path());
            } else if name.starts_with("blob-") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Directory of the layers that are below every image's.
    pub fn mount_points(&self) -> PathBuf {
        self.root.join("mount-points")
    }

    pub(super) fn ingest(&self) -> PathBuf {
        self.root.join("ingest")
    }

    pub(super) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    fn layer_dir(&self, diff_id: &Digest) -> PathBuf {
        self.root
            .join("layers")
            .join(format!("sha256-{}", diff_id.hex()))
    }

    /// Where the layer's files are, once it is there.
    pub(super) fn layer_fs(&self, diff_id: &Digest) -> PathBuf {
        self.layer_dir(diff_id).join("fs")
    }

    pub(super) fn has_layer(&self, diff_id: &Digest) -> bool {
        self.layer_fs(diff_id).is_dir()
    }

    /// The image was used just now: what the time of its configuration's file says. Best effort,
    /// and on no disk's time.
    pub(super) fn touch(&self, id: &Digest) {
        if let Ok(file) = File::open(self.blob_path(id)) {
            let _ = file.set_modified(std::time::SystemTime::now());
        }
    }

    /// Since an image was last used. What cannot be told is no reason to remove it.
    pub(super) fn idle(&self, id: &Digest) -> Duration {
        fs::metadata(self.blob_path(id))
            .and_then(|m| m.modified())
            .ok()
            .and_then(|at| at.elapsed().ok())
            .unwrap_or_default()
    }

    /// The file system that all of this is on.
    pub(super) fn disk(&self) -> Result<Disk, ImageError> {
        let found = rustix::fs::statvfs(&self.root)
            .map_err(|e| ImageError::io(format!("statvfs {}", self.root.display()))(e.into()))?;
        Ok(Disk {
            capacity_bytes: found.f_blocks.saturating_mul(found.f_frsize),
            available_bytes: found.f_bavail.saturating_mul(found.f_frsize),
        })
    }

    /// A name below `ingest` that no other thread or process uses.
    pub(super) fn fresh(&self, prefix: &str) -> PathBuf {
        let n = self.sequence.fetch_add(1, Ordering::Relaxed);
        self.ingest()
            .join(format!("{prefix}-{}-{n}", std::process::id()))
    }

    /// A file that is gone with its descriptor.
    pub(super) fn unnamed_file(&self) -> Result<File, ImageError> {
        let path = self.fresh("blob");
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(ImageError::io(format!("create {}", path.display())))?;
        fs::remove_file(&path).map_err(ImageError::io(format!("unlink {}", path.display())))?;
        Ok(file)
    }

    fn lock_file(&self, name: &str) -> Result<File, ImageError> {
        let path = self.root.join(name);
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(ImageError::io(format!("open {}", path.display())))
    }

    /// Held while content is added, by any number of processes.
    pub(super) fn lock_addition(&self) -> Result<Lock, ImageError> {
        let file = self.lock_file("lock")?;
        file.lock_shared()
            .map_err(ImageError::io("lock the image store"))?;
        Ok(Lock(file))
    }

    /// Held while content is removed; none while anybody adds.
    pub(super) fn try_lock_removal(&self) -> Result<Option<Lock>, ImageError> {
        let file = self.lock_file("lock")?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Lock(file))),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(e)) => Err(ImageError::io("lock the image store")(e)),
        }
    }

    /// Reads the table. One that cannot be read is set aside: layers stay, names are lost.
    pub(super) fn table(&self) -> Result<Table, ImageError> {
        let path = self.root.join("references.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Table::default()),
            Err(e) => return Err(ImageError::io(format!("read {}", path.display()))(e)),
        };
        match serde_json::from_slice(&bytes) {
            Ok(table) => Ok(table),
            Err(error) => {
                let aside = path.with_extension("json.damaged");
                tracing::error!(%error, path = %path.display(), aside = %aside.display(),
                    "image table is damaged: set aside, images must be pulled or imported again");
                fs::rename(&path, &aside)
                    .map_err(ImageError::io(format!("rename {}", path.display())))?;
                Ok(Table::default())
            }
        }
    }

    /// Changes the table under its lock; durable when it returns.
    pub(super) fn update<T>(&self, change: impl FnOnce(&mut Table) -> T) -> Result<T, ImageError> {
        let lock = self.lock_file("table.lock")?;
        lock.lock()
            .map_err(ImageError::io("lock the image table"))?;
        let mut table = self.table()?;
        let result = change(&mut table);
        let bytes = serde_json::to_vec_pretty(&table)
            .map_err(|e| ImageError::io("encode the image table")(e.into()))?;
        self.write_durably(&self.root.join("references.json"), &bytes)?;
        Ok(result)
    }

    fn write_durably(&self, path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
        let partial = self.fresh("blob");
        let write = || {
            let mut file = File::create_new(&partial)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&partial, path)?;
            sync_dir(path.parent().unwrap_or(Path::new("/")))
        };
        write().map_err(|e| {
            let _ = fs::remove_file(&partial);
            ImageError::io(format!("write {}", path.display()))(e)
        })
    }

    /// Keeps a small document under its digest.
    pub(super) fn put_document(&self, bytes: &[u8]) -> Result<Digest, ImageError> {
        let digest = Digest::from_hash(&Sha256::digest(bytes));
        let path = self.blob_path(&digest);
        if !path.is_file() {
            self.write_durably(&path, bytes)?;
        }
        Ok(digest)
    }

    /// Reads a document back and checks that the disk still says the same.
    pub(super) fn document(&self, digest: &Digest) -> Result<Vec<u8>, ImageError> {
        let path = self.blob_path(digest);
        let context = || format!("read {}", path.display());
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|f| f.take(DOCUMENT_BYTES_MAX + 1).read_to_end(&mut bytes))
            .map_err(ImageError::io(context()))?;
        let actual = Digest::from_hash(&Sha256::digest(&bytes));
        if actual != *digest {
            return Err(ImageError::Corrupt {
                origin: path.display().to_string(),
                what: format!("blob {digest}"),
                reason: format!("content has digest {actual}"),
            });
        }
        Ok(bytes)
    }

    /// Verifies and unpacks one layer; visible only when every byte was checked.
    pub(super) fn unpack(&self, source: impl Read, want: &LayerWant) -> Result<(), ImageError> {
        if self.has_layer(&want.diff_id) {
            return Ok(());
        }
        let partial = self.fresh("unpack");
        let fs_dir = partial.join("fs");
        fs::create_dir_all(&fs_dir)
            .map_err(ImageError::io(format!("create {}", fs_dir.display())))?;
        let result = self.unpack_into(source, want, &partial, &fs_dir);
        let _ = tree::remove(&partial);
        let summary = result?;
        if !summary.skipped.is_empty() {
            tracing::debug!(layer = %want.diff_id, devices = ?summary.skipped, "device nodes left out");
        }
        Ok(())
    }

    fn unpack_into(
        &self,
        source: impl Read,
        want: &LayerWant,
        partial: &Path,
        fs_dir: &Path,
    ) -> Result<Summary, ImageError> {
        let summary = verify_and_extract(source, want, fs_dir)?;
        // The files reach the disk before the name that vouches for them.
        let dir = File::open(partial).map_err(ImageError::io("open the unpacked layer"))?;
        rustix::fs::syncfs(&dir)
            .map_err(|e| ImageError::io("sync the unpacked layer")(e.into()))?;
        let target = self.layer_dir(&want.diff_id);
        match fs::rename(partial, &target) {
            Ok(()) => {}
            // Another process was faster with the same content.
            Err(_) if self.has_layer(&want.diff_id) => return Ok(summary),
            Err(e) => return Err(ImageError::io(format!("rename to {}", target.display()))(e)),
        }
        sync_dir(&self.root.join("layers")).map_err(ImageError::io("sync the layers directory"))?;
        Ok(summary)
    }

    /// Layers and documents that `table` does not need, moved away and deleted. Needs the removal
    /// lock. Returns how many layers went.
    pub(super) fn sweep(&self, table: &Table, _lock: &Lock) -> Result<usize, ImageError> {
        let layers: Vec<PathBuf> = table
            .images
            .values()
            .flat_map(|r| r.layers.iter().map(|d| self.layer_dir(d)))
            .collect();
        let manifests = table.images.values().filter_map(|r| r.manifest.as_ref());
        let blobs: Vec<PathBuf> = table
            .images
            .keys()
            .chain(manifests)
            .map(|d| self.blob_path(d))
            .collect();
        let mut removed = 0;
        for path in entries(&self.root.join("layers"))? {
            if !layers.contains(&path) {
                // Renamed first: a half-deleted layer must not keep its name.
                let trash = self.fresh("trash");
                fs::rename(&path, &trash)
                    .and_then(|()| tree::remove(&trash))
                    .map_err(ImageError::io(format!("remove {}", path.display())))?;
                removed += 1;
            }
        }
        for path in entries(&self.root.join("blobs/sha256"))? {
            if !blobs.contains(&path) {
                fs::remove_file(&path)
                    .map_err(ImageError::io(format!("remove {}", path.display())))?;
            }
        }
        for path in entries(&self.ingest())? {
            if path.extension().is_some_and(|e| e == "part") {
                let _ = fs::remove_file(&path);
            }
        }
        Ok(removed)
    }
}

/// What a layer must turn out to be.
#[derive(Clone, Debug)]
pub(super) struct LayerWant {
    /// Of the bytes as they come; none when only the diff ID is known (docker-save).
    pub(super) digest: Option<Digest>,
    /// Number of bytes as they come.
    pub(super) size: u64,
    /// Of the decompressed tar.
    pub(super) diff_id: Digest,
    /// File or registry, for messages.
    pub(super) origin: String,
}

impl LayerWant {
    fn corrupt(&self, reason: String) -> ImageError {
        ImageError::Corrupt {
            origin: self.origin.clone(),
            what: format!("layer {}", self.digest.as_ref().unwrap_or(&self.diff_id)),
            reason,
        }
    }

    /// Compares what arrived with what was promised.
    pub(super) fn check_input(&self, digest: &Digest, size: u64) -> Result<(), ImageError> {
        if size != self.size {
            return Err(self.corrupt(format!("{size} bytes, want {}", self.size)));
        }
        match &self.digest {
            Some(want) if want != digest => {
                Err(self.corrupt(format!("content has digest {digest}")))
            }
            _ => Ok(()),
        }
    }
}

fn verify_and_extract(
    source: impl Read,
    want: &LayerWant,
    fs_dir: &Path,
) -> Result<Summary, ImageError> {
    let bytes_max = want
        .size
        .saturating_mul(LAYER_RATIO_MAX)
        .clamp(LAYER_RATIO_FLOOR_BYTES, LAYER_BYTES_MAX);
    let options = ExtractOptions {
        entries_max: LAYER_ENTRIES_MAX,
        bytes_max,
        devices: DevicePolicy::Skip,
    };
    let mut input = Counted::new(source, want.size, "the layer");
    let unpacked = (|| {
        let decoder = decompressed(&mut input).map_err(ExtractError::Archive)?;
        // Headers come on top of the files' bytes.
        let ceiling = bytes_max.saturating_add(LAYER_RATIO_FLOOR_BYTES);
        let mut output = Counted::new(decoder, ceiling, "decompressed layer");
        let summary = extract::extract(&mut output, fs_dir, &options)?;
        let (diff_id, _) = output.finish().map_err(ExtractError::Archive)?;
        Ok((summary, diff_id))
    })();
    // A damaged stream fails somewhere in the middle with a puzzling message; whether its bytes
    // were the promised ones is the better answer, so it comes first.
    let checked = input
        .finish()
        .map_err(|e| want.corrupt(e.to_string()))
        .and_then(|(digest, size)| want.check_input(&digest, size));
    let (summary, diff_id) = match (checked, unpacked) {
        (Ok(()), Ok(result)) => result,
        (Err(error), _) => return Err(error),
        (Ok(()), Err(source)) => {
            return Err(ImageError::Layer {
                origin: want.origin.clone(),
                layer: want.diff_id.clone(),
                source,
            });
        }
    };
    if diff_id != want.diff_id {
        return Err(want.corrupt(format!("decompresses to {diff_id}, want {}", want.diff_id)));
    }
    Ok(summary)
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, ImageError> {
    let read = fs::read_dir(dir).map_err(ImageError::io(format!("list {}", dir.display())))?;
    Ok(read.flatten().map(|e| e.path()).collect())
}

fn sync_dir(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}
