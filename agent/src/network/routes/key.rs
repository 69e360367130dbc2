//! This node's WireGuard key: made here, kept here, and its public half told to the others.
//!
//! ```text
//!  /var/lib/gantry/wireguard.key (0600) ─► kernel: gantry-wg ─► public key ─► the Node's annotation
//! ```
//! It is on the disk so that a node that starts without a control plane is known to its peers.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use gantry_cni::netlink::Netlink;
use gantry_cni::wireguard::{self, Key};

/// Where the others read it, as `wg` writes keys.
pub use gantry_api::WIREGUARD_KEY_ANNOTATION as KEY_ANNOTATION;

const FILE: &str = "wireguard.key";

/// This node's side.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnKey {
    /// For the kernel alone.
    pub private: Key,
    /// For everybody.
    pub public: Key,
    /// UDP port.
    pub port: u16,
}

impl OwnKey {
    /// Makes the key where there is none, and the device that computes the public one.
    ///
    /// # Errors
    /// In words for people: what the kernel or the disk refuses.
    pub async fn open(lib: &Path, port: u16) -> Result<Self, String> {
        let path = lib.join(FILE);
        let private = load_or_create(&path);
        let private =
            private.map_err(|error| format!("WireGuard key {}: {error}", path.display()))?;
        let host = Netlink::open().map_err(|error| error.to_string())?;
        let public = wireguard::prepare(&host, &private, port).await;
        Ok(Self {
            private,
            public: public.map_err(|error| error.to_string())?,
            port,
        })
    }

    /// The public key, as people write it.
    pub fn text(&self) -> String {
        STANDARD.encode(self.public)
    }
}

fn load_or_create(path: &Path) -> io::Result<Key> {
    match fs::read(path) {
        Ok(bytes) => {
            let key = Key::try_from(bytes.as_slice());
            return key
                .map_err(|_| io::Error::other("it has not 32 bytes: remove it for a new one"));
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let key: Key = rand::random();
    let new = path.with_extension("new");
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&new)?;
    file.write_all(&key)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    if let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_is_roots_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let key = load_or_create(&path).unwrap();
        assert_eq!(load_or_create(&path).unwrap(), key);
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        fs::write(&path, "x").unwrap();
        assert!(
            load_or_create(&path).is_err(),
            "it is never replaced in silence"
        );
    }
}
