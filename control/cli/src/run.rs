//! `gantry run`: one pod from the command line, and a way into it.

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::logs;
use crate::streams::StreamArgs;
use clap::Args;
use gantry_api::kinds::resolve;
use gantry_api::proto::{DeleteRequest, ExecExit, WriteRequest};
use serde_json::{Value, json};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Between two looks at a pod that is starting or ending.
const PAUSE: Duration = Duration::from_millis(200);
/// A container's end is in the pod's status soon after it.
const END_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Args, Debug)]
pub(crate) struct Run {
    /// The pod's name
    name: String,
    /// The image
    #[arg(long)]
    image: String,
    /// NAME=VALUE, as often as you like
    #[arg(long)]
    env: Vec<String>,
    /// Labels: a=b,c=d (run=NAME unless given)
    #[arg(short, long)]
    labels: Option<String>,
    /// A port that the container listens on
    #[arg(long)]
    port: Option<u16>,
    /// When to start the container again
    #[arg(long, default_value = "Always", value_parser = ["Always", "OnFailure", "Never"])]
    restart: String,
    /// Whether the image is pulled when it is here already
    #[arg(long, value_parser = ["Always", "IfNotPresent", "Never"])]
    image_pull_policy: Option<String>,
    /// Delete the pod when it has ended; needs -i or --attach
    #[arg(long)]
    rm: bool,
    #[command(flatten)]
    streams: StreamArgs,
    /// Wait for the pod and attach (with -i it is the default)
    #[arg(long)]
    attach: bool,
    /// The words after -- replace the image's entrypoint, and not only its arguments
    #[arg(long)]
    command: bool,
    /// How long to wait for the pod to run
    #[arg(long, default_value = "60s", value_parser = crate::names::duration)]
    pod_running_timeout: Duration,
    /// Arguments, or with --command the command
    #[arg(last = true)]
    words: Vec<String>,
}

fn phase(pod: &Value) -> &str {
    pod.pointer("/status/phase")
        .and_then(Value::as_str)
        .unwrap_or_default()
}

impl Run {
    fn pod(&self) -> Result<Value, Failure> {
        let mut container = json!({"name": self.name, "image": self.image});
        let env: Result<Vec<Value>, Failure> = self
            .env
            .iter()
            .map(|word| {
                let (name, value) = word
                    .split_once('=')
                    .ok_or_else(|| Failure::Local(format!("--env {word:?}: write NAME=VALUE")))?;
                Ok(json!({"name": name, "value": value}))
            })
            .collect();
        let env = env?;
        let mut set = |name: &str, value: Value| container[name] = value;
        if !env.is_empty() {
            set("env", env.into());
        }
        if let Some(port) = self.port {
            set("ports", json!([{"containerPort": port}]));
        }
        if let Some(policy) = &self.image_pull_policy {
            set("imagePullPolicy", json!(policy));
        }
        if !self.words.is_empty() {
            set(
                if self.command { "command" } else { "args" },
                json!(self.words),
            );
        }
        if self.streams.stdin {
            set("stdin", json!(true));
            set("stdinOnce", json!(true));
        }
        if self.streams.tty {
            set("tty", json!(true));
        }
        let mut labels = serde_json::Map::new();
        match &self.labels {
            None => {
                labels.insert("run".into(), json!(self.name));
            }
            Some(text) => {
                for word in text.split(',').filter(|word| !word.is_empty()) {
                    let (name, value) = word.split_once('=').ok_or_else(|| {
                        Failure::Local(format!("--labels {word:?}: write name=value"))
                    })?;
                    labels.insert(name.into(), json!(value));
                }
            }
        }
        Ok(json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.name, "labels": labels},
            "spec": {"restartPolicy": self.restart, "containers": [container]},
        }))
    }

    pub(crate) async fn run(&self, global: &Global) -> Result<ExitCode, Failure> {
        let attach = self.attach || self.streams.stdin;
        if self.rm && !attach {
            return Err(Failure::local(
                "--rm should only be used for attached containers",
            ));
        }
        if self.streams.tty && !self.streams.stdin {
            return Err(Failure::local(
                "-i/--stdin is required for containers with -t/--tty=true",
            ));
        }
        let kind =
            resolve("pods").ok_or_else(|| Failure::local("this build does not know pods"))?;
        let session = Session::open(global).await?;
        let request = WriteRequest {
            key: Some(session.key(kind, &self.name)),
            json: self.pod()?.to_string().into(),
            strict: true,
            field_manager: "gantry".to_owned(),
            ..WriteRequest::default()
        };
        let reply = session
            .objects
            .clone()
            .create(session.request(request))
            .await?;
        crate::connection::warn(reply.get_ref());
        if !attach {
            println!("pod/{} created", self.name);
            return Ok(ExitCode::SUCCESS);
        }
        let result = self.attached(&session).await;
        if self.rm {
            let request = DeleteRequest {
                key: Some(session.key(kind, &self.name)),
                ..DeleteRequest::default()
            };
            session.delete(request).await?;
            if !self.streams.quiet {
                println!("pod {:?} deleted", self.name);
            }
        }
        let exit = result?;
        if !exit.message.is_empty() {
            return Err(Failure::Local(exit.message));
        }
        Ok(crate::streams::code(&exit))
    }

    async fn attached(&self, session: &Session) -> Result<ExecExit, Failure> {
        let pod = self
            .wait(session, self.pod_running_timeout, |pod| {
                !matches!(phase(pod), "" | "Pending")
            })
            .await?;
        let attached = self.streams.attach(session, &pod, Some(&self.name)).await;
        match attached {
            Ok(exit) => Ok(exit),
            // Faster than we were: what it wrote is in its log, its code in its status.
            Err(failure) => {
                let ended = |pod: &Value| {
                    let state = pod.pointer("/status/containerStatuses/0");
                    let at = |path: &str| state.and_then(|s| s.pointer(path)).cloned();
                    at("/state/terminated").or_else(|| at("/lastState/terminated"))
                };
                let pod = self
                    .wait(session, END_TIMEOUT, |pod| ended(pod).is_some())
                    .await
                    .map_err(|_| failure)?;
                logs::print(session, &pod, &self.name).await?;
                let code = ended(&pod).and_then(|state| state["exitCode"].as_i64());
                Ok(ExecExit {
                    code: code.and_then(|code| i32::try_from(code).ok()).unwrap_or(1),
                    message: String::new(),
                })
            }
        }
    }

    async fn wait(
        &self,
        session: &Session,
        timeout: Duration,
        is_it: impl Fn(&Value) -> bool,
    ) -> Result<Value, Failure> {
        let kind =
            resolve("pods").ok_or_else(|| Failure::local("this build does not know pods"))?;
        let began = Instant::now();
        loop {
            let pod = session.get(session.key(kind, &self.name)).await?;
            if is_it(&pod) {
                return Ok(pod);
            }
            if began.elapsed() > timeout {
                let waiting = pod
                    .pointer("/status/containerStatuses/0/state/waiting/message")
                    .and_then(Value::as_str)
                    .unwrap_or("see its events");
                return Err(Failure::Local(format!(
                    "timed out waiting for pod {}: it is {} ({waiting})",
                    self.name,
                    phase(&pod)
                )));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: Run,
    }

    #[test]
    fn the_pod_is_what_kubectl_would_make() {
        let line = "run x --image=i --env=A=b=c --port=80 --restart=Never -it --rm -- sh -c 1";
        let run = Line::try_parse_from(line.split(' ')).unwrap().run;
        assert_eq!(
            run.pod().unwrap(),
            json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": "x", "labels": {"run": "x"}},
                "spec": {"restartPolicy": "Never", "containers": [{
                    "name": "x", "image": "i", "env": [{"name": "A", "value": "b=c"}],
                    "ports": [{"containerPort": 80}], "args": ["sh", "-c", "1"],
                    "stdin": true, "stdinOnce": true, "tty": true}]}})
        );
        let run = Line::try_parse_from("run x --image=i --env=A -- y".split(' '))
            .unwrap()
            .run;
        assert!(run.pod().is_err());
        let line = "run x --image=i --labels=a=b,c= --command -- y";
        let pod = Line::try_parse_from(line.split(' '))
            .unwrap()
            .run
            .pod()
            .unwrap();
        assert_eq!(pod["metadata"]["labels"], json!({"a": "b", "c": ""}));
        assert_eq!(pod["spec"]["containers"][0]["command"], json!(["y"]));
    }
}
