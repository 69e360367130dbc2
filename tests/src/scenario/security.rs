//! Who a container is, what it may do, and what of it the host sees.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{Skipped, sleeper};
use crate::cluster::{Cluster, is_ready};

/// Where profiles of this machine lie.
const PROFILES: &str = "/var/lib/gantry/seccomp";
/// How long a pod may take to say why it does not start.
const REFUSAL: Duration = Duration::from_secs(90);

fn sh(cluster: &Cluster, pod: &str, script: &str) -> Result<String> {
    cluster.ok(&["exec", pod, "--", "sh", "-c", script])
}

fn fails(cluster: &Cluster, pod: &str, script: &str) -> Result<()> {
    let output = cluster.gantry(&["exec", pod, "--", "sh", "-c", script])?;
    ensure!(
        output.code != 0,
        "{pod}: {script:?} worked: {}",
        output.stdout
    );
    Ok(())
}

/// The words in `describe` say why the pod waits.
fn refused(cluster: &Cluster, pod: &str, words: &str) -> Result<()> {
    cluster.wait(&format!("{words:?} for pod {pod}"), REFUSAL, |c| {
        Ok(c.ok(&["describe", "pod", pod])?.contains(words))
    })
}

/// Users, groups, capabilities, profiles, sysctls and masks are what the manifest says; what the
/// node cannot hold is refused in words.
pub(super) fn security(cluster: &mut Cluster) -> Result<()> {
    std::fs::create_dir_all(PROFILES)?;
    let profile = Path::new(PROFILES).join("no-mkdir.json");
    std::fs::write(
        &profile,
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]}"#,
    )?;
    let done = with_profile(cluster);
    std::fs::remove_file(profile)?;
    let _ = std::fs::remove_dir(PROFILES);
    done
}

fn with_profile(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(&sleeper(
        "profiled",
        "      securityContext:
        seccompProfile: {type: Localhost, localhostProfile: no-mkdir.json}
",
    ))?;
    cluster.apply_ok(&sleeper(
        "nobody-special",
        "      securityContext:
        runAsUser: 1000
        runAsGroup: 2000
        runAsNonRoot: true
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [all], add: [cap_net_bind_service]}
  securityContext:
    supplementalGroups: [3000]
    supplementalGroupsPolicy: Strict
    fsGroup: 4000
    sysctls: [{name: net.ipv4.ip_local_port_range, value: 40000 40100}]
",
    ))?;
    cluster.apply_ok(&sleeper(
        "bare",
        "      securityContext: {privileged: true}
",
    ))?;
    cluster.apply_ok(&sleeper(
        "unmasked",
        "      securityContext: {procMount: Unmasked}
",
    ))?;
    for (pod, context) in [
        (
            "no-profile",
            "seccompProfile: {type: Localhost, localhostProfile: none.json}",
        ),
        (
            "no-armor",
            "appArmorProfile: {type: Localhost, localhostProfile: gantry-none}",
        ),
        ("root-after-all", "runAsNonRoot: true"),
    ] {
        let more = format!("      securityContext:\n        {context}\n");
        cluster.apply_ok(&sleeper(pod, &more))?;
    }
    cluster.apply_ok(&sleeper(
        "unsafe",
        "  securityContext:
    sysctls: [{name: kernel.msgmax, value: \"65536\"}]
",
    ))?;
    let labels = cluster.apply(&sleeper(
        "labelled",
        "      securityContext: {seLinuxOptions: {type: spc_t}}
",
    ))?;
    ensure!(
        labels.stderr.contains("seLinuxOptions"),
        "{}",
        labels.stderr
    );
    refused(cluster, "no-profile", "put the profile there")?;
    refused(cluster, "no-armor", "Cannot enforce AppArmor")?;
    refused(cluster, "root-after-all", "image will run as root")?;
    refused(cluster, "unsafe", "forbidden sysctl: \"kernel.msgmax\"")?;

    cluster.wait_ready("default", "profiled")?;
    sh(cluster, "profiled", "touch /tmp-file && rm /tmp-file")?;
    fails(cluster, "profiled", "mkdir /made")?;
    fails(cluster, "profiled", "test -d /made")?;

    cluster.wait_ready("default", "nobody-special")?;
    let who = sh(cluster, "nobody-special", "id -u; id -g; id -G")?;
    let groups: BTreeSet<&str> = who.lines().nth(2).unwrap_or_default().split(' ').collect();
    ensure!(who.starts_with("1000\n2000\n"), "{who}");
    ensure!(groups == BTreeSet::from(["2000", "3000", "4000"]), "{who}");
    let status = sh(cluster, "nobody-special", "grep CapBnd /proc/1/status")?;
    ensure!(status.trim().ends_with("0000000000000400"), "{status}");
    fails(cluster, "nobody-special", "touch /file")?;
    let range = sh(
        cluster,
        "nobody-special",
        "cat /proc/sys/net/ipv4/ip_local_port_range",
    )?;
    ensure!(range.split_whitespace().eq(["40000", "40100"]), "{range}");

    cluster.wait_ready("default", "bare")?;
    sh(cluster, "bare", "grep ' /sys sysfs rw' /proc/mounts")?;
    fails(cluster, "bare", "grep ' /proc/kcore ' /proc/mounts")?;
    let masks = "grep -c ' /proc/[a-z]' /proc/mounts || true";
    cluster.wait_ready("default", "unmasked")?;
    let count = sh(cluster, "unmasked", masks)?;
    ensure!(count.trim() == "0", "unmasked: {count} masks");
    ensure!(
        sh(cluster, "profiled", masks)?.trim() != "0",
        "no masks at all"
    );
    Ok(())
}

fn mapped(name: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  hostUsers: false
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sleep\", \"3600\"]
      volumeMounts:
        - {{name: scratch, mountPath: /scratch}}
        - {{name: shared, mountPath: /shared}}
  volumes:
    - name: scratch
      emptyDir: {{}}
    - name: shared
      hostPath: {{path: /tmp/gantry-user-namespaces, type: DirectoryOrCreate}}
"
    )
}

/// `hostUsers: false`: root inside is nobody outside, each pod has ids of its own, and files have
/// the right owner on both sides.
pub(super) fn user_namespaces(cluster: &mut Cluster) -> Result<()> {
    let shared = Path::new("/tmp/gantry-user-namespaces");
    let done = in_user_namespaces(cluster, shared);
    let _ = std::fs::remove_dir_all(shared);
    done
}

fn in_user_namespaces(cluster: &Cluster, shared: &Path) -> Result<()> {
    for pod in ["one", "two"] {
        cluster.apply_ok(&mapped(pod))?;
    }
    // An old kernel, or a file system without id-mapped mounts: it must say so, and does.
    let refusal = |c: &Cluster| -> Result<Option<String>> {
        let words = c.ok(&["describe", "pod", "one"])?;
        Ok(words.contains("show the pod's ids").then_some(words))
    };
    cluster.wait(
        "pod one to run or to be refused",
        Duration::from_secs(60),
        |c| Ok(is_ready(&c.get(&["pod", "one"])?) || refusal(c)?.is_some()),
    )?;
    if let Some(words) = refusal(cluster)? {
        return Err(Skipped(format!("refused in words: {words}")).into());
    }
    cluster.wait_ready("default", "two")?;
    let mut firsts = BTreeSet::new();
    for pod in ["one", "two"] {
        let pid = init_of(cluster, pod)?;
        let map = std::fs::read_to_string(format!("/proc/{pid}/uid_map"))?;
        let words: Vec<u32> = map.split_whitespace().flat_map(str::parse).collect();
        let [0, first, 65_536] = words[..] else {
            bail!("{pod}: uid_map is {map:?}");
        };
        ensure!(first >= 0x7000_0000, "{pod}: starts at {first}");
        firsts.insert(first);
        // Outside, the container's root is its first id and has no capability over the host.
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let uid = status.lines().find_map(|l| l.strip_prefix("Uid:"));
        let uid = uid
            .and_then(|l| l.split_whitespace().next())
            .context("no Uid line")?;
        ensure!(uid == first.to_string(), "{pod}: runs as {uid}");
        // A command beside it is in the same namespace, and no more than the container.
        let of_exec = sh(cluster, pod, "cat /proc/self/uid_map")?;
        ensure!(
            of_exec.split_whitespace().eq(map.split_whitespace()),
            "exec: {of_exec}"
        );
        let own = std::fs::read_link(format!("/proc/{pid}/ns/user"))?;
        ensure!(
            own != std::fs::read_link("/proc/self/ns/user")?,
            "{pod}: the host's users"
        );
    }
    ensure!(firsts.len() == 2, "one range for two pods: {firsts:?}");

    let script = "id -u && stat -c %u:%g /bin/sh /etc/hosts /scratch && echo x > /written \
                  && touch /scratch/f /shared/of-root && chown 7:8 /shared/of-root \
                  && stat -c %u:%g /written /scratch/f /shared/of-root && rm /bin/true && mkdir /bin/true";
    let said = sh(cluster, "one", script)?;
    let want = "0\n0:0\n0:0\n0:0\n0:0\n0:0\n7:8\n";
    ensure!(said == want, "inside: {said:?}");
    use std::os::unix::fs::MetadataExt as _;
    let outside = std::fs::metadata(shared.join("of-root"))?;
    ensure!(
        (outside.uid(), outside.gid()) == (7, 8),
        "outside: {}",
        outside.uid()
    );
    // Capabilities count inside only: none of these is the container's to do.
    for script in [
        "mknod /dev/disk b 8 0",
        "echo 1 > /proc/sys/kernel/panic",
        "chown 70000 /scratch/f",
        "hostname other && mount -t tmpfs none /sys/kernel/debug",
    ] {
        fails(cluster, "one", script)?;
    }
    cluster.ok(&["delete", "pod", "one", "two", "--timeout=60s"])?;
    let left = std::fs::read_dir("/run/gantry/userns")?.count();
    ensure!(left == 0, "{left} id ranges are still held");
    Ok(())
}

/// The host's pid of a pod's first process, by its cgroup's membership in `/proc`.
fn init_of(cluster: &Cluster, pod: &str) -> Result<u32> {
    let uid = cluster.get(&["pod", pod])?["metadata"]["uid"]
        .as_str()
        .context("no uid")?
        .to_owned();
    let part = format!("pod{uid}/main");
    std::fs::read_dir("/proc")?
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok())
        .find(|pid| {
            std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
                .is_ok_and(|text| text.lines().any(|l| l.ends_with(&part)))
        })
        .with_context(|| format!("no process in {part}"))
}
