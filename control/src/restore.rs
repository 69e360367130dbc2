//! `gantry-control restore FILE`: the store of a stopped control plane becomes what a backup says.
//!
//! [`crate::store::restore`] does the store; here are the directory, the keys that came along, and the words.

use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::config::EtcdArguments;
use crate::pki::{differing_file, write_carried};
use crate::run::{StartError, make_data_dir};
use crate::store::seal::KEY_FILE;
use crate::store::{self, Keys, RestoreError, Restored};

/// Arguments of `gantry-control restore`.
#[derive(Clone, Debug, clap::Args)]
pub struct RestoreArguments {
    /// What `gantry backup save` has written
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// The data directory of the control plane, which must not run; made if it is not there
    #[arg(long, value_name = "DIR", default_value = "/var/lib/gantry-control")]
    pub data_dir: PathBuf,

    /// Where the store is to be, if not in the data directory
    #[command(flatten)]
    pub etcd: EtcdArguments,

    /// The key file that the restored store's Secrets are sealed by; made if it is not there
    /// [default: pki/store.key in the data directory]
    #[arg(long, value_name = "FILE")]
    pub store_key: Option<PathBuf>,

    /// The key file that opens the backup, if it is another one
    #[arg(long, value_name = "FILE")]
    pub backup_key: Option<PathBuf>,
}

/// Restores; returns what to tell.
pub fn run(arguments: &RestoreArguments) -> Result<String, StartError> {
    let RestoreArguments { file, data_dir, .. } = arguments;
    make_data_dir(data_dir)?;
    let store = arguments.store_key.clone();
    let store = store.unwrap_or_else(|| data_dir.join(KEY_FILE));
    let backup = arguments
        .backup_key
        .clone()
        .unwrap_or_else(|| store.clone());
    let keys = Keys { backup, store };
    let take = |files: Vec<(String, Bytes)>| take_files(data_dir, &files);
    let Some(servers) = arguments.etcd.servers()? else {
        let restored = store::restore(file, data_dir, &keys, take)?;
        return Ok(words(&restored, &data_dir.display().to_string()));
    };
    let place = servers.urls.join(",");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(StartError::Signals)?;
    let restored = runtime.block_on(store::restore_etcd(file, servers, &keys, take))?;
    Ok(words(&restored, &place))
}

fn take_files(data_dir: &Path, files: &[(String, Bytes)]) -> Result<(), RestoreError> {
    let failed = |error: crate::pki::PkiError| RestoreError::Io {
        action: "put the keys of the backup into",
        path: data_dir.join("pki"),
        reason: error.to_string(),
    };
    if let Some(name) = differing_file(data_dir, files).map_err(failed)? {
        let path = data_dir.join("pki").join(name);
        return Err(RestoreError::OtherCluster { path });
    }
    write_carried(data_dir, files).map_err(failed)
}

fn words(restored: &Restored, place: &str) -> String {
    let header = &restored.header;
    let before = restored.before.as_ref().map_or(String::new(), |path| {
        format!("\nthe store that was there is kept as {}", path.display())
    });
    format!(
        "restored {} objects of revision {} (taken {}) into {place}{before}\n\
         start gantry-control: pods that run are adopted; nobody is placed or evicted before every node has \
         spoken, or was silent for the grace period\n",
        restored.entries, header.revision, header.taken,
    )
}
