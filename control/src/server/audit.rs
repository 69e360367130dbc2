//! The audit log: who asked for what, when, and what came of it; one line of JSON a request.
//!
//! ```text
//!  request ─► Call (who, verb, object) ─► answer ─► event ─► queue (bounded) ─► thread ─► FILE, FILE.1, …
//! ```
//! Events have the shape of `audit.k8s.io/v1` at level Metadata: no object, no patch and no answer is ever in
//! them, and of what concerns Secrets not even the server's message. A request waits for room in the queue,
//! so nothing that was answered is left out while the disk takes it; a disk that does not is logged, counted
//! at the end of the failure, and stops no request.
//!
//! Who impersonates somebody is named as `user`, the other one as `impersonatedUser`.
//!
//! What the services for logs, exec and figures let through is noted where the right is asked for.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use gantry_api::kinds;
use gantry_api::proto::ObjectKey;
use gantry_api::status::{Reason, Status};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use super::forwarded;
use super::identity::Identity;
use super::rbac::Attributes;

/// Lines that wait for the disk.
const QUEUE_COUNT_MAX: usize = 4096;

/// Where the log is, and how much of it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditSettings {
    /// The file that is written.
    pub file: PathBuf,
    /// It is renamed when it is this large.
    pub bytes_max: u64,
    /// Renamed files that are kept.
    pub backup_count: usize,
}

enum Line {
    Event(String),
    /// Everything before is with the kernel.
    Flush(oneshot::Sender<()>),
}

/// The log; clones share it.
#[derive(Clone)]
pub(crate) struct AuditLog {
    queue: mpsc::Sender<Line>,
}

impl AuditLog {
    /// Opens the file and starts the thread that writes it.
    pub(crate) fn open(settings: AuditSettings) -> std::io::Result<AuditLog> {
        let mut files = Files::open(settings)?;
        let (queue, mut lines) = mpsc::channel(QUEUE_COUNT_MAX);
        std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || {
                while let Some(line) = lines.blocking_recv() {
                    match line {
                        Line::Event(text) => files.write(&text),
                        Line::Flush(done) => drop(done.send(())),
                    }
                }
            })?;
        Ok(AuditLog { queue })
    }

    /// Waits until what was noted is written.
    pub(crate) async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.queue.send(Line::Flush(done)).await.is_ok() {
            // An error is a thread that has ended: nothing is left to wait for.
            let _ = flushed.await;
        }
    }

    async fn put(&self, event: &Value) {
        let _ = self.queue.send(Line::Event(event.to_string())).await;
    }

    /// For where nobody can wait: a full queue loses the line, and says so.
    fn try_put(&self, event: &Value) {
        if self.queue.try_send(Line::Event(event.to_string())).is_err() {
            tracing::error!("the audit log is behind: a line is lost");
        }
    }
}

/// The file and its older ones.
struct Files {
    settings: AuditSettings,
    file: File,
    bytes: u64,
    lost_count: u64,
}

fn open_append(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

impl Files {
    fn open(settings: AuditSettings) -> std::io::Result<Files> {
        let file = open_append(&settings.file)?;
        let bytes = file.metadata()?.len();
        Ok(Files {
            settings,
            file,
            bytes,
            lost_count: 0,
        })
    }

    fn write(&mut self, text: &str) {
        let size = text.len() as u64 + 1;
        let written = if self.bytes > 0 && self.bytes + size > self.settings.bytes_max {
            self.rotate()
        } else {
            Ok(())
        };
        // One write a line: a reader never sees half of one, and a crash leaves whole ones.
        match written.and_then(|()| self.file.write_all(format!("{text}\n").as_bytes())) {
            Ok(()) => {
                self.bytes += size;
                if self.lost_count > 0 {
                    tracing::warn!(self.lost_count, "the audit log is written again");
                    self.lost_count = 0;
                }
            }
            Err(error) => {
                if self.lost_count == 0 {
                    let file = self.settings.file.display();
                    tracing::error!(%file, %error, "the audit log cannot be written: free space or repair the disk");
                }
                self.lost_count += 1;
            }
        }
    }

    fn backup(&self, number: usize) -> PathBuf {
        let mut name = self.settings.file.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }

    /// FILE becomes FILE.1, that FILE.2, …; the oldest goes.
    fn rotate(&mut self) -> std::io::Result<()> {
        let ignore_absent = |result: std::io::Result<()>| match result {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            result => result,
        };
        let kept = self.settings.backup_count;
        if kept == 0 {
            self.file.set_len(0)?;
            self.bytes = 0;
            return Ok(());
        }
        for number in (1..kept).rev() {
            let (from, to) = (self.backup(number), self.backup(number + 1));
            ignore_absent(std::fs::rename(from, to))?;
        }
        std::fs::rename(&self.settings.file, self.backup(1))?;
        self.file = open_append(&self.settings.file)?;
        self.bytes = 0;
        Ok(())
    }
}

/// One request, from when it came.
pub(super) struct Call {
    log: AuditLog,
    who: Identity,
    verb: &'static str,
    key: ObjectKey,
    subresource: String,
    dry_run: bool,
    source: Option<String>,
    agent: Option<String>,
    received: Timestamp,
}

/// What of an object is noted when a request names it by its content only.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Named {
    metadata: NamedMetadata,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct NamedMetadata {
    name: String,
    namespace: String,
}

impl Call {
    /// Notes who asks; `None` without a log.
    pub(super) fn new<T>(
        log: Option<&AuditLog>,
        request: &tonic::Request<T>,
        who: &Identity,
        verb: &'static str,
        key: Option<&ObjectKey>,
    ) -> Option<Call> {
        let agent = request.metadata().get("user-agent");
        Some(Call {
            log: log?.clone(),
            who: who.clone(),
            verb,
            key: key.cloned().unwrap_or_default(),
            subresource: String::new(),
            dry_run: false,
            source: forwarded::address(request).map(|address| address.to_string()),
            agent: agent.and_then(|text| text.to_str().ok()).map(str::to_owned),
            received: Timestamp::now(),
        })
    }

    /// A write: of which part, and of what, where only the object says it.
    pub(super) fn of_write(mut self, subresource: &str, json: &[u8], dry_run: bool) -> Call {
        subresource.clone_into(&mut self.subresource);
        self.dry_run = dry_run;
        if self.key.name.is_empty() || self.key.namespace.is_empty() {
            let named: Named = serde_json::from_slice(json).unwrap_or_default();
            let or = |own: &mut String, other: String| {
                if own.is_empty() {
                    *own = other;
                }
            };
            or(&mut self.key.name, named.metadata.name);
            or(&mut self.key.namespace, named.metadata.namespace);
        }
        self
    }

    /// Writes the event.
    pub(super) async fn done(self, failure: Option<Status>) {
        let success = match self.verb {
            "create" => 201,
            _ => 200,
        };
        let event = self.event(success, failure.as_ref(), Timestamp::now());
        self.log.put(&event).await;
    }

    fn event(&self, success: u16, failure: Option<&Status>, now: Timestamp) -> Value {
        let kind = kinds::by_plural(&self.key.group, &self.key.plural);
        let what = Attributes {
            verb: self.verb,
            group: kind.map_or(self.key.group.as_str(), |kind| kind.group),
            resource: &self.key.plural,
            subresource: &self.subresource,
            namespace: match kind {
                Some(kind) if !kind.namespaced => "",
                _ => &self.key.namespace,
            },
            name: &self.key.name,
        };
        let version = kind.map_or("v1", |kind| kind.version);
        let mut event = event(
            &self.who,
            &what,
            version,
            "ResponseComplete",
            self.received,
            now,
        );
        event["responseStatus"] = response(&what, success, failure);
        if let Some(source) = &self.source {
            event["sourceIPs"] = json!([source]);
        }
        if let Some(agent) = &self.agent {
            event["userAgent"] = json!(agent);
        }
        if self.dry_run {
            event["annotations"]["gantry.dev/dry-run"] = json!("true");
        }
        event
    }
}

/// How it ended. A message about a Secret may quote it.
fn response(what: &Attributes<'_>, success: u16, failure: Option<&Status>) -> Value {
    let Some(status) = failure else {
        return json!({"metadata": {}, "code": success});
    };
    let mut response = json!({"metadata": {}, "status": "Failure", "reason": status.reason.as_str(),
        "code": status.code});
    if what.resource != "secrets" {
        response["message"] = json!(status.message);
    }
    response
}

/// What every event has.
fn event(
    who: &Identity,
    what: &Attributes<'_>,
    version: &str,
    stage: &str,
    received: Timestamp,
    now: Timestamp,
) -> Value {
    let micros = |at: Timestamp| at.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
    let mut object = json!({"resource": what.resource, "apiVersion": version});
    for (field, text) in [
        ("apiGroup", what.group),
        ("namespace", what.namespace),
        ("name", what.name),
        ("subresource", what.subresource),
    ] {
        if !text.is_empty() {
            object[field] = json!(text);
        }
    }
    let named = |who: &Identity| json!({"username": who.user, "groups": who.groups});
    let mut event = json!({
        "kind": "Event", "apiVersion": "audit.k8s.io/v1", "level": "Metadata",
        "auditID": uuid::Uuid::new_v4().to_string(), "stage": stage,
        "requestURI": uri(what, version), "verb": what.verb,
        "user": named(who.real()),
        "objectRef": object,
        "requestReceivedTimestamp": micros(received), "stageTimestamp": micros(now),
    });
    if who.impersonated_by.is_some() {
        event["impersonatedUser"] = named(who);
    }
    event
}

/// The path that the request has in Kubernetes' REST API.
fn uri(what: &Attributes<'_>, version: &str) -> String {
    let mut uri = match what.group {
        "" => format!("/api/{version}"),
        group => format!("/apis/{group}/{version}"),
    };
    if !what.namespace.is_empty() && what.resource != "namespaces" {
        uri.push_str(&format!("/namespaces/{}", what.namespace));
    }
    for part in [what.resource, what.name, what.subresource] {
        if !part.is_empty() {
            uri.push('/');
            uri.push_str(part);
        }
    }
    uri
}

/// A request of another service: noted when its right is asked for, as it may go on for hours.
pub(crate) fn note(
    log: Option<&AuditLog>,
    who: &Identity,
    what: &Attributes<'_>,
    result: &Result<(), Status>,
) {
    let Some(log) = log else { return };
    let now = Timestamp::now();
    let mut event = event(who, what, "v1", "ResponseStarted", now, now);
    let decision = match result {
        Err(status) if status.reason == Reason::Forbidden => "forbid",
        _ => "allow",
    };
    event["annotations"] = json!({"authorization.k8s.io/decision": decision});
    event["responseStatus"] = response(what, 101, result.as_ref().err());
    log.try_put(&event);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(dir: &Path, bytes_max: u64) -> AuditSettings {
        AuditSettings {
            file: dir.join("audit.log"),
            bytes_max,
            backup_count: 2,
        }
    }

    #[test]
    fn files_are_renamed_when_full_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = Files::open(settings(dir.path(), 20)).unwrap();
        for i in 0..9 {
            files.write(&format!("line {i:03}"));
        }
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("audit.log"), "line 008\n");
        assert_eq!(read("audit.log.1"), "line 006\nline 007\n");
        assert_eq!(read("audit.log.2"), "line 004\nline 005\n");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
        // A start goes on where it was.
        let mut files = Files::open(settings(dir.path(), 20)).unwrap();
        files.write("line 009");
        assert_eq!(read("audit.log"), "line 008\nline 009\n");
    }

    #[test]
    fn paths_are_those_of_the_rest_api() {
        let what = Attributes {
            verb: "create",
            resource: "pods",
            subresource: "exec",
            namespace: "n",
            name: "p",
            ..Attributes::default()
        };
        assert_eq!(uri(&what, "v1"), "/api/v1/namespaces/n/pods/p/exec");
        let what = Attributes {
            group: "apps",
            resource: "deployments",
            ..Attributes::default()
        };
        assert_eq!(uri(&what, "v1"), "/apis/apps/v1/deployments");
    }
}
