//! `gantry create -f`: new objects only; one that exists is a failure. And `gantry create token`.

use std::time::Duration;

use crate::Global;
use crate::apply::{DryRun, Write, each};
use crate::connection::{Session, parse};
use crate::failure::Failure;
use crate::files::{Files, Manifest};
use crate::names;
use crate::output;
use clap::{Args, Subcommand, ValueEnum};
use gantry_api::kinds::resolve;
use gantry_api::proto::{WriteReply, WriteRequest};
use serde_json::{Value, json};

#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Create {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    write: Write,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Get a token of a service account, for who calls the API in its name
    Token(Token),
}

#[derive(Args, Debug)]
struct Token {
    /// The service account
    #[arg(value_name = "SERVICEACCOUNT")]
    account: String,
    /// How long it is to be good (10m to 24h) [default: 1h]
    #[arg(long, value_parser = names::duration)]
    duration: Option<Duration>,
    /// Whom it is meant for; may be repeated [default: the API]
    #[arg(long)]
    audience: Vec<String>,
    /// The token ends with an object of this kind
    #[arg(long, value_enum, requires = "bound_object_name")]
    bound_object_kind: Option<Bound>,
    /// and of this name
    #[arg(long, value_name = "NAME", requires = "bound_object_kind")]
    bound_object_name: Option<String>,
    /// and of this uid [default: the one that has the name now]
    #[arg(long, value_name = "UID", requires = "bound_object_kind")]
    bound_object_uid: Option<String>,
    /// Print the whole answer: json or yaml
    #[arg(short, long, default_value = "", hide_default_value = true, value_parser = output::format)]
    output: output::Format,
}

#[derive(ValueEnum, Debug, Clone, Copy)]
enum Bound {
    #[value(name = "Pod", alias = "pod")]
    Pod,
    #[value(name = "Secret", alias = "secret")]
    Secret,
    #[value(name = "Node", alias = "node")]
    Node,
}

impl Token {
    /// The TokenRequest.
    fn asked(&self) -> Value {
        let mut spec = json!({"audiences": self.audience});
        if let Some(duration) = self.duration {
            spec["expirationSeconds"] = json!(duration.as_secs());
        }
        if let Some(kind) = self.bound_object_kind {
            spec["boundObjectRef"] = json!({
                "apiVersion": "v1", "kind": format!("{kind:?}"), "name": self.bound_object_name,
            });
            if let Some(uid) = &self.bound_object_uid {
                spec["boundObjectRef"]["uid"] = json!(uid);
            }
        }
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec})
    }

    async fn run(&self, global: &Global) -> Result<(), Failure> {
        let kind = resolve("serviceaccounts");
        let kind = kind.ok_or_else(|| Failure::local("this version knows no service accounts"))?;
        let session = Session::open(global).await?;
        let request = WriteRequest {
            key: Some(session.key(kind, &self.account)),
            subresource: "token".to_owned(),
            json: self.asked().to_string().into(),
            strict: true,
            field_manager: "gantry".to_owned(),
            ..WriteRequest::default()
        };
        let mut objects = session.objects.clone();
        let reply = objects.create(session.request(request)).await?.into_inner();
        let answer = parse(&reply.json)?;
        if self.output != output::Format::default() {
            return output::print_value(&answer, self.output);
        }
        let token = answer.pointer("/status/token").and_then(Value::as_str);
        let token =
            token.ok_or_else(|| Failure::local("the server has answered without a token"))?;
        output::print(&format!("{token}\n"))
    }
}

impl Create {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        if let Some(What::Token(token)) = &self.what {
            return token.run(global).await;
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        create: Create,
    }

    fn asked(line: &str) -> Result<Value, clap::Error> {
        let words = ["create", "token"]
            .into_iter()
            .chain(line.split_whitespace());
        let parsed = Line::try_parse_from(words)?;
        Ok(match parsed.create.what {
            Some(What::Token(token)) => token.asked()["spec"].clone(),
            None => Value::Null,
        })
    }

    #[test]
    fn a_token_is_asked_for_in_kubectls_words() {
        assert_eq!(asked("ci").unwrap(), json!({"audiences": []}));
        let line = "ci --duration=20m --audience a --audience b";
        assert_eq!(
            asked(line).unwrap(),
            json!({"audiences": ["a", "b"], "expirationSeconds": 1200})
        );
        let line = "ci --bound-object-kind Pod --bound-object-name web --bound-object-uid u";
        assert_eq!(
            asked(line).unwrap()["boundObjectRef"],
            json!({"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": "u"})
        );
        for line in [
            "",
            "ci --bound-object-kind Pod",
            "ci --bound-object-name web",
            "ci --bound-object-kind Service --bound-object-name web",
            "ci -f web.yaml",
        ] {
            assert!(asked(line).is_err(), "{line}");
        }
    }
}
