//! `gantry scale`: the number of replicas of Deployments and ReplicaSets.

use crate::Global;
use crate::connection::{Session, key};
use crate::failure::Failure;
use crate::names::targets;
use crate::output;
use clap::Args;
use gantry_api::kinds::Kind;
use gantry_api::proto::patch_request::Type;
use serde_json::{Value, json};

#[derive(Args, Debug)]
pub(crate) struct Scale {
    /// Types and names: deploy/web, rs web
    #[arg(required = true, value_name = "TYPE|TYPE/NAME")]
    words: Vec<String>,
    /// The wanted number
    #[arg(long, value_parser = clap::value_parser!(i32).range(0..))]
    replicas: i32,
    /// Only if the number is this one now
    #[arg(long, default_value_t = -1, allow_negative_numbers = true)]
    current_replicas: i32,
}

impl Scale {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let targets = targets(&self.words)?;
        if targets.iter().any(|t| t.names.is_empty()) {
            return Err(Failure::local(
                "name the objects to scale, for example deploy/web",
            ));
        }
        if let Some(t) = targets.iter().find(|t| {
            !matches!(
                t.kind.kind,
                "Deployment" | "ReplicaSet" | "StatefulSet" | "ReplicationController"
            )
        }) {
            let text = format!("{} cannot be scaled", t.kind.qualified_resource());
            return Err(Failure::Local(text));
        }
        let session = Session::open(global).await?;
        for target in &targets {
            for name in &target.names {
                self.one(&session, target.kind, name).await?;
            }
        }
        Ok(())
    }

    async fn one(&self, session: &Session, kind: &Kind, name: &str) -> Result<(), Failure> {
        let at = key(kind, &session.namespace, name);
        let mut patch = json!({"spec": {"replicas": self.replicas}});
        if self.current_replicas >= 0 {
            let live = session.get(at.clone()).await?;
            let now = live
                .pointer("/spec/replicas")
                .and_then(Value::as_i64)
                .unwrap_or(1);
            if now != i64::from(self.current_replicas) {
                let text = format!(
                    "Expected replicas to be {}, was {now}",
                    self.current_replicas
                );
                return Err(Failure::Local(text));
            }
            // Holds the object to what was just read.
            if let Some(version) = live.pointer("/metadata/resourceVersion") {
                patch["metadata"] = json!({"resourceVersion": version});
            }
        }
        session.patch(at, Type::Merge, &patch).await?;
        output::print(&format!("{} scaled\n", output::object_name(kind, name)))
    }
}
