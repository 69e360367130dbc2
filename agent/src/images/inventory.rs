//! What people see of a node's images and do to them: list with users, remove, pin, prune.
//!
//! ```text
//! written name or ID ─► candidates of the search list ─► one that is here ─► names that go ─┬─ some stay: names only
//!                                                                                           └─ none: not in use? image too
//! ```
//! Used by `gantry-agent image` beside the agent and by `gantry images` through it. What a person
//! removes by name goes although it is pinned: pins keep images from the clean-up, not from people.
//! What a pod uses stays, whoever asks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::content::Table;
use super::reference::{Digest, Reference};
use super::{ImageError, ImageStore, collect, is_held};
use crate::ids::PodUid;

/// Digits of an ID that say which image is meant: what lists show.
const ID_DIGITS_MIN: usize = 12;

/// Image names that pods want, whether or not they run, and which pods.
pub type Wanted = BTreeMap<String, BTreeSet<PodUid>>;

/// An image as lists show it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The configuration's digest.
    pub id: Digest,
    /// Full names, tags and digests alike.
    pub names: Vec<String>,
    /// Compressed size, bytes.
    pub size_bytes: u64,
    /// The clean-up leaves it.
    pub pinned: bool,
    /// Pods with a root file system or a volume of it, and pods that want it by name.
    pub users: BTreeSet<PodUid>,
}

/// What a removal took away.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Removed {
    /// Full names that are no more.
    pub names: Vec<String>,
    /// The image, when it had no other name: it and the layers that only it had are gone.
    pub image: Option<Entry>,
}

/// Why an image stays.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// Nothing is called that.
    #[error("no image is called {written:?} here")]
    NotHere {
        /// As it was asked for.
        written: String,
    },
    /// Pods need it.
    #[error("image {written:?} is in use")]
    InUse {
        /// As it was asked for.
        written: String,
        /// Who: nobody when a pod is about to start from it, or somebody looks at it.
        users: BTreeSet<PodUid>,
    },
    /// Content comes at the same time, and nobody can tell yet to whom it belongs.
    #[error(
        "an image is being pulled or imported just now, and until that is done none is removed: try again"
    )]
    Busy,
    /// The store itself.
    #[error(transparent)]
    Store(#[from] ImageError),
}

/// The image that a person means.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Meant {
    id: Digest,
    /// By this name; none: by its ID.
    name: Option<Reference>,
}

/// A name goes before an ID: a name of hexadecimal digits is still a name.
fn find(table: &Table, names: &[Reference], written: &str) -> Option<Meant> {
    for name in names {
        if let Some(id) = table.references.get(&name.to_string()) {
            return Some(Meant {
                id: id.clone(),
                name: Some(name.clone()),
            });
        }
    }
    let digits = written.strip_prefix("sha256:").unwrap_or(written);
    if digits.len() < ID_DIGITS_MIN {
        return None;
    }
    let mut fit = table
        .images
        .keys()
        .filter(|id| id.hex().starts_with(digits));
    match (fit.next(), fit.next()) {
        (Some(id), None) => Some(Meant {
            id: id.clone(),
            name: None,
        }),
        _ => None,
    }
}

/// The names that go with what is meant: by ID all of them; with the last tag of a repository the
/// digests of that repository too, which nobody has typed.
fn names_that_go(table: &Table, meant: &Meant) -> BTreeSet<String> {
    let own = table.references.iter().filter(|(_, id)| **id == meant.id);
    let own: Vec<&String> = own.map(|(name, _)| name).collect();
    let Some(name) = &meant.name else {
        return own.into_iter().cloned().collect();
    };
    let full = name.to_string();
    let same = |other: &&&String| {
        Reference::parse(other).is_ok_and(|r| r.name() == name.name()) && ***other != full
    };
    let siblings: Vec<&&String> = own.iter().filter(same).collect();
    let tag_stays = siblings.iter().any(|other| !other.contains('@'));
    let mut gone = BTreeSet::from([full]);
    if name.digest.is_none() && !tag_stays {
        gone.extend(siblings.into_iter().map(|name| (*name).clone()));
    }
    gone
}

impl ImageStore {
    /// Every image that is here.
    pub async fn list(&self, wanted: &Wanted) -> Result<Vec<Entry>, ImageError> {
        let wanted = wanted.clone();
        self.blocking(move |this| {
            let table = this.content().table()?;
            let users = this.users(&wanted);
            let ids = table.images.keys();
            Ok(ids.filter_map(|id| entry(&table, id, &users)).collect())
        })
        .await
    }

    /// Takes a name away, or all names of an ID. With its last name the image goes, at once.
    ///
    /// # Errors
    /// Nothing has changed: the name is not here, or the image would go and is in use.
    pub async fn remove(&self, written: &str, wanted: &Wanted) -> Result<Removed, InventoryError> {
        let names = self.candidates_or_id(written)?;
        let (text, wanted) = (written.to_owned(), wanted.clone());
        let removed = self.blocking(move |this| Ok(this.remove_now(&names, &text, &wanted)));
        removed.await?
    }

    fn remove_now(
        &self,
        names: &[Reference],
        written: &str,
        wanted: &Wanted,
    ) -> Result<Removed, InventoryError> {
        let not_here = || InventoryError::NotHere {
            written: written.to_owned(),
        };
        let lock = self.content().try_lock_removal()?;
        // Held to the end, so that no lookup hands out what is about to go.
        let held = self.handed_out();
        let table = self.content().table()?;
        let meant = find(&table, names, written).ok_or_else(not_here)?;
        let gone = names_that_go(&table, &meant);
        let stays = |(name, id): (&String, &Digest)| *id == meant.id && !gone.contains(name);
        let image = if table.references.iter().any(stays) {
            None
        } else {
            let users = self.users(wanted);
            let image = entry(&table, &meant.id, &users).ok_or_else(not_here)?;
            if !image.users.is_empty() || is_held(&held, &meant.id) {
                return Err(InventoryError::InUse {
                    written: written.to_owned(),
                    users: image.users,
                });
            }
            Some(image)
        };
        if image.is_some() && lock.is_none() {
            return Err(InventoryError::Busy);
        }
        let table = self.content().update(|table| {
            table.references.retain(|name, _| !gone.contains(name));
            if image.is_some() {
                table.images.remove(&meant.id);
            }
            table.clone()
        })?;
        if let (Some(_), Some(lock)) = (&image, &lock) {
            self.content().sweep(&table, lock)?;
        }
        let names = gone.into_iter().collect();
        Ok(Removed { names, image })
    }

    /// Keeps an image whatever happens to the disk, or no longer.
    pub async fn set_pinned(&self, written: &str, pinned: bool) -> Result<Entry, InventoryError> {
        let names = self.candidates_or_id(written)?;
        let text = written.to_owned();
        let image = self.blocking(move |this| {
            this.content().update(|table| {
                let meant = find(table, &names, &text)?;
                table.images.get_mut(&meant.id)?.pinned = pinned;
                entry(table, &meant.id, &Users::default())
            })
        });
        image.await?.ok_or_else(|| InventoryError::NotHere {
            written: written.to_owned(),
        })
    }

    /// Removes what nobody needs or has used for some minutes, pinned images aside; returns it.
    pub async fn prune(&self, wanted: &Wanted) -> Result<Vec<Entry>, InventoryError> {
        let keep: BTreeSet<String> = wanted.keys().cloned().collect();
        let pruned = self.blocking(move |this| {
            // Of what is gone only this is left to be told.
            let before = this.content().table()?;
            let gone = this.remove_while(|this, held| {
                Ok(collect::choose(this.candidates(&keep, held)?, u64::MAX))
            })?;
            Ok(gone.map(|gone| {
                let gone = gone.iter();
                gone.filter_map(|id| entry(&before, id, &Users::default()))
                    .collect()
            }))
        });
        pruned.await?.ok_or(InventoryError::Busy)
    }

    /// The names that `written` may have; none when it can only be an ID.
    fn candidates_or_id(&self, written: &str) -> Result<Vec<Reference>, ImageError> {
        let is_id = written.len() == 64 && written.bytes().all(|b| b.is_ascii_hexdigit());
        match self.shared.registries.candidates(written) {
            Ok(names) => Ok(names),
            Err(_) if is_id => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Who needs what: by what is mounted, and by what pods want.
    fn users(&self, wanted: &Wanted) -> Users {
        let mut users = Users(mounted_images(&self.shared.pods));
        for (name, pods) in wanted {
            let meant = self.shared.registries.candidates(name).unwrap_or_default();
            for full in meant {
                let of = users.0.entry(full.to_string()).or_default();
                of.extend(pods.iter().cloned());
            }
        }
        users
    }
}

/// Pods by the ID or the full name of the image they need.
#[derive(Default)]
struct Users(BTreeMap<String, BTreeSet<PodUid>>);

impl Users {
    fn of<'a>(&self, keys: impl Iterator<Item = &'a str>) -> BTreeSet<PodUid> {
        let found = keys.filter_map(|key| self.0.get(key));
        found.flatten().cloned().collect()
    }
}

fn entry(table: &Table, id: &Digest, users: &Users) -> Option<Entry> {
    let record = table.images.get(id)?;
    let names = table.references.iter().filter(|(_, of)| *of == id);
    let names: Vec<String> = names.map(|(name, _)| name.clone()).collect();
    let keys = names.iter().map(String::as_str);
    let users = users.of(keys.chain([id.as_str()]));
    Some(Entry {
        id: id.clone(),
        names,
        size_bytes: record.size_bytes,
        pinned: record.pinned,
        users,
    })
}

/// Image IDs that container layer directories were made from, with the pods that have them:
/// `<pods>/<uid>/containers/<name>/<run>/image`.
pub(super) fn mounted_images(pods: &Path) -> BTreeMap<String, BTreeSet<PodUid>> {
    let below = |dir: PathBuf| {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path())
    };
    let mut mounted: BTreeMap<String, BTreeSet<PodUid>> = BTreeMap::new();
    for pod in below(pods.to_owned()) {
        let name = pod.file_name().unwrap_or_default().to_string_lossy();
        let Ok(uid) = PodUid::new(&name) else {
            continue;
        };
        for run in below(pod.join("containers")).flat_map(below) {
            if let Ok(id) = std::fs::read_to_string(run.join("image")) {
                mounted.entry(id).or_default().insert(uid.clone());
            }
        }
    }
    mounted
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::content::Record;
    use super::*;

    fn digest(n: u64) -> Digest {
        Digest::parse(&format!("sha256:{n:064x}")).unwrap()
    }

    /// Images 0.. with these names each, and a digest name per repository.
    fn table(images: &[&[&str]]) -> Table {
        let mut table = Table::default();
        for (n, names) in images.iter().enumerate() {
            let id = digest(n as u64);
            let record = Record {
                layers: Vec::new(),
                manifest: None,
                size_bytes: 1,
                pinned: false,
            };
            table.images.insert(id.clone(), record);
            for name in *names {
                let name = Reference::parse(name).unwrap();
                let pinned = name.pinned(&digest(1000 + n as u64));
                table.references.insert(name.to_string(), id.clone());
                table.references.insert(pinned.to_string(), id.clone());
            }
        }
        table
    }

    fn found(table: &Table, written: &str) -> Option<Meant> {
        let names = Reference::parse(written).map(|name| vec![name]);
        find(table, &names.unwrap_or_default(), written)
    }

    #[test]
    fn a_tag_takes_its_digest_with_it_and_an_id_takes_every_name() {
        let table = table(&[&["web:1", "web:2", "x.example/web:1"], &["db"]]);
        let gone = |written: &str| -> Vec<String> {
            let meant = found(&table, written).unwrap();
            names_that_go(&table, &meant).into_iter().collect()
        };
        assert_eq!(gone("web:1"), ["docker.io/library/web:1"]);
        let pin = format!("@{}", digest(1000));
        let other = format!("x.example/web{pin}");
        assert_eq!(
            gone("x.example/web:1"),
            ["x.example/web:1".into(), other.clone()]
        );
        assert_eq!(gone(&other), std::slice::from_ref(&other));
        assert_eq!(gone(digest(0).as_str()).len(), 5);
        assert_eq!(gone("db").len(), 2);
        assert_eq!(found(&table, "nobody"), None);
    }

    #[test]
    fn an_id_is_meant_by_twelve_digits_if_they_are_one_image_s() {
        let mut table = table(&[&["a"]]);
        let id = Digest::parse(&format!("sha256:abcdef012345{:052x}", 1)).unwrap();
        let twin = Digest::parse(&format!("sha256:abcdef012345{:052x}", 2)).unwrap();
        let record = table.images[&digest(0)].clone();
        table.images.insert(id.clone(), record.clone());
        assert_eq!(found(&table, "abcdef012345").unwrap().id, id);
        assert_eq!(found(&table, "sha256:abcdef012345").unwrap().id, id);
        assert_eq!(found(&table, "abcdef01234"), None);
        // A name goes first.
        let named = Reference::parse("abcdef012345").unwrap();
        table.references.insert(named.to_string(), digest(0));
        assert_eq!(found(&table, "abcdef012345").unwrap().id, digest(0));
        table.references.clear();
        table.images.insert(twin, record);
        assert_eq!(found(&table, "abcdef012345"), None);
    }

    proptest! {
        #[test]
        fn removing_one_name_touches_one_image_and_leaves_no_digest_alone(
            parts in proptest::collection::vec((0u64..4, "[ab]", 1u8..4), 1..10), pick in 0usize..10,
        ) {
            let mut owned: Vec<Vec<String>> = vec![Vec::new(); 4];
            let mut taken = BTreeSet::new();
            for (image, repository, tag) in &parts {
                let name = format!("{repository}:{tag}");
                if taken.insert(name.clone()) {
                    owned[*image as usize].push(name);
                }
            }
            let borrowed: Vec<Vec<&str>> =
                owned.iter().map(|names| names.iter().map(String::as_str).collect()).collect();
            let images: Vec<&[&str]> = borrowed.iter().map(Vec::as_slice).collect();
            let table = table(&images);
            let taken: Vec<&String> = taken.iter().collect();
            let written = taken[pick % taken.len()];
            let meant = found(&table, written).unwrap();
            let gone = names_that_go(&table, &meant);
            prop_assert!(gone.contains(&Reference::parse(written).unwrap().to_string()));
            prop_assert!(gone.iter().all(|name| table.references[name] == meant.id));
            // Every digest name that is left has a tag of its repository beside it.
            let left: Vec<Reference> = table.references.iter()
                .filter(|(name, id)| **id == meant.id && !gone.contains(*name))
                .map(|(name, _)| Reference::parse(name).unwrap()).collect();
            for pin in left.iter().filter(|r| r.digest.is_some()) {
                prop_assert!(left.iter().any(|r| r.digest.is_none() && r.name() == pin.name()));
            }
        }
    }
}
