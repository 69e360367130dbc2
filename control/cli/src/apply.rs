//! `gantry apply`: the server merges three ways (last applied, live, new); see `gantry_api::merge`.

use crate::Global;
use crate::connection::{Session, key, parse, warn};
use crate::failure::Failure;
use crate::files::{Files, Manifest};
use crate::output::{self, Format};
use clap::{Args, ValueEnum};
use futures_util::{StreamExt as _, stream};
use gantry_api::proto::{WriteReply, WriteRequest};
use serde_json::Value;
use std::collections::HashSet;

/// Requests of one command that wait for the server at once.
const IN_FLIGHT_MAX: usize = 64;

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
        let send = async |manifest| self.send(&session, manifest).await;
        let report = |manifest: &Manifest, (reply, done)| self.write.report(manifest, reply, done);
        each(&manifests, send, report).await
    }

    /// Returns the answer and the word for what it means.
    async fn send(
        &self,
        session: &Session,
        manifest: &Manifest,
    ) -> Result<(WriteReply, &'static str), Failure> {
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
            let reply = WriteReply {
                json: manifest.object.to_string().into(),
                ..WriteReply::default()
            };
            return Ok((reply, done));
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
        Ok((reply, done))
    }
}

/// Sends every manifest and reports on each in the manifests' order: a refusal of one is reported
/// and does not stop the others. Those of one run ([`runs`]) go side by side, at most [`IN_FLIGHT_MAX`]
/// of them, so that thousands share the store's fsyncs.
pub(crate) async fn each<'a, T>(
    manifests: &'a [Manifest],
    send: impl AsyncFn(&'a Manifest) -> Result<T, Failure>,
    report: impl Fn(&Manifest, T) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut failed = false;
    for run in runs(manifests) {
        let sent = run
            .iter()
            .map(async |manifest| (manifest, send(manifest).await));
        let mut replies = std::pin::pin!(stream::iter(sent).buffered(IN_FLIGHT_MAX));
        while let Some((manifest, reply)) = replies.next().await {
            let Err(failure) = reply.and_then(|reply| report(manifest, reply)) else {
                continue;
            };
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

/// Splits manifests where one may need what stands before it: at another kind (a namespace comes
/// before what is in it), and at an object that is named once more.
fn runs(manifests: &[Manifest]) -> Vec<&[Manifest]> {
    let mut runs = Vec::new();
    let mut rest = manifests;
    while let Some(first) = rest.first() {
        let mut seen = HashSet::new();
        let fits = |manifest: &&Manifest| {
            let namespace = manifest.object.pointer("/metadata/namespace");
            let namespace = namespace.and_then(Value::as_str).unwrap_or_default();
            std::ptr::eq(manifest.kind, first.kind)
                && seen.insert((namespace.to_owned(), manifest.name().to_owned()))
        };
        let length = rest.iter().take_while(fits).count();
        let (run, others) = rest.split_at(length);
        runs.push(run);
        rest = others;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_api::kinds;
    use proptest::prelude::*;

    fn manifest(plural: &str, namespace: &str, name: &str) -> Manifest {
        let kinds = kinds::KINDS.iter();
        Manifest {
            kind: kinds.clone().find(|kind| kind.plural == plural).unwrap(),
            object: serde_json::json!({"metadata": {"namespace": namespace, "name": name}}),
            source: name.to_owned(),
        }
    }

    #[test]
    fn a_namespace_is_there_before_what_is_in_it_and_twins_follow_each_other() {
        let all = [
            manifest("namespaces", "", "a"),
            manifest("services", "a", "one"),
            manifest("services", "a", "two"),
            manifest("services", "b", "one"),
            manifest("services", "a", "one"),
            manifest("pods", "a", "one"),
        ];
        let lengths: Vec<usize> = runs(&all).iter().map(|run| run.len()).collect();
        assert_eq!(lengths, [1, 3, 1, 1]);
        assert!(runs(&[]).is_empty());
    }

    #[tokio::test]
    async fn replies_are_reported_in_order_and_a_refusal_stops_nobody() {
        let all: Vec<Manifest> = (0..200)
            .map(|n| manifest("services", "a", &n.to_string()))
            .collect();
        let said = std::sync::Mutex::new(Vec::new());
        let done = each(
            &all,
            async |manifest| {
                let number: u64 = manifest.name().parse().unwrap();
                for _ in 0..(number * 7 % 5) {
                    tokio::task::yield_now().await;
                }
                match number {
                    13 => Err(Failure::local("refused")),
                    number => Ok(number),
                }
            },
            |_, number| {
                said.lock().unwrap().push(number);
                Ok(())
            },
        );
        assert!(matches!(done.await, Err(Failure::Reported)));
        let want: Vec<u64> = (0..200).filter(|n| *n != 13).collect();
        assert_eq!(*said.lock().unwrap(), want);
    }

    proptest! {
        #[test]
        fn runs_keep_every_manifest_in_order_and_no_run_names_an_object_twice(
            all in proptest::collection::vec((0..3usize, 0..4u8), 0..40),
        ) {
            let kinds = ["namespaces", "services", "pods"];
            let all: Vec<Manifest> = all
                .iter()
                .map(|(kind, name)| manifest(kinds[*kind], "n", &name.to_string()))
                .collect();
            let name = |m: &Manifest| (m.kind.plural, m.name().to_owned());
            let joined: Vec<_> = runs(&all).into_iter().flatten().map(name).collect();
            prop_assert_eq!(joined, all.iter().map(name).collect::<Vec<_>>());
            for run in runs(&all) {
                let distinct: HashSet<_> = run.iter().map(name).collect();
                prop_assert_eq!(distinct.len(), run.len());
                prop_assert!(run.iter().all(|m| m.kind.plural == run[0].kind.plural));
            }
        }
    }
}
