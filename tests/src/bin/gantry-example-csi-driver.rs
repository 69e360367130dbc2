//! The tests' CSI driver as a program of its own, for trying things out by hand: its only argument
//! is the directory where volumes are.

use std::path::Path;

use anyhow::{Context, Result};
use gantry_tests::csi_driver;

#[tokio::main]
async fn main() -> Result<()> {
    let data = std::env::args_os().nth(1);
    let data = data.context("usage: gantry-example-csi-driver DIRECTORY")?;
    csi_driver::serve(Path::new("/var/lib/kubelet"), Path::new(&data)).await
}
