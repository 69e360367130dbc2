//! hugetlbfs mounts: emptyDir volumes whose files are huge pages.
//!
//! The pages are those of the pod's `hugepages-<size>` limit: the kernel counts them in its cgroup when
//! they are touched, and the mount holds no more of them than that.
//!
//! Source: Kubernetes `pkg/volume/emptydir` (`getPageSizeMountOption`); Linux
//! Documentation/admin-guide/mm/hugetlbpage.rst.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::path::Path;

use gantry_api::quantity::Quantity;
use rustix::mount::{MountFlags, mount};

use super::{VolumeError, tmpfs};

/// `statfs` type of hugetlbfs.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
/// The media of Kubernetes: alone, or with a page size behind a hyphen.
const MEDIUM: &str = "HugePages";

/// Whether an emptyDir's medium is huge pages.
pub(super) fn is_medium(medium: &str) -> bool {
    medium == MEDIUM || medium.starts_with("HugePages-")
}

/// The size of the pages that a medium means, and how many bytes of them there are.
///
/// * `pages` – bytes of huge pages that the pod may use, by size.
///
/// # Errors
/// In words: what the pod has to ask for.
pub(super) fn chosen(medium: &str, pages: &BTreeMap<u64, u64>) -> Result<(u64, u64), String> {
    let Some(size) = medium.strip_prefix("HugePages-") else {
        let mut all = pages.iter();
        return match (all.next(), all.next()) {
            (Some((size, bytes)), None) => Ok((*size, *bytes)),
            (None, _) => Err(format!(
                "medium {MEDIUM}: the pod asks for no huge pages; give a container \
                 resources.limits[hugepages-2Mi]"
            )),
            _ => Err(format!(
                "medium {MEDIUM}: the pod asks for pages of several sizes; say which, for example \
                 HugePages-2Mi"
            )),
        };
    };
    let parsed = Quantity::parse(size).map_err(|error| format!("medium {medium:?}: {error}"))?;
    let found = u64::try_from(parsed.units()).ok();
    let found = found.and_then(|size| pages.get_key_value(&size));
    let Some((size, bytes)) = found else {
        return Err(format!(
            "medium {medium}: the pod asks for no such pages; give a container \
             resources.limits[hugepages-{size}]"
        ));
    };
    Ok((*size, *bytes))
}

/// Mounts a hugetlbfs unless one is there. Returns whether it is new.
pub(super) fn ensure(
    directory: &Path,
    page_bytes: u64,
    size_bytes: u64,
) -> Result<bool, VolumeError> {
    let failed = || VolumeError::io(format!("mount hugetlbfs on {}", directory.display()));
    fs::create_dir_all(directory).map_err(failed())?;
    if tmpfs::is_mount_of(directory, HUGETLBFS_MAGIC) {
        return Ok(false);
    }
    let options = format!("pagesize={page_bytes},size={size_bytes}");
    let options = CString::new(options).map_err(|error| failed()(error.into()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount(
        "hugetlbfs",
        directory,
        "hugetlbfs",
        flags,
        Some(options.as_c_str()),
    )
    .map_err(|errno| failed()(errno.into()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_medium_is_one_of_the_pods_page_sizes() {
        let none = BTreeMap::new();
        let one = BTreeMap::from([(2 << 20, 4 << 20)]);
        let two = BTreeMap::from([(2 << 20, 4 << 20), (1 << 30, 1 << 30)]);
        assert!(is_medium("HugePages") && is_medium("HugePages-1Gi"));
        assert!(!is_medium("Memory") && !is_medium("HugePagesX"));
        assert_eq!(chosen("HugePages", &one), Ok((2 << 20, 4 << 20)));
        assert_eq!(chosen("HugePages-2Mi", &two), Ok((2 << 20, 4 << 20)));
        assert_eq!(chosen("HugePages-1Gi", &two), Ok((1 << 30, 1 << 30)));
        for (medium, pages, part) in [
            ("HugePages", &none, "asks for no huge pages"),
            ("HugePages", &two, "several sizes"),
            ("HugePages-1Gi", &one, "limits[hugepages-1Gi]"),
            ("HugePages-x", &one, "medium \"HugePages-x\""),
        ] {
            let words = chosen(medium, pages).unwrap_err();
            assert!(words.contains(part), "{words}");
        }
    }
}
