//! `runc run` of the same root file system, or another runtime with its command line (crun): what
//! a pod's start is compared with.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::cluster::{Installation, run};

/// Unpacked image, bundles and state, all on tmpfs as the agent's; removed when dropped.
pub(super) struct Runc {
    program: &'static str,
    directory: tempfile::TempDir,
    next: AtomicUsize,
}

impl Runc {
    /// Unpacks the busybox image and writes the runtime's own default specification into two
    /// bundles.
    pub(super) fn prepare(installation: &Installation, program: &'static str) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("gantry-bench-")
            .tempdir_in("/run")
            .context("a directory in /run")?;
        let runc = Self {
            program,
            directory,
            next: AtomicUsize::new(0),
        };
        std::fs::create_dir(runc.rootfs())?;
        unpack(&archive(installation)?, &runc.rootfs())?;
        runc.bundle("run", &["/bin/true"])?;
        runc.bundle("detached", &["/bin/sleep", "86400"])?;
        Ok(runc)
    }

    pub(super) fn rootfs(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }

    /// The image's statically linked busybox under a name that makes it `true`.
    pub(super) fn static_true(&self) -> Result<PathBuf> {
        let link = self.directory.path().join("true");
        if !link.exists() {
            std::fs::copy(self.rootfs().join("bin/busybox"), &link).context("copy busybox")?;
        }
        Ok(link)
    }

    fn bundle(&self, name: &str, command: &[&str]) -> Result<()> {
        let bundle = self.directory.path().join(name);
        std::fs::create_dir(&bundle)?;
        let spec = run(Command::new(self.program).arg("spec").current_dir(&bundle))?;
        if spec.code != 0 {
            bail!("{} spec: {}", self.program, spec.stderr);
        }
        let path = bundle.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(command);
        config["root"]["path"] = json!(self.rootfs());
        std::fs::write(&path, serde_json::to_vec(&config)?)?;
        Ok(())
    }

    fn command(&self) -> Command {
        let mut runc = Command::new(self.program);
        runc.arg("--root").arg(self.directory.path().join("state"));
        runc
    }

    fn run_words(&self, bundle: &str, detach: bool) -> (Command, String) {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        // Its cgroup has this name: two runtimes must not share one.
        let id = format!(
            "gantry-bench-{}-{}-{next}",
            self.program,
            std::process::id()
        );
        let mut runc = self.command();
        runc.arg("run").args(detach.then_some("--detach"));
        runc.arg("--bundle")
            .arg(self.directory.path().join(bundle))
            .arg(&id);
        (runc, id)
    }

    /// `runc run` of `/bin/true`: create, start, wait, delete.
    pub(super) fn run(&mut self) -> Result<Duration> {
        let (mut command, _) = self.run_words("run", false);
        let began = Instant::now();
        succeed(&mut command)?;
        Ok(began.elapsed())
    }

    /// `runc run --detach` of something that stays: until it runs, as a pod's start is measured.
    pub(super) fn run_detached(&mut self) -> Result<Duration> {
        let began = Instant::now();
        let id = self.start()?;
        let took = began.elapsed();
        self.delete(&id)?;
        Ok(took)
    }

    /// Starts what stays; its id. Many may be started side by side.
    pub(super) fn start(&self) -> Result<String> {
        let (mut command, id) = self.run_words("detached", true);
        // The container inherits the descriptors: no pipe may wait for it.
        command.stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::null());
        command.stderr(std::process::Stdio::null());
        let status = command
            .status()
            .with_context(|| format!("run {}", self.program))?;
        if !status.success() {
            let _ = self.delete(&id);
            bail!("{} run --detach: {status}", self.program);
        }
        Ok(id)
    }

    pub(super) fn delete(&self, id: &str) -> Result<()> {
        succeed(self.command().args(["delete", "--force", id]))
    }

    /// `runc exec` of `/bin/true` in what [`Runc::start`] has started.
    pub(super) fn exec(&self, id: &str) -> Result<Duration> {
        let began = Instant::now();
        succeed(self.command().args(["exec", id, "/bin/true"]))?;
        Ok(began.elapsed())
    }

    /// The system calls of one [`Runc::run`].
    pub(super) fn system_calls(&mut self) -> Result<f64> {
        let table = self.directory.path().join("strace");
        let (command, _) = self.run_words("run", false);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-c", "-o"]).arg(&table);
        strace.arg(command.get_program()).args(command.get_args());
        succeed(&mut strace)?;
        Ok(system_calls(&std::fs::read_to_string(&table)?))
    }
}

fn succeed(command: &mut Command) -> Result<()> {
    let output = run(command)?;
    if output.code != 0 {
        bail!("{command:?} exited with {}: {}", output.code, output.stderr);
    }
    Ok(())
}

/// The calls in the table that `strace -c` writes: its fourth column, without the last line's sum.
pub(super) fn system_calls(table: &str) -> f64 {
    let row = |line: &str| -> Option<f64> {
        let columns: Vec<&str> = line.split_whitespace().collect();
        columns.first()?.parse::<f64>().ok()?;
        (*columns.last()? != "total").then(|| columns.get(3)?.parse().ok())?
    };
    table.lines().filter_map(row).sum()
}

fn archive(installation: &Installation) -> Result<PathBuf> {
    let files = std::fs::read_dir(&installation.images)?
        .flatten()
        .map(|e| e.path());
    let is_busybox = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.contains("busybox") && name.ends_with(".tar")
    };
    files
        .into_iter()
        .find(is_busybox)
        .context("no busybox archive")
}

/// The layers of an OCI archive, in order.
fn unpack(archive: &Path, rootfs: &Path) -> Result<()> {
    let index = json_member(archive, "index.json")?;
    let manifest = json_member(archive, &blob(&index["manifests"][0])?)?;
    for layer in manifest["layers"].as_array().into_iter().flatten() {
        let layer_file = rootfs.with_extension("layer");
        std::fs::write(&layer_file, member(archive, &blob(layer)?)?)?;
        let mut tar = Command::new("tar");
        tar.arg("--extract")
            .arg("--file")
            .arg(&layer_file)
            .arg("--directory")
            .arg(rootfs);
        succeed(&mut tar)?;
        std::fs::remove_file(&layer_file)?;
    }
    Ok(())
}

fn blob(descriptor: &Value) -> Result<String> {
    let digest = descriptor["digest"]
        .as_str()
        .context("a descriptor has no digest")?;
    Ok(format!("blobs/{}", digest.replace(':', "/")))
}

fn json_member(archive: &Path, name: &str) -> Result<Value> {
    Ok(serde_json::from_slice(&member(archive, name)?)?)
}

fn member(archive: &Path, name: &str) -> Result<Vec<u8>> {
    let mut tar = Command::new("tar");
    tar.arg("--extract")
        .arg("--to-stdout")
        .arg("--file")
        .arg(archive)
        .arg(name);
    let output = tar.output().context("run tar")?;
    if !output.status.success() {
        bail!(
            "{}: {}",
            archive.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::system_calls;

    #[test]
    fn calls_are_summed_with_and_without_errors_and_the_total_is_not_counted_twice() {
        let table = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.000300          10        30         2 openat
 40.00    0.000200           5        40           read
------ ----------- ----------- --------- --------- ----------------
100.00    0.000500           7        70         2 total
";
        assert_eq!(system_calls(table), 70.0);
        assert_eq!(system_calls("strace: Process 1 attached\n"), 0.0);
    }
}
