//! Containers' cgroups that are made beside the rest of their pod's sandbox.
//!
//! ```text
//! pod's cgroup ─► its first containers' ┄┄ network, volumes, shim ┄┄► ensure_container takes them
//! ```
//! A container that starts with its pod then finds a cgroup with all its limits.

use std::sync::PoisonError;

use super::limits::Limits;
use super::{CgroupError, Cgroups};

impl Cgroups {
    /// Makes the cgroups of containers that start soon, by name: [`Cgroups::ensure_container`] then
    /// finds them ready. Errors are left to that call. Containers with CPUs of their own are left
    /// out: those are given at the start.
    pub async fn containers_in_advance(&self, pod_path: &str, containers: Vec<(String, Limits)>) {
        let pod_path = pod_path.to_owned();
        let made = self.blocking(move |this| {
            for (name, limits) in containers {
                if limits.exclusive_cpus > 0 {
                    continue;
                }
                let path = format!("{pod_path}/{name}");
                this.ensure_container_blocking(&path, &limits)?;
                this.ready().insert(path, limits);
            }
            Ok(())
        });
        if let Err(error) = made.await {
            tracing::debug!(%error, "cgroups in advance");
        }
    }

    /// Whether this cgroup was made in advance with these limits and nobody has asked since.
    pub(super) fn take_ready(&self, path: &str, limits: &Limits) -> Result<bool, CgroupError> {
        if self.ready().remove(path).as_ref() != Some(limits) {
            return Ok(false);
        }
        Ok(self.dirs(path)?.iter().all(|dir| dir.is_dir()))
    }

    /// Forgets what was made in advance below a pod's cgroup.
    pub(super) fn forget_ready(&self, pod_path: &str) {
        let below = |path: &String| {
            path.strip_prefix(pod_path)
                .is_some_and(|rest| rest.starts_with('/'))
        };
        self.ready().retain(|path, _| !below(path));
    }

    fn ready(&self) -> std::sync::MutexGuard<'_, std::collections::BTreeMap<String, Limits>> {
        self.shared
            .ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
