//! `gantry backup`: everything that the control plane holds, in one file, and back.
//!
//! `save` asks the running control plane; the file appears whole or not at all. `restore` is
//! `gantry-control restore` on the control plane's machine: it needs the store's file, not the API.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Subcommand;
use gantry_api::proto::{BackupDone, BackupRequest};

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::output;

#[derive(Subcommand, Debug)]
pub(crate) enum Backup {
    /// Write everything at one revision into a file, while the cluster works
    Save {
        /// The file; one that is there is replaced when the new one is whole
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Secrets and the cluster's keys can be read by everybody who has the file, without the store's key
        #[arg(long)]
        in_clear: bool,
    },
    /// Make the stopped control plane of this machine what a backup says
    Restore {
        /// What `save` has written
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// The data directory of gantry-control [default: /var/lib/gantry-control]
        #[arg(long, value_name = "DIR")]
        data_dir: Option<PathBuf>,
        /// The key file that the restored store's Secrets are sealed by; made if it is not there
        /// [default: pki/store.key in the data directory]
        #[arg(long, value_name = "FILE")]
        store_key: Option<PathBuf>,
        /// The key file that opens the backup, if it is another one
        #[arg(long, value_name = "FILE")]
        backup_key: Option<PathBuf>,
    },
}

impl Backup {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        match self {
            Self::Save { file, in_clear } => {
                let done = save(global, file, *in_clear).await?;
                let care = match in_clear {
                    true => {
                        "Secrets and the cluster's keys are in it in clear: keep it as safe as the control plane"
                    }
                    false => {
                        "Secrets and the cluster's keys are sealed by the store's key (pki/store.key): keep a \
                              copy of that elsewhere, without it nothing is restored"
                    }
                };
                output::print(&format!(
                    "{}: {} objects at revision {}, {} bytes. {care}\n",
                    file.display(),
                    done.entries,
                    done.revision,
                    done.bytes
                ))
            }
            Self::Restore {
                file,
                data_dir,
                store_key,
                backup_key,
            } => {
                let places = [
                    ("--data-dir", data_dir),
                    ("--store-key", store_key),
                    ("--backup-key", backup_key),
                ];
                restore(file, &places)
            }
        }
    }
}

fn failed<'a>(action: &'a str, path: &'a Path) -> impl Fn(std::io::Error) -> Failure + 'a {
    move |error| Failure::local(format!("cannot {action} {}: {error}", path.display()))
}

/// Writes beside the target, syncs, renames.
async fn save(global: &Global, path: &Path, in_clear: bool) -> Result<BackupDone, Failure> {
    let session = Session::open(global).await?;
    let name = path
        .file_name()
        .ok_or_else(|| Failure::local(format!("{} is no name of a file", path.display())))?;
    let mut draft_name = name.to_owned();
    draft_name.push(".new");
    let draft = path.with_file_name(draft_name);
    let result = receive(&session, &draft, in_clear).await;
    let done = match result {
        Ok(done) => done,
        Err(failure) => {
            // What is not whole is of no use; that it cannot be removed either is said by the next one.
            let _ = std::fs::remove_file(&draft);
            return Err(failure);
        }
    };
    std::fs::rename(&draft, path).map_err(failed("write", path))?;
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(failed("sync", directory))?;
    Ok(done)
}

async fn receive(session: &Session, draft: &Path, in_clear: bool) -> Result<BackupDone, Failure> {
    let write = failed("write", draft);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(draft)
        .map_err(&write)?;
    // A draft that was left behind keeps the mode it was made with.
    file.set_permissions(std::fs::Permissions::from_mode(0o600))
        .map_err(&write)?;
    let mut stream = session
        .store
        .clone()
        .backup(session.request(BackupRequest { in_clear }))
        .await?
        .into_inner();
    let mut bytes = 0;
    let mut done = None;
    while let Some(chunk) = stream.message().await? {
        bytes += chunk.data.len() as u64;
        file.write_all(&chunk.data).map_err(&write)?;
        done = chunk.done;
    }
    let done = done.filter(|done| done.bytes == bytes).ok_or_else(|| {
        Failure::local(
            "the backup ended before it was whole: is the control plane being stopped? Try again",
        )
    })?;
    file.sync_all().map_err(&write)?;
    Ok(done)
}

fn restore(file: &Path, places: &[(&str, &Option<PathBuf>)]) -> Result<(), Failure> {
    let own = std::env::current_exe()
        .map_err(|error| Failure::local(format!("where is this program? {error}")))?;
    let control = own.with_file_name("gantry-control");
    let mut command = Command::new(&control);
    command.arg("restore").arg(file);
    for (flag, place) in places {
        if let Some(place) = place {
            command.arg(flag).arg(place);
        }
    }
    let status = command.status().map_err(|error| {
        let control = control.display();
        Failure::local(format!(
            "cannot run {control}: {error}; restore on the control plane's machine"
        ))
    })?;
    match status.success() {
        true => Ok(()),
        // It has said why.
        false => Err(Failure::Reported),
    }
}
