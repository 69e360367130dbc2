//! How much of the node's disk a pod uses, and whether that is over one of its limits: an emptyDir's
//! `sizeLimit`, and containers' `limits[ephemeral-storage]` (writable layers and logs; all of them
//! together also with the pod's emptyDirs).
//!
//! Measured by looking, as the kubelet does without quotas: every [`INTERVAL`], on a blocking
//! thread, only pods with such a limit. A file that is deleted and still open is not seen; what a
//! pod writes between two looks is. A tmpfs needs none of this: its size is the limit.
//!
//! Invariants: a file with several names counts once; the walk ends at the limit; a tree too deep
//! to be walked is over it. Source of order and words: the kubelet's `eviction_manager.go`.

use std::collections::HashSet;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Volume};
use gantry_api::quantity::Quantity;

use super::ReadyVolumes;
use super::walk::{self, DEPTH_MAX, Walk};
use crate::pressure::victim::bytes_text;

/// Between two measurements: the kubelet's eviction monitor's.
pub const INTERVAL: Duration = Duration::from_secs(10);
/// `st_blocks` counts these, whatever the file system's block size.
const BLOCK_BYTES: u64 = 512;

/// Where bytes are counted.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Place {
    /// A directory.
    Directory(PathBuf),
    /// The writable layers of all runs of a container: `<this>/<attempt>/upper`.
    Layers(PathBuf),
}

impl Place {
    fn directories(&self) -> Vec<PathBuf> {
        match self {
            Self::Directory(path) => vec![path.clone()],
            Self::Layers(runs) => {
                let runs = std::fs::read_dir(runs).into_iter().flatten().flatten();
                runs.map(|run| run.path().join("upper")).collect()
            }
        }
    }
}

/// Something on disk with a limit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limited {
    places: Vec<Place>,
    limit_bytes: u64,
    /// `EmptyDir volume "cache"`
    what: String,
    /// Why the pod has to go.
    words: String,
}

/// What of a pod has to be measured.
///
/// * `lib` – where its writable layers are: [`crate::paths::Paths::pod_lib`].
/// * `log` – where its logs are: [`crate::paths::Paths::pod_log`].
pub fn limited(pod: &Pod, ready: &ReadyVolumes, lib: &Path, log: &Path) -> Vec<Limited> {
    let Some(spec) = &pod.spec else {
        return Vec::new();
    };
    let volumes: Vec<(&Volume, &Path)> = spec
        .volumes
        .iter()
        .flatten()
        .filter(|volume| {
            let source = volume.empty_dir.as_ref();
            source.is_some_and(|s| s.medium.as_deref().unwrap_or("").is_empty())
        })
        .filter_map(|volume| Some((volume, ready.get(&volume.name)?.path.as_path())))
        .collect();
    let own = |container: &Container| {
        let name = container.name.as_str();
        [
            Place::Layers(lib.join("containers").join(name)),
            Place::Directory(log.join(name)),
        ]
    };
    let mut limited: Vec<Limited> = volumes.iter().filter_map(|(v, at)| volume(v, at)).collect();
    if let Some(limit_bytes) = total_limit(spec) {
        let directories = volumes.iter().map(|(_, at)| (*at).to_owned());
        let all = spec.init_containers.iter().flatten();
        let all = all.chain(&spec.containers).flat_map(own);
        limited.push(Limited {
            places: all.chain(directories.map(Place::Directory)).collect(),
            limit_bytes,
            what: "Pod's local storage".to_owned(),
            words: format!(
                "Pod ephemeral local storage usage exceeds the total limit of containers {}.",
                bytes_text(limit_bytes)
            ),
        });
    }
    limited.extend(spec.containers.iter().filter_map(|container| {
        let (limit_bytes, limit) = limit_of(container)?;
        let name = &container.name;
        Some(Limited {
            places: own(container).into(),
            limit_bytes,
            what: format!("Container {name}"),
            words: format!(
                "Container {name} exceeded its local ephemeral storage limit {limit:?}."
            ),
        })
    }));
    limited
}

fn volume(volume: &Volume, path: &Path) -> Option<Limited> {
    let limit = volume.empty_dir.as_ref()?.size_limit.as_ref()?;
    let limit_bytes = positive(&limit.0)?;
    let (name, limit) = (&volume.name, &limit.0);
    Some(Limited {
        places: vec![Place::Directory(path.to_owned())],
        limit_bytes,
        what: format!("EmptyDir volume {name:?}"),
        words: format!("Usage of EmptyDir volume {name:?} exceeds the limit {limit:?}."),
    })
}

/// Zero means no limit.
fn positive(quantity: &str) -> Option<u64> {
    let bytes = u64::try_from(Quantity::parse(quantity).ok()?.units()).ok()?;
    (bytes > 0).then_some(bytes)
}

fn limit_of(container: &Container) -> Option<(u64, String)> {
    let limits = container.resources.as_ref()?.limits.as_ref()?;
    let text = &limits.get("ephemeral-storage")?.0;
    Some((positive(text)?, text.clone()))
}

/// The limits of containers and sidecars together, or an init container's if that is more.
fn total_limit(spec: &PodSpec) -> Option<u64> {
    let is_sidecar = |c: &&Container| c.restart_policy.as_deref() == Some("Always");
    let init = || spec.init_containers.iter().flatten();
    let bytes = |c: &Container| limit_of(c).map(|(bytes, _)| bytes);
    let running = spec.containers.iter().chain(init().filter(is_sidecar));
    let sum = running.filter_map(bytes).reduce(u64::saturating_add);
    let before = init().filter(|c| !is_sidecar(c)).filter_map(bytes).max();
    sum.max(before)
}

/// Why the pod has to go, when something of it is over its limit.
pub fn exceeded(limited: &[Limited]) -> Option<String> {
    limited.iter().find_map(|one| {
        let directories: Vec<PathBuf> = one.places.iter().flat_map(Place::directories).collect();
        match measure(&directories, one.limit_bytes) {
            Ok(Usage::Within) => None,
            Ok(Usage::Over) => Some(one.words.clone()),
            Ok(Usage::TooDeep) => Some(format!(
                "{} has directories nested deeper than {DEPTH_MAX}: its limit {} cannot be checked.",
                one.what,
                bytes_text(one.limit_bytes)
            )),
            Err(error) => {
                tracing::debug!(what = one.what, %error, "measure local storage");
                None
            }
        }
    })
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Usage {
    Within,
    Over,
    TooDeep,
}

/// All directories together; one that is not there (yet, or any more) takes no room.
fn measure(directories: &[PathBuf], limit_bytes: u64) -> io::Result<Usage> {
    let mut several_names = HashSet::new();
    let mut used = 0u64;
    for directory in directories {
        let walked = walk::walk(directory, |_, _, stat| {
            if stat.st_nlink < 2 || several_names.insert((stat.st_dev, stat.st_ino)) {
                used = used.saturating_add(stat.st_blocks.unsigned_abs() * BLOCK_BYTES);
            }
            Ok(if used > limit_bytes {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            })
        });
        match walked {
            Ok(Walk::Done) => {}
            Ok(Walk::Broken) => return Ok(Usage::Over),
            Ok(Walk::TooDeep) => return Ok(Usage::TooDeep),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Usage::Within)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags, openat};
    use std::fs;

    #[test]
    fn only_what_lies_in_the_volume_counts_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("vol");
        fs::create_dir_all(volume.join("a/b")).unwrap();
        fs::write(dir.path().join("outside"), vec![1; 400_000]).unwrap();
        fs::write(volume.join("a/b/file"), vec![1; 200_000]).unwrap();
        for n in 0..10 {
            fs::hard_link(volume.join("a/b/file"), volume.join(format!("link{n}"))).unwrap();
        }
        std::os::unix::fs::symlink("../outside", volume.join("out")).unwrap();
        std::os::unix::fs::symlink("..", volume.join("a/up")).unwrap();
        assert_eq!(
            measure(std::slice::from_ref(&volume), 300_000).unwrap(),
            Usage::Within
        );
        assert_eq!(
            measure(std::slice::from_ref(&volume), 199_000).unwrap(),
            Usage::Over
        );
        // A hole takes no room.
        let sparse = fs::File::create(volume.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        assert_eq!(
            measure(std::slice::from_ref(&volume), 300_000).unwrap(),
            Usage::Within
        );
    }

    #[test]
    fn a_tree_too_deep_to_measure_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let mut at = rustix::fs::open(dir.path(), OFlags::PATH, Mode::empty()).unwrap();
        for _ in 0..DEPTH_MAX + 2 {
            rustix::fs::mkdirat(&at, "deeper-and-deeper-and-deeper", Mode::RWXU).unwrap();
            at = openat(
                &at,
                "deeper-and-deeper-and-deeper",
                OFlags::PATH,
                Mode::empty(),
            )
            .unwrap();
        }
        assert_eq!(
            measure(&[dir.path().to_owned()], 1 << 40).unwrap(),
            Usage::TooDeep
        );
        super::super::tree::remove(dir.path()).unwrap();
    }

    #[test]
    fn only_limits_on_disk_are_looked_at_and_the_words_are_the_kubelets() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), vec![1; 9000]).unwrap();
        let volume = |name: &str, source: serde_json::Value| serde_json::json!({"name": name, "emptyDir": source});
        let pod: Pod = serde_json::from_value(serde_json::json!({"spec": {"containers": [],
        "volumes": [
            volume("free", serde_json::json!({})),
            volume("memory", serde_json::json!({"medium": "Memory", "sizeLimit": "1Ki"})),
            volume("zero", serde_json::json!({"sizeLimit": "0"})),
            volume("wide", serde_json::json!({"sizeLimit": "1Gi"})),
            volume("cache", serde_json::json!({"sizeLimit": "4Ki"})),
        ]}}))
        .unwrap();
        let one = |name: &&str| {
            let ready = super::super::ReadyVolume::writable(dir.path().to_owned());
            ((*name).to_owned(), ready)
        };
        let ready: ReadyVolumes = ["free", "memory", "zero", "wide", "cache"]
            .iter()
            .map(one)
            .collect();
        let limited = limited(&pod, &ready, dir.path(), dir.path());
        let what: Vec<&str> = limited.iter().map(|l| l.what.as_str()).collect();
        assert_eq!(
            what,
            ["EmptyDir volume \"wide\"", "EmptyDir volume \"cache\""]
        );
        let words = "Usage of EmptyDir volume \"cache\" exceeds the limit \"4Ki\".";
        assert_eq!(exceeded(&limited).as_deref(), Some(words));
    }

    #[test]
    fn layers_and_logs_count_for_their_container_and_volumes_for_the_pod() {
        let dir = tempfile::tempdir().unwrap();
        let (lib, log) = (dir.path().join("lib"), dir.path().join("log"));
        let write = |path: PathBuf, bytes: usize| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, vec![1; bytes]).unwrap();
        };
        let container = |name: &str, limit: &str| {
            let limits = serde_json::json!({"limits": {"ephemeral-storage": limit}});
            serde_json::json!({"name": name, "resources": limits})
        };
        let pod: Pod = serde_json::from_value(serde_json::json!({"spec": {
            "containers": [container("a", "1Mi"), container("b", "2Mi"), {"name": "free"}],
            "volumes": [{"name": "v", "emptyDir": {}}]}}))
        .unwrap();
        let volume = super::super::ReadyVolume::writable(dir.path().join("v"));
        let ready = ReadyVolumes::from([("v".to_owned(), volume)]);
        let words = || exceeded(&limited(&pod, &ready, &lib, &log));
        assert_eq!(words(), None, "nothing is there yet");
        write(lib.join("containers/a/0/upper/x"), 500_000);
        write(log.join("a/0.log"), 100_000);
        // The image below is not the pod's.
        write(lib.join("containers/a/0/rootfs/y"), 9_000_000);
        write(lib.join("containers/b/0/upper/x"), 1_500_000);
        assert_eq!(words(), None);
        write(lib.join("containers/a/1/upper/x"), 600_000);
        let over = "Container a exceeded its local ephemeral storage limit \"1Mi\".";
        assert_eq!(words().as_deref(), Some(over));
        write(dir.path().join("v/x"), 900_000);
        let over = "Pod ephemeral local storage usage exceeds the total limit of containers 3Mi.";
        assert_eq!(words().as_deref(), Some(over));
    }
}
