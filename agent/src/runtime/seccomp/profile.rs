//! Localhost profiles: the JSON that containerd and CRI-O read, as stacked BPF programs.
//!
//! ```text
//! default D, rules with actions A, B ─► 1. (x32 calls are ENOSYS)       only where D lets calls pass
//!                                       2. no rule matches: D, else pass
//!                                       3. rules of A: A, else pass       one program per action
//! ```
//! The kernel asks all of them and takes the strictest answer, which is the profile's meaning where
//! each call has one rule; where two rules with different actions match the same call, the
//! stricter one holds. What cannot be honoured is refused in words: a listener (`SCMP_ACT_NOTIFY`),
//! flags, Docker's `includes` and `excludes`, a profile without this machine's architecture.
//! 32-bit calls are killed whatever the profile says of them.
//!
//! Source: OCI runtime-spec, config-linux.md, and runc's reading of it (repeated indexes are "or").

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Component, Path};
use std::str::FromStr as _;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, sock_filter,
};
use serde::Deserialize;

use super::{SeccompError, append};
use crate::runtime::spec::mounts::read_in_root;

/// Longest profile that is read, bytes; containerd's own default has 12 KiB.
const PROFILE_BYTES_MAX: u64 = 1 << 20;
/// gantry-rt loads at most eight; one is the guard, one the default.
const ACTION_COUNT_MAX: usize = 6;
/// Calls with this bit use x86-64's other system call table.
const X32_BIT: u32 = 0x4000_0000;
/// Names of this machine's architecture.
const NATIVE: &str = if cfg!(target_arch = "aarch64") {
    "SCMP_ARCH_AARCH64"
} else {
    "SCMP_ARCH_X86_64"
};

/// Reads `<directory>/<name>`, never through a link that leaves the directory.
pub(super) fn read(directory: &Path, name: &str) -> Result<String, String> {
    let relative = !name.is_empty()
        && Path::new(name)
            .components()
            .all(|c| matches!(c, Component::Normal(_)));
    if !relative {
        return Err("want a relative path without \"..\"".to_owned());
    }
    let place = directory.join(name);
    let missing = || {
        format!(
            "there is no {} on this node: put the profile there",
            place.display()
        )
    };
    match read_in_root(directory, name, PROFILE_BYTES_MAX + 1) {
        Ok(Some(text)) if text.len() as u64 > PROFILE_BYTES_MAX => Err(format!(
            "{} has more than {PROFILE_BYTES_MAX} bytes",
            place.display()
        )),
        Ok(Some(text)) => Ok(text),
        Ok(None) => Err(missing()),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(missing()),
        Err(error) => Err(format!("cannot read {}: {error}", place.display())),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Profile {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    arch_map: Vec<ArchitectureMap>,
    #[serde(default)]
    flags: Vec<String>,
    listener_path: Option<String>,
    listener_metadata: Option<String>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchitectureMap {
    architecture: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    #[serde(default)]
    names: Vec<String>,
    name: Option<String>,
    action: String,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<Argument>>,
    /// For people.
    #[serde(default, rename = "comment")]
    _comment: Option<String>,
    includes: Option<serde_json::Map<String, serde_json::Value>>,
    excludes: Option<serde_json::Map<String, serde_json::Value>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Argument {
    index: u8,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

/// All conditions that must hold together; none: always.
type Conjunction = Vec<SeccompCondition>;

/// Which calls a program matches.
#[derive(Default)]
struct Matches(BTreeMap<i64, Vec<Conjunction>>);

impl Matches {
    fn add(&mut self, call: i64, conditions: &Conjunction) {
        let known = self.0.entry(call).or_default();
        // An unconditional match makes all others of the call needless.
        if known.iter().any(Vec::is_empty) {
            return;
        }
        if conditions.is_empty() {
            known.clear();
        }
        known.push(conditions.clone());
    }

    fn program(
        self,
        otherwise: SeccompAction,
        matched: SeccompAction,
    ) -> Result<BpfProgram, seccompiler::BackendError> {
        let mut rules = BTreeMap::new();
        for (call, conjunctions) in self.0 {
            let conditional = conjunctions.into_iter().filter(|c| !c.is_empty());
            let of_call = conditional
                .map(SeccompRule::new)
                .collect::<Result<Vec<_>, _>>()?;
            rules.insert(call, of_call);
        }
        SeccompFilter::new(
            rules,
            otherwise,
            matched,
            std::env::consts::ARCH.try_into()?,
        )?
        .try_into()
    }
}

/// The filter file's content for a profile.
pub(super) fn compile(text: &str) -> Result<Vec<u8>, String> {
    let profile: Profile = serde_json::from_str(text).map_err(|e| {
        // Docker's own format is the usual guess.
        format!("is no seccomp profile in the OCI format: {e}")
    })?;
    check(&profile)?;
    let default = action(&profile.default_action, profile.default_errno_ret)?;
    let passes = passes(&default);
    let mut any = Matches::default();
    let mut by_action: Vec<(SeccompAction, Matches)> = Vec::new();
    for rule in &profile.syscalls {
        let wanted = action(&rule.action, rule.errno_ret.or(profile.default_errno_ret))?;
        let conjunctions = conjunctions(rule.args.as_deref().unwrap_or_default())?;
        let calls = calls(rule, passes && wanted != SeccompAction::Allow)?;
        let at = match by_action.iter().position(|(a, _)| *a == wanted) {
            Some(at) => at,
            None => {
                by_action.push((wanted, Matches::default()));
                by_action.len() - 1
            }
        };
        for call in calls {
            for conditions in &conjunctions {
                any.add(call, conditions);
                by_action[at].1.add(call, conditions);
            }
        }
    }
    by_action.retain(|(a, matches)| *a != SeccompAction::Allow && !matches.0.is_empty());
    if by_action.len() > ACTION_COUNT_MAX {
        return Err(format!("more than {ACTION_COUNT_MAX} different actions"));
    }
    assemble(default, passes, any, by_action).map_err(|error| match error {
        SeccompError::Compile(reason) => format!("does not compile: {reason}"),
        other => other.to_string(),
    })
}

fn assemble(
    default: SeccompAction,
    passes: bool,
    any: Matches,
    by_action: Vec<(SeccompAction, Matches)>,
) -> Result<Vec<u8>, SeccompError> {
    let bad = |error: seccompiler::BackendError| SeccompError::Compile(error.to_string());
    let mut bytes = Vec::new();
    if passes && cfg!(target_arch = "x86_64") {
        append(&mut bytes, &x32_guard());
    }
    if default != SeccompAction::Allow {
        append(
            &mut bytes,
            &any.program(default, SeccompAction::Allow).map_err(bad)?,
        );
    }
    for (wanted, matches) in by_action {
        append(
            &mut bytes,
            &matches.program(SeccompAction::Allow, wanted).map_err(bad)?,
        );
    }
    Ok(bytes)
}

/// Otherwise a list of forbidden calls would be open to the same calls by their other numbers.
fn x32_guard() -> BpfProgram {
    let instruction = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    vec![
        instruction(0x20, 0, 0, 0),       // load the call's number
        instruction(0x35, 0, 1, X32_BIT), // at least X32_BIT?
        instruction(0x06, 0, 0, 0x0005_0000 | libc::ENOSYS as u32),
        instruction(0x06, 0, 0, 0x7fff_0000), // pass
    ]
}

fn passes(action: &SeccompAction) -> bool {
    matches!(
        action,
        SeccompAction::Allow | SeccompAction::Log | SeccompAction::Trace(_)
    )
}

fn check(profile: &Profile) -> Result<(), String> {
    let mapped = profile.arch_map.iter().map(|m| &m.architecture);
    let all: Vec<&String> = profile.architectures.iter().chain(mapped).collect();
    if !all.is_empty() && !all.iter().any(|a| *a == NATIVE) {
        return Err(format!(
            "is for {all:?}, and this node is {NATIVE}: 32-bit and foreign system calls are not run"
        ));
    }
    if let Some(flag) = profile.flags.first() {
        return Err(format!(
            "flag {flag}: flags are not supported, leave them out"
        ));
    }
    if profile.listener_path.is_some() || profile.listener_metadata.is_some() {
        return Err("listenerPath: there is no listener for system calls on this node".to_owned());
    }
    let conditional = |r: &&Rule| {
        let some = |m: &Option<serde_json::Map<_, _>>| m.as_ref().is_some_and(|m| !m.is_empty());
        some(&r.includes) || some(&r.excludes)
    };
    if profile.syscalls.iter().any(|r| conditional(&r)) {
        return Err(
            "includes and excludes are Docker's own and would change with the container: write \
             out the rules that apply"
                .to_owned(),
        );
    }
    Ok(())
}

fn action(name: &str, errno: Option<u32>) -> Result<SeccompAction, String> {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    let value = u16::try_from(errno).map_err(|_| format!("errnoRet {errno}: want 0 to 65535"))?;
    Ok(match name {
        "SCMP_ACT_ALLOW" => SeccompAction::Allow,
        "SCMP_ACT_ERRNO" => SeccompAction::Errno(value.into()),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => SeccompAction::KillThread,
        "SCMP_ACT_KILL_PROCESS" => SeccompAction::KillProcess,
        "SCMP_ACT_LOG" => SeccompAction::Log,
        "SCMP_ACT_TRACE" => SeccompAction::Trace(value.into()),
        "SCMP_ACT_TRAP" => SeccompAction::Trap,
        "SCMP_ACT_NOTIFY" => {
            return Err("action SCMP_ACT_NOTIFY: there is no listener on this node".to_owned());
        }
        other => return Err(format!("unknown action {other:?}")),
    })
}

/// Each must hold in full for a match; several of them are "or".
fn conjunctions(arguments: &[Argument]) -> Result<Vec<Conjunction>, String> {
    let mut indexes: Vec<u8> = arguments.iter().map(|a| a.index).collect();
    indexes.sort_unstable();
    let repeated = indexes.windows(2).any(|w| w[0] == w[1]);
    let conditions = arguments
        .iter()
        .map(condition)
        .collect::<Result<Conjunction, _>>()?;
    Ok(match repeated {
        // As runc does: the same argument twice means one or the other.
        true => conditions.into_iter().map(|c| vec![c]).collect(),
        false => vec![conditions],
    })
}

fn condition(argument: &Argument) -> Result<SeccompCondition, String> {
    let (operator, value) = match argument.op.as_str() {
        "SCMP_CMP_NE" => (SeccompCmpOp::Ne, argument.value),
        "SCMP_CMP_LT" => (SeccompCmpOp::Lt, argument.value),
        "SCMP_CMP_LE" => (SeccompCmpOp::Le, argument.value),
        "SCMP_CMP_EQ" => (SeccompCmpOp::Eq, argument.value),
        "SCMP_CMP_GE" => (SeccompCmpOp::Ge, argument.value),
        "SCMP_CMP_GT" => (SeccompCmpOp::Gt, argument.value),
        "SCMP_CMP_MASKED_EQ" => (SeccompCmpOp::MaskedEq(argument.value), argument.value_two),
        other => return Err(format!("unknown comparison {other:?}")),
    };
    SeccompCondition::new(argument.index, SeccompCmpArgLen::Qword, operator, value)
        .map_err(|e| format!("argument {}: {e}", argument.index))
}

/// Numbers of a rule's calls. Names of 32-bit machines are left out: such calls are never let in.
/// A name that nobody knows is left out too, unless leaving it out would let the call pass.
fn calls(rule: &Rule, must_know: bool) -> Result<Vec<i64>, String> {
    let mut calls = Vec::new();
    for name in rule.names.iter().chain(&rule.name) {
        match syscalls::Sysno::from_str(name) {
            Ok(call) => calls.push(i64::from(call.id())),
            Err(_) => {
                let foreign = syscalls::x86::Sysno::from_str(name).is_ok()
                    || syscalls::arm::Sysno::from_str(name).is_ok();
                if must_know && !foreign {
                    return Err(format!(
                        "system call {name:?} is to be stopped and this agent does not know it"
                    ));
                }
            }
        }
    }
    Ok(calls)
}
