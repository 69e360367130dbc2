//! A run's files as the agent's types, and the intent it writes before anything else.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use gantry_shim::record::{self, Started};
use serde::{Deserialize, Serialize};

use super::sandbox::is_run;
use crate::ids::{ContainerRun, PodUid};
use crate::runtime::Exit;

/// File name of [`Intent`].
pub(super) const INTENT_FILE: &str = "intent.json";
/// File name of [`SandboxIntent`].
const SANDBOX_FILE: &str = "sandbox.json";

/// What a crash recovery needs to know, on disk before the first side effect of a start.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Intent {
    /// The container's cgroup, absolute below each hierarchy's root.
    pub(super) cgroup: String,
    /// Its CRI log.
    pub(super) log_path: PathBuf,
    /// Compiled filters; empty for none.
    pub(super) seccomp_path: PathBuf,
}

/// The same for a sandbox.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SandboxIntent {
    /// `namespace/name`, for people.
    pub(super) title: String,
    /// The pod's cgroup.
    pub(super) cgroup: String,
}

impl Intent {
    pub(super) fn write(&self, directory: &Path) -> io::Result<()> {
        record::write_durably(directory, INTENT_FILE, &serde_json::to_string(self)?)
    }

    /// None when there is none; one that is torn (it cannot be) counts as an error.
    pub(super) fn read(directory: &Path) -> io::Result<Option<Self>> {
        read_json(&directory.join(INTENT_FILE))
    }
}

impl SandboxIntent {
    pub(super) fn write(&self, directory: &Path) -> io::Result<()> {
        record::write_durably(directory, SANDBOX_FILE, &serde_json::to_string(self)?)
    }

    pub(super) fn read(directory: &Path) -> io::Result<Option<Self>> {
        read_json(&directory.join(SANDBOX_FILE))
    }
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// `<container>/<attempt>`
pub(super) fn key(run: &ContainerRun) -> String {
    format!("{}/{}", run.name, run.attempt)
}

/// The run behind `<container>/<attempt>`.
pub(super) fn run_of(pod: &PodUid, key: &str) -> Option<ContainerRun> {
    let (name, attempt) = key.split_once('/').filter(|_| is_run(key))?;
    Some(ContainerRun {
        pod: pod.clone(),
        name: name.to_owned(),
        attempt: attempt.parse().ok()?,
    })
}

/// Every run of a sandbox that has an intent, oldest first.
pub(super) fn runs(pod: &PodUid, sandbox: &Path) -> Vec<ContainerRun> {
    // Directories only: sockets, pins and records cost a call each, and this is looked at often.
    let names = |path: &Path| -> Vec<String> {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries
            .filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|e| e.file_name().into_string().ok())
            .collect()
    };
    let mut runs: Vec<ContainerRun> = names(sandbox)
        .iter()
        .flat_map(|name| {
            let attempts = names(&sandbox.join(name));
            attempts
                .into_iter()
                .map(move |attempt| format!("{name}/{attempt}"))
        })
        .filter(|key| sandbox.join(key).join(INTENT_FILE).exists())
        .filter_map(|key| run_of(pod, &key))
        .collect();
    runs.sort();
    runs
}

/// Nanoseconds since 1970 as a time.
pub(super) fn time(ns: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(ns)
}

/// When the run was let go; none when it never was.
pub(super) fn started(directory: &Path) -> io::Result<Option<Started>> {
    Started::read(directory)
}

/// The shim's record in the agent's words.
pub(super) fn exit(exit: &record::Exit) -> Exit {
    Exit {
        code: exit.code,
        signal: exit.signal,
        // A child that was killed may have left init alive; then it is no OOM kill of the
        // container.
        oom_killed: exit.oom_kill_count > 0 && (exit.signal == libc::SIGKILL || exit.code == 137),
        started_at: time(exit.started_ns),
        finished_at: time(exit.finished_ns),
        unknown: exit.unknown,
    }
}
