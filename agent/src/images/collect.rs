//! Which images go when the disk fills: pure choice, least recently used first.
//!
//! ```text
//! used share of the disk   < 85 %: nothing ──── >= 85 %: down to 80 %, as far as there is anything
//! ```
//! Never: an image in use, a pinned one, one that came or was used in the last two minutes (a pod
//! that wants it may be on its way). Source: kubelet `pkg/kubelet/images/image_gc_manager.go`,
//! defaults of `imageGCHighThresholdPercent` and its like.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::ImageStore;
use super::reference::Digest;
use crate::view::View;

/// Collection begins at this share of used bytes, per cent.
const HIGH_PERCENT: u64 = 85;
/// And aims at this one.
const LOW_PERCENT: u64 = 80;
/// Between two looks at the disk.
const EVERY: Duration = Duration::from_secs(300);
/// Younger images stay.
const AGE_MIN: Duration = Duration::from_secs(120);

/// The file system that images lie on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Disk {
    /// Bytes in all.
    pub capacity_bytes: u64,
    /// Bytes that an ordinary user could still write.
    pub available_bytes: u64,
}

/// An image, as the choice sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Candidate {
    pub(super) id: Digest,
    /// Bytes it has on disk, about.
    pub(super) size_bytes: u64,
    /// Since a container was last made from it, or since it came.
    pub(super) idle: Duration,
    pub(super) in_use: bool,
    pub(super) pinned: bool,
}

/// How many bytes must go: none below the high threshold.
pub(super) fn excess_bytes(disk: Disk) -> u64 {
    let used = disk.capacity_bytes.saturating_sub(disk.available_bytes);
    let share = |percent: u64| disk.capacity_bytes / 100 * percent;
    if disk.capacity_bytes == 0 || used < share(HIGH_PERCENT) {
        return 0;
    }
    used - share(LOW_PERCENT)
}

/// The images to remove so that `excess` bytes go, if there are as many.
pub(super) fn choose(mut images: Vec<Candidate>, excess: u64) -> Vec<Digest> {
    images.retain(|i| !i.in_use && !i.pinned && i.idle >= AGE_MIN);
    images.sort_by(|a, b| b.idle.cmp(&a.idle).then_with(|| a.id.cmp(&b.id)));
    let mut freed = 0u64;
    images
        .into_iter()
        .take_while(|image| {
            let more = freed < excess;
            freed = freed.saturating_add(image.size_bytes);
            more
        })
        .map(|image| image.id)
        .collect()
}

/// Looks at the disk every five minutes until `shutdown`; what a pod of this node names stays.
pub async fn keep_disk_free(
    store: ImageStore,
    view: watch::Receiver<Arc<View>>,
    shutdown: CancellationToken,
) {
    loop {
        tokio::select! {
            // Cancel-safe: both only wait.
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        let newest = view.borrow().clone();
        // Before the first view nobody knows what is needed.
        if newest.rev == 0 {
            continue;
        }
        let keep: BTreeSet<String> = newest.pods.values().flat_map(|p| images_of(p)).collect();
        match store.collect(&keep).await {
            Ok(done) => {
                if !done.images.is_empty() {
                    info!(
                        images = done.images.len(),
                        "removed unused images: the disk was too full"
                    );
                }
                if done.missing_bytes > 0 {
                    warn!(
                        bytes = done.missing_bytes,
                        "the disk of the images is too full and no image can be removed: delete \
                         files on it, or pods whose images are not needed"
                    );
                }
            }
            Err(error) => warn!(%error, "clean-up of images"),
        }
    }
}

/// Every image that a pod names: of containers of all kinds, and of volumes.
pub fn images_of(pod: &Pod) -> Vec<String> {
    let Some(spec) = &pod.spec else {
        return Vec::new();
    };
    let containers = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers);
    let containers = containers.filter_map(|c| c.image.clone());
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    let ephemeral = ephemeral.filter_map(|c| c.image.clone());
    let volumes = spec.volumes.iter().flatten();
    let volumes = volumes.filter_map(|v| v.image.as_ref()?.reference.clone());
    containers.chain(ephemeral).chain(volumes).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn digest(n: usize) -> Digest {
        Digest::parse(&format!("sha256:{n:064x}")).unwrap()
    }

    #[test]
    fn thresholds_are_the_kubelet_s() {
        let excess = |used: u64| {
            excess_bytes(Disk {
                capacity_bytes: 1000,
                available_bytes: 1000 - used,
            })
        };
        assert_eq!((excess(0), excess(849)), (0, 0));
        assert_eq!((excess(850), excess(900), excess(1000)), (50, 100, 200));
        let none = Disk {
            capacity_bytes: 0,
            available_bytes: 0,
        };
        assert_eq!(excess_bytes(none), 0);
    }

    fn image() -> impl Strategy<Value = (u64, u64, bool, bool)> {
        (0u64..1000, 0u64..400, any::<bool>(), any::<bool>())
    }

    proptest! {
        #[test]
        fn only_idle_images_go_oldest_first_and_no_more_than_needed(
            parts in proptest::collection::vec(image(), 0..30), excess in 0u64..5000,
        ) {
            let images: Vec<Candidate> = parts.iter().enumerate().map(|(n, part)| Candidate {
                id: digest(n), size_bytes: part.0, idle: Duration::from_secs(part.1),
                in_use: part.2, pinned: part.3,
            }).collect();
            let gone = choose(images.clone(), excess);
            let chosen: BTreeSet<&Digest> = gone.iter().collect();
            prop_assert_eq!(chosen.len(), gone.len());
            let (went, stayed): (Vec<&Candidate>, Vec<&Candidate>) =
                images.iter().partition(|i| chosen.contains(&i.id));
            prop_assert!(went.iter().all(|i| !i.in_use && !i.pinned && i.idle >= AGE_MIN));
            let may = |i: &&&Candidate| !i.in_use && !i.pinned && i.idle >= AGE_MIN;
            // Nobody who stays was idle for longer than somebody who went.
            for one in stayed.iter().filter(may) {
                prop_assert!(went.iter().all(|w| w.idle >= one.idle));
            }
            let sizes: Vec<u64> = gone.iter()
                .map(|id| images.iter().find(|i| i.id == *id).unwrap().size_bytes).collect();
            let freed: u64 = sizes.iter().sum();
            prop_assert!(freed >= excess || stayed.iter().filter(may).count() == 0);
            // Without the last one it would not have been enough.
            if let Some(last) = sizes.last() {
                prop_assert!(freed - last < excess);
            }
        }
    }
}
