//! Third-party CNI: network lists from `/etc/cni/net.d`, plugins run in order.
//!
//! ```text
//! ADD  p1 ─result─► p2 (prevResult) ─result─► p3 ─► the pod's result, cached for DEL and CHECK
//! DEL  p3 ─► p2 ─► p1, each with that result; a failure does not stop the others
//! ```
//! The first valid file by name counts, as with every container runtime. No runtime capability is
//! passed (`runtimeConfig`): host ports and bandwidth of pods are not CNI's business here.
//!
//! Source: CNI specification 1.1.0, sections 1 to 5.

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use gantry_cni::config::SUPPORTED_VERSIONS;
use gantry_cni::result::addresses_of;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::NetworkError;
use crate::ids::PodUid;

/// The interface inside the pod.
pub(super) const IFNAME: &str = "eth0";

/// Some plugins wait for their own daemon; longer than this nobody waits for a pod.
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(60);

/// A result is a few KiB.
const OUTPUT_SIZE_MAX: u64 = 1 << 20;

/// A network of one or more plugins, as configured.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NetworkList {
    /// `name`
    pub name: String,
    /// The version to speak with every plugin.
    pub version: String,
    /// The plugins' configurations, in the order of ADD; each has a `type`.
    pub plugins: Vec<Value>,
}

/// One call's subject.
#[derive(Clone, Debug)]
pub(super) struct Subject<'a> {
    pub pod: &'a PodUid,
    pub namespace: &'a str,
    pub name: &'a str,
    /// None at DEL when it is gone already.
    pub netns: Option<&'a Path>,
}

impl NetworkList {
    /// Reads a `.conflist` (a list) or a `.conf`/`.json` (one plugin).
    ///
    /// # Errors
    /// In words, naming the field.
    pub(super) fn parse(file: &Path, bytes: &[u8]) -> Result<Self, String> {
        let at = file.display();
        let config: Value =
            serde_json::from_slice(bytes).map_err(|error| format!("{at}: {error}"))?;
        let text = |field: &str| config.get(field).and_then(Value::as_str);
        let name = text("name").filter(|name| !name.is_empty());
        let name = name
            .ok_or_else(|| format!("{at}: name: missing"))?
            .to_string();
        let version = version(&config).map_err(|message| format!("{at}: {message}"))?;
        let is_list = file
            .extension()
            .is_some_and(|extension| extension == "conflist");
        let plugins = if is_list {
            let plugins = config.get("plugins").and_then(Value::as_array);
            plugins.filter(|plugins| !plugins.is_empty()).cloned()
        } else {
            Some(vec![config.clone()])
        };
        let plugins = plugins.ok_or_else(|| format!("{at}: plugins: missing or empty"))?;
        for (index, plugin) in plugins.iter().enumerate() {
            let kind = plugin
                .get("type")
                .and_then(Value::as_str)
                .unwrap_or_default();
            if kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
                return Err(format!(
                    "{at}: plugins[{index}].type: {kind:?}: want the file name of a plugin"
                ));
            }
        }
        Ok(Self {
            name,
            version,
            plugins,
        })
    }

    /// True for a list of our own plugin alone: then the agent does the work in process.
    pub(super) fn is_ours(&self) -> bool {
        matches!(self.plugins.as_slice(), [one] if kind(one) == "gantry-bridge")
    }
}

/// The first valid configuration of a directory, by file name; none when there is none. Invalid
/// files are skipped with a warning.
pub(super) fn load(dir: &Path) -> Result<Option<NetworkList>, NetworkError> {
    let failed = |source| NetworkError::Io {
        context: format!("list {}", dir.display()),
        source,
    };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("conflist" | "conf" | "json")) {
            files.push(path);
        }
    }
    files.sort();
    for file in files {
        let parsed = fs::read(&file)
            .map_err(|error| format!("read {}: {error}", file.display()))
            .and_then(|bytes| NetworkList::parse(&file, &bytes));
        match parsed {
            Ok(list) => return Ok(Some(list)),
            Err(message) => tracing::warn!(%message, "cni configuration skipped"),
        }
    }
    Ok(None)
}

/// The newest version that both the configuration and we speak.
fn version(config: &Value) -> Result<String, String> {
    let mut offered: Vec<&str> = Vec::new();
    offered.extend(config.get("cniVersion").and_then(Value::as_str));
    let more = config.get("cniVersions").and_then(Value::as_array);
    offered.extend(more.into_iter().flatten().filter_map(Value::as_str));
    let common = SUPPORTED_VERSIONS
        .iter()
        .rev()
        .find(|version| offered.contains(*version));
    common.map(|version| (*version).to_string()).ok_or_else(|| {
        let supported = SUPPORTED_VERSIONS.join(", ");
        format!(
            "cniVersion: {:?}: want one of {supported}",
            offered.join(", ")
        )
    })
}

/// A plugin's type: the name of its file.
pub(super) fn kind(plugin: &Value) -> &str {
    plugin
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// Runs the plugins of lists.
#[derive(Clone, Debug)]
pub(super) struct Runner {
    /// CNI_PATH, in order of preference.
    pub path: Vec<PathBuf>,
}

impl Runner {
    /// ADD of every plugin. After an error the caller owes a [`Self::remove`].
    pub(super) async fn add(
        &self,
        list: &NetworkList,
        subject: &Subject<'_>,
    ) -> Result<Value, NetworkError> {
        let mut result = None;
        for plugin in &list.plugins {
            let config = configuration(list, plugin, result.as_ref());
            let output = self
                .run("ADD", kind(plugin), Some(subject), &config)
                .await?;
            result = Some(output.ok_or_else(|| refused(plugin, "ADD answered nothing".into()))?);
        }
        Ok(result.unwrap_or_default())
    }

    /// DEL of every plugin, in reverse. Goes on after a failure, and returns the first.
    pub(super) async fn remove(
        &self,
        list: &NetworkList,
        subject: &Subject<'_>,
        result: Option<&Value>,
    ) -> Result<(), NetworkError> {
        let mut first = Ok(());
        for plugin in list.plugins.iter().rev() {
            let config = configuration(list, plugin, result);
            if let Err(error) = self.run("DEL", kind(plugin), Some(subject), &config).await {
                tracing::warn!(pod = %subject.pod, %error, "cni DEL");
                first = first.and(Err(error));
            }
        }
        first
    }

    /// GC: the attachments of `live` stay. Only for lists that speak 1.1.0; others cannot.
    pub(super) async fn collect(
        &self,
        list: &NetworkList,
        live: &HashSet<PodUid>,
    ) -> Result<(), NetworkError> {
        if list.version != "1.1.0" {
            return Ok(());
        }
        let valid: Vec<Value> = (live.iter())
            .map(|pod| json!({ "containerID": pod.as_str(), "ifname": IFNAME }))
            .collect();
        let mut first = Ok(());
        for plugin in &list.plugins {
            let mut config = configuration(list, plugin, None);
            config["cni.dev/valid-attachments"] = json!(valid);
            if let Err(error) = self.run("GC", kind(plugin), None, &config).await {
                first = first.and(Err(error));
            }
        }
        first
    }

    /// Whether every plugin is there.
    pub(super) fn find_all(&self, list: &NetworkList) -> Result<(), NetworkError> {
        (list.plugins.iter()).try_for_each(|plugin| self.find(kind(plugin)).map(drop))
    }

    fn find(&self, plugin: &str) -> Result<PathBuf, NetworkError> {
        let mut candidates = self.path.iter().map(|dir| dir.join(plugin));
        candidates.find(|path| path.is_file()).ok_or_else(|| {
            let dirs: Vec<_> = self
                .path
                .iter()
                .map(|dir| dir.display().to_string())
                .collect();
            NetworkError::NotReady(format!("cni plugin {plugin}: not in {}", dirs.join(", ")))
        })
    }

    async fn run(
        &self,
        verb: &str,
        plugin: &str,
        subject: Option<&Subject<'_>>,
        config: &Value,
    ) -> Result<Option<Value>, NetworkError> {
        let mut command = Command::new(self.find(plugin)?);
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_PATH", join_path(&self.path));
        if let Some(subject) = subject {
            let netns = subject.netns.map(Path::as_os_str).unwrap_or_default();
            command
                .env("CNI_CONTAINERID", subject.pod.as_str())
                .env("CNI_IFNAME", IFNAME)
                .env("CNI_NETNS", netns)
                .env("CNI_ARGS", arguments(subject));
        }
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.kill_on_drop(true);
        let work = exchange(command, plugin, config);
        match tokio::time::timeout(PLUGIN_TIMEOUT, work).await {
            Ok(result) => result,
            Err(_) => Err(NetworkError::Cni {
                plugin: plugin.into(),
                message: format!(
                    "{verb}: no answer in {} s; killed",
                    PLUGIN_TIMEOUT.as_secs()
                ),
            }),
        }
    }
}

/// One process: configuration in, result or error out.
async fn exchange(
    mut command: Command,
    plugin: &str,
    config: &Value,
) -> Result<Option<Value>, NetworkError> {
    let failed = |message: String| NetworkError::Cni {
        plugin: plugin.into(),
        message,
    };
    let mut child = command
        .spawn()
        .map_err(|error| failed(format!("start: {error}")))?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let config = config.to_string();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A plugin may answer without reading all of it (EPIPE): its answer counts.
            drop(stdin.write_all(config.as_bytes()).await);
        }
    };
    let ((), stdout, stderr) = tokio::join!(feed, read(stdout), read(stderr));
    let status = child
        .wait()
        .await
        .map_err(|error| failed(format!("wait: {error}")))?;
    let answer: Option<Value> = serde_json::from_slice(&stdout).ok();
    if status.success() {
        let blank = stdout.iter().all(u8::is_ascii_whitespace);
        if answer.is_none() && !blank {
            return Err(failed("its answer is no JSON".into()));
        }
        return Ok(answer);
    }
    let text = |field: &str| {
        let value = answer.as_ref().and_then(|answer| answer.get(field));
        value
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_string()
    };
    let (message, details) = (text("msg"), text("details"));
    if !message.is_empty() {
        let separator = if details.is_empty() { "" } else { "; " };
        return Err(failed(format!("{message}{separator}{details}")));
    }
    let stderr = String::from_utf8_lossy(&stderr).trim().to_string();
    Err(failed(format!("{status}: {stderr}")))
}

async fn read(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        // What was read before an error is still the best there is to show.
        drop(stream.take(OUTPUT_SIZE_MAX).read_to_end(&mut bytes).await);
    }
    bytes
}

fn refused(plugin: &Value, message: String) -> NetworkError {
    NetworkError::Cni {
        plugin: kind(plugin).into(),
        message,
    }
}

/// What one plugin gets on stdin: its own configuration with the list's name and version.
fn configuration(list: &NetworkList, plugin: &Value, previous: Option<&Value>) -> Value {
    let mut config = plugin.clone();
    config["name"] = json!(list.name);
    config["cniVersion"] = json!(list.version);
    if let Some(previous) = previous {
        config["prevResult"] = previous.clone();
    }
    config
}

/// What the kubelet's runtimes pass; plugins that do not know a key were told to ignore it.
fn arguments(subject: &Subject<'_>) -> String {
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={uid};\
         K8S_POD_UID={uid}",
        subject.namespace,
        subject.name,
        uid = subject.pod
    )
}

fn join_path(dirs: &[PathBuf]) -> String {
    let dirs: Vec<String> = dirs.iter().map(|dir| dir.display().to_string()).collect();
    dirs.join(":")
}

/// The pod's addresses in a chain's result.
pub(super) fn pod_addresses(
    list: &NetworkList,
    result: &Value,
) -> Result<Vec<IpAddr>, NetworkError> {
    let failed = |message: String| NetworkError::Cni {
        plugin: list.name.clone(),
        message,
    };
    let addresses: Vec<IpAddr> = (addresses_of(result).map_err(failed)?.iter())
        .map(ipnet::IpNet::addr)
        .collect();
    if addresses.is_empty() {
        return Err(failed("its result has no address".into()));
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(file: &str, text: &str) -> Result<NetworkList, String> {
        NetworkList::parse(Path::new(file), text.as_bytes())
    }

    #[test]
    fn lists_and_single_plugins_are_read() {
        let list = r#"{"cniVersion":"0.4.0","cniVersions":["0.4.0","1.0.0"],"name":"n",
            "plugins":[{"type":"bridge"},{"type":"portmap"}]}"#;
        let list = parse("a.conflist", list).unwrap();
        assert_eq!((list.version.as_str(), list.plugins.len()), ("1.0.0", 2));
        assert!(!list.is_ours());
        let one = parse(
            "a.conf",
            r#"{"cniVersion":"1.0.0","name":"n","type":"gantry-bridge"}"#,
        );
        assert!(one.unwrap().is_ours());
    }

    #[test]
    fn bad_lists_are_refused_by_field() {
        let message = |file: &str, text: &str| parse(file, text).unwrap_err();
        assert!(message("a.conflist", "{").starts_with("a.conflist: "));
        assert!(message("a.conflist", r#"{"cniVersion":"1.0.0"}"#).contains("name: missing"));
        let none = r#"{"cniVersion":"1.0.0","name":"n","plugins":[]}"#;
        assert!(message("a.conflist", none).contains("plugins: missing or empty"));
        let path = r#"{"cniVersion":"1.0.0","name":"n","type":"../sh"}"#;
        assert!(message("a.conf", path).contains("plugins[0].type: \"../sh\""));
        let old = r#"{"cniVersion":"0.1.0","name":"n","type":"x"}"#;
        assert!(message("a.conf", old).contains("want one of 0.4.0, 1.0.0, 1.1.0"));
    }

    #[test]
    fn the_first_valid_file_counts() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(&dir.path().join("absent")).unwrap().is_none());
        assert!(load(dir.path()).unwrap().is_none());
        let config = |name: &str| format!(r#"{{"cniVersion":"1.0.0","name":"{name}","type":"x"}}"#);
        fs::write(dir.path().join("20-b.conf"), config("b")).unwrap();
        fs::write(dir.path().join("10-a.conflist"), "{").unwrap();
        fs::write(dir.path().join("05-notes.txt"), config("notes")).unwrap();
        fs::write(dir.path().join("30-c.conf"), config("c")).unwrap();
        assert_eq!(load(dir.path()).unwrap().unwrap().name, "b");
    }

    #[tokio::test]
    async fn a_missing_plugin_is_named_with_where_it_was_sought() {
        let runner = Runner {
            path: vec!["/nonexistent/bin".into()],
        };
        let list = parse(
            "a.conf",
            r#"{"cniVersion":"1.0.0","name":"n","type":"flannel"}"#,
        );
        let error = runner.find_all(&list.unwrap()).unwrap_err().to_string();
        assert_eq!(
            error,
            "network not ready: cni plugin flannel: not in /nonexistent/bin"
        );
    }
}
