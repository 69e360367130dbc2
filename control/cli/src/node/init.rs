//! `gantry init`: the first machine of a cluster, with a control plane and its own agent.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use gantry_api::kinds::resolve;
use serde_json::Value;

use super::{JOINED, KUBECONFIG, Places, SERVER, host_name, need_root, no_systemd, systemd};
use crate::Global;
use crate::connection::{Session, key};
use crate::failure::Failure;
use crate::output;
use crate::token;

/// What the control plane and the node may take to be there.
const PATIENCE: Duration = Duration::from_secs(60);
/// The first token's life, as kubeadm has it.
const TOKEN_LIFE: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Args, Debug)]
pub(crate) struct Init {
    /// This node's name [default: the host's]
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// Where other machines reach this one [default: the address of the default route]
    #[arg(long, value_name = "ADDRESS")]
    advertise_address: Option<IpAddr>,
    /// Write everything, start nothing, print what to run
    #[arg(long)]
    no_start: bool,
    /// As if this directory were /
    #[arg(long, value_name = "DIR", hide = true)]
    root: Option<PathBuf>,
    /// Flags of this node's gantry-agent run, for example: --agent-flags "--max-pods 250"
    #[arg(
        long,
        value_name = "FLAGS",
        value_delimiter = ' ',
        allow_hyphen_values = true
    )]
    agent_flags: Vec<String>,
    /// Flags of gantry-control, for example: -- --cluster-cidr 10.100.0.0/16
    #[arg(last = true, value_name = "FLAGS")]
    control_flags: Vec<String>,
}

impl Init {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let places = Places::new(self.root.as_deref())?;
        need_root(&places)?;
        if places.at(JOINED).exists() {
            let server = std::fs::read_to_string(places.at(SERVER)).unwrap_or_default();
            return Err(Failure::local(format!(
                "this machine is a node of the cluster at {}: run gantry reset first",
                server.trim()
            )));
        }
        let node = self.node_name.clone().unwrap_or_else(host_name);
        let control_arguments = self.control_arguments(&places, &node);
        let agent_arguments = self.agent_arguments(&node);
        let control = places.program("gantry-control");
        let agent = places.program("gantry-agent");
        let text = systemd::control(&control, &control_arguments);
        let new_control = systemd::write(&places, systemd::CONTROL, &text)?;
        let text = systemd::agent(&agent, &agent_arguments);
        let new_agent = systemd::write(&places, systemd::AGENT, &text)?;
        systemd::write(&places, systemd::SHUTDOWN, &systemd::shutdown(&agent))?;
        let said = match new_control || new_agent {
            true => "wrote the units gantry-control, gantry-agent and gantry-shutdown\n",
            false => {
                "the units gantry-control, gantry-agent and gantry-shutdown are there already\n"
            }
        };
        output::print(said)?;
        if let Some(reason) = no_systemd(&places, self.no_start) {
            let line = |program: &std::path::Path, arguments: &[String]| {
                format!("  {} {}\n", program.display(), arguments.join(" "))
            };
            return output::print(&format!(
                "{reason}; run these two, each for good:\n{}{}then, for the line that the next machine runs:\n  \
                 {} token create --print-join-command\n",
                line(&control, &control_arguments),
                line(&agent, &agent_arguments),
                places.program("gantry").display(),
            ));
        }
        systemd::start(systemd::CONTROL, new_control)?;
        let global = Global {
            kubeconfig: Some(KUBECONFIG.into()),
            ..global.clone()
        };
        let session = open(&global).await?;
        output::print("the control plane runs; gantry finds it by /etc/gantry/admin.kubeconfig\n")?;
        systemd::start(systemd::AGENT, new_agent)?;
        systemd::start(systemd::SHUTDOWN, false)?;
        ready(&session, &node).await?;
        output::print(&format!("node {node} is ready\n"))?;
        let made = token::create(&session, TOKEN_LIFE, 1, "made by gantry init").await?;
        match token::join_line(&session, None, &made).await {
            Ok(line) => output::print(&format!(
                "\nOn the next machine (this line joins one, within 24 hours):\n  {line}\n\
                 For more: gantry token create --uses 20 --print-join-command\n"
            )),
            // The cluster of one machine is complete: another one needs an address first.
            Err(failure) => {
                eprintln!("{failure}");
                Ok(())
            }
        }
    }

    fn agent_arguments(&self, node: &str) -> Vec<String> {
        let mut words = vec!["run".to_owned(), "--node-name".to_owned(), node.to_owned()];
        let flags = self.agent_flags.iter().filter(|word| !word.is_empty());
        words.extend(flags.cloned());
        words
    }

    fn control_arguments(&self, places: &Places, node: &str) -> Vec<String> {
        let agent = places.at("/etc/gantry/agent");
        let mut words = vec![
            "--agent-credentials".to_owned(),
            format!("{}:{node}", agent.display()),
        ];
        if !places.is_machine() {
            for (flag, path) in [
                ("--kubeconfig", KUBECONFIG),
                ("--data-dir", super::CONTROL_DATA),
            ] {
                words.extend([flag.to_owned(), places.at(path).display().to_string()]);
            }
        }
        if let Some(address) = self.advertise_address {
            words.extend(["--advertise-address".to_owned(), address.to_string()]);
        }
        words.extend(self.control_flags.iter().cloned());
        words
    }
}

/// Tries until the control plane answers.
async fn open(global: &Global) -> Result<Session, Failure> {
    let began = Instant::now();
    loop {
        match Session::open(global).await {
            Ok(session) => return Ok(session),
            Err(failure) if began.elapsed() > PATIENCE => {
                return Err(Failure::local(format!(
                    "the control plane does not answer after {} s ({failure}); see: journalctl -u \
                     gantry-control -n 50",
                    PATIENCE.as_secs()
                )));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

async fn ready(session: &Session, node: &str) -> Result<(), Failure> {
    let kind = resolve("nodes").ok_or_else(|| Failure::local("this version knows no nodes"))?;
    let began = Instant::now();
    loop {
        let found = session.find(key(kind, "", node)).await?.unwrap_or_default();
        let conditions = found
            .pointer("/status/conditions")
            .and_then(Value::as_array);
        let mut conditions = conditions.into_iter().flatten();
        if conditions.any(|one| one["type"] == "Ready" && one["status"] == "True") {
            return Ok(());
        }
        if began.elapsed() > PATIENCE {
            return Err(Failure::local(format!(
                "node {node} is not ready after {} s; see: journalctl -u gantry-agent -n 50, and what this \
                 machine lacks: gantry-agent check",
                PATIENCE.as_secs()
            )));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
