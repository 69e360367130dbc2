//! Logs, exec, attach, copies and forwarded ports.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cluster::Cluster;

/// `logs`, `logs -f`, `exec` with exit code and stdin.
pub(super) fn logs_and_exec(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(
        "apiVersion: v1
kind: Pod
metadata: {name: talker, labels: {app: talker}}
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
    let by_label = cluster.ok(&["logs", "-l", "app=talker", "--prefix", "--tail=1"])?;
    ensure!(
        by_label.starts_with("[pod/talker/main] tick ") && by_label.lines().count() == 1,
        "-l app=talker gave {by_label:?}"
    );
    since(cluster)?;
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

/// Five lines a second: of the last seconds there are some, and not the first.
fn since(cluster: &Cluster) -> Result<()> {
    std::thread::sleep(Duration::from_secs(3));
    let late = cluster.ok(&["logs", "talker", "--since=1s"])?;
    let all = cluster.ok(&["logs", "talker", "--timestamps"])?;
    ensure!(
        !late.is_empty() && !late.lines().any(|line| line == "tick 1"),
        "--since=1s gave {late:?}"
    );
    let line = all.lines().next().unwrap_or_default();
    let (time, text) = line.split_once(' ').unwrap_or_default();
    ensure!(
        text == "tick 1" && time.ends_with('Z'),
        "--timestamps gave {line:?}"
    );
    Ok(())
}

/// A pod whose container reads stdin, one that serves a file on its own loopback, and the Service.
const STREAMS: &str = "apiVersion: v1
kind: Pod
metadata: {name: reader}
spec:
  restartPolicy: Never
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      stdin: true
      stdinOnce: true
      command: [\"sh\", \"-c\", \"cat; echo end; exit 3\"]
---
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      image: gantry.local/busybox:debian
      imagePullPolicy: IfNotPresent
      command: [\"httpd\", \"-f\", \"-p\", \"127.0.0.1:8080\", \"-h\", \"/etc\"]
      ports: [{name: http, containerPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: server}
spec:
  selector: {app: server}
  ports: [{name: web, port: 80, targetPort: http}]
";

/// Runs the command line with something on its stdin: its exit code and what it printed.
fn typed(cluster: &Cluster, arguments: &[&str], text: &str) -> Result<(i32, String)> {
    let mut command = cluster.command(arguments);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    stdin.write_all(text.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    let code = output.status.code().unwrap_or(-1);
    Ok((code, String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// `attach`, `run`, `cp` and `port-forward`.
pub(super) fn streams(cluster: &mut Cluster) -> Result<()> {
    cluster.apply_ok(STREAMS)?;
    cluster.wait_ready("default", "reader")?;
    cluster.wait_ready("default", "server")?;

    // The first client's end is the end of the container's stdin.
    let attached = typed(cluster, &["attach", "-i", "reader"], "typed\n")?;
    ensure!(attached == (0, "typed\nend\n".into()), "{attached:?}");
    cluster.wait_phase("default", "reader", "Failed")?;
    let line = "run -i --rm --quiet --restart=Never --image=gantry.local/busybox:debian \
                --image-pull-policy=IfNotPresent one --command -- sh -c";
    let mut words: Vec<&str> = line.split_whitespace().collect();
    words.push("cat; exit 7");
    let ran = typed(cluster, &words, "through\n")?;
    ensure!(ran == (7, "through\n".into()), "{ran:?}");
    let line = "debug -i --quiet server --image=gantry.local/busybox:debian \
                --image-pull-policy=IfNotPresent -- sh -c";
    let mut words: Vec<&str> = line.split_whitespace().collect();
    words.push("read word; echo seen $word");
    let debugged = typed(cluster, &words, "this\n")?;
    ensure!(debugged == (0, "seen this\n".into()), "{debugged:?}");

    copies(cluster)?;
    forwards(cluster)
}

/// A tree there and back, with modes, and a link that does not come along.
fn copies(cluster: &Cluster) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (tree, back) = (directory.path().join("tree"), directory.path().join("back"));
    std::fs::create_dir_all(tree.join("deep/er"))?;
    let payload: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
    std::fs::write(tree.join("deep/er/data"), &payload)?;
    std::fs::write(tree.join("script"), "#!/bin/sh\n")?;
    std::fs::set_permissions(tree.join("script"), PermissionsExt::from_mode(0o750))?;
    let (tree, back) = (tree.to_string_lossy(), back.to_string_lossy());
    cluster.ok(&["cp", &tree, "server:/tmp", "-c", "main"])?;
    let script = "stat -c %a /tmp/tree/script; ln -s /etc/passwd /tmp/tree/link";
    let mode = cluster.ok(&["exec", "server", "--", "sh", "-c", script])?;
    ensure!(mode.trim() == "750", "mode in the container: {mode}");
    let copied = cluster.gantry(&["cp", "default/server:/tmp/tree", &back])?;
    ensure!(
        copied.code == 0 && copied.stderr.contains("skipping link"),
        "{copied:?}"
    );
    let back = Path::new(&*back);
    ensure!(
        std::fs::read(back.join("deep/er/data"))? == payload,
        "the content has changed"
    );
    let mode = back.join("script").metadata()?.permissions().mode() & 0o777;
    ensure!(
        mode == 0o750 && !back.join("link").exists(),
        "mode {mode:o}"
    );
    let missing = cluster.gantry(&["cp", "server:/no/such", &format!("{}x", back.display())])?;
    ensure!(missing.code != 0, "{missing:?}");
    Ok(())
}

/// Two ports of a Service, of which one is asked for by name; one connection after the other.
fn forwards(cluster: &Cluster) -> Result<()> {
    let mut command = cluster.command(&["port-forward", "svc/server", ":80", "0:web"]);
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().context("no output")?;
    let mut lines = BufReader::new(stdout).lines();
    let result = (|| {
        let mut ports = Vec::new();
        while ports.len() < 2 {
            let line = lines.next().context("no more output")??;
            let port = line
                .strip_prefix("Forwarding from 127.0.0.1:")
                .and_then(|rest| rest.strip_suffix(" -> 8080"));
            ports.extend(port.map(str::parse::<u16>).transpose()?);
        }
        for port in [ports[0], ports[1], ports[0]] {
            let mut socket = TcpStream::connect(("127.0.0.1", port))?;
            socket.set_read_timeout(Some(Duration::from_secs(20)))?;
            write!(socket, "GET /passwd HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            socket.read_to_string(&mut answer)?;
            ensure!(answer.contains("root:"), "port {port}: {answer:?}");
        }
        Ok(())
    })();
    child.kill()?;
    child.wait()?;
    result?;
    let refused = cluster.gantry(&["port-forward", "server", "70000"])?;
    ensure!(refused.code != 0, "{refused:?}");
    Ok(())
}
