//! Static pods: manifests in a directory of this node, with or without a control plane.
//!
//! ```text
//! /etc/gantry/manifests/*.yaml ─► manifest.rs ─► plan.rs (pure) ─► static-pods.json ─► the view's pods
//!                                                     feed's view ─── mirrors.rs ──────────┘
//! ```
//! Workers see one view and treat these pods like any other. The list is on disk before the view
//! has it, so a restarted agent knows its pods, and what to stop when a file went meanwhile. Files
//! are read when they have changed; what is wrong with one is told with its name and line, in the
//! log and as an event of the node, and changes nothing.
//!
//! The API shows each of them as a *mirror pod* (`mirrors.rs`).
//!
//! Before the node has ever met a control plane it has no pod prefix: then
//! [`Config::standalone_pod_cidr`] serves, and what was attached with it stays so until it ends.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use gantry_api::k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use ipnet::IpNet;
use jiff::Timestamp;
use tokio::sync::watch as channel;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

mod manifest;
mod mirrors;
mod plan;

use crate::directory_watch::Watch;
use crate::feed::{Link, Reporter};
use crate::ids::PodUid;
use crate::paths::Paths;
use crate::shutdown;
use crate::view::View;
pub use manifest::is_static;
pub use mirrors::Mirrors;
use mirrors::{Shown, mirror_of};
use plan::{List, Manifest, Surroundings, Wanted, plan};

/// Two looks at the directory are at least this far apart.
const PACE: Duration = Duration::from_millis(200);
/// Manifests beyond this are not read.
const FILE_COUNT_MAX: usize = 512;

/// Where static pods come from.
#[derive(Clone, Debug)]
pub struct Config {
    /// `/etc/gantry/manifests`; need not be there.
    pub directory: PathBuf,
    /// This node's name.
    pub node: String,
    /// The pod prefix until a control plane allocates one.
    pub standalone_pod_cidr: IpNet,
    /// Kept up to date here, for those who are asked for a mirror pod.
    pub mirrors: Mirrors,
}

/// What tells one content of a file from another.
type Stamp = (u64, u64, i64, i64, u64);

struct StaticPods {
    config: Config,
    paths: Paths,
    reporter: Reporter,
    list: List,
    /// As workers see them: the same object until something of it changes.
    objects: HashMap<String, (Option<Arc<Pod>>, Arc<Pod>)>,
    /// What was read of each file, by its stamp.
    read: BTreeMap<PathBuf, (Stamp, Result<Vec<Wanted>, String>)>,
    shown: Shown,
    /// Sentences that were told already.
    told: Vec<(PathBuf, String)>,
    /// Before the first look: a shutdown of the machine before this start is over.
    is_first: bool,
}

/// Reads the directory once, then follows it and `view` until `shutdown`.
///
/// * returns the view that workers follow: the feed's and the static pods. It has them from the
///   start, so that nobody takes a static pod of an earlier agent for unknown.
pub fn run(
    config: Config,
    paths: Paths,
    reporter: Reporter,
    mut view: channel::Receiver<Arc<View>>,
    mut link: channel::Receiver<Link>,
    shutdown: CancellationToken,
) -> (channel::Receiver<Arc<View>>, channel::Receiver<Link>) {
    let mut pods = StaticPods {
        list: load(&file(&paths)),
        shown: Shown::new(config.mirrors.clone()),
        config,
        paths,
        reporter,
        objects: HashMap::new(),
        read: BTreeMap::new(),
        told: Vec::new(),
        is_first: true,
    };
    let mut watch = Watch::new();
    watch.ensure(&pods.config.directory);
    pods.look();
    pods.is_first = false;
    let mut newest = view.borrow_and_update().clone();
    let mut is_busy = pods.mirror(&newest);
    let (links, followed) = channel::channel(link.borrow_and_update().clone());
    let (sender, merged) = channel::channel(pods.merge(&newest));
    tokio::spawn(async move {
        let mut due = Instant::now() + PACE;
        loop {
            let is_look = tokio::select! {
                // Every arm is cancel-safe: each only waits.
                () = shutdown.cancelled() => return,
                changed = view.changed() => match changed {
                    Ok(()) => false,
                    Err(_) => return,
                },
                changed = link.changed() => match changed {
                    Ok(()) => false,
                    Err(_) => return,
                },
                () = watch.changed(is_busy) => true,
            };
            // Read before the view: what it tells of is in it, and is told when the merged view has it too.
            let newest_link = link.borrow_and_update().clone();
            let mut is_new = false;
            // A busy view must not keep the directory from being looked at.
            if is_look || (is_busy && Instant::now() >= due) {
                watch.ensure(&pods.config.directory);
                is_new = tokio::task::block_in_place(|| pods.look());
                due = Instant::now() + PACE;
            }
            let before = std::mem::replace(&mut newest, view.borrow_and_update().clone());
            // Whatever woke this: a view that came during a look is not told of again.
            is_new |= !Arc::ptr_eq(&before, &newest);
            is_busy = pods.mirror(&newest);
            if is_new {
                sender.send_replace(pods.merge(&newest));
            }
            links.send_if_modified(|old| {
                let is_other = *old != newest_link;
                *old = newest_link;
                is_other
            });
        }
    });
    (merged, followed)
}

fn file(paths: &Paths) -> PathBuf {
    paths.lib.join("static-pods.json")
}

fn load(path: &Path) -> List {
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return List::default(),
        text => text,
    };
    let list = text.and_then(|text| Ok(serde_json::from_slice(&text)?));
    list.unwrap_or_else(|error| {
        // UIDs follow from the files, so what still has its file is found again.
        warn!(path = %path.display(), %error, "the list of static pods is lost");
        List::default()
    })
}

fn save(path: &Path, list: &List) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::File::create(&new)?;
    file.write_all(&serde_json::to_vec(list)?)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

impl StaticPods {
    /// Looks at the directory; true when the list of pods is another.
    fn look(&mut self) -> bool {
        let Some(manifests) = self.manifests() else {
            return false;
        };
        let paths = &self.paths;
        let is_away = |uid: &str| {
            PodUid::new(uid)
                .is_ok_and(|uid| !paths.sandbox(&uid).exists() && !paths.pod_lib(&uid).exists())
        };
        let around = Surroundings {
            now: Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default(),
            node: &self.config.node,
            is_away: &is_away,
            is_due_again: &|uid| {
                let uid = PodUid::new(uid).ok().filter(|_| self.is_first);
                uid.is_some_and(|uid| shutdown::has_ended(paths, &uid))
            },
        };
        let (list, refused) = plan(&self.list, &manifests, &around);
        let bad = manifests
            .into_iter()
            .filter_map(|(path, pods)| Some((path, pods.err()?)));
        let told: Vec<(PathBuf, String)> = bad.chain(refused).collect();
        for (path, words) in told.iter().filter(|sentence| !self.told.contains(sentence)) {
            self.tell(path, words);
        }
        self.told = told;
        if list == self.list {
            return false;
        }
        if let Err(error) = save(&file(&self.paths), &list) {
            // Not published, so that nothing runs that the next start would not know.
            warn!(%error, "the list of static pods cannot be written; trying again");
            return false;
        }
        info!(count = list.pods.len(), "static pods have changed");
        self.list = list;
        true
    }

    /// Every manifest, read again where it has changed. None: the directory cannot be read now,
    /// which is not the same as an empty one.
    fn manifests(&mut self) -> Option<Vec<Manifest>> {
        let directory = &self.config.directory;
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Some(Vec::new()),
            Err(error) => {
                let sentence = (directory.clone(), format!("cannot be read: {error}"));
                if !self.told.contains(&sentence) {
                    self.tell(&sentence.0, &sentence.1);
                    self.told.push(sentence);
                }
                return None;
            }
        };
        let paths = entries.flatten().map(|entry| entry.path());
        let mut files: Vec<PathBuf> = paths.filter(|path| manifest::is_manifest(path)).collect();
        files.sort();
        if files.len() > FILE_COUNT_MAX {
            let words = format!("has more than {FILE_COUNT_MAX} manifests: the rest is left alone");
            let sentence = (directory.clone(), words);
            if !self.told.contains(&sentence) {
                self.tell(&sentence.0, &sentence.1);
                self.told.push(sentence);
            }
            files.truncate(FILE_COUNT_MAX);
        }
        let mut read = BTreeMap::new();
        for path in files {
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            let stamp = (
                metadata.dev(),
                metadata.ino(),
                metadata.mtime(),
                metadata.mtime_nsec(),
                metadata.len(),
            );
            let known = self.read.remove(&path);
            let known = known.filter(|(before, _)| *before == stamp);
            let entry = known.unwrap_or_else(|| (stamp, manifest::read(&path, &self.config.node)));
            read.insert(path, entry);
        }
        self.read = read;
        let manifests = self.read.iter();
        Some(
            manifests
                .map(|(path, (_, pods))| (path.clone(), pods.clone()))
                .collect(),
        )
    }

    /// The feed's view with the static pods instead of their mirrors.
    fn merge(&mut self, view: &Arc<View>) -> Arc<View> {
        let mirrors: HashMap<&str, &Arc<Pod>> = view
            .pods
            .values()
            .filter_map(|pod| Some((mirror_of(pod)?, pod)))
            .collect();
        if self.list.pods.is_empty() && mirrors.is_empty() {
            return view.clone();
        }
        let mut merged = View::clone(view);
        let pods = Arc::make_mut(&mut merged.pods);
        pods.retain(|_, pod| mirror_of(pod).is_none());
        let mut objects = HashMap::new();
        for entry in &self.list.pods {
            let Ok(uid) = PodUid::new(entry.uid()) else {
                continue;
            };
            let mirror = mirrors.get(entry.uid()).map(|pod| Arc::clone(pod));
            let known = self.objects.remove(entry.uid());
            let known = known.filter(|(before, object)| {
                let same = match (before, &mirror) {
                    (Some(before), Some(mirror)) => Arc::ptr_eq(before, mirror),
                    (before, mirror) => before.is_none() && mirror.is_none(),
                };
                same && object.metadata == entry.pod.metadata
            });
            let object = known.unwrap_or_else(|| {
                let mut pod = entry.pod.clone();
                // What an agent before this one has said of it.
                pod.status = mirror.as_ref().and_then(|mirror| mirror.status.clone());
                (mirror, Arc::new(pod))
            });
            pods.insert(uid, object.1.clone());
            objects.insert(entry.uid().to_owned(), object);
        }
        self.objects = objects;
        if view.settings.pod_cidr.is_none() {
            Arc::make_mut(&mut merged.settings).pod_cidr = Some(self.config.standalone_pod_cidr);
        }
        Arc::new(merged)
    }

    /// Brings the mirror pods to the list; true while something is on its way.
    fn mirror(&mut self, view: &View) -> bool {
        let is_leaving = self.list.pods.iter().any(plan::StaticPod::is_leaving);
        let is_shown = self.shown.update(&self.list, view, &self.reporter);
        is_leaving || !is_shown
    }

    /// In the log, and as an event of the node.
    fn tell(&self, path: &Path, words: &str) {
        let message = format!("static manifest {}: {words}", path.display());
        warn!("{message}; what ran of it goes on");
        let stamp = Time(Timestamp::now());
        self.reporter.event(Event {
            metadata: ObjectMeta {
                namespace: Some("default".into()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Node".into()),
                name: Some(self.config.node.clone()),
                uid: Some(self.config.node.clone()),
                ..ObjectReference::default()
            },
            reason: Some("InvalidStaticManifest".into()),
            message: Some(message),
            type_: Some("Warning".into()),
            source: Some(EventSource {
                component: Some("gantry-agent".into()),
                host: Some(self.config.node.clone()),
            }),
            first_timestamp: Some(stamp.clone()),
            last_timestamp: Some(stamp),
            count: Some(1),
            ..Event::default()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A look takes a while, and a view may come at any moment of it.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_view_is_lost_to_a_look_at_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let manifests = at("manifests");
        fs::create_dir_all(&manifests).unwrap();
        fs::create_dir_all(at("lib")).unwrap();
        let paths = Paths {
            run: at("run"),
            lib: at("lib"),
            log: at("log"),
            bpf: at("bpf"),
            kubelet: at("kubelet"),
            bin: at("bin"),
        };
        let config = Config {
            directory: manifests.clone(),
            node: "here".into(),
            standalone_pod_cidr: "10.243.255.0/24".parse().unwrap(),
            mirrors: Mirrors::default(),
        };
        let (views, view) = channel::channel(Arc::new(View::default()));
        let (_links, link) = channel::channel(Link::Offline);
        let stop = CancellationToken::new();
        let (mut merged, _) = run(config, paths, Reporter::alone(), view, link, stop.clone());
        let none = "# ".repeat(20_000);
        for rev in 1..=60 {
            for number in 0..40 {
                fs::write(
                    manifests.join(format!("{number}.yaml")),
                    format!("{none}{rev}"),
                )
                .unwrap();
            }
            // From before the directory has settled until after the look.
            tokio::time::sleep(Duration::from_millis(40 + rev)).await;
            views.send_replace(Arc::new(View {
                rev,
                ..View::default()
            }));
            let seen = merged.wait_for(|view| view.rev == rev);
            let seen = tokio::time::timeout(Duration::from_secs(10), seen).await;
            assert!(seen.is_ok(), "view {rev} is lost");
        }
        stop.cancel();
    }

    #[test]
    fn the_list_survives_and_a_torn_one_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("static-pods.json");
        assert_eq!(load(&path), List::default());
        let list = List {
            pods: vec![plan::StaticPod {
                path: "/m/a.yaml".into(),
                digest: "d".into(),
                pod: serde_json::from_value(serde_json::json!({"metadata": {"name": "a"}}))
                    .unwrap(),
            }],
            gone: vec!["u".into()],
        };
        save(&path, &list).unwrap();
        assert_eq!(load(&path), list);
        fs::write(&path, b"{\"pods\": [{\"pa").unwrap();
        assert_eq!(load(&path), List::default());
    }
}
