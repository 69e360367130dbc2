//! What must work, each as a user would see it and as the kernel shows it.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cluster::{Cluster, Installation};

/// A named scenario.
pub struct Scenario {
    /// For `--scenario`.
    pub name: &'static str,
    run: fn(&mut Cluster) -> Result<()>,
}

/// All of them, each on a cluster of its own.
pub const ALL: [Scenario; 9] = [
    Scenario {
        name: "main-job",
        run: main_job,
    },
    Scenario {
        name: "limits",
        run: limits,
    },
    Scenario {
        name: "devices",
        run: devices,
    },
    Scenario {
        name: "isolation",
        run: isolation,
    },
    Scenario {
        name: "agent-kill",
        run: agent_kill,
    },
    Scenario {
        name: "control-kill",
        run: control_kill,
    },
    Scenario {
        name: "probes-and-restarts",
        run: probes_and_restarts,
    },
    Scenario {
        name: "bad-input",
        run: bad_input,
    },
    Scenario {
        name: "logs-and-exec",
        run: logs_and_exec,
    },
];

impl Scenario {
    /// Starts a cluster, runs, removes everything, counts what is left.
    pub fn run(&self, installation: &Installation) -> Result<()> {
        let mut cluster = Cluster::start(installation)?;
        let done = (self.run)(&mut cluster);
        if done.is_err() {
            eprintln!("{}", cluster.last_words());
            let pods = cluster.gantry(&["get", "pods,events", "-A", "-o", "wide"]);
            eprintln!("{}", pods.map(|o| o.stdout + &o.stderr).unwrap_or_default());
        }
        done?;
        cluster.finish()
    }
}

const MAIN_JOB: &str = include_str!("../fixtures/manifests/web.yaml");

/// Three nginx answer by name, from the host and from a pod; each of them does.
fn main_job(cluster: &mut Cluster) -> Result<()> {
    cluster.import("nginx")?;
    cluster.apply_ok(MAIN_JOB)?;
    cluster.ok(&[
        "-n",
        "web",
        "rollout",
        "status",
        "deployment/web",
        "--timeout=120s",
    ])?;
    cluster.wait_ready("web", "client")?;
    let service = cluster.get(&["service", "web", "-n", "web"])?;
    let address = service["spec"]["clusterIP"]
        .as_str()
        .context("no cluster IP")?
        .to_owned();
    let mut seen = BTreeSet::new();
    for _ in 0..60 {
        seen.insert(get(SocketAddr::new(address.parse()?, 80))?);
    }
    ensure!(seen.len() == 3, "from the host only {seen:?} answered");
    let script = "for i in $(seq 30); do wget -S -q -O /dev/null http://web 2>&1; done";
    let said = cluster.ok(&["-n", "web", "exec", "client", "--", "sh", "-c", script])?;
    let from_pod: BTreeSet<&str> = said
        .lines()
        .filter_map(|l| l.trim().strip_prefix("X-Pod: "))
        .collect();
    ensure!(
        from_pod.len() == 3,
        "from the pod only {from_pod:?} answered: {said}"
    );
    let resolved = cluster.ok(&[
        "-n",
        "web",
        "exec",
        "client",
        "--",
        "nslookup",
        "web.web.svc.cluster.local",
    ])?;
    ensure!(resolved.contains(&address), "nslookup: {resolved}");
    // A second apply of the same file changes nothing.
    let again = cluster.apply(MAIN_JOB)?;
    ensure!(
        again.code == 0 && !again.stdout.contains("configured"),
        "{}",
        again.stdout
    );
    cluster.ok(&["delete", "namespace", "web", "--timeout=60s"])?;
    let left = cluster.ok(&["get", "pods", "-A", "--no-headers"])?;
    ensure!(
        left.trim().is_empty(),
        "pods left after the namespace: {left}"
    );
    Ok(())
}

/// One HTTP request; returns the X-Pod header.
fn get(address: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let header = answer.lines().find_map(|l| l.strip_prefix("X-Pod: "));
    Ok(header
        .with_context(|| format!("no X-Pod in {answer:?}"))?
        .trim()
        .to_owned())
}

/// A pod that sleeps, with more of its container's configuration.
fn sleeper(name: &str, more: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {name}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sleep\", \"3600\"]
{more}"
    )
}

/// A file of the cgroup of a pod's container `main`, or of the pod's own with container "".
fn cgroup_file(
    cluster: &Cluster,
    pod: &str,
    container: &str,
    v2: &str,
    v1: (&str, &str),
) -> Result<String> {
    let object = cluster.get(&["pod", pod])?;
    let uid = object["metadata"]["uid"].as_str().context("no uid")?;
    let qos = object["status"]["qosClass"]
        .as_str()
        .context("no qosClass")?
        .to_lowercase();
    let below = format!("gantry/{qos}/pod{uid}/{container}");
    let unified = PathBuf::from("/sys/fs/cgroup").join(&below).join(v2);
    let path = if unified.exists() {
        unified
    } else {
        PathBuf::from("/sys/fs/cgroup")
            .join(v1.0)
            .join(&below)
            .join(v1.1)
    };
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.trim().to_owned())
}

/// requests and limits are in the kernel's files; a fork bomb and an OOM end at them.
fn limits(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(&sleeper(
        "limited",
        "      resources:
        requests: {cpu: 100m, memory: 32Mi}
        limits: {cpu: 250m, memory: 64Mi}
",
    ))?;
    cluster.wait_ready("default", "limited")?;
    let memory = cgroup_file(
        cluster,
        "limited",
        "main",
        "memory.max",
        ("memory", "memory.limit_in_bytes"),
    )?;
    ensure!(memory == "67108864", "memory limit: {memory}");
    let cpu = cgroup_file(
        cluster,
        "limited",
        "main",
        "cpu.max",
        ("cpu", "cpu.cfs_quota_us"),
    )?;
    ensure!(cpu == "25000 100000" || cpu == "25000", "cpu limit: {cpu}");
    let pids = cgroup_file(cluster, "limited", "", "pids.max", ("pids", "pids.max"))?;
    ensure!(pids == "4096", "pid limit of the pod: {pids}");
    // The file is 100 MB on a tmpfs that counts for the container.
    cluster.apply_ok(
        "apiVersion: v1
kind: Pod
metadata:
  name: greedy
spec:
  restartPolicy: Never
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"exec tail /dev/zero\"]
      resources:
        limits: {memory: 24Mi}
",
    )?;
    cluster.wait_phase("default", "greedy", "Failed")?;
    let pod = cluster.get(&["pod", "greedy"])?;
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    ensure!(
        ended["reason"] == "OOMKilled" && ended["exitCode"] == 137,
        "{ended}"
    );
    Ok(())
}

/// A container cannot reach a device that it was not given, though it may make the node.
fn devices(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(&sleeper("plain", ""))?;
    cluster.wait_ready("default", "plain")?;
    // 4:64 is the first serial port, 1:11 the kernel log; /dev/null must go on working.
    for (major, minor) in [(4, 64), (1, 11), (10, 1)] {
        let script = format!(
            "mknod /tmp/d c {major} {minor} && echo made; (echo x > /tmp/d) 2>&1; rm -f /tmp/d"
        );
        let output = cluster.gantry(&["exec", "plain", "--", "sh", "-c", &script])?;
        ensure!(
            output.stdout.contains("not permitted") || output.stderr.contains("not permitted"),
            "a write to device {major}:{minor} was not refused: {output:?}"
        );
    }
    cluster.ok(&[
        "exec",
        "plain",
        "--",
        "sh",
        "-c",
        "echo x > /dev/null; head -c 4 /dev/urandom | wc -c",
    ])?;
    // A privileged container is what the word says.
    cluster.apply_ok(&sleeper(
        "privileged",
        "      securityContext: {privileged: true}\n",
    ))?;
    cluster.wait_ready("default", "privileged")?;
    let read = "mknod /tmp/k c 1 11 && dd if=/tmp/k of=/dev/null bs=8192 count=1";
    cluster.ok(&["exec", "privileged", "--", "sh", "-c", read])?;
    Ok(())
}

/// Capabilities, seccomp, no new privileges and masks, for init and for exec, as /proc shows them.
fn isolation(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(&sleeper(
        "confined",
        "      securityContext:
        allowPrivilegeEscalation: false
",
    ))?;
    cluster.apply_ok(&sleeper("default-rights", ""))?;
    for (pod, no_new_privs) in [("confined", "1"), ("default-rights", "0")] {
        cluster.wait_ready("default", pod)?;
        for who in ["1", "self"] {
            let file = format!("/proc/{who}/status");
            let status = cluster.ok(&["exec", pod, "--", "cat", &file])?;
            let field = |name: &str| {
                status
                    .lines()
                    .find_map(|l| l.strip_prefix(name))
                    .unwrap_or_default()
                    .trim()
                    .to_owned()
            };
            ensure!(
                field("CapBnd:") == "00000000a80425fb",
                "{pod} {who}: {}",
                field("CapBnd:")
            );
            ensure!(
                field("Seccomp:") == "2",
                "{pod} {who} has no seccomp filter"
            );
            ensure!(
                field("NoNewPrivs:") == no_new_privs,
                "{pod} {who}: {}",
                field("NoNewPrivs:")
            );
        }
        let output = cluster.gantry(&["exec", pod, "--", "unshare", "-m", "true"])?;
        ensure!(output.code != 0, "{pod}: unshare -m is allowed");
        let kcore = cluster.gantry(&[
            "exec",
            pod,
            "--",
            "sh",
            "-c",
            "head -c 1 /proc/kcore | wc -c",
        ])?;
        ensure!(kcore.stdout.trim() == "0", "{pod}: /proc/kcore can be read");
        let sysctl = cluster.gantry(&[
            "exec",
            pod,
            "--",
            "sh",
            "-c",
            "echo 1 > /proc/sys/vm/drop_caches",
        ])?;
        ensure!(sysctl.code != 0, "{pod}: /proc/sys can be written");
    }
    Ok(())
}

/// SIGKILL of the agent: pods untouched, Services go on, no log line and no exit code lost.
fn agent_kill(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(
        "apiVersion: v1
kind: Pod
metadata:
  name: counter
  labels: {app: counter}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"httpd -p 8080 -h /etc; i=0; while true; do i=$((i+1)); echo line $i; sleep 0.01; done\"]
---
apiVersion: v1
kind: Pod
metadata:
  name: leaver
spec:
  restartPolicy: Never
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"sleep 6; echo last words; exit 7\"]
---
apiVersion: v1
kind: Service
metadata:
  name: counter
spec:
  selector: {app: counter}
  ports: [{port: 80, targetPort: 8080}]
",
    )?;
    cluster.wait_ready("default", "counter")?;
    cluster.wait_ready("default", "leaver")?;
    let service = cluster.get(&["service", "counter"])?;
    let address: SocketAddr = format!(
        "{}:80",
        service["spec"]["clusterIP"]
            .as_str()
            .context("no cluster IP")?
    )
    .parse()?;
    cluster.wait("the Service to answer", Duration::from_secs(10), |_| {
        Ok(TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok())
    })?;
    let before = cluster.get(&["pod", "counter"])?;
    cluster.kill_agent()?;
    for _ in 0..20 {
        TcpStream::connect_timeout(&address, Duration::from_secs(2))
            .context("the Service does not answer while the agent is dead")?;
        std::thread::sleep(Duration::from_millis(400));
    }
    cluster.start_agent()?;
    cluster.wait_phase("default", "leaver", "Failed")?;
    let leaver = cluster.get(&["pod", "leaver"])?;
    let ended = &leaver["status"]["containerStatuses"][0]["state"]["terminated"];
    ensure!(ended["exitCode"] == 7, "exit code: {ended}");
    ensure!(
        cluster.ok(&["logs", "leaver"])?.trim() == "last words",
        "the leaver's log is not whole"
    );
    let after = cluster.get(&["pod", "counter"])?;
    let status = |pod: &Value| pod["status"]["containerStatuses"][0].clone();
    ensure!(
        status(&before) == status(&after),
        "touched: {} {}",
        status(&before),
        status(&after)
    );
    let ready = |pod: &Value| {
        let conditions = pod["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        conditions
            .into_iter()
            .find(|c| c["type"] == "Ready")
            .map(|c| c["lastTransitionTime"].clone())
    };
    ensure!(ready(&before) == ready(&after), "readiness has flipped");
    let log = cluster.ok(&["logs", "counter"])?;
    for (index, line) in log.lines().enumerate() {
        ensure!(
            line == format!("line {}", index + 1),
            "line {} of the log is {line:?}",
            index + 1
        );
    }
    ensure!(
        log.lines().count() > 300,
        "only {} lines",
        log.lines().count()
    );
    cluster.ok(&["delete", "pod", "counter", "leaver", "--timeout=30s"])?;
    Ok(())
}

/// SIGKILL of the control plane: pods and Services go on, nothing acknowledged is lost.
fn control_kill(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(
        "apiVersion: v1
kind: Pod
metadata:
  name: server
  labels: {app: server}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"httpd\", \"-f\", \"-p\", \"8080\", \"-h\", \"/etc\"]
---
apiVersion: v1
kind: Service
metadata: {name: server}
spec:
  selector: {app: server}
  ports: [{port: 80, targetPort: 8080}]
",
    )?;
    cluster.wait_ready("default", "server")?;
    let service = cluster.get(&["service", "server"])?;
    let address = service["spec"]["clusterIP"]
        .as_str()
        .context("no cluster IP")?;
    let address: SocketAddr = format!("{address}:80").parse()?;
    let answers = || TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok();
    cluster.wait("the Service to answer", Duration::from_secs(10), |_| {
        Ok(answers())
    })?;
    for number in 0..10 {
        cluster.apply_ok(&format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: c{number}}}\ndata: {{n: \"{number}\"}}\n"
        ))?;
    }
    let before = cluster.get(&["pod", "server"])?;
    cluster.kill_control()?;
    ensure!(
        answers(),
        "the Service does not answer without the control plane"
    );
    let output = cluster.gantry(&["get", "pods"])?;
    ensure!(
        output.code == 1 && output.stderr.contains("was refused"),
        "{output:?}"
    );
    cluster.start_control()?;
    for number in 0..10 {
        let map = cluster.get(&["configmap", &format!("c{number}")])?;
        let kept = number.to_string();
        ensure!(
            map["data"]["n"] == kept.as_str(),
            "acknowledged and lost: {map}"
        );
    }
    let after = cluster.get(&["pod", "server"])?;
    let status = |pod: &Value| pod["status"]["containerStatuses"].clone();
    ensure!(
        status(&before) == status(&after),
        "touched: {}",
        status(&after)
    );
    // The agent's stream comes back by itself: a new pod runs.
    cluster.apply_ok(&sleeper("later", ""))?;
    cluster.wait_ready("default", "later")
}

/// Readiness gates endpoints, liveness restarts, restart policies hold, init containers go first.
fn probes_and_restarts(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(
        "apiVersion: v1
kind: Pod
metadata:
  name: gate
  labels: {app: gate}
spec:
  terminationGracePeriodSeconds: 1
  initContainers:
    - name: first
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"echo made > /data/file\"]
      volumeMounts: [{name: work, mountPath: /data}]
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"cat /data/file; exec httpd -f -p 8080 -h /data\"]
      env:
        - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
      ports: [{name: web, containerPort: 8080}]
      volumeMounts: [{name: work, mountPath: /data}]
      startupProbe: {tcpSocket: {port: web}, periodSeconds: 1}
      readinessProbe: {exec: {command: [\"test\", \"-e\", \"/data/ready\"]}, periodSeconds: 1}
      livenessProbe: {httpGet: {path: /file, port: web}, periodSeconds: 1, failureThreshold: 2}
  volumes: [{name: work, emptyDir: {}}]
---
apiVersion: v1
kind: Service
metadata: {name: gate}
spec:
  selector: {app: gate}
  ports: [{port: 80, targetPort: web}]
---
apiVersion: v1
kind: Pod
metadata: {name: fails-once}
spec:
  restartPolicy: OnFailure
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"test -e /keep/seen && exit 0; touch /keep/seen; exit 3\"]
      volumeMounts: [{name: keep, mountPath: /keep}]
  volumes: [{name: keep, emptyDir: {}}]
",
    )?;
    cluster.wait_phase("default", "gate", "Running")?;
    let service = cluster.get(&["service", "gate"])?;
    let address = service["spec"]["clusterIP"]
        .as_str()
        .context("no cluster IP")?;
    let address: SocketAddr = format!("{address}:80").parse()?;
    let answers = || TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok();
    std::thread::sleep(Duration::from_secs(3));
    ensure!(!answers(), "a pod that is not ready gets connections");
    let name = cluster.ok(&[
        "exec",
        "gate",
        "--",
        "sh",
        "-c",
        "echo $POD; touch /data/ready",
    ])?;
    ensure!(name.trim() == "gate", "fieldRef: {name:?}");
    cluster.wait_ready("default", "gate")?;
    cluster.wait("the Service to answer", Duration::from_secs(10), |_| {
        Ok(answers())
    })?;
    ensure!(
        cluster.ok(&["logs", "gate"])?.starts_with("made"),
        "the init container was not first"
    );
    // Liveness fails: the container is restarted, alone.
    cluster.ok(&["exec", "gate", "--", "rm", "/data/file"])?;
    cluster.wait("a restart", Duration::from_secs(30), |c| {
        let pod = c.get(&["pod", "gate"])?;
        Ok(pod["status"]["containerStatuses"][0]["restartCount"].as_i64() >= Some(1))
    })?;
    cluster.wait_phase("default", "fails-once", "Succeeded")?;
    let pod = cluster.get(&["pod", "fails-once"])?;
    let status = &pod["status"]["containerStatuses"][0];
    ensure!(status["restartCount"] == 1, "{status}");
    ensure!(
        status["lastState"]["terminated"]["exitCode"] == 3,
        "{status}"
    );
    let previous = cluster.gantry(&["logs", "fails-once", "--previous"])?;
    ensure!(previous.code == 0, "{previous:?}");
    Ok(())
}

/// Every wrong input gets a clear answer and loses nothing.
fn bad_input(cluster: &mut Cluster) -> Result<()> {
    let refused = |manifest: &str, words: &[&str]| -> Result<()> {
        let output = cluster.apply(manifest)?;
        ensure!(output.code == 1, "taken: {manifest}\n{}", output.stdout);
        for word in words {
            ensure!(
                output.stderr.contains(word),
                "no {word:?} in: {}",
                output.stderr
            );
        }
        Ok(())
    };
    refused(
        "apiVersion: v1\nkind: Pod\nmetadata:\n\tname: x\n",
        &["tab", "line 4"],
    )?;
    refused(
        "apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: rs}
spec:
  replicas: 1
  selector: {matchLabels: {app: a}}
  template:
    metadata: {labels: {app: b}}
    spec: {containers: [{name: c, image: busybox}]}
",
        &["spec.template.metadata.labels", "selector"],
    )?;
    refused(
        "apiVersion: v1
kind: Pod
metadata: {name: typo}
spec:
  containers:
    - name: main
      image: busybox
      imagePullPolice: Never
",
        &["spec.containers[0].imagePullPolice"],
    )?;
    refused(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: Upper}\nspec: {containers: [{name: a, image: b}]}\n",
        &["metadata.name"],
    )?;
    cluster.apply_ok(&sleeper(
        "waiting",
        "      volumeMounts: [{name: page, mountPath: /page}]
  volumes:
    - name: page
      configMap: {name: not-there}
",
    ))?;
    cluster.apply_ok(
        "apiVersion: v1
kind: Pod
metadata: {name: no-image}
spec:
  containers:
    - name: main
      image: gantry.local/nothing:here
      imagePullPolicy: Never
",
    )?;
    cluster.wait(
        "the missing ConfigMap in describe",
        Duration::from_secs(20),
        |c| Ok(c.ok(&["describe", "pod", "waiting"])?.contains("not-there")),
    )?;
    cluster.wait("ErrImageNeverPull", Duration::from_secs(20), |c| {
        Ok(c.ok(&["get", "pod", "no-image"])?
            .contains("ErrImageNeverPull"))
    })?;
    // The pod goes on as soon as what it waits for is there.
    cluster
        .apply_ok("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: not-there}\ndata: {a: b}\n")?;
    cluster.wait_ready("default", "waiting")?;
    ensure!(cluster.ok(&["exec", "waiting", "--", "cat", "/page/a"])? == "b");
    let output = cluster.gantry(&["get", "pod", "nobody"])?;
    ensure!(
        output.code == 1 && output.stderr.contains("pods \"nobody\" not found"),
        "{output:?}"
    );
    Ok(())
}

/// `logs`, `logs -f`, `exec` with exit code and stdin.
fn logs_and_exec(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(
        "apiVersion: v1
kind: Pod
metadata: {name: talker}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"sh\", \"-c\", \"i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.2; done\"]
",
    )?;
    cluster.wait_ready("default", "talker")?;
    let mut follow = cluster.command(&["logs", "-f", "talker"]);
    let mut child = follow
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let stdout = child.stdout.take().context("no output")?;
    let lines: Vec<String> = BufReader::new(stdout)
        .lines()
        .take(10)
        .collect::<Result<_, _>>()?;
    child.kill()?;
    child.wait()?;
    for (index, line) in lines.iter().enumerate() {
        ensure!(
            *line == format!("tick {}", index + 1),
            "line {}: {line:?}",
            index + 1
        );
    }
    let tail = cluster.ok(&["logs", "talker", "--tail=2"])?;
    ensure!(tail.lines().count() == 2, "--tail=2 gave {tail:?}");
    let output = cluster.gantry(&[
        "exec",
        "talker",
        "--",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 5",
    ])?;
    ensure!(output.code == 5, "exit code {}", output.code);
    ensure!(
        output.stdout == "out\n" && output.stderr.starts_with("err\n"),
        "{output:?}"
    );
    let mut exec = cluster.command(&["exec", "-i", "talker", "--", "cat"]);
    let mut child = exec.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let payload: String = (0..20_000).map(|i| format!("{i}\n")).collect();
    let mut stdin = child.stdin.take().context("no stdin")?;
    let sent = payload.clone();
    let writer = std::thread::spawn(move || stdin.write_all(sent.as_bytes()));
    let mut back = String::new();
    child
        .stdout
        .take()
        .context("no output")?
        .read_to_string(&mut back)?;
    child.wait()?;
    if writer.join().is_err() || back != payload {
        bail!(
            "stdin came back as {} of {} bytes",
            back.len(),
            payload.len()
        );
    }
    let missing = cluster.gantry(&["exec", "talker", "--", "/no/such/binary"])?;
    ensure!(
        missing.code != 0 && missing.stderr.contains("no such file"),
        "{missing:?}"
    );
    Ok(())
}
