//! From a container of a PodSpec to an OCI runtime spec: pure, everything it needs is in
//! [`SpecInput`].
//!
//! ```text
//! Pod, Container ─┐
//! image config   ─┼─► build ─► oci Spec ─► ShimRuntime ─► config.json ─► gantry-rt
//! Identity, Host ─┤            seccomp_of, allows_privilege_escalation ─► ContainerSpec
//! paths          ─┘
//! ```
//! * [`identity`] reads the image's passwd and group files (confined below the rootfs): who it runs as;
//! * [`command`] is entrypoint, arguments and `$(VAR)`;
//! * [`mounts`] is what appears where; [`security`] is capabilities, masks, devices, sysctls;
//! * [`app_armor`] is the profile that the kernel holds the process to.
//!
//! Invariants: `linux.seccomp` is never set (gantry-rt loads the compiled filter), `noNewPrivileges`
//! is true or absent, `cgroupsPath` is absolute, PATH and HOME are always in the environment (the
//! library would otherwise look them up with the image's own NSS modules), a field that cannot be
//! honoured is an error and never dropped.
//!
//! Source: containerd's CRI plugin (`internal/cri/server/container_create_linux.go`) and kubelet
//! (`pkg/kubelet/kuberuntime`), whose defaults and wordings these are.

pub mod app_armor;
pub mod command;
pub mod identity;
pub mod mounts;
pub mod security;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gantry_api::k8s_openapi::api::core::v1::{Container, Pod, PodSpec, SecurityContext};
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{LinuxDevice, Spec};
use serde_json::{Value, json};

use self::identity::Identity;
use self::security::Host;
use super::Seccomp;
use crate::cgroups::limits;
use crate::devices::plan::{Hook, Mount};
use crate::user_namespaces::{RANGE_LENGTH, UserNamespace};
use crate::volumes::ReadyVolume;
#[cfg(doc)]
use crate::volumes::sub_path;
use crate::volumes::sub_path::SubPath;

/// `PATH` of an image that sets none, as Docker's.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Everything a container's spec is made of.
#[derive(Clone, Copy)]
pub struct SpecInput<'a> {
    /// The pod, defaulted and validated.
    pub pod: &'a Pod,
    /// One of its containers or init containers.
    pub container: &'a Container,
    /// What the image says.
    pub image: &'a ImageConfiguration,
    /// The mounted root file system, absolute.
    pub rootfs: &'a Path,
    /// Who it runs as: [`identity::resolve`].
    pub identity: &'a Identity,
    /// The container's own variables, resolved and expanded ([`command::expand`]), in order. The
    /// image's variables and PATH, HOME, HOSTNAME are added here, below these.
    pub env: &'a [(String, String)],
    /// The pod's host name (the node's with host network).
    pub hostname: &'a str,
    /// The pod's volumes, by name.
    pub volumes: &'a BTreeMap<String, ReadyVolume>,
    /// How `subPath` becomes a path of the host: [`sub_path::mount`] (acting) or a fake.
    pub mount_sub_path: &'a dyn Fn(&SubPath<'_>) -> std::io::Result<PathBuf>,
    /// The files the agent keeps for the pod.
    pub files: PodFiles<'a>,
    /// The pinned namespaces; none means the host's.
    pub namespaces: Namespaces<'a>,
    /// The pod's cgroup, absolute; the container's is the directory of its name below.
    pub pod_cgroup: &'a str,
    /// What this machine can do.
    pub host: &'a Host,
    /// What its device plugins give it.
    pub devices: &'a GivenDevices,
    /// The AppArmor profile to run under: [`app_armor::decide`].
    pub app_armor: Option<&'a str>,
}

/// What device plugins give a container, looked up on this machine.
#[derive(Clone, Default, Debug)]
pub struct GivenDevices {
    /// Nodes to make.
    pub nodes: Vec<GivenNode>,
    /// Host paths to mount.
    pub mounts: Vec<Mount>,
    /// Programs of the host to run meanwhile.
    pub hooks: Vec<Hook>,
}

/// A device node that a container is given.
#[derive(Clone, Debug)]
pub struct GivenNode {
    /// As it is to appear.
    pub device: LinuxDevice,
    /// Where it is on the host.
    pub host_path: PathBuf,
    /// Of `rwm`.
    pub access: String,
}

/// Host paths of generated files that are mounted into every container; none: not mounted.
#[derive(Clone, Copy, Default, Debug)]
pub struct PodFiles<'a> {
    /// For `/etc/hosts`.
    pub hosts: Option<&'a Path>,
    /// For `/etc/hostname`.
    pub hostname: Option<&'a Path>,
    /// For `/etc/resolv.conf`.
    pub resolv_conf: Option<&'a Path>,
    /// For `terminationMessagePath`; exists, is empty, one per run.
    pub termination_log: Option<&'a Path>,
    /// The pod's shared `/dev/shm`; none: 64 MiB of its own per container.
    pub shm: Option<&'a Path>,
}

/// Paths of the pod's pinned namespaces.
#[derive(Clone, Copy, Default, Debug)]
pub struct Namespaces<'a> {
    /// None with `hostNetwork`.
    pub net: Option<&'a Path>,
    /// None with `hostIPC`.
    pub ipc: Option<&'a Path>,
    /// None with `hostNetwork`.
    pub uts: Option<&'a Path>,
    /// With `hostUsers: false`; it owns the others.
    pub user: Option<&'a UserNamespace>,
    /// The pid namespace to join; none: one of the container's own, or the host's with `hostPID`.
    pub pid: Option<&'a Path>,
}

/// The container cannot be made as its spec says. A retry needs another spec or image.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Understood, but this agent cannot do it: never ignored silently.
    #[error("{field}: {value} is not supported by this agent")]
    Unsupported {
        /// The field's path in the container or pod spec.
        field: &'static str,
        /// What it says.
        value: String,
    },
    /// A value that makes no sense.
    #[error("{field}: {message}")]
    Invalid {
        /// The field's path in the container or pod spec.
        field: String,
        /// Value and reason.
        message: String,
    },
    /// kubelet's own words, for errors that users search for.
    #[error("{0}")]
    Refused(String),
    /// A file of the image or a volume could not be read.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, to which path.
        context: String,
        /// The error of the call.
        source: std::io::Error,
    },
    /// The document does not fit the OCI schema: a bug here.
    #[error("oci spec: {0}")]
    Schema(#[source] serde_json::Error),
}

impl SpecError {
    fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            message: message.into(),
        }
    }
}

/// The seccomp profile of a container: its own, else its pod's, else Docker's default.
///
/// Privileged containers have none, as everywhere.
pub fn seccomp_of(pod: &Pod, container: &Container) -> Seccomp {
    if privileged(container) {
        return Seccomp::Unconfined;
    }
    let own = container
        .security_context
        .as_ref()
        .and_then(|c| c.seccomp_profile.as_ref());
    let pods = || {
        let context = pod.spec.as_ref()?.security_context.as_ref()?;
        context.seccomp_profile.as_ref()
    };
    match own.or_else(pods) {
        Some(profile) if profile.type_ == "Unconfined" => Seccomp::Unconfined,
        Some(profile) if profile.type_ == "Localhost" => {
            Seccomp::Localhost(profile.localhost_profile.clone().unwrap_or_default())
        }
        _ => Seccomp::RuntimeDefault,
    }
}

/// Whether no_new_privs stays off: Kubernetes' default is that it does.
pub fn allows_privilege_escalation(container: &Container) -> bool {
    let context = container.security_context.as_ref();
    // A process with CAP_SYS_ADMIN or of a privileged container could undo it anyway; the API
    // refuses the combination, and older objects mean "allowed".
    privileged(container)
        || security::adds_sys_admin(container)
        || context
            .and_then(|c| c.allow_privilege_escalation)
            .unwrap_or(true)
}

/// Whether nothing of the host is kept from it.
pub fn privileged(container: &Container) -> bool {
    container
        .security_context
        .as_ref()
        .and_then(|c| c.privileged)
        .unwrap_or(false)
}

/// The OCI spec of one container.
///
/// # Errors
/// Every [`SpecError`]; the text is meant for the container's `Waiting` message.
pub fn build(input: &SpecInput<'_>) -> Result<Spec, SpecError> {
    let pod_spec = input
        .pod
        .spec
        .as_ref()
        .ok_or_else(|| SpecError::invalid("spec", "the pod has none"))?;
    check_supported(pod_spec, input.container)?;
    let context = input.container.security_context.clone().unwrap_or_default();
    let mut document = json!({
        "ociVersion": "1.0.2",
        "process": process(input, &context)?,
        "root": {
            "path": input.rootfs,
            "readonly": context.read_only_root_filesystem.unwrap_or(false),
        },
        "mounts": mounts::list(input)?,
        "linux": linux(input, pod_spec, &context)?,
    });
    if !input.devices.hooks.is_empty() {
        document["hooks"] = hooks(&input.devices.hooks);
    }
    serde_json::from_value(document).map_err(SpecError::Schema)
}

/// What would change the container's meaning if it were left out.
fn check_supported(pod: &PodSpec, container: &Container) -> Result<(), SpecError> {
    let unsupported = |field, value: String| Err(SpecError::Unsupported { field, value });
    if let Some(device) = container.volume_devices.iter().flatten().next() {
        return unsupported("volumeDevices", device.name.clone());
    }
    let own = container.security_context.as_ref();
    let pods = pod.security_context.as_ref();
    if own.is_some_and(|c| c.se_linux_options.is_some())
        || pods.is_some_and(|c| c.se_linux_options.is_some())
    {
        return unsupported("securityContext.seLinuxOptions", "a label".into());
    }
    Ok(())
}

/// By moment, in the order of the grant.
fn hooks(hooks: &[Hook]) -> Value {
    let mut moments: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for hook in hooks {
        let mut value = json!({ "path": hook.path, "timeout": hook.timeout_s, "env": hook.env });
        if !hook.args.is_empty() {
            value["args"] = json!(hook.args);
        }
        moments.entry(&hook.moment).or_default().push(value);
    }
    json!(moments)
}

fn process(input: &SpecInput<'_>, context: &SecurityContext) -> Result<Value, SpecError> {
    let tty = input.container.tty.unwrap_or(false);
    let capabilities = security::capabilities(context, input.host)?;
    let names: Vec<String> = capabilities.iter().map(|c| c.to_string()).collect();
    // Inheritable and ambient stay empty: a set inheritable set was CVE-2022-24769.
    let mut process = json!({
        "terminal": tty,
        "user": {
            "uid": input.identity.uid,
            "gid": input.identity.gid,
            "additionalGids": input.identity.groups,
        },
        "args": command::line(input.container, input.image, input.env)?,
        "env": environment(input, tty),
        "cwd": command::working_directory(input.container, input.image),
        "capabilities": { "bounding": names, "effective": names, "permitted": names },
        "oomScoreAdj": limits::oom_score_adj(
            input.pod,
            input.container,
            input.host.memory_capacity_bytes,
        ),
    });
    if !allows_privilege_escalation(input.container) {
        process["noNewPrivileges"] = json!(true);
    }
    if let Some(profile) = input.app_armor {
        process["apparmorProfile"] = json!(profile);
    }
    Ok(process)
}

/// Image variables, then the container's, later ones winning; the four that must be there first.
fn environment(input: &SpecInput<'_>, tty: bool) -> Vec<String> {
    let mut order: Vec<String> = Vec::new();
    let mut values: BTreeMap<String, String> = BTreeMap::new();
    let mut set = |name: &str, value: &str| {
        if values.insert(name.to_owned(), value.to_owned()).is_none() {
            order.push(name.to_owned());
        }
    };
    set("PATH", DEFAULT_PATH);
    set("HOME", &input.identity.home);
    set("HOSTNAME", input.hostname);
    if tty {
        set("TERM", "xterm");
    }
    let image = input.image.config().as_ref().and_then(|c| c.env().as_ref());
    for entry in image.into_iter().flatten() {
        // An entry without "=" removes nothing and sets nothing, as with Docker.
        if let Some((name, value)) = entry.split_once('=') {
            set(name, value);
        }
    }
    for (name, value) in input.env {
        set(name, value);
    }
    order
        .iter()
        .map(|name| format!("{name}={}", values[name]))
        .collect()
}

fn linux(
    input: &SpecInput<'_>,
    pod: &PodSpec,
    context: &SecurityContext,
) -> Result<Value, SpecError> {
    let privileged = context.privileged.unwrap_or(false);
    let mut linux = json!({
        "cgroupsPath": format!("{}/{}", input.pod_cgroup, input.container.name),
        "namespaces": namespaces(input, pod),
        "resources": resources(input, privileged),
        "rootfsPropagation": mounts::rootfs_propagation(input.container),
    });
    if let Some(user) = input.namespaces.user {
        // The namespace has them already; here they tell gantry-rt who its root is.
        let map = json!([{
            "containerID": 0,
            "hostID": user.range.first,
            "size": RANGE_LENGTH,
        }]);
        linux["uidMappings"] = map.clone();
        linux["gidMappings"] = map;
    }
    let sysctls = security::sysctls(pod, input.host)?;
    if !sysctls.is_empty() {
        linux["sysctl"] = json!(sysctls);
    }
    // In a user namespace no node can be made: there they are mounted ([`mounts`]).
    let made = input.namespaces.user.is_none();
    let nodes = input.devices.nodes.iter().filter(|_| made);
    let given: Vec<&LinuxDevice> = nodes.map(|node| &node.device).collect();
    if !privileged && !given.is_empty() {
        linux["devices"] = serde_json::to_value(&given).map_err(SpecError::Schema)?;
    }
    if privileged {
        linux["devices"] = serde_json::to_value(&input.host.devices).map_err(SpecError::Schema)?;
    } else if context.proc_mount.as_deref() != Some("Unmasked") {
        linux["maskedPaths"] = json!(security::MASKED_PATHS);
        linux["readonlyPaths"] = json!(security::READONLY_PATHS);
    }
    // Absent means "the library's default list", which is not what either of them asks for.
    for key in ["maskedPaths", "readonlyPaths"] {
        if linux.get(key).is_none() {
            linux[key] = json!([]);
        }
    }
    Ok(linux)
}

fn namespaces(input: &SpecInput<'_>, pod: &PodSpec) -> Value {
    let mut list = vec![json!({"type": "mount"}), json!({"type": "cgroup"})];
    match input.namespaces.pid {
        Some(path) => list.push(json!({"type": "pid", "path": path})),
        None if pod.host_pid.unwrap_or(false) => {}
        None => list.push(json!({"type": "pid"})),
    }
    let joined = [
        ("network", input.namespaces.net),
        ("ipc", input.namespaces.ipc),
        ("uts", input.namespaces.uts),
        ("user", input.namespaces.user.map(|u| u.path.as_path())),
    ];
    for (kind, path) in joined {
        if let Some(path) = path {
            list.push(json!({"type": kind, "path": path}));
        }
    }
    Value::Array(list)
}

fn resources(input: &SpecInput<'_>, privileged: bool) -> Value {
    let limits = limits::container_limits(input.pod, input.container, &limits::Policy::default());
    let mut cpu = json!({ "shares": limits.cpu_shares });
    if let Some(quota) = limits.cpu_quota_us {
        cpu["quota"] = json!(quota);
        cpu["period"] = json!(limits::CPU_PERIOD_US);
    }
    let mut resources = json!({
        "cpu": cpu,
        "devices": security::device_rules(privileged, &input.devices.nodes),
    });
    if let Some(bytes) = limits.memory_limit_bytes {
        resources["memory"] = json!({ "limit": bytes });
        if input.host.swap_accounting {
            // Memory and swap together: none of it may be swap.
            resources["memory"]["swap"] = json!(bytes);
        }
    }
    if let Some(count) = limits.pids_max {
        resources["pids"] = json!({ "limit": count });
    }
    resources
}

#[cfg(test)]
mod tests;
