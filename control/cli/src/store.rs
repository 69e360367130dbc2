//! `gantry store`: what is in the store, how it is, less of it, a new key for its Secrets.

use clap::Subcommand;
use gantry_api::proto::{
    RotateKeyRequest, StoreCompactRequest, StoreReadRequest, StoreStatus, StoreStatusRequest,
};
use serde_json::Value;

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::output;

#[derive(Subcommand, Debug)]
pub(crate) enum Store {
    /// Print what is stored below a prefix, Secrets included: one line each, revision, key, value
    Get {
        /// For example /registry/pods/default/
        #[arg(value_name = "PREFIX", default_value = "/")]
        prefix: String,
        /// Without values
        #[arg(long)]
        keys_only: bool,
    },
    /// Show where the store is, how large, at which revision, by which key its Secrets are sealed
    Status,
    /// Forget the history that watches could begin in, and give the space back
    Compact,
    /// Seal Secrets by a new key; the old one stays in the key file, for old backups
    #[command(name = "rotate-key")]
    RotateKey,
}

impl Store {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let session = Session::open(global).await?;
        let mut store = session.store.clone();
        match self {
            Self::Get { prefix, keys_only } => {
                let request = StoreReadRequest {
                    prefix: prefix.clone(),
                    keys_only: *keys_only,
                };
                let mut entries = store.read(session.request(request)).await?.into_inner();
                while let Some(entry) = entries.message().await? {
                    let (revision, key) = (entry.mod_revision, &entry.key);
                    let line = match keys_only {
                        true => format!("{key}\n"),
                        false => format!("{revision}\t{key}\t{}\n", shown(&entry.value)),
                    };
                    output::print(&line)?;
                }
                Ok(())
            }
            Self::Status => {
                let request = session.request(StoreStatusRequest {});
                let status = store.status(request).await?.into_inner();
                output::print(&status_text(&status))
            }
            Self::Compact => {
                let request = session.request(StoreCompactRequest {});
                let done = store.compact(request).await?.into_inner();
                output::print(&format!(
                    "nothing before revision {} is kept for watches; {} bytes\n",
                    done.revision, done.bytes
                ))
            }
            Self::RotateKey => {
                let request = session.request(RotateKeyRequest {});
                let key = store.rotate_key(request).await?.into_inner().key;
                output::print(&format!(
                    "Secrets are sealed by key {key} from now on; gantry store status says when those of older \
                     keys are too. Keep the older keys in the key file as long as backups of their time\n"
                ))
            }
        }
    }
}

/// One line: objects are JSON, anything else is shown as text.
fn shown(value: &[u8]) -> String {
    match serde_json::from_slice::<Value>(value) {
        Ok(value) => value.to_string(),
        Err(_) => String::from_utf8_lossy(value).escape_debug().to_string(),
    }
}

fn status_text(status: &StoreStatus) -> String {
    let sealed = match (&*status.sealed_by, status.is_resealing) {
        ("", _) => "no key: they are in clear".to_owned(),
        (key, false) => format!("key {key}"),
        (key, true) => format!("key {key}, some by an older one until all are rewritten"),
    };
    let held = match status.is_held {
        true => "yes: not every node has spoken since the restore, nobody is placed or evicted",
        false => "no",
    };
    let rows = [
        ("Store", status.place.clone()),
        ("Size", format!("{} bytes", status.bytes)),
        ("Objects", status.objects.to_string()),
        ("Revision", status.revision.to_string()),
        ("Watches from", status.oldest.to_string()),
        (
            "History",
            format!("{} ({})", status.lineage_id, status.lineage_counter),
        ),
        ("Secrets sealed by", sealed),
        ("Held", held.to_owned()),
    ];
    let rows = rows.map(|(name, value)| vec![format!("{name}:"), value]);
    output::table_text(&rows, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_what_is_not_as_it_should_be() {
        let mut status = StoreStatus {
            place: "/var/lib/gantry-control/store.redb".to_owned(),
            sealed_by: "0a1b2c3d".to_owned(),
            ..StoreStatus::default()
        };
        let text = status_text(&status);
        assert!(
            text.contains("key 0a1b2c3d\n") && text.ends_with("no\n"),
            "{text}"
        );
        (status.is_resealing, status.is_held) = (true, true);
        let text = status_text(&status);
        assert!(
            text.contains("older one") && text.contains("nobody is placed"),
            "{text}"
        );
        status.sealed_by = String::new();
        assert!(status_text(&status).contains("in clear"));
    }

    #[test]
    fn a_value_is_one_line() {
        assert_eq!(shown(b"{\"a\":\n 1}"), "{\"a\":1}");
        assert_eq!(shown(b"a\nb"), "a\\nb");
    }
}
