//! `gantry cordon`, `gantry uncordon`: whether the scheduler gives nodes new pods.

use clap::Args;
use gantry_api::kinds::{Kind, resolve};
use gantry_api::proto::ListRequest;
use gantry_api::proto::patch_request::Type;
use serde_json::{Value, json};

use crate::Global;
use crate::connection::{Session, key};
use crate::failure::Failure;
use crate::output;

/// Which nodes are meant.
#[derive(Args, Debug)]
pub(crate) struct Nodes {
    /// Names of nodes
    #[arg(value_name = "NODE")]
    names: Vec<String>,
    /// Label selector
    #[arg(short = 'l', long, default_value = "", hide_default_value = true)]
    selector: String,
}

#[derive(Args, Debug)]
pub(crate) struct Cordon {
    #[command(flatten)]
    nodes: Nodes,
}

#[derive(Args, Debug)]
pub(crate) struct Uncordon {
    #[command(flatten)]
    nodes: Nodes,
}

impl Cordon {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let session = Session::open(global).await?;
        set(&session, &self.nodes, true).await
    }
}

impl Uncordon {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let session = Session::open(global).await?;
        set(&session, &self.nodes, false).await
    }
}

pub(crate) fn node_kind() -> Result<&'static Kind, Failure> {
    resolve("nodes").ok_or_else(|| Failure::local("this version knows no nodes"))
}

impl Nodes {
    /// Their names.
    pub(crate) async fn names(&self, session: &Session) -> Result<Vec<String>, Failure> {
        match (self.names.is_empty(), self.selector.is_empty()) {
            (false, true) => return Ok(self.names.clone()),
            (true, false) => {}
            (true, true) => return Err(Failure::local("name a node, or select some with -l")),
            (false, false) => {
                return Err(Failure::local(
                    "cannot specify both a node name and a --selector option",
                ));
            }
        }
        let request = ListRequest {
            key: Some(key(node_kind()?, "", "")),
            label_selector: self.selector.clone(),
            ..ListRequest::default()
        };
        let (nodes, _) = session.list(request).await?;
        let name = |node: &Value| Some(node.pointer("/metadata/name")?.as_str()?.to_owned());
        let names: Vec<String> = nodes.iter().filter_map(name).collect();
        if names.is_empty() {
            return Err(Failure::local(format!(
                "no node has the labels {:?}",
                self.selector
            )));
        }
        Ok(names)
    }
}

async fn set(session: &Session, nodes: &Nodes, on: bool) -> Result<(), Failure> {
    let mut failed = false;
    for name in nodes.names(session).await? {
        match set_one(session, &name, on).await {
            Ok(said) => output::print(&said)?,
            Err(failure) if failure.reason().is_some() => {
                eprintln!("{failure}");
                failed = true;
            }
            Err(failure) => return Err(failure),
        }
    }
    if failed {
        Err(Failure::Reported)
    } else {
        Ok(())
    }
}

/// Sets one node; returns the line that says so.
pub(crate) async fn set_one(session: &Session, name: &str, on: bool) -> Result<String, Failure> {
    let done = if on { "cordoned" } else { "uncordoned" };
    let node = session.get(key(node_kind()?, "", name)).await?;
    let is_on = node.pointer("/spec/unschedulable") == Some(&Value::Bool(true));
    if is_on == on {
        return Ok(format!("node/{name} already {done}\n"));
    }
    // null removes the field, as kubectl does.
    let value = if on { json!(true) } else { Value::Null };
    let patch = json!({"spec": {"unschedulable": value}});
    session
        .patch(key(node_kind()?, "", name), Type::Merge, &patch)
        .await?;
    Ok(format!("node/{name} {done}\n"))
}
