//! A container's cgroup, in whichever hierarchies this machine has: membership is the only
//! identity that survives a crash (pids are reused, libcontainer's state files may be torn).
//!
//! On cgroup v2 there is one hierarchy; on v1 and hybrid machines a container has a directory of
//! the same path in each controller's hierarchy.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the cgroup file systems are mounted.
const MOUNT: &str = "/sys/fs/cgroup";

/// Directories below a cgroup that are looked into; deeper nesting is the container's own doing
/// and is killed from its upper levels.
const DEPTH_MAX: u32 = 16;

/// The root directory of each hierarchy on this machine.
pub fn roots() -> Vec<PathBuf> {
    let mount = Path::new(MOUNT);
    if mount.join("cgroup.controllers").exists() {
        return vec![mount.to_path_buf()];
    }
    let Ok(entries) = fs::read_dir(mount) else {
        return Vec::new();
    };
    // `cpu` and `cpuacct` may be links to one joint hierarchy: file_type does not follow them.
    entries
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .filter(|p| p.join("cgroup.procs").exists())
        .collect()
}

/// Whether the machine has the single v2 hierarchy.
pub fn is_v2() -> bool {
    Path::new(MOUNT).join("cgroup.controllers").exists()
}

/// `path` (absolute, as in `cgroupsPath`) below `root`.
pub fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

/// How often the kernel's OOM killer chose a process of this cgroup since it was made.
///
/// Read it after the wait and before the rmdir: before the wait the counter may lag behind.
pub fn oom_kill_count(path: &str) -> u64 {
    let mount = Path::new(MOUNT);
    let file = if is_v2() {
        below(mount, path).join("memory.events")
    } else {
        below(&mount.join("memory"), path).join("memory.oom_control")
    };
    let Ok(text) = fs::read_to_string(file) else {
        return 0;
    };
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or(0)
}

/// The processes in this cgroup and below it, over all hierarchies. Empty when there is none.
pub fn members(path: &str) -> Vec<i32> {
    let mut pids = Vec::new();
    for root in roots() {
        collect(&below(&root, path), DEPTH_MAX, &mut pids);
    }
    pids.sort_unstable();
    pids.dedup();
    pids
}

fn collect(directory: &Path, depth: u32, pids: &mut Vec<i32>) {
    if let Ok(text) = fs::read_to_string(directory.join("cgroup.procs")) {
        // 0 is a process of another pid namespace: not ours to see, not ours to kill.
        pids.extend(
            text.lines()
                .filter_map(|l| l.parse::<i32>().ok())
                .filter(|&p| p > 1),
        );
    }
    if depth == 0 {
        return;
    }
    for child in children(directory) {
        collect(&child, depth - 1, pids);
    }
}

fn children(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect()
}

/// Sends SIGKILL to every member once; returns how many there were. Call again until it is 0: a
/// process may fork between the list and the signal.
pub fn kill_members(path: &str) -> usize {
    let members = members(path);
    if !members.is_empty() && is_v2() {
        // Kills the subtree atomically (Linux 5.14); below that the loop does it.
        let _ = fs::write(below(Path::new(MOUNT), path).join("cgroup.kill"), "1");
    }
    for pid in &members {
        // SAFETY: kill takes two integers and touches no memory; the pid was read just now from
        // a cgroup that only this pod's processes are in.
        unsafe { libc::kill(*pid, libc::SIGKILL) };
    }
    if !members.is_empty() {
        thaw(path);
    }
    members.len()
}

/// Lets frozen processes run to their end: under v1's freezer not even SIGKILL reaches them.
fn thaw(path: &str) {
    let (root, file, word) = match is_v2() {
        true => (PathBuf::from(MOUNT), "cgroup.freeze", "0"),
        false => (Path::new(MOUNT).join("freezer"), "freezer.state", "THAWED"),
    };
    let mut directories = vec![(below(&root, path), DEPTH_MAX)];
    while let Some((directory, depth)) = directories.pop() {
        // Refused where there is no freezer: then there is nothing to thaw.
        let _ = fs::write(directory.join(file), word);
        if depth > 0 {
            directories.extend(children(&directory).into_iter().map(|d| (d, depth - 1)));
        }
    }
}

/// Removes this cgroup, children first, in every hierarchy. Fails with `EBUSY` while a process or
/// zombie is in it; gone already is fine.
pub fn remove(path: &str) -> io::Result<()> {
    let mut result = Ok(());
    for root in roots() {
        if let Err(error) = remove_tree(&below(&root, path), DEPTH_MAX) {
            result = Err(error);
        }
    }
    result
}

fn remove_tree(directory: &Path, depth: u32) -> io::Result<()> {
    if depth > 0 {
        for child in children(directory) {
            remove_tree(&child, depth - 1)?;
        }
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The directory of `path` in the v2 hierarchy, alone or beside v1, made and opened for
/// `CLONE_INTO_CGROUP`. None where there is no such hierarchy or it cannot be made.
pub fn unified(path: &str) -> Option<fs::File> {
    let mount = Path::new(MOUNT);
    let root = match is_v2() {
        true => mount.to_path_buf(),
        false => mount.join("unified"),
    };
    if !root.join("cgroup.controllers").exists() {
        return None;
    }
    let directory = below(&root, path);
    let _ = fs::create_dir_all(&directory);
    fs::File::open(directory).ok()
}

/// Moves the calling process, which has one thread, into `path` in every hierarchy that lets it,
/// creating it; in the v2 hierarchy only `with_unified`.
///
/// By `tasks` where there is one: to move a whole process the kernel waits for an RCU grace period,
/// 5 to 20 ms in which no cgroup of the machine can be made.
///
/// Best effort: a cpuset hierarchy without configured CPUs refuses, and that does not matter;
/// what matters is to leave the agent's own cgroup, so that a service manager which kills that
/// cgroup does not reach the pods.
pub fn enter(path: &str, with_unified: bool) {
    for root in roots() {
        let directory = below(&root, path);
        let _ = fs::create_dir_all(&directory);
        let own = directory.join("tasks");
        if own.exists() {
            let _ = fs::write(own, "0");
        } else if with_unified {
            let _ = fs::write(directory.join("cgroup.procs"), "0");
        }
    }
}
