//! The machine under the simulated processes: clock, randomness, waiting and disk, at the C library's door.
//!
//! ```text
//!  clock_gettime ─► the simulated clock        getrandom ─► the seed
//!  epoll_wait    ─► 0: nothing happens by itself; a runtime that waits tells until when, and gives way
//!  write, pwrite64, ftruncate64, fdatasync, fsync, rename, unlink ─► the file, and what a power cut or a
//!                                                                     full disk makes of it
//! ```
//! The definitions here take the place of libc's in this binary alone, so that the control plane and the
//! agent run as they are. They act only after [`begin`], in a process forked for one seed; before it, and
//! in every other thread's view of the world, the kernel answers.
//!
//! Invariants: time passes only by [`advance`]; one seed gives one sequence of random bytes; what was
//! written and not synced survives a power cut whole, in part or not at all, and what was synced survives.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use libc::{c_char, c_int, c_uint, c_void, off64_t, size_t, ssize_t, timespec};
use tokio::runtime::Runtime;

/// Simulated time is on.
static ACTIVE: AtomicBool = AtomicBool::new(false);
/// Nanoseconds on the monotonic clock.
static NOW_NS: AtomicU64 = AtomicU64::new(0);
/// What the wall clock shows beyond it, in seconds; a machine's clock may jump.
static WALL_S: AtomicI64 = AtomicI64::new(0);
static RANDOM: AtomicU64 = AtomicU64::new(0);
/// A runtime waits; for how many milliseconds (-1: for ever).
static IDLE_MS: AtomicI64 = AtomicI64::new(NOT_IDLE);
const NOT_IDLE: i64 = -2;
/// What is left of the running process's disk operations before it is killed; negative: no limit.
static OPERATIONS_LEFT: AtomicI64 = AtomicI64::new(-1);
/// The running process has been killed: what it still does has no effect.
static KILLED: AtomicBool = AtomicBool::new(false);
/// The running process's disk refuses writes.
static DISK_FULL: AtomicBool = AtomicBool::new(false);
/// What was written to each file, by device and inode, since it was last synced.
static UNSYNCED: Mutex<BTreeMap<(u64, u64), Unsynced>> = Mutex::new(BTreeMap::new());

const SECTOR_BYTES: usize = 512;
/// 2026-01-01: the wall clock at the start.
const WALL_BEGIN_S: i64 = 1_767_225_600;
/// The monotonic clock at the start: not 0, so that "long ago" can be computed.
const MONOTONIC_BEGIN_NS: u64 = 1_000_000_000_000;

struct Unsynced {
    path: PathBuf,
    writes: Vec<Write>,
}

struct Write {
    offset: u64,
    old: Vec<u8>,
    old_len: u64,
    new: Vec<u8>,
}

thread_local! {
    static WAITING: RefCell<Option<Waker>> = const { RefCell::new(None) };
}

/// From here on this process is a simulation of `seed`.
pub fn begin(seed: u64) {
    NOW_NS.store(MONOTONIC_BEGIN_NS, Relaxed);
    WALL_S.store(
        WALL_BEGIN_S - (MONOTONIC_BEGIN_NS / 1_000_000_000) as i64,
        Relaxed,
    );
    RANDOM.store(seed ^ 0x5bd1_e995_9d1f_3a77, Relaxed);
    ACTIVE.store(true, Relaxed);
}

/// Nanoseconds since the start.
pub fn now_ns() -> u64 {
    NOW_NS.load(Relaxed) - MONOTONIC_BEGIN_NS
}

/// Moves the clock to `ns` since the start; never back.
pub fn advance(ns: u64) {
    NOW_NS.fetch_max(ns + MONOTONIC_BEGIN_NS, Relaxed);
}

/// Sets the wall clock of the process that runs next, in seconds off the true time.
pub fn set_wall_offset(seconds: i64) {
    let begin = WALL_BEGIN_S - (MONOTONIC_BEGIN_NS / 1_000_000_000) as i64;
    WALL_S.store(begin + seconds, Relaxed);
}

/// The running process dies at its n-th disk operation from now; `None`: never by that.
pub fn kill_after_operations(count: Option<u32>) {
    OPERATIONS_LEFT.store(count.map_or(-1, i64::from), Relaxed);
}

/// What is left of that.
pub fn operations_left() -> u32 {
    OPERATIONS_LEFT.load(Relaxed).max(0) as u32
}

/// Whether the running process has been killed.
pub fn is_killed() -> bool {
    KILLED.load(Relaxed)
}

/// Says whether what runs now is a killed process.
pub fn set_killed(is_killed: bool) {
    KILLED.store(is_killed, Relaxed);
}

/// Says whether the disk of what runs now is full.
pub fn set_disk_full(is_full: bool) {
    DISK_FULL.store(is_full, Relaxed);
}

/// Runs the tasks of `runtime` until all wait, at most `turns` times some of them. Returns when the first
/// of its timers is due, on [`now_ns`]'s clock.
pub fn run(runtime: &Runtime, mut turns: Option<u32>) -> Option<u64> {
    IDLE_MS.store(NOT_IDLE, Relaxed);
    let mut is_first = true;
    runtime.block_on(std::future::poll_fn(|context| {
        let is_over = IDLE_MS.load(Relaxed) != NOT_IDLE || KILLED.load(Relaxed);
        if !std::mem::take(&mut is_first) && is_over {
            return Poll::Ready(());
        }
        WAITING.with(|waiting| *waiting.borrow_mut() = Some(context.waker().clone()));
        if let Some(left) = &mut turns {
            if *left == 0 {
                return Poll::Ready(());
            }
            *left -= 1;
            context.waker().wake_by_ref();
        }
        Poll::Pending
    }));
    WAITING.with(|waiting| waiting.borrow_mut().take());
    match IDLE_MS.load(Relaxed) {
        NOT_IDLE => Some(now_ns()),
        -1 => None,
        ms => Some(now_ns() + ms as u64 * 1_000_000),
    }
}

/// What is left of the files below `root` when the power goes: of every write that was not synced, `decide`
/// says how many of its sectors there are.
pub fn cut_power(root: &Path, mut decide: impl FnMut(usize) -> usize) {
    let mut all = unsynced();
    let below: Vec<_> = all
        .iter()
        .filter(|(_, file)| file.path.starts_with(root))
        .map(|(id, _)| *id)
        .collect();
    for id in below {
        let Some(Unsynced { path, writes }) = all.remove(&id) else {
            continue;
        };
        let Ok(file) = std::fs::OpenOptions::new().write(true).open(&path) else {
            continue; // removed since
        };
        if file.metadata().map(|m| (m.dev(), m.ino())).ok() != Some(id) {
            continue;
        }
        for write in writes.iter().rev() {
            raw_pwrite(&file, &write.old, write.offset);
            raw_truncate(&file, write.old_len);
        }
        for write in &writes {
            let sectors = write.new.len().div_ceil(SECTOR_BYTES);
            let kept = decide(sectors).min(sectors);
            let bytes = (kept * SECTOR_BYTES).min(write.new.len());
            raw_pwrite(&file, &write.new[..bytes], write.offset);
        }
    }
}

fn raw_pwrite(file: &std::fs::File, bytes: &[u8], offset: u64) {
    use std::os::fd::AsRawFd as _;
    let fd = file.as_raw_fd();
    // SAFETY: the buffer is valid for its length, the descriptor is open.
    unsafe {
        libc::syscall(
            libc::SYS_pwrite64,
            fd,
            bytes.as_ptr(),
            bytes.len(),
            offset as i64,
        );
    }
}

fn raw_truncate(file: &std::fs::File, len: u64) {
    use std::os::fd::AsRawFd as _;
    // SAFETY: no memory is involved, the descriptor is open.
    unsafe { libc::syscall(libc::SYS_ftruncate, file.as_raw_fd(), len as i64) };
}

fn unsynced() -> MutexGuard<'static, BTreeMap<(u64, u64), Unsynced>> {
    UNSYNCED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What becomes of a disk operation.
enum Fate {
    /// It is done.
    Done,
    /// The process was killed before it.
    Nothing,
    /// The disk refuses it.
    Refused,
}

fn fate(may_be_refused: bool) -> Fate {
    if OPERATIONS_LEFT.load(Relaxed) > 0 && OPERATIONS_LEFT.fetch_sub(1, Relaxed) == 1 {
        KILLED.store(true, Relaxed);
        if let Some(waker) = WAITING.with(|waiting| waiting.borrow().clone()) {
            waker.wake();
        }
    }
    if KILLED.load(Relaxed) {
        Fate::Nothing
    } else if may_be_refused && DISK_FULL.load(Relaxed) {
        Fate::Refused
    } else {
        Fate::Done
    }
}

fn refuse() -> c_int {
    // SAFETY: the location is this thread's own.
    unsafe { *libc::__errno_location() = libc::ENOSPC };
    -1
}

/// Device, inode, length; `None` for what is no regular file.
fn identity(fd: c_int) -> Option<((u64, u64), u64)> {
    if !ACTIVE.load(Relaxed) || fd <= 2 {
        return None;
    }
    // SAFETY: all zeroes is a valid `stat`; the kernel fills it.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is valid for writes.
    let done = unsafe { libc::fstat(fd, &mut stat) } == 0;
    let is_file = done && stat.st_mode & libc::S_IFMT == libc::S_IFREG;
    is_file.then_some(((stat.st_dev, stat.st_ino), stat.st_size as u64))
}

/// Remembers what a write replaces.
fn note(fd: c_int, id: (u64, u64), len: u64, offset: u64, new: &[u8]) {
    let link = || format!("/proc/self/fd/{fd}");
    let mut old = vec![0; (len.saturating_sub(offset) as usize).min(new.len())];
    if !old.is_empty() {
        let (to, count) = (old.as_mut_ptr(), old.len());
        // SAFETY: `old` is valid for writes of its length.
        let read = unsafe { libc::syscall(libc::SYS_pread64, fd, to, count, offset) };
        let read = match usize::try_from(read) {
            Ok(read) => read,
            // Open for writing alone.
            Err(_) => {
                let file = std::fs::File::open(link());
                let read = file.and_then(|file| file.read_at(&mut old, offset));
                read.unwrap_or(0)
            }
        };
        old.truncate(read);
    }
    let mut all = unsynced();
    let file = all.entry(id).or_insert_with(|| Unsynced {
        path: std::fs::read_link(link()).unwrap_or_default(),
        writes: Vec::new(),
    });
    file.writes.push(Write {
        offset,
        old,
        old_len: len,
        new: new.to_vec(),
    });
}

/// A path that is about to mean another file or none.
fn forget(path: *const c_char) {
    // SAFETY: callers of rename and unlink give a C string.
    let path = Path::new(OsStr::from_bytes(
        unsafe { CStr::from_ptr(path) }.to_bytes(),
    ));
    if let Ok(metadata) = std::fs::metadata(path) {
        unsynced().remove(&(metadata.dev(), metadata.ino()));
    }
}

fn next_random() -> u64 {
    let mut z = RANDOM.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

// SAFETY: the signature is libc's; `time` is valid for writes by its contract.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut timespec) -> c_int {
    let is_cpu = matches!(
        clock,
        libc::CLOCK_PROCESS_CPUTIME_ID | libc::CLOCK_THREAD_CPUTIME_ID
    );
    if !ACTIVE.load(Relaxed) || is_cpu {
        // SAFETY: as the caller gave them.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) } as c_int;
    }
    let ns = NOW_NS.load(Relaxed);
    let is_wall = matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE);
    let offset = if is_wall { WALL_S.load(Relaxed) } else { 0 };
    // SAFETY: valid for writes.
    unsafe {
        (*time).tv_sec = (ns / 1_000_000_000) as i64 + offset;
        (*time).tv_nsec = (ns % 1_000_000_000) as i64;
    }
    0
}

// SAFETY: the signature is libc's; `buffer` is valid for `len` bytes by its contract.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, len: size_t, flags: c_uint) -> ssize_t {
    if !ACTIVE.load(Relaxed) {
        // SAFETY: as the caller gave them.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, len, flags) } as ssize_t;
    }
    // SAFETY: valid for `len` bytes; uninitialised bytes are only written.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), len) };
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&next_random().to_le_bytes()[..chunk.len()]);
    }
    len as ssize_t
}

// SAFETY: the signature is libc's; no event is ever written.
#[unsafe(no_mangle)]
unsafe extern "C" fn epoll_wait(
    epoll: c_int,
    events: *mut libc::epoll_event,
    max: c_int,
    timeout: c_int,
) -> c_int {
    if !ACTIVE.load(Relaxed) {
        let null = std::ptr::null::<c_void>();
        // SAFETY: as the caller gave them; no signal mask.
        let number = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait,
                epoll,
                events,
                max,
                timeout,
                null,
                8_usize,
            )
        };
        return number as c_int;
    }
    if timeout != 0 {
        IDLE_MS.store(i64::from(timeout.max(-1)), Relaxed);
        if let Some(waker) = WAITING.with(|waiting| waiting.borrow().clone()) {
            waker.wake();
        }
    }
    0
}

// SAFETY: the signature is libc's; `buffer` is valid for `len` bytes by its contract.
#[unsafe(no_mangle)]
unsafe extern "C" fn write(fd: c_int, buffer: *const c_void, len: size_t) -> ssize_t {
    if let Some((id, size)) = identity(fd) {
        match fate(true) {
            Fate::Nothing => return len as ssize_t,
            Fate::Refused => return refuse() as ssize_t,
            Fate::Done => {
                // SAFETY: no memory is involved.
                let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
                let is_appending = flags & libc::O_APPEND != 0;
                // SAFETY: no memory is involved.
                let at = unsafe { libc::lseek64(fd, 0, libc::SEEK_CUR) };
                let offset = if is_appending { size } else { at.max(0) as u64 };
                // SAFETY: valid for `len` bytes.
                let bytes = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), len) };
                note(fd, id, size, offset, bytes);
            }
        }
    }
    // SAFETY: as the caller gave them.
    unsafe { libc::syscall(libc::SYS_write, fd, buffer, len) as ssize_t }
}

// SAFETY: the signature is libc's; `buffer` is valid for `len` bytes by its contract.
#[unsafe(no_mangle)]
unsafe extern "C" fn pwrite64(
    fd: c_int,
    buffer: *const c_void,
    len: size_t,
    offset: off64_t,
) -> ssize_t {
    if let Some((id, size)) = identity(fd) {
        match fate(true) {
            Fate::Nothing => return len as ssize_t,
            Fate::Refused => return refuse() as ssize_t,
            Fate::Done => {
                // SAFETY: valid for `len` bytes.
                let bytes = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), len) };
                note(fd, id, size, offset as u64, bytes);
            }
        }
    }
    // SAFETY: as the caller gave them.
    unsafe { libc::syscall(libc::SYS_pwrite64, fd, buffer, len, offset) as ssize_t }
}

// SAFETY: the signature is libc's; no memory is involved.
#[unsafe(no_mangle)]
unsafe extern "C" fn ftruncate64(fd: c_int, len: off64_t) -> c_int {
    if let Some((_, size)) = identity(fd) {
        match fate(len as u64 > size) {
            Fate::Nothing => return 0,
            Fate::Refused => return refuse(),
            Fate::Done => {}
        }
    }
    // SAFETY: no memory is involved.
    unsafe { libc::syscall(libc::SYS_ftruncate, fd, len) as c_int }
}

fn sync(fd: c_int) -> c_int {
    if let Some((id, _)) = identity(fd) {
        match fate(true) {
            Fate::Nothing => return 0,
            Fate::Refused => return refuse(),
            Fate::Done => drop(unsynced().remove(&id)),
        }
    }
    0
}

// SAFETY: the signature is libc's; no memory is involved.
#[unsafe(no_mangle)]
unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    match ACTIVE.load(Relaxed) {
        true => sync(fd),
        // SAFETY: no memory is involved.
        false => unsafe { libc::syscall(libc::SYS_fdatasync, fd) as c_int },
    }
}

// SAFETY: the signature is libc's; no memory is involved.
#[unsafe(no_mangle)]
unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    match ACTIVE.load(Relaxed) {
        true => sync(fd),
        // SAFETY: no memory is involved.
        false => unsafe { libc::syscall(libc::SYS_fsync, fd) as c_int },
    }
}

// SAFETY: the signature is libc's; both are C strings by its contract.
#[unsafe(no_mangle)]
unsafe extern "C" fn rename(old: *const c_char, new: *const c_char) -> c_int {
    if ACTIVE.load(Relaxed) {
        match fate(false) {
            Fate::Nothing => return 0,
            Fate::Refused => return refuse(),
            Fate::Done => forget(new),
        }
    }
    let here = libc::AT_FDCWD;
    // SAFETY: as the caller gave them.
    unsafe { libc::syscall(libc::SYS_renameat2, here, old, here, new, 0) as c_int }
}

// SAFETY: the signature is libc's; a C string by its contract.
#[unsafe(no_mangle)]
unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    if ACTIVE.load(Relaxed) {
        match fate(false) {
            Fate::Nothing => return 0,
            Fate::Refused => return refuse(),
            Fate::Done => forget(path),
        }
    }
    // SAFETY: as the caller gave it.
    unsafe { libc::syscall(libc::SYS_unlinkat, libc::AT_FDCWD, path, 0) as c_int }
}

/// Runs `child` in a process of its own, whose exit code is what it returns; the caller gets its id.
///
/// This process must have one thread.
pub fn fork(child: impl FnOnce() -> i32) -> std::io::Result<i32> {
    // SAFETY: there is one thread, so the child has every lock's holder.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()),
        0 => {
            let code = child();
            // SAFETY: ends the process without the parent's exit handlers.
            unsafe { libc::_exit(code) }
        }
        pid => Ok(pid),
    }
}

/// Waits for any child; its id and how it ended.
pub fn wait() -> std::io::Result<(i32, i32)> {
    let mut status = 0;
    // SAFETY: `status` is valid for writes.
    match unsafe { libc::waitpid(-1, &mut status, 0) } {
        -1 => Err(std::io::Error::last_os_error()),
        pid => Ok((pid, status)),
    }
}

/// Ends this process with SIGXCPU when it has used so many seconds of processor time.
pub fn limit_cpu(seconds: u64) {
    let limit = libc::rlimit {
        rlim_cur: seconds,
        rlim_max: seconds + 5,
    };
    // SAFETY: `limit` is valid for reads.
    unsafe { libc::setrlimit(libc::RLIMIT_CPU, &limit) };
}
