//! One run at a time: disks, initramfs and consoles have one place each, below `target/vm`.
//!
//! The file is locked by who runs and holds the process id, so that another command can end the run. The
//! kernel drops the lock with the process, however that ends.

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::directory;

/// Machines that are told to end are killed, not shut down.
const END_LIMIT: Duration = Duration::from_secs(10);

/// The right to run; given back when dropped.
pub struct Alone(#[expect(dead_code, reason = "held, not used")] File);

fn path() -> PathBuf {
    directory().join("lock")
}

fn open() -> Result<File> {
    std::fs::create_dir_all(directory())?;
    let path = path();
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options
        .open(&path)
        .with_context(|| path.display().to_string())
}

/// Takes the right to run, or says who has it.
pub fn take() -> Result<Alone> {
    let mut file = open()?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => bail!(
            "virtual machines of this directory run already (process {}). End them with:\n  \
             cargo xtask vm-test --stop",
            holder(&mut file).map_or_else(|_| "unknown".into(), |pid| pid.to_string())
        ),
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("lock {}", path().display()));
        }
    }
    file.set_len(0)?;
    write!(file, "{}", std::process::id())?;
    Ok(Alone(file))
}

fn holder(file: &mut File) -> Result<i32> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text.trim().parse()?)
}

/// Ends the run that is on, if one is, and waits for its end.
pub fn stop() -> Result<()> {
    let mut file = open()?;
    if file.try_lock().is_ok() {
        println!("no virtual machines run");
        return Ok(());
    }
    let pid = holder(&mut file).with_context(|| path().display().to_string())?;
    kill(Pid::from_raw(pid), Signal::SIGTERM).with_context(|| format!("end process {pid}"))?;
    let began = Instant::now();
    while file.try_lock().is_err() {
        if began.elapsed() > END_LIMIT {
            bail!(
                "process {pid} has not ended after {} s",
                END_LIMIT.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("the virtual machines have ended (process {pid})");
    Ok(())
}
