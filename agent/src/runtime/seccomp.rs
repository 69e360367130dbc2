//! Seccomp profiles as BPF, compiled once per profile and cached by content.
//!
//! ```text
//! Seccomp, capabilities ─► rules ─► seccompiler ─► /run/gantry/seccomp/<hash>.bpf ─► gantry-rt loads it
//! ```
//! The default profile is Docker's (`moby/profiles/seccomp/default.json`): an allow list, the rest
//! is EPERM. `clone3` must be ENOSYS instead, so that C libraries fall back to `clone`, whose
//! flags a filter can see; a filter of one allow list has one errno, hence two programs:
//! 1. `clone3` is ENOSYS, everything else passes (absent with CAP_SYS_ADMIN);
//! 2. the allow list, in which `clone3` passes.
//!
//! The kernel asks both and takes the stricter answer. Difference to Docker: only the machine's
//! native architecture is allowed, a 32-bit program is killed at its first call.
//!
//! Compiling takes about a millisecond here and 8.8 ms in libseccomp inside every container's
//! init; this way it is once per set of capabilities and boot. Localhost profiles ([`profile`]) go
//! the same way, once per content of the file.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Capability, Spec};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use sha2::{Digest, Sha256};

use super::Seccomp;
use crate::paths::Paths;

mod profile;
mod table;

/// `CLONE_NEW*` without CLONE_NEWTIME: what needs CAP_SYS_ADMIN.
const CLONE_NAMESPACE_FLAGS: u64 = 0x7E02_0000;
/// A hypervisor's sockets reach the host past every network namespace.
const AF_VSOCK: u64 = 40;
/// Linux, 32-bit Linux, uname 2.6 of both, and "tell me".
const PERSONALITIES: [u64; 5] = [0x0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The node has no such profile, or it asks for what cannot be given.
    #[error("securityContext.seccompProfile.localhostProfile {name:?}: {reason}")]
    Localhost {
        /// As the pod names it.
        name: String,
        /// What is wrong with it, and where it is looked for.
        reason: String,
    },
    /// The table and the compiler disagree: a bug here.
    #[error("seccomp profile does not compile: {0}")]
    Compile(String),
    /// The cache cannot be written.
    #[error("cannot write seccomp filter {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the call.
        source: io::Error,
    },
}

/// The file with the filters for a container; none when it is to have none.
///
/// * `oci` – its bounding capabilities decide the conditional part of the profile.
/// * `paths` – Localhost profiles lie below `/var/lib/gantry/seccomp`, filters in
///   `/run/gantry/seccomp`.
pub fn ensure(
    profile: &Seccomp,
    oci: &Spec,
    paths: &Paths,
) -> Result<Option<PathBuf>, SeccompError> {
    match profile {
        Seccomp::Unconfined => Ok(None),
        Seccomp::Localhost(name) => {
            let refused = |reason| SeccompError::Localhost {
                name: name.clone(),
                reason,
            };
            let text = profile::read(&paths.lib.join("seccomp"), name).map_err(refused)?;
            let key = format!("localhost 1 {} {text}", std::env::consts::ARCH);
            cached(paths, &hex_of(&Sha256::digest(key)), || {
                profile::compile(&text).map_err(refused)
            })
            .map(Some)
        }
        Seccomp::RuntimeDefault => {
            let rules = rules(&capabilities(oci));
            cached(paths, &digest(&rules), || compile(&rules)).map(Some)
        }
    }
}

fn cached(
    paths: &Paths,
    name: &str,
    compile: impl FnOnce() -> Result<Vec<u8>, SeccompError>,
) -> Result<PathBuf, SeccompError> {
    let path = paths.run.join("seccomp").join(format!("{name}.bpf"));
    if !path.exists() {
        write(&path, &compile()?).map_err(|source| SeccompError::Io {
            path: path.clone(),
            source,
        })?;
    }
    Ok(path)
}

fn hex_of(hash: &[u8]) -> String {
    hash.iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn capabilities(oci: &Spec) -> Vec<Capability> {
    let process = oci.process().as_ref();
    let sets = process.and_then(|p| p.capabilities().as_ref());
    sets.and_then(|c| c.bounding().clone())
        .unwrap_or_default()
        .into_iter()
        .collect()
}

/// When a call is allowed, by the first argument that matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum When {
    Always,
    /// Argument 0 has none of these bits.
    WithoutBits(u64),
    /// Argument 0 is something else.
    Not(u64),
    /// Argument 0 is one of [`PERSONALITIES`].
    Personality,
}

/// An allow list: by call number.
struct Rules {
    allowed: BTreeMap<i64, When>,
    clone3_is_missing: bool,
}

/// Docker's profile for a set of capabilities.
fn rules(capabilities: &[Capability]) -> Rules {
    let mut allowed: BTreeMap<i64, When> = table::ALWAYS
        .iter()
        .map(|&call| (call, When::Always))
        .collect();
    allowed.insert(libc::SYS_socket, When::Not(AF_VSOCK));
    allowed.insert(libc::SYS_personality, When::Personality);
    allowed.insert(libc::SYS_clone, When::WithoutBits(CLONE_NAMESPACE_FLAGS));
    // Passes here, and is ENOSYS in the other program.
    allowed.insert(libc::SYS_clone3, When::Always);
    for (capability, calls) in table::BY_CAPABILITY {
        if capabilities.contains(capability) {
            allowed.extend(calls.iter().map(|&call| (call, When::Always)));
        }
    }
    Rules {
        allowed,
        clone3_is_missing: !capabilities.contains(&Capability::SysAdmin),
    }
}

fn digest(rules: &Rules) -> String {
    let mut hash = Sha256::new();
    hash.update(format!(
        "1 {} {}",
        std::env::consts::ARCH,
        rules.clone3_is_missing
    ));
    for rule in &rules.allowed {
        hash.update(format!("{rule:?}"));
    }
    hex_of(&hash.finalize())
}

/// The file's content: each program as a little-endian count and its 8-byte instructions, in the
/// order in which they are to be loaded.
fn compile(rules: &Rules) -> Result<Vec<u8>, SeccompError> {
    let bad = |error: seccompiler::BackendError| SeccompError::Compile(error.to_string());
    let arch = std::env::consts::ARCH.try_into().map_err(bad)?;
    let program = |calls, otherwise, matched| -> Result<BpfProgram, SeccompError> {
        SeccompFilter::new(calls, otherwise, matched, arch)
            .and_then(TryInto::try_into)
            .map_err(bad)
    };
    let mut bytes = Vec::new();
    if rules.clone3_is_missing {
        let calls = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        let missing = SeccompAction::Errno(libc::ENOSYS as u32);
        append(&mut bytes, &program(calls, SeccompAction::Allow, missing)?);
    }
    let mut calls = BTreeMap::new();
    for (&call, &when) in &rules.allowed {
        calls.insert(call, conditions(when).map_err(bad)?);
    }
    let denied = SeccompAction::Errno(libc::EPERM as u32);
    append(&mut bytes, &program(calls, denied, SeccompAction::Allow)?);
    Ok(bytes)
}

fn append(bytes: &mut Vec<u8>, program: &BpfProgram) {
    // At most 4096 instructions by the compiler's own check.
    bytes.extend_from_slice(&(program.len() as u32).to_le_bytes());
    for instruction in program {
        bytes.extend_from_slice(&instruction.code.to_le_bytes());
        bytes.extend_from_slice(&[instruction.jt, instruction.jf]);
        bytes.extend_from_slice(&instruction.k.to_le_bytes());
    }
}

fn conditions(when: When) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rule = |length, operator, value| {
        SeccompRule::new(vec![SeccompCondition::new(0, length, operator, value)?])
    };
    match when {
        When::Always => Ok(Vec::new()),
        When::WithoutBits(bits) => Ok(vec![rule(
            SeccompCmpArgLen::Qword,
            SeccompCmpOp::MaskedEq(bits),
            0,
        )?]),
        // The kernel looks at 32 bits of it: so must the filter.
        When::Not(value) => Ok(vec![rule(
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::Ne,
            value,
        )?]),
        When::Personality => PERSONALITIES
            .iter()
            .map(|&value| rule(SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value))
            .collect(),
    }
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    // Two pods may do this at once: each has its own name until the rename.
    let temporary = path.with_extension(format!("{:x}.tmp", rand::random::<u64>()));
    fs::write(&temporary, bytes)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests;
