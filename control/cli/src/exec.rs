//! `gantry exec`: a command in a container, with its terminal, signals by keys, and exit code.

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::logs::default_container;
use crate::streams::{self, PodArgs, StreamArgs};
use clap::Args;
use gantry_api::proto::ExecStart;
use serde_json::Value;
use std::process::ExitCode;

#[derive(Args, Debug)]
pub(crate) struct Exec {
    #[command(flatten)]
    pod: PodArgs,
    /// Container
    #[arg(short, long)]
    container: Option<String>,
    #[command(flatten)]
    streams: StreamArgs,
    /// The command and its arguments, after --
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// A stream to a pod that works: which container, and nothing else yet.
pub(crate) fn start(
    session: &Session,
    pod: &Value,
    container: Option<&str>,
    verb: &str,
) -> Result<ExecStart, Failure> {
    let text = |pointer: &str| {
        pod.pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let phase = text("/status/phase");
    if matches!(phase, "Succeeded" | "Failed") {
        let text =
            format!("cannot {verb} a container in a completed pod; current phase is {phase}");
        return Err(Failure::Local(text));
    }
    Ok(ExecStart {
        namespace: match text("/metadata/namespace") {
            "" => session.namespace.clone(),
            namespace => namespace.to_owned(),
        },
        pod: text("/metadata/name").to_owned(),
        container: match container {
            Some(container) => container.to_owned(),
            None => default_container(pod),
        },
        ..ExecStart::default()
    })
}

impl Exec {
    pub(crate) async fn run(&self, global: &Global) -> Result<ExitCode, Failure> {
        let (session, pod) = self.pod.find(global).await?;
        let mut start = start(&session, &pod, self.container.as_deref(), "exec into")?;
        start.command.clone_from(&self.command);
        start.stdin = self.streams.stdin;
        start.tty = self.streams.use_terminal();
        start.size = start.tty.then(streams::terminal_size).flatten();
        let tty = start.tty;
        let exit = streams::run(&session, start).await?;
        if !exit.message.is_empty() {
            eprintln!("error: {}", exit.message);
        } else if exit.code != 0 && !tty {
            eprintln!("command terminated with exit code {}", exit.code);
        }
        Ok(streams::code(&exit))
    }
}
