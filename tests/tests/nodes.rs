//! Several nodes on this machine, in network namespaces: see `gantry_tests::nodes`.

#![allow(clippy::unwrap_used, reason = "a test's panic is its error report")]

use gantry_tests::nodes::{Joined, claims};
use gantry_tests::scenario::Skipped;

fn run(joined: Joined) {
    match claims::all(joined) {
        Ok(()) => {}
        Err(error) if error.is::<Skipped>() => eprintln!("skipped: {joined:?}: {error}"),
        Err(error) => panic!("{error:#}"),
    }
}

#[test]
fn pods_services_and_policies_reach_over_a_link() {
    run(Joined::Link);
}

#[test]
fn pods_services_and_policies_reach_through_a_tunnel() {
    run(Joined::Router);
}
