//! The API as a program uses it: one gRPC connection, creates and deletes, a watch.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use gantry_api::proto::objects_client::ObjectsClient;
use gantry_api::proto::pods_client::PodsClient;
use gantry_api::proto::watch_event::Type;
use gantry_api::proto::{
    DeleteRequest, ExecInput, ExecStart, ListRequest, ObjectKey, WatchRequest, WriteRequest,
    exec_input, exec_output,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::cluster::KUBECONFIG;

/// Where the benchmarks' pods are.
pub(super) const NAMESPACE: &str = "bench";
/// The image of every pod.
const IMAGE: &str = "gantry.local/busybox:debian";
/// No single change takes longer on a machine that works.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection with the administrator's credentials.
#[derive(Clone)]
pub(super) struct Api {
    objects: ObjectsClient<Channel>,
    pods: PodsClient<Channel>,
}

/// What a watch of pods has said.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) at: Instant,
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) bound: bool,
    pub(super) running: bool,
    pub(super) ip: Option<String>,
    pub(super) deleted: bool,
}

/// The pods' changes, as they are seen.
pub(super) struct PodWatch(mpsc::UnboundedReceiver<Seen>);

/// When each step of a pod's start was seen.
pub(super) struct Start {
    pub(super) uid: String,
    pub(super) ip: String,
    pub(super) bound_at: Instant,
    pub(super) running_at: Instant,
}

fn key(plural: &str, namespace: &str, name: &str) -> Option<ObjectKey> {
    Some(ObjectKey {
        group: String::new(),
        plural: plural.into(),
        namespace: namespace.into(),
        name: name.into(),
    })
}

/// Where an API is and who asks.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) server: String,
    pub(super) ca: Vec<u8>,
    pub(super) certificate: Vec<u8>,
    pub(super) key: Vec<u8>,
}

impl Access {
    /// As a kubeconfig with everything in it says.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(|| name.clone())?;
        let config = gantry_api::manifest::documents(&name, &text)?;
        let config = config.into_iter().next().unwrap_or_default();
        let cluster = &config["clusters"][0]["cluster"];
        let user = &config["users"][0]["user"];
        let bytes = |value: &Value| -> Result<Vec<u8>> {
            let text = value.as_str().context("the kubeconfig lacks credentials")?;
            Ok(base64::engine::general_purpose::STANDARD.decode(text)?)
        };
        let server = cluster["server"].as_str();
        Ok(Self {
            server: server.context("the kubeconfig names no server")?.to_owned(),
            ca: bytes(&cluster["certificate-authority-data"])?,
            certificate: bytes(&user["client-certificate-data"])?,
            key: bytes(&user["client-key-data"])?,
        })
    }

    pub(super) async fn connect(&self) -> Result<Channel> {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.ca))
            .identity(Identity::from_pem(&self.certificate, &self.key));
        let endpoint = Endpoint::from_shared(self.server.clone())?.tls_config(tls)?;
        Ok(endpoint.tcp_nodelay(true).connect().await?)
    }
}

impl Api {
    /// Connects to the cluster that runs here.
    pub(super) async fn connect() -> Result<Self> {
        Self::connect_as(&Access::read(Path::new(KUBECONFIG))?).await
    }

    /// Connects to another.
    pub(super) async fn connect_as(access: &Access) -> Result<Self> {
        let channel = access.connect().await?;
        let pods = PodsClient::new(channel.clone());
        let objects = ObjectsClient::new(channel);
        Ok(Self { objects, pods })
    }

    pub(super) async fn create(&self, plural: &str, object: &Value) -> Result<Value> {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
        let request = WriteRequest {
            key: key(plural, namespace, ""),
            json: serde_json::to_vec(object)?.into(),
            strict: true,
            field_manager: "gantry-bench".into(),
            ..WriteRequest::default()
        };
        let reply = self.objects.clone().create(request).await?.into_inner();
        Ok(serde_json::from_slice(&reply.json)?)
    }

    /// Replaces an object, whatever it is now.
    pub(super) async fn update(&self, plural: &str, object: &Value) -> Result<()> {
        let metadata = &object["metadata"];
        let text = |field: &str| metadata[field].as_str().unwrap_or_default();
        let request = WriteRequest {
            key: key(plural, text("namespace"), text("name")),
            json: serde_json::to_vec(object)?.into(),
            field_manager: "gantry-bench".into(),
            ..WriteRequest::default()
        };
        self.objects.clone().update(request).await?;
        Ok(())
    }

    pub(super) async fn create_namespace(&self, name: &str) -> Result<()> {
        let metadata = json!({"name": name});
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata});
        self.create("namespaces", &object).await.map(drop)
    }

    pub(super) async fn delete_pod(&self, name: &str) -> Result<()> {
        let request = DeleteRequest {
            key: key("pods", NAMESPACE, name),
            ..DeleteRequest::default()
        };
        self.objects.clone().delete(request).await?;
        Ok(())
    }

    /// Runs a command in the pod's container, to its end; its exit code.
    pub(super) async fn exec(&self, pod: &str, command: &[&str]) -> Result<i32> {
        let start = ExecStart {
            namespace: NAMESPACE.into(),
            pod: pod.into(),
            container: "main".into(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            ..ExecStart::default()
        };
        let (input, receiver) = mpsc::channel(1);
        let first = exec_input::Input::Start(start);
        input.send(ExecInput { input: Some(first) }).await?;
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut output = self.pods.clone().exec(stream).await?.into_inner();
        while let Some(message) = output.message().await? {
            if let Some(exec_output::Output::Exit(exit)) = message.output {
                if !exit.message.is_empty() {
                    bail!("exec in {pod}: {}", exit.message);
                }
                return Ok(exit.code);
            }
        }
        bail!("exec in {pod}: the stream ended without an exit code")
    }

    /// The messages of this reason's events.
    pub(super) async fn event_messages(&self, reason: &str) -> Result<Vec<String>> {
        let request = ListRequest {
            key: key("events", NAMESPACE, ""),
            ..ListRequest::default()
        };
        let reply = self.objects.clone().list(request).await?.into_inner();
        let events = reply
            .items
            .iter()
            .filter_map(|i| serde_json::from_slice::<Value>(i).ok());
        let of_reason = events.filter(|e| e["reason"] == reason);
        Ok(of_reason
            .filter_map(|e| e["message"].as_str().map(str::to_owned))
            .collect())
    }

    /// Counts the pods that have a node, from now on by the time at which a watch tells of it. Bytes are
    /// searched, not parsed: the counting is not to be what is measured.
    pub(super) async fn watch_bound(&self, total: usize) -> Result<Vec<Instant>> {
        let request = WatchRequest {
            key: key("pods", NAMESPACE, ""),
            ..WatchRequest::default()
        };
        let mut stream = self.objects.clone().watch(request).await?.into_inner();
        let mut bound = HashSet::new();
        let mut times = Vec::new();
        let mut is_live = false;
        while bound.len() < total {
            let next = tokio::time::timeout(CHANGE_TIMEOUT, stream.message()).await;
            let Ok(event) = next else {
                bail!("{} of {total} pods are bound, and no more", bound.len());
            };
            let event = event?.context("the watch of pods has ended")?;
            if event.r#type() == Type::Bookmark {
                if !is_live {
                    times = vec![Instant::now(); bound.len()];
                }
                is_live = true;
                continue;
            }
            if find(&event.json, b"\"nodeName\":").is_some() {
                let name = find(&event.json, b"\"name\":\"").unwrap_or_default();
                let name = name.split(|byte| *byte == b'"').next().unwrap_or_default();
                if bound.insert(name.to_vec()) && is_live {
                    times.push(Instant::now());
                }
            }
        }
        Ok(times)
    }

    /// Follows the pods; what happened before is not told.
    pub(super) async fn watch_pods(&self) -> Result<PodWatch> {
        let request = WatchRequest {
            key: key("pods", NAMESPACE, ""),
            ..WatchRequest::default()
        };
        let mut stream = self.objects.clone().watch(request).await?.into_inner();
        while let Some(event) = stream.message().await? {
            if event.r#type() == Type::Bookmark {
                break;
            }
        }
        let (sender, seen) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok(Some(event)) = stream.message().await {
                let at = Instant::now();
                let deleted = event.r#type() == Type::Deleted;
                let Ok(pod) = serde_json::from_slice::<Value>(&event.json) else {
                    continue;
                };
                let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let told = sender.send(Seen {
                    at,
                    name: word(&pod["metadata"]["name"]),
                    uid: word(&pod["metadata"]["uid"]),
                    bound: pod["spec"]["nodeName"].is_string(),
                    running: pod["status"]["phase"] == "Running",
                    ip: pod["status"]["podIP"].as_str().map(str::to_owned),
                    deleted,
                });
                if told.is_err() {
                    return;
                }
            }
        });
        Ok(PodWatch(seen))
    }
}

impl PodWatch {
    async fn next(&mut self) -> Result<Seen> {
        let seen = tokio::time::timeout(CHANGE_TIMEOUT, self.0.recv()).await;
        match seen {
            Ok(Some(seen)) => Ok(seen),
            Ok(None) => bail!("the watch of pods has ended"),
            Err(_) => bail!("no pod has changed for {} s", CHANGE_TIMEOUT.as_secs()),
        }
    }

    /// Until that pod is Running.
    pub(super) async fn running(&mut self, name: &str) -> Result<Start> {
        let mut bound_at = None;
        loop {
            let seen = self
                .next()
                .await
                .with_context(|| format!("waiting for pod {name}"))?;
            if seen.name != name {
                continue;
            }
            if seen.bound {
                bound_at.get_or_insert(seen.at);
            }
            if let (true, Some(ip)) = (seen.running, seen.ip) {
                return Ok(Start {
                    uid: seen.uid,
                    ip,
                    bound_at: bound_at.unwrap_or(seen.at),
                    running_at: seen.at,
                });
            }
        }
    }

    /// Until all pods of these names are Running; when the last one was seen.
    pub(super) async fn all_running(&mut self, names: &[String]) -> Result<Instant> {
        let mut left: std::collections::HashSet<&str> = names.iter().map(String::as_str).collect();
        let mut last = Instant::now();
        while !left.is_empty() {
            let seen = self
                .next()
                .await
                .with_context(|| format!("{} pods are not Running yet", left.len()))?;
            if seen.running && left.remove(seen.name.as_str()) {
                last = seen.at;
            }
        }
        Ok(last)
    }

    /// Until that many pods' objects have gone.
    pub(super) async fn deleted(&mut self, mut count: usize) -> Result<()> {
        while count > 0 {
            let seen = self
                .next()
                .await
                .with_context(|| format!("{count} pods are left"))?;
            count -= usize::from(seen.deleted);
        }
        Ok(())
    }
}

/// What follows the first `word`.
fn find<'a>(bytes: &'a [u8], word: &[u8]) -> Option<&'a [u8]> {
    let at = bytes
        .windows(word.len())
        .position(|window| window == word)?;
    bytes.get(at + word.len()..)
}

/// A pod that ends when it is told to.
pub(super) fn obedient_pod(name: &str) -> Value {
    let mut object = pod(name, json!({}));
    let script = "trap 'exit 0' TERM; sleep 86400 & wait";
    object["spec"]["containers"][0]["command"] = json!(["/bin/sh", "-c", script]);
    object
}

/// A pod that sleeps; `labels` is an object.
pub(super) fn pod(name: &str, labels: Value) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels},
        "spec": {
            // As process 1 sleep ignores SIGTERM: it is killed after this.
            "terminationGracePeriodSeconds": 1,
            "containers": [{
                "name": "main",
                "image": IMAGE,
                "command": ["/bin/sleep", "86400"],
            }],
        },
    })
}
