//! Several nodes on this machine, in network namespaces: see `gantry_tests::nodes`.

#![allow(clippy::unwrap_used, reason = "a test's panic is its error report")]

use anyhow::{Context, Result};
use gantry_tests::nodes::{Joined, Lab, claims};
use gantry_tests::scenario::Skipped;

fn run(joined: Joined, more: impl FnOnce(&mut Lab) -> Result<()>) {
    match claims::all(joined, more) {
        Ok(()) => {}
        Err(error) if error.is::<Skipped>() => eprintln!("skipped: {joined:?}: {error}"),
        Err(error) => panic!("{error:#}"),
    }
}

#[test]
fn pods_services_and_policies_reach_over_a_link() {
    run(Joined::Link, |lab| {
        claims::a_balancer_address_moves_when_its_node_has_gone(lab).context("fail-over")
    });
}

#[test]
fn pods_services_and_policies_reach_through_a_tunnel() {
    run(Joined::Router, |_| Ok(()));
}
