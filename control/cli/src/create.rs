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
        let send = async |manifest| self.send(&session, manifest).await;
        let report = |manifest: &Manifest, reply| self.write.report(manifest, reply, "created");
        each(&manifests, send, report).await
    }

    async fn send(&self, session: &Session, manifest: &Manifest) -> Result<WriteReply, Failure> {
        let namespace = manifest.namespace(&session.namespace, session.namespace_given)?;
        if self.write.dry_run == DryRun::Client {
            return Ok(WriteReply {
                json: manifest.object.to_string().into(),
                ..WriteReply::default()
            });
        }
        let request = self.write.request(manifest, &namespace);
        let mut objects = session.objects.clone();
        Ok(objects.create(session.request(request)).await?.into_inner())
    }
}
