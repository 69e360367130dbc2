//! Level baseline: nothing by which a pod is known to leave its container. In the order of Kubernetes'
//! names for the checks.

use gantry_api::k8s_openapi::api::core::v1::{
    AppArmorProfile, LifecycleHandler, Probe, SELinuxOptions, SeccompProfile,
    WindowsSecurityContextOptions,
};

use super::checks::{Check, Violation, containers, plural, quoted, setters, sorted, violation};

const APPARMOR_ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";
/// What a container has anyway may be asked for.
const CAPABILITIES: [&str; 13] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];
/// Kernel settings of the pod alone, and the minor version since which each is allowed.
const SYSCTLS: [(&str, u32); 12] = [
    ("kernel.shm_rmid_forced", 0),
    ("net.ipv4.ip_local_port_range", 0),
    ("net.ipv4.ip_unprivileged_port_start", 0),
    ("net.ipv4.ping_group_range", 0),
    ("net.ipv4.tcp_syncookies", 0),
    ("net.ipv4.ip_local_reserved_ports", 27),
    ("net.ipv4.tcp_fin_timeout", 29),
    ("net.ipv4.tcp_keepalive_intvl", 29),
    ("net.ipv4.tcp_keepalive_probes", 29),
    ("net.ipv4.tcp_keepalive_time", 29),
    ("net.ipv4.tcp_rmem", 32),
    ("net.ipv4.tcp_wmem", 32),
];

/// What the pod breaks; `is_restricted` leaves out what the restricted level asks more sharply.
pub(super) fn violations(check: &Check<'_>, is_restricted: bool) -> Vec<Violation> {
    let own = |found: Option<Violation>| found.filter(|_| !is_restricted);
    [
        app_armor(check),
        own(capabilities(check)),
        host_namespaces(check),
        own(host_path(check)),
        host_ports(check),
        host_probes(check),
        privileged(check),
        proc_mount(check),
        se_linux(check),
        own(seccomp(check)),
        sysctls(check),
        host_process(check),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn app_armor(check: &Check<'_>) -> Option<Violation> {
    let allowed = |profile: &&AppArmorProfile| {
        matches!(profile.type_.as_str(), "RuntimeDefault" | "Localhost")
    };
    let wrong = |profile: Option<&AppArmorProfile>| {
        let wrong = profile.filter(|profile| !allowed(profile))?;
        Some(wrong.type_.clone())
    };
    let of_pod = wrong(check.security().and_then(|s| s.app_armor_profile.as_ref()));
    let mut values: Vec<String> = of_pod.iter().cloned().collect();
    let mut bad = Vec::new();
    for member in &check.members {
        let profile = member.security.and_then(|s| s.app_armor_profile.as_ref());
        if let Some(value) = wrong(profile) {
            bad.push(member.name);
            values.push(value);
        }
    }
    let mut who: Vec<String> = setters(of_pod.is_some(), &bad).into_iter().collect();
    for (key, value) in check.annotations.into_iter().flatten() {
        let fine =
            value.is_empty() || value == "runtime/default" || value.starts_with("localhost/");
        if key.starts_with(APPARMOR_ANNOTATION) && !fine {
            who.push(format!("annotation {key:?}"));
            values.push(value.clone());
        }
    }
    let values = sorted(values.iter().map(String::as_str));
    let reason = plural(
        "forbidden AppArmor profile",
        "forbidden AppArmor profiles",
        values.len(),
    );
    (!who.is_empty()).then(|| {
        let (who, values) = (who.join(" and "), quoted(values));
        let detail = format!("{who} must not set AppArmor profile type to {values}");
        violation(reason, detail)
    })
}

fn capabilities(check: &Check<'_>) -> Option<Violation> {
    let (bad, added) = added_capabilities(check, &CAPABILITIES);
    (!bad.is_empty()).then(|| {
        let (who, added) = (containers(&bad), quoted(added.iter().map(String::as_str)));
        let detail = format!("{who} must not include {added} in securityContext.capabilities.add");
        violation("non-default capabilities", detail)
    })
}

/// Containers that ask for more capabilities than allowed, and which, in order.
pub(super) fn added_capabilities<'a>(
    check: &Check<'a>,
    allowed: &[&str],
) -> (Vec<&'a str>, Vec<String>) {
    let mut all: Vec<String> = Vec::new();
    let mut bad = Vec::new();
    for member in &check.members {
        let capabilities = member.security.and_then(|s| s.capabilities.as_ref());
        let added = capabilities.and_then(|c| c.add.as_ref());
        let mut added = added.into_iter().flatten();
        let before = all.len();
        all.extend(
            added
                .by_ref()
                .filter(|name| !allowed.contains(&name.as_str()))
                .cloned(),
        );
        if all.len() > before {
            bad.push(member.name);
        }
    }
    all.sort();
    all.dedup();
    (bad, all)
}

fn host_namespaces(check: &Check<'_>) -> Option<Violation> {
    let spec = check.spec;
    let used: Vec<&str> = [
        ("hostNetwork=true", spec.host_network),
        ("hostPID=true", spec.host_pid),
        ("hostIPC=true", spec.host_ipc),
    ]
    .into_iter()
    .filter(|(_, used)| *used == Some(true))
    .map(|(word, _)| word)
    .collect();
    (!used.is_empty()).then(|| violation("host namespaces", used.join(", ")))
}

fn host_path(check: &Check<'_>) -> Option<Violation> {
    let volumes = check.spec.volumes.iter().flatten();
    let bad: Vec<&str> = volumes
        .filter(|volume| volume.host_path.is_some())
        .map(|volume| volume.name.as_str())
        .collect();
    let word = plural("volume", "volumes", bad.len());
    (!bad.is_empty()).then(|| {
        let detail = format!("{word} {}", quoted(bad.iter().copied()));
        violation("hostPath volumes", detail)
    })
}

fn host_ports(check: &Check<'_>) -> Option<Violation> {
    let of = |port: Option<i32>| port.filter(|port| *port != 0);
    let bad = check.bad(|member| member.ports.iter().any(|port| of(port.host_port).is_some()));
    let members = check.members.iter();
    let ports: Vec<String> = members
        .flat_map(|member| member.ports)
        .filter_map(|port| of(port.host_port))
        .map(|port| port.to_string())
        .collect();
    let ports = sorted(ports.iter().map(String::as_str));
    let verb = plural("uses", "use", bad.len());
    let word = plural("hostPort", "hostPorts", ports.len());
    (!bad.is_empty()).then(|| {
        let list: Vec<&str> = ports.into_iter().collect();
        let detail = format!("{} {verb} {word} {}", containers(&bad), list.join(", "));
        violation("hostPort", detail)
    })
}

fn host_probes(check: &Check<'_>) -> Option<Violation> {
    if check.minor < 34 {
        return None;
    }
    let mut hosts = Vec::new();
    let mut bad = Vec::new();
    for member in &check.members {
        let before = hosts.len();
        hosts.extend(member.probes.iter().flat_map(|probe| hosts_of_probe(probe)));
        if let Some(lifecycle) = member.lifecycle {
            let handlers = [&lifecycle.post_start, &lifecycle.pre_stop];
            hosts.extend(handlers.into_iter().flatten().flat_map(hosts_of_handler));
        }
        if hosts.len() > before {
            bad.push(member.name);
        }
    }
    let bad: Vec<&str> = sorted(bad).into_iter().collect();
    let hosts = sorted(hosts);
    let verb = plural("uses", "use", bad.len());
    let word = plural(
        "probe or lifecycle host",
        "probe or lifecycle hosts",
        hosts.len(),
    );
    (!bad.is_empty()).then(|| {
        let detail = format!("{} {verb} {word} {}", containers(&bad), quoted(hosts));
        violation("probe or lifecycle host", detail)
    })
}

fn hosts_of_probe(probe: &Probe) -> Vec<&str> {
    let http = probe.http_get.as_ref().and_then(|h| h.host.as_deref());
    let tcp = probe.tcp_socket.as_ref().and_then(|t| t.host.as_deref());
    let both = [http, tcp].into_iter().flatten();
    both.filter(|host| !host.is_empty()).collect()
}

fn hosts_of_handler(handler: &LifecycleHandler) -> Vec<&str> {
    let http = handler.http_get.as_ref().and_then(|h| h.host.as_deref());
    let tcp = handler.tcp_socket.as_ref().and_then(|t| t.host.as_deref());
    let both = [http, tcp].into_iter().flatten();
    both.filter(|host| !host.is_empty()).collect()
}

fn privileged(check: &Check<'_>) -> Option<Violation> {
    let bad = check.bad(|member| member.security.and_then(|s| s.privileged) == Some(true));
    (!bad.is_empty()).then(|| {
        let who = containers(&bad);
        let detail = format!("{who} must not set securityContext.privileged=true");
        violation("privileged", detail)
    })
}

fn proc_mount(check: &Check<'_>) -> Option<Violation> {
    if check.is_in_user_namespace() {
        return None;
    }
    let mut values = Vec::new();
    let mut bad = Vec::new();
    for member in &check.members {
        let kind = member.security.and_then(|s| s.proc_mount.as_deref());
        if let Some(kind) = kind.filter(|kind| *kind != "Default") {
            bad.push(member.name);
            values.push(kind);
        }
    }
    (!bad.is_empty()).then(|| {
        let (who, values) = (containers(&bad), quoted(sorted(values)));
        let detail = format!("{who} must not set securityContext.procMount to {values}");
        violation("procMount", detail)
    })
}

fn se_linux(check: &Check<'_>) -> Option<Violation> {
    let allowed = |kind: &str| match kind {
        "" | "container_t" | "container_init_t" | "container_kvm_t" => true,
        "container_engine_t" => check.minor >= 31,
        _ => false,
    };
    let set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    let kind = |options: &SELinuxOptions| options.type_.clone().unwrap_or_default();
    let is_bad = |options: &&SELinuxOptions| {
        !allowed(&kind(options)) || set(&options.user) || set(&options.role)
    };
    let of_pod = check.security().and_then(|s| s.se_linux_options.as_ref());
    let of_pod = of_pod.filter(is_bad);
    let mut wrong: Vec<&SELinuxOptions> = of_pod.into_iter().collect();
    let mut bad = Vec::new();
    for member in &check.members {
        let options = member.security.and_then(|s| s.se_linux_options.as_ref());
        if let Some(options) = options.filter(is_bad) {
            bad.push(member.name);
            wrong.push(options);
        }
    }
    let who = setters(of_pod.is_some(), &bad)?;
    let kinds: Vec<String> = wrong.iter().map(|options| kind(options)).collect();
    let kinds = sorted(kinds.iter().map(String::as_str).filter(|k| !allowed(k)));
    let mut what = Vec::new();
    if !kinds.is_empty() {
        let word = plural("type", "types", kinds.len());
        what.push(format!("{word} {}", quoted(kinds)));
    }
    if wrong.iter().any(|options| set(&options.user)) {
        what.push("user may not be set".to_owned());
    }
    if wrong.iter().any(|options| set(&options.role)) {
        what.push("role may not be set".to_owned());
    }
    let what = what.join("; ");
    let detail = format!("{who} set forbidden securityContext.seLinuxOptions: {what}");
    Some(violation("seLinuxOptions", detail))
}

/// The type of a profile that switches seccomp off.
pub(super) fn wrong_seccomp(profile: Option<&SeccompProfile>) -> Option<&str> {
    let kind = profile?.type_.as_str();
    (!matches!(kind, "RuntimeDefault" | "Localhost")).then_some(kind)
}

/// Who sets a profile that must not be; nobody: `None`.
pub(super) fn seccomp(check: &Check<'_>) -> Option<Violation> {
    let of_pod = wrong_seccomp(check.security().and_then(|s| s.seccomp_profile.as_ref()));
    let mut values: Vec<&str> = of_pod.into_iter().collect();
    let mut bad = Vec::new();
    for member in &check.members {
        let profile = member.security.and_then(|s| s.seccomp_profile.as_ref());
        if let Some(value) = wrong_seccomp(profile) {
            bad.push(member.name);
            values.push(value);
        }
    }
    let who = setters(of_pod.is_some(), &bad)?;
    let values = quoted(sorted(values));
    let detail = format!("{who} must not set securityContext.seccompProfile.type to {values}");
    Some(violation("seccompProfile", detail))
}

fn sysctls(check: &Check<'_>) -> Option<Violation> {
    let allowed = |name: &str| {
        let mut known = SYSCTLS.iter();
        known.any(|(known, since)| *known == name && check.minor >= *since)
    };
    let all = check.security().and_then(|s| s.sysctls.as_ref());
    let bad: Vec<&str> = all
        .into_iter()
        .flatten()
        .map(|sysctl| sysctl.name.as_str())
        .filter(|name| !allowed(name))
        .collect();
    (!bad.is_empty()).then(|| violation("forbidden sysctls", bad.join(", ")))
}

fn host_process(check: &Check<'_>) -> Option<Violation> {
    let set = |options: Option<&WindowsSecurityContextOptions>| {
        options.and_then(|options| options.host_process) == Some(true)
    };
    let of_pod = set(check.security().and_then(|s| s.windows_options.as_ref()));
    let bad = check.bad(|member| set(member.security.and_then(|s| s.windows_options.as_ref())));
    let who = setters(of_pod, &bad)?;
    let detail = format!("{who} must not set securityContext.windowsOptions.hostProcess=true");
    Some(violation("hostProcess", detail))
}
