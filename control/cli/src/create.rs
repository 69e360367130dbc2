//! `gantry create -f`: new objects only; one that exists is a failure.

use crate::Global;
use crate::apply::{DryRun, Write, each};
use crate::connection::Session;
use crate::failure::Failure;
use crate::files::{Files, Manifest};
use clap::Args;
use gantry_api::proto::WriteReply;

#[derive(Args, Debug)]
pub(crate) struct Create {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    write: Write,
}

impl Create {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        if self.files.is_empty() {
            return Err(Failure::local(
                "nothing to read: name a file or a directory with -f, or pipe it in with -f -",
            ));
        }
        let manifests = self.files.read()?;
        let session = Session::open(global).await?;
        each(&manifests, async |manifest| {
            self.one(&session, manifest).await
        })
        .await
    }

    async fn one(&self, session: &Session, manifest: &Manifest) -> Result<(), Failure> {
        let namespace = manifest.namespace(&session.namespace, session.namespace_given)?;
        let reply = if self.write.dry_run == DryRun::Client {
            WriteReply {
                json: manifest.object.to_string().into(),
                ..WriteReply::default()
            }
        } else {
            let request = self.write.request(manifest, &namespace);
            session
                .objects
                .clone()
                .create(session.request(request))
                .await?
                .into_inner()
        };
        self.write.report(manifest, reply, "created")
    }
}
