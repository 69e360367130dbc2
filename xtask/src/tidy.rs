//! Checks that no compiler makes: headers, README paths, where `unsafe` may stand, words that must
//! not be committed.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{report, run};

/// The only files that may contain `unsafe`, each with why.
const UNSAFE: [(&str, &str); 16] = [
    (
        "agent/rt/src/executor.rs",
        "seccomp and signals between libcontainer and execve",
    ),
    (
        "agent/rt/src/process.rs",
        "clone3, which no wrapper crate has with CLONE_PARENT",
    ),
    (
        "agent/rt/src/report.rs",
        "takes the descriptor that the shim passes",
    ),
    (
        "agent/shim/src/",
        "libc without a wrapper crate: the shim links nothing else",
    ),
    (
        "agent/src/dataplane/sys.rs",
        "bpf(2) commands that aya does not have, mmap of arrays",
    ),
    (
        "agent/src/memory.rs",
        "settings of the C allocator, which no crate wraps; unmapping of unchanged pages",
    ),
    (
        "agent/src/readiness.rs",
        "registers files with the async runtime",
    ),
    (
        "agent/src/runtime/shim/link.rs",
        "descriptor passing to the shim",
    ),
    (
        "agent/src/user_namespaces/idmap.rs",
        "mount_setattr(2), which no crate wraps",
    ),
    ("ebpf/maps/src/", "plain-old-data markers for aya"),
    ("ebpf/programs/src/", "programs for the BPF virtual machine"),
    (
        "tests/src/bench/",
        "clone and exec as the floor of a measurement",
    ),
    (
        "tests/src/inventory/maps.rs",
        "counts entries of maps by bpf(2), not by the code under test",
    ),
    (
        "tests/tests/simulation/host.rs",
        "takes the place of the C library's clock, randomness, waiting and disk; forks",
    ),
    ("xtask/src/tidy.rs", "the words of this very check"),
    (
        "xtask/src/up.rs",
        "a signal handler that stores to an atomic",
    ),
];

/// Marks of unfinished work, and paths of a developer's machine. Written in two parts, so that this
/// file does not find itself.
const FORBIDDEN: [(&str, &str); 5] = [
    ("FIX", "ME"),
    ("XX", "X:"),
    ("TO", "DO"),
    ("/wo", "rk/"),
    ("/ro", "ot/."),
];

/// Runs all checks; the error lists every finding.
pub fn run() -> Result<()> {
    let _step = report::step("tidy");
    let mut findings = Vec::new();
    let listed = run::captured(&mut run::program(
        "git",
        ["ls-files", "--cached", "--others", "--exclude-standard"],
    ))?;
    for name in listed.lines() {
        let path = run::root().join(name);
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        check_file(name, &text, &mut findings);
    }
    check_readme(&mut findings)?;
    if findings.is_empty() {
        return Ok(());
    }
    bail!("\n  {}", findings.join("\n  "))
}

fn check_file(name: &str, text: &str, findings: &mut Vec<String>) {
    let rust = name.ends_with(".rs");
    let test = name.ends_with("tests.rs") || name.contains("/tests/");
    if rust && !test && !text.lines().take(4).any(|line| line.starts_with("//!")) {
        findings.push(format!(
            "{name}: no `//!` header that says what the module is for"
        ));
    }
    for (number, line) in text.lines().enumerate() {
        for (a, b) in FORBIDDEN {
            if line.contains(&format!("{a}{b}")) {
                findings.push(format!("{name}:{}: contains {a}{b}", number + 1));
            }
        }
        let code = line.trim_start();
        let is_unsafe = rust
            && !test
            && !code.starts_with("//")
            && (code.contains("unsafe {")
                || code.contains("unsafe fn")
                || code.contains("unsafe impl"));
        if is_unsafe && !UNSAFE.iter().any(|(allowed, _)| name.starts_with(allowed)) {
            findings.push(format!(
                "{name}:{}: unsafe outside the modules named in tidy",
                number + 1
            ));
        }
    }
}

/// Every path in backquotes that looks like one of ours exists.
fn check_readme(findings: &mut Vec<String>) -> Result<()> {
    let readme = std::fs::read_to_string(run::root().join("README.md")).context("README.md")?;
    for path in readme
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| is_path(word))
    {
        if !run::root().join(PathBuf::from(path)).exists() {
            findings.push(format!("README.md names {path}, which does not exist"));
        }
    }
    Ok(())
}

fn is_path(word: &str) -> bool {
    let tops = [
        "agent/", "ebpf/", "cni/", "control/", "xtask/", "tests/", ".ci/", ".cargo/",
    ];
    tops.iter().any(|top| word.starts_with(top))
        && word
            .chars()
            .all(|c| c.is_alphanumeric() || "/._-".contains(c))
        && Path::new(word).is_relative()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_name_file_and_line() {
        let mut findings = Vec::new();
        check_file(
            "cni/src/x.rs",
            "fn f() {\n    unsafe { g() }\n}\n",
            &mut findings,
        );
        assert_eq!(findings.len(), 2);
        assert!(findings[0].contains("no `//!` header"));
        assert!(findings[1].starts_with("cni/src/x.rs:2: unsafe"));
    }

    #[test]
    fn only_our_own_paths_are_checked() {
        assert!(is_path("agent/src/lib.rs"));
        assert!(!is_path("/var/log/pods"));
        assert!(!is_path("agent/src/{a,b}.rs"));
        assert!(!is_path("cargo xtask up"));
    }
}
