//! `gantry-agent cleanup`: the machine as it was before the agent came.
//!
//! Everything is found by looking (sandboxes, cgroups, links, pins), nothing is taken from a record
//! of what was made, so it also works after a crash. It goes on after an error and tells them all.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Result, bail};
use futures_util::{StreamExt, stream};
use tracing::info;

use crate::cgroups::{Cgroups, Policy};
use crate::paths::Paths;
use crate::runtime::{Runtime, shim::ShimRuntime};
use crate::user_namespaces::{Ranges, idmap};
use crate::{dataplane, devices, images, network, run_directory, volumes};

/// Sandboxes removed at the same time: each waits for processes to die and for the kernel.
const REMOVAL_COUNT_MAX: usize = 16;

/// Removes all pods, networks, cgroups, programs. The agent must not run.
pub async fn run(paths: &Paths) -> Result<()> {
    let mut errors = Vec::new();
    let mut note = |what: String, result: Result<(), String>| {
        if let Err(error) = result {
            errors.push(format!("{what}: {error}"));
        }
    };
    let runtime = ShimRuntime::new(paths.clone());
    match runtime.list().await {
        Ok(found) => {
            info!(sandboxes = found.len(), "removing");
            let removals = found.iter().map(|sandbox| async {
                let removed = runtime.remove_sandbox(&sandbox.pod).await;
                (format!("sandbox {}", sandbox.pod), removed)
            });
            let mut removals = stream::iter(removals).buffer_unordered(REMOVAL_COUNT_MAX);
            while let Some((what, removed)) = removals.next().await {
                note(what, removed.map_err(|e| e.to_string()));
            }
        }
        Err(error) => note("sandboxes".into(), Err(error.to_string())),
    }
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
        let removed = volumes::remove(&uid, paths).await;
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
    let unmounted = run_directory::remove(&paths.run);
    note(
        paths.run.display().to_string(),
        unmounted.map_err(|e| e.to_string()),
    );
    // Plugins see by it that there is nobody to register with.
    let _ = std::fs::remove_file(Path::new(devices::DIRECTORY).join(devices::SOCKET));
    let _ = std::fs::remove_dir(devices::DIRECTORY);
    note("logs".into(), remove_logs(paths).map_err(|e| e.to_string()));
    if errors.is_empty() {
        return Ok(());
    }
    bail!(
        "not everything could be removed:\n  {}",
        errors.join("\n  ")
    )
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
