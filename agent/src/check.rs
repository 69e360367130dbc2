//! `gantry-agent check`: what this machine lacks, and what to do about it.
//!
//! ```text
//! Facts::read (the machine, nothing is changed) ─► judge (pure) ─► findings ─► render (60 columns)
//! ```
//! A must-have that is missing makes the exit code 1; everything else is advice. What cannot be
//! found out counts as unknown and is said, never as fine.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::cgroups::limits::Policy;
use crate::cgroups::{Cgroups, Lack};

/// Below this the programs' cgroup hooks for IPv6 names and `BPF_LINK` are not all there.
const KERNEL_MIN: (u32, u32) = (5, 10);
/// The oldest kernel that the tests run on.
const KERNEL_TESTED: (u32, u32) = (6, 1);
/// Room for images and logs.
const FREE_BYTES_MIN: u64 = 2 << 30;
/// CNI plugins whose pods are not joined to the node by a veth pair, so that there is no interface
/// on which packet programs could stand.
const WITHOUT_VETH: [&str; 6] = ["macvlan", "ipvlan", "vlan", "host-device", "sriov", "tap"];
/// The width of the report.
const COLUMNS: usize = 60;

/// How much a finding matters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// As it should be.
    Fine,
    /// Works, with something to know.
    Advice,
    /// The agent does not work so.
    Missing,
}

/// One line of the report.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// What was found.
    pub what: String,
    /// What to do; empty when fine.
    pub remedy: Cow<'static, str>,
}

/// What the judgement is made of. Absent means: could not be found out.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// Effective user 0.
    pub is_root: bool,
    /// This process's `/` is not that of pid 1.
    pub in_chroot: Option<bool>,
    /// Major and minor of the running kernel.
    pub kernel: Option<(u32, u32)>,
    /// What [`Cgroups::detect`] says: what is missing, or why it refuses.
    pub cgroups: Option<Result<Vec<Lack>, String>>,
    /// A cgroup v2 hierarchy is mounted, whatever controllers it has.
    pub unified: bool,
    /// `bpf` is among the file systems, so the kernel has the system call.
    pub bpf: bool,
    /// Type information for tools; the programs do not need it.
    pub btf: bool,
    /// `overlay` is there, or is a module that can be loaded.
    pub overlay: bool,
    /// `user.max_user_namespaces`.
    pub user_namespaces: Option<u64>,
    /// Filters can be loaded.
    pub seccomp: bool,
    /// Free bytes where images will lie.
    pub free_bytes: Option<u64>,
    /// A time service says that the clock is right.
    pub clock_synchronised: Option<bool>,
    /// A swap device is on.
    pub swap: bool,
    /// `net.ipv4.ip_forward`.
    pub ip_forward: Option<bool>,
    /// Types of the CNI plugins of the list that counts, in order; empty: Gantry wires pods itself.
    pub cni_plugins: Vec<String>,
    /// Names of all processes.
    pub processes: BTreeSet<String>,
    /// Tables of the legacy packet filter.
    pub legacy_tables: BTreeSet<String>,
    /// Chains of kube-proxy are in the packet filter; absent without a tool that shows them.
    pub kube_proxy_rules: Option<bool>,
    /// TCP ports that somebody listens on, on any address but loopback.
    pub ports: BTreeSet<u16>,
}

fn fine(what: impl Into<String>) -> Finding {
    finding(Level::Fine, what, "")
}

fn finding(level: Level, what: impl Into<String>, remedy: impl Into<Cow<'static, str>>) -> Finding {
    Finding {
        level,
        what: what.into(),
        remedy: remedy.into(),
    }
}

/// `good`, or the finding when it is not.
fn must(is_good: bool, good: &str, bad: &str, remedy: &'static str) -> Finding {
    match is_good {
        true => fine(good),
        false => finding(Level::Missing, bad, remedy),
    }
}

/// What these facts mean, the worst last.
pub fn judge(facts: &Facts) -> Vec<Finding> {
    let mut found = vec![
        must(facts.is_root, "root", "not root", "run it as root"),
        kernel(facts.kernel),
    ];
    if facts.in_chroot == Some(true) {
        let remedy = "start it outside the chroot, or use a container that pivots its root";
        found.push(finding(Level::Missing, "in a chroot", remedy));
    }
    found.extend(cgroups(facts));
    found.push(must(
        facts.bpf,
        "BPF",
        "the kernel has no BPF file system",
        "use a kernel with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF",
    ));
    if !facts.btf {
        let remedy = "nothing; bpftool shows less without CONFIG_DEBUG_INFO_BTF";
        found.push(finding(Level::Advice, "no kernel type information", remedy));
    }
    found.push(must(
        facts.overlay,
        "overlay file system",
        "no overlay file system",
        "modprobe overlay; echo overlay > /etc/modules-load.d/overlay.conf",
    ));
    found.push(must(
        facts.seccomp,
        "seccomp filters",
        "no seccomp filters",
        "use a kernel with CONFIG_SECCOMP_FILTER",
    ));
    found.push(match facts.user_namespaces {
        Some(1..) => fine("user namespaces"),
        Some(0) => finding(
            Level::Advice,
            "no user namespaces: pods with hostUsers false fail",
            "sysctl -w user.max_user_namespaces=15000",
        ),
        None => finding(
            Level::Advice,
            "the kernel has no user namespaces",
            "pods with hostUsers: false need CONFIG_USER_NS",
        ),
    });
    found.extend(resources(facts));
    found.extend(neighbours(facts));
    found.sort_by_key(|finding| finding.level);
    found
}

fn kernel(version: Option<(u32, u32)>) -> Finding {
    let Some((major, minor)) = version else {
        return finding(Level::Advice, "unknown kernel version", "see uname -r");
    };
    let what = format!("kernel {major}.{minor}");
    match (major, minor) {
        version if version < KERNEL_MIN => finding(Level::Missing, what, "use Linux 6.1 or newer"),
        version if version < KERNEL_TESTED => {
            finding(Level::Advice, what, "tested from Linux 6.1 on: prefer that")
        }
        _ => fine(what),
    }
}

fn cgroups(facts: &Facts) -> Vec<Finding> {
    let mut found = vec![must(
        facts.unified,
        "cgroup v2",
        "cgroup v2 is not mounted: no Service works",
        "mkdir -p /sys/fs/cgroup/unified; mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
    )];
    match &facts.cgroups {
        Some(Err(words)) => found.push(finding(
            Level::Missing,
            words.clone(),
            "the agent does not start so",
        )),
        Some(Ok(lacks)) if lacks.is_empty() => found.push(fine("cgroup controllers")),
        Some(Ok(lacks)) => found.extend(
            lacks
                .iter()
                .map(|lack| finding(Level::Advice, lack.what.clone(), lack.remedy.clone())),
        ),
        None => {}
    }
    found
}

fn resources(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    match facts.free_bytes {
        Some(free) if free < FREE_BYTES_MIN => found.push(finding(
            Level::Advice,
            format!("{} MiB free at /var/lib/gantry", free >> 20),
            "images and logs want 2 GiB: mount a larger file system there",
        )),
        Some(free) => found.push(fine(format!("{} GiB free disk", free >> 30))),
        None => {}
    }
    if facts.clock_synchronised != Some(true) {
        let what = match facts.clock_synchronised {
            Some(_) => "the clock is not synchronised",
            None => "no time service is known here",
        };
        let remedy = "certificates and leases need the time: install systemd-timesyncd or chrony";
        found.push(finding(Level::Advice, what, remedy));
    }
    if facts.swap {
        let remedy = "pods may be swapped out instead of evicted: swapoff -a, and /etc/fstab";
        found.push(finding(Level::Advice, "swap is on", remedy));
    }
    found.push(match facts.ip_forward {
        Some(true) => fine("IP forwarding"),
        // The agent turns it on with the first pod, and `cleanup` puts it back.
        Some(false) => fine("IP forwarding is off; the agent turns it on"),
        None => finding(
            Level::Missing,
            "IP forwarding cannot be read",
            "mount /proc, with /proc/sys writable",
        ),
    });
    let without_veth = |plugin: &&String| WITHOUT_VETH.contains(&plugin.as_str());
    if let Some(plugin) = facts.cni_plugins.iter().find(without_veth) {
        let what =
            format!("CNI plugin {plugin} makes no veth: Gantry does not see its pods' packets");
        let remedy = "NetworkPolicy and the check of source addresses do not work for them: use a \
                      plugin that makes a veth, or none";
        found.push(finding(Level::Advice, what, remedy));
    }
    found
}

fn neighbours(facts: &Facts) -> Vec<Finding> {
    let runs = |name: &str| facts.processes.contains(name);
    let mut found = Vec::new();
    for (name, remedy) in [
        (
            "kubelet",
            "two node agents share /var/log/pods and the node's limits: stop it",
        ),
        ("k3s-agent", "it is a node agent too: stop it"),
        ("k3s-server", "it is a node agent too: stop it"),
    ] {
        if runs(name) {
            found.push(finding(
                Level::Missing,
                format!("{name} is running"),
                remedy,
            ));
        }
    }
    if runs("kube-proxy") || runs("cilium-agent") || facts.kube_proxy_rules == Some(true) {
        let remedy =
            "its rules catch Services before Gantry does: stop it, then kube-proxy --cleanup";
        found.push(finding(
            Level::Missing,
            "another Service proxy's rules",
            remedy,
        ));
    }
    if runs("containerd") || runs("dockerd") {
        let remedy = "nothing; but their containers are not counted in what pods may use";
        found.push(finding(
            Level::Advice,
            "another container runtime is running",
            remedy,
        ));
    }
    if facts.kube_proxy_rules.is_none() && !facts.legacy_tables.is_empty() {
        let remedy = "look for KUBE- chains yourself: iptables-save is not installed";
        found.push(finding(
            Level::Advice,
            "packet filter rules of unknown origin",
            remedy,
        ));
    }
    if facts.ports.contains(&10_250) && !runs("kubelet") {
        let remedy = "nothing; Gantry opens no port there, but a kubelet would";
        found.push(finding(Level::Advice, "port 10250 is taken", remedy));
    }
    found
}

/// The exit code's truth.
pub fn is_usable(findings: &[Finding]) -> bool {
    findings.iter().all(|f| f.level < Level::Missing)
}

/// The report, no line wider than 60 columns.
pub fn render(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let mark = match finding.level {
            Level::Fine => "ok    ",
            Level::Advice => "note  ",
            Level::Missing => "MISS  ",
        };
        wrap(&mut text, mark, "      ", &finding.what);
        if !finding.remedy.is_empty() {
            wrap(&mut text, "      -> ", "         ", &finding.remedy);
        }
    }
    let missing = findings.iter().filter(|f| f.level == Level::Missing);
    match missing.count() {
        0 => text.push_str("This machine can run Gantry.\n"),
        count => text.push_str(&format!("{count} must be mended first.\n")),
    }
    text
}

fn wrap(text: &mut String, first: &str, rest: &str, words: &str) {
    let mut line = first.to_owned();
    let mut is_empty = true;
    for word in words.split_whitespace() {
        if !is_empty && line.chars().count() + 1 + word.chars().count() > COLUMNS {
            text.push_str(line.trim_end());
            text.push('\n');
            line = rest.to_owned();
            is_empty = true;
        }
        if !is_empty {
            line.push(' ');
        }
        line.push_str(word);
        is_empty = false;
    }
    text.push_str(line.trim_end());
    text.push('\n');
}

impl Facts {
    /// Looks at this machine; changes nothing.
    pub fn read(lib: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(path).ok();
        let mounts = text("/proc/self/mountinfo").unwrap_or_default();
        let systems = text("/proc/filesystems").unwrap_or_default();
        let has_system = |name: &str| systems.lines().any(|l| l.split('\t').nth(1) == Some(name));
        let release = text("/proc/sys/kernel/osrelease").unwrap_or_default();
        let actions = text("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
        let number = |path: &str| text(path).and_then(|t| t.trim().parse().ok());
        let swaps = text("/proc/swaps").unwrap_or_default();
        let tables = text("/proc/net/ip_tables_names").unwrap_or_default();
        let is_root = nix::unistd::geteuid().is_root();
        Self {
            is_root,
            in_chroot: in_chroot(),
            kernel: kernel_version(&release),
            cgroups: Some(match Cgroups::detect(Policy::default()) {
                Ok(cgroups) => Ok(cgroups.lacks().to_vec()),
                Err(error) => Err(error.to_string()),
            }),
            unified: mounts.lines().any(|l| l.contains(" - cgroup2 ")),
            bpf: has_system("bpf"),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            overlay: has_system("overlay") || has_module(release.trim(), "/overlay.ko"),
            user_namespaces: number("/proc/sys/user/max_user_namespaces"),
            seccomp: actions.contains("errno"),
            free_bytes: free_bytes(lib),
            clock_synchronised: None,
            swap: swaps.lines().count() > 1,
            ip_forward: number("/proc/sys/net/ipv4/ip_forward").map(|on| on != 0),
            cni_plugins: crate::network::third_party_plugins(),
            processes: processes(),
            legacy_tables: tables.lines().map(str::to_owned).collect(),
            kube_proxy_rules: kube_proxy_rules(),
            ports: listening(&[
                text("/proc/net/tcp").unwrap_or_default(),
                text("/proc/net/tcp6").unwrap_or_default(),
            ]),
        }
        .with_clock()
    }

    fn with_clock(mut self) -> Self {
        let by_systemd = Path::new("/run/systemd/timesync/synchronized").exists();
        let services = ["chronyd", "ntpd", "ntpsec", "systemd-timesyn"];
        let has_service = services.iter().any(|name| self.processes.contains(*name));
        self.clock_synchronised = match (by_systemd, has_service) {
            (true, _) => Some(true),
            // It keeps the clock; whether it has it yet only it knows.
            (false, true) => Some(!self.processes.contains("systemd-timesyn")),
            (false, false) => None,
        };
        self
    }
}

/// `6.1.0-18-amd64` -> 6, 1
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(['.', '-']);
    Some((
        parts.next()?.parse().ok()?,
        parts.next()?.trim().parse().ok()?,
    ))
}

fn in_chroot() -> Option<bool> {
    let own = fs::metadata("/").ok()?;
    let init = fs::metadata(Path::new("/proc/1").join("root")).ok()?;
    Some((own.dev(), own.ino()) != (init.dev(), init.ino()))
}

fn has_module(release: &str, file: &str) -> bool {
    let list = |name| fs::read_to_string(format!("/lib/modules/{release}/{name}"));
    let listed = [list("modules.dep"), list("modules.builtin")];
    listed.iter().flatten().any(|names| {
        let mut paths = names
            .lines()
            .map(|l| l.split(':').next().unwrap_or_default());
        paths.any(|path| path.contains(file))
    })
}

/// Of the nearest directory that is there.
fn free_bytes(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|p| p.exists())?;
    let stat = nix::sys::statvfs::statvfs(there).ok()?;
    Some(stat.blocks_available() * stat.fragment_size())
}

fn processes() -> BTreeSet<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok())
        .map(|name| name.trim_end().to_owned())
        .collect()
}

/// By the tools that a machine with such rules has.
fn kube_proxy_rules() -> Option<bool> {
    let commands: [&[&str]; 3] = [
        &["iptables-save", "-t", "nat"],
        &["iptables-legacy-save", "-t", "nat"],
        &["nft", "list", "tables"],
    ];
    let mut known = None;
    for command in commands {
        let output = std::process::Command::new(command[0])
            .args(&command[1..])
            .stdin(std::process::Stdio::null())
            .output();
        if let Ok(output) = output {
            let text = String::from_utf8_lossy(&output.stdout);
            let theirs = text.contains("KUBE-SERVICES") || text.contains("kube-proxy");
            known = Some(known.unwrap_or(false) || theirs);
        }
    }
    known
}

/// Ports of listening sockets that are not on loopback, from `/proc/net/tcp`.
fn listening(tables: &[String]) -> BTreeSet<u16> {
    const LISTEN: &str = "0A";
    let lines = tables.iter().flat_map(|table| table.lines().skip(1));
    lines
        .filter_map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let (address, port) = fields.next()?.split_once(':')?;
            let state = fields.nth(1)?;
            let loopback = address.ends_with("7F") && address.len() == 8
                || address == "00000000000000000000000001000000";
            let port = u16::from_str_radix(port, 16).ok()?;
            (state == LISTEN && !loopback).then_some(port)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn good() -> Facts {
        Facts {
            is_root: true,
            in_chroot: Some(false),
            kernel: Some((6, 1)),
            cgroups: Some(Ok(Vec::new())),
            unified: true,
            bpf: true,
            btf: true,
            overlay: true,
            user_namespaces: Some(100),
            seccomp: true,
            free_bytes: Some(10 << 30),
            clock_synchronised: Some(true),
            ip_forward: Some(false),
            kube_proxy_rules: Some(false),
            ..Facts::default()
        }
    }

    #[test]
    fn a_cni_plugin_without_veth_is_told() {
        let mut facts = good();
        facts.cni_plugins = vec!["bridge".into(), "portmap".into()];
        assert!(judge(&facts).iter().all(|f| f.level == Level::Fine));
        facts.cni_plugins = vec!["ipvlan".into()];
        let findings = judge(&facts);
        let told: Vec<_> = findings
            .iter()
            .filter(|f| f.level == Level::Advice)
            .collect();
        assert!(
            matches!(told[..], [one] if one.what.contains("ipvlan")),
            "{told:?}"
        );
        assert!(is_usable(&findings));
    }

    #[test]
    fn a_good_machine_has_no_remedy() {
        let findings = judge(&good());
        assert!(
            findings.iter().all(|f| f.level == Level::Fine),
            "{findings:?}"
        );
        assert!(is_usable(&findings));
        assert!(render(&findings).ends_with("This machine can run Gantry.\n"));
    }

    #[test]
    fn every_must_have_alone_makes_the_machine_unusable_and_says_what_to_do() {
        let break_it: [fn(&mut Facts); 12] = [
            |f| f.is_root = false,
            |f| f.in_chroot = Some(true),
            |f| f.kernel = Some((4, 19)),
            |f| f.cgroups = Some(Err("no device controller".into())),
            |f| f.unified = false,
            |f| f.bpf = false,
            |f| f.overlay = false,
            |f| f.seccomp = false,
            |f| f.ip_forward = None,
            |f| f.processes = ["kubelet".to_owned()].into(),
            |f| f.processes = ["kube-proxy".to_owned()].into(),
            |f| f.kube_proxy_rules = Some(true),
        ];
        for (index, break_it) in break_it.iter().enumerate() {
            let mut facts = good();
            break_it(&mut facts);
            let findings = judge(&facts);
            assert!(!is_usable(&findings), "{index}");
            let missing: Vec<_> = findings
                .iter()
                .filter(|f| f.level == Level::Missing)
                .collect();
            assert_eq!(missing.len(), 1, "{index}: {missing:?}");
            assert!(!missing[0].remedy.is_empty(), "{index}");
        }
    }

    #[test]
    fn what_is_only_worth_knowing_stops_nothing() {
        let facts = Facts {
            btf: false,
            kernel: Some((5, 15)),
            cgroups: Some(Ok(vec![Lack {
                controller: Some("io"),
                what: "io limits are not held".into(),
                remedy: String::new(),
            }])),
            user_namespaces: Some(0),
            free_bytes: Some(1),
            clock_synchronised: None,
            swap: true,
            processes: ["containerd".to_owned()].into(),
            ports: [10_250].into(),
            legacy_tables: ["nat".to_owned()].into(),
            kube_proxy_rules: None,
            ..good()
        };
        let findings = judge(&facts);
        assert!(is_usable(&findings));
        let notes = findings.iter().filter(|f| f.level == Level::Advice);
        assert_eq!(notes.count(), 10, "{findings:?}");
    }

    #[test]
    fn kernels_and_sockets_are_read() {
        assert_eq!(kernel_version("6.1.0-18-amd64\n"), Some((6, 1)));
        assert_eq!(kernel_version("6.18\n"), Some((6, 18)));
        assert_eq!(kernel_version("next"), None);
        let table = "  sl  local_address rem_address   st\n\
            0: 0100007F:1F90 00000000:0000 0A 0\n   1: 00000000:280A 00000000:0000 0A 0\n\
            2: 0200A8C0:0016 0300A8C0:D431 01 0\n";
        assert_eq!(listening(&[table.into()]), [10_250].into());
    }

    #[test]
    fn this_machine_is_read_without_a_panic() {
        let facts = Facts::read(Path::new("/var/lib/gantry"));
        assert!(facts.kernel.is_some() && !facts.processes.is_empty());
    }

    proptest! {
        #[test]
        fn no_line_is_wider_than_sixty_columns(what in "([a-zäß.:/]{1,50} ){0,30}") {
            let findings = [finding(Level::Missing, what, "a remedy of some length, in words that have to be wrapped")];
            for line in render(&findings).lines() {
                prop_assert!(line.chars().count() <= COLUMNS, "{}", line);
            }
        }
    }
}
