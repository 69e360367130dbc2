//! A node that holds hundreds of pods: how many this machine has room for, made and removed in
//! batches.
//!
//! More than the default 110 pods need a larger part of the cluster's addresses and a flag of the
//! agent; nothing of the machine is changed.

use anyhow::Result;
use futures_util::future::try_join_all;

use super::api::{Api, PodWatch, obedient_pod};
use crate::cluster::{Cluster, Installation};

/// What the targets speak of.
const POD_COUNT_MAX: usize = 500;
/// Beside those, for pods that a benchmark adds.
const SPARE_COUNT: usize = 20;
/// At once: more would only wait for each other.
const BATCH: usize = 50;
/// What a pod of a shell may take, kernel's part included.
const POD_MIB: u64 = 4;

/// A cluster whose node takes that many pods.
pub(super) fn start(installation: &Installation, pods: usize) -> Result<Cluster> {
    let most = (pods + SPARE_COUNT).to_string();
    // A /22 has 1,022 addresses: as many as a bridge has ports.
    Cluster::start_with(
        installation,
        &["--node-cidr-prefix", "22"],
        &["--max-pods", &most],
    )
}

/// 500, or what half of the free memory holds, or what `GANTRY_BENCH_PODS` says.
pub(super) fn pod_count() -> Result<usize> {
    let wanted = std::env::var("GANTRY_BENCH_PODS").ok();
    let wanted = wanted.and_then(|text| text.parse().ok());
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    Ok(fitting(&meminfo, wanted.unwrap_or(POD_COUNT_MAX)))
}

fn fitting(meminfo: &str, wanted: usize) -> usize {
    let available = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = available.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    let fits = kib.unwrap_or(0) / 1024 / 2 / POD_MIB;
    usize::try_from(fits).map_or(wanted, |fits| fits.max(10).min(wanted))
}

/// Makes them; returns when all are Running.
pub(super) async fn fill(api: &Api, watch: &mut PodWatch, names: &[String]) -> Result<()> {
    for batch in names.chunks(BATCH) {
        let objects: Vec<_> = batch.iter().map(|name| obedient_pod(name)).collect();
        try_join_all(objects.iter().map(|object| api.create("pods", object))).await?;
        watch.all_running(batch).await?;
    }
    Ok(())
}

/// Deletes them; returns when the objects have gone.
pub(super) async fn empty(api: &Api, watch: &mut PodWatch, names: &[String]) -> Result<()> {
    for batch in names.chunks(BATCH) {
        try_join_all(batch.iter().map(|name| api.delete_pod(name))).await?;
        watch.deleted(batch.len()).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_machine_gets_fewer_pods() {
        let meminfo = "MemTotal: 1 kB\nMemAvailable:   819200 kB\n";
        assert_eq!(fitting(meminfo, POD_COUNT_MAX), 100);
        assert_eq!(fitting(meminfo, 7), 7);
        assert_eq!(
            fitting("MemAvailable: 99999999 kB\n", POD_COUNT_MAX),
            POD_COUNT_MAX
        );
        assert_eq!(fitting("", POD_COUNT_MAX), 10);
    }
}
