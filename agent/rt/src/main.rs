//! `gantry-rt`: creates one container or starts one command in one, then ends.
//!
//! ```text
//! usage: gantry-rt create --root DIR --bundle DIR [--seccomp FILE] [--console SOCKET]
//!        gantry-rt exec   --root DIR --bundle DIR --process FILE [--seccomp FILE] [--console SOCKET]
//!        gantry-rt namespaces HOSTNAME        (asked by the agent: see `namespaces`)
//!
//! gantry-shim ─ spawn ─► gantry-rt ─ clone ─► INTER ─ clone ─► INIT   (both children of the shim: as_sibling)
//!      ▲ descriptor 3: "ok <pid> <time>" │ "err {JSON}"          └─ descriptors 0, 1, 2 are the container's
//! ```
//! The only caller of libcontainer. One process per call makes harmless what the library does to
//! its caller: a clone without fork handlers, chdir, a changed oom_score_adj, leaked descriptors
//! and zombies on failure (all seen with libcontainer 0.7.0). It is single-threaded for the same
//! reason.
//!
//! `create` also starts: once libcontainer reports the container as created, nothing that could
//! fail for the container's own sake is left except the final execve, whose error goes to the
//! container's stderr and exit code 255, as with runc. One spawn is saved.

mod cgroup;
mod create;
mod executable;
mod executor;
mod inside;
mod mount;
mod namespaces;
mod permitted;
mod process;
mod report;
mod rootfs;
mod user_namespace;

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::{LinuxIdMapping, Spec};
use libcontainer::syscall::syscall::SyscallType;
use nix::unistd::Uid;

use crate::executor::Workload;
use crate::report::Report;
use crate::user_namespace::Entry;

/// libcontainer's name for the container: its state directory below `--root`.
const STATE: &str = "state";
/// libcontainer leaves one socket per exec behind; older than any exec may take, it is removed.
const STALE_SOCKET_AGE: Duration = Duration::from_secs(120);

/// What the command line says.
#[derive(Default)]
struct Arguments {
    create: bool,
    root: PathBuf,
    bundle: PathBuf,
    process: Option<PathBuf>,
    seccomp: Option<PathBuf>,
    console: Option<PathBuf>,
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    if let (Some("namespaces"), Some(hostname)) = (words.next().as_deref(), words.next()) {
        return match namespaces::hold(&hostname) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let mut report = match Report::open() {
        Ok(report) => report,
        Err(error) => {
            eprintln!("gantry-rt: started by hand? {error:#}");
            return ExitCode::from(64);
        }
    };
    match parse(std::env::args_os().skip(1)).and_then(|arguments| run(&arguments)) {
        Ok((pid, started_ns)) => {
            report.started(pid, started_ns);
            ExitCode::SUCCESS
        }
        Err(error) => {
            report.failed(&error);
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = std::ffi::OsString>) -> anyhow::Result<Arguments> {
    let mut arguments = Arguments::default();
    match words.next().as_ref().and_then(|w| w.to_str()) {
        Some("create") => arguments.create = true,
        Some("exec") => {}
        other => bail!("want create or exec, got {other:?}"),
    }
    while let Some(flag) = words.next() {
        let value = words
            .next()
            .with_context(|| format!("{flag:?} needs a value"))?
            .into();
        match flag.to_str() {
            Some("--root") => arguments.root = value,
            Some("--bundle") => arguments.bundle = value,
            Some("--process") => arguments.process = Some(value),
            Some("--seccomp") => arguments.seccomp = Some(value),
            Some("--console") => arguments.console = Some(value),
            _ => bail!("unknown flag {flag:?}"),
        }
    }
    if !arguments.root.is_absolute() || !arguments.bundle.is_absolute() {
        bail!("--root and --bundle must be absolute paths");
    }
    Ok(arguments)
}

/// Returns init's or the command's pid and the time just before it was let go.
fn run(arguments: &Arguments) -> anyhow::Result<(i32, u128)> {
    let config = arguments.bundle.join("config.json");
    let mut spec =
        Spec::load(&config).with_context(|| format!("cannot read {}", config.display()))?;
    let mut workload = Workload::new(&spec, arguments.seccomp.as_deref())?;
    give_streams(&spec);
    if let Some(process) = &arguments.process
        && let Some(entry) = Entry::take(&spec, process)?
    {
        workload = workload.entering(entry);
    }
    let builder = |workload| -> anyhow::Result<ContainerBuilder> {
        Ok(
            ContainerBuilder::new(STATE.to_owned(), SyscallType::default())
                .with_root_path(&arguments.root)?
                .with_console_socket(arguments.console.as_ref())
                .with_executor(workload),
        )
    };
    if arguments.create {
        if permitted::restrict_spec(&mut spec)? {
            spec.save(&config)
                .with_context(|| format!("cannot rewrite {}", config.display()))?;
        }
        if create::is_enough_for(&spec) {
            return create::create(spec, &arguments.bundle, &arguments.root, workload);
        }
        create_by_library(builder(workload)?, &arguments.bundle)
    } else {
        let process = arguments
            .process
            .as_deref()
            .context("exec needs --process")?;
        permitted::restrict_process_file(process)?;
        let result = exec(builder(workload)?, process);
        let _ = fs::remove_file(process);
        remove_stale_sockets(&arguments.root.join(STATE));
        result
    }
}

/// Pipes of stdout and stderr become the container's user's: it may open `/dev/stdout` again, as
/// programs do that log to a file of that name. The terminal's and `/dev/null` stay as they are.
fn give_streams(spec: &Spec) {
    let user = spec.process().as_ref().map(|p| p.user());
    let map = |maps: Option<&Vec<LinuxIdMapping>>, id: u32| {
        let line = maps.into_iter().flatten().find(|m| {
            id.checked_sub(m.container_id())
                .is_some_and(|d| d < m.size())
        });
        line.map_or(id, |m| m.host_id() + (id - m.container_id()))
    };
    let linux = spec.linux().as_ref();
    let uids = linux.and_then(|l| l.uid_mappings().as_ref());
    let uid = map(uids, user.map_or(0, |u| u.uid()));
    for stream in [std::io::stdout().as_fd(), std::io::stderr().as_fd()] {
        let is_pipe = nix::sys::stat::fstat(stream)
            .is_ok_and(|found| found.st_mode & libc::S_IFMT == libc::S_IFIFO);
        if is_pipe {
            // Without it only the second opening fails, and that says why.
            let _ = nix::unistd::fchown(stream, Some(Uid::from_raw(uid)), None);
        }
    }
}

fn create_by_library(builder: ContainerBuilder, bundle: &Path) -> anyhow::Result<(i32, u128)> {
    let mut container = builder
        .as_init(bundle)
        .with_systemd(false)
        .with_detach(true)
        .as_sibling(true)
        .build()?;
    let pid = container
        .pid()
        .context("libcontainer gave no pid")?
        .as_raw();
    let started_ns = now_ns();
    container.start()?;
    Ok((pid, started_ns))
}

fn exec(builder: ContainerBuilder, process: &Path) -> anyhow::Result<(i32, u128)> {
    let started_ns = now_ns();
    let pid = builder
        .as_tenant()
        .with_detach(true)
        .as_sibling(true)
        .with_process(Some(process))
        .build()?;
    Ok((pid.as_raw(), started_ns))
}

fn now_ns() -> u128 {
    // A clock before 1970 gives 0: the pod's times are wrong then, its life is not.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos())
}

/// Each exec binds `tenant-notify-*.sock` (and links `tenant-tty-*.sock`) in the state directory
/// and nobody unlinks them: a probe every second would fill the tmpfs.
fn remove_stale_sockets(state: &Path) {
    for entry in fs::read_dir(state).into_iter().flatten().flatten() {
        let stale = entry
            .file_name()
            .to_str()
            .is_some_and(|n| n.starts_with("tenant-"))
            && fs::symlink_metadata(entry.path())
                .and_then(|m| m.modified())
                .is_ok_and(|t| t.elapsed().is_ok_and(|age| age > STALE_SOCKET_AGE));
        if stale {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_checked() {
        let parse_words = |words: &[&str]| parse(words.iter().map(|w| w.into()));
        let create = [
            "create",
            "--root",
            "/r",
            "--bundle",
            "/b",
            "--seccomp",
            "/s",
        ];
        let arguments = parse_words(&create).unwrap();
        assert!(arguments.create && arguments.seccomp == Some("/s".into()));
        assert!(
            parse_words(&["exec", "--root", "/r", "--bundle", "/b"])
                .unwrap()
                .process
                .is_none()
        );
        for bad in [
            &["delete"][..],
            &["create", "--root"],
            &["create", "--root", "r", "--bundle", "/b"],
            &["create", "--what", "/b"],
            &[],
        ] {
            assert!(parse_words(bad).is_err(), "{bad:?}");
        }
    }
}
