//! `gantry apply`: the server merges three ways (last applied, live, new); see `gantry_api::merge`.

use crate::Global;
use crate::connection::{Session, key, parse, warn};
use crate::failure::Failure;
use crate::files::{Files, Manifest};
use crate::output::{self, Format};
use clap::{Args, ValueEnum};
use gantry_api::proto::{WriteReply, WriteRequest};
use serde_json::Value;

#[derive(Args, Debug)]
pub(crate) struct Apply {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    pub(crate) write: Write,
}

/// Flags of verbs that write manifests.
#[derive(Args, Debug, Clone)]
pub(crate) struct Write {
    /// Say what would happen: client (send nothing) or server (judge, but do not store)
    #[arg(long, value_enum, default_value = "none", num_args = 0..=1, require_equals = true,
        default_missing_value = "client")]
    pub(crate) dry_run: DryRun,
    /// What to do about unknown fields
    #[arg(long, value_enum, default_value = "strict", num_args = 0..=1, require_equals = true,
        default_missing_value = "strict")]
    pub(crate) validate: Validate,
    /// Print the result: json, yaml or name
    #[arg(short, long, default_value = "", hide_default_value = true, value_parser = output::format)]
    pub(crate) output: Format,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DryRun {
    None,
    Client,
    Server,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Validate {
    /// Refuse them
    #[value(alias = "true")]
    Strict,
    /// Accept the object without them, and say so
    Warn,
    /// Accept the object without them
    #[value(alias = "false")]
    Ignore,
}

impl Write {
    /// What stands behind a message.
    pub(crate) fn suffix(&self) -> &'static str {
        match self.dry_run {
            DryRun::None => "",
            DryRun::Client => " (dry run)",
            DryRun::Server => " (server dry run)",
        }
    }

    pub(crate) fn request(&self, manifest: &Manifest, namespace: &str) -> WriteRequest {
        let mut object = manifest.object.clone();
        if manifest.kind.namespaced
            && let Some(meta) = object.get_mut("metadata").and_then(Value::as_object_mut)
        {
            meta.insert("namespace".to_owned(), namespace.into());
        }
        WriteRequest {
            key: Some(key(manifest.kind, namespace, manifest.name())),
            json: object.to_string().into(),
            dry_run: self.dry_run != DryRun::None,
            strict: self.validate == Validate::Strict,
            field_manager: "gantry".to_owned(),
            subresource: String::new(),
        }
    }

    /// Prints what happened to one object.
    pub(crate) fn report(
        &self,
        manifest: &Manifest,
        mut reply: WriteReply,
        done: &str,
    ) -> Result<(), Failure> {
        if self.validate == Validate::Ignore {
            reply
                .warnings
                .retain(|warning| !warning.starts_with("unknown field "));
        }
        warn(&reply);
        let object = parse(&reply.json)?;
        let name = object.pointer("/metadata/name").and_then(Value::as_str);
        let line = output::object_name(manifest.kind, name.unwrap_or(manifest.name()));
        match self.output {
            Format::Table | Format::Wide => {
                output::print(&format!("{line} {done}{}\n", self.suffix()))
            }
            Format::Name => output::print(&format!("{line}\n")),
            Format::Yaml | Format::Json => {
                output::print_value(&output::with_type(manifest.kind, object), self.output)
            }
        }
    }
}

impl Apply {
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
        if manifest.name().is_empty() {
            let text = format!(
                "{}: error when applying: resource name may not be empty",
                manifest.source
            );
            return Err(Failure::Local(text));
        }
        if self.write.dry_run == DryRun::Client {
            let live = session
                .find(key(manifest.kind, &namespace, manifest.name()))
                .await?;
            let done = if live.is_some() {
                "configured"
            } else {
                "created"
            };
            let json = manifest.object.to_string().into();
            return self.write.report(
                manifest,
                WriteReply {
                    json,
                    ..WriteReply::default()
                },
                done,
            );
        }
        let request = self.write.request(manifest, &namespace);
        let reply = session
            .objects
            .clone()
            .apply(session.request(request))
            .await?
            .into_inner();
        let done = match (reply.created, reply.unchanged) {
            (true, _) => "created",
            (false, true) => "unchanged",
            (false, false) => "configured",
        };
        self.write.report(manifest, reply, done)
    }
}

/// Does something with every manifest: a refusal of one is reported and does not stop the others.
pub(crate) async fn each(
    manifests: &[Manifest],
    mut act: impl AsyncFnMut(&Manifest) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut failed = false;
    for manifest in manifests {
        if let Err(failure) = act(manifest).await {
            let context = format!("error when creating {:?}", manifest.source);
            match failure.when(&context) {
                failure @ (Failure::Server { .. } | Failure::Local(_)) => {
                    eprintln!("{failure}");
                    failed = true;
                }
                other => return Err(other),
            }
        }
    }
    if failed {
        Err(Failure::Reported)
    } else {
        Ok(())
    }
}
