//! From the embedded object to loaded programs on pinned maps.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use aya::maps::{Map, MapError};
use aya::programs::{Program, ProgramError, ProgramFd};
use aya::{Ebpf, EbpfError, EbpfLoader};
use ebpf_maps::LAYOUT_VERSION;
use nix::sys::signal::{SigSet, SigmaskHow};

use super::DataplaneError;
use super::hooks::{DEVICE_HOOK, SERVICE_HOOKS};
use super::pods::POD_HOOKS;
use super::repair::lock;
use super::uplinks::UPLINK_HOOKS;
use crate::paths::Paths;

/// Built by `build.rs`; licence "Dual MIT/GPL".
pub(super) static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/gantry.o"));

/// The maps that outlive the agent.
pub(super) const PINNED_MAPS: [&str; 29] = [
    "FRONTENDS",
    "SLOTS",
    "BACKENDS",
    "SOURCE_RANGES",
    "BANDWIDTH",
    "UPLINKS",
    "ANNOUNCED",
    "MASQUERADE",
    "SWITCHES",
    "NODE_ADDRESSES",
    "PEERS",
    "TRAFFIC",
    "FAILURES",
    "REVERSE_NAT",
    "AFFINITY",
    "COUNTERS",
    "ENDPOINTS",
    "NEAR",
    "INTERFACES",
    "FLOWS",
    "ZONES",
    "DROPS",
    "POLICY_PODS",
    "OPEN_PODS",
    "POLICY_PEERS",
    "POLICY_RULES",
    "POLICY_FLOWS",
    "DEVICE_EXEMPT",
    "DEVICE_RULES",
];

/// Lines of the verifier's log that an error shows: the last ones say what it did not like.
const VERIFIER_LINES: usize = 12;

/// Times that a program is loaded again because of a signal; libbpf's own number.
const INTERRUPTED_MAX: u32 = 5;

/// What was loaded.
pub(super) struct Loaded {
    pub ebpf: Ebpf,
    /// The maps are new: there was none of this layout.
    pub fresh: bool,
    /// The device guard's program, or why the kernel does not take it.
    pub device_guard: Result<ProgramFd, String>,
}

/// Where maps of this layout are pinned.
pub(super) fn map_directory(paths: &Paths) -> PathBuf {
    paths.bpf.join(format!("maps-v{LAYOUT_VERSION}"))
}

/// Directories of maps of other layouts, left by another version of the agent.
pub(super) fn other_map_directories(paths: &Paths) -> Vec<PathBuf> {
    let own = map_directory(paths);
    let entries = fs::read_dir(&paths.bpf).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| *path != own)
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("maps-v"))
        })
        .collect()
}

/// Opens or creates the maps and loads all programs.
pub(super) fn load(paths: &Paths) -> Result<Loaded, DataplaneError> {
    let directory = map_directory(paths);
    fs::create_dir_all(&directory).map_err(|error| {
        DataplaneError::kernel(format!("create {}", directory.display()), &error)
    })?;
    let fresh = !directory.join("FRONTENDS").exists();
    // Refusing with ECONNREFUSED needs a helper that these hooks have since Linux 6.1.
    let mut ebpf = open(&directory, true)?;
    if let Err(first) = load_hooks(&mut ebpf) {
        ebpf = open(&directory, false)?;
        load_hooks(&mut ebpf).map_err(|_| first)?;
        tracing::info!("connects to a service without backends fail with EPERM on this kernel");
    }
    let device_guard = match load_program(&mut ebpf, DEVICE_HOOK.program) {
        Ok(program) => program.try_clone().map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    Ok(Loaded {
        ebpf,
        fresh,
        device_guard,
    })
}

/// A loaded program's descriptor.
pub(super) fn program_fd<'a>(ebpf: &'a Ebpf, name: &str) -> Result<&'a ProgramFd, DataplaneError> {
    let program = ebpf.program(name).ok_or_else(|| missing("program", name))?;
    program.fd().map_err(|error| refused(name, &error))
}

/// Takes a map out of the object.
pub(super) fn take_map(ebpf: &mut Ebpf, name: &str) -> Result<Map, DataplaneError> {
    ebpf.take_map(name).ok_or_else(|| missing("map", name))
}

/// A map of the object was not of the type or size that this agent expects.
pub(super) fn unexpected(name: &str, error: impl std::fmt::Display) -> DataplaneError {
    DataplaneError::Kernel {
        what: format!("map {name}"),
        reason: format!("{error}; if it is pinned by something else, run `gantry-agent cleanup`"),
    }
}

/// Removing what is not there has succeeded.
pub(super) fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// The kernel's refusal of a map operation.
pub(super) fn failed(what: &str, error: &MapError) -> DataplaneError {
    match error {
        MapError::SyscallError(error) => DataplaneError::kernel(what, &error.io_error),
        other => DataplaneError::Kernel {
            what: what.into(),
            reason: other.to_string(),
        },
    }
}

/// Parses the object and opens or creates its maps.
pub(super) fn open(directory: &Path, has_set_retval: bool) -> Result<Ebpf, DataplaneError> {
    let has_set_retval = u32::from(has_set_retval);
    let mut loader = EbpfLoader::new();
    // No program relocates against the kernel's types: reading 5 MiB of them would be in vain.
    loader.btf(None);
    loader.override_global("HAS_SET_RETVAL", &has_set_retval, true);
    for name in PINNED_MAPS {
        loader.map_pin_path(name, directory.join(name));
    }
    loader.load(OBJECT).map_err(|error| match io_cause(&error) {
        Some(io) => DataplaneError::kernel(format!("create maps ({error})"), io),
        None => DataplaneError::Kernel {
            what: "eBPF object".into(),
            reason: chain(&error),
        },
    })
}

/// The programs of all hooks that see packets.
pub(super) fn of_packets() -> Vec<&'static str> {
    let hooks = POD_HOOKS.iter().chain(&UPLINK_HOOKS);
    hooks.map(|hook| hook.program).collect()
}

/// Loads the programs of all hooks, the long ones first.
pub(super) fn load_hooks(ebpf: &mut Ebpf) -> Result<(), DataplaneError> {
    let mut names = of_packets();
    names.extend(SERVICE_HOOKS.iter().map(|hook| hook.program));
    load_programs(ebpf, &names)
}

/// Loads programs on as many threads as there are processors: the verifier looks at one program per caller,
/// and has most of the time of an agent's start. The error is of the first one in `names` that has one.
pub(super) fn load_programs(ebpf: &mut Ebpf, names: &[&str]) -> Result<(), DataplaneError> {
    let mut found: BTreeMap<usize, &mut Program> = BTreeMap::new();
    for (name, program) in ebpf.programs_mut() {
        let at = names.iter().position(|wanted| *wanted == name);
        found.extend(at.map(|at| (at, program)));
    }
    if let Some(at) = (0..names.len()).find(|at| !found.contains_key(at)) {
        return Err(missing("program", names[at]));
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let left = Mutex::new(found);
    let failed = Mutex::new(BTreeMap::new());
    let work = || {
        loop {
            let next = lock(&left).pop_first();
            let Some((at, program)) = next else { return };
            if let Err(error) = verify(program) {
                lock(&failed).insert(at, error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(names.len()) {
            scope.spawn(work);
        }
        work();
    });
    let first = lock(&failed).pop_first();
    first.map_or(Ok(()), |(at, error)| Err(refused(names[at], &error)))
}

pub(super) fn load_program<'a>(
    ebpf: &'a mut Ebpf,
    name: &str,
) -> Result<&'a ProgramFd, DataplaneError> {
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| missing("program", name))?;
    verify(program).map_err(|error| refused(name, &error))?;
    program.fd().map_err(|error| refused(name, &error))
}

/// Has the kernel verify and take a program. The verifier gives up when its thread has a signal to handle: a
/// child that ends is enough, and a start has many. So another thread gets them meanwhile.
fn verify(program: &mut Program) -> Result<(), ProgramError> {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK);
    let loaded = take(program);
    if let Ok(before) = before {
        // What was just the mask is one.
        let _ = before.thread_set_mask();
    }
    loaded
}

fn take(program: &mut Program) -> Result<(), ProgramError> {
    let mut load = || match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::CgroupDevice(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    let mut loaded = load();
    for _ in 0..INTERRUPTED_MAX {
        if !loaded.as_ref().is_err_and(was_interrupted) {
            break;
        }
        loaded = load();
    }
    loaded
}

/// A signal has come while the verifier was at work.
fn was_interrupted(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { io_error, .. }
        if io_error.kind() == io::ErrorKind::WouldBlock)
}

fn missing(kind: &str, name: &str) -> DataplaneError {
    DataplaneError::Kernel {
        what: format!("{kind} {name}"),
        reason: "not in the embedded eBPF object; rebuild the agent".into(),
    }
}

fn refused(name: &str, error: &ProgramError) -> DataplaneError {
    let what = format!("program {name}");
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return DataplaneError::Kernel {
            what,
            reason: chain(error),
        };
    };
    let log = verifier_log.to_string();
    let lines: Vec<&str> = log.lines().filter(|line| !line.is_empty()).collect();
    if lines.is_empty() {
        return DataplaneError::kernel(what, io_error);
    }
    let tail = lines[lines.len().saturating_sub(VERIFIER_LINES)..].join("\n  ");
    DataplaneError::Kernel {
        what,
        reason: format!(
            "the kernel's verifier refused it ({io_error}); Gantry needs Linux 6.1 or newer. \
             Its last words:\n  {tail}"
        ),
    }
}

/// An error with all its causes: aya's texts do not repeat them.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn io_cause(error: &EbpfError) -> Option<&std::io::Error> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref() {
            return Some(io);
        }
        cause = error.source();
    }
    None
}
