//! The guest's first root: our binaries as they are installed, the libraries they name, a static
//! busybox, strace, images, and kernel modules numbered in load order.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cpio::Archive;
use crate::{build, run};

/// What goes into the archive.
pub struct Contents<'a> {
    /// The guest's first process.
    pub init: &'a Path,
    /// The directory of our binaries.
    pub bin: &'a Path,
    /// OCI archives.
    pub images: &'a [PathBuf],
    /// Kernel modules, in load order.
    pub modules: &'a [PathBuf],
    /// The agent's own tests, if they are to run.
    pub tests: Option<&'a Path>,
    /// A tar of packages, if systemd is to be the first process.
    pub systemd: Option<&'a Path>,
}

/// Writes the archive. The guest finds: `/init`, `/usr/lib/gantry/*` (binaries),
/// `/images/*.tar`, `/modules/NN-NAME.ko`, `/bin/busybox`; `/usr/lib/gantry-tests` and `/bin/ip` if wanted.
pub fn write(to: &Path, contents: &Contents) -> Result<()> {
    let Contents {
        init,
        bin,
        images,
        modules,
        tests,
        systemd,
    } = *contents;
    let file = File::create(to).with_context(|| to.display().to_string())?;
    let mut archive = Archive::new(BufWriter::new(file));
    for directory in [
        "proc", "sys", "dev", "run", "tmp", "root", "etc", "var/lib", "mnt",
    ] {
        archive.directory(directory)?;
    }
    // First: what is ours comes in the place of what packages bring by the same name.
    if let Some(systemd) = systemd {
        add_tar(&mut archive, systemd).with_context(|| systemd.display().to_string())?;
    }
    archive.file("etc/hostname", 0o644, b"vm-1\n")?;
    archive.file(
        "etc/hosts",
        0o644,
        b"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 vm-1\n",
    )?;
    archive.file(
        "etc/resolv.conf",
        0o644,
        b"# no resolver outside the cluster\n",
    )?;
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    archive.file("etc/group", 0o644, b"root:x:0:\n")?;
    let mut libraries = BTreeSet::new();
    add_binary(&mut archive, init, "init", &mut libraries)?;
    for binary in build::BINARIES.iter().chain(&["gantry-shim"]) {
        let inside = format!("usr/lib/gantry/{binary}");
        add_binary(&mut archive, &bin.join(binary), &inside, &mut libraries)?;
    }
    if let Some(tests) = tests {
        add_binary(&mut archive, tests, "usr/lib/gantry-tests", &mut libraries)?;
        let ip = run::which("ip").context("no ip (package iproute2)")?;
        add_binary(&mut archive, &ip, "bin/ip", &mut libraries)?;
    }
    // Without it, the scenarios that want it say that they are skipped.
    if let Some(strace) = run::which("strace") {
        add_binary(&mut archive, &strace, "bin/strace", &mut libraries)?;
    }
    for library in &libraries {
        // By its own name where the loader looks for it; a link's target under the link's name.
        archive.file(
            &library.display().to_string(),
            0o755,
            &std::fs::read(library)?,
        )?;
    }
    archive.file(
        "bin/busybox",
        0o755,
        &std::fs::read("/bin/busybox").context("/bin/busybox")?,
    )?;
    archive.link("bin/sh", "busybox")?;
    for image in images {
        let name = image
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        archive.file(&format!("images/{name}"), 0o644, &std::fs::read(image)?)?;
    }
    for (number, module) in modules.iter().enumerate() {
        let name = module
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        archive.file(
            &format!("modules/{number:02}-{name}"),
            0o644,
            &std::fs::read(module)?,
        )?;
    }
    archive.finish()?;
    Ok(())
}

/// Adds what packages hold. Links at the top, of merged directories, are left out: directories of ours are there.
fn add_tar(archive: &mut Archive<BufWriter<File>>, tar: &Path) -> Result<()> {
    let mut files: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    for entry in tar::Archive::new(File::open(tar)?).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let path = path.strip_prefix("./").unwrap_or(&path).to_owned();
        let name = path.to_string_lossy().into_owned();
        let target = entry.link_name()?.map(std::borrow::Cow::into_owned);
        match (entry.header().entry_type(), target) {
            (tar::EntryType::Directory, _) => archive.directory(&name)?,
            (tar::EntryType::Symlink, Some(to)) if name.contains('/') => {
                archive.link(&name, &to.to_string_lossy())?;
            }
            (tar::EntryType::Link, Some(to)) => {
                let to = to.strip_prefix("./").unwrap_or(&to);
                let bytes = files
                    .get(to)
                    .with_context(|| format!("{name}: no {to:?}"))?;
                archive.file(&name, 0o755, bytes)?;
            }
            (tar::EntryType::Regular, _) => {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes)?;
                archive.file(&name, entry.header().mode()? & 0o7777, &bytes)?;
                files.insert(path, bytes);
            }
            _ => {}
        }
    }
    Ok(())
}

/// Adds a binary without its symbols, and notes the libraries that it loads.
fn add_binary(
    archive: &mut Archive<BufWriter<File>>,
    from: &Path,
    inside: &str,
    libraries: &mut BTreeSet<PathBuf>,
) -> Result<()> {
    let stripped = run::target().join("vm/stripped");
    let mut strip = run::program("strip", ["--strip-all", "-o"]);
    run::captured(strip.arg(&stripped).arg(from))?;
    archive.file(inside, 0o755, &std::fs::read(&stripped)?)?;
    libraries.extend(loads(from)?);
    Ok(())
}

/// What `ldd` says: the loader and every library. A static binary has none.
fn loads(binary: &Path) -> Result<Vec<PathBuf>> {
    let mut ldd = run::program("ldd", [binary]);
    let Ok(said) = run::captured(&mut ldd) else {
        return Ok(Vec::new());
    };
    let path = |line: &str| {
        let word = line.split_whitespace().find(|w| w.starts_with('/'))?;
        Some(PathBuf::from(word))
    };
    Ok(said.lines().filter_map(path).collect())
}
