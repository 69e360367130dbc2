//! What of ours is on this machine: processes, namespaces, links, routes, cgroups, mounts, BPF
//! pins and programs, files outside `target/`. Empty after `down`, and after every test.
//!
//! Looks at the kernel's own files and never asks the programs that made the things. Only `std` is
//! used: the integration tests compile this file too.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every kind that is counted, in the order of printing.
pub const KINDS: [&str; 8] = [
    "processes",
    "netns",
    "links",
    "routes",
    "cgroups",
    "mounts",
    "bpf",
    "files",
];

/// What was found, by kind; every kind is present.
pub type Census = BTreeMap<&'static str, Vec<String>>;

/// Files and directories that only Gantry makes.
pub const FILES: [&str; 10] = [
    "/run/gantry",
    "/var/lib/gantry",
    "/var/lib/gantry-control",
    "/etc/gantry",
    "/etc/cni/net.d/10-gantry.conflist",
    "/opt/cni/bin/gantry-bridge",
    "/run/gantry-bench",
    "/etc/systemd/system/gantry-control.service",
    "/etc/systemd/system/gantry-agent.service",
    "/etc/systemd/system/gantry-shutdown.service",
];

/// Where the namespaces of `cargo xtask bench services` are pinned, as `ip netns` takes them.
pub fn netns_directory() -> &'static Path {
    Path::new("/run/netns")
}

/// Their names.
pub fn bench_netns() -> Vec<String> {
    let entries = fs::read_dir(netns_directory()).into_iter().flatten();
    let names = entries
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| name.starts_with("gantry-bench"))
        .collect()
}

/// Counts everything.
pub fn take() -> Census {
    let mut census: Census = KINDS.iter().map(|kind| (*kind, Vec::new())).collect();
    let mut put = |kind: &'static str, found: Vec<String>| {
        census.insert(kind, found);
    };
    put(
        "processes",
        processes()
            .into_iter()
            .map(|(pid, name)| format!("{pid} {name}"))
            .collect(),
    );
    let (mut netns, mounts) = mounts();
    netns.extend(bench_netns());
    put("netns", netns);
    put("mounts", mounts);
    put("links", links());
    put("routes", routes());
    put("cgroups", cgroups());
    put("bpf", bpf());
    put(
        "files",
        FILES
            .iter()
            .filter(|f| Path::new(f).exists())
            .map(|f| f.to_string())
            .collect(),
    );
    census
}

/// One row per kind: its name, how many, the first few.
pub fn rows(census: &Census) -> Vec<Vec<String>> {
    KINDS
        .iter()
        .map(|kind| {
            let found = census.get(kind).map(Vec::as_slice).unwrap_or_default();
            let names = found.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
            let more = if found.len() > 3 { ", ..." } else { "" };
            vec![
                (*kind).to_owned(),
                found.len().to_string(),
                format!("{names}{more}"),
            ]
        })
        .collect()
}

/// Nothing found at all.
pub fn is_zero(census: &Census) -> bool {
    census.values().all(Vec::is_empty)
}

/// Our processes: pid and the name of their executable.
pub fn processes() -> Vec<(i32, String)> {
    let ours = [
        "gantry-control",
        "gantry-agent",
        "gantry-shim",
        "gantry-rt",
        "gantry-bridge",
    ];
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|e| e.file_name().to_string_lossy().parse::<i32>().ok());
    pids.filter_map(|pid| {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        // A replaced binary shows as "name (deleted)".
        let name = exe.file_name()?.to_string_lossy().replace(" (deleted)", "");
        ours.contains(&name.as_str()).then_some((pid, name))
    })
    .collect()
}

/// Namespace pins and other mounts below our directories.
fn mounts() -> (Vec<String>, Vec<String>) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut netns = Vec::new();
    let mut others = Vec::new();
    for line in table.lines() {
        let Some(point) = line.split(' ').nth(4) else {
            continue;
        };
        let below = |root: &str| point == root || point.starts_with(&format!("{root}/"));
        if !below("/run/gantry") && !below("/var/lib/gantry") {
            continue;
        }
        if line.contains(" - nsfs ") {
            &mut netns
        } else {
            &mut others
        }
        .push(point.to_owned());
    }
    (netns, others)
}

fn links() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/class/net") else {
        return Vec::new();
    };
    let names = entries
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| name.starts_with("gantry") || name.starts_with("gt"))
        .collect()
}

/// Destinations that leave through one of our links, and those with our mark.
fn routes() -> Vec<String> {
    let mut marked = Vec::new();
    for family in ["-4", "-6"] {
        // 0x47: see `gantry_cni::netlink::ROUTE_PROTOCOL`.
        let mut shown = Command::new("ip");
        let shown = shown.args([family, "route", "show", "proto", "71"]);
        let text = shown.output().map(|it| it.stdout).unwrap_or_default();
        marked.extend(String::from_utf8_lossy(&text).lines().map(str::to_owned));
    }
    let table = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let through_ours = |line: &&str| {
        line.split_whitespace()
            .next()
            .is_some_and(|l| l.starts_with("gantry") || l.starts_with("gt"))
    };
    let through = table.lines().filter(through_ours);
    let through = through.map(|l| l.split_whitespace().take(2).collect::<Vec<_>>().join(" "));
    through.chain(marked).collect()
}

/// `gantry` and `gantry-*` at the top of each hierarchy.
fn cgroups() -> Vec<String> {
    let top = Path::new("/sys/fs/cgroup");
    let children = |dir: &Path| -> Vec<PathBuf> {
        fs::read_dir(dir)
            .map(|d| d.flatten().map(|e| e.path()).collect())
            .unwrap_or_default()
    };
    let ours = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|n| n == "gantry" || n.to_string_lossy().starts_with("gantry-"))
            && path.is_dir()
    };
    let hierarchies = children(top);
    let nested = hierarchies
        .iter()
        .filter(|h| !h.is_symlink())
        .flat_map(|h| children(h));
    children(top)
        .into_iter()
        .chain(nested)
        .filter(ours)
        .map(|p| p.display().to_string())
        .collect()
}

/// Pins below /sys/fs/bpf/gantry*.
fn bpf() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/fs/bpf") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with("gantry") {
            walk(&entry.path(), &mut found);
        }
    }
    found
}

fn walk(path: &Path, found: &mut Vec<String>) {
    match fs::read_dir(path) {
        Ok(entries) => entries.flatten().for_each(|e| walk(&e.path(), found)),
        Err(_) => found.push(path.display().to_string()),
    }
}
