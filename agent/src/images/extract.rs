//! Unpacks one layer's tar stream into a directory that overlayfs can take as a lower layer.
//!
//! ```text
//! tar entry ─► name (no "..") ─► parent: openat2(RESOLVE_IN_ROOT) ─► create below that descriptor, never following ─► owner, mode, xattrs, time
//!                └─ .wh.x ─► character device 0:0      └─ .wh..wh..opq ─► trusted.overlay.opaque=y
//! ```
//! The stream is hostile until its hash is known, and the hash is known last. Invariants:
//! * no path is resolved outside the layer's directory: a symlink in the archive, absolute or
//!   relative, leads to where it would lead in a chroot;
//! * the last component is never followed, so an entry replaces a symlink instead of writing through;
//! * a hard link's target lies in the same layer; `..` in a name or a hard link is refused;
//! * no device node is made except whiteouts; no `trusted.*` attribute is taken from the archive;
//! * entries, bytes, name length and the size of one entry's headers are bounded.
//!
//! Whiteouts: OCI image-spec, layer.md. Overlay's form: Linux Documentation/filesystems/overlayfs.rst.

mod tree;

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{FileType, Mode};
use tar::{Archive, Entry, EntryType};
use tree::{Existing, Tree};

/// Bytes of headers (long names, extended attributes, sparse maps) that one entry may have.
const ENTRY_HEADER_BYTES_MAX: u64 = 1 << 20;
/// Longest path, as the kernel's PATH_MAX.
const PATH_BYTES_MAX: usize = 4096;
/// Deepest path.
const PATH_DEPTH_MAX: usize = 255;
/// Directories whose time is set at the end (their content changes it); others keep "now".
const DIRECTORY_TIMES_MAX: usize = 100_000;
/// Skipped entries that are named in the summary.
const SKIPPED_NAMED_MAX: usize = 16;
const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";

/// What to do with a device node in a layer. Containers get their own `/dev` in any case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DevicePolicy {
    /// Leave it out and say so.
    Skip,
    /// Refuse the layer.
    Refuse,
}

/// Bounds of one layer.
#[derive(Clone, Copy, Debug)]
pub struct ExtractOptions {
    /// Entries, whiteouts included.
    pub entries_max: u64,
    /// Sum of file sizes, bytes.
    pub bytes_max: u64,
    /// Device nodes.
    pub devices: DevicePolicy,
}

/// What was unpacked.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    /// Entries seen.
    pub entries: u64,
    /// File bytes written.
    pub bytes: u64,
    /// Names of the first left-out device nodes.
    pub skipped: Vec<String>,
}

/// Why a layer was not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum ExtractError {
    /// An entry that no honest layer has.
    #[error("entry {entry:?} refused: {reason}")]
    Refused {
        /// Its name.
        entry: String,
        /// What is wrong.
        reason: String,
    },
    /// A bound was hit.
    #[error("{0}")]
    Limit(String),
    /// The archive ends early or is no tar.
    #[error("damaged archive: {0}")]
    Archive(io::Error),
    /// The file system refused: full, read-only, no extended attributes.
    #[error("entry {entry:?}: {context}: {source}")]
    Io {
        /// Its name.
        entry: String,
        /// The call.
        context: &'static str,
        /// Its error.
        source: io::Error,
    },
}

/// Bytes that may be read before the next entry's content: tar's headers are read into memory by
/// the parser, whatever length they claim.
struct HeaderGuard<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for HeaderGuard<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        let left = self.left.get().checked_sub(n as u64);
        let left = left.ok_or_else(|| io::Error::other("headers of one entry exceed 1 MiB"))?;
        self.left.set(left);
        Ok(n)
    }
}

/// Unpacks `reader` into the existing, empty directory `root`.
///
/// # Errors
/// Any: the directory's content is then useless and must be removed by the caller.
pub fn extract(
    reader: impl Read,
    root: &Path,
    options: &ExtractOptions,
) -> Result<Summary, ExtractError> {
    let left = Rc::new(Cell::new(ENTRY_HEADER_BYTES_MAX));
    let mut archive = Archive::new(HeaderGuard {
        inner: reader,
        left: Rc::clone(&left),
    });
    let mut unpack = Unpack {
        tree: Tree::open(root)?,
        options: *options,
        summary: Summary::default(),
        directory_times: Vec::new(),
    };
    let mut entries = archive.entries().map_err(ExtractError::Archive)?;
    loop {
        left.set(ENTRY_HEADER_BYTES_MAX);
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(ExtractError::Archive)?;
        left.set(u64::MAX);
        unpack.entry(&mut entry)?;
        // What an entry's kind does not use is read here, so that the guard counts headers only.
        io::copy(&mut entry, &mut io::sink()).map_err(ExtractError::Archive)?;
    }
    unpack.finish()
}

struct Unpack {
    tree: Tree,
    options: ExtractOptions,
    summary: Summary,
    directory_times: Vec<(PathBuf, u64)>,
}

/// Owner, mode, attributes and time of an entry.
struct Attributes {
    uid: u32,
    gid: u32,
    mode: Mode,
    modified_s: u64,
    xattrs: Vec<(OsString, Vec<u8>)>,
}

impl Unpack {
    fn entry<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> Result<(), ExtractError> {
        self.summary.entries += 1;
        if self.summary.entries > self.options.entries_max {
            let max = self.options.entries_max;
            return Err(ExtractError::Limit(format!("more than {max} entries")));
        }
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            return Ok(());
        }
        let raw = entry.path_bytes().into_owned();
        let label = label(&raw);
        let path = clean(&raw).map_err(|reason| refused(&label, reason))?;
        let Some(name) = path.file_name() else {
            // The layer's own root: only its attributes count.
            if kind.is_dir() {
                let attributes = attributes(entry, &label)?;
                self.tree.set_root_attributes(&attributes, &label)?;
                self.remember_time(PathBuf::new(), attributes.modified_s);
            }
            return Ok(());
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        if name.as_bytes().starts_with(WHITEOUT_PREFIX) {
            return self.whiteout(parent, name, &label);
        }
        match kind {
            EntryType::Directory => {
                let attributes = attributes(entry, &label)?;
                self.directory(parent, name, &attributes, &label)?;
                self.remember_time(path.clone(), attributes.modified_s);
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.file(parent, name, entry, &label)?;
            }
            EntryType::Symlink => self.symlink(parent, name, entry, &label)?,
            EntryType::Link => self.hard_link(parent, name, entry, &label)?,
            EntryType::Fifo => {
                let attributes = attributes(entry, &label)?;
                self.replace(parent, name, &label)?;
                self.tree.fifo(parent, name, &attributes, &label)?;
            }
            EntryType::Char | EntryType::Block => match self.options.devices {
                DevicePolicy::Refuse => return Err(refused(&label, "a device node")),
                DevicePolicy::Skip => {
                    if self.summary.skipped.len() < SKIPPED_NAMED_MAX {
                        self.summary.skipped.push(label);
                    }
                }
            },
            other => {
                let reason = format!("unknown entry type {:?}", char::from(other.as_byte()));
                return Err(refused(&label, reason));
            }
        }
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        parent: &Path,
        name: &OsStr,
        entry: &mut Entry<'_, R>,
        label: &str,
    ) -> Result<(), ExtractError> {
        let attributes = attributes(entry, label)?;
        let left = self.options.bytes_max.saturating_sub(self.summary.bytes);
        if entry.size() > left {
            return Err(ExtractError::Limit(format!(
                "entry {label:?} of {} bytes: the layer's files exceed {} bytes",
                entry.size(),
                self.options.bytes_max
            )));
        }
        self.replace(parent, name, label)?;
        let mut file = self.tree.create_file(parent, name, label)?;
        let size = entry.size();
        let copied = io::copy(entry, &mut file).map_err(|source| ExtractError::Io {
            entry: label.to_owned(),
            context: "read from the archive, write to disk",
            source,
        })?;
        if copied != size {
            let short = format!("entry {label:?} has {copied} of {size} bytes");
            return Err(ExtractError::Archive(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                short,
            )));
        }
        self.summary.bytes += copied;
        tree::set_file_attributes(&file, &attributes, label)
    }

    fn directory(
        &mut self,
        parent: &Path,
        name: &OsStr,
        attributes: &Attributes,
        label: &str,
    ) -> Result<(), ExtractError> {
        let existing = self.tree.existing(parent, name, label)?;
        let was_whiteout = existing == Existing::Whiteout;
        if existing != Existing::Directory {
            self.replace(parent, name, label)?;
            self.tree.create_directory(parent, name, label)?;
        }
        let directory = self.tree.open_child(parent, name, label)?;
        if was_whiteout {
            // Deleted below and made anew: nothing of the lower directory may shine through.
            tree::set_opaque(&directory, label)?;
        }
        tree::set_file_attributes(&directory, attributes, label)
    }

    fn symlink<R: Read>(
        &mut self,
        parent: &Path,
        name: &OsStr,
        entry: &mut Entry<'_, R>,
        label: &str,
    ) -> Result<(), ExtractError> {
        let attributes = attributes(entry, label)?;
        let target = link_target(entry);
        if target.is_empty() || target.len() >= PATH_BYTES_MAX || target.contains(&0) {
            return Err(refused(
                label,
                "a symlink's target wants 1 to 4095 bytes without NUL",
            ));
        }
        self.replace(parent, name, label)?;
        // The text is kept as it is: it is only ever resolved inside the container's root.
        self.tree
            .symlink(parent, name, OsStr::from_bytes(&target), &attributes, label)
    }

    fn hard_link<R: Read>(
        &mut self,
        parent: &Path,
        name: &OsStr,
        entry: &mut Entry<'_, R>,
        label: &str,
    ) -> Result<(), ExtractError> {
        let target = link_target(entry);
        let target = clean(&target).map_err(|reason| {
            refused(
                label,
                format!("hard link to {:?}: {reason}", self::label(&target)),
            )
        })?;
        let (Some(target_name), target_parent) =
            (target.file_name(), target.parent().unwrap_or(Path::new("")))
        else {
            return Err(refused(label, "hard link to the root"));
        };
        if (target_parent, target_name) == (parent, name) {
            return Err(refused(label, "hard link to itself"));
        }
        match self.tree.existing(target_parent, target_name, label)? {
            Existing::File | Existing::Symlink => {}
            Existing::Absent => {
                let reason = format!("hard link to {target:?}, which this layer does not hold");
                return Err(refused(label, reason));
            }
            Existing::Directory | Existing::Whiteout => {
                return Err(refused(
                    label,
                    format!("hard link to {target:?}, which is no file"),
                ));
            }
        }
        self.replace(parent, name, label)?;
        self.tree
            .hard_link(target_parent, target_name, parent, name, label)
    }

    fn whiteout(&mut self, parent: &Path, name: &OsStr, label: &str) -> Result<(), ExtractError> {
        let bytes = name.as_bytes();
        if bytes == OPAQUE_MARKER {
            let directory = self.tree.open_directory(parent, label)?;
            return tree::set_opaque(&directory, label);
        }
        let hidden = &bytes[WHITEOUT_PREFIX.len()..];
        if hidden.starts_with(WHITEOUT_PREFIX) {
            return Ok(()); // aufs' own bookkeeping (.wh..wh.plnk and others): nothing to hide
        }
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(refused(label, "a whiteout of nothing"));
        }
        let hidden = OsStr::from_bytes(hidden);
        match self.tree.existing(parent, hidden, label)? {
            Existing::Absent => self.tree.create_whiteout(parent, hidden, label),
            // A whiteout hides what is below this layer, never what this layer brings.
            Existing::Directory => {
                let directory = self.tree.open_child(parent, hidden, label)?;
                tree::set_opaque(&directory, label)
            }
            Existing::File | Existing::Symlink | Existing::Whiteout => Ok(()),
        }
    }

    /// Makes room: the later entry of a name wins.
    fn replace(&mut self, parent: &Path, name: &OsStr, label: &str) -> Result<(), ExtractError> {
        match self.tree.existing(parent, name, label)? {
            Existing::Absent => Ok(()),
            Existing::Directory => self.tree.remove_directory(parent, name, label),
            _ => self.tree.unlink(parent, name, label),
        }
    }

    fn remember_time(&mut self, path: PathBuf, modified_s: u64) {
        if self.directory_times.len() < DIRECTORY_TIMES_MAX {
            self.directory_times.push((path, modified_s));
        }
    }

    fn finish(mut self) -> Result<Summary, ExtractError> {
        for (path, modified_s) in std::mem::take(&mut self.directory_times) {
            self.tree.set_directory_time(&path, modified_s);
        }
        Ok(self.summary)
    }
}

/// Relative path without `.`; absolute names start at the layer's root, `..` is refused.
fn clean(raw: &[u8]) -> Result<PathBuf, String> {
    if raw.contains(&0) {
        return Err("NUL in its name".to_owned());
    }
    let mut path = PathBuf::new();
    let mut depth = 0;
    for part in raw
        .split(|b| *b == b'/')
        .filter(|p| !p.is_empty() && *p != b".")
    {
        if part == b".." {
            return Err("'..' in its name".to_owned());
        }
        if part.len() > 255 {
            return Err("a name component longer than 255 bytes".to_owned());
        }
        depth += 1;
        path.push(OsStr::from_bytes(part));
    }
    if depth > PATH_DEPTH_MAX || path.as_os_str().len() >= PATH_BYTES_MAX {
        return Err(format!(
            "deeper than {PATH_DEPTH_MAX} or longer than {PATH_BYTES_MAX}"
        ));
    }
    Ok(path)
}

/// A name for messages: printable and short, whatever the archive says.
fn label(raw: &[u8]) -> String {
    String::from_utf8_lossy(raw).chars().take(200).collect()
}

fn refused(entry: &str, reason: impl Into<String>) -> ExtractError {
    ExtractError::Refused {
        entry: entry.to_owned(),
        reason: reason.into(),
    }
}

fn attributes<R: Read>(entry: &mut Entry<'_, R>, label: &str) -> Result<Attributes, ExtractError> {
    let header = entry.header();
    let fields = header.as_old();
    let number = |field: &[u8], parsed: io::Result<u64>| match parsed {
        // A blank field is 0 for every other tar; some builders leave owners out.
        Err(_) if field.iter().all(|b| matches!(b, 0 | b' ')) => Ok(0),
        other => other.map_err(ExtractError::Archive),
    };
    let id = |value: u64| -> Result<u32, ExtractError> {
        // u32::MAX means "leave it" to chown.
        u32::try_from(value)
            .ok()
            .filter(|v| *v != u32::MAX)
            .ok_or_else(|| refused(label, format!("owner {value} does not fit 32 bits")))
    };
    let uid = id(number(&fields.uid, header.uid())?)?;
    let gid = id(number(&fields.gid, header.gid())?)?;
    let mode = number(&fields.mode, header.mode().map(u64::from))?;
    let mode = Mode::from_raw_mode((mode & 0o7777) as u32);
    let modified_s = number(&fields.mtime, header.mtime())?;
    let mut xattrs = Vec::new();
    if let Some(extensions) = entry.pax_extensions().map_err(ExtractError::Archive)? {
        for extension in extensions {
            let extension = extension.map_err(ExtractError::Archive)?;
            let Some(name) = extension.key_bytes().strip_prefix(b"SCHILY.xattr.") else {
                continue;
            };
            // File capabilities and user attributes. Never trusted.overlay.*: those steer overlayfs.
            if name == b"security.capability" || name.starts_with(b"user.") {
                let name = OsStr::from_bytes(name).to_owned();
                xattrs.push((name, extension.value_bytes().to_vec()));
            }
        }
    }
    Ok(Attributes {
        uid,
        gid,
        mode,
        modified_s,
        xattrs,
    })
}

/// What [`Tree::existing`] says of a directory entry.
fn classify(kind: FileType, device: u64) -> Existing {
    match kind {
        FileType::Directory => Existing::Directory,
        FileType::Symlink => Existing::Symlink,
        FileType::CharacterDevice if device == 0 => Existing::Whiteout,
        _ => Existing::File,
    }
}

/// Where a link of either kind points; empty when the entry does not say.
fn link_target<R: Read>(entry: &Entry<'_, R>) -> Vec<u8> {
    let target = entry.link_name_bytes();
    target.map(|bytes| bytes.into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
