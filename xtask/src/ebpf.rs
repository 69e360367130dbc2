//! Builds the eBPF object. One file with two users: `xtask` and, by `#[path]`, `agent/build.rs`.
//!
//! ```text
//!  $GANTRY_BPF_OBJECT set ──────────────────────────────────────────────────► that file
//!  sources unchanged since the stamp ───────────────────────────────────────► target/bpf/gantry.o
//!  rustup's nightly with rust-src ─────────┐
//!  /usr/bin/rustc with its sources ────────┴─► cargo build -Z build-std=core ─► bpf-linker ─► it
//!  neither ─► an error with the commands that install either
//! ```
//! The programs need `core` compiled for the BPF machine, so a compiler that takes `-Z` and the
//! sources of exactly its own release. Debian's stable compiler takes `-Z` with RUSTC_BOOTSTRAP=1;
//! that is set on the child only, since in this process' environment it would switch every
//! procedural macro of the workspace to nightly features.
//!
//! Only `std` is used here: a build script compiles this file too.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names a ready object; nothing is built then.
pub(crate) const OBJECT_VARIABLE: &str = "GANTRY_BPF_OBJECT";
/// Part of the stamp: a change of the flags below must rebuild.
const RECIPE_VERSION: u32 = 1;
/// rustup's toolchains in order of preference. The dated one has LLVM 22, which every supported
/// bpf-linker reads; a newer nightly may be too new for the linker.
pub const NIGHTLIES: [&str; 2] = ["nightly-2026-05-20", "nightly"];
/// Lines of the compiler's output that an error shows.
const OUTPUT_LINES: usize = 40;
/// What the stamp covers, below the workspace's root.
pub(crate) const SOURCES: [&str; 2] = ["ebpf/maps", "ebpf/programs"];

/// Which of the two objects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Variant {
    /// What is shipped: no logs.
    Release,
    /// With aya-log, for debug builds of the agent.
    Logging,
}

impl Variant {
    fn file_name(self) -> &'static str {
        match self {
            Self::Release => "gantry.o",
            Self::Logging => "gantry-logging.o",
        }
    }
}

/// A compiler that can build `core` for the BPF machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Toolchain {
    /// `rustup run NAME`, with the rust-src component.
    Nightly {
        /// One of [`NIGHTLIES`].
        name: &'static str,
    },
    /// `/usr/bin/rustc` and the sources of its release, as Debian packages them.
    System {
        /// `/usr/bin/cargo`, or the one on PATH: its version does not matter.
        cargo: PathBuf,
    },
}

/// What a machine offers: possible compilers in order of preference, and the linker.
#[derive(Clone, Debug)]
pub(crate) struct Toolchains {
    /// Never empty.
    pub(crate) compilers: Vec<Toolchain>,
    /// `bpf-linker`.
    pub(crate) linker: PathBuf,
}

/// Why there is no object. The text says what to do.
#[derive(Debug)]
pub(crate) enum Error {
    /// The machine lacks a tool.
    Missing(String),
    /// Every compiler that is there failed.
    Build(String),
    /// A file could not be read or written.
    Io(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(text) | Self::Build(text) | Self::Io(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Error {}

/// Returns the object's path, building it if its sources have changed since the last time.
///
/// * `root` – the workspace's root.
///
/// Two callers at once wait for each other. An unchanged object costs a hash over the sources.
pub(crate) fn build(root: &Path, variant: Variant) -> Result<PathBuf, Error> {
    if let Some(path) = std::env::var_os(OBJECT_VARIABLE) {
        return ready_object(PathBuf::from(path));
    }
    let directory = target_directory(root).join("bpf");
    fs::create_dir_all(&directory).map_err(io("create", &directory))?;
    let lock_path = directory.join("lock");
    let lock = File::create(&lock_path).map_err(io("create", &lock_path))?;
    lock.lock().map_err(io("lock", &lock_path))?;

    let object = directory.join(variant.file_name());
    let stamp_path = object.with_extension("stamp");
    let stamp = stamp(root, variant)?;
    if object.exists() && fs::read_to_string(&stamp_path).is_ok_and(|old| old == stamp) {
        return Ok(object);
    }
    let built = compile(root, &directory, variant)?;
    // Object before stamp: a crash in between rebuilds, never trusts an old object.
    let _ = fs::remove_file(&stamp_path);
    fs::copy(&built, &object).map_err(io("copy", &built))?;
    fs::write(&stamp_path, stamp).map_err(io("write", &stamp_path))?;
    Ok(object)
}

/// Looks for the tools of a build.
///
/// # Errors
/// [`Error::Missing`] with the exact commands that install what is not there.
pub(crate) fn detect() -> Result<Toolchains, Error> {
    let mut compilers = Vec::new();
    let mut absent = Vec::new();
    for name in NIGHTLIES {
        match nightly(name) {
            Ok(toolchain) => compilers.push(toolchain),
            Err(reason) => absent.push(reason),
        }
    }
    match system() {
        Ok(toolchain) => compilers.push(toolchain),
        Err(reason) => absent.push(reason),
    }
    let mut text = String::new();
    if compilers.is_empty() {
        text += &format!(
            "the eBPF programs need a compiler with the sources of its own core library:\n  \
             - {}\nplease run one of\n  \
             rustup toolchain install nightly-2026-05-20 --profile minimal --component rust-src\n  \
             apt-get install rustc-web cargo-web rust-web-src      # Debian, Ubuntu; as root\n",
            absent.join("\n  - ")
        );
    }
    let linker = find_on_path("bpf-linker");
    if linker.is_none() {
        text += "the eBPF programs need bpf-linker, which is neither on PATH nor in ~/.cargo/bin; \
                 please run\n  \
                 apt-get install llvm-22-dev libzstd-dev zlib1g-dev libpolly-22-dev   # as root\n  \
                 LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --version 0.13.0 --locked \
                 --no-default-features --features llvm-22\n";
    }
    match linker {
        Some(linker) if text.is_empty() => Ok(Toolchains { compilers, linker }),
        _ => Err(Error::Missing(format!(
            "{text}or set {OBJECT_VARIABLE} to an object built elsewhere"
        ))),
    }
}

/// Is there a compiler, whether or not there is a linker?
pub fn has_compiler() -> bool {
    NIGHTLIES.iter().any(|name| nightly(name).is_ok()) || system().is_ok()
}

/// Every file that the object is made from, for `rerun-if-changed` and for the stamp.
pub(crate) fn source_files(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    let mut pending: Vec<PathBuf> = SOURCES.iter().map(|source| root.join(source)).collect();
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).map_err(io("read", &directory))? {
            let path = entry.map_err(io("read", &directory))?.path();
            if !path.is_dir() {
                files.push(path);
            } else if path.file_name().is_some_and(|name| name != "target") {
                pending.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Builds with the first compiler that can. A nightly may be too new for the linker's LLVM; then
/// the next one gets its turn, and only if all fail are their errors shown.
fn compile(root: &Path, directory: &Path, variant: Variant) -> Result<PathBuf, Error> {
    let tools = detect()?;
    let mut failures = Vec::new();
    for compiler in &tools.compilers {
        let target = directory.join("build");
        let output = command(compiler, &tools.linker, root, &target, variant)
            .output()
            .map_err(|error| Error::Build(format!("cannot start {compiler:?}: {error}")))?;
        if output.status.success() {
            return Ok(target.join("bpfel-unknown-none/release/gantry"));
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(OUTPUT_LINES)..];
        failures.push(format!(
            "with {compiler:?}, {}:\n{}",
            output.status,
            tail.join("\n")
        ));
    }
    Err(Error::Build(format!(
        "the eBPF programs did not build {}",
        failures.join("\nand ")
    )))
}

/// The one cargo call.
fn command(
    compiler: &Toolchain,
    linker: &Path,
    root: &Path,
    target: &Path,
    variant: Variant,
) -> Command {
    let mut command = match compiler {
        Toolchain::Nightly { name } => {
            let mut command = Command::new("rustup");
            command.args(["run", name, "cargo"]);
            command
        }
        Toolchain::System { cargo } => Command::new(cargo),
    };
    clean_environment(&mut command);
    if matches!(compiler, Toolchain::System { .. }) {
        command
            .env("RUSTC", "/usr/bin/rustc")
            .env("RUSTC_BOOTSTRAP", "1");
    }
    // One directory per compiler and variant is not needed: cargo keys its cache by both.
    command
        .current_dir(root.join("ebpf/programs"))
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(root, linker))
        .args(["build", "--release", "--locked", "-Z", "build-std=core"])
        .args(["--target", "bpfel-unknown-none"])
        .arg("--target-dir")
        .arg(target);
    if variant == Variant::Logging {
        command.args(["--features", "log"]);
    }
    command
}

/// BTF for line numbers in the verifier's log; paths are remapped so that two checkouts build the
/// same bytes.
fn rustflags(root: &Path, linker: &Path) -> OsString {
    let mut flags = OsString::from(format!(
        "--cfg=bpf_target_arch=\"{}\"\x1f-Cdebuginfo=2\x1f-Clink-arg=--btf\x1f-Clinker=",
        std::env::consts::ARCH
    ));
    flags.push(linker);
    flags.push("\x1f--remap-path-prefix=");
    flags.push(root);
    flags.push("=gantry");
    flags
}

/// The child must not see the outer cargo's choices: its target, flags, toolchain or jobs.
fn clean_environment(command: &mut Command) {
    const KEPT: [&str; 4] = [
        "CARGO_HOME",
        "CARGO_NET_OFFLINE",
        "CARGO_HTTP_PROXY",
        "CARGO_HTTP_CAINFO",
    ];
    const DROPPED: [&str; 12] = [
        "RUSTUP_TOOLCHAIN",
        "RUSTUP_FORCE_ARG0",
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "TARGET",
        "HOST",
        "OUT_DIR",
        "PROFILE",
        "OPT_LEVEL",
        "NUM_JOBS",
        "MAKEFLAGS",
        "LD_LIBRARY_PATH",
    ];
    for (name, _) in std::env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let cargo = text.starts_with("CARGO") && !KEPT.contains(&text);
        let rustc = text.starts_with("RUSTC") || text.starts_with("DEP_");
        if cargo || rustc || DROPPED.contains(&text) {
            command.env_remove(&name);
        }
    }
}

fn nightly(name: &'static str) -> Result<Toolchain, String> {
    let mut command = Command::new("rustup");
    command.args(["run", name, "rustc", "--print", "sysroot"]);
    clean_environment(&mut command);
    let output = command
        .output()
        .map_err(|error| format!("rustup's {name}: rustup does not start: {error}"))?;
    if !output.status.success() {
        return Err(format!("rustup's {name}: not installed"));
    }
    let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    let sources = sysroot.join("lib/rustlib/src/rust/library/core");
    if sources.is_dir() {
        Ok(Toolchain::Nightly { name })
    } else {
        Err(format!(
            "rustup's {name}: no rust-src component ({} is absent)",
            sources.display()
        ))
    }
}

fn system() -> Result<Toolchain, String> {
    if !Path::new("/usr/bin/rustc").exists() {
        return Err("the system's compiler: no /usr/bin/rustc".into());
    }
    // Debian's rust-web-src and rust-src both link this path to their own release's sources.
    let sources = Path::new("/usr/lib/rustlib/src/rust/library/core");
    if !sources.is_dir() {
        return Err(format!(
            "the system's compiler: no sources ({} is absent)",
            sources.display()
        ));
    }
    let own = PathBuf::from("/usr/bin/cargo");
    match if own.exists() {
        Some(own)
    } else {
        find_on_path("cargo")
    } {
        Some(cargo) => Ok(Toolchain::System { cargo }),
        None => Err("the system's compiler: no cargo".into()),
    }
}

/// Looks in PATH, then in cargo's own directory: root's PATH under sudo often lacks it.
fn find_on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let cargo_home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    std::env::split_paths(&path)
        .chain(cargo_home.map(|home| home.join("bin")))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

fn ready_object(path: PathBuf) -> Result<PathBuf, Error> {
    let bytes = fs::read(&path).map_err(io(OBJECT_VARIABLE, &path))?;
    if bytes.starts_with(b"\x7fELF") {
        Ok(path)
    } else {
        Err(Error::Io(format!(
            "{OBJECT_VARIABLE}: {} is no ELF object",
            path.display()
        )))
    }
}

fn target_directory(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}

/// FNV-1a over names and contents: the question is "the same?", not "by whom?".
fn stamp(root: &Path, variant: Variant) -> Result<String, Error> {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    };
    add(format!("{RECIPE_VERSION} {variant:?}\n").as_bytes());
    for path in source_files(root)? {
        let contents = fs::read(&path).map_err(io("read", &path))?;
        let name = path.strip_prefix(root).unwrap_or(&path);
        add(format!("{} {}\n", name.display(), contents.len()).as_bytes());
        add(&contents);
    }
    Ok(format!("{hash:016x}\n"))
}

fn io<'a>(what: &'a str, path: &'a Path) -> impl FnOnce(std::io::Error) -> Error + 'a {
    move |error| Error::Io(format!("{what} {}: {error}", path.display()))
}
