//! Which cgroup hierarchies this machine has: read from the mount table, never from a version.
//!
//! ```text
//! /proc/self/mountinfo ─► parse ─┬─ cgroup2 on /sys/fs/cgroup ──────────► Layout::V2
//!                                └─ v1 controllers on their own mounts ─► Layout::V1 (hybrid: v2 besides, without controllers)
//! ```
//! A v1 hierarchy may hold one controller (`memory`) or several (`cpu,cpuacct`); `name=systemd`
//! holds none and is left alone.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A v1 hierarchy: its root and the controllers mounted there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub root: PathBuf,
    /// `cpu`, `cpuacct`, `memory`, ...
    pub controllers: BTreeSet<String>,
}

/// The machine's cgroups.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Layout {
    /// One hierarchy.
    V2 {
        /// `/sys/fs/cgroup`
        root: PathBuf,
    },
    /// Controllers on v1; a v2 hierarchy without controllers may exist besides (hybrid).
    V1 {
        /// Those with at least one controller.
        hierarchies: Vec<Hierarchy>,
        /// `/sys/fs/cgroup/unified`, when mounted: where BPF programs attach.
        unified: Option<PathBuf>,
    },
}

impl Layout {
    /// Roots of every hierarchy in which containers get a directory.
    pub fn roots(&self) -> Vec<&Path> {
        match self {
            Self::V2 { root } => vec![root],
            Self::V1 { hierarchies, .. } => hierarchies.iter().map(|h| h.root.as_path()).collect(),
        }
    }

    /// The root under which `controller` has its files.
    pub fn root_of(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::V2 { root } => Some(root),
            Self::V1 { hierarchies, .. } => hierarchies
                .iter()
                .find(|h| h.controllers.contains(controller))
                .map(|h| h.root.as_path()),
        }
    }

    /// The v2 root, on hybrid machines too.
    pub fn unified(&self) -> Option<&Path> {
        match self {
            Self::V2 { root } => Some(root),
            Self::V1 { unified, .. } => unified.as_deref(),
        }
    }
}

/// Controllers of a v1 hierarchy are among its super block options, between `rw` and the like.
const V1_CONTROLLERS: [&str; 14] = [
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "debug",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "misc",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
];

/// Reads a mount table (`/proc/self/mountinfo`). None: no cgroup file system is mounted.
pub fn parse(mountinfo: &str) -> Option<Layout> {
    let mut hierarchies: Vec<Hierarchy> = Vec::new();
    let mut unified: Option<PathBuf> = None;
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let mut left = left.split(' ').skip(3);
        let (Some(_root), Some(mount_point)) = (left.next(), left.next()) else {
            continue;
        };
        let mut right = right.split(' ');
        let (kind, options) = (right.next(), right.nth(1).unwrap_or(""));
        let mount_point = PathBuf::from(unescape(mount_point));
        match kind {
            // The first mount of a hierarchy wins; later ones are bind mounts of it.
            Some("cgroup2") if unified.is_none() => unified = Some(mount_point),
            Some("cgroup") => {
                let controllers: BTreeSet<String> = options
                    .split(',')
                    .filter(|o| V1_CONTROLLERS.contains(o))
                    .map(str::to_owned)
                    .collect();
                let seen = hierarchies.iter().any(|h| h.controllers == controllers);
                if !controllers.is_empty() && !seen {
                    hierarchies.push(Hierarchy {
                        root: mount_point,
                        controllers,
                    });
                }
            }
            _ => {}
        }
    }
    if hierarchies.is_empty() {
        unified.map(|root| Layout::V2 { root })
    } else {
        Some(Layout::V1 {
            hierarchies,
            unified,
        })
    }
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
pub(crate) fn unescape(field: &str) -> String {
    let mut out = String::with_capacity(field.len());
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest
            .get(at + 1..at + 4)
            .and_then(|d| u8::from_str_radix(d, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte as char);
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pure_v2_is_one_hierarchy() {
        let table = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        let root = PathBuf::from("/sys/fs/cgroup");
        assert_eq!(parse(table), Some(Layout::V2 { root }));
    }

    #[test]
    fn hybrid_keeps_joint_controllers_and_skips_systemd() {
        let table = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
99 31 0:32 /x /mnt/my\\040bind rw,relatime - cgroup cgroup rw,memory
";
        let layout = parse(table).unwrap();
        assert_eq!(layout.roots().len(), 2);
        assert_eq!(layout.root_of("cpuacct"), layout.root_of("cpu"));
        assert_eq!(
            layout.root_of("memory"),
            Some(Path::new("/sys/fs/cgroup/memory"))
        );
        assert_eq!(layout.root_of("pids"), None);
        assert_eq!(layout.unified(), Some(Path::new("/sys/fs/cgroup/unified")));
    }

    #[test]
    fn nothing_mounted_is_none() {
        assert_eq!(
            parse("22 27 0:21 / /proc rw - proc proc rw\ngarbage\n"),
            None
        );
        assert_eq!(unescape("/a\\040b\\9"), "/a b\\9");
    }
}
