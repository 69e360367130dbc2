//! `gantry logs`: what a container wrote, through the agent's own connection.

use crate::Global;
use crate::connection::{Session, key};
use crate::failure::Failure;
use crate::names;
use clap::Args;
use gantry_api::kinds::{Kind, resolve};
use gantry_api::proto::{ListRequest, LogsRequest};
use gantry_api::selector::Selector;
use serde_json::Value;
use std::io::Write as _;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;

/// Lines per container with `-l`, as kubectl has it.
const SELECTOR_TAIL_LINES: i64 = 10;

#[derive(Args, Debug)]
pub(crate) struct Logs {
    /// A pod, or type/name (deploy/web), and optionally a container
    words: Vec<String>,
    /// Go on with what is written
    #[arg(short, long)]
    follow: bool,
    /// Container
    #[arg(short, long)]
    container: Option<String>,
    /// All containers
    #[arg(long)]
    all_containers: bool,
    /// The container's run before this one
    #[arg(short, long)]
    previous: bool,
    /// Only the last lines (-1: all)
    #[arg(long, allow_negative_numbers = true)]
    tail: Option<i64>,
    /// Only what is younger than this
    #[arg(long, value_parser = names::duration)]
    since: Option<Duration>,
    /// Only what was written after this time (RFC 3339)
    #[arg(long, default_value = "", hide_default_value = true)]
    since_time: String,
    /// Time in front of every line
    #[arg(long)]
    timestamps: bool,
    /// At most this many bytes
    #[arg(long)]
    limit_bytes: Option<i64>,
    /// Label selector: all its pods
    #[arg(short = 'l', long)]
    selector: Option<String>,
    /// Pod and container in front of every line
    #[arg(long)]
    prefix: bool,
    /// Streams at a time with -l -f
    #[arg(long, default_value_t = 5)]
    max_log_requests: usize,
}

fn pod_kind() -> Result<&'static Kind, Failure> {
    resolve("pods").ok_or_else(|| Failure::local("this build does not know pods"))
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// Names of the containers of a pod, init containers last.
fn containers(pod: &Value) -> Vec<&str> {
    [
        "/spec/containers",
        "/spec/initContainers",
        "/spec/ephemeralContainers",
    ]
    .iter()
    .filter_map(|list| pod.pointer(list).and_then(Value::as_array))
    .flatten()
    .map(|c| text(c, "/name"))
    .collect()
}

/// The container that is meant when none is named; says so where there is a choice.
pub(crate) fn default_container(pod: &Value) -> String {
    let annotation = pod
        .pointer("/metadata/annotations")
        .and_then(|a| a.get("kubectl.kubernetes.io/default-container"))
        .and_then(Value::as_str);
    let all = containers(pod);
    if let Some(name) = annotation.filter(|name| all.contains(name)) {
        return name.to_owned();
    }
    let first = all.first().copied().unwrap_or_default();
    if all.len() > 1 {
        eprintln!("Defaulted container {first:?} out of: {}", all.join(", "));
    }
    first.to_owned()
}

/// The pod that is meant: by name, or one of a Deployment, ReplicaSet or Service.
pub(crate) async fn resolve_pod(
    session: &Session,
    kind: &'static Kind,
    name: &str,
) -> Result<Value, Failure> {
    let owner = session.get(session.key(kind, name)).await?;
    let selector = match kind.kind {
        "Pod" => return Ok(owner),
        "Deployment" | "ReplicaSet" => owner
            .pointer("/spec/selector")
            .and_then(|s| serde_json::from_value(s.clone()).ok())
            .and_then(|s| Selector::from_api(&s).ok()),
        "Service" => owner
            .pointer("/spec/selector")
            .and_then(|s| serde_json::from_value(s.clone()).ok())
            .map(|labels| Selector::from_map(&labels)),
        _ => {
            let text = format!("cannot find pods of {}", kind.qualified_resource());
            return Err(Failure::Local(text));
        }
    };
    let selector = selector
        .filter(|s| !s.is_empty())
        .ok_or_else(|| Failure::local(format!("{}/{name} selects no pods", kind.singular)))?;
    let mut pods = select(session, &selector.to_string()).await?;
    // A pod that works first, then the oldest, so that a repeated call names the same one.
    pods.sort_by_key(|pod| {
        let deleted = pod.pointer("/metadata/deletionTimestamp").is_some();
        let running = text(pod, "/status/phase") == "Running";
        (
            deleted,
            !running,
            text(pod, "/metadata/creationTimestamp").to_owned(),
        )
    });
    let count = pods.len();
    let Some(pod) = pods.into_iter().next() else {
        return Err(Failure::local(format!(
            "no pods found for {}/{name}",
            kind.singular
        )));
    };
    if count > 1 {
        eprintln!(
            "Found {count} pods, using pod/{}",
            text(&pod, "/metadata/name")
        );
    }
    Ok(pod)
}

async fn select(session: &Session, selector: &str) -> Result<Vec<Value>, Failure> {
    let request = ListRequest {
        key: Some(key(pod_kind()?, &session.namespace, "")),
        label_selector: selector.to_owned(),
        ..ListRequest::default()
    };
    Ok(session.list(request).await?.0)
}

/// One stream to read.
struct Source {
    request: LogsRequest,
    prefix: String,
}

impl Logs {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        let session = Session::open(global).await?;
        let sources = self.sources(&session).await?;
        if sources.is_empty() {
            eprintln!("No resources found in {} namespace.", session.namespace);
            return Ok(());
        }
        if !self.follow {
            for source in sources {
                copy(&session, source).await?;
            }
            return Ok(());
        }
        if sources.len() > self.max_log_requests {
            return Err(Failure::local(format!(
                "you are attempting to follow {} log streams, but maximum allowed concurrency is \
                 {}, use --max-log-requests to increase the limit",
                sources.len(),
                self.max_log_requests
            )));
        }
        let session = std::sync::Arc::new(session);
        let mut tasks = JoinSet::new();
        for source in sources {
            let session = std::sync::Arc::clone(&session);
            tasks.spawn(async move { copy(&session, source).await });
        }
        while let Some(result) = tasks.join_next().await {
            result.map_err(|e| Failure::local(format!("a log reader failed: {e}")))??;
        }
        Ok(())
    }

    async fn sources(&self, session: &Session) -> Result<Vec<Source>, Failure> {
        let mut words = self.words.clone();
        let mut container = self.container.clone();
        // `logs web nginx` names the container second.
        if words.len() == 2 && !words[1].contains('/') && resolve(&words[0]).is_none() {
            container = container.or(words.pop());
        }
        let pods = match &self.selector {
            Some(selector) if words.is_empty() => select(session, selector).await?,
            Some(_) => {
                let text = "only a selector (-l) or a POD name is allowed";
                return Err(Failure::local(text));
            }
            None => {
                let (kind, name) = names::one(&words, Some(pod_kind()?))?;
                vec![resolve_pod(session, kind, &name).await?]
            }
        };
        let mut sources = Vec::new();
        for pod in &pods {
            let names = match &container {
                Some(name) => vec![name.clone()],
                None if self.all_containers => {
                    containers(pod).into_iter().map(str::to_owned).collect()
                }
                None => vec![default_container(pod)],
            };
            for name in names {
                if !containers(pod).contains(&name.as_str()) {
                    let pod = text(pod, "/metadata/name");
                    let text = format!("container {name} is not valid for pod {pod}");
                    return Err(Failure::Local(text));
                }
                sources.push(self.source(pod, name));
            }
        }
        Ok(sources)
    }

    fn source(&self, pod: &Value, container: String) -> Source {
        let name = text(pod, "/metadata/name");
        let by_selector = self.selector.is_some().then_some(SELECTOR_TAIL_LINES);
        let prefix = if self.prefix {
            format!("[pod/{name}/{container}] ")
        } else {
            String::new()
        };
        Source {
            request: LogsRequest {
                namespace: text(pod, "/metadata/namespace").to_owned(),
                pod: name.to_owned(),
                container,
                follow: self.follow,
                previous: self.previous,
                timestamps: self.timestamps,
                tail_lines: self.tail.or(by_selector).filter(|lines| *lines >= 0),
                since_s: self
                    .since
                    .map(|s| i64::try_from(s.as_secs()).unwrap_or(i64::MAX)),
                since_time: self.since_time.clone(),
                limit_bytes: self.limit_bytes,
            },
            prefix,
        }
    }
}

/// Prints the whole log of one container.
pub(crate) async fn print(session: &Session, pod: &Value, container: &str) -> Result<(), Failure> {
    let request = LogsRequest {
        namespace: text(pod, "/metadata/namespace").to_owned(),
        pod: text(pod, "/metadata/name").to_owned(),
        container: container.to_owned(),
        ..LogsRequest::default()
    };
    let prefix = String::new();
    copy(session, Source { request, prefix }).await
}

async fn copy(session: &Session, source: Source) -> Result<(), Failure> {
    let mut stream = session
        .pods
        .clone()
        .logs(source.request)
        .await?
        .into_inner();
    let mut at_line_start = true;
    while let Some(chunk) = stream.next().await {
        let data = chunk?.data;
        let mut out = std::io::stdout().lock();
        if source.prefix.is_empty() {
            out.write_all(&data)?;
        } else {
            for line in data.split_inclusive(|b| *b == b'\n') {
                if at_line_start {
                    out.write_all(source.prefix.as_bytes())?;
                }
                out.write_all(line)?;
                at_line_start = line.ends_with(b"\n");
            }
        }
        out.flush()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_default_container_is_the_annotated_one_or_the_first() {
        let mut pod = json!({"metadata": {"annotations": {}},
            "spec": {"initContainers": [{"name": "i"}], "containers": [{"name": "a"}, {"name": "b"}]}});
        assert_eq!(containers(&pod), ["a", "b", "i"]);
        assert_eq!(default_container(&pod), "a");
        let key = "kubectl.kubernetes.io/default-container";
        pod["metadata"]["annotations"][key] = json!("b");
        assert_eq!(default_container(&pod), "b");
        pod["metadata"]["annotations"][key] = json!("missing");
        assert_eq!(default_container(&pod), "a");
    }
}
