//! `gantry`: kubectl's verbs against a Gantry control plane.
//!
//! ```text
//! arguments ─► verb (one file each) ─► connection (kubeconfig, mTLS) ─► gRPC ─► output
//! ```
//! Messages, columns and exit codes are kubectl's: 0 done, 1 failed; `exec` exits with the
//! command's own code. Output goes to stdout, everything about it to stderr; no colours.

#![forbid(unsafe_code)]

mod apply;
mod attach;
mod auth;
mod autoscale;
mod backup;
mod connection;
mod cordon;
mod cp;
mod create;
mod debug;
mod delete;
mod describe;
mod drain;
mod events;
mod exec;
mod explain;
mod failure;
mod files;
mod flows;
mod get;
mod images;
mod kubeconfig;
mod logs;
mod names;
mod node;
mod output;
mod port_forward;
mod rollout;
mod run;
mod scale;
mod store;
mod streams;
mod svc;
mod token;
mod top;
mod version;
mod wait;

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "gantry",
    version,
    about = "Controls a Gantry cluster with kubectl's verbs"
)]
struct Command {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// Flags that every verb takes.
#[derive(Args, Debug, Default, Clone)]
struct Global {
    /// Namespace of the request
    #[arg(short, long, global = true)]
    namespace: Option<String>,
    /// Path of the kubeconfig file
    #[arg(long, global = true)]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig to use
    #[arg(long, global = true)]
    context: Option<String>,
    /// Give up on a single request after this long (1s, 2m; 0: never)
    #[arg(long, global = true, default_value = "0", value_parser = names::duration)]
    request_timeout: std::time::Duration,
    /// Ask as this user (needs the verb impersonate on it)
    #[arg(long = "as", global = true, value_name = "USER")]
    as_user: Option<String>,
    /// Ask as a member of this group too; may be repeated
    #[arg(long = "as-group", global = true, value_name = "GROUP")]
    as_groups: Vec<String>,
}

impl Global {
    /// As whom the server is to be asked.
    fn impersonated(&self) -> Option<kubeconfig::Impersonated> {
        let user = self.as_user.clone().filter(|user| !user.is_empty())?;
        let groups = self.as_groups.clone();
        Some(kubeconfig::Impersonated { user, groups })
    }

    fn check(&self) -> Result<(), failure::Failure> {
        if !self.as_groups.is_empty() && self.impersonated().is_none() {
            return Err(failure::Failure::local(
                "--as-group alone is nobody: name the user with --as too",
            ));
        }
        Ok(())
    }
}

#[derive(Subcommand)]
enum Verb {
    /// Create or change objects from files, as often as you like
    Apply(apply::Apply),
    /// Create objects from files
    Create(create::Create),
    /// Show objects
    Get(get::Get),
    /// Show one object in detail, with its events
    Describe(describe::Describe),
    /// Delete objects
    Delete(delete::Delete),
    /// Print the logs of a container
    Logs(logs::Logs),
    /// Run a command in a container
    Exec(exec::Exec),
    /// Look around in a running pod with a container of its own
    Debug(debug::Debug),
    /// Connect to a container's own process
    Attach(attach::Attach),
    /// Run one pod of an image
    Run(run::Run),
    /// Copy files to and from a container
    Cp(cp::Cp),
    /// Forward local ports to a pod
    #[command(name = "port-forward")]
    PortForward(port_forward::PortForward),
    /// Set the number of replicas
    Scale(scale::Scale),
    /// Let the number of replicas follow what pods use
    Autoscale(autoscale::Autoscale),
    /// Make this machine the first of a cluster
    Init(node::Init),
    /// Make this machine a node of a cluster
    Join(node::Join),
    /// Remove everything of Gantry from this machine
    Reset(node::Reset),
    /// Tokens with which machines join the cluster
    #[command(subcommand)]
    Token(token::Token),
    /// Everything that the control plane holds, in one file, and back
    #[command(subcommand)]
    Backup(backup::Backup),
    /// The control plane's store: look into it, compact it, change its key
    #[command(subcommand)]
    Store(store::Store),
    /// Give nodes no new pods
    Cordon(cordon::Cordon),
    /// Give nodes new pods again
    Uncordon(cordon::Uncordon),
    /// Cordon nodes and move their pods elsewhere
    Drain(drain::Drain),
    /// The images on nodes: list, pull, import, remove
    Images(images::Images),
    /// Show what nodes and pods use now
    #[command(subcommand)]
    Top(top::Top),
    /// Services as nodes have them programmed
    #[command(subcommand)]
    Svc(svc::Svc),
    /// What happens to connections on the nodes: who, to whom, verdict
    Flows(flows::Flows),
    /// Say what would happen, and why
    #[command(subcommand)]
    Explain(explain::Explain),
    /// Follow or restart a rollout
    #[command(subcommand)]
    Rollout(rollout::Rollout),
    /// List events, oldest first
    Events(events::Events),
    /// Wait until objects have a condition
    Wait(wait::Wait),
    /// Say who the caller is, and what they may do
    #[command(subcommand)]
    Auth(auth::Auth),
    /// List the kinds that the server knows
    #[command(name = "api-resources")]
    ApiResources,
    /// Print versions
    Version(version::Version),
}

fn main() -> ExitCode {
    // As other tools do: a closed pipe (`gantry get pods | head`) shows up as a write error, which
    // `output` turns into a quiet exit.
    let command = match Command::try_parse() {
        Ok(command) => command,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    // Already installed is as good as installed now.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(run(command));
    // A reader of stdin may still be blocked: do not wait for it.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

async fn run(command: Command) -> Result<ExitCode, failure::Failure> {
    let global = command.global;
    global.check()?;
    let done = |()| ExitCode::SUCCESS;
    match command.verb {
        Verb::Apply(verb) => verb.run(&global).await.map(done),
        Verb::Create(verb) => verb.run(&global).await.map(done),
        Verb::Get(verb) => verb.run(&global).await.map(done),
        Verb::Describe(verb) => verb.run(&global).await.map(done),
        Verb::Delete(verb) => verb.run(&global).await.map(done),
        Verb::Logs(verb) => verb.run(&global).await.map(done),
        Verb::Exec(verb) => verb.run(&global).await,
        Verb::Debug(verb) => verb.run(&global).await,
        Verb::Attach(verb) => verb.run(&global).await,
        Verb::Run(verb) => verb.run(&global).await,
        Verb::Cp(verb) => verb.run(&global).await.map(done),
        Verb::PortForward(verb) => verb.run(&global).await.map(done),
        Verb::Scale(verb) => verb.run(&global).await.map(done),
        Verb::Autoscale(verb) => verb.run(&global).await.map(done),
        Verb::Init(verb) => verb.run(&global).await.map(done),
        Verb::Join(verb) => verb.run(),
        Verb::Reset(verb) => verb.run().map(done),
        Verb::Token(verb) => verb.run(&global).await.map(done),
        Verb::Backup(verb) => verb.run(&global).await.map(done),
        Verb::Store(verb) => verb.run(&global).await.map(done),
        Verb::Cordon(verb) => verb.run(&global).await.map(done),
        Verb::Uncordon(verb) => verb.run(&global).await.map(done),
        Verb::Drain(verb) => verb.run(&global).await.map(done),
        Verb::Images(verb) => verb.run(&global).await,
        Verb::Svc(verb) => verb.run(&global).await.map(done),
        Verb::Flows(verb) => verb.run(&global).await.map(done),
        Verb::Explain(verb) => verb.run(&global).await,
        Verb::Top(verb) => verb.run(&global).await.map(done),
        Verb::Rollout(verb) => verb.run(&global).await.map(done),
        Verb::Events(verb) => verb.run(&global).await.map(done),
        Verb::Wait(verb) => verb.run(&global).await.map(done),
        Verb::Auth(verb) => verb.run(&global).await,
        Verb::ApiResources => version::api_resources(&global).await.map(done),
        Verb::Version(verb) => verb.run(&global).await.map(done),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Command::command().debug_assert();
    }

    #[test]
    fn kubectls_usual_lines_parse() {
        for line in [
            "get pods -A -o wide",
            "get po,svc -l app=web -n shop --show-labels",
            "get all",
            "get pod/web -o yaml -w",
            "get events --field-selector involvedObject.name=web --sort-by=.lastTimestamp",
            "apply -f web.yaml -f - --dry-run=server --validate=warn",
            "create -f web.yaml",
            "create token ci -n shop --duration 20m --audience vault -o json",
            "delete pod web --grace-period=0 --force",
            "delete pods --all --now --wait=false",
            "delete -f web.yaml --ignore-not-found --timeout=30s",
            "describe pod web",
            "describe nodes",
            "logs -f deploy/web -c nginx --tail=10 --since=5m --timestamps",
            "logs web -p",
            "exec -it web -- sh -c 'exit 3'",
            "exec deploy/web -c nginx -- ls -l",
            "debug -it web --image=busybox --target=main",
            "debug web --image=busybox -c d -- sh -c ls",
            "attach -it web -c nginx",
            "run web --image=nginx --port=80",
            "run -it --rm shell --image=busybox --restart=Never -- sh -c 'exit 3'",
            "cp web:/etc/passwd ./passwd -c nginx",
            "cp . shop/web:/srv --no-preserve",
            "port-forward svc/web 8080:80 :443 --address 0.0.0.0",
            "scale deploy/web --replicas=3 --current-replicas=2",
            "top pods -A --containers --sort-by=cpu -o wide",
            "top node node-1",
            "token create --ttl 2h --uses 20 --description rack --print-join-command",
            "token list",
            "init --advertise-address 192.0.2.1 --no-start -- --cluster-cidr 10.9.0.0/16",
            "join 192.0.2.1:6443 --token abcdef.0123456789abcdef --ca-hash sha256:00 --node-name a",
            "reset --force",
            "token delete abcdef ghijkl.0123456789abcdef",
            "cordon node-1 node-2",
            "uncordon -l rack=7",
            "drain node-1 --ignore-daemonsets --delete-emptydir-data --force --timeout=5m --grace-period=10",
            "backup save /backups/today",
            "backup save /backups/today --in-clear",
            "backup restore /backups/today --data-dir /srv/control --store-key k --backup-key l",
            "store get /registry/pods/ --keys-only",
            "store get",
            "store status",
            "store compact",
            "store rotate-key",
            "svc drops --node n --all",
            "flows -f -A",
            "explain connect shop/client web.shop:http --udp -o json",
            "flows -n shop --pod web --verdict dropped,refused --last 20 -o json --node n",
            "images",
            "images --node n -o wide --no-headers",
            "images ls --node n",
            "images pull nginx:1 --node a --node b --secret s",
            "images import web.tar",
            "images rm web:1 web:2",
            "images prune",
            "images pin web:1 --off",
            "rollout status deploy/web --timeout=60s",
            "rollout restart deployment web",
            "rollout history deploy/web",
            "events --for pod/web -A -w",
            "wait --for=condition=Ready pod/web --timeout=60s",
            "wait --for=delete pod -l app=web",
            "auth can-i list pods -n shop",
            "auth can-i get deploy/web --as jane --as-group dev -q",
            "auth can-i create pods --subresource=exec -A",
            "get pods --as jane --as-group dev --as-group ops",
            "--as system:serviceaccount:shop:robot exec web -- sh --as nobody",
            "auth can-i --list -n shop",
            "auth whoami",
            "api-resources",
            "version --client",
            "-n shop get pods --kubeconfig /tmp/x --context y",
        ] {
            let words = std::iter::once("gantry").chain(line.split(' '));
            assert!(Command::try_parse_from(words).is_ok(), "{line}");
        }
    }

    #[test]
    fn groups_alone_are_nobody() {
        let read = |line: &str| {
            let words = std::iter::once("gantry").chain(line.split(' '));
            Command::try_parse_from(words).unwrap().global
        };
        let global = read("get pods --as jane --as-group dev");
        global.check().unwrap();
        assert_eq!(global.impersonated().unwrap().groups, ["dev"]);
        read("get pods").check().unwrap();
        assert!(read("get pods --as-group dev").check().is_err());
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "get",
            "scale deploy/web",
            "exec web",
            "wait pod/web",
            "frobnicate",
        ] {
            let words = std::iter::once("gantry").chain(line.split(' '));
            assert!(Command::try_parse_from(words).is_err(), "{line}");
        }
    }
}
