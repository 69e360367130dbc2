//! `gantry attach`: the streams of a container's own process, from now on.

use crate::Global;
use crate::connection::Session;
use crate::exec;
use crate::failure::Failure;
use crate::streams::{self, PodArgs, StreamArgs};
use clap::Args;
use gantry_api::proto::ExecExit;
use serde_json::Value;
use std::process::ExitCode;

#[derive(Args, Debug)]
pub(crate) struct Attach {
    #[command(flatten)]
    pod: PodArgs,
    /// Container
    #[arg(short, long)]
    container: Option<String>,
    #[command(flatten)]
    streams: StreamArgs,
}

impl StreamArgs {
    /// Connects to a container's own process. Returns when it has ended, or this client leaves.
    pub(crate) async fn attach(
        self,
        session: &Session,
        pod: &Value,
        container: Option<&str>,
    ) -> Result<ExecExit, Failure> {
        let mut start = exec::start(session, pod, container, "attach to")?;
        let has_tty = has_terminal(pod, &start.container);
        if self.tty && !has_tty && !self.quiet {
            eprintln!(
                "error: Unable to use a TTY - container {} did not allocate one",
                start.container
            );
        }
        start.attach = true;
        start.stdin = self.stdin;
        start.tty = has_tty && self.use_terminal();
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
        let (session, pod) = self.pod.find(global).await?;
        let container = self.container.as_deref();
        let exit = self.streams.attach(&session, &pod, container).await?;
        match exit.message.is_empty() {
            // As kubectl: the container's own code is not the client's.
            true => Ok(ExitCode::SUCCESS),
            false => Err(Failure::Local(exit.message)),
        }
    }
}
