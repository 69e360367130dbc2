//! The system calls that aya has no wrapper for: links on cgroups and interfaces, pins, mapped arrays.
//!
//! All `unsafe` of the data plane is here. Layouts are those of `union bpf_attr` and
//! `struct bpf_link_info` in the kernel's `include/uapi/linux/bpf.h`, which only ever grow at the
//! end; the size that is passed tells the kernel which part is meant.

use std::ffi::CString;
use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::OnceLock;

use aya::Pod;
use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_MAP_UPDATE_BATCH: libc::c_int = 26;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

/// Puts a frame on the wire as it is. The socket is one of AF_PACKET.
pub(super) fn send_frame(socket: BorrowedFd<'_>, ifindex: u32, frame: &[u8]) -> io::Result<()> {
    let index = i32::try_from(ifindex).map_err(io::Error::other)?;
    // SAFETY: made of integers, for which zero is a value.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as libc::c_ushort;
    to.sll_ifindex = index;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: frame and address are borrowed for the call and as long as it is told.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            length,
        )
    };
    match sent {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Lets a socket of AF_PACKET receive the ARP replies of every interface, and nothing else.
pub(super) fn receive_arp_replies(socket: BorrowedFd<'_>) -> io::Result<()> {
    /// Where a frame has ARP's operation.
    const OPERATION: u32 = 20;
    const REPLY: u32 = 2;
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16, // all are below 0x100
        jt,
        jf,
        k,
    };
    let mut filter = [
        step(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, 0, OPERATION),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, REPLY),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as libc::c_ushort,
        filter: filter.as_mut_ptr(),
    };
    set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
    // SAFETY: made of integers, for which zero is a value.
    let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    at.sll_family = libc::AF_PACKET as libc::c_ushort;
    at.sll_protocol = (libc::ETH_P_ARP as u16).to_be();
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is borrowed for the call, and as long as it is told.
    match unsafe { libc::bind(socket.as_raw_fd(), (&raw const at).cast(), length) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Lets a raw ICMPv6 socket receive messages of one type only (RFC 3542, 3.2).
pub(super) fn receive_only_icmp6(socket: BorrowedFd<'_>, kind: u8) -> io::Result<()> {
    const ICMP6_FILTER: libc::c_int = 1;
    // A bit that is set keeps its type out.
    let mut filter = [u32::MAX; 8];
    filter[usize::from(kind >> 5)] &= !(1 << (kind & 31));
    set_option(socket, libc::IPPROTO_ICMPV6, ICMP6_FILTER, &filter)
}

fn set_option<T>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value is borrowed for the call, and as long as it is told.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const *value).cast(),
            length,
        )
    };
    match set {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
/// `enum bpf_attach_type`
const BPF_XDP: u32 = 37;
/// `include/uapi/linux/if_link.h`
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// Relative to no other program: before all of them.
const BPF_F_BEFORE: u32 = 1 << 3;

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
    /// A cgroup's descriptor or an interface's index.
    target: u32,
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

/// The head of `struct bpf_link_info` with the first words of its union: a cgroup's id, or the index
/// of an interface.
#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    link_type: u32,
    id: u32,
    program_id: u32,
    _pad: u32,
    target: [u32; 2],
    attach_type: u32,
    _pad2: u32,
}

/// What is behind a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct LinkInfo {
    pub id: u32,
    pub program_id: u32,
    /// Of a link on a cgroup; 0 when the cgroup is gone and the link is dead.
    pub cgroup_id: u64,
    /// Of a link on an interface; 0 when the interface is gone and the link is dead.
    pub ifindex: u32,
}

/// Two words of memory as the one that they are of 8 bytes.
fn both(words: [u32; 2]) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&words[0].to_ne_bytes());
    bytes[4..].copy_from_slice(&words[1].to_ne_bytes());
    u64::from_ne_bytes(bytes)
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
    create_link(program, fd(cgroup), attach_type, 0)
}

/// Attaches a program to an interface of the calling thread's network namespace, before all others
/// that are there. Linux 6.6; before it [`io::ErrorKind::InvalidInput`].
pub(super) fn link_create_tcx(
    program: BorrowedFd<'_>,
    ifindex: u32,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    create_link(program, ifindex, attach_type, BPF_F_BEFORE)
}

/// Attaches a program to an interface of the calling thread's network namespace, in its driver. Linux 5.9.
pub(super) fn link_create_xdp(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    create_link(program, ifindex, BPF_XDP, XDP_FLAGS_DRV_MODE)
}

fn create_link(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        program_fd: fd(program),
        target,
        attach_type,
        flags,
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

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Writes elements of a hash map by one call, in this order; each is replaced whole. Linux 5.6; its source:
/// `generic_map_update_batch` in kernel/bpf/syscall.c.
///
/// # Errors
/// Some of the first ones may be written.
pub(super) fn update_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> io::Result<()> {
    let count = u32::try_from(keys.len().min(values.len())).map_err(io::Error::other)?;
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count,
        map_fd: fd(map),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: both slices have at least `count` elements and live through the call, which only reads them;
    // the caller's types are those of the map.
    unsafe { bpf(BPF_MAP_UPDATE_BATCH, &mut attr) }.map(drop)
}

/// Which program and target a link joins.
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
        cgroup_id: both(info.target),
        ifindex: info.target[0],
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

/// Lets a task wait for what the programs tell next. A descriptor of its own: the map keeps its own.
pub(super) fn watch_events(ring: &impl AsFd) -> io::Result<AsyncFd<OwnedFd>> {
    let ring = ring.as_fd().try_clone_to_owned()?;
    // SAFETY: an `OwnedFd` returns its one descriptor until it is dropped.
    unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }.map_err(io::Error::from)
}

/// A copy of a value that lies in bytes of a map; none: they are too few.
pub(super) fn read_pod<T: Pod>(bytes: &[u8]) -> Option<T> {
    let start = bytes.get(..size_of::<T>())?.as_ptr();
    // SAFETY: as many bytes as a `T` has, at any address; `Pod` allows every bit pattern.
    Some(unsafe { start.cast::<T>().read_unaligned() })
}

/// The clock of the programs, `bpf_ktime_get_ns`: nanoseconds.
pub(super) fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: room for the answer; this clock is on every system.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let (seconds, ns) = (now.tv_sec.cast_unsigned(), now.tv_nsec.cast_unsigned());
    seconds.saturating_mul(1_000_000_000).saturating_add(ns)
}

/// The cookie of the calling thread's network namespace: what `bpf_get_netns_cookie` says there.
pub(super) fn netns_cookie() -> io::Result<u64> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let (mut cookie, mut length) = (0_u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: an open socket, and room for the answer, whose size is said.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(cookie),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `include/uapi/asm-generic/socket.h`; Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Bytes of an array that are mapped at once: a multiple of any page size and of any element's.
const WINDOW_BYTES: usize = 3 * 64 * 1024;

/// An array map as memory: elements are read and written without a system call each.
///
/// Programs read the same memory at the same time, so accesses are volatile and an element must
/// only be rewritten when nothing refers to it (`services::plan` sees to that). It is mapped window
/// by window where it is used: what is mapped counts as this process's memory, whole.
pub(super) struct MappedArray<T> {
    array: OwnedFd,
    count: usize,
    windows: Vec<OnceLock<Window>>,
    element: PhantomData<T>,
}

impl<T: Pod> MappedArray<T> {
    const PER_WINDOW: usize = {
        assert!(WINDOW_BYTES.is_multiple_of(size_of::<T>()));
        WINDOW_BYTES / size_of::<T>()
    };

    /// `count` elements of an array made with BPF_F_MMAPABLE, whose element size is a multiple of 8
    /// bytes that `T` divides or equals.
    pub(super) fn map(array: BorrowedFd<'_>, count: u32) -> io::Result<Self> {
        let count = count as usize;
        Ok(Self {
            array: array.try_clone_to_owned()?,
            count,
            windows: (0..count.div_ceil(Self::PER_WINDOW))
                .map(|_| OnceLock::new())
                .collect(),
            element: PhantomData,
        })
    }

    /// The same array, mapped once more.
    pub(super) fn again(&self) -> io::Result<Self> {
        let count = u32::try_from(self.count).map_err(io::Error::other)?;
        Self::map(self.array.as_fd(), count)
    }

    /// Where the element is, or none beyond the end.
    fn element(&self, index: u32) -> io::Result<Option<NonNull<T>>> {
        let index = index as usize;
        if index >= self.count {
            return Ok(None);
        }
        let (number, place) = (index / Self::PER_WINDOW, index % Self::PER_WINDOW);
        let window = match self.windows[number].get() {
            Some(window) => window,
            None => {
                let elements = Self::PER_WINDOW.min(self.count - number * Self::PER_WINDOW);
                let new = Window::map(self.array.as_fd(), number, elements * size_of::<T>())?;
                self.windows[number].get_or_init(|| new)
            }
        };
        // SAFETY: `place` is below the window's number of elements; a page is aligned for any T.
        Ok(Some(unsafe { window.start.cast::<T>().add(place) }))
    }

    /// The element, or none beyond the end.
    pub(super) fn read(&self, index: u32) -> io::Result<Option<T>> {
        let element = self.element(index)?;
        // SAFETY: within a mapping that lives as long as `self`; `Pod` allows every bit pattern.
        Ok(element.map(|element| unsafe { element.read_volatile() }))
    }

    /// Writes the element; false beyond the end.
    pub(super) fn write(&mut self, index: u32, value: T) -> io::Result<bool> {
        let element = self.element(index)?;
        if let Some(element) = element {
            // SAFETY: within a mapping that lives as long as `self`, which nobody else writes to.
            unsafe { element.write_volatile(value) }
        }
        Ok(element.is_some())
    }
}

/// One window of an array.
struct Window {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping is shared memory that belongs to no thread; writing takes `&mut MappedArray`.
unsafe impl Send for Window {}
// SAFETY: as above; reading only copies.
unsafe impl Sync for Window {}

impl Window {
    fn map(array: BorrowedFd<'_>, number: usize, length: usize) -> io::Result<Self> {
        let (read_write, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let offset = i64::try_from(number * WINDOW_BYTES).map_err(io::Error::other)?;
        let (anywhere, array) = (std::ptr::null_mut(), array.as_raw_fd());
        // SAFETY: a new mapping at an address of the kernel's choice; the kernel refuses what is
        // beyond the array's end.
        let start = unsafe { libc::mmap(anywhere, length, read_write, shared, array, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { start, length })
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped, and nothing borrows from it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

const _: () = {
    assert!(size_of::<ObjectAttr>() == 16);
    assert!(size_of::<InfoAttr>() == 16);
    assert!(size_of::<BatchAttr>() == 56);
    assert!(size_of::<RawLinkInfo>() == 32);
};
