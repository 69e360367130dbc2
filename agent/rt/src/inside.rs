//! Paths inside a root that is not trusted: the image's own links lead nowhere but inside it.
//!
//! Every look-up is one openat2(2) from the root's descriptor with `RESOLVE_IN_ROOT`; what is done
//! afterwards is done to the descriptor, so nobody can swap a component in between.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Dangling links followed while a path is made.
const LINK_COUNT_MAX: u32 = 16;

/// Opens what is there (`O_PATH`).
pub(crate) fn open(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    resolve(root, path, ResolveFlags::empty())
}

/// The same where no link may be followed at all.
pub(crate) fn open_without_links(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    resolve(root, path, ResolveFlags::NO_SYMLINKS)
}

fn resolve(root: BorrowedFd<'_>, path: &Path, more: ResolveFlags) -> io::Result<OwnedFd> {
    let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | more;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    // EAGAIN: something was renamed meanwhile; the kernel asks for another try.
    for _ in 0..64 {
        match rustix::fs::openat2(root, path, flags, Mode::empty(), how) {
            Err(Errno::AGAIN) => {}
            other => return Ok(other?),
        }
    }
    Err(Errno::AGAIN.into())
}

/// Whether it is a directory.
pub(crate) fn is_directory(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mode = rustix::fs::fstat(fd)?.st_mode;
    Ok(FileType::from_raw_mode(mode) == FileType::Directory)
}

/// Opens a directory, or a file, and makes it (with its parents) when it is not there.
pub(crate) fn ensure(root: BorrowedFd<'_>, path: &Path, directory: bool) -> io::Result<OwnedFd> {
    match open(root, path) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        other => return other,
    }
    make(root, path, directory, LINK_COUNT_MAX)?;
    open(root, path)
}

/// The directory that holds `path`, made where it lacks, and the last component's name.
pub(crate) fn parent<'a>(root: BorrowedFd<'_>, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    Ok((ensure(root, directory, true)?, name))
}

fn make(root: BorrowedFd<'_>, path: &Path, directory: bool, links: u32) -> io::Result<()> {
    // Nearly always only the last component lacks.
    if let (Some(above), Some(name)) = (path.parent(), path.file_name())
        && let Ok(above) = open(root, above)
        && make_one(above.as_fd(), name, directory).is_ok()
    {
        return Ok(());
    }
    let mut done = PathBuf::from("/");
    let mut components = path.components().peekable();
    while let Some(component) = components.next() {
        let name = match component {
            Component::Normal(name) => name,
            Component::ParentDir => {
                done.push("..");
                continue;
            }
            _ => continue,
        };
        let above = done.clone();
        done.push(name);
        match open(root, &done) {
            Ok(_) => continue,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
        let above_fd = open(root, &above)?;
        let last = components.peek().is_none();
        match make_one(above_fd.as_fd(), name, directory || !last) {
            // It is a link that leads nowhere yet, or somebody was faster.
            Err(Errno::EXIST) => {}
            other => {
                other?;
                continue;
            }
        }
        if let Ok(link) = rustix::fs::readlinkat(&above_fd, name, Vec::new()) {
            if links == 0 {
                return Err(io::Error::from_raw_os_error(libc::ELOOP));
            }
            let target = above.join(Path::new(OsStr::new(&*link.to_string_lossy())));
            make(root, &target, directory || !last, links - 1)?;
        }
    }
    Ok(())
}

fn make_one(above: BorrowedFd<'_>, name: &OsStr, directory: bool) -> Result<(), Errno> {
    if directory {
        return rustix::fs::mkdirat(above, name, Mode::from_raw_mode(0o755));
    }
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY;
    rustix::fs::openat(above, name, flags, Mode::from_raw_mode(0o644)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("root")).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(directory.path().join("root"), flags, Mode::empty()).unwrap();
        (directory, fd)
    }

    #[test]
    fn missing_paths_are_made_inside() {
        let (directory, fd) = root();
        let base = directory.path().join("root");
        ensure(fd.as_fd(), Path::new("/a/b/c"), true).unwrap();
        ensure(fd.as_fd(), Path::new("/a/b/file"), false).unwrap();
        assert!(base.join("a/b/c").is_dir() && base.join("a/b/file").is_file());
        // Again is the same.
        ensure(fd.as_fd(), Path::new("/a/b/file"), false).unwrap();
        let (above, name) = parent(fd.as_fd(), Path::new("/new/x")).unwrap();
        assert!(is_directory(above.as_fd()).unwrap() && name == "x");
    }

    #[test]
    fn links_never_lead_out() {
        let (directory, fd) = root();
        let (base, out) = (directory.path().join("root"), directory.path().join("out"));
        fs::create_dir(&out).unwrap();
        symlink(&out, base.join("absolute")).unwrap();
        symlink("../../../../../../etc", base.join("up")).unwrap();
        symlink("../out", base.join("beside")).unwrap();
        symlink("loop", base.join("loop")).unwrap();
        for name in ["absolute", "up", "beside"] {
            ensure(fd.as_fd(), &Path::new("/").join(name).join("x"), true).unwrap();
            assert!(open_without_links(fd.as_fd(), &Path::new("/").join(name)).is_err());
        }
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
        // They were followed as if the root were the whole machine.
        assert!(base.join("etc/x").is_dir() && base.join("out/x").is_dir());
        assert!(ensure(fd.as_fd(), Path::new("/loop/x"), true).is_err());
        // A parent above the root is the root.
        ensure(fd.as_fd(), Path::new("/../../y"), true).unwrap();
        assert!(base.join("y").is_dir());
    }

    #[test]
    fn a_file_in_the_way_is_an_error() {
        let (directory, fd) = root();
        fs::write(directory.path().join("root/file"), "").unwrap();
        assert!(ensure(fd.as_fd(), Path::new("/file/x"), true).is_err());
    }
}
