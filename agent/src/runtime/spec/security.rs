//! What a container may do: capabilities, masked paths, devices, sysctls.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::str::FromStr;

use gantry_api::k8s_openapi::api::core::v1::{Container, PodSpec, SecurityContext};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType};
use serde_json::{Value, json};

use super::{GivenNode, SpecError};

/// Docker's default set: mask `a80425fb`.
pub const DEFAULT_CAPABILITIES: [Cap; 14] = [
    caps::Capability::CAP_CHOWN,
    caps::Capability::CAP_DAC_OVERRIDE,
    caps::Capability::CAP_FSETID,
    caps::Capability::CAP_FOWNER,
    caps::Capability::CAP_MKNOD,
    caps::Capability::CAP_NET_RAW,
    caps::Capability::CAP_SETGID,
    caps::Capability::CAP_SETUID,
    caps::Capability::CAP_SETFCAP,
    caps::Capability::CAP_SETPCAP,
    caps::Capability::CAP_NET_BIND_SERVICE,
    caps::Capability::CAP_SYS_CHROOT,
    caps::Capability::CAP_KILL,
    caps::Capability::CAP_AUDIT_WRITE,
];

/// One capability.
pub type Cap = caps::Capability;

/// Hidden from unprivileged containers, as containerd does.
pub const MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// Not writable for unprivileged containers.
pub const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Namespaced and harmless to others: kubelet's safe list.
/// Source: Kubernetes `pkg/kubelet/sysctl/safe_sysctls.go`.
const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

/// What this machine and this process can give a container. Detected once.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Host {
    /// The unified hierarchy is what limits containers.
    pub cgroup_v2: bool,
    /// Swap can be limited.
    pub swap_accounting: bool,
    /// The agent's own permitted capabilities: nothing more can be given away.
    pub capabilities: BTreeSet<CapNumber>,
    /// Bytes of memory, for the OOM score.
    pub memory_capacity_bytes: u64,
    /// The device nodes of `/dev`, for privileged containers.
    pub devices: Vec<LinuxDevice>,
    /// `--allowed-unsafe-sysctls`: names, or prefixes that end with `*`.
    pub unsafe_sysctls: Vec<String>,
}

/// A capability's number: what the kernel orders them by.
pub type CapNumber = u8;

impl Host {
    /// Looks at `/proc`, `/sys` and `/dev`; what cannot be read counts as absent.
    pub fn detect() -> Self {
        let cgroup_v2 = gantry_shim::cgroup::is_v2();
        let permitted = caps::read(None, caps::CapSet::Permitted).unwrap_or_default();
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let total_kib = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"))
            .and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok());
        let v1_swap = Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists();
        Self {
            cgroup_v2,
            swap_accounting: v1_swap || (cgroup_v2 && Path::new("/proc/swaps").exists()),
            capabilities: permitted.iter().map(|c| c.index()).collect(),
            memory_capacity_bytes: total_kib.unwrap_or(0) * 1024,
            devices: devices(Path::new("/dev"), 3),
            unsafe_sysctls: Vec::new(),
        }
    }
}

impl Host {
    /// The kernel lets only CAP_SYS_RESOURCE lower an oom_score_adj.
    pub fn may_lower_oom_score(&self) -> bool {
        self.capabilities.contains(&Cap::CAP_SYS_RESOURCE.index())
    }
}

/// Device nodes below `directory`, without those that every container gets of its own.
fn devices(directory: &Path, depth: u32) -> Vec<LinuxDevice> {
    const OWN: [&str; 5] = ["pts", "shm", "mqueue", "fd", "console"];
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if OWN.iter().any(|own| name == *own) {
            continue;
        }
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        let kind = metadata.file_type();
        if kind.is_dir() && depth > 0 {
            found.extend(devices(&path, depth - 1));
        }
        let kind = if kind.is_char_device() {
            LinuxDeviceType::C
        } else if kind.is_block_device() {
            LinuxDeviceType::B
        } else {
            continue;
        };
        let number = metadata.rdev();
        let device = LinuxDeviceBuilder::default()
            .path(path)
            .typ(kind)
            .major(i64::from(libc::major(number)))
            .minor(i64::from(libc::minor(number)))
            .file_mode(metadata.mode() & 0o7777)
            .uid(metadata.uid())
            .gid(metadata.gid())
            .build();
        found.extend(device);
    }
    found
}

/// The set a container gets: Docker's defaults, plus `add`, minus `drop`; `ALL` comes first.
/// Source: containerd `internal/cri/opts/spec_linux_opts.go`.
pub(super) fn capabilities(context: &SecurityContext, host: &Host) -> Result<Vec<Cap>, SpecError> {
    let available = |cap: &CapNumber| host.capabilities.contains(cap);
    if context.privileged.unwrap_or(false) {
        return Ok(ordered(&host.capabilities));
    }
    let wanted = context.capabilities.clone().unwrap_or_default();
    let (add, drop) = (
        wanted.add.unwrap_or_default(),
        wanted.drop.unwrap_or_default(),
    );
    let is_all = |name: &&String| name.eq_ignore_ascii_case("ALL");
    let mut set: BTreeSet<CapNumber> = DEFAULT_CAPABILITIES
        .iter()
        .map(Cap::index)
        .filter(available)
        .collect();
    if add.iter().any(|n| is_all(&n)) {
        set.clone_from(&host.capabilities);
    }
    if drop.iter().any(|n| is_all(&n)) {
        set.clear();
    }
    for name in add.iter().filter(|n| !is_all(n)) {
        let cap = parse("add", name)?.index();
        if !available(&cap) {
            let message = format!("{name}: the agent on this node does not have it");
            return Err(SpecError::invalid(
                "securityContext.capabilities.add",
                message,
            ));
        }
        set.insert(cap);
    }
    for name in drop.iter().filter(|n| !is_all(n)) {
        set.remove(&parse("drop", name)?.index());
    }
    Ok(ordered(&set))
}

fn ordered(set: &BTreeSet<CapNumber>) -> Vec<Cap> {
    let mut all: Vec<Cap> = caps::all().into_iter().collect();
    all.sort_by_key(Cap::index);
    all.into_iter()
        .filter(|c| set.contains(&c.index()))
        .collect()
}

/// `NET_ADMIN` or `CAP_NET_ADMIN`.
fn parse(list: &str, name: &str) -> Result<Cap, SpecError> {
    let upper = name.to_ascii_uppercase();
    let full = if upper.starts_with("CAP_") {
        upper
    } else {
        format!("CAP_{upper}")
    };
    Cap::from_str(&full).map_err(|_| {
        let field = format!("securityContext.capabilities.{list}");
        SpecError::invalid(field, format!("unknown capability {name:?}"))
    })
}

pub(super) fn adds_sys_admin(container: &Container) -> bool {
    let add = || {
        container
            .security_context
            .as_ref()?
            .capabilities
            .as_ref()?
            .add
            .as_ref()
    };
    add().is_some_and(|names| {
        names.iter().any(|n| {
            n.trim_start_matches("CAP_")
                .eq_ignore_ascii_case("SYS_ADMIN")
        })
    })
}

/// The device rules of cgroup v1 (on v2 the agent's own program holds the same list).
pub(super) fn device_rules(privileged: bool, given: &[GivenNode]) -> Value {
    if privileged {
        return json!([{ "allow": true, "access": "rwm" }]);
    }
    let rule = |kind: &str, major: i64, minor: Option<i64>| {
        let mut rule = json!({ "allow": true, "type": kind, "major": major, "access": "rwm" });
        if let Some(minor) = minor {
            rule["minor"] = json!(minor);
        }
        rule
    };
    // null, zero, full, random, urandom; tty, console, ptmx; pts.
    let character: [(i64, Option<i64>); 9] = [
        (1, Some(3)),
        (1, Some(5)),
        (1, Some(7)),
        (1, Some(8)),
        (1, Some(9)),
        (5, Some(0)),
        (5, Some(1)),
        (5, Some(2)),
        (136, None),
    ];
    let mut rules = vec![json!({ "allow": false, "access": "rwm" })];
    rules.extend(character.map(|(major, minor)| rule("c", major, minor)));
    rules.extend(given.iter().map(|node| {
        let device = &node.device;
        let kind = if device.typ() == LinuxDeviceType::B {
            "b"
        } else {
            "c"
        };
        let mut rule = rule(kind, device.major(), Some(device.minor()));
        rule["access"] = json!(node.access);
        rule
    }));
    Value::Array(rules)
}

/// A device node of this machine as it is to appear in a container.
///
/// # Errors
/// In words: there is none at this path.
pub fn device_node(host_path: &Path, container_path: &Path) -> Result<LinuxDevice, String> {
    let metadata = fs::metadata(host_path)
        .map_err(|error| format!("device {}: {error}", host_path.display()))?;
    let kind = metadata.file_type();
    let kind = if kind.is_char_device() {
        LinuxDeviceType::C
    } else if kind.is_block_device() {
        LinuxDeviceType::B
    } else {
        return Err(format!("{} is no device node", host_path.display()));
    };
    let number = metadata.rdev();
    LinuxDeviceBuilder::default()
        .path(container_path)
        .typ(kind)
        .major(i64::from(libc::major(number)))
        .minor(i64::from(libc::minor(number)))
        .file_mode(metadata.mode() & 0o7777)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build()
        .map_err(|error| format!("device {}: {error}", host_path.display()))
}

/// Which namespace a sysctl belongs to; the kernel has no others that a pod could have of its own.
/// Source: Kubernetes `component-helpers/node/util/sysctl/namespace.go`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SysctlNamespace {
    Net,
    Ipc,
    Uts,
}

fn sysctl_namespace(name: &str) -> Option<SysctlNamespace> {
    const IPC: [&str; 3] = ["kernel.shm", "kernel.msg", "fs.mqueue."];
    const UTS: [&str; 2] = ["kernel.domainname", "kernel.hostname"];
    if name.starts_with("net.") {
        Some(SysctlNamespace::Net)
    } else if name == "kernel.sem" || IPC.iter().any(|prefix| name.starts_with(prefix)) {
        Some(SysctlNamespace::Ipc)
    } else if UTS.contains(&name) {
        Some(SysctlNamespace::Uts)
    } else {
        None
    }
}

/// Whether `--allowed-unsafe-sysctls` makes sense as it is.
///
/// # Errors
/// In words, for whoever started the agent.
pub fn check_unsafe_sysctls(patterns: &[String]) -> Result<(), String> {
    for pattern in patterns {
        let stem = pattern.strip_suffix('*').unwrap_or(pattern);
        if stem.contains('*') || sysctl_namespace(stem).is_none() {
            return Err(format!(
                "{pattern:?}: want the name of a sysctl that has a value per pod (net.*, \
                 kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.*), or a prefix of one with * at \
                 its end"
            ));
        }
    }
    Ok(())
}

/// `securityContext.sysctls`: the safe ones, and those that this node allows.
pub(super) fn sysctls(pod: &PodSpec, host: &Host) -> Result<BTreeMap<String, String>, SpecError> {
    let wanted = pod
        .security_context
        .as_ref()
        .and_then(|c| c.sysctls.clone())
        .unwrap_or_default();
    let allowed = |name: &str| {
        host.unsafe_sysctls
            .iter()
            .any(|pattern| match pattern.strip_suffix('*') {
                Some(prefix) => name.starts_with(prefix),
                None => name == pattern,
            })
    };
    let mut sysctls = BTreeMap::new();
    for sysctl in wanted {
        let name = sysctl.name.replace('/', ".");
        if !SAFE_SYSCTLS.contains(&name.as_str()) && !allowed(&name) {
            return Err(SpecError::Refused(format!(
                "forbidden sysctl: {name:?} not allowlisted; an operator may allow it on this node \
                 with gantry-agent run --allowed-unsafe-sysctls"
            )));
        }
        let of_host = match sysctl_namespace(&name) {
            Some(SysctlNamespace::Ipc) => pod.host_ipc == Some(true),
            Some(SysctlNamespace::Net | SysctlNamespace::Uts) => pod.host_network == Some(true),
            None => true,
        };
        if of_host {
            let message =
                format!("forbidden sysctl: {name:?} not allowed with the host's namespace");
            return Err(SpecError::Refused(message));
        }
        sysctls.insert(name, sysctl.value);
    }
    Ok(sysctls)
}
