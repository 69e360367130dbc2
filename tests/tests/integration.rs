//! Every scenario on this machine. One test binary; each test prints `skipped: <reason>` where it
//! cannot run.

#![allow(clippy::unwrap_used, reason = "a test's panic is its error report")]

use gantry_tests::cluster::Installation;
use gantry_tests::scenario;

fn run(name: &str) {
    let installation = match Installation::find() {
        Ok(installation) => installation,
        Err(reason) => return eprintln!("skipped: {name}: {reason}"),
    };
    let scenario = scenario::ALL.iter().find(|s| s.name == name).unwrap();
    if let Err(error) = scenario.run(&installation) {
        panic!("{error:#}");
    }
}

#[test]
fn three_replicas_answer_by_name_from_host_and_pod() {
    run("main-job");
}

#[test]
fn limits_are_in_the_kernels_files() {
    run("limits");
}

#[test]
fn a_write_to_a_host_device_fails() {
    run("devices");
}

#[test]
fn capabilities_seccomp_and_masks_hold_for_init_and_exec() {
    run("isolation");
}

#[test]
fn killing_the_agent_changes_nothing_and_loses_nothing() {
    run("agent-kill");
}

#[test]
fn bad_input_gets_a_clear_error() {
    run("bad-input");
}

#[test]
fn logs_follow_and_exec_returns_the_exit_code() {
    run("logs-and-exec");
}

#[test]
fn killing_the_control_plane_loses_nothing_acknowledged() {
    run("control-kill");
}

#[test]
fn probes_gate_and_restart_and_policies_hold() {
    run("probes-and-restarts");
}
