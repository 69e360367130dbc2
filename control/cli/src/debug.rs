//! `gantry debug`: one more container in a running pod, to look around with.
//!
//! ```text
//! patch pods/NAME/ephemeralcontainers ─► wait until it runs (or has ended) ─► attach
//! ```

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::logs;
use crate::streams::{PodArgs, StreamArgs};
use clap::Args;
use gantry_api::kinds::resolve;
use gantry_api::proto::patch_request::Type;
use serde_json::{Value, json};
use std::process::ExitCode;
use std::time::Duration;

/// Letters that cannot be mistaken for each other, as the server's suffixes.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LENGTH: usize = 5;
/// Between two looks at the pod.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Args, Debug)]
pub(crate) struct Debug {
    #[command(flatten)]
    pod: PodArgs,
    /// Image of the debug container
    #[arg(long)]
    image: String,
    /// Name of the debug container; generated when absent
    #[arg(short, long)]
    container: Option<String>,
    /// See the processes of this container
    #[arg(long)]
    target: Option<String>,
    /// Always, IfNotPresent or Never
    #[arg(long)]
    image_pull_policy: Option<String>,
    /// Environment variables: NAME=VALUE
    #[arg(long)]
    env: Vec<String>,
    #[command(flatten)]
    streams: StreamArgs,
    /// Command and arguments instead of the image's
    #[arg(last = true)]
    command: Vec<String>,
}

impl Debug {
    pub(crate) async fn run(&self, global: &Global) -> Result<ExitCode, Failure> {
        let (session, pod) = self.pod.find(global).await?;
        let text = |pointer: &str| {
            let value = pod.pointer(pointer).and_then(Value::as_str);
            value.unwrap_or_default().to_owned()
        };
        let phase = text("/status/phase");
        if matches!(phase.as_str(), "Succeeded" | "Failed") {
            let text = format!("cannot debug a completed pod; current phase is {phase}");
            return Err(Failure::Local(text));
        }
        let container = self.container.clone().unwrap_or_else(generated);
        if self.container.is_none() && !self.streams.quiet {
            eprintln!("Defaulting debug container name to {container}.");
        }
        let patch = json!({"spec": {"ephemeralContainers": [self.spec(&container)?]}});
        let pods = resolve("pods").ok_or_else(|| Failure::local("this build knows no pods"))?;
        let at = session.key(pods, &text("/metadata/name"));
        session
            .patch_part(at.clone(), Type::Strategic, &patch, "ephemeralcontainers")
            .await?;
        let pod = loop {
            let pod = session.get(at.clone()).await?;
            if self.has_begun(&pod, &container)? {
                break pod;
            }
            tokio::time::sleep(PAUSE).await;
        };
        self.connect(&session, &pod, &container).await
    }

    fn spec(&self, container: &str) -> Result<Value, Failure> {
        let mut env = Vec::new();
        for one in &self.env {
            let (name, value) = one
                .split_once('=')
                .ok_or_else(|| Failure::Local(format!("--env {one:?}: want NAME=VALUE")))?;
            env.push(json!({"name": name, "value": value}));
        }
        let mut spec = json!({"name": container, "image": self.image});
        for (field, value) in [
            ("env", json!(env)),
            ("command", json!(self.command)),
            ("targetContainerName", json!(self.target)),
            ("imagePullPolicy", json!(self.image_pull_policy)),
            ("stdin", json!(self.streams.stdin)),
            ("tty", json!(self.streams.tty)),
        ] {
            let empty = [Value::Null, json!([]), json!(false)].contains(&value);
            if !empty {
                spec[field] = value;
            }
        }
        Ok(spec)
    }

    /// Whether it runs or has ended; an error when its image or configuration stands in the way.
    fn has_begun(&self, pod: &Value, container: &str) -> Result<bool, Failure> {
        let all = pod.pointer("/status/ephemeralContainerStatuses");
        let mut all = all.and_then(Value::as_array).into_iter().flatten();
        let Some(status) = all.find(|s| s["name"] == container) else {
            return Ok(false);
        };
        let state = &status["state"];
        if state.get("running").is_some() || state.get("terminated").is_some() {
            return Ok(true);
        }
        let reason = state["waiting"]["reason"].as_str().unwrap_or_default();
        if matches!(
            reason,
            "ErrImageNeverPull"
                | "ImagePullBackOff"
                | "InvalidImageName"
                | "CreateContainerConfigError"
                | "RunContainerError"
        ) {
            let message = state["waiting"]["message"].as_str().unwrap_or_default();
            return Err(Failure::Local(format!(
                "debug container {container} does not start: {reason}: {message}"
            )));
        }
        Ok(false)
    }

    /// With -i or -t its streams are the user's until it ends.
    async fn connect(
        &self,
        session: &Session,
        pod: &Value,
        container: &str,
    ) -> Result<ExitCode, Failure> {
        if !self.streams.stdin && !self.streams.tty {
            return Ok(ExitCode::SUCCESS);
        }
        match self.streams.attach(session, pod, Some(container)).await {
            Ok(exit) if exit.message.is_empty() => Ok(ExitCode::SUCCESS),
            Ok(exit) => Err(Failure::Local(exit.message)),
            // Faster than we were: what it wrote is in its log.
            Err(failure) => {
                let kind = resolve("pods").ok_or_else(|| Failure::local("no pods"))?;
                let name = pod["metadata"]["name"].as_str().unwrap_or_default();
                let pod = session.get(session.key(kind, name)).await?;
                if !has_ended(&pod, container) {
                    return Err(failure);
                }
                logs::print(session, &pod, container).await?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

fn has_ended(pod: &Value, container: &str) -> bool {
    let all = pod["status"]["ephemeralContainerStatuses"].as_array();
    let mut all = all.into_iter().flatten();
    all.any(|s| s["name"] == container && s["state"].get("terminated").is_some())
}

fn generated() -> String {
    let mut random = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos()) as usize;
    let mut suffix = String::new();
    for _ in 0..SUFFIX_LENGTH {
        suffix.push(char::from(ALPHABET[random % ALPHABET.len()]));
        random /= ALPHABET.len();
    }
    format!("debugger-{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        debug: Debug,
    }

    #[test]
    fn only_what_was_asked_for_is_in_the_container() {
        let line = "debug web --image=busybox --target=main --env=A=b=c -i -- sh";
        let debug = Line::try_parse_from(line.split(' ')).unwrap().debug;
        let wanted = json!({"name": "d", "image": "busybox", "targetContainerName": "main",
            "env": [{"name": "A", "value": "b=c"}], "command": ["sh"], "stdin": true});
        assert_eq!(debug.spec("d").ok(), Some(wanted));
        assert!(generated().starts_with("debugger-"));
    }
}
