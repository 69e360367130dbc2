//! Benchmarks of a whole node from their beginning to their end, small: no time is judged.

#![allow(clippy::unwrap_used, reason = "a test's panic is its error report")]

use std::process::Command;

use gantry_tests::census;
use gantry_tests::cluster::Installation;
use serde_json::Value;

/// Runs one, and returns what it has written; none, with the reason on stderr, where no node can be.
fn quick(name: &str) -> Option<Value> {
    if let Err(reason) = Installation::find() {
        eprintln!("skipped: bench {name}: {reason}");
        return None;
    }
    let out = tempfile::tempdir().unwrap();
    let mut bench = Command::new(env!("CARGO_BIN_EXE_gantry-bench"));
    bench.arg(name).arg(out.path()).arg("--quick");
    let output = bench.output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {words}");
    assert!(census::is_zero(&census::take()), "{name} left something");
    let document = std::fs::read(out.path().join(format!("{name}.json"))).unwrap();
    Some(serde_json::from_slice(&document).unwrap())
}

/// That a median was measured of each of these.
fn assert_measured(document: &Value, cases: &[&str]) {
    for case in cases {
        let p50 = document["cases"][case]["p50"].as_f64();
        assert!(p50.is_some_and(|p50| p50 > 0.0), "{case}: {document}");
    }
}

/// One after the other: each has the machine's only node.
#[test]
fn pods_are_started_and_commands_run_beside_runc() {
    for name in ["pod_start", "exec"] {
        if let Some(document) = quick(name) {
            assert_measured(&document, &["gantry", "runc"]);
        }
    }
    if let Some(document) = quick("burst") {
        assert_measured(&document, &["running", "gone", "runc running"]);
    }
}
