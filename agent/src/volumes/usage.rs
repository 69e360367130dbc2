//! How much of the disk a volume uses, and which emptyDir is over its `sizeLimit`.
//!
//! Measured by looking, as the kubelet does without quotas: every [`INTERVAL`], on a blocking
//! thread, only pods with such a limit. A file that is deleted and still open is not seen; what a
//! pod writes between two looks is. A tmpfs needs none of this: its size is the limit.
//!
//! Invariants: a file with several names counts once; the walk ends at the limit; a tree too deep
//! to be walked is over it.

use std::collections::HashSet;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Pod;
use gantry_api::quantity::Quantity;

use super::ReadyVolumes;
use super::walk::{self, DEPTH_MAX, Walk};

/// Between two measurements: the kubelet's eviction monitor's.
pub const INTERVAL: Duration = Duration::from_secs(10);
/// `st_blocks` counts these, whatever the file system's block size.
const BLOCK_BYTES: u64 = 512;

/// An emptyDir on disk with a limit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limited {
    name: String,
    path: PathBuf,
    limit_bytes: u64,
    /// As the manifest has it.
    limit: String,
}

/// The volumes of a pod that have to be measured.
pub fn limited(pod: &Pod, ready: &ReadyVolumes) -> Vec<Limited> {
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    volumes
        .filter_map(|volume| {
            let source = volume.empty_dir.as_ref()?;
            let limit = source.size_limit.as_ref()?;
            let on_disk = source.medium.as_deref().unwrap_or("").is_empty();
            let limit_bytes = u64::try_from(Quantity::parse(&limit.0).ok()?.units()).ok()?;
            // Zero means no limit.
            (on_disk && limit_bytes > 0).then_some(())?;
            Some(Limited {
                name: volume.name.clone(),
                path: ready.get(&volume.name)?.path.clone(),
                limit_bytes,
                limit: limit.0.clone(),
            })
        })
        .collect()
}

/// Why the pod has to go, when one of its volumes is over its limit.
pub fn exceeded(volumes: &[Limited]) -> Option<String> {
    volumes.iter().find_map(|volume| {
        let Limited { name, limit, .. } = volume;
        match measure(&volume.path, volume.limit_bytes) {
            Ok(Usage::Within) => None,
            Ok(Usage::Over) => Some(format!(
                "Usage of EmptyDir volume {name:?} exceeds the limit {limit:?}."
            )),
            Ok(Usage::TooDeep) => Some(format!(
                "EmptyDir volume {name:?} has directories nested deeper than {DEPTH_MAX}: \
                 its limit {limit:?} cannot be checked."
            )),
            Err(error) => {
                tracing::debug!(volume = name, %error, "measure an emptyDir");
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

fn measure(path: &Path, limit_bytes: u64) -> io::Result<Usage> {
    let mut several_names = HashSet::new();
    let mut used = 0u64;
    let walked = walk::walk(path, |_, _, stat| {
        if stat.st_nlink < 2 || several_names.insert((stat.st_dev, stat.st_ino)) {
            used = used.saturating_add(stat.st_blocks.unsigned_abs() * BLOCK_BYTES);
        }
        Ok(if used > limit_bytes {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    })?;
    Ok(match walked {
        Walk::Done => Usage::Within,
        Walk::Broken => Usage::Over,
        Walk::TooDeep => Usage::TooDeep,
    })
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
        assert_eq!(measure(&volume, 300_000).unwrap(), Usage::Within);
        assert_eq!(measure(&volume, 199_000).unwrap(), Usage::Over);
        // A hole takes no room.
        let sparse = fs::File::create(volume.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        assert_eq!(measure(&volume, 300_000).unwrap(), Usage::Within);
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
        assert_eq!(measure(dir.path(), 1 << 40).unwrap(), Usage::TooDeep);
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
        let limited = limited(&pod, &ready);
        let names: Vec<&str> = limited.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names, ["wide", "cache"]);
        let words = "Usage of EmptyDir volume \"cache\" exceeds the limit \"4Ki\".";
        assert_eq!(exceeded(&limited).as_deref(), Some(words));
    }
}
