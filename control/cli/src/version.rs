//! `gantry version` and `gantry api-resources`.

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::output;
use clap::Args;
use gantry_api::proto::KindsRequest;

#[derive(Args, Debug)]
pub(crate) struct Version {
    /// This program only, without asking the server
    #[arg(long)]
    client: bool,
}

impl Version {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        output::print(&format!("Client Version: v{}\n", env!("CARGO_PKG_VERSION")))?;
        if self.client {
            return Ok(());
        }
        let session = Session::open(global).await?;
        // The server's answer shows that it speaks this protocol.
        let kinds = session
            .objects
            .clone()
            .kinds(session.request(KindsRequest {}))
            .await?;
        let count = kinds.into_inner().kinds.len();
        output::print(&format!(
            "Server: {} serves {count} kinds\n",
            session.server
        ))
    }
}

pub(crate) async fn api_resources(global: &Global) -> Result<(), Failure> {
    let session = Session::open(global).await?;
    let reply = session
        .objects
        .clone()
        .kinds(session.request(KindsRequest {}))
        .await?;
    let header = ["NAME", "SHORTNAMES", "APIVERSION", "NAMESPACED", "KIND"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for kind in reply.into_inner().kinds {
        let api_version = if kind.group.is_empty() {
            kind.version.clone()
        } else {
            format!("{}/{}", kind.group, kind.version)
        };
        let short_names = kind.short_names.join(",");
        rows.push(vec![
            kind.plural,
            short_names,
            api_version,
            kind.namespaced.to_string(),
            kind.kind,
        ]);
    }
    output::print(&output::table_text(&rows, &[]))
}
