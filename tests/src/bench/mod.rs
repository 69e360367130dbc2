//! What Gantry costs, measured beside what it replaces and beside the kernel's own floor.
//!
//! ```text
//! cargo xtask bench ─► gantry-bench NAME ─► pod_start, burst, exec, ... ─► report ─► NAME.json
//!                                              │ api: gRPC create, watch    probe: small child processes
//!                                              └ cluster: one node from the built binaries, removed at the end
//! ```
//! `services` needs no cluster: it makes nodes of its own; `control` measures the control plane alone.
//!
//! Figures are ratios within one run: what is compared alternates, call by call, so that both see
//! the same neighbours. A figure is the median over rounds of each round's percentile. Nothing here
//! decides whether a figure is good enough except the target written beside it.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::cluster::Installation;

mod api;
mod burst;
mod containerd;
pub mod control;
mod density;
mod exec;
mod footprint;
mod full_node;
mod memory;
mod pod_start;
mod podman;
pub mod probe;
pub mod report;
mod restart;
mod runc;
mod service_connect;
pub mod services;

/// The benchmarks' names, in the order of running.
pub const NAMES: [&str; 7] = [
    "pod_start",
    "burst",
    "exec",
    "restart",
    "service_connect",
    "footprint",
    "density",
];

/// How much is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    /// What figures are made of.
    Whole,
    /// From its beginning to its end, but no figure: for tests, of the benchmarks that have it.
    Quick,
}

impl Size {
    fn of(self, whole: usize) -> usize {
        match self {
            Self::Whole => whole,
            Self::Quick => whole.div_ceil(10),
        }
    }
}

/// Runs one and writes `NAME.json` into `out`.
pub fn run(name: &str, size: Size, installation: &Installation, out: &Path) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the async runtime")?;
    let report = match name {
        "pod_start" => runtime.block_on(Box::pin(pod_start::run(installation, size)))?,
        "burst" => runtime.block_on(Box::pin(burst::run(installation, size)))?,
        "exec" => runtime.block_on(Box::pin(exec::run(installation, size)))?,
        name if size == Size::Quick => bail!("{name} is measured whole or not at all"),
        "restart" => runtime.block_on(Box::pin(restart::run(installation)))?,
        "service_connect" => runtime.block_on(Box::pin(service_connect::run(installation)))?,
        "density" => runtime.block_on(Box::pin(density::run(installation)))?,
        "footprint" => runtime.block_on(Box::pin(footprint::run(installation)))?,
        other => bail!("no benchmark {other:?}: there are {}", NAMES.join(", ")),
    };
    let path = out.join(format!("{name}.json"));
    let text = serde_json::to_string_pretty(&report.to_json())?;
    std::fs::write(&path, text + "\n").with_context(|| format!("write {}", path.display()))
}
