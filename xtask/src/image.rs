//! OCI images from Debian packages, without a registry: a real nginx, and busybox.
//!
//! `mmdebstrap --variant=extract` unpacks a package and what it needs into a tar; a second small
//! layer holds what the packages' scripts would have made (users, directories, links).

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{report, run};

/// One image to make.
pub struct Recipe {
    /// `gantry.local/NAME:TAG`
    pub reference: &'static str,
    packages: &'static [&'static str],
    entrypoint: &'static [&'static str],
    command: &'static [&'static str],
    /// Directories with owner and mode.
    directories: &'static [(&'static str, u32, u32)],
    /// Links to busybox, one for each of its applets.
    applets: bool,
}

const WWW_DATA: u32 = 33;

/// nginx as Debian builds it; its configuration and page come from a ConfigMap.
pub const NGINX: Recipe = Recipe {
    reference: "gantry.local/nginx:debian",
    packages: &["nginx-light", "busybox-static"],
    entrypoint: &["/usr/sbin/nginx"],
    command: &["-g", "daemon off;"],
    directories: &[
        ("var/lib/nginx", WWW_DATA, 0o755),
        ("var/log/nginx", WWW_DATA, 0o755),
        ("run", 0, 0o755),
        ("tmp", 0, 0o1777),
    ],
    applets: true,
};

/// busybox with all its applets.
pub const BUSYBOX: Recipe = Recipe {
    reference: "gantry.local/busybox:debian",
    packages: &["busybox-static"],
    entrypoint: &[],
    command: &["/bin/sh"],
    directories: &[("tmp", 0, 0o1777), ("root", 0, 0o700)],
    applets: true,
};

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\nadm:x:4:\nwww-data:x:33:\nnogroup:x:65534:\n";

/// Makes the archive unless it is there, and returns its path: `target/images/NAME.tar`.
pub fn archive(recipe: &Recipe) -> Result<PathBuf> {
    let images = run::target().join("images");
    std::fs::create_dir_all(&images).with_context(|| format!("create {}", images.display()))?;
    let name = recipe.reference.replace(['/', ':'], "-");
    let archive = images.join(format!("{name}.tar"));
    if archive.exists() {
        return Ok(archive);
    }
    let files = images.join(format!("{name}.rootfs.tar"));
    report::note(format!(
        "{}: unpacking {}",
        recipe.reference,
        recipe.packages.join(", ")
    ));
    packages_to_tar(recipe.packages, &files)?;
    let made = images.join(format!("{name}.tar.new"));
    write(recipe, &files, &made).with_context(|| format!("write {}", made.display()))?;
    std::fs::remove_file(&files)?;
    std::fs::rename(&made, &archive)?;
    Ok(archive)
}

/// Packages and what they need, unpacked: `target/images/NAME.files.tar`, made unless it is there.
pub fn files_of(packages: &[&str]) -> Result<PathBuf> {
    let images = run::target().join("images");
    std::fs::create_dir_all(&images).with_context(|| format!("create {}", images.display()))?;
    let files = images.join(format!("{}.files.tar", packages.join("-")));
    if !files.exists() {
        report::note(format!("unpacking {}", packages.join(", ")));
        let made = files.with_extension("new.tar");
        packages_to_tar(packages, &made)?;
        std::fs::rename(&made, &files)?;
    }
    Ok(files)
}

fn packages_to_tar(packages: &[&str], files: &Path) -> Result<()> {
    let mut mmdebstrap = run::program("mmdebstrap", ["--quiet", "--variant=extract"]);
    if !run::is_root() {
        // The others want a user's range of ids; what is only unpacked needs none.
        mmdebstrap.arg("--mode=chrootless");
    }
    mmdebstrap.arg(format!("--include={}", packages.join(",")));
    let noise = [
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "usr/share/info",
    ];
    for path in noise {
        mmdebstrap.arg(format!("--dpkgopt=path-exclude=/{path}/*"));
    }
    mmdebstrap.arg(suite()?).arg(files);
    // The host's own apt sources: whatever mirror this machine uses.
    mmdebstrap.args(apt_sources());
    run::captured(&mut mmdebstrap).map(drop)
}

fn suite() -> Result<String> {
    let release = std::fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
    let line = release
        .lines()
        .find_map(|l| l.strip_prefix("VERSION_CODENAME="));
    match line {
        Some(name) => Ok(name.trim_matches('"').to_owned()),
        None => bail!("/etc/os-release has no VERSION_CODENAME: which Debian suite is this?"),
    }
}

/// The Debian or Ubuntu source files of this host, for mmdebstrap to read.
fn apt_sources() -> Vec<PathBuf> {
    let candidates = [
        "/etc/apt/sources.list.d/debian.sources",
        "/etc/apt/sources.list.d/ubuntu.sources",
        "/etc/apt/sources.list",
    ];
    let useful = |path: &PathBuf| {
        std::fs::read_to_string(path).is_ok_and(|t| {
            t.lines()
                .any(|l| l.starts_with("deb") || l.starts_with("Types:"))
        })
    };
    candidates
        .into_iter()
        .map(PathBuf::from)
        .filter(useful)
        .take(1)
        .collect()
}

/// An OCI archive: two layers, configuration, manifest, index.
fn write(recipe: &Recipe, files: &Path, to: &Path) -> Result<()> {
    let mut archive = tar::Builder::new(std::fs::File::create(to)?);
    append(
        &mut archive,
        "oci-layout",
        &json!({"imageLayoutVersion": "1.0.0"})
            .to_string()
            .into_bytes(),
    )?;
    let base = std::fs::read(files)?;
    let additions = additions(recipe, &base)?;
    let layers = [blob(&mut archive, &base)?, blob(&mut archive, &additions)?];
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Entrypoint": recipe.entrypoint,
            "Cmd": recipe.command,
        },
        "rootfs": {"type": "layers", "diff_ids": [layers[0].0, layers[1].0]},
        "history": [
            {"created_by": format!("mmdebstrap {}", recipe.packages.join(" "))},
            {"created_by": "users, directories, links"},
        ],
    });
    let config = blob(&mut archive, config.to_string().as_bytes())?;
    let descriptor = |kind: &str, (digest, size): &(String, usize)| json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": size});
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", &config),
        "layers": layers.iter().map(|l| descriptor("layer.v1.tar", l)).collect::<Vec<_>>(),
    });
    let manifest = blob(&mut archive, manifest.to_string().as_bytes())?;
    let mut entry: Value = descriptor("manifest.v1+json", &manifest);
    entry["annotations"] = json!({
        "io.containerd.image.name": recipe.reference,
        "org.opencontainers.image.ref.name": recipe.reference,
    });
    let index = json!({"schemaVersion": 2, "manifests": [entry]});
    append(&mut archive, "index.json", index.to_string().as_bytes())?;
    archive.into_inner()?.flush()?;
    Ok(())
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    }
}

/// What the packages' scripts would have made.
fn additions(recipe: &Recipe, base: &[u8]) -> Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    for (path, owner, mode) in recipe.directories {
        let mut header = header(tar::EntryType::Directory, *mode);
        header.set_uid(u64::from(*owner));
        header.set_gid(u64::from(*owner));
        layer.append_data(&mut header, format!("{path}/"), std::io::empty())?;
    }
    for (path, text) in [("etc/passwd", PASSWD), ("etc/group", GROUP)] {
        let mut header = header(tar::EntryType::Regular, 0o644);
        header.set_size(text.len() as u64);
        layer.append_data(&mut header, path, text.as_bytes())?;
    }
    if recipe.applets {
        let (listed, merged) = applets(base)?;
        // On a merged /usr /bin is a link: the applets go where it points.
        let directory = if merged { "usr/bin" } else { "bin" };
        for applet in listed {
            let mut header = header(tar::EntryType::Symlink, 0o777);
            layer.append_link(&mut header, format!("{directory}/{applet}"), "busybox")?;
        }
    }
    Ok(layer.into_inner()?)
}

fn header(kind: tar::EntryType, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(0);
    header
}

/// The applets of the busybox in this tar that no other file of the tar provides; and whether /usr
/// is merged.
fn applets(base: &[u8]) -> Result<(Vec<String>, bool)> {
    let mut names = std::collections::HashSet::new();
    let mut busybox = None;
    let mut merged = false;
    for entry in tar::Archive::new(base).entries()? {
        let mut entry = entry?;
        let path = entry
            .path()?
            .to_string_lossy()
            .trim_start_matches("./")
            .to_owned();
        if path == "bin" && entry.header().entry_type() == tar::EntryType::Symlink {
            merged = true;
        }
        if path.ends_with("bin/busybox") {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            busybox = Some(bytes);
        }
        if let Some(name) = path.rsplit_once("bin/").map(|(_, name)| name.to_owned()) {
            names.insert(name);
        }
    }
    let Some(busybox) = busybox else {
        bail!("the packages hold no bin/busybox")
    };
    let file = run::target().join("images/busybox");
    std::fs::write(&file, busybox)?;
    run::captured(&mut run::program(
        "chmod",
        ["755".as_ref(), file.as_os_str()],
    ))?;
    let listed = run::captured(run::program(&file.to_string_lossy(), ["--list"]).env_clear())?;
    let fresh = |name: &&str| !names.contains(*name);
    Ok((
        listed.lines().filter(fresh).map(str::to_owned).collect(),
        merged,
    ))
}

/// Adds a blob and returns its digest and size.
fn blob<W: Write>(archive: &mut tar::Builder<W>, bytes: &[u8]) -> Result<(String, usize)> {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    append(archive, &format!("blobs/sha256/{hex}"), bytes)?;
    Ok((format!("sha256:{hex}"), bytes.len()))
}

fn append<W: Write>(archive: &mut tar::Builder<W>, path: &str, bytes: &[u8]) -> Result<()> {
    let mut header = header(tar::EntryType::Regular, 0o644);
    header.set_size(bytes.len() as u64);
    Ok(archive.append_data(&mut header, path, bytes)?)
}
