//! `cargo xtask down`: removes everything that `up` made, then counts what is left.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{census, report, run};

/// Stops control and agent, lets the agent's own `cleanup` take its pods down, removes the files.
pub fn run() -> Result<()> {
    if !run::is_root() {
        bail!("only root can remove pods. Run:\n  sudo -E cargo xtask down");
    }
    remove()?;
    let census = census::take();
    print(&census);
    if !census::is_zero(&census) {
        bail!("something of ours is left (see above)");
    }
    println!("nothing of ours is left");
    Ok(())
}

/// `cargo xtask census`
pub fn census() -> Result<()> {
    print(&census::take());
    Ok(())
}

/// One line per kind.
pub fn print(census: &census::Census) {
    println!("census of what is Gantry's on this machine:");
    print!("{}", report::table(&census::rows(census)));
}

/// The removal alone: idempotent, complete after a crash at any point.
pub fn remove() -> Result<()> {
    let step = report::step("stopping gantry-agent and gantry-control");
    stop(&["gantry-agent", "gantry-control"])?;
    drop(step);
    let agent = run::target().join("up/bin/gantry-agent");
    if agent.exists() {
        let _step = report::step("removing pods, network, cgroups and eBPF programs");
        run::shown(std::process::Command::new(&agent).arg("cleanup"))?;
    }
    clear_bench()?;
    for file in census::FILES {
        remove_path(Path::new(file)).with_context(|| format!("remove {file}"))?;
    }
    for file in ["env", "control.log", "agent.log"] {
        remove_path(&run::target().join("up").join(file))?;
    }
    Ok(())
}

/// Namespaces and programs of a `cargo xtask bench services` that was killed.
fn clear_bench() -> Result<()> {
    if census::bench_netns().is_empty() && !Path::new("/run/gantry-bench").exists() {
        return Ok(());
    }
    let built =
        ["release", "debug"].map(|profile| run::target().join(profile).join("gantry-bench"));
    let Some(bench) = built.iter().find(|path| path.exists()) else {
        bail!("a benchmark of Services left namespaces; `cargo xtask bench services` removes them");
    };
    let _step = report::step("removing what a benchmark of Services left");
    run::shown(std::process::Command::new(bench).args(["services", "/tmp", "--clear"]))
}

fn remove_path(path: &Path) -> std::io::Result<()> {
    let removed = if path.is_dir() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// SIGTERM, then SIGKILL after 10 s, by pid and only to executables of these names.
pub fn stop(names: &[&str]) -> Result<()> {
    let ours = || {
        census::processes()
            .into_iter()
            .filter(|(_, name)| names.contains(&name.as_str()))
    };
    for (pid, _) in ours() {
        // Gone in between is what we want.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    let began = Instant::now();
    while ours().next().is_some() {
        if began.elapsed() > Duration::from_secs(20) {
            bail!("{} do not end, not even by SIGKILL", names.join(" and "));
        }
        if began.elapsed() > Duration::from_secs(10) {
            for (pid, _) in ours() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
