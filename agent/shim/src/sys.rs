//! The shim's only door to system calls that std lacks. Everything here is a thin, safe shape
//! around one call; errors are the call's own.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use gantry_shim::clone::{CLONE_INTO_CGROUP, CloneArgs};
use gantry_shim::wire::FD_COUNT_MAX;

/// Where gantry-rt writes its report.
const REPORT_FD: RawFd = 3;
/// Connections waiting to be accepted.
const BACKLOG: i32 = 8;

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// # Safety
/// `fd` was just returned by a successful call and belongs to nobody else.
unsafe fn own(fd: i32) -> OwnedFd {
    // SAFETY: the caller's contract is exactly from_raw_fd's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Becomes a session leader without a terminal whose parent is not the caller's: forks once. In
/// the child returns true; the parent gets false and should wait for the child's word and exit.
/// Second: whether the child began in the v2 cgroup whose directory `cgroup` is.
///
/// Only sound in a single-threaded process, which the shim is for its whole life.
pub(crate) fn fork_detached(cgroup: Option<BorrowedFd<'_>>) -> io::Result<(bool, bool)> {
    let (pid, inside) = match cgroup.map(fork_into) {
        Some(Ok(pid)) => (pid, true),
        // Linux before 5.7, or a cgroup that takes no process: the child moves itself.
        // SAFETY: there is one thread, so the child inherits a consistent heap and no held lock.
        _ => (check(unsafe { libc::fork() })?, false),
    };
    if pid > 0 {
        return Ok((false, inside));
    }
    // SAFETY: plain calls without memory arguments.
    check(unsafe { libc::setsid() })?;
    Ok((true, inside))
}

/// fork into another cgroup: nobody waits for a grace period, as one who moves does.
fn fork_into(cgroup: BorrowedFd<'_>) -> io::Result<i32> {
    let arguments = CloneArgs {
        flags: CLONE_INTO_CGROUP,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    // SAFETY: the kernel reads `arguments` for the length given. No stack and no VM are shared, so
    // the child goes on in a copy of this memory; there is one thread, so no held lock is copied.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_ref(&arguments),
            size_of::<CloneArgs>(),
        )
    };
    match i32::try_from(result) {
        Ok(pid) if pid >= 0 => Ok(pid),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes orphans of this process's containers its children, hides it from terminal signals, and
/// returns the descriptor that reads SIGCHLD. All other signals stay blocked: nothing but SIGKILL
/// ends a shim.
pub(crate) fn take_signals() -> io::Result<OwnedFd> {
    // SAFETY: sigset_t is plain data that sigfillset initialises; pointers are to locals.
    unsafe {
        check(libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))?;
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        check(libc::sigprocmask(
            libc::SIG_BLOCK,
            &all,
            std::ptr::null_mut(),
        ))?;
        let mut child: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut child);
        libc::sigaddset(&mut child, libc::SIGCHLD);
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        Ok(own(check(libc::signalfd(-1, &child, flags))?))
    }
}

/// Between fork and exec of gantry-rt: it dies with `parent`, the shim; an empty signal mask, and
/// `report` as descriptor 3. Signals that are ignored stay so until gantry-rt resets them, and only
/// them, before the container's program. Async-signal-safe calls only.
///
/// A helper that outlived its shim would make a container beside the one that the next shim is told
/// to make, in the same directory and the same cgroup.
pub(crate) fn prepare_child(parent: i32, report: RawFd) -> io::Result<()> {
    // SAFETY: sigset_t is plain data initialised by sigemptyset; the rest takes integers.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
        if libc::getppid() != parent {
            // It has died already.
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        check(libc::sigprocmask(
            libc::SIG_SETMASK,
            &none,
            std::ptr::null_mut(),
        ))?;
        // The shim keeps that number occupied, so this closes a copy of its lock and never
        // std's own pipe.
        check(libc::dup2(report, REPORT_FD))?;
    }
    Ok(())
}

/// Lowers or raises the soft limit of open files, never above the hard one.
pub(crate) fn limit_open_files(soft: u64) -> io::Result<()> {
    // SAFETY: `limit` is a valid place for one rlimit, read and written by the kernel only.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        check(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit))?;
        limit.rlim_cur = soft.min(limit.rlim_max);
        check(libc::setrlimit(libc::RLIMIT_NOFILE, &limit))?;
    }
    Ok(())
}

/// The next child that has ended: its pid and wait status. None when there is none.
pub(crate) fn reap() -> Option<(i32, i32)> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for one int.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    (pid > 0).then_some((pid, status))
}

/// Sends a signal; a process that is gone is no error.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: integers only. The caller passes pids of children it has not reaped yet, so the
    // number cannot have been reused.
    match check(unsafe { libc::kill(pid, signal) }) {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
        _ => Ok(()),
    }
}

/// Waits for readiness; `timeout_ms` < 0 is for ever. Interrupted counts as nothing ready.
pub(crate) fn poll(fds: &mut [libc::pollfd], timeout_ms: i32) {
    // SAFETY: the slice is valid for its length.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms) };
}

/// Reads once; `WouldBlock` when nothing is there.
pub(crate) fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is valid for writes of its length.
    let n = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Moves up to `bytes_max` from a FIFO into a file at `offset`, in one step; `WouldBlock` when nothing
/// is there.
pub(crate) fn splice(
    fifo: BorrowedFd<'_>,
    file: BorrowedFd<'_>,
    offset: u64,
    bytes_max: usize,
) -> io::Result<usize> {
    let mut offset = i64::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: `offset` is a valid place for one loff_t; the FIFO's offset is none.
    let n = unsafe {
        libc::splice(
            fifo.as_raw_fd(),
            std::ptr::null_mut(),
            file.as_raw_fd(),
            &mut offset,
            bytes_max,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    match usize::try_from(n) {
        // A FIFO that this process can write to has no end.
        Ok(0) => Err(io::ErrorKind::WouldBlock.into()),
        Ok(n) => Ok(n),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Writes once; `WouldBlock` when there is no room. SIGPIPE is blocked in this process.
pub(crate) fn write(fd: BorrowedFd<'_>, data: &[u8]) -> io::Result<usize> {
    // SAFETY: the data is valid for reads of its length.
    let n = unsafe { libc::write(fd.as_raw_fd(), data.as_ptr().cast(), data.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// A pipe, both ends close-on-exec, the read end non-blocking.
pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` holds two ints; on success both are new and ours.
    unsafe {
        check(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC))?;
        let (read, write) = (own(fds[0]), own(fds[1]));
        check(libc::fcntl(fds[0], libc::F_SETFL, libc::O_NONBLOCK))?;
        Ok((read, write))
    }
}

/// Makes a FIFO unless it is there.
pub(crate) fn ensure_fifo(path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: a NUL-terminated path.
    match check(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Holds an exclusive lock on `fd` for as long as it is open; false when another process has it.
pub(crate) fn try_lock(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: integers only.
    match check(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// Listens at a path relative to the working directory (so that its length never matters) with
/// mode 0600. `kind` is `SOCK_SEQPACKET` or `SOCK_STREAM`.
pub(crate) fn listen(path: &Path, kind: i32) -> io::Result<OwnedFd> {
    // SAFETY: sockaddr_un is plain data; the length passed is that of the structure; the
    // descriptor is new and ours.
    unsafe {
        let mut address: libc::sockaddr_un = std::mem::zeroed();
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        let bytes = path.as_os_str().as_bytes();
        if bytes.len() >= address.sun_path.len() {
            return Err(io::Error::other(format!(
                "socket path too long: {}",
                path.display()
            )));
        }
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        let flags = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let socket = own(check(libc::socket(libc::AF_UNIX, flags, 0))?);
        let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        // The socket file takes the umask: nobody but root may ever connect.
        let umask = libc::umask(0o177);
        let bound = check(libc::bind(
            socket.as_raw_fd(),
            std::ptr::from_ref(&address).cast(),
            length,
        ));
        libc::umask(umask);
        bound?;
        check(libc::listen(socket.as_raw_fd(), BACKLOG))?;
        Ok(socket)
    }
}

/// The next waiting connection.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: null addresses mean "not wanted"; the descriptor is new and ours.
    unsafe {
        Ok(own(check(libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            flags,
        ))?))
    }
}

/// Room for one SCM_RIGHTS message of [`FD_COUNT_MAX`] descriptors, aligned as cmsghdr.
#[repr(align(8))]
struct Control([u8; 64]);

/// One datagram and the descriptors that came with it. An empty one means the peer has gone.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = Control([0; 64]);
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: msghdr is plain data; its pointers are to locals that outlive the call; the CMSG
    // macros walk only what the kernel wrote within msg_controllen; the descriptors are new.
    unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE((FD_COUNT_MAX * size_of::<RawFd>()) as u32) as _;
        let n = libc::recvmsg(socket.as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC);
        let length = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        let mut fds = Vec::new();
        let mut message = libc::CMSG_FIRSTHDR(&header);
        while !message.is_null() {
            if (*message).cmsg_level == libc::SOL_SOCKET && (*message).cmsg_type == libc::SCM_RIGHTS
            {
                let bytes = (*message).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(message).cast::<RawFd>();
                for index in 0..bytes / size_of::<RawFd>() {
                    fds.push(own(data.add(index).read_unaligned()));
                }
            }
            message = libc::CMSG_NXTHDR(&header, message);
        }
        Ok((length, fds))
    }
}

/// Sends one datagram whole or not at all, with a descriptor where one is given.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    message: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let mut control = Control([0; 64]);
    let mut part = libc::iovec {
        iov_base: message.as_ptr().cast_mut().cast(),
        iov_len: message.len(),
    };
    // SAFETY: msghdr is plain data; its pointers are to locals that outlive the call, and sendmsg
    // only reads them; CMSG_FIRSTHDR is in `control`, which has room for one descriptor.
    let n = unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &mut part;
        header.msg_iovlen = 1;
        if let Some(fd) = fd {
            let size = size_of::<RawFd>() as u32;
            header.msg_control = control.0.as_mut_ptr().cast();
            header.msg_controllen = libc::CMSG_SPACE(size) as _;
            let head = libc::CMSG_FIRSTHDR(&header);
            (*head).cmsg_level = libc::SOL_SOCKET;
            (*head).cmsg_type = libc::SCM_RIGHTS;
            (*head).cmsg_len = libc::CMSG_LEN(size) as _;
            let data = libc::CMSG_DATA(head).cast::<RawFd>();
            data.write_unaligned(fd.as_raw_fd());
        }
        libc::sendmsg(socket.as_raw_fd(), &header, flags)
    };
    if n < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A descriptor that becomes readable when the process ends, whoever its parent is.
pub(crate) fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: integers only; the descriptor is new and ours (close-on-exec by definition).
    unsafe {
        Ok(own(check(
            libc::syscall(libc::SYS_pidfd_open, pid, 0) as i32
        )?))
    }
}

/// The wait status of a process that somebody else has reaped, where the kernel tells (Linux
/// 6.15). None: not reaped yet, or never to be known.
pub(crate) fn pidfd_exit_status(pidfd: BorrowedFd<'_>) -> Option<i32> {
    // include/uapi/linux/pidfd.h: struct pidfd_info of 64 bytes; mask at 0, exit_code at 60.
    const PIDFD_GET_INFO: libc::Ioctl = 0xC040_FF0B_u32 as libc::Ioctl;
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    let mut info = [0u64; 8];
    info[0] = PIDFD_INFO_EXIT;
    // SAFETY: the kernel writes at most the 64 bytes that are encoded in the request number.
    let done = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, info.as_mut_ptr()) };
    (done == 0 && info[0] & PIDFD_INFO_EXIT != 0).then_some((info[7] >> 32) as i32)
}

fn clock(id: libc::clockid_t) -> libc::timespec {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for one timespec.
    unsafe { libc::clock_gettime(id, &mut time) };
    time
}

/// Nanoseconds since 1970.
pub(crate) fn now_ns() -> u64 {
    let time = clock(libc::CLOCK_REALTIME);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Milliseconds that never go back: for deadlines.
pub(crate) fn monotonic_ms() -> u64 {
    let time = clock(libc::CLOCK_MONOTONIC);
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

/// Not to be guessed.
pub(crate) fn random_u16() -> u16 {
    let mut random = [0; 2];
    // SAFETY: the buffer is valid for writes of its length. So few bytes come whole.
    unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) };
    u16::from_ne_bytes(random)
}

/// Reads and writes of `fd` no longer wait. Best effort: terminals and pipes always take it.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) {
    // SAFETY: integers only.
    unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        if flags >= 0 {
            libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK);
        }
    }
}

/// Ends a connection in both directions; the next poll reports it.
pub(crate) fn hang_up(socket: BorrowedFd<'_>) {
    // SAFETY: integers only.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

/// Sends a signal to exactly the process behind `pidfd`; one that is gone is no error.
pub(crate) fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let none: *const libc::siginfo_t = std::ptr::null();
    // SAFETY: a null siginfo means "as kill"; the rest are integers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            none,
            0,
        )
    };
    match check(result as i32) {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
        _ => Ok(()),
    }
}

/// Makes `fd` stdin, stdout and stderr.
pub(crate) fn replace_stdio(fd: BorrowedFd<'_>) {
    for standard in 0..3 {
        // SAFETY: integers only; nothing in this process owns descriptors 0 to 2.
        unsafe { libc::dup2(fd.as_raw_fd(), standard) };
    }
}

/// Occupies [`REPORT_FD`] with `fd` or a copy of it for the life of the process.
pub(crate) fn keep_as_report_slot(fd: OwnedFd) -> io::Result<()> {
    if fd.as_raw_fd() != REPORT_FD {
        // SAFETY: integers only; called before the process opens anything else that it keeps.
        check(unsafe { libc::dup3(fd.as_raw_fd(), REPORT_FD, libc::O_CLOEXEC) })?;
    }
    std::mem::forget(fd);
    Ok(())
}
