//! Images: from a registry or a file to a root file system that a container can start in.
//!
//! ```text
//! pod's image name ─► reference ─► present? ─yes─────────────────────────────► overlay mount
//!                                     └─no─► pull (registry) ──┬─► verify ─► unpack once per layer ─┘
//!   gantry-agent image import FILE, drop-in directory ─────┘
//! ```
//! Files: [`reference`] names, [`auth`] pull secrets, `document` manifests, `stream` hashing and
//! decompression, [`extract`] the confined unpacker, `content` the directories, `pull` and `import`
//! the two sources, `overlay` the mounts, [`registries`] the operator's search list and mirrors,
//! [`drop_in`] the directory of machines without a registry, `collect` what goes when the disk fills,
//! [`inventory`] what people see and remove.
//!
//! Invariants:
//! * nothing is visible before every byte was verified (digest, size, diff ID) and synced;
//! * one layer is unpacked once, whoever asks, and shared by all containers;
//! * an image that is handed out, that a container's mount was made from, or that was imported from
//!   a file is not cleaned up;
//! * the store belongs to the machine, not to the process: a second one may import meanwhile.

pub mod auth;
mod collect;
mod content;
mod document;
pub mod drop_in;
mod error;
pub mod extract;
mod import;
pub mod inventory;
pub mod mount_points;
mod overlay;
mod pull;
pub mod reference;
pub mod registries;
mod stream;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::keyed_locks::KeyedLocks;
pub use auth::{Credential, RegistryAuth};
use collect::Candidate;
pub use collect::{Disk, images_of, keep_disk_free};
use content::{Content, Record, Table};
pub use error::ImageError;
pub use import::{Imported, Progress};
pub use mount_points::MountPoints;
pub use oci_spec::image::ImageConfiguration;
pub use reference::{Digest, Reference};
pub use registries::Registries;

use crate::user_namespaces::UserNamespace;

/// Layers downloaded at the same time, all pulls together.
const DOWNLOADS_MAX: usize = 4;

/// When to ask the registry: `spec.containers[].imagePullPolicy`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PullPolicy {
    /// Before every start.
    Always,
    /// Only when the image is not here.
    IfNotPresent,
    /// Never.
    Never,
}

impl PullPolicy {
    /// The policy as written; absent: Always for the tag `latest`, else IfNotPresent.
    pub fn of(policy: Option<&str>, image: &str) -> Self {
        match policy {
            Some("Always") => Self::Always,
            Some("Never") => Self::Never,
            Some("IfNotPresent") => Self::IfNotPresent,
            _ => match Reference::parse(image) {
                Ok(r) if r.digest.is_none() && r.tag.as_deref() == Some("latest") => Self::Always,
                _ => Self::IfNotPresent,
            },
        }
    }
}

/// What a clean-up did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Collected {
    /// IDs of the images that went.
    pub images: Vec<Digest>,
    /// Bytes that should still go, and nothing more could.
    pub missing_bytes: u64,
}

/// An image whose names or pin have changed is handed out anew beside those of before.
type HandedOut = HashMap<Digest, Vec<Weak<Image>>>;
type Held<'a> = std::sync::MutexGuard<'a, HandedOut>;

fn is_held(held: &HandedOut, id: &Digest) -> bool {
    let mut all = held.get(id).into_iter().flatten();
    all.any(|weak| weak.strong_count() > 0)
}

/// An image that is here, complete. While one is held, its files stay.
#[derive(Clone, Debug)]
pub struct Image {
    /// The configuration's digest, `sha256:...`.
    pub id: Digest,
    /// Full names, tags and digests alike.
    pub references: Vec<String>,
    /// Entry point, environment, user, working directory.
    pub config: ImageConfiguration,
    /// Diff IDs, bottom first.
    pub layers: Vec<Digest>,
    /// Compressed size, bytes.
    pub size_bytes: u64,
    /// Imported from a file.
    pub pinned: bool,
}

impl Image {
    /// `status.containerStatuses[].imageID`: the name with digest when it came from a registry.
    pub fn image_id(&self) -> String {
        let digest = self.references.iter().find(|r| r.contains('@'));
        digest.cloned().unwrap_or_else(|| self.id.to_string())
    }
}

/// The node's images. Cheap to clone.
#[derive(Clone)]
pub struct ImageStore {
    shared: Arc<Shared>,
}

struct Shared {
    content: Content,
    /// `/var/lib/gantry/pods`: each container's layers directory names its image.
    pods: PathBuf,
    /// One task at a time per image name and per layer.
    locks: KeyedLocks,
    downloads: tokio::sync::Semaphore,
    registries: Registries,
    /// Images somebody holds.
    handed_out: Mutex<HandedOut>,
}

impl ImageStore {
    /// Opens the store below `/var/lib/gantry`, making it on first use.
    pub fn open(lib_dir: &Path) -> Result<Self, ImageError> {
        Self::open_with(lib_dir, Registries::default())
    }

    /// The same, with the operator's search list and mirrors.
    pub fn open_with(lib_dir: &Path, registries: Registries) -> Result<Self, ImageError> {
        Ok(Self {
            shared: Arc::new(Shared {
                content: Content::open(lib_dir.join("images"))?,
                pods: lib_dir.join("pods"),
                locks: KeyedLocks::default(),
                downloads: tokio::sync::Semaphore::new(DOWNLOADS_MAX),
                registries,
                handed_out: Mutex::default(),
            }),
        })
    }

    /// Tries what containers will need of this directory's file system: `Err` says in words what
    /// is missing (no overlayfs, ramfs without extended attributes, not root).
    pub async fn probe(&self) -> Result<(), ImageError> {
        self.blocking(|this| overlay::probe(&this.content().fresh("unpack")))
            .await
    }

    /// The image of this name, pulled if the policy says so.
    ///
    /// # Errors
    /// With the reason Kubernetes shows ([`ImageError::reason`]). Retry and back-off are the
    /// caller's; a failed pull leaves verified layers and partial downloads for the next one.
    pub async fn ensure(
        &self,
        reference: &str,
        policy: PullPolicy,
        auth: &[RegistryAuth],
    ) -> Result<Arc<Image>, ImageError> {
        self.ensure_watched(reference, policy, auth, &|_| {}).await
    }

    /// The same; `watch` is called when a pull begins (nothing of nothing done) and often while it
    /// goes on, and never when the image is here.
    pub async fn ensure_watched(
        &self,
        reference: &str,
        policy: PullPolicy,
        auth: &[RegistryAuth],
        watch: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Arc<Image>, ImageError> {
        let names = self.shared.registries.candidates(reference)?;
        if policy != PullPolicy::Always
            && let Some(image) = self.first_present(&names, reference).await?
        {
            return Ok(image);
        }
        if policy == PullPolicy::Never {
            return Err(ImageError::NeverPull {
                reference: reference.to_owned(),
            });
        }
        // Whoever waited here finds the image there.
        let key: Vec<String> = names.iter().map(ToString::to_string).collect();
        let _one = self.shared.locks.lock(&key.join(" ")).await;
        if policy == PullPolicy::IfNotPresent
            && let Some(image) = self.first_present(&names, reference).await?
        {
            return Ok(image);
        }
        watch(Progress::default());
        let mut failures = Vec::new();
        for name in &names {
            match Box::pin(pull::pull(self, name, auth, watch)).await {
                Ok(image) => return Ok(image),
                Err(error) => failures.push((name.registry.clone(), error)),
            }
        }
        Err(ImageError::Pull {
            reference: reference.to_owned(),
            source: Box::new(ImageError::of_all(failures)),
        })
    }

    async fn first_present(
        &self,
        names: &[Reference],
        written: &str,
    ) -> Result<Option<Arc<Image>>, ImageError> {
        for name in names {
            if let Some(image) = self.present(name, written).await? {
                return Ok(Some(image));
            }
        }
        Ok(None)
    }

    async fn present(
        &self,
        name: &Reference,
        written: &str,
    ) -> Result<Option<Arc<Image>>, ImageError> {
        let (key, written) = (name.to_string(), written.to_owned());
        self.blocking(move |this| {
            let image = this.lookup(&key)?;
            if let Some(image) = &image {
                this.content().touch(&image.id);
            }
            Ok(image)
        })
        .await
        .map_err(|source| ImageError::Inspect {
            reference: written,
            source: Box::new(source),
        })
    }

    /// Mounts a writable root for one container run at `layers_dir/rootfs`, with the ids of `user`
    /// where the pod has a user namespace, and `below` the image's layers. Idempotent.
    pub async fn mount_rootfs(
        &self,
        image: &Image,
        layers_dir: &Path,
        user: Option<&UserNamespace>,
        below: MountPoints,
    ) -> Result<PathBuf, ImageError> {
        let layers: Vec<PathBuf> = image
            .layers
            .iter()
            .map(|d| self.content().layer_fs(d))
            .collect();
        let (id, dir) = (image.id.clone(), layers_dir.to_owned());
        let user = user.cloned();
        self.blocking(move |this| {
            let directory = this.content().mount_points();
            let context = format!("make {}", directory.display());
            let mut lower = below.layers(&directory).map_err(ImageError::io(context))?;
            lower.extend(layers);
            overlay::mount_rootfs(&lower, id.as_str(), &dir, user.as_ref())
        })
        .await
    }

    /// Unmounts what [`ImageStore::mount_rootfs`] mounted. Idempotent.
    pub async fn unmount_rootfs(&self, layers_dir: &Path) -> Result<(), ImageError> {
        let dir = layers_dir.to_owned();
        self.blocking(move |_| overlay::unmount_rootfs(&dir)).await
    }

    /// Imports every image of an OCI layout directory, an OCI archive or a docker-save archive
    /// (plain, gzip or zstd). `progress` is called often; make it cheap.
    pub async fn import(
        &self,
        path: &Path,
        progress: impl Fn(Progress) + Send + 'static,
    ) -> Result<Vec<Imported>, ImageError> {
        let path = path.to_owned();
        self.blocking(move |this| import::import(this.content(), &path, &progress))
            .await
    }

    /// The same from an open archive; `name` is its file name, for messages and images without one.
    pub async fn import_file(
        &self,
        file: std::fs::File,
        name: &str,
        progress: impl Fn(Progress) + Send + 'static,
    ) -> Result<Vec<Imported>, ImageError> {
        let name = PathBuf::from(name);
        self.blocking(move |this| import::import_file(this.content(), file, &name, &progress))
            .await
    }

    /// An empty file without a name on the store's disk, for an archive that is on its way here: it
    /// is gone with its descriptor, whatever happens.
    ///
    /// # Errors
    /// The disk has less room than `size_bytes`.
    pub async fn staging_file(&self, size_bytes: u64) -> Result<std::fs::File, ImageError> {
        self.blocking(move |this| {
            let available_bytes = this.content().disk()?.available_bytes;
            if size_bytes > available_bytes {
                return Err(ImageError::DiskFull {
                    size_bytes,
                    available_bytes,
                });
            }
            this.content().unnamed_file()
        })
        .await
    }

    /// Removes images that nobody needs and layers without an image.
    ///
    /// * `keep` – image IDs or names the caller's pods use, running or about to.
    /// * returns the IDs that went; empty when another process is adding content just now.
    pub async fn remove_unused(&self, keep: &BTreeSet<String>) -> Result<Vec<Digest>, ImageError> {
        let keep = keep.clone();
        self.blocking(move |this| {
            this.remove_while(|this, held| {
                let idle = this.candidates(&keep, held)?.into_iter();
                Ok(idle
                    .filter(|c| !c.in_use && !c.pinned)
                    .map(|c| c.id)
                    .collect())
            })
            .map(Option::unwrap_or_default)
        })
        .await
    }

    /// Removes the least recently used images while the disk is too full: [`Disk`].
    pub async fn collect(&self, keep: &BTreeSet<String>) -> Result<Collected, ImageError> {
        let keep = keep.clone();
        self.blocking(move |this| {
            let mut gone = Vec::new();
            let mut excess = collect::excess_bytes(this.content().disk()?);
            let goal = this
                .content()
                .disk()?
                .available_bytes
                .saturating_add(excess);
            while excess > 0 {
                // One at a time: layers are shared, so only the disk knows what one has freed.
                let went = this.remove_while(|this, held| {
                    let mut chosen = collect::choose(this.candidates(&keep, held)?, excess);
                    chosen.truncate(1);
                    Ok(chosen)
                })?;
                let went = went.unwrap_or_default();
                if went.is_empty() {
                    break;
                }
                gone.extend(went);
                excess = goal.saturating_sub(this.content().disk()?.available_bytes);
            }
            Ok(Collected {
                images: gone,
                missing_bytes: excess,
            })
        })
        .await
    }

    /// Removes what `choose` names, under the locks that make the choice true. None: somebody adds
    /// content just now, and nothing was removed.
    fn remove_while(
        &self,
        choose: impl Fn(&Self, &Held<'_>) -> Result<Vec<Digest>, ImageError>,
    ) -> Result<Option<Vec<Digest>>, ImageError> {
        let Some(lock) = self.content().try_lock_removal()? else {
            return Ok(None);
        };
        // Held to the end, so that no lookup hands out what is about to go.
        let held = self.handed_out();
        let gone = choose(self, &held)?;
        self.content().update(|table| {
            table.images.retain(|id, _| !gone.contains(id));
            table.references.retain(|_, id| !gone.contains(id));
        })?;
        self.content().sweep(&self.content().table()?, &lock)?;
        drop(held);
        Ok(Some(gone))
    }

    fn candidates(
        &self,
        keep: &BTreeSet<String>,
        held: &Held<'_>,
    ) -> Result<Vec<Candidate>, ImageError> {
        let names = keep.iter().flat_map(|k| {
            let meant = self.shared.registries.candidates(k).unwrap_or_default();
            meant.into_iter().map(|name| name.to_string())
        });
        let mut used: BTreeSet<String> = names.chain(keep.iter().cloned()).collect();
        used.extend(
            held.keys()
                .filter(|id| is_held(held, id))
                .map(ToString::to_string),
        );
        used.extend(inventory::mounted_images(&self.shared.pods).into_keys());
        let table = self.content().table()?;
        let by_name: BTreeSet<&Digest> = table
            .references
            .iter()
            .filter(|(name, _)| used.contains(*name))
            .map(|(_, id)| id)
            .collect();
        Ok(table
            .images
            .iter()
            .map(|(id, record)| Candidate {
                id: id.clone(),
                size_bytes: record.size_bytes,
                idle: self.content().idle(id),
                in_use: used.contains(id.as_str()) || by_name.contains(id),
                pinned: record.pinned,
            })
            .collect())
    }

    fn content(&self) -> &Content {
        &self.shared.content
    }

    fn handed_out(&self) -> Held<'_> {
        self.shared
            .handed_out
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The image of a full name, if it is here and complete.
    fn lookup(&self, key: &str) -> Result<Option<Arc<Image>>, ImageError> {
        let table = self.content().table()?;
        match table
            .references
            .get(key)
            .and_then(|id| Some((id, table.images.get(id)?)))
        {
            Some((id, record)) => {
                // Somebody deleted a layer behind our back: as good as not here.
                if record.layers.iter().all(|l| self.content().has_layer(l)) {
                    self.load(&table, id, record).map(Some)
                } else {
                    Ok(None)
                }
            }
            None => Ok(None),
        }
    }

    fn load(&self, table: &Table, id: &Digest, record: &Record) -> Result<Arc<Image>, ImageError> {
        let mut held = self.handed_out();
        let references: Vec<String> = table
            .references
            .iter()
            .filter(|(_, i)| *i == id)
            .map(|(name, _)| name.clone())
            .collect();
        let mut known = held.get(id).into_iter().flatten().filter_map(Weak::upgrade);
        let is_same = |i: &Arc<Image>| i.references == references && i.pinned == record.pinned;
        if let Some(image) = known.find(is_same) {
            return Ok(image);
        }
        let bytes = self.content().document(id)?;
        let (config, layers) =
            document::parse_config(&bytes, record.layers.len()).map_err(|reason| {
                ImageError::Corrupt {
                    origin: self.content().blob_path(id).display().to_string(),
                    what: format!("image configuration {id}"),
                    reason,
                }
            })?;
        let image = Arc::new(Image {
            id: id.clone(),
            references,
            config,
            layers,
            size_bytes: record.size_bytes,
            pinned: record.pinned,
        });
        held.retain(|_, all| {
            all.retain(|weak| weak.strong_count() > 0);
            !all.is_empty()
        });
        let all = held.entry(id.clone()).or_default();
        all.push(Arc::downgrade(&image));
        Ok(image)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImageError> {
        let this = self.clone();
        blocking(move || work(&this)).await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|e| Err(ImageError::io("image task")(std::io::Error::other(e))))
}

/// Unmounts and deletes a container run's layers directory, whether or not its image is still here.
/// Idempotent.
pub async fn remove_rootfs(layers_dir: &Path) -> Result<(), ImageError> {
    let dir = layers_dir.to_owned();
    blocking(move || {
        overlay::unmount_rootfs(&dir)?;
        // The container shaped the upper directory: any depth, any name.
        crate::volumes::tree::remove(&dir)
            .map_err(ImageError::io(format!("remove {}", dir.display())))
    })
    .await
}

#[cfg(test)]
mod tests;
