//! What was attached how: one file per pod, written before the attachment and again after it.
//!
//! `/run/gantry/cni/<uid>.json`. The configuration of ADD is in it, because DEL must run the same
//! plugins with the same configuration even when `/etc/cni/net.d` has changed since.

use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use gantry_cni::config::PodLink;
use gantry_cni::ipam::Owner;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::chain::NetworkList;
use super::{NetworkError, PodNetworkSpec, wires};
use crate::ids::PodUid;

/// How a pod is attached.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Wiring {
    /// gantry-cni in process.
    Bridge {
        /// The node's pod prefixes at that time.
        prefixes: Vec<IpNet>,
        /// Whether its link is a port of the bridge, at that time.
        #[serde(default)]
        link: PodLink,
    },
    /// A third party's plugins.
    Chain(NetworkList),
}

/// One attachment.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    /// metadata.namespace, for CNI_ARGS at DEL.
    pub namespace: String,
    /// metadata.name
    pub name: String,
    /// How.
    pub wiring: Wiring,
    /// CNI_CONTAINERID of the attachment, where it is not the pod's UID: it was made in advance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// The result of ADD; none: ADD has not finished.
    pub result: Option<Value>,
    /// The pod's addresses from that result.
    pub addresses: Vec<IpAddr>,
}

/// The records' directory.
pub(super) fn dir(run: &Path) -> PathBuf {
    run.join("cni")
}

fn path(run: &Path, pod: &PodUid) -> PathBuf {
    dir(run).join(format!("{pod}.json"))
}

fn io_error(verb: &str, path: &Path, source: std::io::Error) -> NetworkError {
    NetworkError::Io {
        context: format!("{verb} {}", path.display()),
        source,
    }
}

impl Record {
    /// Of an attachment that is still to be made.
    pub(super) fn intent(spec: &PodNetworkSpec, wiring: Wiring) -> Self {
        Self {
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            wiring,
            container: None,
            result: None,
            addresses: Vec::new(),
        }
    }

    /// Whose lease and link the bridge has.
    pub(super) fn owner(&self, pod: &PodUid) -> Owner {
        wires::owner(self.container.as_deref().unwrap_or(pod.as_str()))
    }

    /// Reads a pod's record; none when there is none. An unreadable one counts as none: what it
    /// described is found by name (our bridge) or by the plugins' own GC.
    pub(super) fn load(run: &Path, pod: &PodUid) -> Result<Option<Self>, NetworkError> {
        let path = path(run, pod);
        match fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(record) => Ok(Some(record)),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "unreadable; ignored");
                    Ok(None)
                }
            },
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("read", &path, error)),
        }
    }

    /// Writes it whole: a crash leaves the old or the new one. On tmpfs, so without fsync.
    pub(super) fn store(&self, run: &Path, pod: &PodUid) -> Result<(), NetworkError> {
        let path = path(run, pod);
        let temporary = path.with_extension("new");
        let bytes = serde_json::to_vec(self)
            .map_err(|error| io_error("encode", &path, std::io::Error::other(error)))?;
        fs::create_dir_all(dir(run))
            .and_then(|()| fs::write(&temporary, bytes))
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|error| io_error("write", &path, error))
    }

    /// Removes a pod's record. Ok when there is none.
    pub(super) fn remove(run: &Path, pod: &PodUid) -> Result<(), NetworkError> {
        let path = path(run, pod);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(io_error("remove", &path, error))
            }
            _ => Ok(()),
        }
    }

    /// The pods that have a record.
    pub(super) fn pods(run: &Path) -> Result<Vec<PodUid>, NetworkError> {
        let dir = dir(run);
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| io_error("list", &dir, error))?,
        };
        let mut pods = Vec::new();
        for entry in entries {
            let name = entry
                .map_err(|error| io_error("list", &dir, error))?
                .file_name();
            let uid = name.to_str().and_then(|name| name.strip_suffix(".json"));
            pods.extend(uid.and_then(|uid| PodUid::new(uid).ok()));
        }
        Ok(pods)
    }
}
