//! A container's own cgroup: made, limited and joined without a helper process.
//!
//! ```text
//! Leaf::create: mkdir in every hierarchy ─► limits ─► clone3 (v2: INTO_CGROUP) ─► Leaf::enter (v1)
//! ```
//! The agent makes and limits the levels above. Only a caller without an agent (a test) finds them
//! missing: then they are made here, limits are not.
//!
//! Invariants: nothing but the path in the spec and its missing ancestors is made; a limit that the
//! spec names and this machine cannot hold is an error, never skipped.
//!
//! Source: runtime-spec `config-linux.md`, runc's `libcontainer/cgroups/fs` and `fs2` for the
//! conversions from v1's words.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use gantry_shim::cgroup as hierarchies;
use libcontainer::oci_spec::runtime::{LinuxCpu, LinuxDeviceType, LinuxMemory, LinuxResources};
use rustix::fs::{Mode, OFlags};

/// Where the cgroup file systems are mounted.
const MOUNT: &str = "/sys/fs/cgroup";
/// Making a node is harmless, opening it is what the rules are about: as every runtime allows.
const MKNOD_RULES: [&str; 2] = ["c *:* m", "b *:* m"];

/// One value for one file; `controller` names the v1 hierarchy and is ignored on v2.
#[derive(Clone, PartialEq, Debug)]
struct Setting {
    controller: &'static str,
    file: String,
    value: String,
}

/// The container's directory in each hierarchy.
pub(crate) struct Leaf {
    directories: Vec<(String, PathBuf)>,
    unified: Option<OwnedFd>,
}

impl Leaf {
    /// Makes the cgroup and writes its limits. One that exists already is limited anew.
    pub(crate) fn create(path: &Path, resources: &LinuxResources) -> anyhow::Result<Self> {
        let path = path.to_str().context("linux.cgroupsPath is not UTF-8")?;
        let unified = hierarchies::is_v2();
        let roots = if unified {
            vec![(String::new(), PathBuf::from(MOUNT))]
        } else {
            let table = own_cgroups().context("cannot read /proc/self/cgroup")?;
            mounted(&table, |root| root.join("cgroup.procs").exists())
        };
        let mut directories = Vec::with_capacity(roots.len());
        for (controllers, root) in roots {
            let directory = hierarchies::below(&root, path);
            make(&root, &directory, unified)
                .with_context(|| format!("cannot make the cgroup {}", directory.display()))?;
            directories.push((controllers, directory));
        }
        let mut leaf = Self {
            directories,
            unified: None,
        };
        for setting in settings(resources, unified)? {
            leaf.write(&setting)?;
        }
        if unified {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = &leaf.directories[0].1;
            let fd = rustix::fs::open(directory, flags, Mode::empty());
            leaf.unified = Some(fd.with_context(|| format!("open {}", directory.display()))?);
        } else {
            leaf.limit_devices(resources)?;
            leaf.inherit_cpuset()?;
        }
        Ok(leaf)
    }

    /// What clone3 takes; none on v1, where [`Leaf::enter`] is needed.
    pub(crate) fn unified(&self) -> Option<BorrowedFd<'_>> {
        use std::os::fd::AsFd;
        self.unified.as_ref().map(AsFd::as_fd)
    }

    /// Puts the caller, a process of one thread, into every hierarchy of v1.
    ///
    /// By `tasks`, and by itself: whoever moves a whole process (`cgroup.procs`), or another one,
    /// first waits for an RCU grace period, 5 to 20 ms in which no cgroup of the machine can be made
    /// (Linux `cgroup_procs_write_start`; a thread that moves itself is spared from 5.5 on).
    pub(crate) fn enter(&self) -> anyhow::Result<()> {
        if self.unified.is_some() {
            return Ok(());
        }
        for (_, directory) in &self.directories {
            let file = directory.join("tasks");
            write(&file, "0").with_context(|| format!("cannot join {}", file.display()))?;
        }
        Ok(())
    }

    fn directory(&self, controller: &str) -> Option<&Path> {
        let has = |controllers: &str| {
            self.unified().is_some()
                || controllers.is_empty()
                || controllers.split(',').any(|c| c == controller)
        };
        let found = self.directories.iter().find(|(c, _)| has(c))?;
        Some(&found.1)
    }

    fn write(&self, setting: &Setting) -> anyhow::Result<()> {
        let Setting {
            controller,
            file,
            value,
        } = setting;
        let directory = self
            .directory(controller)
            .with_context(|| format!("{file}: this machine has no {controller} controller"))?;
        let file = directory.join(file);
        write(&file, value).with_context(|| format!("cannot write {value} to {}", file.display()))
    }

    fn limit_devices(&self, resources: &LinuxResources) -> anyhow::Result<()> {
        let Some(directory) = self.directory("devices") else {
            // The agent says so at its start; a spec without rules asks for nothing.
            return Ok(());
        };
        let open = |name: &str| OpenOptions::new().write(true).open(directory.join(name));
        let (mut allow, mut deny) = (open("devices.allow")?, open("devices.deny")?);
        for (permit, rule) in device_rules(resources) {
            let file = if permit { &mut allow } else { &mut deny };
            file.write_all(rule.as_bytes())
                .with_context(|| format!("device rule {rule:?} in {}", directory.display()))?;
        }
        Ok(())
    }

    /// A v1 cpuset without CPUs takes no process.
    fn inherit_cpuset(&self) -> anyhow::Result<()> {
        match self.directory("cpuset") {
            Some(directory) => Ok(fill_cpuset(directory)?),
            None => Ok(()),
        }
    }
}

/// Hierarchies of v1 that hold controllers, by the lines of `/proc/self/cgroup`.
fn mounted(table: &str, is_hierarchy: impl Fn(&Path) -> bool) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    for line in table.lines() {
        let Some(controllers) = line.split(':').nth(1) else {
            continue;
        };
        // v2 beside v1 has none, systemd's own hierarchy a name instead.
        if controllers.is_empty() || controllers.starts_with("name=") {
            continue;
        }
        let joint = Path::new(MOUNT).join(controllers);
        let directory = match controllers.split_once(',') {
            // A joint hierarchy may be mounted by its first controller's name only.
            Some((first, _)) if !joint.exists() => Path::new(MOUNT).join(first),
            _ => joint,
        };
        // Known to the kernel and mounted nowhere: a directory there would be an ordinary one.
        if is_hierarchy(&directory) {
            found.push((controllers.to_owned(), directory));
        }
    }
    found
}

fn make(root: &Path, directory: &Path, unified: bool) -> io::Result<()> {
    match fs::create_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => return other,
    }
    let parent = directory.parent().filter(|p| *p != root);
    let parent = parent.ok_or_else(|| io::Error::other("the hierarchy's root is gone"))?;
    make(root, parent, unified)?;
    if unified {
        let all = read(&parent.join("cgroup.controllers"))?;
        for controller in all.split_ascii_whitespace() {
            write(
                &parent.join("cgroup.subtree_control"),
                &format!("+{controller}"),
            )?;
        }
    } else if parent.join("cpuset.cpus").exists() {
        fill_cpuset(parent)?;
    }
    match fs::create_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// From the nearest level that has CPUs: whoever else makes the levels above may not have filled
/// them yet.
fn fill_cpuset(directory: &Path) -> io::Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let mut lacking = Vec::new();
        let mut level = Some(directory);
        while let Some(directory) = level {
            let value = read(&directory.join(name))?;
            if value.is_empty() {
                lacking.push(directory);
                level = directory.parent();
                continue;
            }
            for below in lacking.iter().rev() {
                write(&below.join(name), &value)?;
            }
            break;
        }
    }
    Ok(())
}

/// `/proc/self/cgroup`, nearly always in one read.
fn own_cgroups() -> io::Result<String> {
    let mut table = [0; 4096];
    let length = fs::File::open("/proc/self/cgroup")?.read(&mut table)?;
    if length == table.len() {
        return fs::read_to_string("/proc/self/cgroup");
    }
    Ok(String::from_utf8_lossy(&table[..length]).into_owned())
}

/// A short file of the kernel's, in one read.
fn read(file: &Path) -> io::Result<String> {
    let mut line = [0; 4096];
    let length = fs::File::open(file)?.read(&mut line)?;
    Ok(String::from_utf8_lossy(&line[..length]).trim().to_owned())
}

/// Cgroup files take one write per value and are never made.
fn write(file: &Path, value: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(file)?;
    file.write_all(value.as_bytes())
}

/// What the spec's numbers are in this machine's files, in the order in which they are written.
fn settings(resources: &LinuxResources, v2: bool) -> anyhow::Result<Vec<Setting>> {
    let unsupported = [
        ("blockIO", resources.block_io().is_some()),
        ("network", resources.network().is_some()),
        (
            "rdma",
            resources.rdma().as_ref().is_some_and(|r| !r.is_empty()),
        ),
    ];
    if let Some((name, _)) = unsupported.iter().find(|(_, set)| *set) {
        bail!("linux.resources.{name} is not supported by this runtime");
    }
    let mut list = Vec::new();
    if let Some(cpu) = resources.cpu() {
        cpu_settings(cpu, v2, &mut list);
    }
    if let Some(memory) = resources.memory() {
        memory_settings(memory, v2, &mut list);
    }
    if let Some(pids) = resources.pids() {
        let value = if pids.limit() > 0 {
            pids.limit().to_string()
        } else {
            "max".to_owned()
        };
        add(&mut list, "pids", "pids.max", value);
    }
    for page in resources.hugepage_limits().iter().flatten() {
        let (size, limit) = (page.page_size(), page.limit());
        let name = if v2 { "max" } else { "limit_in_bytes" };
        add(
            &mut list,
            "hugetlb",
            &format!("hugetlb.{size}.{name}"),
            limit,
        );
    }
    for (file, value) in resources.unified().iter().flatten() {
        if !v2 {
            bail!("linux.resources.unified: {file} needs cgroup v2");
        }
        if file.contains('/') {
            bail!("linux.resources.unified: {file:?} is no file name");
        }
        add(&mut list, "", file, value);
    }
    Ok(list)
}

fn add(list: &mut Vec<Setting>, controller: &'static str, file: &str, value: impl ToString) {
    list.push(Setting {
        controller,
        file: file.to_owned(),
        value: value.to_string(),
    });
}

fn cpu_settings(cpu: &LinuxCpu, v2: bool, list: &mut Vec<Setting>) {
    let shares = cpu.shares().filter(|s| *s != 0);
    let quota = cpu.quota().filter(|q| *q != 0);
    let period = cpu.period().filter(|p| *p != 0);
    if v2 {
        if let Some(shares) = shares {
            add(list, "cpu", "cpu.weight", weight(shares));
        }
        if quota.is_some() || period.is_some() {
            let quota = quota.filter(|q| *q > 0);
            let quota = quota.map_or_else(|| "max".to_owned(), |q| q.to_string());
            let period = period.map_or_else(String::new, |p| format!(" {p}"));
            add(list, "cpu", "cpu.max", quota + &period);
        }
    } else {
        // The period first: a quota is checked against it.
        let names = ["cpu.shares", "cpu.cfs_period_us"];
        for (name, value) in names.into_iter().zip([shares, period]) {
            if let Some(value) = value {
                add(list, "cpu", name, value);
            }
        }
        if let Some(quota) = quota {
            add(list, "cpu", "cpu.cfs_quota_us", quota);
        }
    }
    if let Some(burst) = cpu.burst() {
        let name = if v2 {
            "cpu.max.burst"
        } else {
            "cpu.cfs_burst_us"
        };
        add(list, "cpu", name, burst);
    }
    if let Some(idle) = cpu.idle() {
        add(list, "cpu", "cpu.idle", idle);
    }
    for (name, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_ref().filter(|v| !v.is_empty()) {
            add(list, "cpuset", name, value);
        }
    }
}

/// `cpu.shares` to `cpu.weight`, the quadratic through (2, 1), (1024, 100), (262144, 10000).
fn weight(shares: u64) -> u64 {
    let l = (shares.clamp(2, 262_144) as f64).log2();
    let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
    // 1024 must give 100, not 101 by a rounding error of the last bit.
    ((10f64.powf(exponent) - 1e-9).ceil() as u64).clamp(1, 10_000)
}

fn memory_settings(memory: &LinuxMemory, v2: bool, list: &mut Vec<Setting>) {
    let text = |bytes: i64| {
        if bytes < 0 && v2 {
            "max".to_owned()
        } else {
            bytes.to_string()
        }
    };
    let (limit, swap) = (memory.limit(), memory.swap());
    if v2 {
        if let (Some(limit), Some(swap)) = (limit, swap) {
            // v1's number holds memory and swap together.
            let alone = if swap < 0 || limit < 0 {
                swap
            } else {
                (swap - limit).max(0)
            };
            add(list, "memory", "memory.swap.max", text(alone));
        }
        if let Some(limit) = limit {
            add(list, "memory", "memory.max", text(limit));
        }
        if let Some(low) = memory.reservation() {
            add(list, "memory", "memory.low", text(low));
        }
        return;
    }
    if let Some(limit) = limit {
        add(list, "memory", "memory.limit_in_bytes", limit);
    }
    // After the limit: the sum may not be below it.
    if let Some(swap) = swap {
        add(list, "memory", "memory.memsw.limit_in_bytes", swap);
    }
    if let Some(soft) = memory.reservation() {
        add(list, "memory", "memory.soft_limit_in_bytes", soft);
    }
}

/// v1's lines, each with whether it allows. On v2 the agent's program holds the rules.
fn device_rules(resources: &LinuxResources) -> Vec<(bool, String)> {
    let Some(rules) = resources.devices().as_ref().filter(|r| !r.is_empty()) else {
        return Vec::new();
    };
    let number = |n: Option<i64>| match n {
        Some(n) if n >= 0 => n.to_string(),
        _ => "*".to_owned(),
    };
    let line = |rule: &libcontainer::oci_spec::runtime::LinuxDeviceCgroup| {
        let kind = match rule.typ() {
            Some(LinuxDeviceType::B) => "b",
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => "c",
            _ => "a",
        };
        let access = rule.access().clone().unwrap_or_else(|| "rwm".to_owned());
        let (major, minor) = (number(rule.major()), number(rule.minor()));
        (rule.allow(), format!("{kind} {major}:{minor} {access}"))
    };
    let mut lines: Vec<(bool, String)> = rules.iter().map(line).collect();
    let all_allowed = lines
        .last()
        .is_some_and(|(allow, l)| *allow && l.starts_with('a'));
    if !all_allowed {
        lines.extend(MKNOD_RULES.map(|rule| (true, rule.to_owned())));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(value: serde_json::Value) -> LinuxResources {
        serde_json::from_value(value).unwrap()
    }

    fn lines(value: serde_json::Value, v2: bool) -> Vec<String> {
        settings(&resources(value), v2)
            .unwrap()
            .into_iter()
            .map(|s| format!("{}={}", s.file, s.value))
            .collect()
    }

    #[test]
    fn limits_are_written_in_each_versions_words() {
        let limits = serde_json::json!({
            "cpu": {"shares": 512, "quota": 50000, "period": 100000, "burst": 1000, "cpus": "0-1"},
            "memory": {"limit": 64, "swap": 64, "reservation": 32},
            "pids": {"limit": 9},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4}],
        });
        assert_eq!(
            lines(limits.clone(), false),
            [
                "cpu.shares=512",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=50000",
                "cpu.cfs_burst_us=1000",
                "cpuset.cpus=0-1",
                "memory.limit_in_bytes=64",
                "memory.memsw.limit_in_bytes=64",
                "memory.soft_limit_in_bytes=32",
                "pids.max=9",
                "hugetlb.2MB.limit_in_bytes=4",
            ]
        );
        assert_eq!(
            lines(limits, true),
            [
                "cpu.weight=59",
                "cpu.max=50000 100000",
                "cpu.max.burst=1000",
                "cpuset.cpus=0-1",
                "memory.swap.max=0",
                "memory.max=64",
                "memory.low=32",
                "pids.max=9",
                "hugetlb.2MB.max=4",
            ]
        );
    }

    #[test]
    fn no_limit_is_no_word_and_a_lifted_one_is_max() {
        assert!(lines(serde_json::json!({}), true).is_empty());
        let lifted = serde_json::json!({
            "cpu": {"quota": -1}, "memory": {"limit": -1, "swap": -1}, "pids": {"limit": 0},
        });
        assert_eq!(
            lines(lifted, true),
            [
                "cpu.max=max",
                "memory.swap.max=max",
                "memory.max=max",
                "pids.max=max"
            ]
        );
        assert_eq!((weight(2), weight(1024), weight(1 << 20)), (1, 100, 10_000));
    }

    #[test]
    fn what_cannot_be_held_is_refused() {
        let io = serde_json::json!({"blockIO": {"weight": 10}});
        assert!(settings(&resources(io), true).is_err());
        let unified = serde_json::json!({"unified": {"memory.high": "9"}});
        assert!(settings(&resources(unified.clone()), false).is_err());
        assert_eq!(lines(unified, true), ["memory.high=9"]);
        let path = serde_json::json!({"unified": {"../x": "9"}});
        assert!(settings(&resources(path), true).is_err());
    }

    #[test]
    fn device_rules_deny_first_and_let_nodes_be_made() {
        let rules = serde_json::json!({"devices": [
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 136, "access": "rwm"},
        ]});
        let want = [
            (false, "a *:* rwm"),
            (true, "c 136:* rwm"),
            (true, "c *:* m"),
            (true, "b *:* m"),
        ];
        assert_eq!(
            device_rules(&resources(rules)),
            want.map(|(allow, line)| (allow, line.to_owned()))
        );
        let all = serde_json::json!({"devices": [{"allow": true, "access": "rwm"}]});
        assert_eq!(
            device_rules(&resources(all)),
            [(true, "a *:* rwm".to_owned())]
        );
        assert!(device_rules(&resources(serde_json::json!({}))).is_empty());
    }

    #[test]
    fn hierarchies_without_controllers_are_left_alone() {
        let table = "0::/\n1:name=systemd:/init\nnonsense\n";
        assert!(mounted(table, |_| true).is_empty());
        let is_hierarchy = |root: &Path| !root.ends_with("memory");
        let found = mounted("3:pids:/x\n4:memory:/x\n", is_hierarchy);
        assert_eq!(found, [("pids".to_owned(), Path::new(MOUNT).join("pids"))]);
    }
}
