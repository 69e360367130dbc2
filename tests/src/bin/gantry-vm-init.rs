//! Init of the virtual machine that `cargo xtask vm-test` boots.
//!
//! ```text
//! initramfs ─► switch: everything moves to a tmpfs (containers cannot pivot out of an initramfs)
//!           ─► init: mounts, modules, its place among several; then reaps whatever is orphaned
//!                ├─► run: the scenarios, one verdict line each ─► end ─► reset
//!                ├─► hand: of one of several machines, for the scenarios on node-1
//!                └─► systemd, where the initramfs has one; its unit runs `units`
//! ```

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use gantry_tests::cluster::Installation;
use gantry_tests::machines::place::Place;
use gantry_tests::machines::{self, hand, wire};
use gantry_tests::{census, scenario, units};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, wait};

fn main() -> ExitCode {
    let stage = std::env::args().nth(1);
    let done = match stage.as_deref() {
        Some("init") => init(),
        Some("run") => run(),
        Some("units") => under_systemd(),
        Some("hand") => installation().and_then(|i| hand::serve(&i)),
        Some("list") => {
            list();
            Ok(())
        }
        Some("wire" | "wire-serve" | "wire-first") => measure(),
        Some("census") => {
            count();
            Ok(())
        }
        _ if std::process::id() == 1 => switch(),
        _ => {
            eprintln!("this is the init of a virtual machine: see `cargo xtask vm-test`");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = &done {
        println!("vm: FAILED init: {error:#}");
    }
    // Below systemd nobody else ends the machine.
    if std::process::id() == 1 || stage.as_deref() == Some("units") {
        let _ = reboot(RebootMode::RB_AUTOBOOT);
    }
    if done.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// `wire-serve PORT`, `wire-first ADDRESS`, `wire rate|rtt|throughput ADDRESS MILLISECONDS`.
fn measure() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["wire-serve", port] => wire::serve(port.parse()?),
        ["wire-first", to] => wire::first_answer(to.parse()?),
        ["wire", kind, to, ms] => {
            let during = std::time::Duration::from_millis(ms.parse()?);
            println!("{}", wire::measure(kind, to.parse()?, during)?);
            Ok(())
        }
        _ => anyhow::bail!("{words:?}: nobody measures so"),
    }
}

fn fs_mount(kind: &str, target: &str, options: Option<&str>) -> Result<()> {
    fs::create_dir_all(target)?;
    mount(Some(kind), target, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("mount {kind} on {target}"))
}

/// Moves the initramfs' files to a tmpfs and makes that the root.
fn switch() -> Result<()> {
    fs_mount("tmpfs", "/new", Some("mode=755"))?;
    for entry in fs::read_dir("/")? {
        let entry = entry?;
        if entry.file_name() != "new" {
            move_tree(
                &entry.path(),
                &PathBuf::from("/new").join(entry.file_name()),
            )?;
        }
    }
    std::env::set_current_dir("/new")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move mount")?;
    nix::unistd::chroot(".").context("chroot")?;
    std::env::set_current_dir("/")?;
    Err(Command::new("/init").arg("init").exec()).context("exec /init")
}

/// Copies and unlinks as it goes, so that memory holds one copy.
fn move_tree(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(from)?;
    if metadata.is_dir() {
        fs::create_dir_all(to)?;
        fs::set_permissions(
            to,
            fs::Permissions::from_mode(metadata.permissions().mode()),
        )?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            move_tree(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    if metadata.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
    } else if metadata.is_file() {
        fs::copy(from, to)?;
    }
    fs::remove_file(from)
}

/// Debian's, before and after its directories were merged.
const SYSTEMD: [&str; 2] = ["/lib/systemd/systemd", "/usr/lib/systemd/systemd"];
/// What a machine with nobody before it does not need, and what would ask questions or fail for ever.
const MASKED: [&str; 4] = [
    "getty.target",
    "serial-getty@ttyS0.service",
    "systemd-firstboot.service",
    "systemd-logind.service",
];
const UNIT: &str = "[Unit]
Description=What this virtual machine is for

[Service]
Type=oneshot
ExecStart=/init units
Environment=PATH=/usr/lib/gantry:/bin:/usr/bin:/sbin HOME=/root
Environment=GANTRY_BIN=/usr/lib/gantry GANTRY_IMAGES=/images
StandardOutput=file:/dev/console
StandardError=file:/dev/console
";

/// systemd becomes this process, and makes the machine.
fn hand_over(systemd: &str) -> Result<()> {
    load_modules()?;
    let units = Path::new("/etc/systemd/system");
    fs::create_dir_all(units.join("multi-user.target.wants"))?;
    let unit = units.join("gantry-vm.service");
    fs::write(&unit, UNIT)?;
    symlink(
        &unit,
        units.join("multi-user.target.wants/gantry-vm.service"),
    )?;
    symlink(
        "/lib/systemd/system/multi-user.target",
        units.join("default.target"),
    )?;
    for name in MASKED {
        symlink("/dev/null", units.join(name))?;
    }
    // Without one it asks for the machine's name, language and passwords first.
    fs::write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")?;
    Err(Command::new(systemd).exec()).context(systemd.to_owned())
}

/// The scenario of units, and the end of the machine.
fn under_systemd() -> Result<()> {
    let began = Instant::now();
    let done = installation().and_then(|installation| units::units(&installation));
    verdict(units::NAME, began, done);
    println!("vm: end");
    Ok(())
}

/// Makes the machine, starts the runner, and reaps until it has ended.
fn init() -> Result<()> {
    if let Some(systemd) = SYSTEMD.into_iter().find(|path| Path::new(path).exists()) {
        return hand_over(systemd);
    }
    fs_mount("proc", "/proc", None)?;
    fs_mount("sysfs", "/sys", None)?;
    fs_mount("devtmpfs", "/dev", None)?;
    fs_mount("devpts", "/dev/pts", Some("ptmxmode=0666"))?;
    fs_mount("tmpfs", "/dev/shm", None)?;
    fs_mount("tmpfs", "/run", Some("mode=755"))?;
    fs_mount("tmpfs", "/tmp", Some("mode=1777"))?;
    fs_mount("cgroup2", "/sys/fs/cgroup", None)?;
    fs_mount("bpf", "/sys/fs/bpf", None)?;
    // Mounts made later in a container must not travel back.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )?;
    nix::unistd::sethostname("vm-1")?;
    load_modules()?;
    let place = Place::parse(&fs::read_to_string("/proc/cmdline")?);
    let status = Command::new("/bin/busybox")
        .args(["ifconfig", "lo", "up"])
        .status()?;
    println!("vm: lo is up: {status}");
    if let Some(place) = &place {
        place.set_up().context("this machine's place")?;
    }
    // What follows is this machine's whole life: the scenarios, or doing what they say.
    let stage = match &place {
        Some(place) if place.number > 1 => "hand",
        _ => "run",
    };
    let child = Command::new("/init")
        .arg(stage)
        .env("PATH", "/usr/lib/gantry:/bin:/usr/bin:/sbin")
        .env("HOME", "/root")
        .env("GANTRY_BIN", "/usr/lib/gantry")
        .env("GANTRY_IMAGES", "/images")
        .spawn()
        .context("start the runner")?;
    let runner = i32::try_from(child.id())?;
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _))
                if pid.as_raw() == runner =>
            {
                break;
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait"),
        }
    }
    println!("vm: end");
    Ok(())
}

/// The files are numbered: dependencies first.
fn load_modules() -> Result<()> {
    let Ok(entries) = fs::read_dir("/modules") else {
        return Ok(());
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    files.sort();
    for file in files {
        let opened = fs::File::open(&file)?;
        let flags = nix::kmod::ModuleInitFlags::empty();
        match nix::kmod::finit_module(&opened, c"", flags) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(error) => println!("vm: module {}: {error}", file.display()),
        }
    }
    Ok(())
}

/// `gantry.shard=0/2`: this machine runs the first, the third... of the scenarios that are wanted.
fn shard(command_line: &str) -> (usize, usize) {
    let word = command_line
        .split_whitespace()
        .find_map(|w| w.strip_prefix("gantry.shard=")?.split_once('/'));
    let number = |text: &str| text.parse::<usize>().ok();
    word.and_then(|(index, count)| Some((number(index)?, number(count)?)))
        .filter(|(index, count)| index < count)
        .unwrap_or((0, 1))
}

fn installation() -> Result<Installation> {
    Installation::find().map_err(anyhow::Error::msg)
}

/// The agent's own tests of its programs: each loads, and does to packets and sockets what is claimed.
const PROGRAMS: &str = "ebpf-programs";
const TESTS: &str = "/usr/lib/gantry-tests";
/// They take minutes: whoever waits is told after so many.
const TOLD_EVERY: usize = 20;

/// Runs them, each told as it passes; what fails is on the console above the verdict.
fn programs(named: Option<&str>) -> Result<String> {
    let mut tests = Command::new(TESTS);
    let named = named.into_iter().flat_map(|words| words.split(','));
    // What needs a wire's speed cannot be judged on an emulated machine.
    tests.args(["--skip", "bandwidth", "--test-threads", "2"]);
    // Those of the whole module if no word is given.
    let words: Vec<String> = named
        .map(|word| format!("dataplane::tests::{word}"))
        .collect();
    if words.is_empty() {
        tests.arg("dataplane::");
    }
    tests.args(words);
    tests.arg("--show-output").stdout(Stdio::piped());
    let began = Instant::now();
    let mut child = tests.spawn().context(TESTS)?;
    let output = child.stdout.take().context("no output")?;
    let (mut result, mut passed) = (None, 0);
    for line in BufReader::new(output).lines() {
        let line = line.context(TESTS)?;
        if line.ends_with("... ok") {
            passed += 1;
            println!("{line} after {} s", began.elapsed().as_secs());
            if passed % TOLD_EVERY == 0 {
                println!(
                    "vm: so far {passed} tests in {} s",
                    began.elapsed().as_secs()
                );
            }
        } else if let Some(reason) = line.strip_prefix("skipped: ") {
            println!("vm: skipped {PROGRAMS}: {reason}");
        } else {
            println!("{line}");
        }
        result = result.or(line.starts_with("test result: ").then_some(line));
    }
    let status = child.wait().context(TESTS)?;
    let result = result.context("no result")?;
    anyhow::ensure!(status.success(), "{result}");
    anyhow::ensure!(passed > 0, "no test ran: {result}");
    Ok(format!("{passed} tests"))
}

/// All scenarios: on how many machines, and the name.
fn list() {
    println!("one {PROGRAMS}\none {}", units::NAME);
    for scenario in scenario::ALL {
        println!("one {}", scenario.name);
    }
    for scenario in scenario::nodes::ALL {
        println!("several {}", scenario.name);
    }
}

/// What of ours is on this machine, one line a thing.
fn count() {
    for (kind, found) in census::take() {
        for thing in found {
            println!("{kind} {thing}");
        }
    }
}

fn run() -> Result<()> {
    let installation = installation()?;
    let command_line = fs::read_to_string("/proc/cmdline")?;
    let wanted = command_line
        .split_whitespace()
        .find_map(|w| w.strip_prefix("gantry.scenario="))
        .unwrap_or("all");
    if let Some(place) = Place::parse(&command_line) {
        return machines::run(&installation, &place, wanted);
    }
    if wanted == PROGRAMS {
        let began = Instant::now();
        let named = command_line
            .split_whitespace()
            .find_map(|word| word.strip_prefix("gantry.tests="));
        match programs(named) {
            Ok(words) => {
                let took = began.elapsed().as_secs_f64();
                println!("vm: ok {PROGRAMS} {took:.1} s, {words}");
            }
            Err(error) => println!("vm: FAILED {PROGRAMS}: {error:#}"),
        }
        return Ok(());
    }
    let is_wanted = |scenario: &&scenario::Scenario| match wanted {
        "all" => true,
        "every-kernel" => scenario.is_for_every_kernel,
        names => names.split(',').any(|name| scenario.name == name),
    };
    if !scenario::ALL.iter().any(|scenario| is_wanted(&scenario)) {
        let names: Vec<&str> = scenario::ALL.iter().map(|s| s.name).collect();
        println!(
            "vm: FAILED {wanted}: no such scenario: {}",
            names.join(", ")
        );
    }
    let shard = shard(&command_line);
    let own = scenario::ALL.iter().filter(is_wanted).enumerate();
    let own = own.filter(|(index, _)| index % shard.1 == shard.0);
    // Of an earlier boot, which did not come to its end.
    let told = command_line
        .split_whitespace()
        .find_map(|w| w.strip_prefix("gantry.told="))
        .unwrap_or_default();
    let left = own.filter(|(_, scenario)| told.split(',').all(|name| name != scenario.name));
    for (_, scenario) in left {
        let began = Instant::now();
        verdict(scenario.name, began, scenario.run(&installation));
    }
    Ok(())
}

fn verdict(name: &str, began: Instant, done: Result<()>) {
    match done {
        Ok(()) => println!("vm: ok {name} {:.1} s", began.elapsed().as_secs_f64()),
        Err(error) if error.is::<scenario::Skipped>() => println!("vm: skipped {name}: {error}"),
        Err(error) => {
            println!("vm: FAILED {name}: {}", scenario::in_a_line(&error));
        }
    }
}
