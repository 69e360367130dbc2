//! Objects, read in this process.
//!
//! Scenarios ask the same thing until it is true. As a user asks, `gantry get`, that is a process and a TLS
//! handshake each time: on an emulated machine more work than what is waited for. What a scenario *does* goes
//! through the command line all the same, and so do the questions that this does not know.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use gantry_api::kinds::{self, Kind};
use gantry_api::proto::objects_client::ObjectsClient;
use gantry_api::proto::{GetRequest, ListRequest, ObjectKey};
use serde_json::{Value, json};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// As long as the command line waits for a connection.
const LIMIT: Duration = Duration::from_secs(10);
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// A connection of the administrator's.
pub struct Api {
    thread: Thread,
    objects: ObjectsClient<Channel>,
}

/// Where a connection lives: between two questions the server's pings are answered too. Who asks may be a
/// runtime's thread itself, as in the benchmarks.
struct Thread(Option<tokio::runtime::Runtime>);

impl Thread {
    fn start() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    /// Until it is done; none: never.
    fn wait<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Option<T> {
        let (done, waits) = std::sync::mpsc::sync_channel(1);
        self.0.as_ref()?.spawn(async move {
            // Whoever waits does so to the end.
            let _ = done.send(work.await);
        });
        waits.recv().ok()
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // To wait for the end of it is not allowed in a runtime.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// What `gantry get -o json` was asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Question {
    key: ObjectKey,
    label_selector: String,
}

impl Question {
    /// `[KIND, NAME?]` with `-n NAMESPACE` and `-l SELECTOR`; none for any other words.
    pub fn parse(words: &[&str]) -> Option<Self> {
        let (mut namespace, mut label_selector) = ("default", "");
        let mut named = Vec::new();
        let mut words = words.iter();
        while let Some(&word) = words.next() {
            match word {
                "-n" => namespace = words.next()?,
                "-l" => label_selector = words.next()?,
                _ if word.starts_with('-') || word.contains(['/', ',']) => return None,
                _ => named.push(word),
            }
        }
        let (kind, name) = match named[..] {
            [kind] => (kind, ""),
            [kind, name] => (kind, name),
            _ => return None,
        };
        let kind: &Kind = kinds::resolve(kind)?;
        let key = ObjectKey {
            group: kind.group.into(),
            plural: kind.plural.into(),
            namespace: if kind.namespaced { namespace } else { "" }.into(),
            name: name.into(),
        };
        Some(Self {
            key,
            label_selector: label_selector.into(),
        })
    }
}

impl Api {
    /// With server and credentials of a kubeconfig that `gantry-control` wrote.
    ///
    /// # Errors
    /// Nobody answers, or it is another one's.
    pub fn connect(kubeconfig: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(kubeconfig)?;
        let field = |name: &str| {
            let mut lines = text.lines().map(str::trim);
            let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            value.with_context(|| format!("no {name} in {}", kubeconfig.display()))
        };
        let pem = |name: &str| anyhow::Ok(BASE64_STANDARD.decode(field(name)?)?);
        let identity = Identity::from_pem(pem("client-certificate-data")?, pem("client-key-data")?);
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(pem("certificate-authority-data")?))
            .identity(identity);
        let endpoint = Endpoint::from_shared(field("server")?.to_owned())?
            .connect_timeout(LIMIT)
            .tls_config(tls)?;
        let thread = Thread::start()?;
        let connecting = async move { tokio::time::timeout(LIMIT, endpoint.connect()).await };
        let connected = thread.wait(connecting).context("the thread has ended")?;
        let channel = connected.context("no answer")??;
        Ok(Self {
            objects: ObjectsClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX),
            thread,
        })
    }

    /// The object, or a List of them, as `gantry get -o json` prints it.
    ///
    /// # Errors
    /// As the server says it.
    pub fn ask(&self, question: &Question) -> Result<Value, tonic::Status> {
        let parsed = |json: &[u8]| {
            serde_json::from_slice::<Value>(json)
                .map_err(|error| tonic::Status::data_loss(error.to_string()))
        };
        let mut objects = self.objects.clone();
        let key = Some(question.key.clone());
        if !question.key.name.is_empty() {
            let reply = self.limited(async move { objects.get(GetRequest { key }).await })?;
            return parsed(&reply.into_inner().json);
        }
        let request = ListRequest {
            key,
            label_selector: question.label_selector.clone(),
            ..ListRequest::default()
        };
        let reply = self.limited(async move { objects.list(request).await })?;
        let reply = reply.into_inner();
        let items: Result<Vec<Value>, _> = reply.items.iter().map(|item| parsed(item)).collect();
        Ok(json!({"apiVersion": "v1", "kind": "List", "items": items?}))
    }

    fn limited<T: Send + 'static>(
        &self,
        asked: impl Future<Output = Result<T, tonic::Status>> + Send + 'static,
    ) -> Result<T, tonic::Status> {
        let answered = async { tokio::time::timeout(LIMIT, asked).await };
        let late = |_| tonic::Status::deadline_exceeded(format!("no answer in {LIMIT:?}"));
        let answer = self.thread.wait(answered);
        answer
            .ok_or_else(|| tonic::Status::cancelled("the thread has ended"))?
            .map_err(late)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The benchmarks start their cluster there.
    #[tokio::test]
    async fn a_runtime_may_wait_as_well() {
        let thread = Thread::start().unwrap();
        assert_eq!(thread.wait(async { 7 }), Some(7));
    }

    #[test]
    fn questions_are_those_of_the_command_line() {
        let key = |words: &[&str]| {
            Question::parse(words).map(|q| (q.key.plural, q.key.namespace, q.key.name))
        };
        let is = |plural: &str, namespace: &str, name: &str| {
            Some((plural.to_owned(), namespace.to_owned(), name.to_owned()))
        };
        assert_eq!(key(&["pod", "a"]), is("pods", "default", "a"));
        assert_eq!(
            key(&["-n", "x", "deploy", "a"]),
            is("deployments", "x", "a")
        );
        assert_eq!(key(&["node", "n"]), is("nodes", "", "n"));
        assert_eq!(key(&["pods", "-n", "x"]), is("pods", "x", ""));
        for other in [
            &["pods", "-A"][..],
            &["pod/a"],
            &["pods,events"],
            &["pod", "a", "b"],
            &["nonsense"],
            &["pods", "-n"],
            &[],
        ] {
            assert_eq!(Question::parse(other), None, "{other:?}");
        }
        let labelled = Question::parse(&["pods", "-l", "app=web"]).unwrap();
        assert_eq!(labelled.label_selector, "app=web");
    }
}
