//! The system calls that aya has no wrapper for: links on cgroups, pins, mapped arrays.
//!
//! All `unsafe` of the data plane is here. Layouts are those of `union bpf_attr` and
//! `struct bpf_link_info` in the kernel's `include/uapi/linux/bpf.h`, which only ever grow at the
//! end; the size that is passed tells the kernel which part is meant.

use std::ffi::CString;
use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;

use aya::Pod;
use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
struct LinkCreateAttr {
    program_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_program_fd: u32,
    flags: u32,
    old_program_fd: u32,
}

#[repr(C)]
struct LinkDetachAttr {
    link_fd: u32,
}

/// The head of `struct bpf_link_info` with the cgroup arm of its union.
#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    link_type: u32,
    id: u32,
    program_id: u32,
    _pad: u32,
    cgroup_id: u64,
    attach_type: u32,
    _pad2: u32,
}

/// What is behind a link on a cgroup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct LinkInfo {
    pub id: u32,
    pub program_id: u32,
    /// 0 when the cgroup is gone and the link is dead.
    pub cgroup_id: u64,
}

fn fd(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32 // an open descriptor is not negative
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// The one door to bpf(2).
///
/// # Safety
/// `A` must be `repr(C)` and a prefix of the `union bpf_attr` arm of `command`; the pointers in it
/// must be valid for what the command reads and writes.
unsafe fn bpf<A>(command: libc::c_int, attr: &mut A) -> io::Result<RawFd> {
    let (pointer, len) = (std::ptr::from_mut(attr), size_of::<A>());
    // SAFETY: the kernel reads and writes `len` bytes at `pointer`, which is a live `A`; what it
    // does beyond that is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, len) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as RawFd)
    }
}

/// Attaches a program to a cgroup, beside others that are there.
pub(super) fn link_create(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    // Flags must be 0: a cgroup link always allows others.
    let (program_fd, target_fd) = (fd(program), fd(cgroup));
    let mut attr = LinkCreateAttr {
        program_fd,
        target_fd,
        attach_type,
        flags: 0,
    };
    // SAFETY: the attribute has no pointer; the result is a new descriptor that nobody else owns.
    unsafe { bpf(BPF_LINK_CREATE, &mut attr).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// Replaces the program behind a link: every call sees either the old or the new one.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (link_fd, new_program_fd) = (fd(link), fd(program));
    let mut attr = LinkUpdateAttr {
        link_fd,
        new_program_fd,
        flags: 0,
        old_program_fd: 0,
    };
    // SAFETY: the attribute has no pointer.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// Detaches at once, whoever else holds the link.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the attribute has no pointer.
    unsafe { bpf(BPF_LINK_DETACH, &mut LinkDetachAttr { link_fd: fd(link) }) }.map(drop)
}

/// Which program and cgroup a link joins.
pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = RawLinkInfo::default();
    let mut attr = InfoAttr {
        fd: fd(link),
        info_len: size_of::<RawLinkInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: `info` lives through the call and is as long as `info_len` says.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(LinkInfo {
        id: info.id,
        program_id: info.program_id,
        cgroup_id: info.cgroup_id,
    })
}

/// Gives a BPF object a name in bpffs, so that it outlives its process.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr {
        path: path.as_ptr() as u64,
        fd: fd(object),
        flags: 0,
    };
    // SAFETY: `path` is NUL-terminated and lives through the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens a pinned BPF object; [`io::ErrorKind::NotFound`] if there is none.
pub(super) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    // SAFETY: `path` is NUL-terminated and lives through the call; the result is a new descriptor.
    unsafe { bpf(BPF_OBJ_GET, &mut attr).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// Lets a task wait for the next log of the programs.
pub(super) fn watch_readable<T>(logger: EbpfLogger<T>) -> io::Result<AsyncFd<EbpfLogger<T>>> {
    // SAFETY: the logger owns its ring buffer's descriptor and returns that one until it is dropped.
    unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }.map_err(io::Error::from)
}

/// An array map as memory: elements are read and written without a system call each.
///
/// Programs read the same memory at the same time, so accesses are volatile and an element must
/// only be rewritten when nothing refers to it (`services::plan` sees to that).
pub(super) struct MappedArray<T> {
    start: NonNull<T>,
    count: usize,
    element: PhantomData<T>,
}

// SAFETY: the mapping is shared memory that belongs to no thread; `write` takes `&mut self`.
unsafe impl<T: Send> Send for MappedArray<T> {}
// SAFETY: as above; `read` only copies.
unsafe impl<T: Sync> Sync for MappedArray<T> {}

impl<T: Pod> MappedArray<T> {
    /// Maps `count` elements of an array made with BPF_F_MMAPABLE, whose element size is a
    /// multiple of 8 bytes that `T` divides or equals.
    pub(super) fn map(array: BorrowedFd<'_>, count: u32) -> io::Result<Self> {
        let count = count as usize;
        let (read_write, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice; the kernel refuses a length
        // beyond the array's.
        let start = unsafe {
            let len = count * size_of::<T>();
            libc::mmap(
                std::ptr::null_mut(),
                len,
                read_write,
                shared,
                array.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self {
            start,
            count,
            element: PhantomData,
        })
    }

    /// The element, or none beyond the end.
    pub(super) fn read(&self, index: u32) -> Option<T> {
        let index = index as usize;
        // SAFETY: within the mapping, which lives as long as `self`; a page is aligned for any T,
        // and `Pod` allows every bit pattern.
        (index < self.count).then(|| unsafe { self.start.add(index).read_volatile() })
    }

    /// Writes the element; false beyond the end.
    #[must_use]
    pub(super) fn write(&mut self, index: u32, value: T) -> bool {
        let index = index as usize;
        let inside = index < self.count;
        if inside {
            // SAFETY: within the mapping, which lives as long as `self`; aligned as above.
            unsafe { self.start.add(index).write_volatile(value) }
        }
        inside
    }
}

impl<T> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped, and nothing borrows from it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * size_of::<T>()) };
    }
}

const _: () = {
    assert!(size_of::<ObjectAttr>() == 16);
    assert!(size_of::<InfoAttr>() == 16);
    assert!(size_of::<RawLinkInfo>() == 32);
};
