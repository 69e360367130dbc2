//! Where an import's bytes are: a directory, or a tar file whose members are read in place.
//!
//! Members are found by name in an index made once; links between members are followed in that
//! index, a directory's files through `openat2(RESOLVE_BENEATH)`: nothing outside is ever read.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use sha2::{Digest as _, Sha256};

use super::blob_member;
use crate::images::content::Content;
use crate::images::document::{DOCUMENT_BYTES_MAX, Descriptor};
use crate::images::error::ImageError;
use crate::images::reference::Digest;
use crate::images::stream::{Compression, decompressed};

/// Members of one archive.
const MEMBERS_MAX: usize = 100_000;
/// Decompressed size of an archive, bytes.
const ARCHIVE_BYTES_MAX: u64 = 256 << 30;

/// A directory, or a tar file with its members' positions.
pub(super) struct Source {
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    Directory(OwnedFd),
    Archive {
        file: File,
        members: HashMap<String, Member>,
    },
}

enum Member {
    File {
        offset: u64,
        size: u64,
    },
    /// Old docker-save archives link equal layers to each other.
    Link(String),
}

impl Source {
    pub(super) fn open(content: &Content, path: &Path) -> Result<Self, ImageError> {
        let context = || format!("open {}", path.display());
        let meta = std::fs::metadata(path).map_err(ImageError::io(context()))?;
        let kind = if meta.is_dir() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let dir = rustix::fs::open(path, flags, Mode::empty())
                .map_err(|e| ImageError::io(context())(e.into()))?;
            Kind::Directory(dir)
        } else {
            let file = File::open(path).map_err(ImageError::io(context()))?;
            archive(content, path, file)?
        };
        Ok(Self {
            path: path.to_owned(),
            kind,
        })
    }

    /// An archive that is open already; `name` is for messages and images without a name.
    pub(super) fn of_file(content: &Content, name: &Path, file: File) -> Result<Self, ImageError> {
        Ok(Self {
            path: name.to_owned(),
            kind: archive(content, name, file)?,
        })
    }

    pub(super) fn label(&self) -> String {
        self.path.display().to_string()
    }

    pub(super) fn bad(&self, reason: impl ToString) -> ImageError {
        ImageError::Archive {
            path: self.label(),
            reason: reason.to_string(),
        }
    }

    pub(super) fn corrupt(&self, what: &str, reason: impl ToString) -> ImageError {
        ImageError::Corrupt {
            origin: self.label(),
            what: what.to_owned(),
            reason: reason.to_string(),
        }
    }

    /// `web` of `/images/web.tar.gz`, in lower case: an image's name of last resort.
    pub(super) fn stem(&self) -> String {
        let name = self
            .path
            .file_name()
            .map(|n| n.to_string_lossy().to_lowercase());
        let name = name.unwrap_or_default();
        let endings = [".tar.gz", ".tar.zst", ".tgz", ".tar", ".oci"];
        let stem = endings.iter().find_map(|e| name.strip_suffix(e));
        stem.unwrap_or(&name).to_owned()
    }

    fn open_file(&self, dir: &OwnedFd, member: &str) -> io::Result<File> {
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(File::from(openat2(dir, member, flags, Mode::empty(), how)?))
    }

    pub(super) fn has(&self, member: &str) -> bool {
        match &self.kind {
            Kind::Directory(dir) => self.open_file(dir, member).is_ok(),
            Kind::Archive { .. } => self.locate(member).is_some(),
        }
    }

    fn locate(&self, member: &str) -> Option<(&File, u64, u64)> {
        let Kind::Archive { file, members } = &self.kind else {
            return None;
        };
        let mut name = clean(member);
        for _ in 0..5 {
            match members.get(&name)? {
                Member::File { offset, size } => return Some((file, *offset, *size)),
                Member::Link(target) => name = target.clone(),
            }
        }
        None
    }

    fn missing(&self, member: &str, source: Option<io::Error>) -> ImageError {
        let reason = match source {
            Some(e) if e.kind() != io::ErrorKind::NotFound => e.to_string(),
            _ => "is missing".to_owned(),
        };
        self.corrupt(member, reason)
    }

    /// A member's content.
    pub(super) fn member(&self, member: &str) -> Result<Box<dyn Read + '_>, ImageError> {
        match &self.kind {
            Kind::Directory(dir) => {
                let file = self
                    .open_file(dir, member)
                    .map_err(|e| self.missing(member, Some(e)))?;
                if !file.metadata().is_ok_and(|m| m.is_file()) {
                    return Err(self.corrupt(member, "is no regular file"));
                }
                Ok(Box::new(file))
            }
            Kind::Archive { .. } => {
                let (file, offset, size) = self
                    .locate(member)
                    .ok_or_else(|| self.missing(member, None))?;
                Ok(Box::new(Window {
                    file,
                    offset,
                    left: size,
                }))
            }
        }
    }

    pub(super) fn size(&self, member: &str) -> Result<u64, ImageError> {
        match &self.kind {
            Kind::Directory(dir) => {
                let size = self
                    .open_file(dir, member)
                    .and_then(|f| Ok(f.metadata()?.len()));
                size.map_err(|e| self.missing(member, Some(e)))
            }
            Kind::Archive { .. } => {
                let found = self
                    .locate(member)
                    .ok_or_else(|| self.missing(member, None))?;
                Ok(found.2)
            }
        }
    }

    /// A small document.
    pub(super) fn read(&self, member: &str) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        self.member(member)?
            .take(DOCUMENT_BYTES_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| self.corrupt(member, e))?;
        if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
            return Err(self.corrupt(member, format!("larger than {DOCUMENT_BYTES_MAX} bytes")));
        }
        Ok(bytes)
    }

    /// A document by digest, verified.
    pub(super) fn blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let member = blob_member(&descriptor.digest);
        let bytes = self.read(&member)?;
        let actual = Digest::from_hash(&Sha256::digest(&bytes));
        if actual != descriptor.digest {
            return Err(self.corrupt(&member, format!("content has digest {actual}")));
        }
        Ok(bytes)
    }
}

/// Part of a file, read by position.
struct Window<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Read for Window<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        use std::os::unix::fs::FileExt as _;
        let want = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buf.len());
        let n = self.file.read_at(&mut buf[..want], self.offset)?;
        self.offset += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// A member name without `.` and with `..` taken literally out: only ever a key of the map.
fn clean(name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            other => parts.push(other),
        }
    }
    parts.join("/")
}

fn archive(content: &Content, path: &Path, file: File) -> Result<Kind, ImageError> {
    let damaged = |e: io::Error| ImageError::Archive {
        path: path.display().to_string(),
        reason: format!("no readable tar archive: {e}"),
    };
    let mut start = BufReader::with_capacity(16, &file);
    let compression = Compression::of(start.fill_buf().map_err(damaged)?);
    drop(start);
    let mut file = file;
    file.seek(SeekFrom::Start(0)).map_err(damaged)?;
    if compression != Compression::None {
        let mut out = content.unnamed_file()?;
        let mut decoder = decompressed(&file)
            .map_err(damaged)?
            .take(ARCHIVE_BYTES_MAX);
        io::copy(&mut decoder, &mut out).map_err(damaged)?;
        drop(decoder);
        out.seek(SeekFrom::Start(0)).map_err(damaged)?;
        file = out;
    }
    let members = index(&file).map_err(damaged)?;
    Ok(Kind::Archive { file, members })
}

/// Positions of all members. Contents are skipped by seeking;
fn index(file: &File) -> io::Result<HashMap<String, Member>> {
    let mut members = HashMap::new();
    let mut archive = tar::Archive::new(file);
    let length = file.metadata()?.len();
    // raw: names longer than a header's 100 (or 255) bytes do not occur in image archives, and
    // reading them would trust a length.
    for entry in archive.entries_with_seek()?.raw(true) {
        let entry = entry?;
        if members.len() >= MEMBERS_MAX {
            return Err(io::Error::other(format!("more than {MEMBERS_MAX} members")));
        }
        let name = clean(&String::from_utf8_lossy(&entry.path_bytes()));
        let (offset, size) = (entry.raw_file_position(), entry.size());
        match entry.header().entry_type() {
            kind if kind.is_file() => {
                if offset.checked_add(size).is_none_or(|end| end > length) {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        format!("member {name:?} ends beyond the file: truncated"),
                    ));
                }
                members.insert(name, Member::File { offset, size });
            }
            kind if kind.is_symlink() || kind.is_hard_link() => {
                let target = entry.link_name_bytes().unwrap_or_default();
                let target = String::from_utf8_lossy(&target).into_owned();
                let target = match (kind.is_symlink(), name.rsplit_once('/')) {
                    (true, Some((dir, _))) => clean(&format!("{dir}/{target}")),
                    _ => clean(&target),
                };
                members.insert(name, Member::Link(target));
            }
            _ => {}
        }
    }
    Ok(members)
}
