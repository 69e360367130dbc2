//! `gantry reset`: the machine as it was before `gantry init` or `gantry join`.
//!
//! Everything is found by looking, and it goes on after a failure and tells them all, so it can be run
//! again and after a crash at any point.

use std::io::{BufRead as _, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::process::{Pid, Signal, kill_process};

use super::{JOINED, Places, host_name, need_root, no_systemd, systemd};
use crate::failure::Failure;
use crate::output;

/// What only Gantry makes.
const FILES: [&str; 6] = [
    "/run/gantry",
    "/var/lib/gantry",
    "/var/lib/gantry-control",
    "/etc/gantry",
    "/etc/cni/net.d/10-gantry.conflist",
    "/opt/cni/bin/gantry-bridge",
];
const DAEMONS: [&str; 2] = ["gantry-agent", "gantry-control"];
/// From SIGTERM to SIGKILL.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Args, Debug)]
pub(crate) struct Reset {
    /// Do not ask
    #[arg(short, long)]
    force: bool,
}

impl Reset {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let places = Places::new(None)?;
        need_root(&places)?;
        let was_joined = places.at(JOINED).exists();
        if !self.force && !confirmed(places.at(super::CONTROL_DATA).exists())? {
            return Err(Failure::local("nothing was changed"));
        }
        let mut errors = Vec::new();
        let mut note = |result: Result<(), Failure>| {
            if let Err(failure) = result {
                errors.push(failure.to_string());
            }
        };
        let units = [systemd::SHUTDOWN, systemd::AGENT, systemd::CONTROL];
        let has_systemd = no_systemd(&places, false).is_none();
        for unit in units {
            let path = systemd::path(&places, unit);
            if !path.exists() {
                continue;
            }
            let mut disable = vec!["disable", "--now", unit];
            if unit == systemd::SHUTDOWN {
                // Without its file systemd knows it only while it is active.
                disable.retain(|word| *word != "--now" || systemd::is_active(unit));
                // Its stop would end the pods in order, which takes their grace periods: they go anyway.
                note(remove(&path));
            }
            if has_systemd {
                note(systemd::ask(&disable));
            }
            note(remove(&path));
        }
        if has_systemd {
            note(systemd::ask(&["daemon-reload"]));
        }
        note(end_daemons());
        output::print("removing pods, networks, cgroups and eBPF programs\n")?;
        let agent = places.program("gantry-agent");
        let cleaned = Command::new(&agent).arg("cleanup").status();
        note(match cleaned {
            Ok(ended) if ended.success() => Ok(()),
            Ok(ended) => Err(Failure::local(format!(
                "gantry-agent cleanup: {ended}, see above"
            ))),
            Err(error) => Err(Failure::local(format!(
                "cannot run {}: {error}",
                agent.display()
            ))),
        });
        for file in FILES {
            note(remove(Path::new(file)));
        }
        if !errors.is_empty() {
            return Err(Failure::local(format!(
                "not everything could be removed; run it again after a look at:\n  {}",
                errors.join("\n  ")
            )));
        }
        output::print("nothing of Gantry is left on this machine but its programs\n")?;
        if was_joined {
            let node = host_name();
            output::print(&format!(
                "the cluster still knows this node; on the control plane, run: gantry delete node {node}\n"
            ))?;
        }
        Ok(())
    }
}

fn confirmed(is_control_plane: bool) -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::local(
            "this removes every pod and its data: confirm it with --force",
        ));
    }
    let what = match is_control_plane {
        true => "the whole cluster's state, every pod on this machine and all their data",
        false => "every pod on this machine and all their data",
    };
    output::print(&format!("This removes {what}. Go on? [y/N] "))?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn remove(path: &Path) -> Result<(), Failure> {
    let removed = match path.symlink_metadata() {
        Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Failure::local(format!(
            "remove {}: {error}",
            path.display()
        ))),
        _ => Ok(()),
    }
}

/// Both daemons in our own mount namespace: those of containers are not this machine's.
fn daemons() -> Vec<i32> {
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let own = namespace("self");
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_daemon = |pid: &i32| {
        let program: Option<PathBuf> = std::fs::read_link(format!("/proc/{pid}/exe")).ok();
        let name = program.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        // The kernel adds this to a program whose file was replaced.
        let name = name.map(|name| name.trim_end_matches(" (deleted)").to_owned());
        name.is_some_and(|name| DAEMONS.contains(&name.as_str()))
            && namespace(&pid.to_string()) == own
    };
    entries
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .filter(is_daemon)
        .collect()
}

/// Ends daemons that no unit has started.
fn end_daemons() -> Result<(), Failure> {
    let began = Instant::now();
    let send = |signal| {
        for pid in daemons().into_iter().filter_map(Pid::from_raw) {
            let _ = kill_process(pid, signal); // gone meanwhile is what is wanted
        }
    };
    send(Signal::TERM);
    while !daemons().is_empty() {
        if began.elapsed() > PATIENCE * 2 {
            return Err(Failure::local(format!(
                "{} do not end, not even by SIGKILL",
                DAEMONS.join(" and ")
            )));
        }
        if began.elapsed() > PATIENCE {
            send(Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_removed_already() {
        let dir = tempfile::tempdir().unwrap();
        let (inner, file) = (dir.path().join("a/b"), dir.path().join("f"));
        std::fs::create_dir_all(&inner).unwrap();
        std::fs::write(&file, "x").unwrap();
        for path in [dir.path().join("a"), file.clone(), file] {
            remove(&path).unwrap();
            assert!(!path.exists());
        }
    }

    #[test]
    fn no_process_of_this_test_is_a_daemon() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(!daemons().contains(&own));
    }
}
