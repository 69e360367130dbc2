//! Directories and files of cgroup hierarchies: create, write, kill, remove. Blocking calls only.
//!
//! Removal is a loop, not a call: a cgroup is busy until its last zombie is reaped and its
//! children are gone. Processes are found by membership, never by a remembered pid.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::CgroupError;

/// Pause between two tries at a busy cgroup.
const RETRY: Duration = Duration::from_millis(5);
/// Deeper nesting than this inside a container's cgroup is refused rather than walked.
const DEPTH_MAX: usize = 64;

/// Never creates: a missing control file is "not found", not the "permission denied" of O_CREAT.
fn write_existing(path: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

/// One write into a control file: the kernel judges each `write` on its own.
pub(super) fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    write_existing(path, value).map_err(|source| CgroupError::Io {
        context: format!("write {value:?} to {}", path.display()),
        source,
    })
}

/// The content of a control file; none when file or cgroup do not exist (any more).
pub(super) fn read(path: &Path) -> Result<Option<String>, CgroupError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if gone(&e) => Ok(None),
        Err(source) => Err(CgroupError::Io {
            context: format!("read {}", path.display()),
            source,
        }),
    }
}

/// The cgroup vanished: ENOENT on the path, ENODEV on a file already open.
fn gone(e: &io::Error) -> bool {
    e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV)
}

/// Creates one directory; present is fine.
pub(super) fn mkdir(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(source) => Err(CgroupError::Io {
            context: format!("create cgroup {}", path.display()),
            source,
        }),
    }
}

/// `dir` and every cgroup below it, parents first.
pub(super) fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut queue = vec![(dir.to_path_buf(), 0)];
    while let Some((dir, depth)) = queue.pop() {
        // A directory that vanishes while we walk has nothing left for us.
        if let Ok(entries) = fs::read_dir(&dir) {
            let children = entries
                .flatten()
                .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
            if depth < DEPTH_MAX {
                queue.extend(children.map(|e| (e.path(), depth + 1)));
            }
            found.push(dir);
        }
    }
    found
}

/// Pids in `dir` and below. Those of other pid namespaces (shown as 0) are left out.
pub(super) fn members(dir: &Path) -> BTreeSet<i32> {
    let mut pids = BTreeSet::new();
    for dir in walk(dir) {
        let text = read(&dir.join("cgroup.procs"))
            .ok()
            .flatten()
            .unwrap_or_default();
        pids.extend(
            text.lines()
                .filter_map(|l| l.parse::<i32>().ok())
                .filter(|p| *p > 0),
        );
    }
    pids
}

/// Sends SIGKILL to every process in `dir` and below, once.
pub(super) fn kill_once(dir: &Path) -> Result<(), CgroupError> {
    match write_existing(&dir.join("cgroup.kill"), "1") {
        Ok(()) => return Ok(()),
        Err(e) if gone(&e) => {} // v1, v2 before Linux 5.14, or no such cgroup: one by one
        Err(source) => {
            return Err(CgroupError::Io {
                context: format!("kill cgroup {}", dir.display()),
                source,
            });
        }
    }
    for pid in members(dir) {
        kill_member(dir, pid)?;
    }
    Ok(())
}

/// A pid may be reused between reading and killing: hold it, look again, then kill what is held.
fn kill_member(dir: &Path, pid: i32) -> Result<(), CgroupError> {
    let Some(raw) = Pid::from_raw(pid) else {
        return Ok(());
    };
    let Ok(held) = pidfd_open(raw, PidfdFlags::empty()) else {
        return Ok(()); // ended by itself
    };
    if !members(dir).contains(&pid) {
        return Ok(());
    }
    match pidfd_send_signal(&held, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(e) => Err(CgroupError::Io {
            context: format!("kill process {pid} of cgroup {}", dir.display()),
            source: e.into(),
        }),
    }
}

/// Lets frozen processes run, or they would never see the signal (v1 freezer; v2 for symmetry).
pub(super) fn thaw(dir: &Path) {
    for dir in walk(dir) {
        // Absent where this hierarchy has no freezer; then there is nothing to thaw.
        for (file, value) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
            let _ = write_existing(&dir.join(file), value);
        }
    }
}

/// Kills until nothing is left in `dirs` (the same cgroup in each hierarchy) or time is up.
pub(super) fn kill_all(dirs: &[PathBuf], patience: Duration) -> Result<(), CgroupError> {
    let start = Instant::now();
    loop {
        for dir in dirs {
            kill_once(dir)?;
            thaw(dir);
        }
        let left: BTreeSet<i32> = dirs.iter().flat_map(|d| members(d)).collect();
        if left.is_empty() {
            return Ok(());
        }
        if start.elapsed() >= patience {
            return Err(CgroupError::Unkillable {
                path: dirs
                    .first()
                    .map(|d| d.display().to_string())
                    .unwrap_or_default(),
                pids: left.into_iter().collect(),
            });
        }
        std::thread::sleep(RETRY);
    }
}

/// Removes `dir` with everything below, children first; busy ones are tried until time is up.
pub(super) fn remove(dir: &Path, patience: Duration) -> Result<(), CgroupError> {
    let start = Instant::now();
    loop {
        let mut busy = None;
        for dir in walk(dir).iter().rev() {
            match fs::remove_dir(dir) {
                Ok(()) => {}
                Err(e) if gone(&e) => {}
                Err(e) => busy = Some((dir.clone(), e)),
            }
        }
        match busy {
            None => return Ok(()),
            Some((path, source)) if start.elapsed() >= patience => {
                return Err(CgroupError::Io {
                    context: format!("remove cgroup {}", path.display()),
                    source,
                });
            }
            Some(_) => std::thread::sleep(RETRY),
        }
    }
}
