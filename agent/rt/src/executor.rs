//! The last steps inside the container, for init and for every exec alike.
//!
//! ```text
//! libcontainer: namespaces, rootfs, user, (capabilities) ─► validate ─► wait for start ─► exec:
//!     default signals ─► (user namespace, for exec) ─► seccomp filters ─► drop capabilities (if libcontainer was told not to) ─► execve
//! ```
//! Why here and not in the library: stock exec runs *without* a filter; the library compiles the
//! profile in every init (8.8 ms); it leaves SIGPIPE ignored. Filters come compiled from the
//! agent. Without no_new_privs a filter may only be loaded with CAP_SYS_ADMIN, so the agent then
//! leaves `process.capabilities` out of the spec and names the wanted set in an annotation: the
//! filter is loaded first, the capabilities are dropped after.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, bail};
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};

use crate::executable;
use crate::user_namespace::Entry;

/// Hexadecimal mask of the capabilities to keep; set by the agent when it left
/// `process.capabilities` out.
const CAPABILITIES_ANNOTATION: &str = "gantry.dev/capabilities";
/// Bytes of a filter file: eight programs of at most 4096 instructions.
const FILTER_BYTES_MAX: usize = 8 * (4 + 4096 * 8);
/// Length of one BPF instruction in bytes.
const INSTRUCTION_BYTES: usize = 8;

/// What is done between libcontainer's set-up and the container's own program.
#[derive(Clone)]
pub(crate) struct Workload {
    /// Loaded in this order; the last loaded is asked first.
    filters: Rc<Vec<Vec<libc::sock_filter>>>,
    keep_capabilities: Option<u64>,
    /// For a command in a container with a user namespace.
    entry: Option<Rc<Entry>>,
    /// Bit n - 1: signal n is not as it is by default. execve resets what is handled.
    ignored_signals: u64,
}

impl Workload {
    /// Reads the filters while the host's file system is still in sight.
    pub(crate) fn new(spec: &Spec, filter_file: Option<&Path>) -> anyhow::Result<Self> {
        let filters = match filter_file {
            Some(path) => {
                let bytes =
                    fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
                parse_filters(&bytes)
                    .with_context(|| format!("bad seccomp file {}", path.display()))?
            }
            None => Vec::new(),
        };
        let annotation = spec
            .annotations()
            .as_ref()
            .and_then(|a| a.get(CAPABILITIES_ANNOTATION));
        let keep_capabilities = annotation
            .map(|text| u64::from_str_radix(text, 16))
            .transpose()
            .with_context(|| format!("annotation {CAPABILITIES_ANNOTATION} is no hex mask"))?;
        Ok(Self {
            filters: Rc::new(filters),
            keep_capabilities,
            entry: None,
            ignored_signals: ignored_signals(),
        })
    }

    /// The same for a command that is to join the container's user namespace first.
    pub(crate) fn entering(self, entry: Entry) -> Self {
        Self {
            keep_capabilities: entry.capabilities.or(self.keep_capabilities),
            entry: Some(Rc::new(entry)),
            ..self
        }
    }

    fn prepare(&self) -> Result<(), String> {
        reset_signals(self.ignored_signals);
        if let Some(entry) = &self.entry {
            entry.enter()?;
        }
        for filter in self.filters.iter() {
            load(filter).map_err(|error| format!("cannot load the seccomp filter: {error}"))?;
        }
        if let Some(mask) = self.keep_capabilities {
            keep_capabilities(mask)
                .map_err(|error| format!("cannot drop capabilities: {error}"))?;
        }
        Ok(())
    }
}

impl Executor for Workload {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let why = match self.prepare().and_then(|()| execute(spec)) {
            Ok(never) => match never {},
            Err(why) => why,
        };
        // The shim was told that the container has started: what is left is its own stderr.
        eprintln!("{why}");
        Err(ExecutorError::Other(why))
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        program(spec)
            .map(|_| ())
            .map_err(ExecutorValidationError::ArgValidationError)
    }
}

fn execute(spec: &Spec) -> Result<std::convert::Infallible, String> {
    let (path, words) = program(spec)?;
    let arguments = executable::c_strings(&words)?;
    let c_path = executable::c_strings(&[path.to_string_lossy().into_owned()])?.remove(0);
    // The environment is this process's own: libcontainer has set it up.
    nix::unistd::execv(&c_path, &arguments)
        .map_err(|errno| format!("exec {}: {}", path.display(), errno.desc().to_lowercase()))
}

fn program(spec: &Spec) -> Result<(std::path::PathBuf, Vec<String>), String> {
    let process = spec.process().as_ref().ok_or("the spec has no process")?;
    let words = process.args().clone().unwrap_or_default();
    let first = words.first().ok_or("no command specified")?;
    let environment = process.env().as_deref().unwrap_or_default();
    // The last one counts, as for execve's reader.
    let search_path = environment
        .iter()
        .rev()
        .find_map(|e| e.strip_prefix("PATH="))
        .unwrap_or("");
    let path = executable::resolve(first, search_path)?;
    Ok((path, words))
}

/// A sequence of programs, each a little-endian count and that many 8-byte instructions.
fn parse_filters(bytes: &[u8]) -> anyhow::Result<Vec<Vec<libc::sock_filter>>> {
    if bytes.len() > FILTER_BYTES_MAX {
        bail!("{} bytes are more than {FILTER_BYTES_MAX}", bytes.len());
    }
    let mut filters = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (count, after) = rest
            .split_first_chunk::<4>()
            .context("cut off in a count")?;
        let length = u32::from_le_bytes(*count) as usize * INSTRUCTION_BYTES;
        if length == 0 || length > after.len() {
            bail!("a program of {length} bytes where {} are left", after.len());
        }
        let (program, next) = after.split_at(length);
        let instruction = |i: &[u8]| libc::sock_filter {
            code: u16::from_le_bytes([i[0], i[1]]),
            jt: i[2],
            jf: i[3],
            k: u32::from_le_bytes([i[4], i[5], i[6], i[7]]),
        };
        filters.push(
            program
                .chunks_exact(INSTRUCTION_BYTES)
                .map(instruction)
                .collect(),
        );
        rest = next;
    }
    Ok(filters)
}

/// By the host's /proc, as long as it is in sight; all of them when it does not tell.
fn ignored_signals() -> u64 {
    // In one read. What does not fit (a line of thousands of groups) counts as not told.
    let mut text = [0; 4096];
    let read = fs::File::open("/proc/self/status").and_then(|mut file| file.read(&mut text));
    read.ok()
        .map(|length| String::from_utf8_lossy(&text[..length]))
        .and_then(|status| mask_of(&status))
        .unwrap_or(u64::MAX)
}

fn mask_of(status: &str) -> Option<u64> {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

/// Rust ignores SIGPIPE and the shim ignores or blocks more; a container starts as from a shell.
fn reset_signals(ignored: u64) {
    // The kernel's own sigaction (handler, flags, restorer, mask): all zero is SIG_DFL. libc's
    // wrapper refuses 32 and 33, which a container must not inherit as ignored either.
    let default = [0u64; 4];
    let none = 0u64;
    let set_bytes = size_of::<u64>();
    // SAFETY: the kernel reads 32 and 8 bytes of two locals and writes nothing through null;
    // this process has one thread and ends in execve, so libc's view of them does not matter.
    unsafe {
        for signal in (1..=64).filter(|signal| ignored & (1 << (signal - 1)) != 0) {
            // SIGKILL and SIGSTOP are refused, which is what they should be.
            let null = std::ptr::null_mut::<u64>();
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                null,
                set_bytes,
            );
        }
        let null = std::ptr::null_mut::<u64>();
        let none = std::ptr::from_ref(&none);
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            none,
            null,
            set_bytes,
        );
    }
}

fn load(filter: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        // At most 4096 by parse_filters' limit on the file.
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies `len` instructions from `filter`, which outlives the call, and
    // writes nothing.
    let result = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            std::ptr::from_ref(&program),
            0,
            0,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Bounding, effective and permitted become `mask`; inheritable and ambient become empty.
fn keep_capabilities(mask: u64) -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let half = |bits: u32| Data {
        effective: bits,
        permitted: bits,
        inheritable: 0,
    };
    // SAFETY: integers, and two locals of the layout that version 3 of capset reads.
    unsafe {
        for capability in 0..64u64 {
            if mask & (1 << capability) != 0
                || libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) == 0
            {
                continue;
            }
            match io::Error::last_os_error() {
                // An unknown number ends the kernel's list.
                error if error.raw_os_error() == Some(libc::EINVAL) => break,
                error => return Err(error),
            }
        }
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL,
            0,
            0,
            0,
        );
        let data = [half(mask as u32), half((mask >> 32) as u32)];
        let header = std::ptr::from_ref(&header);
        if libc::syscall(libc::SYS_capset, header, data.as_ptr()) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read() {
        assert_eq!(
            mask_of("Name:\tx\nSigIgn:\t0000000000001000\n"),
            Some(0x1000)
        );
        assert_eq!(mask_of("Name:\tx\n"), None);
        // Rust's own.
        assert!(ignored_signals() & (1 << (libc::SIGPIPE - 1)) != 0);
    }

    #[test]
    fn filter_files_are_checked() {
        let one = [1, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0xff, 0x7f];
        let filters = parse_filters(&[one, one].concat()).unwrap();
        assert_eq!(filters.len(), 2);
        assert_eq!((filters[0][0].code, filters[0][0].k), (6, 0x7fff_0000));
        assert!(parse_filters(&[]).unwrap().is_empty());
        assert!(parse_filters(&one[..11]).is_err());
        assert!(parse_filters(&[0, 0, 0, 0]).is_err());
        assert!(parse_filters(&[1, 0, 0]).is_err());
        assert!(parse_filters(&vec![0; FILTER_BYTES_MAX + 1]).is_err());
    }
}
