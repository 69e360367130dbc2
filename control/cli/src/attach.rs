//! `gantry attach`: the streams of a container's own process, from now on.

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::logs::resolve_pod;
use crate::{exec, names, streams};
use clap::Args;
use gantry_api::kinds::resolve;
use gantry_api::proto::ExecExit;
use serde_json::Value;
use std::process::ExitCode;

#[derive(Args, Debug)]
pub(crate) struct Attach {
    /// A pod, or type/name (deploy/web)
    #[arg(required = true, num_args = 1..=2)]
    words: Vec<String>,
    /// Container
    #[arg(short, long)]
    container: Option<String>,
    /// Pass stdin to the container
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Stdin is a terminal
    #[arg(short, long)]
    tty: bool,
    /// Nothing but the container's own output
    #[arg(short, long)]
    quiet: bool,
}

/// How to connect to a container's own process.
pub(crate) struct Streams<'a> {
    pub(crate) container: Option<&'a str>,
    pub(crate) stdin: bool,
    pub(crate) tty: bool,
    pub(crate) quiet: bool,
}

impl Streams<'_> {
    /// Returns when the container has ended, or this client leaves.
    pub(crate) async fn attach(&self, session: &Session, pod: &Value) -> Result<ExecExit, Failure> {
        let mut start = exec::start(session, pod, self.container, "attach to")?;
        let has_tty = has_terminal(pod, &start.container);
        if self.tty && !has_tty && !self.quiet {
            eprintln!(
                "error: Unable to use a TTY - container {} did not allocate one",
                start.container
            );
        }
        start.attach = true;
        start.stdin = self.stdin;
        start.tty = has_tty && streams::use_terminal(self.tty, self.stdin, self.quiet);
        start.size = start.tty.then(streams::terminal_size).flatten();
        if start.tty && start.stdin && !self.quiet {
            eprintln!("If you don't see a command prompt, try pressing enter.");
        }
        streams::run(session, start).await
    }
}

fn has_terminal(pod: &Value, container: &str) -> bool {
    let lists = ["containers", "initContainers", "ephemeralContainers"];
    let all = lists.iter().filter_map(|list| pod["spec"][list].as_array());
    let mut found = all.flatten().filter(|c| c["name"] == container);
    found.any(|c| c["tty"] == true)
}

impl Attach {
    pub(crate) async fn run(&self, global: &Global) -> Result<ExitCode, Failure> {
        let pods =
            resolve("pods").ok_or_else(|| Failure::local("this build does not know pods"))?;
        let (kind, name) = names::one(&self.words, Some(pods))?;
        let session = Session::open(global).await?;
        let pod = resolve_pod(&session, kind, &name).await?;
        let streams = Streams {
            container: self.container.as_deref(),
            stdin: self.stdin,
            tty: self.tty,
            quiet: self.quiet,
        };
        let exit = streams.attach(&session, &pod).await?;
        match exit.message.is_empty() {
            // As kubectl: the container's own code is not the client's.
            true => Ok(ExitCode::SUCCESS),
            false => Err(Failure::Local(exit.message)),
        }
    }
}
