//! The tests' device plugin as a program of its own, for trying things out by hand.

use std::path::Path;

use anyhow::Result;
use gantry_tests::device_plugin;
use tokio::sync::watch;

#[tokio::main]
async fn main() -> Result<()> {
    let (_keep, healthy) = watch::channel(true);
    let directory = Path::new(gantry_agent::devices::DIRECTORY);
    device_plugin::serve(directory, healthy).await
}
