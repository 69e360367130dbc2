//! A pod's life as its containers see it: order of starts and ends, hooks, deadlines, last words; and
//! the processes, names and memory that its containers share.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cluster::Cluster;

const LIMIT: Duration = Duration::from_secs(90);

/// A directory of the host that containers write into and that outlives their pods.
struct Trace(tempfile::TempDir);

impl Trace {
    fn lines(&self, name: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.0.path().join(name)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

/// Init containers, sidecars, hooks, deadline and termination messages; what fails again and again waits.
pub(super) fn life_cycle(cluster: &mut Cluster) -> Result<()> {
    let trace = Trace(tempfile::tempdir()?);
    let at = trace.path().display();
    cluster.apply_ok(&failing(&trace))?;
    let sidecar = |name: &str| {
        format!(
            "    - name: {name}
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      restartPolicy: Always
      command: [sh, -c, \"trap 'echo {name} ends >> /trace/order; exit 0' TERM; echo {name} starts >> /trace/order; touch /trace/{name}; while :; do sleep 0.1; done\"]
      startupProbe: {{exec: {{command: [test, -e, /trace/{name}]}}, periodSeconds: 1, failureThreshold: 60}}
      volumeMounts: [{{name: trace, mountPath: /trace}}]
"
        )
    };
    let (a, b) = (sidecar("side-a"), sidecar("side-b"));
    cluster.apply_ok(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: ordered}}
spec:
  restartPolicy: OnFailure
  terminationGracePeriodSeconds: 20
  volumes: [{{name: trace, hostPath: {{path: {at}, type: Directory}}}}]
  initContainers:
    - name: first
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sh, -c, \"if test -e /trace/tried; then echo first done >> /trace/order; else touch /trace/tried; echo first failed >> /trace/order; exit 1; fi\"]
      volumeMounts: [{{name: trace, mountPath: /trace}}]
{a}    - name: second
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sh, -c, \"echo second >> /trace/order\"]
      volumeMounts: [{{name: trace, mountPath: /trace}}]
{b}  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sh, -c, \"echo main starts >> /trace/order; sleep 1; echo its last words > /dev/termination-log; echo main ends >> /trace/order\"]
      volumeMounts: [{{name: trace, mountPath: /trace}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: hooked}}
spec:
  terminationGracePeriodSeconds: 20
  volumes: [{{name: trace, hostPath: {{path: {at}, type: Directory}}}}]
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sh, -c, \"trap 'echo term >> /trace/hooks; exit 0' TERM; while :; do sleep 0.1; done\"]
      volumeMounts: [{{name: trace, mountPath: /trace}}]
      lifecycle:
        postStart: {{exec: {{command: [sh, -c, \"echo post >> /trace/hooks\"]}}}}
        preStop: {{exec: {{command: [sh, -c, \"echo pre >> /trace/hooks; sleep 0.5; echo pre done >> /trace/hooks\"]}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: late}}
spec:
  activeDeadlineSeconds: 2
  terminationGracePeriodSeconds: 1
  containers:
    - {{name: main, image: \"gantry.local/busybox:debian\", imagePullPolicy: IfNotPresent, command: [sleep, \"3600\"]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: talker}}
spec:
  restartPolicy: Never
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sh, -c, \"echo why it failed; exit 3\"]
      terminationMessagePolicy: FallbackToLogsOnError
"
    ))?;
    cluster.wait_ready("default", "hooked")?;
    cluster.ok(&["delete", "pod", "hooked", "--timeout=60s"])?;
    let hooks = trace.lines("hooks");
    ensure!(
        hooks == ["post", "pre", "pre done", "term"],
        "hooks: {hooks:?}"
    );
    cluster.wait_phase("default", "ordered", "Succeeded")?;
    let order = trace.lines("order");
    let wanted = [
        "first failed",
        "first done",
        "side-a starts",
        "second",
        "side-b starts",
        "main starts",
        "main ends",
        "side-b ends",
        "side-a ends",
    ];
    ensure!(order == wanted, "order: {order:?}");
    ensure!(message(cluster, "ordered")? == "its last words\n");
    cluster.wait_phase("default", "talker", "Failed")?;
    ensure!(message(cluster, "talker")? == "why it failed\n");
    cluster.wait_phase("default", "late", "Failed")?;
    let late = cluster.get(&["pod", "late"])?;
    ensure!(
        late["status"]["reason"] == "DeadlineExceeded",
        "{}",
        late["status"]
    );
    other_hooks(cluster, &trace)?;
    waits_longer_each_time(cluster, &trace)
}

/// Notes when it starts, in seconds, and fails.
fn failing(trace: &Trace) -> String {
    let at = trace.path().display();
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: failing}}
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{{name: trace, hostPath: {{path: {at}, type: Directory}}}}]
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sh, -c, \"date +%s >> /trace/starts; exit 1\"]
      volumeMounts: [{{name: trace, mountPath: /trace}}]
"
    )
}

/// The first time at once, then after 10 s, then after 20.
fn waits_longer_each_time(cluster: &Cluster, trace: &Trace) -> Result<()> {
    cluster.wait("the word that it waits", LIMIT, |c| {
        let pod = c.get(&["pod", "failing"])?;
        let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
        let words = waiting["message"].as_str().unwrap_or_default();
        Ok(waiting["reason"] == "CrashLoopBackOff" && words.starts_with("back-off "))
    })?;
    cluster.wait("four starts", LIMIT, |_| {
        Ok(trace.lines("starts").len() >= 4)
    })?;
    let starts = trace.lines("starts");
    let at: Vec<i64> = starts.iter().map(|s| s.parse()).collect::<Result<_, _>>()?;
    let gaps: Vec<i64> = at.windows(2).map(|two| two[1] - two[0]).collect();
    // Whole seconds: one less is the same; a busy machine is late.
    let is_late = |gap: i64, wanted: i64| (wanted - 1..wanted + 8).contains(&gap);
    ensure!(
        is_late(gaps[0], 0) && is_late(gaps[1], 10) && is_late(gaps[2], 20),
        "seconds between starts: {gaps:?}"
    );
    Ok(())
}

/// A hook that sleeps holds SIGTERM back, and one that asks is answered by what is still there.
fn other_hooks(cluster: &Cluster, trace: &Trace) -> Result<()> {
    let at = trace.path().display();
    cluster.apply_ok(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: other-hooks}}
spec:
  terminationGracePeriodSeconds: 20
  volumes: [{{name: trace, hostPath: {{path: {at}, type: Directory}}}}]
  containers:
    - name: sleeps
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sh, -c, \"trap 'echo term >> /trace/slept; exit 0' TERM; while :; do sleep 0.1; done\"]
      volumeMounts: [{{name: trace, mountPath: /trace}}]
      lifecycle:
        postStart: {{sleep: {{seconds: 1}}}}
        preStop: {{sleep: {{seconds: 4}}}}
    - name: asks
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [sh, -c, \"exec httpd -f -vv -p 8080 -h /etc 2>> /trace/asked\"]
      ports: [{{name: web, containerPort: 8080}}]
      volumeMounts: [{{name: trace, mountPath: /trace}}]
      lifecycle:
        preStop: {{httpGet: {{path: /hostname, port: web}}}}
"
    ))?;
    cluster.wait_ready("default", "other-hooks")?;
    ensure!(trace.lines("asked").is_empty(), "asked before its end");
    cluster.ok(&["delete", "pod", "other-hooks", "--wait=false"])?;
    let is_asked = |lines: Vec<String>| lines.iter().any(|l| l.contains("url:/hostname"));
    cluster.wait("the hook to ask", LIMIT, |_| {
        Ok(is_asked(trace.lines("asked")))
    })?;
    ensure!(
        trace.lines("slept").is_empty(),
        "SIGTERM before the hook's end"
    );
    cluster.wait("the pod to go", LIMIT, |c| {
        Ok(c.gantry(&["get", "pod", "other-hooks"])?.code != 0)
    })?;
    ensure!(
        trace.lines("slept") == ["term"],
        "no SIGTERM after the hook"
    );
    Ok(())
}

fn message(cluster: &Cluster, pod: &str) -> Result<String> {
    let pod = cluster.get(&["pod", pod])?;
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    Ok(ended["message"].as_str().unwrap_or_default().to_owned())
}

/// The pid, on the host, of the first process of a pod's container.
pub(super) fn host_pid(cluster: &Cluster, pod: &str, container: &str, run: u64) -> Result<u32> {
    let object = cluster.get(&["pod", pod])?;
    let uid = object["metadata"]["uid"].as_str().context("no uid")?;
    let file = PathBuf::from("/run/gantry/pods")
        .join(uid)
        .join(container)
        .join(run.to_string())
        .join("started");
    let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let pid = text
        .lines()
        .find_map(|line| line.strip_prefix("pid="))
        .with_context(|| format!("no pid in {text:?}"))?;
    Ok(pid.trim().parse()?)
}

fn namespace(pid: &str, kind: &str) -> Result<PathBuf> {
    let link = format!("/proc/{pid}/ns/{kind}");
    std::fs::read_link(&link).context(link)
}

fn two(name: &str, pod: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 1
  hostname: box
  subdomain: shelf
  hostAliases: [{{ip: 192.0.2.7, hostnames: [seven.example]}}]
  dnsPolicy: None
  dnsConfig:
    nameservers: [192.0.2.53]
    searches: [shelf.example]
    options: [{{name: ndots, value: \"3\"}}]
{pod}  containers:
    - {{name: a, image: \"gantry.local/busybox:debian\", imagePullPolicy: IfNotPresent, command: [sleep, \"3601\"]}}
    - {{name: b, image: \"gantry.local/busybox:debian\", imagePullPolicy: IfNotPresent, command: [sh, -c, \"(sleep 0.3 &); exec sleep 3602\"]}}
"
    )
}

/// Shared and own pid namespaces, /dev/shm, the host's namespaces, and a debug container.
pub(super) fn processes(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(&two("shared", "  shareProcessNamespace: true\n"))?;
    cluster.apply_ok(&two("apart", ""))?;
    cluster.apply_ok(&two("hosts", "  hostPID: true\n  hostIPC: true\n"))?;
    for pod in ["shared", "apart", "hosts"] {
        cluster.wait_ready("default", pod)?;
    }
    let spaces = |pod: &str, kind: &str| -> Result<Vec<PathBuf>> {
        ["a", "b"]
            .iter()
            .map(|c| namespace(&host_pid(cluster, pod, c, 0)?.to_string(), kind))
            .collect()
    };
    let (shared, apart) = (spaces("shared", "pid")?, spaces("apart", "pid")?);
    ensure!(shared[0] == shared[1], "{shared:?}");
    ensure!(apart[0] != apart[1], "{apart:?}");
    let host = namespace("self", "pid")?;
    ensure!(spaces("hosts", "pid")? == [host.clone(), host.clone()]);
    let ipc = namespace("self", "ipc")?;
    ensure!(spaces("hosts", "ipc")? == [ipc.clone(), ipc]);
    let ipc = spaces("apart", "ipc")?;
    ensure!(ipc[0] == ipc[1], "one IPC namespace a pod: {ipc:?}");
    one_memory(cluster)?;
    first_process(cluster)?;
    debug(cluster)
}

fn sh(cluster: &Cluster, pod: &str, container: &str, script: &str) -> Result<String> {
    cluster.ok(&["exec", pod, "-c", container, "--", "sh", "-c", script])
}

fn one_memory(cluster: &Cluster) -> Result<()> {
    sh(cluster, "apart", "a", "echo hello > /dev/shm/note")?;
    let note = sh(cluster, "apart", "b", "cat /dev/shm/note")?;
    ensure!(
        note.starts_with("hello\n"),
        "/dev/shm is not shared: {note}"
    );
    let names = sh(cluster, "apart", "a", "hostname; cat /etc/hosts")?;
    ensure!(names.starts_with("box\n"), "{names}");
    ensure!(
        names.contains("box.shelf.default.svc.cluster.local"),
        "{names}"
    );
    ensure!(names.contains("seven.example"), "{names}");
    let resolver = sh(cluster, "apart", "a", "cat /etc/resolv.conf")?;
    for line in [
        "nameserver 192.0.2.53",
        "search shelf.example",
        "options ndots:3",
    ] {
        ensure!(
            resolver.lines().any(|l| l == line),
            "no {line:?}: {resolver}"
        );
    }
    Ok(())
}

/// Process 1 of the shared namespace reaps orphans; its death restarts the containers together.
fn first_process(cluster: &Cluster) -> Result<()> {
    let seen = sh(cluster, "shared", "a", "cat /proc/1/comm; ps")?;
    ensure!(seen.starts_with("init\n"), "process 1: {seen}");
    ensure!(seen.contains("3601") && seen.contains("3602"), "{seen}");
    cluster.wait("orphans to be reaped", LIMIT, |c| {
        let states = sh(
            c,
            "shared",
            "a",
            "cat /proc/[0-9]*/status | grep State: ; true",
        )?;
        Ok(!states.contains('Z'))
    })?;
    let init = host_pid(cluster, "shared", "gantry.init", 0)?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(init)?),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    cluster.wait("both containers to run again", LIMIT, |c| {
        let pod = c.get(&["pod", "shared"])?;
        let all = pod["status"]["containerStatuses"].as_array().cloned();
        let again = |s: &Value| s["restartCount"] == 1 && s["state"]["running"].is_object();
        Ok(all.unwrap_or_default().iter().all(again))
    })?;
    let again = |name: &str| -> Result<PathBuf> {
        namespace(&host_pid(cluster, "shared", name, 1)?.to_string(), "pid")
    };
    let (a, b) = (again("a")?, again("b")?);
    ensure!(a == b, "after the restart: {a:?} {b:?}");
    Ok(())
}

/// A debug container sees its target's processes, and its end changes nothing.
fn debug(cluster: &Cluster) -> Result<()> {
    cluster.ok(&[
        "debug",
        "apart",
        "--image=gantry.local/busybox:debian",
        "--image-pull-policy=IfNotPresent",
        "--target=a",
        "-c",
        "look",
        "--",
        "sleep",
        "3603",
    ])?;
    let (target, look) = (
        host_pid(cluster, "apart", "a", 0)?,
        host_pid(cluster, "apart", "look", 0)?,
    );
    let spaces = (
        namespace(&target.to_string(), "pid")?,
        namespace(&look.to_string(), "pid")?,
    );
    ensure!(spaces.0 == spaces.1, "{spaces:?}");
    let seen = sh(cluster, "apart", "look", "tr '\\0' ' ' < /proc/1/cmdline")?;
    ensure!(
        seen.contains("sleep 3601"),
        "process 1 of the target: {seen}"
    );
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(look)?),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    cluster.wait("the debug container's end", LIMIT, |c| {
        let pod = c.get(&["pod", "apart"])?;
        let state = &pod["status"]["ephemeralContainerStatuses"][0]["state"];
        Ok(state["terminated"]["exitCode"] == 137 && crate::cluster::is_ready(&pod))
    })?;
    let refused = cluster.gantry(&["debug", "apart", "--image=x", "-c", "a"])?;
    ensure!(
        refused.code == 1 && refused.stderr.contains("spec.ephemeralContainers[1].name"),
        "{refused:?}"
    );
    Ok(())
}
