//! What a container's mounts are put on, as layers below its image's.
//!
//! ```text
//! upper      what the container writes
//! image      its layers
//! token      /var/run/secrets/kubernetes.io/serviceaccount    where the pod's token is mounted
//! container  /proc, /sys, /dev, /etc/hosts, ...               every container
//! ```
//! An image need not have `/proc` or `/etc/hosts`, and whoever mounts there makes them first: in the
//! writable layer, up to nine inodes on the disk for each container, of some 0.1 ms each, and of 0.4 ms
//! while ext4 passes over those of pods that have just gone (`recently_deleted`). Here they are made
//! once on the machine. What the image says of the same path wins: they are at the bottom.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Which of them an image's root gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MountPoints {
    /// The image alone, as image volumes show it.
    None,
    /// Those of every container.
    Container,
    /// And that of the service account's token.
    ContainerWithToken,
}

/// Where the token is mounted.
pub const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

const DIRECTORIES: [&str; 4] = ["proc", "sys", "dev", "etc"];
const FILES: [&str; 3] = ["etc/hosts", "etc/hostname", "etc/resolv.conf"];

impl MountPoints {
    /// The layers, bottom first, in `directory`; made where they are missing.
    pub(super) fn layers(self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        let (container, token) = (directory.join("container"), directory.join("token"));
        match self {
            Self::None => Ok(Vec::new()),
            Self::Container => {
                ensure(&container, &DIRECTORIES, &FILES)?;
                Ok(vec![container])
            }
            Self::ContainerWithToken => {
                ensure(&container, &DIRECTORIES, &FILES)?;
                ensure(&token, &[TOKEN.trim_start_matches('/')], &[])?;
                Ok(vec![container, token])
            }
        }
    }
}

/// A file that is there with any content is left: nothing reads it, and running containers have
/// their mounts on it.
fn ensure(layer: &Path, directories: &[&str], files: &[&str]) -> io::Result<()> {
    for path in directories.iter().map(|d| layer.join(d)) {
        if !path.is_dir() {
            fs::create_dir_all(path)?;
        }
    }
    for path in files.iter().map(|f| layer.join(f)) {
        if !path.exists() {
            fs::File::create(path)?;
        }
    }
    Ok(())
}
