//! Writes a set of files so that a reader sees all old ones or all new ones.
//!
//! ```text
//! volume/ ─┬─ ..2026_11_20_10_00_00.<n>/   this version's files
//!          ├─ ..data ──► ..2026_...        switched by one rename
//!          └─ page.html ──► ..data/page.html
//! ```
//! Source: Kubernetes `pkg/volume/util/atomic_writer.go`; programs rely on the `..data` name (they
//! watch it with inotify), so the layout is theirs. Only this writer writes here: containers get
//! the directory read-only.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{
    MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown, symlink,
};
use std::path::Path;

use super::VolumeError;
use super::payload::Payload;

const DATA: &str = "..data";
const DATA_NEXT: &str = "..data_tmp";

/// Makes the directory hold exactly `payload`. Writes nothing when it does already.
///
/// * `fs_group` – group of the files, which then may read them.
pub(super) fn write(
    directory: &Path,
    payload: &Payload,
    fs_group: Option<u32>,
) -> Result<(), VolumeError> {
    let context = || format!("write volume {}", directory.display());
    make_directory(directory).map_err(VolumeError::io(context()))?;
    write_version(directory, payload, fs_group).map_err(VolumeError::io(context()))
}

fn make_directory(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
}

fn write_version(directory: &Path, payload: &Payload, fs_group: Option<u32>) -> io::Result<()> {
    let old = match fs::read_link(directory.join(DATA)) {
        Ok(target) => Some(target),
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        Err(e) => return Err(e),
    };
    if let Some(old) = &old
        && is_current(&directory.join(old), payload, fs_group)
    {
        // A crash may have come between the switch and the links.
        return link_names(directory, payload);
    }
    let name = version_name();
    let version = directory.join(&name);
    fs::create_dir(&version)?;
    if let Err(error) = fill(&version, payload, fs_group) {
        let _ = fs::remove_dir_all(&version);
        return Err(error);
    }
    let next = directory.join(DATA_NEXT);
    match fs::remove_file(&next) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    symlink(&name, &next)?;
    fs::rename(&next, directory.join(DATA))?;
    link_names(directory, payload)?;
    remove_old_versions(directory, &name)
}

fn version_name() -> String {
    let now = jiff::Timestamp::now();
    let stamp = now.strftime("%Y_%m_%d_%H_%M_%S");
    // Two versions within a second get different names; the nanosecond is enough for one writer.
    format!("..{stamp}.{:09}", now.subsec_nanosecond())
}

/// The file's final mode: a group that owns it may read it, as `SetVolumeOwnership` does.
fn final_mode(mode: u32, fs_group: Option<u32>) -> u32 {
    if fs_group.is_some() {
        mode | 0o440
    } else {
        mode
    }
}

fn fill(version: &Path, payload: &Payload, fs_group: Option<u32>) -> io::Result<()> {
    let directory_mode = if fs_group.is_some() { 0o2755 } else { 0o755 };
    let own_directory = |path: &Path| -> io::Result<()> {
        chown(path, None, fs_group)?;
        fs::set_permissions(path, fs::Permissions::from_mode(directory_mode))
    };
    own_directory(version)?;
    for (name, file) in payload {
        let path = version.join(name);
        let mut parent = version.to_owned();
        for part in Path::new(name)
            .parent()
            .into_iter()
            .flat_map(Path::components)
        {
            parent.push(part);
            if !parent.is_dir() {
                fs::create_dir(&parent)?;
                own_directory(&parent)?;
            }
        }
        write_new(&path, &file.data)?;
        chown(&path, file.user, fs_group)?;
        let mode = final_mode(file.mode, fs_group);
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Nobody but root reads it before it has its owner and mode.
fn write_new(path: &Path, data: &[u8]) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options.open(path)?.write_all(data)
}

fn is_current(version: &Path, payload: &Payload, fs_group: Option<u32>) -> bool {
    let same = payload.iter().all(|(name, file)| {
        let path = version.join(name);
        let meta = fs::symlink_metadata(&path);
        meta.is_ok_and(|m| {
            m.is_file()
                && m.mode() & 0o777 == final_mode(file.mode, fs_group)
                && fs_group.is_none_or(|g| m.gid() == g)
                && file.user.is_none_or(|u| m.uid() == u)
        }) && fs::read(&path).is_ok_and(|data| data == file.data)
    });
    same && count_files(version) == Some(payload.len())
}

fn count_files(directory: &Path) -> Option<usize> {
    let mut count = 0;
    let mut queue = vec![directory.to_owned()];
    while let Some(directory) = queue.pop() {
        for entry in fs::read_dir(directory).ok()? {
            let entry = entry.ok()?;
            if entry.file_type().ok()?.is_dir() {
                queue.push(entry.path());
            } else {
                count += 1;
            }
        }
    }
    Some(count)
}

/// The first components: each is a link into the current version.
fn link_names(directory: &Path, payload: &Payload) -> io::Result<()> {
    let wanted: BTreeSet<&str> = payload
        .keys()
        .map(|name| name.split('/').next().unwrap_or(name))
        .collect();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("..") || wanted.contains(name.as_ref()) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            // Made for a subPath of a key that is not there; in use, or empty.
            let _ = fs::remove_dir(entry.path());
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    for name in wanted {
        let link = directory.join(name);
        if fs::symlink_metadata(&link).is_ok_and(|meta| meta.is_dir()) {
            fs::remove_dir(&link)?;
        }
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA).join(name), &link)?;
        }
    }
    Ok(())
}

fn remove_old_versions(directory: &Path, current: &str) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("..2") && name != current {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}
