//! Debian's cloud kernels: fetched by apt, unpacked without installing, modules in load order.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{report, run};

/// What the guest needs that Debian builds as modules.
const WANTED: [&str; 17] = [
    "overlay",
    "veth",
    "bridge",
    "8021q",
    "sch_ingress",
    "cls_bpf",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    // Both ends of an NFS volume.
    "nfsv4",
    "nfsd",
    // Of several machines: their link, their disk, what they ask for, and tunnels between them.
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "vxlan",
    "wireguard",
];

/// Returns the kernel image and the files of its modules, dependencies first.
pub fn debian(directory: &Path, version: &str) -> Result<(PathBuf, Vec<PathBuf>)> {
    let package = package(version)?;
    let unpacked = directory.join(&package);
    if !unpacked.join("complete").exists() {
        fetch(directory, &package, &unpacked)?;
    }
    let image = newest(&unpacked.join("boot"), "vmlinuz-")?;
    let release = image
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let release = release.trim_start_matches("vmlinuz-");
    let modules = unpacked.join("lib/modules").join(release).join("kernel");
    let modules = if modules.exists() {
        modules
    } else {
        unpacked.join("usr/lib/modules").join(release)
    };
    Ok((image, load_order(&modules)?))
}

/// The newest cloud kernel of that version that apt knows.
fn package(version: &str) -> Result<String> {
    let arch = if std::env::consts::ARCH == "aarch64" {
        "arm64"
    } else {
        "amd64"
    };
    let listed = run::captured(&mut run::program(
        "apt-cache",
        [
            "search",
            "--names-only",
            &format!("^linux-image-{version}[.-][0-9.+a-z-]*cloud-{arch}$"),
        ],
    ))?;
    // The one without a patch level has no kernel in it: it depends on the newest.
    let meta = format!("linux-image-{version}-cloud-{arch}");
    let names = listed.lines().filter_map(|l| l.split_whitespace().next());
    let names = names.filter(|name| *name != meta);
    let newest = names.max_by_key(|name| {
        name.split(|c: char| !c.is_ascii_digit())
            .filter_map(|n| n.parse::<u32>().ok())
            .collect::<Vec<_>>()
    });
    match newest {
        Some(name) => Ok(name.to_owned()),
        None => bail!(
            "apt knows no linux-image-{version}*-cloud-{arch} (Debian has them). \
             Run `apt-get update`, or give a kernel of your own: --kernel FILE"
        ),
    }
}

fn fetch(directory: &Path, package: &str, unpacked: &Path) -> Result<()> {
    report::note(format!("fetching {package}"));
    let fetched = directory.join("fetched");
    std::fs::create_dir_all(&fetched)?;
    run::captured(run::program("apt-get", ["-q", "download", package]).current_dir(&fetched))?;
    let archive = std::fs::read_dir(&fetched)?
        .flatten()
        .map(|e| e.path())
        .find(|p| {
            p.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with(package))
        })
        .with_context(|| format!("apt-get download {package} left no file"))?;
    let mut dpkg = run::program("dpkg-deb", ["--extract"]);
    run::captured(dpkg.arg(&archive).arg(unpacked))?;
    std::fs::remove_file(&archive)?;
    // From 6.12 on modules are compressed; the guest loads them as they are in the initramfs.
    let compressed = "find . -name '*.ko.xz' -print0 | xargs -0 -r xz --decompress";
    let mut xz = run::program("sh", ["-c", compressed]);
    run::captured(xz.current_dir(unpacked)).context("modules: xz (package xz-utils)")?;
    std::fs::write(unpacked.join("complete"), "")?;
    Ok(())
}

fn newest(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = std::fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| {
            p.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with(prefix))
        })
        .collect();
    found.sort();
    found
        .pop()
        .with_context(|| format!("no {prefix}* in {}", directory.display()))
}

/// Every wanted module after what it depends on; one that is built in has no file.
fn load_order(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = HashMap::new();
    index(directory, &mut files)?;
    let mut order = Vec::new();
    for name in WANTED {
        add(name, &files, &mut order)?;
    }
    Ok(order)
}

fn index(directory: &Path, files: &mut HashMap<String, PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    for path in entries.flatten().map(|e| e.path()) {
        if path.is_dir() {
            index(&path, files)?;
        } else if let Some(name) = path.file_name().map(|n| n.to_string_lossy().into_owned())
            && let Some((name, _)) = name.split_once(".ko")
        {
            // "-" and "_" are the same in module names.
            files.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn add(name: &str, files: &HashMap<String, PathBuf>, order: &mut Vec<PathBuf>) -> Result<()> {
    let Some(file) = files.get(&name.replace('-', "_")) else {
        return Ok(());
    };
    if order.contains(file) {
        return Ok(());
    }
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    for needed in depends(&bytes) {
        add(&needed, files, order)?;
    }
    order.push(file.clone());
    Ok(())
}

/// The `depends=` entry of a module's .modinfo section.
fn depends(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|w| w == key) else {
        return Vec::new();
    };
    let value = module[at + key.len()..]
        .split(|b| *b == 0)
        .next()
        .unwrap_or_default();
    let names = String::from_utf8_lossy(value).into_owned();
    names
        .split(',')
        .filter(|n| !n.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        assert_eq!(
            depends(b"\x7fELF..\0name=bridge\0depends=stp,llc\0retpoline=Y\0"),
            ["stp", "llc"]
        );
        assert!(depends(b"\0depends=\0").is_empty());
        assert!(depends(b"nothing").is_empty());
    }
}
