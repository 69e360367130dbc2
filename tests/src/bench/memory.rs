//! What programs and the kernel keep in memory, read from the kernel's own files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::census;

/// The proportional set sizes of all processes of this name: a page shared between them counts once.
///
/// # Errors
/// When there is none: nothing measured must not pass for nothing needed.
pub(super) fn of_programs_mib(name: &str) -> Result<f64> {
    let mut ours = census::processes();
    ours.retain(|(_, n)| n == name);
    if ours.is_empty() {
        bail!("no {name} of this cluster runs: its memory cannot be measured");
    }
    let sizes: Result<Vec<f64>> = ours
        .into_iter()
        .map(|(pid, _)| {
            let path = format!("/proc/{pid}/smaps_rollup");
            let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
            pss_kib(&text).with_context(|| format!("{path} has no Pss line"))
        })
        .collect();
    Ok(sizes?.iter().sum::<f64>() / 1024.0)
}

/// The figure of `smaps_rollup`.
pub(super) fn pss_kib(rollup: &str) -> Option<f64> {
    let line = rollup.lines().find_map(|l| l.strip_prefix("Pss:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The kernel's own memory that is charged to the pods and to their shims: stacks, page tables,
/// inodes, sockets. None where the kernel does not tell.
pub(super) fn of_kernel_mib() -> Option<f64> {
    let bytes =
        ["gantry", "gantry-shims"].map(|name| kernel_bytes(Path::new("/sys/fs/cgroup"), name));
    // There is no shim's cgroup before the first pod.
    let [pods, shims] = bytes;
    pods.map(|pods| (pods + shims.unwrap_or(0.0)) / (1024.0 * 1024.0))
}

fn kernel_bytes(mount: &Path, name: &str) -> Option<f64> {
    let read = |path: PathBuf| std::fs::read_to_string(path).ok();
    if let Some(stat) = read(mount.join(name).join("memory.stat")) {
        let line = stat.lines().find_map(|l| l.strip_prefix("kernel "))?;
        return line.trim().parse().ok();
    }
    let usage = mount
        .join("memory")
        .join(name)
        .join("memory.kmem.usage_in_bytes");
    read(usage)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pss_line_is_read_and_not_its_parts() {
        let rollup = "0-f ---p 0 0:0 0 [rollup]\nRss:  900 kB\nPss_Dirty: 1 kB\nPss:   307 kB\n";
        assert_eq!(pss_kib(rollup), Some(307.0));
        assert_eq!(pss_kib(""), None);
    }

    #[test]
    fn the_kernels_part_is_read_in_both_hierarchies() {
        let mount = tempfile::tempdir().unwrap();
        let v1 = mount.path().join("memory/a");
        std::fs::create_dir_all(&v1).unwrap();
        std::fs::write(v1.join("memory.kmem.usage_in_bytes"), "4096\n").unwrap();
        assert_eq!(kernel_bytes(mount.path(), "a"), Some(4096.0));
        let v2 = mount.path().join("b");
        std::fs::create_dir_all(&v2).unwrap();
        std::fs::write(
            v2.join("memory.stat"),
            "anon 1\nkernel_stack 2\nkernel 8192\n",
        )
        .unwrap();
        assert_eq!(kernel_bytes(mount.path(), "b"), Some(8192.0));
        assert_eq!(kernel_bytes(mount.path(), "c"), None);
    }
}
