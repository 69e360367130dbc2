//! Logs and exec.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};

use crate::cluster::Cluster;

/// `logs`, `logs -f`, `exec` with exit code and stdin.
pub(super) fn logs_and_exec(cluster: &mut Cluster) -> Result<()> {
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
