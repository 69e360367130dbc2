//! What must outlive the agent: the last word on a pod that has ended, and what probes have found.
//!
//! `/var/lib/gantry/ended/<uid>.json` holds the final status (write, fsync, rename). It lives until
//! the API object is gone; an agent restart or a reboot reports it again instead of running the pod
//! a second time.
//!
//! `/run/gantry/pods/<uid>/probes.json` (memory: it goes with the boot, as the containers do) holds
//! the verdicts and counters of running containers; it is written before a change is reported.
//! `drain` beside it holds when the pod's last drain began, on the clock that runs since the boot.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use gantry_api::k8s_openapi::api::core::v1::PodStatus;
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use super::state::ProbeKind;
use crate::ids::PodUid;
use crate::paths::Paths;

fn directory(paths: &Paths) -> PathBuf {
    paths.lib.join("ended")
}

fn file(paths: &Paths, uid: &PodUid) -> PathBuf {
    directory(paths).join(format!("{uid}.json"))
}

/// The final status, when this pod has ended here before.
pub fn read_final(paths: &Paths, uid: &PodUid) -> Option<PodStatus> {
    let bytes = fs::read(file(paths, uid)).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(status) => Some(status),
        Err(error) => {
            // That it exists says that the pod has ended; only the words are lost.
            warn!(pod = %uid, %error, "the final status is unreadable");
            Some(PodStatus {
                phase: Some("Failed".into()),
                reason: Some("StatusUnknown".into()),
                ..PodStatus::default()
            })
        }
    }
}

/// Keeps the final status. A failure is logged: the status is on its way to the API as well.
pub fn write_final(paths: &Paths, uid: &PodUid, status: &PodStatus) {
    let path = file(paths, uid);
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(directory(paths))?;
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(status)?)?;
        file.sync_all()?;
        fs::rename(&new, &path)
    };
    if let Err(error) = write() {
        warn!(pod = %uid, path = %path.display(), %error, "write the final status");
    }
}

/// Forgets the pod: its object is gone.
pub fn remove(paths: &Paths, uid: &PodUid) {
    let _ = fs::remove_file(file(paths, uid));
}

/// UIDs of pods that have ended here and whose object may still exist.
pub fn known(paths: &Paths) -> Vec<PodUid> {
    let Ok(entries) = fs::read_dir(directory(paths)) else {
        return Vec::new();
    };
    let uid = |entry: fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        PodUid::new(name.strip_suffix(".json")?).ok()
    };
    entries.flatten().filter_map(uid).collect()
}

/// What the probes of one run have found.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Probed {
    /// Of which run; that of another says nothing.
    pub attempt: u32,
    /// The startup probe has succeeded, or there is none.
    pub started: bool,
    /// The readiness probe's verdict, or there is none.
    pub ready: bool,
    /// Verdicts in a row against what is known, per probe.
    pub startup_against: u32,
    /// As above.
    pub liveness_against: u32,
    /// As above.
    pub readiness_against: u32,
}

impl Probed {
    /// Verdicts in a row of this probe against what is known.
    pub fn against(&self, kind: ProbeKind) -> u32 {
        match kind {
            ProbeKind::Startup => self.startup_against,
            ProbeKind::Liveness => self.liveness_against,
            ProbeKind::Readiness => self.readiness_against,
        }
    }

    /// Counts.
    pub fn set_against(&mut self, kind: ProbeKind, against: u32) {
        match kind {
            ProbeKind::Startup => self.startup_against = against,
            ProbeKind::Liveness => self.liveness_against = against,
            ProbeKind::Readiness => self.readiness_against = against,
        }
    }
}

fn probes_file(paths: &Paths, uid: &PodUid) -> PathBuf {
    paths.sandbox(uid).join("probes.json")
}

/// What an agent before this one knew, by container. An unreadable record is none: then the API's
/// status counts.
pub fn read_probed(paths: &Paths, uid: &PodUid) -> BTreeMap<String, Probed> {
    let bytes = fs::read(probes_file(paths, uid)).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// Keeps it. Best effort: without the sandbox there is nothing to remember.
pub fn write_probed(paths: &Paths, uid: &PodUid, probed: &BTreeMap<String, Probed>) {
    let path = probes_file(paths, uid);
    let write = || -> std::io::Result<()> {
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(probed)?)?;
        fs::rename(&new, &path)
    };
    if let Err(error) = write() {
        debug!(pod = %uid, %error, "keep what the probes have found");
    }
}

fn drain_file(paths: &Paths, uid: &PodUid) -> PathBuf {
    paths.sandbox(uid).join("drain")
}

/// Time since the boot: the same for every process, and no clock that anybody sets.
fn uptime() -> Option<Duration> {
    let text = fs::read_to_string("/proc/uptime").ok()?;
    Duration::try_from_secs_f64(text.split(' ').next()?.parse().ok()?).ok()
}

/// Notes that the drain of a deleted pod begins; the first note stays. Best effort: without it the
/// next agent waits anew, with the same cap.
pub fn begin_drain(paths: &Paths, uid: &PodUid) {
    let (path, Some(now)) = (drain_file(paths, uid), uptime()) else {
        return;
    };
    if !path.exists()
        && let Err(error) = fs::write(&path, now.as_secs_f64().to_string())
    {
        debug!(pod = %uid, %error, "keep when the drain began");
    }
}

/// How long ago the drain of the pod began, under this agent or one before it.
pub fn drained_for(paths: &Paths, uid: &PodUid) -> Duration {
    let began = fs::read_to_string(drain_file(paths, uid)).ok();
    let began = began.and_then(|text| Duration::try_from_secs_f64(text.parse().ok()?).ok());
    match (began, uptime()) {
        (Some(began), Some(now)) => now.saturating_sub(began),
        _ => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_findings_survive_and_a_torn_record_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut paths = Paths::standard("/".into());
        paths.run = dir.path().into();
        let uid = PodUid::new("u1").unwrap();
        assert!(read_probed(&paths, &uid).is_empty());
        fs::create_dir_all(paths.sandbox(&uid)).unwrap();
        let mut one = Probed {
            attempt: 3,
            started: true,
            ..Probed::default()
        };
        one.set_against(ProbeKind::Liveness, 2);
        let all = BTreeMap::from([("a".to_owned(), one)]);
        write_probed(&paths, &uid, &all);
        assert_eq!(read_probed(&paths, &uid), all);
        fs::write(probes_file(&paths, &uid), b"{\"a\"").unwrap();
        assert!(read_probed(&paths, &uid).is_empty());
    }

    #[test]
    fn a_drain_goes_on_where_an_agent_before_has_begun_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut paths = Paths::standard("/".into());
        paths.run = dir.path().into();
        let uid = PodUid::new("u1").unwrap();
        assert_eq!(drained_for(&paths, &uid), Duration::ZERO);
        fs::create_dir_all(paths.sandbox(&uid)).unwrap();
        begin_drain(&paths, &uid);
        std::thread::sleep(Duration::from_millis(60));
        begin_drain(&paths, &uid);
        assert!(
            drained_for(&paths, &uid) >= Duration::from_millis(40),
            "the first counts"
        );
        fs::write(drain_file(&paths, &uid), "x").unwrap();
        assert_eq!(drained_for(&paths, &uid), Duration::ZERO);
    }

    #[test]
    fn the_last_word_survives_and_a_torn_one_still_means_ended() {
        let dir = tempfile::tempdir().unwrap();
        let mut paths = Paths::standard("/".into());
        paths.lib = dir.path().into();
        let uid = PodUid::new("u1").unwrap();
        assert_eq!(read_final(&paths, &uid), None);
        let status = PodStatus {
            phase: Some("Succeeded".into()),
            ..PodStatus::default()
        };
        write_final(&paths, &uid, &status);
        assert_eq!(read_final(&paths, &uid), Some(status));
        fs::write(file(&paths, &uid), b"{\"pha").unwrap();
        assert_eq!(
            read_final(&paths, &uid).unwrap().phase.as_deref(),
            Some("Failed")
        );
        remove(&paths, &uid);
        assert_eq!(read_final(&paths, &uid), None);
    }
}
