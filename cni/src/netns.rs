//! Network namespaces by file descriptor.
//!
//! `setns` changes the calling *thread*: on a worker of an async runtime every later task of that
//! worker would run in the wrong namespace. So entering goes through [`NetnsGuard`], which cannot
//! be sent to another thread and restores on drop, and async callers use [`within`], which does it
//! on a thread of its own. A socket stays in the namespace it was made in, so all that has to
//! happen inside is `socket(2)`: see [`crate::netlink::Netlink::open_in`].

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use crate::error::CniError;

/// An open network namespace; cheap to clone. Keeps the namespace alive while it lives.
#[derive(Clone, Debug)]
pub struct Netns {
    fd: Arc<OwnedFd>,
    path: PathBuf,
}

impl Netns {
    /// Opens the namespace pinned at `path`.
    ///
    /// # Errors
    /// When the path does not exist, or is a plain file: the pin was never made or is gone.
    pub fn open(path: &Path) -> Result<Self, CniError> {
        let file = File::open(path).map_err(CniError::io(format!(
            "open network namespace {}",
            path.display()
        )))?;
        let kind = fstatfs(&file)
            .map_err(|errno| CniError::io(format!("statfs {}", path.display()))(errno.into()))?;
        if kind.filesystem_type() != NSFS_MAGIC {
            return Err(CniError::Container(format!(
                "{}: not a network namespace but a plain file: nothing is mounted on it",
                path.display()
            )));
        }
        Ok(Self {
            fd: Arc::new(file.into()),
            path: path.into(),
        })
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Self, CniError> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For netlink attributes; valid while `self` lives.
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The inode: equal for the same namespace, whatever the path.
    pub fn inode(&self) -> Result<u64, CniError> {
        let stat = nix::sys::stat::fstat(self.fd.as_fd())
            .map_err(|errno| CniError::io(format!("stat {}", self.path.display()))(errno.into()))?;
        Ok(stat.st_ino)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// True when `path` is a pinned namespace; false when absent or a plain file.
pub fn is_pinned(path: &Path) -> bool {
    Netns::open(path).is_ok()
}

/// While it lives, the calling thread is in another network namespace.
///
/// `!Send`: dropping it on another thread would restore the wrong one.
pub struct NetnsGuard {
    previous: Netns,
    _thread_bound: PhantomData<*const ()>,
}

impl NetnsGuard {
    /// Enters `netns`. Needs CAP_SYS_ADMIN.
    pub fn enter(netns: &Netns) -> Result<Self, CniError> {
        let previous = Netns::current()?;
        setns(netns, CloneFlags::CLONE_NEWNET).map_err(|errno| {
            CniError::io(format!("enter network namespace {}", netns.path.display()))(errno.into())
        })?;
        Ok(Self {
            previous,
            _thread_bound: PhantomData,
        })
    }
}

impl Drop for NetnsGuard {
    fn drop(&mut self) {
        // It fails only if this thread lost its capabilities in between; going on in the wrong
        // namespace would change links that are not ours.
        if let Err(errno) = setns(&self.previous, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%errno, "cannot return to the previous network namespace");
            std::process::abort();
        }
    }
}

/// Runs `work` inside `netns` on a thread of its own and waits for it without blocking the runtime.
pub async fn within<T, F>(netns: &Netns, work: F) -> Result<T, CniError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, CniError> + Send + 'static,
{
    let netns = netns.clone();
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("netns".into())
        .stack_size(128 * 1024)
        .spawn(move || {
            let answer = NetnsGuard::enter(&netns).and_then(|_guard| work());
            // The receiver is gone when the caller was cancelled: nobody wants the answer.
            drop(sender.send(answer));
        })
        .map_err(CniError::io("start a thread to enter a network namespace"))?;
    receiver.await.unwrap_or_else(|_| {
        Err(CniError::Io {
            context: "thread in a network namespace".into(),
            source: io::Error::other("ended without an answer"),
        })
    })
}
