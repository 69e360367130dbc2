//! `gantry-agent cleanup`: the machine as it was before the agent came.
//!
//! Everything is found by looking (sandboxes, cgroups, links, pins), nothing is taken from a record
//! of what was made, so it also works after a crash. It goes on after an error and tells them all.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use futures_util::{StreamExt, stream};
use tracing::{info, warn};

use crate::cgroups::{Cgroups, Policy};
use crate::paths::Paths;
use crate::runtime::{ObservedSandbox, Runtime, shim::ShimRuntime};
use crate::user_namespaces::{Ranges, idmap};
use crate::volumes::csi::{self, CsiDrivers};
use crate::{dataplane, devices, dns, images, network, run_directory, volumes};

/// Sandboxes removed at the same time: each waits for processes to die and for the kernel.
const REMOVAL_COUNT_MAX: usize = 16;
/// For one call to a driver whose volumes go, and which may be gone itself.
const PATIENCE: Duration = Duration::from_secs(20);

/// Removes all pods, networks, cgroups, programs. The agent must not run.
pub async fn run(paths: &Paths) -> Result<()> {
    let mut errors = Vec::new();
    let mut note = |what: String, result: Result<(), String>| {
        if let Err(error) = result {
            errors.push(format!("{what}: {error}"));
        }
    };
    let runtime = ShimRuntime::new(paths.clone());
    let drivers = CsiDrivers::with_patience(paths, PATIENCE);
    match runtime.list().await {
        Ok(found) => {
            info!(sandboxes = found.len(), "removing");
            // Users of drivers' volumes first: a driver may be a pod itself, and must outlive them.
            let (users, others): (Vec<_>, Vec<_>) = found
                .into_iter()
                .partition(|sandbox| csi::has_records(paths, &sandbox.pod));
            for (what, removed) in remove_sandboxes(&runtime, &users).await {
                note(what, removed);
            }
            take_back(paths, &drivers).await;
            for (what, removed) in remove_sandboxes(&runtime, &others).await {
                note(what, removed);
            }
        }
        Err(error) => note("sandboxes".into(), Err(error.to_string())),
    }
    // It is in their cgroup.
    let ended = dns::end_holder(&dns::HoldConfig::standard(paths)).await;
    note(
        "resolver's sockets".into(),
        ended.map_err(|e| e.to_string()),
    );
    note(
        "shims".into(),
        runtime
            .remove_shim_cgroup()
            .await
            .map_err(|e| e.to_string()),
    );
    note(
        "network".into(),
        network::remove_all(paths).await.map_err(|e| e.to_string()),
    );
    note(
        "eBPF".into(),
        dataplane::remove_all(paths).map_err(|e| e.to_string()),
    );
    note(
        "id-mapped mounts".into(),
        idmap::remove_all(&paths.run).map_err(|e| e.to_string()),
    );
    for layers in run_layers(paths) {
        let removed = images::remove_rootfs(&layers).await;
        note(
            layers.display().to_string(),
            removed.map_err(|e| e.to_string()),
        );
    }
    for uid in pod_uids(paths) {
        let mut removed = volumes::remove(&uid, paths, &drivers).await;
        if removed.is_err() && csi::has_records(paths, &uid) {
            // The machine is to be as before, also where a driver is gone: it is told, and undone.
            note(
                format!("volumes of {uid}"),
                removed.map_err(|error| format!("{error}; unmounted without the driver")),
            );
            let abandoned = drivers.abandon(&uid).await;
            removed = match abandoned {
                Ok(()) => volumes::remove(&uid, paths, &drivers).await,
                failed => failed,
            };
        }
        note(
            format!("volumes of {uid}"),
            removed.map_err(|e| e.to_string()),
        );
    }
    match Cgroups::detect(Policy::default()) {
        Ok(cgroups) => {
            note(
                "cgroups".into(),
                cgroups.remove_all().await.map_err(|e| e.to_string()),
            );
        }
        Err(error) => note("cgroups".into(), Err(error.to_string())),
    }
    let released = Ranges::new(&paths.run).retain(&HashSet::new());
    note("id ranges".into(), released.map_err(|e| e.to_string()));
    let secrets = paths.run.join("secrets");
    if let Err(error) = std::fs::remove_dir_all(&secrets)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        note(secrets.display().to_string(), Err(error.to_string()));
    }
    // The kernel's Services have gone: the next start holds them as after a reboot.
    let begun = paths.run.join(crate::pods::hold::BEGUN);
    if let Err(error) = std::fs::remove_file(&begun)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        note(begun.display().to_string(), Err(error.to_string()));
    }
    let unmounted = run_directory::remove(&paths.run);
    note(
        paths.run.display().to_string(),
        unmounted.map_err(|e| e.to_string()),
    );
    // Plugins see by it that there is nobody to register with.
    let _ = std::fs::remove_file(Path::new(devices::DIRECTORY).join(devices::SOCKET));
    let _ = std::fs::remove_dir(devices::DIRECTORY);
    remove_empty_kubelet_directories(&paths.kubelet);
    note("logs".into(), remove_logs(paths).map_err(|e| e.to_string()));
    if errors.is_empty() {
        return Ok(());
    }
    bail!(
        "not everything could be removed:\n  {}",
        errors.join("\n  ")
    )
}

/// Has drivers take their volumes back while they run.
async fn take_back(paths: &Paths, drivers: &CsiDrivers) {
    for uid in pod_uids(paths) {
        if let Err(words) = drivers.unpublish_all(&uid).await {
            warn!(pod = %uid, "volumes of drivers, tried again at the end: {words}");
        }
    }
}

/// Directories that the agent has made for drivers, where nobody has anything in them.
fn remove_empty_kubelet_directories(kubelet: &Path) {
    let stages = kubelet.join("plugins/kubernetes.io/csi");
    let drivers = children(&stages);
    let above = stages.ancestors().take_while(|path| *path != kubelet);
    let others = [kubelet.join(csi::REGISTRY), kubelet.join("pods")];
    let all = drivers.iter().map(std::path::PathBuf::as_path);
    let all = all.chain(above).chain(others.iter().map(|p| p.as_path()));
    for directory in all.chain([kubelet]) {
        // Refused where it is not empty.
        let _ = std::fs::remove_dir(directory);
    }
}

/// Side by side; what each has come to.
async fn remove_sandboxes(
    runtime: &ShimRuntime,
    found: &[ObservedSandbox],
) -> Vec<(String, Result<(), String>)> {
    let removals = found.iter().map(|sandbox| async {
        let removed = runtime.remove_sandbox(&sandbox.pod).await;
        let what = format!("sandbox {}", sandbox.pod);
        (what, removed.map_err(|e| e.to_string()))
    });
    let removals = stream::iter(removals).buffer_unordered(REMOVAL_COUNT_MAX);
    removals.collect().await
}

fn children(path: &std::path::Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return Vec::new();
    };
    entries.flatten().map(|e| e.path()).collect()
}

fn pod_uids(paths: &Paths) -> Vec<crate::ids::PodUid> {
    let name = |path: std::path::PathBuf| {
        crate::ids::PodUid::new(&path.file_name()?.to_string_lossy()).ok()
    };
    children(&paths.lib.join("pods"))
        .into_iter()
        .filter_map(name)
        .collect()
}

fn run_layers(paths: &Paths) -> Vec<std::path::PathBuf> {
    pod_uids(paths)
        .iter()
        .flat_map(|uid| children(&paths.pod_lib(uid).join("containers")))
        .flat_map(|container| children(&container))
        .collect()
}

/// Logs of pods that are ours, by the mark in their directory.
fn remove_logs(paths: &Paths) -> std::io::Result<()> {
    for directory in children(&paths.log) {
        if directory.join(crate::pods::LOG_OWNER_MARK).exists() {
            std::fs::remove_dir_all(directory)?;
        }
    }
    // Stays when another node agent keeps its logs there.
    let _ = std::fs::remove_dir(&paths.log);
    Ok(())
}
