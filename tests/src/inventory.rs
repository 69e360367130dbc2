//! What a node holds at one moment, so that two moments can be compared: after the last pod has
//! gone there must be no more of anything than before the first.
//!
//! The census (`census.rs`) counts what is left when all of Gantry has gone; this counts beside a
//! running agent, and what only that process holds: descriptors, threads, children not reaped.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::census;

mod maps;

/// Directories below which files are compared, and how deep.
const TREES: [(&str, usize); 6] = [
    ("/run/gantry/pods", 4),
    ("/run/gantry/ipam", 3),
    ("/run/gantry", 2),
    ("/var/lib/gantry/pods", 4),
    ("/var/log/pods", 3),
    ("/sys/fs/bpf/gantry", 3),
];
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(100);
/// Descriptors that come and go by themselves: a connection in the making, a file being read.
const FD_SLACK: usize = 2;
/// Threads that tokio keeps for a while for calls that block.
const THREAD_SLACK: usize = 24;

/// Names of what was found, by kind. Names that have a number of their own (links, mounts of the
/// pool) differ from one moment to the next, so kinds are compared by how many there are.
#[derive(Clone, Debug, Default)]
pub struct Inventory(BTreeMap<String, BTreeSet<String>>);

impl Inventory {
    /// Counts everything; `agent` is the agent's process.
    ///
    /// # Errors
    /// The agent's own files cannot be read: it does not run.
    pub fn take(agent: u32) -> Result<Self> {
        let mut found = Self::default();
        for (pid, words) in of_pods() {
            found.put("process of a pod", format!("{pid} {words}"));
        }
        for (kind, names) in census::take() {
            if ["links", "routes", "cgroups", "mounts", "netns"].contains(&kind) {
                for name in names {
                    found.put(kind, name);
                }
            }
        }
        for (root, depth) in TREES {
            walk(Path::new(root), depth, &mut |path| {
                found.put(&format!("file below {root}"), path.display());
            });
        }
        for (name, count) in maps::entries(Path::new("/sys/fs/bpf/gantry"))? {
            for number in 0..count {
                found.put(&format!("entry of map {name}"), number);
            }
        }
        let process = PathBuf::from(format!("/proc/{agent}"));
        for (kind, number) in open_files(&process)? {
            found.put(&format!("agent's descriptor {kind}"), number);
        }
        for thread in fs::read_dir(process.join("task"))?.flatten() {
            found.put("agent's thread", thread.file_name().display());
        }
        for pid in zombies_of(agent) {
            found.put("agent's zombie", pid);
        }
        Ok(found)
    }

    fn put(&mut self, kind: &str, name: impl std::fmt::Display) {
        let of_kind = self.0.entry(kind.to_owned()).or_default();
        of_kind.insert(name.to_string());
    }

    /// What there is more of than `before`, each with what is new. Pure.
    pub fn more_than(&self, before: &Self) -> Vec<String> {
        let none = BTreeSet::new();
        let mut more = Vec::new();
        for (kind, now) in &self.0 {
            let before = before.0.get(kind).unwrap_or(&none);
            let slack = match kind.as_str() {
                "agent's thread" => THREAD_SLACK,
                _ if kind.starts_with("agent's descriptor") => FD_SLACK,
                _ => 0,
            };
            if now.len() > before.len() + slack {
                let new: Vec<&str> = now.difference(before).map(String::as_str).take(8).collect();
                let (now, before) = (now.len(), before.len());
                more.push(format!("{kind}: {now}, {before} before; new: {new:?}"));
            }
        }
        more
    }
}

/// Looks until two looks a second apart agree: what earlier work left to do is done.
///
/// # Errors
/// They still differ after `limit`: says in what.
pub fn settled(agent: u32, limit: Duration) -> Result<Inventory> {
    let began = Instant::now();
    let mut before = Inventory::take(agent)?;
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let now = Inventory::take(agent)?;
        let differ = [now.more_than(&before), before.more_than(&now)].concat();
        if differ.is_empty() {
            return Ok(now);
        }
        if began.elapsed() > limit {
            bail!("the node does not settle:\n  {}", differ.join("\n  "));
        }
        before = now;
    }
}

/// Waits until there is no more of anything than before.
///
/// # Errors
/// There still is after `limit`: says of what.
pub fn wait_for_no_more(before: &Inventory, agent: u32, limit: Duration) -> Result<()> {
    let began = Instant::now();
    loop {
        let more = Inventory::take(agent)?.more_than(before);
        if more.is_empty() {
            return Ok(());
        }
        if began.elapsed() > limit {
            bail!("left behind:\n  {}", more.join("\n  "));
        }
        std::thread::sleep(PAUSE);
    }
}

fn walk(directory: &Path, depth: usize, visit: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        visit(&path);
        if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, depth - 1, visit);
        }
    }
}

/// Each open descriptor by what it is: `socket`, `anon_inode:[eventfd]`, a path's directory.
fn open_files(process: &Path) -> Result<Vec<(String, String)>> {
    let directory = process.join("fd");
    let entries = fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
    let mut open = Vec::new();
    for entry in entries.flatten() {
        // Closed meanwhile: not open.
        if let Ok(target) = fs::read_link(entry.path()) {
            let number = entry.file_name().display().to_string();
            open.push((kind_of(&target.display().to_string()), number));
        }
    }
    Ok(open)
}

/// Pure: `socket:[123]` is `socket`, `/run/gantry/pods/1/x` is `/run/gantry`.
fn kind_of(target: &str) -> String {
    if target.starts_with('/') {
        return target.split('/').take(3).collect::<Vec<_>>().join("/");
    }
    match target.split_once(":[") {
        Some(("anon_inode", _)) | None => target.to_owned(),
        Some((kind, _)) => kind.to_owned(),
    }
}

fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Shims and helpers, by the directory that they were given, and what runs in a pod's cgroup.
fn of_pods() -> Vec<(u32, String)> {
    let read = |pid: u32, file: &str| {
        let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\0', " ")
    };
    let words = pids().map(|pid| (pid, read(pid, "cmdline")));
    words
        .filter(|(pid, words)| {
            words.contains("/run/gantry/pods/") || read(*pid, "cgroup").contains(":/gantry/")
        })
        .collect()
}

fn zombies_of(parent: u32) -> Vec<u32> {
    let is_zombie = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit_once(") ").unwrap_or_default().1.split(' ');
        fields.next() == Some("Z") && fields.next() == Some(&parent.to_string())
    };
    pids().filter(is_zombie).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(names: &[(&str, &str)]) -> Inventory {
        let mut inventory = Inventory::default();
        for (kind, name) in names {
            inventory.put(kind, name);
        }
        inventory
    }

    #[test]
    fn only_more_of_a_kind_counts() {
        let before = of(&[("links", "veth1"), ("links", "veth2")]);
        let renamed = of(&[("links", "veth2"), ("links", "veth3")]);
        assert!(renamed.more_than(&before).is_empty());
        assert!(of(&[]).more_than(&before).is_empty());
        let more = of(&[("links", "veth2"), ("links", "veth3"), ("links", "veth4")]);
        let said = more.more_than(&before);
        assert!(said.len() == 1 && said[0].contains("veth4"), "{said:?}");
        let new_kind = of(&[("agent's zombie", "7")]);
        assert_eq!(new_kind.more_than(&before).len(), 1);
    }

    #[test]
    fn a_descriptor_is_known_by_its_kind() {
        assert_eq!(kind_of("socket:[42]"), "socket");
        assert_eq!(kind_of("anon_inode:[eventpoll]"), "anon_inode:[eventpoll]");
        assert_eq!(kind_of("anon_inode:bpf-map"), "anon_inode:bpf-map");
        assert_eq!(kind_of("/run/gantry/pods/1/main/0/x"), "/run/gantry");
        assert_eq!(kind_of("net:[4026531840]"), "net");
    }
}
