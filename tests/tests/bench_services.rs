//! `cargo xtask bench services` from its beginning to its end, small: every layout must reach every
//! endpoint, and whatever way it ends nothing may be left. No time is judged.

#![allow(clippy::unwrap_used, reason = "a test's panic is its error report")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gantry_tests::census;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// All of them use the same names.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// None, with the reason on stderr, where the machine does not allow it.
fn turn() -> Option<MutexGuard<'static, ()>> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: bench services: needs root");
        return None;
    }
    if Command::new("ip").arg("-V").output().is_err() {
        eprintln!("skipped: bench services: ip is not installed");
        return None;
    }
    Some(ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner))
}

fn bench(out: &Path, options: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gantry-bench"));
    command.args(["services".as_ref(), out.as_os_str()]);
    command.args(options.split_whitespace());
    command
}

/// What of the benchmark is on this machine.
fn left() -> Vec<String> {
    let found = census::take().into_values().flatten();
    found.filter(|name| name.contains("gantry-bench")).collect()
}

#[test]
fn every_layout_reaches_every_endpoint_and_nothing_is_left() {
    let Some(_turn) = turn() else { return };
    let out = tempfile::tempdir().unwrap();
    let output = bench(out.path(), "--quick --services 1,10,1x50")
        .output()
        .unwrap();
    let (said, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{said}\n{errors}");
    let document = std::fs::read(out.path().join("services.json")).unwrap();
    let document: Value = serde_json::from_slice(&document).unwrap();
    let skipped = document["skipped"].to_string();
    let balance = document["balance"].as_array().unwrap();
    for size in ["1", "10", "1x50"] {
        for (layout, name) in [
            ("gantry", "gantry_socket"),
            ("gantry", "gantry_packet"),
            ("gantry", "gantry_node_port"),
            ("iptables-nft", "iptables_nft"),
            ("iptables-nft", "iptables_nft_node_port"),
            ("iptables-legacy", "iptables_legacy"),
            ("iptables-legacy", "iptables_legacy_node_port"),
            ("nftables", "nftables"),
            ("nftables", "nftables_node_port"),
        ] {
            if skipped.contains(layout) {
                eprintln!("skipped: bench services: {layout}: {skipped}");
                continue;
            }
            let row = balance
                .iter()
                .find(|row| row["size"] == size && row["case"] == name);
            let row = row.unwrap_or_else(|| panic!("{name} with {size}: {balance:?}"));
            assert_eq!(row["reached"], row["endpoints"], "{row}");
            for measure in ["connect_p50", "crr", "rr", "stream", "cpu"] {
                let value = &document["measures"][measure]["cases"][name][size]["value"];
                assert!(
                    value.as_f64().is_some_and(|v| v > 0.0),
                    "{measure} of {name}: {value}"
                );
            }
        }
        for layout in ["gantry", "iptables_nft", "iptables_legacy", "nftables"] {
            if skipped.contains(&layout.replace('_', "-")) {
                continue;
            }
            for measure in ["load", "change_p50"] {
                let value = &document["measures"][measure]["cases"][layout][size]["value"];
                assert!(
                    value.as_f64().is_some_and(|v| v > 0.0),
                    "{measure} of {layout}: {value}"
                );
            }
        }
    }
    assert!(skipped.contains("ipvs"), "{skipped}");
    assert!(
        said.lines().all(|line| line.chars().count() <= 100),
        "{said}"
    );
    assert!(
        said.contains("100 %"),
        "progress is shown without a terminal: {said}"
    );
    let report = std::fs::read_to_string(out.path().join("services.html")).unwrap();
    assert!(report.contains("<svg ") && report.contains("3 of 3"));
    assert!(out.path().join("services-crr.svg").exists());
    assert_eq!(left(), Vec::<String>::new());
}

/// A benchmark that has everything: namespaces, a cgroup with a client in it, pinned programs.
struct Running(Child);

impl Running {
    fn start(out: &Path) -> Self {
        // More rounds than it will live to see.
        let options = "--quick --services 10 --only gantry --rounds 100000";
        let child = bench(out, options).stdout(Stdio::null()).spawn().unwrap();
        let running = Self(child);
        let began = Instant::now();
        loop {
            let left = left();
            let has = |end: &str| left.iter().any(|name| name.ends_with(end));
            if has("links/connect4") && has("gantry-outside") {
                return running;
            }
            // Whoever else uses the machine's cluster has its turn first.
            let patience = Duration::from_secs(900);
            assert!(began.elapsed() < patience, "it does not begin");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_signal_ends_it_and_leaves_nothing() {
    let Some(_turn) = turn() else { return };
    let out = tempfile::tempdir().unwrap();
    let mut running = Running::start(out.path());
    kill(Pid::from_raw(running.0.id() as i32), Signal::SIGTERM).unwrap();
    let ended = running.0.wait().unwrap();
    assert_eq!(ended.code(), Some(128 + Signal::SIGTERM as i32));
    assert_eq!(left(), Vec::<String>::new());
    assert!(!out.path().join("services.json").exists());
}

#[test]
fn what_a_killed_one_leaves_is_counted_and_removed_by_name() {
    let Some(_turn) = turn() else { return };
    let out = tempfile::tempdir().unwrap();
    drop(Running::start(out.path()));
    let kinds: Vec<&str> = census::take()
        .into_iter()
        .filter(|(_, found)| found.iter().any(|name| name.contains("gantry-bench")))
        .map(|(kind, _)| kind)
        .collect();
    assert_eq!(kinds, ["bpf", "cgroups", "files", "netns"]);
    assert!(bench(out.path(), "--clear").status().unwrap().success());
    assert_eq!(left(), Vec::<String>::new());
}
