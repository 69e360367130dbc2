//! `gantry join`: the next machine of a cluster. `gantry-agent join` talks to the control plane; here the
//! agent is made a unit and started.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::Args;

use super::{CONTROL_DATA, Places, host_name, need_root, no_systemd, systemd};
use crate::failure::Failure;
use crate::output;

#[derive(Args, Debug)]
pub(crate) struct Join {
    /// The control plane, or several of one cluster, of which one that answers is enough
    #[arg(value_name = "HOST:PORT,...")]
    server: String,
    /// A bootstrap token: gantry token create makes one on the control plane
    #[arg(
        long,
        value_name = "TOKEN",
        env = "GANTRY_JOIN_TOKEN",
        hide_env_values = true
    )]
    token: String,
    /// Digest of the key of the cluster's CA, sha256:...
    #[arg(long, value_name = "HASH")]
    ca_hash: String,
    /// This node's name [default: the host's]
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// Join, but start nothing and print what to run
    #[arg(long)]
    no_start: bool,
    /// As if this directory were /
    #[arg(long, value_name = "DIR", hide = true)]
    root: Option<PathBuf>,
    /// Flags of gantry-agent run, for example: -- --max-pods 250
    #[arg(last = true, value_name = "FLAGS")]
    agent_flags: Vec<String>,
}

impl Join {
    pub(crate) fn run(&self) -> Result<ExitCode, Failure> {
        let places = Places::new(self.root.as_deref())?;
        need_root(&places)?;
        if places.at(CONTROL_DATA).exists() {
            return Err(Failure::local(
                "this machine is a control plane (/var/lib/gantry-control is there) and its own node: it joins \
                 no other cluster before gantry reset",
            ));
        }
        let node = self.node_name.clone().unwrap_or_else(host_name);
        let agent = places.program("gantry-agent");
        let credentials = places.at("/etc/gantry/agent");
        let joined = Command::new(&agent)
            .args(["join", &self.server, "--ca-hash", &self.ca_hash])
            .args(["--node-name", &node])
            .arg("--credentials")
            .arg(&credentials)
            // Not in the arguments: everybody on the machine can read those.
            .env("GANTRY_JOIN_TOKEN", &self.token)
            .status()
            .map_err(|error| Failure::local(format!("cannot run {}: {error}", agent.display())))?;
        if !joined.success() {
            // It has said why, and what to do.
            return Err(Failure::Reported);
        }
        let mut arguments = vec!["run".to_owned()];
        if !places.is_machine() {
            let directory = credentials.display().to_string();
            arguments.extend(["--credentials".to_owned(), directory]);
        }
        arguments.extend(self.agent_flags.iter().cloned());
        let text = systemd::agent(&agent, &arguments);
        let is_new = systemd::write(&places, systemd::AGENT, &text)?;
        systemd::write(&places, systemd::SHUTDOWN, &systemd::shutdown(&agent))?;
        if let Some(reason) = no_systemd(&places, self.no_start) {
            let (program, words) = (agent.display(), arguments.join(" "));
            output::print(&format!(
                "{reason}; run this, for good:\n  {program} {words}\n"
            ))?;
            return Ok(ExitCode::SUCCESS);
        }
        systemd::start(systemd::AGENT, is_new)?;
        systemd::start(systemd::SHUTDOWN, false)?;
        output::print("the agent runs; on the control plane, gantry get nodes shows this node\n")?;
        Ok(ExitCode::SUCCESS)
    }
}
