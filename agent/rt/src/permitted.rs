//! Takes out of a process document what this machine's root may not do.
//!
//! A root without CAP_SYS_RESOURCE (in a container, on a hardened host) may lower neither its
//! oom_score_adj nor raise hard limits. libcontainer would fail the container for that; a
//! container that runs with less is better, and the agent says at its start what is missing.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use caps::{CapSet, Capability};
use libcontainer::oci_spec::runtime::{PosixRlimit, PosixRlimitBuilder, Process, Spec};

/// True when the spec was changed.
pub(crate) fn restrict_spec(spec: &mut Spec) -> anyhow::Result<bool> {
    let Some(process) = spec.process_mut() else {
        return Ok(false);
    };
    restrict(process)
}

/// The same for an exec's process document, rewritten in place.
pub(crate) fn restrict_process_file(path: &Path) -> anyhow::Result<()> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut process: Process = serde_json::from_slice(&text)
        .with_context(|| format!("{} is no OCI process", path.display()))?;
    if restrict(&mut process)? {
        fs::write(path, serde_json::to_vec(&process)?)
            .with_context(|| format!("cannot rewrite {}", path.display()))?;
    }
    Ok(())
}

fn restrict(process: &mut Process) -> anyhow::Result<bool> {
    let mut changed = false;
    if let Some(score) = process.oom_score_adj()
        && !oom_score_adj_permitted(score)
    {
        process.set_oom_score_adj(None);
        changed = true;
    }
    let privileged = caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_RESOURCE)?;
    if let Some(rlimits) = process.rlimits().clone()
        && !privileged
    {
        let clamped = rlimits
            .iter()
            .map(clamp)
            .collect::<anyhow::Result<Vec<_>>>()?;
        changed |= clamped != rlimits;
        process.set_rlimits(Some(clamped));
    }
    Ok(changed)
}

/// By doing it: the rule (privilege, or not below the lowest value ever set) is the kernel's.
/// Init inherits it; libcontainer's own way sets the same value again.
fn oom_score_adj_permitted(score: i32) -> bool {
    File::options()
        .write(true)
        .open("/proc/self/oom_score_adj")
        .and_then(|mut file| file.write_all(score.to_string().as_bytes()))
        .is_ok()
}

/// Not above this process's own hard limit.
fn clamp(rlimit: &PosixRlimit) -> anyhow::Result<PosixRlimit> {
    let limits =
        fs::read_to_string("/proc/self/limits").context("cannot read /proc/self/limits")?;
    let hard = limits
        .lines()
        .find_map(|line| line.strip_prefix(row(&rlimit.typ().to_string())))
        .and_then(|rest| rest.split_ascii_whitespace().nth(1)?.parse::<u64>().ok())
        // "unlimited", or a limit this table does not name.
        .unwrap_or(u64::MAX);
    Ok(PosixRlimitBuilder::default()
        .typ(rlimit.typ())
        .hard(rlimit.hard().min(hard))
        .soft(rlimit.soft().min(hard))
        .build()?)
}

/// The limit's name in `/proc/self/limits`.
fn row(name: &str) -> &'static str {
    match name {
        "RLIMIT_CPU" => "Max cpu time",
        "RLIMIT_FSIZE" => "Max file size",
        "RLIMIT_DATA" => "Max data size",
        "RLIMIT_STACK" => "Max stack size",
        "RLIMIT_CORE" => "Max core file size",
        "RLIMIT_RSS" => "Max resident set",
        "RLIMIT_NPROC" => "Max processes",
        "RLIMIT_NOFILE" => "Max open files",
        "RLIMIT_MEMLOCK" => "Max locked memory",
        "RLIMIT_AS" => "Max address space",
        "RLIMIT_LOCKS" => "Max file locks",
        "RLIMIT_SIGPENDING" => "Max pending signals",
        "RLIMIT_MSGQUEUE" => "Max msgqueue size",
        "RLIMIT_NICE" => "Max nice priority",
        "RLIMIT_RTPRIO" => "Max realtime priority",
        _ => "Max realtime timeout",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::PosixRlimitType;

    #[test]
    fn a_limit_is_clamped_to_the_own_hard_limit() {
        let wanted = PosixRlimitBuilder::default()
            .typ(PosixRlimitType::RlimitNofile)
            .hard(u64::MAX)
            .soft(16u64)
            .build()
            .unwrap();
        let got = clamp(&wanted).unwrap();
        assert!(got.hard() < u64::MAX && got.soft() == 16);
    }
}
